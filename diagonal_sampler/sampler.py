"""The chunk iterator: one loop for the ComfyUI node and for the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .cache import KVCache
from .noise import CONTEXT_STEP, INITIAL_STEP, NoiseSource
from .schedule import DiagonalSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Where a forward stands: chunk index, latent frames, step index, its noise level and how it is used.

    `step` is CONTEXT_STEP for a forward that only writes keys and values.
    """

    chunk: int
    start_frame: int
    frames: int
    step: int
    steps: int
    sigma: float


class Denoise(Protocol):
    """The model as the loop sees it: the prediction of x0. It writes the chunk's keys and values as a side effect."""

    def __call__(self, x: Tensor, forward: Forward, /) -> Tensor:
        """Predict x0 [B, C, frames, H, W] from `x`, the same shape, at noise level `forward.sigma`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A finished chunk.

    Attributes:
        index: counted from 0, chunks of given context excluded.
        start_frame: latent frames before it, context included.
        latents: [B, C, frames, H, W] the last denoised.
        exit_latents: the denoised of the exit step, with gradients, when an exit step was asked for.
    """

    index: int
    start_frame: int
    latents: Tensor
    exit_latents: Tensor | None = None


def split_frames(frames: int, frames_per_chunk: int) -> list[int]:
    """Latent frames of each chunk; the last may be shorter."""
    starts = range(0, count_chunks(frames, frames_per_chunk) * frames_per_chunk, frames_per_chunk)
    return [min(frames_per_chunk, frames - start) for start in starts]


def count_chunks(frames: int, frames_per_chunk: int) -> int:
    """Chunks of so many latent frames."""
    if frames_per_chunk < 1:
        raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be at least 1 latent frame.")
    return max(0, -(-frames // frames_per_chunk))


def count_forwards(schedule: DiagonalSchedule, frames: int, frames_per_chunk: int, context_frames: int = 0) -> int:
    """Forwards of a run over `frames` latent frames, of which `context_frames` are given: the nfe of sample_chunks."""
    made, given = (count_chunks(each, frames_per_chunk) for each in (frames - context_frames, context_frames))
    return schedule.nfe(made) + schedule.given_forwards * given


def count_recache(
    cache: KVCache,
    schedule: DiagonalSchedule,
    frames: int,
    frames_per_chunk: int,
    chunk: int,
    context_frames: int = 0,
    cut: int | None = None,
) -> int:
    """Forwards that writing the window again costs before chunk `chunk`, counted from 0 (see `recache`).

    The same work for a clip of any length. The arguments are those of count_forwards; cut is the last chunk before this
    one that was cut to, None without one.
    """
    start = context_frames + chunk * frames_per_chunk
    origin = 0 if cut is None else context_frames + cut * frames_per_chunk
    found = 0
    for run in cache.kept_before(start, min(frames_per_chunk, frames - start), origin):
        given = range(run.start, min(run.stop, context_frames))
        made = range(max(run.start, context_frames) - context_frames, run.stop - context_frames)
        found += schedule.given_forwards * _pieces_in(given, frames_per_chunk) + _pieces_in(made, frames_per_chunk)
    return found


def _pieces_in(run: range, size: int) -> int:
    """How many pieces of `size` frames, laid end to end from frame 0 on, a run of frames touches."""
    return (run.stop - 1) // size - run.start // size + 1 if run else 0


def _overlap(run: range, start: int, frames: int) -> slice | None:
    """Which of a piece's frames lie in a run, counted inside the piece; None if none do."""
    low, high = max(run.start, start), min(run.stop, start + frames)
    return slice(low - start, high - start) if low < high else None


def mix(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Rectified flow: (1 - sigma) * x0 + sigma * noise."""
    return (1.0 - sigma) * x0 + sigma * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class _History:
    """How finished latents [B, C, n, H, W] enter the cache: in forwards that only write keys and values.

    Attributes:
        given: latent frames of the context.
        finished: latents by start_frame, those that a window may still see, for `write_again`; None keeps none.
    """

    denoise: Denoise
    noise: NoiseSource
    schedule: DiagonalSchedule
    cache: KVCache
    frames_per_chunk: int
    given: int
    schedule_row: Callable[[int], int]
    finished: dict[int, Tensor] | None

    def write(self, x0: Tensor, chunk: int, sigma: float, at: int, draw: int, rows: slice = slice(None)) -> Tensor:
        """Write the open chunk at a noise level; the model's prediction.

        Args:
            at: latent frames before `x0`.
            draw: the chunk of whose noise it gets.
            rows: those latent frames of `x0` that are the open chunk; the noise is drawn for all of it.
        """
        x = x0 if sigma == 0 else mix(x0, self.noise(draw, CONTEXT_STEP, x0.shape[2]), sigma)
        x = x[:, :, rows]
        at += rows.start or 0
        with torch.no_grad():
            return self.denoise(
                x,
                Forward(chunk=chunk, start_frame=at, frames=x.shape[2], step=CONTEXT_STEP, steps=0, sigma=sigma),
            )

    def write_given(self, x0: Tensor, at: int, rows: slice = slice(None)) -> None:
        """Write an open chunk of the context; arguments as of `write`."""
        # Draws of given context count down from -1, so that they never share noise with a chunk.
        sigma, draw = self.schedule.given_context_sigma, -1 - at
        if self.schedule.finds_given_inputs:
            # One fixed-point step towards the input whose denoised is x0. A last forward changes its input a little,
            # by habit; unless the cache shows it the input, the next chunk makes that change once more.
            out = self.write(x0, 0, sigma, at, draw, rows)
            x0 = x0.clone()
            x0[:, :, rows] += x0[:, :, rows] - out
        self.write(x0, 0, sigma, at, draw, rows)

    def write_again(self, count: int) -> None:
        """Write all that the next chunk, of `count` latent frames, sees once more, oldest first."""
        assert self.finished is not None
        for run in self.cache.rewind(count):
            self.cache.skip_to(run.start)
            for at, x0 in sorted(self.finished.items()):
                rows = _overlap(run, at, x0.shape[2])
                if rows is None:
                    continue
                self.cache.begin(rows.stop - rows.start)
                if at < self.given:
                    self.write_given(x0, at, rows)
                else:
                    made = (at - self.given) // self.frames_per_chunk
                    sigma = self.schedule.context_sigma_of(self.schedule_row(made))
                    self.write(x0, made, sigma, at, made, rows)
                self.cache.commit()

    def cut(self) -> None:
        """Forget everything: the next chunk is as the first one of another clip."""
        self.cache.cut()
        if self.finished is not None:
            self.finished.clear()

    def keep(self, at: int, x0: Tensor) -> None:
        """Remember finished latents, and forget those that no later chunk sees."""
        if self.finished is None:
            return
        self.finished[at] = x0.detach()
        sink = self.cache.settings.sink
        oldest = self.cache.committed - (self.cache.capacity - sink)
        free = [old for old in self.finished if old - self.cache.origin >= sink]
        for old in [old for old in free if old + self.finished[old].shape[2] <= oldest]:
            del self.finished[old]


def sample_chunks(
    denoise: Denoise,
    noise: NoiseSource,
    schedule: DiagonalSchedule,
    cache: KVCache,
    *,
    frames: int,
    frames_per_chunk: int,
    context: Tensor | None = None,
    source: Callable[[int, int], Tensor] | None = None,
    exit_step: Callable[[int], int] | None = None,
    first_chunk: int = 0,
    recache: Callable[[int], bool] | None = None,
    history: dict[int, Tensor] | None = None,
    schedule_row: Callable[[int], int] = lambda chunk: chunk,
    cut: Callable[[int], bool] = lambda chunk: False,
) -> Iterator[Chunk]:
    """Denoise a clip chunk by chunk, each conditioned through the cache on the ones before it.

    The caller chooses the grad mode. With `exit_step`, all forwards but the exit one run without gradient and later
    steps go on from its detached result, so that the committed keys and values are those of inference.

    Args:
        denoise: the model.
        noise: fresh noise for a chunk and step.
        schedule: steps and noise levels per chunk, and the context mode.
        cache: an unused one, opened and committed here, chunk by chunk; the caller owns and frees it.
        frames: latent frames to reach, context included.
        frames_per_chunk: latent frames a chunk; the last may be shorter.
        context: [B, C, n, H, W] finished latents that the clip begins with; they are cached, not yielded. Under noisy
            context the cache holds of a generated chunk what its last forward was given, not what came out; of given
            latents therefore the input that such a forward would finish as them, found in one forward more.
        source: (start_frame, frames) -> clean latents that a schedule starting below sigma 1 is mixed from.
        exit_step: chunk index -> the step, from 0, whose denoised keeps its gradient.
        first_chunk: go on at this chunk, in a cache that was restored to its beginning; the context is in there.
        recache: called with a chunk's index, from 0, before it begins: the place to change what `denoise` is
            conditioned on. True has the keys and values that the chunk will see written again first, oldest first,
            from the finished latents at the noise level they were cached at. LongLive's KV recache (arXiv 2509.22622)
            for every context mode. The cache is then the one that a clip of only these frames would have left.
        history: with `recache`: finished latents [B, C, n, H, W] by start_frame, those that a window may still see.
            It is kept here; a caller that goes on at `first_chunk` gives what it was then.
        schedule_row: chunk index -> the chunk whose steps and noise levels of the schedule it takes, its own by
            default; asked after `recache`, which may begin them anew, and not to change for a chunk that is made.
        cut: asked with a chunk's index after `recache`, whose answer then does not count. True has the cache forget all
            that came before, context and sink too: the chunk is made as the first one of another clip, from the noise
            of its own index.

    Yields:
        Chunk, in order.

    Raises:
        ValueError: a schedule that starts below sigma 1 without a source, no frame to make, a cache that is used or
            too short, or an exit step that the chunk does not have.
    """
    given = 0 if context is None else context.shape[2]
    counts, start = _sound_chunks(schedule, cache, frames, frames_per_chunk, given, first_chunk, source is not None)
    remembered = None if recache is None else {} if history is None else history
    past = _History(
        denoise=denoise,
        noise=noise,
        schedule=schedule,
        cache=cache,
        frames_per_chunk=frames_per_chunk,
        given=given,
        schedule_row=schedule_row,
        finished=remembered,
    )
    for piece in split_frames(0 if first_chunk else given, frames_per_chunk):
        assert context is not None
        cache.begin(piece)
        past.write_given(context[:, :, start : start + piece], start)
        cache.commit()
        past.keep(start, context[:, :, start : start + piece])
        start += piece

    for index, count in list(enumerate(counts))[first_chunk:]:
        again = recache is not None and recache(index)
        if cut(index):
            past.cut()
        elif again:
            past.write_again(count)
        sigmas = schedule.chunk_sigmas(schedule_row(index))
        exit_at = None if exit_step is None else exit_step(index)
        if exit_at is not None and not 0 <= exit_at < len(sigmas):
            raise ValueError(f"exit_step of chunk {index} is {exit_at}; it must be in [0, {len(sigmas) - 1}].")
        cache.begin(count)
        x = noise(index, INITIAL_STEP, count)
        if source is not None and sigmas[0] < 1:
            x = mix(source(start, count), x, sigmas[0])
        first = Forward(chunk=index, start_frame=start, frames=count, step=0, steps=len(sigmas), sigma=sigmas[0])
        x0, exit_latents = _denoise_chunk(denoise, noise, x, sigmas, first, exit_at, schedule.fresh_noise)
        if schedule.cache_pass_sigma is not None:
            past.write(x0, index, schedule.cache_pass_sigma, start, index)
        cache.commit()
        past.keep(start, x0)
        yield Chunk(index=index, start_frame=start, latents=x0, exit_latents=exit_latents)
        start += count


def _sound_chunks(
    schedule: DiagonalSchedule,
    cache: KVCache,
    frames: int,
    frames_per_chunk: int,
    given: int,
    first_chunk: int,
    has_source: bool,
) -> tuple[list[int], int]:
    """Latent frames of each chunk, and those that the cache has to have. Raises ValueError as `sample_chunks` does.

    given: latent frames of the context. The others are sample_chunks' own.
    """
    if frames <= given:
        raise ValueError(f"frames is {frames} and the context has {given} already; ask for more than the context.")
    if cache.total_frames < frames:
        raise ValueError(f"The cache was made for {cache.total_frames} latent frames and frames is {frames}.")
    counts = split_frames(frames - given, frames_per_chunk)
    if not 0 <= first_chunk < len(counts):
        raise ValueError(f"first_chunk is {first_chunk}; the clip has chunks 0 to {len(counts) - 1}.")
    start = given + sum(counts[:first_chunk]) if first_chunk else 0
    if cache.committed != start:
        raise ValueError(
            f"The cache has {cache.committed} latent frames where chunk {first_chunk} begins at {start}; make one "
            "cache for each clip."
        )
    for index in range(len(counts)):
        if not has_source and (first := schedule.chunk_sigmas(index)[0]) < 1:
            raise ValueError(
                f"Chunk {index + 1} starts at sigma {first:.3f}, below pure noise, and there is no latent to start "
                "from; start the schedule at sigma 1 or give a source latent."
            )
    return counts, start


def _denoise_chunk(
    denoise: Denoise,
    noise: NoiseSource,
    x: Tensor,
    sigmas: tuple[float, ...],
    first: Forward,
    exit_at: int | None,
    fresh_noise: bool,
) -> tuple[Tensor, Tensor | None]:
    """All steps of the open chunk; its last denoised, and that of step `exit_at` with gradients if one is asked for.

    x: [B, C, frames, H, W] at sigmas[0]. first: the forward of step 0. fresh_noise: of the schedule.
    """
    x0, exit_latents = x, None
    for step, sigma in enumerate(sigmas):
        with nullcontext() if exit_at is None or step == exit_at else torch.no_grad():
            x0 = denoise(x, replace(first, step=step, sigma=sigma))
        if step == exit_at:
            exit_latents, x0 = x0, x0.detach()
        if step + 1 < len(sigmas):
            kept = None if fresh_noise else (x - (1.0 - sigma) * x0) / sigma
            x = mix(x0, noise(first.chunk, step, first.frames) if kept is None else kept, sigmas[step + 1])
    return x0, exit_latents
