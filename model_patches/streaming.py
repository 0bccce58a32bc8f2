"""Samples, decodes and writes a video chunk by chunk, in memory that does not depend on its length, and resumes it.

The caller's thread samples and decodes; another one waits for decoded chunks and writes them, so that with the VAE on a
GPU the decoding of a chunk, and everywhere its encoding, goes on beside the sampling of the next one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import Input, InputImpl
from torch import Tensor

from ..diagonal_sampler.disk import remove_file, replace_file
from ..diagonal_sampler.flow import stored
from ..diagonal_sampler.frames import nearest_sizes
from ..diagonal_sampler.schedule import DiagonalSchedule
from .clip_plan import ClipPlan, plan_clip
from .context_frames import CONTEXT_LATENT_FRAMES, ContextFrames, encode_context
from .flow_control import SETTINGS as FLOW_SETTINGS
from .flow_control import FlowConditioning
from .loading import FLOW_ADAPTER_ATTACHMENT
from .png_video import PngVideo
from .prompts import ROWS_SUFFIX, LivePrompt, PromptBox, save_rows, schedule_of, schedule_rows
from .sampling import CONTEXT, Progress, StreamedChunk, stream_latent, uses_negative
from .stream_decode import StreamDecoder, stream_decoder
from .stream_files import (
    DECODER,
    FLOW,
    HISTORY,
    KEYS_VALUES,
    TAIL,
    TAIL_FRAMES,
    Identity,
    Opened,
    Place,
    StreamOptions,
    VideoOpener,
    for_people,
    name_and_size,
    remove_empty,
)
from .stream_state import (
    DONE_SUFFIX,
    PROMPTS_SUFFIX,
    STATE_SUFFIX,
    StreamState,
    digest_of,
    digest_of_whole,
    graph_digest,
    lacks,
    load_tensors,
    mark_ended,
    save_prompts,
    save_state,
)
from .vae_scale import require_fitting
from .video_containers import VideoSpec, VideoWriteError
from .video_source import VideoSource
from .video_writer import Mark
from .writing_thread import StreamProgress, WritingThread

log = logging.getLogger(__name__)

GRAPH_INPUTS = ("model", "positive", "negative", "vae", "schedule", "context", "optical_flow", "video")
"""The inputs whose nodes decide the result, where they are used; all others are in StreamOptions."""
QUICK_SAVE_S = 1.0
SAVE_REST = 10
"""A state that took longer than QUICK_SAVE_S is followed by no other for SAVE_REST times as long: a fast GPU would else
wait for each of them about as long as it samples between two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """A finished video.

    Attributes:
        path: the file, or the folder of PNG images.
        subfolder: of ComfyUI's output folder that it lies in.
        video: as ComfyUI's VIDEO.
        context: its last frames, as Diagonal Context Frames makes them.
        message: what was done, for people.
        whole: it has all frames that were asked for; not where `finish` ended it.
    """

    path: Path
    subfolder: str
    video: Input.Video
    context: ContextFrames
    message: str
    whole: bool


def stream_video(
    model: ModelPatcher,
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    schedule: DiagonalSchedule,
    options: StreamOptions,
    *,
    context: ContextFrames | None = None,
    optical_flow: FlowConditioning | None = None,
    metadata: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
    node_id: str | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_frames: Callable[[StreamProgress], None] | None = None,
    announce: Callable[[str], None] | None = None,
    prompts: PromptBox | None = None,
    finish: Callable[[], bool] | None = None,
    video: Input.Video | None = None,
    denoise: float = 1.0,
) -> StreamResult:
    """Make a video, or go on with the one that the same graph left unfinished.

    Args:
        model, positive, negative, schedule, callback, on_progress, prompts: as in sampling.sample_latent. Prompts
            that came while it ran are in the state.
        vae: decodes; it also encodes the last frames for `context`.
        context: frames that the video begins with (see clip_plan.plan_clip); they count in its length, whether the
            file has them or not.
        optical_flow: motion to follow, counted from the video's first frame; what is shorter than the video leaves its
            rest free, except a single step, which is held.
        metadata: what the file carries, by name.
        prompt, node_id: ComfyUI's API graph and our place in it; they are part of what a state belongs to.
        on_frames: called, in another thread, when frames have become watchable.
        announce: gets one line when the run begins.
        finish: asked after every chunk but the last; where it says True the video ends there, and its state stays as
            after a Cancel, so that the same graph goes on with it.
        video: another that this one is made over, frame for frame from the beginning, given frames included; its end
            ends this one.
        denoise: in (0, 1], how much of it is made anew; no effect without it.

    Raises:
        ValueError: an input that cannot be used, with the reason and the remedy.
        VideoWriteError: ffmpeg or the disk failed; what was made is kept.
    """
    source, notes = None, []
    if video is not None:
        require_fitting(vae, model.get_model_object("latent_format"))
        source = VideoSource(video, vae, width=options.width, height=options.height, rate=options.rate)
        options, notes = _no_longer(options, source)
    plan = _plan(model, schedule, options, context)
    _warn_about_rate(positive, options)
    spec = VideoSpec(
        width=options.width, height=options.height, rate=options.rate, crf=options.crf, metadata=metadata or {}
    )
    identity = _identity(
        model,
        positive,
        negative,
        vae,
        schedule,
        options,
        plan=plan,
        optical_flow=optical_flow,
        prompt=prompt,
        node_id=node_id,
        source=source,
        denoise=denoise,
    )
    with contextlib.ExitStack() as stack:
        decoder = stack.enter_context(stream_decoder(vae))  # refuses a wrong VAE before anything is written
        if source is not None:
            stack.callback(source.close)
        opener = VideoOpener(
            place=Place.find(options), options=options, plan=plan, identity=identity, spec=spec, stack=stack
        )
        opened = opener.open()
        for note in opener.notes:
            log.warning(note)
        headline = opened.announcement(options)
        log.info(headline)
        message = "\n".join([headline, *notes, *opener.notes])
        if announce is not None:
            announce(message)
        started = time.perf_counter()
        run = _Run(opened, plan, options, decoder, on_frames)
        live = opened.live()
        if prompts is not None:
            prompts.on_taken = run.note_prompts
        try:
            whole = opened.state.is_whole or stream_latent(
                model,
                positive,
                negative,
                plan,
                run.take,
                seed=options.seed,
                cfg=options.cfg,
                resume=opened.resume(),
                live=live,
                callback=callback,
                on_progress=run.watched(on_progress),
                optical_flow=optical_flow,
                prompts=prompts,
                on_stop=run.stopped,
                finish=finish,
                source=None if source is None else source.latents,
                denoise=denoise,
            )
            # While there still is a state to go on from, should this fail.
            tail, run.is_whole = run.tail, whole
            last = encode_context(vae, tail, CONTEXT_LATENT_FRAMES)
            frames = run.close()
            if whole:
                run.put_state_away()
            else:
                run.mark_ended()
        except BaseException:
            # Cancel, too: what was decoded is still written, so that the file holds all that was made.
            if lost := run.stop():
                said = f"{opened.path.name} was stopped before its first frame: it is not kept, nor are its prompts."
                log.warning("%s\n%s", said, lost)
                if announce is not None:
                    announce(f"{said}\n{lost}")
            raise
        seconds = time.perf_counter() - started
    made = run.made
    message += f"\n{_ending(opened, options, frames, made, seconds, whole)}"
    if rows := schedule_rows(run.live or live):
        message += f"\n{rows}"
    log.info("%s: %d frames, %d of them made now in %.0f s.", opened.path.name, frames, made, seconds)
    if options.format == "png":
        made_video: Input.Video = PngVideo(opened.path, options.rate)
    else:
        made_video = InputImpl.VideoFromFile(str(opened.path))
    return StreamResult(
        path=opened.path, subfolder=opened.subfolder, video=made_video, context=last, message=message, whole=whole
    )


def _no_longer(options: StreamOptions, source: VideoSource) -> tuple[StreamOptions, list[str]]:
    """The options with a length that does not go beyond the video that theirs is made over, and what is said of it."""
    if options.frames <= source.frames:
        return options, []
    shorter = replace(options, seconds=float(source.frames / options.rate))
    return shorter, [f"The video that it is made over ends after {shorter.seconds:.1f} s, and so does this one."]


def _identity(
    model: ModelPatcher,
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    schedule: DiagonalSchedule,
    options: StreamOptions,
    *,
    plan: ClipPlan,
    optical_flow: FlowConditioning | None,
    prompt: Mapping[str, Any] | None,
    node_id: str | None,
    source: VideoSource | None,
    denoise: float,
) -> Identity:
    """What decides the video's frames; the arguments are stream_video's."""
    flow = _flow_parts(optical_flow, model)
    in_use = {"negative": uses_negative(model, options.cfg), "optical_flow": bool(flow)}
    parts = dict(
        model=model,
        vae=vae.patcher,
        positive=positive,
        negative=negative if in_use["negative"] else None,
        schedule=schedule,
        settings=plan.settings,
        context=plan.given,
        **flow,
        **({} if options.write_context or plan.given is None else {"write_context": False}),
        **({} if source is None else {"video": source.digest(), "denoise": denoise}),
        size=plan.shape[3:],
        seed=options.seed,
        cfg=options.cfg,
        rate=str(options.rate),
        format=options.format,
        crf=options.crf,
        filename_prefix=options.filename_prefix,
        graph=graph_digest(prompt, node_id, [name for name in GRAPH_INPUTS if in_use.get(name, True)]),
    )
    return Identity(
        {name: digest_of(part=part) for name, part in parts.items()},
        older={"graph": digest_of(part=graph_digest(prompt, node_id, GRAPH_INPUTS))},  # counted what is not used, too
    )


def _ending(opened: Opened, options: StreamOptions, frames: int, made: int, seconds: float, whole: bool) -> str:
    """A line for people: what was done in so many seconds, and what going on needs; `made` are this run's frames."""
    length = float(frames / options.rate)
    done = "Done" if whole else "Finished early, and queued again it goes on"
    said = f"{done}: {frames} frames ({length:.1f} s of video), {made} of them made now, in {seconds:.0f} s."
    if not whole and opened.state_path.exists():
        said += f" To go on it needs {name_and_size(opened.state_path)}; if you will not, delete that."
    return said


def _flow_parts(optical_flow: FlowConditioning | None, model: ModelPatcher) -> dict[str, Any]:
    """What optical flow adds to a video's digest: all of it, and nothing where there is none (or none that counts)."""
    if optical_flow is None or optical_flow.strength == 0:
        return {}
    motions: list[list[Any]] = [
        [start, field.steps, *(digest_of_whole(stored(tensor)) for tensor in (field.flow, field.valid))]
        for start, field in optical_flow.motions
    ]
    if len(motions) == 1 and motions[0][0] == 0:  # the digest of unfinished videos that know of no start
        motions = motions[0][1:]
    values = {name: getattr(optical_flow, name) for name in FLOW_SETTINGS}
    vae = None if optical_flow.vae is None else optical_flow.vae.patcher
    adapter = model.get_attachment(FLOW_ADAPTER_ATTACHMENT)
    return {"optical_flow": [*motions, values, vae, adapter]}


def _warn_about_rate(positive: list, options: StreamOptions) -> None:
    """Prompts at seconds of another frame rate would begin at other moments of this video."""
    prompts = schedule_of(positive)
    later = [entry for entry in prompts.entries if not entry.at.is_start] if prompts else []
    for rate in sorted({entry.fps for entry in later if entry.at.unit == "seconds"}):
        if rate != options.fps:
            log.warning(
                "The prompt schedule counts seconds at %g frames a second and the video has %g: its prompts begin at "
                "other moments. Set the same fps in both.",
                rate,
                options.fps,
            )


def _plan(
    model: ModelPatcher, schedule: DiagonalSchedule, options: StreamOptions, context: ContextFrames | None
) -> ClipPlan:
    """Sizes in the latent, after checking those in pixels."""
    latent_format = model.get_model_object("latent_format")
    ratio = latent_format.spacial_downscale_ratio
    patch = getattr(model.get_model_object("diffusion_model"), "patch_size", (1, 1, 1))
    for name, size, step in (
        ("width", options.width, patch[2] * ratio),
        ("height", options.height, patch[1] * ratio),
    ):
        if size < step or size % step:
            down, up = nearest_sizes(size, step)
            raise ValueError(
                f"The {name} is {size} pixels; it must be a multiple of {step}. The nearest that fit are {down} and "
                f"{up}."
            )
    shape = (1, latent_format.latent_channels, options.latent_frames, options.height // ratio, options.width // ratio)
    plan = plan_clip(model, shape, schedule, context)
    if plan.settings.window < 0:
        log.warning(
            "The model attends to the whole clip (window -1), so that memory grows with the length: %d latent frames. "
            "For a long video set a window, such as 12, and a sink, such as 3.",
            options.latent_frames,
        )
    return plan


class _Run:
    """One run's decoder, writing thread and states.

    Attributes:
        is_whole: the last chunk is made, and its frames are in the file.
    """

    def __init__(
        self,
        opened: Opened,
        plan: ClipPlan,
        options: StreamOptions,
        decoder: StreamDecoder,
        on_frames: Callable[[StreamProgress], None] | None,
    ) -> None:
        self.opened = opened
        self.plan = plan
        self.options = options
        self._decoder = decoder
        tail = None
        if opened.resumed:
            if not opened.state.is_whole:
                self._restore_decoder()
            # A copy: what was read still is the state's file, which Windows then does not let be replaced.
            tail = load_tensors(opened.state_path, TAIL, TAIL_FRAMES)[TAIL_FRAMES].clone()
        self._thread = WritingThread(opened, options, tail, plan, on_frames)
        self._newest: StreamedChunk | None = None  # decoded, and in no state yet
        self._rests_until = -math.inf  # no state is saved before (time.monotonic)
        self._live: Sequence[LivePrompt] | None = None  # all that this run was given
        self.is_whole = opened.state.is_whole
        self._forwards = opened.state.forwards

    def _restore_decoder(self) -> None:
        path = self.opened.state_path
        try:
            self._decoder.restore(load_tensors(path, DECODER, "size"))
        except KeyError as error:
            raise lacks(path, f"{DECODER}.../{error.args[0]}") from error

    @property
    def tail(self) -> Tensor:
        """The last frames of the video, [T, H, W, 3]: as many as Diagonal Context Frames takes."""
        self._thread.drain()
        return self._thread.tail

    @property
    def live(self) -> Sequence[LivePrompt]:
        """All prompts that the video was given, earlier runs' too; empty where none came in this one."""
        return self._live or ()

    @property
    def made(self) -> int:
        """Frames that this run made: neither an earlier run's nor given."""
        return self._thread.made

    def watched(self, on_progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
        """Progress that also ends the run soon after writing has failed."""

        def report(progress: Progress) -> None:
            self._thread.check()
            if on_progress is not None:
                on_progress(progress)

        return report

    def take(self, chunk: StreamedChunk) -> None:
        """Decode a chunk, have it written, and save the state if it is time."""
        self._decoder.keep_loaded([chunk.patcher])
        self._forwards = chunk.forwards
        name = "The context" if chunk.index == CONTEXT else f"Chunk {chunk.index + 1} of {self.plan.chunks}"
        settles = self._settles(chunk.index + 1)
        written = self.options.write_context or chunk.index != CONTEXT
        if chunk.cut:
            self._decoder.cut()
        images = self._decoder.submit(chunk.latents)
        if chunk.cut:  # the last frames are to be of one shot
            self._thread.drain()
            self._thread.tail = self._thread.tail[:0]
        self._thread.put(images, name, settle=settles, written=written)
        self._newest = None
        if chunk.index == CONTEXT or chunk.index + 1 == self.plan.chunks:
            return
        if settles and self._due(chunk.index + 1):
            self._save(chunk)
        else:
            self._newest = chunk

    def stopped(self) -> None:
        """Save the state of the newest chunk that was decoded, so that it and those before it are not made again.

        After Cancel, an error (out of memory, say) or `finish`.
        """
        chunk = self._newest
        if chunk is None:
            return
        if not self._decoder.intact:
            log.warning(
                "The run was stopped while the VAE decoded, and its memory of the video is too large to be kept twice: "
                "no state is saved. Queued again, the video goes on from the state before; where there is none, the "
                "file is kept and a new video is begun."
            )
            return
        try:
            cache, committed = chunk.cache, self._committed(chunk)
            if cache.committed > committed:  # the Cancel came while the next chunk was decoded
                cache.reopen(cache.committed - committed)
            if cache.committed != committed:
                # A new prompt's window is being written again. The next run writes it anew, from the chunk's history.
                cache.forget(committed)
            if self._live is not None:  # the open chunk may be under a prompt that this one did not know
                chunk = replace(chunk, live=self._live)
            self._save(chunk)
        except Exception as error:  # a state that cannot be saved does not decide how a run ends
            log.warning("No state could be saved when the run was stopped: %s", error)

    def _committed(self, chunk: StreamedChunk) -> int:
        return self.plan.context_frames + (chunk.index + 1) * self.plan.settings.frames_per_chunk

    def note_prompts(self, live: Sequence[LivePrompt]) -> None:
        """Prompts that the run was given, the newest just now: one that was accepted is not lost by a Cancel."""
        self._live = tuple(live)
        save_prompts(self.opened.prompts_path, [asdict(prompt) for prompt in live])

    def _settles(self, chunks: int) -> bool:
        """Whether the writer settles behind so many chunks, where a state may be saved.

        Also where none is: the file's key frames, and so its bytes, do not depend on how long a state takes.
        """
        if not 0 < chunks < self.plan.chunks:  # never behind the last: a longer length makes that one anew
            return False
        return chunks % self.options.state_every == 0 or self._is_kept(chunks)

    def _is_kept(self, chunks: int) -> bool:
        """Whether so many chunks are what a longer length goes on from when the video is finished."""
        return self.options.keep_state and chunks == self.plan.chunks - 1

    def _due(self, chunks: int) -> bool:
        """Whether to save behind so many chunks, where the writer settles."""
        return self._is_kept(chunks) or time.monotonic() >= self._rests_until

    def _save(self, chunk: StreamedChunk) -> None:
        chunk.require_finite()
        self._thread.drain()
        began = time.monotonic()
        mark = self.opened.writer.settle()
        self._thread.report()
        tensors = {f"{KEYS_VALUES}{name}": tensor for name, tensor in chunk.cache.snapshot().items()}
        tensors |= {f"{DECODER}{name}": tensor for name, tensor in self._decoder.snapshot().items()}
        tensors[TAIL + TAIL_FRAMES] = self._thread.tail
        # Copies: one may be a view of the other, and a file takes no shared memory.
        more = {f"{HISTORY}{start}": latents for start, latents in chunk.history.items()}
        more |= {f"{FLOW}{name}": tensor for name, tensor in chunk.flow.items()}
        tensors |= {name: tensor.to("cpu", copy=True) for name, tensor in more.items()}
        before = self.opened.state
        state = StreamState(
            digest=before.digest,
            parts=before.parts,
            length=self.opened.length,
            latent_frames=self.plan.shape[2],
            chunk=chunk.index + 1,
            committed=self._committed(chunk),
            dropped=chunk.cache.dropped,
            moved=chunk.cache.moved,
            begun=chunk.cache.begun,
            live=[asdict(prompt) for prompt in chunk.live],
            frames=mark.frames,
            size=mark.size,
            forwards=chunk.forwards,
            run=for_people(self.options, self.plan),
        )
        save_state(self.opened.state_path, state, tensors)
        self.opened.remove_replaced()
        ended = time.monotonic()
        took = ended - began
        if took > QUICK_SAVE_S:
            self._rests_until = ended + SAVE_REST * took

    def _save_whole(self, mark: Mark) -> None:
        """Save a state of the whole video, from which nothing is made again; what cannot be saved is said."""
        state = replace(
            self.opened.state,
            length=self.opened.length,
            latent_frames=self.plan.shape[2],
            chunk=self.plan.chunks,
            committed=self.plan.shape[2],
            frames=mark.frames,
            size=mark.size,
            forwards=self._forwards,
            dropped=0,
            moved=0,
            begun=0,
            live=[asdict(prompt) for prompt in self.live or self.opened.live()],
            run=for_people(self.options, self.plan),
            ended=False,
        )
        try:
            save_state(self.opened.state_path, state, {TAIL + TAIL_FRAMES: self._thread.tail})
        except VideoWriteError as error:
            log.warning("No state could be saved when the run was stopped: %s", error)

    def close(self) -> int:
        """End the video; the frames it has. The state stays as it was."""
        self._thread.drain()
        self._thread.end()
        self.opened.writer.close()
        self.opened.remove_replaced()
        self._thread.report()
        return self.opened.writer.frames

    def put_state_away(self) -> None:
        """What a finished video needs no more, or under another name. What cannot be put away is said: the video is."""
        written = self._save_rows()
        try:
            if self.options.keep_state and not self.opened.state.is_whole:
                self._name_done()
            else:
                self._remove_state(with_prompts=written)
        except OSError as error:
            log.warning(
                "%s is finished, but its state %s cannot be put away (%s; perhaps another program has it open). Remove "
                "it by hand, or the same graph, queued again, makes the end of this video once more.",
                self.opened.path.name,
                self.opened.state_path.name,
                error.strerror or error,
            )

    def mark_ended(self) -> None:
        """Note in the state that a person ended the video: later runs do not say again that it is unfinished."""
        self._save_rows()
        try:
            mark_ended(self.opened.state_path)
        except OSError as error:
            log.debug("%s cannot be marked: %s", self.opened.state_path.name, error)

    def _name_done(self) -> None:
        state_path = self.opened.state_path
        replace_file(state_path, state_path.with_name(state_path.name.removesuffix(STATE_SUFFIX) + DONE_SUFFIX))

    def _remove_state(self, *, with_prompts: bool = True) -> None:
        remove_file(self.opened.state_path)
        if with_prompts:
            remove_file(self.opened.prompts_path)

    def _save_rows(self) -> bool:
        """Write the live prompts of all runs beside the video, for people; False where they are not there then."""
        path = self.opened.prompts_path
        path = path.with_name(path.name.removesuffix(PROMPTS_SUFFIX) + ROWS_SUFFIX)
        return save_rows(path, self.live or self.opened.live())

    def stop(self) -> str:
        """End early: write what was decoded, so that the file plays to its end. The state stays as it was.

        A new video of which nothing was made, given frames apart, is removed; of one that was gone on with nothing is
        lost, and a finished one is a finished one again.

        Returns:
            The prompts that went with a video that was removed, as rows; empty where there were none.
        """
        self._thread.end()
        with contextlib.suppress(VideoWriteError):  # the reason for stopping is what is reported
            mark = self.opened.writer.settle()
            self.opened.writer.close()
            if self.is_whole and not self.options.keep_state:  # the state that a longer one needs stays
                self._save_whole(mark)
        if self.opened.resumed or self.made:
            self.opened.remove_replaced()
            self._save_rows()
            if self.opened.done and self.opened.writer.untouched:
                with contextlib.suppress(OSError):
                    self._name_done()
            self._thread.report()
            return ""
        lost = schedule_rows(self.live or self.opened.live(), most=None)
        self.opened.writer.abandon()
        remove_empty(self.opened.path, self.options.written_context(self.plan))
        try:
            self._remove_state()
        except OSError as error:  # the reason for stopping is what is reported
            log.warning(
                "%s has no frames; its state %s cannot be removed (%s; perhaps another program has it open).",
                self.opened.path.name,
                self.opened.state_path.name,
                error.strerror or error,
            )
        return lost
