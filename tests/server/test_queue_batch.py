"""queue_batch.py against real servers: every job once, whatever breaks on the way.

One server carries a probe node that notes each run in a ledger, so that "run twice" is counted and not inferred.
A small TCP proxy stands between where a test must lose the connection and not the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import comfy_host
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 120

pytest.importorskip("aiohttp")
import batch_jobs  # noqa: E402
import queue_batch  # noqa: E402
from diagonal_sampler.prompt_schedule import parse_prompts  # noqa: E402

PICTURE = {  # the seed is the colour of the picture
    "1": {"class_type": "PrimitiveString", "inputs": {"value": "x"}, "_meta": {"title": "Prompt"}},
    "2": {"class_type": "PrimitiveInt", "inputs": {"value": 1}, "_meta": {"title": "Seed"}},
    "3": {
        "class_type": "EmptyImage",
        "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": ["2", 0]},
    },
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "batch/picture"}},
    "5": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}
PROBE = {
    "7": {
        "class_type": "BatchProbe",
        "inputs": {"text": "x", "seed": 0, "seconds": 0.0, "filename_prefix": "probe"},
        "_meta": {"title": "Prompt"},
    }
}
PROBE_NODE = '''
import os, time
import comfy.model_management
import folder_paths

class BatchProbe:
    """Notes start and end of each run, sleeps, writes a small file."""
    INPUT_TYPES = classmethod(lambda cls: {"required": {
        "text": ("STRING", {}), "seed": ("INT", {"max": 2**64 - 1}),
        "seconds": ("FLOAT", {"max": 60.0}), "filename_prefix": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    IS_CHANGED = classmethod(lambda cls, **inputs: float("nan"))  # never cached: a second run would not show

    def note(self, event, text, seed):
        with open(LEDGER, "a") as ledger:
            ledger.write(f"{event} {seed} {text}\\n")

    def run(self, text, seed, seconds, filename_prefix):
        self.note("start", text, seed)
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        if "fails" in text:
            raise RuntimeError("the probe was told to fail")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory())
        file = f"{name}_{counter:05}_.txt"
        with open(os.path.join(folder, file), "w") as out:
            out.write(f"{text} {seed}")
        self.note("end", text, seed)
        return {"ui": {"files": [{"filename": file, "subfolder": subfolder, "type": "output"}]}}

class BatchFrames:
    """Writes a sequence of files, as Diagonal Stream Video its images, and names the last."""
    INPUT_TYPES = classmethod(lambda cls: {"required": {
        "text": ("STRING", {}), "seed": ("INT", {"max": 2**64 - 1}), "filename_prefix": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"

    def run(self, text, seed, filename_prefix):
        folder = os.path.join(folder_paths.get_output_directory(), filename_prefix)
        os.makedirs(folder)
        for number in range(1, 13):
            with open(os.path.join(folder, f"{number:08}.txt"), "w") as out:
                out.write(f"{text} {seed} {number}")
        last = {"filename": "00000012.txt", "subfolder": filename_prefix, "type": "output", "in_sequence": True}
        return {"ui": {"images": [last]}}

NODE_CLASS_MAPPINGS = {"BatchProbe": BatchProbe, "BatchFrames": BatchFrames}
'''


# ------------------------------------------------------------------------------------------------- the machinery


class ProbeServer:
    """A ComfyUI server with the probe node, on one port for good; it can be killed and started again."""

    def __init__(self, comfyui: Path, folder: Path) -> None:
        self.comfyui, self.folder = comfyui, folder
        self.ledger = folder / "ledger.txt"
        self.port = comfy_host.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self.start()

    def start(self) -> None:
        base = self.folder / f"base{self.starts}"
        self.starts += 1
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / "batch_probe.py").write_text(f"LEDGER = {str(self.ledger)!r}\n{PROBE_NODE}")
        self.server = comfy_host.ComfyServer(self.comfyui, base, port=self.port)
        self.server.port = self.port

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()

    def events(self, event: str) -> Counter[str]:
        """How often each job was noted with ``start`` or ``end``."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return Counter(line.split(" ", 1)[1] for line in lines if line.startswith(event + " "))


class Proxy:
    """Forwards TCP to a server. ``down`` refuses, ``hang`` goes silent; ``swallow_answer`` loses the answer to the
    next POST /prompt, ``old`` has no route to cancel one job, as ComfyUI 0.24, ``no_view`` has no results,
    ``holds_view`` keeps them to itself, and ``odd`` spells a key of /queue otherwise."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.swallow_answer = self.old = self.no_view = self.holds_view = self.odd = False
        self.swallowed = self.held = 0
        self.silent = False
        self.sockets: set[socket.socket] = set()
        self.port = comfy_host.free_port()
        self.listener: socket.socket | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen()
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def down(self) -> None:
        assert self.listener is not None
        for item in [self.listener, *self.sockets]:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()
        self.sockets.clear()

    def hang(self) -> None:
        """Break what is open; new connections are taken and never answered, as by a machine that froze."""
        self.silent = True
        opened = list(self.sockets)
        self.sockets.clear()
        for item in opened:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                if self.silent:
                    self.sockets.add(client)
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                self.sockets |= {client, server}
                lose = threading.Event()
                for source, sink, is_request in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._copy, args=(source, sink, is_request, lose), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, is_request: bool, lose: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_request and self.swallow_answer and data.startswith(b"POST /prompt "):
                    self.swallow_answer = False
                    lose.set()
                if is_request and self.old and data.startswith(b"POST /api/jobs/"):
                    data = data.replace(b"/api/jobs/", b"/api/none/", 1)
                if is_request and data.startswith(b"GET /view"):
                    if self.holds_view:
                        self.held += 1
                        continue
                    data = data.replace(b"/view", b"/none", 1) if self.no_view else data
                if self.odd and not is_request:
                    data = data.replace(b'"queue_running"', b'"queue_walking"')
                if not is_request and lose.is_set():
                    self.swallowed += 1
                    break
                sink.sendall(data)
        for item in (source, sink):
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)


def arguments(folder: Path, graph: dict, prompts: str, seeds: str, servers: list[str], *more: str) -> list[str]:
    """Write a batch's files into a folder and return the arguments of queue_batch.py for it."""
    folder.mkdir(exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    made = [str(folder / "graph.json"), "--prompts", str(folder / "prompts.txt"), "--seeds", seeds]
    for server in servers:
        made += ["--server", server]
    return [*made, "--output", str(folder / "out"), *more]


class Run:
    """One call of queue_batch.py in its own process, and the log it writes."""

    def __init__(self, folder: Path, graph: dict, prompts: str, seeds: str, servers: list[str], *more: str) -> None:
        self.output, self.log = folder / "out", folder / "out" / "batch.jsonl"
        command = [sys.executable, str(ROOT / "queue_batch.py")]
        command += arguments(folder, graph, prompts, seeds, servers, *more)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )

    def end(self) -> tuple[int, str]:
        """The exit status and all that was printed."""
        try:
            printed, _ = self.process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail("queue_batch.py did not end: " + self.process.communicate()[0])
        return self.process.returncode, printed

    def records(self) -> list[dict]:
        return records(self.log)

    def done(self) -> Counter[tuple[str, int]]:
        return Counter((r["prompt"], r["seed"]) for r in self.records() if r["status"] == "done")


def records(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n") if line]


def wait_for(condition, what: str, seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


def probe_graph(seconds: float) -> dict:
    graph = json.loads(json.dumps(PROBE))
    graph["7"]["inputs"]["seconds"] = seconds
    return graph


@pytest.fixture(scope="module")
def probe(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProbeServer]:
    server = ProbeServer(comfyui_dir, tmp_path_factory.mktemp("probe"))
    try:
        server.server.wait_ready()
        yield server
    finally:
        server.server.stop()


@pytest.fixture(autouse=True)
def _fresh_ledger(request: pytest.FixtureRequest) -> None:
    if "probe" in request.fixturenames:
        request.getfixturevalue("probe").ledger.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- real servers


def test_two_servers_share_the_jobs_and_no_name_becomes_a_path(comfy_server, probe, tmp_path):
    hostile = [
        "../../outside",
        "/etc/passwd",
        "C:\\con",
        "%date:yyyy% \x1b[31m $(touch x)",
        "ein Kätzchen \u5c0f\u732b",
        ".",
    ]
    run = Run(tmp_path / "a", PICTURE, "# comment\n\n" + "\n".join(hostile), "0-1,255", [comfy_server.url, probe.url])
    status, printed = run.end()
    assert status == 0, printed
    assert run.done() == {(prompt.strip(), seed): 1 for prompt in hostile for seed in (0, 1, 255)}
    assert {record["server"] for record in run.records()} == {comfy_server.url, probe.url}
    for record in run.records():
        file = Path(record["file"])
        assert file.parent == run.output and file.suffix == ".png"
        assert Image.open(file).getpixel((0, 0)) == (0, 0, record["seed"])  # the very job's result
        assert record["seconds"] >= 0 and record["error"] is None
    others = {path.name for path in run.output.iterdir() if path.suffix != ".png"}
    assert others == {"batch.jsonl", "batch.jsonl.lock"} and len(list(run.output.iterdir())) == len(hostile) * 3 + 2
    assert not (run.output / "batch.jsonl.inflight").exists()
    assert "\x1b" not in printed
    outputs = [comfy_server.output_dir, probe.server.output_dir]
    saved = [file for folder in outputs for file in folder.rglob("picture_*.png")]
    assert len(saved) == len({file.name for file in saved}) == len(hostile) * 3  # no two jobs share a name


def test_without_output_the_log_names_the_files_on_the_server(comfy_server, tmp_path):
    run = Run(tmp_path / "a", PICTURE, "p", "3", [comfy_server.url])
    run.end()
    run = Run(tmp_path / "a", PICTURE, "p", "3", [comfy_server.url], "--log", str(tmp_path / "b.jsonl"))
    command = [part for part in run.process.args]
    run.process.kill()
    run.process.communicate()
    del command[command.index("--output") : command.index("--output") + 2]
    command[command.index("--log") + 1] = str(tmp_path / "c.jsonl")
    subprocess.run(command, check=True, cwd=tmp_path, timeout=COMMAND_SECONDS, stdout=subprocess.DEVNULL)
    record = json.loads((tmp_path / "c.jsonl").read_text())
    assert record["file"].startswith("output/batch/picture_0001_s3_p_")
    assert (comfy_server.output_dir / record["file"].removeprefix("output/")).is_file()


def test_a_sequence_of_images_is_a_folder_in_the_order_of_its_frames(probe, tmp_path):
    inputs = {"text": "x", "seed": 0, "filename_prefix": "frames"}
    frames = {"8": {"class_type": "BatchFrames", "inputs": inputs, "_meta": {"title": "Prompt"}}}
    run = Run(tmp_path / "a", frames, "p", "4-5", [probe.url])
    status, printed = run.end()
    assert status == 0, printed
    for record in run.records():
        files = sorted(Path(record["file"]).parent.iterdir())
        assert [str(file) for file in files] == record["files"] and files[0].parent.parent == run.output
        assert [file.read_text() for file in files] == [f"p {record['seed']} {n}" for n in range(1, 13)]
    folders = [path.name for path in run.output.iterdir() if path.is_dir()]
    assert sorted(name[:8] for name in folders) == ["0001_s4_", "0002_s5_"]
    again = Run(tmp_path / "a", frames, "p", "4-5", [probe.url], "--resume")
    assert "2 of 2 jobs are done" in again.end()[1]


def test_a_refused_job_is_reported_with_the_nodes_words_and_the_others_go_on(comfy_server, tmp_path):
    run = Run(tmp_path / "a", PICTURE, "p", "0,8,16", [comfy_server.url], "--seed-node", "3.width")
    status, printed = run.end()
    assert status == 1, printed
    assert run.done() == {("p", 8): 1, ("p", 16): 1}
    (record,) = [r for r in run.records() if r["status"] == "error"]
    assert record["seed"] == 0 and record["file"] is None
    assert "EmptyImage (node 3)" in record["error"] and "smaller than min" in record["error"]


def test_a_failing_node_is_reported_and_resume_tries_it_again(probe, tmp_path):
    run = Run(tmp_path / "a", PROBE, "good\nthis fails", "5", [probe.url])
    assert run.end()[0] == 1
    (record,) = [r for r in run.records() if r["status"] == "error"]
    assert record["prompt"] == "this fails" and record["seed"] == 5
    assert record["error"] == "BatchProbe (node 7): RuntimeError: the probe was told to fail"
    again = Run(tmp_path / "a", PROBE, "good\nthis fails", "5", [probe.url], "--resume")
    assert again.end()[0] == 1
    assert probe.events("start") == {"5 good": 1, "5 this fails": 2}


def test_a_lost_connection_runs_no_job_twice(probe, tmp_path):
    proxy = Proxy(probe.port)
    proxy.swallow_answer = True  # the first job arrives, its receipt does not
    run = Run(tmp_path / "a", probe_graph(0.3), "one\ntwo", "0-2", [proxy.url])
    wait_for(lambda: probe.events("start") and proxy.swallowed, "the first job to start")
    for _ in range(2):
        finished = len(probe.events("end"))
        proxy.down()
        time.sleep(0.5)
        proxy.up()
        wait_for(lambda n=finished: len(probe.events("end")) > n or run.process.poll() is not None, "a job")
    status, printed = run.end()
    proxy.down()
    assert status == 0, printed
    assert proxy.swallowed == 1
    assert "no connection" in printed and "connected again" in printed
    once = {f"{seed} {prompt}": 1 for prompt in ("one", "two") for seed in range(3)}
    assert probe.events("start") == probe.events("end") == once
    assert sum(run.done().values()) == 6


def test_a_job_of_which_nothing_is_heard_is_told_once(probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue_batch, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(queue_batch, "QUIET_SECONDS", 1.0)
    assert queue_batch.main(arguments(tmp_path / "a", probe_graph(3.0), "p", "0", [probe.url])) == 0
    assert capsys.readouterr().out.count("no word of its job") == 1


def test_a_server_that_goes_silent_is_given_up_and_resume_looks_there_first(probe, tmp_path, monkeypatch):
    proxy = Proxy(probe.port)
    batch, log = arguments(tmp_path / "a", probe_graph(1.0), "p", "0", [proxy.url]), tmp_path / "a/out/batch.jsonl"
    monkeypatch.setattr(queue_batch, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(queue_batch, "STABLE_SECONDS", 0.2)
    watch = threading.Thread(target=lambda: (wait_for(lambda: probe.events("start"), "the job to start"), proxy.hang()))
    watch.start()
    assert queue_batch.main([*batch, "--patience", "2"]) == 1
    watch.join()
    (record,) = records(log)
    assert record["status"] == "error" and "--resume looks there first" in record["error"]
    proxy.down()
    proxy.silent = False
    proxy.up()
    assert queue_batch.main([*batch, "--resume"]) == 0
    proxy.down()
    assert probe.events("start") == {"0 p": 1}
    assert [record["status"] for record in records(log)] == ["error", "done"]


def test_this_program_killed_and_resumed_runs_no_job_twice(probe, tmp_path):
    run = Run(tmp_path / "a", probe_graph(0.5), "p", "0-4", [probe.url])
    wait_for(lambda: len(probe.events("start")) == 2, "the second job to start")
    run.process.kill()
    run.process.communicate()
    with open(run.log, "ab") as log:
        log.write(b'{"index": 2, "prompt": "p", "se')  # the half line of a crash
    refused = Run(tmp_path / "a", probe_graph(0.5), "p", "0-4", [probe.url])
    status, printed = refused.end()
    assert status == 2 and "--resume" in printed
    again = Run(tmp_path / "a", probe_graph(0.5), "p", "0-4", [probe.url], "--resume")
    status, printed = again.end()
    assert status == 0, printed
    assert probe.events("start") == probe.events("end") == {f"{seed} p": 1 for seed in range(5)}
    assert again.done() == {("p", seed): 1 for seed in range(5)}
    assert not (run.output / "batch.jsonl.inflight").exists()
    more = Run(tmp_path / "a", probe_graph(0.5), "p", "0-5", [probe.url], "--resume")
    assert more.end()[0] == 0
    assert probe.events("start") == {f"{seed} p": 1 for seed in range(6)}


def test_a_resumed_batch_hears_of_the_job_that_a_killed_one_left(probe, tmp_path, monkeypatch):
    run = Run(tmp_path / "a", probe_graph(4.0), "p", "0", [probe.url])
    wait_for(lambda: probe.events("start"), "the job to start")
    run.process.kill()
    run.process.communicate()
    monkeypatch.setattr(queue_batch, "POLL_SECONDS", 30.0)
    began = time.monotonic()
    batch = arguments(tmp_path / "a", probe_graph(4.0), "p", "0", [probe.url], "--resume")
    assert queue_batch.main(batch) == 0
    assert time.monotonic() - began < 20 and probe.events("start") == {"0 p": 1}, "by its events, not by a look"


@pytest.fixture
def hangs_up():
    """Programs that are started end with their terminal, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("signals", [["SIGINT"], ["SIGHUP", "SIGHUP"]])
@pytest.mark.usefixtures("hangs_up")
def test_ctrl_c_or_a_closed_terminal_ends_the_running_job_of_a_server_that_cannot_cancel_one(probe, tmp_path, signals):
    proxy = Proxy(probe.port)
    proxy.old = True
    run = Run(tmp_path / "a", probe_graph(20.0), "p", "0", [proxy.url])
    wait_for(lambda: probe.events("start"), "the job to run")
    for name in signals:
        run.process.send_signal(getattr(signal, name))
        time.sleep(0.01)
    assert run.end()[0] == 130
    wait_for(lambda: not probe.server.get("/queue")["queue_running"], "the job to end", 5)
    assert not probe.events("end") and not (run.output / "batch.jsonl.inflight").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_takes_only_our_own_jobs_off_the_queue(probe, tmp_path):
    command = tmp_path / "a", probe_graph(5.0), "p", "0-2", [probe.url], "--in-flight", "3"
    run = Run(*command)
    wait_for(lambda: len(probe.server.get("/queue")["queue_pending"]) == 2, "two jobs to wait")
    other = json.loads(json.dumps(PROBE))
    other["7"]["inputs"]["text"] = "of another person"
    prompt_id = probe.server.queue(other)
    run.process.send_signal(signal.SIGINT)
    status, printed = run.end()
    assert status == 130, printed
    assert "3 of 3 jobs not finished" in printed and run.records() == []
    assert probe.server.wait(prompt_id, 30)["status"]["status_str"] == "success"
    queue = probe.server.get("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"]
    assert probe.events("end") == {"0 of another person": 1}
    again = Run(*command, "--resume")
    status, printed = again.end()
    assert status == 0, printed
    assert again.done() == {("p", seed): 1 for seed in range(3)}
    assert probe.events("end") == {"0 of another person": 1, **{f"{seed} p": 1 for seed in range(3)}}


def test_a_server_killed_in_mid_run_and_started_again(probe, tmp_path):
    run = Run(tmp_path / "a", probe_graph(0.5), "p", "0-3", [probe.url])
    wait_for(lambda: len(probe.events("start")) == 2, "the second job to start")
    wait_for(lambda: run.log.exists() and len(run.records()) == 1, "the first line of the log")
    probe.kill()
    assert run.process.poll() is None
    probe.start()
    probe.server.wait_ready()
    status, printed = run.end()
    assert status == 0, printed
    assert probe.events("end") == {f"{seed} p": 1 for seed in range(4)}
    assert probe.events("start")["1 p"] == 2  # it had not finished: nothing else could be done
    assert run.done() == {("p", seed): 1 for seed in range(4)}


def test_jobs_of_a_server_that_stays_away_move_to_another(comfy_server, tmp_path):
    gone = f"http://127.0.0.1:{comfy_host.free_port()}"
    run = Run(tmp_path / "a", PICTURE, "p", "0-3", [gone, comfy_server.url], "--patience", "1")
    status, printed = run.end()
    assert status == 0, printed
    assert {record["server"] for record in run.records()} == {comfy_server.url}
    alone = Run(tmp_path / "b", PICTURE, "p", "0-3", [gone], "--patience", "1")
    status, printed = alone.end()
    assert status == 1 and "4 not run" in printed and "is ComfyUI running there?" in printed


def test_a_server_that_refuses_every_job_leaves_them_to_another(comfy_server, probe, tmp_path):
    run = Run(tmp_path / "a", probe_graph(0.5), "p", "0-7", [comfy_server.url, probe.url])  # one has no probe node
    status, printed = run.end()
    assert status == 0, printed
    assert run.done() == {("p", seed): 1 for seed in range(8)}
    assert probe.events("start") == {f"{seed} p": 1 for seed in range(8)}
    assert printed.count("Node 'Prompt' not found") == 2, "the first job and the end of it are told, the others not"
    assert printed.count("gets no more jobs, for others did the last 3") == 1
    assert not (run.output / "batch.jsonl.inflight").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_in_a_download_leaves_the_finished_job_for_resume(probe, tmp_path):
    proxy = Proxy(probe.port)
    proxy.holds_view = True
    run = Run(tmp_path / "a", PROBE, "p", "0", [proxy.url])
    wait_for(lambda: proxy.held, "the download to begin")
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130
    proxy.holds_view = False
    again = Run(tmp_path / "a", PROBE, "p", "0", [proxy.url], "--resume")
    status, printed = again.end()
    proxy.down()
    assert status == 0, printed
    assert probe.events("start") == {"0 p": 1} and again.done() == {("p", 0): 1}


def test_a_result_that_cannot_be_written_stops_the_batch_and_no_job(probe, tmp_path):
    graph = probe_graph(0.5)
    digest = batch_jobs.graph_digest(graph, [batch_jobs.Target("7", "text"), batch_jobs.Target("7", "seed")])
    first, _ = batch_jobs.make_jobs(["p"], [0, 1], digest)
    in_the_way = tmp_path / "a" / "out" / f"{first.name}.txt"
    in_the_way.mkdir(parents=True)
    run = Run(tmp_path / "a", graph, "p", "0-1", [probe.url])
    status, printed = run.end()
    assert status == 1 and f"cannot write {in_the_way}" in printed and "what the servers have goes on" in printed
    in_the_way.rmdir()
    again = Run(tmp_path / "a", graph, "p", "0-1", [probe.url], "--resume")
    status, printed = again.end()
    assert status == 0, printed
    assert probe.events("start") == probe.events("end") == {"0 p": 1, "1 p": 1}


def test_a_result_that_a_server_does_not_have_is_made_anew_by_resume(probe, tmp_path):
    proxy = Proxy(probe.port)
    proxy.no_view = True
    run = Run(tmp_path / "a", PROBE, "p", "0", [proxy.url])
    status, printed = run.end()
    assert status == 1 and "its result was not downloaded: HTTP 404" in printed
    assert not (run.output / "batch.jsonl.inflight").exists()
    proxy.no_view = False
    assert Run(tmp_path / "a", PROBE, "p", "0", [proxy.url], "--resume").end()[0] == 0
    proxy.down()
    assert probe.events("start") == {"0 p": 2}


def test_a_result_is_on_the_disk_before_it_has_its_name(probe, tmp_path, monkeypatch):
    synced, kept, sync, replace = set(), [], os.fsync, os.replace

    def note(source, target):
        kept.append((Path(target).suffix, os.stat(source).st_ino in synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), sync(number)))
    monkeypatch.setattr(os, "replace", note)
    assert queue_batch.main(arguments(tmp_path / "a", PROBE, "p", "0", [probe.url])) == 0
    assert (".txt", True) in kept


def test_a_server_that_says_nothing_for_too_long_is_given_up_and_keeps_its_job(probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue_batch, "POLL_SECONDS", 0.2)
    batch, log = arguments(tmp_path / "a", probe_graph(6.0), "p", "0-1", [probe.url]), tmp_path / "a/out/batch.jsonl"
    assert queue_batch.main([*batch, "--in-flight", "1", "--stall", "0.02"]) == 1
    printed = capsys.readouterr().out
    assert "given up (no word of its job" in printed and "1 failed, 1 not run" in printed
    assert "--resume looks there first" in records(log)[0]["error"]
    assert queue_batch.main([*batch, "--resume"]) == 0
    assert probe.events("start") == probe.events("end") == {"0 p": 1, "1 p": 1}


def test_jobs_that_a_server_refuses_wait_for_one_that_still_starts(comfy_server, probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue_batch, "FIRST_CONTACT_SECONDS", 0.2)
    proxy = Proxy(probe.port)
    proxy.down()
    batch = arguments(tmp_path / "a", PROBE, "p", "0-9", [comfy_server.url, proxy.url])  # the first has no probe node
    late = threading.Timer(3.0, proxy.up)
    late.start()
    assert queue_batch.main(batch) == 0
    late.join()
    proxy.down()
    assert probe.events("start") == {f"{seed} p": 1 for seed in range(10)}
    assert "given up" not in capsys.readouterr().out


def test_a_server_that_is_late_gets_jobs_while_another_works(probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue_batch, "RETRY_SECONDS", 0.2)
    proxy = Proxy(probe.port)
    proxy.down()
    watch = threading.Thread(target=lambda: (wait_for(lambda: len(probe.events("end")) > 2, "jobs"), proxy.up()))
    watch.start()
    batch = arguments(tmp_path / "a", probe_graph(0.5), "p", "0-9", [proxy.url, probe.url], "--patience", "0.2")
    assert queue_batch.main(batch) == 0
    watch.join()
    proxy.down()
    printed = capsys.readouterr().out
    assert printed.count("given up") == printed.count("connected again") == 1
    assert proxy.url in {record["server"] for record in records(tmp_path / "a" / "out" / "batch.jsonl")}
    assert probe.events("start") == {f"{seed} p": 1 for seed in range(10)}


def test_patience_that_is_asked_for_is_had_with_a_server_that_still_starts(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(queue_batch, "FIRST_CONTACT_SECONDS", 0.1)
    proxy = Proxy(probe.port)
    proxy.down()
    batch = arguments(tmp_path / "a", PROBE, "p", "0", [proxy.url])
    assert queue_batch.main(batch) == 1
    late = threading.Timer(1.0, proxy.up)
    late.start()
    assert queue_batch.main([*batch, "--resume", "--patience", "60"]) == 0
    late.join()
    proxy.down()


def test_only_a_port_that_refused_all_the_time_moves_jobs(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(queue_batch, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(queue_batch, "STABLE_SECONDS", 0.0)
    log = tmp_path / "a" / "out" / "batch.jsonl"
    proxy = Proxy(probe.port)

    def break_off(hangs: bool) -> None:
        wait_for(lambda: len(probe.server.get("/queue")["queue_pending"]) == 1, "a job to run and one to wait")
        if hangs:
            proxy.hang()
            wait_for(lambda: proxy.sockets, "a connection that is not answered")
            time.sleep(0.6)
        proxy.down()

    batch = arguments(tmp_path / "a", probe_graph(6.0), "p", "0-1", [proxy.url, probe.url], "--in-flight", "1")
    for hangs, resume in ((True, []), (False, ["--resume"])):
        watch = threading.Thread(target=break_off, args=(hangs,))
        watch.start()
        assert queue_batch.main([*batch, *resume, "--patience", "2"]) == (1 if hangs else 0)
        watch.join()
        if hangs:
            (lost,) = [record for record in records(log) if record["status"] == "error"]
            assert lost["server"] == proxy.url and "--resume looks there first" in lost["error"]
            wait_for(lambda: sum(probe.events("end").values()) == 2, "both jobs to end")
            assert probe.events("start") == {"0 p": 1, "1 p": 1}
            log.unlink()
            batch[batch.index("0-1")] = "2-3"
            proxy.silent = False
            proxy.up()
    done = [record for record in records(log) if record["status"] == "done"]
    assert {record["server"] for record in done} == {probe.url} and len(done) == 2


def test_another_spelling_of_an_address_runs_no_job_twice(probe, tmp_path):
    run = Run(tmp_path / "a", probe_graph(2.0), "p", "0-1", [probe.url])
    wait_for(lambda: probe.server.get("/queue")["queue_pending"], "a job to run and one to wait")
    run.process.kill()
    run.process.communicate()
    nowhere = {"graph": "", "jobs": [["p", 2, str(uuid.uuid4()), "http://gone"]]}
    inflight = run.output / "batch.jsonl.inflight"
    known = json.loads(inflight.read_text())
    inflight.write_text(json.dumps({**known, "jobs": known["jobs"] + nowhere["jobs"]}))
    again = Run(tmp_path / "a", probe_graph(2.0), "p", "0-2", [f"http://localhost:{probe.port}"], "--resume")
    status, printed = again.end()
    assert status == 0, printed
    assert printed.count("is looked for on all") == 3
    assert probe.events("start") == probe.events("end") == {f"{seed} p": 1 for seed in range(3)}
    assert nowhere["jobs"][0][2] not in {record["prompt_id"] for record in again.records()}


def test_a_server_with_odd_answers_is_given_up_and_the_others_go_on(probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue_batch, "POLL_SECONDS", 0.2)
    proxy = Proxy(probe.port)
    proxy.odd = True
    batch = arguments(tmp_path / "a", probe_graph(1.0), "p", "0-3", [proxy.url, probe.url], "--in-flight", "1")
    assert queue_batch.main(batch) == 1
    proxy.down()
    assert "given up (it answers not as ComfyUI does: KeyError('queue_running'))" in capsys.readouterr().out
    log = records(tmp_path / "a" / "out" / "batch.jsonl")
    assert Counter(record["status"] for record in log) == {"done": 3, "error": 1}
    assert (tmp_path / "a" / "out" / "batch.jsonl.inflight").exists()
    wait_for(lambda: sum(probe.events("end").values()) == 4, "the job that was left there")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT and needs a pseudo-terminal")
def test_a_second_ctrl_c_gives_the_terminal_its_cursor_back(probe, tmp_path):
    pytest.importorskip("rich")
    import pty

    proxy = Proxy(probe.port)
    command = [sys.executable, str(ROOT / "queue_batch.py")]
    command += arguments(tmp_path / "a", probe_graph(3.0), "p", "0", [proxy.url])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while block := os.read(ours, 65536):
                shown.extend(block)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: probe.events("start"), "the job to start")
    proxy.hang()  # it will not answer to what the first Ctrl-C asks of it
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(timeout=5) == 130
    reader.join()
    os.close(ours)
    proxy.down()
    assert 0 <= shown.rfind(b"\x1b[?25l") < shown.rfind(b"\x1b[?25h"), "hidden, and shown again"
    wait_for(lambda: probe.events("end"), "the job that was left there")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGHUP and needs a pseudo-terminal")
@pytest.mark.usefixtures("hangs_up")
def test_a_terminal_that_is_closed_stops_the_batch_without_a_traceback(tmp_path):
    pytest.importorskip("rich")
    import pty

    command = [sys.executable, str(ROOT / "queue_batch.py")]
    command += arguments(tmp_path / "a", PICTURE, "p", "0", ["http://127.0.0.1:9"], "--patience", "600")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, text=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    while b"trying again" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=COMMAND_SECONDS)
    assert process.returncode > 0 and "Traceback" not in said, said


def test_a_job_that_the_queue_has_as_running_has_started(probe):
    async def look() -> list[bool]:
        jobs = batch_jobs.make_jobs(["p"], [1, 2], "g")
        async with queue_batch.aiohttp.ClientSession() as session:
            server = queue_batch.Server(probe.url, session, jobs={job.prompt_id: job for job in jobs})
            for job in jobs:
                body = {"prompt": probe_graph(2.0), "prompt_id": job.prompt_id}
                assert (await server.request("POST", "/prompt", body=body))[0] == 200
            wait_for(lambda: probe.events("start"), "the first job to start")
            assert await server.queued_ids() == [job.prompt_id for job in jobs]
            await server.cancel(jobs)
        return [job.started for job in jobs]

    assert asyncio.run(look()) == [True, False]


# -------------------------------------------------------------------------------------------------- shot lists


def shots(folder: Path, graph: dict, rows: str, servers: list[str], *more: str) -> list[str]:
    """Write a graph and a table into a folder and return the arguments of queue_batch.py for them."""
    folder.mkdir(exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "shots.csv").write_text(rows, encoding="utf-8")
    made = [str(folder / "graph.json"), "--prompts", str(folder / "shots.csv"), "--output", str(folder / "out")]
    for server in servers:
        made += ["--server", server]
    return [*made, *more]


def draw(path: Path, colour: tuple[int, int, int], left: int) -> np.ndarray:
    """A square on gray, as the demo's models know it; its pixels."""
    pixels = np.full((64, 64, 3), 64, np.uint8)
    pixels[26:40, left : left + 14] = colour
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_a_shot_list_begins_each_video_with_a_picture_beside_it_and_resume_makes_what_changed(comfy_server, tmp_path):
    graph = json.loads((ROOT / "workflows" / "api" / "image_to_video.json").read_text(encoding="utf-8"))
    for node_id in ("20", "21", "22"):
        del graph[node_id]
    graph["30"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Start"}}
    graph["9"]["inputs"]["images"] = ["30", 0]
    folder = tmp_path / "a"
    folder.mkdir()
    pictures = [draw(folder / "red.png", (235, 30, 30), 12), draw(folder / "b $..x" / "$.png", (30, 60, 235), 30)]
    rows = "prompt;seed;name;start.image;Size and length.length\n"
    rows += "a red square moves right;7;opening;red.png;21\n;8;;b $..x/$.png;33\n"
    batch = shots(folder, graph, rows, [comfy_server.url])
    assert queue_batch.main(batch) == 0
    lines = records(folder / "out" / "batch.jsonl")
    assert [line["prompt"] for line in lines] == ["a red square moves right"] * 2, "an empty cell keeps the graph's"
    assert Path(lines[0]["file"]).name.startswith("0001_s7_opening_")
    names = [line["values"]["30.image"] for line in lines]
    assert all(re.fullmatch(r"(red|prompt)_[0-9a-f]{16}\.png", name) for name in names), names
    inputs = comfy_server.input_dir
    for line, picture, name, length in zip(lines, pictures, names, (21, 33), strict=True):
        with av.open(line["file"]) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == length and np.abs(frames[0] - picture.astype(np.float32)).mean() < 6
        assert (inputs / name).is_file()
    assert queue_batch.main([*batch, "--resume"]) == 0 and len(records(folder / "out" / "batch.jsonl")) == 2
    draw(folder / "red.png", (235, 30, 30), 20)
    assert queue_batch.main([*batch, "--resume"]) == 0
    *_, last = records(folder / "out" / "batch.jsonl")
    assert len(records(folder / "out" / "batch.jsonl")) == 3 and last["seed"] == 7
    assert last["values"]["30.image"] not in names


def test_a_picture_goes_once_to_each_server_and_one_that_a_server_has_is_left(comfy_server, probe, tmp_path):
    graph = PICTURE | {"3": {"class_type": "LoadImage", "inputs": {"image": "example.png"}}}
    graph["6"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    folders = [server.input_dir for server in (comfy_server, probe.server)]
    for folder in folders:
        draw(folder / "theirs.png", (1, 2, 3), 0)
    before = [set(folder.iterdir()) for folder in folders]
    picture = draw(tmp_path / "a" / "ours.png", (235, 30, 30), 12)
    rows = "prompt,3.image,1.value\na,ours.png\nb,theirs.png\n"
    batch = shots(tmp_path / "a", graph, rows, [comfy_server.url, probe.url], "--seeds", "0-3")
    assert queue_batch.main(batch) == 2, "1.value is the prompt"
    batch = shots(tmp_path / "a", graph, rows.replace(",1.value", ""), [comfy_server.url, probe.url], "--seeds", "0-3")
    assert queue_batch.main(batch) == 0
    for line in records(tmp_path / "a" / "out" / "batch.jsonl"):
        made = np.asarray(Image.open(line["file"]))
        assert (made == picture).all() if line["prompt"] == "a" else tuple(made[30, 0]) == (1, 2, 3)
        assert line["values"]["3.image"] == "theirs.png" or line["values"]["3.image"].startswith("ours_")
    for folder, known in zip(folders, before, strict=True):
        assert [path.name[:5] for path in set(folder.iterdir()) - known] == ["ours_"]


def test_a_decimal_is_refused_before_anything_is_queued_where_the_server_has_whole_numbers(
    comfy_server, probe, tmp_path, capsys
):
    batch = shots(tmp_path / "a", PICTURE, "prompt,3.batch_size\na,2\nb,1.5\n", [comfy_server.url])
    assert queue_batch.main(batch) == 1
    shown = capsys.readouterr().out
    assert "shots.csv row 3: 1.5 is no whole number, as 3.batch_size needs" in shown and "2 of 2 jobs not" in shown
    graph = probe_graph(0)  # JSON has 0 for 0.0
    assert queue_batch.main(shots(tmp_path / "b", graph, "prompt,seed,Prompt.seconds\na,4,0.1\n", [probe.url])) == 0
    (line,) = records(tmp_path / "b" / "out" / "batch.jsonl")
    assert line["values"] == {"7.seconds": 0.1} and probe.events("end") == {"4 a": 1}


# --------------------------------------------------------------------------------------------------- no server


def test_seeds():
    assert batch_jobs.parse_seeds("0-3, 7,9,2") == [0, 1, 2, 3, 7, 9]
    for wrong in ("", "a", "3-1", "-1", "1.5", "0-99999999999", str(2**64), "1" * 5000, "\u0663"):
        with pytest.raises(batch_jobs.BatchError, match="--seeds"):
            batch_jobs.parse_seeds(wrong)
    assert batch_jobs.parse_seeds(f"5-5,{2**64 - 1}") == [5, 2**64 - 1]


def test_a_batch_may_have_as_many_jobs_as_are_allowed(monkeypatch):
    monkeypatch.setattr(batch_jobs, "MAX_JOBS", 3)
    assert len(batch_jobs.make_jobs(["a"], batch_jobs.parse_seeds("1-3"), "g")) == 3
    with pytest.raises(batch_jobs.BatchError, match="holds more than 3 seeds"):
        batch_jobs.parse_seeds("1-4")
    with pytest.raises(batch_jobs.BatchError, match="2 prompts x 2 seeds is more than 3 jobs"):
        batch_jobs.make_jobs(["a", "b"], [1, 2], "g")


def test_prompts_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# head\r\n a cat \r\n\r\na dog\ra cat\n".encode())
    assert batch_jobs.read_prompts(file) == ["a cat", "a dog"]
    file.write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(batch_jobs.BatchError, match="byte 0xff in line 2; save the file again as UTF-8"):
        batch_jobs.read_prompts(file)
    file.write_bytes(b"# nothing\n")
    with pytest.raises(batch_jobs.BatchError, match="holds no prompt"):
        batch_jobs.read_prompts(file)
    file.write_bytes("\ufeffa cat\n\ufeffa dog\n \ufeff \n".encode())
    assert batch_jobs.read_prompts(file) == ["a cat", "a dog"], "two files put together"
    file.write_bytes(b"a cat\0\n")
    with pytest.raises(batch_jobs.BatchError, match="holds a zero byte"):
        batch_jobs.read_prompts(file)
    with pytest.raises(batch_jobs.BatchError, match="cannot read"):
        batch_jobs.read_prompts(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.xlsx", "PK\x03\x04\0", "a table"),
        ("a.JSON", '[\n"a"\n]', "JSON"),
        ("a.rtf", "a", "RTF"),
        ("a.txt", "fine\na red circle\t3\n", r"a table \(a line has a tab in it\)"),
        ("a.txt", 'fine\n {"prompt": "a red circle"}\n', "JSON"),
        ("a.txt", "{\\rtf1\\ansi\n{\\fonttbl\t}\n", "RTF"),
    ],
)
def test_a_prompts_file_of_another_format_is_refused(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    with pytest.raises(batch_jobs.BatchError, match=f"{name} is {kind}; give a text file with one prompt a line"):
        batch_jobs.read_prompts(tmp_path / name)


def test_braces_and_tabs_around_a_prompt_are_none_of_another_format(tmp_path):
    (tmp_path / "a.txt").write_text("\t{a|b} circle\t\n# a\tb\n{0}\n[a]\n")
    assert batch_jobs.read_prompts(tmp_path / "a.txt") == ["{a|b} circle", "{0}", "[a]"]


def test_graph_files_that_are_none(tmp_path):
    file = tmp_path / "graph.json"
    half = r'{"7": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a\ud800"}}}'
    cases = ['{"nodes": [], "links": []}', '{"1": {"inputs": {}}}', "[]", "{}", "not json", "[" * 100_000, half]
    messages = ["canvas workflow", "API graph", "API graph", "API graph", "not JSON", "not JSON", r"\\ud800 in node 7"]
    cases.append('{"1": {"class_type": "A", "inputs": []}}')
    messages.append("API graph")
    for text, message in zip(cases, messages, strict=True):
        file.write_text(text)
        with pytest.raises(batch_jobs.BatchError, match=message):
            batch_jobs.load_graph(file)
    with pytest.raises(batch_jobs.BatchError, match="cannot read the workflow .*missing.json"):
        batch_jobs.load_graph(tmp_path / "missing.json")
    file.write_text(json.dumps(PICTURE | {"1": _encoder("\u732b")}, ensure_ascii=False), encoding="utf-8")
    assert batch_jobs.load_graph(file)["1"]["inputs"]["text"] == "\u732b"
    file.write_text(json.dumps(PICTURE), encoding="utf-8-sig")  # as some editors of Windows save it
    assert batch_jobs.load_graph(file) == PICTURE


def _encoder(text="x", title=None):
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["9", 0]}, **meta}


def _sampler(positive="1", negative="2", **inputs):
    return {
        "class_type": "KSampler",
        "inputs": {"positive": [positive, 0], "negative": [negative, 0], "seed": 1, **inputs},
    }


def test_the_prompt_goes_to_the_text_behind_positive():
    graph = {"2": _encoder(), "1": _encoder(), "3": _sampler()}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]
    assert batch_jobs.find_seed_targets(graph, []) == [batch_jobs.Target("3", "seed")]
    control = {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["1", 0], "negative": ["2", 0]}}
    graph = {"1": _encoder(["5", 0]), "2": _encoder(), "3": _sampler("4", "4"), "4": control}
    graph["5"] = {"class_type": "PrimitiveString", "inputs": {"value": "x"}}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("5", "value")]


def test_a_node_of_one_conditioning_carries_the_prompt_on_and_one_of_two_leaves_the_choice():
    combined = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["1", 0], "conditioning_2": ["2", 0]}}
    area = {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["1", 0], "width": 64}}
    graph = {"1": _encoder(), "2": _encoder(), "3": _sampler("4", "2"), "4": area}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]
    with pytest.raises(batch_jobs.BatchError, match="2 places for the prompt"):
        batch_jobs.find_prompt_targets(graph | {"4": combined}, [])


def test_without_a_sampler_titles_decide_and_then_the_only_encoder():
    assert batch_jobs.find_prompt_targets(PICTURE, []) == [batch_jobs.Target("1", "value")]
    assert batch_jobs.find_seed_targets(PICTURE, []) == [batch_jobs.Target("2", "value")]
    graph = {"1": _encoder(), "2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a"}}}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]


def test_names_and_titles_by_which_prompt_and_seed_are_found():
    for name in ("text", "prompt", "value", "string"):
        graph = {"1": {"class_type": "Encode", "inputs": {"model": "m", name: "x"}}, "3": _sampler()}
        found = [batch_jobs.Target("1", name)]
        assert batch_jobs.find_prompt_targets(graph, []) == batch_jobs.find_prompt_targets(graph, ["1"]) == found
    for title in ("Prompt", "positive", "Positive prompt"):
        graph = {"1": {"class_type": "Note", "inputs": {"text": "x"}, "_meta": {"title": title}}}
        assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]
    for title in ("Seed", "Noise seed"):
        graph = {"2": {"class_type": "Number", "inputs": {"low": 0, "value": 3}, "_meta": {"title": title}}}
        found = [batch_jobs.Target("2", "value")]
        assert batch_jobs.find_seed_targets(graph, []) == batch_jobs.find_seed_targets(graph, ["2"]) == found
    graph = {"1": {"class_type": "CLIPTextEncodeFlux", "inputs": {"t5xxl": "y", "text": "x"}}}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]
    dotted = {"1": _encoder(title="Wan 2.1"), "2": _encoder()}
    assert batch_jobs.find_prompt_targets(dotted, ["wan 2.1.text"]) == [batch_jobs.Target("1", "text")]


def test_links_that_lead_nowhere_are_none_and_of_a_node_with_a_positive_side_only_that_is_followed():
    graph = {"1": _encoder(), "3": _sampler("8", "9")}  # to nodes that are not there
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]
    three = {"class_type": "Points", "inputs": {"positive": ["1", 0, 0]}}
    assert batch_jobs.find_prompt_targets({"1": _encoder(), "2": PICTURE["1"], "3": three}, []) == [
        batch_jobs.Target("2", "value")
    ]
    both = {"class_type": "Both", "inputs": {"positive": ["1", 0], "negative_cond": ["2", 0]}}
    graph = {"1": _encoder(), "2": _encoder(), "3": _sampler("4", "4"), "4": both}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]


def test_only_a_widget_of_its_kind_takes_prompt_or_seed():
    number = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    graph = {"1": _encoder(["4", 0]), "2": _encoder(), "3": _sampler(seed=True), "4": number}
    with pytest.raises(batch_jobs.BatchError, match="0 places for the prompt"):
        batch_jobs.find_prompt_targets(graph | {"2": number}, [])
    with pytest.raises(batch_jobs.BatchError, match="0 places for the seed"):
        batch_jobs.find_seed_targets(graph, [])
    with pytest.raises(batch_jobs.BatchError, match="'seed' is no whole-number widget there"):
        batch_jobs.find_seed_targets(graph, ["3.seed"])
    odd = {"class_type": "Points", "inputs": {"positive": [[1, 2], 3]}}  # a value that only looks like a link
    assert batch_jobs.find_prompt_targets({"1": odd, "2": _encoder()}, []) == [batch_jobs.Target("2", "text")]
    two = {"class_type": "Note", "inputs": {"above": "a", "below": "b"}}
    with pytest.raises(batch_jobs.BatchError, match=r"the node has 2 text widgets \(above, below\); write 1\.INPUT"):
        batch_jobs.find_prompt_targets({"1": two}, ["1"])
    assert batch_jobs.find_prompt_targets({"1": two}, ["note.below"]) == [batch_jobs.Target("1", "below")]


def test_a_jobs_files_are_named_by_its_prompt_seed_and_graph():
    def name(prompt, seed=1, digest="g"):
        (job,) = batch_jobs.make_jobs([prompt], [seed], digest)
        assert job.name == batch_jobs.make_jobs([prompt], [seed], digest)[0].name
        return job.name

    assert name("../../A cat,\u00e9 \U0001f408").startswith("0001_s1_a-cat-e_")
    assert name("\U0001f408 \ud800").startswith("0001_s1_prompt_")
    assert name("a" * 31 + " long prompt").startswith("0001_s1_" + "a" * 31 + "_")
    assert len({name("a cat"), name("a cat!"), name("a cat", digest="h"), name("a cat", seed=2)}) == 4
    jobs = batch_jobs.make_jobs(["a", "b"], [7, 8], "g")
    assert [(job.index, job.prompt, job.seed) for job in jobs] == [(1, "a", 7), (2, "a", 8), (3, "b", 7), (4, "b", 8)]


def test_a_job_changes_its_own_copy_of_the_graph_and_a_batch_is_known_by_what_stays():
    graph = {"1": _encoder(), "3": _sampler(), "4": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a/b"}}}
    graph["5"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": ["6", 0]}}
    before = json.dumps(graph)
    targets = batch_jobs.Target("1", "text"), batch_jobs.Target("3", "seed")
    (job,) = batch_jobs.make_jobs(["a cat"], [5], "g")
    made = batch_jobs.graph_for(graph, job, [targets[0]], [targets[1]])
    assert (made["1"]["inputs"]["text"], made["3"]["inputs"]["seed"]) == ("a cat", 5)
    assert made["4"]["inputs"]["filename_prefix"] == f"a/b_{job.name}" and made["5"] == graph["5"]
    digest = batch_jobs.graph_digest(graph, targets)
    assert json.dumps(graph) == before
    assert batch_jobs.graph_digest(dict(reversed(list(made.items()))) | {"4": graph["4"]}, targets) == digest
    assert batch_jobs.graph_digest(made, targets) != digest, "another file name"
    named = graph | {"3": {**graph["3"], "_meta": {"title": "A sampler"}}}
    assert batch_jobs.graph_digest(named, targets) == digest, "a title changes no video"


def test_text_of_others_is_fit_for_a_terminal():
    assert batch_jobs.printable("a\x1b[31m\nb", 300) == "a [31m b"
    assert batch_jobs.printable("x" * 6, 6) == "x" * 6 and batch_jobs.printable("x" * 7, 6) == "xxxxx\u2026"


def test_a_prompt_schedule_takes_a_batch_prompt_as_its_only_row():
    graph = batch_jobs.load_graph(ROOT / "workflows" / "api" / "endless_prompts.json")
    (target,) = batch_jobs.find_prompt_targets(graph, [])
    assert graph[target.node_id]["class_type"] == "DiagonalPromptSchedule" and target.name == "text"
    (job,) = batch_jobs.make_jobs(["a red circle moves right"], [1], "digest")
    text = batch_jobs.graph_for(graph, job, [target], [])[target.node_id]["inputs"]["text"]
    (row,) = parse_prompts(text)
    assert row.at.is_start and row.text == job.prompt


def test_an_ambiguous_graph_is_refused_with_the_candidates_and_an_override_decides():
    graph = {"1": _encoder(), "2": _encoder(), "3": _sampler(), "4": _sampler("2", "1", seed=["6", 0])}
    graph["5"] = {"class_type": "SamplerCustom", "inputs": {"noise_seed": 3, "add_noise": True}}
    graph["6"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}, "_meta": {"title": "My number"}}
    with pytest.raises(batch_jobs.BatchError, match=r"2 places for the prompt.*1\.text.*2\.text"):
        batch_jobs.find_prompt_targets(graph, [])
    with pytest.raises(batch_jobs.BatchError, match=r"3 places for the seed.*3\.seed.*6\.value.*5\.noise_seed"):
        batch_jobs.find_seed_targets(graph, [])
    assert batch_jobs.find_prompt_targets(graph, ["2"]) == [batch_jobs.Target("2", "text")]
    assert batch_jobs.find_seed_targets(graph, ["my number", "3.seed"]) == [
        batch_jobs.Target("6", "value"),
        batch_jobs.Target("3", "seed"),
    ]
    for wrong in ("nowhere", "CLIPTextEncode", "1.clip", "5"):
        with pytest.raises(batch_jobs.BatchError, match="--prompt-node"):
            batch_jobs.find_prompt_targets(graph, [wrong])


def test_a_cycle_of_links_ends():
    loop = {"class_type": "A", "inputs": {"conditioning": ["2", 0], "positive": ["2", 0], "text": ["1", 0]}}
    graph = {"1": loop, "2": {"class_type": "B", "inputs": {"conditioning": ["1", 0]}}}
    with pytest.raises(batch_jobs.BatchError, match="0 places"):
        batch_jobs.find_prompt_targets(graph, [])


def test_log_is_repaired_only_if_it_is_one(tmp_path):
    log = tmp_path / "batch.jsonl"
    line = json.dumps({"prompt": "a", "seed": 1, "file": "x", "seconds": 1.0})
    log.write_text(line + '\n{"prompt": "b", "se')
    opened = batch_jobs.BatchLog(log, "any", resume=True)
    assert opened.done == {("a", 1)} and opened.foreign == 0
    opened.append({"prompt": "line\u2028separator \ud800", "seed": 2})
    opened.close()
    assert [json.loads(text)["prompt"] for text in log.read_text().splitlines()] == [
        "a",
        "line\u2028separator \ud800",
    ]
    log.write_text(line + "\n\n")
    opened = batch_jobs.BatchLog(log, "any", resume=True)
    opened.close()
    assert opened.done == {("a", 1)}
    log.write_text(line)  # whole, but its line end is lost
    opened = batch_jobs.BatchLog(log, "any", resume=True)
    opened.close()
    assert log.read_text() == line + "\n" and opened.done == {("a", 1)}
    log.write_bytes(line.encode() + b"\n" + bytes(5))  # what a power cut leaves of a line
    batch_jobs.BatchLog(log, "any", resume=True).close()
    assert log.read_text() == line + "\n"
    for text in ("a prompt\nanother", "a prompt\n", line + "\nhalf a prompt"):
        log.write_text(text)
        with pytest.raises(batch_jobs.BatchError, match="is this the log of a batch"):
            batch_jobs.BatchLog(log, "any", resume=True)
        assert log.read_text() == text


def test_a_line_of_the_log_is_on_the_disk_before_anything_else_happens(tmp_path, monkeypatch):
    log = batch_jobs.BatchLog(tmp_path / "new" / "folders" / "batch.jsonl", "g", resume=False)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(log.path.read_text()))
    log.append({"prompt": "a"})
    assert synced == ['{"prompt": "a"}\n']
    log.close()


def test_a_log_that_cannot_be_read_or_written_stops_the_batch_with_its_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(batch_jobs.BatchError, match=f"--log: cannot use {re.escape(str(tmp_path))}: "):
        batch_jobs.BatchLog(tmp_path, "g", resume=True)
    log = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=False)
    (job,) = batch_jobs.make_jobs(["a"], [1], "g")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(batch_jobs.BatchError, match="cannot write the log .*batch.jsonl: No space left"):
        log.append({"prompt": "a"})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(batch_jobs.BatchError, match="cannot write .*batch.jsonl.inflight: No space left"):
        log.start(job, "http://s")
    log.close()


def test_a_log_that_somebody_changed_counts_nothing_that_is_no_job(tmp_path):
    log = tmp_path / "batch.jsonl"
    lines = [{"prompt": ["a"], "seed": 1}, {"prompt": "b", "seed": [2]}, {"prompt": "c", "seed": 3}, {}]
    log.write_text("".join(json.dumps(line | {"status": "done"}) + "\n" for line in lines))
    for jobs in (None, 5, {"a": 1}):
        (tmp_path / "batch.jsonl.inflight").write_text(json.dumps({"graph": "g", "jobs": jobs}))
        opened = batch_jobs.BatchLog(log, "g", resume=True)
        opened.close()
        assert opened.done == {("c", 3)} and not opened.inflight


def test_lines_of_another_graph_are_not_skipped(tmp_path):
    log = tmp_path / "batch.jsonl"
    lines = [{"prompt": "a", "seed": 1, "status": "done", "graph": g} for g in ("g1", "g2")]
    lines.append({"prompt": "b", "seed": 1, "status": "error", "error": "x", "graph": "g1"})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = batch_jobs.BatchLog(log, "g1", resume=True)
    assert opened.done == {("a", 1)} and opened.foreign == 1
    opened.close()


def test_a_job_in_flight_is_known_to_the_next_run_until_its_end(tmp_path):
    log = tmp_path / "batch.jsonl"
    first = batch_jobs.BatchLog(log, "g", resume=False)
    jobs = batch_jobs.make_jobs(["a", "b"], [1], "g")
    for job in jobs:
        first.start(job, "http://s")
    assert len(json.loads(first.inflight_path.read_text())["jobs"]) == 2, "written down before anything is sent"
    first.forget(jobs[0])
    first.close()
    with pytest.raises(batch_jobs.BatchError, match="is there from an earlier run; add --resume"):
        batch_jobs.BatchLog(log, "g", resume=False)
    again = batch_jobs.BatchLog(log, "g", resume=True)
    assert again.inflight == {("b", 1): (jobs[1].prompt_id, "http://s")}
    again.append({"prompt": "b", "seed": 1, "status": "done", "graph": "g"})
    again.forget(jobs[1])
    again.close()
    with pytest.raises(batch_jobs.BatchError, match="add --resume"):
        batch_jobs.BatchLog(log, "g", resume=False)
    last = batch_jobs.BatchLog(log, "g", resume=True)
    assert (last.done, last.inflight) == ({("b", 1)}, {})
    last.close()


def test_the_id_that_a_server_sends_events_to_is_kept_with_the_jobs_in_flight(tmp_path):
    log, (job,) = tmp_path / "batch.jsonl", batch_jobs.make_jobs(["a"], [1], "g")

    def ids(*servers):
        opened = batch_jobs.BatchLog(log, "g", resume=True)
        found = [opened.client_id(server) for server in servers]
        opened.start(job, servers[0])
        opened.close()
        return found

    first = ids("http://s", "http://t")
    assert len(set(first)) == 2, "two addresses may be one server"
    assert ids("http://s", "http://t") == first
    inflight = tmp_path / "batch.jsonl.inflight"
    content = json.loads(inflight.read_text())
    for odd in (None, [], {"http://s": "x&y"}, {"http://s": 5}):  # None: as earlier versions wrote it
        inflight.write_text(json.dumps(content | {"clients": odd}))
        (found,) = ids("http://s")
        assert re.fullmatch("[0-9a-f]{32}", found) and found not in first


def test_resume_without_a_log_says_so(tmp_path, capsys):
    batch = arguments(tmp_path / "a", PICTURE, "p", "0-1", ["http://127.0.0.1:9"], "--patience", "0", "--resume")
    notice = f"no log at {tmp_path / 'a' / 'out' / 'batch.jsonl'} yet: all 2 jobs are run"
    assert queue_batch.main(batch) == 1 and notice in capsys.readouterr().out
    assert queue_batch.main(batch) == 1 and "no log at" not in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_a_batch_under_nohup_does_not_end_with_its_terminal(tmp_path):
    log = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert asyncio.run(queue_batch.run_batch([], {}, None, log)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        log.close()


def test_ids_in_flight_are_dropped_when_the_log_has_the_job_or_another_graph_left_them(tmp_path):
    log, ids = tmp_path / "batch.jsonl", [str(uuid.uuid4()) for _ in range(2)]
    log.write_text(json.dumps({"prompt": "a", "seed": 1, "status": "done", "graph": "g1"}) + "\n")
    jobs = [["a", 1, ids[0], "http://s"], ["b", 1, ids[1], "http://s"], ["c", 1, "../x", "http://s"], ["d"]]
    jobs.append(["e", 1, 5, "http://s"])
    inflight = tmp_path / "batch.jsonl.inflight"
    inflight.write_text(json.dumps({"graph": "g1", "jobs": jobs}))
    opened = batch_jobs.BatchLog(log, "g1", resume=True)
    assert opened.inflight == {("b", 1): (ids[1], "http://s")}
    opened.close()
    opened = batch_jobs.BatchLog(log, "g2", resume=True)
    assert opened.inflight == {} and not inflight.exists()
    opened.close()


def test_names_from_a_server_are_not_used():
    entry = {
        "outputs": {
            "1": {"images": [{"filename": "../../x.exe", "subfolder": "..", "type": "output"}, "odd", 3]},
            "2": {"animated": [True], "text": ["a"]},
            "3": {"images": [{"filename": "a.MP4", "type": "output"}, {"filename": "b.png", "type": "temp"}]},
        }
    }
    results = queue_batch.result_files(entry)
    assert [item["filename"] for item in results] == ["a.MP4", "../../x.exe"]
    assert [name for name, _ in queue_batch.local_names("job", results)] == ["job.mp4", "job_2.bin"]


def test_results_are_in_the_order_of_their_nodes():
    for ids in (["17", "7", "17:2"], ["7", "17:2", "17"]):
        outputs = {i: {"images": [{"filename": f"of_{i}.mp4", "type": "output"}]} for i in ids}
        names = queue_batch.local_names("job", queue_batch.result_files({"outputs": outputs}))
        assert [(name, result["filename"]) for name, result in names] == [
            ("job.mp4", "of_7.mp4"),
            ("job_2.mp4", "of_17.mp4"),
            ("job_3.mp4", "of_17:2.mp4"),
        ]


@pytest.mark.parametrize(
    ("last", "images"),
    [
        ("00000003.png", ["00000001.png", "00000002.png", "00000003.png"]),
        ("0002.PNG", ["0001.PNG", "0002.PNG"]),
        ("00000001.png", ["00000001.png"]),
        ("../x.png", []),
        ("00000000.png", []),
        ("9" * 20 + ".png", []),
        ("99999999.png", []),
    ],
)
def test_a_folder_of_images_is_downloaded_whole(last, images):
    saved = {"subfolder": "a/b", "type": "output"}
    items = [{**saved, "filename": "a.mp4"}, {**saved, "filename": last, "in_sequence": True}]
    results = queue_batch.result_files({"outputs": {"1": {"images": items}}})
    assert [item["filename"] for item in results] == ["a.mp4", last], "without --output, the last"
    (first, second), *names = [(name, result["filename"]) for name, result in queue_batch.local_names("job", results)]
    assert (first, second) == ("job.mp4", "a.mp4")
    kept = [f"job_2/0000000{n}.png" for n in range(1, len(images) + 1)]
    assert names == (list(zip(kept, images, strict=True)) or [("job_2.png", last)])


@pytest.mark.parametrize("script", ["queue_batch.py", "quickstart.py"])
def test_a_python_that_does_not_look_beside_the_script_runs_it(script, tmp_path):
    """As that of ComfyUI's portable build for Windows."""
    command = [sys.executable, "-I", str(ROOT / script), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, cwd=tmp_path)
    assert ran.returncode == 0 and "usage:" in ran.stdout, ran.stderr


def test_what_became_of_a_job_is_read_from_the_history():
    def entry(status, *messages):
        return {"status": {"status_str": status, "messages": [list(message) for message in messages]}}

    start, end = ("execution_start", {"timestamp": 1000}), ("execution_success", {"timestamp": 3500})
    assert queue_batch.failure(entry("success", start, end)) is None
    assert queue_batch.failure({}) == queue_batch.failure(entry(None)) == "failed on the server, which gave no reason"
    assert queue_batch.failure({"status": {"status_str": "error", "messages": None}})
    assert queue_batch.seconds_taken(entry("success", start, end), 0.0) == 2.5
    assert queue_batch.seconds_taken({}, 0.0) == 0 and queue_batch.seconds_taken({}, time.monotonic() - 9) >= 9
    assert queue_batch.failure(entry("error", start, ("execution_interrupted", {}))) == "interrupted on the server"
    assert queue_batch.failure(entry("error", start)) == "failed on the server, which gave no reason"
    saved = {"filename": "a.png", "subfolder": "", "type": "output"}
    preview = {"filename": "b.mp4", "subfolder": "", "type": "temp"}
    outputs = {"outputs": {"1": {"images": [preview]}, "2": {"images": [saved]}}}
    assert queue_batch.result_files(outputs) == [saved]
    assert queue_batch.result_files({"outputs": {"1": {"images": [preview]}}}) == [preview]


def test_a_refusal_says_the_servers_reason():
    assert queue_batch.refusal(413, None) == "the server refused the graph: HTTP 413"
    assert queue_batch.refusal(400, {"error": {"message": "no outputs"}}) == "no outputs"
    assert queue_batch.refusal(400, {"error": "plain"}) == "plain" and queue_batch.refusal(400, {}) == "HTTP 400"


def test_addresses():
    assert queue_batch.server_address("127.0.0.1:8188") == ("http://127.0.0.1:8188", {})
    assert queue_batch.server_address("https://host/comfy/") == ("https://host/comfy", {})
    login = {"Authorization": "Basic bWU6cEBzcw=="}  # me:p@ss
    assert queue_batch.server_address("http://me:p%40ss@host/a@b/") == ("http://host/a@b", login)
    for wrong in ("ftp://host", "http://", "host name", "http://a..b", "http://host:99999", "http://:80"):
        with pytest.raises(batch_jobs.BatchError, match="--server"):
            queue_batch.server_address(wrong)
    for wrong in ("ftp://me:secret@host", "http://me:sec/ret@host", "me:secret@host name", "http://m%3Ae:secret@host"):
        with pytest.raises(batch_jobs.BatchError, match="--server '...@host") as caught:
            queue_batch.server_address(wrong)
        assert "sec" not in str(caught.value)
