"""Recognise a Wan text-to-video checkpoint in any of its published layouts and hand back its bare state dict.

The work goes in one direction: a tree of dicts (weight_files.py) -> the one dict of weights to use -> bare
Wan names -> every tensor compared, by name then by shape, with what a Wan network of that size has. Nothing
is loaded half: a file passes whole or is refused with the names of what does not fit.

Sizes: dim = width, depth = transformer blocks, ffn_dim = feed-forward width, text_dim = width of a text
token, freq_dim = width of the sinusoidal timestep embedding.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .provenance import PROVENANCE_KEYS, Provenance
from .quantization import LEGACY_FP8_KEY, PACKED_FORMATS, QUANTIZATION_KEY, Quantization, read_mark, read_quantization
from .schedule import PRESETS, DiagonalSchedule, same_levels, same_steps
from .settings import CausalSettings
from .wan_layout import (
    COUNTER_PREFIX,
    DIFFUSERS_KEY,
    FLOW_ADAPTER_KEYS,
    HEAD_DIM,
    LATENT_CHANNELS,
    PATCH,
    PREFIX_PARTS,
    PREFIXES,
    PUBLISHED_SIZES,
    RCM_PREFIX,
    WRAPPERS,
    WanDims,
    count_blocks,
    expected_names,
    expected_shapes,
    from_diffusers,
    strip_wrappers,
    unfold_patches,
    variant_of,
)
from .weight_files import (
    WeightFile,
    flat_tensors,
    is_finite,
    json_object,
    listed,
    read_weight_file,
    read_weight_shapes,
    refuse_inflated,
    short,
)

WEIGHTS = ("auto", "ema", "generator")
"""Which weights to take from a training checkpoint: `auto` prefers the averaged ones (ema)."""

EMA_SECTIONS = ("generator_ema",)
PLAIN_SECTIONS = ("generator", "model", "state_dict")
"""Dicts that may hold the model, best first. A critic, an optimiser or a discriminator is never one of them."""
_SECTIONS = EMA_SECTIONS + PLAIN_SECTIONS
_FLAT = "flat"
_MAX_NESTING = 4
MAX_BLOCKS = 1000
"""Wan 2.1 14B has 40. Names of what a small file leaves out of ten thousand would take minutes."""

COMPANIONS = ("vae", "first_stage_model", "text_encoders", "cond_stage_model", "conditioner", "clip_vision")
"""Other models that an all-in-one file carries beside the diffusion model: named in the report, not loaded."""

CONFIG_KEY = "config"

_SIGNATURE = (
    "patch_embedding.weight",
    "head.modulation",
    "blocks.0.self_attn.q.weight",
    "blocks.0.modulation",
)
"""A dict with at least two of these is a Wan network, even if it is a damaged one."""

_VARIANTS = (
    ("vace_patch_embedding.weight", "Wan VACE"),
    ("control_adapter.conv.weight", "Wan Fun Camera"),
    ("casual_audio_encoder.encoder.final_linear.weight", "Wan 2.2 S2V (speech to video)"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "Wan HuMo"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan 2.2 Animate"),
    ("patch_embedding_mask.weight", "Wan SCAIL 2"),
    ("patch_embedding_pose.weight", "Wan SCAIL"),
    ("patch_embedding_global.weight", "WanDancer"),
    ("ref_conv.weight", "Wan Fun with a reference image"),
    ("img_emb.proj.0.bias", "Wan image-to-video"),
    ("img_emb.proj.0.weight", "Wan image-to-video"),
    ("condition_embedder.image_embedder.norm1.weight", "Wan image-to-video"),
    ("fps_embedding.weight", "SkyReels V2"),
)
"""A key that only this variant has -> its name. The chunk sampler feeds a model latents and text, nothing else."""

_OTHER_KINDS = (
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder; load it with CLIPLoader"),
    ("blocks.0.attn.q.weight", "a UMT5 text encoder; load its ComfyUI version with CLIPLoader"),
    ("decoder.middle.0.residual.0.gamma", "a Wan VAE; load it with VAELoader"),
    ("decoder.conv_in.weight", "a VAE; load it with VAELoader"),
    ("double_blocks.0.img_attn.qkv.weight", "a Flux or HunyuanVideo model"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
    ("input_blocks.0.0.weight", "a Stable Diffusion UNet"),
    ("transformer_blocks.0.attn1.to_q.weight", "a diffusers transformer such as LTX-Video"),
)
_LORA_KEY = re.compile(r"[._](lora_(?:A|B|up|down|mid)|lora\.(?:up|down)|hada_w\d_\w|lokr_w\d)(?:\.|_|$)")

_ATTENTION_KEY = re.compile(r"blocks\.\d+\.(?:self|cross)_attn\.comfy_attention\.config")
"""JSON as bytes: which attention a layer prefers. ComfyUI reads it after 0.30."""

_PART_OF_SEVERAL = re.compile(r"-\d{5}-of-(\d{5})\.")
_FRAME_BY_FRAME = re.compile(r"frame[-_ ]?wise|(?<![a-z0-9])c1-1(?![0-9])", re.IGNORECASE)

_UNDISTILLED = re.compile(r"ar[-_ ]?diffusion|tf[-_ ]?diffusion", re.IGNORECASE)
# Causal Forcing's `chunkwise/longvideo.pt` is trained and run by Rolling Forcing's code.
_JOINT_WINDOW = re.compile(r"rolling[-_ ]?forcing|(?<![a-z])longvideo(?![a-z])", re.IGNORECASE)

_QUANTIZED_ELSEWHERE = re.compile(r"scales?(?:_2)?$|^scale_(?:weight|input)$|zeros?$|^qweight$")
"""In the last component of a name: what quantised layers of other programs have."""

_WAN22 = re.compile(r"wan[-_ ]?2[._-]?2(?!\d)|(?<![a-z])a14b|(?:high|low)[-_ ]?noise", re.IGNORECASE)

_BIDIRECTIONAL = re.compile(r"bidirect", re.IGNORECASE)
# lightx2v's: Self-Forcing-Plus trains bidirectional models (Self-Forcing-Plus-Plus causal ones).
_STEP_DISTILLED = re.compile(r"step[-_ ]?distill|self[-_ ]?forcing[-_ ]?plus(?![-_ ]?plus)", re.IGNORECASE)
_PUBLISHER_OF_BOTH = re.compile(r"lightx2v", re.IGNORECASE)
_CAUSAL = r"(?<!non)(?<!non[-_ ])causal|causvid|auto[-_ ]?regressive"
_SAYS_CAUSAL = re.compile(_CAUSAL, re.IGNORECASE)
_KNOWN_CAUSAL = re.compile(
    _CAUSAL + r"|(?:self|rolling|reward)[-_ ]?(?:forcing|distill)|diagonal[-_ ]?forcing|dia(?:g(?:onal)?)?[-_ ]?distill"
    r"|long[-_ ]?live|stream[-_ ]?diffusion|krea|sfwan2[._]1|memflow",
    re.IGNORECASE,
)

WANTED_METADATA = (CONFIG_KEY, QUANTIZATION_KEY, *PROVENANCE_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a file was recognised as.

    file: its name. layout: in words. source: the dict used (`generator_ema`, `flat`, ...). prefix: stripped
    from every key. dtype: of most elements. parameters: elements of the network. quantization: in words, or
    None. causal_marker: `header`, `section` (a distillation checkpoint's generator, usually causal) or None
    (nothing says it is causal); see `causality_warning`. unused: what else the file holds, not loaded.
    suggested_preset: a schedule preset, or None where the file cannot tell. warnings: sentences for the user
    about its size.
    """

    file: str
    layout: str
    source: str
    prefix: str
    dims: WanDims
    dtype: str
    parameters: int
    quantization: str | None
    causal_marker: str | None
    provenance: Provenance
    suggested_preset: str | None
    unused: tuple[str, ...]
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """One line for a person."""
        dims = self.dims
        size = f"{dims.size_name}, " if dims.size_name else ""
        stored = self.quantization or self.dtype
        marker = {
            "header": "marked causal in its header",
            "section": "a distillation checkpoint, usually causal",
            None: "with no mark that says it is causal",
        }[self.causal_marker]
        parts = [
            f"{self.file}: Wan text-to-video ({size}dim {dims.dim}, {dims.depth} blocks, {dims.heads} heads, "
            f"ffn {dims.ffn_dim}, text {dims.text_dim}), {_count(self.parameters)} parameters in {stored}, "
            f"{marker}",
            f"layout: {self.layout}",
        ]
        if dims.flow_adapter:
            parts.append("with an optical-flow adapter")
        if self.unused:
            parts.append(f"not used: {listed(self.unused)}")
        if self.suggested_preset:
            parts.append(f"preset: {self.suggested_preset}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A recognised file, ready for a host that loads Wan.

    state_dict: bare Wan names -> tensors, quantisation tensors included as the file has them. host_metadata:
    the header entries a ComfyUI loader needs (`config` with the causal mark and sizes,
    `_quantization_metadata`). attention: bare names of attention preferences -> JSON as bytes; no part of the network,
    and nothing but a host reads them.
    """

    state_dict: dict[str, torch.Tensor]
    host_metadata: dict[str, str]
    info: CheckpointInfo
    attention: dict[str, torch.Tensor] = field(default_factory=dict)


def load_checkpoint(
    path: str | Path,
    *,
    weights: str = "auto",
    quant_formats: Iterable[str] = (),
    read_safetensors: Callable[[Path], Mapping[str, torch.Tensor]] | None = None,
) -> Checkpoint:
    """Read a file and recognise it; see `read_weight_file` and `recognise` for arguments and errors."""
    file = read_weight_file(path, wanted_metadata=WANTED_METADATA, read_safetensors=read_safetensors)
    return recognise(file, weights=weights, quant_formats=quant_formats)


def inspect_checkpoint(path: str | Path, *, weights: str = "auto", quant_formats: Iterable[str] = ()) -> Checkpoint:
    """Recognise a file whose weights stay on the disk: the tensors have shapes and number formats, and no values.

    See `read_weight_shapes` and `recognise` for arguments and errors.
    """
    file = read_weight_shapes(path, wanted_metadata=WANTED_METADATA)
    return recognise(file, weights=weights, quant_formats=quant_formats, check_values=False)


def recognise(
    file: WeightFile, *, weights: str = "auto", quant_formats: Iterable[str] = (), check_values: bool = True
) -> Checkpoint:
    """Turn what a file holds into a bare Wan state dict in which every tensor is accounted for.

    weights: `auto` takes `generator_ema`, else `generator`, `model`, `state_dict`, else the flat file; `ema`
    and `generator` insist. quant_formats: quantisation formats that the host can run; empty accepts any.
    check_values: look for NaN, Inf, and tensors that unfold to far more than the file stores.

    Raises ValueError naming the file, and the keys where there are any: not Wan text-to-video, a LoRA,
    missing or left-over tensors, a wrong shape, rank or dtype, NaN or Inf.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not known; choose one of {', '.join(WEIGHTS)}")
    name = file.name
    source, tensors, unused = _choose_section(file, weights)
    if check_values:
        refuse_inflated(tensors, name)
    renamed, changes = _plain_names(tensors, name)
    _refuse_longlive2(renamed, name)
    prefix = _find_prefix(renamed)
    if prefix is None:
        _refuse_part(name)
        raise ValueError(_not_wan(name, renamed))
    bare, foreign = _split_prefix(renamed, prefix)
    unused += _companions(foreign)
    foreign = [key for key in foreign if key.split(".", 1)[0] not in COMPANIONS]
    if prefix == RCM_PREFIX:
        counters = [key for key in bare if key.startswith(COUNTER_PREFIX)]
        unused += [prefix + key for key in counters]
        bare = unfold_patches({key: value for key, value in bare.items() if key not in counters})
    _refuse_variant(bare, name)

    config = _transformer_config(file)
    depth = count_blocks(bare, name)
    if depth > MAX_BLOCKS:
        raise ValueError(
            f"weight file {name!r} has {depth} blocks by its names, such as 'blocks.{depth - 1}', and no Wan has more "
            f"than {MAX_BLOCKS}; choose a Wan 2.1 file"
        )
    bare, quantization = read_quantization(
        file, bare, prefix=prefix, known_formats=quant_formats, companions=COMPANIONS, check_values=check_values
    )
    attention = _take_attention(bare, name, check_values)
    _check_names(bare, foreign, depth, quantization, name)
    dims = _derive_dims(bare, depth, quantization, name)
    _check_config(config, dims, name)
    _check_tensors(bare, dims, quantization, name, check_values)

    provenance = Provenance.from_metadata(file.metadata, name)
    marker = "header" if config.get("causal_ar") else None
    if marker is None and any(part.startswith("generator") for part in source.split("/")):
        marker = "section"
    host_config = {"causal_ar": True, "text_dim": dims.text_dim, "freq_dim": dims.freq_dim}
    host_config |= {key: config[key] for key in ("text_len", "eps") if key in config}
    host_metadata = {CONFIG_KEY: json.dumps({"transformer": host_config})}
    if quantization.host_metadata is not None:
        host_metadata[QUANTIZATION_KEY] = quantization.host_metadata
    info = CheckpointInfo(
        file=name,
        layout=_layout_in_words(source, prefix, changes),
        source=source,
        prefix=prefix,
        dims=dims,
        dtype=_main_dtype(bare),
        parameters=sum(bare[key].numel() for key in expected_shapes(dims)),
        quantization=quantization.in_words(),
        causal_marker=marker,
        provenance=provenance,
        suggested_preset=suggest_preset(provenance, dims=dims, source=source, prefix=prefix),
        unused=tuple(unused),
        warnings=tuple(_warnings(dims)),
    )
    return Checkpoint(state_dict=bare, host_metadata=host_metadata, info=info, attention=attention)


def suggest_preset(provenance: Provenance, *, dims: WanDims, source: str, prefix: str) -> str | None:
    """The schedule preset a file points to, or None: no published layout but Krea's tells one family from another.

    A file that states its steps and context mode gets the first preset that agrees with all it states. Krea Realtime
    is the one flat 14B file whose keys start with `model.`.
    """
    if provenance.steps_per_chunk is not None and provenance.context_mode is not None:
        return next((name for name in PRESETS if _agrees(name, provenance)), None)
    if provenance == Provenance() and (dims.size_name, source, prefix) == ("14B", _FLAT, "model."):
        return "krea"
    return None


def trained_as(info: CheckpointInfo, provenance: Provenance) -> CheckpointInfo:
    """What a file becomes with a LoRA whose header states this."""
    preset = suggest_preset(provenance, dims=info.dims, source=info.source, prefix=info.prefix)
    return replace(info, provenance=provenance, suggested_preset=preset)


def frame_by_frame(path: str) -> bool:
    """Whether a file's name, or its folder's, says that the model makes one latent frame at a time.

    Causal Forcing's files are in two kinds that differ in nothing else, `framewise` and `chunkwise`; so are
    Causal-rCM's, `c1-1` and `c3-3`.
    """
    return bool(_FRAME_BY_FRAME.search(path))


def bidirectional_by_name(path: str) -> bool:
    """Whether a file's name, or its folder's, says that the model, or the LoRA's, denoises all frames at once."""
    step_distilled = _STEP_DISTILLED.search(path) and not _SAYS_CAUSAL.search(path)
    by_publisher = _PUBLISHER_OF_BOTH.search(path) and not _KNOWN_CAUSAL.search(path)
    return bool(_BIDIRECTIONAL.search(path) or step_distilled or by_publisher)


def causal_by_name(path: str) -> bool:
    """Whether a file's name, or its folder's, is that of a family of causal models, or of their LoRAs."""
    return bool(_KNOWN_CAUSAL.search(path)) and not bidirectional_by_name(path)


def recipe_warning(info: CheckpointInfo, path: str, *, chunk_known: bool) -> str | None:
    """What a file's name, or its folder's, says of how to sample it, where no header does; None for nothing.

    path: as of `causality_warning`. chunk_known: the frames per chunk need no more be told.
    """
    if info.suggested_preset is None and _JOINT_WINDOW.search(path):
        return (
            "its name is that of a Rolling Forcing model, which denoises a window of chunks jointly: it loads, but no "
            "preset fits"
        )
    if chunk_known or not frame_by_frame(path):
        return None
    if _UNDISTILLED.search(path):
        return (
            "its name says that it makes one latent frame at a time and is not distilled: choose the preset "
            "'undistilled' with frames_per_chunk 1, and window -1 with sink 0"
        )
    return (
        "its name says that it makes one latent frame at a time: choose the preset 'causal forcing framewise', "
        "or 'causal forcing++' for a file of two steps, which set that, and window -1 with sink 0"
    )


def causality_warning(info: CheckpointInfo, path: str, *, causal_lora: bool = False, lora_path: str = "") -> str | None:
    """What a person should know of a file that does not say for certain that it is causal, and is whole; None for
    nothing.

    path: of the file, below the folder that its user chose it from. Of causality a header is believed, a name next;
    neither a header nor a tensor tells Wan 2.2's networks from Wan 2.1's. causal_lora: it gets a LoRA that was trained
    causally. lora_path: as path, of a LoRA that it gets; empty for none.
    """
    if _WAN22.search(path):
        return (
            "its name says that it is of Wan 2.2, which has two networks, each for a part of the noise levels: alone "
            "it covers only its part, and gives poor video, causal or not; use a causal Wan 2.1 model"
        )
    if info.causal_marker == "header" or causal_lora:
        return None
    if bidirectional_by_name(path):
        return (
            "its name says that it is bidirectional: made to denoise all frames at once, it gives poor video chunk by "
            "chunk; use a causal one, such as Self Forcing's"
        )
    if causal_by_name(path) or causal_by_name(lora_path):
        return None
    if info.causal_marker == "section":
        return (
            "distillation checkpoints are usually causal, but bidirectional ones look the same: if chunks do not go on "
            "from one another, it is one of those"
        )
    return (
        "nothing in the file says that it was trained causally; an ordinary (bidirectional) Wan gives poor video chunk "
        "by chunk"
    )


def _agrees(name: str, provenance: Provenance) -> bool:
    preset, default = PRESETS[name], CausalSettings().frames_per_chunk
    schedule = DiagonalSchedule.preset(name)
    return (
        provenance.steps_per_chunk is not None
        and same_steps(preset.steps, provenance.steps_per_chunk)
        and preset.context_mode == provenance.context_mode
        and (preset.frames_per_chunk or default) == (provenance.frames_per_chunk or default)
        and provenance.shift in (None, preset.shift)
        and (provenance.sigmas is None or same_levels(provenance.sigmas, schedule.sigmas))
    )


# --- finding the weights ---


def _choose_section(file: WeightFile, weights: str) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """The dict to load: its path, its tensors, and what of the file stays unused."""
    leaves, bookkeeping = _leaves(file.tree, (), file.name, {})
    different = {id(tensors): tensors for _, tensors in leaves}
    prefixes = {key: _find_prefix(_plain_names(tensors, file.name)[0]) for key, tensors in different.items()}
    wan = [leaf for leaf in leaves if prefixes[id(leaf[1])] is not None]
    if wan:
        wanted = {"auto": wan, "ema": [leaf for leaf in wan if _is_ema(leaf[0])]}
        wanted["generator"] = [leaf for leaf in wan if not _is_ema(leaf[0])]
        if not wanted[weights]:
            raise ValueError(
                f"weights={weights!r}, but file {file.name!r} holds only "
                f"{listed(_path(leaf[0]) for leaf in wan)}; choose auto"
            )
        path, tensors = min(wanted[weights], key=lambda leaf: _preference(leaf[0]))
    elif not _lora_keys(file.tree) and (strange := _strange_sections(file.tree)):
        raise ValueError(
            f"weight file {file.name!r}: its dict {listed(strange)} holds a Wan network under a name that does not say "
            "that it is the generator; if it is the one that makes video, save it as 'generator_ema'"
        )
    elif leaves:
        # Nothing is Wan: take the largest dict, so that the refusal describes what is really in the file.
        path, tensors = max(leaves, key=lambda leaf: len(leaf[1]))
    else:
        raise ValueError(_no_section(file))
    unused = [f"{_path(other)} ({len(values)} tensors)" for other, values in leaves if other != path]
    return _path(path), tensors, unused + bookkeeping


_Leaf = tuple[tuple[str, ...], dict[str, torch.Tensor]]


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...], name: str, known: dict[int, tuple[list[_Leaf], list[str]]]
) -> tuple[list[_Leaf], list[str]]:
    """Every dict of tensors under a known name, with its path, and the names of all that is not looked into.

    known: by id of a dict that was met before, its own leaves, with paths below it, and the known names in it: a dict
    of a pickle may lie in many places, each of which is a leaf, but of the same tensors.
    """
    met = id(tree) in known
    own, others = known[id(tree)] if met else _own_leaves(tree, path, name)
    if not met:
        known[id(tree)] = own, [key for key in others if key in _SECTIONS]
    leaves = [((*path, *below), tensors) for below, tensors in own]
    bookkeeping = []
    for key in others:
        if key in _SECTIONS and isinstance(tree[key], Mapping) and len(path) < _MAX_NESTING:
            inner, more = _leaves(tree[key], (*path, key), name, known)
            leaves += inner
            bookkeeping += more
        elif not met:
            bookkeeping.append(_path((*path, key)))
    return leaves, bookkeeping


def _own_leaves(tree: Mapping[str, Any], path: tuple[str, ...], name: str) -> tuple[list[_Leaf], list[str]]:
    """The dicts of tensors that one dict is, with their paths below it, and its other keys."""
    tensors, others = flat_tensors(tree, name, f"dict {_path(path)!r}")
    leaves: list[_Leaf] = []
    for section in ("generator_ema", "generator"):  # a safetensors file can only nest by its key names
        grouped = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{section}.")}
        if grouped:
            leaves.append(((section,), {key.removeprefix(f"{section}."): value for key, value in grouped.items()}))
    if tensors:
        leaves.append(((), tensors))
    return leaves, others


def _strange_sections(tree: Mapping[str, Any]) -> list[str]:
    """The paths of dicts below this one that hold a Wan network, whatever their names; each dict once."""
    found: list[str] = []
    met = {id(tree)}
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), tree)]
    for _ in range(_MAX_NESTING):
        inner = [
            ((*path, str(key)), value)
            for path, around in level
            for key, value in around.items()
            if isinstance(value, Mapping)
        ]
        level = []
        for path, inside in inner:
            if id(inside) in met:
                continue
            met.add(id(inside))
            level.append((path, inside))
            keys = {
                from_diffusers(strip_wrappers(key))
                for key, value in inside.items()
                if isinstance(key, str) and isinstance(value, torch.Tensor)
            }
            if _find_prefix(keys) is not None or _prefixes(keys):
                found.append(_path(path))
    return found


def _is_ema(path: tuple[str, ...]) -> bool:
    return any(part in EMA_SECTIONS for part in path)


def _preference(path: tuple[str, ...]) -> int:
    """Smaller is better: generator_ema, generator, model, state_dict, flat."""
    return min((_SECTIONS.index(part) for part in path), default=len(_SECTIONS))


def _path(path: tuple[str, ...]) -> str:
    return "/".join(path) or _FLAT


def _lora_keys(tree: Mapping[Any, Any]) -> list[str]:
    return [key for key in tree if isinstance(key, str) and "lora" in key.lower()]


def _no_section(file: WeightFile) -> str:
    inside = list(file.tree)
    if lora := _lora_keys(file.tree):
        return _is_lora(file.name, f"its dict {lora[0]!r}")
    return (
        f"weight file {file.name!r} has no dict of weights; found "
        f"{listed(str(key) for key in inside) or 'nothing'}, expected {', '.join(_SECTIONS)} or a flat state "
        "dict: choose a model file"
    )


def _plain_names(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Wan's own names, perhaps with a prefix, and what was done to the file's for them, in words."""
    diffusers = any(strip_wrappers(key).endswith(DIFFUSERS_KEY) for key in tensors)
    renamed: dict[str, torch.Tensor] = {}
    wrapped = False
    for key, tensor in tensors.items():
        short = strip_wrappers(key)
        wrapped |= short != key
        if diffusers:
            short = from_diffusers(short)
        if short in renamed:
            raise ValueError(
                f"weight file {name!r}, key {key!r}: {short!r} is there twice once {', '.join(WRAPPERS)} are "
                "removed; save the unwrapped model"
            )
        renamed[short] = tensor
    done = {"diffusers' names": diffusers, "training wrappers removed": wrapped}
    return renamed, tuple(word for word, is_done in done.items() if is_done)


def _find_prefix(keys: Iterable[str]) -> str | None:
    """The prefix under which a Wan network lies, or None."""
    keys = set(keys)
    others = [prefix for prefix in _prefixes(keys) if PREFIX_PARTS.issuperset(prefix.removesuffix(".").split("."))]
    hits = {prefix: sum(prefix + anchor in keys for anchor in _SIGNATURE) for prefix in (*PREFIXES, *others)}
    best = max(hits, key=lambda prefix: hits[prefix])
    return best if hits[best] >= 2 else None


def _prefixes(keys: set[str]) -> list[str]:
    """What stands before the names of whole Wan networks, known or not."""
    first, second = _SIGNATURE[:2]
    found = {key.removesuffix(first) for key in keys if key.endswith(first)}
    return sorted(prefix for prefix in found if prefix.endswith(".") and prefix + second in keys)


def _split_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    bare = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not prefix:  # every key starts with "": companions are told apart by their first component
        foreign = [key for key in bare if key.split(".", 1)[0] in COMPANIONS]
        for key in foreign:
            del bare[key]
        return bare, foreign
    return bare, [key for key in tensors if not key.startswith(prefix)]


def _companions(foreign: Iterable[str]) -> list[str]:
    counts = Counter(key.split(".", 1)[0] for key in foreign)
    return [f"{part} ({count} tensors)" for part, count in counts.items() if part in COMPANIONS]


# --- refusals ---


def _refuse_longlive2(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    if any("quantized_weight_values" in key for key in tensors):
        raise ValueError(
            f"weight file {name!r} is LongLive 2 (NVFP4 keys 'quantized_weight_values', based on Wan 2.2 "
            "5B), which the chunk sampler cannot run; use LongLive 1 (Wan 2.1 1.3B)"
        )


def _refuse_variant(bare: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise ValueError for a Wan network that needs more than latents and text, or another latent space."""
    remedy = (
        "use a Wan 2.1 text-to-video checkpoint (16 latent channels), for a start image with Diagonal Context Frames"
    )
    for key, variant in _VARIANTS:
        if key in bare:
            raise ValueError(
                f"weight file {name!r} is {variant} (it has {key!r}), which the chunk sampler cannot run: it "
                f"feeds the model latents and text only; {remedy}"
            )
    patch = bare.get("patch_embedding.weight")
    head = bare.get("head.head.weight")
    channels_in = patch.shape[1] if patch is not None and patch.ndim > 1 else LATENT_CHANNELS
    channels_out = head.shape[0] // math.prod(PATCH) if head is not None and head.ndim == 2 else LATENT_CHANNELS
    if channels_in == channels_out == LATENT_CHANNELS:
        return
    variant = variant_of(channels_in, channels_out)
    raise ValueError(
        f"weight file {name!r}, key 'patch_embedding.weight': expected {LATENT_CHANNELS} latent channels in "
        f"and out, got {channels_in} in and {channels_out} out: this is {variant}, which the chunk sampler "
        f"cannot run; {remedy}"
    )


def _refuse_part(name: str) -> None:
    """Say of a file that is no whole network whether its name says why."""
    if part := _PART_OF_SEVERAL.search(name):
        raise ValueError(
            f"weight file {name!r} is one of the {int(part[1])} parts that its network is saved in. Nothing was "
            "loaded; use the model as one file, as its publisher or ComfyUI's has it, or join the parts into one"
        )


def _is_lora(name: str, what: str) -> str:
    return (
        f"weight file {name!r} is a LoRA ({what}), not a whole model; put it in models/loras and choose it "
        "as lora_name, with its base model as ckpt_name"
    )


def _not_wan(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    loras = [key for key in tensors if _LORA_KEY.search(key)]
    if loras:
        return _is_lora(name, f"{len(loras)} low-rank tensors such as {sorted(loras)[0]!r}")
    for anchor, kind in _OTHER_KINDS:
        if any(key == anchor or key.endswith(f".{anchor}") for key in tensors):
            return f"weight file {name!r} is not a Wan diffusion model: it looks like {kind}"
    if prefixes := _prefixes(set(tensors)):
        return (
            f"weight file {name!r} has Wan's names behind {listed(prefixes)}, which does not say that it is the "
            "model that makes video; save that network alone, without the prefix"
        )
    return (
        f"weight file {name!r} is not a Wan diffusion model: expected keys such as {_SIGNATURE[0]!r} and "
        f"{_SIGNATURE[1]!r}, found {len(tensors)} tensors: {listed(tensors, 5)}; choose a Wan 2.1 "
        "text-to-video file"
    )


# --- header entries ---


def _transformer_config(file: WeightFile) -> dict[str, Any]:
    config = json_object(file, CONFIG_KEY).get("transformer", {})
    if not isinstance(config, dict):
        raise ValueError(
            f"weight file {file.name!r}, header key {CONFIG_KEY!r}: 'transformer' must be a JSON object, got "
            f"{short(config)}; correct the header or remove the key"
        )
    return config


def _check_config(config: Mapping[str, Any], dims: WanDims, name: str) -> None:
    """What the header says about the network must be what its tensors say."""
    facts = {
        "dim": dims.dim,
        "num_layers": dims.depth,
        "ffn_dim": dims.ffn_dim,
        "text_dim": dims.text_dim,
        "freq_dim": dims.freq_dim,
        "in_dim": dims.in_channels,
        "out_dim": dims.out_channels,
        "num_heads": dims.heads,
        "patch_size": list(PATCH),
        "model_type": "t2v",
        "qk_norm": True,
        "cross_attn_norm": True,
    }
    for key, expected in facts.items():
        if key in config and config[key] != expected:
            raise ValueError(
                f"weight file {name!r}, header key {CONFIG_KEY!r}: {key} is {short(config[key])}, but its "
                f"tensors give {expected}; correct the header or remove the entry"
            )
    text_len, eps = config.get("text_len", 1), config.get("eps", 1.0)
    if not isinstance(text_len, int) or isinstance(text_len, bool) or text_len < 1:
        raise ValueError(
            f"weight file {name!r}, header key {CONFIG_KEY!r}: text_len must be 1 or more, got {text_len!r}"
        )
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps <= 1:
        raise ValueError(f"weight file {name!r}, header key {CONFIG_KEY!r}: eps must be in (0, 1], got {eps!r}")


# --- every tensor accounted for ---


def _take_attention(bare: dict[str, torch.Tensor], name: str, values: bool) -> dict[str, torch.Tensor]:
    """Take the attention preferences out of a bare state dict. Without values there is nothing to hand on.

    They go to ComfyUI, so that a file does the same here as in ComfyUI's own loader: one that knows them applies them,
    and 0.30 logs their names as unexpected and goes on.
    """
    found = {key: bare.pop(key) for key in list(bare) if _ATTENTION_KEY.fullmatch(key)}
    if not values:
        return {}
    for key, tensor in found.items():
        read_mark(tensor, key, name, kinds=(dict, list))  # ComfyUI would fail on it without naming the file
    return found


def _check_names(
    bare: Mapping[str, torch.Tensor],
    foreign: list[str],
    depth: int,
    quantization: Quantization,
    name: str,
) -> None:
    """Raise ValueError with the names of missing and left-over tensors."""
    expected = expected_names(depth, flow_adapter=_has_flow_adapter(bare)) | quantization.required()
    allowed = quantization.allowed(depth)
    missing = expected - bare.keys()
    left_over = [key for key in bare if key not in expected and key not in allowed] + foreign
    if not missing and not left_over:
        return
    _refuse_part(name)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    if left_over:
        problems.append(f"{len(left_over)} are left over: {listed(left_over)}")
    remedy = "download the file again, or use one without additions"
    if others := _prefixes(set(left_over)):
        remedy = (
            f"what lies behind {listed(others)} is a Wan network too, under a name that does not say whether it is the "
            "generator: save the one that makes video alone, without the prefix"
        )
    if any(_QUANTIZED_ELSEWHERE.search(key.rpartition(".")[2]) for key in left_over):
        remedy = (
            "it is quantised for another program, such as LightX2V, WanVideoWrapper or Nunchaku: use the bf16 file, or "
            "one that was quantised for ComfyUI"
        )
    raise ValueError(
        f"weight file {name!r} is not a whole Wan text-to-video network of {depth} blocks: "
        f"{'; '.join(problems)}. Nothing was loaded; {remedy}"
    )


def _derive_dims(bare: Mapping[str, torch.Tensor], depth: int, quantization: Quantization, name: str) -> WanDims:
    """Read the sizes off a few tensors; all other shapes follow from them.

    Width and ffn_dim are a vote, so that one wrong tensor is reported as the wrong one.
    """

    def shape(key: str, rank: int) -> torch.Size:
        if bare[key].ndim != rank:
            raise ValueError(
                f"weight file {name!r}, key {key!r}: expected {rank} dimensions, got shape {tuple(bare[key].shape)}; "
                "download it again"
            )
        return bare[key].shape

    def vote(keys: Iterable[str], axis: int) -> int:
        sizes = Counter(bare[key].shape[axis] if bare[key].ndim else 0 for key in keys)
        return sizes.most_common(1)[0][0]

    def in_features(layer: str) -> int:
        return shape(f"{layer}.weight", 2)[1] * (2 if quantization.packed(layer) else 1)

    blocks = [f"blocks.{index}" for index in range(depth)]
    dim = vote(["head.modulation", "patch_embedding.bias", *(f"{block}.modulation" for block in blocks)], -1)
    if dim == 0 or dim % HEAD_DIM:
        raise ValueError(
            f"weight file {name!r}, key 'head.modulation': dim must be a multiple of {HEAD_DIM} (the width of a Wan "
            f"attention head), got {dim}; choose a Wan file"
        )
    return WanDims(
        dim=dim,
        depth=depth,
        ffn_dim=vote([f"{block}.ffn.0.{part}" for block in blocks for part in ("bias", "weight")], 0),
        text_dim=in_features("text_embedding.0"),
        freq_dim=in_features("time_embedding.0"),
        in_channels=shape("patch_embedding.weight", 2 + len(PATCH))[1],
        out_channels=shape("head.head.weight", 2)[0] // math.prod(PATCH),
        flow_adapter=_has_flow_adapter(bare),
    )


def _has_flow_adapter(bare: Mapping[str, torch.Tensor]) -> bool:
    return any(key in bare for key in FLOW_ADAPTER_KEYS)


def _check_tensors(
    bare: Mapping[str, torch.Tensor], dims: WanDims, quantization: Quantization, name: str, values: bool
) -> None:
    """Raise ValueError for wrong shapes, for integers where nothing says quantised, and for NaN and Inf."""
    wrong = []
    for key, expected in expected_shapes(dims).items():
        tensor = bare[key]
        layer, _, parameter = key.rpartition(".")
        stored_as = quantization.formats.get(layer) if parameter == "weight" else None
        if stored_as in PACKED_FORMATS:
            # Rows are packed and may be padded; ComfyUI's own reader of the format checks the rest.
            if tensor.ndim != 2:
                wrong.append(f"{key}: expected rank 2 ({stored_as}), got {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != expected:
            wrong.append(f"{key}: expected {expected}, got {tuple(tensor.shape)}")
        elif stored_as is None and not tensor.dtype.is_floating_point:
            wrong.append(f"{key}: expected a floating dtype, got {_dtype(tensor)}")
    if wrong:
        raise ValueError(
            f"weight file {name!r}: {len(wrong)} tensors do not fit a Wan network of dim {dims.dim}: "
            f"{listed(wrong)}; download it again, or convert it without changing shapes"
        )
    # What LEGACY_FP8_KEY holds is never computed with, and some converters left it as the memory was.
    bad = [key for key, tensor in bare.items() if values and key != LEGACY_FP8_KEY and not is_finite(tensor)]
    if bad:
        raise ValueError(
            f"weight file {name!r}: NaN or Inf in {len(bad)} tensors: {listed(bad)}; such a model only gives "
            "noise: download it again, or use an earlier checkpoint"
        )


# --- words ---


def _layout_in_words(source: str, prefix: str, changes: tuple[str, ...]) -> str:
    where = "flat state dict" if source == _FLAT else f"dict {source!r}"
    keys = f"keys after {prefix!r}" if prefix else "bare keys"
    return ", ".join((where, keys, *changes))


def _warnings(dims: WanDims) -> Iterable[str]:
    if dims.dim in PUBLISHED_SIZES and dims.size_name is None:
        size, depth, ffn_dim = PUBLISHED_SIZES[dims.dim]
        yield (
            f"dim {dims.dim} is that of Wan 2.1 {size} ({depth} blocks, ffn {ffn_dim}), but this file has "
            f"{dims.depth} blocks and ffn {dims.ffn_dim}"
        )


def _main_dtype(bare: Mapping[str, torch.Tensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in bare.values():
        counts[_dtype(tensor)] += tensor.numel()
    return counts.most_common(1)[0][0]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.2f}{unit}"
    return str(parameters)
