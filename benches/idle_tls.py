"""Resident memory of a relay client on TLS that holds an allocation and says nothing, and of one without an allocation.

Run as root from anywhere: python3 benches/idle_tls.py [CLIENTS]
"""

import json
import pathlib
import resource
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/lab"))

import stun
from appliance import HTTPS, Appliance
from net import PUBLIC, Net

SECRET = "the secret of the benchmark"
SETTINGS = f"""
connections_per_address = 0
handshakes_per_second_per_address = 0
[turn]
allocations_per_agent = 0
unauthenticated_per_second = 0
[credentials]
secrets = ["{SECRET}"]
"""


def main(clients):
    with tempfile.TemporaryDirectory(prefix="halfway-bench-") as scratch, Net() as net:
        for what in "with an allocation", "without":
            directory = pathlib.Path(scratch) / what.replace(" ", "-")
            directory.mkdir()
            with Appliance(net, directory, settings=SETTINGS) as appliance:
                # The first hundred pay for what all share.
                report = [net.public.run("python3", __file__, "hold", what, appliance.ca, count, appliance.process.pid) for count in (100, clients)]
                few, many = (json.loads(text) for text in report)
                each = (many["during"] - many["before"]) / clients
                print(f"{clients} idle TLS clients {what}: {each:.1f} KiB each (a hundred first: {few['during']} KiB in all)")


def hold(what, ca, count, pid):
    """Holds so many clients, and reports the server's memory before and during."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before, clients = resident(pid), []
    for number in range(int(count)):
        clients.append(stun.Client((PUBLIC[4], HTTPS), SECRET, f"agent-{number}", "tls", ca))
        if what == "without":
            clients[-1].ask(stun.BINDING, sign=False)
        else:
            clients[-1].allocate()
    print(json.dumps({"before": before, "during": resident(pid)}))


def resident(pid):
    """In KiB."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["hold", what, ca, count, pid]:
            hold(what, ca, count, pid)
        case [clients]:
            main(int(clients))
        case _:
            main(2_000)
