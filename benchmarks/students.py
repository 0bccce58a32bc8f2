"""Options of the benchmarks that compare students of the demo on held-out captions."""

from __future__ import annotations

import argparse
from pathlib import Path

import models  # noqa: F401  makes the repository importable
import torch

from distillation.recipes import DEMO


def student_parser(description: str | None, captions: int) -> argparse.ArgumentParser:
    """--dit, --captions (`captions` by default), --caption-seed and --threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", type=Path, default=DEMO / "demo_student.safetensors", help="a student of the demo")
    parser.add_argument("--captions", type=int, default=captions, help="held-out captions, at least 2")
    parser.add_argument("--caption-seed", type=int, default=0, help="which held-out captions; 0: those of the evidence")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return parser
