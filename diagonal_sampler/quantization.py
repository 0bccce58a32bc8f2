"""Which layers of a checkpoint are stored quantised, in the three ways that ComfyUI knows, and one that it does not.

1. Legacy scaled fp8: a tensor `scaled_fp8`, and `<layer>.scale_weight` (and `.scale_input`) beside float8 weights.
2. `<layer>.comfy_quant`: a uint8 tensor whose bytes are JSON naming the format.
3. The header entry `_quantization_metadata`: JSON, layer name -> format, names with the file's own prefix.
4. Float8 or int8 weights with a `weight_scale` or `scale_weight` and nothing that says so, as LightX2V writes them.
   Such layers get a mark (2).

The tensors go to the host as they are, but for float8 layers with a scale for each row, which become bfloat16:
ComfyUI 0.30 computes such a layer right on a CPU, and fails on NVIDIA's GPUs, whose kernels take one scale.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .wan_layout import count_blocks, linear_layers, strip_wrappers
from .weight_files import MARK_ELEMENTS, WeightFile, json_object, listed, short

QUANTIZATION_KEY = "_quantization_metadata"
LEGACY_FP8_KEY = "scaled_fp8"
_MARK = ".comfy_quant"
_LEGACY_PARAMETERS = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""Legacy name -> ComfyUI's later one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """What a layer of one format has beside its weight, as ComfyUI's loader reads it.

    required: without which the weight means nothing. optional: others of this format. packed: two weights share a
    byte, so that a stored row is half as long.
    """

    required: tuple[str, ...] = ("weight_scale",)
    optional: tuple[str, ...] = ()
    packed: bool = False


_FORMATS = {
    "float8_e4m3fn": _Format(),
    "float8_e5m2": _Format(),
    "mxfp8": _Format(),
    "int8_tensorwise": _Format(),
    "nvfp4": _Format(required=("weight_scale", "weight_scale_2"), packed=True),
    "convrot_w4a4": _Format(packed=True),
    # Not in ComfyUI 0.30.
    "asym_w4a8_int8": _Format(
        required=("weight_s_rel", "weight_s_channel"), optional=("weight_codebook", "weight_correction"), packed=True
    ),
    "awq_w4a16": _Format(required=("weight_scale", "weight_zeros"), packed=True),
}
_ANY_FORMAT = ("weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant")
"""What a layer of any format may have."""
PACKED_FORMATS = tuple(name for name, form in _FORMATS.items() if form.packed)
_FLOAT8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_SCALED = {**_FLOAT8, torch.int8: "int8_tensorwise"}
"""How weights are stored that are what they say times a scale, of the layer or of each row -> ComfyUI's format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a state dict is quantised.

    formats: bare layer name -> format name. legacy_fp8: the whole file is in the legacy scaled fp8 form.
    host_metadata: the header entry for ComfyUI with bare layer names, or None where the tensors say it all.
    unpacked: how many layers were float8 with a scale for each row, and are bfloat16 now.
    """

    formats: Mapping[str, str]
    legacy_fp8: bool
    host_metadata: str | None
    unpacked: int = 0

    def allowed(self, depth: int) -> set[str]:
        """Names that a network of `depth` blocks may have beside its own because it is quantised."""
        names = self.required()
        for layer, chosen in self.formats.items():
            names |= {f"{layer}.{parameter}" for parameter in (*_FORMATS[chosen].optional, *_ANY_FORMAT)}
        if self.legacy_fp8:
            names |= {f"{layer}.{parameter}" for layer in linear_layers(depth) for parameter in _LEGACY_PARAMETERS}
            names.add(LEGACY_FP8_KEY)
        return names

    def required(self) -> set[str]:
        """Names without which a quantised weight means nothing."""
        return {
            f"{layer}.{parameter}" for layer, chosen in self.formats.items() for parameter in _FORMATS[chosen].required
        }

    def packed(self, layer: str) -> bool:
        """Whether two weights of this layer share a byte."""
        return self.formats.get(layer) in PACKED_FORMATS

    def in_words(self) -> str | None:
        """For a person; None for a file that is not quantised."""
        parts = [f"{chosen} ({count} layers)" for chosen, count in Counter(self.formats.values()).items()]
        if self.unpacked:
            parts.append(f"bfloat16, from float8 with a scale for each row ({self.unpacked} layers)")
        return ", ".join(parts) or ("scaled float8 (scaled_fp8)" if self.legacy_fp8 else None)


def read_quantization(
    file: WeightFile,
    bare: Mapping[str, torch.Tensor],
    *,
    prefix: str,
    known_formats: Iterable[str] = (),
    companions: Iterable[str] = (),
    check_values: bool = True,
) -> tuple[dict[str, torch.Tensor], Quantization]:
    """Find the quantised layers of a bare state dict, and give it back as ComfyUI takes it.

    prefix: what was stripped from the file's names, and is stripped from the header's. known_formats: those the host
    can run; empty accepts any. companions: first name components of other models in the file, whose layers do not
    matter here. check_values: the tensors have their values, not shapes alone.

    Raises ValueError naming file and layer, or key, for a format that the host or `_FORMATS` does not know, a layer
    that Wan does not have, a scale that is none of a layer or of its rows, and float8 weights that lack theirs.
    """
    name, known = file.name, frozenset(known_formats)
    header = json_object(file, QUANTIZATION_KEY)
    possible = dict.fromkeys(sorted(linear_layers(count_blocks(bare, name))))
    bare = dict(bare) if QUANTIZATION_KEY in file.metadata else _marked(bare, possible, known)
    layers = _stated_layers(file, header, bare, prefix, companions)
    formats = _checked_formats(layers, possible, known, name)
    legacy_fp8 = LEGACY_FP8_KEY in bare and QUANTIZATION_KEY not in file.metadata
    _require_scales_fit(bare, formats, possible if legacy_fp8 else (), name)
    float8 = [layer for layer in possible if legacy_fp8 or formats.get(layer) in _FLOAT8.values()]
    if float8 and check_values:
        _require_scaled(bare, possible, name)
    unpacked = _unpack_rows(bare, float8, check_values)
    for layer in unpacked:
        formats.pop(layer, None)
        layers.pop(layer, None)
    if legacy_fp8 and check_values:
        _require_e4m3_range(bare, name)
    return bare, Quantization(
        formats=formats,
        legacy_fp8=legacy_fp8,
        host_metadata=json.dumps(header | {"layers": layers}) if QUANTIZATION_KEY in file.metadata else None,
        unpacked=len(unpacked),
    )


def _stated_layers(
    file: WeightFile,
    header: Mapping[str, Any],
    bare: Mapping[str, torch.Tensor],
    prefix: str,
    companions: Iterable[str],
) -> dict[str, Any]:
    """Bare layer name -> what the file says of how it is stored: its header first, then its marks.

    header: the entry QUANTIZATION_KEY, {} without one. The others are read_quantization's own, and so are the errors.
    """
    layers: dict[str, Any] = {}
    if QUANTIZATION_KEY in file.metadata:
        entries = header.get("layers")
        if not isinstance(entries, dict):
            raise ValueError(
                f"weight file {file.name!r}, header key {QUANTIZATION_KEY!r}: 'layers' must be an object, got "
                f"{short(entries)}; download the file again"
            )
        own = {strip_wrappers(layer): entry for layer, entry in entries.items()}
        layers = {
            layer.removeprefix(prefix): entry
            for layer, entry in own.items()
            if layer.split(".", 1)[0] not in companions
        }
    for key in bare:
        if key.endswith(_MARK):
            layers.setdefault(key.removesuffix(_MARK), read_mark(bare[key], key, file.name))
    return layers


def _checked_formats(
    layers: Mapping[str, Any], possible: Mapping[str, None], known: frozenset[str], name: str
) -> dict[str, str]:
    """Layer -> format name. possible: the layers that the network has. known: as `read_quantization`'s; its errors."""
    formats = {}
    for layer, entry in layers.items():
        chosen = entry.get("format") if isinstance(entry, dict) else None
        if not isinstance(chosen, str) or (known and chosen not in known):
            raise ValueError(
                f"weight file {name!r}, layer {layer!r}: quantisation format {short(chosen)} is not known to this "
                f"ComfyUI (it knows {listed(known) or 'none'}); update ComfyUI or use a bf16 or fp8 file"
            )
        if chosen not in _FORMATS:
            raise ValueError(
                f"weight file {name!r}, layer {layer!r}: quantisation format {short(chosen)} is not known to this pack "
                f"(it knows {listed(_FORMATS)}); load the file with Load Diffusion Model, with Diagonal Causal "
                "Attention after it, or use a bf16 or fp8 file"
            )
        if layer not in possible:
            raise ValueError(
                f"weight file {name!r}, layer {layer!r}: marked as quantised, but this Wan network has no such linear "
                "layer; use a bf16 file"
            )
        formats[layer] = chosen
    return formats


def _marked(
    bare: Mapping[str, torch.Tensor], possible: Iterable[str], known: frozenset[str]
) -> dict[str, torch.Tensor]:
    """A bare state dict with a mark on each layer whose weight has a scale and nothing says so.

    Of legacy files only those in float8_e5m2, which ComfyUI would cast to e4m3, where it knows (`known`) that format.
    """
    scaled = [layer for layer in possible if f"{layer}.weight" in bare and _scale_key(bare, layer) in bare]
    legacy = LEGACY_FP8_KEY in bare
    e5m2 = any(bare[f"{layer}.weight"].dtype == torch.float8_e5m2 for layer in scaled)
    host_reads_e5m2 = not known or "float8_e5m2" in known
    if any(key.endswith(_MARK) for key in bare) or (legacy and not (e5m2 and host_reads_e5m2)):
        return dict(bare)
    marked = {key: tensor for key, tensor in bare.items() if key != LEGACY_FP8_KEY}
    for layer in scaled:
        weight, scale = bare[f"{layer}.weight"], bare[_scale_key(bare, layer)]
        chosen = _SCALED.get(weight.dtype)
        if chosen is None or not scale.dtype.is_floating_point or not _fits(scale, weight):
            continue
        for old, new in _LEGACY_PARAMETERS.items():
            if f"{layer}.{old}" in marked:
                marked[f"{layer}.{new}"] = marked.pop(f"{layer}.{old}")
        entry = {"format": chosen}
        if weight.dtype in _FLOAT8:
            entry["full_precision_matrix_mult"] = True
        marked[layer + _MARK] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    return marked


def _scale_key(bare: Mapping[str, torch.Tensor], layer: str) -> str:
    """The name of a layer's scale, by its later name if it has one of that."""
    later = f"{layer}.weight_scale"
    return later if later in bare else f"{layer}.scale_weight"


def _fits(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a scale is one number, or one for each row of a weight [out, in]: [out, 1]."""
    return scale.numel() == 1 or (weight.ndim == 2 and tuple(scale.shape) == (weight.shape[0], 1))


def _require_scales_fit(
    bare: Mapping[str, torch.Tensor], formats: Mapping[str, str], legacy: Iterable[str], name: str
) -> None:
    """Raise ValueError for a scale that ComfyUI would broadcast over the wrong axis, or fail on while it samples.

    legacy: the layers whose scales have their legacy names.
    """
    layers = [layer for layer, chosen in formats.items() if chosen in _SCALED.values()]
    keys = {f"{layer}.weight_scale": layer for layer in layers} | {f"{layer}.scale_weight": layer for layer in legacy}
    inputs = [f"{layer}.input_scale" for layer in layers] + [f"{layer}.scale_input" for layer in legacy]
    for key, layer in keys.items():
        scale, weight = bare.get(key), bare.get(f"{layer}.weight")
        if scale is None or weight is None or weight.ndim != 2 or _fits(scale, weight):
            continue
        raise ValueError(
            f"weight file {name!r}, key {key!r}: expected one scale, or one for each row [{weight.shape[0]}, 1], got "
            f"shape {tuple(scale.shape)}; use a file quantised for ComfyUI, or a bf16 file"
        )
    for key in inputs:
        if key in bare and bare[key].numel() != 1:
            raise ValueError(
                f"weight file {name!r}, key {key!r}: expected one scale, got shape {tuple(bare[key].shape)}; use a "
                "file quantised for ComfyUI, or a bf16 file"
            )


def _unpack_rows(bare: dict[str, torch.Tensor], layers: Iterable[str], values: bool) -> list[str]:
    """Replace float8 weights that have a scale for each row by their product in bfloat16; returns the layers.

    Without values the products have none either.
    """
    unpacked = []
    for layer in layers:
        weight, scale = bare.get(f"{layer}.weight"), bare.get(_scale_key(bare, layer))
        if weight is None or scale is None or weight.ndim != 2 or weight.dtype not in _FLOAT8 or scale.numel() == 1:
            continue
        if values:
            bare[f"{layer}.weight"] = (weight.float() * scale.float()).to(torch.bfloat16)
        else:
            bare[f"{layer}.weight"] = torch.empty((), dtype=torch.bfloat16).expand(weight.shape)
        for parameter in (*_LEGACY_PARAMETERS, *_LEGACY_PARAMETERS.values(), _MARK.removeprefix(".")):
            bare.pop(f"{layer}.{parameter}", None)
        unpacked.append(layer)
    return unpacked


def _require_scaled(bare: Mapping[str, torch.Tensor], possible: Iterable[str], name: str) -> None:
    """Raise ValueError for a float8 weight that was divided by a scale, and has none.

    Published files have some that were not, beside others that were: their values are a network's, nowhere near a
    format's end.
    """
    for layer in possible:
        key = f"{layer}.weight"
        if key not in bare or f"{layer}.scale_weight" in bare or f"{layer}.weight_scale" in bare:
            continue
        if bare[key].dtype in _FLOAT8 and _most_bits(bare[key]) >= _BITS_OF_224[bare[key].dtype]:
            raise ValueError(
                f"weight file {name!r}, key {key!r}: its values fill the range of float8, and the scale that they are "
                f"to be multiplied by ('{layer}.scale_weight') is missing; download the file again, or use a bf16 file"
            )


def _require_e4m3_range(bare: Mapping[str, torch.Tensor], name: str) -> None:
    """ComfyUI casts the weights of a `scaled_fp8` file to float8_e4m3fn, whatever they are: beyond 448 that is NaN."""
    for key, tensor in bare.items():
        if tensor.dtype == torch.float8_e5m2 and _most_bits(tensor) > _E5M2_BITS_OF_448:
            raise ValueError(
                f"weight file {name!r}, key {key!r}: scaled float8_e5m2 beyond what ComfyUI can hold (448), which "
                "would become NaN; use an e4m3 or bf16 file"
            )


def _most_bits(tensor: torch.Tensor) -> int:
    """The bits of the largest number of a float8 tensor, signs apart: they rise with it. 0 for an empty one."""
    return int((tensor.view(torch.uint8) & 0x7F).max()) if tensor.numel() else 0


_E5M2_BITS_OF_448 = 0x5F
_BITS_OF_224 = {torch.float8_e4m3fn: 0x76, torch.float8_e5m2: 0x5B}
"""Half of the largest e4m3 number, for either format."""


def read_mark(tensor: torch.Tensor, key: str, name: str, kinds: tuple[type, ...] = (dict,)) -> Any:
    """The JSON, one of `kinds`, that a tensor of ComfyUI's holds as bytes. key, name: its own and its file's, for the
    error.

    Raises ValueError for anything else.
    """
    entry = None
    if tensor.numel() <= MARK_ELEMENTS:  # one that only claims its size would be unfolded here
        try:
            entry = json.loads(bytes(tensor.flatten().tolist()))
        except (ValueError, TypeError, RecursionError):
            entry = None
    if not isinstance(entry, kinds):
        raise ValueError(
            f"weight file {name!r}, key {key!r}: expected JSON bytes, got something else; download it again"
        )
    return entry
