"""Every canvas graph in ComfyUI's real frontend, in headless Chromium against the running server."""

from __future__ import annotations

import json
import re
import time
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANVAS = sorted((ROOT / "workflows").glob("*.json"))
MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf")


def test_there_are_workflows():
    names = {path.stem for path in CANVAS}
    assert {"demo", "compare", "wan_1_3b_self_forcing", "krea_14b", "causal_any_wan"} <= names
    assert names == {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert names == {path.stem for path in (ROOT / "workflows").glob("*.jpg")}


def test_no_node_keeps_a_title_that_is_only_its_english_name(comfy_server):
    """Such a title would stay English when ComfyUI speaks another language."""
    known = comfy_server.get("/object_info")
    for path in CANVAS:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            assert node.get("title", "") != known.get(node["type"], {}).get("display_name"), (path.stem, node["id"])


def test_the_frontend_starts_without_errors(frontend):
    assert frontend.errors == []


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_canvas_graph_loads_and_exports_the_shipped_api_graph(frontend, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    frontend.errors.clear()
    frontend.load(workflow)
    known = set(frontend.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)"))
    assert {node["type"] for node in workflow["nodes"]} <= known, "missing nodes"
    assert frontend.page.evaluate("() => window.app.graph.nodes.length") == len(workflow["nodes"])
    shipped = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    give_up = time.monotonic() + 20  # widgets that depend on others are made late on a busy machine
    while frontend.api_export() != shipped and time.monotonic() < give_up:
        frontend.page.wait_for_timeout(200)
    assert frontend.api_export() == shipped
    assert frontend.errors == []


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_no_node_lies_over_another(frontend, path):
    frontend.load(json.loads(path.read_text(encoding="utf-8")))
    for (a, *box_a), (b, *box_b) in combinations(frontend.node_boxes(), 2):
        apart = box_a[2] <= box_b[0] or box_b[2] <= box_a[0] or box_a[3] <= box_b[1] or box_b[3] <= box_a[1]
        assert apart, f"{a} {box_a} overlaps {b} {box_b}"


# A template is fitted into three quarters of the page, and the classic canvas draws texts from this scale on.
TEXT_SCALE = 8 / 14
FIRST = {"demo", "stream_to_disk", "endless_prompts"}
LARGE = {"compare", "camera_motion", "drive_by_track", "transfer_motion"}


@pytest.mark.parametrize("path", [path for path in CANVAS if path.stem not in LARGE], ids=lambda path: path.stem)
def test_a_template_is_small_enough_to_be_read_when_it_opens(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    boxes += [tuple(group["bounding"]) for group in workflow["groups"]]
    sizes = (max(box[axis] + box[axis + 2] for box in boxes) - min(box[axis] for box in boxes) for axis in range(2))
    page = (1600, 900) if path.stem in FIRST else (1920, 1080)
    assert min(0.75 * room / size for room, size in zip(page, sizes, strict=True)) >= TEXT_SCALE


def test_a_template_opens_with_its_texts(frontend):
    page = frontend.page
    page.goto(f"{frontend.url}/?template=demo&source=diagonal-distillation", wait_until="domcontentloaded")
    page.wait_for_function("() => window.app?.graph?.nodes?.length > 5", timeout=60_000)
    page.wait_for_function(
        "scale => window.app.canvas.ds.scale >= scale - 1e-4 && window.app.canvas.ds.scale < 0.7", arg=TEXT_SCALE
    )
    frontend.open()


MODEL_ADDRESS = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/resolve/main/(?:[\w.-]+/)*([\w.-]+)")


def _files(path: Path) -> list[str]:
    """The model files that a graph needs."""
    api = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    values = (value for node in api.values() for value in node["inputs"].values())
    return [value for value in values if isinstance(value, str) and value.endswith(MODEL_SUFFIXES)]


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_a_note_names_every_model_file_its_folder_and_its_address(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert "localized_name" not in json.dumps(workflow), "it would keep English names in every language"
    notes = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert notes
    found = {}
    for value in _files(path):
        line = next((line for line in notes.splitlines() if f"**{value}**" in line), "")
        match = re.match(
            r"- in `(diffusion_models|loras|text_encoders|vae|vae_approx)/`: .*\(\[download\]\((.*?)\)\)", line
        )
        assert match, value
        folder, address = match.groups()
        repository, name = MODEL_ADDRESS.fullmatch(address).groups()
        assert name == value
        assert f"from [{repository}](https://huggingface.co/{repository})" in line or "from the same place" in line
        found[value] = {"name": value, "url": address, "directory": folder}
    # ComfyUI offers what is missing by these.
    for node in workflow["nodes"]:
        told = node.get("properties", {}).get("models", [])
        values = node.get("widgets_values") or []
        assert told == [found.pop(value) for value in values if isinstance(value, str) and value in found], node["type"]
    assert not found
    # Addresses are those of model files and of who publishes them; a graph without files has none.
    addresses = re.findall(r"\w+://[^\s)\"]+", json.dumps(workflow))
    assert bool(addresses) == bool(_files(path))
    for address in addresses:
        assert MODEL_ADDRESS.fullmatch(address) or re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+", address)
        assert "/resolve/" not in address or address.endswith(MODEL_SUFFIXES)
