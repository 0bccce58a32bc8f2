"""The evidence: scores every row of one table of trained variants, and rebuilds docs/evidence from the scores.

    python -m distillation.evaluate --commands                 # how to train the rows
    python -m distillation.evaluate --out docs/evidence        # score what is trained, then tables, plots and claims
    python -m distillation.evaluate --tables-only              # tables from the scores that are there

Each row's measurements are kept in OUT/rows/NAME.json under a digest of its weights and of the options, so a killed
evaluation goes on with the next row, and tables need no sampling. README.md, results.json and the plots are made from
these files alone. Nothing in here knows a result: answers follow from the numbers by the rules that are printed
with them.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from distillation import demo_files, sprites
from distillation.common import stops_in_a_line
from distillation.evidence.measures import Evaluation, Options
from distillation.evidence.report import build, load_scores
from distillation.evidence.rows import (
    GIVEN,
    GIVEN_STEPS,
    INITIAL,
    INITIAL_AGAIN,
    NAMES,
    ROWS,
    SUBJECTS,
    TEACHER,
    Control,
    Row,
    find_checkpoint,
    initial_command,
    row_named,
    training_command,
)
from distillation.recipes import DEMO

log = logging.getLogger("evaluate")


def chosen_rows(text: str | None) -> list[Row | Control]:
    """Rows and controls from "NAME,NAME", in the table's order; None is all of them.

    Raises:
        ValueError: an unknown name.
    """
    if text is None:
        return list(SUBJECTS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"rows is {text!r}; choose from {', '.join(NAMES)}, with commas.")
    return [subject for subject in SUBJECTS if subject.name in names]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read "0,1,2".

    Raises:
        ValueError: not whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"seeds is {text!r}; write whole numbers with commas, such as 0,1,2.") from None


def run(chosen: argparse.Namespace) -> None:
    """What the command does."""
    runs, demo, out = chosen.runs, chosen.demo, chosen.out
    if chosen.commands:
        teacher = find_checkpoint(row_named(TEACHER), runs, demo) or demo / demo_files.TEACHER_FILE
        print("# what all of them begin with: the teacher after causal initialisation, made twice")
        for weights in (INITIAL, INITIAL_AGAIN):
            print(initial_command(runs, teacher=teacher, weights=weights) + "\n")
        trained = [row for row in ROWS if row.training is not None]
        at = trained.index(row_named(GIVEN))
        for row in (*trained[:at], *GIVEN_STEPS, *trained[at:]):
            print(f"# {row.name}: {row.text}")
            print(training_command(row, runs, teacher=teacher, demo=demo, updates=chosen.updates) + "\n")
        return
    options = None
    if not chosen.tables_only:
        options = Options(
            captions=chosen.captions,
            seeds=parse_seeds(chosen.seeds),
            length=chosen.length,
            long=chosen.long,
            long_captions=min(32, chosen.captions) if chosen.long_captions is None else chosen.long_captions,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        evaluation = Evaluation(options, runs, demo, out, device, retime=chosen.retime)
        for subject in chosen_rows(chosen.rows):
            if evaluation.score(subject) is None:
                log.info("%s: not %s", subject.name, "scored yet" if chosen.retime else "trained")
    results = load_scores(out, options)
    options = next(iter(results.values())).options if options is None else options
    claims = build(out, results, options, runs=runs, demo=demo)
    for claim in claims:
        print(f"{claim.number}. {claim.text} {claim.answer}")
    print(f"{len(results)} of {len(NAMES)} rows: {out / 'README.md'}")


@stops_in_a_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"), help="scores, tables and plots go here")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="exported weights, NAME.safetensors")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder of the demo's three files")
    parser.add_argument("--captions", type=int, default=Options().captions, help="held-out captions")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the noise")
    parser.add_argument("--rows", metavar="NAME,NAME", help="score only these")
    parser.add_argument("--length", type=int, default=sprites.CLIP_FRAMES, help="pixel frames of a clip")
    parser.add_argument("--long", type=int, default=10, help="clips in a drift rollout; 0: none")
    parser.add_argument("--long-captions", type=int, help="captions of the drift rollouts; default: 32")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--retime", action="store_true", help="measure the times of scored rows again, and no more")
    parser.add_argument("--tables-only", action="store_true", help="rebuild from OUT/rows, without sampling")
    parser.add_argument("--commands", action="store_true", help="print how to train the rows, then stop")
    parser.add_argument("--updates", type=int, help="with --commands: the budget; default: the recipe's")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if chosen.threads is not None:
        if chosen.threads < 1:
            raise ValueError(f"threads is {chosen.threads}; it must be at least 1.")
        torch.set_num_threads(chosen.threads)
    run(chosen)


if __name__ == "__main__":
    raise SystemExit(main())
