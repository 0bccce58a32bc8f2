"""What is measured of a row: its clips are made, timed and scored, and the numbers are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, SpriteSpec, load_caption_encoder, parse_caption
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR, DemoAutoencoder, load_demo_autoencoder
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.frames import latent_frames, pixel_frames
from distillation import demo_files, score, sprites
from distillation.common import PRECISION, git_commit
from distillation.evidence.rows import Control, Row, check_header, find_checkpoint
from distillation.evidence.statistics import FEATURES, ClipFeatures, frechet_spread
from distillation.rollout import BatchNoise, sample_seed, stream
from distillation.run_folder import write_json
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

    captions: int = score.EVIDENCE_CAPTIONS
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
# Columns

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
    blobs = score.find_blobs(frames[: sprites.FRAMES_PER_SECOND].float())
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
    blobs = score.find_blobs(frames)
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
    tenths = []
    for tenth in range(TENTHS):
        part = frames[tenth * len(frames) // TENTHS : (tenth + 1) * len(frames) // TENTHS].float()
        seen = score.score_clip(part, caption).sprites
        correct = sum(sprite.colour_right and sprite.shape_right for sprite in seen) / len(seen)
        tenths.append((*saturation_and_sharpness(part), correct))
    return Drift(*zip(*tenths, strict=True))


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
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def load_parts(folder: Path, device: torch.device) -> DemoParts:
    """Caption encoder and autoencoder of a demo folder.

    Raises:
        ValueError: one of them is not there.
    """
    files = [folder / name for name in (demo_files.TEXT_ENCODER_FILE, demo_files.AUTOENCODER_FILE)]
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
        precision=PRECISION,
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
    processor: str = ""  # the CPU's name; empty where it is not known, as in rows of before it was kept


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
    return Timing(clip, first, torch.get_num_threads(), device, round(load, 2), processor_name())


def processor_name() -> str:
    """The CPU's name, as Linux gives it, else the platform module; empty if neither knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor()


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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": MEASURES_VERSION, **asdict(self)}, indent=None)

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
        retime: measure the times of rows that are scored already again, as a busy machine spoils them.
    """

    options: Options
    runs: Path
    demo: Path
    out: Path
    device: torch.device
    retime: bool = False

    @cached_property
    def parts(self) -> DemoParts:
        return load_parts(self.demo, self.device)

    @cached_property
    def captions(self) -> list[str]:
        return sprites.held_out_captions(self.options.captions)

    @cached_property
    def real(self) -> np.ndarray:
        """Features of the true clips that every row is compared with, [captions, seeds, 64].

        They are not decoded, while every row's clips are: most of the distance is the autoencoder's loss. Rows keep
        distances, not features, and most rows' weights are gone, so that it cannot be mended for all of them.
        """
        network, make = ClipFeatures(), true_clips(REAL_SEED)
        by_seed = [
            [network(frames) for frames in make(self.captions, seed, self.options.length)]
            for seed in self.options.seeds
        ]
        return np.array(by_seed).swapaxes(0, 1)

    def score(self, subject: Row | Control) -> Measured | None:
        """Scores a row or a control, or reads its scores if weights, sampling and options are the same as then.

        Returns:
            None if the row is not trained, or was not scored before and only times are asked for.

        Raises:
            ValueError: weights whose header says that they were trained otherwise.
        """
        path = find_checkpoint(subject, self.runs, self.demo) if isinstance(subject, Row) else None
        if path is None and isinstance(subject, Row):
            return None
        weights = "" if path is None else digest_of(path)
        chosen = [MEASURES_VERSION, weights, self.parts.digest, subject.sampling(), asdict(self.options)]
        key = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        kept = scores_path(self.out, subject.name)
        measured = Measured.load(kept)
        if measured is not None and measured.key == key:
            log.info("%s: scored before", subject.name)
            if self.retime and isinstance(subject, Row):
                assert path is not None
                dit = demo_files.load_dit(path).to(self.device)
                measured = replace(measured, timing=measure_time(dit, self.parts, subject, self.options.length))
                measured.save(kept)
            return measured
        if self.retime:
            return None
        started = time.perf_counter()
        timing, recipe, long = None, "", self.options.long > 0
        if isinstance(subject, Row):
            assert path is not None
            recipe = check_header(subject, path)
            dit = demo_files.load_dit(path).to(self.device)
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
