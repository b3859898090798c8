//! The history of the last 15 minutes, in steps of [`STEP`], so that the status page shows the past when it is opened. Each point is a
//! difference of counters.

use super::utc::unix;
use crate::recent::Latency;
use serde::Serialize;
use std::{
    collections::VecDeque,
    time::{Duration, Instant, SystemTime},
};

/// The time between two points.
pub const STEP: Duration = Duration::from_secs(10);
/// The number of points: 15 minutes.
const POINTS: usize = 90;
/// The latencies of first bytes cover this many steps: one minute.
const LATENCY_STEPS: usize = 6;
/// The forecast of when a tier is full uses this many steps: five minutes.
const FORECAST_STEPS: usize = 30;
/// The longest forecast, in seconds: one year.
const MAX_FORECAST: f64 = 365.0 * 86_400.0;

/// The node's counters at one moment, since the start.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures {
    /// Requests of clients.
    pub(super) requests: u64,
    /// Gets of clients.
    pub(super) gets: u64,
    /// Those of them that a tier answered.
    pub(super) hits: u64,
    /// Requests of clients that failed for a reason on this side: status 500 and above, and cut answers.
    pub(super) errors: u64,
    /// Bytes of blobs sent to clients.
    pub(super) bytes_served: u64,
    /// Bytes of blobs received from the origin.
    pub(super) bytes_from_origin: u64,
    /// Latencies of first bytes.
    pub(super) first_byte: Latency,
    /// The level and the evictions of each tier.
    pub(super) tiers: [TierLevel; 3],
}

/// How full a tier is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TierLevel {
    /// Bytes in it.
    pub(super) bytes: u64,
    /// Its capacity in bytes.
    pub(super) capacity: u64,
    /// Blobs that it has evicted since the start.
    pub(super) evictions: u64,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    /// The end of the step, in seconds since 1970.
    at: u64,
    requests: u64,
    gets: u64,
    hits: u64,
    errors: u64,
    bytes_served: u64,
    bytes_from_origin: u64,
    first_byte_p50_ms: Option<f64>,
    first_byte_p99_ms: Option<f64>,
}

/// The object `history` of `/stats`. The oldest point comes first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Past {
    step_seconds: u64,
    points: Vec<Point>,
}

/// The object `first_byte` of `/stats`: latencies of the last minute.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct FirstByte {
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
}

#[derive(Default)]
pub(super) struct History {
    points: VecDeque<Point>,
    /// The counters at the ends of the last steps, the oldest first.
    figures: VecDeque<(Instant, Figures)>,
}

impl History {
    /// Ends a step at the time `at` (wall clock) and `now`, with these counters.
    pub(super) fn step(&mut self, at: SystemTime, now: Instant, figures: Figures) {
        if let Some((_, before)) = self.figures.back() {
            let since = |now: u64, then: u64| now.saturating_sub(then);
            let first_byte = figures.first_byte.since(&before.first_byte);
            self.points.push_back(Point {
                at: unix(at),
                requests: since(figures.requests, before.requests),
                gets: since(figures.gets, before.gets),
                hits: since(figures.hits, before.hits),
                errors: since(figures.errors, before.errors),
                bytes_served: since(figures.bytes_served, before.bytes_served),
                bytes_from_origin: since(figures.bytes_from_origin, before.bytes_from_origin),
                first_byte_p50_ms: first_byte.quantile(0.5),
                first_byte_p99_ms: first_byte.quantile(0.99),
            });
        }
        if self.points.len() > POINTS {
            self.points.pop_front();
        }
        self.figures.push_back((now, figures));
        if self.figures.len() > FORECAST_STEPS + 1 {
            self.figures.pop_front();
        }
    }

    pub(super) fn past(&self) -> Past {
        Past { step_seconds: STEP.as_secs(), points: self.points.iter().cloned().collect() }
    }

    /// The latencies of the last minute. `now` are the latencies since the start.
    pub(super) fn first_byte(&self, now: &Latency) -> FirstByte {
        let before = self.figures.iter().rev().nth(LATENCY_STEPS - 1).or_else(|| self.figures.front());
        let lately = before.map_or_else(|| now.clone(), |(_, figures)| now.since(&figures.first_byte));
        FirstByte { p50_ms: lately.quantile(0.5), p99_ms: lately.quantile(0.99) }
    }

    /// In how many seconds the tier will be full, if it fills as fast as in the last five minutes. 0 if it is full; `None` if it does not
    /// fill, or not within a year.
    pub(super) fn full_in(&self, tier: usize, now: Instant, fill: TierLevel) -> Option<u64> {
        let (at, before) = self.figures.front()?;
        let before = before.tiers[tier];
        if fill.evictions > before.evictions || fill.capacity > 0 && fill.bytes >= fill.capacity {
            return Some(0);
        }
        let seconds = now.saturating_duration_since(*at).as_secs_f64();
        let grown = fill.bytes.saturating_sub(before.bytes) as f64;
        if grown == 0.0 || seconds < 1.0 {
            return None;
        }
        let left = (fill.capacity - fill.bytes.min(fill.capacity)) as f64 / (grown / seconds);
        (left < MAX_FORECAST).then_some(left as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A history in which step number `n` counts `n` requests.
    fn history(steps: u64) -> History {
        let (mut history, start) = (History::default(), Instant::now());
        let mut requests = 0;
        for step in 0..steps {
            requests += step;
            let figures = Figures { requests, gets: 2 * requests, ..Figures::default() };
            history.step(SystemTime::UNIX_EPOCH + STEP * step as u32, start + STEP * step as u32, figures);
        }
        history
    }

    #[test]
    fn points_are_differences_and_the_oldest_are_dropped() {
        assert_eq!(history(0).past().points, []);
        assert_eq!(history(1).past().points, [], "a step has a beginning and an end");
        let past = history(3).past();
        assert_eq!(past.points.iter().map(|point| (point.at, point.requests, point.gets)).collect::<Vec<_>>(), [(10, 1, 2), (20, 2, 4)]);
        let past = history(1000).past();
        assert_eq!((past.points.len(), past.points[0].requests, past.points[POINTS - 1].at), (POINTS, 1000 - POINTS as u64, 9990));
        assert!(past.points.windows(2).all(|pair| pair[1].at - pair[0].at == past.step_seconds));
    }

    #[test]
    fn a_counter_that_fell_gives_no_huge_point() {
        let mut history = history(2);
        history.step(SystemTime::UNIX_EPOCH, Instant::now(), Figures::default());
        assert_eq!(history.past().points.last().map(|point| point.requests), Some(0));
    }

    #[test]
    fn the_forecast_of_a_full_tier() {
        let (mut history, start) = (History::default(), Instant::now());
        let fill = |bytes, evictions| TierLevel { bytes, capacity: 1000, evictions };
        assert_eq!(history.full_in(0, start, fill(1, 0)), None, "nothing is known yet");
        history.step(SystemTime::UNIX_EPOCH, start, Figures { tiers: [fill(100, 5); 3], ..Figures::default() });
        let now = start + STEP;
        assert_eq!(history.full_in(0, now, fill(100, 5)), None, "it does not fill");
        assert_eq!(history.full_in(1, now, fill(50, 5)), None, "it empties");
        assert_eq!(history.full_in(1, now, fill(200, 5)), Some(80), "100 in 10 s, and 800 to go");
        assert_eq!(history.full_in(2, now, fill(900, 6)), Some(0), "it evicts");
        assert_eq!(history.full_in(2, now, fill(1000, 5)), Some(0));
        assert_eq!(history.full_in(2, now, TierLevel::default()), None, "there is none");
        assert_eq!(history.full_in(0, now, TierLevel { bytes: 101, capacity: u64::MAX, evictions: 5 }), None, "in some million years");
    }
}
