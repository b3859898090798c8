"""What TLS and HTTP/2 cost, beside nginx in the same run, and what hits cost while the origin is overloaded. See scripts/bench."""

import argparse
import base64
import hashlib
import http.client
import multiprocessing
import os
import queue
import re
import statistics
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TICKS = os.sysconf("SC_CLK_TCK")
# The server under test has this core for itself; clients and the origin share the other.
SERVER, OTHER = ["taskset", "-c", "0"], ["taskset", "-c", "1"]
# A load of the slow origin, fill.max_in_flight, and how many clients ask for blobs that are not kept.
SLOW, FILLS = 5, 64


class Server:
    """A process, and the CPU time of it and its children."""

    def __init__(self, name, command, environment=None):
        self.name = name
        self.process = subprocess.Popen([*SERVER, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def pids(self):
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return [self.process.pid, *map(int, children)]

    def cpu(self):
        total = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def stop(self):
        self.process.terminate()
        self.process.wait()


def castier(build, directory, port, tls=None, origin=None, **more):
    settings = {"LISTEN__PUBLIC": f"127.0.0.1:{port}", "LISTEN__ADMIN": f"127.0.0.1:{port + 1}", "LOG__LEVEL": "warn",
                "ORIGIN__URL": origin or f"embedded:{directory}/origin-{port}", **more}
    if tls:
        settings |= {"LISTEN__TLS__CERT_FILE": tls[0], "LISTEN__TLS__KEY_FILE": tls[1]}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CASTIER_")}
    return Server("castier", [f"{build}/castier"], environment | {f"CASTIER_{key}": str(value) for key, value in settings.items()})


def nginx(directory, port, tls, root):
    """Files from memory: with open_file_cache and sendfile there is nothing that nginx does faster."""
    config = f"""
user root; worker_processes 1; pid {directory}/nginx.pid; error_log /dev/null; daemon off;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; open_file_cache max=1000; keepalive_requests 1000000000; http2_max_concurrent_streams 128;
  server {{ listen 127.0.0.1:{port}; listen 127.0.0.1:{port + 1} ssl http2; listen 127.0.0.1:{port + 2} http2;
    ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]}; ssl_protocols TLSv1.3; root {root}; default_type application/octet-stream; }}
}}"""
    with open(f"{directory}/nginx.conf", "w") as file:
        file.write(config)
    return Server("nginx", ["nginx", "-p", directory, "-c", f"{directory}/nginx.conf"])


def ready(port):
    for _ in range(200):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"entrance: nothing listens at port {port}")


def wrk(url, seconds, *more, connections=64):
    said = subprocess.run([*OTHER, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", *more, url], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"entrance: wrong answers: {said}")
    return int(re.search(r"(\d+) requests in", said)[1]), milliseconds(re.search(r"99%\s+(\S+)", said)[1])


def h2load(url, seconds):
    said = subprocess.run([*OTHER, "h2load", "-c1", "-m64", "-t1", f"-D{seconds}", "--warm-up-time=1", url], capture_output=True, text=True, check=True).stdout
    done = re.search(r"requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded", said)
    if not done or done[1] != done[2]:
        raise SystemExit(f"entrance: wrong answers: {said}")
    return int(done[1]), 0


def milliseconds(text):
    number, unit = re.match(r"([\d.]+)(\D+)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


def costs(build, directory, rounds, seconds):
    pair = f"{directory}/cert.pem", f"{directory}/key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pair[1], "-out", pair[0]], check=True, capture_output=True)
    body = os.urandom(1024)
    path = f"/cas/{hashlib.sha256(body).hexdigest()}"
    root = f"{directory}/root"
    os.makedirs(f"{root}/cas")
    with open(root + path, "wb") as file:
        file.write(body)
    plain, secured = castier(build, directory, 18100), castier(build, directory, 18110, pair)
    web = nginx(directory, 18120, pair, root)
    try:
        for port in (18100, 18120):
            ready(port)
        time.sleep(1)
        for scheme, port in (("http", 18100), ("https", 18110)):
            subprocess.run(["curl", "-sfk", "-o", "/dev/null", "-X", "PUT", "--data-binary", "@-", f"{scheme}://127.0.0.1:{port}{path}"], input=body, check=True)
        cases = [
            ("HTTP/1.1", wrk, (plain, "http://127.0.0.1:18100"), (web, "http://127.0.0.1:18120")),
            ("HTTP/1.1, TLS 1.3", wrk, (secured, "https://127.0.0.1:18110"), (web, "https://127.0.0.1:18121")),
            ("HTTP/2, 64 streams", h2load, (plain, "http://127.0.0.1:18100"), (web, "http://127.0.0.1:18122")),
            ("HTTP/2, TLS 1.3, 64 streams", h2load, (secured, "https://127.0.0.1:18110"), (web, "https://127.0.0.1:18121")),
        ]
        print("| a hit of 1 KiB | castier, µs of CPU | nginx, µs of CPU | castier ÷ nginx | castier, requests/s | nginx, requests/s |\n| --- | --- | --- | --- | --- | --- |")
        for name, client, *servers in cases:
            figures = {server.name: [] for server, _ in servers}
            for round in range(rounds):
                for server, url in servers if round % 2 == 0 else reversed(servers):
                    before, began = server.cpu(), time.monotonic()
                    requests, _ = client(url + path, seconds)
                    # The warm-up of h2load is in neither of the two that are compared.
                    figures[server.name].append(((server.cpu() - before) / requests * 1e6, requests / seconds, time.monotonic() - began))
            ours, theirs = ([statistics.median(column) for column in zip(*figures[name])] for name in ("castier", "nginx"))
            print(f"| {name} | {ours[0]:.1f} | {theirs[0]:.1f} | {ours[0] / theirs[0]:.2f} | {ours[1]:,.0f} | {theirs[1]:,.0f} |", flush=True)
    finally:
        for server in (plain, secured, web):
            server.stop()


def credentials(build, directory, rounds, seconds):
    """The same hits of the same castier, without credentials and with each kind of them."""
    users, tokens = f"{directory}/users", f"{directory}/tokens"
    with open(users, "w") as file:
        file.write(subprocess.run(["htpasswd", "-nbB", "-C", "10", "alice", "password"], check=True, capture_output=True, text=True).stdout)
    with open(tokens, "w") as file:
        file.write(f"ci read {hashlib.sha256(b'token').hexdigest()}\n")
    node = castier(build, directory, 18150, ACCESS__ANONYMOUS="write", ACCESS__HTPASSWD_FILE=users, ACCESS__TOKENS_FILE=tokens)
    kinds = [("none", []), ("Basic", ["-H", "Authorization: Basic " + base64.b64encode(b"alice:password").decode()]), ("Bearer", ["-H", "Authorization: Bearer token"])]
    figures = {name: [] for name, _ in kinds}
    try:
        ready(18151)
        body = os.urandom(1024)
        path = f"/cas/{hashlib.sha256(body).hexdigest()}"
        url = f"http://127.0.0.1:18150{path}"
        subprocess.run(["curl", "-sf", "-o", "/dev/null", "-X", "PUT", "--data-binary", "@-", url], input=body, check=True)
        wrk(url, 1)
        for round in range(rounds):
            for name, header in kinds if round % 2 == 0 else reversed(kinds):
                before = node.cpu()
                requests, _ = wrk(url, seconds, *header)
                figures[name].append(((node.cpu() - before) / requests * 1e6, requests / seconds))
        plain = statistics.median(cpu for cpu, _ in figures["none"])
        print("\n| credentials | µs of CPU | ÷ none | requests/s |\n| --- | --- | --- | --- |")
        for name, _ in kinds:
            cpu, rate = (statistics.median(column) for column in zip(*figures[name]))
            print(f"| {name} | {cpu:.1f} | {cpu / plain:.2f} | {rate:,.0f} |", flush=True)
    finally:
        node.stop()


class SlowOrigin(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        time.sleep(SLOW)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Origin(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def overload(build, directory, rounds, seconds):
    """Hits with and without twice the misses that fill.max_in_flight allows, at an origin that takes 5 s for each."""
    origin = Origin(("127.0.0.1", 18130), SlowOrigin)
    threading.Thread(target=origin.serve_forever, daemon=True).start()
    node = castier(build, directory, 18140, origin="http://127.0.0.1:18130", FILL__MAX_IN_FLIGHT=FILLS, FILL__MAX_WAIT="100ms", LIMITS__NEGATIVE_TTL="0s")
    answers = []

    context = multiprocessing.get_context("fork")

    def client(target, stop, answers):
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", 18140, timeout=60)
            began = time.monotonic()
            connection.request("GET", target())
            answers.put((connection.getresponse().status, time.monotonic() - began))
            connection.close()
            # A client that got 503 comes back after a second, as Retry-After says.
            stop.wait(1)

    def clients(target, stop, answers):
        # Those that are measured go first.
        os.nice(19)
        threads = [threading.Thread(target=client, args=(target, stop, answers), daemon=True) for _ in range(2 * FILLS)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]

    def storm(target):
        stop, answers = context.Event(), context.Queue()
        others = context.Process(target=clients, args=(target, stop, answers))
        others.start()
        time.sleep(2)
        p99 = wrk(url, seconds, connections=8)[1]
        stop.set()
        told = []
        while others.is_alive() or not answers.empty():
            try:
                told.append(answers.get(timeout=0.2))
            except queue.Empty:
                pass
        others.join()
        return p99, told

    try:
        ready(18141)
        body = os.urandom(1024)
        path = f"/cas/{hashlib.sha256(body).hexdigest()}"
        connection = http.client.HTTPConnection("127.0.0.1", 18140)
        connection.request("PUT", path, body)
        connection.getresponse().read()
        url = f"http://127.0.0.1:18140{path}"
        wrk(url, 2, connections=8)
        calm, others, stormy = [], [], []
        for _ in range(rounds):
            calm.append(wrk(url, seconds, connections=8)[1])
            # The clients themselves take time from those that are measured. These ask for what costs nothing.
            others.append(storm(lambda: "/cas/no-digest")[0])
            p99, told = storm(lambda: f"/cas/{os.urandom(32).hex()}")
            stormy.append(p99)
            answers += told
        refused = sorted(took for status, took in answers if status == 503)
        print(f"\nhits, p99: {statistics.median(calm):.3f} ms alone, {statistics.median(others):.3f} ms beside {2 * FILLS} clients that get 400, "
              f"{statistics.median(stormy):.3f} ms beside as many whose blobs are not kept "
              f"({statistics.median(b / a for a, b in zip(calm, stormy)):.2f} and {statistics.median(b / a for a, b in zip(others, stormy)):.2f} times); {len(refused)} misses got 503, half of them within "
              f"{refused[len(refused) // 2] * 1000:.0f} ms; {sum(status == 404 for status, _ in answers)} were answered by the origin")
    finally:
        node.stop()
        origin.shutdown()


def main():
    # As the clients that it starts.
    os.sched_setaffinity(0, {1})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", help="the directory with castier's program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--only", choices=["costs", "credentials", "overload"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-entrance-") as directory:
        for part in (costs, credentials, overload):
            if arguments.only in (None, part.__name__):
                part(arguments.build, directory, arguments.rounds, arguments.seconds)


main()
