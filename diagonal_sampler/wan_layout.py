"""The names and shapes of a Wan text-to-video network's tensors, and what checkpoints put around the names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "model.", "net.", "")
PREFIX_PARTS = frozenset({"model", "diffusion_model", "net", "transformer", "pipe", "dit", "unet"})
"""What other prefixes may be made of: names of the one network that makes video. A critic's, a teacher's or an unknown
name is none."""
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
"""Name components that sharding, checkpointing, compiling and data-parallel wrappers insert anywhere."""

HEAD_DIM = 128
"""Wan's attention heads are 128 wide at every size; the number of heads is dim / 128."""
PATCH = (1, 2, 2)
LATENT_CHANNELS = 16
WAN22_5B_CHANNELS = 48
RCM_PREFIX, COUNTER_PREFIX = "net.", "accum_"
"""What NVIDIA's rCM puts before a name, and behind that before its trainer's counters, which it saves as well."""
FLOW_ADAPTER_KEYS = ("flow_embedding.weight", "flow_embedding.bias")
"""What a model conditioned on optical flow has beside Wan's tensors; ComfyUI's Wan has no place for them."""
ADAPTER_CHANNELS = 4
"""Channels of what they are given, `flow_adapter.adapter_features`: dx, dy, valid, speed."""
WAN_CELL = 8
"""Pixels of a frame, each way, in one pixel of Wan 2.1's latent: a track that reaches as far is seen there."""

PUBLISHED_SIZES = {1536: ("1.3B", 30, 8960), 5120: ("14B", 40, 13824)}
"""dim -> (name, depth, ffn_dim) of the sizes that Wan 2.1 was published in."""


_BLOCK_LINEARS = tuple(f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in "qkvo") + (
    "ffn.0",
    "ffn.2",
)
_ROOT_LINEARS = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "head.head",
)


DIFFUSERS_KEY = "condition_embedder.text_embedder.linear_1.weight"
"""Only a Wan in the layout of the library diffusers has it."""

_DIFFUSERS = tuple(
    (re.compile(rf"(?:^|(?<=\.)){name}(?=\.|$)"), ours)
    for name, ours in (
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"attn1\.to_([qkv])", r"self_attn.\1"),
        (r"attn2\.to_([qkv])", r"cross_attn.\1"),
        (r"attn1\.to_out\.0", "self_attn.o"),
        (r"attn2\.to_out\.0", "cross_attn.o"),
        (r"attn1\.(norm_[qk])", r"self_attn.\1"),
        (r"attn2\.(norm_[qk])", r"cross_attn.\1"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"(blocks\.\d+)\.norm2", r"\1.norm3"),  # there the norms are numbered in the order of their use
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out", "head.head"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WanDims:
    """The sizes of a Wan network, all read off its tensors. Counts, not bytes."""

    dim: int
    depth: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    in_channels: int
    out_channels: int
    flow_adapter: bool = False

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def size_name(self) -> str | None:
        """`1.3B` or `14B` for the published sizes, else None."""
        name, depth, ffn_dim = PUBLISHED_SIZES.get(self.dim, (None, 0, 0))
        return name if (self.depth, self.ffn_dim) == (depth, ffn_dim) else None


def linear_layers(depth: int) -> set[str]:
    """The bare names of all layers that multiply by a matrix: those that a file may hold quantised."""
    return set(_ROOT_LINEARS) | {f"blocks.{index}.{layer}" for index in range(depth) for layer in _BLOCK_LINEARS}


def expected_shapes(dims: WanDims) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Wan text-to-video network of these sizes: bare name -> shape."""
    dim, ffn = dims.dim, dims.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(layer: str, out_features: int, in_features: int) -> None:
        shapes[f"{layer}.weight"] = (out_features, in_features)
        shapes[f"{layer}.bias"] = (out_features,)

    shapes["patch_embedding.weight"] = (dim, dims.in_channels, *PATCH)
    shapes["patch_embedding.bias"] = (dim,)
    linear("text_embedding.0", dim, dims.text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, dims.freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for index in range(dims.depth):
        block = f"blocks.{index}"
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                linear(f"{block}.{attention}.{projection}", dim, dim)
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (dim,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        linear(f"{block}.ffn.0", ffn, dim)
        linear(f"{block}.ffn.2", dim, ffn)
        shapes[f"{block}.modulation"] = (1, 6, dim)
    linear("head.head", dims.out_channels * PATCH[0] * PATCH[1] * PATCH[2], dim)
    shapes["head.modulation"] = (1, 2, dim)
    if dims.flow_adapter:
        shapes[FLOW_ADAPTER_KEYS[0]] = (dim, ADAPTER_CHANNELS, *PATCH)
        shapes[FLOW_ADAPTER_KEYS[1]] = (dim,)
    return shapes


def expected_names(depth: int, *, flow_adapter: bool = False) -> set[str]:
    """The bare names of every tensor of a network of `depth` blocks, whatever its sizes."""
    dims = WanDims(
        dim=HEAD_DIM,
        depth=depth,
        ffn_dim=1,
        text_dim=1,
        freq_dim=1,
        in_channels=1,
        out_channels=1,
        flow_adapter=flow_adapter,
    )
    return set(expected_shapes(dims))


def unfold_patches(bare: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bare state dict whose patch embedding is a convolution [dim, channels, *PATCH].

    rCM (NVIDIA) multiplies by the same numbers as a matrix [dim, channels * prod(PATCH)], channels outermost.
    """
    key, cells = "patch_embedding.weight", math.prod(PATCH)
    weight = bare.get(key)
    if weight is None or weight.ndim != 2 or weight.shape[1] % cells:
        return dict(bare)
    return {**bare, key: weight.reshape(weight.shape[0], weight.shape[1] // cells, *PATCH)}


def variant_of(channels_in: int, channels_out: int) -> str:
    """The Wan that takes and gives this many channels, in words; other than LATENT_CHANNELS of both."""
    if channels_out == WAN22_5B_CHANNELS:
        return "Wan 2.2 5B or LongLive 2"
    return "a Wan image-to-video or control variant" if channels_in > LATENT_CHANNELS else "no Wan 2.1 network"


def strip_wrappers(key: str) -> str:
    """Remove the components that training wrappers insert into a parameter's name."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def from_diffusers(key: str) -> str:
    """A parameter's or a layer's name in diffusers' layout of Wan -> Wan's own; a prefix stays, other names do too."""
    for name, ours in _DIFFUSERS:
        renamed, count = name.subn(ours, key)
        if count:
            return renamed
    return key


def count_blocks(bare: Iterable[str], name: str) -> int:
    """Transformer blocks by the highest number among bare names, at least 1. name: the file, for the error.

    Raises ValueError for a number that the file cannot have tensors for.
    """
    bare = list(bare)
    indices = [int(match.group(1)) for key in bare if (match := re.match(r"blocks\.(\d{1,9})\.", key))]
    depth = max(indices, default=-1) + 1
    if depth > len(bare):
        raise ValueError(
            f"weight file {name!r}: it has a block {depth - 1} but only {len(bare)} tensors; blocks must be "
            "numbered from 0 without gaps: download it again"
        )
    return max(depth, 1)
