"""DiagonalFlowPreview: motion as a picture, the commanded beside the measured."""

from comfy_api.latest import io, ui
from torch import Tensor

from ..model_patches.flow_sources import flow_preview, thinned
from .client import tell
from .common import CATEGORY, FlowType, own_id
from .flow_conditioning import OpticalFlowModel
from .live import FRAMES_A_SECOND

MOST_SHOWN, MOST_PIXELS = 120, 1024  # pictures, and their longer side: what the node plays costs a second or two
WEBP_QUALITY, WEBP_METHOD = 80, 0  # the quickest


class DiagonalFlowPreview(io.ComfyNode):
    """Draws a DIAGONAL_OPTICAL_FLOW, over a video if there is one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalFlowPreview",
            display_name="Diagonal Flow Preview",
            category=f"{CATEGORY}/conditioning",
            description="Shows motion: arrows over the frames, the motion that was asked for in flow colours, and the "
            "motion measured in the frames. One picture for each pair of neighbouring frames.",
            search_aliases=["optical flow preview", "flow colours", "motion arrows"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                FlowType.Input("optical_flow", tooltip="From Diagonal Flow Conditioning."),
                io.Boolean.Input(
                    "measure",
                    default=True,
                    tooltip="Measure the images' own motion and show it beside the other; black where it cannot be "
                    "trusted, as at a cut.",
                ),
                io.Float.Input(
                    "speed",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="Speed that full colour stands for, in pixels per pixel frame. 0: close to the fastest "
                    "motion asked for.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The decoded video that followed the motion, or, with measure off, a single image for all "
                    "of it. Without it the motion is drawn on gray.",
                ),
                OpticalFlowModel.Input(
                    "estimator",
                    optional=True,
                    tooltip="RAFT, from Load Optical Flow Model. Without it OpenCV measures.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="Panels side by side, an image for each pair of neighbouring frames.",
                ),
                io.String.Output(display_name="info", tooltip="End-point error of the measured motion, in pixels."),
            ],
        )

    @classmethod
    def execute(cls, optical_flow, measure: bool, speed: float, images=None, estimator=None) -> io.NodeOutput:
        panels, info = flow_preview(
            optical_flow.timeline, images, estimator, measure=measure, speed=speed if speed > 0 else None
        )
        played, count = _played(panels)
        shown = info if count == len(panels) else f"{info}\n{count} of the {len(panels)} pictures are played here"
        tell(own_id(cls), shown)
        return io.NodeOutput(panels, info, ui={**played.as_dict(), "text": (shown,)})


def _played(panels: Tensor) -> tuple[ui.SavedImages, int]:
    """What the node itself plays, as an animation in ComfyUI's temporary folder, and how many pictures it has.

    Args:
        panels: [N, H, W, 3] in 0..1. Those that are left of more than MOST_SHOWN take the same time.
    """
    pictures, every = thinned(panels, most=MOST_SHOWN, most_pixels=MOST_PIXELS)
    saved = ui.ImageSaveHelper.save_animated_webp(
        pictures,
        "diagonal_flow_preview",
        io.FolderType.temp,
        None,
        fps=FRAMES_A_SECOND / every,
        lossless=False,
        quality=WEBP_QUALITY,
        method=WEBP_METHOD,
    )
    return ui.SavedImages([saved], is_animated=len(pictures) > 1), len(pictures)
