"""Killed without warning, a full disk, a read-only one, and a clock that jumps: all of it is survived, and said."""

import contextlib
import json
import os
import pathlib
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

from agents import PYTHON
from appliance import BINARY, Appliance
from checks import settled, tell
from load import found, load, settings
from net import Net, run

AGENTS, HEARTBEAT = 40, 25
FIRST_STARTS = 40
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
SECRET = "the secret of the mishaps"
SERVE = ["serve", "--http-listen", "127.0.0.1:0", "--turn-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"]


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, Net() as net:
        return tell(mishaps(net, pathlib.Path(scratch)))


def mishaps(net, scratch):
    for check in killed_under_load, killed_at_birth, full, read_only, another_time:
        place = scratch / check.__name__
        place.mkdir()
        yield from ((ok, f"{check.__name__}: {line}") for ok, line in check(net, place))


def killed_under_load(net, place):
    with Appliance(net, place, settings=settings(SECRET)) as appliance:
        secret = (appliance.data / "secret").read_bytes()
        tokens = [appliance.token(f"agent-{number}") for number in range(AGENTS)]
        command = net.public.command(PYTHON, pathlib.Path(__file__).with_name("returning.py"))
        agents = subprocess.Popen([*command, appliance.url, str(appliance.ca), *tokens], stdout=subprocess.PIPE, text=True)
        lines = queue.SimpleQueue()
        threading.Thread(target=lambda: [lines.put(line) for line in agents.stdout], daemon=True).start()
        try:
            yield len(welcomed(lines)) == AGENTS, f"{AGENTS} agents, and clients that relay"
            clients = load(net.public, SECRET, "pair", 4, stderr=subprocess.DEVNULL)
            settled(appliance.metrics, lambda numbers: numbers["halfway_relay_ports{state=\"live\"}"] > 0)
            appliance.process.send_signal(signal.SIGKILL)
            appliance.process.wait()
            clients.wait()
            started = time.monotonic()
            appliance.__enter__()
            back = welcomed(lines)
            took = time.monotonic() - started
            yield len(back) == AGENTS and not any(back.values()), f"killed and started: {len(back)} agents are back in {took:.1f} s"
            yield took < HEARTBEAT, f"within their heartbeat of {HEARTBEAT} s"
        finally:
            agents.kill()
            agents.wait()
        yield found(load(net.public, SECRET, "pair", 2))["lossPercent"] == 0, "clients relay as before, on the same ports"
        yield (appliance.data / "secret").read_bytes() == secret, "the secret is what it was"


def welcomed(lines):
    """Who came, until all have or a heartbeat is over, and whether the session was resumed."""
    seen, until = {}, time.monotonic() + HEARTBEAT
    with contextlib.suppress(queue.Empty):
        while len(seen) < AGENTS:
            welcome = json.loads(lines.get(timeout=max(0, until - time.monotonic())))
            seen[welcome["agent"]] = welcome["resumed"]
    return seen


def start(data, **options):
    """`serve` on loopback, whose log is read by nobody else."""
    config = data.parent.parent / "loopback.toml"
    config.write_text('admin.listen = ["127.0.0.1:0"]\n')
    command = [BINARY, "--config", str(config), "--data-dir", str(data), *SERVE]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)


def until_ready(process):
    said = []
    for line in process.stderr:
        said.append(line)
        if " ready " in line:
            return said
    return said


def ended(process):
    process.kill()
    process.wait()


def killed_at_birth(_net, place):
    data, secrets, broken = place / "data", set(), []
    for _ in range(FIRST_STARTS):
        process = start(data)
        # The first start takes some ten milliseconds: anywhere in there.
        time.sleep(random.uniform(0, 0.04))
        ended(process)
        secret = data / "secret"
        if secret.exists():
            secrets.add(secret.read_bytes())
        broken += [name for name in ("secret", "key.pem", "cert.pem") if (data / name).exists() and not (data / name).stat().st_size]
    yield not broken and len(secrets) <= 1, f"{FIRST_STARTS} times in its first milliseconds: one secret, and no half of a file"
    process = start(data)
    yield any(" ready " in line for line in until_ready(process)), "then it starts"
    ended(process)
    left = sorted(file.name for file in data.iterdir())
    yield left == ["cert.pem", "key.pem", "secret"], f"in the data directory: {left}"


@contextlib.contextmanager
def small_disk(place, *options):
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", ",".join(["size=64k", *options]), "tmpfs", str(place))
    try:
        yield place
    finally:
        run("umount", "-l", str(place))


def fill(place):
    with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4_096))


def full(_net, place):
    with small_disk(place / "disk") as disk:
        fill(disk)
        process = start(disk / "data")
        said, code = process.stderr.read().splitlines(), process.wait()
        yield code == 1 and "No space left on device" in said[-1], f"a first start ends with {code}: {said[-1:]}"
        yield not (disk / "data/secret").exists(), "and leaves no half of a secret"
        (disk / "filler").unlink()
        process = start(disk / "data")
        until_ready(process)
        fill(disk)
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()
        yield "reloaded" in line and process.poll() is None, "one that runs goes on when its disk is full"
        ended(process)
        process = start(disk / "data")
        yield any(" ready " in line for line in until_ready(process)), "and starts again on it"
        ended(process)


def read_only(_net, place):
    with small_disk(place / "disk") as disk:
        process = start(disk / "data")
        until_ready(process)
        ended(process)
        for name in "cert.pem", "key.pem":
            (disk / "data" / name).unlink()
        run("mount", "-o", "remount,ro", str(disk))
        process = start(disk / "data")
        said = until_ready(process)
        warned = [line for line in said if " WARN " in line and "in memory alone" in line]
        yield len(warned) == 1 and " ready " in said[-1], f"with its secret it starts, and says what it cannot do: {warned}"
        ended(process)
        process = start(disk / "nothing")
        said, code = process.stderr.read().splitlines(), process.wait()
        yield code == 1 and "Read-only file system" in said[-1], f"without one it ends with {code}: {said[-1:]}"


def another_time(net, place):
    clock = place / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    with Appliance(net, place, settings=settings(SECRET), environment=environment) as appliance:
        for name, shown in ("+3600", "forward"), ("+0", "back"), ("-3600", "back"):
            before = said_of_clock(appliance, shown)
            clients = load(net.public, SECRET, "pair", 9)
            settled(appliance.metrics, lambda numbers: numbers["halfway_relay_ports{state=\"live\"}"] > 0)
            clock.write_text(name)
            warned = settled(lambda: said_of_clock(appliance, shown), lambda count: count > before)
            yield warned == before + 1, f"set {shown} by an hour, it says so, once"
            loss = found(clients)["lossPercent"]
            yield loss == 0, f"and allocations that live lose {loss} % of their packets"
            expired = appliance.metrics()["halfway_allocations_ended_total{reason=\"expired\"}"]
            yield expired == 0, "none has ended before its time"
        clock.write_text("+0")
        answer = net.public.run(
            "curl", "-sS", "--cacert", appliance.ca, "-H", f"Authorization: Bearer {appliance.token('a')}", f"{appliance.url}/v1/ice"
        )
        yield "iceServers" in answer, "and hands out credentials as before"


def said_of_clock(appliance, way):
    return appliance.log_file.read_text().count(f"the clock of the wall was set {way} by 1h")


if __name__ == "__main__":
    assert os.geteuid() == 0, "it mounts small disks"
    sys.exit(main())
