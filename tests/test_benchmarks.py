"""What the benchmarks put back of ComfyUI's own way still fits the code that it replaces, and makes the same clip."""

from __future__ import annotations

import argparse
import importlib

import comfy_host
import pytest

ROUNDING = 1e-3
"""Largest difference of latents of standard deviation 1 whose products were rounded in another order."""


@pytest.fixture
def benchmark(comfyui_dir, pytestconfig, monkeypatch):
    """`benchmark(name)`: the module."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    monkeypatch.setenv("DIAGONAL_TEST_GPU", "")  # wan.py sets it where there is a GPU
    return importlib.import_module


def require_the_same_clip(runs) -> None:
    """Every one of the clips [1, C, T, H, W] by name is the first one, nearly."""
    (_, shipped), *others = ((name, run()) for name, run in runs.items())
    assert shipped.std() > 0.1 and len(others) > 4
    for name, clip in others:
        assert (clip - shipped).abs().max() < ROUNDING, name


def test_gains_put_back_what_is_there(benchmark):
    gains, size = benchmark("gains"), benchmark("versus_ar_video").Size(128, 2, 4, 4)
    require_the_same_clip(gains.gains(comfy_host, size, 6))


def test_wans_gains_put_back_what_is_there(benchmark, monkeypatch):
    wan = benchmark("wan")
    monkeypatch.setattr(wan, "open_host", lambda **_: comfy_host)
    monkeypatch.setattr(wan, "CUDA", False)
    monkeypatch.setattr(wan, "CLIP_LATENTS", 6)
    chosen = argparse.Namespace(dynamic_vram=False, model="tiny", dtype="float32", width=32, height=32)
    require_the_same_clip(wan.gains(wan.Bench(chosen)))
