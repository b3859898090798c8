//! What a tier is: a place that keeps verified blobs, finds them again byte for byte, and may drop them at any time.
//!
//! The tests below this module are the contract of every tier: each runs on all of them.

#[cfg(test)]
pub(crate) mod tests;

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
