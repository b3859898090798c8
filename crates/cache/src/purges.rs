//! Purges while uploads are on their way.
//!
//! The race:
//! 1. An upload reaches the origin, which stores it and says so.
//! 2. Before this node has read that, a client deletes the blob: the origin deletes it, and every node forgets it.
//! 3. This node reads that the upload is stored, and would keep a blob that the origin no longer has.
//!
//! So an upload notes, before the origin hears of it, how many purges there have been, and is kept only if there has been none since. The check and the
//! keeping are one step under a lock. A purge is noted under the same lock, and drops the blob from the tiers after that.

use castier_blob::Digest;
use parking_lot::{Mutex, MutexGuard};

/// Counts purges by the first byte of the digest. A purge of another blob with the same first byte also keeps an upload out. That is rare, and costs a
/// cache entry.
pub(crate) struct Purges([Mutex<u64>; 256]);

/// The counts when an upload began.
pub(crate) enum Before {
    /// Of an upload with a name: the count for its first byte.
    Named(u64),
    /// Of an upload that gets its name at its end: all counts.
    Unnamed(Box<[u64; 256]>),
}

impl Default for Purges {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::new(0)))
    }
}

impl Purges {
    /// An upload begins.
    pub(crate) fn before(&self, digest: Option<&Digest>) -> Before {
        match digest {
            Some(digest) => Before::Named(*self.of(digest).lock()),
            None => Before::Unnamed(Box::new(std::array::from_fn(|at| *self.0[at].lock()))),
        }
    }

    /// The blob is about to be purged.
    pub(crate) fn note(&self, digest: &Digest) {
        *self.of(digest).lock() += 1;
    }

    /// A lock under which the blob cannot be purged; none if it may have been purged since `before`.
    pub(crate) fn unchanged(&self, digest: &Digest, before: &Before) -> Option<MutexGuard<'_, u64>> {
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
    fn a_purge_since_the_upload_began_is_noticed() {
        let purges = Purges::default();
        let (blob, other) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_ne!(blob.as_bytes()[0], other.as_bytes()[0]);
        purges.note(&blob);
        for named in [true, false] {
            let before = purges.before(named.then_some(&blob));
            purges.note(&other);
            assert!(purges.unchanged(&blob, &before).is_some(), "another blob");
            purges.note(&blob);
            assert!(purges.unchanged(&blob, &before).is_none());
        }
    }
}
