"""Run the browser tests with given versions of ComfyUI's frontend and note the results for docs/reliability.md.

    python tests/faults/frontends.py                  every version of the list
    python tests/faults/frontends.py 1.44.19          one

People update the frontend (the package comfyui-frontend-package) apart from ComfyUI. The server is that of all tests;
nothing of the environment is changed. What is fetched is kept in a folder (--cache, by default .host/frontends).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path

import run
from fault_rows import device, write_whole
from versions import pip

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "comfyui-frontend-package"
VERSIONS = {
    "1.44.19": "ComfyUI 0.24.1's, the oldest that the pack takes",
    "1.47.12": "ComfyUI 0.30.0's, which all other tests have",
    "1.58.1": "the newest of November 2026",
}
"""Version -> what it is."""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0 when every browser test passed in every version asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), help=f"of {', '.join(VERSIONS)}")
    parser.add_argument("--cache", type=Path, default=ROOT / ".host" / "frontends", help="folder for what is fetched")
    options = parser.parse_args(arguments)
    for version in options.versions:
        if version not in VERSIONS:
            parser.error(f"version {version!r} is not known; choose of {', '.join(VERSIONS)}")
    results = run.RESULTS / "frontends.json"
    kept = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    for version in options.versions:
        kept[version] = {"what": VERSIONS[version], **browse(version, options.cache.resolve())}
        print(f"frontend {version}: {kept[version]['passed']} passed, {len(kept[version]['failed'])} failed")
        write_whole(results, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    run.write_page()
    return int(any(kept[version]["failed"] for version in options.versions))


def browse(version: str, cache: Path) -> dict:
    """Run the browser tests with this version; how many passed, and which did not."""
    folder = cache / version
    if not (folder / "comfyui_frontend_package").is_dir():
        pip("install", "--no-deps", "--target", str(folder), f"{PACKAGE}=={version}")
    report = cache / f"{version}.xml"
    report.unlink(missing_ok=True)
    static = folder / "comfyui_frontend_package" / "static"
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", "tests/browser", "-q", f"--junit-xml={report}"],
        cwd=ROOT,
        env={**os.environ, "DIAGONAL_TEST_FRONTEND": str(static)},
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    if any(case.find("skipped") is not None for case in cases):
        raise RuntimeError("browser tests were skipped: they need Chromium and playwright")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "passed": len(cases) - len(failed),
        "failed": failed,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "date": date.today().isoformat(),
        "device": device(),
    }


if __name__ == "__main__":
    sys.exit(main())
