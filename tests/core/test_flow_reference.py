"""Reference mode: which chunks start from carried frames, at which levels, and what is blended where."""

import pytest
import torch
import torch.nn.functional as F

from diagonal_sampler.cache import KVCache
from diagonal_sampler.flow import OpticalFlow, camera_flow
from diagonal_sampler.flow_reference import FlowReference, encode_what_decodes, start_below_noise, weaker_start
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.sampler import Forward, sample_chunks
from diagonal_sampler.schedule import DiagonalSchedule, unshift_sigma
from diagonal_sampler.settings import CausalSettings

SCHEDULE = DiagonalSchedule.preset("diagonal 4-3-2")
FRAMES, SIZE = 9, 4
COUNTS = (3, 3, 3)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """The pixel frames of a toy autoencoder: a cell is 8x8 equal pixels, and as long as a latent frame."""
    pixels = latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)
    return torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, 2)], dim=2)


def encode(frames: torch.Tensor) -> torch.Tensor:
    """Its encoder: means over 8x8 pixels, of the first frame and of every fourth after it."""
    pooled = F.avg_pool3d(frames[:, :, ::4], (1, 8, 8))
    return F.pad(pooled, (0, 0, 0, 0, 0, 0, 0, 1))


def field(**motion) -> OpticalFlow:
    return camera_flow(4 * (FRAMES - 1), 8 * SIZE, 8 * SIZE, **motion)


def make(flow: OpticalFlow, schedule: DiagonalSchedule = SCHEDULE, **options) -> FlowReference:
    return FlowReference(flow, schedule, COUNTS, decode=decode, encode=encode, **options)


def run(reference: FlowReference, predict, noise=None):
    """Chunks of a run whose model predicts `predict(x, at)`; the inputs of every forward."""
    cache = KVCache(CausalSettings(frames_per_chunk=3, window=-1, sink=0), FRAMES)
    seen, chunks = [], []

    def denoise(x, at):
        seen.append((at, x))
        return reference.blend(predict(x, at), at)

    loop = sample_chunks(
        denoise, noise or SeededNoise(0, (1, 4, SIZE, SIZE)), reference.schedule, cache,
        frames=FRAMES, frames_per_chunk=3, source=reference.source,
    )  # fmt: skip
    for chunk in loop:
        reference.finished(chunk.latents)
        chunks.append(chunk.latents)
    return chunks, seen


@pytest.mark.parametrize("name", ["diagonal 4-3-2", "self forcing", "undistilled"])
def test_levels_keep_their_number_and_their_proportions(name):
    schedule = DiagonalSchedule.preset(name)
    for chunk in range(3):
        usual = schedule.chunk_sigmas(chunk)
        found = start_below_noise(usual, 0.733, schedule.shift)
        assert len(found) == len(usual) and found[0] == 0.733
        assert all(a > b for a, b in zip(found, found[1:], strict=False))
        scale = [unshift_sigma(a, schedule.shift) / unshift_sigma(b, schedule.shift)
                 for a, b in zip(found, usual, strict=True)]  # fmt: skip
        assert scale == pytest.approx([scale[0]] * (len(scale) - 1) + [scale[0] ** 2]), "the last is scaled twice"


def test_levels_of_short_and_low_schedules():
    assert start_below_noise((1.0,), 0.7, 5) == (0.7,)
    assert start_below_noise((0.5, 0.2), 0.7, 5) == (0.5, 0.2), "already below"
    assert start_below_noise((1.0, 0.5), 1.0, 5) == (1.0, 0.5)
    assert start_below_noise((1.0, 0.5), 0.25, 1) == (0.25, 0.03125), "no level is too low to start at"
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        start_below_noise((1.0,), 0.0, 5)


def test_a_weaker_motion_starts_nearer_to_pure_noise():
    for shift in (1.0, 5.0):
        assert weaker_start(0.733, 1.0, shift) == 0.733, "exactly: no seed of full strength changes"
        levels = [weaker_start(0.733, strength, shift) for strength in (0.0, 1e-6, 0.2, 0.5, 0.8, 1.0)]
        assert levels[0] == 1 and levels[1] == pytest.approx(1, abs=1e-4), "strength is a dial from none on"
        assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
        half = unshift_sigma(weaker_start(0.733, 0.5, shift), shift)
        assert half == pytest.approx((1 + unshift_sigma(0.733, shift)) / 2)
    assert weaker_start(1.0, 0.3, 5.0) == 1
    with pytest.raises(ValueError, match=r"strength is 1.5; it must be in \[0, 1\]"):
        weaker_start(0.733, 1.5, 5.0)


def test_a_motion_that_ends_inside_a_chunk_moves_it_if_it_lasts_for_half():
    """In the rest of the chunk the carried frames stand still, and the model should go on instead."""
    usual, moved = SCHEDULE.chunk_sigmas(1), start_below_noise(SCHEDULE.chunk_sigmas(1), 0.733, 5)
    for steps, expected in ((8, usual), (9, usual), (13, usual), (14, moved), (20, moved)):  # chunk 1 has 8 to 19
        reference = make(camera_flow(steps, 8 * SIZE, 8 * SIZE, pan=(1, 0)))
        assert reference.schedule.chunk_sigmas(1) == expected, steps
        assert reference.follows == (expected == moved)
        spread = field(pan=(1, 0))
        valid = spread.valid & (torch.arange(spread.steps) < steps)[:, None, None]
        assert make(OpticalFlow(spread.flow, valid)).schedule.chunk_sigmas(1) == expected, "not held either"
    blended = make(camera_flow(9, 8 * SIZE, 8 * SIZE, pan=(1, 0)), start_sigma=1.0)
    assert blended.follows, "where nothing is carried into the start, nothing stands still"


def test_the_first_chunk_and_chunks_without_motion_are_as_usual():
    flow = field(pan=(1, 0))
    valid = flow.valid.clone()
    valid[4 * 5 :] = False  # steps that lead to latent frames 6 to 8
    reference = make(OpticalFlow(flow.flow, valid))
    assert reference.schedule.sigmas == (
        SCHEDULE.chunk_sigmas(0), start_below_noise(SCHEDULE.chunk_sigmas(1), 0.733, 5), SCHEDULE.chunk_sigmas(2),
    )  # fmt: skip
    given = make(flow, given_frames=2)
    assert given.schedule.chunk_sigmas(0)[0] == 0.733, "with frames before it, the first chunk can follow"
    some = make(flow, first_chunk=2, last_chunk=2)
    assert [row[0] for row in some.schedule.sigmas] == [1, 1, 0.733]


def test_a_motion_that_goes_on_has_a_short_schedule_however_long_the_clip():
    chunks = 10_000
    held = OpticalFlow.everywhere(torch.ones(1, 16, 16, 2)).fit(12 * chunks - 4, 16, 16)
    refuse = pytest.fail
    reference = FlowReference(held, SCHEDULE, [3] * chunks, decode=refuse, encode=refuse)
    rows = [SCHEDULE.chunk_sigmas(0), *(start_below_noise(SCHEDULE.chunk_sigmas(at), 0.733, 5) for at in (1, 2))]
    assert reference.schedule.sigmas == tuple(rows)


def test_a_still_camera_with_full_blend_repeats_the_last_frame_until_the_last_step():
    torch.manual_seed(0)
    picture = torch.rand(1, 4, 3, SIZE, SIZE)
    picture[:, 3] = 0
    chunks, seen = run(make(field()), lambda x, at: picture if at.chunk == 0 else torch.zeros_like(x) + (at.step > 0))
    draws = SeededNoise(0, (1, 4, SIZE, SIZE))
    last = picture[:, :, -1:].expand(-1, -1, 3, -1, -1)
    sigmas = make(field()).schedule.chunk_sigmas(1)
    assert len(sigmas) == 3 and sigmas[0] == 0.733
    for step, sigma in enumerate(sigmas):
        found = next(x for at, x in seen if at.chunk == 1 and at.step == step)
        noise = draws(1, step - 1, 3)  # -1 is the chunk's start
        assert torch.allclose(found, (1 - sigma) * last + sigma * noise, atol=1e-5), "blended before each re-noise"
    assert (chunks[1] == 1).all(), "the last step is the model's alone"


def test_a_chunk_of_one_step_is_blended_in_it():
    torch.manual_seed(0)
    picture = torch.rand(1, 4, 3, SIZE, SIZE)
    picture[:, 3] = 0
    schedule = DiagonalSchedule(sigmas=((1.0,),), context_mode="clean")
    chunks, _ = run(make(field(), schedule), lambda x, at: picture if at.chunk == 0 else torch.zeros_like(x))
    assert torch.allclose(chunks[1], picture[:, :, -1:].expand(-1, -1, 3, -1, -1), atol=1e-5)


def test_what_may_not_change_is_not_blended():
    torch.manual_seed(0)
    picture = torch.rand(1, 4, 3, SIZE, SIZE)
    picture[:, 3] = 0
    reference = make(field(), DiagonalSchedule(sigmas=((1.0,),), context_mode="clean"))
    reference.finished(picture)
    at = Forward(chunk=1, step=0, steps=1, sigma=0.733, start_frame=3, frames=3)
    kept, free = torch.full((1, 4, 3, SIZE, SIZE), 9.0), torch.zeros(1, 1, 3, SIZE, SIZE)
    free[..., 2:], free[..., 1:2] = 1, 0.5
    found = reference.blend(kept, at, free)
    assert torch.equal(found[..., :1], kept[..., :1])
    whole = reference.blend(kept, at)
    assert torch.equal(found[..., 2:], whole[..., 2:]) and (whole - kept).abs().min() > 1
    assert torch.allclose(found[..., 1], (kept + whole)[..., 1] / 2, atol=1e-5)


def test_pan_moves_the_reference_and_blend_weighs_it():
    picture = torch.zeros(1, 4, 3, SIZE, SIZE)
    picture[:, 0, :, :, 0] = 1  # the left column
    flow = field(pan=(-2, 0))  # 8 pixels to the right a latent frame
    for blend in (0.0, 0.5, 1.0):
        _, seen = run(make(flow, blend=blend), lambda x, at: picture if at.chunk == 0 else torch.zeros_like(x))
        second = next(x for at, x in seen if at.chunk == 1 and at.step == 1)
        sigma = make(flow).schedule.chunk_sigmas(1)[1]
        x0 = (second - sigma * SeededNoise(0, (1, 4, SIZE, SIZE))(1, 0, 3)) / (1 - sigma)
        for frame in range(3):
            column = frame + 1
            assert torch.allclose(x0[0, 0, frame, :, column], torch.tensor(blend), atol=0.02)
            assert x0[0, 0, frame, :, :column].abs().max() < 0.4 * blend + 0.02, "what enters is the model's"


def test_outside_the_valid_part_the_prediction_stands():
    mask = torch.zeros(1, 8 * SIZE, 8 * SIZE)
    mask[:, :, :16] = 1
    reference = make(field().masked(mask))
    _, seen = run(reference, lambda x, at: torch.full_like(x, 0.5 if at.chunk == 0 else -1.0))
    second = next(x for at, x in seen if at.chunk == 1 and at.step == 1)
    sigma = reference.schedule.chunk_sigmas(1)[1]
    x0 = (second - sigma * SeededNoise(0, (1, 4, SIZE, SIZE))(1, 0, 3)) / (1 - sigma)
    assert torch.allclose(x0[:, :3, ..., :2], torch.tensor(0.5), atol=1e-4)
    assert torch.allclose(x0[..., 2:], torch.tensor(-1.0), atol=1e-4)


@pytest.mark.parametrize("pixels, share", [(1, 16 / 64), (8, 1.0), (64, 1.0)])
def test_a_cell_follows_wholly_where_a_little_of_it_is_commanded(pixels, share):
    """A cell that were blended by half would show a thing in both places."""
    mask = torch.zeros(1, 8 * SIZE, 8 * SIZE)
    mask[:, 8:16, 8:16] = (torch.arange(64) < pixels).view(8, 8)
    reference = make(field().masked(mask))
    _, seen = run(reference, lambda x, at: torch.full_like(x, 1.0 if at.chunk == 0 else 0.0))
    second = next(x for at, x in seen if at.chunk == 1 and at.step == 1)
    sigma = reference.schedule.chunk_sigmas(1)[1]
    x0 = (second - sigma * SeededNoise(0, (1, 4, SIZE, SIZE))(1, 0, 3)) / (1 - sigma)
    expected = torch.zeros(SIZE, SIZE)
    expected[1, 1] = share
    assert torch.allclose(x0[0, 0], expected.expand(3, -1, -1), atol=1e-4)


def test_blend_is_checked():
    with pytest.raises(ValueError, match="blend is 2"):
        make(field(), blend=2)


def test_each_chunk_goes_on_from_the_frame_before_it_along_its_own_steps():
    there = field(pan=(-2, 0))
    reference = make(OpticalFlow(torch.cat([there.flow[:20], -there.flow[20:]]), there.valid))
    first, second = torch.zeros(2, 1, 4, 3, SIZE, SIZE)
    first[:, 0, :, :, 0] = second[:, 0, 2, :, 3] = 1
    reference.finished(first)
    reference.source(3, 3)
    reference.finished(second)
    assert torch.equal(reference.tail, second), "all that a video decoder needs before the last frame"
    found = reference.source(6, 3)
    for frame in range(3):
        assert torch.allclose(found[0, 0, frame, :, 2 - frame], torch.tensor(1.0), atol=0.02)


def test_what_an_autoencoder_loses_is_added_to_what_it_is_given():
    """A decoder that returns the means of 8x8 pixels a tenth too weak, as a lossy one fades a thin shape."""
    frames = torch.rand(1, 3, 13, 8 * SIZE, 8 * SIZE, generator=torch.Generator().manual_seed(0))

    def faded(latents: torch.Tensor) -> torch.Tensor:
        return 0.9 * decode(latents)

    plain, coded = encode(frames), encode_what_decodes(frames, faded, encode)
    assert torch.allclose(encode_what_decodes(frames, decode, encode), plain, atol=1e-5), "nothing is lost"
    assert torch.allclose(faded(coded), 0.99 * decode(plain), atol=1e-5), "a hundredth of it is lost, not a tenth"


def test_a_shape_does_not_fade_from_chunk_to_chunk():
    """Chunk after chunk through a decoder that keeps 0.9: without a remedy 0.9^8 = 0.43 of it would be left."""
    still = camera_flow(4 * 26, 8 * SIZE, 8 * SIZE)
    fading = {"decode": lambda latents: 0.9 * decode(latents), "encode": encode}
    reference = FlowReference(still, SCHEDULE, [3] * 9, **fading)
    latents = torch.zeros(1, 4, 3, SIZE, SIZE)
    latents[:, :3, :, 1:3, 1:3] = 1 / 0.9  # whose decoded frames are 1
    for chunk in range(1, 9):
        reference.finished(latents)
        latents = reference.source(3 * chunk, 3)
    shown = 0.9 * latents[:, :3, -1, 1:3, 1:3]
    assert shown.min() == pytest.approx(0.99**8, abs=0.01)
