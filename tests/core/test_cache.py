"""The KV cache against a list of unrotated keys, and its bookkeeping against the rule in one line."""

import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_wan import ListKV, kept_frames, normal, split

from diagonal_sampler import cache as cache_module
from diagonal_sampler.cache import ConditionKV, KVCache
from diagonal_sampler.dit import causal_views
from diagonal_sampler.kv_buffers import Int8Buffer
from diagonal_sampler.rope import rotate, rotate_time_, rotation_table
from diagonal_sampler.settings import KV_CACHE_DTYPES, CausalSettings

HEADS, HEAD_DIM, TOKENS = 2, 128, 2

# window, sink, frames per chunk, frames of the clip: rings of a whole number of chunks and not, no sink, a sink that
# is no whole number of chunks, one ring slot, chunks of one frame, a shorter last chunk, a clip inside the window.
CASES = [
    (12, 3, 3, 21),
    (12, 0, 3, 20),
    (10, 3, 3, 23),
    (7, 2, 3, 16),
    (8, 4, 3, 19),
    (6, 3, 3, 14),
    (5, 1, 1, 12),
    (9, 1, 4, 22),
    (4, 3, 1, 9),
    (12, 3, 3, 8),
    (-1, 3, 3, 11),
]


def settings_of(
    window: int, sink: int, chunk: int, positions: str = "absolute", kv_cache_dtype: str = "default"
) -> CausalSettings:
    return CausalSettings(
        frames_per_chunk=chunk, window=window, sink=sink, positions=positions, kv_cache_dtype=kv_cache_dtype
    )


def random_settings(rng: random.Random, positions: str = "absolute") -> tuple[CausalSettings, int]:
    chunk, sink = rng.randint(1, 4), rng.randint(0, 5)
    window = sink + chunk + rng.randint(0, 8)
    return settings_of(window, sink, chunk, positions), rng.randint(1, 3 * window)


def table(frames: int, position: float) -> torch.Tensor:
    return rotation_table(frames, 1, TOKENS, HEAD_DIM, start=position)


def tagged(frames: range, batch: int = 1) -> torch.Tensor:
    """Keys or values that say which latent frame they belong to."""
    tags = torch.tensor([float(frame) for frame in frames]).repeat_interleave(TOKENS)
    return tags[None, :, None, None].expand(batch, -1, HEADS, HEAD_DIM).contiguous()


def attended_frames(values: torch.Tensor) -> list[int]:
    """The tags found in values [B, L, N, D], sorted; every token of a frame must be there."""
    tags = values[0, :, 0, 0].view(-1, TOKENS)
    assert torch.equal(tags[:, :1].expand_as(tags), tags)
    return sorted(int(tag) for tag in tags[:, 0])


@torch.no_grad()
def fill(cache: KVCache, condition: ConditionKV, chunks: int, chunk: int = 3, layers: int = 1) -> None:
    """Commit `chunks` tagged chunks."""
    for _ in range(chunks):
        cache.begin(chunk)
        tags = tagged(range(cache.committed, cache.committed + chunk))
        for layer in range(layers):
            condition.update(layer, tags, tags)
        cache.commit()


# What is kept, and where it stands


@torch.no_grad()
def check_kept_frames(settings: CausalSettings, total: int) -> None:
    cache = KVCache(settings, total)
    condition = cache.condition("only")
    for start, stop in split(total, settings.frames_per_chunk):
        cache.begin(stop - start)
        kept = kept_frames(stop, settings.window, settings.sink)
        tags = tagged(range(start, stop))
        _, values = condition.update(0, tags, tags)
        assert attended_frames(values) == kept
        assert cache.committed == start
        assert cache.filled == len(kept)
        assert cache.evicted == stop - len(kept)
        cache.commit()
        assert cache.committed == stop
    # A clip inside the window takes its own length, not the window's.
    assert cache.nbytes == 2 * len(kept) * TOKENS * HEADS * HEAD_DIM * 4


@pytest.mark.parametrize(("window", "sink", "chunk", "total"), CASES)
def test_each_chunk_sees_sink_newest_history_and_itself(window, sink, chunk, total):
    check_kept_frames(settings_of(window, sink, chunk), total)


def test_each_chunk_sees_sink_newest_history_and_itself_for_any_sizes():
    rng = random.Random(0)
    for _ in range(60):
        check_kept_frames(*random_settings(rng))


@torch.no_grad()
def test_chunks_of_different_sizes_share_a_clip():
    """A start image of one frame, then chunks of three, then a rest of two."""
    settings = settings_of(7, 1, 3)
    cache = KVCache(settings, 15)
    condition = cache.condition("only")
    start = 0
    for frames in (1, 3, 3, 3, 3, 2):
        cache.begin(frames)
        tags = tagged(range(start, start + frames))
        start += frames
        assert attended_frames(condition.update(0, tags, tags)[1]) == kept_frames(start, 7, 1)
        cache.commit()


def test_views_of_a_whole_clip_follow_the_same_rule():
    rng = random.Random(1)
    for _ in range(60):
        settings, total = random_settings(rng)
        if rng.random() < 0.2:
            settings = settings_of(-1, settings.sink, settings.frames_per_chunk)
        tokens = rng.choice((1, 4))
        chunks = split(total, settings.frames_per_chunk)
        views = causal_views(total, tokens, settings)
        assert [(view.queries.start, view.queries.stop) for view in views] == [
            (start * tokens, stop * tokens) for start, stop in chunks
        ]
        rows = torch.arange(total * tokens)
        for (_, stop), view in zip(chunks, views, strict=True):
            seen = view.keys_of(rows.view(1, 1, -1, 1)).flatten()
            kept = kept_frames(stop, settings.window, settings.sink)
            assert seen.tolist() == [row for row in rows.tolist() if row // tokens in kept]


# Positions


def test_position_of_the_query():
    absolute = KVCache(settings_of(12, 3, 3), 30)
    window = KVCache(settings_of(12, 3, 3, "window"), 30)
    for chunk in range(10):
        absolute.begin(3)
        window.begin(3)
        assert absolute.position == 3 * chunk
        assert window.position == min(3 * chunk, 9)
        absolute.commit()
        window.commit()


def test_auto_counts_in_the_window_only_beyond_the_trained_length():
    auto = settings_of(12, 3, 3, "auto")
    assert not auto.window_positions(21)
    assert auto.window_positions(22)
    assert not settings_of(12, 3, 3, "absolute").window_positions(1000)
    assert settings_of(12, 3, 3, "window").window_positions(5)
    assert not settings_of(-1, 3, 3, "window").window_positions(1000)


@torch.no_grad()
def check_against_list(
    settings: CausalSettings, total: int, scale: float, batch: int, forwards: int, atol: float = 1e-5
) -> None:
    """Attention through the cache equals attention over an unrotated list, chunk by chunk."""
    cache = KVCache(settings, total, time_scale=scale)
    reference = ListKV(settings, total, scale)
    condition = cache.condition("only")
    for seed, (start, stop) in enumerate(split(total, settings.frames_per_chunk)):
        cache.begin(stop - start)
        reference.begin(stop - start)
        assert cache.position == pytest.approx(reference.position)
        turns = table(stop - start, reference.position)
        for forward in range(forwards):
            q, k, v = normal(100 * seed + forward, 3, batch, (stop - start) * TOKENS, HEADS, HEAD_DIM)
            q, k = rotate(q, turns), rotate(k, turns)
            found, expected = (
                F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, *kv.update(0, k, v))))
                for kv in (condition, reference)
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        cache.commit()
        reference.commit()


@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize(("window", "sink", "chunk", "total"), CASES)
def test_attention_equals_a_list_of_unrotated_keys(window, sink, chunk, total, positions):
    check_against_list(settings_of(window, sink, chunk, positions), total, scale=1.0, batch=2, forwards=1)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_time_scale_and_several_forwards(scale):
    for window, sink, chunk, total in ((7, 2, 3, 16), (6, 0, 3, 15)):
        check_against_list(settings_of(window, sink, chunk, "window"), total, scale, batch=1, forwards=2)


def test_attention_equals_the_list_for_any_sizes():
    rng = random.Random(2)
    for _ in range(12):
        settings, total = random_settings(rng, "window")
        check_against_list(settings, min(total, 25), scale=1.0, batch=1, forwards=1)


def test_inside_the_window_both_kinds_of_positions_are_the_same():
    caches = [KVCache(settings_of(12, 3, 3, positions), 12) for positions in ("absolute", "window")]
    conditions = [cache.condition("only") for cache in caches]
    with torch.no_grad():
        for seed in range(4):
            for cache in caches:
                cache.begin(3)
            assert caches[0].position == caches[1].position
            k, v = normal(seed, 2, 1, 3 * TOKENS, HEADS, HEAD_DIM)
            absolute, window = (condition.update(0, k, v) for condition in conditions)
            assert torch.equal(absolute[0], window[0])
            assert torch.equal(absolute[1], window[1])
            for cache in caches:
                cache.commit()


@torch.no_grad()
def test_the_two_kinds_of_positions_differ_once_a_frame_has_gone():
    """Else every test of window positions above would pass without them."""
    results = []
    for positions in ("absolute", "window"):
        cache = KVCache(settings_of(6, 2, 2, positions), 10)
        condition = cache.condition("only")
        for seed in range(5):
            cache.begin(2)
            k, v = normal(seed, 2, 1, 2 * TOKENS, HEADS, HEAD_DIM)
            turns = table(2, cache.position)
            keys, values = condition.update(0, rotate(k, turns), v)
            q = rotate(normal(50, 1, 2 * TOKENS, HEADS, HEAD_DIM), turns)
            cache.commit()
        results.append(F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, keys, values))))
    assert (results[0] - results[1]).abs().max() > 0.05


@torch.no_grad()
def test_a_thousand_frames_in_bf16_keep_memory_and_precision():
    """Positions inside the window: the last chunk is as exact as an early one, in the same buffer."""
    settings = settings_of(12, 3, 3, "window")
    cache = KVCache(settings, 1000)
    exact = ListKV(settings, 1000)
    condition = cache.condition("only")
    errors, places = [], set()
    for seed, (start, stop) in enumerate(split(1000, 3)):
        cache.begin(stop - start)
        exact.begin(stop - start)
        turns = table(stop - start, cache.position)
        q, k, v = normal(seed, 3, 1, (stop - start) * TOKENS, HEADS, HEAD_DIM).bfloat16()
        keys, values = condition.update(0, rotate(k, turns), v)
        places.add((keys.data_ptr(), values.data_ptr()))
        check = seed in range(4, 10) or seed in range(320, 330)
        listed = exact.update(0, rotate(k.float(), turns), v.float())
        if check:
            q = rotate(q.float(), turns)
            found, expected = (
                F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q, *kv)))
                for kv in ((keys, values), listed)
            )
            errors.append((found - expected).abs().max().item())
        cache.commit()
        exact.commit()
        exact.history[0][3:-12] = [None] * max(0, len(exact.history[0]) - 15)  # what has gone needs no memory
        assert cache.nbytes == 2 * 2 * 12 * TOKENS * HEADS * HEAD_DIM
    assert len(places) == 1
    early, late = max(errors[:6]), max(errors[6:])
    assert late < 0.05
    assert late < 2 * early


@torch.no_grad()
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_keys_of_a_wide_window_are_moved_in_pieces_and_bit_for_bit_as_at_once(kv_cache_dtype, monkeypatch):
    """What is moved at once bounds what moving takes besides; a window of 12 needs no pieces."""
    lengths = []

    def watched(keys, frames):
        lengths.append(keys.shape[1] // TOKENS)
        rotate_time_(keys, frames)

    monkeypatch.setattr("diagonal_sampler.kv_buffers.rotate_time_", watched)

    def moved(window: int, at_once: int) -> list[torch.Tensor]:
        monkeypatch.setattr(cache_module, "MOVED_FRAMES", at_once)
        lengths.clear()
        cache = KVCache(settings_of(window, 3, 3, "window", kv_cache_dtype), 2 * window)
        condition, found = cache.condition("only"), []
        for seed, (start, stop) in enumerate(split(2 * window, 3)):
            cache.begin(stop - start)
            own = normal(seed, 2, 1, (stop - start) * TOKENS, HEADS, HEAD_DIM).bfloat16()
            found.append(condition.update(0, *own)[0].clone())
            cache.commit()
        return found

    at_once = cache_module.MOVED_FRAMES
    whole = moved(48, 1000)
    assert max(lengths) == 42
    pieces = moved(48, at_once)
    assert max(lengths) == at_once < 42
    assert all(torch.equal(one, other) for one, other in zip(pieces, whole, strict=True))
    moved(12, 1000)
    runs = lengths.copy()
    moved(12, at_once)
    assert lengths == runs and max(runs) == 6


# Overwriting and memory


@torch.no_grad()
def test_only_the_last_forward_of_a_chunk_counts():
    rng = random.Random(3)
    for window, sink, chunk, total in CASES[:6]:
        results = []
        for forwards in (1, 3):
            cache = KVCache(settings_of(window, sink, chunk, "window"), total)
            condition = cache.condition("only")
            for seed, (start, stop) in enumerate(split(total, chunk)):
                cache.begin(stop - start)
                for _ in range(forwards - 1):
                    junk = normal(rng.randrange(10**6), 2, 1, (stop - start) * TOKENS, HEADS, HEAD_DIM)
                    condition.update(0, *junk)
                last = condition.update(0, *normal(seed, 2, 1, (stop - start) * TOKENS, HEADS, HEAD_DIM))
                results.append([t.clone() for t in last])
                cache.commit()
        half = len(results) // 2
        for once, often in zip(results[:half], results[half:], strict=True):
            assert torch.equal(once[0], often[0])
            assert torch.equal(once[1], often[1])


@torch.no_grad()
def test_a_prediction_beside_the_chunks_own_sees_itself_and_leaves_the_cache_alone():
    """Guidance asks a weakened network for the same step again."""
    cache, condition = history_cache()
    own, other = tagged(range(9, 12)), tagged(range(90, 93))
    condition.update(0, own, own)
    keys, values = condition.update(0, other, other, write=False)
    assert attended_frames(keys) == attended_frames(values) == [0, 1, 7, 8, 90, 91, 92]
    keys.fill_(-1)
    values.fill_(-1)
    cache.commit()
    cache.begin(3)
    keys, values = condition.update(0, tagged(range(12, 15)), tagged(range(12, 15)))
    assert attended_frames(keys) == attended_frames(values) == [0, 1, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("positions", ["absolute", "window"])
@torch.no_grad()
def test_a_window_can_be_written_again_any_number_of_times(positions):
    cache = KVCache(settings_of(7, 2, 3, positions), 40)
    condition = cache.condition("only")
    fill(cache, condition, chunks=4)
    for _ in range(3):
        for run in cache.rewind(3):
            cache.skip_to(run.start)
            fill(cache, condition, chunks=len(run), chunk=1)
        start = cache.committed
        cache.begin(3)
        tags = tagged(range(start, start + 3))
        _, values = condition.update(0, tags, tags)
        assert attended_frames(values) == kept_frames(start + 3, 7, 2)
        cache.commit()


@torch.no_grad()
def test_one_allocation_for_the_whole_clip():
    cache = KVCache(settings_of(7, 2, 3, "window"), 40)
    condition = cache.condition("only")
    places, sizes = set(), set()
    for start, stop in split(40, 3):
        cache.begin(stop - start)
        for _ in range(2):
            for layer in range(2):
                tags = tagged(range(start, stop))
                keys, values = condition.update(layer, tags, tags)
                places.add((layer, keys.data_ptr(), values.data_ptr()))
        cache.commit()
        sizes.add(cache.nbytes)
    assert len(places) == 2
    assert len(sizes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "sink", "chunk", "total"), CASES)
def test_bytes_are_known_before_they_are_taken(window, sink, chunk, total, dtype):
    settings = settings_of(window, sink, chunk)
    cache = KVCache(settings, total)
    needed = KVCache.bytes_needed(
        settings,
        total,
        layers=3,
        tokens_per_frame=TOKENS,
        width=HEADS * HEAD_DIM,
        element_bytes=dtype.itemsize,
        batch=2,
        conditions=2,
    )
    assert cache.nbytes == 0
    with torch.no_grad():
        frames = min(chunk, total)
        cache.begin(frames)
        for name in ("positive", "negative"):
            for layer in range(3):
                tags = tagged(range(frames), batch=2).to(dtype)
                cache.condition(name).update(layer, tags, tags)
    assert cache.nbytes == needed


def test_design_figures_of_the_published_models():
    """0.29 GB a latent frame for 1.3B and 1.28 GB for 14B, at 832x480 in bf16."""
    one = settings_of(-1, 0, 1)
    for layers, width, gigabytes in ((30, 1536, 0.29), (40, 5120, 1.28)):
        size = KVCache.bytes_needed(one, 1, layers=layers, tokens_per_frame=1560, width=width, element_bytes=2)
        assert size / 1e9 == pytest.approx(gigabytes, abs=0.005)


@torch.no_grad()
def test_keys_and_values_keep_their_own_dtype():
    """Under autocast normalised keys are float32 and values bf16."""
    cache = KVCache(settings_of(6, 0, 3), 6)
    cache.begin(3)
    keys, values = cache.condition("only").update(0, tagged(range(3)), tagged(range(3)).bfloat16())
    assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16)


@torch.no_grad()
def test_free_releases_the_buffers_at_once_even_while_a_condition_is_held():
    cache = KVCache(settings_of(6, 3, 3), 9)
    condition = cache.condition("only")
    gc.disable()
    try:
        cache.begin(3)
        keys, values = condition.update(0, tagged(range(3)), tagged(range(3)))
        buffers = [weakref.ref(keys._base), weakref.ref(values._base)]
        del keys, values
        assert all(buffer() is not None for buffer in buffers)
        cache.free()
        assert all(buffer() is None for buffer in buffers)
        assert cache.nbytes == 0
    finally:
        gc.enable()


@torch.no_grad()
def test_conditions_do_not_leak_into_each_other():
    settings, total = settings_of(7, 2, 3, "window"), 20
    together = KVCache(settings, total)
    alone = {name: KVCache(settings, total) for name in ("positive", "negative")}
    for seed, (start, stop) in enumerate(split(total, 3)):
        together.begin(stop - start)
        for offset, (name, own) in enumerate(alone.items()):
            own.begin(stop - start)
            k, v = normal(2 * seed + offset, 2, 1, (stop - start) * TOKENS, HEADS, HEAD_DIM)
            shared = together.condition(name).update(0, k, v)
            single = own.condition("only").update(0, k, v)
            assert torch.equal(shared[0], single[0])
            assert torch.equal(shared[1], single[1])
            own.commit()
        together.commit()


# Gradients


def history_cache() -> tuple[KVCache, ConditionKV]:
    cache = KVCache(settings_of(7, 2, 3), 20)
    condition = cache.condition("only")
    fill(cache, condition, chunks=3)
    cache.begin(3)
    return cache, condition


def chunk_tensors(keys_train: bool, values_train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = normal(7, 2, 1, 3 * TOKENS, HEADS, HEAD_DIM)
    return k.requires_grad_(keys_train), v.requires_grad_(values_train)


@pytest.mark.parametrize(("keys_train", "values_train"), [(True, True), (True, False), (False, True)])
def test_gradients_reach_the_current_chunk(keys_train, values_train):
    """Also when only one of them is trained, as a LoRA on the values alone would."""
    cache, condition = history_cache()
    k, v = chunk_tensors(keys_train, values_train)
    keys, values = condition.update(0, k, v)
    assert sorted(values[0, :, 0, 0].tolist()) == sorted(
        [*tagged(range(0, 2))[0, :, 0, 0].tolist(), *tagged(range(7, 9))[0, :, 0, 0].tolist(), *v[0, :, 0, 0].tolist()]
    )
    (keys.sum() + 2 * values.sum()).backward()
    assert not keys_train or torch.equal(k.grad, torch.ones_like(k))
    assert not values_train or torch.equal(v.grad, torch.full_like(v, 2))


def test_backward_survives_the_next_chunks_writes():
    """Also when only the queries are trained: their gradient needs the keys as they were."""
    grads = []
    for write_on in (False, True):
        cache, condition = history_cache()
        q = normal(8, 1, 3 * TOKENS, HEADS, HEAD_DIM).requires_grad_()
        keys, values = condition.update(0, *chunk_tensors(False, False))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, keys, values)))
        if write_on:
            cache.commit()
            fill(cache, condition, chunks=2)
        out.square().sum().backward()
        grads.append(q.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


def test_the_buffer_holds_no_graph():
    cache, condition = history_cache()
    condition.update(0, *chunk_tensors(True, True))
    cache.commit()
    cache.begin(3)
    with torch.no_grad():
        keys, values = condition.update(0, *chunk_tensors(False, False))
    assert keys._base.grad_fn is None and not keys._base.requires_grad
    assert values._base.grad_fn is None and not values._base.requires_grad


# In 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_are_off_by_half_a_level_of_each_heads_largest_channel(dtype):
    sizes = torch.tensor([1e-3, 1.0, 50.0])[None, :, None, None]  # of each token
    x = (normal(0, 2, 3, HEADS, HEAD_DIM) * sizes).to(dtype)
    x[0, 1, 1] = 0
    buffer = Int8Buffer.like(x, 5)
    buffer.write(slice(1, 4), x)
    found = buffer.read(slice(1, 4), torch.float32)
    most = x.float().abs().amax(-1, keepdim=True) / 254
    assert ((found - x.float()).abs() <= most * 1.001).all()
    assert ((found - x.float()).abs() > most / 2).any()
    assert buffer.read(slice(1, 4), dtype).dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_eight_bits(value):
    x = normal(0, 1, 2, HEADS, HEAD_DIM)
    x[0, 0, 1, 3] = value
    buffer = Int8Buffer.like(x, 2)
    buffer.write(slice(0, 2), x)
    found = buffer.read(slice(0, 2), torch.float32)
    assert not found[0, 0, 1].isfinite().all()
    assert found[0, 0, 0].isfinite().all() and found[0, 1].isfinite().all()


@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize(("window", "sink", "chunk", "total"), CASES)
def test_attention_over_eight_bits_is_near_that_over_a_list_of_unrotated_keys(window, sink, chunk, total, positions):
    settings = settings_of(window, sink, chunk, positions, "int8")
    check_against_list(settings, total, scale=1.0, batch=2, forwards=2, atol=0.04)
    if total > chunk:
        with pytest.raises(AssertionError):
            check_against_list(settings, total, scale=1.0, batch=2, forwards=2, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("write", [True, False])
def test_the_current_chunk_sees_itself_exactly(write):
    cache = KVCache(settings_of(7, 2, 3, "window", "int8"), 20)
    for _ in range(3):
        one_chunk(cache, ("only",))
    cache.begin(3)
    before = one_forward(cache, ("only",))[0]
    keys, values = normal(7, 2, 1, 3 * TOKENS, HEADS, HEAD_DIM)
    for own, found in zip((keys, values), cache.condition("only").update(0, keys, values, write=write), strict=True):
        assert all((token == found).flatten(2).all(-1).any() for token in own[0].unbind())
        assert found.shape[1] == cache.filled * TOKENS
    # The chunk lies in the buffer's ring, so that what is before it stands where it stood.
    sink = 2 * TOKENS
    assert torch.equal(cache.condition("only").update(0, keys, values)[0][:, :sink], before[:, :sink])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_eight_bits_are_known_with_one_layer_written_out(dtype):
    settings = settings_of(12, 3, 3, kv_cache_dtype="int8")
    cache = KVCache(settings, 21)
    cache.begin(3)
    tags = tagged(range(3), batch=2).to(dtype)
    for name in ("positive", "negative"):
        for layer in range(3):
            cache.condition(name).update(layer, tags, tags)
    width, tokens = HEADS * HEAD_DIM, 12 * TOKENS
    sizes = dict(layers=3, tokens_per_frame=TOKENS, width=width, element_bytes=dtype.itemsize, batch=2, conditions=2)
    assert KVCache.bytes_needed(settings, 21, **sizes) == cache.nbytes + 2 * 2 * tokens * width * dtype.itemsize
    assert cache.nbytes == 2 * 3 * 2 * 2 * tokens * (width + 4 * HEADS)


# Snapshots


@torch.no_grad()
def one_chunk(cache: KVCache, names: tuple[str, ...]) -> list[torch.Tensor]:
    """Commit a chunk of random keys and values in two layers of each condition; what they attend to, copied."""
    cache.begin(min(cache.settings.frames_per_chunk, cache.total_frames - cache.committed))
    seen = one_forward(cache, names)
    cache.commit()
    return seen


@torch.no_grad()
def one_forward(cache: KVCache, names: tuple[str, ...]) -> list[torch.Tensor]:
    """The same inside a chunk."""
    seen = []
    for number, name in enumerate(names):
        for layer in range(2):
            seed = 100 * cache.committed + 10 * number + layer
            keys, values = normal(seed, 2, 1, cache.frames * TOKENS, HEADS, HEAD_DIM)
            seen += [tensor.clone() for tensor in cache.condition(name).update(layer, keys, values)]
    return seen


@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize("made", [1, 2, 4])
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_a_restored_cache_goes_on_bit_by_bit_whatever_the_order_of_the_snapshot(positions, made, kv_cache_dtype):
    """A file gives its tensors in an order of its own; and another run calls its conditions by other names."""
    settings = settings_of(7, 2, 3, positions, kv_cache_dtype)
    cache = KVCache(settings, 20)
    for _ in range(made):
        one_chunk(cache, ("positive", "negative"))
    snapshot = cache.snapshot()
    before = {name: tensor.clone() for name, tensor in snapshot.items()}
    restored = KVCache(settings, 20)
    restored.restore(cache.committed, dict(reversed(snapshot.items())))
    while cache.committed < cache.total_frames:
        assert restored.position == cache.position
        expected, found = one_chunk(cache, ("positive", "negative")), one_chunk(restored, ("first", "second"))
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    # Neither run writes into the snapshot: it is a copy, also on a CPU.
    assert all(torch.equal(before[name], snapshot[name]) for name in before)


@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize("forwards", [0, 0.5, 1, 2])
@pytest.mark.parametrize("made", [1, 2, 4])
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_a_snapshot_inside_a_chunk_has_it_made_again_bit_by_bit(positions, forwards, made, kv_cache_dtype):
    names = ("positive", "negative")
    settings = settings_of(7, 2, 3, positions, kv_cache_dtype)
    whole, stopped = KVCache(settings, 20), KVCache(settings, 20)
    for cache in (whole, stopped):
        for _ in range(made):
            one_chunk(cache, names)
    stopped.begin(3)
    for _ in range(int(forwards)):
        one_forward(stopped, names)
    if forwards == 0.5:  # broken off behind the first layer of the first condition
        keys, values = normal(1, 2, 1, 3 * TOKENS, HEADS, HEAD_DIM)
        stopped.condition("positive").update(0, keys, values)
    restored = KVCache(settings, 20)
    restored.restore(stopped.committed, stopped.snapshot(), moved=stopped.moved, begun=stopped.begun)
    if made > 1:
        with pytest.raises(ValueError, match="in a chunk of 3 latent frames, which lie over history that one of 2"):
            restored.begin(2)
    while whole.committed < whole.total_frames:
        assert restored.position == whole.position
        expected, found = one_chunk(whole, names), one_chunk(restored, names)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize(("stopped_at", "goes_on_at"), [(7, 20), (20, 7)], ids=str)
def test_a_snapshot_in_a_chunk_goes_on_in_a_clip_that_counts_positions_otherwise(stopped_at, goes_on_at):
    """Positions auto are absolute in a clip of 7 latent frames, and the window's in one of 20; none had to go yet."""
    settings = {
        total: settings_of(6, 2, 3, "window" if total == 20 else "absolute") for total in (stopped_at, goes_on_at)
    }
    stopped, whole = (KVCache(settings[total], 20) for total in (stopped_at, goes_on_at))
    for cache in (stopped, whole):
        for _ in range(2):
            one_chunk(cache, ("only",))
    stopped.begin(3)
    one_forward(stopped, ("only",))
    restored = KVCache(settings[goes_on_at], 20)
    restored.restore(stopped.committed, stopped.snapshot(), moved=stopped.moved, begun=stopped.begun)
    for _ in range(2):
        for expected, found in zip(one_chunk(whole, ("only",)), one_chunk(restored, ("only",)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize("made", [1, 2, 4])
def test_a_snapshot_in_a_short_chunk_goes_on_with_a_longer_one(positions, made):
    settings = settings_of(7, 2, 3, positions)
    whole, stopped = KVCache(settings, 20), KVCache(settings, 20)
    for cache in (whole, stopped):
        for _ in range(made):
            one_chunk(cache, ("only",))
    stopped.begin(2)
    one_forward(stopped, ("only",))
    restored = KVCache(settings, 20)
    restored.restore(stopped.committed, stopped.snapshot(), moved=stopped.moved, begun=stopped.begun)
    for _ in range(2):
        for expected, found in zip(one_chunk(whole, ("only",)), one_chunk(restored, ("only",)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_window_of_one_chunk_leaves_a_snapshot_of_nothing_and_goes_on():
    """Behind a rewind it sees nothing of what was: all of it is left out."""
    settings = settings_of(3, 0, 3)
    whole, stopped = KVCache(settings, 12), KVCache(settings, 12)
    for cache in (whole, stopped):
        one_chunk(cache, ("only",))
        for run in cache.rewind(3):
            cache.skip_to(run.start)
        cache.begin(3)
        one_forward(cache, ("only",))
    whole.frames = 0
    restored = KVCache(settings, 12)
    restored.restore(3, stopped.snapshot(), dropped=stopped.dropped, moved=stopped.moved, begun=stopped.begun)
    for expected, found in zip(one_chunk(whole, ("only",)), one_chunk(restored, ("only",)), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("sink", [0, 2])
def test_a_snapshot_without_keys_has_its_window_written_again(sink):
    """What a Cancel leaves of a cache that is being written again: another clip is made as if it had not come."""
    settings = settings_of(7, sink, 3, "window")
    whole, stopped = KVCache(settings, 20), KVCache(settings, 20)
    for cache in (whole, stopped):
        for _ in range(3):
            one_chunk(cache, ("only",))
    stopped.rewind(3)
    stopped.begin(2)
    one_forward(stopped, ("only",))
    stopped.forget(9)
    assert stopped.nbytes == stopped.begun == stopped.dropped == 0 and stopped.snapshot() == {}
    restored = KVCache(settings, 20)
    restored.restore(9, {}, moved=stopped.moved)
    for cache in (whole, restored):
        for run in cache.rewind(3):
            cache.skip_to(run.start)
            while cache.committed < run.stop:
                cache.begin(1)
                one_forward(cache, ("only",))
                cache.commit()
    assert all(torch.equal(*pair) for pair in zip(*(one_chunk(c, ("only",)) for c in (whole, restored)), strict=True))


@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_a_snapshot_begun_in_a_chunk_may_be_written_again_for_one_of_another_length(positions):
    settings = settings_of(7, 2, 3, positions)
    whole, stopped = KVCache(settings, 20), KVCache(settings, 20)
    for cache in (whole, stopped):
        for _ in range(3):
            one_chunk(cache, ("only",))
    stopped.begin(3)
    one_forward(stopped, ("only",))
    restored = KVCache(settings, 20)
    restored.restore(stopped.committed, stopped.snapshot(), moved=stopped.moved, begun=stopped.begun)
    with pytest.raises(ValueError, match="in a chunk of 3 latent frames, which lie over history that one of 2"):
        restored.begin(2)
    seen = []
    for cache in (whole, restored):
        for run in cache.rewind(2):
            cache.skip_to(run.start)
            while cache.committed < run.stop:
                cache.begin(1)
                one_forward(cache, ("only",))
                cache.commit()
        cache.begin(2)
        seen.append(one_forward(cache, ("only",)))
        cache.commit()
        seen[-1] += one_chunk(cache, ("only",))
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_the_last_chunk_can_be_opened_again_for_a_snapshot_of_before_it(positions):
    settings = settings_of(7, 2, 3, positions)
    whole, stopped = KVCache(settings, 20), KVCache(settings, 20)
    for cache, chunks in ((whole, 3), (stopped, 4)):
        for _ in range(chunks):
            one_chunk(cache, ("only",))
    stopped.reopen(3)
    restored = KVCache(settings, 20)
    restored.restore(stopped.committed, stopped.snapshot(), moved=stopped.moved, begun=stopped.begun)
    expected, found = one_chunk(whole, ("only",)), one_chunk(restored, ("only",))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    with pytest.raises(RuntimeError, match="inside a chunk"):
        stopped.reopen(3)


@pytest.mark.parametrize(
    ("committed", "dropped", "words"),
    [
        (20, 0, "ends at latent frame 20"),
        (0, 0, "ends at latent frame 0"),
        (6, 7, "dropped is 7"),
        (6, -1, "dropped is -1"),
        (5, 0, "keys has 12 tokens, no multiple of the 5"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(committed, dropped, words):
    settings = settings_of(7, 2, 3)
    cache = KVCache(settings, 20)
    fill(cache, cache.condition("only"), chunks=2)
    with pytest.raises(ValueError, match=words):
        KVCache(settings, 20).restore(committed, cache.snapshot(), dropped=dropped)


@pytest.mark.parametrize("taken", KV_CACHE_DTYPES)
def test_a_snapshot_in_another_number_format_is_refused(taken):
    cache = KVCache(settings_of(7, 2, 3, kv_cache_dtype=taken), 20)
    fill(cache, cache.condition("only"), chunks=2)
    (wanted,) = set(KV_CACHE_DTYPES) - {taken}
    with pytest.raises(ValueError, match=f"kv_cache_dtype '{wanted}' has"):
        KVCache(settings_of(7, 2, 3, kv_cache_dtype=wanted), 20).restore(6, cache.snapshot())


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0/0/keys_zero", "kv_cache_dtype '.*belong to other settings"),
        ("0/0/keys_scale_zero", "kv_cache_dtype '.*belong to other settings"),
        ("0/0/queries", "'0/0/queries' is no layer's keys or values.*other settings; restart"),
        ("positive/0/keys", "'positive/0/keys' is no layer's keys"),
        ("0/keys", "'0/keys' is no layer's keys"),
        ("1/0/values", "kv_cache_dtype '.*belong to other settings"),
    ],
)
def test_tensors_that_are_no_keys_and_values_of_a_cache_are_refused(name, words, kv_cache_dtype):
    settings = settings_of(7, 2, 3, kv_cache_dtype=kv_cache_dtype)
    cache = KVCache(settings, 20)
    fill(cache, cache.condition("only"), chunks=2)
    snapshot = cache.snapshot()
    KVCache(settings, 20).restore(6, snapshot)
    with pytest.raises(ValueError, match=words):
        KVCache(settings, 20).restore(6, snapshot | {name: snapshot["0/0/keys"]})


def test_snapshots_are_restored_into_an_unused_cache():
    cache = KVCache(settings_of(7, 2, 3), 20)
    fill(cache, cache.condition("only"), chunks=2)
    snapshot = cache.snapshot()
    with pytest.raises(RuntimeError, match="in use"):
        cache.restore(6, snapshot)
    asked = KVCache(settings_of(7, 2, 3), 20)
    asked.condition("only")  # it would have no keys
    with pytest.raises(RuntimeError, match="in use"):
        asked.restore(6, snapshot)


def test_a_restored_cache_that_nobody_used_is_freed_too():
    cache = KVCache(settings_of(7, 2, 3), 20)
    fill(cache, cache.condition("only"), chunks=2)
    restored = KVCache(cache.settings, 20)
    restored.restore(6, cache.snapshot())
    assert restored.nbytes == cache.nbytes
    restored.free()
    assert restored.nbytes == 0


# Misuse


def test_update_outside_a_chunk():
    cache = KVCache(settings_of(6, 0, 3), 9)
    condition = cache.condition("only")
    with pytest.raises(RuntimeError, match="begin"):
        condition.update(0, tagged(range(3)), tagged(range(3)))
    fill(cache, condition, chunks=1)
    with pytest.raises(RuntimeError, match="begin"):
        condition.update(0, tagged(range(3)), tagged(range(3)))


def test_commit_outside_a_chunk():
    with pytest.raises(RuntimeError, match="begin"):
        KVCache(settings_of(6, 0, 3), 9).commit()


def test_a_chunk_cannot_be_opened_twice():
    """The first opening may have overwritten history that a second, shorter one would still have to see."""
    cache = KVCache(settings_of(6, 0, 3), 9)
    cache.begin(3)
    with pytest.raises(RuntimeError, match="commit"):
        cache.begin(2)


def test_a_condition_that_joins_late():
    cache = KVCache(settings_of(6, 0, 3), 9)
    fill(cache, cache.condition("positive"), chunks=1)
    cache.begin(3)
    with pytest.raises(RuntimeError, match="first"):
        cache.condition("negative").update(0, tagged(range(3)), tagged(range(3)))


def test_a_condition_that_misses_a_chunk():
    cache = KVCache(settings_of(6, 0, 3), 9)
    condition = cache.condition("only")
    fill(cache, condition, chunks=1)
    cache.begin(3)
    cache.commit()
    cache.begin(3)
    with pytest.raises(RuntimeError, match="unwritten"):
        condition.update(0, tagged(range(3)), tagged(range(3)))


def test_a_history_that_was_half_moved_is_of_no_use(monkeypatch):
    settings = settings_of(7, 2, 3, "window")
    cache = KVCache(settings, 20)
    condition = cache.condition("only")
    fill(cache, condition, chunks=3)
    cache.begin(3)

    def break_off(keys, frames):
        rotate_time_(keys, frames)
        raise InterruptedError

    monkeypatch.setattr("diagonal_sampler.kv_buffers.rotate_time_", break_off)
    with pytest.raises(InterruptedError):
        condition.update(0, tagged(range(9, 12)), tagged(range(9, 12)))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="committed unwritten"):
        cache.snapshot()


@torch.no_grad()
def test_a_restored_cache_that_is_rewound_must_be_written_again():
    cache = KVCache(settings_of(7, 2, 3), 20)
    fill(cache, cache.condition("only"), chunks=3)
    restored = KVCache(cache.settings, 20)
    restored.restore(9, cache.snapshot())
    restored.rewind(3)
    restored.begin(2)
    restored.commit()
    restored.begin(3)
    with pytest.raises(RuntimeError, match="frames 0 to 2 of a layer were committed unwritten"):
        restored.condition("only").update(0, tagged(range(3)), tagged(range(3)))


@pytest.mark.parametrize("shape", [(2, 6, 2, 128), (1, 9, 2, 128), (1, 6, 1, 128), (1, 6, 2, 64)])
def test_a_changed_shape(shape):
    cache = KVCache(settings_of(6, 0, 3), 9)
    condition = cache.condition("only")
    fill(cache, condition, chunks=1)
    cache.begin(3)
    with pytest.raises(ValueError, match="one size and batch"):
        condition.update(0, torch.zeros(shape), torch.zeros(shape))


def test_tokens_that_are_no_whole_frames():
    cache = KVCache(settings_of(6, 0, 3), 9)
    cache.begin(3)
    with pytest.raises(ValueError, match="7 tokens"):
        cache.condition("only").update(0, torch.zeros(1, 7, 2, 128), torch.zeros(1, 7, 2, 128))


@pytest.mark.parametrize(("frames", "committed"), [(0, 0), (-1, 0), (10, 0), (4, 2)])
def test_a_chunk_that_does_not_fit(frames, committed):
    cache = KVCache(settings_of(6, 3, 3), 9)
    condition = cache.condition("only")
    fill(cache, condition, chunks=committed)
    with pytest.raises(ValueError, match=f"{frames} latent frames"):
        cache.begin(frames)
    fill(cache, condition, chunks=1)  # the refusal changed nothing


def test_an_empty_clip():
    with pytest.raises(ValueError, match="total_frames is 0"):
        KVCache(CausalSettings(), 0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"frames_per_chunk": 0}, "frames_per_chunk is 0"),
        ({"sink": -1}, "sink is -1"),
        ({"positions": "relative"}, "positions is 'relative'"),
        ({"window": 5}, "at least 6"),
        ({"window": 0}, "window is 0"),
        ({"window": -2}, "window is -2"),
    ],
)
def test_bad_settings_name_the_parameter(values, named):
    with pytest.raises(ValueError, match=named):
        CausalSettings(**values)
