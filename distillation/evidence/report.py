"""README.md, results.json and plots of the evidence, from kept measurements alone."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diagonal_sampler.disk import whole_file
from distillation import score
from distillation.common import write_text
from distillation.evidence.claims import SHIPPED_SHARE, Claim, Goal, answer_claims, shipped_goals, spread, written
from distillation.evidence.measures import (
    DRIFTING,
    DRIFTS,
    MEASURES,
    POINTS,
    SHARE,
    TENTHS,
    TIMED_RUNS,
    Measured,
    Options,
    scores_path,
)
from distillation.evidence.rows import (
    CAUSAL,
    CONTEXT_SIGMAS,
    DECODED,
    FULL,
    FULL_AGAIN,
    MOTION_WEIGHTS,
    NAMES,
    NO_FORCING,
    NO_MOTION,
    ROWS,
    STEPS_4_2,
    SUBJECTS,
    UNIFORM_2,
    UNIFORM_4,
    Row,
    find_checkpoint,
    row_named,
)
from distillation.evidence.statistics import CONFIDENCE, FRECHET_REPLICATES, REPLICATES, Spread
from distillation.run_folder import write_json

log = logging.getLogger("evaluate")


# ---------------------------------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True, slots=True)
class Group:
    """An ablation of the paper: rows with their labels, and the measures that bear on it."""

    title: str
    paper: str
    rows: dict[str, str]
    measures: tuple[str, ...]


QUALITY = ("everything", "direction", "amplitude", "endpoint", "frechet")
GROUPS: tuple[Group, ...] = (
    Group(
        "Components",
        "without flow distribution matching motion falls visibly (Table 2, Figure 6); context without noise lets long "
        "rollouts oversaturate",
        {
            FULL: "in full",
            NO_FORCING: "without diagonal forcing",
            NO_MOTION: "without flow distribution matching",
            UNIFORM_2: "without diagonal denoising, 2 steps",
            UNIFORM_4: "without diagonal denoising, 4 steps",
        },
        (*QUALITY, "saturation_drift", "correct_drift"),
    ),
    Group(
        "Steps a chunk",
        "5,3,3,3,3,3,3 scores highest, 4,2,2,2,2,2,2 is fastest, 4,3,2,2,2,2,2 is the balance chosen (Table 3)",
        {
            "steps-5-3": "5, 3, ...",
            UNIFORM_4: "4, ...",
            FULL: "4, 3, 2, ...",
            STEPS_4_2: "4, 2, ...",
            UNIFORM_2: "2, ...",
            "steps-1": "1, ... (renoised context)",
        },
        QUALITY,
    ),
    Group(
        "Context noise",
        "best near timestep 100, sigma 0.36; much more loses structure, much less oversaturates (Figure 5a)",
        {name: f"sigma {sigma:.2g}" for name, sigma in CONTEXT_SIGMAS.items()},
        (*QUALITY, "saturation_drift", "correct_drift"),
    ),
    Group(
        "Motion weight",
        "gamma 1.0 is best (Figure 5b)",
        {name: f"{weight:g}" for name, weight in MOTION_WEIGHTS.items()},
        QUALITY,
    ),
)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(values: Sequence[float]) -> str:
    return f"{np.median(values):.3f}"


def _main_table(results: Mapping[str, Measured], absent: Mapping[str, str], length: int) -> str:
    columns = ("colour", "shape", "direction", "everything", "amplitude", "endpoint", "tracked", "frechet")
    head = ["row", "what", "forwards", *(MEASURES[name].title for name in columns)]
    head += ["everything, less its reference's", "s a clip", "s to first chunk", "paper"]
    lines = []
    for subject in SUBJECTS:
        row = subject if isinstance(subject, Row) else None
        line = [subject.name, subject.text, "" if row is None else str(row.nfe(length))]
        found = results.get(subject.name)
        if found is None:
            lines.append([*line, absent[subject.name], *[""] * (len(columns) + 2), row.paper if row else ""])
            continue
        line += [written(spread(found, name), MEASURES[name].form) for name in columns]
        mine = spread(found, "everything")
        theirs = spread(results[row.reference], "everything") if row and row.reference in results else None
        line.append(f"{written(mine - theirs, POINTS)} ({row.reference})" if row and mine and theirs else "")
        timing = found.timing
        line += ["", ""] if timing is None else [_seconds(timing.clip), _seconds(timing.first_chunk)]
        lines.append([*line, row.paper if row else ""])
    return _markdown(head, lines)


def _drift_table(results: Mapping[str, Measured]) -> str:
    head = ["row", *(f"{name}, first and last tenth" for name in DRIFTING)]
    head += [f"change of {measure.title}" for measure in DRIFTS.values()]
    lines = []
    for name in NAMES:
        if name in results and results[name].drift:
            curves = [drift_curve(results[name], of) for of in DRIFTING]
            ends = [f"{_number(curve[0])}, {_number(curve[-1])}" for curve in curves]
            lines.append([name, *ends, *(written(spread(results[name], of), POINTS) for of in DRIFTS)])
    return _markdown(head, lines) if lines else "No row has been rolled out."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def drift_curve(measured: Measured, name: str) -> list[float | None]:
    """The mean over captions of each tenth; None where no sprite was seen."""
    curve: list[float | None] = []
    for tenth in zip(*measured.drift[name], strict=True):
        known = [value for value in tenth if value is not None]
        curve.append(sum(known) / len(known) if known else None)
    return curve


def _group_table(group: Group, results: Mapping[str, Measured], absent: Mapping[str, str], length: int) -> str:
    head = ["", "row", "forwards"]
    head += [f"{MEASURES[m].title}{' over the rollout' if m in DRIFTS else ''}" for m in group.measures]
    lines = []
    for name, label in group.rows.items():
        line = [label, name, str(row_named(name).nfe(length))]
        found = results.get(name)
        if found is None:
            lines.append([*line, absent[name], *[""] * (len(group.measures) - 1)])
        else:
            lines.append([*line, *(written(spread(found, m), MEASURES[m].form) for m in group.measures)])
    return f"### {group.title}\n\nThe paper: {group.paper}.\n\n{_markdown(head, lines)}"


def _claim_text(claim: Claim) -> str:
    lines = [f"**{claim.number}. {claim.text}** {claim.answer}.", "", f"* Rule: {claim.rule}"]
    lines += [f"* {finding}" for finding in claim.findings]
    lines += [f"* Why, as we read it: {claim.why}"] if claim.why else []
    for remedy in claim.remedies:
        lines += [f"* Tried: {remedy.text}: {remedy.answer}.", *(f"  * {finding}" for finding in remedy.findings)]
    return "\n".join(lines)


def _goals_table(goals: Sequence[Goal]) -> str:
    lines = [[goal.text, goal.found, "yes" if goal.reached else "**no**", goal.surely] for goal in goals]
    return _markdown(["goal", "found", "reached, by the estimate", "with its whole interval"], lines)


GOALS_RULE = """\
A goal is reached if the estimates reach it. The last column asks the same of the whole interval, paired by caption, of
what the goal compares: "unclear" where only a part of it does. The students from which the shipped one was chosen were
compared on captions and noise of this page too, so that its figures may be a little too good; `demo/README.md` has a
check on other captions, and says where the teacher of this page is: the one in `demo` has learned on since."""


def _frechet_note(results: Mapping[str, Measured]) -> list[str]:
    """What the distance's goal is worth; nothing while a row that shows it is not scored."""
    if not {DECODED, CAUSAL} <= results.keys():
        return []
    theirs, decoded = (results[name].frechet[0] for name in (CAUSAL, DECODED))
    reached = "reached" if theirs / decoded >= SHIPPED_SHARE else "not reached"
    return [
        "The Frechet distance is to true clips that were not decoded, so that most of it is the autoencoder's loss: "
        f"true clips through the autoencoder have {decoded:.2f}, by this rule {theirs / decoded:.0%}, {reached}. It "
        "says little of variety."
    ]


CLAIMS_NOTE = """\
Every row was trained once. Intervals are over captions and do not know what a second training of a row would have
given: an answer is about these trainings."""


def _trained_again(results: Mapping[str, Measured]) -> list[str]:
    """What the same commands gave a second time, where that was measured."""
    if not {FULL, FULL_AGAIN} <= results.keys():
        return []
    first, again = (written(spread(results[name], "everything"), SHARE) for name in (FULL, FULL_AGAIN))
    return [
        f"The commands of {FULL}, run once more from the causal initialisation on, have everything right in {again} of "
        f"clips, the first time in {first}. Rows are therefore compared with rows of the same initialisation alone: "
        "motion-10 and those named -again, -380 behind a sigma, or -fake-5, are of the second one."
    ]


METHOD = f"""\
* Captions are held out: each has a combination of shape, colour and direction that no training clip shows. Noise
  depends on seed and caption only, so all rows start from the same noise.
* Intervals are {CONFIDENCE:.0%}: {REPLICATES} bootstrap replicates (Frechet: {FRECHET_REPLICATES}) that draw whole
  captions, with all their seeds, from a generator with a fixed seed; percentiles, moved so that the replicates' mean is
  the estimate. The draws are the same for all rows, so differences are paired by caption. They do not cover the
  training's own chance: every row was trained once. Where all values are equal the interval has no width. "Surely" in
  a rule means that the whole interval is on one side.
* Colour, shape, direction: shares of commanded sprites, by `distillation/score.py`. Direction is judged in the first
  {score.EARLY_FRAMES} pixel frames, {score.EARLY_FRAMES / score.SECOND:.1f} s: the first chunk and one frame more.
  Everything: share of clips with all of that and no colours but the caption's (a second copy of a sprite is not seen).
* Motion: median over matched sprites of measured over commanded speed. End-point error: mean over sprites of
  |measured - commanded velocity|, by a straight line through the centroids of the first second, before a bounce; only
  sprites whose colour is right and that can be followed count, whose share is given beside it. Neither direction nor
  this error sees later chunks: `distillation/score.py` prints how many sprites still move as told at the end.
* Frechet distance: Gaussians fitted to 64 features of a fixed random convolutional network, in units of the true
  clips' deviation, to true clips of the same captions, which were not decoded. With few clips it is biased upwards:
  compare only rows of equal size. Row true-clips is the floor, real against real; true-clips-decoded adds what the
  autoencoder costs, and no row has been without that: a distance below its means a picture nearer to one not decoded,
  not more variety.
* Drift: last tenth of the long rollout against the first, on sprite pixels. Saturation is HSV's; sharpness is the root
  mean square gradient; points are hundredths. The bidirectional teacher has one length and no rollout.
* Seconds: batch 1, median of {TIMED_RUNS} after a warm-up, each chunk decoded as it comes. Rows were timed on different
  days."""


def make_readme(
    results: Mapping[str, Measured],
    absent: Mapping[str, str],
    options: Options,
    claims: Sequence[Claim],
    plots: Sequence[str] | None,
) -> str:
    """README.md of the evidence.

    Args:
        results: measured rows by name.
        absent: why each other row has none.
        plots: files beside it; None if matplotlib is not installed.
    """
    seeds = ", ".join(map(str, options.seeds))
    rollout = f"; rollouts of {options.long_length} frames on {options.long_captions} captions" if options.long else ""
    places = sorted({f"{m.timing.device}, {m.timing.threads} threads" for m in results.values() if m.timing})
    busy = [m.name for m in results.values() if m.timing and m.timing.load > 1 + 0.5 * m.timing.threads]
    goals = shipped_goals(results)
    parts = [
        "# Evidence",
        "Made by `python -m distillation.evaluate`; do not edit. "
        f"{options.captions} held-out captions, seeds {seeds}, {options.length} frames{rollout}.",
        "## Claims",
        CLAIMS_NOTE,
        *_trained_again(results),
        _markdown(["", "claim", "answer", "paper"], [[str(c.number), c.text, c.answer, c.paper] for c in claims]),
        *(_claim_text(claim) for claim in claims),
        *(["## The shipped student", GOALS_RULE, _goals_table(goals), *_frechet_note(results)] if goals else []),
        "## All rows",
        _main_table(results, absent, options.length),
        f"Timed on: {'; '.join(places) or 'nothing yet'}."
        + (f" The machine was busy with something else while timing {', '.join(busy)}." if busy else ""),
        "## Drift",
        _drift_table(results),
        "## Ablations",
        *(_group_table(group, results, absent, options.length) for group in GROUPS),
        "## Plots",
        "Plots were skipped: matplotlib is not installed."
        if plots is None
        else "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in plots) or "Nothing to plot yet.",
        "## How it is measured",
        METHOD,
        "## What was trained",
        _markdown(["row", "header of its weights"], [[m.name, m.recipe] for m in results.values() if m.timing]),
    ]
    return "\n\n".join(parts) + "\n"


def make_results(
    results: Mapping[str, Measured], absent: Mapping[str, str], options: Options, claims: Sequence[Claim]
) -> dict[str, Any]:
    """results.json: every number of the README, unrounded."""

    def entry(value: Spread | None) -> dict[str, float] | None:
        if value is None:
            return None
        low, high = value.interval()
        return {"estimate": value.estimate, "low": low, "high": high}

    rows = {}
    for subject in SUBJECTS:
        found = results.get(subject.name)
        if found is not None:
            rows[subject.name] = {
                "what": subject.text,
                "nfe": subject.nfe(options.length) if isinstance(subject, Row) else None,
                "measures": {name: entry(spread(found, name)) for name in MEASURES},
                "drift": {name: drift_curve(found, name) for name in found.drift},
                "timing": None if found.timing is None else asdict(found.timing),
                "recipe": found.recipe,
                "training": subject.training if isinstance(subject, Row) else None,
            }
    return {
        "options": asdict(options),
        "rows": rows,
        "absent": dict(absent),
        "claims": [asdict(claim) for claim in claims],
        "shipped": [asdict(goal) for goal in shipped_goals(results)],
    }


# ---------------------------------------------------------------------------------------------------------------
# Plots


def draw_plots(results: Mapping[str, Measured], out: Path, length: int) -> list[str] | None:
    """Writes PNG files and returns their names; None if matplotlib is not installed."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return None
    colours = (*colormaps["tab20"].colors, *colormaps["tab20b"].colors)
    colour = {name: colours[index % len(colours)] for index, name in enumerate(NAMES)}
    made: list[str] = []

    def save(figure: Any, name: str) -> None:
        with whole_file(out / name) as partial:
            figure.savefig(partial, format="png", dpi=110)
        made.append(name)

    def add_legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
        """Beside the plots, in as many columns as the figure has height for."""
        columns = -(-len(labels) // int(6 * figure.get_figheight()))
        figure.legend(handles, labels, loc="outside right upper", fontsize=7, ncols=columns)

    rolled = [name for name in NAMES if name in results and results[name].drift]
    if rolled:
        figure = Figure(figsize=(14, 4.5), layout="constrained")
        tenths = range(1, TENTHS + 1)
        for axes, name in zip(figure.subplots(1, len(DRIFTING)), DRIFTING, strict=True):
            for row in rolled:
                curve = [np.nan if value is None else value for value in drift_curve(results[row], name)]
                axes.plot(tenths, curve, label=row, color=colour[row], linestyle="-" if results[row].timing else "--")
            axes.set(title=name, xlabel="tenth of the rollout")
        add_legend(figure, *axes.get_legend_handles_labels())
        save(figure, "drift.png")

    def points(places: Mapping[str, float], measure: str) -> tuple[list[str], list[float], list[float], np.ndarray]:
        """Names, places, estimates and error bars [2, N] of the rows that have the measure, by place."""
        names, estimates, bars = [], [], []
        for name in sorted(places, key=lambda name: places[name]):
            value = spread(results[name], measure) if name in results else None
            if value is not None:
                low, high = value.interval()
                names.append(name)
                estimates.append(value.estimate)
                # The moved percentiles of a coarse median may lie on one side of it.
                bars.append((max(0.0, value.estimate - low), max(0.0, high - value.estimate)))
        return names, [places[name] for name in names], estimates, np.array(bars).reshape(-1, 2).T

    names, x, y, error = points({row.name: row.nfe(length) for row in ROWS}, "everything")
    if x:
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for name, at, value, bar in zip(names, x, y, error.T, strict=True):
            axes.errorbar([at], [value], bar[:, None], fmt="o", capsize=3, color=colour[name], label=name)
        add_legend(figure, *axes.get_legend_handles_labels())
        axes.set(xscale="log", xlabel=f"forwards of {length} frames", ylabel="share of clips with everything right")
        save(figure, "correctness_nfe.png")

    for file, sweep, label, shown in (
        ("context_sigma.png", CONTEXT_SIGMAS, "context sigma", ("everything", "saturation_drift", "correct_drift")),
        ("motion_weight.png", MOTION_WEIGHTS, "motion weight", ("everything", "amplitude", "endpoint")),
    ):
        curves = {measure: points(sweep, measure)[1:] for measure in shown}
        if not any(x for x, _, _ in curves.values()):
            continue
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, (measure, (x, y, error)) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
            if x:
                axes.errorbar(x, y, error, fmt="o-", capsize=3)
            axes.set(xlabel=label, ylabel=MEASURES[measure].title + (", change" if measure in DRIFTS else ""))
        save(figure, file)
    return made


# ---------------------------------------------------------------------------------------------------------------
# From kept scores to files


def load_scores(out: Path, options: Options | None) -> dict[str, Measured]:
    """Scores of all rows that have them and are still sampled as then.

    Args:
        options: leave out rows scored with others; None takes those that are there, which must agree.

    Raises:
        ValueError: options is None and rows were scored with different ones, or there is no row at all.
    """
    found: dict[str, Measured] = {}
    for subject in SUBJECTS:
        measured = Measured.load(scores_path(out, subject.name))
        if measured is None:
            continue
        if measured.sampling != subject.sampling():
            log.warning("%s was scored when it was sampled otherwise: left out", subject.name)
        elif options is not None and measured.options != options:
            log.warning("%s was scored with other options: left out", subject.name)
        else:
            found[subject.name] = measured
    if options is None:
        by_options: dict[Options, list[str]] = {}
        for name, measured in found.items():
            by_options.setdefault(measured.options, []).append(name)
        if len(by_options) != 1:
            groups = "; ".join(f"{', '.join(names)}: {chosen}" for chosen, names in by_options.items())
            raise ValueError(
                f"out is {os.fspath(out)!r}, whose rows were scored with {len(by_options)} sets of options and need "
                f"one ({groups or 'there is none'}). Score the rows with one, or delete files in rows/."
            )
    return found


WHY_FILE = "why.md"
_REASON = re.compile(r"^\* (\d+), (\w+): (.+)$", re.MULTILINE)


def read_reasons(out: Path) -> dict[tuple[int, str], str]:
    """What a reader wrote into OUT/why.md, by claim and answer, a line each: `* 3, no: too few updates.`"""
    path = out / WHY_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return {(int(number), answer): reason for number, answer, reason in _REASON.findall(text)}


def build(out: Path, results: Mapping[str, Measured], options: Options, *, runs: Path, demo: Path) -> list[Claim]:
    """Writes README.md, results.json and the plots from measurements; returns the claims."""
    absent = {name: "not scored" for name in NAMES if name not in results}
    absent |= {row.name: "not trained" for row in ROWS if row.name in absent and not find_checkpoint(row, runs, demo)}
    out.mkdir(parents=True, exist_ok=True)
    claims = answer_claims(results, options.length, read_reasons(out))
    plots = draw_plots(results, out, options.length)
    write_json(out / "results.json", make_results(results, absent, options, claims))
    write_text(out / "README.md", make_readme(results, absent, options, claims, plots))
    return claims
