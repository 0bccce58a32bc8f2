"""The drawings inside nodes and the help pages, in Chinese: ComfyUI's language is changed while the graph is open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
# What the drawings are to say, beside the code: a source of this pack can be read in any encoding of Windows.
WORDS = json.loads((ROOT / "tests" / "data" / "chinese.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(frontend):
    """The demo in Chinese, with a prompt schedule and a window of its own."""
    frontend.errors.clear()
    page = frontend.page
    frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    page.evaluate(
        """() => {
            const add = (type, x, y) => {
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                node.pos = [x, y];
                return node;
            };
            add("DiagonalPromptSchedule", -420, 400);
            const causal = add("DiagonalCausalAttention", -420, 40);
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            find("DiagonalDemoLoader").connect(0, causal, 0);
            causal.connect(0, find("DiagonalChunkSampler"), 0);
        }"""
    )
    # A saved graph holds on to the names it was saved with.
    saved = json.dumps(page.evaluate("() => app.graph.serialize()"))
    graph = json.loads(saved.replace('"localized_name"', '"english_name"'))
    frontend.load(graph)
    wait_words(page, ".diagonal-memory .text-line", "Needs ")
    try:
        speak(page, "zh")
        page.wait_for_timeout(1000)  # within half of it the nodes take over what the former ones showed
        wait_words(page, ".diagonal-prompt .line", WORDS["no_run"])
        frontend.load(graph)
        wait_words(page, ".diagonal-memory .text-line", WORDS["memory"])
        yield page
    finally:
        speak(page, "en")
        wait_words(page, ".diagonal-memory .words", "Needs ")


def speak(page, language: str) -> None:
    """Switches ComfyUI's language, and waits until it has opened the graph again, which it does by itself and late."""
    page.evaluate("() => { for (const node of app.graph.nodes) node.seenBefore = true; }")
    page.evaluate("(language) => app.extensionManager.setting.set('Comfy.Locale', language)", language)
    page.wait_for_function("() => app.graph.nodes.length && app.graph.nodes.every((node) => !node.seenBefore)")


def wait_words(page, selector: str, words: str) -> None:
    page.wait_for_function(
        "([selector, words]) => [...document.querySelectorAll(selector)].some((e) => e.textContent.includes(words))",
        arg=[selector, words],
        timeout=60_000,
    )


def test_the_drawings_speak_chinese(page, frontend):
    wait_words(page, ".diagonal-memory .detail", WORDS["window"])
    wait_words(page, ".diagonal-schedule .info", WORDS["forwards"])
    label = page.locator(".diagonal-schedule [data-chunk='6']").get_attribute("aria-label")
    assert label == WORDS["later_chunks"]
    wait_words(page, ".diagonal-preview .line", WORDS["nothing_yet"])
    wait_words(page, ".diagonal-prompt .line", WORDS["no_run"])
    assert page.locator(".diagonal-prompt button").inner_text() == WORDS["send"]
    ARTIFACTS.mkdir(exist_ok=True)
    page.evaluate("() => { app.canvas.ds.scale = 0.75; app.canvas.ds.offset = [560, 100]; }")
    page.wait_for_timeout(1000)
    page.screenshot(path=ARTIFACTS / "chinese.png")
    assert frontend.errors == []


def test_warnings_and_what_cannot_be_known_are_chinese(page, frontend):
    frontend.set_widget("DiagonalSchedule", "steps", "1")
    wait_words(page, ".diagonal-schedule .warning", WORDS["noise"])
    frontend.set_widget("DiagonalCausalAttention", "window", -1)
    for name in ("width", "height"):
        frontend.set_widget("EmptyARVideoLatent", name, 16384)  # too large for any machine
    wait_words(page, ".diagonal-memory.red .text-line", WORDS["fits"])
    page.screenshot(path=ARTIFACTS / "chinese_red.png")
    page.evaluate(
        """() => {
            const sampler = app.graph.nodes.find((node) => node.type === "DiagonalChunkSampler");
            sampler.disconnectInput(sampler.inputs.findIndex((input) => input.name === "latent_image"));
        }"""
    )
    # The input by the name that the node shows.
    wait_words(page, ".diagonal-memory .detail", WORDS["connect"])
    wait_words(page, ".diagonal-memory .detail", WORDS["no_sampler"])
    assert frontend.errors == []


def test_the_help_panel_shows_the_chinese_page(page, frontend):
    frontend.open_help("DiagonalStreamVideo", WORDS["node_info"])
    wait_words(page, ".node-help-content h2, .node-help-content h1", WORDS["heading"])
    page.wait_for_function(
        """() => [...document.images].some((image) =>
            image.src.endsWith("/docs/images/DiagonalStreamVideo.webp") && image.naturalWidth > 100)""",
        timeout=20_000,
    )
    assert "**" not in page.locator(".node-help-content").first.inner_text(), "emphasis that was not understood"
    page.screenshot(path=ARTIFACTS / "chinese_help.png")
    assert frontend.errors == []


def test_a_run_is_shown_in_chinese(page, frontend):
    frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    page.evaluate("() => app.queuePrompt(0, 1)")
    wait_words(page, ".diagonal-preview .line", WORDS["took"])
    line = page.locator(".diagonal-preview .line").inner_text()
    names = page.evaluate(
        """() => app.graph.nodes.find((node) => node.type === "DiagonalChunkSampler").inputs
            .map((input) => input.label || input.localized_name)"""
    )
    assert set(WORDS["inputs"]) <= set(names), "a template does not hold on to English names"
    assert line.startswith(WORDS["chunk"]) and WORDS["a_second"] in line
    assert page.locator(".diagonal-preview .bar").last.get_attribute("title") == WORDS["bar"]
    assert frontend.errors == []
