"""Instructions that Halfway itself spends on a relayed packet, from socket to socket, as callgrind counts them: a number
that no neighbour on the machine disturbs. What the kernel does is not in it.

Packets go one at a time, and in trains as the kernel gives them to us where senders use GSO. Run as root from anywhere.
"""

import contextlib
import pathlib
import re
import socket
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/lab"))

import appliance
import stun
from net import PUBLIC, Net, run

SECRET = "the secret of the benchmark"
SETTINGS = f"""
[turn]
shards = 1
allow_peers = ["{PUBLIC[4]}/32"]
[credentials]
secrets = ["{SECRET}"]
"""
CHANNEL, SIZE, TRAIN, ROUNDS = 0x4000, 160, 32, 1_000
UDP_SEGMENT = 103


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        directory = pathlib.Path(scratch)
        counted = directory / "counted"
        counted.write_text(
            f'#!/bin/sh\nexec valgrind -q --tool=callgrind --callgrind-out-file={directory}/out "{appliance.BINARY}" "$@"\n'
        )
        counted.chmod(0o755)
        appliance.BINARY = str(counted)
        with appliance.Appliance(net, directory, settings=SETTINGS) as server:
            count(net, directory, server.process.pid)


def count(net, directory, pid):
    with subprocess.Popen(
        net.public.command("python3", __file__, "packets"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as talking:
        for what in iter(talking.stdout.readline, ""):
            run("callgrind_control", "--zero", str(pid))
            talking.stdin.write("\n")
            talking.stdin.flush()
            packets = int(talking.stdout.readline())
            print(f"{what.strip()}: {instructions(directory, pid) / packets:.0f} instructions a packet", flush=True)
    assert talking.returncode == 0, "the clients failed"


def instructions(directory, pid):
    """Since they were set to zero."""
    run("callgrind_control", "--dump", str(pid))
    newest = max(directory.glob("out*"), key=lambda path: path.stat().st_mtime_ns)
    total = re.search(r"^(?:totals|summary): (\d+)", newest.read_text(), re.M)
    newest.unlink()
    return int(total[1])


# What runs in the namespace.


def packets():
    """Each kind of traffic once it has been announced and asked for; then how many packets it was."""
    peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    peer.bind((PUBLIC[4], 0))
    peer.settimeout(60)
    client, other = (stun.Client((PUBLIC[4], 3478), SECRET, f"agent-{number}", patience=60) for number in range(2))
    relayed, there = client.allocate(), other.allocate()
    client.bind(CHANNEL, peer.getsockname())
    client.bind(CHANNEL + 1, there)
    other.bind(CHANNEL, relayed)
    to_peer, to_client, to_other = data(CHANNEL), bytes(SIZE), data(CHANNEL + 1)
    flows = {
        "client to peer": (lambda bytes: client.socket.send(bytes), peer, to_peer),
        "peer to client": (lambda bytes: peer.sendto(bytes, relayed), client.socket, to_client),
        "client to client": (lambda bytes: client.socket.send(bytes), other.socket, to_other),
    }
    for name, (send, receiver, packet) in flows.items():
        for train in 1, TRAIN:
            print(f"{name}, {f'in trains of {train}' if train > 1 else 'one at a time'}", flush=True)
            sys.stdin.readline()
            with segments(client.socket, len(packet), train), segments(peer, len(packet), train):
                for _ in range(ROUNDS // train):
                    send(packet * train)
                    for _ in range(train):
                        receiver.recv(2_048)
            print(ROUNDS // train * train, flush=True)


def data(channel):
    return channel.to_bytes(2, "big") + SIZE.to_bytes(2, "big") + bytes(SIZE)


@contextlib.contextmanager
def segments(sender, size, train):
    """What is sent is cut into packets of that size."""
    sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size if train > 1 else 0)
    yield
    sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)


if __name__ == "__main__":
    if sys.argv[1:]:
        packets()
    else:
        main()
