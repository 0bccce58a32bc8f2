"""The demo learns to follow optical flow: a fine-tune of finished weights with a new adapter.

    python -m distillation.train_flow --start demo --out runs/flow              # resumes; the teacher
    python -m distillation.train_flow --start demo --out runs/flow --export F   # writes it to folder F
    python -m distillation.train_flow --start demo --out runs/flow_student --network student --learned F

Clips of the sprite world whose sprites turn against their
captions (distillation.sprite_motion) are denoised with their flow; beside each such batch there is one without flow, on
which the network is to say what it said before, so that no flow stays as good as it was.

The teacher goes first, from an adapter of zeros. What it learned, the difference of its weights, is then added to the
student, which came from the same weights and follows at once; the same fine-tune, at the few noise levels of its own
schedule, mends what that cost.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diagonal_sampler.captions import CaptionEncoder, tokenize_captions
from diagonal_sampler.demo_autoencoder import DemoAutoencoder, latent_frames
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.schedule import DiagonalSchedule, shift_sigma
from diagonal_sampler.settings import GLOBAL_WINDOW
from diagonal_sampler.weight_files import write_weights
from distillation import sprite_motion, sprites, train_demo
from distillation.common import autocast, generator_at, git_commit, keep_freed_memory

log = logging.getLogger("train_flow")

CHECKPOINT, CLIPS = "flow.pt", "flow_clips.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRecipe:
    """Options of the fine-tune; `updates` decides the length of the cosine.

    A batch is of one kind. Continuation: two neighbouring chunks, the first given: what flow says of the next chunk.
    Opening: a clip's first chunk, where flow says where a sprite begins. Causal: all chunks at once.
    """

    seed: int = 4
    updates: int = 2000
    clips: int = 2048
    length: int = 45  # pixel frames of a clip
    batch: int = 24  # clips of a continuation
    kept_batch: int = 12  # clips without flow, beside it
    causal_share: float = 0.15
    opening_share: float = 0.15
    empty_caption_share: float = 0.1
    learning_rate: float = 3e-4
    matrix_learning_rate: float = 1.5e-3
    adapter_learning_rate: float = 1e-2
    kept_weight: float = 1.0
    warmup: int = 20
    ema_decay: float = 0.99
    shift: float = 5.0
    few_steps: bool = False  # noise levels of the network's own schedule only, and the error of x0
    save_every: int = 100


def student_recipe(**changes: object) -> FlowRecipe:
    """The student's fine-tune, which begins with what the teacher has learned."""
    usual = dict(
        updates=400, few_steps=True, learning_rate=1e-4, matrix_learning_rate=5e-4, adapter_learning_rate=2e-3,
        # With a weight of 1 and half the clips the student's shapes suffered (demo/README.md).
        kept_weight=4.0, kept_batch=24,
    )  # fmt: skip
    return FlowRecipe(**{**usual, **changes})


RECIPES = {"teacher": FlowRecipe, "student": student_recipe}
FILES = {"teacher": train_demo.DIT_FILE, "student": "demo_student.safetensors"}


@dataclass(frozen=True, slots=True)
class FlowClips:
    """Clips that move as their flow says, encoded once."""

    clips: Tensor  # [N, 16, T, h, w] standardised latents, fp16
    flow: Tensor  # [N, 4, T, h, w] what the adapter is given, fp16
    ids: Tensor  # int64 [N, 2, 4]


@torch.no_grad()
def encode_flow_clips(recipe: FlowRecipe, autoencoder: DemoAutoencoder, path: Path) -> FlowClips:
    """Renders and encodes the training clips, or reads them from `path` if they are there."""
    if (saved := train_demo.load_checkpoint(path)) is not None:
        return FlowClips(**saved)
    clips, flows, ids = [], [], []
    step = 16
    for start in train_demo.progress(range(0, recipe.clips, step), "encoding clips"):
        scenes = sprites.sample_scenes(min(step, recipe.clips - start), recipe.seed, start)
        commanded = sprite_motion.command(scenes, recipe.seed, start, frames=recipe.length)
        clips.append(sprite_motion.encode_clips(autoencoder, scenes, commanded.centres).half())
        flows.append(commanded.features(latent_frames(recipe.length)).half())
        ids.append(tokenize_captions(scenes.captions))
    saved = {"clips": torch.cat(clips), "flow": torch.cat(flows), "ids": torch.cat(ids)}
    train_demo.save_checkpoint(path, saved)
    return FlowClips(**saved)


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """One forward's input: noisy latents, their sigmas, the model's flow to predict, and the motion to follow."""

    noisy: Tensor  # [B, 16, T, h, w]
    sigma: Tensor  # [B, T]
    target: Tensor  # [B, 16, T, h, w] noise - x0
    weight: Tensor  # [B, T], 0 where the prediction is not used
    ids: Tensor  # int64 [B, 2, 4]
    optical_flow: Tensor  # [B, 4, T, h, w]


def flow_batch(
    recipe: FlowRecipe, data: FlowClips, trained: train_demo.TrainedFor, update: int, *, kept: bool = False
) -> FlowBatch:
    """The batch of an update; depends on (seed, update, kept) only.

    Args:
        trained: how the network is sampled.
        kept: the batch beside it, which is looked at without its flow.
    """
    generator = generator_at(recipe.seed, 5, update, int(kept))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    size = trained.settings.frames_per_chunk
    draw, batch = float(uniform(1)), recipe.kept_batch if kept else recipe.batch
    total = data.clips.shape[2] // size * size
    first, frames, given = size * int(torch.randint(total // size - 1, (1,), generator=generator)), 2 * size, 1
    if draw < recipe.causal_share:  # as many tokens as a continuation
        first, frames, given, batch = 0, total, 0, max(1, batch * 2 * size // total)
    elif draw < recipe.causal_share + recipe.opening_share * (3 if kept else 1):  # what a caption decides is kept there
        first, frames, given, batch = 0, size, 0, 2 * batch
    rows = torch.randint(len(data.clips), (batch,), generator=generator)
    window = slice(first, first + frames)
    clean, flow = data.clips[rows, :, window].float(), data.flow[rows, :, window].float()
    chunks = frames // size
    per_chunk, context = _sigmas(recipe, trained.schedule, uniform, batch, range(first // size, first // size + chunks))
    # As in sampling: the chunks before a random one are context.
    current = torch.full((batch, 1), given) if given else (uniform(batch, 1) * chunks).floor()
    per_chunk = torch.where(torch.arange(chunks) < current, context, per_chunk)
    sigma = per_chunk.repeat_interleave(size, dim=1)
    weight = (sigma >= train_demo.SMALLEST_TRAINED_SIGMA).float()
    weight[:, : given * size] = 0
    noise = torch.randn(clean.shape, generator=generator)
    spoken = uniform(batch) >= recipe.empty_caption_share * (2 if kept else 1)
    return FlowBatch(
        noisy=torch.lerp(clean, noise, sigma[:, None, :, None, None]),
        sigma=sigma,
        target=noise - clean,
        weight=weight,
        ids=data.ids[rows] * spoken[:, None, None],
        optical_flow=flow,
    )


def _sigmas(
    recipe: FlowRecipe, schedule: DiagonalSchedule, uniform: Callable[..., Tensor], batch: int, chunks: range
) -> tuple[Tensor, Tensor]:
    """Noise levels [batch, chunks] of what is predicted, and of the same chunks as context."""
    draws = uniform(batch, len(chunks))
    if not recipe.few_steps:
        context = torch.where(uniform(batch, 1) < 0.7, 0.0, 0.4 * uniform(batch, 1))
        return shift_sigma(draws, recipe.shift), context.expand(-1, len(chunks))
    rows = [torch.tensor(schedule.chunk_sigmas(chunk)) for chunk in chunks]
    per_chunk = torch.stack([row[(draw * len(row)).long()] for row, draw in zip(rows, draws.T, strict=True)], dim=1)
    last = torch.stack([row[-1] for row in rows])
    return per_chunk, (last if schedule.context_mode == "noisy" else torch.zeros_like(last)).expand(batch, -1)


def _predict(dit: WanDiT, encoder: CaptionEncoder, batch: FlowBatch, size: int, *, with_flow: bool) -> Tensor:
    return dit(
        batch.noisy,
        1000 * batch.sigma,
        encoder(batch.ids),
        frames_per_chunk=size,
        window=GLOBAL_WINDOW,
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
        ValueError: `after` has no adapter, or is of another size.
    """
    old, new = before.state_dict(), after.state_dict()
    if not after.config.flow_adapter or any(new[name].shape != value.shape for name, value in old.items()):
        raise ValueError(
            "the teacher that has learned to follow has no adapter, or another size; give --learned its folder"
        )
    for name, value in dit.state_dict().items():
        value += new[name] - old.get(name, torch.zeros_like(value))


def _optimizers(dit: WanDiT, recipe: FlowRecipe) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices, others, adapter = [], [], []
    for name, parameter in dit.named_parameters():
        if name.startswith("flow_embedding."):
            adapter.append(parameter)
        else:
            (matrices if name.startswith("blocks") and parameter.ndim == 2 else others).append(parameter)
    optimizers = train_demo.make_optimizers(
        matrices, others, matrix_rate=recipe.matrix_learning_rate, rate=recipe.learning_rate, weight_decay=0.0
    )
    own = torch.optim.AdamW(adapter, recipe.adapter_learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    return [*optimizers, (own, recipe.adapter_learning_rate)]


def train_flow(
    recipe: FlowRecipe,
    start: Path,
    out: Path,
    device: torch.device,
    *,
    network: str = "teacher",
    learned: Path | None = None,
    stop: int | None = None,
) -> Path:
    """Fine-tunes a network of `start`, or resumes, until `stop` updates (default: all); the checkpoint's path.

    Args:
        start: folder of finished models; without flow the network is to stay what it is there.
        network: teacher or student.
        learned: folder of a teacher that has learned from the teacher in `start`; what it learned is added to the
            network before the first update.

    Raises:
        ValueError: no models in `start`, or a loss that is not finite.
    """
    path = out / CHECKPOINT
    teacher, encoder, autoencoder = train_demo.load_models(start)
    before = train_demo.load_dit(start / FILES[network])
    trained = train_demo.trained_for(start / FILES[network])
    dit = with_adapter(before)
    if learned is not None:
        add_change(dit, teacher, train_demo.load_dit(learned / train_demo.DIT_FILE))
    data = encode_flow_clips(recipe, autoencoder, out / CLIPS)
    before, encoder, dit = before.to(device), encoder.to(device), dit.to(device)
    optimizers = _optimizers(dit, recipe)
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

    def save(update: int) -> None:
        states = [optimizer.state_dict() for optimizer, _ in optimizers]
        state = {"update": update, "model": dit.state_dict(), "optimizers": states, "ema": ema.state}
        train_demo.save_checkpoint(path, {**state, "recipe": asdict(recipe)})

    size = trained.settings.frames_per_chunk
    bar = train_demo.progress(range(first, last), "flow")
    running = {"flow": math.nan, "kept": math.nan}
    for update in bar:
        batch, kept = (_to(flow_batch(recipe, data, trained, update, kept=kept), device) for kept in (False, True))
        for optimizer, peak in optimizers:
            rate = train_demo.cosine_learning_rate(update, peak=peak, warmup=recipe.warmup, total=recipe.updates)
            for group in optimizer.param_groups:
                group["lr"] = rate
        with autocast(device):
            predicted = _predict(dit, encoder, batch, size, with_flow=True)
            loss = _error(predicted, batch.target, batch, of_x0=recipe.few_steps)
            loss.backward()
            with torch.no_grad():
                wanted = _predict(before, encoder, kept, size, with_flow=False)
            predicted = _predict(dit, encoder, kept, size, with_flow=False)
            other = _error(predicted, wanted, kept, of_x0=recipe.few_steps)
            (recipe.kept_weight * other).backward()
        nn.utils.clip_grad_norm_(dit.parameters(), train_demo.GRADIENT_CLIP)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(dit, update)
        for name, value in (("flow", loss.item()), ("kept", other.item())):
            if not math.isfinite(value):
                raise ValueError(f"the loss ({name}) is {value} at update {update}; lower the learning rates")
            running[name] = value if math.isnan(running[name]) else 0.96 * running[name] + 0.04 * value
        bar.set_postfix({name: f"{value:.4f}" for name, value in running.items()})
        if (update + 1) % recipe.save_every == 0:
            save(update + 1)
            log.info("update %d: %s", update + 1, ", ".join(f"{k} {v:.4f}" for k, v in running.items()))
    save(last)
    return path


def _to(batch: FlowBatch, device: torch.device) -> FlowBatch:
    return FlowBatch(*(getattr(batch, name).to(device) for name in FlowBatch.__dataclass_fields__))


def export_flow(run: Path, start: Path, folder: Path, note: str = "", *, network: str = "teacher") -> Path:
    """Writes the averaged network with its adapter to `folder`, under a temporary name first; its path.

    The header is that of the network in `start`, with what was done since behind its recipe.

    Raises:
        ValueError: no such run.
    """
    saved = train_demo.load_checkpoint(run / CHECKPOINT)
    if saved is None:
        raise ValueError(f"out={os.fspath(run)!r} holds no {CHECKPOINT}; train it first")
    recipe, file = FlowRecipe(**saved["recipe"]), folder / FILES[network]
    with safe_open(start / FILES[network], framework="pt") as before:
        header = dict(before.metadata() or {})
    done = (
        f"distillation.train_flow --network {network}, seed {recipe.seed}, {saved['update']} updates of "
        f"{recipe.batch} clips, "
        f"EMA {recipe.ema_decay}"
    )
    header["recipe"] = ". ".join(part for part in (header.get("recipe", ""), done, note) if part)
    header["git_commit"] = git_commit()
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(file, {name: value.half() for name, value in saved["ema"].items()}, header)
    log.info("%s: %.1f MB", file, file.stat().st_size / 1e6)
    return file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the finished models to go on from")
    parser.add_argument("--network", choices=tuple(RECIPES), default="teacher", help="which learns")
    parser.add_argument("--learned", type=Path, help="student: folder of the teacher that learned before it")
    parser.add_argument("--updates", type=int, help="if not the recipe's")
    parser.add_argument("--out", type=Path, default=Path("runs/flow"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of --out there, then stop")
    parser.add_argument("--note", default="", help="with --export: added to the recipe in the file's header")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.export:
        export_flow(options.out, options.start, options.export, options.note, network=options.network)
        return
    recipe = RECIPES[options.network](**({} if options.updates is None else {"updates": options.updates}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_flow(recipe, options.start, options.out, device, network=options.network, learned=options.learned)


if __name__ == "__main__":
    main()
