"""A folder of PNG images as ComfyUI's VIDEO."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import Input, InputImpl, Types
from PIL import Image

from .video_writer import png_name

TOLERANCE = 1e-6
"""Of a frame: seconds are floats, and a frame's moment is seldom one."""


class PngVideo(Input.Video):
    """A folder of PNG images as ComfyUI's VIDEO; the images are read when somebody asks for them.

    Args:
        folder: of images named by png_name, from 1 on.
        rate: frames a second.
        first: images before the video's first.
        count: its images; None for all that follow.
    """

    def __init__(self, folder: Path, rate: Fraction, *, first: int = 0, count: int | None = None) -> None:
        self.folder = folder
        self.rate = rate
        self.first = first
        self.count = count

    def _paths(self) -> Iterator[Path]:
        number = self.first + 1
        end = math.inf if self.count is None else number + self.count
        while number < end and (path := self.folder / png_name(number)).is_file():
            yield path
            number += 1

    def get_components(self) -> Types.VideoComponents:
        frames = []
        for path in self._paths():
            with Image.open(path) as image:
                frames.append(torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8))
                width, height = image.size
        images = torch.stack(frames).reshape(-1, height, width, 3).float() / 255.0
        return Types.VideoComponents(images=images, frame_rate=self.rate)

    def _loaded(self) -> Input.Video:
        return InputImpl.VideoFromComponents(self.get_components())

    def save_to(self, *args: Any, **kwargs: Any) -> None:
        return self._loaded().save_to(*args, **kwargs)

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = False
    ) -> Input.Video | None:
        """A part of it, whose images alone are read; None where it has no frame, or with `strict_duration` too few.

        Args:
            start_time: seconds; below 0 they count from the end.
            duration: seconds; 0 for all that follows.
        """
        start, duration, frames = start_time or 0.0, duration or 0.0, self.get_frame_count()
        begins = max(start * self.rate + (frames if start < 0 else 0), 0.0)
        first = math.ceil(begins - TOLERANCE)
        end = min(math.ceil(begins + duration * self.rate - TOLERANCE), frames) if duration else frames
        short = strict_duration and end - begins < duration * self.rate - TOLERANCE
        if end <= first or short:
            return None
        return PngVideo(self.folder, self.rate, first=self.first + first, count=end - first)

    def get_dimensions(self) -> tuple[int, int]:
        with Image.open(self.folder / png_name(self.first + 1)) as image:
            return image.size

    def get_frame_count(self) -> int:
        return sum(1 for _ in self._paths())

    def get_frame_rate(self) -> Fraction:
        return self.rate

    def get_duration(self) -> float:
        return float(self.get_frame_count() / self.rate)
