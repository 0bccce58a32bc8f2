"""Checkpoints of a run: what was written is read, and what a stranger wrote runs nothing."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from distillation import run_folder

TENSORS = {
    "student/a": torch.arange(6.0).view(2, 3),
    "student/b": torch.arange(4).to(torch.bfloat16),
    "step/a": torch.tensor(7.0),
    "student/c": torch.tensor([1, 2]),
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    run_folder.save(tmp_path, 1, TENSORS, 3)
    return run_folder.checkpoints(tmp_path)[-1][1]


class Payload:
    """Makes a file when it is unpickled by something careless."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_checkpoint_is_read_back(checkpoint):
    whole = run_folder.load_whole(checkpoint, "student/")
    assert whole.keys() == {"a", "b", "c"}
    assert all(torch.equal(value, TENSORS[f"student/{name}"]) for name, value in whole.items())
    into = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    run_folder.load(checkpoint, into)
    assert all(torch.equal(value, TENSORS[name]) for name, value in into.items())


@pytest.mark.parametrize("inside", [False, True])
def test_metadata_that_would_run_code_are_refused(checkpoint, tmp_path, inside):
    file, target = checkpoint / ".metadata", tmp_path / "owned"
    found = pickle.loads(file.read_bytes())
    found.planner_data = Payload(target)
    file.write_bytes(pickle.dumps(found if inside else Payload(target)))
    words = r"cannot be read: ValueError: its .metadata hold '\w+.open', which .*; nothing of it was run"
    with pytest.raises(ValueError, match=words):
        run_folder.load_whole(checkpoint, "")
    with pytest.raises(ValueError, match=words):
        run_folder.load(checkpoint, {name: value.clone() for name, value in TENSORS.items()})
    assert not target.exists()
    pickle.loads(file.read_bytes())  # the payload is live
    assert target.exists()


def test_a_checkpoint_of_other_objects_than_tensors_is_refused(checkpoint):
    """torch would unpickle them whatever they are."""
    file = checkpoint / ".metadata"
    found = pickle.loads(file.read_bytes())
    found.state_dict_metadata["student/a"] = BytesStorageMetadata()
    file.write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        run_folder.load_whole(checkpoint, "")
