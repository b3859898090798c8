//! How the origin is, as the last requests found it.
//!
//! It is down when it gives no answer, or when a gateway in front of it says so (502, 504). Any other answer shows that it is up: a
//! status of 500 may be about one blob, and 503 says that it has much to do.
//!
//! Requests overlap. So one that came to nothing proves nothing if the origin has answered another since it was sent: a silence is noticed
//! half a minute late.

use crate::{fault::Fault, metrics::Metrics};
use http::StatusCode;
use parking_lot::Mutex;
use std::{
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
pub(super) struct Standing {
    known: Mutex<Known>,
    requests: AtomicU64,
    errors: AtomicU64,
}

#[derive(Default)]
struct Known {
    down: bool,
    since: Option<SystemTime>,
    /// When it last answered.
    answered: Option<Instant>,
}

impl Standing {
    /// See [`super::Upstream::found`].
    pub(super) fn found(&self, asked: Instant, answer: Result<StatusCode, &Fault>, metrics: &Metrics) {
        let (down, failed) = match answer {
            Ok(status) => (matches!(status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT), status.is_server_error()),
            Err(Fault::Unreachable { .. } | Fault::Silent { .. }) => (true, true),
            Err(Fault::Unusable { .. } | Fault::Corrupt { .. }) => (false, true),
            // A limit of this node: nobody was asked.
            Err(_) => return,
        };
        self.requests.fetch_add(1, Relaxed);
        if failed {
            self.errors.fetch_add(1, Relaxed);
        }
        let mut known = self.known.lock();
        if down && known.answered.is_some_and(|answered| answered >= asked) {
            return;
        }
        if !down {
            known.answered = Some(Instant::now());
        }
        if known.down != down {
            (known.down, known.since) = (down, Some(SystemTime::now()));
            metrics.set_origin_up(!down);
        }
    }

    /// The body of an answer broke off.
    pub(super) fn broke(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    pub(super) fn state(&self) -> OriginState {
        let known = self.known.lock();
        OriginState { up: !known.down, since: known.since, requests: self.requests.load(Relaxed), errors: self.errors.load(Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_late_news_do_not() {
        let (standing, metrics) = (Standing::default(), Metrics::new().unwrap());
        let up = |standing: &Standing| standing.state().up;
        let unreachable = Fault::Unreachable { source_name: "origin", why: String::new() };
        let silent = Fault::Silent { source_name: "origin", why: String::new() };
        assert_eq!(standing.state(), OriginState { up: true, since: None, requests: 0, errors: 0 });
        let early = Instant::now();
        standing.found(early, Ok(StatusCode::OK), &metrics);
        assert_eq!(standing.state().since, None, "nothing has changed");
        standing.found(early, Err(&silent), &metrics);
        assert!(up(&standing), "another request was answered meanwhile");
        standing.found(Instant::now(), Err(&unreachable), &metrics);
        let since = standing.state().since.unwrap();
        standing.found(Instant::now(), Err(&silent), &metrics);
        assert_eq!((up(&standing), standing.state().since), (false, Some(since)), "down since the first");
        for status in [404, 500, 503] {
            standing.found(Instant::now(), Ok(StatusCode::from_u16(status).unwrap()), &metrics);
            assert!(up(&standing), "{status}");
        }
        for status in [502, 504] {
            standing.found(Instant::now(), Ok(StatusCode::OK), &metrics);
            standing.found(Instant::now(), Ok(StatusCode::from_u16(status).unwrap()), &metrics);
            assert!(!up(&standing), "{status}");
        }
        let before = standing.state();
        standing.found(Instant::now(), Err(&Fault::Abandoned), &metrics);
        assert_eq!(standing.state(), before, "the origin was not asked");
        assert_eq!((before.requests, before.errors), (11, 7));
    }
}
