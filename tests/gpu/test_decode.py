"""Streaming decode on a second CUDA stream: the whole clip's frames, in pinned memory, beside other work."""

from __future__ import annotations

import pytest
import torch

CHANNELS, FRAMES, HEIGHT, WIDTH = 16, 7, 4, 6
TOLERANCE = 1e-3
"""Between chunks and whole clip: cuDNN takes other algorithms for other sizes."""
BUSY_CYCLES = 4_000_000_000
"""Over a second of a GPU's clock: far more than a tiny decoder takes that has run before."""


def random_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 100
        state[name] = 1 + 0.1 * noise if name.endswith("gamma") else noise / fan_in**0.5
    return state


@pytest.fixture(params=["wan", "taehv", "demo"])
def vae(request, gpu_pack):
    import comfy.ldm.wan.vae
    import comfy.sd
    import comfy.taesd.taehv

    if request.param == "demo":
        path = request.config.rootpath / "demo" / "demo_autoencoder.safetensors"
        return gpu_pack("model_patches.demo").load_demo_vae(path)
    if request.param == "wan":
        model = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=CHANNELS, temperal_downsample=[False, True, True])
    else:
        model = comfy.taesd.taehv.TAEHV(latent_channels=CHANNELS)
    return comfy.sd.VAE(sd=random_state(model), dtype=torch.float32)


@pytest.fixture
def stream_decoder(gpu_pack):
    return gpu_pack("model_patches.stream_decode").stream_decoder


def clip(device: str = "cuda") -> torch.Tensor:
    shape = (1, CHANNELS, FRAMES, HEIGHT, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


@torch.inference_mode()
def whole(vae) -> torch.Tensor:
    return vae.decode(clip("cpu")).cpu()


@pytest.mark.parametrize("pinned", [True, False])
def test_chunks_equal_the_whole_clip_although_their_latents_are_overwritten_at_once(
    vae, stream_decoder, exact_float32, gpu_pack, monkeypatch, pinned
):
    monkeypatch.setattr(gpu_pack("diagonal_sampler.noise"), "_may_pin", pinned)
    wanted = whole(vae)
    assert vae.device.type == "cuda" and wanted.std() > 0.01
    with stream_decoder(vae) as decoder:
        handles = []
        for chunk in clip().split((3, 3, 1), dim=2):
            latents = chunk.clone()
            handles.append(decoder.submit(latents))
            latents.fill_(float("nan"))
        images = [handle.result() for handle in handles]
    assert all(image.is_pinned() is pinned and image.device.type == "cpu" for image in images)
    assert (torch.cat(images, dim=1) - wanted).abs().max() < TOLERANCE


def test_a_chunk_is_decoded_while_the_samplers_stream_is_busy(vae, stream_decoder):
    with stream_decoder(vae) as decoder:
        first, second = clip().split((3, 4), dim=2)
        decoder.submit(first).result()  # loads the VAE and prepares kernels
        warm = decoder.submit(second)
        warm.result()
        decoder.reset()
        decoder.submit(first).result()
        torch.cuda.synchronize()
        handle = decoder.submit(second)
        torch.cuda._sleep(BUSY_CYCLES)
        busy = torch.cuda.Event()
        busy.record()
        handle.result()
        assert not busy.query()  # the chunk is here and the other stream still at work
    torch.cuda.synchronize()


@pytest.mark.parametrize("large", [True, False])
def test_an_interrupt_frees_a_large_state_and_keeps_a_small_one(
    vae, large, gpu_pack, stream_decoder, exact_float32, monkeypatch
):
    import comfy.model_management

    monkeypatch.setattr(gpu_pack("model_patches.stream_decode"), "MOST_KEPT_BYTES", 0 if large else 1 << 30)
    wanted = whole(vae)
    with stream_decoder(vae) as decoder:
        first = decoder.decode(clip()[:, :, :3])
        held = decoder.state_bytes
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decoder.decode(clip()[:, :, 3:])
        assert decoder.state_bytes == (0 if large else held)
        if not large:
            rest = decoder.decode(clip()[:, :, 3:])
            assert (torch.cat([first, rest], dim=1) - wanted).abs().max() < TOLERANCE
