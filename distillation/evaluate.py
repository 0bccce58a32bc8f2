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
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, SpriteSpec, load_caption_encoder, parse_caption
from diagonal_sampler.demo_autoencoder import (
    LATENT_CHANNELS,
    SPACE_FACTOR,
    DemoAutoencoder,
    latent_frames,
    load_demo_autoencoder,
    pixel_frames,
)
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.provenance import Provenance
from diagonal_sampler.sampler import count_forwards
from diagonal_sampler.schedule import DEFAULT_CONTEXT_SIGMA, DEFAULT_PRESET, PRESETS, DiagonalSchedule, parse_steps
from diagonal_sampler.settings import GLOBAL_WINDOW, CausalSettings
from distillation import score, sprites, train_demo
from distillation.common import git_commit
from distillation.recipes import ATTENTIONS, DEMO
from distillation.rollout import BatchNoise, sample_seed, stream
from distillation.samples import decode_frames, to_host_scale

log = logging.getLogger("evaluate")

MEASURES_VERSION = 1
"""Raise it when a measure changes: rows that were scored before are then scored again."""
BATCH = 16  # clips sampled together
DECODED_LATENTS = 336  # latent frames decoded together: 16 clips of 81 frames, about 0.4 GB of activations
TENTHS = 10  # parts of a long rollout
SHORTEST = 32  # pixel frames that distillation.score needs
REAL_SEED, CONTROL_SEED = 1_000_003, 2_000_003  # of scenes: two sets of true clips that share none
TIMED_RUNS = 3


# ---------------------------------------------------------------------------------------------------------------
# The rows


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
        training: flags of distillation.train that make it; None for the shared initialisation.
        motion_weight: the paper's gamma it is trained with.
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
    motion_weight: float | None = None
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
            "settings": asdict(self.settings),
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
        return json.dumps({"control": self.decoded})


TEACHER, CAUSAL, SELF_FORCING, FULL = "teacher", "causal", "self-forcing", "diagonal-4-3-2"
NO_FORCING, NO_MOTION, UNIFORM_2, UNIFORM_4 = "without-diagonal-forcing", "without-motion", "uniform-2", "uniform-4"
STEPS_4_2 = "steps-4-2"
UNDISTILLED_CFG = 2.5


def _trained(
    name: str,
    text: str,
    steps: str = "4,3,2",
    *,
    preset: str = DEFAULT_PRESET,
    context_mode: str = "noisy",
    context_sigma: float = DEFAULT_CONTEXT_SIGMA,
    motion_weight: float = 1.0,
    reference: str = FULL,
    paper: str = "",
) -> Row:
    """A trained row: its flags and its schedule are written from the same values."""
    flags = ["--preset", preset, "--steps", steps, "--context-mode", context_mode]
    if context_mode == "renoise":
        flags += ["--context-sigma", repr(context_sigma)]
    flags += ["--motion-weight", f"{motion_weight:g}"]
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
        motion_weight=motion_weight,
        paper=paper,
    )


ROWS: tuple[Row, ...] = (
    Row(
        name=TEACHER,
        text="undistilled teacher: bidirectional, 50 Euler steps, cfg 2.5",
        checkpoint=train_demo.DIT_FILE,
        # One chunk has no successor, so nothing needs its clean keys: no cache pass.
        schedule=DiagonalSchedule.uniform(50, context_mode="noisy"),
        cfg=UNDISTILLED_CFG,
        attention="bidirectional",
        paper="1x; 50 steps with CFG",
    ),
    Row(
        name=CAUSAL,
        text="undistilled, causal: 12 Euler steps a chunk, clean context, cfg 2.5",
        checkpoint=train_demo.DIT_FILE,
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
)
CONTROLS: tuple[Control, ...] = (
    Control(name="true-clips", text="true clips: what the measures can reach", decoded=False),
    Control(name="true-clips-decoded", text="true clips through the autoencoder", decoded=True),
)
NAMES: tuple[str, ...] = tuple(subject.name for subject in (*CONTROLS, *ROWS))
CONTEXT_SIGMAS: dict[str, float] = {NO_FORCING: 0.0} | {
    row.name: row.schedule.context_sigma
    for row in ROWS
    if row.schedule.context_mode == "renoise" and "context" in row.name
}
"""Rows of the context sweep; a clean context is sigma 0."""
MOTION_WEIGHTS: dict[str, float] = {NO_MOTION: 0.0, "motion-0.5": 0.5, FULL: 1.0, "motion-2": 2.0}


def training_command(row: Row, runs: Path, *, teacher: Path, updates: int | None = None) -> str:
    """The shell commands that train a row and export its weights to where the evaluation looks for them.

    Args:
        row: a trained one.
        runs: folder of the runs.
        teacher: weights of the shared initialisation.
        updates: the budget, equal for all rows; None is the recipe's.

    Raises:
        ValueError: a row that is not trained.
    """
    if row.training is None:
        raise ValueError(f"row is {row.name!r}, the shared initialisation; it is made by distillation.train_demo.")
    run = shlex.quote(os.fspath(runs / row.name))
    budget = "" if updates is None else f" --updates {updates}"
    return (
        f"python -m distillation.train --recipe demo --out {run} --teacher {shlex.quote(os.fspath(teacher))} "
        f"{row.training}{budget} && \\\n"
        f"python -m distillation.export --run {run} --to {shlex.quote(os.fspath(runs / row.checkpoint))}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every row of one table shares.

    Attributes:
        captions: held-out captions.
        seeds: of the noise.
        length: pixel frames of a clip, 4n + 1.
        long: length of the drift rollout in clips; 0 leaves it out.
        long_captions: captions of the drift rollout, with the first seed.

    Raises:
        ValueError: a value out of range.
    """

    captions: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = sprites.CLIP_FRAMES
    long: int = 10
    long_captions: int = 32

    def __post_init__(self) -> None:
        if self.captions < 2:
            raise ValueError(f"captions is {self.captions}; intervals over captions need at least 2.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give at least one and none twice, such as 0,1,2.")
        whole = pixel_frames(latent_frames(self.length))
        if self.length <= SHORTEST or whole != self.length:
            nearest = max(whole, SHORTEST + 1)
            raise ValueError(
                f"length is {self.length}; clips have 4n + 1 pixel frames, and the scorer needs at least "
                f"{SHORTEST + 1}: use {nearest}."
            )
        if self.long and (self.long < 0 or self.long_length < TENTHS * SHORTEST):
            least = -(-(TENTHS * SHORTEST + 3) // self.length)
            raise ValueError(
                f"long is {self.long}; each tenth of a rollout of long * length ({self.length}) frames needs "
                f"{SHORTEST}: use at least {least}, or 0 to leave the rollout out."
            )
        if self.long and not 2 <= self.long_captions <= self.captions:
            raise ValueError(
                f"long_captions is {self.long_captions}; it must be at least 2 and at most captions ({self.captions})."
            )

    @property
    def long_length(self) -> int:
        """Pixel frames of the drift rollout."""
        return pixel_frames(latent_frames(self.long * self.length))


# ---------------------------------------------------------------------------------------------------------------
# Intervals: resampling captions

REPLICATES = 1000
FRECHET_REPLICATES = 200  # each takes two eigendecompositions
BOOTSTRAP_SEED = 20260
CONFIDENCE = 0.95


@lru_cache(maxsize=8)
def caption_counts(captions: int) -> np.ndarray:
    """How often each replicate draws each caption, int64 [REPLICATES, captions].

    The draws depend on the number of captions only, so the replicates of two rows are paired.
    """
    rng = np.random.default_rng([BOOTSTRAP_SEED, captions])
    drawn = rng.integers(captions, size=(REPLICATES, captions))
    return np.stack([np.bincount(row, minlength=captions) for row in drawn])


@dataclass(frozen=True, slots=True)
class Spread:
    """An estimate and its bootstrap replicates; sums and differences of two rows stay paired by caption."""

    estimate: float
    replicates: np.ndarray

    def __sub__(self, other: Spread) -> Spread:
        return Spread(self.estimate - other.estimate, self.replicates - other.replicates)

    def __truediv__(self, divisor: float) -> Spread:
        return Spread(self.estimate / divisor, self.replicates / divisor)

    def interval(self) -> tuple[float, float]:
        """The 95% interval: percentiles of the replicates, moved so that their mean is the estimate.

        The move is nearly nothing for shares and means. It removes the bias of a resampled Frechet distance, which is
        larger than the distance itself because a resampled set has fewer distinct clips.
        """
        moved = self.replicates[~np.isnan(self.replicates)]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(moved - moved.mean() + self.estimate, [tail, 1 - tail])
        return float(low), float(high)


def largest(first: Spread, *others: Spread) -> Spread:
    """The largest of several, replicate by replicate."""
    for other in others:
        first = Spread(max(first.estimate, other.estimate), np.maximum(first.replicates, other.replicates))
    return first


def bootstrap(values: Sequence[Sequence[float]], statistic: str = "mean") -> Spread | None:
    """A mean or median over all values, with replicates that draw whole captions.

    Args:
        values: a list for each caption, of any length: its sprites or clips over all seeds.
        statistic: "mean" or "median" (the lower one of two).

    Returns:
        None where there is no value at all.

    Raises:
        ValueError: an unknown statistic.
    """
    if statistic not in ("mean", "median"):
        raise ValueError(f"statistic is {statistic!r}; choose mean or median.")
    numbers = np.array([value for own in values for value in own], dtype=np.float64)
    if not len(numbers):
        return None
    owner = np.repeat(np.arange(len(values)), [len(own) for own in values])
    # The estimate is the replicate that draws every caption once.
    counts = np.concatenate([np.ones((1, len(values)), np.int64), caption_counts(len(values))])
    if statistic == "mean":
        total = np.bincount(owner, numbers, minlength=len(values))
        number = np.bincount(owner, minlength=len(values))
        with np.errstate(invalid="ignore"):
            found = (counts @ total) / (counts @ number)
    else:
        order = np.argsort(numbers, kind="stable")
        below = np.cumsum(counts[:, owner[order]], axis=1)
        at = (below * 2 >= below[:, -1:]).argmax(axis=1)
        found = np.where(below[:, -1] > 0, numbers[order][at], np.nan)
    return Spread(float(found[0]), found[1:])


# ---------------------------------------------------------------------------------------------------------------
# Measures of pixels: commanded motion and drift

EDGE = sprites.RADIUS_RANGE[1] + 1.0
"""A centre this near to an edge, in pixels, may be bouncing."""
UNHIDDEN_AREA = 0.85
"""Share of a sprite's usual area that must be seen: a centroid of a half-hidden sprite is not its centre."""
FEWEST_SEEN = 5  # frames of a straight-line fit


def first_velocity(centroid: Tensor, area: Tensor) -> Tensor | None:
    """Velocity in pixels per frame, (x, y), over the first second and before the first bounce.

    A least-squares line through the centroids. A bounce is where an edge distance is smallest, if the centre came
    more than a pixel nearer before and went more than a pixel away after.

    Args:
        centroid: [T, 2] as (x, y), NaN where unseen.
        area: [T] pixels.

    Returns:
        [2], or None where fewer than 5 frames show the sprite.
    """
    centroid, area = centroid[: sprites.FRAMES_PER_SECOND], area[: sprites.FRAMES_PER_SECOND]
    seen = ~centroid[:, 0].isnan()
    if not bool(seen.any()):
        return None
    seen &= area >= UNHIDDEN_AREA * area[seen].median()
    time_axis, path = seen.nonzero()[:, 0].float(), centroid[seen]
    stop = len(path)
    for distance in torch.cat([path, sprites.FRAME_SIZE - path], dim=1).unbind(1):
        at = int(distance.argmin())
        nearest = float(distance[at])
        if nearest <= EDGE and float(distance[0]) - nearest > 1 and float(distance[-1]) - nearest > 1:
            stop = min(stop, at + 1)
    time_axis, path = time_axis[:stop], path[:stop]
    if len(path) < FEWEST_SEEN:
        return None
    time_axis = time_axis - time_axis.mean()
    return (time_axis[:, None] * (path - path.mean(0))).sum(0) / time_axis.square().sum()


def commanded_velocity(spec: SpriteSpec) -> Tensor:
    """(x, y) pixels per frame, [2]."""
    return torch.tensor(sprites.VELOCITY[spec.direction]) * sprites.PIXELS_PER_FRAME[spec.speed]


def endpoint_errors(frames: Tensor, specs: Sequence[SpriteSpec]) -> list[float | None]:
    """|measured - commanded velocity| of each sprite in pixels per frame; None where it cannot be measured.

    Args:
        frames: [T, 3, H, W] in 0..255.
        specs: commanded sprites; each is found by its colour.
    """
    blobs = score._find_blobs(frames[: sprites.FRAMES_PER_SECOND].float())
    found: list[float | None] = []
    for spec in specs:
        velocity = first_velocity(blobs.centroid(spec.colour), blobs.area(spec.colour))
        found.append(None if velocity is None else float((velocity - commanded_velocity(spec)).norm()))
    return found


def saturation_and_sharpness(frames: Tensor) -> tuple[float | None, float | None]:
    """Means over the sprite pixels of frames; None where there is none.

    Saturation is HSV's, in [0, 1]. Sharpness is the root mean square gradient magnitude, in levels of 255 a pixel,
    over sprite pixels and their neighbours. (The plain mean would not do: a blurred edge has a lower slope over more
    pixels, and the same sum.)

    Args:
        frames: [T, 3, H, W] in 0..255.
    """
    blobs = score._find_blobs(frames)
    mask = torch.stack(list(blobs.alpha.values())).sum(0) > 0
    if not bool(mask.any()):
        return None, None
    brightest, darkest = frames.amax(1), frames.amin(1)
    saturation = ((brightest - darkest) / brightest.clamp(min=1))[mask].mean()
    slope_x = F.pad(frames.diff(dim=3), (0, 1))
    slope_y = F.pad(frames.diff(dim=2), (0, 0, 0, 1))
    edges = F.max_pool2d(mask.float().unsqueeze(1), 3, stride=1, padding=1)[:, 0] > 0
    sharpness = (slope_x.square() + slope_y.square()).sum(1)[edges].mean().sqrt()
    return float(saturation), float(sharpness)


@dataclass(frozen=True, slots=True)
class Drift:
    """A long rollout in tenths: saturation, sharpness, and the share of sprites with colour and shape right."""

    saturation: tuple[float | None, ...]
    sharpness: tuple[float | None, ...]
    correct: tuple[float, ...]


def drift_of(frames: Tensor, caption: str) -> Drift:
    """Measures each tenth of a rollout.

    Args:
        frames: [T, 3, H, W] in 0..255, T at least 320.

    Raises:
        ValueError: fewer frames.
    """
    if len(frames) < TENTHS * SHORTEST:
        raise ValueError(f"frames has {len(frames)} frames; a rollout in tenths needs {TENTHS * SHORTEST}.")
    saturation, sharpness, correct = [], [], []
    for tenth in range(TENTHS):
        part = frames[tenth * len(frames) // TENTHS : (tenth + 1) * len(frames) // TENTHS].float()
        of_part = saturation_and_sharpness(part)
        saturation.append(of_part[0])
        sharpness.append(of_part[1])
        seen = score.score_clip(part, caption).sprites
        correct.append(sum(sprite.colour_right and sprite.shape_right for sprite in seen) / len(seen))
    return Drift(tuple(saturation), tuple(sharpness), tuple(correct))


# ---------------------------------------------------------------------------------------------------------------
# Frechet distance in a fixed feature space

FEATURE_SEED = 1605
FEATURE_CHANNELS = 16
FEATURES = 4 * FEATURE_CHANNELS  # mean and deviation, of frames and of frame differences
SMALLEST_SCALE = 0.01  # of the median feature's deviation: a feature that hardly varies is not blown up


class ClipFeatures:
    """A fixed, random, two-layer convolutional network: a clip becomes 64 numbers.

    It sees frames at half size and, with weights of its own, the differences of neighbouring frames. Each of the 16
    channels of either is pooled to mean and deviation over time and space. Random features know no classes, but any
    change in how colours, sizes, sharpness or speeds are distributed over the clips moves them. They compare sets:
    clips that swap their captions change nothing.
    """

    KERNELS = ((3, 5), (FEATURE_CHANNELS, 3))  # input channels, side

    def __init__(self, seed: int = FEATURE_SEED) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.branches = [
            [
                torch.randn(FEATURE_CHANNELS, inputs, side, side, generator=generator) * (2 / (inputs * side**2)) ** 0.5
                for inputs, side in self.KERNELS
            ]
            for _ in range(2)
        ]

    def __call__(self, frames: Tensor) -> np.ndarray:
        """frames: [T, 3, H, W] in 0..255, T at least 2. Returns float64 [64]."""
        small = F.avg_pool2d(frames.float() / 127.5 - 1, 2)
        pooled = []
        for weights, x in zip(self.branches, (small, small.diff(dim=0)), strict=True):
            for weight in weights:
                x = F.relu(F.conv2d(x, weight, stride=2, padding=weight.shape[-1] // 2))
            x = x.double()
            pooled += [x.mean((0, 2, 3)), x.std((0, 2, 3))]
        return torch.cat(pooled).numpy()


def moments(features: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of features [N, d], each taken `counts` [N] times."""
    return np.average(features, axis=0, weights=counts), np.cov(features, rowvar=False, fweights=counts)


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, float64.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau 1982). The roots of C_a and C_b are
    made by eigendecomposition, also of low rank. The last trace is the sum of the singular values of their product,
    which is more exact than roots of eigenvalues near 0.
    """
    roots = []
    for cov in (cov_a, cov_b):
        values, vectors = np.linalg.eigh(cov)
        roots.append((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)  # rounding makes zeros slightly negative
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_spread(made: np.ndarray, real: np.ndarray) -> Spread:
    """Frechet distance of two sets of features, each in units of the real one's deviation, with replicates.

    With few clips the estimate is too large (two samples of one distribution differ), so it compares sets of one size
    only; row true-clips shows the floor.

    Args:
        made, real: [captions, seeds, d]; a replicate draws the same captions of both.

    Raises:
        ValueError: shapes that differ.
    """
    if made.shape != real.shape:
        raise ValueError(f"made is {made.shape} and real {real.shape}; the distance compares sets of one size.")
    captions, seeds, width = real.shape
    scale = real.reshape(-1, width).std(0)
    scale = np.maximum(scale, SMALLEST_SCALE * np.median(scale))
    a, b = (x.reshape(-1, width) / scale for x in (made, real))

    def distance(counts: np.ndarray) -> float:
        of_clips = np.repeat(counts, seeds)
        return frechet(*moments(a, of_clips), *moments(b, of_clips))

    replicates = [distance(counts) for counts in caption_counts(captions)[:FRECHET_REPLICATES]]
    return Spread(distance(np.ones(captions, np.int64)), np.array(replicates))


# ---------------------------------------------------------------------------------------------------------------
# Making clips

Clips = Callable[[Sequence[str], int, int], Iterator[Tensor]]
"""(captions, seed, pixel frames) -> one clip a caption, [T, 3, H, W] in 0..255, on the CPU."""


@dataclass(frozen=True, slots=True)
class DemoParts:
    """What all rows share beside their DiT."""

    encoder: CaptionEncoder
    autoencoder: DemoAutoencoder
    device: torch.device
    digest: str


def digest_of(*files: Path) -> str:
    """SHA-256 over the contents of files."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream_:
            while block := stream_.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def load_parts(folder: Path, device: torch.device) -> DemoParts:
    """Caption encoder and autoencoder of a demo folder.

    Raises:
        ValueError: one of them is not there.
    """
    files = [folder / name for name in (train_demo.TEXT_ENCODER_FILE, train_demo.AUTOENCODER_FILE)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"demo is {os.fspath(folder)!r}, which has no {file.name}; give the demo's folder.")
    encoder, autoencoder = load_caption_encoder(files[0]), load_demo_autoencoder(files[1])
    return DemoParts(encoder.to(device), autoencoder.to(device), device, digest_of(*files))


def _latents(
    dit: WanDiT, parts: DemoParts, row: Row, captions: Sequence[str], seed: int, length: int
) -> Iterator[Tensor]:
    """Chunks of latents, sampled as at inference. A clip's noise depends on its seed and caption only."""
    frames = latent_frames(length)
    side = sprites.FRAME_SIZE // SPACE_FACTOR
    seeds = [sample_seed(seed, "evaluate", caption) for caption in captions]
    return stream(
        dit,
        parts.encoder.encode(captions),
        BatchNoise(seeds, (LATENT_CHANNELS, side, side), parts.device),
        row.schedule,
        row.settings_for(frames),
        frames,
        precision=torch.bfloat16,
        cfg=row.cfg,
        negative=parts.encoder.encode([""]),
    )


def sampled_clips(dit: WanDiT, parts: DemoParts, row: Row) -> Clips:
    """The clips of a row; memory is bounded by a batch of latents and a few decoded clips."""

    def make(captions: Sequence[str], seed: int, length: int) -> Iterator[Tensor]:
        together = max(1, DECODED_LATENTS // latent_frames(length))
        for start in range(0, len(captions), BATCH):
            chunks = _latents(dit, parts, row, captions[start : start + BATCH], seed, length)
            for latents in torch.cat(list(chunks), dim=2).split(together):
                yield from decode_frames(parts.autoencoder, latents).cpu()

    return make


def true_clips(first_seed: int, autoencoder: DemoAutoencoder | None = None) -> Clips:
    """Rendered clips of the same captions, from scenes of other seeds, and through `autoencoder` if it is given."""

    @torch.no_grad()
    def make(captions: Sequence[str], seed: int, length: int) -> Iterator[Tensor]:
        for index, caption in enumerate(captions):
            scene = sprites.make_scenes([parse_caption(caption)], first_seed + seed, index)
            drawn = sprites.render(scene, torch.arange(length))
            if autoencoder is None:
                yield drawn[0].float()
            else:
                device = autoencoder.wan_mean.device
                pixels = autoencoder.decode(autoencoder.encode(sprites.to_pixels(drawn).to(device)))
                yield ((pixels + 1) * 127.5).clamp(0, 255).movedim(1, 2)[0].cpu()

    return make


# ---------------------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a clip at batch 1 and of its first chunk, decoding included, and what they were measured on."""

    clip: tuple[float, ...]
    first_chunk: tuple[float, ...]
    threads: int
    device: str
    load: float  # of the machine, 1 minute mean, before: above the threads used, something else was running


@torch.no_grad()
def measure_time(dit: WanDiT, parts: DemoParts, row: Row, length: int) -> Timing:
    """Streams a clip, chunk by chunk through the decoder, once to warm up and three times for the clock."""
    caption = sprites.held_out_captions(1)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0

    def once() -> tuple[float, float]:
        started, first = time.perf_counter(), None
        for index, chunk in enumerate(_latents(dit, parts, row, caption, 0, length)):
            parts.autoencoder.decode(to_host_scale(chunk), has_first_frame=index == 0).cpu()  # waits for a GPU
            first = time.perf_counter() - started if first is None else first
        assert first is not None
        return time.perf_counter() - started, first

    once()
    clip, first = zip(*(once() for _ in range(TIMED_RUNS)), strict=True)
    device = torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else "CPU"
    return Timing(clip, first, torch.get_num_threads(), device, round(load, 2))


# ---------------------------------------------------------------------------------------------------------------
# Scoring a row


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured of a row: enough to make every table again.

    Attributes:
        key: digest of weights, sampling and options.
        sampling: Row.sampling at the time.
        recipe: what the weights' header says about their training, with the commit that scored them.
        values: measure -> a list for each caption.
        frechet: the distance, then its replicates.
        drift: name of Drift's fields -> a list of tenths for each caption of the long rollout; empty if left out.
    """

    name: str
    key: str
    sampling: str
    recipe: str
    options: Options
    values: dict[str, list[list[float]]]
    frechet: list[float]
    drift: dict[str, list[list[float | None]]]
    timing: Timing | None

    def save(self, path: Path) -> None:
        """Writes JSON under a temporary name, then renames."""
        _write(path, json.dumps({"version": MEASURES_VERSION, **asdict(self)}, separators=(",", ":")))

    @classmethod
    def load(cls, path: Path) -> Measured | None:
        """Reads what `save` wrote; None if there is nothing, or scores of another version of the measures.

        Raises:
            ValueError: a file that is not one of these.
        """
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            if found.pop("version") != MEASURES_VERSION:
                return None
            options, timing = found.pop("options"), found.pop("timing")
            if timing is not None:
                timing |= {name: tuple(timing[name]) for name in ("clip", "first_chunk")}
            return cls(
                **found,
                options=Options(**{**options, "seeds": tuple(options["seeds"])}),
                timing=None if timing is None else Timing(**timing),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} holds no scores ({error}); delete it and the row is scored again."
            ) from None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def measure_clips(
    clips: Clips, captions: Sequence[str], options: Options, real: np.ndarray, *, long: bool
) -> tuple[dict[str, list[list[float]]], list[float], dict[str, list[list[float | None]]]]:
    """Values, Frechet distance and drift, as Measured keeps them.

    Args:
        real: [captions, seeds, 64] features of true clips.
        long: whether to make the long rollout.
    """
    network = ClipFeatures()
    features = np.zeros((len(captions), len(options.seeds), FEATURES))
    values: dict[str, list[list[float]]] = {name: [[] for _ in captions] for name in PER_CAPTION}
    for column, seed in enumerate(options.seeds):
        made = zip(captions, clips(captions, seed, options.length), strict=True)
        for index, (caption, frames) in enumerate(made):
            features[index, column] = network(frames)
            for name, found in clip_values(frames, caption).items():
                values[name][index] += found
    distance = frechet_spread(features, real)
    drift: dict[str, list[list[float | None]]] = {}
    if long:
        some = captions[: options.long_captions]
        made = zip(some, clips(some, options.seeds[0], options.long_length), strict=True)
        rollouts = [drift_of(frames, caption) for caption, frames in made]
        for name in DRIFTING:
            drift[name] = [[_round(value) for value in getattr(rollout, name)] for rollout in rollouts]
    return values, [round(float(x), 5) for x in (distance.estimate, *distance.replicates)], drift


def clip_values(frames: Tensor, caption: str) -> dict[str, list[float]]:
    """One clip's share of each measure in PER_CAPTION: a value for the clip, or for each sprite it applies to."""
    clip = score.score_clip(frames, caption)
    found: dict[str, list[float]] = {name: [] for name in PER_CAPTION}
    right = [(sprite.colour_right, sprite.shape_right, sprite.direction_right) for sprite in clip.sprites]
    found["everything"].append(int(clip.count_right and all(all(each) for each in right)))
    errors = endpoint_errors(frames, [sprite.spec for sprite in clip.sprites])
    for sprite, error in zip(clip.sprites, errors, strict=True):
        found["colour"].append(int(sprite.colour_right))
        found["shape"].append(int(sprite.shape_right))
        found["direction"].append(int(sprite.direction_right))
        if sprite.speed is not None:
            found["amplitude"].append(round(sprite.speed / sprites.PIXELS_PER_FRAME[sprite.spec.speed], 4))
        measurable = sprite.colour_right and error is not None
        found["tracked"].append(int(measurable))
        if measurable:
            found["endpoint"].append(round(error, 4))
    return found


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its options, and the folders it reads and writes.

    Attributes:
        runs: weights of trained rows.
        demo: caption encoder, autoencoder and the shared initialisation.
        out: where scores and tables go.
    """

    options: Options
    runs: Path
    demo: Path
    out: Path
    device: torch.device

    @cached_property
    def parts(self) -> DemoParts:
        return load_parts(self.demo, self.device)

    @cached_property
    def captions(self) -> list[str]:
        return sprites.held_out_captions(self.options.captions)

    @cached_property
    def real(self) -> np.ndarray:
        """Features of the true clips that every row is compared with, [captions, seeds, 64]."""
        network, make = ClipFeatures(), true_clips(REAL_SEED)
        by_seed = [
            [network(frames) for frames in make(self.captions, seed, self.options.length)]
            for seed in self.options.seeds
        ]
        return np.array(by_seed).swapaxes(0, 1)

    def checkpoint(self, row: Row) -> Path | None:
        """The row's weights, or None if they are not there."""
        return find_checkpoint(row, self.runs, self.demo)

    def score(self, subject: Row | Control) -> Measured | None:
        """Scores a row or a control, or reads its scores if weights, sampling and options are the same as then.

        Returns:
            None if the row is not trained.

        Raises:
            ValueError: weights whose header says that they were trained otherwise.
        """
        weights = ""
        path = None
        if isinstance(subject, Row):
            path = self.checkpoint(subject)
            if path is None:
                return None
            weights = digest_of(path)
        chosen = [MEASURES_VERSION, weights, self.parts.digest, subject.sampling(), asdict(self.options)]
        key = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        kept = scores_path(self.out, subject.name)
        measured = Measured.load(kept)
        if measured is not None and measured.key == key:
            log.info("%s: scored before", subject.name)
            return measured
        started = time.perf_counter()
        timing, recipe, long = None, "", self.options.long > 0
        if isinstance(subject, Row):
            assert path is not None
            recipe = check_header(subject, path)
            dit = train_demo.load_dit(path).to(self.device)
            timing = measure_time(dit, self.parts, subject, self.options.length)
            clips = sampled_clips(dit, self.parts, subject)
            long = long and subject.attention == "causal"  # a bidirectional model has one length
        else:
            clips = true_clips(CONTROL_SEED, self.parts.autoencoder if subject.decoded else None)
        values, distance, drift = measure_clips(clips, self.captions, self.options, self.real, long=long)
        recipe = f"{recipe} (scored at {git_commit()})".strip()
        measured = Measured(
            subject.name, key, subject.sampling(), recipe, self.options, values, distance, drift, timing
        )
        measured.save(kept)
        log.info("%s: scored in %.0f s", subject.name, time.perf_counter() - started)
        return measured


def scores_path(out: Path, name: str) -> Path:
    """Where a row's measurements are kept."""
    return out / "rows" / f"{name}.json"


def find_checkpoint(row: Row, runs: Path, demo: Path) -> Path | None:
    """The row's weights in the folder of runs, else in the demo's; None if neither has them."""
    return next((path for folder in (runs, demo) if (path := folder / row.checkpoint).is_file()), None)


def check_header(row: Row, path: Path) -> str:
    """Compares a file's provenance with the row, and returns what it says about its training.

    Raises:
        ValueError: trained for another schedule, context or window; or an undistilled row whose file is distilled.
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
        frames_per_chunk=row.settings.frames_per_chunk,
        window=row.settings.window,
        sink=row.settings.sink,
    )
    if wrong:
        raise ValueError(
            f"checkpoint is {os.fspath(path)!r}, which is not row {row.name!r}: {'; '.join(wrong)}. Train it with the "
            "flags that --commands prints."
        )
    return found.recipe or ""


# ---------------------------------------------------------------------------------------------------------------
# From measurements to numbers

SHARE, NUMBER, POINTS = "share", "number", "points"


@dataclass(frozen=True, slots=True)
class Measure:
    """A column: its title, how it is written, and the statistic over captions."""

    title: str
    form: str
    statistic: str = "mean"


PER_CAPTION: dict[str, Measure] = {
    "colour": Measure("colour", SHARE),
    "shape": Measure("shape", SHARE),
    "direction": Measure("direction", SHARE),
    "everything": Measure("everything (clips)", SHARE),
    "amplitude": Measure("motion, measured / commanded", NUMBER, "median"),
    "endpoint": Measure("end-point error, px/frame", NUMBER),
    "tracked": Measure("sprites it covers", SHARE),
}
DRIFTING = ("saturation", "sharpness", "correct")
DRIFTS: dict[str, Measure] = {
    "saturation_drift": Measure("saturation", POINTS),
    "sharpness_drift": Measure("sharpness, relative", POINTS),
    "correct_drift": Measure("colour and shape right", POINTS),
}
MEASURES: dict[str, Measure] = {**PER_CAPTION, "frechet": Measure("Frechet distance", NUMBER), **DRIFTS}


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


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the paper, the rule that answers it here, and the numbers."""

    number: int
    text: str
    rule: str
    paper: str
    answer: str
    findings: tuple[str, ...]


class _Missing(LookupError):
    """A row or measure that a claim needs is not there."""


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Measured rows, as the claims ask for them."""

    results: Mapping[str, Measured]
    length: int

    def row(self, name: str) -> Measured:
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

    def nfe(self, name: str) -> int:
        return row_named(name).nfe(self.length)


def row_named(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if row.name == name)


def above(value: Spread, least: float = 0.0) -> str:
    """Whether a number is above `least`: yes or no where the whole interval is on one side, else unclear."""
    low, high = value.interval()
    return YES if low > least else NO if high < least else UNCLEAR


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
    lead = losses[NO_FORCING] - largest(*(loss for name, loss in losses.items() if name != NO_FORCING))
    findings.append(f"its loss above the largest other: {written(lead, POINTS)} points")
    saturates = e.of(NO_FORCING, "saturation_drift") - e.of(FULL, "saturation_drift")
    drifts = e.of(FULL, "correct_drift") - e.of(NO_FORCING, "correct_drift")
    findings.append(f"saturation gained over a rollout, more than {FULL}: {written(saturates, POINTS)} points")
    findings.append(f"colour and shape lost over a rollout, more than {FULL}: {written(drifts, POINTS)} points")
    return all_of(above(lead), any_of(above(saturates), above(drifts))), findings


def _motion_shrinks(e: _Evidence) -> Answer:
    with_, without = e.of(FULL, "amplitude"), e.of(NO_MOTION, "amplitude")
    findings = [
        f"{FULL}: {written(with_, NUMBER)} of the commanded speed",
        f"{NO_MOTION}: {written(without, NUMBER)}",
        f"difference: {written(with_ - without, NUMBER)}",
    ]
    return above(with_ - without), findings


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
    for name, sigma in CONTEXT_SIGMAS.items():
        if name != best:
            lead = e.of(best, "everything") - e.of(name, "everything")
            answers[sigma] = above(lead)
            findings.append(f"above sigma {sigma:.2g} ({name}): {written(lead, POINTS)} points")
    ends = (answers[min(answers)], answers[max(answers)])
    return NO if NO in answers.values() else YES if set(ends) == {YES} else UNCLEAR, findings


def _speed_up(e: _Evidence) -> Answer:
    slow, fast = e.timing(TEACHER), e.timing(FULL)
    median = float(np.median(slow.clip) / np.median(fast.clip))
    low, high = min(slow.clip) / max(fast.clip), max(slow.clip) / min(fast.clip)
    length = latent_frames(e.length)
    per_forward = row_named(FULL).settings.frames_per_chunk
    findings = [
        f"measured: {median:.1f}x [{low:.1f}, {high:.1f}], batch 1, {fast.threads} threads, {fast.device}",
        f"forwards: {e.nfe(TEACHER)} against {e.nfe(FULL)} ({e.nfe(TEACHER) / e.nfe(FULL):.1f}x); latent frames that "
        f"go through the network: {e.nfe(TEACHER) * length / (e.nfe(FULL) * per_forward):.1f}x",
    ]
    if SELF_FORCING in e.results and e.results[SELF_FORCING].timing is not None:
        other = float(np.median(e.timing(SELF_FORCING).clip) / np.median(fast.clip))
        findings.append(f"over {SELF_FORCING}: {other:.2f}x")
    if (slow.threads, slow.device) != (fast.threads, fast.device):
        findings.append("the two were timed on different devices or threads")
        return UNCLEAR, findings
    return YES if low >= PAPER_SPEED_UP else NO if high < PAPER_SPEED_UP else UNCLEAR, findings


_CLAIMS: tuple[tuple[str, str, str, Callable[[_Evidence], Answer]], ...] = (
    (
        "Diagonal 4-3-2 keeps the quality of 4 uniform steps at about half the forwards.",
        f"yes if {FULL} loses less than {100 * QUALITY_MARGIN:.0f} points against {SELF_FORCING} in colour, shape, "
        f"direction and everything, and takes at most {ABOUT_HALF:g} of the forwards; no if one of them is surely not "
        f"so; unclear also if {SELF_FORCING} is not surely above {LEAST_QUALITY:.0%} of clips right.",
        "17 forwards against 35; VBench 84.48",
        _keeps_quality,
    ),
    (
        "Removing diagonal forcing costs the most, and long rollouts then oversaturate or drift.",
        "yes if its loss of clips right is above every other ablation's, and over the long rollout saturation grows "
        "more or correctness falls more than in full; no if one of the two halves is surely not so.",
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
        "yes if sigma 0.36 has more clips right than both ends of the sweep and no sigma has more than it; no if one "
        "has; unclear if the ends cannot be told from it.",
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


def answer_claims(results: Mapping[str, Measured], length: int) -> list[Claim]:
    """The six claims, answered from what was measured.

    Args:
        results: by row name; rows may be missing.
        length: pixel frames of a clip.
    """
    evidence = _Evidence(results, length)
    claims = []
    for number, (text, rule, paper, decide) in enumerate(_CLAIMS, start=1):
        try:
            answer, findings = decide(evidence)
        except _Missing as missing:
            answer, findings = NOT_TESTED, [str(missing)]
        claims.append(Claim(number, text, rule, paper, answer, tuple(findings)))
    return claims


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
    for subject in (*CONTROLS, *ROWS):
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


METHOD = f"""\
* Captions are held out: each has a combination of shape, colour and direction that no training clip shows. Noise
  depends on seed and caption only, so all rows start from the same noise.
* Intervals are {CONFIDENCE:.0%}: {REPLICATES} bootstrap replicates (Frechet: {FRECHET_REPLICATES}) that draw whole
  captions, with all their seeds, from a generator with a fixed seed; percentiles, moved so that the replicates' mean is
  the estimate. The draws are the same for all rows, so differences are paired by caption. They do not cover the
  training's own chance: every row was trained once. Where all values are equal the interval has no width. "Surely" in
  a rule means that the whole interval is on one side.
* Colour, shape, direction: shares of commanded sprites, by `distillation/score.py`. Everything: share of clips with all
  of that and the right number of sprites.
* Motion: median over matched sprites of measured over commanded speed. End-point error: mean over sprites of
  |measured - commanded velocity|, by a straight line through the centroids of the first second, before a bounce; only
  sprites whose colour is right and that can be followed count, whose share is given beside it.
* Frechet distance: Gaussians fitted to 64 features of a fixed random convolutional network, in units of the true
  clips' deviation, to true clips of the same captions. With few clips it is biased upwards: compare only rows of equal
  size. Row true-clips is the floor, real against real; true-clips-decoded adds what the autoencoder costs.
* Drift: last tenth of the long rollout against the first, on sprite pixels. Saturation is HSV's; sharpness is the root
  mean square gradient; points are hundredths. The bidirectional teacher has one length and no rollout.
* Seconds: batch 1, median of {TIMED_RUNS} after a warm-up, each chunk decoded as it comes."""


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
    parts = [
        "# Evidence",
        "Made by `python -m distillation.evaluate`; do not edit. "
        f"{options.captions} held-out captions, seeds {seeds}, {options.length} frames{rollout}.",
        "## Claims",
        _markdown(["", "claim", "answer", "paper"], [[str(c.number), c.text, c.answer, c.paper] for c in claims]),
        *(
            "\n".join(
                [f"**{c.number}. {c.text}** {c.answer}.", "", f"* Rule: {c.rule}", *(f"* {f}" for f in c.findings)]
            )
            for c in claims
        ),
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
    for subject in (*CONTROLS, *ROWS):
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
    colour = dict(zip(NAMES, colormaps["tab20"].colors, strict=False))
    made: list[str] = []

    def save(figure: Any, name: str) -> None:
        partial = out / f".{name}.partial"
        figure.savefig(partial, format="png", dpi=110)
        os.replace(partial, out / name)
        made.append(name)

    rolled = [name for name in NAMES if name in results and results[name].drift]
    if rolled:
        figure = Figure(figsize=(14, 4.5), layout="constrained")
        tenths = range(1, TENTHS + 1)
        for axes, name in zip(figure.subplots(1, len(DRIFTING)), DRIFTING, strict=True):
            for row in rolled:
                curve = [np.nan if value is None else value for value in drift_curve(results[row], name)]
                axes.plot(tenths, curve, label=row, color=colour[row], linestyle="-" if results[row].timing else "--")
            axes.set(title=name, xlabel="tenth of the rollout")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
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
        figure.legend(loc="outside right upper", fontsize=7)
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
# The command


def load_scores(out: Path, options: Options | None) -> dict[str, Measured]:
    """Scores of all rows that have them and are still sampled as then.

    Args:
        options: leave out rows scored with others; None takes those that are there, which must agree.

    Raises:
        ValueError: options is None and rows were scored with different ones, or there is no row at all.
    """
    found: dict[str, Measured] = {}
    for subject in (*CONTROLS, *ROWS):
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


def build(out: Path, results: Mapping[str, Measured], options: Options, *, runs: Path, demo: Path) -> list[Claim]:
    """Writes README.md, results.json and the plots from measurements; returns the claims."""
    absent = {control.name: "not scored" for control in CONTROLS} | {
        row.name: "not scored" if find_checkpoint(row, runs, demo) else "not trained" for row in ROWS
    }
    absent = {name: why for name, why in absent.items() if name not in results}
    out.mkdir(parents=True, exist_ok=True)
    claims = answer_claims(results, options.length)
    plots = draw_plots(results, out, options.length)
    _write(out / "results.json", json.dumps(make_results(results, absent, options, claims), indent=1) + "\n")
    _write(out / "README.md", make_readme(results, absent, options, claims, plots))
    return claims


def chosen_rows(text: str | None) -> list[Row | Control]:
    """Rows and controls from "NAME,NAME", in the table's order; None is all of them.

    Raises:
        ValueError: an unknown name.
    """
    every: list[Row | Control] = [*CONTROLS, *ROWS]
    if text is None:
        return every
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"rows is {text!r}; choose from {', '.join(NAMES)}, with commas.")
    return [subject for subject in every if subject.name in names]


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
    """What the command does, with errors as ValueError."""
    runs, demo, out = chosen.runs, chosen.demo, chosen.out
    if chosen.commands:
        teacher = find_checkpoint(row_named(TEACHER), runs, demo) or demo / train_demo.DIT_FILE
        for row in ROWS:
            if row.training is not None:
                print(f"# {row.name}: {row.text}")
                print(training_command(row, runs, teacher=teacher, updates=chosen.updates) + "\n")
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
        evaluation = Evaluation(options, runs, demo, out, device)
        for subject in chosen_rows(chosen.rows):
            if evaluation.score(subject) is None:
                log.info("%s: not trained", subject.name)
    results = load_scores(out, options)
    options = next(iter(results.values())).options if options is None else options
    claims = build(out, results, options, runs=runs, demo=demo)
    for claim in claims:
        print(f"{claim.number}. {claim.text} {claim.answer}")
    print(f"{len(results)} of {len(NAMES)} rows: {out / 'README.md'}")


def main(arguments: list[str] | None = None) -> int:
    """Evaluates; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"), help="scores, tables and plots go here")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="exported weights, NAME.safetensors")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder of the demo's three files")
    parser.add_argument("--captions", type=int, default=256, help="held-out captions")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the noise")
    parser.add_argument("--rows", metavar="NAME,NAME", help="score only these")
    parser.add_argument("--length", type=int, default=sprites.CLIP_FRAMES, help="pixel frames of a clip")
    parser.add_argument("--long", type=int, default=10, help="clips in a drift rollout; 0: none")
    parser.add_argument("--long-captions", type=int, help="captions of the drift rollouts; default: 32")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--tables-only", action="store_true", help="rebuild from OUT/rows, without sampling")
    parser.add_argument("--commands", action="store_true", help="print how to train the rows, then stop")
    parser.add_argument("--updates", type=int, help="with --commands: the budget; default: the recipe's")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        if chosen.threads is not None:
            if chosen.threads < 1:
                raise ValueError(f"threads is {chosen.threads}; it must be at least 1.")
            torch.set_num_threads(chosen.threads)
        run(chosen)
    except (ValueError, OSError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
