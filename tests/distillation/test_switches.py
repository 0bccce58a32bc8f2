"""Captions that change in mid-run: what takes whose place, and that the rest follows from the picture."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from diagonal_sampler.captions import parse_caption
from distillation import sprites
from distillation.switches import next_specs, switch, taken_places

COUNT, AT, FRAMES = 40, 33, 57
RED = parse_caption("a red circle moves right and a blue square moves up")


@pytest.fixture(scope="module")
def clips():
    return switch(sprites.sample_scenes(COUNT, seed=3), 3, at=AT, frames=FRAMES)


@pytest.mark.parametrize(
    ("caption", "x", "places"),
    [
        ("a blue square moves left and a red circle moves left", (10, 20), [1, 0]),
        ("a blue circle moves left", (10, 20), [1]),  # a colour tells more than a shape
        ("a green circle moves left", (30, 20), [0]),
        ("a green cross moves left", (30, 20), [1]),  # alike to none: the left one
        ("a green cross moves left and a cyan cross moves up", (30, 20), [1, 0]),
    ],
)
def test_a_sprite_takes_the_place_of_the_one_that_is_most_alike(caption, x, places):
    assert taken_places(RED, parse_caption(caption), x) == places


def test_what_has_no_place_to_take_appears():
    two = parse_caption("a green cross moves left and a red circle moves up")
    assert taken_places(RED[:1], two, (10,)) == [None, 0]
    assert taken_places(RED[1:], two, (10,)) == [0, None], "alike to none: the caption's first stays"


def test_sprites_go_on_from_where_they_are(clips):
    before, after = sprites.draw(clips.before, clips.centres), sprites.draw(clips.after, clips.centres)
    frames = clips.frames()
    assert torch.equal(frames[:, :AT], before[:, :AT]) and torch.equal(frames[:, AT:], after[:, AT:])
    assert torch.equal(clips.before.background, clips.after.background)
    plain = sprites.positions(clips.before, torch.arange(AT + 1))
    assert torch.equal(clips.centres[:, :, :AT], plain[:, :, :AT])
    old, new = (scenes.present.sum(1) for scenes in (clips.before, clips.after))
    for row in range(COUNT):
        begin = clips.centres[row, : new[row], AT]
        here = plain[row, : old[row], AT]
        held = (torch.cdist(begin, here) < 1e-4).any(1)
        assert int(held.sum()) == min(int(old[row]), int(new[row]))
        assert bool(clips.appears[row]) == bool(new[row] > old[row])
    # From there on each moves as its caption says, in the sense that it had on the same line.
    moved = clips.centres[:, :, AT + 1] - clips.centres[:, :, AT]
    for row, specs in enumerate(clips.after.specs):
        for column, spec in enumerate(specs):
            along = int(sprites.VELOCITY[spec.direction][0] == 0)
            assert abs(float(moved[row, column, 1 - along])) < 1e-4
            assert float(moved[row, column, along].abs()) <= sprites.PIXELS_PER_FRAME[spec.speed] + 1e-4


def test_a_sprite_on_its_line_keeps_its_sense():
    found = set()
    for index, at in product(range(60), (9, 33)):
        scenes = sprites.make_scenes([RED[:1]], 5, index)
        clip = switch(scenes, 5, index, at=at, frames=FRAMES)
        path = sprites.positions(scenes, torch.arange(at + 1))[0, 0]
        sense = (path[at] - path[at - 1])[0].sign()
        taken = taken_places(RED[:1], clip.after.specs[0], (0,)).index(0)
        direction = clip.after.specs[0][taken].direction
        if direction in ("left", "right"):
            assert clip.after.velocity[0, taken, 0].sign() == sense
            found.add((direction, float(sense)))
    assert len(found) == 4, "either word, either sense"


def test_a_clip_does_not_depend_on_the_others(clips):
    alone = switch(sprites.sample_scenes(1, seed=3, first_index=17), 3, 17, at=AT, frames=FRAMES)
    assert alone.after.captions[0] == clips.after.captions[17]
    assert torch.equal(alone.frames()[0], clips.frames()[17])


def test_new_captions_are_never_held_out_and_change_a_word_or_all():
    rng = np.random.default_rng(0)
    drawn = [next_specs(RED, rng) for _ in range(300)]
    assert not any(sprites.is_held_out(spec) for specs in drawn for spec in specs)
    assert all(len({spec.colour for spec in specs}) == len(specs) for specs in drawn)
    words = [
        sum(getattr(a, name) != getattr(b, name) for a, b in zip(RED, specs, strict=True) for name in a.__slots__)
        for specs in drawn
        if len(specs) == 2
    ]
    assert 0.2 < sum(count == 1 for count in words) / len(drawn) < 0.6 and max(words) > 4
