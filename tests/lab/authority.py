"""A small ACME authority that says when it wants a certificate renewed (ARI, RFC 9773), which Pebble of Debian 12 does not.

It believes who asks: whether names are ours is Pebble's business. Usage: authority.py DIRECTORY PORT; it serves TLS with
DIRECTORY/cert.pem and key.pem, and wants everything renewed once DIRECTORY/renew is there. What it signed, and in whose place,
is a line each on its standard output.
"""

import base64
import datetime
import http.server
import itertools
import json
import pathlib
import ssl
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


def plain(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def named(name):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


class Signer:
    """The authority's key, and what it has signed."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.orders = {}

    def sign(self, csr):
        now = datetime.datetime.now(datetime.timezone.utc)
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        leaf = (
            x509.CertificateBuilder()
            .subject_name(named("leaf"))
            .issuer_name(named("an authority of the tests"))
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 90 * DAY)
            .add_extension(names.value, critical=False)
            .add_extension(identifier, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return leaf.public_bytes(serialization.Encoding.PEM)


class Requests(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    numbers = itertools.count(1)

    def url(self, *parts):
        return f"https://{self.headers['Host']}/" + "/".join(map(str, parts))

    def answer(self, status, body=b"", kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Replay-Nonce", f"nonce-{next(self.numbers)}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.answer(200)

    def do_GET(self):
        if self.path == "/dir":
            names = ["newNonce", "newAccount", "newOrder", "renewalInfo", "revokeCert", "keyChange"]
            return self.answer(200, {name: self.url(name) for name in names} | {"meta": {}})
        assert self.path.startswith("/renewalInfo/"), self.path
        now = datetime.datetime.now(datetime.timezone.utc)
        start = now - DAY if (self.server.directory / "renew").exists() else now + 30 * DAY
        window = {"start": start.isoformat(), "end": (start + DAY / 2).isoformat()}
        self.answer(200, {"suggestedWindow": window}, Retry_After="21600")

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        payload = json.loads(plain(message["payload"]) or "{}")
        what, _, number = self.path[1:].partition("/")
        getattr(self, what)(payload, number)

    def newAccount(self, _payload, _number):
        self.answer(201, {"status": "valid"}, Location=self.url("account", 1))

    def newOrder(self, payload, _number):
        number = str(next(self.numbers))
        self.server.signer.orders[number] = {"payload": payload, "leaf": None}
        self.order(None, number, 201)

    def order(self, _payload, number, status=200):
        order = self.server.signer.orders[number]
        body = {
            "status": "valid" if order["leaf"] else "ready",
            "identifiers": order["payload"]["identifiers"],
            "authorizations": [self.url("authorization", number)],
            "finalize": self.url("finalize", number),
        }
        if replaces := order["payload"].get("replaces"):
            body["replaces"] = replaces
        if order["leaf"]:
            body["certificate"] = self.url("certificate", number)
        self.answer(status, body, Location=self.url("order", number))

    def authorization(self, _payload, number):
        identifier = self.server.signer.orders[number]["payload"]["identifiers"][0]
        self.answer(200, {"identifier": identifier, "status": "valid", "challenges": []})

    def finalize(self, payload, number):
        order = self.server.signer.orders[number]
        order["leaf"] = self.server.signer.sign(x509.load_der_x509_csr(plain(payload["csr"])))
        print("signed in place of", order["payload"].get("replaces"), flush=True)
        self.order(None, number)

    def certificate(self, _payload, number):
        leaf = self.server.signer.orders[number]["leaf"]
        self.answer(200, leaf, kind="application/pem-certificate-chain")

    def log_message(self, *_):
        pass


def main(directory, port):
    server = http.server.ThreadingHTTPServer(("", int(port)), Requests)
    server.directory, server.signer = pathlib.Path(directory), Signer()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server.directory / "cert.pem", server.directory / "key.pem")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
