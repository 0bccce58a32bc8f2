"""From what a person connects to a field of motion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diagonal_sampler.flow import NothingValid, OpticalFlow, camera_flow, tracks_flow
from ..diagonal_sampler.flow_pictures import painted_flow, preview
from ..diagonal_sampler.flow_timeline import FlowTimeline
from .flow_estimation import estimate_flow

FIELD_BYTES = 9
"""Of a pixel in a step of a field: two float32 and a bool."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlowInputs:
    """Everything that a source may need.

    Attributes:
        width, height: pixels that pan and tracks are measured in; length: pixel frames of a camera's motion.
        pan, zoom, rotation: see camera_flow. track_radius: see tracks_flow. paint_speed: see painted_flow.
        video, painted: IMAGE. tracks: ComfyUI's TRACKS. mask: MASK. estimator: ComfyUI's OPTICAL_FLOW.
    """

    width: int
    height: int
    length: int
    pan: tuple[float, float] = (0.0, 0.0)
    zoom: float = 0.0
    rotation: float = 0.0
    track_radius: float | None = None
    paint_speed: float = 8.0
    video: Tensor | None = None
    estimator: ModelPatcher | None = None
    tracks: Mapping[str, Tensor] | None = None
    painted: Tensor | None = None
    mask: Tensor | None = None


def _camera(inputs: FlowInputs) -> OpticalFlow:
    return camera_flow(
        inputs.length - 1, inputs.height, inputs.width, pan=inputs.pan, zoom=inputs.zoom, rotation=inputs.rotation
    )


def _video(inputs: FlowInputs) -> OpticalFlow:
    return estimate_flow(_connected(inputs.video, "video"), inputs.estimator, keep=True)


def _tracks(inputs: FlowInputs) -> OpticalFlow:
    tracks = _connected(inputs.tracks, "tracks")
    if "track_path" not in tracks:
        raise ValueError(f"tracks has {', '.join(tracks) or 'nothing'} and lacks track_path; connect ComfyUI's TRACKS.")
    path, visible = tracks["track_path"], tracks.get("track_visibility")
    _require_memory(len(path) - 1, inputs.width, inputs.height)
    progress = comfy.utils.ProgressBar(len(path) - 1)

    def on_step() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)

    return tracks_flow(path, visible, inputs.height, inputs.width, radius=inputs.track_radius, on_step=on_step)


def _require_memory(steps: int, width: int, height: int) -> None:
    """Refuse at once a field that could never be held: width and height go up to 16384 for no more than a track."""
    has = comfy.model_management.get_total_memory(torch.device("cpu"))
    needs = steps * width * height * FIELD_BYTES
    if needs > has:
        smaller = (max(1, int(size * (has / needs) ** 0.5)) for size in (width, height))
        raise ValueError(
            f"The motion of tracks over {steps + 1:,} frames at {width}x{height} needs {needs / 1e9:,.1f} GB and this "
            f"machine has {has / 1e9:,.1f} GB in all. What would fit: tracks for {'x'.join(map(str, smaller))} "
            "pixels, which are fitted to the video's size."
        )


def _painted(inputs: FlowInputs) -> OpticalFlow:
    return painted_flow(_connected(inputs.painted, "painted"), inputs.paint_speed)


SOURCES: dict[str, Callable[[FlowInputs], OpticalFlow]] = {
    "camera": _camera,
    "video": _video,
    "tracks": _tracks,
    "painted": _painted,
}


def _connected(value, name: str):
    if value is None:
        raise ValueError(f"source is {name}, but nothing is connected to {name}; connect it or choose another source.")
    return value


def make_flow(source: str, inputs: FlowInputs) -> OpticalFlow:
    """The motion of a source, inside the mask if there is one.

    Args:
        source: a key of SOURCES.

    Raises:
        ValueError: an unknown source, its input missing, or what the source or the mask refuses.
        ImportError: source video without an estimator and without OpenCV.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; choose one of {', '.join(SOURCES)}.")
    field = SOURCES[source](inputs)
    return field if inputs.mask is None else field.masked(inputs.mask)


def flow_preview(
    field: OpticalFlow | FlowTimeline,
    images: Tensor | None,
    estimator: ModelPatcher | None,
    *,
    measure: bool,
    speed: float | None,
) -> tuple[Tensor, str]:
    """The motion over a video, and the video's own beside it.

    Args:
        images: IMAGE [T, H, W, 3] of the video that followed it, or None for the motion alone. A single image is held
            for all of the motion's steps.
        measure: estimate the images' motion too.
        speed: pixels per frame of the full colour; None finds one.

    Returns:
        IMAGE of panels (see flow_pictures.preview), and a sentence with the end-point error. Where nothing of the
        images' motion could be trusted its panel is black, for the images may have taken long to make.

    Raises:
        ValueError, ImportError: see estimate_flow; a single image cannot be measured.
    """
    field = FlowTimeline.of(field)
    if images is None:
        field = field.fit(field.steps, field.height, field.width)
        text = f"{field.steps} steps at {field.width}x{field.height}"
        starts = [str(start) for start, _ in field.motions]
        if starts != ["0"]:
            text += f"; motions begin at pixel frames: {', '.join(starts)}"
        return preview(None, field, speed=speed), text
    if not len(images) or (measure and len(images) < 2):
        raise ValueError(
            f"images has {len(images)} frame; motion needs at least 2 to be measured. Connect the whole video, or turn "
            "measure off."
        )
    if len(images) == 1:
        images = images.expand(field.steps + 1, -1, -1, -1)
    fitted = field.fit(len(images) - 1, images.shape[1], images.shape[2])
    if not measure:
        return preview(images, fitted, speed=speed), f"{fitted.steps} steps at {fitted.width}x{fitted.height}"
    try:
        measured = estimate_flow(images, estimator)
    except NothingValid as error:
        return preview(images, fitted, speed=speed, nothing_measured=True), str(error)
    flow, valid = fitted.on(torch.device("cpu"), 0, fitted.steps)
    both = valid & measured.valid[: len(valid)]
    if bool(both.any()):
        error = (flow - measured.flow[: len(flow)]).norm(dim=-1)[both]
        ranked, share = error.sort().values, int(both.sum()) / measured.valid.numel()
        text = (
            f"end-point error over {share:.0%} of the pixels: mean {float(error.mean()):.2f}, "
            f"median {float(ranked[len(ranked) // 2]):.2f} px per frame"
        )
    else:
        text = "nowhere are both motions known"
    return preview(images, fitted, measured, speed=speed), text


def thinned(panels: Tensor, *, most: int, most_pixels: int) -> tuple[list[Tensor], int]:
    """Fewer and smaller pictures of a video, for a quick look at it.

    Args:
        panels: [N, H, W, 3] in 0..1.
        most: pictures; of more every second, third, ... one is taken, from the first on.
        most_pixels: of the longer side; larger ones are made smaller, in their own shape.

    Returns:
        Pictures [h, w, 3], and how many of `panels` each stands for.
    """
    every = -(-len(panels) // most)
    scale = min(1.0, most_pixels / max(panels.shape[1:3]))
    size = [max(1, round(pixels * scale)) for pixels in panels.shape[1:3]]
    kept = (panel.movedim(-1, 0)[None] for panel in panels[::every])
    return [F.interpolate(panel, size, mode="area")[0].movedim(0, -1) for panel in kept], every
