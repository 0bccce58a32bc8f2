"""The canvas extensions leave the page, which all packs share, alone, and speak two languages: from their source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diagonal_sampler.memory import FP8, GGUF_Q4

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "web").glob("*.js"))
SHARED, TEXTS = "diagonal_widget.js", "diagonal_texts.js"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_names_and_styles_are_our_own(path):
    text = path.read_text(encoding="utf-8")
    names = re.findall(r'registerExtension\(\{\s*name: "(\w+)\.\w+"', text)
    assert names == ([] if path.name in (SHARED, TEXTS) else ["diagonaldistillation"])
    assert not re.findall(r"document\.(?:head|body)|document\.addEventListener", text)
    if path.name == TEXTS:
        return
    (style,) = re.findall(r"const STYLE = `(.*?)`;", text, re.DOTALL)
    style = re.sub(r"\$\{[\w.]+\}", "1", style)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{[^}]*\}", style) for part in rule.split(",")]
    assert selectors and all(selector.startswith(".diagonal-") for selector in selectors), selectors


def test_nothing_is_fetched_from_elsewhere():
    """The one address is a name, of SVG; what the server is asked for begins with our own path."""
    for path in (*SCRIPTS, *SCRIPTS[0].parent.glob("docs/**/*.md")):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"\w+://|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon", text), path.name
        assert all(route.startswith("/diagonal/") for route in re.findall(r"fetchApi\([`\"]([^`\"?]*)", text)), (
            path.name
        )


def test_there_are_scripts():
    assert len(SCRIPTS) == 6 and {SHARED, TEXTS} <= {path.name for path in SCRIPTS}


def texts() -> dict[str, list[str]]:
    """The rows of the table: name -> English, Chinese."""
    source = next(path for path in SCRIPTS if path.name == TEXTS).read_text(encoding="utf-8")
    (table,) = re.findall(r"const TEXTS = \{(.*?)\n\};", source, re.DOTALL)
    rows = re.findall(r"^  (\w+): \[(.*?)\],$", table, re.DOTALL | re.MULTILINE)
    assert len(rows) == len(re.findall(r"^  \w+:", table, re.MULTILINE)) == len(dict(rows))
    return {name: re.findall(r'"(.*?)"', re.sub(r'"\s*\+\s*"', "", words)) for name, words in rows}


def test_every_text_is_there_in_english_and_chinese_with_the_same_values():
    for name, words in texts().items():
        english, chinese = words
        assert english != chinese and re.search(r"[\u3000-\u9fff\uff00-\uffef]|^ ", chinese), name
        assert sorted(re.findall(r"\{(\w+)\}", english)) == sorted(re.findall(r"\{(\w+)\}", chinese)), name


def test_the_drawings_have_all_their_words_from_the_table_and_use_all_of_it():
    source = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS if path.name != TEXTS)
    quoted = set(re.findall(r'"(\w+)"', source))
    named = {name for call in re.findall(r"phrase\(([^,{)]*)", source) for name in re.findall(r'"(\w+)"', call)}
    assert named <= texts().keys()
    # Formats of weights are named by the server.
    assert texts().keys() - quoted == {FP8, GGUF_Q4}
    # A sentence outside of the table would be English only.
    assert not re.findall(r'(?:textContent = |say\(|error: |placeholder = |title = )["`](?!\$\{\w+\})', source)
