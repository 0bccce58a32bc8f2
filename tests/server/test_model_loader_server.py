"""DiagonalModelLoader over HTTP: what only a real server shows, its validation, its caching and its hidden inputs."""

from __future__ import annotations

import json

import pytest
from wan_files import LAYOUTS, tiny_wan, write_lora


def graph(ckpt_name: str, lora_name: str = "none") -> dict:
    return {
        "1": {
            "class_type": "DiagonalModelLoader",
            "inputs": {
                "ckpt_name": ckpt_name,
                "weights": "auto",
                "weight_dtype": "default",
                "frames_per_chunk": 0,
                "window": 0,
                "sink": -1,
                "positions": "auto",
                "lora_name": lora_name,
                "lora_strength": 1.0,
            },
        },
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }


@pytest.fixture(scope="module")
def models(comfy_server):
    """Tiny models on the server that all tests share: they go again, for a workflow needs files of the same names."""
    folder = comfy_server.output_dir.parent / "models"
    for kind in ("diffusion_models", "loras"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    made = [
        LAYOUTS["self forcing, ema and generator"](folder / "diffusion_models", tiny_wan(0), tiny_wan(1)),
        write_lora(folder / "loras", "longlive, generator_lora")[0],
        write_lora(folder / "diffusion_models", "peft, bare keys")[0],
    ]
    yield folder
    for file in made:
        file.unlink()


def test_a_pickle_with_a_lora_loads_and_reports(comfy_server, models) -> None:
    outputs = comfy_server.run(graph("model.pt", "lora.pt"))
    report = outputs["2"]["text"][0]
    assert "model.pt: Wan text-to-video" in report
    assert "lora.pt: PEFT" in report
    assert outputs["1"]["text"] == [report]


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "C:\\x.pt", "model.pt\0"])
def test_a_path_is_refused_before_anything_runs(name: str, comfy_server, models) -> None:
    with pytest.raises(ValueError, match="ckpt_name"):
        comfy_server.queue(graph(name))


def test_the_refusal_of_a_file_reaches_the_user(comfy_server, models) -> None:
    entry = comfy_server.wait(comfy_server.queue(graph("lora.pt")))
    assert entry["status"]["status_str"] == "error"
    assert "is a LoRA" in json.dumps(entry["status"])
