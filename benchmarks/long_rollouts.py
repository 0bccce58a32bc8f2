"""Do sprites last? Ten clips' length of the demo in one rollout, at several steps a chunk.

    python benchmarks/long_rollouts.py                                       # the table of demo/README.md
    python benchmarks/long_rollouts.py --captions 32 --sigmas "1, .75, .5, .357; 1, .75, .357"
    python benchmarks/long_rollouts.py --dit student.safetensors --caption-seed 5    # other captions

What a chunk loses of a sprite the next ones seldom get back. So the same weights, captions and noise are rolled out at
tables of noise levels that differ in the chunks which repeat, and the share of sprites with colour and shape right is
measured in each tenth, with the measures of `distillation.evaluate`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from students import student_parser  # before the repository's: it makes them importable

from diagonal_sampler.frames import latent_frames
from diagonal_sampler.sampler import count_forwards
from diagonal_sampler.schedule import parse_sigmas
from distillation import demo_files, sprites
from distillation.evidence import measures
from distillation.evidence.rows import SHIPPED, row_named
from distillation.evidence.statistics import bootstrap
from distillation.recipes import DEMO

CLIPS = 10
TABLES = ("1, .75, .5, .357; 1, .75, .357; 1, .357", "1, .75, .5, .357; 1, .75, .357")


def main() -> None:
    parser = student_parser(__doc__, captions=128)
    parser.add_argument("--sigmas", action="append", help="a table, chunks split by semicolons (repeatable)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    chosen = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(chosen.threads)
    parts, dit = measures.load_parts(DEMO, torch.device("cpu")), demo_files.load_dit(chosen.dit)
    row = row_named(SHIPPED)
    options = measures.Options(
        captions=chosen.captions, seeds=(chosen.seed,), long=CLIPS, long_captions=chosen.captions
    )
    captions = sprites.held_out_captions(chosen.captions, chosen.caption_seed)
    print(
        f"{chosen.captions} captions of seed {chosen.caption_seed}, seed {chosen.seed}, {options.long_length} frames\n"
    )
    print("| sigmas | forwards | colour and shape right in each tenth | change, points |")
    print("|---|---|---|---|")
    for table in chosen.sigmas or TABLES:
        sampled = replace(row, schedule=replace(row.schedule, sigmas=parse_sigmas(table)))
        make = measures.sampled_clips(dit, parts, sampled)(captions, chosen.seed, options.long_length)
        tenths = [measures.drift_of(frames, caption).correct for caption, frames in zip(captions, make, strict=True)]
        change = bootstrap([[each[-1] - each[0]] for each in tenths])
        points = [f"{100 * value:+.1f}" for value in (change.estimate, *change.interval())]
        shares = ", ".join(f"{100 * sum(part) / len(part):.1f}" for part in zip(*tenths, strict=True))
        forwards = count_forwards(sampled.schedule, latent_frames(options.length), sampled.settings.frames_per_chunk)
        print(f"| {table} | {forwards} | {shares}% | {points[0]} [{points[1]}, {points[2]}] |", flush=True)


if __name__ == "__main__":
    main()
