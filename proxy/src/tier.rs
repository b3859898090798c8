//! What a tier is: a place that keeps verified blobs, finds them again byte for byte, and may drop them at any time.
//!
//! The tests below this module are the contract of every tier: each runs on all of them.

use bytes::Bytes;
use castier_blob::{Digest, Verified};

#[cfg(test)]
pub(crate) mod tests;

/// The tiers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TierName {
    /// Memory.
    Memory,
    /// The part of it for blobs that other nodes own.
    Mirror,
    /// Disk.
    Disk,
}

impl TierName {
    /// As it stands in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Mirror => "mirror",
            Self::Disk => "disk",
        }
    }
}

/// A place where blobs are kept.
pub trait Tier: Send + Sync {
    /// A blob that was found here.
    type Kept: Kept;

    /// The blob, if it is kept here.
    fn find(&self, digest: &Digest) -> impl Future<Output = Option<Self::Kept>> + Send;

    /// Keeps a blob, if it fits and the admission policy agrees. Whatever goes wrong costs a cache entry and no more.
    fn keep(&self, blob: Verified<Bytes>) -> impl Future<Output = ()> + Send;

    /// Drops a blob. Once this is done the blob is not found here until it is kept anew.
    fn forget(&self, digest: &Digest) -> impl Future<Output = ()> + Send;
}

/// A blob that a tier keeps. It stays readable while this is held, whatever the tier does meanwhile.
pub trait Kept: Send + Sync {
    /// The blob's length in bytes.
    fn size(&self) -> u64;

    /// Bytes from offset `at`: at most `max` of them, and at least one unless `at` is at the end or `max` is 0.
    fn read(&self, at: u64, max: usize) -> impl Future<Output = Result<Bytes, Damaged>> + Send;
}

/// The tier can no longer give the blob's bytes. It has seen to itself (the blob is not found here any more); the answer must go on
/// from another place, at the same offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kept blob is damaged; its bytes must come from elsewhere")]
pub struct Damaged;

/// The state of a tier, for `/stats` and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TierStats {
    /// Bytes it takes up, overhead included.
    pub bytes: u64,
    /// Bytes it may take up.
    pub capacity: u64,
    /// Blobs it keeps.
    pub blobs: u64,
    /// Gets it answered.
    pub hits: u64,
    /// Blobs it dropped for lack of room.
    pub evictions: u64,
}

impl Kept for Bytes {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    async fn read(&self, at: u64, max: usize) -> Result<Bytes, Damaged> {
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(self.len());
        Ok(self.slice(start..start.saturating_add(max).min(self.len())))
    }
}
