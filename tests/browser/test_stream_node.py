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


def lose_connection(page) -> None:
    """Until ComfyUI's page has it again."""
    page.evaluate(
        """() => new Promise((done) => {
            app.api.addEventListener("reconnected", done, { once: true });
            app.api.socket.close();
        })"""
    )


def open_stream_graph(frontend):
    """The page, with the workflow stream_to_disk open and no errors so far."""
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "stream_to_disk.json").read_text(encoding="utf-8")))
    return frontend.page


def test_a_stream_is_watched_cancelled_and_resumed(frontend, comfy_server, nothing_stays):
    page = open_stream_graph(frontend)
    warnings: list[str] = []
    page.on("console", lambda message: warnings.append(message.text) if message.type == "warning" else None)
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
    lose_connection(page)
    assert "cancelled" in page.locator(".diagonal-preview .line").inner_text()
    assert [line for line in warnings if "Unhandled message" in line] == []
    assert frontend.errors == []


def test_the_loading_before_the_first_forward_counts_in_no_rate(frontend, nothing_stays):
    """A minute of loading, then forwards of two seconds: of 10, of which 2 are done, 16 seconds are left."""
    page = open_stream_graph(frontend)
    line = page.locator(".diagonal-preview .line")
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalStreamVideo");
            window.tell = (made, sampling) => {
                const own = { node: String(node.id), prompt_id: "loaded", elapsed: 60 + 2 * made, sampling };
                const at = { chunks: 5, chunk: 1, steps: 2, step: 1 };
                app.api.dispatchCustomEvent("diagonal.progress", { ...own, ...at, total: 10, forwards: made, made });
                const shown = { first: 61, pixel_frames: 12, fps: 4, frames: [] };
                app.api.dispatchCustomEvent("diagonal.chunk", { ...own, ...shown });
            };
            tell(1, null);
        }"""
    )
    assert line.inner_text() == "chunk 1 of 5 · first chunk after 1:01 min"
    page.evaluate("() => tell(2, 4)")
    assert line.inner_text().endswith("3.0 frames/s · 16 s left")
    page.evaluate("() => tell(10, 20)")
    assert line.inner_text().endswith("10 forwards in 1:20 min"), "the closing line has the loading, too"
    assert frontend.errors == []


def test_a_resumed_run_is_timed_by_its_own_forwards(frontend, nothing_stays):
    """The server says how many of the forwards this run made: of those before it no time is known."""
    page = open_stream_graph(frontend)
    line = page.locator(".diagonal-preview .line")
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalStreamVideo");
            window.tell = (made, place = node.id) => app.api.dispatchCustomEvent("diagonal.progress", {
                node: String(place), prompt_id: "resumed", chunks: 9000, total: 20000, steps: 2, step: 1,
                chunk: 4000 + made, forwards: 10000 + made, made, elapsed: made / 100,
                sampling: made > 1 ? made / 100 : null,
            });
            for (let made = 1; made <= 100; made++) tell(made);
        }"""
    )
    assert line.inner_text() == "chunk 4100 of 9000 · 1:39 min left"
    assert page.locator(".diagonal-preview .bar").count() == 32, "the newest chunks alone"
    lose_connection(page)
    assert line.inner_text() == "chunk 4100 of 9000 · The connection was lost."
    page.evaluate("() => tell(101)")
    assert line.inner_text() == "chunk 4101 of 9000 · 1:39 min left"
    # ComfyUI's undo tells nodes inside a subgraph nothing.
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalStreamVideo");
            const { node: outer, subgraph } = app.graph.convertToSubgraph(new Set([node]));
            app.canvas.setGraph(subgraph);
            app.canvas.emitBeforeChange();
            app.canvas.emitAfterChange(); // older frontends would undo this together with the move
            tell(102, `${outer.id}:${subgraph.nodes[0].id}`);
        }"""
    )
    frontend.undo_a_move()
    page.wait_for_function(
        """() => {
            const [subgraph] = app.graph.subgraphs.values(); // undo leaves it open, or shows the whole graph
            const live = subgraph?.nodes[0]?.widgets?.find((widget) => widget.name === "live");
            return live?.element.querySelector(".line").textContent.startsWith("chunk 4102");
        }"""
    )
    assert frontend.errors == []
