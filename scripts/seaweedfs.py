"""SeaweedFS on this machine's loopback, with a bucket, and signed requests to it. For scripts/demo and scripts/bench store."""

import contextlib
import datetime
import hashlib
import hmac
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request

KEY, SECRET, REGION, BUCKET = "castier", "the-secret-of-a-store-on-the-loopback", "us-east-1", "blobs"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# How many ports it needs.
PORTS = 8


def find(tools):
    """The program: from the folder of scripts/setup-tests, or the machine's own. None if there is none."""
    return shutil.which("weed", path=os.pathsep.join([f"{tools}/bin", f"{tools}/venv/bin", os.environ.get("PATH", os.defpath)]))


def signed(method, host, path, length=0, now=None):
    """The headers of a request by AWS's signature version 4, without the hash of the body. `path` is escaped, and may have a query."""
    now = now or datetime.datetime.now(datetime.timezone.utc)
    time, (path, _, query) = now.strftime("%Y%m%dT%H%M%SZ"), path.partition("?")
    headers = {"host": host, "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": time}
    names, scope = ";".join(headers), f"{time[:8]}/{REGION}/s3/aws4_request"
    query = "&".join(sorted(part if "=" in part else f"{part}=" for part in query.split("&"))) if query else ""
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"{method}\n{path}\n{query}\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
    text = f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{SECRET}".encode()
    for part in [*scope.split("/"), text]:
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    authorization = f"AWS4-HMAC-SHA256 Credential={KEY}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
    return headers | {"authorization": authorization, "content-length": str(length)}


class Store:
    """Where its files are and how it is started. The caller runs `command`, and then calls `make_bucket`."""

    def __init__(self, directory, ports, program):
        self.directory, self.host = directory, f"127.0.0.1:{ports[0]}"
        self.url, self.filer = f"http://{self.host}", f"http://127.0.0.1:{ports[6]}"
        self.secret = os.path.join(directory, "store-secret")
        data, identities = os.path.join(directory, "store"), os.path.join(directory, "store.json")
        os.makedirs(data, exist_ok=True)
        with open(os.open(self.secret, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(SECRET)
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        with open(identities, "w") as file:
            json.dump({"identities": [{"name": KEY, "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}]}, file)
        options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=100"]
        options += ["-volume.preStopSeconds=0", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-dir={data}", f"-s3.config={identities}"]
        for at, of in enumerate(["s3", "master", "volume", "filer"]):
            options += [f"-{of}.port={ports[2 * at]}", f"-{of}.port.grpc={ports[2 * at + 1]}"]
        self.command = [program, "-logtostderr=true", "server", *options]
        self.sockets = [f"/tmp/seaweedfs-{of}-{kind}{port}.sock" for at, of in enumerate(["s3", "master", "volume", "filer"])
                        for kind, port in (("", ports[2 * at]), ("grpc-", ports[2 * at + 1]))]

    def remove_sockets(self):
        """What it leaves behind when it is killed."""
        for socket in self.sockets:
            with contextlib.suppress(FileNotFoundError):
                os.remove(socket)

    def config(self, table="origin", endpoint=None):
        """TOML with the bucket as castier's origin, or as the store of castier-origin."""
        keys = f'endpoint = "{endpoint or self.url}"\naccess_key_id = "{KEY}"\nsecret_access_key_file = "{self.secret}"\n'
        return f'[{table}]\nurl = "s3://{BUCKET}"\n[{table}.s3]\n{keys}'

    def ask(self, method, path, body=None):
        """Status and body of a request to S3."""
        request = urllib.request.Request(self.url + path, body, signed(method, self.host, path, len(body or b"")), method=method)
        try:
            with NO_PROXY.open(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def make_bucket(self, pause):
        """Waits with `pause` until it stores and gives back. At its start, and at the first object of a bucket, it fails for some time."""
        for _ in range(600):
            self.ask("PUT", f"/{BUCKET}")
            if self.ask("PUT", f"/{BUCKET}/first", b"x")[0] == 200 and self.ask("GET", f"/{BUCKET}/first") == (200, b"x"):
                return
            pause(0.05)
        raise SystemExit("SeaweedFS stores nothing within 30 s")

    def digests(self):
        """The blobs in the bucket."""
        found = []
        for directory in self.entries("cas"):
            found += [entry.rsplit("/", 1)[1] for entry in self.entries(f"cas/{directory.rsplit('/', 1)[1]}")]
        return found

    def entries(self, below):
        # Its own interface, which is open on the loopback.
        request = urllib.request.Request(f"{self.filer}/buckets/{BUCKET}/{below}/?limit=10000", headers={"accept": "application/json"})
        with NO_PROXY.open(request, timeout=10) as answer:
            return [entry["FullPath"] for entry in json.load(answer)["Entries"] or []]
