"""Prompts over time on ComfyUI's values: a CONDITIONING that carries its later prompts, and what a run makes of them.

The schedule lies in the dict of a CONDITIONING's first entry, which is its first prompt: nodes that know nothing of it
take that one for the whole clip.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Protocol

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diagonal_sampler.disk import sync_path, whole_file
from ..diagonal_sampler.prompt_schedule import (
    ChunkPrompt,
    PromptTime,
    context_at,
    cut_chunks,
    latest_prompt,
    parse_prompts,
    recached_chunks,
    require_order,
    require_same_length,
    require_switch,
    schedule_row,
    seen_from,
)
from ..diagonal_sampler.schedule import DiagonalSchedule

log = logging.getLogger(__name__)

SCHEDULE_KEY = "diagonal_prompt_schedule"
MAX_WAITING = 16  # prompts that have not been read yet; more are a loop gone wrong
MAX_ROWS = 20  # of the prompts in a result's message, which a node shows
ROWS_SUFFIX = ".prompts.txt"
"""Of the prompts that a video was given while it was made, as rows, beside it."""
ROWS_HEAD = "# Prompts given meanwhile, as rows of Diagonal Prompt Schedule:"
"""How they begin; a file that begins otherwise is a person's."""
NO_CUT = (
    "Switch cut of Diagonal Prompt Schedule forgets the picture before, and Diagonal Flow Conditioning in mode {mode} "
    "carries it on. Use switch recache, or the flow's mode adapter."
)
ENDED, CANCELLED = "The run ended before it could take the prompt.", "The run was cancelled."


class PromptSource:
    """The nodes that made a schedule, by id; the newest last. Not a dataclass: it says nothing of the result.

    Attributes:
        clips: the CLIP of each.
        switches: switch and blend_chunks of each.
    """

    def __init__(
        self, clips: Mapping[str, comfy.sd.CLIP], switches: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        self.clips, self.switches = dict(clips), dict(switches or {})

    def find(self, node: str | None) -> str | None:
        """The node that a request means: the last one if it names none; None if it names none of these."""
        if node is None:
            return list(self.clips)[-1]
        # A node inside a subgraph has the ids of what it lies in before its own.
        return next((known for known in self.clips if known == node or known.split(":")[-1] == node), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEntry:
    """One prompt: when it begins, its text and embedding, and how the run goes over to it.

    Attributes:
        context: [1, tokens, text_dim].
        fps: pixel frames a second, for a time in seconds.
        switch, blend_chunks: see ChunkPrompt.
    """

    at: PromptTime
    text: str
    context: Tensor
    fps: float
    switch: str
    blend_chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSchedule:
    """The prompts of a clip, in order; the first begins it."""

    entries: tuple[PromptEntry, ...]
    source: PromptSource

    def get_models(self) -> list[ModelPatcher]:
        """Those of its CLIPs. ComfyUI asks every value of a graph, to know which models its run has in use."""
        patchers = (getattr(clip, "patcher", None) for clip in self.source.clips.values())
        return [patcher for patcher in patchers if isinstance(patcher, ModelPatcher)]


def schedule_prompts(
    clip: comfy.sd.CLIP,
    text: str,
    *,
    fps: float,
    switch: str,
    blend_chunks: int,
    previous: list | None = None,
    node_id: str | None = None,
) -> list:
    """Encode rows of prompts as a CONDITIONING whose first entry is the first prompt.

    Args:
        clip: encodes now, and prompts that are given while a run goes on.
        text: see diagonal_sampler.prompt_schedule.parse_prompts.
        fps: pixel frames a second, for times in seconds.
        switch, blend_chunks: how each of these prompts follows the one before it.
        previous: a CONDITIONING to go on from: another schedule, or one prompt, which then begins the clip.
        node_id: what live prompts name.

    Raises:
        ValueError: rows that cannot be read, or prompts that cannot follow each other, with the row and the remedy.
    """
    if clip is None:
        raise ValueError("clip is empty: the checkpoint has no text encoder. Load one with Load CLIP.")
    require_switch(switch, blend_chunks)
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0 frames a second (Wan: 16).")
    rows = parse_prompts(text)
    if len(rows) == 1 and " | " in rows[0].text:
        log.warning("The text is one prompt, ' | ' included: each prompt takes a row of its own.")
    extra: dict[str, Any] = {}
    before: tuple[PromptEntry, ...] = ()
    source = PromptSource({})
    if previous is not None:
        before, extra, source = _open(previous, fps)
    elif not rows[0].at.is_start:
        raise ValueError(
            f"Row {rows[0].row} begins at {rows[0].at} and nothing comes before it; begin with a row '0: ...', or "
            "connect previous."
        )
    names = [(f"Prompt {number} of previous", entry.at) for number, entry in enumerate(before, start=1)]
    require_order([*names, *((f"Row {row.row}", row.at) for row in rows)])
    entries = list(before)
    for row in rows:
        try:
            context, found = encode(clip, row.text)
        except ValueError as error:
            raise ValueError(f"Row {row.row} ({row.at}): {error}") from error
        if entries and switch == "blend":
            require_same_length(entries[-1].context, context, row.text)
        if not entries:
            extra = found
        elif found.get("hooks") is not None and found["hooks"] is not extra.get("hooks"):
            raise ValueError(
                f"Row {row.row} ({row.at}): the CLIP carries hooks that the first prompt has not; hooks apply from the "
                "first prompt to the last. Use the same CLIP for all, or apply the LoRA to the whole MODEL."
            )
        entries.append(
            PromptEntry(at=row.at, text=row.text, context=context, fps=fps, switch=switch, blend_chunks=blend_chunks)
        )
    name = str(node_id)
    clips = {known: its for known, its in source.clips.items() if known != name} | {name: clip}
    source = PromptSource(clips, {**source.switches, name: (switch, blend_chunks)})
    schedule = PromptSchedule(entries=tuple(entries), source=source)
    return [[entries[0].context, {**extra, SCHEDULE_KEY: schedule}]]


def _open(previous: list, fps: float) -> tuple[tuple[PromptEntry, ...], dict[str, Any], PromptSource]:
    """Prompts, first entry's dict and nodes of a CONDITIONING that is gone on from."""
    if len(previous) != 1:
        raise ValueError(
            f"previous holds {len(previous)} prompts that apply at the same time; a schedule goes on from one. Combine "
            "conditionings after the schedule instead."
        )
    found = schedule_of(previous, "previous")
    context, extra = previous[0]
    extra = {key: value for key, value in extra.items() if key != SCHEDULE_KEY}
    if found is not None:
        return found.entries, extra, found.source
    first = PromptEntry(
        at=PromptTime(0), text="(from previous)", context=context, fps=fps, switch="keep", blend_chunks=1
    )
    return (first,), extra, PromptSource({})


def encode(clip: comfy.sd.CLIP, text: str) -> tuple[Tensor, dict[str, Any]]:
    """The embedding [1, tokens, text_dim] of a prompt, and what ComfyUI keeps beside it.

    Raises:
        ValueError: a text that the CLIP cannot read, or a CLIP whose hooks change over a run.
    """
    found = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(found) != 1:
        raise ValueError(
            f"The CLIP has hooks with {len(found)} keyframes; a prompt needs one embedding. Use a hook of constant "
            "strength."
        )
    return found[0][0], found[0][1]


def schedule_of(conditioning: list, name: str = "positive") -> PromptSchedule | None:
    """The schedule that a CONDITIONING carries, None without one.

    Raises:
        ValueError: several schedules, or one whose first prompt another node has changed.
    """
    found = [(context, extra[SCHEDULE_KEY]) for context, extra in conditioning if extra.get(SCHEDULE_KEY) is not None]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"The {name} conditioning combines {len(found)} prompt schedules; one run follows one. Chain them by "
            "previous of Diagonal Prompt Schedule."
        )
    ((context, schedule),) = found
    if not _is_first(context, schedule):
        raise ValueError(
            f"The {name} conditioning comes from a Diagonal Prompt Schedule, but another node has changed its first "
            "prompt (concat, average, ...), and cannot change the later ones. Put that node before previous."
        )
    return schedule


def _is_first(context: Tensor, schedule: PromptSchedule) -> bool:
    first = schedule.entries[0].context
    return context is first or (context.shape == first.shape and bool(torch.equal(context, first)))


def check_prompts(positive: list, negative: list) -> None:
    """Refuse, by name, prompt schedules that a run cannot follow.

    Raises:
        ValueError: see schedule_of; a schedule in the negative.
    """
    schedule_of(positive)
    # ConditioningZeroOut and the like keep the dict of what they empty: that is no schedule.
    for context, extra in negative:
        if extra.get(SCHEDULE_KEY) is not None and _is_first(context, extra[SCHEDULE_KEY]):
            raise ValueError(
                "The negative conditioning is a prompt schedule; only the positive one changes over time. Use CLIP "
                "Text Encode for the negative."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePrompt:
    """A prompt that was given while the run went on, from `chunk` (from 0) on; `node` names its CLIP."""

    chunk: int
    text: str
    node: str
    switch: str
    blend_chunks: int


def schedule_rows(live: Sequence[LivePrompt], most: int | None = MAX_ROWS) -> str:
    """Prompts as rows of Diagonal Prompt Schedule, with a comment before those that switch in one way; empty for none.

    Of those of one chunk the last counts.

    Args:
        most: rows; a comment says how many more there are. None is all.
    """
    prompts = sorted({prompt.chunk: prompt for prompt in live}.values(), key=lambda prompt: prompt.chunk)
    if not prompts:
        return ""
    lines = [ROWS_HEAD]
    for switch, group in groupby(prompts[:most], _switch_text):
        # A row is one line, whatever was sent.
        rows = (f"chunk {prompt.chunk + 1}: {' '.join(prompt.text.split())}" for prompt in group)
        lines += [f"# switch: {switch}", *rows]
    if most is not None and len(prompts) > most:
        lines.append(f"# and {len(prompts) - most} more, in the file {ROWS_SUFFIX} beside the video")
    return "\n".join(lines)


def _switch_text(prompt: LivePrompt) -> str:
    """The widgets of a node that switches so."""
    return f"blend, blend_chunks: {prompt.blend_chunks}" if prompt.switch == "blend" else prompt.switch


def save_rows(path: Path, live: Sequence[LivePrompt]) -> bool:
    """Write all prompts that a video was given as rows, on the disk; whether nothing of them is lost.

    A file of this name that does not begin with ROWS_HEAD stays. That, and what the disk refuses, is said.
    """
    if not live:
        return True
    try:
        if path.exists() and not _is_rows(path):
            log.warning("%s is no list of prompts of ours and stays as it is: this video's are not written.", path.name)
            return False
        with whole_file(path) as part:
            part.write_text(schedule_rows(live, most=None) + "\n", encoding="utf-8", errors="replace")
        sync_path(path.parent)
    except OSError as error:
        log.warning("The prompts %s cannot be written: %s", path.name, error)
        return False
    return True


def _is_rows(path: Path) -> bool:
    """Whether a file is one of save_rows. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(ROWS_HEAD)) == ROWS_HEAD.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptNow:
    """What chunk `chunk` (from 0) of `chunks` is conditioned on."""

    chunk: int
    chunks: int
    text: str


class NotSteerable(RuntimeError):
    """The run takes no prompt any more: it has ended, is in its last chunk, or is too far behind."""


@dataclass(slots=True, kw_only=True)
class PromptRequest:
    """A prompt on its way into a run. `answer` gets the LivePrompt, or ValueError or NotSteerable."""

    text: str
    node: str
    switch: str | None = None
    blend_chunks: int | None = None
    answer: Future[LivePrompt]


class PromptBox:
    """Where other threads leave prompts for one run, which reads them between two forwards.

    Args:
        on_chunk: called in the sampling thread when a chunk begins.

    Attributes:
        on_taken: called there with all prompts that the run was given, before the newest is answered.
    """

    def __init__(self, on_chunk: Callable[[PromptNow], None] | None = None) -> None:
        self.on_chunk = on_chunk
        self.on_taken: Callable[[Sequence[LivePrompt]], None] | None = None
        self._lock = threading.Lock()
        self._waiting: list[PromptRequest] = []
        self._closed = False

    def post(self, request: PromptRequest) -> None:
        """Leave a prompt. Raises NotSteerable."""
        with self._lock:
            if self._closed:
                raise NotSteerable("The run has just ended; queue it again.")
            if len(self._waiting) >= MAX_WAITING:
                raise NotSteerable(f"{MAX_WAITING} prompts wait already; wait until the run has read them.")
            request.answer.set_running_or_notify_cancel()  # nobody cancels it from here on
            self._waiting.append(request)

    def take(self) -> list[PromptRequest]:
        """Those that wait, oldest first; they are the caller's then."""
        if not self._waiting:  # a list's truth needs no lock, and this is asked at every forward
            return []
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken

    def close(self) -> None:
        """End it, and say so to all that wait."""
        with self._lock:
            self._closed = True
            taken, self._waiting = self._waiting, []
        for request in taken:
            request.answer.set_exception(NotSteerable(ENDED))


class ConditionSetter(Protocol):
    """Puts a text embedding into the run's conditions."""

    def __call__(self, context: Tensor, /) -> None: ...


class PromptRun:
    """One run's prompts: which one each chunk has, and those that come while it goes on.

    Args:
        schedule: from the positive conditioning.
        chunks, frames_per_chunk, context_frames: of the clip; the last two in latent frames.
        set_context: puts an embedding into the run's conditions.
        recache_forwards: (chunk, the last cut before it or None) -> forwards that writing its window again takes.
        levels: the run's schedule, whose steps begin anew at a recache and a cut; None where every chunk has its own.
        refused_cut: why a cut cannot be; empty where it can.
        box: where live prompts come from.
        after_encoding: called when the CLIP has been used, which may have pushed the model out of memory.
        first_chunk: the run begins here; what only earlier chunks show is not encoded.
        first_has_begun: an earlier run had begun that chunk and given up its window: live prompts begin behind it.
        live: prompts that an earlier part of this run was given.
    """

    def __init__(
        self,
        schedule: PromptSchedule,
        *,
        chunks: int,
        frames_per_chunk: int,
        context_frames: int,
        set_context: ConditionSetter,
        recache_forwards: Callable[[int, int | None], int],
        levels: DiagonalSchedule | None = None,
        refused_cut: str = "",
        box: PromptBox | None = None,
        after_encoding: Callable[[], None] = lambda: None,
        first_chunk: int = 0,
        first_has_begun: bool = False,
        live: Sequence[LivePrompt] = (),
    ) -> None:
        self.schedule, self.box = schedule, box
        self._chunks = chunks
        self._set, self._recache_forwards, self._after_encoding = set_context, recache_forwards, after_encoding
        self._levels, self._refused_cut = levels, refused_cut
        self._next = first_chunk + first_has_begun  # the chunk that the next live prompt can begin with
        self._current: Tensor | None = None
        self.live = list(live)
        written = _resolve(schedule, chunks, frames_per_chunk, context_frames)
        known = sorted([*written, *live], key=lambda prompt: prompt.chunk)
        self._recached, self._cuts = recached_chunks(known), cut_chunks(known)
        self._require_cuts(self._cuts)
        self._count()
        # The chunk before the first is what a live prompt would blend from.
        seen = known[seen_from(known, max(0, first_chunk - 1)) :]
        self._prompts = [self._encode(prompt) if isinstance(prompt, LivePrompt) else prompt for prompt in seen]
        if any(isinstance(prompt, LivePrompt) for prompt in seen):
            self._after_encoding()
        self._behind_given = context_frames > 0
        if self._behind_given and first_chunk == 0 and recached_chunks(known, 0)[:1] == [0]:
            # The given frames are written before the first chunk begins: at once under what it shows.
            self._show(0)

    def forwards_before(self, chunk: int) -> int:
        """Those of `extra_forwards` that the chunks before `chunk` took."""
        return sum(forwards for at, forwards in self._costs.items() if at < chunk)

    def _require_cuts(self, cuts: Sequence[int]) -> None:
        """Raises ValueError where there are cuts in a run that cannot have any."""
        if cuts and self._refused_cut:
            raise ValueError(self._refused_cut)

    def last_cut(self, chunk: int) -> int | None:
        """The last chunk before `chunk` that is cut to; None without one."""
        before = bisect_left(self._cuts, chunk)
        return self._cuts[before - 1] if before else None

    def cuts(self, chunk: int) -> bool:
        """Whether all is to be forgotten before `chunk`, which `begin` was called with."""
        return chunk in self._cuts

    def _count(self) -> None:
        """Forwards that all known recaches take, and the steps that begin anew: by chunk, and in all."""
        self._costs = {chunk: self._recache_forwards(chunk, self.last_cut(chunk)) for chunk in self._recached}
        self._begun = sorted([*self._recached, *self._cuts])
        if (levels := self._levels) is not None:
            for chunk, end in pairwise([*self._begun, self._chunks]):
                for at in range(chunk, min(end, chunk + len(levels.sigmas) - 1)):
                    self._costs[at] = self._costs.get(at, 0) + levels.steps(at - chunk) - levels.steps(at)
        self.extra_forwards = sum(self._costs.values())

    def schedule_row(self, chunk: int) -> int:
        """The chunk whose steps chunk `chunk` takes."""
        return chunk if self._levels is None else schedule_row(self._begun, chunk)

    def begin(self, chunk: int) -> bool:
        """Condition the run on what `chunk` shows; whether its window is to be written again first."""
        self._next = max(self._next, chunk)
        self.listen()
        self._next = chunk + 1
        self._forget_before(chunk)
        self._show(chunk)
        if self.box is not None and self.box.on_chunk is not None:
            self.box.on_chunk(
                PromptNow(
                    chunk=chunk,
                    chunks=self._chunks,
                    text=self._prompts[latest_prompt(self._prompts, chunk)].text,
                )
            )
        return chunk in self._recached

    def _show(self, chunk: int) -> None:
        """Condition the run on what `chunk` shows."""
        context = context_at(self._prompts, chunk)
        if context is not self._current:
            self._set(context)
            self._current = context

    def listen(self) -> None:
        """Take live prompts; they begin with the next chunk.

        Whatever a tokenizer or a text encoder raises is about its text: the run goes on without it. What ends the run
        (a Cancel, a model that cannot be loaded again) answers all that wait.
        """
        requests = [] if self.box is None else self.box.take()
        for number, request in enumerate(requests):
            try:
                self._take(request)
            except BaseException as error:
                cancelled = isinstance(error, comfy.model_management.InterruptProcessingException)
                for unanswered in requests[number:]:
                    unanswered.answer.set_exception(NotSteerable(CANCELLED if cancelled else ENDED))
                raise

    def _take(self, request: PromptRequest) -> None:
        """Take a live prompt and answer it. What is raised ends the run, and it is not answered yet."""
        if self._next >= self._chunks:
            request.answer.set_exception(NotSteerable("The last chunk is being made: nothing comes after it."))
            return
        last, source = self.schedule.entries[-1], self.schedule.source
        switch, blend_chunks = source.switches.get(request.node, (last.switch, last.blend_chunks))
        prompt = LivePrompt(
            chunk=self._next,
            text=request.text,
            node=request.node,
            switch=request.switch or switch,
            blend_chunks=request.blend_chunks or blend_chunks,
        )
        refused: Exception | None = None
        try:
            self._add(prompt)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            refused = error
        self._after_encoding()  # also where it failed, which may have been behind the loading of the text encoder
        if refused is not None:
            request.answer.set_exception(refused)
            return
        if self.box.on_taken is not None:
            self.box.on_taken(self.live)
        log.info("From chunk %d of %d: %s", prompt.chunk + 1, self._chunks, prompt.text)
        request.answer.set_result(prompt)

    def _add(self, prompt: LivePrompt) -> None:
        added = self._encode(prompt)
        self._require_cuts(cut_chunks([added]))
        # Of the prompts of one chunk the last counts: this one.
        prompts = sorted([*self._prompts, added], key=lambda known: known.chunk)
        for known in prompts:
            if known.switch == "blend" and known.chunk >= added.chunk:
                context_at(prompts, known.chunk)  # refuses a blend that cannot be, before anything has changed
        self._prompts = prompts
        recached, cuts = ({chunk for chunk in kept if chunk != added.chunk} for kept in (self._recached, self._cuts))
        # Its own switch counts there.
        self._recached = sorted(recached.union(recached_chunks([added], 0 if self._behind_given else 1)))
        self._cuts = sorted(cuts.union(cut_chunks([added])))
        self._count()
        self.live.append(prompt)

    def _encode(self, prompt: LivePrompt) -> ChunkPrompt:
        clip = self.schedule.source.clips.get(prompt.node, list(self.schedule.source.clips.values())[-1])
        context, _ = encode(clip, prompt.text)
        return ChunkPrompt(
            chunk=prompt.chunk,
            text=prompt.text,
            context=context,
            switch=prompt.switch,
            blend_chunks=prompt.blend_chunks,
        )

    def _forget_before(self, chunk: int) -> None:
        """Drop embeddings that no chunk from `chunk` on shows: a run may be given thousands of prompts."""
        prompts = self._prompts[seen_from(self._prompts, chunk) :]
        latest = latest_prompt(prompts, chunk)
        if latest > 1:  # blends that began within blends: what the newest of them goes over from is one embedding
            before = prompts[latest].chunk - 1
            context = context_at(prompts, before)
            prompts[:latest] = [ChunkPrompt(chunk=before, text="", context=context, switch="keep")]
        self._prompts = prompts


def _resolve(schedule: PromptSchedule, chunks: int, frames_per_chunk: int, context_frames: int) -> list[ChunkPrompt]:
    """The prompts by chunk, with warnings for those that no chunk shows."""
    found: list[ChunkPrompt] = []
    for number, entry in enumerate(schedule.entries):
        chunk = 0 if number == 0 else entry.at.chunk(entry.fps, frames_per_chunk, context_frames)
        if chunk >= chunks:
            log.warning(
                "The prompt at %s (%r) comes after the end: the video has %d chunks.", entry.at, entry.text, chunks
            )
            continue
        found.append(
            ChunkPrompt(
                chunk=chunk,
                text=entry.text,
                context=entry.context,
                switch=entry.switch,
                blend_chunks=entry.blend_chunks,
            )
        )
    found.sort(key=lambda prompt: prompt.chunk)  # seconds and chunks may alternate
    for first, second in zip(found, found[1:], strict=False):
        if first.chunk == second.chunk:
            log.warning(
                "%r and %r begin in the same chunk, %d; the second counts.", first.text, second.text, 1 + first.chunk
            )
    for prompt in found:
        if prompt.switch == "blend":
            context_at(found, prompt.chunk)  # refuses lengths that cannot be blended before the run begins
    return found
