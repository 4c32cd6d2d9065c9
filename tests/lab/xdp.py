"""The kernel's path: agents notice nothing, the kernel relays nearly everything, and it ends with its process.

Halfway hangs on a router by one link, clients and peers in sites beyond it.
"""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

from appliance import ROOT, Appliance, packets_by_kernel, relayed_packets
from cables import OneLink, receive, stretch
from checks import settled, tell
from load import found, load
from net import PUBLIC
from uclient import Peer, lost

SECRET = "the secret of the kernel's path"
COMING = 2_000_000
MODES = "driver", "generic"


def settings(mode, listen=""):
    return f"""
handshakes_per_second_per_address = 0
[turn]
xdp = "{mode}"
allow_peers = ["10.70.0.0/16", "fd70::/16"]
allocations_per_agent = 0
unauthenticated_per_second = 0
{listen}
[credentials]
secrets = ["{SECRET}"]
"""


def main():
    parts = relays, comes_and_goes, ends_with_its_process, is_not_alone, follows_interfaces, without_rights
    return tell(itertools.chain.from_iterable(in_modes(part) for part in parts))


def in_modes(part):
    for mode in MODES if part in (relays, comes_and_goes) else MODES[:1]:
        with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch, OneLink() as net:
            for ok, line in part(net, pathlib.Path(scratch), mode):
                yield ok, f"{mode}: {line}"


def halfway(net, scratch, mode, *flags, **options):
    scratch = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    return Appliance(net, scratch, *flags, settings=settings(mode, options.pop("listen", "")), **options)


def program(net):
    """The id of the program on Halfway's link, and its mode."""
    (link,) = json.loads(net.public.ip("-j", "-d", "link", "show", net.uplink))
    on_it = link.get("xdp", {})
    return on_it.get("prog", {}).get("id"), {1: "driver", 2: "generic"}.get(on_it.get("mode"))


def attached(net, wanted=True):
    return bool(settled(lambda: program(net)[0], lambda number: bool(number) == wanted)) == wanted


def relays(net, scratch, mode):
    """Another implementation's client, in both families and between clients; and every number is as without it."""
    client, peers = net.sites
    with halfway(net, scratch, mode) as appliance, Peer(peers, peers.address, peers.address6):
        yield attached(net) and program(net)[1] == mode, f"the program is on {net.uplink}: {program(net)}"
        for family, (peer, flags) in itertools.product((4, 6), ((peers.address, []), (peers.address6, ["-x"]))):
            gone = lost(client, appliance, f"{family} {peer}", "-c", *flags, "-e", peer, PUBLIC[family], messages=200)
            yield gone == "0", f"turnutils_uclient by IPv{family} to {peer}: {gone} lost"
        gone = lost(client, appliance, "each other", "-c", "-y", PUBLIC[4], messages=200)
        yield gone == "0", f"turnutils_uclient, to each other: {gone} lost"
        before = appliance.metrics()
        loads = {way: found(start(net, client, way)) for way in ("to-peer", "to-client", "pair", "ping")}
        for way, outcome in loads.items():
            yield not outcome.get("lossPercent", outcome.get("lost")), f"{way}: {outcome}"
        after = appliance.metrics()
        relayed, by_kernel = (count(after) - count(before) for count in (relayed_packets, packets_by_kernel))
        yield by_kernel > 0.97 * relayed, f"the kernel relayed {by_kernel / relayed:.1%} of {relayed:.0f} packets"
        log = settled(lambda: appliance.log_file.read_text(), lambda log: log.count("allocation ended") > 50)
        told = sum(int(part.split("=")[1]) for part in log.split() if part.startswith("packets_to_"))
        yield told == relayed_packets(after), f"the log's lines of allocations add up: {told} of {relayed_packets(after):.0f}"
        yield True, f"left to user space: {passes(after) or 'nothing'}"


def start(net, site, way, seconds=3, **options):
    options = {"rate": 20_000, **options}
    return load(site, SECRET, way, seconds, peer=site.address, **options)


def passes(numbers):
    kinds = {name: value for name, value in numbers.items() if "xdp_passed" in name and value}
    return {name.split('"')[1]: int(value) for name, value in kinds.items()}


def comes_and_goes(net, scratch, mode):
    """Two million packets, while allocations, channels and permissions come and go."""
    here, there = net.sites
    with halfway(net, scratch, mode) as appliance:
        peers = subprocess.Popen(
            there.command("python3", ROOT / "tests/lab/comers.py", "peers", there.address),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        ports = peers.stdout.readline().strip()
        arguments = "clients", PUBLIC[4], SECRET, there.address, ports, COMING // len(MODES)
        done = subprocess.run(
            here.command("python3", ROOT / "tests/lab/comers.py", *arguments), capture_output=True, text=True, check=False
        )
        output, _ = peers.communicate("enough\n")
        numbers = appliance.metrics()
        if done.returncode:
            return (yield False, f"the clients: {done.stderr[-600:]}")
        clients, seen = json.loads(done.stdout), json.loads(output)
        yield clients["sent"] >= COMING // len(MODES), f"clients: {clients}"
        yield clients["left and came"] > 500, f"{clients['left and came']} allocations gone and made anew"
        back = clients["came back"] / (clients["sent"] - clients["left behind"])
        yield back > 0.998, f"{back:.4%} of the packets came back"
        for who, books in ("clients", clients), ("peers", seen):
            wrong = {what: books.get(what, 0) for what in ("corrupted", "for another", "too late")}
            yield not any(wrong.values()), f"{who}: {wrong} of {books.get('packets', books.get('came back'))}"
        share = packets_by_kernel(numbers) / relayed_packets(numbers)
        yield share > 0.97, f"the kernel relayed {share:.1%}; left to user space: {passes(numbers)}"


def ends_with_its_process(net, scratch, mode):
    """Killed under load; and another version takes over under load."""
    client, _ = net.sites
    with halfway(net, scratch, mode) as appliance:
        running = start(net, client, "to-peer", 4)
        yield settled(lambda: packets_by_kernel(appliance.metrics()), lambda count: count > 1_000) > 1_000, "under load"
        appliance.process.kill()
        appliance.process.wait()
        yield attached(net, wanted=False), "killed: no program is left on the link"
        sent = interface_sent(net)
        running.communicate()
        still = interface_sent(net) - sent
        yield still < 20_000, f"and nothing is relayed: {still} packets left (the kernel says that nobody is there)"
        yield no_maps(), "no map of it is left"
    with halfway(net, scratch, mode) as appliance:
        outcome = found(start(net, client, "pair", 2))
        count = packets_by_kernel(appliance.metrics())
        yield outcome["lossPercent"] == 0 and count > 10_000, f"started again: {count:.0f} packets by the kernel"
        running = start(net, client, "pair", 8, rate=4_000)
        before = settled(lambda: packets_by_kernel(appliance.metrics()), lambda seen: seen > count + 1_000)
        yield before > count + 1_000, "under load again"
        (one, _) = program(net)
        appliance.process.send_signal(signal.SIGUSR2)
        taken = settled(lambda: program(net)[0], lambda now: now and now != one)
        yield taken not in (None, one), f"an upgrade: program {one} gives way to {taken}"
        outcome = found(start(net, client, "to-peer", 2))
        count = packets_by_kernel(appliance.metrics())
        yield outcome["lossPercent"] == 0 and count > 10_000, f"the next process has it: {count:.0f} packets"
        outcome = found(running)
        yield outcome["lossPercent"] < 0.1, f"allocations of the process before: {outcome['lossPercent']} % lost"
        yield appliance.process.wait(timeout=60) == 0, "which has ended"
        yield program(net)[0] == taken, "one program is on the link"


def interface_sent(net):
    (link,) = json.loads(net.public.ip("-j", "-s", "link", "show", net.uplink))
    return link["stats64"]["tx"]["packets"]


def no_maps():
    """Of dead processes; the kernel takes its time."""
    look = lambda: [each for each in json.loads(subprocess.check_output(["bpftool", "-j", "map"])) if each.get("name") == "flows"]  # noqa: E731
    return not settled(look, lambda maps: not maps)


def is_not_alone(net, scratch, mode):
    """A second Halfway beside it, and a program of somebody else: user space relays, and says so once."""
    client, _ = net.sites
    others = 'listen = ["[::]:3479"]\nrelay_ports = "40000-41000"\n'
    admin = '[admin]\nlisten = ["127.0.0.1:9479"]\n'
    with halfway(net, scratch, mode) as one:
        number = attached(net) and program(net)[0]
        with halfway(net, scratch, mode, listen=others + admin, url=f"https://{PUBLIC[4]}:8445") as two:
            outcome = found(start(net, client, "pair", 2, uri=f"turn:{PUBLIC[4]}:3479"))
            yield outcome["lossPercent"] == 0, f"the second of two relays: {outcome['lossPercent']} % lost"
            yield program(net)[0] == number, "the first one keeps its program"
            outcome = found(start(net, client, "pair", 2))
            yield outcome["lossPercent"] == 0 and packets_by_kernel(one.metrics()) > 10_000, "and relays by it"
            said = (two.said + two.log_file.read_text()).count("another program is there")
            yield said == 1, f"the second says so: {said} time"
            one.process.terminate()
            taken = settled(lambda: program(net)[0], lambda now: now not in (None, number))
            yield taken not in (None, number), "when the first has gone, the second takes the link"
    path = pathlib.Path("/sys/fs/bpf") if pathlib.Path("/sys/fs/bpf").is_mount() else None
    yield path is None or not any(path.iterdir()), "nothing is pinned"
    net.public.ip("link", "set", net.uplink, "xdp", "obj", str(ROOT / "xdp/relay.o"), "sec", "xdp")
    foreign = program(net)[0]
    with halfway(net, scratch, "auto") as appliance:
        outcome = found(start(net, client, "pair", 2))
        numbers = appliance.metrics()
        yield outcome["lossPercent"] == 0 and not packets_by_kernel(numbers), "somebody else's program: user space relays"
        yield program(net)[0] == foreign, "it is left alone"
        net.public.ip("link", "set", net.uplink, "xdp", "off")
        yield settled(lambda: program(net)[0], lambda now: now not in (None, foreign)) is not None, "and gone, ours is there"


def follows_interfaces(net, scratch, mode):
    client, _ = net.sites
    with halfway(net, scratch, mode) as appliance:
        yield attached(net), "the program is there"
        for what in "down", "up":
            net.public.ip("link", "set", net.uplink, what)
        net.public.route("default", "10.70.0.1")
        found(start(net, client, "pair", 1))
        before = packets_by_kernel(appliance.metrics())
        yield before > 5_000, f"down and up: {before:.0f} packets by the kernel"
        net.public.ip("link", "del", net.uplink)
        net.link(net.core, net.public, 0)
        net.core.route(PUBLIC[4], "10.70.0.2")
        stretch(net)
        receive(net.core, f"{net.id}o0")
        yield attached(net), "gone and made anew: the program is there"
        found(start(net, client, "pair", 1))
        yield packets_by_kernel(appliance.metrics()) > before + 5_000, "and relays"


def without_rights(net, scratch, mode):
    """What the documented drop-in grants is enough; without it user space relays."""
    client, _ = net.sites
    for granted in ["+net_bind_service,+bpf,+perfmon,+net_admin"], ["+net_bind_service"]:
        caps = ",".join(["-all", *granted])
        within = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}", "--"]
        with halfway(net, scratch, mode, within=within) as appliance:
            outcome = found(start(net, client, "pair", 2))
            count = packets_by_kernel(appliance.metrics())
            has, log = "bpf" in caps, appliance.said + appliance.log_file.read_text()
            yield outcome["lossPercent"] == 0 and (count > 10_000) == has, f"{caps}: {count:.0f} packets by the kernel"
            yield log.count("needs the capabilities") == (not has), f"{caps}: it says {'nothing' if has else 'so'}"


if __name__ == "__main__":
    sys.exit(main())
