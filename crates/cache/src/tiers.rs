//! The tiers of this node.

use crate::{
    budget::Budget,
    disk::Disk,
    memory::Memory,
    metrics::Metrics,
    resource::Visibility,
    via::{Owner, Tier},
};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use castier_config as config;
use std::{io, sync::Arc};
use tokio::sync::mpsc;

/// All tiers of this node.
///
/// Invariant: a blob that a peer owns is kept in the mirror or not at all ([`Owner`]).
#[derive(Clone)]
pub struct Tiers {
    /// For blobs that this node owns.
    pub memory: Arc<Memory>,
    /// For hot blobs that peers own; `None` without a cluster.
    pub mirror: Option<Arc<Memory>>,
    /// For blobs that this node owns; `None` unless it is configured.
    pub disk: Option<Arc<Disk>>,
}

impl Tiers {
    /// The configured tiers. In a cluster, the mirror gets a share of the memory. `open_files` replaces `disk.open_files`, since the process may open
    /// fewer. `budget` is `fill.memory`. `rotten` is called for each damaged blob that the disk tier finds.
    ///
    /// # Errors
    /// The disk tier's directory cannot be used. The text names it.
    pub fn open(
        config: &config::Castier,
        open_files: u64,
        budget: &Arc<Budget>,
        metrics: &Arc<Metrics>,
        rotten: mpsc::Sender<Digest>,
    ) -> io::Result<Self> {
        let share = config.cluster.as_ref().map(|cluster| cluster.mirror_share);
        let (memory, mirror) = {
            let metrics = metrics.clone();
            Memory::with_mirror(&config.memory, share, budget, move |tier, age| metrics.evicted(tier, age))
        };
        let disk = match &config.disk {
            Some(disk) => Some(Disk::open(&config::Disk { open_files, ..disk.clone() }, metrics.clone(), rotten)?),
            None => None,
        };
        Ok(Self { memory: Arc::new(memory), mirror: mirror.map(Arc::new), disk })
    }

    /// The blob, if it is in memory and a request that `sees` so much may see it, and the tier that has it.
    pub fn in_memory(&self, digest: &Digest, sees: Visibility) -> Option<(Bytes, Tier)> {
        let in_memory = self.memory.find(digest).filter(|(_, visibility)| sees.sees(*visibility));
        if let Some((bytes, _)) = in_memory {
            return Some((bytes, Tier::Memory));
        }
        let (bytes, _) = self.mirror.as_ref()?.find(digest).filter(|(_, visibility)| sees.sees(*visibility))?;
        Some((bytes, Tier::Mirror))
    }

    /// The blob, if it is in memory, and who may see it. Never misses a blob that an index is moving.
    pub fn in_memory_settled(&self, digest: &Digest) -> Option<(Bytes, Tier, Visibility)> {
        if let Some((bytes, visibility)) = self.memory.find_settled(digest) {
            return Some((bytes, Tier::Memory, visibility));
        }
        let (bytes, visibility) = self.mirror.as_ref()?.find_settled(digest)?;
        Some((bytes, Tier::Mirror, visibility))
    }

    /// Everybody may see the blob from now on.
    pub fn publish(&self, digest: &Digest) {
        self.memory.publish(digest);
        if let Some(mirror) = &self.mirror {
            mirror.publish(digest);
        }
        if let Some(disk) = &self.disk {
            disk.publish(digest);
        }
    }

    /// Counts one get for the eviction policies: in the memory tier or mirror that had the blob, or in all tiers. Call it once for each get.
    pub fn count(&self, digest: &Digest, hit: Option<Tier>) {
        if hit != Some(Tier::Mirror) {
            self.memory.count(digest);
        }
        if hit != Some(Tier::Memory)
            && let Some(mirror) = &self.mirror
        {
            mirror.count(digest);
        }
        if !matches!(hit, Some(Tier::Memory | Tier::Mirror))
            && let Some(disk) = &self.disk
        {
            disk.count(digest);
        }
    }

    /// Whether memory keeps a blob of this size.
    pub fn memory_takes(&self, size: u64, owner: Owner) -> bool {
        match owner {
            Owner::ThisNode => self.memory.takes(size),
            Owner::Peer => self.mirror.as_ref().is_some_and(|mirror| mirror.takes(size)),
        }
    }

    /// Whether the disk would keep this blob now.
    pub fn disk_keeps(&self, digest: &Digest, size: u64, owner: Owner) -> bool {
        owner == Owner::ThisNode && self.disk.as_ref().is_some_and(|disk| disk.keeps(digest, size))
    }

    /// Keeps a blob that is in one piece of memory. The disk gets it a little later. If memory keeps it, returns the bytes that every reader must use
    /// from now on. See [`Memory::keep`] for the lease that the caller must hold.
    pub fn keep(&self, blob: Verified<Bytes>, owner: Owner, visibility: Visibility) -> Option<Bytes> {
        if owner == Owner::Peer {
            return self.mirror.as_ref()?.keep(blob, visibility);
        }
        if let Some(disk) = &self.disk {
            disk.keep_later(blob.clone(), visibility);
        }
        self.memory.keep(blob, visibility)
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
