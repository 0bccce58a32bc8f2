"""Motion as dense fields: where the pixels of one frame are in the next one, and pictures moved along it.

An optical flow is [T, H, W, 2] float32 in pixels per pixel frame, x to the right and y down. Step t moves pixel frame t
to pixel frame t+1, so a clip of P pixel frames has P-1 steps. Points are [..., 2] as (x, y); the centre of the first
pixel is (0, 0). "Valid" marks where the motion is known, or commanded; everywhere else nothing is said.

(`flow` alone, in the sampler's files, is the model's prediction noise - x0. Motion is always called optical flow.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .frames import TIME_FACTOR
from .noise import send
from .wan_layout import WAN_CELL

TRACK_RADIUS_SHARE = 1 / 8
"""Reach of a track as a share of the frame's shorter side, where none is given."""
HIDDEN_WEIGHT = 1e-4
"""What a hidden particle still counts for."""

_LEAST_RADIUS = math.sqrt(0.5)  # pixels: some pixel's centre is always as near
_HIDDEN_MARGIN = 0.5  # pixels: of two particles in one cell, the one that has moved this much less lies behind
_RESIZED_AT_ONCE = 1 << 20  # numbers of a field that are resized together
_ONE_WAY = 0.05  # square pixels: ways that differ by less are one
_KNOWN_WEIGHT = 0.2  # a target pixel that receives less than this share of a pixel is a hole


class NothingValid(ValueError):
    """A field that says nothing of the clip that it is fitted to, or was measured in."""


@dataclass(frozen=True, slots=True, eq=False)
class OpticalFlow:
    """A dense field of motion.

    Attributes:
        flow: [T, H, W, 2] float32, pixels per pixel frame, x right, y down; finite. Ignored where it is not valid.
        valid: [T, H, W] bool, where the motion is known.

    Raises:
        ValueError: wrong shapes or dtypes, no step, NaN or Inf, or nothing valid.
    """

    flow: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        if self.flow.ndim != 4 or self.flow.shape[-1] != 2 or not self.flow.numel():
            raise ValueError(
                f"The optical flow has shape {tuple(self.flow.shape)}; it must be [steps, height, width, 2] with at "
                "least one step. A video needs two frames for one step."
            )
        if self.flow.dtype != torch.float32 or self.valid.dtype != torch.bool:
            raise ValueError(
                f"The optical flow is {self.flow.dtype} and its mask {self.valid.dtype}; give float32 and bool."
            )
        if self.valid.shape != self.flow.shape[:3]:
            raise ValueError(
                f"The mask has shape {tuple(self.valid.shape)} but the optical flow {tuple(self.flow.shape)}; give "
                f"{tuple(self.flow.shape[:3])}."
            )
        if not _all_finite(stored(self.flow)):
            raise ValueError(
                "The optical flow holds NaN or infinite values. Mark unknown places in the mask and set them to 0, or "
                "check the video that it was estimated from."
            )
        if not stored(self.valid).any():
            raise ValueError(
                "The optical flow's mask is empty: no motion is given anywhere. Draw the mask (white is where the "
                "motion counts), or leave it out."
            )

    @property
    def steps(self) -> int:
        """Motions between pixel frames: one less than the frames."""
        return self.flow.shape[0]

    @property
    def height(self) -> int:
        return self.flow.shape[1]

    @property
    def width(self) -> int:
        return self.flow.shape[2]

    @property
    def is_held(self) -> bool:
        """Whether one step is in memory, which stands for all of them."""
        return _is_held(self.flow, self.valid)

    @property
    def rests(self) -> bool:
        """Whether everything is told everywhere not to move, as by a camera that was given no movement."""
        if self.flow[0].any() or not self.valid[0].all():  # nearly all others are found out by this
            return False
        return self.is_held or bool(self.valid.all() and not self.flow.any())

    @classmethod
    def everywhere(cls, flow: Tensor) -> OpticalFlow:
        """A field that is valid everywhere. flow: [T, H, W, 2] in pixels per pixel frame."""
        return cls(flow, torch.ones((), dtype=torch.bool, device=flow.device).expand(flow.shape[:-1]))

    def told(self, start: int, count: int) -> int:
        """How many of `count` steps from `start` on say something anywhere; beyond the field none does."""
        count = min(count, self.steps - start)
        if count <= 0:
            return 0
        rows = stored(self.valid[start : start + count])
        return int(rows.flatten(1).any(1).sum()) * (count // len(rows))

    def masked(self, mask: Tensor) -> OpticalFlow:
        """The field inside a mask only.

        Args:
            mask: [n, h, w] in 0..1, above 0.5 is inside; n is 1 (for every step) or at least the number of steps. It
                is resized to the field. A field of a single step has as many as the mask then.

        Raises:
            ValueError: another shape or length, NaN, or a mask that leaves nothing.
        """
        if mask.ndim == 2:
            mask = mask[None]
        if mask.ndim != 3 or not mask.numel():
            raise ValueError(f"The mask has shape {tuple(mask.shape)}; it must be [frames, height, width].")
        if mask.shape[0] != 1 and mask.shape[0] < self.steps:
            raise ValueError(
                f"The mask has {mask.shape[0]} frames and the optical flow {self.steps} steps; give one mask for all "
                "of them, or one for each frame."
            )
        if not torch.isfinite(mask).all():
            raise ValueError("The mask holds NaN or infinite values; give numbers from 0 to 1.")
        if self.steps == 1 and len(mask) > 1:
            held = self.flow.expand(len(mask), -1, -1, -1), self.valid.expand(len(mask), -1, -1)
            return OpticalFlow(*held).masked(mask)
        size = (self.height, self.width)
        counts = F.interpolate(mask[: self.steps, None].float(), size, mode="bilinear", antialias=True)[:, 0] > 0.5
        counts = counts.to(self.valid.device)
        if len(counts) == 1 and self.valid.stride(0) == 0:  # one step that stands for all stays one
            return OpticalFlow(self.flow, (self.valid[:1] & counts).expand(self.steps, -1, -1))
        return OpticalFlow(self.flow, self.valid & counts)

    def fit(self, steps: int, height: int, width: int) -> OpticalFlow:
        """The field for a clip of another length and size.

        The rule for the length: motion keeps its pace, step t stays step t. What is too long is cut. What is too short
        leaves the rest of the clip free (not valid), except that a single step is held for the whole clip. The rule for
        the size: the picture is stretched to the new one, and the vectors with it.

        Raises:
            NothingValid: nothing valid is left.
        """
        flow, valid = self.flow, self.valid
        if self.steps == 1:
            flow, valid = flow.expand(steps, -1, -1, -1), valid.expand(steps, -1, -1)
        flow, valid = flow[:steps], valid[:steps]
        if (height, width) != (self.height, self.width):
            begun = bool(stored(valid).any())
            flow, valid = resize(flow, valid, height, width)
            if begun and not stored(valid).any():
                raise NothingValid(too_small(self, height, width))
        missing = steps - len(flow)
        if missing > 0:
            flow = torch.cat([flow, flow.new_zeros(missing, height, width, 2)])
            valid = torch.cat([valid, valid.new_zeros(missing, height, width)])
        if not stored(valid).any():
            raise NothingValid(nothing_within(steps))
        return OpticalFlow(flow, valid)

    def at(self, step: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Motion at points between pixels, interpolated over the valid pixels around them.

        Args:
            step: from 0; the motion from pixel frame `step` to the next.
            points: [..., 2].

        Returns:
            motion [..., 2] in pixels, 0 where it is not known; and whether it is known, [...].
        """
        return motion_at(self.flow[step].to(points.device), self.valid[step].to(points.device), points)

    def on(self, device: torch.device, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Some steps on a device, sent there together and once where they are all the same.

        Args:
            start: the first of them.
            count: how many; fewer beyond the field's end.

        Returns:
            flow [n, H, W, 2] and valid [n, H, W].
        """
        parts = (part[start : start + count] for part in (self.flow, self.valid))
        # Contiguous, for a part that repeats within a step has no room of its own to be copied to.
        flow, valid = (send(stored(part).contiguous(), device).expand_as(part) for part in parts)
        return flow, valid

    def composed(self, group: int = TIME_FACTOR) -> OpticalFlow:
        """Every `group` steps as one: points are followed through them. A last, shorter group is dropped.

        At the size of the latent (`fit(steps, h, w)`) this is latent pixels per latent frame: step j moves latent frame
        j to latent frame j+1, for latent frame j ends with pixel frame 4*j.

        Raises:
            ValueError: fewer steps than one group; NothingValid where nothing is valid throughout a group.
        """
        count = self.steps // group
        if count > 1 and self.is_held:  # one group stands for all
            one = OpticalFlow(self.flow[:group], self.valid[:group]).composed(group)
            return OpticalFlow(one.flow.expand(count, -1, -1, -1), one.valid.expand(count, -1, -1))
        if not count:
            raise ValueError(f"The optical flow has {self.steps} steps; one latent frame needs {group}.")
        origin = grid(self.height, self.width, self.flow.device)
        followed = [follow(self.at, origin, range(at, at + group)) for at in range(0, count * group, group)]
        if not any(bool(valid.any()) for _, valid in followed):
            raise NothingValid(nowhere_through(group))
        flows, valids = zip(*followed, strict=True)
        return OpticalFlow(torch.stack(flows), torch.stack(valids))


def follow(at: Callable[[int, Tensor], tuple[Tensor, Tensor]], origin: Tensor, steps: range) -> tuple[Tensor, Tensor]:
    """Some steps as one: points are followed through them.

    Args:
        at: as `OpticalFlow.at`.
        origin: [H, W, 2] the centres of all pixels, see `grid`.
        steps: at least one.

    Returns:
        motion [H, W, 2] in pixels, and whether it is known, [H, W].
    """
    height, width = origin.shape[:2]
    motion, begun = at(steps[0], origin)
    points, known = origin + motion, begun
    for step in steps[1:]:
        motion, here = at(step, points)
        points, known = points + motion, known & here
    # What leaves the picture on its way was known until then: its motion is the best there is.
    return points - origin, known | (begun & ~inside(points, height, width))


def nowhere_through(group: int) -> str:
    """The message where `composed` finds nothing."""
    return f"it is known nowhere through the {group} steps of a latent frame."


def nothing_within(steps: int) -> str:
    """The message where `fit` finds nothing."""
    return (
        f"Nothing of the optical flow's valid part lies in the first {steps} steps; make the clip longer, or draw the "
        "motion or the mask earlier."
    )


def stored(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in memory once, where its first axis only repeats."""
    return tensor[:1] if tensor.stride(0) == 0 else tensor


def _is_held(flow: Tensor, valid: Tensor) -> bool:
    return len(stored(flow)) == len(stored(valid)) == 1


def _all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN or Inf; makes no copy of it."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def resize(flow: Tensor, valid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A field, [n, H, W, 2] and bool [n, H, W], stretched to another size; one that is held stays so."""
    steps = len(flow)
    shares = torch.cat(list(shares_of(flow, valid, height, width)))
    known = shares[:, 2:] >= 0.5
    flow = (shares[:, :2] / shares[:, 2:].clamp(min=0.5) * known).movedim(1, -1)
    if len(flow) < steps:
        return flow.expand(steps, -1, -1, -1), known[:, 0].expand(steps, -1, -1)
    return flow, known[:, 0]


def too_small(optical_flow: OpticalFlow, height: int, width: int) -> str:
    """The message where nothing of a field is left at another size."""
    reach = math.ceil(max(optical_flow.width / width, optical_flow.height / height))
    return (
        f"The optical flow's valid part is too small: nothing of it is left at {width}x{height}, where a pixel is "
        f"{reach} of the motion's. Give tracks a track_radius of {reach} pixels or more, or draw the motion or the "
        "mask larger."
    )


def shares_of(flow: Tensor, valid: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """The means of a field over the pixels of another size, what is not valid counted as 0.

    Returns:
        [n, 3, height, width] dx and dy, stretched with the picture, and the share of a pixel that is valid, of some
        steps at a time, so that a long clip needs no second copy of itself; of one where it stands for all.
    """
    if _is_held(flow, valid):
        flow, valid = flow[:1], valid[:1]
    at_once = max(1, _RESIZED_AT_ONCE // flow[0].numel())
    for first in range(0, len(flow), at_once):
        weight = valid[first : first + at_once, None].float()
        pictures = torch.cat([flow[first : first + at_once].movedim(-1, 1) * weight, weight], dim=1)
        shares = F.interpolate(pictures, (height, width), mode="bilinear", antialias=True)
        # Numbers, not a tensor of them, as in `sample`.
        shares[:, 0] *= width / flow.shape[2]
        shares[:, 1] *= height / flow.shape[1]
        yield shares


# --- points and pictures ---


def grid(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The centres of all pixels, [H, W, 2] as (x, y)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1)


def inside(points: Tensor, height: int, width: int) -> Tensor:
    """Whether points [..., 2] lie in a picture, its edge pixels included: [...]."""
    return (points >= -0.5).all(-1) & (points[..., 0] <= width - 0.5) & (points[..., 1] <= height - 0.5)


def sample(picture: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
    """A picture [*batch, C, H, W] read at points [*batch, ..., 2]; beyond its edge the edge continues.

    Args:
        mode: "bilinear", or "bicubic", which blurs less and may go a little beyond the picture's values.

    Returns:
        [*batch, C, ...].
    """
    *batch, channels, height, width = picture.shape
    # Numbers, not a tensor of them: to make that on a GPU would wait for it.
    places = torch.stack(
        [points[..., axis] * 2 / max(size - 1, 1) - 1 for axis, size in enumerate((width, height))], dim=-1
    ).reshape(math.prod(batch), 1, -1, 2)
    pictures = picture.reshape(-1, channels, height, width)
    found = F.grid_sample(pictures, places, mode=mode, padding_mode="border", align_corners=True)
    return found.reshape(*batch, channels, *points.shape[len(batch) : -1])


def motion_at(flow: Tensor, valid: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """`OpticalFlow.at` of single steps, [*batch, H, W, 2] and [*batch, H, W], at points [*batch, ..., 2]."""
    height, width = valid.shape[-2:]
    weight = valid.to(points.dtype).unsqueeze(-3)
    found = sample(torch.cat([flow.movedim(-1, -3) * weight, weight], dim=-3), points).movedim(valid.ndim - 2, -1)
    known = (found[..., 2] >= 0.5) & inside(points, height, width)
    return found[..., :2] / found[..., 2:].clamp(min=0.5) * known[..., None], known


_ONE = 2.0**28  # what 1 is as a whole number: finer than a float32, and 2**11 of the largest values fit in one place


def splat(
    values: Tensor, points: Tensor, weight: Tensor, height: int, width: int, *, exactly: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Puts values at points onto a picture, each shared among the four pixels around it.

    On CUDA, where sums are in no order, they are of whole numbers (`exactly`): the same at every run.

    Args:
        values: [*batch, C, N], below 2**24 in size.
        points: [*batch, N, 2].
        weight: [*batch, N] how much each counts against others that meet it.

    Returns:
        [*batch, C, H, W] weighted means, 0 where nothing arrives; and [*batch, H, W] the share of a pixel that arrives,
        by area alone.
    """
    *batch, channels, _ = values.shape
    size, every = height * width, math.prod(batch) * height * width
    exactly = values.is_cuda if exactly is None else exactly
    dtype = torch.int64 if exactly else values.dtype
    # The last row takes what falls outside.
    totals = torch.zeros(every + 1, channels + 2, dtype=dtype, device=values.device)
    weight = weight.unsqueeze(-2)
    data = torch.cat([values * weight, weight, torch.ones_like(weight)], dim=-2).transpose(-2, -1)
    data = data.reshape(-1, channels + 2).contiguous()
    first = _first_pixels(points, size)
    points = points.reshape(-1, 2)
    corner = points.floor()
    part = points - corner
    corner = corner.long()
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = corner[:, 0] + dx, corner[:, 1] + dy
            share = (part[:, 0] if dx else 1 - part[:, 0]) * (part[:, 1] if dy else 1 - part[:, 1])
            there = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            shares = data * share[:, None]
            if exactly:
                shares = shares.double().mul(_ONE).round().long()
            totals.index_add_(0, torch.where(there, first + y * width + x, every), shares)
    totals = totals[:-1].double().div(_ONE).to(values.dtype) if exactly else totals[:-1]
    means = totals[:, :-2] / totals[:, -2:-1].clamp(min=1e-8)
    means = means.view(*batch, size, channels).transpose(-2, -1)
    return means.reshape(*batch, channels, height, width), totals[:, -1].view(*batch, height, width)


def _first_pixels(points: Tensor, size: int) -> Tensor:
    """Where the picture of each point [*batch, N, 2] begins, if pictures of `size` pixels lie behind each other."""
    *batch, count, _ = points.shape
    return torch.arange(math.prod(batch), device=points.device).mul(size).repeat_interleave(count)


def fill_holes(picture: Tensor, known: Tensor, *, stops_early: bool | None = None) -> Tensor:
    """Fills unknown pixels from their surroundings: halve the picture until nothing is unknown, then come back.

    Gortler et al. 1996, "The Lumigraph", section 3.5 (push-pull).

    Args:
        picture: [N, C, H, W].
        known: [N, H, W] bool.
        stops_early: at the first size that has no hole, which changes nothing but the time; not on CUDA by default.

    Returns:
        the picture with known pixels as they are; 0 where a whole picture is unknown.
    """
    weight = known[:, None].to(picture.dtype)
    picture = picture * weight
    # Whether nothing is unknown is no question for a GPU: the host would wait for its answer.
    stops_early = not known.is_cuda if stops_early is None else stops_early
    if picture.shape[-2:] == (1, 1) or (stops_early and bool(known.all())):
        return picture
    pool = {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}
    share = F.avg_pool2d(weight, **pool)
    coarse = F.avg_pool2d(picture, **pool) / share.clamp(min=1e-6)
    coarse = fill_holes(coarse, share[:, 0] > 0, stops_early=stops_early)
    wide = F.interpolate(coarse, picture.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(weight > 0, picture, wide)


@dataclass(frozen=True, slots=True)
class WarpedFrame:
    """One frame that a picture was carried to.

    Attributes:
        picture: [C, H, W] with holes filled.
        commanded: [H, W] in 0..1, where the motion says what is seen: what it carried here, and what it left behind.
            0 where nothing was said, and where content from outside the frame enters.
        entered: [H, W] bool, where content from outside the frame is, which nothing is known of.
    """

    picture: Tensor
    commanded: Tensor
    entered: Tensor


def carrying_device(device: torch.device) -> torch.device:
    """Where frames of a model on this device are carried: there on CUDA, else on the CPU. Apple's GPU reads no picture
    beyond its edge."""
    return device if device.type == "cuda" else torch.device("cpu")


def carry(picture: Tensor, optical_flow: OpticalFlow, start: int, count: int) -> Iterator[WarpedFrame]:
    """Carries a picture along the flow, one frame at a time; each frame is made from the picture itself, once.

    Computed where `carrying_device` says, and the frames are there.

    Every pixel is a particle. Where two meet, the one that has moved further hides the other, which goes on at its own
    pace until it is seen again; places that nothing arrives at are filled from around them. Once nothing of the picture
    is left in the frame, the last carried one stays.

    Args:
        picture: [C, H, W], pixel frame `start` of the clip, of the field's size.
        optical_flow: of the whole clip.
        start: the step to begin with.
        count: frames to make; beyond the field's last step nothing is commanded.

    Raises:
        ValueError: the sizes differ.
    """
    height, width = optical_flow.height, optical_flow.width
    if tuple(picture.shape[-2:]) != (height, width):
        raise ValueError(
            f"The picture is {picture.shape[-1]}x{picture.shape[-2]} and the optical flow {width}x{height}; fit the "
            "optical flow to the picture first."
        )
    picture = picture.to(carrying_device(picture.device))
    origin = grid(height, width, picture.device).reshape(-1, 2)
    points, velocity = origin, torch.zeros_like(origin)
    commanded = torch.ones(len(origin), dtype=torch.bool, device=picture.device)
    hidden = torch.zeros_like(commanded)
    begun = origin.T.reshape(2, height, width)  # where what is at each place was in the picture, or outside of it
    started = None
    seen = picture
    values = picture.reshape(picture.shape[0], -1)
    low, high = picture.amin((1, 2), keepdim=True), picture.amax((1, 2), keepdim=True)
    flow, valid = optical_flow.on(picture.device, start, count)
    for step in range(count):
        if step < len(flow):
            motion, known = motion_at(flow[step], valid[step], points)
            begun = _one_step_on(begun, flow[step], valid[step], origin)
        else:
            motion, known = torch.zeros_like(points), torch.zeros_like(commanded)
        # The field says nothing of what is hidden or has left the frame: it goes on as it did.
        away = hidden | ~inside(points, height, width)
        velocity = torch.where(away[:, None], velocity, motion)
        points = points + velocity
        commanded = commanded & (known | away)
        started = commanded if started is None else started
        hidden = lies_behind(points, origin, commanded, height, width)
        weight = torch.where(hidden, HIDDEN_WEIGHT, 1.0)
        way = (points - origin).T.to(values.dtype)
        data = torch.cat([values, commanded.to(values.dtype)[None], way, way.square().sum(0, keepdim=True)])
        moved, share = splat(data, points, weight, height, width)
        arrived = share >= _KNOWN_WEIGHT
        # What came to a pixel by one way is read where it came from, for the sum of shares blurs: chunk after chunk
        # a thin shape would fade. At the border of two motions the sum is all there is.
        moved, way, spread = moved[:-3], moved[-3:-1], moved[-1] - moved[-3:-1].square().sum(0)
        origins = origin.view(height, width, 2) - way.movedim(0, -1)
        read = sample(picture, origins, "bicubic").clamp(low, high)
        moved = torch.cat([torch.where(spread < _ONE_WAY, read, moved[:-1]), moved[-1:]])
        # Chosen where the pictures are: to ask whether anything arrived, the host would wait for a GPU.
        stays = torch.cat([seen, torch.zeros_like(moved[-1:])])
        moved = torch.where(arrived.any(), fill_holes(moved[None], arrived[None])[0], stays)
        seen = moved[:-1]
        mask = torch.maximum(moved[-1], (started.view(height, width) & ~arrived).to(moved.dtype))
        entered = ~arrived & ~inside(begun.movedim(0, -1), height, width)
        yield WarpedFrame(seen, mask.masked_fill(entered, 0.0), entered)


def _one_step_on(begun: Tensor, flow: Tensor, valid: Tensor, origin: Tensor) -> Tensor:
    """[2, H, W] a map of each place to where its content was in the beginning, one step later.

    What is at a place now was one motion before: not the place's own, but that of where it came from.

    Args:
        flow, valid: [H, W, 2] and bool [H, W], of the step.
        origin: [H * W, 2] the centres of all pixels.
    """
    corners = origin[0], origin[-1]
    before = origin - motion_at(flow, valid, origin)[0]
    before = origin - motion_at(flow, valid, before.clamp(*corners))[0]
    # Beyond the edge the map goes on as it does at rest: as far outside as one is.
    outside = before - before.clamp(*corners)
    return sample(begun, before).view_as(begun) + outside.T.reshape(begun.shape)


def lies_behind(points: Tensor, origin: Tensor, commanded: Tensor, height: int, width: int) -> Tensor:
    """[*batch, N] whether another particle in the same pixel lies in front: one that moved further, commanded before
    not.

    Args:
        points: [*batch, N, 2] where they are.
        origin: [N, 2] where they were.
        commanded: bool [*batch, N].
    """
    moved = ((points - origin).norm(dim=-1) + commanded).flatten()
    cell = points.round().long()
    every = math.prod(points.shape[:-2]) * height * width
    x, y = cell[..., 0].clamp(0, width - 1), cell[..., 1].clamp(0, height - 1)
    there = inside(points, height, width).flatten()
    # The last place takes what is outside.
    index = torch.where(there, _first_pixels(points, height * width) + (y * width + x).flatten(), every)
    front = moved.new_zeros(every + 1).scatter_reduce_(0, index, moved, "amax")
    return (there & (moved < front[index] - _HIDDEN_MARGIN)).view(commanded.shape)


# --- sources ---


def camera_flow(
    steps: int,
    height: int,
    width: int,
    *,
    pan: tuple[float, float] = (0.0, 0.0),
    zoom: float = 0.0,
    rotation: float = 0.0,
) -> OpticalFlow:
    """The motion of a still scene under a moving camera.

    Args:
        steps: pixel frames less one, at least 1.
        height, width: pixels.
        pan: (x, y) pixels per frame that the camera moves right and down; the picture moves the other way.
        zoom: percent per frame that the picture grows about its centre, above -100.
        rotation: degrees per frame that the camera turns clockwise; the picture turns the other way.

    Raises:
        ValueError: a number out of range or not finite.
    """
    if steps < 1:
        raise ValueError(f"A camera motion over {steps + 1} pixel frames has no step; use a length of at least 2.")
    if height < 1 or width < 1:
        raise ValueError(f"The size is {width}x{height}; width and height must be at least 1 pixel.")
    if not all(math.isfinite(value) for value in (*pan, zoom, rotation)):
        raise ValueError(f"pan is {pan}, zoom {zoom} and rotation {rotation}; all must be finite numbers.")
    if zoom <= -100:
        raise ValueError(f"zoom is {zoom} percent per frame; it must be above -100, where the picture vanishes.")
    points = grid(height, width)
    centre = points.new_tensor([(width - 1) / 2, (height - 1) / 2])
    angle = math.radians(-rotation)
    # With y down, this turns clockwise for a positive angle.
    turn = points.new_tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = (points - centre) @ turn.T * (1 + zoom / 100) + centre - points.new_tensor(pan)
    return OpticalFlow.everywhere((moved - points).expand(steps, -1, -1, -1))


def tracks_flow(
    path: Tensor,
    visible: Tensor | None,
    height: int,
    width: int,
    *,
    radius: float | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> OpticalFlow:
    """A dense field from points that are followed over time: around each track everything moves as it does.

    Where several reach, their motions are averaged with Gaussian weights (deviation half the radius); beyond the
    radius of every track nothing is said.

    Args:
        path: [T, N, 2] positions in pixels, (x, y), one for each pixel frame (ComfyUI's TRACKS, `track_path`).
        visible: [T, N] or [T, 1] bool (`track_visibility`), or None for all.
        height, width: pixels of the frame that the positions are measured in.
        radius: pixels; None is an eighth of the shorter side.
        on_step: called before each of the T - 1 steps, for many tracks take seconds.

    Raises:
        ValueError: another shape, fewer than two frames, a visible position that is not finite, nothing visible, or a
            radius that is not positive.
    """
    if path.ndim != 3 or path.shape[-1] != 2 or not path.shape[1]:
        raise ValueError(f"The tracks have shape {tuple(path.shape)}; they must be [frames, tracks, 2], (x, y) pixels.")
    frames, count = path.shape[:2]
    if frames < 2:
        raise ValueError(f"The tracks have {frames} frame; motion needs at least 2.")
    radius = TRACK_RADIUS_SHARE * min(height, width) if radius is None else radius
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius is {radius}; it must be a positive number of pixels.")
    path = path.detach().float().cpu()
    if visible is None:
        visible = torch.ones(frames, count, dtype=torch.bool)
    if visible.ndim != 2 or visible.shape[0] < frames or visible.shape[1] not in (1, count):
        raise ValueError(
            f"The tracks' visibility has shape {tuple(visible.shape)}; it must be [{frames}, {count}] or [{frames}, 1]."
        )
    visible = visible[:frames].cpu().bool().expand(-1, count)
    bad = visible & ~torch.isfinite(path).all(-1)
    if bad.any():
        frame, track = bad.nonzero()[0].tolist()
        raise ValueError(f"Track {track} is visible at frame {frame} but its position there is NaN; mark it invisible.")
    flow = torch.zeros(frames - 1, height, width, 2)
    valid = torch.zeros(frames - 1, height, width, dtype=torch.bool)
    for step in range(frames - 1):
        on_step()
        total = torch.zeros(height, width)
        for track in (visible[step] & visible[step + 1]).nonzero()[:, 0].tolist():
            x, y = path[step, track].tolist()
            rows = slice(max(0, math.ceil(y - radius)), min(height, math.floor(y + radius) + 1))
            columns = slice(max(0, math.ceil(x - radius)), min(width, math.floor(x + radius) + 1))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            away = (
                torch.arange(rows.start, rows.stop)[:, None].sub(y).square()
                + torch.arange(columns.start, columns.stop).sub(x).square()
            )
            weight = torch.exp(-2 * away / radius**2) * (away <= radius**2)
            total[rows, columns] += weight
            flow[step, rows, columns] += weight[..., None] * (path[step + 1, track] - path[step, track])
        flow[step] /= total.clamp(min=1e-12)[..., None]
        valid[step] = total > 0
    if not valid.any():
        if radius < _LEAST_RADIUS:
            raise ValueError(
                f"track_radius is {radius:g} pixels, so that no track reaches the centre of a pixel; use {WAN_CELL} or "
                "more, which is one pixel of Wan's latent, or 0 for an eighth of the shorter side."
            )
        raise ValueError(
            f"No track is visible inside the {width}x{height} picture in two frames that follow each other; check that "
            "the tracks were made for this width and height."
        )
    return OpticalFlow(flow, valid)
