//! Whether the origin is up, as the last requests showed. Logs each change once.
//!
//! The origin is down if no connection to it can be opened, if it does not answer in time, or if a gateway in front of it reports that (502,
//! 504). Any other answer shows that it is up: a 500 may concern one blob only, and a 503 means that it is busy. If a connection breaks before
//! the answer, that may concern one request only, so it takes [`BROKEN`] of these in a row.
//!
//! Requests overlap, and a read timeout takes long. So a failure does not count if the origin has answered another request in the meantime:
//!
//! 1. Request A is sent, and gets no answer.
//! 2. Request B is sent later, and is answered. The origin is up.
//! 3. A times out. That shows nothing about the origin now.

use crate::{breaker::BreakerState, metrics::Metrics};
use castier_cache::Fault;
use http::StatusCode;
use parking_lot::Mutex;
use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Instant, SystemTime},
};

/// The origin at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginState {
    /// It answers.
    pub up: bool,
    /// When that last changed; `None` if it never has.
    pub since: Option<SystemTime>,
    /// Requests that were sent to it.
    pub requests: u64,
    /// Requests without an answer or with a 5xx, and answers that broke off.
    pub errors: u64,
    /// Its circuit breaker.
    pub breaker: BreakerState,
}

#[derive(Default)]
pub(crate) struct OriginHealth {
    known: Mutex<Known>,
    requests: AtomicU64,
    errors: AtomicU64,
}

/// How many connections in a row must break before the answer until the origin counts as down.
const BROKEN: u32 = 3;

#[derive(Default)]
struct Known {
    /// When it went down, if it is down.
    down: Option<Instant>,
    since: Option<SystemTime>,
    /// When it last answered.
    answered: Option<Instant>,
    /// How many connections have broken since then.
    broken: u32,
}

impl OriginHealth {
    /// See [`crate::Upstream::report_outcome`]. `origin` is its name in the log.
    pub(crate) fn record(&self, origin: &str, asked: Instant, answer: Result<StatusCode, &Fault>, metrics: &Metrics) {
        self.requests.fetch_add(1, Relaxed);
        match answer {
            Ok(status) => {
                if status.is_server_error() {
                    self.errors.fetch_add(1, Relaxed);
                }
                if matches!(status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT) {
                    self.record_failure(origin, asked, false, &status, metrics);
                } else {
                    self.record_answer(origin, metrics);
                }
            }
            Err(fault) => {
                match fault {
                    Fault::Unreachable { .. } => self.record_failure(origin, asked, true, fault, metrics),
                    Fault::Silent { .. } => self.record_failure(origin, asked, false, fault, metrics),
                    Fault::Unusable { .. } | Fault::Denied { .. } | Fault::Corrupt { .. } => self.record_answer(origin, metrics),
                    // A limit of this node: the origin was not asked.
                    _ => {
                        self.requests.fetch_sub(1, Relaxed);
                        return;
                    }
                }
                self.errors.fetch_add(1, Relaxed);
            }
        }
    }

    /// No connection could be opened. The attempt began at `begun`. [`Self::record`] counts the request that needed it.
    pub(crate) fn record_unreachable(&self, origin: &str, begun: Instant, fault: &Fault, metrics: &Metrics) {
        self.record_failure(origin, begun, false, fault, metrics);
    }

    fn record_answer(&self, origin: &str, metrics: &Metrics) {
        let mut known = self.known.lock();
        (known.answered, known.broken) = (Some(Instant::now()), 0);
        if let Some(down) = known.down.take() {
            known.since = Some(SystemTime::now());
            metrics.set_origin_up(true);
            tracing::info!(origin, seconds = down.elapsed().as_secs_f64(), "the origin is up again");
        }
    }

    /// A request that was sent at `asked` got no answer from the origin. `broke`: its connection broke.
    fn record_failure(&self, origin: &str, asked: Instant, broke: bool, why: &dyn fmt::Display, metrics: &Metrics) {
        let mut known = self.known.lock();
        if known.down.is_some() || known.answered.is_some_and(|answered| answered >= asked) {
            return;
        }
        known.broken += 1;
        if broke && known.broken < BROKEN {
            return;
        }
        (known.down, known.since) = (Some(Instant::now()), Some(SystemTime::now()));
        metrics.set_origin_up(false);
        tracing::warn!(origin, %why, "the origin is down: what is kept is served, and misses fail until it answers");
    }

    /// The body of an answer broke off.
    pub(crate) fn record_broken_body(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    pub(crate) fn state(&self) -> OriginState {
        let known = self.known.lock();
        OriginState {
            up: known.down.is_none(),
            since: known.since,
            requests: self.requests.load(Relaxed),
            errors: self.errors.load(Relaxed),
            breaker: BreakerState::Closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_late_news_do_not() {
        let (health, metrics) = (OriginHealth::default(), Metrics::new(&Default::default()).unwrap());
        let up = |health: &OriginHealth| health.state().up;
        let unreachable = Fault::Unreachable { source_name: "origin", why: String::new() };
        let silent = Fault::Silent { source_name: "origin", why: String::new() };
        assert_eq!(health.state(), OriginState { up: true, since: None, requests: 0, errors: 0, breaker: BreakerState::Closed });
        let early = Instant::now();
        health.record("o", early, Ok(StatusCode::OK), &metrics);
        assert_eq!(health.state().since, None, "nothing has changed");
        health.record("o", early, Err(&silent), &metrics);
        assert!(up(&health), "another request was answered meanwhile");
        health.record_unreachable("o", Instant::now(), &unreachable, &metrics);
        let since = health.state().since.unwrap();
        health.record("o", Instant::now(), Err(&silent), &metrics);
        assert_eq!((up(&health), health.state().since), (false, Some(since)), "down since the first");
        for status in [404, 500, 503] {
            health.record("o", Instant::now(), Ok(StatusCode::from_u16(status).unwrap()), &metrics);
            assert!(up(&health), "{status}");
        }
        for status in [502, 504] {
            health.record("o", Instant::now(), Ok(StatusCode::OK), &metrics);
            health.record("o", Instant::now(), Ok(StatusCode::from_u16(status).unwrap()), &metrics);
            assert!(!up(&health), "{status}");
        }
        let before = health.state();
        health.record("o", Instant::now(), Err(&Fault::Abandoned), &metrics);
        assert_eq!(health.state(), before, "the origin was not asked");
        health.record("o", Instant::now(), Ok(StatusCode::OK), &metrics);
        for still_up in [true, true, false] {
            health.record("o", Instant::now(), Err(&unreachable), &metrics);
            assert_eq!(up(&health), still_up, "connections that broke");
        }
        assert_eq!((before.requests, before.errors), (10, 6));
    }
}
