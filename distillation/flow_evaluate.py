"""Does the video move as it is told? Commands motion to the demo's sprites and measures what they do.

    F=demo/demo_follower.safetensors                     # without --dit: the teacher
    python -m distillation.flow_evaluate --dit $F                               # scores what is missing, prints it
    python -m distillation.flow_evaluate --dit $F --write docs/evidence/flow.md # and writes the page

Each scene has one sprite and a held-out caption. Its first chunk is made as usual; the sprite is then found in the
decoded frames and told to go from there, straight and bouncing at the edge: by a track, as a person would draw it, or
(--field camera) by a motion of the whole picture. Two commands a scene: one in any direction, whatever the caption
says, and one in the caption's direction at another speed. The same scene is made without flow and with every mode that
the checkpoint allows.

A student's first chunk sometimes ends with two copies of the sprite, or none. No track can begin on it then (a track
from the middle of two copies begins between them), so most columns are of the other scenes. Those scenes can hide what
a mode does where it is lost, so the error and what is drawn are given over all scenes too, and the page says how many
were left out. Square brackets are 95% intervals over scenes.

End-point error: the distance between the sprite's displacement and the commanded one, over one latent frame (4 pixel
frames), in pixels per pixel frame, averaged over the latent frames after the first chunk. A sprite that is not seen
counts as one that rests. Nothing in here looks at latents.

Every clip's numbers are kept in OUT/NAME.json under a digest of the weights and the options, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, SpriteSpec, caption_of
from diagonal_sampler.demo_autoencoder import (
    LATENT_CHANNELS,
    SPACE_FACTOR,
    DemoAutoencoder,
)
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.flow import OpticalFlow, tracks_flow
from diagonal_sampler.flow_adapter import adapter_features
from diagonal_sampler.flow_noise import FlowNoise
from diagonal_sampler.flow_reference import DEFAULT_START_SIGMA, FlowReference
from diagonal_sampler.frames import TIME_FACTOR, latent_frames, pixel_frames
from diagonal_sampler.noise import NoiseSource, SeededNoise
from diagonal_sampler.sampler import split_frames
from distillation import demo_files, score, sprites
from distillation.common import PRECISION, stops_in_a_line, write_text
from distillation.evidence.statistics import CONFIDENCE, Spread, caption_counts
from distillation.recipes import DEMO
from distillation.rollout import stream
from distillation.run_folder import write_json
from distillation.samples import decode_frames, encode_frames

log = logging.getLogger("flow_evaluate")

MEASURES_VERSION = 4
"""Raise it when a measure or a mode changes: clips that were scored before are then scored again."""
MODES = ("none", "reference", "noise", "adapter", "adapter+blend")
WORDS = {
    "none": "no flow",
    "reference": "reference (training-free)",
    "noise": "noise (a model not trained for it)",
    "adapter": "adapter",
    "adapter+blend": "adapter, blended with the carried frames",
}
BLENDED = ("reference", "adapter+blend")
"""Modes whose predictions are blended with the carried frames."""
COMMANDS = {
    "any": "any direction, against the caption",
    "caption": "the caption's direction, at another speed",
}
FIELDS = {
    "track": "by a track",
    "camera": "by the whole picture, which moves as a camera makes it move",
}
"""How a command is given: in a disc around the sprite, or at every pixel."""
MARGIN = 8.0
"""Pixels between the frame's edge and a commanded centre: half the side of the largest sprite."""
TRACK_RADIUS = 11.0
"""Pixels around the track that move with it: the largest sprite, with its corners."""
ELSEWHERE_SHARE = 0.1
"""Share of a sprite's colour farther than TRACK_RADIUS from its centre, above which there are two copies of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every clip of a table shares: scenes, pixel frames (4n + 1), seed, and the reference mode's settings.

    Mode reference has a row for each start sigma.
    """

    scenes: int = 40
    length: int = 57
    seed: int = 0
    start_sigmas: tuple[float, ...] = (DEFAULT_START_SIGMA, 0.5)
    blend: float = 1.0
    field: str = "track"  # of FIELDS

    def __post_init__(self) -> None:
        if self.scenes < 1:
            raise ValueError(f"scenes is {self.scenes}; it must be at least 1.")
        whole = pixel_frames(latent_frames(self.length))
        if self.length < score.SECOND * 2 or whole != self.length:
            raise ValueError(f"length is {self.length}; give 4n + 1 pixel frames, at least {2 * score.SECOND + 1}.")
        if self.field not in FIELDS:
            raise ValueError(f"field is {self.field!r}; it must be one of {', '.join(FIELDS)}.")


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one clip.

    Attributes:
        error: end-point error, pixels per pixel frame.
        place: mean distance from the commanded place, pixels.
        commanded: mean commanded speed, pixels per pixel frame.
        lost: share of the latent frames in which the sprite is not seen.
        colour, shape: as the caption says.
        seconds: to make the clip.
        one: the first chunk ends with one copy of the sprite: the track begins on it.
    """

    error: float
    place: float
    commanded: float
    lost: float
    colour: bool
    shape: bool
    seconds: float
    one: bool


def scene(index: int, seed: int) -> tuple[SpriteSpec, dict[str, tuple[float, float]]]:
    """Scene `index` of a seed: its held-out sprite, and command -> (direction in radians, pixels per frame)."""
    rng = np.random.default_rng([seed, index, 0xF10])
    spec = sprites.sample_sprite(rng, held_out=True)
    speeds = list(sprites.PIXELS_PER_FRAME.values())
    anywhere = (float(rng.uniform(0, 2 * np.pi)), speeds[rng.integers(len(speeds))])
    others = [speed for speed in speeds if speed != sprites.PIXELS_PER_FRAME[spec.speed]]
    x, y = sprites.VELOCITY[spec.direction]
    return spec, {"any": anywhere, "caption": (float(np.arctan2(y, x)), others[rng.integers(len(others))])}


def commanded_path(start: Tensor, angle: float, speed: float, frames: int) -> Tensor:
    """[frames, 2] centres from `start` on, straight and bouncing MARGIN from the edge; in pixels, edges at 0 and 64."""
    direction = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    inside = start.clamp(MARGIN, sprites.FRAME_SIZE - MARGIN)
    return sprites.bounce(inside, speed * direction, torch.tensor(MARGIN), torch.arange(frames).float())


def commanded_flow(path: Tensor, first_frame: int, field: str = "track") -> OpticalFlow:
    """The path as a field of the whole clip, one of FIELDS; before `first_frame` nothing is commanded."""
    frames = first_frame + len(path)
    if field == "camera":
        flow = torch.zeros(frames - 1, sprites.FRAME_SIZE, sprites.FRAME_SIZE, 2)
        flow[first_frame:] = path.diff(dim=0)[:, None, None]
        return OpticalFlow(
            flow, (torch.arange(frames - 1) >= first_frame)[:, None, None].expand(flow.shape[:3]).clone()
        )
    # Pixel i covers [i, i + 1): its centre is 0 in the field and 0.5 in the sprite world.
    whole = torch.zeros(frames, 1, 2)
    whole[first_frame:, 0] = path - 0.5
    visible = (torch.arange(frames) >= first_frame)[:, None]
    return tracks_flow(whole, visible, sprites.FRAME_SIZE, sprites.FRAME_SIZE, radius=TRACK_RADIUS)


class Player:
    """Makes clips with the demo, with and without motion to follow."""

    def __init__(self, folder: Path, dit: Path | None, device: torch.device | str = "cpu") -> None:
        file = dit or folder / demo_files.TEACHER_FILE
        self.dit: WanDiT
        self.encoder: CaptionEncoder
        self.autoencoder: DemoAutoencoder
        self.dit, self.encoder, self.autoencoder = demo_files.load_models(folder, file)
        for model in (self.dit, self.encoder, self.autoencoder):
            model.to(device)
        self.device = torch.device(device)
        self.trained = demo_files.trained_for(file)
        self.digest = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
        self.modes = tuple(mode for mode in MODES if "adapter" not in mode or self.dit.config.flow_adapter)

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> [B, 3, T, H, W] in 0..1."""
        return decode_frames(self.autoencoder, latents).movedim(1, 2) / 255

    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] in 0..1 -> standardised latents."""
        return encode_frames(self.autoencoder, 2 * frames - 1)

    @torch.no_grad()
    def clip(
        self, caption: str, seed: int, options: Options, flow: OpticalFlow | None = None, row: str = "none"
    ) -> Tensor:
        """[T, 3, H, W] in 0..255, on the CPU. row: a mode, of mode reference with its start sigma; see `rows_of`."""
        mode, start_sigma = _mode_of(row)
        schedule, settings, cfg = self.trained.schedule, self.trained.settings, self.trained.cfg
        frames = latent_frames(options.length)
        counts = split_frames(frames, settings.frames_per_chunk)
        side = sprites.FRAME_SIZE // SPACE_FACTOR
        noise: NoiseSource = SeededNoise(seed, (1, LATENT_CHANNELS, side, side), self.device)
        steps = TIME_FACTOR * (frames - 1)
        reference, features = None, None
        starts = mode == "reference"  # chunks from the carried frames; else these are blended with only
        if flow is not None and mode in BLENDED:
            reference = FlowReference(
                flow.fit(steps, sprites.FRAME_SIZE, sprites.FRAME_SIZE), schedule, counts,
                decode=self.decode, encode=self.encode, start_sigma=start_sigma, blend=options.blend,
            )  # fmt: skip
            schedule = reference.schedule  # of start sigma 1: the usual one
        if flow is not None and mode == "noise":
            # As in the node with first_chunk 1: the first chunk has no valid motion, so its noise is as usual.
            noise = FlowNoise(noise, flow.fit(steps, side, side).composed(), counts)
        if flow is not None and mode in ("adapter", "adapter+blend"):
            features = adapter_features(flow, frames, side, side).to(self.device)
        chunks = []
        for latents in stream(
            self.dit, self.encoder.encode([caption]), noise, schedule, settings, frames,
            precision=PRECISION, cfg=cfg, negative=self.encoder.encode([""]), optical_flow=features,
            source=reference.source if reference is not None and starts else None,
            after=None if reference is None else reference.blend,
        ):  # fmt: skip
            chunks.append(latents)
            if reference is not None:
                reference.finished(latents)
        return decode_frames(self.autoencoder, torch.cat(chunks, dim=2))[0].cpu()

    def first_frame(self) -> int:
        """The last pixel frame of the first chunk: motion is commanded from it on."""
        return pixel_frames(self.trained.settings.frames_per_chunk) - 1


def measure(frames: Tensor, spec: SpriteSpec, path: Tensor, first_frame: int, seconds: float) -> Result:
    """Scores one clip [T, 3, H, W] in 0..255 against the commanded places `path` from `first_frame` on."""
    centroid = score.find_blobs(frames).centroid(spec.colour)[first_frame::TIME_FACTOR]
    wanted = path[::TIME_FACTOR]
    moved, commanded = centroid.diff(dim=0), wanted.diff(dim=0)
    seen = ~moved[:, 0].isnan()
    error = (torch.where(seen[:, None], moved, 0.0) - commanded).norm(dim=1) / TIME_FACTOR
    there = ~centroid[:, 0].isnan()
    place = (centroid - wanted)[there].norm(dim=1).mean() if bool(there.any()) else torch.tensor(torch.nan)
    clip = score.score_clip(frames, caption_of((spec,)))
    found = score.find_blobs(frames[first_frame : first_frame + 1])
    return Result(
        error=float(error.mean()),
        place=float(place),
        commanded=float(commanded.norm(dim=1).mean()) / TIME_FACTOR,
        lost=float((~seen).float().mean()),
        colour=clip.sprites[0].colour_right,
        shape=clip.sprites[0].shape_right,
        seconds=seconds,
        one=_one_copy(found.alpha[spec.colour][0], found.centroid(spec.colour)[0]),
    )


def _one_copy(alpha: Tensor, centroid: Tensor) -> bool:
    """Whether a frame's coverage by a colour, [H, W], is one sprite around its centre [2]; NaN if it is not seen."""
    axis = torch.arange(alpha.shape[-1]) + 0.5
    away = (axis - centroid[0]).square() + (axis[:, None] - centroid[1]).square() > TRACK_RADIUS**2
    return not bool(centroid.isnan().any()) and float((alpha * away).sum() / alpha.sum()) <= ELSEWHERE_SHARE


Results = dict[tuple[str, str], list[Result]]
"""(command, row) -> one Result a scene."""


def rows_of(modes: Sequence[str], options: Options) -> list[str]:
    """The rows of a table: each mode, but "reference SIGMA" for each start sigma of mode reference."""
    sigmas = [f"reference {sigma:g}" for sigma in options.start_sigmas]
    return [row for mode in modes for row in (sigmas if mode == "reference" else [mode])]


def _mode_of(row: str) -> tuple[str, float]:
    mode, _, sigma = row.partition(" ")
    return mode, float(sigma or 1)


def _words(row: str) -> str:
    mode, sigma = _mode_of(row)
    return WORDS[mode] + (f", start sigma {sigma:g}" if mode == "reference" else "")


def evaluate(player: Player, options: Options, out: Path, modes: Sequence[str]) -> Results:
    """Results of each command and mode over the scenes; clips that were scored before are read from `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found: Results = {(command, row): [] for command in COMMANDS for row in rows_of(modes, options)}
    for index in range(options.scenes):
        spec, commands = scene(index, options.seed)
        caption, first, seed = caption_of((spec,)), player.first_frame(), 1000 * options.seed + index
        plain: tuple[Tensor, float] | None = None
        for command, row in found:
            file = out / f"{_digest(player, options, row)}-{command}-{_mode_of(row)[0]}-{index}.json"
            if file.exists():
                found[command, row].append(Result(**json.loads(file.read_text())))
                continue
            if plain is None:
                started = time.perf_counter()
                plain = player.clip(caption, seed, options), time.perf_counter() - started
            start = score.find_blobs(plain[0]).centroid(spec.colour)[first]
            # A first chunk without the sprite is told to move it all the same, from the middle.
            path = commanded_path(
                start.nan_to_num(sprites.FRAME_SIZE / 2), *commands[command], frames=options.length - first
            )
            frames, seconds = plain
            if row != "none":
                started = time.perf_counter()
                frames = player.clip(caption, seed, options, commanded_flow(path, first, options.field), row)
                seconds = time.perf_counter() - started
            result = measure(frames, spec, path, first, seconds)
            write_json(file, asdict(result))
            log.info("scene %d (%s), %s, %s: %.2f px/frame", index, caption, COMMANDS[command], row, result.error)
            found[command, row].append(result)
    return found


def _digest(player: Player, options: Options, row: str) -> str:
    """Of all that decides a clip's numbers but its scene and command."""
    parts: list[object] = [MEASURES_VERSION, player.digest, options.length, options.seed]
    mode, start_sigma = _mode_of(row)
    if mode in BLENDED:
        parts += [start_sigma, options.blend]
    if options.field != "track":
        parts.append(options.field)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _spread(values: Sequence[float], divisors: Sequence[float] | None = None) -> Spread:
    """Mean of values, a number a scene, or its ratio to the mean of others of the same scenes; replicates draw scenes.

    Args:
        values: of at least one scene.
    """
    counts = np.concatenate([np.ones((1, len(values)), np.int64), caption_counts(len(values))])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = counts @ np.array(values) / (counts @ np.array(divisors or np.ones(len(values))))
    return Spread(float(found[0]), found[1:])


def _share(value: Spread, digits: int, most: float = math.inf) -> str:
    """A share with its interval, cut to between 0 and `most`."""
    low, high = (100 * min(max(end, 0.0), most) for end in value.interval())
    return f"{value.estimate:.{digits}%} [{low:.{digits}f}, {high:.{digits}f}]"


def _of_no_flow(results: Sequence[Result], usual: Sequence[Result]) -> str:
    """The error as a share of that of mode none on the same scenes; "-" without any."""
    if not results or len(results) != len(usual):
        return "-"
    return _share(_spread([r.error for r in results], [r.error for r in usual]), 1)


def _right(results: Sequence[Result]) -> str:
    """Colour and shape right over scenes."""
    return ", ".join(
        _share(_spread([float(getattr(r, name)) for r in results]), 0, most=1.0) for name in ("colour", "shape")
    )


def table(found: Results, options: Options) -> str:
    """The results as Markdown, a table for each command."""
    blocks = []
    whole = f"all {options.scenes} scenes"
    for command, words in COMMANDS.items():
        rows = {row: results for (which, row), results in found.items() if which == command}
        usual = rows.get("none", [])
        speed = _mean([result.commanded for results in rows.values() for result in results if result.one])
        head = [
            "mode", "end-point error, px/frame", "of no flow", f"of no flow, {whole}",
            "distance from the commanded place, px", "not seen", "colour right", "shape right",
            f"colour, shape right, {whole}", "time of the quickest clip",
        ]  # fmt: skip
        lines = [
            f"Commanded: {words}; {speed:.2f} px/frame on average, which is also the error of a sprite that rests.",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
        ]
        for row, results in rows.items():
            begun = [result.one for result in usual or results]
            part, plain = (list(compress(some, begun)) for some in (results, usual))
            lines.append(
                f"| {_words(row)} | {_mean([r.error for r in part]):.2f} | {_of_no_flow(part, plain)} "
                f"| {_of_no_flow(results, usual)} | {_mean([r.place for r in part]):.1f} "
                f"| {_mean([r.lost for r in part]):.0%} | {_mean([r.colour for r in part]):.0%} "
                f"| {_mean([r.shape for r in part]):.0%} | {_right(results)} "
                f"| {min((r.seconds for r in results), default=float('nan')):.1f} s |"
            )
        if "adapter" not in rows:
            lines.append("| adapter | not measured |" + " |" * (len(head) - 2))
        blocks.append("\n".join(lines))
    one = [result.one for result in next(iter(found.values()))]
    note = (
        f"{options.scenes} scenes of {options.length} pixel frames, seed {options.seed}. Square brackets: "
        f"{CONFIDENCE:.0%} intervals over scenes."
    )
    if not all(one):
        note += (
            f" The columns that do not say otherwise are of {sum(one)} scenes: in the others the first chunk, which "
            "nothing is commanded of, ends with two copies of the sprite or none, and no track begins on it."
        )
    return "\n\n".join([*blocks, note])


def page(
    found: Results,
    options: Options,
    player: Player,
    dit: Path | None = None,
    *,
    to: Path = Path("docs/evidence/flow.md"),
    modes: str | None = None,
) -> str:
    """The page with the table, as docs/evidence/flow.md. dit, to and modes: the flags' values."""
    chosen = "" if dit is None else f"--dit {dit.as_posix()} "
    sigmas = " ".join(f"{sigma:g}" for sigma in options.start_sigmas)
    command = (
        f"python -m distillation.flow_evaluate {chosen}--scenes {options.scenes} --length {options.length} --seed "
        f"{options.seed} --start-sigma {sigmas} --blend {options.blend:g}{'' if modes is None else f' --modes {modes}'}"
        f"{'' if options.field == 'track' else f' --field {options.field}'}"
    )
    steps = ",".join(str(len(row)) for row in player.trained.schedule.sigmas)
    adapter = "with" if player.dit.config.flow_adapter else "without"
    return "\n".join(
        [
            "# Does the video move as it is told?",
            "",
            f"Made by `{command} --write {to.as_posix()}`; weights {player.digest}, {adapter} an adapter; "
            f"{steps} steps a chunk, cfg {player.trained.cfg:g}.",
            "",
            f"One sprite with a held-out caption; the first chunk is as usual, then the sprite is told where to go "
            f"{FIELDS[options.field]}. What is measured and how: the head of `distillation/flow_evaluate.py`.",
            "",
            table(found, options),
            "",
        ]
    )


@stops_in_a_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="folder of the demo's three files")
    parser.add_argument("--dit", type=Path, help="a DiT of the demo's size instead of the checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("runs/flow"), help="numbers of each clip are kept here")
    parser.add_argument("--scenes", type=int, default=Options().scenes)
    parser.add_argument("--length", type=int, default=Options().length, help="pixel frames of a clip, 4n + 1")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise")
    parser.add_argument(
        "--start-sigma", type=float, nargs="+", default=Options().start_sigmas, help="reference: see the node"
    )
    parser.add_argument("--blend", type=float, default=Options().blend, help="reference, adapter+blend: see the node")
    parser.add_argument("--modes", help=f"with commas, of {', '.join(MODES)}; default: all that the checkpoint allows")
    parser.add_argument(
        "--field", choices=FIELDS, default=Options().field, help="commanded around the sprite, or at every pixel"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="that makes the clips: cpu, which the times are of, or cuda")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table as a page, docs/evidence/flow.md")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(chosen.threads)
    options = Options(
        scenes=chosen.scenes,
        length=chosen.length,
        seed=chosen.seed,
        start_sigmas=tuple(chosen.start_sigma),
        blend=chosen.blend,
        field=chosen.field,
    )
    player = Player(chosen.checkpoint, chosen.dit, chosen.device)
    modes = player.modes if chosen.modes is None else tuple(mode.strip() for mode in chosen.modes.split(","))
    unknown = [mode for mode in modes if mode not in player.modes]
    if unknown:
        raise ValueError(f"modes has {', '.join(unknown)}; this checkpoint allows {', '.join(player.modes)}.")
    found = evaluate(player, options, chosen.out, modes)
    print(table(found, options))
    if chosen.write:
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.write, page(found, options, player, chosen.dit, to=chosen.write, modes=chosen.modes))


if __name__ == "__main__":
    raise SystemExit(main())
