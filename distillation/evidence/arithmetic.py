"""Arithmetic of a clip: what a speed-up can be at a given size, whatever the machine."""

from __future__ import annotations

from dataclasses import dataclass

from diagonal_sampler.captions import CaptionEncoder
from diagonal_sampler.dit import WanConfig, causal_views
from diagonal_sampler.sampler import split_frames
from distillation import recipes
from distillation.evidence.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and a clip: latent frames, tokens of a latent frame, tokens of the text."""

    config: WanConfig
    frames: int
    tokens: int
    text_tokens: int


WAN_1_3B_480P = Size(config=WanConfig(), frames=21, tokens=30 * 52, text_tokens=512)
"""The paper's setting: Wan 2.1 1.3B, 832x480, 81 pixel frames."""
DEMO_SIZE = Size(config=recipes.demo().model, frames=21, tokens=4 * 4, text_tokens=CaptionEncoder.num_tokens)
"""The demo's: 64x64, 81 pixel frames."""


def forward_flops(size: Size, frames: int, visible: int) -> int:
    """Operations (two a multiply-add) of one forward's matrix products.

    Linear layers of the blocks: 2 * tokens * weights; attention: 4 * queries * keys * channels for scores and sum.
    Left out, as they are below 3% of it even in the demo: patches, head, and the embedding of the timestep.

    Args:
        frames: latent frames denoised.
        visible: latent frames that they attend to, themselves included.
    """
    config, queries, keys = size.config, frames * size.tokens, visible * size.tokens
    dim = config.dim
    weights = 6 * dim * dim + 2 * dim * config.ffn_dim  # q, k, v, o; the text's q and o; feed-forward
    text = 2 * 2 * dim * dim * size.text_tokens  # the text's k and v
    block = 2 * queries * weights + text + 4 * queries * (keys + size.text_tokens) * dim
    return config.num_layers * block


def clip_flops(row: Row, size: Size) -> int:
    """Operations of a clip as the row samples it, both halves of guidance and the cache passes included."""
    settings = row.settings_for(size.frames)
    chunks = split_frames(size.frames, settings.frames_per_chunk)
    total = 0
    for chunk, view in enumerate(causal_views(size.frames, 1, settings)):
        forwards = row.schedule.nfe(chunk + 1) - row.schedule.nfe(chunk)
        total += forwards * forward_flops(size, chunks[chunk], sum(run.stop - run.start for run in view.keys))
    return total * (1 if row.cfg == 1 else 2)
