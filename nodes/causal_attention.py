"""DiagonalCausalAttention: any Wan MODEL becomes a causal one."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..diagonal_sampler.checkpoints import causality_warning, inspect_checkpoint, recipe_warning
from ..diagonal_sampler.settings import KV_CACHE_DTYPES, CausalSettings
from ..model_patches.causal import make_causal
from ..model_patches.loading import PROVENANCE_ATTACHMENT
from ..model_patches.sampling import DOUBT_ATTACHMENT
from .common import CATEGORY, kv_cache_input, window_inputs
from .model_loader import CHECKPOINT_FOLDERS


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
        causal = make_causal(model, settings)
        if (doubt := _doubt(model, frames_per_chunk)) is not None:
            causal.set_attachments(DOUBT_ATTACHMENT, doubt)
        return io.NodeOutput(causal)


def _doubt(model: ModelPatcher, frames_per_chunk: int) -> str | None:
    """Why a MODEL of ComfyUI's own loaders may not be causal, and what its name says of how to sample it, by the rules
    of Diagonal Model Loader, which has told of its own; None for nothing, or where the file is not known (a GGUF
    loader's)."""
    if model.get_attachment(PROVENANCE_ATTACHMENT) is not None:
        return None
    _, arguments, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    path = arguments[0] if arguments else None
    if not isinstance(path, (str, os.PathLike)):
        return None
    try:
        info = inspect_checkpoint(path).info
    except (ValueError, OSError):  # gone, or of a kind that only the other loader reads
        return None
    name = _chosen_name(Path(path))
    told = (causality_warning(info, name), recipe_warning(info, name, chunk_known=frames_per_chunk == 1))
    heard = [each for each in told if each]
    return f"{info.file}: {'; '.join(heard)}" if heard else None


def _chosen_name(path: Path) -> str:
    """A file's name as a loader lists it, below ComfyUI's folder; folders above say nothing of a model."""
    roots = [root for kind in CHECKPOINT_FOLDERS for root in folder_paths.get_folder_paths(kind)]
    return next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), path.name)
