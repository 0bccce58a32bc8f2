"""The forecast of a run's memory, against the real cache, and the changes that it suggests."""

import json
import random
import struct
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from diagonal_sampler import gguf_header, memory
from diagonal_sampler.cache import KVCache
from diagonal_sampler.checkpoints import inspect_checkpoint
from diagonal_sampler.gguf_header import read_gguf_header
from diagonal_sampler.memory import (
    FP8,
    GGUF_Q4,
    Change,
    ClipSize,
    DecoderFacts,
    NetworkFacts,
    changes_that_fit,
    forecast,
    keys_values_bytes,
)
from diagonal_sampler.settings import INT8, CausalSettings
from diagonal_sampler.wan_layout import WanDims, expected_shapes
from diagonal_sampler.weight_files import read_weight_file

# Wan 2.1 1.3B and 14B in bf16. The bytes of a forward are what ComfyUI reckons with fused attention.
WAN_1_3B = NetworkFacts(
    weight_bytes=2_837_992_704,
    parameters=1_418_996_352,
    layers=30,
    width=1536,
    patch=(2, 2),
    element_bytes=2,
    forward_bytes=14497,
)
WAN_14B = replace(WAN_1_3B, weight_bytes=28_577_000_000, parameters=14_288_500_000, layers=40, width=5120)
CLIP = ClipSize(settings=CausalSettings(window=12, sink=3), frames=21, rows=60, columns=104)


def real_cache_bytes(clip: ClipSize, layers: int, width: int) -> int:
    """Bytes of a cache through which a whole clip has gone."""
    cache = KVCache(clip.settings, clip.frames)
    tokens = clip.rows // 2 * (clip.columns // 2)
    for start in range(0, clip.frames, clip.settings.frames_per_chunk):
        frames = min(clip.settings.frames_per_chunk, clip.frames - start)
        cache.begin(frames)
        keys = torch.zeros(clip.batch, frames * tokens, width // 128, 128, dtype=torch.bfloat16)
        for condition in range(clip.conditions):
            for layer in range(layers):
                cache.condition(condition).update(layer, keys, keys)
        cache.commit()
    return cache.nbytes


@pytest.mark.parametrize("window", [6, 12, -1])
@pytest.mark.parametrize("conditions", [1, 2])
@pytest.mark.parametrize("frames", [5, 21])
def test_keys_and_values_are_the_real_caches_bytes(window, conditions, frames):
    settings = CausalSettings(window=window, sink=3, positions="absolute")
    clip = ClipSize(settings=settings, frames=frames, rows=4, columns=6, batch=2, conditions=conditions)
    network = replace(WAN_1_3B, layers=3, width=256)
    assert keys_values_bytes(network, clip) == real_cache_bytes(clip, 3, 256)


def test_the_published_sizes_at_480p():
    a_frame = keys_values_bytes(WAN_1_3B, CLIP) / 12
    assert a_frame / 1e9 == pytest.approx(0.29, abs=0.005)
    assert keys_values_bytes(WAN_14B, CLIP) / 12e9 == pytest.approx(1.28, abs=0.005)


def test_the_parts_grow_with_what_they_depend_on_and_with_nothing_else():
    base = forecast(WAN_1_3B, CLIP)
    assert forecast(WAN_1_3B, replace(CLIP, frames=2100)) == base, "a longer clip takes no more"
    guided = forecast(WAN_1_3B, replace(CLIP, conditions=2))
    assert (guided.weights, guided.keys_values, guided.text, guided.forward) == (
        base.weights,
        2 * base.keys_values,
        2 * base.text,
        2 * base.forward,
    )
    decoding = forecast(WAN_1_3B, CLIP, DecoderFacts(weight_bytes=100, cell_bytes=10.0))
    assert decoding.total == base.total + 100 + 10 * 60 * 104
    assert base.total == base.weights + base.working


def test_a_vae_between_forwards_takes_what_it_needs_beyond_one():
    base, cells = forecast(WAN_1_3B, CLIP), 60 * 104
    small, large = (DecoderFacts(weight_bytes=100, cell_bytes=x * base.forward / cells) for x in (0.5, 3))
    assert forecast(WAN_1_3B, CLIP, None, small).total == base.total + 100
    assert forecast(WAN_1_3B, CLIP, None, large).total == pytest.approx(base.total + 100 + 2 * base.forward)
    both = forecast(WAN_1_3B, CLIP, small, large)
    assert both.decoder == pytest.approx(200 + 2.5 * base.forward) and both.forward == base.forward
    needed = forecast(WAN_1_3B, CLIP, None, large).total
    assert changes_that_fit(WAN_1_3B, CLIP, needed - 1, None, large)[0] == Change(weights=FP8)
    assert changes_that_fit(WAN_1_3B, CLIP, needed - WAN_1_3B.weight_bytes, None, large)[0] != Change(weights=FP8)


def test_every_suggestion_fits_and_the_next_milder_does_not():
    available = forecast(WAN_1_3B, CLIP).total - 1
    fp8, int8, window, size = changes_that_fit(WAN_1_3B, CLIP, available, step=2)
    assert (fp8, int8, window) == (Change(weights=FP8), Change(kv_cache_dtype=INT8), Change(window=9))
    assert size == Change(size=size.size)
    rows, columns = size.size
    assert rows % 2 == columns % 2 == 0 and rows < 60
    assert forecast(WAN_1_3B, replace(CLIP, rows=rows, columns=columns)).total <= available
    # Much less: fp8 is not enough, a window of one chunk and the sink is.
    smallest = replace(CLIP, settings=replace(CLIP.settings, window=6))
    found = changes_that_fit(WAN_1_3B, CLIP, forecast(WAN_1_3B, smallest).total, step=2)
    assert Change(window=6) in found and Change(weights=FP8) not in found
    assert Change(kv_cache_dtype=INT8) not in found


def test_a_cache_in_eight_bits_takes_half_and_is_not_suggested_twice():
    in_8_bits = replace(CLIP, settings=replace(CLIP.settings, kv_cache_dtype=INT8))
    full, small = (forecast(WAN_14B, clip).keys_values for clip in (CLIP, in_8_bits))
    # Of each head 128 channels and 4 bytes of scale; and one of 40 layers written out, in bf16.
    assert small / full == pytest.approx((128 + 4) / 256 + 1 / 40)
    found = changes_that_fit(WAN_14B, in_8_bits, forecast(WAN_14B, in_8_bits).total - 1, step=2)
    assert found and all(change.kv_cache_dtype is None for change in found)


def test_a_format_that_the_device_lacks_is_not_suggested():
    available = forecast(WAN_1_3B, CLIP).total - 1
    with_it, without = (changes_that_fit(WAN_1_3B, CLIP, available, step=2, without=names) for names in ((), (FP8,)))
    assert with_it[0] == Change(weights=FP8) and without == [Change(weights=GGUF_Q4), *with_it[1:]]


def test_where_one_change_is_not_enough_they_are_joined():
    lightest = replace(WAN_14B, weight_bytes=round(WAN_14B.parameters * 4.5 / 8))
    smallest = replace(CLIP, settings=replace(CLIP.settings, window=6))
    available = forecast(lightest, smallest).total
    assert changes_that_fit(WAN_14B, CLIP, available, step=2) == [Change(weights=GGUF_Q4, window=6)]
    (joined,) = changes_that_fit(WAN_14B, CLIP, available - 10**9, step=2)
    assert (joined.weights, joined.window) == (GGUF_Q4, 6) and joined.size < (60, 104)
    assert changes_that_fit(WAN_14B, CLIP, 10**6, step=2) == []


def test_attention_to_the_whole_clip_is_told_to_take_a_window():
    clip = replace(CLIP, frames=300, settings=CausalSettings(window=-1, sink=3, positions="absolute"))
    available = forecast(WAN_1_3B, replace(clip, settings=CausalSettings(window=27, sink=3))).total
    assert Change(window=27) in changes_that_fit(WAN_1_3B, clip, available, step=2)


def test_the_window_that_is_suggested_is_the_largest_that_fits():
    rng, found = random.Random(3), set()
    for _ in range(300):
        chunk, sink = rng.randint(1, 4), rng.randint(0, 5)
        window = rng.choice((-1, rng.randint(sink + chunk, 60)))
        settings = CausalSettings(frames_per_chunk=chunk, window=window, sink=sink)
        clip = replace(CLIP, settings=settings, frames=rng.randint(1, 60))
        smallest, used = chunk + max(sink, chunk), settings.capacity(clip.frames)
        smaller = [
            replace(clip, settings=replace(settings, window=each)) for each in range(used - chunk, smallest - 1, -chunk)
        ]
        least, most = (forecast(WAN_1_3B, each).total for each in ((smaller or [clip])[-1], clip))
        available = rng.randint(least - 10**8, most)
        fitting = [each.settings.window for each in smaller if forecast(WAN_1_3B, each).total <= available]
        changes = changes_that_fit(WAN_1_3B, clip, available, step=2)
        alone = [each.window for each in changes if each == Change(window=each.window)]
        assert alone == fitting[:1]
        joined = [each.window for each in changes if each.weights and each.window]
        assert joined in ([], [smaller[-1].settings.window] if smaller else [])
        found |= {bool(alone), 2 + bool(joined)}
    assert found >= {False, True, 2}


def test_a_clip_of_a_day_is_answered_at_once(monkeypatch):
    tried = []
    monkeypatch.setattr(memory, "forecast", lambda *arguments: tried.append(1) or forecast(*arguments))
    clip = replace(CLIP, frames=30_000, settings=CausalSettings(frames_per_chunk=1, window=-1, sink=0))
    available = forecast(WAN_1_3B, replace(clip, settings=replace(clip.settings, window=7))).total
    assert changes_that_fit(WAN_1_3B, clip, available) == [Change(window=7)]
    assert len(tried) < 50


@pytest.fixture
def little_address_space():
    """A process that may map 4 GB more than it has."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("what a process has mapped is not known here")
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_file_larger_than_the_memory_is_described(tmp_path, little_address_space):
    """14B in float32 is 57 GB; the file here is one hole behind its header. It is not mapped, which Windows counts as
    memory."""
    dims = WanDims(dim=5120, depth=40, ffn_dim=13824, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16)
    header, end = {}, 0
    for name, shape in expected_shapes(dims).items():
        begin, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    path = tmp_path / "wan_14b.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    info = inspect_checkpoint(path).info
    assert (info.dims, info.dtype, info.parameters) == (dims, "float32", end // 4)
    assert read_weight_file(path, read_safetensors=lambda path: {"a": torch.zeros(1)}).tree.keys() == {"a"}


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def gguf(tensors: dict[str, tuple[int, ...]], entries: bytes = b"", count: int = 0, data: int = 100) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + entries
    for name, shape in tensors.items():
        header += text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", 0, 0)
    return header + bytes(-len(header) % 32) + bytes(data)


def test_a_gguf_header_gives_names_shapes_and_the_datas_length(tmp_path):
    path = tmp_path / "wan.gguf"
    entries = text("general.architecture") + struct.pack("<I", 8) + text("wan")
    shape = text("comfy.gguf.orig_shape.patch") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 8, 2, 2)
    path.write_bytes(gguf({"linear": (8, 4), "patch": (8, 4)}, entries + shape, 2, data=640))
    header = read_gguf_header(path)
    assert header.shapes == {"linear": (8, 4), "patch": (8, 2, 2)}
    assert header.data_bytes == 640


@pytest.mark.parametrize("cut", [3, 6, 20, 30, 50])
def test_a_damaged_gguf_file_is_refused(tmp_path, cut):
    path = tmp_path / "wan.gguf"
    path.write_bytes(gguf({"linear": (8, 4)}, data=0)[:cut])
    with pytest.raises(ValueError, match="'wan.gguf' is (no|a damaged) GGUF file"):
        read_gguf_header(path)


def test_a_gguf_header_that_asks_for_the_moon_is_refused(tmp_path):
    path = tmp_path / "wan.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0))
    with pytest.raises(ValueError, match="damaged"):
        read_gguf_header(path)


def test_a_gguf_header_is_not_read_without_end(tmp_path, monkeypatch):
    path, (alignment, padding) = tmp_path / "wan.gguf", (64, 50_000)
    entries = text("padding") + struct.pack("<IIQ", 9, 0, padding) + bytes(padding)
    entries += text("general.alignment") + struct.pack("<II", 4, alignment)
    path.write_bytes(gguf({"linear": (8, 4)}, entries, 2, data=640))
    assert read_gguf_header(path).shapes == {"linear": (8, 4)}
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", padding)
    with pytest.raises(ValueError, match="damaged"):
        read_gguf_header(path)
