"""Signaling over Halfway's WebSocket: one JSON object a frame."""

import asyncio
import json
from urllib.parse import urljoin

from websockets.asyncio.client import connect


def open_socket(flags, tls):
    """The WebSocket, for an `async with`."""
    address = urljoin(flags.url, "/v1/ws").replace("https:", "wss:")
    headers = {"Authorization": f"Bearer {flags.token}"}
    return connect(address, ssl=tls, subprotocols=["halfway.v1"], additional_headers=headers)


class Signaling:
    """Frames out, and frames in, in order."""

    def __init__(self, socket):
        self.socket, self.queue = socket, asyncio.Queue()

    async def send(self, **frame):
        await self.socket.send(json.dumps(frame))

    async def listen(self):
        """Takes frames off the socket until it closes, which is an error."""
        async for text in self.socket:
            self.queue.put_nowait(json.loads(text))
        raise ConnectionError("signaling closed")

    async def frames(self):
        while True:
            yield await self.queue.get()
