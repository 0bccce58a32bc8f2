"""What a node tells its canvas while it samples: the forward that is done, and the newest chunk's frames."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cached_property
from typing import Any

from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..diagonal_sampler.frames import pixel_frames
from ..diagonal_sampler.sampler import Chunk
from ..model_patches.previews import PIXEL_FRAMES_A_PICTURE, as_address, frame_pictures, preview_of, tell_of_failure
from ..model_patches.sampling import Progress, uses_negative
from .client import listens, send

PROGRESS_EVENT, CHUNK_EVENT, WARNINGS_EVENT = "diagonal.progress", "diagonal.chunk", "diagonal.warnings"
FRAMES_A_SECOND = 16  # that Wan makes; a latent has no rate of its own
PACK_LOG = logging.getLogger(__name__.removesuffix(".nodes.live"))
MOST_WARNINGS = 8  # that the canvas is told of; the log has them all


class _Warnings(logging.Handler):
    """Keeps what the pack warns of in the thread that made this: each line once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.thread == self.thread and line not in self.lines and len(self.lines) < MOST_WARNINGS:
            self.lines.append(line)


class LiveReport:
    """Sends one node's progress, chunks and warnings to the client that queued the prompt; to nobody without one.

    While it is open, as a context manager, what the pack warns of in the log goes to the node too: a server's log is
    not where a person looks.

    Args:
        node_id: of the node that samples.
        model: its MODEL; decides how latents become pictures.
        cfg: guidance scale; where it uses the negative prompt a forward takes the network twice.
    """

    def __init__(self, node_id: str, model: ModelPatcher, cfg: float = 1.0) -> None:
        self.node_id = node_id
        self.guided = uses_negative(model, cfg)
        self.warnings = _Warnings()
        self.told = 0  # warnings that were sent
        self.start = time.perf_counter()
        self.before: int | None = None  # forwards that an earlier run of a resumed clip did
        self.given: int | None = None  # pixel frames before the first chunk
        self.made = 0  # forwards of this run
        self.first_forward: float | None = None  # when the first one was done, behind the loading of the models
        self.first: float | None = None  # seconds until the first pictures
        self.without_pictures = False  # making one has failed
        self.model = model

    def __enter__(self) -> LiveReport:
        PACK_LOG.addHandler(self.warnings)
        return self

    def __exit__(self, *_error: object) -> None:
        PACK_LOG.removeHandler(self.warnings)
        if self.made and len(self.warnings.lines) > self.told:  # behind the last forward
            self._send(WARNINGS_EVENT, warnings=list(self.warnings.lines))

    def progress(self, progress: Progress) -> None:
        """After every forward."""
        if self.before is None:
            self.before, self.first_forward = progress.forwards - 1, time.perf_counter()
        self.made = progress.forwards - self.before
        self.told = len(self.warnings.lines)
        self._send(
            PROGRESS_EVENT,
            forwards=progress.forwards,
            made=self.made,  # of them in this run, which `elapsed` counts from
            total=progress.total,
            chunk=progress.chunk + 1,
            chunks=progress.chunks,
            # A forward that only fills the cache is step 0 of 0.
            step=max(progress.step + 1, 0),
            steps=progress.steps,
            guided=self.guided,
            warnings=list(self.warnings.lines),
        )

    @cached_property
    def frames_of(self) -> Callable[[Tensor], Iterable[Image.Image]] | None:
        """See preview_of; made when it is needed, for it may load a preview model's file."""
        return preview_of(self.model)

    def chunk(self, chunk: Chunk) -> None:
        """After every finished chunk: the first clip's frames, quickly made."""
        if not listens():
            return
        if self.given is None:
            self.given = pixel_frames(chunk.start_frame)
        end = pixel_frames(chunk.start_frame + chunk.latents.shape[2])
        self._send_pictures(
            lambda: () if self.frames_of is None else self.frames_of(chunk.latents), end - self.given, FRAMES_A_SECOND
        )

    def frames(self, images: Tensor, made: int, rate: Fraction | int) -> None:
        """After decoded frames [n, H, W, 3] in [0, 1]: one in four of them, which play at the speed of the video.

        May be called in another thread, as ComfyUI's own send functions may.

        Args:
            made: pixel frames of this run, these included.
            rate: pixel frames a second.
        """
        if listens():
            self._send_pictures(lambda: frame_pictures(images), made, rate)

    def _send_pictures(
        self, make: Callable[[], Iterable[Image.Image]], pixel_frames: int, rate: Fraction | int
    ) -> None:
        """What `make` gives, without pictures from the first time on that it fails: a preview is not worth a run."""
        frames: list[str] = []
        if not self.without_pictures:
            try:
                frames = [as_address(picture) for picture in make()]
            except Exception as error:
                tell_of_failure(error)
                self.without_pictures = True
        if self.first is None:
            self.first = time.perf_counter() - self.start
        self._send(
            CHUNK_EVENT,
            first=self.first,
            pixel_frames=pixel_frames,
            fps=float(rate / PIXEL_FRAMES_A_PICTURE),
            frames=frames,
        )

    def _send(self, event: str, **data: Any) -> None:
        elapsed = time.perf_counter() - self.start
        send(event, {"node": self.node_id, "elapsed": elapsed, "sampling": self._sampling(), **data})

    def _sampling(self) -> float | None:
        """Seconds of all forwards so far, without the loading before them; None before there are two to tell it by.

        The first one counts as the mean of the others: when it began is not known.
        """
        if self.made < 2:
            return None
        return (time.perf_counter() - self.first_forward) * self.made / (self.made - 1)
