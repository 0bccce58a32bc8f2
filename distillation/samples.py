"""Clips of a training run as files a person can open: ComfyUI latents always, video where a decoder is at hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diagonal_sampler.demo_autoencoder import WAN_LATENT_MEAN, WAN_LATENT_STD, DemoAutoencoder, load_demo_autoencoder
from diagonal_sampler.disk import replace_file
from diagonal_sampler.frames import TIME_FACTOR
from diagonal_sampler.weight_files import write_weights
from distillation.common import autocast

VIDEO_SCALE = 4  # the demo's 64 pixels are hard to see
FRAMES_PER_SECOND = 16


def to_host_scale(latents: Tensor) -> Tensor:
    """The model's own scale -> Wan's latent scale, which ComfyUI's LATENT values have. [B, 16, T, H, W]."""
    mean = torch.tensor(WAN_LATENT_MEAN, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(WAN_LATENT_STD, device=latents.device).view(1, -1, 1, 1, 1)
    return latents * std + mean


@torch.no_grad()
def decode_frames(autoencoder: DemoAutoencoder, standardised: Tensor) -> Tensor:
    """Latents in the model's own scale [B, 16, T, h, w] -> [B, T_pix, 3, H, W] in 0..255."""
    pixels = autoencoder.decode(to_host_scale(standardised))
    return ((pixels + 1) * 127.5).clamp(0, 255).movedim(1, 2)


@torch.no_grad()
def encode_frames(autoencoder: DemoAutoencoder, pixels: Tensor) -> Tensor:
    """Frames [B, 3, T, H, W] in [-1, 1] -> latents [B, 16, (T - 1) // 4 + 1, H / 8, W / 8] in the model's own scale."""
    mean, std = (value.view(1, -1, 1, 1, 1) for value in (autoencoder.wan_mean, autoencoder.wan_std))
    return (autoencoder.encode(pixels) - mean) / std


@torch.no_grad()
def decode_groups(autoencoder: DemoAutoencoder, latents: Tensor) -> Tensor:
    """Latents in the model's own scale [B, C, T, h, w] -> frames [B, T, 4, 3, H, W] in [-1, 1].

    A clip's first latent frame is decoded as four too.
    """
    with autocast(latents.device):
        groups = autoencoder.decode_groups(rearrange(latents, "b c t h w -> (b t) c h w"))
    return rearrange(groups.float().clamp(-1, 1), "(b t) (f c) h w -> b t f c h w", b=len(latents), f=TIME_FACTOR)


@torch.no_grad()
def add_to_frames(autoencoder: DemoAutoencoder, latents: Tensor, change: Tensor) -> Tensor:
    """Latents [B, C, T, h, w] whose frames are changed.

    The encoder is linear: what the change encodes to is added, and nothing is lost in decoding.

    Args:
        change: [B, T, 4, 3, H, W], of frames in [-1, 1].
    """
    groups = rearrange(change, "b t f c h w -> (b t) (f c) h w")
    coded = autoencoder.encode_groups(groups) - autoencoder.encode_groups(torch.zeros_like(groups[:1]))
    return latents + rearrange(coded, "(b t) c h w -> b c t h w", b=len(latents))


def write_video(path: Path, frames: Tensor, *, scale: int = VIDEO_SCALE, fps: int = FRAMES_PER_SECOND) -> None:
    """Writes H.264 MP4. frames: [T, 3, H, W] in 0..255."""
    import imageio_ffmpeg

    pixels = frames.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pixels = np.repeat(np.repeat(pixels, scale, axis=1), scale, axis=2)
    writer = imageio_ffmpeg.write_frames(
        str(path), (pixels.shape[2], pixels.shape[1]), fps=fps, macro_block_size=1, quality=8
    )
    writer.send(None)
    try:
        for frame in pixels:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def write_samples(folder: Path, latents: Tensor, prompts: Sequence[str], autoencoder: str) -> None:
    """Writes `clip_0.latent` (for ComfyUI's LoadLatent), prompts.txt, and `clips.mp4` side by side if it can decode.

    The folder has a temporary name until it is complete.

    Args:
        latents: [N, 16, T, H, W] in the model's own scale.
        autoencoder: the demo's autoencoder file, or empty.
    """
    final, folder = folder, folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    for index, clip in enumerate(to_host_scale(latents.float().cpu())):
        # ComfyUI's own format of SaveLatent.
        tensors = {"latent_tensor": clip[None].contiguous(), "latent_format_version_0": torch.tensor([])}
        write_weights(folder / f"clip_{index}.latent", tensors, {})
    if autoencoder:
        frames = decode_frames(load_demo_autoencoder(autoencoder), latents.float().cpu())
        write_video(folder / "clips.mp4", torch.cat(list(frames), dim=-1))
    shutil.rmtree(final, ignore_errors=True)  # of a run that was resumed before this update
    replace_file(folder, final)
