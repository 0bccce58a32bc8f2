"""The memory line of the loader and the sampler: it follows the graph, and goes red when a run does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

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
        frontend.set_widget("EmptyARVideoLatent", name, 8192)
    wait_lines(page, "8192x8192", "Fits with ")
    assert page.locator(f"{LINES}.red").count() == 2
    colour = page.locator(f"{LINES}.red .text-line").first.evaluate("line => getComputedStyle(line).color")
    assert colour == "rgb(240, 112, 112)"
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "memory_line.png")
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
            line.textContent === "Connect latent_image to know the memory.")""",
        timeout=20_000,
    )
    # The loader feeds no sampler whose size is known, and says what it reckons with.
    page.wait_for_function(
        """() => [...document.querySelectorAll(".diagonal-memory .words")].some((line) =>
            line.textContent.includes("No sampler is connected; for 832x480"))""",
        timeout=20_000,
    )
    assert frontend.errors == []
