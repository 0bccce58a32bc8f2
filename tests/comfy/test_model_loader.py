"""DiagonalModelLoader in ComfyUI: every layout gives the same MODEL, a LoRA adds exactly its product."""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref
from dataclasses import replace
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
import wan_files
from safetensors.torch import save_file
from wan_files import CONFIG, DIMS, LAYOUTS, LORA_LAYERS, LORA_LAYOUTS, lora_pairs, prefixed, tiny_wan, write_lora

from diagonal_sampler.provenance import Provenance
from diagonal_sampler.schedule import DEFAULT_PRESET, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

PARITY = sorted((Path(__file__).parents[1] / "data").rglob("*.model.safetensors"))


@pytest.fixture(scope="module")
def loading(pack_module):
    return pack_module("model_patches.loading")


@pytest.fixture(scope="module")
def node(pack_module):
    return pack_module("nodes.model_loader").DiagonalModelLoader


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    """ComfyUI's model folders, empty and private."""
    made = {}
    for kind in ("diffusion_models", "checkpoints", "loras"):
        made[kind] = tmp_path / "models" / kind
        made[kind].mkdir(parents=True)
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(made[kind])], extensions))
    folder_paths.filename_list_cache.clear()
    yield made
    folder_paths.filename_list_cache.clear()


pytestmark = pytest.mark.usefixtures("unload")


def run(model) -> torch.Tensor:
    """One forward of a loaded MODEL at sigma 0.7: [1, 16, 3, 8, 8] latents and 16 text tokens."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator)
    context = torch.randn(1, wan_files.TEXT_LEN, DIMS.text_dim, generator=generator)
    with torch.no_grad():
        return model.model.apply_model(latents, torch.tensor([0.7]), c_crossattn=context)


def comfyui_model(tmp_path: Path, tensors: dict, metadata: dict | None = None, **options):
    """The same weights through ComfyUI's own loader from a plain bare file."""
    path = tmp_path / "reference.safetensors"
    save_file(tensors, path, metadata={"config": CONFIG} if metadata is None else metadata)
    return comfy.sd.load_diffusion_model(str(path), model_options=options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_identical_output(layout: str, loading, tmp_path: Path) -> None:
    weights = tiny_wan(0)
    model, info = loading.load_wan(LAYOUTS[layout](tmp_path, weights, tiny_wan(1)))
    assert type(model.model) is comfy.model_base.WAN21_CausalAR
    assert model.model.model_sampling.shift == 5.0
    expected = run(comfyui_model(tmp_path, weights))
    assert expected.abs().mean() > 1e-3
    assert torch.equal(run(model), expected)


def test_the_choice_of_weights_reaches_the_model(loading, tmp_path: Path) -> None:
    path = LAYOUTS["self forcing, ema and generator"](tmp_path, tiny_wan(0), tiny_wan(1))
    model, _ = loading.load_wan(path, weights="generator")
    assert torch.equal(run(model), run(comfyui_model(tmp_path, tiny_wan(1))))


def test_comfyui_can_load_the_same_file_anew(loading, pack_module, tmp_path: Path, monkeypatch) -> None:
    """It does for hooks in dynamic VRAM, then without that, and for further GPUs; unasked for, it refuses."""

    class Dynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

    def anew(model, **options):
        load, arguments, place = model.cached_patcher_init
        return load(*arguments, **options)[place]

    path = LAYOUTS["self forcing, ema and generator"](tmp_path, tiny_wan(0), tiny_wan(1))
    model, _ = loading.load_wan(path, weights="generator")
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    plain, dynamic = anew(model.clone(), disable_dynamic=True), anew(model)
    assert dynamic.is_dynamic() and not plain.is_dynamic()
    assert plain.model is not model.model and torch.equal(run(plain), run(model))
    assert not anew(dynamic, disable_dynamic=True).is_dynamic()
    fp8, _ = loading.load_wan(path, weight_dtype="fp8_e4m3fn")
    assert anew(fp8, disable_dynamic=True).model_dtype() == torch.float8_e4m3fn
    student = pack_module("nodes.demo_loader").DEMO_DIRECTORY / "demo_student.safetensors"
    assert anew(pack_module("model_patches.demo").load_demo_model(student)).model is not None


def test_comfyui_alone_takes_a_single_key_pickle_for_a_bidirectional_wan(tmp_path: Path) -> None:
    """The trap of METHOD.md, kept here so that we learn when ComfyUI changes."""
    dims = wan_files.WanDims(
        dim=128, depth=1, ffn_dim=128, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16
    )
    torch.save({"generator": prefixed(tiny_wan(0, dims), "model.")}, tmp_path / "model.pt")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.pt"))
    assert type(model.model) is comfy.model_base.WAN21


def ar_video(model, frames: int = 3) -> torch.Tensor:
    """ComfyUI's own autoregressive sampler, two steps."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, frames, 8, 8, generator=generator)
    context = torch.randn(1, wan_files.TEXT_LEN, DIMS.text_dim, generator=generator)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[context, {}]], [[context, {}]])
    guider.set_cfg(1.0)
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 1})
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


def test_comfyuis_own_ar_sampler_runs_a_pickle_loaded_here(loading, tmp_path: Path) -> None:
    weights = tiny_wan(0)
    model, _ = loading.load_wan(LAYOUTS["causvid, generator"](tmp_path, weights, {}))
    expected = ar_video(comfyui_model(tmp_path, weights))
    assert torch.isfinite(expected).all()
    assert torch.equal(ar_video(model), expected)


@pytest.mark.skipif(not PARITY, reason="tests/data holds no *.model.safetensors")
@pytest.mark.parametrize("path", PARITY, ids=lambda path: path.name)
def test_parity_files_load_whole(path: Path, loading) -> None:
    model, info = loading.load_wan(path)
    assert info.causal_marker == "header"
    stored = comfy.utils.load_torch_file(str(path))
    loaded = model.model.diffusion_model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)


# --- dtypes and quantised files ---


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [("fp8_e4m3fn", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16)],
)
def test_weight_dtype_is_comfyuis(choice: str, dtype: torch.dtype, loading, tmp_path: Path) -> None:
    weights = tiny_wan(0)
    model, _ = loading.load_wan(LAYOUTS["krea, flat model."](tmp_path, weights, {}), weight_dtype=choice)
    assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == dtype
    assert torch.equal(run(model), run(comfyui_model(tmp_path, weights, dtype=dtype)))
    with pytest.raises(ValueError, match="weight_dtype='int3' is not known; choose one of default"):
        loading.load_wan(tmp_path / "model.safetensors", weight_dtype="int3")


def test_a_number_format_that_the_device_lacks_is_refused_before_the_file_is_read(
    pack_module, loading, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("mps"))
    path = LAYOUTS["krea, flat model."](tmp_path, tiny_wan(0), {})
    for read in (loading.load_wan, pack_module("model_patches.memory").file_facts):
        with pytest.raises(
            ValueError, match=r"weight_dtype='fp8_e5m2' is a number format that this device \(mps\) does"
        ):
            read(path, weight_dtype="fp8_e5m2")
    assert loading.loader_options("bf16") == {"dtype": torch.bfloat16}


def scaled_fp8(weights: dict) -> tuple[dict, dict]:
    """Float8 block weights and their scales: (weight key -> float8, layer -> scale)."""
    quantized, scales = dict(weights), {}
    for key, value in weights.items():
        if key.startswith("blocks.") and value.ndim == 2:
            layer = key.removesuffix(".weight")
            scales[layer] = value.abs().max() / 448
            quantized[key] = (value / scales[layer]).to(torch.float8_e4m3fn)
    return quantized, scales


def legacy_file(weights: dict) -> tuple[dict, dict]:
    quantized, scales = scaled_fp8(weights)
    extra = {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    # Two elements ask for full-precision products, which a CPU can run.
    return quantized | extra | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {"config": CONFIG}


def marked_file(weights: dict) -> tuple[dict, dict]:
    quantized, scales = scaled_fp8(weights)
    entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    mark = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    for layer, scale in scales.items():
        quantized |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": mark.clone()}
    return quantized, {"config": CONFIG}


def header_file(weights: dict) -> tuple[dict, dict]:
    quantized, scales = scaled_fp8(weights)
    quantized |= {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    layers = {layer: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True} for layer in scales}
    return quantized, {"config": CONFIG, "_quantization_metadata": json.dumps({"layers": layers})}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", [legacy_file, marked_file, header_file])
def test_fp8_files_reach_comfyui_intact(kind, prefix: str, loading, tmp_path: Path) -> None:
    tensors, metadata = kind(tiny_wan(0))
    expected = run(comfyui_model(tmp_path, tensors, metadata))
    if prefix and "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        metadata = metadata | {"_quantization_metadata": json.dumps({"layers": prefixed(layers, prefix)})}
    save_file(prefixed(tensors, prefix), tmp_path / "model.safetensors", metadata=metadata)
    model, info = loading.load_wan(tmp_path / "model.safetensors")
    assert "float8" in info.quantization
    # Not equal to the bit: another file length moves the mapped tensors, and with them the CPU's rounding.
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    exact = run(comfyui_model(tmp_path, tiny_wan(0)))
    assert (expected - exact).abs().mean() < 0.1 * exact.abs().mean()  # the scales were applied


def of_another_program(kind: torch.dtype, rows: bool) -> dict[str, torch.Tensor]:
    """Weights of blocks and their `weight_scale`, of each row or of the layer, and nothing that says so."""
    most = 127 if kind == torch.int8 else torch.finfo(kind).max
    out = dict(tiny_wan(0))
    for key, value in tiny_wan(0).items():
        if key.startswith("blocks.") and value.ndim == 2:
            scale = (value.abs().amax(1, keepdim=True) if rows else value.abs().max()) / most
            out[key] = ((value / scale).round() if kind == torch.int8 else value / scale).to(kind)
            out[f"{key}_scale"] = scale
    return out


@pytest.mark.parametrize(
    ("kind", "rows", "legacy", "error"),
    [
        (torch.int8, True, False, 0.02),
        (torch.int8, False, False, 0.02),
        (torch.float8_e4m3fn, True, False, 0.04),
        (torch.float8_e4m3fn, True, True, 0.04),
        (torch.float8_e4m3fn, False, False, 0.04),
        (torch.float8_e5m2, False, False, 0.08),
        (torch.float8_e5m2, False, True, 0.08),
    ],
)
def test_comfyui_computes_what_other_programs_quantised(
    kind: torch.dtype, rows: bool, legacy: bool, error: float, node, folders, pack_module
) -> None:
    """As LightX2V and WanVideoWrapper do. The error is that of rounding, relative to the product's size."""
    weights, tensors = tiny_wan(0), of_another_program(kind, rows)
    if legacy:
        tensors = {key.replace("weight_scale", "scale_weight"): value for key, value in tensors.items()}
        tensors["scaled_fp8"] = torch.zeros(0, dtype=kind)
    path = folders["diffusion_models"] / "self_forcing.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    model, report = node.execute(ckpt_name=path.name, **WIDGETS).args
    assert "warning" not in report
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    for layer in ("blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.1.ffn.2"):
        module = model.model.diffusion_model.get_submodule(layer)
        inputs = torch.randn(1, 64, module.in_features, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            outputs = module(inputs)
        expected = torch.nn.functional.linear(inputs, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        assert 1e-4 < (outputs - expected).norm() / expected.norm() < error
    memory = pack_module("model_patches.memory")
    facts = memory.file_facts(path).network
    assert facts == memory.network_facts(pack_module("model_patches.loading").load_wan(path)[0])


def test_attention_preferences_reach_comfyui(loading, tmp_path: Path, monkeypatch) -> None:
    """ComfyUI after 0.30 applies them; 0.30 says in its log that it does not, as with its own loader."""
    key = "blocks.0.self_attn.comfy_attention.config"
    mark = torch.tensor(list(json.dumps({"attention": "comfy_kitchen_int8"}).encode()), dtype=torch.uint8)
    save_file(tiny_wan(0) | {key: mark}, tmp_path / "model.safetensors", metadata={"config": CONFIG})
    handed, load = [], comfy.sd.load_diffusion_model_state_dict

    def count(state_dict, **options):
        handed.append(set(state_dict))
        return load(state_dict, **options)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", count)
    model, _ = loading.load_wan(tmp_path / "model.safetensors")
    assert handed == [tiny_wan().keys() | {key}]
    assert torch.equal(run(model), run(comfyui_model(tmp_path, tiny_wan(0))))


# --- LoRA ---


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_a_lora_changes_weights_by_exactly_its_product(layout: str, strength: float, loading, tmp_path: Path) -> None:
    weights = tiny_wan(0)
    model, info = loading.load_wan(LAYOUTS["comfyui, bare"](tmp_path, weights, {}))
    path, scale = write_lora(tmp_path, layout)
    patched, lora = loading.apply_lora(model, path, strength, info)
    assert len(lora.targets) == len(LORA_LAYERS)
    merged = dict(weights)
    for layer, (up, down) in lora_pairs().items():
        merged[f"{layer}.weight"] = weights[f"{layer}.weight"] + strength * scale * (up @ down)
    output = run(patched)
    loaded = patched.model.diffusion_model.state_dict()
    for key, value in merged.items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(output, run(comfyui_model(tmp_path, merged)), rtol=0, atol=1e-5)
    comfy.model_management.unload_all_models()
    assert torch.equal(run(model), run(comfyui_model(tmp_path, weights)))  # the base is as it was
    assert (run(model) - output).abs().max() > 1e-3


def test_norm_and_bias_differences_are_applied(loading, tmp_path: Path) -> None:
    weights = tiny_wan(0)
    model, info = loading.load_wan(LAYOUTS["comfyui, bare"](tmp_path, weights, {}))
    changes = {
        "diffusion_model.blocks.0.norm3.diff": ("blocks.0.norm3.weight", torch.full((128,), 0.25)),
        "diffusion_model.blocks.0.ffn.0.diff_b": ("blocks.0.ffn.0.bias", torch.full((256,), 0.5)),
    }
    save_file({key: value for key, (_, value) in changes.items()}, tmp_path / "lora.safetensors")
    patched, _ = loading.apply_lora(model, tmp_path / "lora.safetensors", 2.0, info)
    merged = dict(weights)
    for target, value in changes.values():
        merged[target] = weights[target] + 2.0 * value
    torch.testing.assert_close(run(patched), run(comfyui_model(tmp_path, merged)), rtol=0, atol=1e-5)


def test_comfyui_alone_never_applies_a_modulation_difference(tmp_path: Path) -> None:
    """Why such LoRAs are refused; when this fails, ComfyUI has learnt it and they can be allowed."""
    model = comfyui_model(tmp_path, tiny_wan(0))
    patched = model.clone()
    patch = {"diffusion_model.blocks.1.modulation": ("diff", (torch.ones(1, 6, 128),))}
    assert patched.add_patches(patch, 1.0) == list(patch)
    assert torch.equal(run(patched), run(model))


def test_a_lora_that_does_not_fit_changes_nothing(loading, tmp_path: Path) -> None:
    model, info = loading.load_wan(LAYOUTS["comfyui, bare"](tmp_path, tiny_wan(0), {}))
    save_file({"blocks.9.ffn.0.lora_A.weight": torch.zeros(4, 128)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors"):
        loading.apply_lora(model, tmp_path / "lora.safetensors", 1.0, info)
    path, _ = write_lora(tmp_path, "comfyui, no alpha")
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lora_strength=.*must be a finite number"):
            loading.apply_lora(model, path, strength, info)
    assert not model.patches


# --- the node ---


WIDGETS = {
    "weights": "auto",
    "weight_dtype": "default",
    "frames_per_chunk": 0,
    "window": 0,
    "sink": -1,
    "positions": "auto",
}


def settings_of(model):
    return model.model_options["diagonal_causal_settings"]


def test_node_lists_pickles_and_safetensors_of_both_folders(node, folders) -> None:
    for kind, name in (("diffusion_models", "a.pt"), ("checkpoints", "b.safetensors"), ("checkpoints", "c.pkl")):
        (folders[kind] / name).write_bytes(b"x")
    (folders["loras"] / "l.pt").write_bytes(b"x")
    options = {entry.id: entry for entry in node.define_schema().inputs}
    assert options["ckpt_name"].options == ["a.pt", "b.safetensors"]
    assert options["lora_name"].options == ["none", "l.pt"]


def test_every_widget_has_a_tooltip(node) -> None:
    schema = node.define_schema()
    assert schema.category == "Diagonal/loaders"
    assert all(entry.tooltip and len(entry.tooltip) > 20 for entry in schema.inputs)


def test_node_makes_a_causal_model_and_reports(node, folders, caplog) -> None:
    made = LAYOUTS["self forcing, ema and generator"](folders["diffusion_models"], tiny_wan(0), tiny_wan(1))
    made.rename(made.with_name("self_forcing_dmd.pt"))
    write_lora(folders["loras"], "longlive, generator_lora")
    with caplog.at_level(logging.WARNING):
        output = node.execute(ckpt_name="self_forcing_dmd.pt", lora_name="lora.pt", lora_strength=0.5, **WIDGETS)
    model, report = output.args
    settings = settings_of(model)
    assert (settings.frames_per_chunk, settings.window, settings.sink) == (3, 12, 3)
    assert "self_forcing_dmd.pt: Wan text-to-video" in report and "'generator_ema'" in report
    assert "lora.pt: PEFT" in report and "rank 4, strength 0.5" in report
    assert "3 latent frames a chunk (the usual; the file does not say), window 12, sink 3 (the file does not" in report
    assert "most four-step models want -1 and 0 for five seconds)" in report
    assert "warning" not in report and not [r for r in caplog.records if "model_loader" in r.name]
    assert len(model.patches) == len(LORA_LAYERS)


def test_defaults_come_from_the_file_and_a_contradiction_warns(node, folders, caplog) -> None:
    header = {"config": CONFIG, "frames_per_chunk": "1", "window": "7", "sink": "1"}
    save_file(tiny_wan(0), folders["checkpoints"] / "own.safetensors", metadata=header)
    model, report = node.execute(ckpt_name="own.safetensors", **WIDGETS).args
    settings = settings_of(model)
    assert (settings.frames_per_chunk, settings.window, settings.sink) == (1, 7, 1)
    assert "warning" not in report
    assert model.get_attachment("diagonal_provenance").window == 7
    with caplog.at_level(logging.WARNING):
        model, report = node.execute(ckpt_name="own.safetensors", **(WIDGETS | {"window": -1, "sink": 0})).args
    assert (settings_of(model).window, settings_of(model).sink) == (-1, 0)
    for sentence in (
        "window is set to -1, but the file was trained with 7",
        "sink is set to 0, but the file was trained with 1",
    ):
        assert f"warning: {sentence}" in report
        assert any(sentence in record.getMessage() for record in caplog.records)


def test_another_window_set_behind_the_loader_is_told_where_it_samples(
    node, folders, pack_module, sample_latent, prompt, empty_latent, caplog
) -> None:
    """What is set at the loader is told there, and not once more."""
    header = {"config": CONFIG, "frames_per_chunk": "3", "window": "12", "sink": "3"}
    save_file(tiny_wan(0), folders["checkpoints"] / "own.safetensors", metadata=header)
    attention = pack_module("nodes.causal_attention").DiagonalCausalAttention
    schedule = DiagonalSchedule.preset("self forcing", steps=(1,))

    def told(loader: dict[str, int], behind: tuple[int, int, int] | None, **changes: int) -> list[str]:
        model = node.execute(ckpt_name="own.safetensors", **(WIDGETS | loader)).args[0]
        if behind is not None:
            (model,) = attention.execute(model, *behind, "auto").result
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sample_latent(model, prompt(), [], empty_latent(3), replace(schedule, **changes), seed=1)
        return [line for line in caplog.messages if "trained with" in line]

    chunk, window, sink = (
        f"{name} is set to {value}, but the file was trained with {own}"
        for name, value, own in (("frames_per_chunk", 1, 3), ("window", 4, 12), ("sink", 0, 3))
    )
    assert told({}, None) == told({}, (3, 12, 3)) == []
    assert told({}, (1, 4, 0)) == [chunk, window, sink]
    assert told({"window": 6}, None) == []
    assert told({"window": 6}, (1, 6, 3)) == [chunk]
    assert told({}, (1, 12, 3), frames_per_chunk=3) == []
    assert told({}, None, frames_per_chunk=1) == [chunk]


def test_a_lora_that_says_how_it_was_trained_is_followed(node, folders) -> None:
    """Its base is of another kind, or an ordinary Wan, which nothing marks as causal."""
    base = {"window": "12", "sink": "3", "frames_per_chunk": "3", "steps_per_chunk": "4", "context_mode": "clean"}
    save_file(tiny_wan(0), folders["diffusion_models"] / "wan2.1_t2v.safetensors", metadata=base)
    provenance = Provenance(frames_per_chunk=1, steps_per_chunk=(4, 2), window=9, sink=1, context_mode="noisy")
    path, _ = write_lora(folders["loras"], "comfyui, no alpha")
    named = {"ckpt_name": "wan2.1_t2v.safetensors", "lora_name": path.name}

    def execute(strength: float):
        model, report = node.execute(**named, lora_strength=strength, **WIDGETS).args
        settings = settings_of(model)
        return (settings.frames_per_chunk, settings.window, settings.sink), model, report

    for metadata in ({}, {"recipe": "r"}, {"shift": "8.0"}):
        save_file(comfy.utils.load_torch_file(str(path)), path, metadata=metadata)
        settings, model, report = execute(1.0)
        assert settings == (3, 12, 3) and "preset: self forcing" in report
        assert model.get_attachment("diagonal_provenance").steps_per_chunk == (4,)
        assert "its header says" not in report and "warning: nothing in the file says" in report
    save_file(comfy.utils.load_torch_file(str(path)), path, metadata=provenance.to_metadata())
    settings, model, report = execute(1.0)
    assert settings == (1, 9, 1) and "preset" not in report and "warning" not in report
    assert model.get_attachment("diagonal_provenance") == provenance
    assert "strength 1; its header says how the model was trained" in report
    settings, model, _ = execute(0.0)
    assert settings == (3, 12, 3) and model.get_attachment("diagonal_provenance").window == 12
    report = node.execute(**named, lora_strength=1.0, **(WIDGETS | {"window": 12})).args[1]
    assert "warning: window is set to 12, but the file was trained with 9" in report


def test_an_unmarked_file_warns(node, folders) -> None:
    LAYOUTS["comfyui, bare without header"](folders["diffusion_models"], tiny_wan(0), {})
    _, report = node.execute(ckpt_name="model.safetensors", **WIDGETS).args
    assert "warning: nothing in the file says that it was trained causally" in report


@pytest.mark.parametrize(
    ("name", "chunk", "told"),
    [
        ("causal_forcing-framewise.safetensors", 0, True),
        ("framewise/model.pt", 0, True),
        ("causal_forcing-framewise.safetensors", 1, False),
        ("chunkwise/model.pt", 0, False),
        ("framewise/ar_diffusion.pt", 0, False),
    ],
)
def test_a_name_that_says_frame_by_frame_is_heard(node, folders, name: str, chunk: int, told: bool) -> None:
    path = folders["diffusion_models"] / name
    path.parent.mkdir(exist_ok=True)
    (torch.save if path.suffix == ".pt" else save_file)(tiny_wan(), path)
    info = node.execute(ckpt_name=name, **(WIDGETS | {"frames_per_chunk": chunk})).args[1]
    assert ("preset 'causal forcing framewise'" in info) == told
    assert ("preset 'undistilled' with frames_per_chunk 1" in info) == ("ar_diffusion" in name)
    assert ("(the usual; the file does not say)" in info) == (chunk == 0)


@pytest.mark.parametrize(
    ("widgets", "header", "told"),
    [
        ({}, {}, True),
        ({"window": 12}, {}, True),
        ({"window": 12, "sink": 3}, {}, False),
        ({}, {"window": "12", "sink": "3"}, False),
        ({"sink": 3}, {"window": "12"}, False),
    ],
)
def test_a_window_that_nothing_says_is_told(node, folders, widgets: dict, header: dict, told: bool) -> None:
    save_file(tiny_wan(), folders["diffusion_models"] / "self_forcing.safetensors", metadata=header)
    info = node.execute(ckpt_name="self_forcing.safetensors", **(WIDGETS | widgets)).args[1]
    assert ("sink 3 (the file does not say; most four-step models want -1 and 0" in info) == told


def test_the_window_of_a_preset_that_the_layout_tells_is_named(pack_module, tmp_path: Path) -> None:
    _, info = pack_module("model_patches.loading").load_wan(LAYOUTS["krea, flat model."](tmp_path, tiny_wan(), {}))
    info = replace(info, suggested_preset="krea")
    words = pack_module("nodes.model_loader")._in_words(CausalSettings(), info, chunk_known=False, window_known=False)
    assert "(the file does not say; krea: -1 and 0, or 6 and 0" in words


def test_a_lora_of_a_causal_family_is_told_in_place_of_the_doubt(node, folders) -> None:
    save_file(tiny_wan(0), folders["diffusion_models"] / "wan2.1_t2v.safetensors")
    path, _ = write_lora(folders["loras"], "comfyui, no alpha")
    path.rename(path.with_name("Wan21_CausVid_14B_T2V_lora_rank32.safetensors"))
    for strength, heard in ((1.0, True), (0.0, False)):
        lora = {"lora_name": "Wan21_CausVid_14B_T2V_lora_rank32.safetensors", "lora_strength": strength}
        report = node.execute(ckpt_name="wan2.1_t2v.safetensors", **lora, **WIDGETS).args[1]
        assert ("its name is that of a causal family: use that family's preset" in report) == heard
        assert ("warning: nothing in the file says" in report) == (not heard)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({}, True),
        ({"frames_per_chunk": "3", "window": "12"}, True),
        ({"steps_per_chunk": "4", "context_mode": "clean"}, False),
        ({"steps_per_chunk": "5,1", "context_mode": "clean"}, False),
        ({"context_mode": "clean"}, False),
    ],
)
def test_a_file_that_does_not_say_its_preset_is_told_whose_the_default_is(node, folders, header, told: bool) -> None:
    save_file(tiny_wan(0), folders["diffusion_models"] / "self_forcing.safetensors", metadata=header)
    info = node.execute(ckpt_name="self_forcing.safetensors", **WIDGETS).args[1]
    line = f"preset: the file does not say; Diagonal Schedule's default, {DEFAULT_PRESET}, is for Diagonal Dist"
    assert [each.startswith(line) for each in info.splitlines() if "default" in each] == [True] * told


def test_names_that_say_bidirectional_are_heard(node, folders) -> None:
    for kind, name in (("diffusion_models", "bidirectional_checkpoint2"), ("loras", "lightx2v_cfg_step_distill")):
        (folders[kind] / name).mkdir()
    LAYOUTS["causvid, generator"](folders["diffusion_models"] / "bidirectional_checkpoint2", tiny_wan(0), {})
    LAYOUTS["causvid, generator"](folders["diffusion_models"], tiny_wan(0), {})
    lora, _ = write_lora(folders["loras"] / "lightx2v_cfg_step_distill", "kohya, alpha 1")
    lora_name = str(lora.relative_to(folders["loras"]))
    said = "warning: its name says that it is bidirectional"
    assert said in node.execute(ckpt_name=str(Path("bidirectional_checkpoint2", "model.pt")), **WIDGETS).args[1]
    report = node.execute(ckpt_name="model.pt", lora_name=lora_name, **WIDGETS).args[1]
    assert said not in report and "warning: distillation checkpoints are usually causal" in report
    assert f"warning: {lora_name}: its name says that it was made for a bidirectional Wan" in report


@pytest.mark.parametrize(
    ("name", "marked", "words"),
    [
        ("wan2.1_t2v_1.3B_bf16", False, "nothing in the file says that it was trained causally"),
        ("lightx2v_step_distill/model", False, "its name says that it is bidirectional"),
        ("wan2.2_t2v_low_noise", True, "its name says that it is of Wan 2.2"),
        ("causal_forcing/model", False, None),
        ("causal_forcing/framewise", True, "makes one latent frame at a time: choose the preset 'causal forcing fra"),
        ("framewise/wan", False, "causally; an ordinary (bidirectional) Wan gives poor video chunk by chunk; its name"),
        ("causal_forcing/longvideo", True, "no preset fits"),
        ("wan2.1_t2v_1.3B_bf16", True, None),
    ],
)
def test_causal_attention_behind_comfyuis_loader_tells_the_loaders_doubt_where_it_samples(
    name: str, marked: bool, words: str | None, folders, pack_module, sample_latent, prompt, empty_latent, caplog
) -> None:
    path = folders["diffusion_models"] / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    header = CONFIG if marked else json.dumps({"transformer": {"text_dim": DIMS.text_dim}})
    save_file(tiny_wan(0), path, metadata={"config": header})
    model = comfy.sd.load_diffusion_model(str(path))
    (model,) = pack_module("nodes.causal_attention").DiagonalCausalAttention.execute(model, 3, 12, 3, "auto").result
    schedule = DiagonalSchedule.preset("self forcing", steps=(1,))
    with caplog.at_level(logging.WARNING):
        sample_latent(model.clone(), prompt(), [], empty_latent(3), schedule, seed=1)
    told = [line for line in caplog.messages if line.startswith(f"{path.name}: ")]
    assert len(told) == (words is not None) and all(words in line for line in told)


def test_causal_attention_of_one_frame_a_chunk_needs_no_word_on_it(folders, pack_module) -> None:
    path = folders["diffusion_models"] / "causal_forcing-framewise.safetensors"
    save_file(tiny_wan(0), path, metadata={"config": CONFIG})
    node = pack_module("nodes.causal_attention").DiagonalCausalAttention
    (model,) = node.execute(comfy.sd.load_diffusion_model(str(path)), 1, -1, 0, "auto").result
    assert model.get_attachment("diagonal_doubt") is None


def test_a_model_whose_file_is_gone_or_not_known_becomes_causal_without_doubt(pack_module, tmp_path: Path) -> None:
    model = comfyui_model(tmp_path, tiny_wan(0))
    node = pack_module("nodes.causal_attention").DiagonalCausalAttention
    for load in (model.cached_patcher_init, (comfy.sd.load_diffusion_model, ()), None):
        model.cached_patcher_init = load
        (tmp_path / "reference.safetensors").unlink(missing_ok=True)
        assert node.execute(model, 3, 12, 3, "auto").result[0].get_attachment("diagonal_doubt") is None


@pytest.mark.parametrize(
    ("channels", "words"),
    [((36, 16), "36 latent channels and gives 16.*image-to-video"), ((48, 48), "48 latent channels.*Wan 2.2 5B")],
)
def test_causal_attention_refuses_what_the_loader_refuses(channels, words: str, pack_module, tmp_path: Path) -> None:
    """ComfyUI knows both as text-to-video models, and an ordinary sampler runs them."""
    dims = replace(DIMS, in_channels=channels[0], out_channels=channels[1])
    model = comfyui_model(tmp_path, tiny_wan(0, dims), {"config": json.dumps({"transformer": {"text_dim": 64}})})
    assert model.model.diffusion_model.model_type == "t2v"
    remedy = "Load a Wan 2.1 text-to-video model, for a start image with Diagonal Context Frames."
    with pytest.raises(ValueError, match=f"The MODEL takes {words}.*{remedy}"):
        pack_module("model_patches.causal").make_causal(model, CausalSettings())


@pytest.mark.parametrize("kind", ["relative", "absolute", "missing"])
def test_a_name_is_never_a_path(kind: str, node, folders, tmp_path: Path) -> None:
    outside = LAYOUTS["comfyui, bare"](tmp_path, tiny_wan(0), {})
    name = {
        "relative": os.path.relpath(outside, folders["diffusion_models"]),
        "absolute": str(outside),
        "missing": "no.safetensors",
    }[kind]
    with pytest.raises(ValueError, match="ckpt_name=.*is not in models/diffusion_models or models/checkpoints"):
        node.execute(ckpt_name=name, **WIDGETS)
    LAYOUTS["comfyui, bare"](folders["diffusion_models"], tiny_wan(0), {})
    with pytest.raises(ValueError, match="lora_name=.*is not in models/loras"):
        node.execute(ckpt_name="model.safetensors", lora_name=name, **WIDGETS)


def test_errors_of_the_file_reach_the_user(node, folders) -> None:
    write_lora(folders["diffusion_models"], "longlive, generator_lora")
    with pytest.raises(ValueError, match="lora.pt.*is a LoRA"):
        node.execute(ckpt_name="lora.pt", **WIDGETS)
    LAYOUTS["comfyui, bare"](folders["loras"], tiny_wan(0), {})
    LAYOUTS["comfyui, bare"](folders["diffusion_models"], tiny_wan(0), {})
    with pytest.raises(ValueError, match="whole model, not a LoRA"):
        node.execute(ckpt_name="model.safetensors", lora_name="model.safetensors", **WIDGETS)
    with pytest.raises(ValueError, match="window is 4 latent frames but must hold the sink"):
        node.execute(ckpt_name="model.safetensors", **(WIDGETS | {"window": 4}))


def test_a_replaced_file_has_another_fingerprint(node, folders) -> None:
    path = LAYOUTS["comfyui, bare"](folders["diffusion_models"], tiny_wan(0), {})
    before = node.fingerprint_inputs(ckpt_name="model.safetensors", **WIDGETS)
    assert before == node.fingerprint_inputs(ckpt_name="model.safetensors", lora_name="none", **WIDGETS)
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(ckpt_name="model.safetensors", **WIDGETS) != before


@pytest.fixture
def read(loading, monkeypatch) -> list[str]:
    """Names of the weight files that were read, LoRAs apart."""
    names, load = [], loading.load_checkpoint

    def noted(path, **options):
        names.append(Path(path).name)
        return load(path, **options)

    monkeypatch.setattr(loading, "load_checkpoint", noted)
    return names


def test_other_settings_use_the_weights_that_are_held_and_do_not_read_them_again(node, folders, loading, read) -> None:
    path = LAYOUTS["comfyui, bare"](folders["diffusion_models"], tiny_wan(0), {})
    lora, _ = write_lora(folders["loras"], "comfyui, no alpha")
    named = {"ckpt_name": path.name, **WIDGETS}
    first = node.execute(**named, lora_name=lora.name, lora_strength=1.0).args[0]
    patched = run(first)  # its weights are in the shared network now
    for changes in (
        {"window": -1, "sink": 0},
        {"frames_per_chunk": 1},
        {"kv_cache_dtype": "int8"},
        {"positions": "window"},
    ):
        model, report = node.execute(**named | changes).args
        assert model.model is first.model and not model.patches
        assert report.startswith("model.safetensors: Wan text-to-video")
        assert settings_of(model) == replace(settings_of(first), **changes)
    other = node.execute(**named, lora_name=lora.name, lora_strength=0.5).args[0]
    assert read == ["model.safetensors"]
    plain, info = loading.load_wan(path)
    for found, expected in (
        (model, run(plain)),
        (other, run(loading.apply_lora(plain, lora, 0.5, info)[0])),
        (first, patched),
    ):
        assert torch.equal(run(found), expected)


def test_another_file_or_form_of_the_weights_is_read(node, folders, read) -> None:
    folder = folders["diffusion_models"]
    path = LAYOUTS["self forcing, ema and generator"](folder, tiny_wan(0), tiny_wan(1))
    named = {"ckpt_name": path.name, **WIDGETS}
    held = [node.execute(**named).args[0]]

    def reads(**changes) -> bool:
        before = len(read)
        held.append(node.execute(**named | changes).args[0])
        return len(read) > before and all(model.model is not held[-1].model for model in held[:-1])

    assert reads(weights="generator")
    assert torch.equal(held[-1].model.diffusion_model.blocks[0].ffn[0].weight, tiny_wan(1)["blocks.0.ffn.0.weight"])
    assert reads() and reads(weight_dtype="bf16") and reads()
    os.utime(path, ns=(1, 1))
    assert reads() and not reads()
    save_file(tiny_wan(2), folder / "other.safetensors")
    assert reads(ckpt_name="other.safetensors")


def test_a_model_that_nobody_holds_is_gone_and_read_again(node, folders, read) -> None:
    path = LAYOUTS["comfyui, bare"](folders["diffusion_models"], tiny_wan(0), {})
    model = node.execute(ckpt_name=path.name, **WIDGETS).args[0]
    run(model)
    clone, network = model.clone(), weakref.ref(model.model)
    del model
    gc.collect()
    assert (
        node.execute(ckpt_name=path.name, **WIDGETS).args[0].model is network() and len(read) == 1
    )  # a clone holds it
    del clone
    gc.collect()
    assert network() is None
    node.execute(ckpt_name=path.name, **WIDGETS)
    assert len(read) == 2


def test_pefts_settings_beside_a_lora_reach_the_weights_and_the_fingerprint(node, folders) -> None:
    LAYOUTS["comfyui, bare"](folders["diffusion_models"], tiny_wan(0), {})
    folder = folders["loras"] / "run"
    folder.mkdir()
    save_file(wan_files.peft(lora_pairs()), folder / "adapter_model.safetensors")
    named = {"ckpt_name": "model.safetensors", "lora_name": str(Path("run", "adapter_model.safetensors")), **WIDGETS}
    plain = node.fingerprint_inputs(**named)
    layer, (up, down) = next(iter(lora_pairs().items()))
    for alpha in (2, 12):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))
        model = node.execute(**named).args[0]
        run(model)
        changed = model.model.diffusion_model.get_submodule(layer).weight - tiny_wan(0)[f"{layer}.weight"]
        torch.testing.assert_close(changed, alpha / wan_files.LORA_RANK * (up @ down), rtol=0, atol=1e-5)
        comfy.model_management.unload_all_models()
    assert node.fingerprint_inputs(**named) != plain


def test_a_name_that_comes_by_a_link_does_not_load_the_file_at_every_queue(node, folders) -> None:
    named = {"ckpt_name": "model.safetensors", **WIDGETS}
    assert node.fingerprint_inputs(**{**named, "ckpt_name": None, "lora_name": None}) == ()
    (folders["diffusion_models"] / "model.safetensors").write_bytes(b"any")
    assert len(node.fingerprint_inputs(**{**named, "lora_name": None})) == 1
