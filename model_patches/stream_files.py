"""The files of a stream: what a person asks for, where it is written, and what an earlier run left to go on with."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import comfy.model_management
import folder_paths

from ..diagonal_sampler.disk import PARTIAL_SUFFIX, remove_file, replace_file
from ..diagonal_sampler.frames import TIME_FACTOR, pixel_frames
from ..diagonal_sampler.prompt_schedule import require_switch
from .clip_plan import ClipPlan
from .prompts import LivePrompt
from .sampling import Resume
from .stream_state import (
    DONE_SUFFIX,
    LOCK_SUFFIX,
    PROMPTS_SUFFIX,
    STATE_SUFFIX,
    StreamLock,
    StreamState,
    can_be_said,
    digest_of,
    find_states,
    load_tensors,
    read_prompts,
    read_state,
    save_prompts,
    save_state,
)
from .video_containers import MAX_CRF, VideoHeldError, VideoSpec, VideoWriteError
from .video_writer import FORMATS, Mark, VideoWriter, has_frames, open_writer, png_name

log = logging.getLogger(__name__)

MAX_SECONDS = 24 * 3600.0
MAX_FPS = 240.0
KEYS_VALUES, DECODER, TAIL, HISTORY, FLOW = "keys_values/", "decoder/", "tail/", "history/", "flow/"
TAIL_FRAMES = "frames"
SYSTEM = os.name
LONGEST_NAME = 255
"""Of a file, where its file system does not say: in bytes, on Windows in UTF-16's units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What a person sets.

    Attributes:
        width, height: pixels.
        seconds: length of the video, context included; it is rounded to whole frames.
        fps: frames a second, kept to a thousandth.
        seed: of the noise.
        cfg: guidance scale, 1 is off.
        filename_prefix: below ComfyUI's output folder.
        format: mp4, webm or png.
        crf: quality from 1 (best) to 51, in H.264's measure; no effect on png.
        state_every: chunks between two states.
        restart: begin a new video even where one could be resumed.
        keep_state: leave the state of a finished video, so that a longer length goes on with it.
        write_context: the file has the frames that the video begins with, too; else it is shorter by them.

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
    write_context: bool = True

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
        """Pixel frames of the video, context included."""
        return math.floor(Fraction(self.seconds) * self.rate + Fraction(1, 2))

    @property
    def latent_frames(self) -> int:
        """Latent frames that hold them; the last one's surplus is not written."""
        return -(-(self.frames - 1) // TIME_FACTOR) + 1

    def written_context(self, plan: ClipPlan) -> int:
        """Pixel frames of the context that the file has."""
        return pixel_frames(plan.context_frames) if self.write_context else 0

    def file_frames(self, plan: ClipPlan) -> int:
        """Pixel frames of the file: of the video without what of its context is not written."""
        return self.frames - pixel_frames(plan.context_frames) + self.written_context(plan)


@dataclass(frozen=True, slots=True)
class Place:
    """Where ComfyUI has a prefix saved."""

    folder: Path
    filename: str
    counter: int
    subfolder: str

    @classmethod
    def find(cls, options: StreamOptions) -> Place:
        prefix = dated(options.filename_prefix, datetime.now())
        output = folder_paths.get_output_directory()
        if not can_be_said(prefix):
            raise ValueError(
                f"filename_prefix is {prefix!r}, which is no Unicode text; use a name such as video/ComfyUI."
            )
        if refused := refused_characters(prefix, SYSTEM):
            raise ValueError(
                f"filename_prefix is {prefix!r}, and no name has {' '.join(refused)} in it on Windows. Use other "
                "characters; in times use '-', as in %date:hh-mm%."
            )
        # ComfyUI refuses this too, at more length, and follows links only in its newer versions.
        if not _lies_in(output, os.path.join(output, os.path.dirname(os.path.normpath(prefix)))):
            raise ValueError(
                f"filename_prefix is {prefix!r}, which leaves ComfyUI's output folder; use a name such as "
                "video/ComfyUI, relative to it and without '..'."
            )
        if os.path.basename(os.path.normpath(prefix)) in (".", ".."):
            raise ValueError(f"filename_prefix is {prefix!r}, which is no file's name; use one such as video/ComfyUI.")
        try:
            folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(
                prefix, output, options.width, options.height
            )
        except OSError as error:
            raise VideoWriteError(
                f"The folder of filename_prefix {prefix!r} cannot be used: {error.strerror or error}. Choose another."
            ) from error
        _require_short(folder, filename, counter)
        return cls(Path(folder), filename, counter, subfolder)


def _require_short(folder: str, filename: str, counter: int) -> None:
    """Refuse a name whose state could not be written: its is the longest of all that belong to a video.

    Raises:
        ValueError: how much shorter it must be.
    """
    most = LONGEST_NAME
    with suppress(AttributeError, OSError, ValueError):  # Windows has no pathconf, and a file system may not know
        most = os.pathconf(folder, "PC_NAME_MAX")
    added = _stem_of("", counter) + STATE_SUFFIX + PARTIAL_SUFFIX
    name = filename + added
    length = len(name.encode("utf-16-le")) // 2 if SYSTEM == "nt" else len(os.fsencode(name))
    if 0 < most < length:
        unit, hint = ("characters", "") if SYSTEM == "nt" else ("bytes", " (a Chinese character has 3)")
        raise ValueError(
            f"filename_prefix is too long: make its last part, {filename[:16] + '...'!r}, {length - most} {unit} "
            f"shorter{hint}. With {added!r}, which is added to it, a file's name would have {length} {unit}, and "
            f"{most} is the most here."
        )


def refused_characters(prefix: str, system: str) -> list[str]:
    """The characters of a prefix that no file's name may have, in order; behind a colon Windows has a stream of a file.

    Args:
        system: as os.name has it; systems other than "nt" refuse none.
    """
    if system != "nt":
        return []
    name = re.sub(r"^[A-Za-z]:(?=[\\/])", "", prefix)  # a drive: a whole path may lie in the output folder
    return sorted(set(name) & set('<>:"|?*'))


_DATE = re.compile(r"%date(?::([^%]*))?%")
_DATE_PARTS = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
_USUAL_DATE = "yyyyMMddhhmmss"


def dated(prefix: str, now: datetime) -> str:
    """A prefix with the time of day in place of `%date:yyyy-MM-dd_hh-mm-ss%`, as ComfyUI's page has it for its own
    nodes that save: yyyy or yy, and M, d, h, m, s, of one digit or two. `%date%` is all of them."""

    def part(found: re.Match) -> str:
        letters = found[0]
        value = now.strftime(_DATE_PARTS[letters if letters in _DATE_PARTS else letters * 2])
        return value if letters in _DATE_PARTS else str(int(value))

    return _DATE.sub(lambda found: re.sub(r"yyyy|yy|MM?|dd?|hh?|mm?|ss?", part, found[1] or _USUAL_DATE), prefix)


def _lies_in(folder: str, path: str) -> bool:
    """Whether a path, its links followed, is a folder or below it."""
    try:
        folder, path = os.path.realpath(folder), os.path.realpath(path)
        return os.path.commonpath((folder, path)) == folder
    except ValueError:  # a zero byte, or another drive
        return False


_GRAPH, _SEED = "graph", "seed"
_WORDS = {
    "positive": "positive (a text, a time, switch or blend_chunks)",
    "settings": "the model's frames_per_chunk, window, sink, positions or kv_cache_dtype",
    "size": "width or height",
    "rate": "fps",
    "optical_flow": "optical_flow (the motion, or a setting)",
    "video": "video (its pictures or its part)",
    _GRAPH: "a node before it",
}
_MOST_CHANGED = 2


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides a video's frames, except its length: the digests of its parts, by name, and one of them all.

    The part `graph` is of the nodes before this one, which hold most of the others too.

    Attributes:
        older: the parts that an older pack digested in another way, so that its videos go on.
    """

    parts: Mapping[str, str]
    older: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_of(**self.parts)

    def owns(self, state: StreamState) -> bool:
        """Whether a state is of the same video."""
        return state.digest in (digest_of(**{**self.parts, **self.older}), self.digest)

    def changed_since(self, state: StreamState) -> str:
        """What a person changed since another video was begun; empty if that is so much that it is another one.

        A video that a person ended is another one already where more than one part changed, or the seed.
        """
        known = dict.fromkeys([*self.parts, *state.parts])
        names = [name for name in known if self.parts.get(name) != state.parts.get(name)]
        if not state.parts or len(names) > 1:
            names = [name for name in names if name != _GRAPH]
        if not state.parts or len(names) > _MOST_CHANGED:
            return ""
        if state.ended and (len(names) > 1 or names == [_SEED]):
            return ""
        return " and ".join(_WORDS.get(name, name) for name in names)


@dataclass(slots=True)
class Opened:
    """A video open for writing: a new one, or (`again`) an unfinished or (`done`) a finished one at its last state.

    `length` is in frames of the file, as all numbers of frames are in the state. `replaced` are the states, with their
    locks held, of the unfinished videos that `restart` gives up.
    """

    path: Path
    state_path: Path
    state: StreamState
    writer: VideoWriter
    subfolder: str
    length: int
    again: bool = False
    done: bool = False
    replaced: list[Path] = field(default_factory=list)

    @property
    def resumed(self) -> bool:
        return self.state.chunk > 0

    @property
    def prompts_path(self) -> Path:
        """Where live prompts are noted."""
        return _prompts_path(self.state_path)

    def remove_replaced(self) -> None:
        """Remove the states of the videos that this one replaces; what cannot be removed is said."""
        for path in self.replaced:
            try:
                remove_file(path)
                remove_file(_prompts_path(path))
            except OSError as error:
                log.warning("%s cannot be removed: %s", path.name, error.strerror or error)
        self.replaced.clear()

    def live(self) -> tuple[LivePrompt, ...]:
        """Prompts that earlier runs of this video were given, perhaps after the state."""
        return tuple(live_prompts(self.state_path, self.state))

    def resume(self) -> Resume | None:
        if not self.resumed:
            return None
        return Resume(
            chunk=self.state.chunk,
            committed=self.state.committed,
            load=lambda: load_tensors(self.state_path, KEYS_VALUES),
            dropped=self.state.dropped,
            moved=self.state.moved,
            begun=self.state.begun,
            load_history=lambda: {int(at): x for at, x in load_tensors(self.state_path, HISTORY).items()},
            load_flow=lambda: load_tensors(self.state_path, FLOW),
        )

    def announcement(self, options: StreamOptions) -> str:
        at, name = self.state.frames, self.path.name
        if not self.resumed:
            again = " Begun again: it had stopped before its first frame." if self.again else ""
            return f"{name}: {self.length} frames at {options.fps:g} a second.{again}"
        return (
            f"Resumed {name} at {float(at / options.rate):.1f} s (frame {at} of {self.length}, after chunk "
            f"{self.state.chunk}). Set restart to begin a new video instead."
        )


@dataclass(slots=True, kw_only=True)
class VideoOpener:
    """Opens a run's video for writing: what an earlier run of the same graph left, else a new one.

    Attributes:
        stack: closes what is open and lets go of its lock.
        notes: a line for people about each unfinished video that this run could seem to go on with, and does not.
        prompts: the live prompts of a video that is left alone, for the one that is begun in its stead.
        replaced: as in Opened.
    """

    place: Place
    options: StreamOptions
    plan: ClipPlan
    identity: Identity
    spec: VideoSpec
    stack: ExitStack
    notes: list[str] = field(default_factory=list)
    prompts: list[LivePrompt] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Frames that the file is to have."""
        return self.options.file_frames(self.plan)

    def open(self) -> Opened:
        """The video, with a state that belongs to it.

        Raises:
            VideoHeldError: there is one to go on with, which may not be changed now.
            VideoWriteError: a new one cannot be begun.
        """
        return self._resume() or self._begin()

    def _resume(self) -> Opened | None:
        """What an earlier run left; None if there is nothing to go on with.

        Of several, it is the one with the most frames, and the newest of those. The states of videos of this name that
        are gone are removed.
        """
        changed: list[str] = []
        found: list[tuple[Path, StreamState]] = []
        for path, state in find_states(self.place.folder):
            stem = _stem(path)
            same = self.identity.owns(state)
            ours = same or re.fullmatch(re.escape(self.place.filename) + r"_\d+_", stem) is not None
            if not ours or _remove_left_over(path, state):
                continue
            if same:
                found.append((path, state))
            elif state.chunk > 0 and path.name.endswith(STATE_SUFFIX) and not self.options.restart:
                what = self.identity.changed_since(state)
                if what and not self._lock(stem).is_held():
                    how = "was finished early" if state.ended else "is unfinished"
                    changed.append(
                        f"{stem} {how} and is not gone on with: {what} changed. Put it back to go on, or delete "
                        f"{name_and_size(path)}."
                    )
        for path, state in sorted(found, key=lambda item: -item[1].frames):  # the newest stays first among equals
            if (opened := self._reopen(path, state)) is not None:
                return opened
        self.notes += changed[:1]  # the newest
        return None

    def _reopen(self, path: Path, state: StreamState) -> Opened | None:
        """The video of a state of this graph; None if this run cannot go on with it, which `notes` may then say.

        With `restart` an unfinished one is to lose its state, once the new one has something, and a finished one keeps
        it: its person asked for that.
        A video that stopped before its first state is left alone and loses its empty state: begun again in the same
        file, a run that stops early would leave less than there was. One that has given frames alone is begun again.
        """
        options, done = self.options, path.name.endswith(DONE_SUFFIX)
        if options.restart and done:
            return None
        stem = _stem(path)
        video = self._video(stem)
        if not options.restart and (reason := _does_not_fit(state, self.plan, self.length, done)):
            if not done and not (state.ended and self.length <= state.frames):
                self.notes.append(f"{video.name} is unfinished and is not resumed: {reason}")
            return None
        try:
            with ExitStack() as held:
                lock = self._lock(stem)
                if not lock.acquire():
                    self.notes.append(f"{video.name} is being written by another ComfyUI; it is left alone.")
                    return None
                held.callback(lock.release)
                # Another ComfyUI may have gone on with it, or finished it, since the folder was read.
                if not path.exists() or read_state(path) != state:
                    return None
                # In both cases the video stays; without its state nothing will go on with it by surprise.
                if options.restart:
                    self.replaced.append(path)
                    self.stack.push(held.pop_all())
                    return None
                if state.chunk == 0 and _has_own_frames(video, options.written_context(self.plan)):
                    self.notes.append(f"{video.name} has no state to go on from: it is kept, and a new video is begun.")
                    self.prompts = self.prompts or live_prompts(path, state)
                    remove_file(path)
                    remove_file(_prompts_path(path))
                    return None
                if not video.exists():
                    self.notes.append(f"{video.name} is not there any more; a new video is begun.")
                    return None
                writer = open_writer(video, self.spec, Mark(frames=state.frames, size=state.size))
                held.callback(writer.abandon)
                writer.given = options.written_context(self.plan)
                if done:
                    path = self._no_longer_done(path)
                self.stack.push(held.pop_all())
                return Opened(video, path, state, writer, self.place.subfolder, self.length, again=True, done=done)
        except VideoHeldError:
            raise
        except (OSError, VideoWriteError) as error:
            self.notes.append(f"{video.name} cannot be resumed ({error}); a new video is begun.")
            return None

    def _no_longer_done(self, path: Path) -> Path:
        """Give the state of a finished video the name of an unfinished one's, and return it.

        Raises:
            VideoHeldError: another program has it open.
            OSError: it cannot be renamed.
        """
        unfinished = self._state(_stem(path))
        try:
            replace_file(path, unfinished)
        except PermissionError as error:
            raise VideoHeldError(path.name, error) from None
        return unfinished

    def _begin(self) -> Opened:
        """A new video under the next free number, with a state that says it is empty, and with live prompts."""
        state = StreamState(
            digest=self.identity.digest,
            parts=self.identity.parts,
            length=self.length,
            latent_frames=self.plan.shape[2],
            run=for_people(self.options, self.plan),
        )
        counter = self.place.counter
        while (opened := self._begin_at(counter, state)) is None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            counter += 1
        return opened

    def _begin_at(self, counter: int, state: StreamState) -> Opened | None:
        """A new video of this number; None if it is not free."""
        stem = _stem_of(self.place.filename, counter)
        path, state_path = self._video(stem), self._state(stem)
        with ExitStack() as held:
            lock = self._lock(stem)
            try:
                if not lock.acquire():
                    return None
                held.callback(lock.release)
                writer = open_writer(path, self.spec)
            except FileExistsError:  # another process took the number just now
                return None
            except OSError as error:
                raise VideoWriteError(
                    f"{path.name} cannot be written: {error.strerror or error}. Choose another filename_prefix."
                ) from error
            held.callback(writer.abandon)
            writer.given = self.options.written_context(self.plan)
            try:
                remove_file(_prompts_path(state_path))  # of a video of this number that is gone
            except OSError as error:  # they must not be taken for the new video's
                said = f"{_prompts_path(state_path).name} cannot be removed: {error.strerror or error}"
                writer.abandon()
                remove_empty(path)
                if not isinstance(error, (PermissionError, IsADirectoryError)):
                    raise VideoWriteError(f"{said}. Choose another filename_prefix.") from error
                log.warning(said)
                return None  # another program has them, which the next number does not meet
            try:
                if self.prompts:
                    save_prompts(_prompts_path(state_path), [asdict(prompt) for prompt in self.prompts])
                save_state(state_path, state, {})
            except VideoWriteError:
                writer.abandon()
                remove_empty(path)
                raise
            self.stack.push(held.pop_all())
            return Opened(path, state_path, state, writer, self.place.subfolder, self.length, replaced=self.replaced)

    def _video(self, stem: str) -> Path:
        return self.place.folder / (stem + _suffix(self.options.format))

    def _state(self, stem: str) -> Path:
        return self.place.folder / (stem + STATE_SUFFIX)

    def _lock(self, stem: str) -> StreamLock:
        return StreamLock(self.place.folder / (stem + LOCK_SUFFIX))


def _remove_left_over(path: Path, state: StreamState) -> bool:
    """Whether a state's video is gone and nobody writes it; the state is then removed, if it can be.

    A video that is only just begun has its lock held until it is there. The state lies in the video's own folder: where
    it can be read and the video is not found, the disk is not away.
    """
    videos = [path.with_name(_stem(path) + _suffix(format)) for format in FORMATS]
    if not all(map(_is_gone, videos)):
        return False
    lock = StreamLock(path.with_name(_stem(path) + LOCK_SUFFIX))
    try:
        if not lock.acquire():
            return False
        # Another ComfyUI may have done something since the folder was read.
        if all(map(_is_gone, videos)) and path.exists() and read_state(path) == state:
            said = name_and_size(path)
            remove_file(path)
            remove_file(_prompts_path(path))
            log.info("%s is not there any more: its state %s is removed.", _stem(path), said)
    except OSError as error:
        log.info("%s is not there any more; its state cannot be removed: %s", _stem(path), error)
    finally:
        lock.release()
    return True


def _is_gone(path: Path) -> bool:
    """Whether there is certainly nothing of this name, not even a link to a disk that is away."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def name_and_size(path: Path) -> str:
    """A file as people are told of it: its name and, where it can be seen, its size."""
    try:
        size = path.stat().st_size
    except OSError:
        return path.name
    return f"{path.name} ({size / 1e9:.1f} GB)" if size >= 1e9 else f"{path.name} ({math.ceil(size / 1e6)} MB)"


def live_prompts(state_path: Path, state: StreamState) -> list[LivePrompt]:
    """Prompts that the runs of a video were given, perhaps after the state."""
    for prompts in (read_prompts(_prompts_path(state_path)), state.live):
        with suppress(TypeError, ValueError):  # nothing there, or not what we wrote
            return [_live_prompt(**prompt) for prompt in prompts]
    return []


def _live_prompt(**fields: Any) -> LivePrompt:
    """A prompt as it was noted. Raises TypeError or ValueError: a field that no run noted."""
    prompt = LivePrompt(**fields)
    if not all(type(number) is int and number >= 0 for number in (prompt.chunk, prompt.blend_chunks)):
        raise TypeError(f"chunk or blend_chunks of {prompt!r} is no number of chunks")
    if not all(isinstance(text, str) for text in (prompt.text, prompt.node)):
        raise TypeError(f"text or node of {prompt!r} is no text")
    require_switch(prompt.switch, prompt.blend_chunks)
    return prompt


def _stem_of(filename: str, counter: int) -> str:
    return f"{filename}_{counter:05}_"


def _stem(state_path: Path) -> str:
    return state_path.name.removesuffix(STATE_SUFFIX).removesuffix(DONE_SUFFIX)


def _prompts_path(state_path: Path) -> Path:
    return state_path.with_name(_stem(state_path) + PROMPTS_SUFFIX)


def _suffix(format: str) -> str:
    return "" if format == "png" else f".{format}"


def _does_not_fit(state: StreamState, plan: ClipPlan, length: int, done: bool) -> str:
    """Why this run cannot go on from a state of the same graph; empty if it can. length: frames of the file."""
    if state.is_whole and length >= state.frames:
        return "" if length == state.frames else "all its frames are made, and only keep_state keeps more."
    if length <= state.frames or (done and length <= state.length):
        return f"it has {state.frames} frames already, and {length} are asked for."
    begun = plan.context_frames + state.chunk * plan.settings.frames_per_chunk
    if state.chunk and (state.committed != begun or state.chunk >= plan.chunks):
        return "its chunks are others than this length's."
    if state.begun > min(plan.settings.frames_per_chunk, plan.shape[2] - state.committed):
        return "its chunks are others than this length's."
    settings, frames = plan.settings, plan.shape[2]
    same_positions = settings.window_positions(state.latent_frames) == settings.window_positions(frames)
    moved = state.committed > settings.capacity(state.latent_frames)
    if state.moved is None:  # of an older pack, which does not say how far
        moved = moved or state.begun > 0 or state.dropped > 0
    if not same_positions and moved:
        return (
            f"with {frames} latent frames instead of {state.latent_frames} the model counts positions in another way "
            "(positions auto); set positions to window on the causal model to change lengths freely."
        )
    return ""


def _has_own_frames(video: Path, given: int) -> bool:
    """Whether a video has frames behind so many given ones, or cannot be read."""
    if not given or not has_frames(video):
        return has_frames(video)
    if video.is_dir():
        return any(image.name > png_name(given) for image in video.glob("*.png"))
    try:
        with av.open(str(video)) as container:
            packets = (packet for packet in container.demux(video=0) if packet.size)
            frames = sum(1 for _ in itertools.islice(packets, given + 1))
    except (av.FFmpegError, IndexError) as error:  # of a foreign file, perhaps, or one without a video
        log.debug("The frames of %s cannot be counted: %s", video.name, error)
        return True
    return not 0 < frames <= given


def remove_empty(path: Path, given: int = 0) -> None:
    """Remove a video without a frame but so many given ones."""
    with suppress(OSError):
        if path.is_dir():
            for number in range(1, given + 1):
                remove_file(path / png_name(number))
            path.rmdir()
        else:
            path.unlink()


def for_people(options: StreamOptions, plan: ClipPlan) -> dict[str, Any]:
    return {**asdict(options), "schedule": asdict(plan.schedule), "settings": asdict(plan.settings)}
