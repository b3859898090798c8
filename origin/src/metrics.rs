//! Every series of the origin.

use crate::store::Totals;
use http::Method;
use prometheus::{
    Encoder as _, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    process_collector::ProcessCollector,
};
use std::{sync::atomic::Ordering::Relaxed, time::Duration};

/// From a blob in the page cache to a huge one over a slow line.
const SECONDS: [f64; 13] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0, 600.0];

/// Counts what the origin does.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    durations: HistogramVec,
    blobs: IntGauge,
    bytes: IntGauge,
    corrupt: IntCounter,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let requests = Opts::new("castier_origin_requests_total", "Requests by method and status; 499: the client left before the answer.");
        let durations = HistogramOpts::new(
            "castier_origin_request_duration_seconds",
            "From the end of a request's head to the last byte of its answer being handed over.",
        );
        let metrics = Self {
            registry: Registry::new(),
            requests: IntCounterVec::new(requests, &["method", "code"])?,
            durations: HistogramVec::new(durations.buckets(SECONDS.to_vec()), &["method"])?,
            blobs: IntGauge::new("castier_origin_blobs", "Blobs in the store, as far as they have been counted since the start.")?,
            bytes: IntGauge::new(
                "castier_origin_bytes",
                "Bytes of the blobs in the store, as far as they have been counted since the start.",
            )?,
            corrupt: IntCounter::new("castier_origin_corrupt_blobs_total", "Blobs whose stored bytes were found damaged and set aside.")?,
        };
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(metrics.durations.clone()))?;
        metrics.registry.register(Box::new(metrics.blobs.clone()))?;
        metrics.registry.register(Box::new(metrics.bytes.clone()))?;
        metrics.registry.register(Box::new(metrics.corrupt.clone()))?;
        metrics.registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    pub(crate) fn count_request(&self, method: &Method, status: u16, duration: Duration) {
        // Clients may invent methods; labels must stay few.
        let method = match *method {
            Method::GET | Method::HEAD | Method::PUT | Method::POST | Method::DELETE | Method::OPTIONS | Method::PATCH => method.as_str(),
            _ if matches!(method.as_str(), "PROPFIND" | "MKCOL") => method.as_str(),
            _ => "OTHER",
        };
        let mut digits = [0; 3];
        self.requests.with_label_values(&[method, code(status, &mut digits)]).inc();
        self.durations.with_label_values(&[method]).observe(duration.as_secs_f64());
    }

    pub(crate) fn count_corrupt(&self) {
        self.corrupt.inc();
    }

    /// Everything, in Prometheus' text format.
    pub(crate) fn text(&self, totals: &Totals) -> Result<Vec<u8>, prometheus::Error> {
        // Files that somebody else changes or removes can make the totals wrong, but not negative to a reader.
        self.blobs.set(totals.blobs.load(Relaxed).max(0));
        self.bytes.set(totals.bytes.load(Relaxed).max(0));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// The three digits of a status, without allocating.
fn code(status: u16, digits: &mut [u8; 3]) -> &str {
    *digits = [100, 10, 1].map(|place| b'0' + u8::try_from(status / place % 10).unwrap_or(0));
    str::from_utf8(digits).unwrap_or("000")
}
