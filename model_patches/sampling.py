"""Samples a causal MODEL chunk by chunk through ComfyUI's own guider.

The guider loads the model, prepares the conditionings and applies guidance, hooks, wrappers and other packs' patches;
only the loop over chunks and steps is ours (`diagonal_sampler.sampler`). `sample_latent` gives the whole clip,
`stream_latent` gives it away chunk by chunk and keeps nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ..diagonal_sampler.cache import KVCache
from ..diagonal_sampler.joins import meet
from ..diagonal_sampler.noise import INITIAL_STEP, NoiseSource, SeededNoise, send
from ..diagonal_sampler.sampler import Chunk, Forward, count_forwards, count_recache, sample_chunks
from ..diagonal_sampler.schedule import (
    PRESETS,
    TABLE_STEP,
    DiagonalSchedule,
    Levels,
    levels_text,
    same_levels,
    same_steps,
    shift_sigma,
)
from .causal import RUN_KEY, WRAPPER_KEY, CausalRun, causal_settings, require_known_rotations
from .clip_plan import ClipPlan, memory_request, plan_clip
from .conditionings import check_conditionings, move_texts
from .context_frames import ContextFrames
from .flow_control import ADAPTER, FlowConditioning, FlowRun, load_for_chunk
from .loading import PROVENANCE_ATTACHMENT
from .pace import FiniteLook, Pace
from .prompts import NO_CUT, SCHEDULE_KEY, LivePrompt, PromptBox, PromptRun, schedule_of
from .vae_scale import on_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One forward done: `forwards` of `total`, in chunk `chunk` (from 0) of `chunks` at step `step` of `steps`."""

    forwards: int
    total: int
    chunk: int
    chunks: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedChunk:
    """Finished latent frames of a stream.

    Attributes:
        index: the chunk, counted from 0; CONTEXT for the given frames that the clip begins with.
        latents: [B, C, frames, H, W] in LATENT scale, on the model's device.
        cache: the run's KV cache, through this chunk (empty still at CONTEXT); valid during the call, and in on_stop.
        forwards: forwards of the clip so far.
        patcher: the MODEL that is sampling, which must stay loaded.
        history: with a prompt schedule, finished latents in the model's space by start_frame (see sample_chunks).
        live: prompts that the run was given so far.
        flow: FlowRun's snapshot, empty without optical flow.
        require_finite: raises ValueError if the latents are not finite; on a GPU it waits for them. The sampler does
            it by itself, on a GPU one forward later.
        cut: nothing of the clip before it is in it.
    """

    index: int
    latents: Tensor
    cache: KVCache
    forwards: int
    patcher: ModelPatcher
    history: Mapping[int, Tensor]
    live: tuple[LivePrompt, ...]
    flow: Mapping[str, Tensor]
    require_finite: Callable[[], None]
    cut: bool = False


LOADED_ATTACHMENT = "diagonal_loaded_settings"
"""Under this name a MODEL carries the CausalSettings that its loader gave it: what they contradict is said there."""
DOUBT_ATTACHMENT = "diagonal_doubt"
"""Under this name a MODEL carries a sentence that every run of it warns with: why it may not be causal."""

CONTEXT = -1
_OUTPUT_PATCHES = {"attn1_output_patch", "attn2_output_patch"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Where a stream goes on.

    Attributes:
        chunk: the first chunk to make, counted from 0.
        committed: latent frames before it, context included.
        load: gives the KVCache's snapshot there; called once, and what it gives is not kept.
        dropped, moved, begun: the KVCache's.
        load_history: gives StreamedChunk's history there.
        load_flow: gives StreamedChunk's flow there.
    """

    chunk: int
    committed: int
    load: Callable[[], Mapping[str, Tensor]]
    dropped: int = 0
    moved: int | None = None
    begun: int = 0
    load_history: Callable[[], Mapping[int, Tensor]] = dict
    load_flow: Callable[[], Mapping[str, Tensor]] = dict


def sample_latent(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    schedule: DiagonalSchedule,
    *,
    seed: int,
    cfg: float = 1.0,
    denoise: float = 1.0,
    noise: NoiseSource | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_chunk: Callable[[Chunk], None] | None = None,
    context: ContextFrames | None = None,
    optical_flow: FlowConditioning | None = None,
    prompts: PromptBox | None = None,
    finish: Callable[[], bool] | None = None,
    on_early_end: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Denoise a LATENT with a causal MODEL.

    Args:
        model: a causal MODEL; it is not changed.
        positive, negative: CONDITIONING; the negative is ignored at cfg 1, unless a node behind the MODEL uses it.
        latent: LATENT with samples [B, 16, T, H, W] and perhaps a noise_mask.
        schedule: noise levels per chunk and the context mode.
        seed: of the noise; the same seed gives the same noise on any device.
        cfg: guidance scale, 1 is off.
        denoise: in (0, 1]; below 1 every chunk starts from the latent at the schedule's noise level for it.
        noise: replaces the seeded noise.
        callback: ComfyUI's (step, denoised, x, total) after every forward, with the newest chunk alone.
        on_progress, on_chunk: called after every forward and every finished chunk (latents in the model's space).
        context: frames that the clip begins with (see plan_clip); they count in the latent's length.
        optical_flow: motion to follow; of strength 0 it is as none.
        prompts: where prompts come from while the run goes on, if the positive is a prompt schedule.
        finish: asked after every chunk but the last; the clip ends there where it says True.
        on_early_end: called if it did.

    Returns:
        a new LATENT, [B, 16, T, H, W]; where `finish` ended it, of the frames that were made.

    Raises:
        ValueError: an input that cannot be sampled, with the reason and the remedy.
    """
    samples = _as_the_models(model, latent)
    started = _started(schedule, denoise)
    empty = bool(torch.count_nonzero(samples) == 0)
    if denoise < 1 and empty:
        raise ValueError(
            f"denoise is {denoise} but the latent is empty: there is nothing to start from. Use denoise 1, or encode a "
            "video with VAE Encode."
        )
    plan = plan_clip(model, samples.shape, started, context)
    _warn(model, schedule, cfg)  # as it was set: `denoise` leaves steps out on purpose
    rows = _batch_rows(latent, plan)
    draws = noise if noise is not None else _seeded_noise(plan, seed, rows)
    run_model = _run_clone(model, positive, negative)
    flow_run, plan, draws = _flow_run(optical_flow, run_model, plan, draws, seed, denoise, rows)
    # ComfyUI's guider wants the clip's noise as one tensor: wrappers may look at it or change it.
    initial = torch.cat([draws(k, INITIAL_STEP, n) for k, n in enumerate(plan.made_frames)], dim=2).to(samples.device)
    initial = torch.cat([torch.zeros_like(samples[:, :, : plan.context_frames], dtype=initial.dtype), initial], dim=2)
    sampler = DiagonalSampler(
        plan,
        draws,
        starts_from_latent=not empty,
        on_progress=on_progress,
        on_chunk=on_chunk,
        flow_run=flow_run,
        prompts=prompts,
        finish=finish,
    )
    result = _run_guider(
        run_model,
        positive,
        negative,
        plan,
        sampler,
        initial,
        samples,
        seed=seed,
        cfg=cfg,
        mask=latent.get("noise_mask"),
        callback=callback,
    )
    out = {k: v for k, v in latent.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    out["samples"] = result[:, :, : sampler.frames].to(
        device=comfy.model_management.intermediate_device(), dtype=comfy.model_management.intermediate_dtype()
    )
    if sampler.frames < plan.shape[2]:
        if (mask := out.get("noise_mask")) is not None:
            out["noise_mask"] = _mask_until(mask, sampler.frames, plan.shape[2])
        if on_early_end is not None:
            on_early_end()
    return out


def _started(schedule: DiagonalSchedule, denoise: float) -> DiagonalSchedule:
    """The schedule of a clip that is made over a video.

    Raises:
        ValueError: `denoise` out of range.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}; it must be above 0 and at most 1.")
    return schedule if denoise == 1 else schedule.start_at(shift_sigma(denoise, schedule.shift))


def _as_the_models(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT, an empty one as ComfyUI makes it the model's own: channels, and sizes by their ratio.

    Without a ratio nothing tells the pixels that an empty latent of other channels is for (Wan 2.2's, Mochi's): that
    one is left as it is, for `plan_clip` to refuse.

    Raises:
        ValueError: a latent of several streams.
    """
    given, ratio = latent["samples"], latent.get("downscale_ratio_spacial")
    if given.is_nested:
        raise ValueError("The latent holds several streams (video with audio); a causal Wan model makes video only.")
    if ratio is None and given.shape[1] != model.get_model_object("latent_format").latent_channels:
        return given
    samples = comfy.sample.fix_empty_latent_channels(model, given, ratio, latent.get("downscale_ratio_temporal"))
    if given.ndim == 4 and samples.ndim == 5 and samples.shape[2] == 1:
        log.warning(
            "The latent is an image's, of shape %s: it makes one frame. For a video use Empty AR Video Latent or "
            "EmptyHunyuanLatentVideo.",
            tuple(given.shape),
        )
    return samples


def _mask_until(mask: Tensor, frames: int, whole: int) -> Tensor:
    """The part of a LATENT's noise_mask that is of the first frames: [B, C, T, H, W], or [T, 1, H, W] as Set Latent
    Noise Mask makes it, which ComfyUI stretches over the clip."""
    axis = 2 if mask.ndim == 5 else 0
    if mask.shape[axis] == 1:
        return mask
    return mask.narrow(axis, 0, max(1, round(mask.shape[axis] * frames / whole)))


def _run_clone(model: ModelPatcher, positive: list, negative: list) -> ModelPatcher:
    """The run's own clone of the MODEL.

    With hooks in dynamic VRAM ComfyUI's guider samples another one, around a network of its own that it keeps at the
    MODEL: taken here already, so that all that belongs to the run is of that network.
    """
    if model.is_dynamic() and any(comfy.sampler_helpers.cond_has_hooks(conds) for conds in (positive, negative)):
        return model.get_non_dynamic_delegate()
    return model.clone()


def _flow_run(
    optical_flow: FlowConditioning | None,
    run_model: ModelPatcher,
    plan: ClipPlan,
    draws: NoiseSource,
    seed: int,
    denoise: float = 1.0,
    rows: Sequence[int] | None = None,
) -> tuple[FlowRun | None, ClipPlan, NoiseSource]:
    """What optical flow makes of a run: its plan and noise; nothing where there is none, or one of strength 0."""
    if optical_flow is None or optical_flow.strength == 0:
        return None, plan, draws
    flow_run = FlowRun(
        optical_flow,
        run_model,
        plan.shape,
        plan.schedule,
        plan.made_frames,
        given_frames=plan.context_frames,
        denoise=denoise,
    )
    if optical_flow.timeline.rests:
        log.warning(
            "The optical flow tells the whole picture to rest, so that nothing in the video moves. Set pan_x, pan_y, "
            "zoom or rotation in Diagonal Flow Conditioning, or choose another source."
        )
    return flow_run, replace(plan, schedule=flow_run.schedule), flow_run.noise(draws, seed, rows)


def stream_latent(
    model: ModelPatcher,
    positive: list,
    negative: list,
    plan: ClipPlan,
    on_chunk: Callable[[StreamedChunk], None],
    *,
    seed: int,
    cfg: float = 1.0,
    resume: Resume | None = None,
    live: Sequence[LivePrompt] = (),
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    optical_flow: FlowConditioning | None = None,
    prompts: PromptBox | None = None,
    on_stop: Callable[[], None] | None = None,
    finish: Callable[[], bool] | None = None,
    source: Callable[[int, int], Tensor] | None = None,
    denoise: float = 1.0,
) -> bool:
    """Make a new clip and give each chunk away as it is finished: nothing here grows with the clip's length.

    Seed for seed the latents equal those of `sample_latent` on an empty latent, because noise is drawn per chunk and
    step there too. ComfyUI's guider, and wrappers around it, see noise and latent of one chunk, all zeros.

    Args:
        model: a causal MODEL; it is not changed.
        plan: from plan_clip; its shape is the whole clip's.
        on_chunk: gets the given context frames, if there are any, and then each chunk.
        resume: go on at a later chunk; what lies before it is not given again.
        live: prompts that earlier runs of this clip were given while they went on.
        on_stop: called when ComfyUI's Cancel, an error or `finish` ends the run, while the last chunk that was given
            away still is valid.
        source: gives latent frames of a video (the first one's number, how many), [1, C, n, H, W] in LATENT scale,
            which chunks begin with below `denoise` 1. It may load other models.
        denoise: as in sample_latent, for `source`.
        positive, negative, seed, cfg, callback, on_progress, optical_flow, prompts, finish: as in sample_latent.
            Progress counts on when resumed.

    Returns:
        whether it is the whole clip; not where `finish` ended it.

    Raises:
        ValueError: an input that cannot be sampled, with the reason and the remedy.
    """
    _warn(model, plan.schedule, cfg)
    if source is not None:
        plan = replace(plan, schedule=_started(plan.schedule, denoise))
    batch, channels, frames, height, width = plan.shape
    chunk = torch.zeros(batch, channels, min(frames, plan.settings.frames_per_chunk), height, width)
    run_model = _run_clone(model, positive, negative)
    flow_run, plan, draws = _flow_run(
        optical_flow, run_model, plan, _seeded_noise(plan, seed), seed, 1.0 if source is None else denoise
    )
    sampler = DiagonalSampler(
        plan,
        draws,
        source=source,
        on_progress=on_progress,
        stream=on_chunk,
        resume=resume,
        live=live,
        flow_run=flow_run,
        prompts=prompts,
        on_stop=on_stop,
        finish=finish,
    )
    _run_guider(
        run_model, positive, negative, plan, sampler, chunk, chunk.clone(), seed=seed, cfg=cfg, callback=callback
    )
    return sampler.frames == plan.shape[2]


def _seeded_noise(plan: ClipPlan, seed: int, rows: Sequence[int] | None = None) -> SeededNoise:
    batch, channels, _, height, width = plan.shape
    return SeededNoise(seed, (batch, channels, height, width), rows=rows)


def _batch_rows(latent: dict[str, Any], plan: ClipPlan) -> list[int] | None:
    """Which samples of their batch these are, where a node between has said so (Latent From Batch)."""
    rows = latent.get("batch_index")
    if rows is not None and len(rows) != plan.shape[0]:
        log.warning(
            "The latent's batch_index names %d samples and it has %d; it is not used.", len(rows), plan.shape[0]
        )
        return None
    return rows


def _warn(model: ModelPatcher, schedule: DiagonalSchedule, cfg: float) -> None:
    doubt = model.get_attachment(DOUBT_ATTACHMENT)
    for warning in (*([doubt] if doubt else []), *schedule.warnings(), *_contradictions(model, schedule)):
        log.warning(warning)
    if _OUTPUT_PATCHES & model.model_options["transformer_options"].get("patches", {}).keys():
        log.warning(
            "The MODEL carries a patch of what attention gives (Normalized Attention Guidance or the like), which "
            "ComfyUI's Wan models do not look at: it changes nothing, and may cost a second forward. For Wan that "
            "guidance is a patch of cross-attention, as other packs have it."
        )
    guidance = model.model_options.get("sampler_cfg_function")
    if guidance is not None and math.isclose(cfg, 1.0):
        log.warning(
            "cfg is 1, but another node replaces guidance (%s), which ComfyUI asks at cfg 1 too. What such a node does "
            "in a video's first step (CFG-Zero with zero init) it does in the first step of every chunk. Remove that "
            "node if the video is wrong.",
            getattr(guidance, "__qualname__", type(guidance).__qualname__),
        )
    shift = getattr(model.get_model_object("model_sampling"), "shift", None)
    if "model_sampling" in model.object_patches and shift not in (None, schedule.shift):
        log.warning(
            "The MODEL's sampling has shift %g (ModelSamplingSD3 or the like), but noise levels come from the schedule "
            "alone, which was made with shift %g. Set shift in Diagonal Schedule.",
            shift,
            schedule.shift,
        )


def _run_guider(
    run_model: ModelPatcher,
    positive: list,
    negative: list,
    plan: ClipPlan,
    sampler: DiagonalSampler,
    noise: Tensor,
    latent_image: Tensor,
    *,
    seed: int,
    cfg: float,
    mask: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> Tensor:
    """Hand one run to ComfyUI's guider, with memory asked for one chunk and the KV window.

    Args:
        run_model: the run's own clone of the MODEL.
    """
    negative_used = negative if uses_negative(run_model, cfg) else []
    check_conditionings(run_model, positive, negative_used, *plan.shape[-2:])
    text_tokens = [context.shape[1] for context, _ in (*positive, *negative_used)]
    run_model.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING,
        "diagonal_memory",
        memory_request(plan, plan.cache_bytes(run_model, text_tokens)),
    )
    guider = comfy.samplers.CFGGuider(run_model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider.sample(
        noise,
        latent_image,
        sampler,
        torch.tensor([*plan.schedule.chunk_sigmas(0), 0.0]),
        denoise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def uses_negative(model: ModelPatcher, cfg: float) -> bool:
    """Whether ComfyUI's sampling_function predicts the negative; nodes such as NAG have it do so at cfg 1, too."""
    return not math.isclose(cfg, 1.0) or model.model_options.get("disable_cfg1_optimization", False)


def _contradictions(model: ModelPatcher, schedule: DiagonalSchedule) -> tuple[str, ...]:
    """What the schedule, and settings that are not the loader's, do otherwise than the checkpoint's header says it was
    trained."""
    provenance = model.get_attachment(PROVENANCE_ATTACHMENT)
    if provenance is None:
        return ()
    steps = tuple(len(row) for row in schedule.sigmas)
    trained, context = provenance.sigmas, provenance.context_sigma
    # The node's widget rounds it.
    same_context = context is None or abs(schedule.context_sigma - context) <= TABLE_STEP
    attention = _set_behind_the_loader(model)
    if schedule.frames_per_chunk is not None:
        attention["frames_per_chunk"] = schedule.frames_per_chunk
    found = provenance.contradictions(
        **attention,
        steps_per_chunk=None if trained is not None and _only_more_steps(schedule.sigmas, trained) else steps,
        shift=schedule.shift,
        context_mode=schedule.context_mode,
        context_sigma=None if same_context or schedule.context_mode != "renoise" else schedule.context_sigma,
    )
    # Other numbers of steps are said already, and where chunks begin below pure noise every level is lower on purpose.
    if trained is None or not same_steps(steps, tuple(map(len, trained))) or schedule.sigmas[0][0] != trained[0][0]:
        return found
    if same_levels(schedule.sigmas, trained):
        return found
    same = (name for name in PRESETS if same_levels(DiagonalSchedule.preset(name).sigmas, trained))
    preset = next((f" (preset {name!r})" for name in same), "")
    levels = f"sigmas are {levels_text(schedule.sigmas)}, but the file was trained with {levels_text(trained)}{preset}"
    return (*found, levels)


def _set_behind_the_loader(model: ModelPatcher) -> dict[str, int]:
    """frames_per_chunk, window and sink of a causal MODEL where they are not what its loader set."""
    now, loaded = causal_settings(model), model.get_attachment(LOADED_ATTACHMENT)
    found = {name: getattr(now, name) for name in ("frames_per_chunk", "window", "sink")}
    return {name: value for name, value in found.items() if loaded is None or value != getattr(loaded, name)}


def _only_more_steps(levels: Levels, trained: Levels) -> bool:
    """Whether every chunk has levels that some chunk was trained with, and no fewer than its own."""
    for chunk in range(max(len(levels), len(trained))):
        row, own = (table[min(chunk, len(table) - 1)] for table in (levels, trained))
        if len(row) < len(own) or not any(same_levels((row,), (other,)) for other in trained):
            return False
    return True


@dataclass(eq=False)
class DiagonalSampler(comfy.samplers.Sampler):
    """The loop over chunks as a ComfyUI sampler; one instance serves one run.

    With `stream` it collects nothing: noise and latent_image are then those of one chunk, the noise is drawn here
    chunk by chunk, and what `sample` returns means nothing.

    Args:
        starts_from_latent: the latent is a video that a schedule below sigma 1 may start from, not an empty one.
        source: with `stream`, in the latent's place; see stream_latent.

    Attributes:
        frames: latent frames of the clip that `sample` leaves, the whole plan's unless `finish` ended it earlier; what
            `sample` returns is zero behind them.
    """

    plan: ClipPlan
    noise: NoiseSource
    _: KW_ONLY
    starts_from_latent: bool = False
    source: Callable[[int, int], Tensor] | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_chunk: Callable[[Chunk], None] | None = None
    stream: Callable[[StreamedChunk], None] | None = None
    resume: Resume | None = None
    live: Sequence[LivePrompt] = ()
    flow_run: FlowRun | None = None
    prompts: PromptBox | None = None
    on_stop: Callable[[], None] | None = None
    finish: Callable[[], bool] | None = None
    frames: int = field(init=False)

    def __post_init__(self) -> None:
        self.frames = self.plan.shape[2]

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's contract: noise and latent_image [B, C, T, H, W] in the model's space; returns the same shape."""
        plan, streaming = self.plan, self.stream is not None
        run = _SamplingRun(self, model_wrap, extra_args, callback, noise, latent_image, denoise_mask)
        output = torch.zeros_like(noise)
        try:
            run.begin()
            if run.context is not None and not streaming:
                output[:, :, : run.context.shape[2]] = run.context
            if run.context is not None and streaming and self.resume is None:
                run.give(CONTEXT, run.context)
            for chunk in sample_chunks(
                run.denoise,
                run.draw,
                plan.schedule,
                run.cache,
                frames=plan.shape[2],
                frames_per_chunk=plan.settings.frames_per_chunk,
                context=run.context,
                source=run.source,
                first_chunk=run.first_chunk,
                recache=None if run.prompt_run is None else run.recache,
                history=run.history,
                schedule_row=run.schedule_row,
                cut=run.cut,
            ):
                run.finished(chunk)
                end = chunk.start_frame + chunk.latents.shape[2]
                if streaming:
                    run.give(chunk.index, chunk.latents)
                else:
                    output[:, :, chunk.start_frame : end] = chunk.latents
                    if self.on_chunk is not None:
                        self.on_chunk(chunk)
                if self.finish is not None and end < plan.shape[2] and self.finish():
                    self.frames = end
                    if self.on_stop is not None:
                        self.on_stop()
                    break
            run.finite.settle()
        except (Exception, comfy.model_management.InterruptProcessingException):
            if self.on_stop is not None:
                self.on_stop()
            raise
        finally:
            run.free()
        return output


class _SamplingRun:
    """One run of a DiagonalSampler: what its forwards share, from `begin` to `free`.

    Args:
        sampler: whose run it is.
        model_wrap, extra_args, callback, noise, latent_image, denoise_mask: what ComfyUI gives to the sampler.

    Attributes:
        cache: keys and values of the clip.
        context: the given frames in the model's space, None without any; from `begin` on.
        history: with prompts that change, finished latents by start_frame (see sample_chunks).
        prompt_run: what changes the positive prompt over time; None where it is one prompt, and nothing is done then.
        done: forwards of the clip so far.
        finite: looks at finished chunks.

    Raises:
        ValueError: a model whose rotations are not known, where the cache moves its keys.
    """

    def __init__(
        self,
        sampler: DiagonalSampler,
        model_wrap,
        extra_args: dict[str, Any],
        callback,
        noise: Tensor,
        latent_image: Tensor | None,
        denoise_mask: Tensor | None,
    ) -> None:
        plan, model = sampler.plan, model_wrap.inner_model
        self.sampler, self.plan, self.flow_run = sampler, plan, sampler.flow_run
        self.model_wrap, self.callback, self.seed = model_wrap, callback, extra_args.get("seed")
        self.noise, self.latent_image, self.denoise_mask = noise, latent_image, denoise_mask
        self.options = extra_args["model_options"]
        self.transformer_options = self.options["transformer_options"]
        scale = (self.transformer_options.get("rope_options") or {}).get("scale_t", 1.0)
        self.cache = KVCache(plan.settings, plan.shape[2], time_scale=scale)
        if self.cache.moves:
            require_known_rotations(model.diffusion_model)
        fixed = "registered_hooks" not in self.options and not _wraps_forwards(self.options)
        self.causal = CausalRun(self.cache, batch=plan.shape[0], fixed_weights=fixed)
        self.blocks = len(model.diffusion_model.blocks)
        self.context: Tensor | None = None
        self.history: dict[int, Tensor] = {}
        self._without_window = False  # resumed in a chunk that was cut, or whose window was being written again
        self.prompt_run: PromptRun | None = None
        self.done, self._forwards = 0, plan.forwards
        self.pace, self.finite = Pace(noise.device), FiniteLook(plan.chunks)
        # Made before the loop: a copy to the device would wait for it in every forward.
        rows = set(plan.schedule.sigmas[: plan.chunks])
        self._levels = {row: torch.tensor([*row, 0.0], device=noise.device) for row in rows}
        self._latent_format = on_device(model.latent_format, noise.device)
        self._level: Tensor | None = None  # that the first chunk is to begin at
        self._chunk = 0  # that is being made
        self._steps: list[tuple[Forward, Tensor]] = []  # of this chunk, looked at only if its result is not finite

    def begin(self) -> None:
        """Take what the run goes on from: the given frames, an earlier run's cache and latents, its prompts."""
        resume, device = self.sampler.resume, self.noise.device
        self.transformer_options[RUN_KEY] = self.causal
        move_texts(self.model_wrap, device)
        given = self.plan.given
        if given is not None:
            self.context = self._into_run(given.latent)
        if given is not None and self.denoise_mask is None:
            frame = given.latent[:, :, -1:] if given.latent.shape[2] > 1 else given.still
            self._level = None if frame is None else self._into_run(frame)
        if self.flow_run is not None and resume is not None:
            self.flow_run.restore(resume.load_flow(), device)
        elif self.flow_run is not None and self.context is not None:
            self.flow_run.finished(self.context)
        if resume is not None:
            self._restore(resume)
        self._reload = _reloading(self.model_wrap.model_patcher, self.plan)
        self.prompt_run = self._prompt_run()
        if self.prompt_run is not None and resume is not None:
            self.done += self.prompt_run.forwards_before(resume.chunk)
            if (cut := self.prompt_run.last_cut(resume.chunk)) is not None:
                self.cache.origin = self.plan.context_frames + cut * self.plan.settings.frames_per_chunk

    def _into_run(self, latent: Tensor) -> Tensor:
        """A latent in LATENT scale, in the model's space, for each sample of the batch."""
        latent = comfy.utils.repeat_to_batch_size(latent.to(self.noise), self.noise.shape[0])
        return self.model_wrap.inner_model.process_latent_in(latent)

    def _restore(self, resume: Resume) -> None:
        plan, device = self.plan, self.noise.device
        snapshot = resume.load()
        self._without_window = not snapshot
        self.cache.restore(
            resume.committed,
            snapshot,
            device,
            dropped=resume.dropped,
            moved=resume.moved,
            begun=resume.begun,
        )
        self.done = count_forwards(plan.schedule, resume.committed, plan.settings.frames_per_chunk, plan.context_frames)
        # Copies: what was read still is the state's file, which Windows then does not let be replaced.
        self.history = {start: x.to(device, copy=True) for start, x in resume.load_history().items()}

    def free(self) -> None:
        """Drop what the run held, also when it failed."""
        self.causal.free()
        if self.flow_run is not None:
            self.flow_run.free()
        self.transformer_options.pop(RUN_KEY, None)

    @property
    def first_chunk(self) -> int:
        """Where the run begins, counted from 0."""
        return 0 if self.sampler.resume is None else self.sampler.resume.chunk

    @property
    def source(self) -> Callable[[int, int], Tensor] | None:
        """What chunks below sigma 1 start from, None where there is nothing (see sample_chunks)."""
        if self.flow_run is not None and self.flow_run.starts_chunks:
            return self.flow_run.source
        if self.sampler.source is not None:
            return self._latent_of_source
        return self._latent_image_of if self.sampler.starts_from_latent else None

    def _latent_of_source(self, start: int, frames: int) -> Tensor:
        latent = self.sampler.source(start, frames)
        self._reload()
        return self._into_run(latent)

    def _latent_image_of(self, start: int, frames: int) -> Tensor:
        return self.latent_image[:, :, start : start + frames]

    def schedule_row(self, chunk: int) -> int:
        """The chunk whose steps chunk `chunk` takes."""
        return chunk if self.prompt_run is None else self.prompt_run.schedule_row(chunk)

    def recache(self, chunk: int) -> bool:
        """Whether the window of a chunk that begins is to be written again, under a new prompt."""
        self._chunk = chunk
        return self.prompt_run.begin(chunk)

    def cut(self, chunk: int) -> bool:
        """Whether a chunk that begins is to know nothing of what came before."""
        return self.prompt_run is not None and self.prompt_run.cuts(chunk)

    def draw(self, chunk: int, step: int, frames: int) -> Tensor:
        """The noise of one step of a chunk, [B, C, frames, H, W]."""
        if step == INITIAL_STEP and self.sampler.stream is None:
            start = self.plan.context_frames + chunk * self.plan.settings.frames_per_chunk
            return self.noise[:, :, start : start + frames]
        return send(self.sampler.noise(chunk, step, frames), self.noise.device).to(self.noise.dtype)

    def denoise(self, x: Tensor, at: Forward) -> Tensor:
        """One forward, through ComfyUI: x [B, C, frames, H, W] in the model's space -> its denoised."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.prompt_run is not None:
            self.prompt_run.listen()
        self.pace.wait()
        chunk_sigmas = self._levels[self.plan.schedule.chunk_sigmas(self.schedule_row(at.chunk))]
        self.transformer_options["sample_sigmas"] = chunk_sigmas
        model = comfy.samplers.KSamplerX0Inpaint(self.model_wrap, chunk_sigmas)
        mask = None
        # A forward that only fills the cache sees the finished frames as they are.
        if self.denoise_mask is not None and at.step >= 0:
            frames = slice(at.start_frame, at.start_frame + at.frames)
            mask = self.denoise_mask[:, :, frames]
            model.latent_image = self.latent_image[:, :, frames]
            model.noise = self.noise[:, :, frames]
        sigma = x.new_full((x.shape[0],), at.sigma)
        self.causal.begin_forward(at.sigma)
        if self.flow_run is not None:
            self.flow_run.before(at, x.device)
        denoised = model(x, sigma, mask, model_options=self.options, seed=self.seed)
        self.causal.end_forward(self.blocks, self.transformer_options.get("patches_replace", {}).get("dit", {}))
        self.pace.mark()
        self.finite.settle()
        if self.flow_run is not None:
            denoised = self.flow_run.after(denoised, at, mask)
        if self._level is not None and at.chunk == 0 and at.step >= 0:
            denoised = meet(denoised, self._level, still=self.plan.context_frames == 1)
        if at.step >= 0:
            self._steps.append((at, denoised))
        self._report(x, denoised, at)
        return denoised

    def _report(self, x: Tensor, denoised: Tensor, at: Forward) -> None:
        """Count a forward, and say so."""
        self.done += 1
        total = self._forwards + (0 if self.prompt_run is None else self.prompt_run.extra_forwards)
        if self.callback is not None:
            self.callback(self.done - 1, denoised, x, total)
        if self.sampler.on_progress is not None:
            self.sampler.on_progress(
                Progress(
                    forwards=self.done,
                    total=total,
                    chunk=max(at.chunk, self._chunk),  # a recache visits earlier chunks again
                    chunks=self.plan.chunks,
                    step=at.step,
                    steps=at.steps,
                )
            )

    def finished(self, chunk: Chunk) -> None:
        """Look at a finished chunk, and let the motion of the next one start from it."""
        self.finite.look(chunk, self._steps)
        self._steps = []
        if self.flow_run is not None:
            self.flow_run.finished(chunk.latents)

    def give(self, index: int, latents: Tensor) -> None:
        """Give finished latents in the model's space to the stream, in LATENT scale."""
        latents = self._latent_format.process_out(latents.to(torch.float32))
        self.sampler.stream(
            StreamedChunk(
                index=index,
                latents=latents.to(comfy.model_management.intermediate_dtype()),
                cache=self.cache,
                forwards=self.done,
                patcher=self.model_wrap.model_patcher,
                history=self.history,
                live=() if self.prompt_run is None else tuple(self.prompt_run.live),
                flow={} if self.flow_run is None else self.flow_run.snapshot(),
                require_finite=self.finite.settle,
                cut=index != CONTEXT and self.cut(index),
            )
        )

    def _prompt_run(self) -> PromptRun | None:
        # The functions made here must not hold this run, which holds what they are given to.
        plan, cache, causal, conds = self.plan, self.cache, self.causal, self.model_wrap.conds
        positive = conds["positive"]
        schedule = schedule_of([(cond.get("cross_attn"), cond) for cond in positive])
        if schedule is None:
            return None
        # Prompts of other lengths change the order of forwards: a snapshot's must not depend on it.
        for number, name in enumerate(("positive", "negative")):
            for cond in conds.get(name, ()):
                cache.condition((number, cond["uuid"]))
        text = next(cond for cond in positive if SCHEDULE_KEY in cond)["model_conds"]["c_crossattn"]
        # ComfyUI gives conditions with areas partners that share their text.
        sharing = [c for found in conds.values() for c in found if c["model_conds"].get("c_crossattn") is text]

        def set_context(context: Tensor) -> None:
            for cond in sharing:
                cond["model_conds"] = {**cond["model_conds"], "c_crossattn": type(text)(context.to(text.cond))}
            causal.forget_text()

        sizes = (plan.shape[2], plan.settings.frames_per_chunk)
        mode = None if self.flow_run is None else self.flow_run.mode
        return PromptRun(
            schedule,
            chunks=plan.chunks,
            frames_per_chunk=plan.settings.frames_per_chunk,
            context_frames=plan.context_frames,
            set_context=set_context,
            recache_forwards=lambda chunk, cut: count_recache(
                cache, plan.schedule, *sizes, chunk, plan.context_frames, cut
            ),
            # In mode reference each chunk has noise levels of its own, and in mode noise a step's noise is carried on.
            levels=plan.schedule if self.flow_run is None or self.flow_run.keeps_levels else None,
            refused_cut="" if mode in (None, ADAPTER) else NO_CUT.format(mode=mode),
            box=self.sampler.prompts,
            after_encoding=self._reload,
            first_chunk=self.first_chunk,
            first_has_begun=self._without_window,
            live=self.sampler.live,
        )


def _reloading(patcher: ModelPatcher, plan: ClipPlan) -> Callable[[], None]:
    """What loads a run's model again where another model, used between its forwards, has pushed some of it out."""
    loaded = patcher.loaded_size()

    def reload() -> None:
        resident = any(other is patcher for other in comfy.model_management.loaded_models())
        # In dynamic VRAM the size says nothing here: weights come with the first forward, and what was pushed out
        # stays out until the model is asked for.
        if not resident or patcher.is_dynamic() or patcher.loaded_size() < loaded:
            load_for_chunk(patcher, (*plan.shape[:2], plan.settings.frames_per_chunk, *plan.shape[3:]))

    return reload


def _wraps_forwards(options: dict[str, Any]) -> bool:
    """Whether another node is around each forward, where it may change text and noise level from those of the run."""
    kinds, wrappers = comfy.patcher_extension.WrappersMP, options["transformer_options"].get("wrappers", {})
    around = {key for key, found in wrappers.get(kinds.APPLY_MODEL, {}).items() if found}
    others = (wrappers.get(kind, {}) for kind in (kinds.PREDICT_NOISE, kinds.CALC_COND_BATCH, kinds.DIFFUSION_MODEL))
    return (
        bool(around - {WRAPPER_KEY, COMPILE_KEY})
        or any(any(found.values()) for found in others)
        or any(name in options for name in ("model_function_wrapper", "sampler_calc_cond_batch_function"))
    )
