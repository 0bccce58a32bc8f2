"""ComfyUI's own SamplerARVideo, and its noise for our sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diagonal_sampler.noise import INITIAL_STEP
from diagonal_sampler.schedule import DiagonalSchedule

FRAMES_PER_BLOCK = 3
UNIFORM = DiagonalSchedule.preset("self forcing")


class ArVideoNoise:
    """Its noise as a NoiseSource: the clip's, then a generator seeded for each block and step.

    Args:
        noise: [B, C, T, H, W] of the clip.
        seed: that the sampler is given.
    """

    def __init__(self, noise: Tensor, seed: int) -> None:
        self.noise, self.seed = noise, seed

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        start = FRAMES_PER_BLOCK * chunk
        if step == INITIAL_STEP:
            return self.noise[:, :, start : start + frames]
        generator = torch.Generator().manual_seed(self.seed + 1000 * chunk + step)
        return torch.randn((*self.noise.shape[:2], frames, *self.noise.shape[3:]), generator=generator)


def ar_video(model: Any, conditioning: list, noise: Tensor, seed: int) -> Tensor:
    """What it makes of `noise` [B, C, T, H, W], at the four levels of UNIFORM and without guidance."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": FRAMES_PER_BLOCK})
    sigmas = torch.tensor([*UNIFORM.chunk_sigmas(0), 0.0])
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=seed, disable_pbar=True)
