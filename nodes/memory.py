"""What the canvas says of memory before a run: the graph's widgets -> what it will take, and whether it fits."""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import folder_paths
from aiohttp import web

from ..diagonal_sampler.checkpoints import inspect_checkpoint
from ..diagonal_sampler.frames import latent_frames
from ..diagonal_sampler.memory import FP8, Change, ClipSize, DecoderFacts, changes_that_fit, forecast
from ..diagonal_sampler.provenance import causal_settings
from ..diagonal_sampler.schedule import PRESETS
from ..diagonal_sampler.settings import KV_CACHE_DTYPES, CausalSettings
from ..diagonal_sampler.weight_files import first_line
from ..model_patches.flow_control import ADAPTER_AND_BLEND, REFERENCE
from ..model_patches.memory import (
    available_memory,
    carrier_facts,
    decoder_facts,
    file_facts,
    float8_works,
    weights_kept,
)
from .demo_loader import DEMO_DIRECTORY, DEMO_VAE, WEIGHTS
from .model_loader import (
    CHECKPOINT_FOLDERS,
    FRAMES_FROM_FILE,
    SINK_FROM_FILE,
    WINDOW_FROM_FILE,
    MissingFile,
    full_path,
)

log = logging.getLogger(__name__)

MEMORY_ROUTE = "/diagonal/memory"
MODEL_FOLDERS = {
    "DiagonalModelLoader": ("ckpt_name", CHECKPOINT_FOLDERS),
    "UNETLoader": ("unet_name", ("diffusion_models",)),
    "CheckpointLoaderSimple": ("ckpt_name", ("checkpoints",)),
    "UnetLoaderGGUF": ("unet_name", ("unet_gguf",)),
    "UnetLoaderGGUFAdvanced": ("unet_name", ("unet_gguf",)),
}
"""Loader node -> its widget that names the file, and the ComfyUI model folders that it offers files of."""
DEMO_NODE = "DiagonalDemoLoader"
ADAPTER_LOADERS = ("DiagonalModelLoader", DEMO_NODE)
"""Loaders that give a model the optical-flow adapter of its file."""
LATENT_CELL = 8  # pixels of its side
TOKEN_CELLS = 2  # rows and columns of latent cells that are a token of Wan
MAX_PIXELS, MAX_LENGTH, MAX_BATCH = 16384, 100_000_000, 4096


async def get_memory(request: web.Request) -> web.Response:
    """What the graph in the query will take; what cannot be known is an answer, not a failure."""
    # Beside the event loop: a file's header is read from the disk.
    return web.json_response(await asyncio.to_thread(prediction, dict(request.query)))


def prediction(query: Mapping[str, str]) -> dict[str, Any]:
    """The memory that a graph will take.

    Args:
        query: as text, `node` (the loader's type), `file`, `weights`, `weight_dtype`; `frames_per_chunk`, `window`,
            `sink`, `kv_cache_dtype` of the node that makes the model causal; the schedule's `preset`, where it decides
            the frames per chunk; `width`, `height` in pixels, `length` in pixel frames, `batch`, `cfg`; for a node that
            decodes too, `vae_node` and `vae`; for optical flow with a VAE, `flow` (its mode), `flow_vae_node` and
            `flow_vae`.

    Returns:
        What `_figures` says, or `error`, in English; with `missing` where that is a `file` that is in none of its
        `folders`.
    """
    try:
        return _figures(query)
    except MissingFile as error:
        return {"error": f"{error}", "missing": {"file": error.file, "folders": error.folders}}
    except (ValueError, OSError) as error:
        return {"error": f"{error}"}
    except Exception as error:  # of ComfyUI's, on a file that it takes for one of its own
        return {"error": _unforeseen(query.get("file", ""), f"{type(error).__name__}: {first_line(error)}")}


@lru_cache(maxsize=64)
def _unforeseen(file: str, reason: str) -> str:
    """The answer, which goes to the log once: every canvas asks again and again."""
    words = f"What {repr(file) if file else 'this graph'} takes of the memory is not known ({reason})."
    # A lone surrogate of a file's must not reach the log: its handler would raise.
    log.warning("%s\n%s", words, traceback.format_exc().encode(errors="backslashreplace").decode())
    return words


def _figures(query: Mapping[str, str]) -> dict[str, Any]:
    """The memory that a graph will take; see `prediction`.

    Returns:
        Figures, which the canvas puts into words of its language: in bytes `parts`, `total` and `available`, and what
        of the weights would have to wait in RAM while the run goes on (`waiting`, 0 where that does not help); `fits`,
        `on_gpu`, `device`; the clip's `width` and `height` in pixels and its `window` in latent frames; and `changes`
        that fit, each with `weights` and `kv_cache_dtype` (a format), `window` (latent frames) and `size` (width,
        height in pixels), None for what stays.

    Raises:
        ValueError, OSError: what cannot be known, in words.
    """
    path, options = _model_path(query), {}
    if query.get("node") != DEMO_NODE:
        options = {name: query[name] for name in ("weights", "weight_dtype") if query.get(name)}
    facts = file_facts(path, **options)
    settings, _ = causal_settings(
        facts.provenance,
        frames_per_chunk=_preset_frames(query) or _setting(query, "frames_per_chunk", FRAMES_FROM_FILE),
        window=_setting(query, "window", WINDOW_FROM_FILE),
        sink=_setting(query, "sink", SINK_FROM_FILE),
        kv_cache_dtype=query.get("kv_cache_dtype") or KV_CACHE_DTYPES[0],
    )
    clip = _clip(query, settings)
    frames = min(settings.frames_per_chunk, clip.frames)
    decoder = _vae_facts(decoder_facts, query, "vae", frames)
    carrier = _vae_facts(carrier_facts, query, "flow_vae", frames) if _carries(query, path) else None
    if carrier is not None and decoder is not None and _same_vae(query):
        carrier = replace(carrier, weight_bytes=0)  # it is loaded once
    available, device, on_gpu = available_memory()
    needed = forecast(facts.network, clip, decoder, carrier)
    fits = needed.total <= available
    waiting_helps = on_gpu and needed.working + weights_kept(needed.weights, available) <= available
    without = () if float8_works() else (FP8,)
    changes = (
        []
        if fits
        else changes_that_fit(facts.network, clip, available, decoder, carrier, step=TOKEN_CELLS, without=without)
    )
    return {
        "fits": fits,
        "parts": {name: getattr(needed, name) for name in ("weights", "keys_values", "text", "forward", "decoder")},
        "total": needed.total,
        "available": available,
        "waiting": needed.total - available if waiting_helps and not fits else 0,
        "on_gpu": on_gpu,
        "device": device,
        "width": clip.columns * LATENT_CELL,
        "height": clip.rows * LATENT_CELL,
        "window": clip.settings.capacity(clip.frames),
        "changes": [_in_pixels(change) for change in changes],
    }


def _in_pixels(change: Change) -> dict[str, Any]:
    size = change.size and [cells * LATENT_CELL for cells in reversed(change.size)]
    return {**asdict(change), "size": size}


def _model_path(query: Mapping[str, str]) -> str:
    node, name = query.get("node", ""), query.get("file", "")
    if node == DEMO_NODE:
        if name not in WEIGHTS:
            raise ValueError(f"weights is {name!r}; choose one of {', '.join(WEIGHTS)}.")
        return str(DEMO_DIRECTORY / WEIGHTS[name])
    widget, offered = MODEL_FOLDERS.get(node, ("", ()))
    folders = tuple(folder for folder in offered if folder in folder_paths.folder_names_and_paths)
    if not folders:
        raise ValueError(f"The model comes from {node or 'no node'}, whose file is not known here.")
    return _listed(folders, name, widget)


def _listed(folders: tuple[str, ...], name: str, widget: str) -> str:
    if not name:
        raise ValueError(f"{widget} is empty; choose a file.")
    return full_path(folders, name, widget)


def _vae_facts(
    facts: Callable[..., DecoderFacts], query: Mapping[str, str], name: str, frames: int
) -> DecoderFacts | None:
    """`facts` of the VAE that the query has under a name; None where it has none."""
    if query.get(f"{name}_node") == DEMO_NODE:
        return facts(DEMO_DIRECTORY / DEMO_VAE, frames, demo=True)
    if query.get(name):
        return facts(_listed(("vae", "vae_approx"), query[name], "vae_name"), frames)
    return None


def _same_vae(query: Mapping[str, str]) -> bool:
    return all(query.get(name) == query.get(f"flow_{name}") for name in ("vae", "vae_node"))


def _carries(query: Mapping[str, str], path: str) -> bool:
    """Whether the optical flow's mode carries frames from chunk to chunk; auto does where the model has no adapter."""
    mode = query.get("flow")
    if mode != "auto":
        return mode in (REFERENCE, ADAPTER_AND_BLEND)
    return query.get("node") not in ADAPTER_LOADERS or not _has_adapter(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=32)
def _has_adapter(path: str, changed: int) -> bool:
    return inspect_checkpoint(path).info.dims.flow_adapter


def _preset_frames(query: Mapping[str, str]) -> int | None:
    preset = PRESETS.get(query.get("preset", ""))
    return None if preset is None else preset.frames_per_chunk


def _setting(query: Mapping[str, str], name: str, from_file: int) -> int | None:
    value = _whole(query, name, -1, MAX_LENGTH, str(from_file))
    return None if value == from_file else value


def _whole(query: Mapping[str, str], name: str, low: int, high: int, default: str) -> int:
    text = query.get(name) or default
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise ValueError(f"{name} is {text[:40]!r}; it must be a whole number from {low} to {high}.")
    return value


def _clip(query: Mapping[str, str], settings: CausalSettings) -> ClipSize:
    width, height = (_whole(query, name, LATENT_CELL, MAX_PIXELS, "") for name in ("width", "height"))
    length = _whole(query, "length", 1, MAX_LENGTH, "")
    try:
        guided = float(query.get("cfg") or 1) != 1
    except ValueError:
        raise ValueError(f"cfg is {query['cfg'][:40]!r}; it must be a number.") from None
    return ClipSize(
        settings=settings,
        frames=latent_frames(length),
        rows=height // LATENT_CELL,
        columns=width // LATENT_CELL,
        batch=_whole(query, "batch", 1, MAX_BATCH, "1"),
        conditions=2 if guided else 1,
    )
