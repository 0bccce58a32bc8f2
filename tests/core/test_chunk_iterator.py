"""The one loop: which forwards it runs, what they see, and whose gradients it keeps."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_wan import ListKV, caption, latent, normal, tiny_dit

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.noise import CONTEXT_STEP, INITIAL_STEP, SeededNoise
from diagonal_sampler.sampler import Forward, count_forwards, mix, sample_chunks, split_frames
from diagonal_sampler.schedule import CONTEXT_MODES, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

GLOBAL = CausalSettings(frames_per_chunk=3, window=-1)
ROLLING = CausalSettings(frames_per_chunk=3, window=7, sink=2, positions="window")
DIAGONAL = DiagonalSchedule(sigmas=((1.0, 0.9, 0.7, 0.4), (1.0, 0.9, 0.4), (1.0, 0.4)), context_sigma=0.2)


def draw(chunk: int, step: int, frames: int) -> torch.Tensor:
    """Noise of one sample of the toy size."""
    return SeededNoise(1, (1, 4, 4, 4))(chunk, step, frames)


@dataclass
class Recorder:
    """A model that predicts x0 = x/2 and remembers every call."""

    calls: list[tuple[torch.Tensor, Forward]] = field(default_factory=list)
    grad_modes: list[bool] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, forward: Forward) -> torch.Tensor:
        self.calls.append((x.clone(), forward))
        self.grad_modes.append(torch.is_grad_enabled())
        return x / 2

    def seen(self, start_frame: int) -> list[tuple[float, int]]:
        return [(at.sigma, at.step) for _, at in self.calls if at.start_frame == start_frame]


def run(denoise, schedule: DiagonalSchedule, frames: int, *, size: int = 3, **options) -> list:
    cache = options.pop("cache", None) or KVCache(replace(GLOBAL, frames_per_chunk=size), frames)
    noise = options.pop("noise", draw)
    return list(
        sample_chunks(denoise, noise, schedule, cache, frames=frames, frames_per_chunk=size, **options),
    )


def clip(chunks: list) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


# Which forwards run


def test_split_frames():
    assert split_frames(21, 3) == [3] * 7
    assert split_frames(8, 3) == [3, 3, 2]
    assert split_frames(2, 3) == [2]
    assert split_frames(0, 3) == []


@pytest.mark.parametrize("mode", CONTEXT_MODES)
@pytest.mark.parametrize(
    ("frames", "size", "given"), [(21, 3, 0), (8, 3, 0), (5, 1, 0), (9, 3, 1), (11, 3, 4), (7, 3, 6)]
)
def test_forwards_are_those_announced(mode, frames, size, given):
    schedule = replace(DIAGONAL, context_mode=mode)
    model = Recorder()
    chunks = run(model, schedule, frames, size=size, context=latent(1, given) if given else None)
    made = split_frames(frames - given, size)
    assert len(model.calls) == count_forwards(schedule, frames, size, given)
    twice = 2 if mode == "noisy" else 1
    assert len(model.calls) == schedule.nfe(len(made)) + twice * len(split_frames(given, size))
    assert [chunk.latents.shape[2] for chunk in chunks] == made
    assert [chunk.index for chunk in chunks] == list(range(len(made)))
    assert [chunk.start_frame for chunk in chunks] == [given + sum(made[:k]) for k in range(len(made))]


@pytest.mark.parametrize("mode", CONTEXT_MODES)
def test_forwards_are_counted_without_going_through_the_chunks(mode):
    """Progress asks for them in every forward, of videos of many hours too."""
    schedule = replace(DIAGONAL, context_mode=mode)
    chunks, rows = 10**12, [len(row) for row in DIAGONAL.sigmas]  # one by one it would not end
    passes = chunks if mode != "noisy" else 0
    assert count_forwards(schedule, 3 * chunks, 3) == sum(rows) + rows[-1] * (chunks - len(rows)) + passes


def test_the_published_clip_takes_17_forwards_and_self_forcing_35():
    for name, forwards in (("diagonal 4-3-2", 17), ("self forcing", 35)):
        model = Recorder()
        run(model, DiagonalSchedule.preset(name), 21)
        assert len(model.calls) == forwards


@pytest.mark.parametrize(
    ("mode", "extra"), [("noisy", []), ("clean", [(0.0, CONTEXT_STEP)]), ("renoise", [(0.2, CONTEXT_STEP)])]
)
def test_each_chunk_runs_its_levels_and_then_the_context_pass(mode, extra):
    model = Recorder()
    run(model, replace(DIAGONAL, context_mode=mode), 12)
    assert model.seen(0) == [(1.0, 0), (0.9, 1), (0.7, 2), (0.4, 3), *extra]
    assert model.seen(3) == [(1.0, 0), (0.9, 1), (0.4, 2), *extra]
    assert model.seen(6) == model.seen(9) == [(1.0, 0), (0.4, 1), *extra]
    steps = {at.chunk: at.steps for _, at in model.calls if at.step >= 0}
    assert steps == {0: 4, 1: 3, 2: 2, 3: 2}
    assert all(at.frames == x.shape[2] for x, at in model.calls)


def test_each_forward_gets_rectified_flow_with_fresh_noise():
    """x = (1 - sigma) * x0 + sigma * noise, a new draw at every step, as METHOD says."""
    model = Recorder()
    chunks = run(model, replace(DIAGONAL, context_mode="renoise"), 6)
    expected = draw(0, INITIAL_STEP, 3)
    for step, sigma in enumerate((0.9, 0.7, 0.4)):
        torch.testing.assert_close(model.calls[step][0], expected)
        expected = (1 - sigma) * expected / 2 + sigma * draw(0, step, 3)
    torch.testing.assert_close(model.calls[3][0], expected)
    torch.testing.assert_close(chunks[0].latents, expected / 2)
    torch.testing.assert_close(model.calls[4][0], 0.8 * expected / 2 + 0.2 * draw(0, CONTEXT_STEP, 3))
    torch.testing.assert_close(model.calls[5][0], draw(1, INITIAL_STEP, 3))


def test_mix_is_exact_at_its_ends():
    x0, noise = latent(1, 2), latent(2, 2)
    assert torch.equal(mix(x0, noise, 0.0), x0)
    assert torch.equal(mix(x0, noise, 1.0), noise)


def test_the_clean_pass_sees_the_finished_chunk():
    model = Recorder()
    chunks = run(model, replace(DIAGONAL, context_mode="clean"), 3)
    assert torch.equal(model.calls[-1][0], chunks[0].latents)


@pytest.mark.parametrize("sigma", (0.4, 1.0))
def test_given_context_enters_a_noisy_cache_as_what_a_forward_finishes_as_it(sigma):
    """A model that darkens its input by a tenth is shown what it makes the given latents of, to second order."""
    seen = []

    def darken(x: torch.Tensor, forward: Forward) -> torch.Tensor:
        clean = (x - forward.sigma * draw(-1, CONTEXT_STEP, 3)) / (1 - forward.sigma) if forward.sigma < 1 else x
        seen.append((clean, forward))
        return clean - 0.1

    schedule = DiagonalSchedule(sigmas=((1.0, sigma) if sigma < 1 else (1.0,),))
    context = latent(3, 3)
    run(darken, schedule, 6, context=context)
    written = [clean for clean, at in seen if at.step == CONTEXT_STEP]
    if sigma == 1:  # such a context tells nothing: the given latents are seen in a pass of their own
        assert len(written) == 1 == schedule.given_forwards
        torch.testing.assert_close(written[0], context, rtol=1e-4, atol=1e-5)
    else:
        assert len(written) == 2 == schedule.given_forwards
        torch.testing.assert_close(written[1] - 0.1, context, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ("clean", "renoise"))
def test_given_context_is_cached_with_little_noise_of_its_own(mode):
    schedule = replace(DIAGONAL, context_mode=mode)
    context, model = latent(3, 4), Recorder()
    cache = KVCache(GLOBAL, 10)
    chunks = run(model, schedule, 10, context=context, cache=cache)
    sigma = {"clean": 0.0, "renoise": 0.1}[mode]
    assert model.seen(0) == [(sigma, CONTEXT_STEP)]
    assert model.seen(3) == [(sigma, CONTEXT_STEP)]
    assert model.seen(4)[:4] == [(1.0, 0), (0.9, 1), (0.7, 2), (0.4, 3)]
    pieces = zip((model.calls[0][0], model.calls[1][0]), (context[:, :, :3], context[:, :, 3:]), strict=True)
    noises = [x - (1 - sigma) * piece for x, piece in pieces]
    if sigma == 0:
        assert all(noise.abs().max() == 0 for noise in noises)
    else:
        noises = [(noise / sigma).flatten() for noise in noises]
        assert all(0.7 < noise.std() < 1.3 for noise in noises)
        # Drawn for the context alone: no chunk meets this noise again.
        others = [draw(k, step, 3).flatten() for k in range(3) for step in (CONTEXT_STEP, INITIAL_STEP, 0, 1)]
        assert all((noises[0] - other).abs().max() > 0.5 for other in others)
        assert (noises[0][: len(noises[1])] - noises[1]).abs().max() > 0.5
    assert chunks[0].start_frame == 4
    assert cache.committed == 10


def test_video_to_video_starts_from_the_source():
    source, model = latent(4, 6), Recorder()
    run(model, DIAGONAL.start_at(0.8), 6, source=lambda start, frames: source[:, :, start : start + frames])
    for chunk, start in enumerate((0, 3)):
        x = next(x for x, at in model.calls if at.start_frame == start and at.step == 0)
        expected = 0.2 * source[:, :, start : start + 3] + 0.8 * draw(chunk, INITIAL_STEP, 3)
        torch.testing.assert_close(x, expected)


def test_a_source_is_not_asked_for_at_pure_noise():
    def never(start: int, frames: int) -> torch.Tensor:
        raise AssertionError

    run(Recorder(), DIAGONAL, 6, source=never)


# What they see: the loop with a cache against forwards over the whole clip so far


def flow_denoiser(model: WanDiT, cache, context: torch.Tensor):
    """x0 = x - sigma * flow, with the timestep 1000 * sigma."""

    def denoise(x: torch.Tensor, at: Forward) -> torch.Tensor:
        condition = cache.condition("only") if isinstance(cache, KVCache) else cache
        return x - at.sigma * model(x, torch.full((x.shape[0],), 1000 * at.sigma), context, cache=condition)

    return denoise


@torch.no_grad()
def autoregression(model: WanDiT, schedule: DiagonalSchedule, frames: int, context: torch.Tensor) -> torch.Tensor:
    """No cache and no iterator: every forward goes over all chunks so far through the causal mask.

    Finished chunks enter as their context mode says: as the last forward saw them, clean, or noised again.
    """
    history, levels, result = [], [], []
    for chunk, start in enumerate(range(0, frames, 3)):
        n = min(3, frames - start)
        x = draw(chunk, INITIAL_STEP, n)
        sigmas = schedule.chunk_sigmas(chunk)
        for step, sigma in enumerate(sigmas):
            whole = torch.cat([*history, x], dim=2)
            timesteps = 1000 * torch.tensor([*levels, *[sigma] * n])[None]
            flow = model(whole, timesteps, context, frames_per_chunk=3)[:, :, start:]
            x0 = x - sigma * flow
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * draw(chunk, step, n)
        if schedule.context_mode == "noisy":
            kept, level = x, sigmas[-1]
        elif schedule.context_mode == "clean":
            kept, level = x0, 0.0
        else:
            level = schedule.context_sigma
            kept = (1 - level) * x0 + level * draw(chunk, CONTEXT_STEP, n)
        history.append(kept)
        levels += [level] * n
        result.append(x0)
    return torch.cat(result, dim=2)


CONSTANT = DiagonalSchedule(sigmas=((1.0, 0.6),), context_sigma=0.2)


@torch.no_grad()
@pytest.mark.parametrize("schedule", [CONSTANT, DIAGONAL], ids=["constant", "diagonal"])
@pytest.mark.parametrize("mode", CONTEXT_MODES)
def test_equals_plain_autoregression(mode, schedule):
    model, context, schedule = tiny_dit(), caption(1), replace(schedule, context_mode=mode)
    cache = KVCache(GLOBAL, 8)
    found = clip(run(flow_denoiser(model, cache, context), schedule, 8, cache=cache))
    torch.testing.assert_close(found, autoregression(model, schedule, 8, context), rtol=0, atol=1e-5)


@torch.no_grad()
def test_context_modes_differ():
    model, context = tiny_dit(), caption(1)
    clips = [autoregression(model, replace(DIAGONAL, context_mode=mode), 8, context) for mode in CONTEXT_MODES]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert torch.equal(clips[a][:, :, :3], clips[b][:, :, :3])
        assert (clips[a] - clips[b])[:, :, 3:].abs().max() > 1e-2


@torch.no_grad()
def test_a_clip_continued_from_its_own_clean_frames_goes_on_the_same():
    """With clean context, given frames leave what generated ones left: the chunks after them see no difference."""
    model, text, schedule = tiny_dit(), caption(1), replace(CONSTANT, context_mode="clean")
    whole_cache, rest_cache = KVCache(ROLLING, 12), KVCache(ROLLING, 12)
    whole = clip(run(flow_denoiser(model, whole_cache, text), schedule, 12, cache=whole_cache))

    def shifted(chunk: int, step: int, frames: int) -> torch.Tensor:
        return draw(chunk + 2, step, frames)

    rest = run(
        flow_denoiser(model, rest_cache, text), schedule, 12, cache=rest_cache, context=whole[:, :, :6], noise=shifted
    )
    torch.testing.assert_close(clip(rest), whole[:, :, 6:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_longer_clip_begins_like_a_shorter_one():
    model, text = tiny_dit(), caption(1)
    clips = []
    for frames in (6, 12):
        cache = KVCache(ROLLING, frames)
        clips.append(clip(run(flow_denoiser(model, cache, text), DIAGONAL, frames, cache=cache)))
    torch.testing.assert_close(clips[1][:, :, :6], clips[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_same_seed_same_clip_and_no_global_state():
    model, text = tiny_dit(), caption(1)
    clips = []
    for junk in (0, 5):
        torch.manual_seed(junk)
        torch.randn(junk)
        before = torch.get_rng_state()
        cache = KVCache(ROLLING, 12)
        clips.append(clip(run(flow_denoiser(model, cache, text), DIAGONAL, 12, cache=cache)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*clips)


# Gradients


def test_without_exit_step_the_callers_grad_mode_rules():
    for mode in (True, False):
        model = Recorder()
        with torch.set_grad_enabled(mode):
            chunks = run(model, replace(DIAGONAL, context_mode="clean"), 6)
            assert torch.is_grad_enabled() is mode
        expected = [mode and at.step != CONTEXT_STEP for _, at in model.calls]
        assert model.grad_modes == expected
        assert all(chunk.exit_latents is None for chunk in chunks)


def test_grad_mode_is_the_callers_between_chunks():
    chunks = sample_chunks(
        Recorder(), draw, DIAGONAL, KVCache(GLOBAL, 9), frames=9, frames_per_chunk=3, exit_step=lambda chunk: 0
    )
    for _ in chunks:
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", CONTEXT_MODES)
def test_only_the_exit_forward_runs_with_gradients(mode):
    model = Recorder()
    exits = {0: 2, 1: 0, 2: 1, 3: 0}
    run(model, replace(DIAGONAL, context_mode=mode), 12, exit_step=exits.__getitem__)
    assert model.grad_modes == [at.step == exits[at.chunk] for _, at in model.calls]


def test_an_exit_step_cannot_turn_gradients_on():
    model = Recorder()
    with torch.no_grad():
        run(model, DIAGONAL, 6, exit_step=lambda chunk: 0)
    assert not any(model.grad_modes)


def loss_of(chunk_outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum((out * normal(90 + k, *out.shape)).sum() for k, out in enumerate(chunk_outputs))


def gradients(model: WanDiT) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("mode", ["noisy", "clean"])
@pytest.mark.parametrize("settings", [GLOBAL, ROLLING], ids=["global", "rolling"])
def test_gradients_are_those_of_the_exit_forward_alone(settings, mode):
    """Against a computation in which everything but that forward runs without gradients, on a list for a cache.

    One backward at the end, after later chunks have overwritten the slots that earlier forwards read.
    """
    frames, exits = 11, (1, 2, 0, 1)
    model, text, schedule = tiny_dit(), caption(1), replace(DIAGONAL, context_mode=mode)
    cache = KVCache(settings, frames)
    chunks = run(flow_denoiser(model, cache, text), schedule, frames, cache=cache, exit_step=exits.__getitem__)
    loss_of([chunk.exit_latents for chunk in chunks]).backward()
    found = gradients(model)

    kept, outputs = ListKV(settings, frames), []
    denoise = flow_denoiser(model, kept, text)
    for k, n in enumerate(split_frames(frames, 3)):
        sigmas = schedule.chunk_sigmas(k)
        kept.begin(n)
        x = draw(k, INITIAL_STEP, n)
        for step, sigma in enumerate(sigmas):
            at = Forward(chunk=k, start_frame=3 * k, frames=n, step=step, steps=len(sigmas), sigma=sigma)
            with torch.set_grad_enabled(step == exits[k]):
                x0 = denoise(x, at)
            if step == exits[k]:
                outputs.append(x0)
                x0 = x0.detach()
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * draw(k, step, n)
        torch.testing.assert_close(chunks[k].latents, x0, rtol=0, atol=1e-5)
        if mode == "clean":
            with torch.no_grad():
                denoise(x0, replace(at, sigma=0.0))
        kept.commit()
    loss_of(outputs).backward()
    expected = gradients(model)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (found[name] - gradient).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("settings", [GLOBAL, ROLLING], ids=["global", "rolling"])
def test_a_run_with_gradients_commits_what_a_run_without_commits(settings):
    model, text, schedule = tiny_dit(), caption(1), DIAGONAL
    with torch.no_grad():
        plain_cache = KVCache(settings, 12)
        plain = run(flow_denoiser(model, plain_cache, text), schedule, 12, cache=plain_cache)
    trained_cache = KVCache(settings, 12)
    # The last step everywhere: those very forwards write what is committed.
    trained = run(
        flow_denoiser(model, trained_cache, text),
        schedule,
        12,
        cache=trained_cache,
        exit_step=lambda chunk: schedule.steps(chunk) - 1,
    )
    for a, b in zip(plain, trained, strict=True):
        torch.testing.assert_close(b.latents, a.latents, rtol=0, atol=1e-5)
        assert not b.latents.requires_grad
        assert b.exit_latents is not None and b.exit_latents.requires_grad
        torch.testing.assert_close(b.exit_latents.detach(), b.latents)
    buffers = [
        [
            t
            for layer in cache.condition("only")._layers.values()
            for t in (layer.keys.tokens_BLND, layer.values.tokens_BLND)
        ]
        for cache in (plain_cache, trained_cache)
    ]
    for a, b in zip(*buffers, strict=True):
        assert not b.requires_grad
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_the_exit_latents_are_those_of_the_exit_step():
    model = Recorder()
    chunks = run(model, DIAGONAL, 6, exit_step=lambda chunk: 1)
    for chunk in chunks:
        x = next(x for x, at in model.calls if at.chunk == chunk.index and at.step == 1)
        assert torch.equal(chunk.exit_latents, x / 2)


# Bad input


@pytest.mark.parametrize("exit_step", [-1, 2, 7])
def test_an_exit_step_that_does_not_exist(exit_step):
    """It would train on nothing."""
    with pytest.raises(ValueError, match=f"exit_step.*{exit_step}"):
        run(Recorder(), DiagonalSchedule(sigmas=((1.0, 0.5),)), 6, exit_step=lambda chunk: exit_step)


@pytest.mark.parametrize("given", [6, 7])
def test_nothing_to_make(given):
    with pytest.raises(ValueError, match="frames is 6"):
        run(Recorder(), DIAGONAL, 6, context=latent(0, given))


def test_a_schedule_below_pure_noise_needs_a_source_and_says_so_first():
    """Also where only a late chunk does: nothing is denoised in vain."""
    model = Recorder()
    with pytest.raises(ValueError, match="Chunk 3 starts at sigma 0.800"):
        run(model, DiagonalSchedule(sigmas=((1.0,), (1.0,), (0.8,))), 12)
    assert model.calls == []
    run(model, DiagonalSchedule(sigmas=((1.0,), (1.0,), (0.8,))), 6)  # a clip that ends before needs none


def test_a_used_cache_is_refused():
    """Its frames would stand before the clip, and every start_frame would be wrong."""
    cache = KVCache(GLOBAL, 12)
    run(Recorder(), DIAGONAL, 6, cache=cache)
    with pytest.raises(ValueError, match="cache has 6"):
        run(Recorder(), DIAGONAL, 6, cache=cache)


def test_a_cache_for_a_shorter_clip_is_refused_at_once():
    model = Recorder()
    with pytest.raises(ValueError, match="cache.*6.*frames is 9"):
        run(model, DIAGONAL, 9, cache=KVCache(GLOBAL, 6))
    assert model.calls == []


@pytest.mark.parametrize("size", [0, -3])
def test_chunks_without_frames(size):
    with pytest.raises(ValueError, match=f"frames_per_chunk is {size}"):
        split_frames(6, size)


def test_an_interrupt_stops_at_once_and_leaves_the_cache_to_its_owner():
    cache, model = KVCache(GLOBAL, 9), Recorder()

    def denoise(x: torch.Tensor, at: Forward) -> torch.Tensor:
        if len(model.calls) == 5:
            raise KeyboardInterrupt
        return model(x, at)

    made = []
    with pytest.raises(KeyboardInterrupt):
        for chunk in sample_chunks(denoise, draw, DIAGONAL, cache, frames=9, frames_per_chunk=3):
            made.append(chunk)
    assert (len(model.calls), len(made), cache.committed) == (5, 1, 3)
    assert torch.is_grad_enabled()
    cache.free()


@pytest.mark.parametrize("fresh", [True, False])
def test_kept_noise_is_eulers_method(fresh):
    schedule = replace(DiagonalSchedule.preset("undistilled", steps=(4,)), fresh_noise=fresh)
    target = torch.full((1, 2, 3, 2, 2), 0.5)
    source = SeededNoise(3, (1, 2, 2, 2))
    inputs = []

    def denoise(x, at):
        if at.step >= 0:
            inputs.append((x - (1 - at.sigma) * target) / at.sigma)
        return target

    list(sample_chunks(denoise, source, schedule, KVCache(CausalSettings(), 3), frames=3, frames_per_chunk=3))
    same = [torch.allclose(noise, inputs[0], atol=1e-5) for noise in inputs[1:]]
    assert same == [not fresh] * 3


# Going on from a snapshot


@pytest.mark.parametrize("settings", (GLOBAL, ROLLING), ids=("global", "rolling"))
@pytest.mark.parametrize("mode", CONTEXT_MODES)
@pytest.mark.parametrize("after", (1, 2, 4))
@torch.no_grad()
def test_a_snapshot_goes_on_bit_for_bit(settings, mode, after):
    """Two conditions, a clip that outgrows its window: the restored run equals the one that was not interrupted."""
    model, schedule = tiny_dit(), replace(DIAGONAL, context_mode=mode)
    texts = {"positive": caption(1), "negative": caption(2)}

    def chunks(cache: KVCache, first: int = 0):
        def denoise(x, at):
            timestep = torch.full((1,), 1000 * at.sigma)
            flows = [model(x, timestep, text, cache=cache.condition(name)) for name, text in texts.items()]
            return x - at.sigma * (2 * flows[0] - flows[1])

        return sample_chunks(denoise, draw, schedule, cache, frames=17, frames_per_chunk=3, first_chunk=first)

    whole = [chunk.latents for chunk in chunks(KVCache(settings, 17))]
    begun = KVCache(settings, 17)
    made = chunks(begun)
    for _ in range(after):
        next(made)
    snapshot, committed = begun.snapshot(), begun.committed
    made.close()
    begun.free()
    cache = KVCache(settings, 17)
    cache.restore(committed, snapshot)
    rest = [chunk.latents for chunk in chunks(cache, first=after)]
    assert len(rest) == 6 - after
    for found, expected in zip(rest, whole[after:], strict=True):
        assert torch.equal(found, expected)


def test_a_snapshot_of_another_run_is_refused():
    model = tiny_dit()
    cache = KVCache(ROLLING, 9)
    denoise = _streaming(model, cache)
    made = sample_chunks(denoise, draw, DIAGONAL, cache, frames=9, frames_per_chunk=3)
    next(made)
    snapshot = cache.snapshot()
    with pytest.raises(RuntimeError, match="in use"):
        cache.restore(3, snapshot)
    with pytest.raises(ValueError, match="the clip has 3"):
        KVCache(ROLLING, 3).restore(3, snapshot)
    with pytest.raises(ValueError, match="other settings"):
        KVCache(ROLLING, 9).restore(5, snapshot)
    with pytest.raises(ValueError, match="chunk 1 begins at 3"):
        next(sample_chunks(denoise, draw, DIAGONAL, KVCache(ROLLING, 9), frames=9, frames_per_chunk=3, first_chunk=1))
    with pytest.raises(ValueError, match="chunks 0 to 2"):
        next(sample_chunks(denoise, draw, DIAGONAL, KVCache(ROLLING, 9), frames=9, frames_per_chunk=3, first_chunk=3))
    restored = KVCache(ROLLING, 9)
    restored.restore(3, snapshot)
    with pytest.raises(ValueError, match="has 3 latent frames where chunk 0 begins"):
        next(sample_chunks(denoise, draw, DIAGONAL, restored, frames=9, frames_per_chunk=3))


def _streaming(model: WanDiT, cache: KVCache):
    @torch.no_grad()
    def denoise(x, at):
        return x - at.sigma * model(x, torch.full((1,), 1000 * at.sigma), caption(1), cache=cache.condition("only"))

    return denoise
