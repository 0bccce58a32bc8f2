"""Frames that a clip begins with: a start image, or the end of a video that is to go on."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.sd
from torch import Tensor

from ..diagonal_sampler import frames
from .vae_scale import PICTURES_ONLY, encode, warn_if_mistaken

CONTEXT_LATENT_FRAMES = 6
"""Of a video's end that another begins with; why six: docs/decisions.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFrames:
    """Frames that a clip begins with: a DIAGONAL_CONTEXT.

    Attributes:
        latent: [b, C, n, H, W] in LATENT scale.
        still: [b, C, 1, H, W], one latent frame of a video that only shows the last given picture; None where the
            last of `latent` is to be compared with what is made, or nothing is known. A video VAE's first latent
            frame is of one pixel frame and has values of its own.
    """

    latent: Tensor
    still: Tensor | None = None

    @property
    def pixel_frames(self) -> int:
        """Frames at the start of the decoded clip that repeat what was given: 4*(n-1) + 1."""
        return frames.pixel_frames(self.latent.shape[2])


def encode_context(vae: comfy.sd.VAE, images: Tensor, latent_frames: int) -> ContextFrames:
    """Encode one image, or the last frames of a video.

    Args:
        vae: the VAE of the model.
        images: IMAGE [T, H, W, 3] in 0..1. One image is a start image; of more, the last 4*(n-1) + 1 are taken.
        latent_frames: n, the most latent frames to take; a shorter video gives fewer.

    Raises:
        ValueError: no image, or a size that is no multiple of 16 pixels (the patch of the model in the latent).
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images has shape {tuple(images.shape)}; connect an image or the frames of a video.")
    if latent_frames < 1:
        raise ValueError(f"latent_frames is {latent_frames}; it must be at least 1.")
    step = 2 * vae.spacial_compression_encode()
    for name, size in (("height", images.shape[1]), ("width", images.shape[2])):
        if size % step:
            down, up = frames.nearest_sizes(size, step)
            raise ValueError(
                f"The {name} of the images is {size} pixels; it must be a multiple of {step}. The nearest that fit are "
                f"{down} and {up}: scale the images, or crop them."
            )
    count = min(latent_frames, frames.latent_frames(len(images)))
    warn_if_mistaken(vae)
    latent = encode(vae, images[-frames.pixel_frames(count) :, :, :, :3])
    if latent.ndim != 5:
        raise ValueError(PICTURES_ONLY.format(type(vae.first_stage_model).__name__))
    if count > 1:
        return ContextFrames(latent=latent)
    still = encode(vae, images[-1:, :, :, :3].expand(frames.pixel_frames(2), -1, -1, -1))
    return ContextFrames(latent=latent, still=still[:, :, -1:])
