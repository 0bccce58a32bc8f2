"""Whether processes have ended that are not this one's children."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil

PATIENCE_S = 10.0


def runs(pid: int) -> bool:
    """Whether a process does anything still: a zombie, which only waits for its parent to ask of it, does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def still_running(pids: Iterable[int], patience: float = PATIENCE_S) -> list[int]:
    """Those that have not ended after some seconds."""
    give_up = time.monotonic() + patience
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left
