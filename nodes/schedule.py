"""DiagonalSchedule: how many steps each chunk takes, and what the next chunk sees of it."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from comfy_api.latest import io, ui

from ..diagonal_sampler.schedule import (
    CONTEXT_MODES,
    DEFAULT_CONTEXT_SIGMA,
    DEFAULT_PRESET,
    PRESETS,
    DiagonalSchedule,
    parse_sigmas,
    parse_steps,
)
from .common import CATEGORY, ScheduleType

FROM_PRESET = "from preset"


class DiagonalScheduleNode(io.ComfyNode):
    """Builds a DIAGONAL_SCHEDULE from a preset and the changes to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalSchedule",
            display_name="Diagonal Schedule",
            category=f"{CATEGORY}/sampling",
            description="Denoising steps per chunk: more on the first chunks, fewer on later ones. Choose the preset "
            "of your checkpoint.",
            search_aliases=["steps per chunk", "self forcing schedule", "causal sigmas"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULT_PRESET,
                    tooltip="The recipe that the checkpoint was distilled with: noise levels, steps, context mode.",
                ),
                io.String.Input(
                    "steps",
                    default="",
                    tooltip="Denoising steps of each chunk, with commas; the last repeats. 4,3,2 means 4, 3, 2, 2, ... "
                    "Empty: the preset's.",
                ),
                io.Combo.Input(
                    "context_mode",
                    options=[FROM_PRESET, *CONTEXT_MODES],
                    default=FROM_PRESET,
                    tooltip="What later chunks see of a finished one. noisy: its last denoising step (diagonal "
                    "forcing, no extra forward). clean: one more forward without noise. renoise: one more forward at "
                    "context_sigma. Use what the checkpoint was trained with.",
                ),
                io.Float.Input(
                    "context_sigma",
                    default=round(DEFAULT_CONTEXT_SIGMA, 3),
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.000001,
                    tooltip="Noise level in [0, 1] of the context in renoise mode; ignored otherwise.",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Timestep shift of the noise levels (no unit). 0: the preset's, which is 5 for Wan.",
                ),
                io.Int.Input(
                    "frames_per_chunk",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Latent frames (4 pixel frames each) denoised together. 0: the preset's, else the model's.",
                ),
                io.String.Input(
                    "sigmas",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Your own noise levels in (0, 1], descending: a list for each chunk, one chunk a line, the "
                    "last repeats. If filled in, it replaces steps and shift.",
                ),
            ],
            outputs=[
                ScheduleType.Output(
                    display_name="schedule", tooltip="For Diagonal Chunk Sampler, Diagonal Stream Video."
                ),
                io.String.Output(
                    display_name="info", tooltip="Forwards of a 5 second clip, and what uniform steps need."
                ),
            ],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """widgets: those of `build_schedule`."""
        schedule = build_schedule(**widgets)
        info = "\n".join([schedule.describe(), *schedule.warnings()])
        return io.NodeOutput(schedule, info, ui=ui.PreviewText(info))


def build_schedule(
    preset: str,
    steps: str,
    context_mode: str,
    context_sigma: float,
    shift: float,
    frames_per_chunk: int,
    sigmas: str = "",
) -> DiagonalSchedule:
    """The schedule that the widgets ask for; they are described in the node's schema.

    Raises:
        ValueError: a value that cannot be read or is out of range, with the remedy.
    """
    schedule = DiagonalSchedule.preset(
        preset, steps=parse_steps(steps) if steps.strip() else None, shift=shift if shift > 0 else None
    )
    if sigmas.strip():
        schedule = replace(schedule, sigmas=parse_sigmas(sigmas))
    if context_mode != FROM_PRESET:
        schedule = replace(schedule, context_mode=context_mode)
    return replace(
        schedule,
        context_sigma=context_sigma,
        frames_per_chunk=frames_per_chunk if frames_per_chunk > 0 else schedule.frames_per_chunk,
    )


WIDGETS = inspect.signature(build_schedule).parameters
MIN_DRAWN_CHUNKS, MAX_DRAWN_CHUNKS = 7, 24


def drawing(widgets: Mapping[str, str]) -> dict[str, Any]:
    """What the canvas draws for the node's widgets, so that no rule is written twice.

    Args:
        widgets: values of the node's widgets as text, by name.

    Returns:
        For each chunk shown its noise levels (`sigmas`), the level of the cache pass (None without one), what the next
        chunk sees of it (`context_sigma`); whether `steps` decides (`editable`), how many chunks the schedule lists
        (`listed`), the cost of a clip, and what is to be warned of; or `error`.
    """
    missing = [name for name, each in WIDGETS.items() if each.default is each.empty and name not in widgets]
    if missing:
        return {"error": f"{missing[0]} is missing; reload the page."}
    try:
        schedule = build_schedule(
            **{name: each.annotation(widgets[name]) for name, each in WIDGETS.items() if name in widgets}
        )
    except ValueError as error:
        return {"error": str(error)}
    chunks = min(max(MIN_DRAWN_CHUNKS, len(schedule.sigmas)), MAX_DRAWN_CHUNKS)
    return {
        "sigmas": [schedule.chunk_sigmas(chunk) for chunk in range(chunks)],
        "cache_pass": schedule.cache_pass_sigma,
        "context_sigma": [schedule.context_sigma_of(chunk) for chunk in range(chunks)],
        "editable": not widgets.get("sigmas", "").strip() and len(schedule.sigmas) <= chunks,
        "listed": len(schedule.sigmas),
        "context_mode": schedule.context_mode,
        "cost": asdict(schedule.cost()),
        "uninformative": schedule.uninformative_sigma,
    }
