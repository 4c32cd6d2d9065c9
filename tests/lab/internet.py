"""A small internet: Halfway at its public address, a core that routes, and sites that hang on it by links.

A link takes its time (`wires.py`); what is at its end is up to the site (`kinds.py`). Nothing but the core joins sites, and
it knows public addresses alone.
"""

from net import PUBLIC, Net
from wires import Wires

# Seconds that a site's link takes, each way.
DELAY = 0.02
# Inside the core: two addresses for the probes, and one for the web page of the browser's agent.
PROBES = {4: ("5.9.250.1", "5.9.250.2"), 6: ("2a0f:9:250::1", "2a0f:9:250::2")}
PAGES = {4: "5.9.250.3", 6: "2a0f:9:250::3"}
NAMES = {"turn.lab": PUBLIC, "pages.lab": PAGES}


class Internet(Net):
    """The core, Halfway's namespace `public`, and sites by number."""

    def __enter__(self):
        super().__enter__()
        try:
            self.core, self.air = self.namespace("core"), self.namespace("air")
            self.core.forwards()
            for address in *PROBES[4], PAGES[4]:
                self.core.holds("lo", f"{address}/32")
            for address in *PROBES[6], PAGES[6]:
                self.core.holds("lo", f"{address}/128")
            self.link(self.core, self.public, 0)
            self.core.route(PUBLIC[4], "10.70.0.2")
            self.core.route(PUBLIC[6], "fd70:0::2")
            for namespace in self.core, self.public:
                namespace.resolves({name: addresses.values() for name, addresses in NAMES.items()})
            # The ends of links have nothing to say of themselves.
            self.air.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
            self.wires = Wires(self.air)
        except BaseException:
            self.__exit__()
            raise
        return self

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
