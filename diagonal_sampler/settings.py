"""How a causal model looks back: the settings that a checkpoint was trained with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

POSITIONS = ("auto", "absolute", "window")
GLOBAL_WINDOW = -1
INT8 = "int8"
KV_CACHE_DTYPES = ("default", INT8)
ADDED_LATER = "added_later"
"""In a field's metadata: older files have been written without it, with its default in effect."""
# Wan 2.1 was trained on clips of 81 pixel frames. Absolute positions beyond were never seen in training.
TRAINED_LATENT_FRAMES = 21


def lasting_fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields without those that were added later and hold their default: what older files have of it."""
    found = {each.name: (each, getattr(value, each.name)) for each in fields(value)}
    return {
        name: part for name, (each, part) in found.items() if not each.metadata.get(ADDED_LATER) or part != each.default
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalSettings:
    """Attention window of a causal video model, in latent frames.

    Attributes:
        frames_per_chunk: latent frames denoised together, >= 1.
        window: latent frames that a chunk attends to, sink and current chunk included; -1 attends to all.
        sink: latent frames at the start of the clip that are never evicted, >= 0.
        positions: "absolute" counts RoPE positions from the start of the clip; "window" counts inside the window, so
            that they never grow; "auto" is absolute up to the 21 latent frames that Wan was trained on, else window.
        kv_cache_dtype: number format of the keys and values that are kept: "default" as they are computed; "int8" in 8
            bits with a scale for each head of each token, which takes half of bf16's memory.

    Raises:
        ValueError: a value out of range, or a window without room for the sink and one chunk.
    """

    frames_per_chunk: int = 3
    window: int = 12
    sink: int = 3
    positions: str = "auto"
    kv_cache_dtype: str = field(default=KV_CACHE_DTYPES[0], metadata={ADDED_LATER: True})

    def __post_init__(self) -> None:
        if self.frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk is {self.frames_per_chunk}; it must be at least 1 latent frame.")
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink} latent frames; it must be 0 or more.")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; choose one of {', '.join(POSITIONS)}.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; choose one of {', '.join(KV_CACHE_DTYPES)}.")
        if self.window != GLOBAL_WINDOW and self.window < self.sink + self.frames_per_chunk:
            raise ValueError(
                f"window is {self.window} latent frames but must hold the sink ({self.sink}) and one chunk "
                f"({self.frames_per_chunk}); use at least {self.sink + self.frames_per_chunk}, or -1 for all frames."
            )

    def capacity(self, total_frames: int) -> int:
        """Latent frames that the cache of a clip of `total_frames` latent frames holds."""
        if self.window == GLOBAL_WINDOW:
            return total_frames
        return min(self.window, total_frames)

    def window_positions(self, total_frames: int) -> bool:
        """Whether a clip of `total_frames` latent frames counts its RoPE positions inside the window."""
        if self.window == GLOBAL_WINDOW or self.positions == "absolute":
            return False
        return self.positions == "window" or total_frames > TRAINED_LATENT_FRAMES
