"""DiagonalContextFrames: a start image, or the end of a video to go on from."""

from comfy_api.latest import io

from ..model_patches.context_frames import CONTEXT_LATENT_FRAMES, context_of
from .common import CATEGORY, ContextType


class DiagonalContextFrames(io.ComfyNode):
    """Encodes the frames that a video begins with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalContextFrames",
            display_name="Diagonal Context Frames",
            category=f"{CATEGORY}/sampling",
            description="Frames that a new video begins with, for Diagonal Chunk Sampler and Diagonal Stream Video: "
            "one image makes image to video with a text-to-video model, the frames of a video or a latent are "
            "continued from the end. They enter the KV cache as if the model had made them.",
            search_aliases=["image to video", "start image", "extend video", "continue video"],
            inputs=[
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="One image: the first frame. Several: a video whose last frames are taken. Height and "
                    "width in pixels must be the new video's.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that also decodes the video. Only images need it."),
                io.Int.Input(
                    "latent_frames",
                    default=CONTEXT_LATENT_FRAMES,
                    min=1,
                    max=1024,
                    tooltip="Latent frames to take from a video's end (the first is 1 pixel frame, each other 4). More "
                    "carry motion and appearance better; 3 are one chunk, the usual unit. No effect on a single image.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="In place of images: a video's latent, such as Diagonal Chunk Sampler's. Its last frames "
                    "are taken as they are, without decoding and encoding.",
                ),
            ],
            outputs=[
                ContextType.Output(
                    display_name="context", tooltip="For Diagonal Chunk Sampler and Diagonal Stream Video."
                ),
                io.Int.Output(
                    display_name="frames",
                    tooltip="Pixel frames at the start of the decoded video that repeat the given ones. To append the "
                    "new part to a video, drop that many.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images=None, vae=None, latent_frames: int = CONTEXT_LATENT_FRAMES, latent=None) -> io.NodeOutput:
        context = context_of(images, vae, latent_frames, latent)
        return io.NodeOutput(context, context.pixel_frames)
