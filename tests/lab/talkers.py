"""Agents that send each other numbered frames over connections that do not last, and keep books on what became of them.

A program: it takes its orders as JSON on stdin, and prints a report.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import random
import ssl
import sys

import websockets
from websockets.asyncio.client import connect

from appliance import HTTPS
from asking import Broken, Events, Poll
from net import PUBLIC
from road import KINDS, OF_REQUESTS, Road

# Frames a second of each agent; how many of them go to everybody, are offers, or are followed by a receipt.
RATE, TO_ALL, OFFERS, RECEIPTS = 20, 0.02, 0.1, 0.05
# Seconds that all have to hear everybody's last word once nothing is cut any more, and to leave.
PATIENCE = 20
LAST = "my last word"


class WebSocket:
    """Frames over WSS. But for `leave` it never says goodbye: a close frame would end the session."""

    def __init__(self, token, trust, road):
        self.socket, self.road = None, road
        self.options = {
            "ssl": trust, "server_hostname": PUBLIC[4], "subprotocols": ["halfway.v1"], "ping_interval": None,
            "additional_headers": {"Authorization": f"Bearer {token}"}, "proxy": None, "compression": None,
        }  # fmt: skip

    async def connect(self, hello):
        with self.breaking():
            url = f"wss://{PUBLIC[4]}:{HTTPS}/v1/ws"
            self.socket = await connect(url, host="127.0.0.1", port=self.road.port, **self.options)
        await self.send(hello)

    async def send(self, frame):
        with self.breaking():
            await self.socket.send(json.dumps(frame))

    async def receive(self):
        with self.breaking():
            return json.loads(await self.socket.recv())

    def drop(self):
        if self.socket:
            self.socket.transport.abort()

    async def leave(self):
        await self.socket.close()

    @contextlib.contextmanager
    def breaking(self):
        try:
            yield
        except websockets.ConnectionClosed as closed:
            # With 1000 Halfway ends its side when the other one has ended.
            raise Broken(*[closed.rcvd] if closed.rcvd and closed.rcvd.code != 1000 else []) from None
        except (OSError, EOFError, websockets.InvalidMessage):
            raise Broken from None


def leaving_by_socket(transport):
    """A session without a connection only runs out; one that has moved to a WebSocket can be left."""

    class Leaving(transport):
        def __init__(self, *way):
            super().__init__(*way)
            self.exit = WebSocket(*way)

        async def leave(self):
            self.drop()
            self.frames.put_nowait(Broken())
            name = self.session["Halfway-Session"]
            await self.exit.connect({"type": "hello", "resume": {"session": name, "after": self.after}})
            await self.exit.receive()
            await self.exit.leave()

    return Leaving


class Any:
    """Another way each time: the session moves along."""

    def __init__(self, *way):
        self.road = way[-1]
        self.ways = itertools.cycle([TRANSPORTS[name](*way) for name in ("poll", "wss", "events")])
        self.way = None

    async def connect(self, hello):
        self.way = next(self.ways)
        await self.way.connect(hello)

    async def send(self, frame):
        await self.way.send(frame)

    async def receive(self):
        return await self.way.receive()

    def drop(self):
        self.way.drop()
        self.road.give_up()

    async def leave(self):
        await self.way.leave()


# By name, what the agents take in turn.
TRANSPORTS = {"wss": WebSocket, "poll": leaving_by_socket(Poll), "events": leaving_by_socket(Events), "any": Any}


class Agent:
    """What one agent said, was promised, and heard."""

    def __init__(self, name, others, road, transport, seed, bears):
        self.name, self.others, self.road, self.transport = name, others, road, transport
        # It may be told that others cannot be reached, and says nothing to all of them at once.
        self.bears, self.failed = bears, collections.Counter()
        self.random = random.Random(seed)
        self.session, self.seen, self.greeted, self.resumed = None, 0, asyncio.Event(), 0
        # Who is to have each frame, which of them wait for an answer on this connection, and which have got one.
        self.sent, self.asked, self.promised = {}, set(), []
        # The numbers that came, by sender; and who has said the last word.
        self.came, self.lasts, self.heard_all = {other: [] for other in others}, set(), asyncio.Event()
        self.over = self.left = False
        self.wrongs = []

    async def run(self):
        """Comes back whenever the connection breaks, until it has left."""
        while not self.left:
            try:
                await self.transport.connect(self.hello())
                await self.listen()
            except Broken as broken:
                self.wrongs += [f"closed: {last_words}" for last_words in broken.args]
            self.greeted.clear()
            self.asked.clear()
            self.transport.drop()

    def hello(self):
        resume = {"resume": {"session": self.session, "after": self.seen}} if self.session else {}
        return {"type": "hello", "card": {"name": self.name}, **resume}

    async def listen(self):
        while True:
            frame = await self.transport.receive()
            self.road.came_through()
            self.take(frame)
            if frame["type"] == "welcome" and self.over:
                await self.say_last()

    def take(self, frame):
        kind = frame["type"]
        if (kind == "welcome") == self.greeted.is_set():
            self.wrongs.append(f"{kind} on a connection that was{'' if self.greeted.is_set() else ' not'} welcomed")
        if kind == "welcome":
            self.be_welcomed(frame)
        elif kind == "delivered" and frame["id"] in self.asked:
            self.asked.remove(frame["id"])
            self.promised.append(frame["id"])
            if frame.get("count", 1) != len(self.sent[frame["id"]]):
                self.wrongs.append(f"{frame} should have gone to {len(self.sent[frame['id']])}")
        elif kind in ("message", "offer"):
            self.hear(frame)
        elif self.bears and kind == "error" and frame["id"] in self.asked:
            self.asked.remove(frame["id"])
            self.failed[frame["code"]] += 1
        elif kind not in ("agentJoined", "agentLeft") or (kind == "agentLeft" and not (self.over or self.bears)):
            self.wrongs.append(f"{frame}")

    def be_welcomed(self, welcome):
        if self.session and not welcome["resumed"]:
            self.wrongs.append(f"a new session after number {self.seen} of the old one")
            self.seen = 0
        self.session = welcome["session"]
        self.resumed += welcome["resumed"]
        self.greeted.set()

    def hear(self, frame):
        """A frame from another agent."""
        if frame["seq"] != self.seen + 1:
            self.wrongs.append(f"number {frame['seq']} came after {self.seen}")
        self.seen = frame["seq"]
        said = frame.get("payload") or frame.get("sdp")
        if said == LAST:
            self.lasts.add(frame["from"])
            if len(self.lasts) == len(self.others):
                self.heard_all.set()
        elif frame.get("to", self.name) == self.name and said == text(int(said[:8])):
            self.came[frame["from"]].append(int(said[:8]))
        else:
            self.wrongs.append(f"changed on the way: {frame}")

    async def talk(self):
        """Says one thing after the other while there is a connection, until it is over."""
        for number in itertools.count():
            await asyncio.sleep(self.random.uniform(0, 2 / RATE))
            await self.greeted.wait()
            if self.over:
                return
            with contextlib.suppress(Broken):
                await self.say(number)
                if self.random.random() < RECEIPTS:
                    await self.transport.send({"type": "received", "upTo": self.seen})

    async def say(self, number):
        """What breaks on the way may have arrived or not: it is not said again."""
        kind = self.random.uniform(TO_ALL if self.bears else 0, 1)
        self.sent[number] = self.others if kind < TO_ALL else [self.random.choice(self.others)]
        self.asked.add(number)
        frame = {"type": "message", "id": number, "payload": text(number)}
        if kind >= TO_ALL:
            frame["to"] = self.sent[number][0]
            if kind < TO_ALL + OFFERS:
                frame = {"type": "offer", "id": number, "to": frame["to"], "sdp": text(number)}
        await self.transport.send(frame)

    async def say_last(self):
        await self.transport.send({"type": "message", "payload": LAST})

    async def conclude(self):
        """On a new connection that is not cut, says its last word behind all others, and hears everybody else's."""
        self.over = True
        self.road.calm()
        if self.greeted.is_set():
            # Of an agent of requests only the connection by which it speaks may be gone: the one by which it hears had not
            # begun, and is whole. Who has no more to say never learns of that; who says this comes back, and says it again.
            with contextlib.suppress(Broken):
                await self.say_last()
        try:
            await asyncio.wait_for(self.heard_all.wait(), PATIENCE)
        except TimeoutError:
            self.wrongs.append(f"never heard the last word of {len(self.others) - len(self.lasts)} others")

    async def leave(self):
        self.left = True
        with contextlib.suppress(Broken):
            await self.transport.leave()


def roads(orders, transport):
    """What may become of each agent's connections, and the nodes that they go to."""
    nodes = orders.get("nodes", [(PUBLIC[4], HTTPS)])
    if orders.get("settled"):
        # Each agent stays at one node.
        return itertools.cycle(([], [node]) for node in nodes)
    return itertools.repeat((list(KINDS) if transport == "wss" else OF_REQUESTS, nodes))


def text(number):
    """Mostly short, and now and then longer than a TCP segment."""
    size = 6_000 if number % 20 == 19 else 8 + 7 * number % 200
    return f"{number:08}".ljust(size, "abcdefghijklmnopqrstuvwxyz"[number % 26])


async def talk(orders):
    """Everybody talks for so many seconds."""
    trust = ssl.create_default_context(cafile=orders["ca"])
    transports = itertools.cycle(orders["transports"])
    agents, problems = [], []
    ways = {transport: roads(orders, transport) for transport in TRANSPORTS}
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
    for room in orders["rooms"]:
        for name, token in room.items():
            seed = f"{orders['seed']} {orders['seconds']} {name}"
            transport = next(transports)
            road = Road(seed, *next(ways[transport]))
            await road.open()
            others, bears = [other for other in room if other != name], orders.get("bears", False)
            agents.append(Agent(name, others, road, TRANSPORTS[transport](token, trust, road), seed, bears))
    async with asyncio.TaskGroup() as group:
        for agent in agents:
            group.create_task(agent.run())
        for agent in agents:
            await agent.greeted.wait()
        talking = [group.create_task(agent.talk()) for agent in agents]
        await asyncio.sleep(orders["seconds"])
        await asyncio.gather(*(agent.conclude() for agent in agents))
        await asyncio.wait(talking)
        await asyncio.gather(*(agent.leave() for agent in agents))
    await asyncio.gather(*(agent.road.close() for agent in agents))
    return report(agents, problems)


def report(agents, problems):
    """What the books say when they are laid side by side."""
    by_name = {agent.name: agent for agent in agents}
    came = {(sender, agent.name): numbers for agent in agents for sender, numbers in agent.came.items()}
    counts, wrongs = collections.Counter(), []
    for (sender, receiver), numbers in came.items():
        for first, second in itertools.pairwise(numbers):
            if second <= first:
                wrongs.append(f"from {sender} to {receiver}: {second} came after {first}")
        arrived, promised = set(numbers), set(by_name[sender].promised)
        for number, receivers in by_name[sender].sent.items():
            if receiver in receivers:
                counts[number in promised, number in arrived] += 1
                if number in promised and number not in arrived:
                    wrongs.append(f"from {sender} to {receiver}: {number} was answered `delivered` and never came")
    return {
        "promised": counts[True, True] + counts[True, False],
        "kept": counts[True, True],
        "in_doubt": counts[False, True] + counts[False, False],
        "arrived": counts[False, True],
        "connections": sum(agent.road.carried for agent in agents),
        "failed": sum((agent.failed for agent in agents), collections.Counter()),
        "resumed": sum(agent.resumed for agent in agents),
        "cuts": sum((agent.road.cuts for agent in agents), collections.Counter()),
        "wrongs": problems + wrongs + [f"{agent.name}: {wrong}" for agent in agents for wrong in agent.wrongs],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(talk(json.load(sys.stdin)))))
