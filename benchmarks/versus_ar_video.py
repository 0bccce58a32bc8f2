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
from diagonal_sampler.noise import INITIAL_STEP
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

SEED = 1
FRAMES_PER_BLOCK = 3
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


class ArVideoNoise:
    """SamplerARVideo's noise: the clip's, then a generator seeded for each block and step."""

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise

    def __call__(self, chunk: int, step: int, frames: int) -> torch.Tensor:
        start = FRAMES_PER_BLOCK * chunk
        if step == INITIAL_STEP:
            return self.noise[:, :, start : start + frames]
        generator = torch.Generator().manual_seed(SEED + 1000 * chunk + step)
        return torch.randn((*self.noise.shape[:2], frames, *self.noise.shape[3:]), generator=generator)


def compare(host: Any, size: Size, frames: int, repeats: int) -> None:
    """Prints both tables of one size; `frames` are latent frames."""
    import comfy.ldm.modules.attention
    import comfy.samplers

    make_causal = host.pack_module("model_patches.causal").make_causal
    sample_latent = host.pack_module("model_patches.sampling").sample_latent

    dim = size.dim
    model = random_wan(WanConfig(dim=dim, ffn_dim=4 * dim, num_layers=size.blocks, text_dim=TEXT_DIM))
    noise = torch.randn((1, 16, frames, size.height, size.width), generator=torch.Generator().manual_seed(SEED))
    prompt = random_prompt(TEXT_TOKENS, TEXT_DIM)
    uniform, diagonal = DiagonalSchedule.preset("self forcing"), DiagonalSchedule.preset("diagonal 4-3-2")
    chunks = -(-frames // FRAMES_PER_BLOCK)

    def ar_video(noise: torch.Tensor = noise) -> torch.Tensor:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(prompt, prompt)
        sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": FRAMES_PER_BLOCK})
        sigmas = torch.tensor([*uniform.chunk_sigmas(0), 0.0])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=SEED, disable_pbar=True)

    def ar_video_same_attention(noise: torch.Tensor = noise) -> torch.Tensor:
        # As ComfyUI takes it on a CPU with --use-pytorch-cross-attention. (Its causal class hears no override.)
        with mock.patch("comfy.ldm.wan.ar_model.optimized_attention", comfy.ldm.modules.attention.attention_pytorch):
            return ar_video(noise)

    def ours(noise: torch.Tensor, settings: CausalSettings, schedule: DiagonalSchedule) -> torch.Tensor:
        latent = {"samples": torch.zeros_like(noise)}
        causal = make_causal(model, settings)
        return sample_latent(causal, prompt, [], latent, schedule, seed=SEED, noise=ArVideoNoise(noise))["samples"]

    rows = {
        "SamplerARVideo, 4 steps": (ar_video, 5 * chunks),
        "SamplerARVideo, 4 steps, PyTorch's attention": (
            ar_video_same_attention,
            5 * chunks,
        ),
        "Diagonal Chunk Sampler, 4 uniform steps, clean": (
            lambda noise=noise: ours(noise, CausalSettings(window=-1, sink=0), uniform),
            uniform.nfe(chunks),
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
