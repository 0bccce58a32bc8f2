"""Run the fault tests and rewrite docs/reliability.md from what was measured.

    python tests/faults/run.py --full               every row in full: hours
    python tests/faults/run.py --full checkpoints   some rows
    python tests/faults/run.py --cases 50 cancel    at most 50 cases of each
    python tests/faults/run.py --page               the page alone, from the results kept

Results are kept row by row in docs/reliability/, so that rows can be run at different times and on different machines.
It needs the environment of the tests (see README.md, "For developers"); COMFYUI_DIR names a ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "helpers"), str(ROOT)]

from fault_rows import ROWS, write_whole  # noqa: E402

RESULTS = ROOT / "docs" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- results: written by tests/faults/run.py -->", "<!-- end of results -->"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0 when every case that ran held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="rows to run; all without any")
    parser.add_argument("--full", action="store_true", help="all cases of each row")
    parser.add_argument("--cases", type=int, help="at most so many cases of each row")
    parser.add_argument("--page", action="store_true", help="run nothing; rewrite the page")
    options = parser.parse_args(arguments)
    if options.cases is not None and options.cases < 1:
        parser.error(f"--cases is {options.cases}; it must be at least 1")
    status = 0
    if not options.page:
        count = "full" if options.full else str(options.cases or "")
        for row in options.rows or ROWS:
            status |= run_row(row, count)
    write_page()
    return status


def run_row(row: str, count: str) -> int:
    """Run the one test of a row; 0 if all cases held."""
    result = RESULTS / f"{row}.json"
    before = result.stat().st_mtime_ns if result.exists() else 0
    command = [sys.executable, "-m", "pytest", f"tests/faults/{ROWS[row].file}", "-q", "-k", f"row_{row}"]
    environment = {**os.environ, "FAULTS": count, "FAULTS_RESULTS": str(RESULTS)}
    began = time.perf_counter()
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if not result.exists() or result.stat().st_mtime_ns == before:
        print(f"run.py: {row} gave no result (pytest ended with {status})", file=sys.stderr)
        return 1
    kept = json.loads(result.read_text())
    kept["minutes"] = round((time.perf_counter() - began) / 60, 1)
    kept["command"] = f"python tests/faults/run.py {'--full' if count == 'full' else f'--cases {count}'} {row}"
    write_whole(result, json.dumps(kept, indent=1) + "\n")
    return int(bool(status))


def write_page() -> None:
    """Put the table of all results kept into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks the lines {BEGIN!r} and {END!r}; put them where the table belongs")
    write_whole(PAGE, f"{before}{BEGIN}\n{table()}\n{END}{after}")


def table() -> str:
    """The results in Markdown."""
    lines = ["| what is done | must hold | cases | ran | held | worst | when |", "|---|---|---|---|---|---|---|"]
    missing, devices = [], set()
    for name, row in ROWS.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            lines.append(f"| `{name}`: {row.what} | {row.holds} | {row.full:,} | 0 | | | not run yet |")
            missing.append(name)
            continue
        kept = json.loads(path.read_text(encoding="utf-8"))
        worst = "" if kept["worst"] is None else f"{kept['worst']:.3g} {kept['unit']}"
        held = f"{kept['held']:,}" + (f", **{len(kept['failed'])} failed**" if kept["failed"] else "")
        ran = f"{kept['ran']:,}" + ("" if kept["ran"] >= row.full else " (not in full)")
        when = f"{kept['date']}, {kept['minutes']:g} min"
        lines.append(f"| `{name}`: {row.what} | {row.holds} | {row.full:,} | {ran} | {held} | {worst} | {when} |")
        devices.add(kept["device"])
        if kept["ran"] < row.full:
            missing.append(name)
    notes = [f"Measured on: {'; '.join(sorted(devices))}."] if devices else []
    if missing:
        notes.append(f"Still to be run in full: `python tests/faults/run.py --full {' '.join(missing)}`.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n\n" + versions() + "\n\n" + frontends()


def versions() -> str:
    """What tests/faults/versions.py found, in Markdown."""
    path = RESULTS / "versions.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = ["| ComfyUI | graphs | when |", "|---|---|---|"]
    lines += [f"| {version} | {entry['result']} | {entry['date']} |" for version, entry in kept.items()]
    return "\n".join(lines) + "\n\nBy `python tests/faults/versions.py`."


def frontends() -> str:
    """What tests/faults/frontends.py found, in Markdown."""
    path = RESULTS / "frontends.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = ["| frontend | browser tests passed | failed | when |", "|---|---|---|---|"]
    for version, entry in kept.items():
        failed = ", ".join(entry["failed"]) or "none"
        lines.append(f"| {version}: {entry['what']} | {entry['passed']} | {failed} | {entry['date']} |")
    return "\n".join(lines) + "\n\nBy `python tests/faults/frontends.py`, ComfyUI 0.30.0 behind each."


if __name__ == "__main__":
    sys.exit(main())
