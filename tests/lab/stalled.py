"""1 GiB for an agent that does not read: the sender is told of each frame, memory is bounded, others notice nothing.

A program for inside, too: with an argument it is the agents, takes their tokens as JSON, and prints a report.
"""

import asyncio
import contextlib
import json
import pathlib
import socket
import ssl
import subprocess
import sys
import tempfile
import time

from agents import PYTHON
from appliance import HTTPS, Appliance
from checks import tell
from net import PUBLIC, Net

GIB, PAYLOAD = 1 << 30, 60_000
SETTINGS = "handshakes_per_second_per_address = 0\n[signaling]\nmessages_per_second = 0"
# A window, the buffers of a socket and of TLS, and what the heap rounds up to.
MOST_KIB = 4_096


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        with Appliance(net, pathlib.Path(scratch), settings=SETTINGS) as appliance:
            return tell(run(net, appliance))


def run(net, appliance):
    orders = {"ca": str(appliance.ca), **{name: appliance.token(name) for name in ("deaf", "loud", "calm", "prompt")}}
    command = net.public.command(PYTHON, __file__, json.dumps(orders))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as talking:
        yield json.loads(talking.stdout.readline())["warm"], "everybody is there"
        yield from vanishing_is_noticed(appliance)
        before = most = appliance.resident()
        talking.stdin.write("\n")
        talking.stdin.flush()
        while talking.poll() is None:
            most = max(most, appliance.resident())
            time.sleep(0.1)
        end = json.loads(talking.stdout.readline())
    yield end["bytes"] >= GIB, f"{end['bytes']} bytes in {end['frames']} frames in {end['seconds']:.1f} s"
    told = end["delivered"] + end["queueFull"]
    yield told == end["frames"], f"told of each: {end['delivered']} delivered, {end['queueFull']} queueFull"
    yield end["queueFull"] > 0, "most were refused"
    yield end["read"] == end["delivered"], f"read in the end: {end['read']}, once and in order"
    yield end["calm"] > 10 and end["calm_lost"] == 0, f"beside it {end['calm']} round trips of others, the slowest {end['calm_slowest_ms']} ms"
    yield most - before <= MOST_KIB, f"resident memory: {before} KiB, and {most - before:+} KiB at most"


def vanishing_is_noticed(appliance):
    """A client that is gone without a word is, for the kernel, who answers nothing for 30 seconds."""
    options = {
        (copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        for copy in appliance.connections()
    }
    yield options == {(1, 30_000)}, f"of each connection: kept alive, and milliseconds without an answer: {options}"


async def talk(orders):
    trust = ssl.create_default_context(cafile=orders["ca"])
    agents = {name: await join(orders[name], trust) for name in ("deaf", "loud", "calm", "prompt")}
    print(json.dumps({"warm": True}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    report = {"read": 0, "calm": 0, "calm_lost": 0, "calm_slowest_ms": 0}
    beside = asyncio.create_task(chat(agents["calm"][0], agents["prompt"][0], report))
    report |= await shout(agents["loud"][0])
    beside.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beside
    report["read"] = await read(agents["deaf"], orders["deaf"], trust, report["delivered"])
    print(json.dumps(report))


async def join(token, trust, resume=None):
    """The connection and its session, once it is welcomed."""
    from websockets.asyncio.client import connect

    options = {"ssl": trust, "subprotocols": ["halfway.v1"], "ping_interval": None, "proxy": None, "compression": None}
    headers = {"Authorization": f"Bearer {token}"}
    socket = await connect(f"wss://{PUBLIC[4]}:{HTTPS}/v1/ws", additional_headers=headers, max_queue=4, **options)
    await socket.send(json.dumps({"type": "hello", **({"resume": resume} if resume else {})}))
    return socket, json.loads(await socket.recv())["session"]


async def shout(loud):
    """Says as much as it can to the one that does not read."""
    frame = json.dumps({"type": "message", "to": "deaf", "id": 1, "payload": "x" * PAYLOAD})
    told = {"delivered": 0, "queueFull": 0}
    frames, started = -(-GIB // PAYLOAD), time.monotonic()

    async def count():
        while sum(told.values()) < frames:
            answer = json.loads(await loud.recv())
            if answer["type"] in ("delivered", "error"):
                told[answer.get("code", "delivered")] += 1

    counting = asyncio.create_task(count())
    for _ in range(frames):
        await loud.send(frame)
    await asyncio.wait_for(counting, 30)
    return {"frames": frames, "bytes": frames * len(frame), "seconds": time.monotonic() - started, **told}


async def chat(calm, prompt, report):
    """Round trips of two others."""

    async def echo():
        async for text in prompt:
            if json.loads(text)["type"] == "message":
                await prompt.send(json.dumps({"type": "message", "to": "calm", "payload": 0}))

    echoing = asyncio.create_task(echo())
    try:
        while True:
            started = time.monotonic()
            await calm.send(json.dumps({"type": "message", "to": "prompt", "payload": 0}))
            try:
                async with asyncio.timeout(5):
                    while json.loads(await calm.recv())["type"] != "message":
                        pass
                report["calm"] += 1
                report["calm_slowest_ms"] = max(report["calm_slowest_ms"], round(1e3 * (time.monotonic() - started)))
            except TimeoutError:
                report["calm_lost"] += 1
            await asyncio.sleep(0.02)
    finally:
        echoing.cancel()


async def read(deaf, token, trust, expected):
    """What it finds when it reads at last, on its connection or, if that was closed for slowness, after a resumption."""
    from websockets import ConnectionClosed

    (socket, session), seen = deaf, 0
    async with asyncio.timeout(60):
        while seen < expected:
            try:
                frame = json.loads(await socket.recv())
            except ConnectionClosed as closed:
                assert closed.rcvd is None or closed.rcvd.code == 4003, closed
                socket, again = await join(token, trust, {"session": session, "after": seen})
                assert again == session, "not resumed"
                continue
            if frame["type"] == "message":
                assert frame["seq"] == seen + 1, (frame["seq"], seen)
                seen += 1
    return seen


if __name__ == "__main__":
    if sys.argv[1:]:
        asyncio.run(talk(json.loads(sys.argv[1])))
    else:
        sys.exit(main())
