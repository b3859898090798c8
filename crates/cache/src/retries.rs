//! When a flight goes on with a transfer that broke.

use crate::fault::Fault;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::time::Duration;

/// A transfer that came this far since the last break has made progress, and gets all its retries again. Without this floor a source that breaks after
/// every byte would be asked for ever.
const PROGRESS: u64 = 64 << 10;

/// The retries that are left to a transfer: `origin.retries`, with growing pauses.
pub(crate) struct Retries {
    retries: usize,
    delays: ExponentialBackoff,
    /// The offset at which the delays were last renewed.
    from: u64,
}

impl Retries {
    pub(crate) fn new(retries: usize) -> Self {
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

    /// How long to wait before the next try; none if there is none. `seen` bytes have come.
    pub(crate) fn after(&mut self, fault: &Fault, seen: u64) -> Option<Duration> {
        match fault {
            Fault::Unreachable { .. } | Fault::Unusable { .. } => {}
            // Without a byte the clients have already waited a full read timeout, so there is no retry.
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
