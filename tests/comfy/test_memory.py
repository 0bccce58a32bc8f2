"""The memory that is predicted from files, against what ComfyUI makes of them and a run allocates."""

import json
import struct
from types import SimpleNamespace

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import comfy.taesd.taehv
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from wan_files import DIMS, LAYOUTS, tiny_wan

from diagonal_sampler.flow import camera_flow
from diagonal_sampler.memory import ClipSize, forecast
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import KV_CACHE_DTYPES
from diagonal_sampler.wan_layout import expected_shapes

LEGACY = "old torch format"


@pytest.fixture(scope="module")
def memory(pack_module):
    return pack_module("model_patches.memory")


@pytest.fixture(scope="module")
def load_wan(pack_module):
    return pack_module("model_patches.loading").load_wan


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != LEGACY])
def test_a_files_facts_are_those_of_the_model_that_it_becomes(memory, load_wan, tmp_path, layout):
    path = LAYOUTS[layout](tmp_path, tiny_wan(), tiny_wan(1))
    model, info = load_wan(path)
    facts = memory.file_facts(path)
    assert facts.network == memory.network_facts(model)
    assert facts.provenance == info.provenance
    assert (facts.network.layers, facts.network.width, facts.network.patch) == (DIMS.depth, DIMS.dim, (2, 2))


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_the_number_format_counts(memory, load_wan, tmp_path, weight_dtype):
    path = LAYOUTS["krea, flat model."](tmp_path, tiny_wan(), {})
    facts = memory.file_facts(path, weight_dtype=weight_dtype)
    assert facts.network == memory.network_facts(load_wan(path, weight_dtype=weight_dtype)[0])
    assert facts.network.weight_bytes < memory.file_facts(path).network.weight_bytes / 3


def test_weights_count_in_the_format_that_they_get_on_the_device(memory, load_wan, tmp_path):
    """In dynamic VRAM they lie in RAM as the file has them: assigned, not copied."""
    model, _ = load_wan(LAYOUTS["krea, flat model."](tmp_path, tiny_wan(), {}))
    facts = memory.network_facts(model)
    model.model.load_model_weights({name: value.half() for name, value in tiny_wan().items()}, assign=True)
    model.size = 0
    assert model.model_size() < 0.6 * facts.weight_bytes
    assert memory.network_facts(model) == facts


def quantized(kind, scale_input):
    """Tensors and header of a file whose first feed-forward layer is float8, in each of the three ways that say so."""
    layer, entry = "blocks.0.ffn.0", {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    tensors = tiny_wan()
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    scale = {"legacy": "scale_weight"}.get(kind, "weight_scale")
    tensors[f"{layer}.{scale}"] = torch.ones(())
    header = {}
    if kind == "legacy":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        tensors |= {f"{layer}.scale_input": torch.ones(())} if scale_input else {}
    elif kind == "marks":
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    else:
        header = {"_quantization_metadata": json.dumps({"layers": {layer: entry}})}
    return tensors, header


@pytest.mark.parametrize(
    ("kind", "scale_input"), [("legacy", False), ("legacy", True), ("marks", False), ("header", False)]
)
def test_a_quantised_files_facts_are_those_of_its_model(memory, load_wan, tmp_path, kind, scale_input):
    tensors, header = quantized(kind, scale_input)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata=header)
    facts = memory.file_facts(path).network
    assert facts == memory.network_facts(load_wan(path)[0])
    save_file(tiny_wan(), tmp_path / "whole.safetensors")
    assert facts.weight_bytes < memory.file_facts(tmp_path / "whole.safetensors").network.weight_bytes


def test_weights_are_not_read(memory, load_wan, tmp_path):
    weights = tiny_wan()
    weights["blocks.0.ffn.0.weight"][0, 0] = float("nan")
    path = LAYOUTS["comfyui, bare"](tmp_path, weights, {})
    with pytest.raises(ValueError, match="NaN"):
        load_wan(path)
    assert memory.file_facts(path).network.layers == DIMS.depth


def test_a_file_that_would_be_read_whole_is_said_to_be_unknown(memory, tmp_path):
    with pytest.raises(ValueError, match="old format"):
        memory.file_facts(LAYOUTS[LEGACY](tmp_path, tiny_wan(), {}))


def test_a_replaced_file_is_looked_at_again(memory, tmp_path):
    path = LAYOUTS["comfyui, bare"](tmp_path, tiny_wan(), {})
    assert memory.file_facts(path).provenance.window is None
    save_file(tiny_wan(), path, metadata={"window": "9"})
    assert memory.file_facts(path).provenance.window == 9


def write_gguf(path, shapes, original=()):
    """A GGUF file of these shapes. original: of the tensor `blocks.0.modulation`, as ComfyUI's files keep one."""

    def text(words):
        return struct.pack("<Q", len(words)) + words.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), bool(original))
    if original:
        header += text("comfy.gguf.orig_shape.blocks.0.modulation") + struct.pack("<IIQ", 9, 11, len(original))
        header += struct.pack(f"<{len(original)}q", *original)
    for name, shape in shapes.items():
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 2, 0)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(12345))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.ffn.0.weight": (2**62, 2**62)}, "damaged"),
        ({"head.head.weight": None}, "no whole Wan diffusion model .it lacks head.head.weight"),
        ({"patch_embedding.weight": None}, "no whole Wan diffusion model"),
        ({"text_embedding.0.weight": ()}, "no whole Wan diffusion model"),
        ({"head.modulation": ()}, "no whole Wan diffusion model"),
        ({"original": (-1, 6, 128)}, "damaged"),
        ({f"blocks.{block}.a": (1,) for block in range(2, 9)}, "no whole Wan diffusion model .it lacks blocks.2.cross"),
        ({"blocks.999.a": (1,)}, "it has a block 999 but only"),
        ({f"double_blocks.{block}.a": (1,) for block in range(5000)}, "no Wan diffusion model: it has 5\\d+ tensors"),
    ],
)
def test_a_damaged_gguf_header_is_said_to_be_one(memory, tmp_path, change, words):
    change = dict(change)
    original = change.pop("original", ())
    shapes = {name: shape for name, shape in (expected_shapes(DIMS) | change).items() if shape is not None}
    path = write_gguf(tmp_path / "bad.gguf", shapes, original)
    with pytest.raises(ValueError, match=f"'bad.gguf'(?: is |: ).*{words}"):
        memory.file_facts(path)


def test_a_small_file_of_many_blocks_is_not_built(memory, tmp_path):
    """The blocks share their tensors; ComfyUI reads every name for each of them."""
    weights = tiny_wan()
    first = {name: value for name, value in weights.items() if name.startswith("blocks.0.")}
    for block in range(2, 160):
        weights |= {name.replace("blocks.0.", f"blocks.{block}."): value for name, value in first.items()}
    torch.save({"generator": weights}, tmp_path / "many.pt")
    with pytest.raises(ValueError, match=r"'many.pt' is no Wan diffusion model: it has 4\d+ tensors"):
        memory.file_facts(tmp_path / "many.pt")


def test_a_gguf_file_keeps_its_weights_packed(memory, load_wan, tmp_path):
    path = write_gguf(tmp_path / "wan-Q4_0.gguf", expected_shapes(DIMS), (1, 6, DIMS.dim))
    network = memory.file_facts(path).network
    whole = memory.network_facts(load_wan(LAYOUTS["comfyui, bare"](tmp_path, tiny_wan(), {}))[0])
    assert network.weight_bytes == 12345
    assert (network.layers, network.width, network.parameters) == (whole.layers, whole.width, whole.parameters)
    assert (network.element_bytes, network.forward_bytes) == (whole.element_bytes, whole.forward_bytes)


@pytest.mark.parametrize("window", [6, -1])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_keys_and_values_are_those_of_a_run(
    memory, pack_module, tiny_wan_path, tiny_wan, causal, prompt, monkeypatch, window, cfg, kv_cache_dtype
):
    sampling = pack_module("model_patches.sampling")
    model = causal(tiny_wan, window=window, sink=3 if window > 0 else 0, kv_cache_dtype=kv_cache_dtype)
    plan = sampling.plan_clip(model, (1, 16, 9, 4, 6), DiagonalSchedule.preset("diagonal 4-3-2"))
    runs, caches = [], []
    real = sampling.CausalRun
    monkeypatch.setattr(sampling, "CausalRun", lambda *a, **k: runs.append(real(*a, **k)) or runs[-1])

    def take(chunk):
        text = sum(x.nbytes for pair in runs[-1]._text.values() for x in pair)
        caches.append((chunk.cache.nbytes, text))

    sampling.stream_latent(model, prompt(), prompt(1), plan, take, seed=0, cfg=cfg)
    clip = ClipSize(
        settings=plan.settings, frames=9, rows=4, columns=6, conditions=1 if cfg == 1 else 2, text_tokens=16
    )
    network = memory.file_facts(tiny_wan_path).network
    expected = forecast(network, clip)
    frames = min(window, 9) if window > 0 else 9
    written_out = 2 * frames * 2 * 3 * network.width * network.element_bytes if kv_cache_dtype == "int8" else 0
    assert caches[-1] == (expected.keys_values - written_out, expected.text)


def test_a_compute_dtype_counts_whichever_model_ran_last(memory, pack_module, tiny_wan, causal, prompt):
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    sampling, model = pack_module("model_patches.sampling"), causal(tiny_wan)
    plan = sampling.plan_clip(model, (1, 16, 6, 4, 4), DiagonalSchedule.preset("diagonal 4-3-2"))
    models = {name: ModelComputeDtype().patch(model, name)[0] for name in ("bf16", "fp32", "default")}
    wanted = {"bf16": 2, "fp32": 4, "default": 4}
    for last in ("default", "bf16", "fp32"):
        sampling.stream_latent(models[last], prompt(), [], plan, lambda chunk: None, seed=0)
        assert {name: memory.network_facts(each).element_bytes for name, each in models.items()} == wanted
        assert memory.network_facts(model).element_bytes == 4


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_a_vaes_facts_are_those_of_the_vae_that_it_becomes(memory, pack_module, tmp_path, kind):
    if kind == "wan":
        network = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    else:
        network = comfy.taesd.taehv.TAEHV(latent_channels=16)
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    facts = memory.decoder_facts(tmp_path / "vae.safetensors", 3)
    vae = comfy.sd.VAE(sd=state)
    with pack_module("model_patches.stream_decode").stream_decoder(vae) as decoder:
        assert facts.weight_bytes == vae.patcher.model_size() > 0
        assert facts.cell_bytes * 60 * 104 == pytest.approx(decoder.memory_required((1, 16, 3, 60, 104)), rel=1e-4)


def test_a_vaes_format_is_that_of_the_device_that_it_runs_on(memory, tmp_path, monkeypatch):
    network = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    save_file({name: torch.zeros_like(value) for name, value in network.state_dict().items()}, tmp_path / "vae.sft")
    alone = memory.decoder_facts(tmp_path / "vae.sft", 3)
    for name in ("should_use_fp16", "should_use_bf16"):
        monkeypatch.setattr(comfy.model_management, name, lambda device, **more: device.type == "cuda")
    monkeypatch.setattr(comfy.model_management, "vae_device", lambda: torch.device("cuda"))
    on_gpu = memory.decoder_facts((tmp_path / "vae.sft").rename(tmp_path / "other.sft"), 3)
    assert (2 * on_gpu.weight_bytes, 2 * on_gpu.cell_bytes) == pytest.approx((alone.weight_bytes, alone.cell_bytes))


def test_no_run_counts_its_weights(memory, pack_module, tiny_wan, causal, prompt, monkeypatch):
    """That goes through all modules, while a person waits for the first chunk."""
    monkeypatch.setattr(memory, "_weight_bytes", lambda model: pytest.fail("they were counted"))
    sampling, model = pack_module("model_patches.sampling"), causal(tiny_wan)
    plan = sampling.plan_clip(model, (1, 16, 3, 4, 4), DiagonalSchedule.preset("diagonal 4-3-2"))
    sampling.stream_latent(model, prompt(), [], plan, lambda chunk: None, seed=0)


def test_what_carrying_frames_takes_is_what_comfyui_is_asked_for(pack_module, tiny_wan, causal, prompt, sample_latent):
    loader, control = pack_module("nodes.demo_loader"), pack_module("model_patches.flow_control")
    path, asked = loader.DEMO_DIRECTORY / loader.DEMO_VAE, []
    vae = pack_module("model_patches.demo").load_demo_vae(path)
    for name in ("memory_used_decode", "memory_used_encode"):
        real = getattr(vae, name)
        setattr(vae, name, lambda shape, dtype, real=real: asked.append(real(shape, dtype)) or asked[-1])
    motion = control.FlowConditioning(optical_flow=camera_flow(20, 32, 64, pan=(1, 0)), mode="reference", vae=vae)
    latent = {"samples": torch.zeros(1, 16, 6, 4, 8)}
    sample_latent(
        causal(tiny_wan), prompt(), [], latent, DiagonalSchedule.preset("diagonal 4-3-2"), seed=1, optical_flow=motion
    )
    facts = pack_module("model_patches.memory").carrier_facts(path, 3, demo=True)
    assert len(asked) == 4 and facts.cell_bytes * 4 * 8 == pytest.approx(max(asked))
    assert facts.weight_bytes == vae.patcher.model_size()


@pytest.mark.parametrize(
    "state",
    [{"nothing": (1,)}, {"decoder.22.bias": (12,)}, {"decoder.middle.0.residual.0.gamma": (8, 1, 1, 1)}],
    ids=["no VAE", "half a TAEHV", "half a Wan VAE"],
)
def test_a_file_that_is_no_vae_is_said_to_be_none(memory, tmp_path, state):
    save_file({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="'vae.safetensors' is no VAE that ComfyUI"):
        memory.decoder_facts(tmp_path / "vae.safetensors", 3)


# --- the answer to the canvas ---


@pytest.fixture
def predict(pack_module, tmp_path, monkeypatch):
    """`predict(**query)`: for a tiny file in ComfyUI's folder, on a GPU of 1 GB with all of it to be had."""
    nodes = pack_module("nodes.memory")
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    LAYOUTS["comfyui, bare"](folder, tiny_wan(), {})
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    monkeypatch.setattr(nodes, "available_memory", lambda: (10**9, 10**9, True))
    query = {"node": "UNETLoader", "file": "model.safetensors", "width": "832", "height": "480", "length": "81"}
    yield lambda **more: nodes.prediction({**query, **more})
    folder_paths.filename_list_cache.clear()


def test_a_run_that_fits(predict):
    reply = predict(width="256", height="256", window="12", sink="3", frames_per_chunk="3")
    assert reply["fits"] and reply["changes"] == [] and reply["waiting"] == 0
    assert reply["available"] == 10**9 and reply["on_gpu"]
    assert sum(reply["parts"].values()) == reply["total"] < reply["available"]
    assert (reply["width"], reply["height"], reply["window"]) == (256, 256, 12)


def test_a_preset_of_single_frames_makes_the_forward_small(predict):
    three, one, six = (
        predict(width="256", height="256", window="12", sink="3", frames_per_chunk=frames, **more)["parts"]["forward"]
        for frames, more in (
            ("3", {"preset": "diagonal 4-3-2"}),
            ("3", {"preset": "causal forcing framewise"}),
            ("6", {"preset": "no such preset"}),
        )
    )
    assert one < three < six


def test_a_run_that_does_not_fit_is_told_what_would(predict):
    wide = predict(width="4096", height="2048", window="12", sink="3")
    assert not wide["fits"]
    (size,) = (change["size"] for change in wide["changes"] if change["size"])
    assert size[0] < 4096 and size[1] < 2048, "width, then height"
    smaller = {"width": f"{size[0]}", "height": f"{size[1]}", "window": "12", "sink": "3"}
    assert predict(**smaller)["fits"]
    assert predict(window="24", sink="3")["parts"]["keys_values"] > predict(window="12")["parts"]["keys_values"]


def test_fp8_is_not_suggested_where_the_device_has_none(predict, pack_module, monkeypatch):
    needed = predict(width="64", height="64")
    monkeypatch.setattr(pack_module("nodes.memory"), "available_memory", lambda: (needed["total"] - 1, 10**9, False))
    assert predict(width="64", height="64")["changes"][0]["weights"] == "fp8"
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype.itemsize > 1)
    assert predict(width="64", height="64")["changes"][0]["weights"] == "gguf_q4"


def test_weights_may_wait_outside(predict, pack_module, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    nodes = pack_module("nodes.memory")
    needed = predict(width="64", height="64")
    monkeypatch.setattr(nodes, "available_memory", lambda: (needed["total"] - 1, 10**9, True))
    assert predict(width="64", height="64")["waiting"] == 1
    monkeypatch.setattr(nodes, "available_memory", lambda: (needed["total"] - 1, 10**9, False))
    without_gpu = predict(width="64", height="64")
    assert not without_gpu["fits"] and without_gpu["waiting"] == 0


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_weights_wait_only_where_comfyui_makes_room(predict, pack_module, monkeypatch, ratio):
    """On other GPUs than NVIDIA's it keeps weights in 40% of the memory, whatever a run needs."""
    monkeypatch.setattr(comfy.model_management, "MIN_WEIGHT_MEMORY_RATIO", ratio)
    needed = predict(width="64", height="64")
    working, weights = needed["total"] - needed["parts"]["weights"], needed["parts"]["weights"]
    facts = pack_module("model_patches.memory")
    for share in (0.2, 0.5, 0.9):
        available = working + round(share * weights)
        monkeypatch.setattr(
            pack_module("nodes.memory"), "available_memory", lambda available=available: (available, 10**9, True)
        )
        kept = facts.weights_kept(weights, available)
        assert kept == min(weights, round(ratio * available))
        fits = working + kept <= available
        assert (predict(width="64", height="64")["waiting"] > 0) == fits
        assert fits or ratio > 0


def test_what_comfyui_fails_on_is_an_answer_and_logged_once(predict, pack_module, monkeypatch, caplog):
    nodes, calls = pack_module("nodes.memory"), []

    def fail(*_arguments, **_options):
        calls.append(1)
        raise RuntimeError("Tensor.item() cannot be called on meta tensors \ud800")

    monkeypatch.setattr(nodes, "file_facts", fail)
    nodes._unforeseen.cache_clear()
    with caplog.at_level("WARNING"):
        replies = [predict(), predict(width="64")]
    assert len(calls) == 2 and replies[0] == replies[1]
    assert "'model.safetensors'" in replies[0]["error"] and "RuntimeError: Tensor.item()" in replies[0]["error"]
    (logged,) = [record for record in caplog.records if "model.safetensors" in record.getMessage()]
    assert "Traceback" in logged.getMessage() and not logged.exc_info
    (replies[0]["error"] + logged.getMessage()).encode()


def test_all_that_there_is_may_be_taken_and_only_weights_wait(predict, pack_module, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    nodes = pack_module("nodes.memory")
    needed = predict(width="64", height="64")
    working = needed["total"] - needed["parts"]["weights"]
    for available, fits, waiting in (
        (needed["total"], True, 0),
        (working, False, needed["parts"]["weights"]),
        (working - 1, False, 0),
    ):
        monkeypatch.setattr(nodes, "available_memory", lambda available=available: (available, 10**9, True))
        found = predict(width="64", height="64")
        assert (found["fits"], found["waiting"]) == (fits, waiting)


def test_guidance_and_each_video_of_a_batch_have_their_own_keys_and_values(predict):
    one, unguided, guided, two = (
        predict(width="64", height="64", **more)["parts"] for more in ({}, {"cfg": "1.0"}, {"cfg": "2"}, {"batch": "2"})
    )
    assert one == unguided
    assert guided["keys_values"] == two["keys_values"] == 2 * one["keys_values"] > 0
    assert guided["text"] == 2 * one["text"] > 0 and two["forward"] == pytest.approx(2 * one["forward"], abs=2)


def test_the_demo_and_its_decoder(predict):
    reply = predict(node="DiagonalDemoLoader", file="student", vae_node="DiagonalDemoLoader", width="64", height="64")
    assert reply["fits"] and reply["parts"]["decoder"] > 0
    assert reply["window"] == 12, "the demo's header says window 12"


def test_a_vae_that_carries_frames_counts_where_the_mode_has_it_do_so(predict):
    vae, flow = ({f"{name}vae_node": "DiagonalDemoLoader"} for name in ("", "flow_"))
    demo = {"node": "DiagonalDemoLoader", "width": "64", "height": "64"}

    def decoder(**more):
        return predict(**{**demo, "file": "student", **more})["parts"]["decoder"]

    carries = decoder(flow="reference", **flow)
    assert carries == decoder(flow="adapter+blend", **flow) == decoder(flow="auto", **flow) > 0
    assert decoder() == decoder(flow="adapter", **flow) == decoder(flow="noise", **flow) == 0
    assert decoder(file="follower", flow="auto", **flow) == 0, "its adapter is taken"
    of_another_loader = predict(width="64", height="64", flow="auto", **flow)["parts"]["decoder"]
    assert of_another_loader > 0, "which gives the model no adapter"
    alone, both = decoder(**vae), decoder(flow="reference", **vae, **flow)
    assert both < alone + carries, "one VAE is loaded once"


@pytest.mark.parametrize(
    "query, words",
    [
        ({"file": "../secret.safetensors"}, "is not in models/diffusion_models"),
        ({"file": "/etc/passwd"}, "is not in models/diffusion_models"),
        ({"node": "SomeLoader"}, "comes from SomeLoader"),
        ({"node": "DiagonalDemoLoader", "file": "../x"}, "choose one of student, teacher"),
        ({"vae": "../../vae.safetensors"}, "vae.safetensors' is not in models/vae or models/vae_approx;"),
        ({"file": "gone.pt"}, "unet_name='gone.pt' is not in models/diffusion_models; put the file there and press R"),
        ({"node": "DiagonalModelLoader", "file": "gone.pt"}, "ckpt_name='gone.pt' is not in models/"),
        ({"file": ""}, "unet_name is empty; choose a file."),
        ({"width": "wide"}, "width is 'wide'"),
        ({"height": "0"}, "height is '0'"),
        ({"length": ""}, "length is ''"),
        ({"cfg": "much"}, "cfg is 'much'"),
        ({"window": "4", "sink": "3", "frames_per_chunk": "3"}, "window is 4"),
        ({"weight_dtype": "int3"}, "weight_dtype='int3'"),
    ],
)
def test_what_cannot_be_known_is_an_answer(predict, query, words):
    assert words in predict(**query)["error"]


def test_a_file_that_is_missing_is_named_with_its_folders(predict):
    missing = predict(node="DiagonalModelLoader", file="gone.pt")["missing"]
    assert missing == {"file": "gone.pt", "folders": ("diffusion_models", "checkpoints")}
    assert "missing" not in predict(width="wide")


def test_directml_whose_memory_comfyui_does_not_know_refuses_no_clip(
    memory, pack_module, tiny_wan, causal, predict, monkeypatch
):
    monkeypatch.setattr(comfy.model_management, "directml_enabled", True)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *a: 1)
    pack_module("model_patches.clip_plan").plan_clip(
        causal(tiny_wan), (1, 16, 9, 4, 4), DiagonalSchedule.preset("diagonal 4-3-2")
    )
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(pack_module("nodes.memory"), "available_memory", memory.available_memory)
    assert predict()["error"] == "How much memory this GPU has is not known: ComfyUI cannot ask DirectML."


def test_a_comfyui_without_directml_is_asked_as_any_other(memory, pack_module, tiny_wan, causal, monkeypatch):
    """Its own module still needs the flag here, so that the flag is hidden from ours alone."""
    real, clip_plan = comfy.model_management, pack_module("model_patches.clip_plan")

    class Without:
        def __getattr__(self, name):
            if name == "directml_enabled":
                raise AttributeError(name)
            return getattr(real, name)

    for module in (memory, clip_plan):
        monkeypatch.setattr(module, "comfy", SimpleNamespace(model_management=Without()))
    clip_plan.plan_clip(causal(tiny_wan), (1, 16, 9, 4, 4), DiagonalSchedule.preset("diagonal 4-3-2"))
    available, total, _ = memory.available_memory()
    assert 0 < available <= total


def test_what_comfyui_has_loaded_can_be_had(memory, monkeypatch):
    device = comfy.model_management.get_torch_device()
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a: 10**9)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *a: 10**10)
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    alone, total, on_gpu = memory.available_memory()
    loaded = SimpleNamespace(device=device, model=SimpleNamespace(loaded_size=lambda: 5 * 10**8))
    gone = SimpleNamespace(device=device, model=None)  # its MODEL is no longer anywhere
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [loaded, gone])
    assert memory.available_memory()[0] == alone + 5 * 10**8
    assert (total, on_gpu) == (10**10, False)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 3 * 10**8)
    elsewhere = SimpleNamespace(device=torch.device("meta"), model=SimpleNamespace(loaded_size=lambda: 10**8))
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [loaded, elsewhere])
    assert memory.available_memory()[0] == 12 * 10**8, "what is kept in reserve, or lies elsewhere, cannot"
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *a: 10**9)
    assert memory.available_memory()[0] == 10**9
