//! Every series of the tier in one place. Labels are finite and never hold a digest.
//!
//! The ledger: at a quiet moment `gets = hits + loads`, `loads = flights + collapsed`, and every flight has ended in exactly one of
//! `source_loads{result}`. HEADs and 304s by validator are no gets: they hand out no blob.

mod ages;

use crate::{
    fault::Limit,
    recent::{ClientRequest, Recent},
    tier::{TierName, TierStats},
};
use ages::Ages;
use castier_blob::Digest;
use parking_lot::Mutex;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector, process_collector::ProcessCollector,
};
use std::{net::IpAddr, sync::OnceLock, time::Duration};

/// From what a client does not notice to a blob of many gigabytes.
const SECONDS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// How long blobs had been kept: as [`SECONDS`], and on to a month, since a tier that is large enough keeps them for days.
const AGES: [f64; 7] = [300.0, 900.0, 3600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0];

/// Stands for a status where the client left before there was one, as in nginx.
pub const CLIENT_GONE: u16 = 499;

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
    /// With 404. Counted as such wherever a 404 would be an error.
    Absent,
    /// With another status of 400 or more, or by cutting the connection.
    Error,
}

impl Served {
    const ALL: [&'static str; 5] = ["hit", "miss", "collapsed", "absent", "error"];
}

/// A request that was answered, or whose client left.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Where it came in.
    pub listener: Listener,
    /// Its method, out of a finite set.
    pub method: &'static str,
    /// What it was about.
    pub route: Route,
    /// The status it got.
    pub code: u16,
    /// How it was answered.
    pub served: Served,
    /// From its head to the last byte of the answer.
    pub took: Duration,
    /// From its head to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// How much of a body was sent.
    pub bytes: u64,
    /// Who sent it.
    pub client: Option<IpAddr>,
    /// The blob that it was about.
    pub digest: Option<Digest>,
}

/// A gauge that is one higher for as long as this lives.
pub struct Counted<'a>(&'a IntGauge);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The series of one other node. They end with this.
pub struct PeerSeries {
    name: String,
    up: IntGaugeVec,
    probe: GaugeVec,
    errors: IntCounterVec,
    /// Attempts at it that failed.
    failed: IntCounter,
}

impl PeerSeries {
    /// Whether it is up.
    pub fn set_up(&self, up: bool) {
        self.up.with_label_values(&[&self.name]).set(up.into());
    }

    /// How long the last probe took, answered or not.
    pub fn set_probe(&self, took: Duration) {
        self.probe.with_label_values(&[&self.name]).set(took.as_secs_f64());
    }

    /// How many attempts at it failed.
    pub fn errors(&self) -> u64 {
        self.failed.get()
    }
}

impl Drop for PeerSeries {
    fn drop(&mut self) {
        // They were there: this made them.
        let name = [self.name.as_str()];
        self.up.remove_label_values(&name).ok();
        self.probe.remove_label_values(&name).ok();
        self.errors.remove_label_values(&name).ok();
    }
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
    durations: [[Histogram; 5]; 5],
    first_bytes: [[Histogram; 5]; 5],
    in_flight: IntGauge,
    uploads: IntGauge,
    /// Bytes served: by listener, and from the tiers in the order of [`TierName`] or from flights.
    served: [[IntCounter; 4]; 2],
    /// Bytes received from the origin and from peers.
    source_bytes: [IntCounter; 2],
    /// Requests of clients whose answers were an error of ours, or were cut for a source's sake. Part of `/stats` alone.
    client_errors: IntCounter,
    /// Who asks for what.
    pub recent: Recent,
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
    /// Those of them that came from peers.
    pub hits_from_peers: IntCounter,
    /// How long fills waited for a permit.
    fill_wait: Histogram,
    origin_up: IntGauge,
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
    /// In the order of [`TierName`].
    evicted_age: [Histogram; 3],
    evicted_lately: [Ages; 3],
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
    /// Bytes of the disk tier's file system that this user may still write.
    pub disk_avail: IntGauge,
    disk_inodes: IntGauge,
    disk_io: [Histogram; 2],
    disk_write_errors: IntCounterVec,
    disk_skipped_writes: IntCounterVec,
    /// How fast the scrub reads, in bytes a second; 0 if it never does.
    pub disk_scrub_rate: IntGauge,
    certificate_expiry: IntGaugeVec,
    /// What the control group lets this process hold, in bytes; 0 if there is no limit.
    pub memory_limit: IntGauge,
    /// What the configuration lets this process hold, in bytes.
    pub memory_planned: IntGauge,
    cluster_peers: IntGaugeVec,
    cluster_changes: IntCounter,
    /// Gets that came from peers.
    pub gets_from_peers: IntCounter,
    /// Attempts at peers that failed, those that have left included.
    pub peer_errors: IntCounter,
    peer_up: IntGaugeVec,
    peer_probe: GaugeVec,
    peer_failures: IntCounterVec,
    members_hash: IntGauge,
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
        let routes = [Route::Blob, Route::Collection, Route::Relay, Route::Refused, Route::Control];
        let by_result = |vec: HistogramVec| routes.map(|route| Served::ALL.map(|result| vec.with_label_values(&[route.as_str(), result])));
        let durations = histograms(
            &r,
            "castier_http_request_duration_seconds",
            "Time from a request's head to the end of its answer",
            &["route", "result"],
        )?;
        let first_bytes = histograms(
            &r,
            "castier_http_first_byte_seconds",
            "Time from a request's head to the first byte of its answer",
            &["route", "result"],
        )?;
        let response_bytes =
            counters(&r, "castier_http_response_bytes_total", "Bytes of blobs sent to clients and peers", &["from", "listener"])?;
        let froms = ["memory", "mirror", "disk", "flight"];
        let source_bytes = counters(&r, "castier_source_bytes_total", "Bytes of blobs received from a source", &["source"])?;
        let hits = counters(&r, "castier_hits_total", "Gets answered by a tier", &["tier"])?;
        let disk_io =
            histograms(&r, "castier_disk_io_seconds", "Time of a read or write of the disk tier that had to wait for the disk", &["op"])?;
        let ages: Vec<f64> = SECONDS.into_iter().chain(AGES).collect();
        let ages = HistogramOpts::new("castier_tier_evicted_age_seconds", "How long what a tier evicted had been in it").buckets(ages);
        let evicted_age = add(&r, HistogramVec::new(ages, &["tier"])?)?;
        let info = gauges(&r, "castier_build_info", "The version that runs", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            requests: counters(&r, "castier_http_requests_total", "Requests answered", &["listener", "method", "route", "code"])?,
            hit_requests: Default::default(),
            durations: by_result(durations),
            first_bytes: by_result(first_bytes),
            in_flight: gauge(&r, "castier_http_requests_in_flight", "Requests being answered now")?,
            uploads: gauge(&r, "castier_uploads_in_progress", "Uploads now")?,
            served: [Listener::Public, Listener::Peer]
                .map(|listener| froms.map(|from| response_bytes.with_label_values(&[from, listener.as_str()]))),
            source_bytes: ["origin", "peer"].map(|source| source_bytes.with_label_values(&[source])),
            client_errors: IntCounter::new("errors", "Not registered")?,
            recent: Recent::default(),
            gets: counter(&r, "castier_gets_total", "Requests for the bytes of a blob")?,
            loads: counter(&r, "castier_loads_total", "Gets that no tier could answer")?,
            flights: counter(&r, "castier_flights_total", "Loads that started a flight")?,
            collapsed: counter(&r, "castier_collapsed_total", "Loads that joined a flight, a remembered absence included")?,
            hits: TIERS.map(|tier| hits.with_label_values(&[tier.as_str()])),
            hits_from_peers: counter(&r, "castier_hits_from_peers_total", "Gets from other nodes of the cluster that a tier answered")?,
            fill_wait: add(
                &r,
                Histogram::with_opts(
                    HistogramOpts::new("castier_fill_wait_seconds", "Time that a fill waited for a permit").buckets(SECONDS.to_vec()),
                )?,
            )?,
            origin_up: gauge(&r, "castier_origin_up", "Whether the origin answers, as the last requests found it")?,
            source_loads: counters(&r, "castier_source_loads_total", "Flights by how they ended", &["source", "result"])?,
            source_duration: histograms(&r, "castier_source_load_duration_seconds", "Time of a flight", &["source"])?,
            source_resumes: counters(&r, "castier_source_resumes_total", "Broken transfers taken up again in the middle", &["source"])?,
            flights_in_progress: gauge(&r, "castier_flights_in_progress", "Flights now")?,
            flight_followers: gauge(&r, "castier_flight_followers", "Requests now reading a flight that another started")?,
            tier_bytes: gauges(&r, "castier_tier_bytes", "Bytes that a tier takes up", &["tier"])?,
            tier_capacity: gauges(&r, "castier_tier_capacity_bytes", "Bytes that a tier may take up", &["tier"])?,
            tier_blobs: gauges(&r, "castier_tier_blobs", "Blobs in a tier", &["tier"])?,
            tier_evictions: counters(&r, "castier_tier_evictions_total", "Blobs dropped for lack of room", &["tier"])?,
            evicted_age: TIERS.map(|tier| evicted_age.with_label_values(&[tier.as_str()])),
            evicted_lately: Default::default(),
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
            disk_avail: gauge(&r, "castier_disk_filesystem_avail_bytes", "Bytes of the disk tier's file system that may still be written")?,
            disk_inodes: gauge(&r, "castier_disk_filesystem_free_inodes", "Files that the disk tier's file system may still get")?,
            disk_io: ["read", "write"].map(|op| disk_io.with_label_values(&[op])),
            disk_write_errors: counters(&r, "castier_disk_write_errors_total", "Writes to the disk tier that failed", &["reason"])?,
            disk_skipped_writes: counters(&r, "castier_disk_skipped_writes_total", "Blobs not written to the disk tier", &["reason"])?,
            disk_scrub_rate: gauge(&r, "castier_disk_scrub_rate_bytes", "Bytes a second that are read back to find what rotted; 0: none")?,
            certificate_expiry: gauges(
                &r,
                "castier_certificate_expiry_timestamp_seconds",
                "When the first of a listener's certificates expires",
                &["listener"],
            )?,
            memory_limit: gauge(&r, "castier_memory_limit_bytes", "The memory limit of the control group; 0: none")?,
            memory_planned: gauge(&r, "castier_memory_planned_bytes", "The memory that the configuration may come to take")?,
            cluster_peers: gauges(&r, "castier_cluster_peers", "Other nodes of the cluster", &["state"])?,
            cluster_changes: counter(&r, "castier_cluster_changes_total", "Changes of who is in the cluster, and who of them is up")?,
            gets_from_peers: counter(&r, "castier_gets_from_peers_total", "Gets that came from other nodes of the cluster")?,
            peer_errors: IntCounter::new("peer_errors", "Not registered")?,
            peer_up: gauges(&r, "castier_peer_up", "Whether another node of the cluster answers", &["peer"])?,
            peer_probe: add(
                &r,
                GaugeVec::new(Opts::new("castier_peer_probe_seconds", "Time of the last probe of another node of the cluster"), &["peer"])?,
            )?,
            peer_failures: counters(&r, "castier_peer_errors_total", "Attempts at another node of the cluster that failed", &["peer"])?,
            members_hash: gauge(&r, "castier_cluster_members_hash", "Equal on all nodes that agree on who the members are")?,
            connections: gauge(&r, "castier_connections", "Client connections open")?,
            peer_connections: gauge(&r, "castier_peer_connections", "Connections open from other nodes of the cluster")?,
            log_dropped: counters(&r, "castier_log_dropped_total", "Log records that a sink did not take in time", &["sink"])?,
            log_drops: OnceLock::new(),
            registry: r,
        };
        metrics.begin_at_zero();
        // Until somebody finds that it does not.
        metrics.origin_up.set(1);
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

    /// A request was answered.
    pub fn request(&self, request: &Request) {
        let Request { listener, method, route, code, .. } = *request;
        let served = if request.served == Served::Error && code == 404 { Served::Absent } else { request.served };
        self.durations[route as usize][served as usize].observe(request.took.as_secs_f64());
        if let Some(first_byte) = request.first_byte {
            self.first_bytes[route as usize][served as usize].observe(first_byte.as_secs_f64());
        }
        let series = || self.requests.with_label_values(&[listener.as_str(), method, route.as_str(), code_label(code)]);
        if code == 200 && method == "GET" && route == Route::Blob {
            self.hit_requests[listener as usize].get_or_init(series).inc();
        } else {
            series().inc();
        }
        if listener == Listener::Public {
            if code >= 500 {
                self.client_errors.inc();
            }
            self.recent.note(&ClientRequest {
                client: request.client,
                // Nobody was given an answer to read, or refused one.
                digest: request.digest.filter(|_| code != CLIENT_GONE),
                reads: route == Route::Blob && matches!(method, "GET" | "HEAD"),
                code,
                bytes: request.bytes,
                first_byte: request.first_byte,
            });
        }
    }

    /// A request is being answered, for as long as this lives.
    pub fn answering(&self) -> Counted<'_> {
        self.in_flight.inc();
        Counted(&self.in_flight)
    }

    /// An upload is on its way, for as long as this lives.
    pub fn uploading(&self) -> Counted<'_> {
        self.uploads.inc();
        Counted(&self.uploads)
    }

    /// The answer to a client was cut, by no fault of the client's.
    pub fn answer_cut(&self, listener: Listener) {
        if listener == Listener::Public {
            self.client_errors.inc();
        }
    }

    /// Requests of clients that were answered; those whose answers were an error of ours; those being answered.
    pub fn client_requests(&self) -> (u64, u64, u64) {
        let total = sum(&self.requests, Some(("listener", Listener::Public.as_str())));
        (total, self.client_errors.get(), u64::try_from(self.in_flight.get()).unwrap_or(0))
    }

    /// A tier answered a get.
    pub fn hit(&self, tier: TierName) {
        self.hits[tier as usize].inc();
    }

    /// How many gets this tier answered.
    pub fn hits(&self, tier: TierName) -> u64 {
        self.hits[tier as usize].get()
    }

    /// So many bytes of answers came from this tier, or, without one, from a flight.
    pub fn served_from(&self, listener: Listener, tier: Option<TierName>, bytes: u64) {
        self.served[listener as usize][tier.map_or(TIERS.len(), |tier| tier as usize)].inc_by(bytes);
    }

    /// How many bytes of blobs clients were sent.
    pub fn served_to_clients(&self) -> u64 {
        self.served[Listener::Public as usize].iter().map(IntCounter::get).sum()
    }

    /// So many bytes came from a source.
    pub fn received(&self, source: &str, bytes: u64) {
        self.source_bytes[usize::from(source != "origin")].inc_by(bytes);
    }

    /// How many bytes came from the origin, and from peers.
    pub fn received_bytes(&self) -> (u64, u64) {
        let [origin, peers] = &self.source_bytes;
        (origin.get(), peers.get())
    }

    /// A fill waited so long for a permit.
    pub fn waited(&self, wait: Duration) {
        self.fill_wait.observe(wait.as_secs_f64());
    }

    /// Whether the origin answers.
    pub fn set_origin_up(&self, up: bool) {
        self.origin_up.set(up.into());
    }

    /// A tier evicted what it had for so long.
    pub fn evicted(&self, tier: TierName, age: Duration) {
        self.evicted_age[tier as usize].observe(age.as_secs_f64());
        self.evicted_lately[tier as usize].add(age);
    }

    /// The median age of what a tier evicted lately; none if it has evicted nothing.
    pub fn evicted_age(&self, tier: TierName) -> Option<Duration> {
        self.evicted_lately[tier as usize].median()
    }

    /// What the disk tier's file system still takes.
    pub fn disk_space(&self, bytes: u64, inodes: u64) {
        self.disk_avail.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.disk_inodes.set(i64::try_from(inodes).unwrap_or(i64::MAX));
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

    /// How often work on the disk failed.
    pub fn all_disk_errors(&self) -> u64 {
        sum(&self.disk_errors, None)
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

    /// The certificates of a listener are good until then, in seconds since 1970.
    pub fn certificate_expires(&self, listener: Listener, at: i64) {
        self.certificate_expiry.with_label_values(&[listener.as_str()]).set(at);
    }

    /// How often requests were turned away, by the limit.
    pub fn sheds(&self) -> [(&'static str, u64); Limit::ALL.len()] {
        Limit::ALL.map(|limit| (limit.as_str(), self.shed.with_label_values(&[limit.as_str()]).get()))
    }

    /// How many log records were dropped, by the sink.
    pub fn log_dropped(&self) -> [(&'static str, u64); 3] {
        self.log_drops.get().map_or([("stderr", 0), ("loki", 0), ("otlp", 0)], |drops| drops())
    }

    /// Makes the series of another node.
    pub fn peer(&self, name: &str) -> PeerSeries {
        let (up, probe, errors) = (self.peer_up.clone(), self.peer_probe.clone(), self.peer_failures.clone());
        probe.with_label_values(&[name]);
        let series = PeerSeries { name: name.to_owned(), up, probe, failed: errors.with_label_values(&[name]), errors };
        series.set_up(true);
        series
    }

    /// An attempt at another node failed.
    pub fn peer_failed(&self, peer: &PeerSeries) {
        peer.failed.inc();
        self.peer_errors.inc();
    }

    /// What the members are, as one number.
    pub fn set_members_hash(&self, hash: u64) {
        self.members_hash.set(i64::try_from(hash).unwrap_or(0));
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

/// All series of a family together, or those with this label.
fn sum(family: &IntCounterVec, label: Option<(&str, &str)>) -> u64 {
    let has = |metric: &prometheus::proto::Metric| {
        label.is_none_or(|(name, value)| metric.get_label().iter().any(|own| own.name() == name && own.value() == value))
    };
    let families = family.collect();
    let metrics = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
    metrics.filter(|metric| has(metric)).map(|metric| metric.get_counter().get_value() as u64).sum()
}

fn histograms(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<HistogramVec> {
    add(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels)?)
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
