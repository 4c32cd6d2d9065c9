"""A clean Debian of its own, with its real systemd as the first process: in namespaces, over a tree that is made once."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time

from appliance import ROOT
from net import PUBLIC, run

TREE = ROOT / "target/lab/debian"
PACKAGES = "systemd,systemd-sysv,dbus,ca-certificates,curl,iproute2,procps"

# The tree becomes the root; the rest is what a kernel and a first ramdisk would have done.
BOOT = """
mount --make-rprivate /
mount -t overlay overlay -o "$1" "$2"
cd "$2"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mknod -m 666 dev/null c 1 3; mknod -m 666 dev/zero c 1 5; mknod -m 666 dev/full c 1 7
mknod -m 666 dev/random c 1 8; mknod -m 666 dev/urandom c 1 9; mknod -m 666 dev/tty c 5 0
ln -s /proc/self/fd dev/fd; ln -s fd/0 dev/stdin; ln -s fd/1 dev/stdout; ln -s fd/2 dev/stderr
hostname machine
ip link set lo up
ip link add outside type veth peer name peer
ip addr add "$3/24" dev outside
ip link set outside up; ip link set peer up
ip route add default dev outside
mkdir -p old
pivot_root . old
umount -l /old
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
"""


def tree():
    """The bare tree, from the mirror that this system uses itself."""
    if TREE.exists():
        return TREE
    which = ["Origin: Debian", "Label: Debian", "Codename: bookworm", "Created-By: Packages"]
    mirror = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *which).split()[0]
    draft = TREE.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(draft), mirror)
    draft.rename(TREE)
    return TREE


class Machine:
    """One that runs. What is written in it goes with it, and so does every process."""

    def __init__(self, scratch):
        self.scratch = pathlib.Path(scratch)
        self.console = self.scratch / "console"

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            for name in "root", "upper", "work":
                (self.scratch / name).mkdir(parents=True)
            layers = f"lowerdir={tree()},upperdir={self.scratch}/upper,workdir={self.scratch}/work"
            for left in hierarchy().glob("halfway-lab-*"):
                removed(left, patience=0)
            self.cgroup = hierarchy() / f"halfway-lab-{os.getpid()}-{self.scratch.name}"
            self.cgroup.mkdir()
            undo.callback(removed, self.cgroup)
            command = [
                "setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child", "--fork", "--pid", "--mount", "--net",
                "--uts", "--ipc", "--cgroup", "bash", "-ec", BOOT, "bash", layers, str(self.scratch / "root"), PUBLIC[4],
            ]  # fmt: skip
            with open(self.console, "w") as console:
                self.process = subprocess.Popen(
                    command, preexec_fn=self.join, stdin=subprocess.DEVNULL, stdout=console, stderr=console
                )
            undo.callback(self.end)
            self.first = self.first_process()
            # As it is in there; from here it is not to be seen, and it goes with the last process.
            self.root = pathlib.Path(f"/proc/{self.first}/root")
            self.wait_for_boot()
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *what):
        return self.undo.__exit__(*what)

    def join(self):
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))

    def end(self):
        self.process.kill()
        self.process.wait()

    def first_process(self):
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for child in children.read_text().split():
                if pathlib.Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return child
            time.sleep(0.05)
        raise AssertionError(f"systemd did not start: {self.console.read_text()}")

    def wait_for_boot(self):
        until = time.monotonic() + 60
        state = None
        while time.monotonic() < until:
            state = self.tries("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                break
            time.sleep(0.2)
        assert state == "running", f"{state}: {self.tries('systemctl', '--failed').stdout}"

    def command(self, *command):
        """The command line that runs `command` in here."""
        return ["nsenter", "-t", self.first, "--all", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *map(str, command)]

    def run(self, *command):
        return run(*self.command(*command))

    def tries(self, *command):
        """The same, whatever comes of it."""
        return subprocess.run(self.command(*command), capture_output=True, text=True)

    def write(self, path, text):
        (self.root / path[1:]).write_text(text)

    def shell(self, script):
        return self.run("sh", "-ec", script)

    def show(self, *properties, unit="halfway"):
        """What systemd says of the unit."""
        shown = self.run("systemctl", "show", unit, "-p", ",".join(properties)).splitlines()
        values = dict(line.split("=", 1) for line in shown)
        return [values[name] for name in properties]

    def journal(self):
        return self.run("journalctl", "-u", "halfway", "-o", "cat", "--no-pager")


def hierarchy():
    """Where this system has its cgroups of version 2."""
    mounts = [line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    places = [place for _, place, kind, *_ in mounts if kind == "cgroup2"]
    assert places, "this system has no cgroups of version 2"
    return pathlib.Path(places[0])


def removed(cgroup, patience=10):
    """Deepest first, unless somebody lives there; what was in them has been killed, and takes a moment to be gone."""
    until = time.monotonic() + patience
    while cgroup.exists():
        for directory in sorted(cgroup.rglob("*"), reverse=True):
            if directory.is_dir():
                with contextlib.suppress(OSError):
                    directory.rmdir()
        try:
            cgroup.rmdir()
        except OSError:
            if time.monotonic() >= until:
                return
            time.sleep(0.1)
