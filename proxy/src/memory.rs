//! The memory tier. With `disk.rs`, the only place that sees moka.

use crate::tier::{Tier, TierStats};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use castier_config::{self as config, Policy, Share, Size};
use moka::{policy::EvictionPolicy, sync::Cache};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// What moka, its frequency sketch, the allocator's rounding and our own headers cost beside the bytes of a blob. Measured as resident
/// memory over a cache full of 1 KiB blobs; the weigher adds it so that `memory.capacity` means resident memory.
const OVERHEAD: u64 = 420;

/// Blobs from this size on make room for themselves at once.
const EVICT_AT_ONCE: u64 = 16 << 10;

/// Blobs in memory, whole and verified.
pub struct Memory {
    cache: Cache<Digest, Bytes>,
    capacity: u64,
    max_blob: u64,
    evictions: Arc<AtomicU64>,
}

impl Memory {
    /// The memory tier, and beside it, in a part of the same capacity, the mirror: what other nodes own and is hot here. Heat is what
    /// the mirror is about, so its policy is not asked for.
    pub fn with_mirror(config: &config::Memory, share: Option<Share>) -> (Self, Option<Self>) {
        let part = share.map_or(0, |share| share.of(config.capacity).get());
        let own = config::Memory { capacity: Size::new(config.capacity.get() - part), ..config.clone() };
        let mirror = config::Memory { capacity: Size::new(part), policy: Policy::TinyLfu, ..config.clone() };
        (Self::new(&own), (part > 0).then(|| Self::new(&mirror)))
    }

    /// An empty tier as configured.
    pub fn new(config: &config::Memory) -> Self {
        let evictions = Arc::new(AtomicU64::new(0));
        let counter = evictions.clone();
        let capacity = config.capacity.get();
        let cache = Cache::builder()
            .max_capacity(capacity)
            .weigher(|_, bytes: &Bytes| u32::try_from(bytes.len() as u64 + OVERHEAD).unwrap_or(u32::MAX))
            .eviction_policy(match config.policy {
                Policy::TinyLfu => EvictionPolicy::tiny_lfu(),
                Policy::Lru => EvictionPolicy::lru(),
            })
            .eviction_listener(move |_, _, cause| {
                if cause.was_evicted() {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            })
            .build();
        Self { cache, capacity, max_blob: config.max_blob.get().min(capacity), evictions }
    }

    /// The blob, if it is kept here. Copies nothing.
    pub fn find(&self, digest: &Digest) -> Option<Bytes> {
        self.cache.get(digest)
    }

    /// Whether a blob of this size may be kept at all.
    pub const fn takes(&self, size: u64) -> bool {
        size <= self.max_blob
    }

    /// Keeps a blob, if the admission policy agrees.
    pub fn keep(&self, blob: Verified<Bytes>) {
        let size = blob.size();
        if self.takes(size) {
            self.cache.insert(blob.digest(), blob.into_content());
            // moka evicts when some dozens of writes have gathered: little with small blobs, hundreds of MiB with large ones.
            if size >= EVICT_AT_ONCE {
                self.cache.run_pending_tasks();
            }
        }
    }

    /// Drops a blob; true if it was here.
    pub fn forget(&self, digest: &Digest) -> bool {
        self.cache.remove(digest).is_some()
    }

    /// Its state now. `hits` are counted by the ladder, which alone knows what was a get.
    pub fn stats(&self, hits: u64) -> TierStats {
        self.cache.run_pending_tasks();
        TierStats {
            bytes: self.cache.weighted_size(),
            capacity: self.capacity,
            blobs: self.cache.entry_count(),
            hits,
            evictions: self.evictions.load(Ordering::Relaxed),
        }
    }
}

impl Tier for Memory {
    type Kept = Bytes;

    async fn find(&self, digest: &Digest) -> Option<Bytes> {
        Self::find(self, digest)
    }

    async fn keep(&self, blob: Verified<Bytes>) {
        Self::keep(self, blob);
    }

    async fn forget(&self, digest: &Digest) {
        Self::forget(self, digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use castier_blob::Verifier;

    fn verified(bytes: Vec<u8>) -> Verified<Bytes> {
        let mut verifier = Verifier::any();
        verifier.update(&bytes);
        verifier.finish(Bytes::from(bytes)).unwrap()
    }

    fn tier(capacity: u64, max_blob: u64) -> Memory {
        Memory::new(&config::Memory { capacity: Size::new(capacity), max_blob: Size::new(max_blob), policy: Policy::Lru })
    }

    #[test]
    fn keeps_finds_and_forgets() {
        let tier = tier(1 << 20, 1 << 10);
        let blob = verified(b"hello".to_vec());
        let digest = blob.digest();
        assert_eq!(tier.find(&digest), None);
        tier.keep(blob);
        assert_eq!(tier.find(&digest).as_deref(), Some(&b"hello"[..]));
        assert!(tier.forget(&digest));
        assert!(!tier.forget(&digest));
        assert_eq!(tier.find(&digest), None);
    }

    #[test]
    fn refuses_what_is_too_large_and_stays_within_capacity() {
        let tier = tier(100_000, 1_000);
        let large = verified(vec![7; 1_001]);
        let digest = large.digest();
        tier.keep(large);
        assert_eq!(tier.find(&digest), None);
        for i in 0..1_000u32 {
            tier.keep(verified(i.to_le_bytes().repeat(100)));
        }
        let stats = tier.stats(0);
        assert!(stats.bytes <= 100_000 && stats.blobs > 50 && stats.evictions > 800, "{stats:?}");
    }
}
