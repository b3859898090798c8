"""Starts the servers, finds them in /proc, and stops them. Nothing stays after the run, and other processes are not touched."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

SERVER_CPU, LOAD_CPU = "0", "1"
PROGRAMS = os.path.abspath(os.path.join(os.environ.get("CARGO_TARGET_DIR", "target"), "release"))
TICK = os.sysconf("SC_CLK_TCK")
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port():
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url, timeout=10):
    """The body of a 200."""
    return NO_PROXY.open(url, timeout=timeout).read()


class Server:
    """A server on a free port with its data in its own directory; a context manager."""

    name = "?"
    cpu_list = SERVER_CPU

    def __init__(self, directory, origin=None, memory="1024m", cpu_list=None):
        self.directory, self.origin, self.memory = directory, origin, memory
        self.cpu_list = cpu_list or self.cpu_list
        self.port, self.admin = free_port(), free_port()
        self.process = None
        # When it was run, by time.monotonic().
        self.started = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def command(self):
        """The command that runs it in the foreground."""
        raise NotImplementedError

    def __enter__(self):
        os.makedirs(self.directory)
        log = open(os.path.join(self.directory, "log"), "wb")
        command = ["taskset", "-c", self.cpu_list, *self.command()]
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory, env=environment())
        try:
            self.wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_it_answers(self):
        deadline = time.monotonic() + 15
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(os.path.join(self.directory, "log"), errors="replace") as log:
                    raise SystemExit(f"bench: {self.name} does not start:\n{log.read()[-2000:]}")
            try:
                get(f"{self.url}/cas/not-a-digest", timeout=1)
            except urllib.error.HTTPError as answer:
                if answer.code == 400:
                    return
            except OSError:
                pass
            time.sleep(0.02)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                for pid in reversed(self.pids()):
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()

    def pids(self):
        """The server's process and all that descend from it."""
        parents = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                parents.setdefault(int(stat(entry)[1]), []).append(int(entry))
            except OSError:
                pass
        found = [self.process.pid]
        for pid in found:
            found.extend(parents.get(pid, []))
        return found

    def cpu_seconds(self):
        """CPU time of all the server's processes so far, in user space and in the kernel."""
        return sum(int(fields[11]) + int(fields[12]) for fields in map(stat, self.pids())) / TICK

    def memory_bytes(self):
        """Memory of all the server's processes, with shared memory counted once."""
        return sum(kib(f"/proc/{pid}/smaps_rollup", "Pss") for pid in self.pids()) * 1024

    def peak_bytes(self):
        """The peak of the resident memory, without the page cache."""
        return sum(kib(f"/proc/{pid}/status", "VmHWM") for pid in self.pids()) * 1024

    def version(self):
        raise NotImplementedError


def environment():
    """The environment without variables that configure castier."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CASTIER_")}


def stat(pid):
    """The fields of /proc/PID/stat after the process's name, which may have any characters."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()


def kib(path, field):
    with open(path) as file:
        return int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)[1])


def output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout.strip()


class Origin(Server):
    """The origin of all servers. It runs on the load's core, so that its work does not count for them."""

    name = "castier-origin"
    cpu_list = LOAD_CPU
    program = os.path.join(PROGRAMS, "castier-origin")

    def command(self):
        config = os.path.join(self.directory, "origin.toml")
        with open(config, "w") as file:
            file.write(
                f'allow_delete = true\n[listen]\npublic = "127.0.0.1:{self.port}"\nadmin = "127.0.0.1:{self.admin}"\n'
                f'[store]\nroot = "{self.directory}/blobs"\n[log]\nlevel = "warn"\n'
            )
        return [self.program, "--config", config]

    def gets(self):
        """Blobs that it has served since its start."""
        text = get(f"http://127.0.0.1:{self.admin}/metrics").decode()
        series = re.findall(r"^castier_origin_requests_total\{([^}]*)\} (\S+)$", text, re.MULTILINE)
        return sum(int(float(count)) for labels, count in series if 'method="GET"' in labels and re.search(r'code="20[06]"', labels))

    def put(self, blob):
        """Stores a blob. Returns its digest."""
        digest = hashlib.sha256(blob).hexdigest()
        NO_PROXY.open(urllib.request.Request(f"{self.url}/cas/{digest}", data=blob, method="PUT"), timeout=30).read()
        return digest

    def delete(self, digest):
        """Deletes a blob."""
        NO_PROXY.open(urllib.request.Request(f"{self.url}/cas/{digest}", method="DELETE"), timeout=30).read()


class Castier(Server):
    name = "castier"
    program = os.path.join(PROGRAMS, "castier")

    # Whole lines below [memory], and further tables.
    more = ""

    def command(self):
        config = os.path.join(self.directory, "castier.toml")
        with open(config, "w") as file:
            file.write(
                f'allow_delete = true\n[listen]\npublic = "127.0.0.1:{self.port}"\nadmin = "127.0.0.1:{self.admin}"\n'
                f'[origin]\nurl = "{self.origin.url}"\n[fill]\nparallel = 1\nspool_dir = "{self.directory}"\n[log]\nlevel = "warn"\n'
                f'[memory]\ncapacity = "{self.memory.replace("m", "MiB")}"\n{self.more.format(d=self.directory)}'
            )
        return [self.program, "--config", config]

    def version(self):
        return output(self.program, "--version")


class Nginx(Server):
    """proxy_cache with the settings that serve it best here."""

    name = "nginx"
    # The size of the key zone: enough for some hundred thousand keys.
    zone = "16m"
    # Avoids an open() for every hit.
    open_files = "max=100000 inactive=600s"

    def command(self):
        config = os.path.join(self.directory, "nginx.conf")
        with open(config, "w") as file:
            places = {"d": self.directory, "port": self.port, "origin": self.origin.port}
            file.write(NGINX.format(**places, zone=self.zone, open_files=self.open_files, size=self.memory))
        return ["nginx", "-p", self.directory, "-e", f"{self.directory}/error.log", "-c", config]

    def version(self):
        return output("nginx", "-v").removeprefix("nginx version: ")


# tcp_nopush off, since with it cached answers of 64 KiB stall for 40 ms.
NGINX = """
daemon off; worker_processes 1; pid {d}/pid; error_log {d}/error.log error;
user root;
events {{ worker_connections 20000; }}
http {{
  access_log off; sendfile on; tcp_nopush off; tcp_nodelay on; server_tokens off;
  keepalive_timeout 600s; keepalive_requests 1000000000;
  client_body_temp_path {d}/body; fastcgi_temp_path {d}/f; uwsgi_temp_path {d}/u; scgi_temp_path {d}/s; proxy_temp_path {d}/proxy;
  open_file_cache {open_files}; open_file_cache_valid 600s; open_file_cache_min_uses 1;
  proxy_cache_path {d}/cache levels=1:2 keys_zone=blobs:{zone} max_size={size} inactive=1d use_temp_path=off
                   manager_files=10000 manager_sleep=50ms manager_threshold=500ms;
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_cache blobs; proxy_cache_valid 200 1y; proxy_cache_lock on; proxy_cache_lock_timeout 600s; proxy_cache_lock_age 600s;
      proxy_max_temp_file_size 0;
    }}
  }}
}}
"""


class Varnish(Server):
    name = "varnish"

    def command(self):
        vcl = os.path.join(self.directory, "default.vcl")
        with open(vcl, "w") as file:
            file.write(
                f'vcl 4.1; backend origin {{ .host = "127.0.0.1"; .port = "{self.origin.port}"; }}\n'
                "sub vcl_backend_response { if (beresp.status == 200) { set beresp.ttl = 365d; } }\n"
            )
        settings = ["thread_pools=1", "timeout_idle=600"]
        parameters = [word for setting in settings for word in ("-p", setting)]
        store = ["-s", f"malloc,{self.memory}"]
        return ["varnishd", "-F", "-j", "none", "-n", f"{self.directory}/vsm", "-a", f"127.0.0.1:{self.port}", "-f", vcl, *store, *parameters]

    def version(self):
        return output("varnishd", "-V").splitlines()[0]


PEERS = (Castier, Nginx, Varnish)
