"""The header of a safetensors file: names, shapes, number formats, metadata. It is read, and nothing is mapped.

safetensors itself maps the whole file to say as much: Windows counts such a mapping, as long as the weights, against
the memory that programs may have.

Format: https://github.com/huggingface/safetensors#format. Nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import reprlib
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format itself sets on its JSON."""

METADATA_KEY = "__metadata__"
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""The format's names of number formats -> bits of an element."""

_LENGTH_BYTES = 8
_MAX_ELEMENTS = 1 << 63

_shown = reprlib.Repr()  # values of a file may have any size
_shown.maxstring = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor.

    dtype: a key of DTYPE_BITS. shape: outermost first. offsets: its first byte in the file, and the one behind it.
    """

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return self.offsets[1] - self.offsets[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """metadata: entry -> text, {} where the file has none. tensors: name -> Entry, in the header's order."""

    metadata: dict[str, str]
    tensors: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; the tensors lie without gaps and end where the file ends.

    Raises:
        ValueError: not a sound safetensors file. It says what is wrong, in words that go on from the file's name and
            a colon ("it is cut short: ..."); the name is not in it.
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        prefix = handle.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise ValueError(f"it is {size} bytes long, shorter than any header")
        (header_bytes,) = struct.unpack("<Q", prefix)
        data_start = _LENGTH_BYTES + header_bytes
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its first 8 bytes give a header of {header_bytes} bytes, more than the format allows")
        if data_start > size:
            raise ValueError(f"it ends inside its header ({size} of at least {data_start} bytes)")
        raw = handle.read(header_bytes)
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"its header is a JSON {type(content).__name__}, not an object")
    metadata = _metadata(content.pop(METADATA_KEY, None))
    tensors = {key: _entry(key, value, data_start, size, len(content)) for key, value in content.items()}
    _require_seamless(tensors, data_start, size)
    return Header(metadata=metadata, tensors=tensors)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The format allows a name once; of two, no one can say which is meant."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{_shown.repr(max(names, key=names.__getitem__))} is in it twice")
    return content


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"its {METADATA_KEY} is a JSON {type(value).__name__}, not an object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise ValueError(f"its {METADATA_KEY} has {_shown.repr(text)} under {_shown.repr(key)}, which is not text")
        if not (_is_text(key) and _is_text(text)):
            raise ValueError(f"its {METADATA_KEY} has half a character under {_shown.repr(key)}")
    return value


def _entry(key: str, value: Any, data_start: int, size: int, count: int) -> Entry:
    """One tensor's entry, or ValueError. size: of the file, in bytes. count: tensors of the header."""
    shown = _shown.repr(key)
    if not _is_text(key):
        raise ValueError(f"key {shown} has half a character in its name")
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"key {shown} has no valid data_offsets in the header")
    start, end = offsets
    if not 0 <= start <= end:
        raise ValueError(f"key {shown} has data_offsets [{start}, {end}]")
    if data_start + end > size:
        raise ValueError(
            f"it is cut short: key {shown} ends at byte {data_start + end}, the file has {size} ({count} tensors in "
            "the header)"
        )
    dtype, shape = value.get("dtype"), value.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"key {shown} has dtype {_shown.repr(dtype)}, which is no number format of safetensors'")
    if not isinstance(shape, list) or not all(type(length) is int and 0 <= length < _MAX_ELEMENTS for length in shape):
        raise ValueError(f"key {shown} has shape {_shown.repr(shape)}")
    bits = DTYPE_BITS[dtype]
    for length in shape:  # one by one: a 0 behind others does not make them smaller
        bits *= length
        if bits >= _MAX_ELEMENTS:
            raise ValueError(f"key {shown} has shape {_shown.repr(shape)}, larger than any tensor")
    if bits != 8 * (end - start):
        needed = bits // 8 if bits % 8 == 0 else bits / 8
        raise ValueError(
            f"key {shown} has shape {_shown.repr(shape)} in {dtype}, which takes {needed} bytes, and {end - start} "
            "bytes of data"
        )
    return Entry(dtype=dtype, shape=tuple(shape), offsets=(data_start + start, data_start + end))


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON's escapes can spell half of a character, which no file has a name for."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def _require_seamless(tensors: Mapping[str, Entry], data_start: int, size: int) -> None:
    """Raise ValueError where tensors overlap, or where bytes of the file belong to none."""
    covered = data_start
    for key, entry in sorted(tensors.items(), key=lambda item: item[1].offsets):
        start, end = entry.offsets
        if start != covered:
            what = "overlaps the tensor before it" if start < covered else "leaves a gap behind the tensor before it"
            raise ValueError(
                f"key {_shown.repr(key)} {what} (it begins at {start - data_start} of the data, where "
                f"{covered - data_start} is due)"
            )
        covered = end
    if covered != size:
        raise ValueError(f"it has {size - covered} bytes behind its last tensor")
