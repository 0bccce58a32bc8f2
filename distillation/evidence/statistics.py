"""Bootstrap intervals that draw whole captions, and the Frechet distance between sets of clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(FEATURE_SEED)
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
