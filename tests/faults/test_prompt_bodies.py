"""Bodies of POST /prompt that are wrong in every way that the server's own description of our nodes suggests."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request

import fault_rows
import node_graphs

SENTINEL_EVERY = 50
PATIENCE_S = 300.0
CANCEL_AFTER_S = 1.0
"""When what is sound by chance and long is cancelled."""
ODD_VALUES = (
    [None, True, "", "x", "-1", "1e400", "NaN", 0, -1, 0.5, 2**31, 2**63, 2**64, -(2**70), 1e308, float("nan")]
    + [float("inf"), -float("inf"), [], [[]], {}, {"a": 1}, ["loader", 0], ["loader", 1], ["loader", 2], ["loader", 9]]
    + [["loader", -1], ["loader", "0"], ["loader", 0.5], ["nobody", 0], ["tested", 0], ["out", 0], [0, 0], ["", 0]]
    + [["positive", 0], ["size", 0], ["image", 0], ["schedule", 0], ["schedule", 1], ["context", 0], ["flow", 0]]
    + ["x" * 100_000, "\0", "../../x", "/etc/passwd", "\ud800", "\U0001f388", "9" * 5000, {"__value__": []}]
)


def malformed(info: dict, rng: random.Random) -> tuple[str, dict]:
    """A description and a body with one to three inputs of one node changed."""
    name = rng.choice(sorted(node_graphs.pack_nodes(info)))
    graph = node_graphs.sound_graph(info, name)
    inputs = graph["tested"]["inputs"]
    specs = node_graphs.inputs_of(info[name])
    told = [name]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice([*specs, *specs, "unknown"]) if specs else "unknown"
        how = rng.choice(("odd", "odd", "odd", "edge", "gone", "class"))
        options = specs[key][1] if key in specs else {}
        if how == "gone":
            inputs.pop(key, None)
            told.append(f"without {key}")
        elif how == "class" and rng.random() < 0.2:
            graph["tested"]["class_type"] = rng.choice(("", name + "X", None, 7, "KSampler", "__class__"))
            told.append(f"class {graph['tested']['class_type']!r}")
        else:
            # ComfyUI checks no link in an input that its node does not have: a slot of 0.5 there ends the thread that
            # runs prompts, whatever the node. That is not ours to mend.
            value = rng.choice([odd for odd in ODD_VALUES if key in specs or not isinstance(odd, list)])
            if how == "edge" and {"min", "max"} & options.keys():
                value = rng.choice([options[end] + by for end in ("min", "max") if end in options for by in (-1, 1)])
            inputs[key] = value
            told.append(f"{key}={str(value)[:40]!r}")
    return ", ".join(told), {"prompt": graph}


def post(url: str, body: dict) -> tuple[int, dict]:
    """As a careless client does: NaN and lone surrogates as Python's JSON has them."""
    request = urllib.request.Request(f"{url}/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


def test_row_prompt_bodies(comfy_server):
    node_graphs.place_files(comfy_server.output_dir.parent / "models")
    info = comfy_server.get("/object_info", timeout=60)
    fresh = 0

    def ended(prompt_id: str) -> str:
        """How a prompt ended; one that is sound by chance and long is cancelled, which must work."""
        for patience in (CANCEL_AFTER_S, PATIENCE_S):
            give_up = time.monotonic() + patience
            while time.monotonic() < give_up:
                history = comfy_server.get(f"/history/{prompt_id}")
                if prompt_id in history:
                    return history[prompt_id]["status"]["status_str"]
                time.sleep(0.02)
            comfy_server.post("/interrupt", {})
        raise AssertionError(f"it did not end:\n{comfy_server.log_tail(20)}")

    def check(number: int) -> None:
        told, body = malformed(info, fault_rows.generator("prompt_bodies", number))
        status, answer = post(comfy_server.url, body)
        assert status in (200, 400), f"{told}: HTTP {status}\n{comfy_server.log_tail(20)}"
        if status == 200:
            try:
                assert ended(answer["prompt_id"]) in ("success", "error"), told
            except AssertionError as error:
                raise AssertionError(f"{told}: {error}") from error

    def sentinel(number: int) -> None:
        nonlocal fresh
        if (number + 1) % SENTINEL_EVERY:
            return
        fresh += 1
        graph = node_graphs.sound_graph(info, "DiagonalChunkSampler")
        graph["tested"]["inputs"]["seed"] = 10_000 + fresh
        comfy_server.run(graph)

    for name in node_graphs.pack_nodes(info):  # what is changed below is sound before
        comfy_server.run(node_graphs.sound_graph(info, name))
    fault_rows.run_cases("prompt_bodies", check, after=sentinel)
