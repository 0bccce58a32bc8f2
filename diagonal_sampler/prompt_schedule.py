"""Prompts over time: how rows are read, which chunk a time is in, and what each chunk is conditioned on."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .frames import TIME_FACTOR

SWITCHES = ("recache", "keep", "blend", "cut")
UNITS = ("seconds", "chunk")
MAX_TIME = 1e9
_WORDS = {
    1.0: ("", "s", "sec", "secs", "second", "seconds"),
    60.0: ("m", "min", "mins", "minute", "minutes"),
    3600.0: ("h", "hour", "hours"),
}
_SECONDS = {word: seconds for seconds, words in _WORDS.items() for word in words}
_BYTE_ORDER_MARK = "\ufeff"  # what some editors begin a file with
_WIDE_COLON = "\uff1a"  # of Chinese keyboards
_COLON = f"[:{_WIDE_COLON}]"
_TIME = re.compile(r"(?P<chunk>chunk\s*)?(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_CLOCK = re.compile(rf"(?P<time>(\d+{_COLON})?\d+{_COLON}\d\d)\s*{_COLON}(?P<prompt>.*)")
_CLOCK_ALONE = re.compile(rf"(\d+{_COLON})?\d+{_COLON}\d\d(?=\s+[^\s:{_WIDE_COLON}])")
GRAMMAR = (
    "Write a time, a colon and a prompt in each row, such as '0: a red circle moves right', '5s: ...', '1.5m: ...', "
    "'1:30: ...' or 'chunk 12: ...' (seconds, minutes; chunks count from 1)."
)


@dataclass(frozen=True, slots=True)
class PromptTime:
    """When a prompt begins: `value` in seconds from 0, or a chunk counted from 1 (of those that are made)."""

    value: float
    unit: str = "seconds"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}; choose one of {', '.join(UNITS)}.")
        if self.unit == "chunk" and not (self.value >= 1 and float(self.value).is_integer()):
            raise ValueError(f"chunk is {self.value:g}; chunks are whole numbers and count from 1.")
        if not 0 <= self.value <= MAX_TIME:
            raise ValueError(f"The time is {self.value:g}; it must be from 0 to {MAX_TIME:g}.")

    def __str__(self) -> str:
        # As many digits as MAX_TIME has, so that none has an exponent.
        return f"chunk {self.value:.10g}" if self.unit == "chunk" else f"{self.value:.10g}s"

    @property
    def is_start(self) -> bool:
        """Whether it is the beginning of the clip."""
        return self.value == (1 if self.unit == "chunk" else 0)

    def chunk(self, fps: float, frames_per_chunk: int, context_frames: int = 0) -> int:
        """The chunk, counted from 0, that begins with this prompt: of a time, the one that shows that moment.

        Args:
            fps: pixel frames a second.
            context_frames: latent frames that are given at the start; times within them are in chunk 0.
        """
        if self.unit == "chunk":
            return int(self.value) - 1
        pixel_frame = math.floor(self.value * fps + 1e-6)
        latent_frame = -(-pixel_frame // TIME_FACTOR)  # the first holds one pixel frame, each other four
        return max(0, latent_frame - context_frames) // frames_per_chunk


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row: its number in the text, from 1, its time and its prompt."""

    row: int
    at: PromptTime
    text: str


def parse_prompts(text: str) -> tuple[PromptRow, ...]:
    """Read rows of times and prompts; empty rows and rows that begin with # are skipped.

    A single row that does not begin with a time is a prompt from the start on, colons or not, so that a list of
    ordinary prompts (queue_batch.py's) can be put here. There "16:9", without a unit or a space, is no time.

    A colon behind a time may be a full-width one (U+FF1A).

    Raises:
        ValueError: a row that cannot be read, with its number.
    """
    lines = [
        (number, line.strip().removeprefix(_BYTE_ORDER_MARK).lstrip())
        for number, line in enumerate(text.splitlines(), start=1)
    ]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if len(lines) == 1 and not _begins_with_a_time(lines[0][1]):
        return (PromptRow(lines[0][0], PromptTime(0), lines[0][1]),)
    rows: list[PromptRow] = []
    for number, line in lines:
        if (alone := _CLOCK_ALONE.match(line)) is not None:
            raise ValueError(
                f"Row {number} begins with {alone[0]!r} and no colon behind it. Write '{alone[0]}: ...', or a blank "
                f"behind the first colon where the prompt begins with a number. {GRAMMAR}"
            )
        clock = _CLOCK.fullmatch(line)
        if clock is not None:
            parts = re.split(_COLON, clock["time"])
            if (digit := clock["prompt"][:1]).isdigit():
                time = ":".join(parts)
                raise ValueError(
                    f"Row {number} begins with '{time}:{digit}', whose time may end at either colon. Write '{time}: "
                    f"{digit}...' or '{parts[0]}: {':'.join(parts[1:])}:{digit}...', with a blank behind the colon "
                    f"that ends the time. {GRAMMAR}"
                )
            head, prompt, unit = clock["time"], clock["prompt"], "seconds"
            value = sum(float(part) * 60**place for place, part in enumerate(reversed(parts)))
        else:
            head, colon, prompt = _parted(line)
            found = _TIME.fullmatch(head.strip())
            if not colon or found is None:
                belongs = "this row belongs to the prompt above" if rows else "it goes on in the rows below"
                raise ValueError(
                    f"Row {number} is {_short(line)!r}, which does not begin with a time and a colon. {GRAMMAR}"
                    + (f" A prompt is one row: if {belongs}, put it all on one line." if len(lines) > 1 else "")
                )
            word = found["unit"].lower()
            if found["chunk"] and word or word not in _SECONDS:
                raise ValueError(
                    f"Row {number} begins with {head.strip()!r}, whose unit {word!r} is unknown. {GRAMMAR}"
                )
            unit = "chunk" if found["chunk"] else "seconds"
            value = float(found["number"]) * _SECONDS[word]
        try:
            at = PromptTime(value, unit)
        except ValueError as error:
            raise ValueError(f"Row {number} begins with {head.strip()!r}: {error} {GRAMMAR}") from None
        if not prompt.strip():
            raise ValueError(f"Row {number} ({at}) has no prompt behind its colon. {GRAMMAR}")
        rows.append(PromptRow(number, at, prompt.strip()))
    if not rows:
        raise ValueError(f"text has no prompt. {GRAMMAR}")
    return tuple(rows)


def _parted(line: str) -> tuple[str, str, str]:
    """A row before, at and behind the colon that ends its time: the first one, or a full-width one behind a time."""
    head, colon, prompt = line.partition(_WIDE_COLON)
    return (head, colon, prompt) if _TIME.fullmatch(head.strip()) else line.partition(":")


def _begins_with_a_time(line: str) -> bool:
    """Whether the only row seems to be meant so."""
    if _CLOCK.fullmatch(line):
        return True
    head, colon, prompt = _parted(line)
    found = _TIME.fullmatch(head.strip())
    if not colon or found is None:
        return bool(colon) and not any(letter.isalpha() for letter in head)
    unit = found["unit"].lower()
    return unit in _SECONDS and (bool(unit or found["chunk"]) or not prompt[:1].isdigit())


def require_order(times: Sequence[tuple[str, PromptTime]]) -> None:
    """Check that times of one unit rise.

    Args:
        times: what a person calls it, such as "row 3", and the time.

    Raises:
        ValueError: naming the first two that do not.
    """
    latest: dict[str, tuple[str, PromptTime]] = {}
    for name, at in times:
        before = latest.get(at.unit)
        if before is not None and at.value <= before[1].value:
            raise ValueError(
                f"{name} ({at}) comes after {before[0]} ({before[1]}); times must rise from prompt to prompt. Move it, "
                "or change its time."
            )
        latest[at.unit] = (name, at)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


class PromptPlace(Protocol):
    """Where a prompt begins and how; see ChunkPrompt, which has its embedding besides."""

    @property
    def chunk(self) -> int: ...
    @property
    def switch(self) -> str: ...
    @property
    def blend_chunks(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPrompt:
    """A prompt from one chunk on.

    Attributes:
        chunk: counted from 0.
        text: the prompt.
        context: [1, tokens, text_dim] its embedding.
        switch: "recache" has the window's keys and values written again under it, "keep" leaves them, "blend" leaves
            them and goes over from the prompt before in steps, "cut" forgets all that came before.
        blend_chunks: chunks with a mixture, at least 1; no effect on the others.
    """

    chunk: int
    text: str
    context: Tensor
    switch: str = "recache"
    blend_chunks: int = 1

    def __post_init__(self) -> None:
        require_switch(self.switch, self.blend_chunks)


def require_switch(switch: str, blend_chunks: int) -> None:
    """Raises ValueError for an unknown switch or less than one chunk to blend over."""
    if switch not in SWITCHES:
        raise ValueError(f"switch is {switch!r}; choose one of {', '.join(SWITCHES)}.")
    if blend_chunks < 1:
        raise ValueError(f"blend_chunks is {blend_chunks}; it must be at least 1.")


def context_at(prompts: Sequence[ChunkPrompt], chunk: int) -> Tensor:
    """What chunk `chunk` is conditioned on: [1, tokens, text_dim].

    In a blend over n chunks the embeddings are interpolated linearly: its chunk j, from 0, is (j+1)/(n+1) the new
    prompt, the rest what the chunk before the switch was conditioned on; from its chunk n on, the new one alone.

    Args:
        prompts: in the order of their chunks, the first of chunk 0; of those of one chunk, the last counts. Those
            before `seen_from` may be missing.
    """
    blends: list[tuple[ChunkPrompt, float]] = []  # the newest first
    prompt = prompts[latest_prompt(prompts, chunk)]
    while _blends_at(prompt, chunk):
        blends.append((prompt, (chunk - prompt.chunk + 1) / (prompt.blend_chunks + 1)))
        chunk = prompt.chunk - 1
        prompt = prompts[latest_prompt(prompts, chunk)]
    context = prompt.context
    for prompt, weight in reversed(blends):
        require_same_length(context, prompt.context, prompt.text)
        context = torch.lerp(context, prompt.context, weight)
    return context


def seen_from(prompts: Sequence[PromptPlace], chunk: int) -> int:
    """Index of the first prompt that chunk `chunk` or a later one is conditioned on; see `context_at`."""
    latest = latest_prompt(prompts, chunk)
    while _blends_at(prompts[latest], chunk):
        chunk = prompts[latest].chunk - 1
        latest = latest_prompt(prompts, chunk)
    return latest


def latest_prompt(prompts: Sequence[PromptPlace], chunk: int) -> int:
    """Index of the last prompt that begins with chunk `chunk` or before it; -1 where none does."""
    return bisect_right(prompts, chunk, key=lambda prompt: prompt.chunk) - 1


def _blends_at(prompt: PromptPlace, chunk: int) -> bool:
    """Whether chunk `chunk`, at or after the prompt's own, still shows something of the prompt before."""
    return prompt.switch == "blend" and prompt.chunk > 0 and chunk - prompt.chunk < prompt.blend_chunks


def require_same_length(before: Tensor, context: Tensor, text: str) -> None:
    """Raises ValueError where two embeddings cannot be blended."""
    if before.shape != context.shape:
        raise ValueError(
            f"The prompt {_short(text)!r} has {context.shape[1]} tokens and the one before it {before.shape[1]}: only "
            "prompts of equal length can be blended. Use switch recache or keep, or shorten the longer prompt."
        )


def recached_chunks(prompts: Iterable[PromptPlace], first: int = 1) -> list[int]:
    """The chunks before which the window is written again, rising.

    Args:
        first: the earliest that has something in its window; 0 behind given frames.
    """
    return _chunks_of(prompts, first, "recache")


def cut_chunks(prompts: Iterable[PromptPlace]) -> list[int]:
    """The chunks before which all is forgotten, rising; never the first, which nothing of a video comes before."""
    return _chunks_of(prompts, 1, "cut")


def _chunks_of(prompts: Iterable[PromptPlace], first: int, switch: str) -> list[int]:
    last = {prompt.chunk: prompt.switch for prompt in prompts}  # of those of one chunk, the last counts
    return sorted(chunk for chunk, its in last.items() if chunk >= first and its == switch)


def schedule_row(begun: Sequence[int], chunk: int) -> int:
    """The chunk, from 0, whose steps of the schedule chunk `chunk` takes: from the last of `begun` on, anew.

    What a new prompt shows is decided in the chunks behind it, as a clip's is in its first ones.

    Args:
        begun: chunks of `recached_chunks` and `cut_chunks`, rising.
    """
    before = bisect_right(begun, chunk)
    return chunk - begun[before - 1] if before else chunk
