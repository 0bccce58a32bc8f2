"""Writes frames to a video that plays while it grows, and that a later run can cut back and go on with.

ffmpeg encodes and muxes to its standard output. A thread of ours cuts that stream into its header and its frames (a
movie fragment or a cluster each), moves the frames to their place in the clip and appends them to the file, which
therefore always ends with a whole frame. A muxer holds its last frame until it is fed another one or is ended: `settle`
ends the encoder, and the next frames begin a new one. A run that stopped can so be continued wherever it settled, and
the file comes out as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import struct
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

log = logging.getLogger(__name__)

FORMATS = ("mp4", "webm", "png")
KEYFRAME_SECONDS = 2
"""Longest time between key frames: a player can begin, or jump, there."""
MAX_CRF = 51
VP9_MAX_CRF = 63
PNG_COMPRESSION = 4
"""As ComfyUI's Save Image."""
MIN_TICKS_PER_SECOND = 10_000
END_TIMEOUT_S = 120.0
"""An encoder that is still not done this long after its last frame is stuck."""
READ_BYTES = 1 << 16
_BINARY = getattr(os, "O_BINARY", 0)


class VideoWriteError(RuntimeError):
    """The video cannot be written; the message says why and what helps. What was written before is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point that a video can be cut back to: its frames, and its bytes (0 for a folder of images)."""

    frames: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec:
    """What a writer needs to know.

    Attributes:
        width, height: pixels, even.
        rate: frames a second.
        crf: quality from 1 (best) to 51, in H.264's measure; PNG has none.
        metadata: what a reader finds by name, as text or as anything JSON can hold.
    """

    width: int
    height: int
    rate: Fraction
    crf: float
    metadata: Mapping[str, Any]

    def texts(self) -> dict[str, str]:
        """The metadata as texts, in ComfyUI's way: what is no text becomes JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.metadata.items()}


class VideoWriter(ABC):
    """A video that grows frame by frame; one thread writes at a time.

    Attributes:
        frames: frames that are in the file and can be played.
        submitted: frames given to `write`.
    """

    frames: int
    submitted: int

    @abstractmethod
    def write(self, images: Tensor) -> None:
        """Append frames [T, H, W, 3] in 0..1. Raises VideoWriteError; FrameValueError before any is written."""

    @abstractmethod
    def settle(self) -> Mark:
        """Wait until every frame is in the file and on the disk. Raises VideoWriteError."""

    @abstractmethod
    def close(self) -> None:
        """Settle and end the video. Raises VideoWriteError."""

    @abstractmethod
    def abandon(self) -> None:
        """End at once, after an error; what is in the file stays. Never raises, and may follow `close`."""


def open_writer(path: Path, spec: VideoSpec, mark: Mark | None = None) -> VideoWriter:
    """Begin a video, or go on with one.

    Args:
        path: of the file, whose suffix says the format (.mp4, .webm), or of the folder of PNG images (no suffix).
        mark: cut the video that is there back to this and go on behind it. Without it `path` must not exist.

    Raises:
        VideoWriteError: no ffmpeg, a path that cannot be written, or a video that is shorter than the mark.
        FileExistsError: a new video over an old one.
    """
    if not path.suffix:
        return PngWriter(path, spec, mark)
    return EncodedWriter(path, spec, _CONTAINERS[path.suffix](spec), mark)


def find_ffmpeg() -> str:
    """The ffmpeg that imageio-ffmpeg brings. Raises VideoWriteError where there is none."""
    remedy = "Install this pack's requirements (pip install -r requirements.txt), or choose the format png."
    try:
        import imageio_ffmpeg

        found = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise VideoWriteError(f"ffmpeg is needed to write a video, and was not found ({error}). {remedy}") from None
    return found


class FrameValueError(ValueError):
    """Frames that are no pictures: NaN or infinite values, which would be written as black or white."""


def as_bytes(images: Tensor) -> np.ndarray:
    """Images [T, H, W, 3] in 0..1 -> bytes of the same shape, rounded down as ComfyUI's own nodes do.

    Raises FrameValueError for NaN and infinite values.
    """
    images = images[..., :3].float()
    if not torch.isfinite(images).all():
        raise FrameValueError("frames hold NaN or infinite values")
    return (images * 255.0).clamp(0, 255).to(torch.uint8).cpu().contiguous().numpy()


class _Container(ABC):
    """One file format: how ffmpeg is asked for it, and how its stream is cut and moved in time."""

    def __init__(self, spec: VideoSpec) -> None:
        self.spec = spec

    @abstractmethod
    def arguments(self) -> list[str]:
        """ffmpeg's options for codec and format."""

    @abstractmethod
    def cut(self, stream: Iterator[bytes], first_frame: int) -> Iterator[tuple[bool, bytes]]:
        """Cut a muxer's stream, which begins at time 0, into (is it the header, bytes); one frame each otherwise.

        Args:
            first_frame: the frame of the clip that this stream begins with; the frames are moved there.

        Raises:
            VideoWriteError: a stream of another build than expected.
        """

    def prepared(self, header: bytes) -> bytes:
        """The muxer's header, with room for what is not known before the end."""
        return header

    def length(self, header: bytes, frames: int | None) -> tuple[int, bytes] | None:
        """Where in a header the video's length is, and what is there for so many frames; None where there is no place.

        Args:
            frames: of the whole video; None while it grows.
        """
        return None

    @abstractmethod
    def with_metadata(self, header: bytes, texts: Mapping[str, str]) -> bytes:
        """The header with texts by name, where ComfyUI's own files have them.

        ffmpeg cannot do it: a command line is too short for a workflow, and its MP4 muxer writes broken boxes when a
        header that does not fit its buffer goes to a pipe.
        """

    def codec_parameters(self, header: bytes) -> bytes:
        """What all streams of one file must agree on."""
        return b""


class _Buffer:
    """Takes exact numbers of bytes from a stream that comes in pieces."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self.stream = stream
        self.held = bytearray()

    def take(self, count: int) -> bytes | None:
        """The next `count` bytes, None where the stream ends before."""
        while len(self.held) < count:
            piece = next(self.stream, b"")
            if not piece:
                return None
            self.held += piece
        taken = bytes(self.held[:count])
        del self.held[:count]
        return taken


class Mp4Container(_Container):
    """H.264 in fragmented MP4 (ISO/IEC 14496-12): ftyp and moov, then a moof and an mdat for each frame."""

    def __init__(self, spec: VideoSpec) -> None:
        super().__init__(spec)
        factor = math.ceil(MIN_TICKS_PER_SECOND / spec.rate.numerator)
        self.ticks_per_second = spec.rate.numerator * factor
        self.ticks_per_frame = spec.rate.denominator * factor

    def arguments(self) -> list[str]:
        keyframes = max(1, round(KEYFRAME_SECONDS * self.spec.rate))
        codec = ["-c:v", "libx264", "-preset", "fast", "-tune", "zerolatency", "-bf", "0", "-g", str(keyframes)]
        flags = "empty_moov+default_base_moof+frag_every_frame+skip_trailer"
        timescale = ["-video_track_timescale", str(self.ticks_per_second)]
        return [*codec, "-crf", f"{self.spec.crf:g}", *timescale, "-movflags", flags, "-f", "mp4"]

    def cut(self, stream: Iterator[bytes], first_frame: int) -> Iterator[tuple[bool, bytes]]:
        buffer = _Buffer(stream)
        header, fragment = b"", b""
        while (start := buffer.take(8)) is not None:
            size, kind = struct.unpack(">I4s", start)
            body = buffer.take(size - 8) if size >= 8 else None
            if body is None:
                return
            if kind in (b"ftyp", b"moov"):
                header += start + body
                if kind == b"moov":
                    yield True, header
            elif kind == b"moof":
                fragment = self._moved(start + body, first_frame)
            elif kind == b"mdat" and fragment:
                yield False, fragment + start + body
                fragment = b""

    def _moved(self, moof: bytes, first_frame: int) -> bytes:
        """A fragment, numbered and timed as a part of the whole clip."""
        out = bytearray(moof)
        number = _find_box(moof, b"mfhd") + 4
        (sequence,) = struct.unpack_from(">I", out, number)
        struct.pack_into(">I", out, number, sequence + first_frame)
        time = _find_box(moof, b"traf", b"tfdt")
        if out[time] != 1:
            raise VideoWriteError("ffmpeg wrote fragments with 32-bit times; another build of ffmpeg is needed.")
        (ticks,) = struct.unpack_from(">Q", out, time + 4)
        struct.pack_into(">Q", out, time + 4, ticks + first_frame * self.ticks_per_frame)
        return bytes(out)

    def with_metadata(self, header: bytes, texts: Mapping[str, str]) -> bytes:
        keys = struct.pack(">II", 0, len(texts)) + b"".join(_box(b"mdta", _utf8(key)) for key in texts)
        items = b"".join(
            _box(struct.pack(">I", number), _box(b"data", struct.pack(">II", _TEXT, 0) + _utf8(text)))
            for number, text in enumerate(texts.values(), 1)
        )
        handler = _box(b"hdlr", struct.pack(">II4s", 0, 0, b"mdta") + bytes(13))
        meta = _box(b"meta", bytes(4) + handler + _box(b"keys", keys) + _box(b"ilst", items))
        moov = header.find(b"moov") - 4
        return header[:moov] + _box(b"moov", header[moov + 8 :] + _box(b"udta", meta))

    def codec_parameters(self, header: bytes) -> bytes:
        at = header.find(b"avcC")
        (size,) = struct.unpack_from(">I", header, at - 4)
        return header[at : at - 4 + size]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


_TEXT = 1
"""QuickTime's number for a text value."""


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _find_box(data: bytes, *path: bytes) -> int:
    """Where the content of a box begins, by the names from inside the outermost box down."""
    at, end = 8, struct.unpack_from(">I", data)[0]
    for depth, wanted in enumerate(path):
        while at < end:
            size, kind = struct.unpack_from(">I4s", data, at)
            if kind == wanted:
                break
            at += max(size, 8)
        else:
            raise VideoWriteError(f"ffmpeg wrote an MP4 without {wanted.decode()}; another build of ffmpeg is needed.")
        if depth + 1 < len(path):
            end = at + size
        at += 8
    return at


_EBML_SEGMENT = 0x18538067
_EBML_SEEK_HEAD = 0x114D9B74
_EBML_INFO = 0x1549A966
_EBML_CLUSTER = 0x1F43B675
_EBML_TIME = 0xE7
_EBML_VOID = 0xEC
_DURATION_START = b"\x44\x89\x88"
"""Id and size of a duration in eight bytes."""
_NO_DURATION = bytes([_EBML_VOID, 0x89]) + bytes(9)
"""A void element as long as a duration."""


class WebmContainer(_Container):
    """VP9 in WebM (Matroska, RFC 9559): a header, then a cluster for each frame; times are whole milliseconds."""

    def arguments(self) -> list[str]:
        keyframes = max(1, round(KEYFRAME_SECONDS * self.spec.rate))
        crf = round(self.spec.crf * VP9_MAX_CRF / MAX_CRF)
        speed = ["-deadline", "realtime", "-cpu-used", "5", "-row-mt", "1", "-lag-in-frames", "0", "-auto-alt-ref", "0"]
        codec = ["-c:v", "libvpx-vp9", *speed, "-b:v", "0", "-crf", str(crf), "-g", str(keyframes)]
        return [*codec, "-f", "webm", "-cluster_time_limit", "0", "-write_crc32", "0"]

    def cut(self, stream: Iterator[bytes], first_frame: int) -> Iterator[tuple[bool, bytes]]:
        buffer = _Buffer(stream)
        header: bytes | None = b""
        frame = first_frame
        while (element := _take_element(buffer)) is not None:
            kind, head, body = element
            if kind == _EBML_CLUSTER:
                if header is not None:
                    yield True, header
                    header = None
                yield False, self._moved(body, frame)
                frame += 1
            elif header is not None:
                header += head + body

    def prepared(self, header: bytes) -> bytes:
        out = b""
        for kind, head, body in _elements(header):
            if kind == _EBML_INFO:
                out += _element(kind, body + _NO_DURATION)
            elif kind not in (_EBML_SEEK_HEAD, _EBML_VOID):  # a list of places that would not be right any more
                out += head + body
        return out

    def length(self, header: bytes, frames: int | None) -> tuple[int, bytes] | None:
        at = 0
        for kind, head, body in _elements(header):
            at += len(head) + len(body)
            place = at - len(_NO_DURATION)
            if kind == _EBML_INFO and header[place:].startswith((_NO_DURATION, _DURATION_START)):
                if frames is None:
                    return place, _NO_DURATION
                return place, _DURATION_START + struct.pack(">d", 1000 * frames / self.spec.rate)
        return None

    def with_metadata(self, header: bytes, texts: Mapping[str, str]) -> bytes:
        # Upper case, as ffmpeg has it and as ComfyUI's web page reads it.
        simple = b"".join(
            _element(0x67C8, _element(0x45A3, _utf8(key.upper())) + _element(0x4487, _utf8(text)))
            for key, text in texts.items()
        )
        return header + _element(0x1254C367, _element(0x7373, _element(0x63C0, b"") + simple))

    def _moved(self, body: bytes, frame: int) -> bytes:
        """A cluster of one frame, timed as a part of the whole clip."""
        kind, start = _ebml_number(body, 0, keep_marker=True)
        length, start = _ebml_number(body, start)
        if kind != _EBML_TIME:
            raise VideoWriteError("ffmpeg wrote a cluster without its time first; another build of ffmpeg is needed.")
        time = bytes([_EBML_TIME, 0x88]) + struct.pack(">Q", round(1000 * frame / self.spec.rate))
        return _element(_EBML_CLUSTER, time + body[start + length :])


def _element(kind: int, content: bytes) -> bytes:
    """An EBML element with its size in eight bytes."""
    return kind.to_bytes(-(-kind.bit_length() // 8), "big") + struct.pack(">Q", len(content) | 1 << 56) + content


def _ebml_number(data: bytes, at: int, *, keep_marker: bool = False) -> tuple[int, int]:
    """A number of variable length at `at`, and where it ends."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return (value if keep_marker else value & ~(1 << 7 * length)), at + length


def _take_element(buffer: _Buffer) -> tuple[int, bytes, bytes] | None:
    """The next element: its id, the bytes before its content, and its content (none for the open-ended segment)."""
    head = b""
    values = []
    for keep_marker in (True, False):
        first = buffer.take(1)
        if first is None:
            return None
        rest = buffer.take(8 - first[0].bit_length())
        if rest is None:
            return None
        head += first + rest
        values.append(_ebml_number(first + rest, 0, keep_marker=keep_marker)[0])
    kind, size = values
    if kind == _EBML_SEGMENT:
        return kind, head, b""
    body = buffer.take(size)
    return None if body is None else (kind, head, body)


def _elements(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """As `_take_element`, all of them."""
    buffer = _Buffer(iter([data]))
    while (element := _take_element(buffer)) is not None:
        yield element


_CONTAINERS: dict[str, type[_Container]] = {".mp4": Mp4Container, ".webm": WebmContainer}


class EncodedWriter(VideoWriter):
    """A video file, through ffmpeg. See the module's head for how."""

    def __init__(self, path: Path, spec: VideoSpec, container: _Container, mark: Mark | None) -> None:
        self.path = path
        self.spec = spec
        self.frames = self.submitted = 0 if mark is None else mark.frames
        self._size = 0 if mark is None else mark.size
        self._container = container
        self._ffmpeg = find_ffmpeg()
        self._header = b""
        self._process: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._read_error: OSError | VideoWriteError | None = None
        try:
            self._file = os.open(path, os.O_RDWR | _BINARY | (0 if mark is not None else os.O_CREAT | os.O_EXCL), 0o666)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._disk_error(error) from error
        try:
            self._cut_back()
        except (OSError, VideoWriteError) as error:
            os.close(self._file)
            raise self._disk_error(error) if isinstance(error, OSError) else error from None

    def _cut_back(self) -> None:
        there = os.fstat(self._file).st_size
        if there < self._size:
            raise VideoWriteError(
                f"{self.path.name} has {there} bytes where {self._size} were written before; it cannot be continued."
            )
        if self._size:
            os.lseek(self._file, 0, os.SEEK_SET)
            pieces = iter(lambda: os.read(self._file, READ_BYTES), b"")
            is_header, self._header = next(self._container.cut(pieces, 0), (False, b""))
            if not is_header:
                raise VideoWriteError(f"{self.path.name} is not the video that was written before.")
            self._say_length(None)
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)

    def write(self, images: Tensor) -> None:
        size = (self.spec.height, self.spec.width)
        if tuple(images.shape[1:3]) != size:
            raise ValueError(
                f"The VAE makes frames of {images.shape[2]}x{images.shape[1]} pixels where {size[1]}x{size[0]} are "
                "due; use the VAE that belongs to the model."
            )
        for frame in as_bytes(images):
            if self._process is None:
                self._start()
            try:
                self._process.stdin.write(frame)
                self._process.stdin.flush()
            except OSError:  # ffmpeg has ended, or the reader has ended it
                raise self._failure() from None
            self.submitted += 1

    def settle(self) -> Mark:
        if self._process is not None:
            try:
                self._process.stdin.close()
                code = self._process.wait(END_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired):
                raise self._failure() from None
            self._reader.join()
            if code or self._read_error is not None or self.frames != self.submitted:
                raise self._failure()
            self._stop()
        self._sync()
        return Mark(frames=self.frames, size=self._size)

    def close(self) -> None:
        if self._file < 0:
            return
        self.settle()
        try:
            self._say_length(self.frames)
        except OSError as error:
            raise self._disk_error(error) from error
        os.close(self._file)
        self._file = -1

    def _say_length(self, frames: int | None) -> None:
        """Write the video's length into its header, where the format has a place for it; None: it is not known yet."""
        found = self._container.length(self._header, frames)
        if found is not None:
            at, data = found
            os.lseek(self._file, at, os.SEEK_SET)
            os.write(self._file, data)
            os.fsync(self._file)

    def abandon(self) -> None:
        if self._file < 0:
            return
        self._stop()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)
            os.close(self._file)
        self._file = -1

    def _start(self) -> None:
        """Start an encoder whose first frame is the next one."""
        spec = self.spec
        command = [self._ffmpeg, "-hide_banner", "-loglevel", "error", "-nostdin"]
        command += ["-probesize", "32", "-analyzeduration", "0", "-f", "rawvideo", "-pixel_format", "rgb24"]
        command += ["-video_size", f"{spec.width}x{spec.height}"]
        command += ["-framerate", f"{spec.rate.numerator}/{spec.rate.denominator}", "-i", "pipe:0"]
        # Passed through: a constant frame rate would hold each frame until the next.
        command += ["-fps_mode", "passthrough", "-vf", "scale=out_color_matrix=bt709:out_range=tv"]
        command += ["-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
        # Bit-exact: the same frames make the same bytes.
        command += [*self._container.arguments(), "-fflags", "+bitexact", "-flush_packets", "1", "pipe:1"]
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # Not in the terminal's group: Ctrl-C would end it before its frames are out.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise VideoWriteError(
                f"ffmpeg could not be started ({error}). Install this pack's requirements again "
                "(pip install -r requirements.txt), or choose the format png."
            ) from error
        self._reader = threading.Thread(
            target=self._read, args=(self._process, self.submitted), name="diagonal-video", daemon=True
        )
        self._reader.start()

    def _read(self, process: subprocess.Popen, first_frame: int) -> None:
        """The reader: appends what an encoder makes, until it ends."""
        pieces = iter(lambda: process.stdout.read1(READ_BYTES), b"")
        try:
            for is_header, data in self._container.cut(pieces, first_frame):
                if is_header:
                    self._take_header(data)
                else:
                    self._append(data)
                    self.frames += 1
        except (OSError, VideoWriteError) as error:
            self._read_error = error
            process.kill()

    def _take_header(self, header: bytes) -> None:
        if not self._size:
            texts = self.spec.texts()
            header = self._container.prepared(header)
            self._header = self._container.with_metadata(header, texts) if texts else header
            self._append(self._header)
        elif self._container.codec_parameters(header) != self._container.codec_parameters(self._header):
            raise VideoWriteError(
                f"This ffmpeg encodes in another way than the one that began {self.path.name}, so that the video "
                "cannot be continued. Set restart."
            )

    def _append(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            at += os.write(self._file, data[at:])
        self._size += len(data)

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._disk_error(error) from error

    def _failure(self) -> VideoWriteError:
        """End the encoder and say what went wrong."""
        if self._process is not None and self._process.poll() is None:
            # Either the reader is ending it, or it is stuck.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        code = None if self._process is None else self._process.poll()
        said = ""
        if self._errors is not None:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
        self._stop()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)  # perhaps a part of a frame was written
        if isinstance(self._read_error, OSError):
            return self._disk_error(self._read_error)
        if self._read_error is not None:
            return self._read_error
        reason = said.splitlines()[-1] if said else "it said nothing"
        how = "is stuck" if code is None else f"stopped (code {code})"
        return VideoWriteError(
            f"ffmpeg {how} at frame {self.submitted} of {self.path.name}: {reason}. The frames before are kept; queue "
            "the same graph again to go on."
        )

    def _disk_error(self, error: OSError) -> VideoWriteError:
        return VideoWriteError(
            f"{self.path.name} cannot be written: {error.strerror or error}. The {self.frames} frames before are kept; "
            "free some space or choose another filename_prefix, then queue the graph again."
        )

    def _stop(self) -> None:
        """Leave no process, thread or temporary file behind."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._reader.join()
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


class PngWriter(VideoWriter):
    """A folder of images, 00000001.png and so on; the metadata is in the first one."""

    def __init__(self, path: Path, spec: VideoSpec, mark: Mark | None) -> None:
        self.path = path
        self.spec = spec
        self.frames = 0 if mark is None else mark.frames
        self._unsynced: list[Path] = []
        if mark is None:
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                raise
            except OSError as error:
                raise self._disk_error(error) from error
        else:
            self._cut_back()

    @property
    def submitted(self) -> int:
        return self.frames

    def _cut_back(self) -> None:
        try:
            there = set(os.listdir(self.path))
            missing = [n for n in range(1, self.frames + 1) if png_name(n) not in there]
            if missing:
                raise VideoWriteError(
                    f"{self.path.name} has no {png_name(missing[0])} any more; it cannot be continued."
                )
            for name in there:
                number, dot, suffix = name.partition(".")
                if dot and suffix in ("png", "png.part") and number.isdecimal() and int(number) > self.frames:
                    (self.path / name).unlink()
        except OSError as error:
            raise self._disk_error(error) from error

    def write(self, images: Tensor) -> None:
        for pixels in as_bytes(images):
            path = self.path / png_name(self.frames + 1)
            part = path.with_name(path.name + ".part")
            info = PngInfo()
            if self.frames == 0:
                for key, text in self.spec.texts().items():
                    info.add_text(key, text)
            try:
                Image.fromarray(pixels).save(part, "PNG", pnginfo=info, compress_level=PNG_COMPRESSION)
                os.replace(part, path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise self._disk_error(error) from error
            self._unsynced.append(path)
            self.frames += 1

    def settle(self) -> Mark:
        try:
            for path in self._unsynced:
                sync_path(path)
            sync_path(self.path)
        except OSError as error:
            raise self._disk_error(error) from error
        self._unsynced.clear()
        return Mark(frames=self.frames, size=0)

    def close(self) -> None:
        self.settle()

    def abandon(self) -> None:
        pass

    def _disk_error(self, error: OSError) -> VideoWriteError:
        return VideoWriteError(
            f"{self.path.name} cannot be written: {error.strerror or error}. The {self.frames} frames before are kept; "
            "free some space or choose another filename_prefix, then queue the graph again."
        )


def png_name(number: int) -> str:
    """File name of a frame, counted from 1."""
    return f"{number:08}.png"


def sync_path(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and keeps their names safe by itself
        return
    handle = os.open(path, os.O_RDONLY | _BINARY if os.name != "nt" else os.O_RDWR | _BINARY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
