"""What a run leaves on disk: its recipe, its checkpoints, its log. Nothing is ever half written under its final name.

RUN/recipe.json                  the recipe, the commit it began with and what its files held, written once; a
                                 resumed run must agree with it
RUN/checkpoints/update_000150/   torch.distributed.checkpoint, renamed from *.partial when complete
RUN/log.jsonl                    one line an update
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from diagonal_sampler.disk import replace_file
from diagonal_sampler.weight_files import short
from distillation.common import git_commit, write_text
from distillation.prompts import prompts_digest
from distillation.ranks import barrier, is_main
from distillation.recipes import Recipe

log = logging.getLogger("run_folder")

# A resumed run may change these: none of them changes what an update computes (micro_batch: but for rounding), except
# in a cooldown, which is decided on when a run is good enough to be ended.
FREE_FIELDS = frozenset(
    {
        "updates",
        "cooldown",
        "save_every",
        "keep",
        "sample_every",
        "sample_prompts",
        "tensorboard",
        "micro_batch",
        "compile",
        "activation_checkpointing",
        "autoencoder",
    }  # fmt: skip
)
# Of these only the name counts, and what some of them hold (`input_digests`): a run may move with its files.
FILE_FIELDS = frozenset(("teacher", "student", "fake_score", "prompts", "text_encoder", "clips"))
BEGAN = "began"
"""Entry of recipe.json beside the recipe's fields: `git_commit`, and `files` by field, `clips` among them."""
_SAMPLE, _SAMPLES = 1 << 16, 16  # bytes of a weight file that are looked at, and at how many places
_NAME = re.compile(r"^update_(\d{6,})$")
_ADAMW = ("exp_avg", "exp_avg_sq")
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": frozenset(
        ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
        + ("StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    "torch.distributed.checkpoint.filesystem": frozenset(("_StorageInfo",)),
    "torch": frozenset(("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)))),
    "torch.serialization": frozenset(("_get_layout",)),
    "pathlib": frozenset(_PATHS),
    "pathlib._local": frozenset(_PATHS),  # of Python 3.13
}
"""Module -> names of it that the metadata of a checkpoint of tensors hold. BytesStorageMetadata would be of other
objects, which torch unpickles whatever they are."""


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes a JSON file, which is never half there; `indent` None is one line."""
    write_text(path, json.dumps(value, indent=indent))


CLIP_FILES = "clips-*.safetensors"
SPRITE_PROMPTS = "prompts.txt"
"""A run's own captions of the demo world."""


def input_digests(recipe: Recipe) -> dict[str, str]:
    """What the recipe's files hold, in 16 hex digits each by field, wherever they lie; missing ones have none.

    Prompts by their texts. Weights by their size and a sample of their bytes, the header among them: 14B are not read
    whole at every start.

    Raises:
        ValueError: a prompts file that is no text.
    """
    found = {}
    for name in ("teacher", "student", "fake_score", "text_encoder"):
        if (path := Path(getattr(recipe, name))).is_file():
            found[name] = _weights_digest(path)
    if (path := Path(recipe.prompts)).is_file():
        found["prompts"] = prompts_digest(path)
    return found


def _weights_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(size * place // _SAMPLES)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def other_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Fields of `input_digests` whose files are known from both times and hold something else now."""
    return [name for name, digest in now.items() if before.get(name, digest) != digest]


def clips_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the clips of the run in `folder` are."""
    return Path(recipe.clips) if recipe.clips else folder / "clips"


def _clips_digest(folder: Path, recipe: Recipe) -> dict[str, str]:
    """Which clips stage forcing draws from, by their files' names and sizes; nothing of other stages or without any."""
    paths = sorted(clips_folder(folder, recipe).glob(CLIP_FILES)) if recipe.stage == "forcing" else []
    sizes = [(path.name, path.stat().st_size) for path in paths]
    return {"clips": hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]} if sizes else {}


def require_same_file(folder: Path, recipe: Recipe, name: str) -> None:
    """Checks that a field's file holds what it held when the run in `folder` began, as far as both are known.

    Raises:
        ValueError: it holds something else.
    """
    now = {field: digest for field, digest in input_digests(recipe).items() if field == name}
    if other_files(read_beginning(folder).get("files", {}), now):
        raise ValueError(f"{folder}: {_holds_else(recipe, name)}; put that file back in its place.")


def _holds_else(recipe: Recipe, name: str) -> str:
    if name == "clips":
        return "the clips are other files, or of other sizes, than when the run began"
    return f"the file {getattr(recipe, name)!r} ({name}) holds something else than when the run began"


def settle_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes the recipe of a new run, or compares it with the one the run began with.

    A run without a checkpoint has nothing to lose: what its first start got wrong may be corrected.

    Raises:
        ValueError: a field that decides what is computed has another value than before, or a file holds something
            else.
    """
    path, files = folder / "recipe.json", input_digests(recipe) | _clips_digest(folder, recipe)

    def write() -> None:
        write_json(path, {**asdict(recipe), BEGAN: {"git_commit": git_commit(), "files": files}})

    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write()
        return
    before, began = read_recipe(folder), read_beginning(folder)
    differences = [
        f"{name} was {getattr(before, name)!r} and is {value!r}"
        for name, value in asdict(recipe).items()
        if name not in FREE_FIELDS and not _same(name, value, getattr(before, name))
    ]
    differences += [_holds_else(recipe, name) for name in other_files(began.get("files", {}), files)]
    if not checkpoints(folder):
        if differences:
            (folder / SPRITE_PROMPTS).unlink(missing_ok=True)  # of another seed
        write()
    elif differences:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(differences)}. Choose another --out, or the same values to resume."
        )
    elif not began:
        log.warning("%s is of an older run and does not say what its files held; they are taken for the same", path)


def _same(name: str, value: Any, before: Any) -> bool:
    return value == before or (name in FILE_FIELDS and file_name(value) == file_name(before))


def file_name(path: str) -> str:
    """The name of a recipe's file, of which the recipe may have been written on another system."""
    return PureWindowsPath(path).name  # takes either slash


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        ValueError: no run there, or a recipe that cannot be read.
    """
    stated = _read(folder)
    stated.pop(BEGAN, None)
    try:
        return Recipe(**stated)
    except TypeError as error:
        raise _no_recipe(folder, error) from None


def read_beginning(folder: Path) -> dict[str, Any]:
    """`git_commit` and `files` of a run's first start; empty for a run of a time that did not keep them.

    Raises:
        ValueError: as `read_recipe`.
    """
    return _read(folder).get(BEGAN, {})


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "recipe.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise _no_recipe(folder, error) from None


def _no_recipe(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder / 'recipe.json'} is not a run's recipe ({error}); name the folder given to --out.")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in (folder / "checkpoints").glob("update_*"):
        if (match := _NAME.match(path.name)) and (path / ".metadata").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save(folder: Path, update: int, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Writes a checkpoint from all ranks, renames it when it is complete, and drops old ones.

    Raises:
        OSError: the disk is full or not writable; checkpoints that were complete stay as they are.
    """
    final = folder / "checkpoints" / f"update_{update:06d}"
    partial = final.with_suffix(".partial")
    if is_main():
        for left in (folder / "checkpoints").glob("update_*.partial"):  # of a run that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    barrier()
    try:
        with _one_process_is_meant():
            dcp.save(dict(tensors), checkpoint_id=partial, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        reason = _root(error)
        raise OSError(
            f"checkpoint {final.name} could not be written: {reason}; older checkpoints are intact."
        ) from None
    if is_main():
        if final.exists():
            shutil.rmtree(final)
        replace_file(partial, final)
        for _, old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """DCP warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _root(error: BaseException) -> str:
    """The sentence of the error that began it all: DCP wraps each rank's."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a checkpoint into the given tensors, in place, whatever number of ranks wrote it.

    Raises:
        ValueError: tensors that are missing, or that have another shape; files that cannot be read, of which the
            tensors may have changed in part.
    """
    stored = _stored(path)
    for name, tensor in tensors.items():
        shape = getattr(stored.get(name), "size", None)
        if shape is None or tuple(shape) != tuple(tensor.shape):
            raise ValueError(
                f"{path} has {name} of shape {None if shape is None else tuple(shape)}, the run needs "
                f"{tuple(tensor.shape)}; it belongs to another recipe."
            )
    with _reading(path):
        dcp.load(dict(tensors), storage_reader=TensorReader(path), no_dist=not dist.is_initialized())


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the objects of `_IN_METADATA` and no others, so that a stranger's checkpoint runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _IN_METADATA.get(module, ()):
            raise ValueError(
                f"its .metadata hold {short(f'{module}.{name}')}, which those of tensors do not; nothing of it was run"
            )
        # The folder's name, written as a path of the system and the Python that it was saved with.
        return _PATHS[name] if name in _PATHS else super().find_class(module, name)


class TensorReader(dcp.FileSystemReader):
    """Reads a checkpoint that holds nothing but tensors, as every run's does.

    torch's own unpickles whatever `.metadata` are, or those of a rank, which this never reads.
    """

    def read_metadata(self) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            ValueError: they hold anything that metadata of tensors do not.
            OSError, pickle.UnpicklingError, EOFError and others: they are missing or damaged.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        # Not what they say of where they were written: a run may have moved, or come from another system.
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """ValueError with the remedy for a checkpoint that cannot be read."""
    try:
        with _one_process_is_meant():
            yield
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        others = [other.name for _, other in checkpoints(path.parents[1])]
        older = others[: others.index(path.name)] if path.name in others else []
        instead = f"go on from {older[-1]}" if older else "begin anew"
        raise ValueError(
            f"checkpoint {path} cannot be read: {_root(error)}; if it stays so, remove that folder to {instead}."
        ) from None


def _stored(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors as its metadata describe them, by name; ValueError if they cannot be read."""
    with _reading(path):
        return TensorReader(path).read_metadata().state_dict_metadata


def load_whole(path: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint whose name begins with `prefix`, gathered, without it. Needs one process only.

    Raises:
        ValueError: files that cannot be read.
    """
    stored = _stored(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and hasattr(entry, "size")
    }
    with _reading(path):
        dcp.load(dict(tensors), storage_reader=TensorReader(path), no_dist=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter name; they are made if the optimizer has not run yet."""
    out = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            # Where AdamW itself would put it: the fused step reads it on the device.
            device = parameter.device if optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in _ADAMW:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        out[f"step/{name}"] = state["step"]
        out.update({f"{moment}/{name}": state[moment] for moment in _ADAMW})
    return out


class Log:
    """One JSON line an update; lines of updates that a resumed run will repeat are cut off first."""

    def __init__(self, folder: Path, update: int) -> None:
        self.path = folder / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _update_of(line) < update]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        self.file = self.path.open("a", buffering=1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends one line."""
        self.file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self.file.close()


def _update_of(line: str) -> float:
    """The update of a log line; a line cut by a crash counts as beyond all."""
    try:
        return json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
