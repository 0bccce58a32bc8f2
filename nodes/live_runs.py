"""What the HTTP calls on a run that goes on share: the run that a client means, a checked body, refusals."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from aiohttp import web

MAX_BODY = 64 * 1024  # bytes
WORDS = {str: "text", int: "a whole number"}


class Refused(Exception):
    """An answer other than success: HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def answer(self) -> web.Response:
        return web.json_response({"error": str(self)}, status=self.status)


async def read_body(
    request: web.Request, needed: dict[str, type], optional: dict[str, tuple[type, ...]]
) -> dict[str, Any]:
    """The JSON object that a request carries, with the fields that it needs and may have.

    Raises:
        Refused: 400 no such object, 413 larger than MAX_BODY.
    """
    data = bytearray()
    async for part in request.content.iter_chunked(MAX_BODY):
        data += part
        if len(data) > MAX_BODY:
            raise Refused(413, f"The body is larger than {MAX_BODY} bytes; send less.")
    example = json.dumps(dict.fromkeys(needed, "..."))
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(400, f"The body is not JSON; send {example}.") from None
    if not isinstance(body, dict):
        raise Refused(400, f"The body is no JSON object; send {example}.")
    for name, kinds in {**{name: (kind,) for name, kind in needed.items()}, **optional}.items():
        value = body.get(name)
        if value is None and name not in needed:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(WORDS[kind] for kind in kinds)
            raise Refused(400, f"{name} is {'missing' if name not in body else repr(value)[:60]}; it must be {wanted}.")
    return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that goes on, and the client and prompt of ComfyUI's queue that it belongs to.

    Without a client_id it was queued by a program that gave none, and belongs to nobody.
    """

    client_id: str | None
    prompt_id: str | None


AnyRun = TypeVar("AnyRun", bound=Run)


class Runs(Generic[AnyRun]):
    """The runs that go on now. ComfyUI runs one graph at a time, but nothing here depends on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: list[AnyRun] = []

    def add(self, run: AnyRun) -> None:
        with self._lock:
            self._runs.append(run)

    def remove(self, run: AnyRun) -> None:
        with self._lock:
            self._runs.remove(run)

    def of(self, body: dict[str, Any], none: str) -> list[AnyRun]:
        """Those of the client that asks, else nobody's, which all may steer; if it names a prompt, that prompt's.

        Args:
            none: what to say where nothing runs.

        Returns:
            At least one, the newest last.

        Raises:
            Refused: 409 nothing runs, 403 what runs is another client's, 404 another prompt's.
        """
        with self._lock:
            runs = list(self._runs)
        if not runs:
            raise Refused(409, none)
        free = [run for run in runs if run.client_id in (None, body["client_id"])]
        if not free:
            raise Refused(
                403, "The run belongs to another client; only the one that queued it can steer it (its client_id)."
            )
        if body.get("prompt_id") is None:
            return [run for run in free if run.client_id is not None] or free
        named = [run for run in free if run.prompt_id == body["prompt_id"]]
        if not named:
            raise Refused(404, f"prompt_id {body['prompt_id']!r} does not run now; leave it out to mean what does.")
        return named
