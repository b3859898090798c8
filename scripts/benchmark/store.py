"""castier with a bucket of SeaweedFS as its origin, beside SeaweedFS itself, and the published runs over that bucket. See scripts/bench.

Both sides are asked by the same client: processes that send requests made and signed beforehand, one at a time on a kept connection, and check status and
length of each answer. The first answers of every run are compared with the blob. Every blob is new to the side that is asked, but in the rows `kept`. The sides take
turns, round by round. All programs and the clients share the machine's cores, so look at the ratios.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
import seaweedfs  # noqa: E402

TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target"))
# Name, bytes, blobs of a round, and clients.
SIZES = [("2 KiB", 2 << 10, 2000, 8), ("64 KiB", 64 << 10, 1000, 8), ("1 MiB", 1 << 20, 120, 8), ("16 MiB", 16 << 20, 12, 4)]
# The published figures of castier's predecessor, with five store nodes.
PUBLISHED = {"sangraha-2k": 57.16, "sangraha-1m": 7.70}


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait(url, process):
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"store: {process.args[0]} ended with {process.returncode}")
        try:
            return seaweedfs.NO_PROXY.open(url, timeout=2).read()
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"store: {process.args[0]} is not ready after 30 s")


class Castier:
    """castier before the bucket, with nothing kept."""

    def __init__(self, directory, store, write):
        self.directory = tempfile.mkdtemp(dir=directory)
        public, admin = free_ports(2)
        config = f'[listen]\npublic = "127.0.0.1:{public}"\nadmin = "127.0.0.1:{admin}"\n[log]\nlevel = "warn"\n{store.config()}'
        # What only `behind` has: the file to which uploads go first.
        disk = f'[disk]\npath = "{self.directory}/cache"\ncapacity = "4GiB"\n' if write == "behind" else ""
        if write == "behind":
            config = config.replace("[origin]\n", '[origin]\nwrite = "behind"\n')
        file = pathlib.Path(self.directory, "castier.toml")
        file.write_text(f'{config}[memory]\ncapacity = "1GiB"\nmax_blob = "16MiB"\n{disk}')
        self.host, self.url = f"127.0.0.1:{public}", f"http://127.0.0.1:{public}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CASTIER_")}
        log = open(os.path.join(self.directory, "log"), "wb")
        command = [TARGET / "release/castier", "--config", file]
        self.process = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=log, stderr=log)
        wait(f"http://127.0.0.1:{admin}/readyz", self.process)

    def end(self):
        self.process.terminate()
        self.process.wait(60)
        shutil.rmtree(self.directory)


class Blobs:
    """New blobs: they differ in their first bytes."""

    made = 0

    def __init__(self, size, count):
        filler = random.Random(size).randbytes(size - 16)
        self.bodies = []
        for _ in range(count):
            Blobs.made += 1
            self.bodies.append((Blobs.made.to_bytes(16, "big"), filler))
        self.digests = [self.digest(body) for body in self.bodies]

    @staticmethod
    def digest(body):
        digest = hashlib.sha256(body[0])
        digest.update(body[1])
        return digest.hexdigest()


def requests(method, blobs, side, store):
    """Heads and bodies of a round, ready to send."""
    made = []
    for body, digest in zip(blobs.bodies, blobs.digests):
        length = sum(map(len, body)) if method == "PUT" else 0
        if side is store:
            path = f"/{seaweedfs.BUCKET}/cas/{digest[:2]}/{digest}"
            headers = seaweedfs.signed(method, store.host, path, length)
        else:
            path, headers = f"/cas/{digest}", {"host": side.host, "content-length": str(length)}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        made.append((head.encode(), body if method == "PUT" else (), digest))
    return made


def answer(connection, buffer, check):
    """Reads one answer. Its status and length; the digest of the body if `check`."""
    have = 0
    while (end := buffer[:have].find(b"\r\n\r\n")) < 0:
        got = connection.recv_into(memoryview(buffer)[have:])
        if got == 0:
            raise SystemExit("store: a connection was closed before the answer")
        have += got
    head = bytes(buffer[:end]).decode().lower()
    status = int(head.split(" ", 2)[1])
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    length = int(fields.get("content-length", "-1"))
    if length < 0 and fields.get("transfer-encoding") is None:
        length = 0
    if length < 0:
        raise SystemExit(f"store: an answer without a length: {head}")
    digest = hashlib.sha256(buffer[end + 4 : have])
    left = length - (have - end - 4)
    while left > 0:
        got = connection.recv_into(buffer, min(left, len(buffer)))
        if got == 0:
            raise SystemExit("store: a body is cut")
        if check:
            digest.update(memoryview(buffer)[:got])
        left -= got
    return status, length, digest.hexdigest()


def client(host, work, size, wanted, begin, results):
    buffer, wrong = bytearray(1 << 20), []
    address, port = host.split(":")
    connection = socket.create_connection((address, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    begin.wait()
    start = time.monotonic()
    for number, (head, body, digest) in enumerate(work):
        if body and len(body[1]) < 1 << 17:
            connection.sendall(b"".join((head, *body)))
        else:
            for part in (head, *body):
                connection.sendall(part)
        is_get = not body
        status, length, got = answer(connection, buffer, is_get and number == 0)
        if status not in wanted or (is_get and length != size) or (is_get and number == 0 and got != digest):
            wrong.append(f"{status} with {length} bytes for {head.split(b' ', 2)[:2]}")
    results.put((start, time.monotonic(), wrong[:3]))


def rate(method, blobs, side, store, clients, size):
    """Requests per second of one round."""
    work, begin, results = requests(method, blobs, side, store), multiprocessing.Barrier(clients), multiprocessing.Queue()
    wanted = (200,) if method == "GET" or side is store else (201, 202)
    share = [work[at::clients] for at in range(clients)]
    processes = [multiprocessing.Process(target=client, args=(side.host, part, size, wanted, begin, results)) for part in share]
    for process in processes:
        process.start()
    times = []
    for process in processes:
        while True:
            try:
                times.append(results.get(timeout=1))
                break
            except Exception:
                if any(process.exitcode for process in processes):
                    raise SystemExit("store: a client failed")
    for process in processes:
        process.join()
    wrong = [text for _, _, texts in times for text in texts]
    if wrong:
        raise SystemExit(f"store: wrong answers: {wrong[:3]}")
    return sum(map(len, share)) / (max(end for _, end, _ in times) - min(start for start, _, _ in times))


def compare(directory, store, write, rounds, quick):
    """For each size: the rates of both sides, round by round."""
    rows = {}
    for name, size, count, clients in SIZES:
        count = max(clients, count // 4) if quick else count
        for number in range(rounds + 1):
            castier = Castier(directory, store, write)
            try:
                mine, theirs = Blobs(size, count), Blobs(size, count)
                found, castier_first = {}, number % 2
                sides = [(castier, mine), (store, theirs)]
                for side, blobs in sides if castier_first else reversed(sides):
                    found[("PUT", side is store)] = rate("PUT", blobs, side, store, clients, size)
                # castier gets what it has not seen, and the store gets what castier has stored there.
                if write == "behind":
                    settle(store, mine)
                sides = [(castier, theirs), (store, mine)]
                for side, blobs in sides if castier_first else reversed(sides):
                    found[("GET", side is store)] = rate("GET", blobs, side, store, clients, size)
                found[("GET, kept", False)] = rate("GET", mine, castier, store, clients, size)
                found[("GET, kept", True)] = rate("GET", theirs, store, store, clients, size)
            finally:
                castier.end()
            # The first round warms the store up.
            if number:
                for key, value in found.items():
                    rows.setdefault((name, *key), []).append(value)
        for what in ("PUT", "GET", "GET, kept"):
            show(name, what, rows)
    return rows


def settle(store, blobs):
    """Waits until an upload that was acknowledged early has arrived."""
    for digest in blobs.digests:
        for _ in range(1200):
            if store.ask("HEAD", f"/{seaweedfs.BUCKET}/cas/{digest[:2]}/{digest}")[0] == 200:
                break
            time.sleep(0.05)
        else:
            raise SystemExit(f"store: {digest} has not arrived within 60 s")


def spread(values, digits=0):
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def show(name, what, rows):
    mine, theirs = rows[(name, what, False)], rows[(name, what, True)]
    ratios = [one / other for one, other in zip(mine, theirs)]
    digits = 0 if min(mine + theirs) >= 100 else 1
    print(f"| {what}, {name} | {spread(mine, digits)} | {spread(theirs, digits)} | {spread(ratios, 2)} |", flush=True)


def published(directory, store, write, rounds):
    """The published runs, and as many uploads."""
    print("\n| run | published | castier over the bucket |\n| --- | ---: | ---: |", flush=True)
    sizes = {"sangraha-2k": "2KiB", "sangraha-1m": "1MiB"}
    for scenario, size in sizes.items():
        runs = {"": ["--scenario", scenario], ", as uploads": ["--mix", "post=100", "--requests", "100", "--concurrency", "20", "--objects", "1", "--size", size]}
        for kind, flags in runs.items():
            rates = []
            for number in range(rounds + 1):
                castier = Castier(directory, store, write)
                try:
                    command = [TARGET / "release/castier-load", "--json", "--target", castier.url, "--seed", str(random.getrandbits(40)), *flags]
                    told = subprocess.run(command, capture_output=True, text=True)
                    if told.returncode:
                        raise SystemExit(f"store: {scenario}{kind}: {told.stdout[-500:]} {told.stderr[-500:]}")
                    if number:
                        rates.append(json.loads(told.stdout)["throughput"])
                finally:
                    castier.end()
            print(f"| {scenario}{kind} | {PUBLISHED[scenario]:.2f} requests/s | {spread(rates)} requests/s |", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", choices=["through", "behind"], default=os.environ.get("WRITE", "through"), help="origin.write; also by the variable WRITE")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each row, beside the first, which does not count (5)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the blobs, and three rounds")
    parser.add_argument("--only", choices=["compare", "published"], help="one part")
    parser.add_argument("--directory", help="where the store and castier have their data, for a disk that you choose")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    program = seaweedfs.find(TARGET / "test-tools")
    if program is None:
        raise SystemExit("store: SeaweedFS is not installed (scripts/setup-tests installs it below target/)")
    directory = tempfile.mkdtemp(prefix="castier-store-", dir=arguments.directory)
    store = seaweedfs.Store(directory, free_ports(seaweedfs.PORTS), program)
    log = open(os.path.join(directory, "store.log"), "wb")
    process = subprocess.Popen(store.command, cwd=directory, stdout=log, stderr=log)
    try:
        store.make_bucket(time.sleep)
        told = subprocess.run([TARGET / "release/castier", "--version"], capture_output=True, text=True).stdout.strip()
        print(f"{told}; SeaweedFS {subprocess.run([program, 'version'], capture_output=True, text=True).stdout.strip()}; write = {arguments.write}; "
              f"load average {os.getloadavg()[0]:.2f}\n")
        if arguments.only != "published":
            print("| requests/s | through castier | the store itself | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
            compare(directory, store, arguments.write, rounds, arguments.quick)
        if arguments.only != "compare":
            published(directory, store, arguments.write, rounds)
        print(f"\nload average {os.getloadavg()[0]:.2f}")
    finally:
        process.kill()
        process.wait()
        store.remove_sockets()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
