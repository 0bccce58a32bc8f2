"""A video that another is made over (video to video), read and encoded beside the run, a chunk at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import comfy.model_management
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import Input, InputImpl
from torch import Tensor

from ..diagonal_sampler.frames import TIME_FACTOR, pixel_frames
from .stream_state import digest_of, digest_of_whole
from .vae_scale import encode, warn_if_mistaken

OVERLAP = 3
"""Latent frames before a chunk that are encoded with it and dropped: a video VAE's encoder looks back."""
NEARLY = Fraction(1, 1000)
"""Seconds that a picture may come late: files round their pictures' moments."""
_HASHED_BYTES = 1 << 20


class VideoSource:
    """The latents of a video, whichever are asked for: a run that goes on later gets what it would have got.

    Latent frame k stands for pixel frames 4k-3 to 4k at the new video's rate, each the picture that the video shows
    then. It is scaled to cover the new size and cut at the edges. Nothing here grows with the length.

    Args:
        video: ComfyUI's VIDEO.
        vae: the VAE of the model.
        width, height: pixels of the new video.
        rate: frames a second of the new video.

    Attributes:
        frames: pixel frames of a new video of its length.

    Raises:
        ValueError: a file that cannot be read, or has no pictures.
    """

    def __init__(self, video: Input.Video, vae: comfy.sd.VAE, *, width: int, height: int, rate: Fraction) -> None:
        self.video = video
        self.vae = vae
        self.width, self.height, self.rate = width, height, rate
        with _readable("The video"):
            self._of_video = Fraction(video.get_frame_rate())
            # Not its frame count, which is 1 where ComfyUI's Trim Video has set the start alone.
            self._pictures = round(video.get_duration() * float(self._of_video))
        if self._pictures < 1:
            raise ValueError("The video has no pictures; connect another one.")
        self.frames = math.floor((self._pictures - 1) * rate / self._of_video) + 1
        self._kept: tuple[int, Tensor] | None = None  # frames of the window before: the first one's number, and they
        self._file = _FilePictures(video) if isinstance(video, InputImpl.VideoFromFile) else None
        warn_if_mistaken(vae)

    def latents(self, start: int, count: int) -> Tensor:
        """Of latent frames `start` to `start + count`: [1, C, count, h, w] in LATENT scale.

        Behind the end of the video its last picture stays.
        """
        begin = max(0, start - OVERLAP)
        # A clip's first latent frame is of one pixel frame: here of the last that belongs to `begin`.
        frames = self._window(TIME_FACTOR * begin, pixel_frames(start + count))
        return encode(self.vae, frames)[:, :, start - begin :]

    def digest(self) -> str:
        """Of what it shows, the same in every process: of a file's bytes, of pictures' values."""
        parts = {"rate": str(self._of_video), "pictures": self._pictures}
        if self._file is not None:
            return digest_of(**parts, file=self._file.digest(), trimmed=self._file.begin)
        looked_at = [0, self._pictures // 2, self._pictures - 1]
        if isinstance(self.video, InputImpl.VideoFromComponents):
            looked_at = range(self._pictures)
        return digest_of(**parts, images=digest_of_whole(self._read(looked_at)))

    def close(self) -> None:
        """Give up the file."""
        if self._file is not None:
            self._file.close()

    def _window(self, first: int, stop: int) -> Tensor:
        """Frames `first` to `stop` of the new size and rate, [n, height, width, 3]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        known = []
        missing = first
        if self._kept is not None and self._kept[0] <= first < self._kept[0] + len(self._kept[1]):
            known = [self._kept[1][first - self._kept[0] :]]
            missing = first + len(known[0])
        frames = torch.cat([*known, self._frames(missing, stop)]) if missing < stop else known[0][: stop - first]
        kept = TIME_FACTOR * OVERLAP + 1
        self._kept = (stop - len(frames[-kept:]), frames[-kept:].clone())
        return frames

    def _frames(self, first: int, stop: int) -> Tensor:
        """Of the new size and rate, read now."""
        moments = [at / self.rate for at in range(first, stop)]
        if self._file is not None:
            pictures = self._file.at(moments)
        else:
            shown = (math.floor(moment * self._of_video) for moment in moments)
            pictures = self._read([min(at, self._pictures - 1) for at in shown])
        smaller = pictures.shape[1] > self.height and pictures.shape[2] > self.width
        method = "area" if smaller else "bicubic"
        pictures = pictures[..., :3].movedim(-1, 1)
        scaled = comfy.utils.common_upscale(pictures, self.width, self.height, method, "center")
        return scaled.movedim(1, -1).clamp(0, 1)

    def _read(self, numbers: Sequence[int]) -> Tensor:
        """Pictures, by their numbers, which go up, of a video that is no file: [n, H, W, 3]."""
        if isinstance(self.video, InputImpl.VideoFromComponents):
            return self.video.get_components().images[list(numbers)]
        first, rate = numbers[0], float(self._of_video)
        # From half a picture before the first to half a picture before the one behind the last.
        begin = max(0.0, (first - 0.5) / rate)
        part = self.video.as_trimmed(begin, (numbers[-1] + 0.5) / rate - begin, strict_duration=False)
        return part.get_components().images[[number - first for number in numbers]]


class _FilePictures:
    """The pictures of a file by moments that go up, each decoded once; ComfyUI's own reading begins at a key frame.

    Attributes:
        begin: seconds that the video begins at, on the file's own clock, or 0.
    """

    def __init__(self, video: InputImpl.VideoFromFile) -> None:
        self.video = video
        self.begin = Fraction(video.get_active_trim_window()[0])  # as ComfyUI's Trim Video sets it
        self._container: av.container.InputContainer | None = None
        self._begins = Fraction(0)  # the video's first moment on the file's clock
        self._at = Fraction(0)  # the moment that was asked for last
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._shown: av.VideoFrame | None = None
        self._next: av.VideoFrame | None = None

    def at(self, moments: Sequence[Fraction]) -> Tensor:
        """What is shown at each moment, in seconds from the video's beginning: [n, H, W, 3] in 0..1. Behind its end the
        last picture stays."""
        found: list[np.ndarray] = []
        last = None
        for moment in moments:
            with _readable(f"The video at {float(moment):.1f} s"):
                self._go_to(moment)
            found.append(found[-1] if self._shown is last else _array(self._shown))
            last = self._shown
        return torch.from_numpy(np.stack(found)).float() / 255

    def digest(self) -> str:
        return _file_digest(self.video.get_stream_source())

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._shown = self._next = None

    def _go_to(self, moment: Fraction) -> None:
        if self._container is None or moment < self._at:
            self._open(moment)
        self._at = moment
        while self._next is not None and _time(self._next) <= self._begins + moment + NEARLY:
            self._shown, self._next = self._next, next(self._decoded, None)

    def _open(self, moment: Fraction) -> None:
        """Begin at a key frame before the moment, or, where seeking goes too far, at the file's first."""
        for seeks in (True, False) if moment or self.begin else (False,):
            self.close()
            self._container = av.open(self.video.get_stream_source())
            stream = self._container.streams.video[0]
            stream.thread_type = "AUTO"
            self._begins = max(self.begin, (stream.start_time or 0) * stream.time_base)
            if seeks:
                self._container.seek(math.floor((self._begins + moment) / stream.time_base), stream=stream)
            self._decoded = (frame for frame in self._container.decode(stream) if frame.pts is not None)
            self._shown, self._next = next(self._decoded, None), next(self._decoded, None)
            if self._shown is not None and _time(self._shown) <= self._begins + moment + NEARLY:
                return
        if self._shown is None:
            raise ValueError("The video has no pictures; connect another one.")


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Raise ValueError, which names no folder, where a file is damaged."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}. Connect another one, or a part of it.") from error


def _time(frame: av.VideoFrame) -> Fraction:
    return frame.pts * frame.time_base


def _array(frame: av.VideoFrame) -> np.ndarray:
    """[H, W, 3] uint8, turned as the file says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90)).copy()


def _file_digest(source: str | io.BytesIO) -> str:
    if isinstance(source, io.BytesIO):
        return hashlib.sha256(source.getbuffer()).hexdigest()
    hasher = hashlib.sha256()
    with open(source, "rb") as file:
        while part := file.read(_HASHED_BYTES):
            hasher.update(part)
    return hasher.hexdigest()
