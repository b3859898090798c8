"""Compares the CPU time of two builds of castier, round by round in turn, so that a machine whose speed changes treats both alike. See scripts/bench."""

import argparse
import hashlib
import http.client
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time

TICKS = os.sysconf("SC_CLK_TCK")
# The server under test has this core for itself; clients and the origin share the other.
SERVER, OTHER = ["taskset", "-c", "0"], ["taskset", "-c", "1"]
FILL = 512 << 20


class Version:
    """One build, running in front of the common origin."""

    def __init__(self, name, build, port, origin, directory):
        self.name, self.port = name, port
        settings = {"LISTEN__PUBLIC": f"127.0.0.1:{port}", "LISTEN__ADMIN": f"127.0.0.1:{port + 1}", "ORIGIN__URL": origin, "LOG__LEVEL": "warn",
                    "MEMORY__MAX_BLOB": "1MiB", "DISK__PATH": f"{directory}/{name}", "DISK__CAPACITY": "4GiB"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CASTIER_")}
        environment |= {f"CASTIER_{key}": value for key, value in settings.items()}
        self.process = subprocess.Popen([*SERVER, f"{build}/castier"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def request(self, method, path, body=None, port=None):
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=60)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("cache-status") or ""

    def cpu(self):
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def hits(self, path, header, length):
        """Microseconds of CPU for each answer to wrk."""
        before = self.cpu()
        command = [*OTHER, "wrk", "-t1", "-c64", f"-d{length}s", *header, f"http://127.0.0.1:{self.port}{path}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if "Non-2xx" in said or "Socket errors" in said:
            raise SystemExit(f"versions: wrong answers from {self.name}: {said}")
        return (self.cpu() - before) / int(re.search(r"(\d+) requests in", said)[1]) * 1e6

    def fill(self, path):
        """Seconds of CPU for a cold blob."""
        self.request("POST", path.replace("/cas/", "/purge/"), port=self.port + 1)
        before = self.cpu()
        subprocess.run([*OTHER, "curl", "-sfo", "/dev/null", f"http://127.0.0.1:{self.port}{path}"], check=True)
        time.sleep(0.3)
        return self.cpu() - before


def blob(size):
    body = os.urandom(size)
    return f"/cas/{hashlib.sha256(body).hexdigest()}", body


def in_turn(versions, rounds, measure):
    figures = {version.name: [] for version in versions}
    for round in range(rounds):
        for version in versions if round % 2 == 0 else reversed(versions):
            figures[version.name].append(measure(version))
    return figures


def row(what, unit, figures):
    old, new = figures.values()
    ratio = statistics.median(b / a for a, b in zip(old, new))
    print(f"| {what} | {statistics.median(old):.4g} {unit} | {statistics.median(new):.4g} {unit} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench versions", description=__doc__)
    parser.add_argument("old", help="directory with the programs of one build, such as ../old/target/release")
    parser.add_argument("new", help="directory with those of the other")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=2, help="length of a round of hits")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="castier-versions-")
    port = random.randrange(20000, 30000, 100)
    origin = subprocess.Popen([*OTHER, f"{options.new}/castier-origin", "--listen", f"127.0.0.1:{port}", "--root", f"{directory}/origin"],
                              env=os.environ | {"CASTIER_LISTEN__ADMIN": f"127.0.0.1:{port + 1}"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    versions = [Version(name, build, port + offset, f"http://127.0.0.1:{port}", directory)
                for name, build, offset in (("old", options.old, 10), ("new", options.new, 20))]
    try:
        for version in versions:
            end = time.monotonic() + 30
            while True:
                try:
                    if version.request("GET", "/readyz", port=version.port + 1)[0] == 200:
                        break
                except OSError:
                    pass
                if time.monotonic() > end:
                    raise SystemExit(f"versions: {version.name} is not ready")
                time.sleep(0.1)
        print("| CPU | old | new | new ÷ old, median of the rounds |\n| --- | --- | --- | --- |")
        for what, size, tier in (("hit, 1 KiB", 1 << 10, "memory"), ("hit, 64 KiB", 64 << 10, "memory"), ("hit, 1 MiB", 1 << 20, "memory"),
                                 ("304", 1 << 10, None), ("disk hit, 4 MiB", 4 << 20, "disk")):
            path, body = blob(size)
            for version in versions:
                version.request("PUT", path, body)
                end = time.monotonic() + 10
                while tier and tier not in version.request("GET", path)[2] and time.monotonic() < end:
                    time.sleep(0.1)
                status, answer, found = version.request("GET", path)
                if (status, answer) != (200, body) or (tier and tier not in found):
                    raise SystemExit(f"versions: {version.name}: {what}: {status} {found}")
            header = [] if tier else ["-H", f'If-None-Match: "{path[5:]}"']
            row(what, "µs", in_turn(versions, options.rounds, lambda version: version.hits(path, header, options.seconds)))
        path, body = blob(FILL)
        versions[0].request("PUT", path, body)
        row("fill, 512 MiB", "s", in_turn(versions, max(options.rounds // 2, 1), lambda version: version.fill(path)))
    finally:
        for process in [*(version.process for version in versions), origin]:
            process.terminate()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


main()
