//! Whether the origin can be reached, as the last requests found it. Told once per change.
//!
//! A request that fails says little by itself: the origin may be slow with this one, and well with a hundred others. So the origin is down
//! when a request finds no connection, or no answer within the time for it, and no other request has had an answer since that one began. A
//! connection that breaks before the answer may be one request's bad luck, so that takes a few in a row.

use parking_lot::Mutex;
use std::time::{Instant, SystemTime};

/// What is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// It answers. So it is taken to be until a request finds otherwise.
    pub up: bool,
    /// Since when it is so; none if no request has found out yet.
    pub since: Option<SystemTime>,
}

/// So many connections in a row must break before the answer.
const BROKEN: u32 = 3;

/// Why a request has had no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missed {
    /// No connection, or no answer in time.
    Nobody,
    /// The connection broke.
    Broken,
}

/// Keeps what is known.
pub(super) struct Watched(Mutex<State>);

struct State {
    reach: Reach,
    /// When it went down.
    down: Option<Instant>,
    /// The last answer.
    answered: Option<Instant>,
    /// So many connections have broken since.
    broken: u32,
}

impl Default for Watched {
    fn default() -> Self {
        Self(Mutex::new(State { reach: Reach { up: true, since: None }, down: None, answered: None, broken: 0 }))
    }
}

impl Watched {
    pub(super) fn reach(&self) -> Reach {
        self.0.lock().reach
    }

    /// It has answered.
    pub(super) fn answered(&self, origin: &str) {
        let mut state = self.0.lock();
        (state.answered, state.broken) = (Some(Instant::now()), 0);
        if state.reach.since.is_none() || !state.reach.up {
            state.reach = Reach { up: true, since: Some(SystemTime::now()) };
        }
        if let Some(down) = state.down.take() {
            tracing::info!(origin, seconds = down.elapsed().as_secs_f64(), "the origin is up again");
        }
    }

    /// A request that began at `begun` has had no answer.
    pub(super) fn missed(&self, origin: &str, begun: Instant, how: Missed, why: &dyn std::fmt::Display) {
        let mut state = self.0.lock();
        if state.down.is_some() || state.answered.is_some_and(|answered| answered >= begun) {
            return;
        }
        state.broken += 1;
        if how == Missed::Broken && state.broken < BROKEN {
            return;
        }
        state.down = Some(Instant::now());
        state.reach = Reach { up: false, since: Some(SystemTime::now()) };
        tracing::warn!(origin, %why, "the origin is down: what is kept is served, and misses fail until it answers");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_beside_answers_is_no_outage() {
        let watched = Watched::default();
        assert_eq!(watched.reach(), Reach { up: true, since: None });
        let begun = Instant::now();
        watched.answered("o");
        let first = watched.reach();
        assert!(first.up && first.since.is_some());
        watched.missed("o", begun, Missed::Nobody, &"slow");
        assert_eq!(watched.reach(), first, "another request had an answer meanwhile");
        let later = Instant::now();
        watched.missed("o", later, Missed::Nobody, &"gone");
        let down = watched.reach();
        assert!(!down.up && down.since >= first.since);
        watched.missed("o", Instant::now(), Missed::Nobody, &"still gone");
        assert_eq!(watched.reach(), down, "it went down once");
        watched.answered("o");
        assert!(watched.reach().up);
        for up in [true, true, false] {
            watched.missed("o", Instant::now(), Missed::Broken, &"broken");
            assert_eq!(watched.reach().up, up);
        }
    }
}
