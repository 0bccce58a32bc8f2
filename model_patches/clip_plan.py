"""Sizes of one run, settled and checked before anything is allocated, and the memory that ComfyUI is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diagonal_sampler.frames import nearest_sizes
from ..diagonal_sampler.memory import ClipSize, keys_values_bytes, text_bytes
from ..diagonal_sampler.sampler import count_chunks, count_forwards, split_frames
from ..diagonal_sampler.schedule import DiagonalSchedule
from ..diagonal_sampler.settings import GLOBAL_WINDOW, TRAINED_LATENT_FRAMES, CausalSettings
from .causal import causal_settings
from .context_frames import ContextFrames
from .memory import network_facts

log = logging.getLogger(__name__)

MAX_TIMESTEP = 1000
"""What a Wan network is given at sigma 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """Sizes of one run, known before anything is allocated.

    Attributes:
        shape: [B, C, T, H, W] of the latent.
        settings: the model's, with the frames per chunk of this run.
        schedule: the noise levels of this run.
        given: frames that the clip begins with, or None.
    """

    shape: tuple[int, int, int, int, int]
    settings: CausalSettings
    schedule: DiagonalSchedule
    given: ContextFrames | None = None

    @property
    def context_frames(self) -> int:
        """Latent frames that are given."""
        return 0 if self.given is None else self.given.latent.shape[2]

    @property
    def made_frames(self) -> list[int]:
        """Latent frames of each chunk that is made."""
        return split_frames(self.shape[2] - self.context_frames, self.settings.frames_per_chunk)

    @property
    def chunks(self) -> int:
        """That are made."""
        return count_chunks(self.shape[2] - self.context_frames, self.settings.frames_per_chunk)

    @property
    def forwards(self) -> int:
        """Forwards of the run, cache passes included."""
        return count_forwards(self.schedule, self.shape[2], self.settings.frames_per_chunk, self.context_frames)

    def cache_bytes(self, model: ModelPatcher, text_tokens: Sequence[int]) -> int:
        """Bytes of keys and values, of the window and of the text. text_tokens: of each condition's prompt."""
        network = network_facts(model, count_weights=False)
        batch, _, frames, rows, columns = self.shape
        clip = ClipSize(settings=self.settings, frames=frames, rows=rows, columns=columns, batch=batch)
        window = keys_values_bytes(network, replace(clip, conditions=len(text_tokens)))
        return window + sum(text_bytes(network, replace(clip, text_tokens=tokens)) for tokens in text_tokens)


def plan_clip(
    model: ModelPatcher, shape: tuple[int, ...], schedule: DiagonalSchedule, context: ContextFrames | None = None
) -> ClipPlan:
    """Check sizes and settle what model and schedule say of the chunk.

    Args:
        context: frames that the clip begins with, of one video or of as many as the batch has.

    Raises:
        ValueError: a MODEL that is not causal or counts noise levels in another way, a latent size that does not fit, a
            context that does not, or a KV cache larger than all memory of the device.
    """
    settings = causal_settings(model)
    if settings is None:
        raise ValueError(
            "The MODEL is not causal: it cannot be sampled chunk by chunk. Load it with Diagonal Model Loader, or put "
            "Diagonal Causal Attention behind your loader."
        )
    wanted = schedule.frames_per_chunk
    if wanted is not None and wanted != settings.frames_per_chunk:
        log.warning(
            "The schedule asks for %d latent frames a chunk, the model was set to %d; the schedule's are used.",
            wanted,
            settings.frames_per_chunk,
        )
        settings = replace(settings, frames_per_chunk=wanted)
    _require_timesteps(model)
    _require_size(model, shape)
    given = _initial_latent(model)
    if given is not None and context is not None:
        raise ValueError("ARVideoI2V's start image and context frames both begin the clip; remove one of them.")
    given = context if given is None else ContextFrames(latent=given)
    if given is not None:
        _require_context(model, shape, given.latent)
    plan = ClipPlan(shape=tuple(shape), settings=settings, schedule=schedule, given=given)
    _require_memory(model, plan)
    _warn_beyond_training(model, plan)
    return plan


def _require_timesteps(model: ModelPatcher) -> None:
    """A node may replace how a noise level becomes the number that the network is given."""
    top = float(model.get_model_object("model_sampling").timestep(torch.ones(1)))
    if abs(top - MAX_TIMESTEP) > 0.5:
        raise ValueError(
            f"The MODEL's sampling counts noise levels up to {top:g}, and a Wan model was trained with {MAX_TIMESTEP}: "
            "its output would be wrong. Remove the node that changes the sampling (ModelSamplingAuraFlow, "
            "ModelSamplingFlux or the like); the shift is set in Diagonal Schedule."
        )


def _require_context(model: ModelPatcher, shape: tuple[int, ...], given: Tensor) -> None:
    if given.ndim != 5 or given.shape[1] != shape[1]:
        raise ValueError(
            f"The given frames are a latent of shape {tuple(given.shape)}, the video's has {shape[1]} channels: encode "
            "them with the model's own VAE."
        )
    if given.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"The given frames are of {given.shape[0]} videos and the latent has {shape[0]}; give those of one video, "
            "or as many as the latent has."
        )
    if given.shape[2] >= shape[2]:
        raise ValueError(
            f"The latent has {shape[2]} latent frames and the given frames take {given.shape[2]}: nothing is left to "
            "make. Use a longer length."
        )
    if given.shape[3:] != tuple(shape[3:]):
        ratio = model.get_model_object("latent_format").spacial_downscale_ratio
        want, got = (f"{size[4] * ratio}x{size[3] * ratio}" for size in (shape, given.shape))
        raise ValueError(
            f"The start image is {got} but the video is {want}; scale it to {want} or set the video's width and height."
        )


def _require_size(model: ModelPatcher, shape: tuple[int, ...]) -> None:
    channels = model.get_model_object("latent_format").latent_channels
    if len(shape) != 5 or shape[1] != channels:
        raise ValueError(
            f"The latent has shape {tuple(shape)}; a causal Wan model needs [batch, {channels}, frames, height, "
            "width]. Use Empty AR Video Latent, EmptyHunyuanLatentVideo or VAE Encode with the Wan VAE."
        )
    network = model.get_model_object("diffusion_model")
    for name, size, patch in (("height", shape[3], network.patch_size[1]), ("width", shape[4], network.patch_size[2])):
        if size % patch:
            scale = model.get_model_object("latent_format").spacial_downscale_ratio
            down, up = nearest_sizes(size, patch)
            raise ValueError(
                f"The {name} is {size * scale} pixels ({size} in the latent); it must be a multiple of "
                f"{patch * scale}. The nearest that fit are {down * scale} and {up * scale}."
            )


def _warn_beyond_training(model: ModelPatcher, plan: ClipPlan) -> None:
    """Positions that count from the clip's start leave those that Wan was trained on where the clip is longer."""
    frames = plan.shape[2]
    scale = (model.model_options["transformer_options"].get("rope_options") or {}).get("scale_t", 1.0)
    if plan.settings.window_positions(frames) or (frames - 1) * scale <= TRAINED_LATENT_FRAMES - 1:
        return
    remedy = "window 12 and sink 3" if plan.settings.window == GLOBAL_WINDOW else "positions to auto"
    log.warning(
        "The video has %d latent frames, whose positions count from its start, and Wan 2.1 was trained on %d (81 pixel "
        "frames): behind them the picture may fall apart. Set %s on the causal model, or make a shorter video.",
        frames,
        TRAINED_LATENT_FRAMES,
        remedy,
    )


def _require_memory(model: ModelPatcher, plan: ClipPlan) -> None:
    """Refuse at once what could never be held: the KV cache stays on the device for the whole run."""
    if getattr(comfy.model_management, "directml_enabled", False):  # ComfyUI says 1 GiB of any such device
        return
    has = comfy.model_management.get_total_memory(model.load_device)
    needs = plan.cache_bytes(model, text_tokens=(0,))
    if needs <= has:
        return
    latent_format = model.get_model_object("latent_format")
    network = model.get_model_object("diffusion_model")
    frames = plan.settings.capacity(plan.shape[2])
    fitting = int(frames * has / needs)
    ratio, shrink = latent_format.spacial_downscale_ratio, (has / needs) ** 0.5
    height, width = (size * ratio for size in plan.shape[3:])
    smaller = (
        max(step, int(size * shrink) // step * step)
        for size, step in ((width, network.patch_size[2] * ratio), (height, network.patch_size[1] * ratio))
    )
    window = f"a window of {fitting} latent frames at {width}x{height}, or "
    raise ValueError(
        f"The KV cache of {frames} latent frames at {width}x{height} needs {needs / 1e9:,.1f} GB and the device has "
        f"{has / 1e9:,.1f} GB in all. What would fit: "
        f"{window if fitting >= plan.settings.sink + plan.settings.frames_per_chunk else ''}"
        f"{'x'.join(map(str, smaller))} pixels with {frames} latent frames. Set window on the causal model, or the "
        "video's size."
    )


def _initial_latent(model: ModelPatcher) -> Tensor | None:
    """The start image of ComfyUI's ARVideoI2V: [B, C, n, H, W], before the latent format's scaling."""
    return model.model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")


class _CacheMemory:
    """Stands in the conditionings where ComfyUI asks ControlNets for the memory they need while sampling."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.extra_hooks = None
        self.previous_controlnet = None

    def get_models(self) -> list:
        return []

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return self.nbytes


def memory_request(plan: ClipPlan, cache_bytes: int) -> Callable:
    """PREPARE_SAMPLING wrapper: asks for one chunk and the KV window, where ComfyUI would ask for the whole clip."""

    def wrapper(executor, model, noise_shape, conds, *args, **kwargs):
        chunk = (*noise_shape[:2], plan.settings.frames_per_chunk, *noise_shape[3:])
        asking = {**conds, "diagonal_cache": [{"control": _CacheMemory(cache_bytes)}]}
        real_model, _, models = executor(model, chunk, asking, *args, **kwargs)
        return real_model, conds, models

    return wrapper
