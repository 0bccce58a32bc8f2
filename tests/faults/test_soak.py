"""Long use: one stream of many chunks, and many prompts to one server. Nothing grows, nothing slows down."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fault_rows
import node_graphs
import pytest
import torch

GROWTH_MB, GROWTH_OF_FEW_MB = 50.0, 15.0  # of few chunks or prompts: a leak in each has not added up yet
SLOWER = 1.1  # medians of processor time differ by a few percent from one run to the next
# Of fewer than 20 chunks: a core shared with another program gives less in a second, for seconds on end (medians
# have differed by 48%), so the quickest chunks are compared, and a machine that slowed down is asked again.
SLOWER_OF_FEW, TRIES_OF_FEW = 1.3, 3
FPS, CHUNK_FRAMES = 16, 12

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and handles are read from /proc")


def state_of(process: str = "self") -> dict[str, float]:
    """Resident memory in MB, threads and open files of a process; not its sockets, which come and go with requests."""
    lines = (Path("/proc") / process / "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    files = 0
    for handle in (Path("/proc") / process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            files += not os.readlink(handle).startswith("socket:")
    return {
        "memory": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": files,
    }


def judge(row: str, ran: int, early: dict[str, float], late: dict[str, float], slower: str = "") -> None:
    """Keep and judge one soak: `ran` counts its chunks or prompts."""
    tally = fault_rows.Tally(row)
    tally.ran = ran
    growth = late["memory"] - early["memory"]
    tally.measured(growth)
    problems = [slower] if slower else []
    if growth > (GROWTH_OF_FEW_MB if ran <= fault_rows.ROWS[row].quick else GROWTH_MB):
        problems.append(f"memory grew by {growth:.0f} MB")
    problems += [f"{name} grew from {early[name]:.0f} to {late[name]:.0f}" for name in ("threads", "files")
                 if late[name] > early[name]]  # fmt: skip
    if problems:
        tally.failed[ran - 1] = "; ".join(problems)
    tally.keep()
    tally.require_none_failed()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's threads wait for one another, and use processor time for it where other programs keep them waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_row_soak_chunks(six_chunks, one_thread):
    chunks = len(fault_rows.wanted_cases("soak_chunks"))
    tenth = max(5, chunks // 10)
    few = tenth < 20
    for attempt in range(TRIES_OF_FEW if few else 1):
        states: list[dict[str, float]] = []
        used: list[float] = []  # processor seconds
        last = -1

        def watch(progress, states=states, used=used) -> None:
            nonlocal last
            if progress.chunk != last:
                last = progress.chunk
                used.append(time.process_time())
                states.append(state_of())

        six_chunks.run(f"soak{attempt}", seconds=(chunks * CHUNK_FRAMES - 3) / FPS, on_progress=watch)
        assert len(used) == chunks
        times = [after - before for before, after in zip(used, used[1:], strict=False)]
        # The window is full after four chunks; the first tenth is taken from there.
        average = min if few else statistics.median
        early, late = average(times[5 : 5 + tenth]), average(times[-tenth:])
        if late <= early * (SLOWER_OF_FEW if few else SLOWER):
            slower = ""
            break
        slower = f"a chunk took {late:.3f} s at the end and {early:.3f} s at first"
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
