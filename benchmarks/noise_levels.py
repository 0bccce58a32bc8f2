"""Which noise levels does a student's opening need? The demo's clips at several tables of sigmas.

    python benchmarks/noise_levels.py                                           # the table of demo/README.md
    python benchmarks/noise_levels.py --sigmas "1,.8,.6,.357; 1,.357" --seeds 1,2
    python benchmarks/noise_levels.py --dit student.safetensors --captions 128 --caption-seed 5    # other captions

A few-step student's denoised is a mean over what is still undecided. Where its levels jump past the noise at which a
sprite's place is decided, the mean of two places stays: a pale second copy. So the levels are tried, with the same
weights, captions and noise, and clips of 33 frames are scored with the measures of `distillation.evaluate`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from students import student_parser  # before the repository's: it makes them importable

from diagonal_sampler.schedule import parse_sigmas
from distillation import demo_files, sprites
from distillation.evaluate import parse_seeds
from distillation.evidence import measures
from distillation.evidence.rows import SHIPPED, row_named
from distillation.evidence.statistics import ClipFeatures, frechet_spread
from distillation.recipes import DEMO

LENGTH = 33  # pixel frames: the scorer's shortest
FAR = 0.5  # px a frame; an error above it is a sprite that goes elsewhere, or is there twice
TABLES = (
    "1, .933, .733, .357; 1, .933, .357; 1, .357",
    "1, .9, .65, .357; 1, .933, .357; 1, .357",
    "1, .85, .6, .357; 1, .933, .357; 1, .357",
    "1, .8, .6, .357; 1, .933, .357; 1, .357",
    "1, .8, .6, .357; 1, .8, .357; 1, .357",
    "1, .75, .5, .357; 1, .75, .357; 1, .357",
    "1, .7, .45, .357; 1, .933, .357; 1, .357",
)


def main() -> None:
    parser = student_parser(__doc__, captions=96)
    parser.add_argument("--sigmas", action="append", help="a table, chunks split by semicolons (repeatable)")
    parser.add_argument("--seeds", default="1,2", help="of the noise")
    chosen = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(chosen.threads)
    parts, dit, row = (
        measures.load_parts(DEMO, torch.device("cpu")),
        demo_files.load_dit(chosen.dit),
        row_named(SHIPPED),
    )
    captions, seeds = sprites.held_out_captions(chosen.captions, chosen.caption_seed), parse_seeds(chosen.seeds)
    network, true = ClipFeatures(), measures.true_clips(measures.REAL_SEED)
    real = np.array([[network(frames) for frames in true(captions, seed, LENGTH)] for seed in seeds]).swapaxes(0, 1)
    print(f"{chosen.captions} captions of seed {chosen.caption_seed}, seeds {chosen.seeds}, {LENGTH} frames\n")
    print("| sigmas | colours | shapes | directions | everything | end-point error ", end="")
    print("| farther than 0.5 | error of the others | Frechet distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    for table in chosen.sigmas or TABLES:
        sampled = replace(row, schedule=replace(row.schedule, sigmas=parse_sigmas(table)))
        make = measures.sampled_clips(dit, parts, sampled)
        found: dict[str, list[float]] = {name: [] for name in measures.PER_CAPTION}
        features = np.empty_like(real)
        for column, seed in enumerate(seeds):
            for index, (caption, frames) in enumerate(zip(captions, make(captions, seed, LENGTH), strict=True)):
                features[index, column] = network(frames)
                for name, values in measures.clip_values(frames, caption).items():
                    found[name] += values
        shares = (sum(found[name]) / len(found[name]) for name in ("colour", "shape", "direction", "everything"))
        errors = torch.tensor(found["endpoint"])
        far = errors > FAR
        cells = [
            *(f"{share:.1%}" for share in shares),
            f"{errors.mean():.3f}",
            f"{far.float().mean():.1%}",
            f"{errors[~far].mean():.3f}",
            f"{frechet_spread(features, real).estimate:.1f}",
        ]
        print(f"| {table} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
