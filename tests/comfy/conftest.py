"""A tiny causal Wan model and short ways to sample it, in process.

This file may be read before ComfyUI is on the path: fixtures import it.
"""

import pytest
import torch

from diagonal_sampler.settings import CausalSettings

TINY_WAN = "diag_7.model.safetensors"
CHANNELS = 16
TEXT_TOKENS = 16
TEXT_DIM = 64


def _unload() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()


@pytest.fixture(scope="session")
def tiny_wan_path(request):
    """A Wan file of 2 blocks, width 128: random weights in the true layout."""
    return request.config.rootpath / "tests" / "data" / "parity" / TINY_WAN


@pytest.fixture
def tiny_wan(pack, tiny_wan_path):
    """A MODEL of ComfyUI's causal class, float32."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(tiny_wan_path), model_options={"dtype": torch.float32})


@pytest.fixture
def causal(pack_module):
    """`causal(model, **settings)`: the MODEL made causal; by default it attends to the whole clip."""
    make_causal = pack_module("model_patches.causal").make_causal

    def make(model, **settings):
        return make_causal(model, CausalSettings(**{"window": -1, "sink": 0, **settings}))

    return make


@pytest.fixture(scope="module")
def demo_vae(pack_module):
    demo = pack_module("nodes.demo_loader").DEMO_DIRECTORY
    yield pack_module("model_patches.demo").load_demo_vae(demo / "demo_autoencoder.safetensors")
    _unload()


@pytest.fixture
def unload():
    """Leaves no model loaded."""
    yield
    _unload()


@pytest.fixture
def prompt():
    """`prompt(seed, tokens)`: a CONDITIONING of random text embeddings."""

    def make(seed: int = 0, tokens: int = TEXT_TOKENS, **extra):
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, TEXT_DIM, generator=generator), extra]]

    return make


@pytest.fixture
def empty_latent():
    """`empty_latent(frames, height, width)`: an empty LATENT, sizes in the latent."""

    def make(frames: int = 9, height: int = 4, width: int = 4, batch: int = 1):
        return {"samples": torch.zeros(batch, CHANNELS, frames, height, width)}

    return make


@pytest.fixture
def sample_latent(pack_module):
    return pack_module("model_patches.sampling").sample_latent


@pytest.fixture(scope="session")
def given_frames(pack_module):
    """A function from a latent, and perhaps that of a still, to frames that a clip begins with."""
    made = pack_module("model_patches.context_frames").ContextFrames
    return lambda latent, still=None: made(latent=latent, still=still)
