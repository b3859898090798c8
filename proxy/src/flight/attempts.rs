//! How a flight takes up a broken transfer.

use crate::fault::Fault;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::time::Duration;

/// A broken transfer that came this far since the last break has made progress, and gets all its attempts again. A floor keeps a
/// source that breaks after every byte from being asked for ever.
const PROGRESS: u64 = 64 << 10;

/// How often a broken transfer is taken up again.
pub(super) struct Attempts {
    retries: usize,
    delays: ExponentialBackoff,
    /// Where the transfer stood when the delays were last renewed.
    from: u64,
}

impl Attempts {
    pub(super) fn new(retries: usize) -> Self {
        Self { retries, delays: Self::delays(retries), from: 0 }
    }

    fn delays(retries: usize) -> ExponentialBackoff {
        ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(1))
            .with_max_times(retries)
            .with_jitter()
            .build()
    }

    /// How long to wait before going on; none if it is no use.
    pub(super) fn after(&mut self, fault: &Fault, seen: u64) -> Option<Duration> {
        match fault {
            Fault::Unreachable { .. } | Fault::Unusable { .. } => {}
            // Whoever waits has waited for as long as the source may think. One that has said something may go on.
            Fault::Silent { .. } if seen > 0 => {}
            _ => return None,
        }
        if seen >= self.from + PROGRESS {
            self.delays = Self::delays(self.retries);
            self.from = seen;
        }
        self.delays.next()
    }
}
