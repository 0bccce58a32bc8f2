"""Queue every (prompt, seed) combination of an API graph on one or several ComfyUI servers.

    python queue_batch.py workflows/api/demo.json --prompts prompts.txt --seeds 0-3,7 \
        --server http://127.0.0.1:8188 --server http://127.0.0.1:8189 --output output/batch

Each finished job is one line of JSON in the log (prompt, seed, file, seconds, server, status, error); with
``--resume`` the jobs the log has as done are skipped. A lost connection runs no job twice: every job carries
an id of our own, which is looked up in the server's queue and history before it is queued again. The ids in
flight are kept in ``LOG.inflight`` so that this also holds when this program itself is killed.

Exit status: 0 every job done, 1 some failed or were not run, 2 wrong arguments, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
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
    BatchError,
    BatchLog,
    Graph,
    Job,
    Target,
    find_prompt_targets,
    find_seed_targets,
    graph_digest,
    graph_for,
    json_object,
    load_graph,
    make_jobs,
    parse_seeds,
    printable,
    read_prompts,
)

MAX_ATTEMPTS = 3  # a job that takes its server down with it is not tried for ever
POLL_SECONDS = 5.0  # the websocket tells at once; this finds what it missed
TICK_SECONDS = 0.5
QUIET_SECONDS = 600.0  # without a word of the job whose turn it is: few nodes take that long, a dead worker for ever
HEARTBEAT_SECONDS = 30.0  # generous: a server in a long compile answers pings late
FIRST_CONTACT_SECONDS = 10.0  # a server that never answered is given up sooner than one that was lost
STABLE_SECONDS = 5.0  # a connection that held this long was a good one
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 10.0
CONNECT_SECONDS = 20.0
SECOND_LOOK_SECONDS = 2.0  # a request whose connection broke may still be in the server's hands
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
DOWNLOAD_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
CANCEL_TIMEOUT = aiohttp.ClientTimeout(total=10)
PASSING_STATUS = {502, 503, 504}  # a proxy before a server that is restarting
# Results keep these suffixes; any other becomes .bin, so that no server makes a download a program by name.
MEDIA_SUFFIXES = frozenset(
    ".mp4 .webm .mkv .mov .avi .gif .png .jpg .jpeg .webp .avif .exr .tiff .flac .mp3 .opus .ogg .wav "
    ".safetensors .latent .glb .obj .txt .json".split()
)
VIDEO_SUFFIXES = frozenset(".mp4 .webm .mkv .mov .avi .gif".split())


class DownloadError(Exception):
    """A result that the server does not hand over."""


class ConnectionLost(Exception):
    """The server cannot be reached now; ``refused`` when nothing listens on its port."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


# --------------------------------------------------------------------------------------------------- servers


def server_url(text: str) -> str:
    """The address of a server without a slash at its end; http:// where no scheme is given."""
    url = text if "://" in text else f"http://{text}"
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise BatchError(f"--server {text!r} is no address; write it like http://127.0.0.1:8188")
    return url.rstrip("/")


def _lost(error: BaseException) -> ConnectionLost:
    cause = getattr(error, "os_error", error)
    refused = isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) == errno.ECONNREFUSED
    return ConnectionLost(str(error) or type(error).__name__, refused=refused)


@dataclass(eq=False)
class Server:
    """HTTP calls to one ComfyUI server; any failure to get an answer is a ConnectionLost."""

    url: str
    session: aiohttp.ClientSession
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    jobs: dict[str, Job] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    reached: bool = False
    settled: int = 0  # jobs that ended here
    heard: float = 0.0  # when it last said something of a job that it has
    quiet: bool = False  # whether a person was told that it says nothing

    @property
    def label(self) -> str:
        return self.url.partition("://")[2]

    async def request(
        self, method: str, path: str, *, timeout: aiohttp.ClientTimeout = REQUEST_TIMEOUT, body: Any = None
    ) -> tuple[int, Any]:
        """The HTTP status and the JSON answer (None where it is not JSON)."""
        try:
            async with self.session.request(method, self.url + path, json=body, timeout=timeout) as response:
                raw = await response.read()
                status = response.status
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise _lost(error) from error
        if status in PASSING_STATUS:
            raise ConnectionLost(f"HTTP {status}")
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, None

    async def get(self, path: str) -> dict[str, Any]:
        status, answer = await self.request("GET", path)
        if status != 200 or not isinstance(answer, dict):
            raise ConnectionLost(f"GET {path} answered HTTP {status}, not as ComfyUI does")
        return answer

    async def queued_ids(self) -> list[str]:
        """The ids that run or wait, as often as they do."""
        answer = await self.get("/queue")
        entries = [*answer.get("queue_running", []), *answer.get("queue_pending", [])]
        return [entry[1] for entry in entries if isinstance(entry, list) and len(entry) > 1]

    async def finished(self, prompt_id: str) -> dict[str, Any] | None:
        return (await self.get(f"/history/{prompt_id}")).get(prompt_id)

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


def refusal(status: int, answer: Any) -> str:
    """The server's reason for not taking a graph, node by node."""
    if not isinstance(answer, dict):
        return f"the server refused the graph: HTTP {status}"
    parts = []
    node_errors = answer.get("node_errors")
    for node_id, node in node_errors.items() if isinstance(node_errors, dict) else ():
        for error in node.get("errors", []):
            details = f": {error['details']}" if error.get("details") else ""
            parts.append(f"{node.get('class_type')} (node {node_id}): {error.get('message')}{details}")
    if not parts:
        error = answer.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        parts.append(str(message or f"HTTP {status}"))
    return printable("; ".join(parts), 1000)


def failure(entry: dict[str, Any]) -> str | None:
    """What went wrong in a finished job, or None if it succeeded."""
    status = entry.get("status") or {}
    if status.get("status_str", "success") == "success":
        return None
    for event, data in status.get("messages", []):
        if event == "execution_error":
            where = f"{data.get('node_type')} (node {data.get('node_id')})"
            return printable(
                f"{where}: {data.get('exception_type')}: {str(data.get('exception_message')).strip()}", 1000
            )
        if event == "execution_interrupted":
            return "interrupted on the server"
    return "failed on the server, which gave no reason"


def seconds_taken(entry: dict[str, Any], posted: float) -> float:
    """Seconds from start to end on the server; where it does not say, since the job was sent."""
    stamps = {
        event: data.get("timestamp")
        for event, data in (entry.get("status") or {}).get("messages", [])
        if isinstance(data, dict)
    }
    start = stamps.get("execution_start")
    end = stamps.get("execution_success") or stamps.get("execution_error") or stamps.get("execution_interrupted")
    if isinstance(start, (int, float)) and isinstance(end, (int, float)):
        return round((end - start) / 1000, 3)
    return round(time.monotonic() - posted, 3) if posted else 0.0


def result_files(entry: dict[str, Any], *, every_image: bool = False) -> list[dict[str, str]]:
    """The saved files that a history entry names, videos first; previews only where nothing was saved.

    Args:
        every_image: of a folder of images, which names its last one, all.
    """
    found = []
    for output in (entry.get("outputs") or {}).values():
        for items in output.values() if isinstance(output, dict) else []:
            for item in items if isinstance(items, list) else []:
                if isinstance(item, dict) and isinstance(item.get("filename"), str):
                    file = {k: str(item.get(k) or "") for k in ("filename", "subfolder", "type")}
                    earlier = _earlier_images(file["filename"]) if every_image and item.get("in_sequence") else []
                    found += [file | {"filename": name} for name in earlier] + [file]
    saved = [item for item in found if item["type"] == "output"] or found
    return sorted(saved, key=lambda item: media_suffix(item["filename"]) not in VIDEO_SUFFIXES)


def _earlier_images(last: str) -> list[str]:
    """Names of the images before the last of a sequence, which are numbered from 1."""
    number, dot, suffix = last.partition(".")
    if not (number.isascii() and number.isdecimal() and len(number) <= 8):
        return []
    return [f"{n:0{len(number)}}{dot}{suffix}" for n in range(1, int(number))]


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
        self.line(
            f"[{self.finished}/{self.total}] {record['status']} {record['seconds']:.2f} s  "
            f"seed {record['seed']}  {printable(record['prompt'], 60)}  {record['server']}  {outcome}"
        )
        if self._progress:
            self._progress.update(self._all, completed=self.finished, note=f"{self.finished}/{self.total}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


# ----------------------------------------------------------------------------------------------------- batch


@dataclass(frozen=True)
class Options:
    """What the command line chose; ``patience`` in seconds, ``output`` None leaves results on the server."""

    graph: Graph
    prompt_targets: list[Target]
    seed_targets: list[Target]
    in_flight: int
    patience: float
    output: Path | None


class Batch:
    """Runs the jobs over the servers. Only ``/queue`` and ``/history`` decide what became of a job; the
    websocket wakes us early and feeds the display."""

    def __init__(self, jobs: list[Job], servers: list[Server], options: Options, log: BatchLog, display: Display):
        self.waiting = deque(jobs)
        self.servers = servers
        self.options = options
        self.log = log
        self.display = display
        self.failed = 0
        self.unfinished = len(jobs)

    async def run(self) -> None:
        """Run until every job is finished or every server is given up."""
        self._adopt()
        tasks = [asyncio.create_task(self._serve(server)) for server in self.servers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(self._cancel(server) for server in self.servers if server.jobs))

    async def _cancel(self, server: Server) -> None:
        jobs = list(server.jobs.values())
        if await server.cancel(jobs):
            for job in jobs:
                if not job.outcome_unknown:  # else it may arrive yet: --resume looks there first
                    self.log.forget(job)

    def _adopt(self) -> None:
        """Give the jobs that a killed run left in flight back to their servers, to be looked up there."""
        by_url = {server.url: server for server in self.servers}
        for job in [job for job in self.waiting if job.home]:
            if job.home in by_url:
                self.waiting.remove(job)
                by_url[job.home].jobs[job.prompt_id] = job
            else:
                self.display.line(
                    f"seed {job.seed} was left on {job.home}, which is not in --server; it is queued anew"
                )

    async def _serve(self, server: Server) -> None:
        """Keep one server busy; on a lost connection come back, look up what became of its jobs, go on."""
        lost_since, backoff, told = time.monotonic(), FIRST_BACKOFF_SECONDS, False
        while self.unfinished:
            connected, settled = None, server.settled
            try:
                async with await self._websocket(server) as socket:
                    connected = time.monotonic()
                    if told:
                        self.display.line(f"{server.label}: connected again")
                    server.reached = True
                    await self._reconcile(server)
                    await self._pump(server, socket)
                    return
            except ConnectionLost as error:
                lost = error
            held = connected is not None and time.monotonic() - connected > STABLE_SECONDS
            if held or server.settled > settled:
                lost_since, backoff, told = time.monotonic(), FIRST_BACKOFF_SECONDS, False
            if not told:
                self.display.line(f"{server.label}: no connection ({lost}); trying again")
                told = True
            patience = self.options.patience if server.reached else min(self.options.patience, FIRST_CONTACT_SECONDS)
            if time.monotonic() - lost_since > patience:
                self._give_up(server, lost)
                return
            self.display.note(server.url, "no connection")
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    async def _websocket(self, server: Server) -> aiohttp.ClientWebSocketResponse:
        url = f"{server.url}/ws?clientId={server.client_id}"
        opening = server.session.ws_connect(url, heartbeat=HEARTBEAT_SECONDS, max_msg_size=0)
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
            while self.unfinished:
                while self.waiting and len(server.jobs) < self.options.in_flight:
                    job = self.waiting.popleft()
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

    async def _read_events(self, server: Server, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue  # previews
            event = json_object(message.data.encode()) or {}
            data = event.get("data")
            if not isinstance(data, dict) or data.get("prompt_id") not in server.jobs:
                continue
            server.heard, server.quiet = time.monotonic(), False
            job = server.jobs[data["prompt_id"]]
            if event.get("type") == "executing" and data.get("node") is None:
                server.wake.set()  # sent after the job is in the history
            elif event.get("type") == "progress" and data.get("max"):
                self.display.note(server.url, f"seed {job.seed} {job.prompt}", data.get("value", 0) / data["max"])

    def _notice_silence(self, server: Server, queued: list[str]) -> None:
        """Tell a person once when the job at the head of a server's queue is ours and nothing is heard of it."""
        if not queued or queued[0] not in server.jobs:
            server.heard = time.monotonic()  # it is the turn of others
        silence = time.monotonic() - server.heard
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
        for job in list(server.jobs.values()):
            entry, queued = await self._look_up(server, job)
            if not entry and not queued and job.outcome_unknown:
                await asyncio.sleep(SECOND_LOOK_SECONDS)
                entry, queued = await self._look_up(server, job)
            if entry and failure(entry) and not job.attempts:
                # An earlier run's job that failed, or was interrupted by its Ctrl-C: --resume tries it again.
                del server.jobs[job.prompt_id]
                job.prompt_id, entry = str(uuid.uuid4()), None
                server.jobs[job.prompt_id] = job
            if entry:
                await self._finish(server, job, entry)
            elif queued:
                job.outcome_unknown = False
            elif job.attempts >= MAX_ATTEMPTS:
                self._fail(server, job, f"the server was lost {job.attempts} times while it had this job")
            else:
                await self._post(server, job)

    async def _look_up(self, server: Server, job: Job) -> tuple[dict[str, Any] | None, bool]:
        """The history entry of a job, and whether it still waits or runs."""
        if job.prompt_id in await server.queued_ids():  # before the history: jobs move from here to there
            return None, True
        return await server.finished(job.prompt_id), False

    async def _post(self, server: Server, job: Job) -> None:
        """Queue a job under its own id."""
        graph = graph_for(self.options.graph, job, self.options.prompt_targets, self.options.seed_targets)
        body = {"prompt": graph, "prompt_id": job.prompt_id, "client_id": server.client_id}
        self.log.start(job, server.url)
        job.attempts += 1
        job.missing = 0
        job.posted = time.monotonic()
        job.outcome_unknown = True
        status, answer = await server.request("POST", "/prompt", body=body)
        job.outcome_unknown = False
        errors = answer.get("node_errors") if isinstance(answer, dict) else None
        if status != 200 or not isinstance(answer, dict) or errors:
            if status == 200:  # it took the part of the graph that is valid: that is not what was asked for
                await server.cancel([job])
            self._fail(server, job, refusal(status, answer))
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
        seconds, error = seconds_taken(entry, job.posted), failure(entry)
        if error:
            self._fail(server, job, error, seconds)
            return
        results = result_files(entry, every_image=self.options.output is not None)
        files = [f"{r['type']}/{r['subfolder']}/{r['filename']}".replace("//", "/") for r in results]
        if self.options.output is not None:
            job.downloads += 1
            try:
                files = [await self._download(server, job, result, i) for i, result in enumerate(results)]
            except (ConnectionLost, DownloadError) as problem:
                if isinstance(problem, ConnectionLost) and job.downloads < MAX_ATTEMPTS:
                    raise
                self._fail(server, job, f"it ran, but its result was not downloaded: {problem}", seconds, keep=True)
                return
        self._record(server, job, "done", seconds, files=files)

    async def _download(self, server: Server, job: Job, result: dict[str, str], number: int) -> str:
        """Fetch a result under a name of our own; the server's word is used for the kind of file only."""
        assert self.options.output is not None
        extra = f"_{number + 1}" if number else ""
        path = self.options.output / f"{job.name}{extra}{media_suffix(result['filename'])}"
        partial = path.with_name(path.name + ".partial")
        try:
            async with server.session.get(f"{server.url}/view", params=result, timeout=DOWNLOAD_TIMEOUT) as response:
                if response.status in PASSING_STATUS:
                    raise ConnectionLost(f"HTTP {response.status}")
                if response.status != 200:
                    raise DownloadError(f"HTTP {response.status} for {result['filename']}")
                with open(partial, "wb") as file:
                    async for block in response.content.iter_chunked(1 << 20):
                        file.write(block)
            os.replace(partial, path)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise _lost(error) from error
        except OSError as error:
            raise BatchError(f"cannot write {path}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
        return str(path)

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
        server.settled += 1
        self.unfinished -= 1
        self.display.job(record)
        self.display.note(server.url, "")

    def _give_up(self, server: Server, lost: ConnectionLost) -> None:
        """Stop waiting for a server. Its jobs move on only if they cannot be running there any more."""
        others = [s for s in self.servers if s is not server and s.reached]
        hint = "" if server.reached else "; is ComfyUI running there?"
        self.display.line(f"{server.label}: given up ({lost}){hint}")
        for job in list(server.jobs.values()):
            if lost.refused and others:
                self.log.forget(job)
                del server.jobs[job.prompt_id]
                self.waiting.appendleft(job)
            else:
                self._fail(server, job, f"lost {server.url} ({lost}); --resume looks there first", keep=True)
        server.reached = False  # no other's jobs are to move here


# --------------------------------------------------------------------------------------------------- command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Queue every (prompt, seed) of an API graph on one or several ComfyUI servers."
    )
    parser.add_argument("workflow", type=Path, help="graph in API form, such as workflows/api/demo.json")
    parser.add_argument("--prompts", type=Path, required=True, help="UTF-8 text, one prompt a line; # starts a comment")
    parser.add_argument("--seeds", default="0", help="numbers and ranges, such as 0-3,7,9 (default: 0)")
    parser.add_argument("--server", action="append", help="address of a server; may be given several times")
    parser.add_argument("--output", type=Path, help="folder to download the results to (default: leave them there)")
    parser.add_argument("--log", type=Path, help="JSON-lines log (default: batch.jsonl, in --output if given)")
    parser.add_argument("--resume", action="store_true", help="skip the jobs that the log has as done")
    parser.add_argument("--prompt-node", action="append", default=[], metavar="ID[.INPUT]", help="node id or title")
    parser.add_argument("--seed-node", action="append", default=[], metavar="ID[.INPUT]", help="node id or title")
    parser.add_argument("--in-flight", type=int, default=2, help="jobs queued at once on each server (default: 2)")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for a lost server (default: 600)")
    options = parser.parse_args(arguments)
    if options.in_flight < 1:
        parser.error(f"--in-flight must be 1 or more, got {options.in_flight}")
    if not options.patience >= 0:
        parser.error(f"--patience must be 0 or more seconds, got {options.patience}")
    return options


async def run_batch(jobs: list[Job], urls: list[str], options: Options, log: BatchLog) -> int:
    """Run the jobs and return the exit status."""
    display = Display(len(jobs), urls)
    loop, main_task = asyncio.get_running_loop(), asyncio.current_task()
    assert main_task is not None
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            os._exit(130)  # the second Ctrl-C does not wait for servers
        stopped = True
        main_task.cancel()

    for name in ("SIGINT", "SIGTERM"):
        number = getattr(signal, name)
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    try:
        async with aiohttp.ClientSession() as session:
            servers = [Server(url, session) for url in urls]
            batch = Batch(jobs, servers, options, log, display)
            try:
                await batch.run()
            except asyncio.CancelledError:
                display.line(f"stopped: {batch.unfinished} of {len(jobs)} jobs not finished; --resume goes on")
                return 130
            except BatchError as error:
                display.line(f"stopped: {error}; {batch.unfinished} of {len(jobs)} jobs not finished")
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
    jobs = make_jobs(read_prompts(arguments.prompts), parse_seeds(arguments.seeds), digest)
    urls = list(dict.fromkeys(server_url(url) for url in arguments.server or ["http://127.0.0.1:8188"]))
    output = arguments.output
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BatchError(f"--output: cannot make {output}: {error.strerror}") from error
    log = BatchLog(arguments.log or (output or Path()) / "batch.jsonl", digest, resume=arguments.resume)
    try:
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
            patience=arguments.patience,
            output=output,
        )
        return asyncio.run(run_batch(todo, urls, options, log))
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
