"""A server killed in mid-run and started again; two clients of one server."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import comfy_host
import fault_rows
import numpy as np
from PIL import Image

FRAMES = 160
PROMPTS = ("a red circle moves right", "a blue square moves up", "a green triangle moves left")
PATIENCE_S = 300.0


def graph(prefix: str, *, seed: int, prompt: str = PROMPTS[0], seconds: float = 1.0, restart: bool = True, **widgets):
    """A stream of images; with `restart` ComfyUI runs it again each time that it is queued."""
    schedule = {"preset": "diagonal 4-3-2", "steps": "", "context_mode": "from preset", "context_sigma": 0.357}
    video = {"width": 64, "height": 64, "length": seconds, "fps": 16.0, "cfg": 1.0, "format": "png", "crf": 20.0}
    return {
        "loader": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "student"}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["loader", 1]}},
        "schedule": {
            "class_type": "DiagonalSchedule",
            "inputs": {**schedule, "shift": 0.0, "frames_per_chunk": 0, "sigmas": ""},
        },
        "stream": {
            "class_type": "DiagonalStreamVideo",
            "inputs": {
                **video,
                "model": ["loader", 0],
                "positive": ["text", 0],
                "negative": ["text", 0],
                "vae": ["loader", 2],
                "schedule": ["schedule", 0],
                "seed": seed,
                "filename_prefix": prefix,
                "state_every": 2,
                "restart": restart,
                "keep_state": False,
                **widgets,
            },
        },
    }


def pixels(folder: Path) -> np.ndarray:
    """[T, H, W, 3] of a folder of images."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def result(server, entry: dict) -> np.ndarray:
    """The images that a finished prompt made."""
    (last,) = entry["outputs"]["stream"]["images"]
    return pixels(server.output_dir / last["subfolder"])


class Restarting:
    """A server on one port and with one folder that can be killed and started again."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.comfyui, self.base, self.port = comfyui, base, comfy_host.free_port()
        self.start()

    def start(self) -> None:
        self.server = comfy_host.ComfyServer(self.comfyui, self.base, port=self.port)
        self.server.wait_ready()

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()


def test_row_server_restart(comfyui_dir: Path, tmp_path: Path):
    restarting = Restarting(comfyui_dir, tmp_path / "base")
    output = restarting.server.output_dir
    long = dict(seed=5, seconds=FRAMES / 16, restart=False)
    sound = result(restarting.server, whole(restarting.server, graph("sound", **long)))
    assert len(sound) == FRAMES

    def check(number: int) -> None:
        prefix = f"killed{number}"
        at = fault_rows.generator("server_restart", number).randrange(20, FRAMES - 20)
        folder = output / f"{prefix}_00001_"
        restarting.server.queue(graph(prefix, **long))
        give_up = time.monotonic() + PATIENCE_S
        while len(list(folder.glob("*.png"))) < at and time.monotonic() < give_up:
            time.sleep(0.005)
        restarting.kill()
        restarting.start()
        before = len(list(folder.glob("0*.png")))
        assert before >= at
        entry = whole(restarting.server, graph(prefix, **long))
        assert "Resumed" in entry["outputs"]["stream"]["text"][0] or before >= FRAMES, entry["outputs"]["stream"]
        assert np.array_equal(result(restarting.server, entry), sound), f"killed at {before}: another video"
        left = [path.name for path in output.glob(f"{prefix}_*") if path != folder]
        assert not left, f"killed at {before}: {left} were left"

    try:
        fault_rows.run_cases("server_restart", check)
    finally:
        restarting.server.stop()


def whole(server, wanted: dict) -> dict:
    """Run a graph and return its history entry."""
    entry = server.wait(server.queue(wanted), PATIENCE_S)
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def test_row_two_clients(comfy_server):
    alone: dict[tuple[int, str, float], np.ndarray] = {}

    def expected(wanted: tuple[int, str, float]) -> np.ndarray:
        if wanted not in alone:
            seed, prompt, seconds = wanted
            entry = whole(comfy_server, graph("alone/v", seed=seed, prompt=prompt, seconds=seconds))
            alone[wanted] = result(comfy_server, entry)
        return alone[wanted]

    def check(number: int) -> None:
        rng = fault_rows.generator("two_clients", number)
        wanted = [(rng.randrange(3), rng.choice(PROMPTS), rng.choice((0.5, 1.0))) for _ in range(4)]
        references = [expected(one) for one in wanted]
        cancelled = rng.choice((None, 0, 1, 2, 3))
        clients = (uuid.uuid4().hex, uuid.uuid4().hex)
        ids: dict[int, str] = {}

        def send(client: int) -> None:
            for index in (client, client + 2):
                seed, prompt, seconds = wanted[index]
                prefix = f"pair{number}/client{client}"
                # A video to be cancelled is long, so that it is still running then.
                asked = graph(prefix, seed=seed, prompt=prompt, seconds=60.0 if index == cancelled else seconds)
                ids[index] = comfy_server.queue(asked, client_id=clients[client])

        threads = [threading.Thread(target=send, args=(client,)) for client in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if cancelled is not None:
            cancel(ids[cancelled], wait=rng.random() < 0.7)
        for index, reference in enumerate(references):
            if index == cancelled:
                continue
            entry = comfy_server.wait(ids[index], PATIENCE_S)
            assert entry["status"]["status_str"] == "success", f"prompt {index} of client {index % 2}"
            assert np.array_equal(result(comfy_server, entry), reference), f"prompt {index} is not as it is alone"
        if cancelled is not None:
            history = comfy_server.get(f"/history/{ids[cancelled]}")
            done = [entry["status"]["status_str"] for entry in history.values()]
            assert done in ([], ["error"]), f"the cancelled one ended as {done}"

    def cancel(prompt_id: str, *, wait: bool) -> None:
        """As a person does: a running prompt is interrupted, a waiting one taken off the queue, until it is gone.

        ComfyUI forgets an interrupt that comes between taking a prompt off its queue and starting it.
        """
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            queue = comfy_server.get("/queue")
            running, pending = ([item[1] for item in queue[f"queue_{name}"]] for name in ("running", "pending"))
            if prompt_id in running:
                post("/interrupt", {"prompt_id": prompt_id})
            elif prompt_id in pending and not wait:
                post("/queue", {"delete": [prompt_id]})
            elif prompt_id not in pending:
                return
            time.sleep(0.02)
        raise AssertionError("the prompt that was cancelled did not go")

    def post(path: str, body: dict) -> None:
        request = urllib.request.Request(
            comfy_server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30):
            pass

    fault_rows.run_cases("two_clients", check)
