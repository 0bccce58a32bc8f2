"""What training costs on one GPU: recipe `wan_1_3b` at full size with random weights, through the real trainer.

    python benchmarks/train_wan.py --out runs/train_wan                    # 4 updates, all weights trained
    python benchmarks/train_wan.py --out runs/train_wan --lora-rank 128    # the README's adapters for one GPU
    python benchmarks/train_wan.py --out runs/train_wan --tiny             # does it run? no figures; a CPU will do

Makes a teacher in Wan 2.1 1.3B's layout and embedded prompts in a temporary folder, and trains from them: 832x480, 21
latent frames, batch 1, bf16 over float32 weights, activation checkpointing. Nothing is saved but a log and a table.
The release counts iterations, of which every fifth also trains the student: an update here is five of them.
Writes NAME.jsonl (the trainer's log) and NAME.md (the table) to --out, NAME saying what was trained. Needs no ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import random_state  # first: it makes the repository importable
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagonal_sampler.dit import HEAD_DIM
from distillation import train
from distillation.embed_prompts import (
    NEGATIVE_FILE,
    NEGATIVE_KEY,
    PROMPTS_FILE,
    Shard,
    write_prompts_file,
)
from distillation.ranks import join_ranks
from distillation.recipes import RECIPES, Recipe, parse_field

PROMPT_COUNT, PROMPT_TOKENS, PROMPT_STD = 24, 160, 0.2
TINY = {"dim": 128, "ffn_dim": 256, "num_layers": 2, "text_dim": 64, "frames": 6, "height": 8, "width": 8}
LORA_RATES = {"learning_rate": 1e-5, "fake_score_learning_rate": 2e-6}  # the README's
UPDATE_TFLOP = 9900
"""Arithmetic of an update's clip without the adapters', counted in distillation/README.md."""
ATTENTION_KERNELS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PARTS = ("rollout_seconds", "fake_score_seconds", "student_seconds")


def write_prompts(folder: Path, text_dim: int) -> Path:
    """A prompts file as `distillation.embed_prompts` writes it, with random embeddings."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    texts = [f"random prompt {index}" for index in range(PROMPT_COUNT)]
    negative = Shard(NEGATIVE_FILE, [NEGATIVE_KEY], [""], "random")
    shard = Shard("shard-00000.safetensors", [str(index) for index in range(PROMPT_COUNT)], texts, "random")
    for part, tokens in ((negative, 1), (shard, PROMPT_TOKENS)):
        rows = {key: (PROMPT_STD * torch.randn(tokens, text_dim, generator=generator)).bfloat16() for key in part.keys}
        save_file(rows, folder / part.name)
    path = folder / PROMPTS_FILE
    write_prompts_file(path, [negative, shard], texts)
    return path


def recipe_of(arguments: argparse.Namespace, folder: Path) -> Recipe:
    """The recipe, with its inputs made in `folder`."""
    changes: dict[str, Any] = {
        "teacher": str(folder / "teacher.safetensors"),
        "prompts": str(folder / "prompts" / PROMPTS_FILE),
        "batch": 1,
        "micro_batch": 1,
        "updates": arguments.updates,
        "compile": arguments.compile,
        "lora_rank": arguments.lora_rank,
        "save_every": 0,
        "sample_every": 0,
        "tensorboard": False,
    }
    recipe = replace(
        RECIPES["wan_1_3b"](),
        **changes,
        **(TINY if arguments.tiny else {}),
        **(LORA_RATES if arguments.lora_rank else {}),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = random_state(recipe.model, torch.bfloat16, device)
    save_file({name: value.cpu() for name, value in weights.items()}, recipe.teacher)
    write_prompts(folder / "prompts", recipe.text_dim)
    return recipe


def time_limit(seconds: float | None) -> Callable[[], bool]:
    """Whether another update would end after `seconds` from now, if it took as long as the longest so far."""
    began = last = time.perf_counter()
    longest = 0.0

    def time_is_up() -> bool:
        nonlocal last, longest
        now = time.perf_counter()
        # The first span has the loading in it.
        longest, last = max(longest, now - last) if longest else 1e-9, now
        return seconds is not None and now - began + longest > seconds

    return time_is_up


def attention_seconds(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Seconds of one layer's attention over a whole clip, forward and backward, by kernel."""
    tokens = recipe.frames * (recipe.height // 2) * (recipe.width // 2)
    shape = (1, tokens, recipe.dim // HEAD_DIM, HEAD_DIM)
    made = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in made)
    found = {}
    for name, kernels in {"torch's choice": None, **ATTENTION_KERNELS}.items():
        with sdpa_kernel(list(SDPBackend.__members__.values()) if kernels is None else kernels):
            try:
                for _ in range(2):  # the first prepares the kernel
                    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                    marks[0].record()
                    out = F.scaled_dot_product_attention(q, k, v)
                    marks[1].record()
                    torch.autograd.grad(out, (q, k, v), out)
                    marks[2].record()
                    torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"{name} attention does not run here: {error}", file=sys.stderr)
                continue
        found[name] = (marks[0].elapsed_time(marks[1]) / 1000, marks[1].elapsed_time(marks[2]) / 1000)
    return found


def table(recipe: Recipe, lines: list[Mapping[str, float]], wall: float) -> str:
    """What was measured, in Markdown."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    trained = f"LoRA of rank {recipe.lora_rank}" if recipe.lora_rank else "all weights trained"
    seconds = [line["seconds"] for line in lines]
    steady = statistics.median(seconds[1:] or seconds)
    iterations = recipe.fake_score_updates
    out = [
        f"Recipe {recipe.name}, {trained}, compile {'on' if recipe.compile else 'off'}, "
        f"{8 * recipe.width}x{8 * recipe.height}, {recipe.frames} latent frames, dim {recipe.dim}, "
        f"{recipe.num_layers} blocks, batch {recipe.batch}, random weights, torch {torch.__version__}, {device}",
        "",
        "| update | seconds | rollouts | fake score | student | fake score loss | dmd | motion | fake score norm | "
        "student norm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        parts = " | ".join(f"{line[name]:.2f}" for name in ("seconds", *PARTS))
        values = ("fake_score", "dmd", "motion", "fake_score_norm", "student_norm")
        out.append(f"| {line['update']:.0f} | {parts} | {' | '.join(f'{line[name]:.4g}' for name in values)} |")
    out += [
        "",
        "| figure | value |",
        "|---|---|",
        f"| updates, and iterations as the release counts | {len(lines)}, {iterations * len(lines)} |",
        f"| seconds an update, median without the first | {steady:.2f} |",
        f"| seconds an iteration of the release | {steady / iterations:.2f} |",
        f"| loading and all updates | {wall:.0f} s |",
    ]
    if cuda:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        total = torch.cuda.get_device_properties(0).total_memory
        out.append(
            f"| peak VRAM, allocated and reserved; the card has | {peak / 1e9:.1f}, {reserved / 1e9:.1f}; "
            f"{total / 1e9:.1f} GB |"
        )
    if cuda and recipe.dim > TINY["dim"]:
        out.append(f"| sustained, of {UPDATE_TFLOP} TFLOP an update | {UPDATE_TFLOP / steady:.0f} TFLOP/s |")
        for name, (forward, backward) in attention_seconds(recipe).items():
            out.append(
                f"| attention of a layer over a clip, {name}: forward, backward | {forward:.4f}, {backward:.4f} s |"
            )
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the log and the table")
    parser.add_argument("--updates", type=int, default=4, help="each is 5 iterations as the release counts")
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters of this rank; 0: all weights")
    parser.add_argument("--compile", type=lambda text: parse_field("compile", text), default=False, metavar="BOOL")
    parser.add_argument("--seconds", type=float, help="begin no update that would end later than this after the start")
    parser.add_argument("--tiny", action="store_true", help="a network of two blocks: a rehearsal")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if not torch.cuda.is_available() and not arguments.tiny:
        print("no GPU here: nothing was measured (--tiny goes on without one).")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="train-wan-") as name:
        folder = Path(name)
        limit = time_limit(arguments.seconds)
        recipe = recipe_of(arguments, folder)
        began = time.perf_counter()
        ranks = join_ranks()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        train.run(recipe, folder / "run", ranks, time_is_up=limit)
        wall = time.perf_counter() - began
        stem = f"lora_{recipe.lora_rank}" if recipe.lora_rank else "all_weights"
        stem = f"{'tiny_' if arguments.tiny else ''}{stem}{'_compiled' if recipe.compile else ''}"
        shutil.copyfile(folder / "run" / "log.jsonl", arguments.out / f"{stem}.jsonl")
    lines = [json.loads(line) for line in (arguments.out / f"{stem}.jsonl").read_text().splitlines()]
    text = table(recipe, lines, wall)
    (arguments.out / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
