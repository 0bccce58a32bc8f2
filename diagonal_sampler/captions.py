"""The demo world's caption language and its text encoder.

The language is tiny and closed: one or two clauses such as ``a red circle moves right`` joined by ``and``. A
caption therefore parses into a small table of attribute ids, and the encoder embeds that table instead of a
word sequence: each clause gets one *slot* token computed from all its attributes together, which binds "red" to
"circle" before the transformer has to learn anything, followed by one token per attribute.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .weight_files import read_described, write_weights

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "cyan", "magenta")
DIRECTIONS: tuple[str, ...] = ("left", "right", "up", "down")
SPEEDS: tuple[str, ...] = ("slowly", "steadily", "fast")
DEFAULT_SPEED = "steadily"
"""The speed of a clause that names none; captions written by `caption_of` leave the word out."""

ROLES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
}
FILLER_WORDS: tuple[str, ...] = ("a", "an", "the", "moves", "moving")
CLAUSE_JOINER = "and"
MAX_CLAUSES = 2

_ROLE_OF_WORD = {word: role for role, words in ROLES.items() for word in words}
_EXAMPLE = "a red circle moves right and a blue square moves up slowly"


@dataclass(frozen=True, slots=True)
class SpriteSpec:
    """What a clause of a caption says about one sprite; every field is a word of its role's vocabulary."""

    shape: str
    colour: str
    direction: str
    speed: str = DEFAULT_SPEED

    def __post_init__(self) -> None:
        for role, words in ROLES.items():
            value = getattr(self, role)
            if value not in words:
                raise ValueError(f"{role}={value!r} is not in the caption language; use one of {', '.join(words)}")

    def clause(self) -> str:
        """The clause that describes this sprite, e.g. ``a red circle moves right slowly``."""
        tail = "" if self.speed == DEFAULT_SPEED else f" {self.speed}"
        return f"a {self.colour} {self.shape} moves {self.direction}{tail}"


def caption_of(sprites: Sequence[SpriteSpec]) -> str:
    """The caption of a scene, e.g. ``a red circle moves right and a blue square moves up slowly``."""
    return f" {CLAUSE_JOINER} ".join(sprite.clause() for sprite in sprites)


def known_words() -> tuple[str, ...]:
    """Every word of the caption language, grouped by role."""
    return tuple(_ROLE_OF_WORD) + FILLER_WORDS + (CLAUSE_JOINER,)


def parse_caption(caption: str) -> tuple[SpriteSpec, ...]:
    """The sprites a caption asks for: empty for an empty caption, else one or two.

    Case, punctuation and word order inside a clause do not matter.

    Raises:
        ValueError: for a word outside the language (the message lists the known ones), a clause without a
            shape, colour or direction, one that names two of the same kind, or more than two clauses.
    """
    words = re.findall(r"[^\s,.;:!?()\"]+", caption.lower())
    if not words:
        return ()
    unknown = sorted({word for word in words if word not in known_words()})
    if unknown:
        listing = "; ".join(f"{role}: {', '.join(vocabulary)}" for role, vocabulary in ROLES.items())
        other = ", ".join((*FILLER_WORDS, CLAUSE_JOINER))
        # A lone surrogate in a message ends the thread of ComfyUI that runs prompts, when it is to be printed.
        strange = ", ".join(unknown).encode(errors="backslashreplace").decode()
        raise ValueError(
            f"caption={caption!r} has words the demo model does not know: {strange}. "
            f"Known words are {listing}; other: {other}. Write for example {_EXAMPLE!r}."
        )
    clauses: list[list[str]] = [[]]
    for word in words:
        if word == CLAUSE_JOINER:
            clauses.append([])
        else:
            clauses[-1].append(word)
    if len(clauses) > MAX_CLAUSES:
        raise ValueError(
            f"caption={caption!r} has {len(clauses)} clauses; the demo model draws at most {MAX_CLAUSES} sprites. "
            f"Leave out all but {MAX_CLAUSES}."
        )
    return tuple(_parse_clause(clause, caption) for clause in clauses)


def _parse_clause(words: list[str], caption: str) -> SpriteSpec:
    found: dict[str, str] = {}
    for word in words:
        role = _ROLE_OF_WORD.get(word)
        if role is None:
            continue
        if role in found:
            raise ValueError(
                f"caption={caption!r} names two {role}s in one clause ({found[role]!r} and {word!r}); "
                f"keep one, or join two sprites with {CLAUSE_JOINER!r}"
            )
        found[role] = word
    for role in ("shape", "colour", "direction"):
        if role not in found:
            raise ValueError(
                f"caption={caption!r}: the clause {' '.join(words)!r} names no {role}; "
                f"add one of {', '.join(ROLES[role])}"
            )
    return SpriteSpec(**found)


def tokenize_captions(captions: Sequence[str]) -> Tensor:
    """Captions as attribute ids: int64 [B, MAX_CLAUSES, 4], in the order of `ROLES`; 0 means absent.

    Raises:
        ValueError: as `parse_caption`.
    """
    ids = torch.zeros(len(captions), MAX_CLAUSES, len(ROLES), dtype=torch.int64)
    for row, caption in enumerate(captions):
        for clause, sprite in enumerate(parse_caption(caption)):
            ids[row, clause] = torch.tensor([words.index(getattr(sprite, role)) + 1 for role, words in ROLES.items()])
    return ids


@dataclass(frozen=True, slots=True)
class CaptionEncoderConfig:
    """Sizes of the caption encoder; `text_dim` must equal the DiT's."""

    text_dim: int = 128
    num_heads: int = 4
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.text_dim <= 0 or self.text_dim % self.num_heads:
            raise ValueError(f"text_dim={self.text_dim} must be a positive multiple of num_heads={self.num_heads}")


class CaptionEncoder(nn.Module):
    """Captions of the demo language -> a context for the DiT's cross-attention.

    Output tokens, always `num_tokens` of them: for each clause a slot token (all attributes together) and one
    token per attribute, then one token for the whole scene. An absent clause, and so the empty caption, uses
    id 0 everywhere and has embeddings of its own.
    """

    num_tokens = MAX_CLAUSES * (1 + len(ROLES)) + 1

    def __init__(self, config: CaptionEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or CaptionEncoderConfig()
        dim = self.config.text_dim
        self.attributes = nn.ModuleList(nn.Embedding(len(words) + 1, dim) for words in ROLES.values())
        self.slot = nn.Sequential(nn.Linear(len(ROLES) * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.scene = nn.Linear(MAX_CLAUSES * dim, dim)
        self.position = nn.Parameter(torch.randn(self.num_tokens, dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, self.config.num_heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(self.config.num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Encodes attribute ids.

        Args:
            ids: int64 [B, MAX_CLAUSES, 4] from `tokenize_captions`.

        Returns:
            [B, num_tokens, text_dim], layer-normalised.
        """
        words = torch.stack([table(ids[..., role]) for role, table in enumerate(self.attributes)], dim=2)
        slots = self.slot(words.flatten(2))
        scene = self.scene(slots.flatten(1))
        clauses = torch.cat([slots.unsqueeze(2), words], dim=2).flatten(1, 2)
        tokens = torch.cat([clauses, scene.unsqueeze(1)], dim=1) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions as text: [B, num_tokens, text_dim]. Raises ValueError as `parse_caption`."""
        return self(tokenize_captions(captions).to(self.position.device))


def save_caption_encoder(model: CaptionEncoder, path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Writes the weights, with the configuration under the header key `caption_encoder`, atomically."""
    header = {**metadata, "caption_encoder": json.dumps(asdict(model.config))}
    state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    write_weights(path, state, header)


def load_caption_encoder(path: str | os.PathLike[str]) -> CaptionEncoder:
    """Reads what `save_caption_encoder` wrote; float32, on the CPU, in eval mode.

    Raises:
        ValueError: if the file's header does not name it as a caption encoder.
    """
    config, state = read_described(path, "caption_encoder", "a caption encoder", "demo_text_encoder.safetensors")
    model = CaptionEncoder(CaptionEncoderConfig(**config))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
