"""The rows of the evidence: models, how each is sampled, and how it was trained."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open

from diagonal_sampler.frames import latent_frames
from diagonal_sampler.provenance import Provenance
from diagonal_sampler.sampler import count_forwards
from diagonal_sampler.schedule import (
    DEFAULT_CONTEXT_SIGMA,
    DEFAULT_PRESET,
    DEMO_PRESET,
    PRESETS,
    DiagonalSchedule,
    parse_steps,
)
from diagonal_sampler.settings import GLOBAL_WINDOW, CausalSettings, lasting_fields
from distillation import demo_files
from distillation.export import changed_fields
from distillation.recipes import ATTENTIONS, Recipe, parse_field
from distillation.recipes import demo as demo_recipe

log = logging.getLogger("evaluate")

TRAIN, LEVELS, FOLLOW = "train", "train_levels", "train_follow"
INITIAL = "initial.safetensors"
"""Weights that the training of rows begins with: the teacher after causal initialisation."""
INITIAL_AGAIN = "initial-again.safetensors"
"""The same made once more: rows that were added later begin with it, and are compared with one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model and one way to sample it.

    Attributes:
        name: of the row, of its weights and of its scores.
        text: what it is.
        checkpoint: a safetensors DiT, looked for in the folder of runs, then in the demo's.
        schedule: steps, noise levels and context.
        settings: how a causal row looks back.
        cfg: guidance against the empty caption; 1 is none.
        attention: "causal", or "bidirectional": the whole clip is one chunk.
        reference: the row it is compared with, or empty.
        training: flags of `trainer` that make it; None for the shared initialisation.
        trainer: the module of distillation that makes it: train, train_levels or train_follow.
        budget: flags of its own budget of updates; empty: the one that all rows share.
        start: weights in the folder of runs that its training begins with.
        mean_with: others there; the training begins with the mean of both.
        paper: what the paper says about it.

    Raises:
        ValueError: a name that is no file name, an unknown attention, guidance below 0.
    """

    name: str
    text: str
    checkpoint: str
    schedule: DiagonalSchedule
    settings: CausalSettings = CausalSettings()
    cfg: float = 1.0
    attention: str = "causal"
    reference: str = ""
    training: str | None = None
    trainer: str = TRAIN
    budget: str = ""
    start: str = INITIAL
    mean_with: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ValueError(f"name is {self.name!r}; it names a file: use small letters, digits, dots and dashes.")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention is {self.attention!r}; choose one of {', '.join(ATTENTIONS)}.")
        if not self.cfg >= 0:
            raise ValueError(f"cfg is {self.cfg}; it must be 0 or more (1: no guidance).")

    def settings_for(self, frames: int) -> CausalSettings:
        """How a clip of `frames` latent frames is cut into chunks and looked back on."""
        if self.attention == "causal":
            return self.settings
        return CausalSettings(frames_per_chunk=frames, window=GLOBAL_WINDOW, sink=0)

    def nfe(self, length: int) -> int:
        """Forwards of a clip of `length` pixel frames, cache passes and the unconditional half of guidance included."""
        frames = latent_frames(length)
        forwards = count_forwards(self.schedule, frames, self.settings_for(frames).frames_per_chunk)
        return forwards * (1 if self.cfg == 1 else 2)

    def sampling(self) -> str:
        """All that decides how it is sampled, as one line that changes when any of it does."""
        chosen = {
            "schedule": asdict(self.schedule),
            "settings": lasting_fields(self.settings),
            "cfg": self.cfg,
            "attention": self.attention,
        }
        return json.dumps(chosen, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """True clips scored like a row's: what the measures give where nothing is wrong.

    Attributes:
        decoded: through the demo's autoencoder and back, as every row's clips come out of its decoder.
    """

    name: str
    text: str
    decoded: bool

    def sampling(self) -> str:
        """All that decides how its clips are made, as one line."""
        return json.dumps({"control": self.decoded})


TEACHER, CAUSAL, SELF_FORCING, FULL = "teacher", "causal", "self-forcing", "diagonal-4-3-2"
NO_FORCING, NO_MOTION, UNIFORM_2, UNIFORM_4 = "without-diagonal-forcing", "without-motion", "uniform-2", "uniform-4"
STEPS_4_2 = "steps-4-2"
DECODED = "true-clips-decoded"
LONG_DIAGONAL, LONG_SELF_FORCING, FIVE_FAKE = "diagonal-380", "self-forcing-380", "fake-updates-5"
FULL_AGAIN, NO_MOTION_AGAIN = f"{FULL}-again", f"{NO_MOTION}-again"
LONG_ROLLOUTS, LONG_SINK, LONG_OPENING = "long-rollouts", "long-sink", "long-opening"
LOW_GUIDANCE, LOW_GUIDANCE_220, LOW_GUIDANCE_340 = "low-guidance", "low-guidance-220", "low-guidance-340"
GIVEN, LEVELS_416, LEVELS_512 = "given-280", "levels-416", "levels-512"
ONE_OF_EACH, ONE_OF_EACH_512, ONE_OF_EACH_704 = "one-of-each", "one-of-each-512", "one-of-each-704"
ONE_OF_EACH_MEAN, SHIPPED, FOLLOWER = "one-of-each-mean", "shipped", "follower"
UNDISTILLED_CFG = demo_files.TEACHER_CFG


LONG_BUDGET = "--updates 380 --cooldown 80"
RIVAL_SIGMAS = (DEFAULT_CONTEXT_SIGMA, 0.6)
"""Of the context: the paper's best and what was best here with the shared budget."""
DEMO_SCHEDULE = DiagonalSchedule.preset(DEMO_PRESET)
FIRST_MOVE = DiagonalSchedule.from_steps((4, 3, 2), times=(1.0, 4 / 9, 3 / 13, 0.1))
"""Noise levels 1, 0.8, 0.6 and 0.357."""
ONE_EACH = "--copies removed --pool 24 --first-batch 32 --batch 12 --first-share 0.2 --save-every 16"
TWO_IN_ONE = "--ends none --between 0.75 --length 241 --learning-rate 5e-5 --going-on-share 0.25 --first-share 0.35"
LONG_STAGE = ("--stage", "long", "--cfg", "4")
LOW_NOISE = ("--cfg-high", "0.8")
FROM_FINISHED = ("--given-share", "0.5")
FAKE_UPDATES = ("--fake-score-updates", "5")  # the paper's; the demo's recipe has 2


def _trained(
    name: str,
    text: str,
    steps: str = "4,3,2",
    *,
    preset: str = DEFAULT_PRESET,
    context_mode: str = "noisy",
    context_sigma: float = DEFAULT_CONTEXT_SIGMA,
    motion_weight: float = 1.0,
    others: tuple[str, ...] = (),
    reference: str = FULL,
    budget: str = "",
    start: str = INITIAL,
    paper: str = "",
) -> Row:
    """A trained row: its flags and its schedule are written from the same values; `others` are flags as they are."""
    flags = ["--preset", preset, "--steps", steps, "--context-mode", context_mode]
    if context_mode == "renoise":
        flags += ["--context-sigma", repr(context_sigma)]
    flags += ["--motion-weight", f"{motion_weight:g}", *others]
    return Row(
        name=name,
        text=text,
        checkpoint=f"{name}.safetensors",
        schedule=DiagonalSchedule.from_steps(
            parse_steps(steps),
            times=PRESETS[preset].times,
            context_mode=context_mode,
            context_sigma=context_sigma,
        ),
        reference=reference,
        training=shlex.join(flags),
        budget=budget,
        start=start,
        paper=paper,
    )


def _moved(
    name: str,
    text: str,
    flags: str,
    *,
    schedule: DiagonalSchedule = DEMO_SCHEDULE,
    checkpoint: str = "",
    start: str,
    mean_with: str = "",
) -> Row:
    """A row that distillation.train_levels made, with its flags."""
    levels = "; ".join(", ".join(map(repr, row)) for row in schedule.sigmas)
    return Row(
        name=name,
        text=text,
        checkpoint=checkpoint or f"{name}.safetensors",
        schedule=schedule,
        reference=CAUSAL,
        training=f"{flags} --sigmas {shlex.quote(levels)}",
        trainer=LEVELS,
        start=start,
        mean_with=mean_with,
    )


GIVEN_STEPS: tuple[Row, ...] = tuple(
    _trained(
        name,
        text,
        motion_weight=3,
        others=(*LONG_STAGE, *LOW_NOISE, "--rollout-frames", "75", "--opening-share", opening, "--given-share", given),
        budget="--updates 100 --warmup 10 --cooldown 50",
        start=f"{start}.safetensors",
    )
    for name, text, opening, given, start in (
        (
            "given-100",
            f"{LOW_GUIDANCE_340}, 100 updates more, half from finished chunks",
            "0.6",
            "0.5",
            LOW_GUIDANCE_340,
        ),
        ("given-200", "given-100, 100 updates more", "0.7", "0.6", "given-100"),
    )
)
"""What `GIVEN` goes on from; not scored."""

ROWS: tuple[Row, ...] = (
    Row(
        name=TEACHER,
        text=f"undistilled teacher: bidirectional, 50 Euler steps, cfg {UNDISTILLED_CFG:g}",
        checkpoint=demo_files.TEACHER_FILE,
        # One chunk has no successor, so nothing needs its clean keys: no cache pass.
        schedule=DiagonalSchedule.uniform(50, context_mode="noisy"),
        cfg=UNDISTILLED_CFG,
        attention="bidirectional",
        paper="1x; 50 steps with CFG",
    ),
    Row(
        name=CAUSAL,
        text=f"undistilled, causal: 12 Euler steps a chunk, clean context, cfg {UNDISTILLED_CFG:g}",
        checkpoint=demo_files.TEACHER_FILE,
        schedule=DiagonalSchedule.preset("undistilled"),
        cfg=UNDISTILLED_CFG,
        reference=TEACHER,
    ),
    _trained(
        SELF_FORCING,
        "Self Forcing: 4 uniform steps, clean context, no motion loss",
        "4",
        preset="self forcing",
        context_mode="clean",
        motion_weight=0,
        reference=CAUSAL,
        paper="35 forwards, 1.53x to 1.88x the time of 4-3-2",
    ),
    _trained(
        FULL,
        "diagonal 4-3-2, in full",
        reference=SELF_FORCING,
        paper="17 forwards, 277.3x, VBench 84.48 / 85.26 / 81.73; 2.61 s a clip, first frame 0.37 s (H100, 480p)",
    ),
    _trained(
        NO_FORCING,
        "without diagonal forcing: 4-3-2 steps, clean context (context sigma 0)",
        context_mode="clean",
        paper="long rollouts oversaturate",
    ),
    _trained(
        NO_MOTION,
        "without flow distribution matching (motion weight 0)",
        motion_weight=0,
        paper="motion falls visibly (Table 2, Figure 6)",
    ),
    _trained(UNIFORM_2, "without diagonal denoising: 2 steps a chunk, noisy context", "2"),
    _trained(UNIFORM_4, "without diagonal denoising: 4 steps a chunk, noisy context", "4"),
    _trained("steps-5-3", "steps 5, 3, 3, ...", "5,3", paper="scores highest (Table 3)"),
    _trained(STEPS_4_2, "steps 4, 2, 2, ...", "4,2", paper="fastest (Table 3)"),
    _trained(
        "steps-1",
        # A noisy context of one-step chunks would be pure noise (DiagonalSchedule.warnings).
        "1 step a chunk; context renoised to 0.36, as a noisy one would be pure noise",
        "1",
        context_mode="renoise",
    ),
    *(
        _trained(
            f"context-{sigma:.2g}",
            f"4-3-2 steps, context renoised to sigma {sigma:.2g}",
            context_mode="renoise",
            context_sigma=sigma,
            paper="best (Figure 5a)" if sigma == DEFAULT_CONTEXT_SIGMA else "",
        )
        for sigma in (0.2, DEFAULT_CONTEXT_SIGMA, 0.6, 0.8)
    ),
    *(
        _trained(f"motion-{weight:g}", f"4-3-2, motion weight {weight:g}", motion_weight=weight)
        for weight in (0.5, 2.0)
    ),
    # Beyond the shared budget: what was tried where a claim did not hold, and what is shipped.
    _trained(LONG_DIAGONAL, "4-3-2, 380 updates", reference=LONG_SELF_FORCING, budget=LONG_BUDGET),
    _trained(
        LONG_SELF_FORCING,
        "Self Forcing, 380 updates",
        "4",
        preset="self forcing",
        context_mode="clean",
        motion_weight=0,
        reference=CAUSAL,
        budget=LONG_BUDGET,
    ),
    _trained(FIVE_FAKE, "4-3-2, five updates of the fake score for each of the student's", others=FAKE_UPDATES),
    # From the initialisation made once more.
    _trained(FULL_AGAIN, f"{FULL}, once more from the beginning", start=INITIAL_AGAIN),
    _trained(
        NO_MOTION_AGAIN,
        f"{NO_MOTION}, once more from the beginning",
        motion_weight=0,
        reference=FULL_AGAIN,
        start=INITIAL_AGAIN,
    ),
    _trained("motion-10", "4-3-2, motion weight 10", motion_weight=10, reference=FULL_AGAIN, start=INITIAL_AGAIN),
    *(
        _trained(
            f"context-{sigma:.2g}-{name}",
            f"4-3-2, context renoised to sigma {sigma:.2g}, {words}",
            context_mode="renoise",
            context_sigma=sigma,
            others=others,
            budget=budget,
            reference=FULL_AGAIN,
            start=INITIAL_AGAIN,
        )
        for name, words, others, budget in (
            ("380", "380 updates", (), LONG_BUDGET),
            ("fake-5", "five updates of the fake score for each of the student's", FAKE_UPDATES, ""),
        )
        for sigma in RIVAL_SIGMAS
    ),
    _trained(
        LONG_ROLLOUTS,
        f"{LONG_DIAGONAL}, then windows of rollouts of up to 63 latent frames",
        others=(*LONG_STAGE, "--rollout-frames", "63", "--score-sink", "false"),
        reference=LONG_DIAGONAL,
        budget="--updates 200 --warmup 20 --cooldown 60",
        start=f"{LONG_DIAGONAL}.safetensors",
    ),
    _trained(
        LONG_SINK,
        f"{LONG_ROLLOUTS}, then windows of rollouts of up to 75, judged with the sink in view",
        others=(*LONG_STAGE, "--rollout-frames", "75"),
        reference=LONG_ROLLOUTS,
        budget="--updates 130 --warmup 20 --cooldown 50",
        start=f"{LONG_ROLLOUTS}.safetensors",
    ),
    _trained(
        LONG_OPENING,
        f"{LONG_SINK}, then half the windows at the beginning",
        others=(*LONG_STAGE, "--rollout-frames", "75", "--opening-share", "0.5"),
        reference=CAUSAL,
        budget="--updates 100 --warmup 10 --cooldown 40",
        start=f"{LONG_SINK}.safetensors",
    ),
    _trained(
        LOW_GUIDANCE,
        f"{LONG_OPENING}, then guided up to noise level 0.8 only",
        others=(*LONG_STAGE, *LOW_NOISE, "--rollout-frames", "75", "--opening-share", "0.5"),
        reference=CAUSAL,
        budget="--updates 60 --warmup 10 --cooldown 20",
        start=f"{LONG_OPENING}.safetensors",
    ),
    _trained(
        LOW_GUIDANCE_220,
        f"{LOW_GUIDANCE}, 160 updates more, more of them at the beginning",
        others=(*LONG_STAGE, *LOW_NOISE, "--rollout-frames", "75", "--opening-share", "0.75"),
        reference=LOW_GUIDANCE,
        budget="--updates 160 --warmup 10 --cooldown 40",
        start=f"{LOW_GUIDANCE}.safetensors",
    ),
    _trained(
        LOW_GUIDANCE_340,
        f"{LOW_GUIDANCE_220}, then three times the motion weight",
        motion_weight=3,
        others=(*LONG_STAGE, *LOW_NOISE, "--rollout-frames", "75", "--opening-share", "0.6"),
        reference=LOW_GUIDANCE,
        budget="--updates 120 --warmup 10 --cooldown 60",
        start=f"{LOW_GUIDANCE_220}.safetensors",
    ),
    _trained(
        GIVEN,
        f"{LOW_GUIDANCE_340}, 280 updates more, half of them from finished chunks",
        motion_weight=3,
        others=(*LONG_STAGE, *LOW_NOISE, "--rollout-frames", "63", "--opening-share", "0.99", *FROM_FINISHED),
        reference=CAUSAL,
        budget="--updates 80 --warmup 5 --cooldown 40",
        start=f"{GIVEN_STEPS[-1].name}.safetensors",
    ),
    _moved(
        LEVELS_416,
        f"{GIVEN}, moved to noise levels 1, 0.8, 0.6, 0.36 by regression in its own rollouts",
        "--updates 416",
        schedule=FIRST_MOVE,
        start=f"{GIVEN}.safetensors",
    ),
    _moved(
        LEVELS_512,
        f"{LEVELS_416}, 96 updates more",
        "--updates 96 --seed 8 --learning-rate 1e-4 --going-on-share 0.57",
        schedule=FIRST_MOVE,
        start=f"{LEVELS_416}.safetensors",
    ),
    _moved(
        ONE_OF_EACH,
        f"{LEVELS_416}, 320 updates more, mostly of first chunks, which the student finishes with one of each sprite",
        f"--updates 320 --seed 9 --first-pool 64 --ends student {ONE_EACH}",
        schedule=FIRST_MOVE,
        start=f"{LEVELS_416}.safetensors",
    ),
    _moved(
        ONE_OF_EACH_512,
        f"{ONE_OF_EACH}, 192 updates more, at noise levels 1, 0.75, 0.5, 0.36",
        f"--updates 192 --seed 10 --first-pool 64 --ends student {ONE_EACH}",
        start=f"{ONE_OF_EACH}.safetensors",
    ),
    _moved(
        ONE_OF_EACH_704,
        f"the mean of {ONE_OF_EACH_512} and {LEVELS_416}, 192 updates more, which the teacher finishes",
        f"--updates 192 --seed 11 --first-pool 48 {ONE_EACH}",
        start=f"{ONE_OF_EACH_512}.safetensors",
        mean_with=f"{LEVELS_416}.safetensors",
    ),
    _moved(
        ONE_OF_EACH_MEAN,
        f"the mean of {ONE_OF_EACH_704} and {LEVELS_416}, at the former's noise levels",
        "--updates 0",
        start=f"{ONE_OF_EACH_704}.safetensors",
        mean_with=f"{LEVELS_416}.safetensors",
    ),
    _moved(
        SHIPPED,
        f"the shipped student: {ONE_OF_EACH_MEAN}, 480 updates more, in which later chunks learn two forwards in one",
        f"--updates 480 --save-every 48 {TWO_IN_ONE}",
        checkpoint=demo_files.STUDENT_FILE,
        start=f"{ONE_OF_EACH_MEAN}.safetensors",
    ),
    Row(
        name=FOLLOWER,
        text=f"the demo's follower, without flow: {SHIPPED} with an adapter for optical flow, 1,832 updates more",
        checkpoint=demo_files.FOLLOWER_FILE,
        schedule=DEMO_SCHEDULE,
        reference=SHIPPED,
        training="--clips 16384 --length 81 --seed 93 --updates 815 --batch 96 --kept-batch 96 --kept-weight 6 "
        "--pool 96 --kept-clips 3072 --save-every 96 --warmup 20 --matrix-learning-rate 7e-4 --learning-rate 1.5e-4 "
        "--adapter-learning-rate 4e-3",
        trainer=FOLLOW,
        start="more_files",
    ),
)
CONTROLS: tuple[Control, ...] = (
    Control(name="true-clips", text="true clips: what the measures can reach", decoded=False),
    Control(name=DECODED, text="true clips through the autoencoder", decoded=True),
)
SUBJECTS: tuple[Row | Control, ...] = (*CONTROLS, *ROWS)
"""All that is scored, in the order of the tables."""
NAMES: tuple[str, ...] = tuple(subject.name for subject in SUBJECTS)
CONTEXT_SIGMAS: dict[str, float] = {NO_FORCING: 0.0} | {
    row.name: row.schedule.context_sigma
    for row in ROWS
    if row.schedule.context_mode == "renoise" and row.name == f"context-{row.schedule.context_sigma:.2g}"
}
"""Rows of the context sweep; a clean context is sigma 0."""
MOTION_WEIGHTS: dict[str, float] = {NO_MOTION: 0.0, "motion-0.5": 0.5, FULL: 1.0, "motion-2": 2.0}


def initial_command(runs: Path, *, teacher: Path, weights: str = INITIAL) -> str:
    """The shell commands of a causal initialisation that trained rows share, and of its export to `weights`."""
    name = weights.removesuffix(".safetensors")
    run, clips, target = (shlex.quote(os.fspath(runs / path)) for path in (name, f"{name}_clips", weights))
    return (
        f"python -m distillation.train --recipe demo --stage ode --out {run} --clips {clips} "
        f"--teacher {shlex.quote(os.fspath(teacher))} --ode-clips 384 --ode-steps 12 --batch 16 --micro-batch 16 "
        "--updates 250 --learning-rate 5e-4 --beta1 0.9 --ema-start 50 --save-every 50 --sample-every 0 && \\\n"
        f"python -m distillation.export --run {run} --to {target} --dtype float32"
    )


def training_command(row: Row, runs: Path, *, teacher: Path, demo: Path, updates: int | None = None) -> str:
    """The shell commands that train a row and export its weights to where the evaluation looks for them.

    Args:
        row: a trained one.
        runs: folder of the runs.
        teacher: weights of the shared initialisation.
        demo: folder of the demo's files.
        updates: the budget that all rows share which have none of their own; None is the recipe's.

    Raises:
        ValueError: a row that is not trained.
    """
    if row.training is None:
        raise ValueError(f"row is {row.name!r}, the shared initialisation; it is made by distillation.train_demo.")
    run, start, target = (shlex.quote(os.fspath(runs / name)) for name in (row.name, row.start, row.checkpoint))
    if row.trainer == FOLLOW:
        folder = shlex.quote(os.fspath(runs / FOLLOWER))
        command = (
            f"python -m distillation.train_follow --start {shlex.quote(os.fspath(demo))} --learned {start} --out {run} "
            f"{row.training}"
        )
        return (
            f'# {start}: demo/README.md, "The follower"\n{command} && \\\n'
            f"{command} --export {folder} --strength 1.15 && \\\n"
            f"mv {folder}/{demo_files.STUDENT_FILE} {target}"
        )
    if row.trainer == LEVELS:
        files = shlex.quote(os.fspath(demo))
        command = f"python -m distillation.train_levels --start {files} --student {start} --out {run}"
        if row.mean_with:
            command += f" --mean-with {shlex.quote(os.fspath(runs / row.mean_with))}"
        return f"{command} {row.training} && \\\n{command} --export {target}"
    shared = "" if updates is None else f" --updates {updates}"
    budget = f" {row.budget}" if row.budget else shared
    return (
        f"python -m distillation.train --recipe demo --out {run} --teacher {shlex.quote(os.fspath(teacher))} "
        f"--student {start} {row.training}{budget} && \\\n"
        f"python -m distillation.export --run {run} --to {target}"
    )


def row_named(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if row.name == name)


def find_checkpoint(row: Row, runs: Path, demo: Path) -> Path | None:
    """The row's weights in the folder of runs, else in the demo's; None if neither has them."""
    return next((path for folder in (runs, demo) if (path := folder / row.checkpoint).is_file()), None)


def check_header(row: Row, path: Path) -> str:
    """Compares a file's provenance with the row, and returns what it says about its training.

    Raises:
        ValueError: trained for another schedule, context or window, or in another stage, with other flags or in another
            number of updates; or an undistilled row whose file is distilled.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    found = Provenance.from_metadata(metadata, path.name)
    if row.training is None:
        if metadata.get("cfg") == "1":  # as distillation.export writes; an undistilled model needs guidance
            raise ValueError(
                f"checkpoint is {os.fspath(path)!r}, a distilled model, but row {row.name!r} is the undistilled one; "
                f"put the teacher's weights into the folder of runs as {row.checkpoint}."
            )
        return found.recipe or ""
    wrong = found.contradictions(
        steps_per_chunk=tuple(len(sigmas) for sigmas in row.schedule.sigmas),
        sigmas=row.schedule.sigmas,
        context_mode=row.schedule.context_mode,
        context_sigma=row.schedule.context_sigma if row.schedule.context_mode == "renoise" else None,
        frames_per_chunk=row.settings.frames_per_chunk,
        window=row.settings.window,
        sink=row.settings.sink,
    )
    wrong += _other_training(row, found.recipe or "")
    if wrong:
        raise ValueError(
            f"checkpoint is {os.fspath(path)!r}, which is not row {row.name!r}: {'; '.join(wrong)}. Train it with the "
            "flags that --commands prints."
        )
    return found.recipe or ""


_CHANGED = "; changed: "


def recipe_of(row: Row) -> Recipe:
    """The recipe of distillation.train that a row's flags and its own budget make.

    Raises:
        ValueError: a row that distillation.train does not make.
    """
    if row.training is None or row.trainer != TRAIN:
        raise ValueError(f"row is {row.name!r}, which distillation.train does not make.")
    words = shlex.split(f"{row.training} {row.budget}")
    fields = {
        flag.removeprefix("--").replace("-", "_"): text for flag, text in zip(words[::2], words[1::2], strict=True)
    }
    return demo_recipe(**{name: parse_field(name, text) for name, text in fields.items()})


def _other_training(row: Row, said: str) -> tuple[str, ...]:
    """Sentences about what a header's `recipe` says of stage, updates and changed flags that is not the row's.

    Headers of before distillation.export listed flags say nothing of them, and neither do those of a recipe without
    changes: then a row with flags of its own gets a warning.
    """
    updates = re.findall(r"(\d+) updates of", said)  # of each training in turn
    wrong = []
    if row.trainer != TRAIN:
        wanted = re.search(r"--updates (\d+)", row.training or "")
        if updates and wanted and updates[-1] != wanted[1]:
            wrong.append(f"the last training had {updates[-1]} updates, the row has {wanted[1]}")
        return tuple(wrong)
    recipe = recipe_of(row)
    stage = re.search(r"--stage (\w+)", said)
    if stage and stage[1] != recipe.stage:
        wrong.append(f"it was trained in stage {stage[1]}, the row in {recipe.stage}")
    if row.budget and updates and updates[-1] != str(recipe.updates):
        wrong.append(f"it had {updates[-1]} updates, the row has {recipe.updates}")
    wanted_flags = changed_fields(recipe)
    if _CHANGED in said:
        flags = said.split(_CHANGED, 1)[1]
        if flags != wanted_flags:
            wrong.append(f"it was trained with {flags!r}, the row with {wanted_flags!r}")
    elif wanted_flags and said:
        log.warning("%s: its header does not say whether it was trained with %s", row.name, wanted_flags)
    return tuple(wrong)
