"""Motion as pictures for people: the usual colours, both ways, and arrows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import OpticalFlow
from .flow_timeline import FlowTimeline

# The colour wheel of Baker et al. 2011, "A Database and Evaluation Methodology for Optical Flow": six arcs from red
# through yellow, green, cyan, blue and magenta back to red, as long as eyes tell colours apart in them. Motion to the
# right is red, downwards is yellow, and the wheel goes on clockwise.
_ARCS = (15, 6, 4, 11, 13, 6)
_CORNERS = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1))
_WHEEL = sum(_ARCS)
_TOO_FAST = 0.75  # brightness of what is faster than the scale
_UNKNOWN = 0.0  # places without motion are black, which is no colour of the wheel
_DARKEST = 0.1  # a painted pixel below this says nothing


def flow_colours(flow: Tensor, valid: Tensor, speed: float) -> Tensor:
    """Motion as colours: hue is the direction, white is rest, full colour is `speed`, darker is faster.

    Args:
        flow: [..., 2] pixels per pixel frame.
        valid: [...] bool; black elsewhere.
        speed: pixels per pixel frame of the full colour, above 0.

    Returns:
        [..., 3] RGB in 0..1.
    """
    _require_speed(speed)
    corners = flow.new_tensor([*_CORNERS, _CORNERS[0]])
    ends = flow.new_tensor([0, *torch.tensor(_ARCS).cumsum(0).tolist()])
    place = torch.remainder(torch.atan2(flow[..., 1], flow[..., 0]) / (2 * math.pi), 1.0) * _WHEEL
    arc = (torch.bucketize(place, ends[1:-1], right=True)).clamp(max=len(_ARCS) - 1)
    part = ((place - ends[arc]) / (ends[arc + 1] - ends[arc])).clamp(0, 1)[..., None]
    hue = corners[arc] * (1 - part) + corners[arc + 1] * part
    rate = (flow.norm(dim=-1) / speed)[..., None]
    colour = torch.where(rate <= 1, 1 - rate * (1 - hue), _TOO_FAST * hue)
    return torch.where(valid[..., None], colour, _UNKNOWN)


def painted_flow(images: Tensor, speed: float) -> OpticalFlow:
    """Motion from a picture painted in those colours: the inverse of `flow_colours` up to its full colour.

    The brightest channel counts as full, so a darker stroke of a hue means the same. Black says nothing.

    Args:
        images: [T, H, W, 3 or more] in 0..1, one picture for each pixel step, or one for the whole clip.
        speed: pixels per pixel frame of the full colour, above 0.

    Raises:
        ValueError: another shape, NaN, or a picture that is black all over.
    """
    _require_speed(speed)
    if images.ndim != 4 or images.shape[-1] < 3 or not images.numel():
        raise ValueError(f"The painted flow has shape {tuple(images.shape)}; it must be an IMAGE [frames, H, W, 3].")
    rgb = images[..., :3].detach().float().cpu()
    if not torch.isfinite(rgb).all():
        raise ValueError("The painted flow holds NaN or infinite values; give an image with numbers from 0 to 1.")
    bright = rgb.amax(-1)
    valid = bright >= _DARKEST
    if not valid.any():
        raise ValueError("The painted flow is black all over, which says nothing; paint it in flow colours.")
    rgb = rgb / bright.clamp(min=_DARKEST)[..., None]
    rate = 1 - rgb.amin(-1)
    hue = 1 - (1 - rgb) / rate.clamp(min=1e-6)[..., None]
    # On each arc one channel is 1, one is 0, and the third tells the place.
    ends = torch.tensor([0, *torch.tensor(_ARCS).cumsum(0).tolist()], dtype=torch.float32)
    red, green, blue = hue.clamp(0, 1).unbind(-1)
    top, low = hue.argmax(-1), hue.argmin(-1)
    rising = {(0, 2): (0, green), (1, 2): (1, 1 - red), (1, 0): (2, blue), (2, 0): (3, 1 - green), (2, 1): (4, red),
              (0, 1): (5, 1 - blue)}  # fmt: skip
    place = torch.zeros_like(rate)
    for (high, lowest), (arc, part) in rising.items():
        place = torch.where((top == high) & (low == lowest), ends[arc] + part * _ARCS[arc], place)
    angle = place / _WHEEL * 2 * math.pi
    flow = (rate * speed)[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return OpticalFlow(flow * valid[..., None], valid)


def _require_speed(speed: float) -> None:
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"speed is {speed}; it must be a positive number of pixels per frame.")


def usual_speed(optical_flow: OpticalFlow | FlowTimeline, steps: int = 16) -> float:
    """A scale for `flow_colours`: nearly the fastest valid motion (99%), at least 0.5 pixels per frame."""
    if isinstance(optical_flow, FlowTimeline):
        return max(usual_speed(motion, steps) for _, motion in optical_flow.motions)
    rows = torch.linspace(0, optical_flow.steps - 1, min(steps, optical_flow.steps)).round().long().unique()
    speeds = optical_flow.flow[rows].norm(dim=-1)[optical_flow.valid[rows]]
    if not len(speeds):
        return 0.5
    rank = max(1, math.ceil(0.99 * len(speeds)))
    return max(0.5, float(speeds.kthvalue(rank).values))


def draw_arrows(frame: Tensor, flow: Tensor, valid: Tensor, *, spacing: int, frames_long: float = 4.0) -> Tensor:
    """A frame with arrows on it: where each place will be after `frames_long` frames at this motion.

    Args:
        frame: [H, W, 3] in 0..1.
        flow: [H, W, 2] pixels per pixel frame, of the frame's size.
        valid: [H, W] bool; no arrow elsewhere.
        spacing: pixels between arrows.
    """
    height, width = frame.shape[:2]
    y, x = torch.meshgrid(
        torch.arange(spacing // 2, height, spacing), torch.arange(spacing // 2, width, spacing), indexing="ij"
    )
    here = valid[y, x]
    tail = torch.stack([x, y], dim=-1)[here].float()
    arrow = flow[y, x][here] * frames_long
    length = arrow.norm(dim=-1)
    tip = tail + arrow
    unit = arrow / length.clamp(min=1e-6)[:, None]
    side = torch.stack([-unit[:, 1], unit[:, 0]], dim=-1)
    barb = (0.35 * length).clamp(min=1.5, max=0.4 * spacing)[:, None]
    moves = length >= 1
    lines = [(tail, tip), *((tip[moves], (tip - barb * (unit + s * 0.7 * side))[moves]) for s in (-1, 1))]
    ink = torch.zeros(height, width, dtype=torch.bool)
    for start, end in lines:
        if not len(start):
            continue
        count = 2 * int((end - start).abs().amax().ceil()) + 2
        at = torch.linspace(0, 1, count)[:, None, None]
        dots = (start + at * (end - start)).reshape(-1, 2).round().long()
        dots = dots[(dots >= 0).all(-1) & (dots[:, 0] < width) & (dots[:, 1] < height)]
        ink[dots[:, 1], dots[:, 0]] = True
    rim = F.max_pool2d(ink[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    out = torch.where(rim[..., None], torch.zeros(()), frame)
    return torch.where(ink[..., None], torch.ones(()), out)


def preview(
    frames: Tensor | None,
    optical_flow: OpticalFlow | FlowTimeline,
    measured: OpticalFlow | None = None,
    *,
    speed: float | None = None,
    nothing_measured: bool = False,
) -> Tensor:
    """Panels side by side for every pixel frame that a motion leaves: frame with arrows, the colours, measured colours.

    Args:
        frames: [P, H, W, 3] in 0..1, or None for gray ones of the field's size.
        optical_flow: fitted to the frames' size and number; measured: of the frames themselves.
        speed: pixels per frame of the full colour; None finds one.
        nothing_measured: the last panel is black, for a field with nothing valid is none.

    Returns:
        IMAGE [steps, h, n * w, 3]; small frames are enlarged so that arrows can be seen. Where there are no frames, one
        picture for each motion that is held, and for each time in which none is.
    """
    timeline = FlowTimeline.of(optical_flow)
    steps = _each_once(timeline) if frames is None else range(timeline.steps)
    speed = usual_speed(optical_flow) if speed is None else speed
    height, width = optical_flow.height, optical_flow.width
    scale = max(1, round(256 / min(height, width)))
    size = (height * scale, width * scale)
    spacing = max(8, min(size) // 12)
    out = []
    for step in steps:
        frame = torch.full((height, width, 3), 0.35) if frames is None else frames[step, ..., :3].float().cpu()
        flow, valid = _of_step(timeline, step)
        arrows, there = _enlarge(flow, size) * scale, _enlarge(valid[..., None], size)[..., 0] > 0.5
        panels = [draw_arrows(_enlarge(frame, size), arrows, there, spacing=spacing)]
        told = [(flow, valid)] if measured is None else [(flow, valid), (measured.flow[step], measured.valid[step])]
        panels += [_enlarge(flow_colours(flow.cpu(), valid.cpu(), speed), size) for flow, valid in told]
        if nothing_measured:
            panels.append(torch.full_like(panels[0], _UNKNOWN))
        out.append(torch.cat(panels, dim=1))
    return torch.stack(out)


def _each_once(timeline: FlowTimeline) -> list[int]:
    """Steps that show all of a timeline: of what is held, or free, the first."""
    steps, at = [], 0
    for count, motion, _ in timeline.pieces(0, timeline.steps):
        steps += [at] if motion is None or motion.is_held else range(at, at + count)
        at += count
    return steps


def _of_step(timeline: FlowTimeline, step: int) -> tuple[Tensor, Tensor]:
    """[H, W, 2] and bool [H, W], the motion from a pixel frame to the next."""
    flow, valid = timeline.on(torch.device("cpu"), step, 1)
    if not len(flow):
        flow, valid = (part.new_zeros(1, *part.shape[1:]) for part in (flow, valid))
    return flow[0], valid[0]


def _enlarge(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(picture.movedim(-1, 0)[None].float(), size, mode="nearest")[0].movedim(0, -1)
