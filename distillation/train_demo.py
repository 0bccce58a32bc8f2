"""Trains the demo model from nothing: autoencoder, then caption encoder and DiT together.

    python -m distillation.train_demo --stage all --out runs/demo     # resumes if runs/demo has a checkpoint
    python -m distillation.train_demo --export demo --out runs/demo   # writes the shipped weights

Every random number of update i comes from (seed, i), so a run that was stopped and resumed is the run that was
not. Checkpoints are written to a temporary name and renamed. On a GPU everything lives there: clips are drawn and
encoded on it, and batches put together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diagonal_sampler.captions import (
    CaptionEncoder,
    CaptionEncoderConfig,
    load_caption_encoder,
    save_caption_encoder,
    tokenize_captions,
)
from diagonal_sampler.demo_autoencoder import (
    COMPONENTS,
    DemoAutoencoder,
    DemoAutoencoderConfig,
    load_demo_autoencoder,
    save_demo_autoencoder,
)
from diagonal_sampler.dit import HEAD_DIM, WanConfig, WanDiT
from diagonal_sampler.provenance import Provenance, causal_settings
from diagonal_sampler.rope import axis_dims
from diagonal_sampler.schedule import DEFAULT_SHIFT, DiagonalSchedule, shift_sigma
from diagonal_sampler.settings import GLOBAL_WINDOW, CausalSettings
from diagonal_sampler.weight_files import write_weights
from distillation import sprites
from distillation.common import autocast, fast_bf16, generator_at, git_commit, keep_freed_memory

log = logging.getLogger("train_demo")

EMA_DECAY = 0.998
GRADIENT_CLIP = 1.0
# How the shipped model is best sampled, by distillation.score.
SHIPPED_STEPS = 12
SHIPPED_CFG = 5.0
NOISE_KEY, KEPT_NOISE = "noise", "kept"  # header entry of a model that is sampled by Euler's method


# ---------------------------------------------------------------------------------------------------------------
# What both stages share


def cosine_learning_rate(update: int, *, peak: float, warmup: int, total: int, floor: float = 0.02) -> float:
    """Linear warm-up to `peak`, then a cosine down to `floor * peak` at update `total`."""
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Pace:
    """How long a training is: so many updates or, with `seconds`, as many as fit from now on."""

    def __init__(self, first: int, updates: int, seconds: float) -> None:
        self.first, self.updates, self.seconds = first, updates, seconds
        self.started = time.perf_counter()

    def total(self, update: int) -> int:
        """Updates that the whole training will have, as far as it is known before `update`."""
        if not self.seconds:
            return self.updates
        elapsed = time.perf_counter() - self.started
        return self.first + math.ceil((update - self.first + 1) * self.seconds / elapsed)

    def updates_until(self, last: int) -> Iterator[int]:
        """The updates that are left until `last`, or until the time is up."""
        for update in itertools.count(self.first) if self.seconds else range(self.first, last):
            if self.seconds and time.perf_counter() - self.started > self.seconds:
                return
            yield update


class Ema:
    """Exponential moving average of a module's state, warmed up so that early averages are not the initial noise."""

    def __init__(self, module: nn.Module, decay: float = EMA_DECAY) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, update: int) -> None:
        decay = min(self.decay, (1 + update) / (10 + update))
        averages, values = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def progress(updates: Iterator[Any] | range, description: str, total: int | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(updates, desc=description, total=total, mininterval=5, smoothing=0.05, dynamic_ncols=True)


class Orthogonal(torch.optim.Optimizer):
    """Momentum descent along the orthogonalised update ("Muon"), for weight matrices and flattened convolutions.

    The update is U V^T of the momentum's singular value decomposition U S V^T, found by a quintic Newton-Schulz
    iteration, and scaled by 0.2 * sqrt(max(rows, columns)) so that its root mean square equals a typical AdamW
    update's. Matrices of one shape are treated in one batched product. (Jordan et al. 2024; scale: Moonlight 2025.)
    """

    ITERATION = (3.4445, -4.7750, 2.0315)
    STEPS = 5

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonalise(cls, matrices: Tensor) -> Tensor:
        """[N, rows, columns] -> nearly orthogonal matrices of the same shape (singular values near 1)."""
        a, b, c = cls.ITERATION
        flip = matrices.shape[1] > matrices.shape[2]
        x = matrices.bfloat16() if fast_bf16(matrices.device) else matrices.float()
        x = x.mT if flip else x
        x = x / (x.float().norm(dim=(1, 2), keepdim=True).to(x.dtype) + 1e-7)
        for _ in range(cls.STEPS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mT if flip else x).float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = self.orthogonalise(torch.stack(directions).flatten(2))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    parameters,
                    [update.view_as(parameter) for parameter, update in zip(parameters, updates, strict=True)],
                    alpha=-scale,
                )


def make_adamw(parameters: list[Tensor], rate: float, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as all trainings of the demo use it; on a GPU in one kernel."""
    fused = True if parameters[0].is_cuda else None
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)


def make_optimizers(
    matrices: list[Tensor], others: list[Tensor], *, matrix_rate: float, rate: float, weight_decay: float = 0.01
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak learning rates: orthogonalised updates for `matrices`, AdamW for the rest."""
    adamw = make_adamw(others, rate, weight_decay=weight_decay)
    return [(adamw, rate), (Orthogonal(matrices, matrix_rate, weight_decay=weight_decay), matrix_rate)]


# ---------------------------------------------------------------------------------------------------------------
# Stage 1: the autoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderRecipe:
    """Options of the autoencoder's training; `updates` decides the length of the cosine."""

    config: DemoAutoencoderConfig = DemoAutoencoderConfig()
    scale: int = 1  # pixels of a frame per pixel of the sprite world
    seed: int = 1
    updates: int = 400
    seconds: float = 0.0  # wall clock after which it ends instead; 0: none
    batch: int = 24  # groups of four frames
    learning_rate: float = 3e-3
    warmup: int = 50
    scenes: int = 2048
    fitting_groups: int = 768  # for the encoder's principal components
    first_frame_share: float = 0.12  # groups that are one frame four times
    latent_noise: float = 0.07  # added to standardised latents: the decoder must forgive the DiT's errors
    sprite_weight: float = 8.0  # of a pixel that a sprite touches; the plain background needs less attention
    save_every: int = 150


def autoencoder_batch(recipe: AutoencoderRecipe, scenes: sprites.Scenes, update: int) -> tuple[Tensor, Tensor]:
    """Groups [N, 12, H, W] in [-1, 1] and pixel weights [N, 1, H, W] of an update, on the device of the scenes."""
    generator = generator_at(recipe.seed, 1, update)
    rows = torch.randint(len(scenes), (recipe.batch,), generator=generator)
    start = torch.randint(2 * sprites.CLIP_FRAMES, (recipe.batch, 1), generator=generator)
    frozen = torch.rand(recipe.batch, 1, generator=generator) < recipe.first_frame_share
    times = start + torch.where(frozen, 0, torch.arange(4))
    chosen = scenes.take(rows)
    pixels = sprites.to_pixels(sprites.render(chosen, times, recipe.scale))
    gray = (chosen.background / 127.5 - 1).view(-1, 1, 1, 1, 1)
    touched = ((pixels - gray).abs().amax((1, 2)) > 0.05).unsqueeze(1).float()
    weight = 1 + (recipe.sprite_weight - 1) * F.max_pool2d(touched, 3, stride=1, padding=1)
    return rearrange(pixels, "n c t h w -> n (t c) h w"), weight


def autoencoder_loss(model: DemoAutoencoder, groups: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
    """Weighted reconstruction error, squared plus a little absolute for crisp edges."""
    latent = model.encode_groups(groups)
    error = model.decode_groups(latent + noise).float() - groups
    return ((error.square() + 0.1 * error.abs()) * weight).mean() / weight.mean()


def train_autoencoder(recipe: AutoencoderRecipe, out: Path, device: torch.device, stop: int | None = None) -> Path:
    """Trains, or resumes, until `stop` updates (default: all); returns the checkpoint's path."""
    path = out / "autoencoder.pt"
    saved = load_checkpoint(path)
    last = min(recipe.updates, stop if stop is not None else recipe.updates)
    if saved is not None and (saved["update"] >= last or saved.get("complete")):
        return path
    torch.manual_seed(recipe.seed)
    model = DemoAutoencoder(recipe.config).to(device).train()
    weights = list(model.decoder.parameters())
    optimizers = make_optimizers(
        [weight for weight in weights if weight.ndim == 4],
        [weight for weight in weights if weight.ndim != 4],
        matrix_rate=recipe.learning_rate,
        rate=recipe.learning_rate,
    )
    scenes = sprites.sample_scenes(recipe.scenes, recipe.seed).to(device)
    first = 0
    if saved is not None:
        first = saved["update"]
        model.load_state_dict(saved["model"])
        for (optimizer, _), state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        log.info("resumed %s at update %d", path, first)
    else:
        fitting = replace(recipe, batch=recipe.fitting_groups)
        kept = model.fit_encoder(autoencoder_batch(fitting, scenes, -1)[0].to(device))
        log.info("encoder: %d components keep %.1f%% of the variance", COMPONENTS, 100 * kept)
    ema = Ema(model)
    if saved is not None:
        ema.state = {name: value.to(device) for name, value in saved["ema"].items()}

    def save(update: int, complete: bool = False) -> None:
        states = [optimizer.state_dict() for optimizer, _ in optimizers]
        state = {"update": update, "model": model.state_dict(), "optimizers": states, "ema": ema.state}
        save_checkpoint(path, state | ({"complete": True} if complete else {}))

    pace = Pace(first, recipe.updates, recipe.seconds)
    update = first - 1
    bar = progress(pace.updates_until(last), "autoencoder")
    for update in bar:
        groups, weight = autoencoder_batch(recipe, scenes, update)
        shape = (recipe.batch, 16, groups.shape[-2] // 8, groups.shape[-1] // 8)
        noise = torch.randn(shape, generator=generator_at(recipe.seed, 2, update)).to(device)
        total = pace.total(update)
        for optimizer, peak in optimizers:
            rate = cosine_learning_rate(update, peak=peak, warmup=recipe.warmup, total=total)
            for group in optimizer.param_groups:
                group["lr"] = rate
        with autocast(device):
            loss = autoencoder_loss(model, groups, weight, noise * recipe.latent_noise)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, GRADIENT_CLIP)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model, update)
        if update % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.5f}")
        if (update + 1) % recipe.save_every == 0:
            save(update + 1)
    save(update + 1, complete=bool(recipe.seconds))
    return path


def load_trained_autoencoder(path: Path, config: DemoAutoencoderConfig) -> DemoAutoencoder:
    """The EMA weights of a training checkpoint, in eval mode."""
    saved = load_checkpoint(path)
    if saved is None:
        raise ValueError(f"path={os.fspath(path)!r} does not exist; train it with --stage autoencoder first")
    model = DemoAutoencoder(config)
    model.load_state_dict(saved["ema"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def autoencoder_psnr(model: DemoAutoencoder, count: int = 16, seed: int = 9, *, scale: int = 1) -> tuple[float, float]:
    """PSNR in dB over whole frames, and over the pixels a sprite touches, on fresh clips."""
    scenes = sprites.sample_scenes(count, seed).to(model.wan_mean.device)
    pixels = sprites.to_pixels(sprites.render(scenes, torch.arange(sprites.CLIP_FRAMES), scale))
    error = (model.decode(model.encode(pixels)) - pixels).square()
    gray = (scenes.background / 127.5 - 1).view(-1, 1, 1, 1, 1)
    touched = ((pixels - gray).abs().amax(1, keepdim=True) > 0.05).expand_as(error)
    peak = 2.0  # the range [-1, 1]
    return tuple(10 * math.log10(peak**2 / float(value)) for value in (error.mean(), error[touched].mean()))


# ---------------------------------------------------------------------------------------------------------------
# Stage 2: the caption encoder and the DiT, together


@dataclass(frozen=True, slots=True, kw_only=True)
class DitRecipe:
    """Options of the DiT's training; `updates` decides the length of the cosine.

    A batch is of one kind. Bidirectional: every latent frame sees every other, one sigma for the clip. Causal: a
    chunk sees itself and earlier chunks, each chunk has its own sigma, and in `clean_context_share` of the clips
    the chunks before a random one are (nearly) clean, as they are when sampling. Later: the same on a clip's first
    chunk followed by frames from long after, which is what a rolling window with a sink shows. Opening: many clips'
    first chunks alone. All that a caption decides is decided there, without help from context, and one chunk costs
    little: this is where most of the learning is. Continuation: two neighbouring chunks from anywhere in a clip, the
    first given, which teaches motion and bouncing as cheaply.
    """

    model: WanConfig = field(default_factory=lambda: WanConfig(dim=256, ffn_dim=1024, num_layers=4, text_dim=128))
    encoder: CaptionEncoderConfig = CaptionEncoderConfig()
    scale: int = 1  # pixels of a frame per pixel of the sprite world
    seed: int = 2
    updates: int = 11400
    seconds: float = 0.0  # wall clock after which it ends instead; 0: none
    batch: int = 16
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clips: int = 24576
    later_clips: int = 2048
    later_frames: int = 12  # latent frames of a later piece
    opening_share: float = 0.58
    opening_batch: int = 80
    ghost_share: float = 0.5  # of the sprites of an opening batch: see DitBatch
    faded_share: float = 0.5  # of these, how many are also weaker than they should be
    most_faded: float = 0.95
    ghost_weight: float = 0.95  # the strongest ghost, as a share of the sprite it doubles
    ghost_sigma: float = 0.4  # ghosts are left only above: below, a picture has been decided on
    continuation_share: float = 0.2
    continuation_batch: int = 40
    bidirectional_share: float = 0.06
    later_share: float = 0.05
    short_share: float = 0.65  # of causal batches: only the first `window` frames, where all the deciding is done
    clean_context_share: float = 0.7
    empty_caption_share: float = 0.1
    window_share: float = 0.4  # of causal batches: rolling window instead of everything before
    frames_per_chunk: int = 3
    window: int = 12
    sink: int = 3
    shift: float = 4.0  # a little more weight on fine detail than the shift of 5 used in sampling
    save_every: int = 150
    compile: bool = False  # measured on 2 CPU cores: 7% faster after two minutes of compiling


@dataclass(frozen=True, slots=True)
class LatentSet:
    """Training clips, encoded once: standardised latents in fp16 and caption ids."""

    clips: Tensor  # [N, 16, 21, h, w], a clip from its first frame
    later: Tensor  # [M, 16, K, h, w], the same clips (the first M) at a random time long after their start
    ids: Tensor  # int64 [N, 2, 4]
    # [N, 2, 2, 16, 3, h, w]: what each sprite adds to the first chunk, in its place [:, 0] and elsewhere [:, 1]
    sprites: Tensor


CLIPS_AT_ONCE = 16
"""Clips that are drawn and encoded together."""


def training_scenes(recipe: DitRecipe, start: int) -> tuple[sprites.Scenes, sprites.Scenes]:
    """The scenes from `start` on that are encoded together, and the same with the sprites in other places."""
    scenes = sprites.sample_scenes(min(CLIPS_AT_ONCE, recipe.clips - start), recipe.seed, start)
    moved = replace(sprites.make_scenes(scenes.specs, recipe.seed + 1, start), background=scenes.background)
    return scenes, moved


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes for what is plain Python; spawned, because one that has touched CUDA cannot be forked."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def all_training_scenes(recipe: DitRecipe, pool: Executor) -> Iterator[tuple[sprites.Scenes, sprites.Scenes]]:
    """`training_scenes` of the whole set, in order and made ahead of use.

    Placing sprites is a minute of one core for the whole set, several times what a GPU needs to draw it.
    """
    starts = range(0, recipe.clips, CLIPS_AT_ONCE)
    made = pool.map(_scenes_as_arrays, itertools.repeat(recipe), starts, chunksize=16)  # at once, not at the first use
    return (
        (sprites.Scenes(*map(_from_array, scenes)), sprites.Scenes(*map(_from_array, moved))) for scenes, moved in made
    )


def _scenes_as_arrays(recipe: DitRecipe, start: int) -> list[list[Any]]:
    """`training_scenes`, field by field. Tensors travel between processes as open files, of which there are few."""
    values = [[getattr(scenes, item.name) for item in fields(scenes)] for scenes in training_scenes(recipe, start)]
    return [[value.numpy() if isinstance(value, Tensor) else value for value in row] for row in values]


def _from_array(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@torch.no_grad()
def encode_latent_set(
    recipe: DitRecipe,
    autoencoder: DemoAutoencoder,
    path: Path | None,
    device: torch.device,
    made: Iterator[tuple[sprites.Scenes, sprites.Scenes]] | None = None,
) -> LatentSet:
    """Renders and encodes the training clips, or reads them from `path` if they are there.

    Args:
        path: where they are kept; None does not keep them, as a GPU draws them sooner than a disk reads them.
        device: a GPU holds the whole set itself: 270 KB a clip at scale 2.
        made: from `all_training_scenes`; None makes them here.
    """
    if path is not None and (saved := load_checkpoint(path)) is not None:
        return LatentSet(**saved)
    autoencoder = autoencoder.to(device).eval()
    clips, later, ids, layers = [], [], [], []
    rng = generator_at(recipe.seed, 3)
    later_pixels = 4 * recipe.later_frames

    def encode(scenes: sprites.Scenes, frames: Tensor) -> Tensor:
        drawn = sprites.render(scenes, frames, recipe.scale)
        groups = rearrange(sprites.to_pixels(drawn), "n c (t f) h w -> (n t) (f c) h w", f=4)
        with autocast(device):
            latent = autoencoder.encode_groups(groups)
        return rearrange(latent, "(n t) c h w -> n c t h w", n=len(scenes)).half()

    def encode_layers(scenes: sprites.Scenes, frames: Tensor) -> Tensor:
        """[N, 2, 16, T, h, w]: the encoder is linear, so a picture is its background and what each sprite adds."""
        first = scenes.present & torch.tensor([True, False], device=device)
        whole, alone, empty = (
            encode(replace(scenes, present=present), frames).float()
            for present in (scenes.present, first, torch.zeros_like(first))
        )
        return torch.stack([alone - empty, whole - alone], dim=1).half()

    first_frame_and_rest = torch.cat([torch.zeros(3, dtype=torch.int64), torch.arange(sprites.CLIP_FRAMES)])
    starts = range(0, recipe.clips, CLIPS_AT_ONCE)
    if made is None:
        made = (training_scenes(recipe, start) for start in starts)
    for start, places in zip(progress(starts, "encoding clips"), made, strict=True):
        scenes, moved = (place.to(device) for place in places)
        clips.append(encode(scenes, first_frame_and_rest))
        ids.append(tokenize_captions(scenes.captions))
        opening = first_frame_and_rest[: 4 * recipe.frames_per_chunk]
        layers.append(torch.stack([encode_layers(place, opening) for place in (scenes, moved)], dim=1))
        if start < recipe.later_clips:
            # A latent frame after the first covers pixel frames 4k+1 .. 4k+4.
            group = torch.randint(10, 400, (len(scenes), 1), generator=rng)
            later.append(encode(scenes, 4 * group + 1 + torch.arange(later_pixels)))
    data = LatentSet(torch.cat(clips), torch.cat(later), torch.cat(ids).to(device), torch.cat(layers))
    if path is not None:
        save_checkpoint(path, {item.name: getattr(data, item.name) for item in fields(LatentSet)})
    return data


@dataclass(frozen=True, slots=True)
class DitBatch:
    """One update's input: noisy latents, their sigmas, the flow to predict and where it counts.

    Half the sprites of an opening batch have a ghost: in the noisy latent the same sprite also stands, weaker, in
    another place, and half of these sprites are faded themselves. The flow still leads to the clip as it is. At high
    noise a young model predicts a blend of places, the sampler mixes that blend into the next step, and no training
    clip shows what to do then: sprites appeared twice, or faded away. Ghosts teach the model to decide for the stronger
    place and to make it whole.
    """

    noisy: Tensor  # [B, 16, T, h, w]
    sigma: Tensor  # [B, T]
    flow: Tensor  # [B, 16, T, h, w]
    weight: Tensor  # [B, T], 0 where the prediction is not used
    ids: Tensor  # int64 [B, 2, 4]
    frames_per_chunk: int
    window: int
    sink: int
    kind: str

    def to(self, device: torch.device) -> DitBatch:
        values = (getattr(self, item.name) for item in fields(self))
        return DitBatch(*(value.to(device) if isinstance(value, Tensor) else value for value in values))


LOSSES_READ_EVERY = 50
"""Updates between looks at the losses on a GPU, which each look halts."""
SMALLEST_TRAINED_SIGMA = 0.02
"""Below this the input holds no usable noise, the flow cannot be predicted, and nobody asks for it."""


def dit_batch(recipe: DitRecipe, data: LatentSet, update: int) -> DitBatch:
    """The batch of an update, made where the data is; depends on (seed, update) and the kind of device only."""
    device = data.clips.device
    # What Python decides comes from the CPU, so that nothing waits for a GPU; tensors are drawn where they are used.
    deciding = drawing = generator_at(recipe.seed, 4, update)
    if device.type != "cpu":
        drawing = generator_at(recipe.seed, 5, update, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=drawing, device=device)

    def decide() -> float:
        return float(torch.rand(1, generator=deciding))

    size = recipe.frames_per_chunk
    shares = {
        "bidirectional": recipe.bidirectional_share,
        "later": recipe.later_share,
        "opening": recipe.opening_share,
        "continuation": recipe.continuation_share,
    }
    draw, kind = decide(), "causal"
    for name, share in shares.items():
        if 0 <= draw < share:
            kind = name
        draw -= share
    is_bidirectional, is_later = kind == "bidirectional", kind == "later"
    batch = {"opening": recipe.opening_batch, "continuation": recipe.continuation_batch}.get(kind, recipe.batch)
    rows = torch.randint(len(data.later if is_later else data.clips), (batch,), generator=drawing, device=device)
    clean = data.clips[rows].float()
    if kind == "opening":
        clean = clean[:, :, :size]
    elif kind == "continuation":
        places = clean.shape[2] // size - 1
        first = size * int(torch.randint(places, (1,), generator=deciding))
        clean = clean[:, :, first : first + 2 * size]
    elif kind == "causal" and decide() < recipe.short_share:
        clean = clean[:, :, : recipe.window]
    if is_later:
        clean = torch.cat([clean[:, :, :size], data.later[rows].float()], dim=2)
    frames = clean.shape[2]
    chunks = -(-frames // size)

    if is_bidirectional:
        per_chunk = shift_sigma(uniform(batch, 1), recipe.shift).expand(batch, chunks)
    else:
        per_chunk = shift_sigma(uniform(batch, chunks), recipe.shift)
        # Context as in sampling: the chunks before `current` are clean, or as noisy as a diagonal schedule's.
        current = (uniform(batch, 1) * 1.3 * chunks - 0.3 * chunks).clamp(min=0).floor()
        current = torch.where(uniform(batch, 1) < recipe.clean_context_share, current, 0)
        choice = uniform(batch, 1)
        context = torch.where(choice < 0.6, 0.0, torch.where(choice < 0.8, 0.357, 0.4 * uniform(batch, chunks)))
        per_chunk = torch.where(torch.arange(chunks, device=device) < current, context, per_chunk)
        if is_later or kind == "continuation":  # the first chunk is always context
            per_chunk[:, :1] = context.expand(batch, chunks)[:, :1]
    sigma = per_chunk.repeat_interleave(size, dim=1)[:, :frames]
    weight = (sigma >= SMALLEST_TRAINED_SIGMA).float()
    if is_later:  # where the chunk after the gap is cannot be known
        weight[:, : 2 * size] = 0
    elif kind == "continuation":
        weight[:, :size] = 0
    noise = torch.randn(clean.shape, generator=drawing, device=device)
    level = sigma[:, None, :, None, None]
    mixed, flow = clean, noise - clean
    if kind == "opening":
        layers = data.sprites[rows].float()
        haunted = (uniform(batch, 2) < recipe.ghost_share).float()
        faded = haunted * recipe.most_faded * uniform(batch, 2) * (uniform(batch, 2) < recipe.faded_share)
        ghost = haunted * recipe.ghost_weight * uniform(batch, 2) * (1 - faded)
        strength = torch.stack([-faded, ghost], dim=1).view(batch, 2, 2, 1, 1, 1, 1)
        error = (layers * strength).sum((1, 2)) * (level > recipe.ghost_sigma)
        mixed = clean + error
        flow = flow + error * (1 - level) / level.clamp(min=recipe.ghost_sigma)
    keep = uniform(batch) >= recipe.empty_caption_share
    windowed = is_later or (not is_bidirectional and decide() < recipe.window_share)
    return DitBatch(
        noisy=torch.lerp(mixed, noise, level),
        sigma=sigma,
        flow=flow,
        weight=weight,
        ids=data.ids[rows] * keep[:, None, None],
        # Everything in one chunk is the bidirectional case.
        frames_per_chunk=frames if is_bidirectional else size,
        window=recipe.window if windowed else GLOBAL_WINDOW,
        sink=recipe.sink if windowed else 0,
        kind=kind,
    )


def enlarged(recipe: DitRecipe, factor: float) -> DitRecipe:
    """The recipe with batches of every kind `factor` times as large."""
    names = ("batch", "opening_batch", "continuation_batch")
    sizes = {name: max(1, round(factor * getattr(recipe, name))) for name in names}
    return replace(recipe, **sizes)


class DemoModel(nn.Module):
    """Caption encoder and DiT as trained together."""

    def __init__(self, recipe: DitRecipe) -> None:
        super().__init__()
        self.encoder = CaptionEncoder(recipe.encoder)
        self.dit = WanDiT(recipe.model)
        start_local_and_open(self.dit)

    def loss(self, batch: DitBatch) -> Tensor:
        """Mean squared flow error over the latent frames that count."""
        flow = self.dit(
            batch.noisy,
            1000 * batch.sigma,
            self.encoder(batch.ids),
            frames_per_chunk=batch.frames_per_chunk,
            window=batch.window,
            sink=batch.sink,
        )
        error = (flow.float() - batch.flow).square().mean((1, 3, 4))
        return (error * batch.weight).sum() / batch.weight.sum().clamp(min=1)


@torch.no_grad()
def start_local_and_open(dit: WanDiT) -> None:
    """Starts a small DiT where a large one gets to by itself after long training.

    The gates of the residual branches start near 1 instead of near 0. The queries and keys of self-attention start
    with a shared constant in the fast rotary channels, so that a token first looks at its own place and the places
    around it (rotary scores depend on distance only): one head over all frames, the next mostly over near frames, and
    so on. Both are ordinary weights of Wan's format and train like the others.
    """
    pairs_of_axis = [count // 2 for count in axis_dims(HEAD_DIM)]  # time, height, width
    first_pair = [0, pairs_of_axis[0], pairs_of_axis[0] + pairs_of_axis[1]]
    fast = 5  # pairs of an axis that turn by a third of a radian or more per position
    for block in dit.blocks:
        block.modulation[:, 2].fill_(1)
        block.modulation[:, 5].fill_(1)
        heads = []
        for head in range(dit.config.num_heads):
            shares = (0.1, 0.45, 0.45) if head % 2 == 0 else (0.3, 0.35, 0.35)
            constant = torch.zeros(HEAD_DIM // 2, 2)
            for first, share in zip(first_pair, shares, strict=True):
                # As much energy as the part that depends on the token, which has about 1 per channel.
                constant[first : first + fast, 0] = (share * HEAD_DIM / fast) ** 0.5
            heads.append(constant.flatten())
        for projection in (block.self_attn.q, block.self_attn.k):
            projection.bias.copy_(torch.cat(heads))


def dit_optimizers(model: DemoModel, recipe: DitRecipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Orthogonalised updates for the matrices of the blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if name.startswith("dit.blocks") and parameter.ndim == 2 else others).append(parameter)
    return make_optimizers(
        matrices,
        others,
        matrix_rate=recipe.matrix_learning_rate,
        rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )


def train_dit(recipe: DitRecipe, data: LatentSet, out: Path, device: torch.device, stop: int | None = None) -> Path:
    """Trains, or resumes, until `stop` updates (default: all); returns the checkpoint's path."""
    path = out / "dit.pt"
    torch.manual_seed(recipe.seed)
    model = DemoModel(recipe).to(device).train()
    optimizers = dit_optimizers(model, recipe)
    ema = Ema(model)
    first = 0
    if (saved := load_checkpoint(path)) is not None:
        first = saved["update"]
        model.load_state_dict(saved["model"])
        for (optimizer, _), state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.state = {name: value.to(device) for name, value in saved["ema"].items()}
        log.info("resumed %s at update %d", path, first)
    if recipe.compile:
        for block in model.dit.blocks:
            block.compile()
    last = min(recipe.updates, stop if stop is not None else recipe.updates)

    def save(update: int) -> None:
        states = [optimizer.state_dict() for optimizer, _ in optimizers]
        state = {"update": update, "model": model.state_dict(), "optimizers": states, "ema": ema.state}
        save_checkpoint(path, state)

    pace = Pace(first, recipe.updates, recipe.seconds)
    update = first - 1
    bar = progress(pace.updates_until(last), "dit")
    running = dict.fromkeys(("opening", "continuation", "causal", "later", "bidirectional"), math.nan)
    unread: list[tuple[int, str, Tensor]] = []
    read_every = 1 if device.type == "cpu" else LOSSES_READ_EVERY

    def read_losses() -> None:
        values = torch.stack([loss for _, _, loss in unread]).tolist() if unread else []
        for (at, kind, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"loss is {value} at update {at}; lower learning_rate or resume from a checkpoint")
            running[kind] = value if math.isnan(running[kind]) else 0.97 * running[kind] + 0.03 * value
        unread.clear()

    for update in bar:
        batch = dit_batch(recipe, data, update).to(device)
        total = pace.total(update)
        for optimizer, peak in optimizers:
            rate = cosine_learning_rate(update, peak=peak, warmup=recipe.warmup, total=total)
            for group in optimizer.param_groups:
                group["lr"] = rate
        with autocast(device):
            loss = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model, update)
        unread.append((update, batch.kind, loss.detach()))
        if update % read_every == 0:
            read_losses()
        if update % 10 == 0:
            bar.set_postfix({name: f"{x:.4f}" for name, x in running.items()})
        if (update + 1) % recipe.save_every == 0:
            read_losses()
            save(update + 1)
            log.info("update %d: %s", update + 1, ", ".join(f"{k} {v:.4f}" for k, v in running.items()))
    read_losses()
    save(update + 1)
    return path


# ---------------------------------------------------------------------------------------------------------------
# Loading a run, and shipping it

DIT_FILE = "demo_teacher.safetensors"
AUTOENCODER_FILE = "demo_autoencoder.safetensors"
TEXT_ENCODER_FILE = "demo_text_encoder.safetensors"


@dataclass(frozen=True, slots=True)
class TrainedFor:
    """How a DiT of the demo is meant to be sampled."""

    schedule: DiagonalSchedule
    settings: CausalSettings
    cfg: float


def trained_for(path: Path) -> TrainedFor:
    """What a file's header says; where there is none (a training run), what the teacher is sampled with."""
    metadata: dict[str, str] = {}
    if path.exists():
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    found = Provenance.from_metadata(metadata, path.name)
    settings, _ = causal_settings(found)
    if found.sigmas is None:
        return TrainedFor(DiagonalSchedule.uniform(SHIPPED_STEPS), settings, SHIPPED_CFG)
    schedule = DiagonalSchedule(
        sigmas=found.sigmas,
        context_mode=found.context_mode or "clean",
        shift=found.shift or DEFAULT_SHIFT,
        fresh_noise=metadata.get(NOISE_KEY) != KEPT_NOISE,
    )
    return TrainedFor(schedule, settings, float(metadata.get("cfg", 1)))


def load_dit(path: Path) -> WanDiT:
    """A DiT from a bare file, float32; eval mode, no gradients."""
    weights = {name: value.float() for name, value in load_file(path).items()}
    dit = WanDiT(WanConfig.from_state_dict(weights))
    dit.load_state_dict(weights)
    return dit.eval().requires_grad_(False)


def load_models(folder: Path, dit: Path | None = None) -> tuple[WanDiT, CaptionEncoder, DemoAutoencoder]:
    """Shipped weights if `folder` holds them, else the EMA weights of a training run; eval mode, no gradients.

    Args:
        dit: a file to take instead of the folder's teacher, which need not be there then.

    Raises:
        ValueError: if the folder holds neither.
    """
    if (folder / (TEXT_ENCODER_FILE if dit else DIT_FILE)).exists():
        encoder = load_caption_encoder(folder / TEXT_ENCODER_FILE)
        return load_dit(dit or folder / DIT_FILE), encoder, load_demo_autoencoder(folder / AUTOENCODER_FILE)
    saved = load_checkpoint(folder / "dit.pt")
    if saved is None:
        raise ValueError(
            f"checkpoint={os.fspath(folder)!r} holds neither {DIT_FILE} nor dit.pt; give the demo folder, or train "
            "with python -m distillation.train_demo"
        )
    model = DemoModel(DitRecipe())
    model.load_state_dict(saved["ema"])
    model.eval().requires_grad_(False)
    autoencoder = load_trained_autoencoder(folder / "autoencoder.pt", AutoencoderRecipe().config)
    return load_dit(dit) if dit else model.dit, model.encoder, autoencoder


def provenance_of(recipe: DitRecipe, update: int) -> dict[str, str]:
    """Header entries of the shipped DiT: DESIGN's provenance keys, the mark of a causal model, and the cfg."""
    schedule = DiagonalSchedule.uniform(SHIPPED_STEPS)
    side = recipe.scale * sprites.FRAME_SIZE
    provenance = Provenance(
        frames_per_chunk=recipe.frames_per_chunk,
        steps_per_chunk=(SHIPPED_STEPS,),
        sigmas=schedule.sigmas,
        shift=schedule.shift,
        context_mode=schedule.context_mode,
        window=recipe.window,
        sink=recipe.sink,
        recipe=(
            f"distillation.train_demo, seed {recipe.seed}, {update} updates of {recipe.batch} clips, rectified flow, "
            f"shift {recipe.shift:g}, {recipe.bidirectional_share:.0%} bidirectional, else causal with a sigma per "
            f"chunk, {recipe.empty_caption_share:.0%} empty captions, EMA {EMA_DECAY}"
        ),
        data=(
            f"sprite world of distillation.sprites, {recipe.clips} clips of {sprites.CLIP_FRAMES} frames at "
            f"{side}x{side}, seed {recipe.seed}"
        ),
        git_commit=git_commit(),
    )
    config = json.dumps({"transformer": {"causal_ar": True, "text_dim": recipe.model.text_dim}})
    return {**provenance.to_metadata(), "config": config, "cfg": str(SHIPPED_CFG), NOISE_KEY: KEPT_NOISE}


def export(run: Path, folder: Path, note: str = "", recipe: DitRecipe | None = None) -> None:
    """Writes the EMA weights of a run as the three files of the demo, each under a temporary name first.

    Args:
        note: goes behind the recipe in the header: what a run did that the recipe does not say.
        recipe: what the run was trained with; None is the default.
    """
    recipe = recipe or DitRecipe()
    dit, encoder, autoencoder = load_models(run)
    saved = load_checkpoint(run / "dit.pt")
    assert saved is not None
    folder.mkdir(parents=True, exist_ok=True)
    header = provenance_of(recipe, saved["update"])
    if note:
        header["recipe"] += f". {note}"
    shared = {key: header[key] for key in ("recipe", "data", "git_commit")}
    save_caption_encoder(encoder, folder / TEXT_ENCODER_FILE, shared)
    save_demo_autoencoder(autoencoder, folder / AUTOENCODER_FILE, shared)
    write_weights(folder / DIT_FILE, {name: value.half() for name, value in dit.state_dict().items()}, header)
    for name in (DIT_FILE, TEXT_ENCODER_FILE, AUTOENCODER_FILE):
        log.info("%s: %.1f MB", folder / name, (folder / name).stat().st_size / 1e6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("autoencoder", "dit", "all"), default="all")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the weights of --out there, then stop")
    parser.add_argument("--note", default="", help="with --export: added to the recipe in the files' headers")
    parser.add_argument("--scale", type=int, default=1, help="size of a frame: 64 pixels times this")
    parser.add_argument("--batch-factor", type=float, default=1, help="batches of the DiT this many times as large")
    parser.add_argument("--seconds", type=float, default=0.0, help="train the DiT for this long; default: its updates")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    recipe = AutoencoderRecipe(scale=options.scale)
    dit = enlarged(DitRecipe(), options.batch_factor)
    dit = replace(dit, scale=options.scale, seconds=options.seconds)
    if options.export:
        export(options.out, options.export, options.note, dit)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    started = time.perf_counter()
    if options.stage == "autoencoder":
        autoencoder = load_trained_autoencoder(train_autoencoder(recipe, options.out, device), recipe.config)
        whole, sprite = autoencoder_psnr(autoencoder, scale=options.scale)
        log.info("autoencoder: %.1f dB, %.1f dB on sprites, %.0f s", whole, sprite, time.perf_counter() - started)
        return
    with nullcontext() if on_cpu else worker_pool(options.threads) as pool:
        scenes = pool and all_training_scenes(dit, pool)
        path = train_autoencoder(recipe, options.out, device)
        autoencoder = load_trained_autoencoder(path, recipe.config)
        data = encode_latent_set(dit, autoencoder, options.out / "latents.pt" if on_cpu else None, device, scenes)
    train_dit(dit, data, options.out, device)


if __name__ == "__main__":
    main()
