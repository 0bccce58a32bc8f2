"""Motion as the adapter of a Wan with one is told it: features for each pixel of the latent, and their tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import (
    HIDDEN_WEIGHT,
    NothingValid,
    OpticalFlow,
    grid,
    lies_behind,
    motion_at,
    resize,
    sample,
    shares_of,
    splat,
    too_small,
)
from .flow_timeline import FlowTimeline
from .frames import TIME_FACTOR
from .wan_layout import ADAPTER_CHANNELS, WAN_CELL


def adapter_features(optical_flow: OpticalFlow, latent_frames: int, height: int, width: int) -> Tensor:
    """The field as the adapter's convolution takes it, for a whole clip: see AdapterField.

    Args:
        optical_flow: any size; it is fitted to the clip by the rules of `OpticalFlow.fit`.
        latent_frames: T of the clip.
        height, width: of the latent.

    Returns:
        [1, 4, T, H, W] float32.

    Raises:
        NothingValid: the clip would have no flow.
    """
    steps = max(1, TIME_FACTOR * (latent_frames - 1))
    field = optical_flow.fit(steps, optical_flow.height, optical_flow.width)
    return AdapterField(field, height, width).features(0, latent_frames)


class AdapterField:
    """What the adapter's convolution takes, for any part of a clip however long.

    Args:
        optical_flow: any size; it is stretched to the latent's. Where it ends the rest of the clip is free, but for
            a single step, which is held.
        height, width: of the latent.

    Raises:
        NothingValid: of a motion no pixel of the latent is ever commanded by half.
    """

    def __init__(self, optical_flow: OpticalFlow | FlowTimeline, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._timeline = FlowTimeline.of(optical_flow)
        for _, motion in self._timeline.motions:
            shares = shares_of(motion.flow, motion.valid, height, width)
            if not any(bool((part[:, 2] >= 0.5).any()) for part in shares):
                raise NothingValid(too_small(motion, height, width))
        self._repeated: tuple[OpticalFlow, Tensor] | None = None  # a motion that is held, and what four of it tell

    def features(self, start: int, frames: int, device: torch.device | str = "cpu") -> Tensor:
        """The features of some latent frames.

        Args:
            start: the first of them, counted in the clip.
            frames: how many.
            device: to compute on; `carrying_device` says where that is possible.

        Returns:
            [1, 4, frames, H, W] float32 there, see `told_motion`.
        """
        device = torch.device(device)
        return torch.stack([self._frame(start + frame, device) for frame in range(frames)], dim=2)

    def _frame(self, frame: int, device: torch.device) -> Tensor:
        """[1, 4, H, W] the features of a latent frame."""
        if frame == 0:
            return self._told(0, 1, device)
        first = TIME_FACTOR * (frame - 1)
        held = self._timeline.held(first, TIME_FACTOR)
        if held is None:
            return self._told(first, TIME_FACTOR, device)
        if self._repeated is None or self._repeated[0] is not held or self._repeated[1].device != device:
            self._repeated = held, self._told(first, TIME_FACTOR, device)
        return self._repeated[1]

    def _told(self, first: int, count: int, device: torch.device) -> Tensor:
        """What these steps tell, [1, 4, H, W]."""
        if not self._timeline.told(first, count):
            return torch.zeros(1, ADAPTER_CHANNELS, self.height, self.width, device=device)
        flow, valid = self._timeline.on(device, first, count)
        missing = count - len(flow)
        largest = min(flow.shape[1], WAN_CELL * self.height), min(flow.shape[2], WAN_CELL * self.width)
        if largest != tuple(flow.shape[1:3]):
            flow, valid = resize(flow, valid, *largest)
        flow, valid = F.pad(flow, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(valid, (0, 0, 0, 0, 0, missing))
        return told_motion(flow[None], valid[None], self.height, self.width)


def told_motion(flow: Tensor, valid: Tensor, height: int, width: int) -> Tensor:
    """What the adapter is told of latent frames: the motion of what is there, and how much of a pixel that is.

    What moves is told where it arrives, at the latent frame's last pixel frame: that decides where a sprite is, also
    where it turned on its way. How much of a latent's pixel is commanded is kept as it is, and not rounded to all or
    none: it says where within the pixel the border lies.

    Args:
        flow, valid: [B, S, H, W, 2] and bool [B, S, H, W], the S = TIME_FACTOR steps that lead to B latent frames. Or a
            single step, of the clip's first latent frame: none leads to it, and told is the one that leaves it.
        height, width: of the latent.

    Returns:
        [B, 4, height, width] float32: the means over a latent's pixel of dx, dy and "valid" of what is there, each its
        mean over the TIME_FACTOR steps that brought it there, what is not valid counted as 0, dx and dy in latent
        pixels per latent frame; and the speed |(dx, dy)|.
    """
    if flow.shape[1] == 1:
        known = valid.to(flow.dtype)
        picture = torch.cat([flow[:, 0].movedim(-1, 1) * known, known], dim=1)
    else:
        picture = _arriving(flow, valid)
    small = F.interpolate(picture, (height, width), mode="bilinear", antialias=True)
    dx = small[:, :1] * (TIME_FACTOR * width / flow.shape[3])
    dy = small[:, 1:2] * (TIME_FACTOR * height / flow.shape[2])
    return torch.cat([dx, dy, small[:, 2:], torch.hypot(dx, dy)], dim=1)


def _arriving(flow: Tensor, valid: Tensor) -> Tensor:
    """What came to each place in these steps: [B, 3, H, W], dx, dy and "valid" as means over TIME_FACTOR steps.

    Every pixel is a particle; where the field says nothing it rests.
    """
    height, width = valid.shape[-2:]
    origin = grid(height, width, flow.device).reshape(-1, 2)
    points = origin.expand(len(flow), -1, -1)
    times = points.new_zeros(points.shape[:-1])
    for step in range(flow.shape[1]):
        motion, known = motion_at(flow[:, step], valid[:, step], points)
        points, times = points + motion, times + known
    told, way = times > 0, (points - origin).transpose(1, 2)
    weight = torch.where(lies_behind(points, origin, told, height, width), HIDDEN_WEIGHT, 1.0) * told
    # Where things came from is smooth where they are not: that is carried, and all else is read there.
    back, _ = splat(torch.cat([way, told[:, None].to(way.dtype)], dim=1), points, weight, height, width)
    picture = torch.cat([way, times[:, None]], dim=1).unflatten(2, (height, width)) / TIME_FACTOR
    before = origin.view(height, width, 2) - back[:, :2].movedim(1, -1)
    return sample(picture, before) * (back[:, 2:] > 0)


def adapter_tokens(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the adapter adds to the patch embedding's output; one function for training and for ComfyUI.

    A latent frame in which nothing is commanded gets exactly nothing: it is a frame without flow.

    Args:
        features: [B, 4, T, H, W] from `adapter_features`.
        weight, bias: [dim, 4, 1, h, w] and [dim], of `flow_embedding`.

    Returns:
        [B, dim, T, H / h, W / w].
    """
    commanded = features[:, 2:3].amax(dim=(-2, -1), keepdim=True) > 0
    return F.conv3d(features, weight, bias, stride=tuple(weight.shape[2:])) * commanded
