"""How a checkpoint was trained, read from and written to a safetensors header."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .schedule import CONTEXT_MODES, same_steps
from .settings import KV_CACHE_DTYPES, CausalSettings
from .weight_files import short


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a checkpoint was trained, as its safetensors header says; None where it says nothing.

    frames_per_chunk, window, sink: latent frames (window -1: all). steps_per_chunk: forwards, the last
    repeats. sigmas: noise levels in [0, 1] per chunk, the last chunk's repeat. shift: of the flow schedule, >
    0. context_mode: noisy, clean or renoise. context_sigma: noise level in [0, 1] of renoise; None with another
    mode. recipe, data, git_commit: free text.
    """

    frames_per_chunk: int | None = None
    steps_per_chunk: tuple[int, ...] | None = None
    sigmas: tuple[tuple[float, ...], ...] | None = None
    shift: float | None = None
    context_mode: str | None = None
    context_sigma: float | None = None
    window: int | None = None
    sink: int | None = None
    recipe: str | None = None
    data: str | None = None
    git_commit: str | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str) -> Provenance:
        """Parse header entries (all strings). name: the file, for errors.

        Raises ValueError naming file, key and value for an entry that breaks its rule.
        """
        found = {}
        for key, parse in _PROVENANCE_PARSERS.items():
            if key not in metadata:
                continue
            try:
                found[key] = parse(metadata[key])
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"weight file {name!r}, header key {key!r}: got {short(metadata[key])}, expected "
                    f"{error}; correct the header or remove the key"
                ) from None
        return cls(**found)

    @property
    def is_causal(self) -> bool:
        """Whether it has an entry that only a model trained chunk by chunk has."""
        return any(getattr(self, key) is not None for key in _ONLY_CAUSAL)

    def contradictions(self, **chosen: Any) -> tuple[str, ...]:
        """Sentences about each chosen value, by this class's field names, that differs from what the file
        says.

        A value of None, and a field the file is silent on, contradict nothing.
        """
        found = []
        for key, value in chosen.items():
            stated = getattr(self, key)
            if value is None or stated is None:
                continue
            if not same_steps(value, stated) if key == "steps_per_chunk" else value != stated:
                found.append(f"{key} is set to {value}, but the file was trained with {stated}")
        return tuple(found)

    def to_metadata(self) -> dict[str, str]:
        """The header entries that `from_metadata` reads back as this; safetensors headers hold only strings."""
        entries = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                entries[field.name] = value if isinstance(value, str) else json.dumps(value)
        if self.steps_per_chunk is not None:
            entries["steps_per_chunk"] = ",".join(map(str, self.steps_per_chunk))
        return entries


_ONLY_CAUSAL = ("frames_per_chunk", "steps_per_chunk", "context_mode", "window", "sink")


def _number(
    low: float, high: float = sys.float_info.max, *, special: int | None = None, what: str, kind: type
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, TypeError):
            raise ValueError(what) from None
        if not (low <= value <= high or value == special):
            raise ValueError(what)
        return value

    return parse


def _steps(text: str) -> tuple[int, ...]:
    what = "whole numbers of 1 or more such as '4,3,2'"
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(what)
    return tuple(int(part) for part in parts)


def _sigma_table(text: str) -> tuple[tuple[float, ...], ...]:
    what = "JSON, a list of lists of noise levels in [0, 1] such as '[[1.0, 0.75], [1.0]]'"
    try:
        rows = json.loads(text)
    except ValueError:
        raise ValueError(what) from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(what)
    rows = rows if isinstance(rows[0], list) else [rows]
    for row in rows:
        if not isinstance(row, list) or not row:
            raise ValueError(what)
        for sigma in row:
            if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 <= sigma <= 1:
                raise ValueError(what)
    return tuple(tuple(float(sigma) for sigma in row) for row in rows)


def _context_mode(text: str) -> str:
    if text not in CONTEXT_MODES:
        raise ValueError(f"one of {', '.join(CONTEXT_MODES)}")
    return text


_PROVENANCE_PARSERS: dict[str, Callable[[str], Any]] = {
    "frames_per_chunk": _number(1, what="a whole number of latent frames, 1 or more", kind=int),
    "steps_per_chunk": _steps,
    "sigmas": _sigma_table,
    "shift": _number(1e-6, what="a number above 0", kind=float),
    "context_mode": _context_mode,
    "context_sigma": _number(0, 1, what="a number in [0, 1]", kind=float),
    "window": _number(1, special=-1, what="a whole number of latent frames, 1 or more, or -1 for all", kind=int),
    "sink": _number(0, what="a whole number of latent frames, 0 or more", kind=int),
    "recipe": str,
    "data": str,
    "git_commit": str,
}
PROVENANCE_KEYS = tuple(_PROVENANCE_PARSERS)


def causal_settings(
    provenance: Provenance,
    *,
    frames_per_chunk: int | None = None,
    window: int | None = None,
    sink: int | None = None,
    positions: str = "auto",
    kv_cache_dtype: str = KV_CACHE_DTYPES[0],
) -> tuple[CausalSettings, tuple[str, ...]]:
    """The attention window to use: what is chosen, else what the file says, else the default; and the
    contradictions.

    frames_per_chunk, window, sink: latent frames, None to follow the file. Raises ValueError where the three
    do not fit together (see CausalSettings).
    """
    chosen = {"frames_per_chunk": frames_per_chunk, "window": window, "sink": sink}
    stated = {key: getattr(provenance, key) for key in chosen}
    merged = {key: chosen[key] if chosen[key] is not None else stated[key] for key in chosen}
    known = {key: value for key, value in merged.items() if value is not None}
    settings = CausalSettings(positions=positions, kv_cache_dtype=kv_cache_dtype, **known)
    return settings, provenance.contradictions(**chosen)
