"""The sprite world: deterministic, inside the frame, bouncing, and split into trained and held-out captions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from diagonal_sampler.captions import COLOURS, DIRECTIONS, SHAPES, SpriteSpec, parse_caption
from diagonal_sampler.schedule import DiagonalSchedule, levels_text
from distillation import sprites
from distillation.demo_files import TrainedFor, trained_for
from distillation.recipes import DEMO
from distillation.score import EVIDENCE_CAPTIONS, chosen_sampling, fresh_captions, score_clip, summarise, table


def test_a_clip_depends_on_seed_and_index_only() -> None:
    many = sprites.sample_scenes(6, seed=3)
    alone = sprites.sample_scenes(2, seed=3, first_index=4)
    frames = torch.arange(0, 81, 20)
    assert torch.equal(sprites.render(many, frames)[4:], sprites.render(alone, frames))
    assert many.captions[4:] == alone.captions
    assert many.captions != sprites.sample_scenes(6, seed=4).captions


def test_sprites_stay_inside_bounce_and_keep_their_speed() -> None:
    scenes = sprites.sample_scenes(32, seed=0)
    path = sprites.positions(scenes, torch.arange(810))
    radius = scenes.radius[:, :, None, None]
    assert (path >= radius - 1e-3).all() and (path <= sprites.FRAME_SIZE - radius + 1e-3).all()
    step = path.diff(dim=2).norm(dim=-1)
    speed = scenes.velocity.norm(dim=-1)[..., None]
    assert (step <= speed + 1e-3).all()
    straight = (step - speed).abs() < 1e-3
    assert straight[scenes.present].float().mean() > 0.9
    turned = (path.diff(dim=2) * scenes.velocity[:, :, None]).sum(-1).amin(-1) < 0
    assert turned[scenes.present].all()


def test_the_first_frames_go_where_the_caption_says() -> None:
    scenes = sprites.sample_scenes(64, seed=1)
    path = sprites.positions(scenes, torch.arange(12))
    moved = path[:, :, -1] - path[:, :, 0]
    torch.testing.assert_close(moved, scenes.velocity * 11, rtol=0, atol=1e-3)
    for row, specs in enumerate(scenes.specs):
        for column, spec in enumerate(specs):
            direction = torch.tensor(sprites.VELOCITY[spec.direction]).float()
            assert float(moved[row, column] @ direction) >= 10


def test_frames_can_be_rendered_apart_or_together() -> None:
    scenes = sprites.sample_scenes(3, seed=5)
    whole = sprites.render(scenes, torch.arange(8))
    own_times = torch.tensor([[0, 1], [3, 4], [6, 7]])
    apart = sprites.render(scenes, own_times)
    for row, times in enumerate(own_times):
        assert torch.equal(apart[row], whole[row, times])


def test_sprites_are_drawn_where_they_are() -> None:
    scenes = sprites.make_scenes([[SpriteSpec("circle", "red", "left")], [SpriteSpec("square", "blue", "down")]], 0)
    frames = torch.tensor([0, 30])
    drawn = sprites.render(scenes, frames).float()
    offset = (drawn - scenes.background[:, None, None, None, None]).abs().sum(2)
    axis = torch.arange(64) + 0.5
    mass = offset.sum((2, 3))
    seen = torch.stack([(offset.sum(2) * axis).sum(2) / mass, (offset.sum(3) * axis).sum(2) / mass], dim=-1)
    torch.testing.assert_close(seen, sprites.positions(scenes, frames)[:, 0], rtol=0, atol=0.1)


def test_training_never_shows_a_held_out_sprite() -> None:
    held = [
        sprite for parts in product(SHAPES, COLOURS, DIRECTIONS) if sprites.is_held_out(sprite := SpriteSpec(*parts))
    ]
    assert len(held) == 12
    for field, vocabulary in (("shape", SHAPES), ("colour", COLOURS), ("direction", DIRECTIONS)):
        assert {getattr(sprite, field) for sprite in held} == set(vocabulary)
    trained = {sprite for specs in sprites.sample_scenes(400, seed=2).specs for sprite in specs}
    assert not any(sprites.is_held_out(sprite) for sprite in trained)
    assert not sprites.is_held_out(SpriteSpec("triangle", "green", "left"))


def test_held_out_captions_are_distinct_stable_and_hold_something_new() -> None:
    captions = sprites.held_out_captions(64)
    assert len(set(captions)) == 64 and captions == sprites.held_out_captions(64)
    assert captions[:10] == sprites.held_out_captions(10)
    for caption in captions:
        assert any(sprites.is_held_out(sprite) for sprite in parse_caption(caption))


def test_two_sprites_have_two_colours_and_seldom_touch() -> None:
    scenes = sprites.sample_scenes(200, seed=6)
    pairs = scenes.take(scenes.present.all(1).nonzero()[:, 0])
    assert all(first.colour != second.colour for first, second in pairs.specs)
    path = sprites.positions(pairs, torch.arange(81))
    touching = (path[:, 0] - path[:, 1]).abs().amax(-1) < pairs.radius.sum(1, keepdim=True)
    assert touching.float().mean() < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_the_scorer_gives_true_clips_full_marks(seed: int) -> None:
    scenes = sprites.sample_scenes(12, seed=seed, held_out=True)
    for frames, caption in zip(sprites.render(scenes, torch.arange(81)), scenes.captions, strict=True):
        score = score_clip(frames, caption)
        assert score.count_right and score.background_drift == 0
        for sprite in score.sprites:
            assert sprite.colour_right and sprite.direction_right and sprite.shape_right
            assert sprite.speed == pytest.approx(sprites.PIXELS_PER_FRAME[sprite.spec.speed], rel=0.05)


def test_the_scorer_sees_what_is_wrong() -> None:
    scenes = sprites.make_scenes([parse_caption("a red circle moves right")], 0)
    frames = sprites.render(scenes, torch.arange(81))[0]
    (wrong,) = score_clip(frames, "a blue cross moves left").sprites
    assert (wrong.colour_right, wrong.direction_right, wrong.shape_right) == (False, False, False)
    assert (wrong.direction_seen, wrong.shape_seen) == ("right", "circle")
    empty = torch.full_like(frames, 40)
    score = score_clip(empty, "a red circle moves right")
    assert not score.count_right and not score.sprites[0].colour_right and score.sprites[0].speed is None
    drifting = (frames.float() + torch.linspace(0, 60, 81)[:, None, None, None]).clamp(0, 255)
    assert score_clip(drifting, "a red circle moves right").background_drift > 30


def test_what_moves_no_more_at_the_end_is_seen_and_a_bounce_is_none() -> None:
    scenes = sprites.sample_scenes(12, seed=3, held_out=True)
    for frames, caption in zip(sprites.render(scenes, torch.arange(81)), scenes.captions, strict=True):
        assert all(sprite.late_right for sprite in score_clip(frames, caption).sprites), caption
        frozen = torch.cat([frames[:30], frames[30:31].expand(51, -1, -1, -1)])
        stopped = score_clip(frozen, caption)
        assert all(sprite.direction_right and sprite.late_right is False for sprite in stopped.sprites), caption
    found = summarise([score_clip(frames, caption), stopped])
    assert found["late"] == 0.5 and found["late_sprites"] == 2 * len(stopped.sprites)
    assert "moves as told in the last 2.5 s" in table(found, "made up")
    gone = summarise([score_clip(torch.full_like(frames, 40), caption)])
    assert gone["late"] is None and "of 0 sprites followed | - |" in table(gone, "made up")


def test_fresh_captions_are_none_of_the_evidence() -> None:
    known = set(sprites.held_out_captions(EVIDENCE_CAPTIONS))
    fresh = fresh_captions(64, 11)
    assert len(set(fresh)) == 64 and not known & set(fresh)
    assert fresh == fresh_captions(64, 11) != fresh_captions(64, 12) and fresh[:8] == fresh_captions(8, 11)
    assert fresh_captions(4, 0) == [c for c in sprites.held_out_captions(EVIDENCE_CAPTIONS + 4) if c not in known]


def test_a_sprite_that_vanishes_is_not_right() -> None:
    scenes = sprites.make_scenes([parse_caption("a red circle moves right")], 0)
    frames = sprites.render(scenes, torch.arange(81))[0]
    frames[30:] = frames[0, 0, 0, 0]
    assert not score_clip(frames, "a red circle moves right").sprites[0].colour_right


def test_a_larger_scale_shows_the_same_world() -> None:
    scenes = sprites.sample_scenes(8, seed=7, held_out=True)
    frames = torch.arange(81)
    small, large = (sprites.render(scenes, frames, scale).float() for scale in (1, 2))
    assert large.shape == (8, 81, 3, 128, 128)
    averaged = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).view(small.shape)
    assert (averaged - small).abs().mean() < 0.1, "they differ along slanted edges only"
    for clip, caption in zip(large, scenes.captions, strict=True):
        score = score_clip(clip, caption)
        assert score.count_right
        for sprite in score.sprites:
            assert sprite.colour_right and sprite.direction_right and sprite.shape_right
            assert sprite.speed == pytest.approx(sprites.PIXELS_PER_FRAME[sprite.spec.speed], rel=0.05)


def sampled(trained: TrainedFor, **flags: object) -> DiagonalSchedule:
    names = ("preset", "steps", "shift", "context_mode", "noise", "window", "sink", "kv_cache_dtype", "cfg")
    return chosen_sampling(SimpleNamespace(**dict.fromkeys(names) | flags), trained)[0]


def test_other_steps_are_of_the_levels_that_a_checkpoint_was_trained_with() -> None:
    student, teacher = (trained_for(DEMO / f"demo_{name}.safetensors") for name in ("student", "teacher"))
    assert levels_text(sampled(student, steps="4,3").sigmas) == "1, 0.75, 0.5, 0.357; 1, 0.75, 0.357"
    assert sampled(student, shift=5.0) == sampled(student) == student.schedule
    assert sampled(teacher, steps="4") == DiagonalSchedule.uniform(4)
    assert sampled(teacher, preset="diagonal 4-2", shift=3.0) == DiagonalSchedule.preset("diagonal 4-2", shift=3.0)
    self_forcing = DiagonalSchedule.preset("self forcing", steps=(3,), shift=3.0)
    renoised = replace(self_forcing, context_mode="renoise", context_sigma=0.8)
    found = sampled(replace(student, schedule=renoised), steps="4")
    assert found == replace(renoised, sigmas=DiagonalSchedule.preset("self forcing", shift=3.0).sigmas)
    even = DiagonalSchedule.uniform(4)  # the levels of Self Forcing too
    assert sampled(replace(teacher, schedule=even), steps="2") == DiagonalSchedule.uniform(2)
    with pytest.raises(ValueError, match="levels 1, 0.2, which are no preset's; give --preset"):
        sampled(replace(student, schedule=DiagonalSchedule(sigmas=((1.0, 0.2),))), steps="3")
