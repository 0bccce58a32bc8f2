"""Measures the motion in a video: with OpenCV's DIS, or with the RAFT of ComfyUI's OpticalFlowLoader."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..diagonal_sampler.flow import OpticalFlow, grid, inside, sample

OPENCV_MISSING = (
    "Measuring motion needs OpenCV, which is not installed: run `pip install opencv-python-headless` in ComfyUI's "
    "Python, or connect Load Optical Flow Model (RAFT) to `estimator`."
)
# A vector is trusted where the motion back, read at its end, leads home again to within this: pixels, and a share of
# both lengths. Sundaram, Brox and Keutzer 2010, "Dense point trajectories by GPU-accelerated large displacement
# optical flow", equation 5 (there on squares: 0.01 of them, plus 0.5).
_HOME_PIXELS_SQUARED = 0.5
_HOME_SHARE = 0.01
_RAFT_MULTIPLE = 8
_RAFT_LEAST = 128
"""torchvision's RAFT needs sides that are multiples of 8 and at least 128 pixels."""


class _Measured(NamedTuple):
    optical_flow: OpticalFlow
    totals: tuple[float, ...]  # of each frame, in case a node has written into them (there are no versions to look at)
    estimator: weakref.ref[ModelPatcher] | None


_measured: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was measured of each video that ComfyUI still holds: a node whose strength is turned runs anew."""


def estimate_flow(images: Tensor, estimator: ModelPatcher | None = None, *, keep: bool = False) -> OpticalFlow:
    """The motion between the frames of a video; valid where forward and backward motion agree.

    Args:
        images: IMAGE [T, H, W, 3] in 0..1, T at least 2.
        estimator: ComfyUI's OPTICAL_FLOW (RAFT); None uses OpenCV's DIS.
        keep: remember the motion as long as the video is there: measured again only with another estimator.

    Returns:
        T - 1 steps of the images' size.

    Raises:
        ValueError: one frame only, NaN, or no step that could be trusted anywhere.
        ImportError: no OpenCV and no estimator; says how to install.
    """
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError(f"The video has shape {tuple(images.shape)}; it must be an IMAGE [frames, height, width, 3].")
    if len(images) < 2:
        raise ValueError(f"The video has {len(images)} frame; motion needs at least 2.")
    if not torch.isfinite(torch.stack(images.aminmax())).all():
        raise ValueError("The video holds NaN or infinite values; check the node that made it.")
    totals = tuple(float(frame.sum(dtype=torch.float64)) for frame in images) if keep else ()
    known = _measured.get(images) if keep else None
    if known is not None and known.totals == totals and _same(known.estimator, estimator):
        return known.optical_flow
    between = _dis() if estimator is None else _raft(estimator)
    frames = images[..., :3]
    steps, height, width = len(frames) - 1, *frames.shape[1:3]
    flow, valid = torch.empty(steps, height, width, 2), torch.empty(steps, height, width, dtype=torch.bool)
    progress = comfy.utils.ProgressBar(steps)
    for step in range(steps):
        comfy.model_management.throw_exception_if_processing_interrupted()
        first, second = frames[step].float().cpu(), frames[step + 1].float().cpu()
        flow[step] = between(first, second)
        valid[step] = _leads_home(flow[step], between(second, first))
        progress.update(1)
    found = OpticalFlow(flow, valid)
    if keep:
        _measured[images] = _Measured(found, totals, None if estimator is None else weakref.ref(estimator))
    return found


def _same(known: weakref.ref[ModelPatcher] | None, estimator: ModelPatcher | None) -> bool:
    """Whether an estimator is the one before; one that is gone is none that is asked for."""
    return estimator is None if known is None else known() is estimator is not None


def _leads_home(there: Tensor, back: Tensor) -> Tensor:
    height, width = there.shape[:2]
    end = grid(height, width) + there
    returned = sample(back.movedim(-1, 0), end).movedim(0, -1)
    error = (there + returned).square().sum(-1)
    allowed = _HOME_PIXELS_SQUARED + _HOME_SHARE * (there.square().sum(-1) + returned.square().sum(-1))
    return (error <= allowed) & inside(end, height, width)


def _dis():
    """DIS optical flow (Kroeger et al. 2016) between two frames [H, W, 3] -> [H, W, 2]."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(OPENCV_MISSING) from error
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    solver.setFinestScale(0)
    solver.setGradientDescentIterations(32)
    solver.setVariationalRefinementIterations(5)

    def gray(frame: Tensor):
        # ITU-R BT.601 luma, as OpenCV and most others use.
        return (frame @ frame.new_tensor([0.299, 0.587, 0.114]) * 255).round().clamp(0, 255).to(torch.uint8).numpy()

    def between(first: Tensor, second: Tensor) -> Tensor:
        try:
            return torch.from_numpy(solver.calc(gray(first), gray(second), None)).clone()
        except cv2.error as error:
            height, width = first.shape[:2]
            raise ValueError(
                f"OpenCV cannot measure motion in frames of {width}x{height} pixels; give frames of 16x16 at least."
            ) from error

    return between


def _raft(estimator: ModelPatcher):
    comfy.model_management.load_model_gpu(estimator)
    device = estimator.load_device

    def between(first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[:2]
        size = [max(_RAFT_LEAST, round(n / _RAFT_MULTIPLE) * _RAFT_MULTIPLE) for n in (height, width)]
        pair = torch.stack([first, second]).movedim(-1, 1).to(device)
        pair = F.interpolate(pair, size, mode="bilinear") * 2 - 1
        with torch.no_grad():
            flow = estimator.model(pair[:1], pair[1:])[-1].float()
        flow = F.interpolate(flow, (height, width), mode="bilinear")[0].movedim(0, -1).cpu()
        return flow * flow.new_tensor([width / size[1], height / size[0]])

    return between
