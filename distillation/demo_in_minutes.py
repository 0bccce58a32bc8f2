"""The whole demo within a limit of wall clock, on one GPU: autoencoder, teacher, student and their scores.

    python -m distillation.demo_in_minutes --scale 2 --seconds 420 --out runs/large

Each part gets what its predecessors left, so the time is kept whatever the machine does meanwhile, and the files of a
part are written when it ends. FOLDER then holds the demo's weights, `demo_student_early.safetensors` (the student
before its long rollouts), scores.json, sheet.png (the teacher's clips above the student's) and log.txt.

What comes out depends on how fast the machine was. `distillation.train_demo` and `distillation.train` are the commands
whose result does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from diagonal_sampler.captions import load_caption_encoder
from diagonal_sampler.demo_autoencoder import load_demo_autoencoder
from distillation import demo_files, recipes, sprites, train_demo
from distillation.common import keep_freed_memory
from distillation.export import export as export_student
from distillation.ranks import Ranks
from distillation.recipes import Recipe
from distillation.run_folder import write_json
from distillation.samples import decode_frames
from distillation.score import contact_sheet, sample_latents, score_clip, summarise, table
from distillation.train import run as run_recipe

log = logging.getLogger("demo_in_minutes")

EARLY_FILE = "demo_student_early.safetensors"

# What each part may take of the whole time; the teacher gets the rest, about half. Its data set is made meanwhile.
AUTOENCODER_SHARE = 0.05
INITIALISATION_SHARE = 0.07
DISTILLATION_SHARE = 0.20
LONG_SHARE = 0.12
SCORING_SHARE = 0.03  # of one model; that of the teacher and of the student

PROBE_UPDATES = 8
"""Updates after which the length of a training of the student is first estimated."""
WARM_UPDATES = 3
"""Updates at the start of a process that say nothing about the later ones."""
STEADY_SHARES = (0.2, 0.5)
"""Parts of the time left that a training of the student goes on before the last part, in which its rates fall."""
RESTART_SECONDS = 2.0
"""For reading and writing a checkpoint between the parts of such a training."""
DECODED_TOGETHER = 4  # clips
SHEET_CLIPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is made, and in what time."""

    scale: int
    seconds: float
    batch_factor: float
    clips: int
    captions: int
    length: int
    student_batch: int


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def until_left(self, share: float) -> float:
        """Seconds until `share` of the whole time is left, at least one."""
        return max(1.0, self.left - share * self.seconds)


def seconds_per_update(folder: Path) -> float:
    """The mean of a run's updates, without the first of them. (Not the median: some rollouts are long.)"""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return fmean(json.loads(line)["seconds"] for line in lines[WARM_UPDATES:])


def train_student(recipe: Recipe, folder: Path, seconds: float, ranks: Ranks) -> None:
    """As many updates as fit: a few to know how many, half of them, and the rest with falling learning rates."""
    end = time.perf_counter() + seconds

    def fitting(share: float) -> int:
        free = end - time.perf_counter() - RESTART_SECONDS
        return max(1, int(share * free / seconds_per_update(folder)))

    recipe = replace(recipe, updates=PROBE_UPDATES)
    run_recipe(recipe, folder, ranks)
    for share in STEADY_SHARES:
        recipe = replace(recipe, updates=recipe.updates + fitting(share))
        run_recipe(recipe, folder, ranks)
    cooldown = fitting(1.0)
    recipe = replace(recipe, updates=recipe.updates + cooldown, cooldown=cooldown)
    run_recipe(recipe, folder, ranks)
    log.info("%s: %d updates of %.3f s", folder.name, recipe.updates, seconds_per_update(folder))


def score(
    file: Path, plan: Plan, device: torch.device, pool: Executor, folder: Path
) -> tuple[dict[str, object], Tensor, str]:
    """Scores on held-out captions, the first clips' frames [N, T, 3, H, W] in 0..255, and the table."""
    started = time.perf_counter()
    dit, trained = demo_files.load_dit(file).to(device), demo_files.trained_for(file)
    encoder = load_caption_encoder(folder / demo_files.TEXT_ENCODER_FILE).to(device)
    autoencoder = load_demo_autoencoder(folder / demo_files.AUTOENCODER_FILE).to(device)
    captions = sprites.held_out_captions(plan.captions)
    latents = sample_latents(
        dit,
        encoder,
        captions,
        plan.length,
        trained.schedule,
        trained.settings,
        cfg=trained.cfg,
        seed=0,
        scale=plan.scale,
    )
    frames = torch.cat([decode_frames(autoencoder, part).cpu() for part in latents.split(DECODED_TOGETHER)])
    made = time.perf_counter() - started
    clips = list(pool.map(score_array, [clip.numpy() for clip in frames], captions))
    summary = summarise(clips)
    log.info("%s: %.0f s to make %d clips, %.0f s in all", file.name, made, len(clips), time.perf_counter() - started)
    return (
        {"summary": summary, "clips": [asdict(clip) for clip in clips]},
        frames[:SHEET_CLIPS],
        table(summary, file.stem),
    )


def score_array(frames: Any, caption: str) -> Any:
    """`score_clip` of a NumPy array: tensors travel between processes as open files, of which there are few."""
    return score_clip(torch.from_numpy(frames), caption)


def make(plan: Plan, out: Path, work: Path, device: torch.device, pool: Executor) -> None:
    """All parts, one after another; one that fails after the teacher is left out, and those behind it are tried."""
    clock = Clock(plan.seconds)
    autoencoder_recipe = train_demo.AutoencoderRecipe(
        scale=plan.scale, seconds=AUTOENCODER_SHARE * plan.seconds, fitting_groups=min(768, plan.clips)
    )
    dit_recipe = train_demo.enlarged(train_demo.DitRecipe(), plan.batch_factor)
    later = min(plan.clips, dit_recipe.later_clips)
    # A picture of twice the size needs twice the noise to be hidden as well (a shift in proportion); half of that, as
    # the student's preset stays at 5.
    shift = dit_recipe.shift * plan.scale**0.5
    dit_recipe = replace(
        dit_recipe, scale=plan.scale, clips=plan.clips, later_clips=later, shift=shift, save_every=1000
    )
    scenes = train_demo.all_training_scenes(dit_recipe, pool)

    path = train_demo.train_autoencoder(autoencoder_recipe, work, device)
    autoencoder = train_demo.load_trained_autoencoder(path, autoencoder_recipe.config)
    whole, sprite = train_demo.autoencoder_psnr(autoencoder.to(device), plan.scale)
    log.info("autoencoder: %.1f dB, %.1f dB on sprites; %.0f s left", whole, sprite, clock.left)
    data = train_demo.encode_latent_set(dit_recipe, autoencoder, None, device, scenes)
    log.info("clips encoded; %.0f s left", clock.left)

    student_share = INITIALISATION_SHARE + DISTILLATION_SHARE + LONG_SHARE
    after_teacher = student_share + 2 * SCORING_SHARE
    dit_recipe = replace(dit_recipe, seconds=clock.until_left(after_teacher))
    train_demo.train_dit(dit_recipe, data, work, device)
    note = f"Ended by the clock after {dit_recipe.seconds:.0f} s on one GPU; openings {dit_recipe.opening_batch} clips"
    train_demo.export(work, out, note)
    del data
    if device.type == "cuda":
        torch.cuda.empty_cache()  # 20 GB that a neighbour on the GPU may want
    log.info("teacher done; %.0f s left", clock.left)

    scores: dict[str, Any] = {"autoencoder": {"psnr": whole, "psnr_sprites": sprite}, "plan": asdict(plan)}
    sheets, tables = [], []

    def attempt(part: str, action: Callable[[], None]) -> None:
        """What is finished must not be lost to what comes after it."""
        try:
            action()
        except Exception:
            log.exception("%s failed; going on without it", part)

    def add_score(name: str) -> None:
        found, frames, text = score(out / name, plan, device, pool, out)
        scores[Path(name).stem] = found
        sheets.append(frames)
        tables.append(text)
        write_json(out / "scores.json", scores)
        contact_sheet(torch.cat(sheets), out / "sheet.png", scale=1)

    attempt("scoring the teacher", lambda: add_score(demo_files.TEACHER_FILE))

    ranks = Ranks(0, 1, device, None)
    common = dict(
        teacher=str(out / demo_files.TEACHER_FILE),
        text_encoder=str(out / demo_files.TEXT_ENCODER_FILE),
        autoencoder="",
        height=8 * plan.scale,
        width=8 * plan.scale,
        batch=plan.student_batch,
        micro_batch=plan.student_batch,
        save_every=10_000,
        sample_every=0,
        tensorboard=False,
    )
    # Batches are four times the CPU recipe's, so rates are twice its (the root of that).
    rates = dict(learning_rate=1e-4, fake_score_learning_rate=2e-4, warmup=10, ema_start=30)
    start = ""

    def train(name: str, target: Path, left: float, recipe: Recipe) -> None:
        nonlocal start
        train_student(replace(recipe, student=start), work / name, clock.until_left(left), ranks)
        export_student(work / name, target, dtype=torch.float16)
        start = str(target)
        log.info("%s done; %.0f s left", name, clock.left)

    left = DISTILLATION_SHARE + LONG_SHARE + SCORING_SHARE
    initialisation = recipes.demo(
        stage="ode", ode_clips=8 * plan.student_batch, ode_steps=12, learning_rate=5e-4, beta1=0.9, warmup=10,
        ema_start=50, **common,
    )  # fmt: skip
    attempt("initialisation", lambda: train("ode", work / "ode.safetensors", left, initialisation))
    distillation = recipes.demo(**rates, **common)
    attempt("distillation", lambda: train("distill", out / EARLY_FILE, LONG_SHARE + SCORING_SHARE, distillation))
    # Guided at low noise only, which gives the variety back that the first distillation cost (demo/README.md).
    long = recipes.demo(
        stage="long", cfg=4.0, cfg_high=0.8, rollout_frames=48, opening_share=0.6, motion_weight=3.0, **rates, **common
    )
    attempt("long rollouts", lambda: train("long", out / demo_files.STUDENT_FILE, SCORING_SHARE, long))
    attempt("scoring the student", lambda: add_score(demo_files.STUDENT_FILE))
    if clock.left > SCORING_SHARE * plan.seconds:
        attempt("scoring the early student", lambda: add_score(EARLY_FILE))
    for text in tables:
        print(f"\n{text}")
    print(f"\n{clock.left:.0f} s left; files in {out}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="weights, scores and a sheet go here")
    parser.add_argument("--work", type=Path, help="checkpoints, 300 MB; default: FOLDER with -work behind it")
    parser.add_argument("--seconds", type=float, default=420, help="wall clock for everything")
    parser.add_argument("--scale", type=int, default=2, help="size of a frame: 64 pixels times this")
    parser.add_argument("--batch-factor", type=float, default=2, help="the teacher's batches, beside the CPU recipe's")
    parser.add_argument("--clips", type=int, default=train_demo.DitRecipe().clips, help="training clips")
    parser.add_argument("--student-batch", type=int, default=32, help="clips an update of the student")
    parser.add_argument("--captions", type=int, default=64, help="held-out captions that are scored")
    parser.add_argument("--length", type=int, default=sprites.CLIP_FRAMES, help="pixel frames that are scored")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="helper processes")
    options = parser.parse_args(arguments)
    out, work = options.out, options.work or options.out.with_name(f"{options.out.name}-work")
    out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(out / "log.txt")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", handlers=handlers)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(
        scale=options.scale,
        seconds=options.seconds,
        batch_factor=options.batch_factor,
        clips=options.clips,
        captions=options.captions,
        length=options.length,
        student_batch=options.student_batch,
    )
    with train_demo.worker_pool(options.workers) as pool:
        make(plan, out, work, device, pool)


if __name__ == "__main__":
    main()
