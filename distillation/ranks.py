"""One process among torchrun's: joining the others, agreeing with them, leaving.

All but `leave_ranks` work in a process that is alone, too.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from diagonal_sampler.weight_files import short


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all."""

    rank: int
    count: int
    device: torch.device
    mesh: Any

    @property
    def main(self) -> bool:
        return self.rank == 0


def join_ranks() -> Ranks:
    """Joins torchrun's process group, if there is one; `leave_ranks` leaves it.

    Raises:
        ValueError: more processes than GPUs, or several for GPUs without NCCL.
    """
    cuda = torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs; start "
            "torchrun with --nproc-per-node of at most that"
        )
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return Ranks(0, 1, torch.device("cuda" if cuda else "cpu"), None)
    if cuda and not dist.is_nccl_available():
        raise ValueError(
            "several ranks on GPUs need NCCL, which this torch does not have (on Linux it has); start one process, "
            "without torchrun"
        )
    from torch.distributed.device_mesh import init_device_mesh

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, mesh)


def mean_over_ranks(value: Tensor) -> float:
    """A number averaged over the ranks; the one read-back of an update."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def any_rank(value: bool, ranks: Ranks) -> bool:
    """Whether it is so on one of the ranks; all are told the same."""
    if not dist.is_initialized():
        return value
    flag = torch.full((), float(value), device=ranks.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def is_main() -> bool:
    """Whether this is the rank that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def require_same(what: str, value: Any) -> None:
    """Checks that all ranks, if there are several, found the same on disk.

    Args:
        what: the value in a message.
        value: anything that pickles.

    Raises:
        ValueError: on every rank, if two of them disagree.
    """
    if not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    if any(other != found[0] for other in found):
        raise ValueError(
            f"the ranks found different {what}: {', '.join(map(short, found))}; the run's folder, prompts and clips "
            "must lie where all machines see the same files."
        )


def leave_ranks(status: int) -> NoReturn:
    """Ends this process as one of several ranks, without the interpreter's own end.

    After a failure nothing is waited for: NCCL's end would wait for ranks that may be waiting for this one. After a
    success all ranks end together; gloo's threads outlive their process group, and one that lets go of a tensor while
    the interpreter ends aborts the process.
    """
    if not status:
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
