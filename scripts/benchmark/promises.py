"""More experiments, in the manner of measure.py: how soon a server answers, what a full cache takes, and what sharing one slow load
costs its clients."""

import hashlib
import itertools
import os
import random
import re
import socket
import subprocess
import time

import servers
from measure import load
from servers import LOAD_CPU, PEERS, Castier, Nginx, Varnish

SLOW_MIB = 20
CLIENTS = 100


class Plan:
    """The sizes of the experiments, for the full and the quick run."""

    def __init__(self, bench):
        # Memory hardly varies, so this is done once.
        self.capacity_mib = 64 if bench.quick else 256
        # Of 1 KiB: more than fit, with what every cache has to remember about each.
        self.blobs = self.capacity_mib * 820
        self.slow_rounds = 1 if bench.quick else 3
        self.slow_mib = 64 if bench.quick else 256


def about(bench):
    """The descriptions for the results."""
    plan = Plan(bench)
    return [
        "Start: from running the program until a client has a whole blob of 1 KiB, fetched from the origin; asked for every millisecond. "
        f"Full cache: {plan.blobs:,} blobs of 1 KiB read once through a cache of {plan.capacity_mib} MiB, one round, then the proportional "
        "set size; nginx keeps its blobs in files and so has no such figure.",
        f"Slow origin: {SLOW_MIB} MiB/s for each connection. One client gets a cold blob of {plan.slow_mib} MiB, then {CLIENTS} clients at "
        f"once get another; {plan.slow_rounds} rounds. The clients, the origin and what slows it down share a core.",
    ]


def start(bench):
    """From running the program to the first answer."""
    with bench.origin() as origin:
        blob = random.Random(1).randbytes(1024)
        digest = origin.put(blob)
        for round in range(2 * bench.rounds):
            for kind in PEERS[round % 3 :] + PEERS[: round % 3]:
                server = bench.peer(kind, origin)
                answered = []
                server.wait_until_it_answers = lambda: answered.append(first_answer(server, digest, blob))
                with server:
                    yield "start", kind.name, round, "first answer, ms", (answered[0] - server.started) * 1e3


def first_answer(server, digest, blob):
    """Polls until there is an answer. Returns its time."""
    while server.process.poll() is None and time.monotonic() < server.started + 15:
        try:
            if servers.get(f"{server.url}/cas/{digest}") == blob:
                return time.monotonic()
        except OSError:
            time.sleep(0.001)
    raise SystemExit(f"bench: {server.name} does not start")


def full(bench):
    """Memory of a cache full of small blobs."""
    plan = Plan(bench)
    corpus = {hashlib.sha256(blob).hexdigest(): blob for blob in (number.to_bytes(4, "big") * 256 for number in range(plan.blobs))}
    with bench.origin() as origin:
        head = "PUT /cas/{} HTTP/1.1\r\nHost: bench\r\nContent-Length: 1024\r\n\r\n"
        pipeline(origin, b"201", ((head.format(digest).encode() + blob, b"") for digest, blob in corpus.items()))
        for kind in (Castier, Varnish):
            with bench.peer(kind, origin, memory=f"{plan.capacity_mib}m") as server:
                before = server.memory_bytes()
                head = "GET /cas/{} HTTP/1.1\r\nHost: bench\r\n\r\n"
                pipeline(server, b"200", ((head.format(digest).encode(), blob) for digest, blob in corpus.items()))
                kept, memory = blobs(server), server.memory_bytes()
                if kept > 0.95 * plan.blobs:
                    raise SystemExit(f"bench: {kind.name} keeps {kept} of {plan.blobs} blobs, and may not be full")
                yield "full", kind.name, 0, f"resident at {plan.capacity_mib} MiB, MiB", memory / 2**20
                yield "full", kind.name, 0, "blobs kept", kept
                yield "full", kind.name, 0, "bytes/blob kept", (memory - before) / kept


def pipeline(server, status, exchanges):
    """Sends many requests on one connection, fifty at a time. Each must be answered with this status and its body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        answers = connection.makefile("rb")
        while batch := list(itertools.islice(exchanges, 50)):
            connection.sendall(b"".join(request for request, _ in batch))
            for request, expected in batch:
                line, length = answers.readline(), 0
                while (header := answers.readline().lower()) not in (b"\r\n", b""):
                    if header.startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                if line.split()[1:2] != [status] or answers.read(length) != expected:
                    raise SystemExit(f"bench: {server.name} answered wrongly to {request[:90]!r}: {line!r}")


def blobs(server):
    """How many blobs the cache holds."""
    if server.name == "castier":
        stats = servers.get(f"http://127.0.0.1:{server.admin}/metrics").decode()
        return int(re.search(r'^castier_tier_blobs\{tier="memory"\} (\d+)', stats, re.MULTILINE)[1])
    command = ["varnishstat", "-n", f"{server.directory}/vsm", "-1", "-f", "MAIN.n_object"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[1])


class Limiter(Nginx):
    """A proxy in front of the origin that limits the speed of its answers. Runs on the load's core."""

    name, cpu_list = "limiter", LOAD_CPU

    def command(self):
        config = os.path.join(self.directory, "nginx.conf")
        with open(config, "w") as file:
            file.write(LIMITER.format(d=self.directory, port=self.port, origin=self.origin.port, limit=SLOW_MIB))
        return ["nginx", "-p", self.directory, "-e", f"{self.directory}/error.log", "-c", config]


LIMITER = """
daemon off; worker_processes 1; pid {d}/pid; user root;
events {{ worker_connections 1000; }}
http {{
  access_log off; keepalive_timeout 600s;
  client_body_temp_path {d}/body; fastcgi_temp_path {d}/f; uwsgi_temp_path {d}/u; scgi_temp_path {d}/s; proxy_temp_path {d}/proxy;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{origin}; proxy_http_version 1.1; limit_rate {limit}m; }}
  }}
}}
"""


def streaming(bench):
    """One client, then many at once, each time with a cold blob from a slow origin."""
    plan, seconds = Plan(bench), {}
    for round in range(plan.slow_rounds):
        for kind in PEERS[round % 3 :] + PEERS[: round % 3]:
            with bench.origin() as origin, bench.peer(Limiter, origin) as limiter, bench.peer(kind, limiter) as server:
                for clients in (1, CLIENTS):
                    shape = ["--objects", 1, "--size", f"{plan.slow_mib}MiB", "--seed", clients, "--requests", clients, "--concurrency", clients]
                    report = load("--target", server.url, "--fill", origin.url, *shape, "--verify", "bytes", "--timeout", "600s")
                    seconds[clients] = report["latencies"]["max"] / 1e9
                yield "streaming", kind.name, round, "origin loads, two blobs", origin.gets()
                yield "streaming", kind.name, round, "one client alone, s", seconds[1]
                yield "streaming", kind.name, round, f"last of {CLIENTS} clients, s", seconds[CLIENTS]
                yield "streaming", kind.name, round, "last ÷ alone", seconds[CLIENTS] / seconds[1]


EXPERIMENTS = {"start": start, "full": full, "streaming": streaming}
