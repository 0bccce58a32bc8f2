"""What every program here needs: seeded generators, precision, memory, whole files, provenance and plain errors."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from diagonal_sampler.disk import whole_file

PRECISION = torch.bfloat16
"""Of the matrix products of the demo's networks, where it pays."""


def generator_at(seed: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and a position only (an update's number, say).

    Args:
        device: where it draws; another kind of device draws other numbers.
    """
    state = seed & 0xFFFFFFFF
    for part in position:  # a linear congruential mix: any two positions give unrelated Philox/MT seeds
        state = (state * 6364136223846793005 + part * 1442695040888963407 + 1) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator(device).manual_seed(state)


def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 pay: on a GPU, and on a CPU that has more than AVX2.

    With AMX they take about a quarter of float32's time. With AVX2 PyTorch emulates them, and they take many times it.
    """
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def autocast(device: torch.device, precision: torch.dtype = PRECISION) -> AbstractContextManager:
    """Matrix products in `precision`, bf16 or float32; in float32 where bf16 would be slower."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32 and fast_bf16(device))


class Stopwatch:
    """Seconds of the named parts of an update. On CUDA by events on the stream: no part waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._parts: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside under `name`; a name may come often."""
        start = self._now()
        yield
        self._parts.append((name, start, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """The sums by name since the last call; waits for the device once."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self._parts:
            seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            sums[name] = sums.get(name, 0.0) + seconds
        self._parts.clear()
        return sums


def keep_freed_memory() -> None:
    """Tells glibc to keep freed buffers, as a training loop asks for the same ones again at once.

    By default every large tensor is mapped afresh and its pages are zeroed by the kernel: measured on 2 cores, that
    is a quarter of the time of an update. Does nothing where the C library is not glibc.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 32 << 20)  # the largest glibc takes
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 256 << 20)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, which is never half there."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def git_commit() -> str:
    """The commit that the code stands at, with "+changes" where files differ from it, or "unknown"."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../diagonal_sampler")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stops_in_a_line(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """A command that returns its exit status; a wrong value, or a file that cannot be used, is a line on stderr."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except (ValueError, OSError, SafetensorError) as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        return 0

    return run
