"""Motion for the chunk sampler: what DIAGONAL_OPTICAL_FLOW holds, and what it does to one run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diagonal_sampler.flow import NothingValid, OpticalFlow, carrying_device
from ..diagonal_sampler.flow_adapter import AdapterField, adapter_tokens
from ..diagonal_sampler.flow_noise import FlowNoise
from ..diagonal_sampler.flow_reference import DEFAULT_START_SIGMA, FlowReference, weaker_start
from ..diagonal_sampler.flow_timeline import FlowTimeline
from ..diagonal_sampler.frames import TIME_FACTOR
from ..diagonal_sampler.noise import NoiseSource, SeededNoise, send
from ..diagonal_sampler.sampler import Forward
from ..diagonal_sampler.schedule import DiagonalSchedule
from .loading import FLOW_ADAPTER_ATTACHMENT
from .vae_scale import decode, encode, require_fitting, warn_if_mistaken

log = logging.getLogger(__name__)

ADAPTER, REFERENCE, NOISE, ADAPTER_AND_BLEND = "adapter", "reference", "noise", "adapter+blend"
MODES = ("auto", ADAPTER, REFERENCE, NOISE, ADAPTER_AND_BLEND)
LAST_CHUNK = 0
"""Value of `last_chunk` that stands for the last one of the clip; chunks are counted from 1 for people."""
_EMBEDDING_PATH = "diffusion_model.patch_embedding.forward"
_TAIL = "tail"
# Any number will do: the noise that `degrade` mixes in must not be the noise that fills holes.
_OTHER_SEED = 0x9E37_79B9_7F4A_7C15


SETTINGS = ("mode", "strength", "start_sigma", "blend", "first_chunk", "last_chunk", "degrade")
"""What a FlowConditioning holds beside the motions and the VAE."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlowConditioning:
    """Motion, and how a run is to follow it.

    Attributes:
        optical_flow: of any size and length; fitted to the clip by the rules of `OpticalFlow.fit`.
        mode: adapter (weights in the checkpoint), reference (any model; needs the VAE), noise (models trained on warped
            noise), adapter+blend (the adapter, and reference's blend without its start; needs the VAE), or auto:
            adapter if the model has one, else reference.
        strength: in [0, 1]; 0 is as if nothing was connected.
        start_sigma: noise level in (0, 1] that a chunk of mode reference starts at with strength 1; see weaker_start.
        blend: in [0, 1], share of the carried frames in every prediction of a chunk but the last, in modes reference
            and adapter+blend; times strength.
        first_chunk, last_chunk: that follow it, counted from 1; LAST_CHUNK is to the end.
        degrade: in [0, 1], share of unmoved noise in mode noise.
        vae: of the model, for modes reference and adapter+blend.
        start: pixel frame of the video that `optical_flow` begins at; before it is what `earlier` says, or nothing.
        earlier: (start, motion) of those that come before it, each until the next begins; see FlowTimeline.

    Raises:
        ValueError: a value out of range, or starts that do not rise.
    """

    optical_flow: OpticalFlow
    mode: str = "auto"
    strength: float = 1.0
    start_sigma: float = DEFAULT_START_SIGMA
    blend: float = 1.0
    first_chunk: int = 1
    last_chunk: int = LAST_CHUNK
    degrade: float = 0.0
    vae: comfy.sd.VAE | None = None
    start: int = 0
    earlier: Sequence[tuple[int, OpticalFlow]] = ()

    def __post_init__(self) -> None:
        FlowTimeline(self.motions)
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}.")
        for name in ("strength", "blend", "degrade"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value}; it must be in [0, 1].")
        if not 0 < self.start_sigma <= 1:
            raise ValueError(f"start_sigma is {self.start_sigma}; it must be in (0, 1].")
        if self.first_chunk < 1 or (self.last_chunk != LAST_CHUNK and self.last_chunk < self.first_chunk):
            raise ValueError(
                f"first_chunk is {self.first_chunk} and last_chunk {self.last_chunk}; chunks are counted from 1, the "
                "last must not come before the first, and last_chunk 0 is to the end."
            )

    @property
    def motions(self) -> list[tuple[int, OpticalFlow]]:
        """(start, motion) of all, the last one's included."""
        return [*self.earlier, (self.start, self.optical_flow)]

    @property
    def timeline(self) -> FlowTimeline:
        """All motions as one."""
        return FlowTimeline(self.motions)

    def get_models(self) -> list[ModelPatcher]:
        """What ComfyUI is to keep in memory while a prompt runs that has this among its results."""
        return [] if self.vae is None else [self.vae.patcher]


class FlowEmbedding:
    """Stands in for `patch_embedding.forward` during one run and adds the current chunk's motion to its tokens.

    Args:
        original: what it replaces.
        weight, bias: [dim, 4, *patch] and [dim], of the checkpoint's `flow_embedding`.
        strength: factor on what is added.
    """

    def __init__(self, original: Callable, weight: Tensor, bias: Tensor, strength: float) -> None:
        self.original = original
        self.weight, self.bias, self.strength = weight, bias, strength
        self._tokens: Tensor | None = None

    def set(self, features: Tensor | None) -> None:
        """The motion of the chunk that comes next: [1, 4, frames, H, W] from `adapter_features`; None adds nothing."""
        if features is None:
            self._tokens = None
            return
        # Moved once: a run has an instance of its own.
        self.weight, self.bias = (send(tensor.float(), features.device) for tensor in (self.weight, self.bias))
        self._tokens = self.strength * adapter_tokens(features, self.weight, self.bias)

    # Always eager, as the attention is: a compiled graph would keep the first chunk's motion.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.original(x, *args, **kwargs)
        if self._tokens is None:
            return out
        if out.shape[2:] != self._tokens.shape[2:]:
            raise ValueError(
                f"The optical-flow adapter has motion for {tuple(self._tokens.shape[2:])} tokens and the model was "
                f"given {tuple(out.shape[2:])}: an area of the picture cannot follow it. Remove ConditioningSetArea, "
                "or use mode reference."
            )
        return out + self._tokens.to(out)


class FlowRun:
    """One run's motion. The sampler asks it for a schedule, a source, noise and a blend; no mode changes all.

    Args:
        conditioning: what a person set.
        model: the run's own clone of the MODEL; mode adapter patches it.
        shape: [B, C, T, H, W] of the latent.
        schedule: the usual one.
        counts: latent frames of each chunk.
        given_frames: latent frames that the clip begins with.
        denoise: below 1 every chunk starts from the latent, which mode reference cannot be combined with.

    Raises:
        ValueError: what cannot be combined, a VAE that does not fit, or a clip in which nothing can follow.

    Attributes:
        mode: the one that auto chose.
        schedule: the run's.
    """

    def __init__(
        self,
        conditioning: FlowConditioning,
        model: ModelPatcher,
        shape: Sequence[int],
        schedule: DiagonalSchedule,
        counts: Sequence[int],
        *,
        given_frames: int = 0,
        denoise: float = 1.0,
    ) -> None:
        self._settings, self._model, self._motion = conditioning, model, conditioning.timeline
        self._shape, self._counts, self._given = tuple(shape), list(counts), given_frames
        adapter = model.get_attachment(FLOW_ADAPTER_ATTACHMENT)
        self.mode = _choose_mode(conditioning, adapter is not None)
        self.schedule = schedule
        self._first = conditioning.first_chunk - 1
        self._last = len(counts) - 1 if conditioning.last_chunk == LAST_CHUNK else conditioning.last_chunk - 1
        self._reference: FlowReference | None = None
        self._noise: FlowNoise | None = None
        self._embedding: FlowEmbedding | None = None
        self._adapter_field: AdapterField | None = None
        self._told: tuple[int, int, bool] | None = None  # the frames whose motion the embedding has
        self._loaded: int | None = None  # bytes of the sampling model on its device before the VAE was used
        latent_format = model.get_model_object("latent_format")
        ratio = latent_format.spacial_downscale_ratio
        _, _, frames, height, width = self._shape
        if frames < 2:
            longer = "Use a length of more than one chunk." if self.mode == REFERENCE else "Use a length of 5."
            raise ValueError(f"The video has one latent frame (one pixel frame): nothing moves in it. {longer}")
        if self._first >= len(counts):
            raise ValueError(
                f"first_chunk is {conditioning.first_chunk}, but the video has {len(counts)} "
                f"chunk{'s' * (len(counts) > 1)}, so that none follows the motion; use {len(counts)} at most, or a "
                "longer video."
            )
        self._steps = TIME_FACTOR * (frames - 1)
        _warn_about_fit(self._motion, self._steps, height * ratio, width * ratio)
        if self.mode == REFERENCE:
            if denoise < 1:
                raise ValueError(
                    f"denoise is {denoise}, so chunks start from the latent, and optical flow in mode reference starts "
                    "them from the carried frames. Use denoise 1, or mode adapter or noise."
                )
            if any(row[0] < 1 for row in schedule.sigmas):
                raise ValueError(
                    "The schedule starts a chunk below sigma 1, and optical flow in mode reference starts chunks from "
                    "the carried frames itself (start_sigma). Begin every row of sigmas with 1, or use mode adapter or "
                    "noise."
                )
        if self.mode in (REFERENCE, ADAPTER_AND_BLEND):
            assert conditioning.vae is not None
            require_fitting(conditioning.vae, latent_format)
            warn_if_mistaken(conditioning.vae)
            start_sigma = weaker_start(conditioning.start_sigma, conditioning.strength, schedule.shift)
            self._reference = FlowReference(
                self._motion.fit(self._steps, height * ratio, width * ratio),
                schedule,
                counts,
                decode=self._decode,
                encode=self._encode,
                given_frames=given_frames,
                start_sigma=start_sigma if self.mode == REFERENCE else 1.0,
                blend=conditioning.blend * conditioning.strength,
                first_chunk=self._first,
                last_chunk=self._last,
            )
            if self.starts_chunks:
                self.schedule = self._reference.schedule
        if adapter is not None and self.mode in (ADAPTER, ADAPTER_AND_BLEND):
            self._adapter_field = AdapterField(self._motion.fit(self._steps), height, width)
            original = model.get_model_object(_EMBEDDING_PATH)
            while isinstance(original, FlowEmbedding):  # of an earlier run
                original = original.original
            self._embedding = FlowEmbedding(original, *adapter, conditioning.strength)
            model.add_object_patch(_EMBEDDING_PATH, self._embedding)
        if not self._any_follows():
            log.warning("The optical flow changes nothing in this video: %s", self._why_none_follows())

    def _any_follows(self) -> bool:
        if self._reference is not None and self.mode == REFERENCE:
            return self._reference.follows
        starts = accumulate(self._counts, initial=self._given)
        for chunk, (start, count) in enumerate(zip(starts, self._counts, strict=False)):
            first, end = max(0, TIME_FACTOR * (start - 1)), max(1, TIME_FACTOR * (start + count - 1))
            if self._first <= chunk <= self._last and self._motion.told(first, end - first):
                return True
        return False

    def _why_none_follows(self) -> str:
        if self.mode == REFERENCE and not self._given and len(self._counts) == 1:
            return (
                "it has one chunk, and mode reference carries the last frame of the one before. Use a longer video, "
                "give the sampler context, or use mode adapter."
            )
        if self.mode == REFERENCE and not self._given and self._last == 0:
            return (
                f"last_chunk is {self._settings.last_chunk}, and mode reference carries the last frame of the chunk "
                "before, which the first one lacks. Set last_chunk to 2 or more, or to 0."
            )
        least = "half of a chunk" if self.mode == REFERENCE else "a step"
        return (
            f"it has {self._motion.steps} steps, and commands not even {least} where chunks may follow. "
            "Give a longer motion or mask, or look at first_chunk and last_chunk."
        )

    def noise(self, draws: NoiseSource, seed: int, rows: Sequence[int] | None = None) -> NoiseSource:
        """The run's noise: moved in mode noise, `draws` otherwise. rows: SeededNoise's."""
        if self.mode != NOISE:
            return draws
        log.warning(
            "Optical flow in mode noise is for models and LoRAs that were trained on warped noise; any other model "
            "hardly follows it. Use mode reference instead."
        )
        batch, channels, frames, height, width = self._shape
        small = self._motion.fit(self._steps, height, width)
        try:
            small = small.composed()
        except NothingValid as error:
            log.warning("The optical flow changes nothing in this video: %s Give a longer motion or mask.", error)
            return draws
        self._noise = FlowNoise(
            draws,
            small,
            self._counts,
            start_frame=self._given,
            first_chunk=self._first,
            last_chunk=self._last,
            degrade=1 - self._settings.strength * (1 - self._settings.degrade),
            other=SeededNoise(seed ^ _OTHER_SEED, (batch, channels, height, width), rows=rows),
        )
        return self._noise

    @property
    def starts_chunks(self) -> bool:
        """Whether `source` replaces the latent that chunks start from, and `schedule` the usual one."""
        return self.mode == REFERENCE

    @property
    def keeps_levels(self) -> bool:
        """Whether chunks have the usual schedule's levels, and noise of their own: a new prompt may begin it anew."""
        return self.mode in (ADAPTER, ADAPTER_AND_BLEND)

    def source(self, start_frame: int, frames: int) -> Tensor:
        """See FlowReference.source."""
        assert self._reference is not None
        carried = self._reference.source(start_frame, frames)
        self._load_again()
        return carried

    def before(self, at: Forward, device: torch.device) -> None:
        """To be called before every forward."""
        follows = self._first <= at.chunk <= self._last
        told = (at.start_frame, at.frames, follows)
        if self._embedding is None or told == self._told:
            return  # the motion of a chunk is the same at all of its forwards
        assert self._adapter_field is not None
        self._told = told
        if follows:
            features = self._adapter_field.features(at.start_frame, at.frames, carrying_device(device))
            self._embedding.set(features.to(device))
        else:
            self._embedding.set(None)

    def after(self, denoised: Tensor, at: Forward, mask: Tensor | None = None) -> Tensor:
        """The prediction of a forward, changed where the mode says so.

        Args:
            denoised: [B, C, n, H, W].
            mask: the chunk's denoise mask, which broadcasts to it: 0 where nothing may change, 1 where all may.
        """
        if self._reference is None:
            return denoised
        blended = self._reference.blend(denoised, at, mask)
        self._load_again()
        return blended

    def finished(self, latents: Tensor) -> None:
        """To be called with the given context, and with every finished chunk, [B, C, n, H, W] in the model's space."""
        if self._reference is not None:
            self._reference.finished(latents)

    def snapshot(self) -> dict[str, Tensor]:
        """What a later run needs beside the settings to go on after the last finished chunk."""
        if self._noise is not None:
            return self._noise.snapshot()
        tail = None if self._reference is None else self._reference.tail
        return {} if tail is None else {_TAIL: tail}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Goes on after a `snapshot`, of which it keeps copies."""
        if self._noise is not None:
            self._noise.restore({name: tensor.clone() for name, tensor in tensors.items()})
        if self._reference is not None and _TAIL in tensors:
            self._reference.finished(tensors[_TAIL].to(device, copy=True))

    def free(self) -> None:
        """Drop what the run held, also when it failed."""
        self._reference = None
        if self._embedding is not None:
            self._embedding.set(None)

    def _decode(self, latents: Tensor) -> Tensor:
        """FlowReference's decode."""
        vae = self._settings.vae
        assert vae is not None
        if self._loaded is None:
            self._loaded = self._model.loaded_size()
        images = decode(vae, self._model.model.process_latent_out(latents.float()))
        images = images.reshape(latents.shape[0], -1, *images.shape[-3:])  # [B, T, H, W, 3]
        return images[..., :3].movedim(-1, 1).to(carrying_device(latents.device), torch.float32)

    def _encode(self, frames: Tensor) -> Tensor:
        """FlowReference's encode."""
        vae = self._settings.vae
        assert vae is not None
        latents = torch.cat([encode(vae, clip.movedim(0, -1)) for clip in frames])
        return self._model.model.process_latent_in(latents.to(frames.device))

    def _load_again(self) -> None:
        """Has the sampling model back before the next forward, if the VAE pushed it out of memory."""
        if self._loaded is None:
            return
        resident = any(loaded is self._model for loaded in comfy.model_management.loaded_models())
        if not resident or self._model.loaded_size() < self._loaded:
            load_for_chunk(self._model, (*self._shape[:2], max(self._counts), *self._shape[3:]))
        self._loaded = None


def load_for_chunk(model: ModelPatcher, shape: Sequence[int]) -> None:
    """Have ComfyUI load the MODEL in the middle of a run with the memory that a forward takes, as its guider did before
    the run; the keys and values are there already.

    Args:
        shape: [B, C, T, H, W] of a chunk's latents.
    """
    most, least = comfy.sampler_helpers.estimate_memory(model, list(shape), {})
    comfy.model_management.load_models_gpu([model], memory_required=most, minimum_memory_required=least)


def _choose_mode(conditioning: FlowConditioning, has_adapter: bool) -> str:
    mode = conditioning.mode
    if mode == "auto":
        mode = ADAPTER if has_adapter else REFERENCE
    if mode in (ADAPTER, ADAPTER_AND_BLEND) and not has_adapter:
        raise ValueError(
            f"The optical flow's mode is {mode}, but the model's checkpoint has no adapter (flow_embedding.weight). "
            "Use mode reference, or a checkpoint with an adapter and a loader of this pack."
        )
    if mode in (REFERENCE, ADAPTER_AND_BLEND) and conditioning.vae is None:
        raise ValueError(
            f"The optical flow is followed in mode {mode}, which decodes and encodes frames: connect the model's VAE "
            "to Diagonal Flow Conditioning."
        )
    return mode


def _warn_about_fit(timeline: FlowTimeline, steps: int, height: int, width: int) -> None:
    used = [(start, motion) for start, motion in timeline.motions if start < steps]
    for start, _ in timeline.motions[len(used) :]:
        log.warning("The motion that begins at pixel frame %d is not used: the video has %d.", start, steps + 1)
    if not used:
        return
    start, last = used[-1]
    end = start + last.steps
    # A mask or a painting a pixel frame has one more than there are motions, and none too many.
    if last.steps > 1 and end not in (steps, steps + 1):
        what = "the rest of it is not used" if end > steps else "the end of the video is free"
        log.warning("The optical flow has %d steps and the video %d; %s.", end, steps, what)
    for size in dict.fromkeys((motion.height, motion.width) for _, motion in used):
        if size[0] * width != size[1] * height:
            log.warning(
                "The optical flow is %dx%d and the video %dx%d, of another shape; its motion is stretched with it.",
                size[1],
                size[0],
                width,
                height,
            )
