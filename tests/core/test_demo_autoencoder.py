"""Geometry, exactness and files of the demo's autoencoder."""

from __future__ import annotations

import pytest
import torch

from diagonal_sampler.demo_autoencoder import (
    COMPONENTS,
    DemoAutoencoder,
    DemoAutoencoderConfig,
    load_demo_autoencoder,
    save_demo_autoencoder,
)
from diagonal_sampler.frames import latent_frames, pixel_frames

TINY = DemoAutoencoderConfig(inner_dim=8, outer_dim=8, blocks=1)


def autoencoder() -> DemoAutoencoder:
    torch.manual_seed(0)
    model = DemoAutoencoder(TINY)
    for weight in model.parameters():  # the residual branches start at zero: wake them
        torch.nn.init.normal_(weight, std=0.2)
    model.encoder.weight.mul_(0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("pixels", "latents", "back"), [(1, 1, 1), (4, 1, 1), (5, 2, 5), (8, 2, 5), (81, 21, 81)])
def test_frames_follow_wan(pixels: int, latents: int, back: int) -> None:
    assert latent_frames(pixels) == latents and pixel_frames(latents) == back
    model = autoencoder()
    z = model.encode(torch.rand(2, 3, pixels, 16, 24) * 2 - 1)
    assert z.shape == (2, 16, latents, 2, 3)
    assert model.decode(z).shape == (2, 3, back, 16, 24)


def test_decoding_chunk_by_chunk_equals_decoding_whole() -> None:
    model = autoencoder()
    z = torch.randn(2, 16, 8, 3, 2)
    whole = model.decode(z)
    parts = [model.decode(z[:, :, i : i + 3], has_first_frame=i == 0) for i in range(0, 8, 3)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-4)


def test_the_first_frame_is_encoded_alone() -> None:
    model = autoencoder()
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    torch.testing.assert_close(model.encode(clip)[:, :, :1], model.encode(clip[:, :, :1]), rtol=1e-3, atol=1e-4)


def test_wans_latent_format_turns_encoded_clips_into_standardised_latents() -> None:
    model = autoencoder()
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    z = model.encode(clip)
    process_in = (z - model.wan_mean.view(1, -1, 1, 1, 1)) / model.wan_std.view(1, -1, 1, 1, 1)
    group = clip[:, :, 1:5].movedim(2, 1).flatten(1, 2)
    torch.testing.assert_close(process_in[:, :, 1], model.encode_groups(group), rtol=1e-4, atol=1e-5)


def test_fitted_components_are_standardised_and_keep_what_is_there() -> None:
    """Patches made of as many directions as there are components lose nothing and come out with deviation 1."""
    torch.manual_seed(1)
    directions = torch.randn(COMPONENTS, 12, 8, 8) * torch.linspace(2, 0.5, COMPONENTS).view(-1, 1, 1, 1)
    cells = torch.einsum("nhwk,kcyx->nchywx", torch.randn(64, 4, 4, COMPONENTS), directions)
    groups = cells.reshape(64, 12, 32, 32) + 0.3
    model = autoencoder()
    assert model.fit_encoder(groups) == pytest.approx(1, abs=1e-5)
    z = model.encode_groups(groups)[:, :COMPONENTS]
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(COMPONENTS), rtol=0, atol=1e-3)
    flat = z.movedim(1, 0).flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(COMPONENTS), rtol=0, atol=1e-2)
    again = autoencoder()
    again.fit_encoder(groups)
    assert torch.equal(again.encoder.weight, model.encoder.weight)


def test_the_last_channels_tell_the_place_and_do_not_touch_the_picture() -> None:
    model = autoencoder()
    z = model.encode_groups(torch.rand(1, 12, 16, 24))
    torch.testing.assert_close(z[0, COMPONENTS], torch.tensor([-1.5, 0, 1.5]).expand(2, 3))
    torch.testing.assert_close(z[0, COMPONENTS + 1], torch.tensor([-1.5, 1.5])[:, None].expand(2, 3))
    moved = torch.cat([z[:, :COMPONENTS], torch.randn(1, 2, 2, 3)], dim=1)
    assert torch.equal(model.decode_groups(z), model.decode_groups(moved))


def test_shapes_that_do_not_fit_name_the_nearest_that_do() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match="30x64.*32x64"):
        model.encode(torch.zeros(1, 3, 1, 30, 64))
    with pytest.raises(ValueError, match="T at least 1"):
        model.encode(torch.zeros(1, 3, 0, 32, 64))
    with pytest.raises(ValueError, match="16, T, h, w"):
        model.decode(torch.zeros(1, 4, 1, 8, 8))


def test_a_saved_autoencoder_loads_equal_up_to_half_precision(tmp_path) -> None:
    model, path = autoencoder(), tmp_path / "vae.safetensors"
    save_demo_autoencoder(model, path, {})
    loaded = load_demo_autoencoder(path)
    z = torch.randn(1, 16, 2, 2, 2)
    torch.testing.assert_close(loaded.decode(z), model.decode(z), rtol=0, atol=0.02)
    assert [file.name for file in tmp_path.iterdir()] == ["vae.safetensors"]


def test_another_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no 'demo_autoencoder' entry .* not the demo's autoencoder; give the demo_a"):
        load_demo_autoencoder(tmp_path / "x.safetensors")
