"""The demo's world: coloured sprites that move and bounce on a plain background, with exact positions.

Everything is a pure function of (seed, index): clip 17 of seed 3 is the same clip whatever else was sampled.
Positions come from a closed form (a triangle wave per axis), so a clip has no length: any frame can be rendered
alone, and frame 810 costs what frame 0 costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diagonal_sampler.captions import COLOURS, DIRECTIONS, SHAPES, SPEEDS, SpriteSpec, caption_of

FRAME_SIZE = 64
"""Height and width of the world, in pixels of a frame at scale 1. All lengths and speeds here are in these pixels; a
frame at scale 2 shows the same world in 128x128."""
FRAMES_PER_SECOND = 16
CLIP_FRAMES = 81

RGB: dict[str, tuple[int, int, int]] = {
    "red": (235, 30, 30),
    "green": (30, 200, 40),
    "blue": (45, 70, 255),
    "yellow": (250, 225, 20),
    "cyan": (20, 220, 230),
    "magenta": (230, 40, 220),
}
"""Corners of the colour cube, well apart from each other and from every background."""
BACKGROUND_LEVELS: tuple[int, ...] = (0, 28, 56, 84)
PIXELS_PER_FRAME: dict[str, float] = {"slowly": 1.0, "steadily": 1.5, "fast": 2.25}
VELOCITY: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""(x, y) unit vectors; y grows downwards."""
RADIUS_RANGE = (7.0, 8.0)
"""Half the side of a sprite's bounding box, in pixels."""
START_SPREAD = 12.0
"""A sprite starts within this many pixels of the edge it moves away from, so its first second shows where it goes."""

_PATCH_BORDER = 6
"""The window a sprite is drawn in is this much wider than its largest diameter: soft edge and sub-pixel offset."""
_PLACEMENT_TRIES = 24


@dataclass(frozen=True, slots=True)
class Scenes:
    """N scenes of up to two sprites; arrays are indexed [scene, sprite]; absent sprites have `present` False."""

    specs: tuple[tuple[SpriteSpec, ...], ...]
    present: Tensor  # bool [N, 2]
    shape: Tensor  # int64 [N, 2], index into SHAPES
    colour: Tensor  # float [N, 2, 3], 0..255
    start: Tensor  # float [N, 2, 2], (x, y) of the centre at frame 0, in pixels
    velocity: Tensor  # float [N, 2, 2], pixels per frame at frame 0
    radius: Tensor  # float [N, 2], pixels
    background: Tensor  # float [N], gray level 0..255

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def captions(self) -> list[str]:
        return [caption_of(specs) for specs in self.specs]

    @classmethod
    def joined(cls, parts: Sequence[Scenes]) -> Scenes:
        """All scenes of several, in order."""
        tensors = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)[1:])
        return cls(tuple(spec for part in parts for spec in part.specs), *tensors)

    def take(self, rows: Tensor) -> Scenes:
        """The scenes at `rows` (int64 [M]), in that order."""
        tensors = (getattr(self, field.name)[rows] for field in fields(self)[1:])
        return Scenes(tuple(self.specs[row] for row in rows.tolist()), *tensors)

    def to(self, device: torch.device) -> Scenes:
        """The scenes with their tensors on a device, where they are then drawn."""
        return Scenes(self.specs, *(getattr(self, field.name).to(device) for field in fields(self)[1:]))


def bounce(start: Tensor, velocity: Tensor, radius: Tensor, frames: Tensor) -> Tensor:
    """Centres of sprites that reflect at the frame's edges.

    Args:
        start: [..., 2] centre at frame 0, in pixels.
        velocity: [..., 2] pixels per frame at frame 0.
        radius: [...] half extent; the centre stays within [radius, FRAME_SIZE - radius].
        frames: [..., T] frame numbers, broadcast against the leading axes.

    Returns:
        [..., T, 2] centres in pixels.
    """
    low = radius[..., None, None]
    span = FRAME_SIZE - 2 * low
    travelled = start.unsqueeze(-2) - low + velocity.unsqueeze(-2) * frames.unsqueeze(-1)
    phase = torch.remainder(travelled, 2 * span)
    return low + torch.where(phase > span, 2 * span - phase, phase)


def positions(scenes: Scenes, frames: Tensor) -> Tensor:
    """True centres, [N, 2, T, 2] as (x, y) in pixels, of every sprite.

    Args:
        frames: [T] or [N, T] frame numbers.
    """
    frames = frames.to(scenes.start)
    frames = frames.expand(len(scenes), frames.shape[-1]).unsqueeze(1)
    return bounce(scenes.start, scenes.velocity, scenes.radius, frames)


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased coverage in [0, 1] of shapes at offsets (x, y) from their centres.

    Args:
        shape: int [N] index into SHAPES.
        x: [N, 1, W] horizontal offsets in pixels.
        y: [N, H, 1] vertical offsets in pixels.
        radius: [N] half extent of the bounding box.
    """
    r = radius[:, None, None]
    ax, ay = x.abs(), y.abs()
    distance = torch.empty(torch.broadcast_shapes(x.shape, y.shape), dtype=x.dtype, device=x.device)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        if not bool(rows.any()):
            continue
        sx, sy, sax, say, sr = x[rows], y[rows], ax[rows], ay[rows], r[rows]
        if name == "circle":
            distance[rows] = torch.hypot(sx, sy) - sr
        elif name == "square":
            distance[rows] = torch.maximum(sax, say) - 0.92 * sr
        elif name == "triangle":  # apex up; the slanted edges run from (0, -r) to (+-r, r)
            distance[rows] = torch.maximum(sy - sr, (2 * sax - sy - sr) / 5**0.5)
        elif name == "cross":
            arm = 0.36 * sr
            upright = torch.maximum(sax - arm, say - sr)
            distance[rows] = torch.minimum(upright, torch.maximum(sax - sr, say - arm))
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Scenes, frames: Tensor, scale: int = 1) -> Tensor:
    """Draws frames.

    Args:
        frames: [T] or [N, T] frame numbers.
        scale: pixels of a frame per pixel of the world, each way.

    Returns:
        uint8 [N, T, 3, scale * FRAME_SIZE, scale * FRAME_SIZE]; the first sprite is in front where two cross.
    """
    return draw(scenes, positions(scenes, frames), scale)


def draw(scenes: Scenes, centres: Tensor, scale: int = 1) -> Tensor:
    """Draws the sprites at given places.

    Args:
        centres: [N, 2, T, 2] as (x, y) in pixels of the world, within it.
        scale: as `render`.

    Returns:
        as `render`, on the device of `scenes`.
    """
    count, length = len(scenes), centres.shape[2]
    centres, radius = scale * centres, scale * scenes.radius
    patch = 2 * math.ceil(scale * RADIUS_RANGE[1]) + _PATCH_BORDER
    margin = patch // 2
    side = scale * FRAME_SIZE + 2 * margin
    # A pixel is four bytes (the last unused) seen as one int32: indexing then moves one element, not three.
    gray = scenes.background.to(torch.uint8).repeat_interleave(length)
    canvas = gray[:, None, None].expand(-1, side * side, 4).contiguous().view(torch.int32)[..., 0]
    cells = torch.arange(patch, device=centres.device)
    for sprite in (1, 0):
        rows = scenes.present[:, sprite].repeat_interleave(length).nonzero()[:, 0]
        if not len(rows):
            continue
        owner = rows // length
        centre = centres[:, sprite].reshape(-1, 2)[rows]
        corner = centre.floor().long() - margin  # of the patch, in frame pixels
        # Pixel i covers [i, i+1), so its centre is at i + 0.5.
        x = corner[:, :1] + cells + 0.5 - centre[:, :1]
        y = corner[:, 1:] + cells + 0.5 - centre[:, 1:]
        alpha = coverage(scenes.shape[owner, sprite], x[:, None, :], y[:, :, None], radius[owner, sprite])
        lines = (corner[:, 1:] + margin + cells)[:, :, None]
        where = (lines * side + (corner[:, :1] + margin + cells)[:, None, :]).flatten(1)
        row = rows[:, None]
        under = canvas[row, where].unsqueeze(-1).view(torch.uint8).float()
        colour = F.pad(scenes.colour[owner, sprite], (0, 1))[:, None, :]
        drawn = torch.addcmul(under, colour - under, alpha.flatten(1).unsqueeze(-1)).round_().to(torch.uint8)
        canvas[row, where] = drawn.view(torch.int32)[..., 0]
    frames_rgb = canvas.unsqueeze(-1).view(torch.uint8).view(count, length, side, side, 4)
    inner = frames_rgb[:, :, margin:-margin, margin:-margin, :3]
    return inner.permute(0, 1, 4, 2, 3).contiguous()


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 [N, T, 3, H, W] -> float [N, 3, T, H, W] in [-1, 1], the layout of the autoencoder."""
    return frames.movedim(1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------
# Which captions exist, and which are never trained on


def is_held_out(sprite: SpriteSpec) -> bool:
    """Whether a sprite's (shape, colour, direction) is kept out of training, in any clip and at any speed.

    Twelve of the 96 triples, spread so that every shape, colour, direction and every pair of (shape, colour)
    they touch is still seen in training with other partners.
    """
    shape, colour = SHAPES.index(sprite.shape), COLOURS.index(sprite.colour)
    direction = DIRECTIONS.index(sprite.direction)
    return (shape - colour) % 2 == 0 and direction == (colour + shape // 2) % len(DIRECTIONS)


def sample_sprite(rng: np.random.Generator, *, held_out: bool) -> SpriteSpec:
    """One random sprite from the training side or the held-out side of the split."""
    while True:
        sprite = SpriteSpec(
            SHAPES[rng.integers(len(SHAPES))],
            COLOURS[rng.integers(len(COLOURS))],
            DIRECTIONS[rng.integers(len(DIRECTIONS))],
            SPEEDS[rng.integers(len(SPEEDS))],
        )
        if is_held_out(sprite) == held_out:
            return sprite


def sample_specs(rng: np.random.Generator, *, held_out: bool = False) -> tuple[SpriteSpec, ...]:
    """One or two sprites of different colours; on the held-out side the first (or only) one is never trained."""
    sprites = [sample_sprite(rng, held_out=held_out)]
    if rng.random() < 0.55:
        while True:
            second = sample_sprite(rng, held_out=held_out and rng.random() < 0.5)
            if second.colour != sprites[0].colour:
                break
        sprites.append(second)
        if rng.random() < 0.5:
            sprites.reverse()
    return tuple(sprites)


def training_specs(seed: int, row: int) -> tuple[SpriteSpec, ...]:
    """Sprites of caption `row` of a training that asks for captions and not for clips."""
    return sample_specs(np.random.default_rng([seed, row, 0xCAB]))


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """Distinct captions, each with at least one (shape, colour, direction) that no training clip shows."""
    rng = np.random.default_rng([seed, 0x4E1D])
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[caption_of(sample_specs(rng, held_out=True))] = None
    return list(captions)


# ---------------------------------------------------------------------------------------------------------------
# Sampling scenes


def _place(specs: Sequence[SpriteSpec], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Starts [n, 2] and radii [n] for sprites, of several tries those with the least crossing."""
    best: tuple[int, np.ndarray, np.ndarray] | None = None
    frames = torch.arange(0, CLIP_FRAMES, 2).float()
    for _ in range(_PLACEMENT_TRIES if len(specs) > 1 else 1):
        radii = rng.uniform(*RADIUS_RANGE, size=len(specs))
        starts = np.stack([rng.uniform(r, FRAME_SIZE - r, size=2) for r in radii])
        for row, (spec, r) in enumerate(zip(specs, radii, strict=True)):
            step = VELOCITY[spec.direction]
            axis = 0 if step[0] else 1
            from_edge = r + rng.uniform(0, START_SPREAD)
            starts[row, axis] = from_edge if step[axis] > 0 else FRAME_SIZE - from_edge
        if len(specs) == 1:
            return starts, radii
        velocity = np.stack([np.array(VELOCITY[s.direction]) * PIXELS_PER_FRAME[s.speed] for s in specs])
        path = bounce(
            torch.from_numpy(starts).float(),
            torch.from_numpy(velocity).float(),
            torch.from_numpy(radii).float(),
            frames.expand(len(specs), -1),
        )
        reach = float(radii.sum())
        touching = ((path[0] - path[1]).abs().amax(-1) < reach).float()
        # Touching at the very start hides which sprite is which, so it counts more.
        score = int(touching.sum()) + 100 * int(touching[:6].sum())
        if best is None or score < best[0]:
            best = (score, starts, radii)
        if score == 0:
            break
    assert best is not None
    return best[1], best[2]


def make_scenes(specs: Sequence[Sequence[SpriteSpec]], seed: int, first_index: int = 0) -> Scenes:
    """Random placements for given sprites; scene i depends on (seed, first_index + i) and its sprites only."""
    count = len(specs)
    present = torch.zeros(count, 2, dtype=torch.bool)
    shape = torch.zeros(count, 2, dtype=torch.int64)
    colour = torch.zeros(count, 2, 3)
    start = torch.full((count, 2, 2), FRAME_SIZE / 2)
    velocity = torch.zeros(count, 2, 2)
    radius = torch.full((count, 2), RADIUS_RANGE[0])
    background = torch.zeros(count)
    for row, sprites in enumerate(specs):
        rng = np.random.default_rng([seed, first_index + row, 0x5CE])
        background[row] = BACKGROUND_LEVELS[rng.integers(len(BACKGROUND_LEVELS))]
        starts, radii = _place(sprites, rng)
        for column, sprite in enumerate(sprites):
            present[row, column] = True
            shape[row, column] = SHAPES.index(sprite.shape)
            colour[row, column] = torch.tensor(RGB[sprite.colour], dtype=torch.float32)
            velocity[row, column] = torch.tensor(VELOCITY[sprite.direction]) * PIXELS_PER_FRAME[sprite.speed]
            start[row, column] = torch.from_numpy(starts[column]).float()
            radius[row, column] = float(radii[column])
    return Scenes(tuple(tuple(s) for s in specs), present, shape, colour, start, velocity, radius, background)


def sample_scenes(count: int, seed: int, first_index: int = 0, *, held_out: bool = False) -> Scenes:
    """Random scenes `first_index .. first_index + count` of a seed."""
    specs = [
        sample_specs(np.random.default_rng([seed, first_index + row, int(held_out)]), held_out=held_out)
        for row in range(count)
    ]
    return make_scenes(specs, seed, first_index)
