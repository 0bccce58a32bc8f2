"""Writes the chunks of a stream beside its sampling, and says which frames can be watched."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagonal_sampler.frames import pixel_frames
from .clip_plan import ClipPlan
from .context_frames import CONTEXT_LATENT_FRAMES
from .stream_decode import DecodeHandle
from .stream_files import Opened, StreamOptions
from .video_writer import FrameValueError

REPORT_SECONDS = 0.1
"""How often it is looked whether the encoder has made more frames watchable, while no chunk comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamProgress:
    """Frames of the file that can be watched: `frames` of `length`, in `path`; the run began at frame `resumed_at`.

    `made` of them are this run's own: neither given nor an earlier run's. `subfolder` is the one of ComfyUI's output
    folder that the path lies in. `newest` are those written since the last such call, [n, H, W, 3] in [0, 1].
    """

    path: Path
    subfolder: str
    frames: int
    made: int
    length: int
    resumed_at: int
    rate: Fraction
    newest: Tensor


class WritingThread:
    """Waits for decoded chunks and writes them, one at a time; an error is raised at the next call."""

    def __init__(
        self,
        opened: Opened,
        options: StreamOptions,
        tail: Tensor | None,
        plan: ClipPlan,
        on_frames: Callable[[StreamProgress], None] | None,
    ) -> None:
        self.opened = opened
        self.options = options
        self.tail = torch.empty(0, options.height, options.width, 3) if tail is None else tail
        self._tail_frames = pixel_frames(CONTEXT_LATENT_FRAMES)
        self._before = max(opened.state.frames, options.written_context(plan))
        self._on_frames = on_frames
        self._newest = self.tail[:0]
        self._reported = opened.state.frames
        self._reporting = threading.Lock()  # the caller's thread reports, too
        self._error: Exception | None = None
        self._chunks: queue.Queue[tuple[DecodeHandle, str, bool, bool] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._work, name="diagonal-stream", daemon=True)
        self._thread.start()

    @property
    def made(self) -> int:
        """Frames of this run that can be watched; see StreamProgress."""
        return max(0, self.opened.writer.frames - self._before)

    def put(self, chunk: DecodeHandle, name: str, *, settle: bool = False, written: bool = True) -> None:
        """Hand over a chunk, with its name for an error; waits while the one before the last is still being written.

        Args:
            settle: the writer settles behind it.
            written: it comes into the file; else it is only a part of `tail`.
        """
        self.check()
        self._chunks.put((chunk, name, settle, written))

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
                        made=self.made,
                        length=self.opened.length,
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

    def _write(self, chunk: DecodeHandle, name: str, settle: bool, written: bool) -> None:
        writer = self.opened.writer
        images = chunk.result()[0]
        if written:
            images = images[: self.opened.length - writer.submitted]
            self._append(images, name)
        newest = images[-self._tail_frames :, ..., :3].float()
        # Cut before they are joined: a part of a larger tensor would keep all of it.
        older = self.tail[max(0, len(self.tail) + len(newest) - self._tail_frames) :]
        self.tail = torch.cat([older, newest])
        self.report()
        if settle:
            writer.settle()
            self.report()

    def _append(self, images: Tensor, name: str) -> None:
        writer = self.opened.writer
        try:
            writer.write(images)
        except FrameValueError as error:
            raise ValueError(
                f"{name}: its decoded {error} at the step of decoding (frames from {writer.submitted} on), though its "
                "latents were sound. None of them was written. Try the VAE in fp32 or bf16, or check its file."
            ) from error
        with self._reporting:
            self._newest = torch.cat([self._newest, images[..., :3].float()])
