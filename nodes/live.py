"""What a node tells its canvas while it samples: the forward that is done, and the newest chunk's frames."""

from __future__ import annotations

import base64
import io as python_io
import time
from collections.abc import Callable, Iterable
from typing import Any

import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..diagonal_sampler.sampler import Chunk
from ..model_patches.sampling import Progress

PROGRESS_EVENT, CHUNK_EVENT = "diagonal.progress", "diagonal.chunk"
PREVIEW_ATTACHMENT = "diagonal_preview"
"""ModelPatcher attachment: a function from latents [T, 16, h, w] in the model's space to frames [T, 3, H, W] in
[-1, 1], for models whose latents ComfyUI's own preview does not know."""
LARGEST_SIDE = 320  # pixels of a preview frame
LATENT_FPS = 4.0  # one preview frame for each latent frame: Wan has four of them a second


class LiveReport:
    """Sends one node's progress and chunks to the client that queued the prompt.

    Args:
        node_id: of the node that samples.
        model: its MODEL; decides how latents become pictures.
    """

    def __init__(self, node_id: str, model: ModelPatcher) -> None:
        self.node_id = node_id
        self.start = time.perf_counter()
        self.frames_of = preview_of(model)
        self.chunks = 0
        self.latent_frames = 0

    def progress(self, progress: Progress) -> None:
        """After every forward."""
        self.chunks = progress.chunks
        self._send(
            PROGRESS_EVENT,
            forwards=progress.forwards,
            total=progress.total,
            chunk=progress.chunk + 1,
            chunks=progress.chunks,
            # A forward that only fills the cache is step 0 of 0.
            step=max(progress.step + 1, 0),
            steps=progress.steps,
        )

    def chunk(self, chunk: Chunk) -> None:
        """After every finished chunk: its first clip's frames, as pictures."""
        self.latent_frames = chunk.start_frame + chunk.latents.shape[2]
        frames = [] if self.frames_of is None else self.frames_of(chunk.latents[0].movedim(1, 0))
        self._send(
            CHUNK_EVENT,
            chunk=chunk.index + 1,
            chunks=self.chunks,
            pixel_frames=4 * self.latent_frames - 3,
            fps=LATENT_FPS,
            frames=[picture(frame) for frame in frames],
        )

    def _send(self, event: str, **data: Any) -> None:
        server = PromptServer.instance
        elapsed = time.perf_counter() - self.start
        data = {"node": self.node_id, "prompt_id": server.last_prompt_id, "elapsed": elapsed, **data}
        server.send_sync(event, data, server.client_id)


def preview_of(model: ModelPatcher) -> Callable[[Tensor], Iterable[Image.Image]] | None:
    """How latents [T, 16, h, w] in the model's space become pictures; None where nothing is known of them.

    The method that the user chose in ComfyUI where there is one, else the cheap one: a linear map to colours.
    """
    decode = model.attachments.get(PREVIEW_ATTACHMENT)
    if decode is not None:

        def decoded(latents: Tensor) -> Iterable[Image.Image]:
            pixels = decode(latents.float().cpu()).add(1).mul(127.5).clamp(0, 255).to(torch.uint8)
            return (Image.fromarray(frame.movedim(0, -1).numpy()) for frame in pixels)

        return decoded
    latent_format = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None:
        if latent_format.latent_rgb_factors is None:
            return None
        previewer = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors,
            latent_format.latent_rgb_factors_bias,
            latent_format.latent_rgb_factors_reshape,
        )
    return lambda latents: (
        previewer.decode_latent_to_preview_image("JPEG", frame[None, :, None])[1] for frame in latents
    )


def picture(image: Image.Image) -> str:
    """An image as the address of its own JPEG."""
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = python_io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
