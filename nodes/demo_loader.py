"""DiagonalDemoLoader: the bundled demo model."""

from pathlib import Path

from comfy_api.latest import io

from ..diagonal_sampler.captions import COLOURS, DIRECTIONS, SHAPES
from ..model_patches.demo import demo_preview, load_demo_clip, load_demo_model, load_demo_vae
from ..model_patches.previews import PREVIEW_ATTACHMENT
from .common import CATEGORY

DEMO_DIRECTORY = Path(__file__).resolve().parent.parent / "demo"
WEIGHTS = {
    "student": "demo_student.safetensors",
    "teacher": "demo_teacher.safetensors",
    "follower": "demo_follower.safetensors",
}
DEMO_VAE = "demo_autoencoder.safetensors"
SHARED_FILES = ("demo_text_encoder.safetensors", DEMO_VAE)


class DiagonalDemoLoader(io.ComfyNode):
    """Loads the demo that ships with the pack: moving coloured shapes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalDemoLoader",
            display_name="Diagonal Demo Loader",
            category=f"{CATEGORY}/loaders",
            description="The small model that ships with this pack, to try everything without a download. It draws one "
            f"or two shapes ({', '.join(SHAPES)}) in {', '.join(COLOURS)} that move {', '.join(DIRECTIONS)}, slowly or "
            'fast: "a red circle moves right and a blue square moves up slowly". 64x64 pixels, 16 frames a second.',
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default="student",
                    tooltip="student: distilled for the preset demo 4-3-2 at cfg 1. teacher: its "
                    "undistilled teacher, for the undistilled preset (12 steps a chunk) at cfg 5. follower: the "
                    "student with an adapter for Diagonal Flow Conditioning, for the student's preset.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="A causal MODEL for the Diagonal Chunk Sampler."),
                io.Clip.Output(display_name="CLIP", tooltip="For CLIP Text Encode; it knows the demo's words only."),
                io.Vae.Output(display_name="VAE", tooltip="For VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def execute(cls, weights: str) -> io.NodeOutput:
        files = (WEIGHTS[weights], *SHARED_FILES)
        missing = [name for name in files if not (DEMO_DIRECTORY / name).is_file()]
        if missing:
            raise ValueError(
                f"The demo's files are missing from the pack's demo folder: {', '.join(missing)}. Clone the repository "
                "again, or train them: see demo/README.md."
            )
        dit, text_encoder, autoencoder = (DEMO_DIRECTORY / name for name in files)
        model = load_demo_model(dit)
        model.set_attachments(PREVIEW_ATTACHMENT, demo_preview(autoencoder))
        return io.NodeOutput(model, load_demo_clip(text_encoder), load_demo_vae(autoencoder))
