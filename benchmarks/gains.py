"""What each thing that is computed once, or in another way, gains in the Diagonal Chunk Sampler on a CPU.

    python benchmarks/gains.py                  # both sizes of docs/benchmarks.md
    python benchmarks/gains.py --sizes 128x2x8x8

One clip with diagonal 4-3-2 as shipped, and again with one thing put back as ComfyUI does it, in turns; medians.
Queries, keys and values from one packed weight are not in the nodes: the last row is the clip with them.
Needs COMFYUI_DIR, or the host that quickstart.py fetched.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from models import open_host, random_prompt, random_wan, without_patches  # first: it makes the repository importable
from timing import interleaved
from torch import Tensor
from versus_ar_video import MIN_SECONDS, SEED, SIZES, TEXT_DIM, TEXT_TOKENS, Size, parse_size

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

SHIPPED = "as shipped"
PACKED = "with packed queries, keys and values"


class Packed:
    """Three linear layers as one: `q` computes all, `k` and `v` hand out what it kept."""

    def __init__(self, attention: Any) -> None:
        layers = (attention.q, attention.k, attention.v)
        self.weight = torch.cat([layer.weight for layer in layers])
        self.bias = torch.cat([layer.bias for layer in layers])
        self.kept: list[Tensor] = []

    def q(self, x: Tensor) -> Tensor:
        q, *self.kept = torch.nn.functional.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        return q

    def k(self, x: Tensor) -> Tensor:
        return self.kept[0]

    def v(self, x: Tensor) -> Tensor:
        return self.kept[1]


def with_packed_weights(model: Any) -> Any:
    """A clone of a causal MODEL whose self-attention projects once."""
    patched = model.clone()
    for layer in range(len(model.model.diffusion_model.blocks)):
        path = f"diffusion_model.blocks.{layer}.self_attn"
        packed = Packed(model.get_model_object(path))
        for name in "qkv":
            patched.add_object_patch(f"{path}.{name}.forward", getattr(packed, name))
    return patched


def gains(host: Any, size: Size, frames: int) -> dict[str, Callable[[], Tensor]]:
    """A clip of `frames` latent frames as shipped, and with one thing put back, by what that is."""
    attention, causal = host.pack_module("model_patches.attention"), host.pack_module("model_patches.causal")
    sample_latent = host.pack_module("model_patches.sampling").sample_latent
    plain = random_wan(WanConfig(dim=size.dim, ffn_dim=4 * size.dim, num_layers=size.blocks, text_dim=TEXT_DIM))
    model = causal.make_causal(plain, CausalSettings())
    prompt, schedule = random_prompt(TEXT_TOKENS, TEXT_DIM), DiagonalSchedule.preset("diagonal 4-3-2")

    def sample(model: Any = model) -> Tensor:
        latent = {"samples": torch.zeros(1, 16, frames, size.height, size.width)}
        return sample_latent(model, prompt, [], latent, schedule, seed=SEED)["samples"]

    def with_text_each_time() -> Tensor:
        with mock.patch.object(causal.CausalRun, "text", lambda run, part, conditions, shape, make: make()):
            return sample()

    def with_comfyuis_attention() -> Tensor:
        with mock.patch.object(causal, "attend", attention.optimized_attention):
            return sample()

    own_modulation = without_patches(model, lambda path: path.count(".") == 3)
    own_rotations = without_patches(model, lambda path: path == causal.ROPE_PATH)
    packed = with_packed_weights(model)
    return {
        SHIPPED: sample,
        "modulation in every forward": lambda: sample(own_modulation),
        "rotations in every forward": lambda: sample(own_rotations),
        "the text's keys and values in every forward": with_text_each_time,
        "ComfyUI's fallback attention": with_comfyuis_attention,
        PACKED: lambda: sample(packed),
    }


def measure(host: Any, size: Size, frames: int, repeats: int) -> None:
    """Prints the table of one size; `frames` are latent frames."""
    runs = gains(host, size, frames)
    runs[SHIPPED]()  # what is prepared at first use counts in no row
    seconds, results = interleaved(runs, repeats, 2 * MIN_SECONDS)
    base = statistics.median(seconds[SHIPPED])
    tokens = -(-size.height // 2) * -(-size.width // 2)
    print(f"\ndim {size.dim}, {size.blocks} blocks, {tokens} tokens a latent frame, {frames} latent frames\n")
    print("| | s a clip (median) | spread | of the clip as shipped | max abs difference |")
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        difference = (results[name] - results[SHIPPED]).abs().max().item()
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        print(f"| {name} | {median:.3f} | {spread} | {median / base:.2f}x | {difference:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=SIZES, help="as in versus_ar_video.py")
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the clip")
    parser.add_argument("--repeats", type=int, default=3, help="turns, and more of a small size")
    arguments = parser.parse_args()
    host = open_host()
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    for size in arguments.sizes:
        measure(host, size, arguments.frames, arguments.repeats)


if __name__ == "__main__":
    main()
