"""Dense motion: its sources, its rules of size and length, following it, and moving pictures along it."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diagonal_sampler.flow
from diagonal_sampler.flow import (
    NothingValid,
    OpticalFlow,
    camera_flow,
    carry,
    fill_holes,
    grid,
    inside,
    sample,
    splat,
    tracks_flow,
)
from diagonal_sampler.flow_adapter import adapter_features
from diagonal_sampler.flow_pictures import flow_colours, painted_flow, preview, usual_speed
from diagonal_sampler.wan_layout import WAN_CELL


def uniform(x: float, y: float, steps: int = 4, height: int = 12, width: int = 16) -> OpticalFlow:
    return OpticalFlow.everywhere(torch.tensor([float(x), float(y)]).expand(steps, height, width, 2))


def smooth_picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """[C, H, W] in 0..1, smooth enough that bilinear interpolation is exact to about 0.01."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([0.5 + 0.5 * torch.sin((k + 1) * 0.1 * x + 0.13 * (2 - k) * y) for k in range(channels)])


# --- what is refused ---


@pytest.mark.parametrize(
    "flow, valid, message",
    [
        (torch.zeros(0, 4, 4, 2), torch.ones(0, 4, 4, dtype=torch.bool), "A video needs two frames"),
        (torch.zeros(2, 4, 4, 3), torch.ones(2, 4, 4, dtype=torch.bool), r"must be \[steps, height, width, 2\]"),
        (torch.zeros(2, 4, 4, 2), torch.ones(2, 4, 5, dtype=torch.bool), r"mask has shape \(2, 4, 5\)"),
        (torch.zeros(2, 4, 4, 2).double(), torch.ones(2, 4, 4, dtype=torch.bool), "give float32 and bool"),
        (torch.full((2, 4, 4, 2), math.nan), torch.ones(2, 4, 4, dtype=torch.bool), "holds NaN or infinite"),
        (torch.zeros(2, 4, 4, 2), torch.zeros(2, 4, 4, dtype=torch.bool), "mask is empty"),
    ],
)
def test_a_field_that_is_none_is_refused(flow, valid, message):
    with pytest.raises(ValueError, match=message):
        OpticalFlow(flow, valid)


def test_masks_are_resized_and_checked():
    field = uniform(1, 0)
    half = torch.zeros(1, 6, 8)
    half[..., :4] = 1
    masked = field.masked(half)
    assert masked.valid[..., :8].all() and not masked.valid[..., 8:].any()
    assert field.masked(half[0]).valid.equal(masked.valid)
    held = OpticalFlow.everywhere(torch.ones(1, 12, 16, 2)).fit(1000, 12, 16)
    assert held.masked(half).valid.equal(masked.valid[:1].expand(1000, -1, -1))
    assert held.masked(half).valid.stride(0) == 0, "held without copies"
    with pytest.raises(ValueError, match="mask is empty"):
        field.masked(torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match="mask holds NaN"):
        field.masked(torch.full((1, 6, 8), math.nan))
    with pytest.raises(ValueError, match="mask has 3 frames and the optical flow 4 steps"):
        field.masked(torch.ones(3, 6, 8))


def test_a_mask_that_moves_holds_a_single_step_for_as_long_as_it_lasts():
    one = OpticalFlow.everywhere(torch.ones(1, 12, 16, 2))
    mask = torch.zeros(5, 6, 8)
    for frame in range(5):
        mask[frame, :, frame] = 1
    found = one.masked(mask)
    assert found.steps == 5 and (found.flow == 1).all()
    assert torch.equal(found.valid, uniform(1, 1, steps=5).masked(mask).valid)
    assert one.masked(mask[:1]).steps == 1, "a single mask leaves it held"


def test_a_field_tells_how_many_steps_say_something():
    valid = torch.zeros(6, 12, 16, dtype=torch.bool)
    valid[1:4, 3, 3] = True
    field = OpticalFlow(torch.zeros(6, 12, 16, 2), valid)
    assert [field.told(start, 2) for start in range(8)] == [1, 2, 2, 1, 0, 0, 0, 0]
    held = uniform(1, 0, steps=1).fit(6, 12, 16)
    assert [held.told(start, 4) for start in (0, 2, 4, 6, 9)] == [4, 4, 2, 0, 0]


class LargeTensors(TorchDispatchMode):
    """Counts the bytes of new storages that are as large as a clip's."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.kept = least, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                self.kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return out

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def test_tracks_need_the_memory_of_their_result():
    frames, height, width = 41, 24, 32
    path = torch.tensor([12.0, 12.0]) + torch.arange(frames)[:, None, None] * torch.tensor([0.2, 0.1])
    with LargeTensors(frames * height * width // 2) as made:
        found = tracks_flow(path, None, height, width)
    assert made.bytes == found.flow.nbytes + found.valid.nbytes


# --- size and length ---


def test_another_size_stretches_the_vectors_too():
    found = uniform(2, 1, height=12, width=16).fit(4, 24, 8)
    assert found.flow.shape == (4, 24, 8, 2)
    assert torch.allclose(found.flow, torch.tensor([1.0, 2.0]))


def test_unknown_places_do_not_blur_into_known_ones():
    field = uniform(4, 0).masked(torch.cat([torch.ones(1, 12, 8), torch.zeros(1, 12, 8)], dim=2))
    found = field.fit(4, 6, 8)
    assert torch.equal(found.valid[0, 0], torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool())
    assert torch.allclose(found.flow[found.valid], torch.tensor([2.0, 0.0]))
    assert (found.flow[~found.valid] == 0).all()


def test_the_length_keeps_its_pace():
    flow = torch.arange(3.0)[:, None, None, None].expand(3, 4, 4, 2)
    field = OpticalFlow.everywhere(flow)
    assert torch.equal(field.fit(2, 4, 4).flow, flow[:2])
    longer = field.fit(5, 4, 4)
    assert torch.equal(longer.flow[:3], flow) and not longer.valid[3:].any() and longer.valid[:3].all()
    held = OpticalFlow.everywhere(flow[1:2]).fit(100, 8, 8)
    assert held.valid.all() and (held.flow == 2).all() and held.flow.stride(0) == 0, "held without copies"


def test_nothing_left_after_cutting_is_refused():
    valid = torch.zeros(4, 4, 4, dtype=torch.bool)
    valid[3] = True
    with pytest.raises(ValueError, match="lies in the first 3 steps"):
        OpticalFlow(torch.zeros(4, 4, 4, 2), valid).fit(3, 4, 4)


# --- sources ---


def test_camera_pan_moves_the_picture_the_other_way():
    field = camera_flow(3, 8, 10, pan=(1.5, -2))
    assert torch.allclose(field.flow, torch.tensor([-1.5, 2.0])) and field.steps == 3


def test_camera_zoom_and_rotation_are_about_the_centre():
    zoomed = camera_flow(1, 9, 9, zoom=10).flow[0]
    assert zoomed[4, 4].abs().max() < 1e-6
    assert torch.allclose(zoomed[4, 8], torch.tensor([0.4, 0.0]), atol=1e-6)
    turned = camera_flow(1, 9, 9, rotation=90).flow[0]
    # The camera turns clockwise: what was right of the centre goes up.
    assert torch.allclose(turned[4, 8], torch.tensor([-4.0, -4.0]), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "length of at least 2"),
        ({"zoom": -100}, "above -100"),
        ({"pan": (math.nan, 0)}, "finite"),
        ({"width": 0}, "at least 1 pixel"),
    ],
)
def test_camera_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        camera_flow(**{"steps": 1, "height": 4, "width": 4, **change})


def test_tracks_move_what_is_around_them():
    time = torch.arange(5.0)
    path = torch.stack([torch.stack([5 + 2 * time, 10 + 0 * time], -1), torch.stack([30 + 0 * time, 12 - time], -1)], 1)
    field = tracks_flow(path, None, 24, 40, radius=4)
    assert field.steps == 4
    assert torch.allclose(field.flow[0, 10, 5], torch.tensor([2.0, 0.0]))
    assert torch.allclose(field.flow[3, 10, 11], torch.tensor([2.0, 0.0])), "the region goes with its track"
    assert torch.allclose(field.flow[1, 11, 30], torch.tensor([0.0, -1.0]))
    assert field.valid[0, 10, 9] and not field.valid[0, 10, 10] and not field.valid[0, 10, 20]


def test_a_small_radius_is_named_with_one_that_fits():
    path = torch.tensor([[[20.5, 20.5]], [[21.5, 20.5]], [[22.5, 20.5]]])
    with pytest.raises(ValueError, match="track_radius is 0.5 pixels.*use 8 or more"):
        tracks_flow(path, None, 48, 64, radius=0.5)
    with pytest.raises(ValueError, match="check that the tracks were made for this width"):
        tracks_flow(path + 100, None, 48, 64, radius=8)
    with pytest.raises(NothingValid, match="a track_radius of 8 pixels or more"):
        tracks_flow(path, None, 48, 64, radius=3).fit(2, 6, 8)
    for x in range(16):  # wherever it lies on the latent's pixels
        tracks_flow(path + x / 2, None, 48, 64, radius=WAN_CELL).fit(2, 6, 8)


def test_between_tracks_the_motion_is_blended():
    path = torch.tensor([[[4.0, 8.0], [12.0, 8.0]], [[6.0, 8.0], [12.0, 8.0]]])
    middle = tracks_flow(path, None, 16, 16, radius=8).flow[0, 8, 8]
    assert torch.allclose(middle, torch.tensor([1.0, 0.0]))


def test_tracks_count_only_where_they_are_visible():
    path = torch.zeros(3, 1, 2)
    path[:, 0, 0] = torch.tensor([4.0, 6.0, math.nan])
    path[:, 0, 1] = 4
    visible = torch.tensor([[True], [True], [False]])
    field = tracks_flow(path, visible, 16, 16)
    assert field.valid[0].any() and not field.valid[1].any()
    with pytest.raises(ValueError, match="visible at frame 2 but its position there is NaN"):
        tracks_flow(path, None, 16, 16)
    with pytest.raises(ValueError, match="No track is visible inside the 16x16 picture"):
        tracks_flow(path[:2] + 100, visible[:2], 16, 16)
    with pytest.raises(ValueError, match="1 frame; motion needs at least 2"):
        tracks_flow(path[:1], None, 16, 16)
    with pytest.raises(ValueError, match=r"visibility has shape \(2, 1\)"):
        tracks_flow(path, visible[:2], 16, 16)
    with pytest.raises(ValueError, match="radius is 0"):
        tracks_flow(path, visible, 16, 16, radius=0)


# --- following it ---


def test_composed_steps_follow_the_points():
    field = camera_flow(8, 40, 40, zoom=2, rotation=3)
    found = field.composed(4)
    whole = camera_flow(1, 40, 40, zoom=(1.02**4 - 1) * 100, rotation=12)
    middle = (slice(None), slice(10, 30), slice(10, 30))
    assert found.steps == 2 and found.valid[middle].all()
    assert (found.flow[middle] - whole.flow[0, 10:30, 10:30]).abs().max() < 1e-3


def test_at_the_latents_size_a_latent_frame_is_four_steps_and_a_cell_eight_pixels():
    found = uniform(4, -2, steps=8, height=64, width=96).fit(8, 8, 12).composed()
    inner = found.flow[:, 2:6, 2:8]
    assert found.flow.shape == (2, 8, 12, 2) and torch.allclose(inner, torch.tensor([2.0, -1.0]))
    with pytest.raises(ValueError, match="has 3 steps; one latent frame needs 4"):
        uniform(1, 0, steps=3).composed()


def test_the_edges_of_the_field_are_alike():
    """Opposite pans are mirror images: a point on an edge is inside at all four sides."""
    field = uniform(1, -2)
    edges = torch.tensor([[-0.5, 3.0], [15.5, 3.0], [4.0, -0.5], [4.0, 11.5], [-0.5, -0.5], [15.5, 11.5]])
    motion, known = field.at(0, edges)
    assert known.equal(inside(edges, 12, 16)) and known.all()
    assert torch.allclose(motion, torch.tensor([1.0, -2.0]))
    away = torch.tensor([[-0.6, 3.0], [15.6, 3.0], [4.0, -0.6], [4.0, 11.6]])
    assert not field.at(0, away)[1].any()
    left, right = (camera_flow(8, 64, 96, pan=(x, 0.0)).fit(8, 8, 12).composed() for x in (4.0, -4.0))
    assert left.valid.equal(right.valid.flip(2))
    assert torch.allclose(left.flow[..., 0], -right.flow[..., 0].flip(2), atol=1e-5)


def test_adapter_features():
    field = uniform(4, -3, steps=8, height=64, width=64).fit(6, 64, 64)
    features = adapter_features(field, 4, 8, 8)
    assert features.shape == (1, 4, 4, 8, 8)
    # 4 pixels a frame are 2 cells a latent frame; the third latent frame has half its steps, the fourth none.
    assert torch.allclose(features[0, :, 0, 4, 4], torch.tensor([2.0, -1.5, 1.0, 2.5]))
    assert torch.allclose(features[0, :, 2, 4, 4], torch.tensor([1.0, -0.75, 0.5, 1.25]))
    assert (features[0, :, 3] == 0).all()
    assert adapter_features(field, 1, 8, 8).shape == (1, 4, 1, 8, 8)


def _centre(valid: torch.Tensor) -> torch.Tensor:
    """(x, y) in pixels of what a latent of 8x8 is told to move."""
    centres = grid(8, 8) * 8 + 3.5  # of the latent's pixels
    return (valid[..., None] * centres).sum((0, 1)) / valid.sum()


@pytest.mark.parametrize("place", [(30.0, 30.0), (32.6, 29.3), (34.0, 33.5)])
def test_the_adapter_is_told_where_in_a_latents_pixel_a_sprite_is(place):
    rests = torch.tensor(place).expand(5, 1, 2)
    valid = adapter_features(tracks_flow(rests, None, 64, 64, radius=9.0), 2, 8, 8)[0, 2, 1]
    assert torch.allclose(_centre(valid), torch.tensor(place), atol=0.35), "a pixel of the latent is eight"


@pytest.mark.parametrize("turns", [False, True])
def test_the_adapter_is_told_where_a_sprite_arrives(turns):
    """Also where it turned on its way: the mean of its steps says little of where it is."""
    step = torch.tensor([2.25, 0.75])
    ways = torch.stack([step * (-1 if turns and at >= 2 else 1) for at in range(8)])
    path = torch.cat([torch.tensor([[20.0, 30.0]]), 20 + ways.cumsum(0) + torch.tensor([0.0, 10.0])])
    features = adapter_features(tracks_flow(path[:, None], None, 64, 64, radius=11.0), 3, 8, 8)[0]
    for latent_frame in (1, 2):
        _, _, valid, speed = told = features[:, latent_frame]
        end, start = path[4 * latent_frame], path[4 * latent_frame - 4]
        assert torch.allclose(_centre(valid), end, atol=0.35)
        inner = told[:2, valid > 0.99] * 8  # pixels a latent frame
        assert torch.allclose(inner, (end - start)[:, None].expand_as(inner), atol=0.1)
        assert torch.allclose(speed, told[:2].norm(dim=0), atol=1e-6)
    rest = features[2, 0], _centre(features[2, 0])
    assert torch.allclose(rest[1], path[0], atol=0.35), "the first latent frame is told what leaves it"


def test_what_moves_in_front_hides_what_rests_from_the_adapter():
    """A field that is known everywhere, as a video's: of a disc that moves over a ground at rest, the disc is told."""
    path = torch.stack([torch.tensor([20.0, 32.0]) + at * torch.tensor([3.0, 0.0]) for at in range(5)])
    disc = tracks_flow(path[:, None], None, 64, 64, radius=10.0)
    features = adapter_features(OpticalFlow.everywhere(disc.flow), 2, 8, 8)[0, :, 1]
    moves = features[0] * 8  # pixels a latent frame
    assert torch.allclose(_centre(moves), path[4], atol=0.5)
    assert abs(float(moves.sum()) * 64 / (12 * torch.pi * 100) - 1) < 0.03, "all of the disc, and nothing but it"
    # What it left is known of no more: nothing came there.
    assert features[2, 4, 1] < 0.5 and features[2, 0].eq(1).all()


def test_motion_that_begins_or_ends_within_a_latent_frame_is_told_by_its_share():
    path = torch.stack([torch.tensor([20.0, 32.0]) + at * torch.tensor([2.0, 0.0]) for at in range(9)])[:, None]
    shown = torch.ones(9, 1, dtype=torch.bool)
    shown[:2] = shown[7:] = False
    features = adapter_features(tracks_flow(path, shown, 64, 64, radius=16.0), 3, 8, 8)[0]
    for latent_frame, end in ((1, path[4, 0]), (2, path[6, 0])):
        told = features[:, latent_frame]
        assert torch.allclose(_centre(told[2]), end, atol=0.6), "where it was when nothing was said of it any more"
        assert abs(float(told[2].max()) - 0.5) < 0.01 and abs(float(told[0].max()) * 8 - 4) < 0.1
    assert not features[:, 0].any()


def test_motion_that_is_the_same_at_all_steps_is_told_as_any_other():
    held = camera_flow(10, 64, 64, pan=(1.5, -0.5), zoom=1.0)
    written_out = OpticalFlow(held.flow.contiguous(), held.valid.contiguous())
    for frames in (1, 3, 4, 6):  # the fourth latent frame has two steps, later ones none
        assert torch.equal(adapter_features(held, frames, 8, 8), adapter_features(written_out, frames, 8, 8))
    single = OpticalFlow(held.flow[:1], held.valid[:1])
    found = adapter_features(single, 6, 8, 8)[0]
    assert torch.equal(found[:, 5], found[:, 1]) and found[2, 5].any(), "a single step is held"


def test_motion_larger_than_the_video_is_told_at_the_videos_size():
    path = torch.stack([torch.tensor([20.0, 32.0]) + at * torch.tensor([2.0, 1.0]) for at in range(5)])[:, None]
    small = adapter_features(tracks_flow(path, None, 64, 64, radius=10.0), 2, 8, 8)
    large = adapter_features(tracks_flow(4 * path + 1.5, None, 256, 256, radius=40.0), 2, 8, 8)
    assert torch.allclose(small, large, atol=0.05)


def test_what_the_adapter_cannot_see_is_refused():
    with pytest.raises(NothingValid, match="nothing of it is left at 8x8, where a pixel is 8 of the motion's"):
        adapter_features(tracks_flow(torch.full((5, 1, 2), 32.0), None, 64, 64, radius=3.0), 2, 8, 8)


# --- moving pictures ---


def test_a_picture_is_read_at_its_own_pixels_and_between_them():
    picture = smooth_picture(30, 40)
    assert torch.allclose(sample(picture, grid(30, 40)), picture, atol=1e-5)
    between = sample(picture, grid(30, 40)[:, :-1] + torch.tensor([0.5, 0.0]))
    assert torch.allclose(between, (picture[..., 1:] + picture[..., :-1]) / 2, atol=1e-5)


def test_splatting_conserves_and_finds_holes():
    values = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    points = 3 + 10 * torch.rand(50, 2, generator=torch.Generator().manual_seed(1))
    picture, share = splat(values, points, torch.ones(50), 16, 16)
    assert torch.allclose((picture * share).sum((1, 2)), values.sum(1), atol=1e-4)
    assert abs(float(share.sum()) - 50) < 1e-3 and (share[0] == 0).all()


def test_sums_of_whole_numbers_are_the_same_in_any_order():
    """As on CUDA. A lens that shrinks a picture to a few pixels, with values as large as ways across a large frame."""
    values = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [4e3], [1.6e7]])
    points = 3 + 4 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(1))
    weight = torch.rand(4000, generator=torch.Generator().manual_seed(2)).clamp(min=1e-3)
    expected = splat(values, points, weight, 16, 16)
    found = splat(values, points, weight, 16, 16, exactly=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(3))
    shuffled = splat(values[:, order], points[order], weight[order], 16, 16, exactly=True)
    assert torch.equal(shuffled[0], found[0]) and torch.equal(shuffled[1], found[1])


def test_holes_are_filled_from_around_them():
    picture = (grid(33, 47).movedim(-1, 0) / 47)[None]
    known = torch.ones(1, 33, 47, dtype=torch.bool)
    known[0, 10:16, 20:27] = False
    filled = fill_holes(torch.where(known[:, None], picture, 9.0), known)
    assert torch.equal(filled[known[:, None].expand_as(filled)], picture[known[:, None].expand_as(filled)])
    assert (filled - picture)[..., 10:16, 20:27].abs().max() < 0.05
    assert (fill_holes(picture, known & False) == 0).all()


def test_holes_of_all_sizes_are_filled_alike_without_a_look_where_they_end():
    """As on CUDA."""
    picture = torch.rand(2, 3, 33, 47, generator=torch.Generator().manual_seed(0))
    known = torch.rand(2, 33, 47, generator=torch.Generator().manual_seed(1)) > 0.3
    known[1] = True
    for some in (known, known & False):
        assert torch.equal(fill_holes(picture, some, stops_early=False), fill_holes(picture, some))


class Unasked(TorchFunctionMode):
    """Refuses what would have the host wait for a GPU: numbers that are made into tensors, tensors that are read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("new_tensor", "tensor", "__bool__", "item", "tolist", "nonzero"), name
        return function(*args, **(kwargs or {}))


def test_nothing_is_asked_of_a_device_that_carries_and_a_chunks_motion_goes_there_once(monkeypatch):
    flow, sent = diagonal_sampler.flow, []
    monkeypatch.setattr(flow, "fill_holes", lambda *a, stops_early=False: fill_holes(*a, stops_early=stops_early))
    monkeypatch.setattr(flow, "send", lambda x, device: sent.append((tuple(x.shape), x.is_contiguous())) or x)
    picture, held = smooth_picture(12, 16), uniform(3, 0, steps=9)
    path = torch.stack([5 + 2 * torch.arange(9.0), torch.full((9,), 6.0)], -1)[:, None]
    for field, steps in ((tracks_flow(path, None, 12, 16, radius=4), 6), (held, 1)):
        sent.clear()
        with Unasked():
            frames = list(carry(picture, field, 2, 8))
        assert len(frames) == 8
        assert sent == [((steps, 12, 16, 2), True), ((steps, 12, 16), True)]
    with Unasked():
        flow.resize(held.flow, held.valid, 6, 5)
    with pytest.raises(AssertionError, match="__bool__"), Unasked():
        bool(picture.any())


@pytest.mark.parametrize("motion", [{"pan": (-1.3, 0.4)}, {"zoom": 1.5}, {"zoom": -1.5, "rotation": 1}])
def test_carried_pictures_equal_the_moved_scene(motion):
    height = width = 60
    field = camera_flow(12, height, width, **motion)
    frames = list(carry(smooth_picture(height, width), field, 0, 12))
    # The truth, looked up through the exact inverse of the motion.
    points = grid(height, width)
    for _ in range(12):
        centre = points.new_tensor([29.5, 29.5])
        angle = math.radians(motion.get("rotation", 0))
        turn = points.new_tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        pan = points.new_tensor(motion.get("pan", (0, 0)))
        points = (points + pan - centre) @ turn.T / (1 + motion.get("zoom", 0) / 100) + centre
    truth = sample(smooth_picture(height, width), points)
    entered = ((points < 0) | (points > 59)).any(-1)
    error = (frames[-1].picture - truth).abs().amax(0)
    assert error[~entered].median() < 0.02 and error[~entered].quantile(0.98) < 0.05
    assert frames[-1].commanded[~entered].mean() > 0.97
    if entered.any():
        assert frames[-1].commanded[entered].mean() < 0.2, "what enters from outside is not commanded"


def turned_or_zoomed_home(height: int, width: int, steps: int, zoom: float = 0.0, rotation: float = 0.0):
    """[H, W, 2] where each place of the last frame was in the first one, exactly."""
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    angle = math.radians(rotation * steps)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (grid(height, width) - centre) @ turn.T / (1 + zoom / 100) ** steps + centre


@pytest.mark.parametrize(
    ("motion", "most"),
    [
        ({"zoom": -2.0}, (0, 0)),
        ({"zoom": -3.0}, (0.015, 0)),
        ({"zoom": -5.0}, (0.025, 0)),
        ({"rotation": 2.0}, (0.02, 0)),  # a corner that left comes back on a straight line, not on the circle
        ({"rotation": 3.0}, (0.02, 10)),
    ],
    ids=str,
)
def test_what_enters_at_the_edge_is_told_from_what_moves_inside(motion, most):
    height, width = 60, 104
    *_, last = carry(smooth_picture(height, width), camera_flow(12, height, width, **motion), 0, 12)
    home = turned_or_zoomed_home(height, width, 12, **motion)
    beyond = torch.maximum(-home, home - torch.tensor([width - 1.0, height - 1.0])).amax(-1)  # pixels from the edge
    entered = beyond > 1.5  # nearer, the edge pixels' shares arrive too
    assert entered.sum() > 900
    assert (last.commanded[entered] > 0.5).float().mean() <= most[0], "entered, and taken for commanded"
    assert last.entered[beyond <= 0.5].sum() <= most[1], "of the picture, and taken for entered"


def test_a_picture_that_has_left_the_frame_is_not_black():
    picture = 0.5 + 0.4 * smooth_picture(12, 16)
    whole = list(carry(picture, uniform(7, 0, steps=6), 0, 6))
    assert whole[1].entered.float().mean() > 0.5 and whole[-1].entered.all()
    for frame in whole:
        assert frame.picture.min() >= picture.min() - 1e-3
        assert (frame.commanded[frame.entered] == 0).all()
    left = next(number for number, frame in enumerate(whole) if frame.entered.all())
    assert torch.equal(whole[-1].picture, whole[left - 1].picture), "the last one that something was left in"
    at_once = next(carry(picture, uniform(40, 0, steps=1), 0, 1))
    assert torch.equal(at_once.picture, picture)


def test_a_thin_shape_stays_sharp_over_many_carried_chunks():
    picture = torch.full((3, 64, 64), 0.2)
    picture[1, 20:32, 25:28] = picture[1, 25:28, 20:32] = 0.9
    carried = picture
    velocity = torch.tensor([0.37, 0.11])
    for chunk in range(5):
        track = 26 + velocity * torch.arange(12 * chunk, 12 * chunk + 13)[:, None]
        *_, last = carry(carried, tracks_flow(track[:, None], None, 64, 64, radius=11), 0, 12)
        carried = last.picture
    contrast = [part[1].diff(dim=0).square().sum() for part in (carried, picture)]
    assert contrast[0] > 0.3 * contrast[1], "by the sum of shares alone a sixth of it is left"
    assert (carried[1] - 0.2).sum() == pytest.approx(float((picture[1] - 0.2).sum()), rel=0.05)
    assert carried.min() > 0.2 - 1e-5 and carried.max() < 0.9 + 1e-5


def test_a_carried_sprite_leaves_its_background_and_covers_what_it_meets():
    """A square of ones moves right over a plain of zeros with a post of 0.5 in its way."""
    picture = torch.zeros(1, 20, 60)
    picture[:, 5:13, 4:12] = 1
    picture[:, 8, 24:26] = 0.5
    path = torch.stack([7.5 + 2 * torch.arange(17.0), torch.full((17,), 8.5)], -1)[:, None]
    field = tracks_flow(path, None, 20, 60, radius=6.5)
    frames = list(carry(picture, field, 0, 16))
    for count, frame in ((1, frames[0]), (6, frames[5]), (16, frames[15])):
        at = slice(4 + 2 * count, 12 + 2 * count)
        assert frame.picture[0, 6:12, at].mean() > 0.97
        assert frame.picture[0, 5:13, : 2 + 2 * count].abs().max() < 0.12 or count > 11, "nothing is left behind"
        assert frame.commanded[9, 2 + 2 * count : 14 + 2 * count].min() > 0.9
    assert frames[5].picture[0, 8, 17:23].min() > 0.9
    assert frames[15].picture[0, 8, 24:26].min() > 0.4, "what was covered is seen again"
    assert frames[15].commanded[:2].max() == 0 and frames[15].commanded[8, 5] > 0.9


def test_beyond_the_last_step_nothing_is_commanded():
    frames = list(carry(smooth_picture(12, 16), uniform(1, 0, steps=2), 0, 4))
    assert len(frames) == 4 and frames[1].commanded.max() > 0 and frames[2].commanded.max() == 0
    assert torch.allclose(frames[3].picture, frames[1].picture, atol=1e-5)
    with pytest.raises(ValueError, match="picture is 16x10 and the optical flow 16x12"):
        list(carry(smooth_picture(10, 16), uniform(1, 0), 0, 1))


# --- colours ---


def test_painting_reads_what_colouring_wrote():
    angle = torch.linspace(0, 2 * math.pi, 361)[:-1]
    rate = torch.linspace(0.02, 1, 20)[:, None]
    flow = 5 * rate[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    valid = torch.ones(flow.shape[:-1], dtype=torch.bool)
    valid[0, :5] = False
    colours = flow_colours(flow, valid, speed=5)
    assert colours.min() >= 0 and colours.max() <= 1
    again = painted_flow(colours[None], speed=5)
    assert torch.equal(again.valid[0], valid)
    assert (again.flow[0] - flow)[valid].abs().max() < 1e-3


def test_named_colours():
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [3, 0]])
    colours = flow_colours(directions, torch.ones(6, dtype=torch.bool), speed=1)
    assert torch.allclose(colours[0], torch.tensor([1.0, 0, 0]), atol=1e-5), "right is red"
    assert colours[1, :2].min() > 0.9 and colours[1, 2] == 0, "down is yellow"
    assert colours[2, 1:].min() > 0.6 and colours[2, 0] < 1e-5, "left is blue-green"
    assert colours[3, 2] == 1 and colours[3, 1] < 0.2, "up is violet"
    assert (colours[4] == 1).all(), "rest is white"
    assert torch.allclose(colours[5], torch.tensor([0.75, 0, 0]), atol=1e-5), "too fast is dark"


def test_painted_refusals():
    with pytest.raises(ValueError, match="black all over"):
        painted_flow(torch.zeros(1, 4, 4, 3), 4)
    with pytest.raises(ValueError, match="NaN"):
        painted_flow(torch.full((1, 4, 4, 3), math.nan), 4)
    with pytest.raises(ValueError, match="speed is 0"):
        painted_flow(torch.ones(1, 4, 4, 3), 0)
    dark = painted_flow(torch.tensor([0.3, 0, 0]).expand(1, 4, 4, 3), 4)
    assert torch.allclose(dark.flow, torch.tensor([4.0, 0.0]), atol=1e-4), "a dark stroke means its hue"


def test_preview_without_frames_draws_a_held_motion_once():
    held = OpticalFlow.everywhere(torch.ones(1, 16, 16, 2)).fit(10**6, 16, 16)
    assert len(preview(None, held)) == 1
    assert len(preview(torch.rand(4, 16, 16, 3), held.fit(3, 16, 16))) == 3


def test_a_preview_may_show_that_nothing_was_measured():
    field = camera_flow(3, 64, 48, pan=(2, 0))
    frames = torch.rand(4, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    found = preview(frames, field, nothing_measured=True)
    assert torch.equal(found[:, :, : 2 * 240], preview(frames, field))
    assert found.shape == (3, 320, 3 * 240, 3) and (found[:, :, 2 * 240 :] == 0).all()


def test_preview_shows_three_panels():
    field = camera_flow(3, 64, 48, pan=(2, 0))
    frames = torch.rand(4, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    picture = preview(frames, field, camera_flow(3, 64, 48, pan=(2, 1)))
    assert picture.shape == (3, 64 * 5, 3 * 48 * 5, 3)
    assert usual_speed(field) == 2.0
    assert not torch.equal(picture[0, :, : 48 * 5], picture[0, :, 48 * 5 : 96 * 5])
