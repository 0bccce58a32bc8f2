"""DiagonalCausalAttention: any Wan MODEL becomes a causal one."""

from comfy_api.latest import io

from ..diagonal_sampler.settings import KV_CACHE_DTYPES, CausalSettings
from ..model_patches.causal import make_causal
from .common import CATEGORY, kv_cache_input, window_inputs


class DiagonalCausalAttention(io.ComfyNode):
    """Puts chunk-by-chunk attention on a Wan 2.1 text-to-video MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalCausalAttention",
            display_name="Diagonal Causal Attention",
            category=f"{CATEGORY}/model",
            description="Makes a Wan 2.1 text-to-video MODEL (Load Diffusion Model, GGUF, LoRAs) causal, for Diagonal "
            "Chunk Sampler and Diagonal Stream Video. The weights must come from a causal model such as Self Forcing; "
            "with any other sampler the MODEL behaves as before.",
            search_aliases=["causal wan", "self forcing", "kv cache", "autoregressive video"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 text-to-video MODEL with the weights of a causal model."),
                io.Int.Input(
                    "frames_per_chunk",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Latent frames (4 pixel frames each) denoised together. Use what the model was trained "
                    "with: 3 for nearly all, 1 for frame-by-frame Causal Forcing.",
                ),
                *window_inputs(),
                kv_cache_input(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="A causal MODEL. The input MODEL is not changed.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        frames_per_chunk: int,
        window: int,
        sink: int,
        positions: str,
        kv_cache_dtype: str = KV_CACHE_DTYPES[0],
    ) -> io.NodeOutput:
        settings = CausalSettings(
            frames_per_chunk=frames_per_chunk,
            window=window,
            sink=sink,
            positions=positions,
            kv_cache_dtype=kv_cache_dtype,
        )
        return io.NodeOutput(make_causal(model, settings))
