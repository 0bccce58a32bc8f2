"""Recognise a Wan LoRA in the PEFT, diffusers, ComfyUI or kohya layout and rename it to ComfyUI's, every tensor
accounted for.

A low-rank adapter changes a weight W [out, in] to W + strength * alpha / rank * up @ down, with up [out,
rank] (PEFT: lora_B) and down [rank, in] (PEFT: lora_A). Without an alpha, alpha is the rank, as in the
published files. Rank-stabilised adapters (PEFT: use_rslora) divide by the root of the rank; ComfyUI divides by
the rank, and so is given alpha * sqrt(rank).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .provenance import PROVENANCE_KEYS, Provenance
from .wan_layout import from_diffusers, strip_wrappers
from .weight_files import WeightFile, flat_tensors, is_finite, listed, read_weight_file, refuse_inflated, short

LORA_SECTIONS = ("generator_lora", "lora", "state_dict")
"""Dicts that may hold the adapter, best first; a critic's adapter is never one of them."""
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "pipe.dit.", "generator.", "model.")
"""What trainers and converters put before a layer's name, in any order."""
KOHYA_PREFIX = "lora_unet_"
HOST_PREFIX = "diffusion_model."

ALPHA_KEY = "lora_alpha"
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
RANK_STABILISED, ALPHA_PATTERN, DORA = "use_rslora", "alpha_pattern", "use_dora"
"""Of PEFT's adapter settings those that change the scale. A `rank_pattern` is what the tensors' own shapes say."""
_SETTINGS = (ALPHA_KEY, RANK_STABILISED, ALPHA_PATTERN, DORA, "rank_pattern", "r")
WANTED_METADATA = (ALPHA_KEY, ADAPTER_METADATA_KEY, *PROVENANCE_KEYS)

PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"
"""PEFT saves an adapter as the one, with any suffix, and its settings beside it as the other."""
_MAX_CONFIG_BYTES = 1 << 20
_PEFT_ALPHA = 8
"""PEFT's own, where its settings name none."""
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")
"""Ways to begin (`init_lora_weights`) that take something out of the base's weights: such an adapter builds on that."""
_ONLY_OFF = ("fan_in_fan_out", "layer_replication", "use_qalora")
"""Settings that change what an adapter does to a weight in ways that are not followed here."""

_KINDS = (
    ("down", re.compile(r"\.lora_A(?:\.(?P<adapter>(?!weight$)[\w-]+))?(?:\.weight)?$"), "PEFT"),
    ("up", re.compile(r"\.lora_B(?:\.(?P<adapter>(?!weight$)[\w-]+))?(?:\.weight)?$"), "PEFT"),
    ("down", re.compile(r"(?:\.lora_down|[._]lora\.down)\.weight$"), "ComfyUI"),
    ("up", re.compile(r"(?:\.lora_up|[._]lora\.up)\.weight$"), "ComfyUI"),
    ("alpha", re.compile(r"\.alpha$"), None),
    ("dora_scale", re.compile(r"\.dora_scale$"), None),
    ("diff", re.compile(r"\.diff$"), None),
    ("diff_b", re.compile(r"\.diff_b$"), None),
)
"""Part of an adapter -> the ending that names it, and the layout this ending gives away."""

# Not used: ComfyUI 0.30 takes a patch on a modulation without a word and never applies it, since it patches only
# modules that have no modules inside.
_MODULATION_ENDINGS = (".diff_m", ".modulation.diff")
# Not used: which attention a layer prefers, no change of a weight. ComfyUI 0.30 skips it as a key it does not know.
_ATTENTION_ENDING = ".comfy_attention.config"

_HOST_ENDINGS = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "diff": "diff",
    "diff_b": "diff_b",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """An adapter under ComfyUI's names.

    tensors: `diffusion_model.<layer>.lora_up.weight` and so on -> tensor. targets: the bare names of the
    parameters that change. ranks: the ranks in use, ascending. unused: what else the file holds, not applied.
    provenance: how it was trained, as its header says.
    """

    file: str
    layout: str
    tensors: dict[str, torch.Tensor]
    targets: tuple[str, ...]
    ranks: tuple[int, ...]
    unused: tuple[str, ...]
    provenance: Provenance

    def summary(self) -> str:
        """One line for a person."""
        ranks = f"rank {'/'.join(map(str, self.ranks))}" if self.ranks else "full differences"
        unused = f"; not used: {listed(self.unused)}" if self.unused else ""
        return f"{self.file}: {self.layout} LoRA on {len(self.targets)} parameters, {ranks}{unused}"


def peft_config(path: str | Path) -> Path | None:
    """The file in which PEFT keeps the settings of an adapter that it saved; None where there is none."""
    path = Path(path)
    config = path.with_name(PEFT_CONFIG)
    return config if path.stem == PEFT_STEM and config.is_file() else None


def read_lora(
    path: str | Path, *, read_safetensors: Callable[[Path], Mapping[str, torch.Tensor]] | None = None
) -> WeightFile:
    """Read an adapter's file for `convert_lora`, and PEFT's settings beside it; see `read_weight_file`.

    Raises ValueError as that does, and for settings that cannot be read.
    """
    file = read_weight_file(path, wanted_metadata=WANTED_METADATA, read_safetensors=read_safetensors)
    config = peft_config(path)
    if config is None:
        return file
    try:
        with config.open("rb") as opened:
            text = opened.read(_MAX_CONFIG_BYTES + 1)
        settings = json.loads(text) if len(text) <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"LoRA {file.name!r}: {PEFT_CONFIG} beside it, which decides its strength, is no JSON object of up to "
            f"{_MAX_CONFIG_BYTES} bytes that can be read; copy it again"
        )
    return replace(file, metadata={**file.metadata, PEFT_CONFIG: json.dumps(settings)})


def convert_lora(file: WeightFile, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Rename an adapter's tensors to ComfyUI's names.

    shapes: the base network, bare parameter name -> shape (`expected_shapes`).

    Raises ValueError naming the file and the keys: no adapter, keys that fit no parameter of the base, half a
    pair, a wrong shape or dtype, NaN or Inf.
    """
    name = file.name
    section, tensors, unused = _choose_section(file)
    scaling = _scaling(file)
    kohya = {
        parameter.removesuffix(".weight").replace(".", "_"): parameter.removesuffix(".weight") for parameter in shapes
    }
    parts: dict[str, dict[str, torch.Tensor]] = {}
    names: dict[str, str] = {}  # bare layer -> as the file names it
    layouts: set[str] = set()
    adapters: set[str | None] = set()
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        if key.endswith((*_MODULATION_ENDINGS, _ATTENTION_ENDING)):
            unused.append(key)
            continue
        found = _parse_key(key, kohya)
        if found is None or _target(found[0], found[1]) not in shapes:
            unmatched.append(key)
            continue
        layer, kind, layout, adapter, names[found[0]] = found
        if kind in parts.setdefault(layer, {}):
            raise ValueError(f"LoRA {name!r}, key {key!r}: layer {layer!r} has two {kind} tensors; keep one adapter")
        parts[layer][kind] = tensor
        if layout is not None:
            layouts.add(layout)
        if kind in ("up", "down"):
            adapters.add(adapter)
    if not parts:
        raise ValueError(_no_lora(name, tensors))
    if unmatched:
        raise ValueError(
            f"LoRA {name!r}: {len(unmatched)} of {len(tensors)} tensors fit no parameter that ComfyUI can patch: "
            f"{listed(unmatched)}. Nothing was applied; "
            "use a LoRA made for this model, or ComfyUI's LoraLoaderModelOnly, which skips what it does not know"
        )
    if len(adapters) > 1:
        raise ValueError(
            f"LoRA {name!r} holds several adapters ({listed(str(adapter) for adapter in adapters)}); save one per file"
        )
    problems = [problem for layer, found in parts.items() for problem in _check_layer(layer, found, shapes)]
    if problems:
        raise ValueError(
            f"LoRA {name!r} does not fit this model: {listed(problems)}. Nothing was applied; use a LoRA "
            "made for this model"
        )
    if scaling.dora and not all("dora_scale" in found for found in parts.values() if "up" in found):
        raise ValueError(
            f"LoRA {name!r} says {DORA}, but not all of its layers have a magnitude (dora_scale). Nothing was applied; "
            "use a version merged into plain low-rank tensors"
        )
    return _renamed(file, section, parts, layouts, scaling.alphas(parts, names, name), unused)


def _renamed(
    file: WeightFile,
    section: str,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    layouts: set[str],
    alphas: Mapping[str, float],
    unused: list[str],
) -> Lora:
    tensors: dict[str, torch.Tensor] = {}
    targets: list[str] = []
    for layer, found in parts.items():
        for kind, tensor in found.items():
            tensors[f"{HOST_PREFIX}{layer}.{_HOST_ENDINGS[kind]}"] = tensor
            if kind not in ("down", "alpha", "dora_scale"):
                targets.append(_target(layer, kind))
        if layer in alphas:
            tensors[f"{HOST_PREFIX}{layer}.alpha"] = torch.tensor(alphas[layer])
    ranks = sorted({found["down"].shape[0] for found in parts.values() if "down" in found})
    layout = " and ".join(sorted(layouts)) or "ComfyUI"
    return Lora(
        file=file.name,
        layout=layout + (f" (dict {section!r})" if section else ""),
        tensors=tensors,
        targets=tuple(dict.fromkeys(targets)),
        ranks=tuple(ranks),
        unused=tuple(unused),
        provenance=Provenance.from_metadata(file.metadata, file.name),
    )


def _choose_section(file: WeightFile) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """The dict of adapter tensors, its name ("" for the file itself) and what stays unused."""
    tree, section = file.tree, ""
    for candidate in LORA_SECTIONS:
        if isinstance(tree.get(candidate), Mapping):
            tree, section = tree[candidate], candidate
            break
    tensors, others = flat_tensors(_with_number_alphas(tree), file.name, f"dict {section or 'flat'!r}")
    if not section:
        tensors.pop(ALPHA_KEY, None)  # a setting, which `_scaling` reads
    refuse_inflated(tensors, file.name)
    beside = [str(key) for key in file.tree if section and key != section]
    return section, tensors, [key for key in others if key not in _SETTINGS] + beside


def _with_number_alphas(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A pickle may hold a layer's alpha as a plain number: make it a tensor like the others."""
    return {
        key: torch.tensor(float(value))
        if isinstance(value, (int, float)) and isinstance(key, str) and key.endswith(".alpha")
        else value
        for key, value in tree.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaling:
    """What a file says of its scale apart from the tensors, after PEFT's LoraConfig.

    alpha: of all layers that have none of their own, or None. patterns: layer name, or its end -> another alpha.
    rank_stabilised: the product is divided by the root of the rank. dora: magnitudes belong to it.
    """

    alpha: float | None
    patterns: Mapping[str, float]
    rank_stabilised: bool
    dora: bool

    def alphas(
        self, parts: Mapping[str, Mapping[str, torch.Tensor]], names: Mapping[str, str], name: str
    ) -> dict[str, float]:
        """Bare layer -> the alpha that ComfyUI is to divide by the rank, for pairs that have no alpha tensor.

        parts: bare layer -> its tensors. names: bare layer -> as the file names it. name: the file, for errors.

        Raises ValueError for a pattern that is the name of no layer.
        """
        found: dict[str, float] = {}
        unused = set(self.patterns)
        for layer, tensors in parts.items():
            if "up" not in tensors:
                continue
            pattern = next((key for key in self.patterns if _is_end_of(key, layer, names[layer])), None)
            unused.discard(pattern or "")
            alpha = self.alpha if pattern is None else self.patterns[pattern]
            if alpha is not None and "alpha" not in tensors:
                found[layer] = alpha * (math.sqrt(tensors["down"].shape[0]) if self.rank_stabilised else 1)
        if unused:
            raise ValueError(
                f"LoRA {name!r}, {ALPHA_PATTERN}: {listed(map(short, unused))} is no layer that it changes. "
                "Nothing was applied; save it with an alpha tensor in each layer"
            )
        return found


def _is_end_of(pattern: str, *layers: str) -> bool:
    """Whether a layer has this name, or a name that ends with it. As PEFT does, but no regular expressions."""
    return any(f".{layer}".endswith(f".{pattern.removeprefix('^')}") for layer in layers)


def _scaling(file: WeightFile) -> _Scaling:
    """Raises ValueError for a scale that is no number, and for a rank-stabilised adapter without one."""
    adapter = _peft_settings(file) | _adapter_settings(file)
    inside = {key: file.tree[key] for key in _SETTINGS if key in file.tree}
    settings = adapter | {key: value for key, value in inside.items() if not isinstance(value, torch.Tensor)}
    stated = file.tree.get(ALPHA_KEY, file.metadata.get(ALPHA_KEY, adapter.get(ALPHA_KEY)))
    patterns = settings.get(ALPHA_PATTERN) or {}
    if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
        raise ValueError(
            f"LoRA {file.name!r}, {ALPHA_PATTERN}: expected an object of layer names, got a {type(patterns).__name__}; "
            "correct the file"
        )
    alpha = None if stated is None else _number(stated, ALPHA_KEY, file.name)
    rank_stabilised = _is_true(settings.get(RANK_STABILISED))
    if rank_stabilised and alpha is None:
        raise ValueError(f"LoRA {file.name!r} says {RANK_STABILISED}, but no {ALPHA_KEY}, which decides its strength")
    return _Scaling(
        alpha=alpha,
        patterns={key: _number(value, f"{ALPHA_PATTERN} of {key!r}", file.name) for key, value in patterns.items()},
        rank_stabilised=rank_stabilised,
        dora=_is_true(settings.get(DORA)),
    )


def _peft_settings(file: WeightFile) -> dict[str, Any]:
    """The settings that PEFT saved beside the adapter; {} for none.

    Raises ValueError for those that are not followed.
    """
    if PEFT_CONFIG not in file.metadata:
        return {}
    settings = json.loads(file.metadata[PEFT_CONFIG])
    refused = {key: settings[key] for key in _ONLY_OFF if settings.get(key)}
    if settings.get("peft_type", "LORA") != "LORA":
        refused["peft_type"] = settings["peft_type"]
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        refused["init_lora_weights"] = start
    if refused:
        said = ", ".join(f"{key} {short(value)}" for key, value in refused.items())
        raise ValueError(
            f"LoRA {file.name!r}: {PEFT_CONFIG} beside it says {said}, which is not followed here. Nothing was "
            "applied; use a version converted to a plain LoRA"
        )
    return {ALPHA_KEY: _PEFT_ALPHA} | {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}


def _adapter_settings(file: WeightFile) -> dict[str, Any]:
    """The adapter's settings in the header, as diffusers writes them: `transformer.lora_alpha` -> value."""
    try:
        entries = json.loads(file.metadata.get(ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        entries = {}
    entries = entries if isinstance(entries, dict) else {}
    components = [key.rpartition(".")[0] for key in entries]
    chosen = "transformer" if "transformer" in components else next(iter(components), "")
    return {key.rpartition(".")[2]: value for key, value in entries.items() if key.rpartition(".")[0] == chosen}


def _number(value: Any, what: str, name: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        value = f"a tensor of shape {tuple(value.shape)}"  # which may be as large as it likes: not to be printed
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"LoRA {name!r}, {what}: expected a number, got {short(value)}; correct the file")
    return number


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"


def _parse_key(key: str, kohya: Mapping[str, str]) -> tuple[str, str, str | None, str | None, str] | None:
    """A tensor's name -> bare layer, part, layout, adapter name, the layer as it is named here; None for a name of
    another kind."""
    plain = strip_wrappers(key)
    for kind, ending, layout in _KINDS:
        match = ending.search(plain)
        if match is None:
            continue
        layer = plain[: match.start()]
        adapter = match.groupdict().get("adapter")
        if layer.startswith(KOHYA_PREFIX):
            # Wan Fun's own trainer writes two underscores after lora_unet.
            bare = kohya.get(layer.removeprefix(KOHYA_PREFIX).lstrip("_"))
            return None if bare is None else (bare, kind, "kohya" if layout else None, adapter, layer)
        return from_diffusers(_without_prefixes(layer)), kind, layout, adapter, layer
    return None


def _without_prefixes(layer: str) -> str:
    while (prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None)) is not None:
        layer = layer.removeprefix(prefix)
    return layer


def _target(layer: str, kind: str) -> str:
    """The bare parameter that this part changes."""
    return f"{layer}.bias" if kind == "diff_b" else f"{layer}.weight"


def _check_layer(layer: str, found: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    """Say what is wrong with one layer's tensors."""
    for kind, tensor in found.items():
        if not tensor.dtype.is_floating_point and kind != "alpha":  # some converters write a whole number
            yield f"{layer} {kind}: expected a floating dtype, got {tensor.dtype}"
        elif tensor.dtype.is_floating_point and not is_finite(tensor):
            yield f"{layer} {kind}: NaN or Inf"
    if ("up" in found) != ("down" in found):
        yield f"{layer}: has {'up' if 'up' in found else 'down'} but not its other half"
    elif "up" in found:
        yield from _check_pair(layer, found["up"], found["down"], shapes[f"{layer}.weight"])
    elif "alpha" in found or "dora_scale" in found:
        yield f"{layer}: has an alpha or dora_scale but no low-rank pair"
    if "alpha" in found and found["alpha"].numel() != 1:
        yield f"{layer} alpha: expected one number, got shape {tuple(found['alpha'].shape)}"
    for kind in ("diff", "diff_b"):
        if kind in found:
            expected = shapes[_target(layer, kind)]
            if tuple(found[kind].shape) != expected:
                yield f"{layer} {kind}: expected {expected}, got {tuple(found[kind].shape)}"


def _check_pair(layer: str, up: torch.Tensor, down: torch.Tensor, weight: tuple[int, ...]) -> Iterable[str]:
    if up.ndim < 2 or down.ndim < 2:
        yield f"{layer}: expected matrices, got up {tuple(up.shape)} and down {tuple(down.shape)}"
        return
    expected_up, expected_down = (weight[0], down.shape[0]), (down.shape[0], math.prod(weight[1:]))
    if tuple(up.flatten(1).shape) != expected_up:
        yield f"{layer} up: expected {expected_up}, got {tuple(up.shape)}"
    if tuple(down.flatten(1).shape) != expected_down:
        yield f"{layer} down: expected {expected_down}, got {tuple(down.shape)}"


def _no_lora(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    if "patch_embedding.weight" in {_without_prefixes(strip_wrappers(key)) for key in tensors}:
        return f"LoRA {name!r} is a whole model, not a LoRA; choose it as ckpt_name"
    return (
        f"LoRA {name!r} holds no low-rank tensors for this model; expected keys ending in lora_A/lora_B or "
        f"lora_up/lora_down, found {len(tensors)} tensors: {listed(tensors, 5) or 'none'}; adapters of other kinds, "
        "such as LoKr, go through ComfyUI's LoraLoaderModelOnly"
    )
