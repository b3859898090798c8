//! Every series of the tier in one place. Labels are finite and never hold a digest.
//!
//! The ledger: when no request is running, `gets = hits + loads`, `loads = flights + collapsed`, and every flight has ended in exactly one
//! of `source_loads{result}`. A HEAD, and a 304 by validator, are not gets, since they send no blob.

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

/// Buckets in seconds: from below what a client notices, to the time of a blob of many gigabytes.
const SECONDS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// More buckets for the age of evicted blobs, up to a month: a large tier keeps blobs for days.
const AGES: [f64; 7] = [300.0, 900.0, 3600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0];

/// The `code` if the client left before there was an answer, as in nginx.
pub const CLIENT_GONE: u16 = 499;

/// As the arrays have them.
const TIERS: [TierName; 3] = [TierName::Memory, TierName::Mirror, TierName::Disk];

/// How a flight ended: the `result` label of `castier_source_loads_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The blob was received and verified.
    Ok,
    /// The source does not have the blob.
    Absent,
    /// Anything else.
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

/// The listener that got a request: the `listener` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// For clients.
    Public,
    /// For peers.
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

/// The target of a request: the `route` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/cas/<digest>`, malformed ones included.
    Blob,
    /// `/cas`.
    Collection,
    /// Anything that castier relays to the origin unchanged.
    Relay,
    /// Rejected: the head was unreadable, over a limit, or unauthorised.
    Refused,
    /// Messages between nodes other than blobs: health checks, purges, notices of stored blobs.
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
    /// By a tier, or without looking up a blob.
    Hit,
    /// By a flight that this request started, or by the origin.
    Miss,
    /// By a flight that another request started.
    Collapsed,
    /// With 404. `request` counts an error with status 404 as this.
    Absent,
    /// With another status of 400 or more, or with a cut connection.
    Error,
}

impl Served {
    const ALL: [&'static str; 5] = ["hit", "miss", "collapsed", "absent", "error"];
}

/// A finished request: answered, or abandoned by the client.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The listener that got it.
    pub listener: Listener,
    /// Its method, from a finite set.
    pub method: &'static str,
    /// Its target.
    pub route: Route,
    /// The status of its answer.
    pub code: u16,
    /// How it was answered.
    pub served: Served,
    /// The time from its head to the last byte of the answer.
    pub took: Duration,
    /// The time from its head to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// The bytes of the body that were sent.
    pub bytes: u64,
    /// The client's address.
    pub client: Option<IpAddr>,
    /// The requested blob.
    pub digest: Option<Digest>,
}

/// Raises a gauge by one until it is dropped.
pub struct Counted<'a>(&'a IntGauge);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The series of one peer. Dropping it removes them.
pub struct PeerSeries {
    name: String,
    up: IntGaugeVec,
    probe: GaugeVec,
    errors: IntCounterVec,
    /// Requests to it that failed.
    failed: IntCounter,
}

impl PeerSeries {
    /// Sets whether it is up.
    pub fn set_up(&self, up: bool) {
        self.up.with_label_values(&[&self.name]).set(up.into());
    }

    /// Sets how long the last probe took, answered or not.
    pub fn set_probe(&self, took: Duration) {
        self.probe.with_label_values(&[&self.name]).set(took.as_secs_f64());
    }

    /// The number of failed requests to it.
    pub fn errors(&self) -> u64 {
        self.failed.get()
    }
}

impl Drop for PeerSeries {
    fn drop(&mut self) {
        // The series exist, so removing them cannot fail.
        let name = [self.name.as_str()];
        self.up.remove_label_values(&name).ok();
        self.probe.remove_label_values(&name).ok();
        self.errors.remove_label_values(&name).ok();
    }
}

/// An operation on the disk: the `op` label of `castier_disk_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// A kept file was opened, or a directory listed.
    Open,
    /// A kept file was read.
    Read,
    /// A blob was written or renamed.
    Write,
    /// A file was deleted, or moved to the quarantine.
    Remove,
    /// A spool file in `fill.spool_dir` was created, written or read.
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

/// The kind of a disk error: the `kind` label of `castier_disk_errors_total`, and the `reason` label of `castier_disk_write_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// The file system is full.
    Full,
    /// The user's quota is exhausted.
    Quota,
    /// The file system is read-only.
    ReadOnly,
    /// The device failed.
    Io,
    /// Too many files are open.
    Files,
    /// The file would be larger than the process or the file system allows.
    TooLarge,
    /// This user has no permission.
    Denied,
    /// Something else is at the path, or at one of its directories.
    Path,
    /// No answer within `disk.timeout`, or `fill.spool_timeout`.
    Timeout,
    /// Not tried: the file system has not answered lately, or too much work is queued.
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
    /// A purge happened in the meantime, perhaps of this blob.
    Purged,
    /// The write failed.
    Failed,
    /// The file system did not answer in time less than `disk.cooldown` ago.
    Timeout,
}

impl Skip {
    /// Every reason, so that all series exist from the start.
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

/// Returns how many log records each sink has dropped so far.
pub type LogDrops = fn() -> [(&'static str, u64); 3];

/// The series.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    /// The series of hits, looked up once, since hits must be fast.
    hit_requests: [OnceLock<IntCounter>; 2],
    durations: [[Histogram; 5]; 5],
    first_bytes: [[Histogram; 5]; 5],
    in_flight: IntGauge,
    uploads: IntGauge,
    /// Bytes served: by listener, and from the tiers in the order of [`TierName`] or from flights.
    served: [[IntCounter; 4]; 2],
    /// Bytes received from the origin and from peers.
    source_bytes: [IntCounter; 2],
    /// Requests of clients that got status 500 or above, or whose answer was cut because a source failed. Only in `/stats`.
    client_errors: IntCounter,
    /// The most active clients and digests, for `/stats`.
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
    /// Hits whose gets came from peers.
    pub hits_from_peers: IntCounter,
    /// The time that fills waited for a permit.
    fill_wait: Histogram,
    origin_up: IntGauge,
    source_loads: IntCounterVec,
    source_duration: HistogramVec,
    source_resumes: IntCounterVec,
    /// Running fills.
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
    /// The fraction of the disk tier that has been listed since the start, 0 to 1.
    pub disk_scan_progress: Gauge,
    /// The end of the last complete scrub, in seconds since 1970; 0 before that.
    pub disk_scrub_last_pass: IntGauge,
    /// Blobs that the scrub has verified.
    pub disk_scrubbed: IntCounter,
    disk_errors: IntCounterVec,
    /// Bytes of the disk tier's file system that this user may still write.
    pub disk_avail: IntGauge,
    disk_inodes: IntGauge,
    disk_io: [Histogram; 2],
    disk_write_errors: IntCounterVec,
    disk_skipped_writes: IntCounterVec,
    /// The scrub's rate in bytes per second; 0 if it is off.
    pub disk_scrub_rate: IntGauge,
    certificate_expiry: IntGaugeVec,
    /// The memory limit of the control group in bytes; 0 if there is none.
    pub memory_limit: IntGauge,
    /// The most memory that the configuration allows, in bytes.
    pub memory_planned: IntGauge,
    cluster_peers: IntGaugeVec,
    cluster_changes: IntCounter,
    /// Gets that came from peers.
    pub gets_from_peers: IntCounter,
    /// Failed requests to peers, including peers that have left.
    pub peer_errors: IntCounter,
    peer_up: IntGaugeVec,
    peer_probe: GaugeVec,
    peer_failures: IntCounterVec,
    members_hash: IntGauge,
    /// Client connections open now.
    pub connections: IntGauge,
    /// Connections from peers that are open now.
    pub peer_connections: IntGauge,
    log_dropped: IntCounterVec,
    /// See [`LogDrops`].
    log_drops: OnceLock<LogDrops>,
}

impl Metrics {
    /// Registers all series. Those with known labels start at 0.
    ///
    /// # Errors
    /// Prometheus does not allow a name or label: a bug in this file.
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
            histograms(&r, "castier_disk_io_seconds", "Time of reads and writes of the disk tier that waited for the disk", &["op"])?;
        let ages: Vec<f64> = SECONDS.into_iter().chain(AGES).collect();
        let ages = HistogramOpts::new("castier_tier_evicted_age_seconds", "Time that evicted blobs had been in a tier").buckets(ages);
        let evicted_age = add(&r, HistogramVec::new(ages, &["tier"])?)?;
        let info = gauges(&r, "castier_build_info", "The running version", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            requests: counters(&r, "castier_http_requests_total", "Requests answered", &["listener", "method", "route", "code"])?,
            hit_requests: Default::default(),
            durations: by_result(durations),
            first_bytes: by_result(first_bytes),
            in_flight: gauge(&r, "castier_http_requests_in_flight", "Requests being answered now")?,
            uploads: gauge(&r, "castier_uploads_in_progress", "Uploads in progress")?,
            served: [Listener::Public, Listener::Peer]
                .map(|listener| froms.map(|from| response_bytes.with_label_values(&[from, listener.as_str()]))),
            source_bytes: ["origin", "peer"].map(|source| source_bytes.with_label_values(&[source])),
            client_errors: IntCounter::new("errors", "Not registered")?,
            recent: Recent::default(),
            gets: counter(&r, "castier_gets_total", "Requests for the bytes of a blob")?,
            loads: counter(&r, "castier_loads_total", "Gets that no tier could answer")?,
            flights: counter(&r, "castier_flights_total", "Loads that started a flight")?,
            collapsed: counter(&r, "castier_collapsed_total", "Loads that joined a flight or found a remembered absence")?,
            hits: TIERS.map(|tier| hits.with_label_values(&[tier.as_str()])),
            hits_from_peers: counter(&r, "castier_hits_from_peers_total", "Gets from peers that a tier answered")?,
            fill_wait: add(
                &r,
                Histogram::with_opts(
                    HistogramOpts::new("castier_fill_wait_seconds", "Time that fills waited for a permit").buckets(SECONDS.to_vec()),
                )?,
            )?,
            origin_up: gauge(&r, "castier_origin_up", "Whether the origin is up, as the last requests showed")?,
            source_loads: counters(&r, "castier_source_loads_total", "Finished flights, by source and result", &["source", "result"])?,
            source_duration: histograms(&r, "castier_source_load_duration_seconds", "Duration of flights", &["source"])?,
            source_resumes: counters(&r, "castier_source_resumes_total", "Broken transfers that were resumed", &["source"])?,
            flights_in_progress: gauge(&r, "castier_flights_in_progress", "Flights in progress")?,
            flight_followers: gauge(&r, "castier_flight_followers", "Requests that are reading a flight of another request")?,
            tier_bytes: gauges(&r, "castier_tier_bytes", "Bytes in a tier", &["tier"])?,
            tier_capacity: gauges(&r, "castier_tier_capacity_bytes", "Capacity of a tier", &["tier"])?,
            tier_blobs: gauges(&r, "castier_tier_blobs", "Blobs in a tier", &["tier"])?,
            tier_evictions: counters(&r, "castier_tier_evictions_total", "Blobs evicted for lack of space", &["tier"])?,
            evicted_age: TIERS.map(|tier| evicted_age.with_label_values(&[tier.as_str()])),
            evicted_lately: Default::default(),
            following: Mutex::new(()),
            corrupt: counters(&r, "castier_corrupt_blobs_total", "Blobs whose bytes did not match their digest", &["source"])?,
            shed: counters(&r, "castier_shed_requests_total", "Requests refused at a limit", &["reason"])?,
            disk_scan_progress: add(
                &r,
                Gauge::new("castier_disk_scan_progress_ratio", "Fraction of the disk tier listed since the start, 0 to 1")?,
            )?,
            disk_scrub_last_pass: gauge(
                &r,
                "castier_disk_scrub_last_pass_timestamp_seconds",
                "End of the last complete scrub of the disk tier",
            )?,
            disk_scrubbed: counter(&r, "castier_disk_scrubbed_blobs_total", "Blobs of the disk tier that the scrub has verified")?,
            disk_errors: counters(&r, "castier_disk_errors_total", "Failed operations on the disk", &["op", "kind"])?,
            disk_avail: gauge(&r, "castier_disk_filesystem_avail_bytes", "Free bytes on the disk tier's file system")?,
            disk_inodes: gauge(&r, "castier_disk_filesystem_free_inodes", "Free inodes on the disk tier's file system")?,
            disk_io: ["read", "write"].map(|op| disk_io.with_label_values(&[op])),
            disk_write_errors: counters(&r, "castier_disk_write_errors_total", "Failed writes to the disk tier", &["reason"])?,
            disk_skipped_writes: counters(&r, "castier_disk_skipped_writes_total", "Blobs not written to the disk tier", &["reason"])?,
            disk_scrub_rate: gauge(&r, "castier_disk_scrub_rate_bytes", "Configured rate of the scrub in bytes per second; 0: off")?,
            certificate_expiry: gauges(
                &r,
                "castier_certificate_expiry_timestamp_seconds",
                "Time when the first certificate of a listener expires",
                &["listener"],
            )?,
            memory_limit: gauge(&r, "castier_memory_limit_bytes", "Memory limit of the control group; 0: none")?,
            memory_planned: gauge(&r, "castier_memory_planned_bytes", "Most memory that the configuration allows")?,
            cluster_peers: gauges(&r, "castier_cluster_peers", "Peers, by state", &["state"])?,
            cluster_changes: counter(&r, "castier_cluster_changes_total", "Changes of the members of the cluster and of their state")?,
            gets_from_peers: counter(&r, "castier_gets_from_peers_total", "Gets from peers")?,
            peer_errors: IntCounter::new("peer_errors", "Not registered")?,
            peer_up: gauges(&r, "castier_peer_up", "Whether a peer is up", &["peer"])?,
            peer_probe: add(
                &r,
                GaugeVec::new(Opts::new("castier_peer_probe_seconds", "Duration of the last probe of a peer"), &["peer"])?,
            )?,
            peer_failures: counters(&r, "castier_peer_errors_total", "Failed requests to a peer", &["peer"])?,
            members_hash: gauge(&r, "castier_cluster_members_hash", "Hash of the list of members; equal on all nodes that agree on it")?,
            connections: gauge(&r, "castier_connections", "Open client connections")?,
            peer_connections: gauge(&r, "castier_peer_connections", "Open connections from peers")?,
            log_dropped: counters(&r, "castier_log_dropped_total", "Log records that a sink dropped", &["sink"])?,
            log_drops: OnceLock::new(),
            registry: r,
        };
        metrics.begin_at_zero();
        // Until a request shows that it is down.
        metrics.origin_up.set(1);
        Ok(metrics)
    }

    /// Creates the series with known labels at 0, so that rates have a start.
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

    /// Takes the counts of dropped log records from `drops` from now on.
    pub fn follow_log(&self, drops: LogDrops) {
        self.log_drops.get_or_init(|| drops);
    }

    /// Records a finished request.
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
                // No blob was sent and none was refused.
                digest: request.digest.filter(|_| code != CLIENT_GONE),
                reads: route == Route::Blob && matches!(method, "GET" | "HEAD"),
                code,
                bytes: request.bytes,
                first_byte: request.first_byte,
            });
        }
    }

    /// Counts a running request until the result is dropped.
    pub fn answering(&self) -> Counted<'_> {
        self.in_flight.inc();
        Counted(&self.in_flight)
    }

    /// Counts a running upload until the result is dropped.
    pub fn uploading(&self) -> Counted<'_> {
        self.uploads.inc();
        Counted(&self.uploads)
    }

    /// Counts an answer to a client that was cut because a source failed.
    pub fn answer_cut(&self, listener: Listener) {
        if listener == Listener::Public {
            self.client_errors.inc();
        }
    }

    /// Requests of clients: all finished ones; those that failed (see `client_errors`); those that are running.
    pub fn client_requests(&self) -> (u64, u64, u64) {
        let total = sum(&self.requests, Some(("listener", Listener::Public.as_str())));
        (total, self.client_errors.get(), u64::try_from(self.in_flight.get()).unwrap_or(0))
    }

    /// Counts a get that a tier answered.
    pub fn hit(&self, tier: TierName) {
        self.hits[tier as usize].inc();
    }

    /// The number of gets that this tier answered.
    pub fn hits(&self, tier: TierName) -> u64 {
        self.hits[tier as usize].get()
    }

    /// Counts bytes of answers that came from this tier; without a tier, from a flight.
    pub fn served_from(&self, listener: Listener, tier: Option<TierName>, bytes: u64) {
        self.served[listener as usize][tier.map_or(TIERS.len(), |tier| tier as usize)].inc_by(bytes);
    }

    /// The bytes of blobs that were sent to clients.
    pub fn served_to_clients(&self) -> u64 {
        self.served[Listener::Public as usize].iter().map(IntCounter::get).sum()
    }

    /// Counts bytes that came from a source.
    pub fn received(&self, source: &str, bytes: u64) {
        self.source_bytes[usize::from(source != "origin")].inc_by(bytes);
    }

    /// The bytes that came from the origin, and from peers.
    pub fn received_bytes(&self) -> (u64, u64) {
        let [origin, peers] = &self.source_bytes;
        (origin.get(), peers.get())
    }

    /// Records how long a fill waited for a permit.
    pub fn waited(&self, wait: Duration) {
        self.fill_wait.observe(wait.as_secs_f64());
    }

    /// Sets whether the origin is up.
    pub fn set_origin_up(&self, up: bool) {
        self.origin_up.set(up.into());
    }

    /// Records that a tier evicted a blob of this age.
    pub fn evicted(&self, tier: TierName, age: Duration) {
        self.evicted_age[tier as usize].observe(age.as_secs_f64());
        self.evicted_lately[tier as usize].add(age);
    }

    /// The median age of the blobs that a tier evicted lately; `None` if it has evicted none.
    pub fn evicted_age(&self, tier: TierName) -> Option<Duration> {
        self.evicted_lately[tier as usize].median()
    }

    /// Sets the free bytes and inodes of the disk tier's file system.
    pub fn disk_space(&self, bytes: u64, inodes: u64) {
        self.disk_avail.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.disk_inodes.set(i64::try_from(inodes).unwrap_or(i64::MAX));
    }

    /// Records the end of a flight.
    pub fn source_load(&self, source: &str, outcome: Outcome, took: Duration) {
        self.source_loads.with_label_values(&[source, outcome.as_str()]).inc();
        self.source_duration.with_label_values(&[source]).observe(took.as_secs_f64());
    }

    /// The number of flights with this source and result.
    pub fn source_loads(&self, source: &str, outcome: Outcome) -> u64 {
        self.source_loads.with_label_values(&[source, outcome.as_str()]).get()
    }

    /// Counts a broken transfer that was resumed.
    pub fn source_resume(&self, source: &str) {
        self.source_resumes.with_label_values(&[source]).inc();
    }

    /// Counts a blob from `source` whose bytes did not match its digest.
    pub fn corrupt(&self, source: &str) {
        self.corrupt.with_label_values(&[source]).inc();
    }

    /// The number of such blobs from `source`.
    pub fn corrupt_count(&self, source: &str) -> u64 {
        self.corrupt.with_label_values(&[source]).get()
    }

    /// Counts a failed operation on the disk.
    pub fn disk_error(&self, op: DiskOp, error: DiskError) {
        self.disk_errors.with_label_values(&[op.as_str(), error.as_str()]).inc();
        if op == DiskOp::Write {
            self.disk_write_errors.with_label_values(&[error.as_str()]).inc();
        }
    }

    /// The number of failed operations of this kind.
    pub fn disk_errors(&self, op: DiskOp, error: DiskError) -> u64 {
        self.disk_errors.with_label_values(&[op.as_str(), error.as_str()]).get()
    }

    /// The number of all failed operations on the disk.
    pub fn all_disk_errors(&self) -> u64 {
        sum(&self.disk_errors, None)
    }

    /// Records how long an operation waited for the disk.
    pub fn disk_io(&self, op: DiskOp, took: Duration) {
        self.disk_io[usize::from(op == DiskOp::Write)].observe(took.as_secs_f64());
    }

    /// Counts a blob that the disk tier did not write.
    pub fn disk_skipped(&self, why: Skip) {
        self.disk_skipped_writes.with_label_values(&[why.as_str()]).inc();
    }

    /// The number of blobs that the disk tier did not write for this reason.
    pub fn disk_skips(&self, why: Skip) -> u64 {
        self.disk_skipped_writes.with_label_values(&[why.as_str()]).get()
    }

    /// Counts a request that was refused at a limit.
    pub fn shed(&self, limit: Limit) {
        self.shed.with_label_values(&[limit.as_str()]).inc();
    }

    /// Sets when the first certificate of a listener expires, in seconds since 1970.
    pub fn certificate_expires(&self, listener: Listener, at: i64) {
        self.certificate_expiry.with_label_values(&[listener.as_str()]).set(at);
    }

    /// The number of refused requests, by limit.
    pub fn sheds(&self) -> [(&'static str, u64); Limit::ALL.len()] {
        Limit::ALL.map(|limit| (limit.as_str(), self.shed.with_label_values(&[limit.as_str()]).get()))
    }

    /// The number of dropped log records, by sink.
    pub fn log_dropped(&self) -> [(&'static str, u64); 3] {
        self.log_drops.get().map_or([("stderr", 0), ("loki", 0), ("otlp", 0)], |drops| drops())
    }

    /// Creates the series of a peer.
    pub fn peer(&self, name: &str) -> PeerSeries {
        let (up, probe, errors) = (self.peer_up.clone(), self.peer_probe.clone(), self.peer_failures.clone());
        probe.with_label_values(&[name]);
        let series = PeerSeries { name: name.to_owned(), up, probe, failed: errors.with_label_values(&[name]), errors };
        series.set_up(true);
        series
    }

    /// Counts a failed request to a peer.
    pub fn peer_failed(&self, peer: &PeerSeries) {
        peer.failed.inc();
        self.peer_errors.inc();
    }

    /// Sets the hash of the list of members.
    pub fn set_members_hash(&self, hash: u64) {
        self.members_hash.set(i64::try_from(hash).unwrap_or(0));
    }

    /// Records a change of the cluster, and how many peers are up and down now.
    pub fn cluster_changed(&self, up: usize, down: usize) {
        self.cluster_changes.inc();
        for (state, count) in [("up", up), ("down", down)] {
            self.cluster_peers.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Sets the number of open connections of a listener.
    pub fn connections_at(&self, listener: Listener) -> &IntGauge {
        match listener {
            Listener::Public => &self.connections,
            Listener::Peer => &self.peer_connections,
        }
    }

    /// The text for Prometheus, with the tiers' figures now.
    pub fn render(&self, tiers: &[(&str, TierStats)]) -> String {
        for (tier, stats) in tiers {
            let gauge = |series: &IntGaugeVec, value: u64| series.with_label_values(&[*tier]).set(i64::try_from(value).unwrap_or(i64::MAX));
            gauge(&self.tier_bytes, stats.bytes);
            gauge(&self.tier_capacity, stats.capacity);
            gauge(&self.tier_blobs, stats.blobs);
            // The tier has the count, and this adds the difference. The lock keeps two scrapes from both adding it.
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
        // The collector has whole seconds only.
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

/// The sum over all series of a family, or over those with this label.
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

/// The CPU time that this process has used.
fn cpu_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// The `code` label of a status: the code if RFC 9110 registers it, else its class. An origin may send any code, and series must be few.
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
