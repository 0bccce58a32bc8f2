"""What a node tells its canvas while it samples: the forward that is done, and the newest chunk's frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from comfy.model_patcher import ModelPatcher
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..diagonal_sampler.frames import pixel_frames
from ..diagonal_sampler.sampler import Chunk
from ..model_patches.previews import as_address, frame_pictures, preview_of
from ..model_patches.sampling import Progress

PROGRESS_EVENT, CHUNK_EVENT = "diagonal.progress", "diagonal.chunk"
PICTURES_A_SECOND = 4.0  # Wan makes 16 frames a second


class LiveReport:
    """Sends one node's progress and chunks to the client that queued the prompt.

    Args:
        node_id: of the node that samples.
        model: its MODEL; decides how latents become pictures.
    """

    def __init__(self, node_id: str, model: ModelPatcher) -> None:
        self.node_id = node_id
        self.start = time.perf_counter()
        self.before: int | None = None  # forwards that an earlier run of a resumed clip did
        self.given: int | None = None  # pixel frames before the first chunk
        self.first: float | None = None  # seconds until the first pictures
        self.model = model

    def progress(self, progress: Progress) -> None:
        """After every forward."""
        if self.before is None:
            self.before = progress.forwards - 1
        self._send(
            PROGRESS_EVENT,
            forwards=progress.forwards,
            made=progress.forwards - self.before,  # of them in this run, which `elapsed` counts from
            total=progress.total,
            chunk=progress.chunk + 1,
            chunks=progress.chunks,
            # A forward that only fills the cache is step 0 of 0.
            step=max(progress.step + 1, 0),
            steps=progress.steps,
        )

    @cached_property
    def frames_of(self) -> Callable[[Tensor], Iterable[Image.Image]] | None:
        """See preview_of; made when it is needed, for it may load a preview model's file."""
        return preview_of(self.model)

    def chunk(self, chunk: Chunk) -> None:
        """After every finished chunk: the first clip's frames, quickly made."""
        frames = [] if self.frames_of is None else self.frames_of(chunk.latents)
        if self.given is None:
            self.given = pixel_frames(chunk.start_frame)
        end = pixel_frames(chunk.start_frame + chunk.latents.shape[2])
        self._send_pictures(frames, end - self.given)

    def frames(self, images: Tensor, made: int) -> None:
        """After decoded frames [n, H, W, 3] in [0, 1]: one in four of them. `made` in this run, these included.

        May be called in another thread, as ComfyUI's own send functions may.
        """
        self._send_pictures(frame_pictures(images), made)

    def _send_pictures(self, pictures: Iterable[Image.Image], pixel_frames: int) -> None:
        if self.first is None:
            self.first = time.perf_counter() - self.start
        self._send(
            CHUNK_EVENT,
            first=self.first,
            pixel_frames=pixel_frames,
            fps=PICTURES_A_SECOND,
            frames=[as_address(picture) for picture in pictures],
        )

    def _send(self, event: str, **data: Any) -> None:
        server = PromptServer.instance
        elapsed = time.perf_counter() - self.start
        data = {"node": self.node_id, "prompt_id": server.last_prompt_id, "elapsed": elapsed, **data}
        server.send_sync(event, data, server.client_id)
