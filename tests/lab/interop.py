"""coturn's own client, `turnutils_uclient`, against Halfway over loopback, on UDP, TCP and TLS: none of thousands of
packets is lost."""

import concurrent.futures
import itertools
import pathlib
import sys
import tempfile

from appliance import Appliance
from net import Net
from uclient import CLIENTS, TRANSPORTS, Peer, lost

MESSAGES = 500
# -c: no RTCP, so no EVEN-PORT with a reserved neighbour. -s: Send indications. -x: an IPv6 relayed address.
# -y: clients talk to each other through their relayed addresses. -Z: a relayed address of each family. The last word is
# the server's address.
MODES = {
    "channels, IPv4": ["-e", "127.0.0.1", "127.0.0.1"],
    "indications, IPv4": ["-s", "-e", "127.0.0.1", "127.0.0.1"],
    "channels, IPv6 relay for an IPv4 client": ["-x", "-e", "::1", "127.0.0.1"],
    "channels, IPv6": ["-x", "-e", "::1", "::1"],
    "indications, IPv6": ["-s", "-x", "-e", "::1", "::1"],
    "channels, IPv4 relay for an IPv6 client": ["-e", "127.0.0.1", "::1"],
    "channels, client to client": ["-y", "127.0.0.1"],
    "indications, client to client": ["-s", "-y", "127.0.0.1"],
    "both families, an IPv4 peer": ["-Z", "-e", "127.0.0.1", "127.0.0.1"],
    "both families, an IPv6 peer": ["-Z", "-x", "-e", "::1", "127.0.0.1"],
}


def main():
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="halfway-interop-") as scratch, Net() as net:
        flags = ["--public-ip", "127.0.0.1,::1", "--allow-peer", "127.0.0.0/8,::1/128", "--relay-ports", "49152-65535"]
        with Appliance(net, pathlib.Path(scratch), *flags) as appliance, Peer(net.public, "127.0.0.1", "::1"):
            runs = list(itertools.product(TRANSPORTS, MODES))
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                outcomes = pool.map(lambda run: exchange(net, appliance, *run), runs)
                for (transport, mode), gone in zip(runs, outcomes):
                    ok = gone == "0"
                    print(f"{'ok  ' if ok else 'FAIL'} turnutils_uclient over {transport}, {mode}: {gone} lost", flush=True)
                    passed, failed = passed + ok, failed + (not ok)
            refused = lost(net.public, appliance, "even port", "-e", "127.0.0.1", "127.0.0.1", messages=1)
            ok = "508 (Insufficient Capacity)" in refused
            print(f"{'ok  ' if ok else 'FAIL'} turnutils_uclient, an even port and the next one reserved: {refused.split(': ')[-1]}")
            passed, failed = passed + ok, failed + (not ok)
            packets = sum(value for name, value in appliance.metrics().items() if "relayed_packets" in name)
            least = len(runs) * CLIENTS * MESSAGES * 2
            assert packets >= least, f"Halfway relayed {packets:.0f} packets, not {least}"
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def exchange(net, appliance, transport, mode):
    arguments = "-c", *TRANSPORTS[transport], *MODES[mode]
    return lost(net.public, appliance, f"{transport} {mode}", *arguments, messages=MESSAGES)


if __name__ == "__main__":
    sys.exit(main())
