"""The help page of every node, with its picture, in the frontend's own panel; and its Chinese page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
DOCS = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))
MAX_PICTURE = 40_000  # bytes


def test_every_node_has_a_page_and_a_small_picture(comfy_server):
    known = {name for name in comfy_server.get("/object_info") if name.startswith("Diagonal")}
    assert known == set(NODES)
    pictures = {path.stem: path.stat().st_size for path in (DOCS / "images").iterdir()}
    assert pictures.keys() == known
    assert max(pictures.values()) < MAX_PICTURE


@pytest.mark.parametrize("node", NODES)
def test_the_chinese_page_has_what_the_english_one_has(node):
    english, chinese = (path.read_text(encoding="utf-8") for path in (DOCS / f"{node}.md", DOCS / node / "zh.md"))
    for text in (english, chinese):
        # The frontend looks for pictures below docs/ whatever the page's folder is.
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert pictures == [f"images/{node}.webp"] and (DOCS / pictures[0]).is_file()
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 100
    # The same headings, rows, code, and numbers; inputs by their names in a graph.
    for shape in (r"^#+ ", r"^\| ?", r"^```", r"^\d\. "):
        count = [len(re.findall(shape, text, re.MULTILINE)) for text in (english, chinese)]
        assert count[0] == count[1], shape
    numbers = [set(re.findall(r"\d+(?:\.\d+)?", text)) for text in (english, chinese)]
    assert numbers[0] <= numbers[1]
    names = set(re.findall(r"\*\*([a-z]+_\w+)\*\*", english)) - {"client_id"}
    assert {name for name in names if f"`{name}`" not in chinese} == set(), "inputs that only the English page names"


@pytest.mark.parametrize("node", NODES)
def test_the_chinese_page_calls_inputs_by_the_names_that_the_canvas_shows(node):
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    shown = {(name, entry["name"]) for other in texts.values() for name, entry in other["inputs"].items()}
    named = re.findall(r"\*\*([^*\n]+)\*\*\uff08`(\w+)`\uff09", (DOCS / node / "zh.md").read_text(encoding="utf-8"))
    ids = {name for name, _ in shown}
    assert named and not [(words, name) for words, name in named if name in ids and (name, words) not in shown]


@pytest.fixture(scope="module")
def page(frontend):
    frontend.page.evaluate("() => app.graph.clear()")
    return frontend.page


@pytest.mark.parametrize("node", NODES)
def test_the_help_panel_shows_the_page_and_its_picture(page, frontend, node):
    frontend.errors.clear()
    frontend.open_help(node)
    picture = page.locator(f"img[src$='/docs/images/{node}.webp']").first
    picture.wait_for(state="attached", timeout=20_000)
    page.wait_for_function(
        "source => [...document.images].some((image) => image.src.endsWith(source) && image.naturalWidth > 100)",
        arg=f"/docs/images/{node}.webp",
        timeout=20_000,
    )
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"help_{node}.png")
    # The frontend looks for a page in the user's language first.
    assert [line for line in frontend.errors if f"/docs/{node}/en.md" not in line] == []
