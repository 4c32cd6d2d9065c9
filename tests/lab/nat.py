"""The matrix: two agents behind every pair of NATs, each measured first.

For each pair of kinds of site, and each library that can cross both: the data channel opens, 200 messages go each way, and
they take the way that theory says. The routers count what leaves, so that the way is seen and not believed.
Usage: nat.py [--full] [--write] [--agents a,b] [--times N] [--xdp MODE] [--nodes] [KIND+KIND …]: the corners, all pairs, or
these; `--write` puts the tables into docs/nat-matrix.md. With `--xdp` the kernel relays (`turn.xdp`), and is counted. With
`--nodes` the two of a pair are at two nodes.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import tempfile

from agents import Agent, Pages, all_results
from appliance import ROOT, Appliance, certified, packets_by_kernel, relayed_packets
from cables import receive, stretch
from checks import settled, tell
from cluster import ENGINE, SETTINGS, Engine
from internet import NAMES, NODES, PAGES, Internet
from kinds import KINDS, Reflector, Site
from net import PUBLIC, be_root
from probes import BY_ADDRESS, BY_PORT, INDEPENDENT

PAGE = ROOT / "docs/nat-matrix.md"
MESSAGES, SIZE = 200, 1_024
# What follows the messages where it shall be seen where a library ends, which began with whatever worked first.
BLOB = 4_000_000
PATIENCE = 40
# What a site's router must have seen leave by one way, of what its agent had to say.
MOST = 0.8
# Milliseconds from the offer to the open channel, with links of 20 ms: the bar for those that trickle. A machine that does
# something else beside it is slower; what takes so many times as long hangs.
BARS, HANGS = {"direct": 1_000, "relayed": 1_500}, 5
LIBRARIES = "chromium", "node-datachannel", "werift", "aiortc"
# Those that leave a relayed path when a direct one turns up. The others stay with what worked first, or, aiortc, last.
SWITCHES = {"chromium"}
CORNERS = """
none+none none+symmetric full-cone+symmetric address-restricted+symmetric port-restricted+port-restricted
port-restricted+symmetric symmetric+symmetric carrier-grade+symmetric forgetful+port-restricted no-udp+symmetric
only-443+only-443 only-443+proxy proxy+symmetric none+ipv6 ipv6+ipv6 ipv6+port-restricted nat64+none nat64+symmetric
one-lan+one-lan hairpin+hairpin no-hairpin+no-hairpin
""".split()


def arrives(there, here):
    """Whether a packet from an agent `there` ever gets through to the address that the world knows of the one `here`."""
    if here.mapping != INDEPENDENT:
        # That address is for the server that saw it, and for nobody else.
        return here.filtering == INDEPENDENT
    # An agent writes to the address that it was told; its filter then knows that one.
    return {INDEPENDENT: True, BY_ADDRESS: True, BY_PORT: there.mapping == INDEPENDENT}[here.filtering]


def theory(one, other):
    """The path of a pair: direct where hole punching is possible (RFC 5128), relayed where it is not."""
    if one.shared:
        return "direct" if one.near or one.hairpin else "relayed"
    # Whoever is behind NAT64 learns of addresses that it cannot write to.
    meet = set(one.families) & set(other.families) and not {"nat64"} & {one.name, other.name}
    punches = one.way == other.way == "udp" and meet
    return "direct" if punches and (arrives(one, other) or arrives(other, one)) else "relayed"


def cannot(library, pair):
    """Why a library cannot cross both, if so. Chromium crosses all."""
    ways = {kind.way for kind in pair}
    if library == "chromium":
        return None
    if "proxy" in ways:
        return "knows no proxy"
    if library == "node-datachannel" and ways - {"udp"}:
        return "its TURN is UDP alone"
    if library == "node-datachannel" and any(4 not in kind.families for kind in pair) and theory(*pair) == "relayed":
        return "on a host without IPv4 it drops IPv4 candidates, which relayed ones are"
    return None


def told(library, kind):
    """The transport to the relay that a library must be told, since it does not find out."""
    return kind.way if library != "chromium" and kind.way != "udp" else None


def may_take(library, kind, path):
    """The ways that the bytes of a site's agent may take."""
    if path == "direct":
        return {"elsewhere"} if library in SWITCHES else {"elsewhere", "udp"}
    if library == "werift" and 4 not in kind.families:
        # Its TURN over UDP is for IPv4 alone.
        return {"tcp"}
    return {"udp": {"udp"}, "tcp": {"tcp", "tls"}, "tls": {"tls"}, "proxy": {"tls"}}[kind.way]


@dataclasses.dataclass
class Meeting:
    """Two kinds of site, the library on both, and in the end how it went."""

    pair: tuple
    library: str
    ways: tuple = ()
    opened: int = 0

    def __str__(self):
        return f"{'+'.join(kind.name for kind in self.pair)} {self.library}"

    @property
    def path(self):
        return theory(*self.pair)

    @property
    def blob(self):
        return BLOB if self.path == "direct" and self.library in SWITCHES else 0

    @property
    def detour(self):
        """Whether it went by the relay although a direct path is possible."""
        return self.path == "direct" and set(self.ways) != {"elsewhere"}


def all_pairs():
    apart = [kind for kind in KINDS.values() if not kind.shared]
    return [*itertools.combinations_with_replacement(apart, 2), *[(kind, kind) for kind in KINDS.values() if kind.shared]]


class Lab:
    """The internet with two sites of each kind that is wanted, and Halfway, at one node or at two."""

    def __init__(self, pairs, xdp=None, count=1):
        self.xdp, self.count = xdp, count
        self.wanted = [kind for kind in KINDS.values() if any(kind in pair for pair in pairs)]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="halfway-lab-")))
            self.net = stack.enter_context(Internet(self.scratch, self.count))
            self.sites, numbers = {}, itertools.count(1)
            for kind in self.wanted:
                sites = [stack.enter_context(Site(self.net, next(numbers), kind)) for _ in range(1 if kind.shared else 2)]
                self.sites[kind.name] = sites
            stack.enter_context(Reflector(self.net))
            if self.xdp:
                stretch(self.net)
                for number in range(self.count):
                    receive(self.net.core, f"{self.net.id}o{number}")
            if self.count > 1:
                stack.enter_context(Engine(self))
            certs = certified(self.scratch / "certs", NAMES)
            self.nodes = [stack.enter_context(self.node(name, certs)) for name in self.net.nodes]
            self.appliance = self.nodes[0]
            stack.enter_context(Pages(self.appliance, self.net.core, PAGES.values()))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def node(self, name, certs):
        """Halfway as sites know it: by a name, on port 443."""
        directory = self.scratch / name
        directory.mkdir()
        cluster = f'{SETTINGS}[cluster]\nnats = ["nats://{PUBLIC[4]}:{ENGINE}"]\nnode = "{name}"\n'
        settings = (cluster if self.count > 1 else "") + (f'[turn]\nxdp = "{self.xdp}"\n' if self.xdp else "")
        return Appliance(
            self.net, directory, "--public-host", name, namespace=self.net.nodes[name], settings=settings,
            url=f"https://{name}", pages="https://pages.lab", public=NODES[name], certs=certs,
        )  # fmt: skip

    def verified(self):
        """Each site is what it is said to be."""
        sites = [site for sites in self.sites.values() for site in sites]
        for site, asking in [(site, site.ask()) for site in sites]:
            truth = site.truth()
            for process in asking:
                seen = json.loads(process.communicate(timeout=60)[0])
                wrong = [f"{what} is {seen.get(what)}, not {truth[what]}" for what in truth if seen.get(what) != truth[what]]
                behaves = f"{seen['mapping']} mapping, {seen['filtering']} filtering" if seen["udp"] else "no UDP"
                yield not wrong, f"{site.kind.name}: {'; '.join(wrong) or behaves}"

    def places(self, pair):
        """The site and the agent's namespace of both."""
        if pair[0].shared:
            (site,) = self.sites[pair[0].name]
            return [(site, agent) for agent in site.agents]
        sites = [self.sites[kind.name][side] for side, kind in enumerate(pair)]
        return [(site, site.agents[0]) for site in sites]


def agent(library, place, appliance, name, directory, **options):
    """Starts one, as its site demands."""
    site, namespace = place
    flags = ["--disable-features=WebRtcHideLocalIpsWithMdns"] if library == "chromium" else []
    flags += [f"--proxy-server=http://{site.proxy}"] if site.proxy else []
    options["turn_transport"] = told(library, site.kind)
    return Agent(library, namespace, appliance, name, directory, flags, **options)


def meet(lab, meeting, name):
    """Both agents meet; what both said, and by which ways how many bytes left their sites."""
    directory = lab.scratch / name
    directory.mkdir()
    places, options = lab.places(meeting.pair), {"messages": MESSAGES, "size": SIZE, "blob": meeting.blob}
    before, agents = [site.sent() for site, _ in places], []
    try:
        # The second is called, the first calls it.
        agents.append(agent(meeting.library, places[1], lab.nodes[-1], f"b-{name}", directory, **options))
        agents.append(agent(meeting.library, places[0], lab.nodes[0], f"a-{name}", directory, to=f"b-{name}", **options))
        results = all_results(agents, PATIENCE)
    finally:
        for each in agents:
            each.stop()
    sent = [{way: after - then[way] for way, after in site.sent().items()} for (site, _), then in zip(places, before)]
    return results, sent


def judge(meeting, results, sent):
    """Fails unless all is as it should be."""
    for result in results:
        assert result["received"] == MESSAGES and result["in_order"], f"received {result['received']} of {MESSAGES}"
        assert result["blob_ok"], f"the blob of {meeting.blob} bytes came otherwise than it was sent"
    meeting.ways = tuple(main_way(kind, ways, MESSAGES * SIZE + meeting.blob) for kind, ways in zip(meeting.pair, sent))
    for kind, way in zip(meeting.pair, meeting.ways):
        allowed = may_take(meeting.library, kind, meeting.path)
        assert way in allowed, f"{meeting.path} is the theory, but of {kind.name} these bytes left: {sent}"
    meeting.opened = max(result["opened_ms"] for result in results)
    assert meeting.opened < HANGS * BARS[meeting.path], f"the channel opened after {meeting.opened} ms"


def main_way(kind, sent, size):
    """The way by which nearly all of it left, which was `size` bytes."""
    way = max(sent, key=sent.get)
    if sent[way] < MOST * size:
        # What stays inside has not left at all.
        assert kind.shared, f"the bytes took no one way: {sent}"
        return "elsewhere"
    return way


def all_of(lab, meetings):
    """Runs them; tells of each."""
    yield from lab.verified()
    if lab.count > 1:
        yield from acquainted(lab.nodes)
    for number, meeting in enumerate(meetings):
        try:
            judge(meeting, *meet(lab, meeting, f"run{number}"))
        except AssertionError as problem:
            yield False, f"{meeting}: {problem}"
            continue
        ways = " and ".join(dict.fromkeys(WAYS[way] for way in meeting.ways))
        over = "" if meeting.opened < BARS[meeting.path] else ", over the bar"
        over += ", by the relay all the same" if meeting.detour else ""
        yield True, f"{meeting}: {meeting.path} ({ways}), open after {meeting.opened} ms{over}"
    if lab.xdp:
        yield from by_kernel(sum((collections.Counter(node.metrics()) for node in lab.nodes), collections.Counter()))
    if lab.count > 1:
        yield from between(lab.nodes)


def acquainted(nodes):
    """Nodes know of all the others, before anybody asks them for an ICE list."""
    for node in nodes:
        others = settled(lambda: node.metrics()["halfway_cluster_nodes"], lambda others: others == len(nodes) - 1)
        yield others == len(nodes) - 1, f"{node.url}: other nodes that it knows: {others:.0f}"


def between(nodes):
    """What was said went from each node to the other."""
    for node in nodes:
        numbers = node.metrics()
        frames = numbers['halfway_cluster_frames_total{direction="out"}']
        unanswered = numbers["halfway_cluster_unanswered_total"]
        line = f"{node.url}: {frames:.0f} frames for the other node, {unanswered:.0f} unanswered"
        yield frames > 0 and not unanswered, f"{line}; {node.relayed() / 1e6:.1f} MB relayed"


def by_kernel(numbers):
    """What the kernel relayed. User space has what leaves or comes by TCP, and what comes before a channel is bound."""
    relayed, kernel = relayed_packets(numbers), packets_by_kernel(numbers)
    yield kernel > MESSAGES, f"the kernel relayed {kernel:.0f} of {relayed:.0f} packets"
    passed = {name.split('"')[1]: int(value) for name, value in numbers.items() if "xdp_passed" in name and value}
    yield not passed.get("unfinished_checksum", 0) > kernel / 100, f"left to user space: {passed}"


WAYS = {"udp": "UDP to the relay", "tcp": "TCP to the relay", "tls": "TLS to the relay", "elsewhere": "agent to agent"}


def kinds_of_site():
    """The kinds, as docs/nat-matrix.md lists them."""
    yield "| kind | what it is | mapping | filtering |\n|---|---|---|---|"
    for kind in KINDS.values():
        behaves = f"{kind.mapping} | {kind.filtering}" if kind.way == "udp" else "no UDP |"
        yield f"| `{kind.name}` | {kind.what} | {behaves} |"


def paths(meetings):
    """Kind by kind: the path, and Chromium's milliseconds to the open channel."""
    names = [kind.name for kind in KINDS.values() if not kind.shared]
    found = {tuple(kind.name for kind in meeting.pair): meeting for meeting in meetings if meeting.library == "chromium"}
    yield f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    for row in names:
        cells = [found.get((column, row)) or found.get((row, column)) for column in names[: names.index(row) + 1]]
        yield f"| **{row}** | {' | '.join(map(cell, cells))} |{' |' * (len(names) - len(cells))}"
    yield ""
    for name in (name for name, kind in KINDS.items() if kind.shared):
        yield f"- `{name}`: {cell(found.get((name, name)))}"


def cell(meeting):
    if meeting is None:
        return "–"
    ways = [way for way in meeting.ways if way in ("tcp", "tls")]
    by = f" by {'/'.join(dict.fromkeys(ways)).upper()}" if ways else ""
    return f"{meeting.path}{by} {meeting.opened} ms"


def libraries(meetings):
    """What each library crossed, and how fast."""
    yield "| library | pairs | direct, ms | over 1,000 | of them relayed all the same | relayed, ms | over 1,500 |"
    yield "|---|---|---|---|---|---|---|"
    for library in LIBRARIES:
        own = [meeting for meeting in meetings if meeting.library == library]
        direct, relayed = ([each for each in own if each.path == path] for path in BARS)
        detours = sum(each.detour for each in direct)
        yield f"| {library} | {len(own)} | {figures(direct)} | {detours} | {figures(relayed)} |"
    yield "\nNot crossed:\n"
    for library in LIBRARIES:
        reasons = {}
        for pair in all_pairs():
            reasons.setdefault(cannot(library, pair), []).append(pair)
        for reason, pairs in reasons.items():
            if reason:
                yield f"- {library}, {len(pairs)} pairs: {reason}."


def figures(meetings):
    if not meetings:
        return "– | –"
    times = [meeting.opened for meeting in meetings]
    over = sum(meeting.opened > BARS[meeting.path] for meeting in meetings)
    return f"{statistics.median(times):.0f} (to {max(times)}) | {over}"


def write(part, lines):
    page, (start, end) = PAGE.read_text(), (f"<!-- {part} -->", f"<!-- end of {part} -->")
    before, after = page.split(start)[0], page.split(end)[1]
    PAGE.write_text(before + start + "\n" + "\n".join(lines) + "\n" + end + after)


def main(arguments):
    flags = argparse.ArgumentParser()
    flags.add_argument("pairs", nargs="*", default=CORNERS)
    flags.add_argument("--full", action="store_true")
    flags.add_argument("--write", action="store_true")
    flags.add_argument("--agents", default=",".join(LIBRARIES))
    flags.add_argument("--times", type=int, default=1)
    flags.add_argument("--xdp", choices=["driver", "generic", "auto"])
    flags.add_argument("--nodes", action="store_true")
    flags = flags.parse_args(arguments)
    pairs = all_pairs() if flags.full else [tuple(KINDS[name] for name in pair.split("+")) for pair in flags.pairs]
    meetings = [
        Meeting(pair, library)
        for pair in pairs * flags.times
        for library in flags.agents.split(",")
        if not cannot(library, pair)
    ]
    with Lab(pairs, flags.xdp, 2 if flags.nodes else 1) as lab:
        failed = tell(all_of(lab, meetings))
    if flags.write and not failed:
        write("kinds", kinds_of_site())
        write("paths", paths(meetings))
        write("libraries", libraries(meetings))
    return failed


if __name__ == "__main__":
    be_root()
    sys.exit(main(sys.argv[1:]))
