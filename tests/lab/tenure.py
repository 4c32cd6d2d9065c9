"""Credentials that live for 20 seconds: a relayed channel outlives them, and ends when its agent is revoked.

Usage: tenure.py [--long]: three quarters of a minute of talk, or five minutes.
"""

import pathlib
import sys
import tempfile
import time

import stun
from agents import Agent, Pages, all_results
from appliance import Appliance
from checks import tell
from net import PUBLIC, Net, assert_apart

TTL, SHORT, LONG = 20, 45, 300
SECRET = "the secret of the tenure"
SETTINGS = f"""
[credentials]
ttl = "{TTL}s"
secrets = ["{SECRET}"]
"""
PATIENCE = 30


def main(arguments):
    seconds = LONG if "--long" in arguments else SHORT
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        directory, sites = pathlib.Path(scratch), (net.site(1), net.site(2))
        # There is no way but the relay.
        assert_apart(*sites)
        with Appliance(net, directory, settings=SETTINGS) as appliance, Pages(appliance):
            return tell(tenure(appliance, sites, directory, seconds))


def tenure(appliance, sites, directory, seconds):
    yield from lasts(appliance, sites, directory, seconds)
    yield from ends(appliance, sites, directory)


def talk(appliance, sites, directory, names, seconds, **options):
    """Two pages, the first of which calls."""
    calls = {"to": names[1]}, {}
    options = {"page": "lasting.html", "seconds": seconds, **options}
    pages = [
        Agent("chromium", site, appliance, name, directory, **options, **call)
        for site, name, call in zip(sites, names, calls)
    ]
    assert pages[0].console(lambda line: "OPEN" in line, PATIENCE)
    return pages


def lasts(appliance, sites, directory, seconds):
    # Whenever they gather anew, the credentials that they began with are worth nothing.
    pages = talk(appliance, sites, directory, ("caller", "called"), seconds, restart_every=TTL + 5)
    try:
        results = all_results(pages, seconds + PATIENCE)
    finally:
        for page in pages:
            page.stop()
    for page, one, other in zip(pages, results, results[::-1]):
        yield one["received"] == one["announced"] == other["sent"] and one["in_order"], (
            f"{page.name}: {one['received']} of {other['sent']} came in {seconds} s, once and in order"
        )
        refreshed = f"{page.name}: fresh credentials {one['refreshed']} times, gathered anew {one['restarts']} times"
        # At half of their life, or a tenth of that sooner.
        yield seconds / TTL * 2 - 1 <= one["refreshed"] <= seconds / TTL * 2.3 + 1, refreshed
        yield one["path"] == ["relay", "relay"], f"{page.name}: {one['path']}"
    yield results[0]["restarts"] >= seconds // (TTL + 5) - 1, f"the path changed {results[0]['restarts']} times"


def ends(appliance, sites, directory):
    names = "bystander", "revoked"
    old, admin = appliance.token(names[1]), appliance.token("ops", "--scope", "admin")
    pages = talk(appliance, sites, directory, names, 600)
    try:
        before = appliance.allocations()
        asked = time.monotonic()
        status = ask(appliance, admin, f"/v1/agents/{names[1]}", "-X", "DELETE")
        while not (ended := revoked(appliance)) and time.monotonic() - asked < 5:
            pass
        took = time.monotonic() - asked
        yield status == "204" and ended and took < 1, f"{ended:.0f} of {before:.0f} allocations ended after {took:.2f} s"
        left = appliance.allocations()
        yield left == before - ended > 0, f"{left:.0f} are left"
        told = pages[1].console(lambda line: "signaling ended (4002)" in line, PATIENCE)
        yield bool(told), "its page heard that it was revoked"
        yield (status := ask(appliance, old, "/v1/ice")) == "401", f"its token from before: {status}"
        with appliance.namespace.entered():
            client = stun.Client((PUBLIC[4], 3478), SECRET, names[1])
            client.ask(stun.ALLOCATE, stun.UDP_TRANSPORT, sign=False)
            answer = client.ask(stun.ALLOCATE, stun.UDP_TRANSPORT)
        yield answer == 401, f"a credential that was not handed out since: {answer}"
        status = ask(appliance, appliance.token(names[0]), "/v1/ice")
        yield status == "200", f"the other one's token: {status}"
    finally:
        for page in pages:
            page.stop()


def ask(appliance, token, path, *flags):
    """The status of the answer."""
    command = "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", appliance.ca
    return appliance.namespace.run(*command, "-H", f"Authorization: Bearer {token}", *flags, appliance.url + path)


def revoked(appliance):
    return appliance.metrics()['halfway_allocations_ended_total{reason="revoked"}']


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
