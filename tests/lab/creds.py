"""A NATS operator, an account and a user with a file of credentials: what `nsc` makes, which Debian does not have.

A program: `creds.py DIRECTORY` writes server.conf, which lets in nobody without them, and user.creds.
"""

import base64
import hashlib
import json
import pathlib
import sys
import time

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# The first byte of a key in its written form, by whose it is; that of a seed comes before it.
OPERATOR, ACCOUNT, USER, SEED = 14 << 3, 0, 20 << 3, 18 << 3


def crc16(data):
    """CRC-16/XMODEM."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


def written(data):
    return base64.b32encode(data + crc16(data).to_bytes(2, "little")).decode().rstrip("=")


def plain(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class Key:
    """One of the three."""

    def __init__(self, kind):
        self.key = Ed25519PrivateKey.generate()
        raw = serialization.Encoding.Raw
        public = self.key.public_key().public_bytes(raw, serialization.PublicFormat.Raw)
        private = self.key.private_bytes(raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
        self.name = written(bytes([kind]) + public)
        self.seed = written(bytes([SEED | kind >> 5, (kind & 31) << 3]) + private)

    def says(self, subject, kind, **more):
        """A token of this key about another."""
        claims = {"iat": int(time.time()), "iss": self.name, "name": kind, "sub": subject.name}
        claims["nats"] = {"type": kind, "version": 2, **more}
        claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
        parts = [plain(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)]
        return ".".join([*parts, plain(self.key.sign(".".join(parts).encode()))])


def main(directory):
    directory = pathlib.Path(directory)
    operator, account, user = Key(OPERATOR), Key(ACCOUNT), Key(USER)
    limits = {name: -1 for name in ("subs", "data", "payload", "imports", "exports", "conn", "leaf")}
    account_token = operator.says(account, "account", limits={**limits, "wildcards": True})
    permitted = {"pub": {"allow": ["halfway.>"]}, "sub": {"allow": ["halfway.>"]}}
    user_token = account.says(user, "user", subs=-1, data=-1, payload=-1, **permitted)
    (directory / "server.conf").write_text(
        f"operator: {operator.says(operator, 'operator')}\n"
        f"resolver: MEMORY\nresolver_preload: {{ {account.name}: {account_token} }}\n"
    )
    (directory / "user.creds").write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
