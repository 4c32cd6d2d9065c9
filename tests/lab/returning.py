"""Agents that come back when they are cut off, as docs/protocol.md says. Each welcome is a line on stdout.

A program: the URL, the authority's certificate and a token for each agent are its arguments.
"""

import asyncio
import json
import random
import ssl
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake


async def stay(url, trust, token):
    session = None
    while True:
        try:
            headers = {"Authorization": f"Bearer {token}"}
            async with connect(
                url, ssl=trust, subprotocols=["halfway.v1"], additional_headers=headers, proxy=None
            ) as socket:
                await socket.send(json.dumps({"type": "hello", **({"resume": session} if session else {})}))
                async for text in socket:
                    frame = json.loads(text)
                    if frame["type"] == "welcome":
                        session = {"session": frame["session"], "after": 0}
                        print(json.dumps({"agent": frame["agent"], "resumed": frame["resumed"]}), flush=True)
        except (OSError, ConnectionClosed, InvalidHandshake, EOFError):
            pass
        # Not all at once.
        await asyncio.sleep(random.uniform(0.5, 3))


async def main(url, ca, *tokens):
    trust = ssl.create_default_context(cafile=ca)
    await asyncio.gather(*(stay(f"{url.replace('https', 'wss')}/v1/ws", trust, token) for token in tokens))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
