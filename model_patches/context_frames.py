"""Frames that a clip begins with: a start image, or the end of a video that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
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
        still: [b, C, 1, H, W], where one latent frame is given: one of the middle of a video that shows the last given
            picture; None where the last of `latent` is to be compared with what is made, or nothing is known. A video
            VAE's first latent frame is of one pixel frame and has values of its own.
    """

    latent: Tensor
    still: Tensor | None = None

    @property
    def pixel_frames(self) -> int:
        """Frames at the start of the decoded clip that repeat what was given: 4*(n-1) + 1."""
        return frames.pixel_frames(self.latent.shape[2])


def context_of(
    images: Tensor | None, vae: comfy.sd.VAE | None, latent_frames: int, latent: Mapping[str, Any] | None = None
) -> ContextFrames:
    """The frames that a clip begins with, from what a person connected: images and their VAE, or a latent.

    Args:
        images, vae: see `encode_context`.
        latent_frames: the most latent frames to take.
        latent: see `take_context`; it needs no VAE.

    Raises:
        ValueError: neither or both of images and latent, images without a VAE, or what the two functions refuse.
    """
    if images is not None and latent is not None:
        raise ValueError("Both images and latent are connected; the video begins with one of them: remove the other.")
    if latent is not None:
        return take_context(latent, latent_frames)
    if images is None:
        raise ValueError("Nothing is connected that the video could begin with: connect images and a vae, or a latent.")
    if vae is None:
        raise ValueError("images need the vae to be encoded: connect the VAE that also decodes the video.")
    return encode_context(vae, images, latent_frames)


def take_context(latent: Mapping[str, Any], latent_frames: int) -> ContextFrames:
    """The last latent frames of a LATENT, as they are.

    Args:
        latent: LATENT whose samples are [b, C, T, H, W].
        latent_frames: n, the most latent frames to take; a shorter latent gives fewer.

    Raises:
        ValueError: samples that are not a video's, no frame, or NaN and infinite values.
    """
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 5 or not samples.shape[2]:
        shape = "of several parts" if samples.is_nested else f"of shape {tuple(samples.shape)}"
        raise ValueError(
            f"latent is {shape}; connect a video's, [videos, channels, latent frames, rows, columns], such as that of "
            "Diagonal Chunk Sampler."
        )
    _require_count(latent_frames)
    taken = samples[:, :, -latent_frames:].clone()
    if not torch.isfinite(taken).all():
        raise ValueError("latent holds NaN or infinite values in its last frames; check the node that made it.")
    alone = taken.shape[2] == 1 and samples.shape[2] > 1
    return ContextFrames(latent=taken, still=taken if alone else None)


def _require_count(latent_frames: int) -> None:
    if latent_frames < 1:
        raise ValueError(f"latent_frames is {latent_frames}; it must be at least 1.")


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
    _require_count(latent_frames)
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
