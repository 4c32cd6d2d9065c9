#!/usr/bin/env python3
"""An agent on aiortc. Told only Halfway's URL and a token, it opens a data channel to another agent."""

import argparse
import asyncio
import json
import ssl
import sys
import time
import urllib.request
from urllib.parse import urljoin

from aiortc import (
    RTCConfiguration,
    RTCIceServer,
    RTCIceTransportPolicy,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.sdp import candidate_from_sdp
from websockets.asyncio.client import connect

from exchange import Inbox, send_all

RELIABILITY = {"ordered": {}, "unordered": {"ordered": False}, "lossy": {"ordered": False, "maxRetransmits": 0}}
HIGH_WATER = 256 * 1024


def parse_flags():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("url")
    flags.add_argument("--token", required=True)
    flags.add_argument("--ca", help="certificates to trust, if not the system's")
    flags.add_argument("--to", help="the agent to call; without it, wait for a call")
    flags.add_argument("--relay-only", action="store_true")
    flags.add_argument("--channel", choices=RELIABILITY, default="ordered")
    flags.add_argument("--messages", type=int, default=10)
    flags.add_argument("--size", type=int, default=1024)
    flags.add_argument("--blob", type=int, default=0)
    return flags.parse_args()


def fetch_ice(flags, tls):
    request = urllib.request.Request(urljoin(flags.url, "/v1/ice"), headers={"Authorization": f"Bearer {flags.token}"})
    with urllib.request.urlopen(request, context=tls) as response:
        return json.load(response)


class Agent:
    def __init__(self, flags, ice, socket):
        self.flags = flags
        self.ice = ice
        self.socket = socket
        self.peer = None
        self.frames = asyncio.Queue()
        self.released = asyncio.Event()
        self.result = asyncio.get_running_loop().create_future()

    async def run(self):
        await self.signal(type="hello", card={"name": "aiortc"})
        tasks = [asyncio.ensure_future(self.listen()), asyncio.ensure_future(self.work()), self.result]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def signal(self, **frame):
        await self.socket.send(json.dumps(frame))

    async def listen(self):
        loop = asyncio.get_running_loop()
        async for text in self.socket:
            frame = json.loads(text)
            loop.call_later(self.hold(frame), self.frames.put_nowait, frame)
        raise ConnectionError("signaling closed")

    def hold(self, frame):
        # Whoever offers starts its checks after the one who answers: then its own get through first. The other way
        # about, the answering side would begin DTLS with a side that does not listen yet, and try again a second later.
        return 0.15 if self.flags.to and frame["type"] in ("answer", "iceCandidate") else 0

    async def work(self):
        while True:
            await self.receive(await self.frames.get())

    async def receive(self, frame):
        kind = frame["type"]
        if kind == "welcome" and any(other["agent"] == self.flags.to for other in frame["agents"]):
            await self.call(self.flags.to)
        elif kind == "agentJoined" and frame["agent"] == self.flags.to and not self.peer:
            await self.call(self.flags.to)
        elif kind == "error":
            raise ConnectionError(f"{frame['code']}: {frame['message']}")
        elif kind == "offer" and not self.peer:
            await self.answer(frame)
        elif self.peer and frame.get("from") == self.peer:
            await self.receive_from_peer(kind, frame)

    async def receive_from_peer(self, kind, frame):
        if kind == "answer":
            await self.connection.setRemoteDescription(RTCSessionDescription(type="answer", sdp=frame["sdp"]))
        elif kind == "iceCandidate":
            await self.connection.addIceCandidate(parse_candidate(frame["candidate"]))
        elif kind == "message":
            self.inbox.announce(frame["payload"])
        elif kind == "bye":
            self.released.set()

    async def call(self, agent):
        self.connect(agent)
        self.start(self.connection.createDataChannel(self.flags.channel, **RELIABILITY[self.flags.channel]))
        await self.describe(await self.connection.createOffer())

    async def answer(self, frame):
        self.connect(frame["from"])
        await self.connection.setRemoteDescription(RTCSessionDescription(type="offer", sdp=frame["sdp"]))
        await self.describe(await self.connection.createAnswer())

    def connect(self, agent):
        self.peer = agent
        self.offered = time.monotonic()
        self.connection = RTCPeerConnection(
            RTCConfiguration(
                iceServers=[RTCIceServer(**server) for server in self.ice["iceServers"]],
                iceTransportPolicy=RTCIceTransportPolicy("relay" if self.flags.relay_only else "all"),
            )
        )
        self.connection.on("datachannel", self.start)
        self.connection.on("connectionstatechange", self.watch)

    async def describe(self, description):
        """Sends the description with every candidate in it: aiortc gathers them all first."""
        await self.connection.setLocalDescription(description)
        description = self.connection.localDescription
        await self.signal(type=description.type, to=self.peer, sdp=description.sdp)

    def watch(self):
        if self.connection.connectionState == "failed" and not self.result.done():
            self.result.set_exception(ConnectionError("no path to the other agent"))

    def start(self, channel):
        # Created here or announced by the other agent, the channel bears the name of its kind.
        self.inbox = Inbox(lossy=channel.label == "lossy")
        channel.on("message", self.inbox.take)
        self.talking = asyncio.ensure_future(self.talk(channel))
        self.talking.add_done_callback(lambda talking: self.result.done() or self.result.set_result(talking))

    async def talk(self, channel):
        opened = asyncio.Event()
        channel.on("open", opened.set)
        if channel.readyState != "open":
            await opened.wait()
        opened_ms = round((time.monotonic() - self.offered) * 1000)
        sent = {"messages": self.flags.messages, "blob": self.flags.blob}
        await send_all(writer(channel), **sent, size=self.flags.size, lossy=channel.label == "lossy")
        await self.signal(type="message", to=self.peer, payload=sent)
        await self.inbox.complete.wait()
        await self.signal(type="bye", to=self.peer)
        await self.released.wait()
        await self.connection.close()
        # aiortc does not tell which candidates were chosen.
        print(json.dumps({"opened_ms": opened_ms, **self.inbox.summary(), "local": None, "remote": None}))
        return self.inbox.sound()


def writer(channel):
    """Sends on a channel, and waits while it holds more than the network takes."""
    drained = asyncio.Event()
    channel.bufferedAmountLowThreshold = HIGH_WATER // 2
    channel.on("bufferedamountlow", drained.set)

    async def write(data):
        channel.send(data)
        if channel.bufferedAmount > HIGH_WATER:
            drained.clear()
            await drained.wait()

    return write


def parse_candidate(candidate):
    if candidate is None:
        return None
    parsed = candidate_from_sdp(candidate["candidate"].removeprefix("a=").removeprefix("candidate:"))
    parsed.sdpMid, parsed.sdpMLineIndex = candidate.get("sdpMid"), candidate.get("sdpMLineIndex")
    return parsed


async def main():
    flags = parse_flags()
    tls = ssl.create_default_context(cafile=flags.ca)
    ice = await asyncio.to_thread(fetch_ice, flags, tls)
    async with connect(
        urljoin(flags.url, "/v1/ws").replace("http", "ws", 1),
        ssl=tls,
        subprotocols=["halfway.v1"],
        additional_headers={"Authorization": f"Bearer {flags.token}"},
    ) as socket:
        return await Agent(flags, ice, socket).run()


if __name__ == "__main__":
    try:
        sys.exit(0 if asyncio.run(main()) else 1)
    except (OSError, ConnectionError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
