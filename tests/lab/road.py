"""The way from an agent to Halfway: a TCP proxy on which no connection lasts.

Each one is cut at some byte, wherever that is: in a frame, in a TLS record, in a handshake. How and when is drawn from a
seed, so that it can be drawn again; what the byte belongs to then depends on the moment, too.
"""

import asyncio
import collections
import contextlib
import math
import random
import socket
import struct

from appliance import HTTPS
from net import PUBLIC

# To Halfway, and to the agent.
WAYS = UP, DOWN = "up", "down"
OTHER = {UP: DOWN, DOWN: UP}
# Seconds until most connections are cut. The others are cut in their first bytes, which are handshakes.
LASTS, EARLY, FIRST_BYTES = (0.3, 2.0), 0.2, 4_000
# Once its time has come, a connection is cut within so many bytes, or seconds if there is nothing to carry.
BYTES, QUIET = 400, 0.3
# Seconds for which one side does not learn of the cut, and for which bytes are held up now and then.
LINGER, DELAY, STALL = (0.1, 1.0), (0.0, 0.01), (0.2, 0.6)


class Road:
    """One agent's way. Its connections are cut until it is calm, in these ways; without any it is calm from the first. Where it
    leads to several nodes, each connection goes to any of them."""

    def __init__(self, seed, kinds, nodes=((PUBLIC[4], HTTPS),)):
        self.seed, self.kinds, self.rough, self.spare = seed, kinds, bool(kinds), True
        self.nodes = nodes
        # By the task that runs each.
        self.passages = {}
        self.carried, self.cuts = 0, collections.Counter()

    async def open(self):
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def carry(self, *agent):
        """Takes one connection of the agent's to Halfway. After one on which nothing came through, the next is spared
        until something has: an agent that comes through now and then is never behind by a whole window."""
        passage = Passage(self, random.Random(f"{self.seed} {self.carried}"), spared=self.spare)
        self.carried, self.spare = self.carried + 1, True
        self.passages[asyncio.current_task()] = passage
        await passage.run(agent)
        del self.passages[asyncio.current_task()]

    def came_through(self):
        """The agent has heard from Halfway."""
        self.spare = False
        for passage in self.passages.values():
            passage.came_through.set()

    def calm(self):
        """Resets every connection for the last time; later ones stay whole."""
        self.rough = False
        self.give_up()

    def give_up(self):
        """Nothing that is still on its way arrives."""
        for passage in self.passages.values():
            passage.reset()

    async def close(self):
        """Waits for the end of what is still on its way."""
        self.server.close()
        await asyncio.gather(*self.passages)


class Passage:
    """One connection, from its beginning to its cut."""

    def __init__(self, road, chance, spared):
        self.road, self.random, self.spared = road, chance, spared
        # What is in hand when the byte comes, and so much of it as lies before the byte.
        self.writers, self.piece, self.rest = {}, b"", b""
        self.left = dict.fromkeys(WAYS, math.inf)
        self.gates = {way: asyncio.Event() for way in WAYS}
        self.severed, self.came_through, self.given_up = asyncio.Event(), asyncio.Event(), asyncio.Event()
        early = chance.random() < EARLY
        self.lasts = 0 if early else chance.uniform(*LASTS)
        self.way, self.bytes = chance.choice(WAYS), chance.randrange(FIRST_BYTES if early else BYTES)
        self.kind, self.linger = chance.choice(road.kinds or [reset]), chance.uniform(*LINGER)
        self.node = chance.choice(road.nodes)

    async def run(self, agent):
        try:
            halfway = await asyncio.open_connection(*self.node)
        except OSError:
            return agent[1].transport.abort()
        self.readers = {UP: agent[0], DOWN: halfway[0]}
        self.writers = {UP: halfway[1], DOWN: agent[1]}
        if self.given_up.is_set():
            # It would be the only one that is left, of an agent that needs two.
            return self.reset()
        for way, writer in self.writers.items():
            # What is closed and not only shut down is reset.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.gates[way].set()
        cut = asyncio.create_task(self.cut())
        ways = asyncio.create_task(self.carry_both())
        done, rest = await asyncio.wait({cut, ways}, return_when=asyncio.FIRST_COMPLETED)
        self.reset()
        for part in rest:
            part.cancel()
        for part in done:
            part.result()

    async def carry_both(self):
        """Ends when both ways have ended."""
        async with asyncio.TaskGroup() as group:
            for way in WAYS:
                group.create_task(self.carry(way))

    async def carry(self, way):
        """Carries the bytes of one way, in pieces as they fall. Its end becomes the other side's end."""
        reader, writer = self.readers[way], self.writers[way]
        try:
            while piece := await reader.read(self.random.randrange(1, 2_000)):
                await asyncio.sleep(self.delay())
                if self.road.rough and len(piece) > self.left[way]:
                    self.piece, self.rest = piece, piece[: self.left[way]]
                    self.severed.set()
                    self.gates[way].clear()
                await self.gates[way].wait()
                self.left[way] -= len(piece)
                writer.write(piece)
                await writer.drain()
            await self.gates[way].wait()
            writer.write_eof()
        except OSError:
            self.reset()

    def delay(self):
        chance = self.random.random()
        if chance < 0.01 and self.came_through.is_set():
            return self.random.uniform(*STALL)
        return self.random.uniform(*DELAY) if chance < 0.3 else 0

    async def cut(self):
        """Waits for the time and then the byte, and cuts."""
        if self.spared:
            await self.came_through.wait()
        await asyncio.sleep(self.lasts)
        self.left[self.way] = self.bytes
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.severed.wait(), QUIET)
        if not self.road.rough:
            # It stays whole, unless the byte came just before that and is held: then it has been reset.
            await self.given_up.wait()
            return
        # A hello held up while its agent has given up and says another one elsewhere would take the session over.
        kind = self.kind if self.came_through.is_set() or self.kind is not late else reset
        self.road.cuts[KINDS[kind]] += 1
        with contextlib.suppress(OSError):
            await kind(self)

    def write(self, data):
        """Nothing, if the time was over before the byte came: its way may have ended by then."""
        if data:
            self.writers[self.way].write(data)

    def hold(self, *ways):
        for way in ways:
            self.gates[way].clear()

    def reset(self):
        self.given_up.set()
        for writer in self.writers.values():
            writer.transport.abort()


# What may become of a connection once the byte is there. In the end both sides are reset, if they have not closed.


async def reset(passage):
    """Both sides learn at once."""
    passage.hold(*WAYS)
    passage.write(passage.rest)


async def finish(passage):
    """Both sides hear an orderly end, in the middle of whatever it was."""
    await reset(passage)
    for writer in passage.writers.values():
        writer.write_eof()
    await asyncio.sleep(passage.linger)


async def half_close(passage):
    """One way ends, the other goes on."""
    passage.hold(passage.way)
    passage.write(passage.rest)
    passage.writers[passage.way].write_eof()
    await asyncio.sleep(passage.linger)


async def stall(passage):
    """Nothing comes any more, and for a while nobody knows why."""
    await reset(passage)
    await asyncio.sleep(passage.linger)


async def late(passage):
    """The side that spoke last is reset at once. What it said, in whole, and its end reach the other one later: by then it
    may have come back, and said more."""
    passage.hold(*WAYS)
    passage.writers[OTHER[passage.way]].transport.abort()
    await asyncio.sleep(passage.linger)
    passage.write(passage.piece)


KINDS = {reset: "reset", finish: "ended", half_close: "half closed", stall: "stalled", late: "late on one side"}
# A request that was given up may be done all the same when it is late: of those nothing is promised.
OF_REQUESTS = [kind for kind in KINDS if kind is not late]
