"""Wan 2.1 at full size with random weights: from cached text to frames on the host, chunk by chunk.

    python benchmarks/wan.py                            # 1.3B, bf16, 832x480, 81 frames: the figures to beat
    python benchmarks/wan.py --model 14b --dtype fp8
    python benchmarks/wan.py --model tiny --width 64 --height 64 --long 30 --cpu     # does it run? no figures

Diagonal 4-3-2, window 12, sink 3, a TAEHV decoding chunk by chunk beside the sampling; the text encoder plays no part.
Without a GPU it says so and stops, but for --cpu. Needs COMFYUI_DIR, or the host that quickstart.py fetched.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

if torch.cuda.is_available():
    os.environ["DIAGONAL_TEST_GPU"] = "1"  # the tests' host is a CPU's otherwise

from models import open_host, random_prompt, random_taehv, random_wan  # first: it makes the repository importable

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

MODELS = {
    "1.3b": WanConfig(),
    "14b": WanConfig(dim=5120, ffn_dim=13824, num_layers=40),
    "tiny": WanConfig(dim=128, ffn_dim=512, num_layers=2, text_dim=64),
}
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "float32": torch.float32}
FLOOR_S = {("1.3b", "bf16"): 0.52, ("1.3b", "fp8"): 0.27}
"""Seconds of arithmetic of 17 forwards and the decode at 832x480, at 790 TFLOP/s dense bf16, twice that in fp8."""
TEXT_TOKENS = 512
CLIP_LATENTS = 21
FRAMES_OF_A_CHUNK = 12  # pixel frames
WARM_CHUNKS = 6
"""Chunks until the window is full and every shape has been seen: they are left out of the steady figures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bf16", help="of the weights; fp8 computes in bf16")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--long", type=int, default=600, help="latent frames of the long run; 0: none")
    parser.add_argument("--repeats", type=int, default=5, help="clips")
    parser.add_argument("--cpu", action="store_true", help="go on without a GPU")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.cpu:
        print("no GPU here: nothing was measured (--cpu goes on without one).")
        return
    host = open_host()
    host.load_pack()
    sampling = host.pack_module("model_patches.sampling")
    make_causal = host.pack_module("model_patches.causal").make_causal
    stream_decoder = host.pack_module("model_patches.stream_decode").stream_decoder

    config, dtype = MODELS[arguments.model], WEIGHT_DTYPES[arguments.dtype]
    model = make_causal(random_wan(config, weight_dtype=torch.bfloat16, dtype=dtype), CausalSettings())
    vae, prompt = random_taehv(), random_prompt(TEXT_TOKENS, config.text_dim)
    schedule = DiagonalSchedule.preset("diagonal 4-3-2")

    @torch.inference_mode()
    def stream(latent_frames: int) -> list[float]:
        """Seconds from the start until each chunk's frames are on the host."""
        shape = (1, 16, latent_frames, arguments.height // 8, arguments.width // 8)
        plan = sampling.plan_clip(model, shape, schedule)
        waiting, times = [], []
        start = time.perf_counter()

        def arrived() -> None:
            waiting.pop(0).result()
            times.append(time.perf_counter() - start)

        with stream_decoder(vae) as decoder:

            def take(chunk) -> None:
                decoder.keep_loaded([chunk.patcher])
                waiting.append(decoder.submit(chunk.latents))
                # The chunk before has been decoded while this one was denoised; the first is waited for by itself.
                if chunk.index > 0 or latent_frames <= plan.settings.frames_per_chunk:
                    arrived()

            sampling.stream_latent(model, prompt, [], plan, take, seed=0)
            while waiting:
                arrived()
        return times

    stream(CLIP_LATENTS)  # loads the models and prepares kernels
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clips = sorted(stream(CLIP_LATENTS)[-1] for _ in range(arguments.repeats))
    first = sorted(stream(3)[-1] for _ in range(arguments.repeats))
    clip_median, first_median = statistics.median(clips), statistics.median(first)
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"Wan {arguments.model}, {arguments.dtype} weights, {arguments.width}x{arguments.height}, ", end="")
    print(f"random weights, torch {torch.__version__}, {device}\n")
    print("| figure | value |")
    print("|---|---|")
    print(f"| 81 frames, cached text to host: median of {arguments.repeats} | {clip_median:.3f} s |")
    print(f"| spread | {clips[0]:.3f} to {clips[-1]:.3f} s |")
    print(f"| first chunk decoded, on the host | {first_median:.3f} s |")
    floor = FLOOR_S.get((arguments.model, arguments.dtype))
    if floor is not None and (arguments.width, arguments.height) == (832, 480):
        print(f"| share of the arithmetic floor ({floor} s) | {floor / clip_median:.0%} |")
    if arguments.long:
        times = stream(arguments.long)
        steps = sorted(b - a for a, b in zip(times[WARM_CHUNKS:-1], times[WARM_CHUNKS + 1 :], strict=True))
        if len(steps) < 2:
            raise SystemExit(f"--long is {arguments.long}; use at least {3 * (WARM_CHUNKS + 4)}, or 0.")
        p50, p99 = statistics.median(steps), steps[min(len(steps) - 1, int(0.99 * len(steps)))]
        print(f"| steady frames a second, over {arguments.long} latent frames | {FRAMES_OF_A_CHUNK / p50:.1f} |")
        print(f"| seconds a chunk, p50 and p99 | {p50:.4f}, {p99:.4f} ({p99 / p50:.2f}x) |")
    if cuda:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(f"| peak VRAM, allocated and reserved | {peak / 1e9:.2f}, {reserved / 1e9:.2f} GB |")


if __name__ == "__main__":
    main()
