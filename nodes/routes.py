"""What the canvas asks the server for."""

import asyncio

from aiohttp import web
from server import PromptServer

from .finishing import FINISH_ROUTE, post_finish
from .live_runs import Refused, read_body
from .memory import MEMORY_ROUTE, get_memory
from .schedule import WIDGETS, drawing
from .steering import PROMPT_ROUTE, post_prompt

SCHEDULE_ROUTE = "/diagonal/schedule"


def add_routes() -> None:
    """Adds the pack's routes to ComfyUI's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.post(SCHEDULE_ROUTE)(post_schedule)
        server.routes.get(MEMORY_ROUTE)(get_memory)
        server.routes.post(PROMPT_ROUTE)(post_prompt)
        server.routes.post(FINISH_ROUTE)(post_finish)


async def post_schedule(request: web.Request) -> web.Response:
    """The drawing of the schedule that these widget values make; a bad value is an answer, not a failure.

    The body is JSON: the values as text, by name. An error is 400 for a body that is not that, 413 for one too large.
    """
    try:
        body = await read_body(request, {}, dict.fromkeys(WIDGETS, (str,)))
    except Refused as refusal:
        return refusal.answer()
    widgets = {name: value for name, value in body.items() if value is not None}
    # Beside the event loop: a list of ten thousand chunks takes a while.
    return web.json_response(await asyncio.to_thread(drawing, widgets))
