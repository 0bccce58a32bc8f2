"""Prompts over time in a real server: on a schedule, and by one HTTP call while the demo runs."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest
import torch
from safetensors.torch import load_file

aiohttp = pytest.importorskip("aiohttp")

RED, BLUE = "a red circle moves right", "a blue circle moves right"
CHUNKS = 12
FRAMES = 4 * (3 * CHUNKS - 1) + 1
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


def graph(text: str, *, switch: str = "recache", seed: int = 2, steps: str = "12"):
    return {
        "loader": {"class_type": "DiagonalDemoLoader", "inputs": {"weights": "teacher"}},
        "prompts": {
            "class_type": "DiagonalPromptSchedule",
            "inputs": {"clip": ["loader", 1], "text": text, "switch": switch, "blend_chunks": 2, "fps": 16.0},
        },
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["loader", 1]}},
        "size": {
            "class_type": "EmptyARVideoLatent",
            "inputs": {"width": 64, "height": 64, "length": FRAMES, "batch_size": 1},
        },
        "schedule": {
            "class_type": "DiagonalSchedule",
            "inputs": {
                "preset": "undistilled",
                "steps": steps,
                "context_mode": "from preset",
                "context_sigma": 0.357,
                "shift": 0.0,
                "frames_per_chunk": 0,
                "sigmas": "",
            },
        },
        "sampler": {
            "class_type": "DiagonalChunkSampler",
            "inputs": {
                "model": ["loader", 0],
                "positive": ["prompts", 0],
                "negative": ["negative", 0],
                "latent_image": ["size", 0],
                "schedule": ["schedule", 0],
                "seed": seed,
                "cfg": 5.0,
                "denoise": 1.0,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "latents/p"}},
    }


async def run(server, body_graph, *, at: int | None = None, bodies=()):
    """Queue a graph; at the beginning of chunk `at` (from 1) post bodies. End event, answers, prompt events, latent."""
    client = uuid.uuid4().hex
    answers, events = [], []
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0) as socket:
            async with session.post(f"{server.url}/prompt", json={"prompt": body_graph, "client_id": client}) as answer:
                assert answer.status == 200, await answer.text()
                prompt_id = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    continue
                event = json.loads(message.data)
                if event["type"] == "diagonal.prompt":
                    events.append(event["data"])
                    if event["data"].get("chunk") == at:
                        for body in bodies:
                            data = body(client, prompt_id) if callable(body) else body
                            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
                            async with session.post(f"{server.url}/diagonal/prompt", data=raw) as answer:
                                answers.append((answer.status, await answer.json()))
                if event["type"] in ENDINGS:
                    outputs = server.wait(prompt_id)["outputs"]
                    latent = None
                    if "save" in outputs:
                        (item,) = outputs["save"]["latents"]
                        latent = load_file(server.output_dir / item["subfolder"] / item["filename"])["latent_tensor"]
                    return event["type"], answers, events, latent
    raise AssertionError("the socket closed before the prompt ended")


@pytest.fixture(scope="module")
def frames_of(pack_module):
    """Latents [1, 16, T, 8, 8] to frames [T', 64, 64, 3] in [0, 1]."""
    vae = pack_module("nodes.demo_loader").DiagonalDemoLoader.execute("teacher").result[2]
    return lambda latents: vae.decode(latents)[0]


def blueness(frames: torch.Tensor) -> float:
    """Mean excess of blue over red in the tenth of the pixels that are most coloured."""
    excess = (frames[..., 2] - frames[..., 0]).flatten(1)
    strongest = excess.abs().topk(excess.shape[1] // 10).indices
    return float(excess.gather(1, strongest).mean())


def test_a_copy_of_a_schedule_is_steered_by_its_own_name(comfy_server):
    """ComfyUI's cache gave it what the first one had made, whose name the run then went by."""
    for seed, name in enumerate(("prompts", "copy")):
        queued = graph(f"0: {RED}", steps="1", seed=500 + seed)
        queued[name] = queued.pop("prompts")
        queued["sampler"]["inputs"]["positive"] = [name, 0]
        _, _, events, _ = asyncio.run(run(comfy_server, queued))
        assert {node for event in events for node in event["nodes"]} == {name}


def test_a_live_prompt_changes_the_picture_and_others_are_refused(comfy_server, frames_of):
    def own(**fields):
        return lambda client, prompt_id: {"client_id": client, **fields}

    bodies = [
        {"client_id": "somebody else", "text": BLUE},
        {"text": BLUE},
        own(text=" "),
        own(text=3),
        own(text=BLUE, switch="wipe"),
        own(text=BLUE, node="99"),
        own(text=BLUE, prompt_id="not this"),
        own(text="a purple dog"),
        b"{not json",
        b"[1]",
        own(text="x" * 100_000),
        lambda client, prompt_id: {"client_id": client, "prompt_id": prompt_id, "node": "prompts", "text": BLUE},
    ]
    end, answers, events, latent = asyncio.run(run(comfy_server, graph(f"0: {RED}"), at=3, bodies=bodies))
    assert end == "execution_success"
    assert [status for status, _ in answers] == [403, 400, 400, 400, 400, 404, 404, 422, 400, 400, 413, 200]
    words = (
        "another client", "client_id is missing", "text is empty", "text is 3", "switch is 'wipe'", "those that do are "
        "prompts", "does not run now", "triangle", "not JSON", "no JSON object", "larger than",
    )  # fmt: skip
    assert all(said in answer["error"] for said, (_, answer) in zip(words, answers, strict=False))
    began = answers[-1][1]["chunk"]
    assert answers[-1][1] == {"text": BLUE, "chunk": began, "switch": "recache"} and 4 <= began <= CHUNKS - 3
    texts = {event["chunk"]: event["text"] for event in events if event["running"]}
    assert texts == {chunk: RED if chunk < began else BLUE for chunk in range(1, CHUNKS + 1)}
    assert events[-1]["running"] is False and events[0]["nodes"] == ["prompts"]

    first = 4 * 3 * (began - 1) - 3  # pixel frames before the chunk
    frames = frames_of(latent)
    before, after = blueness(frames[:first]), blueness(frames[first + 12 :])
    print("blue minus red before and after the live prompt", before, after)
    assert before < -0.2 and after > 0.2

    # The same prompts on a schedule give the same video; without the second one it stays as it was before it.
    same = asyncio.run(run(comfy_server, graph(f"0: {RED}\nchunk {began}: {BLUE}")))[3]
    assert torch.equal(same, latent)
    status, answer = comfy_server.post("/diagonal/prompt", {"client_id": "somebody", "text": BLUE})
    assert status == 409 and "No run takes prompts now" in answer["error"]


def test_rows_that_cannot_be_read_reach_the_page(comfy_server):
    for text, words in ((f"0: {RED}\nlater: {BLUE}", "Row 2"), (f"0: {RED}\n2s: a dog", "Row 2 (2s)")):
        entry = comfy_server.wait(comfy_server.queue(graph(text)))
        (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        assert error["node_id"] == "prompts" and words in error["exception_message"]
