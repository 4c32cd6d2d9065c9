"""Signaling by HTTP requests, as an agent does it whose network breaks WebSockets: `/v1/signal`."""

import asyncio
import contextlib
import json

from net import PUBLIC

# Seconds for which a poll waits, at most.
WAIT = 25


class Broken(Exception):
    """The connection is gone, with these last words or without any."""


class Wire:
    """One HTTP/1.1 connection, opened when it is first needed."""

    def __init__(self, trust, port):
        self.trust, self.port, self.writer = trust, port, None

    async def ask(self, method, path, headers, body=b""):
        """Sends a request; gives the status and the header fields of the answer, whose body comes next."""
        if not self.writer:
            way = asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust, server_hostname=PUBLIC[4])
            self.reader, self.writer = await way
        head = {"Host": PUBLIC[4], "Content-Length": len(body), **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        status, *fields = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        return int(status.split()[1]), dict(field.lower().split(": ", 1) for field in fields)

    async def body(self, headers):
        return await self.reader.readexactly(int(headers["content-length"]))

    async def chunks(self):
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]

    def drop(self):
        if self.writer:
            self.writer.transport.abort()


class Poll:
    """Frames go by POST, one connection; they come by GET, another: one poll after the other."""

    def __init__(self, token, trust, road):
        self.authorization, self.trust, self.road = {"Authorization": f"Bearer {token}"}, trust, road
        self.wires, self.listening = [], None

    async def connect(self, hello):
        self.wires = [Wire(self.trust, self.road.port) for _ in range(2)]
        # What came, and at last that nothing will. Whoever speaks waits for the answer to what was said before.
        self.frames, self.speaking = asyncio.Queue(), asyncio.Lock()
        self.after, self.session = hello.get("resume", {}).get("after", 0), {}
        await self.send(hello)
        self.listening = asyncio.create_task(self.listen())

    async def send(self, frame):
        wire, frames = self.wires[0], self.frames
        async with self.speaking:
            with self.breaking(frames):
                headers = {**self.authorization, **self.session}
                status, fields = await wire.ask("POST", "/v1/signal", headers, json.dumps([frame]).encode())
                (answer,) = self.understood(status, await wire.body(fields))
        if answer["type"] == "welcome":
            self.session = {"Halfway-Session": answer["session"]}
            self.after *= answer["resumed"]
        # On a WebSocket there would be none to a frame without an id.
        if answer["type"] != "delivered" or "id" in answer:
            frames.put_nowait(answer)

    async def receive(self):
        frame = await self.frames.get()
        if isinstance(frame, Broken):
            raise frame
        return frame

    async def listen(self):
        with contextlib.suppress(Broken), self.breaking(self.frames):
            await self.hear(self.wires[1])

    async def hear(self, wire):
        while True:
            path = f"/v1/signal?after={self.after}&wait={WAIT}"
            status, fields = await wire.ask("GET", path, {**self.authorization, **self.session})
            for frame in self.understood(status, await wire.body(fields)):
                self.came(frame)

    def came(self, frame):
        self.after = frame.get("seq", self.after)
        self.frames.put_nowait(frame)

    def understood(self, status, body):
        if status != 200:
            raise Broken(f"{status} {body.decode()}")
        return json.loads(body)

    def drop_wires(self):
        for wire in self.wires:
            wire.drop()
        self.road.give_up()

    def drop(self):
        self.drop_wires()
        if self.listening:
            self.listening.cancel()

    @contextlib.contextmanager
    def breaking(self, frames):
        """Who waits for frames learns of it behind the last one; then nothing more is asked for, and so acknowledged."""
        try:
            yield
        except (OSError, EOFError, Broken) as error:
            broken = error if isinstance(error, Broken) else Broken()
            frames.put_nowait(broken)
            if frames is self.frames:
                self.drop_wires()
            raise broken from None


class Events(Poll):
    """Frames come as an event stream."""

    async def hear(self, wire):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": self.after, **self.authorization, **self.session}
        status, fields = await wire.ask("GET", "/v1/signal", headers)
        if status != 200:
            self.understood(status, await wire.body(fields))
        rest = b""
        async for chunk in wire.chunks():
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                data = [line[6:] for line in event.split(b"\n") if line.startswith(b"data: ")]
                if data:
                    self.came(json.loads(b"\n".join(data)))
        raise EOFError
