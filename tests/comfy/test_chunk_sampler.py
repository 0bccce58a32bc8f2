"""The chunk sampler on ComfyUI's Wan: exactness, isolation, refusals."""

import copy
import dataclasses
import functools
import importlib.util
import logging
import math
import threading
import weakref
from types import SimpleNamespace

import comfy.conds
import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import node_helpers
import pytest
import torch
from ar_video import ArVideoNoise, ar_video
from comfy.ldm.wan.ar_model import CausalWanAttentionBlock
from comfy.ldm.wan.model import WanAttentionBlock, WanModel
from comfy_extras import nodes_mochi, nodes_wan
from safetensors.torch import load_file

from diagonal_sampler import noise as noise_module
from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.flow import camera_flow
from diagonal_sampler.noise import INITIAL_STEP, SeededNoise
from diagonal_sampler.provenance import Provenance
from diagonal_sampler.rope import rotation_table
from diagonal_sampler.sampler import Chunk, Forward, sample_chunks
from diagonal_sampler.schedule import DEMO_PRESET, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
UNIFORM = DiagonalSchedule.preset("self forcing")
EXACT = 1e-5
# The header of a Wan file whose text embedding is not UMT5's; without "causal_ar" ComfyUI takes its plain class.
TINY_TEXT = {"config": '{"transformer": {"text_dim": 64}}'}


ONE_KEYFRAME, TWO_KEYFRAMES = (
    SimpleNamespace(hook_keyframe=SimpleNamespace(keyframes=[None] * count)) for count in (1, 2)
)


def test_equals_comfyuis_own_ar_sampler(tiny_wan, causal, prompt, sample_latent):
    noise = torch.randn(1, 16, 11, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = ar_video(tiny_wan, prompt(), noise, 7)
    draws = ArVideoNoise(noise, 7)
    ours = sample_latent(
        causal(tiny_wan), prompt(), [], {"samples": torch.zeros_like(noise)}, UNIFORM, seed=7, noise=draws
    )
    assert expected.std() > 0.1
    assert (ours["samples"] - expected).abs().max() < EXACT


def test_start_image_of_ar_video_i2v_is_honoured(tiny_wan, causal, prompt, sample_latent):
    image_latent = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(2))
    model = tiny_wan.clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": image_latent}
    noise = torch.randn(1, 16, 7, 4, 6, generator=torch.Generator().manual_seed(1))

    class Shifted(ArVideoNoise):
        def __call__(self, chunk, step, frames):
            if step == INITIAL_STEP:
                return self.noise[:, :, 1 + 3 * chunk : 1 + 3 * chunk + frames]
            return super().__call__(chunk, step, frames)

    expected = ar_video(model, prompt(), noise, 7)
    result = sample_latent(
        causal(model), prompt(), [], {"samples": torch.zeros_like(noise)}, UNIFORM, seed=7, noise=Shifted(noise, 7)
    )["samples"]  # fmt: skip
    assert (result - expected).abs().max() < EXACT
    assert torch.allclose(result[:, :, :1], image_latent, atol=1e-5)
    other = sample_latent(causal(tiny_wan), prompt(), [], {"samples": torch.zeros_like(noise)}, UNIFORM, seed=7)
    assert (other["samples"] - result).abs().max() > 0.1


def test_start_image_of_another_size_is_refused(tiny_wan, causal, prompt, sample_latent, empty_latent):
    model = tiny_wan.clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.randn(1, 16, 1, 6, 6)}
    with pytest.raises(ValueError, match="start image is 48x48 but the video is 32x32"):
        sample_latent(causal(model), prompt(), [], empty_latent(), DIAGONAL, seed=0)


def reference(path, settings, schedule, noise_source, shape, contexts, cfg=1.0, weights=None):
    """The same run on the core's DiT: contexts are the positive and perhaps the negative text."""
    weights = load_file(path) if weights is None else weights
    model = WanDiT(WanConfig.from_state_dict(weights))
    model.load_state_dict(weights)
    cache = KVCache(settings, shape[2])

    def denoise(x, at):
        out = []
        for index, context in enumerate(contexts):
            condition = cache.condition(index)
            timestep = torch.full((x.shape[0],), 1000 * at.sigma)
            flow = model(x, timestep, context.expand(x.shape[0], -1, -1), cache=condition)
            out.append(x - at.sigma * flow)
        return out[0] if len(out) == 1 else out[1] + cfg * (out[0] - out[1])

    with torch.no_grad():
        chunks = sample_chunks(
            denoise, noise_source, schedule, cache, frames=shape[2], frames_per_chunk=settings.frames_per_chunk
        )
        return torch.cat([chunk.latents for chunk in chunks], dim=2)


def in_model_space(model, result):
    return model.get_model_object("latent_format").process_in(result["samples"])


@pytest.mark.parametrize("negative_tokens", [16, 12])
def test_guidance_keeps_one_cache_per_condition(
    tiny_wan, tiny_wan_path, causal, prompt, sample_latent, negative_tokens
):
    settings = {"window": 6, "sink": 3}
    positive, negative = prompt(0), prompt(5, negative_tokens)
    model = causal(tiny_wan, **settings)
    result = sample_latent(
        model, positive, negative, {"samples": torch.zeros(1, 16, 11, 4, 4)}, DIAGONAL, seed=3, cfg=3.0
    )
    expected = reference(
        tiny_wan_path, CausalSettings(**settings), DIAGONAL, SeededNoise(3, (1, 16, 4, 4)), (1, 16, 11, 4, 4),
        [positive[0][0], negative[0][0]], cfg=3.0,
    )  # fmt: skip
    assert (in_model_space(model, result) - expected).abs().max() < 1e-4


def test_prompts_that_memory_lets_be_predicted_only_one_by_one_keep_their_own_text(
    tiny_wan, causal, prompt, sample_latent, empty_latent, monkeypatch
):
    model, batches = causal(tiny_wan), []
    model.set_model_unet_function_wrapper(
        lambda apply, args: (
            batches.append(args["input"].shape[0]) or apply(args["input"], args["timestep"], **args["c"])
        )
    )

    def run(model):
        return sample_latent(model, prompt(0), prompt(1), empty_latent(), DIAGONAL, seed=1, cfg=3.0)["samples"]

    run(model)
    assert set(batches) == {2}
    together = run(causal(tiny_wan))
    batches.clear()
    # What ComfyUI asks before it puts several prompts into one forward.
    monkeypatch.setattr(tiny_wan.model, "memory_required", lambda *args, **kwargs: 1e18)
    run(model)
    assert set(batches) == {1}
    assert (run(causal(tiny_wan)) - together).abs().max() < EXACT


def test_no_prompt_is_held_twice_where_memory_changes_their_order(
    tiny_wan, causal, prompt, sample_latent, empty_latent, pack_module, monkeypatch
):
    causal_module, sampling = pack_module("model_patches.causal"), pack_module("model_patches.sampling")
    runs, batches, real = [], [], tiny_wan.model.memory_required
    monkeypatch.setattr(
        sampling, "CausalRun", lambda *a, **k: runs.append(causal_module.CausalRun(*a, **k)) or runs[-1]
    )

    def watch(progress):
        held = [(part, condition) for part, conditions, _ in runs[-1]._text for condition in conditions]
        batches.append(len({conditions for _, conditions, _ in runs[-1]._text}))
        assert len(held) == len(set(held)) == (2 + 1) * 2, "keys and values of two layers, one embedding; two prompts"

    def run(**more):
        return sample_latent(causal(tiny_wan), prompt(0), prompt(1), empty_latent(), DIAGONAL, seed=1, cfg=3.0, **more)[
            "samples"
        ]

    together = run()
    # What ComfyUI asks before it puts several prompts into one forward: two forwards of three are of one each.
    monkeypatch.setattr(tiny_wan.model, "memory_required", lambda *a, **k: 1e18 if len(batches) % 3 else real(*a, **k))
    assert (run(on_progress=watch) - together).abs().max() < EXACT
    assert batches[:4] == [1, 2, 2, 1]


def test_a_batch_equals_its_samples_alone(tiny_wan, causal, prompt, sample_latent):
    model = causal(tiny_wan, window=6, sink=3)
    pair = SeededNoise(1, (2, 16, 4, 4))
    both = sample_latent(model, prompt(), [], {"samples": torch.zeros(2, 16, 8, 4, 4)}, DIAGONAL, seed=1, noise=pair)
    alone = sample_latent(
        model, prompt(), [], {"samples": torch.zeros(1, 16, 8, 4, 4)}, DIAGONAL, seed=1,
        noise=lambda chunk, step, frames: pair(chunk, step, frames)[1:],
    )  # fmt: skip
    assert (both["samples"][1:] - alone["samples"]).abs().max() < EXACT


def test_negative_is_ignored_at_cfg_1(tiny_wan, causal, prompt, sample_latent, empty_latent):
    model = causal(tiny_wan)
    a = sample_latent(model, prompt(), prompt(8), empty_latent(), DIAGONAL, seed=1)
    b = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)
    assert torch.equal(a["samples"], b["samples"])


def lora_file(seed=0, rank=4):
    generator = torch.Generator().manual_seed(seed)
    key = "diffusion_model.blocks.{}.{}"
    out = {}
    for layer in (0, 1):
        for name in ("self_attn.q", "self_attn.k", "cross_attn.v", "ffn.0"):
            size = (256 if name == "ffn.0" else 128, 128)
            path = key.format(layer, name)
            out[f"{path}.lora_A.weight"] = torch.randn(rank, size[1], generator=generator) * 0.1
            out[f"{path}.lora_B.weight"] = torch.randn(size[0], rank, generator=generator) * 0.1
    return out


def merged(path, lora, strength):
    weights = load_file(path)
    for key in [k for k in lora if k.endswith("lora_A.weight")]:
        target = key.removeprefix("diffusion_model.").replace("lora_A.weight", "weight")
        weights[target] = weights[target] + strength * lora[key.replace("lora_A", "lora_B")] @ lora[key]
    return weights


@pytest.mark.parametrize("lora_first", [True, False])
def test_exact_under_comfyuis_lora(tiny_wan, tiny_wan_path, causal, prompt, sample_latent, lora_first):
    lora, settings = lora_file(), {"window": 6, "sink": 3}
    if lora_first:
        model = causal(comfy.sd.load_lora_for_models(tiny_wan, None, lora, 0.7, 0)[0], **settings)
    else:
        model = comfy.sd.load_lora_for_models(causal(tiny_wan, **settings), None, lora, 0.7, 0)[0]
    result = sample_latent(model, prompt(), [], {"samples": torch.zeros(1, 16, 9, 4, 4)}, DIAGONAL, seed=3)
    run = (CausalSettings(**settings), DIAGONAL, SeededNoise(3, (1, 16, 4, 4)), (1, 16, 9, 4, 4), [prompt()[0][0]])
    expected = reference(tiny_wan_path, *run, weights=merged(tiny_wan_path, lora, 0.7))
    plain = reference(tiny_wan_path, *run)
    assert (in_model_space(model, result) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 0.01


def test_exact_with_manually_cast_fp8_weights(tiny_wan_path, causal, prompt, sample_latent):
    weights = load_file(tiny_wan_path)
    wan = comfy.sd.load_diffusion_model_state_dict(
        {k: v.clone() for k, v in weights.items()},
        model_options={"dtype": torch.float8_e4m3fn},
        metadata=TINY_TEXT,
    )
    assert wan.model.get_dtype() == torch.float8_e4m3fn
    compute = wan.model.get_dtype_inference()
    model = causal(wan, window=6, sink=3)
    rounded = {
        k: (v if k.startswith("patch_embedding") else v.to(torch.float8_e4m3fn)).float() for k, v in weights.items()
    }
    result = sample_latent(model, prompt(), [], {"samples": torch.zeros(1, 16, 9, 4, 4)}, DIAGONAL, seed=3)
    expected = reference(
        tiny_wan_path, CausalSettings(window=6, sink=3), DIAGONAL, SeededNoise(3, (1, 16, 4, 4)), (1, 16, 9, 4, 4),
        [prompt()[0][0]], weights=rounded,
    )  # fmt: skip
    difference = (in_model_space(model, result) - expected).abs().max()
    assert difference < (1e-4 if compute == torch.float32 else 0.1)


def test_a_lora_hook_applies_to_its_condition(tiny_wan, causal, prompt, sample_latent):
    import comfy.hooks

    lora = lora_file()
    hooks = comfy.hooks.create_hook_lora(lora, 0.7, 0.0)
    hooked = prompt(0, hooks=hooks)
    model = causal(tiny_wan, window=6, sink=3)
    result = sample_latent(model, hooked, [], {"samples": torch.zeros(1, 16, 9, 4, 4)}, DIAGONAL, seed=3)
    patched = comfy.sd.load_lora_for_models(causal(tiny_wan, window=6, sink=3), None, lora, 0.7, 0)[0]
    expected = sample_latent(patched, prompt(0), [], {"samples": torch.zeros(1, 16, 9, 4, 4)}, DIAGONAL, seed=3)
    plain = sample_latent(model, prompt(0), [], {"samples": torch.zeros(1, 16, 9, 4, 4)}, DIAGONAL, seed=3)
    assert (result["samples"] - expected["samples"]).abs().max() < 1e-4
    assert (plain["samples"] - expected["samples"]).abs().max() > 0.01


def test_a_hook_on_one_prompt_leaves_the_noise_levels_of_the_other_alone(
    tiny_wan, causal, prompt, sample_latent, empty_latent
):
    """What follows from the noise level is kept for a run, but not where a hook changes the weights it is made with."""
    import comfy.hooks

    generator = torch.Generator().manual_seed(1)
    path = "diffusion_model.time_embedding.2"
    size = tiny_wan.model.diffusion_model.time_embedding[2].weight.shape[0]
    lora = {
        f"{path}.lora_A.weight": torch.randn(4, size, generator=generator),
        f"{path}.lora_B.weight": torch.randn(size, 4, generator=generator),
    }
    hooked = prompt(0, hooks=comfy.hooks.create_hook_lora(lora, 0.7, 0.0))
    lean, theirs = causal(tiny_wan), causal(tiny_wan)
    for patch in [*block_patches(theirs), "diffusion_model.forward_orig"]:
        del theirs.object_patches[patch]
    found, expected, plain = (
        sample_latent(model, positive, prompt(1), empty_latent(), DIAGONAL, seed=1, cfg=3.0)["samples"]
        for model, positive in ((lean, hooked), (theirs, hooked), (lean, prompt(0)))
    )
    assert (found - expected).abs().max() < 1e-4
    assert (found - plain).abs().max() > 0.01


@pytest.fixture
def dynamic():
    """`dynamic(model)`: as if in ComfyUI's dynamic VRAM, which it has on GPUs only."""
    from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic

    class Dynamic(ModelPatcher):
        non_dynamic_delegate_model = None
        get_non_dynamic_delegate = ModelPatcherDynamic.get_non_dynamic_delegate

        def is_dynamic(self):
            return True

    def change(model):
        model.__class__ = Dynamic
        return model

    return change


def load_tiny(path):
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


def test_hooks_apply_in_dynamic_vram_where_comfyui_samples_another_network(
    tiny_wan, tiny_wan_path, causal, dynamic, prompt, sample_latent, empty_latent
):
    import comfy.hooks

    def run(model, positive):
        return sample_latent(model, positive, [], empty_latent(), DIAGONAL, seed=3)["samples"]

    hooked = prompt(0, hooks=comfy.hooks.create_hook_lora(lora_file(), 0.7, 0.0))
    static = causal(tiny_wan, window=6, sink=3)
    model = causal(dynamic(load_tiny(tiny_wan_path)), window=6, sink=3)
    plain, expected = run(static, prompt(0)), run(static, hooked)
    assert (expected - plain).abs().max() > 0.01
    assert (run(model, hooked) - expected).abs().max() < EXACT
    network = model.non_dynamic_delegate_model[0]
    assert network is not model.model
    assert torch.equal(run(model, hooked), run(model, hooked)) and model.non_dynamic_delegate_model[0] is network
    assert (run(model, prompt(0)) - plain).abs().max() < EXACT
    # Any other sampler, which takes the other network by itself.
    want = euler(tiny_wan, hooked)
    assert (want - euler(tiny_wan, prompt(0))).abs().max() > 0.01
    assert (euler(model, hooked) - want).abs().max() < EXACT


def test_the_optical_flow_adapter_is_added_in_the_network_that_is_sampled(
    tiny_wan, tiny_wan_path, causal, dynamic, prompt, sample_latent, pack_module
):
    import comfy.hooks

    control = pack_module("model_patches.flow_control")
    generator = torch.Generator().manual_seed(9)
    adapter = (torch.randn(128, 4, 1, 2, 2, generator=generator), torch.randn(128, generator=generator))
    # A hook on the very module that the adapter is added behind.
    change = {"diffusion_model.patch_embedding.diff": 0.1 * torch.randn(128, 16, 1, 2, 2, generator=generator)}
    hooked = prompt(0, hooks=comfy.hooks.create_hook_lora(change, 1.0, 0.0))
    motion = control.FlowConditioning(optical_flow=camera_flow(4 * 5, 64, 64, pan=(-2, 1)), mode="adapter")

    def run(model, positive=hooked, optical_flow=motion):
        model.set_attachments(pack_module("model_patches.loading").FLOW_ADAPTER_ATTACHMENT, adapter)
        latent = {"samples": torch.zeros(1, 16, 6, 8, 8)}
        return sample_latent(model, positive, [], latent, DIAGONAL, seed=3, optical_flow=optical_flow)["samples"]

    expected = run(causal(tiny_wan))
    assert (expected - run(causal(tiny_wan), optical_flow=None)).abs().max() > 0.01
    assert (expected - run(causal(tiny_wan), prompt(0))).abs().max() > 0.01
    assert (run(causal(dynamic(load_tiny(tiny_wan_path)))) - expected).abs().max() < EXACT


def test_what_others_put_around_stays_around_in_another_network(tiny_wan, tiny_wan_path, causal, dynamic):
    """Rotations are the one function of ours that may stand before another node's."""
    model = tiny_wan.clone()
    theirs = lambda *args, **kwargs: None  # noqa: E731
    model.add_object_patch("diffusion_model.rope_encode", theirs)
    other = causal(dynamic(load_tiny(tiny_wan_path)))
    for made, original in ((causal(dynamic(model)), theirs), (other, None)):
        delegate = made.get_non_dynamic_delegate()
        patch = delegate.object_patches["diffusion_model.rope_encode"]
        assert patch.original == (original or delegate.model.diffusion_model.rope_encode)
        blocks = delegate.model.diffusion_model.blocks
        for layer, block in enumerate(blocks):
            path = f"diffusion_model.blocks.{layer}"
            assert delegate.object_patches[f"{path}.forward"].block is block
            assert delegate.object_patches[f"{path}.self_attn.forward"].module is block.self_attn
            assert delegate.object_patches[f"{path}.cross_attn.forward"].module is block.cross_attn
        assert delegate.object_patches["diffusion_model.forward_orig"].network is delegate.model.diffusion_model


def test_two_conditions_are_averaged(tiny_wan, causal, prompt, sample_latent, empty_latent):
    model = causal(tiny_wan)
    both = sample_latent(model, prompt(0) + prompt(1), [], empty_latent(), DIAGONAL, seed=1)
    same = sample_latent(model, prompt(0) + prompt(0), [], empty_latent(), DIAGONAL, seed=1)
    one = sample_latent(model, prompt(0), [], empty_latent(), DIAGONAL, seed=1)
    assert (same["samples"] - one["samples"]).abs().max() < EXACT
    assert (both["samples"] - one["samples"]).abs().max() > 0.01


def test_an_area_changes_only_its_side_of_the_first_step(tiny_wan, causal, prompt, sample_latent):
    model = causal(tiny_wan)
    right = node_helpers.conditioning_set_values(
        prompt(1), {"area": (4, 4, 0, 4), "strength": 1.0, "set_area_to_bounds": False}
    )
    one_step = DiagonalSchedule.from_steps((1,), context_mode="clean")
    latent = {"samples": torch.zeros(1, 16, 3, 4, 8)}
    plain = sample_latent(model, prompt(0), [], latent, one_step, seed=1)["samples"]
    area = sample_latent(model, prompt(0) + right, [], latent, one_step, seed=1)["samples"]
    assert torch.allclose(plain[..., :4], area[..., :4], atol=1e-5)
    assert (plain[..., 6:] - area[..., 6:]).abs().max() > 0.01


def test_area_over_chunks_with_guidance(tiny_wan, causal, prompt, sample_latent):
    right = node_helpers.conditioning_set_values(
        prompt(1), {"area": (4, 4, 0, 4), "strength": 1.0, "set_area_to_bounds": False}
    )
    latent = {"samples": torch.zeros(1, 16, 9, 4, 8)}
    result = sample_latent(causal(tiny_wan), prompt(0) + right, prompt(2), latent, DIAGONAL, seed=1, cfg=2.0)
    assert torch.isfinite(result["samples"]).all()


def test_text_keys_are_computed_once_per_prompt_and_clip(tiny_wan, causal, prompt, sample_latent, empty_latent):
    calls = []
    for block in tiny_wan.model.diffusion_model.blocks:
        block.cross_attn.k.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
    model = causal(tiny_wan)
    sample_latent(model, prompt(0), [], empty_latent(), DIAGONAL, seed=1)
    assert len(calls) == 2, "one call a layer"
    sample_latent(model, prompt(0), prompt(1), empty_latent(), DIAGONAL, seed=1, cfg=3.0)
    assert sum(calls) == 2 + 4, "a second clip and two prompts: computed again, once for each"


def euler(model, conditioning, shape=(1, 16, 3, 4, 4)):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )


def test_any_other_sampler_runs_comfyuis_forward(tiny_wan, causal, prompt, sample_latent, empty_latent):
    expected = euler(tiny_wan, prompt())
    model = causal(tiny_wan, window=6, sink=3)
    assert torch.equal(euler(model, prompt()), expected)
    sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)
    assert torch.equal(euler(model, prompt()), expected)
    assert torch.equal(euler(tiny_wan, prompt()), expected)


def test_a_plain_wan_becomes_causal_like_comfyuis_causal_class(
    tiny_wan, tiny_wan_path, causal, prompt, sample_latent, empty_latent
):
    plain = comfy.sd.load_diffusion_model_state_dict(
        load_file(tiny_wan_path), model_options={"dtype": torch.float32}, metadata=TINY_TEXT
    )
    assert type(plain.model.diffusion_model) is not type(tiny_wan.model.diffusion_model)
    a, b = (
        sample_latent(causal(m, window=6, sink=3), prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
        for m in (plain, tiny_wan)
    )
    assert torch.equal(a, b)


def test_applying_twice_is_applying_once(tiny_wan, causal, prompt, sample_latent, empty_latent):
    once = causal(tiny_wan, window=6, sink=3)
    twice = causal(causal(tiny_wan, window=-1), window=6, sink=3)
    assert twice.object_patches.keys() == once.object_patches.keys()
    a, b = (sample_latent(m, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"] for m in (once, twice))
    assert torch.equal(a, b)


def options_of(model):
    return copy.deepcopy({k: v for k, v in model.model_options.items() if k != "diagonal_causal_settings"}), {
        kind: {key: len(found) for key, found in by_key.items()} for kind, by_key in model.wrappers.items()
    }


def test_the_users_model_and_the_global_random_state_are_left_alone(
    tiny_wan, causal, prompt, sample_latent, empty_latent
):
    patches_before = dict(tiny_wan.object_patches)
    model = causal(tiny_wan)
    before, plain_before = options_of(model), options_of(tiny_wan)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    sample_latent(model, prompt(), prompt(1), empty_latent(), DIAGONAL, seed=1, cfg=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert options_of(model) == before
    assert options_of(tiny_wan) == plain_before
    assert tiny_wan.object_patches == patches_before == {}


def test_same_seed_same_video_whatever_ran_before(tiny_wan, causal, prompt, sample_latent, empty_latent):
    model = causal(tiny_wan)
    first = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=5)["samples"]
    other = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=6)["samples"]
    again = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=5)["samples"]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_progress_counts_every_forward(tiny_wan, causal, prompt, sample_latent, empty_latent):
    for schedule in (DIAGONAL, UNIFORM):
        steps, seen = [], []
        sample_latent(
            causal(tiny_wan), prompt(), [], empty_latent(8), schedule, seed=1,
            callback=lambda i, denoised, x, total, steps=steps: steps.append((i, total, denoised.shape[2])),
            on_progress=seen.append,
        )  # fmt: skip
        nfe = schedule.nfe(3)
        assert [s[:2] for s in steps] == [(i, nfe) for i in range(nfe)]
        assert steps[0][2] == 3 and steps[-1][2] == 2, "the preview gets the newest chunk alone"
        assert [p.forwards for p in seen] == list(range(1, nfe + 1))
        assert seen[-1].chunk == 2 and seen[-1].chunks == 3


def test_a_run_that_is_finished_early_gives_what_it_made(tiny_wan, causal, prompt, sample_latent, empty_latent):
    latent = {**empty_latent(8), "noise_mask": torch.ones(1, 1, 8, 4, 6)}
    given = (causal(tiny_wan), prompt(), [], latent, DIAGONAL)
    whole = sample_latent(*given, seed=1)["samples"]
    asked, made, ended = [], [], []
    named = {"seed": 1, "on_chunk": made.append, "on_early_end": lambda: ended.append(len(made))}

    def finish():
        asked.append(len(made))
        return len(made) == 2

    result = sample_latent(*given, finish=finish, **named)
    assert asked == [1, 2] and torch.equal(result["samples"], whole[:, :, :6]) and ended == [2]
    assert result["noise_mask"].shape[2] == 6
    made.clear()
    latent["noise_mask"] = torch.ones(8, 1, 32, 48)  # as Set Latent Noise Mask has it
    assert sample_latent(*given, finish=finish, **named)["noise_mask"].shape == (6, 1, 32, 48)
    asked.clear(), made.clear(), ended.clear()
    latent["noise_mask"] = torch.ones(1, 1, 8, 4, 6)
    result = sample_latent(*given, finish=lambda: bool(asked.append(len(made))), **named)
    assert asked == [1, 2] and len(made) == 3 and not ended, "nobody is asked after the last chunk"
    assert torch.equal(result["samples"], whole) and result["noise_mask"].shape[2] == 8


def test_cancel_stops_within_one_forward_and_leaves_nothing(
    tiny_wan, causal, prompt, sample_latent, empty_latent, pack_module, monkeypatch
):
    runs = []
    causal_module, sampling = pack_module("model_patches.causal"), pack_module("model_patches.sampling")
    monkeypatch.setattr(
        sampling, "CausalRun", lambda *a, **k: runs.append(causal_module.CausalRun(*a, **k)) or runs[-1]
    )
    model = causal(tiny_wan)
    clean = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    for stop_at in (1, 4, 6):
        done = []

        def cancel(progress, stop_at=stop_at, done=done):
            done.append(progress)
            if progress.forwards == stop_at:
                comfy.model_management.interrupt_current_processing()

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1, on_progress=cancel)
        assert len(done) == stop_at
        assert runs[-1].cache.nbytes == 0
    assert torch.equal(sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"], clean)


def test_memory_request_is_one_chunk_and_the_window(tiny_wan, causal, prompt, sample_latent, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda *a, **k: asked.append((k["memory_required"], k["minimum_memory_required"])) or load(*a, **k),
    )
    model = causal(tiny_wan, window=6, sink=3)
    for frames in (9, 90):
        sample_latent(
            model, prompt(), prompt(1), {"samples": torch.zeros(1, 16, frames, 4, 4)}, DIAGONAL, seed=1, cfg=2.0
        )
    short, long = asked
    assert short == long, "a clip ten times as long asks for the same"
    chunk = model.model.memory_required([1, 16, 3, 4, 4])
    cache = KVCache.bytes_needed(
        CausalSettings(window=6, sink=3), 90, layers=2, tokens_per_frame=4, width=128, element_bytes=4, conditions=2
    )
    # Keys and values of two layers and the embedding itself; two prompts of 16 tokens, width, bytes.
    text = (2 * 2 + 1) * (2 * 16) * 128 * 4
    assert short[1] == pytest.approx(chunk + cache + text)
    assert short[0] == pytest.approx(2 * chunk + cache + text)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_kv_cache_in_eight_bits_changes_the_video_by_little(tiny_wan, causal, prompt, sample_latent, cfg):
    """From the second chunk on: the first sees nothing but itself."""

    def run(**settings):
        latent = {"samples": torch.zeros(1, 16, 15, 4, 4)}
        model = causal(tiny_wan, window=6, sink=3, positions="window", **settings)
        return sample_latent(model, prompt(), prompt(1), latent, DIAGONAL, seed=1, cfg=cfg)["samples"]

    exact, small = run(), run(kv_cache_dtype="int8")
    assert torch.equal(exact[:, :, :3], small[:, :, :3])
    error = (exact - small).std() / exact.std()
    assert 1e-6 < error < 0.01


def test_one_conditions_keys_and_values_are_written_out_at_a_time(
    tiny_wan, causal, prompt, sample_latent, empty_latent, pack_module, monkeypatch
):
    cached, written, held = pack_module("diagonal_sampler.cache").ConditionKV, [], []
    update = cached.update

    def watched(self, *args, **kwargs):
        held.append(sum(tensor() is not None for tensor in written))
        found = update(self, *args, **kwargs)
        written[:] = map(weakref.ref, found)
        return found

    monkeypatch.setattr(cached, "update", watched)
    model = causal(tiny_wan, window=6, sink=3, kv_cache_dtype="int8")
    sample_latent(model, prompt(), prompt(1), empty_latent(), DIAGONAL, seed=1, cfg=2.0)
    assert len(held) == 2 * 2 * DIAGONAL.nfe(3) and not any(held), "two layers of two conditions"


def test_video_to_video_keeps_what_the_mask_protects(tiny_wan, causal, prompt, sample_latent):
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(1, 16, 9, 4, 8, generator=generator)
    mask = torch.zeros(1, 9, 4, 8)
    mask[..., 4:] = 1
    model = causal(tiny_wan)
    for schedule in (DIAGONAL, UNIFORM):
        result = sample_latent(
            model, prompt(), [], {"samples": video, "noise_mask": mask}, schedule, seed=1, denoise=0.5
        )["samples"]
        assert torch.allclose(result[..., :4], video[..., :4], atol=1e-5)
        assert (result[..., 4:] - video[..., 4:]).abs().max() > 0.05
    little, much = (
        sample_latent(model, prompt(), [], {"samples": video}, DIAGONAL, seed=1, denoise=d)["samples"]
        for d in (0.05, 0.9)
    )
    assert (little - video).abs().mean() < (much - video).abs().mean()


@pytest.mark.parametrize("given", [0, 1])
def test_what_the_mask_protects_is_noised_with_its_own_chunks_noise(
    tiny_wan, causal, prompt, sample_latent, given_frames, monkeypatch, given
):
    inpaint, noises = comfy.samplers.KSamplerX0Inpaint, []
    real = inpaint.__call__

    def watched(self, x, sigma, denoise_mask, **more):
        if denoise_mask is not None:
            noises.append(self.noise)
        return real(self, x, sigma, denoise_mask, **more)

    monkeypatch.setattr(inpaint, "__call__", watched)
    counts, steps = (3, 3, 2), (4, 3, 2)
    video = torch.randn(1, 16, given + sum(counts), 4, 4, generator=torch.Generator().manual_seed(3))
    latent = {"samples": video, "noise_mask": torch.ones(1, given + sum(counts), 4, 4)}
    context = given_frames(video[:, :, :given]) if given else None
    sample_latent(causal(tiny_wan), prompt(), [], latent, DIAGONAL, seed=7, context=context)
    draw = SeededNoise(7, (1, 16, 4, 4))
    expected = [draw(chunk, INITIAL_STEP, counts[chunk]) for chunk in range(3) for _ in range(steps[chunk])]
    assert len(noises) == len(expected) and all(map(torch.equal, noises, expected))


@pytest.mark.parametrize(
    ("change", "rests"),
    [
        ({}, True),
        ({"length": 2}, True),
        ({"length": 33, "width": 63, "height": 47}, True),
        ({"pan_x": 0.1}, False),
        ({"rotation": -0.1}, False),
        ({"mask": torch.arange(64.0).expand(1, 64, 64) / 64}, False),  # to hold still a part is a use of it
        ({"source": "painted", "painted": torch.ones(1, 64, 64, 3)}, True),
        ({"source": "tracks", "tracks": {"track_path": torch.tensor([8.0, 8]).expand(33, 1, 2)}}, False),
        ({"strength": 0.0}, False),
    ],
)
def test_a_motion_that_tells_everything_to_rest_is_warned_of(tiny_wan, causal, pack_module, caplog, change, rests):
    """As the node does that was just taken from the menu: its camera does not move."""
    sampling = pack_module("model_patches.sampling")
    node = pack_module("nodes.flow_conditioning").DiagonalFlowConditioning
    given = {
        each.id: each.default for each in node.define_schema().inputs if getattr(each, "default", None) is not None
    }
    flow = node.execute(**{**given, "width": 64, "height": 64, "mode": "noise", **change}).args[0]
    model, seed = causal(tiny_wan), 1
    plan = sampling.plan_clip(model, (1, 16, 9, 8, 8), DIAGONAL)
    sampling._flow_run(flow, model, plan, SeededNoise(seed, (1, 16, 8, 8)), seed)
    told = [record.getMessage() for record in caplog.records if "to rest" in record.getMessage()]
    assert len(told) == rests and all("Set pan_x, pan_y, zoom or rotation" in line for line in told)


def test_denoise_without_a_video_is_refused(tiny_wan, causal, prompt, sample_latent, empty_latent):
    with pytest.raises(ValueError, match="denoise is 0.5 but the latent is empty"):
        sample_latent(causal(tiny_wan), prompt(), [], empty_latent(), DIAGONAL, seed=1, denoise=0.5)


def test_a_schedule_below_pure_noise_needs_a_video_to_start_from(
    tiny_wan, causal, prompt, sample_latent, empty_latent, pack_module
):
    sampling, model = pack_module("model_patches.sampling"), causal(tiny_wan)
    low = DiagonalSchedule(sigmas=((1.0, 0.5), (0.8, 0.4)))
    words = "Chunk 2 starts at sigma 0.800, below pure noise, and there is no latent to start from"
    with pytest.raises(ValueError, match=words):
        sample_latent(model, prompt(), [], empty_latent(), low, seed=1)
    plan = sampling.plan_clip(model, (1, 16, 9, 4, 4), low)
    with pytest.raises(ValueError, match=words):
        sampling.stream_latent(model, prompt(), [], plan, lambda chunk: None, seed=1)
    video = torch.randn(1, 16, 9, 4, 4, generator=torch.Generator().manual_seed(3))
    assert sample_latent(model, prompt(), [], {"samples": video}, low, seed=1)["samples"].std() > 0.1


@pytest.mark.parametrize("denoise", [0.0, -0.1, 1.01, math.nan])
def test_a_denoise_that_is_no_share_is_refused(tiny_wan, causal, prompt, sample_latent, denoise):
    with pytest.raises(ValueError, match=f"denoise is {denoise}; it must be above 0 and at most 1"):
        sample_latent(
            causal(tiny_wan), prompt(), [], {"samples": torch.ones(1, 16, 9, 4, 4)}, DIAGONAL, seed=1, denoise=denoise
        )


def test_a_latent_keeps_what_others_left_in_it_but_not_the_ratios_of_an_empty_one(
    tiny_wan, causal, prompt, sample_latent
):
    """Empty latents of 16 pixels a cell and 8 frames a latent frame become Wan's: 8 and 4."""
    latent = {
        "samples": torch.zeros(1, 32, 3, 2, 2),
        "downscale_ratio_spacial": 16,
        "downscale_ratio_temporal": 8,
        "of_another_node": 7,
    }
    made = sample_latent(causal(tiny_wan), prompt(), [], latent, DIAGONAL, seed=1)
    assert made.pop("samples").shape == (1, 16, 6, 4, 4) and made == {"of_another_node": 7}


@pytest.mark.parametrize(
    ("node", "sizes"),
    [("Wan22ImageToVideoLatent", (None, 64, 64, 9, 1)), ("EmptyMochiLatentVideo", (64, 64, 9, 1))],
)
def test_an_empty_latent_of_another_model_that_does_not_tell_its_pixels_is_refused(
    tiny_wan, causal, prompt, sample_latent, node, sizes
):
    """ComfyUI would take its cells for Wan's, and the video have another size than was asked for."""
    found = (module for module in (nodes_wan, nodes_mochi) if hasattr(module, node))
    (latent,) = getattr(next(found), node).execute(*sizes).result
    with pytest.raises(ValueError, match=r"needs \[batch, 16, frames, height, width\]. Use Empty AR Video Latent"):
        sample_latent(causal(tiny_wan), prompt(), [], latent, DIAGONAL, seed=1)


@pytest.mark.parametrize(
    ("samples", "ratio", "told"),
    [((1, 4, 4, 4), 8, True), ((1, 16, 4, 4), None, True), ((1, 16, 1, 4, 4), None, False)],
)
def test_an_images_latent_is_told_to_make_one_frame(
    tiny_wan, causal, prompt, sample_latent, caplog, samples, ratio, told
):
    latent = {"samples": torch.zeros(samples)} | ({} if ratio is None else {"downscale_ratio_spacial": ratio})
    made = sample_latent(causal(tiny_wan), prompt(), [], latent, UNIFORM, seed=1)
    assert made["samples"].shape == (1, 16, 1, 4, 4)
    assert ("it makes one frame" in caplog.text) == told


@pytest.mark.parametrize(
    "extra, name",
    [
        ({"start_percent": 0.2}, "timestep range"),
        ({"end_percent": 0.8}, "timestep range"),
        ({"mask": torch.ones(1, 4, 4)}, "mask"),
        ({"area": ("percentage", 0.5, 0.5, 0, 0)}, "area in percent"),
        ({"control": object()}, "ControlNet"),
        (
            {"concat_latent_image": torch.zeros(1)},
            "image to concatenate.*For a start image use Diagonal Context Frames",
        ),
        ({"gligen": object()}, "GLIGEN"),
        ({"reference_latents": [torch.zeros(1)]}, "reference latents"),
        ({"time_dim_concat": torch.zeros(1)}, "frames to concatenate"),
        ({"context_latents": [torch.zeros(1)]}, "context latents"),
        ({"clip_start_percent": 0.1}, "timestep range"),
        ({"clip_end_percent": 0.9}, "timestep range"),
        ({"area": (1, 4, 4, 0, 0, 0)}, "area in percent or in time"),
        ({"hooks": SimpleNamespace(hooks=[ONE_KEYFRAME, TWO_KEYFRAMES])}, "hook with several keyframes"),
        ({"vace_frames": [torch.zeros(1)]}, "video for VACE"),
        ({"camera_conditions": torch.zeros(1)}, "camera for Wan Fun Camera"),
        ({"control_video": torch.zeros(1)}, "control video"),
        ({"pose_video_latent": torch.zeros(1)}, "video of poses"),
        ({"face_video_pixels": torch.zeros(1)}, "video of a face"),
        ({"driving_mask_28ch": torch.zeros(1)}, "driving mask"),
        ({"reference_motion": torch.zeros(1)}, "frames of a motion"),
        ({"audio_embed": torch.zeros(1)}, "sound"),
    ],
)
def test_conditionings_that_cannot_be_followed_are_refused_by_name(
    tiny_wan, causal, prompt, sample_latent, empty_latent, extra, name
):
    with pytest.raises(ValueError, match=f"positive conditioning .entry 1.*{name}"):
        sample_latent(causal(tiny_wan), prompt(0, **extra), [], empty_latent(), DIAGONAL, seed=1)


def test_every_entry_of_both_conditionings_is_checked_and_what_can_be_followed_passes(pack_module, tiny_wan, prompt):
    check = pack_module("model_patches.conditionings").check_conditionings
    followed = prompt(0, hooks=SimpleNamespace(hooks=[ONE_KEYFRAME]), control=None, area=(4, 4, 0, 0))
    check(tiny_wan, followed, followed, 4, 4)
    with pytest.raises(ValueError, match="negative conditioning .entry 2.*mask"):
        check(tiny_wan, followed, followed + prompt(0, mask=torch.ones(1, 4, 4)), 4, 4)
    with pytest.raises(ValueError, match="positive conditioning is empty"):
        check(tiny_wan, [], followed, 4, 4)
    with pytest.raises(
        ValueError, match="positive conditioning .entry 1. has an area that begins at x 8, y 32, outside"
    ):
        check(tiny_wan, prompt(0, area=(2, 2, 4, 1)), [], 4, 4)
    other = [[torch.zeros(1, 77, 768), {}]]
    with pytest.raises(
        ValueError, match="negative conditioning .entry 1. has a text of 768 channels, and the model takes"
    ):
        check(tiny_wan, followed, other, 4, 4)


def test_texts_go_to_the_device_once_and_what_is_shared_stays_shared(pack_module):
    text, other = comfy.conds.CONDRegular(torch.zeros(1, 16, 64)), comfy.conds.CONDRegular(torch.zeros(1))
    conds = [{"model_conds": {"c_crossattn": text, "y": other}} for _ in range(2)]
    before = [cond["model_conds"] for cond in conds]
    inner = SimpleNamespace(get_dtype_inference=lambda: torch.bfloat16)
    wrap = SimpleNamespace(inner_model=inner, conds={"positive": conds, "negative": None})
    pack_module("model_patches.conditionings").move_texts(wrap, torch.device("meta"))
    moved, shared = (cond["model_conds"]["c_crossattn"] for cond in conds)
    assert moved is shared and (moved.cond.device.type, moved.cond.dtype) == ("meta", torch.bfloat16)
    assert all(cond["model_conds"]["y"] is other for cond in conds)
    assert all(found["c_crossattn"] is text for found in before) and text.cond.device.type == "cpu"


def test_sizes_that_do_not_fit_are_refused_with_the_nearest(tiny_wan, causal, prompt, sample_latent):
    with pytest.raises(ValueError, match="width is 40 pixels.*nearest that fit are 32 and 48"):
        sample_latent(causal(tiny_wan), prompt(), [], {"samples": torch.zeros(1, 16, 3, 4, 5)}, DIAGONAL, seed=1)


@pytest.mark.parametrize("shape", [(1, 4, 9, 4, 4), (1, 16, 4, 4)])
def test_a_latent_of_another_kind_is_refused(tiny_wan, causal, pack_module, shape):
    with pytest.raises(ValueError, match=r"needs \[batch, 16, frames, height, width\]"):
        pack_module("model_patches.clip_plan").plan_clip(causal(tiny_wan), shape, DIAGONAL)


def test_a_plan_counts_what_is_made_and_each_video_of_a_batch(tiny_wan, causal, pack_module):
    plan_clip, model = pack_module("model_patches.clip_plan").plan_clip, causal(tiny_wan)
    context = pack_module("model_patches.context_frames").ContextFrames

    def plan(batch, height=4):
        given = context(latent=torch.zeros(batch, 16, 1, height, 4))
        return plan_clip(model, (batch, 16, 10, 4, 4), DIAGONAL, given)

    one, two = plan(1), plan(2)
    assert one.made_frames == [3, 3, 3] and one.chunks == 3
    assert two.cache_bytes(model, (16, 12)) == 2 * one.cache_bytes(model, (16, 12)) > 0
    with pytest.raises(ValueError, match="is 32x48 but the video is 32x32"):
        plan(1, height=6)


@pytest.mark.parametrize("frames", [1, 4])
def test_the_schedules_frames_per_chunk_are_used_and_that_is_said(tiny_wan, causal, pack_module, caplog, frames):
    schedule = dataclasses.replace(DIAGONAL, frames_per_chunk=frames)
    plan = pack_module("model_patches.clip_plan").plan_clip(causal(tiny_wan), (1, 16, 9, 4, 4), schedule)
    assert plan.settings.frames_per_chunk == plan.made_frames[0] == frames
    assert f"asks for {frames} latent frames a chunk, the model was set to 3; the schedule's are used" in caplog.text


@pytest.mark.parametrize(
    ("settings", "frames", "remedy"),
    [
        ({"window": -1, "sink": 0}, 21, None),
        ({"window": -1, "sink": 0}, 22, "Set window 12 and sink 3 on the causal model"),
        ({"window": 12, "sink": 3}, 300, None),
        ({"window": 12, "sink": 3, "positions": "absolute"}, 22, "Set positions to auto on the causal model"),
    ],
)
def test_positions_that_the_model_never_saw_are_warned_of(
    tiny_wan, causal, pack_module, caplog, settings, frames, remedy
):
    plan_clip = pack_module("model_patches.clip_plan").plan_clip
    model = causal(tiny_wan, **settings)
    plan_clip(model, (1, 16, frames, 4, 4), DIAGONAL)
    told = [record.getMessage() for record in caplog.records if "Wan 2.1 was trained on 21" in record.getMessage()]
    assert len(told) == (remedy is not None) and all(f"has {frames} latent frames" in line for line in told)
    assert all(remedy in line for line in told)
    caplog.clear()
    model.set_model_rope_options(1.0, 0.0, 1.0, 0.0, 0.5, 0.0)  # as ScaleROPE: twice as many between the same two
    plan_clip(model, (1, 16, frames, 4, 4), DIAGONAL)
    assert "was trained on" not in caplog.text


@pytest.mark.parametrize(
    ("share", "fits"),
    [
        (1 / 2, "a window of 6 latent frames at 64x32, or 32x16 pixels"),
        (5 / 12, "32x16 pixels"),  # five latent frames do not hold the sink and a chunk
        (1 / 1000, "16x16 pixels"),
    ],
)
def test_a_cache_that_no_device_holds_is_refused_with_what_would_fit(
    tiny_wan, causal, pack_module, monkeypatch, share, fits
):
    plan_clip = pack_module("model_patches.clip_plan").plan_clip
    model, shape = causal(tiny_wan, window=12, sink=3), (1, 16, 30, 4, 8)
    needs = plan_clip(model, shape, DIAGONAL).cache_bytes(model, text_tokens=(0,))
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: needs)
    plan_clip(model, shape, DIAGONAL)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: needs * share)
    with pytest.raises(ValueError, match=f"cache of 12 latent frames at 64x32 .* fit: {fits} with 12 latent frames"):
        plan_clip(model, shape, DIAGONAL)


def test_a_model_that_is_not_causal_or_not_wan_is_refused(tiny_wan, causal, prompt, sample_latent, empty_latent):
    with pytest.raises(ValueError, match="not causal.*Diagonal Causal Attention"):
        sample_latent(tiny_wan, prompt(), [], empty_latent(), DIAGONAL, seed=1)
    other = torch.nn.Module()
    other.diffusion_model = torch.nn.Linear(2, 2)
    tiny_wan.model.diffusion_model.ref_conv = torch.nn.Conv2d(16, 128, 2)  # Wan Fun's, for a reference image
    with pytest.raises(ValueError, match="only Wan 2.1 text-to-video.*text-to-video checkpoint with Diagonal Context"):
        causal(tiny_wan)
    with pytest.raises(ValueError, match="Linear, not a Wan"):
        causal(comfy.model_patcher.ModelPatcher(other, torch.device("cpu"), torch.device("cpu")))


@pytest.mark.parametrize("rope", [{}, {"shift_t": 240.0}, {"shift_t": -0.5, "scale_t": 0.5}])
def test_positions_are_exact_in_bf16(tiny_wan_path, causal, prompt, sample_latent, pack_module, monkeypatch, rope):
    """ComfyUI builds them in the model's dtype, and bf16 holds every whole number up to 256 only."""
    wan = comfy.sd.load_diffusion_model(str(tiny_wan_path), model_options={"dtype": torch.bfloat16})
    wan.model.manual_cast_dtype = None  # a CPU would compute in float32
    assert wan.model.get_dtype_inference() == torch.bfloat16
    network, found = wan.model.diffusion_model, []
    make = network.rope_encode
    monkeypatch.setattr(network, "rope_encode", lambda *a, **k: found.append(make(*a, **k)) or found[-1])
    latent, model = {"samples": torch.zeros(1, 16, 262, 2, 2)}, causal(wan, window=6, sink=3, positions="absolute")
    still = {f"{name}_{axis}": value for name, value in (("scale", 1.0), ("shift", 0.0)) for axis in "xyt"}
    model.set_model_rope_options(**{**still, **rope})
    result = sample_latent(model, prompt(), [], latent, DiagonalSchedule.uniform(1), seed=1)
    assert torch.isfinite(result["samples"]).all()
    scale, shift = (rope.get(name, usual) for name, usual in (("scale_t", 1.0), ("shift_t", 0.0)))
    assert len(found) == 88, "once a chunk"
    for chunk, count in ((0, 3), (1, 3), (86, 3), (87, 1)):
        turns = found[chunk].flatten(0, 2)[..., 0]  # [L, P, 2]: cosine and sine
        expected = rotation_table(count, 1, 1, 128, start=shift + scale * 3 * chunk, time_scale=scale)
        torch.testing.assert_close(turns, expected, atol=2e-5, rtol=0)


def test_a_thousand_latent_frames_at_constant_memory(tiny_wan, causal, prompt, sample_latent, pack_module, monkeypatch):
    causal_module, sampling = pack_module("model_patches.causal"), pack_module("model_patches.sampling")
    runs, sizes, positions, tables = [], [], [], []
    monkeypatch.setattr(
        sampling, "CausalRun", lambda *a, **k: runs.append(causal_module.CausalRun(*a, **k)) or runs[-1]
    )

    def watch(progress):
        cache = runs[0].cache
        sizes.append(cache.nbytes)
        positions.append(cache.position)
        tables.append(len(runs[0]._rope))

    model = causal(tiny_wan, window=12, sink=3)
    steps = DiagonalSchedule.from_steps((2, 1), context_mode="renoise")
    result = sample_latent(
        model, prompt(), [], {"samples": torch.zeros(1, 16, 1000, 2, 2)}, steps, seed=1, on_progress=watch
    )
    assert torch.isfinite(result["samples"]).all()
    assert set(sizes) == {2 * 2 * 12 * 1 * 128 * 4}
    assert max(positions) == 12 - 1, "the last, shorter chunk of one frame stands at the end of the window"
    assert max(tables) <= 8


def test_nan_is_an_error_that_names_the_chunk(tiny_wan, causal, prompt, sample_latent, empty_latent):
    def poisoned(chunk, step, frames):
        noise = SeededNoise(1, (1, 16, 4, 4))(chunk, step, frames)
        return noise * (math.nan if chunk == 1 and step == 0 else 1)

    # The noise behind its first step is the input of its second.
    words = r"Chunk 2 of 3 \(latent frames 3 to 5\) .* NaN or infinite values, first at step 2 of 3 \(sigma 0.933\)"
    with pytest.raises(ValueError, match=words):
        sample_latent(causal(tiny_wan), prompt(), [], empty_latent(), DIAGONAL, seed=1, noise=poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_single_value_that_is_not_finite_is_told_at_once_on_a_cpu_and_to_all_who_ask(pack_module, value):
    look = pack_module("model_patches.pace").FiniteLook(3)
    good = torch.zeros(1, 16, 3, 2, 2)
    bad = good.index_put((torch.tensor(0),) * 5, torch.tensor(value))
    steps = [
        (Forward(chunk=1, start_frame=3, frames=3, step=step, steps=3, sigma=1.0), denoised)
        for step, denoised in enumerate((good, bad, bad))
    ]
    look.look(Chunk(index=0, start_frame=0, latents=good), steps)
    with pytest.raises(ValueError, match="Chunk 2 of 3 .* first at step 2 of 3"):
        look.look(Chunk(index=1, start_frame=3, latents=bad), steps)
    with pytest.raises(ValueError, match="Chunk 2 of 3"):  # a state that is to be saved behind the error
        look.settle()


def test_a_gpus_answer_is_waited_for_before_it_is_read(pack_module):
    look = pack_module("model_patches.pace").FiniteLook(1)
    chunk, answer = Chunk(index=0, start_frame=0, latents=torch.zeros(1, 16, 3, 2, 2)), torch.tensor(True)
    look._waiting = (chunk, [], answer, SimpleNamespace(synchronize=lambda: answer.fill_(False)))
    with pytest.raises(ValueError, match="NaN or infinite values. Try weight_dtype bf16 in"):
        look.settle()


def test_the_host_is_at_most_one_forward_ahead_of_a_gpu(pack_module, monkeypatch):
    queued, done = [], []

    class Event:
        def __init__(self, *, blocking):
            assert blocking, "what waits for it would keep a core busy"

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.forward = len(queued) - 1

        def synchronize(self):
            done.append(self.forward)

    monkeypatch.setattr(torch.cuda, "current_stream", {torch.device("cuda:1"): "stream of cuda:1"}.__getitem__)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = pack_module("model_patches.pace").Pace(torch.device("cuda:1"))
    for forward in range(5):
        pace.wait()
        assert done == list(range(forward - 1)), "all but the last one have been waited for"
        queued.append(forward)
        pace.mark()
    still = pack_module("model_patches.pace").Pace(torch.device("cpu"))
    still.mark()
    still.wait()
    assert done == [0, 1, 2]


def block_patches(model) -> list[str]:
    return [path for path in model.object_patches if path.count(".") == 3]


def test_a_block_keeps_its_modulation_and_equals_comfyuis(tiny_wan, causal, prompt, sample_latent, empty_latent):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Adds(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func._schema.name in ("aten::add", "aten::addcmul")
            return func(*args, **(kwargs or {}))

    lean, theirs = causal(tiny_wan), causal(tiny_wan)
    assert len(block_patches(lean)) == 2
    for path in block_patches(theirs):
        del theirs.object_patches[path]

    def run(model, conditioning, **options):
        with Adds() as adds:
            latent = sample_latent(model, conditioning, prompt(1), empty_latent(), DIAGONAL, seed=1, **options)
        return latent["samples"], adds.count

    for options in ({}, {"cfg": 3.0}):
        found, few = run(lean, prompt(), **options)
        expected, many = run(theirs, prompt(), **options)
        assert (found - expected).abs().max() < EXACT and expected.std() > 0.1
        # Modulation (1), 1 + scale (2) and its product (2) are gone in two blocks; four noise levels compute them once.
        assert many - few == 2 * (5 * DIAGONAL.nfe(3) - 3 * 4)


def test_a_block_that_another_pack_changed_stays_theirs(tiny_wan, causal, prompt, sample_latent, empty_latent):
    path, calls = "diffusion_model.blocks.0.forward", []
    theirs = tiny_wan.clone()
    original = theirs.get_model_object(path)
    theirs.add_object_patch(path, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model = causal(theirs)
    assert model.object_patches[path] is theirs.object_patches[path]
    found = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert len(calls) == DIAGONAL.nfe(3)
    plain = sample_latent(causal(tiny_wan), prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert (found - plain).abs().max() < EXACT

    patched = causal(tiny_wan)
    patched.set_model_patch(lambda extra: extra["x"] * 0, "attn2_patch")
    without = sample_latent(patched, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert (plain - without).abs().max() > 0.01


@pytest.mark.parametrize(("schedule", "levels"), [(DIAGONAL, 4), (DiagonalSchedule.preset("undistilled"), 12 + 1)])
def test_noise_levels_and_text_are_embedded_once(
    tiny_wan, causal, prompt, sample_latent, empty_latent, schedule, levels
):
    path = "diffusion_model.forward_orig"
    network, calls = tiny_wan.model.diffusion_model, {"time": 0, "text": 0}
    network.time_embedding.register_forward_pre_hook(lambda *_: calls.update(time=calls["time"] + 1))
    network.text_embedding.register_forward_pre_hook(lambda *_: calls.update(text=calls["text"] + 1))
    lean, theirs = causal(causal(tiny_wan)), causal(tiny_wan)
    del theirs.object_patches[path]

    def run(model, **options):
        calls.update(time=0, text=0)
        latent = empty_latent(batch=2)
        out = sample_latent(model, prompt(), prompt(1), latent, schedule, seed=1, **options)["samples"]
        return out, tuple(calls.values())

    for options in ({}, {"cfg": 3.0}):
        found, few = run(lean, **options)
        expected, many = run(theirs, **options)
        assert (found - expected).abs().max() < EXACT and expected.std() > 0.1
        assert few == (levels, 1) and many == (schedule.nfe(3), schedule.nfe(3))


def test_of_many_noise_levels_only_the_newest_are_kept(
    tiny_wan, causal, prompt, sample_latent, empty_latent, pack_module, monkeypatch
):
    causal_module, sampling = pack_module("model_patches.causal"), pack_module("model_patches.sampling")
    runs, kept = [], []
    monkeypatch.setattr(
        sampling, "CausalRun", lambda *a, **k: runs.append(causal_module.CausalRun(*a, **k)) or runs[-1]
    )
    monkeypatch.setattr(causal_module, "KEPT_LEVELS", 8)
    steps = DiagonalSchedule.uniform(20)
    sample_latent(
        causal(tiny_wan), prompt(), [], empty_latent(3), steps, seed=1,
        on_progress=lambda progress: kept.append(list(runs[0]._levels)),
    )  # fmt: skip
    sigmas = [*steps.chunk_sigmas(0), steps.cache_pass_sigma]
    assert kept == [sigmas[max(0, at - 8) : at] for at in range(1, 22)]
    assert not runs[0]._levels and not runs[0]._text and not runs[0]._rope, "nothing is left when it returns"


def test_a_forward_that_another_pack_changed_stays_theirs(tiny_wan, causal, prompt, sample_latent, empty_latent):
    path, calls = "diffusion_model.forward_orig", []
    theirs = tiny_wan.clone()
    original = theirs.get_model_object(path)
    theirs.add_object_patch(path, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model = causal(theirs)
    assert model.object_patches[path] is theirs.object_patches[path]
    found = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert len(calls) == DIAGONAL.nfe(3)
    plain = sample_latent(causal(tiny_wan), prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert (found - plain).abs().max() < EXACT

    after, replaced = causal(tiny_wan), causal(tiny_wan)
    after.set_model_patch(lambda extra: {"img": extra["img"].flip(-1)}, "double_block")
    replaced.set_model_patch_replace(
        lambda args, extra: {"img": extra["original_block"](args)["img"].flip(-1)}, "dit", "double_block", 1
    )
    for changed in (after, replaced):
        other = sample_latent(changed, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
        assert (plain - other).abs().max() > 0.01


@pytest.mark.parametrize("of", ["block", "network"])
def test_a_forward_with_another_body_is_left_to_comfyui(
    tiny_wan, tiny_wan_path, causal, prompt, sample_latent, empty_latent, monkeypatch, caplog, of
):
    """As a later ComfyUI's may be, or one that another pack put into the class: ours would leave out what is new."""
    calls = []
    kind = WanModel if of == "network" else type(tiny_wan.model.diffusion_model.blocks[0])
    name = "forward_orig" if of == "network" else "forward"
    original = getattr(kind, name)

    @functools.wraps(original)
    def changed(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
        patch.setattr(kind, name, changed)
        found = sample_latent(causal(causal(tiny_wan)), prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert len(calls) == DIAGONAL.nfe(3) * (1 if of == "network" else 2)
    (told,) = [line for line in caplog.messages if "not as this pack knows it" in line]
    assert told.startswith(f"{kind.__name__}.{name} is not")
    fresh = comfy.sd.load_diffusion_model(str(tiny_wan_path), model_options={"dtype": torch.float32})
    plain = sample_latent(causal(fresh), prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert (found - plain).abs().max() < EXACT


def test_the_forwards_of_this_comfyui_are_known(pack_module):
    ours = pack_module("model_patches.causal")
    for function in (WanModel.forward_orig, WanAttentionBlock.forward, CausalWanAttentionBlock.forward):
        assert ours._digest(function) in ours.KNOWN_FORWARDS, "look whether ours still does the same, then add it"
    assert not ours._has_known_body(torch.relu), "no Python function"


def test_a_digest_is_of_what_a_function_says(pack_module):
    def of(number):
        if number == 0:

            def function(x):
                """It has a docstring."""
                # and a comment
                return max(
                    x,
                    1,
                )

        elif number == 1:

            def function(x):
                return max(x, 1)

        else:

            def function(x):
                return max(x, 2)

        return pack_module("model_patches.causal")._digest(function)

    assert of(0) == of(1) != of(2)


def test_rotations_are_computed_once_a_chunk(tiny_wan, causal, prompt, sample_latent, empty_latent):
    path, calls = "diffusion_model.rope_encode", []
    counted = tiny_wan.clone()
    original = counted.get_model_object(path)
    counted.add_object_patch(path, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model = causal(causal(counted))
    found = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert len(calls) == 3, "one for each of three chunks, not for each forward"
    plain = sample_latent(causal(tiny_wan), prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert torch.equal(found, plain)
    other = model.model.diffusion_model.rope_encode(3, 4, 4, device="cpu", dtype=torch.float32)
    assert other.shape[1] == 3 * 2 * 2, "outside of a run the original answers"


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_float32_on_a_cpu_takes_pytorchs_attention_where_comfyui_falls_back(pack_module, monkeypatch, dtype, chosen):
    from comfy.ldm.modules import attention

    ours = pack_module("model_patches.attention")
    monkeypatch.setattr(ours.args, "use_quad_cross_attention", chosen)
    monkeypatch.setattr(ours, "optimized_attention", attention.attention_sub_quad)
    taken = []

    def override(function, *args, **kwargs):
        taken.append(function.__name__)
        return function(*args, **kwargs)

    q, k, v = torch.randn((3, 1, 12, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = ours.attend(q, k, v, heads=2, transformer_options={"optimized_attention_override": override})
    assert taken == ["attention_pytorch" if dtype == torch.float32 and not chosen else "attention_sub_quad"]
    expected = attention.attention_basic(q.float(), k.float(), v.float(), heads=2)
    assert (out.float() - expected).abs().max() < (EXACT if dtype == torch.float32 else 0.02)


def test_wrappers_and_patches_of_other_packs_apply(tiny_wan, causal, prompt, sample_latent, empty_latent):
    from comfy.patcher_extension import WrappersMP

    calls = dict.fromkeys(
        (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.DIFFUSION_MODEL), 0
    )
    model = causal(tiny_wan)

    def count(kind):
        def wrapper(executor, *args, **kwargs):
            calls[kind] += 1
            return executor(*args, **kwargs)

        return wrapper

    for kind in calls:
        model.add_wrapper_with_key(kind, "test", count(kind))
    plain = sample_latent(model, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    nfe = DIAGONAL.nfe(3)
    assert list(calls.values()) == [1, 1, nfe, nfe]

    patched = model.clone()
    patched.set_model_patch(lambda extra: extra["x"] * 0, "attn1_patch")
    without_attention = sample_latent(patched, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"]
    assert (plain - without_attention).abs().max() > 0.01

    patched.set_model_patch(lambda q, k, v, extra_options: (q, k, v), "attn1_patch")
    with pytest.raises(ValueError, match=r"as image networks .*lambda.* Remove that node \(HyperTile"):
        sample_latent(patched, prompt(), [], empty_latent(), DIAGONAL, seed=1)

    seen = []

    def attention(function, *args, **kwargs):
        seen.append(args[1].shape[1])
        return function(*args, **kwargs)

    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = attention
    assert torch.equal(sample_latent(overridden, prompt(), [], empty_latent(), DIAGONAL, seed=1)["samples"], plain)
    assert max(seen) == 9 * 4, "self-attention reads every cached latent frame"


def test_other_noise_levels_than_the_files_are_told_with_its_preset(tiny_wan, causal, prompt, sample_latent, caplog):
    model = causal(tiny_wan)
    own = DiagonalSchedule.preset(DEMO_PRESET)
    model.set_attachments("diagonal_provenance", Provenance(steps_per_chunk=(4, 3, 2), sigmas=own.sigmas))
    latent = {"samples": torch.ones(1, 16, 6, 4, 6)}
    sentence = (
        "sigmas are 1, 0.933, 0.733, 0.357; 1, 0.933, 0.357; 1, 0.357, but the file was trained with "
        "1, 0.75, 0.5, 0.357; 1, 0.75, 0.357; 1, 0.357 (preset 'demo 4-3-2')"
    )
    for denoise in (1.0, 0.9):
        sample_latent(model, prompt(), [], latent, DIAGONAL, seed=7, denoise=denoise)
        assert [record.getMessage() for record in caplog.records if "sigmas" in record.getMessage()] == [sentence]
        caplog.clear()
    for denoise in (1.0, 0.9, 0.3):  # which leaves steps out, and lowers levels
        sample_latent(model, prompt(), [], latent, own, seed=7, denoise=denoise)
    # More steps on later chunks, as a first or second one was trained with.
    more = DiagonalSchedule.preset(DEMO_PRESET, steps=(4, 3))
    sample_latent(model, prompt(), [], latent, more, seed=7)
    assert not [record for record in caplog.records if "steps_per_chunk" in record.getMessage()]
    sample_latent(model, prompt(), [], latent, UNIFORM, seed=7)  # other steps: that is what it says
    for fewer in ((4, 2), (4, 3, 2, 1)):  # also where the file lists no chunk of its own
        sample_latent(model, prompt(), [], latent, DiagonalSchedule.preset(DEMO_PRESET, steps=fewer), seed=7)
    told = [record.getMessage() for record in caplog.records]
    assert not any("sigmas" in line for line in told)
    assert len([line for line in told if "steps_per_chunk is set to" in line]) == 3


def test_another_context_sigma_than_the_files_is_told(tiny_wan, causal, prompt, sample_latent, empty_latent, caplog):
    model = causal(tiny_wan)
    model.set_attachments("diagonal_provenance", Provenance(context_mode="renoise", context_sigma=1 / 7))
    for mode, sigma in (("renoise", 0.143), ("noisy", 0.3), ("renoise", 0.357)):
        schedule = dataclasses.replace(UNIFORM, context_mode=mode, context_sigma=sigma)
        sample_latent(model, prompt(), [], empty_latent(3), schedule, seed=7)
    told = [record.getMessage() for record in caplog.records if "context_sigma" in record.getMessage()]
    assert told == [f"context_sigma is set to 0.357, but the file was trained with {1 / 7}"]


def test_a_run_that_fails_behind_its_restored_cache_frees_it(tiny_wan, causal, prompt, pack_module, monkeypatch):
    sampling, model = pack_module("model_patches.sampling"), causal(tiny_wan)
    plan = sampling.plan_clip(model, (1, 16, 6, 4, 4), UNIFORM)
    kept, restored, restore = {}, [], KVCache.restore

    def first(chunk):
        if chunk.index == 0:
            kept.update(chunk.cache.snapshot())

    def remembered(cache, *given, **named):
        restore(cache, *given, **named)
        restored.append((cache, cache.nbytes))

    def no_memory():
        raise torch.OutOfMemoryError("no memory left")

    sampling.stream_latent(model, prompt(), [], plan, first, seed=1)
    monkeypatch.setattr(KVCache, "restore", remembered)
    resume = sampling.Resume(chunk=1, committed=3, load=lambda: kept, load_history=no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        sampling.stream_latent(model, prompt(), [], plan, first, seed=1, resume=resume)
    ((cache, before),) = restored
    assert before > 0 and cache.nbytes == 0


def test_a_streams_chunks_are_scaled_by_numbers_that_are_on_the_device(
    tiny_wan, causal, prompt, pack_module, monkeypatch
):
    sampling, model = pack_module("model_patches.sampling"), causal(tiny_wan)
    kind = type(model.model.latent_format)
    plan = sampling.plan_clip(model, (1, 16, 6, 4, 4), UNIFORM)
    moved, scaled, move, scale = [], [], sampling.on_device, kind.process_out
    monkeypatch.setattr(sampling, "on_device", lambda *given: moved.append(move(*given)) or moved[-1])
    monkeypatch.setattr(kind, "process_out", lambda self, latent: scaled.append(self) or scale(self, latent))
    given = []
    sampling.stream_latent(model, prompt(), [], plan, lambda chunk: given.append(scaled[-1]), seed=1)
    assert len(given) == 2 and all(used is moved[0] for used in given) and len(moved) == 1
    assert moved[0] is not model.model.latent_format


# --- the nodes ---


def test_the_samplers_widgets_and_inputs_reach_the_run(pack_module, monkeypatch):
    nodes = pack_module("nodes.chunk_sampler")
    monkeypatch.setattr(nodes.DiagonalChunkSampler, "hidden", SimpleNamespace(unique_id="5"), raising=False)
    monkeypatch.setattr(nodes, "preview_callback", lambda model: "preview")
    server = SimpleNamespace(client_id=None, last_prompt_id="P")
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    asked = []
    monkeypatch.setattr(nodes, "sample_latent", lambda *given, **named: asked.append((given, named)) or "latent")
    inputs = {"model": "M", "positive": [], "negative": "N", "latent_image": "L", "schedule": "S"}
    widgets = {"seed": 7, "cfg": 2.0, "denoise": 0.5, "context": "C", "optical_flow": "F"}
    before = nodes.DiagonalChunkSampler.fingerprint_inputs(seed=7)
    assert nodes.DiagonalChunkSampler.execute(**inputs, **widgets).result == ("latent",)
    ((given, named),) = asked
    assert given == ("M", [], "N", "L", "S")
    assert nodes.DiagonalChunkSampler.fingerprint_inputs(seed=7) == before
    named["on_early_end"]()  # the whole one is to be made when it is queued again
    assert nodes.DiagonalChunkSampler.fingerprint_inputs(seed=7) != before
    assert {name: named[name] for name in widgets} == widgets
    assert named["callback"] == "preview" and named["prompts"] is None
    live = named["on_progress"].__self__
    assert (live.node_id, live.model, named["on_chunk"].__self__) == ("5", "M", live)


def test_the_nodes_run_where_no_server_runs_them(pack, pack_module, output, monkeypatch):
    """As a program does that calls them itself: no queue, no hidden inputs, and no server or one without a prompt."""
    from server import PromptServer

    monkeypatch.delattr(PromptServer, "instance", raising=False)
    node = {kind.__name__: kind for kind in pack_module("nodes").NODES}
    assert all(kind.hidden is None for kind in node.values())
    model, clip, vae = node["DiagonalDemoLoader"].EXECUTE_NORMALIZED("student").result
    text = {"text": "a red circle moves right", "switch": "recache", "blend_chunks": 4, "fps": 16.0}
    (prompts,) = node["DiagonalPromptSchedule"].EXECUTE_NORMALIZED(clip, **text).result
    schedule = pack_module("nodes.schedule").build_schedule(
        preset="demo 4-3-2", frames_per_chunk=0, steps="1", context_mode="from preset", context_sigma=0.0, shift=0.0
    )
    latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    sampled = {"schedule": schedule, "seed": 7, "cfg": 1.0}
    both = (model, prompts, prompts)
    (made,) = node["DiagonalChunkSampler"].EXECUTE_NORMALIZED(*both, latent, denoise=1.0, **sampled).result
    assert made["samples"].shape == latent["samples"].shape and made["samples"].std() > 0.1
    monkeypatch.setattr(PromptServer, "instance", SimpleNamespace(client_id=None), raising=False)
    saved = node["DiagonalStreamVideo"].EXECUTE_NORMALIZED(
        *both, vae, width=64, height=64, length=0.5, fps=16.0, filename_prefix="v", format="mp4", crf=20.0,
        state_every=20, restart=False, keep_state=False, **sampled,
    )  # fmt: skip
    assert saved.result[0].get_frame_count() == 8 and (output / "v_00001_.mp4").exists()


@pytest.mark.parametrize("disabled", [True, False])
def test_no_memory_is_pinned_where_comfyui_was_told_not_to(pack_module, monkeypatch, disabled):
    import comfy.cli_args

    monkeypatch.setattr(noise_module, "_may_pin", disabled)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", disabled)
    pace = pack_module("model_patches.pace")
    spec = importlib.util.spec_from_file_location(f"{pace.__name__}_again", pace.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # as when ComfyUI starts
    assert noise_module._may_pin == (not disabled)


def test_the_causal_nodes_widgets_are_the_models_settings(pack_module, tiny_wan):
    node = pack_module("nodes.causal_attention").DiagonalCausalAttention
    (model,) = node.execute(tiny_wan, 2, 9, 4, "window").result
    settings = pack_module("model_patches.causal").causal_settings(model)
    assert settings == CausalSettings(frames_per_chunk=2, window=9, sink=4, positions="window")


def test_the_schedule_nodes_widgets_change_the_preset_where_they_say_something(pack_module):
    nodes = pack_module("nodes.schedule")

    def build(**changes):
        usual = {"steps": " ", "context_mode": "from preset", "context_sigma": 0.25, "shift": 0.0}
        return nodes.build_schedule(**{"preset": "diagonal 4-3-2", "frames_per_chunk": 0, **usual, **changes})

    plain = build()
    assert plain == dataclasses.replace(DIAGONAL, context_sigma=0.25)
    assert build(preset="causal forcing framewise").frames_per_chunk == 1
    assert build(preset="causal forcing framewise", frames_per_chunk=2).frames_per_chunk == 2
    assert [len(row) for row in build(steps="3,1").sigmas] == [3, 1]
    assert build(shift=1.0).shift == 1 and build(shift=1.0).sigmas != plain.sigmas
    assert build(context_mode="renoise").context_mode == "renoise"
    own = build(sigmas="1, 0.5\n1, 0.25", steps="4", shift=2.0)
    assert own.sigmas == ((1.0, 0.5), (1.0, 0.25)) and own.context_mode == plain.context_mode
    widgets = {"preset": "diagonal 4-3-2", "steps": "", "context_mode": "renoise", "context_sigma": "0.25"}
    drawn = nodes.drawing({**widgets, "shift": "0", "frames_per_chunk": "0"})
    assert [len(row) for row in drawn["sigmas"]] == [4, 3, 2, 2, 2, 2, 2]
    assert (drawn["editable"], drawn["listed"], drawn["cache_pass"]) == (True, 3, 0.25)
    listed = nodes.drawing({**widgets, "shift": "0", "frames_per_chunk": "0", "steps": ",".join("2" * 30)})
    assert (len(listed["sigmas"]), listed["listed"], listed["editable"]) == (24, 30, False)
    typed = nodes.drawing({**widgets, "shift": "0", "frames_per_chunk": "0", "sigmas": "1, 0.5"})
    assert not typed["editable"]
    assert nodes.drawing(widgets) == {"error": "shift is missing; reload the page."}
    assert "error" in nodes.drawing({**widgets, "shift": "much", "frames_per_chunk": "0"})


def test_the_time_of_a_forward_is_told_without_the_loading_before_the_first(pack_module, tiny_wan, monkeypatch):
    live, progress = pack_module("nodes.live"), pack_module("model_patches.sampling").Progress
    sent, now = [], [100.0]
    server = SimpleNamespace(last_prompt_id="P", client_id="C", send_sync=lambda _, data, __: sent.append(data))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(live, "preview_of", lambda model: lambda latents: [])
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    report = live.LiveReport("5", tiny_wan)
    now[0] += 60.0  # the models are loaded
    for forwards in (11, 12, 13):  # of a resumed run
        now[0] += 2.0
        report.progress(progress(chunk=1, chunks=5, step=0, steps=2, forwards=forwards, total=21))
    report.chunk(SimpleNamespace(start_frame=0, latents=torch.zeros(1, 16, 3, 2, 2)))
    assert [data["elapsed"] for data in sent] == [62.0, 64.0, 66.0, 66.0]
    assert [data["sampling"] for data in sent] == [None, 4.0, 6.0, 6.0], "a forward takes two seconds"


def test_a_warning_behind_the_last_forward_reaches_the_node(pack_module, tiny_wan, monkeypatch):
    live, progress = pack_module("nodes.live"), pack_module("model_patches.sampling").Progress
    sent = []
    server = SimpleNamespace(last_prompt_id="P", client_id="C", send_sync=lambda *message: sent.append(message))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    for late in ([], ["No state could be saved."]):
        with live.LiveReport("5", tiny_wan) as report:
            live.PACK_LOG.warning("early")
            of_another_run = threading.Thread(target=live.PACK_LOG.warning, args=("another thread's",))
            of_another_run.start()
            of_another_run.join()
            report.progress(progress(chunk=0, chunks=1, step=0, steps=1, forwards=1, total=1))
            for line in late:
                live.PACK_LOG.warning(line)
    kinds = [(kind, data["warnings"]) for kind, data, _ in sent]
    assert kinds == [
        ("diagonal.progress", ["early"]),
        ("diagonal.progress", ["early"]),
        ("diagonal.warnings", ["early", "No state could be saved."]),
    ]


def test_the_canvas_is_told_what_this_run_has_made_and_only_the_client_that_queued_it(
    pack_module, tiny_wan, monkeypatch
):
    live, progress = pack_module("nodes.live"), pack_module("model_patches.sampling").Progress
    sent = []
    server = SimpleNamespace(last_prompt_id="P", client_id="C", send_sync=lambda *message: sent.append(message))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(live, "preview_of", lambda model: lambda latents: [])
    report = live.LiveReport("5", tiny_wan)
    for forwards, step in ((83, 0), (84, -2)):
        report.progress(
            progress(chunk=46, chunks=50, step=step, steps=2 if step == 0 else 0, forwards=forwards, total=100)
        )
    names = ("node", "prompt_id", "forwards", "made", "total", "chunk", "chunks", "step", "steps")
    found = [tuple(data[name] for name in names) for _, data, _ in sent]
    assert found == [("5", "P", 83, 1, 100, 47, 50, 1, 2), ("5", "P", 84, 2, 100, 47, 50, 0, 0)]
    for start in (2, 5):  # behind two given latent frames, which are five pixel frames
        report.chunk(SimpleNamespace(start_frame=start, latents=torch.zeros(1, 16, 3, 2, 2)))
    assert [data["pixel_frames"] for _, data, _ in sent[2:]] == [12, 24]
    assert sent[2][1]["first"] == sent[3][1]["first"] and {client for *_, client in sent} == {"C"}
    asks = tiny_wan.clone()
    asks.model_options["disable_cfg1_optimization"] = True  # as nodes do that use the negative prompt at cfg 1
    assert live.LiveReport("5", asks).guided and live.LiveReport("5", tiny_wan, 2.0).guided and not report.guided


def test_without_a_client_nothing_is_sent(pack_module, tiny_wan, monkeypatch):
    """ComfyUI would send it to every open page."""
    client, live = pack_module("nodes.client"), pack_module("nodes.live")
    progress = pack_module("model_patches.sampling").Progress
    sent = []

    def keep(*message):
        sent.append(message)

    server = SimpleNamespace(last_prompt_id="P", client_id=None, send_sync=keep, send_progress_text=keep)
    monkeypatch.setattr(client, "PromptServer", SimpleNamespace(instance=server))
    with live.LiveReport("5", tiny_wan) as report:
        report.progress(progress(chunk=0, chunks=1, step=0, steps=1, forwards=1, total=1))
        live.PACK_LOG.warning("late")
        report.chunk(SimpleNamespace(start_frame=0, latents=torch.zeros(1, 16, 3, 2, 2)))
        report.frames(torch.zeros(1, 2, 2, 3), 1, 16)
    pack_module("nodes.finishing").ended_early("5")
    client.tell("5", "text")
    assert sent == []
    client.send("e", {"a": 1}, to=client.Asker("D", "Q"))
    server.client_id = "C"
    client.send("e", {"a": 1})
    client.send("e", {"a": 1}, to=client.Asker(None, "Q"))
    client.tell("5", "text")
    client.tell(None, "text")
    assert sent == [("e", {"prompt_id": "Q", "a": 1}, "D"), ("e", {"prompt_id": "P", "a": 1}, "C"), ("text", "5", "C")]
