"""What the demo's trainings share: optimizers, the pace of their rates, losses, and a checkpoint to go on from."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from diagonal_sampler.disk import whole_file
from distillation.common import fast_bf16, keep_freed_memory

log = logging.getLogger("demo_run")

GRADIENT_CLIP = 1.0
FREE_FIELDS = frozenset(("updates", "seconds", "save_every", "compile"))
"""A resumed run may change these fields of its recipe."""

Optimizers = list[tuple[torch.optim.Optimizer, float]]
"""Each with its peak learning rate."""


# ---------------------------------------------------------------------------------------------------------------
# Optimizers


class Orthogonal(torch.optim.Optimizer):
    """Momentum descent along the orthogonalised update ("Muon"), for weight matrices and flattened convolutions.

    The update is U V^T of the momentum's singular value decomposition U S V^T, found by a quintic Newton-Schulz
    iteration, and scaled by 0.2 * sqrt(max(rows, columns)) so that its root mean square equals a typical AdamW
    update's. Matrices of one shape are treated in one batched product. (Jordan et al. 2024; scale: Moonlight 2025.)
    """

    ITERATION = (3.4445, -4.7750, 2.0315)
    STEPS = 5
    MOMENTUM = 0.95

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        # Checkpoints have the momentum.
        super().__init__(params, {"lr": lr, "momentum": self.MOMENTUM, "weight_decay": weight_decay})

    @classmethod
    def orthogonalise(cls, matrices: Tensor) -> Tensor:
        """[N, rows, columns] -> nearly orthogonal matrices of the same shape (singular values near 1)."""
        a, b, c = cls.ITERATION
        flip = matrices.shape[1] > matrices.shape[2]
        x = matrices.bfloat16() if fast_bf16(matrices.device) else matrices.float()
        x = x.mT if flip else x
        x = x / (x.float().norm(dim=(1, 2), keepdim=True).to(x.dtype) + 1e-7)
        for _ in range(cls.STEPS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mT if flip else x).float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = self.orthogonalise(torch.stack(directions).flatten(2))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    parameters,
                    [update.view_as(parameter) for parameter, update in zip(parameters, updates, strict=True)],
                    alpha=-scale,
                )


def make_adamw(parameters: list[Tensor], rate: float, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as all trainings of the demo use it; on a GPU in one kernel."""
    fused = True if parameters[0].is_cuda else None
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)


def make_optimizers(
    matrices: list[Tensor], others: list[Tensor], *, matrix_rate: float, rate: float, weight_decay: float = 0.01
) -> Optimizers:
    """Orthogonalised updates for `matrices`, AdamW for the rest."""
    adamw = make_adamw(others, rate, weight_decay=weight_decay)
    return [(adamw, rate), (Orthogonal(matrices, matrix_rate, weight_decay), matrix_rate)]


# ---------------------------------------------------------------------------------------------------------------
# Pace


class Pace:
    """How far a run is, and its learning rates: a linear warm-up, then a cosine over the rest.

    Args:
        updates: after which a run is done; None leaves it to `seconds`.
        warmup: updates.
        seconds: from now on, after which it is done as well; None is no limit.
    """

    FLOOR = 0.02
    """Where the cosine ends, as a share of the peak."""

    def __init__(self, updates: int | None, warmup: int, seconds: float | None = None) -> None:
        if updates is None and seconds is None:
            raise ValueError("neither updates nor seconds are given; a run must end")
        self.updates, self.warmup, self.seconds = updates, warmup, seconds
        self.started = time.perf_counter()

    def done(self, update: int) -> float:
        """Part of the run that is done before an update, 1 at its end."""
        done = 0.0
        if self.updates is not None:
            done = update / self.updates if update < self.updates else 1.0
        if self.seconds is not None:
            done = max(done, (time.perf_counter() - self.started) / max(1e-9, self.seconds))
        return min(1.0, done)

    def updates_from(self, first: int, stop: int | None = None) -> Iterator[int]:
        """The updates that are left, until `stop` or the end of the run."""
        update = first
        while (stop is None or update < stop) and self.done(update) < 1:
            yield update
            update += 1

    def factor(self, update: int) -> float:
        """Of the peak learning rates. With limited time the cosine goes by the time."""
        warm = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        if self.seconds is None:
            done = max(0, update - self.warmup) / max(1, self.updates - self.warmup)
        else:
            done = self.done(update)
        return warm * (self.FLOOR + (1 - self.FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def set_rates(self, optimizers: Optimizers, update: int) -> None:
        """Sets the learning rates of an update."""
        factor = self.factor(update)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor


def progress(updates: Iterable[Any], description: str, total: int | None = None) -> Any:
    """The same, with a bar on the terminal."""
    from tqdm import tqdm

    return tqdm(updates, desc=description, total=total, mininterval=5, smoothing=0.05, dynamic_ncols=True)


class Losses:
    """Means of losses since they were last read; nothing waits for the device in between."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.text = ""

    def add(self, **values: Tensor) -> None:
        """The losses of an update, the same names in all."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
        self.count += 1

    def read(self, update: int) -> str:
        """The means as text, and begins again; what was read last where no update came since.

        Raises:
            ValueError: one that is not finite.
        """
        if not self.sums:
            return self.text
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(f"the loss ({name}) is {mean} by update {update}; lower the learning rates")
        self.text = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        return self.text


# ---------------------------------------------------------------------------------------------------------------
# What is kept


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        torch.save(state, partial)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def read_run(path: Path) -> dict[str, Any]:
    """The checkpoint of a run that is to be there.

    Raises:
        ValueError: it is not.
    """
    saved = load_checkpoint(path)
    if saved is None:
        raise ValueError(f"out={os.fspath(path.parent)!r} holds no {path.name}; train it first")
    return saved


def require_same_recipe(path: Path, saved: dict[str, Any], recipe: Any) -> None:
    """Raises ValueError where a checkpoint is another recipe's, but for FREE_FIELDS; older ones do not say whose."""
    before = saved.get("recipe", {})
    differences = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in asdict(recipe).items()
        if name not in FREE_FIELDS and name in before and before[name] != value
    ]
    if differences:
        raise ValueError(
            f"{path} is another run's: {'; '.join(differences)}. Choose another --out, or the same values to resume."
        )


class Ema:
    """Exponential moving average of a module's state, warmed up so that early averages are not the initial noise."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, update: int) -> None:
        decay = min(self.decay, (1 + update) / (10 + update))
        averages, values = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)


class Training:
    """A network that is trained: its optimizers, its moving average, and the checkpoint of them all.

    Args:
        path: of the checkpoint.
        model: where it is trained.
        recipe: a dataclass; a resumed run must agree with it, but for FREE_FIELDS.
        begun_with: files of weights that the run begins with; a resumed run must be given the same, under any name.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimizers: Optimizers,
        recipe: Any,
        *,
        ema_decay: float,
        begun_with: Sequence[Path] = (),
    ) -> None:
        self.path, self.model, self.optimizers, self.recipe = path, model, optimizers, recipe
        self._begun_with = [hashlib.sha256(file.read_bytes()).hexdigest() for file in begun_with]
        self.ema = Ema(model, ema_decay)
        groups = [group for optimizer, _ in optimizers for group in optimizer.param_groups]
        self._parameters = [parameter for group in groups for parameter in group["params"]]

    def resume(self) -> int:
        """Goes on from the checkpoint, if there is one; the update to begin with.

        Raises:
            ValueError: it is another recipe's, or began with other weights.
        """
        saved = load_checkpoint(self.path)
        if saved is None:
            return 0
        require_same_recipe(self.path, saved, self.recipe)
        if saved.get("begun_with", self._begun_with) != self._begun_with:  # older checkpoints do not say
            raise ValueError(
                f"{self.path} is of a run that began with other weights; give those again, or a new folder."
            )
        self.model.load_state_dict(saved["model"])
        for (optimizer, _), state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, value in self.ema.state.items():
            value.copy_(saved["ema"][name])
        log.info("resumed %s at update %d", self.path, saved["update"])
        return saved["update"]

    def updates(
        self,
        pace: Pace,
        losses: Losses,
        first: int,
        stop: int | None = None,
        saved: Callable[[dict[str, Tensor], int], None] | None = None,
    ) -> Iterator[int]:
        """The updates that are left, as Pace has them; a checkpoint every `save_every` of the recipe, and at the end.

        Args:
            losses: they are read before.
            first: the update to begin with.
            saved: is given the averaged weights and how many updates are done, at every checkpoint.

        Raises:
            ValueError: a loss that is not finite; there is no checkpoint then.
        """

        def keep(update: int) -> None:
            text = losses.read(update)
            self.save(update + 1)
            if saved is not None:
                saved(self.ema.state, update + 1)
            log.info("%s: update %d, %.0f s: %s", self.path, update + 1, time.perf_counter() - pace.started, text)

        update = first - 1
        for update in pace.updates_from(first, stop):
            yield update
            if (update + 1) % self.recipe.save_every == 0:
                keep(update)
        keep(update)

    def step(self, update: int) -> None:
        """An update by the gradients that were gathered, which are spent."""
        nn.utils.clip_grad_norm_(self._parameters, GRADIENT_CLIP)
        for optimizer, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, update)

    def save(self, update: int, **more: Any) -> None:
        """Writes the checkpoint of a run that has done `update` updates.

        Args:
            more: entries beside the usual ones.
        """
        state = {
            "update": update,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "ema": self.ema.state,
            "recipe": asdict(self.recipe),
            "begun_with": self._begun_with,
        }
        save_checkpoint(self.path, state | more)


# ---------------------------------------------------------------------------------------------------------------
# Command lines


def add_fields(parser: argparse.ArgumentParser, recipe: type, but: Collection[str] = ()) -> None:
    """A flag for every field of a recipe; one that is not given is None.

    Args:
        recipe: a dataclass with fields of int, float, str or a Literal, their help as `recipes.option` leaves it.
        but: fields without a flag.
    """
    group, kinds = parser.add_argument_group("fields of the recipe"), get_type_hints(recipe)
    for item in fields(recipe):
        if item.name in but:
            continue
        kind, choices = kinds[item.name], get_args(kinds[item.name])
        assert choices or kind in (int, float, str), f"{item.name}: a flag cannot be {kind}"
        how = {"choices": choices} if choices else {"type": kind, "metavar": "VALUE"}
        group.add_argument(f"--{item.name.replace('_', '-')}", help=item.metadata.get("help"), **how)


def given(options: argparse.Namespace, recipe: type) -> dict[str, Any]:
    """The fields of a recipe that flags set."""
    names = [item.name for item in fields(recipe)]
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def begin(options: argparse.Namespace) -> torch.device:
    """Logging, threads and memory as the flags say; the device."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
