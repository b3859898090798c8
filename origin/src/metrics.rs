//! The metrics of the origin.

use crate::store::Totals;
use castier_serverkit::series::{METHODS, Series, counter, counters, gauge, histograms, method_label, status_label};
use prometheus::{HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry};
use std::{sync::atomic::Ordering::Relaxed, time::Duration};

/// The methods that have their own label, including those for entries.
const LABELLED: [&str; METHODS.len() + 2] = {
    let [get, head, put, post, delete, options, patch] = METHODS;
    [get, head, put, post, delete, options, patch, "PROPFIND", "MKCOL"]
};

/// The label of a method.
pub(crate) fn label(method: &str) -> &'static str {
    method_label(method, &LABELLED)
}

/// The metrics.
pub(crate) struct Metrics {
    series: Series,
    requests: IntCounterVec,
    durations: HistogramVec,
    blobs: IntGauge,
    bytes: IntGauge,
    corrupt: IntCounter,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let series = Series::new("castier_origin_log_dropped_total", "Log records that a sink did not take in time.")?;
        let r = series.registry();
        Ok(Self {
            requests: counters(
                r,
                "castier_origin_requests_total",
                "Requests by method and status: a code that RFC 9110 registers, else its class.",
                &["method", "code"],
            )?,
            durations: histograms(
                r,
                "castier_origin_request_duration_seconds",
                "From the end of a request's head to the last byte of its answer being handed over.",
                &["method"],
            )?,
            blobs: gauge(r, "castier_origin_blobs", "Blobs in the store, as far as they have been counted since the start.")?,
            bytes: gauge(r, "castier_origin_bytes", "Bytes of the blobs in the store, as far as they have been counted since the start.")?,
            corrupt: counter(r, "castier_origin_corrupt_blobs_total", "Blobs whose stored bytes were found damaged and set aside.")?,
            series,
        })
    }

    /// For the metrics of a bucket.
    pub(crate) const fn registry(&self) -> &Registry {
        self.series.registry()
    }

    pub(crate) fn count_request(&self, method: &str, status: u16, duration: Duration) {
        let method = label(method);
        self.requests.with_label_values(&[method, status_label(status)]).inc();
        self.durations.with_label_values(&[method]).observe(duration.as_secs_f64());
    }

    pub(crate) fn count_corrupt(&self) {
        self.corrupt.inc();
    }

    /// All metrics in Prometheus' text format.
    pub(crate) fn text(&self, totals: Option<&Totals>) -> Result<String, prometheus::Error> {
        if let Some(totals) = totals {
            // If something else changes or removes files, the totals may be too low. They are never shown as negative.
            self.blobs.set(totals.blobs.load(Relaxed).max(0));
            self.bytes.set(totals.bytes.load(Relaxed).max(0));
        }
        self.series.text()
    }
}
