"""DiagonalFlowConditioning: motion for the chunk sampler, from a video, tracks, a camera or a painting."""

from comfy_api.latest import io

from ..model_patches.flow_control import LAST_CHUNK, MODES, FlowConditioning
from ..model_patches.flow_sources import SOURCES, FlowInputs, make_flow
from .common import CATEGORY, FlowType

OpticalFlowModel = io.Custom("OPTICAL_FLOW")
"""ComfyUI's type of OpticalFlowLoader: RAFT."""

_DEFAULTS = {field: FlowConditioning.__dataclass_fields__[field].default for field in ("start_sigma", "blend")}
_MAX_CHUNK = 1_000_000
_MAX_START = 12 * _MAX_CHUNK  # of the last chunk's first pixel frame, at three latent frames each
_MAX_SIDE = 16384
_MAX_LENGTH = 65536


class DiagonalFlowConditioning(io.ComfyNode):
    """Widgets and inputs -> a field of motion and how to follow it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalFlowConditioning",
            display_name="Diagonal Flow Conditioning",
            category=f"{CATEGORY}/conditioning",
            description="Motion for the video to follow, for optical_flow of Diagonal Chunk Sampler and Diagonal "
            "Stream Video: from another video, tracks or a moving camera, or painted in flow colours.",
            search_aliases=["optical flow", "motion transfer", "camera motion", "motion tracks", "drag"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default="camera",
                    tooltip="Where the motion comes from: camera (the pan, zoom and rotation below), video, tracks or "
                    "painted (the inputs of these names).",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="How it is followed. adapter: by weights in the checkpoint. reference: each chunk starts "
                    "from the last frame carried along the motion; works with any model, needs the vae. noise: the "
                    "noise moves; only for models trained on warped noise. adapter+blend: the adapter, and the carried "
                    "frames mixed in; the most exact, needs the vae. auto: adapter if the model has one, else "
                    "reference.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much the motion counts, in [0, 1] (no unit). 0 is as if nothing was connected. In "
                    "mode reference a lower one blends less and starts chunks nearer to pure noise.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=_MAX_SIDE,
                    step=16,
                    tooltip="Width in pixels that a camera's pan and the tracks are measured in: the video's. No "
                    "effect on the other sources, whose motion is scaled with their picture.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=_MAX_SIDE,
                    step=16,
                    tooltip="Height in pixels that a camera's pan and the tracks are measured in: the video's.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=2,
                    max=_MAX_LENGTH,
                    tooltip="Pixel frames over which the camera moves; the rest of the video is free. 2 gives the "
                    "movement from one frame to the next, repeated through the whole video. No effect on the other "
                    "sources: they last as long as they are.",
                ),
                io.Float.Input(
                    "pan_x",
                    default=0.0,
                    min=-256.0,
                    max=256.0,
                    step=0.1,
                    tooltip="Pixels per pixel frame that the camera moves to the right; the picture moves left.",
                ),
                io.Float.Input(
                    "pan_y",
                    default=0.0,
                    min=-256.0,
                    max=256.0,
                    step=0.1,
                    tooltip="Pixels per pixel frame that the camera moves down; the picture moves up.",
                ),
                io.Float.Input(
                    "zoom",
                    default=0.0,
                    min=-50.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Percent per pixel frame that the picture grows; below 0 it shrinks.",
                ),
                io.Float.Input(
                    "rotation",
                    default=0.0,
                    min=-90.0,
                    max=90.0,
                    step=0.1,
                    tooltip="Degrees per pixel frame that the camera turns clockwise; the picture turns the other way.",
                ),
                io.Float.Input(
                    "track_radius",
                    default=0.0,
                    min=0.0,
                    max=float(_MAX_SIDE),
                    step=1.0,
                    tooltip="Radius in pixels around each track that moves with it. Below 8 (one latent pixel) the "
                    "adapter may not see it. 0: an eighth of the shorter side.",
                ),
                io.Float.Input(
                    "paint_speed",
                    default=8.0,
                    min=0.01,
                    max=1024.0,
                    step=0.1,
                    tooltip="Speed that full colour stands for in a painted flow, in pixels per pixel frame.",
                ),
                io.Float.Input(
                    "start_sigma",
                    default=_DEFAULTS["start_sigma"],
                    min=0.01,
                    max=1.0,
                    step=0.001,
                    round=0.000001,
                    tooltip="Mode reference: noise level in (0, 1] that a chunk starts at with strength 1, with its "
                    "usual number of steps. Lower follows the motion and the last frame more closely, and leaves less "
                    "to the prompt.",
                    advanced=True,
                ),
                io.Float.Input(
                    "blend",
                    default=_DEFAULTS["blend"],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Modes reference and adapter+blend: share in [0, 1] of the carried frames in every "
                    "prediction of a chunk but the last, where the motion is valid; times strength.",
                    advanced=True,
                ),
                io.Int.Input(
                    "first_chunk",
                    default=1,
                    min=1,
                    max=_MAX_CHUNK,
                    tooltip="First chunk that follows the motion, counted from 1. Mode reference begins with the "
                    "second at the earliest, unless the sampler is given context.",
                    advanced=True,
                ),
                io.Int.Input(
                    "last_chunk",
                    default=LAST_CHUNK,
                    min=LAST_CHUNK,
                    max=_MAX_CHUNK,
                    tooltip="Last chunk that follows the motion, counted from 1. 0: the last of the video.",
                    advanced=True,
                ),
                io.Float.Input(
                    "degrade",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Mode noise: share in [0, 1] of noise that does not move; models trained with degradation "
                    "expect some.",
                    advanced=True,
                ),
                io.Image.Input(
                    "video",
                    optional=True,
                    tooltip="Source video: the frames whose motion is measured. The motion of two frames is held for "
                    "the whole video.",
                ),
                OpticalFlowModel.Input(
                    "estimator",
                    optional=True,
                    tooltip="Source video: RAFT, from Load Optical Flow Model. Without it OpenCV measures (DIS; only "
                    "where ComfyUI's Python has no OpenCV yet: pip install opencv-python-headless).",
                ),
                io.Tracks.Input(
                    "tracks",
                    optional=True,
                    tooltip="Source tracks: points over time in pixels, from ComfyUI's track nodes (Generate Video "
                    "Tracks). The motion of two frames is held for the whole video.",
                ),
                io.Image.Input(
                    "painted",
                    optional=True,
                    tooltip="Source painted: flow colours (right is red, down yellow, left blue-green, up violet; "
                    "white rests, black is free). One image for the whole video, or one a pixel frame.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the motion counts (white). One for the whole video, or one a pixel frame: a motion "
                    "given once, such as one painted image, then lasts as long as the mask.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, for modes reference and adapter+blend."),
                FlowType.Input(
                    "previous",
                    optional=True,
                    tooltip="Motion that holds until start, from another Diagonal Flow Conditioning, which may have "
                    "one before it, too. Mode, strength, vae and all else that says how motion is followed are those "
                    "of the last node, the one at the sampler.",
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=_MAX_START,
                    optional=True,
                    advanced=True,
                    tooltip="Pixel frame of the video that this motion begins at, counted from 0; behind the start of "
                    "previous. It lasts until the next motion begins. Without previous nothing is commanded before.",
                ),
            ],
            outputs=[
                FlowType.Output(
                    display_name="optical_flow", tooltip="For Diagonal Chunk Sampler or Diagonal Stream Video."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        source: str,
        mode: str,
        strength: float,
        width: int,
        height: int,
        length: int,
        pan_x: float,
        pan_y: float,
        zoom: float,
        rotation: float,
        track_radius: float,
        paint_speed: float,
        start_sigma: float,
        blend: float,
        first_chunk: int,
        last_chunk: int,
        degrade: float,
        video=None,
        estimator=None,
        tracks=None,
        painted=None,
        mask=None,
        vae=None,
        previous=None,
        start: int = 0,
    ) -> io.NodeOutput:
        inputs = FlowInputs(
            width=width,
            height=height,
            length=length,
            pan=(pan_x, pan_y),
            zoom=zoom,
            rotation=rotation,
            track_radius=track_radius or None,
            paint_speed=paint_speed,
            video=video,
            estimator=estimator,
            tracks=tracks,
            painted=painted,
            mask=mask,
        )
        conditioning = FlowConditioning(
            optical_flow=make_flow(source, inputs),
            mode=mode,
            strength=strength,
            start_sigma=start_sigma,
            blend=blend,
            first_chunk=first_chunk,
            last_chunk=last_chunk,
            degrade=degrade,
            vae=vae,
            start=start,
            earlier=[] if previous is None else previous.motions,
        )
        return io.NodeOutput(conditioning)
