//! The report of a run: JSON with vegeta's fields, or text.

use crate::{
    mix::Op,
    tally::{Spread, Tally},
};
use bytesize::ByteSize;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant, SystemTime},
};

/// The report, with vegeta's field names and meanings. Durations are in nanoseconds. `duration` is from the first start to the last one,
/// `wait` from there to the last answer. `rate` is requests over `duration`; `throughput` is successes over `duration + wait`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    latencies: Latencies,
    bytes_in: Bytes,
    bytes_out: Bytes,
    earliest: String,
    latest: String,
    end: String,
    duration: u64,
    wait: u64,
    requests: u64,
    rate: f64,
    throughput: f64,
    /// The fraction of requests that succeeded.
    success: f64,
    /// The number of answers by status; "0" stands for no answer.
    status_codes: BTreeMap<String, u64>,
    /// The different error texts.
    errors: Vec<String>,
    /// Complete answers with wrong bytes.
    corrupt: u64,
    /// Requests that were sent again, since the server had closed the kept-alive connection.
    reconnects: u64,
    /// Time to the first byte of the answer.
    first_byte: Latencies,
    /// Requests by operation.
    operations: BTreeMap<&'static str, Operation>,
    /// Loads from the origin during the run, if `--stats` was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    origin_loads: Option<u64>,
    /// The repeated scenario.
    #[serde(skip_serializing_if = "Option::is_none")]
    scenario: Option<String>,
    /// Whether the user interrupted the run.
    interrupted: bool,
}

#[derive(Debug, Default, Serialize)]
struct Latencies {
    total: u64,
    mean: u64,
    #[serde(rename = "50th")]
    p50: u64,
    #[serde(rename = "90th")]
    p90: u64,
    #[serde(rename = "95th")]
    p95: u64,
    #[serde(rename = "99th")]
    p99: u64,
    max: u64,
    min: u64,
}

#[derive(Debug, Serialize)]
struct Bytes {
    total: u64,
    mean: f64,
}

#[derive(Debug, Serialize)]
struct Operation {
    requests: u64,
    latencies: Latencies,
}

impl From<&Spread> for Latencies {
    fn from(spread: &Spread) -> Self {
        let [p50, p90, p95, p99] = [0.5, 0.9, 0.95, 0.99].map(|share| spread.quantile(share));
        let total = u64::try_from(spread.total).unwrap_or(u64::MAX);
        Self { total, mean: spread.mean(), p50, p90, p95, p99, max: spread.max, min: spread.min }
    }
}

/// The data for the report beside the tally.
pub(crate) struct Context {
    pub(crate) origin_loads: Option<u64>,
    pub(crate) scenario: Option<String>,
    pub(crate) interrupted: bool,
}

impl Report {
    /// Sums up a run.
    pub(crate) fn new(tally: &Tally, context: Context) -> Self {
        // An `Instant` has no date, so compute the offset to the wall clock once.
        let (now, today) = (Instant::now(), SystemTime::now());
        let date = |at: Instant| humantime::format_rfc3339_nanos(today - now.saturating_duration_since(at)).to_string();
        let (first, last) = tally.starts.unwrap_or((now, now));
        let end = tally.end.unwrap_or(last);
        let (duration, wait) = (last - first, end.saturating_duration_since(last));
        let per_second = |count: u64, time: Duration| if time.is_zero() { count as f64 } else { count as f64 / time.as_secs_f64() };
        let share = |sum: u64| if tally.requests == 0 { 0.0 } else { sum as f64 / tally.requests as f64 };
        let bytes = |total| Bytes { total, mean: share(total) };
        let operation = |op: Op| {
            let spread = tally.latencies[op.index()].as_ref()?;
            Some((op.name(), Operation { requests: spread.count(), latencies: spread.into() }))
        };
        Self {
            latencies: tally.all_latencies().as_ref().map(Latencies::from).unwrap_or_default(),
            bytes_in: bytes(tally.bytes_in),
            bytes_out: bytes(tally.bytes_out),
            earliest: date(first),
            latest: date(last),
            end: date(end),
            duration: nanos(duration),
            wait: nanos(wait),
            requests: tally.requests,
            rate: per_second(tally.requests, duration),
            throughput: per_second(tally.successes, duration + wait),
            success: share(tally.successes),
            status_codes: tally.statuses.iter().map(|(status, times)| (status.to_string(), *times)).collect(),
            errors: tally.errors.keys().cloned().collect(),
            corrupt: tally.corrupt,
            reconnects: tally.reconnects,
            first_byte: tally.first_bytes.as_ref().map(Latencies::from).unwrap_or_default(),
            operations: Op::ALL.into_iter().filter_map(operation).collect(),
            origin_loads: context.origin_loads,
            scenario: context.scenario,
            interrupted: context.interrupted,
        }
    }

    /// One JSON object on one line.
    pub(crate) fn json(&self) -> String {
        // Strings and numbers always serialise.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The report for people.
    pub(crate) fn text(&self, tally: &Tally) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{name:<14}{value}");
        };
        if let Some(scenario) = &self.scenario {
            line("scenario", scenario.clone());
        }
        let time = Duration::from_nanos(self.duration + self.wait);
        let cut = if self.interrupted { ", interrupted" } else { "" };
        line("requests", format!("{} in {time:.2?}{cut}", self.requests));
        line("rate", format!("{:.2}/s started, {:.2}/s succeeded", self.rate, self.throughput));
        line("success", format!("{:.3} %", self.success * 100.0));
        line("corrupt", self.corrupt.to_string());
        line("reconnects", self.reconnects.to_string());
        if let Some(loads) = self.origin_loads {
            line("origin loads", loads.to_string());
        }
        line("bytes", format!("{} in, {} out", ByteSize::b(self.bytes_in.total), ByteSize::b(self.bytes_out.total)));
        line("latency", self.latencies.text());
        line("first byte", self.first_byte.text());
        for (name, operation) in &self.operations {
            line(&format!("  {name}"), format!("{:>9} × {}", operation.requests, operation.latencies.text()));
        }
        let statuses: Vec<_> = self.status_codes.iter().map(|(status, times)| format!("{status}: {times}")).collect();
        line("status codes", statuses.join(", "));
        for (text, times) in &tally.errors {
            line("error", format!("{times} × {text}"));
        }
        if let Some(all) = tally.all_latencies() {
            out.push_str(&histogram(&all));
        }
        out
    }
}

impl Latencies {
    fn text(&self) -> String {
        let [mean, p50, p95, p99, max] = [self.mean, self.p50, self.p95, self.p99, self.max].map(time);
        format!("mean {mean}  50% {p50}  95% {p95}  99% {p99}  max {max}")
    }
}

/// The latencies in steps of 1, 2, 5, with a bar for each, from the first to the last step that is not empty.
fn histogram(all: &Spread) -> String {
    let bounds: Vec<_> = (3..12).flat_map(|power| [1, 2, 5].map(|step| step * 10_u64.pow(power))).chain([u64::MAX]).collect();
    let rows: Vec<_> = bounds.iter().copied().zip(all.up_to_each(&bounds)).collect();
    let used = |row: &&(u64, u64)| row.1 > 0;
    let first = rows.iter().position(|row| used(&row)).unwrap_or(0);
    let last = rows.iter().rposition(|row| used(&row)).unwrap_or(0);
    let most = rows.iter().map(|row| row.1).max().unwrap_or(1).max(1);
    let mut out = "histogram\n".to_owned();
    for (to, count) in &rows[first..=last] {
        let width = usize::try_from(count * 40 / most).unwrap_or(40);
        let bound = if *to == u64::MAX { "more".to_owned() } else { format!("≤ {}", time(*to)) };
        let share = *count as f64 * 100.0 / all.count().max(1) as f64;
        let _ = writeln!(out, "  {bound:>10} {count:>10} {share:>6.2} % {}", "█".repeat(width));
    }
    out
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A duration with about three digits and a unit.
fn time(nanos: u64) -> String {
    let value = nanos as f64;
    let (value, unit) = match nanos {
        0..1_000 => (value, "ns"),
        1_000..1_000_000 => (value / 1e3, "µs"),
        1_000_000..1_000_000_000 => (value / 1e6, "ms"),
        _ => (value / 1e9, "s"),
    };
    let digits = if value.fract() == 0.0 || value >= 100.0 { 0 } else { 2 };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::{Outcome, tests::outcome};

    fn sample() -> Tally {
        let start = Instant::now();
        let mut tally = Tally::default();
        for number in 0..10 {
            tally.record(&outcome(Op::Get, start + Duration::from_millis(100 * number), 20, if number == 3 { 503 } else { 200 }));
        }
        tally
    }

    fn report(tally: &Tally, origin_loads: Option<u64>) -> Report {
        Report::new(tally, Context { origin_loads, scenario: None, interrupted: false })
    }

    #[test]
    fn the_json_has_vegetas_fields() {
        let tally = sample();
        let json: serde_json::Value = serde_json::from_str(&report(&tally, Some(7)).json()).unwrap();
        for field in [
            "/latencies/total",
            "/latencies/mean",
            "/latencies/50th",
            "/latencies/95th",
            "/latencies/99th",
            "/latencies/max",
            "/bytes_in/total",
            "/bytes_in/mean",
            "/bytes_out/total",
            "/bytes_out/mean",
            "/duration",
            "/wait",
            "/requests",
            "/rate",
            "/throughput",
            "/success",
            "/status_codes/200",
            "/status_codes/503",
            "/corrupt",
            "/origin_loads",
        ] {
            assert!(json.pointer(field).is_some_and(serde_json::Value::is_number), "{field} in {json}");
        }
        for field in ["earliest", "latest", "end"] {
            assert!(humantime::parse_rfc3339(json[field].as_str().unwrap()).is_ok(), "{field}");
        }
        assert_eq!(json["errors"], serde_json::json!(["status 503"]));
        assert_eq!((json["requests"].as_u64(), json["success"].as_f64()), (Some(10), Some(0.9)));
        assert_eq!((json["duration"].as_u64(), json["wait"].as_u64()), (Some(900_000_000), Some(20_000_000)));
        assert!((json["rate"].as_f64().unwrap() - 10.0 / 0.9).abs() < 1e-9);
        assert!((json["throughput"].as_f64().unwrap() - 9.0 / 0.92).abs() < 1e-9);
        assert_eq!(json["latencies"]["max"].as_u64(), Some(20_000_000));
    }

    #[test]
    fn origin_loads_stand_there_only_if_they_were_asked_for() {
        assert!(!report(&sample(), None).json().contains("origin_loads"));
    }

    #[test]
    fn the_text_says_what_went_wrong() {
        let tally = sample();
        let text = report(&tally, None).text(&tally);
        assert!(text.contains("1 × status 503") && text.contains("90.000 %") && text.contains("≤ 20 ms"), "{text}");
        let nothing = Tally::default();
        assert!(report(&nothing, None).text(&nothing).contains("requests      0"));
    }

    #[test]
    fn the_histogram_has_every_request_once() {
        let mut tally = Tally::default();
        let start = Instant::now();
        for micros in (1..20_000).step_by(7) {
            tally.record(&Outcome { end: start + Duration::from_micros(micros), ..outcome(Op::Get, start, 0, 200) });
        }
        let histogram = histogram(&tally.all_latencies().unwrap());
        let counts = histogram.lines().skip(1).map(|line| line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap());
        assert_eq!(counts.sum::<u64>(), tally.requests, "{histogram}");
    }

    #[test]
    fn times_have_three_digits_or_so() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567, 123_456_789, 61_000_000_000].map(time),
            ["0 ns", "999 ns", "1 µs", "1.23 ms", "123 ms", "61 s"]
        );
    }
}
