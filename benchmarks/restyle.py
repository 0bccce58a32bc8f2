"""How closely does a video that is made over another follow it, and how well its own prompt? By `denoise`.

    python benchmarks/restyle.py                                      # the table of demo/README.md
    python benchmarks/restyle.py --captions 16 --denoise .5

True clips of held-out captions with one sprite are encoded (of two nobody could tell which is to become which), and
the student makes clips over them in which it is to have another shape, another colour, or both, as Diagonal Stream
Video does with a video. Of each: whether colour and shape are right, and, over the frames that show it, how far it is
from where a true one would be (median and mean over the clips); and the share of frames that still show the old colour.
At denoise 1 nothing of the video is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from students import student_parser  # before the repository's: it makes them importable
from torch import Tensor

from diagonal_sampler.captions import ROLES, SpriteSpec, parse_caption
from diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR
from diagonal_sampler.frames import latent_frames
from diagonal_sampler.noise import SeededNoise
from diagonal_sampler.sampler import count_chunks
from diagonal_sampler.schedule import shift_sigma
from distillation import demo_files, sprites
from distillation.common import PRECISION
from distillation.recipes import DEMO
from distillation.rollout import stream
from distillation.samples import decode_frames, encode_frames
from distillation.score import SMALLEST_AREA, find_blobs, score_clip

DENOISE = (0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
KINDS = {"shape": ("shape",), "colour": ("colour",), "both": ("shape", "colour")}
"""What is new, and the words of a sprite that change for it."""
DRAWN = 12
"""Captions drawn for each that is wanted; about one of ten has one sprite."""


def restyled(spec: SpriteSpec, words: Sequence[str], rng: np.random.Generator) -> SpriteSpec:
    """The same way and speed with some words exchanged."""
    free = {word: [value for value in ROLES[word] if value != getattr(spec, word)] for word in words}
    return replace(spec, **{word: str(rng.choice(values)) for word, values in free.items()})


def in_place_of(scenes: sprites.Scenes, words: Sequence[str], seed: int) -> sprites.Scenes:
    """The scenes of one sprite each with some words exchanged, on the same paths."""
    specs = [
        [restyled(old, words, np.random.default_rng([seed, row, 0x57E]))] for row, (old,) in enumerate(scenes.specs)
    ]
    drawn = sprites.make_scenes(specs, seed)
    return replace(scenes, specs=drawn.specs, shape=drawn.shape, colour=drawn.colour)


def distance(frames: Tensor, true: Tensor, colour: str) -> list[float]:
    """Mean over the frames [T, 3, H, W] that show a colour of its distance from where the true clip has it, pixels."""
    apart = (find_blobs(frames).centroid(colour) - find_blobs(true).centroid(colour)).norm(dim=1)
    seen = apart[~apart.isnan()]
    return [float(seen.mean())] if len(seen) else []


def main() -> None:
    parser = student_parser(__doc__, captions=36)
    parser.add_argument("--denoise", type=float, action="append", help="how much is made anew (repeatable)")
    parser.add_argument("--length", type=int, default=sprites.CLIP_FRAMES, help="pixel frames of a clip")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dit, encoder, autoencoder = demo_files.load_models(DEMO, chosen.dit)
    trained = demo_files.trained_for(chosen.dit)
    found = sprites.held_out_captions(DRAWN * chosen.captions, chosen.caption_seed)
    captions = [caption for caption in found if len(parse_caption(caption)) == 1][: chosen.captions]
    scenes = sprites.make_scenes([parse_caption(caption) for caption in captions], chosen.caption_seed)
    when = torch.arange(chosen.length)
    given = encode_frames(autoencoder, sprites.to_pixels(sprites.render(scenes, when)))
    side = sprites.FRAME_SIZE // SPACE_FACTOR
    noise = SeededNoise(chosen.seed, (len(captions), LATENT_CHANNELS, side, side), torch.device("cpu"))
    print(f"{len(captions)} captions of seed {chosen.caption_seed}, seed {chosen.seed}, {chosen.length} frames\n")
    print("| new | denoise | forwards | colour and shape right | from the path, median and mean | old colour left |")
    print("|---|---|---|---|---|---|")
    levels = [*(chosen.denoise or DENOISE[:-1]), DENOISE[-1]]
    for (kind, words), denoise in product(KINDS.items(), levels):
        wanted = in_place_of(scenes, words, chosen.caption_seed)
        true = sprites.render(wanted, when)  # uint8 [N, T, 3, 64, 64]
        schedule = trained.schedule
        if denoise < 1:
            schedule = schedule.start_at(shift_sigma(denoise, schedule.shift))
        with torch.no_grad():
            made = stream(
                dit,
                encoder.encode(wanted.captions),
                noise,
                schedule,
                trained.settings,
                latent_frames(chosen.length),
                precision=PRECISION,
                source=lambda start, frames: given[:, :, start : start + frames],
            )
            latents = torch.cat(list(made), dim=2)
        right, apart, left = [], [], []
        for row, latent in enumerate(latents):
            frames = decode_frames(autoencoder, latent[None])[0]
            (seen,) = score_clip(frames, wanted.captions[row]).sprites
            right.append(seen.colour_right and seen.shape_right)
            (old,), (new,) = scenes.specs[row], wanted.specs[row]
            apart += distance(frames, true[row].float(), new.colour)
            if old.colour != new.colour:
                shown = find_blobs(frames).area(old.colour) >= SMALLEST_AREA
                left.append(float(shown.float().mean()))
        cells = (
            f"{100 * np.mean(right):.0f}%",
            f"{np.median(apart):.1f}, {np.mean(apart):.1f} px",
            f"{100 * np.mean(left):.0f}%" if left else "-",
        )
        forwards = schedule.nfe(count_chunks(latent_frames(chosen.length), trained.settings.frames_per_chunk))
        print(f"| {kind} | {denoise:g} | {forwards} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
