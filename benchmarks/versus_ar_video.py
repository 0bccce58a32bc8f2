"""Diagonal Chunk Sampler against ComfyUI's own SamplerARVideo: same weights, same machine, one run.

    python benchmarks/versus_ar_video.py                # both sizes of docs/benchmarks.md
    python benchmarks/versus_ar_video.py --sizes 128x2x8x8 --repeats 1

Two model sizes: one that arithmetic bounds, and the demo's, where the cost of each call counts. For each, equality
(uniform steps, clean context, global window, the same noise and re-noise) and time: the diagonal schedule 4-3-2 with
its window against SamplerARVideo at 4 steps and 3 frames per block, as ComfyUI starts on a CPU and with the attention
that the nodes take there, interleaved, medians.
Needs COMFYUI_DIR, or the host that quickstart.py fetched.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from typing import Any, NamedTuple
from unittest import mock

import torch
from models import open_host, random_prompt, random_wan  # first: it makes the repository importable
from timing import interleaved

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

SEED = 1
MIN_SECONDS = 30
TEXT_TOKENS = 64
TEXT_DIM = 64


class Size(NamedTuple):
    """Channels (a multiple of 128), transformer blocks, latent height and width."""

    dim: int
    blocks: int
    height: int
    width: int


SIZES = [Size(512, 8, 28, 32), Size(256, 4, 8, 8)]


def parse_size(text: str) -> Size:
    """A size written as DIMxBLOCKSxHEIGHTxWIDTH."""
    try:
        return Size(*map(int, text.split("x")))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no DIMxBLOCKSxHEIGHTxWIDTH, such as 512x8x28x32") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=SIZES,
        help="channels (a multiple of 128), blocks, latent height and width: 512x8x28x32",
    )
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the clip")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each sampler, and more of a small size")
    return parser.parse_args()


def compare(host: Any, size: Size, frames: int, repeats: int) -> None:
    """Prints both tables of one size; `frames` are latent frames."""
    import comfy.ldm.modules.attention
    from ar_video import FRAMES_PER_BLOCK, UNIFORM, ArVideoNoise, ar_video

    make_causal = host.pack_module("model_patches.causal").make_causal
    sample_latent = host.pack_module("model_patches.sampling").sample_latent

    dim = size.dim
    model = random_wan(WanConfig(dim=dim, ffn_dim=4 * dim, num_layers=size.blocks, text_dim=TEXT_DIM))
    noise = torch.randn((1, 16, frames, size.height, size.width), generator=torch.Generator().manual_seed(SEED))
    prompt = random_prompt(TEXT_TOKENS, TEXT_DIM)
    diagonal = DiagonalSchedule.preset("diagonal 4-3-2")
    chunks = -(-frames // FRAMES_PER_BLOCK)

    def theirs(noise: torch.Tensor = noise) -> torch.Tensor:
        return ar_video(model, prompt, noise, SEED)

    def theirs_with_our_attention(noise: torch.Tensor = noise) -> torch.Tensor:
        # As ComfyUI takes it on a CPU with --use-pytorch-cross-attention. (Its causal class hears no override.)
        with mock.patch("comfy.ldm.wan.ar_model.optimized_attention", comfy.ldm.modules.attention.attention_pytorch):
            return theirs(noise)

    def ours(noise: torch.Tensor, settings: CausalSettings, schedule: DiagonalSchedule) -> torch.Tensor:
        latent, draws = {"samples": torch.zeros_like(noise)}, ArVideoNoise(noise, SEED)
        causal = make_causal(model, settings)
        return sample_latent(causal, prompt, [], latent, schedule, seed=SEED, noise=draws)["samples"]

    rows = {
        "SamplerARVideo, 4 steps": (theirs, 5 * chunks),
        "SamplerARVideo, 4 steps, PyTorch's attention": (theirs_with_our_attention, 5 * chunks),
        "Diagonal Chunk Sampler, 4 uniform steps, clean": (
            lambda noise=noise: ours(noise, CausalSettings(window=-1, sink=0), UNIFORM),
            UNIFORM.nfe(chunks),
        ),
        "Diagonal Chunk Sampler, 4-3-2": (
            lambda noise=noise: ours(noise, CausalSettings(), diagonal),
            diagonal.nfe(chunks),
        ),
    }
    names = list(rows)
    for run, _forwards in rows.values():
        run(noise[:, :, :FRAMES_PER_BLOCK])  # what is prepared at first use counts in no row
    seconds, results = interleaved({name: run for name, (run, _) in rows.items()}, repeats, MIN_SECONDS)
    difference = (results[names[1]] - results[names[2]]).abs().max().item()
    tokens = -(-size.height // 2) * -(-size.width // 2)
    print(f"\ndim {dim}, {size.blocks} blocks, {tokens} tokens a latent frame, {frames} latent frames\n")
    print(f"Equality, uniform steps, clean context, global window: max abs difference {difference:.1e}\n")
    print("| sampler | forwards | s a clip (median) | spread | s a forward | clip, of AR's | forward, of AR's |")
    print("|---|---|---|---|---|---|---|")
    base = statistics.median(seconds[names[0]])
    for name, (_, forwards) in rows.items():
        taken = seconds[name]
        median = statistics.median(taken)
        each = median / forwards
        print(
            f"| {name} | {forwards} | {median:.2f} | {min(taken):.2f} to {max(taken):.2f} | {each:.4f} "
            f"| {median / base:.2f}x | {each / (base / rows[names[0]][1]):.2f}x |"
        )


def main() -> None:
    arguments = parse_arguments()
    host = open_host()
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    for size in arguments.sizes:
        compare(host, size, arguments.frames, arguments.repeats)


if __name__ == "__main__":
    main()
