"""What ComfyUI's conditionings may hold where a clip is made chunk by chunk, and where their texts are kept."""

from __future__ import annotations

import logging
from typing import Any

import comfy.conds
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from .attention import ignored_preferences
from .prompts import check_prompts

log = logging.getLogger(__name__)

MULTIGPU_KEY = "multigpu"
"""Under this name MultiGPU CFG Split gives a MODEL its copies; the guider's options have them only once it samples."""
SPARSE_ATTENTION_KEY = "block_sparse_attention"
"""Under this name Model Sparse Attention (BlockSparseAttention, after ComfyUI 0.30) puts its callbacks on a MODEL."""

UNSUPPORTED_CONDITIONS = {
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "concat_latent_image": "an image to concatenate",
    "reference_latents": "reference latents",
    "time_dim_concat": "frames to concatenate",
    "context_latents": "context latents",
    # What ComfyUI's nodes for other Wan models leave, and a text-to-video model does not look at.
    "vace_frames": "a video for VACE",
    "camera_conditions": "a camera for Wan Fun Camera",
    "control_video": "a control video",
    "pose_video_latent": "a video of poses",
    "face_video_pixels": "a video of a face",
    "driving_mask_28ch": "a driving mask",
    "reference_motion": "frames of a motion",
    "audio_embed": "sound",
}


def check_conditionings(model: ModelPatcher, positive: list, negative: list, height: int, width: int) -> None:
    """Refuse, by name, what cannot follow a clip chunk by chunk, and warn of what has no effect there.

    Args:
        height, width: of the latent.
    """
    if not positive:
        raise ValueError("The positive conditioning is empty; connect CLIP Text Encode.")
    if model.get_additional_models_with_key(MULTIGPU_KEY) or model.model_options.get("multigpu_clones"):
        raise ValueError(
            "MultiGPU CFG Split (work units) splits one forward over devices; the KV cache lives on one. Remove the "
            "node."
        )
    if model.model_options.get("context_handler") is not None:
        raise ValueError("Context windows cut the clip in another way than chunks do; remove the context windows node.")
    if model.model_options.get("transformer_options", {}).get("easycache") is not None:
        raise ValueError(
            "EasyCache and LazyCache skip forwards, and every forward of a causal model writes keys and values that "
            "later chunks need. Remove the node."
        )
    for name, conditioning in (("positive", positive), ("negative", negative)):
        for index, (text, extra) in enumerate(conditioning):
            reason = _other_encoder(model, text) or _unsupported(extra) or _outside(extra, height, width)
            if reason is not None:
                raise ValueError(f"The {name} conditioning (entry {index + 1}) has {reason}")
    check_prompts(positive, negative)
    _warn_of_attention(model)


def _warn_of_attention(model: ModelPatcher) -> None:
    """Sparse kinds need as many keys as queries, which only a first chunk has: later ones look back at the cache."""
    if model.get_callbacks(CallbacksMP.ON_PREPARE_STATE, SPARSE_ATTENTION_KEY):
        log.warning(
            "Model Sparse Attention (BlockSparseAttention) can act on the first chunk only: later chunks also attend "
            "to the cache, which it leaves dense. Remove the node, so that all chunks are made alike."
        )
    for kind, layers in ignored_preferences(model).items():
        log.warning(
            "The model's file, or a LoRA, asks for the attention %s in %d layers, which is not used: chunks attend "
            "densely to the cache.",
            kind,
            layers,
        )


def _other_encoder(model: ModelPatcher, text: torch.Tensor) -> str | None:
    wanted = model.get_model_object("diffusion_model").text_dim
    if text.shape[-1] == wanted:
        return None
    return (
        f"a text of {text.shape[-1]} channels, and the model takes {wanted}: it is another text encoder's. Wan 2.1 "
        "goes with UMT5 (Load CLIP, type wan), and the demo with the CLIP of Diagonal Demo Loader."
    )


def _outside(extra: dict[str, Any], height: int, width: int) -> str | None:
    area = extra.get("area")
    if area is None or (area[2] < height and area[3] < width):
        return None
    return (
        f"an area that begins at x {8 * area[3]}, y {8 * area[2]}, outside of the video, which is {8 * width}x"
        f"{8 * height}. Move it, or make the video larger."
    )


def _unsupported(extra: dict[str, Any]) -> str | None:
    starts = (extra.get("start_percent", 0.0), extra.get("clip_start_percent", 0.0))
    ends = (extra.get("end_percent", 1.0), extra.get("clip_end_percent", 1.0))
    if max(starts) > 0 or min(ends) < 1:
        return (
            "a timestep range (ConditioningSetTimestepRange): its keys would be missing from the cache outside of the "
            "range. Remove the range."
        )
    if "mask" in extra:
        return "a mask (ConditioningSetMask), which ComfyUI does not apply to video. Use ConditioningSetArea."
    area = extra.get("area")
    if area is not None and (area[0] == "percentage" or len(area) != 4):
        return "an area in percent or in time. Use ConditioningSetArea, in pixels."
    for key, what in UNSUPPORTED_CONDITIONS.items():
        if extra.get(key) is not None:
            instead = " For a start image use Diagonal Context Frames with a text-to-video checkpoint."
            return (
                f"{what} ({key}), which a causal text-to-video model cannot follow chunk by chunk. Remove it."
                f"{instead if key == 'concat_latent_image' else ''}"
            )
    for hook in extra["hooks"].hooks if extra.get("hooks") is not None else ():
        if len(hook.hook_keyframe.keyframes) > 1:
            return (
                "a hook with several keyframes: every chunk goes through all noise levels again, but the keyframes "
                "would not begin again with it. Use a hook of constant strength."
            )
    return None


def move_texts(model_wrap, device: torch.device) -> None:
    """Put the prompts' embeddings where the model computes, in its dtype: ComfyUI would copy them in every forward."""
    dtype = model_wrap.inner_model.get_dtype_inference()
    moved: dict[int, Any] = {}  # what conditions share stays shared
    for cond in (cond for conds in model_wrap.conds.values() for cond in conds or ()):
        text = cond.get("model_conds", {}).get("c_crossattn")
        if type(text) is comfy.conds.CONDRegular:
            if id(text) not in moved:
                moved[id(text)] = type(text)(text.cond.to(device, dtype))
            cond["model_conds"] = {**cond["model_conds"], "c_crossattn": moved[id(text)]}
