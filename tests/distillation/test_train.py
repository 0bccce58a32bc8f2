"""The trainer: its rollout is the sampler's; ranks, batches and interruptions change nothing of what it learns."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import wan_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import (
    command,
    flags,
    largest_difference,
    last_tensors,
    make_inputs,
    start,
    tiny_recipe,
    train_here,
    trainer_of,
    write_teacher,
)
from torch import Tensor, nn

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanConfig
from diagonal_sampler.noise import CONTEXT_STEP, INITIAL_STEP
from diagonal_sampler.sampler import count_forwards, sample_chunks, split_frames
from diagonal_sampler.schedule import DEFAULT_CONTEXT_SIGMA
from diagonal_sampler.settings import CausalSettings
from distillation import demo_files, export, recipes, run_folder, train, train_demo, trajectories
from distillation.common import generator_at
from distillation.networks import build_networks, read_wan
from distillation.prompts import PromptSet, prompts_digest
from distillation.ranks import join_ranks, require_same
from distillation.recipes import RECIPES, Recipe
from distillation.rollout import Rollout, exit_steps, predict_x0, sample_seed, spread_sigma, stream
from distillation.samples import write_samples
from distillation.trajectories import FILES, MADE_FOR, schedule_sigmas, teacher_settings, trajectory_schedule

TIMEOUT_S = 300
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
several_ranks = pytest.mark.skipif(os.name == "nt", reason="torchrun does not start on Windows")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


BF16_TOO = "common.fast_bf16 = networks.fast_bf16 = lambda device: True"
"""In bf16 on a CPU that only emulates it."""


def changed_command(recipe: Recipe, run: Path, change: str, *, ranks: int = 1) -> list[str]:
    """`command` with Python lines that are run first, in every process."""
    script = run.with_suffix(".py")
    names = "import os, signal, sys, time\nfrom torch import distributed as dist, nn\n"
    names += "from distillation import common, networks, train\n"
    script.write_text(f"{names}{change}\nsys.exit(train.main())\n")
    usual = command(recipe, run, ranks=ranks)
    at = len(usual) - 1 - usual[::-1].index("-m")
    return [*usual[:at], str(script), *usual[at + 2 :]]


def rollout_of(trainer: train.Trainer, **changes) -> Rollout:
    return replace(trainer.rollout(0, 0, "test", 0)[0], **changes)


# ---------------------------------------------------------------------------------------------------------------
# The rollout


@pytest.mark.parametrize("context_mode", ("noisy", "clean", "renoise"))
def test_rollout_latents_equal_the_samplers_for_the_same_seed(inputs, tmp_path, context_mode):
    trainer = trainer_of(tiny_recipe(inputs, context_mode=context_mode, exit="last"), tmp_path)
    recipe, rollout = trainer.recipe, trainer.rollout(0, 0, "test", 0)[0]
    network = trainer.networks.student.network
    _, clip = rollout.clip(network)
    cache = KVCache(recipe.settings, recipe.frames)
    with torch.no_grad():
        chunks = sample_chunks(
            lambda x, at: predict_x0(
                network, x, at.sigma, rollout.context, torch.float32, cache=cache.condition("positive")
            ),
            rollout.noise,
            recipe.schedule,
            cache,
            frames=recipe.frames,
            frames_per_chunk=recipe.frames_per_chunk,
        )
        sampled = torch.cat([chunk.latents for chunk in chunks], dim=2)
    assert torch.equal(clip, sampled)
    assert clip.std() > 0.1


@pytest.mark.parametrize("context_mode", ("noisy", "renoise"))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_replayed_gradient_equals_one_backward_through_all_exit_forwards(inputs, tmp_path, context_mode, checkpointing):
    """Against one graph over the whole clip, kept until the end; with and without activation checkpointing."""
    trainer = trainer_of(tiny_recipe(inputs, context_mode=context_mode), tmp_path)
    network = trainer.networks.student.network
    rollout = rollout_of(trainer, exits=[1, 0, 1])
    gradient = torch.randn(rollout.clip(network)[1].shape, generator=torch.Generator().manual_seed(1))
    cache = KVCache(rollout.settings, rollout.frames)
    chunks = sample_chunks(
        lambda x, at: predict_x0(
            network, x, at.sigma, rollout.context, torch.float32, cache=cache.condition("positive")
        ),
        rollout.noise,
        rollout.schedule,
        cache,
        frames=rollout.frames,
        frames_per_chunk=rollout.settings.frames_per_chunk,
        exit_step=lambda chunk: rollout.exits[chunk],
    )
    exits = [chunk.exit_latents for chunk in chunks]
    (torch.cat(exits, dim=2) * gradient).sum().backward()
    expected = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    network.activation_checkpointing = checkpointing
    rollout.backward(network, gradient)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3


@pytest.mark.parametrize("exit_at", (0, 1))
@pytest.mark.parametrize("context_mode", ("noisy", "clean", "renoise"))
def test_what_nobody_sees_of_the_last_chunk_is_not_made_and_changes_nothing(inputs, tmp_path, context_mode, exit_at):
    """Against a rollout that would go on, in which the same chunk is made to its end."""
    trainer = trainer_of(tiny_recipe(inputs, context_mode=context_mode), tmp_path)
    network, forwards = trainer.networks.student.network, []
    network.register_forward_pre_hook(lambda *_: forwards.append(1))
    given = torch.randn(4, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    ends = rollout_of(trainer, frames=8, first_frame=4, last_frame=8, exits=[1, 0, exit_at], given=given)
    goes_on = replace(ends, last_frame=9)
    gradient = torch.randn(4, 16, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def run(rollout: Rollout) -> tuple[Tensor, list[Tensor], int]:
        network.zero_grad(set_to_none=True)
        forwards.clear()
        with torch.no_grad():
            clip = rollout._run(network, None)
        rollout.backward(network, gradient)
        return clip, [value.grad for value in network.parameters()], len(forwards)

    (clip, grads, few), (expected, expected_grads, many) = run(ends), run(goes_on)
    assert torch.equal(clip, expected) and clip.std() > 0.1
    assert all(torch.equal(one, other) for one, other in zip(grads, expected_grads, strict=True))
    left_out = (1 - exit_at) + (context_mode != "noisy")  # the last of its two steps, its cache pass; clip and replay
    assert many - few == 2 * left_out and many == 2 * count_forwards(ends.schedule, 8, 2, context_frames=2)


def test_a_window_at_the_end_of_a_long_rollout_is_all_that_gets_gradients(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs), tmp_path)
    network = trainer.networks.student.network
    rollout = rollout_of(trainer, frames=8, first_frame=4, last_frame=8, exits=[2, 1, 1, 0])
    whole = replace(rollout, first_frame=0)
    _, clip = rollout.clip(network)
    assert clip.shape[2] == 4
    assert torch.equal(clip, whole.clip(network)[1][:, :, 4:])
    gradient = torch.ones_like(clip)
    rollout.backward(network, gradient)
    found = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    whole.backward(network, torch.cat([torch.zeros_like(gradient), gradient], dim=2))
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.grad, found[name], rtol=1e-5, atol=1e-7)


def test_every_clip_of_every_update_of_every_seed_is_another_one():
    places = [
        (seed, update, who, clip) for seed in (0, 1, 10) for update in (0, 1, 11) for who in "ab" for clip in (0, 1)
    ]
    seeds = [sample_seed(*place) for place in places]
    assert len(set(seeds)) == len(places) and seeds == [sample_seed(*place) for place in places]
    assert sample_seed(1, 11) != sample_seed(11, 1) and sample_seed(1, 1, 1) != sample_seed(1, 11)


def test_seeds_are_those_of_runs_that_have_begun():
    """Another number would make a resumed run another one."""
    assert sample_seed(0, 0, "student", 0) == 8237721143116898602
    assert sample_seed(7, 119, "fake4", 63) == 13788479097439911168
    assert sample_seed(0, "sample", 3) == 4946278415523235882
    assert sample_seed(-1, 12, "student", "exit") == 3189109558366685520


def test_exit_steps_follow_the_schedule_and_the_seed_alone(inputs):
    schedule = tiny_recipe(inputs, steps="4,3,2").schedule
    drawn = [exit_steps(schedule, 7, sample_seed(0, update, "student", "exit")) for update in range(400)]
    assert drawn == [exit_steps(schedule, 7, sample_seed(0, update, "student", "exit")) for update in range(400)]
    for chunk in range(7):
        steps = schedule.steps(chunk)
        counts = [sum(exits[chunk] == step for exits in drawn) for step in range(steps)]
        assert sum(counts) == len(drawn)
        assert all(0.6 < count * steps / len(drawn) < 1.4 for count in counts)
    assert exit_steps(schedule, 3, 1, last=True) == [3, 2, 1]


def test_exits_of_a_rollout_are_those_of_its_update_and_role(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, micro_batch=2), tmp_path)
    recipe = trainer.recipe
    for update, role, part in ((0, "fake0", 0), (3, "fake0", 1), (3, "student", 1)):
        exits = exit_steps(recipe.schedule, 3, sample_seed(0, update, role, "exit"))
        assert trainer.rollout(update, 0, role, part)[0].exits == exits
    trainer.recipe = replace(recipe, exit="last")
    assert trainer.rollout(3, 0, "student", 0)[0].exits == [2, 1, 1]


def test_a_prediction_is_x_minus_sigma_times_what_the_network_says_at_wans_timestep():
    seen = []

    def network(x, timestep, context, cache=None, **options):
        seen.append((timestep.tolist(), options))
        return torch.full_like(x, 2.0)

    x, settings = torch.ones(1, 1, 2, 1, 1), CausalSettings(frames_per_chunk=2, window=6, sink=4)
    (one, per_frame) = (
        predict_x0(network, x, sigma, x, torch.float32, settings=settings).flatten().tolist()
        for sigma in (0.25, torch.tensor([[0.5, 0.125]]))
    )
    assert (one, per_frame) == ([0.5, 0.5], [0.0, 0.75])
    told = {"frames_per_chunk": 2, "window": 6, "sink": 4}
    assert seen == [([250.0], told), ([[500.0, 125.0]], told)]


def test_guidance_keeps_the_keys_of_both_prompts_apart(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, cfg=3.0), tmp_path)
    recipe, rollout, network = trainer.recipe, rollout_of(trainer), trainer.networks.teacher.network
    cache = KVCache(recipe.settings, recipe.frames)

    def denoise(x, at):
        texts = {"with": rollout.context, "without": trainer.negative.expand(4, -1, -1)}
        found = [
            predict_x0(network, x, at.sigma, text, torch.float32, cache=cache.condition(name))
            for name, text in texts.items()
        ]
        return found[1] + 3 * (found[0] - found[1])

    with torch.no_grad():
        chunks = sample_chunks(
            denoise, rollout.noise, recipe.schedule, cache, frames=5, frames_per_chunk=recipe.frames_per_chunk
        )
        expected = torch.cat([chunk.latents for chunk in chunks], dim=2)
    clip = stream(
        network, rollout.context, rollout.noise, recipe.schedule, recipe.settings, 5, precision=torch.float32, cfg=3.0,
        negative=trainer.negative,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(list(clip), dim=2), expected)


def test_a_prompt_can_change_in_mid_stream_and_what_was_made_be_cached_under_it(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs), tmp_path)
    recipe, rollout, network = trainer.recipe, rollout_of(trainer), trainer.networks.student.network

    def clip(context, **options) -> Tensor:
        made = (context, rollout.noise, recipe.schedule, recipe.settings, 5)
        return torch.cat(list(stream(network, *made, precision=torch.float32, **options)), dim=2)

    def switched(again: bool) -> Tensor:
        texts = [rollout.context]

        def recache(chunk: int) -> bool:
            if chunk == 1:
                texts.append(-rollout.context)
            return again and chunk == 1

        return clip(lambda: texts[-1], recache=recache)

    clips = clip(rollout.context), switched(False), switched(True)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert torch.equal(clips[one][:, :, :2], clips[other][:, :, :2])
        assert (clips[one][:, :, 2:] - clips[other][:, :, 2:]).abs().max() > 1e-3


def test_memory_of_a_rollout_does_not_grow_with_its_length(inputs, tmp_path, monkeypatch):
    made = []

    class Watched(KVCache):
        def free(self) -> None:
            made.append((self.total_frames, self.nbytes))
            super().free()

    monkeypatch.setattr("distillation.rollout.KVCache", Watched)
    trainer = trainer_of(tiny_recipe(inputs), tmp_path)
    for frames in (8, 40):
        chunks = len(split_frames(frames, 2))
        rollout = rollout_of(trainer, frames=frames, first_frame=frames - 4, last_frame=frames, exits=[0] * chunks)
        rollout.backward(trainer.networks.student.network, torch.ones(4, 16, 4, 4, 4))
    assert [frames for frames, _ in made] == [8, 40]
    assert made[0][1] == made[1][1] > 0


# ---------------------------------------------------------------------------------------------------------------
# Updates


def changed(before: dict[str, Tensor], role) -> set[str]:
    return {name for name, value in role.network.named_parameters() if not torch.equal(before[name], value)}


def weights(role) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in role.network.named_parameters()}


@pytest.mark.parametrize("changes", ({}, {"motion_form": "head", "regression_weight": 0.5}, {"cfg": 1.0}))
def test_an_update_changes_student_and_fake_score_and_nothing_else(inputs, tmp_path, changes):
    trainer = trainer_of(tiny_recipe(inputs, **changes), tmp_path)
    roles = trainer.networks
    before = {name: weights(getattr(roles, name)) for name in ("student", "teacher", "fake_score")}
    values = trainer.update(0)
    assert all(value > 0 for name, value in values.items() if "norm" in name)
    assert changed(before["teacher"], roles.teacher) == set()
    for name in ("student", "fake_score"):
        assert changed(before[name], getattr(roles, name)) == set(before[name])


def test_the_students_loss_leaves_no_gradient_elsewhere(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs), tmp_path)
    trainer._student_backward(0, 0)
    assert all(value.grad is None for value in trainer.networks.teacher.network.parameters())
    assert all(value.grad is None for value in trainer.networks.fake_score.network.parameters())
    assert all(value.grad is not None for value in trainer.networks.student.network.parameters())


def test_motion_weight_zero_turns_motion_off(inputs, tmp_path):
    off = trainer_of(tiny_recipe(inputs, motion_weight=0.0), tmp_path / "off")
    on = trainer_of(tiny_recipe(inputs), tmp_path / "on")
    assert "motion" not in off.update(0) and "motion" in on.update(0)
    assert not torch.equal(off.ema.values["patch_embedding.weight"], on.ema.values["patch_embedding.weight"])


def test_the_teacher_is_guided_up_to_a_noise_level(inputs, tmp_path):
    """Each clip of a micro-batch has a level of its own: below cfg_high its gradient is the guided one's, above not."""
    recipe = tiny_recipe(inputs, cfg=6.0)
    trainer = trainer_of(recipe, tmp_path)
    rollout, seeds = trainer.rollout(0, recipe.fake_score_updates, "student", 0)
    clip = rollout.clip(trainer.networks.student.network)[1]
    sigma = trainer.under_noise(clip, seeds)[1]
    level = float(sigma.sort().values[len(sigma) // 2 - 1 :][:2].mean())

    def gradient(**changes) -> Tensor:
        trainer.recipe, seen = replace(recipe, **changes), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rollout, "backward", lambda self, network, gradient: seen.append(gradient.clone()))
            trainer._student_backward(0, 0)
        return seen[0]

    guided, plain, found = gradient(), gradient(cfg=1.0), gradient(cfg_high=level)
    below = sigma <= level
    assert 0 < below.sum() < len(sigma) and not torch.equal(guided, plain)
    assert torch.equal(found[below], guided[below])
    torch.testing.assert_close(found[~below], plain[~below])
    with pytest.raises(ValueError, match="cfg_high is 1.5; it is a noise level"):
        replace(recipe, cfg_high=1.5)


def test_a_window_can_be_judged_with_the_rollouts_sink_in_view(inputs, tmp_path):
    """The scores see clean sink and noisy window as the student attends; the chunk after the gap learns nothing."""
    recipe = tiny_recipe(
        inputs, stage="long", frames=4, rollout_frames=12, sink=2, window=6, score_attention="causal", score_sink=True
    )
    trainer = trainer_of(recipe, tmp_path)
    turn = recipe.fake_score_updates  # of the student's own rollout
    rollouts = {update: trainer.rollout(update, turn, "student", 0)[0] for update in range(20)}
    assert all(bool(rollout.sink_frames) == (rollout.first_frame >= 2) for rollout in rollouts.values())
    update = next(update for update, rollout in rollouts.items() if rollout.first_frame >= 4)
    rollout, student = rollouts[update], trainer.networks.student.network
    sink, clip = rollout.clip(student)
    last = [recipe.schedule.steps(chunk) - 1 for chunk in range(len(rollout.exits))]
    whole = replace(rollout, first_frame=0, sink_frames=0, exits=last).clip(student)[1]
    assert torch.equal(sink, whole[:, :, :2]) and clip.shape[2] == 4

    sigma = torch.tensor([0.2, 0.4, 0.6, 0.8])
    teacher = trainer.networks.teacher
    spread = torch.cat([torch.zeros(4, 2), sigma[:, None].expand(-1, 4)], dim=1)
    with torch.no_grad():
        found = trainer.score(teacher, clip, sigma, rollout.context, sink=sink)
        expected = predict_x0(
            teacher.network,
            torch.cat([sink, clip], 2),
            spread,
            rollout.context,
            torch.float32,
            settings=recipe.settings,
        )
        blind = trainer.score(teacher, clip, sigma, rollout.context)
    assert torch.equal(found, expected[:, :, 2:]) and (found - blind).abs().max() > 1e-3

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "backward", lambda self, network, gradient: seen.append(gradient))
        trainer._student_backward(update, 0)
    assert not seen[0][:, :, :2].any() and seen[0][:, :, 2:].abs().max() > 0
    lengths = []
    for role in (teacher, trainer.networks.fake_score):
        role.network.register_forward_pre_hook(lambda network, inputs: lengths.append(inputs[0].shape[2]))
    trainer._student_backward(update, 0)
    trainer._fake_score_backward(update, turn, 0)
    assert len(lengths) == 4 and set(lengths) == {2 + 4}, "with a prompt and without, and the fake score twice"
    for changes in ({"score_attention": "bidirectional"}, {"sink": 1}):
        with pytest.raises(ValueError, match="score_sink needs"):
            replace(recipe, **changes)


@pytest.mark.parametrize("changes", ({"stage": "long", "rollout_frames": 12}, {"given_share": 0.5}))
def test_the_first_chunk_of_a_window_that_begins_inside_a_video_learns_nothing(inputs, tmp_path, changes):
    """Teacher and fake score take its first latent frame for a video's first."""
    recipe = tiny_recipe(inputs, frames=6, **changes)
    trainer = trainer_of(recipe, tmp_path)
    firsts = [trainer.rollout(update, recipe.fake_score_updates, "student", 0)[0].first_frame for update in range(20)]
    for update, learns in ((firsts.index(0), 6), (next(n for n, first in enumerate(firsts) if first), 4)):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rollout, "backward", lambda self, network, gradient, seen=seen: seen.append(gradient))
            values = trainer._student_backward(update, 0)
        assert [bool(seen[0][:, :, frame].any()) for frame in range(6)] == [False] * (6 - learns) + [True] * learns
        assert values["dmd"] > 0 and values["motion"] > 0


def test_ranks_and_parts_share_a_batch(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, batch=8, micro_batch=2), tmp_path)
    trainer.accumulation = trainer.recipe.accumulation(2)
    places = []
    for rank in range(2):
        trainer.ranks = replace(trainer.ranks, rank=rank, count=2)
        places += [place for part in range(trainer.accumulation) for place in trainer.places(part)]
    assert places == list(range(8))


def test_every_rollout_of_an_update_has_the_next_prompts_and_clips_of_its_own(inputs, tmp_path, monkeypatch):
    trainer = trainer_of(tiny_recipe(inputs, batch=1, micro_batch=1), tmp_path)
    asked, usual = [], trainer.rollout
    monkeypatch.setattr(trainer, "rollout", lambda *place: asked.append(place) or usual(*place))
    trainer.update(1)
    assert asked == [(1, 0, "fake0", 0), (1, 1, "fake1", 0), (1, 2, "student", 0)]
    rows = [trainer.prompt_rows(update, turn, 0)[0] for update in range(6) for turn in range(3)]
    epochs = [rows[first : first + 3] for first in range(0, 18, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(map(tuple, epochs))) > 1


def test_a_score_is_asked_at_a_level_of_each_clips_own_under_noise_that_the_student_never_had(inputs, tmp_path):
    recipe = tiny_recipe(inputs, score_shift=1.0, score_low=1e-6, score_high=1.0)
    trainer = trainer_of(recipe, tmp_path)
    seeds, clip = list(range(40)), torch.randn(40, 16, 5, 4, 4, generator=generator_at(1))
    u = trainer.under_noise(clip, seeds)[1]
    trainer.recipe = replace(recipe, score_shift=3.0, score_low=0.3, score_high=0.9)
    x, sigma, noise = trainer.under_noise(clip, seeds)
    torch.testing.assert_close(sigma, (3 * u / (1 + 2 * u)).clamp(0.3, 0.9))
    assert len(u.unique()) == 40 and float(sigma.min()) == pytest.approx(0.3) and float(sigma.max()) > 0.89
    level = sigma[:, None, None, None, None]
    torch.testing.assert_close(x, (1 - level) * clip + level * noise)
    for step in (CONTEXT_STEP, INITIAL_STEP, 0, 1, 2):
        assert (trainer.noise(seeds)(0, step, 5) - noise).abs().mean() > 1


@pytest.mark.parametrize("form", ("differences", "head"))
def test_each_loss_counts_by_its_weight(inputs, tmp_path, form):
    ones = {"dmd_weight": 1.0, "motion_weight": 1.0, "motion_scale": 1.0, "regression_weight": 1.0}
    trainer = trainer_of(tiny_recipe(inputs, motion_form=form, micro_batch=2, **ones), tmp_path)
    recipe = trainer.recipe
    rollout, seeds, sink, clip = trainer._clip(0, 2, "student", 0)

    def terms(**changes) -> dict[str, float]:
        trainer.recipe = replace(recipe, **changes)
        return {
            name: float(value)
            for name, value in trainer._student_losses(rollout, seeds, sink, clip.detach().clone()).items()
        }

    usual = terms()
    found = terms(dmd_weight=2.0, motion_weight=3.0, motion_scale=5.0, regression_weight=7.0)
    factors = {"dmd": 2, "regression": 7, "motion": 15} | ({"motion_regression": 21} if form == "head" else {})
    assert {name: value / usual[name] for name, value in found.items()} == pytest.approx(factors)
    own = terms(regression_weight=0.0, motion_regression_weight=5.0)
    factors = {"dmd": 1, "motion": 1} | ({"motion_regression": 5} if form == "head" else {})
    assert {name: value / usual[name] for name, value in own.items()} == pytest.approx(factors)


def test_a_motion_head_learns_by_a_regression_weight_of_its_own(inputs, tmp_path):
    weights = ({}, {"motion_regression_weight": 1.0}, {"regression_weight": 1.0, "motion_regression_weight": 0.0})
    found = [trainer_of(tiny_recipe(inputs, motion_form="head", **given), tmp_path).head for given in weights]
    assert [head is not None for head in found] == [False, True, False]
    assert recipes.demo(regression_weight=0.5).motion_regression == 0.5
    with pytest.raises(ValueError, match="motion_regression_weight is -0.5; it must be 0 or more, or -1"):
        recipes.demo(motion_regression_weight=-0.5)


def test_each_network_has_its_own_rate_and_the_recipes_adamw(inputs, tmp_path):
    trainer = trainer_of(
        tiny_recipe(
            inputs, motion_form="head", regression_weight=0.5, learning_rate=1e-3, fake_score_learning_rate=2e-3,
            motion_head_learning_rate=3e-3, beta1=0.25, beta2=0.75, epsilon=0.125, weight_decay=0.5,
        ),
        tmp_path,
    )  # fmt: skip
    (groups,) = zip(*(learner.optimizer.param_groups for learner in trainer.learners), strict=True)
    assert [group["peak"] for group in groups] == [1e-3, 2e-3, 3e-3]
    assert {(group["betas"], group["eps"], group["weight_decay"]) for group in groups} == {((0.25, 0.75), 0.125, 0.5)}


def test_a_step_clips_and_clears_the_gradients_and_takes_the_updates_rate(inputs):
    recipe = tiny_recipe(inputs, updates=10, warmup=4, cooldown=4, gradient_clip=1.0, beta1=0.5)
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [train.rate_factor(recipe, update) for update in range(10)] == factors
    assert train.rate_factor(replace(recipe, warmup=0, cooldown=0), 0) == 1
    weight = nn.Parameter(torch.zeros(2))
    learner = train.Learner("student", {"weight": weight}, 0.5, recipe)
    weight.grad = torch.tensor([3.0, 4.0])
    assert learner.step(0) == 5 and weight.grad is None
    assert learner.optimizer.param_groups[0]["lr"] == 0.125
    torch.testing.assert_close(learner.tensors()["student.exp_avg/weight"], torch.tensor([0.3, 0.4]))
    before, weight.grad = weight.detach().clone(), torch.tensor([float("inf"), 0.0])
    with pytest.raises(ValueError, match="update 1: the gradient norm of student is"):
        learner.step(1)
    assert torch.equal(weight, before)


def test_weights_are_averaged_from_an_update_on_and_lent_for_samples_only():
    weight = nn.Parameter(torch.tensor([8.0]))
    average = train.Ema({"weight": weight}, decay=0.75, start=2)
    for update, value, expected in ((0, 0.0, 0.0), (1, 4.0, 4.0), (2, 8.0, 5.0), (3, 9.0, 6.0)):
        weight.data.fill_(value)
        average.update(update)
        assert average.values["weight"].item() == expected
    with pytest.raises(KeyError), average.in_place():
        assert weight.item() == 6
        raise KeyError
    assert (weight.item(), average.values["weight"].item()) == (9, 6)


def test_samples_are_the_averaged_students_of_as_many_prompts_as_there_are(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, micro_batch=2), tmp_path)
    clips, captions = trainer.sample(9)
    assert captions == list(trainer.prompts.prompts) and len(clips) == 3
    for value in trainer.student.parameters.values():
        value.data.mul_(2)  # ahead of its average
    assert torch.equal(trainer.sample(2)[0], clips[:2])


def test_the_teachers_motion_head_begins_as_the_students_and_follows_it(inputs, tmp_path):
    fast = {"motion_head_learning_rate": 0.1, "epsilon": 1e-8}
    trainer = trainer_of(tiny_recipe(inputs, motion_form="head", regression_weight=0.5, seed=3, **fast), tmp_path)
    head, follower = (dict(head.named_parameters()) for head in trainer.heads)
    before = {name: value.detach().clone() for name, value in head.items()}
    assert all(torch.equal(follower[name], value) for name, value in before.items())
    trainer.update(0)
    for name, value in head.items():
        torch.testing.assert_close(follower[name], (before[name] + value) / 2)
    assert max(float((before[name] - value.detach()).abs().max()) for name, value in head.items()) > 0.05
    other = trainer_of(tiny_recipe(inputs, motion_form="head", seed=4), tmp_path).heads[0]
    assert any(not torch.equal(before[name], value) for name, value in other.named_parameters())


def test_distillation_brings_the_student_nearer_to_its_teacher(inputs, tmp_path):
    """A student of other random weights, one chunk of one step: its x0 must approach the teacher's distribution."""
    write_teacher(inputs / "other.safetensors", seed=9)
    recipe = tiny_recipe(
        inputs, student=str(inputs / "other.safetensors"), updates=60, save_every=60, cfg=1.0, learning_rate=3e-3,
        motion_weight=0.0, fake_score_updates=3, frames=2, steps="1", window=-1, sink=0, batch=8, micro_batch=8,
    )  # fmt: skip
    trainer = trainer_of(recipe, tmp_path)

    def distance() -> float:
        _, clip = rollout_of(trainer, exits=[0]).clip(trainer.networks.student.network)
        x, sigma, _ = trainer.under_noise(clip, list(range(8)))
        with torch.no_grad():
            context = trainer.prompts.embeddings(trainer.prompt_rows(0, 0, 0))
            real = trainer.score(trainer.networks.teacher, x, sigma, context)
        return float((clip - real).square().mean())

    before = distance()
    for update in range(recipe.updates):
        trainer.update(update)
    assert distance() < 0.7 * before


def test_accumulation_equals_a_large_batch(inputs, tmp_path):
    large = train_here(tiny_recipe(inputs), tmp_path / "large")
    small = train_here(tiny_recipe(inputs, micro_batch=1), tmp_path / "small")
    assert largest_difference(large, small) < 1e-5


@pytest.mark.parametrize("stage", ("ode", "forcing"))
def test_causal_initialisation_learns_its_clips(inputs, tmp_path, stage):
    clips = tmp_path / "clips"
    train_here(tiny_recipe(inputs, stage="ode", clips=str(clips), updates=1), tmp_path / "make")
    write_teacher(inputs / "other.safetensors", seed=9)
    recipe = tiny_recipe(
        inputs, stage=stage, clips=str(clips), updates=30, save_every=30, student=str(inputs / "other.safetensors")
    )
    train_here(recipe, tmp_path / "run")
    found = [json.loads(line)[stage] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_stage_ode_shows_every_chunk_at_a_level_of_its_own_and_half_the_clips_behind_finished_ones(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), ode_clips=1), tmp_path)
    known, rows = schedule_sigmas(trainer.recipe), [trainer.recipe.schedule.chunk_sigmas(chunk) for chunk in range(3)]
    draws = torch.rand(60, 4, generator=generator_at(2))
    paths = torch.tensor(known)[None, :, None, None, None, None].expand(60, -1, 1, 5, 1, 1)
    sigma, x, behind = trainer._on_trajectory(paths, draws)
    assert torch.equal(sigma, x[:, 0, :, 0, 0]), "the teacher's clip at that level"
    assert torch.equal(sigma[:, 0::2][:, :2], sigma[:, 1::2]), "one level a chunk"
    for found, (context, *own) in zip(sigma[:, 0::2].tolist(), draws.tolist(), strict=True):
        finished = int(2 * context * 3) if context < 0.5 else 0
        expected = [
            row[-1] if chunk < finished else row[int(u * len(row))]
            for chunk, (row, u) in enumerate(zip(rows, own, strict=True))
        ]
        assert found == pytest.approx(expected, abs=1e-6)
    finished = torch.where(draws[:, 0] < 0.5, (2 * draws[:, 0] * 3).floor(), 0.0)
    assert torch.equal(behind[:, 0::2], torch.arange(3) < finished[:, None]) and torch.equal(
        behind[:, 0::2][:, :2], behind[:, 1::2]
    )


@pytest.mark.parametrize("mode", ("noisy", "clean", "renoise"))
def test_stage_ode_shows_finished_chunks_as_they_are_cached_at_inference(inputs, tmp_path, monkeypatch, mode):
    """With a cache pass they are at its noise level, and no prediction is asked of them."""
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), context_mode=mode, context_sigma=0.25)
    trainer = trainer_of(recipe, tmp_path)
    level = {"noisy": None, "clean": 0.0, "renoise": 0.25}[mode]
    asked, usual = [], train.predict_x0

    def watched(network, x, sigma, *args, **options):
        asked.append((x, sigma, usual(network, x, sigma, *args, **options)))
        return asked[-1][-1]

    monkeypatch.setattr(train, "predict_x0", watched)
    monkeypatch.setattr(trainer.student, "step", lambda update: 0.0)
    seen = []
    monkeypatch.setattr(trainer, "_on_trajectory", lambda *args: seen.append(on(*args)) or seen[-1])
    on = train.Trainer._on_trajectory.__get__(trainer)
    losses = [trainer.update(update)["ode"] for update in range(3)]
    assert any(behind.any() for _, _, behind in seen) and not all(behind.any(1).all() for _, _, behind in seen)
    for update, (loss, (x, sigma, x0), (levels, states, behind)) in enumerate(zip(losses, asked, seen, strict=True)):
        rows = train.batch_rows(recipe.seed, update, recipe.batch, len(trainer.clips))
        clean = trainer.clips.take(rows)[0]
        if level is not None:
            noise = trainer.noise(trainer.seeds(update, "clip", 0))(0, train.SCORE_STEP, 5)
            levels = torch.where(behind, level, levels)
            states = torch.where(behind[:, None, :, None, None], (1 - level) * clean + level * noise, states)
        assert torch.equal(sigma, levels)
        torch.testing.assert_close(x, states)
        errors = (x0.detach() - clean).square()
        counted = errors if level is None else errors * ~behind[:, None, :, None, None]
        assert loss == pytest.approx(float(counted.mean()), rel=1e-5)


def test_stage_forcing_asks_for_the_flow_of_clips_as_the_student_sees_them(inputs, tmp_path, monkeypatch):
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), ode_clips=4)
    trainer_of(recipe, tmp_path)
    trainer = trainer_of(replace(recipe, stage="forcing", shift=3.0), tmp_path)
    asked = []

    def nothing(network, x, sigma, context, precision, *, settings, optical_flow):
        asked.append((x, sigma, settings))
        return torch.zeros_like(x, requires_grad=True)

    monkeypatch.setattr(train, "predict_x0", nothing)
    monkeypatch.setattr(trainer.student, "step", lambda update: 0.0)

    def drawn(update: int) -> tuple[Tensor, Tensor]:
        """A uniform number a chunk, and which chunks are finished ones."""
        seeds = trainer.seeds(update, "clip", 0)
        found = torch.stack([torch.rand(4, generator=generator_at(seed & 0xFFFFFFFF, 17)) for seed in seeds])
        finished = torch.where(found[:, 0] < 0.5, (2 * found[:, 0] * 3).floor(), 0.0)
        return found[:, 1:], torch.arange(3) < finished[:, None]

    def shows_all(update: int) -> bool:
        u, behind = drawn(update)
        return bool(behind.any() and u[~behind].min() < 0.005)  # of which a level is too low

    update = next(filter(shows_all, range(999)))
    loss = trainer.update(update)["forcing"]
    ((x, sigma, settings),) = asked
    seeds, (u, behind) = trainer.seeds(update, "clip", 0), drawn(update)
    levels = torch.where(behind, 0.0, (3 * u / (1 + 2 * u)).clamp(0.02, 1))
    torch.testing.assert_close(sigma, levels.repeat_interleave(torch.tensor([2, 2, 1]), dim=1))
    assert not behind.all(1).any(), "every clip is asked for something"
    spread = spread_sigma(sigma)
    clean = (x - spread * trainer.noise(seeds)(0, train.SCORE_STEP, 5)) / (1 - spread)
    errors = torch.where(spread > 0, clean / spread, 0.0)
    assert settings == recipe.settings and loss == pytest.approx(float(errors.square().mean()), rel=1e-4)


def test_the_teachers_steps_are_even_ones_and_every_level_of_the_student(inputs):
    recipe = tiny_recipe(inputs, ode_steps=4, shift=5.0, score_attention="causal")
    schedule = trajectory_schedule(recipe)
    even = [5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25)]
    (found,) = schedule.sigmas
    assert list(found) == sorted(found, reverse=True) and min(a - b for a, b in pairwise(found)) > 1e-6
    for sigma in (*even, *schedule_sigmas(recipe)):
        assert min(abs(sigma - other) for other in found) <= 1e-6
    assert len(found) <= len({round(sigma, 5) for sigma in (*even, *schedule_sigmas(recipe))})
    assert schedule.context_mode == "clean", "its chunks see finished ones"
    assert trajectory_schedule(replace(recipe, score_attention="bidirectional")).context_mode == "noisy"


def test_trajectories_begin_with_noise_and_pass_through_the_students_levels(inputs, tmp_path):
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), updates=1, micro_batch=2)
    trainer = trainer_of(recipe, tmp_path / "run")
    assert len(trainer.clips) == recipe.ode_clips
    latents, paths, rows, flow = trainer.clips.take([3])
    assert flow is None
    noise = trainer.noise([sample_seed(recipe.seed, "ode", 3)])(0, -1, recipe.frames)
    torch.testing.assert_close(paths[:, 0], noise, atol=2e-3, rtol=2e-3)  # fp16 on disk
    assert rows == [3 % len(trainer.prompts)]
    assert float((paths[:, -1] - latents).square().mean()) < float((paths[:, 0] - latents).square().mean())


def test_trajectories_are_kept_and_another_schedule_refused(inputs, tmp_path):
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), updates=1)
    trainer_of(recipe, tmp_path / "a")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").iterdir()}
    trainer_of(recipe, tmp_path / "b")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").iterdir()}
    with pytest.raises(ValueError, match="another schedule"):
        trainer_of(replace(recipe, steps="4,2"), tmp_path / "c")
    with pytest.raises(ValueError, match="was made for .*cfg"):
        trainer_of(replace(recipe, cfg=2.0), tmp_path / "d")
    with pytest.raises(ValueError, match=r"holds latents of .* the recipe asks for \[16, 4, 4, 4\]"):
        trainer_of(replace(recipe, stage="forcing", frames=4), tmp_path / "e")
    (tmp_path / "other").mkdir()
    other = write_teacher(tmp_path / "other" / "teacher.safetensors", seed=9)
    with pytest.raises(ValueError, match="was made for another teacher, with the name that is given"):
        trainer_of(replace(recipe, teacher=str(other)), tmp_path / "h")
    for path in files:
        tensors = load_file(path)
        save_file({name: tensors[name] for name in ("latents", "prompt_rows")}, path)
    assert len(trainer_of(replace(recipe, stage="forcing"), tmp_path / "f").clips) == recipe.ode_clips
    with pytest.raises(ValueError, match="has no sigmas, trajectory"):
        trainer_of(recipe, tmp_path / "g")


def test_trajectories_are_filled_up_with_another_micro_batch_or_number_of_clips(inputs, tmp_path):
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "whole"), updates=1, ode_clips=7, micro_batch=1)
    whole = trainer_of(recipe, tmp_path / "a").clips
    parts = replace(recipe, clips=str(tmp_path / "parts"), ode_clips=3, batch=4, micro_batch=2)
    trainer_of(parts, tmp_path / "b")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert sorted(path.name for path in kept) == ["clips-000000.safetensors", "clips-000002.safetensors"]
    (tmp_path / "parts" / "clips-000000.safetensors").unlink()
    more = trainer_of(replace(parts, ode_clips=7, batch=3, micro_batch=3), tmp_path / "c").clips
    names = [f"clips-{first:06d}.safetensors" for first in (0, 2, 3, 6)]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    same = tmp_path / "parts" / names[1]
    assert same.stat().st_mtime_ns == kept[same], "what is there is not made again"
    for clip in range(7):
        for left, right in zip(whole.take([clip]), more.take([clip]), strict=True):
            assert left == right if isinstance(left, list | None) else torch.allclose(left, right, atol=2e-3)
    with pytest.raises(ValueError, match="was made for"):  # before anything is made
        trainer_of(replace(recipe, seed=5, ode_clips=10**9), tmp_path / "d")


def test_a_run_draws_from_its_own_number_of_trajectories_whatever_else_the_folder_holds(inputs, tmp_path):
    """Resumed when another run has added some, it is bit by bit what it would have been."""
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), updates=3, ode_clips=3, micro_batch=2)
    whole = train_here(recipe, tmp_path / "whole")
    train_here(replace(recipe, updates=1), tmp_path / "parts")
    trainer_of(replace(recipe, ode_clips=11), tmp_path / "other")
    names = [path.name for path in sorted((tmp_path / "clips").iterdir())]
    assert len(names) == 6 and names[0] == "clips-000000.safetensors"
    shutil.copy(tmp_path / "clips" / names[0], tmp_path / "clips" / "clips-mine.safetensors")  # of no number
    shutil.copy(tmp_path / "clips" / names[0], tmp_path / "clips" / "clips-0.safetensors")  # of numbers that are there
    clips = trainer_of(recipe, tmp_path / "again").clips
    assert len(clips) == 3 and len(clips.numbered) == 11
    assert largest_difference(whole, train_here(recipe, tmp_path / "parts")) == 0
    (tmp_path / "clips" / names[0]).unlink()
    (tmp_path / "clips" / "clips-0.safetensors").unlink()
    few = trainer_of(replace(recipe, ode_clips=1), tmp_path / "few").clips  # the folder holds later ones alone
    assert [(path.name, row) for path, row in few.rows] == [(names[0], 0)]


@pytest.mark.parametrize("own", (False, True))
def test_stage_forcing_does_not_go_on_with_other_clips(inputs, tmp_path, capsys, own):
    run = tmp_path / "run"
    folder = run / "clips" if own else tmp_path / "clips"
    folder.mkdir(parents=True)
    recipe = tiny_recipe(inputs, stage="forcing", clips="" if own else str(folder), updates=1)
    tensors = {"latents": torch.zeros(2, 16, 5, 4, 4), "prompt_rows": torch.tensor([0, 2])}
    save_file(tensors, folder / "clips-00000.safetensors")
    train_here(recipe, run)
    train_here(replace(recipe, updates=2), run)
    save_file(tensors, folder / "clips-00001.safetensors")
    assert train.main([*flags(replace(recipe, updates=3)), "--out", str(run)]) == 1
    assert "the clips are other files, or of other sizes, than when the run began" in capsys.readouterr().err
    (folder / "clips-00001.safetensors").unlink()
    train_here(replace(recipe, updates=3), run)


def test_clips_of_other_prompts_or_with_nan_are_refused_by_file(inputs, tmp_path):
    recipe = tiny_recipe(inputs, stage="forcing", clips=str(tmp_path), ode_clips=1)
    path = tmp_path / "clips-00000.safetensors"
    latents = torch.zeros(2, 16, 5, 4, 4)

    def clips(rows: Tensor, latents: Tensor = latents):
        save_file({"latents": latents, "prompt_rows": rows}, path)
        return trainer_of(recipe, tmp_path / "run").clips

    assert len(clips(torch.tensor([0, 2]))) == 2
    for rows in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=rf"clips-00000.* names prompts {rows[0]} to {rows[1]}.* has 0 to 2;"):
            clips(torch.tensor(rows))
    for rows in (torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"clips-00000.*: prompt_rows is .* it must be int64 \[2\]"):
            clips(rows)
    bad = latents.clone()
    bad[1, 0, 0, 0, 0] = float("nan")
    found = clips(torch.tensor([0, 1]), bad)
    found.take([0])
    with pytest.raises(ValueError, match="clips-00000.*: latents of clip 1 holds NaN"):
        found.take([1])


def test_clips_of_other_prompts_under_the_same_name_are_refused_and_old_ones_taken(inputs, tmp_path, caplog):
    first, second = tmp_path / "a" / "prompts.txt", tmp_path / "b" / "prompts.txt"
    for path, text in ((first, "a red circle moves left\n"), (second, "a blue square moves up\n")):
        path.parent.mkdir()
        path.write_text(text)
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), prompts=str(first), ode_clips=1)
    trainer_of(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="was made for another prompts, with the name"):
        trainer_of(replace(recipe, prompts=str(second)), tmp_path / "run")
    second.write_text(f"# the same in another place\n\n{first.read_text()}")
    trainer_of(replace(recipe, prompts=str(second)), tmp_path / "run")
    assert "do not say what teacher" not in caplog.text
    (path,) = (tmp_path / "clips").iterdir()
    with safe_open(path, "pt") as file:
        stated = json.loads(file.metadata()[MADE_FOR])
    assert stated.pop(FILES).keys() == {"teacher", "prompts"}
    save_file(load_file(path), path, {MADE_FOR: json.dumps(stated)})
    trainer_of(recipe, tmp_path / "run")
    assert "1 files in" in caplog.text and "do not say what teacher and prompts held" in caplog.text


def test_a_teacher_that_sees_the_whole_clip_keeps_no_cache(inputs, monkeypatch, tmp_path):
    """Its clips are those of the same loop through a cache, which nothing would read."""
    recipe = tiny_recipe(inputs, stage="ode", clips=str(tmp_path / "clips"), updates=1, score_attention="bidirectional")
    trainer = trainer_of(recipe, tmp_path / "run")
    latents, _, rows, _ = trainer.clips.take([1])
    network, context = trainer.networks.teacher.network, trainer.prompts.embeddings(rows)
    schedule = trajectory_schedule(recipe).sigmas[0]
    cache = KVCache(teacher_settings(recipe), recipe.frames)
    cache.begin(recipe.frames)
    x = trainer.noise([sample_seed(recipe.seed, "ode", 1)])(0, -1, recipe.frames)
    for sigma, then in pairwise((*schedule, 0.0)):
        positive, negative = (
            predict_x0(network, x, sigma, text, torch.float32, cache=cache.condition(name)).detach()
            for name, text in (("p", context), ("n", trainer.negative))
        )
        x0 = negative + recipe.cfg * (positive - negative)
        x = x0 + then * (x - x0) / sigma
    torch.testing.assert_close(latents, x, atol=2e-3, rtol=2e-3)  # fp16 on disk
    monkeypatch.setattr(KVCache, "condition", lambda *args: pytest.fail("a cache is written"))
    trainer_of(replace(recipe, clips=str(tmp_path / "again")), tmp_path / "again")


def test_stage_long_draws_whole_chunks_up_to_the_longest_rollout(inputs, tmp_path):
    recipe = tiny_recipe(inputs, stage="long", frames=4, rollout_frames=11)
    trainer = trainer_of(recipe, tmp_path)
    lengths = {trainer.rollout(update, 0, "student", 0)[0].frames for update in range(60)}
    assert lengths == {4, 6, 8, 10}
    assert recipes.long_video().opening_share == 0.1, "there one rollout of 74 would be a beginning"
    trainer.recipe = replace(recipe, opening_share=0.8)
    openings = sum(trainer.rollout(update, 0, "student", 0)[0].frames == 4 for update in range(60))
    assert 40 < openings < 60  # of them 51 are expected: one in four of the others is as short
    assert trainer.update(0)["student_norm"] > 0


def test_a_share_of_rollouts_goes_on_from_a_finished_chunk(inputs, tmp_path):
    """What is given is cached as the sampler caches an extended video's frames, and only what follows is trained."""
    recipe = tiny_recipe(inputs, frames=4, given_share=0.5)
    trainer = trainer_of(recipe, tmp_path)
    rollouts = [trainer.rollout(update, 0, "student", 0)[0] for update in range(40)]
    assert 10 < sum(rollout.given is not None for rollout in rollouts) < 30
    rollout = next(rollout for rollout in rollouts if rollout.given is not None)
    chunk = recipe.frames_per_chunk
    assert (rollout.frames, rollout.first_frame, rollout.given.shape[2]) == (4 + chunk, chunk, chunk)
    network = trainer.networks.student.network
    sink, window = rollout.clip(network)
    assert window.shape[2] == 4 and sink.shape[2] == 0
    opening = next(
        stream(
            network, rollout.context, rollout.noise, recipe.schedule, recipe.settings, chunk, precision=torch.float32
        )
    )
    assert (opening - rollout.given).abs().mean() > 0.1, "of another clip than the one that follows"
    other = replace(rollout, given=rollout.given + 1).clip(network)[1]
    assert (other - window).abs().max() > 1e-4
    cache = KVCache(recipe.settings, rollout.frames)

    def denoise(x, at):
        context, precision = rollout.context, rollout.precision
        return predict_x0(network, x, at.sigma, context, precision, cache=cache.condition("positive"))

    with torch.no_grad():
        sampled = list(
            sample_chunks(
                denoise, rollout.noise, recipe.schedule, cache, frames=rollout.frames, frames_per_chunk=chunk,
                context=rollout.given, exit_step=lambda index: rollout.exits[index],
            )
        )  # fmt: skip
    assert torch.equal(torch.cat([chunk.exit_latents for chunk in sampled], dim=2), window)
    trainer.recipe = replace(recipe, given_share=0.99)
    assert trainer.update(0)["student_norm"] > 0
    with pytest.raises(ValueError, match="given_share is 1.0"):
        replace(recipe, given_share=1.0)


def test_scores_see_a_given_chunk_as_the_sink(inputs, tmp_path):
    """And the chunk that follows it at once learns: nothing lies between, unlike after a gap."""
    recipe = tiny_recipe(inputs, frames=4, sink=2, given_share=0.99, score_attention="causal", score_sink=True)
    trainer = trainer_of(recipe, tmp_path)
    rollout = trainer.rollout(1, 0, "student", 0)[0]
    sink, window = rollout.clip(trainer.networks.student.network)
    assert torch.equal(sink, rollout.given) and window.shape[2] == 4
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "backward", lambda self, network, gradient: seen.append(gradient))
        trainer._student_backward(1, 0)
    assert all(seen[0][:, :, frame].abs().max() > 0 for frame in range(4))
    with pytest.raises(ValueError, match="score_sink needs score_attention causal"):
        replace(recipe, score_attention="bidirectional")


# ---------------------------------------------------------------------------------------------------------------
# Sizes and adapters


def test_a_larger_teacher_trains_a_student_and_its_fake_score(inputs, tmp_path, caplog):
    student, fake = str(inputs / "teacher.safetensors"), write_teacher(tmp_path / "fake.safetensors", seed=4)
    teacher = write_teacher(tmp_path / "large.safetensors", dim=256, num_layers=3)
    recipe = tiny_recipe(inputs, teacher=str(teacher), student=student, updates=2)
    trainer = trainer_of(recipe, tmp_path / "run")
    roles = trainer.networks
    assert [role.network.config.dim for role in (roles.student, roles.teacher, roles.fake_score)] == [128, 256, 128]
    assert "large.safetensors is of another size" in caplog.text
    assert all(torch.equal(value, load_file(student)[name]) for name, value in weights(roles.fake_score).items())
    before = weights(roles.teacher)
    trainer._student_backward(0, 0)
    for role, learns in ((roles.teacher, False), (roles.fake_score, False), (roles.student, True)):
        assert all((value.grad is not None) is learns for value in role.network.parameters())
    whole = train_here(recipe, tmp_path / "whole")
    train_here(replace(recipe, updates=1), tmp_path / "parts")
    assert largest_difference(whole, train_here(recipe, tmp_path / "parts")) == 0
    assert changed(before, roles.teacher) == set()
    caplog.clear()
    own = build_networks(replace(recipe, fake_score=str(fake)), torch.device("cpu"), None)
    assert all(torch.equal(value, load_file(fake)[name]) for name, value in weights(own.fake_score).items())
    assert "of another size" not in caplog.text


def test_a_larger_teacher_makes_trajectories(inputs, tmp_path):
    teacher = write_teacher(tmp_path / "large.safetensors", dim=256)
    files = {"teacher": str(teacher), "student": str(inputs / "teacher.safetensors"), "clips": str(tmp_path / "clips")}
    for rank in (0, 2):
        recipe = tiny_recipe(inputs, stage="ode", ode_clips=1, lora_rank=rank, **files)
        assert trainer_of(recipe, tmp_path / f"{rank}").update(0)["student_norm"] > 0


def test_a_teacher_of_another_size_is_refused_where_a_trained_network_starts_from_it(inputs, tmp_path):
    large, student = str(write_teacher(tmp_path / "large.safetensors", dim=256)), str(inputs / "teacher.safetensors")
    for changes in ({"teacher": large}, {"teacher": large, "student": student, "lora_rank": 2}):
        with pytest.raises(ValueError, match=r"large\.safetensors has dim 256 \(recipe: 128\).*Only a teacher may be"):
            build_networks(tiny_recipe(inputs, **changes), torch.device("cpu"), None)
    with pytest.raises(ValueError, match=r"large\.safetensors has dim 256"):
        build_networks(tiny_recipe(inputs, fake_score=large), torch.device("cpu"), None)
    with pytest.raises(ValueError, match="fake_score is 'x' and lora_rank 2"):
        tiny_recipe(inputs, fake_score="x", lora_rank=2)


def test_a_file_with_diffusers_names_is_read(tmp_path):
    weights, dims = wan_files.tiny_wan(), wan_files.DIMS
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({wan_files.diffusers_name(name): value for name, value in weights.items()}, path)
    expected = WanConfig(dim=dims.dim, ffn_dim=dims.ffn_dim, num_layers=dims.depth, text_dim=dims.text_dim)
    found = read_wan(str(path), expected).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("own_base", (False, True))
def test_adapters_train_on_a_base_that_stays(inputs, tmp_path, own_base):
    student = write_teacher(inputs / "distilled.safetensors", seed=3) if own_base else None
    recipe = tiny_recipe(inputs, lora_rank=2, student=str(student) if student else "")
    trainer = trainer_of(recipe, tmp_path)
    roles = trainer.networks
    assert (roles.student.network is roles.teacher.network) is not own_base
    base = read_wan(recipe.student_weights, recipe.model).state_dict()
    before = {name: value.clone() for name, value in roles.student.parameters().items()}
    trainer.update(0)
    state = roles.student.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    after = roles.student.parameters()
    # `down` moves only once `up` has left zero; weight decay and the first step move both here.
    assert {name for name in after if not torch.equal(after[name], before[name])} >= {
        name for name in after if name.endswith("up")
    }


def test_teacher_sees_no_adapter(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, lora_rank=2), tmp_path)
    roles = trainer.networks
    rollout, seeds = trainer.rollout(0, 0, "test", 0)
    x, sigma, _ = trainer.under_noise(rollout.clip(roles.student.network)[1], seeds)
    with torch.no_grad():
        before = trainer.score(roles.teacher, x, sigma, rollout.context)
        for update in range(2):
            with torch.enable_grad():
                trainer.update(update)
        assert torch.equal(trainer.score(roles.teacher, x, sigma, rollout.context), before)
        assert not torch.equal(trainer.score(roles.fake_score, x, sigma, rollout.context), before)


# ---------------------------------------------------------------------------------------------------------------
# Interruptions and ranks


def test_resume_equals_no_interruption_bit_for_bit(inputs, tmp_path):
    recipe = tiny_recipe(inputs, motion_form="head", regression_weight=0.1)
    whole = train_here(recipe, tmp_path / "whole")
    train_here(replace(recipe, updates=1), tmp_path / "parts")
    parts = train_here(recipe, tmp_path / "parts")
    assert largest_difference(whole, parts) == 0
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]


def test_a_run_keeps_its_newest_checkpoints_and_ends_with_one_and_with_samples(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "update", lambda trainer, update: {"dmd": 1.0})
    monkeypatch.setattr(train.Trainer, "sample", lambda trainer, count: (torch.zeros(count), ["a"] * count))
    sampled = []
    monkeypatch.setattr(train, "try_samples", lambda folder, *clips: sampled.append(folder.name))
    train_here(tiny_recipe(inputs, updates=7, save_every=2, keep=2, sample_every=3), tmp_path)
    assert [update for update, _ in run_folder.checkpoints(tmp_path)] == [6, 7]
    assert sampled == ["update_000003", "update_000006", "update_000007"]
    (tmp_path / "checkpoints" / "update_000008").mkdir()  # not complete: no run goes on from it
    assert run_folder.checkpoints(tmp_path)[-1][0] == 7


def test_the_log_of_a_resumed_run_has_every_update_once(tmp_path):
    lines = [json.dumps({"update": update}) for update in range(4)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"upda']))
    journal = run_folder.Log(tmp_path, 2)
    journal.write({"update": 2, "again": True})
    journal.close()
    updates = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert updates == [{"update": 0}, {"update": 1}, {"update": 2, "again": True}]


@pytest.fixture
def one_thread():
    """As the processes of these tests run: another number of threads adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kill_nine_and_resume(inputs, tmp_path, one_thread):
    recipe = tiny_recipe(inputs, updates=400)
    run = tmp_path / "run"
    process = start(command(recipe, run))
    deadline = time.monotonic() + TIMEOUT_S
    while len(run_folder.checkpoints(run)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    output = process.communicate()[0]
    killed_at = run_folder.checkpoints(run)[-1][0]
    assert 2 <= killed_at < 400, output
    (run / "checkpoints" / "update_000399.partial").mkdir()  # what a kill in the middle of a save leaves
    end = killed_at + 1
    resumed = train_here(replace(recipe, updates=end), run)
    assert not list((run / "checkpoints").glob("*.partial"))
    torch.manual_seed(123)  # the global state must not matter
    assert largest_difference(resumed, train_here(replace(recipe, updates=end), tmp_path / "whole")) == 0


@several_ranks
def test_two_ranks_equal_one_and_take_over_from_one(inputs, tmp_path):
    """Two gloo ranks under FSDP2: the same losses and weights, also from a checkpoint that one rank wrote."""
    # Long enough that rollouts end before their last step and samples are made between updates: parameters that stay
    # gathered behind a forward without gradient would then be old ones.
    recipe = tiny_recipe(inputs, micro_batch=2, updates=4, sample_every=1, sample_prompts=1)
    one = train_here(recipe, tmp_path / "one")
    train_here(replace(recipe, updates=1), tmp_path / "mixed")
    # A rank leaves without the interpreter's end, where gloo's threads may abort it.
    unended = changed_command(recipe, tmp_path / "two", "import atexit\natexit.register(os.abort)", ranks=2)
    runs = [start(unended), start(command(recipe, tmp_path / "mixed", ranks=2))]
    for process in runs:
        output = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 0, output
    for name in ("two", "mixed"):
        assert largest_difference(one, last_tensors(tmp_path / name)) < 1e-5
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for left, right in zip(*logs, strict=True):
        for key in ("fake_score", "dmd", "motion", "student_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-6)


@several_ranks
def test_two_ranks_train_adapters_and_motion_head_as_one_does(inputs, tmp_path):
    recipe = tiny_recipe(
        inputs, micro_batch=2, updates=1, lora_rank=2, motion_form="head", regression_weight=0.5, sample_every=1
    )
    one = train_here(recipe, tmp_path / "one")
    in_two = replace(recipe, activation_checkpointing=True)
    # bf16: a frozen bf16 base, float32 adapters and optimizer, bf16 gathers.
    in_bf16 = replace(in_two, precision="bf16")
    bf16 = changed_command(in_bf16, tmp_path / "bf16", BF16_TOO, ranks=2)
    runs = [start(command(in_two, tmp_path / "two", ranks=2)), start(bf16)]
    for process in runs:
        output = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 0, output
    assert largest_difference(one, last_tensors(tmp_path / "two")) < 1e-5
    rounded = last_tensors(tmp_path / "bf16")
    assert all(value.dtype == torch.float32 for value in rounded.values())
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "bf16")]
    for key in ("fake_score", "dmd", "motion"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=0.1)
        assert logs[0][key] != pytest.approx(logs[1][key], rel=1e-5), "it was rounded"
    clips = [load_file(tmp_path / name / "samples/update_000001/clip_0.latent") for name in ("one", "two")]
    torch.testing.assert_close(clips[0]["latent_tensor"], clips[1]["latent_tensor"], atol=1e-4, rtol=1e-4)


def test_a_nan_loss_stops_with_the_last_checkpoint_intact(inputs, tmp_path, capsys):
    recipe = tiny_recipe(inputs, learning_rate=1e30, updates=5)
    assert train.main([*flags(recipe), "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("stopped: update ") and (" is nan" in message or " is inf" in message)
    assert "the last checkpoint is" in message and "goes on" not in message
    found = run_folder.checkpoints(tmp_path)
    assert found and len(run_folder.load_whole(found[-1][1], "ema/")) > 10


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_full_disk_stops_with_the_last_checkpoint_intact(inputs, tmp_path):
    """A limit on file size stands for the full disk: writes fail with OSError in the middle of a checkpoint."""
    recipe = tiny_recipe(inputs, updates=1)
    complete = train_here(recipe, tmp_path)

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = start(command(replace(recipe, updates=3), tmp_path), preexec_fn=limit)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 1, output
    assert "could not be written" in output and "the same command goes on from" in output
    assert "update_000001" in output
    assert [update for update, _ in run_folder.checkpoints(tmp_path)] == [1]
    assert largest_difference(complete, last_tensors(tmp_path)) == 0
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def test_every_recipe_is_valid():
    assert set(RECIPES) == {"demo", "wan_1_3b", "wan_14b_lora", "long_video"}
    for name, make in RECIPES.items():
        assert make().name == name


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"stage": "x"}, "stage is 'x'; choose one of"),
        ({"steps": "4,x"}, "steps is '4,x'"),
        ({"batch": 5, "micro_batch": 2}, "no multiple of micro_batch"),
        ({"preset": "undistilled"}, "'undistilled', whose steps keep their noise"),
        ({"window": 2}, "window is 2"),
        ({"height": 5}, "6x4 fits"),
        ({"score_low": 0.9, "score_high": 0.5}, "score_low"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
        ({"cfg": float("nan")}, "cfg is nan; it must be a finite number"),
        ({"score_shift": float("inf")}, "score_shift is inf; it must be a finite number"),
        ({"dim": 100}, "dim is 100"),
        ({"frames": 1}, "at least 2"),
        ({"frames_per_chunk": 0, "stage": "long"}, "frames_per_chunk is 0; it must be at least 1"),
        ({"sink": -1}, "sink is -1; it must be 0 or more"),
        ({"stage": "long", "frames": 2}, "the first chunk (2) of a window that begins inside a video learns nothing"),
        ({"given_share": 0.5, "frames": 3}, "the losses need 2 more: at least 4"),
    ),
)
def test_bad_recipes_name_the_field(inputs, change, message):
    with pytest.raises(ValueError) as error:
        tiny_recipe(inputs, **change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"teacher": "missing.safetensors"}, "does not exist"),
        ({"ffn_dim": 64}, "ffn_dim 32 (recipe: 64)"),
        ({"num_layers": 1}, "num_layers 2 (recipe: 1)"),
        ({"stage": "forcing", "clips": "nowhere"}, "no clips-"),
    ),
)
def test_bad_input_stops_in_one_line_before_training(inputs, tmp_path, capsys, change, message):
    recipe = tiny_recipe(inputs, **change)
    assert train.main([*flags(recipe), "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert run_folder.checkpoints(tmp_path) == []


def test_bad_prompts_stop_before_training(inputs, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moves left\na purple whale sings\n")
    recipe = tiny_recipe(inputs, prompts=str(path))
    assert train.main([*flags(recipe), "--out", str(tmp_path / "run")]) == 1
    assert "line 2" in capsys.readouterr().err


def test_another_recipe_does_not_resume_a_run(inputs, tmp_path, capsys):
    recipe = tiny_recipe(inputs, updates=1)
    train_here(recipe, tmp_path)
    assert train.main([*flags(replace(recipe, learning_rate=1.0)), "--out", str(tmp_path)]) == 1
    assert "learning_rate was 0.001 and is 1.0" in capsys.readouterr().err
    moved = replace(recipe, teacher=f"elsewhere/{Path(recipe.teacher).name}")
    run_folder.settle_recipe(tmp_path, moved)  # the same files in another place are the same run


def test_another_file_under_the_same_name_does_not_resume_a_run(inputs, tmp_path, caplog):
    same = str(inputs / "teacher.safetensors")
    recipe = tiny_recipe(inputs, updates=1, student=same, fake_score=same)
    train_here(recipe, tmp_path)
    prompts = tmp_path / "other" / "prompts.txt"
    (tmp_path / "other").mkdir()
    other = write_teacher(tmp_path / "other" / "teacher.safetensors", seed=9)
    prompts.write_text(Path(recipe.prompts).read_text())
    run_folder.settle_recipe(tmp_path, replace(recipe, prompts=str(prompts)))
    for name in ("teacher", "student", "fake_score"):
        with pytest.raises(ValueError, match=rf"{name}.*holds something else than when the run began"):
            run_folder.settle_recipe(tmp_path, replace(recipe, **{name: str(other)}))
    prompts.write_text("a blue square moves up\n")
    with pytest.raises(ValueError, match=r"\(prompts\) holds something else"):
        run_folder.settle_recipe(tmp_path, replace(recipe, prompts=str(prompts)))
    assert "older run" not in caplog.text
    run_folder.write_json(tmp_path / "recipe.json", asdict(recipe))  # as runs began before
    run_folder.settle_recipe(tmp_path, replace(recipe, prompts=str(prompts)))
    assert "is of an older run and does not say what its files held" in caplog.text
    assert run_folder.read_beginning(tmp_path) == {}


def test_what_a_prompts_file_says_is_its_prompts_and_the_negatives_text(tmp_path):
    def digest(*lines: dict[str, str]) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return prompts_digest(path)

    usual = digest({"negative": "n"}, {"prompt": "a"}, {"prompt": "b"})
    assert usual == digest({"negative": "n", "key": "1"}, {"prompt": "a", "embedding": "s"}, {"prompt": "b"})
    others = [digest({"negative": "m"}, {"prompt": "a"}, {"prompt": "b"}), digest({"prompt": "a"}, {"prompt": "b"})]
    others += [digest({"negative": "n"}, {"prompt": "b"}, {"prompt": "a"}), digest([1], {"prompt": "b"})]
    assert len({usual, *others}) == 5


def test_an_unreadable_checkpoint_is_one_line_that_names_the_one_before(inputs, tmp_path, capsys):
    recipe = tiny_recipe(inputs, updates=2, fake_score_updates=1)
    expected = train_here(recipe, tmp_path)
    path = run_folder.checkpoints(tmp_path)[-1][1]
    file = next(path.glob("*.distcp"))
    spoils = (
        lambda: file.write_bytes(file.read_bytes()[:1000]),
        file.unlink,
        lambda: (path / ".metadata").write_bytes(b""),
    )
    trains = (train.main, [*flags(recipe), "--out", str(tmp_path)])
    exports = (export.main, ["--run", str(tmp_path), "--to", str(tmp_path / "x.safetensors")])
    for spoil, (program, arguments) in zip(spoils, (trains, exports, trains), strict=True):
        spoil()
        assert program(arguments) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped: ")]
        assert f"checkpoint {path} cannot be read: " in line
        assert "remove that folder to go on from update_000001" in line
    shutil.rmtree(path)
    assert largest_difference(train_here(recipe, tmp_path), expected) == 0


def test_a_first_start_that_failed_can_be_corrected(inputs, tmp_path, capsys):
    wrong = tiny_recipe(inputs, prompts="missing.txt", seed=3, updates=1)
    assert train.main([*flags(wrong), "--out", str(tmp_path)]) == 1
    assert "missing.txt" in capsys.readouterr().err
    train_here(tiny_recipe(inputs, updates=1), tmp_path)
    assert run_folder.read_recipe(tmp_path).seed == 0


def test_captions_of_a_corrected_seed_are_drawn_anew(tmp_path):
    (tmp_path / "prompts.txt").write_text("of seed 0\n")
    run_folder.settle_recipe(tmp_path, recipes.demo(seed=0))
    run_folder.settle_recipe(tmp_path, recipes.demo(seed=0, updates=9))
    assert (tmp_path / "prompts.txt").exists()
    run_folder.settle_recipe(tmp_path, recipes.demo(seed=1))
    assert not (tmp_path / "prompts.txt").exists()


def test_a_run_whose_output_goes_to_a_file_says_every_update(inputs, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train_here(tiny_recipe(inputs, updates=2), tmp_path)
    lines = [record.message for record in caplog.records if record.message.startswith("update ")]
    assert len(lines) == 2 and lines[1].startswith("update 2 of 2, ") and "dmd" in lines[1]


def test_doubtful_runs_are_told(monkeypatch):
    device = torch.device("cpu")
    none, empty, text = (PromptSet(("a",), 9, 4, list, row) for row in (None, torch.ones(1, 4), torch.ones(2, 4)))
    assert list(train.doubts(recipes.demo(), device, empty)) == []
    student, cpu = train.doubts(recipes.wan_1_3b(), device, text)
    assert "made causal by stage ode" in student and "no GPU here" in cpu
    student, cuda = recipes.wan_1_3b(student="x"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert list(train.doubts(student, cuda, text)) == [
        "1 of this machine's 8 GPUs are used; torchrun --nproc-per-node 8 uses all"
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert list(train.doubts(student, cuda, text)) == []
    (unlike,) = train.doubts(student, cuda, empty)
    assert "the negative prompt is empty" in unlike
    for recipe in (replace(student, cfg=1.0), replace(student, stage="forcing")):
        assert list(train.doubts(recipe, cuda, empty)) == list(train.doubts(recipe, cuda, none)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"height": 480, "width": 832}, "6656x3840 pixels, 81 pixel frames; give pixels / 8"),
        ({"frames": 81}, "832x480 pixels, 321 pixel frames"),
        ({"height": 90, "width": 160, "frames": 42}, None),
        ({"frames": 81, "dim": 128}, None),
    ),
)
def test_sizes_in_pixels_are_doubted(changes, said):
    prompts, cuda = PromptSet(("a",), 9, 4, list, None), torch.device("cuda")
    found = list(train.doubts(recipes.wan_1_3b(student="x", **changes), cuda, prompts))
    assert len(found) == (said is not None) and all(said in text for text in found)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({}, ()),
        ({"updates": 9, "steps": "3,2,2"}, ()),  # the last repeats
        ({"steps": "3"}, ("sigmas are 1, 0.933, 0.357, but the file was trained with 1, 0.933, 0.357; 1, 0.357",)),
        ({"shift": 3.0}, ("shift is set to 3.0, but the file was trained with 5.0", "sigmas are 1, ")),
        ({"context_mode": "clean"}, ("context_mode is set to clean, but the file was trained with renoise",)),
        ({"context_sigma": 0.5}, ("context_sigma is set to 0.5, but the file was trained with 0.2",)),
        ({"frames_per_chunk": 1}, ("frames_per_chunk is set to 1, but",)),
        ({"window": -1, "sink": 0}, ("window is set to -1, but", "sink is set to 0, but")),
        # Stage forcing asks for every noise level.
        ({"stage": "forcing", "steps": "1", "shift": 3.0, "context_mode": "noisy", "window": 5}, ("window is set",)),
    ),
)
@pytest.mark.parametrize("stage", ("ode", "distill", "long"))
def test_a_stage_that_trains_otherwise_than_its_student_was_trained_is_told(inputs, tmp_path, stage, changes, said):
    before = tiny_recipe(inputs, context_mode="renoise", context_sigma=0.2, frames=6)
    file, prompts, cuda = tmp_path / "s.safetensors", PromptSet(("a",), 9, 4, list, None), torch.device("cuda")
    weights = {"x": torch.zeros(1)}
    recipe = replace(before, **{"stage": stage, "student": str(file), **changes})
    save_file(weights, file, export.header_of(before, 1, whole=True))
    found = list(train.doubts(recipe, cuda, prompts))
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert f"--student s.safetensors: {part}" in sentence
    # An undistilled one is made a few-step student by this stage.
    save_file(weights, file, export.header_of(replace(before, stage="forcing"), 1, whole=True))
    about = ("frames_per_chunk", "window", "sink")
    assert len(list(train.doubts(recipe, cuda, prompts))) == sum(name in changes for name in about)
    save_file(weights, file)
    assert list(train.doubts(recipe, cuda, prompts)) == []


@pytest.mark.parametrize("stage", recipes.STAGES)
def test_a_context_of_almost_pure_noise_is_doubted_where_the_student_trains_with_it(stage):
    prompts, device = PromptSet(("a",), 9, 4, list, None), torch.device("cpu")
    found = list(train.doubts(recipes.demo(stage=stage, steps="4,1"), device, prompts))
    if stage in ("teacher", "forcing"):  # neither reads the steps
        assert found == []
    else:
        (noise,) = found
        assert "ends at sigma 1.000 with noisy context" in noise
    assert list(train.doubts(recipes.demo(stage=stage), device, prompts)) == []


def test_more_processes_than_gpus_are_one_line(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    assert train.main([*flags(tiny_recipe(inputs)), "--out", str(tmp_path)]) == 1
    assert "8 processes were started on this machine, which has 2 GPUs" in capsys.readouterr().err


def test_several_ranks_on_gpus_without_nccl_are_one_line(inputs, tmp_path, capsys, monkeypatch):
    """As torch is on Windows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert train.main([*flags(tiny_recipe(inputs)), "--out", str(tmp_path)]) == 1
    assert "several ranks on GPUs need NCCL" in capsys.readouterr().err


def test_a_sample_that_cannot_be_written_does_not_end_the_run(inputs, tmp_path, caplog):
    (tmp_path / "samples").write_text("a file where the folder should be")
    train_here(tiny_recipe(inputs, updates=1, sample_every=1), tmp_path)
    assert "no sample clips" in caplog.text


def test_whoever_may_read_a_samples_prompts_may_read_its_clips(tmp_path):
    write_samples(tmp_path / "s", torch.zeros(2, 16, 1, 2, 2), ["a", "b"], "")
    clips = [tmp_path / "s" / f"clip_{index}.latent" for index in range(2)]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [*(path.name for path in clips), "prompts.txt"]
    assert {path.stat().st_mode for path in clips} == {(tmp_path / "s" / "prompts.txt").stat().st_mode}
    assert load_file(clips[0])["latent_tensor"].shape == (1, 16, 1, 2, 2)


def test_samples_of_stage_long_are_long(inputs, tmp_path):
    trainer = trainer_of(tiny_recipe(inputs, stage="long", micro_batch=2, frames=4), tmp_path)
    clips, captions = trainer.sample(3)
    assert clips.shape == (3, 16, 8, 4, 4) and len(captions) == 3


def test_stages_load_only_the_networks_they_need(inputs, tmp_path):
    clips = str(tmp_path / "clips")
    ode = trainer_of(tiny_recipe(inputs, stage="ode", clips=clips, updates=1), tmp_path / "ode").networks
    forcing = trainer_of(tiny_recipe(inputs, stage="forcing", clips=clips, updates=1), tmp_path / "forcing").networks
    assert ode.teacher is not None and ode.fake_score is None
    assert forcing.teacher is None and forcing.fake_score is None
    unguided = trainer_of(tiny_recipe(inputs, cfg=1.0), tmp_path / "unguided")
    assert unguided.negative is None, "there need not be a negative prompt"
    adapters = {"stage": "forcing", "lora_rank": 2, "student": str(inputs / "teacher.safetensors")}
    alone = build_networks(tiny_recipe(inputs, teacher="nowhere", **adapters), torch.device("cpu"), None)
    assert (alone.student.adapter, alone.teacher, alone.fake_score) == ("student", None, None)


@pytest.mark.parametrize("stage", ("ode", "forcing"))
def test_samples_are_made_as_the_export_says(inputs, tmp_path, monkeypatch, stage):
    clips = str(tmp_path / "clips")
    ode = trainer_of(tiny_recipe(inputs, stage="ode", clips=clips), tmp_path / "ode")
    trainer = ode if stage == "ode" else trainer_of(replace(ode.recipe, stage=stage), tmp_path / stage)
    seen, guided = [], []

    def watched(*args, cfg, negative, **more):
        seen.append(args[3])
        guided.append(cfg)
        return stream(*args, cfg=cfg, negative=negative, **more)

    monkeypatch.setattr(train, "stream", watched)
    trainer.sample(1)
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata=export.header_of(trainer.recipe, 1, whole=True))
    assert [replace(schedule, shift=5.0) for schedule in seen] == [demo_files.trained_for(file).schedule]
    assert seen[0].fresh_noise is (stage == "ode")
    assert guided == [1.0 if stage == "ode" else trainer.recipe.cfg]
    if stage == "forcing":
        prompts = replace(trainer.prompts, negative_row=None)
        train.Trainer(trainer.recipe, prompts, tmp_path, trainer.ranks).sample(1)
        assert guided[1:] == [1.0], "nothing to guide away from"


def test_the_readme_lists_every_flag_with_its_default():
    lines = (Path(train.__file__).parent / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| --")]
    rows = {row[1]: row[2] for row in cells}
    for name, item in Recipe.__dataclass_fields__.items():
        if name != "name":
            assert rows[f"--{name.replace('_', '-')}"] == str(item.default), name


def test_the_readme_lists_what_the_recipes_set():
    lines = (Path(train.__file__).parent / "README.md").read_text().splitlines()
    start = next(row for row, line in enumerate(lines) if line.startswith("| field | demo |"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:]]
    rows = {row[0].strip("`"): row[1:] for row in cells[2 : cells.index([])]}
    made = [RECIPES[name]() for name in cells[0][1:]]
    assert {recipe.name for recipe in made} == set(RECIPES)
    for name, item in Recipe.__dataclass_fields__.items():
        if name != "name":
            values = ["" if getattr(recipe, name) == item.default else str(getattr(recipe, name)) for recipe in made]
            shown = [Path(value).name if str(recipes.DEMO) in value else value for value in values]
            assert shown == rows.get(name, [""] * len(made)), name


def test_flags_are_the_recipes_fields(inputs, tmp_path):
    recipe = tiny_recipe(inputs, activation_checkpointing=True)
    found, options = train.parse_arguments([*flags(recipe), "--out", str(tmp_path), "--threads", "3"])
    assert (found, options.out, options.threads, options.seconds) == (recipe, tmp_path, 3, None)
    assert train.main(["--recipe", "demo", "--out", str(tmp_path), "--compile", "perhaps"]) == 1


def test_only_the_demo_has_a_teacher_stage(tmp_path, capsys):
    assert train.main(["--recipe", "wan_1_3b", "--stage", "teacher", "--out", str(tmp_path)]) == 1
    assert "published one" in capsys.readouterr().err


def test_the_teacher_stage_takes_threads_and_seconds_and_refuses_what_it_would_drop(tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(train_demo, "main", told.append)
    plain = ["--recipe", "demo", "--stage", "teacher", "--out", str(tmp_path)]
    threads = str(torch.get_num_threads())
    assert train.main([*plain, "--threads", threads, "--seconds", "7"]) == 0
    assert told == [["--stage", "all", "--out", str(tmp_path), "--threads", threads, "--seconds", "7.0"]]
    assert train.main([*plain, "--updates", "5", "--seed", "3"]) == 1
    assert "which --seed, --updates would not change" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(plain) == 1
    assert "torchrun started 2" in capsys.readouterr().err and len(told) == 1


def test_save_every_0_writes_no_checkpoint_and_the_log_says_where_the_time_went(inputs, tmp_path):
    ranks = join_ranks()
    train.run(tiny_recipe(inputs, updates=1, save_every=0), tmp_path, ranks)
    assert not run_folder.checkpoints(tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    parts = [line[name] for name in ("rollout_seconds", "fake_score_seconds", "student_seconds")]
    assert min(parts) > 0
    assert 0.1 * line["seconds"] < sum(parts) <= line["seconds"]


def test_a_run_whose_time_is_up_ends_after_the_update_and_goes_on_later(inputs, tmp_path):
    asked = []
    ranks = join_ranks()
    recipe = tiny_recipe(inputs, save_every=50)
    train.run(recipe, tmp_path, ranks, time_is_up=lambda: asked.append(None) or len(asked) == 2)
    assert [update for update, _ in run_folder.checkpoints(tmp_path)] == [2]
    train.run(recipe, tmp_path, ranks)
    assert [update for update, _ in run_folder.checkpoints(tmp_path)] == [2, 3]


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(inputs, tmp_path, monkeypatch):
    """By a signal or after --seconds: after the update, with a checkpoint that no save_every asked for."""
    update, done = train.Trainer.update, []

    def signalled(trainer, number):
        done.append(number)
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(trainer, number)

    arguments = [*flags(tiny_recipe(inputs, save_every=50, updates=4)), "--out", str(tmp_path)]
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", signalled)
        assert train.main(arguments) == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert done == [0, 1] and [number for number, _ in run_folder.checkpoints(tmp_path)] == [2]
    assert train.main([*arguments, "--seconds", "0.001"]) == 0
    assert [number for number, _ in run_folder.checkpoints(tmp_path)] == [2, 3]
    assert train.main([*arguments, "--seconds", "1000"]) == 0
    assert [number for number, _ in run_folder.checkpoints(tmp_path)] == [2, 3, 4]


def test_a_run_that_is_told_to_stop_while_it_makes_trajectories_goes_on_later(inputs, tmp_path, caplog, monkeypatch):
    """By a signal or after --seconds: after a file, with status 0 and no update."""
    write, made = trajectories.write_weights, []

    def signalled(*arguments) -> None:
        write(*arguments)
        made.append(arguments[0].name)
        if len(made) == 2:
            signal.raise_signal(signal.SIGTERM)

    recipe = tiny_recipe(inputs, stage="ode", updates=1, ode_clips=7, micro_batch=2)
    arguments = [*flags(recipe), "--out", str(tmp_path / "run")]
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    monkeypatch.setattr(trajectories, "write_weights", signalled)
    caplog.set_level(logging.INFO)
    assert train.main(arguments) == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert len(made) == 2 and caplog.messages[-1] == "4 of 7 trajectories; the same command goes on"
    assert train.main([*arguments, "--seconds", "0.001"]) == 0
    assert len(made) == 3 and caplog.messages[-1] == "6 of 7 trajectories; the same command goes on"
    assert run_folder.checkpoints(tmp_path / "run") == []
    assert train.main(arguments) == 0
    assert len(made) == 4 and [number for number, _ in run_folder.checkpoints(tmp_path / "run")] == [1]


@several_ranks
def test_a_signal_to_one_rank_ends_the_making_of_trajectories_on_all(inputs, tmp_path):
    told = (
        "from distillation import trajectories\n"
        "made, usual = [], trajectories.trajectories\n"
        "def stop(*arguments):\n"
        "    made.append(1)\n"
        "    if len(made) == 2 and dist.get_rank() == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return usual(*arguments)\n"
        "trajectories.trajectories = stop"
    )
    recipe = tiny_recipe(inputs, stage="ode", updates=1, ode_clips=7, micro_batch=1)
    process = start(changed_command(recipe, tmp_path / "run", told, ranks=2))
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0 and "4 of 7 trajectories; the same command goes on" in output, output
    assert len(list((tmp_path / "run" / "clips").iterdir())) == 4
    train_here(recipe, tmp_path / "run")


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_second_signal_acts_as_it_usually_does(signum):
    came = []
    before = signal.signal(signum, lambda number, frame: came.append(number))
    try:
        with train.stop_signals() as told:
            assert not told()
            for _ in range(2):
                signal.raise_signal(signum)
            assert told() and came == [signum]
    finally:
        signal.signal(signum, before)


@several_ranks
def test_a_signal_to_one_rank_ends_all_and_a_rank_that_fails_waits_for_none(inputs, tmp_path):
    """A process group that never ends stands for NCCL's, which waits in its end for ranks that wait elsewhere."""
    usual = "update = train.Trainer.update\n"
    told = (
        usual + "def stop(trainer, number):\n"
        "    if number == 1 and trainer.ranks.rank == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return update(trainer, number)\n"
        "train.Trainer.update = stop"
    )
    fails = (
        usual + "def fail(trainer, number):\n"
        "    if number == 1 and trainer.ranks.rank == 1: raise RuntimeError('rank 1 fails')\n"
        "    return update(trainer, number)\n"
        "train.Trainer.update = fail\n"
        "dist.destroy_process_group = lambda: time.sleep(10**6)"
    )
    recipe = tiny_recipe(inputs, micro_batch=2, updates=4, save_every=50, fake_score_updates=1)
    told_to = start(changed_command(recipe, tmp_path / "told", told, ranks=2))
    failing = start(changed_command(recipe, tmp_path / "failing", fails, ranks=2))
    output = told_to.communicate(timeout=TIMEOUT_S)[0]
    assert told_to.returncode == 0, output
    assert [number for number, _ in run_folder.checkpoints(tmp_path / "told")] == [2]
    try:
        output = failing.communicate(timeout=TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        failing.terminate()
        pytest.fail(f"it hangs: {failing.communicate()[0]}")
    assert failing.returncode != 0 and "RuntimeError: rank 1 fails" in output


@several_ranks
def test_two_ranks_train_with_compiled_blocks(inputs, tmp_path):
    """FSDP's hooks and checkpointing around a block that is compiled, by a backend that needs no compiler."""
    teacher = write_teacher(tmp_path / "teacher.safetensors", num_layers=1)
    recipe = tiny_recipe(
        inputs, teacher=str(teacher), num_layers=1, micro_batch=2, updates=1, fake_score_updates=1, steps="1"
    )
    train_here(recipe, tmp_path / "one")
    eager = f"{BF16_TOO}\nusual = nn.Module.compile\n"
    eager += "nn.Module.compile = lambda module: usual(module, backend='aot_eager')"
    compiled = replace(recipe, compile=True, activation_checkpointing=True, precision="bf16")
    process = start(changed_command(compiled, tmp_path / "two", eager, ranks=2))
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0, output
    left, right = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two"))
    for key in ("fake_score", "dmd", "motion"):
        assert left[key] == pytest.approx(right[key], rel=0.1)


def test_ranks_that_see_other_files_all_stop(monkeypatch):
    require_same("clips", 3)  # alone
    seen = [3, 3]

    def gather(found: list, value: int) -> None:
        found[:] = [value, *seen[1:]]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    require_same("clips", 3)
    seen[1] = 4
    with pytest.raises(ValueError, match="the ranks found different clips: 3, 4; .* see the same files"):
        require_same("clips", 3)


def test_a_message_says_whether_the_same_command_would_go_on(inputs, tmp_path, capsys, monkeypatch):
    arguments = [*flags(tiny_recipe(inputs, updates=1)), "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    kinds = (
        (OSError("no"), 1, "goes on from"),
        (KeyboardInterrupt(), 130, "goes on from"),
        (ValueError("no"), 1, "is"),
    )
    for error, status, said in kinds:

        def fail(*args, error=error) -> None:
            raise error

        monkeypatch.setattr(train, "train", fail)
        capsys.readouterr()
        assert train.main(arguments) == status
        assert f"{said} {tmp_path}" in capsys.readouterr().err


def test_tensorboard_drops_what_a_resumed_run_repeats(tmp_path, monkeypatch):
    made = []
    fake = SimpleNamespace(SummaryWriter=lambda path, purge_step: made.append((path, purge_step)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    train.tensorboard(tmp_path, 7)
    assert made == [(str(tmp_path / "tensorboard"), 7)]


def test_tensorboard_has_every_number_of_the_log(inputs, tmp_path, monkeypatch):
    told: dict[str, float] = {}
    board = SimpleNamespace(add_scalar=lambda name, value, update: told.update({name: value}), close=lambda: None)
    monkeypatch.setattr(train, "tensorboard", lambda folder, first: board)
    train_here(tiny_recipe(inputs, updates=1, tensorboard=True), tmp_path)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line.pop("update") == 0 and {"seconds", "rollout_seconds"} <= line.keys()
    assert told == {f"distill/{name}": value for name, value in line.items()}


def test_an_export_says_how_it_was_trained_and_at_which_commit(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "git_commit", lambda: "of the start")
    recipe = tiny_recipe(inputs, updates=1, student=str(inputs / "teacher.safetensors"), cfg=2.5)
    train_here(recipe, tmp_path / "run")
    monkeypatch.setattr(export, "git_commit", lambda: "of the export")

    def header() -> dict[str, str]:
        export.export(tmp_path / "run", tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", "pt") as file:
            return file.metadata()

    found = header()
    assert found["git_commit"] == "of the start" and found["cfg"] == "1"
    assert found["data"] == "prompts prompts.txt; teacher teacher.safetensors; student teacher.safetensors"
    listed = found["recipe"].split("changed: ")[1]
    assert "--cfg 2.5" in listed and "--steps 3,2" in listed and "--learning-rate 0.001" in listed
    assert not {"--updates", "--keep", "--stage", "--teacher", "--name", "--seed"} & set(listed.split())
    plain = export.header_of(recipes.wan_1_3b(student="a/s", fake_score="a/f"), 1, whole=True)
    assert "changed" not in plain["recipe"] and "context_sigma" not in plain
    assert plain["data"].endswith("; student s; fake_score f")
    run_folder.write_json(tmp_path / "run" / "recipe.json", asdict(recipe))  # as runs began before
    assert header()["git_commit"] == "unknown; exported at of the export"


def test_an_earlier_checkpoint_is_exported_by_its_update(inputs, tmp_path, capsys):
    run, target = tmp_path / "run", tmp_path / "x.safetensors"
    train_here(tiny_recipe(inputs, updates=3, keep=2), run)
    arguments = ["--run", str(run), "--to", str(target), "--dtype", "float32", "--update"]
    assert export.main([*arguments, "1"]) == 1
    assert f"update is 1, of which {run} has no checkpoint; it has those of 2, 3" in capsys.readouterr().err
    assert export.main([*arguments, "2"]) == 0
    ema = run_folder.load_whole(run / "checkpoints" / "update_000002", "ema/")
    found = load_file(target)
    assert found.keys() == ema.keys() and all(torch.equal(found[name], value) for name, value in ema.items())
    with safe_open(target, "pt") as file:
        assert ", 2 updates of" in file.metadata()["recipe"]


@pytest.mark.parametrize("own_base", (False, True))
def test_adapters_are_merged_with_the_weights_they_were_trained_on_alone(inputs, tmp_path, capsys, own_base):
    run, base = tmp_path / "run", write_teacher(tmp_path / "base.safetensors", seed=9)
    files = {"student": str(base)} if own_base else {"teacher": str(base)}
    train_here(tiny_recipe(inputs, updates=1, lora_rank=2, **files), run)
    before = base.read_bytes()
    for merge in ([], ["--merge"]):
        assert export.main(["--run", str(run), "--to", str(base), *merge]) == 1
        assert f"to is {str(base)!r}, which the run was trained from" in capsys.readouterr().err
    assert base.read_bytes() == before
    merged = ["--run", str(run), "--merge", "--to", str(tmp_path / "x.safetensors")]
    assert export.main(merged) == 0
    write_teacher(base, seed=8)
    assert export.main(merged) == 1
    (name,) = files
    assert f"({name}) holds something else than when the run began" in capsys.readouterr().err
    assert export.main(["--run", str(run), "--to", str(tmp_path / "lora.safetensors")]) == 0  # reads no base
    base.write_bytes(before)
    assert export.main(merged) == 0


@pytest.mark.parametrize("code", (5, 1224))
def test_an_export_onto_a_file_in_use_says_what_to_do(inputs, tmp_path, monkeypatch, capsys, code):
    """As on Windows, where ComfyUI has mapped what it loaded."""
    run, target = tmp_path / "run", tmp_path / "x.safetensors"
    train_here(tiny_recipe(inputs, updates=1), run)

    def refused(*arguments) -> None:
        error = OSError(22, "in use")
        error.winerror = code
        raise error

    monkeypatch.setattr(export, "write_weights", refused)
    command_line = ["--run", str(run), "--to", str(target)]
    assert export.main(command_line) == 1
    assert "unload it" not in capsys.readouterr().err, "there is no file that could be in use"
    target.touch()
    assert export.main(command_line) == 1
    assert "unload it there or stop ComfyUI; or choose another name" in capsys.readouterr().err


def test_an_export_is_sampled_with_the_context_it_was_trained_for(tmp_path):
    recipe = recipes.demo(context_mode="renoise", context_sigma=0.8)
    header = export.header_of(recipe, 1, whole=True)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=header)
    assert demo_files.trained_for(tmp_path / "x.safetensors").schedule == recipe.schedule
    del header["context_sigma"]  # as files were written before
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=header)
    assert demo_files.trained_for(tmp_path / "x.safetensors").schedule == replace(
        recipe.schedule, context_sigma=DEFAULT_CONTEXT_SIGMA
    )


def test_a_student_of_stage_forcing_is_no_few_step_model(tmp_path):
    found = export.header_of(recipes.wan_1_3b(stage="forcing", clips="real", shift=3.0), 10, whole=True)
    assert (found["steps_per_chunk"], found["context_mode"], found["shift"]) == ("12", "clean", "3.0")
    assert "cfg" not in found and found["noise"] == "kept" and found["data"].endswith("; clips real")
    distilled = export.header_of(recipes.wan_1_3b(), 10, whole=True)
    assert distilled["steps_per_chunk"] == "4,3,2" and distilled["cfg"] == "1" and "noise" not in distilled
