"""The move to other noise levels: grounds are painted and nothing else, rollouts are asked as sampled, runs resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_run import same

from diagonal_sampler.frames import latent_frames
from diagonal_sampler.schedule import parse_sigmas
from distillation import copies, demo_files, demo_run, score, sprites, train_levels
from distillation.common import autocast, generator_at
from distillation.ground import ground_of, lightness, nearest_level, paint_ground, world_levels
from distillation.recipes import DEMO
from distillation.samples import decode_frames, encode_frames
from distillation.switches import switch
from distillation.train_levels import LevelsRecipe, Networks
from distillation.windows import DrawnNoise, Sampling, roll_out, window_error

CPU = torch.device("cpu")
STUDENT = DEMO / demo_files.STUDENT_FILE
TINY = LevelsRecipe(
    sigmas="1, 0.8, 0.6, 0.3; 1, 0.8, 0.3; 1, 0.3",
    updates=2,
    pool=4,
    pool_updates=1,
    batch=3,
    length=33,
    going_on_chunks=2,
    teacher_steps=2,
    warmup=1,
    save_every=1,
)
OWN_ENDS = replace(TINY, ends="student", copies="removed", first_pool=5, first_batch=4)
ALL_KINDS = replace(OWN_ENDS, switch_pool=6, switch_batch=5, switch_length=57)
SWITCHING = replace(TINY, ends="none", switch_pool=6, switch_batch=5, switch_length=57)


@pytest.fixture(scope="module")
def networks() -> Networks:
    teacher, encoder, autoencoder = demo_files.load_models(DEMO)
    student, before = (demo_files.load_dit(STUDENT) for _ in range(2))
    return Networks(student=student, before=before, teacher=teacher, encoder=encoder, autoencoder=autoencoder)


@pytest.fixture(scope="module")
def trained() -> demo_files.TrainedFor:
    found = demo_files.trained_for(STUDENT)
    return replace(found, schedule=replace(found.schedule, sigmas=TINY.levels))


@pytest.fixture(scope="module")
def opening(networks, trained):
    return make_opening(TINY, networks, trained)


def make_opening(recipe: LevelsRecipe, networks: Networks, trained: demo_files.TrainedFor):
    chunks = latent_frames(recipe.length) // trained.settings.frames_per_chunk
    generator = generator_at(recipe.seed, 3)
    return train_levels.opening_states(recipe, networks, trained, range(recipe.pool), chunks, generator)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_levels.train_levels(ALL_KINDS, DEMO, folder, CPU)
    return folder


def true_latents(networks: Networks, count: int, frames: int = 9) -> torch.Tensor:
    scenes = sprites.sample_scenes(count, seed=31)
    return encode_frames(networks.autoencoder, sprites.to_pixels(sprites.render(scenes, torch.arange(frames))))


def test_another_ground_leaves_the_sprites_as_they_are(networks):
    latents = true_latents(networks, 6)
    wanted = torch.tensor([0.0, 84, 56, 28, 84, 0])
    painted = paint_ground(networks.autoencoder, latents, wanted)
    torch.testing.assert_close(ground_of(networks.autoencoder, painted), wanted, atol=4, rtol=0)
    before, after = (decode_frames(networks.autoencoder, each) for each in (latents, painted))
    for old, new in zip(before, after, strict=True):
        old, new = score.find_blobs(old), score.find_blobs(new)
        for colour in sprites.RGB:
            if float(old.area(colour).mean()) > score.SMALLEST_AREA:
                torch.testing.assert_close(new.centroid(colour), old.centroid(colour), atol=1.0, rtol=0)
                torch.testing.assert_close(new.area(colour), old.area(colour), atol=0, rtol=0.25)


def test_a_ground_that_is_there_already_changes_nothing(networks):
    latents = true_latents(networks, 4)
    level = ground_of(networks.autoencoder, latents)
    again = paint_ground(networks.autoencoder, latents, level)
    assert float((again - latents).square().mean()) < 1e-3 * float(latents.square().mean())


def test_noise_gets_each_of_the_worlds_grounds_as_often_and_the_same_whatever_is_beside_it(networks):
    noise = torch.randn(4000, 16, 3, 8, 8, generator=generator_at(0, 9))
    light = lightness(networks.autoencoder, noise)
    assert abs(float(light.mean())) < 4 / 4000**0.5 and abs(float(light.var()) - 1) < 4 * (2 / 4000) ** 0.5
    levels = world_levels(light)
    assert set(levels.tolist()) == set(sprites.BACKGROUND_LEVELS)
    for level in sprites.BACKGROUND_LEVELS:
        assert abs(int((levels == level).sum()) - 1000) < 4 * (4000 * 3 / 16) ** 0.5
    assert levels[light.argsort()].diff().min() >= 0
    torch.testing.assert_close(world_levels(light[:3]), levels[:3])
    assert world_levels(torch.tensor([-40.0, 40.0])).tolist() == [0, 84]


def test_a_ground_is_rounded_to_the_worlds_nearest():
    rounded = nearest_level(torch.tensor([-3.0, 13, 15, 43, 57, 200]))
    assert rounded.tolist() == [0, 0, 28, 56, 56, 84]


def test_a_lighter_picture_is_lighter(networks):
    noise = torch.randn(3, 16, 3, 8, 8, generator=generator_at(0, 8))
    plain = sprites.to_pixels(torch.full((1, 9, 3, 64, 64), 40, dtype=torch.uint8))
    dark, light = (encode_frames(networks.autoencoder, plain + more) for more in (0, 0.5))
    found = lightness(networks.autoencoder, noise)
    assert (lightness(networks.autoencoder, noise + light - dark) > found).all()
    assert len(set(found.tolist())) == 3


def test_what_a_rollout_was_asked_can_be_asked_again(networks, trained):
    text = networks.encoder.encode(["a red circle moves right", "a blue cross moves up"])
    given = true_latents(networks, 2)

    def make(seed, **options):
        noise = DrawnNoise(generator_at(0, seed), (2, 16, 8, 8))
        return roll_out(networks.student, text, noise, trained, 2, given=given, **options)

    inputs, found = make(1)
    again, said = make(2, asked=inputs)
    torch.testing.assert_close(again, inputs)
    torch.testing.assert_close(said, found, atol=1e-2, rtol=0)  # bf16
    # The answer to a given chunk's input is the given chunk, nearly.
    assert float((found[:, 0, 0] - given).square().mean()) < 0.2 * float(given.square().mean())


def test_one_causal_forward_answers_as_the_cache_behind_given_frames_did(networks, trained):
    text = networks.encoder.encode(["a red circle moves right", "a blue cross moves up"])
    ids = train_levels.tokenize_captions(["a red circle moves right", "a blue cross moves up"])
    noise = DrawnNoise(generator_at(0, 5), (2, 16, 8, 8))
    given = true_latents(networks, 2)
    inputs, found = roll_out(networks.student, text, noise, trained, 2, given=given)
    states = train_levels._states(inputs, found, ids)
    sampling = Sampling(train_levels.behind_given(trained), 3, CPU)
    windows = sampling.draw(states, 6, generator_at(0, 6), often=1, often_share=0.5)
    assert {0.8, 0.6} & {round(sigma, 3) for sigma in windows.sigma[:, 3:6].unique().tolist()}  # of the 4-step chunk
    with torch.no_grad(), autocast(torch.device("cpu")):
        error = window_error(networks.student, networks.encoder(windows.ids), windows, sampling.size)
    assert windows.weight.any() and float(error.max()) < 2e-2


def test_forwards_between_answer_as_those_of_a_schedule_with_more_steps(networks, trained):
    """What comes back as a later chunk's first x0 is its second one's at the schedule that has the level itself."""
    text = networks.encoder.encode(["a red circle moves right", "a blue cross moves up"])

    def make(sigmas, **options):
        noise = DrawnNoise(generator_at(0, 4), (2, 16, 8, 8))
        sampled = replace(trained, schedule=replace(trained.schedule, sigmas=parse_sigmas(sigmas)))
        return roll_out(networks.before, text, noise, sampled, 2, **options)[1]

    fewer, more = make("1, 0.6; 1, 0.3", between=(0.8,)), make("1, 0.6; 1, 0.8, 0.3")
    torch.testing.assert_close(fewer[:, 0], more[:, 0, :2])  # nothing between a first chunk's
    torch.testing.assert_close(fewer[:, 1, 0], more[:, 1, 1])
    assert not torch.allclose(fewer[:, 1, 0], more[:, 1, 0], atol=1e-2)


def test_first_chunks_can_be_kept_and_only_first_forwards_of_later_ones_get_others_between(networks, trained):
    plain = replace(TINY, ends="none")
    kept, clips = make_opening(plain, networks, trained)
    _, found = roll_out(
        *(networks.before, networks.encoder(kept.ids), train_levels._noise(generator_at(0, 3), TINY.pool), trained, 3),
        asked=kept.inputs,
    )
    torch.testing.assert_close(kept.wanted[:, 0], found[:, 0])
    better, same_clips = make_opening(replace(plain, between="0.8, 0.6"), networks, trained)
    torch.testing.assert_close(same_clips, clips)
    differ = (better.wanted - kept.wanted).square().mean((0, 3, 4, 5, 6)) > 1e-6
    assert differ.tolist() == [[False] * 4, [True, False, False, False], [True, False, False, False]]
    told = ground_of(networks.autoencoder, better.wanted[:, 2, 0])
    size = trained.settings.frames_per_chunk
    ground = ground_of(networks.autoencoder, clips[:, :, :size])
    torch.testing.assert_close(told, ground, atol=8, rtol=0)


def test_a_ground_that_is_off_counts_more_than_its_squared_error(networks, trained, opening):
    states, _ = opening
    sampling = Sampling(trained, 3, CPU)
    windows = sampling.draw(states, 2, generator_at(0, 7))
    text = networks.encoder(windows.ids)

    def error(**changes):
        asked = replace(windows, weight=torch.ones_like(windows.weight))
        with torch.no_grad():
            return window_error(networks.student, text, asked, sampling.size, **changes)

    plain, more = error(), error(mean_weight=8.0)
    assert (more > plain).all()
    x0 = windows.noisy  # at no noise the network's answer is its input
    windows = replace(windows, sigma=torch.zeros_like(windows.sigma), wanted=x0 + 0.1)
    torch.testing.assert_close(error(), torch.full_like(plain, 0.01))
    torch.testing.assert_close(error(mean_weight=8.0), torch.full_like(plain, 0.09))


def test_openings_are_told_the_worlds_grounds_and_later_chunks_the_first_ones(networks, trained, opening):
    states, clips = opening
    size = trained.settings.frames_per_chunk
    assert states.wanted.shape[:3] == (4, latent_frames(TINY.length) // size, 4)
    ground = ground_of(networks.autoencoder, clips[:, :, :size])
    told = ground_of(networks.autoencoder, states.wanted[:, 0, 0])
    light = lightness(networks.autoencoder, states.inputs[:, 0, 0])
    torch.testing.assert_close(told, world_levels(light), atol=8, rtol=0)
    later = ground_of(networks.autoencoder, states.wanted[:, 1, 2])
    torch.testing.assert_close(later, ground, atol=8, rtol=0)


def test_behind_given_frames_the_ground_is_theirs(networks, trained, opening):
    states, clips = opening
    behind = train_levels.going_on_states(TINY, networks, trained, 0, clips, states.ids)
    given = ground_of(networks.autoencoder, behind.wanted[:, 0, 0])
    for chunk, step in ((1, 0), (1, 3), (2, 2)):
        told = ground_of(networks.autoencoder, behind.wanted[:, chunk, step])
        torch.testing.assert_close(told, given, atol=8, rtol=0)


def test_the_teachers_path_ends_in_a_finished_picture(networks, trained, opening):
    """At its end the teacher has nothing to add: the noise that was in the student's input is gone."""
    inputs = opening[0].inputs[:, 0, 1]
    text = networks.encoder(opening[0].ids)
    recipe = replace(TINY, teacher_steps=8)
    with torch.no_grad():
        end = train_levels.teacher_end(networks, inputs, 0.8, text, recipe, trained.schedule.shift)
        frames = decode_frames(networks.autoencoder, end)
    coded = encode_frames(networks.autoencoder, frames.movedim(1, 2) / 127.5 - 1)
    noise_left = (coded[:, :14] - end[:, :14]).square().mean()
    assert float(noise_left) < 0.1 * float((inputs - end).square().mean())


@pytest.mark.parametrize("ends", ["teacher", "student"])
def test_without_copies_there_is_one_of_each(networks, trained, ends):
    """The states are those of the other recipe; of what is to be answered only the first chunk differs."""
    recipe = replace(TINY, ends=ends, teacher_steps=6)
    kept, _ = make_opening(recipe, networks, trained)
    removed, _ = make_opening(replace(recipe, copies="removed"), networks, trained)
    torch.testing.assert_close(removed.inputs, kept.inputs)
    torch.testing.assert_close(removed.wanted[:, 1:], kept.wanted[:, 1:])
    captions = [sprites.training_specs(TINY.seed, row) for row in range(TINY.pool)]

    def change(told: torch.Tensor) -> float:
        again = copies.remove_copies(networks.autoencoder, told, captions)
        return float((again - told).square().mean() / told.square().mean())

    for step in range(1, 4):  # finished pictures
        assert change(removed.wanted[:, 0, step]) < 0.02, step
    assert max(change(kept.wanted[:, 0, step]) for step in range(1, 4)) > 0.02


def test_below_pure_noise_the_ground_is_the_nearest_to_the_students_own(networks, trained, opening):
    states, _ = opening
    text, noise = networks.encoder(states.ids), DrawnNoise(generator_at(TINY.seed, 3), (4, 16, 8, 8))
    _, found = roll_out(networks.student, text, noise, trained, 1)
    own = nearest_level(ground_of(networks.autoencoder, found[:, 0, 0]))
    for step in range(1, 4):
        told = ground_of(networks.autoencoder, states.wanted[:, 0, step])
        torch.testing.assert_close(told, own, atol=8, rtol=0)


def test_first_chunks_alone_are_captions_of_their_own(networks, trained):
    opening, behind, first = train_levels.fresh_pools(OWN_ENDS, networks, trained, 0, 3)
    assert first.inputs.shape[:3] == (5, 1, 4) and opening.inputs.shape[:3] == (4, 3, 4)
    assert behind.inputs.shape[:3] == (4, 3, 4)
    assert not {tuple(ids.flatten().tolist()) for ids in first.ids} & {
        tuple(ids.flatten().tolist()) for ids in opening.ids
    }
    assert len(train_levels.fresh_pools(TINY, networks, trained, 0, 3)) == 2


def test_a_switch_is_learned_from_true_clips_and_steps_begin_anew(networks, trained):
    states, since, anew = train_levels.switched_states(SWITCHING, networks, trained, 0)
    assert 1 <= since <= 3
    steps = [anew.schedule.steps(chunk) for chunk in range(5)]
    assert steps == [4, 3, 2][:since] + [2] * (since - 3) + [4, 3, 2, 2, 2][: 5 - since]
    # Up to the switch clips are true ones with noise; the captions are the later ones.
    for chunk in range(since):
        last = steps[chunk] - 1
        sigma = anew.schedule.chunk_sigmas(chunk)[last]
        noise = (states.inputs[:, chunk, last] - (1 - sigma) * states.wanted[:, chunk, last]) / sigma
        assert abs(float(noise.std()) - 1) < 0.1
    captions = [" and ".join(spec.clause() for spec in specs) for specs in _specs(SWITCHING)]
    frames = decode_frames(networks.autoencoder, states.wanted[:, since:, 1].transpose(1, 2).flatten(2, 3))
    seen = [
        sprite.colour_right
        for clip, caption in zip(frames, captions, strict=True)
        for sprite in score.score_clip(clip, caption).sprites
    ]
    assert sum(seen) / len(seen) > 0.8
    sampling = Sampling(anew, 5, CPU)
    windows = sampling.draw(states, 64, generator_at(0, 8), since=since, often=since, often_share=0.5)
    asked = windows.weight.unflatten(1, (-1, 3)).amax(2) > 0
    assert not (asked & (windows.chunk < since)).any() and asked.any(1).all()


def test_clips_whose_caption_changes_can_be_as_the_student_draws_them(networks, trained):
    world, since, _ = train_levels.switched_states(SWITCHING, networks, trained, 0)
    drawn, again, _ = train_levels.switched_states(replace(SWITCHING, drawn_by="student"), networks, trained, 0)
    assert since == again
    appeared = (world.wanted[:, since, 0] != world.wanted[:, since, 1]).flatten(1).any(1)
    difference = (drawn.wanted - world.wanted)[~appeared].square().mean((2, 3, 4, 5, 6))
    assert float(difference.max()) <= train_levels.SAME_DRAWING
    assert float((difference > 1e-3).float().mean()) > 0.5, "hardly a chunk was drawn"
    # On the ground that the clip had.
    clips = drawn.wanted[:, :, 1].transpose(1, 2).flatten(2, 3)
    truth = world.wanted[:, :, 1].transpose(1, 2).flatten(2, 3)
    level = (ground_of(networks.autoencoder, each) for each in (clips, truth))
    torch.testing.assert_close(*level, atol=4, rtol=0)


def _specs(recipe: LevelsRecipe):
    first = train_levels._SWITCH_ROWS
    scenes = sprites.sample_scenes(recipe.switch_pool, recipe.seed, first)
    return switch(scenes, recipe.seed, first, at=33).after.specs


def test_where_a_sprite_appears_pure_noise_is_answered_as_before(networks, trained):
    recipe = replace(SWITCHING, switch_pool=24)
    states, since, anew = train_levels.switched_states(recipe, networks, trained, 0)
    first = train_levels._SWITCH_ROWS
    scenes = sprites.sample_scenes(recipe.switch_pool, recipe.seed, first)
    appears = switch(scenes, recipe.seed, first, at=33).appears
    assert appears.any() and not appears.all()
    # The student is the one in START here: what it says to these inputs is what is wanted.
    windows = Sampling(anew, 5, CPU).draw(states, 200, generator_at(0, 9), since=since, often=since, often_share=1.0)
    text = networks.encoder(windows.ids)
    with torch.no_grad(), autocast(CPU):
        error = window_error(networks.student, text, windows, 3).unflatten(1, (-1, 3)).mean(2)
    pure = (windows.sigma.unflatten(1, (-1, 3))[..., 0] == 1) & (windows.chunk == since)
    asked = pure & (windows.weight.unflatten(1, (-1, 3)).amax(2) > 0)
    known = {tuple(ids.flatten().tolist()): bool(new) for ids, new in zip(states.ids, appears, strict=True)}
    new = torch.tensor([known[tuple(ids.flatten().tolist())] for ids in windows.ids])
    assert float(error[asked & new[:, None]].max()) < 1e-3 < float(error[asked & ~new[:, None]].mean())


def test_a_resumed_run_is_the_run_that_was_not_stopped(run, tmp_path):
    train_levels.train_levels(ALL_KINDS, DEMO, tmp_path, CPU, stop=1)
    found = demo_run.load_checkpoint(train_levels.train_levels(ALL_KINDS, DEMO, tmp_path, CPU))
    assert found["update"] == 2 and same(found, demo_run.load_checkpoint(run / train_levels.CHECKPOINT))
    assert not same(found["model"], demo_files.load_dit(STUDENT).state_dict())


def test_a_run_can_begin_with_the_mean_of_two(tmp_path):
    other = DEMO / demo_files.TEACHER_FILE
    target = tmp_path / "mean.safetensors"
    command = ["--start", str(DEMO), "--out", str(tmp_path), "--mean-with", str(other), "--threads", "1"]
    train_levels.main([*command, "--mean-share", "0.75", "--updates", "0"])
    train_levels.main([*command, "--export", str(target)])
    began = demo_run.load_checkpoint(tmp_path / train_levels.CHECKPOINT)["model"]
    one, two = (demo_files.load_dit(file).state_dict() for file in (STUDENT, other))
    for name, value in began.items():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name])
    with safe_open(target, framework="pt") as opened:
        assert "begun with 0.75 of these weights and else demo_teacher's, " in opened.metadata()["recipe"]


def test_flags_reach_the_run_and_its_header(tmp_path):
    target = tmp_path / "written.safetensors"
    command = ["--start", str(DEMO), "--out", str(tmp_path), "--threads", "1"]
    train_levels.main([*command, "--updates", "0", "--ends", "none", "--between", "0.75", "--length", "45"])
    train_levels.main([*command, "--export", str(target)])
    recipe = demo_run.load_checkpoint(tmp_path / train_levels.CHECKPOINT)["recipe"]
    assert (recipe["ends"], recipe["between"], recipe["length"]) == ("none", "0.75", 45)
    with safe_open(target, framework="pt") as opened:
        made = "first chunks kept, copies kept, later chunks with 0.75 between, rollouts of 45, seed 7, 0 updates"
        assert made in opened.metadata()["recipe"]


def test_what_is_written_is_sampled_at_the_new_levels(run, tmp_path):
    file = tmp_path / "moved.safetensors"
    train_levels.main(
        ["--start", str(DEMO), "--out", str(run), "--export", str(file), "--note", "note", "--threads", "1"]
    )
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    made = "sigmas 1, 0.8, 0.6, 0.3; 1, 0.8, 0.3; 1, 0.3, student's ends, copies removed, seed 7"
    counts = "2 updates of 12 windows, 5 windows with a switch among them"
    assert f"distillation.train_levels, {made}, {counts}" in header["recipe"]
    assert header["recipe"].endswith(". note")
    assert demo_files.trained_for(file).schedule.sigmas == TINY.levels == parse_sigmas(TINY.sigmas)
    assert demo_files.trained_for(file).settings == demo_files.trained_for(STUDENT).settings


def test_bad_options_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="mean_share is 2"):
        LevelsRecipe(mean_share=2)
    with pytest.raises(ValueError, match="keeps its copies"):
        LevelsRecipe(ends="none", copies="removed")
    with pytest.raises(ValueError, match="between is '1, 0.75'; noise levels lie between 0 and 1"):
        LevelsRecipe(between="1, 0.75")
    with pytest.raises(ValueError, match="must be pool_updates or a multiple of it"):
        LevelsRecipe(save_every=50, pool_updates=8)
    with pytest.raises(ValueError, match="going_on_chunks is 0; behind given frames at least 1"):
        LevelsRecipe(going_on_chunks=0)
    with pytest.raises(ValueError, match="give both, or neither"):
        LevelsRecipe(first_batch=8)
    with pytest.raises(ValueError, match="switch_pool is 8 and switch_batch 0; give both"):
        LevelsRecipe(switch_pool=8)
    with pytest.raises(ValueError, match="switch_length is 33; a switch needs 41"):
        LevelsRecipe(switch_pool=8, switch_batch=8, switch_length=33)
    with pytest.raises(ValueError, match="Write numbers"):
        train_levels.train_levels(replace(TINY, sigmas="none"), DEMO, tmp_path, CPU)
    with pytest.raises(ValueError, match="sampled with clean context"):
        train_levels.train_levels(TINY, DEMO, tmp_path, CPU, student=DEMO / demo_files.TEACHER_FILE)
