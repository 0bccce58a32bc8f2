"""Optical flow through the chunk sampler: each mode equals the core's, and no flow is exactly as before."""

import logging
import re
from concurrent.futures import Future
from copy import copy
from dataclasses import replace

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.taesd.taehv import TAEHV
from safetensors.torch import load_file, save_file

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.flow import OpticalFlow, camera_flow
from diagonal_sampler.flow_adapter import adapter_features
from diagonal_sampler.flow_noise import FlowNoise
from diagonal_sampler.flow_reference import FlowReference, weaker_start
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.sampler import Forward, sample_chunks
from diagonal_sampler.schedule import DEMO_PRESET, DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

DIAGONAL = DiagonalSchedule.preset("diagonal 4-3-2")
FRAMES, SIZE = 8, 8
SHAPE = (1, 16, FRAMES, SIZE, SIZE)
SETTINGS = {"window": 6, "sink": 3}
PAN = camera_flow(4 * (FRAMES - 1), 8 * SIZE, 8 * SIZE, pan=(-2, 1))


@pytest.fixture(scope="module")
def control(pack_module):
    return pack_module("model_patches.flow_control")


@pytest.fixture
def with_adapter(pack_module, tiny_wan_path, tmp_path):
    """`with_adapter(scale)`: the tiny Wan as a file with an adapter of random weights, loaded by this pack."""

    def load(scale: float):
        generator = torch.Generator().manual_seed(9)
        weights = load_file(tiny_wan_path)
        weights["flow_embedding.weight"] = scale * torch.randn(128, 4, 1, 2, 2, generator=generator)
        weights["flow_embedding.bias"] = scale * torch.randn(128, generator=generator)
        path = tmp_path / f"adapter_{scale:g}.safetensors"
        save_file(weights, path, metadata={"config": '{"transformer": {"causal_ar": true, "text_dim": 64}}'})
        return pack_module("model_patches.loading").load_wan(path)[0], weights

    return load


@pytest.fixture
def sample(prompt, sample_latent):
    def run(model, optical_flow=None, frames=FRAMES, **options):
        latent = {"samples": torch.zeros(1, 16, frames, SIZE, SIZE)}
        return sample_latent(model, prompt(), [], latent, DIAGONAL, seed=3, optical_flow=optical_flow, **options)[
            "samples"
        ]

    return run


def in_model_space(model, samples):
    return model.get_model_object("latent_format").process_in(samples)


def core(weights, text, schedule, noise, *, features=None, chunks=range(3), reference=None, strength=1.0):
    """The same run on the core's DiT."""
    network = WanDiT(WanConfig.from_state_dict(weights))
    network.load_state_dict(weights)
    if strength != 1:
        with torch.no_grad():
            network.flow_embedding.weight.mul_(strength)
            network.flow_embedding.bias.mul_(strength)
    cache = KVCache(CausalSettings(**SETTINGS), FRAMES)

    def denoise(x, at):
        told = features is not None and at.chunk in chunks
        rows = features[:, :, at.start_frame : at.start_frame + at.frames] if told else None
        flow = network(x, torch.full((1,), 1000 * at.sigma), text, cache=cache.condition("only"), optical_flow=rows)
        x0 = x - at.sigma * flow
        return x0 if reference is None else reference.blend(x0, at)

    clip = []
    with torch.no_grad():
        source = None if reference is None else reference.source
        for chunk in sample_chunks(denoise, noise, schedule, cache, frames=FRAMES, frames_per_chunk=3, source=source):
            clip.append(chunk.latents)
            if reference is not None:
                reference.finished(chunk.latents)
    return torch.cat(clip, dim=2)


def test_strength_0_and_no_flow_are_bit_identical(tiny_wan, causal, sample, control, demo_vae):
    model = causal(tiny_wan, **SETTINGS)
    plain = sample(model)
    off = control.FlowConditioning(optical_flow=PAN, strength=0.0, vae=demo_vae)
    assert torch.equal(sample(model, off), plain)
    on = sample(model, control.FlowConditioning(optical_flow=PAN, vae=demo_vae))
    assert torch.equal(on[:, :, :3], plain[:, :, :3]), "nothing precedes the first chunk"
    assert (on[:, :, 3:] - plain[:, :, 3:]).abs().max() > 0.1
    assert torch.equal(sample(model), plain), "the MODEL is as before"


def test_a_zero_adapter_is_bit_identical_to_none(with_adapter, causal, sample, control):
    model, _ = with_adapter(0.0)
    model = causal(model, **SETTINGS)
    assert torch.equal(sample(model, control.FlowConditioning(optical_flow=PAN)), sample(model))


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_adapter_equals_the_core(with_adapter, causal, sample, prompt, control, strength):
    loaded, weights = with_adapter(0.5)
    model = causal(loaded, **SETTINGS)
    plain = sample(model)
    result = sample(model, control.FlowConditioning(optical_flow=PAN, strength=strength))
    features = adapter_features(PAN, FRAMES, SIZE, SIZE)
    noise = SeededNoise(3, (1, 16, SIZE, SIZE))
    expected = core(weights, prompt()[0][0], DIAGONAL, noise, features=features, strength=strength)
    assert (in_model_space(model, result) - expected).abs().max() < 1e-4
    assert (result - plain).abs().max() > 0.05
    assert torch.equal(sample(model), plain), "the run's patch is gone"


@pytest.mark.parametrize(("last_chunk", "chunks"), [(2, [1]), (0, [1, 2])])
def test_the_adapter_moves_the_chunks_that_it_is_told_to(
    with_adapter, causal, sample, prompt, control, last_chunk, chunks
):
    loaded, weights = with_adapter(0.5)
    some = control.FlowConditioning(optical_flow=PAN, first_chunk=2, last_chunk=last_chunk)
    model = causal(loaded, **SETTINGS)
    noise, features = SeededNoise(3, (1, 16, SIZE, SIZE)), adapter_features(PAN, FRAMES, SIZE, SIZE)
    expected = core(weights, prompt()[0][0], DIAGONAL, noise, features=features, chunks=chunks)
    assert (in_model_space(model, sample(model, some)) - expected).abs().max() < 1e-4


def test_a_chunks_motion_is_made_once_for_all_its_forwards(
    with_adapter, causal, sample_latent, control, prompt, monkeypatch
):
    """For its steps and its cache pass."""
    made, usual = [], control.AdapterField.features
    monkeypatch.setattr(control.AdapterField, "features", lambda field, *at: made.append(at[:2]) or usual(field, *at))
    clean = DiagonalSchedule.preset("self forcing", steps=(2,))
    model, flow = causal(with_adapter(0.5)[0]), control.FlowConditioning(optical_flow=PAN)
    sample_latent(model, prompt(), [], {"samples": torch.zeros(SHAPE)}, clean, seed=3, optical_flow=flow)
    assert made == [(0, 3), (3, 3), (6, 2)]


def test_a_recache_writes_each_chunk_with_its_own_motion(
    with_adapter, causal, sample_latent, control, pack_module, prompt
):
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, text):
            return prompt()  # of any text: what is written again is what was there

    flow = control.FlowConditioning(optical_flow=PAN, last_chunk=1)
    model, clean = causal(with_adapter(0.5)[0]), DiagonalSchedule.preset("self forcing", steps=(2,))

    def clip(text, optical_flow=flow):
        positive = pack_module("model_patches.prompts").schedule_prompts(
            Clip(), text, fps=16.0, switch="recache", blend_chunks=1
        )
        latent = {"samples": torch.zeros(SHAPE)}
        return sample_latent(model, positive, [], latent, clean, seed=3, optical_flow=optical_flow)["samples"]

    plain = clip("0: a")
    assert (clip("0: a\nchunk 3: b") - plain).abs().max() < 1e-4
    assert (clip("0: a", None) - plain)[:, :, 6:].abs().max() > 0.01, "the last chunk sees how the first one moved"


def test_adapter_under_guidance_and_over_some_chunks(with_adapter, causal, sample, prompt, sample_latent, control):
    model = causal(with_adapter(0.5)[0], **SETTINGS)
    latent = {"samples": torch.zeros(SHAPE)}
    plain, guided = (
        sample_latent(
            model, prompt(0), prompt(5), latent, DIAGONAL, seed=3, cfg=3.0, optical_flow=flow
        )["samples"]
        for flow in (None, control.FlowConditioning(optical_flow=PAN, first_chunk=2, last_chunk=2))
    )  # fmt: skip
    assert torch.equal(plain[:, :, :3], guided[:, :, :3])
    assert (plain[:, :, 3:6] - guided[:, :, 3:6]).abs().max() > 0.02


def test_reference_equals_the_core(tiny_wan, tiny_wan_path, causal, sample, prompt, control, demo_vae):
    model = causal(tiny_wan, **SETTINGS)
    conditioning = control.FlowConditioning(optical_flow=PAN, mode="reference", blend=0.8, strength=0.5, vae=demo_vae)
    result = sample(model, conditioning)
    coding = demo_coding(demo_vae, model.get_model_object("latent_format"))
    start_sigma = weaker_start(0.733, 0.5, DIAGONAL.shift)
    reference = FlowReference(PAN, DIAGONAL, (3, 3, 2), **coding, blend=0.4, start_sigma=start_sigma)
    noise = SeededNoise(3, (1, 16, SIZE, SIZE))
    expected = core(load_file(tiny_wan_path), prompt()[0][0], reference.schedule, noise, reference=reference)
    assert (in_model_space(model, result) - expected).abs().max() < 1e-4


def test_strength_is_a_dial_in_mode_reference(tiny_wan, causal, sample, control, demo_vae):
    """Almost no motion is almost none at all: the noise level that chunks start at moves with it, too."""
    model = causal(tiny_wan, **SETTINGS)
    plain = sample(model)
    away = [
        (sample(model, control.FlowConditioning(optical_flow=PAN, strength=strength, vae=demo_vae)) - plain).abs().max()
        for strength in (1e-5, 0.5, 1.0)
    ]
    assert away[0] < 0.01 * away[2] and away[0] < away[1], away


def random_tiny_vae(latent_channels: int, dtype: torch.dtype) -> comfy.sd.VAE:
    """A TAEHV of random weights in a file of this dtype; it computes in float32."""
    generator = torch.Generator().manual_seed(2)
    weights = TAEHV(latent_channels=latent_channels).state_dict()
    made = {
        name: torch.randn(w.shape, generator=generator) / max(1, w[0].numel()) ** 0.5 for name, w in weights.items()
    }
    return comfy.sd.VAE(sd={name: w.to(dtype) for name, w in made.items()}, dtype=torch.float32)


def test_a_float16_tiny_vae_carries_frames_in_wans_scale(tiny_wan, causal, control, caplog):
    """ComfyUI takes it for HunyuanVideo's; its layers take what the model makes, unscaled."""
    half = random_tiny_vae(16, torch.float16)
    plain = comfy.sd.VAE(sd=half.first_stage_model.state_dict(), dtype=torch.float32)
    conditioning = control.FlowConditioning(optical_flow=PAN, mode="reference", vae=half)
    with caplog.at_level(logging.WARNING):
        run = control.FlowRun(conditioning, causal(tiny_wan), SHAPE, DIAGONAL, (3, 3, 2))
    assert sum("taew2_1" in record.message for record in caplog.records) == 1
    generator = torch.Generator().manual_seed(1)
    latents, frames = torch.randn(1, 16, 3, SIZE, SIZE, generator=generator), torch.rand(1, 3, 5, 64, 64)
    assert (run._decode(latents) - plain.decode(latents).movedim(-1, 1)).abs().max() < 1e-3
    assert (run._encode(frames) - plain.encode(frames[0].movedim(0, -1))).abs().max() < 1e-3


def test_a_vae_that_does_not_fit_is_refused_before_anything_is_made(
    tiny_wan, with_adapter, causal, sample, control, demo_vae
):
    """Its error would come when the first chunk has been made."""
    pictures, coarse = copy(demo_vae), copy(demo_vae)
    pictures.latent_dim = 2
    coarse.downscale_ratio = (demo_vae.downscale_ratio[0], 16, 16)
    other = random_tiny_vae(48, torch.float32)
    begun = []
    for model, mode in ((causal(tiny_wan), "reference"), (causal(with_adapter(0.5)[0]), "adapter+blend")):
        for vae, message in (
            (pictures, r"The VAE \(DemoAutoencoder\) encodes pictures, not video; connect the model's own"),
            (other, r"The VAE \(TAEHV\) makes 48 latent channels of 16x16 pixels each, and the model takes 16 of 8x8"),
            (coarse, "makes 16 latent channels of 16x16 pixels each, and the model takes 16 of 8x8"),
        ):
            conditioning = control.FlowConditioning(optical_flow=PAN, mode=mode, vae=vae)
            with pytest.raises(ValueError, match=message):
                sample(model, conditioning, on_progress=begun.append)
    assert not begun
    unused = control.FlowConditioning(optical_flow=PAN, mode="adapter", vae=other)
    assert sample(causal(with_adapter(0.5)[0]), unused).isfinite().all()


def test_what_a_mask_protects_is_not_blended(tiny_wan, causal, control, demo_vae):
    conditioning = control.FlowConditioning(optical_flow=PAN, mode="reference", vae=demo_vae)
    one = DiagonalSchedule(sigmas=((1.0,),), context_mode="clean")
    run = control.FlowRun(conditioning, causal(tiny_wan), SHAPE, one, (3, 3, 2))
    run.finished(torch.randn(1, 16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    at = Forward(chunk=1, step=0, steps=1, sigma=0.733, start_frame=3, frames=3)
    denoised, mask = torch.full((1, 16, 3, SIZE, SIZE), 9.0), torch.zeros(1, 1, 3, SIZE, SIZE)
    mask[..., 4:] = 1
    found = run.after(denoised, at, mask)
    assert torch.equal(found[..., :4], denoised[..., :4])
    whole = run.after(denoised, at)
    assert torch.equal(found[..., 4:], whole[..., 4:]) and (whole - denoised).abs().amax((0, 1, 2, 3)).min() > 1


def demo_coding(demo_vae, scale):
    """FlowReference's decode and encode, by the demo's VAE as ComfyUI holds it."""

    def decode(latents):
        return demo_vae.decode(scale.process_out(latents)).movedim(-1, 1)

    def encode(frames):
        return scale.process_in(demo_vae.encode(frames[0].movedim(0, -1)))

    return {"decode": decode, "encode": encode}


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_adapter_blended_with_carried_frames_equals_the_core(
    with_adapter, causal, sample, prompt, control, demo_vae, strength
):
    loaded, weights = with_adapter(0.5)
    model = causal(loaded, **SETTINGS)
    conditioning = control.FlowConditioning(
        optical_flow=PAN, mode="adapter+blend", blend=0.8, strength=strength, start_sigma=0.3, vae=demo_vae
    )
    result = sample(model, conditioning)
    coding = demo_coding(demo_vae, model.get_model_object("latent_format"))
    reference = FlowReference(PAN, DIAGONAL, (3, 3, 2), **coding, start_sigma=1.0, blend=0.8 * strength)
    assert reference.schedule.chunk_sigmas(2) == DIAGONAL.chunk_sigmas(2), "no chunk starts below noise"
    noise, features = SeededNoise(3, (1, 16, SIZE, SIZE)), adapter_features(PAN, FRAMES, SIZE, SIZE)
    expected = core(weights, prompt()[0][0], DIAGONAL, noise, features=features, reference=reference, strength=strength)
    assert (in_model_space(model, result) - expected).abs().max() < 1e-4
    for mode in ("adapter", "reference"):
        other = sample(model, replace(conditioning, mode=mode))
        assert (result - other)[:, :, 3:].abs().max() > 0.02, mode


def test_the_blended_adapter_begins_where_the_reference_cannot(
    with_adapter, causal, prompt, sample_latent, control, demo_vae
):
    """It starts no chunk itself: denoise and levels below 1 are the person's."""
    model = causal(with_adapter(0.5)[0], **SETTINGS)
    video = {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))}
    conditioning = control.FlowConditioning(optical_flow=PAN, mode="adapter+blend", vae=demo_vae)
    low = replace(DIAGONAL, sigmas=((0.95, 0.4),))
    for schedule, options in ((DIAGONAL, {"denoise": 0.5}), (low, {})):
        plain, moved = (
            sample_latent(model, prompt(), [], video, schedule, seed=1, optical_flow=flow, **options)["samples"]
            for flow in (None, conditioning)
        )
        assert moved.isfinite().all() and (plain - moved).abs().max() > 0.02


def test_reference_goes_on_from_given_context_and_in_batches(
    tiny_wan, causal, prompt, sample_latent, given_frames, control, demo_vae
):
    model = causal(tiny_wan, **SETTINGS)
    context = torch.randn(1, 16, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    latent = {"samples": torch.zeros(2, *SHAPE[1:])}
    conditioning = control.FlowConditioning(optical_flow=PAN, vae=demo_vae)
    plain, moved = (
        sample_latent(model, prompt(), [], latent, DIAGONAL, seed=3, context=given_frames(context), optical_flow=flow)[
            "samples"
        ]
        for flow in (None, conditioning)
    )
    assert torch.equal(plain[:, :, :2], moved[:, :, :2])
    assert (plain[:, :, 2:5] - moved[:, :, 2:5]).abs().amax((1, 2, 3, 4)).min() > 0.05, "the first chunk follows too"
    assert (moved[0, :, 2:] - moved[1, :, 2:]).abs().max() > 0.05, "samples of a batch differ"


def test_noise_equals_the_core_and_warns(tiny_wan, tiny_wan_path, causal, sample, prompt, control, caplog):
    model = causal(tiny_wan, **SETTINGS)
    with caplog.at_level(logging.WARNING):
        result = sample(model, control.FlowConditioning(optical_flow=PAN, mode="noise"))
    assert "trained on warped noise" in caplog.text
    small = PAN.fit(4 * (FRAMES - 1), SIZE, SIZE).composed()
    noise = FlowNoise(SeededNoise(3, (1, 16, SIZE, SIZE)), small, (3, 3, 2))
    expected = core(load_file(tiny_wan_path), prompt()[0][0], DIAGONAL, noise)
    assert (in_model_space(model, result) - expected).abs().max() < 1e-4


def test_noise_moves_as_far_as_strength_and_degrade_let_it(tiny_wan, causal, control):
    draws, model = SeededNoise(3, (1, 16, SIZE, SIZE)), causal(tiny_wan, **SETTINGS)
    settings = {"mode": "noise", "strength": 0.5, "degrade": 0.2, "first_chunk": 1, "last_chunk": 2}
    turning = OpticalFlow(torch.cat([PAN.flow[:12], -PAN.flow[12:]]), PAN.valid)
    conditioning = control.FlowConditioning(optical_flow=turning, **settings)
    found = control.FlowRun(conditioning, model, SHAPE, DIAGONAL, (3, 3), given_frames=2).noise(draws, 3)
    small = turning.fit(4 * (FRAMES - 1), SIZE, SIZE).composed()
    other = SeededNoise(3 ^ control._OTHER_SEED, (1, 16, SIZE, SIZE))
    expected = FlowNoise(draws, small, (3, 3), start_frame=2, last_chunk=1, degrade=1 - 0.5 * 0.8, other=other)
    for chunk in range(2):
        assert torch.equal(found(chunk, -1, 3), expected(chunk, -1, 3))
    assert not torch.equal(other(0, -1, 3), draws(0, -1, 3)), "what is mixed in is noise of its own"


@pytest.mark.parametrize(
    ("weights", "schedule", "cfg"), [("follower", DEMO_PRESET, 1.0), ("teacher", "undistilled", 5.0)]
)
def test_the_demo_goes_where_it_is_told(pack_module, sample_latent, control, weights, schedule, cfg):
    """A caption says right; the flow, from the second chunk on, says up (the camera goes down)."""
    attachment = pack_module("model_patches.loading").FLOW_ADAPTER_ATTACHMENT
    loader = pack_module("nodes.demo_loader").DiagonalDemoLoader
    assert loader.execute("student").result[0].get_attachment(attachment) is None
    model, clip, vae = loader.execute(weights).result
    assert model.get_attachment(attachment) is not None
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red square moves right", "")
    )
    flow = camera_flow(4 * 11, 64, 64, pan=(0, 0.5))

    def centre(optical_flow):
        latent = {"samples": torch.zeros(1, 16, 12, 8, 8)}
        found = sample_latent(
            model,
            positive,
            negative,
            latent,
            DiagonalSchedule.preset(schedule),
            seed=3,
            cfg=cfg,
            optical_flow=optical_flow,
        )["samples"]
        last = vae.decode(found)[0, -1]  # [H, W, 3]
        weight = (last[..., 0] - last[..., 1:].amax(-1) > 0.4).float()
        return torch.stack([(weight * torch.arange(64.0)).sum(), (weight.T * torch.arange(64.0)).sum()]) / weight.sum()

    told = control.FlowConditioning(optical_flow=flow, first_chunk=1)
    (x, y), (free_x, free_y) = centre(told), centre(None)
    assert free_x - x > 8 and free_y - y > 8, (x, y, free_x, free_y)
    comfy.model_management.unload_all_models()


def test_auto_takes_the_adapter_where_there_is_one(with_adapter, tiny_wan, causal, sample, control, demo_vae):
    conditioning = control.FlowConditioning(optical_flow=PAN, vae=demo_vae)
    model = causal(with_adapter(0.5)[0], **SETTINGS)
    named = control.FlowConditioning(optical_flow=PAN, mode="adapter")
    assert torch.equal(sample(model, conditioning), sample(model, named))
    with pytest.raises(ValueError, match="connect the model's VAE"):
        sample(causal(tiny_wan), control.FlowConditioning(optical_flow=PAN))
    for mode in ("adapter", "adapter+blend"):
        with pytest.raises(
            ValueError, match=rf"mode is {re.escape(mode)}, but .* has no adapter \(flow_embedding.weight"
        ):
            sample(causal(tiny_wan), replace(named, mode=mode, vae=demo_vae))
    with pytest.raises(ValueError, match=r"in mode adapter\+blend, .*connect the model's VAE"):
        sample(model, replace(named, mode="adapter+blend"))


def test_what_cannot_be_combined_is_refused(
    tiny_wan, with_adapter, causal, sample, prompt, sample_latent, control, demo_vae
):
    conditioning = control.FlowConditioning(optical_flow=PAN, vae=demo_vae)
    video = {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))}
    with pytest.raises(ValueError, match="denoise is 0.5.*Use denoise 1"):
        sample_latent(causal(tiny_wan), prompt(), [], video, DIAGONAL, seed=1, denoise=0.5, optical_flow=conditioning)
    low = replace(DIAGONAL, sigmas=((0.95, 0.4),))
    with pytest.raises(ValueError, match="starts a chunk below sigma 1"):
        sample_latent(causal(tiny_wan), prompt(), [], video, low, seed=1, optical_flow=conditioning)
    later = replace(DIAGONAL, sigmas=((1.0, 0.4), (0.95, 0.4)))
    with pytest.raises(ValueError, match="starts a chunk below sigma 1"):
        sample_latent(causal(tiny_wan), prompt(), [], video, later, seed=1, optical_flow=conditioning)
    with pytest.raises(ValueError, match="nothing moves in it. Use a length of more than one chunk."):
        sample(causal(tiny_wan), conditioning, frames=1)
    with pytest.raises(ValueError, match="first_chunk is 4, but the video has 3 chunks.*use 3 at most"):
        sample(causal(tiny_wan), replace(conditioning, first_chunk=4))
    model = causal(with_adapter(0.5)[0])
    with pytest.raises(ValueError, match="nothing moves in it. Use a length of 5."):
        sample(model, conditioning, frames=1)
    area = prompt(0, area=(4, 4, 0, 0), strength=1.0)
    with pytest.raises(ValueError, match="an area of the picture cannot follow it"):
        sample_latent(model, area, [], {"samples": torch.zeros(SHAPE)}, DIAGONAL, seed=1, optical_flow=conditioning)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "magic"}, r"choose one of auto, adapter, reference, noise, adapter\+blend"),
        ({"strength": 2.0}, r"strength is 2.0; it must be in \[0, 1\]"),
        ({"blend": float("nan")}, "blend is nan"),
        ({"start_sigma": 0.0}, "start_sigma is 0.0"),
        ({"first_chunk": 3, "last_chunk": 2}, "must not come before"),
        ({"start": -1}, "start is -1; pixel frames are counted from 0"),
        ({"start": 8, "earlier": [(0, PAN), (8, PAN)]}, "before it .previous. begins at pixel frame 8; give .* 9 or"),
    ],
)
def test_settings_are_checked(control, change, message):
    with pytest.raises(ValueError, match=message):
        control.FlowConditioning(optical_flow=PAN, **change)


LATER = camera_flow(1, 8 * SIZE, 8 * SIZE, pan=(1, 0), zoom=1.0)
"""Given once, so that it is held."""
BENDS = 10  # its pixel frame, within a latent frame of the second chunk


def bent() -> OpticalFlow:
    """PAN up to the pixel frame BENDS, then LATER, step by step."""
    flow = torch.cat([PAN.flow[:BENDS], LATER.flow.expand(PAN.steps - BENDS, -1, -1, -1)])
    return OpticalFlow.everywhere(flow)


@pytest.mark.parametrize("mode", ["reference", "noise", "adapter+blend"])
def test_motions_that_follow_each_other_are_one_motion(tiny_wan, with_adapter, causal, sample, control, demo_vae, mode):
    model = causal(with_adapter(0.5)[0] if "adapter" in mode else tiny_wan, **SETTINGS)
    one, two, only = (
        sample(model, control.FlowConditioning(mode=mode, vae=demo_vae, **motion))
        for motion in (
            {"optical_flow": bent()},
            {"optical_flow": LATER, "start": BENDS, "earlier": [(0, PAN)]},
            {"optical_flow": PAN},
        )
    )
    assert torch.equal(one, two)
    assert (one - only)[:, :, 3:].abs().max() > 0.02


@pytest.mark.parametrize("mode", ["reference", "noise"])
def test_a_run_goes_on_in_the_middle_of_a_later_motion(tiny_wan, causal, control, demo_vae, mode):
    conditioning = control.FlowConditioning(
        optical_flow=PAN, start=22, earlier=[(3, PAN), (BENDS, LATER)], mode=mode, vae=demo_vae
    )
    latents = torch.randn(1, 16, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(1))

    def begun():
        run = control.FlowRun(conditioning, causal(tiny_wan), SHAPE, DIAGONAL, (3, 3, 2))
        return run, run.noise(SeededNoise(3, SHAPE[:2] + SHAPE[3:]), 3)

    run, noise = begun()
    for chunk in (0, 1):
        run.finished(latents[:, :, 3 * chunk : 3 * chunk + 3])
        noise(chunk, -1, 3)
    state = {name: tensor.clone() for name, tensor in run.snapshot().items()}
    again, its_noise = begun()
    again.restore(state, torch.device("cpu"))
    assert state and torch.equal(its_noise(2, -1, 2), noise(2, -1, 2))
    if mode == "reference":
        assert torch.equal(again.source(6, 2), run.source(6, 2))


def test_a_videos_digest_has_every_motion_and_of_a_single_one_what_it_always_had(tiny_wan, control, pack_module):
    parts = pack_module("model_patches.streaming")._flow_parts
    whole = pack_module("model_patches.stream_state").digest_of_whole

    def found(**motion):
        return parts(control.FlowConditioning(**motion), tiny_wan)["optical_flow"]

    single = found(optical_flow=PAN)
    values = {name: getattr(control.FlowConditioning(optical_flow=PAN), name) for name in control.SETTINGS}
    assert single == [28, whole(PAN.flow[:1]), whole(PAN.valid[:1]), values, None, None] and "start" not in values
    later = {"optical_flow": LATER, "start": BENDS}
    others = [
        found(**later),
        found(**later, earlier=[(0, PAN)]),
        found(**later, earlier=[(1, PAN)]),
        found(**later, earlier=[(0, LATER)]),
        found(optical_flow=LATER, start=BENDS + 1, earlier=[(0, PAN)]),
        single,
    ]
    assert len({repr(other) for other in others}) == len(others)


def test_a_motion_that_begins_behind_the_video_is_told_of(tiny_wan, causal, control, caplog):
    def warned(**motion):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            conditioning = control.FlowConditioning(mode="noise", **motion)
            control.FlowRun(conditioning, causal(tiny_wan), SHAPE, DIAGONAL, (3, 3, 2))
        return caplog.text

    behind = "The motion that begins at pixel frame 28 is not used: the video has 29"
    assert not warned(optical_flow=LATER, start=27, earlier=[(0, PAN)])
    text = warned(optical_flow=LATER, start=28, earlier=[(0, camera_flow(10, 64, 64, pan=(1, 0)))])
    assert behind in text and "has 10 steps and the video 28; the end of the video is free" in text
    text = warned(optical_flow=LATER, start=28)
    assert behind in text and "changes nothing in this video" in text
    assert "has 33 steps and the video 28; the rest of it is not used" in warned(optical_flow=PAN, start=5)


def test_comfyui_is_told_of_the_vae_that_a_motion_holds(control, demo_vae):
    assert control.FlowConditioning(optical_flow=PAN, vae=demo_vae).get_models() == [demo_vae.patcher]
    assert control.FlowConditioning(optical_flow=PAN).get_models() == []


def test_another_size_and_length_are_fitted_with_a_word(tiny_wan, causal, sample, control, demo_vae, caplog):
    field = camera_flow(10, 30, 40, pan=(-2, 1))
    with caplog.at_level(logging.WARNING):
        sample(causal(tiny_wan), control.FlowConditioning(optical_flow=field, vae=demo_vae))
    assert "has 10 steps and the video 28; the end of the video is free" in caplog.text
    assert "40x30 and the video 64x64" in caplog.text
    caplog.clear()
    longer = camera_flow(40, 32, 32, pan=(-2, 1))  # of the video's shape: nothing is stretched
    with caplog.at_level(logging.WARNING):
        sample(causal(tiny_wan), control.FlowConditioning(optical_flow=longer, vae=demo_vae))
    assert "has 40 steps and the video 28; the rest of it is not used" in caplog.text
    assert "another shape" not in caplog.text


def test_a_mask_a_pixel_frame_is_of_the_videos_length(tiny_wan, causal, control, caplog):
    """One for each of 29 frames, of which the last has no motion behind it: nothing of use is left out."""
    for steps, words in (
        (28, None),
        (29, None),
        (30, "the rest of it is not used"),
        (27, "the end of the video is free"),
    ):
        caplog.clear()
        field = OpticalFlow.everywhere(torch.ones(1, 64, 64, 2)).masked(torch.ones(steps, 8, 8))
        with caplog.at_level(logging.WARNING):
            control.FlowRun(
                control.FlowConditioning(optical_flow=field, mode="noise"), causal(tiny_wan), SHAPE, DIAGONAL, (3, 3, 2)
            )
        assert (words or "") in caplog.text and ("steps and the video" in caplog.text) == (words is not None), steps


def test_frames_are_carried_on_the_cpu_wherever_the_model_is(tiny_wan, causal, control, demo_vae, monkeypatch):
    """The device "meta" stands for any other: nothing can be computed there."""
    conditioning = control.FlowConditioning(optical_flow=PAN, mode="reference", vae=demo_vae)
    run = control.FlowRun(conditioning, causal(tiny_wan), SHAPE, DIAGONAL, (3, 3, 2))
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(1, 13, 8 * SIZE, 8 * SIZE, 3, generator=generator)
    monkeypatch.setattr(  # of numbers that are not there
        control, "decode", lambda vae, latents: pictures[:, : 1 + 4 * (latents.shape[2] - 1)]
    )
    encoded, real = [], control.encode

    def encode(vae, images):
        encoded.append(images)
        return real(vae, images)

    monkeypatch.setattr(control, "encode", encode)
    run.finished(torch.zeros(1, 16, 3, SIZE, SIZE, device="meta"))
    assert run.source(3, 3).device.type == "meta"
    images, again = encoded
    assert images.device.type == "cpu" and torch.equal(images[0], pictures[0, 8])
    assert torch.equal(again, pictures[0]), "what they decode to is encoded, too"
    moved = images[4, :-4, 8:] - pictures[0, 8, 4:, :-8]  # 8 pixels to the right and 4 up
    assert moved[4:-4, 4:-4].abs().max() < 1e-3


def test_the_model_that_the_vae_pushed_out_is_loaded_with_memory_for_a_chunk(
    tiny_wan, causal, control, demo_vae, monkeypatch
):
    model, asked = causal(tiny_wan), []
    conditioning = control.FlowConditioning(optical_flow=PAN, mode="reference", vae=demo_vae)
    run = control.FlowRun(conditioning, model, (2, *SHAPE[1:]), DIAGONAL, (3, 3, 2))
    run.finished(torch.zeros(2, 16, 3, SIZE, SIZE))
    monkeypatch.setattr(comfy.model_management, "loaded_models", lambda *given: [])
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda models, **named: asked.append((models, named))
    )
    run.source(3, 3)
    ((_, named),) = [(models, named) for models, named in asked if models == [model]]
    chunk = model.model.memory_required([2, 16, 3, SIZE, SIZE])
    assert named == {"memory_required": 2 * chunk, "minimum_memory_required": chunk}, "as ComfyUI asks for it"


def test_noise_is_as_usual_where_the_motion_is_shorter_than_a_latent_frame(tiny_wan, causal, control, caplog):
    short = control.FlowConditioning(optical_flow=camera_flow(3, 64, 64, pan=(1, 0)), mode="noise")
    with caplog.at_level(logging.WARNING):
        run = control.FlowRun(short, causal(tiny_wan), (1, 16, FRAMES, SIZE, SIZE), DIAGONAL, (3, 3, 2))
        draws = SeededNoise(3, (1, 16, SIZE, SIZE))
        assert run.noise(draws, 3) is draws
    assert "changes nothing in this video: it is known nowhere through the 4 steps of a latent frame." in caplog.text


@pytest.mark.parametrize(
    ("change", "frames", "reason"),
    [
        ({}, 3, "has one chunk, and mode reference carries the last frame of the one before. Use a longer video"),
        ({"last_chunk": 1}, FRAMES, "last_chunk is 1, and mode reference carries"),
        ({"optical_flow": camera_flow(8, 64, 64, pan=(1, 0))}, FRAMES, "has 8 steps, and commands not even half of a"),
        ({"optical_flow": camera_flow(8, 64, 64, pan=(1, 0)), "mode": "adapter", "first_chunk": 2}, FRAMES, "a step"),
        ({"optical_flow": camera_flow(8, 64, 64, pan=(1, 0)), "mode": "adapter"}, FRAMES, None),
        ({"mode": "adapter"}, 3, None),
        ({"mode": "adapter+blend"}, 3, None),
        ({"optical_flow": OpticalFlow.everywhere(torch.ones(1, 64, 64, 2)), "first_chunk": 3}, FRAMES, None),
        ({"mode": "noise", "last_chunk": 1}, FRAMES, None),
        ({}, FRAMES, None),
    ],
)
def test_a_motion_that_no_chunk_can_follow_says_why(
    tiny_wan, with_adapter, causal, control, demo_vae, caplog, change, frames, reason
):
    settings = {"optical_flow": PAN, "mode": "reference", "vae": demo_vae, **change}
    model = causal(with_adapter(0.5)[0] if "adapter" in settings["mode"] else tiny_wan, **SETTINGS)
    counts = (3, 3, 2) if frames == FRAMES else (3,)
    with caplog.at_level(logging.WARNING):
        control.FlowRun(control.FlowConditioning(**settings), model, (1, 16, frames, SIZE, SIZE), DIAGONAL, counts)
    found = [record.message for record in caplog.records if "changes nothing in this video" in record.message]
    assert len(found) == (reason is not None) and all(reason in message for message in found), caplog.text
    if reason and "one chunk" in reason:  # with frames before it, that chunk follows
        caplog.clear()
        shape = (1, 16, 5, SIZE, SIZE)
        control.FlowRun(control.FlowConditioning(**settings), model, shape, DIAGONAL, counts, given_frames=2)
        assert "changes nothing" not in caplog.text


# --- the nodes ---


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        (None, [4, 3, 4]),
        ("reference", [4, 3, 2]),
        ("noise", [4, 3, 2]),
        ("adapter", [4, 3, 4]),
        ("adapter+blend", [4, 3, 4]),
    ],
)
def test_a_new_prompt_begins_steps_anew_but_where_each_chunk_has_its_own(
    tiny_wan, with_adapter, causal, sample_latent, control, demo_vae, pack_module, mode, steps
):
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, text):
            return [[torch.full((1, 16, 64), float(len(text))), {}]]

    positive = pack_module("model_patches.prompts").schedule_prompts(
        Clip(), "0: a\nchunk 3: bc", fps=16.0, switch="recache", blend_chunks=1
    )
    flow = mode and control.FlowConditioning(optical_flow=PAN, mode=mode, vae=demo_vae)
    found = {}
    sample_latent(
        causal(with_adapter(0.5)[0] if mode and "adapter" in mode else tiny_wan, **SETTINGS),
        positive,
        [],
        {"samples": torch.zeros(SHAPE)},
        DIAGONAL,
        seed=3,
        optical_flow=flow,
        on_progress=lambda p: found.update({p.chunk: max(p.steps, found.get(p.chunk, 0))}),
    )
    assert list(found.values()) == steps


@pytest.mark.parametrize("mode", ["adapter", "reference", "noise", "adapter+blend"])
def test_a_cut_is_refused_where_motion_carries_something_across_it(
    tiny_wan, with_adapter, causal, sample_latent, control, demo_vae, pack_module, prompt, mode
):
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, text):
            return prompt()

    prompts, clean = pack_module("model_patches.prompts"), DiagonalSchedule.preset("self forcing", steps=(2,))
    model = causal(with_adapter(0.5)[0] if "adapter" in mode else tiny_wan, **SETTINGS)
    flow, box = control.FlowConditioning(optical_flow=PAN, mode=mode, vae=demo_vae), prompts.PromptBox()

    def run(text, **more):
        positive = prompts.schedule_prompts(Clip(), text, fps=16.0, switch="cut", blend_chunks=1)
        latent = {"samples": torch.zeros(SHAPE)}
        return sample_latent(model, positive, [], latent, clean, seed=3, optical_flow=flow, **more)["samples"]

    answer = Future()

    def steer(progress):
        if (progress.chunk, progress.step) == (0, 1):
            box.post(prompts.PromptRequest(text="bc", node="7", answer=answer))

    whole = run("0: a", prompts=box, on_progress=steer)
    if mode == "adapter":
        assert answer.result().chunk == 1 and torch.equal(whole, run("0: a\nchunk 2: bc"))
        return
    words = f"cut of Diagonal Prompt Schedule.*Diagonal Flow Conditioning in mode {re.escape(mode)} carries it on"
    for refused in (answer.result, lambda: run("0: a\nchunk 2: bc")):
        with pytest.raises(ValueError, match=words):
            refused()
    assert torch.equal(whole, run("0: a"))


@pytest.fixture
def conditioning_node(pack_module):
    """`conditioning_node(**changes)`: runs the node with its widgets' defaults."""
    node = pack_module("nodes.flow_conditioning").DiagonalFlowConditioning
    defaults = {
        item.id: item.default for item in node.define_schema().inputs if not item.optional and hasattr(item, "default")
    }

    def run(**changes):
        return node.execute(**{**defaults, **changes}).result[0]

    return run


def test_the_node_makes_each_source(conditioning_node):
    camera = conditioning_node(width=64, height=48, length=9, pan_x=2.0)
    assert camera.optical_flow.flow.shape == (8, 48, 64, 2) and camera.mode == "auto"
    path = torch.stack([8 + 2 * torch.arange(9.0), torch.full((9,), 20.0)], -1)[:, None]
    tracks = {"track_path": path, "track_visibility": torch.ones(9, 1, dtype=torch.bool)}
    found = conditioning_node(source="tracks", tracks=tracks, width=64, height=48, track_radius=5.0)
    assert torch.allclose(found.optical_flow.flow[0, 20, 8], torch.tensor([2.0, 0.0]))
    painted = conditioning_node(source="painted", painted=torch.tensor([1.0, 0, 0]).expand(1, 8, 8, 3), paint_speed=3.0)
    assert torch.allclose(painted.optical_flow.flow, torch.tensor([3.0, 0.0]), atol=1e-4)
    masked = conditioning_node(width=64, height=48, length=9, pan_x=2.0, mask=torch.eye(4)[:1, None].expand(1, 4, 4))
    assert 0 < masked.optical_flow.valid.float().mean() < 0.5


def test_a_mask_that_moves_lets_a_painting_last_as_long_as_it_does(conditioning_node):
    mask = torch.zeros(8, 16, 16)
    mask[:4, :, :8] = mask[4:, :, 8:] = 1
    found = conditioning_node(source="painted", painted=torch.tensor([1.0, 0, 0]).expand(1, 8, 8, 3), mask=mask)
    assert found.optical_flow.steps == 8
    sides = found.optical_flow.valid.view(8, 8, 2, 4).all(-1).all(1)
    assert sides.tolist() == [[True, False]] * 4 + [[False, True]] * 4


def test_tracks_tell_how_far_they_are(conditioning_node, monkeypatch):
    steps = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update", lambda self, value: steps.append((self.total, value)))
    tracks = {"track_path": PATH, "track_visibility": torch.ones(9, 1, dtype=torch.bool)}
    conditioning_node(source="tracks", tracks=tracks, width=64, height=48, track_radius=8.0)
    assert steps == [(8, 1)] * 8


def test_the_nodes_widgets_reach_the_motion_and_the_run(conditioning_node, demo_vae):
    found = conditioning_node(
        width=64, height=48, length=9, pan_x=2.0, pan_y=-1.0, zoom=0.5, rotation=3.0, mode="reference", strength=0.9,
        start_sigma=0.8, blend=0.7, first_chunk=2, last_chunk=3, degrade=0.1, vae=demo_vae,
    )  # fmt: skip
    camera = camera_flow(8, 48, 64, pan=(2.0, -1.0), zoom=0.5, rotation=3.0)
    assert torch.equal(found.optical_flow.flow, camera.flow)
    settings = found.mode, found.strength, found.start_sigma, found.blend, found.degrade
    assert settings == ("reference", 0.9, 0.8, 0.7, 0.1)
    assert (found.first_chunk, found.last_chunk, found.vae) == (2, 3, demo_vae)


def test_nodes_in_a_chain_are_one_motion_and_the_last_ones_settings(conditioning_node, demo_vae, pack_module):
    size = {"width": 64, "height": 48}
    pan = conditioning_node(length=2, pan_x=2.0, strength=0.5, **size)
    rest = conditioning_node(length=2, previous=pan, start=40, **size)
    zoom = conditioning_node(length=9, zoom=1.0, mode="reference", vae=demo_vae, previous=rest, start=80, **size)
    assert [start for start, _ in zoom.motions] == [0, 40, 80] and pan.start == 0
    assert [motion for _, motion in zoom.motions] == [pan.optical_flow, rest.optical_flow, zoom.optical_flow]
    assert (zoom.strength, zoom.mode, zoom.vae) == (1.0, "reference", demo_vae)
    with pytest.raises(ValueError, match="start is 40, and the motion before it .previous. begins at pixel frame 80"):
        conditioning_node(previous=zoom, start=40)
    node = pack_module("nodes.flow_preview").DiagonalFlowPreview
    panels, info = node.execute(zoom, False, 0.0).result
    assert len(panels) == 3, "what is held is drawn once"
    assert info == "88 steps at 64x48; motions begin at pixel frames: 0, 40, 80"
    image = torch.rand(1, 48, 64, 3)
    over = node.execute(zoom, False, 0.0, images=image).result[0]
    assert len(over) == 88 and torch.equal(over[0], over[39]) and not torch.equal(over[39], over[40])
    assert torch.equal(over[40], over[79]) and not torch.equal(over[79], over[80])


def test_the_error_of_a_result_is_taken_where_both_motions_are_known(pack_module, monkeypatch):
    sources = pack_module("model_patches.flow_sources")
    field, measured = (
        OpticalFlow(torch.tensor([x, 0.0]).repeat(2, 16, 16, 1), torch.ones(2, 16, 16, dtype=torch.bool))
        for x in (-1.0, -3.0)
    )
    field.flow[:, :8], field.valid[:, :8] = 99.0, False  # wrong where it is not known
    measured.flow[:, :, :8], measured.valid[:, :, :8] = 77.0, False
    monkeypatch.setattr(sources, "estimate_flow", lambda images, estimator: measured)
    images = torch.zeros(3, 16, 16, 3)
    text = sources.flow_preview(field, images, None, measure=True, speed=None)[1]
    assert text == "end-point error over 25% of the pixels: mean 2.00, median 2.00 px per frame"
    measured.valid[:] = False
    assert sources.flow_preview(field, images, None, measure=True, speed=None)[1] == "nowhere are both motions known"


def test_a_result_without_measurable_motion_is_shown_all_the_same(conditioning_node, pack_module):
    """It may have taken an hour to make."""
    pytest.importorskip("cv2")
    node = pack_module("nodes.flow_preview").DiagonalFlowPreview
    conditioning = conditioning_node(width=64, height=64, length=3, pan_x=1.0)
    shots = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(shots, (64, 64), mode="bilinear").movedim(1, -1)
    found, info = node.execute(conditioning, True, 0.0, images=images).result
    panels = found.view(2, 256, 3, 256, 3).unbind(2)
    assert panels[0].max() > 0 and panels[1].max() > 0 and (panels[2] == 0).all()
    assert info.startswith("No motion of the video could be trusted")
    plain = node.execute(conditioning, False, 0.0, images=images).result[0]
    assert torch.equal(found[:, :, : 2 * 256], plain)


def test_a_motion_is_shown_over_a_single_image(conditioning_node, pack_module):
    node = pack_module("nodes.flow_preview").DiagonalFlowPreview
    conditioning = conditioning_node(width=64, height=64, length=5, pan_x=1.0)
    image = torch.rand(1, 32, 32, 3)
    found = node.execute(conditioning, False, 0.0, images=image).result[0]
    assert torch.equal(found, node.execute(conditioning, False, 0.0, images=image.expand(5, -1, -1, -1)).result[0])
    assert len(found) == 4
    with pytest.raises(ValueError, match="images has 1 frame; motion needs at least 2.*or turn measure off"):
        node.execute(conditioning, True, 0.0, images=image)


def test_the_node_measures_a_video_and_the_preview_shows_it(conditioning_node, pack_module):
    pytest.importorskip("cv2")
    generator = torch.Generator().manual_seed(0)
    big = torch.nn.functional.interpolate(torch.rand(1, 3, 40, 40, generator=generator), (160, 160), mode="bicubic")
    video = torch.stack([big[0, :, 20:84, 30 - 2 * t : 94 - 2 * t] for t in range(5)]).movedim(1, -1).clamp(0, 1)
    conditioning = conditioning_node(source="video", video=video)
    field = conditioning.optical_flow
    error = (field.flow - torch.tensor([2.0, 0.0])).norm(dim=-1)[field.valid]
    assert error.median() < 0.1 and field.valid.float().mean() > 0.7
    node = pack_module("nodes.flow_preview").DiagonalFlowPreview
    panels, info = node.execute(conditioning, True, 0.0, images=video).result
    assert panels.shape == (4, 256, 3 * 256, 3) and "median 0.0" in info
    assert node.execute(conditioning, True, 0.0).result[0].shape == (4, 256, 512, 3)


NAN = float("nan")
PATH = torch.stack([torch.arange(9.0), torch.full((9,), 20.0)], -1)[:, None]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "video", "video": torch.full((2, 64, 64, 3), NAN)}, "video holds NaN"),
        ({"source": "painted", "painted": torch.full((1, 8, 8, 3), NAN)}, "NaN"),
        ({"source": "tracks", "tracks": {"track_path": PATH * NAN}}, "Track 0 is visible at frame 0 .* NaN"),
        ({"pan_x": NAN}, "must be finite"),
        ({"mask": torch.zeros(1, 8, 8)}, "mask is empty: no motion is given anywhere. Draw the mask"),
        ({"mask": torch.full((1, 8, 8), NAN)}, "mask holds NaN"),
        ({"mask": torch.ones(3, 8, 8)}, "mask has 3 frames and the optical flow 80 steps"),
        ({"source": "tracks", "tracks": {"track_path": PATH[:1]}}, "motion needs at least 2"),
        (
            {"source": "tracks", "tracks": {"track_path": PATH.repeat(99, 1, 1)}, "width": 16384, "height": 16384},
            "891 frames at 16384x16384 needs .* would fit: tracks for",
        ),
    ],
    ids=[
        "NaN video",
        "NaN painting",
        "NaN track",
        "NaN pan",
        "empty mask",
        "NaN mask",
        "short mask",
        "one frame",
        "giant",
    ],
)
def test_the_node_refuses_what_holds_no_motion(conditioning_node, change, message):
    if "tracks" in change:
        change["tracks"]["track_visibility"] = torch.ones(len(change["tracks"]["track_path"]), 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        conditioning_node(**change)


def test_a_source_without_its_input_is_refused(conditioning_node):
    for source in ("video", "tracks", "painted"):
        with pytest.raises(ValueError, match=f"source is {source}, but nothing is connected to {source}"):
            conditioning_node(source=source)
    with pytest.raises(ValueError, match="lacks track_path"):
        conditioning_node(source="tracks", tracks={})
    with pytest.raises(ValueError, match="motion needs at least 2"):
        conditioning_node(source="video", video=torch.zeros(1, 64, 64, 3))
