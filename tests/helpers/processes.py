"""Whether processes have ended that are not this one's children."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

PATIENCE_S = 10.0


def runs(pid: int) -> bool:
    """Whether a process does anything still: a zombie, which only waits for its parent to ask of it, does not."""
    try:
        if not Path("/proc/self").exists():
            os.kill(pid, 0)
            return True
        # The state follows the name, which stands in parentheses and may have any character.
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (ProcessLookupError, FileNotFoundError):
        return False


def still_running(pids: Iterable[int], patience: float = PATIENCE_S) -> list[int]:
    """Those that have not ended after some seconds. POSIX."""
    give_up = time.monotonic() + patience
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left
