"""Low-rank adapters on a frozen network, several of them by name on one copy of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.common import generator_at


class Adapter(nn.Module):
    """x -> up(down(x)); alpha is the rank, so there is no scale. `up` starts at zero: no change at first."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = base.in_features**-0.5
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class AdaptedLinear(nn.Linear):
    """A frozen linear layer under its own names, with adapters of which at most one is active."""

    def __init__(self, base: nn.Linear, rank: int, names: Sequence[str], generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.adapters = nn.ModuleDict({name: Adapter(base, rank, generator) for name in names})
        self.active: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        if self.active is None:
            return out
        return out + self.adapters[self.active](input).to(out.dtype)


def add_adapters(network: nn.Module, rank: int, names: Sequence[str], seed: int) -> None:
    """Freezes `network` and gives every linear layer of its blocks adapters, in place."""
    network.requires_grad_(False)
    found = [
        (path, module)
        for path, module in network.named_modules()
        if path.startswith("blocks.") and isinstance(module, nn.Linear)
    ]
    for index, (path, module) in enumerate(found):
        parent, _, name = path.rpartition(".")
        adapted = AdaptedLinear(module, rank, names, generator_at(seed, 7, index))
        setattr(network.get_submodule(parent), name, adapted)


@contextmanager
def using_adapter(network: nn.Module, name: str | None) -> Iterator[None]:
    """Makes one adapter active, or none. Forward and backward belong inside: a recomputed block must see the same."""
    layers = [module for module in network.modules() if isinstance(module, AdaptedLinear)]
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = name
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by their path in the network."""
    marker = f".adapters.{name}."
    return {path: parameter for path, parameter in network.named_parameters() if marker in path}


def host_lora(parameters: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """An adapter's tensors under ComfyUI's LoRA names, `diffusion_model.<layer>.lora_down.weight` and so on."""
    out = {}
    for path, value in parameters.items():
        layer, part = path.split(f".adapters.{name}.")
        out[f"diffusion_model.{layer}.lora_{part}.weight"] = value
        if part == "down":
            out[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(value.shape[0]))
    return out
