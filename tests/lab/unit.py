"""The unit under a real systemd: installed as docs/operating.md says, and as a Debian package; watched over, reloaded, upgraded."""

import json
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading

from appliance import BINARY, ROOT
from checks import settled, tell
from load import found, load, settings
from machine import Machine
from net import PUBLIC, run

# In the machine: a checkout, but for what is not needed to install.
SOURCE = "/src"
CONFIG = "/etc/halfway/halfway.toml"
CERTS = "/etc/halfway/certs"
CARGO_DEB = ROOT / "target/lab/cargo/bin/cargo-deb"
SECRET = "the secret of the unit's test"
SETTINGS = f'public_ips = ["{PUBLIC[4]}"]\n[http]{settings(SECRET)}'


def main():
    with tempfile.TemporaryDirectory(prefix="halfway-lab-") as scratch:
        return tell(check(pathlib.Path(scratch)))


def check(scratch):
    with Machine(scratch / "by-hand") as machine:
        bring(machine)
        yield from installed_by_hand(machine)
        yield from reloaded(machine)
        yield from in_the_kernel(machine)
        yield from watched_over(machine)
        yield from upgraded(machine)
        yield from activated(machine)
    with Machine(scratch / "package") as machine:
        yield from packaged(machine, scratch)


def bring(machine):
    """The checkout, with what `cargo build --release` makes, for there is no Cargo in there."""
    source = machine.root / SOURCE[1:]
    for part in "systemd", "docs", "certs":
        shutil.copytree(ROOT / part, source / part)
    (source / "target/release").mkdir(parents=True)
    shutil.copy(BINARY, source / "target/release/halfway")


def documented(heading, index=0):
    """The commands of a section of docs/operating.md."""
    page = (ROOT / "docs/operating.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.findall(r"```sh\n(.*?)```", section, re.S)[index]
    return [line for line in block.splitlines() if not line.startswith("cargo ")]


def installed_by_hand(machine):
    said = machine.shell("\n".join([f"cd {SOURCE}", *documented("Install")]))
    token = said.strip().splitlines()[-1]
    yield token.count(".") == 2, "the install section, followed to the letter, ends with a token"
    yield from in_service(machine)
    doctor = machine.tries("halfway", "doctor", "https://127.0.0.1", "--token", token, "--json")
    checks = {check["name"]: check["outcome"] for check in json.loads(doctor.stdout)["checks"]}
    failed = [name for name, outcome in checks.items() if outcome == "fail"]
    yield doctor.returncode == 0 and not failed, f"the doctor finds {checks}"
    process, = machine.show("MainPID")
    status = machine.run("cat", f"/proc/{process}/status")
    of = dict(re.findall(r"^(\w+):\s*(.*)$", status, re.M))
    yield of["Uid"].split()[0] != "0" and of["CapEff"] == of["CapBnd"] == f"{1 << 10:016x}", "no root, one capability"
    yield (of["NoNewPrivs"], of["Seccomp"]) == ("1", "2"), "no new privileges, and few system calls"
    modes = machine.shell("cd /var/lib/halfway; stat -c '%n %U %a' . *").split("\n")
    yield modes[:-1] == [". halfway 700", "cert.pem halfway 600", "key.pem halfway 600", "secret halfway 600"], f"{modes[:-1]}"
    soft, hard = machine.run("grep", "open files", f"/proc/{process}/limits").split()[3:5]
    yield soft == hard and f"{soft} descriptors" in machine.journal(), f"{soft} descriptors, all that it may have, as it says"
    unit = "/etc/systemd/system/halfway.service"
    wrong = machine.tries("systemd-analyze", "verify", unit, f"{SOURCE}/systemd/activation/halfway.socket")
    yield wrong.returncode == 0 and not wrong.stderr, f"systemd-analyze verify: {wrong.stderr or 'nothing to say'}"
    exposed = machine.tries("systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", unit)
    yield exposed.returncode == 0, exposed.stdout.strip().splitlines()[-1]


def in_service(machine):
    state = machine.show("ActiveState", "SubState", "NRestarts", "Type")
    yield state == ["active", "running", "0", "notify"], f"it is {' '.join(state[:2])} as soon as systemctl returns"
    yield machine.run("curl", "-sSk", "https://localhost/healthz") == "ok\n", "and serves"


def reloaded(machine):
    process = machine.show("MainPID")
    machine.write(CONFIG, SETTINGS)
    machine.run("systemctl", "reload", "halfway")
    yield "the configuration is reloaded" in machine.journal(), "systemctl reload returns when it is done"
    machine.write(CONFIG, "no_such_key = 1\n")
    machine.run("systemctl", "reload", "halfway")
    yield "nothing has changed" in machine.journal() and machine.show("MainPID") == process, "a bad file changes nothing"
    machine.write(CONFIG, SETTINGS)
    yield machine.tries("curl", "-sS", "http://127.0.0.1:9478/readyz").stdout == "ready\n", "and it is ready"
    bring_certificate(machine)
    machine.write(CONFIG, SETTINGS.replace("[http]", f'[http]\ncert = "{CERTS}/cert.pem"\nkey = "{CERTS}/key.pem"'))
    machine.run("systemctl", "reload", "halfway")
    trusted = machine.tries("curl", "-sS", "--cacert", f"{CERTS}/ca.pem", "https://127.0.0.1/healthz")
    yield trusted.stdout == "ok\n", "a certificate whose key the group halfway may read is presented after a reload"
    machine.write(CONFIG, SETTINGS)
    machine.run("systemctl", "reload", "halfway")


def bring_certificate(machine):
    """By an authority of its own; the key is root's, and readable by the group."""
    with tempfile.TemporaryDirectory() as made:
        run("bash", str(ROOT / "certs/make-ca.sh"), f"{made}/new", "127.0.0.1")
        shutil.copytree(f"{made}/new", f"{machine.root}{CERTS}")
    machine.shell(f"chmod 755 {CERTS}; chmod 644 {CERTS}/c*.pem; chown root:halfway {CERTS}/key.pem; chmod 640 {CERTS}/key.pem")


def in_the_kernel(machine):
    """`turn.xdp` with the rights of the drop-in, and without them."""
    drop_in = "/etc/systemd/system/halfway.service.d/xdp.conf"
    machine.write(CONFIG, SETTINGS.replace("[turn]", '[turn]\nxdp = "auto"'))
    for granted in False, True:
        if granted:
            machine.shell(f"install -D -m 644 {SOURCE}/systemd/xdp.conf {drop_in} && systemctl daemon-reload")
        machine.run("systemctl", "restart", "halfway")
        page = machine.run("curl", "-sS", "http://127.0.0.1:9478/metrics")
        attached = sum(float(value) for value in re.findall(r"^halfway_xdp_interfaces\{.*\} (\S+)$", page, re.M))
        said = "needs the capabilities" in machine.journal()
        yield attached == granted and said, f"{'with' if granted else 'without'} the drop-in, {attached:.0f} interfaces have the program"
    machine.write(CONFIG, SETTINGS)
    machine.shell(f"rm {drop_in} && systemctl daemon-reload && systemctl restart halfway")


def watched_over(machine):
    override = "/run/systemd/system/halfway.service.d"
    machine.run("mkdir", "-p", override)
    machine.write(f"{override}/watchdog.conf", "[Service]\nWatchdogSec=2\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "halfway")
    before = machine.show("MainPID", "NRestarts")
    machine.run("kill", "-STOP", before[0])
    after = settled(lambda: machine.show("MainPID", "NRestarts", "ActiveState"), lambda now: now[1] != before[1] and now[2] == "active")
    yield after[1:] == ["1", "active"] and after[0] != before[0], "stopped dead, it is killed by the watchdog and starts anew"
    yield "Watchdog timeout" in machine.journal(), "and systemd says why"
    machine.run("rm", "-r", override)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "halfway")
    yield from in_service(machine)


def upgraded(machine):
    sending = clients(machine, seconds=8)
    settled(lambda: relayed(machine), lambda packets: packets > 1_000)
    before, = machine.show("MainPID")
    for command in documented("Signals"):
        machine.shell(command)
    after = settled(lambda: machine.show("MainPID", "ActiveState"), lambda now: now[0] != before)
    yield after[0] != before and after[1] == "active", f"another process is the service: {before} → {after[0]}"
    outcome = found(sending)
    yield outcome["lossPercent"] == 0, f"two packets a millisecond between clients all the while: {outcome['lossPercent']} % lost"
    gone = settled(lambda: machine.tries("test", "-d", f"/proc/{before}").returncode, bool)
    yield gone and machine.show("ActiveState", "NRestarts", "MainPID") == ["active", "0", after[0]], "the old one has ended, the service goes on"
    yield f"process {after[0]} takes over" in machine.journal(), "as its log says"
    yield from in_service(machine)


def activated(machine):
    machine.shell("\n".join([f"cd {SOURCE}", *documented("Install", 1)]))
    yield machine.show("ActiveState") == ["inactive"], "with its ports held by systemd, the service is not there yet"
    yield machine.run("curl", "-sSk", "https://localhost/healthz") == "ok\n", "it comes with the first who knocks"
    process, = machine.show("MainPID")
    sockets = machine.run("ss", "-Hlunp", "sport = :3478").splitlines()
    yield len(sockets) == 2 and all(f"pid={process}" in line for line in sockets), "it reads both UDP sockets of the unit"
    outcome = found(clients(machine, seconds=2))
    yield outcome["lossPercent"] == 0, f"and relays: {outcome['deliveredPerSecond']:.0f} packets a second"
    answers, over = [], threading.Event()
    knocking = threading.Thread(target=knock, args=(machine, answers, over))
    knocking.start()
    for _ in range(3):
        machine.run("systemctl", "restart", "halfway")
    over.set()
    knocking.join()
    yield len(answers) >= 3 and set(answers) == {"ok\n"}, f"{len(answers)} connections during three restarts, none refused"
    machine.run("systemctl", "stop", "halfway.socket", "halfway.service")


def knock(machine, answers, over):
    while not over.is_set():
        answers.append(machine.tries("curl", "-sSk", "--max-time", "20", "https://localhost/healthz").stdout)


def packaged(machine, scratch):
    package = scratch / "halfway.deb"
    run(str(CARGO_DEB), "--no-build", "--no-strip", "--quiet", "--output", str(package), cwd=ROOT)
    shutil.copy(package, machine.root / "halfway.deb")
    machine.run("dpkg", "--install", "/halfway.deb")
    yield from in_service(machine)
    yield machine.show("UnitFileState") == ["enabled"], "the package enables and starts the service"
    secret = machine.run("sha256sum", "/var/lib/halfway/secret")
    machine.run("dpkg", "--install", "/halfway.deb")
    yield machine.run("sha256sum", "/var/lib/halfway/secret") == secret, "installed again it has the same secret"
    yield from in_service(machine)
    machine.run("dpkg", "--remove", "halfway")
    kept = machine.tries("ls", "/var/lib/halfway/secret", CONFIG)
    yield kept.returncode == 0 and machine.tries("pidof", "halfway").returncode == 1, "removed it is gone, but for secret and configuration"
    machine.run("dpkg", "--purge", "halfway")
    yield machine.tries("ls", "/var/lib/halfway").returncode != 0, "purged, those too"


def clients(machine, seconds):
    return load(machine, SECRET, "pair", seconds, binary="halfway")


def relayed(machine):
    page = machine.run("curl", "-sS", "http://127.0.0.1:9478/metrics")
    return sum(float(value) for value in re.findall(r"^halfway_relayed_packets\S* (\S+)$", page, re.M))


if __name__ == "__main__":
    # A test that is told to end removes what it made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
