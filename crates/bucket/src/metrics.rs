//! The metrics of a bucket.

use castier_serverkit::series::{counter, gauge};
use prometheus::{IntCounter, IntGauge, Registry};

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    limit: IntGauge,
    throttled: IntCounter,
    aborted: IntCounter,
    retries_refused: IntCounter,
}

impl Metrics {
    /// All metrics, registered with `r`.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            limit: gauge(
                r,
                "castier_bucket_max_requests",
                "How many requests may be at the object store at once; falls when it throttles",
            )?,
            throttled: counter(r, "castier_bucket_throttled_total", "Answers of the object store that say that it is too much (503, 429)")?,
            retries_refused: counter(
                r,
                "castier_bucket_retries_refused_total",
                "Retries at the object store that were not made because of origin.retry_budget",
            )?,
            aborted: counter(
                r,
                "castier_bucket_uploads_aborted_total",
                "Multipart uploads that were given up, and those that were left behind and were aborted at the start",
            )?,
        })
    }

    pub(crate) fn set_limit(&self, limit: f64) {
        #[expect(clippy::cast_possible_truncation, reason = "the limit is small and not negative")]
        self.limit.set(limit as i64);
    }

    pub(crate) fn throttled(&self) {
        self.throttled.inc();
    }

    pub(crate) fn retries_refused(&self) -> IntCounter {
        self.retries_refused.clone()
    }

    pub(crate) fn aborted(&self) {
        self.aborted.inc();
    }
}
