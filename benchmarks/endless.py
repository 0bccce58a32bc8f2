"""Ten minutes of video in one run: does memory grow, does the picture drift?

    python benchmarks/endless.py                        # 600 s of the demo, as in docs/benchmarks.md
    python benchmarks/endless.py --captions 24          # the same for 24 held-out captions, one after another
    python benchmarks/endless.py --captions 12 --steps 4,3   # three steps on later chunks
    python benchmarks/endless.py --seconds 60 --caption "a green cross moves up slowly"

Streams the bundled student to a temporary MP4 through Diagonal Stream Video's own function, with a state after every
16 chunks. Resident memory is read after every minute of video; the finished file is then read back and measured
minute by minute, on the sprites' pixels; of several captions the table has the means. Sprites are looked for in every
81 frames. What changes between the second minute, the one that begins at one minute, and all later ones is told with an
interval over the captions. Needs COMFYUI_DIR, or the host that quickstart.py fetched, and Linux.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from models import open_host, resident_bytes  # first: it makes the repository importable

from diagonal_sampler.schedule import DEMO_PRESET, DiagonalSchedule, parse_steps
from distillation import sprites
from distillation.evidence.measures import saturation_and_sharpness
from distillation.evidence.statistics import bootstrap
from distillation.recipes import DEMO
from distillation.score import score_clip

FPS = 16
SIZE = 64
MINUTE = 60 * FPS  # pixel frames
PIECE = 81  # pixel frames in which sprites are looked for
STATE_EVERY = 16
MEMORY_GOAL = 0.02
"""Largest growth of resident memory after the first minute, as a share."""


@dataclass(frozen=True, slots=True)
class Minute:
    """What a minute of one video shows: means over it, and its sprites, once for every whole 81 frames."""

    saturation: float | None
    sharpness: float | None
    level: float
    right: list[float]  # 1 for a sprite whose colour and shape are as asked for


def read_minutes(path: Path, caption: str) -> list[Minute]:
    """Measure a finished file minute by minute."""
    import av

    minutes, frames = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0).float())
            if len(frames) == MINUTE:
                minute = torch.stack(frames)
                pieces = minute[: len(minute) // PIECE * PIECE].split(PIECE)
                found = [sprite for piece in pieces for sprite in score_clip(piece, caption).sprites]
                right = [float(sprite.colour_right and sprite.shape_right) for sprite in found]
                minutes.append(Minute(*saturation_and_sharpness(minute), minute.mean().item(), right))
                frames = []
    return minutes


def mean_of(values: Sequence[float | None]) -> str:
    """The mean of what could be measured, as text."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3g}" if known else "-"


def change_after_a_minute(videos: Sequence[Sequence[Minute]]) -> str | None:
    """How the share of sprites right changes from the second minute to all later ones; None without later ones.

    Args:
        videos: the minutes of each caption's video.
    """
    if len(videos[0]) < 3 or len(videos) < 2:
        return None
    at_one = bootstrap([video[1].right for video in videos])
    later = bootstrap([[value for minute in video[2:] for value in minute.right] for video in videos])
    change = later - at_one
    low, high = change.interval()
    return (
        f"sprites right: {at_one.estimate:.1%} in the second minute, {later.estimate:.1%} later, "
        f"{change.estimate * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}] points"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="length of a video, a multiple of 60")
    parser.add_argument("--caption", default="a red circle moves right and a blue square moves down slowly")
    parser.add_argument("--captions", type=int, help="held-out captions, in place of --caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=parse_steps, help="denoising steps per chunk, such as 4,3; default: the preset's"
    )
    parser.add_argument("--dit", type=Path, default=DEMO / "demo_student.safetensors", help="a student of the demo")
    arguments = parser.parse_args()
    if arguments.seconds < 60 or arguments.seconds % 60:
        raise SystemExit(f"--seconds is {arguments.seconds}; give a multiple of 60.")
    sys.argv[1:] = []  # ComfyUI reads them too
    host = open_host()
    import folder_paths

    host.load_pack()
    streaming = host.pack_module("model_patches.streaming")
    demo = host.pack_module("model_patches.demo")
    model = demo.load_demo_model(arguments.dit)
    clip = demo.load_demo_clip(DEMO / "demo_text_encoder.safetensors")
    vae = demo.load_demo_vae(DEMO / "demo_autoencoder.safetensors")
    captions = [arguments.caption]
    if arguments.captions is not None:
        captions = sprites.held_out_captions(arguments.captions)
    memories: list[list[int]] = []

    def watch(progress) -> None:
        # The writing thread's own moments: minute k is the first fragment at or beyond it.
        while progress.frames >= MINUTE * (len(memories[-1]) + 1):
            memories[-1].append(resident_bytes())

    videos: list[list[Minute]] = []
    taken = size = 0.0
    for caption in captions:
        memories.append([])
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
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
                schedule = DiagonalSchedule.preset(DEMO_PRESET, steps=arguments.steps)
                result = streaming.stream_video(model, positive, [], vae, schedule, options, on_frames=watch)
            taken += time.perf_counter() - started
            size += result.path.stat().st_size
            videos.append(read_minutes(result.path, caption))

    minutes = arguments.seconds // 60
    shown = f'"{captions[0]}"' if len(captions) == 1 else f"{len(captions)} held-out captions"
    steps = f", steps {','.join(map(str, arguments.steps))}" if arguments.steps else ""
    print(f"{shown}, seed {arguments.seed}, {SIZE}x{SIZE}, {FPS} fps, {DEMO_PRESET}{steps}")
    frames = len(captions) * arguments.seconds * FPS
    print(f"{arguments.seconds} s of video in {taken / len(captions):.0f} s ({frames / taken:.0f} frames/s), ", end="")
    print(f"{size / len(captions) / 1e6:.1f} MB; {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, {platform.machine()}\n")
    print("| minute | resident MB | saturation | sharpness | mean level | sprites with colour and shape right |")
    print("|---|---|---|---|---|---|")
    for index in range(minutes):
        column = [video[index] for video in videos]
        resident = statistics.mean(memory[index] for memory in memories) / 1e6
        saturation, sharpness = mean_of([m.saturation for m in column]), mean_of([m.sharpness for m in column])
        level = statistics.mean(m.level for m in column)
        right = statistics.mean(value for m in column for value in m.right)
        print(f"| {index + 1} | {resident:.0f} | {saturation} | {sharpness} | {level:.1f} | {right:.1%} |")
    growth = max(memory[-1] / memory[0] - 1 for memory in memories)
    held = "held" if growth < MEMORY_GOAL else "NOT held"
    worst = "" if len(captions) == 1 else ", at most"
    print(f"\nresident memory after the first minute{worst}: {growth:+.2%} (goal: under {MEMORY_GOAL:.0%}, {held})")
    if change := change_after_a_minute(videos):
        print(change)


if __name__ == "__main__":
    main()
