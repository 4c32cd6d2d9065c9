"""Another version takes over under load: clients send all the time, each way and to each other, and lose no packet."""

import pathlib
import signal
import sys
import tempfile

from appliance import Appliance, relayed_packets, total
from checks import settled, tell
from load import found, load, settings
from net import PUBLIC, Net

SECRET = "the secret of the upgrade"
# What runs at once: over what, and which way. Packets a second and seconds of each.
LOADS = [("udp", "pair"), ("udp", "to-peer"), ("udp", "to-client"), ("tcp", "to-peer")]
CLIENTS, RATE, SECONDS = 32, 2_000, 8


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        with Appliance(net, pathlib.Path(scratch), settings=settings(SECRET)) as appliance:
            return tell(take_over(net, appliance))


def take_over(net, appliance):
    loads = [clients(net, *each) for each in LOADS]
    first = settled(appliance.metrics, lambda numbers: relayed_packets(numbers) > RATE)
    relayed, live = relayed_packets(first), total(first, "allocations")
    yield relayed > RATE, f"{relayed:.0f} packets relayed, {live:.0f} allocations"
    appliance.process.send_signal(signal.SIGUSR2)
    handed = settled(appliance.metrics, lambda numbers: numbers["halfway_clients_handed_over"] > 0)
    passed_on = handed["halfway_clients_handed_over"]
    # Each of a pair holds one, and so does each client of the others; those on TCP have their own connections.
    yield passed_on == 3 * CLIENTS, f"{passed_on:.0f} clients on UDP are passed on to the process before"
    meanwhile = {name: clients(net, "udp", name) for name in ("ping", "churn")}
    for name, outcome in zip(meanwhile, map(found, meanwhile.values())):
        yield not outcome.get("lost"), f"new clients meanwhile: {name} {outcome}"
    for (transport, way), outcome in zip(LOADS, map(found, loads)):
        sent = outcome["offeredPerSecond"] * SECONDS
        yield outcome["lossPercent"] == 0, f"{transport} {way}: {sent:.0f} packets, {outcome['lossPercent']} % lost"
    yield appliance.process.wait(timeout=60) == 0, "the process before has ended with its last allocation"
    last = settled(appliance.metrics, lambda numbers: numbers["halfway_clients_handed_over"] == 0)
    yield last["halfway_clients_handed_over"] == 0 == total(last, "allocations"), "nobody is left, and nobody passed on"
    drops = {name: value for name, value in last.items() if "dropped_packets" in name and value}
    yield not drops, f"packets that the new process dropped: {drops or 'none'}"


def clients(net, transport, way):
    uri = f"turn:{PUBLIC[4]}?transport={transport}"
    return load(net.public, SECRET, way, SECONDS, uri=uri, clients=CLIENTS, rate=RATE)


if __name__ == "__main__":
    sys.exit(main())
