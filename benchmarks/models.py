"""Random models of ComfyUI for the benchmarks: true sizes, weights that keep activations near 1."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests" / "helpers"), str(ROOT)]

import comfy_host  # noqa: E402

from diagonal_sampler.dit import WanConfig, WanDiT  # noqa: E402


def open_host() -> ModuleType:
    """Puts ComfyUI on the path and returns the module that loads parts of this pack as ComfyUI does.

    Raises:
        SystemExit: there is no ComfyUI.
    """
    host = comfy_host.find_comfyui()
    if host is None:
        raise SystemExit(comfy_host.NO_COMFYUI)
    comfy_host.put_on_path(host)
    return comfy_host


def random_state(config: WanConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Random weights of a bare Wan file."""
    with torch.device("meta"):
        shapes = WanDiT(config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = torch.empty(shape.shape, dtype=dtype, device=device)
        if value.ndim < 2:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = value[0].numel()
            value.normal_(std=0.02 if name.startswith("head") else fan_in**-0.5, generator=generator)
        state[name] = value
    return state


def random_wan(config: WanConfig, *, weight_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32):
    """A causal ComfyUI MODEL with random weights.

    Args:
        config: the network's sizes.
        weight_dtype: of the state dict that ComfyUI is given.
        dtype: in which ComfyUI keeps the weights; float8_e4m3fn computes in another.
    """
    import comfy.sd

    state = random_state(config, weight_dtype)
    metadata = {"config": f'{{"transformer": {{"causal_ar": true, "text_dim": {config.text_dim}}}}}'}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype}, metadata=metadata)


def random_taehv():
    """lighttaew2_1's architecture as ComfyUI loads it, with random weights."""
    import comfy.sd
    from comfy.taesd.taehv import TAEHV

    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in TAEHV(latent_channels=16).state_dict().items():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 100
        state[name] = torch.randn(value.shape, generator=generator) / fan_in**0.5
    return comfy.sd.VAE(sd=state)


def random_prompt(tokens: int, text_dim: int) -> list:
    """A CONDITIONING, as a text encoder would give it."""
    return [[torch.randn(1, tokens, text_dim, generator=torch.Generator().manual_seed(2)), {}]]
