"""The matrix: two agents behind every pair of NATs, each measured first.

For each pair of kinds of site, and each library that can cross both: the data channel opens, 200 messages go each way, and
they take the way that theory says. The routers count what leaves, so that the way is seen and not believed.
Usage: nat.py [--full] [--write] [--agents a,b] [--times N] [KIND+KIND …]: the corners, or all of it; `--write` writes
docs/nat-matrix.md.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
import tempfile

from agents import Agent, Pages
from appliance import ROOT, Appliance
from internet import PAGES, Internet
from kinds import KINDS, Reflector, Site
from probes import BY_ADDRESS, BY_PORT, INDEPENDENT

MESSAGES, SIZE = 200, 1_024
PATIENCE = 40
# What a site's router must have seen leave by one way, of what its agent had to say.
MOST = 0.8
# Milliseconds from the offer to the open channel, with links of 20 ms, for those that trickle.
DIRECT_MS, RELAYED_MS = 1_000, 1_500
TRICKLES = "chromium", "werift", "node-datachannel"
# The ways that a library cannot go, and why; Chromium goes them all.
CANNOT = {
    "node-datachannel": {
        "tcp": "its TURN is UDP alone",
        "tls": "its TURN is UDP alone",
        "proxy": "it knows no proxy",
    },
    "werift": {"proxy": "it knows no proxy"},
    "aiortc": {"proxy": "it knows no proxy"},
}
LIBRARIES = "chromium", *CANNOT
# Those who look at the first URL of the relay only, and must be told.
TOLD = {"werift": {"tcp": "tcp", "tls": "tls"}, "aiortc": {"tcp": "tcp", "tls": "tls"}}


def arrives(there, here):
    """Whether a packet from an agent `there` ever gets through to the address that the world knows of the one `here`."""
    if here.mapping != INDEPENDENT:
        # The address that the relay saw is for the relay.
        return here.filtering == INDEPENDENT
    # An agent writes to the address that it was told, so that its filter knows that.
    passes = {INDEPENDENT: True, BY_ADDRESS: True, BY_PORT: there.mapping == INDEPENDENT}
    return passes[here.filtering]


def theory(one, other):
    """"direct" where hole punching is possible, "relayed" where it is not (RFC 5128)."""
    if one.shared:
        return "direct" if one.near or one.hairpin else "relayed"
    meet = set(one.families) & set(other.families) and "nat64" not in (one.name, other.name)
    punches = one.way == other.way == "udp" and meet
    return "direct" if punches and (arrives(one, other) or arrives(other, one)) else "relayed"


def may_take(kind, path):
    """The ways that a site's bytes may take."""
    if path == "direct":
        return {"elsewhere"}
    return {"udp": {"udp"}, "tcp": {"tcp", "tls"}, "tls": {"tls"}, "proxy": {"tls"}}[kind.way]


@dataclasses.dataclass
class Meeting:
    """Two kinds of site, and the library on both."""

    kinds: tuple
    library: str

    def __str__(self):
        return f"{'+'.join(kind.name for kind in self.kinds)} {self.library}"


def meetings(pairs, libraries):
    for pair in pairs:
        for library in libraries:
            if not any(kind.way in CANNOT.get(library, {}) or kind.name in CANNOT.get(library, {}) for kind in pair):
                yield Meeting(pair, library)


def all_pairs():
    apart = [kind for kind in KINDS.values() if not kind.shared]
    return [*itertools.combinations_with_replacement(apart, 2), *[(kind, kind) for kind in KINDS.values() if kind.shared]]


class Lab:
    """The internet with two sites of each kind that is wanted, and Halfway."""

    def __init__(self, net, kinds):
        numbers = itertools.count(1)
        self.sites = {}
        for kind in kinds:
            sites = [Site(net, next(numbers), kind) for _ in range(1 if kind.shared else 2)]
            self.sites[kind.name] = sites * (2 if kind.shared else 1)

    def places(self, meeting):
        """The site and the agent's namespace of both."""
        sites = [self.sites[kind.name][side] for side, kind in enumerate(meeting.kinds)]
        return [(site, site.agents[side if site.kind.shared else 0]) for side, site in enumerate(sites)]

    def verified(self):
        """Each site is what it is said to be."""
        sites = {site.number: site for pair in self.sites.values() for site in pair}.values()
        asked = [(site, site.ask()) for site in sites]
        for site, asking in asked:
            for seen in (json.loads(process.communicate(timeout=60)[0]) for process in asking):
                truth = site.truth()
                wrong = {what: seen.get(what) for what in truth if seen.get(what) != truth[what]}
                yield not wrong, f"{site.kind.name}: {wrong or seen}"
                

def meet(appliance, meeting, places, directory):
    """Both agents meet; what both said and what their routers saw."""
    names = f"a-{directory.name}", f"b-{directory.name}"
    before = [site.sent() for site, _ in places]
    agents = []
    try:
        for side in (1, 0):
            site, namespace = places[side]
            options = {"messages": MESSAGES, "size": SIZE, "to": names[1] if side == 0 else None}
            options["turn_transport"] = TOLD.get(meeting.library, {}).get(site.kind.way)
            flags = ["--disable-features=WebRtcHideLocalIpsWithMdns"] if meeting.library == "chromium" else []
            if site.proxy:
                flags.append(f"--proxy-server=http://{site.proxy}")
            agents.insert(0, Agent(meeting.library, namespace, appliance, names[side], directory, flags, **options))
        results = [agent.result(PATIENCE) for agent in agents]
    finally:
        for agent in agents:
            agent.stop()
    left = [{way: after - then[way] for way, after in site.sent().items()} for (site, _), then in zip(places, before)]
    return results, left


def judged(meeting, results, left):
    """A line about it; fails if anything is not as it should be."""
    path = theory(*meeting.kinds)
    for result in results:
        assert result["received"] == MESSAGES and result["in_order"], f"received {result['received']} of {MESSAGES}"
    ways = []
    for kind, ways_left in zip(meeting.kinds, left):
        way = max(ways_left, key=ways_left.get)
        if ways_left[way] < MOST * MESSAGES * SIZE:
            assert kind.shared, f"the bytes took no one way: {ways_left}"
            way = "elsewhere"
        assert way in may_take(kind, path), f"{path} is what theory says of {kind.name}, but the bytes left so: {ways_left}"
        ways.append(way)
    opened = max(result["opened_ms"] for result in results)
    return path, ways, opened


def main(arguments):
    flags = argparse.ArgumentParser()
    flags.add_argument("pairs", nargs="*")
    flags.add_argument("--full", action="store_true")
    flags.add_argument("--agents", default=",".join(LIBRARIES))
    chosen = flags.parse_args(arguments)
    pairs = [tuple(KINDS[name] for name in pair.split("+")) for pair in chosen.pairs] or all_pairs()
    kinds = [kind for kind in KINDS.values() if any(kind in pair for pair in pairs)]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Internet() as net:
        net.scratch = scratch
        lab = Lab(net, kinds)
        with Reflector(net):
            for ok, line in lab.verified():
                print("ok  " if ok else "FAIL", line, flush=True)
                outcomes.append(ok)
        with Appliance(net, pathlib.Path(scratch), "--public-host", "turn.lab", url="https://turn.lab", pages="https://pages.lab") as appliance, Pages(appliance, net.core, PAGES.values()):
            for number, meeting in enumerate(meetings(pairs, chosen.agents.split(","))):
                directory = pathlib.Path(scratch) / f"run{number}"
                directory.mkdir()
                try:
                    results, left = meet(appliance, meeting, lab.places(meeting), directory)
                    path, ways, opened = judged(meeting, results, left)
                    print(f"ok   {meeting}: {path} {ways}, open {opened} ms", flush=True)
                    outcomes.append(True)
                except AssertionError as problem:
                    print(f"FAIL {meeting}: {problem}", flush=True)
                    outcomes.append(False)
    print(f"{outcomes.count(True)} passed, {outcomes.count(False)} failed")
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
