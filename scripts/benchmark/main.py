"""Runs the experiments and writes the results. scripts/bench builds the programs and starts this."""

import argparse
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import disk
import measure
import promises
import servers

EXPERIMENTS = {**measure.EXPERIMENTS, **promises.EXPERIMENTS, "disk": disk.disk_hits, "fill": disk.fill}
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
DOCUMENT = "docs/benchmarks.md"
# The blobs, the caches and the servers' logs together.
ROOM = 4 << 30


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Benchmarks castier beside nginx and Varnish.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, into target/bench/")
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", help="these experiments alone, into target/bench/")
    parser.add_argument("--out", help="where to write, instead")
    return parser.parse_args()


def data_directory():
    """In memory if it has room: most experiments measure no disk (those that do see to it), and nginx serves from its files as fast as they can be served."""
    shared = "/dev/shm"
    in_memory = os.path.isdir(shared) and shutil.disk_usage(shared).free > ROOM
    return tempfile.mkdtemp(prefix="castier-bench-", dir=shared if in_memory else None), in_memory


def cpu_model():
    with open("/proc/cpuinfo") as file:
        found = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return found[0] if found else platform.machine()


def about(bench, in_memory, load_average):
    """The machine, the versions and the settings."""
    versions = [kind.version(kind) for kind in servers.PEERS]
    wrk = subprocess.run(["wrk", "-v"], stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()[0].split(" Copyright")[0]
    place = "a file system in memory" if in_memory else "a disk"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    return [
        f"{datetime.date.today()}; {cpu_model()}, {os.cpu_count()} cores; {platform.system()} {platform.release()}; "
        f"load average before the run {load_average:.2f}; castier at {commit or 'no commit'}",
        f"{'; '.join(versions)}; {wrk}. All in front of the same castier-origin; origin and caches on {place}, but for the "
        "published runs and what is about disks: those are on a disk.",
        "The server under test has one core for itself, the load and the origin the other, but in the published runs, which share both. Over loopback, so the kernel's part in "
        "the CPU time is large, and the same for all.",
        f"Hits: wrk, {measure.CONNECTIONS} connections, {bench.seconds} s a round, {bench.rounds} rounds; the rounds alternate "
        "between the servers. Every body was checked against its digest beforehand. CPU is that of all the server's processes.",
        f"Herd, Zipf and the published runs: castier-load, which checks every body; herd {bench.herd['clients']} clients, {bench.herd['rounds']} rounds, Zipf "
        f"{bench.zipf['rounds']} rounds of {bench.zipf['requests']:,} requests over 10,240 blobs of 64 KiB, exponent 1.0, cache 64 MiB, "
        f"from empty; idle {bench.idle['connections']:,} connections, {bench.idle['rounds']} rounds.",
        *promises.about(bench),
        f"Disk: as hits, with the caches on a disk and in the kernel's cache of it; castier with [disk] and memory.max_blob = 16 KiB, so that each hit "
        f"is one of the disk, which its Cache-Status and its counters confirm. Fill: curl, {bench.fill['rounds']} rounds, a new server for each; curl "
        "shares the load's core with the origin, and where there is no tier between them has the other core to itself.",
        "castier: defaults but memory.capacity = 1 GiB, fill.parallel = 1, so that a load is one request as with the others, log.level = warn, and large flights spooled beside the caches. "
        "nginx: one worker, proxy_cache, open_file_cache, sendfile, "
        "tcp_nopush off, access_log off, proxy_cache_lock on without a timeout. Varnish: malloc 1 GiB, one thread pool.",
        "Peak memory is what is resident. It leaves out the kernel's cache of files, where nginx keeps its blobs and castier spools large flights.",
    ]


def replace_block(text):
    with open(DOCUMENT) as file:
        document = file.read()
    head, rest = document.split(BEGIN)
    _, tail = rest.split(END)
    with open(DOCUMENT, "w") as file:
        file.write(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def main():
    options = arguments()
    if len(os.sched_getaffinity(0) & {0, 1}) < 2:
        raise SystemExit("bench: this needs the first two cores: one for the server, one for the load")
    partial = options.quick or options.only
    out = options.out or ("target/bench" if partial else "docs/benchmarks")
    os.makedirs(out, exist_ok=True)
    load_average = os.getloadavg()[0]
    if load_average > 0.5:
        print(f"bench: the machine is busy (load average {load_average:.2f}): the figures will not be worth much", file=sys.stderr)
    # SIGTERM unwinds like Ctrl-C, so that every server is stopped and the data is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory, in_memory = data_directory()
    start, rows = time.monotonic(), []
    try:
        bench = measure.Bench(directory, options.quick)
        for name, experiment in EXPERIMENTS.items():
            if options.only and name not in options.only:
                continue
            print(f"bench: {time.monotonic() - start:5.0f} s  {name}", file=sys.stderr)
            for row in experiment(bench):
                rows.append(row)
                print("bench:        {0:<18} {1:<8} round {2}  {3:<20} {4:.6g}".format(*row), file=sys.stderr)
    finally:
        shutil.rmtree(directory, ignore_errors=True)

    import report  # Late: a broken plot library should not stand before the figures.

    results, clients = report.Results(rows), bench.herd["clients"]
    report.write_csv(results, os.path.join(out, "results.csv"))
    report.plot(results, out, clients)
    lines = about(bench, in_memory, load_average)
    with open(os.path.join(out, "results.md"), "w") as file:
        file.write("# Results\n\n" + report.markdown(results, lines, "", clients))
    if not partial and not options.out:
        replace_block(report.markdown(results, lines, "benchmarks/", clients))
    print(f"bench: {time.monotonic() - start:.0f} s; written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
