"""Weight files that lie, are cut, are damaged, or carry code: each is refused by name, and none is loaded half."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fault_rows
import pytest
import torch
from safetensors.torch import save_file
from wan_files import DIMS, LAYOUTS, LORA_LAYOUTS, lora_pairs, prefixed, tiny_wan

from diagonal_sampler.wan_layout import expected_shapes

SECONDS = 5.0
GIANT = 10**6


@dataclass(frozen=True)
class Made:
    """A file, words that its refusal must have beside its name, and whether it may also be sound by chance."""

    path: Path
    words: tuple[str, ...] = ()
    may_load: bool = False


class Maker:
    """What a case is made of."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.weights = dict(WEIGHTS)
        self.key = rng.choice(sorted(self.weights))
        self.marker = folder / "marker"

    def safetensors(self, tensors: dict, metadata: dict[str, str] | None = None) -> Path:
        path = self.folder / "bad.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
        return path

    def pickle(self, tree: object, suffix: str = "pt", zipped: bool = True) -> Path:
        path = self.folder / f"bad.{suffix}"
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)
        return path

    def either(self, tensors: dict) -> Path:
        """As safetensors or as one of the training layouts."""
        if self.rng.random() < 0.5:
            return self.safetensors(tensors)
        section = self.rng.choice(("generator", "generator_ema", "model", "state_dict"))
        prefix = self.rng.choice(("", "model.", "module.model."))
        return self.pickle({section: prefixed(tensors, prefix)}, zipped=self.rng.random() < 0.8)

    def raw(self, header: bytes | dict | list, data: bytes, length: int | None = None) -> Path:
        """A safetensors file byte by byte."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = self.folder / "bad.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    def parts(self) -> tuple[dict, bytes]:
        """Header and data of a sound file."""
        header, data = {}, bytearray()
        for key, value in self.weights.items():
            content = value.numpy().tobytes()
            offsets = [len(data), len(data) + len(content)]
            header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
            data += content
        return header, bytes(data)


WEIGHTS = tiny_wan(0)


# --- safetensors: the container ---


def cut_short(m: Maker) -> Made:
    path = m.safetensors(m.weights)
    size = path.stat().st_size
    os.truncate(path, m.rng.choice((m.rng.randrange(1, 64), m.rng.randrange(64, size), size - 1)))
    return Made(path)


def header_length(m: Maker) -> Made:
    header, data = m.parts()
    return Made(m.raw(header, data, m.rng.choice((0, 1, 2**63, 2**64 - 1, 10**9, m.rng.getrandbits(30)))))


def header_text(m: Maker) -> Made:
    sound, data = m.parts()
    text = m.rng.choice(
        [b"", b"[]", b"null", b"7", b'"x"', b"{", b"[" * 50_000, b"\xff\xfe{}", b"{}" + b"\0" * 8, b'{"a": 1}']
        + [json.dumps(sound).encode()[:-1], json.dumps({"a": [sound]}).encode(), b'{"a":{}}', b'{"__metadata__":3}']
    )
    return Made(m.raw(text, data))


def header_byte(m: Maker) -> Made:
    header, data = m.parts()
    text = bytearray(json.dumps(header).encode())
    text[m.rng.randrange(len(text))] ^= 1 << m.rng.randrange(8)
    return Made(m.raw(bytes(text), data), may_load=True)


def offsets(m: Maker) -> Made:
    header, data = m.parts()
    start, end = header[m.key]["data_offsets"]
    other = header[m.rng.choice([key for key in header if key != m.key])]["data_offsets"]
    header[m.key]["data_offsets"] = m.rng.choice(
        ([end, start], [-4, end], [start, end + 4], [start + 4, end], other, [start, 2**63], [0, 0], [2**62, 2**62])
        + (["0", "4"], None, [start], [start, end, end], {"a": 1}, [float(start), end + 0.5], [True, False])
    )
    return Made(m.raw(header, data), ("key '",))


def shape_or_dtype(m: Maker) -> Made:
    header, data = m.parts()
    shape = header[m.key]["shape"]
    change = m.rng.choice(
        [{"shape": [*shape, 2]}, {"shape": [2**62, 4]}, {"shape": [-1, *shape]}, {"shape": [2**64]}, {"shape": "3"}]
        + [{"shape": None}, {"dtype": "F99"}, {"dtype": "I64"}, {"dtype": None}, {"dtype": "f32"}, {"dtype": 7}]
        + [{"dtype": "F64"}, {"dtype": "BF16"}]
    )
    header[m.key] |= change
    return Made(m.raw(header, data), (m.key,))


def hole_or_tail(m: Maker) -> Made:
    header, data = m.parts()
    if m.rng.random() < 0.5:
        return Made(m.raw(header, data + bytes(m.rng.randrange(1, 999))))
    del header[m.key]
    return Made(m.raw(header, data), ("key '",) if m.key != list(WEIGHTS)[-1] else ("behind its last",))


def same_name_twice(m: Maker) -> Made:
    header, data = m.parts()
    first = {m.key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(first)[:-1] + "," + json.dumps(header)[1:]
    return Made(m.raw(text.encode(), data), may_load=True)


def huge_tensor(m: Maker) -> Made:
    """Sizes that would take terabytes; the file is a few megabytes."""
    header, data = m.parts()
    header[m.key] |= {"shape": [GIANT, GIANT], "data_offsets": [len(data), len(data) + 4 * GIANT * GIANT]}
    return Made(m.raw(header, data))


# --- what is inside ---


def missing(m: Maker) -> Made:
    gone = m.rng.sample(sorted(m.weights), m.rng.choice((1, 1, 2, 5)))
    for key in gone:
        del m.weights[key]
    return Made(m.either(m.weights), () if any(key in ALL_OR_NOTHING for key in gone) else (gone[0],) * (len(gone) < 2))


ALL_OR_NOTHING = ("patch_embedding.weight", "head.modulation")
"""Without these a file may be said to be no Wan at all, which is as clear."""


def left_over(m: Maker) -> Made:
    blocks = DIMS.depth
    extra = m.rng.choice(
        ("blocks.0.self_attn.extra.weight", "unknown", f"blocks.{blocks}.norm3.bias", "head.head.scale", "blocks.x.y")
    )
    return Made(m.either(m.weights | {extra: torch.zeros(4)}), (extra.split(".")[0],))


def wrong_shape(m: Maker) -> Made:
    value = m.weights[m.key]
    changed = m.rng.choice(
        (
            value[None],
            value.flatten()[:-1],
            value.new_zeros(0),
            value.new_zeros(()),
            value.repeat(2, *[1] * (value.ndim - 1)),
        )
        + ((value.transpose(0, -1),) if value.shape[0] != value.shape[-1] else ())
        + ((value.flatten(),) if value.ndim > 1 else ())
    )
    if m.key.endswith(("patch_embedding.weight", "head.head.weight", "text_embedding.0.weight")):
        return Made(m.either(m.weights | {m.key: changed.clone()}))
    return Made(m.either(m.weights | {m.key: changed.clone()}), may_load=False)


def not_floats(m: Maker) -> Made:
    dtype = m.rng.choice((torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64))
    wrong = m.weights | {m.key: m.weights[m.key].to(dtype)}
    path = m.pickle({"generator": wrong}) if dtype is torch.complex64 else m.either(wrong)
    return Made(path, (m.key,))


def not_finite(m: Maker) -> Made:
    value = m.weights[m.key].clone()
    value.view(-1)[m.rng.randrange(value.numel())] = m.rng.choice((float("nan"), float("inf"), -float("inf")))
    dtype = m.rng.choice((torch.float32, torch.bfloat16, torch.float16))
    return Made(m.either(m.weights | {m.key: value.to(dtype)}), (m.key,))


def strange_blocks(m: Maker) -> Made:
    name = m.rng.choice(("5", "999999999", "99999999999999999999", "-1", "01", "1.0", "", "x", "¹"))
    return Made(m.either({key.replace("blocks.1.", f"blocks.{name}."): value for key, value in m.weights.items()}))


def strange_header(m: Maker) -> Made:
    key = m.rng.choice(
        ("config", "frames_per_chunk", "sigmas", "shift", "window", "context_mode", "_quantization_metadata")
    )
    value = m.rng.choice(
        ("[" * 100_000, '{"transformer": []}', "nan", "-1", "{}x", '{"layers": 3}', "\0", "1e999", "[[3.0]]")
    )
    return Made(m.safetensors(m.weights, {key: value}), (key,), may_load=True)


def scaled_giant(m: Maker) -> Made:
    """Sizes that agree with each other and take terabytes, of one element in the file."""
    one = torch.ones(1)
    for block in range(DIMS.depth):
        m.weights[f"blocks.{block}.ffn.0.weight"] = one.expand(GIANT * 100, DIMS.dim)
        m.weights[f"blocks.{block}.ffn.0.bias"] = one.expand(GIANT * 100)
        m.weights[f"blocks.{block}.ffn.2.weight"] = one.expand(DIMS.dim, GIANT * 100)
    return Made(m.pickle({"generator": m.weights}), ("blocks.",))


def many_blocks(m: Maker) -> Made:
    """A thousand blocks that are all the same one."""
    first = {key: value for key, value in m.weights.items() if key.startswith("blocks.0.")}
    for block in range(2, m.rng.choice((200, 1_000))):
        m.weights |= {key.replace("blocks.0.", f"blocks.{block}."): value for key, value in first.items()}
    return Made(m.pickle({"generator": m.weights}), ("blocks.",))


def stride_zero(m: Maker) -> Made:
    wrong = torch.zeros(1).expand(*m.rng.choice(((GIANT, GIANT), (GIANT * GIANT,), (2**20, 2**20, 2**10))))
    return Made(m.pickle({"generator": m.weights | {m.key: wrong}}), (m.key,))


# --- pickles ---


class Payload:
    """Runs a command when it is unpickled by something careless."""

    def __init__(self, call: Callable, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def payload(m: Maker) -> Made:
    touch = f"open({str(m.marker)!r}, 'w').close()"
    bomb = m.rng.choice(
        (
            Payload(os.system, f"touch {m.marker}"),
            Payload(exec, touch),
            Payload(eval, touch),
            Payload(os.mkdir, str(m.marker)),
            Payload(open, str(m.marker), "w"),
            Payload(Path.touch, m.marker),
            Payload(getattr, Payload(__import__, "os"), "system"),
        )
    )
    tree = m.rng.choice(
        (
            bomb,
            {"generator": bomb},
            {"generator": m.weights, "step": bomb},
            {"generator": m.weights | {m.key: bomb}},
            {"generator": m.weights | {m.key: [bomb]}},
            {"optimizer": [(bomb,)], "generator_ema": prefixed(m.weights, "model.")},
        )
    )
    suffix = m.rng.choice(("pt", "pth", "ckpt", "bin"))
    if m.rng.random() < 0.3:
        path = m.folder / f"bad.{suffix}"
        path.write_bytes(pickle.dumps(tree, m.rng.choice((0, 2, 4))))
        return Made(path)
    return Made(m.pickle(tree, suffix, m.rng.random() < 0.7))


def pickle_damaged(m: Maker) -> Made:
    path = m.pickle({"generator": m.weights}, zipped=m.rng.random() < 0.5)
    content = bytearray(path.read_bytes())
    how = m.rng.choice(("cut", "flip", "flips", "head"))
    if how == "cut":
        del content[m.rng.randrange(1, len(content)) :]
    elif how == "head":
        del content[: m.rng.randrange(1, 2000)]
    else:
        for _ in range(1 if how == "flip" else 50):
            content[m.rng.randrange(4000)] = m.rng.randrange(256)
    path.write_bytes(content)
    return Made(path, may_load=how.startswith("flip"))


def pickle_deflated(m: Maker) -> Made:
    """A zip bomb: the same records, compressed; data that unpack to a hundred times the file."""
    buffer = io.BytesIO()
    torch.save({"generator": m.weights | {m.key: torch.zeros(8_000_000)}}, buffer)
    path = m.folder / "bad.pt"
    with zipfile.ZipFile(buffer) as sound, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sound.namelist():
            packed.writestr(name, sound.read(name))
    return Made(path)


def pickle_zip(m: Maker) -> Made:
    path = m.folder / "bad.pt"
    with zipfile.ZipFile(path, "w") as packed:
        for name in m.rng.choice(((), ("a/data.pkl",), ("../../escaped",), ("archive/version",), ("a/b", "/etc/x"))):
            packed.writestr(name, m.rng.choice((b"", b"3\n", b"\x80\x02}q\0.", m.rng.randbytes(50))))
    return Made(path, may_load=False)


def pickle_values(m: Maker) -> Made:
    value = m.weights[m.key]
    wrong = m.rng.choice(
        (
            value.to_sparse(),
            torch.empty_like(value, device="meta"),
            torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            None,
            "text",
            [value],
            {"inner": value},
        )
    )
    return Made(m.pickle({"generator": m.weights | {m.key: wrong}}))


def pickle_trees(m: Maker) -> Made:
    loop: dict = {}
    loop["state_dict"] = loop
    deep: dict = {"x": 1}
    for _ in range(m.rng.choice((10, 200))):
        deep = {"model": deep}
    return Made(
        m.pickle(
            m.rng.choice(
                (loop, deep, [], [m.weights], None, 3, "x", {}, {1: 2}, {"generator": []}, {"generator": {}})
                + ({"generator": {7: torch.zeros(1)}}, {"critic": m.weights}, {(): 1}, torch.zeros(3))
            )
        )
    )


def another_kind(m: Maker) -> Made:
    suffix = m.rng.choice(("safetensors", "sft", "pt", "pth", "ckpt", "bin"))
    path = m.folder / f"bad.{suffix}"
    content = m.rng.choice(
        (b"", b"GGUF" + bytes(99), b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", bytes(5000))
        + (m.rng.randbytes(m.rng.randrange(1, 9000)), b"\x80\x02", b"PK\x03\x04" + m.rng.randbytes(500), b"\x89PNG\r\n")
    )
    path.write_bytes(content)
    return Made(path)


def twice_when_unwrapped(m: Maker) -> Made:
    return Made(
        m.pickle({"generator": m.weights | {f"module._orig_mod.{m.key}": m.weights[m.key]} | WRAPPED}), may_load=True
    )


WRAPPED = {f"_fsdp_wrapped_module.{key}": value for key, value in WEIGHTS.items()}


# --- LoRAs ---


def lora(m: Maker) -> Made:
    pairs = lora_pairs()
    layout = m.rng.choice(sorted(LORA_LAYOUTS))
    make, suffix, _ = LORA_LAYOUTS[layout]
    content = make(pairs)
    tensors = content
    while not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        tensors = next(value for value in tensors.values() if isinstance(value, dict))
    key = m.rng.choice([key for key in tensors if "lora" in key.rpartition(".")[0] and tensors[key].ndim > 1])
    value = tensors[key]
    change = m.rng.choice(("nan", "int", "gone", "shape", "rank", "foreign", "payload", "giant"))
    if change == "nan":
        value.view(-1)[m.rng.randrange(value.numel())] = float("nan")
    elif change == "int":
        tensors[key] = value.to(torch.int32)
    elif change == "gone":
        del tensors[key]
    elif change == "shape":
        tensors[key] = value.flatten()
    elif change == "rank":
        tensors[key] = torch.cat([value, value])
    elif change == "foreign":
        tensors["blocks.7.nothing.lora_A.weight"] = value.clone()
    elif change == "giant" and suffix == ".pt":
        tensors[key] = torch.zeros(1).expand(GIANT, GIANT)
    elif change == "payload" and suffix == ".pt":
        tensors[key] = Payload(os.mkdir, str(m.marker))
    else:
        tensors[key] = value[:, :0]
    path = m.folder / f"bad_lora{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    return Made(path)


KINDS: tuple[Callable[[Maker], Made], ...] = (
    (cut_short, header_length, header_text, header_byte, offsets, shape_or_dtype, hole_or_tail, same_name_twice)
    + (huge_tensor, missing, left_over, wrong_shape, not_floats, not_finite, strange_blocks, strange_header)
    + (scaled_giant, many_blocks, stride_zero, payload, pickle_damaged, pickle_deflated, pickle_zip, pickle_values)
    + (pickle_trees, another_kind, twice_when_unwrapped, lora, payload, lora)
)


@pytest.fixture
def loading(pack_module):
    return pack_module("model_patches.loading")


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_row_checkpoints(loading, tmp_path):
    """The most memory the process ever took is looked at too: a refusal may not read what the file only claims."""
    base = loading.load_wan(LAYOUTS["causvid, generator"](tmp_path, WEIGHTS, {}))

    def check(number: int) -> float:
        rng = fault_rows.generator("checkpoints", number)
        kind = KINDS[number % len(KINDS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        maker = Maker(folder, rng)
        made = kind(maker)
        if (most := Path("/proc/self/clear_refs")).exists():
            most.write_text("5")  # the most so far is what is held now
        before = resident_bytes()
        began = time.perf_counter()
        message = ""
        try:
            if made.path.name.startswith("bad_lora"):
                loading.apply_lora(base[0], made.path, 1.0, base[1])
            else:
                model, info = loading.load_wan(made.path)
                whole(model, info)
        except ValueError as error:
            message = str(error)
        seconds = time.perf_counter() - began
        what = f"{kind.__name__} {made.path.name}: {message[:300]!r}"
        assert message or made.may_load, f"{what} was loaded"
        assert not maker.marker.exists(), f"{what} ran code"
        assert seconds < SECONDS, f"{what} took {seconds:.1f} s"
        assert resident_bytes() - before < 1 << 30, f"{what} took {(resident_bytes() - before) >> 20} MB"
        if message:
            assert made.path.name in message, f"{what} does not name its file"
            assert "weights_only=False" not in message and "Traceback" not in message, what
            for word in made.words:
                assert word in message or "no Wan" in message, f"{what} does not name {word!r}"
        for path in sorted(folder.rglob("*")):
            path.unlink()
        folder.rmdir()
        return seconds

    def whole(model, info) -> None:
        """What was loaded has every parameter, and all are finite."""
        parameters = dict(model.model.diffusion_model.named_parameters())
        assert not expected_shapes(info.dims).keys() - parameters.keys()
        assert all(torch.isfinite(value).all() for value in parameters.values())

    fault_rows.run_cases("checkpoints", check)
