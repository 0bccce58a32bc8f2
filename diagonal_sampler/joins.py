"""The join of given frames and what is made behind them."""

from __future__ import annotations

from torch import Tensor, arange, ones_like, where

MOST_CONTRAST = 2.0
"""Bounds by how much a channel's contrast is changed: to half and to twice itself."""
_PLANE = (-2, -1)


def meet(denoised: Tensor, level: Tensor, *, still: bool = False) -> Tensor:
    """A prediction of the first chunk behind given frames, whose first latent frame is as bright and as contrasty as
    `level`, and its others less so by equal parts; the next chunk is not changed.

    A prediction's level is the model's own, and that of given frames is not: without this a video that goes on begins
    with a step in colour and sharpness. Each channel's mean and standard deviation over the picture are moved, as
    adaptive instance normalization does (Huang and Belongie, arXiv 1703.06868, eq. 8).

    Args:
        denoised: [B, C, n, H, W].
        level: [B, C, 1, H, W], a latent frame, such as the last given one.
        still: `level` is of a video that does not move. A channel whose contrast is beyond MOST_CONTRAST then carries
            motion, which a still has not, and keeps its own.
    """
    n = denoised.shape[2]
    share = arange(n, 0, -1, device=denoised.device, dtype=denoised.dtype)[:, None, None] / n
    mean = denoised.mean(_PLANE, keepdim=True)
    wanted, deviation = (x.std(_PLANE, keepdim=True, correction=0) for x in (level, denoised[:, :, :1]))
    ratio = wanted / deviation.clamp(min=1e-6)
    bounded = ratio.clamp(1 / MOST_CONTRAST, MOST_CONTRAST)
    ratio = where(ratio == bounded, ratio, ones_like(ratio)) if still else bounded
    return (denoised - mean) * ratio**share + mean + (level.mean(_PLANE, keepdim=True) - mean[:, :, :1]) * share
