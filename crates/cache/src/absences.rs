//! Blobs that the origin does not have, as it said lately: the negative cache.

use castier_blob::Digest;
use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

/// Remembers which blobs are absent, each for `limits.negative_ttl`, and at most `limits.max_negative` of them.
///
/// A write ends an absence at once: see [`Self::clear`]. That is why this is used under the lock of the flights' map.
#[derive(Default)]
pub(crate) struct Absences {
    until: HashMap<Digest, Instant>,
    /// In the order in which they were remembered. An absence that was cleared, or remembered anew, leaves a stale pair behind.
    order: VecDeque<(Digest, Instant)>,
}

impl Absences {
    /// Whether the blob is known to be absent.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.until.get(digest).is_some_and(|until| *until > Instant::now())
    }

    /// Remembers an absence for `ttl`, unless `most` are remembered already.
    pub(crate) fn remember(&mut self, digest: Digest, ttl: Duration, most: usize) {
        self.drop_expired();
        if self.order.len() > 2 * most {
            let until = &self.until;
            self.order.retain(|(digest, at)| until.get(digest) == Some(at));
        }
        if ttl.is_zero() || self.until.len() >= most {
            return;
        }
        let until = Instant::now() + ttl;
        self.until.insert(digest, until);
        self.order.push_back((digest, until));
    }

    /// The blob may be there now.
    pub(crate) fn clear(&mut self, digest: &Digest) {
        self.until.remove(digest);
    }

    /// Forgets what is over. Where `limits.negative_ttl` was shortened, the older absences are over later than the newer ones, which then wait for
    /// them here; [`Self::has`] does not.
    fn drop_expired(&mut self) {
        let now = Instant::now();
        while let Some((digest, until)) = self.order.front() {
            let current = self.until.get(digest) == Some(until);
            if current && *until > now {
                break;
            }
            if current {
                self.until.remove(digest);
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absences_end_in_time_by_a_write_and_at_the_limit() {
        let digest = |n: u8| Digest::of(&[n]);
        let (long, mut absences) = (Duration::from_secs(600), Absences::default());
        (0..5).for_each(|n| absences.remember(digest(n), long, 3));
        assert_eq!((0..5).map(|n| absences.has(&digest(n))).collect::<Vec<_>>(), [true, true, true, false, false]);
        absences.clear(&digest(1));
        absences.remember(digest(4), long, 3);
        assert!(!absences.has(&digest(1)) && absences.has(&digest(4)));
        let mut absences = Absences::default();
        absences.remember(digest(0), Duration::ZERO, 3);
        assert!(!absences.has(&digest(0)), "none is to be remembered");
        absences.remember(digest(0), Duration::from_nanos(1), 1);
        std::thread::sleep(Duration::from_millis(1));
        assert!(!absences.has(&digest(0)));
        absences.remember(digest(1), long, 1);
        assert!(absences.has(&digest(1)), "what is over takes no place");
        for _ in 0..1000 {
            absences.clear(&digest(1));
            absences.remember(digest(1), long, 1);
        }
        assert!(absences.has(&digest(1)) && absences.order.len() <= 3, "{}", absences.order.len());
    }
}
