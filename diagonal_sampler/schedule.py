"""How many denoising steps each chunk takes, at which noise levels, and what the next chunk is conditioned on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from .frames import latent_frames

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_MODES = ("noisy", "clean", "renoise")
DEFAULT_SHIFT = 5.0
# The paper's best context noise (Figure 5a): "timestep 100" before the shift.
DEFAULT_CONTEXT_SIGMA = 0.357142857
GIVEN_CONTEXT_SIGMA = 0.1
"""The most noise that frames from outside enter the cache with in a pass of their own."""
MAX_STEPS = 1000
MAX_LISTED_STEPS = 100_000
"""Of all chunks that a schedule lists: hours of chunks, or a short text that would unfold a thousandfold."""
COSTED_PIXEL_FRAMES = 81  # five seconds of Wan
TABLE_STEP = 1 / MAX_STEPS
"""Of Wan's table of timesteps: published sigmas are entries of it."""
# Beyond this a noisy context is nearly pure noise and tells the next chunk nothing.
UNINFORMATIVE_SIGMA = 0.9

_NARROW = str.maketrans("\uff0c\u3001\uff1b", ",,;")
"""The commas and the semicolon of Chinese keyboards."""

Time = TypeVar("Time", float, "Tensor")
Levels = tuple[tuple[float, ...], ...]


def shift_sigma(u: Time, shift: float) -> Time:
    """Noise level of the uniform time `u` in [0, 1] under a shift (METHOD: sigma = s*u / (1 + (s-1)*u))."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def _require_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift is {shift}; it must be a positive number (Wan: 5).")


def unshift_sigma(sigma: float, shift: float) -> float:
    """The uniform time of a noise level: the inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1.0) * sigma)


Times = tuple[float, ...] | Mapping[int, tuple[float, ...]] | None


@dataclass(frozen=True, slots=True)
class Preset:
    """A published sampling recipe.

    Attributes:
        times: as `select_times` reads them; the shift turns them into sigmas.
        steps: steps per chunk, the last repeats.
        context_mode: see DiagonalSchedule.
        shift: the timestep shift of the recipe.
        frames_per_chunk: latent frames a chunk where it is not the model's usual 3, else None.
        fresh_noise: see DiagonalSchedule.
    """

    times: Times
    steps: tuple[int, ...]
    context_mode: str
    shift: float = DEFAULT_SHIFT
    frames_per_chunk: int | None = None
    fresh_noise: bool = True


EVEN_TIMES = None
# Timesteps 1000, 933, 733 and 357 of the authors' earlier code (81c5a80), snapped to the 1000-entry table of shift 5.
_DIAGONAL = (1.0, 0.736, 0.354, 0.1)
# The authors' code of commit 24ef1c9 warps all four by the shift: timesteps 1000, 937.5, 833.33 and 357.14. Its
# sampling runs no cache pass; its training wrote the cache under noise of level 0.1.
_DIAGONAL_WARPED = (1.0, 0.75, 0.5, 0.1)
# Noise levels 1, 0.75, 0.5 and 0.357: the demo's student (distillation.train_levels).
_DEMO = (1.0, 3 / 8, 1 / 6, 0.1)
_SELF_FORCING = (1.0, 0.75, 0.5, 0.25)
# CausVid's timesteps 1000, 757 and 522, not shifted again, as its scheduler finds them in the table of its shift.
_CAUSVID_SHIFT = 8.0
_CAUSVID = (1.0, 0.28, 0.12)
# Timesteps 1000, 934, 862, 756, 603, 410, 250, 140 and 74, which LightX2V's 14B was trained at (CausVid-Plus,
# wan_14b_causal_dmd.yaml): entries of the table of shift 8 again, at 0, 36, 56, 72, 84, 92, 96, 98 and 99 of 100.
_CAUSVID_14B = (1.0, 0.64, 0.44, 0.28, 0.16, 0.08, 0.04, 0.02, 0.01)
# Its two-step list is its own; with one step a later frame has the first level alone.
_CAUSAL_FORCING_PLUS = MappingProxyType({4: _SELF_FORCING, 2: (1.0, 0.5)})
PRESETS: dict[str, Preset] = {
    "diagonal 4-3-2": Preset(_DIAGONAL, (4, 3, 2), "noisy"),
    "demo 4-3-2": Preset(_DEMO, (4, 3, 2), "noisy"),
    "diagonal 4-2": Preset(_DIAGONAL, (4, 2), "noisy"),
    "diagonal 4-3-2 warped": Preset(_DIAGONAL_WARPED, (4, 3, 2), "noisy"),
    "self forcing": Preset(_SELF_FORCING, (4,), "clean"),
    "causvid": Preset(_CAUSVID, (3,), "clean", shift=_CAUSVID_SHIFT),
    "causvid 14b": Preset(_CAUSVID_14B, (9,), "clean", shift=_CAUSVID_SHIFT),
    "longlive": Preset(_SELF_FORCING, (4,), "clean"),
    "causal forcing": Preset(_SELF_FORCING, (4,), "clean"),
    "causal forcing framewise": Preset(_SELF_FORCING, (4,), "clean", frames_per_chunk=1),
    "causal forcing++": Preset(_CAUSAL_FORCING_PLUS, (4, 2), "clean", frames_per_chunk=1),
    # Published as sigmas; as times they take part in another shift, and in `denoise`, like every other list.
    "krea": Preset(tuple(unshift_sigma(s, DEFAULT_SHIFT) for s in (1.0, 0.937, 0.833, 0.625)), (4,), "clean"),
    "undistilled": Preset(EVEN_TIMES, (12,), "clean", fresh_noise=False),
}
DEFAULT_PRESET = "diagonal 4-3-2"
DEMO_PRESET = "demo 4-3-2"


def select_times(times: Times, steps: int) -> tuple[float, ...]:
    """Times for any number of steps from one list, keeping its first and its last.

    Of several lists by their number of steps: that one as it is, else this rule for the longest. Without a list
    (EVEN_TIMES): even steps from 1 down to 1/steps.

    Fewer steps than the list has: its first `steps - 1` entries and its last one, since steps at high noise decide
    structure (this yields the release's lists for 3 and 2). One step: the first entry. More: the list read as a
    function of its index, interpolated linearly at `steps` even places and rounded to the 1000-entry table.

    Args:
        times: uniform times u in (0, 1], descending; such lists by their number of steps; or EVEN_TIMES.
        steps: 1 to 1000.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}; a chunk takes 1 to {MAX_STEPS} denoising steps.")
    if times is None:
        return tuple((steps - i) / steps for i in range(steps))
    if isinstance(times, Mapping):
        times = times.get(steps) or times[max(times)]
    if steps == 1:
        return times[:1]
    if steps <= len(times):
        return (*times[: steps - 1], times[-1])
    out = []
    for i in range(steps):
        at = i * (len(times) - 1) / (steps - 1)
        low = min(int(at), len(times) - 2)
        value = times[low] + (times[low + 1] - times[low]) * (at - low)
        out.append(value)
    # The table has 1000 entries; many steps, or low times that lie close, need a finer one to stay descending.
    rounded = tuple(round(value, 3) for value in out)
    return rounded if steps <= 100 and len(set(rounded)) == steps else tuple(round(value, 6) for value in out)


def parse_steps(text: str) -> tuple[int, ...]:
    """Read "4,3,2" as steps per chunk; the last repeats.

    Raises:
        ValueError: not a list of whole numbers from 1 to 1000.
    """
    parts = [part.strip() for part in re.split("[,;]", text.translate(_NARROW)) if part.strip()]
    rule = f"Write whole numbers from 1 to {MAX_STEPS} with commas, one a chunk, such as 4,3,2 (the last repeats)."
    if not parts:
        raise ValueError(f"steps is empty. {rule}")
    try:
        steps = tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(f"steps is {text!r}. {rule}") from None
    for value in steps:
        if not 1 <= value <= MAX_STEPS:
            raise ValueError(f"steps holds {value}. {rule}")
    return steps


def parse_sigmas(text: str) -> Levels:
    """Read "1, 0.93, 0.36; 1, 0.36" as sigmas per chunk: a list a chunk, split by semicolons or lines.

    Raises:
        ValueError: not numbers.
    """
    rows = [row.strip() for row in re.split("[\n;]", text.translate(_NARROW)) if row.strip()]
    try:
        return tuple(tuple(float(value) for value in row.split(",") if value.strip()) for row in rows)
    except ValueError:
        raise ValueError(
            f"sigmas is {text!r}. Write numbers in (0, 1] with commas, and a line or a semicolon a chunk, such as "
            "1, 0.93, 0.36; 1, 0.36 (the last chunk repeats)."
        ) from None


def same_steps(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether two lists of steps per chunk, of one chunk at least, say the same; the last chunk repeats."""
    chunks = range(max(len(left), len(right)))
    return all(left[min(chunk, len(left) - 1)] == right[min(chunk, len(right) - 1)] for chunk in chunks)


def same_levels(left: Levels, right: Levels) -> bool:
    """Whether the noise levels of two schedules agree to the 1000-entry timestep table; the last chunk repeats."""
    for chunk in range(max(len(left), len(right))):
        a, b = left[min(chunk, len(left) - 1)], right[min(chunk, len(right) - 1)]
        if len(a) != len(b) or any(abs(x - y) > TABLE_STEP for x, y in zip(a, b, strict=True)):
            return False
    return True


def levels_text(levels: Levels) -> str:
    """Noise levels as `parse_sigmas` reads them, to three digits: "1, 0.933, 0.357; 1, 0.357"."""
    return "; ".join(", ".join(f"{sigma:.3g}" for sigma in row) for row in levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Forwards of a clip, cache passes included.

    Attributes:
        chunks: of the clip.
        steps: of its chunks, as text, such as "4,3,2,2,...".
        forwards: that the schedule takes.
        uniform_steps, uniform_forwards: the most steps of a chunk; forwards if every chunk took them and a cache pass.
    """

    chunks: int
    steps: str
    forwards: int
    uniform_steps: int
    uniform_forwards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalSchedule:
    """Noise levels of every chunk, and what is left in the KV cache of a finished one.

    Attributes:
        sigmas: a descending tuple in (0, 1] for each chunk; the last repeats for all later chunks.
        context_mode: "noisy" keeps the keys and values of the last denoising forward (diagonal forcing, no extra
            forward); "clean" runs one more forward at sigma 0; "renoise" adds noise to the finished chunk up to
            `context_sigma` and runs one forward (the paper's X~ = sqrt(a) X + sqrt(1-a) eps, as rectified flow).
        context_sigma: noise level of "renoise", in [0, 1].
        shift: the shift that made the sigmas; kept for `denoise` and for provenance.
        frames_per_chunk: latent frames a chunk, or None to use the model's.
        fresh_noise: each next step mixes in fresh noise, as few-step distilled models are trained to expect; False
            keeps the noise that the step found in its input, which is Euler's method, for models that predict a mean.

    Raises:
        ValueError: an empty or a huge table, sigmas out of range or not descending, an unknown context mode.
    """

    sigmas: tuple[tuple[float, ...], ...]
    context_mode: str = "noisy"
    context_sigma: float = DEFAULT_CONTEXT_SIGMA
    shift: float = DEFAULT_SHIFT
    frames_per_chunk: int | None = None
    fresh_noise: bool = True

    def __post_init__(self) -> None:
        if not self.sigmas:
            raise ValueError("sigmas is empty; give at least one chunk's list, such as 1, 0.93, 0.36.")
        if (listed := sum(map(len, self.sigmas))) > MAX_LISTED_STEPS:
            raise ValueError(
                f"steps or sigmas list {len(self.sigmas)} chunks with {listed} steps together, and the most is "
                f"{MAX_LISTED_STEPS}; list the first chunks only: the last of them repeats."
            )
        checked: set[int] = set()
        for chunk, row in enumerate(self.sigmas, start=1):  # as people count them
            if id(row) in checked:  # chunks of as many steps share a row
                continue
            checked.add(id(row))
            if not row:
                raise ValueError(f"sigmas of chunk {chunk} are empty; every chunk needs at least one step.")
            if len(row) > MAX_STEPS:
                raise ValueError(f"chunk {chunk} has {len(row)} steps; the most is {MAX_STEPS}.")
            if not all(math.isfinite(sigma) and 0 < sigma <= 1 for sigma in row):
                raise ValueError(f"sigmas of chunk {chunk} are {row}; each must be in (0, 1].")
            if any(a <= b for a, b in zip(row, row[1:], strict=False)):
                raise ValueError(f"sigmas of chunk {chunk} are {row}; they must descend.")
        if self.context_mode not in CONTEXT_MODES:
            raise ValueError(f"context_mode is {self.context_mode!r}; choose one of {', '.join(CONTEXT_MODES)}.")
        if not 0 <= self.context_sigma <= 1:
            raise ValueError(f"context_sigma is {self.context_sigma}; it must be in [0, 1].")
        _require_shift(self.shift)
        if self.frames_per_chunk is not None and self.frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk is {self.frames_per_chunk}; it must be at least 1 latent frame.")

    @classmethod
    def from_steps(
        cls,
        steps: tuple[int, ...],
        *,
        times: Times = _DIAGONAL,
        shift: float = DEFAULT_SHIFT,
        context_mode: str = "noisy",
        context_sigma: float = DEFAULT_CONTEXT_SIGMA,
        frames_per_chunk: int | None = None,
        fresh_noise: bool = True,
    ) -> DiagonalSchedule:
        """Build from steps per chunk, the last repeating; see `select_times` for the rule.

        Raises:
            ValueError: no steps, a count out of range, or a value that DiagonalSchedule refuses.
        """
        if not steps:
            raise ValueError("steps is empty; give the steps of at least one chunk, such as (4, 3, 2).")
        _require_shift(shift)
        rows = {count: tuple(shift_sigma(u, shift) for u in select_times(times, count)) for count in set(steps)}
        return cls(
            sigmas=tuple(rows[count] for count in steps),
            context_mode=context_mode,
            context_sigma=context_sigma,
            shift=shift,
            frames_per_chunk=frames_per_chunk,
            fresh_noise=fresh_noise,
        )

    @classmethod
    def preset(cls, name: str, *, steps: tuple[int, ...] | None = None, shift: float | None = None) -> DiagonalSchedule:
        """A published recipe by name, with other steps or another shift if given.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}.")
        preset = PRESETS[name]
        return cls.from_steps(
            preset.steps if steps is None else steps,
            times=preset.times,
            shift=preset.shift if shift is None else shift,
            context_mode=preset.context_mode,
            frames_per_chunk=preset.frames_per_chunk,
            fresh_noise=preset.fresh_noise,
        )

    @classmethod
    def uniform(cls, steps: int, *, shift: float = DEFAULT_SHIFT, context_mode: str = "clean") -> DiagonalSchedule:
        """The undistilled baseline: `steps` even steps of uniform time from 1 down to 1/steps, for every chunk."""
        return cls.from_steps((steps,), times=EVEN_TIMES, shift=shift, context_mode=context_mode, fresh_noise=False)

    def chunk_sigmas(self, chunk: int) -> tuple[float, ...]:
        """Noise levels of chunk `chunk`, counted from 0; the last row repeats."""
        return self.sigmas[min(chunk, len(self.sigmas) - 1)]

    def steps(self, chunk: int) -> int:
        """Denoising forwards of chunk `chunk`."""
        return len(self.chunk_sigmas(chunk))

    @property
    def cache_pass_sigma(self) -> float | None:
        """Noise level of the extra forward that writes a finished chunk's keys and values, None without one."""
        return {"noisy": None, "clean": 0.0, "renoise": self.context_sigma}[self.context_mode]

    def context_sigma_of(self, chunk: int) -> float:
        """Noise level at which chunk `chunk` stays in the cache for later chunks."""
        sigma = self.cache_pass_sigma
        return self.chunk_sigmas(chunk)[-1] if sigma is None else sigma

    @property
    def finds_given_inputs(self) -> bool:
        """Whether frames from outside enter the cache through the input that a last forward would finish as them.

        So it is with noisy context, which is made of such inputs; but not with one that tells almost nothing.
        """
        return self.context_mode == "noisy" and self.context_sigma_of(0) <= UNINFORMATIVE_SIGMA

    @property
    def given_context_sigma(self) -> float:
        """Noise level at which frames from outside (a start image, the end of a video) enter the cache.

        That of generated history, but in a pass of their own at most GIVEN_CONTEXT_SIGMA: they are finished, and what
        is to go on from them without a jump has to see them well.
        """
        sigma = self.context_sigma_of(0)
        return sigma if self.finds_given_inputs else min(sigma, GIVEN_CONTEXT_SIGMA)

    @property
    def given_forwards(self) -> int:
        """Forwards that write one chunk of frames from outside."""
        return 2 if self.finds_given_inputs else 1

    def nfe(self, chunks: int) -> int:
        """Forwards of a clip of `chunks` chunks, cache passes included."""
        passes = 0 if self.cache_pass_sigma is None else chunks
        listed = [len(row) for row in self.sigmas[:chunks]]
        return sum(listed) + (chunks - len(listed)) * len(self.sigmas[-1]) + passes

    def start_at(self, sigma: float) -> DiagonalSchedule:
        """The schedule of video to video: every chunk begins at `sigma`, and levels above it are dropped.

        A chunk that the schedule begins below it stays as it is.
        """
        if not 0 < sigma <= 1:
            raise ValueError(f"The starting sigma is {sigma}; it must be in (0, 1].")
        starts = (min(sigma, row[0]) for row in self.sigmas)
        rows = zip(starts, self.sigmas, strict=True)
        return replace(self, sigmas=tuple((start, *(s for s in row if s < start)) for start, row in rows))

    def cost(self) -> Cost:
        """What five seconds of Wan take, beside a uniform schedule with a cache pass (Self Forcing's)."""
        chunks = -(-latent_frames(COSTED_PIXEL_FRAMES) // (self.frames_per_chunk or 3))
        steps = max(self.steps(chunk) for chunk in range(chunks))
        shown = ",".join(str(self.steps(chunk)) for chunk in range(min(chunks, len(self.sigmas) + 1)))
        return Cost(
            chunks=chunks,
            steps=f"{shown},..." if chunks > len(self.sigmas) + 1 else shown,
            forwards=self.nfe(chunks),
            uniform_steps=steps,
            uniform_forwards=(steps + 1) * chunks,
        )

    def describe(self) -> str:
        """One line: the steps, and what they cost; see `cost`."""
        cost = self.cost()
        uniform = "1 uniform step" if cost.uniform_steps == 1 else f"{cost.uniform_steps} uniform steps"
        return (
            f"{cost.steps} steps, {self.context_mode} context: {cost.forwards} forwards for {cost.chunks} chunks; "
            f"{uniform} with a cache pass would take {cost.uniform_forwards} "
            f"({cost.uniform_forwards / cost.forwards:.2f}x)."
        )

    @property
    def uninformative_sigma(self) -> float | None:
        """The noise level of a context that tells the next chunk almost nothing; None where there is none."""
        last = max(row[-1] for row in self.sigmas) if self.cache_pass_sigma is None else self.cache_pass_sigma
        return last if last > UNINFORMATIVE_SIGMA else None

    def warnings(self) -> list[str]:
        """What a person should know before running this."""
        sigma = self.uninformative_sigma
        if sigma is None:
            return []
        if self.context_mode == "noisy":
            what = f"A chunk ends at sigma {sigma:.3f} with noisy context"
            remedy = "Use context_mode renoise or clean, or more steps."
        else:
            what, remedy = f"A chunk's context is at sigma {sigma:.3f}", "Lower context_sigma."
        return [f"{what}: the next chunk is conditioned on almost pure noise. {remedy}"]
