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
from torch import Tensor, nn

from diagonal_sampler.captions import (
    CaptionEncoder,
    CaptionEncoderConfig,
    save_caption_encoder,
    tokenize_captions,
)
from diagonal_sampler.demo_autoencoder import (
    COMPONENTS,
    LATENT_CHANNELS,
    SPACE_FACTOR,
    DemoAutoencoder,
    DemoAutoencoderConfig,
    save_demo_autoencoder,
)
from diagonal_sampler.dit import HEAD_DIM, WanConfig, WanDiT
from diagonal_sampler.frames import TIME_FACTOR
from diagonal_sampler.provenance import Provenance
from diagonal_sampler.rope import axis_dims
from diagonal_sampler.schedule import DiagonalSchedule, shift_sigma
from diagonal_sampler.settings import GLOBAL_WINDOW
from diagonal_sampler.weight_files import write_weights
from distillation import sprites
from distillation.common import autocast, generator_at, git_commit
from distillation.demo_files import (
    AUTOENCODER_FILE,
    KEPT_NOISE,
    NOISE_KEY,
    TEACHER_CFG,
    TEACHER_FILE,
    TEACHER_STEPS,
    TEXT_ENCODER_FILE,
)
from distillation.demo_run import (
    Optimizers,
    Pace,
    Training,
    begin,
    load_checkpoint,
    make_optimizers,
    progress,
    read_run,
    require_same_recipe,
    save_checkpoint,
)

log = logging.getLogger("train_demo")

DIT_CHECKPOINT, AUTOENCODER_CHECKPOINT = "dit.pt", "autoencoder.pt"
EMA_DECAY = 0.998


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
    times = start + torch.where(frozen, 0, torch.arange(TIME_FACTOR))
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
    path = out / AUTOENCODER_CHECKPOINT
    saved = load_checkpoint(path)
    if saved is not None:
        require_same_recipe(path, saved, recipe)
        if saved.get("complete") or saved["update"] >= recipe.updates:
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
    if saved is None:
        fitting = replace(recipe, batch=recipe.fitting_groups)
        kept = model.fit_encoder(autoencoder_batch(fitting, scenes, -1)[0].to(device))
        log.info("encoder: %d components keep %.1f%% of the variance", COMPONENTS, 100 * kept)
    training = Training(path, model, optimizers, recipe, ema_decay=EMA_DECAY)
    first = training.resume()
    pace = _pace(recipe)
    update = first - 1
    bar = progress(pace.updates_from(first, stop), "autoencoder")
    for update in bar:
        groups, weight = autoencoder_batch(recipe, scenes, update)
        height, width = (size // SPACE_FACTOR for size in groups.shape[-2:])
        shape = (recipe.batch, LATENT_CHANNELS, height, width)
        noise = torch.randn(shape, generator=generator_at(recipe.seed, 2, update)).to(device)
        pace.set_rates(optimizers, update)
        with autocast(device):
            loss = autoencoder_loss(model, groups, weight, noise * recipe.latent_noise)
        loss.backward()
        training.step(update)
        if update % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.5f}")
        if (update + 1) % recipe.save_every == 0:
            training.save(update + 1)
    training.save(update + 1, complete=bool(recipe.seconds))
    return path


def _pace(recipe: AutoencoderRecipe | DitRecipe) -> Pace:
    """By the clock alone where the recipe has seconds."""
    if recipe.seconds:
        return Pace(None, recipe.warmup, recipe.seconds)
    return Pace(recipe.updates, recipe.warmup)


def load_trained_autoencoder(path: Path, config: DemoAutoencoderConfig) -> DemoAutoencoder:
    """The EMA weights of a training checkpoint, in eval mode."""
    model = DemoAutoencoder(config)
    model.load_state_dict(read_run(path)["ema"])
    return model.eval().requires_grad_(False)


PSNR_SCENES, PSNR_SEED = 16, 9


@torch.no_grad()
def autoencoder_psnr(model: DemoAutoencoder, scale: int) -> tuple[float, float]:
    """PSNR in dB over whole frames, and over the pixels a sprite touches, on fresh clips."""
    scenes = sprites.sample_scenes(PSNR_SCENES, PSNR_SEED).to(model.wan_mean.device)
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
    later_pixels = TIME_FACTOR * recipe.later_frames

    def encode(scenes: sprites.Scenes, frames: Tensor) -> Tensor:
        drawn = sprites.render(scenes, frames, recipe.scale)
        groups = rearrange(sprites.to_pixels(drawn), "n c (t f) h w -> (n t) (f c) h w", f=TIME_FACTOR)
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

    first_frame_and_rest = torch.cat(
        [torch.zeros(TIME_FACTOR - 1, dtype=torch.int64), torch.arange(sprites.CLIP_FRAMES)]
    )
    starts = range(0, recipe.clips, CLIPS_AT_ONCE)
    if made is None:
        made = (training_scenes(recipe, start) for start in starts)
    for start, places in zip(progress(starts, "encoding clips"), made, strict=True):
        scenes, moved = (place.to(device) for place in places)
        clips.append(encode(scenes, first_frame_and_rest))
        ids.append(tokenize_captions(scenes.captions))
        opening = first_frame_and_rest[: TIME_FACTOR * recipe.frames_per_chunk]
        layers.append(torch.stack([encode_layers(place, opening) for place in (scenes, moved)], dim=1))
        if start < recipe.later_clips:
            # A latent frame after the first covers pixel frames 4k+1 .. 4k+4.
            group = torch.randint(10, 400, (len(scenes), 1), generator=rng)
            later.append(encode(scenes, TIME_FACTOR * group + 1 + torch.arange(later_pixels)))
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


def dit_optimizers(model: DemoModel, recipe: DitRecipe) -> Optimizers:
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
    path = out / DIT_CHECKPOINT
    torch.manual_seed(recipe.seed)
    model = DemoModel(recipe).to(device).train()
    training = Training(path, model, dit_optimizers(model, recipe), recipe, ema_decay=EMA_DECAY)
    first = training.resume()
    if recipe.compile:
        for block in model.dit.blocks:
            block.compile()
    pace = _pace(recipe)
    update = first - 1
    bar = progress(pace.updates_from(first, stop), "dit")
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
        pace.set_rates(training.optimizers, update)
        with autocast(device):
            loss = model.loss(batch)
        loss.backward()
        training.step(update)
        unread.append((update, batch.kind, loss.detach()))
        if update % read_every == 0:
            read_losses()
        if update % 10 == 0:
            bar.set_postfix({name: f"{x:.4f}" for name, x in running.items()})
        if (update + 1) % recipe.save_every == 0:
            read_losses()
            training.save(update + 1)
            log.info("update %d: %s", update + 1, ", ".join(f"{k} {v:.4f}" for k, v in running.items()))
    read_losses()
    training.save(update + 1)
    return path


# ---------------------------------------------------------------------------------------------------------------
# Loading a run, and shipping it


def load_trained(run: Path) -> tuple[WanDiT, CaptionEncoder, DemoAutoencoder]:
    """The averaged weights of a run in a folder; eval mode, no gradients.

    Raises:
        ValueError: if the folder holds none.
    """
    saved = read_run(run / DIT_CHECKPOINT)
    model = DemoModel(DitRecipe())
    model.load_state_dict(saved["ema"])
    model.eval().requires_grad_(False)
    autoencoder = load_trained_autoencoder(run / AUTOENCODER_CHECKPOINT, AutoencoderRecipe().config)
    return model.dit, model.encoder, autoencoder


def provenance_of(recipe: DitRecipe, update: int) -> dict[str, str]:
    """Header entries of the shipped DiT: DESIGN's provenance keys, the mark of a causal model, and the cfg."""
    schedule = DiagonalSchedule.uniform(TEACHER_STEPS)
    side = recipe.scale * sprites.FRAME_SIZE
    provenance = Provenance(
        frames_per_chunk=recipe.frames_per_chunk,
        steps_per_chunk=(TEACHER_STEPS,),
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
    return {**provenance.to_metadata(), "config": config, "cfg": str(TEACHER_CFG), NOISE_KEY: KEPT_NOISE}


def recipe_of(saved: dict[str, Any]) -> DitRecipe:
    """What a checkpoint says that it was trained with; older ones say nothing: the default. The sizes are all runs'."""
    usual, before = DitRecipe(), saved.get("recipe", {})
    names = [item.name for item in fields(usual) if item.name in before and item.name not in ("model", "encoder")]
    return replace(usual, **{name: before[name] for name in names})


def export(run: Path, folder: Path, note: str = "") -> None:
    """Writes the EMA weights of a run as the three files of the demo, each under a temporary name first.

    Args:
        note: goes behind the recipe in the header: what a run did that the recipe does not say.
    """
    dit, encoder, autoencoder = load_trained(run)
    folder.mkdir(parents=True, exist_ok=True)
    saved = read_run(run / DIT_CHECKPOINT)
    header = provenance_of(recipe_of(saved), saved["update"])
    if note:
        header["recipe"] += f". {note}"
    shared = {key: header[key] for key in ("recipe", "data", "git_commit")}
    save_caption_encoder(encoder, folder / TEXT_ENCODER_FILE, shared)
    save_demo_autoencoder(autoencoder, folder / AUTOENCODER_FILE, shared)
    write_weights(folder / TEACHER_FILE, {name: value.half() for name, value in dit.state_dict().items()}, header)
    for name in (TEACHER_FILE, TEXT_ENCODER_FILE, AUTOENCODER_FILE):
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
    device = begin(options)
    if options.export:
        export(options.out, options.export, options.note)
        return
    recipe = AutoencoderRecipe(scale=options.scale)
    dit = enlarged(DitRecipe(), options.batch_factor)
    dit = replace(dit, scale=options.scale, seconds=options.seconds)
    on_cpu = device.type == "cpu"
    started = time.perf_counter()
    if options.stage == "autoencoder":
        autoencoder = load_trained_autoencoder(train_autoencoder(recipe, options.out, device), recipe.config)
        whole, sprite = autoencoder_psnr(autoencoder, options.scale)
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
