"""The lab is a good guest: runs side by side do not disturb each other, a killed one leaves nothing, and nobody needs root.

What stands behind NAT64 and the proxy wants devices and servers that root has; here it is a meeting of two plain NATs.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

from checks import settled, tell
from net import run

MEETING = [sys.executable, pathlib.Path(__file__).with_name("nat.py"), "--agents", "werift", "port-restricted+symmetric"]
# As whoever runs this, but in a user namespace where that is nobody special.
UNPRIVILEGED = "unshare", "--user", "--map-user=1000", "--map-group=1000"


def main():
    return tell(visits())


def visits():
    both = [started(), started()]
    yield all(finished(process) for process in both), "two runs side by side"
    yield finished(started(*UNPRIVILEGED)), "a run of somebody who is not root"
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch:
        yield from killed_in_the_middle(scratch)


def killed_in_the_middle(scratch):
    killed = started(scratch=scratch)
    # Its first line comes when everything is up.
    killed.stdout.readline()
    there = namespaces(killed)
    running = processes(there)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    yield bool(there and running), f"a run of {len(there)} namespaces and {len(running)} processes is killed"
    left = settled(lambda: [*namespaces(killed), *filter(alive, running), *os.listdir(scratch)], lambda left: not left)
    yield not left, f"left of it: {left or 'nothing'}"


def started(*room, scratch=None):
    environment = {**os.environ, **({"TMPDIR": scratch} if scratch else {})}
    return subprocess.Popen([*room, *MEETING], stdout=subprocess.PIPE, text=True, env=environment)


def finished(process):
    output, _ = process.communicate(timeout=120)
    if process.returncode:
        print(output, flush=True)
    return not process.returncode


def namespaces(process):
    """Those of a run that is root's."""
    return [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.startswith(f"hw{process.pid}-")]


def processes(names):
    return [process for name in names for process in run("ip", "netns", "pids", name).split()]


def alive(process):
    """Whether it runs; one that has ended may wait there for somebody to ask how."""
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    return not re.search(r"^State:\s+Z", status, re.M)


if __name__ == "__main__":
    sys.exit(main())
