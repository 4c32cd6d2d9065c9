"""Three nodes that are one through NATS: agents meet wherever they are, whatever breaks between the nodes.

Usage: cluster.py [CHECK …].
"""

import contextlib
import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import cuts
import stun
from agents import PYTHON
from appliance import Appliance
from checks import settled, tell
from net import Net, run

NODES, ENGINE = 3, 4222
ROOMS, AGENTS, SECONDS = ("one", "two"), 9, 30
SECRET, KEY = "the secret that the nodes share", "the key of tokens that the nodes share"
SETTINGS = f"""
connections_per_address = 0
handshakes_per_second_per_address = 0
[credentials]
secrets = ["{SECRET}"]
[auth]
secrets = ["{KEY}"]
[signaling]
messages_per_second = 0
"""


def main(*names):
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        # Where the engine is, and the agents are.
        net.public.forwards()
        sites = [net.site(number) for number in range(1, NODES + 1)]
        return tell(checks(Place(net, sites, pathlib.Path(scratch)), names))


def checks(place, names):
    for name, check in CHECKS.items():
        if not names or name in names:
            yield from ((ok, f"{name}: {line}") for ok, line in check(place))


class Place:
    """The network, and a directory for each check."""

    def __init__(self, net, sites, scratch):
        self.net, self.sites, self.scratch, self.numbers = net, sites, scratch, itertools.count()

    def directory(self):
        directory = self.scratch / str(next(self.numbers))
        directory.mkdir()
        return directory


class Engine:
    """Servers of NATS that are one cluster of it, in the public namespace."""

    def __init__(self, place, servers=1, flags=()):
        self.place, self.flags, self.processes = place, flags, {}
        self.ports = range(ENGINE, ENGINE + servers)

    def __enter__(self):
        for port in self.ports:
            self.start(port)
        return self

    def start(self, port):
        routes = ",".join(f"nats://127.0.0.1:{other + 1_000}" for other in self.ports)
        together = ["--cluster_name", "lab", "--cluster", f"nats://127.0.0.1:{port + 1_000}", "--routes", routes]
        command = ["nats-server", "--addr", "0.0.0.0", "--port", port, *(together if len(self.ports) > 1 else []), *self.flags]
        process = subprocess.Popen(self.place.net.public.command(*command), stderr=subprocess.PIPE, text=True)
        assert any("Server is ready" in line for line in process.stderr), "nats-server did not start"
        # Nobody reads on here, and a full pipe would stop it.
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        self.processes[port] = process

    def kill(self, port=ENGINE):
        process = self.processes.pop(port)
        process.kill()
        process.wait()

    def __exit__(self, *_):
        for port in list(self.processes):
            self.kill(port)


class Node(Appliance):
    """One of the nodes, in a site."""

    def __init__(self, place, number, servers, more=""):
        directory, site = place.directory(), place.sites[number]
        self.name, self.host, self.site = f"node-{number}", f"node-{number}.lab", site
        # From behind a site's end, the public namespace is its way out.
        engine = site.address.replace(".2", ".1")
        nats = json.dumps([server.format(engine=engine) for server in servers])
        settings = f'{SETTINGS}[cluster]\nnode = "{self.name}"\nnats = {nats}\n{more}'
        url = f"https://{site.address}:8443"
        super().__init__(place.net, directory, "--public-host", self.host, namespace=site, url=url, settings=settings)

    @property
    def way(self):
        return [self.site.address, 8443]

    def count(self, name):
        return self.metrics()[f"halfway_{name}"]

    def cut(self):
        """Nothing passes between it and the engine, and nobody is told."""
        drop = f"chain {{way}} {{{{ type filter hook {{way}} priority 0; tcp dport {ENGINE} drop; tcp sport {ENGINE} drop; }}}}"
        chains = "\n".join(drop.format(way=way) for way in ("input", "output"))
        self.site.rules(f"table inet wall {{\n{chains}\n}}")

    def mend(self):
        self.site.run("nft", "delete", "table", "inet", "wall")

    def ask(self, method, path, token, *flags):
        """The status of an answer, and its body."""
        command = "curl", "-sSk", "-X", method, "-H", f"Authorization: Bearer {token}", "-w", "\n%{http_code}"
        body, status = self.place_of_agents.run(*command, *flags, self.url + path).rsplit("\n", 1)
        return int(status), json.loads(body or "null")


@contextlib.contextmanager
def nodes(place, servers=("nats://{engine}:4222",), more=""):
    """All of them, which know each other."""
    Node.place_of_agents = place.net.public
    with contextlib.ExitStack() as stack:
        each = [stack.enter_context(Node(place, number, servers, more)) for number in range(NODES)]
        know(each)
        yield each


def know(each):
    """All are with the engine and know each other; after a short absence one may know the others and not be there yet."""
    wanted = [(1.0, len(each) - 1.0)] * len(each)
    seen = settled(lambda: [(node.count("cluster_up"), node.count("cluster_nodes")) for node in each], lambda seen: seen == wanted)
    assert seen == wanted, f"(with the engine, other nodes known): {seen}"


def orders(each, **more):
    """For agents that talk."""
    ca = each[0].config.with_name("all.pem")
    ca.write_text("".join(node.ca.read_text() for node in each))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    rooms = [{f"{room}-{n}": each[0].token(f"{room}-{n}", "--room", room) for n in range(AGENTS)} for room in ROOMS]
    ways = [node.way for node in each]
    return {"seed": seed, "transports": ["wss"], "ca": str(ca), "rooms": rooms, "nodes": ways, "seconds": SECONDS, **more}


def anywhere(place):
    """Agents whose connections are cut all the time come back at any node, and their sessions move there."""
    with Engine(place), nodes(place) as each:
        yield from cuts.promises(cuts.talk(place.net, orders(each)), 5)
        moved = sum(node.count('cluster_sessions_total{direction="in"}') for node in each)
        yield moved > AGENTS, f"sessions went on at another node {moved:.0f} times"
        for node in each:
            yield from cuts.ends(node)
            frames = [node.count(f'cluster_frames_total{{direction="{way}"}}') for way in ("in", "out")]
            yield all(frames), f"{node.name}: frames from other nodes and to them: {frames}"


def breaks(place):
    """The engine dies and comes again; a node is cut off for a while. Agents stay where they are."""
    with Engine(place) as engine, nodes(place) as each:
        talking = begin(place, orders(each, settled=True, bears=True, seconds=45))
        time.sleep(5)
        engine.kill()
        down = settled(lambda: [node.count("cluster_up") for node in each], lambda up: not any(up))
        yield not any(down), "the engine is gone, and each node says so"
        yield from without_engine(each)
        engine.start(ENGINE)
        know(each)
        yield True, "it is there again, and the nodes know each other"
        each[0].cut()
        seen = settled(lambda: each[0].count("cluster_nodes"), lambda seen: not seen)
        yield not seen, "one node is cut off, and knows of no other"
        each[0].mend()
        know(each)
        yield True, "it is mended, and they know each other"
        report = end(talking)
        unanswered = each[0].count("cluster_unanswered_total")
        yield unanswered > 0, f"frames that nobody answered while nobody knew: {unanswered:.0f}"
        yield report["kept"] == report["promised"], f"{report['kept']} of {report['promised']} frames came as promised"
        yield set(report["failed"]) <= {"unavailable", "peerUnavailable"}, f"senders were told: {report['failed']}"
        yield report["failed"].get("unavailable", 0) > 0, "some of them that it may work later"
        wrongs = "".join(f"\n     {wrong}" for wrong in report["wrongs"][:20])
        yield not report["wrongs"], f"twice, out of order or changed: {len(report['wrongs'])}{wrongs}"
        warned = [line for line in each[1].log_file.read_text().splitlines() if " WARN " in line]
        told = ["the other nodes cannot be reached" in line for line in warned]
        yield told.count(True) == 1 and len(warned) <= 3, f"{each[1].name} warned: {warned}"


def without_engine(each):
    """Agents of one node reach each other; of others it is not known."""
    alice, bob, carol = (each[0].token(name) for name in ("alice", "bob", "carol"))
    hello = "-d", '[{"type":"hello"}]'
    for node, token in (each[0], alice), (each[0], bob), (each[1], carol):
        assert node.ask("POST", "/v1/signal", token, *hello)[0] == 200
    offer = "-d", '{"sdp":"v=0"}'
    status, _ = each[0].ask("POST", "/signal/bob/offer", alice, *offer)
    yield status == 202, f"to an agent of the same node: {status}"
    status, problem = each[0].ask("POST", "/signal/carol/offer", alice, *offer)
    yield (status, problem["code"]) == (503, "unavailable"), f"to another's: {status} {problem['code']}"


def many_servers(place):
    """Three servers of NATS, a node at each; one server dies."""
    servers = [f"nats://{{engine}}:{ENGINE + number}" for number in range(NODES)]
    with Engine(place, NODES) as engine, nodes(place, servers) as each:
        yield from cuts.promises(cuts.talk(place.net, orders(each, seconds=15)), 5)
        engine.kill(ENGINE + 1)
        up = settled(lambda: [node.count("cluster_up") for node in each], all)
        yield all(up), "a server died, and the nodes are at the others"
        know(each)
        yield from cuts.promises(cuts.talk(place.net, orders(each, seconds=15)), 5)


def lists(place):
    """ICE lists name all nodes, the agent's own first; a node that ends is in no list."""
    with Engine(place), nodes(place) as each:
        for node in each:
            hosts = named(node)
            yield hosts[0] == node.host and len(set(hosts)) == NODES, f"{node.name} names {hosts}"
        each[2].process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        hosts = settled(lambda: named(each[0]), lambda hosts: each[2].host not in hosts)
        took = time.monotonic() - asked
        yield each[2].host not in hosts and took < 3, f"one that ends is in no list {took:.1f} s later: {hosts}"


def named(node):
    """The hosts of a list, in its order."""
    _, body = node.ask("GET", "/v1/ice", node.token("alice"))
    return list(dict.fromkeys(uri.split(":")[1] for uri in body["uris"]))


def revoked(place):
    """Who is revoked at one node has nothing at any, within a second, nor at a node that was not there."""
    with Engine(place), nodes(place) as each:
        token, admin = each[0].token("mallory"), each[0].token("ops", "--scope", "admin")
        assert each[1].ask("POST", "/v1/signal", token, "-d", '[{"type":"hello"}]')[0] == 200
        with place.net.public.entered():
            stun.Client((each[2].site.address, 3478), SECRET, "mallory").allocate()
        assert each[2].allocations() == 1
        status, _ = each[0].ask("DELETE", "/v1/agents/mallory", admin)
        asked = time.monotonic()
        left = settled(lambda: (each[1].count("agents"), each[2].allocations()), lambda left: left == (0, 0))
        took = time.monotonic() - asked
        yield status == 204 and left == (0, 0) and took < 1, f"session and allocation at other nodes end in {took:.2f} s: {left}"
        refused = [node.ask("GET", "/v1/ice", token)[0] for node in each]
        yield refused == [401] * NODES, f"its token is refused everywhere: {refused}"
        late = each[0].token("late")
        each[2].process.kill()
        each[2].process.wait()
        assert each[0].ask("DELETE", "/v1/agents/late", admin)[0] == 204
        each[2].drain.wait()
        each[2].__enter__()
        status = settled(lambda: each[2].ask("GET", "/v1/ice", late)[0], lambda status: status == 401)
        yield status == 401, f"a node that was away then learns of it: {status}"


def signaled(place):
    """Whom an agent was told of at one node it may reach through the relay of any, and nobody else."""
    with Engine(place), nodes(place, more='[turn]\npeer_policy = "signaled"\n') as each:
        alice, bob = each[0].token("alice"), each[1].token("bob")
        for node, token in (each[0], alice), (each[1], bob):
            assert node.ask("POST", "/v1/signal", token, "-d", '[{"type":"hello"}]')[0] == 200
        candidate = json.dumps({"candidate": {"candidate": "candidate:1 1 udp 1 5.9.77.7 9 typ host", "sdpMid": "0"}})
        status, _ = each[1].ask("POST", "/signal/alice/candidate", bob, "-d", candidate)
        with place.net.public.entered():
            client = stun.Client((each[2].site.address, 3478), SECRET, "alice")
            client.allocate()
            ask = lambda ip: client.ask(stun.CREATE_PERMISSION, (stun.XOR_PEER_ADDRESS, stun.address(ip, 9)))
            told = settled(lambda: ask("5.9.77.7"), lambda answer: isinstance(answer, dict))
            yield status == 202 and isinstance(told, dict), "an address that was told at one node is reached through another"
            yield ask("5.9.77.8") == 403, f"one that was not is refused: {ask('5.9.77.8')}"


def killed(place):
    """A node dies: its agents are gone for the others, and come back at one of those."""
    with Engine(place), nodes(place) as each:
        alice, bob = each[0].token("alice"), each[0].token("bob")
        hello = "-d", '[{"type":"hello"}]'
        assert each[0].ask("POST", "/v1/signal", alice, *hello)[0] == 200
        assert each[1].ask("POST", "/v1/signal", bob, *hello)[0] == 200

        def present():
            return [entry["agent"] for entry in each[0].ask("GET", "/v1/agents", alice)[1]["agents"]]

        away = each[0].count("cluster_agents")
        yield present() == ["alice", "bob"] and away == 1, f"known at another node: {present()}, {away:.0f} of them elsewhere"
        each[1].process.kill()
        asked = time.monotonic()
        status, problem = each[0].ask("POST", "/signal/bob/offer", alice, "-d", '{"sdp":"v=0"}')
        yield problem["code"] in ("peerUnavailable", "unavailable"), f"a sender is told at once: {status} {problem['code']}"
        left = settled(present, lambda left: left == ["alice"])
        yield left == ["alice"], f"gone for the others {time.monotonic() - asked:.1f} s later: {left}"
        status, answers = each[2].ask("POST", "/v1/signal", bob, *hello)
        agents = [entry["agent"] for entry in answers[0]["agents"]]
        yield status == 200 and agents == ["alice"], f"it comes back at another one, and sees {agents}"


def secured(place):
    """TLS towards NATS, and a password; who does not trust the server does not speak to it."""
    certs = place.directory() / "certs"
    engines = [site.address.replace(".2", ".1") for site in place.sites]
    run("bash", str(pathlib.Path(__file__).parents[2] / "certs/make-ca.sh"), str(certs), *engines)
    flags = "--tls", "--tlscert", certs / "cert.pem", "--tlskey", certs / "key.pem", "--user", "halfway", "--pass", "s3cret"
    with Engine(place, flags=flags):
        with nodes(place, ["tls://halfway:s3cret@{engine}:4222"], f'ca = "{certs}/ca.pem"\n') as each:
            yield from cuts.promises(cuts.talk(place.net, orders(each, seconds=10)), 5)
            said = each[0].said + each[0].log_file.read_text()
            yield "s3cret" not in said, "the password is in no log"
        with Node(place, 0, ["tls://halfway:s3cret@{engine}:4222"]) as alone:
            warned = settled(lambda: alone.log_file.read_text(), lambda said: "cannot be reached" in said)
            yield "the other nodes cannot be reached" in warned, "a server that nobody vouches for is not spoken to"


def vouched(place):
    """A file of credentials, whose user may do no more than the documentation says."""
    directory = place.directory()
    run(str(PYTHON), str(pathlib.Path(__file__).with_name("creds.py")), str(directory))
    with Engine(place, flags=("--config", directory / "server.conf")):
        with nodes(place, more=f'credentials = "{directory}/user.creds"\n') as each:
            yield from cuts.promises(cuts.talk(place.net, orders(each, seconds=10)), 5)
        with Node(place, 0, ["nats://{engine}:4222"]) as stranger:
            warned = settled(lambda: stranger.log_file.read_text(), lambda said: "authorization violation" in said)
            yield "cluster.nats is tried again: " in warned, "without it a node is not let in, and says so"


def begin(place, what):
    """Agents that talk in the background."""
    command = place.net.public.command(PYTHON, pathlib.Path(__file__).with_name("talkers.py"))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(what))
    process.stdin.close()
    return process


def end(process):
    output = process.stdout.read()
    assert process.wait() == 0, "the agents failed"
    return json.loads(output)


CHECKS = {check.__name__: check for check in (anywhere, breaks, many_servers, lists, revoked, signaled, killed, secured, vouched)}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
