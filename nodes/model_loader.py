"""DiagonalModelLoader: any published causal Wan checkpoint, and optionally a LoRA, as one causal MODEL."""

from __future__ import annotations

import logging
import os

import folder_paths
from comfy_api.latest import io, ui

from ..diagonal_sampler.checkpoints import (
    WEIGHTS,
    CheckpointInfo,
    bidirectional_by_name,
    causal_by_name,
    causality_warning,
    recipe_warning,
    trained_as,
)
from ..diagonal_sampler.lora_files import peft_config
from ..diagonal_sampler.provenance import causal_settings
from ..diagonal_sampler.schedule import DEFAULT_PRESET
from ..diagonal_sampler.settings import INT8, KV_CACHE_DTYPES, POSITIONS, CausalSettings
from ..diagonal_sampler.weight_files import READABLE_SUFFIXES
from ..model_patches.causal import make_causal
from ..model_patches.loading import WEIGHT_DTYPES, apply_lora, base_wan, is_trained_as
from ..model_patches.sampling import LOADED_ATTACHMENT
from .client import tell
from .common import CATEGORY, kv_cache_input, own_id

log = logging.getLogger(__name__)

CHECKPOINT_FOLDERS = ("diffusion_models", "checkpoints")
"""ComfyUI model folders that are offered, the first winning where both have a file of one name."""
LORA_FOLDERS = ("loras",)
NO_LORA = "none"

# Widgets hold numbers: these values stand for "what the file says, else the default".
FRAMES_FROM_FILE = 0
WINDOW_FROM_FILE = 0
SINK_FROM_FILE = -1
MAX_FRAMES = 4096
MAX_FRAMES_PER_CHUNK = 64
_DEFAULTS = CausalSettings()
_WINDOWS = {"krea": "krea: -1 and 0, or 6 and 0, the size that Krea's own server samples with"}
"""Preset that a file without a header points to -> its window and sink."""


class DiagonalModelLoader(io.ComfyNode):
    """Widgets -> a recognised file -> a MODEL with causal attention, and a report of what it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiagonalModelLoader",
            display_name="Diagonal Model Loader",
            category=f"{CATEGORY}/loaders",
            description="Loads a causal Wan 2.1 text-to-video checkpoint in any published layout (Self Forcing, "
            "CausVid, LongLive, Causal Forcing, Rolling Forcing, StreamDiffusionV2, Krea, ComfyUI's own) and "
            "says what it recognised. For GGUF files use the GGUF pack's loader and Diagonal Causal Attention.",
            search_aliases=[
                "self forcing",
                "longlive",
                "krea realtime",
                "causvid",
                "causal forcing",
                "causal wan loader",
            ],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=_file_names(CHECKPOINT_FOLDERS),
                    tooltip="Weight file in models/diffusion_models or models/checkpoints (.safetensors, .pt, .pth, "
                    ".ckpt, .bin). Pickled files need torch 2.10 or newer and may hold tensors only.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default="auto",
                    tooltip="Which weights of a training checkpoint: auto takes the averaged ones (generator_ema) "
                    "where there are any, else generator, model or state_dict. No effect on a file with one "
                    "set.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Number format of the weights in memory: default leaves it to ComfyUI, which takes float16 "
                    "on most GPUs, also for a bf16 file; bf16 has the range that Wan was trained in; fp8 halves the "
                    "memory of bf16 at some loss (not on Apple's GPU).",
                    advanced=True,
                ),
                io.Int.Input(
                    "frames_per_chunk",
                    default=FRAMES_FROM_FILE,
                    min=FRAMES_FROM_FILE,
                    max=MAX_FRAMES_PER_CHUNK,
                    tooltip="Latent frames denoised together (one latent frame is 4 pixel frames). Must be what the "
                    f"model was trained with. 0: from the file, else {_DEFAULTS.frames_per_chunk}.",
                ),
                io.Int.Input(
                    "window",
                    default=WINDOW_FROM_FILE,
                    min=-1,
                    max=MAX_FRAMES,
                    tooltip="Latent frames that a chunk attends to, sink and current chunk included. -1: all. "
                    f"0: from the file, else {_DEFAULTS.window}.",
                ),
                io.Int.Input(
                    "sink",
                    default=SINK_FROM_FILE,
                    min=SINK_FROM_FILE,
                    max=MAX_FRAMES,
                    tooltip="Latent frames at the start of the clip that stay in the window for ever. -1: from the "
                    f"file, else {_DEFAULTS.sink}.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(POSITIONS),
                    default=_DEFAULTS.positions,
                    tooltip="How latent frames are counted: absolute from the start of the clip, or inside the window "
                    "so that clips can be of any length. auto: absolute up to 21 latent frames, else window. With "
                    "window -1 always absolute.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *_file_names(LORA_FOLDERS)],
                    default=NO_LORA,
                    tooltip="LoRA in models/loras, in PEFT (LongLive), ComfyUI, kohya or diffusers layout, applied to "
                    "the weights.",
                    optional=True,
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Factor on the LoRA, without a unit: 1 is as trained, 0 is none. No effect without a LoRA.",
                    optional=True,
                ),
                kv_cache_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="For Diagonal Chunk Sampler and Diagonal Stream Video; any other sampler denoises all "
                    "frames at once.",
                ),
                io.String.Output(id="info", display_name="info", tooltip="What was recognised, and warnings."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, lora_name: str | None = NO_LORA, **_widgets) -> tuple:
        """Change when a file does, so that a replaced checkpoint is loaded again.

        A name that comes by a link is None here, and counts by the node that it comes from.
        """
        names = ((CHECKPOINT_FOLDERS, ckpt_name), (LORA_FOLDERS, lora_name))
        known = [(folders, name) for folders, name in names if name not in (None, NO_LORA)]
        paths = [full_path(folders, name, "file name") for folders, name in known]
        settings = [config for path in paths if (config := peft_config(path)) is not None]
        stats = [os.stat(path) for path in (*paths, *settings)]
        return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)

    @classmethod
    def execute(
        cls,
        ckpt_name: str,
        weights: str,
        weight_dtype: str,
        frames_per_chunk: int,
        window: int,
        sink: int,
        positions: str,
        lora_name: str = NO_LORA,
        lora_strength: float = 1.0,
        kv_cache_dtype: str = KV_CACHE_DTYPES[0],
    ) -> io.NodeOutput:
        path = full_path(CHECKPOINT_FOLDERS, ckpt_name, "ckpt_name")
        lora_path = None if lora_name == NO_LORA else full_path(LORA_FOLDERS, lora_name, "lora_name")
        model, info = base_wan(path, weights=weights, weight_dtype=weight_dtype)
        lora_lines = []
        by_lora = False
        if lora_path is not None:
            model, lora = apply_lora(model, lora_path, lora_strength, info)
            by_lora = is_trained_as(lora, lora_strength)
            followed = ""
            if by_lora:
                followed = "; its header says how the model was trained"
            elif lora_strength and causal_by_name(lora_name):
                followed = "; its name is that of a causal family: use that family's preset, and its base if it has one"
            lora_lines = [f"{lora.summary()}, strength {lora_strength:g}{followed}"]
            info = trained_as(info, lora.provenance) if by_lora else info
        settings, contradictions = causal_settings(
            info.provenance,
            frames_per_chunk=None if frames_per_chunk == FRAMES_FROM_FILE else frames_per_chunk,
            window=None if window == WINDOW_FROM_FILE else window,
            sink=None if sink == SINK_FROM_FILE else sink,
            positions=positions,
            kv_cache_dtype=kv_cache_dtype,
        )
        stated = info.provenance
        chunk_known = frames_per_chunk != FRAMES_FROM_FILE or stated.frames_per_chunk is not None
        window_known = window != WINDOW_FROM_FILE or stated.window is not None
        sink_known = sink != SINK_FROM_FILE or stated.sink is not None
        applied = "" if lora_path is None or lora_strength == 0 else lora_name
        doubt = causality_warning(info, ckpt_name, causal_lora=by_lora, lora_path=applied)
        recipe = recipe_warning(info, ckpt_name, chunk_known=chunk_known)
        told = (doubt, *info.warnings, *contradictions, _of_lora_name(lora_name), recipe)
        warnings = [each for each in told if each]
        for warning in warnings:
            log.warning("%s: %s", info.file, warning)
        attention = _in_words(settings, info, chunk_known=chunk_known, window_known=window_known and sink_known)
        lines = [info.summary(), *lora_lines, attention, *_of_no_preset(info)]
        lines += [f"warning: {each}" for each in warnings]
        report = "\n".join(lines)
        log.info("%s", report)
        tell(own_id(cls), report)
        model = make_causal(model, settings)
        model.set_attachments(LOADED_ATTACHMENT, settings)
        return io.NodeOutput(model, report, ui=ui.PreviewText(report))


def _file_names(folders: tuple[str, ...]) -> list[str]:
    """The names of readable weight files in ComfyUI's model folders, each once."""
    names = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return [name for name in dict.fromkeys(names) if name.lower().endswith(READABLE_SUFFIXES)]


def _of_lora_name(lora_name: str) -> str | None:
    """What the name of a LoRA warns of; None for nothing."""
    if not bidirectional_by_name(lora_name):
        return None
    return (
        f"{lora_name}: its name says that it was made for a bidirectional Wan, which denoises all frames at "
        "once; it makes no model causal, and a causal one has its own few steps"
    )


def _of_no_preset(info: CheckpointInfo) -> list[str]:
    """A line where neither a header nor the layout tells how the model was distilled, as in most published files."""
    stated = info.provenance
    if info.suggested_preset or stated.steps_per_chunk or stated.sigmas or stated.context_mode:
        return []
    return [
        f"preset: the file does not say; Diagonal Schedule's default, {DEFAULT_PRESET}, is for Diagonal Distillation's "
        "files only: see the table in that node's help"
    ]


def _in_words(settings: CausalSettings, info: CheckpointInfo, *, chunk_known: bool, window_known: bool) -> str:
    """The causal attention, for a person. chunk_known, window_known: the file or a widget says frames per chunk, and
    both window and sink."""
    window = "all" if settings.window < 0 else settings.window
    usual = "" if chunk_known else " (the usual; the file does not say)"
    wanted = _WINDOWS.get(info.suggested_preset or "", "most four-step models want -1 and 0 for five seconds")
    guessed = "" if window_known else f" (the file does not say; {wanted})"
    return (
        f"attention: {settings.frames_per_chunk} latent frames a chunk{usual}, window {window}, sink {settings.sink}"
        f"{guessed}, "
        f"positions {settings.positions}{', KV cache in 8 bits' if settings.kv_cache_dtype == INT8 else ''}"
    )


class MissingFile(ValueError):
    """A file that ComfyUI does not list in the folders."""

    def __init__(self, widget: str, file: str, folders: tuple[str, ...]) -> None:
        where = " or models/".join(folders)
        super().__init__(f"{widget}={file!r} is not in models/{where}; put the file there and press R in the page")
        self.file, self.folders = file, folders


def full_path(folders: tuple[str, ...], name: str, widget: str) -> str:
    """The path of a name that ComfyUI lists, else MissingFile. A name from a workflow is never a path of its own."""
    for folder in folders:
        if name in folder_paths.get_filename_list(folder):
            return folder_paths.get_full_path_or_raise(folder, name)
    raise MissingFile(widget, name, folders)
