"""Strings that try to be paths, commands or control characters, wherever the pack takes text."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import fault_rows
import node_graphs
import pytest
from fault_rows import ROOT, snapshot

PATIENCE_S = 300.0
BUILT = r"\.(git|pytest_cache|ruff_cache|host|venv)|runs|test-artifacts|__pycache__"
EDITED = r".*\.(py|js|css|html|md|json|toml|txt|yml|yaml|cfg|ini|sh|bat|ps1)|.*~|4913|\..*\.(sw.|new|tmp)"
NOT_THE_SERVERS = re.compile(f"{BUILT}|{EDITED}")
"""Names in the pack's folder that a person, an editor or another test writes, and no node of ours: a server writes
videos, images, latents, states and locks there, or what a command makes."""
PARTS = (
    "..", "../..", "/", "/etc/passwd", "/tmp/escaped", "C:\\windows\\x", "\\\\host\\share\\x", "//host/share/x", "\0",
    "\r\n", "\n", "%00", "%2e%2e%2f", "~", "~/x", "$(touch escaped)", "`touch escaped`", "; touch escaped", "| x", "&",
    "link", "link/x", "folder/link/../../x", "CON", "NUL.txt", "aux", "x" * 300, "é\u0301", "\u202e", "\ud83d\ude00",
    "\ud800",
    "%date:yyyy%", "%width%", "%n", "{0}", "{__class__}", "-i", "--output=/tmp/escaped", "file:///tmp/escaped", "x:y",
    "../" * 40 + "tmp/escaped", "....//", "..\\..\\x", "\x1b[31m", "\x7f", " ", ".", "", "'\"", "<script>",
    "x" * 70_000,
)  # fmt: skip


def hostile(rng: random.Random) -> str:
    return rng.choice(("", "/", "\\", " ", "")).join(rng.choices(PARTS, k=rng.choice((1, 1, 2, 3))))


@pytest.fixture
def watched(comfy_server, tmp_path, tmp_path_factory):
    """`watched(inside)` raises if anything but the folders `inside` has changed since the call before; the first call,
    and one with `begin`, only look.

    Looked at: the pack, but for what other people and programs write there, all of the server's and the test's own
    temporary folders, and the names in the folders above them, the root of the disk, /etc and the home folder.
    """
    base = tmp_path_factory.getbasetemp()
    part = comfy_server.output_dir.parent.parent  # the server's base lies in it, and nothing of another test

    def look(inside: tuple[Path, ...]) -> dict:
        bytecode = (Path(sys.pycache_prefix),) if sys.pycache_prefix else ()
        found = snapshot(ROOT, (ROOT / "docs" / "reliability", *bytecode), skip=NOT_THE_SERVERS)
        found |= snapshot(part, inside) | snapshot(tmp_path, inside)
        for folder in (base, Path("/"), Path("/etc"), Path.home()):
            if folder.is_dir():
                found |= {str(path): "entry" for path in folder.iterdir()}
        found |= {str(path): "entry" for path in Path("/tmp").glob("escaped*") if os.name == "posix"}
        return found

    before: dict = {}

    def check(inside: tuple[Path, ...], *, begin: bool = False) -> None:
        found = look(inside)
        if begin or not before:
            before.clear()
            before.update(found)
        changed = {path for path in before.keys() | found.keys() if before.get(path) != found.get(path)}
        before.clear()
        before.update(found)
        assert not changed, f"changed outside of ComfyUI's folders: {sorted(changed)[:5]}"

    return check


def link_folder(link: Path, target: Path) -> None:
    """Make a link to a folder; on Windows a junction, which needs no rights."""
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def text_inputs(info: dict) -> list[tuple[str, str]]:
    """(node, input) of every input of the pack that takes a text, names of files among them."""
    return [
        (name, key)
        for name, node in sorted(node_graphs.pack_nodes(info).items())
        for key, spec in node_graphs.inputs_of(node).items()
        if spec[0] == "STRING" or key in ("ckpt_name", "lora_name")
    ] + [("CLIPTextEncode", "text")]


def test_row_hostile_inputs(comfy_server, watched):
    base = comfy_server.output_dir.parent
    node_graphs.place_files(base / "models")
    outside = base.parent / "outside"
    outside.mkdir(exist_ok=True)
    (base / "output").mkdir(exist_ok=True)
    for folder in (base / "output", base / "models" / "diffusion_models"):
        if not os.path.lexists(folder / "link"):
            link_folder(folder / "link", outside)
    info = comfy_server.get("/object_info", timeout=60)
    inputs = text_inputs(info)
    assert fault_rows.ROWS["hostile_inputs"].full == 200 * len(inputs), inputs
    own = (base / "output", base / "temp", base / "user", base / "input")

    def files() -> tuple[Path, ...]:
        return (*own, comfy_server.log_path, base / "models")

    def only_ours() -> dict:
        return {path: what for path, what in snapshot(base / "models").items() if path != str(base / "models")}

    models = only_ours()
    watched(files())

    def check(number: int) -> None:
        name, key = inputs[number % len(inputs)]
        text = hostile(fault_rows.generator("hostile_inputs", number))
        if name == "CLIPTextEncode":
            graph = node_graphs.sound_graph(info, "DiagonalChunkSampler")
            graph["positive"]["inputs"][key] = text
        else:
            graph = node_graphs.sound_graph(info, name)
            graph["tested"]["inputs"][key] = text
        status, answer = comfy_server.post("/prompt", {"prompt": graph})
        assert status in (200, 400), f"{name}.{key}={text[:60]!r}: HTTP {status}"
        if status == 200:
            entry = comfy_server.wait(answer["prompt_id"], PATIENCE_S)
            assert entry["status"]["status_str"] in ("success", "error")
        assert not list(outside.iterdir()), f"{name}.{key}={text[:60]!r} wrote through a link"
        if (number + 1) % 20 == 0 or number + 1 == len(fault_rows.wanted_cases("hostile_inputs")):
            watched(files())
            assert only_ours() == models

    fault_rows.run_cases("hostile_inputs", check)
    assert comfy_server.get("/system_stats")


@pytest.mark.parametrize("name", ["x" * 240, "x" * 232, chr(0x4E2D) * 80], ids=["240", "232", "Chinese"])
def test_a_prefix_that_is_too_long_for_a_state_is_refused_at_once(comfy_server, name):
    graph = node_graphs.sound_graph(comfy_server.get("/object_info", timeout=60), "DiagonalStreamVideo")
    graph["tested"]["inputs"]["filename_prefix"] = f"v/{name}"
    status, answer = comfy_server.post("/prompt", {"prompt": graph})
    assert status == 200
    entry = comfy_server.wait(answer["prompt_id"], PATIENCE_S)
    said = json.dumps(entry["status"]["messages"])
    assert "filename_prefix is too long: make its last part" in said and "shorter" in said
    assert not list((comfy_server.output_dir / "v").iterdir())


PICTURE = {
    "1": {"class_type": "PrimitiveString", "inputs": {"value": "x"}, "_meta": {"title": "Prompt"}},
    "2": {"class_type": "PrimitiveInt", "inputs": {"value": 1}, "_meta": {"title": "Seed"}},
    "3": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": ["2", 0]}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "batch/picture"}},
    "5": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}
PARTS_TO_REFUSE = 3  # of a run: its prompts, and two texts of its graph
BATCH = 20  # prompts, names and logs of one run of queue_batch.py


def test_row_hostile_batches(comfy_server, watched, tmp_path):
    """Every run of the program has many cases: prompts of its file, and one each in graph, log and server's names.

    Where it refuses a part, that part is replaced, so that all the others are tried too.
    """
    base = comfy_server.output_dir.parent
    cases = fault_rows.wanted_cases("hostile_batches")
    tally = fault_rows.Tally("hostile_batches")
    own = (base, tmp_path / "out")
    for first in range(cases.start, cases.stop, BATCH):
        numbers = range(first, min(first + BATCH, cases.stop))
        rng = fault_rows.generator("hostile_batches", first)
        texts = {number: hostile(fault_rows.generator("hostile_batches", number)) for number in numbers}
        folder = tmp_path / f"run{first}"
        folder.mkdir()
        graph = json.loads(json.dumps(PICTURE))
        graph["4"]["inputs"]["filename_prefix"] = rng.choice(("batch/picture", hostile(rng)))
        graph["1"]["_meta"]["title"] = "Prompt"
        graph["5"]["_meta"] = {"title": hostile(rng)}
        (folder / "graph.json").write_text(json.dumps(graph))
        lines = [text.replace("\0", "") for text in texts.values()]
        errors = "surrogatepass" if rng.random() < 0.1 else "replace"
        (folder / "prompts.txt").write_bytes("\n".join(["plain", *lines]).encode("utf-8", errors))
        out = tmp_path / "out" / f"run{first}"
        out.mkdir(parents=True)
        (out / "batch.jsonl").write_text(rng.choice(("", '{"prompt": "../x", "seed": "/etc"}\n', '{"half": ')))
        watched(own, begin=True)

        def replace(said: str, folder=folder, graph=graph, lines=lines) -> None:
            """Replace the part that was refused."""
            if "--prompts: prompts.txt is not UTF-8 text" in said:
                (folder / "prompts.txt").write_bytes("\n".join(["plain", *lines]).encode("utf-8", "replace"))
            elif "half a character, no text" in said and "in node 4:" in said:
                graph["4"]["inputs"]["filename_prefix"] = "batch/picture"
            elif "half a character, no text" in said and "in node 5:" in said:
                graph["5"]["_meta"]["title"] = "plain"
            else:
                raise AssertionError(f"refused for no reason that is known: {said[-500:]}")
            (folder / "graph.json").write_text(json.dumps(graph))

        def run(_number: int, folder=folder, out=out, replace=replace) -> float:
            command = [sys.executable, str(ROOT / "queue_batch.py"), "graph.json", "--prompts", "prompts.txt"]
            command += ["--server", comfy_server.url, "--output", str(out), "--resume", "--patience", "5"]
            began = time.perf_counter()
            for _ in range(PARTS_TO_REFUSE + 1):
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=300, errors="replace"
                )
                assert done.returncode in (0, 1, 2), done.stderr[-500:]
                assert "Traceback" not in done.stderr, done.stderr[-500:]
                assert all(char.isprintable() or char in "\n\r\t" for char in done.stdout + done.stderr), (
                    "control characters"
                )
                if done.returncode != 2:
                    break
                watched(own)
                replace(done.stderr)
                watched(own, begin=True)  # what was replaced is ours
            assert done.returncode != 2, f"refused without what it refuses: {done.stderr[-500:]}"
            found = list(out.rglob("*"))
            assert all(path.parent == out and not path.is_symlink() for path in found), found
            watched(own)
            return (time.perf_counter() - began) / BATCH

        for number in numbers:
            tally.case(number, run if number == first else lambda _number: 0.0)
            if first in tally.failed:
                tally.failed[number] = tally.failed[first]
    tally.keep()
    tally.require_none_failed()
