"""The command line of the Python example, and the one HTTPS request it makes; the same as ../cli.mjs."""

import argparse
import json
import ssl
import urllib.request
from urllib.parse import urljoin


def parse_flags(description):
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("url")
    flags.add_argument("--token", required=True)
    flags.add_argument("--ca", help="certificates to trust, if not the system's")
    flags.add_argument("--to", help="the agent to call; without it, wait for a call")
    flags.add_argument("--relay-only", action="store_true")
    flags.add_argument("--turn-transport", choices=["udp", "tcp", "tls"], help="how to reach the relay")
    flags.add_argument("--channel", choices=["ordered", "unordered", "lossy"], default="ordered")
    flags.add_argument("--messages", type=int, default=10)
    flags.add_argument("--size", type=int, default=1024)
    flags.add_argument("--blob", type=int, default=0)
    return flags.parse_args()


def trust(flags):
    """The certificates that a connection to Halfway is checked against."""
    return ssl.create_default_context(cafile=flags.ca)


def fetch_ice(flags, tls):
    """The configuration for an RTCPeerConnection."""
    request = urllib.request.Request(urljoin(flags.url, "/v1/ice"), headers={"Authorization": f"Bearer {flags.token}"})
    with urllib.request.urlopen(request, context=tls) as response:
        return only(flags.turn_transport, json.load(response))


def only(transport, ice):
    """aiortc takes the first URL of a relay, and no other: it is told which by leaving the others out."""
    if transport is None:
        return ice
    start, end = {"udp": ("turn:", "=udp"), "tcp": ("turn:", "=tcp"), "tls": ("turns:", "")}[transport]
    kept = []
    for server in ice["iceServers"]:
        urls = [url for url in server["urls"] if url.startswith(start) and url.endswith(end)]
        kept += [{**server, "urls": urls}] if urls else []
    return {**ice, "iceServers": kept}
