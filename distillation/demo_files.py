"""The demo's files: their names, how each network in them is meant to be sampled, and how a changed one is written."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diagonal_sampler.captions import CaptionEncoder, load_caption_encoder
from diagonal_sampler.demo_autoencoder import DemoAutoencoder, load_demo_autoencoder
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.provenance import Provenance, causal_settings
from diagonal_sampler.schedule import DEFAULT_CONTEXT_SIGMA, DEFAULT_SHIFT, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings
from diagonal_sampler.weight_files import write_weights
from distillation.common import git_commit

log = logging.getLogger("demo_files")

TEACHER_FILE = "demo_teacher.safetensors"
STUDENT_FILE = "demo_student.safetensors"
FOLLOWER_FILE = "demo_follower.safetensors"
AUTOENCODER_FILE = "demo_autoencoder.safetensors"
TEXT_ENCODER_FILE = "demo_text_encoder.safetensors"
NETWORK_FILES = {"teacher": TEACHER_FILE, "student": STUDENT_FILE}
# How the shipped teacher is best sampled, by distillation.score.
TEACHER_STEPS = 12
TEACHER_CFG = 5.0
NOISE_KEY, KEPT_NOISE = "noise", "kept"  # header entry of a model that is sampled by Euler's method


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
        return TrainedFor(DiagonalSchedule.uniform(TEACHER_STEPS), settings, TEACHER_CFG)
    schedule = DiagonalSchedule(
        sigmas=found.sigmas,
        context_mode=found.context_mode or "clean",
        context_sigma=DEFAULT_CONTEXT_SIGMA if found.context_sigma is None else found.context_sigma,
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
    """The models of a folder; eval mode, no gradients.

    Args:
        dit: a file to take instead of the folder's teacher, which need not be there then.

    Raises:
        ValueError: the folder does not hold them.
    """
    file = dit or folder / TEACHER_FILE
    for needed in (file, folder / TEXT_ENCODER_FILE, folder / AUTOENCODER_FILE):
        if not needed.exists():
            raise ValueError(
                f"folder={os.fspath(folder)!r}: there is no {needed}; give the demo folder, or export a run to one by "
                "python -m distillation.train_demo --export"
            )
    encoder = load_caption_encoder(folder / TEXT_ENCODER_FILE)
    return load_dit(file), encoder, load_demo_autoencoder(folder / AUTOENCODER_FILE)


def write_changed(
    target: Path, weights: Mapping[str, Tensor], base: Path, done: str, note: str = "", **header: str
) -> Path:
    """Writes a network in fp16, under a temporary name first; `target`.

    The header is that of the file `base`, which it was made from, with `done` and `note` behind its recipe.

    Args:
        header: entries that are others than the base's.
    """
    with safe_open(base, framework="pt") as before:
        entries = dict(before.metadata() or {})
    entries["recipe"] = ". ".join(part for part in (entries.get("recipe", ""), done, note) if part)
    entries["git_commit"] = git_commit()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, {name: value.half().cpu() for name, value in weights.items()}, entries | header)
    log.info("%s: %.1f MB", target, target.stat().st_size / 1e6)
    return target
