"""Runs an origin, a cluster of nodes and other programs on this machine's loopback. For scripts/soak and scripts/demo."""

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import seaweedfs

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(HERE, "target")), "release")
PROGRAMS = ["castier", "castier-origin", "castier-load"]
# Requests to this machine ignore http_proxy.
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
NAME = os.path.basename(sys.argv[0])
# Variables for another castier must not affect these.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("CASTIER_")}


def seconds(text):
    match = re.fullmatch(r"(\d+)([smh])", text)
    if not match:
        raise argparse.ArgumentTypeError("write a duration such as 30s, 10m or 1h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Ports:
    """The ports of a cluster: nine for the cluster, then ten for each node, then ten for a store of objects."""

    def __init__(self, first, count):
        self.first, self.count = first, count
        self.store = [first + 10 * (count + 1) + n for n in range(seaweedfs.PORTS)]
        self.origin, self.origin_admin = first + 2, first + 3
        # Public, admin, peer, as in scripts/cluster.
        self.nodes = [(first + 10 * n, first + 10 * n + 2, first + 10 * n + 1) for n in range(1, count + 1)]

    def all(self):
        return [*range(self.first, self.first + 5), *(port for node in self.nodes for port in node), *self.store]

    def taken(self):
        return [port for port in self.all() if not is_free(port)]

    @classmethod
    def find(cls, count):
        """Free ports below those that the system uses for outgoing connections. Otherwise such a connection could take the port of a node that is down."""
        try:
            with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
                end = int(file.read().split()[0])
        except OSError:
            end = 32768
        bases = list(range(8200, end - 10 * count - 20, 100))
        # Random, so that two runs that start at the same moment rarely choose the same.
        random.shuffle(bases)
        for base in bases:
            ports = cls(base, count)
            if not ports.taken():
                return ports
        raise SystemExit(f"{NAME}: found no {len(cls(0, count).all())} free ports")


class Server:
    """A process that can be started, killed, stopped and continued. All its runs write to one log."""

    def __init__(self, name, directory, command, ready, pause=time.sleep, own_session=False):
        """`ready`: a URL that answers 200 when the process is ready. `pause`: the function to wait with. `own_session`: Ctrl-C in the terminal does not reach it."""
        self.name, self.command, self.ready, self.pause, self.own_session = name, command, ready, pause, own_session
        self.directory = directory
        self.log = open(os.path.join(directory, f"{name}.log"), "ab")
        self.process = None

    def start(self):
        self.spawn()
        self.wait()

    def spawn(self):
        self.process = subprocess.Popen(
            self.command,
            cwd=self.directory,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=self.own_session,
        )

    def wait(self):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"{NAME}: {self.name} ended by itself with {self.process.returncode}; it said:\n{self.said()}")
            try:
                NO_PROXY.open(self.ready, timeout=2).read()
                return
            except OSError:
                self.pause(0.05)
        raise SystemExit(f"{NAME}: {self.name} is not ready after 30 s; it said:\n{self.said()}")

    def said(self):
        """The end of its log."""
        with open(self.log.name, errors="replace") as file:
            return "".join(file.readlines()[-5:]).rstrip()

    def ended(self):
        return self.process is not None and self.process.poll() is not None

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def ask_to_end(self):
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)

    def end(self, limit=40):
        self.ask_to_end()
        if self.process:
            try:
                self.process.wait(limit)
            except subprocess.TimeoutExpired:
                self.kill()

    def usage(self):
        """Resident bytes and open files; None while it does not run."""
        try:
            with open(f"/proc/{self.process.pid}/status") as status:
                resident = int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) << 10
            return resident, len(os.listdir(f"/proc/{self.process.pid}/fd"))
        except (OSError, TypeError):
            return None


class Cluster:
    """An origin, and nodes with disk tiers. Entering the context starts them."""

    def __init__(self, directory, ports, origin_config="", node_config="", asked_at=None, bucket=None, **server):
        """`node_config`: further TOML for each node, of other sections. `asked_at`: the URL that the nodes use as origin, if it is not the origin's own.
        `bucket`: a `seaweedfs.Store` with all blobs. Then the nodes ask it, at `asked_at`, and the origin is only an HTTP interface over it."""
        self.origin_url = f"http://127.0.0.1:{ports.origin}"
        self.origin_admin = f"http://127.0.0.1:{ports.origin_admin}"
        self.store = os.path.join(directory, "origin")
        origin = os.path.join(directory, "origin.toml")
        with open(origin, "w") as file:
            file.write(f'{origin_config}\n[listen]\npublic = "127.0.0.1:{ports.origin}"\nadmin = "127.0.0.1:{ports.origin_admin}"\n')
            file.write(bucket.config("store") if bucket else f'[store]\nroot = "{self.store}"\n')
        command = [f"{TARGET}/castier-origin", "--config", origin]
        self.origin = Server("origin", directory, command, f"{self.origin_admin}/healthz", **server)
        peers = ", ".join(f'"127.0.0.1:{peer}"' for _, _, peer in ports.nodes)
        # Without a secret, nodes do not send uploads to their owners.
        secret = os.path.join(directory, "secret")
        with open(os.open(secret, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(os.urandom(32).hex())
        self.urls = [f"http://127.0.0.1:{public}" for public, _, _ in ports.nodes]
        self.admins = [f"http://127.0.0.1:{admin}" for _, admin, _ in ports.nodes]
        names = [f"node-{n}" for n in range(1, ports.count + 1)]
        self.disks = [os.path.join(directory, name) for name in names]
        self.nodes = []
        for n, (public, admin, peer) in enumerate(ports.nodes):
            config = os.path.join(directory, f"{names[n]}.toml")
            with open(config, "w") as file:
                file.write(f'[listen]\npublic = "127.0.0.1:{public}"\nadmin = "127.0.0.1:{admin}"\npeer = "127.0.0.1:{peer}"\n')
                file.write(bucket.config("origin", asked_at) if bucket else f'[origin]\nurl = "{asked_at or self.origin_url}"\n')
                file.write(f'[cluster]\nadvertise = "127.0.0.1:{peer}"\npeers = [{peers}]\nsecret_file = "{secret}"\n')
                file.write(node_config.replace("DISK", self.disks[n]))
            command = [f"{TARGET}/castier", "--config", config]
            self.nodes.append(Server(names[n], directory, command, f"{self.admins[n]}/readyz", **server))

    def wait_for_peers(self, pause=time.sleep):
        """Waits until each node knows that the others are up. A node that started before them found them down, and asks the origin in their place until
        its next probe; what it loads then, the owner does not have."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            metrics = [NO_PROXY.open(f"{admin}/metrics", timeout=10).read().decode() for admin in self.admins]
            if all(len(re.findall(r"^castier_peer_up\{.*\} 1$", of_node, re.M)) == len(self.nodes) - 1 for of_node in metrics):
                return
            pause(0.05)
        raise SystemExit(f"{NAME}: the nodes do not find each other within 30 s; node-1 said:\n{self.nodes[0].said()}")

    def __enter__(self):
        try:
            for server in [self.origin, *self.nodes]:
                server.start()
            self.wait_for_peers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for server in [*self.nodes, self.origin]:
            server.end()
