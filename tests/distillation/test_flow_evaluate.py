"""The measure of commanded motion: exact sprites score 0, rest scores its speed, and a killed run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diagonal_sampler.captions import SHAPES, caption_of, parse_caption
from diagonal_sampler.dit import WanConfig
from diagonal_sampler.flow import OpticalFlow
from distillation import flow_evaluate, sprites
from distillation.flow_evaluate import (
    FIELDS,
    Options,
    commanded_flow,
    commanded_path,
    evaluate,
    measure,
    page,
    scene,
    table,
)

FIRST = 8


def draw(spec, path: Tensor) -> Tensor:
    """Frames [T, 3, 64, 64] of the sprite at given centres."""
    axis = torch.arange(64) + 0.5
    alpha = sprites.coverage(
        torch.full((len(path),), SHAPES.index(spec.shape)),
        axis[None, None, :] - path[:, :1, None],
        axis[None, :, None] - path[:, 1:, None],
        torch.full((len(path),), 7.5),
    )
    colour = torch.tensor(sprites.RGB[spec.colour], dtype=torch.float32)
    return 28 + alpha[:, None] * (colour[:, None, None] - 28)


class Obedient:
    """Stands in for Player: goes where the flow is valid if the mode is reference, else rests."""

    digest, modes = "0" * 16, ("none", "reference")
    trained = SimpleNamespace(schedule=SimpleNamespace(sigmas=((1.0, 0.5),)), cfg=1.0)
    dit = SimpleNamespace(config=WanConfig(flow_adapter=True))

    def __init__(self) -> None:
        self.calls = 0

    def first_frame(self) -> int:
        return FIRST

    def clip(self, caption: str, seed: int, options: Options, flow: OpticalFlow | None = None, row: str = "none"):
        self.calls += 1
        (spec,) = parse_caption(caption)
        path = torch.full((options.length, 2), 30.0)
        if row.startswith("reference"):
            assert flow is not None and not flow.valid[:FIRST].any()
            # The middle of the valid disc is the track, but where the frame's edge cuts it.
            for step in range(FIRST, flow.steps):
                motion, known = flow.at(step, path[step] - 0.5)
                assert known
                path[step + 1] = path[step] + motion
        return draw(spec, path)


@pytest.mark.parametrize("kind", FIELDS)
def test_the_field_carries_its_own_track(kind) -> None:
    path = commanded_path(torch.tensor([12.0, 40.0]), 0.5, 2.25, 60)
    assert (path >= 8).all() and (path <= 56).all()
    field = commanded_flow(path, FIRST, kind)
    assert bool(field.valid[FIRST:].all()) == (kind == "camera") and not field.valid[:FIRST].any()
    assert field.steps == FIRST + 59 and field.valid[FIRST:].flatten(1).any(1).all()
    for step in (0, 20, 58):
        motion, known = field.at(FIRST + step, path[step] - 0.5)
        assert known and torch.allclose(motion, path[step + 1] - path[step], atol=1e-4)


def test_an_obedient_sprite_scores_nothing_and_a_resting_one_its_speed() -> None:
    spec, commands = scene(3, 0)
    path = commanded_path(torch.tensor([30.0, 30.0]), *commands["any"], frames=49)
    whole = torch.cat([path[:1].expand(FIRST, -1), path])
    good = measure(draw(spec, whole), spec, path, FIRST, 1.0)
    assert good.error < 0.05 and good.lost == 0 and good.colour and good.shape
    still = measure(draw(spec, whole[:1].expand(len(whole), -1)), spec, path, FIRST, 1.0)
    assert still.error == pytest.approx(still.commanded, abs=0.02)
    assert good.one and still.one
    gone = torch.full((len(whole), 3, 64, 64), 28.0)
    found = measure(gone, spec, path, FIRST, 1.0)
    assert found.lost == 1 and not found.one


def test_clips_that_begin_with_two_copies_are_told_apart_and_left_out() -> None:
    spec, commands = scene(3, 0)
    path = commanded_path(torch.tensor([20.0, 30.0]), *commands["any"], frames=49)
    whole = torch.cat([path[:1].expand(FIRST, -1), path])
    twice = torch.maximum(draw(spec, whole) - 28, draw(spec, whole + torch.tensor([26.0, 0.0])) - 28) + 28
    copies = measure(twice, spec, path, FIRST, 1.0)
    assert not copies.one
    good = measure(draw(spec, whole), spec, path, FIRST, 1.0)
    bad = replace(good, error=9.0, one=False)
    found = {(command, mode): [good, bad] for command in ("any", "caption") for mode in ("none", "reference 0.5")}
    found["any", "reference 0.5"] = [replace(good, error=good.error / 4), bad]
    text = table(found, Options(scenes=2, length=57))
    row = next(line for line in text.splitlines() if line.startswith("| reference"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3].startswith("25.0% [") and "are of 1 scenes" in text
    assert cells[4].startswith(f"{(good.error / 4 + 9) / (good.error + 9):.1%} [")


def test_what_is_drawn_is_told_of_all_scenes_with_an_interval() -> None:
    spec, commands = scene(3, 0)
    path = commanded_path(torch.tensor([30.0, 30.0]), *commands["any"], frames=49)
    good = measure(draw(spec, torch.cat([path[:1].expand(FIRST, -1), path])), spec, path, FIRST, 1.0)
    lost = replace(good, error=2 * good.error, one=False, colour=False)
    found = {(command, row): [good] * 16 for command in ("any", "caption") for row in ("none", "adapter+blend")}
    begun = [replace(good, one=False) for _ in range(4)]
    found = {key: rows + ([lost] * 4 if key[1] == "adapter+blend" else begun) for key, rows in found.items()}
    text = table(found, Options(scenes=20, length=57))
    head, row = (
        [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith(start)).split("|")]
        for start in ("| mode", "| adapter, blended")
    )
    by = dict(zip(head, row, strict=True))
    assert by["colour right"] == "100%" and by["of no flow"] == "100.0% [100.0, 100.0]"
    share, _, rest = by["colour, shape right, all 20 scenes"].partition(" ")
    low, high = (int(end) for end in rest[1 : rest.index("]")].split(","))
    assert share == "80%" and 50 < low < 75 and 85 < high <= 100
    low, high = (float(end) for end in by["of no flow, all 20 scenes"][len("120.0% [") : -1].split(","))
    assert 100 <= low < 115 and 125 < high < 145


def test_scenes_are_held_out_and_commands_are_what_they_say() -> None:
    for index in range(8):
        spec, commands = scene(index, 0)
        assert sprites.is_held_out(spec) and scene(index, 0) == (spec, commands)
        x, y = sprites.VELOCITY[spec.direction]
        along = commanded_path(torch.tensor([32.0, 32.0]), *commands["caption"], frames=3).diff(dim=0)
        assert (along[0] * torch.tensor([x, y])).sum() == pytest.approx(commands["caption"][1], abs=1e-4)
        assert commands["caption"][1] != sprites.PIXELS_PER_FRAME[spec.speed]


def test_a_run_goes_on_and_its_table_says_who_obeys(tmp_path) -> None:
    options = Options(scenes=2, length=33, start_sigmas=(0.6, 0.5))
    first, second = Obedient(), Obedient()
    found = evaluate(first, options, tmp_path, first.modes)
    assert first.calls == 2 * (1 + 2 * 2)
    next(tmp_path.glob("*-any-reference-1.json")).unlink()
    again = evaluate(second, options, tmp_path, second.modes)
    assert second.calls == 2, "the missing clip, and the one that its track begins in"
    assert {key: [r.error for r in rows] for key, rows in again.items()} == {
        key: [r.error for r in rows] for key, rows in found.items()
    }
    text = table(found, options)
    assert text.count("| no flow |") == 2 and "adapter | not measured" in text
    row = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert float(row.split("|")[2]) < 0.1
    assert text.count("start sigma 0.6 |") == text.count("start sigma 0.5 |") == 2
    assert "--scenes 2 --length 33 --seed 0 --start-sigma 0.6 0.5" in page(found, options, first)
    elsewhere = page(found, options, first, to=Path("docs/other.md"), modes="none,adapter")
    assert "--blend 1 --modes none,adapter --write docs/other.md`" in elsewhere
    by_camera = evaluate(second, replace(options, field="camera"), tmp_path, ("none", "reference"))
    assert second.calls == 2 + 2 * (1 + 2 * 2), "of another field nothing is known"
    assert "--blend 1 --field camera --write" in page(by_camera, replace(options, field="camera"), second)


def test_options_are_checked(capsys) -> None:
    with pytest.raises(ValueError, match="length is 34"):
        Options(length=34)
    with pytest.raises(ValueError, match="scenes is 0"):
        Options(scenes=0)
    assert flow_evaluate.main(["--scenes", "0"]) == 1
    assert "stopped: scenes is 0" in capsys.readouterr().err


def test_captions_name_one_sprite() -> None:
    spec, _ = scene(0, 0)
    assert parse_caption(caption_of((spec,))) == (spec,)
