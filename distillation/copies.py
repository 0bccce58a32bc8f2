"""One of each: paints over what a caption did not ask for, the second copies of a sprite above all.

A few-step model's denoised is a mean over what is still undecided. Of a sprite's place that is a mean of two sprites,
each pale; and a distilled one keeps both. Nothing in the picture says that one is too many, but the caption does, and
it says how the sprite moves: a copy is weighed along that way, and the heavier one stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diagonal_sampler.captions import SpriteSpec
from diagonal_sampler.demo_autoencoder import DemoAutoencoder
from diagonal_sampler.frames import TIME_FACTOR
from distillation import sprites
from distillation.samples import add_to_frames, decode_groups
from distillation.score import FOREGROUND_DISTANCE, SMALLEST_AREA, split_from_ground

REACH = 12
"""Half the side of the box that is kept around a sprite's centre, in pixels: its radius, a soft edge, and what its
speed may be off by within a chunk."""
_TOGETHER = 8  # clips taken apart at once: pictures that fit a cache
_BOX = 15  # pixels, the side of a sprite: what lies within is weighed together


def heaviest_start(alpha: Tensor, velocity: tuple[float, float], times: Tensor) -> tuple[int, int]:
    """Where the heaviest thing that moves as commanded begins: (x, y) in whole pixels.

    Args:
        alpha: [T, H, W] coverage by one colour, in [0, 1].
        velocity: (x, y) pixels per frame.
        times: [T] frame numbers.
    """
    weight = F.avg_pool2d(alpha[None], _BOX, stride=1, padding=_BOX // 2)[0]
    height, width = weight.shape[1:]
    found = torch.zeros_like(weight[0])
    for frame, time in zip(weight, times.tolist(), strict=True):
        dx, dy = (round(component * time) for component in velocity)
        # found[y, x] += frame[y + dy, x + dx], 0 beyond the edges
        left, right, top, bottom = max(0, -dx), max(0, dx), max(0, -dy), max(0, dy)
        padded = F.pad(frame, (left, right, top, bottom))
        found += padded[max(0, dy) :, max(0, dx) :][:height, :width]
    y, x = divmod(int(found.argmax()), width)
    return x, y


def kept_region(share: Tensor, specs: Sequence[SpriteSpec], times: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which pixels are the sprites that were asked for.

    Args:
        share: [T, colours, H, W] in [0, 1], colours in the order of `sprites.RGB`.
        specs: sprites of different colours.
        times: [T] frame numbers.

    Returns:
        A box around each sprite, bool [T, sprites, H, W], and each sprite's colour, int64 [sprites]; None where one of
        them is not there, or does not move as it should.
    """
    height, width = share.shape[-2:]
    x_axis, y_axis = torch.arange(width, device=share.device), torch.arange(height, device=share.device)
    names = list(sprites.RGB)
    boxes, colours = [], []
    for spec in specs:
        colour = names.index(spec.colour)
        speed = sprites.PIXELS_PER_FRAME[spec.speed]
        vx, vy = (speed * component for component in sprites.VELOCITY[spec.direction])
        x, y = heaviest_start(share[:, colour], (vx, vy), times)
        beside_x = (x_axis - (x + vx * times)[:, None]).abs() <= REACH
        beside_y = (y_axis - (y + vy * times)[:, None]).abs() <= REACH
        box = beside_y[:, :, None] & beside_x[:, None, :]
        if float((share[:, colour] * box).sum((1, 2)).min()) < SMALLEST_AREA:
            return None
        boxes.append(box)
        colours.append(colour)
    return torch.stack(boxes, dim=1), torch.tensor(colours, device=share.device)


@torch.no_grad()
def remove_copies(autoencoder: DemoAutoencoder, latents: Tensor, captions: Sequence[Sequence[SpriteSpec]]) -> Tensor:
    """A clip's first chunk with one of each sprite that was asked for, and ground where anything else was.

    Clips in which a sprite is missing or moves otherwise come back as they are.

    Args:
        latents: [B, C, T, h, w] standardised, a clip's first latent frames.
        captions: the sprites that each of the B clips should show.
    """
    if len(latents) > _TOGETHER:
        parts = (slice(start, start + _TOGETHER) for start in range(0, len(latents), _TOGETHER))
        return torch.cat([remove_copies(autoencoder, latents[part], captions[part]) for part in parts])
    length = latents.shape[2]
    frames = (decode_groups(autoencoder, latents).flatten(0, 2) + 1) * 127.5
    ground, share, distance = split_from_ground(frames)
    share = share * (distance > FOREGROUND_DISTANCE).unsqueeze(1)
    # All frames of the first group are the clip's first.
    times = torch.arange(1 - TIME_FACTOR, TIME_FACTOR * (length - 1) + 1, device=latents.device).clamp(min=0)
    change = (ground[:, :, None, None] - frames) / 127.5
    for clip, specs in enumerate(captions):
        rows = slice(clip * len(times), (clip + 1) * len(times))
        found = kept_region(share[rows], specs, times)
        if found is None:
            change[rows] = 0
            continue
        boxes, colours = found
        own = (share[rows][:, colours] > 0) & ~boxes  # a commanded colour, elsewhere
        change[rows] *= (own.any(1) | ~boxes.any(1)).unsqueeze(1)
    return add_to_frames(autoencoder, latents, change.unflatten(0, (len(latents), length, TIME_FACTOR)))
