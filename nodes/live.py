"""What a node tells its canvas while it samples: the forward that is done, and the newest chunk's frames."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..diagonal_sampler.frames import pixel_frames
from ..diagonal_sampler.sampler import Chunk
from ..model_patches.previews import (
    PIXEL_FRAMES_A_PICTURE,
    PictureMaker,
    as_address,
    frame_pictures,
    on_its_way,
    preview_of,
    tell_of_failure,
)
from ..model_patches.sampling import Progress, uses_negative
from .client import asker, send

PROGRESS_EVENT, CHUNK_EVENT, WARNINGS_EVENT = "diagonal.progress", "diagonal.chunk", "diagonal.warnings"
FRAMES_A_SECOND = 16  # that Wan makes; a latent has no rate of its own
PACK_LOG = logging.getLogger(__name__.removesuffix(".nodes.live"))
MOST_WARNINGS = 8  # that the canvas is told of; the log has them all
MOST_WAITING = 4  # chunks whose pictures are not made yet; the sampling waits for a slower CPU then


class _Warnings(logging.Handler):
    """Keeps what the pack warns of in the thread that made this, and in those that join: each line once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.threads: set[int] = set()
        self.lines: list[str] = []
        self.join()

    def join(self) -> None:
        """Called in the thread."""
        self.threads.add(threading.get_ident())

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.thread in self.threads and line not in self.lines and len(self.lines) < MOST_WARNINGS:
            self.lines.append(line)


class LiveReport:
    """Sends one node's progress, chunks and warnings to the client that queued the prompt; to nobody without one.

    While it is open, as a context manager, what the pack warns of in the log goes to the node too: a server's log is
    not where a person looks. When it is closed all pictures have been sent.

    Pictures of a chunk on a GPU are made in a thread of their own, which waits for it: the sampling thread would else
    queue no forward until the chunk is done, and the GPU idle then.

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
        self.to = asker()  # other threads do not know what runs
        self._thread: ThreadPoolExecutor | None = None  # that makes pictures behind the sampling
        self._waiting: deque[Future] = deque()  # its work, the oldest first

    def __enter__(self) -> LiveReport:
        PACK_LOG.addHandler(self.warnings)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if self._thread is not None:
                self._thread.shutdown()  # waits for what it still has
            if error is None:
                self._settle(0)
        finally:
            PACK_LOG.removeHandler(self.warnings)
        if self.made and len(self.warnings.lines) > self.told:  # behind the last forward
            self._send(WARNINGS_EVENT, warnings=list(self.warnings.lines))

    def progress(self, progress: Progress) -> None:
        """After every forward."""
        self._settle(MOST_WAITING)
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
    def frames_of(self) -> PictureMaker | None:
        """See preview_of; made when it is needed, for it may load a preview model's file."""
        return preview_of(self.model)

    def chunk(self, chunk: Chunk) -> None:
        """After every finished chunk: the first clip's frames, quickly made."""
        if self.to.client_id is None:
            return
        if self.given is None:
            self.given = pixel_frames(chunk.start_frame)
        made = pixel_frames(chunk.start_frame + chunk.latents.shape[2]) - self.given
        copied = on_its_way(chunk.latents)
        if copied is not None and self._makes_pictures_on_cpu():
            self._settle(MOST_WAITING - 1)
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "diagonal-pictures", self.warnings.join)
            self._waiting.append(self._thread.submit(self._send_copied, *copied, made))
        else:
            self._settle(0)  # in their order
            self._send_pictures(lambda: self._pictures_of(chunk.latents), made, FRAMES_A_SECOND)

    def _makes_pictures_on_cpu(self) -> bool:
        """Whether there are pictures to make, and that needs no GPU; a preview that fails here fails again later."""
        try:
            return not self.without_pictures and self.frames_of is not None and self.frames_of.on_cpu
        except Exception:
            return False

    def _pictures_of(self, latents: Tensor) -> Iterable[Image.Image]:
        return () if self.frames_of is None else self.frames_of(latents)

    @torch.inference_mode()
    def _send_copied(self, latents: Tensor, wait: Callable[[], None], made: int) -> None:
        """Called in the pictures' thread, with what on_its_way gives."""

        def make() -> Iterable[Image.Image]:
            wait()
            return self._pictures_of(latents)

        self._send_pictures(make, made, FRAMES_A_SECOND)

    def _settle(self, most: int) -> None:
        """Wait until the pictures of at most so many chunks are to be made yet; raises what ended one of the others."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()

    def frames(self, images: Tensor, made: int, rate: Fraction | int) -> None:
        """After decoded frames [n, H, W, 3] in [0, 1]: one in four of them, which play at the speed of the video.

        May be called in another thread, as ComfyUI's own send functions may.

        Args:
            made: pixel frames of this run, these included.
            rate: pixel frames a second.
        """
        if self.to.client_id is not None:
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
        send(event, {"node": self.node_id, "elapsed": elapsed, "sampling": self._sampling(), **data}, to=self.to)

    def _sampling(self) -> float | None:
        """Seconds of all forwards so far, without the loading before them; None before there are two to tell it by.

        The first one counts as the mean of the others: when it began is not known.
        """
        if self.made < 2:
            return None
        return (time.perf_counter() - self.first_forward) * self.made / (self.made - 1)
