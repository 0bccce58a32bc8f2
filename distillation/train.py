"""Trains a causal few-step student.

    python -m distillation.train --recipe demo --out runs/student              # one process
    torchrun --nproc-per-node 8 -m distillation.train --recipe wan_1_3b --out runs/student

Every field of a recipe is a flag (`--recipe NAME --help` lists them). A run that was stopped, killed or crashed goes
on from its last checkpoint when the same command is given again: every random number of update i follows from
(seed, i, clip), so nothing but weights and moments has to be kept. SIGTERM, SIGUSR1 and --seconds end a run after an
update, with a checkpoint, or after a file of trajectories.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from diagonal_sampler.captions import caption_of, load_caption_encoder
from diagonal_sampler.frames import TIME_FACTOR, pixel_frames
from diagonal_sampler.provenance import PROVENANCE_KEYS, Provenance
from diagonal_sampler.sampler import count_chunks, split_frames
from diagonal_sampler.schedule import levels_text, same_levels
from diagonal_sampler.wan_layout import WAN_CELL
from diagonal_sampler.weight_files import read_weight_shapes
from distillation import losses, run_folder, sprites
from distillation.common import Stopwatch, generator_at, keep_freed_memory, write_text
from distillation.demo_files import KEPT_NOISE, NOISE_KEY
from distillation.flow_fields import FlowFields
from distillation.networks import Role, build_networks, local, precision_of, whole
from distillation.prompts import PromptSet, batch_rows, read_prompts
from distillation.ranks import Ranks, any_rank, barrier, join_ranks, leave_ranks, mean_over_ranks, require_same
from distillation.recipes import RECIPES, Recipe, parse_field
from distillation.rollout import BatchNoise, Rollout, exit_steps, predict_x0, sample_seed, spread_sigma, stream
from distillation.samples import write_samples
from distillation.trajectories import ClipFolder, Unfinished, make_trajectories, schedule_sigmas

log = logging.getLogger("train")

SPRITE_CAPTIONS = "sprites"
CAPTION_COUNT = 4096
# A step of a clip's noise source beside the sampler's own: the noise under which a score is asked.
SCORE_STEP = -3
LOWEST_SIGMA = 0.02
"""Lowest noise level at which stage forcing asks for the flow."""
FLOW_ADAPTER_PREFIX = "flow_embedding."


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGUSR1 has come to this process meanwhile; a second one acts as it usually does."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for name in ("SIGTERM", "SIGUSR1"):
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------
# What is trained


class Ema:
    """Exponential moving average of the student's trained parameters, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, start: int) -> None:
        self.decay, self.start = decay, start
        self.parameters = parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, update: int) -> None:
        """After update `update`, counted from 0."""
        decay = self.decay if update >= self.start else 0.0
        for name, parameter in self.parameters.items():
            local(self.values[name]).lerp_(local(parameter), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in place of the parameters, for sampling."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            mine, theirs = local(self.values[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)


def rate_factor(recipe: Recipe, update: int) -> float:
    """What the learning rates are multiplied by in an update: linear warm-up, a plateau, linear cooldown to zero."""
    warm = min(1.0, (update + 1) / recipe.warmup) if recipe.warmup else 1.0
    cool = min(1.0, (recipe.updates - update) / recipe.cooldown) if recipe.cooldown else 1.0
    return warm * cool


class Learner:
    """Parameters, their AdamW and their learning rate."""

    def __init__(self, name: str, parameters: dict[str, nn.Parameter], rate: float, recipe: Recipe) -> None:
        self.name, self.parameters, self.rate, self.recipe = name, parameters, rate, recipe
        usual = [value for path, value in parameters.items() if not path.startswith(FLOW_ADAPTER_PREFIX)]
        flow = [value for path, value in parameters.items() if path.startswith(FLOW_ADAPTER_PREFIX)]
        # The adapter starts from zero in a network that is trained already: its rate is its own.
        rates = [(usual, rate), (flow, recipe.flow_learning_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": values, "peak": peak} for values, peak in rates if values],
            lr=rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            # One pass over weights and moments; the usual step makes a temporary copy of the second moments on a GPU.
            fused=True if all(value.is_cuda for value in parameters.values()) else None,
        )

    def step(self, update: int) -> float:
        """Clips, steps and clears the gradients; returns the gradient's norm.

        Raises:
            ValueError: a gradient that is not finite; no parameter has changed then.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.gradient_clip)
        value = float(whole(norm))
        if not math.isfinite(value):
            raise ValueError(f"update {update}: the gradient norm of {self.name} is {value}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(self.recipe, update)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps."""
        out: dict[str, Tensor] = {f"{self.name}/{name}": value.detach() for name, value in self.parameters.items()}
        moments = run_folder.optimizer_tensors(self.optimizer, self.parameters)
        return out | {f"{self.name}.{name}": value for name, value in moments.items()}


class Trainer:
    """One stage of a recipe: networks, optimisers, and the update."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: PromptSet,
        folder: Path,
        ranks: Ranks,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        """Reads networks and clips; makes the trajectories that are missing, as long as not `stops`.

        Raises:
            ValueError: as `build_networks`, `ClipFolder` and `FlowFields`.
            Unfinished: as `make_trajectories`.
        """
        self.recipe, self.prompts, self.folder, self.ranks = recipe, prompts, folder, ranks
        self.accumulation = recipe.accumulation(ranks.count)
        self.stopwatch = Stopwatch(ranks.device)
        self.precision = precision_of(recipe, ranks.device)
        if prompts.text_dim != recipe.text_dim:
            raise ValueError(
                f"the prompts' embeddings have {prompts.text_dim} channels and text_dim is {recipe.text_dim}; embed "
                "them with the encoder of the teacher."
            )
        self.networks = build_networks(recipe, ranks.device, ranks.mesh)
        self.flows = None
        if recipe.flow_adapter:
            self.flows = FlowFields(
                recipe.flow_adapter, prompts.prompts, recipe.height, recipe.width, recipe.flow_dropout
            )
        # Guidance is against the negative prompt; without guidance there need not be one. Stage forcing guides samples.
        guides = recipe.cfg != 1 and (recipe.stage != "forcing" or prompts.negative_row is not None)
        self.negative = prompts.negative.to(ranks.device) if guides else None
        self.student = Learner("student", self.networks.student.parameters(), recipe.learning_rate, recipe)
        self.learners = [self.student]
        self.heads: tuple[losses.MotionHead, losses.MotionHead] | None = None
        self.head: Learner | None = None
        if recipe.distils:
            rate = recipe.fake_score_learning_rate
            self.fake_score = Learner("fake_score", self.networks.fake_score.parameters(), rate, recipe)
            self.learners.append(self.fake_score)
            if recipe.motion_form == "head" and recipe.motion_weight:
                self.heads = self._motion_heads()
                if recipe.motion_regression:  # without a regression term its features stay as they are: random
                    parameters = dict(self.heads[0].named_parameters())
                    self.head = Learner("motion_head", parameters, recipe.motion_head_learning_rate, recipe)
                    self.learners.append(self.head)
                else:
                    self.heads[0].requires_grad_(False)
        else:
            self.clips = self._clips(stops)
        self.ema = Ema(self.student.parameters, recipe.ema_decay, recipe.ema_start)

    def _motion_heads(self) -> tuple[losses.MotionHead, losses.MotionHead]:
        """The motion head, the same on every rank, and its averaged copy."""
        channels = self.recipe.model.in_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            head = losses.MotionHead(channels=channels).to(self.ranks.device)
        teacher_head = losses.MotionHead(channels=channels).to(self.ranks.device)
        teacher_head.load_state_dict(head.state_dict())
        return head, teacher_head.requires_grad_(False)

    def _clips(self, stops: Callable[[], bool]) -> ClipFolder:
        recipe = self.recipe
        folder = run_folder.clips_folder(self.folder, recipe)
        if recipe.stage == "ode":
            assert self.networks.teacher is not None
            with self.networks.teacher.active() as teacher:
                make_trajectories(
                    recipe,
                    folder,
                    teacher,
                    self.prompts,
                    self.negative,
                    self.ranks.device,
                    self.precision,
                    flows=self.flows,
                    rank=self.ranks.rank,
                    ranks=self.ranks.count,
                    report=lambda done, total: log.info("trajectories: %d of %d files", done, total),
                    stops=stops,
                )
        clips = ClipFolder(folder, recipe, with_trajectory=recipe.stage == "ode", prompts=len(self.prompts))
        if clips.undated and self.ranks.main:
            text = "%d files in %s do not say what teacher and prompts held; they are taken for the same"
            log.warning(text, clips.undated, folder)
        require_same("clips", (len(clips), clips.rows[0], clips.rows[-1]))
        return clips

    def tensors(self) -> dict[str, Tensor]:
        """The state of the run: what a checkpoint writes and a resumed run reads in place."""
        out: dict[str, Tensor] = {}
        for learner in self.learners:
            out |= learner.tensors()
        out |= {f"ema/{name}": value for name, value in self.ema.values.items()}
        if self.head is not None and self.heads is not None:
            out |= {f"motion_head_ema/{name}": value for name, value in self.heads[1].state_dict().items()}
        return out

    # -----------------------------------------------------------------------------------------------------------
    # Batches. Clip g of a global batch has its own seed, so ranks and micro-batches change nothing but rounding.

    def places(self, part: int) -> range:
        """Places in the global batch of this rank's micro-batch `part`."""
        size = self.recipe.micro_batch
        first = (self.ranks.rank * self.accumulation + part) * size
        return range(first, first + size)

    def seeds(self, update: int, role: str, part: int) -> list[int]:
        return [sample_seed(self.recipe.seed, update, role, place) for place in self.places(part)]

    def noise(self, seeds: Sequence[int]) -> BatchNoise:
        recipe = self.recipe
        shape = (recipe.model.in_channels, recipe.height, recipe.width)
        return BatchNoise(seeds, shape, self.ranks.device)

    def prompt_rows(self, update: int, turn: int, part: int) -> list[int]:
        """Prompts of a micro-batch. `turn` counts the rollouts of an update, so that prompts differ."""
        turns = update * (self.recipe.fake_score_updates + 1) + turn
        rows = batch_rows(self.recipe.seed, turns, self.recipe.batch, len(self.prompts))
        return [rows[place] for place in self.places(part)]

    def rollout(self, update: int, turn: int, role: str, part: int) -> tuple[Rollout, list[int]]:
        recipe = self.recipe
        frames = recipe.frames
        if recipe.stage == "long":  # whole chunks; the window that is trained on is the rollout's end
            longest = (recipe.rollout_frames - recipe.frames) // recipe.frames_per_chunk
            generator = generator_at(recipe.seed, update, turn, 11)
            drawn = int(torch.randint(longest + 1, (), generator=generator))  # one length for all ranks
            if float(torch.rand((), generator=generator)) >= recipe.opening_share:
                frames += drawn * recipe.frames_per_chunk
        draw = torch.rand((), generator=generator_at(recipe.seed, update, turn, 17))  # the same on all ranks
        given_frames = recipe.frames_per_chunk if float(draw) < recipe.given_share else 0
        chunks = count_chunks(frames, recipe.frames_per_chunk)
        frames += given_frames
        seeds, rows = self.seeds(update, role, part), self.prompt_rows(update, turn, part)
        flow = None if self.flows is None else self.flows.features(rows, seeds, frames).to(self.ranks.device)
        context = self.prompts.embeddings(rows).to(self.ranks.device)
        given = self._opening(update, role, part, context, flow) if given_frames else None
        rollout = Rollout(
            schedule=recipe.schedule,
            settings=recipe.settings,
            frames=frames,
            noise=self.noise(seeds),
            context=context,
            exits=exit_steps(
                recipe.schedule, chunks, sample_seed(recipe.seed, update, role, "exit"), last=recipe.exit == "last"
            ),
            first_frame=frames - recipe.frames,
            last_frame=frames,
            precision=self.precision,
            sink_frames=recipe.sink if recipe.score_sink and frames - recipe.frames >= recipe.sink else 0,
            optical_flow=flow,
            given=given,
        )
        return rollout, seeds

    def _opening(self, update: int, role: str, part: int, context: Tensor, optical_flow: Tensor | None) -> Tensor:
        """The first chunk of another clip of the student's, as finished as at inference: frames to go on from."""
        recipe = self.recipe
        noise = self.noise(self.seeds(update, f"{role} given", part))
        with self.networks.student.active() as student:
            chunks = stream(
                student,
                context,
                noise,
                recipe.schedule,
                recipe.settings,
                recipe.frames_per_chunk,
                precision=self.precision,
                optical_flow=optical_flow,
            )
            return torch.cat(list(chunks), dim=2)

    def under_noise(self, clip: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A clip at a random noise level each: x, sigma [B], noise."""
        recipe = self.recipe
        u = torch.stack([torch.rand((), generator=generator_at(seed, 13)) for seed in seeds])
        sigma = losses.draw_score_sigmas(u, shift=recipe.score_shift, low=recipe.score_low, high=recipe.score_high).to(
            clip.device
        )
        noise = self.noise(seeds)(0, SCORE_STEP, clip.shape[2])
        return torch.lerp(clip, noise, spread_sigma(sigma)), sigma, noise

    def score(
        self,
        role: Role | None,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        optical_flow: Tensor | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """x0 of the clip `x` at `sigma` [B] as teacher or fake score sees it, told of the same motion as the student.

        Args:
            sink: [B, C, sink, H, W] clean latents that lie before `x`, if it is no clip's beginning.
        """
        assert role is not None
        settings = self.recipe.settings if self.recipe.score_attention == "causal" else None
        given = 0 if sink is None else sink.shape[2]
        if sink is not None and given:
            sigma = torch.cat([torch.zeros_like(sink[:, 0, :, 0, 0]), sigma[:, None].expand(-1, x.shape[2])], dim=1)
            x = torch.cat([sink, x], dim=2)
        with role.active() as network:
            x0 = predict_x0(network, x, sigma, context, self.precision, settings=settings, optical_flow=optical_flow)
        return x0[:, :, given:]

    # -----------------------------------------------------------------------------------------------------------
    # Updates

    def update(self, update: int) -> dict[str, float]:
        """One update of the stage; returns what is logged.

        Raises:
            ValueError: a loss or gradient that is not finite.
        """
        found = self._distil(update) if self.recipe.distils else self._regress(update)
        self.ema.update(update)
        return found

    def _distil(self, update: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for turn in range(self.recipe.fake_score_updates):
            total = torch.zeros((), device=self.ranks.device)
            for part in range(self.accumulation):
                total += self._fake_score_backward(update, turn, part)
            found["fake_score"] = self._finite("fake_score", total, update)
            with self.stopwatch.part("fake_score_seconds"):
                found["fake_score_norm"] = self.fake_score.step(update)
        sums: dict[str, Tensor] = {}
        for part in range(self.accumulation):
            for name, value in self._student_backward(update, part).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        for name, value in sums.items():
            found[name] = self._finite(name, value, update)
        if self.head is not None:
            self._average_gradients(self.head)
            found["motion_head_norm"] = self.head.step(update)
        with self.stopwatch.part("student_seconds"):
            found["student_norm"] = self.student.step(update)
        if self.head is not None and self.heads is not None:
            losses.update_ema_head(self.heads[1], self.heads[0], self.recipe.ema_decay)
        return found

    def _average_gradients(self, learner: Learner) -> None:
        """For parameters that every rank holds whole."""
        if dist.is_initialized():
            for parameter in learner.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.ranks.count

    def _fake_score_backward(self, update: int, turn: int, part: int) -> Tensor:
        rollout, seeds, sink, clip = self._clip(update, turn, f"fake{turn}", part)
        x, sigma, noise = self.under_noise(clip, seeds)
        role = self.networks.fake_score
        assert role is not None
        with self.stopwatch.part("fake_score_seconds"), role.active():
            x0 = self.score(role, x, sigma, rollout.context, rollout.seen_flow, sink)
            loss = losses.fake_score_loss((x - x0) / spread_sigma(sigma), noise, clip) / self.accumulation
            loss.backward()
        return loss.detach()

    def _clip(self, update: int, turn: int, role: str, part: int) -> tuple[Rollout, list[int], Tensor, Tensor]:
        """A rollout and its clips' seeds, the finished sink that its scores see, and the clip."""
        with self.stopwatch.part("rollout_seconds"):
            rollout, seeds = self.rollout(update, turn, role, part)
            with self.networks.student.active() as student:
                sink, clip = rollout.clip(student)
        return rollout, seeds, sink, clip

    def _student_backward(self, update: int, part: int) -> dict[str, Tensor]:
        rollout, seeds, sink, clip = self._clip(update, self.recipe.fake_score_updates, "student", part)
        with self.stopwatch.part("student_seconds"):
            return self._student_losses(rollout, seeds, sink, clip)

    def _student_losses(self, rollout: Rollout, seeds: list[int], sink: Tensor, clip: Tensor) -> dict[str, Tensor]:
        recipe = self.recipe
        x, sigma, _ = self.under_noise(clip, seeds)
        flow = rollout.seen_flow
        with torch.no_grad():
            fake = self.score(self.networks.fake_score, x, sigma, rollout.context, flow, sink)
            real = self.score(self.networks.teacher, x, sigma, rollout.context, flow, sink)
            if self.negative is not None:
                negative = self.negative.expand(len(seeds), -1, -1)
                unguided = self.score(self.networks.teacher, x, sigma, negative, flow, sink)
                guided = losses.guided(real, unguided, recipe.cfg)
                real = torch.where(spread_sigma(sigma) <= recipe.cfg_high, guided, real)
        clip.requires_grad_()
        # The chunk after a gap cannot be known from the sink, and a teacher takes it for the next one. Without a sink
        # in view it takes a later chunk for a video's first, whose first latent frame is of one pixel frame.
        begins = rollout.first_frame == rollout.sink_frames
        known = slice(0 if begins else recipe.frames_per_chunk, None)
        seen, real, fake = clip[:, :, known], real[:, :, known], fake[:, :, known]
        terms = {"dmd": recipe.dmd_weight * losses.dmd_loss(seen, real, fake)}
        if recipe.regression_weight:
            terms["regression"] = recipe.regression_weight * (seen - real).square().mean()
        if recipe.motion_weight and self.heads is not None:
            motion = losses.motion_head_losses(seen, real, fake, *self.heads)
            terms["motion"] = recipe.motion_weight * recipe.motion_scale * motion.dmd
            terms["motion_regression"] = recipe.motion_weight * recipe.motion_regression * motion.regression
        elif recipe.motion_weight:
            terms["motion"] = recipe.motion_weight * recipe.motion_scale * losses.motion_loss(seen, real, fake)
        (sum(terms.values(), torch.zeros((), device=clip.device)) / self.accumulation).backward()
        assert clip.grad is not None
        with self.networks.student.active() as student:
            rollout.backward(student, clip.grad)
        return {name: value.detach() / self.accumulation for name, value in terms.items()}

    def _regress(self, update: int) -> dict[str, float]:
        """Stages ode and forcing: one causal forward over a clip with a noise level per chunk."""
        recipe = self.recipe
        total = torch.zeros((), device=self.ranks.device)
        for part in range(self.accumulation):
            rows = batch_rows(recipe.seed, update, recipe.batch, len(self.clips))
            clean, paths, prompt_rows, flow = self.clips.take([rows[place] for place in self.places(part)])
            seeds = self.seeds(update, "clip", part)
            draws = torch.stack([torch.rand(len(self._chunks) + 1, generator=generator_at(seed, 17)) for seed in seeds])
            clean = clean.to(self.ranks.device)
            context = self.prompts.embeddings(prompt_rows).to(self.ranks.device)
            weight = None
            if paths is None:
                own = losses.draw_score_sigmas(draws[:, 1:], shift=recipe.shift, low=LOWEST_SIGMA, high=1.0)
                behind = self._behind(draws[:, 0])
                # Finished chunks as the cache pass of its sampling leaves them; it asks for no prediction.
                sigma = self._over_frames(torch.where(behind, 0.0, own))
                weight = (~self._over_frames(behind)).float()
                x = torch.lerp(clean, self.noise(seeds)(0, SCORE_STEP, recipe.frames), spread_sigma(sigma))
            else:
                sigma, x, behind = self._on_trajectory(paths, draws)
                if (level := recipe.schedule.cache_pass_sigma) is not None:
                    # Finished chunks as the cache pass leaves them; it asks for no prediction.
                    noise = self.noise(seeds)(0, SCORE_STEP, recipe.frames)
                    x = torch.where(behind[:, None, :, None, None], torch.lerp(clean, noise, level), x)
                    sigma = torch.where(behind, level, sigma)
                    weight = (~behind).float()
            role = self.networks.student
            with role.active() as student:
                x0 = predict_x0(
                    student,
                    x,
                    sigma,
                    context,
                    self.precision,
                    settings=recipe.settings,
                    optical_flow=None if flow is None else flow.to(self.ranks.device),
                )
                if paths is None:
                    # Flow matching: both flows lead away from the same x, so they differ as the x0 do, over sigma.
                    error = (x0 - clean) / spread_sigma(sigma.clamp(min=LOWEST_SIGMA))
                    loss = (error.square() * spread_sigma(weight)).mean()
                else:
                    loss = losses.ode_regression_loss(x0, clean, weight)
                    if weight is not None:  # a mean over all frames, whatever the micro-batch
                        loss = loss * weight.mean()
                (loss / self.accumulation).backward()
            total += loss.detach() / self.accumulation
        value = self._finite(recipe.stage, total, update)
        return {recipe.stage: value, "student_norm": self.student.step(update)}

    @property
    def _chunks(self) -> list[int]:
        return split_frames(self.recipe.frames, self.recipe.frames_per_chunk)

    def _over_frames(self, per_chunk: Tensor) -> Tensor:
        """[B, chunks] -> [B, T]."""
        counts = torch.tensor(self._chunks)
        return per_chunk.repeat_interleave(counts, dim=1).to(self.ranks.device)

    def _behind(self, draws: Tensor) -> Tensor:
        """Which chunks are finished context, [B, chunks] bool: in half the clips those before a random one.

        Args:
            draws: [B] uniform numbers in [0, 1).
        """
        count = len(self._chunks)
        finished = torch.where(draws < 0.5, (2 * draws * count).floor(), 0.0)
        return torch.arange(count) < finished[:, None]

    def _on_trajectory(self, paths: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each chunk at a random step of its own schedule, from the teacher's trajectory.

        Half the clips have context as at inference: finished chunks are at their last step.

        Returns:
            sigma [B, T], x [B, C, T, H, W], and which frames are such context, [B, T] bool.
        """
        known = schedule_sigmas(self.recipe)
        schedule = self.recipe.schedule
        behind, draws = self._behind(draws[:, 0]), draws[:, 1:]
        index = torch.zeros(draws.shape, dtype=torch.int64)
        for chunk in range(draws.shape[1]):
            row = schedule.chunk_sigmas(chunk)
            places = torch.tensor([min(range(len(known)), key=lambda k: abs(known[k] - sigma)) for sigma in row])
            index[:, chunk] = places[(draws[:, chunk] * len(row)).long()]
            index[:, chunk] = torch.where(behind[:, chunk], places[-1], index[:, chunk])
        sigma = self._over_frames(torch.tensor(known)[index])
        frames = index.repeat_interleave(torch.tensor(self._chunks), dim=1)
        gather = frames[:, None, None, :, None, None].expand(-1, -1, *(paths.shape[2], -1, *paths.shape[4:]))
        return sigma, paths.gather(1, gather)[:, 0].to(self.ranks.device), self._over_frames(behind)

    def _finite(self, name: str, value: Tensor, update: int) -> float:
        mean = mean_over_ranks(value)
        if not math.isfinite(mean):
            raise ValueError(f"update {update}: the {name} loss is {mean}")
        return mean

    # -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, list[str]]:
        """Clips of the averaged student for the first prompts, [N, C, T, H, W], made as at inference.

        Those of stage forcing are guided, if the prompts have a negative.
        """
        recipe = self.recipe
        frames = recipe.rollout_frames if recipe.stage == "long" else recipe.frames
        rows = list(range(min(count, len(self.prompts))))
        clips = []
        with self.ema.in_place(), self.networks.student.active() as student:
            for first in range(0, len(rows), recipe.micro_batch):
                part = rows[first : first + recipe.micro_batch]
                chunks = stream(
                    student,
                    self.prompts.embeddings(part).to(self.ranks.device),
                    self.noise([sample_seed(recipe.seed, "sample", row) for row in part]),
                    recipe.inference_schedule,
                    recipe.settings,
                    frames,
                    precision=self.precision,
                    cfg=recipe.sample_cfg if self.negative is not None else 1.0,
                    negative=self.negative,
                )
                clips.append(torch.cat([chunk.cpu() for chunk in chunks], dim=2))
        return torch.cat(clips), [self.prompts.prompts[row] for row in rows]


# ---------------------------------------------------------------------------------------------------------------
# A run


def read_all_prompts(recipe: Recipe, folder: Path, ranks: Ranks) -> PromptSet:
    """The recipe's prompts; `sprites` stands for captions of the demo world, which are written into the run."""
    encode = load_caption_encoder(recipe.text_encoder).encode if recipe.text_encoder else None

    path = Path(recipe.prompts)
    if recipe.prompts == SPRITE_CAPTIONS:
        path = folder / run_folder.SPRITE_PROMPTS
        if ranks.main and not path.exists():
            scenes = (sprites.sample_specs(_numpy_generator(recipe.seed, row)) for row in range(CAPTION_COUNT))
            write_text(path, "".join(f"{caption_of(specs)}\n" for specs in scenes))
        barrier()
    return read_prompts(path, encode=encode)


def _numpy_generator(seed: int, row: int):
    import numpy as np

    return np.random.default_rng([seed & 0xFFFFFFFF, row, 0xCA9])


def tensorboard(folder: Path, first: int) -> Any:
    """A SummaryWriter, or None where TensorBoard is not installed. Updates from `first` on will come again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard here (pip install tensorboard); %s/log.jsonl has every number", folder)
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first)


def run(recipe: Recipe, folder: Path, ranks: Ranks, *, time_is_up: Callable[[], bool] | None = None) -> None:
    """Trains to the recipe's last update, from the run's last checkpoint if there is one.

    Args:
        time_is_up: asked after every update; True, on any rank, ends the run there as if that update were the recipe's
            last. So do SIGTERM and SIGUSR1, on any rank. Where trajectories are made, asked after each file, too.

    Raises:
        ValueError: bad input, or a loss that is not finite.
        OSError: a file that cannot be read or written.
    """
    if ranks.main:
        run_folder.settle_recipe(folder, recipe)
    barrier()
    prompts = read_all_prompts(recipe, folder, ranks)
    found = run_folder.checkpoints(folder)
    require_same("checkpoints", [update for update, _ in found[-1:]])
    first = found[-1][0] if found else 0
    if ranks.main and first < recipe.updates:
        for warning in doubts(recipe, ranks.device, prompts):
            log.warning("%s", warning)
    with stop_signals() as told_to_stop:

        def stops() -> bool:
            return any_rank(told_to_stop() or (time_is_up is not None and time_is_up()), ranks)

        try:
            trainer = Trainer(recipe, prompts, folder, ranks, stops)
        except Unfinished as stopped:
            log.info("%s", stopped)
            return
        if found:
            run_folder.load(found[-1][1], trainer.tensors())
            log.info("resumed %s", found[-1][1])
        if first >= recipe.updates:
            log.info("the run has %d updates already; set --updates higher to go on", first)
            return
        _run_updates(trainer, first, stops)


def _run_updates(trainer: Trainer, first: int, stops: Callable[[], bool]) -> None:
    """Updates from `first` on, until the recipe's last or the first after which `stops`."""
    recipe, folder, ranks = trainer.recipe, trainer.folder, trainer.ranks
    journal = run_folder.Log(folder, first) if ranks.main else None
    board = tensorboard(folder, first) if ranks.main and recipe.tensorboard else None
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[losses]}"), disable=not ranks.main)
    lines = ranks.main and not bar.console.is_terminal  # there the bar shows nothing before the end
    try:
        with bar:
            task = bar.add_task(f"{recipe.name} {recipe.stage}", total=recipe.updates, completed=first, losses="")
            for update in range(first, recipe.updates):
                started = time.perf_counter()
                values = trainer.update(update)
                seconds = _note_update(trainer, update, values, started, journal, board)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "norm" not in name)
                bar.update(task, advance=1, losses=shown)
                if lines:
                    log.info("update %d of %d, %.1f s: %s", update + 1, recipe.updates, seconds, shown)
                done = update + 1
                last = stops() or done == recipe.updates
                _keep_what_is_due(trainer, done, last=last)
                if last:
                    if done < recipe.updates:
                        log.info("stopped after update %d of %d, as it was told", done, recipe.updates)
                    break
    finally:
        if journal:
            journal.close()
        if board:
            board.close()


def _note_update(
    trainer: Trainer,
    update: int,
    values: dict[str, float],
    started: float,
    journal: run_folder.Log | None,
    board: Any,
) -> float:
    """Writes an update's values and times to log.jsonl and TensorBoard; the seconds since `started`."""
    parts, device = trainer.stopwatch.take(), trainer.ranks.device
    seconds = time.perf_counter() - started  # after `take`, which waits for the device
    peak = {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}
    entry = {**values, "seconds": seconds, **parts, **peak}
    if journal:
        journal.write({"update": update, **entry})
    if board:
        for name, value in entry.items():
            board.add_scalar(f"{trainer.recipe.stage}/{name}", value, update)
    return seconds


def _keep_what_is_due(trainer: Trainer, done: int, *, last: bool) -> None:
    """The checkpoint and the sample clips that are due after `done` updates, or after the last one."""
    recipe, folder = trainer.recipe, trainer.folder
    if recipe.save_every and (done % recipe.save_every == 0 or last):
        run_folder.save(folder, done, trainer.tensors(), recipe.keep)
    if recipe.sample_every and recipe.sample_prompts and (done % recipe.sample_every == 0 or last):
        clips, captions = trainer.sample(recipe.sample_prompts)
        if trainer.ranks.main:
            try_samples(folder / "samples" / f"update_{done:06d}", clips, captions, recipe.autoencoder)


SMALLEST_WAN = 1536
"""Width of Wan 2.1 1.3B."""
LARGEST_LATENT, LONGEST_CLIP = 4 * 60 * 104, 2 * 21
"""Height times width, and frames: larger ones may be pixels. 1280x720 is 2.3 times 832x480."""


def doubts(recipe: Recipe, device: torch.device, prompts: PromptSet) -> Iterator[str]:
    """What a run may not have been meant to do."""
    if recipe.stage == "distill" and not recipe.student and recipe.score_attention == "bidirectional":
        yield (
            "no --student: the few-step student starts from a teacher that sees whole clips; the method starts from "
            "one made causal by stage ode or forcing"
        )
    if recipe.stage in ("ode", "distill", "long"):
        yield from recipe.schedule.warnings()
    yield from _otherwise_than_the_student(recipe)
    large = recipe.height * recipe.width > LARGEST_LATENT or recipe.frames > LONGEST_CLIP
    if large and recipe.dim >= SMALLEST_WAN:
        yield (
            f"--height {recipe.height}, --width {recipe.width} and --frames {recipe.frames} are of the latent: "
            f"{recipe.width * WAN_CELL}x{recipe.height * WAN_CELL} pixels, {pixel_frames(recipe.frames)} pixel frames; "
            f"give pixels / {WAN_CELL} and (pixel frames + 3) / {TIME_FACTOR}"
        )
    if device.type == "cpu" and recipe.dim >= SMALLEST_WAN:
        yield "torch finds no GPU here, and a network of Wan's size trains on CPUs for months"
    negative = prompts.negative_row
    guides = recipe.cfg != 1 and recipe.stage != "forcing" and recipe.dim >= SMALLEST_WAN
    if guides and negative is not None and len(negative) == 1:  # UMT5's end of text alone
        yield (
            "the negative prompt is empty: Wan, and the release, guide away from a long text (distillation/README.md, "
            "Prepare)"
        )
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device.type == "cuda" and here < there:
        yield f"{here} of this machine's {there} GPUs are used; torchrun --nproc-per-node {there} uses all"


def _otherwise_than_the_student(recipe: Recipe) -> Iterator[str]:
    """What the stage does otherwise than --student's header says it was trained.

    Raises:
        ValueError: a file or a header that is not sound.
    """
    path = Path(recipe.student)
    if path.suffix != ".safetensors" or not path.is_file():
        return
    header = read_weight_shapes(path, wanted_metadata=(*PROVENANCE_KEYS, NOISE_KEY)).metadata
    trained = Provenance.from_metadata(header, path.name)
    found = trained.contradictions(frames_per_chunk=recipe.frames_per_chunk, window=recipe.window, sink=recipe.sink)
    # Stage forcing trains at every noise level, and what comes from it is made a few-step student by the next stage.
    if recipe.stage != "forcing" and header.get(NOISE_KEY) != KEPT_NOISE:
        schedule = recipe.schedule
        found += trained.contradictions(
            shift=schedule.shift,
            context_mode=schedule.context_mode,
            context_sigma=schedule.context_sigma if schedule.context_mode == "renoise" else None,
        )
        if trained.sigmas is not None and not same_levels(schedule.sigmas, trained.sigmas):
            levels, before = levels_text(schedule.sigmas), levels_text(trained.sigmas)
            found += (f"sigmas are {levels}, but the file was trained with {before}",)
    yield from (f"--student {path.name}: {sentence}; each stage needs these flags again" for sentence in found)


def try_samples(folder: Path, clips: Tensor, captions: list[str], autoencoder: str) -> None:
    """Writes sample clips; a disk that is full loses the sample, not the run."""
    try:
        write_samples(folder, clips, captions, autoencoder)
    except (OSError, SafetensorError) as error:
        log.warning("no sample clips in %s: %s", folder, error)


def parse_arguments(arguments: list[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe with the flags' changes; and `out`, the run's folder, `threads` of the CPU and `seconds`, or None.

    Raises:
        ValueError: a flag whose value does not fit its field.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, choices=tuple(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--seconds", type=float, help="end after the first update, or trajectories, ending later")
    chosen = parser.add_argument_group("fields of the recipe")
    for item in fields(Recipe):
        if item.name != "name":
            chosen.add_argument(f"--{item.name.replace('_', '-')}", metavar="VALUE", help=item.metadata["help"])
    options = parser.parse_args(arguments)
    changes = {
        item.name: parse_field(item.name, value)
        for item in fields(Recipe)
        if item.name != "name" and (value := getattr(options, item.name)) is not None
    }
    return replace(RECIPES[options.recipe](), **changes), options


def train(recipe: Recipe, folder: Path, seconds: float | None = None) -> None:
    """Runs a recipe's stage, alone or as one of torchrun's ranks, for about so many seconds. Raises as `run`."""
    began = time.monotonic()
    if recipe.stage == "teacher":
        train_teacher(recipe, folder, seconds)
        return
    ranks = join_ranks()
    if not ranks.main:
        logging.getLogger().setLevel(logging.WARNING)
    run(recipe, folder, ranks, time_is_up=lambda: seconds is not None and time.monotonic() - began > seconds)


def train_teacher(recipe: Recipe, folder: Path, seconds: float | None = None) -> None:
    """Trains the demo's teacher by distillation.train_demo, in one process.

    Args:
        seconds: of the DiT's training; None is all its updates.

    Raises:
        ValueError: another recipe than the demo's, a changed field of it, or several ranks.
    """
    if recipe.name != "demo":
        raise ValueError("stage teacher trains the demo's teacher; the other recipes take a published one.")
    usual = RECIPES[recipe.name](stage=recipe.stage)
    names = [item.name for item in fields(Recipe) if getattr(recipe, item.name) != getattr(usual, item.name)]
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(
            f"stage teacher has a recipe of its own, which {flags} would not change; leave that out, or see "
            "python -m distillation.train_demo --help."
        )
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"stage teacher trains in one process, and torchrun started {ranks}; run it without torchrun.")
    from distillation import train_demo

    limit = [] if seconds is None else ["--seconds", str(seconds)]
    train_demo.main(["--stage", "all", "--out", str(folder), "--threads", str(torch.get_num_threads()), *limit])


def last_checkpoint(folder: Path, *, again: bool) -> str:
    """The end of a message about a run that has stopped.

    Args:
        again: the same command would go on; else it would stop as it did.
    """
    found = run_folder.checkpoints(folder)
    if not found:
        return "there is no checkpoint yet"
    return f"{'the same command goes on from' if again else 'the last checkpoint is'} {found[-1][1]}"


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe; returns the exit status. A failure that is no defect of this program is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        recipe, options = parse_arguments(arguments)
    except ValueError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    status = 0
    try:
        train(recipe, options.out, options.seconds)
    except (ValueError, OSError, SafetensorError) as error:
        ending = last_checkpoint(options.out, again=isinstance(error, OSError))
        print(f"stopped: {str(error).rstrip('.')}; {ending}.", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; {last_checkpoint(options.out, again=True)}.", file=sys.stderr)
        status = 130
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        leave_ranks(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
