"""How much memory a run takes, from sizes alone: nothing is loaded and nothing allocated.

The sampler asks its host for the same figures before it runs, so that what is predicted is what is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from .cache import KVCache
from .settings import INT8, CausalSettings

TEXT_TOKENS = 512
"""Tokens of a prompt for Wan: its text encoder pads to that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What a network's size says about memory.

    Attributes:
        weight_bytes: of its weights as they are computed with.
        parameters: their number.
        layers: transformer blocks.
        width: channels of a key.
        patch: (rows, columns) of latent cells that are one token.
        element_bytes: of a channel of a key, 2 for bf16.
        forward_bytes: of activations for each latent cell of a forward, by the host's reckoning.
    """

    weight_bytes: int
    parameters: int
    layers: int
    width: int
    patch: tuple[int, int]
    element_bytes: int
    forward_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFacts:
    """A VAE that works while the network stays loaded: bytes of its weights, and for each of a chunk's rows times
    columns of latent cells."""

    weight_bytes: int
    cell_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSize:
    """What is to be made.

    Attributes:
        settings: window, sink and frames per chunk.
        frames: latent frames of the clip.
        rows, columns: latent cells of a frame.
        batch: clips made at once.
        conditions: prompts that keep a cache: 1 without guidance, 2 with.
        text_tokens: of one prompt.
    """

    settings: CausalSettings
    frames: int
    rows: int
    columns: int
    batch: int = 1
    conditions: int = 1
    text_tokens: int = TEXT_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes at the peak of a run: the weights, the keys and values of the window and of the text, one forward, and
    what a VAE that works meanwhile takes beyond that."""

    weights: int
    keys_values: int
    text: int
    forward: int
    decoder: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.working

    @property
    def working(self) -> int:
        """What cannot wait outside of the device's memory, as weights can."""
        return self.keys_values + self.text + self.forward + self.decoder


def keys_values_bytes(network: NetworkFacts, clip: ClipSize) -> int:
    """Bytes of the KV cache."""
    rows, columns = network.patch
    return KVCache.bytes_needed(
        clip.settings,
        clip.frames,
        layers=network.layers,
        tokens_per_frame=ceil(clip.rows / rows) * ceil(clip.columns / columns),
        width=network.width,
        element_bytes=network.element_bytes,
        batch=clip.batch,
        conditions=clip.conditions,
    )


def text_bytes(network: NetworkFacts, clip: ClipSize) -> int:
    """Bytes of the text's keys and values and of its embedding, which are kept for the whole run."""
    tokens = clip.batch * clip.conditions * clip.text_tokens
    return (2 * network.layers + 1) * tokens * network.width * network.element_bytes


def forecast(
    network: NetworkFacts, clip: ClipSize, decoder: DecoderFacts | None = None, carrier: DecoderFacts | None = None
) -> Forecast:
    """What a run takes at its peak.

    Args:
        decoder: a VAE that decodes a chunk while the next one is denoised.
        carrier: a VAE that works between two forwards, as optical flow's does that carries frames from chunk to chunk.
            A forward's activations are free then, so that only what it takes beyond them counts.
    """
    cells = clip.rows * clip.columns
    chunk = clip.batch * clip.conditions * min(clip.settings.frames_per_chunk, clip.frames) * cells
    forward = round(chunk * network.forward_bytes)
    beside = 0 if decoder is None else round(decoder.weight_bytes + cells * decoder.cell_bytes)
    between = 0 if carrier is None else carrier.weight_bytes + max(0, round(cells * carrier.cell_bytes) - forward)
    return Forecast(
        weights=network.weight_bytes,
        keys_values=keys_values_bytes(network, clip),
        text=text_bytes(network, clip),
        forward=forward,
        decoder=beside + between,
    )


FP8, GGUF_Q4 = "fp8", "gguf_q4"
LIGHTER_FORMATS = {FP8: 1.0, GGUF_Q4: 4.5 / 8}
"""Format of a file -> bytes of a weight in it (Q4: blocks of 32 with a scale of 16 bits)."""
SIZE_STEPS = 16  # sizes between the wanted one and none that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to make smaller; None stays as it is.

    Attributes:
        weights: of LIGHTER_FORMATS.
        kv_cache_dtype: of settings.KV_CACHE_DTYPES.
        window: in latent frames.
        size: (rows, columns) of latent cells.
    """

    weights: str | None = None
    kv_cache_dtype: str | None = None
    window: int | None = None
    size: tuple[int, int] | None = None


def changes_that_fit(
    network: NetworkFacts,
    clip: ClipSize,
    available: int,
    decoder: DecoderFacts | None = None,
    carrier: DecoderFacts | None = None,
    *,
    step: int = 1,
    without: Collection[str] = (),
) -> list[Change]:
    """Changes of one thing, each of which would make the run fit into `available` bytes; the mildest first.

    Where no single one does, the smallest window together with 4-bit weights and a smaller size; empty where nothing
    does.

    Args:
        decoder, carrier: see `forecast`.
        step: rows and columns must be multiples of it, in pixels that is `step * 8`.
        without: of LIGHTER_FORMATS, those that the device does not have.
    """

    def fits(network: NetworkFacts, clip: ClipSize) -> bool:
        return forecast(network, clip, decoder, carrier).total <= available

    found = []
    formats = [(name, lighter) for name, lighter in _lighter(network) if name not in without]
    for name, lighter in formats:
        if fits(lighter, clip):
            found.append(Change(weights=name))
            break
    if clip.settings.kv_cache_dtype != INT8 and fits(network, _with_settings(clip, kv_cache_dtype=INT8)):
        found.append(Change(kv_cache_dtype=INT8))
    windows = _smaller_windows(clip)
    # Bytes rise with the window, and a clip of a day has a window a chunk.
    largest = bisect_left(windows, True, key=lambda window: fits(network, _with_settings(clip, window=window)))
    if largest < len(windows):
        found.append(Change(window=windows[largest]))
    for smaller in _smaller_sizes(clip, step):
        if fits(network, smaller):
            found.append(Change(size=(smaller.rows, smaller.columns)))
            break
    if found:
        return found
    name, lightest = (formats or [(None, network)])[-1]
    window = windows[-1] if windows else None
    least = clip if window is None else _with_settings(clip, window=window)
    for smaller in (least, *_smaller_sizes(least, step)):
        if fits(lightest, smaller):
            size = None if smaller is least else (smaller.rows, smaller.columns)
            return [Change(weights=name, window=window, size=size)]
    return []


def _lighter(network: NetworkFacts) -> Iterator[tuple[str, NetworkFacts]]:
    for name, size in LIGHTER_FORMATS.items():
        weight_bytes = round(network.parameters * size)
        if weight_bytes < network.weight_bytes:
            yield name, replace(network, weight_bytes=weight_bytes)


def _smaller_windows(clip: ClipSize) -> range:
    """Windows below the one in use, largest first, a chunk less at a time; each lets a chunk see one before it."""
    settings = clip.settings
    smallest = settings.frames_per_chunk + max(settings.sink, settings.frames_per_chunk)
    largest = settings.capacity(clip.frames) - settings.frames_per_chunk
    return range(largest, smallest - 1, -settings.frames_per_chunk)


def _with_settings(clip: ClipSize, **changed: Any) -> ClipSize:
    return replace(clip, settings=replace(clip.settings, **changed))


def _smaller_sizes(clip: ClipSize, step: int) -> Iterator[ClipSize]:
    """Sizes below the wanted one, of about its shape, largest first."""
    for part in range(SIZE_STEPS - 1, 0, -1):
        rows, columns = (max(step, size * part // SIZE_STEPS // step * step) for size in (clip.rows, clip.columns))
        yield replace(clip, rows=rows, columns=columns)
