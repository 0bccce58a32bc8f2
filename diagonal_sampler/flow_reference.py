"""Motion without training: each chunk begins from the last frame, carried along the optical flow.

The chunk's start is the carried frames, encoded and noised to `start_sigma` instead of to pure noise. Every prediction
but the last is blended with them where the flow says something; the last is the model's own. The model is as it is.
A weaker motion is blended less and starts nearer to pure noise: see `weaker_start`.

Each chunk is decoded, carried and encoded, so what an autoencoder loses on that way would be lost anew in every chunk,
until a thin shape has faded. The encoded frames are therefore decoded once more, and what is lost is added: see
`encode_what_decodes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import OpticalFlow, carry, carrying_device
from .flow_timeline import FlowTimeline
from .frames import TIME_FACTOR
from .sampler import Forward
from .schedule import DiagonalSchedule, shift_sigma, unshift_sigma

DEFAULT_START_SIGMA = 0.733
"""Measured on a toy as the level that follows best; it is also one of the release's own four."""
FOLLOWED_SHARE = 1 / 16
"""Share of a latent cell's pixels, over its frames, that the motion must command for the cell to follow it wholly."""
LEAST_COMMANDED = 1 / 2
"""Share of a chunk's steps that the motion must command for it to start from carried frames: in the rest they stand."""
TAIL_FRAMES = 3
"""Latent frames that are decoded to get the last pixel frame: a video decoder needs some before it."""

Decode = Callable[[Tensor], Tensor]
"""Latents [B, C, n, h, w] in the model's space -> pixel frames [B, 3, 1 + 4 * (n - 1), H, W] in 0..1, best on
`flow.carrying_device`."""
Encode = Callable[[Tensor], Tensor]
"""Pixel frames [B, 3, 1 + 4n, H, W] in 0..1, where Decode's is -> latents [B, C, 1 + n, h, w] in the model's space."""


def start_below_noise(sigmas: Sequence[float], start_sigma: float, shift: float) -> tuple[float, ...]:
    """The levels of a chunk that starts at `start_sigma`: as many steps, scaled alike in uniform time, the last twice.

    The last level decides how much the last prediction, which nothing is blended with, may take away of what was
    carried to where the model would not have it, or move it back.

    Args:
        sigmas: descending, in (0, 1]; unchanged if they start at or below `start_sigma`.
        start_sigma: in (0, 1].
        shift: of the schedule.

    Raises:
        ValueError: start_sigma out of range.
    """
    if not 0 < start_sigma <= 1:
        raise ValueError(f"start_sigma is {start_sigma}; it must be in (0, 1].")
    if sigmas[0] <= start_sigma:
        return tuple(sigmas)
    scale = unshift_sigma(start_sigma, shift) / unshift_sigma(sigmas[0], shift)
    scales = [scale] * (len(sigmas) - 2) + [scale**2]
    rest = (shift_sigma(by * unshift_sigma(sigma, shift), shift) for by, sigma in zip(scales, sigmas[1:], strict=False))
    return (start_sigma, *rest)


def weaker_start(start_sigma: float, strength: float, shift: float) -> float:
    """The level that a chunk starts at under a motion of this strength: from pure noise down to `start_sigma`.

    Args:
        start_sigma: of full strength, in (0, 1].
        strength: in [0, 1]; the way down in uniform time, as a share of the whole way.
        shift: of the schedule.

    Raises:
        ValueError: strength out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be in [0, 1].")
    if strength == 1:
        return start_sigma
    return min(1.0, shift_sigma(1 - strength * (1 - unshift_sigma(start_sigma, shift)), shift))


def encode_what_decodes(frames: Tensor, decode: Decode, encode: Encode) -> Tensor:
    """Latents [B, C, 1 + n, h, w] that decode to `frames` more nearly than what they encode to.

    z + (z - E(D(z))) with z = E(frames): one fixed-point step towards the z whose decoded frames encode to E(frames).

    Args:
        frames: [B, 3, 1 + 4n, H, W] in 0..1.
    """
    latents = encode(frames)
    return 2 * latents - encode(decode(latents))


class FlowReference:
    """What the reference mode adds to one run of `sample_chunks`: its schedule, its source, and the blend.

    Args:
        optical_flow: of the decoded size, with at most the clip's 4 * (T - 1) steps; nothing is commanded behind them.
        schedule: the usual one.
        counts: latent frames of each chunk.
        decode, encode: the autoencoder, see Decode and Encode.
        given_frames: latent frames that the clip begins with (context), before chunk 0.
        start_sigma: noise level in (0, 1] that a carried chunk starts at.
        blend: share in [0, 1] of the carried frames in every prediction but the last, where the flow is valid; a chunk
            of one step has it in that one.
        first_chunk, last_chunk: chunks that follow the flow, from 0. A chunk with nothing before it never does, nor one
            of which the flow commands less than half of the steps (LEAST_COMMANDED); where chunks start at level 1,
            nothing of the carried frames is in them, and any step will do.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        optical_flow: OpticalFlow | FlowTimeline,
        schedule: DiagonalSchedule,
        counts: Sequence[int],
        *,
        decode: Decode,
        encode: Encode,
        given_frames: int = 0,
        start_sigma: float = DEFAULT_START_SIGMA,
        blend: float = 1.0,
        first_chunk: int = 0,
        last_chunk: int | None = None,
    ) -> None:
        if not 0 <= blend <= 1:
            raise ValueError(f"blend is {blend}; it must be in [0, 1].")
        self.optical_flow, self.decode, self.encode, self.blend_weight = optical_flow, decode, encode, blend
        last_chunk = len(counts) - 1 if last_chunk is None else last_chunk
        self._active: dict[int, int] = {}  # start frame -> chunk
        rows = []
        start = given_frames
        for chunk, count in enumerate(counts):
            row = schedule.chunk_sigmas(chunk)
            if start > 0 and first_chunk <= chunk <= last_chunk:
                steps = TIME_FACTOR * count
                least = LEAST_COMMANDED * steps if start_sigma < 1 else 1
                if optical_flow.told(TIME_FACTOR * (start - 1), steps) >= least:
                    self._active[start] = chunk
                    row = start_below_noise(row, start_sigma, schedule.shift)
            rows.append(row)
            start += count
        while len(rows) > 1 and rows[-1] == rows[-2]:  # the last row repeats by itself, however long the clip
            rows.pop()
        self.schedule = replace(schedule, sigmas=tuple(rows))
        self._tail: Tensor | None = None
        self._reference: tuple[int, Tensor, Tensor] | None = None

    @property
    def follows(self) -> bool:
        """Whether any chunk follows the flow."""
        return bool(self._active)

    def finished(self, latents: Tensor) -> None:
        """Takes what precedes the next chunk: the given context, then each chunk, [B, C, n, h, w]."""
        tail = latents if self._tail is None else torch.cat([self._tail, latents], dim=2)
        self._tail = tail[:, :, -TAIL_FRAMES:].detach()

    @property
    def tail(self) -> Tensor | None:
        """The latents that the next chunk's start is carried from; `finished` takes them as it takes a chunk."""
        return self._tail

    def source(self, start_frame: int, frames: int) -> Tensor:
        """The carried frames of a chunk that follows the flow, [B, C, frames, h, w] in the model's space."""
        return self._carried(start_frame, frames)[0]

    def blend(self, denoised: Tensor, at: Forward, free: Tensor | None = None) -> Tensor:
        """A prediction with the carried frames mixed in; that of a chunk's last step as it is.

        Args:
            denoised: [B, C, n, h, w].
            free: in 0..1, of a shape that broadcasts to it; 0 where nothing may change. None is 1 everywhere.
        """
        early = 0 <= at.step < max(1, at.steps - 1)
        if not early or at.start_frame not in self._active or self.blend_weight == 0:
            return denoised
        carried, mask = self._carried(at.start_frame, at.frames)
        return torch.lerp(denoised, carried, self.blend_weight * (mask if free is None else mask * free.to(mask)))

    @torch.no_grad()
    def _carried(self, start_frame: int, frames: int) -> tuple[Tensor, Tensor]:
        """Latents [B, C, frames, h, w] of the carried frames, and the blend's mask, 1 channel, in 0..1.

        A cell of the latent is blended wholly once the motion commands a little of it, for what is blended by half is
        seen in two places; where something enters from outside, by the share of the rest.
        """
        if self._reference is None or self._reference[0] != start_frame:
            assert self._tail is not None, "finished() was not told what precedes the chunk"
            tail = self._tail
            last = self.decode(tail)[:, :, -1]
            step = TIME_FACTOR * (start_frame - 1)
            clips, masks, outside = [], [], []
            for picture in last.to(carrying_device(last.device)):
                carried = list(carry(picture, self.optical_flow, step, TIME_FACTOR * frames))
                clips.append(torch.stack([picture, *(frame.picture for frame in carried)], dim=1))
                masks.append(torch.stack([frame.commanded for frame in carried]))
                outside.append(torch.stack([frame.entered.to(picture.dtype) for frame in carried]))
            coded = encode_what_decodes(torch.stack(clips).to(last.device), self.decode, self.encode)
            latents = coded[:, :, 1:].to(tail)
            cells = (frames, tail.shape[-2], tail.shape[-1])
            mask = (F.adaptive_avg_pool3d(torch.stack(masks)[:, None], cells) / FOLLOWED_SHARE).clamp(max=1)
            mask = mask * (1 - F.adaptive_avg_pool3d(torch.stack(outside)[:, None], cells))
            self._reference = (start_frame, latents, mask.to(tail))
        return self._reference[1:]
