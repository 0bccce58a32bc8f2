"""The demo's student learns to follow optical flow where it is needed: in its own rollouts.

    python -m distillation.train_follow --start demo --out runs/follow              # resumes
    python -m distillation.train_follow --start demo --out runs/follow --export F   # writes it to folder F

What is told where to go can be known: the next chunk follows from the finished ones and the flow, so that a regression
on the true clip neither blurs nor chooses. What a caption decides cannot, and is not touched: there the student is to
say what it said before, at the very inputs that its sampler meets.

- Followed: the student rolls out clips whose sprites turn against their captions (distillation.sprite_motion), from a
  true first chunk, with their flow. Every input that its sampler met on the way, noise and its own mistakes, is trained
  on, towards the true clip. A prediction that has left its course by more than a pixel or two is replaced by the true
  one: at first nearly all, and later few. (A sprite that is far from where it belongs can only be faded out and in.)
- Kept: the student in START rolls out captions without flow, once. At these inputs the new one is to say the same; and
  in the first chunk also where it is told a flow that it cannot follow yet, for nothing is there to be moved.

All chunks of a window are seen in one causal forward whose context chunks are the inputs of their last steps: what a
KV cache of noisy context holds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, caption_of, tokenize_captions
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.frames import latent_frames
from diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS
from distillation import sprites, train_flow
from distillation.common import autocast, generator_at, stops_in_a_line
from distillation.demo_files import STUDENT_FILE, TrainedFor, load_dit, load_models, trained_for, write_changed
from distillation.demo_run import Losses, Pace, Training, add_fields, begin, given, read_run
from distillation.recipes import option
from distillation.train_flow import FlowClips
from distillation.windows import DrawnNoise, Sampling, States, Windows, require_whole_pools, roll_out, window_error

CHECKPOINT, CLIPS = "follow.pt", "flow_clips.pt"
KEPT_AT_ONCE = 512
"""Captions that are rolled out together without flow."""
_CLIP_DRAWS, _KEPT_DRAWS, _BATCH_DRAWS = 41, 42, 43  # positions of this module's random numbers under its seed


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowRecipe:
    """Options of the training; `updates` decides the length of the cosine."""

    seed: int = option(6, "seed of everything")
    updates: int = option(600, "of the whole run: the length of the cosine")
    clips: int = option(1024, "training clips that turn against their captions")
    length: int = option(81, "pixel frames of a clip")
    pool: int = option(48, "clips rolled out together")
    pool_updates: int = option(8, "updates that use what was rolled out together")
    batch: int = option(16, "windows an update that are to follow; a GPU takes hundreds")
    kept_clips: int = option(256, "captions rolled out without flow, once")
    kept_batch: int = option(16, "windows of those an update")
    kept_weight: float = option(3.0, "of the loss without flow")
    led_share: float = option(0.2, "share of windows of --kept-batch whose first chunk is told a flow all the same")
    free_first_share: float = option(0.4, "share of clips whose flow begins after the first chunk")
    course: float = option(
        0.15, "mean squared error of a chunk's x0 up to which a rollout goes on from it; 2 pixels: 0.2"
    )
    learning_rate: float = option(2e-4, "of biases, norms and all outside of the blocks, but for the adapter")
    matrix_learning_rate: float = option(1e-3, "of the blocks' matrices")
    adapter_learning_rate: float = option(1e-2, "of the adapter")
    warmup: int = option(20, "updates of linear warm-up")
    ema_decay: float = option(0.99, "of the exported weights")
    save_every: int = option(48, "updates between checkpoints: --pool-updates or a multiple of it")

    def __post_init__(self) -> None:
        require_whole_pools(self.save_every, self.pool_updates)


# ---------------------------------------------------------------------------------------------------------------
# What the sampler meets


def kept_states(
    recipe: FollowRecipe,
    before: WanDiT,
    encoder: CaptionEncoder,
    trained: TrainedFor,
    device: torch.device,
) -> States:
    """What the network `before` is asked without flow, and what it answers; fp16."""
    captions = [caption_of(sprites.training_specs(recipe.seed, row)) for row in range(recipe.kept_clips)]
    ids = tokenize_captions(captions).to(device)
    chunks = latent_frames(recipe.length) // trained.settings.frames_per_chunk
    side = sprites.FRAME_SIZE // SPACE_FACTOR
    parts = []
    for first in range(0, len(ids), KEPT_AT_ONCE):
        rows = ids[first : first + KEPT_AT_ONCE]
        noise = DrawnNoise(
            generator_at(recipe.seed, _KEPT_DRAWS, first, device=device), (len(rows), LATENT_CHANNELS, side, side)
        )
        with torch.no_grad():
            text = encoder(rows)
        parts.append([value.half() for value in roll_out(before, text, noise, trained, chunks)])
    inputs, wanted = (torch.cat(column) for column in zip(*parts, strict=True))
    flow = torch.zeros(len(ids), 4, chunks * trained.settings.frames_per_chunk, side, side, device=device)
    return States(inputs, wanted, ids, flow.half())


def followed_states(
    recipe: FollowRecipe,
    dit: WanDiT,
    encoder: CaptionEncoder,
    trained: TrainedFor,
    data: FlowClips,
    pool: int,
) -> States:
    """What the network `dit` meets where it is told the flow of true clips; depends on (seed, pool) and its weights."""
    device = data.clips.device
    generator = generator_at(recipe.seed, _CLIP_DRAWS, pool, device=device)
    size = trained.settings.frames_per_chunk
    chunks = data.clips.shape[2] // size
    rows = torch.randint(len(data.clips), (recipe.pool,), generator=generator, device=device)
    begins_late = torch.rand(recipe.pool, generator=generator, device=device) < recipe.free_first_share
    truth = data.clips[rows, :, : chunks * size].float()
    flow = data.flow[rows, :, : chunks * size].float()
    flow[:, :, :size] *= ~begins_late[:, None, None, None, None]
    ids = data.ids[rows]
    noise = DrawnNoise(generator, (recipe.pool, *truth.shape[1:2], *truth.shape[3:]))
    dit.eval()
    with torch.no_grad():
        text = encoder(ids)
    inputs, _ = roll_out(dit, text, noise, trained, chunks, optical_flow=flow, truth=truth, course=recipe.course)
    dit.train()
    return States(inputs, truth.unflatten(2, (chunks, size)).movedim(2, 1).unsqueeze(2), ids, flow)


# ---------------------------------------------------------------------------------------------------------------
# Batches


OPENING_SIGMA = 0.75
"""Noise level of a first chunk from which on up the noise, and no clip, decides what it shows."""


def followed_windows(sampling: Sampling, states: States, recipe: FollowRecipe, generator: torch.Generator) -> Windows:
    """Windows that are to follow; of first chunks, what is decided already and told a motion."""
    drawn = sampling.draw(states, recipe.batch, generator)
    size = sampling.size
    told = drawn.optical_flow[:, 2].amax((-2, -1)) > 0  # [B, T]
    first = (drawn.chunk == 0).repeat_interleave(size, dim=1)
    counts = ~first | (told & (drawn.sigma < OPENING_SIGMA))
    return replace(drawn, weight=drawn.weight * counts)


def kept_windows(
    sampling: Sampling, states: States, recipe: FollowRecipe, generator: torch.Generator, flow: Tensor
) -> Windows:
    """Windows that are to stay, some told the flow of another clip's first chunk.

    Args:
        flow: [M, 4, T, H, W] to take that from.
    """
    drawn = sampling.draw(states, recipe.kept_batch, generator)
    device, size = drawn.noisy.device, sampling.size
    led = torch.rand(recipe.kept_batch, generator=generator, device=device) < recipe.led_share
    rows = torch.randint(len(flow), (recipe.kept_batch,), generator=generator, device=device)
    told = drawn.optical_flow.clone()
    told[:, :, :size] = flow[rows, :, :size].float() * led[:, None, None, None, None]
    weight = drawn.weight.clone()
    weight[:, size:] *= ~led[:, None]  # what would follow such a chunk is not known
    return replace(drawn, weight=weight, optical_flow=told)


# ---------------------------------------------------------------------------------------------------------------
# A run


def train_follow(
    recipe: FollowRecipe,
    start: Path,
    out: Path,
    device: torch.device,
    *,
    clips: Path | None = None,
    learned: Path | None = None,
    workers: int = 0,
    stop: int | None = None,
    seconds: float | None = None,
    saved_as: Callable[[dict[str, Tensor], int], None] | None = None,
) -> Path:
    """Trains the student of `start`, or resumes, until `stop` updates (default: all); the checkpoint's path.

    Args:
        start: folder of finished models; without flow the student is to stay what it is there.
        clips: file of encoded clips to share with other runs; default: one in `out`. Made if it is not there.
        learned: folder of a student that knows flow already, to begin with instead of an adapter of zeros.
        workers: processes that prepare clips beside this one.
        seconds: end after them, clips counted in, with the cosine; an update then depends on the machine's speed.
        saved_as: is given the averaged weights and the update at every checkpoint.

    Raises:
        ValueError: no models in `start`, a student that is sampled in another way, or a loss that is not finite.
    """
    started = time.perf_counter()
    path = out / CHECKPOINT
    file = start / STUDENT_FILE
    _, encoder, autoencoder = load_models(start)
    before, trained = load_dit(file).to(device), trained_for(file)
    source = before if learned is None else load_dit(learned / STUDENT_FILE)
    dit = train_flow.with_adapter(source).to(device)
    encoder = encoder.to(device)
    data = train_flow.encode_flow_clips(recipe, autoencoder, clips or out / CLIPS, device, workers=workers).to(device)
    sampling = Sampling(trained, data.clips.shape[2] // trained.settings.frames_per_chunk, device)
    begun_with = [file, *([] if learned is None else [learned / STUDENT_FILE])]
    training = Training(
        path,
        dit,
        train_flow.flow_optimizers(dit, recipe),
        recipe,
        ema_decay=recipe.ema_decay,
        begun_with=begun_with,
    )
    first = training.resume()
    kept = kept_states(recipe, before, encoder, trained, device)
    pace = Pace(recipe.updates, recipe.warmup, None if seconds is None else seconds - (time.perf_counter() - started))
    losses = Losses()
    followed: States | None = None
    for update in training.updates(pace, losses, first, stop, saved_as):
        if followed is None or update % recipe.pool_updates == 0:
            followed = followed_states(recipe, dit, encoder, trained, data, update // recipe.pool_updates)
        pace.set_rates(training.optimizers, update)
        generator = generator_at(recipe.seed, _BATCH_DRAWS, update, device=device)
        windows = followed_windows(sampling, followed, recipe, generator).with_(
            kept_windows(sampling, kept, recipe, generator, data.flow)
        )
        with torch.no_grad():
            text = encoder(windows.ids)
        with autocast(device):
            error = window_error(dit, text, windows, sampling.size)
        parts = error[: recipe.batch], error[recipe.batch :]
        weights = windows.weight[: recipe.batch], windows.weight[recipe.batch :]
        to_follow, to_keep = (
            part.sum() / weight.sum().clamp(min=1) for part, weight in zip(parts, weights, strict=True)
        )
        (to_follow + recipe.kept_weight * to_keep).backward()
        training.step(update)
        losses.add(followed=to_follow, kept=to_keep)
    return path


def export_follow(
    state: dict[str, Tensor],
    recipe: FollowRecipe,
    update: int,
    start: Path,
    folder: Path,
    note: str,
    strength: float = 1.0,
) -> None:
    """Writes averaged weights of a run to `folder`; the header is that of the student in `start`, and more.

    Args:
        strength: factor on the adapter, as `strength` of Diagonal Flow Conditioning at every use.
    """
    done = (
        f"distillation.train_follow, seed {recipe.seed}, {update} updates of {recipe.batch} + {recipe.kept_batch} "
        f"windows, {recipe.clips} clips, EMA {recipe.ema_decay}"
    )
    done += "" if strength == 1 else f", adapter times {strength:g}"
    state = {name: x * strength if name in FLOW_ADAPTER_KEYS else x for name, x in state.items()}
    write_changed(folder / STUDENT_FILE, state, start / STUDENT_FILE, done, note)


@stops_in_a_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the finished models to go on from")
    parser.add_argument("--learned", type=Path, help="folder of a student with an adapter to begin with")
    parser.add_argument("--out", type=Path, default=Path("runs/follow"))
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of --out there, then stop")
    parser.add_argument("--export-each", type=Path, metavar="FOLDER", help="write them there at every checkpoint too")
    parser.add_argument("--strength", type=float, default=1.0, help="factor on the adapter that --export writes")
    parser.add_argument("--note", default="", help="added to the recipe in the header of what is written")
    train_flow.add_run_flags(parser)
    add_fields(parser, FollowRecipe)
    options = parser.parse_args(arguments)
    device = begin(options)
    if options.export:
        saved = read_run(options.out / CHECKPOINT)
        recipe = FollowRecipe(**saved["recipe"])
        state, update = saved["ema"], saved["update"]
        export_follow(state, recipe, update, options.start, options.export, options.note, options.strength)
        return
    recipe = FollowRecipe(**given(options, FollowRecipe))

    def write(state: dict[str, Tensor], update: int) -> None:
        export_follow(state, recipe, update, options.start, options.export_each, options.note)

    train_follow(
        recipe,
        options.start,
        options.out,
        device,
        clips=options.clips_file,
        learned=options.learned,
        workers=options.workers,
        seconds=options.seconds,
        saved_as=None if options.export_each is None else write,
    )


if __name__ == "__main__":
    raise SystemExit(main())
