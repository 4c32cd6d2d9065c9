"""A small internet: Halfway at its public address, or at several, a core that routes, and sites that hang on it by links.

A link takes its time (`wires.py`); what is at its end is up to the site (`kinds.py`). Nothing but the core joins sites, and
it knows public addresses alone.
"""

import itertools

from appliance import HOST
from net import PUBLIC, Net
from wires import Wires

# Seconds that a site's link takes, each way.
DELAY = 0.02
# Inside the core: two addresses for the probes, and one for the web page of the browser's agent.
PROBES = {4: ("5.9.250.1", "5.9.250.2"), 6: ("2a0f:9:250::1", "2a0f:9:250::2")}
PAGES = {4: "5.9.250.3", 6: "2a0f:9:250::3"}
# Where Halfway runs: the first alone, unless more nodes are asked for.
NODES = {HOST: PUBLIC, "turn2.lab": {4: "5.9.0.2", 6: "2a0f:9::2"}}
NAMES = {**NODES, "pages.lab": PAGES}


class Internet(Net):
    """The core, the namespaces of Halfway's nodes, `public` the first of them, and sites by number."""

    def __init__(self, scratch="", count=1):
        super().__init__(scratch)
        self.count = count

    def __enter__(self):
        super().__enter__()
        try:
            self.core, self.air = self.namespace("core"), self.namespace("air")
            self.core.forwards()
            for address in *PROBES[4], PAGES[4]:
                self.core.holds("lo", f"{address}/32")
            for address in *PROBES[6], PAGES[6]:
                self.core.holds("lo", f"{address}/128")
            self.nodes = {name: self.node(number, name) for number, name in enumerate(itertools.islice(NODES, self.count))}
            for namespace in self.core, *self.nodes.values():
                namespace.resolves({name: addresses.values() for name, addresses in NAMES.items()})
            # The ends of links have nothing to say of themselves.
            self.air.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
            self.wires = Wires(self.air)
        except BaseException:
            self.__exit__()
            raise
        return self

    def node(self, number, name):
        """A host that the core reaches at the addresses of that name."""
        addresses = NODES[name]
        host = self.host(f"public{number}", addresses) if number else self.public
        self.link(self.core, host, number)
        self.core.route(addresses[4], f"10.70.{number}.2")
        self.core.route(addresses[6], f"fd70:{number}::2")
        return host

    def hang(self, number, router):
        """Joins a site's router to the core by its interface `wan`. 5.9.N.128/25 and 2a0f:9:N:1::/64 are behind it."""
        link = f"l{number}"
        for side, namespace, name in ("a", self.core, f"site{number}"), ("b", router, "wan"):
            self.air.joins(link + side, namespace, name)
            self.air.ip("link", "set", link + side, "up")
        self.core.holds(f"site{number}", f"5.9.{number}.1/25", f"2a0f:9:{number}::1/64")
        router.holds("wan", f"5.9.{number}.2/25", f"2a0f:9:{number}::2/64")
        router.route("default", f"5.9.{number}.1", f"2a0f:9:{number}::1")
        self.core.route(f"5.9.{number}.128/25", f"5.9.{number}.2")
        self.core.route(f"2a0f:9:{number}:1::/64", f"2a0f:9:{number}::2")
        self.wires.tell(link, delay=DELAY)

    def quality(self, number, **of_link):
        """Changes a site's link from now on: `delay`, `jitter`, `loss`."""
        self.wires.tell(f"l{number}", **of_link)
