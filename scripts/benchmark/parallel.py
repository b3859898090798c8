"""Loads a cold blob from a store that gives each connection so many bytes a second, over one connection and over several at once. See scripts/bench."""

import argparse
import hashlib
import http.server
import os
import random
import re
import statistics
import subprocess
import tempfile
import threading
import time

from servers import free_port, get

PIECE = 64 << 10


class Store(http.server.BaseHTTPRequestHandler):
    """One blob under any path, with ranges and a strong ETag."""

    protocol_version = "HTTP/1.1"
    blob, rate, requests = b"", 0, 0

    def do_GET(self):
        Store.requests += 1
        first, last, status = 0, len(self.blob) - 1, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last, status = int(asked[1]), min(int(asked[2] or last), last), 206
        if self.headers.get("if-match", '"1"') != '"1"':
            self.send_error(412)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.blob)}")
        self.end_headers()
        body, begun, sent = memoryview(self.blob)[first : last + 1], time.monotonic(), 0
        try:
            while sent < len(body):
                piece = body[sent : sent + PIECE]
                self.wfile.write(piece)
                sent += len(piece)
                # Never ahead of the rate, also not after a pause.
                time.sleep(max(0, begun + sent / self.rate - time.monotonic()))
        except ConnectionError:
            self.close_connection = True

    def do_HEAD(self):
        # castier asks at its start whether this is a store of blobs.
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self):
        # What lies in the socket's buffers when a connection is dropped was sent for nothing.
        self.socket.setsockopt(1, 7, 256 << 10)  # SOL_SOCKET, SO_SNDBUF
        super().server_bind()


class Castier:
    """A node with this many connections for one blob."""

    def __init__(self, build, origin, parallel, directory):
        port, self.admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = {"LISTEN__PUBLIC": f"127.0.0.1:{port}", "LISTEN__ADMIN": f"127.0.0.1:{self.admin}", "ORIGIN__URL": origin, "LOG__LEVEL": "warn",
                    "FILL__PARALLEL": str(parallel), "FILL__SPOOL_DIR": directory}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CASTIER_")}
        environment |= {f"CASTIER_{key}": value for key, value in settings.items()}
        self.process = subprocess.Popen([f"{build}/castier"], env=environment, stdout=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(500):
            try:
                get(f"http://127.0.0.1:{self.admin}/healthz")
                return self
            except OSError:
                time.sleep(0.01)
        raise SystemExit("parallel: castier does not start")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def peak(self):
        """The most memory that was resident, in MiB."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) / 1024


def load(url, size):
    """Seconds until the last byte, which castier sends only if all of them were right."""
    command = ["curl", "-sf", "-o", "/dev/null", "-w", "%{time_total} %{size_download}", url]
    seconds, got = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if int(got) != size:
        raise SystemExit(f"parallel: {got} bytes of {size}")
    return float(seconds)


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench parallel", description=__doc__)
    parser.add_argument("build", help="a directory with the programs, such as target/release")
    parser.add_argument("--size", type=int, default=256, help="MiB of the blob (256)")
    parser.add_argument("--rate", type=float, default=20, help="MB a second that each connection gets (20)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 4, 8], help="values of fill.parallel (1 4 8)")
    options = parser.parse_args()
    # One call makes 256 MiB at most.
    noise = random.Random(1)
    Store.blob, Store.rate = b"".join(noise.randbytes(1 << 20) for _ in range(options.size)), options.rate * 1e6
    path = f"/cas/{hashlib.sha256(Store.blob).hexdigest()}"
    store = Server(("127.0.0.1", 0), Store)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    origin, times, requests, peaks = f"http://127.0.0.1:{store.server_port}", {}, {}, {}
    with tempfile.TemporaryDirectory(prefix="castier-parallel-") as directory:
        # The rounds alternate, so that a machine whose speed changes treats all alike.
        for _ in range(options.rounds):
            for parallel in options.parallel:
                with Castier(options.build, origin, parallel, directory) as castier:
                    before = Store.requests
                    times.setdefault(parallel, []).append(load(castier.url + path, len(Store.blob)))
                    requests.setdefault(parallel, []).append(Store.requests - before)
                    peaks.setdefault(parallel, []).append(castier.peak())
        direct = load(origin + path, len(Store.blob))
    print(f"{options.size} MiB, {options.rate:g} MB/s for each connection; without castier {direct:.2f} s\n")
    print("| `fill.parallel` | seconds (least – most) | MB/s | against the first row | requests | peak memory |\n| ---: | ---: | ---: | ---: | ---: | ---: |")
    first = statistics.median(times[options.parallel[0]])
    for parallel, took in times.items():
        median = statistics.median(took)
        print(f"| {parallel} | {median:.2f} ({min(took):.2f} – {max(took):.2f}) | {len(Store.blob) / median / 1e6:.0f} | {first / median:.2f} × | "
              f"{statistics.median(requests[parallel]):.0f} | {statistics.median(peaks[parallel]):.0f} MiB |")


if __name__ == "__main__":
    main()
