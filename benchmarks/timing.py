"""Times of runs that take turns, so that a machine's moods meet all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    runs: Mapping[str, Callable[[], torch.Tensor]], repeats: int, min_seconds: float
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Seconds of each run by name, and what each gave last.

    Args:
        runs: by name; whatever they prepare at first use is to be prepared.
        repeats: turns at least.
        min_seconds: turns are added until this much time has passed, as short runs need more of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, torch.Tensor] = {}
    began, turns = time.perf_counter(), 0
    while turns < repeats or time.perf_counter() - began < min_seconds:
        turns += 1
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results
