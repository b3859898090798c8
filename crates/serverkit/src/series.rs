//! What the metrics of both programs have in common.

use parking_lot::Mutex;
use prometheus::{
    Encoder as _, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
    core::Collector, process_collector::ProcessCollector,
};

/// The buckets of durations: from a blob in the page cache to a huge one over a slow line.
pub const SECONDS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Stands for a status where the client left before there was one, as in nginx.
pub const CLIENT_GONE: u16 = 499;

/// The methods that have a label of their own in both programs.
pub const METHODS: [&str; 7] = ["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH"];

/// The label of a method that has none of its own.
pub(crate) const OTHER_METHOD: &str = "OTHER";

/// The series of a program, with those that every process has, and the count of log records and spans that were dropped.
pub struct Series {
    registry: Registry,
    log_dropped: IntCounterVec,
    /// Two scrapes at once must not both add what was dropped since the last one.
    following: Mutex<()>,
}

impl Series {
    /// The process's own series, and `log_dropped` as the name of the drops.
    ///
    /// # Errors
    /// A name that Prometheus does not allow.
    pub fn new(log_dropped: &str, help: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let log_dropped = counters(&registry, log_dropped, help, &["sink"])?;
        Ok(Self { registry, log_dropped, following: Mutex::new(()) })
    }

    /// Where a program registers its own.
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Errors
    /// A series that cannot be written.
    pub fn text(&self) -> prometheus::Result<String> {
        {
            let _alone = self.following.lock();
            for (sink, count) in crate::log::drops() {
                let dropped = self.log_dropped.with_label_values(&[sink]);
                dropped.inc_by(count.saturating_sub(dropped.get()));
            }
        }
        let mut families = self.registry.gather();
        // The collector of the library knows whole seconds only.
        if let Some(cpu) = families.iter_mut().find(|family| family.name() == "process_cpu_seconds_total") {
            let mut seconds = prometheus::proto::Counter::default();
            seconds.set_value(cpu_seconds());
            cpu.mut_metric().iter_mut().for_each(|metric| metric.set_counter(seconds.clone()));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(String::from_utf8(text).unwrap_or_default())
    }
}

/// Registers durations, in [`SECONDS`].
///
/// # Errors
/// A name or a label that Prometheus does not allow, or a name that is taken.
pub fn histograms(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<HistogramVec> {
    add(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels)?)
}

/// Registers a series.
///
/// # Errors
/// A name or a label that Prometheus does not allow, or a name that is taken.
pub fn add<C: Collector + Clone + 'static>(registry: &Registry, series: C) -> prometheus::Result<C> {
    registry.register(Box::new(series.clone()))?;
    Ok(series)
}

/// Registers a counter.
///
/// # Errors
/// A name or a label that Prometheus does not allow, or a name that is taken.
pub fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    add(registry, IntCounter::new(name, help)?)
}

/// Registers a gauge.
///
/// # Errors
/// A name or a label that Prometheus does not allow, or a name that is taken.
pub fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    add(registry, IntGauge::new(name, help)?)
}

/// Registers counters with labels.
///
/// # Errors
/// A name or a label that Prometheus does not allow, or a name that is taken.
pub fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    add(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

/// Registers gauges with labels.
///
/// # Errors
/// A name or a label that Prometheus does not allow, or a name that is taken.
pub fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    add(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

/// The processor time that this process has used.
fn cpu_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// The label of a method: one of `known`, or `OTHER`. Clients can invent methods, and series must be few.
pub fn method_label(method: &str, known: &[&'static str]) -> &'static str {
    known.iter().find(|known| **known == method).unwrap_or(&OTHER_METHOD)
}

/// The label of a status: a code that RFC 9110 registers, or its class. An origin can invent hundreds of codes, and series must be few.
pub fn status_label(code: u16) -> &'static str {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_few() {
        assert_eq!([200, 499, 599, 299, 999].map(status_label), ["200", "4xx", "5xx", "2xx", "9xx"]);
        assert_eq!(["GET", "get", "BREW", "OTHER"].map(|method| method_label(method, &METHODS)), ["GET", "OTHER", "OTHER", "OTHER"]);
    }

    #[test]
    fn the_text_has_the_processes_series_and_the_drops() {
        let series = Series::new("x_dropped_total", "Dropped.").unwrap();
        let text = series.text().unwrap();
        for part in [
            "process_cpu_seconds_total ",
            "x_dropped_total{sink=\"stderr\"} ",
            "x_dropped_total{sink=\"loki\"} ",
            "x_dropped_total{sink=\"otlp\"} ",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
