"""One of each sprite: copies are painted over, the heavier one and everything else stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagonal_sampler.captions import SpriteSpec, parse_caption
from diagonal_sampler.demo_autoencoder import DemoAutoencoder
from distillation import copies, demo_files, score, sprites
from distillation.recipes import DEMO
from distillation.samples import decode_frames, encode_frames

CAPTION = "a red circle moves right fast and a blue cross moves up slowly"
FRAMES = torch.arange(9)


@pytest.fixture(scope="module")
def autoencoder() -> DemoAutoencoder:
    return demo_files.load_models(DEMO)[2]


def drawn(first: tuple[float, float], second: tuple[float, float], specs: list[SpriteSpec] | None = None) -> Tensor:
    """[1, 9, 3, 64, 64] in 0..255, the sprites at these centres in the first frame, on the same ground."""
    scenes = sprites.make_scenes([specs or parse_caption(CAPTION)], 5)
    scenes = replace(
        scenes,
        start=torch.tensor([[first, second]]),
        radius=torch.full_like(scenes.radius, 7.5),
        background=torch.full_like(scenes.background, 28.0),
    )
    return sprites.render(scenes, FRAMES).float()


def coded(autoencoder: DemoAutoencoder, frames: Tensor) -> Tensor:
    return encode_frames(autoencoder, (frames / 127.5 - 1).movedim(2, 1))


def doubled(share: float) -> Tensor:
    """The red circle at y = 20, and a second one at y = 46 of which `share` is seen; the first has the rest."""
    one, other = drawn((10, 20), (52, 34)), drawn((10, 46), (52, 34))
    return (1 - share) * one + share * other


@pytest.mark.parametrize(("share", "stays"), [(0.35, 20), (0.65, 46)])
def test_the_paler_copy_is_painted_over(autoencoder, share, stays):
    latents = coded(autoencoder, doubled(share))
    repaired = copies.remove_copies(autoencoder, latents, [parse_caption(CAPTION)])
    before, after = (score.find_blobs(decode_frames(autoencoder, each)[0]) for each in (latents, repaired))
    assert (before.centroid("red")[:, 1] - stays).abs().min() > 4  # between the two
    torch.testing.assert_close(after.centroid("red")[:, 1], torch.full((9,), float(stays)), atol=1, rtol=0)
    torch.testing.assert_close(after.centroid("red")[:, 0], 10 + 2.25 * FRAMES, atol=1, rtol=0)
    for measure in ("centroid", "area"):
        old, new = (getattr(blobs, measure)("blue") for blobs in (before, after))
        torch.testing.assert_close(new, old, atol=1, rtol=0.1)
    torch.testing.assert_close(after.background, before.background, atol=2, rtol=0)


def test_what_nobody_asked_for_goes(autoencoder):
    latents = coded(autoencoder, drawn((10, 20), (52, 34)))
    one = [parse_caption(CAPTION)[0]]
    after = score.find_blobs(decode_frames(autoencoder, copies.remove_copies(autoencoder, latents, [one]))[0])
    assert after.area("blue").max() < 12 and after.area("red").min() > 100


def test_a_true_clip_stays(autoencoder):
    scenes = sprites.sample_scenes(20, seed=31)
    latents = encode_frames(autoencoder, sprites.to_pixels(sprites.render(scenes, FRAMES)))
    repaired = copies.remove_copies(autoencoder, latents, scenes.specs)
    assert float((repaired - latents).square().mean()) < 0.01 * float(latents.square().mean())
    # Whatever is beside it: batches are taken in parts.
    torch.testing.assert_close(copies.remove_copies(autoencoder, latents[17:], scenes.specs[17:]), repaired[17:])


def test_a_clip_without_its_sprite_is_left_alone(autoencoder):
    latents = coded(autoencoder, drawn((10, 20), (52, 34)))
    specs = parse_caption("a green circle moves right fast and a blue cross moves up slowly")
    assert torch.equal(copies.remove_copies(autoencoder, latents, [specs]), latents)


def test_the_start_is_found_along_the_way():
    alpha = torch.zeros(5, 64, 64)
    for time in range(5):
        alpha[time, 20:35, 40 - 2 * time : 55 - 2 * time] = 1.0
        alpha[time, 44:59, 10 + 2 * time : 25 + 2 * time] = 1.0  # as heavy, but the other way
    assert copies.heaviest_start(alpha, (-2.0, 0.0), torch.arange(5)) == (47, 27)
    assert copies.heaviest_start(alpha, (2.0, 0.0), torch.arange(5)) == (17, 51)
