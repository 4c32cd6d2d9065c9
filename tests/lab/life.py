"""A call that lasts, whatever happens to its path: nothing that was said is lost, repeated or out of order.

Two browsers talk, relayed, both behind NATs, one of which forgets in 30 s. Meanwhile their links lose 5 %; Halfway ends and
starts anew; one agent finds itself in another network; and one sleeps for longer than its NAT remembers.
Usage: life.py [--long] [EVENT …]: all of it takes about three minutes, or seven.
"""

import signal
import subprocess
import sys
import time

from agents import all_results
from checks import tell
from kinds import FORGETS, KINDS
from nat import Lab, agent
from net import be_root, run

PAIR = KINDS["forgetful"], KINDS["symmetric"]
# Where one of them finds itself in the end.
ELSEWHERE = KINDS["port-restricted"]
# Of packets, and seconds by which some come later than others.
LOSS, JITTER = 0.05, 0.02
# Seconds that pass quietly after each thing that happens.
SHORT, LONG = 12, 60
# What it is given to come back from a thing: 8 s until silence is noticed, some to find another path.
BACK = 25
ASLEEP = FORGETS + 8


def main(arguments):
    quiet = LONG if "--long" in arguments else SHORT
    events = [name for name in arguments if name in EVENTS] or list(EVENTS)
    with Lab([PAIR, (ELSEWHERE, ELSEWHERE)]) as lab:
        return tell(life(lab, quiet, events))


def life(lab, quiet, events):
    yield from lab.verified()
    places, directory = lab.places(PAIR), lab.scratch / "life"
    directory.mkdir()
    seconds = quiet + sum(quiet + EVENTS[name][1] for name in events)
    options = {"page": "lasting.html", "seconds": seconds}
    called = agent("chromium", places[1], lab.appliance, "called", directory, **options)
    caller = agent("chromium", places[0], lab.appliance, "caller", directory, to="called", **options)
    try:
        yield bool(caller.console(lambda line: "OPEN" in line, BACK)), "the channel is open"
        time.sleep(quiet)
        for name in events:
            event = EVENTS[name][0](lab, places, caller)
            yield True, next(event)
            time.sleep(quiet)
            next(event, None)
        told = all_results((caller, called), seconds + 60)
    finally:
        for each in caller, called:
            each.stop()
    for name, one, other in ("caller", *told), ("called", *told[::-1]):
        yield one["received"] == one["announced"] == other["sent"], f"{name}: {one['received']} of {other['sent']} came"
        yield one["in_order"], f"{name}: once and in order"
        longest = f"{name}: the longest silence {one['silence_ms'] / 1_000:.1f} s"
        yield one["silence_ms"] / 1_000 < ASLEEP + BACK, longest
        yield True, f"{name}: ICE started again {one['restarts']} times; sessions resumed: {one['resumed']}"
        if "anew" in events:
            yield False in one["resumed"], f"{name}: after the new start, a new session"


def lossy(lab, places, caller):
    for site, _ in places:
        lab.net.quality(site.number, loss=LOSS, jitter=JITTER)
    yield f"both links lose {LOSS:.0%}, and hold packets up for {JITTER * 1_000:.0f} ms now and then"
    for site, _ in places:
        lab.net.quality(site.number, loss=0.0, jitter=0.0)


def starts_anew(lab, places, caller):
    started = time.monotonic()
    ended = lab.appliance.starts_anew()
    yield f"Halfway was told to end and did so with {ended}; it is back after {time.monotonic() - started:.1f} s"


def moves(lab, places, caller):
    """An agent's cable is pulled, and put into another router."""
    (_, namespace), router = places[1], lab.sites[ELSEWHERE.name][0]
    network = f"192.168.{router.number + 50}"
    namespace.ip("link", "del", "eth0")
    router.router.serves("lan9", namespace, "eth0", (f"{network}.1/24", f"{network}.2/24"))
    yield f"one agent is in another network, behind {ELSEWHERE.what}"


def sleeps(lab, places, caller):
    """Every process of the browser."""
    family = subprocess.run(["ps", "-o", "pid=", "--ppid", str(caller.process.pid)], capture_output=True, text=True)
    everybody = [caller.process.pid, *map(int, family.stdout.split())]
    for parent in everybody:
        below = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout.split()
        everybody += [int(child) for child in below if int(child) not in everybody]
    for process in everybody:
        run("kill", f"-{signal.SIGSTOP}", str(process))
    time.sleep(ASLEEP)
    for process in everybody:
        run("kill", f"-{signal.SIGCONT}", str(process))
    yield f"one agent slept for {ASLEEP} s, its NAT forgot it after {FORGETS}"


# And the seconds that each takes, beside the quiet ones after it.
EVENTS = {"loss": (lossy, 0), "anew": (starts_anew, 35), "moves": (moves, BACK), "sleeps": (sleeps, ASLEEP + BACK)}

if __name__ == "__main__":
    be_root()
    sys.exit(main(sys.argv[1:]))
