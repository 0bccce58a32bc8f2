"""The field in the Diagonal Prompt Schedule node that steers the run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
RED, BLUE = "a red circle moves right", "a blue circle moves right"


@pytest.fixture
def page(frontend, nothing_stays):
    """The demo with a prompt schedule in the place of its positive prompt."""
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    frontend.page.evaluate(
        """(text) => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const node = LiteGraph.createNode("DiagonalPromptSchedule");
            app.graph.add(node);
            node.pos = [-420, 40];
            node.widgets.find((widget) => widget.name === "text").value = text;
            find("DiagonalDemoLoader").connect(1, node, node.inputs.findIndex((input) => input.name === "clip"));
            const sampler = find("DiagonalChunkSampler");
            node.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "positive"));
            const set = (type, name, value) => {
                find(type).widgets.find((widget) => widget.name === name).value = value;
            };
            set("EmptyARVideoLatent", "length", 1021); // with so many steps it takes longer than the test
            set("DiagonalSchedule", "steps", "4,40");
            app.canvas.ds.scale = 0.9;
            app.canvas.ds.offset = [540, 120];
        }""",
        f"0: {RED}",
    )
    frontend.page.wait_for_selector(".diagonal-prompt .line", state="attached")
    frontend.page.evaluate(
        """() => {
            window.lines = [];
            const line = document.querySelector(".diagonal-prompt .line");
            new MutationObserver(() => lines.push(line.textContent)).observe(line, {childList: true});
        }"""
    )
    return frontend.page


def wait_line(page, words: str) -> None:
    page.wait_for_function("words => lines.some((line) => line.includes(words))", arg=words, timeout=180_000)


def tell(page, **data) -> None:
    """An event of a run, as the server sends it."""
    page.evaluate(
        """(data) => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalPromptSchedule");
            app.api.dispatchCustomEvent("diagonal.prompt", { nodes: [String(node.id)], ...data });
        }""",
        {"chunk": 2, "chunks": 9, "text": RED, **data},
    )


def test_the_end_of_a_run_is_said_where_a_refusal_stood(page, frontend):
    tell(page, prompt_id="P", running=True)
    page.route("**/diagonal/prompt", lambda route: route.fulfill(status=422, json={"error": "No such words."}))
    page.locator(".diagonal-prompt textarea").fill("a purple dog")
    page.locator(".diagonal-prompt button").click()
    wait_line(page, "No such words.")
    tell(page, prompt_id="P", running=True)
    line = page.locator(".diagonal-prompt .line")
    assert line.inner_text() == "No such words."
    tell(page, prompt_id="P", running=False)
    assert line.inner_text() == "The run has ended." and "error" not in line.get_attribute("class")
    # What answers need not be ComfyUI.
    page.unroute("**/diagonal/prompt")
    page.route("**/diagonal/prompt", lambda route: route.fulfill(status=502, content_type="text/html", body="<html>"))
    tell(page, prompt_id="P", running=True)
    page.locator(".diagonal-prompt button").click()
    wait_line(page, "The server answered 502.")
    page.unroute("**/diagonal/prompt")
    assert [line for line in frontend.errors if "/diagonal/prompt" not in line] == []


def test_a_refusal_that_comes_late_is_said_and_gives_the_text_back(page, frontend):
    tell(page, prompt_id="P", running=True)
    page.route("**/diagonal/prompt", lambda route: route.fulfill(status=202, json={"text": BLUE, "message": "later"}))
    field, line = page.locator(".diagonal-prompt textarea"), page.locator(".diagonal-prompt .line")
    field.fill(BLUE)
    page.locator(".diagonal-prompt button").click()
    wait_line(page, "has not read the prompt yet")
    assert field.input_value() == ""
    tell(page, prompt_id="P", running=True, refused="No such words.", text=BLUE)
    assert line.inner_text() == "No such words." and field.input_value() == BLUE
    page.unroute("**/diagonal/prompt")
    assert frontend.errors == []


def test_comfyuis_own_shortcuts_work_in_the_field_and_a_linked_switch_is_left_to_the_run(page, frontend):
    sent = []

    def answer(route):
        sent.append(route.request.post_data_json)
        route.fulfill(json={"text": BLUE, "chunk": 3, "switch": "keep"})

    tell(page, prompt_id="P", running=True)
    page.route("**/diagonal/prompt", answer)
    page.evaluate(
        """() => {
            window.heard = [];
            window.addEventListener("keydown", (event) => heard.push(event.key), true);
            window.addEventListener("keydown", (event) => heard.push(`through ${event.key}`));
            const node = app.graph.nodes.find((found) => found.type === "DiagonalPromptSchedule");
            const primitive = LiteGraph.createNode("PrimitiveNode");
            app.graph.add(primitive);
            primitive.connect(0, node, node.inputs.findIndex((input) => input.widget?.name === "switch"));
        }"""
    )
    field = page.locator(".diagonal-prompt textarea")
    field.fill(BLUE)
    field.press("Control+Alt+Enter")
    field.press("a")
    assert sent == [] and page.evaluate("() => heard.includes('through Enter') && !heard.includes('through a')")
    field.press("Control+Enter")
    wait_line(page, "(keep): ")
    page.unroute("**/diagonal/prompt")
    (body,) = sent
    assert "switch" not in body and body["blend_chunks"] == 4
    assert frontend.errors == []


def test_a_loops_copy_that_its_cache_answers_for_is_steered_under_its_own_id(page, frontend):
    """ComfyUI said in an earlier run what shows it, and says nothing of it in this one."""
    sent = []

    def answer(route):
        sent.append(route.request.post_data_json)
        route.fulfill(json={"text": BLUE, "chunk": 3, "switch": "keep"})

    copies = page.evaluate(
        """() => {
            const node = app.graph.nodes.find((found) => found.type === "DiagonalPromptSchedule");
            const copies = ["90.0.0.copy", `90.0.0.${node.id}`];
            const say = (...states) => app.api.dispatchCustomEvent("progress_state", { prompt_id: "P",
                nodes: Object.fromEntries(states.map(([id, shown]) => [id, { node_id: id, display_node_id: shown,
                    real_node_id: id, parent_node_id: null, prompt_id: "P", state: "finished", value: 1, max: 1 }])) });
            say([copies[0], String(node.id)], [copies[1], "90"]);
            say(["90", "90"]);
            return copies;
        }"""
    )
    page.route("**/diagonal/prompt", answer)
    page.locator(".diagonal-prompt textarea").fill(BLUE)
    tell(page, nodes=copies[1:], prompt_id="P", running=True)
    assert page.locator(".diagonal-prompt button").is_disabled(), "another node shows it"
    tell(page, nodes=copies, prompt_id="P", running=True)
    page.locator(".diagonal-prompt textarea").press("Control+Enter")
    wait_line(page, "(keep): ")
    page.unroute("**/diagonal/prompt")
    assert [body["node"] for body in sent] == copies[:1]
    assert frontend.errors == []


def test_a_run_of_another_workflow_is_steered_from_there_alone(page, frontend):
    """And from there still when a person comes back, with the text that they had begun."""
    page.route("**/api/prompt", lambda route: route.fulfill(json={"prompt_id": "P", "number": 1, "node_errors": {}}))
    page.evaluate("() => app.api.queuePrompt(0, { output: {}, workflow: {} })")
    page.unroute("**/api/prompt")
    tell(page, prompt_id="P", running=True)
    line, button = page.locator(".diagonal-prompt .line"), page.locator(".diagonal-prompt button")
    assert line.inner_text().startswith("Chunk 2 of 9")
    field = page.locator(".diagonal-prompt textarea")
    field.fill("half a prompt")
    page.evaluate("async () => app.loadGraphData(app.graph.serialize(), true, true)")
    page.wait_for_function("() => !document.querySelector('.diagonal-prompt textarea').value")
    field.fill(BLUE)
    tell(page, prompt_id="P", running=True, chunk=3)
    assert button.is_disabled() and line.inner_text().startswith("While a run goes on")
    tell(page, prompt_id="of another page", running=True)
    assert button.is_enabled() and line.inner_text().startswith("Chunk 2 of 9")
    begins = "words => document.querySelector('.diagonal-prompt .line')?.textContent.startsWith(words)"
    for command, words, text in (
        ("Previous", "Chunk 3 of 9", "half a prompt"),
        ("Next", "Chunk 2 of 9", BLUE),
        ("Previous", "No such words.", "half a prompt"),
    ):
        if words.startswith("No"):  # for a prompt of that run, said late
            tell(page, prompt_id="P", running=True, refused=words)
        page.evaluate("name => app.extensionManager.command.execute(`Workspace.${name}OpenedWorkflow`)", command)
        page.wait_for_function(begins, arg=words)
        assert field.input_value() == text and button.is_enabled()
    # What is emptied stays so.
    field.fill("")
    page.wait_for_timeout(1200)
    assert field.input_value() == ""
    assert frontend.errors == []


def test_a_prompt_is_sent_while_the_run_goes_on(page, comfy_server, frontend):
    field, button = page.locator(".diagonal-prompt textarea"), page.locator(".diagonal-prompt button")
    field.fill("a purple dog")
    assert button.is_disabled()
    page.evaluate("() => app.queuePrompt(0, 1)")
    wait_line(page, "Chunk 2 of 86")
    button.click()
    wait_line(page, "words the demo model does not know")
    # The reason stays while chunks are made, until the person goes on.
    page.evaluate("() => { window.told = 0; app.api.addEventListener('diagonal.prompt', () => told++); }")
    page.wait_for_function("() => told >= 2", timeout=180_000)
    line = page.locator(".diagonal-prompt .line.error")
    assert "words the demo model does not know" in line.inner_text()
    assert line.evaluate("line => getComputedStyle(line).overflowY") == "auto", "all of it can be read"
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "live_prompt_refused.png")
    field.fill(BLUE)
    assert line.count() == 0
    frontend.undo_a_move()
    assert field.input_value() == BLUE, "a text half typed stays"
    assert button.is_enabled()
    field.press("Control+Enter")
    wait_line(page, "(recache): " + BLUE)
    assert field.input_value() == ""
    wait_line(page, f": {BLUE}")
    page.wait_for_timeout(1500)
    page.screenshot(path=ARTIFACTS / "live_prompt.png")
    comfy_server.post("/interrupt", {})
    wait_line(page, "The run has ended")
    field.fill(BLUE)
    assert button.is_disabled()
    saved = page.evaluate("() => app.graph.serialize().nodes.find((n) => n.type === 'DiagonalPromptSchedule')")
    assert saved["widgets_values"] == [f"0: {RED}", "recache", 4, 16]
    # A refused prompt is an answer, not an error of the page; the browser notes its status all the same.
    assert [line for line in frontend.errors if "/diagonal/prompt" not in line] == []
