"""The experiments. Each yields rows (experiment, server, round, metric, value); rounds alternate between the servers."""

import contextlib
import hashlib
import json
import os
import random
import resource
import socket
import subprocess
import tempfile

import servers
from servers import LOAD_CPU, PEERS, PROGRAMS, SERVER_CPU, Castier, Nginx, Origin

HERE = os.path.dirname(os.path.abspath(__file__))
LOADER = os.path.join(PROGRAMS, "castier-load")
SIZES = {"1 KiB": (1 << 10, 1000), "64 KiB": (64 << 10, 500), "1 MiB": (1 << 20, 64)}
CONNECTIONS = 64


class Bench:
    """The directory of the run's data, and the lengths of the rounds."""

    def __init__(self, directory, quick):
        self.directory, self.quick = directory, quick
        self.rounds = 3 if quick else 5
        self.seconds = 1 if quick else 4
        self.herd = dict(clients=100 if quick else 500, size="64MiB", rounds=1 if quick else 5)
        self.zipf = dict(requests=20_000 if quick else 60_000, rounds=1 if quick else 5)
        self.fill = dict(rounds=1 if quick else 5)
        self.idle = dict(connections=2000 if quick else 5000, rounds=1 if quick else 5)
        self.published_rounds = 1 if quick else 3

    def place(self, name):
        """A path that does not exist yet."""
        return tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory) + "/data"

    def origin(self, **settings):
        return Origin(self.place("origin"), **settings)

    def peer(self, kind, origin, **settings):
        return kind(self.place(kind.name), origin, **settings)


@contextlib.contextmanager
def on_disk(bench):
    """The same bench with its data where cargo builds: on a disk, if anything is, that is done with what came before."""
    os.sync()
    os.makedirs(os.path.dirname(PROGRAMS), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=os.path.dirname(PROGRAMS)) as directory:
        before, bench.directory = bench.directory, directory
        try:
            yield bench
        finally:
            bench.directory = before


def load(*arguments, cpu_list=LOAD_CPU):
    """Runs castier-load on the load's core. It checks every byte, so the figures are valid only if it succeeds."""
    done = subprocess.run(["taskset", "-c", cpu_list, LOADER, "--json", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"bench: castier-load exited with {done.returncode} and no report; its arguments were {arguments}")
    report = json.loads(done.stdout)
    if done.returncode != 0:
        raise SystemExit(f"bench: requests failed, so there is no figure: {report['errors']} {report['status_codes']}")
    return report


def wrk(server, paths, seconds, connections=CONNECTIONS, **flags):
    """A closed loop of wrk: (requests, seconds, CPU seconds of the server). Any error ends the benchmark."""
    environment = {**os.environ, "BENCH_PATHS": paths, **{f"BENCH_{name.upper()}": "1" for name, on in flags.items() if on}}
    command = ["taskset", "-c", LOAD_CPU, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", f"{HERE}/wrk.lua", server.url]
    before = server.cpu_seconds()
    text = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    cpu = server.cpu_seconds() - before
    result = json.loads(text.split("RESULT ")[1])
    if result["errors"] or not result["requests"]:
        raise SystemExit(f"bench: {server.name} failed {result['errors']} of {result['requests']} requests:\n{text}")
    return result["requests"], result["microseconds"] / 1e6, cpu


def corpus(bench, origin, name, size, count):
    """Stores blobs at the origin. Returns the file with their paths."""
    rng = random.Random(size)
    digests = [origin.put(rng.randbytes(size)) for _ in range(count)]
    path = os.path.join(bench.directory, f"paths-{name.replace(' ', '')}")
    with open(path, "w") as file:
        file.writelines(f"/cas/{digest}\n" for digest in digests)
    return path


def warm(server, paths):
    """Loads every blob into the cache, and checks the bytes."""
    for path in open(paths).read().split():
        for _ in range(2):
            body = servers.get(server.url + path)
            if hashlib.sha256(body).hexdigest() != path.rsplit("/", 1)[1]:
                raise SystemExit(f"bench: {server.name} gave out a corrupt blob")


def hits(bench):
    """Hits by size; hits with a connection for each request; revalidations."""
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(bench.origin())
        paths = {name: corpus(bench, origin, name, size, count) for name, (size, count) in SIZES.items()}
        running = [stack.enter_context(bench.peer(kind, origin)) for kind in PEERS]
        for server in running:
            for file in paths.values():
                warm(server, file)
        loads = origin.gets()
        plan = [(f"hits {name}", file, {}) for name, file in paths.items()]
        plan += [("connection: close", paths["1 KiB"], {"close": True}), ("304", paths["1 KiB"], {"revalidate": True})]
        for round in range(bench.rounds):
            # Each round starts with another server, so that the order varies.
            for server in running[round % 3 :] + running[: round % 3]:
                for experiment, file, flags in plan:
                    requests, seconds, cpu = wrk(server, file, bench.seconds, **flags)
                    yield experiment, server.name, round, "requests/s", requests / seconds
                    yield experiment, server.name, round, "µs CPU/request", cpu / requests * 1e6
                    yield experiment, server.name, round, "busy", cpu / seconds
        if origin.gets() != loads:
            raise SystemExit("bench: not all of these were hits: the origin was asked")


def herd(bench):
    """Many clients request one large cold blob at once. With a new server each time, so that its peak memory is that of the herd."""
    herd = bench.herd
    for round in range(herd["rounds"]):
        for kind in PEERS:
            with bench.origin() as origin, bench.peer(kind, origin) as server:
                arguments = ["--target", server.url, "--fill", origin.url, "--objects", 1, "--size", herd["size"], "--verify", "bytes"]
                arguments += ["--requests", herd["clients"], "--concurrency", herd["clients"], "--timeout", "300s", "--seed", round]
                report = load(*arguments)
                yield "herd", kind.name, round, "origin loads", origin.gets()
                yield "herd", kind.name, round, "last client, s", report["latencies"]["max"] / 1e9
                yield "herd", kind.name, round, "last first byte, s", report["first_byte"]["max"] / 1e9
                yield "herd", kind.name, round, "peak memory, MiB", server.peak_bytes() / 2**20


class SmallNginx(Nginx):
    """nginx enforces max_size every ten seconds, an age here, but the limit of its key zone at once: this zone has room for about
    as many keys as 64 MiB have blobs of 64 KiB. And open_file_cache would serve files that were evicted, and so make the cache
    larger than it says."""

    zone, open_files = "138k", "off"


def zipf(bench):
    """Zipf's law over a corpus ten times the cache, from empty."""
    zipf = bench.zipf
    for round in range(zipf["rounds"]):
        for kind in (Castier, SmallNginx, PEERS[2]):
            with bench.origin() as origin, bench.peer(kind, origin, memory="64m") as server:
                shape = ["--objects", 10_240, "--size", "64KiB", "--zipf", "1.0", "--seed", round, "--concurrency", CONNECTIONS]
                base = ["--target", server.url, "--fill", origin.url, *shape]
                before, loads = server.cpu_seconds(), origin.gets()
                report = load(*base, "--requests", zipf["requests"])
                yield "zipf", kind.name, round, "hit ratio, %", 100 * (1 - (origin.gets() - loads) / report["requests"])
                yield "zipf", kind.name, round, "µs CPU/request", (server.cpu_seconds() - before) / report["requests"] * 1e6
                yield "zipf", kind.name, round, "99th, ms", report["latencies"]["99th"] / 1e6


def idle(bench):
    """Connections that requested one blob and then wait."""
    count = bench.idle["connections"]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * count + 1000) if hard > 0 else 2 * count + 1000, hard))
    for round in range(bench.idle["rounds"]):
        for kind in PEERS:
            with bench.origin() as origin, bench.peer(kind, origin) as server:
                digest = origin.put(random.Random(round).randbytes(1024))
                request = f"GET /cas/{digest} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
                # Send some requests first, so that the memory that they allocate does not count for the connections.
                connections = [ask(server.port, request) for _ in range(CONNECTIONS)]
                before = server.memory_bytes()
                connections += [ask(server.port, request) for _ in range(count)]
                yield "idle", kind.name, round, "KiB/connection", (server.memory_bytes() - before) / count / 1024
                for connection in connections:
                    connection.close()


def ask(port, request):
    """A connection on which one request was answered."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer.split(b"\r\n\r\n", 1)[1]) < 1024:
        piece = connection.recv(65536)
        if not piece:
            raise SystemExit(f"bench: the connection was closed: {answer[:200]!r}")
        answer += piece
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"bench: {answer[:200]!r}")
    return connection


SCENARIOS = ("sangraha-2k", "sangraha-1m", "messages", "forms", "cas-harness", "data-services")


def published(bench):
    """The published runs of the predecessors, on one castier. On a disk: what is stored is synced, which in memory costs nothing. There is nobody
    to be compared with on equal cores, so all of them share both, as where those runs were made."""
    both = f"{SERVER_CPU},{LOAD_CPU}"
    for round in range(bench.published_rounds):
        for scenario in SCENARIOS:
            with on_disk(bench), bench.origin(cpu_list=both) as origin, bench.peer(Castier, origin, cpu_list=both) as server:
                stats = f"http://127.0.0.1:{server.admin}"
                # This run counts the loads of a cold cache, so its corpus is stored directly at the origin.
                fill = ["--fill", origin.url] if scenario == "data-services" else []
                report = load("--target", server.url, "--scenario", scenario, "--stats", stats, *fill, "--seed", round, cpu_list=both)
                took = (report["duration"] + report["wait"]) / 1e9
                yield scenario, "castier", round, "requests/s", report["requests"] / took
                yield scenario, "castier", round, "total, ms", took * 1e3
                for name in ("mean", "50th", "95th", "99th"):
                    yield scenario, "castier", round, f"{name}, ms", report["latencies"][name] / 1e6
                yield scenario, "castier", round, "success", report["success"]
                yield scenario, "castier", round, "origin loads", report["origin_loads"]


EXPERIMENTS = {"hits": hits, "herd": herd, "zipf": zipf, "idle": idle, "published": published}
