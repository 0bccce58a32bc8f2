"""The trainer on CUDA: an update of toy size equals the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import make_inputs, tiny_recipe, trainer_of

from distillation import run_folder, train
from distillation.ranks import Ranks

TOLERANCE = 1e-3
"""Relative, of losses and gradient norms: other kernels sum in another order."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def trainer_on(device: str, folder: Path, inputs: Path, **changes) -> train.Trainer:
    return trainer_of(tiny_recipe(inputs, **changes), folder, Ranks(0, 1, torch.device(device), None))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_two_updates_equal_the_cpus(changes, inputs, tmp_path, exact_float32):
    """The second update's losses follow from the first one's steps."""
    wanted, got = (trainer_on(device, tmp_path / device, inputs, **changes) for device in ("cpu", "cuda"))
    for update in range(2):
        left, right = wanted.update(update), got.update(update)
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), (update, name)
    assert got.stopwatch.take().keys() == {"rollout_seconds", "fake_score_seconds", "student_seconds"}


def test_bf16_trains_and_its_state_is_read_back(inputs, tmp_path):
    trainer = trainer_on("cuda", tmp_path / "run", inputs, precision="bf16", activation_checkpointing=True)
    first = trainer.update(0)
    run_folder.save(tmp_path / "run", 1, trainer.tensors(), 1)
    wanted = trainer.update(1)
    other = trainer_on("cuda", tmp_path / "other", inputs, precision="bf16", activation_checkpointing=True)
    run_folder.load(run_folder.checkpoints(tmp_path / "run")[-1][1], other.tensors())
    got = other.update(1)
    assert first.keys() == wanted.keys()
    for name, value in wanted.items():  # the fused step has its counts and moments from the file
        assert got[name] == pytest.approx(value, rel=0.02), name
