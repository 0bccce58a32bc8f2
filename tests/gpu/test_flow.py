"""Motion with a model on CUDA: carried frames and what an adapter is told are the CPU's to rounding, and the same at
every run."""

import pytest
import torch

from diagonal_sampler.flow import OpticalFlow, camera_flow, carry, tracks_flow
from diagonal_sampler.flow_adapter import AdapterField
from diagonal_sampler.schedule import DiagonalSchedule

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
SIZE, FRAMES = 8, 9


def test_a_picture_on_the_gpu_is_carried_as_one_on_the_cpu():
    picture = torch.rand(3, 120, 208, generator=torch.Generator().manual_seed(0))
    field = camera_flow(12, 120, 208, pan=(1.3, -0.7), zoom=-1.0)
    runs = [list(carry(picture.to(device), field, 0, 12)) for device in ("cuda", "cuda", "cpu")]
    for found, again, wanted in zip(*runs, strict=True):
        for part in ("picture", "commanded", "entered"):
            assert torch.equal(getattr(found, part), getattr(again, part)), part
            differs = (getattr(found, part).cpu().float() - getattr(wanted, part).float()).abs() > 1e-3
            assert differs.float().mean() < 1e-3, part  # a threshold may fall the other way


def test_a_picture_is_carried_without_waiting_for_the_gpu():
    picture = torch.rand(3, 120, 208, generator=torch.Generator().manual_seed(0)).cuda()
    path = torch.stack([30 + 2 * torch.arange(13.0), torch.full((13,), 60.0)], -1)[:, None]
    fields = tracks_flow(path, None, 120, 208), camera_flow(12, 120, 208, zoom=-1.0)
    for field in fields:
        list(carry(picture, field, 0, 12))
        torch.cuda.set_sync_debug_mode("error")
        try:
            frames = list(carry(picture, field, 0, 12))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(frames) == 12 and all(frame.picture.isfinite().all() for frame in frames)


def test_an_adapter_is_told_the_same_on_the_gpu_without_waiting_for_it():
    noise = torch.randn(12, 16, 26, 2, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise.movedim(-1, 1), (128, 208), mode="bicubic").movedim(1, -1)
    valid = smooth[..., 0] > -0.5
    field = AdapterField(OpticalFlow(smooth.contiguous(), valid), 15, 26)
    wanted = field.features(0, 4)
    field.features(0, 4, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = field.features(0, 4, "cuda")
        again = field.features(0, 4, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, again)
    assert ((found.cpu() - wanted).abs() > 0.02).float().mean() < 0.01  # a threshold may fall the other way


@pytest.mark.parametrize("mode", ["reference"])
def test_the_same_seed_gives_the_same_video(mode, gpu_pack, tiny_wan, prompt):
    sampling, control = gpu_pack("model_patches.sampling"), gpu_pack("model_patches.flow_control")
    demo = gpu_pack("nodes.demo_loader").DEMO_DIRECTORY
    vae = gpu_pack("model_patches.demo").load_demo_vae(demo / "demo_autoencoder.safetensors")
    field = camera_flow(4 * (FRAMES - 1), 8 * SIZE, 8 * SIZE, pan=(-1.3, 0.7))
    conditioning = control.FlowConditioning(optical_flow=field, mode=mode, vae=vae)
    model, latent = tiny_wan(torch.bfloat16), {"samples": torch.zeros(1, 16, FRAMES, SIZE, SIZE)}
    first, again = (
        sampling.sample_latent(model, prompt, [], latent, DIAGONAL, seed=1, optical_flow=conditioning)["samples"]
        for _ in range(2)
    )
    assert first.isfinite().all() and torch.equal(first, again)
