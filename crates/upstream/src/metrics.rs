//! The metrics of sources.

use crate::breaker::BreakerMetrics;
use castier_serverkit::series::{counter, counters, gauge, gauges};
use prometheus::{IntCounter, IntGauge, Registry};

/// The metrics.
pub struct Metrics {
    /// Bytes received from the origin and from peers.
    source_bytes: [IntCounter; 2],
    origin_up: IntGauge,
    /// Of the origin, and of the servers of routes.
    breakers: [BreakerMetrics; 2],
    retries_refused: IntCounter,
}

impl Metrics {
    /// All metrics, registered with `r`.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        let source_bytes = counters(r, "castier_source_bytes_total", "Bytes of blobs received from a source", &["source"])?;
        let breakers = gauges(r, "castier_circuit_breakers", "Circuit breakers that are open or half-open", &["source", "state"])?;
        let refusals = counters(
            r,
            "castier_circuit_breaker_refusals_total",
            "Requests that failed at once because a circuit breaker was open",
            &["source"],
        )?;
        let metrics = Self {
            retries_refused: counter(r, "castier_retries_refused_total", "Retries that were not made because of origin.retry_budget")?,
            breakers: ["origin", "upstream"].map(|source| BreakerMetrics {
                open: breakers.with_label_values(&[source, "open"]),
                half_open: breakers.with_label_values(&[source, "half-open"]),
                refusals: refusals.with_label_values(&[source]),
            }),
            source_bytes: ["origin", "peer"].map(|source| source_bytes.with_label_values(&[source])),
            origin_up: gauge(r, "castier_origin_up", "Whether the origin is up, as the last requests showed")?,
        };
        // Counts as up until a request shows that it is down.
        metrics.origin_up.set(1);
        Ok(metrics)
    }

    /// The series of the breakers of the origin, or of the servers of routes.
    pub(crate) fn breaker(&self, source: &str) -> BreakerMetrics {
        self.breakers[usize::from(source != "origin")].clone()
    }

    /// How many retries a budget has refused.
    pub fn retries_refused(&self) -> &IntCounter {
        &self.retries_refused
    }

    /// Counts bytes from a source. The upstreams of routes count as the origin.
    pub(crate) fn received(&self, source: &str, bytes: u64) {
        self.source_bytes[usize::from(source == "peer")].inc_by(bytes);
    }

    /// How many bytes came from the origin, and from peers.
    pub fn received_bytes(&self) -> (u64, u64) {
        let [origin, peers] = &self.source_bytes;
        (origin.get(), peers.get())
    }

    /// Sets whether the origin is up.
    pub(crate) fn set_origin_up(&self, up: bool) {
        self.origin_up.set(up.into());
    }
}
