"""`.venv` and the pinned packages in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from diagonal_sampler.disk import remove_file, replace_file, try_lock, whole_file

from . import GIB, HOST, ROOT, VENV
from .processes import (
    DISK_ERRORS,
    NETWORK_ERRORS,
    SETUP_LOG,
    STATUS,
    Problem,
    explain,
    run_logged,
    shorten,
    succeeds,
)

LOCK = ROOT / "requirements-lock.txt"
TEST_LOCK = ROOT / "requirements-test-lock.txt"
# The ComfyUI requirements.txt that the lock was resolved from; another ComfyUI's is installed on top of the lock.
LOCKED_REQUIREMENTS_SHA256 = "d743f5e0247a8277c252c75d27d4f14571c1ec128dd1e81c286242fc7926623e"
UV_VERSION = "0.13.9"
MACOS_MIN = 14  # what the pinned av is built for
STAMP = VENV / "quickstart.json"
UNFINISHED = VENV / "quickstart-unfinished"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# Measured on Linux: .venv takes 6.2 GiB, for torch brings the CUDA libraries. Elsewhere torch is far smaller.
INSTALL_BYTES = (7 if sys.platform.startswith("linux") else 3) * GIB


def check_machine() -> None:
    """Raise Problem where the pinned packages have no build for this machine."""
    if sys.maxsize < 2**32:
        raise Problem("this is a 32-bit Python; torch needs a 64-bit one.")
    # What this Python was built for: platform.machine() may name the processor, which runs x64 programs too.
    if sysconfig.get_platform() == "win-arm64":
        raise Problem(
            "the pinned torch has no build for an ARM64 Python on Windows; use an x64 Python, which runs there."
        )
    if sys.platform == "darwin" and platform.machine() != "arm64":
        if "ARM64" in platform.version():  # the kernel's, also under Rosetta
            raise Problem(
                "this is an Intel Python on Apple silicon, for which torch has no build; use an arm64 Python."
            )
        raise Problem("the pinned torch has no build for Intel Macs; it needs a Mac with Apple silicon.")
    if sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) < MACOS_MIN:
        raise Problem(f"this is macOS {platform.mac_ver()[0]}; the pinned packages need macOS {MACOS_MIN} or newer.")


def missing_build_tools() -> str | None:
    """Return why torch.compile cannot work here (no C++ compiler, no Python headers), or None."""
    names = [os.environ.get("CXX", ""), *(["cl"] if os.name == "nt" else ["c++", "g++", "clang++"])]
    if not any(shutil.which(name.split()[0]) for name in names if name.strip()):
        return "no C++ compiler"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if headers.is_file() else f"no Python headers ({headers})"


def require_space(needed: int, what: str, folder: Path = ROOT) -> None:
    """Raise Problem where fewer than `needed` bytes are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"needs {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB is free in {folder}"
        raise Problem(f"the disk is full: {what} {sizes}. Free some space and run again.")


@contextlib.contextmanager
def setup_lock() -> Iterator[None]:
    """Let one quickstart at a time set up this clone; the system frees the lock with the process."""
    HOST.mkdir(parents=True, exist_ok=True)
    with (HOST / "setup.lock").open("a+") as file:
        waiting = False
        while not try_lock(file.fileno()):
            if not waiting:
                STATUS.step("Another quickstart is setting up this clone; waiting for it ...")
            waiting = True
            time.sleep(0.5)
        yield


def make_venv() -> None:
    """Make `.venv` where there is none that works. One that was left half made is made again."""
    if (succeeds([PYTHON, "-c", ""]) and not UNFINISHED.exists()) or Path(sys.prefix).resolve() == VENV.resolve():
        return
    STATUS.step(f"Making {shorten(VENV)} ...")
    trash = HOST / "old-venv"
    shutil.rmtree(trash, ignore_errors=True)
    if VENV.exists():
        replace_file(VENV, trash)  # first, so that no half-deleted one is taken for whole
        shutil.rmtree(trash, ignore_errors=True)
    VENV.mkdir()
    UNFINISHED.touch()
    try:
        # pip comes later and only if needed: Debian's Python may lack ensurepip, and uv needs no pip.
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(VENV)
    except subprocess.CalledProcessError as error:
        raise Problem(f"the virtual environment could not be made: {error}") from None


def find_uv() -> list[str] | None:
    """Return the command of a uv that runs: the one on PATH, or the one in `.venv`; or None."""
    in_venv = VENV / ("Scripts/uv.exe" if os.name == "nt" else "bin/uv")
    for candidate in (shutil.which("uv"), str(in_venv)):
        if candidate and succeeds([candidate, "--version"]):
            return [candidate]
    return None


def find_pip() -> list[str] | None:
    """Return the command of a pip for `.venv`: from ensurepip, from uv, or this interpreter's own; or None."""
    own = [str(PYTHON), "-m", "pip"]
    if succeeds([*own, "--version"]):
        return own
    if succeeds([PYTHON, "-c", "import ensurepip"]) and run_logged([PYTHON, "-m", "ensurepip"], "pip")[0] == 0:
        return own
    uv = find_uv()
    if uv is not None:
        code, output = run_logged([*uv, "pip", "install", "--python", PYTHON, "pip"], "Installing pip")
        if code == 0:
            return own
        if NETWORK_ERRORS.search(output):
            raise explain("Installing pip", output)
    theirs = [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    return theirs if succeeds([*theirs, "--version"]) else None


def install_uv(pip: list[str]) -> list[str] | None:
    """Install uv into `.venv` and return its command; None where the registry has none for this machine."""
    code, output = run_logged([*pip, "install", "--retries", "2", f"uv=={UV_VERSION}"], "Installing uv")
    if code != 0 and (NETWORK_ERRORS.search(output) or DISK_ERRORS.search(output)):
        raise explain("Installing uv", output)
    return find_uv()


def stamp_key(comfyui: Path, *, test: bool) -> str:
    """Return what identifies the contents of `.venv`: the pins, the host's requirements, the Python."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for path in (LOCK, *([TEST_LOCK] if test else []), comfyui / "requirements.txt"):
        digest.update(_sha256(path).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    """Return the hash of a text file, the same whichever line ends git gave it."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def read_stamp() -> dict[str, str]:
    """Return the stamp of the last finished install, {} where there is none."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one piece."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def installed(comfyui: Path, *, test: bool) -> bool:
    """Whether `.venv` holds the pinned packages for this host already."""
    group = "test" if test else "run"
    return read_stamp().get(group) == stamp_key(comfyui, test=test) and succeeds([PYTHON, "-c", ""])


def install(comfyui: Path, *, test: bool) -> None:
    """Install the pinned packages into the `.venv` there is; nothing where the stamp says it is done.

    Raises Problem where they cannot be had. An environment that was whole before is still taken for whole then: pip
    and uv fetch everything first, and the next run installs into it again.
    """
    if installed(comfyui, test=test):
        return
    whole = STAMP.exists() and not UNFINISHED.exists()
    UNFINISHED.touch()
    try:
        _install_all(comfyui, test=test)
    except (Problem, OSError):
        if whole:
            remove_file(UNFINISHED)
        raise
    stamp = {"run": stamp_key(comfyui, test=False)}
    if test:
        stamp["test"] = stamp_key(comfyui, test=True)
    write_whole(STAMP, json.dumps(stamp))
    remove_file(UNFINISHED)


def _install_all(comfyui: Path, *, test: bool) -> None:
    files = ["-r", LOCK, *(["-r", TEST_LOCK] if test else [])]
    _install(["--no-deps", *files], "Installing the pinned packages")
    requirements = comfyui / "requirements.txt"
    if _sha256(requirements) != LOCKED_REQUIREMENTS_SHA256:
        if STAMP.exists() and not installed(comfyui, test=False):
            write_whole(STAMP, "{}")  # another host's packages are no longer what it says
        # Another ComfyUI wants other versions of its own packages; torch stays the one this pack was tried with.
        pins = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if re.match(r"torch\w*==", line)]
        constraints = HOST / "torch-pins.txt"
        write_whole(constraints, "\n".join(pins) + "\n")
        _install(["-r", requirements, "-c", constraints], "Installing this ComfyUI's requirements")


def _install(arguments: list[object], what: str) -> None:
    """Install with uv; where that fails, once more with pip, which honours settings that uv does not read."""
    STATUS.step(f"{what} (its output: {shorten(SETUP_LOG)}) ...")
    uv = find_uv()
    pip = None if uv else find_pip()
    if uv is None and pip is not None:
        uv = install_uv(pip)
    if uv is not None:
        code, output = run_logged([*uv, "pip", "install", "--python", PYTHON, *arguments], what)
        if code == 0:
            return
        if DISK_ERRORS.search(output):
            raise explain(what, output)
        pip = find_pip()
        if pip is None:
            raise explain(what, output)
        STATUS.step("uv could not install them; trying pip ...")
    if pip is None:
        raise Problem("neither uv nor pip can be had for .venv; install uv, or your system's python3-venv and pip.")
    code, output = run_logged([*pip, "install", "--retries", "2", *arguments], what)
    if code != 0:
        raise explain(what, output)
