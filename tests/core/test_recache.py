"""Writing the window again under another prompt: equal to a clip of only those frames."""

from dataclasses import replace

import pytest
import torch
from tiny_wan import ListKV, caption, latent, tiny_dit

from diagonal_sampler.cache import KVCache
from diagonal_sampler.noise import CONTEXT_STEP, SeededNoise
from diagonal_sampler.prompt_schedule import schedule_row
from diagonal_sampler.sampler import count_forwards, count_recache, mix, sample_chunks
from diagonal_sampler.schedule import CONTEXT_MODES, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

SCHEDULE = DiagonalSchedule(sigmas=((1.0, 0.6), (1.0, 0.4)), context_sigma=0.2)
DRAW = SeededNoise(1, (1, 4, 4, 4))
BEFORE, AFTER = caption(1), caption(2)
CASES = [
    CausalSettings(window=-1, sink=0),
    CausalSettings(window=9, sink=3, positions="window"),
    CausalSettings(window=9, sink=3, positions="absolute"),
    CausalSettings(window=7, sink=2, positions="window"),
    CausalSettings(window=6, sink=0, positions="absolute"),
]
FRAMES, SWITCH = 17, 4


class Model:
    """The tiny DiT under a text that can be changed, with every forward noted."""

    def __init__(self, cache: KVCache, text: torch.Tensor) -> None:
        self.network, self.cache, self.text = tiny_dit(), cache, text
        self.calls = []

    def __call__(self, x, at):
        self.calls.append(at)
        timestep = torch.full((1,), 1000 * at.sigma)
        with torch.no_grad():
            flow = self.network(x, timestep, self.text, cache=self.cache.condition("only"))
        return x - at.sigma * flow


def run(settings, schedule, *, recache=True, switch=SWITCH, context=None, **more):
    """Latents, model and cache of a clip whose text changes at a chunk (None: never)."""
    cache = KVCache(settings, FRAMES)
    model = Model(cache, BEFORE)

    def begin(chunk):
        if chunk != switch:
            return False
        model.text = AFTER
        return recache

    hooks = {} if switch is None else {"recache": begin}
    chunks = list(
        sample_chunks(model, DRAW, schedule, cache, frames=FRAMES, frames_per_chunk=3, context=context, **hooks, **more)
    )
    return chunks, model, cache


def kept(settings, committed, coming):
    """The frames that a chunk sees beside itself, oldest first: the rule in one line."""
    frames, room = list(range(committed)), FRAMES if settings.window < 0 else settings.window
    return (
        frames
        if committed + coming <= room
        else frames[: settings.sink] + frames[committed + coming + settings.sink - room :]
    )


@pytest.mark.parametrize("mode", CONTEXT_MODES)
@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("given", [0, 4])
def test_recache_equals_a_fresh_cache_under_the_new_prompt(settings, mode, given):
    schedule = replace(SCHEDULE, context_mode=mode)
    context = latent(9, given) if given else None
    switch = SWITCH - (given > 0)
    chunks, model, _ = run(settings, schedule, context=context, switch=switch)
    made = [chunk.latents for chunk in chunks]
    start = chunks[switch].start_frame
    clip = torch.cat([*([] if context is None else [context]), *made], dim=2)

    # A cache that never saw another text, filled with the kept frames piece by piece, each at its own noise level.
    pieces = [(at, min(3, given - at), -1 - at, schedule.given_context_sigma) for at in range(0, given, 3)]
    pieces += [(c.start_frame, c.latents.shape[2], c.index, schedule.context_sigma_of(c.index)) for c in chunks]
    seen = kept(settings, start, 3)
    # Its positions count those frames only; absolute ones leave a gap, which the plain list of keys can have.
    gaps = settings.positions == "absolute"
    fresh = ListKV(settings, FRAMES) if gaps else KVCache(settings, FRAMES)
    condition = fresh if gaps else fresh.condition("only")
    network = tiny_dit()

    def forward(x, sigma):
        with torch.no_grad():
            return x - sigma * network(x, torch.full((1,), 1000 * sigma), AFTER, cache=condition)

    for at, size, draw, sigma in pieces:
        finished = clip[:, :, at : at + size]
        drawn = DRAW(draw, CONTEXT_STEP, size)
        for rows in runs([frame for frame in range(at, at + size) if frame in seen and frame < start]):
            if gaps and rows[0] > fresh.start:
                fresh.missing.update(range(fresh.start, rows[0]))
                for layer in range(len(network.blocks)):
                    fresh.history.setdefault(layer, []).extend([None] * (rows[0] - fresh.start))
                fresh.start = rows[0]
            fresh.begin(len(rows))
            mine = slice(rows[0] - at, rows[-1] + 1 - at)
            x0 = finished[:, :, mine]
            if at < given and mode == "noisy":
                x0 = x0 + (x0 - forward(mix(x0, drawn[:, :, mine], sigma), sigma))
            forward(x0 if sigma == 0 else mix(x0, drawn[:, :, mine], sigma), sigma)
            fresh.commit()
    x = DRAW(switch, -1, 3)
    fresh.begin(3)
    first, last = schedule.chunk_sigmas(switch)
    expected = forward(mix(forward(x, first), DRAW(switch, 0, 3), last), last)
    assert torch.allclose(expected, made[switch], atol=1e-4) if gaps else torch.equal(expected, made[switch])
    plain = run(settings, schedule, context=context, switch=switch, recache=False)[0]
    assert (plain[switch].latents - made[switch]).abs().max() > 1e-3, "recache and keep differ"
    for before in range(switch):
        assert torch.equal(plain[before].latents, made[before])


def runs(frames):
    """Frame numbers, split where one is missing."""
    out = []
    for frame in frames:
        if not out or frame != out[-1][-1] + 1:
            out.append([])
        out[-1].append(frame)
    return out


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_forwards_are_counted_and_only_the_window_is_written_again(settings):
    for switch in range(6):
        _, model, cache = run(settings, SCHEDULE, switch=switch)
        extra = count_recache(cache, SCHEDULE, FRAMES, 3, switch)
        assert len(model.calls) == count_forwards(SCHEDULE, FRAMES, 3) + extra
        coming = 2 if switch == 5 else 3
        frames = [
            f
            for at in model.calls
            if at.step == CONTEXT_STEP
            for f in range(at.start_frame, at.start_frame + at.frames)
        ]
        assert frames == (kept(settings, 3 * switch, coming) if switch else [])
    context = latent(6, 4)
    for switch in range(5):
        _, model, cache = run(settings, SCHEDULE, context=context, switch=switch)
        extra = count_recache(cache, SCHEDULE, FRAMES, 3, switch, context_frames=4)
        assert len(model.calls) == count_forwards(SCHEDULE, FRAMES, 3, 4) + extra


def test_a_recache_is_counted_without_going_through_the_clip():
    chunks = 10**12  # a count that visits its pieces would not end
    frames = 4 + 3 * chunks
    cache = KVCache(CausalSettings(window=12, sink=3), frames)
    assert count_recache(cache, SCHEDULE, frames, 3, chunks - 1, context_frames=4) == SCHEDULE.given_forwards + 2


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_hook_that_never_recaches_changes_nothing(settings):
    plain = run(settings, SCHEDULE, switch=None)[0]
    hooked, _, _ = run(settings, SCHEDULE, switch=99)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, hooked, strict=True))


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_goes_on_bit_by_bit_before_at_and_after_a_recache(settings, stop):
    whole = run(settings, SCHEDULE)[0]
    cache, history = KVCache(settings, FRAMES), {}
    model = Model(cache, BEFORE)

    def begin(chunk, model):
        model.text = AFTER if chunk >= SWITCH else BEFORE
        return chunk == SWITCH

    sizes = {"frames": FRAMES, "frames_per_chunk": 3}
    for chunk in sample_chunks(
        model, DRAW, SCHEDULE, cache, **sizes, recache=lambda k: begin(k, model), history=history
    ):
        if chunk.index == stop - 1:
            break
    again = KVCache(settings, FRAMES)
    again.restore(cache.committed, cache.snapshot(), dropped=cache.dropped)
    other = Model(again, BEFORE)
    rest = sample_chunks(
        other,
        DRAW,
        SCHEDULE,
        again,
        **sizes,
        first_chunk=stop,
        recache=lambda k: begin(k, other),
        history=dict(history),
    )
    for chunk in rest:
        assert torch.equal(chunk.latents, whole[chunk.index].latents)


def test_a_chunk_takes_the_steps_of_another_one_and_is_written_again_at_their_last_level():
    rows = {chunk: chunk if chunk < SWITCH - 1 else chunk - (SWITCH - 1) for chunk in range(6)}
    _, model, cache = run(CausalSettings(window=-1, sink=0), SCHEDULE, schedule_row=rows.__getitem__)
    made = {}
    for at in model.calls:
        if at.step >= 0:
            made.setdefault(at.chunk, []).append(at.sigma)
    assert [tuple(made[chunk]) for chunk in range(6)] == [SCHEDULE.chunk_sigmas(rows[chunk]) for chunk in range(6)]
    assert made[SWITCH - 1] == [1.0, 0.6], "begun anew one chunk before the switch"
    again = [(at.chunk, at.sigma) for at in model.calls if at.step == CONTEXT_STEP]
    assert again == [(0, 0.6), (1, 0.4), (2, 0.4), (3, 0.6)]
    # Row for row the steps of the schedule that lists them, whose own rows nothing begins anew.
    listed = replace(SCHEDULE, sigmas=tuple(SCHEDULE.chunk_sigmas(row) for row in rows.values()))
    plain, _, other = run(CausalSettings(window=-1, sink=0), listed)
    found, *_ = run(CausalSettings(window=-1, sink=0), SCHEDULE, schedule_row=rows.__getitem__)
    assert all(torch.equal(one.latents, two.latents) for one, two in zip(found, plain, strict=True))
    assert cache.committed == other.committed == FRAMES


def test_history_is_only_what_a_window_may_see():
    history = {}
    run(CASES[1], SCHEDULE, history=history)
    assert sorted(history) == [0, 9, 12, 15]


def test_a_rewind_needs_a_closed_chunk_and_a_skip_a_full_sink():
    cache = KVCache(CASES[1], FRAMES)
    cache.begin(3)
    with pytest.raises(RuntimeError, match="inside a chunk"):
        cache.rewind(3)
    with pytest.raises(RuntimeError, match="inside a chunk"):
        cache.skip_to(6)
    fresh = KVCache(CASES[1], FRAMES)
    with pytest.raises(ValueError, match="sink's 3 frames must be written first"):
        fresh.skip_to(6)


class Cut:
    """A run that is cut to at some chunks: noise as `DRAW`, counted from an index on, and steps that begin anew."""

    def __init__(self, settings, frames, cuts=(), recaches=(), first_draw=0, cache=None):
        self.cache = KVCache(settings, frames) if cache is None else cache
        self.model, self.history = Model(self.cache, BEFORE), {}
        self.frames, self.cuts, self.recaches, self.first_draw = frames, cuts, recaches, first_draw

    def chunks(self, **more):
        begun = sorted([*self.cuts, *self.recaches])
        return sample_chunks(
            self.model,
            lambda chunk, *at: DRAW(chunk + self.first_draw if chunk >= 0 else chunk, *at),
            SCHEDULE,
            self.cache,
            frames=self.frames,
            frames_per_chunk=3,
            recache=self.begin,
            history=self.history,
            schedule_row=lambda chunk: schedule_row(begun, chunk),
            cut=lambda chunk: chunk in self.cuts,
            **more,
        )

    def begin(self, chunk):
        self.model.text = caption(1 + chunk + self.first_draw)
        return chunk in self.recaches


CUT_CASES = [*CASES, CausalSettings(window=6, sink=3, positions="window", kv_cache_dtype="int8")]


@pytest.mark.parametrize("settings", CUT_CASES, ids=str)
@pytest.mark.parametrize("given", [0, 4])
def test_behind_a_cut_a_clip_is_bit_for_bit_a_new_one(settings, given):
    cut, again, chunks = 4, 8, 11  # the ring wraps before and behind the cut, and the window is written again behind it
    context = latent(9, given) if given else None
    run = Cut(settings, given + 3 * chunks, (cut,), (again,))
    found = list(run.chunks(context=context))
    fresh = Cut(settings, 3 * (chunks - cut), recaches=(again - cut,), first_draw=cut)
    expected = list(fresh.chunks())
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(found[cut:], expected, strict=True))
    assert [at.sigma for at in run.model.calls if at.chunk >= cut] == [at.sigma for at in fresh.model.calls]
    assert sorted(run.history) == [at + given + 3 * cut for at in sorted(fresh.history)]
    extra = count_recache(run.cache, SCHEDULE, run.frames, 3, again, given, cut)
    assert extra == count_recache(fresh.cache, SCHEDULE, fresh.frames, 3, again - cut)
    assert len(run.model.calls) == count_forwards(SCHEDULE, run.frames, 3, given) + extra, "a cut costs nothing"


@pytest.mark.parametrize("settings", CUT_CASES, ids=str)
@pytest.mark.parametrize("stop", [4, 5, 8, 9])
def test_a_run_goes_on_bit_by_bit_before_and_behind_a_cut(settings, stop):
    frames, cuts, recaches = 33, (4,), (8,)
    whole = list(Cut(settings, frames, cuts, recaches).chunks())
    run = Cut(settings, frames, cuts, recaches)
    for chunk in run.chunks():
        if chunk.index == stop - 1:
            break
    cache, kept = run.cache, KVCache(settings, frames)
    more = {name: getattr(cache, name) for name in ("dropped", "moved", "begun", "origin")}
    kept.restore(cache.committed, cache.snapshot(), **more)
    other = Cut(settings, frames, cuts, recaches, cache=kept)
    other.history.update(run.history)
    for chunk in other.chunks(first_chunk=stop):
        assert torch.equal(chunk.latents, whole[chunk.index].latents)


def test_a_cut_needs_a_closed_chunk_and_what_is_forgotten_stays_behind_it():
    cache = KVCache(CASES[1], FRAMES)
    cache.begin(3)
    with pytest.raises(RuntimeError, match="KVCache.cut inside a chunk"):
        cache.cut()
    cache.commit()
    cache.cut()
    cache.forget(6)
    assert (cache.origin, cache.dropped, cache.moved, cache.position) == (3, 3, 0, 3)
    with pytest.raises(ValueError, match=r"origin is 4; it must be in \[0, 3\]"):
        KVCache(CASES[1], FRAMES).restore(6, {}, dropped=3, origin=4)
