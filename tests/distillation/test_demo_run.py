"""What the demo's trainings share: a run's pace, and a checkpoint that only its own recipe goes on from."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import pytest
import torch
from tiny_run import same
from torch import nn

from distillation import train_flow, train_follow, train_levels
from distillation.demo_run import (
    Ema,
    Losses,
    Pace,
    Training,
    add_fields,
    given,
    load_checkpoint,
    make_adamw,
    read_run,
)
from distillation.recipes import DEMO, option


@dataclass(frozen=True)
class Recipe:
    updates: int = 4
    batch: int = 2
    save_every: int = 2


def training(path, recipe, **options) -> Training:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return Training(
        path, model, [(make_adamw([*model.parameters()], 1.0, weight_decay=0.0), 0.1)], recipe, ema_decay=0.5, **options
    )


def step(run: Training, pace: Pace, update: int) -> None:
    pace.set_rates(run.optimizers, update)
    run.model(torch.full((1, 3), 1.0 + update)).square().sum().backward()
    run.step(update)


def test_a_run_ends_after_its_updates_and_its_rates_rise_and_fall():
    pace = Pace(10, warmup=4)
    assert list(pace.updates_from(3)) == list(range(3, 10)) and list(pace.updates_from(0, 2)) == [0, 1]
    factors = [pace.factor(update) for update in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1] and factors[4] == 1
    assert all(later < earlier for earlier, later in zip(factors[4:], factors[5:], strict=False))
    assert pace.factor(10) == pytest.approx(Pace.FLOOR)
    assert not list(Pace(0, warmup=1).updates_from(0)), "a run of no updates makes none"
    assert not list(Pace(10, warmup=1, seconds=0.0).updates_from(0)), "nor does one of no time"
    with pytest.raises(ValueError, match="must end"):
        Pace(None, warmup=1)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    pace, whole = Pace(4, warmup=1), training(tmp_path / "whole.pt", Recipe())
    for update in range(4):
        step(whole, pace, update)
    whole.save(4)
    first = training(tmp_path / "parts.pt", Recipe())
    assert first.resume() == 0
    for update in range(2):
        step(first, pace, update)
    first.save(2, more="kept")
    assert read_run(first.path)["more"] == "kept"
    second = training(tmp_path / "parts.pt", Recipe(updates=4))
    assert second.resume() == 2
    for update in range(2, 4):
        step(second, pace, update)
    second.save(4)
    one, other = load_checkpoint(whole.path), load_checkpoint(second.path)
    assert same(one, other)
    assert not torch.equal(one["ema"]["weight"], one["model"]["weight"])


def test_only_its_own_recipe_goes_on_from_a_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    training(path, Recipe()).save(1)
    assert training(path, replace(Recipe(), updates=9)).resume() == 1
    with pytest.raises(ValueError, match=r"run\.pt is another run's: batch was 2 and is 3\. Choose another --out"):
        training(path, Recipe(batch=3)).resume()
    with pytest.raises(ValueError, match=r"holds no other\.pt; train it first"):
        read_run(tmp_path / "other.pt")


def test_averages_are_mostly_the_new_weights_at_first_and_later_the_old_ones():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.75)
    nn.init.constant_(module.weight, 8.0)
    ema.update(module, 0)
    assert float(ema.state["weight"]) == pytest.approx(7.2), "decay 1 / 10"
    nn.init.zeros_(module.weight)
    ema.update(module, 1000)
    assert float(ema.state["weight"]) == pytest.approx(5.4), "decay 0.75"


def test_losses_are_means_since_they_were_read():
    losses = Losses()
    assert losses.read(0) == ""
    losses.add(one=torch.tensor(1.0), two=torch.tensor(4.0))
    losses.add(one=torch.tensor(2.0), two=torch.tensor(4.0))
    assert losses.read(2) == "one 1.5000, two 4.0000" == losses.read(2)
    losses.add(one=torch.tensor(float("nan")))
    with pytest.raises(ValueError, match=r"the loss \(one\) is nan by update 3"):
        losses.read(3)


def test_checkpoints_come_when_they_are_due_and_at_the_end_and_none_of_a_loss_that_is_not_finite(tmp_path):
    run, pace, kept = training(tmp_path / "run.pt", Recipe()), Pace(4, warmup=1), []

    def saved(weights, done: int) -> None:
        assert weights is run.ema.state
        kept.append((done, read_run(run.path)["update"]))

    def make(first: int, stop: int | None, loss: float) -> None:
        losses = Losses()
        for update in run.updates(pace, losses, first, stop, saved):
            step(run, pace, update)
            losses.add(loss=torch.tensor(loss))

    make(0, 3, 1.0)
    assert kept == [(2, 2), (3, 3)]
    with pytest.raises(ValueError, match=r"the loss \(loss\) is nan by update 3"):
        make(3, None, math.nan)
    assert read_run(run.path)["update"] == 3
    make(4, None, 1.0)
    assert kept[2:] == [(4, 4)], "a run that is done is saved as it is"


def test_a_run_goes_on_only_from_the_weights_that_it_began_with(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "copy_of_a")]
    for file, content in zip(files, (b"1", b"2", b"1"), strict=True):
        file.write_bytes(content)
    a, b, copy = files
    path = tmp_path / "run.pt"
    training(path, Recipe(), begun_with=[a, b]).save(2)
    assert training(path, Recipe(), begun_with=[copy, b]).resume() == 2, "a name does not count"
    for others in ([a], [b, a], [a, b, b], []):
        with pytest.raises(ValueError, match="began with other weights"):
            training(path, Recipe(), begun_with=others).resume()


@dataclass(frozen=True)
class Flags:
    batch: int = option(2, "windows an update")
    rate: float = option(0.5, "of all weights")
    levels: str = option("", "to move to")
    ends: Literal["teacher", "none"] = option("teacher", "who finishes")
    few: bool = option(False, "no flag")


def test_every_field_of_a_recipe_is_a_flag_of_its_type():
    parser = argparse.ArgumentParser()
    add_fields(parser, Flags, but=("few",))
    options = parser.parse_args(["--batch", "3", "--rate", "2", "--ends", "none"])
    assert Flags(**given(options, Flags)) == Flags(batch=3, rate=2.0, ends="none")
    assert given(parser.parse_args(["--batch", "0"]), Flags) == {"batch": 0} and not given(parser.parse_args([]), Flags)
    for words in (["--batch", "2.5"], ["--rate", "much"], ["--ends", "world"], ["--few", "true"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
    with pytest.raises(AssertionError, match="few: a flag cannot be"):
        add_fields(argparse.ArgumentParser(), Flags)


@pytest.mark.parametrize("module", [train_levels, train_flow, train_follow])
def test_a_run_that_is_not_there_is_a_line(module, tmp_path, capsys):
    folders = ["--start", str(DEMO), "--out", str(tmp_path), "--export", str(tmp_path / "to")]
    assert module.main([*folders, "--threads", "1"]) == 1
    assert f"stopped: out={str(tmp_path)!r} holds no {module.CHECKPOINT}; train it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "recipe"),
    [
        (train_levels, train_levels.LevelsRecipe),
        (train_flow, train_flow.FlowRecipe),
        (train_follow, train_follow.FollowRecipe),
    ],
)
def test_a_training_names_and_explains_the_flag_of_every_field(module, recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for item in fields(recipe):
        words = " ".join(item.metadata["help"].split())
        flag = f"--{item.name.replace('_', '-')} "
        assert item.name == "few_steps" or (flag in shown and words in shown), item.name
