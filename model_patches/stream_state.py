"""The state file of a stream: all that a later run of the same graph needs to go on, and how it knows that it may.

The file is replaced atomically and only after the video's own bytes are on the disk, so that a crash or a power cut
leaves a state and a video that goes at least as far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import numbers
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..diagonal_sampler.disk import sync_path, try_lock, whole_file
from ..diagonal_sampler.safetensors_header import read_header
from ..diagonal_sampler.settings import KV_CACHE_DTYPES, lasting_fields
from ..diagonal_sampler.weight_files import write_weights
from .video_containers import VideoWriteError, way_out

log = logging.getLogger(__name__)

STATE_SUFFIX = ".state.safetensors"
"""Of a video that is not finished."""
DONE_SUFFIX = ".done.safetensors"
"""Of a finished video whose state was kept, to make it longer."""
PROMPTS_SUFFIX = ".prompts.json"
"""Of the prompts that an unfinished video was given while it was made: a state would be large for a line of text."""
LOCK_SUFFIX = ".lock"
LOCK_ATTEMPTS, LOCK_WAIT_S = 4, 0.05
_FORMAT = "diagonal-stream-1"
_HEADER_KEY = "stream"
_ENDED_KEY = "ended"
_NOT_ENDED, _ENDED = (f'"{_ENDED_KEY}":"{value}"'.encode() for value in (0, 1))  # as safetensors writes the header
HEADER_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
WHOLE_TENSOR_ELEMENTS = 1 << 22
"""Larger tensors, and weights of any size, are told apart by a sample of their values."""
SAMPLE_ELEMENTS = 64
INPUTS_ADDED_LATER = {
    ("DiagonalModelLoader", "kv_cache_dtype"): KV_CACHE_DTYPES[0],
    ("DiagonalCausalAttention", "kv_cache_dtype"): KV_CACHE_DTYPES[0],
    ("DiagonalStreamVideo", "write_context"): True,
    ("DiagonalStreamVideo", "denoise"): 0.3,
}
"""Inputs that a node got later, and their defaults: ComfyUI's page puts those into every graph that it queues."""
_COUNTS = dict(length=1, latent_frames=1) | dict.fromkeys(
    ("chunk", "committed", "frames", "size", "forwards", "dropped", "moved", "begun"), 0
)
"""The whole numbers in a state, and the least of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """A stream after some whole chunks; the tensors are beside it in the file.

    After the last chunk these are the last frames alone: what is left to do is to encode them as context.

    Attributes:
        digest: of everything that decides the result, except the length.
        parts: the digests of its parts, by name, to tell what another run changed.
        length: pixel frames that the video was to have.
        latent_frames: latent frames of the whole clip then.
        chunk: chunks made.
        committed: latent frames made, context included; 0 at the start, where there are no tensors.
        frames: pixel frames in the video.
        size: bytes of the video, 0 for a folder of images.
        forwards: forwards made.
        dropped, moved, begun: the KV cache's.
        live: prompts that came while it was made (prompts.LivePrompt, as mappings).
        run: seed, schedule and settings, for people who open the file.
        ended: a person ended the video early (mark_ended), and may not mean to go on.
    """

    digest: str
    length: int
    latent_frames: int
    chunk: int = 0
    committed: int = 0
    frames: int = 0
    size: int = 0
    forwards: int = 0
    dropped: int = 0
    moved: int | None = None  # states of older packs do not say
    begun: int = 0
    live: Sequence[Mapping[str, Any]] = ()
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ended: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every chunk is made."""
        return self.committed == self.latent_frames


def save_state(path: Path, state: StreamState, tensors: Mapping[str, Tensor]) -> None:
    """Replace the state file at once, on the disk. The video must be there already (VideoWriter.settle).

    Raises:
        VideoWriteError: it cannot be written; the state before stays.
    """
    values = dataclasses.asdict(state)
    # Apart from the others: it is changed in place, and older packs refuse a value that they do not know among them.
    ended = str(int(values.pop("ended")))
    header = {"format": _FORMAT, _HEADER_KEY: json.dumps(values), _ENDED_KEY: ended}
    try:
        write_weights(path, tensors, header)
        sync_path(path.parent)
    except (OSError, SafetensorError) as error:
        raise VideoWriteError(
            f"The state {path.name} cannot be written: {error}. The video and the state before are kept; "
            f"{way_out(error, path.name)}, then queue the same graph again: it goes on from that state, or begins a "
            "new video where there was none yet."
        ) from error


def mark_ended(path: Path) -> None:
    """Note in a state file that a person ended its video early: one byte in place, for the file may be large.

    A state of an older pack has no place for it and stays as it is. Raises OSError.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        at = file.read(length).find(_NOT_ENDED)
        if at >= 0:
            file.seek(HEADER_LENGTH_BYTES + at)
            file.write(_ENDED)


def save_prompts(path: Path, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Replace the list of live prompts at once, on the disk. A full disk is said and does not end the run."""
    try:
        with whole_file(path) as part:
            part.write_text(json.dumps(prompts), encoding="utf-8")
        sync_path(path.parent)
    except OSError as error:
        log.warning("%s cannot be written (%s): a resumed run may not know the newest prompt.", path.name, error)


def read_prompts(path: Path) -> list[dict[str, Any]] | None:
    """What `save_prompts` wrote; None where there is nothing, or nothing that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("The prompts %s cannot be read (%r); those in the state are used.", path.name, error)
        return None


def read_state(path: Path) -> StreamState | None:
    """The state without its tensors; None for a file that holds none, or one whose values are not of their kinds."""
    try:
        metadata = read_header(path).metadata
        if metadata.get("format") != _FORMAT:
            return None
        state = StreamState(**json.loads(metadata[_HEADER_KEY]), ended=metadata.get(_ENDED_KEY) == "1")
        _check(state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        # %r: the text of an error may quote what no console can show.
        log.warning("The stream state %s cannot be read (%r); it is left alone.", path.name, error)
        return None
    return state


def _check(state: StreamState) -> None:
    """Raise ValueError for values that `save_state` does not write: people edit files, or bring other people's."""
    for name, least in _COUNTS.items():
        count = getattr(state, name)
        if not (type(count) is int and count >= least) and (name, count) != ("moved", None):
            raise ValueError(f"{name} is no whole number from {least} on")
    if not (isinstance(state.digest, str) and isinstance(state.run, dict)):
        raise ValueError("digest is no text, or run no mapping")
    if not (isinstance(state.parts, dict) and all(isinstance(digest, str) for digest in state.parts.values())):
        raise ValueError("parts is no mapping of digests")
    if not (isinstance(state.live, list) and all(isinstance(prompt, dict) for prompt in state.live)):
        raise ValueError("live is no list of prompts")
    if not state.chunk and (state.committed or state.frames or state.size):
        raise ValueError("it has frames and no chunk")


def load_tensors(path: Path, prefix: str, *needed: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it; on the CPU.

    Raises:
        VideoWriteError: they cannot be read, or one of those that are `needed` is not there.
    """
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    # RuntimeError: torch cannot map the file. Windows counts the mapping against the memory that programs may have.
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        raise VideoWriteError(
            f"The state {path.name} cannot be read: {str(error) or type(error).__name__}. It and the video are kept. "
            "Reading takes as much memory as the file is large: close other programs, or enlarge Windows' paging file, "
            "then queue the same graph again. Or set restart, to begin a new video."
        ) from error
    if missing := sorted(set(needed) - tensors.keys()):
        raise lacks(path, prefix + missing[0])
    return tensors


def lacks(path: Path, name: str) -> VideoWriteError:
    """The error of a state without one of its tensors."""
    return VideoWriteError(
        f"The state {path.name} lacks {name}: it is not as it was written. The video is kept; set restart to begin a "
        "new one."
    )


def can_be_said(name: str) -> bool:
    """Whether a name can be logged and sent: half a surrogate pair, or what is no UTF-8 on the disk, cannot."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def find_states(folder: Path) -> list[tuple[Path, StreamState]]:
    """The states in a folder, newest first."""
    found = []
    for path in folder.iterdir():
        if path.name.endswith((STATE_SUFFIX, DONE_SUFFIX)) and can_be_said(path.name):
            state = read_state(path)
            with contextlib.suppress(OSError):  # another ComfyUI may finish a video meanwhile
                if state is not None:
                    found.append((path.stat().st_mtime_ns, path, state))
    return [(path, state) for _, path, state in sorted(found, key=lambda item: item[0], reverse=True)]


class StreamLock:
    """Held while a process writes a stream: two servers may share an output folder. A dead process holds none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Whether it is ours now. Raises OSError where the folder cannot be written."""
        for attempt in range(LOCK_ATTEMPTS):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_free = try_lock(handle)
            except OSError as error:
                log.debug("%s: this file system has no locks: %s", self.path.name, error)
                is_free = True
            if not is_free:
                os.close(handle)
                if attempt + 1 < LOCK_ATTEMPTS:
                    time.sleep(LOCK_WAIT_S)  # somebody may only look (is_held)
                continue
            # Who held it may have removed the file, and another may have a new one by now. At the last attempt the lock
            # counts: a file system may give one file other numbers each time.
            if _is_at(self.path, handle) or attempt + 1 == LOCK_ATTEMPTS:
                self._handle = handle
                return True
            os.close(handle)
        return False

    def is_held(self) -> bool:
        """Whether some process holds it; nothing is left behind."""
        try:
            handle = os.open(self.path, os.O_RDWR)
        except OSError:
            return False
        try:
            return not try_lock(handle)
        except OSError:
            return False
        finally:
            os.close(handle)

    def release(self) -> None:
        if self._handle is None:
            return
        if os.name == "nt":  # open files cannot be removed there
            os.close(self._handle)
        with contextlib.suppress(OSError):
            self.path.unlink()
        if os.name != "nt":
            os.close(self._handle)
        self._handle = None


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def digest_of(**parts: Any) -> str:
    """One digest of values of any kind; the same in every process.

    Text, numbers, lists, mappings, dataclasses and tensors count with their contents, up to a limit for tensors;
    a ModelPatcher with its weights; a function with its name; anything else with its type only.
    """
    hasher = hashlib.sha256()
    _feed(hasher, parts)
    return hasher.hexdigest()


def digest_of_whole(tensor: Tensor) -> str:
    """Of every value of a tensor of any size, a slice at a time."""
    hasher = hashlib.sha256()
    for part in tensor.detach().flatten(1).split(1):
        _feed_tensor(hasher, part, sample=False)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    def put(*words: object) -> None:
        hasher.update("\0".join(map(str, words)).encode("utf-8", "surrogatepass") + b"\1")

    if value is None or isinstance(value, (bool, str, bytes, numbers.Number)):
        put(type(value).__name__, repr(value))
    elif isinstance(value, Tensor):
        _feed_tensor(hasher, value, sample=value.numel() > WHOLE_TENSOR_ELEMENTS)
    elif isinstance(value, ModelPatcher):
        _feed_model(hasher, value)
    elif isinstance(value, Mapping):
        put("mapping", len(value))
        for key in sorted(value, key=str):
            put(key)
            _feed(hasher, value[key])
    elif isinstance(value, (Sequence, set, frozenset)):
        put("list", len(value))
        for item in sorted(value, key=str) if isinstance(value, (set, frozenset)) else value:
            _feed(hasher, item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        put(type(value).__qualname__)
        for name, part in lasting_fields(value).items():
            put(name)
            _feed(hasher, part)
    elif isinstance(value, type) or hasattr(value, "__qualname__"):
        put("name", value.__qualname__)
    else:
        put("type", type(value).__qualname__)
        # A LoRA or another weight adapter of ComfyUI's: its tensors.
        if isinstance(weights := getattr(value, "weights", None), (tuple, list)):
            _feed(hasher, weights)


def _feed_tensor(hasher: Any, tensor: Tensor, *, sample: bool) -> None:
    hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    try:
        flat = tensor.detach().reshape(-1)
        if sample:
            flat = flat[:: max(1, len(flat) // SAMPLE_ELEMENTS)]
        hasher.update(flat.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        # Quantised tensors of other packs have no values to look at; their name, type and shape must do.
        log.debug("A %s counts by its shape only: %s", type(tensor).__name__, error)


def _feed_model(hasher: Any, patcher: ModelPatcher) -> None:
    """The weights as they were loaded (a sample of each), what is patched onto them, and the options."""
    model = patcher.model
    hasher.update(f"{type(model).__qualname__}{getattr(model, 'manual_cast_dtype', None)}".encode())
    lasting = _lasting_dtypes(model)
    for name, tensor in sorted(model.state_dict().items()):
        # ComfyUI keeps the unpatched weight here while a patched one is in use.
        backup = patcher.backup.get(name)
        hasher.update(name.replace("_orig_mod.", "").encode())
        tensor = tensor if backup is None else backup.weight
        _feed_tensor(hasher, tensor.to(lasting[name]) if name in lasting else tensor, sample=True)
    _feed(hasher, patcher.patches)
    _feed(hasher, patcher.model_options)


def _lasting_dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """The parameters that ComfyUI's DynamicVRAM casts at the first load, for good, and to what; by name.

    Those of a module that has others with parameters inside, such as Wan's modulation: until that load they have the
    file's dtype, and afterwards, also in later runs, the model's (ModelPatcher._load_list). Other weights it casts
    beside what was loaded.
    """
    dtypes = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and len(own) < sum(1 for _ in module.parameters()):
            for name in own:
                dtype = getattr(module, f"{name}_comfy_model_dtype", None)
                if dtype is not None:
                    dtypes[f"{path}.{name}" if path else name] = dtype
    return dtypes


def graph_digest(prompt: Mapping[str, Any] | None, node: str | None, inputs: Sequence[str]) -> str:
    """Of the nodes that feed some inputs of a node, and all of theirs.

    Node numbers and titles do not count, nor does an input that was added later where it has its default: what an older
    pack left unfinished goes on.

    Args:
        prompt: an API graph; None gives an empty digest.
    """
    if not prompt or node not in prompt:
        return ""
    known: dict[str, str] = {}

    def of_node(identity: str) -> str:
        if identity not in known:
            known[identity] = ""  # a loop is no graph, but it must not hang
            entry = prompt[identity]
            kind = entry.get("class_type")
            values = {
                name: of_value(value)
                for name, value in entry.get("inputs", {}).items()
                if (kind, name) not in INPUTS_ADDED_LATER or value != INPUTS_ADDED_LATER[kind, name]
            }
            known[identity] = digest_of(kind=kind, inputs=values)
        return known[identity]

    def of_value(value: Any) -> Any:
        is_link = isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], int)
        if is_link and isinstance(value[0], str) and value[0] in prompt:
            return ["link", of_node(value[0]), value[1]]
        return value

    own = prompt[node].get("inputs", {})
    return digest_of(inputs={name: of_value(own[name]) for name in inputs if name in own})
