"""A hundred thousand allocations come and go; in the end everything is as it was in the beginning.

Most are released, some lose their stream, and fifty clients vanish without a word: at their agent's quota, fifty new ones
take their places.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time

import stun
from appliance import HTTPS, Appliance
from checks import tell
from net import PUBLIC, Net

SECRET = "the secret of the churn"
# Allocate, bind, free: so often in all. One agent for each process, and one whose clients vanish.
CYCLES, PROCESSES, STREAMS = 100_000, 4, 2_000
QUOTA = 50
SETTINGS = f"""
handshakes_per_second_per_address = 0
[turn]
allocations_per_agent = {QUOTA}
unauthenticated_per_second = 0
[credentials]
secrets = ["{SECRET}"]
"""


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        with Appliance(net, pathlib.Path(scratch), settings=SETTINGS) as appliance:
            return tell(come_and_go(net, appliance))


def come_and_go(net, appliance):
    first, started = State(appliance), time.monotonic()
    vanish = net.public.command("python3", __file__, "vanish")
    vanishing = subprocess.run(vanish, capture_output=True, text=True, timeout=60, check=True)
    vanished = time.monotonic()
    yield int(vanishing.stdout) == QUOTA, f"{QUOTA} clients vanished without a word"
    churn(net, appliance, CYCLES, STREAMS)
    took = time.monotonic() - started
    made = appliance.metrics()["halfway_allocations_made_total"] - first.made
    yield made == CYCLES + STREAMS + QUOTA, f"{made:.0f} allocations in {took:.0f} s"
    # Idle for so long they may be taken for dead.
    time.sleep(max(0.0, vanished + 31 - time.monotonic()))
    new = net.public.run("python3", __file__, "replace")
    yield int(new) == QUOTA, f"{new.strip()} new clients of the same agent took their places, and left"
    last = State(appliance)
    for name in "allocations", "ports live", "deadlines", "streams":
        yield last.numbers[name] == 0, f"{name}: {last.numbers[name]:.0f}"
    yield last.numbers["ports"] == first.numbers["ports"], f"ports, free and bound: {last.numbers['ports']:.0f}"
    yield last.descriptors == first.descriptors, f"descriptors: {first.descriptors} → {last.descriptors}"
    lost = appliance.lost_by(lambda: churn(net, appliance, CYCLES, STREAMS))
    yield lost <= 2_048, f"resident memory: {last.resident} KiB, and {lost:+} KiB by as many again"


def churn(net, appliance, cycles, streams):
    """Some processes cycle, and one lets streams end."""
    each = [(f"churn-{number}", cycles // PROCESSES) for number in range(PROCESSES)]
    commands = [["cycle", agent, count] for agent, count in each] + [["streams", appliance.ca, streams]]
    running = [subprocess.Popen(net.public.command("python3", __file__, *command)) for command in commands]
    for process in running:
        assert process.wait(timeout=300) == 0, "a client of the churn failed"


class State:
    """What may have leaked."""

    def __init__(self, appliance):
        numbers = appliance.metrics()

        def total(pattern):
            return sum(value for name, value in numbers.items() if re.match(f"halfway_{pattern}", name))

        self.numbers = {
            "allocations": total(r"allocations\{"),
            "ports live": total(r'relay_ports\{state="live"'),
            "ports": total(r'relay_ports\{state="(free|bound)"'),
            "deadlines": total("deadlines"),
            "streams": total(r"relay_streams\{"),
        }
        self.made = numbers["halfway_allocations_made_total"]
        self.descriptors, self.resident = appliance.descriptors(), appliance.resident()


# What runs in the namespace.


def cycle(agent, count):
    client = stun.Client((PUBLIC[4], 3478), SECRET, agent)
    client.ask(stun.ALLOCATE, stun.UDP_TRANSPORT, sign=False)
    for number in range(int(count)):
        answer = client.ask(stun.ALLOCATE, stun.UDP_TRANSPORT)
        assert isinstance(answer, dict), f"cycle {number}: Allocate is answered {answer}"
        client.bind(0x4000 + number % 0x1000, ("8.8.8.8", 1 + number % 60_000))
        client.release()


def end_streams(ca, count):
    """Half on TCP, half on TLS, and none says goodbye."""
    for number in range(int(count)):
        port, transport = (3478, "tcp") if number % 2 else (HTTPS, "tls")
        client = stun.Client((PUBLIC[4], port), SECRET, "streams", transport, ca)
        client.allocate()
        client.close()


def vanish():
    """Nothing is refreshed, nothing is released; the sockets are simply gone."""
    clients = [stun.Client((PUBLIC[4], 3478), SECRET, "vanishing") for _ in range(QUOTA)]
    print(sum(bool(client.allocate()) for client in clients))


def replace():
    # From elsewhere: a port of one that vanished still has its allocation.
    clients = [stun.Client((PUBLIC[4], 3478), SECRET, "vanishing", source="127.0.0.2") for _ in range(QUOTA)]
    print(sum(bool(client.allocate()) for client in clients))
    for client in clients:
        client.release()


PARTS = {"cycle": cycle, "streams": end_streams, "vanish": vanish, "replace": replace}

if __name__ == "__main__":
    if sys.argv[1:]:
        PARTS[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
