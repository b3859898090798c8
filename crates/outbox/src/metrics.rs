//! The metrics of the outbox.

use castier_cache::Budget;
use castier_serverkit::series::{counter, counters, gauge};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};
use std::time::Duration;

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    blobs: IntGauge,
    entries: IntGauge,
    bytes: IntGauge,
    capacity: IntGauge,
    oldest: IntGauge,
    uploads: IntCounterVec,
    refused: IntCounter,
    lost: IntCounter,
}

impl Metrics {
    /// All metrics, registered with `r`.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        let uploads = counters(r, "castier_outbox_uploads_total", "Uploads from the outbox to the store that ended, by how", &["result"])?;
        for result in ["ok", "error"] {
            uploads.with_label_values(&[result]);
        }
        Ok(Self {
            blobs: gauge(r, "castier_outbox_blobs", "Blobs that are acknowledged and that the store does not have yet")?,
            entries: gauge(r, "castier_outbox_entries", "Versions of entries that are acknowledged and that the store does not have yet")?,
            bytes: gauge(r, "castier_outbox_bytes", "Bytes of the outbox in use, 16 KiB for each record and undelivered events included")?,
            capacity: gauge(r, "castier_outbox_capacity_bytes", "disk.outbox: beyond it uploads get 507")?,
            oldest: gauge(r, "castier_outbox_oldest_seconds", "How long the oldest upload in the outbox has waited; 0 if there is none")?,
            uploads,
            refused: counter(r, "castier_outbox_refused_total", "Uploads refused with 507: the outbox was full or could not be written")?,
            lost: counter(r, "castier_outbox_lost_total", "Acknowledged uploads whose bytes in the outbox were damaged or gone")?,
        })
    }

    pub(crate) fn set(&self, blobs: usize, entries: usize, budget: &Budget, oldest: Option<Duration>) {
        let set = |gauge: &IntGauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&self.blobs, blobs as u64);
        set(&self.entries, entries as u64);
        set(&self.bytes, budget.used());
        set(&self.capacity, budget.limit());
        set(&self.oldest, oldest.unwrap_or_default().as_secs());
    }

    pub(crate) fn uploaded(&self, is_ok: bool) {
        self.uploads.with_label_values(&[if is_ok { "ok" } else { "error" }]).inc();
    }

    pub(crate) fn refused(&self) {
        self.refused.inc();
    }

    pub(crate) fn lost(&self) {
        self.lost.inc();
    }
}
