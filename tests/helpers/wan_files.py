"""Tiny Wan checkpoints and LoRAs in every published layout, all with the same random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from diagonal_sampler.wan_layout import WanDims, expected_shapes

DIMS = WanDims(dim=128, depth=2, ffn_dim=256, text_dim=64, freq_dim=256, in_channels=16, out_channels=16)
TEXT_LEN = 16
CONFIG = json.dumps({"transformer": {"causal_ar": True, "text_dim": DIMS.text_dim, "text_len": TEXT_LEN}})


def tiny_wan(seed: int = 0, dims: WanDims = DIMS) -> dict[str, torch.Tensor]:
    """A bare state dict with small random weights; norms near 1, so that outputs are not vanishing."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(dims).items():
        values = torch.randn(shape, generator=generator) * 0.05
        weights[name] = values + 1.0 if "norm" in name and name.endswith("weight") else values
    return weights


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def wrapped(weights: dict[str, torch.Tensor], prefix: str = "model.", inner: str = "") -> dict[str, torch.Tensor]:
    """Names as a sharded training run saves them: a wrapper around the model and one around every block."""
    named = {}
    for key, value in weights.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(2, f"_fsdp_wrapped_module{inner}")
        named[f"{prefix}_fsdp_wrapped_module." + ".".join(parts)] = value
    return named


def rcm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As NVIDIA's rCM saves a network: the patch embedding as a matrix, and its trainer's counters beside it."""
    named = prefixed(weights, "net.")
    named["net.patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    return named | {"net.accum_video_sample_counter": torch.tensor(7), "net.accum_train_in_hours": torch.tensor(0.5)}


_DIFFUSERS = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "attn.o": "attn.to_out.0",
} | {f"attn.{part}": f"attn.to_{part}" for part in "qkv"}


def diffusers_name(name: str) -> str:
    """A parameter or a layer as the library diffusers names it."""
    for ours, theirs in _DIFFUSERS.items():
        if f".{ours}." in f".{name}.".replace("self_", ".").replace("cross_", "."):
            name = name.replace(ours, theirs)
            break
    return name.replace("self_attn", "attn1").replace("cross_attn", "attn2")


def _pt(tree: Callable[[dict, dict], dict]) -> Callable[[Path, dict, dict], Path]:
    def write(folder: Path, weights: dict, others: dict) -> Path:
        path = folder / "model.pt"
        torch.save(tree(weights, others), path)
        return path

    return write


def _safetensors(prefix: str = "", metadata: dict[str, str] | None = None) -> Callable[[Path, dict, dict], Path]:
    def write(folder: Path, weights: dict, others: dict) -> Path:
        path = folder / "model.safetensors"
        save_file(prefixed(weights, prefix), path, metadata=metadata)
        return path

    return write


def _legacy_pt(folder: Path, weights: dict, others: dict) -> Path:
    path = folder / "model.pth"
    torch.save({"generator": prefixed(weights, "model.")}, path, _use_new_zipfile_serialization=False)
    return path


def _ema_and_generator_safetensors(folder: Path, weights: dict, others: dict) -> Path:
    path = folder / "model.safetensors"
    save_file(prefixed(weights, "generator_ema.model.") | prefixed(others, "generator.model."), path)
    return path


# Each row of METHOD.md's table, and the shapes seen in between. `others` are different weights that must not be taken.
LAYOUTS: dict[str, Callable[[Path, dict, dict], Path]] = {
    "self forcing, ema and generator": _pt(
        lambda w, o: {"generator_ema": prefixed(w, "model."), "generator": prefixed(o, "model."), "step": 600}
    ),
    "self forcing, generator_ema": _pt(lambda w, o: {"generator_ema": prefixed(w, "model.")}),
    "causvid, generator": _pt(lambda w, o: {"generator": prefixed(w, "model.")}),
    "longlive, fsdp generator": _pt(lambda w, o: {"generator": wrapped(w)}),
    "longlive, fsdp and checkpoint wrapper": _pt(
        lambda w, o: {"generator": wrapped(w, inner="._checkpoint_wrapped_module")}
    ),
    "longlive, model": _pt(lambda w, o: {"model": wrapped(w, prefix="")}),
    "causal forcing, fsdp generator_ema": _pt(lambda w, o: {"generator_ema": wrapped(w)}),
    "rolling forcing, with critic": _pt(
        lambda w, o: {"generator_ema": w, "critic": prefixed(o, "model."), "critic_optimizer": {"state": {0: w}}}
    ),
    "streamdiffusion, state_dict": _pt(lambda w, o: {"state_dict": prefixed(w, "model.")}),
    "streamdiffusion, flat": _pt(lambda w, o: dict(w)),
    "nested state_dict of generator": _pt(lambda w, o: {"state_dict": {"generator": prefixed(w, "model.")}}),
    "causal rcm, flat net.": _pt(lambda w, o: rcm(w)),
    "torch.compile and data parallel": _pt(lambda w, o: {"generator": prefixed(w, "module.model._orig_mod.")}),
    "empty ema": _pt(lambda w, o: {"generator_ema": {}, "generator": prefixed(w, "model.")}),
    "old torch format": _legacy_pt,
    "krea, flat model.": _safetensors("model."),
    "comfyui, bare": _safetensors(metadata={"config": CONFIG}),
    "comfyui, bare without header": _safetensors(),
    "comfyui, model.diffusion_model.": _safetensors("model.diffusion_model.", {"config": CONFIG}),
    "diffusion_model.": _safetensors("diffusion_model."),
    "diffusers": lambda folder, w, o: _safetensors()(folder, {diffusers_name(k): v for k, v in w.items()}, o),
    "safetensors of both": _ema_and_generator_safetensors,
}

LORA_LAYERS = (
    "blocks.0.self_attn.q",
    "blocks.1.self_attn.o",
    "blocks.1.cross_attn.v",
    "blocks.0.ffn.0",
    "blocks.1.ffn.2",
)
LORA_RANK = 4


def lora_pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """layer -> (up [out, rank], down [rank, in])."""
    generator = torch.Generator().manual_seed(7)
    shapes = expected_shapes(DIMS)
    pairs = {}
    for layer in LORA_LAYERS:
        out_features, in_features = shapes[f"{layer}.weight"]
        up = torch.randn(out_features, LORA_RANK, generator=generator) * 0.1
        pairs[layer] = (up, torch.randn(LORA_RANK, in_features, generator=generator) * 0.1)
    return pairs


def peft(pairs: dict, prefix: str = "base_model.model.", adapter: str = "") -> dict[str, torch.Tensor]:
    named = {}
    for layer, (up, down) in pairs.items():
        named[f"{prefix}{layer}.lora_A{adapter}.weight"] = down
        named[f"{prefix}{layer}.lora_B{adapter}.weight"] = up
    return named


def up_down(pairs: dict, alpha: float | None, name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    named = {}
    for layer, (up, down) in pairs.items():
        named[f"{name(layer)}.lora_down.weight"] = down
        named[f"{name(layer)}.lora_up.weight"] = up
        if alpha is not None:
            named[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    return named


def fsdp_layer(layer: str) -> str:
    parts = layer.split(".")
    return ".".join([*parts[:2], "_fsdp_wrapped_module", *parts[2:]])


# layout -> (tensors or tree, suffix, alpha / rank)
LORA_LAYOUTS: dict[str, tuple[Callable[[dict], dict], str, float]] = {
    "longlive, generator_lora": (lambda p: {"generator_lora": peft(p)}, ".pt", 1.0),
    "longlive, fsdp infixes": (
        lambda p: {"generator_lora": peft({fsdp_layer(k): v for k, v in p.items()}, "base_model.model.model.")},
        ".pt",
        1.0,
    ),
    "peft, bare keys": (lambda p: peft(p, ""), ".pt", 1.0),
    "peft, diffusion_model.": (lambda p: peft(p, "diffusion_model."), ".safetensors", 1.0),
    "peft, default adapter": (lambda p: peft(p, "base_model.model.", ".default"), ".safetensors", 1.0),
    "comfyui, no alpha": (lambda p: up_down(p, None, lambda s: f"diffusion_model.{s}"), ".safetensors", 1.0),
    "comfyui, alpha 2": (lambda p: up_down(p, 2.0, lambda s: f"diffusion_model.{s}"), ".safetensors", 0.5),
    "diffusers, transformer.": (
        lambda p: peft({diffusers_name(k): v for k, v in p.items()}, "transformer."),
        ".safetensors",
        1.0,
    ),
    "diffsynth, pipe.dit.": (lambda p: peft(p, "pipe.dit.", ".default"), ".safetensors", 1.0),
    "kohya, alpha 1": (
        lambda p: up_down(p, 1.0, lambda s: "lora_unet_" + s.replace(".", "_")),
        ".safetensors",
        0.25,
    ),
    "wan fun, alpha 4": (
        lambda p: up_down(p, 4.0, lambda s: "lora_unet__" + s.replace(".", "_")),
        ".safetensors",
        1.0,
    ),
}


def write_lora(folder: Path, layout: str) -> tuple[Path, float]:
    """Write a LoRA in this layout; returns its path and alpha / rank."""
    tree, suffix, scale = LORA_LAYOUTS[layout]
    path = folder / f"lora{suffix}"
    content = tree(lora_pairs())
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path, scale
