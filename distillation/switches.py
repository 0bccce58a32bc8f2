"""Clips of the demo's world whose caption changes in mid-run: what was there becomes what is asked for.

A new caption can ask for other shapes, colours, ways and speeds of what is in the picture. Here each sprite of the new
caption takes the place of one that was there and goes on from where that is, so that all but one thing follows from the
picture and the new caption: where a sprite appears that had no one to take its place from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from diagonal_sampler.captions import COLOURS, DIRECTIONS, SHAPES, SPEEDS, SpriteSpec
from distillation import sprites
from distillation.sprites import Scenes

CHANGED_SHARE = 0.5
"""Of new captions, which change one word of the old one; the others are drawn anew."""
_WORDS = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "speed": SPEEDS}


@dataclass(frozen=True, slots=True)
class Switched:
    """N clips that show `before` up to pixel frame `at` and `after` from there on.

    Attributes:
        before, after: scenes of the two captions, on the same ground.
        at: pixel frame that the new caption begins with.
        centres: [N, 2, T, 2] of the sprites of `before`, and from `at` on of `after`, in pixels.
        appears: bool [N], clips in which `after` has a sprite more.
    """

    before: Scenes
    after: Scenes
    at: int
    centres: Tensor
    appears: Tensor

    def frames(self) -> Tensor:
        """uint8 [N, T, 3, 64, 64]."""
        first = sprites.draw(self.before, self.centres[:, :, : self.at])
        return torch.cat([first, sprites.draw(self.after, self.centres[:, :, self.at :])], dim=1)


def next_specs(specs: Sequence[SpriteSpec], rng: np.random.Generator) -> tuple[SpriteSpec, ...]:
    """What a new caption asks for; never held out."""
    while rng.random() < CHANGED_SHARE:
        which, word = rng.integers(len(specs)), str(rng.choice(list(_WORDS)))
        others = [value for value in _WORDS[word] if value != getattr(specs[which], word)]
        changed = list(specs)
        changed[which] = replace(specs[which], **{word: others[rng.integers(len(others))]})
        distinct = len({spec.colour for spec in changed}) == len(changed)
        if distinct and not any(map(sprites.is_held_out, changed)):
            return tuple(changed)
    return sprites.sample_specs(rng)


def taken_places(before: Sequence[SpriteSpec], after: Sequence[SpriteSpec], x: Sequence[float]) -> list[int | None]:
    """For each new sprite the old one whose place it takes, None for one that appears.

    The most alike: a colour that stays counts more than a shape. Where nothing tells them apart, the sprite that the
    caption names first takes the place farther to the left, so that the picture decides it.

    Args:
        x: [len(before)] where the old ones are, in pixels.
    """

    def alike(new: SpriteSpec, old: int | None) -> int:
        if old is None:
            return 0
        return 2 * (new.colour == before[old].colour) + (new.shape == before[old].shape)

    places: list[int | None] = list(range(len(before)))
    places += [None] * max(0, len(after) - len(before))
    left_first = {old: x[old] for old in range(len(before))}

    def rank(order: tuple[int | None, ...]) -> tuple:
        likeness = sum(alike(new, old) for new, old in zip(after, order, strict=True))
        return -likeness, [float("inf") if old is None else left_first[old] for old in order]

    return list(min(permutations(places, len(after)), key=rank))


def switch(scenes: Scenes, seed: int, first_index: int = 0, *, at: int, frames: int = sprites.CLIP_FRAMES) -> Switched:
    """Scenes whose caption changes; that of scene i depends on (seed, first_index + i) and the scene only.

    A sprite that is asked to move along the line that it is on keeps its sense: from a picture it could not be told
    whether it has just bounced.

    Args:
        at: pixel frame, from 1, that the new caption begins with.
        frames: pixel frames T, above `at`.
    """
    rngs = [np.random.default_rng([seed, first_index + row, 0x5717]) for row in range(len(scenes))]
    specs = [next_specs(old, rng) for old, rng in zip(scenes.specs, rngs, strict=True)]
    after = sprites.make_scenes(specs, seed, first_index)
    path = sprites.positions(scenes, torch.arange(at + 1))
    here, motion = path[:, :, at], path[:, :, at] - path[:, :, at - 1]
    for row, (old, new) in enumerate(zip(scenes.specs, specs, strict=True)):
        taken = taken_places(old, new, here[row, : len(old), 0].tolist())
        for column, place in enumerate(taken):
            if place is None:
                continue
            after.start[row, column] = here[row, place]
            after.radius[row, column] = scenes.radius[row, place]
            along = after.velocity[row, column] != 0
            sense = (motion[row, place] * along).sum()
            if sense != 0:
                after.velocity[row, column] = after.velocity[row, column].abs() * sense.sign()
    after = replace(after, background=scenes.background)
    behind = sprites.positions(after, torch.arange(frames - at))
    appears = torch.tensor([len(new) > len(old) for old, new in zip(scenes.specs, specs, strict=True)])
    return Switched(scenes, after, at, torch.cat([path[:, :, :at], behind], dim=2), appears)
