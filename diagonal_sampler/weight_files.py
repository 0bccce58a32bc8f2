"""Read a weight file from disk without running anything in it: safetensors headers first, pickles tensors
only. And write one whole.

Nothing here knows Wan. What is read is a tree: str -> tensor, str -> tree, or bookkeeping (numbers, strings).
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import reprlib
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from .disk import whole_file
from .safetensors_header import MAX_HEADER_BYTES, Header, read_header

log = logging.getLogger(__name__)

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
READABLE_SUFFIXES = SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES

MIN_TORCH_FOR_PICKLES = (2, 10)
"""Before 2.10 a crafted file could corrupt memory through torch's weights_only unpickler (CVE-2026-24747)."""

MAX_LISTED = 10
"""Names an error spells out before it only counts."""
MAX_NAME = 200
"""Characters of a name that a message shows."""
MAX_VALUE = 60
"""Characters of a value that a message shows."""

MARK_ELEMENTS = 1 << 12
"""The most bytes of a tensor that says how a layer is stored."""
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

MAX_INFLATION = 2
"""Tensors may share memory (tied weights), but not so that they unfold to more than this many times what is stored."""

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGICS = tuple(b"\x80" + bytes([version]) for version in range(2, 6))
_GGUF_MAGIC = b"GGUF"
_LFS_MAGIC = b"version https://git-lfs"
_SNIFF_BYTES = 64

FULL_CHECK_ELEMENTS = 1 << 20
"""Tensors up to this many elements are checked for NaN and Inf whole; larger ones in SAMPLED_SPANS spans."""
SAMPLED_SPANS = 8
SPAN_ELEMENTS = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """What one file holds.

    name: file name without its folder. tree: str -> tensor | tree | bookkeeping value. metadata: the wanted
    entries of a safetensors header, str -> str ({} for a pickle).
    """

    name: str
    tree: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


def printable(text: str, limit: int = MAX_NAME) -> str:
    """Text of a file for a message: what no terminal shows is escaped, and it is cut where it is long.

    A lone surrogate in a message ends the thread of ComfyUI that runs prompts, when it is to be printed.
    """
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[:limit])
    return shown if len(text) <= limit else f"{shown}..."


def first_line(error: BaseException, limit: int = MAX_NAME) -> str:
    """What an error of another program says first, as `printable`."""
    return printable((str(error).strip().splitlines() or ["no details"])[0], limit)


def listed(names: Iterable[str], limit: int = MAX_LISTED) -> str:
    """Join names for an error: the first `limit` in natural order, each as `printable`, then how many more."""
    ordered = sorted(names, key=_natural)
    shown = ", ".join(map(printable, ordered[:limit]))
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


class _Bounded(reprlib.Repr):
    """`repr` of a value's beginning: dicts of a pickle that share their insides have no end that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxlong = self.maxother = MAX_VALUE

    def repr1(self, x: Any, level: int) -> str:
        return self.repr_dict(x, level) if isinstance(x, dict) else super().repr1(x, level)


def short(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    text = _Bounded().repr(value) if isinstance(value, (dict, list, tuple, set, frozenset)) else repr(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts blocks.2 before blocks.10. Numbers stay text: Python reads none of thousands of digits."""
    parts = re.split(r"([0-9]+)", name)
    digits = [part.lstrip("0") for part in parts]
    return [(0, len(digits[i]), digits[i]) if i % 2 else (1, 0, part) for i, part in enumerate(parts)]


def read_weight_file(
    path: str | Path,
    *,
    wanted_metadata: Iterable[str] = (),
    read_safetensors: Callable[[Path], Mapping[str, torch.Tensor]] | None = None,
) -> WeightFile:
    """Read a .safetensors or .pt file on the CPU, memory mapped where the format allows it.

    path: the file. wanted_metadata: names of safetensors header entries to keep; the rest is never looked at.
    read_safetensors: reads the tensors of a file whose header has been checked (default: safetensors itself);
    the host passes its own reader so that its memory management knows the file.

    Raises ValueError naming the file (and the key where there is one) for a missing, empty, truncated or
    foreign file, a GGUF file, a pickle that holds anything but tensors and plain containers, or a torch too
    old to open pickles safely.
    """
    path = Path(path)
    head = _sniff(path)
    suffix = path.suffix.lower()
    if suffix in SAFETENSORS_SUFFIXES:
        return _read_safetensors(path, frozenset(wanted_metadata), read_safetensors)
    if suffix in PICKLE_SUFFIXES:
        zipped = head.startswith(_ZIP_MAGIC)
        return WeightFile(name=path.name, tree=_read_pickle(path, zipped=zipped, mapped=zipped))
    raise ValueError(
        f"weight file {path.name!r} ends in {suffix or 'nothing'!r}; this loader reads "
        f"{', '.join(READABLE_SUFFIXES)}: convert it to .safetensors"
    )


def _refuse_foreign(name: str, head: bytes) -> None:
    """Raise ValueError for what the first bytes already give away, whatever the file is called."""
    if not head:
        raise ValueError(f"weight file {name!r} is empty (0 bytes); download or copy it again")
    if head.startswith(_GGUF_MAGIC) or name.lower().endswith(".gguf"):
        raise ValueError(
            f"weight file {name!r} is a GGUF file, which this loader does not read; load it with the GGUF "
            "pack's own Unet Loader and connect its MODEL to DiagonalCausalAttention"
        )
    if head.startswith(_LFS_MAGIC):
        raise ValueError(
            f"weight file {name!r} is a Git LFS pointer, not the weights; fetch it with 'git lfs pull' or download it"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"weight file {name!r} is a web page, not weights; the download failed: download it again")


def _read_safetensors(
    path: Path, wanted: frozenset[str], reader: Callable[[Path], Mapping[str, torch.Tensor]] | None
) -> WeightFile:
    header = _checked_header(path)
    try:
        tensors = dict((reader or _read_tensors)(path))
    except safetensors.SafetensorError as error:
        raise _unsound(path, error) from error
    except (OSError, RuntimeError) as error:  # torch reports a mapping that the system refuses as RuntimeError
        raise ValueError(
            f"weight file {path.name!r} cannot be read: {first_line(error)}; check its permissions, and that the "
            "system has memory for a file of this size"
        ) from error
    return WeightFile(name=path.name, tree=tensors, metadata=_wanted(header, wanted))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(str(path), framework="pt", device="cpu") as opened:
        return {key: _get_tensor(opened, key, path.name) for key in opened.keys()}


def _checked_header(path: Path) -> Header:
    """The header of a safetensors file with tensors. Raises ValueError that names the file."""
    try:
        header = read_header(path)
    except ValueError as error:
        raise _unsound(path, error) from None
    except OSError as error:
        raise ValueError(
            f"weight file {path.name!r} cannot be read: {first_line(error)}; check its permissions"
        ) from error
    if not header.tensors:
        raise ValueError(f"weight file {path.name!r} holds no tensors; choose a model file")
    return header


def _unsound(path: Path, reason: Exception) -> ValueError:
    return ValueError(f"weight file {path.name!r} is not a sound safetensors file: {reason}; download or copy it again")


def _wanted(header: Header, names: frozenset[str]) -> dict[str, str]:
    return {key: text for key, text in header.metadata.items() if key in names}


def _sniff(path: Path) -> bytes:
    """The file's first bytes. Raises ValueError for no file, and for one that is known to be something else."""
    if not path.is_file():
        raise ValueError(f"weight file {path.name!r} does not exist or is not a file; choose one that ComfyUI lists")
    with path.open("rb") as handle:
        head = handle.read(_SNIFF_BYTES)
    _refuse_foreign(path.name, head)
    _refuse_renamed(path, head)
    return head


def _refuse_renamed(path: Path, head: bytes) -> None:
    """Raise ValueError for a torch file that is named as a safetensors file, and the other way round."""
    suffix = path.suffix.lower()
    # The length of a safetensors header may be any bytes, so that its brace decides.
    is_safetensors = head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES
    if suffix in PICKLE_SUFFIXES and is_safetensors:
        raise ValueError(f"weight file {path.name!r} is a safetensors file; rename it to .safetensors")
    is_torch = not is_safetensors and head.startswith((_ZIP_MAGIC, *_PICKLE_MAGICS))
    if suffix in SAFETENSORS_SUFFIXES and is_torch:
        raise ValueError(f"weight file {path.name!r} is a torch file; rename it to .pt")


def read_weight_shapes(path: str | Path, *, wanted_metadata: Iterable[str] = ()) -> WeightFile:
    """As `read_weight_file`, but the weights stay on the disk: each tensor is one element, expanded to its shape.

    Only what says how a layer is stored (bytes, MARK_ELEMENTS at most) has its values.

    Raises ValueError as `read_weight_file` does, and for a torch file of before 1.6, which must be read whole.
    """
    path = Path(path)
    head = _sniff(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES:
        if not head.startswith(_ZIP_MAGIC):
            raise ValueError(
                f"weight file {path.name!r} is in torch's old format, which says nothing before it is read whole"
            )
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and seldom needed

        with FakeTensorMode():
            tree = _read_pickle(path, zipped=True, mapped=False)
        return WeightFile(name=path.name, tree=_without_values(tree))
    header = _checked_header(path)
    tensors = {}
    with path.open("rb") as file:
        for key, entry in header.tensors.items():
            dtype = _SAFETENSORS_DTYPES.get(entry.dtype)
            if dtype is None:
                raise ValueError(f"weight file {path.name!r}, key {key!r}: number format {entry.dtype} is not known")
            if dtype == torch.uint8 and 0 < entry.nbytes <= MARK_ELEMENTS:
                file.seek(entry.offsets[0])
                data = bytearray(file.read(entry.nbytes))
                tensors[key] = torch.frombuffer(data, dtype=dtype).reshape(entry.shape)
            else:
                tensors[key] = torch.empty((), dtype=dtype).expand(entry.shape)
    return WeightFile(name=path.name, tree=tensors, metadata=_wanted(header, frozenset(wanted_metadata)))


def _without_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of the same form whose tensors are one element each, expanded.

    Dicts of a pickle may share dicts, and lie in themselves: each is copied once, and shared as before.
    """
    copies: dict[int, dict[str, Any]] = {id(tree): {}}
    waiting = [tree]
    while waiting:
        source = waiting.pop()
        copy = copies[id(source)]
        for key, value in source.items():
            if isinstance(value, Mapping):
                if id(value) not in copies:
                    copies[id(value)] = {}
                    waiting.append(value)
                copy[key] = copies[id(value)]
            elif isinstance(value, torch.Tensor):
                copy[key] = torch.empty((), dtype=value.dtype).expand(tuple(value.shape))
            else:
                copy[key] = value
    return copies[id(tree)]


def _get_tensor(opened: Any, key: str, name: str) -> torch.Tensor:
    try:
        return opened.get_tensor(key)
    except (safetensors.SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"weight file {name!r}, key {key!r}: cannot read this tensor ({error}); its dtype is "
            f"{opened.get_slice(key).get_dtype()}: convert the file to bfloat16 or download it again"
        ) from error


def _read_pickle(path: Path, *, zipped: bool, mapped: bool) -> Mapping[str, Any]:
    """Unpickle tensors and plain containers only. zipped: torch wrote it as a zip. mapped: into memory, which only a
    zip can be."""
    version = _torch_version()
    if version < MIN_TORCH_FOR_PICKLES:
        raise ValueError(
            f"weight file {path.name!r} is a pickle, and torch {torch.__version__} cannot open pickles "
            f"safely: torch {'.'.join(map(str, MIN_TORCH_FOR_PICKLES))} or newer is needed (CVE-2026-24747); "
            "upgrade torch, or use a .safetensors file"
        )
    if zipped:
        _refuse_compressed(path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the protection off: pass on only the name of what was refused.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the Python object {found.group(1)}" if found else "something other than tensors and plain containers"
        raise ValueError(
            f"weight file {path.name!r} is refused: its pickle holds {what}, and nothing of it was run; use "
            "a .safetensors version, or one saved with torch.save of a plain dict of tensors"
        ) from None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _no_torch_file(path, error) from None
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"weight file {path.name!r} holds a {type(tree).__name__}, not a dict of tensors; choose a model file"
        )
    return tree


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip that unpacks to more bytes than it has: torch stores its records as they are, and
    would unpack compressed ones, a thousandfold where they are zeros."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # a damaged directory, too
        raise _no_torch_file(path, error) from None
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError(
            f"weight file {path.name!r} is refused: it is compressed, which torch's own files are not, and may unpack "
            "to any size; use a .safetensors version, or one saved with torch.save"
        )


def _no_torch_file(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"weight file {path.name!r} cannot be read as a torch file ({type(error).__name__}: {first_line(error)}); it "
        "is damaged, cut short or of another kind: download or copy it again"
    )


def _torch_version() -> tuple[int, int]:
    """The running torch's major and minor version; pre-releases count as the version before them."""
    match = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(a|b|rc|\.?dev)?", str(torch.__version__))
    if match is None:
        return (0, 0)
    major, minor = int(match.group(1)), int(match.group(2))
    return (major, minor - 1) if match.group(3) else (major, minor)


def json_object(file: WeightFile, key: str) -> dict[str, Any]:
    """A header entry that must be a JSON object; {} where it is absent."""
    if key not in file.metadata:
        return {}
    try:
        value = json.loads(file.metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"weight file {file.name!r}, header key {key!r}: expected a JSON object, got "
            f"{short(file.metadata[key])}; correct the header or remove the key"
        )
    return value


def flat_tensors(tree: Mapping[str, Any], name: str, where: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Split one level of a tree into its tensors and the names of all else in it (numbers, strings,
    sub-dicts).

    name: the file, where: the dict inside it, both for errors. Raises ValueError for a key that is no string
    and for a tensor that is not dense and on the CPU.
    """
    tensors: dict[str, torch.Tensor] = {}
    others: list[str] = []
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(
                f"weight file {name!r}, {where}: key {key!r} is a {type(key).__name__}, not a string; "
                "this is no state dict: choose a model file"
            )
        if not isinstance(value, torch.Tensor):
            others.append(key)
            continue
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(
                f"weight file {name!r}, key {key!r}: expected a dense CPU tensor, got {value.dtype}, {value.layout} on "
                f"{value.device}; save plain tensors"
            )
        tensors[key] = value.detach()
    return tensors, others


def refuse_inflated(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise ValueError where tensors share their elements (stride 0, one storage under many names) so that copying
    them takes far more memory than the file has bytes."""
    stored: dict[int, int] = {}
    needed: Counter[int] = Counter()
    for value in tensors.values():
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        needed[storage.data_ptr()] += value.numel() * value.itemsize
    if needed.total() <= MAX_INFLATION * sum(stored.values()) + FULL_CHECK_ELEMENTS:
        return
    worst = max(stored, key=lambda storage: needed[storage] - stored[storage])
    sharing = [key for key, value in tensors.items() if value.untyped_storage().data_ptr() == worst]
    raise ValueError(
        f"weight file {name!r}, key {sharing[0]!r}: {len(sharing)} tensors unfold {stored[worst]} stored bytes to "
        f"{needed[worst]}; save plain tensors, each with memory of its own (.contiguous().clone())"
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating tensor holds no NaN or Inf.

    Up to FULL_CHECK_ELEMENTS every element is looked at; of a larger one, SAMPLED_SPANS spans of
    SPAN_ELEMENTS spread from its start to its end, so that a 28 GB file is not read twice.
    """
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    # float8 has no isfinite of its own: widen what is looked at, never the whole file.
    narrow = tensor.dtype.itemsize == 1
    return all(bool(torch.isfinite(span.float() if narrow else span).all()) for span in _spans(tensor))


def _spans(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.numel() <= FULL_CHECK_ELEMENTS or not tensor.is_contiguous():
        yield tensor
        return
    flat = tensor.view(-1)
    last = flat.numel() - SPAN_ELEMENTS
    for index in range(SAMPLED_SPANS):
        start = last * index // (SAMPLED_SPANS - 1)
        yield flat[start : start + SPAN_ELEMENTS]


def read_described(
    path: str | os.PathLike[str], entry: str, what: str, file_name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads a file of this pack's own that has its configuration in its header.

    entry: the header's, a JSON object. what, file_name: what is wanted, and its name, for the error.

    Returns:
        the configuration, and the tensors on the CPU by name.

    Raises:
        ValueError: if the header has no such entry.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(entry)
    if described is None:
        raise ValueError(
            f"path={os.fspath(path)!r} has no {entry!r} entry in its safetensors header, so it is not {what}; give the "
            f"{file_name} of this pack"
        )
    return json.loads(described), load_file(path)


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name beside it, then renames: it is never half there.

    Its permissions are those of any new file (safetensors alone would keep others from reading it).

    Raises:
        OSError, safetensors.SafetensorError: it cannot be written; a file of that name stays as it was.
    """
    with whole_file(Path(path)) as partial:
        permissions = None
        if os.name != "nt":  # there a scanner may hold the file that was just made, and modes mean little
            partial.touch()
            permissions = partial.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        if permissions is not None:
            with suppress(OSError):  # a mount may not let its files be changed
                partial.chmod(permissions)
