"""Is the join of an extended video seen? Its step in mean colour and sharpness, against the clip's own steps.

    python benchmarks/joins.py                                   # the bundled student, 24 captions
    python benchmarks/joins.py --dit student.safetensors --captions 48 --latent-frames 3

Each caption's clip is decoded, its last frames are given to Diagonal Context Frames, and the clip that goes on from
them is appended, as the workflow extend_video does. A join holds where its step between neighbouring frames is no
larger than the largest other step of the joined video, the rule of the tests. Beside it the same place, between the
same two chunks, in a video of that length that was made in one run: it cannot hold more often than that but by luck.
Needs COMFYUI_DIR, or the host that
quickstart.py fetched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from models import open_host  # first: it makes the repository importable
from torch import Tensor

from distillation import sprites
from distillation.demo_files import trained_for
from distillation.recipes import DEMO
from distillation.score import score_clip

LATENT_FRAMES = 21
SIDE = 8  # latent height and width
FIRST_SEED, NEXT_SEED = 7, 8


def steps_of(frames: Tensor) -> dict[str, Tensor]:
    """Differences between neighbouring frames, [T - 1] each, in levels of 255.

    Args:
        frames: [T, H, W, 3] in levels of 255.

    Returns:
        colour: of the mean colour, the largest over the channels. sharpness: of the mean absolute difference between
        horizontal neighbours.
    """
    sharpness = frames.diff(dim=2).abs().mean(dim=(1, 2, 3))
    return {"colour": frames.mean(dim=(1, 2)).diff(dim=0).abs().amax(dim=1), "sharpness": sharpness.diff().abs()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", type=Path, default=DEMO / "demo_student.safetensors", help="a student of the demo")
    parser.add_argument("--captions", type=int, default=24, help="held-out captions")
    parser.add_argument("--latent-frames", type=int, default=6, help="latent frames that are given")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # ComfyUI reads them too
    host = open_host()
    host.load_pack()
    demo = host.pack_module("model_patches.demo")
    sample_latent = host.pack_module("model_patches.sampling").sample_latent
    encode_context = host.pack_module("model_patches.context_frames").encode_context
    model = demo.load_demo_model(arguments.dit)
    clip = demo.load_demo_clip(DEMO / "demo_text_encoder.safetensors")
    vae = demo.load_demo_vae(DEMO / "demo_autoencoder.safetensors")
    schedule = trained_for(arguments.dit).schedule

    def make(caption: str, seed: int, context: Tensor | None = None, frames: int = LATENT_FRAMES) -> Tensor:
        """[1, T, 64, 64, 3] in [0, 1]."""
        latent = {"samples": torch.zeros(1, 16, frames, SIDE, SIDE)}
        text = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        return vae.decode(sample_latent(model, text, [], latent, schedule, seed=seed, context=context)["samples"])

    joins: dict[str, list[tuple[float, float]]] = {}

    def note(video: Tensor, at: int, what: str) -> None:
        for name, steps in steps_of(video).items():
            others = torch.cat([steps[:at], steps[at + 1 :]])
            joins.setdefault(f"{name}, {what}", []).append((float(steps[at]), float(others.max())))

    right = sprites_asked = 0
    for caption in sprites.held_out_captions(arguments.captions):
        with torch.inference_mode():
            first = make(caption, FIRST_SEED).flatten(0, 1)
            given = encode_context(vae, first, arguments.latent_frames)
            following = make(caption, NEXT_SEED, given).flatten(0, 1)
            once = make(caption, FIRST_SEED, frames=2 * LATENT_FRAMES - given.latent.shape[2]).flatten(0, 1)
        join = len(first) - 1
        note(255 * torch.cat([first, following[given.pixel_frames :]]).float(), join, "extended")
        note(255 * once.float(), join, "in one run")
        # From the given frames on: the same length as a clip that the score is made for.
        found = score_clip((255 * following).round().to(torch.uint8).movedim(-1, 1), caption).sprites
        right += sum(sprite.colour_right and sprite.shape_right for sprite in found)
        sprites_asked += len(found)

    print(
        f"{arguments.dit.name}: joins of {arguments.captions} captions, {arguments.latent_frames} latent frames given\n"
    )
    print("| step | median, levels of 255 | largest other step, median | within it | beyond it at most |")
    print("|---|---|---|---|---|")
    for name, pairs in joins.items():
        at, other = torch.tensor(pairs).median(dim=0).values.tolist()
        held = sum(step <= largest for step, largest in pairs) / len(pairs)
        beyond = max(max(0.0, step - largest) for step, largest in pairs)
        print(f"| {name} | {at:.2f} | {other:.2f} | {held:.0%} | {beyond:.2f} |")
    print(f"\ncolour and shape right in what follows: {right} of {sprites_asked} sprites")


if __name__ == "__main__":
    main()
