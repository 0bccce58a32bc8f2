"""Where the keys and values of one layer lie: as they are, or in 8 bits.

Shape suffixes: B batch, L tokens, N heads, D channels a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .rope import rotate_time_
from .settings import INT8

LEVELS = 127
SCALE_BYTES = 4
_SCALE = torch.float32
_PARTS = ("", "_scale")


class FullBuffer:
    """Tokens in the number format in which they come."""

    def __init__(self, tokens_BLND: Tensor) -> None:
        self.tokens_BLND = tokens_BLND

    @classmethod
    def like(cls, x_BLND: Tensor, tokens: int) -> FullBuffer:
        """Room for `tokens` tokens as those of `x`; what is in it is undefined."""
        return cls(x_BLND.new_empty(_with_length(x_BLND, tokens)))

    @property
    def shape(self) -> torch.Size:
        return self.tokens_BLND.shape

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the ending of its name."""
        return {_PARTS[0]: self.tokens_BLND}

    def write(self, rows: slice, x_BLND: Tensor) -> None:
        self.tokens_BLND[:, rows] = x_BLND

    def read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The tokens of `rows`; a view where `dtype` is the buffer's."""
        return self.tokens_BLND[:, rows].to(dtype)

    def copy_to(self, rows: slice, out_BLND: Tensor) -> None:
        """Write the tokens of `rows` to `out`."""
        out_BLND.copy_(self.tokens_BLND[:, rows])

    def move(self, rows: slice, shift: float) -> None:
        """Rotate keys by `shift` positions in time."""
        rotate_time_(self.tokens_BLND[:, rows], shift)


class Int8Buffer:
    """Tokens in 8 bits: whole numbers from -127 to 127 and one float32 scale for each head of each token.

    A head's largest channel is 127 levels, so that the error of a channel is at most 1/254 of it. With heads of 128
    channels a token takes 1.03 bytes a channel. Values that are not finite stay so.
    """

    def __init__(self, levels_BLND: Tensor, scale_BLN1: Tensor) -> None:
        self.levels_BLND, self.scale_BLN1 = levels_BLND, scale_BLN1

    @classmethod
    def like(cls, x_BLND: Tensor, tokens: int) -> Int8Buffer:
        """Room for `tokens` tokens as those of `x`; what is in it is undefined."""
        shape = _with_length(x_BLND, tokens)
        return cls(x_BLND.new_empty(shape, dtype=torch.int8), x_BLND.new_empty((*shape[:-1], 1), dtype=_SCALE))

    @property
    def shape(self) -> torch.Size:
        return self.levels_BLND.shape

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the ending of its name."""
        return dict(zip(_PARTS, (self.levels_BLND, self.scale_BLN1), strict=True))

    def write(self, rows: slice, x_BLND: Tensor) -> None:
        x = x_BLND.to(_SCALE)
        scale = x.abs().amax(-1, keepdim=True) / LEVELS
        self.scale_BLN1[:, rows] = scale
        # A head of zeros has no scale to be divided by.
        self.levels_BLND[:, rows] = (x / scale.clamp(min=torch.finfo(_SCALE).tiny)).round_().clamp_(-LEVELS, LEVELS)

    def read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The tokens of `rows`, a new tensor."""
        out = torch.empty_like(self.levels_BLND[:, rows], dtype=dtype)
        self.copy_to(rows, out)
        return out

    def copy_to(self, rows: slice, out_BLND: Tensor) -> None:
        """Write the tokens of `rows` to `out`."""
        torch.mul(self.levels_BLND[:, rows], self.scale_BLN1[:, rows], out=out_BLND)

    def move(self, rows: slice, shift: float) -> None:
        """Rotate keys by `shift` positions in time. Each move rounds them once more."""
        keys = self.read(rows, _SCALE)
        rotate_time_(keys, shift)
        self.write(rows, keys)


Buffer = FullBuffer | Int8Buffer


def new_buffer(kv_cache_dtype: str, x_BLND: Tensor, tokens: int) -> Buffer:
    """Room for `tokens` tokens as those of `x`, in a format of settings.KV_CACHE_DTYPES."""
    return (Int8Buffer if kv_cache_dtype == INT8 else FullBuffer).like(x_BLND, tokens)


def buffer_of(kv_cache_dtype: str, tensors: Mapping[str, Tensor], tokens: int, device: torch.device) -> Buffer:
    """A buffer with room for `tokens` tokens that begins with those of `tensors`, the first part of another's.

    Raises:
        ValueError: a buffer of another format.
    """
    wanted = _PARTS if kv_cache_dtype == INT8 else _PARTS[:1]
    if set(tensors) != set(wanted):
        raise ValueError(
            f"The keys and values are in {len(tensors)} tensors a layer, and kv_cache_dtype {kv_cache_dtype!r} has "
            f"{len(wanted)}: they belong to other settings."
        )
    parts = []
    for name in wanted:
        part = tensors[name]
        room = part.new_empty(_with_length(part, tokens), device=device)
        room[:, : part.shape[1]] = part
        parts.append(room)
    return Int8Buffer(*parts) if kv_cache_dtype == INT8 else FullBuffer(*parts)


def bytes_a_token(kv_cache_dtype: str, width: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of the keys, or of the values, of one token in one layer.

    Args:
        width: channels of a key, heads * head_dim.
        element_bytes: bytes of a channel as it is computed, 2 for bf16.
    """
    if kv_cache_dtype == INT8:
        return width + width // head_dim * SCALE_BYTES
    return width * element_bytes


def _with_length(x: Tensor, tokens: int) -> Sequence[int]:
    return (x.shape[0], tokens, *x.shape[2:])
