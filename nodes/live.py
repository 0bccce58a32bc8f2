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
PIXEL_FRAMES_A_PICTURE = 4  # as many as a latent frame stands for
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
        self.frames_of = preview_of(model)

    def progress(self, progress: Progress) -> None:
        """After every forward."""
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
        """After every finished chunk: the first clip's frames, quickly made."""
        frames = [] if self.frames_of is None else self.frames_of(chunk.latents[0].movedim(1, 0))
        self._send_pictures(frames, 4 * (chunk.start_frame + chunk.latents.shape[2]) - 3)

    def frames(self, images: Tensor, made: int) -> None:
        """After decoded frames [n, H, W, 3] in [0, 1]: one in four of them. `made` in this run, these included.

        May be called in another thread, as ComfyUI's own send functions may.
        """
        pixels = images[::PIXEL_FRAMES_A_PICTURE].mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        self._send_pictures((Image.fromarray(frame) for frame in pixels), made)

    def _send_pictures(self, pictures: Iterable[Image.Image], pixel_frames: int) -> None:
        self._send(
            CHUNK_EVENT,
            pixel_frames=pixel_frames,
            fps=PICTURES_A_SECOND,
            frames=[as_address(picture) for picture in pictures],
        )

    def _send(self, event: str, **data: Any) -> None:
        server = PromptServer.instance
        elapsed = time.perf_counter() - self.start
        data = {"node": self.node_id, "prompt_id": server.last_prompt_id, "elapsed": elapsed, **data}
        server.send_sync(event, data, server.client_id)


def preview_callback(model: ModelPatcher) -> Callable[[int, Tensor, Tensor, int], None]:
    """ComfyUI's callback for its progress bar and its own previews."""
    callback = None

    def preview(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        # The previewer is made at the first forward: only then is the number of forwards settled.
        nonlocal callback
        if callback is None:
            callback = latent_preview.prepare_callback(model, total)
        callback(step, denoised, x, total)

    return preview


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


def as_address(image: Image.Image) -> str:
    """An image as the address of its own JPEG."""
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = python_io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
