"""Everything at once, for a while: nothing live is lost, and in the end everything is as it was in the beginning.

Clients relay over UDP, TCP and TLS, allocations come and go, agents talk over connections that are cut, and meanwhile the
configuration is reloaded and the certificate's files are put there anew; between two rounds Halfway drains and starts anew. Usage: soak.py [--minutes N], of all rounds together.
"""

import argparse
import itertools
import os
import pathlib
import signal
import sys
import tempfile
import threading

from appliance import HTTPS, Appliance
from checks import settled, tell
from cuts import AGENTS, ROOMS, promises, talk
from load import found, load, settings
from net import PUBLIC, Net

SECRET = "the secret of the soak"
ROUNDS = 2
# Between two changes of the configuration, in seconds; with every so many of them the certificate's files are others.
RELOAD, RENEW = 3, 4
# What the configuration says of peers, until it is changed.
DENIED = "198.51.100.0/32"
# What runs at once: over what, and which way. Packets a second of each.
LOADS = [("turn:", "udp", "pair"), ("turn:", "udp", "to-client"), ("turn:", "tcp", "pair"), ("turns:", "tcp", "to-peer")]
CLIENTS, RATE = 16, 1_000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        text = settings(SECRET, f'deny_peers = ["{DENIED}"]', "[signaling]\nmessages_per_second = 0")
        with Appliance(net, pathlib.Path(scratch), settings=text) as appliance:
            return tell(soak(net, appliance, minutes * 60 / ROUNDS))


def soak(net, appliance, seconds):
    # The first time is for the heap.
    yield from at_once(net, appliance, 15, "warm-up")
    for number in range(ROUNDS):
        first, descriptors, memory = ports(appliance), appliance.descriptors(), appliance.resident()
        yield from at_once(net, appliance, seconds, f"round {number + 1}")
        last = settled(lambda: ports(appliance), lambda now: now == first)
        yield last == first, f"round {number + 1}: ports are {last}, as before"
        left = settled(lambda: appliance.descriptors() - descriptors, lambda left: left <= 0)
        yield left <= 0, f"round {number + 1}: descriptors more than before: {left}"
        grown = appliance.resident() - memory
        yield grown <= 8_192, f"round {number + 1}: resident memory {appliance.resident()} KiB, {grown:+} KiB"
        ended = appliance.starts_anew()
        yield ended == 0, f"round {number + 1}: SIGTERM, and it ends with {ended}; it starts anew"
        # So that the heap is warm again.
        yield from at_once(net, appliance, 8, f"after the start of round {number + 1}")
    said = [line for line in appliance.log_file.read_text().splitlines() if " WARN " in line or " ERROR " in line]
    yield not said, f"nothing to warn of: {said}"


def at_once(net, appliance, seconds, name):
    loads = [clients(net, appliance, scheme, transport, way, seconds) for scheme, transport, way in LOADS]
    churn = clients(net, appliance, "turn:", "udp", "churn", seconds)
    over, reloads = threading.Event(), []
    reloading = threading.Thread(target=reload_all_the_time, args=(appliance, over, reloads))
    reloading.start()
    orders = {"seed": int(seconds), "transports": ["wss", "poll", "events"], "ca": str(appliance.ca), "seconds": seconds}
    orders["rooms"] = [
        {f"{room}-{n}": appliance.token(f"{room}-{n}", "--room", room) for n in range(AGENTS)} for room in ROOMS
    ]
    report = talk(net, orders)
    for (scheme, transport, way), process in zip(LOADS, loads):
        outcome = found(process)
        sent = outcome["offeredPerSecond"] * seconds
        yield outcome["lossPercent"] == 0, f"{name}: {scheme}{transport} {way}: {sent:.0f} packets, {outcome['lossPercent']} % lost"
    cycles = found(churn)["cyclesPerSecond"]
    yield cycles > 0, f"{name}: {cycles:.0f} allocations a second came and went"
    over.set()
    reloading.join()
    yield len(reloads) > 0, f"{name}: {len(reloads)} reloads, {reloads.count('renewed')} with other files of the certificate"
    yield from ((ok, f"{name}: {line}") for ok, line in promises(report, len(report["cuts"])))


def reload_all_the_time(appliance, over, reloads):
    text = appliance.config.read_text()
    for number in itertools.count(1):
        if over.wait(RELOAD):
            break
        appliance.config.write_text(text.replace(DENIED, f"198.51.100.{number % 250}/32"))
        if number % RENEW == 0:
            renew(appliance)
        appliance.process.send_signal(signal.SIGHUP)
        reloads.append("renewed" if number % RENEW == 0 else "")
    appliance.config.write_text(text)


def renew(appliance):
    """Another certificate by the same authority is not to be had, for its key is forgotten: the same is put there as a new file."""
    for name in "cert.pem", "key.pem":
        draft = appliance.certs / f"{name}.new"
        draft.write_bytes((appliance.certs / name).read_bytes())
        os.replace(draft, appliance.certs / name)


def clients(net, appliance, scheme, transport, way, seconds):
    port = f":{HTTPS}" if scheme == "turns:" else ""
    uri = f"{scheme}{PUBLIC[4]}{port}?transport={transport}"
    return load(net.public, SECRET, way, seconds, "--ca", appliance.ca, uri=uri, clients=CLIENTS, rate=RATE)


def ports(appliance):
    numbers = appliance.metrics()
    return {state: numbers[f'halfway_relay_ports{{state="{state}"}}'] for state in ("live", "bound")}


if __name__ == "__main__":
    sys.exit(main())
