"""Context frames: a start image and the end of a video enter the cache exactly as the core's loop does it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.joins import meet
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.sampler import sample_chunks
from diagonal_sampler.schedule import CONTEXT_MODES, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings
from distillation import sprites

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
SETTINGS = {"window": 6, "sink": 3}


@pytest.fixture(scope="module")
def context_frames(pack_module):
    return pack_module("model_patches.context_frames")


@pytest.fixture(scope="module")
def clip():
    """IMAGE [33, 64, 64, 3] of two sprites."""
    frames = sprites.render(sprites.sample_scenes(1, 4), torch.arange(33))[0]
    return frames.movedim(1, -1).float() / 255


@pytest.mark.parametrize("mode", CONTEXT_MODES)
@pytest.mark.parametrize("given", [1, 3, 5])
def test_given_frames_enter_the_cache_as_in_the_core(
    tiny_wan, tiny_wan_path, causal, prompt, sample_latent, given_frames, mode, given
):
    schedule = DiagonalSchedule(sigmas=DIAGONAL.sigmas, context_mode=mode)
    latent = torch.randn(1, 16, given, 4, 4, generator=torch.Generator().manual_seed(2))
    model = causal(tiny_wan, **SETTINGS)
    result = sample_latent(
        model, prompt(), [], {"samples": torch.zeros(1, 16, 11, 4, 4)}, schedule, seed=3, context=given_frames(latent)
    )["samples"]  # fmt: skip
    network = WanDiT(WanConfig.from_state_dict(load_file(tiny_wan_path)))
    network.load_state_dict(load_file(tiny_wan_path))
    scale = model.get_model_object("latent_format")
    cache = KVCache(CausalSettings(**SETTINGS), 11)

    def denoise(x, at):
        timestep = torch.full((1,), 1000 * at.sigma)
        x0 = x - at.sigma * network(x, timestep, prompt()[0][0], cache=cache.condition("only"))
        first = at.chunk == 0 and at.step >= 0  # one latent frame has values of its own, and nothing says which
        return meet(x0, context[:, :, -1:]) if first and given > 1 else x0

    with torch.no_grad():
        context = scale.process_in(latent)
        chunks = sample_chunks(
            denoise, SeededNoise(3, (1, 16, 4, 4)), schedule, cache, frames=11, frames_per_chunk=3, context=context
        )
        expected = torch.cat([context, *(chunk.latents for chunk in chunks)], dim=2)
    assert (scale.process_in(result) - expected).abs().max() < 1e-4
    assert torch.allclose(result[:, :, :given], latent, atol=1e-5)


def test_a_start_image_is_what_ar_video_i2v_makes_of_it(
    tiny_wan, causal, prompt, sample_latent, empty_latent, given_frames
):
    image = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    theirs = tiny_wan.clone()
    theirs.model_options["transformer_options"]["ar_config"] = {"initial_latent": image}
    expected = sample_latent(causal(theirs), prompt(), [], empty_latent(7), DIAGONAL, seed=3)["samples"]
    context = given_frames(image)
    found = sample_latent(causal(tiny_wan), prompt(), [], empty_latent(7), DIAGONAL, seed=3, context=context)["samples"]
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="remove one of them"):
        sample_latent(causal(theirs), prompt(), [], empty_latent(7), DIAGONAL, seed=3, context=context)


def test_behind_a_start_image_a_video_begins_at_the_level_of_a_still_of_it(
    tiny_wan, causal, prompt, sample_latent, empty_latent, given_frames, monkeypatch, pack_module
):
    sampling = pack_module("model_patches.sampling")
    image, still = torch.randn(2, 1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    asked = []
    monkeypatch.setattr(sampling, "meet", lambda x, level, *, still: asked.append((x, level, still)) or x)
    context = given_frames(image, still=still)
    sample_latent(causal(tiny_wan), prompt(), [], empty_latent(7), DIAGONAL, seed=3, context=context)
    assert len(asked) == len(DIAGONAL.sigmas[0]), "in each prediction of the first chunk that is made, and in no other"
    wanted = tiny_wan.get_model_object("latent_format").process_in(still)
    for denoised, level, of_a_still in asked:
        assert denoised.shape[2] == 3 and of_a_still
        torch.testing.assert_close(level, wanted)


def test_a_context_that_does_not_fit_is_refused(tiny_wan, causal, prompt, sample_latent, empty_latent, given_frames):
    def run(latent: torch.Tensor) -> None:
        sample_latent(causal(tiny_wan), prompt(), [], empty_latent(7), DIAGONAL, seed=3, context=given_frames(latent))

    with pytest.raises(ValueError, match="is 48x32 but the video is 32x32; scale it to 32x32"):
        run(torch.zeros(1, 16, 1, 4, 6))
    with pytest.raises(ValueError, match="7 latent frames and the given frames take 7"):
        run(torch.zeros(1, 16, 7, 4, 4))


@pytest.mark.parametrize(
    ("count", "asked", "taken"), [(1, 3, 1), (4, 3, 1), (33, 1, 1), (5, 3, 2), (33, 3, 3), (33, 9, 9)]
)
def test_the_last_frames_of_a_video_are_taken(context_frames, demo_vae, clip, count, asked, taken):
    found = context_frames.encode_context(demo_vae, clip[:count], asked)
    assert found.latent.shape == (1, 16, taken, 8, 8) and found.pixel_frames == 4 * (taken - 1) + 1
    again = demo_vae.decode(found.latent).reshape(-1, 64, 64, 3)
    assert len(again) == found.pixel_frames
    assert (found.still is None) == (taken > 1)
    assert (again - clip[count - found.pixel_frames : count]).square().mean() < 0.003


def test_transparent_images_and_wrong_sizes(context_frames, demo_vae, clip):
    with_alpha = torch.cat([clip[:1], torch.ones(1, 64, 64, 1)], dim=-1)
    plain = context_frames.encode_context(demo_vae, clip[:1], 3).latent
    assert torch.equal(context_frames.encode_context(demo_vae, with_alpha, 3).latent, plain)
    with pytest.raises(ValueError, match="width of the images is 56 pixels; it must be a multiple of 16.*48 and 64"):
        context_frames.encode_context(demo_vae, clip[:, :, :56], 3)
    with pytest.raises(ValueError, match="height of the images is 8 pixels; it must be a multiple of 16.*16 and 32"):
        context_frames.encode_context(demo_vae, clip[:, :8], 3)
    with pytest.raises(ValueError, match="latent_frames is 0"):
        context_frames.encode_context(demo_vae, clip, 0)
    with pytest.raises(ValueError, match="connect an image"):
        context_frames.encode_context(demo_vae, clip[:0], 1)
    with pytest.raises(ValueError, match="connect an image"):
        context_frames.encode_context(demo_vae, clip[0], 1)


def test_a_vae_of_pictures_is_refused(context_frames):
    pictures = SimpleNamespace(
        first_stage_model=torch.nn.Identity(),
        spacial_compression_encode=lambda: 8,
        encode=lambda images: torch.zeros(len(images), 4, 8, 8),
    )
    with pytest.raises(ValueError, match=r"The VAE \(Identity\) encodes pictures, not video"):
        context_frames.encode_context(pictures, torch.zeros(1, 64, 64, 3), 1)


def test_a_start_image_says_how_a_video_that_shows_it_is_encoded(context_frames, demo_vae, clip):
    found = context_frames.encode_context(demo_vae, clip[:3], 6)
    assert torch.equal(found.latent, demo_vae.encode(clip[2:3])), "of less than five frames, the last"
    assert torch.equal(found.still, demo_vae.encode(clip[2:3].repeat(5, 1, 1, 1))[:, :, 1:])


def test_the_node_gives_the_frames_and_how_many_to_drop(pack_module, demo_vae, clip):
    node = pack_module("nodes.context_frames").DiagonalContextFrames
    context, frames = node.execute(clip, demo_vae, 3).result
    assert context.latent.shape == (1, 16, 3, 8, 8) and frames == 9


def test_a_latent_is_continued_as_it_is(
    pack_module, tiny_wan, causal, prompt, sample_latent, empty_latent, given_frames
):
    """Chained samplers: neither decoded nor encoded between them."""
    node = pack_module("nodes.context_frames").DiagonalContextFrames
    model = causal(tiny_wan)
    first = sample_latent(model, prompt(), [], empty_latent(7), DIAGONAL, seed=3)
    context, frames = node.execute(latent=first, latent_frames=3).result
    assert frames == 9
    second = sample_latent(model, prompt(), [], empty_latent(9), DIAGONAL, seed=4, context=context)["samples"]
    given = given_frames(first["samples"][:, :, -3:])
    expected = sample_latent(model, prompt(), [], empty_latent(9), DIAGONAL, seed=4, context=given)["samples"]
    assert torch.equal(second, expected)
    torch.testing.assert_close(second[:, :, :3], first["samples"][:, :, -3:])


@pytest.mark.parametrize(
    ("frames", "asked", "taken", "still"), [(7, 3, 3, False), (2, 6, 2, False), (7, 1, 1, True), (1, 3, 1, False)]
)
def test_the_last_frames_of_a_latent_are_taken(context_frames, frames, asked, taken, still):
    """One of the middle of a video tells the level that what follows begins at; the first of a video has its own."""
    samples = torch.randn(2, 16, frames, 4, 4, generator=torch.Generator().manual_seed(2))
    found = context_frames.context_of(None, None, asked, {"samples": samples})
    assert torch.equal(found.latent, samples[:, :, -taken:])
    assert torch.equal(found.still, found.latent) if still else found.still is None


def test_images_or_a_latent_and_what_they_need(context_frames, demo_vae, clip):
    from comfy.nested_tensor import NestedTensor

    samples = torch.zeros(1, 16, 3, 8, 8)
    latent = {"samples": samples}
    with pytest.raises(ValueError, match="Both images and latent are connected.*remove the other"):
        context_frames.context_of(clip, demo_vae, 3, latent)
    with pytest.raises(ValueError, match="connect images and a vae, or a latent"):
        context_frames.context_of(None, demo_vae, 3)
    with pytest.raises(ValueError, match="images need the vae"):
        context_frames.context_of(clip, None, 3)
    for wrong in (samples[:, :, 0], samples[:, :, :0]):
        with pytest.raises(ValueError, match="latent is of shape .*connect a video's"):
            context_frames.take_context({"samples": wrong}, 3)
    with pytest.raises(ValueError, match="latent is of several parts"):
        context_frames.take_context({"samples": NestedTensor([samples, samples])}, 3)
    with pytest.raises(ValueError, match="latent_frames is 0"):
        context_frames.take_context(latent, 0)
    broken = samples.clone()
    broken[:, :, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in its last frames"):
        context_frames.take_context({"samples": broken}, 2)
    context_frames.take_context({"samples": broken}, 1)


def test_behind_given_frames_what_a_mask_protects_stays(tiny_wan, causal, prompt, sample_latent, given_frames):
    """The level of the first chunk is not moved there: it would move what is not to change."""
    video = torch.randn(1, 16, 7, 4, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 7, 4, 4)
    mask[..., 2:] = 1
    latent = {"samples": video, "noise_mask": mask}
    context = given_frames(video[:, :, :3])
    found = sample_latent(causal(tiny_wan), prompt(), [], latent, DIAGONAL, seed=3, context=context)["samples"]
    assert (found[..., :2] - video[..., :2]).abs().max() < 1e-4
    assert (found[:, :, 3:, :, 2:] - video[:, :, 3:, :, 2:]).abs().max() > 0.1
