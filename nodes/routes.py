"""What the canvas asks the server for."""

from aiohttp import web
from server import PromptServer

from .schedule import drawing

SCHEDULE_ROUTE = "/diagonal/schedule"


def add_routes() -> None:
    """Adds the pack's routes to ComfyUI's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(SCHEDULE_ROUTE)(get_schedule)


async def get_schedule(request: web.Request) -> web.Response:
    """The drawing of the schedule that the query's widget values make; a bad value is an answer, not a failure."""
    return web.json_response(drawing(request.query))
