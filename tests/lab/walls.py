"""Agents behind a firewall that lets out nothing but TCP to one or two ports reach the relay all the same.

Over TLS one port is all there is: HTTPS, signaling and the relay. The other agent stands in the open, or behind the same
kind of wall. The relay has a name: Firefox does not even try a `turns:` URL with an address in it. The wall counts: what an
agent sent must have left by the port of the transport in question, since the wall for TCP has to leave HTTPS open, too.
Usage: walls.py [KIND+KIND …]: the first offers.
"""

import pathlib
import sys
import tempfile

from agents import Pages
from appliance import HOST, HTTPS, PAGES_PORT, Appliance
from matrix import BLOB, MESSAGES, SIZE, meet
from net import PUBLIC, Net, let_out, only_tcp

# The first is the relay's. The last is for the example's page, which Halfway does not serve; with a page from its own origin
# there would be no port beside HTTPS.
PORTS = {"tcp": (3478, HTTPS, PAGES_PORT), "tls": (HTTPS, PAGES_PORT)}
# Whose site has the wall: the first of the pair, the second, or both.
FIRST, SECOND, BOTH = (0,), (1,), (0, 1)
MEETINGS = [
    ("chromium+chromium", BOTH),
    ("firefox+chromium", BOTH),
    ("chromium+firefox", BOTH),
    ("firefox+werift", FIRST),
    ("werift+firefox", SECOND),
    ("werift+werift", BOTH),
    ("aiortc+aiortc", BOTH),
]
# Those who must be told. werift and aiortc look at the first URL only. A browser finds a way by itself, so that over TLS it
# gets no hint; but the wall for TCP leaves HTTPS open, and Firefox then takes TLS on some runs.
TOLD = {"tcp": {"werift", "aiortc", "chromium", "firefox"}, "tls": {"werift", "aiortc"}}


def main(wanted):
    meetings = [(pair, walled) for pair, walled in MEETINGS if not wanted or pair in wanted]
    outcomes = [outcome for transport in PORTS for outcome in behind(transport, meetings)]
    print(f"{outcomes.count(True)} passed, {outcomes.count(False)} failed")
    return 0 if outcomes and all(outcomes) else 1


def behind(transport, meetings):
    """All meetings over one transport; whether each went well."""
    for walled in (FIRST, SECOND, BOTH):
        of_these = [pair for pair, wall in meetings if wall == walled]
        if not of_these:
            continue
        with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
            sites = net.site(1), net.site(2)
            for site in sites:
                site.resolves({HOST: [PUBLIC[4]]})
            for site in walled:
                only_tcp(sites[site], *PORTS[transport])
            with Appliance(net, pathlib.Path(scratch), "--public-host", HOST) as appliance, Pages(appliance):
                for number, pair in enumerate(of_these):
                    directory = pathlib.Path(scratch) / f"run{number}"
                    directory.mkdir()
                    yield met(appliance, sites, pair.split("+"), transport, walled, directory)


def met(appliance, sites, pair, transport, walled, directory):
    told = [{"turn_transport": transport} if kind in TOLD[transport] and n in walled else {} for n, kind in enumerate(pair)]
    walls = " and ".join(pair[site] for site in walled)
    port = PORTS[transport][0]
    before = [let_out(sites[site], port) for site in walled]
    try:
        line = meet(appliance, sites, pair, "ordered", True, directory, told)
        for site, earlier in zip(walled, before):
            sent = let_out(sites[site], port) - earlier
            assert sent >= MESSAGES * SIZE + BLOB, f"{pair[site]} sent only {sent} bytes to port {port}"
    except AssertionError as problem:
        print(f"FAIL {transport} alone for {walls}: {'+'.join(pair)}: {problem}", flush=True)
        return False
    print(f"{line} ({transport} alone for {walls})", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
