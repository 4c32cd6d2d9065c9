"""The example agents, each started in a site as a user would start it, and what it reported in the end."""

import functools
import http.server
import json
import os
import queue
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse

from appliance import ROOT
from net import PUBLIC, run

EXAMPLES = ROOT / "examples"
PYTHON = ROOT / "target/lab/venv/bin/python"
# Of a pair the earlier one offers. libjuice comes last: when it offers, it waits two seconds for its direct path to fail
# before it nominates the relayed one, and aiortc and werift wait for that (docs/protocol.md).
KINDS = {
    "chromium": None,
    "firefox": None,
    "werift": ["node", EXAMPLES / "werift/agent.mjs"],
    "aiortc": [PYTHON, EXAMPLES / "python/agent.py"],
    "node-datachannel": ["node", EXAMPLES / "node-datachannel/agent.mjs"],
}
MESH = ["node", EXAMPLES / "mesh/agent.mjs"]
# Those that send candidates as they find them.
TRICKLES = {"node-datachannel", "werift", "chromium", "firefox"}


class Agent:
    """One running agent."""

    def __init__(self, kind, site, appliance, name, directory, browser_flags=(), **options):
        self.kind, self.name = kind, name
        options = {"token": appliance.token(name), **options}
        if kind in BROWSERS:
            command, environment = BROWSERS[kind](appliance, directory, options, browser_flags)
        else:
            flags = [part for key, value in options.items() for part in flag(key, value)]
            command = [*KINDS.get(kind, MESH), appliance.url, "--ca", appliance.ca, *flags]
            # `--ca` is for HTTPS; for `turns:` these libraries ask the system, which these variables speak for.
            environment = {**os.environ, "NODE_EXTRA_CA_CERTS": str(appliance.ca), "SSL_CERT_FILE": str(appliance.ca)}
        self.log = open(directory / f"{name}.log", "w+")
        self.process = subprocess.Popen(
            site.command(*command), stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        if kind in BROWSERS:
            # A browser whose console nobody reads stops in the middle of a word.
            self.lines = queue.SimpleQueue()
            threading.Thread(target=self.read_console, daemon=True).start()

    def read_console(self):
        for line in self.process.stdout:
            self.log.write(line)
            self.lines.put(line)
        self.lines.put(None)

    def console(self, found, timeout):
        """What `found` first finds in a line of the browser's console."""
        until = time.monotonic() + timeout
        try:
            while (line := self.lines.get(timeout=max(0, until - time.monotonic()))) is not None:
                if result := found(line):
                    return result
        except queue.Empty:
            pass
        raise ValueError("the page did not say what it was waited for")

    def result(self, timeout):
        """The last line it printed, once it has ended; a browser ends when it has printed it."""
        try:
            if self.kind in BROWSERS:
                return json.loads(self.console(reported, timeout))
            output, _ = self.process.communicate(timeout=timeout)
            assert self.process.returncode == 0, f"{self.name} ({self.kind}) failed: {output}\n{self.tail()}"
            return json.loads(output.strip().splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError) as problem:
            raise AssertionError(f"{self.name} ({self.kind}) gave no result: {problem}\n{self.tail()}") from None
        finally:
            self.stop()

    def stop(self):
        self.process.kill()
        self.process.wait()

    def tail(self):
        self.log.seek(0)
        return "".join(self.log.readlines()[-30:])


def all_results(agents, timeout):
    """What each reported; if one did not, what is known of all that did not: one may wait in vain for another that is gone."""
    results, problems = [], []
    for each in agents:
        try:
            results.append(each.result(timeout))
        except AssertionError as problem:
            problems.append(str(problem))
    assert not problems, "\n".join(problems)
    return results


def reported(line):
    """The result in a line of a browser's console, if it is there. Chromium prints the text, Firefox a string of JSON."""
    if found := re.search(r'CONSOLE[^"]*"RESULT (\{.*\})"', line):
        return found[1]
    if found := re.search(r'console\.log: ("RESULT .*")', line):
        return json.loads(found[1]).removeprefix("RESULT ")
    return None


def flag(key, value):
    """`relay_only=True` is `--relay-only`."""
    name = "--" + key.replace("_", "-")
    return [] if value in (None, False) else [name] if value is True else [name, str(value)]


def chromium(appliance, directory, options, flags):
    """A browser with a home of its own, whose only addition is our authority among the trusted ones."""
    home = directory / f"home-{options['token'][-8:]}"
    trust(appliance, home / ".pki/nssdb")
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--no-first-run", f"--user-data-dir={home}/profile",
        "--enable-logging=stderr", *flags, page(appliance, options),
    ]  # fmt: skip
    return console(command, home)


def firefox(appliance, directory, options, flags):
    """The other one. It prints the page's console because the profile says so."""
    home = directory / f"home-{options['token'][-8:]}"
    profile = home / "profile"
    trust(appliance, profile)
    (profile / "user.js").write_text("".join(f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in PREFERENCES))
    command = ["firefox-esr", "--headless", "--no-remote", "--profile", profile, *flags, page(appliance, options)]
    return console(command, home)


BROWSERS = {"chromium": chromium, "firefox": firefox}
# The console on stdout, and no look-ups of its own in a network that has nothing to find.
PREFERENCES = [
    ("devtools.console.stdout.content", True),
    ("app.update.enabled", False),
    ("browser.aboutwelcome.enabled", False),
    ("browser.shell.checkDefaultBrowser", False),
    ("datareporting.policy.dataSubmissionEnabled", False),
    ("network.captive-portal-service.enabled", False),
    ("network.connectivity-service.enabled", False),
    ("services.settings.server", "data:,"),
    ("toolkit.telemetry.enabled", False),
]


def trust(appliance, database):
    """Our authority in a certificate database of its own."""
    database.mkdir(parents=True)
    run("certutil", "-d", f"sql:{database}", "-N", "--empty-password")
    run("certutil", "-d", f"sql:{database}", "-A", "-n", "lab", "-t", "C,,", "-i", str(appliance.ca))


def page(appliance, options):
    options = {key: value for key, value in options.items() if value not in (None, False)}
    return f"{appliance.pages}/{options.pop('page', 'index.html')}#{urllib.parse.urlencode({'url': appliance.url, **options})}"


def console(command, home):
    """Part of the console goes to stderr; here it is read like the others' stdout."""
    return ["sh", "-c", 'exec "$@" 2>&1', "sh", *command], {**os.environ, "HOME": str(home)}


class Pages:
    """Serves an example of pages over HTTPS: run as `python agents.py EXAMPLE CERT KEY PORT ADDRESS…`."""

    def __init__(self, appliance, namespace=None, addresses=(PUBLIC[4],), example="browser"):
        certs, port = appliance.certs, urllib.parse.urlsplit(appliance.pages).port or 443
        serve = "python3", __file__, example, certs / "cert.pem", certs / "key.pem", port, *addresses
        command = (namespace or appliance.namespace).command(*serve)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def serve_pages(example, certificate, key, port, *addresses):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=EXAMPLES / example)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    for address in addresses:
        server = (SixServer if ":" in address else http.server.ThreadingHTTPServer)((address, int(port)), handler)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever).start()
    print("ready", flush=True)


class SixServer(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


if __name__ == "__main__":
    serve_pages(*sys.argv[1:])
