"""Nodes of others around the chunk sampler: what works with the KV cache, and what is refused before it goes wrong."""

from types import MethodType, SimpleNamespace

import pytest
import torch

from diagonal_sampler.schedule import DiagonalSchedule

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
CLOSE = 1e-4
BLOCKS = 2


@pytest.fixture
def run(prompt, sample_latent, empty_latent):
    """`run(model, **options)`: latents of three chunks."""

    def make(model, latent=None, positive=None, negative=None, **options):
        latent = empty_latent() if latent is None else latent
        positive = prompt() if positive is None else positive
        negative = prompt(1) if negative is None else negative
        return sample_latent(model, positive, negative, latent, DIAGONAL, seed=1, **options)["samples"]

    return make


def difference(a, b):
    return (a - b).abs().max()


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_guidance_that_predicts_a_prompt_again_leaves_the_cache_alone(tiny_wan, causal, run, cfg):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    model = causal(tiny_wan)
    plain = run(model, cfg=cfg)

    def guided(scale):
        # Without the first block, so that the second one has other keys than in the first prediction.
        options = {"double_layers": "0", "start_percent": 0.0, "end_percent": 1.0}
        return run(SkipLayerGuidanceDiT.execute(model, scale, **options).result[0], cfg=cfg)

    assert difference(guided(1e-6), plain) < CLOSE
    assert difference(guided(1.0), plain) > 0.01


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_nodes_that_skip_forwards_are_refused(tiny_wan, causal, run, name):
    from comfy_extras import nodes_easycache

    (model,) = getattr(nodes_easycache, name).execute(causal(tiny_wan), 1.0, 0.0, 0.95, False).result
    with pytest.raises(ValueError, match="EasyCache and LazyCache skip forwards"):
        run(model)


def test_a_node_that_splits_the_clip_is_refused(tiny_wan, causal, run):
    model = causal(tiny_wan)
    model.model_options["context_handler"] = object()  # as ComfyUI's own nodes leave it
    with pytest.raises(ValueError, match="Context windows cut the clip in another way"):
        run(model)


@pytest.mark.parametrize("causal_first", [True, False])
def test_a_node_that_splits_a_forward_over_devices_is_refused(tiny_wan, causal, run, causal_first):
    def split(model):
        """What create_multigpu_deepclones does to a MODEL, with a copy for a device that is there."""
        model, copy = model.clone(), model.clone()
        copy.is_multigpu_base_clone = True
        model.set_additional_models("multigpu", [*model.get_additional_models_with_key("multigpu"), copy])
        model.match_multigpu_clones()
        return model

    model = split(causal(tiny_wan)) if causal_first else causal(split(tiny_wan))
    with pytest.raises(ValueError, match="MultiGPU CFG Split .* one forward over devices"):
        run(model)


def test_the_split_with_one_device_changes_nothing(tiny_wan, causal, run):
    from comfy.multigpu import create_multigpu_deepclones

    model = causal(tiny_wan)
    assert torch.equal(run(create_multigpu_deepclones(model, 2)), run(model))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_sparse_attention_is_told_once(tiny_wan, causal, run, caplog):
    from comfy.patcher_extension import CallbacksMP

    model = causal(tiny_wan)
    plain = run(model)
    assert not any("attention" in line for line in warnings(caplog))
    # As the node BlockSparseAttention of ComfyUI after 0.30 leaves it, beside an override.
    model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "block_sparse_attention", lambda *args: None)
    assert torch.equal(run(model), plain)
    (told,) = [line for line in warnings(caplog) if "attention" in line.lower()]
    assert "BlockSparseAttention) can act on the first chunk only" in told


class Preference(torch.nn.Module):
    """Stands for ComfyUI's ComfyAttention, which 0.30 has not: a layer's wish, and the function for it if there is."""

    def __init__(self, config, function):
        super().__init__()
        self.config, self.function = config, function


@pytest.fixture
def wished(pack_module, monkeypatch):
    """`wished(model, preference)`: puts it on every layer and lists what those layers ask ComfyUI's attention for."""
    module = pack_module("model_patches.attention")

    def make(model, preference):
        asked, attention = [], module.attention_pytorch

        def dispatch(*args, **kwargs):
            """As the one after 0.30: it takes the keyword off."""
            asked.append(kwargs.pop("preferred_attention", None))
            return attention(*args, **kwargs)

        monkeypatch.setattr(module, "attention_pytorch", dispatch)
        monkeypatch.setattr(module, "optimized_attention", dispatch)
        for block in model.model.diffusion_model.blocks:
            block.self_attn.comfy_attention = block.cross_attn.comfy_attention = preference
        return asked

    return make


def test_a_dense_kind_of_attention_is_passed_on(pack_module, monkeypatch, tiny_wan, causal, run, wished, caplog):
    def int8(q, k, v, heads, **kwargs):
        raise AssertionError("ComfyUI's own dispatcher calls it")

    plain = run(causal(tiny_wan))
    monkeypatch.setattr(pack_module("model_patches.attention"), "DENSE_PREFERENCES", (int8,))
    preference = Preference({"attention": "comfy_kitchen_int8"}, int8)
    asked = wished(tiny_wan, preference)
    assert difference(run(causal(tiny_wan)), plain) < CLOSE
    assert len(asked) == DIAGONAL.nfe(3) * BLOCKS * 2, "self-attention and cross-attention"
    assert all(found is preference for found in asked)
    assert not any("asks for the attention" in line for line in warnings(caplog))


@pytest.mark.parametrize("of_a_lora", [False, True])
def test_another_kind_is_not_used_and_told(tiny_wan, causal, run, wished, caplog, of_a_lora):
    def sol(*args, **kwargs):
        raise AssertionError("it needs as many keys as queries")

    plain = run(causal(tiny_wan))
    sparse = Preference({"attention": "comfy_kitchen_sol", "tau": 0.75}, sol)
    asked = wished(tiny_wan, Preference(None, None) if of_a_lora else sparse)
    model = causal(tiny_wan)
    if of_a_lora:  # ComfyUI's add_patches puts it in the other's place
        for block in range(BLOCKS):
            model.add_object_patch(f"diffusion_model.blocks.{block}.self_attn.comfy_attention", sparse)
    assert difference(run(model), plain) < CLOSE
    assert asked and not any(asked)
    (told,) = [line for line in warnings(caplog) if "asks for the attention" in line]
    assert f"comfy_kitchen_sol', 'tau': 0.75}} in {2 if of_a_lora else 4} layers, which is not used" in told


def test_a_kind_without_a_kernel_here_is_ignored_as_comfyui_does(tiny_wan, causal, run, wished, caplog):
    asked = wished(tiny_wan, Preference({"attention": "comfy_kitchen_int8"}, None))
    run(causal(tiny_wan))
    assert asked and not any(asked)
    assert not any("asks for the attention" in line for line in warnings(caplog))


@pytest.mark.parametrize("given", [{}, {"skip_reshape": True}, {"skip_output_reshape": True}, {"mask": True}])
def test_an_override_may_call_our_attention_in_its_own_shapes(pack_module, given):
    from comfy.ldm.modules.attention import attention_pytorch

    q, k, v = torch.randn((3, 1, 6, 2 * 8), generator=torch.Generator().manual_seed(0))
    k, v = k[:, :4], v[:, :4]
    options = dict(given)
    if "mask" in options:
        options["mask"] = torch.eye(6, 4) * 5

    def override(function, q, k, v, heads, **kwargs):
        if "skip_reshape" in options:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = function(q, k, v, heads, **kwargs, **options)
        return out.transpose(1, 2).flatten(2) if "skip_output_reshape" in options else out

    plain = pack_module("model_patches.attention")._attention_plain
    found = plain(q, k, v, heads=2, transformer_options={"optimized_attention_override": override})
    assert difference(found, attention_pytorch(q, k, v, 2, mask=options.get("mask"))) < 1e-6


def test_a_latent_of_several_streams_is_refused(tiny_wan, causal, run):
    from comfy.nested_tensor import NestedTensor

    video, audio = torch.zeros(1, 16, 9, 4, 4), torch.zeros(1, 8, 9, 4)
    with pytest.raises(ValueError, match="several streams .video with audio.; a causal Wan model makes video only"):
        run(causal(tiny_wan), {"samples": NestedTensor([video, audio])})


def test_a_step_cache_of_another_pack_is_refused(tiny_wan, causal, run):
    from comfy.patcher_extension import WrappersMP

    model, kept = causal(tiny_wan), []

    def reuse(executor, x, *args, **kwargs):
        if len(kept) < 3:
            kept.append(executor(x, *args, **kwargs))
        return kept[-1]

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", reuse)
    with pytest.raises(ValueError, match=r"reuses earlier forwards \(EasyCache"):
        run(model)


def test_guidance_for_some_steps_only_is_refused(tiny_wan, causal, run):
    from comfy.patcher_extension import WrappersMP

    model = causal(tiny_wan)

    def without_negative_at_last(executor, model, conds, x, timestep, options):
        if timestep[0] < 0.9:
            return [executor(model, conds[:1], x, timestep, options)[0]] * 2
        return executor(model, conds, x, timestep, options)

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "theirs", without_negative_at_last)
    with pytest.raises(ValueError, match="skips forwards, or prompts in some of them"):
        run(model, cfg=2.0)


def replaced(model, part, forward):
    """The MODEL with `forward(module, original, x, ...)` as every block's `part`.forward."""
    out = model.clone()
    for block in range(BLOCKS):
        path = f"diffusion_model.blocks.{block}.{part}"
        module, original = out.get_model_object(path), out.get_model_object(f"{path}.forward")

        def theirs(self, *args, original=original, **kwargs):
            return forward(self, original, *args, **kwargs)

        out.add_object_patch(f"{path}.forward", MethodType(theirs, module))
    return out


def test_cross_attention_that_another_pack_changed_stays_theirs(tiny_wan, causal, run):
    def half(module, original, *args, **kwargs):
        return 0.5 * original(*args, **kwargs)

    plain = run(causal(tiny_wan))
    before = run(causal(replaced(tiny_wan, "cross_attn", half)))
    after = run(replaced(causal(tiny_wan), "cross_attn", half))
    assert difference(before, plain) > 0.01
    assert difference(before, after) < CLOSE


class OnCuda(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("what", ["ffn", "ffn.1", "a hook"])
def test_feed_forward_layers_that_another_pack_runs_in_its_own_way_stay_theirs(
    tiny_wan, causal, run, pack_module, monkeypatch, what
):
    """As packs do that run them in pieces. On a GPU the first product would end in GELU without asking them."""
    lean, calls = pack_module("model_patches.causal"), []
    feed_forward, hooks = lean._LeanBlock._feed_forward, []

    def on_cuda(self, y):
        return feed_forward(self, y.as_subclass(OnCuda)).as_subclass(torch.Tensor)

    def own(module, original, x):
        calls.append(1)
        return original(x)

    monkeypatch.setattr(lean, "_multiplies_as_it_is", lambda layer, x: True)
    monkeypatch.setattr(lean._LeanBlock, "_feed_forward", on_cuda)
    first = tiny_wan.model.diffusion_model.blocks[0].ffn[0]
    hook = first.register_forward_hook(lambda *args: hooks.append(1))
    run(causal(tiny_wan))
    assert not hooks, "without another node the first product ends in GELU"
    hook.remove()
    if what == "a hook":
        for block in tiny_wan.model.diffusion_model.blocks:
            block.ffn.register_forward_hook(lambda *args: calls.append(1))
        run(causal(tiny_wan))
    else:
        run(replaced(causal(tiny_wan), what, own))
    assert len(calls) == DIAGONAL.nfe(3) * BLOCKS


def test_comfyuis_own_nag_is_said_to_change_nothing(tiny_wan, causal, run, caplog):
    from comfy_extras.nodes_nag import NAGuidance

    plain = run(causal(tiny_wan))
    assert not [record for record in caplog.records if "changes nothing" in record.getMessage()]
    model = NAGuidance.execute(causal(tiny_wan), nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5).result[0]
    assert difference(run(model), plain) < CLOSE
    assert [record for record in caplog.records if "changes nothing" in record.getMessage()]


def test_replaced_self_attention_is_refused(tiny_wan, causal, run):
    def own(module, original, x, freqs, transformer_options=None, **kwargs):
        return type(module).forward(module, x, freqs, transformer_options=transformer_options or {})

    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.forward, which causal attention has to replace"):
        causal(replaced(tiny_wan, "self_attn", own))
    with pytest.raises(ValueError, match="replaced the self-attention of 2 of 2 blocks"):
        run(replaced(causal(tiny_wan), "self_attn", own))

    def around(module, original, *args, **kwargs):
        return original(*args, **kwargs)

    assert torch.equal(run(replaced(causal(tiny_wan), "self_attn", around)), run(causal(tiny_wan)))


def test_replaced_self_attention_that_fails_is_named_in_place_of_its_error(tiny_wan, causal, run):
    def of_the_whole_clip(module, original, x, freqs, transformer_options=None, **kwargs):
        """As packs do that weigh frames against each other."""
        return module.o(module.v(x)) * x.view(x.shape[0], 21, -1, x.shape[-1]).mean()

    named = r"replaced the self-attention of block 0, and .* fails there \(RuntimeError: .*\)\. Remove that node"
    with pytest.raises(ValueError, match=named):
        run(replaced(causal(tiny_wan), "self_attn", of_the_whole_clip))

    def out_of_memory(module, original, *args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        run(replaced(causal(tiny_wan), "self_attn", out_of_memory))
    with pytest.raises(KeyError):  # of something else, behind an attention that wrote
        run(replaced(causal(tiny_wan), "ffn", lambda module, original, x: {}["theirs"]))


def test_a_block_that_another_node_leaves_out_is_not_missed(tiny_wan, causal, run):
    """As SkipLayerGuidance does, and as a node may for good: such a block has no keys and values to keep."""
    plain = run(causal(tiny_wan))

    def replaced_block(replacement):
        model = causal(tiny_wan)
        model.set_model_patch_replace(replacement, "dit", "double_block", 1)
        return run(model)

    around = replaced_block(lambda args, extra: extra["original_block"](args))
    assert difference(around, plain) < CLOSE
    left_out = replaced_block(lambda args, extra: {"img": args["img"]})
    assert torch.isfinite(left_out).all() and difference(left_out, plain) > 0.01


def without_what_is_kept(model):
    """The MODEL with ComfyUI's own forward and cross-attention, which keep nothing between forwards."""
    out = model.clone()
    for path in [path for path in out.object_patches if path.endswith((".forward_orig", "cross_attn.forward"))]:
        del out.object_patches[path]
    return out


def test_a_function_wrapper_may_change_text_and_noise_level_in_any_forward(tiny_wan, causal, prompt, run):
    other = prompt(9)[0][0]

    def text_by_level(apply_model, args):
        c = args["c"]
        if args["timestep"][0] < 0.9:
            c = {**c, "c_crossattn": other.to(c["c_crossattn"]).expand_as(c["c_crossattn"])}
        return apply_model(args["input"], args["timestep"], **c)

    def level_by_turn(apply_model, args):
        turns.append(1)
        return apply_model(args["input"], args["timestep"] * (0.8 if len(turns) % 2 else 1.0), **args["c"])

    model = causal(tiny_wan)
    plain = run(model)
    for wrapper in (text_by_level, level_by_turn):
        turns = []
        changed = model.clone()
        changed.set_model_unet_function_wrapper(wrapper)
        found = run(changed)
        assert difference(found, plain) > 0.01
        turns = []
        assert difference(found, run(without_what_is_kept(changed))) < CLOSE


@pytest.mark.parametrize("kind", ["predict_noise", "calc_cond_batch", "a function for calc_cond_batch"])
def test_a_node_around_guidance_may_change_text_and_noise_level_too(tiny_wan, causal, prompt, run, kind):
    import comfy.conds
    import comfy.samplers

    turns = []

    def other_text(conds):
        text = comfy.conds.CONDRegular(prompt(20 + len(turns))[0][0])
        return [{**cond, "model_conds": {**cond["model_conds"], "c_crossattn": text}} for cond in conds]

    def predict(executor, x, timestep, model_options, seed):
        turns.append(1)
        guider = executor.class_obj
        guider.conds = {**guider.conds, "positive": other_text(guider.conds["positive"])}
        return executor(x, timestep, model_options, seed)

    def batch(executor, model, conds, x, timestep, options):
        turns.append(1)
        return executor(model, conds, x, timestep * (0.8 if len(turns) % 2 else 1.0), options)

    def function(args):
        turns.append(1)
        level = args["sigma"] * (0.8 if len(turns) % 2 else 1.0)
        return comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], level, args["model_options"])

    model = causal(tiny_wan)
    plain, changed = run(model), model.clone()
    if kind.startswith("a function"):
        changed.model_options["sampler_calc_cond_batch_function"] = function
    else:
        changed.add_wrapper_with_key(kind, "theirs", {"predict_noise": predict, "calc_cond_batch": batch}[kind])
    found = run(changed)
    assert len(turns) == DIAGONAL.nfe(3) and difference(found, plain) > 0.01
    turns.clear()
    assert difference(found, run(without_what_is_kept(changed))) < CLOSE


@pytest.mark.parametrize("what", ["text", "noise level"])
def test_what_is_predicted_once_more_may_have_another_text_and_noise_level(tiny_wan, causal, prompt, run, what):
    import comfy.conds
    import comfy.samplers

    def again(args):
        conds, level = args["cond"], args["sigma"]
        if what == "text":
            text = comfy.conds.CONDRegular(prompt(9)[0][0])
            conds = [{**cond, "model_conds": {**cond["model_conds"], "c_crossattn": text}} for cond in conds]
        else:
            level = level * 0.5
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [conds], args["input"], level, args["model_options"])
        return args["denoised"] + 0.5 * (other - args["cond_denoised"])

    model = causal(tiny_wan)
    plain, guided = run(model, cfg=2.0), model.clone()
    guided.set_model_sampler_post_cfg_function(again)
    found = run(guided, cfg=2.0)
    assert difference(found, plain) > 1e-3
    assert difference(found, run(without_what_is_kept(guided), cfg=2.0)) < CLOSE


@pytest.mark.parametrize("kind", ["apply_model", "diffusion_model"])
@pytest.mark.parametrize("what", ["text", "noise level"])
def test_a_wrapper_around_the_model_may_change_text_and_noise_level_too(tiny_wan, causal, prompt, run, kind, what):
    other, turns = prompt(9)[0][0], []
    text_at = {"apply_model": 3, "diffusion_model": 2}[kind]

    def change(executor, *args, **kwargs):
        turns.append(1)
        args = list(args)
        if what == "text" and len(turns) % 2:
            args[text_at] = other.to(args[text_at]).expand_as(args[text_at])
        elif what == "noise level":
            args[1] = args[1] * (0.8 if len(turns) % 2 else 1.0)
        return executor(*args, **kwargs)

    def count(executor, *args, **kwargs):
        turns.append(1)
        return executor(*args, **kwargs)

    model = causal(tiny_wan)
    plain, changed = run(model), model.clone()
    changed.add_wrapper_with_key(kind, "theirs", change)
    found = run(changed)
    assert len(turns) == DIAGONAL.nfe(3) and difference(found, plain) > 0.01
    turns.clear()
    assert difference(found, run(without_what_is_kept(changed))) < CLOSE


def test_what_a_run_keeps_is_kept_under_torch_compiles_wrapper(tiny_wan, causal, run):
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    made = []
    tiny_wan.model.diffusion_model.blocks[0].cross_attn.k.register_forward_hook(lambda *args: made.append(1))
    model = causal(tiny_wan)
    model.add_wrapper_with_key("apply_model", COMPILE_KEY, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    model.add_wrapper_with_key("apply_model", "taken away", print)
    model.get_wrappers("apply_model", "taken away").clear()
    run(model)
    assert len(made) == 1


def test_the_negative_that_a_node_asks_for_at_cfg_1_is_checked_and_counted(
    tiny_wan, causal, prompt, run, pack_module, monkeypatch
):
    """NAG and others; without them ComfyUI leaves it out."""
    asked, plans = [], pack_module("model_patches.clip_plan")
    real = plans._CacheMemory
    monkeypatch.setattr(plans, "_CacheMemory", lambda nbytes: asked.append(nbytes) or real(nbytes))
    model = causal(tiny_wan)
    asking = model.clone()
    asking.disable_model_cfg1_optimization()
    run(model), run(model, cfg=2.0), run(asking)
    assert asked[0] < asked[1] == asked[2]
    negative = prompt(1, mask=torch.ones(1, 4, 4))
    run(model, negative=negative)
    with pytest.raises(ValueError, match="negative conditioning .entry 1. has a mask"):
        run(asking, negative=negative)


def test_cfg_override_to_or_from_cfg_1_is_refused_with_the_remedy(tiny_wan, causal, run):
    from comfy_extras.nodes_custom_sampler import CFGOverride

    (model,) = CFGOverride.execute(causal(tiny_wan), 3.0, 0.0, 0.05).result  # the first steps only
    with pytest.raises(ValueError, match=r"CFG Override to or from cfg 1.*a cfg such as 1.01 in place of 1"):
        run(model, cfg=1.0)
    assert difference(run(model, cfg=1.01), run(causal(tiny_wan), cfg=1.01)) > 0.01


def test_a_conditioning_for_vace_is_refused(tiny_wan, causal, prompt, run):
    from comfy_extras.nodes_wan import WanVaceToVideo

    vae = SimpleNamespace(
        encode=lambda x: torch.randn(1, 16, (x.shape[0] - 1) // 4 + 1, x.shape[1] // 8, x.shape[2] // 8)
    )
    sizes = {"width": 32, "height": 32, "length": 33, "batch_size": 1, "strength": 1.0}
    positive, _, latent, _ = WanVaceToVideo.execute(
        prompt(), prompt(1), vae, **sizes, control_video=torch.rand(33, 32, 32, 3)
    ).result
    with pytest.raises(ValueError, match="a video for VACE .vace_frames., which a causal text-to-video model cannot"):
        run(causal(tiny_wan), latent=latent, positive=positive)


@pytest.mark.parametrize("name", ["ModelSamplingAuraFlow", "ModelSamplingFlux", "ModelSamplingContinuousEDM"])
def test_a_node_that_counts_noise_levels_in_another_way_is_refused(tiny_wan, causal, run, name):
    from comfy_extras import nodes_model_advanced as nodes

    node, model = getattr(nodes, name)(), causal(tiny_wan)
    (patched,) = {
        "ModelSamplingAuraFlow": lambda: node.patch_aura(model, 3.0),
        "ModelSamplingFlux": lambda: node.patch(model, 1.15, 0.5, 64, 64),
        "ModelSamplingContinuousEDM": lambda: node.patch(model, "v_prediction", 120.0, 0.002),
    }[name]()
    with pytest.raises(ValueError, match="counts noise levels up to .*trained with 1000.* Remove the node"):
        run(patched)


def test_a_wrapper_that_splits_the_batch_is_refused(tiny_wan, causal, run):
    model = causal(tiny_wan)

    def split(apply_model, args):
        parts = [
            apply_model(x, t, **{**args["c"], "c_crossattn": text})
            for x, t, text in zip(
                args["input"].split(1), args["timestep"].split(1), args["c"]["c_crossattn"].split(1), strict=True
            )
        ]
        return torch.cat(parts)

    model.set_model_unet_function_wrapper(split)
    with pytest.raises(ValueError, match="1 samples for 2 prompts"):
        run(model, cfg=2.0)


def test_a_wrapper_that_predicts_each_prompt_of_a_batch_apart_is_refused(tiny_wan, causal, run, empty_latent):
    """Each call has as many samples as prompts, and they are of one."""
    model = causal(tiny_wan)

    def split(apply_model, args):
        halves = (value.chunk(2) for value in (args["input"], args["timestep"], args["c"]["c_crossattn"]))
        return torch.cat(
            [apply_model(x, t, **{**args["c"], "c_crossattn": text}) for x, t, text in zip(*halves, strict=True)]
        )

    model.set_model_unet_function_wrapper(split)
    with pytest.raises(ValueError, match="2 samples for 2 prompts"):
        run(model, empty_latent(batch=2), cfg=2.0)


def test_a_block_left_out_in_some_forwards_only_is_refused(tiny_wan, causal, run):
    """Its keys and values would stay those of another noise level."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    model = causal(tiny_wan)
    throughout = run(SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, double_layers="0").result[0], cfg=2.0)
    assert difference(throughout, run(model, cfg=2.0)) > 1e-3
    with pytest.raises(ValueError, match="leaves blocks out in some forwards"):
        run(SkipLayerGuidanceDiTSimple.execute(model, 0.2, 1.0, double_layers="0").result[0], cfg=2.0)


def test_other_rotations_are_refused_where_the_cache_moves_its_keys(tiny_wan, causal, run, empty_latent):
    """As RifleX lowers one frequency; with positions that only grow the network's own are all there are."""

    class Lowered(torch.nn.Module):
        def __init__(self, embedder):
            super().__init__()
            self.embedder = embedder

        def forward(self, ids):
            out = self.embedder(ids).clone()
            out[..., 3, :, :] = out[..., 4, :, :]
            return out

    def lowered(model):
        out = model.clone()
        embedder = Lowered(out.get_model_object("diffusion_model.rope_embedder"))
        out.add_object_patch("diffusion_model.rope_embedder", embedder)
        return out

    moving = causal(tiny_wan, window=6, sink=3, positions="window")
    assert torch.isfinite(run(moving)).all()
    with pytest.raises(ValueError, match=r"changed the rotations of positions \(RifleX"):
        run(lowered(moving))
    assert torch.isfinite(run(lowered(causal(tiny_wan, positions="absolute")))).all()
    network = moving.get_model_object("diffusion_model")
    other = moving.clone()
    other.add_object_patch("diffusion_model.rope_encode", lambda *args, **kwargs: network.rope_encode(*args, **kwargs))
    with pytest.raises(ValueError, match="changed the rotations"):
        run(other)


def test_a_sample_taken_from_a_batch_gets_the_noise_it_has_there(tiny_wan, causal, run, empty_latent):
    import nodes

    model, batch = causal(tiny_wan), empty_latent(batch=3)
    whole = run(model, latent=batch)
    for first, length in ((1, 1), (1, 2)):
        (part,) = nodes.LatentFromBatch().frombatch(batch, first, length)
        assert part["batch_index"] == list(range(first, first + length))
        assert difference(run(model, latent=part), whole[first : first + length]) < CLOSE
    same = run(model, latent={**empty_latent(batch=2), "batch_index": [0, 0]})
    assert difference(same[:1], same[1:]) < CLOSE


def test_a_batch_index_that_does_not_fit_is_said(tiny_wan, causal, run, empty_latent, caplog):
    model = causal(tiny_wan)
    found = run(model, latent={**empty_latent(), "batch_index": [3, 4]})
    assert torch.equal(found, run(model)) and "batch_index names 2 samples" in caplog.text


def test_model_sampling_has_no_say_and_that_is_said(tiny_wan, causal, run, caplog):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = causal(tiny_wan)
    plain = run(model)
    assert "shift" not in caplog.text
    (patched,) = ModelSamplingSD3().patch(model, 12.0)
    assert torch.equal(run(patched), plain)
    assert "shift 12" in caplog.text and "Set shift in Diagonal Schedule" in caplog.text
    caplog.clear()
    run(ModelSamplingSD3().patch(model, 5.0)[0])
    assert "shift" not in caplog.text


def test_guidance_that_a_node_replaces_acts_at_cfg_1_too_and_that_is_said(tiny_wan, causal, run, caplog):
    def without_the_first_step(args):
        levels = args["model_options"]["transformer_options"]["sample_sigmas"]
        return args["cond"] * (args["timestep"][0] != levels[0])

    model = causal(tiny_wan)
    plain = run(model)
    assert "guidance" not in caplog.text
    changed = model.clone()
    changed.set_model_sampler_cfg_function(without_the_first_step)
    assert difference(run(changed), plain) > 0.01
    (told,) = [line for line in warnings(caplog) if "guidance" in line]
    assert "cfg is 1" in told and "without_the_first_step" in told and "first step of every chunk" in told
    caplog.clear()
    run(changed, cfg=2.0)
    assert "guidance" not in caplog.text


def test_context_of_another_vae_or_batch_is_refused(tiny_wan, causal, run, empty_latent, given_frames, pack_module):
    import comfy.sd

    model, latent = causal(tiny_wan), empty_latent(batch=3)
    with pytest.raises(ValueError, match="of 2 videos and the latent has 3"):
        run(model, latent=latent, context=given_frames(torch.zeros(2, 16, 1, 4, 4)))
    with pytest.raises(ValueError, match="has 16 channels: encode them with the model's own VAE"):
        run(model, context=given_frames(torch.zeros(1, 48, 1, 4, 4)))
    pixel_space = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="encodes pictures, not video"):
        pack_module("model_patches.context_frames").encode_context(pixel_space, torch.rand(5, 32, 32, 3), 2)
