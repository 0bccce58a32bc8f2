"""The teacher's fine-tune on optical flow: exact resume, honest batches, and a file that says what was done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import same

from diagonal_sampler.captions import tokenize_captions
from diagonal_sampler.provenance import Provenance
from diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS
from distillation import demo_files, demo_run, sprites, train_demo, train_flow
from distillation.flow_evaluate import Player
from distillation.recipes import DEMO
from distillation.train_flow import FlowRecipe, encode_flow_clips, export_flow, flow_batch

CPU = torch.device("cpu")
TINY = FlowRecipe(updates=4, clips=6, length=37, batch=3, kept_batch=2, warmup=1, save_every=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_flow.train_flow(TINY, DEMO, folder, CPU)
    return folder


def test_two_updates_resumed_for_two_more_equal_four(run, tmp_path):
    train_flow.train_flow(TINY, DEMO, tmp_path, CPU, stop=2)
    path = train_flow.train_flow(TINY, DEMO, tmp_path, CPU)
    assert same(demo_run.load_checkpoint(path), demo_run.load_checkpoint(run / train_flow.CHECKPOINT))


def test_checkpoints_are_written_when_they_are_due(run, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(demo_run.Training, "save", lambda training, update: saved.append(update))
    recipe = replace(TINY, save_every=3)
    train_flow.train_flow(recipe, DEMO, tmp_path, CPU, clips=run / train_flow.CLIPS)
    assert saved == [3, 4]


def test_a_run_that_would_never_save_is_refused():
    with pytest.raises(ValueError, match="save_every is 0"):
        replace(TINY, save_every=0)


def test_the_export_is_the_teacher_with_an_adapter_and_says_so(run, tmp_path):
    file = export_flow(run, DEMO, tmp_path, "note")
    weights, before = load_file(file), load_file(DEMO / demo_files.TEACHER_FILE)
    assert weights.keys() == before.keys() | set(FLOW_ADAPTER_KEYS)
    assert all(weights[key].abs().max() > 0 for key in FLOW_ADAPTER_KEYS)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    with safe_open(DEMO / demo_files.TEACHER_FILE, framework="pt") as opened:
        shipped = opened.metadata()
    assert header["recipe"].startswith(shipped["recipe"])
    assert "train_flow --network teacher, seed 4, 4 updates" in header["recipe"] and header["recipe"].endswith(". note")
    assert Provenance.from_metadata(header, file.name).sigmas == Provenance.from_metadata(shipped, file.name).sigmas
    assert Player(DEMO, file).modes == ("none", "reference", "noise", "adapter", "adapter+blend")


def test_a_fresh_adapter_leaves_a_network_as_it_is():
    before, encoder, _ = demo_files.load_models(DEMO, DEMO / demo_files.STUDENT_FILE)
    with_adapter = train_flow.with_adapter(before).eval()
    x, text = (
        torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        encoder.encode(["a red circle moves left"]),
    )
    flow = torch.ones(1, 4, 3, 8, 8)
    with torch.no_grad():
        expected = before(x, torch.tensor([900.0]), text)
        assert torch.equal(with_adapter(x, torch.tensor([900.0]), text, optical_flow=flow), expected)


def test_batches_depend_on_seed_and_update_and_are_of_three_kinds(run):
    _, _, autoencoder = demo_files.load_models(DEMO)
    data = encode_flow_clips(TINY, autoencoder, run / train_flow.CLIPS)
    trained = demo_files.trained_for(DEMO / demo_files.TEACHER_FILE)
    assert data.clips.shape == (6, 16, 10, 8, 8) and data.flow.shape == (6, 4, 10, 8, 8)
    seen = set()
    for update in range(60):
        batch = flow_batch(TINY, data, trained, update)
        assert torch.equal(batch.noisy, flow_batch(TINY, data, trained, update).noisy)
        assert not torch.equal(batch.ids, flow_batch(TINY, data, trained, update, kept=True).ids)
        frames = batch.noisy.shape[2]
        seen.add(frames)
        assert batch.optical_flow.shape[2] == frames and batch.weight.any()
        if frames == 6:  # a continuation: the first chunk is given
            assert not batch.weight[:, :3].any() and (batch.sigma[:, :3] <= 0.4).all()
        # noisy = clean + sigma * (noise - clean), so the target leads to the clip.
        clean = batch.noisy - batch.sigma[:, None, :, None, None] * batch.target
        places = clean[:, 14:].amax((0, 2)) - clean[:, 14:].amin((0, 2))
        assert places.max() < 1e-2, "the two channels of the place do not depend on the clip"
    assert seen == {3, 6, 9}


def test_the_teachers_kept_batches_are_those_it_was_trained_on(run, tmp_path):
    """Of clips that go as their captions say, without flow; a run on them resumes as any other."""
    recipe = replace(TINY, kept_clips=20, kept_batch=4, updates=2)
    own = train_flow.kept_recipe(recipe)
    assert (own.clips, own.later_clips, own.continuation_batch, own.opening_batch) == (20, 20, 4, 8)
    begun = train_flow.train_flow(recipe, DEMO, tmp_path / "a", CPU, clips=run / train_flow.CLIPS)
    train_flow.train_flow(recipe, DEMO, tmp_path / "b", CPU, clips=run / train_flow.CLIPS, stop=1)
    again = train_flow.train_flow(recipe, DEMO, tmp_path / "b", CPU, clips=run / train_flow.CLIPS)
    assert same(demo_run.load_checkpoint(begun), demo_run.load_checkpoint(again))
    data = train_demo.LatentSet(**demo_run.load_checkpoint(tmp_path / "a" / train_flow.KEPT_CLIPS))
    assert torch.equal(data.ids, tokenize_captions(sprites.sample_scenes(20, recipe.seed).captions))
    for update in range(6):
        batch, usual = train_flow.own_batch(own, data, update), train_demo.dit_batch(own, data, update)
        assert batch.optical_flow is None and torch.equal(batch.target, usual.flow)
        assert torch.equal(batch.noisy, usual.noisy) and (batch.window, batch.sink) == (usual.window, usual.sink)


def test_kept_clips_are_refused_for_a_student():
    with pytest.raises(ValueError, match="kept_clips are for the teacher"):
        train_flow.student_recipe(kept_clips=8)


def test_a_students_batches_are_at_its_own_noise_levels(run):
    _, _, autoencoder = demo_files.load_models(DEMO)
    data = encode_flow_clips(TINY, autoencoder, run / train_flow.CLIPS)
    trained = demo_files.trained_for(DEMO / demo_files.STUDENT_FILE)
    recipe = train_flow.student_recipe(clips=6, batch=8)
    known = {round(sigma, 4) for row in trained.schedule.sigmas for sigma in row}
    for update in range(12):
        batch = flow_batch(recipe, data, trained, update)
        assert {round(sigma, 4) for sigma in batch.sigma.flatten().tolist()} <= known
        if batch.sigma.shape[1] == 6:
            assert (batch.sigma[:, 0] == min(trained.schedule.chunk_sigmas(1))).all(), (
                "context as the sampler leaves it"
            )


def test_what_one_network_learned_is_added_to_another():
    files = (demo_files.STUDENT_FILE, demo_files.FOLLOWER_FILE, demo_files.TEACHER_FILE)
    old, new, teacher = (demo_files.load_dit(DEMO / file) for file in files)
    changed = train_flow.with_adapter(teacher)
    train_flow.add_change(changed, old, new)
    for name, value in changed.state_dict().items():
        learned = new.state_dict()[name] - old.state_dict().get(name, torch.zeros_like(value))
        torch.testing.assert_close(value - teacher.state_dict()[name], learned, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="has no adapter"):
        train_flow.add_change(changed, old, old)
    with pytest.raises(ValueError, match="Give as BEFORE its weights of before it had an adapter"):
        train_flow.add_change(train_flow.with_adapter(old), new, new)


def test_the_student_is_trained_and_written_as_the_student(tmp_path):
    recipe = train_flow.student_recipe(updates=2, clips=6, length=37, batch=3, kept_batch=2, warmup=1)
    learned = (DEMO / demo_files.STUDENT_FILE, DEMO / demo_files.FOLLOWER_FILE)
    train_flow.train_flow(recipe, DEMO, tmp_path, CPU, network="student", learned=learned)
    file = export_flow(tmp_path, DEMO, tmp_path / "to", network="student")
    player = Player(DEMO, file)
    assert [len(row) for row in player.trained.schedule.sigmas] == [4, 3, 2] and player.trained.cfg == 1
    assert "adapter" in player.modes


def test_a_run_that_is_not_there_and_a_start_that_is_missing_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"holds no flow\.pt"):
        export_flow(tmp_path, DEMO, tmp_path / "to")
    with pytest.raises(SystemExit):
        train_flow.main(["--out", str(tmp_path)])
    assert "required: --start" in capsys.readouterr().err
