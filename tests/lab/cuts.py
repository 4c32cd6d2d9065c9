"""Agents whose connections are cut all the time, anywhere and in every way, lose nothing that they were promised.

A frame answered `delivered` arrives once and in order; one that was not answered before the connection broke arrives once or
not at all. No cut here is so long that a session could not be resumed, so that each resumption must succeed.
Usage: cuts.py [SEED [TRANSPORT …]]: what is drawn again with the same seed, and what the agents use in turn.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile

from agents import PYTHON
from appliance import Appliance
from checks import settled, tell
from net import Net

ROOMS, AGENTS = ("one", "two"), 10
# The first time is for the heap.
WARM_UP, SECONDS = 15, 60
# They all come from one address, again and again.
SETTINGS = "handshakes_per_second_per_address = 0\n[signaling]\nmessages_per_second = 0"


def main(seed=None, *transports):
    seed = int(seed) if seed else random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        with Appliance(net, pathlib.Path(scratch), settings=SETTINGS) as appliance:
            orders = {"seed": seed, "transports": transports or ["wss", "poll", "events", "any"], "ca": str(appliance.ca)}
            orders["rooms"] = [
                {f"{room}-{n}": appliance.token(f"{room}-{n}", "--room", room) for n in range(AGENTS)} for room in ROOMS
            ]
            return tell(run(net, appliance, orders))


def run(net, appliance, orders):
    kinds = 5 if "wss" in orders["transports"] else 4
    yield from promises(talk(net, {**orders, "seconds": WARM_UP}), kinds)
    yield from ends(appliance)
    descriptors, reports = appliance.descriptors(), []
    lost = appliance.lost_by(lambda: reports.append(talk(net, {**orders, "seconds": SECONDS})))
    for report in reports:
        yield from promises(report, kinds)
    yield from ends(appliance)
    # The connection by which the numbers were asked for may not have ended yet.
    left = settled(lambda: appliance.descriptors() - descriptors, lambda left: left <= 0)
    yield left <= 0, f"descriptors more than before: {left}"
    yield lost <= 2_048, f"resident memory: {appliance.resident()} KiB, {lost:+} KiB by {SECONDS} s of cuts"
    said = appliance.log_file.read_text()
    yield not said, f"logged: {said or 'nothing'}"


def talk(net, orders):
    """The report of agents that talk inside, where Halfway is."""
    command = net.public.command(PYTHON, pathlib.Path(__file__).with_name("talkers.py"))
    limit = orders["seconds"] + 60
    talked = subprocess.run(command, input=json.dumps(orders), stdout=subprocess.PIPE, text=True, timeout=limit, check=True)
    return json.loads(talked.stdout)


def promises(report, kinds):
    cuts = ", ".join(f"{count} {kind}" for kind, count in sorted(report["cuts"].items()))
    yield len(report["cuts"]) == kinds, f"connections: {report['connections']}; {cuts}"
    yield report["resumed"] > 0, f"sessions resumed: {report['resumed']} times"
    yield report["kept"] == report["promised"], f"{report['kept']} of {report['promised']} frames came as promised"
    yield report["in_doubt"] > 0, f"not answered before a cut: {report['in_doubt']}, of which {report['arrived']} came"
    wrongs = "".join(f"\n     {wrong}" for wrong in report["wrongs"][:20])
    yield not report["wrongs"], f"twice, out of order, changed, refused or not resumed: {len(report['wrongs'])}{wrongs}"


def ends(appliance):
    """Every agent has left; Halfway has a moment to hear of the last connections' ends."""
    names = "agents", "agent_connections", "rooms", "held_bytes", "connections"

    def left():
        numbers = appliance.metrics()
        return [numbers[f"halfway_{name}"] for name in names]

    left = settled(left, lambda left: not any(left))
    yield not any(left), "left in the end: " + ", ".join(f"{number:.0f} {name}" for number, name in zip(left, names))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
