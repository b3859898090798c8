//! The tiers of this node side by side, for whoever looks for a blob or has one.

use crate::{disk::Disk, memory::Memory, tier::TierName};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use std::sync::Arc;

/// Where blobs are kept.
///
/// Invariant: what another node owns is kept in the mirror or not at all, so that the memories and disks of all nodes together are one
/// cache, and not as many copies of the same.
#[derive(Clone)]
pub struct Tiers {
    /// What this node owns.
    pub memory: Arc<Memory>,
    /// What others own and is hot here; none without a cluster.
    pub mirror: Option<Arc<Memory>>,
    /// What this node owns, and more of it.
    pub disk: Option<Arc<Disk>>,
}

impl Tiers {
    /// The blob, if it is in memory, and in which part of it.
    pub fn in_memory(&self, digest: &Digest) -> Option<(Bytes, TierName)> {
        if let Some(bytes) = self.memory.find(digest) {
            return Some((bytes, TierName::Memory));
        }
        Some((self.mirror.as_ref()?.find(digest)?, TierName::Mirror))
    }

    /// As [`Self::in_memory`], and sure that a blob that is not found is not there.
    pub fn in_memory_settled(&self, digest: &Digest) -> Option<(Bytes, TierName)> {
        if let Some(bytes) = self.memory.find_settled(digest) {
            return Some((bytes, TierName::Memory));
        }
        Some((self.mirror.as_ref()?.find_settled(digest)?, TierName::Mirror))
    }

    /// Counts one get for the policies of the tiers that it reached: the one in memory that had the blob, or all of them. Call it once for each
    /// get, however often that looks.
    pub fn count(&self, digest: &Digest, hit: Option<TierName>) {
        if hit != Some(TierName::Mirror) {
            self.memory.count(digest);
        }
        if hit != Some(TierName::Memory)
            && let Some(mirror) = &self.mirror
        {
            mirror.count(digest);
        }
        if !matches!(hit, Some(TierName::Memory | TierName::Mirror))
            && let Some(disk) = &self.disk
        {
            disk.count(digest);
        }
    }

    /// Whether memory keeps a blob of this size. `foreign`: another node owns it.
    pub fn memory_takes(&self, size: u64, foreign: bool) -> bool {
        if foreign { self.mirror.as_ref().is_some_and(|mirror| mirror.takes(size)) } else { self.memory.takes(size) }
    }

    /// Whether the disk would keep this blob now. `foreign`: another node owns it.
    pub fn disk_keeps(&self, digest: &Digest, size: u64, foreign: bool) -> bool {
        !foreign && self.disk.as_ref().is_some_and(|disk| disk.keeps(digest, size))
    }

    /// Keeps a blob that is at hand as a whole, on disk a little later. Gives back its bytes as all must hold them from now on, if memory
    /// keeps them. See [`Memory::keep`] for what the caller must have leased.
    pub fn keep(&self, blob: Verified<Bytes>, foreign: bool) -> Option<Bytes> {
        if foreign {
            return self.mirror.as_ref()?.keep(blob);
        }
        if let Some(disk) = &self.disk {
            disk.keep_later(blob.clone());
        }
        self.memory.keep(blob)
    }

    /// Drops the blob. The order matters: a promotion moves it from disk to memory.
    pub async fn forget(&self, digest: &Digest) {
        if let Some(disk) = &self.disk {
            disk.forget(digest).await;
        }
        self.memory.forget(digest);
        if let Some(mirror) = &self.mirror {
            mirror.forget(digest);
        }
    }
}
