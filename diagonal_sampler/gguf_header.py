"""The names and shapes of a GGUF file's tensors, and how long their data is. Nothing of the data is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 24  # a Wan's has 100 kB; more is not looked at
MAX_COUNT = 1_000_000  # tensors, entries, elements of an entry, or bytes of a text: a damaged file asks for more
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 40  # of a tensor; the largest of a Wan has 71 million
DEFAULT_ALIGNMENT = 32

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type -> struct code."""
_TEXT, _ARRAY = 8, 9
_SHAPE_KEY = "comfy.gguf.orig_shape."
"""ComfyUI's GGUF files keep the shape of tensors that the format cannot hold as they are under this, then the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFHeader:
    """shapes: tensor name -> shape as torch has it, outermost first. data_bytes: of all tensors as they are stored."""

    shapes: Mapping[str, tuple[int, ...]]
    data_bytes: int


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        ValueError: no GGUF file, or one that is damaged, of an unknown version, or with a header beyond
            MAX_HEADER_BYTES.
    """
    path = Path(path)
    with path.open("rb") as whole:
        file = BytesIO(whole.read(MAX_HEADER_BYTES))
        try:
            if file.read(4) != MAGIC:
                raise ValueError(f"weight file {path.name!r} is no GGUF file; download it again.")
            version = _number(file, "I")
            if version not in VERSIONS:
                raise ValueError(f"weight file {path.name!r} is GGUF version {version}; versions 2 and 3 are read.")
            tensors, entries = _count(file), _count(file)
            metadata = dict((_text(file), _value(file, _number(file, "I"))) for _ in range(entries))
            shapes = dict(_tensor(file) for _ in range(tensors))
            for key, shape in metadata.items():
                name = key.removeprefix(_SHAPE_KEY)
                if name != key and name in shapes and isinstance(shape, tuple):
                    shapes[name] = _checked(shape)
        except (struct.error, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"weight file {path.name!r} is a damaged GGUF file; download it again.") from error
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        alignment = alignment if isinstance(alignment, int) and alignment > 0 else DEFAULT_ALIGNMENT
        start = -(-file.tell() // alignment) * alignment
    return GGUFHeader(shapes=shapes, data_bytes=max(0, path.stat().st_size - start))


def _number(file: BinaryIO, code: str) -> Any:
    (value,) = struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))
    return value


def _count(file: BinaryIO) -> int:
    count = _number(file, "Q")
    if count > MAX_COUNT:
        raise OverflowError(f"{count} is more than a GGUF file has")
    return count


def _text(file: BinaryIO) -> str:
    size = _count(file)
    data = file.read(size)
    if len(data) < size:
        raise struct.error("the file ends in a text")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY:
        inner = _number(file, "I")
        if inner == _ARRAY:
            raise struct.error("an array of arrays")
        count = _count(file)
        if inner in _NUMBERS:  # at once: bytes are a million elements a megabyte
            packed = f"<{count}{_NUMBERS[inner]}"
            return struct.unpack(packed, file.read(struct.calcsize(packed)))
        return tuple(_value(file, inner) for _ in range(count))
    if kind not in _NUMBERS:
        raise struct.error(f"value type {kind}")
    return _number(file, _NUMBERS[kind])


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name, dimensions = _text(file), _number(file, "I")
    if dimensions > MAX_DIMENSIONS:
        raise OverflowError(f"a tensor of {dimensions} dimensions")
    shape = tuple(_number(file, "Q") for _ in range(dimensions))
    _number(file, "I")  # how it is packed
    _number(file, "Q")  # where it lies
    return name, _checked(shape[::-1])


def _checked(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """Raises OverflowError for what no tensor's shape is."""
    if not all(type(size) is int and size >= 0 for size in shape) or prod(shape) > MAX_ELEMENTS:
        raise OverflowError("a tensor of no or a huge size")
    return shape
