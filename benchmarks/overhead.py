"""What a forward costs beside its arithmetic, and whether a chunk costs more as a clip grows.

    python benchmarks/overhead.py                       # as in docs/benchmarks.md
    python benchmarks/overhead.py --blocks 4 --lengths 21,42 --memory-frames 60

Counts, on a network of Wan 1.3B's depth and a small width: kernels of a forward (operations that reach a backend;
views, allocations and what ComfyUI's cast finds nothing to do for are none), scalars read back from the device, bytes
copied into the KV cache. Then the time of a chunk and of its decode-free forwards at three lengths, and resident memory
over a long clip. Needs COMFYUI_DIR, or the host that quickstart.py fetched, and Linux for the memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import Counter

import torch
from models import open_host, random_prompt, random_wan, resident_bytes  # first: it makes the repository importable
from torch.utils._python_dispatch import TorchDispatchMode

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

TEXT_TOKENS, TEXT_DIM = 64, 64
SIDE = 8  # latent height and width
COUNTED_FRAMES = 21
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
SCALAR_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::item"}


class Count(TorchDispatchMode):
    """Counts operations by name, and bytes that `copy_` writes into tensors larger than what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copied_into_buffers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view and name not in ALLOCATIONS:
            self.kernels[name] += 1
        if name == "aten::copy_" and args[0].untyped_storage().nbytes() > args[0].nbytes:
            self.copied_into_buffers += args[0].nbytes
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30, help="transformer blocks of the counted network")
    parser.add_argument("--lengths", default="21,210,2100", help="latent frames of the timed clips")
    parser.add_argument(
        "--memory-frames", type=int, default=1000, help="latent frames of the clip whose memory is read"
    )
    arguments = parser.parse_args()
    lengths = [int(part) for part in arguments.lengths.split(",")]
    host = open_host()
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model
    from ar_video import FRAMES_PER_BLOCK, ar_video

    causal = host.pack_module("model_patches.causal")
    sampling = host.pack_module("model_patches.sampling")
    # As on a GPU: one kernel for an attention. ComfyUI's default on a CPU is three.
    for module in (comfy.ldm.wan.model, host.pack_module("model_patches.attention")):
        module.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    schedule = DiagonalSchedule.preset("diagonal 4-3-2")
    prompt = random_prompt(TEXT_TOKENS, TEXT_DIM)

    def network(blocks: int):
        return random_wan(WanConfig(dim=128, ffn_dim=512, num_layers=blocks, text_dim=TEXT_DIM))

    def stream(model, frames: int, take) -> None:
        plan = sampling.plan_clip(model, (1, 16, frames, SIDE, SIDE), schedule)
        sampling.stream_latent(model, prompt, [], plan, take, seed=0)

    plain = network(arguments.blocks)
    model = causal.make_causal(plain, CausalSettings())
    noise = torch.randn(1, 16, COUNTED_FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    chunks = COUNTED_FRAMES // FRAMES_PER_BLOCK
    rows = {
        "SamplerARVideo, 4 steps": (lambda: ar_video(plain, prompt, noise, seed=1), 5 * chunks),
        "Diagonal Chunk Sampler, 4-3-2": (lambda: stream(model, COUNTED_FRAMES, lambda _: None), schedule.nfe(chunks)),
    }
    print(
        f"{arguments.blocks} blocks, {COUNTED_FRAMES} latent frames, torch {torch.__version__}, {platform.machine()}\n"
    )
    print("| sampler | kernels a forward | scalars read a clip | KB copied into larger buffers, a forward |")
    print("|---|---|---|---|")
    with torch.inference_mode():
        for name, (run, forwards) in rows.items():
            run()
            with Count() as count:
                run()
            reads = sum(count.kernels.pop(read, 0) for read in SCALAR_READS)
            total = sum(count.kernels.values())
            copied = count.copied_into_buffers / forwards / 1e3
            print(f"| {name} | {total / forwards:.0f} | {reads} | {copied:.0f} |")
        print("\nMost frequent in the latter: ", end="")
        print(", ".join(f"{n.removeprefix('aten::')} {c / forwards:.0f}" for n, c in count.kernels.most_common(12)))

        small = causal.make_causal(network(2), CausalSettings())
        print(f"\n2 blocks, {torch.get_num_threads()} threads, positions as the length asks for:\n")
        print("| latent frames | ms a chunk, median of the last 50 | of the first 50 after the window is full |")
        print("|---|---|---|")
        for length in lengths:
            times: list[float] = []
            stream(small, length, lambda _, times=times: times.append(time.perf_counter()))
            steps = [1e3 * (after - before) for before, after in zip(times, times[1:], strict=False)]
            full = steps[3:53] or steps
            print(f"| {length} | {statistics.median(steps[3:][-50:] or steps):.1f} | {statistics.median(full):.1f} |")

        memory: list[int] = []
        stream(small, arguments.memory_frames, lambda _: memory.append(resident_bytes()))
        tenth = len(memory) // 10
        growth = (memory[-1] - memory[tenth]) / 1e6
        print(
            f"\nresident memory over {arguments.memory_frames} latent frames, after the first tenth: {growth:+.1f} MB"
        )


if __name__ == "__main__":
    main()
