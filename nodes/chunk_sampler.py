"""DiagonalChunkSampler: denoises a video chunk by chunk."""

import time

import latent_preview
from comfy_api.latest import io
from server import PromptServer

from ..model_patches.sampling import Progress, sample_latent
from .common import CATEGORY, ContextType, FlowType, ScheduleType

PROGRESS_EVENT = "diagonal.progress"


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
                io.Model.Input(
                    "model", tooltip="A causal MODEL, from Diagonal Model Loader or Diagonal Causal Attention."
                ),
                io.Conditioning.Input("positive", tooltip="What the video shows."),
                io.Conditioning.Input("negative", tooltip="What it must not show. Ignored at cfg 1."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty video latent sets size and length; a video's latent with denoise below 1 is "
                    "changed (video to video), inside its noise mask if it has one.",
                ),
                ScheduleType.Input("schedule", tooltip="From Diagonal Schedule."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise (no unit). The same seed gives the same noise on any device.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale (no unit). Distilled models use 1, which is also twice as fast: the "
                    "negative is then ignored.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the noise levels, in (0, 1]. 1 makes a new video; lower keeps more of it.",
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
        callback = None

        def preview(step: int, denoised, x, total: int) -> None:
            # The previewer is made at the first forward: only then is the number of forwards settled.
            nonlocal callback
            if callback is None:
                callback = latent_preview.prepare_callback(model, total)
            callback(step, denoised, x, total)

        result = sample_latent(
            model,
            positive,
            negative,
            latent_image,
            schedule,
            seed=seed,
            cfg=cfg,
            denoise=denoise,
            callback=preview,
            on_progress=_Reporter(cls.hidden.unique_id),
            context=context,
            optical_flow=optical_flow,
        )
        return io.NodeOutput(result)


class _Reporter:
    """Tells the client that queued the prompt which chunk is being made."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.start = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        server = PromptServer.instance
        elapsed = time.perf_counter() - self.start
        server.send_sync(
            PROGRESS_EVENT,
            {
                "node": self.node_id,
                "prompt_id": server.last_prompt_id,
                "forwards": progress.forwards,
                "total": progress.total,
                "chunk": progress.chunk + 1,
                "chunks": progress.chunks,
                # A forward that only fills the cache is step 0 of 0.
                "step": max(progress.step + 1, 0),
                "steps": progress.steps,
                "elapsed": elapsed,
            },
            server.client_id,
        )
