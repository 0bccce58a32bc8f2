"""What a node sends to the canvas: to the client that queued the prompt, and to nobody where there is none.

ComfyUI sends a message without a client to every open page: one person's frames and prompts would reach all others.
Where a program runs the nodes itself there is no server, or one that has run no prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from server import PromptServer


class Asker(NamedTuple):
    """Who queued a prompt, and that prompt's id. The client is None where a program queued it without one."""

    client_id: str | None
    prompt_id: str | None


def asker() -> Asker:
    """Of the prompt that runs; nobody where no server runs it."""
    server = getattr(PromptServer, "instance", None)
    return Asker(getattr(server, "client_id", None), getattr(server, "last_prompt_id", None))


def send(event: str, data: dict[str, Any], *, to: Asker | None = None) -> None:
    """Send an event, in any thread; `prompt_id` is added to its data.

    Args:
        to: noted before, for what may be sent after its prompt has run; None is that of the prompt that runs.
    """
    to = to or asker()
    if to.client_id is not None:
        PromptServer.instance.send_sync(event, {"prompt_id": to.prompt_id, **data}, to.client_id)


def tell(node_id: str | None, text: str) -> None:
    """Show a text at a node; without a node there is nobody to tell."""
    if node_id and (client_id := asker().client_id) is not None:
        PromptServer.instance.send_progress_text(text, node_id, client_id)
