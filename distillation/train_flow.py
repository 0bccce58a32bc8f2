"""The demo learns to follow optical flow: a fine-tune of finished weights with a new adapter.

    python -m distillation.train_flow --start demo --out runs/flow              # resumes; the teacher
    python -m distillation.train_flow --start demo --out runs/flow --export F   # writes it to folder F
    python -m distillation.train_flow --start demo --out runs/flow_student --network student \\
        --learned BEFORE/demo_teacher.safetensors F/demo_teacher.safetensors

Clips of the sprite world whose sprites turn against their
captions (distillation.sprite_motion) are denoised with their flow; beside each such batch there is one without flow, on
which the network is to say what it said before, so that no flow stays as good as it was.

The teacher goes first; one without an adapter begins with one of zeros (BEFORE has such a teacher; that of demo/ has
learned it, see its README.md). What it learned, the difference of its weights, is then added to the student, which came
from the same weights and follows at once; the same fine-tune, at the few noise levels of its own schedule, mends what
that cost. It also goes the other way: what a student learned (distillation.train_follow) is a start for the teacher.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, tokenize_captions
from diagonal_sampler.demo_autoencoder import SPACE_FACTOR, DemoAutoencoder
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.frames import latent_frames
from diagonal_sampler.schedule import DiagonalSchedule, shift_sigma
from diagonal_sampler.settings import GLOBAL_WINDOW
from distillation import sprite_motion, sprites
from distillation.common import autocast, generator_at, stops_in_a_line
from distillation.demo_files import (
    NETWORK_FILES,
    TrainedFor,
    load_dit,
    load_models,
    trained_for,
    write_changed,
)
from distillation.demo_run import (
    Losses,
    Optimizers,
    Pace,
    Training,
    add_fields,
    begin,
    given,
    load_checkpoint,
    make_adamw,
    make_optimizers,
    progress,
    read_run,
    save_checkpoint,
)
from distillation.recipes import option
from distillation.train_demo import (
    SMALLEST_TRAINED_SIGMA,
    DitRecipe,
    LatentSet,
    dit_batch,
    encode_latent_set,
    enlarged,
)

CHECKPOINT, CLIPS, KEPT_CLIPS = "flow.pt", "flow_clips.pt", "kept_clips.pt"
READ_EVERY = 20
"""Updates after which losses are looked at: reading them waits for a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRecipe:
    """Options of the fine-tune; `updates` decides the length of the cosine.

    A batch is of one kind. Continuation: two neighbouring chunks, the first given: what flow says of the next chunk.
    Opening: a clip's first chunk, where flow says where a sprite begins. Causal: all chunks at once.
    """

    seed: int = option(4, "seed of everything")
    updates: int = option(2000, "of the whole run: the length of the cosine")
    clips: int = option(2048, "training clips that turn against their captions")
    length: int = option(45, "pixel frames of a clip")
    batch: int = option(24, "clips of a continuation; a GPU takes hundreds")
    kept_batch: int = option(12, "clips without flow, beside them")
    kept_clips: int = option(0, "clips that go as their captions say, for the batches without flow; 0: those that turn")
    causal_share: float = option(0.15, "share of batches of whole clips")
    opening_share: float = option(0.15, "share of batches of clips' first chunks")
    empty_caption_share: float = option(0.1, "share of clips whose caption is left out")
    learning_rate: float = option(3e-4, "of biases, norms and all outside of the blocks, but for the adapter")
    matrix_learning_rate: float = option(1.5e-3, "of the blocks' matrices")
    adapter_learning_rate: float = option(1e-2, "of the adapter")
    kept_weight: float = option(1.0, "of the loss without flow")
    warmup: int = option(20, "updates of linear warm-up")
    ema_decay: float = option(0.99, "of the exported weights")
    shift: float = option(5.0, "of the noise levels that the teacher learns at")
    few_steps: bool = option(False, "noise levels of the network's own schedule only, and the error of x0")
    save_every: int = option(100, "updates between checkpoints")

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ValueError(f"save_every is {self.save_every}; a checkpoint comes every so many updates, 1 or more.")
        if self.kept_clips and self.few_steps:
            raise ValueError("kept_clips are for the teacher: their batches have its noise levels, not a student's.")


def student_recipe(**changes: object) -> FlowRecipe:
    """The student's fine-tune, which begins with what the teacher has learned."""
    usual = dict(
        updates=400, few_steps=True, learning_rate=1e-4, matrix_learning_rate=5e-4, adapter_learning_rate=2e-3,
        # With a weight of 1 and half the clips the student's shapes suffered (demo/README.md).
        kept_weight=4.0, kept_batch=24,
    )  # fmt: skip
    return FlowRecipe(**{**usual, **changes})


RECIPES = {"teacher": FlowRecipe, "student": student_recipe}


@dataclass(frozen=True, slots=True)
class FlowClips:
    """Clips that move as their flow says, encoded once."""

    clips: Tensor  # [N, 16, T, h, w] standardised latents, fp16
    flow: Tensor  # [N, 4, T, h, w] what the adapter is given, fp16
    ids: Tensor  # int64 [N, 2, 4]

    def to(self, device: torch.device) -> FlowClips:
        """The same on a device."""
        return FlowClips(*(getattr(self, item.name).to(device) for item in fields(self)))


class ClipsRecipe(Protocol):
    """What decides the training clips."""

    @property
    def seed(self) -> int: ...
    @property
    def clips(self) -> int: ...
    @property
    def length(self) -> int: ...


CLIPS_AT_ONCE = {"cpu": 16, "cuda": 256}
"""Clips that are drawn and encoded together."""


@torch.no_grad()
def encode_flow_clips(
    recipe: ClipsRecipe,
    autoencoder: DemoAutoencoder,
    path: Path,
    device: torch.device | None = None,
    *,
    workers: int = 0,
) -> FlowClips:
    """Renders and encodes the training clips, or reads them from `path` if they are there.

    Args:
        device: that draws and encodes; default: the CPU. The clips are the same but for rounding.
        workers: processes that think out scenes and paths beside this one, which is most of the work on a GPU.

    Returns:
        clips on the CPU.
    """
    if (saved := load_checkpoint(path)) is not None:
        return FlowClips(**saved)
    device = torch.device("cpu") if device is None else device
    autoencoder = autoencoder.to(device)
    frames, side = latent_frames(recipe.length), sprites.FRAME_SIZE // SPACE_FACTOR
    clips, flows, ids = [], [], []
    step = CLIPS_AT_ONCE[device.type]
    parts = [(recipe.seed, at, min(step, recipe.clips - at), recipe.length) for at in range(0, recipe.clips, step)]
    for specs, *numbers in progress(_thought_out(parts, workers), "encoding clips", total=len(parts)):
        of_scenes = len(fields(sprites.Scenes)) - 1
        tensors = [torch.from_numpy(value).to(device) for value in numbers]
        scenes = sprites.Scenes(specs, *tensors[:of_scenes])
        told = sprite_motion.Commands(*tensors[of_scenes:])
        clips.append(sprite_motion.encode_clips(autoencoder, scenes, told.centres).half().cpu())
        flows.append(sprite_motion.features(told, scenes, frames, side, side).half().cpu())
        ids.append(tokenize_captions(scenes.captions))
    saved = {"clips": torch.cat(clips), "flow": torch.cat(flows), "ids": torch.cat(ids)}
    save_checkpoint(path, saved)
    return FlowClips(**saved)


def _thought_out(parts: Sequence[tuple[int, int, int, int]], workers: int) -> Iterator[tuple]:
    """`_think_out` of all parts, in order."""
    if workers < 1:
        yield from map(_think_out, parts)
        return
    # A fresh interpreter each: a fork of a process that has used a GPU or threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_think_out, parts)


def _think_out(part: tuple[int, int, int, int]) -> tuple:
    """Scenes and commands of some clips: the sprites, then all numbers as arrays, which travel between processes."""
    seed, first, count, length = part
    scenes = sprites.sample_scenes(count, seed, first)
    told = sprite_motion.commands(scenes, seed, first, frames=length)
    tensors = [getattr(scenes, item.name) for item in fields(scenes)[1:]]
    tensors += [getattr(told, item.name) for item in fields(told)]
    return scenes.specs, *(tensor.numpy() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """One forward's input: noisy latents, their sigmas, the model's flow to predict, and the motion to follow."""

    noisy: Tensor  # [B, 16, T, h, w]
    sigma: Tensor  # [B, T]
    target: Tensor  # [B, 16, T, h, w] noise - x0
    weight: Tensor  # [B, T], 0 where the prediction is not used
    ids: Tensor  # int64 [B, 2, 4]
    optical_flow: Tensor | None  # [B, 4, T, h, w]
    frames_per_chunk: int
    window: int = GLOBAL_WINDOW
    sink: int = 0


def flow_batch(
    recipe: FlowRecipe, data: FlowClips, trained: TrainedFor, update: int, *, kept: bool = False
) -> FlowBatch:
    """The batch of an update, where the clips are; depends on (seed, update, kept) and the kind of device only.

    Args:
        trained: how the network is sampled.
        kept: the batch beside it, which is looked at without its flow.
    """
    position, device = (recipe.seed, 5, update, int(kept)), data.clips.device
    # What decides shapes is drawn on the CPU, or a GPU would be waited for.
    deciding = generator_at(*position)
    generator = deciding if device.type == "cpu" else generator_at(*position, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    size = trained.settings.frames_per_chunk
    draw, batch = float(torch.rand(1, generator=deciding)), recipe.kept_batch if kept else recipe.batch
    total = data.clips.shape[2] // size * size
    first, frames, given = size * int(torch.randint(total // size - 1, (1,), generator=deciding)), 2 * size, 1
    if draw < recipe.causal_share:  # as many tokens as a continuation
        first, frames, given, batch = 0, total, 0, max(1, batch * 2 * size // total)
    elif draw < recipe.causal_share + recipe.opening_share * (3 if kept else 1):  # what a caption decides is kept there
        first, frames, given, batch = 0, size, 0, 2 * batch
    rows = torch.randint(len(data.clips), (batch,), generator=generator, device=device)
    window = slice(first, first + frames)
    clean, flow = data.clips[rows, :, window].float(), data.flow[rows, :, window].float()
    chunks = frames // size
    per_chunk, context = _sigmas(recipe, trained.schedule, uniform, batch, range(first // size, first // size + chunks))
    # As in sampling: the chunks before a random one are context.
    current = torch.full((batch, 1), given, device=device) if given else (uniform(batch, 1) * chunks).floor()
    per_chunk = torch.where(torch.arange(chunks, device=device) < current, context, per_chunk)
    sigma = per_chunk.repeat_interleave(size, dim=1)
    weight = (sigma >= SMALLEST_TRAINED_SIGMA).float()
    weight[:, : given * size] = 0
    noise = torch.randn(clean.shape, generator=generator, device=device)
    spoken = uniform(batch) >= recipe.empty_caption_share * (2 if kept else 1)
    return FlowBatch(
        noisy=torch.lerp(clean, noise, sigma[:, None, :, None, None]),
        sigma=sigma,
        target=noise - clean,
        weight=weight,
        ids=data.ids[rows] * spoken[:, None, None],
        optical_flow=flow,
        frames_per_chunk=size,
    )


def kept_recipe(recipe: FlowRecipe) -> DitRecipe:
    """The teacher's own training, with batches of about `kept_batch` continuations."""
    usual = DitRecipe()
    own = replace(
        usual, seed=recipe.seed, clips=recipe.kept_clips, later_clips=min(usual.later_clips, recipe.kept_clips)
    )
    return enlarged(own, recipe.kept_batch / usual.continuation_batch)


def own_batch(recipe: DitRecipe, data: LatentSet, update: int) -> FlowBatch:
    """A batch as the teacher was trained on, ghosts and all (train_demo), without flow."""
    batch = dit_batch(recipe, data, update)
    names = ("noisy", "sigma", "weight", "ids", "frames_per_chunk", "window", "sink")
    return FlowBatch(target=batch.flow, optical_flow=None, **{name: getattr(batch, name) for name in names})


def _sigmas(
    recipe: FlowRecipe, schedule: DiagonalSchedule, uniform: Callable[..., Tensor], batch: int, chunks: range
) -> tuple[Tensor, Tensor]:
    """Noise levels [batch, chunks] of what is predicted, and of the same chunks as context."""
    draws = uniform(batch, len(chunks))
    if not recipe.few_steps:
        context = torch.where(uniform(batch, 1) < 0.7, 0.0, 0.4 * uniform(batch, 1))
        return shift_sigma(draws, recipe.shift), context.expand(-1, len(chunks))
    rows = [torch.tensor(schedule.chunk_sigmas(chunk), device=draws.device) for chunk in chunks]
    per_chunk = torch.stack([row[(draw * len(row)).long()] for row, draw in zip(rows, draws.T, strict=True)], dim=1)
    last = torch.stack([row[-1] for row in rows])
    return per_chunk, (last if schedule.context_mode == "noisy" else torch.zeros_like(last)).expand(batch, -1)


def _predict(dit: WanDiT, encoder: CaptionEncoder, batch: FlowBatch, *, with_flow: bool) -> Tensor:
    return dit(
        batch.noisy,
        1000 * batch.sigma,
        encoder(batch.ids),
        frames_per_chunk=batch.frames_per_chunk,
        window=batch.window,
        sink=batch.sink,
        optical_flow=batch.optical_flow if with_flow else None,
    ).float()


def _error(predicted: Tensor, target: Tensor, batch: FlowBatch, *, of_x0: bool) -> Tensor:
    """Mean squared error over the latent frames that count, of the flow or of x0, which is that of the flow * sigma."""
    error = (predicted - target).square().mean((1, 3, 4))
    error = error * batch.sigma**2 if of_x0 else error
    return (error * batch.weight).sum() / batch.weight.sum().clamp(min=1)


def with_adapter(dit: WanDiT) -> WanDiT:
    """A trainable copy with an adapter, of zeros if it has none."""
    copied = WanDiT(replace(dit.config, flow_adapter=True))
    copied.load_state_dict(dit.state_dict(), strict=dit.config.flow_adapter)
    return copied.train()


@torch.no_grad()
def add_change(dit: WanDiT, before: WanDiT, after: WanDiT) -> None:
    """Adds to `dit`, in place, what `after` has learned since `before`; the adapter of zeros takes `after`'s.

    Raises:
        ValueError: `after` has no adapter, or is of another size; `before` has one, and `dit` only one of zeros.
    """
    old, new = before.state_dict(), after.state_dict()
    if not after.config.flow_adapter or any(new[name].shape != value.shape for name, value in old.items()):
        raise ValueError(
            "the network that has learned to follow has no adapter, or another size than before it learned; give "
            "--learned both files, BEFORE first"
        )
    if before.config.flow_adapter and not any(parameter.any() for parameter in dit.flow_embedding.parameters()):
        raise ValueError(
            "the network has no adapter yet, and the one that --learned names first has one: their difference is none. "
            "Give as BEFORE its weights of before it had an adapter"
        )
    for name, value in dit.state_dict().items():
        value += new[name] - old.get(name, torch.zeros_like(value))


class RatesRecipe(Protocol):
    """The learning rates of a fine-tune: of the blocks' matrices, of the adapter, and of everything else."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def matrix_learning_rate(self) -> float: ...
    @property
    def adapter_learning_rate(self) -> float: ...


def flow_optimizers(dit: WanDiT, recipe: RatesRecipe) -> Optimizers:
    """Orthogonalised updates for the blocks' matrices, AdamW for the rest, with a rate of its own for the adapter."""
    matrices, others, adapter = [], [], []
    for name, parameter in dit.named_parameters():
        if name.startswith("flow_embedding."):
            adapter.append(parameter)
        else:
            (matrices if name.startswith("blocks") and parameter.ndim == 2 else others).append(parameter)
    optimizers = make_optimizers(
        matrices, others, matrix_rate=recipe.matrix_learning_rate, rate=recipe.learning_rate, weight_decay=0.0
    )
    own = make_adamw(adapter, recipe.adapter_learning_rate, weight_decay=0.0)
    return [*optimizers, (own, recipe.adapter_learning_rate)]


def train_flow(
    recipe: FlowRecipe,
    start: Path,
    out: Path,
    device: torch.device,
    *,
    network: str = "teacher",
    learned: tuple[Path, Path] | None = None,
    clips: Path | None = None,
    workers: int = 0,
    stop: int | None = None,
    seconds: float | None = None,
) -> Path:
    """Fine-tunes a network of `start`, or resumes, until `stop` updates (default: all); the checkpoint's path.

    Args:
        start: folder of finished models; without flow the network is to stay what it is there.
        network: teacher or student.
        learned: files of a network before and after it learned to follow; what it learned, the difference, is added
            to this one before the first update.
        clips: file of encoded clips to share with other runs; default: one in `out`. Made if it is not there.
        workers: processes that prepare clips beside this one.
        seconds: end after them, clips counted in, with the cosine; an update then depends on the machine's speed.

    Raises:
        ValueError: no models in `start`, or a loss that is not finite.
    """
    entered = time.perf_counter()
    path = out / CHECKPOINT
    file = start / NETWORK_FILES[network]
    before, encoder, autoencoder = load_models(start, file)
    trained = trained_for(file)
    dit = with_adapter(before)
    if learned is not None:
        add_change(dit, *map(load_dit, learned))
    data = encode_flow_clips(recipe, autoencoder, clips or out / CLIPS, device, workers=workers).to(device)
    own, own_data = kept_recipe(recipe), None
    if recipe.kept_clips:
        own_data = encode_latent_set(own, autoencoder, out / KEPT_CLIPS, device)
    before, encoder, dit = before.to(device), encoder.to(device), dit.to(device)
    optimizers = flow_optimizers(dit, recipe)
    training = Training(path, dit, optimizers, recipe, ema_decay=recipe.ema_decay, begun_with=[file, *(learned or ())])
    first = training.resume()
    losses = Losses()
    pace = Pace(recipe.updates, recipe.warmup, None if seconds is None else seconds - (time.perf_counter() - entered))
    bar = progress(training.updates(pace, losses, first, stop), "flow", total=recipe.updates - first)
    for update in bar:
        batch = flow_batch(recipe, data, trained, update)
        if own_data is None:
            kept = flow_batch(recipe, data, trained, update, kept=True)
        else:
            kept = own_batch(own, own_data, update)
        pace.set_rates(training.optimizers, update)
        with autocast(device):
            predicted = _predict(dit, encoder, batch, with_flow=True)
            loss = _error(predicted, batch.target, batch, of_x0=recipe.few_steps)
            loss.backward()
            with torch.no_grad():
                wanted = _predict(before, encoder, kept, with_flow=False)
            predicted = _predict(dit, encoder, kept, with_flow=False)
            other = _error(predicted, wanted, kept, of_x0=recipe.few_steps)
            (recipe.kept_weight * other).backward()
        training.step(update)
        losses.add(flow=loss, kept=other)
        if (update + 1) % READ_EVERY == 0:
            bar.set_postfix_str(losses.read(update))
    return path


def export_flow(run: Path, start: Path, folder: Path, note: str = "", *, network: str = "teacher") -> Path:
    """Writes the averaged network with its adapter to `folder`, under a temporary name first; its path.

    The header is that of the network in `start`, with what was done since behind its recipe.

    Raises:
        ValueError: no such run.
    """
    saved = read_run(run / CHECKPOINT)
    recipe, file = FlowRecipe(**saved["recipe"]), NETWORK_FILES[network]
    done = (
        f"distillation.train_flow --network {network}, seed {recipe.seed}, {saved['update']} updates of "
        f"{recipe.batch} clips, "
        f"EMA {recipe.ema_decay}"
    )
    return write_changed(folder / file, saved["ema"], start / file, done, note)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that this program and train_follow share."""
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare clips; 16 for a GPU's machine")
    parser.add_argument("--clips-file", type=Path, metavar="FILE", help="encoded clips, to share them; made if missing")
    parser.add_argument(
        "--seconds", type=float, help="end after them, with the cosine: give many --updates; not to be resumed"
    )


@stops_in_a_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the finished models to go on from")
    parser.add_argument("--network", choices=tuple(RECIPES), default="teacher", help="which learns")
    parser.add_argument(
        "--learned",
        type=Path,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="files of a network before and after it learned to follow: begin with that difference added",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/flow"))
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of --out there, then stop")
    parser.add_argument("--note", default="", help="with --export: added to the recipe in the file's header")
    add_run_flags(parser)
    add_fields(parser, FlowRecipe, but=("few_steps",))
    options = parser.parse_args(arguments)
    device = begin(options)
    if options.export:
        export_flow(options.out, options.start, options.export, options.note, network=options.network)
        return
    recipe = RECIPES[options.network](**given(options, FlowRecipe))
    train_flow(
        recipe,
        options.start,
        options.out,
        device,
        network=options.network,
        learned=None if options.learned is None else tuple(options.learned),
        clips=options.clips_file,
        workers=options.workers,
        seconds=options.seconds,
    )


if __name__ == "__main__":
    raise SystemExit(main())
