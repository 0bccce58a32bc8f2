"""What the nodes show and take in the later rounds of a loop, which ComfyUI runs under other ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import comfy_host
import pytest

ROOT = Path(__file__).resolve().parents[2]
RED, BLUE = "a red circle moves right", "a blue circle moves right"


@pytest.fixture(scope="module")
def comfy_server(comfyui_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.ComfyServer]:
    """A running server with this pack and a node that loops."""
    base = tmp_path_factory.mktemp("loops-server") / "base"
    (base / "custom_nodes").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "helpers" / "loop_node.py", base / "custom_nodes")
    server = comfy_host.ComfyServer(comfyui_dir, base)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def page(frontend, nothing_stays):
    """The demo with a prompt schedule, and a second round behind its sampler; `ids` has what runs under which id."""
    frontend.errors.clear()
    frontend.load(json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8")))
    frontend.page.evaluate(
        """(text) => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const add = (type) => {
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                return node;
            };
            const link = (from, to, name, output = 0) =>
                from.connect(output, to, to.inputs.findIndex((input) => input.name === name));
            const schedule = add("DiagonalPromptSchedule"), again = add("OneMoreRound");
            schedule.widgets.find((widget) => widget.name === "text").value = text;
            const sampler = find("DiagonalChunkSampler");
            link(find("DiagonalDemoLoader"), schedule, "clip", 1);
            link(schedule, sampler, "positive");
            link(again, find("VAEDecode"), "samples");
            link(sampler, again, "latent");
            window.ids = new Set();
            app.api.addEventListener("diagonal.progress", ({ detail }) => ids.add(detail.node));
        }""",
        f"0: {RED}",
    )
    frontend.set_widget("EmptyARVideoLatent", "length", 1021)  # with so many steps longer than the test
    frontend.set_widget("DiagonalSchedule", "steps", "4,40")
    frontend.page.wait_for_selector(".diagonal-prompt .line", state="attached")
    return frontend.page


def wait_line(page, name: str, words: str) -> None:
    page.wait_for_function(
        "([name, words]) => document.querySelector(`.diagonal-${name} .line`)?.textContent.includes(words)",
        arg=[name, words],
        timeout=90_000,
    )


def press(page, name: str) -> None:
    page.evaluate("name => document.querySelector(`.diagonal-${name} button`).click()", name)


def test_a_later_round_is_shown_steered_and_finished_in_the_nodes_that_it_repeats(page, frontend):
    page.evaluate("() => app.queuePrompt(0, 1)")
    wait_line(page, "preview", "chunk 1 of 86")
    press(page, "preview")
    page.wait_for_function("() => ids.size === 2", timeout=90_000)
    wait_line(page, "preview", " left")
    wait_line(page, "prompt", "of 86")
    page.locator(".diagonal-prompt textarea").fill(BLUE)
    press(page, "prompt")
    wait_line(page, "prompt", "(recache): " + BLUE)
    press(page, "preview")
    wait_line(page, "preview", "finished early")
    wait_line(page, "prompt", "The run has ended")
    shown, copied = page.evaluate("() => [...ids]")
    assert copied.endswith(f".{shown}")
    assert frontend.errors == []
