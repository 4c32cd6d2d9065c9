"""The kinds of site that agents sit in, each measured before anything is concluded from it.

A site is a router and an agent's namespace behind it, or two where they share a NAT. nftables does the NAT. The kernel keeps
a port's number where it can: its plain masquerade maps independently of the endpoint, and filters by address and port.
"""

import dataclasses
import json
import subprocess

import probes
from internet import NAMES, NODES, PROBES
from probes import BY_ADDRESS, BY_PORT, INDEPENDENT

PROXY_PORT = 3128
# Where the translated IPv4 internet is for a site of IPv6 alone (RFC 6052).
NAT64 = "64:ff9b::"
FORGETS = 30


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a site is like."""

    name: str
    what: str
    # How the agents' packets reach others: "udp", or else what is left for reaching the relay.
    way: str = "udp"
    nat: bool = True
    families: tuple = (4,)
    mapping: str = INDEPENDENT
    filtering: str = BY_PORT
    hairpin: bool = False
    forgets: int = 0
    # Two agents live here, and meet each other.
    shared: bool = False
    # Whether those two reach each other without the router's outer address.
    near: bool = False


KINDS = {
    kind.name: kind
    for kind in [
        Kind("none", "public addresses, no firewall", nat=False, families=(4, 6), filtering=INDEPENDENT),
        Kind("full-cone", "a NAT that lets in whoever finds the mapping", filtering=INDEPENDENT),
        Kind("address-restricted", "a NAT that lets in addresses that were written to", filtering=BY_ADDRESS),
        Kind("port-restricted", "a NAT that lets in addresses and ports that were written to"),
        Kind("symmetric", "a NAT that takes a random port for each destination", mapping=BY_PORT),
        Kind("carrier-grade", "a NAT behind the NAT of the carrier"),
        Kind("forgetful", f"a port-restricted NAT that forgets mappings after {FORGETS} s", forgets=FORGETS),
        Kind("no-udp", "a firewall that drops UDP", way="tcp"),
        Kind("only-443", "a firewall that passes TCP to port 443 and nothing else", way="tls"),
        Kind("proxy", "no way out but an HTTPS proxy (CONNECT)", way="proxy"),
        Kind("ipv6", "IPv6 alone, behind a stateful firewall", nat=False, families=(6,)),
        Kind("nat64", "IPv6 alone inside, and NAT64 and DNS64 to an IPv4 outside", families=(6,)),
        Kind("one-lan", "two agents in one network behind one NAT", shared=True, near=True),
        Kind("hairpin", "two networks behind one NAT, which meet at its outer address", shared=True, hairpin=True),
        Kind("no-hairpin", "two networks behind one NAT, which never meet", shared=True),
    ]
}


class Site:
    """One site of a kind, built in `net` as number N. Its agents' namespaces are `agents`."""

    def __init__(self, net, number, kind):
        self.net, self.number, self.kind = net, number, kind
        self.router = net.namespace(f"s{number}router")
        self.agents = [net.namespace(f"s{number}{letter}") for letter in ("ab" if kind.shared else "a")]
        self.processes = []
        self.router.forwards()
        net.hang(number, self.router)
        BUILD[kind.name](self)
        self.router.rules(TALLY)
        for agent in self.agents:
            agent.resolves(self.names())

    def names(self):
        """What the site's agents hear of the names they know."""
        if self.kind.name == "nat64":
            return {name: [f"{NAT64}{addresses[4]}"] for name, addresses in NAMES.items()}
        return {name: [addresses[family] for family in self.kind.families] for name, addresses in NAMES.items()}

    def number_privately(self, router):
        """Private networks behind a router, one for each agent, or one for both."""
        if self.kind.near:
            return self.number_one_lan(router)
        for at, agent in enumerate(self.agents):
            network = f"192.168.{self.number + 100 * at}"
            router.serves(f"lan{at}", agent, "eth0", (f"{network}.1/24", f"{network}.{2 + at}/24"))

    def number_one_lan(self, router):
        network = f"192.168.{self.number}"
        router.ip("link", "add", "lan", "type", "bridge")
        router.holds("lan", f"{network}.1/24")
        for at, agent in enumerate(self.agents):
            router.joins(f"lan{at}", agent, "eth0")
            router.ip("link", "set", f"lan{at}", "master", "lan", "up")
            agent.holds("eth0", f"{network}.{2 + at}/24")
            agent.route("default", f"{network}.1")

    def number_publicly(self):
        """Addresses that all the world can reach, unless the router minds."""
        addresses = {4: ("5.9.{}.129/25", "5.9.{}.130/25"), 6: ("2a0f:9:{}:1::1/64", "2a0f:9:{}:1::2/64")}
        (agent,) = self.agents
        pairs = ([address.format(self.number) for address in addresses[family]] for family in self.kind.families)
        self.router.serves("lan0", agent, "eth0", *pairs)

    @property
    def outer(self):
        """The address that the world sees, where it is the router's."""
        return f"5.9.{self.number}.2"

    @property
    def proxy(self):
        """The address and port of the way out, where there is no other."""
        return f"192.168.{self.number}.1:{PROXY_PORT}" if self.kind.way == "proxy" else ""

    def ask(self):
        """Starts the probes in each agent's namespace."""
        family = 6 if self.kind.name == "ipv6" else 4
        places = PROBES[family] if self.kind.name != "nat64" else [f"{NAT64}{place}" for place in PROBES[4]]
        command = "python3", probes.__file__, "ask", *places, self.kind.forgets, self.proxy
        return [subprocess.Popen(agent.command(*command), stdout=subprocess.PIPE, text=True) for agent in self.agents]

    def truth(self):
        """What the probes must say."""
        kind = self.kind
        passes = {"udp": kind.way == "udp", "tcp": {"tls": [443], "proxy": []}.get(kind.way, [443, 3478])}
        if kind.way == "proxy":
            passes["proxy"] = [443]
        if kind.way != "udp":
            return passes
        behaves = {"nat": kind.nat, "mapping": kind.mapping, "filtering": kind.filtering}
        if kind.nat:
            behaves |= {"mapped": self.outer, "hairpin": kind.hairpin if 4 in kind.families else None}
        return passes | behaves | {"forgets": True if kind.forgets else None}

    def sent(self):
        """Bytes that have left for Halfway, by the way they took, and for elsewhere."""
        listed = json.loads(self.router.run("nft", "-j", "list", "counters", "table", "inet", "tally"))["nftables"]
        return {each["counter"]["name"].removeprefix("by_"): each["counter"]["bytes"] for each in listed if "counter" in each}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


class Reflector:
    """The probes' other side, in the core, while the `with` lasts."""

    def __init__(self, net):
        commands = [net.core.command("python3", probes.__file__, "reflect", *PROBES[family]) for family in (4, 6)]
        self.processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        for process in self.processes:
            process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


# What the routers do. What comes from outside and was not asked for never passes; a connection that it began would even
# take the port that an agent's mapping wants.
GUARD = """
table inet guard {{
    chain in {{ type filter hook input priority 0; iifname "wan" meta l4proto {{ tcp, udp }} ct state new drop; {input} }}
    chain through {{ type filter hook forward priority 0; {forward} iifname "wan" ct state new ct status ! dnat drop; }}
}}
"""
# `maps` remembers which port belongs to whom, `spoken` who was written to from it; as long as the kernel's own table does.
NAT = """
table ip nat {{
    map maps {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 2m; size 65535; }}
    set spoken {{ type inet_service . ipv4_addr; flags dynamic,timeout; timeout 2m; size 65535; }}
    chain remember {{ type filter hook postrouting priority 99; oifname "wan" meta l4proto udp jump keep; }}
    chain keep {{
        update @maps {{ udp sport : ip saddr . udp sport }}
        update @spoken {{ udp sport . ip daddr }}
    }}
    chain before {{ type nat hook prerouting priority dstnat; {before} }}
    chain after {{ type nat hook postrouting priority srcnat; {after} oifname "wan" masquerade {how}; }}
}}
"""
HALFWAY = {family: ", ".join(addresses[family] for addresses in NODES.values()) for family in (4, 6)}
# What leaves, as it leaves: after all translation.
TALLY = f"""
table inet tally {{
    counter by_udp {{}}
    counter by_tcp {{}}
    counter by_tls {{}}
    counter by_elsewhere {{}}
    chain to_halfway {{
        meta l4proto udp counter name by_udp accept
        tcp dport 3478 counter name by_tcp accept
        tcp dport 443 counter name by_tls accept
    }}
    chain out {{ type filter hook postrouting priority 300;
        oifname != "wan" accept
        ip daddr {{ {HALFWAY[4]} }} jump to_halfway
        ip6 daddr {{ {HALFWAY[6]} }} jump to_halfway
        counter name by_elsewhere
    }}
}}
"""
TO_WHOM_IT_BELONGS = "dnat ip to udp dport map @maps;"


def guard(router, forward="", input=""):
    router.rules(GUARD.format(forward=forward, input=input))


def translate(router, before="", after="", how=""):
    router.rules(NAT.format(before=before, after=after, how=how))


def private(site, forward="", input="", **nat):
    """Agents with private addresses, behind a router that translates."""
    site.number_privately(site.router)
    guard(site.router, forward, input)
    translate(site.router, **nat)


def public(site):
    site.number_publicly()


def full_cone(site):
    private(site, before=f'iifname "wan" {TO_WHOM_IT_BELONGS}')


def address_restricted(site):
    private(site, before=f'iifname "wan" udp dport . ip saddr @spoken {TO_WHOM_IT_BELONGS}')


def symmetric(site):
    private(site, how="fully-random")


def carrier_grade(site):
    """The link to the core is the carrier's; the router that the agent knows is one further in."""
    home = site.net.namespace(f"s{site.number}home")
    home.forwards()
    network = f"100.64.{site.number}"
    site.router.serves("lan0", home, "wan", (f"{network}.1/24", f"{network}.2/24"))
    site.number_privately(home)
    for router in site.router, home:
        guard(router)
        translate(router)


def forgetful(site):
    private(site)
    for timeout in "udp_timeout", "udp_timeout_stream":
        site.router.sysctl(f"net.netfilter.nf_conntrack_{timeout}", FORGETS)


def no_udp(site):
    private(site, "meta l4proto udp drop;")


def only_443(site):
    private(site, 'iifname "lan0" tcp dport != 443 drop; meta l4proto != tcp drop;')


def proxy(site):
    site.number_privately(site.router)
    guard(site.router, "drop;")
    site.router.resolves({name: [addresses[4]] for name, addresses in NAMES.items()})
    settings = site.net.scratch / f"proxy{site.number}.conf"
    settings.write_text(f'Port {PROXY_PORT}\nListen 192.168.{site.number}.1\nTimeout 600\nMaxClients 50\nConnectPort 443\n')
    command = site.router.command("tinyproxy", "-d", "-c", settings)
    site.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))


def ipv6(site):
    public(site)
    guard(site.router)


def nat64(site):
    """Inside, an address of no meaning elsewhere; the translator has one of its own for each agent, which is then shared."""
    (agent,) = site.agents
    site.router.serves("lan0", agent, "eth0", (f"fd64:{site.number}::1/64", f"fd64:{site.number}::2/64"))
    guard(site.router)
    translate(site.router)
    state = site.net.scratch / f"nat64-{site.number}"
    state.mkdir()
    settings = state / "tayga.conf"
    settings.write_text(
        f"tun-device nat64\nipv4-addr 198.18.0.1\nprefix {NAT64}/96\ndynamic-pool 198.18.0.0/24\ndata-dir {state}\n"
        f"ipv6-addr fd64:{site.number}:1::1\n"
    )
    site.router.run("tayga", "-c", settings, "--mktun")
    site.router.ip("link", "set", "nat64", "up")
    site.router.ip("route", "add", "198.18.0.0/24", "dev", "nat64")
    site.router.ip("-6", "route", "add", f"{NAT64}/96", "dev", "nat64")
    site.processes.append(subprocess.Popen(site.router.command("tayga", "-c", settings, "-d"), stdout=subprocess.DEVNULL))


def hairpin(site):
    """What is for the outer address comes back in, and seems to come from there."""
    private(
        site,
        'iifname "lan*" oifname "lan*" ct status ! dnat drop;',
        before=f'iifname "lan*" ip daddr {site.outer} {TO_WHOM_IT_BELONGS}',
        after=f'oifname "lan*" ct status dnat snat to {site.outer};',
    )


def no_hairpin(site):
    private(site, 'iifname "lan*" oifname "lan*" drop;', f'iifname "lan*" ip daddr {site.outer} drop;')


BUILD = {
    "none": public,
    "full-cone": full_cone,
    "address-restricted": address_restricted,
    "port-restricted": private,
    "symmetric": symmetric,
    "carrier-grade": carrier_grade,
    "forgetful": forgetful,
    "no-udp": no_udp,
    "only-443": only_443,
    "proxy": proxy,
    "ipv6": ipv6,
    "nat64": nat64,
    "one-lan": private,
    "hairpin": hairpin,
    "no-hairpin": no_hairpin,
}
