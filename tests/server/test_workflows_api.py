"""The API graphs against a real server: each one valid, and the demo run to its video."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diagonal_sampler import captions
from distillation.score import find_blobs, score_clip

av = pytest.importorskip("av")

ROOT = Path(__file__).resolve().parents[2]
API = sorted((ROOT / "workflows" / "api").glob("*.json"))
MODEL_WIDGETS = {"ckpt_name", "unet_name", "clip_name", "vae_name", "lora_name"}
LOADERS = {"DiagonalModelLoader", "UNETLoader", "CLIPLoader", "VAELoader"}
TILE_COLUMNS = 9
THUMBNAIL_PIXELS = 512
ARTIFACTS = ROOT / "test-artifacts"


def _graph(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _folder(widget: str, file: str) -> str:
    """The folder below models/ that the notes name for a file."""
    if widget == "vae_name":
        return "vae_approx" if file.startswith("lighttae") else "vae"
    return {"clip_name": "text_encoders", "lora_name": "loras"}.get(widget, "diffusion_models")


def _model_files(graph: dict) -> dict[str, str]:
    """File name -> folder, of every model that a graph needs."""
    return {
        value: _folder(name, value)
        for node in graph.values()
        for name, value in node["inputs"].items()
        if name in MODEL_WIDGETS and value != "none"
    }


NEED_MODELS = [path for path in API if _model_files(_graph(path))]
BUNDLED = {
    "demo", "compare", "endless_prompts", "extend_video", "image_to_video", "restyle_video", "stream_to_disk",
    "drive_by_track", "transfer_motion", "camera_motion",
}  # fmt: skip


def test_all_other_graphs_need_no_file():
    assert BUNDLED == {path.stem for path in API} - {path.stem for path in NEED_MODELS}


@pytest.mark.parametrize("path", NEED_MODELS, ids=lambda path: path.stem)
def test_missing_model_files_are_the_only_complaint(comfy_server, path):
    graph = _graph(path)
    status, answer = comfy_server.post("/prompt", {"prompt": graph})
    assert status == 400, "a heavy graph was queued: its models are on the test server"
    complaints = set()
    for node_id, node in answer["node_errors"].items():
        for error in node["errors"]:
            assert error["type"] == "value_not_in_list", error
            name = error["extra_info"]["input_name"]
            assert name in MODEL_WIDGETS and graph[node_id]["class_type"] in LOADERS, error
            complaints.add(error["extra_info"]["received_value"])
    assert complaints == set(_model_files(graph))


@pytest.fixture
def placeholders(comfy_server) -> Iterator[callable]:
    """A function that puts empty files where a graph's models go; they are removed again."""
    made = []

    def place(graph: dict) -> None:
        for name, folder in _model_files(graph).items():
            file = comfy_server.output_dir.parent / "models" / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.touch()
                made.append(file)

    yield place
    for file in made:
        file.unlink()


@pytest.mark.parametrize("path", NEED_MODELS, ids=lambda path: path.stem)
def test_with_the_files_in_the_folders_of_the_note_the_graph_is_valid(comfy_server, placeholders, path):
    graph = _graph(path)
    placeholders(graph)
    entry = comfy_server.wait(comfy_server.queue(graph))  # queue() raises where a node has a complaint
    assert entry["status"]["status_str"] == "error"  # the files are empty, so the first loader that runs says so
    (error,) = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
    assert error["node_type"] in LOADERS


def test_the_templates_of_comfyui_list_the_workflows(comfy_server):
    templates = comfy_server.get("/workflow_templates")
    (names,) = [names for pack, names in templates.items() if "diagonal" in pack]
    assert sorted(names) == [path.stem for path in API]


def test_the_demos_note_lists_its_words():
    canvas = _graph(ROOT / "workflows" / "demo.json")
    (note,) = [node["widgets_values"][0] for node in canvas["nodes"] if node["type"] == "MarkdownNote"]
    for words in (captions.SHAPES, captions.COLOURS, captions.DIRECTIONS, captions.SPEEDS):
        assert f": {', '.join(words)}\n" in note


def _frames(video: Path) -> tuple[np.ndarray, Fraction, str]:
    """All frames [T, H, W, 3] as bytes, frames a second, and the codec."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context.name


def _tile(frames: np.ndarray, file: Path) -> None:
    """All frames in reading order on one PNG."""
    count, height, width, _ = frames.shape
    rows = -(-count // TILE_COLUMNS)
    sheet = np.full((rows * TILE_COLUMNS, height + 2, width + 2, 3), 32, np.uint8)
    sheet[:count, 1:-1, 1:-1] = frames
    sheet = sheet.reshape(rows, TILE_COLUMNS, height + 2, width + 2, 3).swapaxes(1, 2)
    Image.fromarray(sheet.reshape(rows * (height + 2), TILE_COLUMNS * (width + 2), 3)).save(file)


def _saved(comfy_server, graph: dict) -> list[dict]:
    """Runs a graph; what it saved in the output folder, so not what nodes show of themselves."""
    shown = [item for output in comfy_server.run(graph).values() for item in output.get("images", [])]
    return [item for item in shown if item["type"] == "output"]


def _run(comfy_server, name: str) -> tuple[np.ndarray, Fraction, dict]:
    """Runs a bundled graph: its frames, frames a second, and the graph. Leaves what a person would look at."""
    graph = _graph(ROOT / "workflows" / "api" / f"{name}.json")
    # A graph with motion also saves how the motion looks, under the same name with _flow behind it.
    (saved,) = [
        item for item in _saved(comfy_server, graph) if not item["filename"].startswith(f"diagonal_{name}_flow_")
    ]
    video = comfy_server.output_dir / saved["subfolder"] / saved["filename"]
    assert video.suffix == ".mp4"
    frames, rate, codec = _frames(video)
    assert codec == "h264"
    ARTIFACTS.mkdir(exist_ok=True)
    _tile(frames, ARTIFACTS / f"{name}_frames.png")
    # After a retraining this is the new workflows/NAME.jpg.
    middle = Image.fromarray(frames[len(frames) // 2])
    scale = THUMBNAIL_PIXELS / max(middle.size)
    size = (round(middle.width * scale), round(middle.height * scale))
    middle.resize(size, Image.Resampling.NEAREST).save(ARTIFACTS / f"{name}.jpg")
    return frames, rate, graph


def _sprites(frames: np.ndarray, prompt: str) -> list:
    return score_clip(torch.from_numpy(frames).movedim(-1, 1), prompt).sprites


def _prompt(graph: dict) -> str:
    (prompt,) = [node["inputs"]["text"] for node in graph.values() if node["inputs"].get("text")]
    return prompt


def test_the_comparison_stands_side_by_side(comfy_server):
    frames, rate, graph = _run(comfy_server, "compare")
    assert frames.shape == (81, 64, 3 * 64 + 2 * 4, 3) and rate == 16
    for left in (0, 68, 136):
        (sprite,) = _sprites(frames[:, :, left : left + 64], _prompt(graph))
        assert sprite.colour_right and sprite.direction_right, left


def test_an_extended_video_goes_on_without_a_jump(comfy_server):
    frames, _, graph = _run(comfy_server, "extend_video")
    join, repeated = 81, 21
    assert frames.shape == (2 * 81 - repeated, 64, 64, 3)
    pixels = frames.astype(np.float32)
    colour = np.abs(np.diff(pixels.mean((1, 2)), axis=0)).max(1)
    edges = np.abs(np.diff(pixels, axis=2)).mean((1, 2, 3))
    for name, steps in (("colour", colour), ("sharpness", np.abs(np.diff(edges)))):
        others = np.delete(steps, join - 1)
        assert steps[join - 1] <= others.max(), (name, steps[join - 1], others.max())
    (sprite,) = _sprites(frames[join - repeated :], _prompt(graph))
    assert sprite.colour_right and sprite.shape_right


def test_a_picture_becomes_the_first_frame_and_moves(comfy_server):
    frames, _, graph = _run(comfy_server, "image_to_video")
    assert frames.shape == (81, 64, 64, 3)
    picture = np.full((64, 64, 3), 64, np.float32)
    picture[26:40, 12:26] = (235, 30, 30)
    assert np.abs(frames[0] - picture).mean() < 6
    (sprite,) = _sprites(frames, _prompt(graph))
    assert sprite.colour_right and sprite.direction_right


def test_a_stream_lies_on_the_disk(comfy_server):
    frames, rate, graph = _run(comfy_server, "stream_to_disk")
    assert frames.shape == (320, 64, 64, 3) and rate == 16
    assert all(sprite.colour_right for sprite in _sprites(frames[:81], _prompt(graph)))


def test_a_stream_follows_three_prompts(comfy_server):
    frames, _, graph = _run(comfy_server, "endless_prompts")
    (rows,) = [node["inputs"]["text"].splitlines() for node in graph.values() if "switch" in node["inputs"]]
    assert frames.shape[0] == 480
    for number, row in enumerate(rows):
        part = frames[160 * number + 60 : 160 * number + 141]
        (sprite,) = _sprites(part, row.partition(": ")[2])
        assert sprite.colour_right, row


def _path(frames: np.ndarray, colour: str) -> np.ndarray:
    """[T, 2] centres of a colour."""
    blobs = find_blobs(torch.from_numpy(frames).movedim(-1, 1).float())
    return blobs.centroid(colour).numpy()


def _other(comfy_server, graph: dict, change: Callable[[dict], None]) -> np.ndarray:
    """The frames of a changed graph, without the picture of its motion."""
    graph = json.loads(json.dumps(graph))
    change(graph)
    graph = {
        key: node for key, node in graph.items() if not node["inputs"].get("filename_prefix", "").endswith("_flow")
    }
    (saved,) = _saved(comfy_server, graph)
    return _frames(comfy_server.output_dir / saved["subfolder"] / saved["filename"])[0]


def _motion_off(graph: dict) -> None:
    (flow,) = [node for node in graph.values() if node["class_type"] == "DiagonalFlowConditioning"]
    flow["inputs"]["strength"] = 0


def _show_driver(graph: dict) -> None:
    """Saves the driving video in the place of the result."""
    (flow,) = [node for node in graph.values() if node["class_type"] == "DiagonalFlowConditioning"]
    (save,) = [node for node in graph.values() if node["inputs"].get("filename_prefix", "").endswith("transfer_motion")]
    graph[save["inputs"]["video"][0]]["inputs"]["images"] = flow["inputs"]["video"]


def test_a_square_goes_along_a_track(comfy_server):
    frames, _, graph = _run(comfy_server, "drive_by_track")
    assert frames.shape == (81, 64, 64, 3)
    (track,) = [node["inputs"] for node in graph.values() if node["class_type"] == "GenerateTracks"]
    start, middle, end = (np.array([track[f"{name}_x"], track[f"{name}_y"]]) * 64 for name in ("start", "mid", "end"))
    t = np.linspace(0, 1, 81)[:, None]
    wanted = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    away, free = (
        np.linalg.norm(_path(video, "red") - wanted, axis=1)
        for video in (frames, _other(comfy_server, graph, _motion_off))
    )
    assert away.mean() < 6 and away[-1] < 8
    assert free.mean() > 2 * away.mean(), "without the track it bounces and comes back"


def test_a_square_moves_as_another_video_does(comfy_server):
    pytest.importorskip("cv2", reason="motion is measured by OpenCV")
    frames, _, graph = _run(comfy_server, "transfer_motion")
    driver = _other(comfy_server, graph, _show_driver)
    red, cyan, free = (
        _path(video, colour)[::4]
        for video, colour in ((driver, "red"), (frames, "cyan"), (_other(comfy_server, graph, _motion_off), "cyan"))
    )
    moved, other, usual = (np.diff(path, axis=0) for path in (red, cyan, free))
    assert np.linalg.norm(other - moved, axis=1).mean() < 0.6 * np.linalg.norm(usual - moved, axis=1).mean()


def _save_the_first_video(graph: dict) -> None:
    """Saves the video that another is made over, in place of that one."""
    (number,) = [number for number, node in graph.items() if node["class_type"] == "DiagonalStreamVideo"]
    video = graph.pop(number)["inputs"]["video"]
    inputs = {"video": video, "filename_prefix": "video/first", "format": "mp4", "codec": "h264"}
    graph["save"] = {"class_type": "SaveVideo", "inputs": inputs}


def _make_all_anew(graph: dict) -> None:
    (stream,) = [node for node in graph.values() if node["class_type"] == "DiagonalStreamVideo"]
    stream["inputs"]["denoise"] = 1


def test_a_video_is_made_over_another(comfy_server):
    frames, rate, graph = _run(comfy_server, "restyle_video")
    (prompt,) = [node["inputs"]["text"] for node in graph.values() if node["_meta"]["title"] == "New prompt"]
    assert prompt == "a red cross moves right" and frames.shape == (81, 64, 64, 3) and rate == 16
    (sprite,) = _sprites(frames, prompt)
    assert sprite.colour_right and sprite.shape_right
    first, free = (_other(comfy_server, graph, change) for change in (_save_the_first_video, _make_all_anew))
    assert len(first) == 81, "it ends with the video that it is made over"
    apart, usual = (
        np.linalg.norm(_path(video, "red") - _path(first, "red"), axis=1).mean() for video in (frames, free)
    )
    assert apart < 2 and usual > 4, (apart, usual)


def test_a_camera_slows_the_picture_down(comfy_server):
    frames, _, graph = _run(comfy_server, "camera_motion")
    speed, free = (
        np.abs(np.diff(_path(video, "green")[:, 0])).mean()
        for video in (frames, _other(comfy_server, graph, _motion_off))
    )
    print(speed, free)
    assert speed < 0.6 * free


def test_the_demo_runs_and_its_video_shows_what_the_prompt_says(comfy_server):
    frames, rate, graph = _run(comfy_server, "demo")
    prompt = _prompt(graph)
    assert frames.shape == (81, 64, 64, 3)
    assert rate == 16
    (sprite,) = _sprites(frames, prompt)
    assert sprite.colour_right and sprite.direction_right and sprite.shape_right, sprite
