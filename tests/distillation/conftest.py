"""Trainings in this process run on the CPU, and leave torch's settings and the C library's as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distillation import common, demo_in_minutes, demo_run, train


@pytest.fixture(autouse=True, scope="module")
def process_stays() -> Iterator[None]:
    """For a module's own fixtures too. The processes that tests start see no GPU either (tiny_run.environment)."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for module in (common, demo_run, demo_in_minutes, train):
            patch.setattr(module, "keep_freed_memory", lambda: None)  # what mallopt is told cannot be undone
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def threads_stay(process_stays: None) -> Iterator[None]:
    """Command lines set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
