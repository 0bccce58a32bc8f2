"""Rotary position embedding of Wan: three axes (time, height, width) share one head's channels.

Shape suffixes: B batch, L tokens, N heads, D channels a head, P = D/2 rotated pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head given to time, height and width (Wan: the remainder goes to time)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_frequencies(dim: int) -> Tensor:
    """Angular frequencies [dim/2] in radians per position, float64 on the CPU: theta^(-2j/dim).

    On the CPU, because Apple's GPUs have no float64 and float32 angles are off by 1e-4 at position 1000.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return THETA**-exponent


def _turns(angles: Tensor, device: torch.device | None) -> Tensor:
    """Cosine and sine [..., 2] in float32 of float64 angles."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)


def rotation_table(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    start: float = 0.0,
    time_scale: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Rotations of a token grid.

    Args:
        frames, height, width: the grid in tokens.
        head_dim: channels of one head, even.
        start: RoPE position of the first frame.
        time_scale: RoPE positions from one frame to the next.

    Returns:
        [L, P, 2] float32, cosine and sine of each token's angles; L = frames*height*width in that order.
    """
    dims = axis_dims(head_dim)
    positions = (
        torch.arange(frames, dtype=torch.float64, device="cpu") * time_scale + start,
        torch.arange(height, dtype=torch.float64, device="cpu"),
        torch.arange(width, dtype=torch.float64, device="cpu"),
    )
    grid = (frames, height, width)
    parts = []
    for axis, (dim, position) in enumerate(zip(dims, positions, strict=True)):
        angle = torch.outer(position, axis_frequencies(dim))
        view = [1, 1, 1, dim // 2]
        view[axis] = grid[axis]
        parts.append(angle.view(view).expand(*grid, dim // 2))
    angles = torch.cat(parts, dim=-1).reshape(frames * height * width, head_dim // 2)
    return _turns(angles, device)


def rotate(x_BLND: Tensor, table_LP2: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of `x` [B, L, N, D] by `table` [L, P, 2]; computed in float32."""
    pairs = x_BLND.float().unflatten(-1, (-1, 2))
    cos, sin = table_LP2[:, None].unbind(-1)
    even, odd = pairs.unbind(-1)
    out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return out.flatten(-2).to(x_BLND.dtype)


# Every layer moves its keys by the same few shifts: kept, so that a copy to the device does not halt it at each layer.
# Made outside of inference mode, whose tensors autograd would refuse in a later training step.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _time_shift(time_dim: int, shift: float, device: torch.device) -> Tensor:
    """Rotation [1, P, 2] by `shift` positions in time."""
    return _turns(axis_frequencies(time_dim) * shift, device)[None]


def rotate_time_(keys_BLND: Tensor, shift: float) -> None:
    """Move rotated keys [B, L, N, D] by `shift` positions in time, in place; only the time channels change."""
    time_dim = axis_dims(keys_BLND.shape[-1])[0]
    time = keys_BLND[..., :time_dim]
    time.copy_(rotate(time, _time_shift(time_dim, shift, keys_BLND.device)))
