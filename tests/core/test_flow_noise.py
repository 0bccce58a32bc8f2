"""Noise that moves with a flow: Gaussian and white in every latent frame, and where it should be."""

import math
import time

import pytest
import torch

from diagonal_sampler.flow import OpticalFlow, camera_flow, grid
from diagonal_sampler.flow_noise import FRESH, MAPS_KEPT, FlowNoise
from diagonal_sampler.noise import CONTEXT_STEP, INITIAL_STEP, SeededNoise

HEIGHT, WIDTH = 60, 104
COUNTS = (3, 3, 3)


def shift(x: float, y: float) -> OpticalFlow:
    return OpticalFlow.everywhere(torch.tensor([float(x), float(y)]).expand(8, HEIGHT, WIDTH, 2))


def turning(at: int, first: tuple[float, float], then: tuple[float, float]) -> OpticalFlow:
    """One shift in the steps before `at`, another from there on."""
    return OpticalFlow.everywhere(torch.cat([shift(*first).flow[:at], shift(*then).flow[at:]]))


def folding() -> OpticalFlow:
    """The left half moves right and the right half left: they fold over each other in the middle."""
    motion = torch.zeros(8, HEIGHT, WIDTH, 2)
    motion[..., : WIDTH // 2, 0], motion[..., WIDTH // 2 :, 0] = 1.3, -1.3
    return OpticalFlow.everywhere(motion)


def half_known() -> OpticalFlow:
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[..., 30:80] = 1
    return shift(1.5, 0.5).masked(mask)


# Latent pixels per latent frame.
FLOWS = {
    "translation": shift(2, -1),
    "sub-pixel": shift(0.37, 0),
    "rotation": camera_flow(8, HEIGHT, WIDTH, rotation=3),
    "zoom in": camera_flow(8, HEIGHT, WIDTH, zoom=2),
    "zoom out": camera_flow(8, HEIGHT, WIDTH, zoom=-2),
    "folding": folding(),
    "rest": shift(0, 0),
    "mask": half_known(),
}


def make(flow: OpticalFlow, seed: int = 5, **options) -> FlowNoise:
    return FlowNoise(SeededNoise(seed, (1, 16, HEIGHT, WIDTH)), flow, COUNTS, **options)


def clip(noise: FlowNoise, step: int = INITIAL_STEP) -> torch.Tensor:
    return torch.cat([noise(chunk, step, count) for chunk, count in enumerate(COUNTS)], dim=2)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("degrade", [0.0, 0.4])
def test_every_latent_frame_stays_gaussian(name, degrade):
    other = SeededNoise(77, (1, 16, HEIGHT, WIDTH))
    frames = clip(make(FLOWS[name], degrade=degrade, other=other))[0]
    assert frames.shape == (16, 9, HEIGHT, WIDTH)
    for frame in frames.unbind(1):
        number = frame.numel()
        assert frame.mean().abs() <= 4 / math.sqrt(number)
        assert (frame.var() - 1).abs() <= 4 * math.sqrt(2 / number)
        for axis in (1, 2):
            size = frame.shape[axis]
            pairs = frame.narrow(axis, 0, size - 1) * frame.narrow(axis, 1, size - 1)
            assert pairs.mean().abs() <= 4 / math.sqrt(number)
        ranks = (torch.arange(number) + 0.5) / number
        distance = (torch.special.ndtr(frame.flatten().sort().values.double()) - ranks).abs().max()
        assert distance < 2.2 / math.sqrt(number), "Kolmogorov-Smirnov"


@pytest.mark.parametrize("name", FLOWS)
def test_no_value_is_used_twice_in_a_frame(name):
    for frame in clip(make(FLOWS[name]))[0, 0]:
        assert frame.unique().numel() >= frame.numel() - 2, "float32 draws may coincide by chance"


@pytest.mark.parametrize("name", ["translation", "sub-pixel", "rotation", "zoom in", "zoom out", "rest", "folding"])
def test_noise_is_where_the_motion_carries_it(name):
    """Over six latent frames 95 of 100 carried values are within 1.2 cells of where the command says, all within 3.

    Those farther off had to give way again and again.
    """
    frames = clip(make(FLOWS[name]))[0, 0]
    points = grid(HEIGHT, WIDTH)
    known = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    for step in range(6):
        motion, here = FLOWS[name].at(step, points)
        points, known = points + motion, known & here
    before, after = frames[0].flatten(), frames[6].flatten()
    values, order = before.sort()
    found = torch.searchsorted(values, after).clamp(max=len(values) - 1)
    same = values[found] == after
    assert same.float().mean() > 0.5, "most of the noise is carried, not new"
    error = (grid(HEIGHT, WIDTH).reshape(-1, 2)[same] - points.reshape(-1, 2)[order[found[same]]]).norm(dim=-1)
    assert error.quantile(0.95) <= 1.2 and error.max() < 3
    expected = known & (points >= 0).all(-1) & (points[..., 0] <= WIDTH - 1) & (points[..., 1] <= HEIGHT - 1)
    if name not in ("zoom out", "folding"):  # where there are fewer cells than values, some must end
        assert same.sum() >= 0.8 * expected.sum()


def test_each_latent_frame_moves_along_its_own_step():
    frames = clip(make(turning(4, (2, 0), (-2, 0))))[0]
    assert torch.equal(frames[:, 0, :, 10:20], frames[:, 4, :, 18:28])
    assert torch.equal(frames[:, 4, :, 18:28], frames[:, 8, :, 10:20])


def test_behind_given_context_the_first_chunk_moves_as_the_clip_does_there():
    frames = make(turning(2, (5, 0), (2, 0)), start_frame=2)(0, INITIAL_STEP, 3)
    assert torch.equal(frames[0, :, 0, :, 10:20], frames[0, :, 1, :, 12:22])


def test_slow_motion_adds_up():
    frames = clip(make(shift(0.37, 0)))[0]
    scores = [float((frames[:, 0, :, : WIDTH - 4] * frames[:, 6, :, k : k + WIDTH - 4]).mean()) for k in range(5)]
    assert scores.index(max(scores)) == 2 and max(scores) > 0.9, "6 * 0.37 is 2.2"


def test_unknown_places_get_fresh_noise_and_rest_stays():
    still = clip(make(FLOWS["rest"]))
    assert torch.equal(still[:, :, 0], still[:, :, 8])
    frames = clip(make(half_known()))
    inner = SeededNoise(5, (1, 16, HEIGHT, WIDTH))
    assert torch.equal(frames[:, :, 1, :, :29], inner(0, INITIAL_STEP, 3)[:, :, 1, :, :29])


def test_step_indices_are_independent_and_move_alike():
    noise = make(FLOWS["translation"])
    first, second = clip(noise, 0), clip(noise, 1)
    assert (first * second).mean().abs() < 0.01
    for frames in (first, second):
        assert torch.equal(frames[0, :, 3, 10:20, 20:30], frames[0, :, 4, 9:19, 22:32])


def test_a_chunk_does_not_depend_on_what_was_asked_before():
    expected = clip(make(FLOWS["rotation"]), 1)
    assert torch.equal(make(FLOWS["rotation"])(2, 1, 3), expected[:, :, 6:]), "resumed at the third chunk"
    used = make(FLOWS["rotation"])
    used(2, INITIAL_STEP, 3)
    used(0, 1, 3)
    used(2, 1, 3)
    assert torch.equal(used(1, 1, 3), expected[:, :, 3:6])


@pytest.mark.parametrize("first_chunk", [0, 1])
def test_it_goes_on_after_a_snapshot_without_making_what_came_before(first_chunk):
    flow, asked = FLOWS["rotation"], []
    drawn = SeededNoise(5, (1, 16, HEIGHT, WIDTH))

    def inner(chunk, step, frames):
        asked.append((chunk, step))
        return drawn(chunk, step, frames)

    steps = {0: (INITIAL_STEP, 0, 1), 1: (INITIAL_STEP, 0), 2: (INITIAL_STEP, 0, 1)}
    whole = FlowNoise(inner, flow, COUNTS, first_chunk=first_chunk)
    made, left = {}, {}
    for chunk, wanted in steps.items():
        made |= {(chunk, step): whole(chunk, step, 3) for step in wanted}
        left[chunk] = {name: tensor.clone() for name, tensor in whole.snapshot().items()}
    for chunk in (0, 1):
        again = FlowNoise(inner, flow, COUNTS, first_chunk=first_chunk)
        again.restore(left[chunk])
        asked.clear()
        for later in range(chunk + 1, 3):
            for step in steps[later]:
                assert torch.equal(again(later, step, 3), made[later, step])
        # Step 1 was left out in chunk 1, so that chunk 2 makes it up.
        assert sorted({*asked} - {(1, 1)}) == sorted(key for key in made if key[0] > chunk)
        assert all(torch.equal(again.snapshot()[name], tensor) for name, tensor in left[2].items())
    again = FlowNoise(inner, flow, COUNTS, first_chunk=first_chunk)
    again.restore({})
    assert torch.equal(again(2, 0, 3), made[2, 0])


def test_chunks_outside_the_range_and_the_cache_pass_get_the_samplers_noise():
    inner = SeededNoise(5, (1, 16, HEIGHT, WIDTH))
    noise = make(FLOWS["translation"], first_chunk=1, last_chunk=1)
    assert torch.equal(noise(0, 0, 3), inner(0, 0, 3)) and torch.equal(noise(2, 0, 3), inner(2, 0, 3))
    middle = noise(1, 0, 3)
    assert torch.equal(middle[:, :, 0], inner(1, 0, 3)[:, :, 0]) and not torch.equal(middle, inner(1, 0, 3))
    assert torch.equal(noise(1, CONTEXT_STEP, 3), inner(1, CONTEXT_STEP, 3))


def test_a_field_that_ends_leaves_fresh_noise():
    ended = OpticalFlow(FLOWS["translation"].flow[:2].clone(), FLOWS["translation"].valid[:2].clone())
    noise = make(ended)
    assert (noise.map(3) == FRESH).all() and not (noise.map(2) == FRESH).all()


def test_a_long_clip_keeps_the_maps_of_its_latest_frames_only():
    chunks = 60
    flow = OpticalFlow.everywhere(torch.ones(1, 1, 1, 2).expand(3 * chunks, 8, 8, 2))
    noise = FlowNoise(SeededNoise(5, (1, 1, 8, 8)), flow, [3] * chunks)
    for chunk in range(chunks):
        noise(chunk, INITIAL_STEP, 3)
        assert len(noise._maps) <= MAPS_KEPT


def test_degrade_is_checked():
    with pytest.raises(ValueError, match="degrade is 1.5"):
        make(FLOWS["rest"], degrade=1.5)
    with pytest.raises(ValueError, match="no other noise"):
        make(FLOWS["rest"], degrade=0.5)


def test_time_per_latent_frame():
    """A few tens of ms of processor time, draws included; the quickest of some runs, for the machine may be busy."""
    quickest, threads = math.inf, torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another use processor time, too
    try:
        for _ in range(3):
            noise = make(FLOWS["rotation"])
            started = time.process_time()
            clip(noise)
            quickest = min(quickest, (time.process_time() - started) / sum(COUNTS))
    finally:
        torch.set_num_threads(threads)
    print(f"\nflow-warped noise: {1000 * quickest:.1f} ms per latent frame of 60x104")
    assert quickest < 0.05
