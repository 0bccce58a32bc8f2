"""The rows of docs/reliability.md: how many cases each has, and how they are run, counted and kept.

Case k of a row is made from k alone, so that a failure is repeated by its number: FAULTS_CASE=k. The environment says
how many cases run: nothing for a few (every change), FAULTS=full for all, FAULTS=N for N. With FAULTS_RESULTS, a
folder, what was measured is written there as ROW.json; tests/faults/run.py sets it and makes the page.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST_REPORTED = 5  # failed cases that are told in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        file: below tests/faults.
        what: is done to the pack.
        holds: what must be true after every case.
        full, quick: cases of a full run, and of one on every change.
        unit: of `worst`, and what was timed.
    """

    file: str
    what: str
    holds: str
    full: int
    quick: int
    unit: str = "s a case"


def _row(file: str, what: str, full: int, quick: int, holds: str, unit: str = "s a case") -> Row:
    return Row(file=file, what=what, holds=holds, full=full, quick=quick, unit=unit)


POINTS = 27
"""Of a run of six chunks, diagonal 4-3-2: 15 forwards, 6 decodes, 6 saves."""

ROWS: dict[str, Row] = {
    "checkpoints": _row(
        "test_checkpoints.py",
        "malformed checkpoints: headers that lie, wrong shapes, overlaps, stride-0 giants, whole numbers, NaN, "
        "payloads, cut files, and LoRAs",
        1000,
        60,
        "an error that names the file, and the key where one is at fault; no code run, nothing loaded half, under 5 s",
        "s to the refusal",
    ),
    "prompt_bodies": _row(
        "test_prompt_bodies.py",
        "malformed /prompt bodies made from /object_info",
        2000,
        50,
        "400 or an execution error; a sentinel graph succeeds after every 50",
    ),
    "hostile_inputs": _row(
        "test_hostile_strings.py",
        "hostile strings (.., absolute, NUL, symlink, UNC, CRLF) in every text input, 200 each",
        1400,
        28,
        "no file outside ComfyUI's folders; the server lives",
    ),
    "hostile_batches": _row(
        "test_hostile_strings.py",
        "the same in queue_batch's prompts, names and log",
        200,
        6,
        "no file outside the folders it was given",
    ),
    "cancel": _row(
        "test_points.py",
        "cancel at every forward, decode and save of 6 chunks in three formats, and at 200 random moments",
        POINTS * 3 + 200,
        5,
        "no forward begins after it, and the run ends within 0.25 s of the one under way (5 s where not all cases "
        "run); the file plays; the next run leaves the file of a run never cancelled",
        "s beyond one forward",
    ),
    "out_of_memory": _row(
        "test_out_of_memory.py",
        "out of memory at each of those points, in a server",
        POINTS,
        3,
        "ComfyUI's own message; models unloaded; the next run is bit-identical",
    ),
    "nan": _row(
        "test_points.py",
        "NaN or Inf at each of those points",
        POINTS,
        4,
        "an error that names chunk and step; no black frame written; the next run goes on",
    ),
    "kill_saving": _row(
        "test_kill.py",
        "kill -9 while saving",
        100,
        2,
        "the file plays; at most 1 announced frame lost; resumed, it equals a run never killed",
        "announced frames lost",
    ),
    "soak_chunks": _row(
        "test_soak.py",
        "one stream of 1,000 chunks",
        1000,
        30,
        "memory within 50 MB, threads and handles flat, the last tenth of chunks no slower than the first",
        "MB of growth",
    ),
    "soak_prompts": _row(
        "test_soak.py",
        "100 prompts in one server",
        100,
        6,
        "memory within 50 MB, threads and handles flat",
        "MB of growth",
    ),
    "server_restart": _row(
        "test_servers.py",
        "the server killed in mid-run and started again",
        20,
        1,
        "it comes back, resumes, equals a run never stopped, leaves no lock",
    ),
    "two_clients": _row(
        "test_servers.py",
        "two clients, interleaved",
        50,
        2,
        "each result bit-identical to alone; cancelling one spares the other",
    ),
    "oversize": _row(
        "test_oversize.py",
        "oversize requests: 16384 squared, a million chunks",
        50,
        12,
        "refused in under 1 s with the number that would fit",
        "s to the refusal",
    ),
    "swaps": _row(
        "test_swaps.py",
        "load, unload, LoRA and dtype swaps",
        50,
        6,
        "outputs identical, memory returns",
        "MB of growth",
    ),
    "train_kill": _row(
        "test_training.py", "training: kill -9", 20, 1, "resumes; equals a run never killed; no checkpoint lost"
    ),
    "train_disk": _row(
        "test_training.py", "training: full disk", 20, 1, "one line; the last checkpoint whole; resumes"
    ),
    "train_nan": _row("test_training.py", "training: NaN", 20, 1, "one line; the last checkpoint whole; resumes"),
    "train_rank": _row(
        "test_training.py", "training: a lost rank of two", 20, 1, "ends; the last checkpoint whole; one rank resumes"
    ),
}


def wanted_cases(row: str) -> range:
    """Which cases to run now."""
    if only := os.environ.get("FAULTS_CASE"):
        return range(int(only), int(only) + 1)
    asked = os.environ.get("FAULTS", "")
    count = ROWS[row].full if asked == "full" else int(asked or ROWS[row].quick)
    return range(min(count, ROWS[row].full))


def in_full(row: str) -> bool:
    """Whether every case of a row is wanted. FAULTS=full holds for one FAULTS_CASE, too: it repeats one of them."""
    return os.environ.get("FAULTS") == "full" or len(wanted_cases(row)) == ROWS[row].full


def generator(row: str, case: int) -> random.Random:
    """The random numbers of one case: the same on every machine."""
    return random.Random(f"{row} {case}")


class Tally:
    """Runs the cases of one row and keeps the score."""

    def __init__(self, row: str) -> None:
        self.row = row
        self.ran = 0
        self.failed: dict[int, str] = {}
        self.worst: float | None = None

    def case(self, number: int, check: Callable[[int], float | None]) -> None:
        """Run one case. It fails by raising; it may return what is to be reported instead of its time."""
        began = time.perf_counter()
        try:
            measured = check(number)
        except Exception as error:  # the cases after it are run too; all are told at the end
            self.failed[number] = f"{type(error).__name__}: {error}"
            measured = None
        else:
            measured = time.perf_counter() - began if measured is None else measured
        self.ran += 1
        self.measured(measured)

    def measured(self, value: float | None) -> None:
        """Keep the worst."""
        if value is not None:
            self.worst = value if self.worst is None else max(self.worst, value)

    def keep(self) -> None:
        """Write the row's result, if there is a place for it."""
        folder = os.environ.get("FAULTS_RESULTS")
        if not folder or os.environ.get("FAULTS_CASE"):
            return
        result = {
            "asked": ROWS[self.row].full,
            "ran": self.ran,
            "held": self.ran - len(self.failed),
            "failed": {str(case): text[:300] for case, text in self.failed.items()},
            "worst": self.worst,
            "unit": ROWS[self.row].unit,
            "date": date.today().isoformat(),
            "device": device(),
        }
        write_whole(Path(folder) / f"{self.row}.json", json.dumps(result, indent=1) + "\n")

    def require_none_failed(self) -> None:
        """Raise AssertionError with the first failures."""
        told = [f"case {case}: {text}" for case, text in list(self.failed.items())[:MOST_REPORTED]]
        assert not self.failed, f"{len(self.failed)} of {self.ran} cases of {self.row!r} failed:\n" + "\n".join(told)


def run_cases(row: str, check: Callable[[int], float | None], after: Callable[[int], None] | None = None) -> None:
    """Run a row's cases one after another, keep the result, and fail if one failed.

    after: called behind every case with its number; it is not timed, and counts as a part of the case.
    """
    tally = Tally(row)
    try:
        for number in wanted_cases(row):
            tally.case(number, check)
            if after is not None and number not in tally.failed:
                try:
                    after(number)
                except Exception as error:
                    tally.failed[number] = f"{type(error).__name__}: {error}"
    finally:
        tally.keep()
    tally.require_none_failed()


def write_whole(path: Path, text: str) -> None:
    """Write a file in one piece: it is never there half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def device() -> str:
    """The machine, in words that say nothing of whose it is."""
    import torch

    name = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{name or platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__.partition('+')[0]}"
    )


def snapshot(folder: Path, inside: tuple[Path, ...] = (), *, skip: re.Pattern[str] | None = None) -> dict[str, Any]:
    """Every file and link below a folder but for `inside` and what lies below: its size, change time, or target.

    skip: names of files and folders, at any depth, that are left out, too.
    """

    def left_out(path: Path) -> bool:
        return path in inside or (skip is not None and skip.fullmatch(path.name) is not None)

    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if not left_out(here / name)]
        for name in [*files, *(name for name in folders if (here / name).is_symlink())]:
            path = here / name
            if left_out(path):
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since: another program's
                stat = path.lstat()
                found[str(path)] = os.readlink(path) if path.is_symlink() else (stat.st_size, stat.st_mtime_ns)
        found[place] = "folder"
    return found
