"""Training on optical flow: what the networks are told is what moves, and a recipe without it is as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import largest_difference, make_inputs, tiny_recipe, train_here, trainer_of, write_teacher
from torch import Tensor

from diagonal_sampler.flow import camera_flow
from diagonal_sampler.flow_adapter import adapter_features
from diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS
from distillation import score, sprite_motion, sprites, train
from distillation.export import export
from distillation.flow_fields import FlowFields, synthetic_flow
from distillation.networks import read_wan
from distillation.rollout import stream

CAPTION = "a red circle moves left"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_teacher(folder / "teacher_flow.safetensors", flow_adapter=True)
    return folder


def flow_recipe(inputs: Path, **changes):
    usual = {"teacher": str(inputs / "teacher_flow.safetensors"), "flow_adapter": "sprites", "flow_dropout": 0.0}
    return tiny_recipe(inputs, **{**usual, **changes})


# ---------------------------------------------------------------------------------------------------------------
# Commands to sprites


def test_fields_say_where_the_drawn_sprites_go():
    scenes = sprites.sample_scenes(24, seed=3)
    commanded = sprite_motion.command(scenes, 3, frames=49)
    path = commanded.centres
    low = scenes.radius[:, :, None, None]
    assert (path >= low - 1e-3).all() and (path <= sprites.FRAME_SIZE - low + 1e-3).all()
    frames = sprites.draw(scenes, path).float()
    known = errors = 0
    for row, (specs, field) in enumerate(zip(scenes.specs, commanded.fields, strict=True)):
        if field is None:
            continue
        blobs = score.find_blobs(frames[row])
        for spec in specs:
            centroid = blobs.centroid(spec.colour)
            for step in range(0, 48, 6):
                motion, valid = field.at(step, centroid[step] - 0.5)
                if bool(valid):
                    known += 1
                    errors += float((motion - (centroid[step + 1] - centroid[step])).norm())
    assert known > 100
    # Coarse and shaken on purpose; random directions would be off by two.
    assert errors / known < 0.4


def test_sprites_turn_against_their_captions():
    scenes = sprites.sample_scenes(32, seed=4)
    path = sprite_motion.command(scenes, 4, frames=81).centres
    usual = sprites.positions(scenes, torch.arange(81))
    moved = (path - usual).norm(dim=-1)[scenes.present].amax(-1)
    assert 0.4 < float((moved > 4).float().mean()) < 0.95
    alone = sprite_motion.command(scenes.take(torch.tensor([7])), 4, first_index=7, frames=81)
    assert torch.equal(alone.centres[0], path[7])


def test_clips_of_paths_are_the_autoencoders():
    from distillation.demo_files import AUTOENCODER_FILE, load_demo_autoencoder
    from distillation.recipes import DEMO
    from distillation.samples import to_host_scale

    autoencoder = load_demo_autoencoder(DEMO / AUTOENCODER_FILE)
    scenes = sprites.sample_scenes(2, seed=1)
    path = sprites.positions(scenes, torch.arange(9))
    latents = sprite_motion.encode_clips(autoencoder, scenes, path)
    whole = autoencoder.encode(sprites.to_pixels(sprites.render(scenes, torch.arange(9))))
    torch.testing.assert_close(to_host_scale(latents), whole, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Sources


def test_what_training_feeds_the_adapter_is_what_a_node_feeds_it(tmp_path):
    field = camera_flow(16, 32, 48, pan=(1.5, -0.5), zoom=0.4)
    save_file({"flow": field.flow.contiguous(), "valid": field.valid.contiguous()}, tmp_path / "1.safetensors")
    fields = FlowFields(str(tmp_path), ["a", "b"], 4, 6, 0.0)
    found = fields.features([0, 1], [5, 6], 5)
    assert torch.equal(found[1:], adapter_features(field, 5, 4, 6)), "by the one function that ComfyUI's run calls"
    assert not found[0].any(), "a prompt without a file"


def test_motion_depends_on_prompt_and_seed_and_is_dropped_at_its_share():
    fields = FlowFields("sprites", [CAPTION, "a blue square moves up"], 4, 4, 0.5)
    seeds = list(range(40))
    found = fields.features([0] * 40, seeds, 4)
    assert torch.equal(found[3:4], fields.features([0], [3], 4))
    empty = float((found.flatten(1).abs().amax(1) == 0).float().mean())
    assert 0.3 < empty < 0.75
    assert not fields.features([0], [1], 1).any(), "one latent frame has no motion"
    always = FlowFields("synthetic", [CAPTION], 4, 4, 0.0).features([0] * 12, range(12), 4)
    assert (always[:, 2].flatten(1).amax(1) > 0).all() and len({round(float(x.sum()), 5) for x in always}) == 12


def test_synthetic_motion_is_camera_or_tracks():
    fields = [synthetic_flow(20, 16, 24, torch.Generator().manual_seed(seed)) for seed in range(24)]
    everywhere = [bool(field.valid.all()) for field in fields]
    assert 4 < sum(everywhere) < 20
    assert all(float(field.flow[field.valid].norm(dim=-1).max()) < 1.5 for field in fields)


def test_a_folder_that_holds_nothing_or_nonsense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder with no flow files"):
        FlowFields(str(tmp_path / "nowhere"), ["a"], 4, 4, 0.0)
    save_file({"flow": torch.full((4, 8, 8, 2), float("nan"))}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"0.safetensors: .*NaN"):
        FlowFields(str(tmp_path), ["a"], 4, 4, 0.0).features([0], [0], 2)


# ---------------------------------------------------------------------------------------------------------------
# Training


def test_student_teacher_and_fake_score_are_told_the_same(inputs, tmp_path, monkeypatch):
    trainer = trainer_of(flow_recipe(inputs), tmp_path)
    told: dict[str, list[Tensor]] = {"student": [], "teacher": [], "fake_score": []}
    for name, seen in told.items():
        network = getattr(trainer.networks, name).network
        usual = network.forward

        def forward(*args, optical_flow=None, usual=usual, seen=seen, **kwargs):
            seen.append(optical_flow)
            return usual(*args, optical_flow=optical_flow, **kwargs)

        monkeypatch.setattr(network, "forward", forward)
    found = trainer.update(0)
    assert found["student_norm"] > 0
    rollout, _ = trainer.rollout(0, trainer.recipe.fake_score_updates, "student", 0)
    flow = rollout.optical_flow
    assert flow is not None and flow.shape == (4, 4, 5, 4, 4) and float(flow[:, 2].max()) > 0
    assert all(torch.equal(seen, flow) for seen in told["teacher"]), "conditional and unconditional"
    assert len(told["teacher"]) == 2 and torch.equal(told["fake_score"][-1], flow)
    assert torch.equal(told["student"][-1], flow[:, :, 4:]), "the last chunk's own frames"


def test_only_a_recipe_with_flow_learns_the_adapter_and_the_export_carries_it(inputs, tmp_path):
    recipe = flow_recipe(inputs, student=str(inputs / "teacher.safetensors"))
    train_here(recipe, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "student.safetensors", dtype=torch.float32)
    weights = load_file(tmp_path / "student.safetensors")
    assert all(weights[key].abs().max() > 0 for key in FLOW_ADAPTER_KEYS), "it began with zeros"
    train_here(replace(recipe, flow_adapter=""), tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "plain.safetensors", dtype=torch.float32)
    assert not set(FLOW_ADAPTER_KEYS) & load_file(tmp_path / "plain.safetensors").keys()


def test_flow_that_is_always_dropped_is_no_flow(inputs, tmp_path):
    plain = tiny_recipe(inputs)
    same = replace(
        plain, flow_adapter="synthetic", flow_dropout=0.99999, teacher=str(inputs / "teacher_zero.safetensors")
    )
    zeros = read_wan(plain.teacher, replace(same).model)
    save_file({name: value.contiguous() for name, value in zeros.state_dict().items()}, same.teacher)
    left, right = train_here(plain, tmp_path / "plain"), train_here(same, tmp_path / "same")
    right = {name: value for name, value in right.items() if "flow_embedding" not in name}
    assert largest_difference(left, right) == 0


def test_trajectories_are_solved_and_kept_with_their_flow(inputs, tmp_path):
    recipe = flow_recipe(
        inputs, stage="ode", clips=str(tmp_path / "clips"), updates=1, micro_batch=2, batch=2, flow_adapter="synthetic"
    )
    trainer = trainer_of(recipe, tmp_path / "run")
    latents, _, rows, flow = trainer.clips.take([2])
    assert flow is not None and float(flow[:, 2].max()) > 0
    seed = train.sample_seed(recipe.seed, "ode", 2)
    torch.testing.assert_close(flow, trainer.flows.features(rows, [seed], recipe.frames), atol=2e-3, rtol=2e-3)
    teacher = trainer.networks.teacher.network
    context = trainer.prompts.embeddings(rows)

    def solved(optical_flow):
        from distillation.trajectories import teacher_settings, trajectory_schedule

        chunks = stream(
            teacher, context, trainer.noise([seed]), trajectory_schedule(recipe), teacher_settings(recipe),
            recipe.frames, precision=torch.float32, cfg=recipe.cfg, negative=trainer.negative,
            optical_flow=optical_flow,
        )  # fmt: skip
        return torch.cat(list(chunks), dim=2)

    assert (solved(flow) - latents).abs().max() < 0.05
    assert (solved(None) - latents).abs().max() > 0.1
    assert trainer.update(0)["student_norm"] > 0
    with pytest.raises(ValueError, match="was made for"):
        trainer_of(replace(recipe, flow_dropout=0.5), tmp_path / "other")


def test_stage_long_shows_the_scores_the_windows_own_motion(inputs, tmp_path):
    trainer = trainer_of(flow_recipe(inputs, stage="long", frames=4, rollout_frames=8), tmp_path)
    for update in range(20):
        rollout, _ = trainer.rollout(update, 0, "student", 0)
        if rollout.first_frame:
            assert rollout.optical_flow.shape[2] == rollout.frames
            assert torch.equal(rollout.seen_flow, rollout.optical_flow[:, :, -4:])
            return
    raise AssertionError("no long rollout")


def test_a_teacher_without_an_adapter_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="has no optical-flow adapter"):
        trainer_of(flow_recipe(inputs, teacher=str(inputs / "teacher.safetensors")), tmp_path)
    with pytest.raises(ValueError, match="has no optical-flow adapter"):
        trainer_of(flow_recipe(inputs, student=str(inputs / "teacher.safetensors"), lora_rank=2), tmp_path)
    trainer = trainer_of(flow_recipe(inputs, lora_rank=2), tmp_path)
    assert not any("flow_embedding" in name for name in trainer.student.parameters)


def test_the_flow_learning_rate_is_the_adapters_own(inputs, tmp_path):
    groups = trainer_of(flow_recipe(inputs, flow_learning_rate=0.5), tmp_path).student.optimizer.param_groups
    assert [(len(group["params"]), group["peak"]) for group in groups][1:] == [(2, 0.5)]
    assert len(trainer_of(tiny_recipe(inputs), tmp_path).student.optimizer.param_groups) == 1
