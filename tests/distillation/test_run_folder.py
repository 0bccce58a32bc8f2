"""Checkpoints of a run: what was written is read, and what a stranger wrote runs nothing."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from distillation import recipes, run_folder

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


@pytest.mark.parametrize("module", (b"pathlib", b"pathlib._local"))
@pytest.mark.parametrize("kind", (b"PosixPath", b"WindowsPath"))
def test_a_checkpoint_of_another_system_or_python_is_read(checkpoint, module, kind):
    """What it says of its folder is a path that this Python cannot make, and it is dropped."""
    file = checkpoint / ".metadata"
    text = pickle.dumps(pickle.loads(file.read_bytes()), 2)  # names are lines in this protocol
    text, places = re.subn(rb"cpathlib(\._local)?\n\w+Path\n", b"c" + module + b"\n" + kind + b"\n", text)
    assert places == 1
    file.write_bytes(text)
    whole = run_folder.load_whole(checkpoint, "student/")
    assert all(torch.equal(value, TENSORS[f"student/{name}"]) for name, value in whole.items())
    run_folder.load(checkpoint, {name: torch.zeros_like(value) for name, value in TENSORS.items()})
    assert run_folder.TensorReader(checkpoint).read_metadata().storage_meta.checkpoint_id is None


def test_a_run_that_was_moved_to_another_system_knows_its_files(tmp_path):
    recipe = recipes.demo(teacher=r"C:\models\teacher.safetensors")
    run_folder.settle_recipe(tmp_path, recipe)
    run_folder.save(tmp_path, 1, TENSORS, 3)
    run_folder.settle_recipe(tmp_path, replace(recipe, teacher="models/teacher.safetensors"))
    with pytest.raises(ValueError, match="teacher was"):
        run_folder.settle_recipe(tmp_path, replace(recipe, teacher=r"C:\models\another.safetensors"))


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
