"""Random models of ComfyUI for the benchmarks: true sizes, weights that keep activations near 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests" / "helpers"), str(ROOT)]

import comfy_host  # noqa: E402

from diagonal_sampler.dit import WanConfig, WanDiT  # noqa: E402


def open_host(*, dynamic_vram: bool = False) -> ModuleType:
    """Puts ComfyUI on the path and returns the module that loads parts of this pack as ComfyUI does.

    Args:
        dynamic_vram: start ComfyUI's DynamicVRAM as its main.py does on an NVIDIA card.

    Raises:
        SystemExit: there is no ComfyUI, or no DynamicVRAM where it is asked for.
    """
    host = comfy_host.find_comfyui()
    if host is None:
        raise SystemExit(comfy_host.NO_COMFYUI)
    if dynamic_vram:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # its library must be there before ComfyUI's modules look for it
    comfy_host.put_on_path(host)
    if dynamic_vram:
        _start_dynamic_vram()
    return comfy_host


def _start_dynamic_vram() -> None:
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    devices = [(device.index, 0) for device in comfy.model_management.get_all_torch_devices()]
    if not comfy_aimdo.control.init_devices(devices):
        raise SystemExit("comfy-aimdo does not work here: no DynamicVRAM.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


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


def random_wan(
    config: WanConfig,
    *,
    weight_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    fast_fp8: bool = False,
):
    """A causal ComfyUI MODEL with random weights.

    Args:
        config: the network's sizes.
        weight_dtype: of the state dict that ComfyUI is given.
        dtype: in which ComfyUI keeps the weights; float8_e4m3fn computes in another.
        fast_fp8: with float8_e4m3fn, products are computed in it too, as fp8_e4m3fn_fast of Load Diffusion Model.
    """
    import comfy.sd

    # Fourteen billion numbers take a CPU minutes.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {name: value.cpu() for name, value in random_state(config, weight_dtype, device).items()}
    metadata = {"config": f'{{"transformer": {{"causal_ar": true, "text_dim": {config.text_dim}}}}}'}
    options = {"dtype": dtype, "fp8_optimizations": fast_fp8}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options=options, metadata=metadata)


def without_patches(model: Any, chosen: Callable[[str], bool]) -> Any:
    """A clone of a causal MODEL without those of its object patches whose paths are chosen."""
    patched = model.clone()
    for path in [path for path in patched.object_patches if chosen(path)]:
        del patched.object_patches[path]
    return patched


def random_taehv(dtype: torch.dtype = torch.float32):
    """lighttaew2_1's architecture as ComfyUI loads it, with random weights given in `dtype`."""
    import comfy.sd
    from comfy.taesd.taehv import TAEHV

    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in TAEHV(latent_channels=16).state_dict().items():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 100
        state[name] = (torch.randn(value.shape, generator=generator) / fan_in**0.5).to(dtype)
    return comfy.sd.VAE(sd=state)


def random_prompt(tokens: int, text_dim: int) -> list:
    """A CONDITIONING, as a text encoder would give it."""
    return [[torch.randn(1, tokens, text_dim, generator=torch.Generator().manual_seed(2)), {}]]


def resident_bytes() -> int:
    """Resident memory of this process, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
