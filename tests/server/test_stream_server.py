"""The stream node in a real server: Cancel and resume of one graph, what the page gets, metadata, refusals."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.parse
import urllib.request
import uuid

import numpy as np
import pytest
from open_page import overhear

aiohttp = pytest.importorskip("aiohttp")
av = pytest.importorskip("av")

FRAMES = 160


def stream_graph(prefix: str, **widgets):
    """The demo straight to a video of 160 frames, 14 chunks."""
    values = {
        "width": 64,
        "height": 64,
        "length": 10.0,
        "fps": 16.0,
        "seed": 1,
        "cfg": 1.0,
        "filename_prefix": prefix,
        "format": "mp4",
        "crf": 20.0,
        "state_every": 2,
        "restart": False,
        "keep_state": False,
        **widgets,
    }
    links = {"model": 0, "vae": 2}
    return {
        "loader": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "teacher"}},
        "positive": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a red circle moves right", "clip": ["loader", 1]},
        },
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["loader", 1]}},
        "schedule": {
            "class_type": "DiagonalSchedule",
            "inputs": {
                "preset": "undistilled",
                "steps": "2",
                "context_mode": "from preset",
                "context_sigma": 0.357,
                "shift": 0.0,
                "frames_per_chunk": 0,
                "sigmas": "",
            },
        },
        "stream": {
            "class_type": "DiagonalStreamVideo",
            "inputs": {
                **{name: ["loader", output] for name, output in links.items()},
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "schedule": ["schedule", 0],
                **values,
            },
        },
    }


async def run(server, graph, *, workflow=None, cancel_at: int | None = None, finish_at: int | None = None):
    """Queue a graph, perhaps cancel or finish it once that many frames can be watched: how it ended, events, texts."""
    client = uuid.uuid4().hex
    frames, texts = [], []
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0) as socket:
            extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
            body = {"prompt": graph, "client_id": client, "extra_data": extra}
            async with session.post(f"{server.url}/prompt", json=body) as answer:
                assert answer.status == 200, await answer.text()
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    if message.data[:4] == b"\0\0\0\3":  # a text for a node
                        texts.append(message.data[8:].decode(errors="replace"))
                    continue
                event = json.loads(message.data)
                if event["type"] == "diagonal.stream":
                    frames.append(event["data"])
                    if cancel_at is not None and frames[-1]["frames"] >= cancel_at:
                        cancel_at = None
                        async with session.post(f"{server.url}/interrupt"):
                            pass
                    if finish_at is not None and frames[-1]["frames"] >= finish_at:
                        finish_at = None
                        for body, status in (
                            ({"client_id": "somebody"}, 403),
                            ({"client_id": client, "node": "nobody"}, 404),
                            ({}, 400),
                            ({"client_id": client, "node": "stream"}, 200),
                        ):
                            async with session.post(f"{server.url}/diagonal/finish", json=body) as answer:
                                assert answer.status == status, await answer.text()
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    # ComfyUI writes its history a moment after it says that it is done.
                    outputs = server.wait(event["data"]["prompt_id"])["outputs"]
                    return event["type"], event["data"], outputs.get("stream"), frames, texts
    raise AssertionError("the socket closed before the prompt ended")


def packets(video: bytes) -> list[bytes]:
    with av.open(io.BytesIO(video)) as container:
        return [bytes(packet) for packet in container.demux(video=0)]


def pictures(video: bytes) -> np.ndarray:
    """[frames, height, width, 3] in 0..255."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.float32)


def view(server, item) -> bytes:
    with urllib.request.urlopen(f"{server.url}/view?{urllib.parse.urlencode(item)}") as answer:
        return answer.read()


@pytest.fixture
def streams() -> str:
    """A folder that no other test has written to, so that nothing is in ComfyUI's cache either."""
    return f"streams-{uuid.uuid4().hex}"


def test_cancel_resume_and_again(comfy_server, streams):
    graph = stream_graph(f"{streams}/a")
    folder = comfy_server.output_dir / streams
    workflow = {"nodes": [{"id": n, "type": "Note", "text": "words; = # \\ \n"} for n in range(6000)]}
    assert len(json.dumps(workflow)) > 200_000
    end, _, _, frames, _ = asyncio.run(run(comfy_server, graph, workflow=workflow, cancel_at=20))
    assert end == "execution_interrupted" and frames[-1]["filename"] == "a_00001_.mp4"
    assert sorted(path.name for path in folder.iterdir()) == ["a_00001_.mp4", "a_00001_.state.safetensors"]
    with av.open(str(folder / "a_00001_.mp4")) as container:
        there = sum(1 for _ in container.decode(video=0))
    assert frames[-1]["frames"] <= there < FRAMES

    end, data, shown, frames, texts = asyncio.run(run(comfy_server, graph, workflow=workflow))
    assert end == "execution_success", data
    item = {"filename": "a_00001_.mp4", "subfolder": streams, "type": "output"}
    assert shown["images"] == [item] and shown["animated"] == [True]
    assert "Resumed a_00001_.mp4" in shown["text"][0] and "160 frames" in shown["text"][0]
    assert any("Resumed a_00001_.mp4" in text for text in texts)
    resumed_at = frames[0]["resumed_at"]
    assert resumed_at > 0 and frames[-1]["frames"] == frames[-1]["length"] == FRAMES
    assert {key: frames[-1][key] for key in item} == item
    assert [path.name for path in folder.iterdir()] == ["a_00001_.mp4"]
    with av.open(io.BytesIO(view(comfy_server, item))) as container:
        metadata = dict(container.metadata)
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert json.loads(metadata["workflow"]) == workflow
    assert json.loads(metadata["prompt"])["stream"]["inputs"]["seed"] == 1
    assert all(node.keys() == {"class_type", "inputs"} for node in json.loads(metadata["prompt"]).values())

    # The finished graph again is ComfyUI's to answer from its cache, as with Save Video; restart makes another.
    assert asyncio.run(run(comfy_server, graph))[0] == "execution_success"
    assert [path.name for path in folder.iterdir()] == ["a_00001_.mp4"]
    for number in (2, 3):
        again = asyncio.run(run(comfy_server, stream_graph(f"{streams}/a", restart=True)))[2]
        assert again["images"][0]["filename"] == f"a_{number:05}_.mp4"
    # A Cancel begins a key frame wherever it came, so that from there only the pictures are the uncut video's.
    resumed, uncut = view(comfy_server, item), view(comfy_server, again["images"][0])
    assert packets(resumed)[:resumed_at] == packets(uncut)[:resumed_at]
    assert np.abs(pictures(resumed) - pictures(uncut)).mean(axis=(1, 2, 3)).max() < 2, resumed_at


def test_finish_ends_early_feeds_the_next_nodes_and_the_same_graph_goes_on(comfy_server, streams):
    graph = stream_graph(f"{streams}/early")
    graph["parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["stream", 0]}}
    saved = {"images": ["parts", 0], "filename_prefix": f"{streams}/early"}
    graph["save"] = {"class_type": "SaveImage", "inputs": saved}
    end, data, shown, frames, _ = asyncio.run(run(comfy_server, graph, finish_at=9))
    assert end == "execution_success", data
    (item,) = shown["images"]
    with av.open(io.BytesIO(view(comfy_server, item))) as container:
        count = sum(1 for _ in container.decode(video=0))
    assert 9 <= count < FRAMES and f"Finished early, and queued again it goes on: {count} frames" in shown["text"][0]
    assert len(list(comfy_server.output_dir.glob(f"{streams}/early*.png"))) == count

    end, data, shown, frames, _ = asyncio.run(run(comfy_server, graph))
    assert end == "execution_success", data
    assert shown["images"] == [item] and "Resumed" in shown["text"][0] and f"Done: {FRAMES} frames" in shown["text"][0]
    assert asyncio.run(run(comfy_server, graph))[0] == "execution_success"
    assert len(list(comfy_server.output_dir.glob(f"{streams}/early*.mp4"))) == 1, "the whole one is ComfyUI's to answer"

    async def late():
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{comfy_server.url}/diagonal/finish", json={"client_id": "C"}) as answer:
                return answer.status, (await answer.json())["error"]

    status, words = asyncio.run(late())
    assert status == 409 and "No run can be finished now" in words


def test_a_run_without_a_client_is_shown_on_no_page(comfy_server, streams):
    heard = asyncio.run(overhear(comfy_server, stream_graph(f"{streams}/unseen", length=1.0)))
    assert "status" in heard, "the page is open"
    assert not [kind for kind in heard if kind.startswith("diagonal.") or kind == "text for a node"]
    assert list(comfy_server.output_dir.glob(f"{streams}/unseen*.mp4"))


def test_the_outputs_feed_other_nodes(comfy_server, streams):
    """The VIDEO into its parts, the context into another stream."""
    graph = stream_graph(f"{streams}/first", length=1.0)
    graph["second"] = {
        "class_type": "DiagonalStreamVideo",
        "inputs": {
            **graph["stream"]["inputs"],
            "context": ["stream", 1],
            "filename_prefix": f"{streams}/second",
            "format": "png",
            "length": 2.0,
        },
    }
    graph["parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["second", 0]}}
    saved = {"images": ["parts", 0], "filename_prefix": f"{streams}/image"}
    graph["save"] = {"class_type": "SaveImage", "inputs": saved}
    outputs = comfy_server.run(graph)
    assert len(outputs["save"]["images"]) == 32
    assert outputs["second"]["images"] == [
        {"filename": "00000032.png", "subfolder": f"{streams}/second_00001_", "type": "output", "in_sequence": True}
    ]
    assert view(comfy_server, outputs["second"]["images"][0])[:4] == b"\x89PNG"


def test_refusals_reach_the_page(comfy_server, streams):
    for change, words in (
        ({"filename_prefix": "../../escaped"}, "leaves ComfyUI's output folder"),
        ({"width": 72}, "width is 72 pixels; it must be a multiple of 16"),
    ):
        graph = stream_graph(f"{streams}/refused", **change)
        entry = comfy_server.wait(comfy_server.queue(graph))
        (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        assert error["node_id"] == "stream" and words in error["exception_message"]
    assert not list(comfy_server.output_dir.glob(f"{streams}/refused*"))
