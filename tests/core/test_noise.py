"""Seeded noise: a function of seed, chunk and step alone, and really Gaussian."""

import random
from types import SimpleNamespace

import pytest
import torch

from diagonal_sampler import noise as noise_module
from diagonal_sampler.noise import CONTEXT_STEP, INITIAL_STEP, SeededNoise, allow_pinning, pinned_empty, send

SHAPE = (2, 16, 6, 8)


def test_same_seed_same_noise_whatever_ran_before():
    fresh = SeededNoise(7, SHAPE)(3, 1, 3)
    used = SeededNoise(7, SHAPE)
    for chunk, step in ((0, INITIAL_STEP), (3, 0), (9, CONTEXT_STEP)):
        used(chunk, step, 2)
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(used(3, 1, 3), fresh)
    assert torch.equal(used(3, 1, 3), fresh)


def test_a_seed_gives_the_numbers_that_it_always_gave():
    drawn = SeededNoise(7, (1, 1, 1, 4))(3, 1, 1)
    known = [1.255885362625122, -0.727898359298706, -0.023610541597008705, 0.07705554366111755]
    assert drawn.flatten().tolist() == pytest.approx(known)


def test_global_random_state_is_neither_read_nor_changed():
    before = torch.get_rng_state()
    python_before = random.getstate()
    first = SeededNoise(7, SHAPE)(0, INITIAL_STEP, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(1234)
    assert torch.equal(SeededNoise(7, SHAPE)(0, INITIAL_STEP, 3), first)
    torch.set_rng_state(before)


@pytest.mark.parametrize("draw", [(0, 0), (0, INITIAL_STEP), (1, 0), (0, CONTEXT_STEP), (-1, CONTEXT_STEP), (11, 2)])
def test_shape_and_dtype(draw):
    noise = SeededNoise(0, SHAPE)(*draw, 3)
    assert noise.shape == (2, 16, 3, 6, 8)
    assert noise.dtype == torch.float32


def test_global_defaults_do_not_reach_the_noise():
    expected = SeededNoise(5, SHAPE)(0, 0, 3)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = SeededNoise(5, SHAPE)(0, 0, 3)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_draws_are_standard_normal_and_uncorrelated():
    keys = [(chunk, step) for chunk in range(-3, 12) for step in (CONTEXT_STEP, INITIAL_STEP, 0, 1, 2, 3)]
    source = SeededNoise(3, (1, 16, 8, 8))
    draws = torch.stack([source(chunk, step, 3).flatten() for chunk, step in keys])
    numbers = draws.shape[1]
    correlation = (draws @ draws.T) / numbers
    # Each entry is 0 or, on the diagonal, 1, with a deviation of about 1/sqrt(numbers); six of them leave room.
    limit = 6 / numbers**0.5
    assert (correlation - torch.eye(len(keys))).fill_diagonal_(0).abs().max() < limit
    assert (correlation.diagonal() - 1).abs().max() < limit * 2**0.5
    assert draws.mean(dim=1).abs().max() < limit
    sorted_draws = draws.flatten().sort().values.double()
    ranks = (torch.arange(sorted_draws.numel()) + 0.5) / sorted_draws.numel()
    distance = (torch.special.ndtr(sorted_draws) - ranks).abs().max()
    assert distance < 2 / sorted_draws.numel() ** 0.5  # Kolmogorov-Smirnov: 1.95 is the 0.1% level


def test_seeds_differ_and_all_64_bits_count():
    def draw(seed: int) -> torch.Tensor:
        return SeededNoise(seed, SHAPE)(0, 0, 1)

    seeds = [0, 1, 2, 2**32, 2**53 + 1, 2**53, 2**63, 2**64 - 1]
    draws = torch.stack([draw(seed).flatten() for seed in seeds])
    assert (draws[:, None] - draws[None]).abs().amax(dim=2).fill_diagonal_(1).min() > 0.5
    assert torch.equal(draw(-1), draw(2**64 - 1))
    assert torch.equal(draw(2**64), draw(0))


def test_samples_of_a_batch_differ():
    noise = SeededNoise(0, SHAPE)(0, 0, 3)
    assert (noise[0] * noise[1]).mean().abs() < 0.2
    assert (noise[0] - noise[1]).abs().max() > 1


def test_samples_taken_from_a_batch_keep_their_noise():
    whole = SeededNoise(5, (4, *SHAPE[1:]))(2, 1, 3)
    assert torch.equal(SeededNoise(5, SHAPE, rows=[3, 1])(2, 1, 3), whole[[3, 1]])
    for rows in ([0], [0, 1, 2], [0, -1], []):
        with pytest.raises(ValueError, match="2 samples need as many numbers from 0 on"):
            SeededNoise(5, SHAPE, rows=rows)


def test_memory_is_pinned_only_where_it_may_and_can_be(monkeypatch):
    """Else a copy to the GPU is a plain one; the tensor is a stand-in, for there may be no GPU here."""
    cuda, host = torch.device("cuda"), torch.ones(2)
    x = SimpleNamespace(shape=(2,), dtype=torch.float32, device=torch.device("cpu"), to=lambda *given, **named: named)
    empty = torch.empty

    def pinned(*given, pin_memory, **named):
        found.append(empty(*given, **named))
        return found[-1]

    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    found = []
    monkeypatch.setattr(noise_module, "_may_pin", True)
    monkeypatch.setattr(torch, "empty", pinned)
    assert pinned_empty((2, 3), torch.bool) is found[0] and found[0].shape == (2, 3) and found[0].dtype == torch.bool
    assert send(host, torch.device("cpu")) is host and len(found) == 1
    allow_pinning(False)
    assert pinned_empty((2,), torch.bool) is None and send(x, cuda) == {} and len(found) == 1
    allow_pinning(True)
    monkeypatch.setattr(torch, "empty", refused)
    assert pinned_empty((2,), torch.bool) is None and send(x, cuda) == {}
