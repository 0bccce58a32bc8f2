"""The canvas graphs and the drawings in nodes with ComfyUI's Vue nodes, instead of the classic canvas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
CANVAS = sorted((ROOT / "workflows").glob("*.json"))
DRAWINGS = {
    "DiagonalSchedule": [".diagonal-schedule"],
    "DiagonalPromptSchedule": [".diagonal-prompt"],
    "DiagonalModelLoader": [".diagonal-memory"],
    "DiagonalDemoLoader": [".diagonal-memory"],
    "DiagonalChunkSampler": [".diagonal-memory", ".diagonal-preview"],
    "DiagonalStreamVideo": [".diagonal-memory", ".diagonal-preview"],
}


@pytest.fixture(scope="module")
def vue(frontend):
    try:
        frontend.use_vue_nodes(True)
        yield frontend
    finally:
        frontend.use_vue_nodes(False)


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_canvas_graph_loads_with_its_drawings(vue, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    vue.errors.clear()
    vue.load(workflow)
    page = vue.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_function(
        "count => document.querySelectorAll('[data-node-id]').length >= count",
        arg=len(workflow["nodes"]),
        timeout=30_000,
    )
    for node in workflow["nodes"]:
        for drawing in DRAWINGS.get(node["type"], ()):
            inside = page.locator(f"[data-node-id='{node['id']}'] {drawing}")
            inside.wait_for(state="visible", timeout=20_000)
    ARTIFACTS.mkdir(exist_ok=True)
    page.wait_for_timeout(1500)
    page.screenshot(path=ARTIFACTS / f"vue_{path.stem}.png")
    assert vue.errors == []


def test_the_drawing_follows_as_a_person_types(vue):
    vue.errors.clear()
    vue.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    page = vue.page
    page.evaluate("() => { app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [200, 120]; }")
    node = page.evaluate("() => app.graph.nodes.find((node) => node.type === 'DiagonalSchedule').id")
    field = page.locator(f"[data-node-id='{node}'] input:not([role='spinbutton'])").first
    field.wait_for(state="visible", timeout=20_000)
    field.click()
    # Each key in turn, with the field never left.
    for key, counts, forwards in (("5", "5555555", 35), (",", "5555555", 35), ("1", "5111111", 11)):
        page.keyboard.type(key)
        page.wait_for_function(
            """([counts, forwards]) => {
                const shown = [...document.querySelectorAll(".diagonal-schedule .count")].map((t) => t.textContent);
                const info = document.querySelector(".diagonal-schedule .info").textContent;
                return shown.join("") === counts && info.includes(`${forwards} forwards`);
            }""",
            arg=[counts, forwards],
            timeout=20_000,
        )
    assert vue.errors == []


def test_a_run_is_shown_and_a_chunk_is_dragged(vue):
    vue.errors.clear()
    vue.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    page = vue.page
    page.evaluate("() => { app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [200, 120]; }")
    # The drawing of the graph before may still be there, and the canvas moves a frame or two later.
    page.wait_for_function(
        "() => [...document.querySelectorAll('.diagonal-schedule .count')].map((t) => t.textContent).join('') "
        "=== '4322222'",
        timeout=20_000,
    )
    column = page.locator(".diagonal-schedule [data-chunk='2']")
    column.hover(timeout=20_000)
    box = column.bounding_box()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - 60, steps=4)
    page.mouse.up()

    def value() -> str:
        return page.evaluate(
            """() => app.graph.nodes.find((node) => node.type === "DiagonalSchedule")
                .widgets.find((widget) => widget.name === "steps").value"""
        )

    steps = value()
    assert steps.startswith("4,3,") and int(steps.split(",")[2]) > 2
    # Vue keeps the element that it shows while undo makes its node anew: that has to be this node's still.
    vue.undo_a_move()
    column.focus()
    page.keyboard.press("ArrowUp")
    assert value() == f"4,3,{int(steps.split(',')[2]) + 1},2"
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function(
        "() => document.querySelector('.diagonal-preview .line').textContent.includes('forwards in')", timeout=90_000
    )
    page.wait_for_function("() => document.querySelector('.diagonal-preview img').naturalWidth === 64", timeout=20_000)
    page.screenshot(path=ARTIFACTS / "vue_run.png")
    assert vue.errors == []
