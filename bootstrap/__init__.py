"""What `python quickstart.py` does, in the standard library only (but job.py, which runs inside `.venv`).

    cli.py          the options and the order of the steps
    packages.py     `.venv` and the pinned packages in it
    host.py         ComfyUI: fetched into `.host`, or COMFYUI_DIR; this pack's link in its custom_nodes
    server.py       ComfyUI's process: port, GPU, start, log
    processes.py    child processes that never outlive this one, the progress line, errors of one line
    job.py          queues the workflow, follows it, makes the contact sheet

Every step is safe to interrupt: a folder is built beside its place and moved there when whole, and a stamp is
written last. Every failure that a user can meet is a `Problem`: one line on stderr and a non-zero exit code.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
HOST = ROOT / ".host"
OUTPUT = ROOT / "output"
GIB = 2**30
