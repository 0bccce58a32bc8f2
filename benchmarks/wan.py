"""Wan 2.1 at full size with random weights: from cached text to frames on the host, chunk by chunk.

    python benchmarks/wan.py                            # 1.3B, bf16, 832x480, 81 frames: the figures to beat
    python benchmarks/wan.py --dtype fp8                # fp8 products by ComfyUI's own layers
    python benchmarks/wan.py --model 14b --long 120
    python benchmarks/wan.py --gains --profile          # what each thing gains, and where the time goes
    python benchmarks/wan.py --dynamic-vram             # with ComfyUI's DynamicVRAM, as its server starts by default
    python benchmarks/wan.py --model tiny --width 64 --height 64 --long 30 --cpu     # does it run? no figures

Diagonal 4-3-2, window 12, sink 3, a TAEHV decoding chunk by chunk beside the sampling; the text encoder plays no part.
Without a GPU it says so and stops, but for --cpu. Needs COMFYUI_DIR, or the host that quickstart.py fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

if torch.cuda.is_available():
    os.environ["DIAGONAL_TEST_GPU"] = "1"  # the tests' host is a CPU's otherwise

from models import (  # first: it makes the repository importable
    open_host,
    random_prompt,
    random_taehv,
    random_wan,
    without_patches,
)
from timing import interleaved
from torch import Tensor

from diagonal_sampler.dit import WanConfig
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings

CUDA = torch.cuda.is_available()
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
STEADY_FORWARDS = 8
"""The last forwards of a clip, in which the window is full."""
SHIPPED = "as shipped"


class Bench:
    """A random model and decoder in ComfyUI, and runs of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        host = open_host(dynamic_vram=arguments.dynamic_vram)
        host.load_pack()
        self.sampling = host.pack_module("model_patches.sampling")
        self.causal = host.pack_module("model_patches.causal")
        self.attention = host.pack_module("model_patches.attention")
        self.decode = host.pack_module("model_patches.stream_decode")
        config, dtype = MODELS[arguments.model], WEIGHT_DTYPES[arguments.dtype]
        plain = random_wan(config, weight_dtype=torch.bfloat16, dtype=dtype, fast_fp8=arguments.dtype == "fp8")
        self.model = self.causal.make_causal(plain, CausalSettings())
        self.vae = random_taehv(torch.bfloat16)  # as lighttaew2_1 is
        self.prompt = random_prompt(TEXT_TOKENS, config.text_dim)
        self.schedule = DiagonalSchedule.preset("diagonal 4-3-2")
        self.size = (arguments.height // 8, arguments.width // 8)
        self.latents: Tensor | None = None

    @torch.inference_mode()
    def stream(self, latent_frames: int, model: Any = None) -> list[float]:
        """Seconds from the start until each chunk's frames are on the host; `latents` is then the last chunk."""
        model = self.model if model is None else model
        plan = self.sampling.plan_clip(model, (1, 16, latent_frames, *self.size), self.schedule)
        waiting, times = [], []
        start = time.perf_counter()

        def arrived() -> None:
            waiting.pop(0).result()
            times.append(time.perf_counter() - start)

        with self.decode.stream_decoder(self.vae) as decoder:

            def take(chunk: Any) -> None:
                decoder.keep_loaded([chunk.patcher])
                waiting.append(decoder.submit(chunk.latents))
                self.latents = chunk.latents
                # The chunk before has been decoded while this one was denoised; the first is waited for by itself.
                if chunk.index > 0 or latent_frames <= plan.settings.frames_per_chunk:
                    arrived()

            self.sampling.stream_latent(model, self.prompt, [], plan, take, seed=0)
            while waiting:
                arrived()
        return times

    def clip(self, patch: Callable[[], Any] = contextlib.nullcontext, model: Any = None) -> Tensor:
        """The last latents of a clip of 81 frames that was streamed with something put back."""
        with patch():
            self.stream(CLIP_LATENTS, model)
        assert self.latents is not None
        return self.latents.float().cpu()

    # -- what is put back, each as a context manager

    def flash_first(self) -> Any:
        return mock.patch.object(self.attention, "_cudnn_is_faster", lambda device: False)

    def gelu_apart(self) -> Any:
        return mock.patch.object(self.causal, "_multiplies_as_it_is", lambda layer, x: False)

    def waiting_noise(self) -> Any:
        return mock.patch.object(self.sampling, "send", lambda drawn, device: drawn.to(device))

    def text_each_time(self) -> Any:
        return mock.patch.object(self.causal.CausalRun, "text", lambda run, part, conditions, shape, make: make())

    def prompt_on_the_host(self) -> Any:
        return mock.patch.object(self.sampling, "move_texts", lambda model_wrap, device: None)

    @contextlib.contextmanager
    def look_at_once(self) -> Iterator[None]:
        look = self.sampling.FiniteLook.look

        def at_once(finite: Any, chunk: Any, steps: list) -> None:
            look(finite, chunk, steps)
            finite.settle()

        with mock.patch.object(self.sampling.FiniteLook, "look", at_once):
            yield

    @contextlib.contextmanager
    def one_stream(self) -> Iterator[None]:
        class Cuda:
            """torch.cuda for the decoder alone, whose new stream is the sampler's."""

            def __getattr__(self, name: str) -> Any:
                return getattr(torch.cuda, name)

            @staticmethod
            def Stream(device: torch.device) -> Any:
                return torch.cuda.current_stream(device)

        class Torch:
            cuda = Cuda()

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

        with mock.patch.object(self.decode, "torch", Torch()):
            yield

    def channels_first(self) -> Any:
        return mock.patch.object(self.decode, "TAEHV_LAYOUT", torch.contiguous_format)

    def compiled(self) -> Any:
        """The MODEL with its blocks compiled as ComfyUI's node does it."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        patched = self.model.clone()
        blocks = len(patched.model.diffusion_model.blocks)
        keys = [f"diffusion_model.blocks.{index}" for index in range(blocks)]
        set_torch_compile_wrapper(model=patched, backend="inductor", keys=keys)
        return patched


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def print_figures(bench: Bench, arguments: argparse.Namespace) -> None:
    """The table of times and memory."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    clips = sorted(bench.stream(CLIP_LATENTS)[-1] for _ in range(arguments.repeats))
    first = sorted(bench.stream(3)[-1] for _ in range(arguments.repeats))
    clip_median, first_median = statistics.median(clips), statistics.median(first)
    print("\n| figure | value |")
    print("|---|---|")
    print(f"| 81 frames, cached text to host: median of {arguments.repeats} | {clip_median:.3f} s |")
    print(f"| spread | {clips[0]:.3f} to {clips[-1]:.3f} s |")
    print(f"| first chunk decoded, on the host | {first_median:.3f} s |")
    floor = FLOOR_S.get((arguments.model, arguments.dtype))
    if floor is not None and (arguments.width, arguments.height) == (832, 480):
        print(f"| share of the arithmetic floor ({floor} s) | {floor / clip_median:.0%} |")
    if arguments.long:
        times = bench.stream(arguments.long)
        steps = sorted(b - a for a, b in zip(times[WARM_CHUNKS:-1], times[WARM_CHUNKS + 1 :], strict=True))
        if len(steps) < 2:
            raise SystemExit(f"--long is {arguments.long}; use at least {3 * (WARM_CHUNKS + 4)}, or 0.")
        p50, p99 = statistics.median(steps), steps[min(len(steps) - 1, int(0.99 * len(steps)))]
        print(f"| steady frames a second, over {arguments.long} latent frames | {FRAMES_OF_A_CHUNK / p50:.1f} |")
        print(f"| seconds a chunk, p50 and p99 | {p50:.4f}, {p99:.4f} ({p99 / p50:.2f}x) |")
    forwards = time_forwards(bench, CLIP_LATENTS)
    host, device = (statistics.median(values) for values in zip(*forwards[-STEADY_FORWARDS:], strict=True))
    print(f"| a forward with the window full: until the host has queued it, on the GPU | {host:.1f}, {device:.1f} ms |")
    if CUDA:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(f"| peak VRAM, allocated and reserved | {peak / 1e9:.2f}, {reserved / 1e9:.2f} GB |", flush=True)


class Forward(NamedTuple):
    """One forward: milliseconds until the host has queued it, and those that the GPU takes; NaN without one."""

    host: float
    device: float


def time_forwards(bench: Bench, latent_frames: int) -> list[Forward]:
    """Every forward of a run by itself."""
    samplers = bench.sampling.comfy.samplers
    inner = samplers.KSamplerX0Inpaint.__call__
    marks: list[tuple[float, Any, Any]] = []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if CUDA else [None, None]
        start = time.perf_counter()
        if CUDA:
            events[0].record()
        out = inner(self, *args, **kwargs)
        if CUDA:
            events[1].record()
        marks.append((1000 * (time.perf_counter() - start), *events))
        return out

    with mock.patch.object(samplers.KSamplerX0Inpaint, "__call__", timed):
        bench.stream(latent_frames)
    if CUDA:
        torch.cuda.synchronize()
    return [Forward(host, first.elapsed_time(last) if CUDA else float("nan")) for host, first, last in marks]


def print_profile(bench: Bench) -> None:
    """The GPU's time of a clip by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as profiler:
        bench.stream(CLIP_LATENTS)
        if CUDA:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [
        (event.key, event.count, getattr(event, attribute) / 1000)
        for event in profiler.key_averages()
        if getattr(event, attribute) > 0 and (not CUDA or str(event.device_type).endswith("CUDA"))
    ]
    rows.sort(key=lambda row: -row[2])
    print(f"\nKernels of a clip: {sum(row[1] for row in rows)}, {sum(row[2] for row in rows):.1f} ms\n")
    print("| ms | count | kernel |")
    print("|---|---|---|")
    for name, count, milliseconds in rows[:45]:
        print(f"| {milliseconds:.1f} | {count} | {name[:110]} |")
    print(flush=True)


def gains(bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """A clip as shipped, and with one thing put back, by what that is."""
    plain_blocks = without_patches(bench.model, lambda path: path.count(".") == 3)
    own_rotations = without_patches(bench.model, lambda path: path == bench.causal.ROPE_PATH)
    own_forward = without_patches(bench.model, lambda path: path == bench.causal.FORWARD_PATH)
    runs = {
        SHIPPED: bench.clip,
        "PyTorch's flash attention first, as ComfyUI has it": lambda: bench.clip(bench.flash_first),
        "GELU as a kernel of its own": lambda: bench.clip(bench.gelu_apart),
        "the prompt copied in every forward": lambda: bench.clip(bench.prompt_on_the_host),
        "noise copied while the host waits": lambda: bench.clip(bench.waiting_noise),
        "chunks looked at for NaN at once": lambda: bench.clip(bench.look_at_once),
        "decoded on the sampler's own stream": lambda: bench.clip(bench.one_stream),
        "TAEHV channels first": lambda: bench.clip(bench.channels_first),
        "modulation in every forward": lambda: bench.clip(model=plain_blocks),
        "the noise level's and the text's embeddings in every forward": lambda: bench.clip(model=own_forward),
        "rotations in every forward": lambda: bench.clip(model=own_rotations),
        "the text's keys and values in every forward": lambda: bench.clip(bench.text_each_time),
    }
    if not CUDA:
        del runs["decoded on the sampler's own stream"]
    return runs


def print_compiled(bench: Bench, repeats: int) -> None:
    """A clip as shipped, and with its blocks compiled."""
    model, began = bench.compiled(), time.perf_counter()
    bench.clip(model=model)
    print(f"\nblocks compiled in {time.perf_counter() - began:.0f} s", flush=True)
    print_table({SHIPPED: bench.clip, "blocks compiled (torch.compile)": lambda: bench.clip(model=model)}, repeats)


def print_table(runs: dict[str, Callable[[], Tensor]], repeats: int) -> None:
    """Times of clips in turns, as shares of the first one's."""
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:  # the other rows are worth having
            if name == SHIPPED:
                raise
            print(f"\n{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            del runs[name]
    seconds, results = interleaved(runs, repeats, 0.0)
    base = statistics.median(seconds[SHIPPED])
    print("\n| | s a clip (median) | spread | of the clip as shipped | difference of its last chunk, relative |")
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        difference = relative(results[name], results[SHIPPED])
        print(f"| {name} | {median:.3f} | {spread} | {median / base:.3f}x | {difference:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bf16", help="of the weights; fp8 multiplies in fp8")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--long", type=int, default=600, help="latent frames of the long run; 0: none")
    parser.add_argument("--repeats", type=int, default=5, help="clips")
    parser.add_argument("--gains", action="store_true", help="also what each thing gains")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--dynamic-vram", action="store_true", help="ComfyUI's DynamicVRAM, as in its server")
    parser.add_argument("--cpu", action="store_true", help="go on without a GPU")
    arguments = parser.parse_args()
    if not CUDA and not arguments.cpu:
        print("no GPU here: nothing was measured (--cpu goes on without one).")
        return
    began = time.perf_counter()
    bench = Bench(arguments)
    made = time.perf_counter()
    bench.stream(CLIP_LATENTS)  # loads the models and prepares kernels
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nWan {arguments.model}, {arguments.dtype} weights, {arguments.width}x{arguments.height}, ", end="")
    print(f"random weights, torch {torch.__version__}, {device}", end="")
    print(f"{', DynamicVRAM' if arguments.dynamic_vram else ''}")
    print(f"(made in {made - began:.0f} s, first clip {time.perf_counter() - made:.1f} s)", flush=True)
    print_figures(bench, arguments)
    if arguments.profile:
        print_profile(bench)
    if arguments.gains:
        print_table(gains(bench), arguments.repeats)
    if arguments.compile:
        print_compiled(bench, arguments.repeats)


if __name__ == "__main__":
    main()
