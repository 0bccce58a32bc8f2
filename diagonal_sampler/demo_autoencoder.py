"""The demo's video autoencoder: Wan's latent geometry at a cost a CPU can pay.

Geometry is Wan's: 16 channels, 8x smaller in space, 4x in time with the first frame alone, so T pixel frames
give (T - 1) // 4 + 1 latent frames. Inside there is no 3D convolution: the 4 pixel frames of a latent frame are
stacked in channels and 2D convolutions do the rest. No layer sees two latent frames, so decoding chunk by chunk
equals decoding whole, by construction. The first frame is encoded as four copies of itself, and decoded as the
last of four.

The encoder is one linear layer: a fixed projection of each 8x8x4 patch onto its principal components over the
training clips, scaled to deviation 1. Linear latents move smoothly when a sprite moves, which is what makes them easy
for a small DiT; a convolutional encoder, tried first, reconstructed better and was much harder to model. The decoder
is a convolutional network and recovers from the neighbouring patches much of what 14 components leave out.

The last two channels hold where a patch is, from -1.5 at the left (top) to 1.5 at the right (bottom). Wan's attention
knows relative positions only, and a sprite that bounces must know the edge. The decoder does not look at them.

Latent space. Called *standardised* here: mean 0, deviation 1 per channel over the training clips. ComfyUI's Wan
format computes (latent - mean) / std with the constants below before the DiT, and the inverse after it. `encode`
therefore returns standardised * std + mean, which the format turns back into the standardised latents: they are what
the DiT sees, under the format of every Wan model.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .frames import TIME_FACTOR, latent_frames, pixel_frames
from .weight_files import read_described, write_weights

LATENT_CHANNELS = 16
SPACE_FACTOR = 8
COMPONENTS = 14
"""Principal components of a patch; the other two channels are its place."""
POSITION_RANGE = 1.5
"""Magnitude of the place channels at the edges, for a deviation near 1."""
_SHUFFLE = 4
"""Pixels per side that the decoder's last layer makes of one cell; an earlier layer makes up the other 2x."""

# The constants of Wan 2.1's latent format, channel by channel.
WAN_LATENT_MEAN: tuple[float, ...] = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD: tuple[float, ...] = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DemoAutoencoderConfig:
    """Decoder sizes: channels at 1/8 and at 1/4 resolution, and residual blocks at each."""

    inner_dim: int = 192
    outer_dim: int = 128
    blocks: int = 2

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

    wan_mean: Tensor
    wan_std: Tensor

    def __init__(self, config: DemoAutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DemoAutoencoderConfig()
        shuffled = 3 * TIME_FACTOR * _SHUFFLE**2
        self.encoder = nn.Conv2d(3 * TIME_FACTOR, COMPONENTS, SPACE_FACTOR, stride=SPACE_FACTOR)
        self.encoder.requires_grad_(False)
        self.decoder = nn.Sequential(
            nn.Conv2d(COMPONENTS, c.inner_dim, 3, padding=1),
            *(_Residual(c.inner_dim) for _ in range(c.blocks)),
            nn.Conv2d(c.inner_dim, 4 * c.outer_dim, 1),
            nn.PixelShuffle(2),
            *(_Residual(c.outer_dim) for _ in range(c.blocks)),
            nn.SiLU(),
            nn.Conv2d(c.outer_dim, shuffled, 3, padding=1),
            nn.PixelShuffle(_SHUFFLE),
        )
        self.register_buffer("wan_mean", torch.tensor(WAN_LATENT_MEAN), persistent=False)
        self.register_buffer("wan_std", torch.tensor(WAN_LATENT_STD), persistent=False)

    # The two halves on groups: what training and the two public methods share.

    @torch.no_grad()
    def fit_encoder(self, groups: Tensor) -> float:
        """Sets the encoder to the leading principal components of patches, scaled to deviation 1.

        Args:
            groups: [N, 12, H, W] in [-1, 1], groups of four frames as `encode_groups` takes them.

        Returns:
            The share of the patches' variance that the components keep.
        """
        patches = F.unfold(groups, SPACE_FACTOR, stride=SPACE_FACTOR).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        centred = patches - mean
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
        kept, basis = variance.flip(0)[:COMPONENTS], basis.flip(1)[:, :COMPONENTS]
        basis = basis * basis.sum(0).sign()  # an eigenvector's sign is arbitrary: settle it
        weight = (basis / kept.sqrt()).T
        self.encoder.weight.copy_(weight.view_as(self.encoder.weight))
        assert self.encoder.bias is not None
        self.encoder.bias.copy_(-(weight @ mean))
        return float(kept.sum() / variance.sum())

    def encode_groups(self, groups: Tensor) -> Tensor:
        """[N, 12, H, W] groups of four frames (frame-major channels) -> standardised latents [N, 16, H/8, W/8]."""
        components = self.encoder(groups)
        count, _, height, width = components.shape
        x, y = (
            torch.linspace(-POSITION_RANGE, POSITION_RANGE, size, dtype=components.dtype, device=components.device)
            for size in (width, height)
        )
        place = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
        return torch.cat([components, place.expand(count, -1, -1, -1)], dim=1)

    def decode_groups(self, latent: Tensor) -> Tensor:
        """Standardised latents [N, 16, h, w] -> groups [N, 12, 8h, 8w], not clamped."""
        return self.decoder(latent[:, :COMPONENTS])

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
        name: value.detach().half().cpu() if value.is_floating_point() else value.cpu()
        for name, value in model.state_dict().items()
    }
    write_weights(path, state, header)


def load_demo_autoencoder(path: str | os.PathLike[str]) -> DemoAutoencoder:
    """Reads what `save_demo_autoencoder` wrote; float32, on the CPU, in eval mode.

    Raises:
        ValueError: if the file's header does not name it as a demo autoencoder.
    """
    config, state = read_described(path, "demo_autoencoder", "the demo's autoencoder", "demo_autoencoder.safetensors")
    model = DemoAutoencoder(DemoAutoencoderConfig(**config))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
