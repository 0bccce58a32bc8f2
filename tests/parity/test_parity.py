"""The authors' pipeline, reproduced: through the core's own DiT, and through the patch on ComfyUI's Wan.

Every pair NAME.safetensors + NAME.model.safetensors in DIAGONAL_PARITY_DIR (default: tests/data/parity) is one run.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.noise import INITIAL_STEP
from diagonal_sampler.sampler import sample_chunks
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

DIRECTORY = Path(os.environ.get("DIAGONAL_PARITY_DIR") or Path(__file__).resolve().parents[1] / "data" / "parity")
MODEL_SUFFIX = ".model.safetensors"
TOLERANCE = 1e-4
NAMES = sorted(path.name.removesuffix(MODEL_SUFFIX) for path in DIRECTORY.glob(f"*{MODEL_SUFFIX}"))


def test_there_are_reference_runs():
    assert NAMES, f"no NAME{MODEL_SUFFIX} in {DIRECTORY}"


@dataclass
class Run:
    """One reference run; tensors as [B, C, T, H, W]."""

    model_path: Path
    tensors: dict[str, torch.Tensor]
    settings: CausalSettings
    schedule: DiagonalSchedule

    @classmethod
    def load(cls, name: str) -> "Run":
        path = DIRECTORY / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        positions = "window" if name.startswith("relative_") else "absolute"
        settings = CausalSettings(
            frames_per_chunk=int(header["frames_per_chunk"]),
            window=int(header["window"]),
            sink=int(header["sink"]),
            positions=positions,
        )
        sigmas = tuple(tuple(t / 1000 for t in row) for row in json.loads(header["timesteps"]))
        schedule = DiagonalSchedule(sigmas=sigmas, context_mode="noisy", shift=float(header["shift"]))
        return cls(DIRECTORY / f"{name}{MODEL_SUFFIX}", load_file(path), settings, schedule)

    @property
    def noise(self) -> torch.Tensor:
        return self.tensors["noise"].transpose(1, 2)

    @property
    def latents(self) -> torch.Tensor:
        return self.tensors["latents"].transpose(1, 2)

    def draw(self, chunk: int, step: int, frames: int) -> torch.Tensor:
        if step == INITIAL_STEP:
            start = chunk * self.settings.frames_per_chunk
            return self.noise[:, :, start : start + frames]
        return self.tensors[f"eps.{chunk}.{step}"].transpose(1, 2)


@pytest.fixture(params=NAMES)
def run(request) -> Run:
    return Run.load(request.param)


@torch.no_grad()
def test_core_dit_equals_the_authors(run: Run):
    weights = load_file(run.model_path)
    model = WanDiT(WanConfig.from_state_dict(weights))
    model.load_state_dict(weights)
    frames = run.noise.shape[2]
    cache = KVCache(run.settings, frames)

    def denoise(x, at):
        condition = cache.condition("positive")
        flow = model(x, torch.full((x.shape[0],), 1000 * at.sigma), run.tensors["context"], cache=condition)
        return x - at.sigma * flow

    chunks = sample_chunks(
        denoise, run.draw, run.schedule, cache, frames=frames, frames_per_chunk=run.settings.frames_per_chunk
    )
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    assert (latents - run.latents).abs().max() < TOLERANCE


def test_comfyui_patch_equals_the_authors(run: Run, pack_module):
    import comfy.sd

    make_causal = pack_module("model_patches.causal").make_causal
    sample_latent = pack_module("model_patches.sampling").sample_latent
    model = make_causal(
        comfy.sd.load_diffusion_model(str(run.model_path), model_options={"dtype": torch.float32}), run.settings
    )
    latent_format = model.get_model_object("latent_format")
    conditioning = [[run.tensors["context"], {}]]
    result = sample_latent(
        model,
        conditioning,
        conditioning,
        {"samples": torch.zeros_like(run.noise)},
        run.schedule,
        seed=0,
        noise=run.draw,
    )
    latents = latent_format.process_in(result["samples"])
    assert (latents - run.latents).abs().max() < TOLERANCE
