"""ComfyUI's process: its port, its GPU, its start, the files that are its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from diagonal_sampler.disk import replace_file, try_lock

from . import HOST, OUTPUT
from .host import FETCHED, link_pack
from .packages import PYTHON
from .processes import CHILDREN, DISK_ERRORS, STATUS, Problem, runtime_environment, shorten, succeeds

BASE = HOST / "base"  # ComfyUI's own folders: input, user, temp, and for a fetched host models and custom_nodes
LOGS = HOST / "logs"
START_TIMEOUT_S = 600.0  # generous: a busy machine takes minutes, and a server that dies is noticed at once
PROBE_NODE = "DiagonalDemoLoader"  # there once ComfyUI has loaded this pack
# A GPU that is older than this torch is "available", and fails at the first kernel.
PROBE_GPU = "import torch; (torch.ones(1, device='cuda') + 1).item()"
_LOCKS: list[IO] = []  # open, and so held, until this process ends


@dataclass(frozen=True, slots=True)
class Server:
    """A ComfyUI that was started.

    Attributes:
        process: CHILDREN ends it.
        url: "http://127.0.0.1:PORT".
        log: the file with all that it prints.
    """

    process: subprocess.Popen
    url: str
    log: Path

    def require_alive(self) -> None:
        """Raise Problem with the end of its log where it has ended."""
        code = self.process.poll()
        if code is not None:
            killed = " (killed; perhaps for want of memory)" if code == -9 else ""
            raise Problem(f"ComfyUI ended with code {code}{killed}. {self.log_end()}")

    def log_end(self) -> str:
        """Return, in one line, the lines of its log that say most about a failure."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))  # without colours
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if any(DISK_ERRORS.search(line) for line in lines[-40:]):
            return "The disk is full: free some space and run again."
        telling = [line for line in lines if re.search(r"^\w*(Error|Exception): |Cannot import", line)]
        shown = " | ".join(telling[-1:] or lines[-3:]) or "(it is empty)"
        return f"Its log says: {shown} (all of it: {shorten(self.log)})"


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_port(port: int) -> None:
    """Raise Problem where no server can listen on this loopback port."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free again
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            if os.name == "nt":  # also of a range that Windows keeps for itself, or of another's exclusive port
                raise Problem(
                    f"port {port} is reserved or taken. Give another with --port, or none for a free one."
                ) from None
            raise Problem(f"port {port} is not allowed for this user. Give one above 1023 with --port.") from None
        except OSError:
            raise Problem(f"port {port} is taken. Give another with --port, or none for a free one.") from None


def choose_gpu(choice: str) -> bool:
    """Whether ComfyUI is to use a GPU; `choice` is "auto", "on" or "off". Problem for "on" where there is none."""
    if choice == "off" or sys.platform == "darwin":
        return choice != "off"  # ComfyUI finds Apple's GPU by itself
    if sys.platform.startswith("linux"):
        likely = any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))
    else:
        likely = shutil.which("nvidia-smi") is not None
    if choice == "auto" and not likely:
        return False  # spares the seconds that importing torch takes
    found = succeeds([PYTHON, "-c", PROBE_GPU])
    if choice == "on" and not found:
        raise Problem(
            f"--gpu on, but torch finds no CUDA GPU that it can use. {_gpu_remedy()}, or leave --gpu out for the CPU."
        )
    if not found:
        print(
            f"quickstart: warning: torch cannot use this machine's GPU; using the CPU. {_gpu_remedy()}.",
            file=sys.stderr,
        )
    return found


def _gpu_remedy() -> str:
    if sys.platform == "win32":
        return (
            "The torch that is installed from the package index on Windows has no CUDA: use the pack in a ComfyUI of "
            "your own (README)"
        )
    return (
        "The torch that is installed is NVIDIA's build: with a GPU of AMD or Intel, or one of NVIDIA's that is older "
        "than it supports (compute capability below 7.5), use the pack in a ComfyUI of your own (README); else check "
        "the driver"
    )


def command_line(
    python: Path | str, comfyui: Path, *, base: Path, output: Path, port: int, gpu: bool, own: str = ""
) -> list[str]:
    """Return the command that starts ComfyUI on loopback with all that it writes in `base` and `output`.

    Args:
        own: ends the names of the temporary folder, which ComfyUI empties at its start, and of the database, which
            one server at a time may open.
    """
    temporary, database = base / f"temp{own}", base / "user" / f"comfyui{own}.db"
    for folder in (base / "input", base / "user", temporary, output):
        folder.mkdir(parents=True, exist_ok=True)
    command = [python, comfyui / "main.py", "--listen", "127.0.0.1", "--port", port]
    command += ["--output-directory", output, "--input-directory", base / "input"]
    command += ["--user-directory", base / "user", "--temp-directory", temporary]
    command += ["--database-url", "sqlite:///" + database.as_posix()]
    command += ["--disable-auto-launch", "--disable-api-nodes"]
    return [str(part) for part in command] + ([] if gpu else ["--cpu"])


def claim_log(port: int, *, asked: bool) -> tuple[str, Path]:
    """Return what ends the names of a server's own files, and its log, which is not there: the one before is `.1` now.

    Servers of one clone may run at once. A port that was asked for is in the names. A free one is another each time,
    and would leave files of as many names: only a second server of that kind has it.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    own = f"-{port}"
    if not asked:
        lock = (LOGS / "server.lock").open("a+")
        if try_lock(lock.fileno()):
            _LOCKS.append(lock)
            own = ""
        else:
            lock.close()
    log = LOGS / f"server{own}.log"
    try:
        if log.exists():
            replace_file(log, log.with_name(f"{log.name}.1"))
    except PermissionError:  # on Windows, where a server outlives a quickstart that was killed, and has it open
        if own:
            raise
        return claim_log(port, asked=True)
    return own, log


def start(comfyui: Path, *, port: int | None, gpu: bool) -> Server:
    """Start ComfyUI with this pack and return it when it answers."""
    # A fetched host has its folders in `.host/base`; an existing install keeps its own models and custom_nodes.
    fetched = comfyui == FETCHED
    pack = link_pack((BASE if fetched else comfyui) / "custom_nodes")
    if port is not None:
        require_port(port)
    asked, port = port is not None, port or free_port()
    own, path = claim_log(port, asked=asked)
    command = command_line(PYTHON, comfyui, base=BASE, output=OUTPUT, port=port, gpu=gpu, own=own)
    command += ["--base-directory", str(BASE)] if fetched else []
    # The other packs of an install need packages that `.venv` does not have.
    command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", pack]
    STATUS.step(f"Starting ComfyUI on the {'GPU' if gpu else 'CPU'} ...")
    started = time.monotonic()
    with path.open("wb") as log:
        process = CHILDREN.start(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=BASE, env=runtime_environment()
        )
    server = Server(process, f"http://127.0.0.1:{port}", path)
    while not answers(f"{server.url}/system_stats"):
        server.require_alive()
        seconds = time.monotonic() - started
        if seconds > START_TIMEOUT_S:
            raise Problem(f"ComfyUI did not answer within {START_TIMEOUT_S:.0f} s. {server.log_end()}")
        STATUS.detail(f"Starting ComfyUI: {seconds:.0f} s")
        time.sleep(0.2)
    STATUS.clear()
    if not answers(f"{server.url}/object_info/{PROBE_NODE}"):
        raise Problem(f"ComfyUI runs but could not load this pack. {server.log_end()}")
    return server


def answers(url: str) -> bool:
    """Whether a GET gives JSON that is not empty. No proxy: the address is this machine."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            return bool(json.load(answer))
    except (urllib.error.URLError, OSError, ValueError):
        return False
