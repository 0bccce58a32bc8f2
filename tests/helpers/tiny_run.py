"""Training runs of toy size: a teacher file, captions and a recipe that trains in fractions of a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_wan import tiny_dit
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, CaptionEncoderConfig, save_caption_encoder
from diagonal_sampler.dit import WanConfig
from distillation import run_folder, train
from distillation.ranks import Ranks, join_ranks
from distillation.recipes import Recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT_DIM = 16
SIZES = {"dim": 128, "ffn_dim": 32, "num_layers": 2, "text_dim": TEXT_DIM}
PROMPTS = ("a red circle moves left", "a blue square moves up", "a cyan cross moves down slowly")


def write_teacher(path: Path, seed: int = 0, **sizes: int) -> Path:
    """A Wan file of toy size in the bare layout, float32."""
    network = tiny_dit(seed, WanConfig(**{**SIZES, **sizes}))
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


def make_inputs(folder: Path) -> Path:
    """Teacher, caption encoder and prompts of a run, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_teacher(folder / "teacher.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = CaptionEncoder(CaptionEncoderConfig(text_dim=TEXT_DIM))
    save_caption_encoder(encoder, folder / "text.safetensors", {})
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return folder


def tiny_recipe(inputs: Path, **changes: Any) -> Recipe:
    """Two chunks of two latent frames and a third of one, diagonal 3-2, a window that evicts."""
    fields = dict(
        name="demo",
        teacher=str(inputs / "teacher.safetensors"),
        text_encoder=str(inputs / "text.safetensors"),
        prompts=str(inputs / "prompts.txt"),
        **SIZES,
        frames=5,
        height=4,
        width=4,
        frames_per_chunk=2,
        window=4,
        sink=1,
        steps="3,2",
        batch=4,
        micro_batch=4,
        updates=3,
        # Some gradients are zero but for rounding (a key's bias): without this, AdamW would make them full steps.
        epsilon=1e-2,
        learning_rate=1e-3,
        fake_score_learning_rate=1e-3,
        fake_score_updates=2,
        ema_start=1,
        ema_decay=0.5,
        gradient_clip=1.0,
        precision="float32",
        save_every=1,
        keep=9,
        rollout_frames=8,
        ode_clips=6,
        ode_steps=4,
        tensorboard=False,
    )
    return Recipe(**{**fields, **changes})


def trainer_of(recipe: Recipe, folder: Path, ranks: Ranks | None = None) -> train.Trainer:
    """The trainer of a run in `folder`; `ranks` are those of this process by default."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = join_ranks() if ranks is None else ranks
    return train.Trainer(recipe, train.read_all_prompts(recipe, folder, ranks), folder, ranks)


def flags(recipe: Recipe) -> list[str]:
    """The command line that gives this recipe."""
    out = ["--recipe", recipe.name]
    for name in (item for item in recipe.__dataclass_fields__ if item != "name"):
        out += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    return out


def command(recipe: Recipe, run: Path, *, ranks: int = 1) -> list[str]:
    """The command that trains it in processes of its own."""
    program = ["-m", "distillation.train", *flags(recipe), "--out", str(run), "--threads", "1"]
    if ranks == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def start(arguments: list[str], **options: Any) -> subprocess.Popen:
    """Starts a command in the repository with its output captured."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def train_here(recipe: Recipe, run: Path) -> dict[str, Tensor]:
    """Trains in this process; the last checkpoint's tensors."""
    train.run(recipe, run, join_ranks())
    return last_tensors(run)


def last_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint."""
    return run_folder.load_whole(run_folder.checkpoints(run)[-1][1], "")


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Over all tensors of two checkpoints, which must have the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def same(one: object, other: object) -> bool:
    """Whether two values of checkpoints are equal, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
