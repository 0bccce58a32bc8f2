"""Training that is killed, runs out of disk, diverges or loses a rank: each checkpoint stays whole, and the run goes on
as if nothing had been.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import fault_rows
import pytest
import torch
from forks import forks
from tiny_run import (
    ROOT,
    command,
    environment,
    flags,
    largest_difference,
    last_tensors,
    make_inputs,
    start,
    tiny_recipe,
)

from distillation import run_folder, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")

UPDATES = 4
PATIENCE_S = 300.0
PRELUDE = """
import sys
sys.path += [{root!r}]
import torch
torch.set_num_threads(1)
from distillation import train

def job(arguments):
    return train.main(arguments)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def children(tmp_path):
    """Processes that train."""
    with forks(PRELUDE.format(root=str(ROOT)), tmp_path) as made:
        yield made


def arguments(recipe, run: Path) -> list[str]:
    return [*flags(recipe), "--out", str(run), "--threads", "1"]


def saved(run: Path) -> list[int]:
    """Updates of the complete checkpoints, each of which is read whole."""
    found = run_folder.checkpoints(run)
    for _, path in found:
        assert all(torch.isfinite(value).all() for value in run_folder.load_whole(path, "").values()), path.name
    return [update for update, _ in found]


def told(job) -> str:
    return "\n".join(job.lines[-5:])


def test_row_train_kill(inputs, tmp_path, children):
    recipe = tiny_recipe(inputs, updates=UPDATES)
    assert children.run(arguments=arguments(recipe, tmp_path / "sound")).code == 0
    sound = last_tensors(tmp_path / "sound")

    def check(number: int) -> None:
        rng = fault_rows.generator("train_kill", number)
        run = tmp_path / f"run{number}"
        before: list[int] = []
        for at in sorted(rng.sample(range(UPDATES), rng.choice((1, 2)))):
            job = children.start(arguments=arguments(recipe, run))
            give_up = time.monotonic() + PATIENCE_S
            begun = run / "checkpoints" / f"update_{at:06d}"
            # While a checkpoint is being written, or some time behind it.
            shown = begun.with_suffix(".partial") if rng.random() < 0.5 else begun
            while at and not shown.exists() and not begun.exists() and job.code is None and time.monotonic() < give_up:
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.05)
            job.kill()
            there = saved(run) if (run / "checkpoints").exists() else []
            assert set(before) <= set(there), f"killed at {at}: {before} were there, {there} are"
            before = there
        assert (job := children.run(arguments=arguments(recipe, run))).code == 0, told(job)
        assert saved(run) == list(range(1, UPDATES + 1))
        assert largest_difference(sound, last_tensors(run)) == 0, "it learned something else"
        assert not list((run / "checkpoints").glob("*.partial"))

    fault_rows.run_cases("train_kill", check)


@contextlib.contextmanager
def full_disk(at: int):
    """Writes of this process fail behind so many bytes of a file, as they do on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_row_train_disk(inputs, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = tiny_recipe(inputs, updates=UPDATES)
    assert train.main(arguments(recipe, tmp_path / "sound")) == 0
    sound = last_tensors(tmp_path / "sound")

    def check(number: int) -> None:
        rng = fault_rows.generator("train_disk", number)
        run, done = tmp_path / f"run{number}", rng.randrange(1, UPDATES)
        assert train.main(arguments(replace(recipe, updates=done), run)) == 0
        capsys.readouterr()
        with full_disk(rng.choice((1, 100, 10_000, 200_000))):
            code = train.main(arguments(recipe, run))
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
        assert code == 1 and ("File too large" in message or "could not be written" in message), message
        assert saved(run)[-1] == done and not list((run / "checkpoints").glob("*.partial")), message
        assert train.main(arguments(recipe, run)) == 0
        assert largest_difference(sound, last_tensors(run)) == 0, "it learned something else"

    try:
        fault_rows.run_cases("train_disk", check)
    finally:
        torch.set_num_threads(threads)


def test_row_train_nan(inputs, tmp_path, capsys, monkeypatch):
    """A weight becomes NaN before an update; the run stops, and goes on from its last checkpoint without it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = tiny_recipe(inputs, updates=UPDATES)
    assert train.main(arguments(recipe, tmp_path / "sound")) == 0
    sound = last_tensors(tmp_path / "sound")
    real = train.Trainer.update

    def check(number: int) -> None:
        rng = fault_rows.generator("train_nan", number)
        run, at = tmp_path / f"run{number}", rng.randrange(UPDATES)
        bad = rng.choice((float("nan"), float("inf"), -float("inf")))
        role = rng.choice(("student", "fake_score"))

        def spoiled(trainer, update):
            if update == at:
                network = getattr(trainer.networks, role).network
                parameters = [p for p in network.parameters() if p.requires_grad]
                with torch.no_grad():
                    parameters[rng.randrange(len(parameters))].view(-1)[0] = bad
            return real(trainer, update)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "update", spoiled)
            code = train.main(arguments(recipe, run))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
        assert code == 1 and len(lines) == 1 and f"update {at}" in lines[0], (code, lines)
        assert (saved(run) if at else run_folder.checkpoints(run)) == list(range(1, at + 1)), "a spoiled one was kept"
        assert train.main(arguments(recipe, run)) == 0
        assert largest_difference(sound, last_tensors(run)) == 0, "it learned something else"

    try:
        fault_rows.run_cases("train_nan", check)
    finally:
        torch.set_num_threads(threads)


def ranks_below(pid: int) -> list[int]:
    """The processes that a torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            parent = next(line for line in (path / "status").read_text().splitlines() if line.startswith("PPid:"))
            if int(parent.split()[1]) == pid:
                variables = (path / "environ").read_bytes().split(b"\0")
                rank = next(entry for entry in variables if entry.startswith(b"RANK="))
                found[int(rank[5:])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks are found in /proc")
def test_row_train_rank(inputs, tmp_path):
    recipe = tiny_recipe(inputs, updates=400, micro_batch=2)
    assert environment()["OMP_NUM_THREADS"] == "1"

    def check(number: int) -> None:
        rng = fault_rows.generator("train_rank", number)
        run, at = tmp_path / f"run{number}", rng.randrange(1, 4)
        process = start(command(recipe, run, ranks=2))
        try:
            give_up = time.monotonic() + PATIENCE_S
            while len(run_folder.checkpoints(run)) < at and process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.2)
            ranks = ranks_below(process.pid)
            assert len(ranks) == 2, process.poll()
            os.kill(rng.choice(ranks), signal.SIGKILL)
            process.communicate(timeout=PATIENCE_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        assert process.returncode != 0
        there = saved(run)
        assert there and there[-1] >= at
        assert train.main(arguments(replace(recipe, updates=there[-1] + 1, micro_batch=4), run)) == 0
        assert saved(run)[-1] == there[-1] + 1

    fault_rows.run_cases("train_rank", check)
