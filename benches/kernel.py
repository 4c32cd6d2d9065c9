"""The kernel's path beside user space, and beside coturn: what a relayed packet costs the machine as a whole.

Each server runs on the first core, the load (`halfway bench turn`) on the second, in namespaces of their own with a link
between them on which a program can send (tests/lab/cables.py); so it is for all servers. What the load's own packets cost,
from one socket to another without a relay (`--run direct`), is measured beside it and taken off. Medians over rounds, in which
the servers alternate.

Run as root: python3 benches/kernel.py [--rounds N] [--coturn PATH] [--time 3s] [--write]
  --coturn  a turnserver of a newer release than Debian's: as shipped, and in its best mode
  --write   puts the table into docs/performance.md
"""

import argparse
import contextlib
import functools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import relay
from relay import BEST, DEBIAN, NEWEST, OURS, PAIR_RATE, RATE, Appliance, Net, Server, on
from appliance import packets_by_kernel, relayed_packets
from cables import receive, stretch

KERNEL, GENERIC = "halfway, driver mode", "halfway, generic mode"
BESIDE = "round trip, beside 50,000 packets a second"


class Linked(Net):
    """Sites whose links take what a program sends."""

    def site(self, number):
        site = super().site(number)
        stretch(self)
        receive(site, f"{self.id}i{number}")
        # Where a host would have its uplink, which is where the program goes.
        self.public.route("default", site.address)
        return site


@contextlib.contextmanager
def halfway(name, mode):
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Linked() as net:
        site = net.site(1)
        settings = relay.settings(1).replace("[turn]", f'[turn]\nxdp = "{mode}"')
        with on([0]), Appliance(net, pathlib.Path(scratch), settings=settings) as appliance:
            yield Server(name, appliance.process.pid, site), appliance


def servers(newest):
    for name, mode in ((KERNEL, "driver"), (GENERIC, "generic"), (OURS, "off")):
        yield name, functools.partial(halfway, name, mode)
    if not newest:
        yield DEBIAN, functools.partial(coturn, DEBIAN, "turnserver")
    else:
        yield NEWEST, functools.partial(coturn, NEWEST, newest)
        yield BEST, functools.partial(coturn, BEST, newest, "--multiplex-peer", "--udp-gso")


@contextlib.contextmanager
def coturn(*arguments):
    with relay.coturn(*arguments, network=Linked) as server:
        yield server, None


def loads():
    """Name, how it is asked for, and how its packets are sent without a relay."""
    for size, clients in (160, 16), (160, 256), (1_200, 16):
        what = ["--size", size, "--clients", clients]
        for way, rate in (("to-peer", RATE), ("to-client", RATE), ("pair", PAIR_RATE)):
            yield f"{way}, {size} bytes, {clients} clients", ["--run", way, "--rate", rate, *what], ["--rate", rate, *what]
    yield "as many as it can, 160 bytes", ["--run", "to-peer", "--size", 160], None
    yield "round trip, idle", ["--run", "ping", "--clients", 1], None
    yield BESIDE, ["--run", "ping", "--clients", 1], None


def measure(options):
    found = {}
    for number in range(options.rounds):
        for name, start in servers(options.coturn):
            for what, load, direct in loads():
                if options.only and options.only not in what:
                    continue
                with start() as (server, appliance), beside(server, what == BESIDE):
                    figures = attempt(server, load, direct, options)
                    if appliance and "failed" not in figures:
                        figures["byKernel"] = by_kernel(appliance.metrics())
                found.setdefault(what, {}).setdefault(name, []).append(figures)
                print(f"round {number + 1}: {what}: {name}: {told(figures)}", flush=True)
    return found


@contextlib.contextmanager
def beside(server, wanted):
    """Others relay, too, for as long as the `with` lasts."""
    if not wanted:
        return (yield)
    command = server.site.command(
        relay.BINARY, "bench", "turn", f"turn:{relay.PUBLIC[4]}:3478", "--secret", relay.SECRET, "--run", "to-peer",
        "--rate", 50_000, "--time", "60s", "--clients", 64, "--json",
    )  # fmt: skip
    others = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=relay.on_core(1))
    try:
        # Until all of them have their channels, which nothing tells.
        time.sleep(2)
        yield
    finally:
        others.kill()
        others.wait()


def attempt(server, load, direct, options):
    try:
        (figures,) = relay.load(server, *load, "--time", options.time).values()
        if direct:
            (alone,) = relay.load(server, "--run", "direct", *direct, "--time", options.time).values()
            if not figures["machineUsPerPacket"]:
                return {"failed": f"nothing arrived: {figures}"}
            figures["beyond"] = figures["machineUsPerPacket"] - alone["machineUsPerPacket"]
        return figures
    except RuntimeError as error:
        return {"failed": str(error)}


def by_kernel(numbers):
    return 100 * packets_by_kernel(numbers) / max(1, relayed_packets(numbers))


def told(figures):
    if "failed" in figures:
        return figures["failed"][-160:]
    names = "beyond", "serverUsPerPacket", "lossPercent", "deliveredPerSecond", "offeredPerSecond", "p50Us", "p99Us", "byKernel"
    return ", ".join(f"{name} {figures[name]:.2f}" for name in names if figures.get(name) is not None)


# What a row shows, of which figure, and its unit.
FIGURES = {
    "as many": [("deliveredPerSecond", "delivered", "/s"), ("lossPercent", "lost", "%")],
    "round": [("p50Us", "p50", "µs"), ("p99Us", "p99", "µs")],
    "": [("beyond", "the machine", "µs"), ("serverUsPerPacket", "the server", "µs"), ("lossPercent", "lost", "%")],
}


def table(found):
    names = [name for name in (KERNEL, GENERIC, OURS, DEBIAN, NEWEST, BEST) if any(name in row for row in found.values())]
    yield "| | | " + " | ".join(names) + f" | {KERNEL} / best of coturn's |"
    yield "|---|---|" + "---:|" * (len(names) + 1)
    for what, row in found.items():
        for figure, meaning, unit in next(of for start, of in FIGURES.items() if what.startswith(start)):
            medians = {name: median(row.get(name, []), figure) for name in names}
            cells = [f"{value:,.2f} {unit}" if value is not None else "–" for value in medians.values()]
            yield f"| {what} | {meaning} | " + " | ".join(cells) + f" | {ratio(medians, figure)} |"


def ratio(medians, figure):
    theirs = [medians[name] for name in (DEBIAN, NEWEST, BEST) if medians.get(name)]
    ours = medians.get(KERNEL)
    if not theirs or ours is None or figure == "lossPercent":
        return ""
    return f"{ours / (max(theirs) if figure == 'deliveredPerSecond' else min(theirs)):.2f}"


def median(figures, figure):
    values = [of_run[figure] for of_run in figures if of_run.get(figure) is not None]
    return statistics.median(values) if values else None


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--coturn")
    options.add_argument("--time", default="3s")
    options.add_argument("--only", default="")
    options.add_argument("--write", action="store_true")
    options = options.parse_args()
    text = "\n".join(table(measure(options)))
    print(text)
    if options.write:
        relay.write("kernel", text, options)


if __name__ == "__main__":
    main()
