"""A Wan DiT of toy size in which every weight matters, and straightforward references to hold it against."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diagonal_sampler.cache import KVCache
from diagonal_sampler.dit import HEAD_DIM, WanConfig, WanDiT
from diagonal_sampler.settings import CausalSettings

CONFIG = WanConfig(dim=128, ffn_dim=64, num_layers=2, text_dim=8, in_channels=4, out_channels=4, freq_dim=16)
LATENT_SIZE = 4


def tiny_dit(seed: int = 0, config: WanConfig = CONFIG) -> WanDiT:
    """A model with random weights everywhere: a fresh one's head is zero and would hide any mistake before it."""
    model = WanDiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "modulation" not in name:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * draw)
            else:
                parameter.copy_(0.3 * draw)
    return model


def normal(seed: int, *shape: int) -> Tensor:
    """Gaussian numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent(seed: int, frames: int, batch: int = 1) -> Tensor:
    """[B, 4, frames, 4, 4] of Gaussian numbers."""
    return normal(seed, batch, CONFIG.in_channels, frames, LATENT_SIZE, LATENT_SIZE)


def caption(seed: int, batch: int = 1) -> Tensor:
    """[B, 5, text_dim]: a text embedding."""
    return normal(seed, batch, 5, CONFIG.text_dim)


def split(frames: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk, the last perhaps shorter."""
    return [(start, min(start + size, frames)) for start in range(0, frames, size)]


def kept_frames(stop: int, window: int, sink: int) -> list[int]:
    """Latent frames that the chunk which ends before frame `stop` sees, oldest first: the rule in one line."""
    frames = list(range(stop))
    return frames if window < 0 or stop <= window else frames[:sink] + frames[stop - (window - sink) :]


@torch.no_grad()
def stream(model: WanDiT, settings: CausalSettings, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """One cached forward a chunk over the clip `x`; timesteps [B, T] must be constant inside a chunk."""
    cache = KVCache(settings, x.shape[2])
    out = []
    for start, stop in split(x.shape[2], settings.frames_per_chunk):
        cache.begin(stop - start)
        condition = cache.condition("only")
        out.append(model(x[:, :, start:stop], timesteps[:, start], context, cache=condition))
        cache.commit()
    cache.free()
    return torch.cat(out, dim=2)


def turn_in_time(keys: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
    """Rotate keys [B, L, N, D] in time as complex numbers: pair p by the angle position * 10000^(-2p/time_dim)."""
    time_dim = HEAD_DIM - 4 * (HEAD_DIM // 6)
    pairs = torch.view_as_complex(keys[..., :time_dim].double().unflatten(-1, (-1, 2)).contiguous())
    speed = 10000.0 ** (-torch.arange(0, time_dim, 2, dtype=torch.float64) / time_dim)
    turned = pairs * torch.exp(1j * scale * positions.double()[:, None] * speed)[:, None]
    return torch.cat((torch.view_as_real(turned).flatten(-2).to(keys.dtype), keys[..., time_dim:]), dim=-1)


@dataclass
class ListKV:
    """Stands in for ConditionKV: chunks kept in Python lists with keys unturned in time, joined at every forward.

    Serves WanDiT as `cache=`; `position` is the current chunk's. History is detached, the current chunk is not.
    """

    settings: CausalSettings
    total_frames: int
    time_scale: float = 1.0
    start: int = 0
    frames: int = 0
    current: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    history: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)  # frames that were never written

    @property
    def cache(self) -> ListKV:
        return self

    @property
    def counts_in_window(self) -> bool:
        return self.settings.positions == "window" and self.settings.window > 0

    @property
    def first_position(self) -> int:
        kept = len(kept_frames(self.start + self.frames, self.settings.window, self.settings.sink))
        return kept - self.frames if self.counts_in_window else self.start

    @property
    def position(self) -> float:
        return self.first_position * self.time_scale

    def begin(self, frames: int) -> None:
        self.frames = frames

    def commit(self) -> None:
        for layer, (keys, values) in self.current.items():
            per_frame = zip(keys.chunk(self.frames, 1), values.chunk(self.frames, 1), strict=True)
            self.history.setdefault(layer, []).extend((k.detach(), v.detach()) for k, v in per_frame)
        self.start += self.frames
        self.frames = 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = keys.shape[1] // self.frames
        own = (self.first_position + torch.arange(self.frames)).repeat_interleave(tokens)
        unturned = turn_in_time(keys, -own, self.time_scale)
        self.current[layer] = (unturned, values)
        kept = kept_frames(self.start + self.frames, self.settings.window, self.settings.sink)
        kept = [frame for frame in kept if frame not in self.missing]
        past = [self.history[layer][frame] for frame in kept if frame < self.start]
        at = torch.arange(len(kept)) if self.counts_in_window else torch.tensor(kept)
        all_keys = torch.cat([*(k for k, _ in past), unturned], dim=1)
        turned = turn_in_time(all_keys, at.repeat_interleave(tokens), self.time_scale)
        return turned, torch.cat([*(v for _, v in past), values], dim=1)
