"""Which layers of a checkpoint are stored quantised, in the three ways that ComfyUI knows.

1. Legacy scaled fp8: a tensor `scaled_fp8`, and `<layer>.scale_weight` (and `.scale_input`) beside float8 weights.
2. `<layer>.comfy_quant`: a uint8 tensor whose bytes are JSON naming the format.
3. The header entry `_quantization_metadata`: JSON, layer name -> format, names with the file's own prefix.

Nothing is dequantised here: the tensors go to the host as they are.
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
_LEGACY_PARAMETERS = ("scale_weight", "scale_input")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a state dict is quantised.

    formats: bare layer name -> format name. legacy_fp8: the whole file is in the legacy scaled fp8 form.
    host_metadata: the header entry for ComfyUI with bare layer names, or None where the tensors say it all.
    """

    formats: Mapping[str, str]
    legacy_fp8: bool
    host_metadata: str | None

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
        if self.formats:
            counts = Counter(self.formats.values())
            return ", ".join(f"{chosen} ({count} layers)" for chosen, count in counts.items())
        return "scaled float8 (scaled_fp8)" if self.legacy_fp8 else None


def read_quantization(
    file: WeightFile,
    bare: Mapping[str, torch.Tensor],
    *,
    prefix: str,
    known_formats: Iterable[str] = (),
    companions: Iterable[str] = (),
    check_values: bool = True,
) -> Quantization:
    """Find the quantised layers of a bare state dict.

    prefix: what was stripped from the file's names, and is stripped from the header's. known_formats: those the host
    can run; empty accepts any. companions: first name components of other models in the file, whose layers do not
    matter here. check_values: the tensors have their values, not shapes alone.

    Raises ValueError naming file and layer for a format that the host or `_FORMATS` does not know, or a layer that Wan
    does not have.
    """
    name, known = file.name, frozenset(known_formats)
    layers: dict[str, Any] = {}
    host_metadata = None
    if QUANTIZATION_KEY in file.metadata:
        header = json_object(file, QUANTIZATION_KEY)
        entries = header.get("layers")
        if not isinstance(entries, dict):
            raise ValueError(
                f"weight file {name!r}, header key {QUANTIZATION_KEY!r}: 'layers' must be an object, got "
                f"{short(entries)}; download the file again"
            )
        own = {strip_wrappers(layer): entry for layer, entry in entries.items()}
        layers = {
            layer.removeprefix(prefix): entry
            for layer, entry in own.items()
            if layer.split(".", 1)[0] not in companions
        }
        host_metadata = json.dumps(header | {"layers": layers})
    for key in bare:
        if key.endswith(_MARK):
            layers.setdefault(key.removesuffix(_MARK), read_mark(bare[key], key, name))
    possible = linear_layers(count_blocks(bare, name))
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
    legacy_fp8 = LEGACY_FP8_KEY in bare and QUANTIZATION_KEY not in file.metadata
    if legacy_fp8 and check_values:
        _require_e4m3_range(bare, name)
    return Quantization(formats=formats, legacy_fp8=legacy_fp8, host_metadata=host_metadata)


def _require_e4m3_range(bare: Mapping[str, torch.Tensor], name: str) -> None:
    """ComfyUI casts the weights of a `scaled_fp8` file to float8_e4m3fn, whatever they are: beyond 448 that is NaN."""
    for key, tensor in bare.items():
        # The bits of a positive number rise with it.
        if tensor.dtype == torch.float8_e5m2 and (tensor.view(torch.uint8) & 0x7F).max() > _E5M2_BITS_OF_448:
            raise ValueError(
                f"weight file {name!r}, key {key!r}: scaled float8_e5m2 beyond what ComfyUI can hold (448), which "
                "would become NaN; use an e4m3 or bf16 file"
            )


_E5M2_BITS_OF_448 = 0x5F


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
