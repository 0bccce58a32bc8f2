"""The Chinese texts of the nodes, against the nodes as ComfyUI knows them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTION = re.compile(r"(?:^|[.;] )([^\s.:]+): ")  # a sentence of one word before its colon: "window: inside the window."
TEXTS = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schemas(pack_module):
    return {schema.node_id: schema for schema in (node.define_schema() for node in pack_module("nodes").NODES)}


def test_every_node_and_nothing_else_is_translated(schemas):
    assert TEXTS.keys() == schemas.keys()


def test_every_input_and_output_has_a_name_and_a_tooltip(schemas):
    for node_id, schema in schemas.items():
        texts = TEXTS[node_id]
        assert texts["inputs"].keys() == {item.id for item in schema.inputs}, node_id
        assert list(texts["outputs"]) == [str(place) for place in range(len(schema.outputs))], node_id
        assert all(entry["name"] and entry["tooltip"] for entry in texts["inputs"].values()), node_id
        assert texts["display_name"] and texts["description"]


def test_every_input_has_an_english_tooltip(schemas):
    for node_id, schema in schemas.items():
        assert not [item.id for item in schema.inputs if len(item.tooltip or "") < 12], node_id
        assert schema.description, node_id


def test_what_a_combo_offers_is_named_as_it_is_written(schemas):
    """A tooltip speaks of options, and those stay in English: a renamed option must be renamed in both languages."""
    for node_id, schema in schemas.items():
        for item in schema.inputs:
            for option in getattr(item, "options", None) or []:
                if item.tooltip and f"{option}:" in item.tooltip:
                    assert option in TEXTS[node_id]["inputs"][item.id]["tooltip"], (node_id, item.id, option)


def test_a_combos_tooltip_speaks_only_of_what_it_offers(schemas):
    """An option that has gone, or has another name now, is gone from the tooltip."""
    told = 0
    for node_id, schema in schemas.items():
        for item in schema.inputs:
            options = getattr(item, "options", None)
            if not options or not item.tooltip:
                continue
            for words in OPTION.findall(item.tooltip):
                assert words in options, (node_id, item.id, words)
                told += 1
    assert told > 10


def test_chinese_texts_call_an_input_by_its_chinese_name(schemas):
    """An id in a text is a name that the canvas does not show."""
    ids = {item.id for schema in schemas.values() for item in schema.inputs if "_" in item.id}
    drawings = (ROOT / "web" / "diagonal_texts.js").read_text(encoding="utf-8")
    texts = re.findall(r'"([^"\n]*[\u4e00-\u9fff][^"\n]*)"', drawings)
    for node in TEXTS.values():
        entries = [*node["inputs"].values(), *node["outputs"].values()]
        texts += [node["description"], *(entry.get("tooltip", "") for entry in entries)]
    assert len(texts) > 150
    assert not [(name, text) for name in ids for text in texts if re.search(rf"\b{name}\b", text, re.ASCII)]


def test_the_server_hands_them_to_the_frontend(comfy_server):
    assert comfy_server.get("/i18n")["zh"]["nodeDefs"]["DiagonalSchedule"] == TEXTS["DiagonalSchedule"]
