"""Checkpoint and LoRA recognition without ComfyUI: every layout gives the same tensors, every defect an error."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
import wan_files
from safetensors.torch import save_file
from wan_files import DIMS, LAYOUTS, LORA_LAYOUTS, lora_pairs, peft, prefixed, tiny_wan, wrapped, write_lora

from diagonal_sampler import checkpoints, weight_files
from diagonal_sampler.checkpoints import (
    bidirectional_by_name,
    causality_warning,
    frame_by_frame,
    inspect_checkpoint,
    load_checkpoint,
    recipe_warning,
    recognise,
)
from diagonal_sampler.lora_files import convert_lora, read_lora
from diagonal_sampler.provenance import PROVENANCE_KEYS, Provenance, causal_settings
from diagonal_sampler.settings import CausalSettings
from diagonal_sampler.wan_layout import WanDims, expected_names, expected_shapes
from diagonal_sampler.weight_files import (
    MAX_NAME,
    WeightFile,
    first_line,
    is_finite,
    listed,
    read_weight_file,
    read_weight_shapes,
    short,
    write_weights,
)


def save(folder: Path, tensors: dict, metadata: dict | None = None, name: str = "model.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata=metadata)
    return folder / name


def load_lora(path: Path):
    return convert_lora(read_lora(path), expected_shapes(DIMS))


# --- layouts ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bare_tensors(layout: str, tmp_path: Path) -> None:
    weights = tiny_wan(0)
    checkpoint = load_checkpoint(LAYOUTS[layout](tmp_path, weights, tiny_wan(1)))
    assert checkpoint.state_dict.keys() == weights.keys()
    assert all(torch.equal(checkpoint.state_dict[key], weights[key]) for key in weights)
    assert checkpoint.info.dims == DIMS
    assert checkpoint.info.dims.heads == 1
    assert json.loads(checkpoint.host_metadata["config"])["transformer"]["causal_ar"] is True
    assert "dim 128, 2 blocks" in checkpoint.info.summary()


def test_weights_choice_takes_the_one_asked_for(tmp_path: Path) -> None:
    path = LAYOUTS["self forcing, ema and generator"](tmp_path, tiny_wan(0), tiny_wan(1))
    for choice, source, seed in (
        ("auto", "generator_ema", 0),
        ("ema", "generator_ema", 0),
        ("generator", "generator", 1),
    ):
        checkpoint = load_checkpoint(path, weights=choice)
        assert checkpoint.info.source == source
        assert torch.equal(checkpoint.state_dict["head.head.weight"], tiny_wan(seed)["head.head.weight"])
    assert "step" in checkpoint.info.unused
    assert f"generator_ema ({len(tiny_wan())} tensors)" in checkpoint.info.unused


def test_averaged_weights_are_preferred_however_deep_they_lie(tmp_path: Path) -> None:
    tree = {"generator": tiny_wan(1), "state_dict": {"generator_ema": tiny_wan(0), "model": tiny_wan(2)}}
    torch.save(tree, tmp_path / "model.pt")
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert checkpoint.info.source == "state_dict/generator_ema"
    assert torch.equal(checkpoint.state_dict["head.head.weight"], tiny_wan(0)["head.head.weight"])


def test_ema_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = LAYOUTS["causvid, generator"](tmp_path, tiny_wan(0), {})
    with pytest.raises(ValueError, match=r"weights='ema'.*holds only generator.*choose auto"):
        load_checkpoint(path, weights="ema")
    with pytest.raises(ValueError, match="weights='best' is not known; choose one of auto"):
        load_checkpoint(path, weights="best")


def test_causal_marker_comes_from_header_or_section(tmp_path: Path) -> None:
    weights = tiny_wan()
    marked = load_checkpoint(save(tmp_path, weights, {"config": wan_files.CONFIG})).info
    plain = load_checkpoint(save(tmp_path, weights)).info
    section = load_checkpoint(LAYOUTS["causvid, generator"](tmp_path, weights, {})).info
    both = load_checkpoint(save(tmp_path, prefixed(weights, "generator.model."), {"config": wan_files.CONFIG})).info
    markers = [info.causal_marker for info in (marked, plain, section, both)]
    assert markers == ["header", None, "section", "header"]
    assert "a distillation checkpoint, usually causal" in section.summary()
    for name, doubts in (
        ("model.pt", (None, "usually causal, but", "nothing in the file says")),
        ("Self-Forcing/self_forcing_dmd.pt", (None, None, None)),
        ("causvid/autoregressive_checkpoint/model.pt", (None, None, None)),
        ("causvid/bidirectional_checkpoint2/model.pt", (None, "its name says", "its name says")),
        ("lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill/model.pt", (None, "its name says", "its name says")),
        ("noncausal.pt", (None, "usually causal, but", "nothing in the file says")),
        ("lightx2v/LongLive/longlive_base.pt", (None, None, None)),
        ("diadistill/model.pt", (None, None, None)),
        ("diag_distill_1.3b.pt", (None, None, None)),
        ("Diagonal-Distillation/model.pt", (None, None, None)),
        ("SFWan2.1-T2V-1.3B-Diffusers/transformer/model.pt", (None, None, None)),
        ("memflow_base.pt", (None, None, None)),
    ):
        for info, doubt in zip((marked, section, plain), doubts, strict=True):
            found = causality_warning(info, name)
            assert (found is None) == (doubt is None) and (doubt or "") in (found or ""), (name, found)
    assert marked.warnings == section.warnings == plain.warnings == ()
    assert causality_warning(plain, "Wan2.1-T2V-14B/model.pt", causal_lora=True) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CausalWan2.2-I2V-A14B-Preview-Diffusers/transformer/diffusion_pytorch_model.safetensors", True),
        ("Wan2_2-T2V-A14B-causal_high_noise.safetensors", True),
        ("wan22_selfforcing.safetensors", True),
        ("self_forcing_low-noise.pt", True),
        ("SFWan2.1-T2V-1.3B.pt", False),
        ("wan_2.25_causal.pt", False),
        ("self_forcing_data14b.pt", False),
    ],
)
def test_one_of_wan_22s_two_networks_is_told_by_its_name_causal_or_not(name: str, said: bool, tmp_path: Path) -> None:
    marked = load_checkpoint(save(tmp_path, tiny_wan(), {"config": wan_files.CONFIG})).info
    plain = load_checkpoint(save(tmp_path, tiny_wan())).info
    for info in (marked, plain):
        for causal_lora in (False, True):
            found = causality_warning(info, name, causal_lora=causal_lora)
            assert ("Wan 2.2, which has two networks" in (found or "")) == said


@pytest.mark.parametrize(
    ("name", "bidirectional"),
    [
        ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", True),
        ("Self-Forcing-Plus/model.pt", True),
        ("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors", True),
        ("self-forcing-plus-plus/model.pt", False),
        ("lightx2v/Wan2.1-T2V-14B-CausVid/model.pt", False),
        ("self_forcing_dmd.pt", False),
        ("lightx2v/self_forcing_dmd_14b.safetensors", False),
        ("lightx2v/LongLive/longlive_base.pt", False),
        ("lightx2v/Wan2.1-T2V-14B/model.pt", True),
        ("lightx2v/Self-Forcing-Plus/model.pt", True),
        ("Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD_c3-3_step4.pt", False),
    ],
)
def test_a_name_may_say_that_a_model_is_bidirectional(name: str, bidirectional: bool) -> None:
    assert bidirectional_by_name(name) == bidirectional


@pytest.mark.parametrize(
    ("name", "single"), [("Causal_rCM_c1-1_step4.pt", True), ("Causal_rCM_c3-3.pt", False), ("abc1-1.pt", False)]
)
def test_a_name_may_say_frame_by_frame(name: str, single: bool) -> None:
    assert frame_by_frame(name) == single


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Causal-Forcing/chunkwise/longvideo.pt", "no preset fits"),
        ("RollingForcing/rolling_forcing_dmd.pt", "no preset fits"),
        ("rolling-forcing.pt", "no preset fits"),
        ("Causal-Forcing/framewise/ar_diffusion.pt", "preset 'undistilled' with frames_per_chunk 1"),
        ("Causal_rCM_TF_Diffusion_c1-1.pt", "preset 'undistilled' with frames_per_chunk 1"),
        ("Causal-Forcing/framewise/causal_forcing.pt", "preset 'causal forcing framewise'"),
        ("Causal-Forcing/chunkwise/ar_diffusion.pt", None),
        ("wan_longvideos.pt", None),
    ],
)
def test_a_name_may_say_how_a_model_is_sampled(name: str, said: str | None, tmp_path: Path) -> None:
    info = load_checkpoint(save(tmp_path, tiny_wan())).info
    found = recipe_warning(info, name, chunk_known=False)
    assert (found is None) == (said is None) and (said or "") in (found or "")
    known = recipe_warning(info, name, chunk_known=True)
    assert known == (found if said == "no preset fits" else None)
    stated = replace(info, suggested_preset="self forcing")
    assert "no preset fits" not in (recipe_warning(stated, name, chunk_known=True) or "")


@pytest.mark.parametrize(
    ("lora", "silent"),
    [
        ("Wan21_CausVid_14B_T2V_lora_rank32.safetensors", True),
        ("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors", False),
        ("style.safetensors", False),
        ("", False),
    ],
)
def test_a_loras_name_may_say_that_it_makes_an_ordinary_wan_causal(lora: str, silent: bool, tmp_path: Path) -> None:
    info = load_checkpoint(save(tmp_path, tiny_wan())).info
    assert (causality_warning(info, "wan2.1_t2v_14B.safetensors", lora_path=lora) is None) == silent
    assert "bidirectional" in (causality_warning(info, "lightx2v_step_distill.pt", lora_path=lora) or "")


def test_what_rcm_saves_beside_the_weights_is_named(tmp_path: Path) -> None:
    weights = tiny_wan()
    checkpoint = load_checkpoint(LAYOUTS["causal rcm, flat net."](tmp_path, weights, {}))
    assert checkpoint.info.unused == ("net.accum_video_sample_counter", "net.accum_train_in_hours")
    wide = torch.zeros(DIMS.dim, 36, 1, 2, 2)
    torch.save(wan_files.rcm(weights | {"patch_embedding.weight": wide}), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="36 in and 16 out.*image-to-video"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("prefix", ["transformer.", "pipe.dit.", "dit.", "net.transformer."])
@pytest.mark.parametrize("diffusers", [False, True])
def test_other_names_of_the_network_before_its_own_are_taken(prefix: str, diffusers: bool, tmp_path: Path) -> None:
    weights = tiny_wan()
    name = wan_files.diffusers_name if diffusers else str
    checkpoint = load_checkpoint(save(tmp_path, {prefix + name(key): value for key, value in weights.items()}))
    assert checkpoint.info.prefix == prefix and checkpoint.state_dict.keys() == weights.keys()
    assert all(torch.equal(checkpoint.state_dict[key], weights[key]) for key in weights)


@pytest.mark.parametrize("prefix", ["fake_score.", "critic.model.", "real_score.net."])
def test_a_network_under_a_strange_name_is_not_taken_for_the_model(prefix: str, tmp_path: Path) -> None:
    strange = prefixed(tiny_wan(1), prefix)
    with pytest.raises(ValueError, match=f"has Wan's names behind {prefix}, which does not say that it is the model"):
        load_checkpoint(save(tmp_path, strange))
    path = save(tmp_path, strange | prefixed(tiny_wan(0), "generator_ema.model."))
    checkpoint = load_checkpoint(path)
    assert torch.equal(checkpoint.state_dict["head.head.weight"], tiny_wan(0)["head.head.weight"])
    with pytest.raises(ValueError, match="weights='generator'.*holds only generator_ema"):
        load_checkpoint(path, weights="generator")


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (lambda w: {"ema": w}, "ema"),
        (lambda w: {"model_ema": prefixed(w, "model."), "step": torch.zeros(1)}, "model_ema"),
        (lambda w: {"student": wrapped(w), "critic": {"a": torch.zeros(2)}}, "student"),
        (lambda w: {"model": {"net": prefixed(w, "net_ema.")}}, "model/net"),
        (lambda w: {"ema": {wan_files.diffusers_name(key): value for key, value in w.items()}}, "ema"),
    ],
)
def test_a_network_in_a_dict_of_an_unknown_name_is_named(tree, path: str, tmp_path: Path) -> None:
    torch.save(tree(tiny_wan()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"its dict {path} holds a Wan network .* save it as 'generator_ema'"):
        load_checkpoint(tmp_path / "model.pt")
    torch.save(tree(tiny_wan(1)) | {"generator": tiny_wan(0)}, tmp_path / "model.pt")
    assert load_checkpoint(tmp_path / "model.pt").info.source == "generator"


def test_a_second_network_beside_the_first_is_told_by_its_prefix(tmp_path: Path) -> None:
    both = prefixed(tiny_wan(0), "net.") | prefixed(tiny_wan(1), "net_ema.")
    with pytest.raises(ValueError, match="what lies behind net_ema. is a Wan network too, .* without the prefix"):
        load_checkpoint(save(tmp_path, both))


@pytest.mark.parametrize("flow_adapter", [False, True])
def test_the_names_of_a_network_do_not_depend_on_its_sizes(flow_adapter: bool) -> None:
    dims = replace(DIMS, flow_adapter=flow_adapter)
    assert expected_names(DIMS.depth, flow_adapter=flow_adapter) == expected_shapes(dims).keys()


def test_all_in_one_file_names_the_models_it_leaves(tmp_path: Path) -> None:
    tensors = prefixed(tiny_wan(), "model.diffusion_model.") | {"vae.decoder.conv1.weight": torch.zeros(2)}
    assert load_checkpoint(save(tmp_path, tensors)).info.unused == ("vae (1 tensors)",)


@pytest.mark.parametrize(
    ("depth", "ffn_dim", "size", "warned"), [(30, 8960, "1.3B, ", False), (29, 8960, "", True), (30, 8192, "", True)]
)
def test_a_published_width_with_another_depth_or_ffn_is_said(depth: int, ffn_dim: int, size: str, warned: bool) -> None:
    dims = WanDims(dim=1536, depth=depth, ffn_dim=ffn_dim, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16)
    # As such files are: most numbers in bf16, most tensors (biases, norms) in float32.
    tensors = {
        key: torch.zeros((), dtype=torch.bfloat16 if len(shape) > 1 else torch.float32).expand(shape)
        for key, shape in expected_shapes(dims).items()
    }
    assert sum(tensor.dtype == torch.float32 for tensor in tensors.values()) > len(tensors) / 2
    marked = {"config": '{"transformer": {"causal_ar": true}}'}
    file = WeightFile(name="wan.safetensors", tree=tensors, metadata=marked)
    found = recognise(file, check_values=False).info
    assert found.dtype == "bfloat16" and f"({size}dim 1536, {depth} blocks" in found.summary()
    said = f"dim 1536 is that of Wan 2.1 1.3B (30 blocks, ffn 8960), but this file has {depth} blocks and ffn {ffn_dim}"
    assert found.warnings == ((said,) if warned else ())


# --- header ---


def test_provenance_round_trip(tmp_path: Path) -> None:
    provenance = Provenance(
        frames_per_chunk=3,
        steps_per_chunk=(4, 3, 2),
        sigmas=((1.0, 0.933, 0.733, 0.357), (1.0, 0.933, 0.357), (1.0, 0.357)),
        shift=5.0,
        context_mode="noisy",
        context_sigma=0.0,
        window=12,
        sink=3,
        recipe="demo",
        data="sprites",
        git_commit="0123abc",
    )
    assert set(provenance.to_metadata()) == set(PROVENANCE_KEYS)
    info = load_checkpoint(save(tmp_path, tiny_wan(), provenance.to_metadata())).info
    assert info.provenance == provenance
    assert info.suggested_preset == "diagonal 4-3-2"


@pytest.mark.parametrize(
    ("entries", "preset"),
    [
        ({"steps_per_chunk": "4,2", "context_mode": "noisy"}, "diagonal 4-2"),
        ({"steps_per_chunk": "[4]", "context_mode": "clean", "frames_per_chunk": "1"}, "causal forcing framewise"),
        ({"steps_per_chunk": "4,4,4", "context_mode": "clean"}, "self forcing"),
        ({"steps_per_chunk": "5,3", "context_mode": "noisy"}, None),
        ({"steps_per_chunk": "4,3,2", "context_mode": "noisy", "sigmas": "[[1.0, 0.9, 0.7, 0.2], [1.0]]"}, None),
        ({}, None),
    ],
)
def test_preset_is_suggested_only_where_all_agrees(entries: dict, preset: str | None, tmp_path: Path) -> None:
    assert load_checkpoint(save(tmp_path, tiny_wan(), entries)).info.suggested_preset == preset


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frames_per_chunk", "0"),
        ("frames_per_chunk", "three"),
        ("window", "0"),
        ("window", "-2"),
        ("sink", "-1"),
        ("shift", "0"),
        ("shift", "nan"),
        ("shift", "inf"),
        ("steps_per_chunk", "4,,2"),
        ("sigmas", "[[2.0]]"),
        ("sigmas", "[[-0.1]]"),
        ("sigmas", "[[true]]"),
        ("sigmas", "{}"),
        ("sigmas", "[" * 100_000),
        ("context_mode", "dirty"),
        ("context_sigma", "-0.1"),
        ("context_sigma", "1.5"),
        ("context_sigma", "nan"),
        ("config", "not json"),
        ("config", "[]"),
        ("config", '{"transformer": 3}'),
        ("config", '{"transformer": {"num_layers": 30}}'),
        ("config", '{"transformer": {"text_len": 0}}'),
        ("config", '{"transformer": {"text_len": true}}'),
        ("config", '{"transformer": {"eps": 0}}'),
        ("config", '{"transformer": {"eps": 1.5}}'),
        ("_quantization_metadata", "{}"),
    ],
)
def test_wrong_header_entry_names_file_and_key(key: str, value: str, tmp_path: Path) -> None:
    path = save(tmp_path, tiny_wan(), {key: value})
    with pytest.raises(ValueError, match=f"model.safetensors.*{key}"):
        load_checkpoint(path)


def test_the_host_is_told_what_the_header_says_of_the_network(tmp_path: Path) -> None:
    header = {"transformer": {"text_len": 77, "eps": 1e-5, "num_layers": DIMS.depth}}
    checkpoint = load_checkpoint(save(tmp_path, tiny_wan(), {"config": json.dumps(header)}))
    assert json.loads(checkpoint.host_metadata["config"])["transformer"] == {
        "causal_ar": True,
        "text_dim": DIMS.text_dim,
        "freq_dim": DIMS.freq_dim,
        "text_len": 77,
        "eps": 1e-5,
    }


def test_settings_follow_widget_then_file_then_default() -> None:
    provenance = Provenance(frames_per_chunk=1, window=9)
    settings, contradictions = causal_settings(provenance)
    assert settings == CausalSettings(frames_per_chunk=1, window=9)
    assert contradictions == ()
    settings, contradictions = causal_settings(provenance, frames_per_chunk=1, window=12, sink=2)
    assert (settings.window, settings.sink) == (12, 2)
    assert contradictions == ("window is set to 12, but the file was trained with 9",)


def test_steps_that_are_written_out_contradict_no_shorter_list_of_the_same() -> None:
    stated = Provenance(steps_per_chunk=(4, 4, 4))
    assert stated.contradictions(steps_per_chunk=(4,)) == ()
    assert stated.contradictions(steps_per_chunk=(4, 3)) == (
        "steps_per_chunk is set to (4, 3), but the file was trained with (4, 4, 4)",
    )


# --- quantised files ---


def legacy_fp8(weights: dict) -> dict:
    """Scaled fp8 as ComfyUI wrote it first: float8 linear weights, one scale each, a marker tensor."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in weights.items():
        if key.startswith("blocks.") and value.ndim == 2:
            scale = value.abs().max() / 448
            out[key] = (value / scale).to(torch.float8_e4m3fn)
            out[key.replace(".weight", ".scale_weight")] = scale
        else:
            out[key] = value
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_legacy_fp8_passes_through_untouched(prefix: str, tmp_path: Path) -> None:
    tensors = legacy_fp8(tiny_wan())
    checkpoint = load_checkpoint(save(tmp_path, prefixed(tensors, prefix)))
    assert checkpoint.state_dict.keys() == tensors.keys()
    assert checkpoint.info.quantization == "scaled float8 (scaled_fp8)"
    assert all(checkpoint.state_dict[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.parametrize("most", [448, 57344])
def test_legacy_e5m2_is_refused_where_comfyui_would_make_nan_of_it(most: float, tmp_path: Path) -> None:
    """Where it has no format for it."""
    tensors = legacy_fp8(tiny_wan())
    key = "blocks.0.ffn.0.weight"
    weight = tensors[key].float() * (most / 448)
    tensors[key] = (-weight if most == 448 else weight).to(torch.float8_e5m2)
    assert tensors[key].float().abs().max() == most
    path = save(tmp_path, tensors)
    known = ["float8_e4m3fn"]
    if most == 448:
        assert load_checkpoint(path, quant_formats=known).state_dict[key].dtype == torch.float8_e5m2
    else:
        with pytest.raises(ValueError, match=f"{key}': scaled float8_e5m2 beyond what ComfyUI can hold"):
            load_checkpoint(path, quant_formats=known)
    checkpoint = load_checkpoint(path, quant_formats=[*known, "float8_e5m2"])
    assert checkpoint.info.quantization == "float8_e4m3fn (19 layers), float8_e5m2 (1 layers)"
    marks = [name for name in checkpoint.state_dict if name.endswith(".comfy_quant")]
    assert len(marks) == 20 and "scaled_fp8" not in checkpoint.state_dict
    assert mark_of(checkpoint, key)["format"] == "float8_e5m2"
    assert torch.equal(checkpoint.state_dict["blocks.0.ffn.0.weight_scale"], tensors["blocks.0.ffn.0.scale_weight"])


def mark_of(checkpoint, key: str) -> dict:
    return json.loads(bytes(checkpoint.state_dict[key.replace(".weight", ".comfy_quant")].tolist()))


def of_another_program(kind: torch.dtype, rows: bool, scale_name: str = "weight_scale") -> dict[str, torch.Tensor]:
    """Weights of blocks and their scales, of each row or of the layer, and nothing that says so."""
    most = 127 if kind == torch.int8 else torch.finfo(kind).max
    out = dict(tiny_wan())
    for key, value in tiny_wan().items():
        if key.startswith("blocks.") and value.ndim == 2:
            scale = (value.abs().amax(1, keepdim=True) if rows else value.abs().max()) / most
            scaled = value / scale
            out[key] = (scaled.round() if kind == torch.int8 else scaled).to(kind)
            out[key.replace("weight", scale_name)] = scale
    return out


@pytest.mark.parametrize(
    ("kind", "rows", "scale_name", "chosen"),
    [
        (torch.int8, True, "weight_scale", "int8_tensorwise"),
        (torch.int8, False, "weight_scale", "int8_tensorwise"),
        (torch.float8_e4m3fn, False, "weight_scale", "float8_e4m3fn"),
        (torch.float8_e4m3fn, False, "scale_weight", "float8_e4m3fn"),
        (torch.float8_e5m2, False, "scale_weight", "float8_e5m2"),
    ],
)
def test_quantised_layers_of_other_programs_get_comfyuis_marks(
    kind: torch.dtype, rows: bool, scale_name: str, chosen: str, tmp_path: Path
) -> None:
    tensors, key = of_another_program(kind, rows, scale_name), "blocks.1.ffn.2.weight"
    path = save(tmp_path, prefixed(tensors, "model."))
    checkpoint = load_checkpoint(path, quant_formats=[chosen])
    assert checkpoint.info.quantization == f"{chosen} (20 layers)"
    assert mark_of(checkpoint, key)["format"] == chosen
    assert torch.equal(checkpoint.state_dict[key].view(torch.uint8), tensors[key].view(torch.uint8))
    assert torch.equal(checkpoint.state_dict["blocks.1.ffn.2.weight_scale"], tensors[key.replace("weight", scale_name)])
    assert inspect_checkpoint(path).info == checkpoint.info
    with pytest.raises(ValueError, match=f"'{chosen}' is not known to this ComfyUI .it knows nvfp4."):
        load_checkpoint(path, quant_formats=["nvfp4"])


def in_header(tensors: dict) -> dict[str, str]:
    layers = {key.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for key in tensors if "_scale" in key}
    return {"_quantization_metadata": json.dumps({"layers": layers})}


@pytest.mark.parametrize("said_by", ["nothing", "scaled_fp8", "header"])
def test_float8_with_a_scale_for_each_row_becomes_bfloat16(said_by: str, tmp_path: Path) -> None:
    """ComfyUI's kernels for NVIDIA's GPUs take one scale a layer."""
    legacy = said_by == "scaled_fp8"
    tensors = of_another_program(torch.float8_e4m3fn, True, "scale_weight" if legacy else "weight_scale")
    if legacy:
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    path = save(tmp_path, tensors, in_header(tensors) if said_by == "header" else None)
    checkpoint = load_checkpoint(path)
    assert checkpoint.info.quantization == "bfloat16, from float8 with a scale for each row (20 layers)"
    assert checkpoint.state_dict.keys() - {"scaled_fp8"} == tiny_wan().keys()
    weight = checkpoint.state_dict["blocks.1.ffn.2.weight"]
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), tiny_wan()["blocks.1.ffn.2.weight"], rtol=0.08, atol=1e-3)
    if said_by == "header":
        assert json.loads(checkpoint.host_metadata["_quantization_metadata"])["layers"] == {}
    assert inspect_checkpoint(path).info == checkpoint.info


@pytest.mark.parametrize("form", ["scaled_fp8", "header", "int8"])
def test_a_scale_that_is_not_of_the_layer_or_of_its_rows_is_refused(form: str, tmp_path: Path) -> None:
    name = "scale_weight" if form == "scaled_fp8" else "weight_scale"
    tensors = of_another_program(torch.int8 if form == "int8" else torch.float8_e4m3fn, True, name)
    metadata = None
    if form == "scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    elif form == "header":
        metadata = in_header(tensors)
    else:
        mark = json.dumps({"format": "int8_tensorwise"}).encode()
        tensors["blocks.1.ffn.2.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    tensors[f"blocks.1.ffn.2.{name}"] = tensors[f"blocks.1.ffn.2.{name}"].flatten()
    match = rf"blocks.1.ffn.2.{name}': expected one scale, or one for each row \[128, 1\], got shape \(128,\)"
    path = save(tmp_path, tensors, metadata)
    for read in (load_checkpoint, inspect_checkpoint):
        with pytest.raises(ValueError, match=f"model.safetensors', key '{match}"):
            read(path)


def test_a_scale_of_the_input_is_one_number(tmp_path: Path) -> None:
    tensors = legacy_fp8(tiny_wan()) | {"blocks.1.ffn.2.scale_input": torch.ones(2)}
    with pytest.raises(ValueError, match=r"blocks.1.ffn.2.scale_input': expected one scale, got shape \(2,\)"):
        load_checkpoint(save(tmp_path, tensors))


@pytest.mark.parametrize("marked", [False, True])
def test_scaled_float8_without_its_scale_is_refused_and_unscaled_is_not(marked: bool, tmp_path: Path) -> None:
    layer, name = "blocks.1.ffn.2", "weight_scale" if marked else "scale_weight"
    tensors = of_another_program(torch.float8_e4m3fn, False, name)
    if not marked:
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    del tensors[f"{layer}.{name}"]
    metadata = in_header(tensors) if marked else None
    with pytest.raises(ValueError, match=f"'model.safetensors', key '{layer}.weight': its values fill the range"):
        load_checkpoint(save(tmp_path, tensors, metadata))
    tensors[f"{layer}.weight"] = tiny_wan()[f"{layer}.weight"].to(torch.float8_e4m3fn)
    assert load_checkpoint(save(tmp_path, tensors, metadata)).state_dict[f"{layer}.weight"].dtype.itemsize == 1


def test_layers_that_only_another_program_can_unpack_are_refused_as_its_own(tmp_path: Path) -> None:
    tensors = tiny_wan()
    rows, columns = tensors["blocks.0.ffn.0.weight"].shape
    tensors["blocks.0.ffn.0.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    tensors["blocks.0.ffn.0.weight_scale"] = torch.zeros(rows, columns // 16).to(torch.float8_e4m3fn)
    tensors["blocks.0.ffn.0.alpha"] = tensors["blocks.0.ffn.0.input_global_scale"] = torch.ones(1)
    match = "3 are left over: blocks.0.ffn.0.alpha.*quantised for another program, such as LightX2V.*use the bf16 file"
    with pytest.raises(ValueError, match=match):
        load_checkpoint(save(tmp_path, {key: value.clone() for key, value in tensors.items()}))


def test_header_layer_names_lose_the_file_prefix(tmp_path: Path) -> None:
    layer, prefix = "blocks.0.ffn.0", "model.diffusion_model."
    tensors = tiny_wan()
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight_scale"] = torch.tensor(1.0)
    header = {"format_version": "1.0", "layers": {prefix + layer: {"format": "float8_e4m3fn"}}}
    path = save(tmp_path, prefixed(tensors, prefix), {"_quantization_metadata": json.dumps(header)})
    checkpoint = load_checkpoint(path, quant_formats=["float8_e4m3fn"])
    assert json.loads(checkpoint.host_metadata["_quantization_metadata"])["layers"] == {
        layer: {"format": "float8_e4m3fn"}
    }
    assert checkpoint.info.quantization == "float8_e4m3fn (1 layers)"
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.*float8_e4m3fn.*not known to this ComfyUI \(it knows int9\)"):
        load_checkpoint(path, quant_formats=["int9"])


def test_quantised_layer_without_its_scale_is_missing(tmp_path: Path) -> None:
    tensors = tiny_wan()
    mark = json.dumps({"format": "int8_tensorwise"}).encode()
    tensors["blocks.1.ffn.2.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    tensors["blocks.1.ffn.2.weight"] = tensors["blocks.1.ffn.2.weight"].to(torch.int8)
    with pytest.raises(ValueError, match="1 tensors are missing: blocks.1.ffn.2.weight_scale"):
        load_checkpoint(save(tmp_path, tensors))
    tensors["blocks.1.ffn.2.weight_scale"] = torch.tensor(1.0)
    assert load_checkpoint(save(tmp_path, tensors)).info.quantization == "int8_tensorwise (1 layers)"


PACKED = {
    "asym_w4a8_int8": (("weight_s_rel", "weight_s_channel"), ("weight_codebook",)),
    "awq_w4a16": (("weight_scale", "weight_zeros"), ()),
}
"""Formats of ComfyUI after 0.30 -> what its loader needs beside the weight, and what it takes."""


def in_format(name: str, layer: str = "blocks.1.ffn.2") -> dict[str, torch.Tensor]:
    """Tensors of a file with one layer in this format, two weights in a byte."""
    tensors = tiny_wan()
    rows, columns = tensors[f"{layer}.weight"].shape
    mark = json.dumps({"format": name, "group_size": 16}).encode()
    tensors[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.int8)
    tensors[f"{layer}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    required, optional = PACKED[name]
    return tensors | {f"{layer}.{part}": torch.ones(16) for part in required + optional}


@pytest.mark.parametrize("name", PACKED)
def test_a_format_has_tensors_of_its_own(name: str, tmp_path: Path) -> None:
    tensors = in_format(name)
    checkpoint = load_checkpoint(save(tmp_path, tensors), quant_formats=[name])
    assert checkpoint.state_dict.keys() == tensors.keys()
    assert checkpoint.info.dims == DIMS and checkpoint.info.quantization == f"{name} (1 layers)"
    required, optional = PACKED[name]
    for part in required + optional:
        path = save(tmp_path, {key: tensor for key, tensor in tensors.items() if not key.endswith(part)})
        if part in optional:
            load_checkpoint(path)
            continue
        with pytest.raises(ValueError, match=f"1 tensors are missing: blocks.1.ffn.2.{part}"):
            load_checkpoint(path)
    with pytest.raises(ValueError, match=f"{name}' is not known to this ComfyUI .it knows nvfp4.; update ComfyUI"):
        load_checkpoint(save(tmp_path, tensors), quant_formats=["nvfp4"])


def test_a_format_that_only_comfyui_knows_is_refused_with_the_way_round(tmp_path: Path) -> None:
    tensors = in_format("awq_w4a16")
    mark = json.dumps({"format": "int9"}).encode()
    tensors["blocks.1.ffn.2.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    match = r"model.safetensors', layer 'blocks.1.ffn.2'.*'int9' is not known to this pack .*Load Diffusion Model"
    with pytest.raises(ValueError, match=match):
        load_checkpoint(save(tmp_path, tensors), quant_formats=["int9"])


def test_what_the_legacy_marker_holds_does_not_matter(tmp_path: Path) -> None:
    nan = torch.tensor([0x7F, 0], dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = legacy_fp8(tiny_wan()) | {"scaled_fp8": nan}
    assert load_checkpoint(save(tmp_path, tensors)).info.quantization == "scaled float8 (scaled_fp8)"


def test_values_are_looked_at_only_where_there_are_any() -> None:
    """Of a file that is only inspected they are what the memory was."""
    tensors, key = legacy_fp8(tiny_wan()), "blocks.0.ffn.0.weight"
    tensors[key] = torch.full(tensors[key].shape, 57344.0).to(torch.float8_e5m2)
    file = WeightFile(name="model.safetensors", tree=tensors)
    known = ["float8_e4m3fn"]
    found = recognise(file, check_values=False, quant_formats=known)
    assert found.info.quantization == "scaled float8 (scaled_fp8)"
    with pytest.raises(ValueError, match=r"scaled float8_e5m2 beyond what ComfyUI can hold \(448\)"):
        recognise(file, quant_formats=known)


def test_a_mark_that_claims_a_terabyte_is_not_unfolded() -> None:
    giant = torch.zeros((), dtype=torch.uint8).expand(10**12)
    file = WeightFile(name="model.pt", tree=tiny_wan() | {"blocks.0.self_attn.q.comfy_quant": giant})
    with pytest.raises(ValueError, match="self_attn.q.comfy_quant.*expected JSON bytes"):
        recognise(file, check_values=False)


# --- attention preferences ---


def preference(config: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_attention_preferences_go_to_the_host_beside_the_weights(prefix: str, tmp_path: Path) -> None:
    wishes = {
        "blocks.0.self_attn.comfy_attention.config": preference({"attention": "comfy_kitchen_int8"}),
        "blocks.1.cross_attn.comfy_attention.config": preference([{"attention": "comfy_kitchen_sol", "tau": 0.75}]),
    }
    path = save(tmp_path, prefixed(tiny_wan() | wishes, prefix))
    checkpoint = load_checkpoint(path)
    assert checkpoint.state_dict.keys() == tiny_wan().keys() and checkpoint.info.quantization is None
    assert checkpoint.attention.keys() == wishes.keys()
    assert all(torch.equal(checkpoint.attention[key], wishes[key]) for key in wishes)
    assert inspect_checkpoint(path).info == checkpoint.info


@pytest.mark.parametrize(
    ("key", "tensor", "match"),
    [
        ("blocks.0.ffn.comfy_attention.config", preference({}), "1 are left over: blocks.0.ffn.comfy_attention"),
        ("blocks.0.self_attn.comfy_attention.config", torch.zeros(4, dtype=torch.uint8), "self_attn.*expected JSON"),
        ("blocks.0.self_attn.comfy_attention.config", preference(3), "self_attn.*expected JSON"),
    ],
)
def test_a_wrong_attention_preference_is_named(key: str, tensor: torch.Tensor, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.safetensors.*{match}"):
        load_checkpoint(save(tmp_path, tiny_wan() | {key: tensor}))


@pytest.mark.parametrize("layer", ["text_embedding.0", "time_embedding.0", "blocks.0.ffn.0"])
def test_weights_that_share_a_byte_count_as_two(layer: str, tmp_path: Path) -> None:
    tensors = tiny_wan()
    rows, columns = tensors[f"{layer}.weight"].shape
    tensors[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    tensors |= {f"{layer}.{name}": torch.ones(1) for name in ("weight_scale", "weight_scale_2")}
    header = {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "nvfp4"}}})}
    info = load_checkpoint(save(tmp_path, tensors, header)).info
    assert info.dims == DIMS and info.quantization == "nvfp4 (1 layers)"


# --- refusals of what a file is ---


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"vace_patch_embedding.weight": (4,)}, "Wan VACE"),
        ({"img_emb.proj.0.bias": (4,)}, "image-to-video.*for a start image with Diagonal Context Frames$"),
        ({"control_adapter.conv.weight": (4,)}, "Fun Camera"),
        ({"face_adapter.fuser_blocks.0.k_norm.weight": (4,)}, "Animate"),
        ({"patch_embedding.weight": (128, 36, 1, 2, 2)}, "36 in and 16 out.*image-to-video"),
        (
            {"patch_embedding.weight": (128, 48, 1, 2, 2), "head.head.weight": (192, 128), "head.head.bias": (192,)},
            "48 in and 48 out.*Wan 2.2 5B or LongLive 2.*for a start image with Diagonal Context Frames$",
        ),
        ({"blocks.0.self_attn.q.quantized_weight_values": (4,)}, "LongLive 2.*NVFP4"),
    ],
)
def test_variants_are_refused_by_name(extra: dict, match: str, tmp_path: Path) -> None:
    tensors = tiny_wan() | {key: torch.zeros(shape) for key, shape in extra.items()}
    with pytest.raises(ValueError, match=f"model.safetensors.*{match}"):
        load_checkpoint(save(tmp_path, tensors))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "text encoder; load it with CLIPLoader"),
        (["decoder.middle.0.residual.0.gamma"], "Wan VAE; load it with VAELoader"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion UNet"),
        (["patch_embedding.weight", "layers.0.weight"], "found 2 tensors: layers.0.weight, patch_embedding.weight"),
        ([f"layer{i}.weight" for i in range(12)], "found 12 tensors: layer0.weight, layer1.weight.* and 7 more"),
    ],
)
def test_other_files_are_refused_with_what_was_found(keys: list, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.safetensors.*not a Wan diffusion model.*{match}"):
        load_checkpoint(save(tmp_path, {key: torch.zeros(2) for key in keys}))


def test_a_part_of_a_network_is_refused_as_one(tmp_path: Path) -> None:
    names = {wan_files.diffusers_name(key): value for key, value in tiny_wan().items()}
    keys = sorted(names)
    for number, part in enumerate((keys[:20], keys[20:]), 1):
        path = save(
            tmp_path, {key: names[key] for key in part}, name=f"diffusion_model-{number:05}-of-00002.safetensors"
        )
        with pytest.raises(ValueError, match=rf"-{number:05}-of-00002.safetensors' is one of the 2 parts.*one file"):
            load_checkpoint(path)
    whole = save(tmp_path, names, name="diffusion_model-00001-of-00001.safetensors")
    assert load_checkpoint(whole).info.layout == "flat state dict, bare keys, diffusers' names"


def test_image_to_video_of_diffusers_is_refused_by_name(tmp_path: Path) -> None:
    names = {wan_files.diffusers_name(key): value for key, value in tiny_wan().items()}
    names["condition_embedder.image_embedder.norm1.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="is Wan image-to-video"):
        load_checkpoint(save(tmp_path, names))


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_lora_given_as_checkpoint(layout: str, tmp_path: Path) -> None:
    path, _ = write_lora(tmp_path, layout)
    with pytest.raises(ValueError, match=r"is a LoRA.*not a whole model.*lora_name"):
        load_checkpoint(path)


def test_pickle_without_weights_lists_what_it_has(tmp_path: Path) -> None:
    torch.save({"critic": {"a": torch.zeros(2)}, "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt.*no dict of weights; found critic, epoch"):
        load_checkpoint(tmp_path / "model.pt")


# --- every tensor accounted for ---


def test_missing_and_left_over_are_listed_by_name(tmp_path: Path) -> None:
    tensors = tiny_wan()
    del tensors["blocks.1.ffn.0.bias"]
    tensors["blocks.0.extra.weight"] = torch.zeros(2)
    with pytest.raises(
        ValueError,
        match=r"1 tensors are missing: blocks.1.ffn.0.bias; 1 are left over: blocks.0.extra.weight. Nothing was loaded",
    ):
        load_checkpoint(save(tmp_path, tensors))


@pytest.mark.parametrize("key", sorted(tiny_wan()))
def test_any_missing_tensor_is_named(key: str, tmp_path: Path) -> None:
    tensors = tiny_wan()
    del tensors[key]
    with pytest.raises(ValueError, match="model.safetensors.*missing") as error:
        load_checkpoint(save(tmp_path, tensors))
    assert key in str(error.value)


def test_a_missing_block_is_abbreviated(tmp_path: Path) -> None:
    tensors = {key: value for key, value in tiny_wan().items() if not key.startswith("blocks.0.")}
    with pytest.raises(ValueError, match="27 tensors are missing: blocks.0.cross_attn.k.bias, .* and 17 more"):
        load_checkpoint(save(tmp_path, tensors))


def test_a_huge_block_number_is_no_long_loop(tmp_path: Path) -> None:
    tensors = tiny_wan() | {"blocks.999999999.modulation": torch.zeros(1, 6, 128)}
    with pytest.raises(ValueError, match="block 999999999 but only 70 tensors"):
        load_checkpoint(save(tmp_path, tensors))
    one = torch.zeros(1)
    torch.save(tiny_wan() | {f"blocks.{block}.a": one for block in range(1001)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'model.pt' has 1001 blocks by its names"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("key", [key for key in sorted(tiny_wan()) if "blocks.1" not in key])
def test_any_wrong_shape_is_named_with_expected_and_got(key: str, tmp_path: Path) -> None:
    tensors = tiny_wan()
    tensors[key] = torch.zeros(*tensors[key].shape, 3)
    with pytest.raises(ValueError, match="expected") as error:
        load_checkpoint(save(tmp_path, tensors))
    assert key in str(error.value)
    assert str(tuple(tensors[key].shape)) in str(error.value)
    if "1 tensors do not fit" not in str(error.value):
        assert "expected 2 dimensions" in str(error.value) or "expected 5 dimensions" in str(error.value)


@pytest.mark.parametrize("width", [0, 64])
def test_a_width_that_no_wan_has_is_refused(width: int, tmp_path: Path) -> None:
    tensors = {
        key: value[..., :width] if key.endswith("modulation") or key == "patch_embedding.bias" else value
        for key, value in tiny_wan().items()
    }
    with pytest.raises(ValueError, match=f"'head.modulation': dim must be a multiple of 128.*got {width}"):
        load_checkpoint(save(tmp_path, tensors))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = tiny_wan()
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].to(torch.int8)
    with pytest.raises(ValueError, match="blocks.0.ffn.0.weight: expected a floating dtype, got int8"):
        load_checkpoint(save(tmp_path, tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_named(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {key: value.to(dtype) for key, value in tiny_wan().items()}
    tensors["blocks.1.norm3.weight"][17] = bad
    with pytest.raises(ValueError, match="NaN or Inf in 1 tensors: blocks.1.norm3.weight"):
        load_checkpoint(save(tmp_path, tensors))


def test_finite_check_samples_large_tensors_from_first_to_last() -> None:
    large = torch.zeros(weight_files.FULL_CHECK_ELEMENTS * 2 + 5)
    assert is_finite(large)
    for index in (0, -1):
        broken = large.clone()
        broken[index] = torch.nan
        assert not is_finite(broken)
    assert not is_finite(torch.full((4,), torch.nan).to(torch.float8_e4m3fn))
    assert is_finite(torch.ones(4).to(torch.float8_e4m3fn))


def test_listed_sorts_numbers_as_numbers() -> None:
    assert listed([f"b.{i}" for i in (10, 2, 1)]) == "b.1, b.2, b.10"
    assert listed([f"b.{i}" for i in range(12)]).endswith("b.9 and 2 more")


@pytest.mark.parametrize("key", [f"blocks.{'1' * 5000}.x", "a1\u00b2", "\u0661"])
def test_a_name_with_odd_numbers_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 are left over: ") as error:
        load_checkpoint(save(tmp_path, tiny_wan() | {key: torch.zeros(1)}))
    assert key[:MAX_NAME] in str(error.value)


def test_names_in_a_message_can_be_printed_and_are_cut(tmp_path: Path) -> None:
    assert listed(["\ud800x", "\x1b[31mred"]) == r"\x1b[31mred, \ud800x"
    assert listed(["k" * 5000]) == "k" * MAX_NAME + "..."
    strange, one = "blocks.0.\ud800", torch.zeros(1)
    path = tmp_path / "model.pt"
    for tensors in ({strange: one}, {"generator": tiny_wan() | {strange: one}}, {strange: 3}):
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=r"blocks\.0\.\\ud800") as error:
            load_checkpoint(path)
        str(error.value).encode()
    torch.save({"generator": tiny_wan(), strange: one}, path)
    load_checkpoint(path).info.summary().encode()
    torch.save(peft(lora_pairs()) | {strange: one}, path)
    with pytest.raises(ValueError, match=r"blocks\.0\.\\ud800") as error:
        load_lora(path)
    str(error.value).encode()


# --- damaged and foreign files ---


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_safetensors(keep: float, tmp_path: Path) -> None:
    path = save(tmp_path, tiny_wan())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="model.safetensors") as error:
        load_checkpoint(path)
    if isinstance(keep, float):
        assert "cut short: key '" in str(error.value)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"not json", "not JSON"),
        (b"[1, 2]", "JSON list"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "key 'a' has no valid data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "key 'a' has data_offsets"),
    ],
)
def test_wrong_safetensors_header(header: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=f"model.safetensors.*{match}"):
        load_checkpoint(path)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), OSError("no memory"), safetensors.SafetensorError("x")])
def test_a_reader_that_fails_is_told_with_the_file(error: Exception, tmp_path: Path) -> None:
    def read(_path: Path) -> dict:
        raise error

    match = "'model.safetensors' (cannot be read: no memory; .* a file of this size|is not a sound safetensors file: x)"
    with pytest.raises(ValueError, match=match):
        load_checkpoint(save(tmp_path, tiny_wan()), read_safetensors=read)


def test_huge_header_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="model.safetensors.*more than the format allows"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "GGUF pack's own.*DiagonalCausalAttention"),
        ("model.safetensors", b"GGUF\x03\x00\x00\x00", "GGUF"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("model.pt", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.onnx", b"\x08\x01", r"ends in '.onnx'.*reads .safetensors"),
        ("model.pt", b"", "empty"),
        ("model.pt", b"PK\x03\x04 cut", "cannot be read as a torch file"),
        ("model.pth", b"\x80\x04garbage", "model.pth"),
        ("model.pt", b"\x93NUMPY", "model.pt"),
    ],
)
def test_foreign_files(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("read", [load_checkpoint, inspect_checkpoint])
def test_a_file_under_another_kinds_name_is_told_its_own(read, tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"generator": tiny_wan()}, tmp_path / "torch.safetensors", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="torch.safetensors' is a torch file; rename it to .pt"):
            read(tmp_path / "torch.safetensors")
    for suffix in (".pt", ".bin"):
        path = save(tmp_path, tiny_wan(), name="model.safetensors").rename(tmp_path / f"model{suffix}")
        with pytest.raises(ValueError, match=f"model{suffix}' is a safetensors file; rename it to .safetensors"):
            read(path)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """80 02, as old torch files begin, is 640."""
    content = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x280)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
    assert read_weight_file(tmp_path / "a.safetensors").tree["a"].tolist() == [0]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(ValueError, match="does not exist or is not a file"):
            load_checkpoint(path)


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_payload_is_refused_and_never_runs(zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "owned", tmp_path / "model.pt"
    torch.save({"generator": _Payload(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="model.pt.*refused.*nothing of it was run") as error:
        load_checkpoint(path)
    assert not target.exists()
    assert "weights_only=False" not in str(error.value)
    torch.load(path, weights_only=False)  # the payload is live: without the guard the file appears
    assert target.exists()


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.10.0a0", "2.5.1", "1.13.1"])
def test_old_torch_refuses_pickles_but_not_safetensors(version: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    pickle_path = LAYOUTS["causvid, generator"](tmp_path, tiny_wan(), {})
    with pytest.raises(ValueError, match=f"model.pt.*torch {version.split('+')[0]}.*2.10 or newer"):
        load_checkpoint(pickle_path)
    load_checkpoint(save(tmp_path, tiny_wan()))


def test_pickle_that_is_no_dict_or_has_odd_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        load_checkpoint(path)
    torch.save({"generator": {3: torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match="key 3 is a int, not a string"):
        load_checkpoint(path)
    torch.save(tiny_wan() | {"head.modulation": torch.zeros(1, 2, 128).to_sparse()}, path)
    with pytest.raises(ValueError, match="'head.modulation': expected a dense CPU tensor"):
        load_checkpoint(path)


def test_dicts_that_share_their_insides_are_looked_at_once(tmp_path: Path) -> None:
    class Counted:
        times = 0

        def __repr__(self) -> str:
            Counted.times += 1
            return "counted"

    def shared(inside: dict) -> dict:
        for _ in range(16):
            inside = {"a": inside, "b": inside}
        return inside

    tree = shared({"t": torch.zeros(2, 3)})
    tree["loop"] = tree
    torch.save(tree, tmp_path / "model.pt")
    read = read_weight_shapes(tmp_path / "model.pt").tree
    assert read["a"] is read["b"] and read["loop"] is read
    for _ in range(16):
        read = read["b"]
    assert read["t"].shape == (2, 3)
    assert short(shared({"t": Counted()})).startswith("{'a': {'a': ") and Counted.times < 10
    assert short({"t": [Counted()]}) == "{'t': [counted]}"


def test_an_errors_first_line_is_fit_for_a_message() -> None:
    assert first_line(OSError("\n a\x1bb\nsecond")) == "a\\x1bb"
    assert first_line(ValueError("seventh"), 5) == "seven..." and first_line(ValueError("\n")) == "no details"


def test_one_dict_under_many_names_is_each_of_them_and_read_once(tmp_path: Path, monkeypatch) -> None:
    read = []
    real = checkpoints.flat_tensors
    monkeypatch.setattr(checkpoints, "flat_tensors", lambda *given: read.append(given[2]) or real(*given))
    tree = tiny_wan() | {"step": 3}
    for _ in range(4):
        tree = {name: tree for name in ("generator", "generator_ema", "model", "state_dict")}
    torch.save(tree, tmp_path / "model.pt")
    for weights, source in (("auto", "generator_ema"), ("generator", "generator")):
        info = load_checkpoint(tmp_path / "model.pt", weights=weights).info
        assert source in info.source.split("/") and len(info.unused) == 4**4
    assert len(read) == 2 * 5
    torch.save({"model": tree["model"]["model"]["model"]}, tmp_path / "model.pt")
    info = load_checkpoint(tmp_path / "model.pt", weights="generator").info
    assert info.source == "model/generator" and "model/generator/step" in info.unused


@pytest.mark.parametrize("read", [read_weight_file, read_weight_shapes])
def test_a_torch_file_that_unpacks_to_more_than_it_has_is_refused(read, tmp_path: Path) -> None:
    torch.save({"generator": tiny_wan()}, tmp_path / "sound.pt")
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(tmp_path / "sound.pt") as sound:
        records = {name: sound.read(name) for name in sound.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    for claims in (False, True):
        kind = zipfile.ZIP_STORED if claims else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", kind) as packed:
            for name, content in records.items():
                packed.writestr(name, content + bytes(0 if claims or name != pickled else 1 << 20))
            if claims:
                packed.infolist()[0].file_size = 1 << 30
        with pytest.raises(ValueError, match=r"'model.pt' is refused: it is compressed.*torch.save"):
            read(path)
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in records.items():
            packed.writestr(name, content)
    assert read(path).tree["generator"].keys() == tiny_wan().keys()


def test_wrapped_and_unwrapped_copy_of_one_tensor(tmp_path: Path) -> None:
    weights = tiny_wan()
    torch.save({"generator": weights | {"module.head.modulation": weights["head.modulation"]}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'head.modulation' is there twice"):
        load_checkpoint(tmp_path / "model.pt")


def test_unwanted_header_entries_are_not_kept(tmp_path: Path) -> None:
    file = read_weight_file(save(tmp_path, tiny_wan(), {"junk": "x" * 1000, "sink": "3"}), wanted_metadata=["sink"])
    assert dict(file.metadata) == {"sink": "3"}


# --- LoRA ---


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_every_lora_layout_gives_the_same_update(layout: str, tmp_path: Path) -> None:
    path, scale = write_lora(tmp_path, layout)
    lora = load_lora(path)
    assert set(lora.targets) == {f"{layer}.weight" for layer in lora_pairs()}
    assert lora.ranks == (wan_files.LORA_RANK,)
    for layer, (up, down) in lora_pairs().items():
        name = f"diffusion_model.{layer}"
        assert torch.equal(lora.tensors[f"{name}.lora_up.weight"], up)
        assert torch.equal(lora.tensors[f"{name}.lora_down.weight"], down)
        alpha = lora.tensors.get(f"{name}.alpha", torch.tensor(float(wan_files.LORA_RANK)))
        assert alpha.item() / wan_files.LORA_RANK == scale


def test_alpha_outside_the_tensors_is_used(tmp_path: Path) -> None:
    entry = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.r": 4})}
    lora = load_lora(save(tmp_path, peft(lora_pairs()), entry, "lora.safetensors"))
    assert lora.tensors["diffusion_model.blocks.0.ffn.0.alpha"].item() == 2
    torch.save({"generator_lora": peft(lora_pairs()), "lora_alpha": 8, "step": 3}, tmp_path / "lora.pt")
    lora = load_lora(tmp_path / "lora.pt")
    assert lora.tensors["diffusion_model.blocks.0.ffn.0.alpha"].item() == 8
    assert "step" in lora.unused
    torch.save(peft(lora_pairs()) | {"lora_alpha": torch.tensor(6)}, tmp_path / "lora.pt")
    lora = load_lora(tmp_path / "lora.pt")
    assert lora.tensors["diffusion_model.blocks.0.ffn.0.alpha"].item() == 6


def test_a_lora_says_how_it_was_trained(tmp_path: Path) -> None:
    provenance = Provenance(frames_per_chunk=1, steps_per_chunk=(4, 2), window=9, sink=1, context_mode="noisy")
    lora = load_lora(save(tmp_path, peft(lora_pairs()), provenance.to_metadata()))
    assert lora.provenance == provenance and lora.provenance.is_causal
    for entries in ({"recipe": "r", "data": "d"}, {"shift": "5.0"}, {}):
        assert not load_lora(save(tmp_path, peft(lora_pairs()), entries)).provenance.is_causal
    with pytest.raises(ValueError, match="model.safetensors.*'window'"):
        load_lora(save(tmp_path, peft(lora_pairs()), {"window": "0"}))


def with_config(folder: Path, text: str, name: str = "adapter_model.safetensors") -> Path:
    """A LoRA of rank 4 as PEFT saves it, and its settings beside it."""
    (folder / "adapter_config.json").write_text(text)
    return save(folder, peft(lora_pairs()), {"format": "pt"}, name)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": True}, 12),
        ({"lora_alpha": 2, "use_rslora": False, "alpha_pattern": {}, "layer_replication": None}, 2),
        ({"use_rslora": False, "fan_in_fan_out": False, "init_lora_weights": "gaussian"}, 8),
    ],
)
def test_pefts_settings_beside_its_adapter_are_followed(settings: dict, alpha: float, tmp_path: Path) -> None:
    text = json.dumps(settings)
    assert set(alphas(with_config(tmp_path, text)).values()) == {alpha}
    assert alphas(with_config(tmp_path, text, "other.safetensors")) == {}
    torch.save(peft(lora_pairs()), tmp_path / "adapter_model.bin")
    assert set(alphas(tmp_path / "adapter_model.bin").values()) == {alpha}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"lora_alpha": 4, "use_dora": true}', "says use_dora, but not all of its layers have a magnitude"),
        ('{"lora_alpha": 4, "fan_in_fan_out": true}', "says fan_in_fan_out True, which is not followed"),
        ('{"lora_alpha": 4, "init_lora_weights": "pissa_niter_16"}', "says init_lora_weights 'pissa_niter_16'"),
        ('{"peft_type": "LOHA"}', "says peft_type 'LOHA'"),
        ('{"lora_alpha": "much"}', "lora_alpha: expected a number"),
        ('{"lora_alpha": 4, "alpha_pattern": {"blocks.9.ffn.0": 2}}', "'blocks.9.ffn.0' is no layer"),
        ("[1]", "adapter_config.json beside it, which decides its strength, is no JSON object"),
        ("[" * 50_000, "is no JSON object"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "is no JSON object of up to 1048576 bytes"),
    ],
)
def test_pefts_settings_that_cannot_be_followed_are_refused(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"LoRA 'adapter_model.safetensors'.*{match}"):
        load_lora(with_config(tmp_path, text))


def with_settings(folder: Path, settings: dict, tensors: dict | None = None) -> Path:
    """A LoRA of rank 4 with diffusers' names and PEFT's settings in its header."""
    named = {wan_files.diffusers_name(layer): pair for layer, pair in lora_pairs().items()}
    entries = {f"transformer.{key}": value for key, value in settings.items()} | {"text_encoder.lora_alpha": 99}
    header = {"lora_adapter_metadata": json.dumps(entries)}
    return save(folder, peft(named, "transformer.") | (tensors or {}), header, "lora.safetensors")


def alphas(path: Path) -> dict[str, float]:
    tensors = load_lora(path).tensors
    ending = ".alpha"
    return {
        name.removeprefix("diffusion_model.").removesuffix(ending): value.item()
        for name, value in tensors.items()
        if name.endswith(ending)
    }


def test_a_rank_stabilised_adapter_is_divided_by_the_root_of_its_rank(tmp_path: Path) -> None:
    """ComfyUI divides by the rank, 4."""
    path = with_settings(tmp_path, {"r": 4, "lora_alpha": 6, "use_rslora": True})
    assert alphas(path) == {layer: 6 * 2 for layer in wan_files.LORA_LAYERS}
    with pytest.raises(ValueError, match="lora.safetensors' says use_rslora, but no lora_alpha"):
        load_lora(save(tmp_path, peft(lora_pairs()), {"lora_adapter_metadata": '{"use_rslora": true}'}, path.name))


def test_layers_may_have_an_alpha_of_their_own(tmp_path: Path) -> None:
    patterns = {"blocks.0.attn1.to_q": 16, "ffn.net.2": 8, "^blocks.0.ffn.net.0.proj": 5}
    path = with_settings(tmp_path, {"lora_alpha": 4, "alpha_pattern": patterns, "rank_pattern": {"attn1.to_q": 4}})
    own = {"blocks.0.self_attn.q": 16, "blocks.1.ffn.2": 8, "blocks.0.ffn.0": 5}
    assert alphas(path) == {layer: own.get(layer, 4) for layer in wan_files.LORA_LAYERS}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora_alpha": 4, "alpha_pattern": {r"blocks\.\d\.attn1\.to_q": 16}}, "alpha_pattern: .*is no layer"),
        ({"lora_alpha": 4, "alpha_pattern": {"blocks.7.attn1.to_q": 16}}, "'blocks.7.attn1.to_q' is no layer"),
        (
            {"lora_alpha": 4, "alpha_pattern": {"attn1.to_q": "many"}},
            "alpha_pattern of 'attn1.to_q': expected a number",
        ),
        ({"lora_alpha": 4, "alpha_pattern": [3]}, "alpha_pattern: expected an object"),
        ({"lora_alpha": 4, "use_dora": True}, "says use_dora, but not all of its layers have a magnitude"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_name(settings: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"LoRA 'lora.safetensors'.*{match}"):
        load_lora(with_settings(tmp_path, settings))


def test_an_alpha_that_claims_a_terabyte_is_not_unfolded(tmp_path: Path) -> None:
    torch.save(
        {"generator_lora": peft(lora_pairs()), "lora_alpha": torch.zeros(1).expand(10**12)}, tmp_path / "lora.pt"
    )
    with pytest.raises(ValueError, match=r"lora_alpha: expected a number, got 'a tensor of shape \(1000000000000,\)'"):
        load_lora(tmp_path / "lora.pt")


def test_full_differences_have_their_targets(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(128),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(256),
    }
    lora = load_lora(save(tmp_path, tensors))
    assert set(lora.targets) == {"blocks.0.norm3.weight", "blocks.0.ffn.0.bias"}


@pytest.mark.parametrize("key", ["diffusion_model.blocks.1.diff_m", "diffusion_model.blocks.1.modulation.diff"])
def test_modulation_differences_are_not_used_and_said_so(key: str, tmp_path: Path) -> None:
    """Public step-distillation LoRAs hold some; ComfyUI would take them and never apply them."""
    lora = load_lora(save(tmp_path, peft(lora_pairs()) | {key: torch.ones(1, 6, 128)}))
    assert lora.unused == (key,) and not any("modulation" in name or "diff_m" in name for name in lora.tensors)
    assert lora.summary().endswith(f"not used: {key}")


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_attention_preferences_of_a_lora_are_not_used_and_said_so(prefix: str, tmp_path: Path) -> None:
    key = f"{prefix}blocks.1.self_attn.comfy_attention.config"
    lora = load_lora(save(tmp_path, peft(lora_pairs()) | {key: preference({"attention": "comfy_kitchen_int8"})}))
    assert lora.unused == (key,) and not any("comfy_attention" in name for name in lora.tensors)
    assert lora.summary().endswith(f"not used: {key}")


def test_an_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    pairs = peft(lora_pairs())
    layer = next(iter(pairs)).removesuffix(".lora_A.weight")
    lora = load_lora(save(tmp_path, pairs | {f"{layer}.alpha": torch.tensor(2)}))
    (alpha,) = [tensor for name, tensor in lora.tensors.items() if name.endswith(".alpha")]
    assert alpha.item() == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p | {"base_model.model.blocks.7.ffn.0.lora_A.weight": torch.zeros(4, 128)}, "blocks.7.ffn.0.lora_A"),
        (lambda p: p | {"text_encoder.q.lora_A.weight": torch.zeros(4, 4)}, "1 of 11 tensors fit no parameter"),
        (lambda p: p | {"base_model.model.blocks.0.ffn.0.hada_w1_a": torch.zeros(4, 4)}, "hada_w1_a"),
        (lambda p: dict(list(p.items())[:-1]), "blocks.1.ffn.2: has down but not its other half"),
        (
            lambda p: p | {"base_model.model.blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 4)},
            r"blocks.0.ffn.0 up: expected \(256, 4\), got \(64, 4\)",
        ),
        (
            lambda p: p | {"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 1536)},
            r"blocks.0.ffn.0 down: expected \(4, 128\), got \(4, 1536\)",
        ),
        (lambda p: p | {"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.full((4, 128), torch.nan)}, "NaN"),
        (lambda p: p | {"base_model.model.blocks.0.ffn.0.alpha": torch.zeros(2)}, "alpha: expected one number"),
        (lambda p: p | {"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128)}, "has two down tensors"),
        (lambda p: peft(lora_pairs(), adapter=".a") | {"blocks.0.ffn.0.dora_scale": torch.zeros(256)}, None),
        (lambda p: {"a.weight": torch.zeros(2)}, "no low-rank tensors.*a.weight"),
        (lambda p: tiny_wan(), "whole model, not a LoRA; choose it as ckpt_name"),
    ],
)
def test_lora_that_does_not_fit_is_refused(change, match: str | None, tmp_path: Path) -> None:
    path = save(tmp_path, change(peft(lora_pairs())), name="lora.safetensors")
    if match is None:
        load_lora(path)
        return
    with pytest.raises(ValueError, match=match):
        load_lora(path)


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    pairs = lora_pairs()
    first = dict(list(pairs.items())[:2])
    second = dict(list(pairs.items())[2:])
    path = save(tmp_path, peft(first, adapter=".one") | peft(second, adapter=".two"))
    with pytest.raises(ValueError, match="several adapters.*one, two"):
        load_lora(path)


# --- writing ---


def test_weights_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path, plain = tmp_path / "model.safetensors", tmp_path / "plain"
    plain.touch()
    turned = torch.arange(6.0).view(2, 3).T
    write_weights(path, {"a": turned}, {"recipe": "r"})
    assert torch.equal(read_weight_file(path).tree["a"], turned)
    assert path.stat().st_mode == plain.stat().st_mode  # not its owner's alone
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_weights(path, {"a": turned}, {"recipe": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before and {each.name for each in tmp_path.iterdir()} == {path.name, plain.name}
