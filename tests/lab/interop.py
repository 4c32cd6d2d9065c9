"""coturn's own client, `turnutils_uclient`, against Halfway over loopback, on UDP, TCP and TLS: none of thousands of
packets is lost."""

import concurrent.futures
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from appliance import BINARY, HTTPS, Appliance
from net import Net, run

PEER_PORT = 3480
CLIENTS, MESSAGES = 4, 500
# How the client reaches Halfway; TLS is on the port of HTTPS.
TRANSPORTS = {"UDP": [], "TCP": ["-t"], "TLS": ["-t", "-S", "-p", HTTPS]}
# -c: no RTCP, so no EVEN-PORT with a reserved neighbour. -s: Send indications. -x: an IPv6 relayed address.
# -y: clients talk to each other through their relayed addresses. The last word is the server's address.
MODES = {
    "channels, IPv4": ["-e", "127.0.0.1", "127.0.0.1"],
    "indications, IPv4": ["-s", "-e", "127.0.0.1", "127.0.0.1"],
    "channels, IPv6 relay for an IPv4 client": ["-x", "-e", "::1", "127.0.0.1"],
    "channels, IPv6": ["-x", "-e", "::1", "::1"],
    "indications, IPv6": ["-s", "-x", "-e", "::1", "::1"],
    "channels, IPv4 relay for an IPv6 client": ["-e", "127.0.0.1", "::1"],
    "channels, client to client": ["-y", "127.0.0.1"],
    "indications, client to client": ["-s", "-y", "127.0.0.1"],
}


def main():
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="halfway-interop-") as scratch, Net() as net:
        flags = ["--public-ip", "127.0.0.1,::1", "--allow-peer", "127.0.0.0/8,::1/128", "--relay-ports", "49152-65535"]
        peers = ["turnutils_peer", "-L", "127.0.0.1", "-L", "::1", "-p", PEER_PORT]
        with Appliance(net, pathlib.Path(scratch), *flags) as appliance, Process(net.public.command(*peers)):
            runs = list(itertools.product(TRANSPORTS, MODES))
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                outcomes = pool.map(lambda run: exchange(net, appliance, *run), runs)
                for (transport, mode), lost in zip(runs, outcomes):
                    ok = lost == "0"
                    print(f"{'ok  ' if ok else 'FAIL'} turnutils_uclient over {transport}, {mode}: {lost} lost", flush=True)
                    passed, failed = passed + ok, failed + (not ok)
            packets = sum(value for name, value in appliance.metrics().items() if "relayed_packets" in name)
            least = len(runs) * CLIENTS * MESSAGES * 2
            assert packets >= least, f"Halfway relayed {packets:.0f} packets, not {least}"
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def exchange(net, appliance, transport, mode):
    """Packets lost, as the client says, or what it said instead."""
    agent = re.sub(r"\W+", "-", f"{transport} {mode}")
    user = json.loads(run(BINARY, "--config", str(appliance.config), "ice", agent))
    command = net.public.command(
        "turnutils_uclient", "-c", "-u", user["username"], "-w", user["password"], "-r", PEER_PORT,
        "-n", MESSAGES, "-m", CLIENTS, "-l", 1_000, "-z", 5, *TRANSPORTS[transport], *MODES[mode],
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Total lost packets (\d+)", done.stdout + done.stderr)
    return found[1] if found else (done.stdout + done.stderr)[-400:]


class Process:
    """Runs for as long as the `with` does."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    sys.exit(main())
