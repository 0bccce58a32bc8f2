"""New prompts for the run that goes on: from the canvas, or by one HTTP call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ..diagonal_sampler.prompt_schedule import require_switch
from ..model_patches.prompts import NotSteerable, PromptBox, PromptNow, PromptRequest, PromptSource, schedule_of
from .client import Asker, asker, send
from .live_runs import Refused, Run, Runs, read_body

log = logging.getLogger(__name__)

PROMPT_ROUTE, PROMPT_EVENT = "/diagonal/prompt", "diagonal.prompt"
MAX_TEXT = 16 * 1024  # characters
ANSWER_SECONDS = 30.0  # a prompt is read between two forwards, and a large model's take a while


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Steerable(Run):
    """A run that takes prompts."""

    box: PromptBox
    source: PromptSource


_RUNS: Runs[_Steerable] = Runs()


@contextlib.contextmanager
def steerable(positive: list) -> Iterator[PromptBox | None]:
    """While it is open, the run whose positive comes from a prompt schedule takes prompts; None without a schedule."""
    schedule = schedule_of(positive)
    if schedule is None:
        yield None
        return
    to = asker()
    nodes = list(schedule.source.clips)

    def say(**data: Any) -> None:
        send(PROMPT_EVENT, {"nodes": nodes, **data}, to=to)

    def on_chunk(now: PromptNow) -> None:
        say(running=True, chunk=now.chunk + 1, chunks=now.chunks, text=now.text)

    box = PromptBox(on_chunk)
    run = _Steerable(box=box, source=schedule.source, **to._asdict())
    _RUNS.add(run)
    try:
        yield box
    finally:
        _RUNS.remove(run)
        box.close()
        say(running=False)


async def post_prompt(request: web.Request) -> web.Response:
    """Hand a prompt to the run that goes on; it begins with the next chunk.

    The body is JSON: client_id (any, for a run that was queued without one) and text, and as one likes prompt_id, node
    (of the schedule), switch, blend_chunks. The answer has text, chunk (counted from 1) and switch, or an error: 400 a
    body that is not that, 403 another client's run, 404 a node or prompt_id that does not run, 409 nothing runs or it
    is too late, 413 too large, 422 a text that cannot be used. 202: the run has not read it yet.
    """
    try:
        body = await _body(request)
        run, node = _find(body)
        # Asked last: the answer comes from the sampling thread, which encodes the text between two forwards.
        answer: Future = Future()
        try:
            run.box.post(
                PromptRequest(
                    text=body["text"],
                    node=node,
                    switch=body.get("switch"),
                    blend_chunks=body.get("blend_chunks"),
                    answer=answer,
                )
            )
            prompt = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(answer)), ANSWER_SECONDS)
        except NotSteerable as error:
            raise Refused(409, str(error)) from error
        except asyncio.TimeoutError:
            answer.add_done_callback(lambda done: _tell_refused(run, node, body["text"], done))
            message = "The run has not read the prompt yet; it takes effect in the chunk after that."
            return web.json_response({"text": body["text"], "message": message}, status=202)
        except Exception as error:  # of the tokenizer or the text encoder
            raise Refused(422, f"The prompt cannot be used: {error}") from error
    except Refused as refusal:
        return refusal.answer()
    return web.json_response({"text": prompt.text, "chunk": prompt.chunk + 1, "switch": prompt.switch})


def _tell_refused(run: _Steerable, node: str, text: str, answer: Future) -> None:
    """A refusal that comes after the HTTP answer has gone; called in the sampling thread."""
    error = answer.exception()
    if error is None:
        return
    log.warning("The prompt %r cannot be used: %s", text, error)
    data = {"nodes": [node], "running": True, "refused": str(error), "text": text}
    send(PROMPT_EVENT, data, to=Asker(run.client_id, run.prompt_id))


async def _body(request: web.Request) -> dict[str, Any]:
    """The checked body."""
    body = await read_body(
        request,
        {"client_id": str, "text": str},
        {"prompt_id": (str,), "node": (str, int), "switch": (str,), "blend_chunks": (int,)},
    )
    if not body["text"].strip():
        raise Refused(400, "text is empty; write a prompt.")
    if len(body["text"]) > MAX_TEXT:
        raise Refused(413, f"text has {len(body['text'])} characters; the most is {MAX_TEXT}.")
    try:
        require_switch(body.get("switch") or "keep", 1 if body.get("blend_chunks") is None else body["blend_chunks"])
    except ValueError as error:
        raise Refused(400, str(error)) from None
    return body


def _find(body: dict[str, Any]) -> tuple[_Steerable, str]:
    """The run that a request means, and the node of its schedule."""
    own = _RUNS.of(
        body,
        "No run takes prompts now. Queue a graph in which Diagonal Prompt Schedule feeds positive of Diagonal "
        "Chunk Sampler or Diagonal Stream Video, and send while that node runs.",
    )
    node = None if body.get("node") is None else str(body["node"])
    for run in reversed(own):
        if (found := run.source.find(node)) is not None:
            return run, found
    known = ", ".join(name for run in own for name in run.source.clips)
    raise Refused(404, f"node {node!r} is in no schedule that runs; those that do are {known}. Or leave node out.")
