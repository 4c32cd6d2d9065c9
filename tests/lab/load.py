"""Clients that relay, as `halfway bench turn` makes them, and the settings that let in so many of them."""

import json
import subprocess

from appliance import BINARY
from net import PUBLIC


def settings(secret, turn="", rest=""):
    """For the part `[http]` of a configuration, and all behind it; `turn` is more for `[turn]`."""
    return f"""
handshakes_per_second_per_address = 0
[turn]
allow_peers = ["{PUBLIC[4]}/32"]
allocations_per_agent = 0
unauthenticated_per_second = 0
{turn}
[credentials]
secrets = ["{secret}"]
{rest}
"""


def load(place, secret, way, seconds, *flags, uri=f"turn:{PUBLIC[4]}", clients=16, rate=2_000, binary=BINARY, peer=PUBLIC[4], **options):
    """Clients that send for a while in a namespace or a machine, in the background."""
    command = place.command(
        binary, "bench", "turn", uri, "--secret", secret, "--run", way, "--clients", clients, "--rate", rate,
        "--time", f"{seconds:.0f}s", "--peer-ip", peer, "--json", *flags,
    )  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def found(process):
    """What it measured, once it is over."""
    output, _ = process.communicate(timeout=7_200)
    assert process.returncode == 0, f"a load failed: {output}"
    (outcome,) = json.loads(output).values()
    return outcome
