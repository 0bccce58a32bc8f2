"""A folder of PNG images as ComfyUI's VIDEO."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import Input, InputImpl, Types
from PIL import Image

from .video_writer import png_name


class PngVideo(Input.Video):
    """A folder of PNG images as ComfyUI's VIDEO; the images are read when somebody asks for them."""

    def __init__(self, folder: Path, rate: Fraction) -> None:
        self.folder = folder
        self.rate = rate

    def _paths(self) -> Iterator[Path]:
        number = 1
        while (path := self.folder / png_name(number)).is_file():
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

    def as_trimmed(self, *args: Any, **kwargs: Any) -> Input.Video | None:
        return self._loaded().as_trimmed(*args, **kwargs)

    def get_dimensions(self) -> tuple[int, int]:
        with Image.open(self.folder / png_name(1)) as image:
            return image.size

    def get_frame_count(self) -> int:
        return sum(1 for _ in self._paths())

    def get_frame_rate(self) -> Fraction:
        return self.rate

    def get_duration(self) -> float:
        return float(self.get_frame_count() / self.rate)
