"""Scores the demo model from what a person would see: decoded pixels against the caption.

    python -m distillation.score --checkpoint demo --captions 64      # the shipped weights, held-out captions
    python -m distillation.score --dit student.safetensors            # another DiT with the demo's other parts
    python -m distillation.score --captions 128 --caption-seed 11 --fresh      # none of them a caption of docs/evidence
    python -m distillation.score --scale 2 --checkpoint demo/large --dit demo/large/demo_student.safetensors
    python -m distillation.score --source truth                       # the scorer itself, on rendered clips
    python -m distillation.score --source autoencoder                 # the same clips through the autoencoder

Per sprite: is its colour there, does it start in the right direction, has it the right shape, how fast is it, and does
it still move as told at the end; per clip: are there the caption's colours and no others (a second copy of a sprite
counts as that sprite), and how far background, colour and size drift from the first second to the last. Nothing in
here looks at latents or at the sampler's state.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diagonal_sampler.captions import DIRECTIONS, SHAPES, CaptionEncoder, SpriteSpec, parse_caption
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR, DemoAutoencoder
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.frames import latent_frames
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.schedule import CONTEXT_MODES, PRESETS, DiagonalSchedule, levels_text, parse_steps, same_levels
from diagonal_sampler.settings import KV_CACHE_DTYPES, CausalSettings
from distillation import demo_files, sprites, train_demo
from distillation.common import PRECISION
from distillation.rollout import stream
from distillation.run_folder import write_json
from distillation.samples import decode_frames

log = logging.getLogger("score")

EARLY_FRAMES = 10
"""Pixel frames in which the direction is judged: no sprite of the world reaches an edge before. With chunks of three
latent frames that is the first chunk and one frame more: later chunks hardly count."""
LATE_FRAMES = 40
"""Pixel frames at a clip's end, 2.5 s, in which a sprite is asked whether it still moves as told."""
LATE_SHARE = 0.5
"""Share of the commanded speed, along the commanded axis, from which it does; either way, as it may have bounced."""
STEP = 4  # pixel frames over which a speed is measured
FEWEST_STEPS = 10  # seen ones, from which a median is taken
EVIDENCE_CAPTIONS = 256
"""Held-out captions of seed 0 that docs/evidence is made with; students were chosen on them too."""
SECOND = sprites.FRAMES_PER_SECOND
SMALLEST_AREA = 40.0
"""Pixels of one colour that count as a sprite; the smallest, a triangle, covers about 100."""
PRESENT_SHARE = 0.7
"""Share of frames in which a colour must be seen; less means that its sprite vanished (or was never there)."""
FOREGROUND_DISTANCE = 48.0
"""Distance from the background, in 0..255 RGB, from which a pixel belongs to a sprite."""


@dataclass(frozen=True, slots=True)
class SpriteScore:
    """What was seen of one commanded sprite; measurements are None where no sprite could be matched."""

    spec: SpriteSpec
    colour_right: bool
    direction_right: bool
    shape_right: bool
    direction_seen: str | None
    shape_seen: str | None
    speed: float | None  # pixels per frame over the whole clip
    colour_drift: float | None  # RGB distance, last second against first
    size_drift: float | None  # area in the last second / area in the first - 1
    late_right: bool | None = None  # still moves as told at the end; None: not its colour, or too seldom seen there


@dataclass(frozen=True, slots=True)
class ClipScore:
    """What was seen of one clip."""

    caption: str
    sprites: tuple[SpriteScore, ...]
    count_right: bool
    background_drift: float  # levels of 255, last second against first


@dataclass(frozen=True, slots=True)
class Blobs:
    """Pixels of a clip, sorted by colour of the world."""

    alpha: dict[str, Tensor]  # colour -> [T, H, W] coverage in [0, 1]
    background: Tensor  # [T, 3]

    def area(self, colour: str) -> Tensor:
        """[T] pixels."""
        return self.alpha[colour].sum((1, 2))

    def centroid(self, colour: str) -> Tensor:
        """[T, 2] as (x, y); NaN where the colour is not seen."""
        alpha = self.alpha[colour]
        axis = torch.arange(alpha.shape[-1]) + 0.5
        area = alpha.sum((1, 2))
        area = torch.where(area >= SMALLEST_AREA / 2, area, torch.nan)
        return torch.stack([(alpha.sum(1) * axis).sum(1) / area, (alpha.sum(2) * axis).sum(1) / area], dim=1)


def split_from_ground(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Takes every pixel for a mixture of the ground and the colour of the world whose hue explains it best.

    Args:
        frames: [T, 3, H, W] in 0..255.

    Returns:
        The ground [T, 3], a frame's median; the share of each colour [T, colours, H, W] in [0, 1], of which at most one
        is above 0; each pixel's distance from the ground [T, H, W], in RGB.
    """
    background = frames.flatten(2).median(dim=2).values
    offset = frames - background[:, :, None, None]
    distance = offset.square().sum(1).sqrt()
    ends = torch.tensor(list(sprites.RGB.values()), dtype=torch.float32, device=frames.device)
    toward = ends[None] - background[:, None]  # [T, colours, 3]
    along = torch.einsum("tchw,tkc->tkhw", offset, toward)
    length = toward.norm(dim=2)[:, :, None, None]
    nearest = (along / length).argmax(dim=1, keepdim=True)
    share = (along / length.square()).clamp(0, 1)
    return background, torch.zeros_like(share).scatter(1, nearest, share.gather(1, nearest)), distance


def find_blobs(frames: Tensor) -> Blobs:
    """frames: [T, 3, H, W] in 0..255."""
    background, share, distance = split_from_ground(frames)
    alpha = share * (distance > FOREGROUND_DISTANCE).unsqueeze(1)
    return Blobs({name: alpha[:, k] for k, name in enumerate(sprites.RGB)}, background)


def _shape_of(alpha: Tensor, centroid: Tensor) -> str:
    """The shape whose template, over sizes, fits most of the frames best. alpha [N, H, W], centroid [N, 2]."""
    axis = torch.arange(alpha.shape[-1]) + 0.5
    x = (axis - centroid[:, :1])[:, None, :]
    y = (axis - centroid[:, 1:])[:, :, None]
    errors = []
    for index, name in enumerate(SHAPES):
        kind = torch.full((len(alpha),), index)
        best = torch.full((len(alpha),), torch.inf)
        for size in (6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0):
            radius = torch.full((len(alpha),), size)
            # A triangle's centre of mass lies a third of its half height below the middle of its box.
            drop = size / 3 if name == "triangle" else 0.0
            template = sprites.coverage(kind, x, y + drop, radius)
            best = torch.minimum(best, (template - alpha).abs().sum((1, 2)))
        errors.append(best)
    votes = torch.stack(errors).argmin(0).bincount(minlength=len(SHAPES))
    return SHAPES[int(votes.argmax())]


def _direction_of(centroid: Tensor) -> str | None:
    """The main direction of a straight-line fit to the first frames."""
    early = centroid[:EARLY_FRAMES]
    seen = ~early[:, 0].isnan()
    if int(seen.sum()) < EARLY_FRAMES // 2:
        return None
    time_axis = torch.arange(len(early)).float()[seen]
    time_axis = time_axis - time_axis.mean()
    slope = (time_axis[:, None] * (early[seen] - early[seen].mean(0))).sum(0) / time_axis.square().sum()
    return max(DIRECTIONS, key=lambda name: float((slope * torch.tensor(sprites.VELOCITY[name])).sum()))


def _speed_of(centroid: Tensor) -> float | None:
    """Median speed in pixels per frame, over steps of four frames: bounces and dropouts do not move a median."""
    step = (centroid[STEP:] - centroid[:-STEP]).abs().amax(1) / STEP
    step = step[~step.isnan()]
    return float(step.median()) if len(step) else None


def _late_of(centroid: Tensor, spec: SpriteSpec) -> bool | None:
    """Whether it moves as told in the last LATE_FRAMES: LATE_SHARE of the commanded speed or more, by the median step
    along the commanded axis.

    Steps are of four frames and count whichever way they go, so that bounces do not matter. None where fewer than
    FEWEST_STEPS of them are seen.
    """
    late = centroid[-LATE_FRAMES:]
    step = ((late[STEP:] - late[:-STEP]) * torch.tensor(sprites.VELOCITY[spec.direction])).sum(1).abs() / STEP
    step = step[~step.isnan()]
    if len(step) < FEWEST_STEPS:
        return None
    return float(step.median()) >= LATE_SHARE * sprites.PIXELS_PER_FRAME[spec.speed]


def score_clip(frames: Tensor, caption: str) -> ClipScore:
    """Scores one clip.

    Args:
        frames: [T, 3, H, W] in 0..255, T at least 32; larger ones than the world's 64x64 are averaged down to it.
        caption: what was asked for.
    """
    specs = parse_caption(caption)
    frames = frames.float()
    if (scale := frames.shape[-1] // sprites.FRAME_SIZE) > 1:
        frames = F.avg_pool2d(frames, scale)
    blobs = find_blobs(frames)
    seen_share = {name: float((blobs.area(name) >= SMALLEST_AREA).float().mean()) for name in sprites.RGB}
    present = [name for name, share in seen_share.items() if share >= PRESENT_SHARE]
    # A commanded colour that is there is its sprite; sprites left without one take what else is there.
    spare = [name for name in present if name not in {spec.colour for spec in specs}]
    scores = []
    for spec in specs:
        colour_right = spec.colour in present
        colour = spec.colour if colour_right else (spare.pop(0) if spare else None)
        if colour is None:
            scores.append(SpriteScore(spec, False, False, False, None, None, None, None, None))
            continue
        alpha, area, centroid = blobs.alpha[colour], blobs.area(colour), blobs.centroid(colour)
        usable = (area >= SMALLEST_AREA).nonzero()[:, 0]
        direction = _direction_of(centroid)
        # Judge the shape away from the other sprites, as far as possible.
        others = torch.stack([blobs.area(name) for name in sprites.RGB if name != colour]).sum(0)
        crossing = torch.zeros(len(frames), dtype=torch.bool)
        if float(others.median()) >= SMALLEST_AREA:
            rest = torch.stack([blobs.alpha[name] for name in sprites.RGB if name != colour]).sum(0)
            axis = torch.arange(rest.shape[-1]) + 0.5
            near_x = (axis - centroid[:, :1]).abs() < 9
            near_y = (axis - centroid[:, 1:]).abs() < 9
            crossing = (rest * (near_x[:, None, :] & near_y[:, :, None])).sum((1, 2)) > 4
        clear = usable[~crossing[usable]]
        chosen = (clear if len(clear) >= 4 else usable)[:: max(1, len(usable) // 20)]
        shape = _shape_of(alpha[chosen], centroid[chosen])
        first, last = clear[clear < SECOND], clear[clear >= len(frames) - SECOND]
        colour_drift = size_drift = None
        if len(first) and len(last):
            size_drift = float(area[last].mean() / area[first].mean()) - 1
            core = alpha > 0.8
            means = [
                (frames[rows] * core[rows, None]).sum((0, 2, 3)) / core[rows].sum().clamp(min=1)
                for rows in (first, last)
            ]
            colour_drift = float((means[1] - means[0]).norm())
        scores.append(
            SpriteScore(
                spec,
                colour_right,
                direction == spec.direction,
                shape == spec.shape,
                direction,
                shape,
                _speed_of(centroid),
                colour_drift,
                size_drift,
                _late_of(centroid, spec) if colour_right else None,
            )
        )
    drift = (blobs.background[-SECOND:].mean(0) - blobs.background[:SECOND].mean(0)).abs().max()
    return ClipScore(caption, tuple(scores), len(present) == len(specs), float(drift))


# ---------------------------------------------------------------------------------------------------------------
# The table


def summarise(clips: Sequence[ClipScore]) -> dict[str, object]:
    """Shares, speeds and drifts over clips, ready for JSON."""
    every = [sprite for clip in clips for sprite in clip.sprites]

    def share(values: Sequence[bool]) -> float:
        return sum(values) / max(1, len(values))

    def median(values: Sequence[float | None]) -> float | None:
        known = sorted(value for value in values if value is not None)
        return known[len(known) // 2] if known else None

    speeds = {}
    for word, commanded in sprites.PIXELS_PER_FRAME.items():
        chosen = [sprite.speed for sprite in every if sprite.spec.speed == word and sprite.speed is not None]
        speeds[word] = {"commanded": commanded, "measured": median(chosen), "sprites": len(chosen)}
    errors = [
        abs(sprite.speed / sprites.PIXELS_PER_FRAME[sprite.spec.speed] - 1)
        for sprite in every
        if sprite.speed is not None
    ]
    late = [sprite.late_right for sprite in every if sprite.late_right is not None]
    return {
        "captions": len(clips),
        "sprites": len(every),
        "colour": share([sprite.colour_right for sprite in every]),
        "direction": share([sprite.direction_right for sprite in every]),
        "shape": share([sprite.shape_right for sprite in every]),
        "everything": share(
            [
                clip.count_right and all(s.colour_right and s.direction_right and s.shape_right for s in clip.sprites)
                for clip in clips
            ]
        ),
        "sprite_count": share([clip.count_right for clip in clips]),
        "speed": speeds,
        "speed_error": median(errors),
        "background_drift": median([clip.background_drift for clip in clips]),
        "colour_drift": median([sprite.colour_drift for sprite in every]),
        "late": share(late) if late else None,
        "late_sprites": len(late),
        "size_drift": median([abs(s.size_drift) if s.size_drift is not None else None for s in every]),
    }


def table(summary: dict[str, object], title: str) -> str:
    """The summary as Markdown."""

    def number(value: object, form: str) -> str:
        return "-" if value is None else format(value, form)

    speeds = summary["speed"]
    assert isinstance(speeds, dict)
    rows = [
        ("colours right", number(summary["colour"], ".1%")),
        ("directions right", number(summary["direction"], ".1%")),
        ("shapes right", number(summary["shape"], ".1%")),
        ("the caption's colours there and no others (clips)", number(summary["sprite_count"], ".1%")),
        ("everything right (clips)", number(summary["everything"], ".1%")),
        *(
            (f"speed {word!r}: {entry['commanded']} px/frame commanded", number(entry["measured"], ".2f") + " measured")
            for word, entry in speeds.items()
        ),
        ("speed error, median", number(summary["speed_error"], ".1%")),
        (
            f"moves as told in the last {LATE_FRAMES / SECOND:g} s, of {summary['late_sprites']} sprites followed",
            number(summary["late"], ".1%"),
        ),
        ("background drift, median (levels of 255)", number(summary["background_drift"], ".1f")),
        ("sprite colour drift, median (RGB distance)", number(summary["colour_drift"], ".1f")),
        ("sprite size drift, median", number(summary["size_drift"], ".1%")),
    ]
    head = f"{title}: {summary['captions']} captions, {summary['sprites']} sprites"
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def fresh_captions(count: int, seed: int) -> list[str]:
    """Held-out captions of a seed, without those of docs/evidence.

    Args:
        count: of the captions that are left.
    """
    known = set(sprites.held_out_captions(EVIDENCE_CAPTIONS))
    # So many more that none of the known ones makes it too few.
    found = sprites.held_out_captions(count + EVIDENCE_CAPTIONS, seed)
    return [caption for caption in found if caption not in known][:count]


# ---------------------------------------------------------------------------------------------------------------
# Making clips


@torch.no_grad()
def sample_latents(
    dit: WanDiT,
    encoder: CaptionEncoder,
    captions: Sequence[str],
    pixel_frames: int,
    schedule: DiagonalSchedule,
    settings: CausalSettings,
    *,
    cfg: float,
    seed: int,
    scale: int = 1,
) -> Tensor:
    """Samples clips chunk by chunk with the core's iterator; guidance is against the empty caption.

    Args:
        scale: of the frames the models were trained on.

    Returns:
        [B, 16, T_lat, 8 * scale, 8 * scale] standardised latents, the DiT's own space, on its device.
    """
    side = scale * sprites.FRAME_SIZE // SPACE_FACTOR
    device = next(dit.parameters()).device
    noise = SeededNoise(seed, (len(captions), LATENT_CHANNELS, side, side), device)
    chunks = stream(
        dit,
        encoder.encode(captions),
        noise,
        schedule,
        settings,
        latent_frames(pixel_frames),
        precision=PRECISION,
        cfg=cfg,
        negative=encoder.encode([""]),
    )
    return torch.cat(list(chunks), dim=2)


SHEET_EVERY = 8
"""Frames of a clip of which a contact sheet shows one."""
SHEET_GREY = 40
"""Level of the lines between a contact sheet's frames."""


def contact_sheet(frames: Tensor, path: Path, scale: int) -> None:
    """Writes rows of clips and columns of frames. frames: [B, T, 3, H, W] in 0..255."""
    from PIL import Image

    picked = F.pad(frames[:, ::SHEET_EVERY].round().to(torch.uint8), (1, 1, 1, 1), value=SHEET_GREY)
    sheet = picked.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray(sheet.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def preset_of(schedule: DiagonalSchedule) -> str:
    """The preset from whose list a checkpoint's noise levels are taken, whatever its steps and its shift.

    Raises:
        ValueError: there is none.
    """
    steps = tuple(map(len, schedule.sigmas))
    # Self Forcing's four levels are even ones too: presets of the same kind of model first.
    for name in sorted(PRESETS, key=lambda name: PRESETS[name].fresh_noise != schedule.fresh_noise):
        if same_levels(DiagonalSchedule.preset(name, steps=steps, shift=schedule.shift).sigmas, schedule.sigmas):
            return name
    raise ValueError(
        f"the checkpoint was trained with the noise levels {levels_text(schedule.sigmas)}, which are no preset's; give "
        "--preset with --steps or --shift."
    )


def chosen_sampling(
    options: argparse.Namespace, trained: demo_files.TrainedFor
) -> tuple[DiagonalSchedule, CausalSettings, float]:
    """What the flags say, else what the checkpoint was trained for.

    Raises:
        ValueError: other steps or another shift of noise levels that no preset has.
    """
    schedule, settings = trained.schedule, trained.settings
    steps = parse_steps(options.steps) if options.steps else None
    if options.preset:
        schedule = DiagonalSchedule.preset(options.preset, steps=steps, shift=options.shift)
    elif steps or options.shift:
        own = DiagonalSchedule.preset(
            preset_of(schedule),
            steps=steps or tuple(map(len, schedule.sigmas)),
            shift=options.shift or schedule.shift,
        )
        schedule = replace(schedule, sigmas=own.sigmas, shift=own.shift)
    if options.context_mode:
        schedule = replace(schedule, context_mode=options.context_mode)
    if options.noise:
        schedule = replace(schedule, fresh_noise=options.noise == "fresh")
    if options.window is not None:
        settings = replace(settings, window=options.window)
    if options.sink is not None:
        settings = replace(settings, sink=options.sink)
    if options.kv_cache_dtype:
        settings = replace(settings, kv_cache_dtype=options.kv_cache_dtype)
    return schedule, settings, trained.cfg if options.cfg is None else options.cfg


def load_parts(options: argparse.Namespace) -> tuple[WanDiT, CaptionEncoder, DemoAutoencoder]:
    """The models that the flags name: of finished files, or of a training run that was not exported."""
    if (options.checkpoint / train_demo.DIT_CHECKPOINT).exists():
        dit, encoder, autoencoder = train_demo.load_trained(options.checkpoint)
        return demo_files.load_dit(options.dit) if options.dit else dit, encoder, autoencoder
    return demo_files.load_models(options.checkpoint, options.dit)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo"), help="shipped weights or a training run")
    parser.add_argument("--dit", type=Path, help="a DiT of the demo's size instead of the checkpoint's")
    parser.add_argument("--source", choices=("model", "autoencoder", "truth"), default="model")
    parser.add_argument("--scale", type=int, default=1, help="size of a frame: 64 pixels times this")
    parser.add_argument("--captions", type=int, default=64, help="number of held-out captions")
    parser.add_argument("--caption-seed", type=int, default=0, help="which held-out captions")
    parser.add_argument("--fresh", action="store_true", help="without the captions of docs/evidence")
    parser.add_argument("--caption", action="append", help="score this caption instead (repeatable)")
    parser.add_argument("--length", type=int, default=sprites.CLIP_FRAMES, help="pixel frames")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: what the checkpoint was trained for")
    parser.add_argument(
        "--steps", help="denoising steps per chunk, such as 12 or 4,3,2; default: as trained, or the preset's"
    )
    parser.add_argument("--cfg", type=float, help="guidance; default: what the checkpoint says")
    parser.add_argument("--shift", type=float, help="timestep shift; default: as trained, or the preset's")
    parser.add_argument("--context-mode", choices=CONTEXT_MODES, help="default: as trained, or the preset's")
    parser.add_argument("--window", type=int, help="latent frames, -1 for all; default: as trained")
    parser.add_argument("--sink", type=int, help="latent frames; default: as trained")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="number format of the KV cache")
    parser.add_argument(
        "--noise", choices=("kept", "fresh"), help="kept: Euler's method; fresh: as distilled models do"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the captions do not change")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="that makes the clips of a model: cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) of the first 12 clips here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    choose = fresh_captions if options.fresh else sprites.held_out_captions
    captions = options.caption or choose(options.captions, options.caption_seed)
    started = time.perf_counter()
    if options.source == "model":
        dit, encoder, autoencoder = load_parts(options)
        for model in (dit, encoder, autoencoder):
            model.to(options.device)
        trained = demo_files.trained_for(options.dit or options.checkpoint / demo_files.TEACHER_FILE)
        schedule, settings, cfg = chosen_sampling(options, trained)
        latents = sample_latents(
            dit,
            encoder,
            captions,
            options.length,
            schedule,
            settings,
            cfg=cfg,
            seed=options.seed,
            scale=options.scale,
        )
        frames = decode_frames(autoencoder, latents).cpu()
        title = f"model, {','.join(str(len(row)) for row in schedule.sigmas)} steps a chunk, cfg {cfg:g}"
    else:
        scenes = sprites.make_scenes([parse_caption(caption) for caption in captions], options.seed)
        drawn = sprites.render(scenes, torch.arange(options.length), options.scale)
        frames = drawn.float()
        if options.source == "autoencoder":
            autoencoder = load_parts(options)[2]
            with torch.no_grad():
                pixels = autoencoder.decode(autoencoder.encode(sprites.to_pixels(drawn)))
            frames = ((pixels + 1) * 127.5).movedim(1, 2)
        title = {"autoencoder": "true clips through the autoencoder", "truth": "true clips"}[options.source]
    made = time.perf_counter() - started
    clips = [score_clip(clip, caption) for clip, caption in zip(frames, captions, strict=True)]
    summary = summarise(clips)
    print(table(summary, title))
    print(f"\n{made:.0f} s to make {len(captions)} clips of {options.length} frames")
    if options.sheet:
        contact_sheet(frames[:12], options.sheet, scale=max(1, 2 // options.scale))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"title": title, "summary": summary, "clips": [asdict(clip) for clip in clips]})


if __name__ == "__main__":
    main()
