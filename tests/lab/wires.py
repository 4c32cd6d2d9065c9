"""The links of a test network: each takes its time, loses what it is told to lose, and keeps the order.

They run in a namespace of their own, as one process: whatever comes out of one end of a link goes into the other, later.
The kernel could do that by netem, but not every kernel has it. As the kernel hands frames over, with what it has not done
yet (checksums, segments) written in front of them, so they are handed back.
Usage: wires.py, with one order a line on stdin, each answered by an empty line: {"link": "1"} joins the interfaces `1a` and
`1b`; with it or later `delay` and `jitter` in seconds, and `loss` from 0 to 1.
"""

import asyncio
import collections
import json
import random
import socket
import subprocess
import sys

# Of linux/if_packet.h; Python has no name for them.
SOL_PACKET, PACKET_VNET_HDR = 263, 15
ALL_PROTOCOLS, OUTGOING = 0x0003, 4
LARGEST = 10 + 18 + 65_536


class Wires:
    """The process, as the network's owner sees it."""

    def __init__(self, namespace):
        self.namespace = namespace
        command = namespace.command("python3", __file__)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def tell(self, link, **order):
        """Makes the link, or changes it from now on."""
        self.process.stdin.write(json.dumps({"link": link, **order}) + "\n")
        assert self.process.stdout.readline() == "\n", f"the wires broke at link {link}"


class Link:
    """One link; it has two directions, each with a queue of its own."""

    def __init__(self, name):
        self.delay = self.jitter = self.loss = 0.0
        self.lost = 0
        ends = [end(f"{name}{side}") for side in "ab"]
        for source, target in ends, ends[::-1]:
            direction = Direction(self, source, target)
            asyncio.get_running_loop().add_reader(source, direction.take)


def end(interface):
    """The end of a link: sees the frames that come in, and can send."""
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    frames.setblocking(False)
    frames.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    frames.bind((interface, ALL_PROTOCOLS))
    return frames


class Direction:
    def __init__(self, link, source, target):
        self.link, self.source, self.target = link, source, target
        self.waiting, self.last = collections.deque(), 0.0

    def take(self):
        """Takes what has come, and lets it wait for its time."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                frame, (_, _, kind, *_) = self.source.recvfrom(LARGEST)
            except OSError:
                # Nothing more has come, or the interface went down.
                return
            if kind == OUTGOING or random.random() < self.link.loss:
                continue
            # Never before the one in front of it.
            self.last = max(self.last, loop.time() + self.link.delay + random.random() * self.link.jitter)
            self.waiting.append(frame)
            loop.call_at(self.last, self.give)

    def give(self):
        try:
            self.target.send(self.waiting.popleft())
        except OSError:
            # The other end is down, or its queue is full: so it is with links.
            self.link.lost += 1


async def main():
    links, orders = {}, asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        order = json.loads(line)
        name = order.pop("link")
        if name not in links:
            links[name] = Link(name)
        for quality, value in order.items():
            setattr(links[name], quality, value)
        print(flush=True)


if __name__ == "__main__":
    asyncio.run(main())
