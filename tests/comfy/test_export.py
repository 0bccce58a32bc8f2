"""A trained student in ComfyUI: its file opens with the right defaults and makes the trainer's own clips."""

from dataclasses import replace
from pathlib import Path

import comfy.samplers
import comfy.sd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import make_inputs, tiny_recipe, train_here

from diagonal_sampler.provenance import causal_settings
from distillation import export, train
from distillation.ranks import join_ranks
from distillation.samples import to_host_scale

EXACT = 1e-4
pytestmark = pytest.mark.usefixtures("unload")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def trained(recipe, run: Path):
    """A finished run, and its trainer as it stands at the end."""
    train_here(recipe, run)
    ranks = join_ranks()
    trainer = train.Trainer(recipe, train.read_all_prompts(recipe, run, ranks), run, ranks)
    train.run_folder.load(train.run_folder.checkpoints(run)[-1][1], trainer.tensors())
    return trainer


class TrainersNoise:
    def __init__(self, trainer) -> None:
        self.source = trainer.noise([train.sample_seed(trainer.recipe.seed, "sample", 0)])

    def __call__(self, chunk, step, frames):
        return self.source(chunk, step, frames)


def sampled(model, trainer, make_causal, sample_latent, settings):
    recipe = trainer.recipe
    positive = [[trainer.prompts.embeddings([0]), {}]]
    latent = {"samples": torch.zeros(1, 16, recipe.frames, recipe.height, recipe.width)}
    noise = TrainersNoise(trainer)
    return sample_latent(
        make_causal(model, settings), positive, [], latent, recipe.schedule, seed=0, noise=noise
    )["samples"]  # fmt: skip


def test_an_exported_student_makes_the_trainers_clips_in_comfyui(inputs, tmp_path, pack_module, sample_latent):
    trainer = trained(tiny_recipe(inputs, updates=2), tmp_path / "run")
    file = tmp_path / "student.safetensors"
    export.export(tmp_path / "run", file, dtype=torch.float32)
    model, info = pack_module("model_patches.loading").load_wan(file)
    settings, contradictions = causal_settings(info.provenance)
    recipe = trainer.recipe
    assert settings == recipe.settings and contradictions == () and info.causal_marker == "header"
    assert info.provenance.sigmas == recipe.schedule.sigmas and info.provenance.context_mode == "noisy"
    assert "2 updates" in info.provenance.recipe and info.provenance.git_commit
    expected = to_host_scale(trainer.sample(1)[0])
    make_causal = pack_module("model_patches.causal").make_causal
    found = sampled(model, trainer, make_causal, sample_latent, settings)
    assert (found - expected).abs().max() < EXACT
    teacher = pack_module("model_patches.loading").load_wan(Path(recipe.teacher))[0]
    assert (sampled(teacher, trainer, make_causal, sample_latent, settings) - expected).abs().max() > 100 * EXACT


def test_plain_comfyui_opens_an_exported_student_as_causal(inputs, tmp_path):
    trained(tiny_recipe(inputs, updates=1), tmp_path / "run")
    file = tmp_path / "student.safetensors"
    assert export.main(["--run", str(tmp_path / "run"), "--to", str(file)]) == 0
    model = comfy.sd.load_diffusion_model(str(file))
    assert "CausalWan" in type(model.model.diffusion_model).__name__
    guider = comfy.samplers.CFGGuider(model)
    context = [[torch.randn(1, 11, 16, generator=torch.Generator().manual_seed(0)), {}]]
    guider.set_conds(context, context)
    noise = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 2})
    result = guider.sample(
        noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.7, 0.0]), seed=7, disable_pbar=True
    )
    assert result.isfinite().all() and result.std() > 0.1


def test_an_exported_lora_equals_the_merged_weights(inputs, tmp_path, pack_module, sample_latent):
    recipe = tiny_recipe(inputs, updates=3, lora_rank=2, learning_rate=3e-2, epsilon=1e-8)
    trainer = trained(recipe, tmp_path / "run")
    lora, whole = tmp_path / "lora.safetensors", tmp_path / "whole.safetensors"
    export.export(tmp_path / "run", lora, dtype=torch.float32)
    export.export(tmp_path / "run", whole, dtype=torch.float32, merge=True)
    loading = pack_module("model_patches.loading")
    base, info = loading.load_wan(Path(recipe.teacher))
    with_lora, found = loading.apply_lora(base, lora, 1.0, info)
    assert found.ranks == (2,) and found.unused == () and found.layout == "ComfyUI"
    make_causal = pack_module("model_patches.causal").make_causal
    merged = loading.load_wan(whole)[0]
    results = [
        sampled(model, trainer, make_causal, sample_latent, recipe.settings) for model in (with_lora, merged, base)
    ]
    expected = to_host_scale(trainer.sample(1)[0])
    assert (results[0] - expected).abs().max() < EXACT
    assert (results[1] - expected).abs().max() < EXACT
    assert (results[2] - expected).abs().max() > 100 * EXACT


def test_export_says_what_is_missing_and_leaves_nothing_half(inputs, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "out.safetensors"
    assert export.main(["--run", str(run), "--to", str(file)]) == 1
    assert "name the folder given to --out" in capsys.readouterr().err
    recipe = tiny_recipe(inputs, updates=1)
    train.run_folder.settle_recipe(run, recipe)
    assert export.main(["--run", str(run), "--to", str(file)]) == 1
    assert "no checkpoint yet" in capsys.readouterr().err
    assert export.main(["--run", str(run), "--to", str(tmp_path / "out.pt")]) == 1
    assert "name a .safetensors file" in capsys.readouterr().err
    assert not file.exists()


def test_export_takes_the_average_of_the_last_checkpoint(inputs, tmp_path):
    recipe = tiny_recipe(inputs, updates=2, ema_start=0, ema_decay=0.9)
    tensors = train_here(replace(recipe, learning_rate=1e-2), tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "x.safetensors", dtype=torch.float32)
    name = "blocks.0.ffn.0.weight"
    found = load_file(tmp_path / "x.safetensors")[name]
    assert torch.equal(found, tensors[f"ema/{name}"]) and not torch.equal(found, tensors[f"student/{name}"])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata()["steps_per_chunk"] == "3,2"
