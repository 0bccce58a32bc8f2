"""The chunk sampler in a real server: progress, previews, Cancel, messages, and a Wan from ComfyUI's own loader."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import uuid

import numpy as np
import pytest
import torch
from open_page import overhear
from PIL import Image
from safetensors.torch import load_file, save_file

from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.schedule import DiagonalSchedule

aiohttp = pytest.importorskip("aiohttp")

DEMO_TEXT_DIM = 128
STEPS = 2
PREVIEW_IMAGE = 1  # ComfyUI's binary event


def demo_graph(*, length: int, prompt: str = "a red circle moves right", model=None, seed: int = 1, cfg: float = 2.0):
    """The demo's graph up to a saved latent; `model` replaces the demo's DiT by other nodes and an output.

    ComfyUI has none in its cache: context_sigma, which is not used in this mode, is another each time.
    """
    extra, output = model or ({}, ["loader", 0])
    return {
        "loader": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "teacher"}},
        **extra,
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["loader", 1]}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["loader", 1]}},
        "size": {
            "class_type": "EmptyARVideoLatent",
            "inputs": {"width": 64, "height": 64, "length": length, "batch_size": 1},
        },
        "schedule": {
            "class_type": "DiagonalSchedule",
            "inputs": {
                "preset": "undistilled",
                "steps": str(STEPS),
                "context_mode": "from preset",
                "context_sigma": 0.3 + uuid.uuid4().int / 2**128 / 10,
                "shift": 0.0,
                "frames_per_chunk": 0,
                "sigmas": "",
            },
        },
        "sampler": {
            "class_type": "DiagonalChunkSampler",
            "inputs": {
                "model": output,
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["size", 0],
                "schedule": ["schedule", 0],
                "seed": seed,
                "cfg": cfg,
                "denoise": 1.0,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "latents/t"}},
    }


def saved_latent(server, outputs):
    (item,) = outputs["save"]["latents"]
    return load_file(server.output_dir / item["subfolder"] / item["filename"])["latent_tensor"]


async def watch(server, graph, on_event):
    """Queue a graph with a websocket open; hand every event to `on_event` until the prompt ends."""
    client = uuid.uuid4().hex
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0) as socket:
            body = {"prompt": graph, "client_id": client, "extra_data": {"preview_method": "latent2rgb"}}
            async with session.post(f"{server.url}/prompt", json=body) as answer:
                assert answer.status == 200, await answer.text()
                prompt_id = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    await on_event(session, "binary", message.data)
                    continue
                event = json.loads(message.data)
                await on_event(session, event["type"], event["data"])
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return prompt_id, event["type"], event["data"]
    raise AssertionError("the socket closed before the prompt ended")


def test_progress_counts_every_forward_and_the_preview_follows(comfy_server):
    progress, chunks, previews, played, order = [], [], [], [], []

    async def on_event(session, kind, data):
        if kind == "progress":
            progress.append((data["value"], data["max"]))
        elif kind == "diagonal.progress":
            chunks.append((data["chunk"], data["chunks"], data["forwards"], data["total"]))
            order.append(data["chunk"])
        elif kind == "diagonal.chunk":
            played.append(data)
            order.append("pictures")
        elif kind == "binary":
            previews.append(data)

    _, end, data = asyncio.run(watch(comfy_server, demo_graph(length=33), on_event))
    assert end == "execution_success", data
    nfe = DiagonalSchedule.preset("undistilled", steps=(STEPS,)).nfe(3)
    assert progress == [(i, nfe) for i in range(1, nfe + 1)]
    assert chunks[0] == (1, 3, 1, nfe) and chunks[-1] == (3, 3, nfe, nfe)
    assert len(previews) == nfe
    assert previews[0] != previews[-1]
    assert [data["pixel_frames"] for data in played] == [9, 21, 33]
    # A chunk's pictures are there before the next chunk is begun.
    assert order == [step for chunk in (1, 2, 3) for step in (*[chunk] * (nfe // 3), "pictures")]
    # The demo's own decoder makes the pictures: 64x64, one for each latent frame, with something on the ground.
    pictures = [base64.b64decode(frame.partition(",")[2]) for data in played for frame in data["frames"]]
    decoded = [np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]
    assert [picture.shape for picture in decoded] == [(64, 64, 3)] * 9
    assert all(int(picture.max()) - int(picture.min()) > 100 for picture in decoded)


def test_a_run_without_a_client_plays_on_no_page(comfy_server):
    heard = asyncio.run(overhear(comfy_server, demo_graph(length=33, seed=21)))
    assert "status" in heard, "the page is open"
    assert not [kind for kind in heard if kind.startswith("diagonal.")]


def test_what_the_run_is_warned_of_reaches_the_node_with_its_guidance(comfy_server):
    events = []

    async def on_event(session, kind, data):
        if kind == "diagonal.progress":
            events.append(data)

    graph = demo_graph(length=33, seed=22)  # of the teacher, which was made for 12 steps
    graph["positive"] = {
        "class_type": "DiagonalPromptSchedule",
        "inputs": {
            "clip": ["loader", 1],
            "text": "0: a red circle moves right\n20s: a blue square moves up",
            "switch": "keep",
            "blend_chunks": 2,
            "fps": 16.0,
        },
    }
    assert asyncio.run(watch(comfy_server, graph, on_event))[1] == "execution_success"
    assert any("but the file was trained with (12,)" in line for line in events[0]["warnings"]), events[0]
    assert any("comes after the end: the video has 3 chunks" in line for line in events[0]["warnings"])
    assert len(set(events[0]["warnings"])) == len(events[0]["warnings"])
    assert {event["guided"] for event in events} == {True}
    before, graph = len(events), demo_graph(length=33, seed=22, cfg=1.0)
    graph["schedule"]["inputs"]["steps"] = ""
    assert asyncio.run(watch(comfy_server, graph, on_event))[1] == "execution_success"
    assert {event["guided"] for event in events[before:]} == {False}
    assert [event["warnings"] for event in events[before:]] == [[]] * len(events[before:]), "of its own run alone"


LONG = {"steps": "1000," * 12_000}


def test_the_schedule_is_drawn_by_the_code_that_the_node_runs(comfy_server):
    widgets = {"preset": "diagonal 4-3-2", "steps": "5,3", "context_mode": "clean", "context_sigma": "0.3"}
    widgets |= {"shift": "0", "frames_per_chunk": "0"}
    status, drawn = comfy_server.post("/diagonal/schedule", {**widgets, "sigmas": ""})
    assert status == 200
    schedule = DiagonalSchedule.preset("diagonal 4-3-2", steps=(5, 3))
    assert drawn["sigmas"] == [list(schedule.chunk_sigmas(chunk)) for chunk in range(7)]
    assert drawn["cache_pass"] == 0 and drawn["context_sigma"] == [0] * 7 and drawn["editable"]
    assert drawn["cost"]["forwards"] == 30 and drawn["context_mode"] == "clean" and drawn["uninformative"] is None
    for bad in ({"steps": "x"}, {"shift": "x"}, {"frames_per_chunk": "1.5"}, {"preset": "none"}, {"sigmas": "2"}, LONG):
        status, answer = comfy_server.post("/diagonal/schedule", {**widgets, **bad})
        assert status == 200 and list(answer) == ["error"] and answer["error"], bad
    assert "steps is missing" in comfy_server.post("/diagonal/schedule", {"preset": "krea", "steps": None})[1]["error"]
    # As long as a schedule for hours is, which no address may be.
    status, drawn = comfy_server.post("/diagonal/schedule", {**widgets, "steps": "4,3," * 10_000 + "3"})
    assert status == 200 and drawn["listed"] == 20_001 and len(drawn["sigmas"]) == 24
    status, answer = comfy_server.post("/diagonal/schedule", {**widgets, "steps": "4," * 40_000})
    assert status == 413 and "larger than" in answer["error"]
    status, answer = comfy_server.post("/diagonal/schedule", {**widgets, "shift": 5})
    assert status == 400 and "shift is 5; it must be text" in answer["error"]


def test_cancel_stops_within_a_forward_and_the_next_run_is_clean(comfy_server):
    before = saved_latent(comfy_server, comfy_server.run(demo_graph(length=33, seed=8)))
    moments, late = {}, []

    async def on_event(session, kind, data):
        if kind == "progress" and data["value"] == 3:
            moments["cancel"] = time.monotonic()
            async with session.post(f"{comfy_server.url}/interrupt"):
                moments["answered"] = time.monotonic()
        if kind == "progress" and "answered" in moments:
            late.append(data["value"])

    _, end, _ = asyncio.run(watch(comfy_server, demo_graph(length=1021, seed=7), on_event))
    assert end == "execution_interrupted"
    # Progress that was on its way when the answer came still arrives; 258 forwards would follow without the cancel.
    assert len(late) < 100
    assert time.monotonic() - moments["answered"] < 5
    graph = demo_graph(length=33, seed=8)
    graph["save"]["inputs"]["filename_prefix"] = "latents/after"
    after = saved_latent(comfy_server, comfy_server.run(graph))
    assert torch.equal(before, after)


def test_an_unknown_word_is_an_error_that_lists_the_known_ones(comfy_server):
    entry = comfy_server.wait(comfy_server.queue(demo_graph(length=33, prompt="a purple dog")))
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert "dog" in error["exception_message"] and "triangle" in error["exception_message"]


def test_bad_schedules_are_errors_that_name_the_widget(comfy_server):
    for widget, value, words in (("steps", "4,x", "steps is '4,x'"), ("sigmas", "0.5, 0.9", "descend")):
        graph = demo_graph(length=33)
        graph["schedule"]["inputs"][widget] = value
        entry = comfy_server.wait(comfy_server.queue(graph))
        (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        assert error["node_id"] == "schedule" and words in error["exception_message"]


def test_a_wan_from_comfyuis_own_loader_becomes_causal(comfy_server):
    torch.manual_seed(3)
    network = WanDiT(WanConfig(dim=128, ffn_dim=256, num_layers=2, text_dim=DEMO_TEXT_DIM))
    torch.nn.init.normal_(network.head.head.weight, std=0.05)
    folder = comfy_server.output_dir.parent / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    header = {"config": json.dumps({"transformer": {"text_dim": DEMO_TEXT_DIM}})}
    save_file(network.state_dict(), folder / "plain_wan.safetensors", metadata=header)
    nodes = {
        "unet": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "plain_wan.safetensors", "weight_dtype": "default"},
        },
        "causal": {
            "class_type": "DiagonalCausalAttention",
            "inputs": {"model": ["unet", 0], "frames_per_chunk": 3, "window": 6, "sink": 3, "positions": "auto"},
        },
    }
    latent = saved_latent(comfy_server, comfy_server.run(demo_graph(length=33, model=(nodes, ["causal", 0]))))
    assert latent.shape == (1, 16, 9, 8, 8)
    entry = comfy_server.wait(comfy_server.queue(demo_graph(length=33, model=(nodes, ["unet", 0]))))
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert "Diagonal Causal Attention" in error["exception_message"]
