"""The student's training in its own rollouts: what it sees is what the sampler saw, and a run resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import same

from diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS
from distillation import demo_files, demo_run, sprite_motion, sprites, train_flow, train_follow
from distillation.common import autocast, generator_at
from distillation.flow_evaluate import Player
from distillation.recipes import DEMO
from distillation.train_follow import FollowRecipe
from distillation.windows import Sampling, States, Windows, window_error

CPU = torch.device("cpu")
STUDENT = DEMO / demo_files.STUDENT_FILE
CHUNKS = 7
TINY = FollowRecipe(
    updates=2, clips=4, pool=2, pool_updates=1, batch=2, kept_clips=3, kept_batch=2, warmup=1, save_every=1
)


@pytest.fixture(scope="module")
def parts():
    _, encoder, autoencoder = demo_files.load_models(DEMO)
    return demo_files.load_dit(STUDENT), encoder, autoencoder, demo_files.trained_for(STUDENT)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_follow.train_follow(TINY, DEMO, folder, CPU)
    return folder


@pytest.fixture(scope="module")
def kept(parts) -> States:
    dit, encoder, _, trained = parts
    return train_follow.kept_states(TINY, dit, encoder, trained, CPU)


def test_one_causal_forward_answers_as_the_samplers_cache_did(parts, kept):
    dit, encoder, _, trained = parts
    dit = train_flow.with_adapter(dit).eval()
    sampling = Sampling(trained, CHUNKS, CPU)
    seen = set()
    for draw in range(4):
        windows = sampling.draw(kept, 3, generator_at(0, draw))
        with torch.no_grad(), autocast(torch.device("cpu")):
            error = window_error(dit, encoder(windows.ids), windows, sampling.size)
        error = error / windows.weight.clamp(min=1e-6)
        late = (windows.chunk[:, -1] > 3)[:, None].expand_as(error)
        asked = windows.weight > 0
        assert float(error[asked & ~late].sum()) < 2e-2
        if (asked & late).any():
            # Its context's keys were made when that saw more: not the same, but near.
            assert float(error[asked & late].mean()) < 2e-2
        seen |= set(windows.sigma.unique().tolist())
        assert (windows.weight[windows.sigma == 1] <= 1).all() and windows.weight.any()
    assert {1.0} < seen


def test_late_chunks_are_asked_at_the_positions_that_their_rollout_had(parts, kept):
    """Of 81 frames, which the sampler counts from their start: so rolled out the error would be 0.007, not 0.0016."""
    dit, encoder, _, trained = parts
    windows = Sampling(trained, CHUNKS, CPU).draw(kept, 32, generator_at(0, 5), since=CHUNKS - 3)
    with torch.no_grad(), autocast(CPU):
        error = window_error(dit, encoder(windows.ids), windows, 3)
    assert float(error.sum() / windows.weight.sum()) < 3e-3


def test_a_window_that_lies_late_begins_with_the_first_chunk(parts, kept):
    sampling = Sampling(parts[3], CHUNKS, CPU)
    windows = sampling.draw(kept, 64, generator_at(0, 9))
    for chunks in windows.chunk.tolist():
        assert chunks == [0, 1, 2, 3] or (chunks[0] == 0 and chunks[1:] == list(range(chunks[1], chunks[1] + 3)))
    assert {chunks[-1] for chunks in windows.chunk.tolist()} == {3, 4, 5, 6}


def test_rollouts_go_on_from_true_chunks_and_are_trained_towards_the_clip(parts, tmp_path):
    dit, encoder, autoencoder, trained = parts
    dit = train_flow.with_adapter(dit)
    data = train_flow.encode_flow_clips(TINY, autoencoder, tmp_path / "clips.pt")
    states = train_follow.followed_states(TINY, dit, encoder, trained, data, 0)
    # The last input of the first chunk is the true one with noise, at the schedule's last level.
    sigma = trained.schedule.chunk_sigmas(0)[-1]
    noise = (states.inputs[:, 0, 3] - (1 - sigma) * states.wanted[:, 0, 0]) / sigma
    assert abs(float(noise.std()) - 1) < 0.05
    sampling = Sampling(trained, CHUNKS, CPU)
    windows = train_follow.followed_windows(sampling, states, replace(TINY, batch=64), generator_at(0, 1))
    opening = windows.weight[:, :3][(windows.sigma[:, :3] > train_follow.OPENING_SIGMA)]
    assert not opening.any(), "no clip says what an opening shows"
    assert windows.weight[:, 3:].any()


def test_some_openings_are_told_a_flow_and_stay(parts, kept):
    sampling = Sampling(parts[3], CHUNKS, CPU)
    flow = torch.ones(5, 4, 21, 8, 8)
    recipe = replace(TINY, kept_batch=64, led_share=0.5)
    windows = train_follow.kept_windows(sampling, kept, recipe, generator_at(0, 2), flow)
    led = windows.optical_flow.flatten(1).abs().amax(1) > 0
    assert 0.2 < float(led.float().mean()) < 0.8
    assert not windows.weight[led][:, 3:].any() and windows.weight[~led][:, 3:].any()
    assert isinstance(windows.with_(windows), Windows) and len(windows.with_(windows).noisy) == 128


def test_a_resumed_run_is_the_run_that_was_not_stopped(run, tmp_path):
    train_follow.train_follow(TINY, DEMO, tmp_path, CPU, stop=1)
    path = train_follow.train_follow(TINY, DEMO, tmp_path, CPU)
    found = demo_run.load_checkpoint(path)
    assert found["update"] == 2 and same(found, demo_run.load_checkpoint(run / train_follow.CHECKPOINT))


def test_what_is_written_is_the_student_with_an_adapter(run, tmp_path):
    train_follow.main(
        ["--start", str(DEMO), "--out", str(run), "--export", str(tmp_path), "--note", "note", "--threads", "1"]
    )
    file = tmp_path / demo_files.STUDENT_FILE
    assert set(FLOW_ADAPTER_KEYS) <= load_file(file).keys()
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert "distillation.train_follow, seed 6, 2 updates" in header["recipe"] and header["recipe"].endswith(". note")
    player = Player(DEMO, file)
    assert [len(row) for row in player.trained.schedule.sigmas] == [4, 3, 2] and "adapter" in player.modes


def test_the_adapter_can_be_written_stronger(run, tmp_path):
    files = []
    for strength in (1, 1.5):
        folder = tmp_path / f"{strength}"
        flags = ["--start", str(DEMO), "--out", str(run), "--export", str(folder), "--strength", f"{strength}"]
        assert train_follow.main([*flags, "--threads", "1"]) == 0
        files.append(folder / demo_files.STUDENT_FILE)
    plain, strong = map(load_file, files)
    for name, tensor in plain.items():
        factor = 1.5 if name in FLOW_ADAPTER_KEYS else 1.0
        torch.testing.assert_close(strong[name].float(), factor * tensor.float(), rtol=2e-3, atol=1e-6)
    assert any(plain[name].any() for name in FLOW_ADAPTER_KEYS)
    with safe_open(files[1], framework="pt") as opened:
        assert opened.metadata()["recipe"].endswith(", adapter times 1.5")


def test_seconds_end_a_run(tmp_path):
    path = train_follow.train_follow(replace(TINY, updates=1000), DEMO, tmp_path, CPU, seconds=0.0)
    assert demo_run.load_checkpoint(path)["update"] == 0


def test_features_of_many_clips_are_those_of_each_ones_field():
    scenes = sprites.sample_scenes(12, seed=5)
    told = sprite_motion.commands(scenes, 5, frames=33)
    found = sprite_motion.features(told, scenes, 9, 8, 8)
    expected = sprite_motion.command(scenes, 5, frames=33).features(9)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(set(told.kind.tolist())) > 2


def test_processes_think_out_the_same_clips(parts, tmp_path):
    alone = train_flow.encode_flow_clips(TINY, parts[2], tmp_path / "a.pt")
    shared = train_flow.encode_flow_clips(TINY, parts[2], tmp_path / "b.pt", workers=1)
    assert all(torch.equal(getattr(alone, name), getattr(shared, name)) for name in ("clips", "flow", "ids"))


def test_a_network_with_clean_context_is_refused():
    with pytest.raises(ValueError, match="sampled with clean context"):
        Sampling(demo_files.trained_for(DEMO / demo_files.TEACHER_FILE), CHUNKS, CPU)
    for save_every in (50, 0):
        with pytest.raises(ValueError, match="must be pool_updates or a multiple of it"):
            FollowRecipe(save_every=save_every, pool_updates=8)
