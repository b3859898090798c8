//! The memory tier.

use crate::{
    budget::{Budget, Lease},
    eviction::{Index, Shape},
    reader::PIECE,
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
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// What the index, the allocator's rounding and our own headers cost beside the bytes of a blob. Measured as resident
/// memory over a cache full of 1 KiB blobs; it is weighed so that `memory.capacity` means resident memory.
const OVERHEAD: u64 = 420;

/// This part of the capacity is for the counts of how often blobs are asked for.
const COUNTS_PART: u64 = 256;

/// Blobs in memory, whole and verified.
pub struct Memory {
    index: Index<Entry>,
    capacity: u64,
    max_blob: u64,
    evictions: Arc<AtomicU64>,
    /// `fill.memory`: pays for what was evicted while a response still needs it.
    budget: Arc<Budget>,
}

#[derive(Clone)]
struct Entry {
    bytes: Bytes,
    /// When it came; see [`now`].
    since: u32,
    /// None for a blob of one piece, which a slow reader may hold anyway.
    pin: Option<Arc<Pin>>,
}

/// Shared by a blob in the tier and by all who read it. While the blob is in the tier, the tier's capacity pays for it. A slow reader may
/// hold it for longer, and then `fill.memory` pays: without that, slow readers of ever new blobs could hold memory without limit.
struct Pin {
    size: u64,
    budget: Arc<Budget>,
    /// Taken when the blob leaves the tier; given back when the last reader has gone.
    lease: Mutex<Option<Lease>>,
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

/// Tenths of a second since the first call: a quarter of an `Instant`, for entries of which there are millions. It runs for thirteen years.
fn now() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u32::try_from(START.elapsed().as_millis() / 100).unwrap_or(u32::MAX)
}

fn weigh(entry: &Entry) -> u64 {
    entry.bytes.len() as u64 + OVERHEAD
}

impl Memory {
    /// The memory tier, and beside it, in a part of the same capacity, the mirror: what other nodes own and is hot here. Heat is what
    /// the mirror is about, so its policy is not asked for. `evicted` gets the tier and the age of every blob that is evicted.
    pub fn with_mirror(
        config: &config::Memory,
        share: Option<Share>,
        budget: &Arc<Budget>,
        evicted: impl Fn(Tier, Duration) + Clone + Send + Sync + 'static,
    ) -> (Self, Option<Self>) {
        let part = share.map_or(0, |share| share.of(config.capacity).get());
        let own = config::Memory { capacity: Size::new(config.capacity.get() - part), ..config.clone() };
        let mirror = config::Memory { capacity: Size::new(part), policy: Policy::TinyLfu, ..config.clone() };
        let told = |tier| {
            let evicted = evicted.clone();
            move |age| evicted(tier, age)
        };
        let mirror = (part > 0).then(|| Self::telling(&mirror, budget, told(Tier::Mirror)));
        (Self::telling(&own, budget, told(Tier::Memory)), mirror)
    }

    /// An empty tier as configured. `budget` is `fill.memory`.
    pub fn new(config: &config::Memory, budget: &Arc<Budget>) -> Self {
        Self::telling(config, budget, |_| {})
    }

    fn telling(config: &config::Memory, budget: &Arc<Budget>, told: impl Fn(Duration) + Send + Sync + 'static) -> Self {
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
                told(Duration::from_millis(u64::from(now().saturating_sub(entry.since)) * 100));
            }
            if let Some(pin) = &entry.pin {
                pin.left_the_tier();
            }
        });
        Self { index, capacity, max_blob, evictions, budget: budget.clone() }
    }

    /// The blob, if it is kept here. Copies nothing, counts nothing.
    pub fn find(&self, digest: &Digest) -> Option<Bytes> {
        self.index.get(digest).map(|entry| entry.bytes)
    }

    /// As [`Self::find`], and sure that a blob that is not found is not here.
    pub fn find_settled(&self, digest: &Digest) -> Option<Bytes> {
        self.index.get_settled(digest).map(|entry| entry.bytes)
    }

    /// Counts one get, whether or not the blob is here: what is asked for often stays, and is let in.
    pub fn count(&self, digest: &Digest) {
        self.index.count(digest);
    }

    /// Whether a blob of this size is kept.
    pub const fn takes(&self, size: u64) -> bool {
        size <= self.max_blob
    }

    /// Keeps a blob if it takes its size, and gives back its bytes as all must hold them from now on. The caller has a lease of its size, and
    /// gives that back afterwards: while the blob takes the place of others those may still be read.
    pub fn keep(&self, blob: Verified<Bytes>) -> Option<Bytes> {
        let (size, digest) = (blob.size(), blob.digest());
        if !self.takes(size) {
            return None;
        }
        let bytes = blob.into_content();
        let entry = if size <= PIECE as u64 {
            Entry { bytes, since: now(), pin: None }
        } else {
            let pin = Arc::new(Pin { size, budget: self.budget.clone(), lease: Mutex::new(None) });
            Entry { bytes: Bytes::from_owner(Pinned { bytes, _pin: pin.clone() }), since: now(), pin: Some(pin) }
        };
        let shared = entry.bytes.clone();
        self.index.insert(digest, entry);
        Some(shared)
    }

    /// Drops a blob; true if it was here.
    pub fn forget(&self, digest: &Digest) -> bool {
        self.index.remove(digest)
    }

    /// Its state now. `hits` are counted by the cache, which alone knows what was a get.
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
