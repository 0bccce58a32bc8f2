"""Long use: one stream of many chunks, and many prompts to one server. Nothing grows, nothing slows down."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from pathlib import Path

import fault_rows
import node_graphs
import pytest

GROWTH_MB = 50.0
SLOWER = 1.1  # medians of processor time differ by a few percent from one run to the next
SLOWER_OF_FEW = 1.3  # medians of fewer than 20 chunks, beside other work
FPS, CHUNK_FRAMES = 16, 12

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and handles are read from /proc")


def state_of(process: str = "self") -> dict[str, float]:
    """Resident memory in MB, threads and open files of a process."""
    lines = (Path("/proc") / process / "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        "memory": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": len(os.listdir(Path("/proc") / process / "fd")),
    }


def judge(row: str, ran: int, early: dict[str, float], late: dict[str, float], slower: str = "") -> None:
    """Keep and judge one soak: `ran` counts its chunks or prompts."""
    tally = fault_rows.Tally(row)
    tally.ran = ran
    growth = late["memory"] - early["memory"]
    tally.measured(growth)
    problems = [slower] if slower else []
    if growth > GROWTH_MB:
        problems.append(f"memory grew by {growth:.0f} MB")
    problems += [f"{name} grew from {early[name]:.0f} to {late[name]:.0f}" for name in ("threads", "files")
                 if late[name] > early[name]]  # fmt: skip
    if problems:
        tally.failed[ran - 1] = "; ".join(problems)
    tally.keep()
    tally.require_none_failed()


def test_row_soak_chunks(six_chunks):
    chunks = len(fault_rows.wanted_cases("soak_chunks"))
    tenth = max(5, chunks // 10)
    states: list[dict[str, float]] = []
    used: list[float] = []  # processor seconds, which other programs do not change
    last = -1

    def watch(progress) -> None:
        nonlocal last
        if progress.chunk != last:
            last = progress.chunk
            used.append(time.process_time())
            states.append(state_of())

    six_chunks.run("soak", seconds=(chunks * CHUNK_FRAMES - 3) / FPS, on_progress=watch)
    assert len(used) == chunks
    times = [after - before for before, after in zip(used, used[1:], strict=False)]
    # The window is full after four chunks; the first tenth is taken from there.
    early, late = statistics.median(times[5 : 5 + tenth]), statistics.median(times[-tenth:])
    allowed = early * (SLOWER if tenth >= 20 else SLOWER_OF_FEW)
    slower = f"a chunk took {late:.3f} s at the end and {early:.3f} s at first" if late > allowed else ""
    middle = states[chunks // 4]
    judge("soak_chunks", chunks, middle, {name: states[-1][name] for name in middle}, slower)
    assert threading.active_count() < 20


def test_row_soak_prompts(comfy_server):
    info = comfy_server.get("/object_info", timeout=60)
    prompts = len(fault_rows.wanted_cases("soak_prompts"))
    pid = str(comfy_server.process.pid)
    states = []
    for number in range(prompts):
        name = ("DiagonalChunkSampler", "DiagonalStreamVideo")[number % 2]
        graph = node_graphs.sound_graph(info, name)
        graph["tested"]["inputs"]["seed"] = 20_000 + number
        comfy_server.run(graph)
        states.append(state_of(pid))
    # ComfyUI fills its own caches at first.
    early = {key: max(state[key] for state in states[: max(4, prompts // 4)]) for key in states[0]}
    late = {key: min(state[key] for state in states[-max(2, prompts // 10) :]) for key in states[0]}
    judge("soak_prompts", prompts, early, late)
