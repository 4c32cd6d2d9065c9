"""A small STUN and TURN client for the lab: bytes by hand, so that it can also say what no decent client says."""

import base64
import hashlib
import hmac
import ipaddress
import os
import socket
import ssl
import struct
import time

REALM = "halfway"
COOKIE = 0x2112A442
BINDING, ALLOCATE, REFRESH, SEND, DATA, CREATE_PERMISSION, CHANNEL_BIND = 1, 3, 4, 6, 7, 8, 9
REQUEST, INDICATION, SUCCESS, ERROR = 0x000, 0x010, 0x100, 0x110
USERNAME, MESSAGE_INTEGRITY, ERROR_CODE, CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS = 6, 8, 9, 12, 13, 0x12
REALM_, NONCE, XOR_RELAYED_ADDRESS, REQUESTED_TRANSPORT = 0x14, 0x15, 0x16, 0x19
UDP_TRANSPORT = (REQUESTED_TRANSPORT, bytes([17, 0, 0, 0]))


def user(secret, agent, lifetime=3_600):
    """A user name and its key, as the relay derives them from the secret."""
    name = f"{int(time.time()) + lifetime}:{agent}"
    password = base64.b64encode(hmac.digest(secret.encode(), name.encode(), "sha1")).decode()
    return name, hashlib.md5(f"{name}:{REALM}:{password}".encode()).digest()


def message(kind, attributes=(), key=None, transaction=None):
    """A STUN message; with a key it is signed."""
    transaction = transaction or os.urandom(12)
    body = b"".join(
        struct.pack("!HH", number, len(value)) + value + bytes(-len(value) % 4) for number, value in attributes
    )
    if key is not None:
        signed = struct.pack("!HHI", kind, len(body) + 24, COOKIE) + transaction + body
        body += struct.pack("!HH", MESSAGE_INTEGRITY, 20) + hmac.digest(key, signed, "sha1")
    return struct.pack("!HHI", kind, len(body), COOKIE) + transaction + body


def attributes(answer):
    """The first attribute of each kind."""
    found, at = {}, 20
    while at + 4 <= len(answer):
        number, length = struct.unpack_from("!HH", answer, at)
        found.setdefault(number, answer[at + 4 : at + 4 + length])
        at += 4 + length + -length % 4
    return found


def address(ip, port):
    """The value of an XOR-PEER-ADDRESS for IPv4."""
    mask = struct.pack("!I", COOKIE)
    octets = bytes(a ^ b for a, b in zip(ipaddress.IPv4Address(ip).packed, mask))
    return struct.pack("!BBH", 0, 1, port ^ (COOKIE >> 16)) + octets


def parse_address(value):
    octets = bytes(a ^ b for a, b in zip(value[4:8], struct.pack("!I", COOKIE)))
    return str(ipaddress.IPv4Address(octets)), struct.unpack("!H", value[2:4])[0] ^ (COOKIE >> 16)


class Client:
    """One client of a relay, over UDP, TCP or TLS."""

    def __init__(self, server, secret, agent, transport="udp", trust=None, patience=10, source=""):
        self.user, self.key, self.nonce, self.realm = *user(secret, agent), b"", REALM
        kind = socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM
        self.socket = socket.socket(socket.AF_INET, kind)
        self.socket.settimeout(patience)
        self.socket.bind((source, 0))
        self.socket.connect(server)
        if transport == "tls":
            context = ssl.create_default_context(cafile=trust)
            context.set_alpn_protocols(["stun.turn"])
            self.socket = context.wrap_socket(self.socket, server_hostname=server[0])
        self.streams = transport != "udp"
        self.close = self.socket.close

    def ask(self, method, *wanted, sign=True):
        """Sends a request and gives the attributes of its answer, or the error's code."""
        signed = [(USERNAME, self.user.encode()), (REALM_, self.realm.encode()), (NONCE, self.nonce)]
        request = message(REQUEST | method, [*wanted, *signed], self.key) if sign else message(method, wanted)
        self.socket.sendall(request)
        while True:
            answer = self.receive()
            if answer[8:20] == request[8:20]:
                break
        found = attributes(answer)
        self.nonce = found.get(NONCE, self.nonce)
        self.realm = found[REALM_].decode() if REALM_ in found else self.realm
        kind = struct.unpack("!H", answer[:2])[0]
        return found if kind & 0x110 == SUCCESS else found[ERROR_CODE][2] * 100 + found[ERROR_CODE][3]

    def allocate(self):
        """The relayed address."""
        assert self.ask(ALLOCATE, UDP_TRANSPORT, sign=False) == 401
        answer = self.ask(ALLOCATE, UDP_TRANSPORT)
        assert isinstance(answer, dict), f"Allocate is answered {answer}"
        return parse_address(answer[XOR_RELAYED_ADDRESS])

    def bind(self, channel, peer):
        number = (CHANNEL_NUMBER, struct.pack("!HH", channel, 0))
        answer = self.ask(CHANNEL_BIND, number, (XOR_PEER_ADDRESS, address(*peer)))
        assert isinstance(answer, dict), f"ChannelBind is answered {answer}"

    def permit(self, peer):
        answer = self.ask(CREATE_PERMISSION, (XOR_PEER_ADDRESS, address(*peer)))
        assert isinstance(answer, dict), f"CreatePermission is answered {answer}"

    def release(self):
        self.ask(REFRESH, (LIFETIME, bytes(4)))

    def send_on(self, channel, payload):
        padding = bytes(-len(payload) % 4) if self.streams else b""
        self.socket.sendall(struct.pack("!HH", channel, len(payload)) + payload + padding)

    def receive(self):
        """The next message, ChannelData without its padding."""
        if not self.streams:
            return self.socket.recv(65_536)
        head = self.exactly(4)
        length = struct.unpack("!H", head[2:])[0]
        if head[0] >= 0x40:
            return head + self.exactly(length + -length % 4)[:length]
        return head + self.exactly(16 + length)

    def exactly(self, length):
        got = b""
        while len(got) < length:
            piece = self.socket.recv(length - len(got))
            assert piece, "the stream has ended"
            got += piece
        return got
