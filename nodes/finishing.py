"""Ending a run early: the chunk in work is the last one, and what was made goes on to the next nodes."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from .client import asker, send
from .live_runs import Refused, Run, Runs, read_body

FINISH_ROUTE, FINISH_EVENT = "/diagonal/finish", "diagonal.finish"
MOST_NODES = 1000  # whose early ends are remembered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Finishable(Run):
    node_id: str
    asked: threading.Event = field(default_factory=threading.Event)


_RUNS: Runs[_Finishable] = Runs()
_NEWEST: dict[str, str] = {}  # node id -> its widgets when it was queued last
_EARLY: Counter[tuple[str, str]] = Counter()  # how often a node with these widgets was ended early


@contextlib.contextmanager
def finishable(node_id: str) -> Iterator[threading.Event]:
    """While it is open, the client that queued the prompt may ask for the run's end; the event says that it did."""
    run = _Finishable(**asker()._asdict(), node_id=node_id)
    _RUNS.add(run)
    try:
        yield run.asked
    finally:
        _RUNS.remove(run)


def early_ends(node_id: str, widgets: dict[str, Any]) -> int:
    """How often this node, so set, was ended early: part of its fingerprint, for ComfyUI would otherwise answer the
    same graph from its cache with the shorter result.

    What comes by links is not known here: graphs that differ there alone, as in their prompts, share the count, and an
    early end of one makes the finished result of the others once more when they are queued again.
    """
    while len(_NEWEST) >= MOST_NODES:
        del _NEWEST[next(iter(_NEWEST))]
    _NEWEST.pop(node_id, None)
    _NEWEST[node_id] = repr(sorted(widgets.items()))
    return _EARLY[node_id, _NEWEST[node_id]]


def ended_early(node_id: str) -> None:
    """Note it for early_ends, and tell the canvas."""
    while len(_EARLY) >= MOST_NODES:
        del _EARLY[next(iter(_EARLY))]
    _EARLY[node_id, _NEWEST.get(node_id, "")] += 1
    send(FINISH_EVENT, {"node": node_id})


async def post_finish(request: web.Request) -> web.Response:
    """End the run that goes on with the chunk in work.

    The body is JSON: client_id, and as one likes prompt_id and node (of the sampler). The answer has the nodes that
    end, or an error: 400 a body that is not that, 403 another client's run, 404 a node or prompt_id that does not run,
    409 nothing runs, 413 too large.
    """
    try:
        body = await read_body(request, {"client_id": str}, {"prompt_id": (str,), "node": (str, int)})
        own = _RUNS.of(
            body, "No run can be finished now: send while Diagonal Chunk Sampler or Diagonal Stream Video runs."
        )
        node = body.get("node")
        meant = [run for run in own if node is None or run.node_id == str(node)]
        if not meant:
            raise Refused(404, f"node {str(node)!r} does not run now; leave node out to mean what does.")
    except Refused as refusal:
        return refusal.answer()
    for run in meant:
        run.asked.set()
    return web.json_response({"nodes": [run.node_id for run in meant]})
