"""Every canvas graph in ComfyUI's real frontend, in headless Chromium against the running server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANVAS = sorted((ROOT / "workflows").glob("*.json"))
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_MS = 300_000  # on a machine that is busy with a training run, minutes
SETTLE_MS = 500  # widgets that depend on others are made a moment after the graph is there
# A fresh user of ComfyUI has no files of their own yet; its frontend asks for them and the console says 404.
ABSENT_USER_FILES = re.compile(
    r"/(api/userdata/user\.css|user\.css|api/userdata/comfy\.templates\.json"
    r"|api/userdata\?dir=(workflows|subgraphs)&\S*)$"
)
# It opens a new user's first graph, whose models it looks up on the internet; the server's page policy forbids that.
# No graph of ours names an address (a test sees to it), so such a line is never theirs.
OUTSIDE_LOOKUP = re.compile(r"(Connecting to|Fetch API cannot load|Refused to connect to) '?https://")
# What the frontend says of itself while it starts, before any workflow is loaded.
STARTUP_NOISE = ("ComfyApp graph accessed before initialization",)
MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf")
TITLE_HEIGHT = 30

chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(chromium is None, reason="no Chromium on this machine: browser tests are skipped")


class Frontend:
    """A page with ComfyUI's frontend, and what its console said."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.started = False
        self.errors: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        page.goto(url, wait_until="domcontentloaded", timeout=START_MS)
        page.wait_for_function(
            "() => window.app?.extensionManager && window.app.graph && "
            "'DiagonalChunkSampler' in window.LiteGraph.registered_node_types && "
            "!document.querySelector('#splash-loader')",
            timeout=START_MS,
        )
        page.wait_for_timeout(SETTLE_MS)
        self.started = True

    def _on_console(self, message) -> None:
        if message.type != "error":
            return
        source = message.location.get("url", "")
        if message.text.startswith("Failed to load resource") and ABSENT_USER_FILES.search(source):
            return
        # Release notes and the like come from the internet, which a test machine need not reach.
        if message.text.startswith("Failed to load resource") and not source.startswith(self.url):
            return
        if OUTSIDE_LOOKUP.match(message.text):
            return
        if not self.started and message.text.startswith(STARTUP_NOISE):
            return
        self.errors.append(f"{message.text} ({source})")

    def load(self, workflow: dict) -> None:
        """Open a canvas graph as File > Open does."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow, true, true)", workflow)
        self.page.wait_for_timeout(SETTLE_MS)

    def api_export(self) -> dict:
        """What File > Export (API) writes."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def node_boxes(self) -> list[tuple[str, float, float, float, float]]:
        """(title, left, top, right, bottom) of every node, its title bar included."""
        boxes = self.page.evaluate("() => window.app.graph.nodes.map(n => [n.title, ...n.pos, ...n.size])")
        return [(title, x, y - TITLE_HEIGHT, x + width, y + height) for title, x, y, width, height in boxes]


@pytest.fixture(scope="module")
def frontend(comfy_server, tmp_path_factory) -> Iterator[Frontend]:
    # Without these the frontend greets a new user with a dialogue over the canvas.
    comfy_server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Notification.ShowVersionUpdates": False})
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("chromium")),
            executable_path=chromium,
            headless=True,
            args=CHROMIUM_ARGUMENTS,
            timeout=START_MS,
            viewport={"width": 1600, "height": 900},
        )
        try:
            yield Frontend(context.pages[0] if context.pages else context.new_page(), comfy_server.url)
        finally:
            context.close()


def test_there_are_workflows():
    names = {path.stem for path in CANVAS}
    assert {"demo", "compare", "wan_1_3b_self_forcing", "krea_14b", "causal_any_wan"} <= names
    assert names == {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert names == {path.stem for path in (ROOT / "workflows").glob("*.jpg")}


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
    assert frontend.api_export() == shipped
    assert frontend.errors == []


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_no_node_lies_over_another(frontend, path):
    frontend.load(json.loads(path.read_text(encoding="utf-8")))
    for (a, *box_a), (b, *box_b) in combinations(frontend.node_boxes(), 2):
        apart = box_a[2] <= box_b[0] or box_b[2] <= box_a[0] or box_a[3] <= box_b[1] or box_b[3] <= box_a[1]
        assert apart, f"{a} {box_a} overlaps {b} {box_b}"


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_a_note_names_every_model_file_and_its_folder(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert "://" not in json.dumps(workflow)
    notes = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert notes
    api = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    for node in api.values():
        for value in node["inputs"].values():
            if isinstance(value, str) and value.endswith(MODEL_SUFFIXES):
                line = next((line for line in notes.splitlines() if f"**{value}**" in line), "")
                assert re.match(r"- in `(diffusion_models|text_encoders|vae|vae_approx)/`: ", line), value
