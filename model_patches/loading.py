"""From a weight file to a ComfyUI MODEL: ComfyUI's own loader on a state dict that the core has recognised."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..diagonal_sampler.checkpoints import Checkpoint, CheckpointInfo, load_checkpoint
from ..diagonal_sampler.lora_files import HOST_PREFIX, Lora, convert_lora, read_lora
from ..diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS, expected_shapes
from ..diagonal_sampler.weight_files import listed

log = logging.getLogger(__name__)

WEIGHT_DTYPES: dict[str, dict] = {
    "default": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""The choices of ComfyUI's own diffusion model loader, and bf16 -> the options it passes on. By default ComfyUI takes
float16 for a Wan where the GPU has it, also for a file in bf16."""

PROVENANCE_ATTACHMENT = "diagonal_provenance"
"""Under this name a MODEL carries the Provenance of its file, for the nodes that come after the loader."""
FLOW_ADAPTER_ATTACHMENT = "diagonal_flow_adapter"
"""Under this name a MODEL carries the (weight, bias) of its file's optical-flow adapter, if there is one."""


def loader_options(weight_dtype: str) -> dict:
    """The options for ComfyUI's loader of a key of WEIGHT_DTYPES.

    Raises ValueError for another, and for a number format that the device does not have.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype={weight_dtype!r} is not known; choose one of {', '.join(WEIGHT_DTYPES)}")
    options = WEIGHT_DTYPES[weight_dtype]
    device = comfy.model_management.get_torch_device()
    if "dtype" in options and not comfy.model_management.supports_cast(device, options["dtype"]):
        raise ValueError(
            f"weight_dtype={weight_dtype!r} is a number format that this device ({device.type}) does not have; choose "
            "default, or a GGUF file to save memory"
        )
    return dict(options)


def load_wan(
    path: str | Path, *, weights: str = "auto", weight_dtype: str = "default", disable_dynamic: bool = False
) -> tuple[ModelPatcher, CheckpointInfo]:
    """Load a Wan text-to-video file as a MODEL of ComfyUI's causal class, which its own AR sampler runs as
    well.

    path: a file below a ComfyUI model folder. weights: see `recognise`. weight_dtype: a key of WEIGHT_DTYPES.
    disable_dynamic: without ComfyUI's dynamic VRAM, as ComfyUI itself asks where a conditioning has hooks.

    Raises ValueError for a file that is refused (see `load_checkpoint`), for one that this ComfyUI does not load whole,
    and for a weight_dtype that the device does not have.
    """
    options = loader_options(weight_dtype)
    checkpoint = load_checkpoint(
        path,
        weights=weights,
        quant_formats=comfy.quant_ops.QUANT_ALGOS,
        read_safetensors=_read_safetensors,
    )
    model = host_model(checkpoint, options, disable_dynamic=disable_dynamic)
    # How ComfyUI loads the file anew, for hooks in dynamic VRAM or another GPU: a function, its arguments, and which of
    # its results is the MODEL.
    model.cached_patcher_init = (partial(load_wan, weights=weights, weight_dtype=weight_dtype), (path,), 0)
    return model, checkpoint.info


_last_base: dict[tuple, tuple[weakref.ref[ModelPatcher], CheckpointInfo]] = {}
"""What `base_wan` gave last, at most one. Its clones hold it, as their `parent`; this does not."""


def base_wan(
    path: str | Path, *, weights: str = "auto", weight_dtype: str = "default"
) -> tuple[ModelPatcher, CheckpointInfo]:
    """As `load_wan`, but where a MODEL of the same unchanged file is still in use, that one, without reading it again.

    For a caller that hands out clones only: what other nodes do to a clone is the clone's own, and patched weights are
    put back by ComfyUI before another clone's are made.

    Raises OSError for a file that is gone, and ValueError as `load_wan` does.
    """
    stat = os.stat(path)
    key = (str(path), os.path.realpath(path), stat.st_mtime_ns, stat.st_size, weights, weight_dtype)
    held, info = _last_base.get(key, (None, None))
    model = None if held is None else held()
    if model is None or info is None:
        _last_base.clear()
        model, info = load_wan(path, weights=weights, weight_dtype=weight_dtype)
        _last_base[key] = (weakref.ref(model), info)
    else:
        log.info("%s: in memory already", info.file)
    return model, info


def apply_lora(
    model: ModelPatcher, path: str | Path, strength: float, info: CheckpointInfo
) -> tuple[ModelPatcher, Lora]:
    """A clone of the MODEL with the LoRA as ComfyUI weight patches: W + strength * alpha / rank * up @ down.

    It carries the LoRA's provenance if that is to be followed (`is_trained_as`), else the model's.

    strength: a factor, 0 for none. info: of the model's own file, for its sizes.

    Raises ValueError for a LoRA that does not fit whole (see `convert_lora`) or a strength that is not
    finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"lora_strength={strength!r} must be a finite number; 1.0 is the strength it was trained at")
    lora = convert_lora(read_lora(path, read_safetensors=_read_safetensors), expected_shapes(info.dims))
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(lora.tensors, key_map)
    patched = model.clone()
    taken = set(patched.add_patches(patches, strength))
    lost = {HOST_PREFIX + target for target in lora.targets} - taken
    if lost:
        raise ValueError(
            f"LoRA {lora.file!r}: this ComfyUI takes no patch for {len(lost)} parameters: {listed(lost)}. "
            "Nothing was applied; update ComfyUI"
        )
    if is_trained_as(lora, strength):
        patched.set_attachments(PROVENANCE_ATTACHMENT, lora.provenance)
    return patched, lora


def is_trained_as(lora: Lora, strength: float) -> bool:
    """Whether a model with this LoRA is one that was trained as the LoRA's header says, not as the model's own."""
    return strength != 0 and lora.provenance.is_causal


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    """ComfyUI's reader: its tensors know their place in the file, which its dynamic VRAM loading builds on."""
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def host_model(checkpoint: Checkpoint, model_options: dict, *, disable_dynamic: bool = False) -> ModelPatcher:
    """ComfyUI's model of a recognised file. The options are those of its own loader.

    Raises ValueError as `load_wan` does.
    """
    info = checkpoint.info
    # ComfyUI empties the dict that it is given: keep ours whole.
    state_dict = {**checkpoint.state_dict, **checkpoint.attention}
    adapter = tuple(state_dict.pop(key) for key in FLOW_ADAPTER_KEYS if key in state_dict)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options=dict(model_options),
        metadata=dict(checkpoint.host_metadata),
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise ValueError(
            f"weight file {info.file!r}: this ComfyUI does not recognise a causal Wan 2.1 model in it; "
            "update ComfyUI to 0.24.1 or newer"
        )
    # ComfyUI only logs what its network has and the file lacks: make that an error.
    network = {name for name, _ in model.model.diffusion_model.named_parameters()}
    missing = network - expected_shapes(info.dims).keys() - _quantization_parameters(checkpoint)
    if missing:
        raise ValueError(
            f"weight file {info.file!r}: this ComfyUI's Wan has {len(missing)} parameters that the file "
            f"lacks: {listed(missing)}; use the ComfyUI version that this pack was tested with"
        )
    model.set_attachments(PROVENANCE_ATTACHMENT, info.provenance)
    if adapter:
        model.set_attachments(FLOW_ADAPTER_ATTACHMENT, adapter)
    return model


def _quantization_parameters(checkpoint: Checkpoint) -> set[str]:
    """Names that only a quantised file has; ComfyUI renames the legacy ones (scale_weight -> weight_scale)."""
    layers = {name.rpartition(".")[0] for name in checkpoint.state_dict}
    parameters = {
        parameter for algorithm in comfy.quant_ops.QUANT_ALGOS.values() for parameter in algorithm["parameters"]
    }
    return {f"{layer}.{parameter}" for layer in layers for parameter in parameters}
