"""Samples, decodes and writes a video chunk by chunk, in memory that does not depend on its length, and resumes it.

The caller's thread samples and decodes; another one waits for decoded chunks and writes them, so that on a GPU the
decoding of a chunk, and everywhere its encoding, goes on beside the sampling of the next one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import Input, InputImpl, Types
from PIL import Image
from torch import Tensor

from ..diagonal_sampler.schedule import DiagonalSchedule
from .context_frames import TEMPORAL_STRIDE, encode_context
from .flow_control import SETTINGS as FLOW_SETTINGS
from .flow_control import FlowConditioning
from .loading import FLOW_ADAPTER_ATTACHMENT
from .prompts import LivePrompt, PromptBox, schedule_of
from .sampling import CONTEXT, ClipPlan, Progress, Resume, StreamedChunk, plan_clip, stream_latent
from .stream_decode import DecodeHandle, StreamDecoder, stream_decoder
from .stream_state import (
    DONE_SUFFIX,
    LOCK_SUFFIX,
    STATE_SUFFIX,
    StreamLock,
    StreamState,
    digest_of,
    digest_of_whole,
    find_states,
    graph_digest,
    load_tensors,
    save_state,
)
from .video_writer import (
    FORMATS,
    MAX_CRF,
    FrameValueError,
    Mark,
    VideoSpec,
    VideoWriteError,
    VideoWriter,
    open_writer,
    png_name,
)

log = logging.getLogger(__name__)

MAX_SECONDS = 24 * 3600.0
MAX_FPS = 240.0
REPORT_SECONDS = 0.1
"""How often it is looked whether the encoder has made more frames watchable, while no chunk comes."""
KEYS_VALUES, DECODER, TAIL, HISTORY, FLOW = "keys_values/", "decoder/", "tail/", "history/", "flow/"
_TAIL = "frames"
GRAPH_INPUTS = ("model", "positive", "negative", "vae", "schedule", "context", "optical_flow")
"""The inputs whose nodes decide the result; all others are in StreamOptions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What a person sets.

    Attributes:
        width, height: pixels.
        seconds: length of the video; it is rounded to whole frames.
        fps: frames a second, kept to a thousandth.
        seed: of the noise.
        cfg: guidance scale, 1 is off.
        filename_prefix: below ComfyUI's output folder.
        format: mp4, webm or png.
        crf: quality from 1 (best) to 51, in H.264's measure; no effect on png.
        state_every: chunks between two states.
        restart: begin a new video even where one could be resumed.
        keep_state: leave the state of a finished video, so that a longer length goes on with it.

    Raises:
        ValueError: a value out of range.
    """

    width: int
    height: int
    seconds: float
    fps: float
    seed: int
    filename_prefix: str
    cfg: float = 1.0
    format: str = "mp4"
    crf: float = 20.0
    state_every: int = 20
    restart: bool = False
    keep_state: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; choose one of {', '.join(FORMATS)}.")
        if not (math.isfinite(self.fps) and 0.001 <= self.fps <= MAX_FPS):
            raise ValueError(f"fps is {self.fps}; it must be from 0.001 to {MAX_FPS:g} frames a second (Wan: 16).")
        if not (math.isfinite(self.seconds) and 0 < self.seconds <= MAX_SECONDS):
            raise ValueError(f"length is {self.seconds} seconds; it must be above 0 and at most {MAX_SECONDS:g}.")
        if self.frames < 1:
            raise ValueError(
                f"length is {self.seconds:g} seconds, less than half a frame at {self.fps:g} frames a second; use at "
                f"least {1 / self.fps:.3g}."
            )
        if not 1 <= self.crf <= MAX_CRF:
            raise ValueError(f"crf is {self.crf}; it must be from 1 (best) to {MAX_CRF} (smallest file).")
        if self.state_every < 1:
            raise ValueError(f"state_every is {self.state_every} chunks; it must be at least 1.")

    @property
    def rate(self) -> Fraction:
        """Frames a second."""
        return Fraction(round(self.fps * 1000), 1000)

    @property
    def frames(self) -> int:
        """Pixel frames of the video."""
        return math.floor(Fraction(self.seconds) * self.rate + Fraction(1, 2))

    @property
    def latent_frames(self) -> int:
        """Latent frames that hold them; the last one's surplus is not written."""
        return -(-(self.frames - 1) // TEMPORAL_STRIDE) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamProgress:
    """Frames that can be watched: `frames` of `length`, in `path`; the run began at frame `resumed_at`.

    `subfolder` is the one of ComfyUI's output folder that the path lies in. `newest` are those written since the
    last such call, [n, H, W, 3] in [0, 1].
    """

    path: Path
    subfolder: str
    frames: int
    length: int
    resumed_at: int
    rate: Fraction
    newest: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """A finished video.

    Attributes:
        path: the file, or the folder of PNG images.
        subfolder: of ComfyUI's output folder that it lies in.
        video: as ComfyUI's VIDEO.
        context: [1, C, n, H, W] its last frames, as Diagonal Context Frames makes them.
        message: what was done, for people.
    """

    path: Path
    subfolder: str
    video: Input.Video
    context: Tensor
    message: str


def stream_video(
    model: ModelPatcher,
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    schedule: DiagonalSchedule,
    options: StreamOptions,
    *,
    context: Tensor | None = None,
    optical_flow: FlowConditioning | None = None,
    metadata: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
    node_id: str | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_frames: Callable[[StreamProgress], None] | None = None,
    announce: Callable[[str], None] | None = None,
    prompts: PromptBox | None = None,
) -> StreamResult:
    """Make a video, or go on with the one that the same graph left unfinished.

    Args:
        model, positive, negative, schedule, callback, on_progress, prompts: as in sampling.sample_latent. Prompts
            that came while it ran are in the state.
        vae: decodes; it also encodes the last frames for `context`.
        context: latent frames that the video begins with (see sampling.plan_clip); they count in its length.
        optical_flow: motion to follow, counted from the video's first frame; what is shorter than the video leaves its
            rest free, except a single step, which is held.
        metadata: what the file carries, by name.
        prompt, node_id: ComfyUI's API graph and our place in it; they are part of what a state belongs to.
        on_frames: called, in another thread, when frames have become watchable.
        announce: gets one line when the run begins.

    Raises:
        ValueError: an input that cannot be used, with the reason and the remedy.
        VideoWriteError: ffmpeg or the disk failed; what was written is kept.
    """
    plan = _plan(model, schedule, options, context)
    if plan.given is not None and plan.given.shape[0] != 1:
        raise ValueError(f"context holds {plan.given.shape[0]} videos; one is written here. Give the frames of one.")
    _warn_about_rate(positive, options)
    spec = VideoSpec(
        width=options.width, height=options.height, rate=options.rate, crf=options.crf, metadata=metadata or {}
    )
    digest = digest_of(
        model=model,
        vae=vae.patcher,
        positive=positive,
        negative=negative if options.cfg != 1.0 else None,
        schedule=schedule,
        settings=plan.settings,
        context=plan.given,
        **_flow_parts(optical_flow, model),
        size=plan.shape[3:],
        seed=options.seed,
        cfg=options.cfg,
        rate=str(options.rate),
        format=options.format,
        crf=options.crf,
        filename_prefix=options.filename_prefix,
        graph=graph_digest(prompt, node_id, GRAPH_INPUTS),
    )
    with contextlib.ExitStack() as stack:
        decoder = stack.enter_context(stream_decoder(vae))  # refuses a wrong VAE before anything is written
        place = _Place.find(options)
        opened = _resume(place, options, plan, digest, spec, stack) or _begin(place, options, plan, digest, spec, stack)
        message = opened.announcement(options)
        log.info(message)
        if announce is not None:
            announce(message)
        started = time.perf_counter()
        run = _Run(opened, plan, options, decoder, on_frames)
        try:
            stream_latent(
                model,
                positive,
                negative,
                plan,
                run.take,
                seed=options.seed,
                cfg=options.cfg,
                resume=opened.resume(),
                callback=callback,
                on_progress=run.watched(on_progress),
                optical_flow=optical_flow,
                prompts=prompts,
            )
        except BaseException:
            # Cancel, too: what was decoded is still written, so that the file holds all that was made.
            run.stop()
            raise
        frames = run.finish()
        seconds = time.perf_counter() - started
    made = frames - opened.state.frames
    length = float(frames / options.rate)
    message += f"\nDone: {frames} frames ({length:.1f} s of video), {made} of them made now, in {seconds:.0f} s."
    log.info("%s: %d frames, %d of them made now in %.0f s.", opened.path.name, frames, made, seconds)
    if options.format == "png":
        video: Input.Video = PngVideo(opened.path, options.rate)
    else:
        video = InputImpl.VideoFromFile(str(opened.path))
    last = encode_context(vae, run.tail, plan.settings.frames_per_chunk).latent
    return StreamResult(path=opened.path, subfolder=place.subfolder, video=video, context=last, message=message)


def _flow_parts(optical_flow: FlowConditioning | None, model: ModelPatcher) -> dict[str, Any]:
    """What optical flow adds to a video's digest: all of it, and nothing where there is none (or none that counts)."""
    if optical_flow is None or optical_flow.strength == 0:
        return {}
    field = optical_flow.optical_flow
    # A motion that is held has one step in memory, however many it stands for.
    stored = [tensor[:1] if tensor.stride(0) == 0 else tensor for tensor in (field.flow, field.valid)]
    values = {name: getattr(optical_flow, name) for name in FLOW_SETTINGS}
    vae = None if optical_flow.vae is None else optical_flow.vae.patcher
    adapter = model.get_attachment(FLOW_ADAPTER_ATTACHMENT)
    return {"optical_flow": [field.steps, *(digest_of_whole(tensor) for tensor in stored), values, vae, adapter]}


def _warn_about_rate(positive: list, options: StreamOptions) -> None:
    """Prompts at seconds of another frame rate would begin at other moments of this video."""
    prompts = schedule_of(positive)
    for rate in sorted({entry.fps for entry in prompts.entries if entry.at.unit == "seconds"} if prompts else ()):
        if rate != options.fps:
            log.warning(
                "The prompt schedule counts seconds at %g frames a second and the video has %g: its prompts begin at "
                "other moments. Set the same fps in both.",
                rate,
                options.fps,
            )


def _plan(model: ModelPatcher, schedule: DiagonalSchedule, options: StreamOptions, context: Tensor | None) -> ClipPlan:
    """Sizes in the latent, after checking those in pixels."""
    latent_format = model.get_model_object("latent_format")
    ratio = latent_format.spacial_downscale_ratio
    patch = getattr(model.get_model_object("diffusion_model"), "patch_size", (1, 1, 1))
    for name, size, step in (
        ("width", options.width, patch[2] * ratio),
        ("height", options.height, patch[1] * ratio),
    ):
        if size < step or size % step:
            down = max(step, size - size % step)
            raise ValueError(
                f"The {name} is {size} pixels; it must be a multiple of {step}. The nearest that fit are {down} and "
                f"{down + step}."
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where ComfyUI has a prefix saved."""

    folder: Path
    filename: str
    counter: int
    subfolder: str

    @classmethod
    def find(cls, options: StreamOptions) -> _Place:
        prefix = options.filename_prefix
        output = folder_paths.get_output_directory()
        # ComfyUI refuses this too, at more length, and follows links only in its newer versions.
        if not _lies_in(output, os.path.join(output, os.path.dirname(os.path.normpath(prefix)))):
            raise ValueError(
                f"filename_prefix is {prefix!r}, which leaves ComfyUI's output folder; use a name such as "
                "video/ComfyUI, relative to it and without '..'."
            )
        try:
            folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(
                prefix, output, options.width, options.height
            )
        except OSError as error:
            raise VideoWriteError(
                f"The folder of filename_prefix {prefix!r} cannot be used: {error.strerror or error}. Choose another."
            ) from error
        return cls(Path(folder), filename, counter, subfolder)


def _lies_in(folder: str, path: str) -> bool:
    """Whether a path, its links followed, is a folder or below it."""
    try:
        folder, path = os.path.realpath(folder), os.path.realpath(path)
        return os.path.commonpath((folder, path)) == folder
    except ValueError:  # a zero byte, or another drive
        return False


@dataclass(slots=True)
class _Opened:
    """A video open for writing: a new one, or (`again`) an unfinished one at its last state."""

    path: Path
    state_path: Path
    state: StreamState
    writer: VideoWriter
    subfolder: str
    again: bool = False

    @property
    def resumed(self) -> bool:
        return self.state.chunk > 0

    def resume(self) -> Resume | None:
        if not self.resumed:
            return None
        return Resume(
            chunk=self.state.chunk,
            committed=self.state.committed,
            load=lambda: load_tensors(self.state_path, KEYS_VALUES),
            dropped=self.state.dropped,
            load_history=lambda: {int(at): x for at, x in load_tensors(self.state_path, HISTORY).items()},
            live=tuple(LivePrompt(**prompt) for prompt in self.state.live),
            load_flow=lambda: load_tensors(self.state_path, FLOW),
        )

    def announcement(self, options: StreamOptions) -> str:
        at, name = self.state.frames, self.path.name
        if not self.resumed:
            again = " Begun again: it had stopped before its first state." if self.again else ""
            return f"{name}: {options.frames} frames at {options.fps:g} a second.{again}"
        return (
            f"Resumed {name} at {float(at / options.rate):.1f} s (frame {at} of {options.frames}, after chunk "
            f"{self.state.chunk}). Set restart to begin anew."
        )


def _resume(
    place: _Place,
    options: StreamOptions,
    plan: ClipPlan,
    digest: str,
    spec: VideoSpec,
    stack: contextlib.ExitStack,
) -> _Opened | None:
    """Open what an earlier run of this graph left, None if there is nothing to go on with."""
    for path, state in find_states(place.folder, digest):
        done = path.name.endswith(DONE_SUFFIX)
        stem = path.name.removesuffix(DONE_SUFFIX if done else STATE_SUFFIX)
        video = place.folder / (stem + _suffix(options))
        if not options.restart and (reason := _does_not_fit(state, plan, options, done)):
            if not done:
                log.warning("%s is unfinished and is not resumed: %s", video.name, reason)
            continue
        lock = StreamLock(place.folder / (stem + LOCK_SUFFIX))
        try:
            if not lock.acquire():
                log.warning("%s is being written by another ComfyUI; it is left alone.", video.name)
                continue
            if options.restart:
                # The video stays; without its state nothing will go on with it by surprise.
                path.unlink(missing_ok=True)
                lock.release()
                continue
            if done:
                unfinished = place.folder / (stem + STATE_SUFFIX)
                os.replace(path, unfinished)
                path = unfinished
            writer = open_writer(video, spec, Mark(frames=state.frames, size=state.size))
        except (OSError, VideoWriteError) as error:
            lock.release()
            log.warning("%s cannot be resumed (%s); a new video is begun.", video.name, error)
            continue
        stack.callback(lock.release)
        stack.callback(writer.abandon)
        return _Opened(video, path, state, writer, place.subfolder, again=True)
    return None


def _suffix(options: StreamOptions) -> str:
    return "" if options.format == "png" else f".{options.format}"


def _does_not_fit(state: StreamState, plan: ClipPlan, options: StreamOptions, done: bool) -> str:
    """Why this run cannot go on from a state of the same graph; empty if it can."""
    if options.frames <= state.frames or (done and options.frames <= state.length):
        return f"it has {state.frames} frames already, and {options.frames} are asked for."
    begun = plan.context_frames + state.chunk * plan.settings.frames_per_chunk
    if state.chunk and (state.committed != begun or state.chunk >= plan.chunks):
        return "its chunks are others than this length's."
    settings, frames = plan.settings, plan.shape[2]
    same_positions = settings.window_positions(state.latent_frames) == settings.window_positions(frames)
    if not same_positions and state.committed > settings.capacity(state.latent_frames):
        return (
            f"with {frames} latent frames instead of {state.latent_frames} the model counts positions in another way "
            "(positions auto); set positions to window on the causal model to change lengths freely."
        )
    return ""


def _begin(
    place: _Place,
    options: StreamOptions,
    plan: ClipPlan,
    digest: str,
    spec: VideoSpec,
    stack: contextlib.ExitStack,
) -> _Opened:
    """Open a new video under the next free number, with a state that says it is empty."""
    state = StreamState(
        digest=digest, length=options.frames, latent_frames=plan.shape[2], run=_for_people(options, plan)
    )
    counter = place.counter
    while True:
        stem = f"{place.filename}_{counter:05}_"
        path = place.folder / (stem + _suffix(options))
        state_path = place.folder / (stem + STATE_SUFFIX)
        counter += 1
        lock = StreamLock(place.folder / (stem + LOCK_SUFFIX))
        try:
            if not lock.acquire():
                continue
            writer = open_writer(path, spec)
        except FileExistsError:  # another process took the number just now
            lock.release()
            continue
        except OSError as error:
            raise VideoWriteError(
                f"{path.name} cannot be written: {error.strerror or error}. Choose another filename_prefix."
            ) from error
        except BaseException:
            lock.release()
            raise
        break
    stack.callback(lock.release)
    stack.callback(writer.abandon)
    try:
        save_state(state_path, state, {})
    except VideoWriteError:
        writer.abandon()
        _remove_empty(path)
        raise
    return _Opened(path, state_path, state, writer, place.subfolder)


def _remove_empty(path: Path) -> None:
    """Remove a video without a frame."""
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()


def _for_people(options: StreamOptions, plan: ClipPlan) -> dict[str, Any]:
    return {**asdict(options), "schedule": asdict(plan.schedule), "settings": asdict(plan.settings)}


class _Run:
    """One run's decoder, writing thread and states."""

    def __init__(
        self,
        opened: _Opened,
        plan: ClipPlan,
        options: StreamOptions,
        decoder: StreamDecoder,
        on_frames: Callable[[StreamProgress], None] | None,
    ) -> None:
        self.opened = opened
        self.plan = plan
        self.options = options
        self._decoder = decoder
        if opened.resumed:
            decoder.restore(load_tensors(opened.state_path, DECODER))
        tail = load_tensors(opened.state_path, TAIL).get(_TAIL) if opened.resumed else None
        self._thread = _WritingThread(opened, options, tail, plan.settings.frames_per_chunk, on_frames)

    @property
    def tail(self) -> Tensor:
        """The last frames of the video, [T, H, W, 3]: those of one chunk."""
        return self._thread.tail

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
        name = "The context" if chunk.index == CONTEXT else f"Chunk {chunk.index + 1} of {self.plan.chunks}"
        self._thread.put(self._decoder.submit(chunk.latents), name)
        if chunk.index != CONTEXT and self._due(chunk.index + 1):
            self._save(chunk)

    def _due(self, chunks: int) -> bool:
        """Whether to save after so many chunks. Never after the last: a longer length makes that one anew."""
        last = self.plan.chunks
        return chunks < last and (
            chunks % self.options.state_every == 0 or (self.options.keep_state and chunks == last - 1)
        )

    def _save(self, chunk: StreamedChunk) -> None:
        chunk.require_finite()
        self._thread.drain()
        mark = self.opened.writer.settle()
        self._thread.report()
        tensors = {f"{KEYS_VALUES}{name}": tensor for name, tensor in chunk.cache.snapshot().items()}
        tensors |= {f"{DECODER}{name}": tensor for name, tensor in self._decoder.snapshot().items()}
        tensors[TAIL + _TAIL] = self._thread.tail
        tensors |= {f"{HISTORY}{start}": latents.cpu() for start, latents in chunk.history.items()}
        tensors |= {f"{FLOW}{name}": tensor.cpu() for name, tensor in chunk.flow.items()}
        before = self.opened.state
        state = StreamState(
            digest=before.digest,
            length=self.options.frames,
            latent_frames=self.plan.shape[2],
            chunk=chunk.index + 1,
            committed=chunk.cache.committed,
            dropped=chunk.cache.dropped,
            live=[asdict(prompt) for prompt in chunk.live],
            frames=mark.frames,
            size=mark.size,
            forwards=chunk.forwards,
            run=_for_people(self.options, self.plan),
        )
        save_state(self.opened.state_path, state, tensors)

    def finish(self) -> int:
        """End the video and put its state away; the frames it has."""
        self._thread.drain()
        self._thread.end()
        self.opened.writer.close()
        self._thread.report()
        state_path = self.opened.state_path
        if self.options.keep_state:
            name = state_path.name.removesuffix(STATE_SUFFIX) + DONE_SUFFIX
            os.replace(state_path, state_path.with_name(name))
        else:
            state_path.unlink(missing_ok=True)
        return self.opened.writer.frames

    def stop(self) -> None:
        """End early: write what was decoded, so that the file plays to its end. The state stays as it was."""
        self._thread.end()
        with contextlib.suppress(VideoWriteError):  # the reason for stopping is what is reported
            self.opened.writer.close()
        if self.opened.writer.frames:
            self._thread.report()
        else:
            self.opened.writer.abandon()
            _remove_empty(self.opened.path)
            self.opened.state_path.unlink(missing_ok=True)


class _WritingThread:
    """Waits for decoded chunks and writes them, one at a time; an error is raised at the next call."""

    def __init__(
        self,
        opened: _Opened,
        options: StreamOptions,
        tail: Tensor | None,
        tail_latent_frames: int,
        on_frames: Callable[[StreamProgress], None] | None,
    ) -> None:
        self.opened = opened
        self.options = options
        self.tail = torch.empty(0, options.height, options.width, 3) if tail is None else tail
        self._tail_frames = TEMPORAL_STRIDE * (tail_latent_frames - 1) + 1
        self._on_frames = on_frames
        self._newest = self.tail[:0]
        self._reported = opened.state.frames
        self._reporting = threading.Lock()  # the caller's thread reports, too
        self._error: Exception | None = None
        self._chunks: queue.Queue[tuple[DecodeHandle, str] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._work, name="diagonal-stream", daemon=True)
        self._thread.start()

    def put(self, chunk: DecodeHandle, name: str) -> None:
        """Hand over a chunk, with its name for an error; waits while the one before the last is still being written."""
        self.check()
        self._chunks.put((chunk, name))

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait until all chunks have been given to the writer."""
        self._chunks.join()
        self.check()

    def end(self) -> None:
        """Write what is left and end the thread."""
        if self._thread.is_alive():
            self._chunks.put(None)
            self._thread.join()

    def report(self) -> None:
        """Say which frames can be watched now."""
        with self._reporting:
            frames = self.opened.writer.frames
            if self._on_frames is None:
                self._newest = self._newest[:0]
            elif frames > self._reported:
                self._reported = frames
                newest, self._newest = self._newest, self._newest[:0]
                self._on_frames(
                    StreamProgress(
                        path=self.opened.path,
                        subfolder=self.opened.subfolder,
                        frames=frames,
                        length=self.options.frames,
                        resumed_at=self.opened.state.frames,
                        rate=self.options.rate,
                        newest=newest,
                    )
                )

    def _work(self) -> None:
        while True:
            try:
                chunk = self._chunks.get(timeout=REPORT_SECONDS)
            except queue.Empty:  # the encoder is behind: its frames become watchable between two chunks
                self._guarded(self.report)
                continue
            if chunk is not None:
                self._guarded(self._write, *chunk)
            self._chunks.task_done()
            if chunk is None:
                return

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        """Do it, unless something went wrong before; an error is raised again in the caller's thread."""
        if self._error is None:
            try:
                act(*arguments)
            except Exception as error:
                self._error = error

    def _write(self, chunk: DecodeHandle, name: str) -> None:
        writer = self.opened.writer
        images = chunk.result()[0]
        images = images[: self.options.frames - writer.submitted]
        try:
            writer.write(images)
        except FrameValueError as error:
            raise ValueError(
                f"{name}: its decoded {error} at the step of decoding (frames from {writer.submitted} on), though its "
                "latents were sound. None of them was written. Try the VAE in fp32 or bf16, or check its file."
            ) from error
        with self._reporting:
            self._newest = torch.cat([self._newest, images[..., :3].float()])
        self.tail = torch.cat([self.tail, images[..., :3].float()])[-self._tail_frames :]
        self.report()


class PngVideo(Input.Video):
    """A folder of PNG images as ComfyUI's VIDEO; the images are read when somebody asks for them."""

    def __init__(self, folder: Path, rate: Fraction) -> None:
        self.folder = folder
        self.rate = rate

    def _paths(self) -> Iterator[Path]:
        number = 1
        while (path := self.folder / png_name(number)).is_file():
            yield path
            number += 1

    def get_components(self) -> Types.VideoComponents:
        frames = []
        for path in self._paths():
            with Image.open(path) as image:
                frames.append(torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8))
                width, height = image.size
        images = torch.stack(frames).reshape(-1, height, width, 3).float() / 255.0
        return Types.VideoComponents(images=images, frame_rate=self.rate)

    def _loaded(self) -> Input.Video:
        return InputImpl.VideoFromComponents(self.get_components())

    def save_to(self, *args: Any, **kwargs: Any) -> None:
        return self._loaded().save_to(*args, **kwargs)

    def as_trimmed(self, *args: Any, **kwargs: Any) -> Input.Video | None:
        return self._loaded().as_trimmed(*args, **kwargs)

    def get_dimensions(self) -> tuple[int, int]:
        with Image.open(self.folder / png_name(1)) as image:
            return image.size

    def get_frame_count(self) -> int:
        return sum(1 for _ in self._paths())

    def get_frame_rate(self) -> Fraction:
        return self.rate

    def get_duration(self) -> float:
        return float(self.get_frame_count() / self.rate)
