"""Measures the motion in a video: with OpenCV's DIS, or with the RAFT of ComfyUI's OpticalFlowLoader."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..diagonal_sampler.flow import NothingValid, OpticalFlow, grid, inside, sample

OPENCV_MISSING = (
    "Measuring motion needs OpenCV, which is not installed: run `pip install opencv-python-headless` in ComfyUI's "
    "Python, or connect Load Optical Flow Model (RAFT) to `estimator`."
)
# A vector is trusted where the motion back, read at its end, leads home again to within this: pixels, and a share of
# both lengths. Sundaram, Brox and Keutzer 2010, "Dense point trajectories by GPU-accelerated large displacement
# optical flow", equation 5 (there on squares: 0.01 of them, plus 0.5).
_HOME_PIXELS_SQUARED = 0.5
_HOME_SHARE = 0.01
_LEAST_TRUSTED = 1 / 4
"""A step of which less is trusted is a cut: of pans of up to 100 pixels 77% and more are, of most cuts 17% and less."""
_RAFT_MULTIPLE = 8
_RAFT_LEAST = 128
"""torchvision's RAFT needs sides that are multiples of 8 and at least 128 pixels."""
_RAFT_MOST_CELLS = 23_000
"""Its correlations are a float32 for each two cells of 8x8 pixels: 2.1 GB of so many cells, 1616x904 pixels."""
_RAFT_VOLUMES = 3
"""Such volumes that are alive at once: the product, the scaled one, and the coarser ones with what they are made of."""


class _Measured(NamedTuple):
    optical_flow: OpticalFlow
    totals: tuple[float, ...]  # of each frame, in case a node has written into them (there are no versions to look at)
    estimator: weakref.ref[ModelPatcher] | None


_measured: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was measured of each video that ComfyUI still holds: a node whose strength is turned runs anew."""


def estimate_flow(images: Tensor, estimator: ModelPatcher | None = None, *, keep: bool = False) -> OpticalFlow:
    """The motion between the frames of a video; valid where forward and backward motion agree.

    A step that agrees almost nowhere (_LEAST_TRUSTED) is a cut, and says nothing at all: what agrees there is chance.

    Args:
        images: IMAGE [T, H, W, 3] in 0..1, T at least 2.
        estimator: ComfyUI's OPTICAL_FLOW (RAFT); None uses OpenCV's DIS.
        keep: remember the motion as long as the video is there: measured again only with another estimator.

    Returns:
        T - 1 steps of the images' size.

    Raises:
        ValueError: one frame only, or NaN; NothingValid where no step could be trusted.
        ImportError: no OpenCV and no estimator; says how to install.
    """
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError(f"The video has shape {tuple(images.shape)}; it must be an IMAGE [frames, height, width, 3].")
    if len(images) < 2:
        raise ValueError(f"The video has {len(images)} frame; motion needs at least 2.")
    if not torch.isfinite(torch.stack(images.aminmax())).all():
        raise ValueError("The video holds NaN or infinite values; check the node that made it.")
    # On the CPU: with --gpu-only images lie on the GPU, and Apple's has no float64.
    totals = tuple(float(frame.cpu().sum(dtype=torch.float64)) for frame in images) if keep else ()
    known = _measured.get(images) if keep else None
    if known is not None and known.totals == totals and _same(known.estimator, estimator):
        return known.optical_flow
    frames = images[..., :3]
    steps, height, width = len(frames) - 1, *frames.shape[1:3]
    between = _dis() if estimator is None else _raft(estimator, height, width)
    flow, valid = torch.empty(steps, height, width, 2), torch.empty(steps, height, width, dtype=torch.bool)
    progress = comfy.utils.ProgressBar(steps)
    for step in range(steps):
        comfy.model_management.throw_exception_if_processing_interrupted()
        first, second = frames[step].float().cpu(), frames[step + 1].float().cpu()
        flow[step] = between(first, second)
        trusted = _leads_home(flow[step], between(second, first))
        valid[step] = trusted & (trusted.float().mean() >= _LEAST_TRUSTED)
        progress.update(1)
    if not valid.any():
        raise NothingValid(
            f"No motion of the video could be trusted: between none of its {len(frames)} frames do the motions there "
            f"and back agree in {_LEAST_TRUSTED:.0%} of the picture. Give frames of one shot that follow each other, "
            "without frames left out between them, or another estimator."
        )
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


def _raft_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that RAFT is given: the nearest that it takes, or smaller ones whose memory is bounded."""
    whole = [max(_RAFT_LEAST, round(side / _RAFT_MULTIPLE) * _RAFT_MULTIPLE) for side in (height, width)]
    cells = math.prod(whole) / _RAFT_MULTIPLE**2
    if cells <= _RAFT_MOST_CELLS:
        return whole[0], whole[1]
    shrink = math.sqrt(_RAFT_MOST_CELLS / cells) / _RAFT_MULTIPLE
    small = [max(_RAFT_LEAST, math.floor(side * shrink) * _RAFT_MULTIPLE) for side in whole]
    return small[0], small[1]


def _raft(estimator: ModelPatcher, height: int, width: int):
    """RAFT (Teed and Deng 2020) between two frames [height, width, 3] -> [height, width, 2]."""
    size = _raft_size(height, width)
    volume = 4 * (math.prod(size) // _RAFT_MULTIPLE**2) ** 2  # bytes
    comfy.model_management.load_models_gpu([estimator], memory_required=_RAFT_VOLUMES * volume)
    device = estimator.load_device
    shrinks = size[0] < height - _RAFT_MULTIPLE or size[1] < width - _RAFT_MULTIPLE

    def between(first: Tensor, second: Tensor) -> Tensor:
        pair = torch.stack([first, second]).movedim(-1, 1)
        pair = F.interpolate(pair, size, mode="bilinear", antialias=shrinks).to(device) * 2 - 1
        with torch.no_grad():
            flow = estimator.model(pair[:1], pair[1:])[-1].float()
        flow = F.interpolate(flow, (height, width), mode="bilinear")[0].movedim(0, -1).cpu()
        return flow * flow.new_tensor([width / size[1], height / size[0]])

    return between
