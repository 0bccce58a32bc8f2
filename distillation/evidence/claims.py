"""From measurements to numbers, and from numbers to answers to the paper's claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import numpy as np

from diagonal_sampler.frames import latent_frames
from diagonal_sampler.schedule import DEFAULT_CONTEXT_SIGMA
from distillation.evidence.arithmetic import DEMO_SIZE, WAN_1_3B_480P, clip_flops
from distillation.evidence.measures import DRIFTS, MEASURES, NUMBER, PER_CAPTION, POINTS, SHARE, Measured, Timing
from distillation.evidence.rows import (
    CAUSAL,
    CONTEXT_SIGMAS,
    FIVE_FAKE,
    FULL,
    LONG_DIAGONAL,
    LONG_SELF_FORCING,
    NO_FORCING,
    NO_MOTION,
    NO_MOTION_AGAIN,
    RIVAL_SIGMAS,
    SELF_FORCING,
    SHIPPED,
    STEPS_4_2,
    TEACHER,
    UNIFORM_2,
    UNIFORM_4,
    Row,
    row_named,
)
from distillation.evidence.statistics import Spread, bootstrap, largest


def spread(measured: Measured, measure: str) -> Spread | None:
    """A measure of a row with its replicates; None where it was not measured or nothing could be."""
    if measure == "frechet":
        return Spread(measured.frechet[0], np.array(measured.frechet[1:]))
    if measure in DRIFTS:
        name = measure.removesuffix("_drift")
        changes = [_change(tenths, relative=name == "sharpness") for tenths in measured.drift.get(name, ())]
        return bootstrap(changes) if changes else None
    return bootstrap(measured.values[measure], PER_CAPTION[measure].statistic)


def _change(tenths: Sequence[float | None], *, relative: bool) -> list[float]:
    """Last tenth against first: the difference, or the ratio less 1; no value where either is missing."""
    first, last = tenths[0], tenths[-1]
    if first is None or last is None or (relative and first == 0):
        return []
    return [last / first - 1 if relative else last - first]


def written(value: Spread | None, form: str) -> str:
    """Estimate and interval as a table's cell."""
    if value is None:
        return "-"
    low, high = value.interval()
    if form == NUMBER:
        return f"{value.estimate:.2f} [{low:.2f}, {high:.2f}]"
    numbers = [f"{100 * x:{'+' if form == POINTS else ''}.1f}" for x in (value.estimate, low, high)]
    return f"{numbers[0]}{'%' if form == SHARE else ''} [{numbers[1]}, {numbers[2]}]"


# ---------------------------------------------------------------------------------------------------------------
# The claims

YES, NO, UNCLEAR, NOT_TESTED = "yes", "no", "unclear", "not tested"
QUALITY_MARGIN = 0.05
"""Points of a share that count as kept quality, as for the shipped student: 95%."""
ABOUT_HALF = 0.6  # share of the forwards
LEAST_QUALITY = 0.1
"""Share of clips with everything right below which "keeps the quality" says nothing: both may fail alike."""
PAPER_SPEED_UP = 277.3
KEEP_FORCING = (NO_MOTION, UNIFORM_2, UNIFORM_4)
"""Ablations with noisy context. A row without it must differ from full by more than these do: each was trained once,
and an interval over captions does not know what another training would have given."""
CONTEXT_PAIRS = (
    (SELF_FORCING, UNIFORM_4, "4 steps each; the former without the motion loss"),
    (LONG_SELF_FORCING, LONG_DIAGONAL, "380 updates; other steps and motion loss too"),
)
"""Rows with clean context beside the nearest with noisy context."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """What was tried where a claim did not hold, answered by the claim's own rule."""

    text: str
    answer: str
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the paper, the rule that answers it here, the numbers, and, where it did not hold, what was tried and,
    if a reader has written it down, why."""

    number: int
    text: str
    rule: str
    paper: str
    answer: str
    findings: tuple[str, ...]
    why: str = ""
    remedies: tuple[Remedy, ...] = ()


class _Missing(LookupError):
    """A row or measure that a claim needs is not there."""


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Measured rows, as the claims ask for them."""

    results: Mapping[str, Measured]
    length: int
    instead: Mapping[str, str] = field(default_factory=dict)
    """Rows that stand in for others, by the names of those."""

    def row(self, name: str) -> Measured:
        name = self.instead.get(name, name)
        if name not in self.results:
            raise _Missing(f"row {name} is missing")
        return self.results[name]

    def of(self, name: str, measure: str) -> Spread:
        found = spread(self.row(name), measure)
        if found is None:
            raise _Missing(f"row {name} has no {MEASURES[measure].title}")
        return found

    def timing(self, name: str) -> Timing:
        found = self.row(name).timing
        if found is None:
            raise _Missing(f"row {name} has no time")
        return found

    def as_row(self, name: str) -> Row:
        return row_named(self.instead.get(name, name))

    def nfe(self, name: str) -> int:
        return self.as_row(name).nfe(self.length)


def above(value: Spread, least: float = 0.0) -> str:
    """Whether a number is above `least`: yes or no where the whole interval is on one side, else unclear."""
    low, high = value.interval()
    return YES if low > least else NO if high < least else UNCLEAR


def within(value: Spread, least: float, most: float) -> str:
    """Whether a number is between two: yes or no where the whole interval is inside or outside, else unclear."""
    low, high = value.interval()
    return YES if least <= low and high <= most else NO if high < least or low > most else UNCLEAR


def all_of(*answers: str) -> str:
    """no if any is, yes if all are, else unclear."""
    return NO if NO in answers else YES if set(answers) == {YES} else UNCLEAR


def any_of(*answers: str) -> str:
    """yes if any is, no if all are, else unclear."""
    return YES if YES in answers else NO if set(answers) == {NO} else UNCLEAR


Answer = tuple[str, list[str]]


def _keeps_quality(e: _Evidence) -> Answer:
    answers, findings = [], []
    for measure in ("colour", "shape", "direction", "everything"):
        change = e.of(FULL, measure) - e.of(SELF_FORCING, measure)
        answers.append(above(change, -QUALITY_MARGIN))
        findings.append(f"{MEASURES[measure].title}: {written(change, POINTS)} points")
    findings.append(f"Frechet distance: {written(e.of(FULL, 'frechet') - e.of(SELF_FORCING, 'frechet'), NUMBER)}")
    share = e.nfe(FULL) / e.nfe(SELF_FORCING)
    findings.append(f"forwards: {e.nfe(FULL)} against {e.nfe(SELF_FORCING)} ({share:.2f})")
    answers.append(YES if share <= ABOUT_HALF else NO)
    answer = all_of(*answers)
    base = e.of(SELF_FORCING, "everything")
    if above(base, LEAST_QUALITY) != YES:
        answer = UNCLEAR
        findings.append(f"{SELF_FORCING} gets everything right in {written(base, SHARE)} of clips: no quality to keep")
    return answer, findings


def _forcing_costs_most(e: _Evidence) -> Answer:
    full = e.of(FULL, "everything")
    losses = {name: full - e.of(name, "everything") for name in (NO_FORCING, NO_MOTION, UNIFORM_2, UNIFORM_4)}
    findings = [f"everything right lost by {name}: {written(loss, POINTS)} points" for name, loss in losses.items()]
    lead_of_clips = losses[NO_FORCING] - largest(*(loss for name, loss in losses.items() if name != NO_FORCING))
    findings.append(f"its loss above the largest other: {written(lead_of_clips, POINTS)} points")
    rolled = []
    for measure, sign, words in (
        ("saturation_drift", 1, "saturation gained"),
        ("correct_drift", -1, "colour and shape lost"),
    ):
        own = e.of(FULL, measure)
        more = {name: (e.of(name, measure) - own) / sign for name in (NO_FORCING, *KEEP_FORCING)}
        lead = more[NO_FORCING] - largest(*(more[name] for name in KEEP_FORCING))
        each = "; ".join(f"{name} {written(change, POINTS)}" for name, change in more.items())
        findings.append(f"{words} over a rollout, more than {FULL}, in points: {each}")
        findings.append(f"{NO_FORCING}, above the largest of those that keep it: {written(lead, POINTS)} points")
        rolled.append(above(lead))
    for clean, noisy, words in CONTEXT_PAIRS:
        if {clean, noisy} <= e.results.keys() and not e.instead:
            more_by = written(e.of(clean, "saturation_drift") - e.of(noisy, "saturation_drift"), POINTS)
            findings.append(f"saturation gained by {clean}, more than {noisy} ({words}): {more_by} points")
    return all_of(above(lead_of_clips), any_of(*rolled)), findings


def _motion_shrinks(e: _Evidence) -> Answer:
    with_, without = e.of(FULL, "amplitude"), e.of(NO_MOTION, "amplitude")
    change = with_ - without
    low, high = change.interval()
    findings = [
        f"{FULL}: {written(with_, NUMBER)} of the commanded speed",
        f"{NO_MOTION}: {written(without, NUMBER)}",
        f"difference: {change.estimate:+.3f} [{low:+.3f}, {high:+.3f}]; of these two trainings the one without it "
        f"moves slower by {max(0.0, high):.1%} of the commanded speed at most",
    ]
    return above(change), findings


def _early_steps(e: _Evidence) -> Answer:
    early = (e.of(STEPS_4_2, "everything") - e.of(UNIFORM_2, "everything")) / (e.nfe(STEPS_4_2) - e.nfe(UNIFORM_2))
    late = (e.of(UNIFORM_4, "everything") - e.of(STEPS_4_2, "everything")) / (e.nfe(UNIFORM_4) - e.nfe(STEPS_4_2))
    findings = [
        f"an early forward ({UNIFORM_2} to {STEPS_4_2}) adds {written(early, POINTS)} points of everything right",
        f"a late forward ({STEPS_4_2} to {UNIFORM_4}) adds {written(late, POINTS)}",
        f"difference: {written(early - late, POINTS)}",
    ]
    return above(early - late), findings


def _context_is_best(e: _Evidence) -> Answer:
    best = next(name for name, sigma in CONTEXT_SIGMAS.items() if sigma == DEFAULT_CONTEXT_SIGMA)
    findings, answers = [f"{best}: everything right {written(e.of(best, 'everything'), SHARE)}"], {}
    ends = (min(CONTEXT_SIGMAS.values()), max(CONTEXT_SIGMAS.values()))
    for name, sigma in CONTEXT_SIGMAS.items():
        if e.instead and name not in e.instead:
            continue
        if name not in e.results and name != best and sigma not in ends:
            findings.append(f"sigma {sigma:.2g} ({name}): not scored")
        elif name != best:
            lead = e.of(best, "everything") - e.of(name, "everything")
            answers[sigma] = above(lead)
            findings.append(f"above sigma {sigma:.2g} ({name}): {written(lead, POINTS)} points")
    if e.instead:
        findings.append("the other sigmas were not trained so")
        return NO if NO in answers.values() else UNCLEAR, findings
    at_ends = {answers[end] for end in ends}
    return NO if NO in answers.values() else YES if at_ends == {YES} else UNCLEAR, findings


def _speed_up(e: _Evidence) -> Answer:
    slow, fast = e.timing(TEACHER), e.timing(FULL)
    median = float(np.median(slow.clip) / np.median(fast.clip))
    low, high = min(slow.clip) / max(fast.clip), max(slow.clip) / min(fast.clip)
    length = latent_frames(e.length)
    per_forward = e.as_row(FULL).settings.frames_per_chunk
    findings = [
        f"measured: {median:.1f}x ({low:.1f} to {high:.1f}, the range of {len(fast.clip)} runs of each, no interval), "
        f"batch 1, {fast.threads} threads, {fast.device}{f' ({fast.processor})' if fast.processor else ''}",
        f"forwards: {e.nfe(TEACHER)} against {e.nfe(FULL)} ({e.nfe(TEACHER) / e.nfe(FULL):.1f}x); latent frames that "
        f"go through the network: {e.nfe(TEACHER) * length / (e.nfe(FULL) * per_forward):.1f}x",
    ]
    for where, size in (("the demo's size", DEMO_SIZE), ("the paper's size", WAN_1_3B_480P)):
        slow_flops, fast_flops = (clip_flops(e.as_row(name), size) for name in (TEACHER, FULL))
        findings.append(
            f"arithmetic at {where}: {slow_flops / 1e12:,.2f} against {fast_flops / 1e12:,.3f} TFLOP a clip "
            f"({slow_flops / fast_flops:.1f}x)"
        )
    if SELF_FORCING in e.results and e.results[SELF_FORCING].timing is not None:
        other = float(np.median(e.timing(SELF_FORCING).clip) / np.median(fast.clip))
        findings.append(f"over {SELF_FORCING}: {other:.2f}x")
    if (slow.threads, slow.device) != (fast.threads, fast.device):
        findings.append("the two were timed on different devices or threads")
        return UNCLEAR, findings
    if slow.processor and fast.processor and slow.processor != fast.processor:
        findings.append(f"the two were timed on different processors: {slow.processor} and {fast.processor}")
        return UNCLEAR, findings
    if slow.device == "CPU" and not (slow.processor and fast.processor):
        findings.append("that both were timed on the same kind of CPU is not on record")
    return YES if low >= PAPER_SPEED_UP else NO if high < PAPER_SPEED_UP else UNCLEAR, findings


_CLAIMS: tuple[tuple[str, str, str, Callable[[_Evidence], Answer]], ...] = (
    (
        "Diagonal 4-3-2 keeps the quality of 4 uniform steps at about half the forwards.",
        f"yes if {FULL} loses less than {100 * QUALITY_MARGIN:.0f} points against {SELF_FORCING} in colour, shape, "
        f"direction and everything, and takes at most {ABOUT_HALF:g} of the forwards; no if one of them is surely not "
        f"so; unclear also if {SELF_FORCING} is not surely above {LEAST_QUALITY:.0%} of clips right. (Direction is "
        "judged in the first chunk, where both have four steps, and one frame more: it says little of the schedule.)",
        "17 forwards against 35; VBench 84.48",
        _keeps_quality,
    ),
    (
        "Removing diagonal forcing costs the most, and long rollouts then oversaturate or drift.",
        "yes if its loss of clips right is above every other ablation's, and over the long rollout saturation grows "
        "more or correctness falls more than in every ablation that keeps it; no if one of the two halves is surely "
        "not so. (Not than in full alone: by the chance of a training a row that keeps it may be as far from full.)",
        "long rollouts oversaturate without it",
        _forcing_costs_most,
    ),
    (
        "Removing flow distribution matching shrinks motion.",
        "yes if the median of measured over commanded speed is lower without it; no if higher.",
        "motion amplitude falls visibly (Table 2, Figure 6)",
        _motion_shrinks,
    ),
    (
        "More early steps are worth more than more late steps.",
        f"yes if a forward spent on the first chunk ({UNIFORM_2} to {STEPS_4_2}) adds more clips right than one spent "
        f"on later chunks ({STEPS_4_2} to {UNIFORM_4}); no if less.",
        "5333333 scores highest, 4222222 is fastest, 4322222 is the balance chosen (Table 3)",
        _early_steps,
    ),
    (
        "A context sigma near 0.36 is best.",
        "yes if sigma 0.36 has more clips right than both ends of the sweep and no scored sigma has more than it; no "
        "if one has; unclear if the ends cannot be told from it.",
        "noise near timestep 100 is best; much more loses structure, much less oversaturates (Figure 5a)",
        _context_is_best,
    ),
    (
        f"The speed-up over the undistilled teacher is {PAPER_SPEED_UP:g}x.",
        f"yes if even the slowest run against the teacher's fastest gives {PAPER_SPEED_UP:g}x; no if even the fastest "
        "against the teacher's slowest does not.",
        "277.3x (50 steps with CFG); 1.53x to 1.88x over Self Forcing",
        _speed_up,
    ),
)


def _rivals(name: str) -> dict[str, str]:
    """The two rows of the context sweep that were trained in another way, for those of the shared one."""
    return {f"context-{sigma:.2g}": f"context-{sigma:.2g}-{name}" for sigma in RIVAL_SIGMAS}


_REMEDIES: Mapping[int, tuple[tuple[str, Mapping[str, str]], ...]] = {
    1: (
        ("five times the updates for both, with a cooldown", {FULL: LONG_DIAGONAL, SELF_FORCING: LONG_SELF_FORCING}),
        ("five updates of the fake score for each of the student's, as in the paper", {FULL: FIVE_FAKE}),
    ),
    2: (
        ("noise at the paper's level, in a pass of its own, as clean context has one", {FULL: "context-0.36"}),
        ("more noise, likewise", {FULL: "context-0.8"}),
    ),
    3: (
        ("twice the weight", {FULL: "motion-2"}),
        ("half the weight", {FULL: "motion-0.5"}),
        ("ten times the weight, as in the authors' later code", {FULL: "motion-10", NO_MOTION: NO_MOTION_AGAIN}),
    ),
    5: (
        ("five times the updates for both, with a cooldown", _rivals("380")),
        ("five updates of the fake score for each of the student's, as in the paper", _rivals("fake-5")),
    ),
    6: (
        ("two steps for every chunk", {FULL: UNIFORM_2}),
        ("one step for every chunk", {FULL: "steps-1"}),
    ),
}
"""By claim: what was tried where it did not hold, and the rows that then stand in for others."""


def _remedies(number: int, evidence: _Evidence, decide: Callable[[_Evidence], Answer]) -> tuple[Remedy, ...]:
    found = []
    for text, instead in _REMEDIES.get(number, ()):
        try:
            answer, findings = decide(replace(evidence, instead=instead))
        except _Missing as missing:
            answer, findings = NOT_TESTED, [str(missing)]
        found.append(Remedy(text, answer, tuple(findings)))
    return tuple(found)


def answer_claims(
    results: Mapping[str, Measured], length: int, why: Mapping[tuple[int, str], str] = MappingProxyType({})
) -> list[Claim]:
    """The six claims, answered from what was measured.

    Args:
        results: by row name; rows may be missing.
        length: pixel frames of a clip.
        why: by claim and answer, a reader's reason for it.
    """
    evidence = _Evidence(results, length)
    claims = []
    for number, (text, rule, paper, decide) in enumerate(_CLAIMS, start=1):
        try:
            answer, findings = decide(evidence)
        except _Missing as missing:
            answer, findings = NOT_TESTED, [str(missing)]
        remedies = _remedies(number, evidence, decide) if answer in (NO, UNCLEAR) else ()
        reason = why.get((number, answer), "")
        claims.append(Claim(number, text, rule, paper, answer, tuple(findings), reason, remedies))
    return claims


# ---------------------------------------------------------------------------------------------------------------
# The shipped student

SHIPPED_SHARE = 0.95
"""Share of the causal undistilled model's score that the shipped student should reach on every measure."""
SHIPPED_AMPLITUDE = 0.1
"""How far its motion may be from the commanded, as a share."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal for the shipped student, whether its estimate reaches it, and whether its whole interval does."""

    text: str
    found: str
    reached: bool
    surely: str = NOT_TESTED


def shipped_goals(results: Mapping[str, Measured]) -> list[Goal]:
    """The goals for the shipped student against the causal undistilled model; empty while one of them is not scored.

    A goal is reached by estimates; `surely` is yes or no where the whole interval of what the goal compares lies on one
    side of it, else unclear. For measures where less is better (end-point error, Frechet distance) the share is the
    undistilled model's over the student's. The long rollout must not lose more than 5 points of its first tenth in
    saturation or correctness, nor 5% of sharpness. What could not be measured, or has no share, is not reached.
    """
    if not {SHIPPED, CAUSAL} <= results.keys():
        return []
    evidence = _Evidence(results, 0)
    goals = []

    def add(text: str, decide: Callable[[], tuple[str, bool] | tuple[str, bool, str]]) -> None:
        try:
            goals.append(Goal(text, *decide()))
        except _Missing as missing:
            goals.append(Goal(text, str(missing), False))

    def share_of(measure: str) -> tuple[str, bool] | tuple[str, bool, str]:
        mine, theirs = (evidence.of(name, measure) for name in (SHIPPED, CAUSAL))
        part, whole = (theirs, mine) if measure in ("endpoint", "frechet") else (mine, theirs)
        form = MEASURES[measure].form
        found = f"{written(mine, form)} against {written(theirs, form)}"
        if whole.estimate == 0:
            return f"{found}: there is no share of 0", False
        share = part.estimate / whole.estimate
        return f"{found}: {share:.0%}", share >= SHIPPED_SHARE, above(part - whole / (1 / SHIPPED_SHARE))

    def motion() -> tuple[str, bool, str]:
        off = evidence.of(SHIPPED, "amplitude")
        surely = within(off, 1 - SHIPPED_AMPLITUDE, 1 + SHIPPED_AMPLITUDE)
        return written(off, NUMBER), abs(off.estimate - 1) <= SHIPPED_AMPLITUDE, surely

    for measure in ("colour", "shape", "direction", "everything", "tracked", "endpoint", "frechet"):
        text = f"{MEASURES[measure].title}: at least {SHIPPED_SHARE:.0%} of the causal undistilled model's"
        add(text, partial(share_of, measure))
    add(f"motion within {SHIPPED_AMPLITUDE:.0%} of the commanded", motion)
    for measure in DRIFTS:
        change = spread(results[SHIPPED], measure)
        if change is not None:
            goals.append(
                Goal(
                    f"{DRIFTS[measure].title}: changes by no more than {100 * QUALITY_MARGIN:.0f} over ten clips",
                    written(change, POINTS),
                    abs(change.estimate) <= QUALITY_MARGIN,
                    within(change, -QUALITY_MARGIN, QUALITY_MARGIN),
                )
            )
    return goals
