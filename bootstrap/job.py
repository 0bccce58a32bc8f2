"""Runs inside `.venv`: queue a workflow on a running ComfyUI, follow it, and lay out a contact sheet of its video."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import av
from PIL import Image, ImageDraw, ImageFont

from batch_jobs import BatchError, failure, find_prompt_targets, refusal
from diagonal_sampler.disk import remove_file, whole_file

from .processes import explain_disk

SAMPLERS = ("DiagonalChunkSampler", "DiagonalStreamVideo")
EVENT = "diagonal.progress"  # what the sampler sends after every forward
POLL_S = 2.0  # how often the history is asked, in case the websocket misses the end
LINE_EVERY_S = 5.0  # how often a progress line is printed where the output is no terminal
SHEET_COLUMNS, SHEET_ROWS = 4, 3
TILE_WIDTH = 240  # pixels; smaller frames are enlarged to about this, larger ones reduced
LABEL_WIDTH = 256  # pixels of each picture of a comparison
WARM_UP_LENGTH = 25  # pixel frames: three chunks
GAP, CAPTION = 6, 16  # pixels between tiles, and for the words under a tile
CONNECTION_LOST = 3  # exit code; quickstart.py looks at the server's log for the reason
PAPER, INK = (250, 250, 248), (40, 40, 40)


class JobError(Exception):
    """What went wrong, in one line."""


# ------------------------------------------------------------------------------------------------ the graph


def _find(graph: dict, name: str, kind: type) -> Iterator[dict]:
    """Yield the inputs of every node that holds a value, not a link, of this name."""
    for node in graph.values():
        value = node.get("inputs", {}).get(name)
        if isinstance(value, kind) and not isinstance(value, bool):
            yield node["inputs"]


def _prompt_place(graph: dict) -> tuple[dict, str]:
    """Return the inputs that hold the prompt, and its name there. Raises JobError where that is not one place."""
    try:
        (target,) = find_prompt_targets(graph, [])
    except BatchError:
        raise JobError("--prompt: the workflow has no CLIPTextEncode on its sampler's positive input.") from None
    return graph[target.node_id]["inputs"], target.name


def edit_graph(graph: dict, *, prompt: str | None, seed: int | None, length: int | None, prefix: str) -> None:
    """Set the prompt, seed and length (pixel frames; None keeps the workflow's) and the file name, in place."""
    if prompt is not None:
        inputs, key = _prompt_place(graph)
        inputs[key] = prompt
    for name, value in (("seed", seed), ("length", length)):
        if value is None:
            continue
        found = [(inputs, name) for inputs in _find(graph, name, int)]
        # A node that feeds several seeds is a plain number.
        sources = {str(inputs[name][0]) for inputs in _find(graph, name, list)} & graph.keys()
        found += [(graph[source]["inputs"], "value") for source in sources if "value" in graph[source]["inputs"]]
        if not found:
            raise JobError(f"--{name}: no node of the workflow has an input {name!r}.")
        for inputs, key in found:
            inputs[key] = value
    saves = list(_find(graph, "filename_prefix", str))
    if not saves:
        raise JobError("the workflow saves no file: no node has an input 'filename_prefix'.")
    for inputs in saves:
        inputs["filename_prefix"] = prefix


def total_frames(graph: dict) -> int | None:
    """Return the pixel frames the graph makes, None where no node says."""
    return next((inputs["length"] for inputs in _find(graph, "length", int)), None)


# ------------------------------------------------------------------------------------------------ progress


@dataclass
class Progress:
    """What is known of a run, and the one line that shows it.

    Attributes:
        samplers: ids of the nodes whose progress counts forwards.
        frames: pixel frames the run makes, None if unknown.
    """

    samplers: set[str]
    frames: int | None
    stage: str = "queued"
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each sampler: forwards done, and all
    before: dict[str, int] = field(default_factory=dict)  # of each sampler: forwards of an earlier run, gone on with
    chunk: int = 0
    chunks: int = 0
    started: float | None = None  # when the sampler began
    running: tuple[str, float] | None = None  # the node at work, and since when
    node_seconds: dict[str, float] = field(default_factory=dict)  # how long each node has taken
    seconds: float = 0.0  # that the sampler has taken
    shown: str = field(default="", repr=False)
    next_line: float = field(default=0.0, repr=False)

    def event(self, kind: str, data: dict) -> None:
        """Take in one message of ComfyUI's websocket."""
        if kind == "executing":
            self.clock(data.get("node"))
        if kind == "executing" and data.get("node") is not None:
            self.stage = "sampling" if str(data["node"]) in self.samplers else self.stage_of_others()
            if self.stage == "sampling" and self.started is None:
                self.started = time.monotonic()
        elif kind == "progress_state":
            for node_id, state in data.get("nodes", {}).items():
                if str(node_id) in self.samplers:
                    self.count(str(node_id), state.get("value", 0), state.get("max", 0))
        elif kind == "progress" and str(data.get("node")) in self.samplers:
            self.count(str(data["node"]), data.get("value", 0), data.get("max", 0))
        elif kind == EVENT:
            self.chunk, self.chunks = int(data.get("chunk") or 0), int(data.get("chunks") or 0)
            forwards = data.get("forwards", 0)
            self.count(str(data.get("node")), forwards, data.get("total", 0))
            self.before[str(data.get("node"))] = int(forwards - data.get("made", forwards))

    def clock(self, node: str | None) -> None:
        """Note that a node begins, None at the end of the run, and so how long the one before it has taken."""
        now = time.monotonic()
        if self.running is not None:
            self.node_seconds[self.running[0]] = now - self.running[1]
        self.running = None if node is None else (str(node), now)

    def stage_of_others(self) -> str:
        """Return the name of the stage when a node other than the sampler runs."""
        return "preparing" if self.started is None else "decoding and saving"

    def count(self, node: str, forwards: float, total: float) -> None:
        """Note how many forwards a sampler has done; a count never goes back.

        Before a sampler's first forward its total is a placeholder.
        """
        if forwards and total:
            done, _ = self.counts.get(node, (0, 0))
            self.counts[node] = (max(done, int(forwards)), int(total))
            self.started = self.started or time.monotonic()
            if forwards > done:
                self.seconds = time.monotonic() - self.started

    @property
    def forwards(self) -> int:
        """Forwards done, over all samplers."""
        return sum(done for done, _ in self.counts.values())

    @property
    def total(self) -> int:
        """Forwards of the samplers that have begun."""
        return sum(total for _, total in self.counts.values())

    def line(self) -> str:
        """Return the line: stage, forwards, chunk, ETA, frames per second."""
        parts = [self.stage]
        if self.total:
            parts.append(f"forwards {self.forwards}/{self.total}")
        if self.chunks:
            parts.append(f"chunk {self.chunk}/{self.chunks}")
        made = self.forwards - sum(self.before.values())
        if made and self.seconds > 0:
            if self.forwards < self.total:
                left = self.seconds * (self.total - self.forwards) / made
                parts.append(f"ETA {left:.0f} s")
            if self.frames:
                parts.append(f"{self.frames * made / self.total / self.seconds:.1f} frames/s")
        return " · ".join(parts)

    def show(self, *, last: bool = False) -> None:
        """Rewrite the line on a terminal; elsewhere print it now and then, and once at the end."""
        line, now = self.line(), time.monotonic()
        if sys.stdout.isatty():
            line = line[: max(20, shutil.get_terminal_size().columns - 1)]
            print("\r" + line.ljust(len(self.shown)), end="\n" if last else "", flush=True)
        elif last or (line != self.shown and now >= self.next_line):
            print(line, flush=True)
            self.next_line = now + LINE_EVERY_S
        self.shown = line


# ------------------------------------------------------------------------------------------------ the run


async def _answer_of(response: aiohttp.ClientResponse) -> dict:
    try:
        answer = await response.json(content_type=None)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


async def run_graph(url: str, graph: dict, progress: Progress) -> dict:
    """Queue a graph, follow it to its end and return its outputs by node id. Raises JobError."""
    client = uuid.uuid4().hex
    # No proxy, no overall limit: the address is this machine's, and a long clip takes long.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        async with session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket:
            async with session.post("/prompt", json={"prompt": graph, "client_id": client}) as response:
                answer = await _answer_of(response)
                if response.status != 200:
                    reason = refusal(response.status, answer)
                    raise JobError(f"ComfyUI refused the workflow ({response.status}): {reason}")
            prompt_id = answer["prompt_id"]
            listener = asyncio.create_task(_listen(socket, prompt_id, progress))
            try:
                return await _until_done(session, prompt_id, progress, listener)
            finally:
                listener.cancel()


async def _listen(socket: aiohttp.ClientWebSocketResponse, prompt_id: str, progress: Progress) -> None:
    """Take in messages until the run ends or the connection does; the history has the last word either way."""
    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue  # binary messages are previews
        content = message.json()
        kind, data = content.get("type", ""), content.get("data") or {}
        if data.get("prompt_id", prompt_id) != prompt_id:
            continue
        progress.event(kind, data)
        progress.show()
        if kind in ("execution_success", "execution_error", "execution_interrupted"):
            return


async def _until_done(session, prompt_id: str, progress: Progress, listener: asyncio.Task) -> dict:
    while True:
        await asyncio.wait([listener], timeout=POLL_S)
        if listener.done():
            await asyncio.sleep(0.1)  # the history follows the last message
        async with session.get(f"/history/{prompt_id}") as response:
            entry = (await _answer_of(response)).get(prompt_id)
        if entry is not None:
            reason = failure(entry)
            if reason is not None:
                raise JobError(f"the run failed: {reason}")
            progress.stage = "done"
            return entry.get("outputs") or {}


def find_videos(outputs: dict, folder: Path) -> list[Path]:
    """Return the video files that the nodes report, which must lie in `folder`."""
    videos = []
    for output in outputs.values():
        for item in [item for items in output.values() if isinstance(items, list) for item in items]:
            if not isinstance(item, dict) or item.get("type") != "output":
                continue
            path = (folder / item.get("subfolder", "") / item.get("filename", "")).resolve()
            if path.suffix == ".mp4" and path.is_relative_to(folder.resolve()) and path not in videos:
                videos.append(path)
    if not videos or not all(path.is_file() for path in videos):
        raise JobError(f"the run ended well but left no .mp4 in {folder}.")
    return videos


# ------------------------------------------------------------------------------------------------ contact sheet


def pick_frames(count: int, tiles: int) -> list[int]:
    """Return up to `tiles` frame numbers in order, evenly spread over `count` frames, the first and last included."""
    if count <= tiles:
        return list(range(count))
    return [round(k * (count - 1) / (tiles - 1)) for k in range(tiles)]


def read_frames(video: Path, tiles: int) -> tuple[list[tuple[float, Image.Image]], int]:
    """Return evenly spread frames as (seconds from the start, picture), and how many frames the video has."""
    with av.open(str(video)) as container:
        count = sum(1 for _ in container.decode(video=0))
    wanted = set(pick_frames(count, tiles))
    with av.open(str(video)) as container:
        frames = enumerate(container.decode(video=0))
        return [(frame.time or 0.0, frame.to_image()) for k, frame in frames if k in wanted], count


def make_contact_sheet(video: Path, sheet: Path, title: str) -> None:
    """Write a PNG that shows a video's frames in reading order, each with its time."""
    frames, count = read_frames(video, SHEET_COLUMNS * SHEET_ROWS)
    if not frames:
        raise JobError(f"{video.name} holds no frame.")
    width, height = frames[0][1].size
    scale = TILE_WIDTH / width
    # Whole factors without smoothing show small frames as they are.
    scale = max(1, round(scale)) if scale >= 1 else scale
    tile = (max(1, round(width * scale)), max(1, round(height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    rows = math.ceil(len(frames) / SHEET_COLUMNS)
    size = (SHEET_COLUMNS * (tile[0] + GAP) + GAP, CAPTION + rows * (tile[1] + CAPTION + GAP) + GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    draw.text((GAP, GAP // 2), f"{title} ({count} frames)", fill=INK, font=font)
    for k, (seconds, picture) in enumerate(frames):
        x = GAP + (k % SHEET_COLUMNS) * (tile[0] + GAP)
        y = CAPTION + GAP + (k // SHEET_COLUMNS) * (tile[1] + CAPTION + GAP)
        canvas.paste(picture.resize(tile, resample), (x, y))
        draw.text((x, y + tile[1] + 2), f"{seconds:.2f} s", fill=INK, font=font)
    with whole_file(sheet) as partial:
        canvas.save(partial, format="PNG")


# ------------------------------------------------------------------------------------------------ comparison


def lanes(graph: dict, node_seconds: dict[str, float]) -> list[str]:
    """What each sampler of a comparison is and took, "title: 1.9 s", from left to right."""
    return [
        f"{node.get('_meta', {}).get('title', node_id)}: {node_seconds.get(node_id, 0.0):.2f} s"
        for node_id, node in sorted(graph.items(), key=lambda item: int(item[0]))
        if node.get("class_type") in SAMPLERS
    ]


def add_labels(video: Path, labels: list[str]) -> None:
    """Write a line above each of a video's side-by-side pictures, enlarged so that it can be read."""
    with av.open(str(video)) as source:
        stream = source.streams.video[0]
        frames, rate = [frame.to_image() for frame in source.decode(stream)], stream.average_rate
    width, height = frames[0].size
    scale = max(1, round(LABEL_WIDTH * len(labels) / width))
    size = (width * scale // 2 * 2, (height * scale + CAPTION + GAP) // 2 * 2)  # H.264 wants even sizes
    font = ImageFont.load_default()
    with whole_file(video) as partial, av.open(str(partial), "w", format="mp4") as target:
        out = target.add_stream("libx264", rate=rate, options={"crf": "16"})
        out.width, out.height, out.pix_fmt = *size, "yuv420p"
        for frame in frames:
            canvas = Image.new("RGB", size, PAPER)
            canvas.paste(frame.resize((width * scale, height * scale), Image.Resampling.NEAREST), (0, CAPTION + GAP))
            draw = ImageDraw.Draw(canvas)
            for k, label in enumerate(labels):
                draw.text((GAP + k * size[0] // len(labels), GAP // 2), label, fill=INK, font=font)
            target.mux(out.encode(av.VideoFrame.from_image(canvas)))
        target.mux(out.encode(None))


# ------------------------------------------------------------------------------------------------ command line


def parse_arguments() -> argparse.Namespace:
    """Return the options; quickstart.py has checked their values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="the server's address")
    parser.add_argument("--workflow", required=True, type=Path, help="a graph in API form")
    parser.add_argument("--output", required=True, type=Path, help="the server's output folder")
    parser.add_argument("--prefix", required=True, help="how the files' names begin")
    parser.add_argument("--compare", action="store_true", help="time every sampler and write it into the video")
    parser.add_argument("--prompt")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--length", type=int)
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Make the video and its contact sheet; quickstart.py says where they are once this process has ended well."""

    def edited(length: int | None) -> dict:
        graph = json.loads(options.workflow.read_text(encoding="utf-8"))
        edit_graph(graph, prompt=options.prompt, seed=options.seed, length=length, prefix=options.prefix)
        return graph

    def follow(graph: dict) -> tuple[dict, Progress]:
        samplers = {node_id for node_id, node in graph.items() if node.get("class_type") in SAMPLERS}
        progress = Progress(samplers, total_frames(graph))
        try:
            return asyncio.run(run_graph(options.url, graph, progress)), progress
        finally:
            progress.show(last=True)

    if options.compare:  # models load and kernels are prepared at their first use: no lane should pay for that
        for video in find_videos(follow(edited(WARM_UP_LENGTH))[0], options.output):
            remove_file(video)
    graph = edited(options.length)
    outputs, progress = follow(graph)
    for video in find_videos(outputs, options.output):
        inputs, key = _prompt_place(graph)
        if options.compare:
            labels = lanes(graph, progress.node_seconds)
            add_labels(video, labels)
            print("\n".join(labels), flush=True)
        make_contact_sheet(video, video.with_suffix(".png"), inputs[key])


def main() -> int:
    """Return the exit code; every failure that is no defect of this file is one line on stderr."""
    try:
        run(parse_arguments())
    except JobError as error:
        message = str(error)
    except aiohttp.ClientError:
        return CONNECTION_LOST
    except OSError as error:
        message = explain_disk(error)
    else:
        return 0
    if "No space left on device" in message:
        message = "the disk is full: free some space and run again."
    print(f"quickstart: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
