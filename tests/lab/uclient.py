"""coturn's own client, `turnutils_uclient`, and its peer."""

import json
import re
import subprocess

from appliance import BINARY, HTTPS
from net import run

PEER_PORT = 3480
CLIENTS = 4
# How the client reaches Halfway; TLS is on the port of HTTPS.
TRANSPORTS = {"UDP": [], "TCP": ["-t"], "TLS": ["-t", "-S", "-p", HTTPS]}


def lost(namespace, appliance, name, *arguments, messages=500):
    """Of `CLIENTS` times `messages` packets, how many were lost, as the client says, or what it said instead."""
    agent = re.sub(r"\W+", "-", name)
    user = json.loads(run(BINARY, "--config", str(appliance.config), "ice", agent))
    command = namespace.command(
        "turnutils_uclient", "-u", user["username"], "-w", user["password"], "-r", PEER_PORT,
        "-n", messages, "-m", CLIENTS, "-l", 1_000, "-z", 5, *arguments,
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    found = re.search(r"Total lost packets (\d+)", done.stdout + done.stderr)
    return found[1] if found else (done.stdout + done.stderr)[-400:]


class Peer:
    """Sends back what it gets on these addresses, for as long as the `with` does."""

    def __init__(self, namespace, *addresses):
        listen = [part for address in addresses for part in ("-L", address)]
        self.command = namespace.command("turnutils_peer", *listen, "-p", PEER_PORT)

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
