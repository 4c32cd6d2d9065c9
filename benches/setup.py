"""What setting up an allocation with a permission and a channel costs a server: Halfway and coturn, in one run.

Each round, each server in turn gets so many new clients on UDP, one after the other; counted is the processor time of the
server alone, while they come. Run as root from anywhere: python3 benches/setup.py [ROUNDS]
"""

import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/lab"))

import stun
from appliance import Appliance
from net import PUBLIC, Net

SECRET = "the secret of the benchmark"
CLIENTS = 2_000
SETTINGS = f"""
[turn]
allocations_per_agent = 0
unauthenticated_per_second = 0
[credentials]
secrets = ["{SECRET}"]
"""


def main(rounds):
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        servers = {"halfway": halfway, "coturn": coturn}
        costs = {name: [] for name in servers}
        # The first round warms up what both machines keep between rounds, and is not counted.
        for number in range(rounds + 1):
            for name, start in servers.items():
                directory = pathlib.Path(scratch) / f"{name}-{number}"
                directory.mkdir()
                with start(net, directory) as pid:
                    spent = measure(net, pid)
                if number:
                    costs[name].append(spent)
                    print(f"round {number}: {name} {spent:.1f} µs a client", flush=True)
    medians = {name: statistics.median(values) for name, values in costs.items()}
    print(f"median of {rounds}: halfway {medians['halfway']:.1f} µs, coturn {medians['coturn']:.1f} µs, "
          f"ratio {medians['halfway'] / medians['coturn']:.2f}")  # fmt: skip


@contextlib.contextmanager
def halfway(net, directory):
    with Appliance(net, directory, settings=SETTINGS) as appliance:
        yield appliance.process.pid


@contextlib.contextmanager
def coturn(net, directory):
    """As Debian ships it, with the same users; without TLS, which nobody uses here."""
    log = directory / "log"
    command = net.public.command(
        "turnserver", "-n", "--listening-ip", PUBLIC[4], "--relay-ip", PUBLIC[4], "--realm", stun.REALM,
        "--use-auth-secret", "--static-auth-secret", SECRET, "--no-tls", "--no-dtls", "--no-cli",
        "--log-file", log, "--pidfile", directory / "pid", "--simple-log",
    )  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        answers(net)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def answers(net):
    """Comes back when something answers a Binding; each try waits for its answer."""
    for _ in range(100):
        done = subprocess.run(net.public.command("python3", __file__, "binding"), check=False)
        if done.returncode == 0:
            return
    raise RuntimeError("coturn does not answer")


def measure(net, pid):
    """Microseconds of the server's processor time for each client."""
    before = processor_time(pid)
    net.public.run("python3", __file__, "clients")
    return (processor_time(pid) - before) / CLIENTS * 1e6


def processor_time(pid):
    """Seconds in user space and in the kernel, of all threads."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# What runs in the namespace.


def set_up():
    """All stay until the end, when the sockets are gone and the server is stopped."""
    clients = []
    for number in range(CLIENTS):
        client = stun.Client((PUBLIC[4], 3478), SECRET, f"agent-{number}")
        client.allocate()
        client.permit(("8.8.8.8", 1))
        client.bind(0x4000, ("8.8.8.8", 1))
        clients.append(client)


def binding():
    client = stun.Client((PUBLIC[4], 3478), SECRET, "nobody", patience=0.2)
    try:
        client.ask(stun.BINDING, sign=False)
    except OSError:
        sys.exit(1)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["clients"]:
            set_up()
        case ["binding"]:
            binding()
        case [rounds]:
            main(int(rounds))
        case _:
            main(5)
