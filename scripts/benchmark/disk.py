"""The experiments with the disk tier. The caches are on a disk, and their files are in the page cache while they are read, as in practice."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import urllib.request

import measure
import servers
from servers import LOAD_CPU, SERVER_CPU, Castier, Nginx

HITS = {name: measure.SIZES[name] for name in ("64 KiB", "1 MiB")}
FILL = 1 << 30
DIRECT = "origin directly"


class DiskCastier(Castier):
    """castier with a disk tier, and a memory tier too small for these blobs, so that each hit is from the disk."""

    more = 'max_blob = "16KiB"\n[disk]\npath = "{d}/cache"\ncapacity = "8GiB"\n'

    def series(self, name):
        """A counter, by its labels."""
        text = servers.get(f"http://127.0.0.1:{self.admin}/metrics").decode()
        return {labels: float(value) for labels, value in re.findall(rf"^{name}(?:\{{([^}}]*)\}})? (\S+)$", text, re.MULTILINE)}

    def hits(self):
        """Gets that the disk answered, and other gets."""
        hits = self.series("castier_hits_total")
        disk = hits.pop('tier="disk"', 0)
        return disk, sum(hits.values()) + self.series("castier_loads_total")[""]


def must_hit_the_disk(server, path):
    """Ends the benchmark unless castier reports a hit of its disk tier."""
    with servers.NO_PROXY.open(urllib.request.Request(server.url + path)) as answer:
        told = answer.headers["Cache-Status"]
    if told != "castier; hit; detail=disk":
        raise SystemExit(f"bench: {path} should be on disk, but castier says: {told}")


def disk_hits(bench):
    """Hits by size, of blobs that are only in the page cache."""
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(bench.origin())
        paths = {name: measure.corpus(bench, origin, f"disk-{name}", size, count) for name, (size, count) in HITS.items()}
        stack.enter_context(measure.on_disk(bench))
        castier, nginx = running = [stack.enter_context(bench.peer(kind, origin)) for kind in (DiskCastier, Nginx)]
        for file in paths.values():
            for server in running:
                measure.warm(server, file)
            for path in open(file).read().split():
                must_hit_the_disk(castier, path)
        loads = origin.gets()
        for round in range(bench.rounds):
            for server in running[round % 2 :] + running[: round % 2]:
                for name, file in paths.items():
                    before = castier.hits()
                    requests, seconds, cpu = measure.wrk(server, file, bench.seconds)
                    after = castier.hits()
                    if server is castier and (after[0] - before[0] < requests or after[1] != before[1]):
                        raise SystemExit(f"bench: of {requests} hits, {after[0] - before[0]:.0f} were of the disk, {after[1] - before[1]:.0f} not")
                    yield f"disk hits {name}", server.name, round, "requests/s", requests / seconds
                    yield f"disk hits {name}", server.name, round, "µs CPU/request", cpu / requests * 1e6
                    yield f"disk hits {name}", server.name, round, "busy", cpu / seconds
        if origin.gets() != loads:
            raise SystemExit("bench: not all of these were hits: the origin was asked")


def download(url, cpu):
    """The blob of the fills through curl: MB/s."""
    command = ["taskset", "-c", cpu, "curl", "-sf", "--noproxy", "*", "-o", "/dev/null", "-w", "%{size_download} %{time_total}", url]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    size, seconds = done.stdout.split()
    if done.returncode or int(size) != FILL:
        raise SystemExit(f"bench: curl exited with {done.returncode} and {size} bytes of {FILL} from {url}")
    return FILL / float(seconds) / 1e6


def fill(bench):
    """One large cold blob, through a tier that keeps it on disk, beside the same blob from the origin directly. Directly, curl has
    the core that is otherwise the tier's: that is the fastest that the origin can be."""
    with bench.origin() as origin, measure.on_disk(bench):
        if shutil.disk_usage(bench.directory).free < 4 * FILL:
            raise SystemExit(f"bench: {bench.directory} needs {4 * FILL >> 30} GiB of room for fills")
        rng = random.Random(FILL)
        for round in range(bench.fill["rounds"]):
            digest = origin.put(b"".join(rng.randbytes(64 << 20) for _ in range(FILL >> 26)))
            path = f"/cas/{digest}"
            download(origin.url + path, SERVER_CPU)
            plan = [DiskCastier, Nginx, None]
            for kind in plan[round % 3 :] + plan[: round % 3]:
                # Write out the dirty pages of the last fill, so that they do not slow the next one.
                os.sync()
                if kind is None:
                    yield "fill", DIRECT, round, "MB/s", download(origin.url + path, SERVER_CPU)
                    continue
                with bench.peer(kind, origin, memory="4096m") as server:
                    loads, before = origin.gets(), server.cpu_seconds()
                    yield "fill", server.name, round, "MB/s", download(server.url + path, LOAD_CPU)
                    yield "fill", server.name, round, "s CPU", server.cpu_seconds() - before
                    download(server.url + path, LOAD_CPU)
                    if origin.gets() != loads + 1:
                        raise SystemExit(f"bench: {server.name} did not keep the blob that it filled")
                shutil.rmtree(server.directory)
            origin.delete(digest)
