"""Many clients pull one cold image at once: through castier nodes that act as one cache, and through docker-registry's own pull-through cache. See scripts/bench.

Each client does what container runtimes do: the version check, a HEAD and a GET of the tag, then all blobs, three at a time, and hashes every byte. The
registry is behind a counter of its requests, so that the report says how often it was asked for each blob.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time

TYPES = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
PIECE = 1 << 20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def store(root, layers, size):
    """Writes an image into the directory of a registry, in the layout of its file system driver. Returns the digests of its blobs."""
    blobs, links = pathlib.Path(root, "docker/registry/v2/blobs/sha256"), pathlib.Path(root, "docker/registry/v2/repositories/app")

    def blob(body):
        digest = hashlib.sha256(body).hexdigest()
        directory = blobs / digest[:2] / digest
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "data").write_bytes(body)
        link = links / "_layers/sha256" / digest
        link.mkdir(parents=True, exist_ok=True)
        (link / "link").write_text(f"sha256:{digest}")
        return {"digest": f"sha256:{digest}", "size": len(body)}

    config = blob(b"{}") | {"mediaType": "application/vnd.oci.image.config.v1+json"}
    parts = [blob(random.Random(number).randbytes(size)) | {"mediaType": "application/vnd.oci.image.layer.v1.tar"} for number in range(layers)]
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": parts}
    digest = blob(json.dumps(manifest).encode())["digest"].removeprefix("sha256:")
    for directory in [links / "_manifests/revisions/sha256" / digest, links / "_manifests/tags/1/current"]:
        directory.mkdir(parents=True)
        (directory / "link").write_text(f"sha256:{digest}")
    index = links / "_manifests/tags/1/index/sha256" / digest
    index.mkdir(parents=True)
    (index / "link").write_text(f"sha256:{digest}")
    return [config["digest"], *(part["digest"] for part in parts)]


class Counter(http.server.ThreadingHTTPServer):
    """Passes requests on to the registry, and counts them."""

    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, *_):
        """A connection that the other side closes is no news."""

    def __init__(self, registry):
        self.seen, self.lock = collections.Counter(), threading.Lock()

        class Pass(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                with self.server.lock:
                    self.server.seen[f"{self.command} {self.path}"] += 1
                connection = http.client.HTTPConnection("127.0.0.1", registry, timeout=60)
                connection.putrequest(self.command, self.path, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("host", "connection"):
                        connection.putheader(name, value)
                connection.endheaders()
                answer = connection.getresponse()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                while piece := answer.read(PIECE):
                    self.wfile.write(piece)

            do_HEAD = do_GET

        super().__init__(("127.0.0.1", 0), Pass)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Server:
    """A program, and the CPU time that it takes."""

    running = []

    def __init__(self, command, port, **options):
        self.port = port
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        self.running.append(self)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise SystemExit(f"images: {command[0]} does not start") from None
                time.sleep(0.05)

    def cpu(self):
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmHWM"))

    @classmethod
    def end_all(cls):
        for server in cls.running:
            server.process.terminate()
        for server in cls.running:
            server.process.wait(60)


def registry(directory, config):
    port = free_port()
    file = pathlib.Path(directory, f"{port}.yml")
    file.write_text(f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n{config}")
    program = shutil.which("docker-registry") or "/usr/bin/docker-registry"
    return Server([program, "serve", str(file)], port, cwd=directory)


def pull(port):
    """Pulls the image. Returns how long the first byte of a blob took, and all of it."""
    begun, first = time.monotonic(), []
    headers = {"Accept": TYPES}

    def get(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"images: {answer.status} to {method} {path}: {answer.read(500)}")
        return answer

    get("GET", "/v2/").read()
    get("HEAD", "/v2/app/manifests/1").read()
    manifest = json.loads(get("GET", "/v2/app/manifests/1").read())

    def blob(part):
        answer, digest = get("GET", f"/v2/app/blobs/{part['digest']}"), hashlib.sha256()
        while piece := answer.read(PIECE):
            first.append(time.monotonic() - begun)
            digest.update(piece)
        if f"sha256:{digest.hexdigest()}" != part["digest"]:
            raise SystemExit(f"images: {part['digest']} arrived as {digest.hexdigest()}")

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(blob, [manifest["config"], *manifest["layers"]]))
    return min(first), time.monotonic() - begun


def measure(name, ports, clients, counter, blobs, servers):
    counter.seen.clear()
    before = sum(server.cpu() for server in servers)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        times = list(pool.map(pull, [ports[number % len(ports)] for number in range(clients)]))
    cpu = sum(server.cpu() for server in servers) - before
    asked = [counter.seen[f"GET /v2/app/blobs/{digest}"] for digest in blobs]
    row = [name, f"{max(end for _, end in times):.1f} s", f"{statistics.median(end for _, end in times):.1f} s",
           f"{statistics.median(first for first, _ in times):.2f} s", f"{max(asked)}", f"{sum(counter.seen.values())}", f"{cpu:.1f} s",
           " ".join(f"{server.peak()}" for server in servers) + " MiB"]
    print("| " + " | ".join(row) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench images", description=__doc__)
    parser.add_argument("build", help="directory with the program castier")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layer-mib", type=int, default=128)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        blobs = store(f"{directory}/images", arguments.layers, arguments.layer_mib << 20)
        upstream = registry(directory, f"storage: {{filesystem: {{rootdirectory: '{directory}/images'}}}}\n")
        counter = Counter(upstream.port)
        address = f"http://127.0.0.1:{counter.server_address[1]}"
        peers = [free_port() for _ in range(arguments.nodes)]
        nodes = []
        pathlib.Path(directory, "secret").write_text("the-secret-of-these-nodes-which-nobody-else-knows")
        for number, peer in enumerate(peers):
            public, admin = free_port(), free_port()
            file = pathlib.Path(directory, f"node{number}.toml")
            file.write_text(
                f"[listen]\npublic = '127.0.0.1:{public}'\nadmin = '127.0.0.1:{admin}'\npeer = '127.0.0.1:{peer}'\n"
                f"[origin]\nurl = 'embedded:{directory}/origin{number}'\n[log]\nlevel = 'warn'\n"
                f"[disk]\npath = '{directory}/disk{number}'\ncapacity = '4GiB'\n"
                f"[cluster]\nadvertise = '127.0.0.1:{peer}'\nsecret_file = '{directory}/secret'\n"
                f"peers = [{', '.join(repr(f'127.0.0.1:{peer}') for peer in peers)}]\n"
                f"[[route]]\nprotocol = 'oci'\nupstream = '{address}'\naccess = 'local'\nttl = '60s'\n")
            nodes.append(Server([f"{arguments.build}/castier", "--config", str(file)], public))
        mirror = registry(directory, f"storage: {{filesystem: {{rootdirectory: '{directory}/mirror'}}}}\nproxy: {{remoteurl: '{address}'}}\n")
        time.sleep(3)
        print("| | last client | median client | first byte of a blob | most GETs of a blob at the registry | requests at the registry | CPU | peak memory |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for run in ["cold", "again"]:
            measure(f"castier, {arguments.nodes} nodes, {run}", [node.port for node in nodes], arguments.clients, counter, blobs, nodes)
            measure(f"docker-registry as a pull-through cache, {run}", [mirror.port], arguments.clients, counter, blobs, [mirror])


if __name__ == "__main__":
    try:
        main()
    finally:
        Server.end_all()
