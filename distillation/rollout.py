"""Self rollout: the student makes a clip with the sampler's own loop, and learns from a gradient on that clip.

A rollout runs twice. The first pass, without gradient, makes the clip that the losses see. The second replays it from
the same noise and, in each chunk's exit forward, goes back at once with the loss's gradient on that chunk. Exactly one
chunk's graph exists at a time, so memory is bounded by the window however long the rollout is, and activation
checkpointing is safe: a block is recomputed before the cache moves on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagonal_sampler.cache import ConditionKV, KVCache
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.noise import CONTEXT_STEP, NoiseSource, SeededNoise, send
from diagonal_sampler.sampler import Forward, sample_chunks
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings
from distillation.common import autocast
from distillation.losses import guided


def sample_seed(seed: int, *place: object) -> int:
    """The seed of one clip of one update: the same whatever rank treats it and however a batch is split."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class BatchNoise:
    """A NoiseSource of a batch whose clips each have a seed of their own.

    Args:
        seeds: one a clip.
        shape: (C, H, W) of a latent frame.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> None:
        self.sources = [SeededNoise(seed, (1, *shape)) for seed in seeds]
        self.device = device

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        # One copy to the device, not one a clip, and none that waits for it.
        return send(torch.cat([source(chunk, step, frames) for source in self.sources]), self.device)


def exit_steps(schedule: DiagonalSchedule, chunks: int, seed: int, *, last: bool = False) -> list[int]:
    """The exit step of every chunk of an update, the same on every rank because it follows from the seed alone.

    One uniform number decides for all chunks: exit = floor(u * steps), so a clip's chunks are about equally far.

    Args:
        seed: of the update.
        last: always the last step.
    """
    u = 1 - 1e-9 if last else float(torch.rand((), generator=torch.Generator().manual_seed(seed >> 1)))
    return [int(u * schedule.steps(chunk)) for chunk in range(chunks)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One micro-batch's clip: what is needed to make it, and to make it again.

    Attributes:
        schedule, settings: as at inference.
        frames: latent frames of the whole rollout.
        noise: the same at every call.
        context: [B, tokens, text_dim] text embedding.
        exits: the exit step of each chunk.
        first_frame, last_frame: the window, in latent frames, that losses see and gradients reach; whole chunks.
        precision: bf16 autocast or float32.
        sink_frames: latent frames at the rollout's start, all before the window, that the scores see with it.
        optical_flow: [B, 4, frames, H, W] what the adapter is given, or None.
        given: [B, C, n, H, W] finished latents that the rollout begins with, all before the window; or None.
    """

    schedule: DiagonalSchedule
    settings: CausalSettings
    frames: int
    noise: BatchNoise
    context: Tensor
    exits: Sequence[int]
    first_frame: int
    last_frame: int
    precision: torch.dtype
    sink_frames: int = 0
    optical_flow: Tensor | None = None
    given: Tensor | None = None

    @property
    def seen_flow(self) -> Tensor | None:
        """The flow of the latent frames that scores see."""
        if self.optical_flow is None:
            return None
        window = self.optical_flow[:, :, self.first_frame : self.last_frame]
        return torch.cat([self.optical_flow[:, :, : self.sink_frames], window], dim=2)

    @torch.no_grad()
    def clip(self, network: WanDiT) -> tuple[Tensor, Tensor]:
        """The finished sink [B, C, sink_frames, H, W], and the denoised of the exit steps inside the window, [B, C,
        last_frame - first_frame, H, W]; float32."""
        frames = (self.sink_frames, self.last_frame - self.first_frame)
        sink, window = self._run(network, None).split(frames, dim=2)
        return sink, window

    def backward(self, network: WanDiT, gradient: Tensor) -> None:
        """Replays the rollout and adds to the parameters' gradients what `gradient` on `clip` asks for.

        Args:
            gradient: [B, C, last_frame - first_frame, H, W], of a loss with respect to the window of `clip`.
        """
        with torch.enable_grad():
            self._run(network, gradient)

    def _run(self, network: WanDiT, gradient: Tensor | None) -> Tensor:
        def denoise(x: Tensor, at: Forward) -> Tensor:
            # Of the last chunk only the exit is seen, by the losses: no later chunk reads what is written behind it.
            is_last = at.start_frame + at.frames >= self.last_frame
            if is_last and (at.step == CONTEXT_STEP or at.step > self.exits[at.chunk]):
                return x
            inside = self.first_frame <= at.start_frame < self.last_frame
            with torch.set_grad_enabled(torch.is_grad_enabled() and inside):
                x0 = predict_x0(
                    network,
                    x,
                    at.sigma,
                    self.context,
                    self.precision,
                    cache=cache.condition("positive"),
                    optical_flow=flow_of(self.optical_flow, at),
                )
            if gradient is not None and x0.requires_grad:
                start = at.start_frame - self.first_frame
                x0.backward(gradient[:, :, start : start + at.frames].to(x0.dtype))
            return x0.detach()

        cache = KVCache(self.settings, self.frames)
        try:
            chunks = sample_chunks(
                denoise,
                self.noise,
                self.schedule,
                cache,
                frames=self.frames,
                frames_per_chunk=self.settings.frames_per_chunk,
                context=self.given,
                exit_step=lambda chunk: self.exits[chunk],
            )
            clips = [] if self.given is None else [self.given[:, :, : self.sink_frames]]
            for chunk in chunks:
                if chunk.start_frame < self.sink_frames:
                    clips.append(chunk.latents)
                elif self.first_frame <= chunk.start_frame < self.last_frame:
                    clips.append(chunk.exit_latents)
                if chunk.start_frame + chunk.latents.shape[2] >= self.last_frame:
                    break  # nothing after the window is seen by a loss
            return torch.cat(clips, dim=2)
        finally:
            cache.free()


def flow_of(optical_flow: Tensor | None, at: Forward) -> Tensor | None:
    """The part of a clip's flow [B, 4, T, H, W] that a forward's chunk sees."""
    return None if optical_flow is None else optical_flow[:, :, at.start_frame : at.start_frame + at.frames]


def predict_x0(
    network: WanDiT,
    x: Tensor,
    sigma: Tensor | float,
    context: Tensor,
    precision: torch.dtype,
    *,
    cache: ConditionKV | None = None,
    settings: CausalSettings | None = None,
    optical_flow: Tensor | None = None,
) -> Tensor:
    """x0 = x - sigma * flow, in float32.

    Args:
        x: [B, C, T, H, W] noisy latent.
        sigma: one number, [B] or [B, T].
        settings: how a whole-clip forward looks back; None is bidirectional.
        optical_flow: motion of the same latent frames, see WanDiT.forward.
    """
    if isinstance(sigma, Tensor):
        sigma = sigma.to(x.device, torch.float32)
    else:  # filled on the device: the copy of a number would wait for all that is queued there
        sigma = torch.full((), sigma, dtype=torch.float32, device=x.device)
    sigma = sigma.expand(x.shape[0]) if sigma.ndim == 0 else sigma
    # Passed only where there is one: networks in wrappers need not know the argument.
    options = {} if optical_flow is None else {"optical_flow": optical_flow}
    if settings is not None:
        options |= {
            "frames_per_chunk": settings.frames_per_chunk,
            "window": settings.window,
            "sink": settings.sink,
        }
    with autocast(x.device, precision):
        flow = network(x, 1000 * sigma, context, cache=cache, **options)
    return x - spread_sigma(sigma) * flow.float()


@torch.no_grad()
def stream(
    network: WanDiT,
    context: Tensor | Callable[[], Tensor],
    noise: NoiseSource,
    schedule: DiagonalSchedule,
    settings: CausalSettings,
    frames: int,
    *,
    precision: torch.dtype,
    cfg: float = 1.0,
    negative: Tensor | None = None,
    optical_flow: Tensor | None = None,
    watch: Callable[[Tensor, Forward], None] | None = None,
    source: Callable[[int, int], Tensor] | None = None,
    recache: Callable[[int], bool] | None = None,
    cut: Callable[[int], bool] = lambda chunk: False,
    after: Callable[[Tensor, Forward], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Samples a clip as at inference and yields its chunks, [B, C, frames_per_chunk, H, W] each.

    Args:
        context: [B, tokens, text_dim], or a function that gives it in every forward.
        negative: [1, tokens, text_dim], needed where cfg is not 1.
        optical_flow: [B, 4, frames, H, W] what the adapter is given, with both; or None.
        watch: sees the input of every forward.
        source, recache, cut: of `sample_chunks`.
        after: (x0, forward) -> the x0 to go on with, of every forward.
    """
    cache = KVCache(settings, frames)
    alone = frames <= settings.frames_per_chunk  # one chunk: nobody would read its keys and values

    def denoise(x: Tensor, at: Forward) -> Tensor:
        if watch is not None:
            watch(x, at)
        flow = flow_of(optical_flow, at)

        def predict(text: Tensor, name: str) -> Tensor:
            seen = None if alone else cache.condition(name)
            return predict_x0(network, x, at.sigma, text, precision, cache=seen, optical_flow=flow)

        x0 = predict(context() if callable(context) else context, "positive")
        if cfg != 1:
            assert negative is not None
            x0 = guided(x0, predict(negative.expand(len(x), -1, -1), "negative"), cfg)
        return x0 if after is None else after(x0, at)

    size = settings.frames_per_chunk
    try:
        for chunk in sample_chunks(
            denoise,
            noise,
            schedule,
            cache,
            frames=frames,
            frames_per_chunk=size,
            source=source,
            recache=recache,
            cut=cut,
        ):
            yield chunk.latents
    finally:
        cache.free()


def spread_sigma(sigma: Tensor) -> Tensor:
    """[B] or [B, T] noise levels, shaped to broadcast over latents [B, C, T, H, W]."""
    return sigma[:, None, :, None, None] if sigma.ndim == 2 else sigma[:, None, None, None, None]
