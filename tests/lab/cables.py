"""A test network whose links are like cables, for programs on interfaces (XDP).

Between namespaces the kernel leaves checksums and segments to a card that is not there: here senders finish what they send.
And it takes what a program sends only where there is a program at the other end, too.
"""

import functools
import json
import pathlib
import tempfile

from net import PUBLIC, Net, run


@functools.cache
def passing():
    """A program that lets everything pass, as iproute2 takes it."""
    directory = tempfile.TemporaryDirectory(prefix="halfway-lab-")
    compiled = pathlib.Path(directory.name) / "pass.o"
    source = pathlib.Path(__file__).with_name("pass.c")
    run("clang-14", "-O2", "-target", "bpf", "-c", str(source), "-o", str(compiled))
    # The directory lives as long as this value does.
    return directory, compiled


def receive(namespace, interface):
    """What a program at the other end of this link sends arrives here."""
    _, compiled = passing()
    namespace.ip("link", "set", interface, "xdp", "obj", str(compiled), "sec", "xdp")


def stretch(net):
    """Makes all links of the network so that there are now."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if not name.startswith(f"{net.id}-"):
            continue
        for link in json.loads(run("ip", "-n", name, "-j", "link")):
            if link["ifname"] != "lo":
                run("ip", "netns", "exec", name, "ethtool", "-K", link["ifname"], "tx", "off")


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
            receive(self.core, f"{self.id}o0")
        except BaseException:
            self.__exit__()
            raise
        return self

    def on_core(self, number):
        site = self.namespace(f"s{number}")
        self.link(self.core, site, number)
        site.address, site.address6 = f"10.70.{number}.2", f"fd70:{number}::2"
        return site
