"""The grounds of the demo's clips: which gray one has, which its noise hints at, and another in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from diagonal_sampler.demo_autoencoder import SPACE_FACTOR, DemoAutoencoder
from diagonal_sampler.frames import TIME_FACTOR
from distillation import sprites
from distillation.samples import add_to_frames, decode_groups
from distillation.score import split_from_ground


@torch.no_grad()
def ground_of(autoencoder: DemoAutoencoder, latents: Tensor) -> Tensor:
    """Level of the ground, [B], 0 to 255: the mean over frames and channels of each frame's median.

    Args:
        latents: [B, C, T, h, w] standardised.
    """
    frames = (decode_groups(autoencoder, latents) + 1) * 127.5
    return frames.flatten(-2).median(dim=-1).values.mean((1, 2, 3))


@torch.no_grad()
def paint_ground(autoencoder: DemoAutoencoder, latents: Tensor, level: Tensor) -> Tensor:
    """The latents with another ground, sprites as they are.

    A pixel moves by the part of it that is ground, so that soft edges and pale copies keep their share.

    Args:
        latents: [B, C, T, h, w] standardised.
        level: [B] of 0 to 255, a gray.
    """
    length = latents.shape[2]
    frames = (decode_groups(autoencoder, latents).flatten(0, 2) + 1) * 127.5
    ground, alpha, _ = split_from_ground(frames)
    moved = level.repeat_interleave(length * TIME_FACTOR)[:, None] - ground  # [B * T * 4, 3]
    change = (1 - alpha.sum(1, keepdim=True)) * moved[:, :, None, None] / 127.5
    return add_to_frames(autoencoder, latents, change.unflatten(0, (len(latents), length, TIME_FACTOR)))


@torch.no_grad()
def lightness(autoencoder: DemoAutoencoder, noise: Tensor) -> Tensor:
    """How light a ground pure noise hints at, [B], standard normal: its part along the way that frames get lighter.

    Args:
        noise: [B, C, T, h, w] of standard normal numbers.
    """
    height, width = (SPACE_FACTOR * side for side in noise.shape[-2:])
    plain = torch.stack([torch.full((3 * TIME_FACTOR, height, width), value) for value in (-1.0, 1.0)])
    black, white = autoencoder.encode_groups(plain.to(noise))
    way = (white - black) / torch.linalg.vector_norm(white - black)
    return torch.einsum("bcthw,chw->b", noise, way) / noise.shape[2] ** 0.5


def world_levels(light: Tensor) -> Tensor:
    """One of the world's grounds for each clip, [B]: the lighter the lighter, and each for as many numbers.

    Args:
        light: [B] standard normal numbers.
    """
    levels = torch.tensor(sprites.BACKGROUND_LEVELS, dtype=light.dtype, device=light.device)
    return levels[(torch.special.ndtr(light) * len(levels)).long().clamp(max=len(levels) - 1)]


def nearest_level(ground: Tensor) -> Tensor:
    """The world's ground that is nearest to each of `ground`, [B] in 0..255."""
    levels = torch.tensor(sprites.BACKGROUND_LEVELS, dtype=ground.dtype, device=ground.device)
    return levels[(ground[:, None] - levels).abs().argmin(dim=1)]
