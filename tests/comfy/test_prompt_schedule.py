"""Prompts over time on ComfyUI's Wan: when they switch, what the cache holds then, and what is refused."""

import asyncio
import json
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import comfy.samplers
import node_helpers
import numpy as np
import pytest
import torch
from PIL import Image

from diagonal_sampler.sampler import count_forwards
from diagonal_sampler.schedule import DiagonalSchedule

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
CLEAN = DiagonalSchedule.preset("self forcing", steps=(2,))
WINDOW = {"window": 9, "sink": 3}
FRAMES, SWITCH = 18, 4  # 6 chunks; the fifth has another prompt, when frames have been evicted


class RandomClip:
    """Stands in for a CLIP: a prompt is random numbers of its own; "long" has more tokens."""

    def __init__(self):
        self.encoded = []

    def tokenize(self, text):
        if "dog" in text:
            raise ValueError("dog is unknown; known words are cat")
        return text

    def encode_from_tokens_scheduled(self, text):
        self.encoded.append((text, threading.get_ident()))
        generator = torch.Generator().manual_seed(sum(text.encode()))
        return [[torch.randn(1, 24 if "long" in text else 16, 64, generator=generator), {"pooled_output": None}]]

    def __call__(self, text):
        return self.encode_from_tokens_scheduled(text)


@pytest.fixture(scope="module")
def prompts(pack_module):
    return pack_module("model_patches.prompts")


@pytest.fixture
def clip():
    return RandomClip()


@pytest.fixture
def schedule(prompts, clip):
    def make(text, switch="recache", blend_chunks=2, previous=None, fps=16.0, node="7"):
        return prompts.schedule_prompts(
            clip, text, fps=fps, switch=switch, blend_chunks=blend_chunks, previous=previous, node_id=node
        )

    return make


@pytest.fixture
def sample(tiny_wan, causal, sample_latent):
    def run(positive, negative=(), frames=FRAMES, noise_schedule=CLEAN, settings=WINDOW, **more):
        model = causal(tiny_wan, **settings)
        latent = {"samples": torch.zeros(1, 16, frames, 4, 4)}
        return sample_latent(model, positive, list(negative), latent, noise_schedule, seed=5, **more)["samples"]

    return run


def same_until(a, b):
    """The first latent frame in which two clips differ."""
    differ = [(a[:, :, frame] != b[:, :, frame]).any().item() for frame in range(a.shape[2])]
    return differ.index(True) if any(differ) else None


def test_a_standard_sampler_takes_the_first_prompt(tiny_wan, clip, schedule):
    def euler(conditioning):
        noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(4))
        guider = comfy.samplers.CFGGuider(tiny_wan)
        guider.set_conds(conditioning, conditioning)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, noise * 0, sampler, torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True)

    assert torch.equal(euler(schedule("0: a\n1s: b")), euler(clip("a")))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("switch", ["recache", "keep", "blend", "cut"])
def test_a_prompt_switches_at_its_chunk(sample, clip, schedule, switch, cfg):
    plain = sample(clip("a"), clip("not this"), cfg=cfg)
    found = sample(schedule(f"0: a\nchunk {SWITCH + 1}: b", switch), clip("not this"), cfg=cfg)
    assert same_until(plain, found) == 3 * SWITCH
    assert (plain[:, :, 3 * SWITCH :] - found[:, :, 3 * SWITCH :]).abs().max() > 0.01


def test_a_schedule_of_one_prompt_is_that_prompt_bit_by_bit(sample, clip, schedule):
    for noise_schedule in (CLEAN, DIAGONAL):
        plain = sample(clip("a"), clip("n"), cfg=2.0, noise_schedule=noise_schedule)
        assert torch.equal(sample(schedule("0: a"), clip("n"), cfg=2.0, noise_schedule=noise_schedule), plain)
    # The same words again, with the window kept: nothing changes either.
    assert torch.equal(sample(schedule("0: a\nchunk 3: a", "keep")), sample(clip("a")))


def test_recache_and_keep_differ_and_other_lengths_work(sample, clip, schedule):
    text = "0: a\nchunk 5: b is long"
    recached, kept = (sample(schedule(text, switch), clip("n"), cfg=2.0) for switch in ("recache", "keep"))
    assert same_until(recached, kept) == 3 * SWITCH
    plain = sample(clip("a"), clip("n"), cfg=2.0)
    assert same_until(recached, plain) == 3 * SWITCH


def test_a_recache_is_as_if_the_window_had_always_had_the_prompt(
    sample, clip, schedule, given_frames, pack_module, monkeypatch
):
    """With the whole clip in the window: the same latents, cached from the first chunk on under the new prompt."""
    # What goes on from given frames begins at their level, which what goes on by itself has no need of.
    monkeypatch.setattr(pack_module("model_patches.sampling"), "meet", lambda denoised, level, **_: denoised)
    given = sample(clip("a"), frames=9, settings={})
    found = sample(schedule("0: a\nchunk 4: b"), settings={})
    assert torch.equal(found[:, :, :9], given)
    # Those frames as context, under "b": their keys and values are what the recache writes.
    draw = pack_module("diagonal_sampler.noise").SeededNoise(5, (1, 16, 4, 4))
    later = sample(
        clip("b"),
        settings={},
        context=given_frames(given),
        noise=lambda chunk, step, n: draw(max(chunk, -3) + 3, step, n),
    )
    assert (later - found).abs().max() < 1e-4


def test_given_frames_are_cached_under_a_prompt_that_recaches_in_the_first_chunk(
    sample, clip, schedule, given_frames, prompts
):
    """One that is written, and one that is given while they are cached."""
    given = given_frames(sample(clip("a"), frames=6, settings={}))
    under_b = sample(clip("b"), settings={}, context=given)
    assert torch.equal(sample(schedule("0: a\n1s: b"), settings={}, context=given), under_b)
    under_a = sample(schedule("0: a\n1s: b", "keep"), settings={}, context=given)
    assert same_until(under_a, under_b) == 6, "with keep they stay as they were cached"
    box, answers = prompts.PromptBox(), []

    def steer(progress):
        if not answers:
            answers.append(post(prompts, box, "b"))

    live = sample(schedule("0: a"), settings={}, context=given, prompts=box, on_progress=steer)
    assert answers[0].result().chunk == 0
    assert (live - under_b).abs().max() < 1e-4


def test_a_blend_goes_over_in_equal_steps(tiny_wan, sample, clip, schedule):
    """The text is embedded once for each prompt that is seen, when its first forward begins."""
    done, seen = [], []
    embedding = tiny_wan.model.diffusion_model.text_embedding
    embedding.register_forward_pre_hook(lambda module, args: seen.append((len(done), args[0].clone())))
    sample(schedule("0: a\nchunk 3: b", "blend", 2), on_progress=done.append)
    a, b = clip("a")[0][0], clip("b")[0][0]
    forwards = count_forwards(CLEAN, FRAMES, 3) // 6
    assert len(done) == 6 * forwards
    wanted = {0: a, 2: (2 * a + b) / 3, 3: (a + 2 * b) / 3, 4: b}  # by chunk
    for (at, found), (chunk, text) in zip(seen, wanted.items(), strict=True):
        assert at == chunk * forwards
        torch.testing.assert_close(found, text)


def test_every_forward_is_counted(sample, schedule):
    seen = []
    sample(schedule("0: a\nchunk 2: b\nchunk 5: c"), on_progress=seen.append)
    plain = count_forwards(CLEAN, FRAMES, 3)
    # Before chunk 2 one chunk is written again; before chunk 5 the sink and one chunk: a window of 9 without its own 3.
    assert [p.forwards for p in seen] == list(range(1, plain + 1 + 2 + 1))
    assert {p.total for p in seen} == {plain + 3}
    assert [p.chunk for p in seen] == sorted(p.chunk for p in seen)


def test_steps_begin_anew_at_a_recache(sample, schedule):
    def seen(text, switch, **more):
        steps, found = {}, []
        sample(
            schedule(text, switch),
            noise_schedule=DIAGONAL,
            on_progress=lambda p: (found.append(p), steps.update({p.chunk: max(p.steps, steps.get(p.chunk, 0))})),
            **more,
        )
        assert [p.forwards for p in found] == list(range(1, found[-1].total + 1)), "every forward is counted"
        assert len({p.total for p in found}) == 1, "and known from the beginning"
        return list(steps.values())

    assert seen("0: a\nchunk 4: b", "recache") == [4, 3, 2, 4, 3, 2]
    assert seen("0: a\nchunk 2: b\nchunk 3: c", "recache") == [4, 4, 4, 3, 2, 2]
    for switch in ("keep", "blend"):
        assert seen("0: a\nchunk 4: b", switch) == [4, 3, 2, 2, 2, 2]
    assert seen("0: a\nchunk 2: b\nchunk 5: c", "cut") == [4, 4, 3, 2, 4, 3], "nothing is written again"


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("switch", ["cut", "recache"])
def test_behind_a_cut_a_clip_is_that_of_a_new_run(sample, clip, schedule, switch, cfg):
    """Bit for bit, for the same noise, also behind a recache: sink, window, positions and steps begin anew."""

    def noise(chunk, step, frames):
        made = torch.Generator().manual_seed(1000 * (chunk - first) + step + 10)
        return torch.randn(1, 16, frames, 4, 4, generator=made)

    more = {"negative": clip("no"), "cfg": cfg, "noise": noise, "noise_schedule": DIAGONAL}
    settings, behind = {**WINDOW, "positions": "window"}, schedule("chunk 6: c", switch, previous=schedule("0: b"))
    first = 0
    fresh = sample(behind, frames=21, settings=settings, **more)
    first = 5
    both = schedule("chunk 11: c", switch, previous=schedule("chunk 6: b", "cut", previous=schedule("0: a")))
    found = sample(both, frames=36, settings=settings, **more)
    assert torch.equal(found[:, :, 15:], fresh)


def test_a_live_cut_is_as_a_written_one_and_costs_nothing(sample, schedule, prompts):
    box, totals, answers = prompts.PromptBox(), [], []

    def steer(progress):
        totals.append((progress.forwards, progress.total))
        if progress.chunk == 1 and progress.step == 1:
            answers.append(post(prompts, box, "b", switch="cut"))

    found = sample(schedule("0: a"), prompts=box, on_progress=steer)
    later = schedule("chunk 3: b", "cut", previous=schedule("0: a"))
    assert torch.equal(found, sample(later)) and answers[0].result().switch == "cut"
    assert {total for _, total in totals} == {count_forwards(CLEAN, FRAMES, 3)} and totals[-1][0] == totals[-1][1]
    plain = sample(schedule("0: a\nchunk 3: b"))
    assert same_until(found, plain) == 6
    first = schedule("0: a", "cut")
    assert torch.equal(sample(first), sample(schedule("0: a"))), "nothing comes before the first chunk"


def test_times_chain_and_areas(sample, clip, schedule, tiny_wan, causal, sample_latent):
    by_time = sample(schedule("0: a\n2s: b", "keep"))  # pixel frame 32 is in latent frame 8, the third chunk
    assert same_until(by_time, sample(clip("a"))) == 6
    chained = schedule("chunk 3: b", "keep", previous=clip("a"), node="8")
    assert torch.equal(sample(chained), by_time)
    again = schedule("chunk 5: c", "recache", previous=chained, node="9")
    assert same_until(sample(again), by_time) == 12
    right = node_helpers.conditioning_set_values(schedule("0: d\nchunk 2: e"), {"area": (4, 4, 0, 4), "strength": 1.0})
    latent = {"samples": torch.zeros(1, 16, 9, 4, 8)}
    found = sample_latent(causal(tiny_wan), clip("a") + right, clip("n"), latent, CLEAN, seed=1, cfg=2.0)["samples"]
    plain = node_helpers.conditioning_set_values(clip("d"), {"area": (4, 4, 0, 4), "strength": 1.0})
    other = sample_latent(causal(tiny_wan), clip("a") + plain, clip("n"), latent, CLEAN, seed=1, cfg=2.0)["samples"]
    assert same_until(found, other) == 3


def test_one_row_that_looks_like_several_is_said(schedule, caplog):
    schedule("0s: a | 5s: b")
    assert "each prompt takes a row of its own" in caplog.text


def test_a_prompt_after_the_end_or_in_the_same_chunk_is_said(sample, clip, schedule, caplog):
    found = sample(schedule("0: a\n0.6s: b\nchunk 9: c", "keep"))
    assert same_until(found, sample(clip("a"))) == 3
    assert "'c'" in caplog.text and "has 6 chunks" in caplog.text
    caplog.clear()
    sample(schedule("0: a\n0.6s: b\nchunk 2: c", "keep"))
    assert "'b' and 'c' begin in the same chunk, 2" in caplog.text


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("5s: a", {}, "Row 1 begins at 5s and nothing comes before it"),
        ("0: a\n3s: a dog", {}, r"Row 2 \(3s\): dog is unknown; known words are cat"),
        ("0: a\n3: long", {"switch": "blend"}, "'long' has 24 tokens and the one before it 16"),
        ("0: a", {"switch": "wipe"}, "switch is 'wipe'"),
        ("0: a", {"fps": 0.0}, "fps is 0.0"),
        ("0: a\n5: b\n2: c", {}, r"Row 3 \(2s\) comes after Row 2 \(5s\)"),
    ],
)
def test_what_cannot_be_is_refused_with_its_row(schedule, text, options, words):
    with pytest.raises(ValueError, match=words):
        schedule(text, **options)


def test_hooks_of_a_later_prompt_are_refused(schedule, clip):
    hooks = iter([None, "a LoRA"])
    usual = clip.encode_from_tokens_scheduled
    clip.encode_from_tokens_scheduled = lambda text: [[usual(text)[0][0], {"hooks": next(hooks)}]]
    with pytest.raises(ValueError, match=r"Row 2 \(3s\): the CLIP carries hooks that the first prompt has not"):
        schedule("0: a\n3s: b")
    clip.encode_from_tokens_scheduled = lambda text: usual(text) * 2
    with pytest.raises(ValueError, match=r"Row 1 \(.*\): The CLIP has hooks with 2 keyframes"):
        schedule("0: a")


def test_a_blend_that_cannot_be_is_refused_before_the_run_begins(sample, schedule):
    """Times alternate, so that the row before is not the prompt before."""
    early = schedule("0: a\n30s: long", "keep")
    done = []
    with pytest.raises(ValueError, match="only prompts of equal length can be blended"):
        sample(schedule("chunk 3: longer", "blend", previous=early), on_progress=done.append)
    assert not done


def test_a_node_is_found_inside_a_subgraph_and_the_newest_without_a_name(prompts):
    source = prompts.PromptSource({"3": "first", "5:7": "last"})
    found = [source.find(node) for node in ("3", "7", "5:7", None, "5")]
    assert found == ["3", "5:7", "5:7", "5:7", None]


def test_conditionings_that_cannot_follow_are_refused(sample, clip, schedule):
    positive = schedule("0: a\nchunk 2: b")
    with pytest.raises(ValueError, match="combines 2 prompt schedules"):
        sample(positive + schedule("0: c"))
    with pytest.raises(ValueError, match="negative conditioning is a prompt schedule"):
        sample(clip("a"), positive, cfg=2.0)
    changed = [[positive[0][0] * 2, positive[0][1]]]
    with pytest.raises(ValueError, match="another node has changed its first prompt"):
        sample(changed)
    assert same_until(sample(clip("a"), changed, cfg=2.0), sample(clip("a"), clip("b"), cfg=2.0)) == 0
    with pytest.raises(ValueError, match="previous holds 2 prompts"):
        schedule("3s: b", previous=clip("a") + clip("b"))
    with pytest.raises(ValueError, match="must rise"):
        schedule("chunk 2: b", previous=positive)


# While it runs


def post(prompts, box, text, node="7", **more):
    answer = Future()
    box.post(prompts.PromptRequest(text=text, node=node, answer=answer, **more))
    return answer


def test_a_live_prompt_begins_with_the_next_chunk(sample, schedule, prompts):
    now, answers = [], []
    box = prompts.PromptBox(now.append)

    def steer(progress):
        if progress.chunk == 1 and progress.step == 0:
            answers.append(post(prompts, box, "b", switch="keep"))
            answers.append(post(prompts, box, "a dog"))

    found = sample(schedule("0: a"), prompts=box, on_progress=steer)
    assert torch.equal(found, sample(schedule("0: a\nchunk 3: b", "keep")))
    assert answers[0].result().chunk == 2
    with pytest.raises(ValueError, match="known words are cat"):
        answers[1].result()
    assert [(p.chunk, p.text) for p in now] == [(0, "a"), (1, "a"), *((k, "b") for k in range(2, 6))]
    assert now[0].chunks == 6


def test_behind_a_text_encoder_the_model_is_loaded_with_memory_for_a_chunk(
    sample, schedule, prompts, tiny_wan, monkeypatch
):
    import comfy.model_management

    asked, box, load = [], prompts.PromptBox(), comfy.model_management.load_models_gpu
    shape = [1, 16, 3, 4, 4]

    def steer(progress):
        if progress.chunk == 1 and progress.step == 0:
            monkeypatch.setattr(comfy.model_management, "loaded_models", lambda *given: [])
            monkeypatch.setattr(
                comfy.model_management, "load_models_gpu", lambda *a, **named: asked.append(named) or load(*a, **named)
            )
            post(prompts, box, "b", switch="keep")

    sample(schedule("0: a"), prompts=box, on_progress=steer)
    chunk = tiny_wan.model.memory_required(shape)
    assert asked == [{"memory_required": 2 * chunk, "minimum_memory_required": chunk}]


def test_a_live_prompt_counts_its_recache_and_the_schedule_goes_on(sample, schedule, prompts):
    box, totals = prompts.PromptBox(), []

    def steer(progress):
        totals.append((progress.forwards, progress.total))
        if progress.chunk == 0 and progress.step == 1:
            post(prompts, box, "b")

    found = sample(schedule("0: a\nchunk 4: c"), prompts=box, on_progress=steer)
    assert torch.equal(found, sample(schedule("0: a\nchunk 2: b\nchunk 4: c")))
    assert totals[-1][0] == totals[-1][1] == totals[0][1] + 1


def test_a_cancel_while_a_prompt_is_encoded_answers_all_that_wait(prompt_run, prompts, monkeypatch):
    import comfy.model_management

    box, reloaded = prompts.PromptBox(), []
    run, _ = prompt_run("0: a", "keep", box=box, after_encoding=lambda: reloaded.append(True))
    answers = [post(prompts, box, text) for text in "bcd"]

    def cancelled(*_):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(prompts, "encode", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run.begin(1)
    for answer in answers:
        with pytest.raises(prompts.NotSteerable, match="was cancelled"):
            answer.result(timeout=1)
    assert not reloaded


def test_a_model_that_cannot_be_loaded_behind_a_text_encoder_ends_the_run(prompt_run, prompts):
    """It is no fault of the text, and nothing can be sampled without it."""

    def no_room():
        raise torch.OutOfMemoryError("no room for the model")

    box = prompts.PromptBox()
    run, _ = prompt_run("0: a", "keep", box=box, after_encoding=no_room)
    answers = [post(prompts, box, text) for text in ("b", "c")]
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run.begin(1)
    for answer in answers:
        with pytest.raises(prompts.NotSteerable, match="run ended before"):
            answer.result(timeout=1)


def test_behind_a_text_that_is_refused_the_model_is_loaded_again_too(prompt_run, prompts):
    box, reloaded = prompts.PromptBox(), []
    run, _ = prompt_run("0: a", "keep", box=box, after_encoding=lambda: reloaded.append(True))
    answers = [post(prompts, box, text) for text in ("a dog", "b")]
    run.begin(1)
    with pytest.raises(ValueError, match="dog is unknown"):
        answers[0].result(timeout=1)
    assert answers[1].result(timeout=1).text == "b" and len(reloaded) == 2


def test_a_live_prompt_switches_as_the_node_does_that_it_names(prompts, schedule, pack_module):
    def chain(first="3", second="7"):
        return schedule("chunk 9: b", "blend", 3, previous=schedule("0: a", "keep", node=first), node=second)

    box = prompts.PromptBox()
    run = prompts.PromptRun(
        prompts.schedule_of(chain()),
        chunks=20,
        frames_per_chunk=3,
        context_frames=0,
        set_context=lambda context: None,
        recache_forwards=lambda chunk, cut: 1,
        box=box,
    )
    answers = [post(prompts, box, "c", node) for node in ("3", "7")]
    answers.append(post(prompts, box, "c", "3", switch="recache", blend_chunks=5))
    run.begin(1)
    found = [answer.result(timeout=1) for answer in answers]
    assert [(prompt.switch, prompt.blend_chunks) for prompt in found] == [("keep", 2), ("blend", 3), ("recache", 5)]
    digest_of = pack_module("model_patches.stream_state").digest_of
    assert digest_of(positive=chain()) == digest_of(positive=chain("4", "5")), "a node's number makes no other video"


def test_a_live_prompt_that_a_later_one_could_not_blend_from_is_refused(sample, schedule, prompts):
    box, answers = prompts.PromptBox(), []

    def steer(progress):
        if progress.chunk == 1 and progress.step == 0:
            answers.append(post(prompts, box, "long", switch="keep"))

    found = sample(schedule("0: a\nchunk 5: b", "blend"), prompts=box, on_progress=steer)
    with pytest.raises(ValueError, match="only prompts of equal length can be blended"):
        answers[0].result()
    assert torch.equal(found, sample(schedule("0: a\nchunk 5: b", "blend")))


def test_a_live_prompt_in_a_written_ones_chunk_switches_in_its_own_way(prompt_run, prompts):
    now = []
    box = prompts.PromptBox(now.append)
    run, _ = prompt_run("0: a\nchunk 4: b\nchunk 9: c", "recache", box=box)
    assert [run.begin(chunk) for chunk in range(3)] == [False] * 3
    post(prompts, box, "d", switch="keep")
    before = run.extra_forwards
    assert run.begin(3) is False and run.extra_forwards < before
    assert [begun.text for begun in now] == ["a", "a", "a", "d"] and run.begin(8) is True


def test_a_live_prompt_that_comes_too_late_is_told_so(sample, schedule, prompts):
    box, answers = prompts.PromptBox(), []

    def steer(progress):
        if progress.chunk == 5 and progress.step == 0:
            answers.append(post(prompts, box, "b"))

    sample(schedule("0: a"), prompts=box, on_progress=steer)
    with pytest.raises(prompts.NotSteerable, match="last chunk is being made"):
        answers[0].result()
    waiting = post(prompts, box, "b")
    box.close()
    with pytest.raises(prompts.NotSteerable, match="ended before"):
        waiting.result()
    with pytest.raises(prompts.NotSteerable, match="just ended"):
        post(prompts, box, "b")


def test_no_more_prompts_than_a_person_writes_wait_for_a_run(prompts):
    box = prompts.PromptBox()
    for number in range(prompts.MAX_WAITING):
        post(prompts, box, f"{number}")
    with pytest.raises(prompts.NotSteerable, match=f"{prompts.MAX_WAITING} prompts wait already"):
        post(prompts, box, "one more")
    assert [request.text for request in box.take()] == [f"{number}" for number in range(prompts.MAX_WAITING)]
    post(prompts, box, "now there is room")


@pytest.fixture
def prompt_run(prompts, schedule, clip):
    """`run, shown = prompt_run(text, ...)`: a run of 40 chunks without a model; shown gets embeddings."""

    def make(text, switch, **more):
        shown = []
        written = prompts.schedule_of(schedule(text, switch))
        clip.encoded.clear()
        run = prompts.PromptRun(
            written,
            chunks=40,
            frames_per_chunk=3,
            context_frames=0,
            set_context=shown.append,
            recache_forwards=lambda chunk, cut: 5,
            levels=DIAGONAL,
            **more,
        )
        return run, shown

    return make


@pytest.mark.parametrize("switch", ["recache", "keep", "blend"])
def test_embeddings_that_no_chunk_shows_any_more_are_dropped(prompt_run, prompts, switch):
    box = prompts.PromptBox()
    run, shown = prompt_run("0: a\nchunk 38: z", switch, box=box)
    for chunk in range(36):
        if chunk:
            answer = post(prompts, box, f"{chunk}", blend_chunks=6)
        run.begin(chunk)
        assert not chunk or answer.result().chunk == chunk
        assert len(run._prompts) <= 3, "the one that is left, the new one, and z"
    assert len(run.live) == 35


def test_a_run_that_goes_on_knows_its_prompts_and_encodes_those_it_will_show(prompt_run, prompts, clip):
    text = "0: a\nchunk 4: b\nchunk 11: c\nchunk 23: d\nchunk 24: e"
    given = {3: "keep", 7: "blend", 9: "blend", 10: "recache", 11: "blend", 20: "cut", 22: "blend", 25: "blend"}
    for written in ("recache", "blend"):
        box = prompts.PromptBox()
        whole, _ = prompt_run(text, written, box=box)
        shown, again, live, encoded = [], [], [], []
        for chunk in range(40):
            live.append(tuple(whole.live))
            if chunk in given:
                post(prompts, box, f"live {chunk}", switch=given[chunk], blend_chunks=4)
            again.append(whole.begin(chunk))
            shown.append(whole._current)
        for first in range(40):
            box = prompts.PromptBox()
            run, _ = prompt_run(text, written, box=box, first_chunk=first, live=live[first])
            encoded.append([name for name, _ in clip.encoded])
            for chunk in range(first, 40):
                if chunk in given:
                    post(prompts, box, f"live {chunk}", switch=given[chunk], blend_chunks=4)
                assert run.begin(chunk) == again[chunk], (first, chunk)
                assert run.cuts(chunk) == (chunk == 20) and run.schedule_row(chunk) == whole.schedule_row(chunk)
                assert torch.equal(run._current, shown[chunk]), (first, chunk)
            assert run.extra_forwards == whole.extra_forwards
            assert run.forwards_before(first) == whole.forwards_before(first)
            assert run.live == whole.live
        assert [encoded[first] for first in (2, 8, 20, 30)] == [[], ["live 3", "live 7"], ["live 11"], ["live 25"]]


# Straight to the disk


@pytest.fixture(scope="module")
def demo(pack_module):
    model, clip, vae = pack_module("nodes.demo_loader").DiagonalDemoLoader.execute("teacher").result
    return model, clip, vae


@pytest.fixture
def stream(pack_module, demo, prompts, output, monkeypatch):
    """`stream(text, **more)`: latents of every chunk that was made of a video of 7 chunks, states after each.

    `then`: rows of schedules behind it, and the switch of each."""
    streaming = pack_module("model_patches.streaming")
    model, clip, vae = demo
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def run(text, switch="recache", schedule=CLEAN, state_every=1, fps=16.0, then=(), **more):
        found = []
        submit = streaming.StreamDecoder.submit
        with monkeypatch.context() as patch:
            patch.setattr(
                streaming.StreamDecoder, "submit", lambda self, x: (found.append(x.clone()), submit(self, x))[1]
            )
            positive = prompts.schedule_prompts(clip, text, fps=fps, switch=switch, blend_chunks=2, node_id="7")
            for rows, its in then:
                positive = prompts.schedule_prompts(
                    clip, rows, fps=fps, switch=its, blend_chunks=2, previous=positive, node_id="8"
                )
            options = streaming.StreamOptions(
                width=64,
                height=64,
                seconds=5.0,
                fps=16,
                seed=3,
                filename_prefix="v",
                format="png",
                cfg=2.0,
                state_every=state_every,
            )
            try:
                streaming.stream_video(model, positive, negative, vae, schedule, options, **more)
            except (Stop, comfy.model_management.InterruptProcessingException):
                pass
        return found

    return run


class Stop(BaseException):
    """What a test stops a run with: nothing is saved behind it, as after a kill."""


def stop_at(chunk, *, box=None, prompts=None, at=None):
    def report(progress):
        if at is not None and (progress.chunk, progress.step) == (at, 0):
            post(prompts, box, "a blue square moves up")
        if (progress.chunk, progress.step) == (chunk, 1):
            raise Stop

    return report


TEXT = "0: a red circle moves right\nchunk 5: a blue square moves up"


RESUMED = [("recache", CLEAN), ("recache", DIAGONAL), ("blend", CLEAN), ("cut", CLEAN), ("cut", DIAGONAL)]


@pytest.mark.parametrize(("switch", "schedule"), RESUMED)
def test_a_stream_resumes_bit_by_bit_before_at_and_after_a_switch(stream, switch, schedule):
    whole = stream(TEXT, switch, schedule)
    assert len(whole) == 7
    for stopped in (3, 4, 5, 6) if switch == "cut" else (3, 4, 5):
        lines, seen = [], []
        made = stream(TEXT, switch, schedule, on_progress=stop_at(stopped))
        made += stream(TEXT, switch, schedule, announce=lines.append, on_progress=seen.append)
        assert seen[-1].forwards == seen[-1].total, "what was done before is counted"
        assert f"after chunk {stopped}" in lines[0]
        assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))


@pytest.mark.parametrize("switch", ["recache", "keep", "cut"])
def test_a_cancel_loses_no_chunk_of_a_stream_with_prompts(stream, switch):
    """Wherever it comes in the fifth: while the window is written again, in a step, while the chunk is decoded."""
    seen = []
    whole = stream(TEXT, switch, state_every=99, on_progress=seen.append)
    own = [progress.forwards for progress in seen if progress.chunk == 4]
    assert len(own) == (6 if switch == "recache" else 3)
    for forwards in own:

        def cancel(progress, at=forwards):
            if progress.forwards == at:
                comfy.model_management.interrupt_current_processing()

        stream(TEXT, switch, state_every=99, on_progress=cancel)
        lines = []
        made = stream(TEXT, switch, state_every=99, announce=lines.append)
        assert "after chunk 4" in lines[0], f"cancelled at forward {forwards}"
        assert len(made) == 3 and all(torch.equal(a, b) for a, b in zip(made, whole[4:], strict=True))


@pytest.mark.parametrize("live", ["recache", "keep"])
@pytest.mark.parametrize("switch", ["recache", "cut"])
def test_a_prompt_sent_to_a_run_that_resumes_without_its_window_begins_behind_the_chunk(stream, prompts, switch, live):
    """That chunk's own switch has given the window up: another one in its place would find nothing there."""

    def steered(report):
        box = prompts.PromptBox()
        return {"prompts": box, "on_progress": lambda progress: report(box, progress)}

    def send(box, progress):
        if (progress.chunk, progress.step) == (4, 0):
            post(prompts, box, "a green cross moves left", switch=live)

    def cancel(box, progress):
        if progress.chunk == 4:
            comfy.model_management.interrupt_current_processing()

    whole = stream(TEXT, switch, state_every=99, **steered(send))
    stream(TEXT, switch, state_every=99, **steered(cancel))
    box, lines = prompts.PromptBox(), []
    answer = post(prompts, box, "a green cross moves left", switch=live)
    made = stream(TEXT, switch, state_every=99, prompts=box, announce=lines.append)
    assert "after chunk 4" in lines[0] and answer.result().chunk == 5
    assert len(made) == 3 and all(torch.equal(a, b) for a, b in zip(made, whole[4:], strict=True))


@pytest.mark.parametrize("stopped", [3, 5, 6])
def test_a_stream_with_a_live_cut_and_a_recache_behind_it_resumes_bit_by_bit(stream, prompts, stopped):
    text, then = "0: a red circle moves right", [("chunk 7: a green cross moves left", "recache")]

    def steered(box, stopped):
        def report(progress):
            if (progress.chunk, progress.step) == (2, 0):
                post(prompts, box, "a blue square moves up", switch="cut")
            if (progress.chunk, progress.step) == (stopped, 1):
                raise Stop

        return {"prompts": box, "on_progress": report, "then": then, "schedule": DIAGONAL}

    whole = stream(text, **steered(prompts.PromptBox(), 99))
    made = stream(text, **steered(prompts.PromptBox(), stopped))
    seen = []
    made += stream(text, then=then, schedule=DIAGONAL, on_progress=seen.append)
    assert len(made) == 7 and all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))
    assert seen[-1].forwards == seen[-1].total


def test_a_stream_decodes_each_shot_by_itself(stream, pack_module, demo, output, monkeypatch):
    """At a cut the first frame is held, so that the video keeps its length; its last frames are of one shot."""
    streaming, last = pack_module("model_patches.streaming"), []
    usual = streaming.encode_context
    monkeypatch.setattr(streaming, "encode_context", lambda vae, x, n: (last.append(x), usual(vae, x, n))[1])
    latents = stream(TEXT, "cut")
    with pack_module("model_patches.stream_decode").stream_decoder(demo[2]) as decoder:
        before = torch.cat([decoder.decode(x)[0] for x in latents[:4]])
        decoder.reset()
        behind = torch.cat([decoder.decode(x)[0] for x in latents[4:]])
    assert (len(before), len(behind)) == (45, 33)
    wanted = torch.cat([before, behind[:1].expand(3, -1, -1, -1), behind])[:80]  # of 5 s
    found = frames_in(output / "v_00001_")
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1 / 128
    for stopped, number in ((4, 2), (5, 3)):
        stream(TEXT, "cut", on_progress=stop_at(stopped))
        stream(TEXT, "cut")
        assert torch.equal(frames_in(output / f"v_0000{number}_"), found)
    stream(TEXT.replace("chunk 5", "chunk 7"), "cut")
    assert len(last[-1]) == 11, "of the last shot alone, which the held frames begin"
    assert all(torch.equal(held, last[-1][3]) for held in last[-1][:3])
    assert torch.equal(last[1], last[0]) and torch.equal(last[2], last[0])


def frames_in(folder):
    """The frames of a folder of PNG images, [T, H, W, 3] in 0..1."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.glob("*.png"))]) / 255


@pytest.mark.parametrize(("text", "fps", "said"), [("2s", 24.0, True), ("2s", 16.0, False), ("chunk 5", 24.0, False)])
def test_seconds_at_another_frame_rate_than_the_videos_are_said(stream, caplog, text, fps, said):
    """Not where they only say the start, which is the same at any rate."""
    stream(f"0: a red circle moves right\n{text}: a blue square moves up", fps=fps, on_progress=stop_at(0))
    assert ("counts seconds at 24 frames a second and the video has 16" in caplog.text) == said


def test_a_resumed_stream_knows_its_live_prompts(stream, prompts):
    def steered(box):
        return stop_at(99, box=box, prompts=prompts, at=2)

    box = prompts.PromptBox()
    whole = stream("0: a red circle moves right", prompts=box, on_progress=steered(box))
    box = prompts.PromptBox()
    made = stream("0: a red circle moves right", prompts=box, on_progress=stop_at(5, box=box, prompts=prompts, at=2))
    made += stream("0: a red circle moves right")
    assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))
    assert not torch.equal(whole[-1], stream(TEXT)[-1])


def test_an_accepted_prompt_is_not_lost_where_states_are_rare(stream, prompts, output):
    text = "0: a red circle moves right"

    def steered(box, stopped):
        return {"prompts": box, "on_progress": stop_at(stopped, box=box, prompts=prompts, at=2), "state_every": 99}

    whole = stream(text, **steered(prompts.PromptBox(), 99))
    stream(text, **steered(prompts.PromptBox(), 5))
    lines = []
    again = stream(text, announce=lines.append, state_every=99)
    assert "v_00002_ has no state to go on from" in lines[0]
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    assert [path.name for path in output.iterdir() if path.name.endswith(".json")] == [], "finished"


def test_live_prompts_are_rows_of_a_schedule(prompts):
    def rows_of(*given):
        fields = {"node": "7", "blend_chunks": 3}
        return prompts.schedule_rows([prompts.LivePrompt(chunk=k, text=x, switch=s, **fields) for k, x, s in given])

    assert rows_of() == ""
    rows = rows_of((25, "first", "keep"), (25, "a green\nsquare: up", "keep"), (3, "#1, 5s: a dog", "blend"))
    assert [(str(row.at), row.text) for row in prompts.parse_prompts(rows)] == [
        ("chunk 4", "#1, 5s: a dog"),
        ("chunk 26", "a green square: up"),
    ]
    rows = rows_of((1, "a", "keep"), (2, "b", "keep"), (3, "c", "blend"), (4, "d", "keep"))
    kept, blended = ["# switch: keep", "chunk 2: a", "chunk 3: b"], ["# switch: blend, blend_chunks: 3", "chunk 4: c"]
    assert rows.splitlines()[1:] == [*kept, *blended, "# switch: keep", "chunk 5: d"]
    many = rows_of(*((chunk, "a", "keep") for chunk in range(30)))
    assert len(prompts.parse_prompts(many)) == 20
    assert many.endswith("\n# and 10 more, in the file .prompts.txt beside the video")


def test_a_steered_video_is_made_again_from_the_file_beside_it(stream, prompts, output):
    given = {1: ("a blue square moves up", "keep"), 2: ("a green cross moves up", "recache")}
    given[4] = ("a red circle moves up", "recache")
    box, answers = prompts.PromptBox(), []

    def steer(progress):
        if progress.step == 0 and progress.chunk in given:
            text, switch = given.pop(progress.chunk)
            answers.append(post(prompts, box, text, switch=switch))

    steered = stream("0: a red circle moves right", prompts=box, on_progress=steer)
    assert [answer.result(timeout=1).chunk for answer in answers] == [2, 3, 5]
    assert not list(output.glob("*.prompts.json"))
    text = (output / "v_00001_.prompts.txt").read_text(encoding="utf-8")
    groups = [group.partition("\n") for group in text.split("# switch: ")[1:]]
    then = [(rows, switch) for switch, _, rows in groups]
    assert [(switch, rows.count("chunk")) for rows, switch in then] == [("keep", 1), ("recache", 2)]
    again = stream("0: a red circle moves right", then=then)
    assert all(torch.equal(a, b) for a, b in zip(again, steered, strict=True))


def test_a_cancelled_streams_prompts_are_rows_beside_it_too(stream, prompts, output):
    box = prompts.PromptBox()
    stream("0: a red circle moves right", prompts=box, on_progress=stop_at(3, box=box, prompts=prompts, at=1))
    text = (output / "v_00001_.prompts.txt").read_text(encoding="utf-8")
    assert text.endswith("\n# switch: recache\nchunk 3: a blue square moves up\n")
    assert (output / "v_00001_.prompts.json").exists(), "to go on with"


def test_a_stream_stopped_in_its_first_chunk_says_the_prompts_that_go_with_it(stream, prompts, output, caplog):
    box, lines, text = prompts.PromptBox(), [], "0: a red circle moves right"
    steer = stop_at(0, box=box, prompts=prompts, at=0)
    stream(text, prompts=box, on_progress=steer, announce=lines.append)
    assert list(output.iterdir()) == []
    assert "v_00001_ was stopped before its first frame: it is not kept, nor are its prompts." in lines[-1]
    assert "\nchunk 2: a blue square moves up" in lines[-1] and lines[-1] in caplog.text
    stream(text, on_progress=stop_at(0), announce=lines.append)
    assert len(lines) == 3, "nothing to say without prompts"


def test_a_persons_file_of_that_name_stays_and_the_prompts_are_kept(stream, prompts, output, caplog):
    notes, box = output / "v_00001_.prompts.txt", prompts.PromptBox()
    steer = stop_at(99, box=box, prompts=prompts, at=1)

    def write(progress):
        notes.write_text("mine", encoding="utf-8")
        steer(progress)

    stream("0: a red circle moves right", prompts=box, on_progress=write)
    assert notes.read_text(encoding="utf-8") == "mine" and "v_00001_.prompts.txt is no list" in caplog.text
    assert (output / "v_00001_.prompts.json").exists() and not list(output.glob("*.state.safetensors"))


def test_a_list_of_prompts_is_replaced_by_a_longer_one(prompts, tmp_path):
    given = [
        prompts.LivePrompt(chunk=k, text=f"a \ud800 {k}", node="7", switch="keep", blend_chunks=1) for k in range(30)
    ]
    path = tmp_path / "v.prompts.txt"
    assert prompts.save_rows(path, ()) and not path.exists()
    for number in (1, 30):
        assert prompts.save_rows(path, given[:number])
        assert len(prompts.parse_prompts(path.read_text(encoding="utf-8"))) == number
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_finished_stream_says_its_live_prompts(stream, prompts, pack_module, monkeypatch):
    """Also those that an earlier run of it was given."""
    streaming, said = pack_module("model_patches.streaming"), []
    monkeypatch.setattr(streaming, "StreamResult", lambda **fields: said.append(fields["message"]))
    for at in ((99,), (3, 99)):
        for number, stopped in enumerate(at):
            box = prompts.PromptBox()
            given = stop_at(stopped, box=box, prompts=prompts, at=None if number else 2)
            stream("0: a red circle moves right", prompts=box, on_progress=given)
    assert len(said) == 2 and all(text.endswith("\nchunk 4: a blue square moves up") for text in said)


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[3]", '[{"chunk": 1}]'])
def test_a_damaged_list_of_prompts_leaves_those_of_the_state(stream, prompts, output, content):
    text = "0: a red circle moves right"
    box = prompts.PromptBox()
    whole = stream(text, prompts=box, on_progress=stop_at(99, box=box, prompts=prompts, at=0))
    box = prompts.PromptBox()
    stream(text, prompts=box, on_progress=stop_at(3, box=box, prompts=prompts, at=0))
    next(output.glob("*.prompts.json")).write_text(content)
    rest = stream(text)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_prompt_accepted_after_the_last_state_is_not_lost(stream, prompts, output, stopped):
    """Accepted in the third chunk, behind the state of the second; no state is written for it."""
    text = "0: a red circle moves right"

    def steered(stopped):
        box = prompts.PromptBox()
        return {"prompts": box, "on_progress": stop_at(stopped, box=box, prompts=prompts, at=2), "state_every": 2}

    whole = stream(text, **steered(99))
    stream(text, **steered(stopped))
    assert len([path for path in output.iterdir() if path.name.endswith(".prompts.json")]) == 1
    for path in output.glob("*.prompts.json"):
        assert [prompt["text"] for prompt in json.loads(path.read_text())] == ["a blue square moves up"]
    lines = []
    rest = stream(text, announce=lines.append, state_every=2)
    assert "after chunk 2" in lines[0]
    assert len(rest) == 5 and all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))


def test_comfyui_sees_the_text_encoders_of_a_schedule_among_the_models_in_use(prompts, demo, schedule):
    loader = demo[1].clone()
    before = schedule("0: a", node="3")
    found = prompts.schedule_prompts(
        loader, "3s: a red circle moves right", fps=16.0, switch="keep", blend_chunks=1, previous=before, node_id="7"
    )
    assert prompts.schedule_of(found).get_models() == [loader.patcher]
    assert prompts.schedule_of(before).get_models() == [], "a text encoder of another pack may have none"


def test_the_nodes_widgets_reach_the_schedule(pack_module, clip, schedule, monkeypatch):
    node = pack_module("nodes.prompt_schedule").DiagonalPromptSchedule
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="12"), raising=False)
    widgets = {"text": "2s: b", "switch": "blend", "blend_chunks": 3, "fps": 12.0}
    (found,) = node.execute(clip, **widgets, previous=schedule("0: a")).result
    made = found[0][1]["diagonal_prompt_schedule"]
    last = made.entries[-1]
    assert (last.text, last.switch, last.blend_chunks, last.fps) == ("b", "blend", 3, 12.0)
    assert [entry.text for entry in made.entries] == ["a", "b"] and list(made.source.clips) == ["7", "12"]


# Prompts from outside


@pytest.fixture
def steering(pack_module, monkeypatch):
    """nodes.steering before a server that keeps what it is to send, as (data, client)."""
    module = pack_module("nodes.steering")
    server = SimpleNamespace(client_id="C", last_prompt_id="P", sent=[])
    server.send_sync = lambda event, data, client: server.sent.append((data, client))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    return SimpleNamespace(module=module, server=server)


def test_a_run_takes_prompts_of_its_own_client_while_it_goes_on(steering, schedule, clip, prompts):
    find, server = steering.module._find, steering.server

    def refused(status, words, **body):
        with pytest.raises(steering.module.Refused, match=words) as error:
            find({"client_id": "C", **body})
        assert error.value.status == status

    refused(409, "No run takes prompts now")
    with steering.module.steerable(clip("a")) as box:
        assert box is None and not server.sent, "without a schedule"
    with pytest.raises(KeyError), steering.module.steerable(schedule("0: a", node="5:7")) as first:
        server.client_id, server.last_prompt_id = None, "Q"
        with steering.module.steerable(schedule("0: a", node="8")):
            assert find({"client_id": "C"})[0].box is first
            assert [find({"client_id": "C", "node": node})[1] for node in (7, "7", "5:7")] == ["5:7"] * 3
            assert find({"client_id": "C", "prompt_id": "P"})[1] == "5:7"
            assert find({"client_id": "D"})[1] == find({"client_id": "C", "prompt_id": "Q"})[1] == "8", "nobody's run"
            refused(404, "prompt_id 'P' does not run now", client_id="D", prompt_id="P")
            refused(404, "node '8' is in no schedule that runs; those that do are 5:7", node="8")
        refused(403, "belongs to another client", client_id="D")
        refused(403, "belongs to another client", client_id="D", prompt_id="P")
        refused(404, "prompt_id 'Q' does not run now", prompt_id="Q")
        first.on_chunk(prompts.PromptNow(chunk=1, chunks=6, text="a"))
        raise KeyError
    usual = {"prompt_id": "P", "nodes": ["5:7"]}
    running = {**usual, "running": True, "chunk": 2, "chunks": 6, "text": "a"}
    assert server.sent == [(running, "C"), ({**usual, "running": False}, "C")], "a run without a client tells nobody"
    refused(409, "No run takes prompts now")
    with pytest.raises(prompts.NotSteerable, match="just ended"):
        post(prompts, first, "b")


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, 0, ""),
        ({"text": "x" * 16384, "node": 7, "switch": "blend", "blend_chunks": 1, "prompt_id": None}, 0, ""),
        ({"text": "x" * 16385}, 413, "text has 16385 characters; the most is 16384"),
        ({"text": "x" * 70000}, 413, "The body is larger than 65536 bytes"),
        ({"text": " "}, 400, "text is empty"),
        ({"text": None}, 400, "text is None; it must be text"),
        ({"client_id": 3}, 400, "client_id is 3; it must be text"),
        ({"node": True}, 400, "node is True; it must be text or a whole number"),
        ({"switch": "cut"}, 0, ""),
        ({"switch": "wipe"}, 400, "switch is 'wipe'; choose one of recache, keep, blend, cut"),
        ({"blend_chunks": 0}, 400, "blend_chunks is 0"),
        ({"blend_chunks": True}, 400, "blend_chunks is True; it must be a whole number"),
    ],
)
def test_a_prompts_body_is_checked(steering, change, status, words):
    body = {"client_id": "C", "text": "a", **change}

    async def parts(size):
        data = json.dumps(body).encode()
        for first in range(0, len(data), 1000):
            yield data[first : first + 1000]

    reading = steering.module._body(SimpleNamespace(content=SimpleNamespace(iter_chunked=parts)))
    if not status:
        assert asyncio.run(reading) == body
        return
    with pytest.raises(steering.module.Refused, match=words) as error:
        asyncio.run(reading)
    assert error.value.status == status


@pytest.mark.parametrize("owner", ["C", None])
def test_a_refusal_after_the_answer_has_gone_reaches_its_page(pack_module, prompts, demo, monkeypatch, caplog, owner):
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    steering = pack_module("nodes.steering")
    sent = []
    server = SimpleNamespace(client_id=owner, last_prompt_id="P", send_sync=lambda *message: sent.append(message))
    monkeypatch.setattr(pack_module("nodes.client"), "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(steering, "ANSWER_SECONDS", 0.01)
    positive = prompts.schedule_prompts(
        demo[1], "0: a red circle moves right", fps=16.0, switch="recache", blend_chunks=1, node_id="7"
    )

    async def ask() -> int:
        app = web.Application()
        app.router.add_post("/", steering.post_prompt)
        async with TestClient(TestServer(app)) as client:
            return (await client.post("/", json={"client_id": "C", "text": "a purple dog"})).status

    with steering.steerable(positive) as box:
        assert asyncio.run(ask()) == 202 and sent == []
        (request,) = box.take()
        request.answer.set_exception(ValueError("words that are not known"))
        if owner is None:
            assert sent == [], "it would go to every page"
        else:
            ((event, data, client),) = sent
            assert (event, client, data["prompt_id"], data["nodes"]) == (steering.PROMPT_EVENT, "C", "P", ["7"])
            assert data["refused"] == "words that are not known" and data["text"] == "a purple dog"
    assert "cannot be used: words that are not known" in caplog.text
