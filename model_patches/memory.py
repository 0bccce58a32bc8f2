"""The memory that a run will take, by ComfyUI's own reckoning, from a weight file that is not loaded.

A file becomes ComfyUI's model on torch's meta device: its sizes and number formats are those of the model that a loader
would give, but it has no values, and the file's stay on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..diagonal_sampler.checkpoints import CONFIG_KEY, Checkpoint, inspect_checkpoint
from ..diagonal_sampler.flow_reference import TAIL_FRAMES
from ..diagonal_sampler.frames import TIME_FACTOR
from ..diagonal_sampler.gguf_header import read_gguf_header
from ..diagonal_sampler.memory import DecoderFacts, NetworkFacts
from ..diagonal_sampler.provenance import Provenance
from ..diagonal_sampler.quantization import QUANTIZATION_KEY
from ..diagonal_sampler.wan_layout import count_blocks, expected_names
from ..diagonal_sampler.weight_files import MARK_ELEMENTS, first_line, listed, read_weight_shapes
from .demo import load_demo_vae
from .loading import host_model, loader_options
from .stream_decode import stream_decoder

GGUF_SUFFIX = ".gguf"
MAX_TENSORS = 4096
"""Of a model that is looked at before a run: Wans have some 1,500, quantised ones 3,000. ComfyUI reads all names for
each block that it counts."""
LEGACY_INPUT_SCALE = ".scale_input"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file says before it is loaded: its network's size, and how it was trained where it says so."""

    network: NetworkFacts
    provenance: Provenance


def network_facts(model: ModelPatcher, *, count_weights: bool = True) -> NetworkFacts:
    """Sizes of a Wan MODEL, loaded or on the meta device.

    Args:
        count_weights: else `weight_bytes` and `parameters` are 0. Counting goes through all modules, and keys and
            values take as much whatever the weights are.
    """
    network = model.get_model_object("diffusion_model")
    network = getattr(network, "_orig_mod", network)
    # A compute dtype is a patch of this MODEL's (ModelComputeDtype): what the network says is that of the last one run.
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    return NetworkFacts(
        weight_bytes=_weight_bytes(model) if count_weights else 0,
        parameters=sum(parameter.numel() for parameter in network.parameters()) if count_weights else 0,
        layers=len(network.blocks),
        width=network.dim,
        patch=tuple(network.patch_size[1:]),
        element_bytes=comfy.model_management.dtype_size(dtype),
        forward_bytes=model.model.memory_required([1, 1, 1, 1, 1]),  # it is proportional to the latent's cells
    )


def _weight_bytes(model: ModelPatcher) -> int:
    """Of the weights on their device. In dynamic VRAM they lie in RAM in the file's number format, and get the module's
    on their way; what is quantised stays as it is."""
    nbytes = model.model_size()
    for module in model.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            plain = type(parameter) is torch.nn.Parameter and parameter.is_floating_point()
            if plain and dtype is not None:
                nbytes += parameter.numel() * (dtype.itemsize - parameter.dtype.itemsize)
    return nbytes


def file_facts(path: str | Path, *, weights: str = "auto", weight_dtype: str = "default") -> FileFacts:
    """What a weight file says; see `load_wan` for the arguments.

    Raises:
        ValueError: a file that is refused, or that would have to be read whole, or a weight_dtype that the device does
            not have.
    """
    loader_options(weight_dtype)
    return _file_facts(str(path), *_version(path), weights, weight_dtype)


def decoder_facts(path: str | Path, frames: int, *, demo: bool = False) -> DecoderFacts:
    """What a VAE's file says of decoding a chunk of `frames` latent frames. demo: the file is the demo's autoencoder.

    Raises:
        ValueError: a file that is no video VAE, or that would have to be read whole.
    """
    return _decoder_facts(str(path), *_version(path), frames, demo)


def carrier_facts(path: str | Path, frames: int, *, demo: bool = False) -> DecoderFacts:
    """What a VAE's file says of carrying the last frame into a chunk of `frames` latent frames; see FlowReference.

    It decodes the end of the chunk before, encodes the carried frames, and decodes and encodes them again: one after
    the other, so that the largest counts. demo: the file is the demo's autoencoder.

    Raises:
        ValueError: a file that is no video VAE, or that would have to be read whole.
    """
    facts = decoder_facts(path, frames, demo=demo)
    return replace(facts, cell_bytes=_carrying_bytes(str(path), *_version(path), frames, demo))


def available_memory() -> tuple[int, int, bool]:
    """Bytes that a run could have, bytes that the device has, and whether it is a GPU.

    What ComfyUI holds loaded counts as available, since it makes room; what it keeps in reserve does not.

    Raises:
        ValueError: ComfyUI does not know (DirectML): of any such device it says 1 GiB.
    """
    if getattr(comfy.model_management, "directml_enabled", False):
        raise ValueError("How much memory this GPU has is not known: ComfyUI cannot ask DirectML.")
    device = comfy.model_management.get_torch_device()
    # An entry of ComfyUI's list does not keep its MODEL: it may be gone, or go while this thread looks.
    entries = list(comfy.model_management.current_loaded_models)
    models = [entry.model for entry in entries if entry.device == device]
    loaded = sum(model.loaded_size() for model in models if model is not None)
    free = comfy.model_management.get_free_memory(device) + loaded - comfy.model_management.extra_reserved_memory()
    total = comfy.model_management.get_total_memory(device)
    return max(0, min(int(free), int(total))), int(total), device.type not in ("cpu", "mps")


def float8_works() -> bool:
    """Whether the device has float8 weights: Apple's GPU has not."""
    return comfy.model_management.supports_cast(comfy.model_management.get_torch_device(), torch.float8_e4m3fn)


def weights_kept(weight_bytes: int, available: int) -> int:
    """Bytes of the weights that ComfyUI loads onto the device though a run needs the memory: none on NVIDIA's."""
    ratio = getattr(comfy.model_management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    return min(weight_bytes, round(ratio * available))


def _version(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=32)
def _file_facts(path: str, changed: int, size: int, weights: str, weight_dtype: str) -> FileFacts:
    options = {**loader_options(weight_dtype), "offload_device": torch.device("cpu")}
    if path.lower().endswith(GGUF_SUFFIX):
        return _gguf_facts(Path(path), options)
    checkpoint = inspect_checkpoint(path, weights=weights, quant_formats=comfy.quant_ops.QUANT_ALGOS)
    _require_countable(checkpoint.state_dict, path)
    checkpoint = _with_marks(replace(checkpoint, state_dict=_on_meta(checkpoint.state_dict)))
    with torch.device("meta"):
        model = host_model(checkpoint, options)
    return FileFacts(network=network_facts(model), provenance=checkpoint.info.provenance)


def _with_marks(checkpoint: Checkpoint) -> Checkpoint:
    """With a mark in each quantised layer: ComfyUI makes them from a header, and from a legacy float8 file's scales, by
    values, which no tensor has on the meta device."""
    # A scale of the input is looked at, too, and dropped where it is 1: it is one number a layer.
    state_dict = {key: value for key, value in checkpoint.state_dict.items() if not key.endswith(LEGACY_INPUT_SCALE)}
    metadata = dict(checkpoint.host_metadata)
    state_dict, _ = comfy.utils.convert_old_quants(state_dict, "", metadata=metadata)
    metadata.pop(QUANTIZATION_KEY, None)
    return replace(checkpoint, state_dict=state_dict, host_metadata=metadata)


def _gguf_facts(path: Path, options: dict) -> FileFacts:
    """Its weights stay packed in memory; what is computed is in ComfyUI's choice of format, as of any file."""
    header = read_gguf_header(path)
    named = {name.removeprefix("model.diffusion_model."): shape for name, shape in header.shapes.items()}
    _require_countable(named, path)
    depth = count_blocks(named, path.name)
    try:
        facts = network_facts(_gguf_model(named, depth, options))
    except Exception as error:  # ComfyUI recognises a Wan by some names and takes the rest for granted
        raise ValueError(
            f"weight file {path.name!r} is no whole Wan diffusion model ({first_line(error, 500)}); choose a Wan 2.1 "
            "file, or download it again."
        ) from error
    parameters = sum(prod(shape) for shape in named.values())
    network = replace(facts, weight_bytes=header.data_bytes, parameters=parameters)
    return FileFacts(network=network, provenance=Provenance())


def _require_countable(names: Collection[str], path: str | Path) -> None:
    if len(names) > MAX_TENSORS:
        raise ValueError(
            f"weight file {Path(path).name!r} is no Wan diffusion model: it has {len(names)} tensors, and none has "
            f"more than {MAX_TENSORS}; choose a Wan 2.1 file."
        )


def _gguf_model(shapes: Mapping[str, tuple[int, ...]], depth: int, options: dict) -> ModelPatcher:
    """ComfyUI's model of `depth` blocks of these shapes by Wan's names, or any error."""
    if lacks := expected_names(depth) - shapes.keys():
        raise ValueError(f"it lacks {listed(lacks)}")
    sizes = {"text_dim": shapes["text_embedding.0.weight"][-1], "freq_dim": shapes["time_embedding.0.weight"][-1]}
    with torch.device("meta"):
        model = comfy.sd.load_diffusion_model_state_dict(
            {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()},
            model_options=options,
            metadata={CONFIG_KEY: json.dumps({"transformer": sizes})},
        )
    if model is None:
        raise ValueError("ComfyUI knows no such model")
    return model


@lru_cache(maxsize=32)
def _decoder_facts(path: str, changed: int, size: int, frames: int, demo: bool) -> DecoderFacts:
    vae = load_demo_vae(Path(path)) if demo else _empty_vae(path)
    try:
        with stream_decoder(vae) as decoder:
            cell_bytes = decoder.memory_required((1, vae.latent_channels, frames, 1, 1))
    except RuntimeError as error:
        raise ValueError(f"{Path(path).name!r} cannot decode video: {first_line(error, 500)}") from error
    return DecoderFacts(weight_bytes=vae.patcher.model_size(), cell_bytes=cell_bytes)


@lru_cache(maxsize=32)
def _carrying_bytes(path: str, changed: int, size: int, frames: int, demo: bool) -> float:
    vae = load_demo_vae(Path(path)) if demo else _empty_vae(path)
    side = vae.spacial_compression_encode()
    decoded = (1, vae.latent_channels, max(TAIL_FRAMES, 1 + frames), 1, 1)
    encoded = (1, 3, 1 + TIME_FACTOR * frames, side, side)
    return max(vae.memory_used_decode(decoded, vae.vae_dtype), vae.memory_used_encode(encoded, vae.vae_dtype))


def _empty_vae(path: str) -> comfy.sd.VAE:
    file = read_weight_shapes(path)
    try:
        with torch.device("meta"):
            vae = comfy.sd.VAE(sd=_on_meta(file.tree), device=torch.device("cpu"))  # nothing is done on a GPU
    except Exception as error:  # ComfyUI recognises a VAE by some keys and takes the others for granted
        raise ValueError(f"{Path(path).name!r} is no VAE that ComfyUI can read: {first_line(error, 500)}") from error
    if vae.first_stage_model is None:
        raise ValueError(f"{Path(path).name!r} is no VAE that ComfyUI knows.")
    # The number format is that of the device it will run on; a CPU's is float32.
    vae.vae_dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), vae.working_dtypes)
    vae.first_stage_model.to(vae.vae_dtype)
    return vae


def _on_meta(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without storage, but for marks of quantised layers, whose values decide how a layer is made."""
    return {
        name: tensor
        if tensor.dtype == torch.uint8 and tensor.numel() <= MARK_ELEMENTS
        else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
