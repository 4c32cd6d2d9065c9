"""A test network whose links are like cables, for programs on interfaces (XDP).

Between namespaces the kernel leaves checksums and segments to a card that is not there, and takes what a program sends
only where somebody polls: here senders finish what they send, and receivers poll.
"""

import json

from net import PUBLIC, Net, run


def stretch(net):
    """Makes all links of the network so that there are now."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if not name.startswith(f"{net.id}-"):
            continue
        for link in json.loads(run("ip", "-n", name, "-j", "link")):
            if link["ifname"] != "lo":
                run("ip", "netns", "exec", name, "ethtool", "-K", link["ifname"], "tx", "off", "gro", "on")


class OneLink(Net):
    """Halfway's namespace hangs on a router by one link, as a host on its uplink, and so do sites."""

    def __enter__(self):
        super().__enter__()
        try:
            self.core = self.namespace("core")
            self.core.forwards()
            self.link(self.core, self.public, 0)
            self.core.route(PUBLIC[4], "10.70.0.2")
            self.core.route(PUBLIC[6], "fd70:0::2")
            self.uplink = f"{self.id}i0"
            self.sites = [self.on_core(number) for number in (1, 2)]
            stretch(self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def on_core(self, number):
        site = self.namespace(f"s{number}")
        self.link(self.core, site, number)
        site.address, site.address6 = f"10.70.{number}.2", f"fd70:{number}::2"
        return site
