"""Small sound graphs around every node of the pack, made from what the server says of its nodes (/object_info)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan_files import LAYOUTS, tiny_wan, write_lora

PACK_PREFIX = "Diagonal"
CHECKPOINT, LORA = "model.pt", "lora.pt"
LINKS: dict[str, list] = {
    "MODEL": ["loader", 0],
    "CLIP": ["loader", 1],
    "VAE": ["loader", 2],
    "CONDITIONING": ["positive", 0],
    "LATENT": ["size", 0],
    "IMAGE": ["image", 0],
    "DIAGONAL_SCHEDULE": ["schedule", 0],
    "DIAGONAL_CONTEXT": ["context", 0],
    "DIAGONAL_OPTICAL_FLOW": ["flow", 0],
}
"""Type -> where a graph of `support` has one."""
SMALL: dict[str, dict[str, Any]] = {
    "DiagonalStreamVideo": {"width": 64, "height": 64, "length": 0.5, "context": None},
    "DiagonalChunkSampler": {"context": None, "optical_flow": None},
    "DiagonalFlowConditioning": {"width": 64, "height": 64, "length": 9, "pan_x": 1.0, "previous": None},
    "DiagonalPromptSchedule": {"previous": None},
    "DiagonalContextFrames": {"latent_frames": 1, "latent": None},
    "DiagonalModelLoader": {"ckpt_name": CHECKPOINT},
}
"""Values other than the defaults; None leaves an optional input out."""


def place_files(models: Path) -> None:
    """A tiny checkpoint and a LoRA in a server's model folders."""
    for kind in ("diffusion_models", "loras"):
        (models / kind).mkdir(parents=True, exist_ok=True)
    LAYOUTS["causvid, generator"](models / "diffusion_models", tiny_wan(0), {})
    write_lora(models / "loras", "longlive, generator_lora")


def pack_nodes(info: dict[str, Any]) -> dict[str, Any]:
    """Of /object_info those of this pack."""
    return {name: node for name, node in info.items() if name.startswith(PACK_PREFIX)}


def inputs_of(node: dict[str, Any]) -> dict[str, tuple[Any, dict]]:
    """Input name -> (type or list of choices, options), required ones first."""
    found = {}
    for kind in ("required", "optional"):
        for name, spec in (node["input"].get(kind) or {}).items():
            found[name] = (spec[0], spec[1] if len(spec) > 1 else {})
    return found


def choices(spec: tuple[Any, dict]) -> list:
    """What a combo offers; empty for another type."""
    kind, options = spec
    return kind if isinstance(kind, list) else options.get("options", []) if kind == "COMBO" else []


def sound_inputs(name: str, node: dict[str, Any]) -> dict[str, Any]:
    """Inputs with which the node runs in a graph of `support`."""
    inputs: dict[str, Any] = {}
    for key, spec in inputs_of(node).items():
        kind, options = spec
        if key in SMALL.get(name, {}):
            value = SMALL[name][key]
        elif isinstance(kind, str) and kind in LINKS:
            value = LINKS[kind]
        elif "default" in options:
            value = options["default"]
        else:
            value = next(iter(choices(spec)), None)
        if value is not None:
            inputs[key] = value
    return inputs


def support(info: dict[str, Any]) -> dict[str, Any]:
    """Nodes that the links of LINKS come from."""
    own = pack_nodes(info)
    graph = {
        "loader": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "student"}},
        "positive": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a red circle moves right", "clip": ["loader", 1]},
        },
        "size": {
            "class_type": "EmptyARVideoLatent",
            "inputs": {"width": 64, "height": 64, "length": 9, "batch_size": 1},
        },
        "image": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 255},
        },
    }
    for key, name in (
        ("schedule", "DiagonalSchedule"),
        ("context", "DiagonalContextFrames"),
        ("flow", "DiagonalFlowConditioning"),
    ):
        graph[key] = {"class_type": name, "inputs": sound_inputs(name, own[name])}
    return graph


def sound_graph(info: dict[str, Any], name: str) -> dict[str, Any]:
    """A graph that runs one node of the pack, called `tested`, and looks at its first output."""
    graph = support(info)
    graph["tested"] = {"class_type": name, "inputs": sound_inputs(name, info[name])}
    if not info[name].get("output_node"):
        graph["out"] = {"class_type": "PreviewAny", "inputs": {"source": ["tested", 0]}}
    return graph
