"""Diagonal Flow Preview at the end of a graph, in a real server."""

from __future__ import annotations

import io
import urllib.parse
import urllib.request

from PIL import Image


def test_a_preview_runs_by_itself_and_writes_into_the_temporary_folder_alone(comfy_server):
    node = "DiagonalFlowConditioning"
    inputs = comfy_server.get(f"/object_info/{node}")[node]["input"]["required"]
    values = {name: spec[1]["default"] for name, spec in inputs.items() if "default" in spec[-1]}
    values |= {"mode": "reference", "source": "camera", "width": 64, "height": 48, "length": 9, "pan_x": 2.0}
    graph = {
        "flow": {"class_type": node, "inputs": values},
        "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 99}},
        "preview": {
            "class_type": "DiagonalFlowPreview",
            "inputs": {"optical_flow": ["flow", 0], "measure": False, "speed": 0.0, "images": ["image", 0]},
        },
    }
    before = sorted(comfy_server.output_dir.rglob("*"))
    shown = comfy_server.run(graph)["preview"]
    (item,) = shown["images"]
    assert item["type"] == "temp" and shown["animated"] == [True] and "8 steps at 64x48" in shown["text"][0]
    with urllib.request.urlopen(f"{comfy_server.url}/view?{urllib.parse.urlencode(item)}") as answer:
        picture = Image.open(io.BytesIO(answer.read()))
    assert picture.format == "WEBP"
    assert sorted(comfy_server.output_dir.rglob("*")) == before
