"""The canvas extensions leave the page, which all packs share, alone: read from their source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "web").glob("*.js"))
SHARED = "diagonal_widget.js"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_names_and_styles_are_our_own(path):
    text = path.read_text(encoding="utf-8")
    names = re.findall(r'registerExtension\(\{\s*name: "(\w+)\.\w+"', text)
    assert names == ([] if path.name == SHARED else ["diagonaldistillation"])
    assert not re.findall(r"document\.(?:head|body)|document\.addEventListener", text)
    (style,) = re.findall(r"const STYLE = `(.*?)`;", text, re.DOTALL)
    style = re.sub(r"\$\{[\w.]+\}", "1", style)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{[^}]*\}", style) for part in rule.split(",")]
    assert selectors and all(selector.startswith(".diagonal-") for selector in selectors), selectors


def test_there_are_scripts():
    assert len(SCRIPTS) == 5 and SHARED in {path.name for path in SCRIPTS}
