"""The memory line of the loader and the sampler: it follows the graph, and goes red when a run does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from wan_files import LAYOUTS, tiny_wan

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
LINES = ".diagonal-memory"


@pytest.fixture
def page(frontend):
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    # The demo reads its window from its file: this node sets one.
    frontend.page.evaluate(
        """() => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const causal = LiteGraph.createNode("DiagonalCausalAttention");
            app.graph.add(causal);
            causal.pos = [-420, 40];
            find("DiagonalDemoLoader").connect(0, causal, 0);
            causal.connect(0, find("DiagonalChunkSampler"), 0);
            app.canvas.ds.scale = 0.75;
            app.canvas.ds.offset = [560, 100];
        }"""
    )
    return frontend.page


def wait_lines(page, *words: str) -> list[str]:
    """The text of both lines, once both say all of this."""
    page.wait_for_function(
        """words => {
            const lines = [...document.querySelectorAll(".diagonal-memory")].map((line) => line.title);
            return lines.length === 2 && lines.every((line) => words.every((word) => line.includes(word)));
        }""",
        arg=list(words),
        timeout=60_000,
    )
    return page.locator(LINES).evaluate_all("lines => lines.map((line) => line.title)")


def cache_mb(line: str) -> float:
    return float(re.search(r"latent frames\) ([\d.]+) MB", line)[1])


def is_red(page, selector: str) -> bool:
    """Whether a text has far more red than green and blue."""
    colour = page.locator(selector).first.evaluate("text => getComputedStyle(text).color")
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    return red > 1.6 * max(green, blue)


def choose_palette(page, name: str) -> None:
    """Choose one of ComfyUI's palettes, and wait until the page has its colours."""
    background = "() => getComputedStyle(document.documentElement).getPropertyValue('--comfy-input-bg')"
    before = page.evaluate(background)
    page.evaluate("name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", name)
    page.wait_for_function(f"before => ({background})() !== before", arg=before)


def contrast(page, selector: str) -> float:
    """Of a text with its drawing's background, by WCAG's formula."""
    return page.locator(selector).first.evaluate(
        """(text) => {
            const parts = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
            const light = (colour) => parts(colour).map((part) => (colour.startsWith("color(") ? part : part / 255))
                .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
                .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0.05);
            const back = getComputedStyle(text.closest(".diagonal-widget")).backgroundColor;
            const both = [light(getComputedStyle(text).color), light(back)];
            return Math.max(...both) / Math.min(...both);
        }"""
    )


def test_the_line_follows_window_and_size_and_goes_red(page, frontend):
    (line, other) = wait_lines(page, "Needs ", "64x64", "(12 latent frames)")
    assert line == other and "RAM (no GPU)" in line
    frontend.set_widget("EmptyARVideoLatent", "width", 640)
    frontend.set_widget("EmptyARVideoLatent", "height", 640)
    (small, _) = wait_lines(page, "640x640", "(12 latent frames)")
    frontend.set_widget("DiagonalCausalAttention", "window", 6)
    (smaller, _) = wait_lines(page, "640x640", "(6 latent frames)")
    assert cache_mb(smaller) == pytest.approx(cache_mb(small) / 2, rel=0.01)
    assert page.locator(f"{LINES}.red").count() == 0
    frontend.set_widget("DiagonalCausalAttention", "window", -1)
    for name in ("width", "height"):
        frontend.set_widget("EmptyARVideoLatent", name, 16384)  # too large for any machine
    wait_lines(page, "16384x16384", "Fits with ")
    assert page.locator(f"{LINES}.red").count() == 2
    assert is_red(page, f"{LINES}.red .text-line")
    assert contrast(page, f"{LINES}.red .text-line") > 4.5
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "memory_line.png")
    frontend.set_widget("DiagonalSchedule", "steps", "1")
    page.wait_for_selector(".diagonal-schedule .warning", state="attached")
    assert contrast(page, ".diagonal-schedule .warning") > 4.5
    choose_palette(page, "light")
    try:
        page.wait_for_timeout(1000)
        page.screenshot(path=ARTIFACTS / "memory_line_light.png")
        assert is_red(page, f"{LINES}.red .text-line")
        assert contrast(page, f"{LINES}.red .text-line") > 4.5
        assert contrast(page, ".diagonal-schedule .warning") > 4.5
    finally:
        choose_palette(page, "dark")
    assert frontend.errors == []


def test_the_line_follows_the_schedules_frames_per_chunk(page, frontend):
    frontend.set_widget("EmptyARVideoLatent", "width", 640)
    frontend.set_widget("EmptyARVideoLatent", "height", 640)
    (three, _) = wait_lines(page, "640x640", "a forward")
    frontend.set_widget("DiagonalSchedule", "frames_per_chunk", 6)
    page.wait_for_function("before => document.querySelector('.diagonal-memory').title !== before", arg=three)
    (six, _) = wait_lines(page, "640x640", "a forward")

    def forward_mb(line: str) -> float:
        return float(re.search(r"a forward ([\d.]+) MB", line)[1])

    assert forward_mb(six) == pytest.approx(2 * forward_mb(three), rel=0.1)


def test_a_server_that_did_not_answer_is_asked_again(page, frontend):
    wait_lines(page, "Needs ", "64x64")
    page.route("**/diagonal/memory**", lambda route: route.abort())
    frontend.set_widget("EmptyARVideoLatent", "width", 640)
    wait_lines(page, "Memory unknown")
    page.unroute("**/diagonal/memory**")
    wait_lines(page, "Needs ", "640x64")
    frontend.errors.clear()  # the browser's own, of the requests that were stopped


def test_a_server_that_fails_is_asked_less_and_less_often_until_it_is_back(page, frontend):
    """Not twice a second and line, which is how often the graph is looked at."""
    wait_lines(page, "Needs ", "64x64")
    asked = []

    def fail(route):
        asked.append(route.request.url)
        route.fulfill(status=500, body="")

    page.route("**/diagonal/memory**", fail)
    frontend.set_widget("EmptyARVideoLatent", "width", 640)
    wait_lines(page, "Memory unknown")
    page.wait_for_timeout(7500)  # two lines: at once, after 2 s, and after 4 s more
    page.unroute("**/diagonal/memory**")
    assert 4 <= len([url for url in asked if "width=640" in url]) <= 6
    with page.expect_request("**/diagonal/memory**", timeout=4000):  # 8 s after the last time it would be asked anyway
        page.evaluate("() => app.api.socket.close()")  # ComfyUI's page connects again at once
    wait_lines(page, "Needs ", "640x64")
    frontend.errors.clear()  # the browser's own, of the answers


def test_what_is_free_is_asked_again_behind_a_run(page, frontend):
    wait_lines(page, "Needs ", "64x64")
    page.wait_for_timeout(2000)  # what was added to the graph is asked for once
    lines = page.locator(".diagonal-memory .words > div").element_handles()
    assert lines
    with page.expect_response("**/diagonal/memory**", timeout=120_000):
        page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_timeout(500)
    said = page.evaluate("(lines) => lines.filter((line) => line.isConnected).length", lines)
    assert said == len(lines), "a screen reader would read out again what has not changed"
    assert frontend.errors == []


def test_what_cannot_be_known_is_said(page, frontend):
    wait_lines(page, "Needs ")
    page.evaluate(
        """() => {
            const sampler = app.graph.nodes.find((node) => node.type === "DiagonalChunkSampler");
            sampler.disconnectInput(sampler.inputs.findIndex((input) => input.name === "latent_image"));
        }"""
    )
    page.wait_for_function(
        """() => [...document.querySelectorAll(".diagonal-memory .words")].some((line) =>
            line.textContent === "Connect latent_image to see the memory needed.")""",
        timeout=20_000,
    )
    assert page.locator(f"{LINES} .bar:visible").count() == 1, "no bar of what is not known"
    # The loader feeds no sampler whose size is known, and says what it reckons with.
    page.wait_for_function(
        """() => [...document.querySelectorAll(".diagonal-memory .words")].some((line) =>
            line.textContent.includes("No sampler in this graph sets a size. Assumed 64x64"))""",
        timeout=20_000,
    )
    assert frontend.errors == []


def wait_line(page, kind: str, words: str) -> None:
    """Until the memory line of the first node of a type says so."""
    page.wait_for_function(
        """([kind, words]) => app.graph.nodes.find((node) => node.type === kind)
            .widgets.find((widget) => widget.name === "memory").element.textContent.includes(words)""",
        arg=[kind, words],
        timeout=20_000,
    )


def test_a_loader_alone_and_one_that_does_nothing(page, frontend):
    wait_lines(page, "Needs ", "64x64")
    page.evaluate(
        """() => {
            for (const node of app.graph.nodes.filter((node) => node.type !== "DiagonalDemoLoader"))
                app.graph.remove(node);
        }"""
    )
    wait_line(page, "DiagonalDemoLoader", "No sampler in this graph sets a size. Assumed 64x64")
    title = page.evaluate("() => app.graph.nodes[0].title")
    for mode, words in ((2, f"{title} is muted."), (4, f"{title} is bypassed."), (0, "Assumed 64x64")):
        page.evaluate("mode => (app.graph.nodes[0].mode = mode)", mode)
        wait_line(page, "DiagonalDemoLoader", words)
    assert frontend.errors == []


def test_a_sampler_in_a_subgraph_is_not_denied(page, frontend):
    wait_lines(page, "Needs ", "64x64")
    page.evaluate(
        """() => {
            const sampler = app.graph.nodes.find((node) => node.type === "DiagonalChunkSampler");
            app.graph.convertToSubgraph(new Set([sampler]));
        }"""
    )
    wait_line(
        page, "DiagonalDemoLoader", "A sampler on the other side of a subgraph is not seen from here. Assumed 64x64"
    )
    assert frontend.errors == []


def test_a_loader_says_which_file_it_lacks_until_it_is_there(page, frontend, comfy_server):
    wait_lines(page, "Needs ", "64x64")
    page.evaluate(
        """() => {
            const loader = LiteGraph.createNode("DiagonalModelLoader");
            app.graph.add(loader);
            loader.pos = [-420, 700];
        }"""
    )
    frontend.set_widget("DiagonalModelLoader", "ckpt_name", None)  # as where ComfyUI has no files
    title = page.evaluate("() => app.graph.nodes.find((node) => node.type === 'DiagonalModelLoader').title")
    wait_line(page, "DiagonalModelLoader", f"No file is chosen in {title}.")
    frontend.set_widget("DiagonalModelLoader", "ckpt_name", "brought.safetensors")
    missing = "brought.safetensors is not in models/diffusion_models or models/checkpoints: put the file there and "
    wait_line(page, "DiagonalModelLoader", f"{missing}press R.")
    folder = comfy_server.output_dir.parent / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    made = LAYOUTS["comfyui, bare"](folder, tiny_wan(), {})
    try:
        made = made.rename(folder / "brought.safetensors")
        page.evaluate("() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
        wait_line(page, "DiagonalModelLoader", "No sampler in this graph sets a size. Assumed 832x480")
    finally:
        made.unlink()
    assert frontend.errors == []


def test_a_loader_answers_for_the_active_sampler_that_needs_most(page, frontend):
    wait_lines(page, "Needs ", "64x64", "(12 latent frames)")
    causal = page.evaluate(
        """() => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const [latent, sampler] = ["EmptyARVideoLatent", "DiagonalChunkSampler"].map((type) => {
                const copy = find(type).clone();
                app.graph.add(copy);
                copy.pos = [0, 1200];
                return copy;
            });
            latent.widgets.find((widget) => widget.name === "width").value = 640;
            find("DiagonalCausalAttention").connect(0, sampler, 0);
            latent.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "latent_image"));
            window.second = sampler;
            return find("DiagonalCausalAttention").title;
        }"""
    )

    def wait_loader(words: str) -> None:
        page.wait_for_function(
            """words => app.graph.nodes.find((node) => node.type === "DiagonalDemoLoader")
                .widgets.find((widget) => widget.name === "memory").element.textContent.includes(words)""",
            arg=words,
            timeout=20_000,
        )

    wait_loader("640x64")
    for mode, words in ((2, "64x64"), (0, "640x64"), (4, "64x64")):
        page.evaluate("mode => (second.mode = mode)", mode)
        wait_loader(words)
    page.evaluate("() => app.graph.remove(second)")
    # A bypassed node sets nothing, a muted one passes nothing on.
    frontend.set_widget("DiagonalCausalAttention", "window", 6)
    wait_lines(page, "(6 latent frames)")
    set_mode = "mode => (app.graph.nodes.find((node) => node.type === 'DiagonalCausalAttention').mode = mode)"
    page.evaluate(set_mode, 4)
    wait_lines(page, "(12 latent frames)")
    page.evaluate(set_mode, 2)
    page.wait_for_function(
        "words => [...document.querySelectorAll('.diagonal-memory')].some((line) => line.title === words)",
        arg=f"{causal} is muted.",
        timeout=20_000,
    )
    wait_loader("No sampler in this graph")
    assert frontend.errors == []


def test_nodes_that_are_gone_ask_nothing(page, frontend):
    """Copies for the clipboard are never in a graph, and ComfyUI tells nodes inside subgraphs nothing as they go."""
    page.evaluate(
        """() => {
            const [start, stop] = [window.setInterval, window.clearInterval];
            window.ticking = new Set();
            window.setInterval = (act, every, ...rest) => {
                const id = start(act, every, ...rest);
                if ([300, 500].includes(every)) ticking.add(id); // of our drawings
                return id;
            };
            window.clearInterval = (id) => (ticking.delete(id), stop(id));
            window.restoreIntervals = () => Object.assign(window, { setInterval: start, clearInterval: stop });
        }"""
    )

    def ticking() -> int:
        return page.evaluate("() => ticking.size")

    try:
        frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
        assert ticking() == 4, "the schedule's, two memory lines' and the preview's"
        page.evaluate("() => { app.canvas.selectItems(app.graph.nodes); app.canvas.copyToClipboard(); }")
        assert ticking() == 4
        page.evaluate("() => app.canvas.pasteFromClipboard()")
        assert ticking() == 8
        page.evaluate("() => app.canvas.deleteSelected()")
        assert ticking() == 4
        # As the sidebar's Insert does in earlier frontends, to copy from it.
        page.evaluate("() => void new app.graph.constructor(app.graph.serialize())")
        assert ticking() == 4
        page.evaluate(
            """() => {
                const sampler = app.graph.nodes.find((node) => node.type === "DiagonalChunkSampler");
                app.graph.remove(sampler);
                app.graph.add(sampler);
                app.graph.convertToSubgraph(new Set([sampler]));
            }"""
        )
        assert ticking() == 4
        for _ in range(2):
            frontend.undo_a_move()
            assert ticking() == 4
        # Pasted, a subgraph's nodes are made twice.
        page.evaluate(
            """() => {
                app.canvas.selectItems(app.graph.nodes.filter((node) => node.isSubgraphNode?.()));
                app.canvas.copyToClipboard();
                app.canvas.pasteFromClipboard();
            }"""
        )
        assert page.evaluate("() => app.graph.nodes.filter((node) => node.isSubgraphNode?.()).length") == 2
        assert ticking() == 6, "the sampler's two once more"
        page.evaluate(
            "() => app.graph.nodes.filter((node) => node.isSubgraphNode?.()).forEach((node) => app.graph.remove(node))"
        )
        assert ticking() == 2
    finally:
        page.evaluate("() => restoreIntervals()")
    assert frontend.errors == []


def test_a_subgraph_on_the_way_to_the_loader_is_not_looked_into(page, frontend):
    """It may set the window, as this one does."""
    wait_lines(page, "Needs ", "64x64")
    page.evaluate(
        """() => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const causal = LiteGraph.createNode("DiagonalCausalAttention");
            app.graph.add(causal);
            find("DiagonalDemoLoader").connect(0, causal, 0);
            const sampler = find("DiagonalChunkSampler");
            causal.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "model"));
            app.graph.convertToSubgraph(new Set([causal]));
        }"""
    )
    wait_line(page, "DiagonalChunkSampler", "makes the MODEL: its memory is known when it runs.")
    assert frontend.errors == []


def test_a_latent_that_another_node_makes_of_the_empty_one_is_not_taken_for_it(page, frontend):
    """It may be larger, or of more videos; a noise mask leaves it as it is."""
    wait_lines(page, "Needs ", "64x64")
    page.evaluate(
        """() => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            window.between = (type) => {
                const [node, sampler] = [LiteGraph.createNode(type), find("DiagonalChunkSampler")];
                app.graph.add(node);
                find("EmptyARVideoLatent").connect(0, node, node.inputs.findIndex((input) => input.type === "LATENT"));
                node.connect(0, sampler, sampler.inputs.findIndex((input) => input.name === "latent_image"));
                return node;
            };
        }"""
    )
    for kind in ("LatentUpscaleBy", "RepeatLatentBatch"):
        page.evaluate("kind => (window.upscale = between(kind))", kind)
        wait_line(page, "DiagonalChunkSampler", "makes the LATENT: its memory is known when it runs.")
        page.evaluate("() => (upscale.mode = 4)")
        wait_line(page, "DiagonalChunkSampler", "64x64")
    page.evaluate("() => (upscale.mode = 0)")
    wait_line(page, "DiagonalChunkSampler", "makes the LATENT")
    page.evaluate("() => between('SetLatentNoiseMask')")
    wait_line(page, "DiagonalChunkSampler", "64x64")
    assert frontend.errors == []


def test_the_vae_of_an_optical_flow_that_carries_frames_counts(page, frontend):
    (plain, _) = wait_lines(page, "Needs ", "64x64")
    assert "decoding" not in plain
    page.evaluate(
        """() => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const [flow, sampler] = [LiteGraph.createNode("DiagonalFlowConditioning"), find("DiagonalChunkSampler")];
            app.graph.add(flow);
            const at = (node, name) => node.inputs.findIndex((input) => input.name === name);
            find("DiagonalDemoLoader").connect(2, flow, at(flow, "vae"));
            flow.connect(0, sampler, at(sampler, "optical_flow"));
        }"""
    )
    wait_lines(page, "64x64", "decoding")  # auto: the student has no adapter
    for name, value, counts in (
        ("mode", "adapter", False),
        ("mode", "adapter+blend", True),
        ("blend", 0, False),
        ("mode", "reference", True),
        ("strength", 0, False),
    ):
        frontend.set_widget("DiagonalFlowConditioning", name, value)
        page.wait_for_function(
            """counts => [...document.querySelectorAll(".diagonal-memory")]
                .every((line) => line.title.includes("decoding") === counts)""",
            arg=counts,
            timeout=20_000,
        )
    assert frontend.errors == []
