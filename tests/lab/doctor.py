"""`halfway doctor` in a site of each kind: it names the kind, and says what gets through.

It stands there as an agent would, with one server at one address; the site's probes, with two, have said what is true.
"""

import contextlib
import json
import subprocess
import sys

from appliance import BINARY
from checks import settled, tell
from kinds import KINDS
from nat import Lab
from net import be_root

# By the kind of site: what the doctor calls it, in the family that the site has; and the ways to the relay.
NAMES = {
    "none": "none",
    "full-cone": "fullCone",
    "address-restricted": "addressRestricted",
    "port-restricted": "portRestricted",
    "symmetric": "symmetric",
    "carrier-grade": "portRestricted",
    "forgetful": "portRestricted",
    "no-udp": "udpBlocked",
    "only-443": "udpBlocked",
    "proxy": "udpBlocked",
    "ipv6": "firewall",
    "nat64": "nat64",
    "one-lan": "portRestricted",
    "hairpin": "portRestricted",
    "no-hairpin": "portRestricted",
}
CHECKS = {"udp": ["turn-udp", "turn-tcp", "turn-tls"], "tcp": ["turn-tcp", "turn-tls"], "tls": ["turn-tls"], "proxy": ["turn-tls"]}
BLOCKED = {"udp": "relayed over UDP", "tcp": "relayed over TCP", "tls": "relayed over TLS", "proxy": "relayed over TLS"}
SECONDS = 10


def main(wanted):
    with Lab([(KINDS[name], KINDS[name]) for name in wanted or KINDS]) as lab:
        return tell(visits(lab))


def visits(lab):
    yield from lab.verified()
    yield from stranger(lab)
    for name, sites in lab.sites.items():
        yield from visit(lab, name, sites[0])


def visit(lab, name, site):
    told = examined(lab, site)
    family = "ipv6" if 4 not in site.kind.families else "ipv4"
    nat = told["nat"][family] or {}
    yield nat.get("kind") == NAMES[name], f"{name}: {nat.get('kind')}: {nat.get('why')}"
    outcomes = {check["name"]: check["outcome"] for check in told["checks"]}
    through = {check.removesuffix("-ipv6") for check in outcomes if check.startswith("turn-") and outcomes[check] == "ok"}
    yield through == set(CHECKS[site.kind.way]), f"{name}: gets through: {', '.join(sorted(through))}"
    yield told["ok"], f"{name}: {outcomes}"
    yield told["seconds"] < SECONDS, f"{name}: {told['seconds']} s"
    if site.kind.way == "udp" and name != "nat64":
        expected = site.kind.mapping.replace("endpoint-independent", "endpointIndependent")
        expected = expected.replace("address-and-port-dependent", "addressAndPortDependent")
        yield nat.get("mapping") == expected, f"{name}: {nat.get('mapping')} mapping"
        if site.kind.nat:
            yield nat.get("hairpin") == site.kind.hairpin, f"{name}: hairpin: {nat.get('hairpin')}"
        yield nat.get("carrierGrade") == (name == "carrier-grade"), f"{name}: carrier-grade: {nat.get('carrierGrade')}"
    paths = {path["peer"]: path["path"] for path in told["paths"]}
    yield paths["udpBlocked"] == BLOCKED[site.kind.way], f"{name}: {paths}"
    left = settled(lab.appliance.allocations, lambda left: not left)
    yield not left, f"{name}: allocations left: {left:.0f}"


def stranger(lab):
    """Whom nobody vouches for gets no token."""
    site = next(iter(lab.sites.values()))[0]
    told = examined(lab, site, trusts=False)
    failed = [check["detail"] for check in told["checks"] if check["name"] == "certificate" and check["outcome"] == "fail"]
    yield not told["ok"] and len(failed) == 1 and "not sent" in failed[0], f"without the authority: {failed}"
    yield not any(check["name"] == "ice" for check in told["checks"]), "and nothing more is asked of it"


def examined(lab, site, trusts=True):
    token = lab.appliance.token(f"doctor-{site.number}")
    command = [BINARY, "doctor", lab.appliance.url, "--token", token, "--json"]
    command += ["--ca", lab.appliance.ca] if trusts else []
    command += ["--proxy", f"http://{site.proxy}"] if site.proxy else []
    done = subprocess.run(site.agents[0].command(*command), capture_output=True, text=True, timeout=30)
    with contextlib.suppress(ValueError):
        return json.loads(done.stdout)
    raise AssertionError(f"{site.kind.name}: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    be_root()
    sys.exit(main(sys.argv[1:]))
