"""Ten minutes of video in one run: does memory grow, does the picture drift?

    python benchmarks/endless.py                        # 600 s of the demo, as in docs/benchmarks.md
    python benchmarks/endless.py --seconds 60 --caption "a green cross moves up slowly"

Streams the bundled student to a temporary MP4 through Diagonal Stream Video's own function, with a state after every
16 chunks. Resident memory is read after every minute of video; the finished file is then read back and measured
minute by minute, on the sprites' pixels. Needs COMFYUI_DIR, or the host that quickstart.py fetched, and Linux.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from models import open_host  # first: it makes the repository importable

from diagonal_sampler.schedule import DiagonalSchedule
from distillation.evidence.measures import saturation_and_sharpness
from distillation.score import score_clip

FPS = 16
SIZE = 64
MINUTE = 60 * FPS  # pixel frames
STATE_EVERY = 16
MEMORY_GOAL = 0.02
"""Largest growth of resident memory after the first minute, as a share."""


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="length of the video, a multiple of 60")
    parser.add_argument("--caption", default="a red circle moves right and a blue square moves down slowly")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.seconds < 60 or arguments.seconds % 60:
        raise SystemExit(f"--seconds is {arguments.seconds}; give a multiple of 60.")
    host = open_host()
    import av
    import folder_paths

    host.load_pack()
    streaming = host.pack_module("model_patches.streaming")
    model, clip, vae = host.pack_module("nodes.demo_loader").DiagonalDemoLoader.execute("student").result
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(arguments.caption))
    memory: list[int] = []

    def watch(progress) -> None:
        # The writing thread's own moments: minute k is the first fragment at or beyond it.
        while progress.frames >= MINUTE * (len(memory) + 1):
            memory.append(resident_bytes())

    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        options = streaming.StreamOptions(
            width=SIZE,
            height=SIZE,
            seconds=float(arguments.seconds),
            fps=FPS,
            seed=arguments.seed,
            filename_prefix="endless",
            state_every=STATE_EVERY,
        )
        started = time.perf_counter()
        with torch.inference_mode():
            schedule = DiagonalSchedule.preset("diagonal 4-3-2")
            result = streaming.stream_video(model, positive, [], vae, schedule, options, on_frames=watch)
        taken = time.perf_counter() - started
        size = result.path.stat().st_size
        rows, frames = [], []
        with av.open(str(result.path)) as container:
            for frame in container.decode(video=0):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0).float())
                if len(frames) == MINUTE:
                    minute = torch.stack(frames)
                    sprites = score_clip(minute[:81], arguments.caption).sprites
                    right = sum(sprite.colour_right and sprite.shape_right for sprite in sprites)
                    rows.append((*saturation_and_sharpness(minute), minute.mean().item(), right, len(sprites)))
                    frames = []

    threads = torch.get_num_threads()
    print(f'"{arguments.caption}", seed {arguments.seed}, {SIZE}x{SIZE}, {FPS} fps, diagonal 4-3-2')
    print(f"{arguments.seconds} s of video in {taken:.0f} s ({arguments.seconds * FPS / taken:.0f} frames/s), ", end="")
    print(f"{size / 1e6:.1f} MB; {threads} threads, torch {torch.__version__}, {platform.machine()}\n")
    print("| minute | resident MB | saturation | sharpness | mean level | colour and shape right, first 81 frames |")
    print("|---|---|---|---|---|---|")
    for index, (saturation, sharpness, level, right, sprites) in enumerate(rows):
        numbers = ("-" if value is None else f"{value:.3g}" for value in (saturation, sharpness))
        print(
            f"| {index + 1} | {memory[index] / 1e6:.0f} | {' | '.join(numbers)} | {level:.1f} | {right} of {sprites} |"
        )
    growth = memory[-1] / memory[0] - 1
    held = "held" if growth < MEMORY_GOAL else "NOT held"
    print(f"\nresident memory after the first minute: {growth:+.2%} (goal: under {MEMORY_GOAL:.0%}, {held})")


if __name__ == "__main__":
    main()
