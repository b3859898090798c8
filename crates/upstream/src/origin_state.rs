//! How the origin is, as the last requests found it. Told once per change.
//!
//! It is down when no connection to it can be had, when it gives no answer in time, or when a gateway in front of it says so (502, 504). Any
//! other answer shows that it is up: a status of 500 may be about one blob, and 503 says that it has much to do. A connection that breaks
//! before the answer may be one request's bad luck, so it takes a few in a row.
//!
//! Requests overlap. So one that came to nothing proves nothing if the origin has answered another since it was sent: a silence is noticed
//! half a minute late.

use crate::metrics::Metrics;
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
    /// Since when; none if it has always been so.
    pub since: Option<SystemTime>,
    /// Requests that were sent to it.
    pub requests: u64,
    /// Those that got no answer, or one of 500 or more, and answers that broke off.
    pub errors: u64,
}

#[derive(Default)]
pub(crate) struct OriginHealth {
    known: Mutex<Known>,
    requests: AtomicU64,
    errors: AtomicU64,
}

/// So many connections in a row must break before the answer.
const BROKEN: u32 = 3;

#[derive(Default)]
struct Known {
    /// When it went down, if it is.
    down: Option<Instant>,
    since: Option<SystemTime>,
    /// When it last answered.
    answered: Option<Instant>,
    /// How many connections have broken since.
    broken: u32,
}

impl OriginHealth {
    /// See [`crate::Upstream::found`]. `origin` is the name that the log has.
    pub(crate) fn found(&self, origin: &str, asked: Instant, answer: Result<StatusCode, &Fault>, metrics: &Metrics) {
        self.requests.fetch_add(1, Relaxed);
        match answer {
            Ok(status) => {
                if status.is_server_error() {
                    self.errors.fetch_add(1, Relaxed);
                }
                if matches!(status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT) {
                    self.fell(origin, asked, false, &status, metrics);
                } else {
                    self.answered(origin, metrics);
                }
            }
            Err(fault) => {
                match fault {
                    Fault::Unreachable { .. } => self.fell(origin, asked, true, fault, metrics),
                    Fault::Silent { .. } => self.fell(origin, asked, false, fault, metrics),
                    Fault::Unusable { .. } | Fault::Corrupt { .. } => self.answered(origin, metrics),
                    // A limit of this node: nobody was asked.
                    _ => {
                        self.requests.fetch_sub(1, Relaxed);
                        return;
                    }
                }
                self.errors.fetch_add(1, Relaxed);
            }
        }
    }

    /// No connection could be had since `begun`. Which request it was for will be counted by [`Self::found`].
    pub(crate) fn unreached(&self, origin: &str, begun: Instant, fault: &Fault, metrics: &Metrics) {
        self.fell(origin, begun, false, fault, metrics);
    }

    fn answered(&self, origin: &str, metrics: &Metrics) {
        let mut known = self.known.lock();
        (known.answered, known.broken) = (Some(Instant::now()), 0);
        if let Some(down) = known.down.take() {
            known.since = Some(SystemTime::now());
            metrics.set_origin_up(true);
            tracing::info!(origin, seconds = down.elapsed().as_secs_f64(), "the origin is up again");
        }
    }

    /// What was begun at `asked` had no answer of the origin's own; `broke`: its connection broke.
    fn fell(&self, origin: &str, asked: Instant, broke: bool, why: &dyn fmt::Display, metrics: &Metrics) {
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
    pub(crate) fn broke(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    pub(crate) fn state(&self) -> OriginState {
        let known = self.known.lock();
        OriginState {
            up: known.down.is_none(),
            since: known.since,
            requests: self.requests.load(Relaxed),
            errors: self.errors.load(Relaxed),
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
        assert_eq!(health.state(), OriginState { up: true, since: None, requests: 0, errors: 0 });
        let early = Instant::now();
        health.found("o", early, Ok(StatusCode::OK), &metrics);
        assert_eq!(health.state().since, None, "nothing has changed");
        health.found("o", early, Err(&silent), &metrics);
        assert!(up(&health), "another request was answered meanwhile");
        health.unreached("o", Instant::now(), &unreachable, &metrics);
        let since = health.state().since.unwrap();
        health.found("o", Instant::now(), Err(&silent), &metrics);
        assert_eq!((up(&health), health.state().since), (false, Some(since)), "down since the first");
        for status in [404, 500, 503] {
            health.found("o", Instant::now(), Ok(StatusCode::from_u16(status).unwrap()), &metrics);
            assert!(up(&health), "{status}");
        }
        for status in [502, 504] {
            health.found("o", Instant::now(), Ok(StatusCode::OK), &metrics);
            health.found("o", Instant::now(), Ok(StatusCode::from_u16(status).unwrap()), &metrics);
            assert!(!up(&health), "{status}");
        }
        let before = health.state();
        health.found("o", Instant::now(), Err(&Fault::Abandoned), &metrics);
        assert_eq!(health.state(), before, "the origin was not asked");
        health.found("o", Instant::now(), Ok(StatusCode::OK), &metrics);
        for still_up in [true, true, false] {
            health.found("o", Instant::now(), Err(&unreachable), &metrics);
            assert_eq!(up(&health), still_up, "connections that broke");
        }
        assert_eq!((before.requests, before.errors), (10, 6));
    }
}
