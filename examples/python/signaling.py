"""Signaling over Halfway's WebSocket: one JSON object a frame."""

import asyncio
import json
from urllib.parse import urljoin

from websockets.asyncio.client import connect

HOLD = 0.15  # seconds


def open_socket(flags, tls):
    """The WebSocket, for an `async with`."""
    address = urljoin(flags.url, "/v1/ws").replace("https:", "wss:")
    headers = {"Authorization": f"Bearer {flags.token}"}
    return connect(address, ssl=tls, subprotocols=["halfway.v1"], additional_headers=headers)


class Signaling:
    """Frames out, and frames in, in order."""

    def __init__(self, socket, offers):
        self.socket, self.offers, self.queue = socket, offers, asyncio.Queue()

    async def send(self, **frame):
        await self.socket.send(json.dumps(frame))

    async def listen(self):
        """Takes frames off the socket until it closes, which is an error."""
        async for text in self.socket:
            frame = json.loads(text)
            # Whoever offers starts its checks last, and so is connected first. The other way about, the answering side
            # would begin DTLS with one that does not listen yet, and try again a second later.
            hold = HOLD if self.offers and frame["type"] in ("answer", "iceCandidate") else 0
            asyncio.get_running_loop().call_later(hold, self.queue.put_nowait, frame)
        raise ConnectionError("signaling closed")

    async def frames(self):
        while True:
            yield await self.queue.get()
