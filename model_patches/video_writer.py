"""Writes frames to a video that plays while it grows, and that a later run can cut back and go on with.

ffmpeg encodes and muxes to its standard output. A thread of ours cuts that stream into its header and its frames (a
movie fragment or a cluster each), moves the frames to their place in the clip and appends them to the file, which
therefore always ends with a whole frame. A muxer holds its last frame until it is fed another one or is ended: `settle`
ends the encoder, and the next frames begin a new one. A run that stopped can so be continued wherever it settled, and
the file comes out as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..diagonal_sampler.disk import insist, remove_file, replace_file, sync_path
from .video_containers import CONTAINERS, Container, Patch, VideoHeldError, VideoSpec, VideoWriteError, way_out

log = logging.getLogger(__name__)

FORMATS = ("mp4", "webm", "png")
PNG_COMPRESSION = 4
"""As ComfyUI's Save Image."""
END_TIMEOUT_S = 120.0
"""An encoder that is still not done this long after its last frame is stuck."""
LEAST_FFMPEG = 5, 1
"""The first that knows -fps_mode."""
GET_FFMPEG = f'"{sys.executable}" -m pip install -U "imageio-ffmpeg>=0.6.0"'
"""The version of requirements.txt, for the Python that runs ComfyUI."""
READ_BYTES = 1 << 16
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point that a video can be cut back to: its frames, and its bytes (0 for a folder of images)."""

    frames: int
    size: int


class VideoWriter(ABC):
    """A video that grows frame by frame; one thread writes at a time.

    Attributes:
        path: of the file, or of the folder of images.
        frames: frames that are in the file and can be played.
        submitted: frames given to `write`.
        untouched: the video still is as it was found: it is cut back to its mark with the first frame, not before.
        given: how many of its first frames were given, not made: alone they are not kept.
    """

    path: Path
    frames: int
    submitted: int
    untouched: bool
    given: int = 0

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

    def _disk_error(self, error: OSError) -> VideoWriteError:
        return VideoWriteError(
            f"{self.path.name} cannot be written: {error.strerror or error}. {self._what_stays()}; "
            f"{way_out(error, self.path.name)}, then queue the graph again: it goes on from the last state, or begins "
            "a new video where there is none yet. Or choose another filename_prefix."
        )

    def _what_stays(self) -> str:
        if self.frames > self.given:
            return f"The {self.frames} frames before are kept"
        return "No frame had been made yet, and nothing is kept"

    def _opening_error(self, error: OSError, mark: Mark | None) -> VideoWriteError:
        if mark is not None and isinstance(error, PermissionError):
            return VideoHeldError(self.path.name, error)
        return self._disk_error(error)


def open_writer(path: Path, spec: VideoSpec, mark: Mark | None = None) -> VideoWriter:
    """Begin a video, or go on with one.

    Args:
        path: of the file, whose suffix says the format (.mp4, .webm), or of the folder of PNG images (any other name).
        mark: go on behind this in the video that is there; what lies behind it goes with the first frame that is
            written. Without it `path` must not exist.

    Raises:
        VideoWriteError: no ffmpeg, a path that cannot be written, or a video that is shorter than the mark.
        VideoHeldError: a video that may not be changed now.
        FileExistsError: a new video over an old one.
    """
    # A folder's name may have a dot, too.
    container = CONTAINERS.get(path.suffix)
    if container is None:
        return PngWriter(path, spec, mark)
    return EncodedWriter(path, spec, container(spec), mark)


def has_frames(path: Path) -> bool:
    """Whether there is something in a video: bytes in a file, images of ours in a folder."""
    if path.is_dir():
        return any(_frame_number(name) is not None for name in os.listdir(path))
    return path.exists() and path.stat().st_size > 0


def find_ffmpeg() -> str:
    """The ffmpeg that imageio-ffmpeg brings. Raises VideoWriteError where there is none, or one that is too old."""
    remedy = f"Run {GET_FFMPEG}, or choose the format png."
    try:
        import imageio_ffmpeg

        found = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise VideoWriteError(f"ffmpeg is needed to write a video, and was not found ({error}). {remedy}") from None
    version = _version_of(found)
    if version is not None and version < LEAST_FFMPEG:
        raise VideoWriteError(
            f"ffmpeg {version[0]}.{version[1]} ({found}) is too old to write a video: "
            f"{LEAST_FFMPEG[0]}.{LEAST_FFMPEG[1]} or newer is needed. Run {GET_FFMPEG}, set the "
            "environment variable IMAGEIO_FFMPEG_EXE to a newer one, or choose the format png. Then start ComfyUI "
            "again."
        )
    return found


@functools.cache
def _version_of(ffmpeg: str) -> tuple[int, int] | None:
    """What an ffmpeg says of itself, asked once; None for a build without a number, such as one of a day.

    Raises VideoWriteError where it does not start.
    """
    try:
        ran = subprocess.run(
            [ffmpeg, "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=END_TIMEOUT_S,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise _no_start(error) from error
    except subprocess.TimeoutExpired:
        return None
    said = re.match(rb"ffmpeg version n?(\d+)\.(\d+)", ran.stdout)
    return None if said is None else (int(said[1]), int(said[2]))


def _no_start(error: OSError) -> VideoWriteError:
    return VideoWriteError(f"ffmpeg could not be started ({error}). Run {GET_FFMPEG}, or choose the format png.")


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


class EncodedWriter(VideoWriter):
    """A video file, through ffmpeg. See the module's head for how."""

    def __init__(self, path: Path, spec: VideoSpec, container: Container, mark: Mark | None) -> None:
        self.path = path
        self.spec = spec
        self.frames = self.submitted = 0 if mark is None else mark.frames
        self._size = 0 if mark is None else mark.size
        self.untouched = mark is not None
        self._container = container
        self._ffmpeg = find_ffmpeg()
        self._header = b""
        self._process: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._read_error: OSError | VideoWriteError | None = None
        flags = os.O_RDWR | _BINARY | (0 if mark is not None else os.O_CREAT | os.O_EXCL)
        try:
            self._file = insist(lambda: os.open(path, flags, 0o666))
        except FileExistsError:
            raise
        except OSError as error:
            raise self._opening_error(error, mark) from error
        try:
            self._look()
        except (OSError, VideoWriteError) as error:
            os.close(self._file)
            raise self._opening_error(error, mark) if isinstance(error, OSError) else error from None

    def _look(self) -> None:
        """Read the header of the video that is there, and refuse one that cannot be gone on with."""
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
            self._container.growing(self._header)
        if self._size < len(self._header) or (self.frames and not self._size):
            raise VideoWriteError(
                f"{self.path.name} is said to have {self.frames} frames in {self._size} bytes, less than its header "
                "alone; it cannot be continued."
            )

    def _cut_back(self) -> None:
        self.untouched = False
        if self._size:
            self._write_at(self._container.growing(self._header))
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
        if not self.untouched:
            self._sync()
        return Mark(frames=self.frames, size=self._size)

    def close(self) -> None:
        if self._file < 0:
            return
        self.settle()
        try:
            if self._size and not self.untouched:
                self._finish()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # perhaps a part of the index was written
            raise self._disk_error(error) from error
        os.close(self._file)
        self._file = -1

    def _finish(self) -> None:
        """End the file; at any moment of it the video plays, as a growing one or as a finished one."""
        appended, patch = self._container.finished(self._header, self.frames, self._file, self._size)
        if appended:
            os.lseek(self._file, self._size, os.SEEK_SET)
            _write_all(self._file, appended)
            os.fsync(self._file)
        self._write_at(patch)

    def _write_at(self, patch: Patch) -> None:
        os.lseek(self._file, patch.at, os.SEEK_SET)
        os.write(self._file, patch.data)
        os.fsync(self._file)

    def abandon(self) -> None:
        if self._file < 0:
            return
        self._stop()
        if not self.untouched:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1

    def _start(self) -> None:
        """Start an encoder whose first frame is the next one."""
        if self.untouched:
            try:
                self._cut_back()
            except OSError as error:
                raise self._disk_error(error) from error
        spec = self.spec
        command = [self._ffmpeg, "-hide_banner", "-loglevel", "error", "-nostdin"]
        command += ["-probesize", "32", "-analyzeduration", "0", "-f", "rawvideo", "-pixel_format", "rgb24"]
        command += ["-video_size", f"{spec.width}x{spec.height}"]
        command += ["-framerate", f"{spec.rate.numerator}/{spec.rate.denominator}", "-i", "pipe:0"]
        # Passed through: a constant frame rate would hold each frame until the next.
        # The filters say the colours: newer ffmpeg takes primaries and transfer from the frames, not from the options.
        filters = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
        command += ["-fps_mode", "passthrough", "-vf", filters]
        command += ["-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
        # Bit-exact: the same frames make the same bytes.
        command += [*self._container.arguments(), "-fflags", "+bitexact", "-flush_packets", "1", "pipe:1"]
        try:
            self._errors = tempfile.TemporaryFile()
        except OSError as error:
            raise VideoWriteError(
                f"ffmpeg's messages need a temporary file, and none can be made ({error}). Free some space there, or "
                "set the environment variable TMPDIR to another folder and start ComfyUI again."
            ) from error
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
            raise _no_start(error) from error
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
        except Exception as error:
            # Whatever it is: without a reader ffmpeg, and the run with it, would wait for ever.
            if not isinstance(error, (OSError, VideoWriteError)):
                error = VideoWriteError(
                    f"{self.path.name} is not a video that was written here ({error!r}), so that it cannot be "
                    "continued. Set restart."
                )
            self._read_error = error
            process.kill()

    def _take_header(self, header: bytes) -> None:
        if not self._size:
            self._header = self._container.prepared(header, self.spec.texts())
            self._append(self._header)
        elif self._container.codec_parameters(header) != self._container.codec_parameters(self._header):
            raise VideoWriteError(
                f"This ffmpeg encodes in another way than the one that began {self.path.name}, so that the video "
                "cannot be continued. Set restart."
            )

    def _append(self, data: bytes) -> None:
        _write_all(self._file, data)
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
            f"ffmpeg {how} at frame {self.submitted} of {self.path.name}: {reason}. {self._what_stays()}. "
            "To go on, queue the same graph again: from the last state, or with a new video where there is none yet."
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


def _write_all(file: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += os.write(file, data[at:])


class PngWriter(VideoWriter):
    """A folder of images, 00000001.png and so on; the metadata is in the first one."""

    def __init__(self, path: Path, spec: VideoSpec, mark: Mark | None) -> None:
        self.path = path
        self.spec = spec
        self.frames = 0 if mark is None else mark.frames
        self._unsynced: list[Path] = []
        self.untouched = mark is not None
        if mark is None:
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                raise
            except OSError as error:
                raise self._disk_error(error) from error
        else:
            try:
                self._look()
            except OSError as error:
                raise self._opening_error(error, mark) from error

    @property
    def submitted(self) -> int:
        return self.frames

    def _look(self) -> None:
        """Refuse a folder that cannot be gone on with."""
        there = set(os.listdir(self.path))
        missing = [n for n in range(1, self.frames + 1) if png_name(n) not in there]
        if missing:
            raise VideoWriteError(f"{self.path.name} has no {png_name(missing[0])} any more; it cannot be continued.")

    def _cut_back(self) -> None:
        self.untouched = False
        try:
            for name in os.listdir(self.path):
                number = _frame_number(name.removesuffix(".part"))
                if number is not None and number > self.frames:
                    remove_file(self.path / name)
        except OSError as error:
            raise self._disk_error(error) from error

    def write(self, images: Tensor) -> None:
        frames = as_bytes(images)
        if self.untouched and len(frames):
            self._cut_back()
        for pixels in frames:
            path = self.path / png_name(self.frames + 1)
            part = path.with_name(path.name + ".part")
            info = PngInfo()
            if self.frames == 0:
                for key, text in self.spec.texts().items():
                    info.add_text(key.encode("latin-1", "replace").decode("latin-1"), text)  # as PNG has names
            try:
                Image.fromarray(pixels).save(part, "PNG", pnginfo=info, compress_level=PNG_COMPRESSION)
                replace_file(part, path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    remove_file(part)
                raise self._disk_error(error) from error
            self._unsynced.append(path)
            self.frames += 1

    def settle(self) -> Mark:
        try:
            for path in self._unsynced:
                insist(functools.partial(sync_path, path))
            sync_path(self.path)
        except OSError as error:
            raise self._disk_error(error) from error
        self._unsynced.clear()
        return Mark(frames=self.frames, size=0)

    def close(self) -> None:
        self.settle()

    def abandon(self) -> None:
        pass


def png_name(number: int) -> str:
    """File name of a frame, counted from 1."""
    return f"{number:08}.png"


def _frame_number(name: str) -> int | None:
    """The frame of a file name, None for a name that is no frame's."""
    number, _, suffix = name.partition(".")
    return int(number) if suffix == "png" and number.isdecimal() else None
