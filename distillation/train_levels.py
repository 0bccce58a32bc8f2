"""Moves the demo's student to other noise levels, in its own rollouts.

    python -m distillation.train_levels --start demo --out runs/levels                                     # resumes
    python -m distillation.train_levels --start demo --out runs/levels --export runs/levels/demo_student.safetensors

A distilled student answers well at the levels that it was trained at, and nearly as well at others: what a sprite looks
like, it says there too. What it does not keep is the ground. Guidance has taught it to darken that a little wherever
noise is high, and levels that are close to each other add it up. So the student rolls out captions at the new levels,
and at every input that its sampler met there it is told what to answer:

- in the first chunk below pure noise: where the teacher's guided path ends from there, a finished picture and not a
  mean of two places, its ground painted as one of the world's;
- elsewhere what the student in START says to the same input, its ground painted as the first chunk's: of the first
  chunk at pure noise as one of the world's, and behind frames that are given as theirs.

With `--copies removed` there is one of each sprite in what a first chunk is to be: the teacher's paths end in two
copies as often as the student's forwards do (distillation.copies). With `--ends student` the student in START finishes
a first chunk instead of the teacher: a tenth of the time. With `--ends none` a first chunk stays as START answers.
`--first-pool` and `--first-batch` add windows of first chunks alone.

With `--between 0.75` a later chunk's first forward learns to say what START says with a forward at that level more:
where a sprite is pale in the first answer, the second makes it good. A later chunk follows from those before it, so
that a regression does not blur it. What goes wrong in long clips has to be met there: `--length` of a rollout.

With `--switch-pool` and `--switch-batch` captions change in mid-run (distillation.switches): from some chunk on the
student rolls out under another caption, its window written again under that and its steps begun anew, as Diagonal
Prompt Schedule does it. Clips are true ones up to the switch. From there on the student goes on from its own answers,
or from the true one where it has left the course (`--switch-course`), and is told the true one; with `--drawn-by
student` as the student in START draws it, in its last forward. Of what appears at a switch with no one to take its
place from, pure noise decides where: that is answered as before.

Which of the world's grounds it is, the noise decides, as it did before: the darkest quarter of all noise gets the
darkest level. Below pure noise it is the level that is nearest to what the student said there. (Ranked by the grounds
that the student makes, captions come to decide it: what they add a little of confirms itself. Ranked among the clips
that are rolled out together, the same noise gets another level beside others.)
All chunks of a window are seen in one causal forward (distillation.windows).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, caption_of, tokenize_captions
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR, DemoAutoencoder
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.frames import latent_frames, pixel_frames
from diagonal_sampler.sampler import mix
from diagonal_sampler.schedule import (
    DEMO_PRESET,
    DiagonalSchedule,
    Levels,
    levels_text,
    parse_sigmas,
    shift_sigma,
    unshift_sigma,
)
from distillation import sprites
from distillation.common import PRECISION, autocast, generator_at, stops_in_a_line
from distillation.copies import remove_copies
from distillation.demo_files import STUDENT_FILE, TrainedFor, load_dit, load_models, trained_for, write_changed
from distillation.demo_run import Losses, Pace, Training, add_fields, begin, given, make_adamw, read_run
from distillation.ground import ground_of, lightness, nearest_level, paint_ground, world_levels
from distillation.losses import guided
from distillation.recipes import option
from distillation.rollout import predict_x0
from distillation.samples import decode_groups, encode_frames
from distillation.switches import switch
from distillation.windows import DrawnNoise, Sampling, States, require_whole_pools, roll_out, window_error

CHECKPOINT = "levels.pt"
_POOL_DRAWS, _BATCH_DRAWS = 51, 52  # positions of this module's random numbers under its seed
_FIRST_ROWS = 1_000_000  # captions of first chunks alone are numbered from here
_SWITCH_ROWS = 2_000_000  # and those of clips whose caption changes from here
_BEHIND_SWITCH = 2  # chunks of such a clip under the new caption, at least
_SHORTEST_SWITCH = 41  # pixel frames of such a clip: a chunk more
SAME_DRAWING = 0.05
"""Mean squared error of a chunk's x0 up to which a drawing is of the same; above it shows something more, by eye."""
Ends = Literal["teacher", "student", "none"]
Copies = Literal["kept", "removed"]
DrawnBy = Literal["world", "student"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelsRecipe:
    """Options of the training; `updates` decides the length of the cosine."""

    seed: int = option(7, "seed of everything")
    updates: int = option(416, "of the whole run: the length of the cosine")
    sigmas: str = option(
        "", f"levels to move to, chunks split by semicolons, as many a chunk as before; default: {DEMO_PRESET}"
    )
    length: int = option(81, "pixel frames of a rollout")
    going_on_chunks: int = option(3, "chunks of a rollout behind given frames")
    pool: int = option(48, "captions rolled out together")
    pool_updates: int = option(16, "updates that use what was rolled out together")
    batch: int = option(28, "windows an update")
    first_share: float = option(0.45, "share of windows that ask for the first chunk")
    first_pool: int = option(0, "captions beside those of --pool, of which only the first chunk is rolled out")
    first_batch: int = option(0, "windows of those an update, beside --batch")
    switch_pool: int = option(0, "clips whose caption changes, rolled out together")
    switch_batch: int = option(0, "windows of those an update, beside --batch")
    switch_length: int = option(129, "pixel frames of a clip whose caption changes")
    switch_course: float = option(
        0.15, "mean squared error of its chunk's x0 up to which its rollout goes on from that"
    )
    drawn_by: DrawnBy = option("world", "who draws the clips whose caption changes; student: the one in START")
    going_on_share: float = option(0.5, "share of windows that go on from given frames")
    ends: Ends = option("teacher", "who finishes a first chunk; student: the one in START; none: START's answers")
    between: str = option("", "noise levels of START's forwards behind the first of a later chunk")
    copies: Copies = option("kept", "of a sprite, in what a first chunk is to be")
    teacher_steps: int = option(8, "Euler steps of the teacher's path from where the student stands")
    teacher_cfg: float = option(5.0, "guidance of the teacher, in ComfyUI's convention")
    mean_share: float = option(0.5, "with --mean-with: weight of the student in the mean")
    mean_weight: float = option(8.0, "of the error of a frame's mean, in which a ground that is a little off shows")
    learning_rate: float = option(1.5e-4, "of all weights")
    warmup: int = option(10, "updates of linear warm-up")
    ema_decay: float = option(0.985, "of the exported weights")
    save_every: int = option(32, "updates between checkpoints: --pool-updates or a multiple of it")

    def __post_init__(self) -> None:
        require_whole_pools(self.save_every, self.pool_updates)
        if self.going_on_chunks < 1:
            raise ValueError(f"going_on_chunks is {self.going_on_chunks}; behind given frames at least 1 is made.")
        for kind in ("first", "switch"):
            pool, batch = (getattr(self, f"{kind}_{name}") for name in ("pool", "batch"))
            if bool(pool) != bool(batch):
                raise ValueError(f"{kind}_pool is {pool} and {kind}_batch {batch}; give both, or neither.")
        if self.switch_pool and self.switch_length < _SHORTEST_SWITCH:
            raise ValueError(f"switch_length is {self.switch_length}; a switch needs {_SHORTEST_SWITCH} pixel frames.")
        if not 0 <= self.mean_share <= 1:
            raise ValueError(f"mean_share is {self.mean_share}; it is the student's weight in a mean, 0 to 1.")
        if self.ends == "none" and self.copies == "removed":
            raise ValueError("ends is 'none' and copies 'removed'; a first chunk that stays as it is keeps its copies.")
        if any(not 0 < sigma < 1 for sigma in self.more_levels):
            raise ValueError(f"between is {self.between!r}; noise levels lie between 0 and 1.")

    @property
    def levels(self) -> Levels:
        """Noise levels to move to, a chunk each; the last repeats."""
        return parse_sigmas(self.sigmas) if self.sigmas else DiagonalSchedule.preset(DEMO_PRESET).sigmas

    @property
    def windows(self) -> int:
        """Of an update, in all."""
        return self.batch + self.first_batch + self.switch_batch

    @property
    def more_levels(self) -> tuple[float, ...]:
        """Noise levels of the forwards in `between`."""
        return tuple(sigma for row in parse_sigmas(self.between) for sigma in row)


# ---------------------------------------------------------------------------------------------------------------
# What the sampler meets, and what is to be answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """What a pool is made with; all but the student are frozen.

    Attributes:
        student: as it is now.
        before: as it was in START.
    """

    student: WanDiT
    before: WanDiT
    teacher: WanDiT
    encoder: CaptionEncoder
    autoencoder: DemoAutoencoder

    @property
    def device(self) -> torch.device:
        return self.autoencoder.wan_mean.device


def finished(found: Tensor, schedule: DiagonalSchedule) -> Tensor:
    """The clip [B, C, T, H, W] of a rollout's x0."""
    last = [found[:, chunk, schedule.steps(chunk) - 1] for chunk in range(found.shape[1])]
    return torch.cat(last, dim=2)


@torch.no_grad()
def teacher_end(
    networks: Networks, x: Tensor, sigma: float, text: Tensor, recipe: LevelsRecipe, shift: float
) -> Tensor:
    """Where the teacher's guided path ends from a first chunk's input, by Euler's method; x0, the shape of `x`.

    Args:
        x: [B, C, size, H, W] at noise level `sigma`.
        shift: of the times that the steps are even in.
    """
    empty = networks.encoder.encode([""]).expand(len(text), -1, -1)
    start = unshift_sigma(sigma, shift)
    count = recipe.teacher_steps
    levels = [shift_sigma(start * (count - step) / count, shift) for step in range(count + 1)]
    for level, following in pairwise(levels):
        x0, without = (predict_x0(networks.teacher, x, level, words, PRECISION) for words in (text, empty))
        x0 = guided(x0, without, recipe.teacher_cfg)
        x = x0 + (x - x0) * (following / level)
    return x


@torch.no_grad()
def student_end(
    networks: Networks, x0: Tensor, later: Sequence[float], text: Tensor, generator: torch.Generator
) -> Tensor:
    """Where the student in START ends from an answer to a first chunk's input; x0, the shape of `x0`.

    Args:
        x0: [B, C, size, H, W].
        later: noise levels of the forwards that follow.
    """
    for sigma in later:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        x0 = predict_x0(networks.before, mix(x0, noise, sigma), sigma, text, PRECISION)
    return x0


@torch.no_grad()
def opening_states(
    recipe: LevelsRecipe,
    networks: Networks,
    trained: TrainedFor,
    rows: range,
    chunks: int,
    generator: torch.Generator,
) -> tuple[States, Tensor]:
    """Clips from pure noise: what the student is asked and is to answer; and the clips that it made.

    Depends on the recipe's seed, the rows, the generator and the student's weights.

    Args:
        rows: numbers of the captions.
        chunks: of each clip.

    Returns:
        The states, and the clips [B, C, T, H, W].
    """
    schedule, size, device = trained.schedule, trained.settings.frames_per_chunk, networks.device
    specs = [sprites.training_specs(recipe.seed, row) for row in rows]
    ids = tokenize_captions([caption_of(each) for each in specs]).to(device)
    text, noise = networks.encoder(ids), _noise(generator, len(ids))
    inputs, found = roll_out(networks.student, text, noise, trained, chunks)
    _, wanted = roll_out(networks.before, text, noise, trained, chunks, asked=inputs, between=recipe.more_levels)
    clips = finished(found, schedule)
    ground = ground_of(networks.autoencoder, clips[:, :, :size])

    def one_of_each(x0: Tensor) -> Tensor:
        return x0 if recipe.copies == "kept" else remove_copies(networks.autoencoder, x0, specs)

    sigmas = schedule.chunk_sigmas(0)
    level = world_levels(lightness(networks.autoencoder, inputs[:, 0, 0]))
    for step, sigma in enumerate(sigmas if recipe.ends != "none" else ()):
        answer = wanted[:, 0, step]
        if step and recipe.ends == "student":
            answer = student_end(networks, one_of_each(answer), sigmas[step + 1 :], text, generator)
        elif step:
            answer = teacher_end(networks, inputs[:, 0, step], sigma, text, recipe, schedule.shift)
        wanted[:, 0, step] = paint_ground(networks.autoencoder, one_of_each(answer), level)
        if not step:
            level = nearest_level(ground_of(networks.autoencoder, found[:, 0, 0]))  # what it said itself
    for chunk in range(1, chunks):
        for step in range(schedule.steps(chunk)):
            wanted[:, chunk, step] = paint_ground(networks.autoencoder, wanted[:, chunk, step], ground)
    return _states(inputs, wanted, ids), clips


@torch.no_grad()
def going_on_states(
    recipe: LevelsRecipe,
    networks: Networks,
    trained: TrainedFor,
    pool: int,
    clips: Tensor,
    ids: Tensor,
) -> States:
    """Clips behind given frames, as an extension is made: the last frames of `clips`, cut anywhere, encoded again.

    Args:
        clips: [B, C, T, H, W], T at least twice a chunk.
        ids: their captions.
    """
    size, device = trained.settings.frames_per_chunk, networks.device
    generator = generator_at(recipe.seed, _POOL_DRAWS, pool, 1, device=device)
    frames = decode_groups(networks.autoencoder, clips).flatten(1, 2)  # [B, 4 * T, 3, H, W]
    length = pixel_frames(size)
    ends = torch.randint(2 * length, frames.shape[1] + 1, (len(clips),), generator=generator, device=device)
    taken = ends[:, None] - length + torch.arange(length, device=device)
    shown = frames[torch.arange(len(clips), device=device)[:, None], taken].movedim(2, 1)
    given = encode_frames(networks.autoencoder, shown)
    ground = ground_of(networks.autoencoder, given)
    text, noise = networks.encoder(ids), _noise(generator, len(ids))
    chunks, levels = recipe.going_on_chunks, recipe.more_levels
    inputs, _ = roll_out(networks.student, text, noise, trained, chunks, given=given)
    _, wanted = roll_out(networks.before, text, noise, trained, chunks, given=given, asked=inputs, between=levels)
    for chunk in range(1 + recipe.going_on_chunks):
        for step in range(behind_given(trained).schedule.steps(chunk)):
            wanted[:, chunk, step] = paint_ground(networks.autoencoder, wanted[:, chunk, step], ground)
    return _states(inputs, wanted, ids)


@torch.no_grad()
def as_drawn(
    networks: Networks,
    trained: TrainedFor,
    truth: Tensor,
    captions: Sequence[tuple[int, Tensor]],
    generator: torch.Generator,
) -> Tensor:
    """Clips as the student in START draws them: what it answers in its last forward, on the ground that they had.

    Its edges and contrasts are not those of the world's clips, which the autoencoder blurs where they move. A chunk in
    which it would draw something else stays as it is.

    Args:
        truth: [B, C, T, H, W].
        captions: each with the chunk that it begins with, in order, from chunk 0 on.

    Returns:
        the clips, the shape of `truth`.
    """
    size, chunks = trained.settings.frames_per_chunk, truth.shape[2] // trained.settings.frames_per_chunk
    level = trained.schedule.chunk_sigmas(chunks)[-1]
    once = replace(trained, schedule=replace(trained.schedule, sigmas=((level,),)))
    ends = [first for first, _ in captions[1:]] + [chunks]
    for (first, ids), end in zip(captions, ends, strict=True):
        noise = torch.randn(truth.shape, generator=generator, device=truth.device)
        asked = mix(truth, noise, level).unflatten(2, (chunks, size)).movedim(2, 1).unsqueeze(2)
        text, unused = networks.encoder(ids), _noise(generator, len(ids))
        _, found = roll_out(networks.before, text, unused, once, chunks, asked=asked)
        drawn = found[:, :, 0].movedim(1, 2).flatten(2, 3)
        drawn = paint_ground(networks.autoencoder, drawn, ground_of(networks.autoencoder, truth))
        left = (drawn - truth).square().unflatten(2, (chunks, size)).mean((1, 3, 4, 5)) > SAME_DRAWING
        left[:, :first] = left[:, end:] = True
        truth = torch.where(left.repeat_interleave(size, dim=1)[:, None, :, None, None], truth, drawn)
    return truth


@torch.no_grad()
def switched_states(
    recipe: LevelsRecipe, networks: Networks, trained: TrainedFor, pool: int
) -> tuple[States, int, TrainedFor]:
    """Clips whose caption changes: what the student is asked and is to answer; the chunk, and how they are sampled."""
    schedule, size, device = trained.schedule, trained.settings.frames_per_chunk, networks.device
    chunks = latent_frames(recipe.switch_length) // size
    generator = generator_at(recipe.seed, _POOL_DRAWS, pool, 3, device=device)
    chunk = int(torch.randint(1, chunks - _BEHIND_SWITCH + 1, (), generator=generator, device=device))
    scenes = sprites.sample_scenes(recipe.switch_pool, recipe.seed, _SWITCH_ROWS + pool * recipe.switch_pool)
    clips = switch(
        scenes,
        recipe.seed,
        _SWITCH_ROWS + pool * recipe.switch_pool,
        at=pixel_frames(chunk * size),
        frames=pixel_frames(chunks * size),
    )
    truth = encode_frames(networks.autoencoder, sprites.to_pixels(clips.frames()).to(device))
    ids = tokenize_captions(clips.after.captions).to(device)
    if recipe.drawn_by == "student":
        earlier = tokenize_captions(clips.before.captions).to(device)
        truth = as_drawn(networks, trained, truth, ((0, earlier), (chunk, ids)), generator)
    rows = tuple(map(schedule.chunk_sigmas, range(chunk)))
    anew = replace(trained, schedule=replace(schedule, sigmas=(*rows, *schedule.sigmas)))
    text, noise = networks.encoder(ids), _noise(generator, len(ids))
    course = {"truth": truth, "course": recipe.switch_course, "true_chunks": chunk}
    inputs, _ = roll_out(networks.student, text, noise, anew, chunks, **course)
    wanted = truth.unflatten(2, (chunks, size)).movedim(2, 1).unsqueeze(2).expand_as(inputs).clone()
    appears = clips.appears.nonzero()[:, 0].to(device)
    if len(appears):
        asked, noise = inputs[appears, : chunk + 1], _noise(generator, len(appears))
        _, before = roll_out(networks.before, text[appears], noise, anew, chunk + 1, asked=asked)
        wanted[appears, chunk, 0] = before[:, chunk, 0]
    return _states(inputs, wanted, ids), chunk, anew


def fresh_pools(recipe: LevelsRecipe, networks: Networks, trained: TrainedFor, pool: int, chunks: int) -> list[States]:
    """Clips from pure noise, clips behind given frames, and first chunks alone if the recipe asks for them."""
    device = networks.device
    rows = range(pool * recipe.pool, (pool + 1) * recipe.pool)
    generator = generator_at(recipe.seed, _POOL_DRAWS, pool, 0, device=device)
    opening, clips = opening_states(recipe, networks, trained, rows, chunks, generator)
    pools = [opening, going_on_states(recipe, networks, trained, pool, clips, opening.ids)]
    if recipe.first_pool:
        rows = range(_FIRST_ROWS + pool * recipe.first_pool, _FIRST_ROWS + (pool + 1) * recipe.first_pool)
        generator = generator_at(recipe.seed, _POOL_DRAWS, pool, 2, device=device)
        pools.append(opening_states(recipe, networks, trained, rows, 1, generator)[0])
    return pools


def behind_given(trained: TrainedFor) -> TrainedFor:
    """How clips behind a given chunk are sampled, with that as a first chunk of one step."""
    schedule = trained.schedule
    given = (schedule.given_context_sigma,)
    return replace(trained, schedule=replace(schedule, sigmas=(given, *schedule.sigmas)))


def _noise(generator: torch.Generator, batch: int) -> DrawnNoise:
    side = sprites.FRAME_SIZE // SPACE_FACTOR
    return DrawnNoise(generator, (batch, LATENT_CHANNELS, side, side))


def _states(inputs: Tensor, wanted: Tensor, ids: Tensor) -> States:
    """Without flow."""
    batch, chunks, _, _, size, height, width = inputs.shape
    return States(inputs, wanted, ids, inputs.new_zeros(batch, 4, chunks * size, height, width))


# ---------------------------------------------------------------------------------------------------------------
# A run


def train_levels(
    recipe: LevelsRecipe,
    start: Path,
    out: Path,
    device: torch.device,
    *,
    student: Path | None = None,
    mean_with: Path | None = None,
    stop: int | None = None,
) -> Path:
    """Trains a student, or resumes, until `stop` updates (default: all); the checkpoint's path.

    Args:
        start: folder of finished models.
        student: weights to begin with instead of the folder's.
        mean_with: other weights; the run begins with the recipe's mean of both. No updates: that is what it makes.

    Raises:
        ValueError: no models in `start`, a student whose context is not noisy, sigmas that cannot be read, or a
            loss that is not finite.
    """
    path = out / CHECKPOINT
    file = student or start / STUDENT_FILE
    teacher, encoder, autoencoder = (model.to(device) for model in load_models(start))
    before = load_dit(file).to(device)
    if mean_with is not None:
        other = load_dit(mean_with).to(device).state_dict()
        before.load_state_dict(
            {name: torch.lerp(other[name], own, recipe.mean_share) for name, own in before.state_dict().items()}
        )
    dit = copy.deepcopy(before).train().requires_grad_(True)
    found = trained_for(file)
    trained = replace(found, schedule=replace(found.schedule, sigmas=recipe.levels))
    networks = Networks(student=dit, before=before, teacher=teacher, encoder=encoder, autoencoder=autoencoder)
    size = trained.settings.frames_per_chunk
    chunks = latent_frames(recipe.length) // size
    switched_chunks = latent_frames(recipe.switch_length) // size
    openings, firsts = Sampling(trained, chunks, device), Sampling(trained, 1, device)
    extensions = Sampling(behind_given(trained), 1 + recipe.going_on_chunks, device)
    optimizer = make_adamw(list(dit.parameters()), recipe.learning_rate, weight_decay=0.0)
    begun_with = [file] if mean_with is None else [file, mean_with]
    training = Training(
        path,
        dit,
        [(optimizer, recipe.learning_rate)],
        recipe,
        ema_decay=recipe.ema_decay,
        begun_with=begun_with,
    )
    first = training.resume()
    pace = Pace(recipe.updates, recipe.warmup)
    extra = {"first": recipe.first_batch, "switch": recipe.switch_batch}
    names = ("opening", "going_on", *(name for name, batch in extra.items() if batch))
    losses = Losses()
    pools: list[States] = []
    switched: tuple[States, int, Sampling] | None = None
    going_on = round(recipe.going_on_share * recipe.batch)
    for update in training.updates(pace, losses, first, stop):
        if not pools or update % recipe.pool_updates == 0:
            dit.eval()
            pools = fresh_pools(recipe, networks, trained, update // recipe.pool_updates, chunks)
            if recipe.switch_pool:
                states, since, anew = switched_states(recipe, networks, trained, update // recipe.pool_updates)
                switched = states, since, Sampling(anew, switched_chunks, device)
            dit.train()
        opening, behind, *alone = pools
        pace.set_rates(training.optimizers, update)
        generator = generator_at(recipe.seed, _BATCH_DRAWS, update, device=device)
        parts = [
            openings.draw(opening, recipe.batch - going_on, generator, often_share=recipe.first_share),
            extensions.draw(behind, going_on, generator, often=1, often_share=recipe.first_share),
            *(firsts.draw(states, recipe.first_batch, generator) for states in alone),
        ]
        if switched is not None:
            states, since, sampling = switched
            often = {"often": since, "often_share": recipe.first_share, "since": since}
            parts.append(sampling.draw(states, recipe.switch_batch, generator, **often))
        means = []
        for windows in parts:
            with torch.no_grad():
                text = encoder(windows.ids)
            with autocast(device):
                error = window_error(dit, text, windows, size, mean_weight=recipe.mean_weight)
            mean = error.sum() / windows.weight.sum().clamp(min=1)
            (mean * len(windows.ids) / recipe.windows).backward()
            means.append(mean)
        training.step(update)
        losses.add(**dict(zip(names, means, strict=True)))
    return path


def export_levels(run: Path, student: Path, target: Path, note: str = "", mean_with: Path | None = None) -> Path:
    """Writes the averaged weights of a run, with the header of the student that it began with and the new noise levels.

    Args:
        mean_with: as given to `train_levels`.

    Raises:
        ValueError: no run in the folder.
    """
    saved = read_run(run / CHECKPOINT)
    recipe = LevelsRecipe(**saved["recipe"])
    mean = ""
    if mean_with is not None:
        mean = f"begun with {recipe.mean_share:g} of these weights and else {mean_with.stem}'s, "
    ends = "first chunks kept" if recipe.ends == "none" else f"{recipe.ends}'s ends"
    between = f"later chunks with {recipe.between} between, rollouts of {recipe.length}, " if recipe.between else ""
    drawn = "" if recipe.drawn_by == "world" else " drawn by the student"
    switches = f"{recipe.switch_batch} windows with a switch{drawn} among them, " if recipe.switch_batch else ""
    done = (
        f"distillation.train_levels, {mean}sigmas {levels_text(recipe.levels)}, {ends}, "
        f"copies {recipe.copies}, {between}seed {recipe.seed}, {saved['update']} updates of {recipe.windows} windows, "
        f"{switches}EMA {recipe.ema_decay}"
    )
    return write_changed(target, saved["ema"], student, done, note, sigmas=json.dumps(recipe.levels))


@stops_in_a_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the finished models to go on from")
    parser.add_argument("--student", type=Path, metavar="FILE", help="weights to begin with; default: START's student")
    parser.add_argument("--mean-with", type=Path, metavar="FILE", help="begin with the mean of the student and these")
    parser.add_argument("--out", type=Path, default=Path("runs/levels"))
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the weights of --out there, then stop")
    parser.add_argument("--note", default="", help="with --export: added to the recipe in the file's header")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add_fields(parser, LevelsRecipe)
    options = parser.parse_args(arguments)
    device = begin(options)
    if options.export:
        student = options.student or options.start / STUDENT_FILE
        export_levels(options.out, student, options.export, options.note, options.mean_with)
        return
    recipe = LevelsRecipe(**given(options, LevelsRecipe))
    train_levels(recipe, options.start, options.out, device, student=options.student, mean_with=options.mean_with)


if __name__ == "__main__":
    raise SystemExit(main())
