"""Halfway itself, in the public namespace of a test network."""

import contextlib
import ctypes
import os
import pathlib
import re
import signal
import socket
import subprocess
import urllib.parse

from net import PUBLIC, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("HALFWAY_BINARY", str(ROOT / "target/release/halfway"))
HTTPS = 8443
# What the certificate says beside the addresses.
HOST = "turn.lab"
URL = f"https://{PUBLIC[4]}:{HTTPS}"
# Whence the page of the browser's agent comes, which Halfway does not serve.
PAGES_PORT = 8444
PAGES = f"https://{PUBLIC[4]}:{PAGES_PORT}"
# The system call; Python has none of this name yet.
PIDFD_GETFD = 438
# So often may the heap have taken more, before it counts as lost.
ROUNDS = 4


def certified(directory, names):
    """The directory, with a certificate for these names in it, by a throw-away authority."""
    run("bash", str(ROOT / "certs/make-ca.sh"), str(directory), *names)
    return directory


def total(numbers, name):
    """One of what `metrics` gave, under all its labels together."""
    return sum(value for labelled, value in numbers.items() if labelled.partition("{")[0] == f"halfway_{name}")


def relayed_packets(numbers):
    return total(numbers, "relayed_packets_total")


def packets_by_kernel(numbers):
    """Those among them that user space has never seen."""
    return total(numbers, "xdp_relayed_packets_total")


class Appliance:
    """A running `halfway serve`, with a certificate of its own, or that of `certs`."""

    def __init__(
        self, net, directory, *flags, namespace=None, settings="", url=URL, pages=PAGES, own=True, environment=None,
        within=(), public=PUBLIC, certs=None,
    ):  # fmt: skip
        self.data, self.namespace = directory / "data", namespace or net.public
        self.url, self.pages = url, pages
        names = {urllib.parse.urlsplit(each).hostname for each in (url, pages)} | {*public.values(), HOST}
        certs = certs or certified(directory / "certs", names)
        self.ca = certs / "ca.pem"
        config = directory / "halfway.toml"
        config.write_text(
            f'data_dir = "{self.data}"\n'
            f'public_ips = ["{public[4]}", "{public[6]}"]\n'
            "[http]\n"
            + (f'cert = "{certs}/cert.pem"\nkey = "{certs}/key.pem"\n' if own else "")
            + f'listen = ["[::]:{urllib.parse.urlsplit(url).port or 443}"]\nallowed_origins = ["{pages}"]\n'
            f"{settings}\n"
        )
        self.config, self.flags = config, flags
        self.environment = {**os.environ, **(environment or {})}
        self.certs = certs
        # A command that runs another one, with fewer rights.
        self.within, self.said = within, ""
        self.log_file = directory / "halfway.log"

    def __enter__(self):
        command = self.namespace.command(*self.within, BINARY, "--config", self.config, "serve", *self.flags)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self.environment)
        log = []
        for line in self.process.stderr:
            log.append(line)
            if " ready " in line:
                self.said = "".join(log)
                # Nobody reads on here, and a full pipe would stop it.
                with open(self.log_file, "w") as rest:
                    self.drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=rest)
                return self
        raise RuntimeError("halfway did not start:\n" + "".join(log))

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for successor in self.serving():
            os.kill(successor, signal.SIGKILL)
        self.drain.wait()

    def serving(self):
        """Process numbers of whoever serves by this configuration: after an upgrade it is not the one that was started."""
        for pid in self.namespace.pids():
            # One that has just ended serves no more.
            with contextlib.suppress(FileNotFoundError):
                if str(self.config) in pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    yield pid

    def starts_anew(self):
        """Ends by SIGTERM, in its own time, and begins again; its exit code."""
        self.process.terminate()
        ended = self.process.wait(timeout=60)
        self.drain.wait()
        self.__enter__()
        return ended

    def token(self, agent, *flags):
        return run(BINARY, "--config", str(self.config), "token", agent, *flags).strip()

    def metrics(self):
        """Every number at /metrics, by name and labels."""
        page = self.namespace.run("curl", "-sS", "http://127.0.0.1:9478/metrics")
        return {name: float(value) for name, value in re.findall(r"^(halfway_\S+) (\S+)$", page, re.M)}

    def allocations(self):
        """How many live, whatever the transport."""
        return total(self.metrics(), "allocations")

    def resident(self):
        """Resident memory in KiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def lost_by(self, again):
        """KiB of resident memory that `again` costs for good, 2,048 at most of which are nothing.

        What is lost is lost every time it runs; what the heap keeps in pieces is not.
        """
        least = float("inf")
        for _ in range(ROUNDS):
            before = self.resident()
            again()
            least = min(least, self.resident() - before)
            if least <= 2_048:
                break
        return least

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connections(self):
        """Copies of its sockets that have a client, to look at their options."""
        process = os.pidfd_open(self.process.pid)
        for link in pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir():
            # A copy of anything else would outlive this: its log, say, would never end.
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=ctypes.CDLL(None).syscall(PIDFD_GETFD, process, int(link.name), 0)) as copy:
                # What has no client is of no interest.
                with contextlib.suppress(OSError):
                    copy.getpeername()
                    if copy.type == socket.SOCK_STREAM and copy.family != socket.AF_UNIX:
                        yield copy
        os.close(process)

    def log_lines(self):
        """Lines logged since it was ready."""
        return len(self.log_file.read_text().splitlines())

    def lost(self):
        """Packets dropped although their way was open: no permission, channel or allocation was missing."""
        reasons = "unsendable", "bandwidth", "too_large", "malformed"
        numbers = self.metrics()
        return sum(numbers[f'halfway_dropped_packets_total{{reason="{reason}"}}'] for reason in reasons)

    def relayed(self):
        """Bytes of payload relayed so far, both ways."""
        return total(self.metrics(), "relayed_bytes_total")
