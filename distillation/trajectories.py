"""Clips on disk: the teacher's ODE trajectories (stage ode, made here) or latents of real video (stage forcing).

A folder of `clips-*.safetensors` (trajectories: `clips-FIRST.safetensors`, by the number of its first clip), each with

    latents      [N, C, T, H, W] clean latents in the model's own scale
    prompt_rows  int64 [N], rows of the prompts file
    trajectory   [N, K, C, T, H, W] (stage ode) the same clips on their way, at the noise levels of
    sigmas       [K] descending

and, where a recipe has an optical-flow adapter,

    optical_flow [N, 4, T, H, W] what the adapter is given (flow_adapter.adapter_features); 0 is no flow
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diagonal_sampler.dit import WanDiT
from diagonal_sampler.sampler import Forward
from diagonal_sampler.schedule import DiagonalSchedule, shift_sigma
from diagonal_sampler.settings import GLOBAL_WINDOW, CausalSettings
from diagonal_sampler.weight_files import write_weights
from distillation.flow_fields import FlowFields
from distillation.prompts import PromptSet
from distillation.ranks import barrier, require_same
from distillation.recipes import Recipe
from distillation.rollout import BatchNoise, sample_seed, stream
from distillation.run_folder import CLIP_FILES, input_digests, other_files

MADE_FOR = "made_for"
FILES = "files"  # entry of MADE_FOR: digests of the files that its names stand for
_CLOSE = 1e-6  # noise levels nearer than this are one


def schedule_sigmas(recipe: Recipe) -> tuple[float, ...]:
    """Every noise level at which the student is asked to predict, descending."""
    return tuple(sorted({sigma for row in recipe.schedule.sigmas for sigma in row}, reverse=True))


def trajectory_schedule(recipe: Recipe) -> DiagonalSchedule:
    """The teacher's Euler steps: `ode_steps` even ones under the recipe's shift, and the student's noise levels."""
    even = [shift_sigma((recipe.ode_steps - i) / recipe.ode_steps, recipe.shift) for i in range(recipe.ode_steps)]
    merged: list[float] = []
    for sigma in sorted((*even, *schedule_sigmas(recipe)), reverse=True):
        if not merged or merged[-1] - sigma > _CLOSE:
            merged.append(sigma)
    # A teacher that sees the whole clip at once leaves nothing in a cache, so it needs no pass to write it.
    mode = "noisy" if recipe.score_attention == "bidirectional" else "clean"
    return DiagonalSchedule(sigmas=(tuple(merged),), context_mode=mode, shift=recipe.shift, fresh_noise=False)


class Unfinished(Exception):
    """The making of trajectories was told to stop; those that are done stay."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"{done} of {total} trajectories; the same command goes on")


def made_for(recipe: Recipe) -> dict[str, Any]:
    """What trajectories depend on, beside sizes and noise levels; under FILES what teacher and prompts held.

    Raises:
        ValueError: as `input_digests`.
    """
    values = {name: getattr(recipe, name) for name in ("seed", "cfg", "ode_steps", "score_attention")}
    names = {name: Path(getattr(recipe, name)).name for name in ("teacher", "prompts")}
    if recipe.flow_adapter:
        names["flow_adapter"] = Path(recipe.flow_adapter).name
        values["flow_dropout"] = recipe.flow_dropout
    digests = input_digests(recipe)
    return {**values, **names, FILES: {name: digests[name] for name in ("teacher", "prompts") if name in digests}}


def teacher_settings(recipe: Recipe) -> CausalSettings:
    """How the teacher looks at a clip: as one chunk (bidirectional), or chunk by chunk like the student."""
    if recipe.score_attention == "bidirectional":
        return CausalSettings(frames_per_chunk=recipe.frames, window=GLOBAL_WINDOW, sink=0)
    return recipe.settings


@torch.no_grad()
def trajectories(
    recipe: Recipe,
    teacher: WanDiT,
    context: Tensor,
    negative: Tensor | None,
    noise: BatchNoise,
    precision: torch.dtype,
    optical_flow: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solves the teacher's ODE with guidance by the sampler's own loop.

    Args:
        context: [B, tokens, text_dim]; negative: [1, tokens, text_dim].
        optical_flow: [B, 4, T, H, W] what the adapter is given, or None.

    Returns:
        The trajectory [B, K, C, T, H, W] at `schedule_sigmas`, and its end [B, C, T, H, W].
    """
    wanted = schedule_sigmas(recipe)
    found: dict[tuple[int, int], Tensor] = {}

    def watch(x: Tensor, at: Forward) -> None:
        for index, sigma in enumerate(wanted):
            if at.steps and abs(at.sigma - sigma) <= _CLOSE:
                found[index, at.start_frame] = x

    chunks = stream(
        teacher,
        context,
        noise,
        trajectory_schedule(recipe),
        teacher_settings(recipe),
        recipe.frames,
        precision=precision,
        cfg=recipe.cfg,
        negative=negative,
        optical_flow=optical_flow,
        watch=watch,
    )
    clip = torch.cat(list(chunks), dim=2)
    starts = sorted({start for _, start in found})
    path = [torch.cat([found[index, start] for start in starts], dim=2) for index in range(len(wanted))]
    return torch.stack(path, dim=1), clip


def make_trajectories(
    recipe: Recipe,
    folder: Path,
    teacher: WanDiT,
    prompts: PromptSet,
    negative: Tensor | None,
    device: torch.device,
    precision: torch.dtype,
    *,
    rank: int,
    ranks: int,
    flows: FlowFields | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    stops: Callable[[], bool] = lambda: False,
) -> None:
    """Fills `folder` with `ode_clips` trajectories, a file a micro-batch; clips that are there are kept.

    Clip n follows from its number alone, so that a folder may be filled in parts, by any number of ranks and with other
    micro-batches.

    Args:
        stops: asked on all ranks, which are told the same, after each file that is not the last.

    Raises:
        Unfinished: it said so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    barrier()
    batches = _missing(folder, recipe, len(prompts))
    require_same(f"clips in {folder}", [(batch.start, batch.stop) for batch in batches])  # and wait until all have seen
    stated = {MADE_FOR: json.dumps(made_for(recipe), sort_keys=True)}
    for first in range(0, len(batches), ranks):
        # A sharded teacher needs all ranks in each forward: those without a batch of their own make the last one too.
        own = first + rank
        indices = batches[min(own, len(batches) - 1)]
        rows = [index % len(prompts) for index in indices]
        seeds = [sample_seed(recipe.seed, "ode", index) for index in indices]
        flow = None if flows is None else flows.features(rows, seeds, recipe.frames)
        noise = BatchNoise(
            seeds,
            (recipe.model.in_channels, recipe.height, recipe.width),
            device,
        )
        on_device = None if flow is None else flow.to(device)
        context = prompts.embeddings(rows).to(device)
        path, clip = trajectories(recipe, teacher, context, negative, noise, precision, on_device)
        if own < len(batches):
            tensors = {
                "latents": clip.half().cpu(),
                "trajectory": path.half().cpu(),
                "prompt_rows": torch.tensor(rows),
                "sigmas": torch.tensor(schedule_sigmas(recipe)),
            }
            if flow is not None:
                tensors["optical_flow"] = flow.half()
            write_weights(folder / f"clips-{indices[0]:06d}.safetensors", tensors, stated)
        left = batches[first + ranks :]
        report(len(batches) - len(left), len(batches))
        if left and stops():
            raise Unfinished(recipe.ode_clips - sum(map(len, left)), recipe.ode_clips)
    barrier()


def _missing(folder: Path, recipe: Recipe, prompts: int) -> list[range]:
    """Runs of at most `micro_batch` clips that no file of the folder holds; ValueError as ClipFolder."""
    there: dict[int, tuple[Path, int]] = {}
    if any(folder.glob(CLIP_FILES)):
        there = ClipFolder(folder, recipe, with_trajectory=True, prompts=prompts).numbered
    out: list[range] = []
    for clip in range(recipe.ode_clips):
        if clip in there:
            continue
        if out and out[-1].stop == clip and len(out[-1]) < recipe.micro_batch:
            out[-1] = range(out[-1].start, clip + 1)
        else:
            out.append(range(clip, clip + 1))
    return out


class ClipFolder:
    """Clips on disk, read row by row.

    Args:
        prompts: how many the prompts file has.

    Raises:
        ValueError: no clips, a file without the tensors that the stage needs, of another size than the recipe's, or of
            other prompts.

    A recipe with an optical-flow adapter needs `optical_flow`; another does not look at it.

    Attributes:
        rows: file and place of each clip. With trajectories those numbered below `ode_clips` alone, in that order:
            another run may put more into the folder at any time.
        numbered: with trajectories, the same of every clip there by its number.
        undated: trajectory files of a time when they did not say what teacher and prompts held; taken for the same.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, with_trajectory: bool, prompts: int) -> None:
        self.with_trajectory, self.with_flow = with_trajectory, bool(recipe.flow_adapter)
        self.rows: list[tuple[Path, int]] = []
        self.numbered: dict[int, tuple[Path, int]] = {}
        self.undated = 0
        made = made_for(recipe) if with_trajectory else {}
        wanted = [recipe.model.in_channels, recipe.frames, recipe.height, recipe.width]
        for path in sorted(folder.glob(CLIP_FILES)):
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                needed = {"latents", "prompt_rows"} | ({"trajectory", "sigmas"} if with_trajectory else set())
                needed |= {"optical_flow"} if self.with_flow else set()
                if needed - keys:
                    raise ValueError(f"{path} has no {', '.join(sorted(needed - keys))}; see distillation/README.md.")
                shape = file.get_slice("latents").get_shape()
                if shape[1:] != wanted:
                    raise ValueError(f"{path} holds latents of [C, T, H, W] {shape[1:]}; the recipe asks for {wanted}.")
                if with_trajectory:
                    sigmas = tuple(round(value, 5) for value in file.get_tensor("sigmas").tolist())
                    if sigmas != tuple(round(value, 5) for value in schedule_sigmas(recipe)):
                        raise ValueError(f"{path} was made for another schedule ({sigmas}); choose another folder.")
                    self._require_made_for((file.metadata() or {}).get(MADE_FOR), made, path)
                rows = file.get_tensor("prompt_rows")
                if rows.shape != (shape[0],) or rows.is_floating_point():
                    raise ValueError(
                        f"{path}: prompt_rows is {rows.dtype} {list(rows.shape)}; it must be int64 [{shape[0]}], a row "
                        "of the prompts file a clip."
                    )
                if rows.numel() and not 0 <= rows.min() <= rows.max() < prompts:
                    raise ValueError(
                        f"{path} names prompts {int(rows.min())} to {int(rows.max())}, and the prompts file has 0 to "
                        f"{prompts - 1}; it was made for another prompts file."
                    )
                self.rows += [(path, row) for row in range(shape[0])]
                if with_trajectory and (first := path.stem.removeprefix("clips-")).isdecimal():
                    for row in range(shape[0]):
                        self.numbered.setdefault(int(first) + row, (path, row))
        if not self.rows:
            raise ValueError(f"clips is {str(folder)!r}, which has no clips-*.safetensors; see distillation/README.md.")
        if with_trajectory:
            self.rows = [self.numbered[number] for number in sorted(self.numbered) if number < recipe.ode_clips]

    def _require_made_for(self, text: str | None, made: dict[str, Any], path: Path) -> None:
        """ValueError if a file's MADE_FOR is another; counts the files that do not say what their inputs held."""
        try:
            stated = dict(json.loads(text or "{}"))
        except (TypeError, ValueError):
            stated = {}
        files = stated.get(FILES)
        self.undated += files is None
        values = {name: value for name, value in made.items() if name != FILES}
        if values != {name: value for name, value in stated.items() if name != FILES}:
            raise ValueError(f"{path} was made for {text}, not {json.dumps(made)}; choose another folder.")
        if others := other_files(files or {}, made[FILES]):
            raise ValueError(
                f"{path} was made for another {' and another '.join(others)}, with the name that is given; choose "
                "another folder."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None, list[int], Tensor | None]:
        """Latents [B, C, T, H, W], trajectories [B, K, C, T, H, W] or None, prompt rows, and flow [B, 4, T, H, W] or
        None.

        Raises:
            ValueError: a clip with NaN or Inf.
        """
        latents, paths, rows, flows = [], [], [], []
        for index in indices:
            path, row = self.rows[index]
            with safe_open(path, framework="pt") as file:
                latents.append(file.get_slice("latents")[row : row + 1].float())
                rows.append(int(file.get_tensor("prompt_rows")[row]))
                if self.with_trajectory:
                    paths.append(file.get_slice("trajectory")[row : row + 1].float())
                if self.with_flow:
                    flows.append(file.get_slice("optical_flow")[row : row + 1].float())
            for name, made in (("latents", latents), ("trajectory", paths), ("optical_flow", flows)):
                if made and not made[-1].isfinite().all():
                    raise ValueError(f"{path}: {name} of clip {row} holds NaN or Inf; make that file again.")
        return torch.cat(latents), torch.cat(paths) if paths else None, rows, torch.cat(flows) if flows else None
