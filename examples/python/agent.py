#!/usr/bin/env python3
"""An agent on aiortc. Told only Halfway's URL and a token, it opens a data channel to another agent."""

import asyncio
import json
import sys
import time

from aiortc import RTCConfiguration, RTCIceServer, RTCIceTransportPolicy, RTCPeerConnection, RTCSessionDescription
from aiortc.sdp import candidate_from_sdp

from cli import fetch_ice, parse_flags, trust
from exchange import Inbox, send_all, writer
from signaling import Signaling, open_socket

RELIABILITY = {"ordered": {}, "unordered": {"ordered": False}, "lossy": {"ordered": False, "maxRetransmits": 0}}


class Agent:
    def __init__(self, flags, ice, socket):
        self.flags, self.ice, self.signaling = flags, ice, Signaling(socket)
        self.peer, self.late = None, []
        self.inbox, self.released = Inbox(), asyncio.Event()
        self.result = asyncio.get_running_loop().create_future()

    async def run(self):
        await self.signaling.send(type="hello", card={"name": "aiortc"})
        self.tasks = [self.supervise(self.signaling.listen()), self.supervise(self.work())]
        return await self.result

    def supervise(self, coroutine):
        """Runs beside the others; what goes wrong in it ends them all."""
        task = asyncio.ensure_future(coroutine)
        task.add_done_callback(lambda task: task.cancelled() or self.fail(task.exception()))
        return task

    def fail(self, problem):
        if problem and not self.result.done():
            self.result.set_exception(problem)

    async def work(self):
        async for frame in self.signaling.frames():
            await self.receive(frame)

    async def receive(self, frame):
        kind, to = frame["type"], self.flags.to
        present = [other["agent"] for other in frame["agents"]] if kind == "welcome" else []
        if to in present or (kind == "agentJoined" and frame["agent"] == to and not self.peer):
            await self.call(to)
        elif kind == "error":
            raise ConnectionError(f"{frame['code']}: {frame['message']}")
        elif kind == "delivered" and frame["id"] == "answer":
            await self.begin()
        elif kind == "offer" and not self.peer:
            await self.answer(frame["from"], frame["sdp"])
        elif self.peer and frame.get("from") == self.peer:
            await self.receive_from_peer(kind, frame)

    async def receive_from_peer(self, kind, frame):
        if kind == "answer":
            await self.connection.setRemoteDescription(RTCSessionDescription(frame["sdp"], "answer"))
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

    async def answer(self, agent, sdp):
        """Checks paths when the other side has the answer, and so has opened its NAT: what one drops aiortc says again half a
        second later."""
        self.connect(agent)
        rest, self.late = apart(sdp)
        await self.connection.setRemoteDescription(RTCSessionDescription(rest, "offer"))
        await self.describe(await self.connection.createAnswer())

    async def begin(self):
        for candidate in self.late:
            await self.connection.addIceCandidate(candidate)

    async def describe(self, description):
        """Sends the description with every candidate in it: aiortc gathers them all first."""
        await self.connection.setLocalDescription(description)
        local = self.connection.localDescription
        await self.signaling.send(type=local.type, id=local.type, to=self.peer, sdp=local.sdp)

    def connect(self, agent):
        self.peer, self.offered = agent, time.monotonic()
        servers = [RTCIceServer(**server) for server in self.ice["iceServers"]]
        policy = RTCIceTransportPolicy("relay" if self.flags.relay_only else "all")
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=servers, iceTransportPolicy=policy))
        self.connection.on("datachannel", self.start)
        self.connection.on("connectionstatechange", self.watch)

    def watch(self):
        if self.connection.connectionState == "failed":
            self.fail(ConnectionError("no path to the other agent"))

    def start(self, channel):
        # Created here or announced by the other agent, the channel bears the name of its kind.
        self.inbox.lossy = channel.label == "lossy"
        channel.on("message", self.inbox.take)
        self.tasks.append(self.supervise(self.talk(channel)))

    async def talk(self, channel):
        opened = asyncio.Event()
        channel.on("open", opened.set)
        if channel.readyState != "open":
            await opened.wait()
        opened_ms = round((time.monotonic() - self.offered) * 1000)
        sent = {"messages": self.flags.messages, "blob": self.flags.blob}
        # What is said while a channel opens may be lost (examples/README.md): who answers speaks when something has come.
        if not self.flags.to:
            await self.inbox.begun.wait()
        await send_all(writer(channel), **sent, size=self.flags.size, lossy=self.inbox.lossy)
        await self.signaling.send(type="message", to=self.peer, payload=sent)
        await self.inbox.complete.wait()
        await self.signaling.send(type="bye", to=self.peer)
        await self.released.wait()
        await self.connection.close()
        # aiortc does not tell which candidates were chosen.
        self.result.set_result({"opened_ms": opened_ms, **self.inbox.summary(), "local": None, "remote": None})


def apart(sdp):
    """A description without its candidates, and those; None as the last says that there are no more."""
    lines = sdp.splitlines(keepends=True)
    told = [line for line in lines if line.startswith(("a=candidate:", "a=end-of-candidates"))]
    candidates = [{"candidate": line.strip(), "sdpMLineIndex": 0} if "candidate:" in line else None for line in told]
    return "".join(line for line in lines if line not in told), [parse_candidate(candidate) for candidate in candidates]


def parse_candidate(candidate):
    if candidate is None:
        return None
    parsed = candidate_from_sdp(candidate["candidate"].removeprefix("a=").removeprefix("candidate:"))
    parsed.sdpMid, parsed.sdpMLineIndex = candidate.get("sdpMid"), candidate.get("sdpMLineIndex")
    return parsed


async def main(flags):
    tls = trust(flags)
    ice = await asyncio.to_thread(fetch_ice, flags, tls)
    async with open_socket(flags, tls) as socket:
        agent = Agent(flags, ice, socket)
        print(json.dumps(await agent.run()))
        return agent.inbox.sound()


if __name__ == "__main__":
    try:
        sys.exit(0 if asyncio.run(main(parse_flags(__doc__))) else 1)
    except OSError as problem:
        sys.exit(str(problem))
