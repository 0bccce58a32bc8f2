"""The demo's video autoencoder: Wan's latent geometry at a cost a CPU can pay.

Geometry is Wan's: 16 channels, 8x smaller in space, 4x in time with the first frame alone, so T pixel frames
give (T - 1) // 4 + 1 latent frames. Inside there is no 3D convolution: the 4 pixel frames of a latent frame are
stacked in channels and 2D convolutions do the rest. No layer sees two latent frames, so decoding chunk by chunk
equals decoding whole, by construction. The first frame is encoded as four copies of itself, and decoded as the
last of four.

Latent space. The network's own latents are standardised per channel (mean 0, deviation 1 over the training
clips, measured by a BatchNorm without affine). ComfyUI's Wan format computes (latent - mean) / std with the
constants below before the DiT, and the inverse after it. `encode` therefore returns own * std + mean, which the
format turns back into the standardised latents: they are what the DiT sees, under the format of every Wan model.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LATENT_CHANNELS = 16
SPACE_FACTOR = 8
TIME_FACTOR = 4
_PATCH = 4
"""Pixels per side folded into channels at the outermost layers; one strided layer makes up the other 2x."""

# The constants of Wan 2.1's latent format, channel by channel.
WAN_LATENT_MEAN: tuple[float, ...] = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD: tuple[float, ...] = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of a clip of `pixel_frames` frames: (T - 1) // 4 + 1."""
    return (pixel_frames - 1) // TIME_FACTOR + 1


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames a decoder makes of `latent_frames`: 4 * (T - 1) + 1."""
    return TIME_FACTOR * (latent_frames - 1) + 1


@dataclass(frozen=True, slots=True)
class DemoAutoencoderConfig:
    """Widths and depths: `*_dim` at 1/4 and 1/8 resolution, residual blocks at each."""

    encoder_dim: int = 96
    encoder_inner_dim: int = 192
    encoder_blocks: int = 1
    decoder_dim: int = 128
    decoder_inner_dim: int = 192
    decoder_blocks: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be positive")


class _Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class DemoAutoencoder(nn.Module):
    """Encodes and decodes clips; see the module's docstring for geometry and latent space."""

    def __init__(self, config: DemoAutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DemoAutoencoderConfig()
        patch_channels = 3 * TIME_FACTOR * _PATCH**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_PATCH),
            nn.Conv2d(patch_channels, c.encoder_dim, 3, padding=1),
            *(_Residual(c.encoder_dim) for _ in range(c.encoder_blocks)),
            nn.Conv2d(c.encoder_dim, c.encoder_inner_dim, 2, stride=2),
            *(_Residual(c.encoder_inner_dim) for _ in range(c.encoder_blocks)),
            nn.SiLU(),
            nn.Conv2d(c.encoder_inner_dim, LATENT_CHANNELS, 3, padding=1),
        )
        self.standardise = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, c.decoder_inner_dim, 3, padding=1),
            *(_Residual(c.decoder_inner_dim) for _ in range(c.decoder_blocks)),
            nn.Conv2d(c.decoder_inner_dim, 4 * c.decoder_dim, 1),
            nn.PixelShuffle(2),
            *(_Residual(c.decoder_dim) for _ in range(c.decoder_blocks)),
            nn.SiLU(),
            nn.Conv2d(c.decoder_dim, patch_channels, 3, padding=1),
            nn.PixelShuffle(_PATCH),
        )
        self.register_buffer("wan_mean", torch.tensor(WAN_LATENT_MEAN), persistent=False)
        self.register_buffer("wan_std", torch.tensor(WAN_LATENT_STD), persistent=False)

    # The two halves on groups: what training and the two public methods share.

    def encode_groups(self, groups: Tensor) -> Tensor:
        """[N, 12, H, W] groups of four frames (frame-major channels) -> standardised latents [N, 16, H/8, W/8]."""
        return self.standardise(self.encoder(groups))

    def decode_groups(self, latent: Tensor) -> Tensor:
        """Standardised latents [N, 16, h, w] -> groups [N, 12, 8h, 8w], not clamped."""
        return self.decoder(latent)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes a clip.

        Args:
            pixels: [B, 3, T, H, W] in [-1, 1]; H and W multiples of 8. Frames beyond the last whole group of
                1 + 4n are dropped, as Wan's own autoencoder does.

        Returns:
            [B, 16, (T - 1) // 4 + 1, H / 8, W / 8] in Wan's latent scale (see the module's docstring).

        Raises:
            ValueError: if the shape does not fit.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3 or pixels.shape[2] < 1:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}; give [B, 3, T, H, W] with T at least 1")
        height, width = pixels.shape[-2:]
        if height % SPACE_FACTOR or width % SPACE_FACTOR or not height or not width:
            nearest = [max(SPACE_FACTOR, round(n / SPACE_FACTOR) * SPACE_FACTOR) for n in (height, width)]
            raise ValueError(
                f"pixels are {height}x{width}; height and width must be multiples of {SPACE_FACTOR}, "
                f"the nearest is {nearest[0]}x{nearest[1]}"
            )
        batch, length = pixels.shape[0], latent_frames(pixels.shape[2])
        first = pixels[:, :, :1].expand(-1, -1, TIME_FACTOR, -1, -1)
        clip = torch.cat([first, pixels[:, :, 1 : pixel_frames(length)]], dim=2)
        groups = rearrange(clip, "b c (t f) h w -> (b t) (f c) h w", f=TIME_FACTOR)
        latent = rearrange(self.encode_groups(groups), "(b t) c h w -> b c t h w", b=batch)
        return latent * self.wan_std.view(1, -1, 1, 1, 1) + self.wan_mean.view(1, -1, 1, 1, 1)

    def decode(self, latent: Tensor, *, has_first_frame: bool = True) -> Tensor:
        """Decodes latents.

        Args:
            latent: [B, 16, T, h, w] in Wan's latent scale.
            has_first_frame: whether latent frame 0 is the first of its clip and so stands for one pixel frame.
                False for a later chunk of a streamed clip: then every latent frame gives 4.

        Returns:
            pixels [B, 3, 4 * (T - 1) + 1 or 4 * T, 8h, 8w] in [-1, 1].

        Raises:
            ValueError: if the shape does not fit.
        """
        if latent.ndim != 5 or latent.shape[1] != LATENT_CHANNELS or latent.shape[2] < 1:
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}; give [B, {LATENT_CHANNELS}, T, h, w] with T at least 1"
            )
        own = (latent - self.wan_mean.view(1, -1, 1, 1, 1)) / self.wan_std.view(1, -1, 1, 1, 1)
        groups = self.decode_groups(rearrange(own, "b c t h w -> (b t) c h w")).clamp(-1, 1)
        clip = rearrange(groups, "(b t) (f c) h w -> b c (t f) h w", b=latent.shape[0], f=TIME_FACTOR)
        return clip[:, :, TIME_FACTOR - 1 :] if has_first_frame else clip


def save_demo_autoencoder(model: DemoAutoencoder, path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Writes the weights, with the configuration under the header key `demo_autoencoder`, atomically."""
    header = {**metadata, "demo_autoencoder": json.dumps(asdict(model.config))}
    state = {
        name: value.detach().half().cpu().contiguous() if value.is_floating_point() else value.cpu()
        for name, value in model.state_dict().items()
    }
    partial = Path(path).with_suffix(".partial")
    save_file(state, partial, metadata=header)
    os.replace(partial, path)


def load_demo_autoencoder(path: str | os.PathLike[str]) -> DemoAutoencoder:
    """Reads what `save_demo_autoencoder` wrote; float32, on the CPU, in eval mode.

    Raises:
        ValueError: if the file's header does not name it as a demo autoencoder.
    """
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get("demo_autoencoder")
    if header is None:
        raise ValueError(
            f"path={os.fspath(path)!r} has no 'demo_autoencoder' entry in its safetensors header, so it is not the "
            "demo's autoencoder; give the demo_autoencoder.safetensors of this pack"
        )
    model = DemoAutoencoder(DemoAutoencoderConfig(**json.loads(header)))
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
