"""Headers of safetensors files: what is refused with which words, and never one that safetensors would not open."""

import json
import random
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from diagonal_sampler.safetensors_header import Entry, read_header

SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NO_GAP = {**SOUND, "data_offsets": [8, 16]}


def write(folder: Path, header: dict | bytes, data: int = 8, length: int | None = None) -> Path:
    """data: bytes behind the header. length: what the file says of the header, its own where None."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def test_a_header_says_what_the_file_holds(tmp_path: Path) -> None:
    tensors = {"half": torch.arange(6, dtype=torch.float16).reshape(2, 3), "none": torch.zeros(0, 4)}
    tensors |= {"one": torch.tensor(7, dtype=torch.int64), "bytes": torch.arange(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"window": "12"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"window": "12"} and header.tensors.keys() == tensors.keys()
    data = (tmp_path / "a.safetensors").read_bytes()
    formats = {"half": "F16", "none": "F32", "one": "I64", "bytes": "U8"}
    for name, tensor in tensors.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (formats[name], tuple(tensor.shape), tensor.nbytes)
        assert data[slice(*entry.offsets)] == tensor.numpy().tobytes()


def test_entries_need_not_be_in_order_and_metadata_may_be_missing(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, {"b": NO_GAP, "a": SOUND, "__metadata__": None}, 16))
    start = (tmp_path / "a.safetensors").stat().st_size - 16
    assert list(header.tensors.items()) == [
        (name, Entry(dtype="F32", shape=(2,), offsets=(start + begin, start + begin + 8)))
        for name, begin in (("b", 8), ("a", 0))
    ]
    assert header.metadata == {}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "its header is not JSON"),
        (b"\xff\xfe{}", "its header is not JSON"),
        ("{}".encode("utf-16"), "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        (b'{"a": NaN}', "its header is not JSON .NaN is no number"),
        (b'{"a": 1, "a": 1}', "its header is not JSON .'a' is in it twice"),
        (b"[]", "its header is a JSON list"),
        ({"__metadata__": 3}, "its __metadata__ is a JSON int"),
        ({"__metadata__": {"x": 1}}, "its __metadata__ has 1 under 'x', which is not text"),
        ({"__metadata__": {"x": "\ud800"}}, "its __metadata__ has half a character under 'x'"),
        ({"\ud800": SOUND}, r"key '\\ud800' has half a character"),
        ({"a": 1}, "key 'a' has no valid data_offsets"),
        ({"a": {**SOUND, "data_offsets": [0, True]}}, "key 'a' has no valid data_offsets"),
        ({"a": {**SOUND, "data_offsets": [8, 0]}}, r"key 'a' has data_offsets \[8, 0\]"),
        ({"a": {**SOUND, "data_offsets": [0, 2**64]}}, "it is cut short: key 'a' ends at byte"),
        ({"a": {**SOUND, "dtype": "F9"}}, "key 'a' has dtype 'F9'"),
        ({"a": {**SOUND, "dtype": ["F32"] * 10**5}}, r"key 'a' has dtype \['F32', .* \.\.\.\], which is no number"),
        ({"a": {**SOUND, "shape": [2.0]}}, r"key 'a' has shape \[2.0\]"),
        ({"a": {**SOUND, "shape": [2**63]}}, r"key 'a' has shape \[9223372036854775808\]"),
        ({"a": {**SOUND, "shape": [2**62, 2**62, 0]}}, "key 'a' has shape .*larger than any tensor"),
        ({"a": {**SOUND, "shape": [3]}}, r"key 'a' has shape \[3\] in F32, which takes 12 bytes, and 8 bytes of data"),
        (
            {"a": {"dtype": "F4", "shape": [15], "data_offsets": [0, 8]}},
            "key 'a' has shape .* F4, which takes 7.5 bytes",
        ),
        ({"a": SOUND, "b": SOUND}, "key 'b' overlaps the tensor before it"),
        (
            {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}},
            "key 'a' leaves a gap .* at 4 .* 0 is due",
        ),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "it has 4 bytes behind its last tensor"),
    ],
)
def test_an_unsound_header_is_told_what_is_wrong(tmp_path: Path, header: dict | bytes, words: str) -> None:
    path = write(tmp_path, header)
    with pytest.raises(ValueError, match=f"^{words}") as error:
        read_header(path)
    assert len(str(error.value)) < 500
    str(error.value).encode()


@pytest.mark.parametrize(("keep", "words"), [(0, "0 bytes long"), (5, "5 bytes long"), (30, "ends inside its header")])
def test_a_file_without_a_whole_header_is_told_so(tmp_path: Path, keep: int, words: str) -> None:
    path = write(tmp_path, {"a": SOUND})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=words):
        read_header(path)
    with pytest.raises(ValueError, match="more than the format allows"):
        read_header(write(tmp_path, b"{}", length=2**62))


def test_what_is_accepted_safetensors_opens_too(tmp_path: Path) -> None:
    rng, sound = random.Random(0), {"first": SOUND, "second": NO_GAP, "__metadata__": {"x": "y"}}
    accepted = 0
    for _ in range(600):
        text = bytearray(json.dumps(sound).encode())
        for _ in range(rng.randrange(3)):
            text[rng.randrange(len(text))] = rng.choice(b' "{}[],:0123456789-efFU\\')
        path = write(tmp_path, bytes(text), 16)
        try:
            header = read_header(path)
        except ValueError:
            continue
        accepted += 1
        with safetensors.safe_open(path, framework="np") as opened:
            assert set(opened.keys()) == header.tensors.keys() and (opened.metadata() or {}) == header.metadata
            for name, entry in header.tensors.items():
                part = opened.get_slice(name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (entry.dtype, entry.shape)
    assert 100 < accepted < 500
