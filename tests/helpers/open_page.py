"""What another client's open page hears of a run."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest
from comfy_host import ComfyServer

aiohttp = pytest.importorskip("aiohttp")


async def overhear(server: ComfyServer, graph: dict) -> list[str]:
    """Queue a graph as a program does, without a client_id; kinds of messages that another client's open page hears."""
    heard = []
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.url}/ws?clientId={uuid.uuid4().hex}", max_msg_size=0) as socket:
            await asyncio.to_thread(server.run, graph)
            while True:
                try:
                    message = await socket.receive(timeout=1.0)
                except asyncio.TimeoutError:
                    return heard
                if message.type == aiohttp.WSMsgType.TEXT:
                    heard.append(json.loads(message.data)["type"])
                elif message.data[:4] == b"\0\0\0\3":
                    heard.append("text for a node")
