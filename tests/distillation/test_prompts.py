"""Prompts files, the order they are used in, and the command that embeds them with a tiny random UMT5."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diagonal_sampler.captions import CaptionEncoder, CaptionEncoderConfig
from distillation import embed_prompts, prompts
from distillation.embed_prompts import EmbedOptions, embed_texts
from distillation.prompts import batch_rows, read_prompts

DIM = 4


# ---------------------------------------------------------------------------------------------------------------
# Which prompt, when


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (7, 3), (12, 4), (5, 16), (64, 64)])
def test_every_epoch_is_a_permutation_and_epochs_differ(count: int, batch: int) -> None:
    walked = [row for update in range(4 * count) for row in batch_rows(3, update, batch, count)]
    epochs = [walked[first : first + count] for first in range(0, len(walked) - count + 1, count)]
    assert len(epochs) >= 4 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 4:
        assert len({tuple(epoch) for epoch in epochs[:4]}) == 4
        assert epochs[0] != list(range(count))


def test_rows_depend_on_the_arguments_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    late_first = batch_rows(5, 1000, 8, 50)
    assert torch.equal(torch.get_rng_state(), state)  # no global number is drawn
    batch_rows(6, 3, 2, 9)
    torch.manual_seed(1)
    assert batch_rows(5, 1000, 8, 50) == late_first
    assert batch_rows(6, 1000, 8, 50) != late_first
    assert batch_rows(-(2**70), 0, 3, 50) != batch_rows(2**70, 0, 3, 50)


def test_the_split_into_updates_or_ranks_does_not_matter() -> None:
    whole = batch_rows(1, 0, 48, 20)  # spans three epochs
    assert [row for update in range(12) for row in batch_rows(1, update, 4, 20)] == whole
    for update in range(3):
        rows = batch_rows(1, update, 16, 20)
        assert rows == whole[16 * update : 16 * (update + 1)]
        shares = [batch_rows(1, update, 16, 20)[4 * rank : 4 * (rank + 1)] for rank in range(4)]
        assert [row for share in shares for row in share] == rows


@pytest.mark.parametrize("bad", [{"update": -1}, {"batch": 0}, {"count": 0}])
def test_rows_outside_their_range_are_refused(bad: dict[str, int]) -> None:
    arguments = {"seed": 0, "update": 0, "batch": 1, "count": 1, **bad}
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))} "):
        batch_rows(**arguments)


# ---------------------------------------------------------------------------------------------------------------
# Text files


def letters(texts: list[str]) -> torch.Tensor:
    """A token per letter and an end token, padded to the longest; refuses digits, gives NaN for a '?'."""
    for text in texts:
        if any(letter.isdigit() for letter in text):
            raise ValueError(f"caption={text!r} has a digit")
    made = torch.zeros(len(texts), 1 + max(len(text) for text in texts), DIM)
    for row, text in zip(made, texts, strict=True):
        row[: len(text) + 1] = torch.tensor([*(float(ord(letter)) for letter in text), 1.0])[:, None]
    made[torch.tensor(["?" in text for text in texts])] = float("nan")
    return made


def text_file(tmp_path: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_text_comments_blank_lines_and_duplicates(tmp_path, start: str) -> None:
    made = read_prompts(text_file(tmp_path, f"{start}# a list\r\n\r\n  ab \rabcd\n #no\nab\nx\u2028y"), encode=letters)
    assert made.prompts == ("ab", "abcd", "ab", "x\u2028y") and len(made) == 4
    assert (made.tokens, made.text_dim) == (5, DIM)
    rows = made.embeddings([0, 2, 0, 1])
    assert rows.shape == (4, 5, DIM) and rows.dtype == torch.float32
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert rows[3, :, 0].tolist() == [97, 98, 99, 100, 1]
    # One width for all, also where encode pads to the longest of a call.
    assert made.embeddings([0]).shape == (1, 5, DIM) and not made.embeddings([0])[0, 3:].any()
    assert made.embeddings([]).shape == (0, 5, DIM)
    assert made.negative.shape == (1, 5, DIM) and made.negative[0, :, 0].tolist() == [1, 0, 0, 0, 0]


def test_text_with_the_demo_encoder_gives_what_it_encodes_without_gradients(tmp_path) -> None:
    torch.manual_seed(0)
    encoder = CaptionEncoder(CaptionEncoderConfig(text_dim=16, num_heads=2)).eval()
    captions = ["a red circle moves left", "a blue cross moves up"]
    made = read_prompts(text_file(tmp_path, "\n".join(captions)), encode=encoder.encode)
    rows = made.embeddings([1, 0])
    assert not rows.requires_grad and not made.negative.requires_grad
    torch.testing.assert_close(rows, encoder.encode(captions[::-1]).detach())
    torch.testing.assert_close(made.negative, encoder.encode([""]).detach())
    with pytest.raises(ValueError, match="purple") as error:
        read_prompts(text_file(tmp_path, "a red circle moves left\na purple circle moves left"), encode=encoder.encode)
    assert "has 1 bad line;" in str(error.value) and "line 2: " in str(error.value)


def test_captions_that_encode_refuses_are_listed_by_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "CHECK_BATCH", 3)
    lines = ["# head", "fine", "bad1", "good", "bad2", "why?", "bad1", "nice", "bad3", "bad4"]
    with pytest.raises(ValueError) as error:
        read_prompts(text_file(tmp_path, "\n".join(lines)), encode=letters)
    message = str(error.value)
    assert "'prompts.txt' has 6 bad lines" in message and message.endswith("and 1 more")
    assert [f"line {n}:" in message for n in range(1, 11)] == [n in (3, 5, 6, 7, 9) for n in range(1, 11)]
    assert "'bad2' has a digit" in message and "NaN or Inf" in message


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda texts: torch.zeros(len(texts), DIM), r"must give \[1, tokens, text_dim\]"),
        (lambda texts: torch.zeros(len(texts) + 1, 2, DIM), r"must give \[1, tokens, text_dim\]"),
        (lambda texts: torch.zeros(len(texts), 0, DIM), r"must give \[1, tokens, text_dim\]"),
        (lambda texts: [[0.0]], "got list"),
        (lambda texts: torch.zeros(len(texts), 2, DIM, dtype=torch.int64), "floating"),
        (lambda texts: torch.zeros(len(texts), 2, DIM + len(texts[0])), "text_dim 5, but 4"),
        (None, "no encode was given.*embed_prompts"),
    ],
)
def test_an_encode_that_breaks_its_contract_is_refused(tmp_path, encode: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_prompts(text_file(tmp_path, "a"), encode=encode)


def test_an_encode_that_refuses_the_empty_prompt_is_named(tmp_path) -> None:
    def encode(texts: list[str]) -> torch.Tensor:
        if "" in texts:
            raise ValueError("too short")
        return letters(texts)

    with pytest.raises(ValueError, match="refuses the empty prompt.*too short"):
        read_prompts(text_file(tmp_path, "a"), encode=encode)


def test_an_encoder_that_changes_after_the_check_is_noticed(tmp_path) -> None:
    extra = [0]
    made = read_prompts(text_file(tmp_path, "a\nb"), encode=lambda texts: torch.ones(len(texts), 2 + extra[0], DIM))
    extra[0] = 1
    with pytest.raises(ValueError, match="when the file was checked"):
        made.embeddings([0])


@pytest.mark.parametrize("indices", [[2], [-1], [0, 5]])
def test_an_index_outside_the_set_is_refused(tmp_path, indices: list[int]) -> None:
    made = read_prompts(text_file(tmp_path, "a\nb"), encode=letters)
    with pytest.raises(ValueError, match="use 0 to 1"):
        made.embeddings(indices)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "does not exist"),
        ("a.jsonl", None, "does not exist"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n \r\n", "is empty"),
        ("a.txt", b"# only\n", "comments only"),
        ("a.txt", "\ufeffsch\u00f6n".encode("utf-16"), r"not UTF-8 \(line 1\)"),
        ("a.jsonl", b"{}\n\n\xff", r"not UTF-8 \(line 3\)"),
        ("a.txt", b"\xef\xbb\xbfa\n\xe4", r"not UTF-8 \(line 2\)"),
        ("a.txt", "ab\ncd".encode("utf-16-le"), "2 bad lines(.|\n)*line 1: holds a NUL"),
        ("a.csv", b"a", "'.csv'; give a .txt or a .jsonl"),
        ("a", b"a", "'nothing'"),
    ],
)
def test_files_that_cannot_be_prompts(tmp_path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name, encode=letters)


def test_a_folder_is_no_prompts_file(tmp_path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ValueError, match="not a file"):
        read_prompts(tmp_path / "a.txt", encode=letters)


# ---------------------------------------------------------------------------------------------------------------
# Files with embeddings


def ramp(count: int, start: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (start + torch.arange(count * DIM).view(count, DIM)).to(dtype)


def entry(prompt: str, key: str, shard: str = "one.safetensors") -> dict[str, str]:
    return {"prompt": prompt, "embedding": shard, "key": key}


def jsonl_file(folder: Path, lines: list[Any]) -> Path:
    """A prompts file with two shards beside it; a line that is a string is written as it is."""
    (folder / "more").mkdir(exist_ok=True)
    one = {
        "0": ramp(3, 0),
        "1": ramp(8, 100),
        "n": ramp(2, 50),
        "wide": torch.zeros(2, DIM + 1),
        "long": torch.zeros(9, DIM),
        "none": torch.zeros(0, DIM),
        "batch": torch.zeros(1, 2, DIM),
        "double": torch.zeros(2, DIM, dtype=torch.float64),
        "whole": torch.zeros(2, DIM, dtype=torch.int64),
        "nan": torch.full((2, DIM), float("nan")),
        "inf": ramp(2, 0).div(0),
    }
    save_file(one, folder / "one.safetensors", metadata={"tokens": "8"})
    two = {"0": ramp(1, 7, torch.bfloat16), "1": ramp(2, 9, torch.float16)}
    save_file(two, folder / "more" / "two.safetensors", metadata={"tokens": "8"})
    save_file({"0": ramp(1, 0)}, folder / "wan.safetensors")
    save_file({"0": ramp(1, 0)}, folder / "odd.safetensors", metadata={"tokens": "-8"})
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return text_file(folder, content, "prompts.jsonl")


def test_stored_embeddings_are_read_padded_and_widened(tmp_path) -> None:
    two = "more/two.safetensors"
    lines = [entry("a", "0"), "", {**entry("b", "1"), "source": "x"}, entry("c", "0", two), entry("d", "1", two)]
    negative = {"negative": "", "embedding": "one.safetensors", "key": "n"}
    made = read_prompts(jsonl_file(tmp_path, [*lines, negative, entry("a", "0")]))
    assert made.prompts == ("a", "b", "c", "d", "a") and (made.tokens, made.text_dim) == (8, DIM)
    rows = made.embeddings([3, 0, 4, 1, 2, 0])
    assert rows.shape == (6, 8, DIM) and rows.dtype == torch.float32
    kept = [ramp(2, 9), ramp(3, 0), ramp(3, 0), ramp(8, 100), ramp(1, 7), ramp(3, 0)]
    for row, expected in zip(rows, kept, strict=True):
        assert torch.equal(row[: len(expected)], expected) and not row[len(expected) :].any()
    assert made.negative.shape == (1, 8, DIM) and made.negative.dtype == torch.float32
    assert torch.equal(made.negative[0, :2], ramp(2, 50)) and not made.negative[0, 2:].any()
    rows.fill_(3)  # what is given out is the caller's
    assert torch.equal(made.embeddings([0])[0, :3], ramp(3, 0))


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch) -> None:
    read: list[str] = []

    class Watched:
        def __init__(self, path: Path, **options: Any) -> None:
            self.file = safe_open(path, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, key: str) -> torch.Tensor:
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(prompts, "safe_open", Watched)
    made = read_prompts(jsonl_file(tmp_path, [entry("a", "0"), entry("b", "1"), entry("c", "n")]))
    assert read == []
    made.embeddings([1])
    assert read == ["1"]


def test_shards_without_a_token_count_are_wans(tmp_path) -> None:
    made = read_prompts(jsonl_file(tmp_path, [entry("a", "0", "wan.safetensors")]))
    assert made.embeddings([0]).shape == (1, 512, DIM)


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "MAX_OPEN_SHARDS", 1)
    made = read_prompts(jsonl_file(tmp_path, [entry("a", "0"), entry("c", "0", "more/two.safetensors")]))
    assert made.embeddings([0, 1, 0, 1])[:, 0, 0].tolist() == [0, 7, 0, 7]


def test_a_set_without_a_negative_says_so_when_it_is_asked_for(tmp_path) -> None:
    made = read_prompts(jsonl_file(tmp_path, [entry("a", "0")]))
    with pytest.raises(ValueError, match="no negative prompt"):
        _ = made.negative
    only = jsonl_file(tmp_path, [{"negative": "x", "embedding": "one.safetensors", "key": "n"}])
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(only)


BAD_LINES = {
    "cut": ('{"prompt": "a"', "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "list": (["a"], "must be a JSON object"),
    "no prompt": ({"embedding": "one.safetensors", "key": "0"}, "either a prompt or a negative"),
    "both": ({**entry("a", "0"), "negative": "b"}, "not both"),
    "number": ({**entry("a", "0"), "prompt": 3}, "prompt=3 must be text"),
    "null negative": ({"negative": None, "embedding": "one.safetensors", "key": "0"}, "negative=None must be text"),
    "blank": (entry("  ", "0"), "blank"),
    "no key": ({"prompt": "a", "embedding": "one.safetensors"}, "key must be text.*got nothing"),
    "number key": ({**entry("a", "0"), "key": 0}, "key must be text.*got 0"),
    "no embedding": ({"prompt": "a", "key": "0"}, "embedding must be text.*got nothing"),
    "absolute": (entry("a", "0", "/etc/one.safetensors"), "leaves the folder"),
    "up": (entry("a", "0", "more/../../one.safetensors"), "leaves the folder"),
    "drive": (entry("a", "0", "C:one.safetensors"), "leaves the folder"),
    "backslash up": (entry("a", "0", "..\\one.safetensors"), "leaves the folder"),
    "share": (entry("a", "0", "\\\\host\\x\\one.safetensors"), "leaves the folder"),
    "no shard": (entry("a", "0", "three.safetensors"), "'three.safetensors' does not exist"),
    "folder": (entry("a", "0", "more"), "'more' does not exist"),
    "odd names": (entry("a", "0", "\ud800\0" + "x" * 5000), "does not exist"),
    "broken": (entry("a", "0", "broken.safetensors"), "not a sound safetensors file"),
    "odd tokens": (entry("a", "0", "odd.safetensors"), "tokens='-8' must be a whole number"),
    "other tokens": (entry("a", "0", "wan.safetensors"), "512 tokens, but line 1's to 8"),
    "no such key": (entry("a", "2"), "has no key '2'"),
    "double": (entry("a", "double"), "is F64"),
    "whole": (entry("a", "whole"), "is I64"),
    "wide": (entry("a", "wide"), "text_dim 5, but line 1 has 4"),
    "long": (entry("a", "long"), r"shape \[9, 4\].*1 to 8 tokens"),
    "none": (entry("a", "none"), r"shape \[0, 4\]"),
    "batch": (entry("a", "batch"), r"shape \[1, 2, 4\]"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_by_number_and_reason(tmp_path, case: str) -> None:
    line, said = BAD_LINES[case]
    path = jsonl_file(tmp_path, [entry("fine", "0"), "", line, entry("fine", "1")])
    with pytest.raises(ValueError, match=f"has 1 bad line; correct or remove:\n  line 3: .*{said}"):
        read_prompts(path)


def test_two_negatives_are_one_too_many(tmp_path) -> None:
    negative = {"negative": "x", "embedding": "one.safetensors", "key": "n"}
    with pytest.raises(ValueError, match="line 3: a second negative; line 1"):
        read_prompts(jsonl_file(tmp_path, [negative, entry("a", "0"), negative]))


def test_many_bad_lines_make_one_error(tmp_path) -> None:
    lines = [line for line, _ in BAD_LINES.values()]
    with pytest.raises(ValueError) as error:
        read_prompts(jsonl_file(tmp_path, [entry("fine", "0"), *lines]))
    message = str(error.value)
    assert f"has {len(lines)} bad lines" in message and message.endswith(f"and {len(lines) - 5} more")
    assert [f"line {n}:" in message for n in range(1, 9)] == [False, *[True] * 5, False, False]
    assert len(message) < 1500


@pytest.mark.parametrize("key", ["nan", "inf"])
def test_a_number_that_is_none_is_refused_when_it_is_read(tmp_path, key: str) -> None:
    made = read_prompts(jsonl_file(tmp_path, [entry("a", "0"), "", entry("b", key)]))
    assert made.embeddings([0]).isfinite().all()
    with pytest.raises(ValueError, match=f"line 3: .*key '{key}' holds NaN or Inf"):
        made.embeddings([0, 1])
    with pytest.raises(ValueError, match="line 2: .*NaN"):  # the negative is read at once
        bad = {"negative": "", "embedding": "one.safetensors", "key": key}
        read_prompts(jsonl_file(tmp_path, [entry("a", "0"), bad]))


def test_a_shard_that_goes_away_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "MAX_OPEN_SHARDS", 1)
    made = read_prompts(jsonl_file(tmp_path, [entry("a", "0"), entry("b", "0", "more/two.safetensors")]))
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ValueError, match="line 1: shard 'one.safetensors', key '0' cannot be read"):
        made.embeddings([1, 0])


# ---------------------------------------------------------------------------------------------------------------
# The command that embeds

WORDS = ("a", "red", "blue", "cat", "dog", "runs", "sleeps", "fast")
TEXTS = ["a red cat runs", "a blue dog", "cat", "a red cat runs", "a dog sleeps fast", "dog runs", "red red red"]
DISTINCT = list(dict.fromkeys(TEXTS))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A random UMT5 encoder of 16 channels and a tokenizer of whole words, in Hugging Face's format."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("umt5")
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    config = UMT5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UMT5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(encoder: Path) -> tuple[Any, Any]:
    return embed_prompts.load_encoder(encoder, torch.float32)


@pytest.fixture
def options(tmp_path: Path, encoder: Path) -> Callable[..., EmbedOptions]:
    path = text_file(tmp_path, "# prompts\n" + "\n".join(TEXTS))
    chosen: dict[str, Any] = {"tokens": 8, "batch": 2, "dtype": "float32", "shard": 2}
    return lambda **other: EmbedOptions(
        **{"prompts": path, "encoder": encoder, "out": tmp_path / "out", **chosen, **other}
    )


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """The texts that were embedded so far, in order."""
    seen: list[str] = []

    def watch(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> list[torch.Tensor]:
        seen.extend(texts)
        return embed_texts(model, tokenizer, texts, tokens)

    monkeypatch.setattr(embed_prompts, "embed_texts", watch)
    return seen


def test_texts_are_embedded_without_their_padding(loaded) -> None:
    model, tokenizer = loaded
    rows = embed_texts(model, tokenizer, ["a red cat", "", "cat " * 20], tokens=6)
    assert [tuple(row.shape) for row in rows] == [(4, 16), (1, 16), (6, 16)]
    for text, row in zip(["a red cat", "", "cat " * 5], rows, strict=True):
        alone = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    # Without its mask a short text would see the padding.
    ids = tokenizer(["a red cat"], padding="max_length", max_length=6, return_tensors="pt")["input_ids"]
    assert (model(input_ids=ids).last_hidden_state[0, :4] - rows[0]).abs().max() > 1e-3


def test_an_embedding_that_is_no_number_is_refused(encoder) -> None:
    model, tokenizer = embed_prompts.load_encoder(encoder, torch.float32)
    model.shared.weight[list(("<pad>", "</s>", "<unk>", *WORDS)).index("dog")] = float("nan")
    assert embed_texts(model, tokenizer, ["a cat"], 8)
    with pytest.raises(ValueError, match="'a dog' holds NaN"):
        embed_texts(model, tokenizer, ["a cat", "a dog"], 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_writes_what_the_trainer_reads(options, loaded, dtype: str) -> None:
    chosen = options()
    arguments = {"prompts": chosen.prompts, "encoder": chosen.encoder, "out": chosen.out, "negative": "blue dog"}
    arguments |= {"tokens": 8, "batch": 4, "dtype": dtype, "shard": 3}
    embed_prompts.main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])
    made = read_prompts(chosen.out / "prompts.jsonl")
    assert made.prompts == tuple(TEXTS) and (made.tokens, made.text_dim) == (8, 16)
    exact = embed_texts(*loaded, [*TEXTS, "blue dog"], 8)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.1, "atol": 0.1}
    for row, expected in zip([*made.embeddings(range(len(TEXTS))), made.negative[0]], exact, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, **close)
        assert not row[len(expected) :].any() and row[len(expected) - 1].any()
    files = {"negative.safetensors", "prompts.jsonl", "shard-00000.safetensors", "shard-00001.safetensors"}
    assert {file.name for file in chosen.out.iterdir()} == files
    with safe_open(chosen.out / "shard-00001.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"3", "4", "5"}
        assert file.get_slice("5").get_dtype() == {"float32": "F32", "bfloat16": "BF16"}[dtype]
        assert file.get_slice("5").get_shape() == [4, 16]  # "red red red" and its end: no padding is stored


def test_a_killed_run_goes_on_where_it_stopped(options, embedded, monkeypatch) -> None:
    chosen, shards = options(), []
    real = embed_prompts.write_shard

    def killed(shard: Any, *rest: Any) -> None:
        if len(shards) == 2:
            (chosen.out / f"{shard.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        shards.append(shard.name)
        real(shard, *rest)

    monkeypatch.setattr(embed_prompts, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_prompts.embed_prompts(chosen)
    assert shards == ["negative.safetensors", "shard-00000.safetensors"] and embedded == ["", *DISTINCT[:2]]
    assert not (chosen.out / "prompts.jsonl").exists()

    monkeypatch.setattr(embed_prompts, "write_shard", real)
    counts: list[int] = []
    path = embed_prompts.embed_prompts(chosen, advance=counts.append)
    assert embedded == ["", *DISTINCT]  # nothing twice
    assert sum(counts) == 1 + len(DISTINCT)
    assert not list(chosen.out.glob("*.partial"))
    whole = embed_prompts.embed_prompts(options(out=chosen.out.with_name("whole")))
    assert whole.read_bytes() == path.read_bytes()
    rows = range(len(TEXTS))
    assert torch.equal(read_prompts(path).embeddings(rows), read_prompts(whole).embeddings(rows))


def test_a_complete_run_is_not_repeated_and_needs_no_encoder(options, embedded, monkeypatch) -> None:
    chosen = options()
    path = embed_prompts.embed_prompts(chosen)
    before = path.read_bytes()
    path.unlink()
    embedded.clear()
    monkeypatch.setattr(embed_prompts, "load_encoder", lambda *_: pytest.fail("loaded for nothing"))
    assert embed_prompts.embed_prompts(chosen).read_bytes() == before and not embedded


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"negative": "red"}, ["red"]),
        ({"batch": 1}, []),
        ({"tokens": 7}, ["", *DISTINCT]),
        ({"dtype": "bfloat16"}, ["", *DISTINCT]),
        ({"shard": 3}, DISTINCT),
    ],
)
def test_what_depends_on_a_changed_setting_is_made_again(options, embedded, change: dict, again: list[str]) -> None:
    embed_prompts.embed_prompts(options())
    embedded.clear()
    embed_prompts.embed_prompts(options(**change))
    assert embedded == again


def test_changed_prompts_damaged_shards_and_another_encoder_are_noticed(options, embedded, loaded, caplog) -> None:
    chosen = options()
    path = embed_prompts.embed_prompts(chosen)

    embedded.clear()
    chosen.prompts.write_text("\n".join([*DISTINCT[:3], "fast", *DISTINCT[4:]]))
    embed_prompts.embed_prompts(chosen)
    assert embedded == [DISTINCT[2], "fast"]

    embedded.clear()
    last = chosen.out / "shard-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-4])
    embed_prompts.embed_prompts(chosen)
    assert embedded == DISTINCT[4:]

    embedded.clear()
    other = chosen.out.with_name("other")
    model, tokenizer = loaded
    model.save_pretrained(other / "text_encoder")  # as a Diffusers pipeline lays them out
    tokenizer.save_pretrained(other / "tokenizer")
    config = other / "text_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    embed_prompts.embed_prompts(options(encoder=other))
    assert embedded == ["", *DISTINCT[:3], "fast", *DISTINCT[4:]]

    chosen.prompts.write_text("\n".join(DISTINCT[:2]))
    with caplog.at_level(logging.WARNING):
        embed_prompts.embed_prompts(chosen)
    assert "shard-00001.safetensors, shard-00002.safetensors" in caplog.text
    assert read_prompts(path).prompts == tuple(DISTINCT[:2])


def test_encoders_are_told_apart_by_name_size_and_both_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(embed_prompts, "FINGERPRINT_BYTES", 3)
    (tmp_path / "config.json").write_bytes(b"{}")
    weights = tmp_path / "model.safetensors"
    found = []
    for content in (b"start....end", b"stArt....end", b"start....eNd", b"start.....end"):
        weights.write_bytes(content)
        found.append(embed_prompts.encoder_fingerprint(tmp_path))
    found.append(embed_prompts.encoder_fingerprint(weights.rename(tmp_path / "other.safetensors").parent))
    assert len(set(found)) == len(found)
    (tmp_path / "README.md").write_bytes(b"new")
    assert embed_prompts.encoder_fingerprint(tmp_path) == found[-1]


def test_no_prompts_file_outlives_the_embeddings_it_names(options, monkeypatch) -> None:
    chosen = options()
    path = embed_prompts.embed_prompts(chosen)
    chosen.prompts.write_text("\n".join(reversed(TEXTS)))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embed_prompts, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_prompts.embed_prompts(chosen)
    assert not path.exists()


def test_prompts_that_were_probably_cut_are_counted(options, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        embed_prompts.embed_prompts(options(tokens=5, shard=10))
    # "a red cat runs" and "a dog sleeps fast" take four words and the end.
    assert "2 of 6 prompts fill all 5 tokens" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 0}, "tokens=0 must be 1 or more"),
        ({"batch": -1}, "batch=-1"),
        ({"shard": 0}, "shard=0"),
        ({"dtype": "float16"}, "'float16' is not offered; use one of bfloat16, float32"),
    ],
)
def test_options_outside_their_range_are_refused(options, change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(**change)


def test_an_encoder_that_lacks_weights_is_refused(options, loaded, tmp_path) -> None:
    model, tokenizer = loaded
    tokenizer.save_pretrained(tmp_path / "less")
    state = {name: value for name, value in model.state_dict().items() if "block.1.layer.0" not in name}
    model.save_pretrained(tmp_path / "less", state_dict=state)
    with pytest.raises(ValueError, match="lacks weights of a UMT5 encoder: .*block.1.layer.0"):
        embed_prompts.embed_prompts(options(encoder=tmp_path / "less"))


def test_the_command_says_in_one_line_what_is_wrong(options, monkeypatch, capsys) -> None:
    chosen = options()

    def said_by(**change: Any) -> str:
        arguments = {"prompts": chosen.prompts, "encoder": chosen.encoder, "out": chosen.out, **change}
        with pytest.raises(SystemExit) as error:
            embed_prompts.main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])
        assert error.value.code == 2
        return capsys.readouterr().err

    assert "does not exist" in said_by(prompts=chosen.out / "none.txt")
    assert "holds neither config.json nor" in said_by(encoder=chosen.prompts.parent)
    assert "batch=0" in said_by(batch=0)
    (chosen.prompts.parent / "file").write_text("where the folder should be")
    assert (text := said_by(out=chosen.prompts.parent / "file")).count("\n") == 1 and "Error" not in text
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers cannot be imported" in (text := said_by()) and "pip install '.[train]'" in text
