"""The demo's trainer on tiny sizes: exact resume, honest batches, and files that load again."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from diagonal_sampler.captions import CaptionEncoderConfig, tokenize_captions
from diagonal_sampler.demo_autoencoder import DemoAutoencoderConfig
from diagonal_sampler.dit import WanConfig
from diagonal_sampler.provenance import Provenance
from distillation import demo_files, demo_run, sprites, train_demo
from distillation.common import autocast, fast_bf16
from distillation.demo_run import Orthogonal
from distillation.networks import precision_of
from distillation.recipes import demo
from distillation.train_demo import AutoencoderRecipe, DemoModel, DitRecipe, LatentSet

CPU = torch.device("cpu")
AUTOENCODER = AutoencoderRecipe(
    config=DemoAutoencoderConfig(inner_dim=8, outer_dim=8, blocks=1),
    fitting_groups=8,
    updates=4,
    batch=2,
    scenes=4,
    warmup=1,
)
DIT = DitRecipe(
    model=WanConfig(dim=128, ffn_dim=64, num_layers=1, text_dim=16),
    encoder=CaptionEncoderConfig(text_dim=16, num_heads=2),
    updates=4,
    batch=2,
    opening_batch=3,
    continuation_batch=2,
    clips=4,
    later_clips=4,
    warmup=1,
    save_every=100,
)


def latents() -> LatentSet:
    generator = torch.Generator().manual_seed(0)
    captions = sprites.sample_scenes(4, seed=0).captions
    return LatentSet(
        torch.randn(4, 16, 21, 4, 4, generator=generator).half(),
        torch.randn(4, 16, 12, 4, 4, generator=generator).half(),
        tokenize_captions(captions),
        torch.randn(4, 2, 2, 16, 3, 4, 4, generator=generator).half(),
    )


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def test_two_updates_resumed_for_two_more_equal_four_dit(tmp_path) -> None:
    data = latents()
    whole = train_demo.train_dit(DIT, data, tmp_path / "whole", CPU)
    train_demo.train_dit(DIT, data, tmp_path / "parts", CPU, stop=2)
    torch.manual_seed(99)  # nothing outside the checkpoint may matter
    parts = train_demo.train_dit(DIT, data, tmp_path / "parts", CPU)
    assert_same(demo_run.load_checkpoint(whole), demo_run.load_checkpoint(parts))
    fresh = DemoModel(DIT).state_dict()
    trained = demo_run.load_checkpoint(whole)["model"]
    assert any(not torch.equal(fresh[name], trained[name]) for name in fresh)


def test_two_updates_resumed_for_two_more_equal_four_autoencoder(tmp_path) -> None:
    whole = train_demo.train_autoencoder(AUTOENCODER, tmp_path / "whole", CPU)
    train_demo.train_autoencoder(AUTOENCODER, tmp_path / "parts", CPU, stop=2)
    torch.manual_seed(99)
    parts = train_demo.train_autoencoder(AUTOENCODER, tmp_path / "parts", CPU)
    assert_same(demo_run.load_checkpoint(whole), demo_run.load_checkpoint(parts))


def test_the_latent_set_is_encoded_once_and_read_back(tmp_path) -> None:
    train_demo.train_autoencoder(AUTOENCODER, tmp_path, CPU)
    model = train_demo.load_trained_autoencoder(tmp_path / "autoencoder.pt", AUTOENCODER.config)
    recipe = replace(DIT, clips=2, later_clips=2)
    made = train_demo.encode_latent_set(recipe, model, tmp_path / "latents.pt", CPU)
    assert made.clips.shape == (2, 16, 21, 8, 8) and made.later.shape == (2, 16, 12, 8, 8)
    scenes = sprites.sample_scenes(2, recipe.seed)
    assert torch.equal(made.ids, tokenize_captions(scenes.captions))
    pixels = sprites.to_pixels(sprites.render(scenes, torch.arange(81)))
    encoded = (model.encode(pixels) - model.wan_mean.view(1, -1, 1, 1, 1)) / model.wan_std.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(made.clips.float(), encoded, rtol=0.02, atol=0.05)
    # Background plus what the sprites add is the picture, here and in the same scene with other places.
    empty = replace(scenes, present=torch.zeros_like(scenes.present))
    background = model.encode(sprites.to_pixels(sprites.render(empty, torch.arange(9))))
    background = (background - model.wan_mean.view(1, -1, 1, 1, 1)) / model.wan_std.view(1, -1, 1, 1, 1)
    assert made.sprites.shape == (2, 2, 2, 16, 3, 8, 8)
    here, there = (background + made.sprites[:, place].float().sum(1) for place in (0, 1))
    torch.testing.assert_close(here, made.clips[:, :, :3].float(), rtol=0.02, atol=0.1)
    assert (there - here).abs().amax((1, 2, 3, 4)).min() > 0.5
    alone = replace(scenes, present=scenes.present & torch.tensor([True, False]))
    drawn = model.encode(sprites.to_pixels(sprites.render(alone, torch.arange(9))))
    drawn = (drawn - model.wan_mean.view(1, -1, 1, 1, 1)) / model.wan_std.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(background + made.sprites[:, 0, 0].float(), drawn, rtol=0.02, atol=0.1)
    again = train_demo.encode_latent_set(recipe, model, tmp_path / "latents.pt", CPU)
    assert torch.equal(again.clips, made.clips) and torch.equal(again.later, made.later)


def test_batches_are_what_the_recipe_says() -> None:
    data, kinds = latents(), set()
    for update in range(100):
        batch = train_demo.dit_batch(DIT, data, update)
        frames = batch.noisy.shape[2]
        kinds.add((batch.kind, frames))
        level = batch.sigma[:, None, :, None, None]
        clean = batch.noisy - level * batch.flow
        assert (clean.half().float() - clean).abs().max() < 1e-3  # noisy = clean + sigma * flow, and clean is fp16
        per_chunk = batch.sigma.unflatten(1, (-1, 3))
        assert (per_chunk == per_chunk[..., :1]).all()
        assert (batch.weight.bool() <= (batch.sigma >= train_demo.SMALLEST_TRAINED_SIGMA)).all()
        if batch.kind == "bidirectional":
            assert (batch.sigma == batch.sigma[:, :1]).all() and batch.frames_per_chunk == frames == 21
        else:
            assert batch.frames_per_chunk == 3
        if batch.kind == "continuation":
            assert not batch.weight[:, :3].any() and batch.weight[:, 3:].any()
        if batch.kind == "later":
            assert not batch.weight[:, :6].any()
    assert kinds == {
        ("bidirectional", 21),
        ("causal", 21),
        ("causal", 12),
        ("later", 15),
        ("opening", 3),
        ("continuation", 6),
    }


def test_ghosts_are_weaker_than_their_sprite_and_the_flow_leads_to_the_clip() -> None:
    data, faded, ghosts = latents(), [], []
    recipe = replace(DIT, opening_share=1.0, opening_batch=64, continuation_share=0.0, later_share=0.0)
    recipe = replace(recipe, bidirectional_share=0.0)
    for update in range(6):
        batch = train_demo.dit_batch(recipe, data, update)
        plain = train_demo.dit_batch(replace(recipe, ghost_share=0.0), data, update)
        level = batch.sigma[:, None, :1, None, None]
        clean = plain.noisy - level * plain.flow
        torch.testing.assert_close(batch.noisy - level * batch.flow, clean, rtol=1e-3, atol=2e-3)
        error = (batch.noisy - plain.noisy) / (1 - level).clamp(min=0.02)
        assert (error[batch.sigma[:, 0] <= recipe.ghost_sigma] == 0).all()
        for row in (batch.sigma[:, 0] > recipe.ghost_sigma).nonzero()[:, 0].tolist():
            clip = int((data.clips[:, :, :3].float() - clean[row]).abs().amax((1, 2, 3, 4)).argmin())
            parts = data.sprites[clip].float().flatten(2).flatten(0, 1).T
            found = torch.linalg.lstsq(parts, error[row].flatten()[:, None]).solution.view(2, 2)
            faded += (-found[0]).tolist()
            ghosts += found[1].tolist()
            assert (found[1] <= recipe.ghost_weight * (1 + found[0]) + 0.02).all(), "a ghost is the weaker one"
    assert 0.4 < sum(ghost > 0.01 for ghost in ghosts) / len(ghosts) < 0.6
    assert 0.15 < sum(fade > 0.01 for fade in faded) / len(faded) < 0.35 and max(faded) < recipe.most_faded + 0.02


def test_empty_captions_come_at_their_share() -> None:
    data = latents()
    recipe = replace(DIT, batch=16, opening_batch=16, continuation_batch=16, empty_caption_share=0.5)
    empty = sum(int((~train_demo.dit_batch(recipe, data, i).ids.flatten(1).any(1)).sum()) for i in range(40))
    assert 0.4 < empty / 640 < 0.6


def test_orthogonalised_updates_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in [(3, 32, 64), (2, 64, 32), (1, 48, 128)]:
        singular = torch.linalg.svdvals(Orthogonal.orthogonalise(torch.randn(shape)))
        assert singular.min() > 0.4 and singular.max() < 1.4


@pytest.mark.parametrize(("cpu", "fast"), [("AVX2", False), ("DEFAULT", False), ("AVX512", True), ("SVE256", True)])
def test_products_are_in_bf16_only_where_the_cpu_does_not_emulate_them(cpu, fast, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    matrix, device = torch.ones(2, 2), torch.device("cpu")
    with autocast(device):
        assert (matrix @ matrix).dtype == (torch.bfloat16 if fast else torch.float32)
    with autocast(device, torch.float32):
        assert (matrix @ matrix).dtype == torch.float32
    assert fast_bf16(torch.device("cuda"))
    assert precision_of(demo(), device) == (torch.bfloat16 if fast else torch.float32)
    assert precision_of(demo(precision="float32"), device) == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    data = latents()
    data.clips.fill_(float("nan"))
    data.later.fill_(float("nan"))
    with pytest.raises(ValueError, match="update 0"):
        train_demo.train_dit(DIT, data, tmp_path, CPU)


def test_exported_files_load_equal_and_say_where_they_come_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_demo, "DitRecipe", lambda: DIT)
    monkeypatch.setattr(train_demo, "AutoencoderRecipe", lambda: AUTOENCODER)
    run, demo = tmp_path / "run", tmp_path / "demo"
    train_demo.train_autoencoder(AUTOENCODER, run, CPU)
    train_demo.train_dit(DIT, latents(), run, CPU)
    train_demo.export(run, demo)
    assert {file.name for file in demo.iterdir()} == {
        demo_files.TEACHER_FILE,
        demo_files.AUTOENCODER_FILE,
        demo_files.TEXT_ENCODER_FILE,
    }
    with safe_open(demo / demo_files.TEACHER_FILE, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["config"])["transformer"]["causal_ar"] is True
    provenance = Provenance.from_metadata(header, demo_files.TEACHER_FILE)
    assert None not in [getattr(provenance, name) for name in ("window", "sink", "recipe", "data", "git_commit")]
    assert (provenance.frames_per_chunk, provenance.context_mode) == (3, "clean")
    captions = ["a red circle moves left"]
    for ours, theirs in zip(train_demo.load_trained(run), demo_files.load_models(demo), strict=True):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert demo_files.load_models(demo)[1].encode(captions).shape[-1] == 16


def test_an_empty_folder_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*demo_teacher"):
        demo_files.load_models(tmp_path)
    with pytest.raises(ValueError, match=r"holds no dit\.pt"):
        train_demo.load_trained(tmp_path)


def test_a_training_with_a_time_limit_ends_then_and_its_cosine_with_it(tmp_path, monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(demo_run, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    factors = []
    factor = demo_run.Pace.factor
    monkeypatch.setattr(demo_run.Pace, "factor", lambda *args: factors.append(factor(*args)) or factors[-1])
    path = train_demo.train_dit(replace(DIT, updates=1, seconds=80), latents(), tmp_path, CPU)
    done = demo_run.load_checkpoint(path)["update"]
    assert 30 < done < 50, "two looks at the clock an update"
    assert max(factors) == pytest.approx(1, rel=0.02) and factors[-1] < 0.05
    assert all(later <= earlier for earlier, later in zip(factors[2:], factors[3:], strict=False))


def test_the_larger_world_has_larger_latents_and_the_same_scenes(tmp_path) -> None:
    recipe = replace(AUTOENCODER, scale=2)
    model = train_demo.load_trained_autoencoder(train_demo.train_autoencoder(recipe, tmp_path, CPU), recipe.config)
    dit = replace(DIT, clips=2, later_clips=2, scale=2)
    made = train_demo.encode_latent_set(dit, model, None, CPU)
    assert made.clips.shape == (2, 16, 21, 16, 16) and made.sprites.shape == (2, 2, 2, 16, 3, 16, 16)
    assert torch.equal(made.ids, train_demo.tokenize_captions(sprites.sample_scenes(2, dit.seed).captions))
    assert not list(tmp_path.glob("latents*"))
    pixels = sprites.to_pixels(sprites.render(sprites.sample_scenes(2, dit.seed), torch.arange(81), 2))
    encoded = (model.encode(pixels) - model.wan_mean.view(1, -1, 1, 1, 1)) / model.wan_std.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(made.clips.float(), encoded, rtol=0.02, atol=0.05)


def test_scenes_made_by_workers_are_those_made_here() -> None:
    recipe = replace(DIT, clips=20)
    with train_demo.worker_pool(1) as pool:
        made = list(train_demo.all_training_scenes(recipe, pool))
    for (scenes, moved), start in zip(made, (0, 16), strict=True):
        here, there = train_demo.training_scenes(recipe, start)
        assert scenes.specs == here.specs and torch.equal(scenes.start, here.start)
        assert torch.equal(moved.start, there.start) and torch.equal(moved.background, here.background)
        assert not torch.equal(scenes.start, moved.start)


def test_the_command_trains_the_larger_world_for_a_while_and_its_files_say_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_demo, "DitRecipe", lambda: replace(DIT, clips=2, later_clips=2))
    monkeypatch.setattr(train_demo, "AutoencoderRecipe", lambda **changes: replace(AUTOENCODER, **changes))
    shared = ["--scale", "2", "--batch-factor", "2", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())]
    train_demo.main([*shared, "--seconds", "1"])
    train_demo.main([*shared[4:], "--export", str(tmp_path / "demo")])  # the run says what it was
    with safe_open(tmp_path / "demo" / demo_files.TEACHER_FILE, framework="pt") as file:
        header = file.metadata()
    assert "at 128x128" in header["data"] and f"{2 * DIT.batch} clips" in header["recipe"]
