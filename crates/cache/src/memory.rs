//! The memory tier.

use crate::{
    budget::{Budget, Lease},
    eviction::{Index, Shape},
    reader::PIECE,
    resource::Visibility,
    tier::TierStats,
    via::Tier,
};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use castier_config::{self as config, Policy, Share, Size};
use parking_lot::Mutex;
use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The memory per blob in addition to its bytes: the index, the allocator's rounding, and headers. Measured as the resident memory of a cache full
/// of 1 KiB blobs, so that `memory.capacity` limits resident memory.
const OVERHEAD: u64 = 420;

/// One part in this many of the capacity is for the counts of gets.
const COUNTS_PART: u64 = 256;

/// The memory tier: whole, verified blobs.
pub struct Memory {
    index: Index<Entry>,
    capacity: u64,
    max_blob: u64,
    evictions: Arc<AtomicU64>,
    /// `fill.memory`. Charged for evicted blobs that a response still reads.
    budget: Arc<Budget>,
}

#[derive(Clone)]
struct Entry {
    bytes: Bytes,
    /// When the blob was kept; see [`now`].
    since: u32,
    /// `None` for a public blob of one piece. A reader may hold one piece without a charge in any case.
    pin: Option<Arc<Pin>>,
}

/// Accounts for a blob that outlives its eviction. The tier and all readers of the blob share it.
///
/// 1. While the blob is in the tier, the tier's capacity covers it.
/// 2. The blob is evicted while a slow reader still has its bytes. Its size is charged to `fill.memory`.
/// 3. The last reader drops the bytes, and the charge ends.
///
/// Without this, slow readers of many different blobs could hold any amount of memory.
struct Pin {
    size: u64,
    budget: Arc<Budget>,
    /// Taken when the blob leaves the tier. Released when the last reader drops the bytes.
    lease: Mutex<Option<Lease>>,
    /// See [`Visibility`].
    is_private: AtomicBool,
}

impl Entry {
    fn visibility(&self) -> Visibility {
        match &self.pin {
            Some(pin) if pin.is_private.load(Ordering::Acquire) => Visibility::Private,
            _ => Visibility::Public,
        }
    }
}

impl Pin {
    fn left_the_tier(&self) {
        self.lease.lock().get_or_insert_with(|| self.budget.charge(self.size));
    }
}

/// The bytes as readers get them.
struct Pinned {
    bytes: Bytes,
    _pin: Arc<Pin>,
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Tenths of a second since the first call. Takes a quarter of the memory of an `Instant`; there are millions of entries. Overflows after thirteen
/// years.
fn now() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u32::try_from(START.elapsed().as_millis() / 100).unwrap_or(u32::MAX)
}

fn weigh(entry: &Entry) -> u64 {
    entry.bytes.len() as u64 + OVERHEAD
}

impl Memory {
    /// The memory tier, and the mirror, which keeps hot blobs that peers own in a share of the same capacity. The mirror's policy is always tiny-lfu,
    /// which recognises hot blobs. `evicted` is called with the tier and the age of every evicted blob.
    pub fn with_mirror(
        config: &config::Memory,
        share: Option<Share>,
        budget: &Arc<Budget>,
        evicted: impl Fn(Tier, Duration) + Clone + Send + Sync + 'static,
    ) -> (Self, Option<Self>) {
        let part = share.map_or(0, |share| share.of(config.capacity).get());
        let own = config::Memory { capacity: Size::new(config.capacity.get() - part), ..config.clone() };
        let mirror = config::Memory { capacity: Size::new(part), policy: Policy::TinyLfu, ..config.clone() };
        let on_evicted = |tier| {
            let evicted = evicted.clone();
            move |age| evicted(tier, age)
        };
        let mirror = (part > 0).then(|| Self::with_callback(&mirror, budget, on_evicted(Tier::Mirror)));
        (Self::with_callback(&own, budget, on_evicted(Tier::Memory)), mirror)
    }

    /// An empty tier. `budget` is `fill.memory`.
    pub fn new(config: &config::Memory, budget: &Arc<Budget>) -> Self {
        Self::with_callback(config, budget, |_| {})
    }

    /// `on_evicted` is called with the age of every evicted blob.
    fn with_callback(config: &config::Memory, budget: &Arc<Budget>, on_evicted: impl Fn(Duration) + Send + Sync + 'static) -> Self {
        let evictions = Arc::new(AtomicU64::new(0));
        let counter = evictions.clone();
        let capacity = config.capacity.get();
        let counts = if config.policy == Policy::TinyLfu { capacity / COUNTS_PART } else { 0 };
        let for_blobs = capacity - counts;
        let max_blob = config.max_blob.get().min(for_blobs.saturating_sub(OVERHEAD));
        let shape = Shape { capacity: for_blobs, window: max_blob + OVERHEAD, counts, unit: 1 };
        let index = Index::new(config.policy, shape, weigh, move |_, entry: Entry, evicted| {
            if evicted {
                counter.fetch_add(1, Ordering::Relaxed);
                on_evicted(Duration::from_millis(u64::from(now().saturating_sub(entry.since)) * 100));
            }
            if let Some(pin) = &entry.pin {
                pin.left_the_tier();
            }
        });
        Self { index, capacity, max_blob, evictions, budget: budget.clone() }
    }

    /// The blob, if the tier keeps it, and who may see it. Does not copy its bytes, and does not count a get.
    pub fn find(&self, digest: &Digest) -> Option<(Bytes, Visibility)> {
        self.index.get(digest).map(|entry| (entry.bytes.clone(), entry.visibility()))
    }

    /// As [`Self::find`], but never misses a blob that the index is moving.
    pub fn find_settled(&self, digest: &Digest) -> Option<(Bytes, Visibility)> {
        self.index.get_settled(digest).map(|entry| (entry.bytes.clone(), entry.visibility()))
    }

    /// Everybody may see the blob from now on.
    pub fn publish(&self, digest: &Digest) {
        if let Some(Entry { pin: Some(pin), .. }) = self.index.get_settled(digest) {
            pin.is_private.store(false, Ordering::Release);
        }
    }

    /// Counts one get, hit or miss. The counts decide about admission and eviction.
    pub fn count(&self, digest: &Digest) {
        self.index.count(digest);
    }

    /// Whether the tier keeps blobs of this size.
    pub const fn takes(&self, size: u64) -> bool {
        size <= self.max_blob
    }

    /// Keeps a blob if its size is allowed. Returns the bytes that every reader must use from now on: they hold the [`Pin`]. The caller must hold a
    /// lease of the blob's size until this returns, since readers may still have the blobs that it evicts.
    pub fn keep(&self, blob: Verified<Bytes>, visibility: Visibility) -> Option<Bytes> {
        let (size, digest) = (blob.size(), blob.digest());
        if !self.takes(size) {
            return None;
        }
        let bytes = blob.into_content();
        let is_private = visibility == Visibility::Private;
        let entry = if size <= PIECE as u64 && !is_private {
            Entry { bytes, since: now(), pin: None }
        } else {
            let is_private = AtomicBool::new(is_private);
            let pin = Arc::new(Pin { size, budget: self.budget.clone(), lease: Mutex::new(None), is_private });
            Entry { bytes: Bytes::from_owner(Pinned { bytes, _pin: pin.clone() }), since: now(), pin: Some(pin) }
        };
        let shared = entry.bytes.clone();
        self.index.insert(digest, entry);
        Some(shared)
    }

    /// Drops a blob. Returns whether the tier had it.
    pub fn forget(&self, digest: &Digest) -> bool {
        self.index.remove(digest)
    }

    /// The state of the tier. The cache counts `hits`, since only it knows which look-ups are gets.
    pub fn stats(&self, hits: u64) -> TierStats {
        let (bytes, blobs) = self.index.size();
        TierStats { bytes, capacity: self.capacity, blobs, hits, evictions: self.evictions.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use castier_blob::Verifier;

    fn verified(bytes: Vec<u8>) -> Verified<Bytes> {
        let mut verifier = Verifier::any(Vec::new());
        verifier.write(&bytes.into()).unwrap();
        verifier.finish().unwrap()
    }

    fn tier(capacity: u64, max_blob: u64) -> Memory {
        let config = config::Memory { capacity: Size::new(capacity), max_blob: Size::new(max_blob), policy: Policy::Lru };
        Memory::new(&config, &Budget::new(1 << 30))
    }

    #[test]
    fn keeps_finds_and_forgets() {
        let tier = tier(1 << 20, 1 << 10);
        let blob = verified(b"hello".to_vec());
        let digest = blob.digest();
        assert_eq!(tier.find(&digest), None);
        tier.keep(blob, Visibility::Public);
        assert_eq!(tier.find(&digest), Some((Bytes::from_static(b"hello"), Visibility::Public)));
        assert!(tier.forget(&digest));
        assert!(!tier.forget(&digest));
        assert_eq!(tier.find(&digest), None);
    }

    #[test]
    fn refuses_what_is_too_large_and_stays_within_capacity() {
        let tier = tier(100_000, 1_000);
        let large = verified(vec![7; 1_001]);
        let digest = large.digest();
        tier.keep(large, Visibility::Public);
        assert_eq!(tier.find(&digest), None);
        for i in 0..1_000u32 {
            tier.keep(verified(i.to_le_bytes().repeat(100)), Visibility::Public);
        }
        let stats = tier.stats(0);
        assert!(stats.bytes <= 100_000 && stats.blobs > 50 && stats.evictions > 800, "{stats:?}");
    }
}
