"""Out of memory at each point of a run, in a server: ComfyUI's own handling must find everything let go."""

from __future__ import annotations

import json
from pathlib import Path

import fault_rows
import pytest

POINTS = {"forward": 15, "decode": 6, "save": 6}
KEPT_BYTES = 4 << 20
"""What may be held more than at first, however many cases ran. One run's KV cache and frames are 3 MB: a second leak
would show."""


def graph(report: Path, prefix: str, kind: str, number: int) -> dict:
    """Six chunks, diagonal 4-3-2, to the disk. The point is in a file: a graph that changes would not be resumed."""
    plan = report.with_name("plan.json")
    plan.write_text(json.dumps([kind, number]))
    video = {"width": 64, "height": 64, "length": 4.3125, "fps": 16.0, "seed": 3, "cfg": 1.0, "format": "mp4"}
    schedule = {"preset": "diagonal 4-3-2", "steps": "", "context_mode": "from preset", "context_sigma": 0.357}
    return {
        "loader": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "student"}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle moves right", "clip": ["loader", 1]}},
        "schedule": {
            "class_type": "DiagonalSchedule",
            "inputs": {**schedule, "shift": 0.0, "frames_per_chunk": 0, "sigmas": ""},
        },
        "fault": {
            "class_type": "FaultPoint",
            "inputs": {"model": ["loader", 0], "plan": str(plan), "report": str(report)},
        },
        "stream": {
            "class_type": "DiagonalStreamVideo",
            "inputs": {
                **video,
                "model": ["fault", 0],
                "positive": ["text", 0],
                "negative": ["text", 0],
                "vae": ["loader", 2],
                "schedule": ["schedule", 0],
                "filename_prefix": prefix,
                "crf": 20.0,
                "state_every": 1,
                "restart": False,
                "keep_state": False,
            },
        },
    }


def test_row_out_of_memory(comfy_server, tmp_path):
    server = comfy_server
    report = tmp_path / "report.json"
    av = pytest.importorskip("av")

    def pixels(prefix: str) -> list[bytes]:
        with av.open(str(server.output_dir / f"{prefix}_00001_.mp4")) as container:
            return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]

    for prefix in ("first", "sound"):  # the first run also fills ComfyUI's caches
        server.run(graph(report, prefix, "none", -1))
    sound = pixels("sound")
    assert len(sound) == 69 and sound == pixels("first")
    before = json.loads(report.read_text())
    assert before["seen"] == POINTS
    points = [(kind, number) for kind, count in POINTS.items() for number in range(count)]
    points = [points[number * 10 % len(points)] for number in range(len(points))]  # a few are spread over all kinds

    def check(number: int) -> None:
        kind, at = points[number]
        prefix = f"oom{number}"
        log = server.log_path.stat().st_size
        entry = server.wait(server.queue(graph(report, prefix, kind, at)))
        assert entry["status"]["status_str"] == "error", f"{kind} {at}: no error"
        (error,) = [data for name, data in entry["status"]["messages"] if name == "execution_error"]
        assert error["node_id"] == "stream" and "OutOfMemoryError" in error["exception_type"], error["exception_type"]
        with server.log_path.open("rb") as lines:
            lines.seek(log)
            said = lines.read().decode(errors="replace")
        assert "unloading all loaded models" in said, f"{kind} {at}: {said[-500:]}"
        server.run(graph(report, prefix, "none", -1))
        held = json.loads(report.read_text())["held"]
        assert held <= before["held"] + KEPT_BYTES, f"{kind} {at}: {held - before['held']} bytes more are held"
        assert pixels(prefix) == sound, f"{kind} {at}: the next run is another"
        assert not list(server.output_dir.glob(f"{prefix}_*.state*")), f"{kind} {at}: a state was left"

    fault_rows.run_cases("out_of_memory", check)
