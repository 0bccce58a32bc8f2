"""The demo within a time limit: trainings of the student that end when their time does."""

from __future__ import annotations

import json

import pytest
import torch

from distillation import demo_in_minutes, recipes
from distillation.ranks import Ranks

RANKS = Ranks(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize("update_seconds", [0.05, 0.5, 3.0])
def test_a_student_is_trained_for_the_time_it_has(tmp_path, monkeypatch, update_seconds) -> None:
    now, runs = 100.0, []

    def run(recipe, folder, ranks) -> None:
        nonlocal now
        now += 1.0  # to begin with, and at each restart
        lines = (folder / "log.jsonl").read_text().splitlines() if runs else []
        for update in range(len(lines), recipe.updates):
            now += update_seconds
            lines.append(json.dumps({"update": update, "seconds": update_seconds}))
        (folder / "log.jsonl").write_text("\n".join(lines))
        runs.append((recipe.updates, recipe.cooldown))

    monkeypatch.setattr(demo_in_minutes, "run_recipe", run)
    monkeypatch.setattr(demo_in_minutes.time, "perf_counter", lambda: now)
    demo_in_minutes.train_student(recipes.demo(), tmp_path, 80, RANKS)
    assert 70 < now - 100 <= 80
    updates, cooldowns = zip(*runs, strict=True)
    assert list(updates) == sorted(set(updates))
    assert not any(cooldowns[:-1]) and cooldowns[-1] == updates[-1] - updates[-2]


def test_a_student_without_time_is_trained_a_little(tmp_path, monkeypatch) -> None:
    runs = []

    def run(recipe, folder, ranks) -> None:
        lines = [json.dumps({"update": update, "seconds": 9.0}) for update in range(recipe.updates)]
        (folder / "log.jsonl").write_text("\n".join(lines))
        runs.append(recipe.updates)

    monkeypatch.setattr(demo_in_minutes, "run_recipe", run)
    demo_in_minutes.train_student(recipes.demo(), tmp_path, 0.1, RANKS)
    assert runs[-1] < demo_in_minutes.PROBE_UPDATES + 5


def test_each_part_leaves_time_for_those_behind_it(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(demo_in_minutes.time, "perf_counter", lambda: now)
    clock = demo_in_minutes.Clock(100)
    now = 30.0
    assert clock.until_left(0.4) == pytest.approx(30)
    now = 95.0
    assert clock.until_left(0.4) == 1.0
