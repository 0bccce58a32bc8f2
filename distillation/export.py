"""Turns a run into one file for ComfyUI.

    python -m distillation.export --run runs/student --to ComfyUI/models/diffusion_models/student.safetensors
    python -m distillation.export --run runs/lora --to ComfyUI/models/loras/student.safetensors

The averaged (EMA) weights of the last checkpoint, or of --update's, under bare Wan names, with the provenance and
ComfyUI's mark of a causal model in the header. A run with adapters gives a LoRA in ComfyUI's layout, or, with --merge,
whole weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from diagonal_sampler.provenance import Provenance
from diagonal_sampler.weight_files import write_weights
from distillation import run_folder
from distillation.common import git_commit, stops_in_a_line
from distillation.demo_files import KEPT_NOISE, NOISE_KEY
from distillation.lora import host_lora
from distillation.networks import read_wan
from distillation.recipes import RECIPES, Recipe

log = logging.getLogger("export")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ADAPTER = "student"
IN_USE = (5, 32, 1224)  # Windows: access denied, sharing violation, and a file that a program has mapped
# Fields that the header says in another place, or of which nothing follows for the weights.
UNLISTED = frozenset(("name", "stage", "updates", "batch", "seed")) | run_folder.FILE_FIELDS
UNLISTED |= run_folder.FREE_FIELDS - {"cooldown"}


def changed_fields(recipe: Recipe) -> str:
    """The flags that make this recipe of the one it is named after, without those of `UNLISTED`."""
    usual = RECIPES[recipe.name]() if recipe.name in RECIPES else Recipe(name=recipe.name)
    changes = {item.name: getattr(recipe, item.name) for item in fields(Recipe) if item.name not in UNLISTED}
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in changes.items() if value != getattr(usual, name))
    return " ".join(flags)


def header_of(recipe: Recipe, updates: int, *, whole: bool, commit: str | None = None) -> dict[str, str]:
    """Header entries: DESIGN's provenance keys and, for whole weights, ComfyUI's mark of a causal model.

    Args:
        whole: not a LoRA.
        commit: of the code that the run began with; None is the present one.
    """
    schedule, distilled = recipe.inference_schedule, recipe.stage != "forcing"
    renoises = schedule.context_mode == "renoise"
    # Beside the prompts, only what the stage reads: without a student it begins with the teacher.
    used = ("prompts", "teacher", "student", "fake_score" if recipe.distils else "clips")
    provenance = Provenance(
        frames_per_chunk=recipe.frames_per_chunk,
        steps_per_chunk=tuple(len(row) for row in schedule.sigmas),
        sigmas=schedule.sigmas,
        shift=schedule.shift,
        context_mode=schedule.context_mode,
        context_sigma=schedule.context_sigma if renoises else None,
        window=recipe.window,
        sink=recipe.sink,
        recipe=(
            f"distillation.train --recipe {recipe.name} --stage {recipe.stage}, {updates} updates of {recipe.batch} "
            f"clips, seed {recipe.seed}"
            + (f", renoise {recipe.context_sigma:g}" if renoises else "")
            + (f"; changed: {changes}" if (changes := changed_fields(recipe)) else "")
        ),
        data="; ".join(
            f"{name} {run_folder.file_name(getattr(recipe, name))}" for name in used if getattr(recipe, name)
        ),
        git_commit=git_commit() if commit is None else commit,
    )
    header = provenance.to_metadata() | ({} if distilled else {NOISE_KEY: KEPT_NOISE})
    if whole:
        config = {"causal_ar": True, "text_dim": recipe.text_dim}
        header |= {"config": json.dumps({"transformer": config})} | ({"cfg": "1"} if distilled else {})
    return header


def export(
    run: Path,
    target: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    merge: bool = False,
    update: int | None = None,
) -> None:
    """Writes the averaged student of a run under a temporary name, then renames.

    Args:
        run: folder of the run.
        target: a .safetensors file.
        merge: add the adapters to the base weights instead of writing them as a LoRA.
        update: of the checkpoint, counted as its folder's name is; None is the last one.

    Raises:
        ValueError: no run or no such checkpoint there; base weights that are no longer those of the training; or a
            target that is no .safetensors file, one that the run was trained from or, on Windows, in use.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"to is {os.fspath(target)!r}; name a .safetensors file.")
    recipe = run_folder.read_recipe(run)
    for name in ("teacher", "student", "fake_score"):
        path = Path(getattr(recipe, name))
        if target.exists() and path.is_file() and target.samefile(path):
            raise ValueError(f"to is {os.fspath(target)!r}, which the run was trained from ({name}); choose another.")
    found = run_folder.checkpoints(run)
    if not found:
        when = f"one every {recipe.save_every} updates" if recipe.save_every else "none: its save_every is 0"
        raise ValueError(f"{run} has no checkpoint yet; it writes {when}.")
    updates, path = found[-1]
    if update is not None:
        if update not in dict(found):
            known = ", ".join(str(number) for number, _ in found)
            raise ValueError(f"update is {update}, of which {run} has no checkpoint; it has those of {known}.")
        updates, path = update, dict(found)[update]
    if recipe.lora_rank and merge:
        run_folder.require_same_file(run, recipe, "student" if recipe.student else "teacher")
    averaged = run_folder.load_whole(path, "ema/")
    tensors: dict[str, Tensor] = averaged
    if recipe.lora_rank and merge:
        tensors = merged(recipe, averaged)
    elif recipe.lora_rank:
        tensors = host_lora(averaged, ADAPTER)
    kept = {name: value if name.endswith(".alpha") else value.to(dtype) for name, value in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    commit = run_folder.read_beginning(run).get("git_commit", f"unknown; exported at {git_commit()}")
    header = header_of(recipe, updates, whole=merge or not recipe.lora_rank, commit=commit)
    try:
        write_weights(target, kept, header)
    except OSError as error:
        if target.exists() and getattr(error, "winerror", None) in IN_USE:
            raise ValueError(
                f"{target} cannot be replaced ({error}). If ComfyUI has loaded it, unload it there or stop ComfyUI; or "
                "choose another name."
            ) from None
        raise
    log.info("%s: %.1f MB, %d updates", target, target.stat().st_size / 1e6, updates)


def merged(recipe: Recipe, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's base weights with up @ down added to every adapted layer."""
    tensors = dict(read_wan(recipe.student_weights, recipe.model).state_dict())
    for path, down in adapters.items():
        layer, part = path.split(f".adapters.{ADAPTER}.")
        if part == "down":
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + adapters[f"{layer}.adapters.{ADAPTER}.up"] @ down
    return tensors


@stops_in_a_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder given to train --out")
    parser.add_argument("--to", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--merge", action="store_true", help="adapters: write whole weights instead of a LoRA")
    parser.add_argument("--update", type=int, help="take the checkpoint after this many updates; default: the last")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    export(options.run, options.to, dtype=DTYPES[options.dtype], merge=options.merge, update=options.update)


if __name__ == "__main__":
    raise SystemExit(main())
