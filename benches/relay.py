"""Relayed packets: what they cost Halfway, and what they cost coturn, side by side and in turns.

Each server runs on the first core with one shard or relay thread, the load (`halfway bench turn`) on the second, in
namespaces of their own with a veth pair between them. A round measures each row with each server once; the table holds
medians, and ratios of medians. Figures are kept in target/, so that rows may be measured on different days.

Run as root: python3 benches/relay.py [--rounds N] [--coturn PATH] [--only ROW,...] [--time 3s] [--write]
  --coturn  a turnserver of a newer release than Debian's: as shipped, and in its best mode
  --write   puts the table into docs/performance.md
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

import stun
from appliance import BINARY, Appliance
from net import PUBLIC, Net, run

SECRET = "the secret of the benchmark"
KEPT = ROOT / "target/relay-bench.json"
PAGE = ROOT / "docs/performance.md"
SITES = "10.0.0.0/8"
# A rate that every server here carries; a pair costs coturn twice as much.
RATE, PAIR_RATE = 100_000, 50_000
OURS, DEBIAN, NEWEST, BEST = "halfway", "coturn of Debian", "coturn", "coturn, best mode"


def settings(shards):
    return f"""
[turn]
shards = {shards}
allocations_per_agent = 0
unauthenticated_per_second = 0
allow_peers = ["{SITES}"]
[credentials]
secrets = ["{SECRET}"]
"""


class Row:
    """One line of the table: a load, the figure that counts, and what it should be beside coturn's."""

    def __init__(self, name, figure, bars, *load, more=False, unit="µs"):
        self.name, self.figure, self.bars, self.load, self.more, self.unit = name, figure, bars, load, more, unit


def load(server, *arguments):
    """What a load measured, by run."""
    command = server.site.command(
        BINARY, "bench", "turn", f"turn:{PUBLIC[4]}:3478", "--secret", SECRET, "--pid", server.pid, "--json", *arguments
    )
    before = kernel_share(server.pid)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=on_core(1))
    if done.returncode:
        raise RuntimeError(f"{server.name}: {' '.join(map(str, arguments))}: {done.stderr.strip()[-300:]}")
    figures = json.loads(done.stdout)
    for of_run in figures.values():
        of_run["kernelPercent"] = kernel_percent(before, kernel_share(server.pid))
    return figures


def rows():
    idle = ["--run", "idle", "--clients", 2_000]
    yield Row("idle allocation with a channel, memory", "residentKibEach", [0.5, 0.5], *idle, unit="KiB")
    yield Row("setting up an allocation with a channel, CPU", "serverUsPerSetUp", [0.67, 0.67], *idle)
    one_way = [0.35, 0.75]
    for size, clients in itertools.product((160, 1200), (16, 256)):
        what = ["--size", size, "--clients", clients, "--rate", RATE]
        for name, direction in (("client→peer", "to-peer"), ("peer→client", "to-client")):
            label = f"{name}, {size} bytes, {clients} clients"
            yield Row(label, "serverUsPerPacket", one_way, "--run", direction, *what)
            trains = ["--run", direction, "--gso", "--burst", 32, *what]
            yield Row(f"{label}, senders use GSO", "serverUsPerPacket", [0.15, 0.4], *trains)
            if clients == 256:
                alternate = ["--run", direction, "--burst", 1, *what]
                yield Row(f"{label}, one by one", "serverUsPerPacket", [0.6, 1.0], *alternate)
        pair = ["--run", "pair", "--size", size, "--clients", clients, "--rate", PAIR_RATE]
        yield Row(f"pair, {size} bytes, {clients} clients", "serverUsPerPacket", [0.25, 0.15], *pair)
        most = ["--run", "to-peer", "--size", size, "--clients", clients]
        label = f"as many as it can, {size} bytes, {clients} clients"
        yield Row(label, "deliveredPerSecond", [1.7, 1.1], *most, more=True, unit="/s")
        trains = ["--gso", "--burst", 32, *most]
        yield Row(f"{label}, senders use GSO", "deliveredPerSecond", [1.7, 1.1], *trains, more=True, unit="/s")
    ping = ["--run", "ping", "--clients", 1]
    yield Row("round trip, idle, p50", "p50Us", [0.9, 1.0], *ping)
    yield Row("round trip, idle, p99", "p99Us", [0.9, 1.0], *ping)


class Server:
    """One that runs, and the site that its load comes from."""

    def __init__(self, name, pid, site):
        self.name, self.pid, self.site = name, pid, site


@contextlib.contextmanager
def halfway(shards=1):
    cores = range(shards)
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        site = net.site(1)
        with on(cores), Appliance(net, pathlib.Path(scratch), settings=settings(shards)) as appliance:
            yield Server(OURS, appliance.process.pid, site)


@contextlib.contextmanager
def coturn(name, path, *flags, network=Net):
    """With the same users; without TLS, which nobody uses here."""
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, network() as net:
        site, scratch = net.site(1), pathlib.Path(scratch)
        command = net.public.command(
            path, "-n", "--listening-ip", PUBLIC[4], "--relay-ip", PUBLIC[4], "--realm", stun.REALM, "-m", 1,
            "--use-auth-secret", "--static-auth-secret", SECRET, "--no-tls", "--no-dtls", "--no-cli", "--simple-log",
            "--log-file", scratch / "log", "--pidfile", scratch / "pid", *flags,
        )  # fmt: skip
        silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with on([0]):
            process = subprocess.Popen(command, **silence)
        try:
            answers(site)
            yield Server(name, process.pid, site)
        finally:
            process.kill()
            process.wait()


def answers(site):
    """Comes back when something answers a Binding; each try waits for its answer."""
    for _ in range(100):
        if subprocess.run(site.command("python3", __file__, "binding"), check=False, stderr=subprocess.DEVNULL).returncode == 0:
            return
    raise RuntimeError("coturn does not answer")


def binding():
    client = stun.Client((PUBLIC[4], 3478), SECRET, "nobody", patience=0.2)
    try:
        client.ask(stun.BINDING, sign=False)
    except OSError:
        sys.exit(1)


@contextlib.contextmanager
def on(cores):
    """What is started meanwhile runs there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    yield
    os.sched_setaffinity(0, before)


def on_core(core):
    return lambda: os.sched_setaffinity(0, {core})


def kernel_share(pid):
    """Ticks in user space and in the kernel."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]), int(fields[12])


def kernel_percent(before, after):
    user, kernel = (now - then for now, then in zip(after, before))
    return 100 * kernel / max(1, user + kernel)


def starters(newest):
    yield OURS, halfway
    yield DEBIAN, lambda: coturn(DEBIAN, "turnserver")
    if newest:
        yield NEWEST, lambda: coturn(NEWEST, newest)
        yield BEST, lambda: coturn(BEST, newest, "--multiplex-peer", "--udp-gso")


def measure(options, wanted):
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in wanted:
        kept[name] = {}
    for number in range(options.rounds):
        for name, start in starters(options.coturn):
            # Some rows are two figures of one load.
            measured = {}
            for row in wanted.values():
                if row.load not in measured:
                    # A server of its own for each: coturn keeps what clients have released for a while.
                    with start() as server:
                        measured[row.load] = attempt(row, server, options)
                figures = measured[row.load]
                kept[row.name].setdefault(name, []).append(figures)
                print(f"round {number + 1}: {name}: {row.name}: {told(row, figures)}", flush=True)
    KEPT.write_text(json.dumps(kept, indent=1))
    return kept


def attempt(row, server, options):
    try:
        (figures,) = load(server, *row.load, "--time", options.time).values()
        return figures
    except RuntimeError as error:
        return {"failed": str(error)}


def told(row, figures):
    if "failed" in figures:
        return figures["failed"]
    limited = ", the load was the limit" if figures.get("generatorLimited") else ""
    loss = f", {figures['lossPercent']:.2f} % lost" if figures.get("lossPercent", 0) > 0.01 else ""
    return f"{figures[row.figure]:.2f} {row.unit}{loss}{limited}, {figures['kernelPercent']:.0f} % in the kernel"


def loss(options):
    """Where coturn starts to lose 5 %, and what we lose there, three times."""
    lines = []
    for name, start in list(starters(options.coturn))[1:]:
        for rate in itertools.count(60_000, 20_000):
            with start() as server:
                theirs = load(server, "--run", "to-peer", "--rate", rate, "--time", options.time)["to-peer"]
            if theirs["lossPercent"] >= 5 or theirs["generatorLimited"]:
                break
        ours = [lost(rate, options) for _ in range(3)]
        limited = " (the load was the limit)" if theirs["generatorLimited"] else ""
        lines.append(
            f"- {name} loses {theirs['lossPercent']:.1f} % of {rate:,} packets a second{limited}; "
            f"ours, three times: {', '.join(f'{percent:.2f} %' for percent in ours)}."
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def lost(rate, options):
    with halfway() as server:
        return load(server, "--run", "to-peer", "--rate", rate, "--time", options.time)["to-peer"]["lossPercent"]


def scale(options):
    """From 1 to 10,000 allocations, and from one shard to two."""
    lines = ["| allocations | set up, µs of CPU each | KiB each | µs of CPU a packet |", "|---:|---:|---:|---:|"]
    for clients in (1, 100, 1_000, 10_000):
        with halfway() as server:
            idle = load(server, "--run", "idle", "--clients", clients, "--time", "1s")["idle"]
        with halfway() as server:
            what = ["--run", "to-peer", "--clients", clients, "--rate", RATE, "--time", options.time]
            packets = load(server, *what)["to-peer"]
        costs = f"{idle['serverUsPerSetUp']:.0f} | {idle['residentKibEach']:.2f} | {packets['serverUsPerPacket']:.2f}"
        lines.append(f"| {clients:,} | {costs} |")
        print(lines[-1], flush=True)
    for shards in (1, 2):
        with halfway(shards) as server:
            figures = load(server, "--run", "to-peer", "--rate", RATE, "--time", options.time)["to-peer"]
        lines.append(f"\n{shards} shard{'s' * (shards > 1)}: {figures['serverUsPerPacket']:.2f} µs a packet at {RATE:,} a second.")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def table(kept):
    names = [name for name in (OURS, DEBIAN, NEWEST, BEST) if any(name in row for row in kept.values())]
    shipped = NEWEST if NEWEST in names else DEBIAN
    head = ["", OURS, "in the kernel", *names[1:], f"ours / {shipped}", "bar"]
    head += [f"ours / {BEST}", "bar"] if BEST in names else []
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows():
        if row.name in kept:
            lines.append(line(row, kept[row.name], names, shipped))
    return "\n".join(lines)


def line(row, of_row, names, shipped):
    medians = {name: median(row, of_row.get(name, [])) for name in names}
    cells = [row.name, *(cell(row, medians[name], of_row.get(name, [])) for name in names)]
    cells.insert(2, f"{statistics.median(of_run.get('kernelPercent', 0) for of_run in of_row[OURS]):.0f} %")
    for other, bar in zip([shipped, BEST], row.bars):
        if other in names:
            ours, theirs = medians[OURS], medians[other]
            void = is_limited(of_row.get(other, [])) or (is_limited(of_row[OURS]) and not row.more)
            ratio = "–" if void or None in (ours, theirs) or not theirs else f"{ours / theirs:.2f}"
            ratio = f"≥ {ratio}" if ratio != "–" and is_limited(of_row[OURS]) else ratio
            cells += [ratio, f"{'≥' if row.more else '≤'} {bar}"]
    return "| " + " | ".join(cells) + " |"


def median(row, figures):
    values = [of_run[row.figure] for of_run in figures if row.figure in of_run]
    return statistics.median(values) if values else None


def is_limited(figures):
    return any(of_run.get("generatorLimited") for of_run in figures)


def cell(row, value, figures):
    if value is None:
        return "fails"
    limited = is_limited(figures)
    lost = statistics.median(of_run.get("lossPercent", 0) for of_run in figures)
    text = f"{value:,.0f}" if row.unit == "/s" else f"{value:.2f}"
    marks = ("≥ " if row.more else "void: ") if limited else ""
    return f"{marks}{text} {row.unit}" + (f" ({lost:.1f} % lost)" if lost > 0.01 and not row.more else "")


def write(part, text, options):
    """Between the two marks of that part of the page."""
    machine = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    versions = [run(path, "--version").strip() for path in ("turnserver", options.coturn) if path]
    about = (
        f"{datetime.date.today()}, {machine}, {os.cpu_count()} cores, Linux {platform.release()}; coturn {' and '.join(versions)}; "
        f"medians of {options.rounds} rounds, {options.time} each."
    )
    page = PAGE.read_text()
    start, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    before, rest = page.split(start)
    _, after = rest.split(end)
    PAGE.write_text(f"{before}{start}\n{about}\n\n{text}\n{end}{after}")


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--coturn")
    options.add_argument("--only", default="")
    options.add_argument("--time", default="3s")
    options.add_argument("--write", action="store_true")
    options = options.parse_args()
    words = options.only.split(",") if options.only else [""]
    wanted = {row.name: row for row in rows() if any(word in row.name for word in words)}
    started = time.monotonic()
    kept = measure(options, wanted)
    texts = {"table": lambda: table(kept), "loss": lambda: loss(options), "scale": lambda: scale(options)}
    for part, text in texts.items():
        if part == "table" or "" in words or part in words:
            written = text()
            if options.write:
                write(part, written, options)
    print(f"\n{table(kept)}\n\nin {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:] == ["binding"]:
        binding()
    else:
        main()
