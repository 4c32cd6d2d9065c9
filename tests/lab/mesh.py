"""Five agents of one room, each in a namespace of its own, connect each to each through the relay alone."""

import pathlib
import sys
import tempfile

from agents import Agent, all_results
from appliance import Appliance
from net import Net

AGENTS, BULK = 5, 1 << 20
PATIENCE = 60


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-mesh-") as scratch, Net() as net:
        directory = pathlib.Path(scratch)
        sites = [net.site(number) for number in range(1, AGENTS + 1)]
        with Appliance(net, directory) as appliance:
            options = {"agents": AGENTS, "bulk": BULK, "relay_only": True}
            agents = [Agent("mesh", site, appliance, f"m{n}", directory, **options) for n, site in enumerate(sites)]
            try:
                for agent, result in zip(agents, all_results(agents, PATIENCE)):
                    check(agent, result)
            finally:
                for agent in agents:
                    agent.stop()
            # Each agent's bulk for each of the others: in from one client, out to another.
            relayed, payload = appliance.relayed(), AGENTS * (AGENTS - 1) * BULK
            assert relayed >= 2 * payload, f"only {relayed:.0f} bytes were relayed"
    print(f"ok   {AGENTS} agents, each with each: {payload >> 20} MiB, {relayed / 1e6:.0f} MB through the relay")
    print("1 passed, 0 failed")
    return 0


def check(agent, result):
    assert result["links"] == AGENTS - 1, f"{agent.name} has {result['links']} links\n{agent.tail()}"
    assert result["bulk_ok"], f"{agent.name}: bulk data was changed on the way"
    assert result["samples"] > 0, f"{agent.name}: not one sample arrived"
    print(f"ok   {agent.name}: {result}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
