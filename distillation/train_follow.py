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
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diagonal_sampler.cache import KVCache
from diagonal_sampler.captions import CaptionEncoder, caption_of, tokenize_captions
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, latent_frames
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.sampler import Forward, mix, sample_chunks
from diagonal_sampler.settings import GLOBAL_WINDOW
from diagonal_sampler.weight_files import write_weights
from distillation import sprites, train_demo, train_flow
from distillation.common import autocast, generator_at, git_commit
from distillation.rollout import flow_of, predict_x0, spread_sigma
from distillation.train_flow import FlowClips, Pace

log = logging.getLogger("train_follow")

CHECKPOINT, CLIPS = "follow.pt", "flow_clips.pt"
PRECISION = torch.bfloat16
_CLIP_DRAWS, _KEPT_DRAWS, _BATCH_DRAWS = 41, 42, 43  # positions of this module's random numbers under its seed


def require_whole_pools(save_every: int, pool_updates: int) -> None:
    """Raises ValueError where a checkpoint could lie within a pool: a run resumes with a new one."""
    if save_every % pool_updates:
        raise ValueError(
            f"save_every is {save_every} and pool_updates {pool_updates}; a run resumes with a new pool, so save_every "
            "must be a multiple of pool_updates."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowRecipe:
    """Options of the training; `updates` decides the length of the cosine."""

    seed: int = 6
    updates: int = 600
    clips: int = 1024
    length: int = 81  # pixel frames of a clip
    pool: int = 48  # clips rolled out together
    pool_updates: int = 8  # updates that use them
    batch: int = 16  # windows an update that are to follow
    kept_clips: int = 256
    kept_batch: int = 16
    kept_weight: float = 3.0
    led_share: float = 0.2  # of kept windows of the first chunk, which are told a flow all the same
    free_first_share: float = 0.4  # of clips, whose flow begins after the first chunk
    course: float = 0.15  # mean squared error of a chunk's x0 up to which a rollout goes on from it; 2 pixels: 0.2
    learning_rate: float = 2e-4
    matrix_learning_rate: float = 1e-3
    adapter_learning_rate: float = 1e-2
    warmup: int = 20
    ema_decay: float = 0.99
    save_every: int = 48

    def __post_init__(self) -> None:
        require_whole_pools(self.save_every, self.pool_updates)


# ---------------------------------------------------------------------------------------------------------------
# What the sampler meets


class DrawnNoise:
    """A NoiseSource that draws in the sampler's order, on the generator's device.

    Args:
        shape: (B, C, H, W) of a latent frame.
    """

    def __init__(self, generator: torch.Generator, shape: tuple[int, int, int, int]) -> None:
        self.generator, self.shape = generator, shape

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        batch, channels, height, width = self.shape
        shape = (batch, channels, frames, height, width)
        return torch.randn(shape, generator=self.generator, device=self.generator.device)


@dataclass(frozen=True, slots=True)
class States:
    """The inputs of all forwards of N clips, and what the network is to answer.

    Attributes:
        inputs: [N, chunks, steps, C, size, H, W]; 0 where a chunk has fewer steps.
        wanted: x0, the same shape; or one for all steps, [N, chunks, 1, C, size, H, W].
        ids: int64 [N, 2, 4].
        optical_flow: [N, 4, chunks * size, H, W].
    """

    inputs: Tensor
    wanted: Tensor
    ids: Tensor
    optical_flow: Tensor


@torch.no_grad()
def roll_out(
    dit: WanDiT,
    text: Tensor,
    noise: DrawnNoise,
    trained: train_demo.TrainedFor,
    chunks: int,
    *,
    optical_flow: Tensor | None = None,
    truth: Tensor | None = None,
    course: float = 0.0,
    true_chunks: int = 1,
    given: Tensor | None = None,
    asked: Tensor | None = None,
    between: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """Samples clips as at inference without guidance; the inputs and the x0 of all forwards, as in States.

    Args:
        text: [B, tokens, text_dim].
        chunks: to make.
        optical_flow: [B, 4, chunks * size, H, W].
        truth: [B, C, chunks * size, H, W] clips; each goes on from its true first chunks whatever the network says.
        course: largest mean squared error of a later chunk's x0 that a clip goes on from, instead of the true one.
        true_chunks: how many those are.
        given: [B, C, size, H, W] a finished chunk to go on from; it counts as the first of those that come back.
        asked: inputs of another network's rollout, to be asked instead of those that this one comes to.
        between: noise levels of more forwards behind the first of every chunk that has others before it; what comes
            back as the first one's x0 is the last of theirs.
    """
    size, schedule = trained.settings.frames_per_chunk, trained.schedule
    frames = (chunks if given is None else 1 + chunks) * size
    batch, channels, height, width = noise.shape
    steps = max(schedule.steps(chunk) for chunk in range(chunks))
    inputs, found = (
        torch.zeros(batch, frames // size, steps, channels, size, height, width, device=text.device) for _ in range(2)
    )
    cache = KVCache(trained.settings, frames)

    def predict(x: Tensor, sigma: float, at: Forward) -> Tensor:
        told = flow_of(optical_flow, at)
        return predict_x0(dit, x, sigma, text, PRECISION, cache=cache.condition("positive"), optical_flow=told)

    def denoise(x: Tensor, at: Forward) -> Tensor:
        # A given chunk has two forwards, of which the last is what later chunks see.
        place = (slice(None), at.start_frame // size, max(0, at.step))
        x = x if asked is None else asked[place]
        x0 = predict(x, at.sigma, at)
        if at.start_frame and at.step == 0:
            for sigma in between:
                x0 = predict(mix(x0, noise(at.chunk, at.step, at.frames), sigma), sigma, at)
        if truth is not None:
            true = truth[:, :, at.start_frame : at.start_frame + at.frames]
            left = (x0 - true).square().mean((1, 2, 3, 4)) > (course if at.chunk >= true_chunks else -1)
            x0 = torch.where(left[:, None, None, None, None], true, x0)
        inputs[place], found[place] = x, x0
        return x0

    try:
        for _ in sample_chunks(denoise, noise, schedule, cache, frames=frames, frames_per_chunk=size, context=given):
            pass
    finally:
        cache.free()
    return inputs, found


def kept_states(
    recipe: FollowRecipe,
    before: WanDiT,
    encoder: CaptionEncoder,
    trained: train_demo.TrainedFor,
    device: torch.device,
    at_once: int = 512,
) -> States:
    """What the network `before` is asked without flow, and what it answers; fp16."""
    captions = [
        caption_of(sprites.sample_specs(train_flow.numpy_generator(recipe.seed, row)))
        for row in range(recipe.kept_clips)
    ]
    ids = tokenize_captions(captions).to(device)
    chunks = latent_frames(recipe.length) // trained.settings.frames_per_chunk
    side = sprites.FRAME_SIZE // 8
    parts = []
    for first in range(0, len(ids), at_once):
        rows = ids[first : first + at_once]
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
    trained: train_demo.TrainedFor,
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


@dataclass(frozen=True, slots=True)
class Windows:
    """One forward's input: windows of whole chunks as one causal forward sees them.

    Attributes:
        noisy: [B, C, T, H, W].
        sigma: [B, T].
        wanted: x0, the shape of noisy.
        weight: [B, T], 0 where an answer is not asked for.
        ids: int64 [B, 2, 4].
        optical_flow: [B, 4, T, H, W].
        chunk: int64 [B, T // size], where each chunk lies in its clip.
    """

    noisy: Tensor
    sigma: Tensor
    wanted: Tensor
    weight: Tensor
    ids: Tensor
    optical_flow: Tensor
    chunk: Tensor

    def with_(self, other: Windows) -> Windows:
        """Both batches as one."""
        return Windows(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in self.__dataclass_fields__))


class Sampling:
    """A schedule and a window as tensors on a device.

    Raises:
        ValueError: a schedule that leaves something else in the cache than a chunk's last input, or a window that is
            not a sink of one chunk and some more.
    """

    def __init__(self, trained: train_demo.TrainedFor, chunks: int, device: torch.device) -> None:
        schedule, settings = trained.schedule, trained.settings
        self.size = size = settings.frames_per_chunk
        if schedule.context_mode != "noisy" or settings.sink != size or settings.window % size:
            raise ValueError(
                f"the network is sampled with {schedule.context_mode} context, a window of {settings.window} and a sink"
                f" of {settings.sink}; this training is for noisy context, windows of whole chunks ({size} latent"
                " frames) and a sink of one."
            )
        self.chunks, self.window = chunks, min(chunks, settings.window // size)
        rows = [schedule.chunk_sigmas(chunk) for chunk in range(chunks)]
        self.steps = torch.tensor([len(row) for row in rows], device=device)
        longest = max(map(len, rows))
        # Where a chunk has fewer steps its last is repeated: never asked for.
        self.sigmas = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in rows], device=device)

    def draw(
        self,
        states: States,
        count: int,
        generator: torch.Generator,
        *,
        often: int = 0,
        often_share: float = 0.0,
        since: int = 0,
    ) -> Windows:
        """Windows that end with a random chunk at a random step, or go on behind its last one.

        A chunk beyond the window sees the first chunk and those before it: what a rolling cache with a sink holds.

        Args:
            often: a chunk that `often_share` of the windows end with, beside those that chance gives it.
            since: the first chunk of which answers are asked for.
        """
        device = states.inputs.device
        rows = torch.randint(len(states.inputs), (count,), generator=generator, device=device)
        chunk = torch.randint(since, self.chunks, (count,), generator=generator, device=device)
        if often_share:
            chosen = torch.rand(count, generator=generator, device=device) < often_share
            chunk = torch.where(chosen, often, chunk)
        step = (torch.rand(count, generator=generator, device=device) * self.steps[chunk]).long()
        at = torch.arange(self.window, device=device)
        late = (chunk >= self.window)[:, None]
        listed = torch.where(late & (at > 0), chunk[:, None] - (self.window - 1) + at, at)
        place = chunk.clamp(max=self.window - 1)[:, None]
        steps = torch.where(at == place, step[:, None], self.steps[listed] - 1)
        finished = (step == self.steps[chunk] - 1)[:, None]
        # Of a window that lies late only the last chunk sees what it saw then.
        asked = ((at == place) | (~late & ((at < place) | finished))) & (listed >= since)
        rows_, sigma = rows[:, None], self.sigmas[listed, steps]
        wanted = states.wanted[rows_, listed, steps if states.wanted.shape[2] > 1 else torch.zeros_like(steps)]
        flow = states.optical_flow.unflatten(2, (self.chunks, self.size))
        flow = flow[rows_, :, listed].float()  # [B, window, 4, size, H, W]
        return Windows(
            noisy=_joined(states.inputs[rows_, listed, steps].float()),
            sigma=sigma.repeat_interleave(self.size, dim=1),
            wanted=_joined(wanted.float()),
            weight=(asked * torch.where(at == place, 1.0, CONTEXT_WEIGHT)).repeat_interleave(self.size, dim=1),
            ids=states.ids[rows],
            optical_flow=_joined(flow),
            chunk=listed,
        )


def _joined(chunks: Tensor) -> Tensor:
    """[B, chunks, C, size, H, W] -> [B, C, chunks * size, H, W]."""
    return chunks.transpose(1, 2).flatten(2, 3)


CONTEXT_WEIGHT = 0.3
"""Of a chunk that is there as context, at its last step: a window has several, and places are decided before."""
OPENING_SIGMA = 0.75
"""Noise level of a first chunk from which on up the noise, and no clip, decides what it shows."""


def followed_windows(sampling: Sampling, states: States, recipe: FollowRecipe, generator: torch.Generator) -> Windows:
    """Windows that are to follow; of first chunks, what is decided already and told a motion."""
    drawn = sampling.draw(states, recipe.batch, generator)
    size = sampling.size
    told = drawn.optical_flow[:, 2].amax((-2, -1)) > 0  # [B, T]
    first = (drawn.chunk == 0).repeat_interleave(size, dim=1)
    counts = ~first | (told & (drawn.sigma < OPENING_SIGMA))
    return _replaced(drawn, weight=drawn.weight * counts)


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
    return _replaced(drawn, weight=weight, optical_flow=told)


def _replaced(windows: Windows, **changes: Tensor) -> Windows:
    return Windows(*(changes.get(name, getattr(windows, name)) for name in windows.__dataclass_fields__))


def window_error(dit: WanDiT, text: Tensor, windows: Windows, size: int, *, mean_weight: float = 0.0) -> Tensor:
    """Weighted squared error of x0, [B, T].

    Args:
        text: [B, tokens, text_dim].
        size: latent frames a chunk.
        mean_weight: of the squared error of a frame's mean in every channel, beside the mean squared error.
    """
    flow = dit(
        windows.noisy,
        1000 * windows.sigma,
        text,
        frames_per_chunk=size,
        window=GLOBAL_WINDOW,
        optical_flow=windows.optical_flow if dit.config.flow_adapter else None,
    ).float()
    x0 = windows.noisy - spread_sigma(windows.sigma) * flow
    error = x0 - windows.wanted
    squared = error.square().mean((1, 3, 4))
    if mean_weight:
        squared = squared + mean_weight * error.mean((3, 4)).square().mean(1)
    return squared * windows.weight


# ---------------------------------------------------------------------------------------------------------------
# A run


def train_follow(
    recipe: FollowRecipe,
    start: Path,
    out: Path,
    device: torch.device,
    *,
    network: str = "student",
    clips: Path | None = None,
    learned: Path | None = None,
    workers: int = 0,
    stop: int | None = None,
    seconds: float | None = None,
    saved_as: Callable[[dict[str, Tensor], int], None] | None = None,
) -> Path:
    """Trains a network of `start`, or resumes, until `stop` updates (default: all); the checkpoint's path.

    Args:
        start: folder of finished models; without flow the network is to stay what it is there.
        network: whose file it is; it must be sampled without guidance.
        clips: file of encoded clips to share with other runs; default: one in `out`. Made if it is not there.
        learned: folder of a network that knows flow already, to begin with instead of an adapter of zeros.
        workers: processes that prepare clips beside this one.
        seconds: end after them, clips counted in, with the cosine; an update then depends on the machine's speed.
        saved_as: is given the averaged weights and the update at every checkpoint.

    Raises:
        ValueError: no models in `start`, a network that is sampled in another way, or a loss that is not finite.
    """
    started = time.perf_counter()
    path = out / CHECKPOINT
    file = start / train_flow.FILES[network]
    _, encoder, autoencoder = train_demo.load_models(start)
    before, trained = train_demo.load_dit(file).to(device), train_demo.trained_for(file)
    source = before if learned is None else train_demo.load_dit(learned / train_flow.FILES[network])
    dit = train_flow.with_adapter(source).to(device)
    encoder = encoder.to(device)
    data = train_flow.encode_flow_clips(recipe, autoencoder, clips or out / CLIPS, device, workers=workers).to(device)
    sampling = Sampling(trained, data.clips.shape[2] // trained.settings.frames_per_chunk, device)
    optimizers = train_flow.flow_optimizers(dit, recipe)
    ema = train_demo.Ema(dit, recipe.ema_decay)
    first = 0
    if (saved := train_demo.load_checkpoint(path)) is not None:
        first = saved["update"]
        dit.load_state_dict(saved["model"])
        for (optimizer, _), state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.state = {name: value.to(device) for name, value in saved["ema"].items()}
        log.info("resumed %s at update %d", path, first)
    last = min(recipe.updates, recipe.updates if stop is None else stop)
    kept = kept_states(recipe, before, encoder, trained, device)

    def save(update: int) -> None:
        states = [optimizer.state_dict() for optimizer, _ in optimizers]
        state = {"update": update, "model": dit.state_dict(), "optimizers": states, "ema": ema.state}
        train_demo.save_checkpoint(path, {**state, "recipe": asdict(recipe)})
        if saved_as is not None:
            saved_as(ema.state, update)

    pace = Pace(recipe.updates, recipe.warmup, None if seconds is None else seconds - (time.perf_counter() - started))
    losses = train_flow.Losses("followed", "kept")
    followed: States | None = None
    update = first
    for update in range(first, last):
        done = pace.done(update)
        if done >= 1:
            break
        if followed is None or update % recipe.pool_updates == 0:
            followed = followed_states(recipe, dit, encoder, trained, data, update // recipe.pool_updates)
        pace.set_rates(optimizers, update, done)
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
        nn.utils.clip_grad_norm_(dit.parameters(), train_demo.GRADIENT_CLIP)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(dit, update)
        losses.add(followed=to_follow, kept=to_keep)
        if (update + 1) % recipe.save_every == 0:
            text_of = losses.read(update)
            save(update + 1)
            log.info("update %d, %.0f s: %s", update + 1, time.perf_counter() - started, text_of)
    else:
        update = last
    losses.read(update)
    save(update)
    return path


def export_follow(
    state: dict[str, Tensor], recipe: FollowRecipe, update: int, start: Path, target: Path, *, network: str, note: str
) -> None:
    """Writes averaged weights under a temporary name first; the header is that of the network in `start`, and more."""
    with safe_open(start / train_flow.FILES[network], framework="pt") as before:
        header = dict(before.metadata() or {})
    done = (
        f"distillation.train_follow, seed {recipe.seed}, {update} updates of {recipe.batch} + {recipe.kept_batch} "
        f"windows, {recipe.clips} clips, EMA {recipe.ema_decay}"
    )
    header["recipe"] = ". ".join(part for part in (header.get("recipe", ""), done, note) if part)
    header["git_commit"] = git_commit()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, {name: value.half().cpu() for name, value in state.items()}, header)
    log.info("%s: %.1f MB", target, target.stat().st_size / 1e6)


OWN_FIELDS = {
    "pool": int, "pool_updates": int, "kept_clips": int, "led_share": float, "free_first_share": float,
    "course": float,
}  # fmt: skip
"""Fields of the recipe that are flags here and not in train_flow."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the finished models to go on from")
    parser.add_argument("--network", choices=("student",), default="student", help="which learns")
    parser.add_argument("--learned", type=Path, help="folder of a student with an adapter to begin with")
    parser.add_argument("--out", type=Path, default=Path("runs/follow"))
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of --out there, then stop")
    parser.add_argument("--export-each", type=Path, metavar="FOLDER", help="write them there at every checkpoint too")
    parser.add_argument("--note", default="", help="added to the recipe in the header of what is written")
    train_flow.add_run_flags(parser)
    group = parser.add_argument_group("more fields of the recipe")
    for name, kind in OWN_FIELDS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="VALUE")
    options = parser.parse_args(arguments)
    device = train_flow.begin(options)
    if options.export:
        saved = train_demo.load_checkpoint(options.out / CHECKPOINT)
        if saved is None:
            raise ValueError(f"out={os.fspath(options.out)!r} holds no {CHECKPOINT}; train it first")
        target = options.export / train_flow.FILES[options.network]
        recipe = FollowRecipe(**saved["recipe"])
        export_follow(
            saved["ema"], recipe, saved["update"], options.start, target, network=options.network, note=options.note
        )
        return
    recipe = FollowRecipe(**train_flow.given(options, (*train_flow.RUN_FIELDS, *OWN_FIELDS)))

    def write(state: dict[str, Tensor], update: int) -> None:
        target = options.export_each / train_flow.FILES[options.network]
        export_follow(state, recipe, update, options.start, target, network=options.network, note=options.note)

    train_follow(
        recipe,
        options.start,
        options.out,
        device,
        network=options.network,
        clips=options.clips_file,
        learned=options.learned,
        workers=options.workers,
        seconds=options.seconds,
        saved_as=None if options.export_each is None else write,
    )


if __name__ == "__main__":
    main()
