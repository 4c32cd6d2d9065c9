"""What a NAT does, measured as RFC 4787 and RFC 5780 have it: with a server at two addresses, one of them on two ports.

Usage: probes.py reflect ADDRESS OTHER answers, somewhere in the core. probes.py ask ADDRESS OTHER FORGETS PROXY runs at a site
and prints what it saw; FORGETS are the seconds after which an idle mapping should be gone, or 0, PROXY is the address and
port of an HTTPS proxy, or nothing.
"""

import json
import select
import socket
import sys
import time

PORT, OTHER_PORT = 4001, 4002
# The relay's over TCP, and HTTPS.
TCP_PORTS = 443, 3478
# Seconds for an answer; the links of the lab take less than a tenth of that.
PATIENCE, TRIES = 0.9, 3

INDEPENDENT, BY_ADDRESS, BY_PORT = "endpoint-independent", "address-dependent", "address-and-port-dependent"


def reflect(address, other):
    """Answers from the sockets that a question names: 0 is the one at `address`, 1 its other port, 2 is at `other`.

    The answer goes back, or where the question says.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sockets = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(3)]
    for each, place in zip(sockets, places(address, other)):
        each.bind(place)
    listeners = [socket.create_server((address, port), family=family) for port in TCP_PORTS]
    print("ready", flush=True)
    while listeners:
        for asked in select.select(sockets, [], [])[0]:
            question, source = asked.recvfrom(2_048)
            question = json.loads(question)
            for number in question["from"]:
                answer = {"seen": source[:2], "by": number}
                sockets[number].sendto(json.dumps(answer).encode(), tuple(question.get("to", source)))


def places(address, other):
    return (address, PORT), (address, OTHER_PORT), (other, PORT)


class Asker:
    """One socket at the site, and what it hears."""

    def __init__(self, servers):
        self.servers = servers
        self.socket = socket.socket(socket.AF_INET6 if ":" in servers[0][0] else socket.AF_INET, socket.SOCK_DGRAM)
        self.port = self.bind()

    def bind(self):
        self.socket.bind(("", 0))
        return self.socket.getsockname()[1]

    def ask(self, server, *answer_from):
        """Which of the server's sockets were heard, and as whom they saw this one."""
        heard = {}
        for _ in range(TRIES):
            self.socket.sendto(json.dumps({"from": answer_from}).encode(), self.servers[server])
            heard |= self.hear(PATIENCE / TRIES, answer_from)
            if set(heard) == set(answer_from):
                break
        return heard

    def hear(self, patience, wanted):
        """What comes in this time, or until all of it is there."""
        heard, until = {}, time.monotonic() + patience
        while set(heard) != set(wanted) and select.select([self.socket], [], [], max(0.0, until - time.monotonic()))[0]:
            answer = json.loads(self.socket.recv(2_048))
            heard[answer["by"]] = tuple(answer["seen"])
        return heard


def ask(address, other, forgets, proxy):
    """Prints what passes, and what the NAT does."""
    found = {"tcp": [port for port in TCP_PORTS if connects((address, port))]}
    if proxy:
        found["proxy"] = [port for port in TCP_PORTS if connects_through(proxy, address, port)]
    print(json.dumps(found | over_udp(places(address, other), float(forgets))))


def over_udp(servers, forgets):
    asker = Asker(servers)
    mapped = [asker.ask(number, number).get(number) for number in range(3)]
    if mapped[0] is None:
        return {"udp": False}
    # A fresh socket: the filter must not know any of the other places yet.
    heard = Asker(servers).ask(0, 0, 1, 2)
    return {
        "udp": True,
        "nat": mapped[0] != (local_address(servers[0]), asker.port),
        "mapping": INDEPENDENT if mapped[0] == mapped[2] else BY_ADDRESS if mapped[0] == mapped[1] else BY_PORT,
        "filtering": INDEPENDENT if 2 in heard else BY_ADDRESS if 1 in heard else BY_PORT,
        "mapped": mapped[0][0],
        "hairpin": hairpin(servers),
        "forgets": forgotten(servers, forgets) if forgets else None,
    }


def connects(place):
    try:
        socket.create_connection(place, timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def connects_through(proxy, address, port):
    """Whether the proxy opens a connection for us."""
    host, _, at = proxy.rpartition(":")
    with socket.create_connection((host, int(at)), timeout=PATIENCE) as connection:
        connection.sendall(f"CONNECT {address}:{port} HTTP/1.1\r\nHost: {address}:{port}\r\n\r\n".encode())
        return connection.recv(1_024).split()[1] == b"200"


def local_address(server):
    probe = socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET, socket.SOCK_DGRAM)
    probe.connect(server)
    return probe.getsockname()[0]


def hairpin(servers):
    """Whether one socket at the site reaches the other by the address that the server saw."""
    one, other = Asker(servers), Asker(servers)
    outer = [asker.ask(0, 0)[0] for asker in (one, other)]
    if outer[0][0] == local_address(servers[0]) or ":" in servers[0][0] and "." in outer[0][0]:
        # There is no other address, or none of this family.
        return None
    for _ in range(TRIES):
        # A filter, if there is one, wants to see both.
        one.socket.sendto(b'{"by": "one", "seen": []}', outer[1])
        other.socket.sendto(b'{"by": "other", "seen": []}', outer[0])
        if one.hear(0.1, ["other"]) or other.hear(0.1, ["one"]):
            return True
    return False


def forgotten(servers, seconds):
    """Whether a mapping that lies idle is there after two thirds of these seconds, and no more soon after they are over."""
    started, kept = time.monotonic(), []
    idle = [(seconds * 2 / 3, Asker(servers)), (seconds + 3, Asker(servers))]
    mapped = [asker.ask(0, 0)[0] for _, asker in idle]
    for (after, asker), address in zip(idle, mapped):
        time.sleep(max(0.0, started + after - time.monotonic()))
        # Another socket asks that this one be written to: it must not touch its own mapping.
        Asker(servers).socket.sendto(json.dumps({"from": [0], "to": address}).encode(), servers[0])
        kept.append(bool(asker.hear(PATIENCE, [0])))
    return kept == [True, False]


PARTS = {"reflect": reflect, "ask": ask}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])
