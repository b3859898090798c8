//! The configuration of `castier`, section by section.

use crate::{
    Access, Cluster, EventSink, KeyTemplate, ListenTls, Log, OriginUrl, Otlp, Policy, Proxies, Role, Route, S3, Shutdown, Size, Span,
    Write, address::Address, value::path_text,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The configuration of `castier`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Castier {
    /// Whether clients may delete blobs of the embedded origin.
    ///
    /// A remote origin decides this itself, and castier passes on its answer. Off by default: immutable content needs no deletion, and one
    /// wrong script would empty the store.
    pub allow_delete: bool,
    /// Whether the embedded origin answers 404 for an entry below `/ac/` that names a blob which it does not have.
    ///
    /// This is about entries that parse as an `ActionResult`: Bazel then runs the action again, and does not fail. A remote origin decides
    /// this itself. Off by default: ccache keeps other things below `/ac/`, and each GET there has to check all blobs of the entry.
    pub ac_validation: bool,
    /// `[listen]`.
    pub listen: Listen,
    /// `[access]`.
    pub access: Access,
    /// `[origin]`.
    pub origin: Origin,
    /// `[memory]`.
    pub memory: Memory,
    /// `[disk]`, if there is a disk tier.
    pub disk: Option<Disk>,
    /// `[cluster]`, if there are other nodes.
    pub cluster: Option<Cluster>,
    /// `[verify]`.
    pub verify: Verify,
    /// `[fill]`.
    pub fill: Fill,
    /// `[limits]`.
    pub limits: Limits,
    /// `[log]`.
    pub log: Log,
    /// `[otlp]`.
    pub otlp: Otlp,
    /// `[shutdown]`.
    pub shutdown: Shutdown,
    /// `[[route]]`, in the order of the file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub route: Vec<Route>,
    /// `[[events]]`, in the order of the file; `[events]` for one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<EventSink>,
}

impl Castier {
    /// Whether only this machine can reach the public listener.
    pub fn is_public_on_loopback(&self) -> bool {
        Address::parse(&self.listen.public).is_some_and(|address| address.is_on_loopback())
    }

    /// Whether castier itself decides what a client may do. If not, everybody may do everything that the origin allows.
    pub fn decides_access(&self) -> bool {
        self.access.has_users(&self.listen.tls) || self.access.anonymous != Role::Write
    }
}

/// The addresses that castier listens on. `0.0.0.0:PORT` is every interface; with port 0 the system picks a free port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Listen {
    /// The address for clients.
    ///
    /// The default is on the loopback: nobody can reach castier from outside until you say so.
    ///
    /// - Type: HOST:PORT
    pub public: String,
    /// The address for metrics, health checks, statistics and purges. It has no log-in unless `access.admin` is true.
    ///
    /// That is why the default is on the loopback.
    ///
    /// - Type: HOST:PORT
    pub admin: String,
    /// The address for other castier nodes. castier opens it only with `[cluster]`.
    ///
    /// Off the loopback it needs `cluster.secret_file`. For a host name the address that it resolves to counts.
    ///
    /// - Type: HOST:PORT
    pub peer: String,
    /// The address of castier in the links that it rewrites for routes, such as `https://cache.example`. Empty: as the client wrote it.
    ///
    /// Empty means the scheme and the `Host` of the request. That is right unless a proxy in front changes them, so it is the default. A path
    /// may follow, if the proxy in front removes it.
    ///
    /// - Type: URL
    pub external_url: String,
    /// The proxies in front, as networks (`10.0.0.0/8`) or addresses, that name the client for limits per client and in records.
    ///
    /// They name it in `X-Forwarded-For` or `Forwarded`, or with the PROXY protocol. `log.trusted_proxies` are believed in records, too. The default is none:
    /// anybody can write such a header.
    pub trusted_proxies: Proxies,
    /// Whether each connection to the public listener begins with a PROXY protocol header (version 1 or 2), as HAProxy and network load balancers
    /// send it.
    ///
    /// It is read from `listen.trusted_proxies` only; who else connects is refused. Off by default: a client could name any address.
    pub proxy_protocol: bool,
    /// `[listen.tls]`.
    pub tls: ListenTls,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            public: "127.0.0.1:8080".into(),
            admin: "127.0.0.1:8082".into(),
            peer: "127.0.0.1:8081".into(),
            external_url: String::new(),
            trusted_proxies: Proxies::default(),
            proxy_protocol: false,
            tls: ListenTls::default(),
        }
    }
}

/// The origin: the source of truth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// Where the origin is: `embedded:DIRECTORY`, `http://HOST:PORT` or `https://HOST:PORT` without a path, or a bucket of an object store:
    /// `s3://BUCKET`, `gs://BUCKET` or `az://CONTAINER`, and a prefix of its keys if you want one (`s3://BUCKET/PREFIX`).
    ///
    /// `embedded:DIRECTORY` runs the origin in this process. castier calls it directly for blobs, and relays everything else to its HTTP
    /// server on a free loopback port. It is the default, so that castier works without any configuration. The URL must not lead to castier
    /// itself. castier looks the name up in `/etc/hosts` and at the name servers
    /// in `/etc/resolv.conf`, in the background, at most every 5 s. If that fails, the last addresses stay in use. For basic authentication
    /// write `http://USER:PASSWORD@HOST` (percent-encoded). castier then sends them to the origin, except with a relayed request that has an
    /// `Authorization` of its own. Logs and `--print-config` mask them.
    pub url: OriginUrl,
    /// A PEM file with the authorities that may sign the certificate of an https origin. Empty: those that the system trusts.
    #[serde(serialize_with = "path_text")]
    pub ca_file: PathBuf,
    /// How long castier may take to open a connection to the origin, TLS included.
    ///
    /// The first look-up of the name has the same limit for itself. castier tries the last good address first, and each further address
    /// 250 ms after the one before it. The default is enough for one lost SYN, and tells a dead origin from a slow one while the client
    /// still waits.
    ///
    /// - Type: duration over 0
    pub connect_timeout: Span,
    /// How long the origin may be silent. The whole transfer may take longer.
    ///
    /// It is also the longest time from the end of a request to the whole head of its final answer; interim answers do not extend it. Disks
    /// that spin up and stores that page answer within the default.
    ///
    /// - Type: duration over 0
    pub read_timeout: Span,
    /// How often castier resumes a broken transfer, at the offset where it broke, with less than 64 KiB of progress in between.
    ///
    /// castier does not retry a source that was silent for `origin.read_timeout`. The pause between retries is 50 ms, then doubles up to
    /// 1 s, with jitter. The default helps over the restart of one of the origin's machines, and does not press an origin that is down.
    ///
    /// - Type: 0 to 100
    pub retries: u32,
    /// How many of a hundred requests for blobs may be retries of failed ones, over all clients.
    ///
    /// Without it an origin that fails under its load would get `1 + origin.retries` times the load. Ten retries are free, and one more in each
    /// second, so that a node with few requests has its retries, too. A transfer that breaks after 64 KiB of progress and goes on is no retry.
    /// The default lets single failures pass unseen, and adds a tenth to an outage.
    ///
    /// - Type: 0 to 100
    pub retry_budget: u32,
    /// After how many failures in a row the circuit breaker opens: then requests for what is not kept fail at once. 0: never.
    ///
    /// A failure is a connection that cannot be opened or breaks before the answer, a silence of `origin.read_timeout`, or a 502 or 504 of a gateway that took
    /// over 100 ms: one that comes at once costs nobody time, and may be about one path only.
    /// Each server of a route has a breaker of its own. The default is more than one client with its retries makes, so that a single request
    /// does not open it.
    pub breaker_failures: u32,
    /// The longest time for which an open circuit breaker lets nothing pass.
    ///
    /// It begins with half a second, and doubles each time. After failures that come at once, such as a refused connection, it is 100 ms. After it one
    /// request may try; if the origin answers, the breaker closes. The default
    /// is how long clients may wait for an origin that is back.
    ///
    /// - Type: duration over 0
    pub breaker_pause: Span,
    /// How many small requests castier may have at the origin at once: HEAD, DELETE, and uploads of up to 64 KiB.
    ///
    /// Fills and streamed uploads do not count. In a cluster each peer has the same limit for itself. The default is as many as fills: if a
    /// thousand clients store something small at the same moment, they use each other's connections, and the origin does not have to accept
    /// a thousand.
    ///
    /// - Type: 1 to 65536
    pub max_requests: usize,
    /// For a bucket: how the key of a blob is made of its SHA-256, behind the prefix.
    ///
    /// `{sha256}` is the whole digest, `{sha256:2}` its first two characters, `{sha256:2:4}` those from the third to the fourth. With the
    /// layout of another program castier reads what that program wrote, and the other way round: see object-stores.md. The default is that of
    /// bazel-remote.
    ///
    /// - Type: key template
    pub key: KeyTemplate,
    /// For a bucket: how long castier relies on what it has seen to be stored there, when a client asks whether a blob is there or uploads it
    /// once more. 0s: never.
    ///
    /// Most requests of build caches ask just that. What is deleted through castier is forgotten at once; another program that deletes objects is
    /// noticed after this time. In the meantime castier would acknowledge an upload of such a blob without storing it.
    pub existence_ttl: Span,
    /// For a bucket: when an upload is acknowledged. `through`: once the bucket has it. `behind`: once it is durable in the outbox of this node,
    /// which is in `disk.path`, and castier uploads it after that.
    ///
    /// With `behind` uploads are as fast as the disk and go on while the bucket is down, but until they are uploaded other users of the bucket do
    /// not see them, and they are lost if this disk is. So the default is `through`. object-stores.md has the details.
    pub write: Write,
    /// `[origin.s3]`.
    pub s3: S3,
}

impl Default for Origin {
    fn default() -> Self {
        Self {
            url: OriginUrl::Embedded("./castier-data/origin".into()),
            ca_file: PathBuf::new(),
            connect_timeout: Span::secs(2),
            read_timeout: Span::secs(30),
            retries: 2,
            retry_budget: 10,
            breaker_failures: 10,
            breaker_pause: Span::secs(5),
            max_requests: 256,
            key: KeyTemplate::default(),
            existence_ttl: Span::secs(60),
            write: Write::Through,
            s3: S3::default(),
        }
    }
}

/// The memory tier, which castier asks first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// How many bytes the blobs in memory may take, bookkeeping included.
    ///
    /// The bookkeeping is some 420 B for each blob. The default fits what is hot, on a machine that does other things too.
    ///
    /// - Type: size over 0
    pub capacity: Size,
    /// The largest blob that castier keeps in memory. Larger ones are kept on disk, or only pass through.
    ///
    /// It must fit into `memory.capacity` without the part that is `cluster.mirror_share`, and into `fill.memory`. With the default one blob
    /// cannot push out hundreds.
    ///
    /// - Type: size over 0
    pub max_blob: Size,
    /// Which blobs stay when memory is full: those that are read often for their size (`tiny-lfu`), or those that were read last (`lru`).
    ///
    /// With `tiny-lfu` one pass over everything (a backup, a crawler) does not empty the cache. A part of the memory, at least
    /// `memory.max_blob`, is for the newest blobs, so that each blob up to that size stays for a while.
    pub policy: Policy,
}

impl Default for Memory {
    fn default() -> Self {
        Self { capacity: Size::mib(256), max_blob: Size::mib(8), policy: Policy::TinyLfu }
    }
}

/// The disk tier, which castier asks second and which survives restarts. Without this section there is none: a program that somebody only
/// tries should not fill a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// The directory of the disk tier. Each castier needs one of its own.
    ///
    /// castier makes it if it is missing, and locks it while it runs. The default is beside that of the embedded origin.
    #[serde(serialize_with = "path_text")]
    pub path: PathBuf,
    /// How many bytes the blobs on disk may take, in whole blocks of 4 KiB, as `du` counts.
    ///
    /// Blobs that are being written and the quarantine come on top ([Sizing](#sizing)). The default is forty times the memory tier, and most
    /// disks have it to spare.
    ///
    /// - Type: size over 0
    pub capacity: Size,
    /// Which blobs stay when the disk is full, as `memory.policy` has it.
    ///
    /// With `tiny-lfu` castier keeps a blob over a sixteenth of `disk.capacity` only if it evicts nothing, or from its second get on. A restart
    /// loses what the policy knew of frequency, and no blobs.
    pub policy: Policy,
    /// How many bytes may wait in memory to be written to disk. Beyond it castier does not keep blobs on disk.
    ///
    /// So a slow disk costs cache entries, and neither time nor memory. The default holds a burst of a second or so.
    ///
    /// - Type: size over 0
    pub write_behind: Size,
    /// How many files castier holds open between reads, so that it does not open a hot file for each hit.
    ///
    /// A large blob counts as several files, as 16 KiB of checksums count as one: the key bounds memory too. castier uses at most an eighth
    /// of the files that the system lets it open. The default leaves clients most of a common limit of open files.
    ///
    /// - Type: 1 or more
    pub open_files: u64,
    /// How many bytes a second castier reads back and hashes to find damaged blobs. 0: none.
    ///
    /// The default is 10 GiB in twenty minutes or a terabyte in a day and a half, and no disk notices it.
    pub scrub_rate: Size,
    /// How many bytes the damaged files may take that castier sets aside for inspection. 0: it deletes them at once.
    ///
    /// The oldest ones go first. The default is enough to tell a bad cable from a bad disk.
    pub quarantine: Size,
    /// How long the tier keeps no new blobs after its file system failed to write, and does nothing after it failed to answer.
    ///
    /// With the default castier does not ask a full disk with every blob, and soon uses one that has free space again.
    ///
    /// - Type: duration over 0
    pub cooldown: Span,
    /// How long a request waits for the file system of `disk.path`, before its blob comes from elsewhere.
    ///
    /// A healthy disk takes milliseconds, a busy one a second or two. Few clients wait for half a minute.
    ///
    /// - Type: duration over 0
    pub timeout: Span,
    /// How many threads may read from `disk.path` at once. A quarter as many may write.
    ///
    /// castier starts them as it needs them. The default keeps any disk busy. A file system that hangs can take all of them, and no more.
    ///
    /// - Type: 1 or more
    pub threads: usize,
    /// How many bytes the outbox may take: uploads that are acknowledged and not yet in the bucket (`origin.write = "behind"`), and events that are
    /// not yet delivered. Beyond it uploads get 507.
    ///
    /// It is below `disk.path`, and not a part of `disk.capacity`: nothing in it is evicted. Each upload counts 16 KiB more than its bytes, and takes
    /// 512 B of memory. The default holds what a busy build farm uploads in some minutes.
    ///
    /// - Type: 1MiB or more
    pub outbox: Size,
    /// How many uploads from the outbox may be on their way to the bucket at once.
    ///
    /// While the bucket fails it is one. The default is enough to hide its latency, and few beside the loads.
    ///
    /// - Type: 1 to 1024
    pub outbox_workers: usize,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            path: "./castier-data/cache".into(),
            capacity: Size::gib(10),
            policy: Policy::TinyLfu,
            write_behind: Size::mib(64),
            open_files: 1024,
            scrub_rate: Size::mib(8),
            quarantine: Size::mib(256),
            cooldown: Span::secs(30),
            timeout: Span::secs(5),
            threads: 64,
            outbox: Size::gib(4),
            outbox_workers: 16,
        }
    }
}

/// How castier verifies blobs on their way to clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verify {
    /// castier verifies a blob up to this size before it sends the first byte. It streams a larger one, and holds back the end.
    ///
    /// At most `fill.memory`. With the default the wait is a few milliseconds on a local network, and a corrupt blob is a clean 502 and not
    /// a cut connection.
    pub buffer_up_to: Size,
}

impl Default for Verify {
    fn default() -> Self {
        Self { buffer_up_to: Size::mib(1) }
    }
}

/// How castier loads the blobs that no tier keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fill {
    /// How many blobs castier may load from the origin at once.
    ///
    /// In a cluster each peer has the same limit for itself. The default hides an origin's latency, and is few enough connections for any
    /// origin.
    ///
    /// - Type: 1 to 65536
    pub max_in_flight: usize,
    /// How many bytes of blobs may be in memory outside the cache.
    ///
    /// These are the bytes that flights have received, copies of uploads that castier will keep or that another node is just taking, and
    /// blobs over 64 KiB that the cache has dropped and slow clients still read. Bytes that are only announced do not count, except the rest
    /// of a blob whose answer has said `stored`. The default is as much as the cache itself.
    ///
    /// - Type: size over 0
    pub memory: Size,
    /// A blob with more bytes than this is loaded in several ranges at once (`fill.parallel`). 0: none is.
    ///
    /// That needs a bucket, or an HTTP origin that sends `Accept-Ranges: bytes` and a strong `ETag`, as castier-origin does. With the default a load
    /// that one connection does in a second or two costs the origin no more requests.
    pub parallel_over: Size,
    /// How many ranges of one blob castier may read at once. 1: never more than one.
    ///
    /// Stores give each connection only so many bytes a second. Ranges have 8 MiB each. Those that are read ahead take at most half of `fill.memory`;
    /// without memory a blob is read over one connection. The default reads four times as fast, and leaves the origin to other blobs too.
    ///
    /// - Type: 1 to 64
    pub parallel: usize,
    /// How long a fill waits for a permit (`fill.max_in_flight`) before its clients get 503. 0: it does not wait.
    ///
    /// For a permit to ask a peer it waits half as long, and then asks the next source. The default evens out a burst. After that
    /// `Retry-After` serves a client better.
    pub max_wait: Span,
    /// How many fills may wait for a permit. The clients of one more get 503 at once. 0: none waits.
    ///
    /// Each costs some kilobytes. The default is a burst that a quick origin takes within `fill.max_wait`: many more would wait in vain.
    ///
    /// - Type: 0 or more
    pub max_waiting: usize,
    /// An existing directory for blobs that are too large for memory and only pass through. Empty: the system's temporary directory.
    ///
    /// The files there have no name. A blob that the disk tier will keep is written in `disk.path` instead. The system's temporary directory
    /// is often in memory: name a directory on a disk if blobs are large.
    #[serde(serialize_with = "path_text")]
    pub spool_dir: PathBuf,
    /// How many bytes all flights together may hold in files, those in `disk.path` included.
    ///
    /// At least `limits.max_blob`, if that is more than `memory.max_blob`. The default holds four of the largest blobs at once.
    ///
    /// - Type: size over 0
    pub spool: Size,
    /// When no client reads a fill any more, castier finishes it only if no more bytes than this remain.
    ///
    /// With the default castier keeps work that is nearly done, and a client that gave up on something huge costs the origin no more.
    pub finish_under: Size,
    /// How long a fill waits for the file system of `fill.spool_dir`, before its clients get 503.
    ///
    /// Nothing passes through that directory for the same time after that. The default is that of `disk.timeout`.
    ///
    /// - Type: duration over 0
    pub spool_timeout: Span,
    /// How many threads may work on files in `fill.spool_dir` at once.
    ///
    /// What they write goes to the page cache first, so few are enough. A file system that hangs can take all of them, and no more.
    ///
    /// - Type: 1 or more
    pub spool_threads: usize,
}

impl Default for Fill {
    fn default() -> Self {
        Self {
            max_in_flight: 256,
            parallel_over: Size::mib(32),
            parallel: 4,
            memory: Size::mib(256),
            max_wait: Span::secs(2),
            max_waiting: 4096,
            spool_dir: PathBuf::new(),
            spool: Size::gib(64),
            finish_under: Size::mib(8),
            spool_timeout: Span::secs(5),
            spool_threads: 32,
        }
    }
}

/// What clients may do.
///
/// - Live: yes
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// The largest blob that castier takes from a client or loads.
    ///
    /// The default is above any disk image or model that is commonly stored, and still ends an endless body.
    ///
    /// - Type: size over 0
    pub max_blob: Size,
    /// The largest entry below `/ac/` and `/kv/` that the embedded origin takes.
    ///
    /// The result of an action or a compressed object file is far smaller than the default.
    ///
    /// - Type: size over 0
    pub max_entry: Size,
    /// How many client connections may be open.
    ///
    /// Where the system grants too few open files castier accepts fewer, and logs how many at the start. The default is what a process may
    /// hold open with common limits of open files.
    ///
    /// - Type: 1 or more
    pub max_connections: usize,
    /// How many connections from other nodes may be open.
    ///
    /// They are counted apart from those of clients, so that neither can starve the other. The default is enough for eight
    /// nodes with the default `fill.max_in_flight` and `origin.max_requests`.
    ///
    /// - Type: 1 or more
    pub max_peer_connections: usize,
    /// How many connections to the admin listener may be open.
    ///
    /// They are counted apart from those of clients, so that neither can starve the other. The default is enough for many scrapers and health
    /// checks.
    ///
    /// - Type: 1 or more
    pub max_admin_connections: usize,
    /// How many bytes clients may make castier hold beside blobs: incomplete heads, waiting requests, relays and uploads.
    ///
    /// Beyond it such requests get 503. Hits from memory and health checks need none of it. [Sizing](#sizing) has what each costs. The
    /// default is enough for some thousand waiting requests, and small beside the cache.
    ///
    /// - Type: 1MiB or more
    pub client_memory: Size,
    /// How long a client may take to send the whole head of a request.
    ///
    /// The time starts with the first byte of the head, on a new connection with the connection. The default is enough for slow links, and
    /// not for slowloris.
    ///
    /// - Type: duration over 0
    pub header_timeout: Span,
    /// The largest head of a request.
    ///
    /// The default is four times what common servers take.
    ///
    /// - Type: 1KiB to 1MiB
    pub max_header_bytes: Size,
    /// How many header fields a request may have.
    ///
    /// The default is that of common servers.
    ///
    /// - Type: 1 to 256
    pub max_headers: usize,
    /// How long a kept-alive connection may wait for its next request, and how long an upload may be silent.
    ///
    /// ingress-nginx and the load balancers of AWS use a connection again after up to 60 s, and get an error if castier closes it just then.
    /// The default is longer than that.
    ///
    /// - Type: duration over 0
    pub idle_timeout: Span,
    /// A connection is cut when its client has taken no byte of an answer for this long.
    ///
    /// A stalled reader holds memory; a slow one is welcome.
    ///
    /// - Type: duration over 0
    pub write_timeout: Span,
    /// How long castier remembers that the origin does not have a blob. 0: it does not remember that.
    ///
    /// A PUT or POST through castier ends it at once. With the default a storm of requests for a missing blob costs the origin one request a
    /// second, and a blob that somebody stored at the origin directly appears soon.
    pub negative_ttl: Span,
    /// How many absent blobs castier remembers.
    ///
    /// The default takes a few MiB.
    pub max_negative: usize,
    /// How many bytes the name table of the routes may take, in memory and as much again on disk.
    ///
    /// It has the names of what routes keep that have no digest in them: tags, versions, index files. Bodies do not count. When it is full, castier
    /// drops names that are seldom read, and asks the upstream when they are needed. An entry takes 1 to 2 KiB, so the default is enough for
    /// some forty thousand names. Without a route, up to 2 MiB in memory for `/ac` and `/kv`.
    ///
    /// - Type: 1MiB or more
    /// - Live: no
    pub names: Size,
    /// How many requests a second one client address may send; as many may come at once. 0: no limit. Beyond it: 429 with `Retry-After`.
    ///
    /// An IPv6 client is its /64. Behind a proxy see `listen.trusted_proxies`. The default is none: a build farm behind one address is one client.
    pub requests_per_second: u32,
    /// How many connections one client address may have open. 0: no limit. Beyond it a connection gets 429 and is closed.
    ///
    /// The default is none, as for `limits.requests_per_second`.
    pub connections_per_client: u32,
    /// How many bytes of response bodies one client address may get in a second, over all its connections. 0: no limit.
    ///
    /// Beyond it castier sends more slowly. The default is none: a cache is there to be fast.
    pub bandwidth_per_client: Size,
    /// How many requests may be open at once on one HTTP/2 connection.
    ///
    /// Clients are told, and wait. A changed value holds for new connections, as with the other keys of HTTP/2. Each open request counts towards `limits.client_memory` as one of HTTP/1.1 does. The default is that of nginx.
    ///
    /// - Type: 1 to 65536
    pub http2_streams: u32,
    /// How many bytes of an upload over HTTP/2 may come before castier has passed on those before them, for each request.
    ///
    /// They count towards `limits.client_memory`. An upload gets at most this much in one round trip: the default is 5 MB/s at 50 ms.
    ///
    /// - Type: 64KiB to 16MiB
    pub http2_window: Size,
    /// How many requests a second an HTTP/2 client may cancel on one connection; as many may come at once. Beyond it the connection is closed.
    ///
    /// Requests that are opened and cancelled at once cost the server more than the client ("rapid reset"). The default is more than a browser
    /// cancels when its page is left.
    ///
    /// - Type: 1 or more
    pub http2_resets: u32,
    /// How many HTTP/2 frames a second that carry nothing may come on one connection; as many may come at once. Beyond it the connection is closed.
    ///
    /// These are PING, SETTINGS, PRIORITY, CONTINUATION, empty DATA and unknown frames, and WINDOW_UPDATE frames beyond one for each 256 bytes of
    /// answers. The default is far more than clients need.
    ///
    /// - Type: 1 or more
    pub http2_idle_frames: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_blob: Size::gib(16),
            max_entry: Size::mib(16),
            max_connections: 20_000,
            max_peer_connections: 4096,
            max_admin_connections: 128,
            client_memory: Size::mib(64),
            header_timeout: Span::secs(10),
            max_header_bytes: Size::kib(32),
            max_headers: 100,
            idle_timeout: Span::secs(75),
            write_timeout: Span::secs(60),
            negative_ttl: Span::secs(1),
            max_negative: 65_536,
            names: Size::mib(64),
            requests_per_second: 0,
            connections_per_client: 0,
            bandwidth_per_client: Size::new(0),
            http2_streams: 128,
            http2_window: Size::kib(256),
            http2_resets: 200,
            http2_idle_frames: 1000,
        }
    }
}
