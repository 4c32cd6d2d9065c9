"""What a flood of TLS handshakes does to the relay's round trips over UDP.

Halfway has the first processor, the flood and the client that measures the second, so that only what the handshakes do to
Halfway shows. Rounds alternate: without the flood, and with it.
Run as root from anywhere: python3 benches/handshakes.py [ROUNDS]
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

LAB = pathlib.Path(__file__).resolve().parents[1] / "tests/lab"
sys.path.insert(0, str(LAB))

import flood
from appliance import Appliance
from net import Net

SECONDS = 3


def main(rounds):
    os.sched_setaffinity(0, {1})
    without, beside = [], []
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        for family, network in flood.STRANGERS.items():
            net.public.ip(f"-{family}", "route", "add", "local", network, "dev", "lo")
        with Appliance(net, pathlib.Path(scratch), settings=flood.SETTINGS) as appliance:
            subprocess.run(["taskset", "-apc", "0", str(appliance.process.pid)], check=True, stdout=subprocess.DEVNULL)
            before = appliance.metrics()["halfway_handshakes_total"]
            for number in range(rounds):
                without.append(flood.trips(net, SECONDS))
                running = [flood.flood(net, "handshakes", SECONDS + 1) for _ in range(2)]
                beside.append(flood.trips(net, SECONDS))
                for process in running:
                    flood.finished(process)
                print(f"round {number + 1}: {flood.beside('handshakes', without[-1], beside[-1])}", flush=True)
            made = (appliance.metrics()["halfway_handshakes_total"] - before) / rounds / (SECONDS + 1)
    for quantile in "p50", "p99":
        ratio = statistics.median(b[quantile] / a[quantile] for a, b in zip(without, beside))
        print(f"{quantile}: median of the ratios of {rounds} rounds {ratio:.2f}, at {made:.0f} handshakes a second")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 7)
