"""The optical flow that a distillation is conditioned on: what its adapter is given for each clip of a batch.

Three sources, the values of the recipe's `flow_adapter`:

- `sprites`: a random path of the sprites that a demo caption names (distillation.sprite_motion).
- `synthetic`: random camera motions and tracks, for any model; no prompt knows of them.
- a folder: for the prompt at place 12 of the prompts file the file `12.safetensors` with `flow` [T, H, W, 2] (pixels
  per pixel frame, x right, y down) and perhaps `valid` [T, H, W] bool. Any size; `OpticalFlow.fit` says how it is
  fitted. A prompt without a file has no flow.

Whatever the source, `flow_adapter.adapter_features` turns the field into what the adapter sees, as it does in
ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diagonal_sampler.captions import parse_caption
from diagonal_sampler.flow import OpticalFlow, camera_flow, tracks_flow
from diagonal_sampler.frames import pixel_frames
from diagonal_sampler.wan_layout import ADAPTER_CHANNELS
from distillation import sprite_motion, sprites
from distillation.common import generator_at

SPRITES, SYNTHETIC = "sprites", "synthetic"
_DROPOUT, _DRAW = 19, 23  # positions of this module's random numbers under a clip's seed

CAMERA_SHARE = 0.5
"""Of synthetic fields; the others are tracks."""
FASTEST_PAN = 0.01
"""Of the frame's longer side, per pixel frame; a pan across a third of the frame in two seconds."""
FASTEST_ZOOM, FASTEST_TURN = 0.8, 0.8
"""Percent, and degrees, per pixel frame."""
MOST_TRACKS = 4
TRACK_RADII = (0.08, 0.25)
"""Of the frame's shorter side."""


def synthetic_flow(steps: int, height: int, width: int, generator: torch.Generator) -> OpticalFlow:
    """A random camera motion, valid everywhere, or up to MOST_TRACKS tracks that drift in curves.

    Args:
        steps: pixel frames less one.
        height, width: of the field, any size of the clip's shape.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    speed = FASTEST_PAN * max(height, width)
    if uniform(0, 1) < CAMERA_SHARE:
        return camera_flow(
            steps,
            height,
            width,
            pan=(uniform(-speed, speed), uniform(-speed, speed)),
            zoom=uniform(-FASTEST_ZOOM, FASTEST_ZOOM),
            rotation=uniform(-FASTEST_TURN, FASTEST_TURN),
        )
    count = 1 + int(uniform(0, MOST_TRACKS - 1e-6))
    time = torch.arange(steps + 1).float()
    paths = []
    for _ in range(count):
        angle, turn = uniform(0, 2 * math.pi), uniform(-0.03, 0.03)
        step = uniform(0, speed) * torch.stack([torch.cos(angle + turn * time), torch.sin(angle + turn * time)], dim=1)
        start = torch.tensor([uniform(0, width - 1), uniform(0, height - 1)])
        paths.append(start + step.cumsum(0) - step[0])
    radius = uniform(*TRACK_RADII) * min(height, width)
    return tracks_flow(torch.stack(paths, dim=1), None, height, width, radius=max(radius, 1.0))


class FlowFields:
    """Draws the motion of clips; what a clip is given depends on its prompt and its seed only.

    Args:
        source: `sprites`, `synthetic` or a folder.
        prompts: all prompts, by place.
        height, width: of the latent.
        dropout: share of clips in [0, 1] that are given no flow.

    Raises:
        ValueError: a folder without flow files.
    """

    def __init__(self, source: str, prompts: Sequence[str], height: int, width: int, dropout: float) -> None:
        self.source, self.prompts, self.dropout = source, prompts, dropout
        self.height, self.width = height, width
        self.folder = None if source in (SPRITES, SYNTHETIC) else Path(source)
        if self.folder is not None and not any(self.folder.glob("*.safetensors")):
            raise ValueError(
                f"flow_adapter is {source!r}, a folder with no flow files (0.safetensors for the first prompt, and so "
                f"on); give one that has them, or {SPRITES} or {SYNTHETIC}. See distillation/README.md."
            )

    def features(self, rows: Sequence[int], seeds: Sequence[int], frames: int) -> Tensor:
        """What the adapter is given, [B, 4, frames, height, width] float32 on the CPU; 0 where a clip has no flow.

        Args:
            rows: the clips' prompts.
            seeds: of the clips.
            frames: latent frames.

        Raises:
            ValueError: a flow file that cannot be used.
        """
        out = torch.zeros(len(seeds), ADAPTER_CHANNELS, frames, self.height, self.width)
        kept = [
            place
            for place, seed in enumerate(seeds)
            if float(torch.rand((), generator=generator_at(seed, _DROPOUT))) >= self.dropout
        ]
        if self.source == SPRITES and kept and frames > 1:
            out[kept] = self._of_sprites([rows[place] for place in kept], [seeds[place] for place in kept], frames)
            return out
        for place in kept:
            field = self._field(rows[place], seeds[place], pixel_frames(frames))
            out[place] = sprite_motion.features_of(field, frames, self.height, self.width)[0]
        return out

    def _of_sprites(self, rows: Sequence[int], seeds: Sequence[int], frames: int) -> Tensor:
        """The features of paths of the sprites that captions name, [B, 4, frames, height, width]."""
        scenes, told = [], []
        for row, seed in zip(rows, seeds, strict=True):
            own = seed & 0xFFFFFFFF
            scenes.append(sprites.make_scenes([parse_caption(self.prompts[row])], own))
            told.append(sprite_motion.commands(scenes[-1], own, frames=pixel_frames(frames)))
        everyone = sprites.Scenes.joined(scenes)
        return sprite_motion.features(sprite_motion.Commands.joined(told), everyone, frames, self.height, self.width)

    def _field(self, row: int, seed: int, length: int) -> OpticalFlow | None:
        """The field of a clip of `length` pixel frames, None where it has none."""
        if length < 2:
            return None
        if self.folder is not None:
            return self._read(row)
        generator = generator_at(seed, _DRAW)
        return synthetic_flow(length - 1, 2 * self.height, 2 * self.width, generator)

    def _read(self, row: int) -> OpticalFlow | None:
        assert self.folder is not None
        path = self.folder / f"{row}.safetensors"
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            flow = tensors["flow"].float()
            valid = tensors.get("valid")
            return OpticalFlow.everywhere(flow) if valid is None else OpticalFlow(flow, valid.bool())
        except (KeyError, SafetensorError, ValueError) as error:
            raise ValueError(f"flow file {path}: {error}") from error
