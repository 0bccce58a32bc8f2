"""Child processes that never outlive this one, the progress line, and errors of one line."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import HOST, ROOT

SETUP_LOG = HOST / "logs" / "setup.log"
STOP_TIMEOUT_S = 5.0  # what a process gets to end politely
PR_SET_PDEATHSIG = 1
OPEN_ELSEWHERE = (5, 32)  # Windows: access denied, as for a folder below which a file is open; sharing violation

NETWORK_ERRORS = re.compile(
    r"dns error|error sending request|failed to lookup address|Failed to establish a new connection"
    r"|NewConnectionError|Connection refused|ConnectTimeout|ReadTimeout|Temporary failure in name resolution"
    r"|Name or service not known|getaddrinfo failed|nodename nor servname|Network is unreachable|No route to host"
    r"|Tunnel connection failed|ProxyError|CERTIFICATE_VERIFY_FAILED|operation timed out|tcp connect error",
    re.IGNORECASE,
)
DISK_ERRORS = re.compile(
    r"No space left on device|os error 28\b|os error 112\b|not enough space on the disk", re.IGNORECASE
)


class Problem(Exception):
    """Something the user can mend: shown as one line on stderr, with this exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP; raised by the handler that cli.py sets."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Status:
    """One line that rewrites itself on a terminal; elsewhere one line a step."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.shown = ""

    def step(self, text: str) -> None:
        """Announce a step."""
        self.clear()
        print(text, flush=True)

    def detail(self, text: str) -> None:
        """Show what the step is at, on a terminal only."""
        if self.live:
            text = text[: max(20, shutil.get_terminal_size().columns - 1)]
            print("\r" + text.ljust(len(self.shown)), end="", flush=True)
            self.shown = text

    def clear(self) -> None:
        """Wipe the line that `detail` shows."""
        if self.shown:
            print("\r" + " " * len(self.shown), end="\r", flush=True)
            self.shown = ""


class Children:
    """Every process this one starts, so that none outlives it."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen] = []

    def start(self, command: Sequence[object], **options) -> subprocess.Popen:
        """Start a process in a group of its own: a terminal's Ctrl-C reaches only this one, which ends the rest."""
        if os.name == "nt":
            options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            options["start_new_session"] = True
            options["preexec_fn"] = _die_with_parent()
        process = subprocess.Popen([str(part) for part in command], **options)
        self.running.append(process)
        return process

    def stop(self, process: subprocess.Popen) -> None:
        """End a process and all that it started: politely first, then by force."""
        if os.name == "nt":
            if process.poll() is None:
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                subprocess.call(["taskkill", "/F", "/T", "/PID", str(process.pid)], **quiet)
        else:
            _signal_group(process.pid, signal.SIGTERM)
            give_up = time.monotonic() + STOP_TIMEOUT_S
            while process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.05)
            _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if process in self.running:
            self.running.remove(process)

    def stop_all(self) -> None:
        """End all that still run, the youngest first."""
        for process in reversed(list(self.running)):
            self.stop(process)


STATUS = Status()
CHILDREN = Children()


def _signal_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _die_with_parent() -> Callable[[], object] | None:
    """On Linux, have the kernel end the child even where this process is killed outright."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment for the Python in `.venv`, without what would mix other packages in."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    fixed = {"PYTHONNOUSERSITE": "1", "PIP_USER": "0", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if os.name == "nt":  # uv's hard links fail in OneDrive, where Documents and the desktop often are (os error 396)
        fixed["UV_LINK_MODE"] = "copy"
    return {**environment, **fixed, **extra}


def runtime_environment(**extra: str) -> dict[str, str]:
    """Return the environment for ComfyUI and the tests: byte code is kept, for quick starts, and kept in `.host`.

    An existing install thus stays as it is.
    """
    environment = child_environment(PYTHONPYCACHEPREFIX=str(HOST / "pycache"), **extra)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def succeeds(command: Sequence[object], timeout: float = 120.0) -> bool:
    """Whether a short command ends with code 0."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.call([str(p) for p in command], env=child_environment(), timeout=timeout, **quiet) == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def run_logged(command: Sequence[object], what: str) -> tuple[int, str]:
    """Run a set-up command, its output in the set-up log; return (exit code, output)."""
    SETUP_LOG.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with SETUP_LOG.open("ab") as log:
        start = log.tell()
        log.write(("\n$ " + " ".join(str(part) for part in command) + "\n").encode())
        log.flush()
        process = CHILDREN.start(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=child_environment()
        )
        while process.poll() is None:
            time.sleep(0.1)
            STATUS.detail(f"{what}: {time.monotonic() - started:.0f} s  {_last_line(SETUP_LOG)}")
    CHILDREN.stop(process)
    STATUS.clear()
    with SETUP_LOG.open("rb") as log:
        log.seek(start)
        return process.returncode, log.read().decode("utf-8", "replace")


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def explain(what: str, output: str) -> Problem:
    """Return the Problem for a failed set-up command, from what it printed."""
    if DISK_ERRORS.search(output):
        return Problem(f"{what} failed: the disk is full. Free some space and run again.")
    if NETWORK_ERRORS.search(output):
        return Problem(f"{what} failed: the package registry cannot be reached. Check the network and run again.")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error|×|ERROR", line)] or lines[-1:]
    reason = errors[-1] if errors else "it printed nothing"
    return Problem(f"{what} failed: {reason} (all of its output: {shorten(SETUP_LOG)})")


def explain_disk(error: OSError) -> str:
    """Say what a file that could not be written or moved needs."""
    if error.errno == errno.ENOSPC:
        return "the disk is full: free some space and run again."
    if getattr(error, "winerror", None) in OPEN_ELSEWHERE:
        return f"{error}: another program has it, or a file in it, open (a virus scanner, an older server); run again."
    return str(error)


def shorten(path: Path) -> str:
    """Return a path as seen from the clone."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
