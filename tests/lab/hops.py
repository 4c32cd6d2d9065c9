"""Routers in between: one before the client, and one before Halfway, whose public address is not its own.

An answer that leaves with a TTL of 1 reaches a client on the same link and no other; so each packet's TTL is looked at.
"""

import itertools
import json
import pathlib
import socket
import subprocess
import sys
import tempfile

from appliance import Appliance
from checks import tell
from net import PUBLIC, Net
from uclient import TRANSPORTS, Peer, lost

# What the kernel sends with, less one router.
TTL = 64 - 1
MESSAGES = 100


def main():
    return tell(itertools.chain(beyond_a_router(), behind_one_to_one_nat()))


def beyond_a_router():
    """The client is one router away; every packet it gets has one hop less than the kernel gives."""
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        site = net.site_beyond_router(1)
        peers = net.site(2)
        flags = ["--allow-peer", "10.70.0.0/16,fd70::/16"]
        with Appliance(net, pathlib.Path(scratch), *flags) as appliance, Peer(peers, "10.70.2.2", "fd70:2::2"):
            for transport, version in [(transport, version) for transport in TRANSPORTS for version in (4, 6)]:
                family = [] if version == 4 else ["-x"]
                peer = "10.70.2.2" if version == 4 else "fd70:2::2"
                for data in [], ["-s"]:
                    with Hops(site) as hops:
                        arguments = "-c", *TRANSPORTS[transport], *family, *data, "-e", peer, PUBLIC[version]
                        gone = lost(site, appliance, f"hop {transport} {version} {data}", *arguments, messages=MESSAGES)
                    seen = hops.seen[version]
                    what = "indications" if data else "channels"
                    line = f"beyond a router, {transport} over IPv{version}, {what}: {gone} lost, TTLs {sorted(seen)}"
                    yield gone == "0" and seen == {TTL}, line


def behind_one_to_one_nat():
    """Halfway has a private address; peers outside and relayed addresses of its own are both reached."""
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        home, client, peers = net.site(1), net.site(2), net.site(3)
        net.forward_one_to_one(home)
        flags = ["--public-ip", PUBLIC[4], "--allow-peer", "10.70.3.0/24"]
        with Appliance(net, pathlib.Path(scratch), *flags, namespace=home) as appliance, Peer(peers, "10.70.3.2"):
            for transport, arguments in TRANSPORTS.items():
                for what, mode in {"a peer outside": ["-e", "10.70.3.2"], "each other": ["-y"]}.items():
                    all_of_it = "-c", *arguments, *mode, PUBLIC[4]
                    gone = lost(client, appliance, f"nat {transport} {what}", *all_of_it, messages=MESSAGES)
                    yield gone == "0", f"behind 1:1 NAT, {transport}, clients and {what}: {gone} lost"


class Hops:
    """The TTLs and hop limits of all packets that come into a namespace from Halfway, while the `with` lasts."""

    def __init__(self, namespace):
        self.command = namespace.command("python3", __file__, "watch")

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()
        return self

    def __exit__(self, *_):
        output, _ = self.process.communicate("enough\n")
        self.seen = {int(version): set(ttls) for version, ttls in json.loads(output).items()}


def watch():
    """Runs in the client's namespace until told on stdin that it is enough."""
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
    sniffer.setblocking(False)
    sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    print("ready", flush=True)
    sys.stdin.readline()
    seen = {4: set(), 6: set()}
    sources = {socket.inet_pton(socket.AF_INET, PUBLIC[4]): 4, socket.inet_pton(socket.AF_INET6, PUBLIC[6]): 6}
    while True:
        try:
            packet = sniffer.recv(64)
        except BlockingIOError:
            break
        source, ttl = (packet[12:16], packet[8]) if packet[0] >> 4 == 4 else (packet[8:24], packet[7])
        if version := sources.get(source):
            seen[version].add(ttl)
    print(json.dumps({version: list(ttls) for version, ttls in seen.items()}))


if __name__ == "__main__":
    sys.exit(watch() if sys.argv[1:] == ["watch"] else main())
