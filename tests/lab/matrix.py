"""Relay-only data channels between every pair of agents that we have examples for.

Each pair, and each kind of channel: 1,000 messages of 1 KiB and a blob of 200 KiB each way, all intact, through Halfway
alone. The agents sit in namespaces that cannot reach each other, and Halfway's own counters must show the bytes.
Some pairs also meet without being told to use the relay only: then each names private addresses to the other, which the
relay refuses, and no client may lose its relay over that.
Usage: matrix.py [KIND+KIND …]: the first of a pair offers, the second answers.
"""

import itertools
import pathlib
import sys
import tempfile
import time

from agents import KINDS, TRICKLES, Agent, Pages, all_results
from appliance import Appliance
from net import Net, assert_apart

MESSAGES, SIZE, BLOB = 1_000, 1_024, 200 * 1_024
PATIENCE = 60
CHANNELS = ("ordered", "unordered", "lossy")
WITH_PRIVATE_CANDIDATES = [("chromium", "werift"), ("werift", "aiortc"), ("aiortc", "node-datachannel")]
# From the offer to the open channel, for pairs that trickle. The bar is a second; on a busy machine a first DTLS flight
# may come too early, which costs one second more, or three.
OPEN_MS = 4_000


def main(wanted):
    chosen = [tuple(pair.split("+")) for pair in wanted] or list(itertools.combinations_with_replacement(KINDS, 2))
    runs = [(pair, channel, True) for pair in chosen for channel in CHANNELS]
    runs += [(pair, "ordered", False) for pair in WITH_PRIVATE_CANDIDATES if not wanted]
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        sites = net.site(1), net.site(2)
        assert_apart(*sites)
        assert_apart(*reversed(sites))
        with Appliance(net, pathlib.Path(scratch)) as appliance, Pages(appliance):
            for number, (pair, channel, relay_only) in enumerate(runs):
                directory = pathlib.Path(scratch) / f"run{number}"
                directory.mkdir()
                try:
                    print(meet(appliance, sites, pair, channel, relay_only, directory), flush=True)
                    passed += 1
                except AssertionError as problem:
                    print(f"FAIL {'+'.join(pair)} {channel}, relay only {relay_only}: {problem}", flush=True)
                    failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def meet(appliance, sites, pair, channel, relay_only, directory, told=({}, {})):
    """One pair over one kind of channel, each `told` more if need be; a line about it."""
    before, dropped, started = appliance.relayed(), appliance.lost(), time.monotonic()
    names = f"a-{directory.name}", f"b-{directory.name}"
    common = {"relay_only": relay_only, "channel": channel, "messages": MESSAGES, "size": SIZE, "blob": BLOB}
    answerer = Agent(pair[1], sites[1], appliance, names[1], directory, **common, **told[1])
    offerer = Agent(pair[0], sites[0], appliance, names[0], directory, to=names[1], **common, **told[0])
    try:
        results = all_results((offerer, answerer), PATIENCE)
    finally:
        offerer.stop()
        answerer.stop()
    relayed = appliance.relayed() - before
    lost = appliance.lost() - dropped
    assert lost == 0, f"the relay dropped {lost:.0f} packets that it should have passed on"
    for agent, result in zip((offerer, answerer), results):
        # Without retransmissions a sender short of processor time gives up some by itself, ten at a time.
        least = MESSAGES // 2 if channel == "lossy" else MESSAGES
        assert result["received"] >= least, f"{agent.kind} received {result['received']} messages\n{agent.tail()}"
        assert channel == "lossy" or result["blob_ok"], f"{agent.kind}: the blob is not intact"
        assert channel != "ordered" or result["in_order"], f"{agent.kind}: out of order"
    payload = 2 * (MESSAGES * SIZE + BLOB)
    # Each byte comes from one client and goes to another: two relayed addresses, counted on the way out and in.
    assert relayed >= 2 * payload * 0.98, f"only {relayed:.0f} bytes were relayed"
    opened = max(result["opened_ms"] for result in results)
    if relay_only and set(pair) <= TRICKLES:
        assert opened < OPEN_MS, f"the channel opened after {opened} ms"
    took = time.monotonic() - started
    received = "/".join(str(result["received"]) for result in results)
    kind = channel if relay_only else f"{channel}, private candidates too"
    return f"ok   {'+'.join(pair)} {kind}: open {opened:.0f} ms, {received} messages, {took:.1f} s in all"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
