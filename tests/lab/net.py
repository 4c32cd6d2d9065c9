"""Network namespaces for tests: a public one where Halfway runs, and sites that reach it and nothing else.

Names carry this process's id, so that runs do not collide; everything is removed when the `with` ends, or this process,
however it does.
"""

import os
import pathlib
import re
import subprocess

# Waits for the end of its input, which comes with the end of whoever holds the other side of the pipe.
REMOVE = """
cat
for name in $(ip netns list | sed -n "s/^\\($1-[a-z0-9]*\\).*/\\1/p"); do
    ip netns pids "$name" | xargs -r kill -KILL 2>/dev/null
    ip netns del "$name"
    rm -rf "/etc/netns/$name"
done
rmdir /etc/netns 2>/dev/null
"""

# Addresses that exist nowhere but in here. The public one lies in no special-purpose range: agents treat it as real.
PUBLIC = {4: "5.9.0.1", 6: "2a0f:9::1"}


def run(*command, **options):
    """Runs a command to its end; its output is shown only if it fails."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


class Namespace:
    """One network namespace."""

    def __init__(self, name):
        self.name = name
        run("ip", "netns", "add", name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments):
        return run("ip", "-n", self.name, *arguments)

    def command(self, *command):
        """The command line that runs `command` in here."""
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    def run(self, *command):
        return run(*self.command(*command))

    def resolves(self, name, address):
        """What runs in here knows the name; `ip netns exec` puts this file in the place of /etc/hosts."""
        directory = pathlib.Path("/etc/netns") / self.name
        directory.mkdir(parents=True)
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")

    def sysctl(self, key, value):
        self.run("sysctl", "-qw", f"{key}={value}")


class Net:
    """The public namespace and its sites."""

    def __init__(self):
        self.id = f"hw{os.getpid()}"

    def __enter__(self):
        # In a session of its own, so that what ends us does not end it.
        command = ["sh", "-c", REMOVE, "sh", self.id]
        self.remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self.public = self.namespace("public")
            # A site's packets end here: only Halfway carries anything from one to another.
            self.public.sysctl("net.ipv4.ip_forward", 0)
            self.public.sysctl("net.ipv6.conf.all.forwarding", 0)
            self.public.ip("addr", "add", f"{PUBLIC[4]}/32", "dev", "lo")
            self.public.ip("addr", "add", f"{PUBLIC[6]}/128", "dev", "lo", "nodad")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.remover.communicate()

    def namespace(self, name):
        return Namespace(f"{self.id}-{name}")

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
        router.sysctl("net.ipv4.ip_forward", 1)
        router.sysctl("net.ipv6.conf.all.forwarding", 1)
        self.public.ip("route", "add", f"10.70.{number}.0/24", "via", f"10.70.{number + 100}.2")
        self.public.ip("-6", "route", "add", f"fd70:{number}::/64", "via", f"fd70:{number + 100}::2")
        site.address = f"10.70.{number}.2"
        return site

    def link(self, upper, lower, number):
        """Joins two namespaces; the lower one's way out is the upper one."""
        inside, outside = f"{self.id}i{number}", f"{self.id}o{number}"
        upper.ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", lower.name)
        for namespace, link, last in (upper, outside, 1), (lower, inside, 2):
            namespace.ip("addr", "add", f"10.70.{number}.{last}/24", "dev", link)
            namespace.ip("addr", "add", f"fd70:{number}::{last}/64", "dev", link, "nodad")
            namespace.ip("link", "set", link, "up")
        lower.ip("route", "add", "default", "via", f"10.70.{number}.1")
        lower.ip("-6", "route", "add", "default", "via", f"fd70:{number}::1")

    def forward_one_to_one(self, site):
        """The public IPv4 address stands for `site`, whose own is private; sites see each other through the router."""
        self.public.sysctl("net.ipv4.ip_forward", 1)
        rules = f"""table ip nat {{
            chain in {{ type nat hook prerouting priority -100; ip daddr {PUBLIC[4]} dnat to {site.address}; }}
            chain out {{ type nat hook postrouting priority 100; ip saddr {site.address} snat to {PUBLIC[4]}; }}
        }}"""
        run(*self.public.command("nft", "-f", "-"), input=rules)


def only_tcp(site, *ports):
    """Lets nothing leave the site but TCP to these ports, and counts what does."""
    accepted = " ".join(f"tcp dport {port} counter accept;" for port in ports)
    rules = f"""table inet wall {{
        chain out {{ type filter hook output priority 0; policy drop;
            oif lo accept; meta l4proto icmpv6 accept; {accepted} }}
    }}"""
    run(*site.command("nft", "-f", "-"), input=rules)


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
