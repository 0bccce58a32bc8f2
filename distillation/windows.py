"""Windows of the student's own rollouts, as its fine-tunes are trained on them.

Every input that the sampler met in a rollout is kept, with what is to be answered there. All chunks of a window are
seen in one causal forward whose context chunks are the inputs of their last steps: what a KV cache of noisy context
holds. That forward counts positions inside its window, so rollouts do too, also of clips so short that a sampler counts
from their start: at other places the same chunk is answered otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.sampler import Forward, mix, sample_chunks
from diagonal_sampler.settings import GLOBAL_WINDOW
from distillation.common import PRECISION
from distillation.demo_files import TrainedFor
from distillation.rollout import flow_of, predict_x0, spread_sigma

CONTEXT_WEIGHT = 0.3
"""Of a chunk that is there as context, at its last step: a window has several, and places are decided before."""


def require_whole_pools(save_every: int, pool_updates: int) -> None:
    """Raises ValueError where a checkpoint could lie within a pool: a run resumes with a new one; or would never be."""
    if save_every < 1 or save_every % pool_updates:
        raise ValueError(
            f"save_every is {save_every} and pool_updates {pool_updates}; a run resumes with a new pool, so save_every "
            "must be pool_updates or a multiple of it."
        )


# ---------------------------------------------------------------------------------------------------------------
# What the sampler meets


class DrawnNoise:
    """A NoiseSource that draws in the sampler's order, on the generator's device.

    Args:
        shape: (B, C, H, W) of a latent frame.
    """

    def __init__(self, generator: torch.Generator, shape: tuple[int, int, int, int]) -> None:
        self.generator, self.shape = generator, shape

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        batch, channels, height, width = self.shape
        shape = (batch, channels, frames, height, width)
        return torch.randn(shape, generator=self.generator, device=self.generator.device)


@dataclass(frozen=True, slots=True)
class States:
    """The inputs of all forwards of N clips, and what the network is to answer.

    Attributes:
        inputs: [N, chunks, steps, C, size, H, W]; 0 where a chunk has fewer steps.
        wanted: x0, the same shape; or one for all steps, [N, chunks, 1, C, size, H, W].
        ids: int64 [N, 2, 4].
        optical_flow: [N, 4, chunks * size, H, W].
    """

    inputs: Tensor
    wanted: Tensor
    ids: Tensor
    optical_flow: Tensor


@torch.no_grad()
def roll_out(
    dit: WanDiT,
    text: Tensor,
    noise: DrawnNoise,
    trained: TrainedFor,
    chunks: int,
    *,
    optical_flow: Tensor | None = None,
    truth: Tensor | None = None,
    course: float = 0.0,
    true_chunks: int = 1,
    given: Tensor | None = None,
    asked: Tensor | None = None,
    between: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Samples clips as at inference without guidance; the inputs and the x0 of all forwards, as in States.

    Positions count inside the window however short the clip is, as `window_error`'s do.

    Args:
        text: [B, tokens, text_dim].
        chunks: to make.
        optical_flow: [B, 4, chunks * size, H, W].
        truth: [B, C, chunks * size, H, W] clips; each goes on from its true first chunks whatever the network says.
        course: largest mean squared error of a later chunk's x0 that a clip goes on from, instead of the true one.
        true_chunks: how many those are.
        given: [B, C, size, H, W] a finished chunk to go on from; it counts as the first of those that come back.
        asked: inputs of another network's rollout, to be asked instead of those that this one comes to.
        between: noise levels of more forwards behind the first of every chunk that has others before it; what comes
            back as the first one's x0 is the last of theirs.
    """
    size, schedule = trained.settings.frames_per_chunk, trained.schedule
    frames = (chunks if given is None else 1 + chunks) * size
    batch, channels, height, width = noise.shape
    steps = max(schedule.steps(chunk) for chunk in range(chunks))
    inputs, found = (
        torch.zeros(batch, frames // size, steps, channels, size, height, width, device=text.device) for _ in range(2)
    )
    cache = KVCache(replace(trained.settings, positions="window"), frames)

    def predict(x: Tensor, sigma: float, at: Forward) -> Tensor:
        told = flow_of(optical_flow, at)
        return predict_x0(dit, x, sigma, text, PRECISION, cache=cache.condition("positive"), optical_flow=told)

    def denoise(x: Tensor, at: Forward) -> Tensor:
        # A given chunk has two forwards, of which the last is what later chunks see.
        place = (slice(None), at.start_frame // size, max(0, at.step))
        x = x if asked is None else asked[place]
        x0 = predict(x, at.sigma, at)
        if at.start_frame and at.step == 0:
            for sigma in between:
                x0 = predict(mix(x0, noise(at.chunk, at.step, at.frames), sigma), sigma, at)
        if truth is not None:
            true = truth[:, :, at.start_frame : at.start_frame + at.frames]
            left = (x0 - true).square().mean((1, 2, 3, 4)) > (course if at.chunk >= true_chunks else -1)
            x0 = torch.where(left[:, None, None, None, None], true, x0)
        inputs[place], found[place] = x, x0
        return x0

    def source(start: int, frames: int) -> Tensor:
        return asked[:, start // size, 0, :, :frames]

    sampled = sample_chunks(
        denoise,
        noise,
        schedule,
        cache,
        frames=frames,
        frames_per_chunk=size,
        context=given,
        source=None if asked is None else source,  # a schedule may begin below pure noise then
    )
    try:
        for _ in sampled:
            pass
    finally:
        cache.free()
    return inputs, found


# ---------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True, slots=True)
class Windows:
    """One forward's input: windows of whole chunks as one causal forward sees them.

    Attributes:
        noisy: [B, C, T, H, W].
        sigma: [B, T].
        wanted: x0, the shape of noisy.
        weight: [B, T], 0 where an answer is not asked for.
        ids: int64 [B, 2, 4].
        optical_flow: [B, 4, T, H, W].
        chunk: int64 [B, T // size], where each chunk lies in its clip.
    """

    noisy: Tensor
    sigma: Tensor
    wanted: Tensor
    weight: Tensor
    ids: Tensor
    optical_flow: Tensor
    chunk: Tensor

    def with_(self, other: Windows) -> Windows:
        """Both batches as one."""
        return Windows(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in self.__dataclass_fields__))


class Sampling:
    """A schedule and a window as tensors on a device.

    Raises:
        ValueError: a schedule that leaves something else in the cache than a chunk's last input, or a window that is
            not a sink of one chunk and some more.
    """

    def __init__(self, trained: TrainedFor, chunks: int, device: torch.device) -> None:
        schedule, settings = trained.schedule, trained.settings
        self.size = size = settings.frames_per_chunk
        if schedule.context_mode != "noisy" or settings.sink != size or settings.window % size:
            raise ValueError(
                f"the network is sampled with {schedule.context_mode} context, a window of {settings.window} and a sink"
                f" of {settings.sink}; this training is for noisy context, windows of whole chunks ({size} latent"
                " frames) and a sink of one."
            )
        self.chunks, self.window = chunks, min(chunks, settings.window // size)
        rows = [schedule.chunk_sigmas(chunk) for chunk in range(chunks)]
        self.steps = torch.tensor([len(row) for row in rows], device=device)
        longest = max(map(len, rows))
        # Where a chunk has fewer steps its last is repeated: never asked for.
        self.sigmas = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in rows], device=device)

    def draw(
        self,
        states: States,
        count: int,
        generator: torch.Generator,
        *,
        often: int = 0,
        often_share: float = 0.0,
        since: int = 0,
    ) -> Windows:
        """Windows that end with a random chunk at a random step, or go on behind its last one.

        A chunk beyond the window sees the first chunk and those before it: what a rolling cache with a sink holds.

        Args:
            often: a chunk that `often_share` of the windows end with, beside those that chance gives it.
            since: the first chunk of which answers are asked for.
        """
        device = states.inputs.device
        rows = torch.randint(len(states.inputs), (count,), generator=generator, device=device)
        chunk = torch.randint(since, self.chunks, (count,), generator=generator, device=device)
        if often_share:
            chosen = torch.rand(count, generator=generator, device=device) < often_share
            chunk = torch.where(chosen, often, chunk)
        step = (torch.rand(count, generator=generator, device=device) * self.steps[chunk]).long()
        at = torch.arange(self.window, device=device)
        late = (chunk >= self.window)[:, None]
        listed = torch.where(late & (at > 0), chunk[:, None] - (self.window - 1) + at, at)
        place = chunk.clamp(max=self.window - 1)[:, None]
        steps = torch.where(at == place, step[:, None], self.steps[listed] - 1)
        finished = (step == self.steps[chunk] - 1)[:, None]
        # Of a window that lies late only the last chunk sees what it saw then.
        asked = ((at == place) | (~late & ((at < place) | finished))) & (listed >= since)
        rows_, sigma = rows[:, None], self.sigmas[listed, steps]
        wanted = states.wanted[rows_, listed, steps if states.wanted.shape[2] > 1 else torch.zeros_like(steps)]
        flow = states.optical_flow.unflatten(2, (self.chunks, self.size))
        flow = flow[rows_, :, listed].float()  # [B, window, 4, size, H, W]
        return Windows(
            noisy=_joined(states.inputs[rows_, listed, steps].float()),
            sigma=sigma.repeat_interleave(self.size, dim=1),
            wanted=_joined(wanted.float()),
            weight=(asked * torch.where(at == place, 1.0, CONTEXT_WEIGHT)).repeat_interleave(self.size, dim=1),
            ids=states.ids[rows],
            optical_flow=_joined(flow),
            chunk=listed,
        )


def _joined(chunks: Tensor) -> Tensor:
    """[B, chunks, C, size, H, W] -> [B, C, chunks * size, H, W]."""
    return chunks.transpose(1, 2).flatten(2, 3)


def window_error(dit: WanDiT, text: Tensor, windows: Windows, size: int, *, mean_weight: float = 0.0) -> Tensor:
    """Weighted squared error of x0, [B, T].

    Args:
        text: [B, tokens, text_dim].
        size: latent frames a chunk.
        mean_weight: of the squared error of a frame's mean in every channel, beside the mean squared error.
    """
    flow = dit(
        windows.noisy,
        1000 * windows.sigma,
        text,
        frames_per_chunk=size,
        window=GLOBAL_WINDOW,
        optical_flow=windows.optical_flow if dit.config.flow_adapter else None,
    ).float()
    x0 = windows.noisy - spread_sigma(windows.sigma) * flow
    error = x0 - windows.wanted
    squared = error.square().mean((1, 3, 4))
    if mean_weight:
        squared = squared + mean_weight * error.mean((3, 4)).square().mean(1)
    return squared * windows.weight
