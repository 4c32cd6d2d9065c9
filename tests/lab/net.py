"""Network namespaces for tests: a public one where Halfway runs, and sites that reach it and nothing else.

Names carry this process's id, so that runs do not collide; everything is removed when the `with` ends, or this process,
however it does.
"""

import contextlib
import ctypes
import os
import pathlib
import re
import subprocess
import sys

# Waits for the end of its input, which comes with the end of whoever holds the other side of the pipe.
REMOVE = """
cat
for name in $(ip netns list | sed -n "s/^\\($1-[a-z0-9]*\\).*/\\1/p"); do
    ip netns pids "$name" | xargs -r kill -KILL 2>/dev/null
    ip netns del "$name"
    rm -rf "/etc/netns/$name"
done
rmdir /etc/netns 2>/dev/null
rm -rf "$2"
"""

# Where an unprivileged user is root: with a place for namespaces, and an /etc to put files in.
ROOM = """
mount -t tmpfs tmpfs /run
mkdir /run/netns /run/upper /run/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work,userxattr /etc
exec "$@"
"""

# CLONE_NEWNET of setns(2), which Python of Debian 12 does not have.
NEWNET = 0x40000000

# Addresses that exist nowhere but in here. The public one lies in no special-purpose range: agents treat it as real.
PUBLIC = {4: "5.9.0.1", 6: "2a0f:9::1"}


def run(*command, **options):
    """Runs a command to its end; its output is shown only if it fails."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def be_root():
    """Begins the program anew in a user namespace, unless it is root already."""
    if os.geteuid():
        room = "unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-ec", ROOM, "sh"
        os.execvp(room[0], [*room, sys.executable, *sys.argv])


class Namespace:
    """One network namespace."""

    def __init__(self, name):
        self.name = name
        run("ip", "netns", "add", name)
        self.ip("link", "set", "lo", "up")
        # Nobody else has these addresses, and nobody waits for a second to learn that.
        self.sysctl("net.ipv6.conf.default.accept_dad", 0)

    def ip(self, *arguments):
        return run("ip", "-n", self.name, *arguments)

    def command(self, *command):
        """The command line that runs `command` in here."""
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    def run(self, *command):
        return run(*self.command(*command))

    def pids(self):
        """Of whatever runs in here."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name).split()]

    @contextlib.contextmanager
    def entered(self):
        """This program goes on in here for a while, with all that it starts."""
        with open("/proc/self/ns/net") as before, open(f"/run/netns/{self.name}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), NEWNET) == 0, f"cannot enter {self.name}"
            try:
                yield
            finally:
                ctypes.CDLL(None).setns(before.fileno(), NEWNET)

    def resolves(self, names):
        """What runs in here knows these names and their addresses; `ip netns exec` puts this file in the place of /etc/hosts."""
        directory = pathlib.Path("/etc/netns") / self.name
        directory.mkdir(parents=True)
        # Chromium asks for some names with the dot at their end.
        known = [f"{address} {name} {name}.\n" for name, addresses in names.items() for address in addresses]
        (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(known))

    def sysctl(self, key, value):
        self.run("sysctl", "-qw", f"{key}={value}")

    def forwards(self):
        """Makes it a router."""
        self.sysctl("net.ipv4.ip_forward", 1)
        self.sysctl("net.ipv6.conf.all.forwarding", 1)

    def joins(self, name, other, others_name):
        """A link between an interface in here and one in another namespace."""
        self.ip("link", "add", name, "type", "veth", "peer", "name", others_name, "netns", other.name)

    def holds(self, interface, *addresses):
        """Gives the interface these addresses, and puts it to work."""
        for address in addresses:
            self.ip("addr", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        self.ip("link", "set", interface, "up")

    def serves(self, interface, below, others_interface, *addresses):
        """A link to a namespace whose way out this one is. Addresses are pairs, with their networks: ours, and its own."""
        self.joins(interface, below, others_interface)
        self.holds(interface, *(own for own, _ in addresses))
        below.holds(others_interface, *(theirs for _, theirs in addresses))
        below.route("default", *(own.split("/")[0] for own, _ in addresses))

    def route(self, destination, *gateways):
        """The way to somewhere, or for `default` to everywhere else."""
        for gateway in gateways:
            self.ip("-6" if ":" in gateway else "-4", "route", "add", destination, "via", gateway)

    def rules(self, text):
        """What nftables shall do."""
        run(*self.command("nft", "-f", "-"), input=text)


class Net:
    """The public namespace and its sites. A directory `scratch` goes with them."""

    def __init__(self, scratch=""):
        self.id, self.scratch = f"hw{os.getpid()}", scratch

    def __enter__(self):
        # In a session of its own, so that what ends us does not end it.
        command = ["sh", "-c", REMOVE, "sh", self.id, str(self.scratch)]
        self.remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self.public = self.host("public", PUBLIC)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.remover.communicate()

    def namespace(self, name):
        return Namespace(f"{self.id}-{name}")

    def host(self, name, addresses):
        """Where Halfway may run. A site's packets end here: only Halfway carries anything from one to another."""
        host = self.namespace(name)
        host.sysctl("net.ipv4.ip_forward", 0)
        host.sysctl("net.ipv6.conf.all.forwarding", 0)
        host.holds("lo", f"{addresses[4]}/32", f"{addresses[6]}/128")
        return host

    def site(self, number):
        """A site of its own, one hop from the public namespace, with a private IPv4 and IPv6 address."""
        site = self.namespace(f"s{number}")
        self.link(self.public, site, number)
        site.address = f"10.70.{number}.2"
        return site

    def site_beyond_router(self, number):
        """A site like the others, but two hops away: packets of both families are forwarded as they are."""
        router, site = self.namespace(f"r{number}"), self.namespace(f"s{number}")
        self.link(self.public, router, number + 100)
        self.link(router, site, number)
        router.forwards()
        self.public.route(f"10.70.{number}.0/24", f"10.70.{number + 100}.2")
        self.public.route(f"fd70:{number}::/64", f"fd70:{number + 100}::2")
        site.address = f"10.70.{number}.2"
        return site

    def link(self, upper, lower, number):
        """Joins two namespaces; the lower one's way out is the upper one."""
        inside, outside = f"{self.id}i{number}", f"{self.id}o{number}"
        networks = f"10.70.{number}.{{}}/24", f"fd70:{number}::{{}}/64"
        upper.serves(outside, lower, inside, *((network.format(1), network.format(2)) for network in networks))

    def forward_one_to_one(self, site):
        """The public IPv4 address stands for `site`, whose own is private; sites see each other through the router."""
        self.public.sysctl("net.ipv4.ip_forward", 1)
        self.public.rules(f"""table ip nat {{
            chain in {{ type nat hook prerouting priority -100; ip daddr {PUBLIC[4]} dnat to {site.address}; }}
            chain out {{ type nat hook postrouting priority 100; ip saddr {site.address} snat to {PUBLIC[4]}; }}
        }}""")


def only_tcp(site, *ports):
    """Lets nothing leave the site but TCP to these ports, and counts what does."""
    accepted = " ".join(f"tcp dport {port} counter accept;" for port in ports)
    site.rules(f"""table inet wall {{
        chain out {{ type filter hook output priority 0; policy drop;
            oif lo accept; meta l4proto icmpv6 accept; {accepted} }}
    }}""")


def let_out(site, port):
    """Bytes that `only_tcp` has let out to this port so far."""
    rules = site.run("nft", "list", "chain", "inet", "wall", "out")
    return int(re.search(rf"dport {port} counter packets \d+ bytes (\d+)", rules)[1])


def assert_apart(one, other):
    """Fails unless `one` cannot reach `other` although both reach the public address."""
    one.run("ping", "-c1", "-W2", PUBLIC[4])
    try:
        one.run("ping", "-c1", "-W1", other.address)
    except RuntimeError:
        return
    raise AssertionError(f"{one.name} reaches {other.name} directly: nothing would be proved")
