//! Every series of the origin.

use crate::store::Totals;
use http::Method;
use prometheus::{
    Encoder as _, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    process_collector::ProcessCollector,
};
use std::{sync::atomic::Ordering::Relaxed, time::Duration};

/// From a blob in the page cache to a huge one over a slow line; as castier has them.
const SECONDS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Counts what the origin does.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    durations: HistogramVec,
    blobs: IntGauge,
    bytes: IntGauge,
    corrupt: IntCounter,
    log_dropped: IntCounterVec,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let requests =
            Opts::new("castier_origin_requests_total", "Requests by method and status: a code that RFC 9110 registers, else its class.");
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
            log_dropped: IntCounterVec::new(
                Opts::new("castier_origin_log_dropped_total", "Log records that a sink did not take in time."),
                &["sink"],
            )?,
        };
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(metrics.durations.clone()))?;
        metrics.registry.register(Box::new(metrics.blobs.clone()))?;
        metrics.registry.register(Box::new(metrics.bytes.clone()))?;
        metrics.registry.register(Box::new(metrics.corrupt.clone()))?;
        metrics.registry.register(Box::new(metrics.log_dropped.clone()))?;
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
        self.requests.with_label_values(&[method, code_label(status)]).inc();
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
        for (sink, count) in castier_serverkit::log::drops() {
            let dropped = self.log_dropped.with_label_values(&[sink]);
            dropped.inc_by(count.saturating_sub(dropped.get()));
        }
        let mut families = self.registry.gather();
        // The collector knows whole seconds alone.
        if let Some(cpu) = families.iter_mut().find(|family| family.name() == "process_cpu_seconds_total") {
            let mut seconds = prometheus::proto::Counter::default();
            seconds.set_value(cpu_seconds());
            cpu.mut_metric().iter_mut().for_each(|metric| metric.set_counter(seconds.clone()));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(text)
    }
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
