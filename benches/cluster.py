"""What a second node costs: frames between two nodes through NATS beside frames within one; and what agents cost the engine.

All of it shares this machine's processors: nodes, engine and load. Rounds alternate between one node and two.
Run as root from anywhere: python3 benches/cluster.py pairs|subscriptions|restart [ROUNDS]
"""

import base64
import json
import pathlib
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/lab"))

from appliance import BINARY
from cluster import ENGINE, Engine, Place, nodes
from net import PUBLIC, Net

SUBSCRIPTIONS, AGENTS = 100_000, 10_000


def bench(place, each, *load):
    """What agents that take turns among the nodes find."""
    ca = each[0].config.with_name("all.pem")
    ca.write_text("".join(node.ca.read_text() for node in each))
    command = [BINARY, "bench", "signal", *(node.url for node in each), "--config", each[0].config, "--ca", ca, "--json", *load]
    return place.net.public.command(*command)


def pairs(place, rounds):
    """Frames a second at full load, and the time of one frame at a load that leaves room."""
    loads = {
        "as many as there can be": (["--agents", "200", "--in-flight", "8"], "framesPerSecond"),
        "1,000 frames a second": (["--agents", "200", "--rate", "1000"], "p50Us"),
    }
    with Engine(place), nodes(place) as each:
        for label, (load, figure) in loads.items():
            seen = {1: [], 2: []}
            for number in range(rounds):
                for count in seen:
                    command = bench(place, each[:count], "--run", "pairs", "--time", "5s", "--size", "512", *load)
                    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["pairs"]
                    seen[count].append(found[figure])
                    print(f"round {number + 1}: {label}: {count} nodes: {json.dumps(found)}", flush=True)
            one, two = (statistics.median(seen[count]) for count in seen)
            ratio = statistics.median(two / one for one, two in zip(*seen.values()))
            print(f"{label}: {figure}: one node {one:.0f}, two {two:.0f}: ratio {ratio:.2f}, difference {two - one:+.0f}")


def subscriptions(place, _rounds):
    """What the subscriptions of so many agents cost one server."""
    with Engine(place) as engine, place.net.public.entered():
        (process,) = engine.processes.values()
        with socket.create_connection((PUBLIC[4], ENGINE)) as client:
            lines = client.makefile("rb")
            lines.readline()
            before = resident(process.pid)
            began = time.monotonic()
            name = lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
            room = [name(f"room-{number // 100}") for number in range(SUBSCRIPTIONS)]
            for number in range(SUBSCRIPTIONS):
                client.sendall(f"SUB halfway.to.{room[number]}.{name(f'agent-{number}')} {number + 1}\r\n".encode())
            client.sendall(b"PING\r\n")
            assert any(b"PONG" in line for line in lines)
            took, each = time.monotonic() - began, (resident(process.pid) - before) * 1_024 / SUBSCRIPTIONS
            print(f"{SUBSCRIPTIONS} subscriptions of one connection: {took:.2f} s, {each:.0f} bytes each")


def restart(place, rounds):
    """A node of many agents starts anew."""
    # Each agent is a socket of the load, and one of the node.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with Engine(place), nodes(place) as each:
        for number in range(rounds):
            command = bench(place, each[:1], "--run", "restart", "--agents", AGENTS)
            load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert any("all are here" in line for line in load.stderr), "the agents did not come"
            memory = each[0].resident()
            each[0].process.kill()
            each[0].process.wait()
            each[0].drain.wait()
            began = time.monotonic()
            each[0].__enter__()
            ready = time.monotonic() - began
            found = json.loads(load.communicate()[0])["restart"]
            print(f"round {number + 1}: ready after {ready:.2f} s; {json.dumps(found)}; {memory} KiB before", flush=True)


def resident(pid):
    """KiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


def main(what, rounds="5"):
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        net.public.forwards()
        sites = [net.site(number) for number in range(1, 4)]
        {"pairs": pairs, "subscriptions": subscriptions, "restart": restart}[what](Place(net, sites, pathlib.Path(scratch)), int(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
