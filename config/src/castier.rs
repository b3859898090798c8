//! The configuration of `castier`, section by section.

use crate::{Cluster, Log, OriginUrl, Otlp, Policy, Shutdown, Size, Span};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that can be told to `castier`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Castier {
    /// Whether clients may delete blobs of the embedded origin, true or false; a remote origin decides for itself. Default false:
    /// immutable content needs no deletion, and one wrong script would empty the store.
    pub allow_delete: bool,
    /// Whether the embedded origin answers 404 for an entry below `/ac/` that names a blob which it does not have, true or false; a
    /// remote origin decides for itself. Default false: ccache keeps other things there.
    pub ac_validation: bool,
    /// Where the program listens.
    pub listen: Listen,
    /// The source of truth.
    pub origin: Origin,
    /// The memory tier.
    pub memory: Memory,
    /// The disk tier. Absent: there is none.
    pub disk: Option<Disk>,
    /// The nodes that together behave as one cache. Absent: this node is alone.
    pub cluster: Option<Cluster>,
    /// How blobs are checked on their way to clients.
    pub verify: Verify,
    /// How blobs are fetched.
    pub fill: Fill,
    /// What clients may do.
    pub limits: Limits,
    /// What is written about it.
    pub log: Log,
    /// Which spans are sent to a collector.
    pub otlp: Otlp,
    /// How the program ends.
    pub shutdown: Shutdown,
}

/// `[listen]`: addresses as `HOST:PORT`; `0.0.0.0:PORT` means every interface, port 0 one that the system picks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Listen {
    /// For clients, `HOST:PORT`. Default `127.0.0.1:8080`: reachable from outside only once somebody has said so.
    pub public: String,
    /// For metrics, health, statistics and purges, `HOST:PORT`. Default `127.0.0.1:8082`: it has no log-in, so it stays on
    /// the loopback.
    pub admin: String,
    /// For other castier nodes, `HOST:PORT`; opened only when a cluster is configured. Default `127.0.0.1:8081`, beside the
    /// others.
    pub peer: String,
}

impl Default for Listen {
    fn default() -> Self {
        Self { public: "127.0.0.1:8080".into(), admin: "127.0.0.1:8082".into(), peer: "127.0.0.1:8081".into() }
    }
}

/// `[origin]`: the source of truth, and how patient to be with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// `embedded:DIRECTORY`, `http://HOST:PORT` or `https://HOST:PORT`, with `USER:PASSWORD@` before the host if the origin wants to know
    /// who asks. Default `embedded:./castier-data/origin`, so that
    /// the program does something useful with no arguments.
    pub url: OriginUrl,
    /// A PEM file with the certificates that an https origin may be signed by; empty: those that the system trusts. Default
    /// empty.
    #[serde(serialize_with = "path_text")]
    pub ca_file: PathBuf,
    /// How long a connection may take to open, to any of the origin's addresses, TLS included; a duration over 0. Default `2s`: enough for one lost SYN, and a
    /// dead origin is told from a slow one while the client still waits.
    pub connect_timeout: Span,
    /// The longest silence of the origin, not the whole transfer, and the longest time from the end of a request to the whole head of its
    /// final answer; a duration over 0. Default `30s`: disks that spin up and
    /// stores that page answer in less.
    pub read_timeout: Span,
    /// How often a broken transfer is taken up again, at the offset where it broke, without any progress in between; 0 to
    /// 100. Default 2: helps over a restart of one of the origin's machines, and does not beat on an origin that is down.
    pub retries: u32,
    /// How many requests that are no fill and no streamed upload may be under way at once: HEAD, DELETE, and uploads of up to
    /// 64 KiB; 1 to 65536. Default 256, as many as fills: a thousand clients that store something small at the same moment use
    /// each other's connections, and the origin is not made to accept a thousand.
    pub max_requests: usize,
}

impl Default for Origin {
    fn default() -> Self {
        Self {
            url: OriginUrl::Embedded("./castier-data/origin".into()),
            ca_file: PathBuf::new(),
            connect_timeout: Span::secs(2),
            read_timeout: Span::secs(30),
            retries: 2,
            max_requests: 256,
        }
    }
}

/// `[memory]`: the first tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// What the blobs kept in memory may take, their bookkeeping included; a size over 0. Default `256MiB`: room for what is
    /// hot, on a machine that does other things too.
    pub capacity: Size,
    /// The largest blob that is kept in memory; a size over 0, at most `memory.capacity`. Larger ones only pass through.
    /// Default `8MiB`: one blob should not push out hundreds.
    pub max_blob: Size,
    /// Which blobs stay when memory is full: `tiny-lfu` (what is asked for often for its size) or `lru`. Default `tiny-lfu`: one pass
    /// over everything (a backup, a crawler) does not empty the cache.
    pub policy: Policy,
}

impl Default for Memory {
    fn default() -> Self {
        Self { capacity: Size::mib(256), max_blob: Size::mib(8), policy: Policy::TinyLfu }
    }
}

/// `[disk]`: the second tier, which survives restarts. Without this section there is none: a program that is only being tried
/// should not fill a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// The directory of the blobs; created if need be, and this process's alone. Default `./castier-data/cache`, beside the
    /// embedded origin's.
    #[serde(serialize_with = "path_text")]
    pub path: PathBuf,
    /// What the blobs kept there may take, in whole disk blocks; a size over 0. The blobs being written come on top. Default
    /// `10GiB`: some hundred times the memory tier, and most disks have it to spare.
    pub capacity: Size,
    /// Which blobs stay when the disk is full: `tiny-lfu` or `lru`. Default `tiny-lfu`, for the same reason as in memory.
    pub policy: Policy,
    /// Bytes that may wait in memory to be written; a size over 0. Beyond it blobs are not kept on disk, so that a slow disk costs
    /// cache entries and neither time nor memory. Default `64MiB`: a burst of a second or so.
    pub write_behind: Size,
    /// How many files are held open between reads, 1 or more. Default 1024: what is hot is not opened again with every hit, and
    /// clients keep most of a common limit of open files.
    pub open_files: u64,
    /// Bytes a second that are read back and hashed to find what rotted; a size, 0 never looks. Default `8MiB`: 10 GiB in
    /// twenty minutes, a terabyte in a day and a half, unnoticed by any disk.
    pub scrub_rate: Size,
    /// What damaged files that were set aside for inspection may take; a size, 0 deletes them at once. Default `256MiB`:
    /// enough to tell a bad cable from a bad disk.
    pub quarantine: Size,
    /// How long the tier takes no new blobs after its file system failed to write, and does nothing after it failed to answer; a duration
    /// over 0. Default `30s`: a full disk is not asked with every blob, and one that has room again is used soon.
    pub cooldown: Span,
    /// How long a request waits for the file system of `disk.path` to answer, before it gets its blob from elsewhere; a duration over 0.
    /// Default `5s`: a healthy disk takes milliseconds and a busy one a second or two, and few clients wait for half a minute.
    pub timeout: Span,
    /// How many threads may read from `disk.path` at once; a quarter as many may write. 1 or more. Default 64: enough to keep any
    /// disk busy, and what can be lost to a file system that hangs.
    pub threads: usize,
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
        }
    }
}

/// `[verify]`: how blobs are checked on their way to clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verify {
    /// Blobs up to this size are verified as a whole before their first byte leaves, larger ones stream with their end held
    /// back; a size, at most `fill.memory`. Default `1MiB`: the wait is a few milliseconds on a local network, and
    /// corruption then is a clean 502 and not a cut connection.
    pub buffer_up_to: Size,
}

impl Default for Verify {
    fn default() -> Self {
        Self { buffer_up_to: Size::mib(1) }
    }
}

/// `[fill]`: how blobs that no tier keeps are fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fill {
    /// How many blobs may be fetched at once, 1 or more. Default 256: hides an origin's latency, and is few enough
    /// connections for any origin.
    pub max_in_flight: usize,
    /// Bytes that may be in memory outside the cache: those that flights and copies of uploads hold, and those of blobs that the cache has
    /// dropped and slow clients still read; a size over 0. Default `256MiB`, so that all that never takes more than the cache itself.
    pub memory: Size,
    /// How long a fill waits for a free place before its clients get 503; a duration, 0 does not wait. Default `2s`: evens
    /// out a burst, and after that a client is better served by `Retry-After`.
    pub max_wait: Span,
    /// The directory where blobs too large for memory pass through, in unlinked files; it must exist; empty: the system's
    /// temporary directory. Default empty, as only the operator knows a better disk.
    #[serde(serialize_with = "path_text")]
    pub spool_dir: PathBuf,
    /// Bytes that all flights together may hold in spool files; a size over 0. Default `64GiB`: four of the largest blobs at
    /// once.
    pub spool: Size,
    /// With nobody left reading, a fill goes on only if fewer bytes than this remain; a size. Default `8MiB`: work nearly
    /// done is kept, and a client that gave up on something huge costs the origin no more.
    pub finish_under: Size,
    /// How long a fill waits for the file system of `fill.spool_dir` to answer, before its clients get 503; a duration over 0. Default
    /// `5s`, as for `disk.timeout`.
    pub spool_timeout: Span,
    /// How many threads may work on files in `fill.spool_dir` at once; 1 or more. Default 32: what is written there goes to the page cache
    /// first, and what can be lost to a file system that hangs.
    pub spool_threads: usize,
}

impl Default for Fill {
    fn default() -> Self {
        Self {
            max_in_flight: 256,
            memory: Size::mib(256),
            max_wait: Span::secs(2),
            spool_dir: PathBuf::new(),
            spool: Size::gib(64),
            finish_under: Size::mib(8),
            spool_timeout: Span::secs(5),
            spool_threads: 32,
        }
    }
}

/// `[limits]`: what clients may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// The largest blob that is taken or fetched; a size over 0. Default `16GiB`: above any disk image or model that is
    /// commonly stored, and an endless body still ends.
    pub max_blob: Size,
    /// The largest entry below `/ac/` and `/kv/` that the embedded origin takes; a size over 0. Default `16MiB`: an action's result or a
    /// compressed object file has far less.
    pub max_entry: Size,
    /// How many client connections may be open, 1 or more. Default 20000: what a process may hold open with common limits of
    /// open files, and a gigabyte at most.
    pub max_connections: usize,
    /// How many connections from other nodes may be open, 1 or more. Default 4096: eight nodes with the default `fill.max_in_flight` and
    /// `origin.max_requests`. They are counted apart from clients, so that neither can starve the other.
    pub max_peer_connections: usize,
    /// How many connections to the admin listener may be open, 1 or more. Default 128: many scrapers and health checks. They are counted
    /// apart from clients, so that neither can starve the other.
    pub max_admin_connections: usize,
    /// Bytes that clients may make this node hold beside blobs: heads that have not come whole, requests that wait, relays and uploads; a
    /// size of `1MiB` or more. Default `64MiB`: some thousand waiting requests, and small beside the cache.
    pub client_memory: Size,
    /// How long a client may take to send the whole head of a request; a duration over 0. Default `10s`: slow links manage,
    /// slowloris does not.
    pub header_timeout: Span,
    /// The largest head of a request; a size from `1KiB` to `1MiB`. Default `32KiB`: four times what common servers take.
    pub max_header_bytes: Size,
    /// The most header fields in a request, 1 to 256. Default 100, as common servers have it.
    pub max_headers: usize,
    /// The longest pause between requests on a kept-alive connection, and the longest silence of an upload; a duration over
    /// 0. Default `75s`: ingress-nginx and the load balancers of AWS use a connection again after up to 60 s, and get an
    /// error if castier closes it just then.
    pub idle_timeout: Span,
    /// The longest time in which a client may take no byte of an answer; a duration over 0. Default `60s`: a stalled reader
    /// holds memory, a slow one is welcome.
    pub write_timeout: Span,
    /// How long the origin's word that a blob is absent is remembered; a duration, 0 does not remember. Default `1s`: a
    /// storm of requests for a missing blob costs the origin one a second, and a blob stored behind castier's back appears
    /// soon.
    pub negative_ttl: Span,
    /// How many absences are remembered, 0 or more. Default 65536: a few MiB.
    pub max_negative: usize,
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
        }
    }
}

/// A path as text. Lossy, so that printing a configuration cannot fail; paths that were read from a file or the environment
/// are text anyway.
pub(crate) fn path_text<S: serde::Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
