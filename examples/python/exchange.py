"""What the example agents say to each other once a channel is open; the same as ../exchange.mjs."""

import asyncio

CHUNK = 16 * 1024
OFFSET = 4  # bytes in front of a chunk that say where in the blob it belongs
HIGH_WATER = 256 * 1024  # bytes that may wait in a channel
QUIET = 3  # seconds without news after which a lossy channel has lost what is missing

PATTERN = bytes(at % 251 for at in range(251 + CHUNK))


def piece(at, length):
    return PATTERN[at % 251 : at % 251 + length]


def message(number, size):
    return f"{number:08}".ljust(size, "abcdefghijklmnopqrstuvwxyz"[number % 26])


async def send_all(write, *, messages, size, blob, lossy=False):
    """Sends everything. `write` takes a string or bytes, and returns when there is room for more."""
    # Nothing sends again what a burst loses on a lossy channel: it gets a steady stream.
    for number in range(messages):
        await write(message(number, size))
        if lossy and number % 10 == 9:
            await asyncio.sleep(0.01)
    for at in range(0, blob, CHUNK - OFFSET):
        await write(at.to_bytes(OFFSET, "big") + piece(at, min(CHUNK - OFFSET, blob - at)))
        if lossy:
            await asyncio.sleep(0.01)


def writer(channel):
    """Sends on a channel, and waits while it holds more than the network takes."""
    drained = asyncio.Event()
    channel.bufferedAmountLowThreshold = HIGH_WATER // 2
    channel.on("bufferedamountlow", drained.set)

    async def write(data):
        drained.clear()
        channel.send(data)
        if channel.bufferedAmount > HIGH_WATER:
            await drained.wait()

    return write


class Inbox:
    """Takes what arrives. `complete` is set once all the other side has announced is here, or will not come."""

    def __init__(self):
        # The channel brings something, or nothing is sure to come: until then, some libraries lose what is sent.
        self.begun = asyncio.Event()
        self.complete = asyncio.Event()
        self.lossy = False
        self._numbers = set()
        self._last = -1
        self._in_order = self._intact = True
        self._blob = 0
        self._announced = self._quiet = None

    def take(self, data):
        """One message off the channel: a string, or bytes of the blob."""
        self.begun.set()
        if isinstance(data, str):
            self._take_message(data)
        else:
            self._take_chunk(data)
        self._check()

    def announce(self, sent):
        """The other side has sent all it had: so many messages, and a blob of so many bytes."""
        self._announced = sent
        if self.lossy or sent["messages"] + sent["blob"] == 0:
            self.begun.set()
        self._check()

    def summary(self):
        blob_ok = self._intact and self._announced is not None and self._blob == self._announced["blob"]
        return {"received": len(self._numbers), "in_order": self._in_order, "blob_ok": blob_ok}

    def sound(self):
        """Whether all came as the channel promises it."""
        if self.lossy or not self._intact:
            return self._intact
        summary = self.summary()
        return summary["received"] == self._announced["messages"] and summary["blob_ok"]

    def _take_message(self, text):
        number = int(text[:8]) if text[:8].isdecimal() else -1
        if text != message(number, len(text)):
            self._intact = False
            return
        self._in_order = self._in_order and number > self._last
        self._last = number
        self._numbers.add(number)

    def _take_chunk(self, chunk):
        at, data = int.from_bytes(chunk[:OFFSET], "big"), chunk[OFFSET:]
        self._intact = self._intact and data == piece(at, len(data))
        self._blob += len(data)

    def _check(self):
        if not self._announced:
            return
        if self._quiet:
            self._quiet.cancel()
        if len(self._numbers) >= self._announced["messages"] and self._blob >= self._announced["blob"]:
            self.complete.set()
        elif self.lossy:
            self._quiet = asyncio.get_running_loop().call_later(QUIET, self.complete.set)
