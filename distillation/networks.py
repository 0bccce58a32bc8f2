"""Student, teacher and fake score: where their weights come from, and how they are spread over ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diagonal_sampler.checkpoints import load_checkpoint
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.wan_layout import FLOW_ADAPTER_KEYS
from diagonal_sampler.weight_files import listed
from distillation.common import fast_bf16
from distillation.lora import adapter_parameters, add_adapters, using_adapter
from distillation.recipes import Recipe

log = logging.getLogger("networks")

SIZES = ("dim", "ffn_dim", "num_layers")
"""What may differ between Wan models that see the same latents and text: 1.3B and 14B."""


def read_wan(
    path: str,
    expected: WanConfig,
    *,
    dtype: torch.dtype = torch.float32,
    needs_flow_adapter: bool = False,
    any_size: bool = False,
) -> WanDiT:
    """A trainable DiT from any layout that DiagonalModelLoader reads.

    Args:
        expected: the recipe's sizes. A file without an optical-flow adapter gets one of zeros, if one is expected; a
            file's adapter that is not expected is left out.
        dtype: of the weights; float32 to train them, bf16 for a frozen base.
        needs_flow_adapter: refuse a file without an adapter that is expected.
        any_size: take SIZES from the file, whatever is expected.

    Raises:
        ValueError: no such file, another size than the recipe's, quantised weights, a layout that is refused, or no
            adapter.
    """
    checkpoint = load_checkpoint(Path(path))
    if checkpoint.info.quantization is not None:
        raise ValueError(
            f"{Path(path).name} holds {checkpoint.info.quantization} weights, which cannot be trained; take the bf16, "
            "fp16 or float32 file of the same model."
        )
    found = WanConfig.from_state_dict(checkpoint.state_dict)
    if any_size:
        expected = replace(expected, **{name: getattr(found, name) for name in SIZES})
    differences = [
        f"{item.name} {getattr(found, item.name)} (recipe: {getattr(expected, item.name)})"
        for item in fields(WanConfig)
        if item.name != "flow_adapter" and getattr(found, item.name) != getattr(expected, item.name)
    ]
    if differences:
        raise ValueError(
            f"{Path(path).name} has {', '.join(differences)}; choose the recipe of its size, or set these fields. Only "
            "a teacher may be of another Wan size, with all weights trained and a --student of the recipe's."
        )
    with torch.device("meta"):
        network = WanDiT(expected)
    weights = {name: value.to(dtype, copy=True) for name, value in checkpoint.state_dict.items()}
    if found.flow_adapter and not expected.flow_adapter:
        log.warning("%s: its optical-flow adapter is left out; set flow_adapter to train it.", Path(path).name)
        weights = {name: value for name, value in weights.items() if name not in FLOW_ADAPTER_KEYS}
    elif expected.flow_adapter and not found.flow_adapter:
        if needs_flow_adapter:
            raise ValueError(
                f"{Path(path).name} has no optical-flow adapter, and what it says would not depend on the flow. Train "
                "one first (distillation/README.md, optical flow), or leave flow_adapter empty."
            )
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        weights |= {name: torch.zeros(shapes[name], dtype=dtype) for name in FLOW_ADAPTER_KEYS}
    missing, left = network.load_state_dict(weights, strict=False, assign=True)
    if missing or left:
        raise ValueError(f"{Path(path).name}: missing {listed(missing) or '-'}; left over {listed(left) or '-'}.")
    return network


@dataclass(slots=True)
class Role:
    """A network as one of the three that training needs: a module, or an adapter on a module that others share."""

    network: WanDiT
    adapter: str | None = None
    shared: bool = False

    @contextmanager
    def active(self) -> Iterator[WanDiT]:
        """The network with this role's adapter. Forward and backward belong inside."""
        with using_adapter(self.network, self.adapter) if self.shared else nullcontext():
            yield self.network

    def parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by name."""
        if self.adapter is not None:
            return adapter_parameters(self.network, self.adapter)
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}


@dataclass(slots=True)
class Networks:
    """The student streams; the teacher scores real video, the fake score scores the student's.

    What a stage does not need is None. The teacher may be of another size than the two that are trained.
    """

    student: Role
    teacher: Role | None
    fake_score: Role | None


def precision_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of matrix products and of frozen weights: what the recipe asks for; float32 where a CPU only emulates bf16."""
    return torch.bfloat16 if recipe.precision == "bf16" and fast_bf16(device) else torch.float32


def build_networks(recipe: Recipe, device: torch.device, mesh: DeviceMesh | None) -> Networks:
    """Reads the files once each, adds adapters where the recipe asks for them, and spreads all over the ranks.

    Each network is spread before the next is read: at any time a rank holds one of them whole.

    Raises:
        ValueError: as `read_wan`.
    """
    frozen = precision_of(recipe, device)
    needs_teacher, needs_fake_score = recipe.stage != "forcing", recipe.distils
    # Scores that know nothing of the flow would teach the student to ignore it. LoRA leaves the adapter as it is.
    teacher = partial(read_wan, recipe.teacher, recipe.model, needs_flow_adapter=True)
    own_teacher = recipe.student_weights != recipe.teacher  # and not the file of a network that is trained
    student = partial(
        read_wan, recipe.student_weights, recipe.model, dtype=frozen, needs_flow_adapter=bool(recipe.lora_rank)
    )
    spread_out = partial(spread, recipe=recipe, device=device, mesh=mesh)
    # Only networks that see whole clips: in a compiled block the KV cache's numbers would be frozen.
    compiles = recipe.compile and recipe.distils
    if not recipe.lora_rank:
        own = spread_out(student(dtype=torch.float32), compiled=False)
        if not needs_teacher:
            return Networks(Role(own), None, None)
        real = teacher(dtype=frozen, any_size=own_teacher).requires_grad_(False)
        other_size = any(getattr(real.config, name) != getattr(recipe.model, name) for name in SIZES)
        real = spread_out(real, compiled=compiles)
        if not needs_fake_score:
            return Networks(Role(own), Role(real), None)
        if other_size and not recipe.fake_score and recipe.score_attention == "bidirectional":
            text = "%s is of another size: the fake score, which sees whole clips, starts from the student's weights; "
            log.warning(text + "--fake-score names better ones, of a bidirectional Wan", Path(recipe.teacher).name)
        file = recipe.fake_score or (recipe.student_weights if other_size else recipe.teacher)
        fake = read_wan(file, recipe.model, needs_flow_adapter=file == recipe.teacher)
        return Networks(Role(own), Role(real), Role(spread_out(fake, compiled=compiles)))
    adapters = ("fake_score",) if needs_fake_score else ()
    if not own_teacher:
        own = teacher(dtype=frozen)
        add_adapters(own, recipe.lora_rank, ("student", *adapters), recipe.seed)
        own = base = spread_out(own, compiled=False)
    else:
        own = student()
        add_adapters(own, recipe.lora_rank, ("student",), recipe.seed)
        own = spread_out(own, compiled=False)
        if not needs_teacher:
            return Networks(Role(own, "student", shared=True), None, None)
        base = teacher(dtype=frozen, any_size=not needs_fake_score)  # else the fake score is an adapter on it
        add_adapters(base, recipe.lora_rank, adapters, recipe.seed)
        base = spread_out(base, compiled=compiles)
    return Networks(
        Role(own, "student", shared=True),
        Role(base, None, shared=True) if needs_teacher else None,
        Role(base, "fake_score", shared=True) if needs_fake_score else None,
    )


def spread(network: WanDiT, recipe: Recipe, device: torch.device, mesh: DeviceMesh | None, *, compiled: bool) -> WanDiT:
    """Compiles the blocks, shards them and the rest, and has the network checkpoint them, in place.

    From the inside out: a block's mathematics; fully_shard's hooks, which are part of the block's call and so of what
    is compiled; compile; and outermost activation checkpointing, around the compiled block. torchtitan checkpoints
    inside compile.

    Returns:
        the network.
    """
    network.activation_checkpointing = recipe.activation_checkpointing
    if compiled:
        for block in network.blocks:
            block.compile()
    if mesh is None:
        return network.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if precision_of(recipe, device) == torch.bfloat16:
        # Inputs stay float32: a timestep or a rotation rounded to bf16 is another one. Autocast does the rest.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The root's parameters too are gathered anew for every forward: left whole, as by default, they would be old ones
    # in the forwards after an optimizer's step, or after the averaged weights took their place and left it.
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return network


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks (every rank must call this); a plain tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
