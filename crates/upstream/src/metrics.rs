//! The metrics of sources.

use castier_serverkit::series::{counters, gauge};
use prometheus::{IntCounter, IntGauge, Registry};

/// The metrics.
pub struct Metrics {
    /// Bytes received from the origin and from peers.
    source_bytes: [IntCounter; 2],
    origin_up: IntGauge,
}

impl Metrics {
    /// All metrics, registered with `r`.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        let source_bytes = counters(r, "castier_source_bytes_total", "Bytes of blobs received from a source", &["source"])?;
        let metrics = Self {
            source_bytes: ["origin", "peer"].map(|source| source_bytes.with_label_values(&[source])),
            origin_up: gauge(r, "castier_origin_up", "Whether the origin is up, as the last requests showed")?,
        };
        // Counts as up until a request shows that it is down.
        metrics.origin_up.set(1);
        Ok(metrics)
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
