"""Motion over time: one motion after another, each from some pixel frame of the video on.

Step t of the whole moves pixel frame t of the video to pixel frame t+1, whichever motion that step is of.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .flow import NothingValid, OpticalFlow, follow, grid, nothing_within, nowhere_through, resize
from .frames import TIME_FACTOR

_FOR_EVER = sys.maxsize


class _Part(NamedTuple):
    """A motion that says what steps `start` to `end` - 1 are; of a single step all of them."""

    start: int
    end: int
    motion: OpticalFlow


class FlowTimeline:
    """Motions that take each other's place; to those who ask for some of its steps it is one OpticalFlow.

    Each lasts until the next one begins. What is too short for that leaves its rest free (not valid), except that a
    single step is held, of the last one to the end of any clip. Before the first one nothing is said. What is held is
    one step in memory, and what is free none, however long the clip.

    Args:
        motions: (pixel frame of the video that it begins at, motion), of any size each.

    Raises:
        ValueError: no motion, one that begins before frame 0, or not behind the one before it.

    Attributes:
        steps: of the clip that it was fitted to; else until its last motion ends, or has been told once.
    """

    def __init__(self, motions: Sequence[tuple[int, OpticalFlow]]) -> None:
        if not motions:
            raise ValueError("A timeline of motions needs at least one.")
        before = None
        for start, _ in motions:
            if start < 0:
                raise ValueError(f"start is {start}; pixel frames are counted from 0, the video's first.")
            if before is not None and start <= before:
                raise ValueError(
                    f"start is {start}, and the motion before it (previous) begins at pixel frame {before}; give a "
                    f"start of {before + 1} or more."
                )
            before = start
        nexts = [start for start, _ in motions[1:]] + [_FOR_EVER]
        self._parts = [
            _Part(start, following if motion.steps == 1 else min(following, start + motion.steps), motion)
            for (start, motion), following in zip(motions, nexts, strict=True)
        ]
        start, last = motions[-1]
        self.steps = start + last.steps

    @classmethod
    def of(cls, motion: OpticalFlow | FlowTimeline) -> FlowTimeline:
        """A motion as a timeline of one from the video's first frame on; what is one already as it is."""
        return motion if isinstance(motion, FlowTimeline) else cls([(0, motion)])

    @classmethod
    def _made(cls, parts: list[_Part], steps: int) -> FlowTimeline:
        made = cls.__new__(cls)
        made._parts, made.steps = parts, steps
        return made

    @property
    def motions(self) -> list[tuple[int, OpticalFlow]]:
        """(start, motion) of each."""
        return [(part.start, part.motion) for part in self._parts]

    @property
    def height(self) -> int:
        """Pixels; the largest of the motions' where they differ, which they do not once they are fitted to a size."""
        return max(part.motion.height for part in self._parts)

    @property
    def width(self) -> int:
        """See `height`."""
        return max(part.motion.width for part in self._parts)

    @property
    def rests(self) -> bool:
        """Whether everything is told not to move from the first frame on, by all motions."""
        return self._parts[0].start == 0 and all(part.motion.rests for part in self._parts)

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, OpticalFlow | None, int]]:
        """What `count` steps from `start` on are, in order: how many they are, of which motion, and from which of its
        steps on. None: nothing is said. A motion of a single step, which is held, has them all from step 0."""
        at, stop = start, start + count
        for part in self._parts:
            if part.end <= at:
                continue
            if part.start >= stop:
                break
            if at < part.start:
                yield part.start - at, None, 0
                at = part.start
            end = min(part.end, stop)
            yield end - at, part.motion, 0 if part.motion.steps == 1 else at - part.start
            at = end
        if at < stop:
            yield stop - at, None, 0

    def held(self, start: int, count: int) -> OpticalFlow | None:
        """The motion that all of these steps are the same of, if there is one."""
        (steps, motion, _), *_ = self.pieces(start, count)
        return motion if steps == count and motion is not None and motion.is_held else None

    def told(self, start: int, count: int) -> int:
        """How many of `count` steps from `start` on say something anywhere."""
        return sum(
            steps * motion.told(0, 1) if motion.steps == 1 else motion.told(first, steps)
            for steps, motion, first in self.pieces(start, count)
            if motion is not None
        )

    def fit(self, steps: int, height: int | None = None, width: int | None = None) -> FlowTimeline:
        """The motions for a clip of another length and size, by the rules of `OpticalFlow.fit`.

        Args:
            steps: what begins behind them is left out.
            height, width: None leaves each motion its own.

        Raises:
            NothingValid: nothing valid is left; or nothing of one of the motions, at its new size.
        """
        parts = []
        for part in self._parts:
            end = min(part.end, steps)
            if end > part.start and self.told(part.start, end - part.start):
                size = height or part.motion.height, width or part.motion.width
                parts.append(_Part(part.start, end, part.motion.fit(end - part.start, *size)))
        if not parts:
            raise NothingValid(nothing_within(steps))
        return self._made(parts, steps)

    def at(self, step: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """See OpticalFlow.at."""
        ((_, motion, first),) = self.pieces(step, 1)
        if motion is None:
            return torch.zeros_like(points), torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
        return motion.at(first, points)

    def on(self, device: torch.device, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Some steps on a device; see OpticalFlow.on. Motions of different sizes are stretched to the largest of them.

        Returns:
            flow [n, H, W, 2] and valid [n, H, W], fewer than `count` beyond the last motion's end.
        """
        pieces = list(self.pieces(start, max(0, min(count, self._parts[-1].end - start))))
        among = [motion for _, motion, _ in pieces if motion is not None] or [part.motion for part in self._parts]
        height, width = max(motion.height for motion in among), max(motion.width for motion in among)
        flows, valids = [], []
        for steps, motion, first in pieces:
            if motion is None:
                flow = torch.zeros((), device=device).expand(steps, height, width, 2)
                valid = torch.zeros((), dtype=torch.bool, device=device).expand(steps, height, width)
            else:
                flow, valid = motion.on(device, first, 1 if motion.steps == 1 else steps)
                flow, valid = flow.expand(steps, -1, -1, -1), valid.expand(steps, -1, -1)
                if (motion.height, motion.width) != (height, width):
                    flow, valid = resize(flow, valid, height, width)
            flows.append(flow)
            valids.append(valid)
        if not pieces:
            return torch.zeros(0, height, width, 2, device=device), torch.zeros(0, height, width, device=device).bool()
        return (flows[0], valids[0]) if len(pieces) == 1 else (torch.cat(flows), torch.cat(valids))

    def composed(self, group: int = TIME_FACTOR) -> FlowTimeline:
        """Every `group` steps as one, see OpticalFlow.composed; of a timeline that was fitted to a size.

        Raises:
            NothingValid: nothing is valid throughout a group.
        """
        count = max(1, self._parts[-1].end // group)
        found: dict[int, _Part] = {}
        for part in self._parts:
            first, end = -(-part.start // group), min(part.end // group, count)
            within, steps = first * group - part.start, (end - first) * group
            if end > first and part.motion.told(within, steps):
                rows = slice(within, within + steps)
                whole = OpticalFlow(part.motion.flow[rows], part.motion.valid[rows])
                try:
                    found[first] = _Part(first, end, whole.composed(group))
                except NothingValid:
                    pass
            # Of these groups another motion, or none, has the other steps.
            for index in {at // group for at in (part.start, part.end) if at % group}:
                if index >= count or index in found:
                    continue
                origin = grid(self.height, self.width, part.motion.flow.device)
                flow, valid = follow(self.at, origin, range(index * group, (index + 1) * group))
                if valid.any():
                    found[index] = _Part(index, index + 1, OpticalFlow(flow[None], valid[None]))
        if not found:
            raise NothingValid(nowhere_through(group))
        return self._made([found[index] for index in sorted(found)], count)
