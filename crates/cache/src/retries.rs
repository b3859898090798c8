//! When a flight goes on with a transfer that broke.

use crate::fault::Fault;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use parking_lot::Mutex;
use prometheus::IntCounter;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// A transfer that came this far since the last break has made progress, and gets all its retries again. Without this floor a source that breaks after
/// every byte would be asked for ever.
const PROGRESS: u64 = 64 << 10;

/// So many retries are free, and one more comes back in each second. A node with few requests has them, too.
const RESERVE: f64 = 10.0;

/// How many retries all requests together may make (Finagle's `RetryBudget`): a part of the number of requests, so that retries do not multiply an
/// outage.
#[derive(Debug)]
pub struct RetryBudget {
    /// `origin.retry_budget`, as a share.
    share: f64,
    /// How many retries are left, and when that was.
    left: Mutex<(f64, Instant)>,
    refusals: IntCounter,
}

impl RetryBudget {
    /// `percent` retries for each hundred requests. Counts what it refuses.
    pub fn new(percent: u32, refusals: IntCounter) -> Arc<Self> {
        Arc::new(Self { share: f64::from(percent) / 100.0, left: Mutex::new((RESERVE, Instant::now())), refusals })
    }

    /// Notes a request that is no retry.
    pub fn request(&self) {
        let mut left = self.left.lock();
        left.0 = (left.0 + self.share).min(RESERVE.max(100.0 * self.share));
    }

    /// Takes a retry. False: none is left.
    pub fn retry(&self) -> bool {
        self.retry_at(Instant::now())
    }

    fn retry_at(&self, now: Instant) -> bool {
        let mut left = self.left.lock();
        if left.0 < RESERVE {
            left.0 = (left.0 + now.saturating_duration_since(left.1).as_secs_f64()).min(RESERVE);
        }
        left.1 = now;
        if left.0 < 1.0 {
            self.refusals.inc();
            return false;
        }
        left.0 -= 1.0;
        true
    }
}

/// The retries that are left to a transfer: `origin.retries`, with growing pauses, and within the budget of all.
pub(crate) struct Retries {
    budget: Arc<RetryBudget>,
    retries: usize,
    delays: ExponentialBackoff,
    /// The offset at which the delays were last renewed.
    from: u64,
}

impl Retries {
    pub(crate) fn new(retries: usize, budget: Arc<RetryBudget>) -> Self {
        Self { budget, retries, delays: Self::delays(retries), from: 0 }
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
        let progress = self.renew(seen);
        // After progress it asks for what has not come yet: that is no more load than before.
        self.delays.next().filter(|_| progress || self.budget.retry())
    }

    /// As [`Self::after`], if the source said that it has too much to do. It chose to, and the pauses grow: that needs no budget.
    pub(crate) fn after_limit(&mut self, seen: u64) -> Option<Duration> {
        self.renew(seen);
        self.delays.next()
    }

    /// Whether the transfer has made progress since the last break.
    fn renew(&mut self, seen: u64) -> bool {
        let progress = seen >= self.from + PROGRESS;
        if progress {
            self.delays = Self::delays(self.retries);
            self.from = seen;
        }
        progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(percent: u32) -> Arc<RetryBudget> {
        RetryBudget::new(percent, IntCounter::new("c", "c").unwrap())
    }

    #[test]
    fn retries_are_a_part_of_the_requests() {
        let budget = budget(10);
        let start = budget.left.lock().1;
        let taken = |at| std::iter::repeat_with(|| budget.retry_at(at)).take(1000).filter(|may| *may).count();
        assert_eq!(taken(start), 10, "what is free");
        (0..200).for_each(|_| budget.request());
        assert!((9..=10).contains(&taken(start)), "a tenth, up to a limit");
        (0..50).for_each(|_| budget.request());
        assert!((4..=5).contains(&taken(start)));
        assert_eq!(taken(start + Duration::from_secs(3)), 3, "one in each second");
        assert_eq!(taken(start + Duration::from_secs(3600)), 10);
        assert!(budget.refusals.get() > 3900);
    }

    #[test]
    fn a_transfer_that_comes_forward_needs_no_budget() {
        let budget = budget(0);
        while budget.retry() {}
        let fault = Fault::Unreachable { source_name: "origin", why: String::new() };
        let mut retries = Retries::new(2, budget);
        assert!(
            retries.after(&fault, 0).is_none() && retries.after(&fault, PROGRESS).is_some() && retries.after(&fault, PROGRESS).is_none()
        );
        assert!(retries.after(&Fault::NotAsked { source_name: "origin" }, 2 * PROGRESS).is_none());
    }
}
