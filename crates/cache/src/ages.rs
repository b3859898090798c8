//! How old the last few things were that a tier evicted: the counters of the histogram cannot tell what is recent.

use std::{
    sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

/// So many are remembered.
const KEPT: usize = 63;

/// The last ages, in seconds and one more; 0 is none yet. Written at each eviction, on any thread, and so without a lock: of two writers at once one
/// may be lost, which changes no median that anybody could tell.
pub(crate) struct Ages {
    next: AtomicUsize,
    ages: [AtomicU32; KEPT],
}

impl Default for Ages {
    fn default() -> Self {
        Self { next: AtomicUsize::new(0), ages: [const { AtomicU32::new(0) }; KEPT] }
    }
}

impl Ages {
    pub(crate) fn add(&self, age: Duration) {
        let at = self.next.fetch_add(1, Relaxed) % KEPT;
        self.ages[at].store(u32::try_from(age.as_secs()).unwrap_or(u32::MAX - 1).saturating_add(1), Relaxed);
    }

    pub(crate) fn median(&self) -> Option<Duration> {
        let mut ages: Vec<_> = self.ages.iter().map(|age| age.load(Relaxed)).filter(|age| *age > 0).collect();
        let middle = ages.len() / 2;
        if ages.is_empty() {
            return None;
        }
        let (_, median, _) = ages.select_nth_unstable(middle);
        Some(Duration::from_secs(u64::from(*median - 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_the_last_ones() {
        let ages = Ages::default();
        assert_eq!(ages.median(), None);
        ages.add(Duration::from_millis(300));
        assert_eq!(ages.median(), Some(Duration::ZERO));
        (0..1000).for_each(|_| ages.add(Duration::from_secs(5)));
        (0..KEPT as u64).for_each(|age| ages.add(Duration::from_secs(age)));
        assert_eq!(ages.median(), Some(Duration::from_secs(31)));
    }
}
