"""Requests far beyond what a machine holds: refused at once, with what would fit."""

from __future__ import annotations

import random
import re
import time

import fault_rows
import pytest
import torch

from diagonal_sampler.settings import CausalSettings

SECONDS = 1.0
CHUNK = 3


@pytest.fixture
def asks(pack_module, demo, output):
    """Ways to ask for too much: each takes random numbers and raises what the pack raises."""
    streaming, sampling = pack_module("model_patches.streaming"), pack_module("model_patches.sampling")
    make_causal = pack_module("model_patches.causal").make_causal
    from diagonal_sampler.schedule import DiagonalSchedule

    schedule = DiagonalSchedule.preset("diagonal 4-3-2")

    def stream(rng: random.Random, *, model=None, **changes):
        fields = dict(width=64, height=64, seconds=5.0, fps=16.0, seed=rng.randrange(99), filename_prefix="v")
        options = streaming.StreamOptions(**{**fields, **changes})
        streaming.stream_video(model or demo[0], *demo[1:], schedule, options)

    def windowed(window: int):
        return make_causal(demo[0], CausalSettings(frames_per_chunk=CHUNK, window=window, sink=0))

    def huge_picture(rng):
        """16384 squared and more, by the stream's own function: the node's limit is ComfyUI's to check."""
        side = 16384 * rng.choice((1, 2, 4))
        stream(rng, model=windowed(rng.choice((240, 4096))), width=side, height=side)

    def million_chunks(rng):
        stream(rng, model=windowed(-1), seconds=86_400.0, fps=240.0, width=rng.choice((832, 1280)), height=480)

    def too_long(rng):
        stream(rng, seconds=CHUNK * 1_000_000 * 4 / 16.0)

    def huge_latent(rng):
        """A LATENT of a million chunks, or 16384 pixels squared; it takes no memory, as it is one number."""
        shape = rng.choice(((1, 16, 3 * 10**6, 60, 104), (1, 16, 21, 2048 * 8, 2048 * 8)))
        sampling.plan_clip(windowed(-1), torch.zeros(1).expand(shape).shape, schedule)

    def odd_size(rng):
        stream(rng, width=16384 + rng.randrange(1, 16), height=64)

    return (huge_picture, million_chunks, too_long, huge_latent, odd_size)


def test_row_oversize(asks, output):
    def check(number: int) -> float:
        rng = fault_rows.generator("oversize", number)
        ask = asks[number % len(asks)]
        began = time.process_time()  # a busy machine refuses no later
        try:
            ask(rng)
        except ValueError as error:
            message = str(error)
        else:
            raise AssertionError(f"{ask.__name__} was not refused")
        seconds = time.process_time() - began
        assert seconds < SECONDS, f"{ask.__name__} took {seconds:.2f} s"
        assert re.search(r"(would fit|nearest that fit|at most|multiple of).*\d", message), message
        assert not list(output.iterdir()), f"{ask.__name__} left {list(output.iterdir())}"
        return seconds

    fault_rows.run_cases("oversize", check)


def test_what_would_fit_is_what_fits(asks, pack_module, demo, monkeypatch):
    """The window and the size that a refusal names are the largest that are let through."""
    import comfy.model_management

    from diagonal_sampler.schedule import DiagonalSchedule

    sampling = pack_module("model_patches.sampling")
    make_causal = pack_module("model_patches.causal").make_causal
    schedule = DiagonalSchedule.preset("diagonal 4-3-2")

    def plan(window: int, side: int = 64):
        model = make_causal(demo[0], CausalSettings(frames_per_chunk=CHUNK, window=window, sink=0))
        return sampling.plan_clip(model, (1, 16, 300, side // 8, side // 8), schedule)

    bytes_of_twelve = plan(12).cache_bytes(demo[0], text_tokens=(0,))
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: bytes_of_twelve)
    plan(12)
    with pytest.raises(
        ValueError, match="a window of 12 latent frames at 64x64, or 32x32 pixels with 40 latent frames"
    ):
        plan(40)
    plan(40, 32)
    with pytest.raises(ValueError, match="What would fit"):
        plan(13)
