"""Processes that may be killed at any moment, without the seconds that starting each anew would take.

One process imports what is needed and then forks for every job, so that a job is a real process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE_S = 300.0

_LOOP = """
import json, os, sys
print("ready", flush=True)
for line in sys.stdin:
    fields = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            code = job(**fields) or 0
        except BaseException as error:
            print("error", type(error).__name__, error, flush=True)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print("pid", pid, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Job:
    """One job under way.

    Attributes:
        lines: what it printed so far.
        code: its exit status, minus a signal's number; None while it runs.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.lines: list[str] = []
        self.code: int | None = None
        self.pid = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._lines:
            word, _, rest = line.rstrip("\n").partition(" ")
            with self._changed:
                if word == "pid" and not self.pid:
                    self.pid = int(rest)
                elif word == "ended":
                    self.code = int(rest)
                else:
                    self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
            if word == "ended":
                return

    def wait(self, until=lambda job: job.code is not None) -> None:
        """Wait until something is true of it, or it has ended. Raises TimeoutError."""
        give_up = time.monotonic() + PATIENCE_S
        with self._changed:
            while not until(self) and self.code is None:
                if not self._changed.wait(max(0.0, give_up - time.monotonic())):
                    raise TimeoutError(f"a job was not done after {PATIENCE_S:.0f} s: {self.lines[-5:]}")

    def kill(self) -> None:
        """kill -9."""
        self.wait(lambda job: job.pid)
        if self.code is None:
            with suppress(ProcessLookupError):  # it has ended, and nobody has read it yet
                os.kill(self.pid, signal.SIGKILL)
        self.wait()


class Forks:
    """The process that forks."""

    def __init__(self, prelude: str, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.log = (folder / "forks.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=folder,
        )
        for line in self.process.stdout:
            if line.strip() == "ready":
                return
        raise RuntimeError((folder / "forks.log").read_text()[-2000:])

    def start(self, **fields) -> Job:
        """Begin a job; one at a time."""
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()
        return Job(self.process.stdout)

    def run(self, **fields) -> Job:
        """Run a job to its end."""
        job = self.start(**fields)
        job.wait()
        return job

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


@contextmanager
def forks(prelude: str, folder: Path) -> Iterator[Forks]:
    """A process that has run `prelude`, which defines `job(**fields)`, and forks to call it."""
    made = Forks(prelude, folder)
    try:
        yield made
    finally:
        made.stop()
