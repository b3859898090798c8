//! Counts the results of a run.

use crate::mix::Op;
use hdrhistogram::Histogram;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Histograms keep three significant digits up to an hour, in nanoseconds.
const LONGEST: u64 = 3600 * 1_000_000_000;
/// The most different error texts. Others are counted together.
const MAX_TEXTS: usize = 50;

/// How one request ended.
pub(crate) struct Outcome {
    pub(crate) op: Op,
    /// When it should have started. Latency counts from here.
    pub(crate) intended: Instant,
    pub(crate) end: Instant,
    /// When the first byte of the answer arrived, if one did.
    pub(crate) first_byte: Option<Instant>,
    /// 0 without an answer.
    pub(crate) status: u16,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) reconnected: bool,
    /// What was wrong; `None` on success.
    pub(crate) error: Option<String>,
    /// Whether the answer was complete and had wrong bytes.
    pub(crate) corrupt: bool,
}

impl Outcome {
    /// The outcome of a request without an answer so far.
    pub(crate) const fn of(op: Op, intended: Instant) -> Self {
        Self {
            op,
            intended,
            end: intended,
            first_byte: None,
            status: 0,
            bytes_in: 0,
            bytes_out: 0,
            reconnected: false,
            error: None,
            corrupt: false,
        }
    }
}

/// A distribution of durations.
#[derive(Clone)]
pub(crate) struct Spread {
    histogram: Histogram<u64>,
    /// Exact, since the histogram rounds.
    pub(crate) max: u64,
    pub(crate) min: u64,
    pub(crate) total: u128,
}

impl Spread {
    fn new() -> Option<Self> {
        Some(Self { histogram: Histogram::new_with_bounds(1, LONGEST, 3).ok()?, max: 0, min: u64::MAX, total: 0 })
    }

    fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.histogram.saturating_record(nanos);
        self.max = self.max.max(nanos);
        self.min = self.min.min(nanos);
        self.total += u128::from(nanos);
    }

    fn add(&mut self, other: &Self) {
        // The bounds are equal, so this cannot fail.
        let _ = self.histogram.add(&other.histogram);
        self.max = self.max.max(other.max);
        self.min = self.min.min(other.min);
        self.total += other.total;
    }

    /// The number of durations.
    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The average in nanoseconds.
    pub(crate) fn mean(&self) -> u64 {
        u64::try_from(self.total / u128::from(self.count().max(1))).unwrap_or(u64::MAX)
    }

    /// The quantile `share` (0 to 1), in nanoseconds.
    pub(crate) fn quantile(&self, share: f64) -> u64 {
        self.histogram.value_at_quantile(share).min(self.max)
    }

    /// For each of the ascending `bounds`, the number of durations up to it and above the bound before it.
    pub(crate) fn up_to_each(&self, bounds: &[u64]) -> Vec<u64> {
        let mut counts = vec![0; bounds.len()];
        for step in self.histogram.iter_recorded() {
            // A step of the histogram may contain a bound. It counts on one side.
            let nanos = self.histogram.lowest_equivalent(step.value_iterated_to());
            let row = bounds.partition_point(|bound| *bound < nanos);
            if let Some(count) = counts.get_mut(row) {
                *count += step.count_since_last_iteration();
            }
        }
        counts
    }
}

/// The sums of a run, or of one thread of it.
#[derive(Default)]
pub(crate) struct Tally {
    /// Latencies, by [`Op::index`]; `None` if the operation never happened.
    pub(crate) latencies: [Option<Spread>; Op::ALL.len()],
    /// Times to the first byte, from the intended start.
    pub(crate) first_bytes: Option<Spread>,
    pub(crate) requests: u64,
    pub(crate) successes: u64,
    pub(crate) corrupt: u64,
    pub(crate) reconnects: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) statuses: BTreeMap<u16, u64>,
    /// The number of errors by text.
    pub(crate) errors: BTreeMap<String, u64>,
    /// The first and the last intended start.
    pub(crate) starts: Option<(Instant, Instant)>,
    /// The last end.
    pub(crate) end: Option<Instant>,
}

impl Tally {
    /// Counts a request.
    pub(crate) fn record(&mut self, outcome: &Outcome) {
        let slot = &mut self.latencies[outcome.op.index()];
        if slot.is_none() {
            *slot = Spread::new();
        }
        if let Some(spread) = slot {
            spread.record(outcome.end.saturating_duration_since(outcome.intended));
        }
        if let Some(at) = outcome.first_byte {
            if self.first_bytes.is_none() {
                self.first_bytes = Spread::new();
            }
            if let Some(spread) = &mut self.first_bytes {
                spread.record(at.saturating_duration_since(outcome.intended));
            }
        }
        self.requests += 1;
        self.corrupt += u64::from(outcome.corrupt);
        self.reconnects += u64::from(outcome.reconnected);
        self.bytes_in += outcome.bytes_in;
        self.bytes_out += outcome.bytes_out;
        *self.statuses.entry(outcome.status).or_default() += 1;
        match &outcome.error {
            None => self.successes += 1,
            Some(text) => self.count_error(text.clone(), 1),
        }
        let (first, last) = self.starts.unwrap_or((outcome.intended, outcome.intended));
        self.starts = Some((first.min(outcome.intended), last.max(outcome.intended)));
        self.end = self.end.max(Some(outcome.end));
    }

    fn count_error(&mut self, text: String, times: u64) {
        let text = if self.errors.len() < MAX_TEXTS || self.errors.contains_key(&text) { text } else { "other errors".to_owned() };
        *self.errors.entry(text).or_default() += times;
    }

    /// Adds another thread's sums.
    pub(crate) fn add(&mut self, other: Self) {
        let merge = |mine: &mut Option<Spread>, theirs: Option<Spread>| match (mine.as_mut(), theirs) {
            (Some(mine), Some(theirs)) => mine.add(&theirs),
            (None, theirs) => *mine = theirs,
            (Some(_), None) => {}
        };
        for (mine, theirs) in self.latencies.iter_mut().zip(other.latencies) {
            merge(mine, theirs);
        }
        merge(&mut self.first_bytes, other.first_bytes);
        self.requests += other.requests;
        self.successes += other.successes;
        self.corrupt += other.corrupt;
        self.reconnects += other.reconnects;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        for (status, times) in other.statuses {
            *self.statuses.entry(status).or_default() += times;
        }
        for (text, times) in other.errors {
            self.count_error(text, times);
        }
        self.starts = match (self.starts, other.starts) {
            (Some(mine), Some(theirs)) => Some((mine.0.min(theirs.0), mine.1.max(theirs.1))),
            (mine, theirs) => mine.or(theirs),
        };
        self.end = self.end.max(other.end);
    }

    /// The latencies of all operations together; `None` without requests.
    pub(crate) fn all_latencies(&self) -> Option<Spread> {
        let mut all: Option<Spread> = None;
        for spread in self.latencies.iter().flatten() {
            match &mut all {
                None => all = Some(spread.clone()),
                Some(all) => all.add(spread),
            }
        }
        all
    }

    /// Whether there were requests, and all of them succeeded.
    pub(crate) const fn flawless(&self) -> bool {
        self.requests > 0 && self.successes == self.requests && self.corrupt == 0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn outcome(op: Op, start: Instant, millis: u64, status: u16) -> Outcome {
        let end = start + Duration::from_millis(millis);
        let error = (!op.succeeded(status)).then(|| format!("status {status}"));
        Outcome { end, first_byte: Some(end), status, bytes_in: 100, bytes_out: 10, error, ..Outcome::of(op, start) }
    }

    #[test]
    fn two_threads_add_up_to_one() {
        let start = Instant::now();
        let requests: Vec<_> = (1..=100).map(|millis| (if millis % 2 == 0 { Op::Get } else { Op::Put }, millis)).collect();
        let tally = |requests: &[(Op, u64)]| {
            let mut tally = Tally::default();
            for &(op, millis) in requests {
                tally.record(&outcome(op, start + Duration::from_millis(millis), millis, if millis == 50 { 503 } else { 200 }));
            }
            tally
        };
        let mut halves = tally(&requests[..31]);
        halves.add(tally(&requests[31..]));
        for tally in [halves, tally(&requests)] {
            let all = tally.all_latencies().unwrap();
            assert_eq!((tally.requests, tally.successes, all.count(), all.max, all.min), (100, 99, 100, 100_000_000, 1_000_000));
            assert_eq!((all.mean(), tally.bytes_in, tally.bytes_out), (50_500_000, 10_000, 1_000));
            assert!((all.quantile(0.5) as f64 / 50e6 - 1.0).abs() < 0.01);
            assert_eq!(all.quantile(1.0), 100_000_000);
            assert_eq!(tally.statuses, BTreeMap::from([(200, 99), (503, 1)]));
            assert_eq!(tally.errors, BTreeMap::from([("status 503".to_owned(), 1)]));
            assert_eq!(tally.starts.unwrap(), (start + Duration::from_millis(1), start + Duration::from_millis(100)));
            assert_eq!(tally.end, Some(start + Duration::from_millis(200)));
            assert!(!tally.flawless());
        }
    }

    #[test]
    fn an_empty_run_is_no_success() {
        assert!(!Tally::default().flawless());
    }

    #[test]
    fn error_texts_are_bounded() {
        let mut tally = Tally::default();
        for number in 0..1000 {
            tally.count_error(format!("error {number}"), 1);
        }
        assert_eq!((tally.errors.len(), tally.errors["other errors"]), (MAX_TEXTS + 1, 1000 - MAX_TEXTS as u64));
    }
}
