"""Certificates from an authority: Pebble, which checks by HTTP and by TLS, and one of our own that says when it wants them renewed."""

import contextlib
import json
import os
import pathlib
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import urllib.request

from appliance import HOST, ROOT, Appliance
from checks import settled, tell
from net import PUBLIC, Net, run

PYTHON = ROOT / "target/lab/venv/bin/python"
AUTHORITY, MANAGEMENT, DNS, DNS_MANAGEMENT = 14_000, 15_000, 8_053, 8_055
# Seconds; two thirds of it are over soon.
SHORT_LIFE = 15
LONG_LIFE = 90 * 86_400


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        with net.public.entered():
            return tell(certify(net, pathlib.Path(scratch)))


def certify(net, scratch):
    certs = scratch / "authority"
    run("bash", str(ROOT / "certs/make-ca.sh"), str(certs), "localhost")
    with contextlib.ExitStack() as dns:
        dns.enter_context(names())
        point(HOST, PUBLIC[4])
        for name, check in CHECKS.items():
            place = scratch / name
            place.mkdir()
            yield from ((ok, f"{name}: {line}") for ok, line in check(net, place, certs))


def by_http(net, place, certs):
    with pebble(place, certs), halfway(net, place, certs, HOST) as appliance:
        first = presented()
        yield "turns:" not in urls(appliance), "serves at once, with a certificate of its own, and offers no TLS"
        obtained = until_new(first)
        yield issuer(obtained).startswith("Pebble"), f"then one by {issuer(obtained)}"
        yield settled(lambda: urls(appliance), lambda seen: "turns:" in seen), "and offers TURN over TLS"
        location = redirected("/some/where?q=1")
        yield location == f"https://{HOST}/some/where?q=1", f"port 80 sends everybody else to {location}"
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in appliance.data.glob("acme*")}
        yield modes == {"acme.pem": "0o600", "acme-account.json": "0o600"}, f"kept: {modes}"
    # Nobody is there to ask.
    with halfway(net, place, certs, HOST):
        yield presented() == obtained, "the next start presents it at once, whether or not the authority is there"


def by_tls(net, place, certs):
    with pebble(place, certs, http=5_002), halfway(net, place, certs, HOST):
        yield issuer(until_new(presented())).startswith("Pebble"), "the authority sees no port 80, and port 443 does"


def of_an_address(net, place, certs):
    with pebble(place, certs), halfway(net, place, certs, PUBLIC[4]):
        obtained = until_new(presented())
        yield issuer(obtained).startswith("Pebble"), f"one for {PUBLIC[4]}"


def renewed(net, place, certs):
    with pebble(place, certs, life=SHORT_LIFE), halfway(net, place, certs, HOST):
        first = until_new(presented())
        with connection(HOST) as open_before:
            second = until_new(first, patience=SHORT_LIFE)
            yield issuer(second).startswith("Pebble"), f"before its {SHORT_LIFE} seconds are over there is another"
            open_before.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            yield open_before.recv(12) == b"HTTP/1.1 200", "a connection that was open does not notice"


def refused(net, place, certs):
    point(HOST, "5.9.0.99")
    with pebble(place, certs), halfway(net, place, certs, HOST) as appliance:
        warned = settled(lambda: warnings(appliance), bool)
        yield len(warned) == 1 and HOST in warned[0] and "next try is in" in warned[0], f"one line: {warned}"
        yield run("curl", "-sSk", f"https://{PUBLIC[4]}/healthz") == "ok\n", "and it serves with its own"
        first = presented()
        point(HOST, PUBLIC[4])
        appliance.process.send_signal(1)
        yield issuer(until_new(first)).startswith("Pebble"), "mended, and reloaded: it is there"


def not_there(net, place, certs):
    with halfway(net, place, certs, HOST) as appliance:
        warned = settled(lambda: warnings(appliance), bool)
        yield len(warned) == 1 and "cannot be reached" in warned[0], f"one line: {warned}"
        first = presented()
        with pebble(place, certs):
            appliance.process.send_signal(1)
            yield issuer(until_new(first)).startswith("Pebble"), "the authority came back, and a reload asks it"


def when_it_is_asked_to(net, place, certs):
    (place / "cert.pem").symlink_to(certs / "cert.pem")
    (place / "key.pem").symlink_to(certs / "key.pem")
    command = [PYTHON, str(ROOT / "tests/lab/authority.py"), str(place), str(AUTHORITY)]
    with started(command, "ready") as authority, halfway(net, place, certs, HOST) as appliance:
        first = until_new(presented())
        yield authority.stdout.readline() == "signed in place of None\n", "an authority with a say signs"
        (place / "renew").touch()
        appliance.process.send_signal(1)
        yield until_new(first) != first, "wants it renewed, months before its end, and it is"
        replaced = authority.stdout.readline().split()[-1]
        yield re.fullmatch(r"[\w-]+\.[\w-]+", replaced) is not None, f"in place of {replaced}"


CHECKS = {
    "by HTTP": by_http,
    "by TLS": by_tls,
    "an address": of_an_address,
    "renewal": renewed,
    "refusal": refused,
    "authority not there": not_there,
    "renewal information": when_it_is_asked_to,
}


@contextlib.contextmanager
def started(command, word, **environment):
    """A program that says so when it is ready; it ends with the test."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    try:
        said = []
        while word not in (line := process.stdout.readline()):
            said.append(line)
            assert line, f"{command[0]} did not start: {said}"
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def pebble(place, certs, http=80, life=LONG_LIFE):
    """Pebble, which looks at our ports 80 and 443 and refuses one nonce in twenty: of three tries at a request one gets through,
    but for one request in ten thousand."""
    settings = {
        "listenAddress": f"0.0.0.0:{AUTHORITY}",
        "managementListenAddress": f"0.0.0.0:{MANAGEMENT}",
        "certificate": str(certs / "cert.pem"),
        "privateKey": str(certs / "key.pem"),
        "httpPort": http,
        "tlsPort": 443,
        "certificateValidityPeriod": life,
    }
    config = place / "pebble.json"
    config.write_text(json.dumps({"pebble": settings}))
    command = ["pebble", "-config", str(config), "-dnsserver", f"127.0.0.1:{DNS}"]
    with started(command, "ACME directory available", PEBBLE_VA_NOSLEEP="1", PEBBLE_WFE_NONCEREJECT="5") as process:
        # Nobody reads on, and a full pipe would stop it.
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=open(place / "pebble.log", "w"))
        yield
    drain.wait()


@contextlib.contextmanager
def names():
    """Pebble's own DNS server."""
    command = [
        "pebble-challtestsrv", "-dns01", f":{DNS}", "-management", f":{DNS_MANAGEMENT}",
        "-defaultIPv6", "", "-http01", "", "-https01", "", "-tlsalpn01", "",
    ]  # fmt: skip
    with started(command, "Starting management server"):
        yield


def point(name, address):
    """That name has that address from now on, and no other."""

    def tell_dns(what):
        body = json.dumps({"host": f"{name}.", "addresses": [address]}).encode()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{DNS_MANAGEMENT}/{what}", body).status

    for what in ("clear-a", "add-a"):
        assert settled(lambda: tell_dns(what), bool) == 200, "the DNS server takes no names"


def halfway(net, place, certs, domain):
    settings = f"""
[http.acme]
domains = ["{domain}"]
email = "admin@{HOST}"
directory = "https://localhost:{AUTHORITY}/dir"
"""
    environment = {"SSL_CERT_FILE": str(certs / "ca.pem")}
    directory = place / "halfway"
    directory.mkdir(exist_ok=True)
    for made in directory.glob("certs/*"):
        made.unlink()
    url = f"https://{PUBLIC[4]}:443"
    return Appliance(net, directory, url=url, settings=settings, own=False, environment=environment)


def connection(name):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection((PUBLIC[4], 443)), server_hostname=name)


def presented():
    """The leaf, in PEM."""
    with connection(HOST) as tls:
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True))


def until_new(before, patience=None):
    for _ in range(4 if patience else 3):
        if (now := settled(presented, lambda leaf: leaf != before)) != before:
            return now
    raise AssertionError("no new certificate")


def issuer(leaf):
    shown = run("openssl", "x509", "-noout", "-issuer", "-nameopt", "multiline", input=leaf)
    return re.search(r"commonName\s*= (.*)", shown)[1]


def urls(appliance):
    return run(
        "curl", "-sSk", "-H", f"Authorization: Bearer {appliance.token('agent-1')}", f"https://{PUBLIC[4]}/v1/ice"
    )


def redirected(path):
    answer = run("curl", "-sSi", "-H", f"Host: {HOST}", f"http://{PUBLIC[4]}{path}")
    found = re.search(r"308.*location: (\S+)", answer, re.S)
    return found and found[1]


def warnings(appliance):
    return [line for line in appliance.log_file.read_text().splitlines() if " WARN " in line and "no certificate" in line]


if __name__ == "__main__":
    sys.exit(main())
