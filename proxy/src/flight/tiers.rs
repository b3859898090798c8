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

    /// Whether a blob of this size may be kept. `foreign`: another node owns it.
    pub fn take(&self, size: u64, foreign: bool) -> bool {
        if foreign {
            return self.mirror.as_ref().is_some_and(|mirror| mirror.takes(size));
        }
        self.memory.takes(size) || self.disk.as_ref().is_some_and(|disk| disk.takes(size))
    }

    /// Keeps a blob that is at hand as a whole, on disk a little later.
    pub fn keep(&self, blob: Verified<Bytes>, foreign: bool) {
        match (&self.mirror, &self.disk) {
            (Some(mirror), _) if foreign => return mirror.keep(blob),
            _ if foreign => return,
            (_, Some(disk)) => disk.keep_later(blob.clone()),
            (_, None) => {}
        }
        self.memory.keep(blob);
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
