"""DiagonalModelLoader over HTTP: what only a real server shows, its validation, its caching and its hidden inputs."""

from __future__ import annotations

import json

import pytest
from wan_files import LAYOUTS, tiny_wan, write_lora

pytestmark = pytest.mark.usefixtures("models")


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
    yield
    for file in made:
        file.unlink()


def test_a_pickle_with_a_lora_loads_and_reports(comfy_server) -> None:
    outputs = comfy_server.run(graph("model.pt", "lora.pt"))
    report = outputs["2"]["text"][0]
    assert "model.pt: Wan text-to-video" in report
    assert "lora.pt: PEFT" in report
    assert outputs["1"]["text"] == [report]


def test_another_setting_uses_the_weights_that_comfyuis_cache_still_holds(comfy_server) -> None:
    changed = graph("model.pt")
    comfy_server.run(changed)
    changed["1"]["inputs"] |= {"window": 9, "kv_cache_dtype": "int8"}
    before = comfy_server.log_path.stat().st_size
    report = comfy_server.run(changed)["2"]["text"][0]
    assert "window 9, sink 3" in report and "KV cache in 8 bits" in report
    assert b"model.pt: in memory already" in comfy_server.log_path.read_bytes()[before:]


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "C:\\x.pt", "model.pt\0"])
def test_a_path_is_refused_before_anything_runs(name: str, comfy_server) -> None:
    with pytest.raises(ValueError, match="ckpt_name"):
        comfy_server.queue(graph(name))


def test_the_refusal_of_a_file_reaches_the_user(comfy_server) -> None:
    entry = comfy_server.wait(comfy_server.queue(graph("lora.pt")))
    assert entry["status"]["status_str"] == "error"
    assert "is a LoRA" in json.dumps(entry["status"])
