"""What only a GPU can show. `pytest tests/gpu`, on its own: the other tests have ComfyUI on the CPU in this process.

Every test is skipped, with the reason, where there is no GPU or no ComfyUI on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import comfy_host
import pytest
import torch

HERE = Path(__file__).resolve().parent
NO_GPU = "needs a CUDA GPU"
CPU_HOST = "other tests have set ComfyUI to the CPU in this process; run `pytest tests/gpu` on its own"
TEXT_TOKENS, TEXT_DIM = 16, 64


def _on_its_own(config: pytest.Config) -> bool:
    paths = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return all(path.is_relative_to(HERE) for path in paths)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Before the host is put on the path, which settles its device.
    if torch.cuda.is_available() and _on_its_own(config) and "comfy.cli_args" not in sys.modules:
        comfy_host.USE_GPU = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def gpu_pack(comfyui_dir: Path):
    """`gpu_pack("model_patches.sampling")`: a module of the pack in a ComfyUI that computes on the GPU."""
    if not comfy_host.USE_GPU:
        pytest.skip(CPU_HOST)
    return comfy_host.pack_module


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32: torch's default rounds their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tiny_wan(gpu_pack, request):
    """`tiny_wan(dtype, **settings)`: a causal MODEL of two blocks with weights of this dtype."""
    import comfy.sd

    from diagonal_sampler.settings import CausalSettings

    make_causal = gpu_pack("model_patches.causal").make_causal
    path = request.config.rootpath / "tests" / "data" / "parity" / "diag_7.model.safetensors"

    def load(dtype: torch.dtype = torch.float32, **settings):
        model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
        return make_causal(model, CausalSettings(**settings))

    return load


@pytest.fixture
def prompt() -> list:
    """A CONDITIONING of random text embeddings."""
    return [[torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(0)), {}]]


@pytest.fixture(autouse=True)
def unloaded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing of a test stays on the GPU."""
    yield
    if "comfy.model_management" in sys.modules and comfy_host.USE_GPU:
        sys.modules["comfy.model_management"].unload_all_models()
