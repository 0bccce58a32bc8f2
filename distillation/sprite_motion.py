"""Motion in the demo's world: paths that no caption decides, and their optical flow as people would give it.

A caption says where a sprite goes until it bounces. A command says otherwise: here sprites turn at random moments, so
that flow and caption disagree and a model must learn which of them to follow. They turn only where the command says so:
of turns that nobody told it a model would learn the mean, which is a blur. The true flow is known; what the model is
given is that flow as it comes from a mask, a drawn track, a measured video or a moving camera, more or less precise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of

import numpy as np
import torch
from torch import Tensor

from diagonal_sampler.demo_autoencoder import SPACE_FACTOR
from diagonal_sampler.flow import NothingValid, OpticalFlow
from diagonal_sampler.flow_adapter import adapter_features, told_motion
from diagonal_sampler.frames import TIME_FACTOR, latent_frames
from diagonal_sampler.wan_layout import ADAPTER_CHANNELS
from distillation import sprites
from distillation.sprites import FRAME_SIZE, Scenes

FASTEST = 2.75
"""Pixels per frame; the fastest word of the captions is 2.25."""
TURNING_SHARE = 0.7
"""Of clips, whose commanded sprites leave their caption's motion at some frame."""
FIRST_TURN_SHARE = 0.5
"""Of turning sprites, which do so as soon as they are commanded."""
NEXT_TURN = (6, 24)
"""Pixel frames from a turn to the next, if there is one."""
AGAIN_SHARE = 0.7
"""Of turns, which are followed by another."""
RESTING_SHARE = 0.1
"""Of turns, after which a sprite stays where it is."""
ONE_OF_TWO_SHARE = 0.2
"""Of clips with two sprites, in which one of them is free."""
LATE_SHARE = 0.5
"""Of clips, in which nothing is commanded before some frame."""
AT_A_CHUNK_SHARE = 0.5
"""Of these, in which that frame ends a chunk, as where a command goes on from a finished one."""
CHUNK_STEPS = 12
"""Pixel frames of a chunk; the first has three fewer."""
EARLY_END_SHARE = 0.2
"""Of clips, in which nothing is commanded after some frame."""
DISC_RANGE = (6.0, 14.0)
"""Pixels around a track that move with it; a sprite's bounding box has half sides of 7 to 8."""
KINDS = {"mask": 0.15, "disc": 0.45, "video": 0.1, "camera": 0.3}
"""How a field is given, and how often: within a sprite's outline, in a disc around its track, with a background that is
known to rest, or with a background that moves along (of a single sprite)."""
DISC, CAMERA = list(KINDS).index("disc"), list(KINDS).index("camera")
FIRST_WHOLE_KIND = list(KINDS).index("video")
"""This kind and those after it say something of every pixel."""
COARSE_SHARE = 0.15
"""Of clips, whose path is known at every COARSE_STEP-th frame only and straight between them."""
COARSE_STEP = 8
JITTER_SHARE, JITTER = 0.15, 0.2
"""Of clips, whose vectors are off; by how much, in pixels per frame (deviation)."""


@dataclass(frozen=True, slots=True)
class Commands:
    """What N clips are told, in numbers; `fields` draws them, on any device.

    Attributes:
        centres: [N, 2, T, 2] where the sprites are, in pixels.
        motion: [N, 2, T - 1, 2] as it is given, more or less precise, in pixels per pixel frame.
        moved: bool [N, 2], the sprites that the field moves.
        kind: int64 [N], index into KINDS.
        radius: [N] of a disc, in pixels.
        first, last: int64 [N]; the steps from first up to last, without it, are commanded.
    """

    centres: Tensor
    motion: Tensor
    moved: Tensor
    kind: Tensor
    radius: Tensor
    first: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    @classmethod
    def joined(cls, parts: Sequence[Commands]) -> Commands:
        """All clips of several, in order."""
        return cls(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields_of(cls)))

    def to(self, device: torch.device) -> Commands:
        """The same on a device."""
        return Commands(*(getattr(self, item.name).to(device) for item in fields_of(self)))

    def take(self, rows: Tensor | slice) -> Commands:
        """The clips at `rows`, in that order."""
        return Commands(*(getattr(self, item.name)[rows] for item in fields_of(self)))


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
    drawn = commands(scenes, seed, first_index, frames=frames)
    flow, valid = fields(drawn, scenes)
    rows = zip(flow, valid, strict=True)
    return Commanded(drawn.centres, [OpticalFlow(*row) if bool(row[1].any()) else None for row in rows])


def commands(scenes: Scenes, seed: int, first_index: int = 0, *, frames: int = sprites.CLIP_FRAMES) -> Commands:
    """What `command` tells, before it is drawn: little work, and none of it a device's."""
    return _stack([_command(scenes, row, frames, seed, first_index + row) for row in range(len(scenes))])


def _stack(rows: list[tuple]) -> Commands:
    return Commands(*(torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*rows, strict=True)))


def _command(scenes: Scenes, row: int, frames: int, seed: int, index: int) -> tuple:
    """One clip's values of Commands, in its order."""
    rng = np.random.default_rng([seed, index, 0xF10A])
    steps = frames - 1
    present = [sprite for sprite in (0, 1) if bool(scenes.present[row, sprite])]
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "camera" and len(present) > 1:
        kind = "video"
    if kind in ("mask", "disc") and len(present) > 1 and rng.random() < ONE_OF_TWO_SHARE:
        present = [present[rng.integers(len(present))]]
    first, last = 0, steps
    if rng.random() < LATE_SHARE:
        first = int(rng.integers(max(1, steps * 2 // 3)))
        if rng.random() < AT_A_CHUNK_SHARE:
            first = min(steps - 1, max(1, first // CHUNK_STEPS) * CHUNK_STEPS - TIME_FACTOR)
    if rng.random() < EARLY_END_SHARE:
        last = int(rng.integers(steps // 3, steps))
    turning = rng.random() < TURNING_SHARE and last > first
    paths = []
    for sprite in (0, 1):
        # What nothing is said of goes on as it did: nobody could know another way.
        turns = _turns(first, last, rng) if turning and sprite in present else []
        paths.append(_path(scenes, row, sprite, turns, frames, rng))
    centres = torch.stack(paths)
    given = _coarse(centres) if rng.random() < COARSE_SHARE else centres
    motion = given.diff(dim=1)
    if rng.random() < JITTER_SHARE:
        motion = motion + torch.from_numpy(rng.normal(0, JITTER, motion.shape)).float()
    moved = torch.tensor([sprite in present for sprite in (0, 1)])
    return centres, motion, moved, list(KINDS).index(kind), float(rng.uniform(*DISC_RANGE)), first, last


def _turns(first: int, last: int, rng: np.random.Generator) -> list[int]:
    """Pixel frames at which a sprite that is commanded in the steps first..last turns."""
    turns = [first if rng.random() < FIRST_TURN_SHARE else int(rng.integers(first, last))]
    while rng.random() < AGAIN_SHARE:
        turns.append(turns[-1] + int(rng.integers(*NEXT_TURN)))
    return [turn for turn in turns if turn < last]


def _path(scenes: Scenes, row: int, sprite: int, turns: list[int], frames: int, rng: np.random.Generator) -> Tensor:
    """[T, 2] centres of a sprite, bouncing, that leaves its caption's motion at some frames."""
    radius = scenes.radius[row, sprite]
    at, velocity, point = 0, scenes.velocity[row, sprite], scenes.start[row, sprite]
    pieces = []
    for end in (*turns, frames - 1):
        # `end` belongs to the next piece, but for the last one.
        points = sprites.bounce(point, velocity, radius, torch.arange(end - at + 1).float())
        pieces.append(points if end == frames - 1 else points[:-1])
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, FASTEST) * (rng.random() >= RESTING_SHARE)
        velocity = torch.tensor([np.cos(angle) * speed, np.sin(angle) * speed], dtype=torch.float32)
        at, point = end, points[-1]
    return torch.cat(pieces)


def fields(told: Commands, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """The fields of clips, on the device of both: flow [N, T - 1, 64, 64, 2] and where it is valid."""
    masks, everywhere = _masks(told, scenes), _everywhere(told)
    flow = everywhere[:, :, None, None]
    for sprite, mask in enumerate(masks):
        flow = torch.where(mask[..., None], told.motion[:, sprite, :, None, None], flow)
    whole = told.kind >= FIRST_WHOLE_KIND
    valid = masks[0] | masks[1] | whole[:, None, None, None]
    return flow, valid & _in_time(told)[:, :, None, None]


def features(told: Commands, scenes: Scenes, frames: int, height: int, width: int) -> Tensor:
    """What the adapter is given of many clips at once, [N, 4, frames, height, width], on their device.

    It is `adapter_features` of each clip's field, and of a field that is too fine for the latent's cells what there is.

    Args:
        frames: latent frames; T must be 4 * frames - 3.
        height, width: of the latent.
    """
    if frames == 1:
        return told.motion.new_zeros(len(told), ADAPTER_CHANNELS, 1, height, width)
    found = []
    for flow, valid in zip(*fields(told, scenes), strict=True):  # together they are slower than one by one, on a CPU
        opening = told_motion(flow[None, :1], valid[None, :1], height, width)
        later = told_motion(flow.unflatten(0, (-1, TIME_FACTOR)), valid.unflatten(0, (-1, TIME_FACTOR)), height, width)
        found.append(torch.cat([opening, later]).transpose(0, 1))
    return torch.stack(found)


def _in_time(told: Commands) -> Tensor:
    """bool [N, T - 1], the steps that are commanded."""
    step = torch.arange(told.motion.shape[2], device=told.motion.device)
    return (step >= told.first[:, None]) & (step < told.last[:, None])


def _everywhere(told: Commands) -> Tensor:
    """[N, T - 1, 2], what all pixels do that belong to no sprite: with a camera, as its single sprite does."""
    rows = torch.arange(len(told), device=told.motion.device)
    of_sprite = told.motion[rows, (~told.moved[:, 0]).long()]
    return of_sprite * (told.kind == CAMERA)[:, None, None]


def _masks(told: Commands, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """bool [N, T - 1, 64, 64] of each sprite: the pixels that move with it; none under a camera, where all do."""
    place = told.centres[:, :, :-1]
    apart = told.moved & (told.kind != CAMERA)[:, None]
    front, behind = (_outline(told, scenes, i, place[:, i]) & apart[:, i, None, None, None] for i in (0, 1))
    return front, behind & ~front


def _outline(told: Commands, scenes: Scenes, sprite: int, place: Tensor) -> Tensor:
    """[N, T - 1, 64, 64] bool: the pixels of a sprite at its places [N, T - 1, 2], or those within a disc's radius."""
    axis = torch.arange(FRAME_SIZE, device=place.device) + 0.5
    x, y = (axis - place[..., 0, None]).unsqueeze(-2), (axis - place[..., 1, None]).unsqueeze(-1)
    inside = x.square() + y.square() <= told.radius[:, None, None, None].square()
    rows = (told.kind != DISC).nonzero()[:, 0]
    if len(rows):
        of_step = rows.repeat_interleave(place.shape[1])
        shape, radius = scenes.shape[of_step, sprite], scenes.radius[of_step, sprite]
        covered = sprites.coverage(shape, x[rows].flatten(0, 1), y[rows].flatten(0, 1), radius)
        inside[rows] = (covered > 0.5).unflatten(0, (len(rows), -1))
    return inside


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
    """Standardised latents [N, 16, T_lat, 8, 8] of clips whose sprites are at `centres`; T must be 4n + 1.

    All on one device, where the result is.
    """
    groups = sprites.to_pixels(sprites.draw(scenes, centres))
    groups = torch.cat([groups[:, :, :1].expand(-1, -1, 3, -1, -1), groups], dim=2)
    count, frames = len(scenes), latent_frames(centres.shape[2])
    groups = groups.unflatten(2, (frames, -1)).permute(0, 2, 3, 1, 4, 5)  # [N, T_lat, 4, 3, H, W]
    latent = autoencoder.encode_groups(groups.flatten(2, 3).flatten(0, 1))
    return latent.unflatten(0, (count, frames)).movedim(2, 1)
