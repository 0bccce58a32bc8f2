"""Models loaded, unloaded, patched with LoRAs and cast, in any order: each combination gives what it gave first."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import comfy.model_management
import fault_rows
import torch
from wan_files import DIMS, LAYOUTS, TEXT_LEN, tiny_wan, write_lora

from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

LAYOUT_NAMES = ("causvid, generator", "comfyui, bare", "krea, flat model.", "old torch format")
WARM_UP = 3
GROWTH_MB = 50.0


def resident_mb() -> float:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps for later is not held: some 100 MB in the end
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def held_bytes() -> int:
    """Of all tensors of this process that have memory: not torch's stand-ins, nor those on the meta device."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)
    tensors = [thing for thing in gc.get_objects() if type(thing) in plain]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided and tensor.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_row_swaps(pack_module, tmp_path):
    loading, sampling = pack_module("model_patches.loading"), pack_module("model_patches.sampling")
    make_causal = pack_module("model_patches.causal").make_causal
    schedule = DiagonalSchedule.preset("diagonal 4-3-2")
    lora = write_lora(tmp_path, "longlive, generator_lora")[0]
    files = {}
    for number, layout in enumerate(LAYOUT_NAMES):
        (folder := tmp_path / str(number)).mkdir()
        files[layout] = LAYOUTS[layout](folder, tiny_wan(0), tiny_wan(1))
    generator = torch.Generator().manual_seed(1)
    text = [[torch.randn(1, TEXT_LEN, DIMS.text_dim, generator=generator), {}]]
    latent = {"samples": torch.zeros(1, 16, 9, 4, 4)}
    first: dict[tuple, torch.Tensor] = {}
    kept: list = []
    resident: list[float] = []

    def sample(model) -> torch.Tensor:
        causal = make_causal(model, CausalSettings(frames_per_chunk=3, window=6, sink=3))
        return sampling.sample_latent(causal, text, text, latent, schedule, seed=1)["samples"]

    def check(number: int) -> float:
        rng = fault_rows.generator("swaps", number)
        layout, dtype = rng.choice(LAYOUT_NAMES), rng.choice(("default", "default", "fp8_e4m3fn", "fp8_e5m2"))
        strength = rng.choice((None, 0.5, 1.0, -1.0))
        model, info = loading.load_wan(files[layout], weight_dtype=dtype)
        plain = sample(model)
        if strength is not None:
            patched, _ = loading.apply_lora(model, lora, strength, info)
            result = sample(patched)
            assert not torch.equal(result, plain), f"{layout}, {dtype}: the LoRA did nothing"
        else:
            result = plain
        for key, value in (((dtype, None), plain), ((dtype, strength), result)):
            assert torch.equal(first.setdefault(key, value), value), f"{layout}, {key}: another output than at first"
        # Off and on again: the patched weights are put back.
        how = rng.choice(("unload", "free", "other", "nothing"))
        if how == "unload":
            comfy.model_management.unload_all_models()
        elif how == "free":
            comfy.model_management.free_memory(1e30, comfy.model_management.get_torch_device())
        elif how == "other" and kept:
            sample(kept[0])
        assert torch.equal(sample(model), plain), f"{layout}, {dtype}: after {how} another output"
        kept[:] = [model]
        resident.append(resident_mb())
        growth = resident[-1] - resident[min(WARM_UP, len(resident) - 1)]
        assert growth <= GROWTH_MB, f"{growth:.0f} MB more than after {WARM_UP} swaps"
        return max(0.0, growth)

    before = held_bytes()
    fault_rows.run_cases("swaps", check)
    first.clear()
    kept.clear()
    comfy.model_management.unload_all_models()
    assert held_bytes() - before < 1 << 20, "tensors of models stay behind"
