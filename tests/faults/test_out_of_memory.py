"""Out of memory at each point of a run, in a server: ComfyUI's own handling must find everything let go."""

from __future__ import annotations

import json
from pathlib import Path

import comfy_host
import fault_rows
import pytest

POINTS = {"forward": 15, "decode": 6, "save": 6}
KEPT_BYTES = 1 << 20
"""What two runs may differ by: ComfyUI caches outputs of nodes."""

NODE = '''
"""A test's own node: raises torch.OutOfMemoryError at one point of the run that the MODEL is used in."""
import gc, json, sys
import comfy.patcher_extension
import torch

STATE = {"point": None, "seen": {}}


def reached(kind):
    number = STATE["seen"].get(kind, 0)
    STATE["seen"][kind] = number + 1
    if STATE["point"] == (kind, number):
        STATE["point"] = None
        raise torch.OutOfMemoryError("Allocation on device (put in by a test)")


def wrap(owner, name, kind):
    real = getattr(owner, name)

    def replaced(*args, **kwargs):
        reached(kind)
        return real(*args, **kwargs)

    if not hasattr(real, "of_test"):
        replaced.of_test = True
        setattr(owner, name, replaced)


def forward(executor, *args, **kwargs):
    reached("forward")
    return executor(*args, **kwargs)


class FaultPoint:
    INPUT_TYPES = classmethod(lambda cls: {"required": {
        "model": ("MODEL",), "plan": ("STRING", {}), "report": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"
    IS_CHANGED = classmethod(lambda cls, **inputs: float("nan"))

    def run(self, model, plan, report):
        (streaming,) = [m for name, m in sys.modules.items() if name.endswith(".model_patches.streaming")]
        (writer,) = [m for name, m in sys.modules.items() if name.endswith(".model_patches.video_writer")]
        wrap(streaming.StreamDecoder, "submit", "decode")
        wrap(writer.EncodedWriter, "write", "save")
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        with open(report, "w") as out:
            json.dump({"seen": STATE["seen"], "held": sum(held.values())}, out)
        STATE["seen"], STATE["point"] = {}, tuple(json.load(open(plan)))
        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "fault_point", forward)
        return (model,)


NODE_CLASS_MAPPINGS = {"FaultPoint": FaultPoint}
'''


@pytest.fixture
def server(comfyui_dir: Path, tmp_path: Path):
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / "fault_point.py").write_text(NODE)
    server = comfy_host.ComfyServer(comfyui_dir, base)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


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


def test_row_out_of_memory(server, tmp_path):
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
