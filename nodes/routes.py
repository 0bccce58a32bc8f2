"""What the canvas asks the server for."""

from aiohttp import web
from server import PromptServer

from .finishing import FINISH_ROUTE, post_finish
from .memory import MEMORY_ROUTE, get_memory
from .schedule import drawing
from .steering import PROMPT_ROUTE, post_prompt

SCHEDULE_ROUTE = "/diagonal/schedule"


def add_routes() -> None:
    """Adds the pack's routes to ComfyUI's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(SCHEDULE_ROUTE)(get_schedule)
        server.routes.get(MEMORY_ROUTE)(get_memory)
        server.routes.post(PROMPT_ROUTE)(post_prompt)
        server.routes.post(FINISH_ROUTE)(post_finish)


async def get_schedule(request: web.Request) -> web.Response:
    """The drawing of the schedule that the query's widget values make; a bad value is an answer, not a failure."""
    return web.json_response(drawing(request.query))
