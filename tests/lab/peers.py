"""Two pages with PeerJS as it comes from npm meet over Halfway: directly, and through the relay alone."""

import pathlib
import sys
import tempfile

from agents import Agent, Pages
from appliance import Appliance
from checks import tell
from net import Net, assert_apart

MESSAGES = 100
PATIENCE = 60
SETTINGS = """
[signaling]
peerjs = true
"""


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        directory = pathlib.Path(scratch)
        sites = net.site(1), net.site(2)
        assert_apart(*sites)
        with Appliance(net, directory, settings=SETTINGS) as appliance, Pages(appliance, example="peerjs"):
            return tell(check for browsers in (("chromium", "chromium"), ("firefox", "chromium"))
                        for check in meet(appliance, sites, directory, *browsers))


def meet(appliance, sites, directory, caller, called):
    names = [f"{caller}-calls-{called}", f"{called}-hears-{caller}"]
    calls = {"to": names[1]}, {}
    # The one that calls is there first: whoever is called is waited for.
    pages = [
        Agent(kind, site, appliance, name, directory, id=name, messages=MESSAGES, relay_only=True, **call)
        for kind, site, name, call in zip((caller, called), sites, names, calls)
    ]
    try:
        for page in pages:
            result = page.result(PATIENCE)
            whole = result["received"] == MESSAGES and result["in_order"] and result["from_peer"] and result["blob_ok"]
            yield whole, f"{page.name}: {result}"
            yield (result.get("local"), result.get("remote")) == ("relay", "relay"), f"{page.name}: through the relay"
    finally:
        for page in pages:
            page.stop()


if __name__ == "__main__":
    sys.exit(main())
