//! A tier keeps verified blobs, returns them byte for byte, and may drop them at any time.
//!
//! The tests below this module are the contract of every tier. Each test runs on all tiers.

#[cfg(test)]
pub(crate) mod tests;

/// The tier cannot read the blob's bytes. It has dropped the blob already. The answer must continue from another source, at the same offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kept blob is damaged; its bytes must come from elsewhere")]
pub struct Damaged;

/// The state of a tier, for `/stats` and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TierStats {
    /// The bytes in use, including overhead.
    pub bytes: u64,
    /// The most bytes it may use.
    pub capacity: u64,
    /// Blobs it keeps.
    pub blobs: u64,
    /// Gets it answered.
    pub hits: u64,
    /// Blobs that it evicted.
    pub evictions: u64,
}
