//! What is forgotten while uploads are on their way.
//!
//! The race:
//! 1. An upload reaches the origin, which stores it and says so.
//! 2. Before this node has read that, a client deletes the blob: the origin deletes it, and every node forgets it.
//! 3. This node reads that the upload is stored, and would keep a blob that the origin no longer has.
//!
//! So each upload notes, before the origin hears of it, how much has been forgotten so far, and is kept only if that is still so. Looking
//! and keeping are one step, and so is noting what is forgotten: `Ladder::forget` drops the blob from the tiers after that.

use castier_blob::Digest;
use parking_lot::{Mutex, MutexGuard};

/// Counts by the digest's first byte. If a neighbour is forgotten meanwhile, the upload is not kept either. That is rare, and costs a cache entry.
pub(super) struct Forgotten([Mutex<u64>; 256]);

/// How much had been forgotten when an upload began.
pub(super) enum Before {
    /// The upload has a name.
    Named(u64),
    /// It will get its name at its end.
    Unnamed(Box<[u64; 256]>),
}

impl Default for Forgotten {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::new(0)))
    }
}

impl Forgotten {
    /// An upload begins.
    pub(super) fn before(&self, digest: Option<&Digest>) -> Before {
        match digest {
            Some(digest) => Before::Named(*self.of(digest).lock()),
            None => Before::Unnamed(Box::new(std::array::from_fn(|at| *self.0[at].lock()))),
        }
    }

    /// The blob is about to be forgotten.
    pub(super) fn note(&self, digest: &Digest) {
        *self.of(digest).lock() += 1;
    }

    /// While this is held nothing of the kind can be forgotten; none if something has been since.
    pub(super) fn unchanged(&self, digest: &Digest, before: &Before) -> Option<MutexGuard<'_, u64>> {
        let now = self.of(digest).lock();
        let then = match before {
            Before::Named(then) => *then,
            Before::Unnamed(all) => all[usize::from(digest.as_bytes()[0])],
        };
        (*now == then).then_some(now)
    }

    fn of(&self, digest: &Digest) -> &Mutex<u64> {
        &self.0[usize::from(digest.as_bytes()[0])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_meanwhile_is_told_from_what_was_before() {
        let forgotten = Forgotten::default();
        let (blob, other) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_ne!(blob.as_bytes()[0], other.as_bytes()[0]);
        forgotten.note(&blob);
        for named in [true, false] {
            let before = forgotten.before(named.then_some(&blob));
            forgotten.note(&other);
            assert!(forgotten.unchanged(&blob, &before).is_some(), "another blob");
            forgotten.note(&blob);
            assert!(forgotten.unchanged(&blob, &before).is_none());
        }
    }
}
