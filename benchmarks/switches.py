"""How soon does a new prompt show? The demo's captions switched in mid-run, with recache and with a cut.

    python benchmarks/switches.py                                          # the table of demo/README.md
    python benchmarks/switches.py --dit student.safetensors --captions 32
    python benchmarks/switches.py --after "1, .75, .5, .357; 1, .75, .357; 1, .357"    # steps begin anew at a recache

A clip is made of one caption, then goes on under another, its window's keys and values written again (LongLive's KV
recache) or forgotten (a cut), as Diagonal Prompt Schedule does it. In each chunk from then on: the share of sprites of
the new caption that have colour and shape as asked for, and of the old colours, the share that is still there though no
longer asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from students import student_parser  # before the repository's: it makes them importable
from torch import Tensor

from diagonal_sampler.captions import COLOURS, CaptionEncoder, caption_of, parse_caption
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR
from diagonal_sampler.dit import WanDiT
from diagonal_sampler.frames import TIME_FACTOR, pixel_frames
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.schedule import levels_text, parse_sigmas
from distillation import demo_files, sprites
from distillation.common import PRECISION
from distillation.evidence.statistics import bootstrap
from distillation.recipes import DEMO
from distillation.rollout import stream
from distillation.samples import decode_frames
from distillation.score import SMALLEST_AREA, find_blobs, score_clip

BEFORE, BEHIND = 7, 8  # chunks of each caption
TABLES = (None, "1, .75, .5, .357; 1, .75, .357", "1, .75, .5, .357; 1, .75, .357; 1, .357")


def recoloured(captions: Sequence[str], seed: int) -> list[str]:
    """The captions with one sprite in a colour that none of its sprites had."""
    changed = []
    for index, caption in enumerate(captions):
        rng = np.random.default_rng([seed, index, 0xC01])
        specs = list(parse_caption(caption))
        free = [colour for colour in COLOURS if colour not in {spec.colour for spec in specs}]
        which = rng.integers(len(specs))
        specs[which] = replace(specs[which], colour=free[rng.integers(len(free))])
        changed.append(caption_of(specs))
    return changed


@torch.no_grad()
def switched_clips(
    dit: WanDiT,
    encoder: CaptionEncoder,
    trained: demo_files.TrainedFor,
    first: Sequence[str],
    then: Sequence[str],
    seed: int,
    switch: str,
) -> Tensor:
    """Latents [B, C, T, 8, 8] of BEFORE chunks of the first captions and BEHIND of the others."""
    side = sprites.FRAME_SIZE // SPACE_FACTOR
    noise = SeededNoise(seed, (len(first), LATENT_CHANNELS, side, side), torch.device("cpu"))
    text = [encoder.encode(list(captions)) for captions in (first, then)]
    now = 0

    def recache(chunk: int) -> bool:
        nonlocal now
        now = int(chunk >= BEFORE)
        return chunk == BEFORE and switch == "recache"

    chunks = stream(
        dit,
        lambda: text[now],
        noise,
        trained.schedule,
        trained.settings,
        (BEFORE + BEHIND) * trained.settings.frames_per_chunk,
        precision=PRECISION,
        recache=recache,
        cut=lambda chunk: chunk == BEFORE and switch == "cut",
    )
    return torch.cat(list(chunks), dim=2)


def old_colours_left(frames: Tensor, old: str, new: str) -> list[float]:
    """For each colour of the old caption that the new one does not have: the share of frames [T, 3, H, W] with it."""
    gone = {spec.colour for spec in parse_caption(old)} - {spec.colour for spec in parse_caption(new)}
    blobs = find_blobs(frames)
    return [float((blobs.area(colour) >= SMALLEST_AREA).float().mean()) for colour in gone]


def main() -> None:
    parser = student_parser(__doc__, captions=96)
    parser.add_argument("--after", action="append", help="noise levels from the switch on (repeatable)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dit, encoder, autoencoder = demo_files.load_models(DEMO, chosen.dit)
    trained = demo_files.trained_for(chosen.dit)
    first = sprites.held_out_captions(chosen.captions, chosen.caption_seed)
    kinds = {"another caption": [*first[1:], first[0]], "another colour": recoloured(first, chosen.caption_seed)}
    begins = pixel_frames(BEFORE * trained.settings.frames_per_chunk)
    per_chunk = TIME_FACTOR * trained.settings.frames_per_chunk
    print(f"{chosen.captions} captions of seed {chosen.caption_seed}, seed {chosen.seed}; {per_chunk} frames a chunk\n")
    print("| switch | new prompt | sigmas from there on | colour and shape right, by chunk | old colours still there |")
    print("|---|---|---|---|---|")
    schedule = trained.schedule
    for switch, table in [*(("recache", table) for table in chosen.after or TABLES), ("cut", TABLES[-1])]:
        rows = [schedule.chunk_sigmas(chunk) for chunk in range(BEFORE)]
        after = parse_sigmas(table) if table else (schedule.chunk_sigmas(BEFORE),)
        sampled = replace(trained, schedule=replace(schedule, sigmas=(*rows, *after)))
        for kind, then in kinds.items():
            right: list[list[list[float]]] = [[] for _ in range(BEHIND)]
            left: list[list[list[float]]] = [[] for _ in range(BEHIND)]
            latents = switched_clips(dit, encoder, sampled, first, then, chosen.seed, switch)
            for latent, old, new in zip(latents, first, then, strict=True):
                frames = decode_frames(autoencoder, latent[None])[0][begins:]
                for chunk, part in enumerate(frames.split(per_chunk)):
                    seen = score_clip(part, new).sprites
                    right[chunk].append([float(each.colour_right and each.shape_right) for each in seen])
                    left[chunk].append(old_colours_left(part, old, new))
            shares, stays = (
                ", ".join(f"{100 * bootstrap([row for row in rows if row]).estimate:.0f}" for rows in kept)
                for kept in (right, left)
            )
            print(f"| {switch} | {kind} | {levels_text(after)} | {shares}% | {stays}% |", flush=True)


if __name__ == "__main__":
    main()
