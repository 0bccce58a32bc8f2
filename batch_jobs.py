"""The jobs of queue_batch.py: input files, where prompt and seed go in a graph, file names, and the log.

Nothing here talks to a server, and nothing a prompts file says becomes a path, but for the pictures of a shot list.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from diagonal_sampler.disk import remove_file, replace_file, try_lock

Graph = dict[str, dict[str, Any]]
Kind = type | tuple[type, ...]
Key = tuple[Any, ...]

MAX_SEED = 2**64 - 1  # ComfyUI's own bound for seed widgets
MAX_JOBS = 1_000_000  # a slip like 0-99999999999 is refused before it fills the memory
SLUG_LENGTH = 32
TEXT_INPUTS = ("text", "prompt", "value", "string")
SEED_INPUTS = ("seed", "noise_seed")
PROMPT_TITLES = frozenset({"prompt", "positive", "positive prompt"})
PROMPT_SCHEDULE = "DiagonalPromptSchedule"
SEED_TITLES = frozenset({"seed", "noise seed"})
INTERRUPTED = "interrupted on the server"  # by a person: no failure of the job or the server
OTHER_FORMATS = {".xlsx": "a table", ".json": "JSON", ".rtf": "RTF"}
TABLE_SUFFIXES, LINES_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson")  # shot lists
DELIMITERS = ",;\t"
COLUMNS = ("prompt", "seed", "name")  # of a shot list, beside those that name a widget
WIDGETS = (str, int, float, bool)  # what a column can set
WORDS_OF_TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
# Cells that end so may be files beside the list. A text is no file by accident then.
LOCAL_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .mp4 .webm .mkv .mov .avi .mp3 .wav .flac .ogg .opus .m4a".split()
)
LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # line ends to some readers of the log


class BatchError(Exception):
    """A condition that stops the batch; the message is for the person who started it."""


# ----------------------------------------------------------------------------------------------- input files


def parse_seeds(text: str) -> list[int]:
    """Seeds of "0-3,7,9": numbers and inclusive ranges, in the order given, doubles dropped."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})\s*(?:-\s*(\d{1,20})\s*)?", part, re.ASCII)
        if not match:
            raise BatchError(f"--seeds: {part.strip()!r} is no seed; write numbers and ranges like 0-3,7,9")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise BatchError(f"--seeds: the range {part.strip()} runs backwards; write {last}-{first}")
        if last > MAX_SEED:
            raise BatchError(f"--seeds: {last} is above {MAX_SEED}, the largest seed ComfyUI takes")
        if last - first >= MAX_JOBS:
            raise BatchError(f"--seeds: {part.strip()} holds more than {MAX_JOBS} seeds; split the batch")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line; blank lines and lines that start with # are skipped.

    Raises BatchError where the file cannot be read, is no such text or holds no prompt.
    """
    _refuse_other_formats(path, [])
    text = _read_text(path)
    # Files put together keep the byte order mark of each.
    lines = [line.strip().strip("\ufeff").strip() for line in re.split("\r\n|\r|\n", text)]
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise BatchError(f"--prompts: {path} holds no prompt; write one a line")
    _refuse_other_formats(path, prompts)
    return prompts


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark at its start. Raises BatchError where it is none."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BatchError(f"--prompts: cannot read {path}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BatchError(
            f"--prompts: {path} is not UTF-8 text: byte 0x{raw[error.start]:02x} in line {line}; "
            "save the file again as UTF-8"
        ) from error
    if "\0" in text:
        raise BatchError(f"--prompts: {path} holds a zero byte; save the file again as UTF-8 text")
    return text


def _refuse_other_formats(path: Path, lines: list[str]) -> None:
    """Raise BatchError for a file whose lines are no prompts, by its suffix or by what is in them."""
    kind = OTHER_FORMATS.get(path.suffix.lower())
    if lines and lines[0].startswith(r"{\rtf"):
        kind = "RTF"
    elif any("\t" in line for line in lines):
        kind = "a table (a line has a tab in it)"
    elif any(line.startswith("{") and json_object(line.encode()) is not None for line in lines):
        kind = "JSON"
    if kind:
        raise BatchError(
            f"--prompts: {path} is {kind}; give a text file with one prompt a line and nothing else, or a shot list "
            f"({', '.join(TABLE_SUFFIXES + LINES_SUFFIXES)})"
        )


def load_graph(path: Path) -> Graph:
    """Read a graph in ComfyUI's API form: {node id: {"class_type": ..., "inputs": {...}}}."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BatchError(f"cannot read the workflow {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BatchError(f"the workflow {path} is not JSON: {error}") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise BatchError(f"{path} is a canvas workflow; give its API form: File > Export (API), or workflows/api/")
    is_api = isinstance(graph, dict) and all(
        isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        for node in graph.values()
    )
    if not is_api or not graph:
        raise BatchError(f"{path} is no ComfyUI API graph: every node needs class_type and inputs")
    for node_id, node in graph.items():
        try:
            json.dumps({node_id: node}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            # JSON can hold half of a surrogate pair. ComfyUI's worker does not survive such text in an error.
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise BatchError(f"{path} has {half} in node {printable(node_id)}: half a character, no text") from error
    return graph


# ---------------------------------------------------------------------------------- where prompt and seed go


@dataclass(frozen=True)
class Target:
    """One widget of the graph: the input ``name`` of node ``node_id``."""

    node_id: str
    name: str


def _title(node: dict[str, Any]) -> str:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title if isinstance(title, str) else node["class_type"]


def _link_source(graph: Graph, value: Any) -> str | None:
    """The node id that a link ["id", slot] comes from, or None where ``value`` is no link into the graph."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    return value[0] if is_link and value[0] in graph else None


def _describe(graph: Graph, targets: list[Target]) -> str:
    names = [f"{t.node_id}.{t.name} ({printable(_title(graph[t.node_id]))})" for t in targets]
    return ", ".join(names) if names else "none"


def _is_a(value: Any, kind: Kind) -> bool:
    """Whether a value is a ``kind``; bool is no int here, only one of WIDGETS."""
    return isinstance(value, kind) and (kind is WIDGETS or not isinstance(value, bool))


def _literals(graph: Graph, kind: Kind) -> list[Target]:
    """Every widget of the graph that holds a ``kind``, in graph order."""
    return [
        Target(node_id, name)
        for node_id, node in graph.items()
        for name, value in node["inputs"].items()
        if _is_a(value, kind)
    ]


def _widget_behind(graph: Graph, node_id: str, names: tuple[str, ...], kind: type) -> Target | None:
    """The first of the inputs ``names`` of a node that is a ``kind``, or that of the node which it is linked to."""
    names_of_sources = (*names, "value")
    todo = [(node_id, name) for name in reversed(names)]
    seen: set[tuple[str, str]] = set()
    while todo:
        node_id, name = place = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        value = graph[node_id]["inputs"].get(name)
        if _is_a(value, kind):
            return Target(node_id, name)
        source = _link_source(graph, value)
        if source is not None:
            todo += [(source, name) for name in reversed(names_of_sources)]
    return None


def _text_behind_positive(graph: Graph) -> list[Target]:
    """Follow each link into an input called ``positive`` up to the text widgets it comes from.

    Raises BatchError for a prompt schedule that goes on from another conditioning.
    """
    found: dict[Target, None] = {}
    seen: set[str] = set()
    todo = [source for node in graph.values() if (source := _link_source(graph, node["inputs"].get("positive")))]
    while todo:
        node_id = todo.pop(0)
        if node_id in seen:
            continue
        seen.add(node_id)
        target = _widget_behind(graph, node_id, TEXT_INPUTS, str)
        if target:
            _refuse_later_rows(graph, node_id)
            found[target] = None
            continue
        inputs = graph[node_id]["inputs"]
        # A node between encoder and sampler (ControlNet, conditioning maths) carries the positive side on.
        names = ["positive"] if "positive" in inputs else [n for n in inputs if "cond" in n]
        todo += [source for n in names if (source := _link_source(graph, inputs[n]))]
    return list(found)


def _refuse_later_rows(graph: Graph, node_id: str) -> None:
    """Raise BatchError for a prompt schedule whose rows come after others: a prompt alone begins the video."""
    node = graph[node_id]
    if node["class_type"] == PROMPT_SCHEDULE and _link_source(graph, node["inputs"].get("previous")):
        raise BatchError(
            f"the prompt would go to node {printable(node_id)} ({printable(_title(node))}), which goes on from its "
            "previous, and a prompt without a time begins the video; choose with --prompt-node ID[.INPUT] (that node, "
            f"too, where each prompt has a time). Candidates: {_describe(graph, _literals(graph, str))}"
        )


def _behind(graph: Graph, side: str, other: str) -> set[str]:
    """The nodes from which something comes into an input called ``side``, but for what comes in by ``other``."""
    found: set[str] = set()
    todo = [source for node in graph.values() if (source := _link_source(graph, node["inputs"].get(side)))]
    while todo:
        node_id = todo.pop()
        if node_id not in found:
            found.add(node_id)
            links = [value for name, value in graph[node_id]["inputs"].items() if name != other]
            todo += [source for value in links if (source := _link_source(graph, value))]
    return found


def _resolve_override(graph: Graph, flag: str, reference: str, names: tuple[str, ...], kind: Kind) -> Target:
    """A widget named by the user as a node id or title, with an optional ``.input`` behind it."""

    def nodes_called(name: str) -> list[str]:
        if name in graph:
            return [name]
        return [node_id for node_id, node in graph.items() if _title(node).casefold() == name.casefold()]

    node_ids, name = nodes_called(reference), None
    parts = reference.split(".")
    for place in range(len(parts) - 1, 0, -1):  # titles and inputs may have dots
        if not node_ids:
            node_ids, name = nodes_called(".".join(parts[:place])), ".".join(parts[place:])
    word = {str: "text widget", int: "whole-number widget"}.get(kind, "widget")
    candidates = _describe(graph, _literals(graph, kind))
    if len(node_ids) != 1:
        what = "no node" if not node_ids else f"{len(node_ids)} nodes (ids {', '.join(node_ids)})"
        raise BatchError(f"{flag} {reference!r} names {what}; give an id or title. {word}s: {candidates}")
    inputs = graph[node_ids[0]]["inputs"]
    usable = [n for n, v in inputs.items() if _is_a(v, kind)]
    if name is None:
        preferred = [n for n in names if n in usable]
        if not preferred and len(usable) != 1:
            raise BatchError(
                f"{flag} {reference!r}: the node has {len(usable)} {word}s "
                f"({', '.join(usable) or 'none'}); write {node_ids[0]}.INPUT. In the graph: {candidates}"
            )
        name = preferred[0] if preferred else usable[0]
    if name not in usable:
        what = "a link" if _link_source(graph, inputs.get(name)) else f"no {word}"
        raise BatchError(f"{flag} {reference!r}: {name!r} is {what} there; it has: {', '.join(usable) or 'no widget'}")
    return Target(node_ids[0], name)


def find_prompt_targets(graph: Graph, overrides: list[str]) -> list[Target]:
    """Where the prompt goes: as told, else what ``positive`` links to, else by title, else the encoder.

    Raises BatchError where that is no place or more than one, or a prompt schedule that goes on from another; what only
    ``negative`` links to is none.
    """
    if overrides:
        return [_resolve_override(graph, "--prompt-node", ref, TEXT_INPUTS, str) for ref in overrides]
    found = _text_behind_positive(graph)
    # Where a text is behind a positive input that is not understood, another text of the graph is not it.
    usable = (_behind(graph, "positive", "negative") or set(graph)) - _behind(graph, "negative", "positive")
    if not found:
        titled = [node_id for node_id in graph if _title(graph[node_id]).casefold() in PROMPT_TITLES]
        found = _texts_of(graph, titled, usable)
    if not found:
        encoders = [node_id for node_id in graph if graph[node_id]["class_type"].startswith("CLIPTextEncode")]
        found = _texts_of(graph, encoders, usable)
    if len(found) != 1:
        candidates = _describe(graph, found or _literals(graph, str))
        raise BatchError(
            f"the graph has {len(found)} places for the prompt; choose with --prompt-node ID[.INPUT] "
            f"(more than once to set several). Candidates: {candidates}"
        )
    return found


def _texts_of(graph: Graph, node_ids: list[str], usable: set[str]) -> list[Target]:
    found = {i: t for i in node_ids if i in usable and (t := _widget_behind(graph, i, TEXT_INPUTS, str))}
    for node_id in found:
        _refuse_later_rows(graph, node_id)
    return list(found.values())


def find_seed_targets(graph: Graph, overrides: list[str]) -> list[Target]:
    """Where the seed goes: as told, else the input called seed or noise_seed, else by title.

    Raises BatchError where that is no place or more than one; a link to something that holds no number is a place.
    """
    if overrides:
        return [_resolve_override(graph, "--seed-node", ref, (*SEED_INPUTS, "value"), int) for ref in overrides]
    owners = [node_id for node_id, node in graph.items() if any(name in node["inputs"] for name in SEED_INPUTS)]
    behind = {node_id: _widget_behind(graph, node_id, SEED_INPUTS, int) for node_id in owners}
    found = dict.fromkeys(target for target in behind.values() if target)
    places = len(found)
    if found:
        linked = [graph[i]["inputs"].get(name) for i, target in behind.items() if not target for name in SEED_INPUTS]
        places += sum(_link_source(graph, value) is not None for value in linked)
    else:
        titled = [node_id for node_id, node in graph.items() if _title(node).casefold() in SEED_TITLES]
        found = dict.fromkeys(
            t for node_id in titled if (t := _widget_behind(graph, node_id, (*SEED_INPUTS, "value"), int))
        )
        places = len(found)
    if places != 1:
        candidates = _describe(graph, list(found) if 1 < len(found) == places else _literals(graph, int))
        raise BatchError(
            f"the graph has {places} places for the seed; choose with --seed-node ID[.INPUT] "
            f"(more than once to set several). Candidates: {candidates}"
        )
    return list(found)


# ------------------------------------------------------------------------------------------------ shot lists


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine that a cell names, and the plain name under which a server gets it."""

    path: Path
    cell: str
    digest: str

    @property
    def name(self) -> str:
        return f"{slug(self.path.stem)}_{self.digest[:16]}{self.path.suffix.lower()}"


@dataclass(frozen=True)
class Row:
    """One row of a shot list.

    Attributes:
        seed: None where the list has no column for it.
        values: what the row sets beside prompt and seed. A local file is there under its name on the servers.
        files: those of ``values`` that are local files.
        place: the file and the row, for messages.
    """

    prompt: str
    seed: int | None
    name: str
    values: dict[Target, Any]
    files: dict[Target, LocalFile]
    place: str

    def decimals(self, graph: Graph) -> list[Target]:
        """Where it has a decimal number in place of a whole one."""
        return [
            target
            for target, value in self.values.items()
            if isinstance(value, float) and isinstance(graph[target.node_id]["inputs"][target.name], int)
        ]

    @property
    def values_by_name(self) -> dict[str, Any]:
        return {f"{target.node_id}.{target.name}": value for target, value in self.values.items()}


def is_shot_list(path: Path) -> bool:
    return path.suffix.lower() in TABLE_SUFFIXES + LINES_SUFFIXES


def read_shots(path: Path, graph: Graph, prompt_targets: list[Target], seed_targets: list[Target]) -> list[Row]:
    """The rows of a shot list: a table with a header (.csv, .tsv), or an object of JSON a line (.jsonl).

    A column is one of COLUMNS, or names a widget of the graph, as --prompt-node does. An empty cell (null, or a key
    that is not there, in JSON) keeps the graph's value; any other becomes of that value's type. A decimal number for a
    whole one is left a decimal, for the server to judge: graphs have 1 for 1.0.

    Raises BatchError, with the row and the column, for what is no such list.
    """
    text = _read_text(path)
    is_table = path.suffix.lower() in TABLE_SUFFIXES
    numbered = list(_table_rows(path, text) if is_table else _json_rows(path, text))
    columns = dict.fromkeys(column for _, cells in numbered for column in cells)
    targets = _targets_of(path, graph, list(columns), {"prompt": prompt_targets, "seed": seed_targets})
    has_seed = any(column.casefold() == "seed" for column in columns)
    digests: dict[Path, str] = {}
    rows = []
    for number, cells in numbered:
        place = f"{path} row {number}"
        own: dict[str, Any] = {}
        values: dict[Target, Any] = {}
        files: dict[Target, LocalFile] = {}
        for column, cell in cells.items():
            if cell is None:
                continue
            try:
                if (target := targets.get(column)) is None:
                    own[column.casefold()] = _own_cell(column.casefold(), cell)
                    continue
                values[target] = _cast(cell, graph[target.node_id]["inputs"][target.name])
                if file := _local_file(path, values[target], digests):
                    files[target], values[target] = file, file.name
            except ValueError as error:
                raise BatchError(f"--prompts: {place}, column {column}: {error}") from error
        if "prompt" not in own:
            own["prompt"] = _kept(graph, prompt_targets, place, "prompt")
        if "seed" not in own and has_seed:
            own["seed"] = _kept(graph, seed_targets, place, "seed")
        rows.append(Row(own["prompt"], own.get("seed"), own.get("name", ""), values, files, place))
    if not rows:
        raise BatchError(f"--prompts: {path} holds no {'row below its header' if is_table else 'line'}")
    return rows


def _targets_of(path: Path, graph: Graph, columns: list[str], taken: dict[str, list[Target]]) -> dict[str, Target]:
    """The widgets that the columns name, but for COLUMNS; ``taken`` has those that prompt and seed set."""
    targets: dict[str, Target] = {}
    for column in columns:
        if column.casefold() in COLUMNS:
            continue
        target = _resolve_override(graph, f"--prompts: {path}: the column", column, (), WIDGETS)
        for name, places in taken.items():
            if target in places:
                raise BatchError(f"--prompts: {path}: the column {column!r} is the {name}; call it {name}")
        if target in targets.values():
            raise BatchError(f"--prompts: {path}: the column {column!r} sets what another column sets")
        targets[column] = target
    return targets


def _kept(graph: Graph, targets: list[Target], place: str, name: str) -> Any:
    """The graph's own prompt or seed. Raises BatchError where its places differ."""
    found = [graph[target.node_id]["inputs"][target.name] for target in targets]
    if any(value != found[0] for value in found):
        raise BatchError(f"--prompts: {place} has no {name}, and the graph has several; write it in")
    return found[0]


def _table_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """The rows of a table that hold anything, by their number; the header is row 1."""

    def parse(delimiter: str, *, strict: bool) -> Iterator[list[str]]:
        return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)

    number = 0
    try:
        delimiter = "\t"
        if path.suffix.lower() != ".tsv":
            delimiter = max(DELIMITERS, key=lambda delimiter: len(next(parse(delimiter, strict=False), [])))
        header: list[str] | None = None
        for number, record in enumerate(parse(delimiter, strict=True), 1):
            cells = [cell.strip() for cell in record]
            while cells and not cells[-1]:
                cells.pop()
            if header is None:
                header = cells
                _check_header(path, header)
            elif len(cells) > len(header):
                raise BatchError(
                    f"--prompts: {path} row {number} has {len(cells)} cells and the header {len(header)}; "
                    f'a text with {delimiter!r} in it needs quotes: "..."'
                )
            elif cells:
                cells += [""] * (len(header) - len(cells))
                yield number, {column: cell or None for column, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise BatchError(f"--prompts: {path} is no table, behind row {number}: {error}") from error


def _check_header(path: Path, header: list[str]) -> None:
    if not header or "" in header:
        where = f"column {header.index('') + 1}" if header else "row 1"
        raise BatchError(f"--prompts: {path}: {where} has no name; the first row names the columns: prompt, seed, ...")
    names = [column.casefold() for column in header]
    twice = [column for n, column in enumerate(header) if column.casefold() in names[:n]]
    if twice:
        raise BatchError(f"--prompts: {path} has the column {twice[0]!r} twice")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, by their line."""
    for number, line in enumerate(re.split("\r\n|\n", text), 1):
        if not line.strip():
            continue
        cells = json_object(line.encode())
        if cells is None:
            raise BatchError(f"--prompts: {path} row {number} is no JSON object; write one a line")
        _check_header(path, list(cells) or [""])
        yield number, cells


def _own_cell(name: str, cell: Any) -> str | int:
    """A cell of one of COLUMNS. Raises ValueError."""
    if name != "seed":
        return _cast(cell, "").strip()
    seed = _cast(cell, 0)
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{printable(str(cell), 40)!r} is no seed; write a whole number from 0 to {MAX_SEED}")
    return seed


def _cast(cell: Any, old: Any) -> Any:
    """A cell in the type of the value that it replaces, but for decimals in place of a whole number.

    Raises ValueError, in words for the person who wrote the list.
    """
    shown = repr(printable(cell if isinstance(cell, str) else json.dumps(cell), 40))
    if isinstance(old, str):
        if not isinstance(cell, str):
            raise ValueError(f"{shown} is no text; write it in quotes")
        if "\0" in cell or any("\ud800" <= character <= "\udfff" for character in cell):
            raise ValueError("it holds a zero byte or half a character, which is no text")
        return cell
    if isinstance(old, bool):
        word = json.dumps(cell) if isinstance(cell, bool) else cell.strip().casefold() if isinstance(cell, str) else ""
        if word not in WORDS_OF_TRUTH:
            raise ValueError(f"{shown} is neither true nor false")
        return WORDS_OF_TRUTH[word]
    if not isinstance(cell, (str, int, float)) or isinstance(cell, bool):
        raise ValueError(f"{shown} is no number")
    text = str(cell).strip()
    whole = re.fullmatch(r"([+-]?\d{1,20})(?:\.0*)?", text, re.ASCII)
    if whole and isinstance(old, int):
        return int(whole[1])
    if not re.fullmatch(r"[+-]?(\d{1,40}(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?", text, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{shown} is no number; write it like {81 if isinstance(old, int) else 0.5}")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown} is too large a number")
    return number


def _local_file(path: Path, value: Any, digests: dict[Path, str]) -> LocalFile | None:
    """The picture, video or sound of this machine that a cell names, from the list's folder; None where it is none.

    Raises ValueError where it cannot be read.
    """
    if not isinstance(value, str) or os.path.splitext(value)[1].lower() not in LOCAL_SUFFIXES:
        return None
    file = path.parent / value
    if not os.path.isfile(file):
        return None
    try:
        if file not in digests:
            with open(file, "rb") as opened:
                hasher = hashlib.sha256()
                while block := opened.read(1 << 20):
                    hasher.update(block)
            digests[file] = hasher.hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    return LocalFile(file, value, digests[file])


# ------------------------------------------------------------------------------------------------------ jobs


def job_key(prompt: str, seed: int, values: dict[str, Any]) -> Key:
    """What tells one job of a batch from another: (prompt, seed), and the text of its values where it has any."""
    return (prompt, seed, json.dumps(values, sort_keys=True)) if values else (prompt, seed)


@dataclass(eq=False)
class Job:
    """One (prompt, seed) combination, or row of a shot list; ``name`` is made of letters, digits, - and _ only."""

    index: int
    prompt: str
    seed: int
    name: str
    prompt_id: str
    row: Row | None = None
    home: str | None = None  # the server that an earlier, killed run had given it to
    attempts: int = 0  # how often it was sent to the server that has it
    losses: int = 0  # how often a server was lost while this job ran there
    downloads: int = 0  # attempts to fetch its results
    started: bool = False  # the server that has it has said so
    ended: bool = False  # it is in the server's history
    outcome_unknown: bool = False  # the connection broke while the request was under way
    missing: int = 0  # polls in a row that found it neither queued nor finished
    posted: float = 0.0
    tried: dict[str, str] = field(default_factory=dict)  # the servers that refused or failed it, and why

    @property
    def values(self) -> dict[str, Any]:
        """What its row sets, by "ID.INPUT"."""
        return self.row.values_by_name if self.row else {}

    @property
    def key(self) -> Key:
        return job_key(self.prompt, self.seed, self.values)

    def renew(self) -> None:
        """Forget the server that had it: the next one gets it under another id."""
        self.prompt_id, self.home = str(uuid.uuid4()), None
        self.attempts = self.downloads = self.missing = 0
        self.started = self.ended = self.outcome_unknown = False
        self.posted = 0.0


def slug(text: str) -> str:
    """A short ASCII name for any text: letters, digits and single dashes; never a path, never empty."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:SLUG_LENGTH].strip("-") or "prompt"


def make_jobs(prompts: list[str], seeds: list[int], digest: str) -> list[Job]:
    """All combinations, numbered from 1, prompt by prompt; ``digest`` keeps two graphs' files apart."""
    if len(prompts) * len(seeds) > MAX_JOBS:
        raise BatchError(f"{len(prompts)} prompts x {len(seeds)} seeds is more than {MAX_JOBS} jobs; split the batch")
    return [_make_job(n, *pair, digest) for n, pair in enumerate(itertools.product(prompts, seeds), 1)]


def make_row_jobs(rows: list[Row], seeds: list[int], digest: str) -> list[Job]:
    """One job a row with a seed, one a seed of ``seeds`` for others, numbered from 1; what repeats is made once."""
    if len(rows) * len(seeds) > MAX_JOBS:
        raise BatchError(f"{len(rows)} rows x {len(seeds)} seeds is more than {MAX_JOBS} jobs; split the batch")
    jobs: dict[Key, Job] = {}
    for row in rows:
        for seed in seeds if row.seed is None else [row.seed]:
            if job_key(row.prompt, seed, row.values_by_name) not in jobs:
                job = _make_job(len(jobs) + 1, row.prompt, seed, digest, row)
                jobs[job.key] = job
    return list(jobs.values())


def _make_job(index: int, prompt: str, seed: int, digest: str, row: Row | None = None) -> Job:
    key = job_key(prompt, seed, row.values_by_name if row else {})
    mark = hashlib.sha256("\0".join(map(str, (digest, *key))).encode("utf-8", "backslashreplace")).hexdigest()[:8]
    name = f"{index:04d}_s{seed}_{slug(row.name or prompt if row else prompt)}_{mark}"
    return Job(index, prompt, seed, name, str(uuid.uuid4()), row)


def widget_spec(info: dict[str, Any], class_type: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The type of an input and its options, in a server's answer to /object_info; (None, {}) where it has none."""
    sections = (info.get(class_type) or {}).get("input") or {}
    for section in ("required", "optional"):
        spec = (sections.get(section) or {}).get(name)
        if isinstance(spec, list) and spec:
            return spec[0], spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    return None, {}


def takes_uploads(options: dict[str, Any]) -> bool:
    """Whether an input takes files that were uploaded to the server's input folder."""
    uploads = any(name.endswith("_upload") and value for name, value in options.items())
    return uploads and options.get("image_folder") in (None, "input")


def graph_for(graph: Graph, job: Job, prompt_targets: list[Target], seed_targets: list[Target]) -> Graph:
    """A copy of the graph with this job's prompt, seed, values and file names."""
    result = copy.deepcopy(graph)
    for target, value in job.row.values.items() if job.row else ():
        result[target.node_id]["inputs"][target.name] = value
    for target in prompt_targets:
        result[target.node_id]["inputs"][target.name] = job.prompt
    for target in seed_targets:
        result[target.node_id]["inputs"][target.name] = job.seed
    for node in result.values():
        prefix = node["inputs"].get("filename_prefix")
        if isinstance(prefix, str):
            node["inputs"]["filename_prefix"] = f"{prefix}_{job.name}"
    return result


def graph_digest(graph: Graph, targets: list[Target]) -> str:
    """A short hash of what the batch keeps constant: the graph without its prompt and seed widgets and its titles."""
    fixed = copy.deepcopy(graph)
    for node in fixed.values():
        node.pop("_meta", None)
    for target in targets:
        fixed[target.node_id]["inputs"][target.name] = None
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def printable(text: str, limit: int = 300) -> str:
    """Text of others made fit for a terminal: no control characters, at most ``limit`` characters."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


# --------------------------------------------------------------------------------------------------- answers


def status_text(status: int) -> str:
    """An HTTP status in an error message."""
    hint = ", a redirect, which is not followed; give --server the address that it leads to"
    return f"HTTP {status}{hint if 300 <= status < 400 else ''}"


def refusal(status: int, answer: Any) -> str:
    """The server's reason for not taking a graph, node by node."""
    if not isinstance(answer, dict):
        return f"the server refused the graph: {status_text(status)}"
    parts = []
    node_errors = answer.get("node_errors")
    for node_id, node in node_errors.items() if isinstance(node_errors, dict) else ():
        for error in node.get("errors") or []:
            details = f": {error['details']}" if error.get("details") else ""
            parts.append(f"{node.get('class_type')} (node {node_id}): {error.get('message')}{details}")
    if not parts:
        error = answer.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        parts.append(str(message or status_text(status)))
    return printable("; ".join(parts), 1000)


def failure(entry: dict[str, Any]) -> str | None:
    """What went wrong in a finished job, or None if it succeeded."""
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return None
    for event, data in status.get("messages") or []:
        if event == "execution_error":
            where = f"{data.get('node_type')} (node {data.get('node_id')})"
            return printable(
                f"{where}: {data.get('exception_type')}: {str(data.get('exception_message')).strip()}", 1000
            )
        if event == "execution_interrupted":
            return INTERRUPTED
    return "failed on the server, which gave no reason"


# ------------------------------------------------------------------------------------------------------- log


def without_login(url: str) -> str:
    """The address of a server without the name and the password in it: what is shown and kept in files."""
    return re.sub(r"(?<=://)[^/\s]*@", "", url, count=1)


class BatchLog:
    """The JSON-lines log, one line a finished job, and beside it the ids in flight (LOG.inflight).

    Attributes:
        done: the keys of the jobs that an earlier run finished with the graph ``digest``.
        foreign: how many finished lines another graph made.
        inflight: key -> (prompt id, server) of jobs whose end is not known.
        clients: server -> the id to which it sends the events of its jobs.

    LOG.lock keeps a second program from it. Raises BatchError where the log cannot be used.
    """

    def __init__(self, path: Path, digest: str, *, resume: bool) -> None:
        self.path, self.digest = path, digest
        self.done: set[Key] = set()
        self.foreign = 0
        self.inflight_path = path.with_name(path.name + ".inflight")
        self.inflight: dict[Key, tuple[str, str]] = {}
        self.clients: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(path.with_name(path.name + ".lock"), "ab")
            try:
                self._file = self._open(resume=resume)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise BatchError(f"--log: cannot use {path}: {error.strerror}") from error

    def _open(self, *, resume: bool) -> FileIO:
        if not self._is_ours():
            raise BatchError(f"--log: another queue_batch.py is using this log ({self.path}); name another file")
        size = self.path.stat().st_size if self.path.exists() else 0
        if (size or self.inflight_path.exists()) and not resume:
            raise BatchError(
                f"the log {self.path} is there from an earlier run; add --resume to skip what it has done, "
                "or name another file with --log"
            )
        if size:
            self._read_and_repair()
        if self.inflight_path.exists():
            self._read_inflight()
        return open(self.path, "ab", buffering=0)

    def _is_ours(self) -> bool:
        try:
            return try_lock(self._lock.fileno())
        except OSError:  # some network drives have no locks
            return True

    def _read_and_repair(self) -> None:
        """Read all lines; a half line that a crash left at the end is cut off."""
        raw = self.path.read_bytes()
        *lines, tail = raw.split(b"\n")
        for number, line in enumerate(lines, 1):
            record = json_object(line)
            if record is None and line.strip():
                raise BatchError(f"--log: line {number} of {self.path} is no JSON object; is this the log of a batch?")
            self._count(record or {"status": "error"})
        if not tail:
            return
        record = json_object(tail)
        if record is None and not tail.startswith((b"{", b"\0")):
            raise BatchError(f"--log: the last line of {self.path} is no JSON; is this the log of a batch?")
        with open(self.path, "r+b") as file:
            if record is None:
                file.truncate(len(raw) - len(tail))
            else:
                self._count(record)
                file.seek(0, os.SEEK_END)
                file.write(b"\n")

    def _read_inflight(self) -> None:
        content = json_object(self.inflight_path.read_bytes()) or {}
        jobs = content.get("jobs") if content.get("graph") == self.digest else None
        for item in jobs if isinstance(jobs, list) else ():
            kinds = [type(value) for value in item] if isinstance(item, list) else []
            if kinds[:2] == [str, int] and kinds[2:] in ([str] * 2, [str] * 3):  # without and with values
                *key, prompt_id, server = item
                is_id = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", prompt_id)
                if is_id and tuple(key) not in self.done:  # a kill between the two files leaves it in both
                    self.inflight[tuple(key)] = prompt_id, without_login(server)
        clients = content.get("clients") if self.inflight else None  # earlier versions kept none
        for server, client in clients.items() if isinstance(clients, dict) else ():
            if isinstance(client, str) and re.fullmatch("[0-9a-f]{32}", client):
                self.clients[server] = client
        self._save_inflight()

    def client_id(self, server: str) -> str:
        """The id to connect to a server with: that of its jobs in flight, which an earlier run sent, else a new one."""
        return self.clients.setdefault(server, uuid.uuid4().hex)

    def _count(self, record: dict[str, Any]) -> None:
        if record.get("status", "done") != "done" or record.get("error"):
            return
        if record.get("graph", self.digest) == self.digest:
            prompt, seed = record.get("prompt"), record.get("seed")
            values = record.get("values", {})
            if isinstance(prompt, str) and isinstance(seed, int) and isinstance(values, dict):
                self.done.add(job_key(prompt, seed, values))
        else:
            self.foreign += 1

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and make it durable before anything else happens. Raises BatchError."""
        line = json.dumps(record, ensure_ascii=False).translate(LINE_BREAKS) + "\n"
        raw = line.encode("utf-8", "backslashreplace")
        try:
            end = self._file.seek(0, os.SEEK_END)
            if self._file.write(raw) != len(raw):  # a disk that fills up takes a part
                self._file.truncate(end)
                raise BatchError(f"cannot write the log {self.path}: the disk took a part of a line; is it full?")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BatchError(f"cannot write the log {self.path}: {error.strerror}") from error

    def start(self, job: Job, server: str) -> None:
        self.inflight[job.key] = job.prompt_id, server
        self._save_inflight()

    def forget(self, job: Job) -> None:
        if self.inflight.pop(job.key, None):
            self._save_inflight()

    def _save_inflight(self) -> None:
        jobs = [[*key, *value] for key, value in self.inflight.items()]
        partial = self.inflight_path.with_name(self.inflight_path.name + ".partial")
        try:
            if jobs:
                content = {"graph": self.digest, "clients": self.clients, "jobs": jobs}
                partial.write_text(json.dumps(content), encoding="utf-8")
                replace_file(partial, self.inflight_path)
            else:
                remove_file(self.inflight_path)
        except OSError as error:
            raise BatchError(f"cannot write {self.inflight_path}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()
        self._lock.close()


def json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
