"""The jobs of queue_batch.py: input files, where prompt and seed go in a graph, file names, and the log.

Nothing here talks to a server, and nothing a prompts file says becomes a path.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import unicodedata
import uuid
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from diagonal_sampler.disk import remove_file, replace_file, try_lock

Graph = dict[str, dict[str, Any]]

MAX_SEED = 2**64 - 1  # ComfyUI's own bound for seed widgets
MAX_JOBS = 1_000_000  # a slip like 0-99999999999 is refused before it fills the memory
SLUG_LENGTH = 32
TEXT_INPUTS = ("text", "prompt", "value", "string")
SEED_INPUTS = ("seed", "noise_seed")
PROMPT_TITLES = frozenset({"prompt", "positive", "positive prompt"})
PROMPT_SCHEDULE = "DiagonalPromptSchedule"
SEED_TITLES = frozenset({"seed", "noise seed"})
INTERRUPTED = "interrupted on the server"  # by a person: no failure of the job or the server
OTHER_FORMATS = {
    **dict.fromkeys((".csv", ".tsv", ".xlsx"), "a table"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "JSON"),
    ".rtf": "RTF",
}
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
    # Files put together keep the byte order mark of each.
    lines = [line.strip().strip("\ufeff").strip() for line in re.split("\r\n|\r|\n", text)]
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise BatchError(f"--prompts: {path} holds no prompt; write one a line")
    if any("\0" in prompt for prompt in prompts):
        raise BatchError(f"--prompts: {path} holds a zero byte; save the file again as UTF-8 text")
    _refuse_other_formats(path, prompts)
    return prompts


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
        raise BatchError(f"--prompts: {path} is {kind}; give a text file with one prompt a line and nothing else")


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


def _literals(graph: Graph, kind: type) -> list[Target]:
    """Every widget of the graph that holds a ``kind`` (bool is no int here), in graph order."""
    return [
        Target(node_id, name)
        for node_id, node in graph.items()
        for name, value in node["inputs"].items()
        if isinstance(value, kind) and not isinstance(value, bool)
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
        if isinstance(value, kind) and not isinstance(value, bool):
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


def _resolve_override(graph: Graph, flag: str, reference: str, names: tuple[str, ...], kind: type) -> Target:
    """A widget named by the user as a node id or title, with an optional ``.input`` behind it."""

    def nodes_called(name: str) -> list[str]:
        if name in graph:
            return [name]
        return [node_id for node_id, node in graph.items() if _title(node).casefold() == name.casefold()]

    node_ids, name = nodes_called(reference), None
    if not node_ids and "." in reference:
        head, _, name = reference.rpartition(".")
        node_ids = nodes_called(head)
    word = "text" if kind is str else "whole-number"
    candidates = _describe(graph, _literals(graph, kind))
    if len(node_ids) != 1:
        what = "no node" if not node_ids else f"{len(node_ids)} nodes (ids {', '.join(node_ids)})"
        raise BatchError(f"{flag} {reference!r} names {what}; give an id or title. {word} widgets: {candidates}")
    inputs = graph[node_ids[0]]["inputs"]
    usable = [n for n, v in inputs.items() if isinstance(v, kind) and not isinstance(v, bool)]
    if name is None:
        preferred = [n for n in names if n in usable]
        if not preferred and len(usable) != 1:
            raise BatchError(
                f"{flag} {reference!r}: the node has {len(usable)} {word} widgets "
                f"({', '.join(usable) or 'none'}); write {node_ids[0]}.INPUT. In the graph: {candidates}"
            )
        name = preferred[0] if preferred else usable[0]
    if name not in usable:
        raise BatchError(f"{flag} {reference!r}: {name!r} is no {word} widget there; it has: {', '.join(usable)}")
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


# ------------------------------------------------------------------------------------------------------ jobs


@dataclass(eq=False)
class Job:
    """One (prompt, seed) combination; ``name`` is made of letters, digits, - and _ only."""

    index: int
    prompt: str
    seed: int
    name: str
    prompt_id: str
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
    def key(self) -> tuple[str, int]:
        return self.prompt, self.seed

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
    jobs = []
    for prompt in prompts:
        for seed in seeds:
            mark = hashlib.sha256(f"{digest}\0{prompt}\0{seed}".encode("utf-8", "backslashreplace")).hexdigest()[:8]
            name = f"{len(jobs) + 1:04d}_s{seed}_{slug(prompt)}_{mark}"
            jobs.append(Job(len(jobs) + 1, prompt, seed, name, str(uuid.uuid4())))
    return jobs


def graph_for(graph: Graph, job: Job, prompt_targets: list[Target], seed_targets: list[Target]) -> Graph:
    """A copy of the graph with this job's prompt, seed and file names."""
    result = copy.deepcopy(graph)
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
        done: the (prompt, seed) pairs that an earlier run finished with the graph ``digest``.
        foreign: how many finished lines another graph made.
        inflight: (prompt, seed) -> (prompt id, server) of jobs whose end is not known.
        clients: server -> the id to which it sends the events of its jobs.

    LOG.lock keeps a second program from it. Raises BatchError where the log cannot be used.
    """

    def __init__(self, path: Path, digest: str, *, resume: bool) -> None:
        self.path, self.digest = path, digest
        self.done: set[tuple[str, int]] = set()
        self.foreign = 0
        self.inflight_path = path.with_name(path.name + ".inflight")
        self.inflight: dict[tuple[str, int], tuple[str, str]] = {}
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
            if isinstance(item, list) and [type(value) for value in item] == [str, int, str, str]:
                prompt, seed, prompt_id, server = item
                is_id = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", prompt_id)
                if is_id and (prompt, seed) not in self.done:  # a kill between the two files leaves it in both
                    self.inflight[prompt, seed] = prompt_id, without_login(server)
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
            if isinstance(prompt, str) and isinstance(seed, int):
                self.done.add((prompt, seed))
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
