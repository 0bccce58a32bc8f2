"""Motions that follow each other: to all who ask they are one motion, written out step by step."""

import pytest
import torch

from diagonal_sampler.flow import NothingValid, OpticalFlow, camera_flow, carry
from diagonal_sampler.flow_adapter import AdapterField, adapter_features
from diagonal_sampler.flow_noise import FlowNoise
from diagonal_sampler.flow_pictures import preview, usual_speed
from diagonal_sampler.flow_reference import FlowReference
from diagonal_sampler.flow_timeline import FlowTimeline
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.schedule import DiagonalSchedule

SIZE, STEPS, FRAMES, COUNTS = 32, 32, 9, (3, 3, 3)
SMALL = SIZE // 8
PAN = camera_flow(1, SIZE, SIZE, pan=(2, -1))
"""Given once, so that it is held."""
ZOOM = OpticalFlow.everywhere(
    camera_flow(7, SIZE, SIZE, zoom=2.0, rotation=1.0).flow * torch.linspace(0.5, 1.5, 7)[:, None, None, None]
)
TURN = camera_flow(1, SIZE, SIZE, rotation=-3.0)


def masked(motion: OpticalFlow, steps: int) -> OpticalFlow:
    """Another part of the picture at each step."""
    return motion.masked(torch.eye(4).repeat(1 + steps // 4, 1)[:steps, None].expand(-1, 4, -1))


def timeline() -> FlowTimeline:
    """From 2 to 13 a pan, 7 steps of a zoom, nothing for 3, then steps in part of the picture, a turn to the end."""
    return FlowTimeline([(2, PAN), (13, ZOOM), (23, masked(PAN, 5)), (26, TURN)])


def written_out() -> OpticalFlow:
    flow, valid = torch.zeros(STEPS, SIZE, SIZE, 2), torch.zeros(STEPS, SIZE, SIZE, dtype=torch.bool)
    some = masked(PAN, 5)
    for steps, motion in (
        (range(2, 13), PAN), (range(13, 20), ZOOM), (range(23, 26), some), (range(26, STEPS), TURN),
    ):  # fmt: skip
        for step in steps:
            row = min(step - steps[0], motion.steps - 1)
            flow[step], valid[step] = motion.flow[row], motion.valid[row]
    return OpticalFlow(flow, valid)


def test_it_has_the_steps_of_its_motions():
    whole, fitted, plain = timeline(), timeline().fit(STEPS), written_out()
    assert (whole.steps, fitted.steps) == (27, STEPS)
    cpu = torch.device("cpu")
    for start in range(STEPS):
        for count in {1, min(4, STEPS - start), STEPS - start}:
            assert whole.told(start, count) == fitted.told(start, count) == plain.told(start, count)
            for found, wanted in zip(fitted.on(cpu, start, count), plain.on(cpu, start, count), strict=True):
                assert torch.equal(found, wanted)
    points = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)) * SIZE
    for step in (0, 2, 12, 13, 21, 24, 31):
        assert all(torch.equal(*pair) for pair in zip(fitted.at(step, points), plain.at(step, points), strict=True))
    assert whole.told(10**9, 4) == 4, "the last one is held"


@pytest.mark.parametrize("size", [SMALL, 2 * SMALL])
def test_the_adapter_is_told_the_same(size):
    found = AdapterField(timeline().fit(STEPS), size, size)
    wanted = adapter_features(written_out(), FRAMES, size, size)
    assert torch.equal(found.features(0, FRAMES), wanted)
    assert torch.equal(found.features(6, 3), wanted[:, :, 6:]) and wanted.abs().amax((0, 1, 3, 4)).gt(0).sum() == 8


def test_noise_moves_the_same():
    small, wanted = (motion.fit(STEPS, SMALL, SMALL).composed() for motion in (timeline(), written_out()))
    assert small.steps == wanted.steps == 8
    draws = SeededNoise(3, (1, 2, SMALL, SMALL))
    ours, theirs = (FlowNoise(draws, motion, COUNTS) for motion in (small, wanted))
    for chunk in range(3):
        assert torch.equal(ours(chunk, -1, 3), theirs(chunk, -1, 3))
    assert not torch.equal(ours(1, -1, 3), draws(1, -1, 3))
    resumed = FlowNoise(draws, small, COUNTS)
    half = FlowNoise(draws, small, COUNTS)
    for chunk in range(2):
        half(chunk, -1, 3)
    resumed.restore(half.snapshot())
    assert torch.equal(resumed(2, -1, 3), theirs(2, -1, 3))


def test_pictures_are_carried_the_same_and_by_the_same_chunks():
    picture = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ours, theirs = (motion.fit(STEPS, SIZE, SIZE) for motion in (timeline(), written_out()))
    for start in (8, 20):
        for found, wanted in zip(carry(picture, ours, start, 12), carry(picture, theirs, start, 12), strict=True):
            assert torch.equal(found.picture, wanted.picture) and torch.equal(found.commanded, wanted.commanded)
    coding = {"decode": lambda latents: latents, "encode": lambda frames: frames}
    counts = (1,) * FRAMES
    found, wanted = (
        FlowReference(motion, DiagonalSchedule.preset("diagonal 4-3-2"), counts, **coding) for motion in (ours, theirs)
    )
    assert found.schedule == wanted.schedule and found._active == wanted._active and len(found._active) == 7


def test_hours_of_what_is_held_or_free_take_no_memory():
    day = 24 * 3600 * 16
    fitted = FlowTimeline([(2, PAN), (day // 2 + 1, ZOOM), (day - 9, TURN)]).fit(day, 64, 64)
    for motions in (fitted.motions, fitted.composed().motions):
        assert sum(motion.flow.untyped_storage().nbytes() for _, motion in motions) < 10 * 64 * 64 * 2 * 4
    field = AdapterField(fitted, 8, 8)
    features = field.features(day // 4 - 4, 5)[0]
    assert not features[:, 0].any() and features[2, 2:].all() and torch.equal(features[:, 3], features[:, 4])
    assert not torch.equal(features[:, 2], features[:, 3]), "the turn begins in the middle of that latent frame"


def test_motions_may_be_of_any_size():
    large = camera_flow(1, 2 * SIZE, 2 * SIZE, pan=(4, -2))
    mixed = FlowTimeline([(0, PAN), (6, large), (11, PAN)])
    assert (mixed.height, mixed.width) == (2 * SIZE, 2 * SIZE)
    wanted = adapter_features(PAN, FRAMES, SMALL, SMALL)
    assert torch.allclose(AdapterField(mixed.fit(STEPS), SMALL, SMALL).features(0, FRAMES), wanted, atol=1e-4)
    assert mixed.fit(STEPS, 16, 16).on(PAN.flow.device, 4, 8)[0].shape == (8, 16, 16, 2)


def test_what_begins_behind_the_clip_is_left_out():
    two = FlowTimeline([(4, PAN), (20, ZOOM)])
    assert [start for start, _ in two.fit(20).motions] == [4] and two.fit(20).told(0, 99) == 16
    assert two.fit(22).motions[1][1].steps == 2
    with pytest.raises(NothingValid, match="valid part lies in the first 4 steps"):
        two.fit(4)
    with pytest.raises(NothingValid, match="known nowhere through the 4 steps"):
        FlowTimeline([(3, camera_flow(2, 8, 8)), (6, camera_flow(1, 8, 8))]).fit(8).composed()


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ((-1,), "start is -1; pixel frames are counted from 0"),
        ((0, 0), "start is 0, and the motion before it .previous. begins at pixel frame 0; give a start of 1 or more"),
        ((0, 9, 8), "start is 8, and the motion before it .* 9"),
        ((), "at least one"),
    ],
)
def test_starts_rise(starts, message):
    with pytest.raises(ValueError, match=message):
        FlowTimeline([(start, PAN) for start in starts])


def test_a_whole_timeline_is_drawn():
    whole = timeline()
    panels = preview(None, whole.fit(whole.steps))
    # Nothing, the pan, each step of the zoom, nothing, three steps in part of the picture, the turn.
    assert len(panels) == 1 + 1 + 7 + 1 + 3 + 1
    drawn = preview(torch.full((STEPS + 1, SIZE, SIZE, 3), 0.35), whole.fit(STEPS), speed=usual_speed(whole))
    assert torch.equal(panels[1], drawn[5]) and torch.equal(panels[-1], drawn[-1])
    assert torch.equal(
        drawn, preview(torch.full((STEPS + 1, SIZE, SIZE, 3), 0.35), written_out(), speed=usual_speed(whole))
    )


def test_rest_is_told_from_motion():
    still = camera_flow(1, 8, 8)
    assert still.rests and camera_flow(9, 8, 8).rests and not PAN.rests and still.is_held and PAN.is_held
    known = still.valid.expand(3, -1, -1).clone()
    assert OpticalFlow(torch.zeros(3, 8, 8, 2), known).rests and not OpticalFlow(torch.zeros(3, 8, 8, 2), known).is_held
    known[2, 3, 3] = False
    assert not OpticalFlow(torch.zeros(3, 8, 8, 2), known).rests
    assert FlowTimeline([(0, still), (4, still)]).rests
    assert not FlowTimeline([(0, PAN), (4, still)]).rests and not FlowTimeline([(1, still)]).rests
