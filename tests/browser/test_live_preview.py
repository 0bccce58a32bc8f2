"""The chunks of a running clip, played inside the node that makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
FRAMES_OF_A_CHUNK = 3


@pytest.fixture
def page(frontend, nothing_stays):
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    # What the node has shown, noted as it happens: a chunk may be over before a test looks.
    frontend.page.evaluate(
        """() => {
            window.seen = {lines: [], pictures: new Set()};
            const root = document.querySelector(".diagonal-preview");
            new MutationObserver(() => {
                seen.lines.push(root.querySelector(".line").textContent);
                const source = root.querySelector("img").src;
                if (source) seen.pictures.add(source);
            }).observe(root, {subtree: true, childList: true, attributes: true, characterData: true});
        }"""
    )
    return frontend.page


def wait_line(page, words: str) -> str:
    page.wait_for_function(
        "words => document.querySelector('.diagonal-preview .line')?.textContent.includes(words)",
        arg=words,
        timeout=90_000,
    )
    return page.locator(".diagonal-preview .line").inner_text()


def test_chunks_play_while_they_are_made_and_stay_afterwards(page, frontend):
    frontend.set_widget("EmptyARVideoLatent", "length", 81)
    frontend.set_widget("DiagonalChunkSampler", "seed", 81_081)  # of no other test: ComfyUI runs nothing twice
    page.evaluate("() => app.queuePrompt(0, 1)")
    line = wait_line(page, "forwards in")
    assert line.startswith("chunk 7 of 7 · first chunk after ") and "frames/s" in line
    # One picture a latent frame, from the first chunk on; a moving shape makes them differ.
    page.wait_for_function(f"() => seen.pictures.size >= {4 * FRAMES_OF_A_CHUNK}", timeout=30_000)
    lines = page.evaluate("() => seen.lines")
    assert any("chunk 1 of 7" in line and " left" in line for line in lines)
    assert page.locator(".diagonal-preview .bar").count() == 7
    assert page.locator(".diagonal-preview img").evaluate("image => image.naturalWidth") == 64
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalChunkSampler");
            node.setSize([node.size[0], node.size[1] + 150]);
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_function("() => document.querySelector('.diagonal-preview img').clientHeight > 250", timeout=20_000)
    ARTIFACTS.mkdir(exist_ok=True)
    page.evaluate("() => { app.canvas.ds.scale = 0.75; app.canvas.ds.offset = [560, 100]; }")
    page.wait_for_timeout(1000)
    page.screenshot(path=ARTIFACTS / "live_preview.png")
    assert frontend.errors == []


def test_the_node_says_what_the_run_is_warned_of_and_that_cfg_doubles_it(page, frontend):
    frontend.set_widget("DiagonalDemoLoader", "weights", "teacher")  # which was made for 12 steps
    frontend.set_widget("EmptyARVideoLatent", "length", 33)
    frontend.set_widget("DiagonalSchedule", "context_mode", "clean")
    frontend.set_widget("DiagonalChunkSampler", "cfg", 2)
    page.evaluate("() => app.queuePrompt(0, 1)")
    assert "12 forwards, each twice for cfg, in " in wait_line(page, "twice for cfg")
    warnings = page.locator(".diagonal-preview .warning").all_text_contents()
    assert any("steps_per_chunk is set to (4, 3, 2), but the file was trained with (12,)" in line for line in warnings)
    page.evaluate("() => { app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [200, -350]; }")
    page.wait_for_timeout(1000)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "live_warnings.png")
    assert page.locator(".diagonal-preview img").evaluate("image => image.clientHeight") > 60
    frontend.set_widget("DiagonalDemoLoader", "weights", "student")
    frontend.set_widget("DiagonalSchedule", "context_mode", "from preset")
    frontend.set_widget("DiagonalChunkSampler", "cfg", 1)
    page.evaluate("() => app.queuePrompt(0, 1)")
    assert "9 forwards in " in wait_line(page, "forwards in")
    assert page.locator(".diagonal-preview .warning").count() == 0
    assert frontend.errors == []


def test_a_run_plays_in_the_workflow_that_it_was_queued_from(page, comfy_server, frontend):
    """Templates share ids: the same file in two tabs is the plainest case."""
    frontend.set_widget("EmptyARVideoLatent", "length", 1021)
    frontend.set_widget("DiagonalSchedule", "steps", "4,40")  # longer than the test, and few chunks meanwhile
    page.evaluate("() => app.queuePrompt(0, 1)")
    wait_line(page, "chunk 2 of")
    page.evaluate(
        """async () => {
            window.events = 0;
            app.api.addEventListener("diagonal.progress", () => events++);
            await app.loadGraphData(app.graph.serialize(), true, true);
        }"""
    )
    page.wait_for_function("() => events > 0")
    before = page.evaluate("() => events")
    page.wait_for_function("before => events > before + 3", arg=before, timeout=30_000)
    assert page.locator(".diagonal-preview .line").inner_text() == "Chunks play here as they are made."
    assert not page.locator(".diagonal-preview img").is_visible()
    page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    # With all that was made before and meanwhile.
    first = "() => +document.querySelector('.diagonal-preview .bar')?.title.match(/\\d+/)?.[0]"
    wait_line(page, "chunk ")
    page.wait_for_function("() => document.querySelectorAll('.diagonal-preview .bar').length > 1")
    assert page.evaluate(first) == 1
    comfy_server.post("/interrupt", {})
    line = wait_line(page, "cancelled; these frames stay")
    for command in ("NextOpenedWorkflow", "PreviousOpenedWorkflow"):
        page.evaluate("name => app.extensionManager.command.execute('Workspace.' + name)", command)
        wait_line(page, "Chunks play here" if command.startswith("Next") else line)
    assert page.locator(".diagonal-preview img").get_attribute("src").startswith("data:image/jpeg")
    assert page.evaluate(first) == 1
    assert frontend.errors == []


def test_the_finish_button_ends_a_run_early_and_what_it_made_goes_on(page, comfy_server, frontend):
    frontend.set_widget("EmptyARVideoLatent", "length", 1021)
    frontend.set_widget("DiagonalSchedule", "steps", "4,40")  # longer than the test, on any machine
    button = page.locator(".diagonal-preview button")
    assert not button.is_visible()
    page.evaluate(
        """() => {
            window.made = new Promise((done) => app.api.addEventListener("execution_success", done, {once: true}));
            app.queuePrompt(0, 1);
        }"""
    )
    page.wait_for_function("() => seen.pictures.size >= 2", timeout=90_000)
    page.evaluate(
        """() => {
            const [x, y] = app.graph.nodes.find((found) => found.type === "DiagonalChunkSampler").pos;
            app.canvas.ds.scale = 0.9;
            app.canvas.ds.offset = [600 - x, 180 - y]; // away from ComfyUI's panels
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(500)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "live_finish.png")
    assert button.inner_text() == "Finish" and button.is_enabled()
    button.click()
    wait_line(page, "finished early")
    assert any("ends with this chunk" in line for line in page.evaluate("() => seen.lines"))
    page.evaluate("() => window.made")
    assert not button.is_visible() and frontend.errors == []
    # Queued again, the same graph is not answered with the short video.
    page.evaluate("() => { app.queuePrompt(0, 1); }")
    wait_line(page, " left")
    comfy_server.post("/interrupt", {})
    wait_line(page, "cancelled; these frames stay")


def test_a_cancelled_run_leaves_its_frames(page, comfy_server, frontend):
    frontend.set_widget("EmptyARVideoLatent", "length", 1021)
    frontend.set_widget("DiagonalSchedule", "steps", "4,40")
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function("() => seen.pictures.size >= 2", timeout=90_000)
    comfy_server.post("/interrupt", {})
    wait_line(page, "cancelled; these frames stay")
    assert page.locator(".diagonal-preview img").get_attribute("src").startswith("data:image/jpeg")
    line, bars = page.locator(".diagonal-preview .line").inner_text(), page.locator(".diagonal-preview .bar").count()
    frontend.undo_a_move()
    wait_line(page, line)
    assert page.locator(".diagonal-preview .bar").count() == bars
    assert page.locator(".diagonal-preview img").get_attribute("src").startswith("data:image/jpeg")
    # The same file opened anew, with the same ids, is another run's place.
    page.evaluate("async () => app.loadGraphData(app.graph.serialize(), true, true)")
    wait_line(page, "Chunks play here")
    assert frontend.errors == []


def test_another_instance_of_a_subgraph_begins_its_own_preview(page, frontend):
    """Two instances of a subgraph share the node in it; in one run they come one behind the other."""
    found = page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalChunkSampler");
            const picture = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
            const line = () => document.querySelector(".diagonal-preview .line").textContent;
            const shown = [];
            for (const instance of [5, 6])
                for (const chunk of [1, 2]) {
                    const time = { elapsed: 2, sampling: chunk > 1 ? 2 : null };
                    const own = { node: `${instance}:${node.id}`, prompt_id: "P", chunk, chunks: 2, ...time };
                    app.api.dispatchCustomEvent("diagonal.progress",
                        { ...own, step: 1, steps: 1, forwards: chunk, made: chunk, total: 2 });
                    app.api.dispatchCustomEvent("diagonal.chunk",
                        { ...own, first: instance, frames: [picture], fps: 4, pixel_frames: 9 });
                    shown.push([line(), document.querySelectorAll(".diagonal-preview .bar").length]);
                }
            return shown;
        }"""
    )
    assert [bars for _, bars in found] == [1, 2, 1, 2]
    assert [f"first chunk after {first}.0 s" in line for (line, _), first in zip(found, (5, 5, 6, 6), strict=True)] == [
        True
    ] * 4
    assert frontend.errors == []


def tell(page, node: int, prompt_id: str, forwards: int, total: int = 6) -> None:
    """What the server says of a forward and of the chunk that it ends."""
    page.evaluate(
        """([node, prompt_id, forwards, total]) => {
            const time = { elapsed: forwards, sampling: forwards };
            const own = { node: String(node), prompt_id, chunk: forwards / 2, chunks: total / 2, ...time };
            app.api.dispatchCustomEvent("diagonal.progress",
                { ...own, step: 2, steps: 2, forwards, made: forwards, total });
            const picture = `data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==#${prompt_id}`;
            app.api.dispatchCustomEvent("diagonal.chunk",
                { ...own, first: 1, frames: [picture], fps: 4, pixel_frames: 4 });
        }""",
        [node, prompt_id, forwards, total],
    )


def samplers(page) -> list[int]:
    kind = "DiagonalChunkSampler"
    return page.evaluate("kind => app.graph.nodes.filter((node) => node.type === kind).map((node) => node.id)", kind)


def test_what_comes_after_an_early_or_a_whole_end_changes_neither(page, frontend):
    (node,) = samplers(page)
    line = page.locator(".diagonal-preview .line")
    press = "() => document.querySelector('.diagonal-preview button').click()"
    # What answers need not be ComfyUI.
    page.route("**/diagonal/finish", lambda route: route.fulfill(status=502, content_type="text/html", body="<html>"))
    tell(page, node, "whole", 2)
    page.evaluate(press)
    wait_line(page, "The server answered 502.")
    page.unroute("**/diagonal/finish")
    page.route("**/diagonal/finish", lambda route: route.fulfill(json={"nodes": [str(node)]}))
    page.evaluate(press)
    wait_line(page, "ends with this chunk")
    page.unroute("**/diagonal/finish")
    tell(page, node, "whole", 6)  # Finish came too late
    assert "6 forwards in 6.0 s" in line.inner_text() and "ends" not in line.inner_text()
    tell(page, node, "early", 2)
    page.evaluate(
        """(node) => {
            app.api.dispatchCustomEvent("diagonal.finish", { prompt_id: "early", node: String(node) });
            app.api.dispatchCustomEvent("execution_interrupted", { prompt_id: "early", node_id: "of a later node" });
        }""",
        node,
    )
    assert line.inner_text().endswith("finished early")
    frontend.errors.clear()  # the browser's own, of the answer


def test_a_node_that_fails_behind_its_last_forward_says_so_and_what_it_was_warned_of(page, frontend):
    """While its last chunk is decoded, or its file closed; a later node's error is none of its own."""
    (node,) = samplers(page)
    line = page.locator(".diagonal-preview .line")
    tell(page, node, "late", 6)
    send = "([name, data]) => app.api.dispatchCustomEvent(name, { prompt_id: 'late', ...data })"
    page.evaluate(send, ["execution_error", {"node_id": "of a later node"}])
    assert "6 forwards in 6.0 s" in line.inner_text()
    page.evaluate(send, ["diagonal.warnings", {"node": str(node), "warnings": ["No state could be saved."]}])
    assert page.locator(".diagonal-preview .warning").all_inner_texts() == ["No state could be saved."]
    page.evaluate(send, ["execution_interrupted", {"node_id": str(node)}])
    assert line.inner_text().endswith("cancelled; these frames stay")
    assert page.locator(".diagonal-preview .warning").count() == 1
    frontend.errors.clear()  # the frontend's own, of an error without its fields


def test_all_that_a_workflow_showed_comes_back_with_what_was_made_meanwhile(page, frontend):
    """Several samplers, some without a run yet, and two runs in the queue."""
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalChunkSampler");
            for (let i = 0; i < 6; i++) app.graph.add(node.clone());
        }"""
    )
    shown = samplers(page)
    again, *stay, idle = shown
    queued = iter(("one", "two"))
    answer = {"number": 1, "node_errors": {}}
    page.route("**/api/prompt", lambda route: route.fulfill(json={"prompt_id": next(queued), **answer}))
    for _ in range(2):
        page.evaluate("() => app.api.queuePrompt(0, { output: {}, workflow: {} })")
    page.unroute("**/api/prompt")
    for node in (again, *stay):
        tell(page, node, "one", 2)
    page.evaluate("async () => app.loadGraphData(app.graph.serialize(), true, true)")
    for node in (again, *stay, idle):
        tell(page, node, "one" if node in stay else "two", 4)
        tell(page, node, "another page's", 2)  # and this one plays here
    frontend.undo_a_move()
    page.wait_for_timeout(1000)
    page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    live = """node => {
        const { element } = app.graph.getNodeById(node)?.widgets.find((widget) => widget.name === "live") ?? {};
        const words = element?.querySelector(".line").textContent;
        return words?.startsWith("chunk") && [words, element.querySelector("img").src.split("#")[1]];
    }"""
    for node in shown:
        words, run = page.wait_for_function(live, arg=node, timeout=20_000).json_value()
        assert words.startswith("chunk 2 of 3") and run == ("one" if node in stay else "two"), node
    assert frontend.errors == []
