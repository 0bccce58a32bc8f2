"""The drawing inside the Diagonal Schedule node, changed by mouse, by keys and by text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
COUNTS = ".diagonal-schedule .count"
DEFAULTS = ["diagonal 4-3-2", "", "from preset", 0.357, 0, 0, ""]


class Drawing:
    """The one Diagonal Schedule node on the canvas."""

    def __init__(self, frontend) -> None:
        self.frontend, self.page = frontend, frontend.page

    def set(self, name: str, value) -> None:
        self.page.evaluate(
            """([name, value]) => {
                const widget = app.graph.nodes[0].widgets.find((w) => w.name === name);
                widget.value = value;
                widget.callback?.(value);
            }""",
            [name, value],
        )

    def get(self, name: str):
        return self.page.evaluate("name => app.graph.nodes[0].widgets.find((w) => w.name === name).value", name)

    def wait(self, counts: list[int]) -> None:
        wanted = json.dumps(counts, separators=(",", ":"))
        self.page.wait_for_function(
            f"() => JSON.stringify([...document.querySelectorAll('{COUNTS}')].map(t => +t.textContent)) === '{wanted}'",
            timeout=20_000,
        )

    def words(self, kind: str) -> str:
        return self.page.locator(f".diagonal-schedule .{kind}").inner_text()

    def point_at(self, chunk: int) -> tuple[float, float]:
        """Moves the mouse onto a chunk's column, once that stands still; where that is."""
        column = self.page.locator(f".diagonal-schedule [data-chunk='{chunk}']")
        column.hover(timeout=20_000)
        box = column.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def pixels_per_step(self) -> float:
        return 12 * self.page.locator(".diagonal-schedule svg").bounding_box()["height"] / 140


@pytest.fixture
def drawing(frontend) -> Drawing:
    frontend.errors.clear()
    demo = json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8"))
    (node,) = (node for node in demo["nodes"] if node["type"] == "DiagonalSchedule")
    node.update(pos=[60, 60], size=[380, 300], widgets_values=DEFAULTS)
    for output in node["outputs"]:
        output["links"] = None
    frontend.load({**demo, "nodes": [node], "links": [], "groups": []})
    frontend.page.evaluate("() => { app.canvas.ds.scale = 1.5; app.canvas.ds.offset = [40, 40]; }")
    found = Drawing(frontend)
    found.wait([4, 3, 2, 2, 2, 2, 2])
    return found


def test_the_default_is_drawn_with_its_forwards(drawing):
    page = drawing.page
    assert page.locator(".diagonal-schedule circle.forward").count() == 17
    assert page.locator(".diagonal-schedule circle.pass").count() == 0
    assert "17 forwards for 7 chunks" in drawing.words("info") and "(2.06x)" in drawing.words("info")
    ARTIFACTS.mkdir(exist_ok=True)
    inside = page.evaluate("() => app.graph.nodes[0].computeSize()[1] <= app.graph.nodes[0].size[1]")
    assert inside, "the node is as high as its drawing"
    page.screenshot(path=ARTIFACTS / "schedule_drawing.png")
    assert drawing.frontend.errors == []


def test_a_preset_is_drawn_with_its_cache_pass(drawing):
    drawing.set("preset", "self forcing")
    drawing.wait([4] * 7)
    assert drawing.page.locator(".diagonal-schedule circle.pass").count() == 7
    assert "35 forwards" in drawing.words("info")


def test_dragging_a_chunk_changes_the_text_and_the_text_changes_the_drawing(drawing):
    page = drawing.page
    x, y = drawing.point_at(2)
    page.mouse.down()
    page.mouse.move(x, y - 3 * drawing.pixels_per_step(), steps=4)
    page.mouse.up()
    drawing.wait([4, 3, 5, 2, 2, 2, 2])
    assert drawing.get("steps") == "4,3,5,2"
    assert page.evaluate("() => app.extensionManager.workflow.activeWorkflow.isModified")
    page.keyboard.press("Control+z")
    drawing.wait([4, 3, 2, 2, 2, 2, 2])
    assert drawing.get("steps") == ""
    page.keyboard.press("Control+y")
    drawing.wait([4, 3, 5, 2, 2, 2, 2])
    drawing.set("steps", "5,3")
    drawing.wait([5, 3, 3, 3, 3, 3, 3])
    page.locator(".diagonal-schedule [data-chunk='6']").focus()
    page.keyboard.press("ArrowDown")
    drawing.wait([5, 3, 3, 3, 3, 3, 2])
    assert drawing.get("steps") == "5,3,3,3,3,3,2"
    page.keyboard.press("ArrowUp")
    drawing.wait([5, 3, 3, 3, 3, 3, 3])
    assert drawing.get("steps") == "5,3"
    page.keyboard.press("Control+z")
    drawing.wait([5, 3, 3, 3, 3, 3, 2])
    assert drawing.frontend.errors == []


def test_a_drag_ends_at_twelve_steps_and_text_does_not(drawing):
    page = drawing.page
    x, y = drawing.point_at(2)
    page.mouse.down()
    page.mouse.move(x, y - 40 * drawing.pixels_per_step(), steps=4)
    page.mouse.up()
    drawing.wait([4, 3, 12, 2, 2, 2, 2])
    slider = page.locator(".diagonal-schedule [data-chunk='2']")
    assert slider.get_attribute("aria-valuemax") == "12"
    slider.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    drawing.wait([4, 3, 11, 2, 2, 2, 2])
    drawing.set("steps", "20,1")
    drawing.wait([20, 1, 1, 1, 1, 1, 1])
    first, second = page.locator(".diagonal-schedule [role='slider']").all()[:2]
    assert [first.get_attribute("aria-valuemax"), second.get_attribute("aria-valuemax")] == ["20", "12"]
    assert "chunk 2: 1 step at sigma" in second.locator("title").text_content()
    drawing.set("steps", "1")
    drawing.wait([1] * 7)
    drawing.set("context_mode", "clean")
    page.wait_for_function(
        "() => document.querySelector('.diagonal-schedule .info').textContent.includes('1 uniform step with a cache')"
    )


def test_wheel_and_middle_button_move_the_canvas_over_the_drawing(drawing):
    page = drawing.page

    def view() -> list[float]:
        return page.evaluate("() => [app.canvas.ds.scale, ...app.canvas.ds.offset]")

    x, y = drawing.point_at(2)
    scale, left, top = view()
    page.mouse.down(button="middle")
    page.mouse.move(x + 60, y + 30, steps=4)
    page.mouse.up(button="middle")
    assert view() == pytest.approx([scale, left + 60 / scale, top + 30 / scale], abs=0.1)
    assert drawing.get("steps") == "", "that is no drag"
    page.mouse.wheel(0, -100)
    page.wait_for_function("scale => app.canvas.ds.scale > scale", arg=scale)
    # What can scroll does so.
    drawing.set("steps", "4" * 400)
    words = page.locator(".diagonal-schedule .words")
    page.wait_for_function(
        """() => {
            const words = document.querySelector(".diagonal-schedule .words");
            return words.scrollHeight > words.clientHeight && words.scrollWidth <= words.clientWidth;
        }"""
    )
    words.hover()
    before = view()
    page.mouse.wheel(0, 20)
    page.wait_for_function("() => document.querySelector('.diagonal-schedule .words').scrollTop > 0")
    assert view() == before


def test_a_value_set_without_a_callback_is_drawn_too(drawing):
    drawing.page.evaluate("() => { app.graph.nodes[0].widgets.find((w) => w.name === 'steps').value = '1'; }")
    drawing.wait([1] * 7)
    assert "almost pure noise" in drawing.words("warning")
    for name, value in {"steps": "4,3", "context_mode": "renoise", "context_sigma": 0.95}.items():
        drawing.set(name, value)
    drawing.wait([4, 3, 3, 3, 3, 3, 3])
    drawing.page.wait_for_function(
        """() => document.querySelector(".diagonal-schedule .warning")?.textContent.includes("Lower context_sigma")"""
    )


def test_a_bad_value_is_said_and_own_sigmas_cannot_be_dragged(drawing):
    drawing.set("steps", "four")
    drawing.wait([])
    assert "steps is 'four'" in drawing.words("error")
    drawing.set("steps", "")
    drawing.set("sigmas", "1, 0.9, 0.4\n1, 0.4")
    drawing.wait([3, 2, 2, 2, 2, 2, 2])
    assert drawing.page.locator(".diagonal-schedule .editable").count() == 0
    assert "empty that field" in drawing.words("hint")


def test_more_chunks_than_are_drawn_are_said(drawing):
    drawing.set("steps", ",".join(["4", "3"] * 15))
    drawing.wait([4, 3] * 12)
    assert drawing.words("hint") == "The first 24 of 30 listed chunks are drawn; change steps in the text."
    numbers = drawing.page.locator(".diagonal-schedule .number")
    assert numbers.all_text_contents()[-2:] == ["21", "24"], "numbers that do not touch, and nothing said to follow"
    titles = drawing.page.locator(".diagonal-schedule title").all_text_contents()
    assert not any("and later" in title for title in titles)
    drawing.set("steps", "4,3")
    drawing.wait([4, 3, 3, 3, 3, 3, 3])
    assert numbers.all_text_contents() == ["1", "2", "3", "4", "5", "6", "7…"]
    assert any("chunk 7 and later" in text for text in drawing.page.locator("title").all_text_contents())


def test_the_node_saves_and_exports_as_before(drawing):
    saved = drawing.page.evaluate("() => app.graph.serialize().nodes[0].widgets_values")
    assert saved == DEFAULTS
    (node,) = drawing.frontend.api_export().values()
    assert "drawing" not in node["inputs"]


def test_quick_keys_are_all_counted_before_the_server_has_answered(drawing):
    drawing.page.evaluate(
        """() => {
            const up = (chunk) => document.querySelector(`.diagonal-schedule [data-chunk="${chunk}"]`)
                .dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowUp", bubbles: true, cancelable: true }));
            for (const chunk of [0, 0, 1]) up(chunk);
        }"""
    )
    assert drawing.get("steps") == "6,4,2"
    drawing.wait([6, 4, 2, 2, 2, 2, 2])
    assert drawing.frontend.errors == []


def test_a_server_that_fails_is_asked_less_and_less_often_until_it_is_back(drawing):
    """Not three times a second, which is how often the values are looked at."""
    page, asked = drawing.page, []

    def fail(route):
        asked.append(route.request.url)
        route.fulfill(status=502, content_type="text/html", body="<html>")

    page.route("**/diagonal/schedule", fail)
    drawing.set("steps", "5")
    page.wait_for_selector(".diagonal-schedule .error", state="attached")
    assert drawing.words("error") == "No drawing: the server answered 502."
    page.wait_for_timeout(7500)  # at once, after 2 s, and after 4 s more
    page.unroute("**/diagonal/schedule")
    assert 2 <= len(asked) <= 3
    with page.expect_request("**/diagonal/schedule", timeout=4000):  # 8 s after the last time it would be anyway
        page.evaluate("() => app.api.socket.close()")  # ComfyUI's page connects again at once
    drawing.wait([5] * 7)
    drawing.frontend.errors.clear()  # the browser's own, of the answers


def test_a_schedule_longer_than_an_address_is_drawn_and_one_too_long_is_asked_once(drawing):
    drawing.set("steps", "4,3," * 5_000 + "3")  # 20 KB
    drawing.wait([4, 3] * 12)
    asked = []
    drawing.page.on("request", lambda request: asked.append(request.url))
    drawing.set("steps", "4,3," * 20_000 + "3")
    drawing.page.wait_for_selector(".diagonal-schedule .error", state="attached")
    assert "larger than" in drawing.words("error")
    drawing.page.wait_for_timeout(3000)
    assert len([url for url in asked if url.endswith("/diagonal/schedule")]) == 1
    drawing.frontend.errors.clear()  # the browser's own, of the answer
