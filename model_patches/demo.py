"""The bundled demo as ordinary ComfyUI values: a MODEL, a CLIP and a VAE that standard nodes accept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..diagonal_sampler.captions import CaptionEncoder, CaptionEncoderConfig, load_caption_encoder, tokenize_captions
from ..diagonal_sampler.demo_autoencoder import LATENT_CHANNELS, SPACE_FACTOR, load_demo_autoencoder
from ..diagonal_sampler.frames import TIME_FACTOR, latent_frames, pixel_frames
from ..diagonal_sampler.provenance import causal_settings
from .causal import make_causal
from .loading import load_wan

TOKENS_KEY = "demo"
# Float32 bytes of activations a pixel while the autoencoder runs; measured high at its widest layer.
ACTIVATION_BYTES_PER_PIXEL = 256


class DemoTokenizer:
    """ComfyUI's tokenizer contract over the demo's caption language."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """Attribute ids [1, clauses, roles]. Raises ValueError, listing the known words, for other captions."""
        return {TOKENS_KEY: tokenize_captions([text])}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class DemoTextModel(nn.Module):
    """ComfyUI's text model contract over the demo's caption encoder; always float32, it is tiny."""

    dtypes = frozenset({torch.float32})

    def __init__(self, config: CaptionEncoderConfig, **kwargs: Any) -> None:
        super().__init__()
        self.encoder = CaptionEncoder(config).eval().requires_grad_(False)

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict[str, Any]) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, Tensor]) -> tuple[Tensor, None]:
        """The context [1, tokens, text_dim], and no pooled vector."""
        context = self.encoder(tokens[TOKENS_KEY].to(self.encoder.position.device))
        return context.to(comfy.model_management.intermediate_device()), None

    def load_sd(self, sd: dict[str, Tensor]):
        return self.encoder.load_state_dict(sd)


def load_demo_model(path: Path) -> comfy.model_patcher.ModelPatcher:
    """The demo's causal MODEL, with the attention window it was trained with."""
    model, info = load_wan(path)
    settings, _ = causal_settings(info.provenance)
    return make_causal(model, settings)


def load_demo_clip(path: Path) -> comfy.sd.CLIP:
    """The demo's CLIP, for CLIPTextEncode."""
    encoder = load_caption_encoder(path)
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, partial(DemoTextModel, encoder.config))
    parameters = sum(p.numel() for p in encoder.parameters())
    return comfy.sd.CLIP(target, parameters=parameters, state_dict=[load_file(path)], disable_dynamic=True)


def demo_preview(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from latents [T, 16, h, w] in the model's space to one frame each, [T, 3, 8h, 8w] in [-1, 1].

    It holds a decoder of its own on the CPU: the VAE's may be anywhere while the model samples, and this one is quick.
    """
    autoencoder = load_demo_autoencoder(path)
    return torch.inference_mode()(lambda latents: autoencoder.decode_groups(latents)[:, -3:])


class _NoWeightsWarning(logging.Filter):
    """Drops the one message of a VAE that is made empty on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "No VAE weights detected" not in record.getMessage()


def load_demo_vae(path: Path) -> comfy.sd.VAE:
    """The demo's VAE, for VAEDecode and VAEEncode."""
    silence = _NoWeightsWarning()
    root = logging.getLogger()
    root.addFilter(silence)
    try:
        # An empty VAE carries ComfyUI's own defaults, whatever its version; what follows is what differs.
        vae = comfy.sd.VAE(sd={})
    finally:
        root.removeFilter(silence)
    vae.first_stage_model = load_demo_autoencoder(path)
    vae.latent_channels = LATENT_CHANNELS
    vae.latent_dim = 3
    vae.downscale_ratio = (latent_frames, SPACE_FACTOR, SPACE_FACTOR)
    vae.downscale_index_formula = (TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR)
    vae.upscale_ratio = (pixel_frames, SPACE_FACTOR, SPACE_FACTOR)
    vae.upscale_index_formula = (TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR)
    pixels_per_latent = TIME_FACTOR * SPACE_FACTOR**2
    vae.memory_used_encode = lambda shape, dtype: ACTIVATION_BYTES_PER_PIXEL * shape[2] * shape[3] * shape[4]
    vae.memory_used_decode = lambda shape, dtype: (
        ACTIVATION_BYTES_PER_PIXEL * pixels_per_latent * shape[2] * shape[3] * shape[4]
    )
    vae.working_dtypes = [torch.float32]
    vae.vae_dtype = torch.float32
    vae.device = comfy.model_management.vae_device()
    vae.output_device = comfy.model_management.intermediate_device()
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.model_size()
    return vae
