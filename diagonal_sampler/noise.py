"""Noise that depends on the seed, the chunk and the step, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

INITIAL_STEP = -1
CONTEXT_STEP = -2
_may_pin = True


def allow_pinning(allowed: bool) -> None:
    """Whether this process may pin memory; it may where nobody says otherwise."""
    global _may_pin
    _may_pin = allowed


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A tensor on the CPU in pinned memory, not filled; None where memory may not be pinned, or cannot be."""
    if not _may_pin:
        return None
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # a container's limit on locked memory, for instance
        return None


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From a CPU to CUDA through pinned memory, so that the copy queues behind the device's work: any
    other copy, as where memory cannot be pinned, halts the host until all of that is done."""
    pinned = pinned_empty(x.shape, x.dtype) if device.type == "cuda" and x.device.type == "cpu" else None
    return x.to(device) if pinned is None else pinned.copy_(x).to(device, non_blocking=True)


class NoiseSource(Protocol):
    """What the chunk iterator draws from. `step` counts from 0; see INITIAL_STEP and CONTEXT_STEP."""

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        """Gaussian noise [B, C, frames, H, W] of chunk `chunk` at step `step`."""
        ...


class SeededNoise:
    """Gaussian noise drawn on the CPU from one generator a draw, so that no draw depends on another.

    The same seed gives the same noise on any device, a longer clip begins with the whole chunks of a shorter one, and
    a run resumed at chunk k needs no replay. The global random state is neither read nor changed.

    Args:
        seed: any integer; only its low 64 bits count.
        shape: (B, C, H, W) of one latent frame.
        device: where the noise goes; it is always drawn on the CPU.
        rows: which rows of a larger batch the B samples are (ComfyUI's batch_index), so that a sample that was taken
            out of a batch gets the noise that it has there; the first B by default.

    Raises:
        ValueError: rows that are not B numbers from 0 on.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, int, int, int],
        device: torch.device | str = "cpu",
        rows: Sequence[int] | None = None,
    ) -> None:
        if rows is not None and (len(rows) != shape[0] or min(rows) < 0):
            raise ValueError(f"rows is {list(rows)}; {shape[0]} samples need as many numbers from 0 on.")
        self.seed = seed & 0xFFFF_FFFF_FFFF_FFFF
        self.shape = shape
        self.rows = None if rows is None else list(rows)
        self.device = torch.device(device)
        self._generator = torch.Generator("cpu")

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{chunk}/{step}".encode(), digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        batch, channels, height, width = self.shape
        drawn = batch if self.rows is None else max(self.rows) + 1
        shape = (drawn, channels, frames, height, width)
        # Said in full: torch's default dtype and device may be another pack's.
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return send(noise if self.rows is None else noise[self.rows], self.device)
