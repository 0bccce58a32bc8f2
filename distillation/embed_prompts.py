"""Embeds a file of prompts once, with Wan's text encoder, for a distillation that needs no encoder of its own.

    python -m distillation.embed_prompts --prompts prompts.txt --encoder umt5-xxl --out prompts   # resumes

`--encoder` is a folder in Hugging Face's format with a UMT5 encoder and its tokenizer: in one folder, or in the
subfolders text_encoder/ and tokenizer/ of a Diffusers pipeline. Nothing is downloaded. The folder `--out` gets
numbered shards, negative.safetensors, and last of all prompts.jsonl, which `distillation.prompts.read_prompts` reads.
A run that was stopped goes on at the first shard that is not complete.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diagonal_sampler.weight_files import listed, short, write_weights
from distillation.common import write_text
from distillation.prompts import TOKENS_ENTRY, WAN_TEXT_TOKENS, read_prompt_lines

log = logging.getLogger("embed_prompts")

# Not float16, in which UMT5 overflows.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

PROMPTS_FILE = "prompts.jsonl"
NEGATIVE_FILE = "negative.safetensors"
NEGATIVE_KEY = "negative"
DIGEST_ENTRY = "digest"
"""Header entry of a shard: a digest of all that its contents depend on."""

ENCODER_SUFFIXES = (".json", ".model", ".safetensors", ".bin")
FINGERPRINT_BYTES = 1 << 20
"""What is looked at of each end of an encoder's file; weights of 11 GB are not read to know them again."""

Advance = Callable[[int], None]
"""Told how many texts were embedded, or found complete, since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """Options of a run.

    prompts: a .txt file, one prompt a line. encoder: the folder of the encoder. out: the folder to write.
    negative: the negative prompt, empty for none. tokens: longer prompts are cut to this many tokens. batch:
    prompts encoded at once. dtype: of the encoder and of the embeddings, a name in `DTYPES`. shard: prompts per
    file; one file's embeddings are held in memory (about 1.6 MB for 200 tokens of UMT5-XXL in bfloat16).
    """

    prompts: Path
    encoder: Path
    out: Path
    negative: str = ""
    tokens: int = WAN_TEXT_TOKENS
    batch: int = 8
    dtype: str = "bfloat16"
    shard: int = 4096

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not offered; use one of {', '.join(DTYPES)}")


@torch.inference_mode()
def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], tokens: int) -> list[Tensor]:
    """Embeds texts as Wan does: padded or cut to `tokens`, encoded under the mask, padding dropped.

    Args:
        model: transformers' UMT5EncoderModel, in eval mode.
        tokenizer: its tokenizer, which marks padding in `attention_mask`.
        texts: B texts; an empty one has the end token only.
        tokens: the most tokens of a text, the end token among them.

    Returns:
        For each text its last hidden states, [n, text_dim] with 1 <= n <= tokens, of the model's dtype, on the CPU.

    Raises:
        ValueError: if a text has no token at all, or its embedding holds NaN or Inf.
    """
    made = tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    mask = made["attention_mask"]
    hidden = model(input_ids=made["input_ids"].to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    rows = [row[kept.bool()] for row, kept in zip(hidden.cpu(), mask, strict=True)]
    for text, row in zip(texts, rows, strict=True):
        if not len(row):
            raise ValueError(f"the tokenizer gives no token for {short(text)}; use the tokenizer made for this encoder")
        if not row.isfinite().all():
            raise ValueError(f"the embedding of {short(text)} holds NaN or Inf; try --dtype float32")
    return rows


def load_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A UMT5 encoder in eval mode, on the GPU if there is one, and its tokenizer; from a local folder only.

    Raises:
        ValueError: if transformers is not installed, or the folder holds no whole UMT5 encoder with its tokenizer.
    """
    transformers = import_extra("transformers")
    encoder, tokenizer_folder = encoder_folders(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model, report = transformers.UMT5EncoderModel.from_pretrained(
            encoder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"encoder={os.fspath(folder)!r} cannot be loaded: {error}; give a folder with a UMT5 encoder and its "
            "tokenizer"
        ) from error
    # transformers only warns, and fills what is missing with random numbers.
    if report["missing_keys"]:
        raise ValueError(
            f"encoder={os.fspath(folder)!r} lacks weights of a UMT5 encoder: {listed(report['missing_keys'])}; "
            "download it again, or give the encoder of Wan (UMT5-XXL)"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().requires_grad_(False).to(device), tokenizer


def import_extra(name: str) -> ModuleType:
    """Imports a module of the `train` extra. Raises ValueError with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported ({error}); install it: pip install '.[train]'") from error


def encoder_folders(folder: Path) -> tuple[Path, Path]:
    """Where the encoder and the tokenizer lie: both in the folder, or as a Diffusers pipeline lays them out.

    Raises:
        ValueError: if there is no encoder.
    """
    for encoder, tokenizer in ((folder / "text_encoder", folder / "tokenizer"), (folder, folder)):
        if (encoder / "config.json").is_file():
            return encoder, tokenizer
    raise ValueError(
        f"encoder={os.fspath(folder)!r} holds neither config.json nor text_encoder/config.json; give a local folder in "
        "Hugging Face's format with a UMT5 encoder and its tokenizer"
    )


def encoder_fingerprint(folder: Path) -> str:
    """A digest that tells encoders apart: names, sizes, and both ends of the files."""
    digest = hashlib.sha256()
    for part in encoder_folders(folder):
        for path in sorted(part.glob("*")):
            if path.suffix not in ENCODER_SUFFIXES:
                continue
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: texts[i] is stored under keys[i]; digest identifies texts and settings."""

    name: str
    keys: list[str]
    texts: list[str]
    digest: str

    def is_complete(self, folder: Path) -> bool:
        """Whether the file is there, whole, and made from these texts with these settings."""
        try:
            with safe_open(folder / self.name, framework="pt") as file:
                made_from = (file.metadata() or {}).get(DIGEST_ENTRY)
                return made_from == self.digest and set(file.keys()) == set(self.keys)
        except (OSError, SafetensorError):
            return False


def plan_shards(options: EmbedOptions, texts: Sequence[str]) -> list[Shard]:
    """The files of a run: the negative prompt's, then `texts` in numbered files; keys are positions in `texts`."""
    settings = [encoder_fingerprint(options.encoder), options.tokens, options.dtype]

    def shard(name: str, keys: list[str], part: list[str]) -> Shard:
        return Shard(name, keys, part, hashlib.sha256(json.dumps([settings, keys, part]).encode()).hexdigest())

    shards = [shard(NEGATIVE_FILE, [NEGATIVE_KEY], [options.negative])]
    for number, first in enumerate(range(0, len(texts), options.shard)):
        part = list(texts[first : first + options.shard])
        keys = [str(first + place) for place in range(len(part))]
        shards.append(shard(f"shard-{number:05d}.safetensors", keys, part))
    return shards


def embed_prompts(options: EmbedOptions, *, advance: Advance = lambda count: None) -> Path:
    """Writes the shards that are not complete, then the prompts file; returns the latter's path.

    A prompt that comes twice is embedded once. Every file is written under a temporary name and renamed. The old
    prompts file goes before the first shard is replaced: no prompts file ever names embeddings of other prompts.

    Raises:
        ValueError: as `read_prompt_lines`, `load_encoder` and `embed_texts`.
    """
    prompts = [prompt for _, prompt in read_prompt_lines(options.prompts)]
    shards = plan_shards(options, list(dict.fromkeys(prompts)))
    path = options.out / PROMPTS_FILE
    options.out.mkdir(parents=True, exist_ok=True)

    missing = []
    for shard in shards:
        if shard.is_complete(options.out):
            advance(len(shard.texts))
        else:
            missing.append(shard)
    if missing:
        log.info("%d of %d files are to be written", len(missing), len(shards))
        model, tokenizer = load_encoder(options.encoder, DTYPES[options.dtype])
        path.unlink(missing_ok=True)
        for shard in missing:
            write_shard(shard, options, model, tokenizer, advance)

    write_prompts_file(path, shards, prompts)
    unused = {file.name for file in options.out.glob("shard-*.safetensors")} - {shard.name for shard in shards}
    if unused:
        log.warning("files of an earlier run that nothing refers to any more: %s", listed(unused))
    return path


def write_shard(shard: Shard, options: EmbedOptions, model: Any, tokenizer: Any, advance: Advance) -> None:
    """Embeds a shard's texts and writes its file."""
    rows: list[Tensor] = []
    for first in range(0, len(shard.texts), options.batch):
        part = shard.texts[first : first + options.batch]
        rows += embed_texts(model, tokenizer, part, options.tokens)
        advance(len(part))
    full = sum(len(row) == options.tokens for row in rows)
    if full:
        log.warning(
            "%s: %d of %d prompts fill all %d tokens and were probably cut", shard.name, full, len(rows), options.tokens
        )
    metadata = {DIGEST_ENTRY: shard.digest, TOKENS_ENTRY: str(options.tokens)}
    write_weights(options.out / shard.name, dict(zip(shard.keys, rows, strict=True)), metadata)


def write_prompts_file(path: Path, shards: Sequence[Shard], prompts: Sequence[str]) -> None:
    """Writes the prompts file: the negative prompt first, then the prompts in their order, repeats included."""
    places = {
        text: {"embedding": shard.name, "key": key}
        for shard in shards
        if shard.name != NEGATIVE_FILE
        for text, key in zip(shard.texts, shard.keys, strict=True)
    }
    negative = next(shard for shard in shards if shard.name == NEGATIVE_FILE)
    lines: list[dict[str, str]] = [
        {"negative": negative.texts[0], "embedding": NEGATIVE_FILE, "key": NEGATIVE_KEY},
        *({"prompt": prompt, **places[prompt]} for prompt in prompts),
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


@contextmanager
def progress_bar(total: int) -> Iterator[Advance]:
    """Shows on the terminal how many of `total` texts are embedded. Raises ValueError if rich is not installed."""
    import_extra("rich")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda count: bar.advance(task, count)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a .txt file, one prompt a line")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the UMT5 encoder and its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--negative", default="", help="negative prompt (default: the empty one)")
    parser.add_argument("--tokens", type=int, default=WAN_TEXT_TOKENS, help="most tokens of a prompt; Wan takes 512")
    parser.add_argument("--batch", type=int, default=8, help="prompts encoded at once")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--shard", type=int, default=4096, help="prompts per file, held in memory until written")
    found = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        options = EmbedOptions(**vars(found))
        total = 1 + len({prompt for _, prompt in read_prompt_lines(options.prompts)})
        with progress_bar(total) as advance:
            path = embed_prompts(options, advance=advance)
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    log.info("%s is complete; train on it", path)


if __name__ == "__main__":
    main()
