"""Motion in the demo's world: paths that no caption decides, and their optical flow as people would give it.

A caption says where a sprite goes until it bounces. A command says otherwise: here sprites turn at random moments, so
that flow and caption disagree and a model must learn which of them to follow. The true flow is known; what the model is
given is that flow as it comes from a mask, a drawn track, a measured video or a moving camera, more or less precise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diagonal_sampler.demo_autoencoder import SPACE_FACTOR, latent_frames
from diagonal_sampler.flow import ADAPTER_CHANNELS, NothingValid, OpticalFlow, adapter_features, grid
from distillation import sprites
from distillation.sprites import FRAME_SIZE, Scenes

FASTEST = 2.75
"""Pixels per frame; the fastest word of the captions is 2.25."""
TURNING_SHARE = 0.7
"""Of clips, whose sprites leave their caption's motion at some frame."""
FIRST_TURN_SHARE = 0.3
"""Of turning sprites, which do so from the start."""
NEXT_TURN = (6, 24)
"""Pixel frames from a turn to the next, if there is one."""
AGAIN_SHARE = 0.7
"""Of turns, which are followed by another."""
RESTING_SHARE = 0.1
"""Of turns, after which a sprite stays where it is."""
ONE_OF_TWO_SHARE = 0.2
"""Of clips with two sprites, in which one of them is free."""
LATE_SHARE = 0.3
"""Of clips, in which nothing is commanded before a random frame; of clips, in which nothing is after one."""
DISC_RANGE = (6.0, 14.0)
"""Pixels around a track that move with it; a sprite's bounding box has half sides of 7 to 8."""
KINDS = {"mask": 0.2, "disc": 0.55, "video": 0.15, "camera": 0.1}
"""How a field is given, and how often: within a sprite's outline, in a disc around its track, with a background that is
known to rest, or with a background that moves along (of a single sprite)."""
COARSE_SHARE = 0.3
"""Of clips, whose path is known at every COARSE_STEP-th frame only and straight between them."""
COARSE_STEP = 8
JITTER_SHARE, JITTER = 0.3, 0.3
"""Of clips, whose vectors are off; by how much, in pixels per frame (deviation)."""


@dataclass(frozen=True, slots=True)
class Commanded:
    """Clips that move as a field says.

    Attributes:
        centres: [N, 2, T, 2] of the sprites, in pixels.
        fields: of each clip, [T - 1 steps, 64, 64]; None where chance left nothing of it.
    """

    centres: Tensor
    fields: list[OpticalFlow | None]

    def features(self, frames: int) -> Tensor:
        """What the adapter is given, [N, 4, frames, 8, 8]; frames in latent frames."""
        side = FRAME_SIZE // SPACE_FACTOR
        return torch.cat([features_of(field, frames, side, side) for field in self.fields])


def features_of(field: OpticalFlow | None, frames: int, height: int, width: int) -> Tensor:
    """`adapter_features`, and zeros for a clip without flow, also where a field is too fine for the latent's cells."""
    if field is not None:
        try:
            return adapter_features(field, frames, height, width)
        except NothingValid:
            pass
    return torch.zeros(1, ADAPTER_CHANNELS, frames, height, width)


def command(scenes: Scenes, seed: int, first_index: int = 0, *, frames: int = sprites.CLIP_FRAMES) -> Commanded:
    """Random paths and their fields; those of scene i depend on (seed, first_index + i) and the scene only.

    Args:
        frames: pixel frames T, at least 5.
    """
    centres, fields = [], []
    for row in range(len(scenes)):
        rng = np.random.default_rng([seed, first_index + row, 0xF10A])
        present = [sprite for sprite in (0, 1) if bool(scenes.present[row, sprite])]
        path = _path(scenes, row, frames, rng)
        centres.append(path)
        fields.append(_field(scenes, row, present, path, rng))
    return Commanded(torch.stack(centres), fields)


def _path(scenes: Scenes, row: int, frames: int, rng: np.random.Generator) -> Tensor:
    """[2, T, 2] centres of a scene's sprites, bouncing; some turn, once or often."""
    paths = []
    turning = rng.random() < TURNING_SHARE
    for sprite in (0, 1):
        radius = scenes.radius[row, sprite]
        at, velocity, point = 0, scenes.velocity[row, sprite], scenes.start[row, sprite]
        turns: list[int] = []
        if turning:
            turns = [0 if rng.random() < FIRST_TURN_SHARE else int(rng.integers(1, max(2, frames * 2 // 3)))]
            while turns[-1] < frames and rng.random() < AGAIN_SHARE:
                turns.append(turns[-1] + int(rng.integers(*NEXT_TURN)))
        pieces = []
        for end in (*(turn for turn in turns if turn < frames - 1), frames - 1):
            # `end` belongs to the next piece, but for the last one.
            points = sprites.bounce(point, velocity, radius, torch.arange(end - at + 1).float())
            pieces.append(points if end == frames - 1 else points[:-1])
            angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, FASTEST) * (rng.random() >= RESTING_SHARE)
            velocity = torch.tensor([np.cos(angle) * speed, np.sin(angle) * speed], dtype=torch.float32)
            at, point = end, points[-1]
        paths.append(torch.cat(pieces))
    return torch.stack(paths)


def _field(scenes: Scenes, row: int, present: list[int], path: Tensor, rng: np.random.Generator) -> OpticalFlow | None:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "camera" and len(present) > 1:
        kind = "video"
    if kind in ("mask", "disc") and len(present) > 1 and rng.random() < ONE_OF_TWO_SHARE:
        present = [present[rng.integers(len(present))]]
    steps = path.shape[1] - 1
    place = path[:, :-1]
    if rng.random() < COARSE_SHARE:
        path = _coarse(path)
    motion = path.diff(dim=1)  # [2, steps, 2]
    if rng.random() < JITTER_SHARE:
        motion = motion + torch.from_numpy(rng.normal(0, JITTER, motion.shape)).float()
    flow = torch.zeros(steps, FRAME_SIZE, FRAME_SIZE, 2)
    valid = torch.zeros(steps, FRAME_SIZE, FRAME_SIZE, dtype=torch.bool)
    if kind in ("video", "camera"):
        valid[:] = True
    if kind == "camera":
        flow += motion[present[0]][:, None, None]
    else:
        radius = float(rng.uniform(*DISC_RANGE)) if kind == "disc" else None
        for sprite in reversed(present):  # the first is in front
            inside = _outline(scenes, row, sprite, place[sprite], radius)
            flow = torch.where(inside[..., None], motion[sprite][:, None, None], flow)
            valid |= inside
    if rng.random() < LATE_SHARE:
        valid[: int(rng.integers(max(1, steps * 2 // 3)))] = False
    if rng.random() < LATE_SHARE:
        valid[int(rng.integers(steps // 3, steps)) :] = False
    return OpticalFlow(flow, valid) if bool(valid.any()) else None


def _outline(scenes: Scenes, row: int, sprite: int, place: Tensor, radius: float | None) -> Tensor:
    """[steps, 64, 64] bool: the pixels of a sprite at its places [steps, 2], or those within a radius."""
    away = grid(FRAME_SIZE, FRAME_SIZE) + 0.5 - place[:, None, None]
    if radius is not None:
        return away.square().sum(-1) <= radius**2
    count = len(place)
    covered = sprites.coverage(
        scenes.shape[row, sprite].expand(count),
        away[:, :1, :, 0],
        away[:, :, :1, 1],
        scenes.radius[row, sprite].expand(count),
    )
    return covered > 0.5


def _coarse(path: Tensor) -> Tensor:
    """The path [2, T, 2] through every COARSE_STEP-th of its points and the last, straight between them."""
    frames = path.shape[1]
    known = torch.unique(torch.tensor([*range(0, frames, COARSE_STEP), frames - 1]))
    at = torch.arange(frames)
    after = torch.searchsorted(known, at).clamp(min=1)
    low, high = known[after - 1], known[after]
    share = ((at - low) / (high - low).float())[:, None]
    return torch.lerp(path[:, low], path[:, high], share)


def encode_clips(autoencoder, scenes: Scenes, centres: Tensor) -> Tensor:
    """Standardised latents [N, 16, T_lat, 8, 8] of clips whose sprites are at `centres`; T must be 4n + 1."""
    groups = sprites.to_pixels(sprites.draw(scenes, centres))
    groups = torch.cat([groups[:, :, :1].expand(-1, -1, 3, -1, -1), groups], dim=2)
    count, frames = len(scenes), latent_frames(centres.shape[2])
    groups = groups.unflatten(2, (frames, -1)).permute(0, 2, 3, 1, 4, 5)  # [N, T_lat, 4, 3, H, W]
    latent = autoencoder.encode_groups(groups.flatten(2, 3).flatten(0, 1))
    return latent.unflatten(0, (count, frames)).movedim(2, 1)
