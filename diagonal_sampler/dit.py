"""A trainable Wan 2.1 text-to-video transformer in plain torch, with Wan's state-dict names.

One network, three forwards that differ by what a token may see: everything (the bidirectional teacher), its own and
earlier chunks (causal training in one pass), or its chunk and a KV cache (streaming).

Shape suffixes: B batch, T latent frames, S tokens of a latent frame, L = T*S tokens, N heads, D channels a head,
C channels of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import ConditionKV
from .flow_adapter import adapter_tokens
from .rope import rotate, rotation_table
from .sampler import split_frames
from .settings import GLOBAL_WINDOW, CausalSettings
from .wan_layout import ADAPTER_CHANNELS, FLOW_ADAPTER_KEYS, HEAD_DIM


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """Sizes of a Wan 2.1 text-to-video model; the defaults are the 1.3B model's.

    Raises:
        ValueError: `dim` is no multiple of 128 (ComfyUI reads the number of heads from it), or a size below 1.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_layers: int = 30
    text_dim: int = 4096
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    flow_adapter: bool = False
    """With `flow_embedding`, a convolution over optical flow whose result is added to the tokens."""

    def __post_init__(self) -> None:
        if self.dim < HEAD_DIM or self.dim % HEAD_DIM:
            raise ValueError(
                f"dim is {self.dim}; it must be a positive multiple of {HEAD_DIM}, the channels of a head."
            )
        for name in ("ffn_dim", "num_layers", "text_dim", "in_channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}; it must be even and positive, half cosines, half sines.")

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> WanConfig:
        """Read the sizes from a bare Wan state dict.

        Raises:
            KeyError: a tensor that the sizes are read from is missing.
        """
        patch = state_dict["patch_embedding.weight"].shape
        patch_size = (int(patch[2]), int(patch[3]), int(patch[4]))
        pixels = patch_size[0] * patch_size[1] * patch_size[2]
        return cls(
            dim=patch[0],
            ffn_dim=state_dict["blocks.0.ffn.0.weight"].shape[0],
            num_layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
            text_dim=state_dict["text_embedding.0.weight"].shape[1],
            in_channels=patch[1],
            out_channels=state_dict["head.head.weight"].shape[0] // pixels,
            freq_dim=state_dict["time_embedding.0.weight"].shape[1],
            patch_size=patch_size,
            flow_adapter=FLOW_ADAPTER_KEYS[0] in state_dict,
        )


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [..., dim] of timesteps in [0, 1000]; cosines first (Wan's order)."""
    half = dim // 2
    frequency = torch.pow(10000, -torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angle = timestep.float()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@dataclass(frozen=True, slots=True)
class View:
    """What one chunk of a whole-clip causal forward sees: its tokens, and the runs of tokens that they attend to."""

    queries: slice
    keys: tuple[slice, ...]

    def keys_of(self, x_BNLD: Tensor) -> Tensor:
        """The rows of keys or values that the chunk attends to."""
        runs = [x_BNLD[:, :, run] for run in self.keys]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)


def causal_views(total_frames: int, tokens_per_frame: int, settings: CausalSettings) -> tuple[View, ...]:
    """The KV cache's window and sink as one View a chunk, for training in one forward with absolute positions."""
    views = []
    start = 0
    for frames in split_frames(total_frames, settings.frames_per_chunk):
        end = start + frames
        oldest = 0 if settings.window == GLOBAL_WINDOW else max(0, end - (settings.window - settings.sink))
        if oldest <= settings.sink or end <= settings.window:
            runs = [(0, end)]
        else:
            runs = [(0, settings.sink), (oldest, end)]
        keys = tuple(slice(a * tokens_per_frame, b * tokens_per_frame) for a, b in runs if a < b)
        views.append(View(slice(start * tokens_per_frame, end * tokens_per_frame), keys))
        start = end
    return tuple(views)


def normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """`norm(x)` computed in the weight's dtype, in that of `x`.

    Under autocast `x` is bf16 and the weight float32. Given so, torch has no fused kernel and keeps six float32 copies
    of `x` for the backward pass.
    """
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention with RMS-normalised queries and keys (over all heads at once, as Wan does) and rotary positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)

    def _heads(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (self.heads, -1))

    def attend(self, q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, views: Sequence[View] | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q_BLND, k_BLND, v_BLND))
        v = v.to(q.dtype)
        if views is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            # Chunk by chunk instead of through a mask: only visible keys are read, and any attention kernel will do.
            out = torch.cat(
                [
                    F.scaled_dot_product_attention(q[:, :, view.queries], view.keys_of(k), view.keys_of(v))
                    for view in views
                ],
                dim=2,
            )
        return self.o(out.transpose(1, 2).flatten(2))

    def forward(
        self,
        x_BLC: Tensor,
        rope_LP2: Tensor,
        views: Sequence[View] | None,
        cache: ConditionKV | None,
        layer: int,
    ) -> Tensor:
        q = rotate(self._heads(normalise(self.norm_q, self.q(x_BLC))), rope_LP2)
        k = rotate(self._heads(normalise(self.norm_k, self.k(x_BLC))), rope_LP2)
        v = self._heads(self.v(x_BLC))
        if cache is not None:
            k, v = cache.update(layer, k, v)
        return self.attend(q, k, v, views)


class CrossAttention(SelfAttention):
    """Attention from video tokens to text tokens; no positions."""

    def forward(self, x_BLC: Tensor, context_BLC: Tensor) -> Tensor:  # type: ignore[override]
        q = self._heads(normalise(self.norm_q, self.q(x_BLC)))
        k = self._heads(normalise(self.norm_k, self.k(context_BLC)))
        return self.attend(q, k, self._heads(self.v(context_BLC)))


def modulate(x_BTSC: Tensor, shift_BTC: Tensor, scale_BTC: Tensor) -> Tensor:
    """Adaptive layer norm's affine part; a latent frame's tokens share shift and scale."""
    return x_BTSC * (1 + scale_BTC[:, :, None]) + shift_BTC[:, :, None]


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, modulated by the timestep of each latent frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x_BTSC: Tensor,
        time_BT6C: Tensor,
        context_BLC: Tensor,
        rope_LP2: Tensor,
        views: Sequence[View] | None,
        cache: ConditionKV | None,
        layer: int,
    ) -> Tensor:
        frames = x_BTSC.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None] + time_BT6C).unbind(2)
        y = modulate(self.norm1(x_BTSC), shift1, scale1).flatten(1, 2)
        y = self.self_attn(y, rope_LP2, views, cache, layer).unflatten(1, (frames, -1))
        x_BTSC = x_BTSC + y * gate1[:, :, None]
        y = self.cross_attn(self.norm3(x_BTSC).flatten(1, 2), context_BLC).unflatten(1, (frames, -1))
        x_BTSC = x_BTSC + y
        y = self.ffn(modulate(self.norm2(x_BTSC), shift2, scale2))
        return x_BTSC + y * gate2[:, :, None]


class Head(nn.Module):
    """Modulated projection from tokens to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, pt * ph * pw * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x_BTSC: Tensor, time_BTC: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + time_BTC[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x_BTSC), shift, scale))


# Kept between calls, so it must be a normal tensor also when the first call is one of inference mode: autograd would
# refuse it in a later training step.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rope(frames: int, height: int, width: int, start: float, time_scale: float, device: torch.device) -> Tensor:
    return rotation_table(frames, height, width, HEAD_DIM, start=start, time_scale=time_scale, device=device)


class WanDiT(nn.Module):
    """Wan 2.1 text-to-video transformer that predicts the flow, noise - x0.

    Args:
        config: sizes.

    Attributes:
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations. With a
            cache, the backward pass must then run before the cache is written again.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._initialise()
        if config.flow_adapter:
            self.flow_embedding = nn.Conv3d(
                ADAPTER_CHANNELS, dim, kernel_size=config.patch_size, stride=config.patch_size
            )
            # Zero, so that a model that just got the adapter is the model that it was.
            nn.init.zeros_(self.flow_embedding.weight)
            assert self.flow_embedding.bias is not None
            nn.init.zeros_(self.flow_embedding.bias)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        frames_per_chunk: int | None = None,
        window: int = -1,
        sink: int = 0,
        cache: ConditionKV | None = None,
        optical_flow: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow.

        Args:
            x: [B, in_channels, T, H, W] noisy latent; H and W multiples of the patch (2).
            timestep: 1000*sigma in [0, 1000], [B] for the whole clip or [B, T] a latent frame.
            context: [B, tokens, text_dim] text embedding.
            frames_per_chunk: latent frames a chunk for the causal forward over a whole clip; None sees everything.
            window, sink: latent frames, as in CausalSettings, for that forward.
            cache: the KV cache of this condition for the streaming forward: `x` is then the current chunk.
            optical_flow: [B or 1, 4, T, H, W] motion of the latent frames of `x`, from
                `flow_adapter.adapter_features`; None adds nothing.

        Returns:
            [B, out_channels, T, H, W] flow = noise - x0.

        Raises:
            ValueError: a shape that does not fit, a causal forward over a clip and a cache together, or optical flow
                for a model without the adapter.
        """
        pt, ph, pw = self.config.patch_size
        if x.ndim != 5 or x.shape[1] != self.config.in_channels or x.shape[3] % ph or x.shape[4] % pw:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be [B, {self.config.in_channels}, T, H, W] with H a multiple "
                f"of {ph} and W of {pw}."
            )
        batch, _, total = x.shape[:3]
        if timestep.shape not in ((batch,), (batch, total // pt)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; it must be [{batch}], one for each clip, or "
                f"[{batch}, {total // pt}], one for each of its latent frames."
            )
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != self.config.text_dim:
            raise ValueError(
                f"context has shape {tuple(context.shape)}; it must be [{batch}, tokens, {self.config.text_dim}]."
            )
        if cache is not None and frames_per_chunk is not None:
            raise ValueError("frames_per_chunk is for a whole clip and cache streams one chunk; give one of them.")
        if cache is not None and cache.cache.frames != total:
            raise ValueError(
                f"x has {total} latent frames but the cache's open chunk has {cache.cache.frames}; call begin({total})."
            )
        tokens_BCTHW = self.patch_embedding(x)
        if optical_flow is not None:
            tokens_BCTHW = tokens_BCTHW + self._flow_tokens(optical_flow, x)
        _, _, frames, height, width = tokens_BCTHW.shape
        hidden = rearrange(tokens_BCTHW, "b c t h w -> b t (h w) c")

        if timestep.ndim == 1:
            timestep = timestep[:, None]
        embedded = timestep_embedding(timestep, self.config.freq_dim).to(hidden.dtype)
        time_BTC = self.time_embedding(embedded)
        time_BT6C = self.time_projection(time_BTC).unflatten(-1, (6, -1))
        context_BLC = self.text_embedding(context)

        start, time_scale = (0.0, 1.0) if cache is None else (cache.cache.position, cache.cache.time_scale)
        rope = _rope(frames, height, width, start, time_scale, x.device)
        views = None
        if frames_per_chunk is not None:
            settings = CausalSettings(frames_per_chunk=frames_per_chunk, window=window, sink=sink)
            views = causal_views(frames, height * width, settings)

        for layer, block in enumerate(self.blocks):
            inputs = (hidden, time_BT6C, context_BLC, rope, views, cache, layer)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, *inputs, use_reentrant=False)
            else:
                hidden = block(*inputs)
        patches = self.head(hidden, time_BTC)
        return rearrange(
            patches,
            "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            h=height, w=width, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip

    def _flow_tokens(self, optical_flow: Tensor, x: Tensor) -> Tensor:
        if not self.config.flow_adapter:
            raise ValueError(
                "optical_flow is given but the model has no adapter for it (flow_embedding); make it with "
                "WanConfig(flow_adapter=True), or leave optical_flow out."
            )
        wanted = (ADAPTER_CHANNELS, *x.shape[2:])
        if optical_flow.ndim != 5 or optical_flow.shape[1:] != wanted or optical_flow.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"optical_flow has shape {tuple(optical_flow.shape)}; it must be [{x.shape[0]} or 1, "
                f"{', '.join(map(str, wanted))}], the latent's own frames and size."
            )
        adapter = self.flow_embedding
        assert adapter.bias is not None
        return adapter_tokens(optical_flow.to(x.dtype), adapter.weight, adapter.bias)
