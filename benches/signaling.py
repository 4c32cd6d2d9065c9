"""What signaling costs a server: Halfway over TLS, the PeerJS server over TLS, matchbox_server without TLS; in one run.

The server has the first processor, the load (`halfway bench signal`, which speaks all three protocols) the second. Rounds
alternate between the servers; counted is the processor time of the server alone, for each frame that went from agent to agent.
The rivals come from npm and from crates.io, at the versions below, and stay in target/rivals.
Run as root from anywhere: python3 benches/signaling.py pairs|idle|size [ROUNDS]
"""

import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/lab"))

from appliance import BINARY, ROOT, Appliance
from net import PUBLIC, Net, run

RIVALS = ROOT / "target/rivals"
PEERJS = "peer@1.0.2"
MATCHBOX = "matchbox_server@0.15.0"
PORT = 9000
SETTINGS = """
connections_per_address = 0
handshakes_per_second_per_address = 0
[signaling]
messages_per_second = 0
"""


class Halfway:
    """Our own, with the limits for one address lifted, since the load has only one."""

    protocol, scheme = "halfway", "https"

    @staticmethod
    @contextlib.contextmanager
    def started(net, directory):
        with Appliance(net, directory, settings=SETTINGS) as appliance:
            yield appliance.url, appliance.process.pid, ["--config", appliance.config, "--ca", appliance.ca]


class Rival:
    """A server that says in a line of its output when it is up."""

    def __init__(self, protocol, scheme, command, up):
        self.protocol, self.scheme, self.command, self.up = protocol, scheme, command, up

    @contextlib.contextmanager
    def started(self, net, directory):
        certs = directory / "certs"
        run("bash", str(ROOT / "certs/make-ca.sh"), str(certs), PUBLIC[4], PUBLIC[6], "turn.lab")
        command = net.public.command(*(part.format(certs=certs) for part in self.command))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            if not any(self.up in line for line in process.stdout):
                raise RuntimeError(f"{self.protocol} did not start")
            # Nobody reads on here, and a full pipe would stop it.
            drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
            yield f"{self.scheme}://{PUBLIC[4]}:{PORT}", process.pid, ["--ca", certs / "ca.pem"]
        finally:
            process.kill()
            process.wait()
            drain.wait()


SERVERS = {
    "halfway": Halfway,
    "PeerJS": Rival(
        "peerjs", "https",
        ["node", str(RIVALS / "node_modules/peer/dist/bin/peerjs.js"), "--port", str(PORT), "--concurrent_limit", "20000",
         "--sslkey", "{certs}/key.pem", "--sslcert", "{certs}/cert.pem"],
        "Started PeerServer",
    ),
    "matchbox": Rival("matchbox", "http", [str(RIVALS / "bin/matchbox_server"), f"0.0.0.0:{PORT}"], "Matchbox Signaling Server"),
}  # fmt: skip


def install():
    if not (RIVALS / "node_modules/peer").exists():
        run("npm", "install", "--prefix", str(RIVALS), "--no-audit", "--no-fund", PEERJS)
    if not (RIVALS / "bin/matchbox_server").exists():
        run("cargo", "install", "--locked", "--root", str(RIVALS), MATCHBOX)


def measure(net, scratch, name, kind, *load):
    """One server, started for one load; gives the figures of its run."""
    server = SERVERS[name]
    with tempfile.TemporaryDirectory(dir=scratch) as directory, server.started(net, pathlib.Path(directory)) as (url, pid, trust):
        command = ["taskset", "-c", "1", BINARY, "bench", "signal", url, "--protocol", server.protocol, "--run", kind]
        return json.loads(net.public.run(*command, "--pid", pid, "--json", *trust, *load))[kind]


def alternate(net, scratch, rounds, names, kind, figure, loads):
    """Medians of one figure, of each server under each load."""
    seen = {}
    for number in range(rounds):
        for label, load in loads.items():
            for name in names:
                figures = measure(net, scratch, name, kind, *load)
                seen.setdefault((label, name), []).append(figures[figure])
                print(f"round {number + 1}: {label}: {name}: {json.dumps(figures)}", flush=True)
    medians = {}
    for (label, name), values in seen.items():
        medians[label, name] = statistics.median(values)
        ratios = [ours / theirs for ours, theirs in zip(seen[label, "halfway"], values)]
        print(f"{label}: {name}: {figure} {medians[label, name]:.2f}, ours to it {statistics.median(ratios):.2f}")
    return medians


def pairs(net, scratch, rounds):
    each = lambda in_flight: ["--agents", "1000", "--time", "5s", "--size", "512", "--in-flight", in_flight]
    loads = {f"500 pairs, {in_flight} in flight": each(in_flight) for in_flight in "18"}
    alternate(net, scratch, rounds, SERVERS, "pairs", "serverUsPerFrame", loads)


def idle(net, scratch, rounds):
    """matchbox_server holds the load back at some thousand connections, so all get the same few."""
    loads = {"4,000 idle agents": ["--agents", "4000", "--time", "3s"]}
    alternate(net, scratch, rounds, SERVERS, "idle", "residentKibEach", loads)


def size(net, scratch, rounds):
    loads = {f"{agents} agents": ["--agents", agents, "--time", "5s", "--size", "512"] for agents in ("1000", "8000")}
    medians = alternate(net, scratch, rounds, ["halfway"], "pairs", "serverUsPerFrame", loads)
    print(f"8,000 agents to 1,000: {medians['8000 agents', 'halfway'] / medians['1000 agents', 'halfway']:.2f}")


def main(what, rounds):
    install()
    # Of everything that is started here, but for the load.
    os.sched_setaffinity(0, {0})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        {"pairs": pairs, "idle": idle, "size": size}[what](net, scratch, rounds)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [("pairs" | "idle" | "size") as what, *rounds]:
            main(what, int(rounds[0]) if rounds else 5)
        case _:
            sys.exit(__doc__)
