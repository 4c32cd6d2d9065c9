"""Clients that come and go while packets fly, and peers that look at every one of them.

Programs: `comers.py peers IP` prints its ports, answers each packet with the same, and reports at the end of its input;
`comers.py clients SERVER SECRET PEER PORTS PACKETS` reports when so many have come back or are lost. A packet says whose it
is, by which allocation and channel it goes, and for which peer it is; and whether its allocation had ended when it was sent.
"""

import collections
import json
import random
import select
import socket
import struct
import sys
import time
import zlib

import stun

PEERS, CLIENTS, CHANNELS, BURST = 8, 24, 4, 16
# Of client, allocation, channel, the peer's port, the relayed port, whether it comes too late, number; then a filler.
HEAD = struct.Struct("!IIHHHBI")
FILLER = bytes(range(256))
# Packets in flight, of all clients together: no buffer on the way holds fewer.
FLYING = 400


def packet(*of, length):
    body = HEAD.pack(*of) + FILLER[:length]
    return body + struct.pack("!I", zlib.crc32(body))


def opened(datagram):
    """What it says, or nothing if it is not as it was sent."""
    body, checksum = datagram[:-4], datagram[-4:]
    return HEAD.unpack_from(body) if len(body) >= HEAD.size and struct.pack("!I", zlib.crc32(body)) == checksum else None


class Peers:
    def __init__(self, ip):
        self.found, self.sockets = collections.Counter(), []
        for _ in range(PEERS):
            peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            peer.bind((ip, 0))
            peer.setblocking(False)
            self.sockets.append(peer)

    def run(self):
        print(json.dumps([peer.getsockname()[1] for peer in self.sockets]), flush=True)
        poll = select.epoll()
        by_number = {peer.fileno(): peer for peer in self.sockets}
        for number in [*by_number, sys.stdin.fileno()]:
            poll.register(number, select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                if number not in by_number:
                    return print(json.dumps(self.found), flush=True)
                self.answer(by_number[number])

    def answer(self, peer):
        own = peer.getsockname()[1]
        for _ in range(256):
            try:
                datagram, source = peer.recvfrom(2_048)
            except BlockingIOError:
                return
            said = opened(datagram)
            self.found["packets"] += 1
            self.found["corrupted"] += said is None
            if said:
                _, _, _, port, relayed, too_late, _ = said
                self.found["for another"] += port != own or source[1] != relayed
                self.found["too late"] += too_late
            peer.sendto(datagram, source)


class Comer:
    """One client: it allocates, binds, sends, and leaves, over and over."""

    def __init__(self, number, server, secret, peer, ports):
        self.number, self.peer, self.ports = number, peer, ports
        self.client = stun.Client(server, secret, f"comer-{number}", patience=5)
        # The same socket, which does not wait.
        self.quick = self.client.socket.dup()
        self.quick.setblocking(False)
        # What comes while an answer is waited for.
        self.early, self.serial, self.relayed = [], 0, [0, 0]
        self.flying = 0
        receive = self.client.receive
        self.client.receive = lambda: self.answer(receive)
        self.come()

    def answer(self, receive):
        while (message := receive())[0] >= 0x40:
            self.early.append(message)
        return message

    def come(self):
        self.serial += 1
        port = self.client.allocate()[1] if self.serial == 1 else self.again()
        self.relayed = [self.relayed[1], port]
        self.channels = {}
        self.bind(CHANNELS)

    def again(self):
        answer = self.client.ask(stun.ALLOCATE, stun.UDP_TRANSPORT)
        assert isinstance(answer, dict), f"Allocate is answered {answer}"
        return stun.parse_address(answer[stun.XOR_RELAYED_ADDRESS])[1]

    def bind(self, more):
        for port in random.sample(sorted(set(self.ports) - set(self.channels.values())), more):
            channel = 0x4000 + len(self.channels)
            self.client.bind(channel, (self.peer, port))
            self.channels[channel] = port

    def send(self, count, too_late=False):
        for number in range(count):
            channel, port = random.choice(list(self.channels.items()))
            of = self.number, self.serial, channel, port, self.relayed[1], too_late, number
            self.client.send_on(channel, packet(*of, length=random.randrange(256)))

    def leave(self, found):
        # What is under way has nowhere to come back to.
        found["left behind"] += self.flying
        self.flying = 0
        self.client.release()
        self.send(BURST, too_late=True)

    def hear(self, found):
        """How many have come back."""
        early, self.early = self.early, []
        messages = [*early, *self.waiting()]
        self.flying = max(0, self.flying - len(messages))
        for message in messages:
            channel = struct.unpack("!H", message[:2])[0]
            said = opened(message[4:])
            found["corrupted"] += said is None
            if said:
                number, serial, sent_on, _, relayed, too_late, _ = said
                # A relayed port that another had before may still be answered.
                own = relayed in self.relayed and (relayed != self.relayed[1] or number != self.number or serial == self.serial)
                found["for another"] += not own or (number == self.number and sent_on != channel)
                found["too late"] += too_late
        return len(messages)

    def waiting(self):
        while True:
            try:
                yield self.quick.recv(2_048)
            except BlockingIOError:
                return


def clients(server, secret, peer, ports, wanted):
    comers = [Comer(number, server, secret, peer, ports) for number in range(CLIENTS)]
    found, flying = collections.Counter(), 0
    heard = time.monotonic()
    while found["sent"] < wanted:
        comer = random.choice(comers)
        if flying <= FLYING:
            comer.send(BURST)
            found["sent"] += BURST
            comer.flying += BURST
            flying += BURST
        back = sum(each.hear(found) for each in comers) if flying > FLYING else comer.hear(found)
        if back:
            heard, flying = time.monotonic(), flying - back
            found["came back"] += back
        elif time.monotonic() > heard + 0.2:
            # What is lost does not fly any more.
            flying, heard = 0, time.monotonic()
        if random.randrange(90) == 0:
            comer.leave(found)
            comer.come()
            found["left and came"] += 1
        elif random.randrange(60) == 0 and len(comer.channels) < PEERS:
            comer.bind(1)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        found["came back"] += sum(each.hear(found) for each in comers)
    for comer in comers:
        comer.client.release()
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "peers":
        Peers(sys.argv[2]).run()
    else:
        ip, secret, peer, ports, wanted = sys.argv[2:]
        clients((ip, 3478), secret, peer, json.loads(ports), int(wanted))
