//! Every series of the tier in one place. Labels are finite and never hold a digest.
//!
//! The ledger: at a quiet moment `gets = hits + loads`, `loads = flights + collapsed`, and every flight has ended in exactly one of
//! `source_loads{result}`. HEADs and 304s by validator are no gets: they hand out no blob.

use crate::{
    fault::Limit,
    tier::{TierName, TierStats},
};
use parking_lot::Mutex;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
    core::Collector, process_collector::ProcessCollector,
};
use std::{sync::OnceLock, time::Duration};

/// From a memory hit (tens of microseconds) to a blob of many gigabytes.
const SECONDS: [f64; 15] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];

/// As the arrays have them.
const TIERS: [TierName; 3] = [TierName::Memory, TierName::Mirror, TierName::Disk];

/// How a load from a source ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The blob came, and verified.
    Ok,
    /// The source says that there is no such blob.
    Absent,
    /// Neither.
    Error,
}

impl Outcome {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Absent => "absent",
            Self::Error => "error",
        }
    }
}

/// Where a request came in: the `listener` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// From a client.
    Public,
    /// From another node of the cluster.
    Peer,
}

impl Listener {
    /// As it stands in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Peer => "peer",
        }
    }
}

/// What a request was about: the `route` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/cas/<digest>`, malformed ones included.
    Blob,
    /// `/cas`.
    Collection,
    /// Anything that goes to the origin unchanged.
    Relay,
    /// Nothing that could be understood, or that was let in.
    Refused,
    /// What nodes tell each other beside blobs: health, purges, what was stored.
    Control,
}

impl Route {
    /// As it stands in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Collection => "collection",
            Self::Relay => "relay",
            Self::Refused => "refused",
            Self::Control => "control",
        }
    }
}

/// How a request was answered: the `result` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// From a tier, or without needing one.
    Hit,
    /// By a flight that this request started, or by the origin.
    Miss,
    /// By a flight that another request had started.
    Collapsed,
    /// With a status of 400 or more, or by cutting the connection.
    Error,
}

impl Served {
    const ALL: [&'static str; 4] = ["hit", "miss", "collapsed", "error"];
}

/// What was done on the disk: the `op` label of `castier_disk_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// A kept file was opened, or a directory listed.
    Open,
    /// A kept file was read.
    Read,
    /// A blob was written, or given its name.
    Write,
    /// A file was deleted or set aside.
    Remove,
    /// A spool file of `fill.spool_dir` was made, written or read.
    Spool,
}

impl DiskOp {
    const ALL: [Self; 5] = [Self::Open, Self::Read, Self::Write, Self::Remove, Self::Spool];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Remove => "remove",
            Self::Spool => "spool",
        }
    }
}

/// What went wrong on the disk: the `kind` label of `castier_disk_errors_total`, and the `reason` label of
/// `castier_disk_write_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// The file system is full.
    Full,
    /// The user's quota is used up.
    Quota,
    /// The file system is read-only.
    ReadOnly,
    /// The device failed.
    Io,
    /// No more files may be open.
    Files,
    /// The file would be larger than the process or the file system allows.
    TooLarge,
    /// This user may not.
    Denied,
    /// Something else is at the path, or on the way to it.
    Path,
    /// No answer within `disk.timeout`, or `fill.spool_timeout`.
    Timeout,
    /// Not tried, as the file system did not answer lately, or too much waits for it.
    Busy,
    /// Anything else.
    Other,
}

impl DiskError {
    const ALL: [Self; 11] = [
        Self::Full,
        Self::Quota,
        Self::ReadOnly,
        Self::Io,
        Self::Files,
        Self::TooLarge,
        Self::Denied,
        Self::Path,
        Self::Timeout,
        Self::Busy,
        Self::Other,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Quota => "quota",
            Self::ReadOnly => "read_only",
            Self::Io => "io",
            Self::Files => "files",
            Self::TooLarge => "too_large",
            Self::Denied => "denied",
            Self::Path => "path",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
            Self::Other => "other",
        }
    }
}

/// Why the disk tier did not write a blob: the `reason` label of `castier_disk_skipped_writes_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// `disk.write_behind` was full.
    Queue,
    /// A write had failed less than `disk.cooldown` ago.
    ReadOnly,
    /// Something was purged meanwhile, and it may have been this blob.
    Purged,
    /// The write failed.
    Failed,
    /// The file system had not answered in time less than `disk.cooldown` ago.
    Timeout,
}

impl Skip {
    /// Every reason, for making the series exist from the start.
    pub const ALL: [Self; 5] = [Self::Queue, Self::ReadOnly, Self::Purged, Self::Failed, Self::Timeout];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::ReadOnly => "read_only",
            Self::Purged => "purged",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
        }
    }
}

/// Tells how many log records each sink has dropped so far.
pub type LogDrops = fn() -> [(&'static str, u64); 3];

/// The series.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    /// The series of the one kind of request that must cost nothing, found once.
    hit_requests: [OnceLock<IntCounter>; 2],
    durations: [[Histogram; 4]; 5],
    /// Bytes served from tiers, in the order of [`TierName`].
    tier_served: [IntCounter; 3],
    /// Bytes served from flights.
    pub flight_bytes: IntCounter,
    /// Gets: requests for the bytes of a blob.
    pub gets: IntCounter,
    /// Gets that no tier could answer.
    pub loads: IntCounter,
    /// Loads that started a flight.
    pub flights: IntCounter,
    /// Loads that joined one.
    pub collapsed: IntCounter,
    /// Gets answered by tiers, in the order of [`TierName`].
    hits: [IntCounter; 3],
    source_loads: IntCounterVec,
    source_duration: HistogramVec,
    source_resumes: IntCounterVec,
    /// Fills going on.
    pub flights_in_progress: IntGauge,
    /// Requests reading a flight that another request started.
    pub flight_followers: IntGauge,
    tier_bytes: IntGaugeVec,
    tier_capacity: IntGaugeVec,
    tier_blobs: IntGaugeVec,
    tier_evictions: IntCounterVec,
    following: Mutex<()>,
    corrupt: IntCounterVec,
    shed: IntCounterVec,
    /// How much of the disk tier has been listed since the start: 0 to 1.
    pub disk_scan_progress: Gauge,
    /// When the disk tier was last read back from end to end, in seconds since 1970; 0 before the first time.
    pub disk_scrub_last_pass: IntGauge,
    /// Blobs read back and hashed.
    pub disk_scrubbed: IntCounter,
    disk_errors: IntCounterVec,
    disk_io: [Histogram; 2],
    disk_write_errors: IntCounterVec,
    disk_skipped_writes: IntCounterVec,
    cluster_peers: IntGaugeVec,
    cluster_changes: IntCounter,
    /// Gets that came from peers.
    pub gets_from_peers: IntCounter,
    /// Attempts at peers that failed.
    pub peer_errors: IntCounter,
    /// Client connections open now.
    pub connections: IntGauge,
    /// Connections that other nodes have opened to this one.
    pub peer_connections: IntGauge,
    log_dropped: IntCounterVec,
    /// How many records each sink has dropped so far.
    log_drops: OnceLock<LogDrops>,
}

impl Metrics {
    /// All series, those with known labels at 0 from the start.
    ///
    /// # Errors
    /// A name or label that Prometheus does not allow: a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let r = Registry::new();
        r.register(Box::new(ProcessCollector::for_self()))?;
        let duration_vec = add(
            &r,
            HistogramVec::new(
                HistogramOpts::new("castier_http_request_duration_seconds", "Time from a request's head to the end of its answer")
                    .buckets(SECONDS.to_vec()),
                &["route", "result"],
            )?,
        )?;
        let routes = [Route::Blob, Route::Collection, Route::Relay, Route::Refused, Route::Control];
        let durations = routes.map(|route| Served::ALL.map(|result| duration_vec.with_label_values(&[route.as_str(), result])));
        let response_bytes = counters(&r, "castier_http_response_bytes_total", "Bytes of blobs sent to clients", &["from"])?;
        let hits = counters(&r, "castier_hits_total", "Gets answered by a tier", &["tier"])?;
        let disk_io = add(
            &r,
            HistogramVec::new(
                HistogramOpts::new("castier_disk_io_seconds", "Time of a read or write of the disk tier that had to wait for the disk")
                    .buckets(SECONDS.to_vec()),
                &["op"],
            )?,
        )?;
        let info = gauges(&r, "castier_build_info", "The version that runs", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            requests: counters(&r, "castier_http_requests_total", "Requests answered", &["listener", "method", "route", "code"])?,
            hit_requests: Default::default(),
            durations,
            tier_served: TIERS.map(|tier| response_bytes.with_label_values(&[tier.as_str()])),
            flight_bytes: response_bytes.with_label_values(&["flight"]),
            gets: counter(&r, "castier_gets_total", "Requests for the bytes of a blob")?,
            loads: counter(&r, "castier_loads_total", "Gets that no tier could answer")?,
            flights: counter(&r, "castier_flights_total", "Loads that started a flight")?,
            collapsed: counter(&r, "castier_collapsed_total", "Loads that joined a flight, a remembered absence included")?,
            hits: TIERS.map(|tier| hits.with_label_values(&[tier.as_str()])),
            source_loads: counters(&r, "castier_source_loads_total", "Flights by how they ended", &["source", "result"])?,
            source_duration: add(
                &r,
                HistogramVec::new(
                    HistogramOpts::new("castier_source_load_duration_seconds", "Time of a flight").buckets(SECONDS.to_vec()),
                    &["source"],
                )?,
            )?,
            source_resumes: counters(&r, "castier_source_resumes_total", "Broken transfers taken up again in the middle", &["source"])?,
            flights_in_progress: gauge(&r, "castier_flights_in_progress", "Flights now")?,
            flight_followers: gauge(&r, "castier_flight_followers", "Requests now reading a flight that another started")?,
            tier_bytes: gauges(&r, "castier_tier_bytes", "Bytes that a tier takes up", &["tier"])?,
            tier_capacity: gauges(&r, "castier_tier_capacity_bytes", "Bytes that a tier may take up", &["tier"])?,
            tier_blobs: gauges(&r, "castier_tier_blobs", "Blobs in a tier", &["tier"])?,
            tier_evictions: counters(&r, "castier_tier_evictions_total", "Blobs dropped for lack of room", &["tier"])?,
            following: Mutex::new(()),
            corrupt: counters(&r, "castier_corrupt_blobs_total", "Blobs whose bytes did not match their digest", &["source"])?,
            shed: counters(&r, "castier_shed_requests_total", "Requests turned away at a limit", &["reason"])?,
            disk_scan_progress: add(
                &r,
                Gauge::new("castier_disk_scan_progress_ratio", "How much of the disk tier has been listed since the start, 0 to 1")?,
            )?,
            disk_scrub_last_pass: gauge(
                &r,
                "castier_disk_scrub_last_pass_timestamp_seconds",
                "When the disk tier was last read back from end to end",
            )?,
            disk_scrubbed: counter(&r, "castier_disk_scrubbed_blobs_total", "Blobs of the disk tier read back and hashed")?,
            disk_errors: counters(&r, "castier_disk_errors_total", "Work on the disk that failed", &["op", "kind"])?,
            disk_io: ["read", "write"].map(|op| disk_io.with_label_values(&[op])),
            disk_write_errors: counters(&r, "castier_disk_write_errors_total", "Writes to the disk tier that failed", &["reason"])?,
            disk_skipped_writes: counters(&r, "castier_disk_skipped_writes_total", "Blobs not written to the disk tier", &["reason"])?,
            cluster_peers: gauges(&r, "castier_cluster_peers", "Other nodes of the cluster", &["state"])?,
            cluster_changes: counter(&r, "castier_cluster_changes_total", "Changes of who is in the cluster, and who of them is up")?,
            gets_from_peers: counter(&r, "castier_gets_from_peers_total", "Gets that came from other nodes of the cluster")?,
            peer_errors: counter(&r, "castier_peer_errors_total", "Attempts at other nodes of the cluster that failed")?,
            connections: gauge(&r, "castier_connections", "Client connections open")?,
            peer_connections: gauge(&r, "castier_peer_connections", "Connections open from other nodes of the cluster")?,
            log_dropped: counters(&r, "castier_log_dropped_total", "Log records that a sink did not take in time", &["sink"])?,
            log_drops: OnceLock::new(),
            registry: r,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// Makes the series with known labels exist, so that rates have a start.
    fn begin_at_zero(&self) {
        for outcome in [Outcome::Ok, Outcome::Absent, Outcome::Error] {
            for source in ["origin", "peer"] {
                self.source_loads.with_label_values(&[source, outcome.as_str()]);
            }
        }
        for source in ["origin", "peer"] {
            self.source_duration.with_label_values(&[source]);
            self.source_resumes.with_label_values(&[source]);
        }
        for source in ["origin", "peer", "disk", "client"] {
            self.corrupt.with_label_values(&[source]);
        }
        for state in ["up", "down"] {
            self.cluster_peers.with_label_values(&[state]);
        }
        for limit in Limit::ALL {
            self.shed.with_label_values(&[limit.as_str()]);
        }
        for error in DiskError::ALL {
            self.disk_write_errors.with_label_values(&[error.as_str()]);
            for op in DiskOp::ALL {
                self.disk_errors.with_label_values(&[op.as_str(), error.as_str()]);
            }
        }
        for skip in Skip::ALL {
            self.disk_skipped_writes.with_label_values(&[skip.as_str()]);
        }
    }

    /// From now on tells what these have dropped.
    pub fn follow_log(&self, drops: LogDrops) {
        self.log_drops.get_or_init(|| drops);
    }

    /// A request was answered. `method` must come from a finite set.
    pub fn request(&self, listener: Listener, method: &str, route: Route, code: u16, served: Served, took: Duration) {
        self.durations[route as usize][served as usize].observe(took.as_secs_f64());
        let series = || self.requests.with_label_values(&[listener.as_str(), method, route.as_str(), code_label(code)]);
        if code == 200 && method == "GET" && route == Route::Blob {
            self.hit_requests[listener as usize].get_or_init(series).inc();
        } else {
            series().inc();
        }
    }

    /// A tier answered a get.
    pub fn hit(&self, tier: TierName) {
        self.hits[tier as usize].inc();
    }

    /// How many gets this tier answered.
    pub fn hits(&self, tier: TierName) -> u64 {
        self.hits[tier as usize].get()
    }

    /// So many bytes of answers came from this tier.
    pub fn served_from(&self, tier: TierName, bytes: u64) {
        self.tier_served[tier as usize].inc_by(bytes);
    }

    /// A flight ended.
    pub fn source_load(&self, source: &str, outcome: Outcome, took: Duration) {
        self.source_loads.with_label_values(&[source, outcome.as_str()]).inc();
        self.source_duration.with_label_values(&[source]).observe(took.as_secs_f64());
    }

    /// How many flights ended so.
    pub fn source_loads(&self, source: &str, outcome: Outcome) -> u64 {
        self.source_loads.with_label_values(&[source, outcome.as_str()]).get()
    }

    /// A broken transfer was taken up again.
    pub fn source_resume(&self, source: &str) {
        self.source_resumes.with_label_values(&[source]).inc();
    }

    /// Bytes that did not match their digest came from `source`.
    pub fn corrupt(&self, source: &str) {
        self.corrupt.with_label_values(&[source]).inc();
    }

    /// How many there were from `source`.
    pub fn corrupt_count(&self, source: &str) -> u64 {
        self.corrupt.with_label_values(&[source]).get()
    }

    /// Work on the disk failed.
    pub fn disk_error(&self, op: DiskOp, error: DiskError) {
        self.disk_errors.with_label_values(&[op.as_str(), error.as_str()]).inc();
        if op == DiskOp::Write {
            self.disk_write_errors.with_label_values(&[error.as_str()]).inc();
        }
    }

    /// How often work on the disk failed so.
    pub fn disk_errors(&self, op: DiskOp, error: DiskError) -> u64 {
        self.disk_errors.with_label_values(&[op.as_str(), error.as_str()]).get()
    }

    /// The disk was waited for.
    pub fn disk_io(&self, op: DiskOp, took: Duration) {
        self.disk_io[usize::from(op == DiskOp::Write)].observe(took.as_secs_f64());
    }

    /// The disk tier did not write a blob.
    pub fn disk_skipped(&self, why: Skip) {
        self.disk_skipped_writes.with_label_values(&[why.as_str()]).inc();
    }

    /// How many blobs the disk tier did not write for this reason.
    pub fn disk_skips(&self, why: Skip) -> u64 {
        self.disk_skipped_writes.with_label_values(&[why.as_str()]).get()
    }

    /// A request was turned away.
    pub fn shed(&self, limit: Limit) {
        self.shed.with_label_values(&[limit.as_str()]).inc();
    }

    /// The cluster changed: so many peers are up now, and so many down.
    pub fn cluster_changed(&self, up: usize, down: usize) {
        self.cluster_changes.inc();
        for (state, count) in [("up", up), ("down", down)] {
            self.cluster_peers.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// How many connections are open at a listener.
    pub fn connections_at(&self, listener: Listener) -> &IntGauge {
        match listener {
            Listener::Public => &self.connections,
            Listener::Peer => &self.peer_connections,
        }
    }

    /// The text that Prometheus scrapes, with the tiers' state as of now.
    pub fn render(&self, tiers: &[(&str, TierStats)]) -> String {
        for (tier, stats) in tiers {
            let gauge = |series: &IntGaugeVec, value: u64| series.with_label_values(&[*tier]).set(i64::try_from(value).unwrap_or(i64::MAX));
            gauge(&self.tier_bytes, stats.bytes);
            gauge(&self.tier_capacity, stats.capacity);
            gauge(&self.tier_blobs, stats.blobs);
            // The tier counts; this follows. Two scrapes at once must not both add the difference.
            let evictions = self.tier_evictions.with_label_values(&[*tier]);
            let _alone = self.following.lock();
            evictions.inc_by(stats.evictions.saturating_sub(evictions.get()));
        }
        if let Some(drops) = self.log_drops.get() {
            let _alone = self.following.lock();
            for (sink, count) in drops() {
                let dropped = self.log_dropped.with_label_values(&[sink]);
                dropped.inc_by(count.saturating_sub(dropped.get()));
            }
        }
        let mut families = self.registry.gather();
        // The collector knows whole seconds alone.
        if let Some(cpu) = families.iter_mut().find(|family| family.name() == "process_cpu_seconds_total") {
            let mut seconds = prometheus::proto::Counter::default();
            seconds.set_value(cpu_seconds());
            cpu.mut_metric().iter_mut().for_each(|metric| metric.set_counter(seconds.clone()));
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, series: C) -> prometheus::Result<C> {
    registry.register(Box::new(series.clone()))?;
    Ok(series)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    add(registry, IntCounter::new(name, help)?)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    add(registry, IntGauge::new(name, help)?)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    add(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    add(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

/// The processor time that this process has used.
fn cpu_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// The label of a status: a code that RFC 9110 registers, else its class. An origin may invent hundreds of codes; series must be few.
fn code_label(code: u16) -> &'static str {
    const REGISTERED: [(u16, &str); 44] = [
        (100, "100"),
        (101, "101"),
        (200, "200"),
        (201, "201"),
        (202, "202"),
        (203, "203"),
        (204, "204"),
        (205, "205"),
        (206, "206"),
        (300, "300"),
        (301, "301"),
        (302, "302"),
        (303, "303"),
        (304, "304"),
        (305, "305"),
        (307, "307"),
        (308, "308"),
        (400, "400"),
        (401, "401"),
        (402, "402"),
        (403, "403"),
        (404, "404"),
        (405, "405"),
        (406, "406"),
        (407, "407"),
        (408, "408"),
        (409, "409"),
        (410, "410"),
        (411, "411"),
        (412, "412"),
        (413, "413"),
        (414, "414"),
        (415, "415"),
        (416, "416"),
        (417, "417"),
        (421, "421"),
        (422, "422"),
        (426, "426"),
        (500, "500"),
        (501, "501"),
        (502, "502"),
        (503, "503"),
        (504, "504"),
        (505, "505"),
    ];
    const CLASSES: [&str; 10] = ["0xx", "1xx", "2xx", "3xx", "4xx", "5xx", "6xx", "7xx", "8xx", "9xx"];
    let registered = REGISTERED.iter().find(|(registered, _)| *registered == code).map(|(_, text)| *text);
    registered.unwrap_or_else(|| CLASSES.get(usize::from(code / 100)).copied().unwrap_or(CLASSES[0]))
}
