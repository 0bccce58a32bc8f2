"""Pictures of a run that goes on: latents and frames as small images, quickly made."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..diagonal_sampler.noise import pinned_empty

PREVIEW_ATTACHMENT = "diagonal_preview"
"""ModelPatcher attachment: a function from latents [T, 16, h, w] in the model's space to frames [T, 3, H, W] in
[-1, 1], for models whose latents ComfyUI's own preview does not know."""
LARGEST_SIDE = 320  # pixels of a preview frame
PIXEL_FRAMES_A_PICTURE = 4  # as many as a latent frame stands for
log = logging.getLogger(__name__)


def preview_callback(model: ModelPatcher) -> Callable[[int, Tensor, Tensor, int], None]:
    """ComfyUI's callback for its progress bar and its own previews. A preview that fails, as another pack's may, is
    logged and left out from there on; the progress bar goes on."""
    callback = None

    def preview(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        # The previewer is made at the first forward: only then is the number of forwards settled.
        nonlocal callback
        try:
            if callback is None:
                callback = latent_preview.prepare_callback(model, total)
            callback(step, denoised, x, total)
        except Exception as error:  # a Cancel is none: ComfyUI's interrupt is a BaseException
            tell_of_failure(error)
            bar = comfy.utils.ProgressBar(total)

            def callback(step: int, _denoised: Tensor, _x: Tensor, total: int) -> None:
                bar.update_absolute(step + 1, total)

            callback(step, denoised, x, total)

    return preview


def tell_of_failure(error: Exception) -> None:
    """A preview is not worth a run."""
    log.warning(
        "This run goes on without previews, which failed: %s: %s. ComfyUI's setting of the preview method, or the "
        "previews of another node pack, may be why.",
        type(error).__name__,
        error,
    )


@dataclass(frozen=True, slots=True)
class PictureMaker:
    """Makes pictures of a chunk's latents [B, 16, T, h, w] in the model's space: T of the first sample.

    Attributes:
        make: does so.
        on_cpu: it computes there alone, so that another thread may use it while the model samples. What computes on the
            model's device may have ComfyUI load something, whose memory management is not made for two threads.
    """

    make: Callable[[Tensor], Iterable[Image.Image]]
    on_cpu: bool

    def __call__(self, latents: Tensor) -> Iterable[Image.Image]:
        return self.make(latents)


def on_its_way(latents: Tensor) -> tuple[Tensor, Callable[[], None]] | None:
    """A copy of the first sample of latents [B, ...] that is on its way from CUDA to the CPU, and what waits for it.

    None for latents of another device, and where memory cannot be pinned: the copy would halt the host until then.
    """
    if latents.device.type != "cuda":
        return None
    copy = pinned_empty(latents[:1].shape, latents.dtype)
    if copy is None:
        return None
    copy.copy_(latents[:1], non_blocking=True)
    there = torch.cuda.Event(blocking=True)  # what waits for it is to sleep, not to keep a core busy
    there.record(torch.cuda.current_stream(latents.device))
    return copy, there.synchronize


def preview_of(model: ModelPatcher) -> PictureMaker | None:
    """How a model's latents become pictures; None where nothing is known of them.

    The method that the user chose in ComfyUI where there is one, else the cheap one: a linear map to colours.
    """
    decode = model.attachments.get(PREVIEW_ATTACHMENT)
    if decode is not None:

        def decoded(latents: Tensor) -> Iterable[Image.Image]:
            pixels = decode(latents[0].movedim(1, 0).float().cpu()).add(1).mul(127.5).clamp(0, 255).to(torch.uint8)
            return (Image.fromarray(frame.movedim(0, -1).numpy()) for frame in pixels)

        return PictureMaker(decoded, on_cpu=True)
    latent_format = model.model.latent_format
    linear = None
    if latent_format.latent_rgb_factors is not None:
        linear = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors,
            latent_format.latent_rgb_factors_bias,
            latent_format.latent_rgb_factors_reshape,
        )
    chosen = _chosen(model.load_device, latent_format) or linear
    if chosen is None:
        return None

    def pictures(latents: Tensor) -> Iterable[Image.Image]:
        for frame in range(latents.shape[2]):
            latent = latents[:1, :, frame : frame + 1]
            # What a pack puts in ComfyUI's place may give none.
            made = _made_by(chosen, latent)
            if made is None and linear is not None:
                made = _made_by(linear, latent)
            if made is not None:
                yield made[1]

    return PictureMaker(pictures, on_cpu=isinstance(chosen, latent_preview.Latent2RGBPreviewer))


def _chosen(device: torch.device, latent_format: comfy.latent_formats.LatentFormat) -> Any:
    """The previewer of the method that the user chose, None without one.

    A pack that plays previews by itself (VideoHelperSuite's, once asked to) puts one around it that gives no pictures;
    shown single frames it would play those, beside the clip that ComfyUI's callback shows it. There what lies under the
    pack's `get_previewer` is asked instead.
    """
    get = latent_preview.get_previewer
    chosen = get(device, latent_format)
    while _plays_by_itself(chosen) and (under := getattr(get, "__wrapped__", None)) is not None:
        get, chosen = under, under(device, latent_format)
    return chosen


def _plays_by_itself(previewer: Any) -> bool:
    """Whether a previewer makes ComfyUI's pictures in a way of its own, as none of ComfyUI's does."""
    made = getattr(type(previewer), "decode_latent_to_preview_image", None)
    return made not in (None, latent_preview.LatentPreviewer.decode_latent_to_preview_image)


def _made_by(previewer: latent_preview.LatentPreviewer, latent: Tensor) -> tuple | None:
    """What a previewer makes of a latent frame [1, 16, 1, h, w]; the picture is the second of it.

    The linear map is computed on the CPU: of latents on a GPU ComfyUI copies the colours without waiting for them, and
    the picture would be read before they are there.
    """
    if isinstance(previewer, latent_preview.Latent2RGBPreviewer):
        latent = latent.cpu()
    return previewer.decode_latent_to_preview_image("JPEG", latent)


def frame_pictures(images: Tensor) -> Iterable[Image.Image]:
    """Decoded frames [n, H, W, 3] in [0, 1] as pictures, one in four of them."""
    pixels = images[::PIXEL_FRAMES_A_PICTURE].mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return (Image.fromarray(frame) for frame in pixels)


def as_address(image: Image.Image) -> str:
    """An image as the address of its own JPEG."""
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
