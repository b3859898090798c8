//! The series of the cache. Labels are finite and never hold a digest.
//!
//! The ledger: when no request is running, `gets = hits + loads`, `loads = flights + collapsed`, and every flight has ended in exactly one
//! `castier_source_loads_total{result}`. HEADs and 304s by validator are no gets: they hand out no blob.

use crate::{
    ages::Ages,
    fault::{Fault, Limit},
    flights::Asker,
    tier::TierStats,
    via::{SourceKind, Tier},
};
use castier_blob::Digest;
use parking_lot::Mutex;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, core::Collector,
    register_gauge_with_registry, register_histogram_vec_with_registry, register_histogram_with_registry,
    register_int_counter_vec_with_registry, register_int_counter_with_registry, register_int_gauge_vec_with_registry,
    register_int_gauge_with_registry,
};
use std::{sync::OnceLock, time::Duration};

/// Buckets of durations, in seconds: from what a client does not notice to a blob of many gigabytes.
const SECONDS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Buckets of the ages of blobs beyond [`SECONDS`]: on to a month, since a tier that is large enough keeps them for days.
const AGES: [f64; 7] = [300.0, 900.0, 3600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0];

/// How a flight ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadResult {
    /// The blob was received and verified.
    Ok,
    /// The source does not have the blob.
    Absent,
    /// Anything else.
    Error,
}

impl LoadResult {
    const ALL: [Self; 3] = [Self::Ok, Self::Absent, Self::Error];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Absent => "absent",
            Self::Error => "error",
        }
    }
}

/// Why a flight failed without a fault of its source: the `reason` label of `castier_source_loads_given_up_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GiveUp {
    /// The last reader has left.
    Abandoned,
    /// A limit of this node was reached.
    Limit,
}

impl GiveUp {
    const ALL: [Self; 2] = [Self::Abandoned, Self::Limit];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::Limit => "limit",
        }
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

/// What became of a range of a large blob: the `result` label of `castier_fill_ranges_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeResult {
    /// All of it came.
    Ok,
    /// It was asked for again after a fault.
    Retried,
    /// It was asked for a second time, because it was slow.
    Hedged,
    /// It did not come, in spite of its retries.
    Failed,
    /// The source has another version of the blob by now.
    Replaced,
    /// The source did not answer with the range.
    Ignored,
    /// It was not asked for ahead of time, because `fill.memory` had no memory for it.
    NoMemory,
}

impl RangeResult {
    const ALL: [Self; 7] = [Self::Ok, Self::Retried, Self::Hedged, Self::Failed, Self::Replaced, Self::Ignored, Self::NoMemory];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Retried => "retried",
            Self::Hedged => "hedged",
            Self::Failed => "failed",
            Self::Replaced => "replaced",
            Self::Ignored => "ignored",
            Self::NoMemory => "no_memory",
        }
    }
}
/// Is told of blobs whose bytes were wrong: the source, and the digest of the right bytes.
type TellCorrupt = Box<dyn Fn(&str, &Digest) + Send + Sync>;

/// The series.
pub struct Metrics {
    tell_corrupt: OnceLock<TellCorrupt>,
    gets: IntCounter,
    loads: IntCounter,
    flights: IntCounter,
    collapsed: IntCounter,
    /// Gets answered by tiers, in the order of [`Tier`].
    hits: [IntCounter; 3],
    /// Hits whose gets came from peers.
    hits_from_peers: IntCounter,
    gets_from_peers: IntCounter,
    fill_wait: Histogram,
    source_loads: IntCounterVec,
    source_loads_given_up: IntCounterVec,
    source_duration: [Histogram; 2],
    source_resumes: IntCounterVec,
    fill_ranges: IntCounterVec,
    pub(crate) flights_in_progress: IntGauge,
    pub(crate) flight_followers: IntGauge,
    tier_bytes: IntGaugeVec,
    tier_capacity: IntGaugeVec,
    tier_blobs: IntGaugeVec,
    tier_evictions: IntCounterVec,
    /// Held while `tier_evictions` follows the tiers: two scrapes at once must not both add the difference.
    following: Mutex<()>,
    /// In the order of [`Tier`].
    evicted_age: [Histogram; 3],
    evicted_lately: [Ages; 3],
    corrupt: IntCounterVec,
    /// The fraction of the disk tier that has been listed since the start, 0 to 1.
    pub disk_scan_progress: Gauge,
    /// The end of the last complete scrub, in seconds since 1970; 0 before that.
    pub disk_scrub_last_pass: IntGauge,
    pub(crate) disk_scrubbed: IntCounter,
    disk_errors: IntCounterVec,
    /// Bytes of the disk tier's file system that this user may still write.
    pub disk_avail: IntGauge,
    disk_inodes: IntGauge,
    disk_io: [Histogram; 2],
    disk_write_errors: IntCounterVec,
    disk_skipped_writes: IntCounterVec,
    /// The scrub's rate in bytes per second; 0 if it is off.
    pub disk_scrub_rate: IntGauge,
}

impl Metrics {
    /// All series, registered with `r`, those with known labels at 0 from the start.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        let hits = register_int_counter_vec_with_registry!("castier_hits_total", "Gets answered by a tier", &["tier"], r)?;
        let disk_io = register_histogram_vec_with_registry!(
            "castier_disk_io_seconds",
            "Time of reads and writes of the disk tier that waited for the disk",
            &["op"],
            SECONDS.to_vec(),
            r
        )?;
        let ages = SECONDS.into_iter().chain(AGES).collect();
        let evicted_age = register_histogram_vec_with_registry!(
            "castier_tier_evicted_age_seconds",
            "Time that evicted blobs had been in a tier",
            &["tier"],
            ages,
            r
        )?;
        let source_duration = register_histogram_vec_with_registry!(
            "castier_source_load_duration_seconds",
            "Duration of flights",
            &["source"],
            SECONDS.to_vec(),
            r
        )?;
        let fill_wait = HistogramOpts::new("castier_fill_wait_seconds", "Time that fills waited for a permit").buckets(SECONDS.to_vec());
        let metrics = Self {
            tell_corrupt: OnceLock::new(),
            gets: register_int_counter_with_registry!("castier_gets_total", "Requests for the bytes of a blob", r)?,
            loads: register_int_counter_with_registry!("castier_loads_total", "Gets that no tier could answer", r)?,
            flights: register_int_counter_with_registry!("castier_flights_total", "Loads that started a flight", r)?,
            collapsed: register_int_counter_with_registry!(
                "castier_collapsed_total",
                "Loads that joined a flight or found a remembered absence",
                r
            )?,
            hits: Tier::ALL.map(|tier| hits.with_label_values(&[tier.as_str()])),
            hits_from_peers: register_int_counter_with_registry!(
                "castier_hits_from_peers_total",
                "Gets from peers that a tier answered",
                r
            )?,
            gets_from_peers: register_int_counter_with_registry!("castier_gets_from_peers_total", "Gets from peers", r)?,
            fill_wait: register_histogram_with_registry!(fill_wait, r)?,
            source_loads: register_int_counter_vec_with_registry!(
                "castier_source_loads_total",
                "Finished flights, by source and result",
                &["source", "result"],
                r
            )?,
            source_loads_given_up: register_int_counter_vec_with_registry!(
                "castier_source_loads_given_up_total",
                "Finished flights with result=error of which the source is innocent, by reason",
                &["source", "reason"],
                r
            )?,
            source_duration: SourceKind::ALL.map(|kind| source_duration.with_label_values(&[kind.as_str()])),
            source_resumes: register_int_counter_vec_with_registry!(
                "castier_source_resumes_total",
                "Broken transfers that were resumed",
                &["source"],
                r
            )?,
            fill_ranges: register_int_counter_vec_with_registry!(
                "castier_fill_ranges_total",
                "Ranges of large blobs that were read beside each other, by what became of them",
                &["result"],
                r
            )?,
            flights_in_progress: register_int_gauge_with_registry!("castier_flights_in_progress", "Flights in progress", r)?,
            flight_followers: register_int_gauge_with_registry!(
                "castier_flight_followers",
                "Requests that are reading a flight of another request",
                r
            )?,
            tier_bytes: register_int_gauge_vec_with_registry!("castier_tier_bytes", "Bytes in a tier", &["tier"], r)?,
            tier_capacity: register_int_gauge_vec_with_registry!("castier_tier_capacity_bytes", "Capacity of a tier", &["tier"], r)?,
            tier_blobs: register_int_gauge_vec_with_registry!("castier_tier_blobs", "Blobs in a tier", &["tier"], r)?,
            tier_evictions: register_int_counter_vec_with_registry!(
                "castier_tier_evictions_total",
                "Blobs evicted for lack of space",
                &["tier"],
                r
            )?,
            following: Mutex::new(()),
            evicted_age: Tier::ALL.map(|tier| evicted_age.with_label_values(&[tier.as_str()])),
            evicted_lately: Default::default(),
            corrupt: register_int_counter_vec_with_registry!(
                "castier_corrupt_blobs_total",
                "Blobs whose bytes did not match their digest",
                &["source"],
                r
            )?,
            disk_scan_progress: register_gauge_with_registry!(
                "castier_disk_scan_progress_ratio",
                "Fraction of the disk tier listed since the start, 0 to 1",
                r
            )?,
            disk_scrub_last_pass: register_int_gauge_with_registry!(
                "castier_disk_scrub_last_pass_timestamp_seconds",
                "End of the last complete scrub of the disk tier",
                r
            )?,
            disk_scrubbed: register_int_counter_with_registry!(
                "castier_disk_scrubbed_blobs_total",
                "Blobs of the disk tier that the scrub has verified",
                r
            )?,
            disk_errors: register_int_counter_vec_with_registry!(
                "castier_disk_errors_total",
                "Failed operations on the disk",
                &["op", "kind"],
                r
            )?,
            disk_avail: register_int_gauge_with_registry!(
                "castier_disk_filesystem_avail_bytes",
                "Free bytes on the disk tier's file system",
                r
            )?,
            disk_inodes: register_int_gauge_with_registry!(
                "castier_disk_filesystem_free_inodes",
                "Free inodes on the disk tier's file system",
                r
            )?,
            disk_io: ["read", "write"].map(|op| disk_io.with_label_values(&[op])),
            disk_write_errors: register_int_counter_vec_with_registry!(
                "castier_disk_write_errors_total",
                "Failed writes to the disk tier",
                &["reason"],
                r
            )?,
            disk_skipped_writes: register_int_counter_vec_with_registry!(
                "castier_disk_skipped_writes_total",
                "Blobs not written to the disk tier",
                &["reason"],
                r
            )?,
            disk_scrub_rate: register_int_gauge_with_registry!(
                "castier_disk_scrub_rate_bytes",
                "Configured rate of the scrub in bytes per second; 0: off",
                r
            )?,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// Creates the series with known labels at 0, so that rates have a start.
    fn begin_at_zero(&self) {
        for source in SourceKind::ALL {
            for result in LoadResult::ALL {
                self.source_loads.with_label_values(&[source.as_str(), result.as_str()]);
            }
            self.source_resumes.with_label_values(&[source.as_str()]);
            for reason in GiveUp::ALL {
                self.source_loads_given_up.with_label_values(&[source.as_str(), reason.as_str()]);
            }
        }
        for result in RangeResult::ALL {
            self.fill_ranges.with_label_values(&[result.as_str()]);
        }
        for source in ["origin", "peer", "disk", "client"] {
            self.corrupt.with_label_values(&[source]);
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

    /// A request asks for the bytes of a blob.
    pub(crate) fn get(&self, asker: Asker) {
        self.gets.inc();
        if asker == Asker::Peer {
            self.gets_from_peers.inc();
        }
    }

    /// Counts a get that a tier answered.
    pub(crate) fn hit(&self, tier: Tier, asker: Asker) {
        self.hits[tier as usize].inc();
        if asker == Asker::Peer {
            self.hits_from_peers.inc();
        }
    }

    /// The number of gets that this tier answered.
    pub fn hits(&self, tier: Tier) -> u64 {
        self.hits[tier as usize].get()
    }

    /// A load started a flight.
    pub(crate) fn flight(&self) {
        self.loads.inc();
        self.flights.inc();
    }

    /// A load joined a flight, or found a remembered absence.
    pub(crate) fn collapsed(&self) {
        self.loads.inc();
        self.collapsed.inc();
    }

    /// Gets of clients.
    pub fn client_gets(&self) -> u64 {
        self.gets.get().saturating_sub(self.gets_from_peers.get())
    }

    /// Gets of clients that a tier answered.
    pub fn client_hits(&self) -> u64 {
        self.hits.iter().map(IntCounter::get).sum::<u64>().saturating_sub(self.hits_from_peers.get())
    }

    /// Gets, gets from peers, loads, and loads that started a flight.
    pub fn ledger(&self) -> (u64, u64, u64, u64) {
        (self.gets.get(), self.gets_from_peers.get(), self.loads.get(), self.flights.get())
    }

    /// Records how long a fill waited for a permit.
    pub fn waited(&self, wait: Duration) {
        self.fill_wait.observe(wait.as_secs_f64());
    }

    /// Records that a tier evicted a blob of this age.
    pub(crate) fn evicted(&self, tier: Tier, age: Duration) {
        self.evicted_age[tier as usize].observe(age.as_secs_f64());
        self.evicted_lately[tier as usize].add(age);
    }

    /// The median age of the blobs that a tier evicted lately; `None` if it has evicted none.
    pub fn evicted_age(&self, tier: Tier) -> Option<Duration> {
        self.evicted_lately[tier as usize].median()
    }

    /// Sets the free bytes and inodes of the disk tier's file system.
    pub(crate) fn disk_space(&self, bytes: u64, inodes: u64) {
        self.disk_avail.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.disk_inodes.set(i64::try_from(inodes).unwrap_or(i64::MAX));
    }

    /// Records the end of a flight.
    pub(crate) fn load_ended(&self, kind: SourceKind, result: LoadResult, took: Duration) {
        let source = kind.as_str();
        self.source_loads.with_label_values(&[source, result.as_str()]).inc();
        self.source_duration[kind as usize].observe(took.as_secs_f64());
    }

    /// Counts a failed flight if its source is innocent of the fault.
    pub(crate) fn gave_up(&self, kind: SourceKind, fault: &Fault) {
        let reason = match fault {
            Fault::Abandoned => GiveUp::Abandoned,
            // The origin's own limit is the origin's fault.
            Fault::Busy(limit) if *limit != Limit::Origin => GiveUp::Limit,
            _ => return,
        };
        self.source_loads_given_up.with_label_values(&[kind.as_str(), reason.as_str()]).inc();
    }

    /// The number of flights with this source and result.
    pub fn source_loads(&self, source: SourceKind, result: LoadResult) -> u64 {
        self.source_loads.with_label_values(&[source.as_str(), result.as_str()]).get()
    }

    /// Counts a broken transfer that was resumed.
    pub(crate) fn resumed(&self, source: SourceKind) {
        self.source_resumes.with_label_values(&[source.as_str()]).inc();
    }

    /// Counts what became of a range of a large blob.
    pub(crate) fn range(&self, result: RangeResult) {
        self.fill_ranges.with_label_values(&[result.as_str()]).inc();
    }

    /// How often that was.
    #[cfg(test)]
    pub(crate) fn ranges(&self, result: RangeResult) -> u64 {
        self.fill_ranges.with_label_values(&[result.as_str()]).get()
    }

    /// Counts a blob from `source` whose bytes did not match its digest. `digest`: that of the right bytes, if it is known.
    pub fn corrupt(&self, source: &str, digest: Option<&Digest>) {
        self.corrupt.with_label_values(&[source]).inc();
        if let (Some(tell), Some(digest)) = (self.tell_corrupt.get(), digest) {
            tell(source, digest);
        }
    }

    /// Calls `tell` for each blob whose bytes were wrong, with the source of the bytes, from now on. It must not wait.
    pub fn tell_of_corrupt(&self, tell: impl Fn(&str, &Digest) + Send + Sync + 'static) {
        self.tell_corrupt.set(Box::new(tell)).ok();
    }

    /// The number of such blobs from `source`.
    pub fn corrupt_count(&self, source: &str) -> u64 {
        self.corrupt.with_label_values(&[source]).get()
    }

    /// Counts a failed operation on the disk.
    pub(crate) fn disk_error(&self, op: DiskOp, error: DiskError) {
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
        sum(&self.disk_errors)
    }

    /// Records how long an operation waited for the disk.
    pub(crate) fn disk_io(&self, op: DiskOp, took: Duration) {
        self.disk_io[usize::from(op == DiskOp::Write)].observe(took.as_secs_f64());
    }

    /// Counts a blob that the disk tier did not write.
    pub(crate) fn disk_skipped(&self, why: Skip) {
        self.disk_skipped_writes.with_label_values(&[why.as_str()]).inc();
    }

    /// The number of blobs that the disk tier did not write for this reason.
    pub fn disk_skips(&self, why: Skip) -> u64 {
        self.disk_skipped_writes.with_label_values(&[why.as_str()]).get()
    }

    /// Sets the gauges of the tiers, for a scrape.
    pub fn tiers_are(&self, tiers: &[(Tier, TierStats)]) {
        let _alone = self.following.lock();
        for (tier, stats) in tiers {
            let tier = tier.as_str();
            let gauge = |series: &IntGaugeVec, value: u64| series.with_label_values(&[tier]).set(i64::try_from(value).unwrap_or(i64::MAX));
            gauge(&self.tier_bytes, stats.bytes);
            gauge(&self.tier_capacity, stats.capacity);
            gauge(&self.tier_blobs, stats.blobs);
            // The tier counts; this follows.
            let evictions = self.tier_evictions.with_label_values(&[tier]);
            evictions.inc_by(stats.evictions.saturating_sub(evictions.get()));
        }
    }
}

/// All series of a family together.
fn sum(family: &IntCounterVec) -> u64 {
    let families = family.collect();
    let metrics = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
    metrics.map(|metric| metric.get_counter().get_value() as u64).sum()
}
