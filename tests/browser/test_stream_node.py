"""The Diagonal Stream Video node: watched, cancelled and resumed from the canvas."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
SECONDS = 600  # much longer than the test


def wait_line(page, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('.diagonal-preview .line').textContent.includes(words)",
        arg=words,
        timeout=90_000,
    )


def test_a_stream_is_watched_cancelled_and_resumed(frontend, comfy_server):
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "stream_to_disk.json").read_text(encoding="utf-8")))
    page = frontend.page
    page.evaluate(
        """(seconds) => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalStreamVideo");
            const set = (name, value) => (node.widgets.find((widget) => widget.name === name).value = value);
            set("length", seconds);
            set("state_every", 1);
            set("filename_prefix", "video/canvas");
            app.canvas.ds.scale = 0.7;
            app.canvas.ds.offset = [-700, 120];
            window.texts = [];
            app.api.addEventListener("progress_text", (event) => texts.push(event.detail.text));
        }""",
        SECONDS,
    )
    page.evaluate("() => app.queuePrompt(0, 1)")
    wait_line(page, "chunk 5 of")
    page.wait_for_function("() => document.querySelector('.diagonal-preview img').naturalWidth === 64", timeout=20_000)
    comfy_server.post("/interrupt", {})
    wait_line(page, "cancelled; these frames stay")
    assert page.locator(".diagonal-preview img").get_attribute("src").startswith("data:image/jpeg")
    (video,) = (comfy_server.output_dir / "video").glob("canvas*.mp4")
    kept = video.stat().st_size
    assert kept > 1000, "the file keeps what was made"
    page.screenshot(path=ARTIFACTS / "stream_cancelled.png")

    # The same graph again goes on in the same file, and says so.
    page.evaluate("() => { texts.length = 0; app.queuePrompt(0, 1); }")
    page.wait_for_function("() => texts.some((text) => text.includes('Resumed'))", timeout=90_000)
    page.wait_for_function("() => texts.some((text) => text.includes('can be watched'))", timeout=90_000)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "stream_resumed.png")
    comfy_server.post("/interrupt", {})
    wait_line(page, "cancelled; these frames stay")
    assert list((comfy_server.output_dir / "video").glob("canvas*.mp4")) == [video]
    assert video.stat().st_size > kept
    assert frontend.errors == []


def test_a_resumed_run_is_timed_by_its_own_forwards(frontend):
    """The server says how many of the forwards this run made: of those before it no time is known."""
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "stream_to_disk.json").read_text(encoding="utf-8")))
    line = frontend.page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalStreamVideo");
            const tell = (detail) => app.api.dispatchCustomEvent("diagonal.progress", {
                node: String(node.id), prompt_id: "resumed", chunks: 9000, total: 20000, steps: 2, step: 1, ...detail,
            });
            for (let made = 1; made <= 100; made++)
                tell({ chunk: 4000 + made, forwards: 10000 + made, made, elapsed: made / 100 });
            return document.querySelector(".diagonal-preview .line").textContent;
        }"""
    )
    assert line == "chunk 4100 of 9000 · 1:39 min left"
    assert frontend.page.locator(".diagonal-preview .bar").count() == 32, "the newest chunks alone"
    assert frontend.errors == []
