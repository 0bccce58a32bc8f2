"""DiagonalChunkSampler: denoises a video chunk by chunk."""

from comfy_api.latest import io

from ..model_patches.previews import preview_callback
from ..model_patches.sampling import sample_latent
from .common import CATEGORY, ContextType, FlowType, ScheduleType, cfg_input, own_id, sampled_inputs, seed_input
from .finishing import early_ends, ended_early, finishable
from .live import LiveReport
from .steering import steerable


class DiagonalChunkSampler(io.ComfyNode):
    """Samples a causal MODEL: each chunk is conditioned on the ones before it through the KV cache."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalChunkSampler",
            display_name="Diagonal Chunk Sampler",
            category=f"{CATEGORY}/sampling",
            description="Denoises a video latent chunk by chunk with a causal Wan MODEL, each chunk conditioned on the "
            "ones before it. Memory depends on the window, not on the length.",
            search_aliases=["causal sampler", "autoregressive video sampler", "streaming video"],
            inputs=[
                *sampled_inputs(),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty video latent sets size and length; a video's latent with denoise below 1 is "
                    "changed (video to video), inside its noise mask if it has one.",
                ),
                ScheduleType.Input("schedule", tooltip="From Diagonal Schedule."),
                seed_input(),
                cfg_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the noise levels is used, in (0, 1]. 1 makes a new video; lower keeps more of "
                    "the given one.",
                ),
                ContextType.Input(
                    "context",
                    optional=True,
                    tooltip="Frames that the video begins with, from Diagonal Context Frames: a start image, or the "
                    "end of a video to go on from. They count in the latent's length.",
                ),
                FlowType.Input(
                    "optical_flow",
                    optional=True,
                    tooltip="Motion that the video is to follow, from Diagonal Flow Conditioning, in pixels per pixel "
                    "frame.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The denoised video latent.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **widgets) -> int:
        """A whole video is made anew where the one before was ended early."""
        return early_ends(cls.hidden.unique_id, widgets)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        schedule,
        seed: int,
        cfg: float,
        denoise: float,
        context=None,
        optical_flow=None,
    ) -> io.NodeOutput:
        node_id = own_id(cls)
        with (
            LiveReport(node_id, model, cfg) as live,
            steerable(positive) as prompts,
            finishable(node_id) as finish,
        ):
            result = sample_latent(
                model,
                positive,
                negative,
                latent_image,
                schedule,
                seed=seed,
                cfg=cfg,
                denoise=denoise,
                callback=preview_callback(model),
                on_progress=live.progress,
                on_chunk=live.chunk,
                context=context,
                optical_flow=optical_flow,
                prompts=prompts,
                finish=finish.is_set,
                on_early_end=lambda: ended_early(node_id),
            )
        return io.NodeOutput(result)
