"""Encodes and decodes in the scale of Wan's latents, and refuses a VAE that does not fit.

lighttaew2_1 and taew2_1 have one layout; ComfyUI tells them apart by the number format of the file alone, and takes a
float16 file for HunyuanVideo's. This pack makes Wan's latents: here such a file has Wan's scaling. The VAE itself is
never changed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import comfy.latent_formats
import comfy.sd
import torch
from comfy.latent_formats import LatentFormat
from comfy.taesd.taehv import TAEHV
from torch import Tensor, nn

log = logging.getLogger(__name__)

PICTURES_ONLY = (
    "The VAE ({}) encodes pictures, not video; connect the model's own: the Wan 2.1 VAE, lighttaew2_1 or the demo's."
)
"""Error for a VAE without time; takes the name of its class."""
_VIDEO = 3
"""ComfyUI's `latent_dim` of a video VAE."""


def taken_for_hunyuan(model: nn.Module) -> bool:
    """Whether ComfyUI scales this tiny VAE's latents as HunyuanVideo's."""
    return isinstance(model, TAEHV) and model.latent_format is comfy.latent_formats.HunyuanVideo


def warn_if_mistaken(vae: comfy.sd.VAE) -> None:
    """Logs that a tiny VAE is used with another scaling than VAE Decode and VAE Encode would; once for each use."""
    if taken_for_hunyuan(vae.first_stage_model):
        log.warning(
            "The tiny VAE's file is float16, so that ComfyUI takes it for HunyuanVideo's. It is used as Wan's taew2_1, "
            "with Wan's latent scaling; VAE Decode and VAE Encode would use HunyuanVideo's."
        )


def on_device(latent_format: LatentFormat, device: torch.device) -> LatentFormat:
    """A latent format whose means and deviations lie on the device: its own are on the CPU, and copying them there in
    every call has the host wait for a GPU. The one that is given stays as it is."""
    moved = copy.copy(latent_format)
    for name, value in vars(latent_format).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.to(device))
    return moved


def into_decoder(model: TAEHV, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What turns latents in LATENT scale, on the device, into those that a tiny decoder's layers take."""
    scale = comfy.latent_formats.Wan21().process_in if taken_for_hunyuan(model) else model.process_in
    owner = getattr(scale, "__self__", None)
    return getattr(on_device(owner, device), scale.__name__) if isinstance(owner, LatentFormat) else scale


def encode(vae: comfy.sd.VAE, images: Tensor) -> Tensor:
    """Images [T, H, W, 3] in 0..1 -> latents [1, C, n, h, w] in LATENT scale."""
    latents = vae.encode(images)
    if taken_for_hunyuan(vae.first_stage_model):
        raw = comfy.latent_formats.HunyuanVideo().process_in(latents)
        return comfy.latent_formats.Wan21().process_out(raw)
    return latents


def decode(vae: comfy.sd.VAE, latents: Tensor) -> Tensor:
    """Latents [B, C, n, h, w] in LATENT scale -> images [B, T, H, W, 3] in 0..1."""
    if taken_for_hunyuan(vae.first_stage_model):
        raw = comfy.latent_formats.Wan21().process_in(latents)
        latents = comfy.latent_formats.HunyuanVideo().process_out(raw)
    return vae.decode(latents)


def require_fitting(vae: comfy.sd.VAE, latent_format: LatentFormat) -> None:
    """Refuses a VAE that is of no video, or whose latents are not the model's.

    Args:
        latent_format: the model's.

    Raises:
        ValueError: no video VAE, or other latent channels, or another size of the latent's pixels.
    """
    kind = type(vae.first_stage_model).__name__
    if vae.latent_dim != _VIDEO:
        raise ValueError(PICTURES_ONLY.format(kind))
    found = vae.latent_channels, vae.spacial_compression_encode()
    needed = latent_format.latent_channels, latent_format.spacial_downscale_ratio
    if found != needed:
        raise ValueError(
            f"The VAE ({kind}) makes {found[0]} latent channels of {found[1]}x{found[1]} pixels each, and the model "
            f"takes {needed[0]} of {needed[1]}x{needed[1]}; connect the model's own: the Wan 2.1 VAE, lighttaew2_1 or "
            "the demo's."
        )
