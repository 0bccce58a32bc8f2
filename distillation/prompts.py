"""The prompts a distillation trains on, and their text embeddings.

Training needs no videos, only prompts. Two kinds of file are read:

- `.txt`: one prompt a line, `#` comments and blank lines skipped; a callable embeds the prompts when asked.
- `.jsonl`: made by `python -m distillation.embed_prompts`. Each line is ``{"prompt": "...", "embedding":
  "shard-00000.safetensors", "key": "12"}``, one line may be ``{"negative": "...", "embedding": ..., "key": ...}``.
  The shards lie beside the file. They hold the real tokens of a prompt only; the rows asked for are read from disk
  and padded with zeros, as Wan expects.

Everything that can be checked without reading embeddings is checked before training begins.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diagonal_sampler.weight_files import short

WAN_TEXT_TOKENS = 512
"""Tokens of Wan's text context; what a shard is padded to whose header does not say otherwise."""
TOKENS_ENTRY = "tokens"
"""Header entry of a shard: the tokens that its embeddings are padded to."""
EMBEDDING_DTYPES = ("F32", "BF16", "F16")
"""What embeddings may be stored as, in safetensors' names."""

MAX_LISTED_LINES = 5
MAX_OPEN_SHARDS = 64
CHECK_BATCH = 64
"""Prompts embedded at once while a .txt file is checked."""

Encode = Callable[[list[str]], Tensor]
"""Prompts -> [B, tokens, text_dim], floating; raises ValueError for a prompt it cannot take."""


# ---------------------------------------------------------------------------------------------------------------
# Which prompt, when


def batch_rows(seed: int, update: int, batch: int, count: int) -> list[int]:
    """Which prompt each place of an update's global batch uses.

    An epoch is a permutation of range(count) that depends on the seed and the epoch's number only. Place i of the
    batch is position update * batch + i of all epochs joined. A function of its arguments alone: resuming needs no
    state, and every rank computes the whole list and takes its share.

    Args:
        seed: any integer.
        update: number of the update, 0 or more.
        batch: size of the global batch, over all ranks, 1 or more.
        count: number of prompts, 1 or more.

    Returns:
        `batch` indices in range(count).

    Raises:
        ValueError: for an argument out of its range.
    """
    for name, value, least in (("update", update, 0), ("batch", batch, 1), ("count", count, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
    first = update * batch
    rows: list[int] = []
    while len(rows) < batch:
        epoch, start = divmod(first + len(rows), count)
        rows += _epoch_order(seed, epoch, count)[start : start + batch - len(rows)].tolist()
    return rows


def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    # A digest, so that neighbouring seeds and epochs are unrelated.
    digest = hashlib.sha256(f"prompts {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(count, generator=generator)


# ---------------------------------------------------------------------------------------------------------------
# The set


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts with their embeddings, which are read or made when asked for; `read_prompts` builds it.

    prompts: in the order of the file, duplicates kept. tokens: tokens of every embedding given out. text_dim:
    channels of a token. read_rows: indices -> the embeddings before padding, each [n <= tokens, text_dim];
    raises ValueError. negative_row: the same for the negative prompt, None if the set has none.
    """

    prompts: tuple[str, ...] = field(repr=False)
    tokens: int
    text_dim: int
    read_rows: Callable[[Sequence[int]], Sequence[Tensor]] = field(repr=False)
    negative_row: Tensor | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def embeddings(self, indices: Sequence[int]) -> Tensor:
        """The embeddings of some prompts.

        Args:
            indices: B indices in range(len(self)); repeats are allowed.

        Returns:
            [B, tokens, text_dim] float32 on the CPU, zeros after each prompt's own tokens.

        Raises:
            ValueError: for an index out of range, an embedding with NaN or Inf, or one that can no longer be read.
        """
        wrong = [index for index in indices if not 0 <= index < len(self)]
        if wrong:
            raise ValueError(f"indices={short(wrong)} are not in the set; use 0 to {len(self) - 1}")
        return self._padded(self.read_rows(indices) if len(indices) else [])

    @property
    def negative(self) -> Tensor:
        """Embedding of the negative prompt (of a .txt file: the empty one), [1, tokens, text_dim] float32.

        Raises:
            ValueError: if the set has none.
        """
        if self.negative_row is None:
            raise ValueError(
                'the prompts file has no negative prompt; add a line {"negative": "...", "embedding": ..., "key": '
                "...}, or write the file with python -m distillation.embed_prompts"
            )
        return self._padded([self.negative_row])

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        padded = torch.zeros(len(rows), self.tokens, self.text_dim)
        for place, row in zip(padded, rows, strict=True):
            if row.shape[0] > self.tokens or row.shape[1] != self.text_dim:
                raise ValueError(
                    f"an embedding has shape {list(row.shape)}, but [up to {self.tokens}, {self.text_dim}] when the "
                    "file was checked; do not change the files or the encoder during training"
                )
            place[: row.shape[0]] = row
        return padded


def read_prompts(path: str | os.PathLike[str], *, encode: Encode | None = None) -> PromptSet:
    """Reads a prompts file and checks all of it, short of reading the stored embeddings.

    Args:
        path: a .txt or a .jsonl file, UTF-8 (see the module's text for both formats).
        encode: embeds the prompts of a .txt file, e.g. the demo's `CaptionEncoder.encode`; it is called without
            gradients, on every prompt once here and again in `embeddings`. A .jsonl file does not use it.

    Raises:
        ValueError: for a file that is missing, empty, of another kind or not UTF-8, or a .txt file without
            `encode`; for bad lines, one error that lists the first ones with their numbers and says how many
            there are.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix != ".txt":
        raise ValueError(f"prompts file {path.name!r} ends in {suffix or 'nothing'!r}; give a .txt or a .jsonl file")
    if encode is None:
        raise ValueError(
            f"prompts file {path.name!r} holds no embeddings and no encode was given; embed it first with python -m "
            f"distillation.embed_prompts --prompts {path.name}, and train on the prompts.jsonl that this writes"
        )
    return _read_txt(path, encode)


def prompts_digest(path: Path) -> str:
    """What a prompts file says, in 16 hex digits: its prompts in their order, and the text of its negative prompt.

    Where the embeddings lie does not count. Lines that `read_prompts` would refuse count as they are.

    Raises:
        ValueError: as `read_lines`.
    """
    said = []
    for _, line in read_lines(path):
        if path.suffix.lower() == ".jsonl":
            try:
                found = json.loads(line)
                said.append([found.get("prompt"), found.get("negative")])
                continue
            except (ValueError, RecursionError, AttributeError):
                pass
        elif line.startswith("#"):
            continue
        said.append(line)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Lines


class BadLines:
    """Collects what is wrong with a file's lines, for one error at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: dict[int, str] = {}

    def add(self, line: int, reason: str) -> None:
        """Says what is wrong with a line; lines count from 1."""
        self.reasons[line] = reason

    def refuse(self) -> None:
        """Raises ValueError if any line is bad."""
        if not self.reasons:
            return
        found = sorted(self.reasons.items())
        shown = [f"  line {line}: {reason}" for line, reason in found[:MAX_LISTED_LINES]]
        if len(found) > MAX_LISTED_LINES:
            shown.append(f"  and {len(found) - MAX_LISTED_LINES} more")
        lines = "1 bad line" if len(found) == 1 else f"{len(found)} bad lines"
        raise ValueError("\n".join([f"prompts file {self.path.name!r} has {lines}; correct or remove:", *shown]))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, each with its number from 1.

    Raises:
        ValueError: for a file that is missing, unreadable, empty or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"prompts file {os.fspath(path)!r} does not exist or is not a file; check the path")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"prompts file {path.name!r} cannot be read: {error}; check its permissions") from error
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"prompts file {path.name!r} is not UTF-8 (line {line}); save it as UTF-8") from None
    # Not str.splitlines, which also splits at characters that a prompt may hold, e.g. U+2028.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    kept = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise ValueError(f"prompts file {path.name!r} is empty; write one prompt a line")
    return kept


def read_prompt_lines(path: Path) -> list[tuple[int, str]]:
    """The prompts of a .txt file, each with its line's number from 1; `#` comments and blank lines are skipped.

    Raises:
        ValueError: as `read_lines`, for bad lines, or if no prompt is left.
    """
    prompts = [(number, line) for number, line in read_lines(path) if not line.startswith("#")]
    bad = BadLines(path)
    for number, prompt in prompts:
        if "\0" in prompt:
            bad.add(number, "holds a NUL character; save the file as UTF-8 text")
    bad.refuse()
    if not prompts:
        raise ValueError(f"prompts file {path.name!r} holds comments only; write one prompt a line")
    return prompts


# ---------------------------------------------------------------------------------------------------------------
# Text files: embedded on demand


def _read_txt(path: Path, encode: Encode) -> PromptSet:
    numbered = read_prompt_lines(path)
    lines_of: dict[str, list[int]] = {}
    for line, prompt in numbered:
        lines_of.setdefault(prompt, []).append(line)
    try:
        negative = _encoded(encode, [""])
    except ValueError as error:
        raise ValueError(f"encode refuses the empty prompt, which guidance needs as negative: {error}") from error
    tokens, text_dim = negative.shape[1:]

    bad = BadLines(path)
    distinct = list(lines_of)
    for first in range(0, len(distinct), CHECK_BATCH):
        group = distinct[first : first + CHECK_BATCH]
        for prompt, made in zip(group, _encoded_or_reasons(encode, group), strict=True):
            if isinstance(made, Tensor) and made.shape[-1] != text_dim:
                made = f"encode gave text_dim {made.shape[-1]}, but {text_dim} for the empty prompt"
            if isinstance(made, Tensor):
                tokens = max(tokens, made.shape[0])
                continue
            for line in lines_of[prompt]:
                bad.add(line, made)
    bad.refuse()
    prompts = tuple(prompt for _, prompt in numbered)

    def read_rows(indices: Sequence[int]) -> Sequence[Tensor]:
        return list(_encoded(encode, [prompts[index] for index in indices]))

    return PromptSet(prompts, tokens, text_dim, read_rows, negative[0])


def _encoded(encode: Encode, prompts: list[str]) -> Tensor:
    """What `encode` gives, checked: [B, tokens, text_dim] float32 on the CPU, finite."""
    with torch.no_grad():
        made = encode(prompts)
    if not isinstance(made, Tensor) or made.ndim != 3 or len(made) != len(prompts) or 0 in made.shape:
        got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"encode must give [{len(prompts)}, tokens, text_dim] for {len(prompts)} prompts, got {got}")
    if not made.is_floating_point():
        raise ValueError(f"encode must give floating numbers, got {made.dtype}")
    made = made.float().cpu()
    if not made.isfinite().all():
        raise ValueError(f"encode gave NaN or Inf for a prompt among {short(prompts)}")
    return made


def _encoded_or_reasons(encode: Encode, prompts: list[str]) -> Iterable[Tensor | str]:
    """For each prompt its embedding, or why there is none."""
    try:
        return list(_encoded(encode, prompts))
    except ValueError as error:
        if len(prompts) == 1:
            return [str(error)]
    return [result for prompt in prompts for result in _encoded_or_reasons(encode, [prompt])]


# ---------------------------------------------------------------------------------------------------------------
# Files with embeddings


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one line's embedding lies."""

    line: int
    shard: str
    key: str


@dataclass(frozen=True, slots=True)
class _ShardHeader:
    """What a shard's header says. shapes: key -> (dtype as safetensors names it, shape)."""

    tokens: int
    shapes: dict[str, tuple[str, tuple[int, ...]]]


class _Shards:
    """Reads rows of the shards in a folder; keeps the files mapped, not their contents in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: Callable[[str], Any] = lru_cache(maxsize=MAX_OPEN_SHARDS)(
            lambda shard: safe_open(path.parent / shard, framework="pt", device="cpu")
        )

    def header(self, shard: str) -> _ShardHeader:
        """Reads no tensor. Raises ValueError with the reason only, for a line of `BadLines`."""
        if not os.path.isfile(self.path.parent / shard):
            raise ValueError(f"shard {short(shard)} does not exist; copy it beside {self.path.name}")
        try:
            file = self._open(shard)
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, no mapping
            shapes = {key: (piece.get_dtype(), tuple(piece.get_shape())) for key, piece in slices.items()}
            said = (file.metadata() or {}).get(TOKENS_ENTRY, str(WAN_TEXT_TOKENS))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(
                f"shard {short(shard)} is not a sound safetensors file ({error}); write it again"
            ) from None
        if not said.isascii() or not said.isdecimal() or len(said) > 9 or int(said) < 1:
            raise ValueError(f"shard {short(shard)}: header entry {TOKENS_ENTRY}={short(said)} must be a whole number")
        return _ShardHeader(int(said), shapes)

    def read(self, entries: Sequence[_Entry]) -> list[Tensor]:
        """The embeddings at `entries`, [n, text_dim] each. Raises ValueError listing the lines that are bad."""
        rows, bad = [], BadLines(self.path)
        for entry in entries:
            try:
                row = self._open(entry.shard).get_tensor(entry.key)
            except (SafetensorError, OSError, RuntimeError) as error:
                bad.add(entry.line, f"shard {short(entry.shard)}, key {short(entry.key)} cannot be read ({error})")
                continue
            if not row.isfinite().all():
                bad.add(entry.line, f"shard {short(entry.shard)}, key {short(entry.key)} holds NaN or Inf")
            rows.append(row)
        bad.refuse()
        return rows


def _read_jsonl(path: Path) -> PromptSet:
    bad = BadLines(path)
    prompts: list[str] = []
    entries: list[_Entry] = []
    negative: _Entry | None = None
    for line, text in read_lines(path):
        try:
            prompt, entry = _parse_line(line, text)
        except ValueError as error:
            bad.add(line, str(error))
            continue
        if prompt is not None:
            prompts.append(prompt)
            entries.append(entry)
        elif negative is None:
            negative = entry
        else:
            bad.add(line, f"a second negative; line {negative.line} has one, keep one of them")

    shards = _Shards(path)
    checked = entries if negative is None else sorted([*entries, negative], key=lambda entry: entry.line)
    tokens, text_dim = _check_entries(shards, checked, bad)
    bad.refuse()
    if not prompts:
        raise ValueError(f"prompts file {path.name!r} holds no prompt, only a negative; add lines with a prompt")
    return PromptSet(
        tuple(prompts),
        tokens,
        text_dim,
        lambda indices: shards.read([entries[index] for index in indices]),
        None if negative is None else shards.read([negative])[0],
    )


def _parse_line(line: int, text: str) -> tuple[str | None, _Entry]:
    """One line's prompt, None on the negative's line, and where its embedding lies; ValueError with the reason."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, got {short(found)}")
    if ("prompt" in found) == ("negative" in found):
        raise ValueError("must have either a prompt or a negative" + (", not both" if "prompt" in found else ""))
    name = "prompt" if "prompt" in found else "negative"
    if not isinstance(found[name], str):
        raise ValueError(f"{name}={short(found[name])} must be text")
    if name == "prompt" and not found[name].strip():
        raise ValueError("the prompt is blank")
    for wanted in ("embedding", "key"):
        if not isinstance(found.get(wanted), str) or not found[wanted]:
            got = short(found[wanted]) if wanted in found else "nothing"
            raise ValueError(f"{wanted} must be text, the shard's {_MEANING[wanted]}, got {got}")
    shard = found["embedding"]
    # Judged by the rules of both systems: a file from one of them may be read on the other.
    for flavour in (PurePosixPath(shard), PureWindowsPath(shard)):
        if flavour.root or flavour.drive or ".." in flavour.parts:
            raise ValueError(f"embedding={short(shard)} leaves the folder of the file; name a shard beside it")
    return found.get("prompt"), _Entry(line, shard, found["key"])


_MEANING = {"embedding": "file name", "key": "entry"}


def _check_entries(shards: _Shards, entries: Sequence[_Entry], bad: BadLines) -> tuple[int, int]:
    """Checks every embedding by its shard's header; (tokens, text_dim) of the first good one, (0, 0) without one."""
    headers: dict[str, _ShardHeader | str] = {}
    first: tuple[int, int, int] | None = None  # tokens, text_dim, line
    for entry in entries:
        if entry.shard not in headers:
            try:
                headers[entry.shard] = shards.header(entry.shard)
            except ValueError as error:
                headers[entry.shard] = str(error)
        header = headers[entry.shard]
        if isinstance(header, str):
            bad.add(entry.line, header)
            continue
        where = f"shard {short(entry.shard)}, key {short(entry.key)}"
        dtype, shape = header.shapes.get(entry.key, (None, ()))
        if dtype is None:
            bad.add(entry.line, f"shard {short(entry.shard)} has no key {short(entry.key)}")
        elif dtype not in EMBEDDING_DTYPES:
            bad.add(entry.line, f"{where} is {dtype}; embeddings are {', '.join(EMBEDDING_DTYPES)}")
        elif len(shape) != 2 or 0 in shape or shape[0] > header.tokens:
            bad.add(
                entry.line,
                f"{where} has shape {list(shape)}; an embedding is [tokens, text_dim] with 1 to {header.tokens} tokens",
            )
        elif first is None:
            first = (header.tokens, shape[1], entry.line)
        elif shape[1] != first[1]:
            bad.add(entry.line, f"{where} has text_dim {shape[1]}, but line {first[2]} has {first[1]}")
        elif header.tokens != first[0]:
            bad.add(
                entry.line,
                f"shard {short(entry.shard)} is to be padded to {header.tokens} tokens, but line {first[2]}'s to "
                f"{first[0]}; embed all prompts with one --tokens",
            )
    return (0, 0) if first is None else first[:2]
