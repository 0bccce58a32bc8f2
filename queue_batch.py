"""Queue every (prompt, seed) combination of an API graph on one or several ComfyUI servers.

    python queue_batch.py workflows/api/demo.json --prompts prompts.txt --seeds 0-3,7 \
        --server http://127.0.0.1:8188 --server http://127.0.0.1:8189 --output output/batch

A shot list (.csv, .tsv, .jsonl) in place of the prompts is one job a row, with columns for widgets of the graph.

Each finished job is one line of JSON in the log (prompt, seed, file, seconds, server, status, error); with
``--resume`` the jobs the log has as done are skipped. A lost connection runs no job twice: every job carries
an id of our own, which is looked up in the server's queue and history before it is queued again. The ids in
flight are kept in ``LOG.inflight`` so that this also holds when this program itself is killed.

Exit status: 0 every job done, 1 some failed or were not run, 2 wrong arguments, 130 stopped by Ctrl-C
(by a terminal that was closed, too).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import sys
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

try:
    import aiohttp
except ModuleNotFoundError:
    raise SystemExit(
        "queue_batch.py needs aiohttp, which ComfyUI installs too: run it with ComfyUI's Python "
        "(after quickstart.py: .venv/bin/python, on Windows .venv\\Scripts\\python)"
    ) from None

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    HAVE_RICH = True
except ModuleNotFoundError:
    HAVE_RICH = False

if __name__ == "__main__":  # the Python of ComfyUI's portable build does not look for modules beside the script
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from batch_jobs import (  # noqa: E402
    INTERRUPTED,
    BatchError,
    BatchLog,
    Graph,
    Job,
    LocalFile,
    Target,
    failure,
    find_prompt_targets,
    find_seed_targets,
    graph_digest,
    graph_for,
    is_shot_list,
    json_object,
    load_graph,
    make_jobs,
    make_row_jobs,
    parse_seeds,
    printable,
    read_prompts,
    read_shots,
    refusal,
    status_text,
    takes_uploads,
    widget_spec,
    without_login,
)
from diagonal_sampler.disk import whole_file  # noqa: E402

MAX_ATTEMPTS = 3  # a job that takes its server down with it is not tried for ever
MAX_FAULTS = 3  # jobs in a row that a server cannot do and others can: it is the server
POLL_SECONDS = 5.0  # the websocket tells at once; this finds what it missed
TICK_SECONDS = 0.5
QUIET_SECONDS = 600.0  # without a word of the job whose turn it is: few nodes take that long, a dead worker for ever
HEARTBEAT_SECONDS = 30.0  # generous: a server in a long compile answers pings late
PATIENCE_SECONDS = 600.0
FIRST_CONTACT_SECONDS = 10.0  # a server that never answered is given up sooner than one that was lost
RETRY_SECONDS = 30.0  # how often one that was given up is looked for while others work
STALL_MINUTES = 60.0
STABLE_SECONDS = 5.0  # a connection that held this long was a good one
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 10.0
CONNECT_SECONDS = 20.0
SECOND_LOOK_SECONDS = 2.0  # a request whose connection broke may still be in the server's hands
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
DOWNLOAD_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
CANCEL_TIMEOUT = aiohttp.ClientTimeout(total=10)
ADDRESS = re.compile(r"https?://[^/?#\s]+(/[^?#\s]*)?")
PASSING_STATUS = {502, 503, 504}  # a proxy before a server that is restarting
ODD_ANSWER = (TypeError, AttributeError, LookupError, ValueError)  # what reading a server that is no ComfyUI raises
MAX_IMAGES = 1_000_000  # of one result: a name with a larger number was not counted up to
# Results keep these suffixes; any other becomes .bin, so that no server makes a download a program by name.
MEDIA_SUFFIXES = frozenset(
    ".mp4 .webm .mkv .mov .avi .gif .png .jpg .jpeg .webp .avif .exr .tiff .flac .mp3 .opus .ogg .wav "
    ".safetensors .latent .glb .obj .txt .json".split()
)
VIDEO_SUFFIXES = frozenset(".mp4 .webm .mkv .mov .avi .gif".split())


class DownloadError(Exception):
    """A result that the server does not hand over."""


class UploadError(Exception):
    """A file of a shot list that is not what it was, or that the server does not take."""


class ServerUnfit(Exception):
    """The server answers, and is of no use to this batch."""


class ConnectionLost(Exception):
    """The server cannot be reached now; ``refused`` when nothing listens on its port."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


# --------------------------------------------------------------------------------------------------- servers


def server_address(text: str) -> tuple[str, dict[str, str]]:
    """The address of a server, and the HTTP headers that carry the login in it ({} where it has none).

    The address is returned without the login, as it is printed, logged and names the server everywhere; without a
    slash at its end, and with http:// where no scheme is given. Raises BatchError where the text is no address; one
    with ? or # in it is none, and what it shows has neither login nor query, which may be a token.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)  # its port raises ValueError where it is no number, and so does a host like a..b
        is_url = ADDRESS.fullmatch(url) and parts.port != 0 and parts.hostname.encode("idna")
        name, password = unquote(parts.username or ""), unquote(parts.password or "")
        is_url = is_url and ":" not in name  # the header has no way to say it
        login = base64.b64encode(f"{name}:{password}".encode()).decode()
    except (ValueError, AttributeError):
        is_url = False
    if not is_url:
        shown = re.sub(r".*[?#].*@.*|.+(?=@)|[?#].*", "...", text, flags=re.DOTALL)
        raise BatchError(f"--server {shown!r} is no address; write it like http://127.0.0.1:8188, without ? and #")
    return without_login(url).rstrip("/"), {"Authorization": f"Basic {login}"} if name or password else {}


def _lost(error: BaseException) -> ConnectionLost:
    cause = getattr(error, "os_error", error)
    refused = isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) == errno.ECONNREFUSED
    return ConnectionLost(str(error) or type(error).__name__, refused=refused)


@dataclass(eq=False)
class Server:
    """HTTP calls to one ComfyUI server; any failure to get an answer is a ConnectionLost.

    An answer that is not as ComfyUI's raises one of ODD_ANSWER, here or where it is read. Redirects are not followed:
    they could take a graph to another host.
    """

    url: str
    session: aiohttp.ClientSession
    headers: dict[str, str] = field(default_factory=dict, repr=False)  # with its login
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    jobs: dict[str, Job] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    reached: bool = False
    open: bool = True  # it may get jobs: False once it is given up, until it answers again
    out: bool = False  # it gets no more jobs, whatever it answers
    settled: int = 0  # jobs that it did
    faults: int = 0  # jobs in a row that it refused or failed and another did
    doubts: int = 0  # jobs that it refused or failed and left to another, since the last that it did
    head: str | None = None  # the id at the head of its queue when that was last read
    heard: float = 0.0  # when it last said something of a job that it has, went on to another or was connected
    quiet: bool = False  # whether a person was told that it says nothing
    renewed: bool = False  # whether its websocket was opened anew since it last said something
    info: dict[str, Any] = field(default_factory=dict)  # /object_info of the nodes that were asked for
    uploaded: set[str] = field(default_factory=set)  # names of files that it has, as long as it is connected

    @property
    def label(self) -> str:
        return self.url.partition("://")[2]

    def hear(self) -> None:
        """It said something of a job that it has, or is not to say anything."""
        self.heard, self.quiet, self.renewed = time.monotonic(), False, False

    async def request(
        self,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout = REQUEST_TIMEOUT,
        body: Any = None,
        form: aiohttp.FormData | None = None,
    ) -> tuple[int, Any]:
        """The HTTP status and the JSON answer (None where it is not JSON)."""
        content = {"json": body} if form is None else {"data": form}
        try:
            async with self.session.request(
                method, self.url + path, **content, timeout=timeout, headers=self.headers, allow_redirects=False
            ) as response:
                raw = await response.read()
                status = response.status
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise _lost(error) from error
        if status in PASSING_STATUS:
            raise ConnectionLost(f"HTTP {status}")
        try:
            return status, json.loads(raw)
        except (ValueError, RecursionError):
            return status, None

    async def get(self, path: str) -> dict[str, Any]:
        status, answer = await self.request("GET", path)
        if status != 200 or not isinstance(answer, dict):
            raise ConnectionLost(f"GET {path} answered not as ComfyUI does: {status_text(status)}")
        return answer

    async def queued_ids(self) -> list[str]:
        """The ids that run or wait, as often as they do; marks those of ``jobs`` that run as started."""
        answer = await self.get("/queue")
        running, pending = ([entry[1] for entry in answer[f"queue_{state}"]] for state in ("running", "pending"))
        for prompt_id in running:
            if prompt_id in self.jobs:
                self.jobs[prompt_id].started = True
        return [*running, *pending]

    async def finished(self, prompt_id: str) -> dict[str, Any] | None:
        return (await self.get(f"/history/{prompt_id}")).get(prompt_id)

    async def widget(self, graph: Graph, target: Target) -> tuple[Any, dict[str, Any]]:
        """The type of a widget and its options, as this server has the node."""
        class_type = graph[target.node_id]["class_type"]
        if class_type not in self.info:
            self.info |= {class_type: None} | await self.get(f"/object_info/{quote(class_type, safe='')}")
        return widget_spec(self.info, class_type, target.name)

    async def upload(self, file: LocalFile) -> None:
        """Put a file into its input folder, under a name that says what is in it. Raises UploadError."""
        if file.name in self.uploaded:
            return
        try:
            content = await asyncio.to_thread(file.path.read_bytes)
        except OSError as error:
            raise UploadError(f"cannot read {file.path}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != file.digest:
            raise UploadError(f"{file.path} has changed since the batch began; start it again with --resume")
        form = aiohttp.FormData({"type": "input", "overwrite": "true"})
        form.add_field("image", content, filename=file.name, content_type="application/octet-stream")
        status, answer = await self.request("POST", "/upload/image", form=form, timeout=DOWNLOAD_TIMEOUT)
        if status != 200 or not isinstance(answer, dict) or answer.get("name") != file.name:
            raise UploadError(f"the server did not take {file.path}: {status_text(status)}")
        self.uploaded.add(file.name)

    async def cancel(self, jobs: list[Job]) -> bool:
        """Take our own jobs off the server, the waiting ones first; False if it does not answer."""
        try:
            ids = [job.prompt_id for job in jobs]
            await self.request("POST", "/queue", body={"delete": ids}, timeout=CANCEL_TIMEOUT)
            for prompt_id in ids:
                status, _ = await self.request("POST", f"/api/jobs/{prompt_id}/cancel", timeout=CANCEL_TIMEOUT)
                if status != 200:  # ComfyUI 0.24 has no such route
                    await self.request("POST", "/interrupt", body={"prompt_id": prompt_id}, timeout=CANCEL_TIMEOUT)
        except ConnectionLost:
            return False
        return True


def seconds_taken(entry: dict[str, Any], posted: float) -> float:
    """Seconds from start to end on the server; where it does not say, since the job was sent."""
    stamps = {
        event: data.get("timestamp")
        for event, data in (entry.get("status") or {}).get("messages") or []
        if isinstance(data, dict)
    }
    start = stamps.get("execution_start")
    end = stamps.get("execution_success") or stamps.get("execution_error") or stamps.get("execution_interrupted")
    if isinstance(start, (int, float)) and isinstance(end, (int, float)):
        return round((end - start) / 1000, 3)
    return round(time.monotonic() - posted, 3) if posted else 0.0


def result_files(entry: dict[str, Any]) -> list[dict[str, str]]:
    """The saved files that a history entry names, videos first; previews only where nothing was saved.

    They are in the order of their nodes' ids: that in which ComfyUI ran the nodes differs from one start to the next.
    The last of a sequence of images stands for all, and has a key ``in_sequence``.
    """
    found = []
    for _, output in sorted((entry.get("outputs") or {}).items(), key=lambda item: (len(item[0]), item[0])):
        for items in output.values() if isinstance(output, dict) else []:
            for item in items if isinstance(items, list) else []:
                if isinstance(item, dict) and isinstance(item.get("filename"), str):
                    file = {k: str(item.get(k) or "") for k in ("filename", "subfolder", "type")}
                    found.append(file | ({"in_sequence": "true"} if item.get("in_sequence") else {}))
    saved = [item for item in found if item["type"] == "output"] or found
    return sorted(saved, key=lambda item: media_suffix(item["filename"]) not in VIDEO_SUFFIXES)


def local_names(name: str, results: list[dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Every file of a job's results, and before it where it is kept below --output.

    That is NAME.mp4, NAME_2.mp4, and for a sequence of images NAME/00000001.png, NAME/00000002.png and so on. Of the
    server's names only the kind of file is used, and how many images there are.
    """
    names = []
    for place, result in enumerate(results, 1):
        own, suffix = name if place == 1 else f"{name}_{place}", media_suffix(result["filename"])
        images = _images_up_to(result["filename"]) if "in_sequence" in result else []
        names += [(f"{own}/{n:08}{suffix}", result | {"filename": image}) for n, image in enumerate(images, 1)]
        names += [] if images else [(own + suffix, result)]
    return names


def _images_up_to(last: str) -> list[str]:
    """Names of the images of a sequence, numbered from 1, whose last is known; [] where that is no such name."""
    number, dot, suffix = last.partition(".")
    if not (number.isascii() and number.isdecimal() and len(number) <= 8):
        return []
    count = int(number)
    return [f"{n:0{len(number)}}{dot}{suffix}" for n in range(1, count + 1)] if count <= MAX_IMAGES else []


def media_suffix(filename: str) -> str:
    suffix = os.path.splitext(filename)[1].lower()
    return suffix if suffix in MEDIA_SUFFIXES else ".bin"


# --------------------------------------------------------------------------------------------------- display


class Display:
    """One line a finished job, and a live line a server where the output is a terminal."""

    def __init__(self, total: int, servers: list[str]) -> None:
        self.total, self.finished = total, 0
        self._progress = None
        if HAVE_RICH and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=Console())
            self._all = self._progress.add_task("batch", total=total, note="")
            self._tasks = {url: self._progress.add_task(url, total=1.0, note="") for url in servers}
            self._progress.start()

    def note(self, url: str, note: str, fraction: float = 0.0) -> None:
        """The state of a server: a few words and how far its job is, 0 to 1."""
        if self._progress:
            text = printable(note, 60).replace("[", "(").replace("]", ")")  # rich would read [..] as markup
            self._progress.update(self._tasks[url], note=text, completed=fraction)

    def line(self, text: str) -> None:
        text = printable(text, 1000)
        if self._progress:
            self._progress.console.print(Text(text), soft_wrap=True)
        else:
            print(text, flush=True)

    def job(self, record: dict[str, Any]) -> None:
        self.finished += 1
        outcome = record["file"] or "no file" if record["status"] == "done" else record["error"]
        values = "".join(f"{name} {printable(str(value), 30)}  " for name, value in record.get("values", {}).items())
        self.line(
            f"[{self.finished}/{self.total}] {record['status']} {record['seconds']:.2f} s  "
            f"seed {record['seed']}  {printable(record['prompt'], 60)}  {values}{record['server']}  {outcome}"
        )
        if self._progress:
            self._progress.update(self._all, completed=self.finished, note=f"{self.finished}/{self.total}")

    def close(self) -> None:
        if self._progress:
            with contextlib.suppress(OSError):  # the terminal was closed
                self._progress.stop()


# ----------------------------------------------------------------------------------------------------- batch


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        patience: seconds to wait for a server that was lost, or has not answered yet where another has.
        first_patience: seconds to wait while none has answered yet.
        stall: seconds without a word of the job whose turn it is after which its server is given up; after half of
            them its websocket is opened anew.
        output: where results are downloaded to; None leaves them on the server.
    """

    graph: Graph
    prompt_targets: list[Target]
    seed_targets: list[Target]
    in_flight: int
    patience: float
    first_patience: float
    stall: float
    output: Path | None


class Batch:
    """Runs the jobs over the servers. Only ``/queue`` and ``/history`` decide what became of a job; the
    websocket wakes us early and feeds the display."""

    def __init__(self, jobs: list[Job], servers: list[Server], options: Options, log: BatchLog, display: Display):
        self.waiting = deque(jobs)
        self.homeless: list[Job] = []  # an earlier run left them on a server that is none of ours by name
        self.unasked = set(servers)  # those that were not yet asked for them
        self.servers = servers
        self.by_url = {server.url: server for server in servers}
        self.options = options
        self.log = log
        self.display = display
        self.failed = 0
        self.unfinished = len(jobs)
        self.rows = [job.row for job in jobs if job.row]

    @property
    def over(self) -> bool:
        """Whether every job is finished or no server is left."""
        return not self.unfinished or not any(server.open or server.jobs for server in self.servers)

    async def run(self) -> None:
        """Run until every job is finished or every server is given up.

        Raises BatchError where the log or a result cannot be written: the jobs in flight go on then, and LOG.inflight
        has them. A cancelled batch takes its jobs off the servers.
        """
        self._adopt()
        tasks = [asyncio.create_task(self._serve(server)) for server in self.servers]
        takes_back = True
        try:
            await asyncio.gather(*tasks)
        except BatchError:
            takes_back = False
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if takes_back:
                await asyncio.gather(*(self._cancel(server) for server in self.servers))

    async def _cancel(self, server: Server) -> None:
        """Take back what a server has not finished; what it has stays in LOG.inflight for --resume to fetch."""
        jobs = [job for job in server.jobs.values() if not job.ended]
        if jobs and await server.cancel(jobs):
            for job in jobs:
                if not job.outcome_unknown:  # else it may arrive yet: --resume looks there first
                    self.log.forget(job)

    def _adopt(self) -> None:
        """Give the jobs that a killed run left in flight back to their servers, to be looked up there."""
        for job in [job for job in self.waiting if job.home]:
            self.waiting.remove(job)
            if job.home in self.by_url:
                self.by_url[job.home].jobs[job.prompt_id] = job
            else:
                self.homeless.append(job)
                self.display.line(
                    f"seed {job.seed} was left on {job.home}, which is not in --server; it is looked for on all"
                )

    async def _look_around(self, server: Server) -> None:
        """A server may have another name now than in an earlier run: take the jobs that it has."""
        for job in list(self.homeless):
            entry, queued = await self._look_up(server, job)
            if (entry or queued) and job in self.homeless:
                self.homeless.remove(job)
                server.jobs[job.prompt_id] = job
        self._asked(server)

    def _asked(self, server: Server) -> None:
        """Jobs that no server has are queued anew, under other ids."""
        self.unasked.discard(server)
        if not self.unasked:
            for job in self.homeless:
                job.renew()
            self.waiting.extendleft(reversed(self.homeless))
            self.homeless.clear()

    async def _serve(self, server: Server) -> None:
        """Keep one server busy; on a lost connection come back, look up what became of its jobs, go on."""
        lost_since, backoff, told = time.monotonic(), FIRST_BACKOFF_SECONDS, False
        refused = True  # every attempt to connect since it was lost
        while not self.over:
            connected, settled = None, server.settled
            try:
                async with await self._websocket(server) as socket:
                    connected = time.monotonic()
                    if told:
                        self.display.line(f"{server.label}: connected again")
                    if not server.open:
                        lost_since, backoff = connected, FIRST_BACKOFF_SECONDS
                    server.reached, server.open = True, not server.out
                    server.info, server.uploaded = {}, set()  # it may be another than before
                    await self._refuse_decimals(server)
                    await self._look_around(server)
                    await self._reconcile(server)
                    await self._pump(server, socket)
                    return
            except ConnectionLost as error:
                lost = error
            except ServerUnfit as error:
                self._give_up(server, str(error), for_good=True)
                return
            except ODD_ANSWER as error:
                self._give_up(server, f"it answers not as ComfyUI does: {error!r}", for_good=True)
                return
            refused = connected is not None or (refused and lost.refused)
            held = connected is not None and time.monotonic() - connected > STABLE_SECONDS
            if held or server.settled > settled:
                lost_since, backoff, told = time.monotonic(), FIRST_BACKOFF_SECONDS, False
            if not told:
                self.display.line(f"{server.label}: no connection ({lost}); trying again")
                told = True
            # Where others work, it costs nothing to wait for one that may do what they cannot, or has jobs already.
            waits_long = any(s.reached for s in self.servers) or (server.jobs and len(self.servers) > 1)
            patience = self.options.patience if waits_long else self.options.first_patience
            if (server.open or server.jobs) and time.monotonic() - lost_since > patience:
                self._give_up(server, str(lost), dead=refused and lost.refused)
            if server.open or server.jobs:
                self.display.note(server.url, "no connection")
                await self._pause(backoff)
                backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)
            elif server.out:
                return
            else:
                await self._pause(RETRY_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the batch."""
        until = time.monotonic() + seconds
        while not self.over and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, TICK_SECONDS))

    async def _websocket(self, server: Server) -> aiohttp.ClientWebSocketResponse:
        url = f"{server.url}/ws?clientId={server.client_id}"
        opening = server.session.ws_connect(url, headers=server.headers, heartbeat=HEARTBEAT_SECONDS, max_msg_size=0)
        try:
            return await asyncio.wait_for(opening, CONNECT_SECONDS)
        except aiohttp.WSServerHandshakeError as error:
            raise ConnectionLost(f"HTTP {error.status} where a ComfyUI server has its websocket") from error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise _lost(error) from error

    async def _pump(self, server: Server, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Fill the server's slots and settle what finishes, while the connection holds."""
        reader = asyncio.create_task(self._read_events(server, socket))
        last_poll = server.heard = time.monotonic()
        try:
            while self.unfinished and (server.open or server.jobs):
                while server.open and len(server.jobs) < self.options.in_flight and (job := self._next_for(server)):
                    server.jobs[job.prompt_id] = job
                    await self._post(server, job)
                try:
                    await asyncio.wait_for(server.wake.wait(), TICK_SECONDS)
                except asyncio.TimeoutError:
                    pass
                if reader.done():
                    raise ConnectionLost("the websocket closed")
                if server.wake.is_set():
                    server.wake.clear()
                    await self._settle(server)
                elif time.monotonic() - last_poll > POLL_SECONDS:
                    await self._poll(server)
                    last_poll = time.monotonic()
        finally:
            reader.cancel()

    def _next_for(self, server: Server) -> Job | None:
        """Take the first waiting job that this server has not tried."""
        if self._is_held_back(server):
            return None
        for place, job in enumerate(self.waiting):
            if server.url not in job.tried:
                del self.waiting[place]
                return job
        return None

    def _is_held_back(self, server: Server) -> bool:
        """Whether it could do none of its jobs, and another that may do them is still to come."""
        return (
            server.doubts >= MAX_FAULTS
            and not server.settled
            and any(other.open and not other.reached for other in self.servers)
        )

    async def _read_events(self, server: Server, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue  # previews
            event = json_object(message.data.encode()) or {}
            data = event.get("data")
            prompt_id = data.get("prompt_id") if isinstance(data, dict) else None
            if not isinstance(prompt_id, str) or prompt_id not in server.jobs:
                continue
            server.hear()
            job = server.jobs[prompt_id]
            job.started = True
            value, most = data.get("value"), data.get("max")
            if event.get("type") == "executing" and data.get("node") is None:
                server.wake.set()  # sent after the job is in the history
            elif event.get("type") == "progress" and isinstance(value, (int, float)) and isinstance(most, (int, float)):
                self.display.note(server.url, f"seed {job.seed} {job.prompt}", value / most if most else 0.0)

    def _notice_silence(self, server: Server, queued: list[str]) -> None:
        """Tell a person once when the job at the head of a server's queue is ours and nothing is heard of it.

        Raises ConnectionLost after half of ``stall``, once: the server sends its events to no one when it noticed late
        that an earlier websocket had ended. Raises ServerUnfit after the other half: a server whose worker is dead
        accepts jobs and runs none.
        """
        head = queued[0] if queued else None
        if head != server.head or head not in server.jobs:  # it went on, or it is the turn of others
            server.head = head
            server.hear()
        silence = time.monotonic() - server.heard
        if silence > self.options.stall / 2:
            if server.renewed:
                raise ServerUnfit(f"no word of its job for {self.options.stall / 60:.0f} minutes, see --stall")
            server.renewed = True
            raise ConnectionLost(f"no word of its job for {silence / 60:.0f} minutes")
        if silence > QUIET_SECONDS and not server.quiet:
            server.quiet = True
            self.display.line(
                f"{server.label}: no word of its job for {silence / 60:.0f} minutes; if its log ends with an error, "
                "restart it: what it has is sent again"
            )

    # -- what became of the jobs

    async def _settle(self, server: Server) -> None:
        for job in list(server.jobs.values()):
            entry = await server.finished(job.prompt_id)
            if entry:
                await self._finish(server, job, entry)

    async def _poll(self, server: Server) -> None:
        """Find jobs that finished without a word, or that someone took off the queue."""
        queued = await server.queued_ids()  # before the history: a job moves from here to there, never back
        self._notice_silence(server, queued)
        await self._settle(server)
        for job in list(server.jobs.values()):
            job.missing = 0 if job.prompt_id in queued else job.missing + 1
            if job.missing > 1:
                self._fail(server, job, "taken off the server's queue before it ran")

    async def _reconcile(self, server: Server) -> None:
        """After a (re)connection: keep what waits, collect what finished, send again what was lost."""
        lost = []
        for job in list(server.jobs.values()):
            entry, queued = await self._look_up(server, job)
            if not entry and not queued and job.outcome_unknown:
                await asyncio.sleep(SECOND_LOOK_SECONDS)
                entry, queued = await self._look_up(server, job)
            if entry and failure(entry) and not job.attempts:
                # An earlier run's job that failed, or was interrupted by its Ctrl-C: --resume tries it again.
                del server.jobs[job.prompt_id]
                job.renew()
                server.jobs[job.prompt_id], entry = job, None
            if entry:
                await self._finish(server, job, entry)
            elif queued:
                job.outcome_unknown = False
            else:
                lost.append(job)
        for job in self._survivors(server, lost):
            await self._post(server, job)

    def _survivors(self, server: Server, lost: list[Job]) -> list[Job]:
        """Those of the jobs a server has lost that may run there again: not one that was lost too often as it ran."""
        sent = [job for job in lost if job.attempts]
        for job in [job for job in sent if job.started] or sent[:1]:  # the first may have ended it before a word
            job.losses += 1
            if job.losses >= MAX_ATTEMPTS:
                self._turn_down(server, job, f"the server was lost {job.losses} times while it had this job")
        return [job for job in lost if job.prompt_id in server.jobs]

    async def _look_up(self, server: Server, job: Job) -> tuple[dict[str, Any] | None, bool]:
        """The history entry of a job, and whether it still waits or runs."""
        if job.prompt_id in await server.queued_ids():  # before the history: jobs move from here to there
            return None, True
        return await server.finished(job.prompt_id), False

    async def _refuse_decimals(self, server: Server) -> None:
        """Raise BatchError for a decimal number where the server has a whole one: it would cut it off unasked."""
        for row in self.rows:
            for target in row.decimals(self.options.graph):
                kind, _ = await server.widget(self.options.graph, target)
                if kind == "INT":
                    raise BatchError(
                        f"{row.place}: {row.values[target]} is no whole number, as {target.node_id}.{target.name} needs"
                    )

    async def _graph_for(self, server: Server, job: Job) -> Graph:
        """The graph of a job for a server, which has the local files of its row then. Raises UploadError."""
        graph = graph_for(self.options.graph, job, self.options.prompt_targets, self.options.seed_targets)
        for target, file in job.row.files.items() if job.row else ():
            kind, options = await server.widget(self.options.graph, target)
            if takes_uploads(options):
                listed = kind if isinstance(kind, list) else options.get("options") or []
                if file.name not in listed:  # an earlier run may have put it there
                    await server.upload(file)
            else:
                graph[target.node_id]["inputs"][target.name] = file.cell  # a text that happens to be a file's name
        return graph

    async def _post(self, server: Server, job: Job) -> None:
        """Queue a job under its own id."""
        try:
            graph = await self._graph_for(server, job)
        except UploadError as error:
            self._turn_down(server, job, str(error))
            return
        body = {"prompt": graph, "prompt_id": job.prompt_id, "client_id": server.client_id}
        self.log.start(job, server.url)
        job.attempts += 1
        job.missing, job.started, job.ended = 0, False, False
        job.posted = time.monotonic()
        server.hear()
        job.outcome_unknown = True
        status, answer = await server.request("POST", "/prompt", body=body)
        job.outcome_unknown = False
        errors = answer.get("node_errors") if isinstance(answer, dict) else None
        if status != 200 or not isinstance(answer, dict) or errors:
            if status == 200:  # it took the part of the graph that is valid: that is not what was asked for
                await server.cancel([job])
            self._turn_down(server, job, refusal(status, answer))
            return
        if answer.get("prompt_id") not in (None, job.prompt_id):
            raise BatchError(f"{server.url} ignores prompt_id: it needs a newer ComfyUI (0.30 was tested)")
        if job.attempts > 1:
            await self._drop_doubles(server, job)

    async def _drop_doubles(self, server: Server, job: Job) -> None:
        """An earlier request thought lost may have arrived after all: leave one entry of the two."""
        doubles = (await server.queued_ids()).count(job.prompt_id) - 1
        for _ in range(doubles):
            await server.request("POST", "/queue", body={"delete": [job.prompt_id]})  # removes one that waits

    async def _finish(self, server: Server, job: Job, entry: dict[str, Any]) -> None:
        job.ended = True
        server.hear()
        seconds, error = seconds_taken(entry, job.posted), failure(entry)
        if error == INTERRUPTED:
            self._fail(server, job, error, seconds)
        elif error:
            self._turn_down(server, job, error, seconds)
        else:
            await self._collect(server, job, entry, seconds)

    async def _collect(self, server: Server, job: Job, entry: dict[str, Any], seconds: float) -> None:
        """Fetch the results of a job that succeeded, and log it."""
        results = result_files(entry)
        files = [f"{r['type']}/{r['subfolder']}/{r['filename']}".replace("//", "/") for r in results]
        if self.options.output is not None:
            job.downloads += 1
            try:
                names = local_names(job.name, results)
                files = [await self._download(server, result, self.options.output / name) for name, result in names]
            except (ConnectionLost, DownloadError) as problem:
                lost = isinstance(problem, ConnectionLost)
                if lost and job.downloads < MAX_ATTEMPTS:
                    raise
                # What the server says it does not have is not asked for again: --resume makes it anew.
                self._fail(server, job, f"it ran, but its result was not downloaded: {problem}", seconds, keep=lost)
                return
        self._record(server, job, "done", seconds, files=files)

    async def _download(self, server: Server, result: dict[str, str], path: Path) -> str:
        """Fetch a result; it is on the disk before it has its name, for the log says that it is there."""
        try:
            path.parent.mkdir(exist_ok=True)  # of a sequence of images
            with whole_file(path) as partial:
                async with server.session.get(
                    f"{server.url}/view",
                    params=result,
                    timeout=DOWNLOAD_TIMEOUT,
                    headers=server.headers,
                    allow_redirects=False,
                ) as response:
                    if response.status in PASSING_STATUS:
                        raise ConnectionLost(f"HTTP {response.status}")
                    if response.status != 200:
                        raise DownloadError(f"{status_text(response.status)} ({result['filename']})")
                    with open(partial, "wb") as file:
                        async for block in response.content.iter_chunked(1 << 20):
                            file.write(block)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise _lost(error) from error
        except OSError as error:
            raise BatchError(f"cannot write {path}: {error.strerror}") from error
        return str(path)

    def _turn_down(self, server: Server, job: Job, error: str, seconds: float = 0.0) -> None:
        """A server refused or failed a job: one that has not tried it gets it; where none is left, it failed."""
        job.tried[server.url] = error
        if not self._another_can_try(job):
            self._fail(server, job, error, seconds)
            return
        server.doubts += 1
        if server.doubts == 1:
            what = f"seed {job.seed}, {printable(job.prompt, 60)}"
            self.display.line(f"{server.label}: {what}: {error}; another server tries it")
        if server.doubts == MAX_FAULTS and self._is_held_back(server):
            self.display.line(f"{server.label}: it gets no more jobs until another server answers, for it did none")
        self._move(server, job)

    def _another_can_try(self, job: Job) -> bool:
        return any(server.open and server.url not in job.tried for server in self.servers)

    def _move(self, server: Server, job: Job) -> None:
        """Let another server have a job that this one does not run."""
        self.log.forget(job)
        del server.jobs[job.prompt_id]
        job.renew()
        self.waiting.appendleft(job)

    def _blame(self, job: Job) -> None:
        """A job is done: servers that could not do it, and several others before it, get no more."""
        for other in (self.by_url[url] for url in job.tried):
            other.faults += 1
            if other.faults >= MAX_FAULTS and other.open and any(s.open for s in self.servers if s is not other):
                other.open, other.out = False, True
                self.display.line(
                    f"{other.label}: it gets no more jobs, for others did the last {other.faults} that it could not: "
                    f"{job.tried[other.url]}"
                )
                self._drop_untakable()

    def _drop_untakable(self) -> None:
        """Fail the waiting jobs that every server at work has tried; those that none has tried are left waiting."""
        for job in [job for job in self.waiting if job.tried]:
            if not self._another_can_try(job):
                self.waiting.remove(job)
                url, error = list(job.tried.items())[-1]
                self._fail(self.by_url[url], job, error)

    def _fail(self, server: Server, job: Job, error: str, seconds: float = 0.0, *, keep: bool = False) -> None:
        self.failed += 1
        self._record(server, job, "error", seconds, error=error, keep=keep)

    def _record(
        self,
        server: Server,
        job: Job,
        status: str,
        seconds: float,
        *,
        files: list[str] | None = None,
        error: str | None = None,
        keep: bool = False,
    ) -> None:
        """Log a finished job. ``keep``: leave it in LOG.inflight, so that --resume asks this server first."""
        files = files or []
        record = {
            "index": job.index,
            "prompt": job.prompt,
            "seed": job.seed,
            **({"values": job.values} if job.values else {}),
            "file": files[0] if files else None,
            "files": files,
            "seconds": seconds,
            "server": server.url,
            "status": status,
            "error": error,
            "prompt_id": job.prompt_id,
            "graph": self.log.digest,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.log.append(record)
        if not keep:
            self.log.forget(job)
        server.jobs.pop(job.prompt_id, None)
        self.unfinished -= 1
        if status == "done":
            server.settled += 1
            server.faults = server.doubts = 0
            self._blame(job)
        self.display.job(record)
        self.display.note(server.url, "")

    def _give_up(self, server: Server, reason: str, *, dead: bool = False, for_good: bool = False) -> None:
        """Stop waiting for a server.

        Args:
            dead: nothing has listened on its port all the time: its jobs move to other servers. Else they may run
                there yet, and fail; --resume looks there first.
            for_good: it gets no jobs any more even if it answers again.
        """
        server.open, server.out = False, server.out or for_good
        others = any(other.open for other in self.servers)
        hint = "" if server.reached else "; is ComfyUI running there?"
        self.display.line(f"{server.label}: given up ({reason}){hint}")
        jobs = list(server.jobs.values())
        if dead and others:
            for job in reversed(self._survivors(server, jobs)):
                self._move(server, job)
        else:
            for job in jobs:
                self._fail(server, job, f"lost {server.url} ({reason}); --resume looks there first", keep=True)
        self._drop_untakable()
        self._asked(server)


# --------------------------------------------------------------------------------------------------- command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Queue every (prompt, seed) of an API graph on one or several ComfyUI servers."
    )
    parser.add_argument("workflow", type=Path, help="graph in API form, such as workflows/api/demo.json")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="UTF-8 text, one prompt a line (comments: #); or a shot list, one job a row: .csv, .tsv or .jsonl with "
        "the columns prompt, seed, name (of the files) and any ID.INPUT or Title.INPUT, widgets of the graph; an empty "
        "cell keeps the graph's value, and a picture, video or sound beside the list is uploaded",
    )
    parser.add_argument(
        "--seeds", help="numbers and ranges, such as 0-3,7,9 (default: 0); not where a shot list has a column for it"
    )
    parser.add_argument("--server", action="append", help="address of a server; may be given several times")
    parser.add_argument("--output", type=Path, help="folder to download the results to (default: leave them there)")
    parser.add_argument("--log", type=Path, help="JSON-lines log (default: batch.jsonl, in --output if given)")
    parser.add_argument("--resume", action="store_true", help="skip the jobs that the log has as done")
    parser.add_argument("--prompt-node", action="append", default=[], metavar="ID[.INPUT]", help="node id or title")
    parser.add_argument("--seed-node", action="append", default=[], metavar="ID[.INPUT]", help="node id or title")
    parser.add_argument("--in-flight", type=int, default=2, help="jobs queued at once on each server (default: 2)")
    parser.add_argument(
        "--patience",
        type=float,
        help="seconds to wait for a server that is lost, or for another once one answers (default: 600), and for the "
        "first to answer (default: 10); one that refuses connections for so long is taken for dead, and its jobs move "
        "to other servers",
    )
    parser.add_argument(
        "--stall",
        type=float,
        default=STALL_MINUTES,
        metavar="MINUTES",
        help="give a server up that says nothing of its job for so long (default: 60; inf: never)",
    )
    options = parser.parse_args(arguments)
    if options.in_flight < 1:
        parser.error(f"--in-flight must be 1 or more, got {options.in_flight}")
    if options.patience is not None and not options.patience >= 0:
        parser.error(f"--patience must be 0 or more seconds, got {options.patience}")
    if not options.stall > 0:
        parser.error(f"--stall must be more than 0 minutes, got {options.stall}")
    return options


async def run_batch(jobs: list[Job], addresses: dict[str, dict[str, str]], options: Options, log: BatchLog) -> int:
    """Run the jobs on the servers of ``addresses``, which have their HTTP headers; return the exit status."""
    display = Display(len(jobs), list(addresses))
    loop, main_task = asyncio.get_running_loop(), asyncio.current_task()
    assert main_task is not None
    stopped = False

    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) is signal.SIG_IGN:  # nohup
        hangup = None

    def stop(number: int) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            main_task.cancel()
            if hangup:  # a terminal that closes sends it more than once
                loop.remove_signal_handler(hangup)
                signal.signal(hangup, signal.SIG_IGN)
        elif number != hangup:
            display.close()  # gives a terminal its cursor back
            os._exit(130)  # the second Ctrl-C does not wait for servers

    for number in filter(None, (signal.SIGINT, signal.SIGTERM, hangup)):
        try:
            loop.add_signal_handler(number, stop, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(stop, number))
    try:
        async with aiohttp.ClientSession() as session:
            servers = [Server(url, session, headers, log.client_id(url)) for url, headers in addresses.items()]
            batch = Batch(jobs, servers, options, log, display)
            try:
                await batch.run()
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):  # the terminal was closed
                    display.line(f"stopped: {batch.unfinished} of {len(jobs)} jobs not finished; --resume goes on")
                return 130
            except BatchError as error:
                display.line(
                    f"stopped: {error}; {batch.unfinished} of {len(jobs)} jobs not finished; what the servers have "
                    "goes on, and --resume looks there first"
                )
                return 1
    finally:
        display.close()
    done = len(jobs) - batch.failed - batch.unfinished
    left = f", {batch.unfinished} not run (no server left; --resume goes on)" if batch.unfinished else ""
    display.line(f"{done} done, {batch.failed} failed{left}; log: {log.path}")
    return 1 if batch.failed or batch.unfinished else 0


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a prompt need not fit the terminal's character set
    try:
        return run_command(parse_arguments(arguments))
    except BatchError as error:
        print(f"queue_batch.py: {printable(str(error), 2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the batch took over the signal
        return 130


def run_command(arguments: argparse.Namespace) -> int:
    """Read the files, skip what is done, run the rest."""
    graph = load_graph(arguments.workflow)
    prompt_targets = find_prompt_targets(graph, arguments.prompt_node)
    seed_targets = find_seed_targets(graph, arguments.seed_node)
    digest = graph_digest(graph, [*prompt_targets, *seed_targets])
    seeds = parse_seeds("0" if arguments.seeds is None else arguments.seeds)
    if is_shot_list(arguments.prompts):
        rows = read_shots(arguments.prompts, graph, prompt_targets, seed_targets)
        has_seeds = rows[0].seed is not None
        if has_seeds and arguments.seeds is not None:
            raise BatchError(f"--seeds: {arguments.prompts} has a column for the seed; leave one of the two out")
        jobs = make_row_jobs(rows, seeds, digest)
        repeats = len(rows) * (1 if has_seeds else len(seeds)) - len(jobs)
        if repeats:
            print(f"{repeats} jobs of {arguments.prompts} repeat others and are not run twice")
    else:
        jobs = make_jobs(read_prompts(arguments.prompts), seeds, digest)
    addresses: dict[str, dict[str, str]] = {}
    for url, headers in map(server_address, arguments.server or ["http://127.0.0.1:8188"]):
        addresses[url] = headers or addresses.get(url, {})
    output = arguments.output
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BatchError(f"--output: cannot make {output}: {error.strerror}") from error
    path = arguments.log or (output or Path()) / "batch.jsonl"
    no_log_yet = arguments.resume and not os.path.exists(path)
    log = BatchLog(path, digest, resume=arguments.resume)
    try:
        if no_log_yet:
            print(f"no log at {path} yet: all {len(jobs)} jobs are run")
        if log.foreign:
            print(f"{log.foreign} lines of {log.path} were made with another graph and are not skipped")
        for job in jobs:
            if job.key in log.inflight:
                job.prompt_id, job.home = log.inflight[job.key]
        todo = [job for job in jobs if job.key not in log.done]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} jobs are done in {log.path} and skipped")
        if not todo:
            return 0
        options = Options(
            graph=graph,
            prompt_targets=prompt_targets,
            seed_targets=seed_targets,
            in_flight=arguments.in_flight,
            patience=PATIENCE_SECONDS if arguments.patience is None else arguments.patience,
            first_patience=FIRST_CONTACT_SECONDS if arguments.patience is None else arguments.patience,
            stall=arguments.stall * 60,
            output=output,
        )
        return asyncio.run(run_batch(todo, addresses, options, log))
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
