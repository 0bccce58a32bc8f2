"""What a KV cache in 8 bits saves, costs and changes.

    python benchmarks/kv_cache.py                                    # as in docs/benchmarks.md
    python benchmarks/kv_cache.py --sizes 5120x40x60x104 --frames 48 # Wan 14B at 832x480, on a GPU

The same random network samples the same noise (diagonal 4-3-2, window 12, sink 3) with both number formats, in turns.
The difference of random weights says little about pictures; `python -m distillation.score --kv-cache-dtype int8` has
them. Needs COMFYUI_DIR, or the host that quickstart.py fetched.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import torch
from models import open_host, random_prompt, random_wan  # first: it makes the repository importable
from timing import interleaved
from versus_ar_video import MIN_SECONDS, SIZES, TEXT_DIM, TEXT_TOKENS, Size, parse_size

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import KV_CACHE_DTYPES, CausalSettings

SEED = 0


def compare(host, size: Size, frames: int, repeats: int) -> None:
    """Prints the table of one size; `frames` are latent frames."""
    make_causal = host.pack_module("model_patches.causal").make_causal
    sampling = host.pack_module("model_patches.sampling")
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = WanConfig(dim=size.dim, ffn_dim=4 * size.dim, num_layers=size.blocks, text_dim=TEXT_DIM)
    network = random_wan(config, weight_dtype=dtype, dtype=dtype)
    prompt, schedule = random_prompt(TEXT_TOKENS, TEXT_DIM), DiagonalSchedule.preset("diagonal 4-3-2")
    nbytes: dict[str, int] = {}

    def run(kv_cache_dtype: str) -> torch.Tensor:
        model = make_causal(network, CausalSettings(kv_cache_dtype=kv_cache_dtype))
        plan = sampling.plan_clip(model, (1, 16, frames, size.height, size.width), schedule)
        chunks: list[torch.Tensor] = []

        def take(chunk) -> None:
            nbytes[kv_cache_dtype] = chunk.cache.nbytes
            chunks.append(chunk.latents)

        sampling.stream_latent(model, prompt, [], plan, take, seed=SEED)
        return torch.cat(chunks, dim=2).float().cpu()

    for name in KV_CACHE_DTYPES:
        run(name)  # what is prepared at first use counts in no row
    runs = {name: functools.partial(run, name) for name in KV_CACHE_DTYPES}
    seconds, results = interleaved(runs, repeats, MIN_SECONDS)
    exact = results[KV_CACHE_DTYPES[0]]
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    print(f"\ndim {size.dim}, {size.blocks} blocks, latent {size.height}x{size.width}, {frames} frames, {where}\n")
    print("| kv_cache_dtype | KV cache, MB | s a clip (median) | of default | latents differ, rms of theirs |")
    print("|---|---|---|---|---|")
    base = statistics.median(seconds[KV_CACHE_DTYPES[0]])
    for name, times in seconds.items():
        median = statistics.median(times)
        error = (results[name] - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        print(f"| {name} | {nbytes[name] / 1e6:.1f} | {median:.2f} | {median / base:.2f}x | {100 * error:.2f}% |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", default=SIZES, help="channels, blocks, latent height and width"
    )
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the clip")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, and more of a small size")
    chosen = parser.parse_args()
    host = open_host()
    with torch.inference_mode():
        for size in chosen.sizes:
            compare(host, size, chosen.frames, chosen.repeats)


if __name__ == "__main__":
    main()
