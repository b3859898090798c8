//! Eviction and admission: decides which blobs stay when a tier is full. The memory tier and the disk tier's index use it. Only this module
//! and `disk` use moka.
//!
//! The policy `tiny-lfu` is W-TinyLFU, weighed by size:
//! 1. A new entry goes into the *window*, a small LRU cache. (While the *main* segment has space, it goes into main at once.)
//! 2. When the window evicts an entry, the entry is a candidate for main, an LRU cache too.
//! 3. The candidate is admitted to main if it was requested more often *per byte* than the entries that main has evicted lately. If not, it
//!    is evicted.
//!
//! This has three effects:
//! - A blob that is requested again and again is kept from its first get on, at any size, since the window takes every blob.
//! - A single pass over many cold blobs goes through the window, and leaves main unchanged.
//! - A large blob is admitted if it is hot enough for its size. Counts go up to 255; see [`frequency`].
//!
//! moka's own admission is not used. It compares a candidate's count, which ends at 15, with the sum of the counts of all entries that it
//! would displace. So it never admits a blob that displaces fifteen or more others, however hot the blob is.
//!
//! [`Index::count`] and [`Index::get`] are separate, since one get looks up several times and counts once.
//!
//! Source: G. Einziger, R. Friedman, B. Manes: "TinyLFU: A highly efficient cache admission policy", ACM Transactions on Storage 13(4), 2017.

mod frequency;

use castier_blob::Digest;
use castier_config::Policy;
use frequency::FrequencySketch;
use moka::{notification::RemovalCause, policy::EvictionPolicy, sync::Cache};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The window is at least the capacity divided by this.
const WINDOW_PART: u64 = 64;
/// The price averages over the last evictions from main that add up to the capacity divided by this.
const PRICE_PART: f64 = 64.0;
/// When refused candidates add up to this many times the capacity, the price has fallen to 1/e.
const DECAY: f64 = 16.0;
/// The largest weight of one entry in the average, and the largest decay for one refusal.
const MAX_STEP: f64 = 0.25;
/// Entries of at least this many bytes evict others at once. moka evicts after some dozens of writes: that is little for small entries, but
/// hundreds of MiB for large ones.
const EVICT_AT_ONCE: u64 = 16 << 10;
/// An entry too large for the window is admitted after this many gets.
const GETS_FOR_LARGE: u8 = 2;

/// See [`Index::new`].
type Removed<V> = dyn Fn(&Digest, V, bool) + Send + Sync;

/// A bounded map from digests to entries, each with a weight.
pub(crate) struct Index<V> {
    /// `None` for plain LRU: then main has all entries.
    window: Option<Cache<Digest, V>>,
    main: Cache<Digest, V>,
    admission: Option<Arc<Admission>>,
    /// The capacities of the window and of main.
    capacities: (u64, u64),
    weigh: fn(&V) -> u64,
    /// Entries of at least this weight evict others at once.
    at_once: u64,
}

/// The sizes of an [`Index`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// The most weight of all entries together.
    pub capacity: u64,
    /// The weight of the largest entry that must fit into the window.
    pub window: u64,
    /// The most memory for the counts of gets, in bytes.
    pub counts: u64,
    /// The bytes that a weight of 1 stands for.
    pub unit: u64,
}

/// Decides which candidates enter main.
struct Admission {
    counts: FrequencySketch,
    /// The average value of the entries that main has evicted lately, in gets per unit of weight. A candidate must be worth more. The bits
    /// of an `f64`.
    price: AtomicU64,
    capacity: f64,
}

impl Admission {
    /// Gets per unit of weight.
    fn worth(&self, digest: &Digest, weight: u64) -> f64 {
        f64::from(self.counts.estimate(digest)) / weight.max(1) as f64
    }

    fn price(&self) -> f64 {
        f64::from_bits(self.price.load(Ordering::Relaxed))
    }

    fn reduce_price(&self, part: f64) {
        self.price.store((self.price() * (1.0 - part)).to_bits(), Ordering::Relaxed);
    }

    /// Main has evicted this entry: moves the price towards its worth.
    fn evicted(&self, digest: &Digest, weight: u64) {
        let (worth, price) = (self.worth(digest, weight), self.price());
        let part = (weight as f64 * PRICE_PART / self.capacity).min(MAX_STEP);
        let next = if price == 0.0 { worth } else { price + part * (worth - price) };
        self.price.store(next.to_bits(), Ordering::Relaxed);
    }

    /// Whether this candidate should displace others in main.
    fn admits(&self, digest: &Digest, weight: u64) -> bool {
        let price = self.price();
        let admitted = self.worth(digest, weight) > price;
        if !admitted {
            // If nothing is admitted for long, the price may be out of date.
            self.reduce_price((weight as f64 / (DECAY * self.capacity)).min(MAX_STEP));
        }
        admitted
    }
}

impl<V: Clone + Send + Sync + 'static> Index<V> {
    /// An empty index.
    ///
    /// `weigh` must always give the same weight for one entry. `removed` is called for every entry that leaves: with its digest, its value,
    /// and whether it was evicted for lack of space. It runs on any thread that touches the index. So it must be fast, and must not touch the
    /// index itself.
    pub(crate) fn new(
        policy: Policy,
        shape: Shape,
        weigh: fn(&V) -> u64,
        removed: impl Fn(&Digest, V, bool) + Send + Sync + 'static,
    ) -> Self {
        let removed: Arc<Removed<V>> = Arc::new(removed);
        let Shape { capacity, counts, unit, .. } = shape;
        let window_capacity = shape.window.max(capacity / WINDOW_PART).min(capacity);
        let main_capacity = capacity - window_capacity;
        let at_once = (EVICT_AT_ONCE / unit.max(1)).max(1);
        if policy == Policy::Lru || main_capacity == 0 {
            let main = segment(capacity, weigh, move |digest, value, evicted| removed(digest, value, evicted));
            return Self { window: None, main, admission: None, capacities: (0, capacity), weigh, at_once };
        }
        let admission =
            Arc::new(Admission { counts: FrequencySketch::new(counts), price: AtomicU64::new(0), capacity: main_capacity as f64 });
        let main = segment(main_capacity, weigh, {
            let (removed, admission) = (removed.clone(), admission.clone());
            move |digest, value, evicted| {
                if evicted {
                    admission.evicted(digest, weigh(&value));
                }
                removed(digest, value, evicted);
            }
        });
        let window = segment(window_capacity, weigh, {
            let (main, admission) = (main.clone(), admission.clone());
            // moka runs this under the lock of the window's housekeeping. `remove` and `get_settled` rely on that.
            move |digest, value, evicted| {
                let weight = weigh(&value);
                let admitted = || main.weighted_size() + weight <= main_capacity || admission.admits(digest, weight);
                if !evicted || weight > main_capacity || !admitted() {
                    return removed(digest, value, evicted);
                }
                main.insert(*digest, value);
                if weight >= at_once {
                    main.run_pending_tasks();
                }
            }
        });
        Self { window: Some(window), main, admission: Some(admission), capacities: (window_capacity, main_capacity), weigh, at_once }
    }

    /// The entry. Does not count a get.
    pub(crate) fn get(&self, digest: &Digest) -> Option<V> {
        self.main.get(digest).or_else(|| self.window.as_ref()?.get(digest))
    }

    /// As [`Self::get`], but never misses an entry that another thread is moving from the window to main. [`Self::get`] can miss it:
    /// 1. the other thread's housekeeping takes the entry out of the window;
    /// 2. this thread looks up main and the window, and finds it in neither;
    /// 3. the other thread inserts it into main.
    ///
    /// Housekeeping runs under a lock. So this waits until it is done, and then looks up main again.
    pub(crate) fn get_settled(&self, digest: &Digest) -> Option<V> {
        self.get(digest).or_else(|| {
            self.window.as_ref()?.run_pending_tasks();
            self.main.get(digest)
        })
    }

    /// Whether the entry exists.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.main.contains_key(digest) || self.window.as_ref().is_some_and(|window| window.contains_key(digest))
    }

    /// Counts one get. Call it once for each get, hit or miss.
    pub(crate) fn count(&self, digest: &Digest) {
        if let Some(admission) = &self.admission {
            let kept = || self.main.entry_count();
            if let Some(part) = admission.counts.count(digest, kept) {
                // The price derives from counts, so it ages with them.
                admission.reduce_price(part / 2.0);
            }
        }
    }

    /// The weight of the heaviest entry that fits.
    pub(crate) const fn largest(&self) -> u64 {
        let (window, main) = self.capacities;
        if window > main { window } else { main }
    }

    /// Whether an entry of this weight would be kept now. An entry that fits into the window is. A heavier one must have been requested
    /// before, so that a single pass over large blobs does not empty main.
    pub(crate) fn takes(&self, digest: &Digest, weight: u64) -> bool {
        let Some(admission) = &self.admission else { return weight <= self.largest() };
        let (window, main) = self.capacities;
        weight <= window || weight <= main && (self.has_space(weight) || admission.counts.estimate(digest) >= GETS_FOR_LARGE)
    }

    /// Whether main can take this weight without an eviction.
    fn has_space(&self, weight: u64) -> bool {
        self.main.weighted_size() + weight <= self.capacities.1
    }

    /// Inserts an entry of at most [`Self::largest`]. Does not ask [`Self::takes`].
    pub(crate) fn insert(&self, digest: Digest, value: V) {
        let weight = (self.weigh)(&value);
        match &self.window {
            // While main has space, entries go into main, where a get finds them with the first look-up.
            Some(window) if weight <= self.capacities.0 && !self.has_space(weight) && !self.main.contains_key(&digest) => {
                window.insert(digest, value);
                if weight >= self.at_once {
                    window.run_pending_tasks();
                }
            }
            _ => {
                self.main.insert(digest, value);
                if weight >= self.at_once {
                    self.main.run_pending_tasks();
                }
            }
        }
    }

    /// Removes an entry. Returns whether it existed. After this call it does not exist, unless another thread inserts it again.
    pub(crate) fn remove(&self, digest: &Digest) -> bool {
        let mut was_here = false;
        if let Some(window) = &self.window {
            was_here = window.remove(digest).is_some();
            // Another thread may be moving it to main, as in `get_settled`.
            window.run_pending_tasks();
        }
        self.main.remove(digest).is_some() || was_here
    }

    /// Does all pending evictions and housekeeping now.
    pub(crate) fn settle(&self) {
        if let Some(window) = &self.window {
            window.run_pending_tasks();
        }
        self.main.run_pending_tasks();
    }

    /// The weight and the number of all entries.
    pub(crate) fn size(&self) -> (u64, u64) {
        self.settle();
        let (weight, count) = (self.main.weighted_size(), self.main.entry_count());
        self.window.as_ref().map_or((weight, count), |window| (weight + window.weighted_size(), count + window.entry_count()))
    }
}

/// An LRU cache.
fn segment<V: Clone + Send + Sync + 'static>(
    capacity: u64,
    weigh: fn(&V) -> u64,
    removed: impl Fn(&Digest, V, bool) + Send + Sync + 'static,
) -> Cache<Digest, V> {
    Cache::builder()
        .max_capacity(capacity)
        .weigher(move |_, value: &V| u32::try_from(weigh(value)).unwrap_or(u32::MAX))
        .eviction_policy(EvictionPolicy::lru())
        .eviction_listener(move |digest: Arc<Digest>, value, cause: RemovalCause| removed(&digest, value, cause.was_evicted()))
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Barrier, atomic::AtomicUsize};

    /// A digest and a weight.
    type Weighted = (Digest, u64);

    fn weighted(number: u64, weight: u64) -> Weighted {
        (Digest::of(&number.to_le_bytes()), weight)
    }

    fn index(policy: Policy, capacity: u64, window: u64) -> Index<u64> {
        Index::new(policy, Shape { capacity, window, counts: capacity / 256, unit: 1 }, |weight| *weight, |_, _, _| {})
    }

    /// A get as the data path does it; true if it was a hit.
    fn get(index: &Index<u64>, (digest, weight): Weighted) -> bool {
        index.count(&digest);
        let hit = index.get(&digest).is_some();
        if !hit && index.takes(&digest, weight) {
            index.insert(digest, weight);
        }
        hit
    }

    fn get_all(index: &Index<u64>, entries: impl Iterator<Item = Weighted>) {
        for entry in entries {
            get(index, entry);
        }
    }

    const MIB: u64 = 1 << 20;

    /// An index full of entries of `weight`, each with a few gets.
    fn full(policy: Policy, capacity: u64, window: u64, weight: u64) -> Index<u64> {
        let index = index(policy, capacity, window);
        for round in 0..3 {
            for number in 0..capacity / weight {
                get(&index, weighted(number + round / 3, weight));
            }
        }
        assert!(index.size().0 > capacity / 4 * 3, "{:?} of {capacity}", index.size());
        index
    }

    #[test]
    fn repeated_gets_of_one_blob_need_few_loads_for_any_size() {
        for small in [4_000, 100_000] {
            // In the memory tier every blob fits into the window; in the disk tier not.
            for window in [8 * MIB + 500, MIB] {
                let index = full(Policy::TinyLfu, 32 * MIB, window, small);
                for size in [1_000, 20_000, 100_000, MIB, 3 * MIB, 8 * MIB] {
                    let loads = (0..30).filter(|_| !get(&index, weighted(u64::MAX - size, size))).count();
                    assert!(loads <= 3, "{loads} loads of {size} among {small}, with a window of {window}");
                }
            }
        }
    }

    #[test]
    fn a_hot_large_blob_stays_while_cold_blobs_pass() {
        let index = full(Policy::TinyLfu, 64 * MIB, 8 * MIB + 500, 64 << 10);
        let large = weighted(u64::MAX, 8 * MIB);
        let mut loads = Vec::new();
        for round in 0..600 {
            if !get(&index, large) {
                loads.push(round);
            }
            // Enough to evict everything else from the window.
            get_all(&index, (0..10).map(|other| weighted((1 << 40) + round * 10 + other, MIB)));
        }
        assert!(loads.len() < 200 && loads.iter().all(|round| *round < 300), "{loads:?}");
    }

    #[test]
    fn a_pass_over_cold_blobs_does_not_evict_hot_ones() {
        for (hot, cold) in [(100_000, 100_000), (100_000, 1_000_000), (10_000, 10_000)] {
            let index = index(Policy::TinyLfu, 64 * MIB, MIB + 500);
            let count = 40 * MIB / hot;
            (0..5).for_each(|_| get_all(&index, (0..count).map(|number| weighted(number, hot))));
            // Ten times the capacity, with some gets of hot blobs in between.
            for number in 0..640 * MIB / cold {
                get(&index, weighted((1 << 40) + number, cold));
                if number % 5 == 0 {
                    get(&index, weighted(number / 5 % count, hot));
                }
            }
            let hits = (0..count).filter(|number| get(&index, weighted(*number, hot))).count() as u64;
            assert!(hits * 10 >= count * 9, "{hits} of {count} blobs of {hot} are left after blobs of {cold}");
        }
    }

    #[test]
    fn a_blob_that_is_not_hot_any_more_is_evicted() {
        let index = full(Policy::TinyLfu, 16 * MIB, MIB, 10_000);
        (0..20).for_each(|_| get_all(&index, (0..1_000).map(|number| weighted(number, 10_000))));
        let new = |number: u64| weighted((1 << 40) + number, 10_000);
        (0..60).for_each(|_| get_all(&index, (0..1_000).map(new)));
        let hits = (0..1_000).filter(|number| get(&index, new(*number))).count();
        assert!(hits > 900, "{hits} of 1000 that are asked for now");
    }

    #[test]
    fn lru_is_lru() {
        let index = index(Policy::Lru, 100_000, 50_000);
        get_all(&index, (0..200).map(|number| weighted(number, 1_000)));
        index.settle();
        let kept: Vec<_> = (0..200).filter(|number| index.has(&weighted(*number, 0).0)).collect();
        assert_eq!(kept, (100..200).collect::<Vec<_>>());
    }

    #[test]
    fn every_inserted_entry_exists_or_was_reported_as_removed() {
        for policy in [Policy::TinyLfu, Policy::Lru] {
            let removed = Arc::new(AtomicUsize::new(0));
            let counter = removed.clone();
            let shape = Shape { capacity: MIB, window: 100_000, counts: 0, unit: 1 };
            let index = Index::new(
                policy,
                shape,
                |weight| *weight,
                move |_, _, _| {
                    counter.fetch_add(1, Ordering::Relaxed);
                },
            );
            let mut came = 0;
            for number in 0..20_000 {
                let (digest, weight) = weighted(number % 3_000, 1 + number * number % 90_000 / (1 + number % 90));
                if number % 7 == 0 {
                    index.remove(&digest);
                } else {
                    index.count(&digest);
                    index.insert(digest, weight);
                    came += 1;
                }
                if number % 100 == 0 {
                    assert!(index.size().0 <= MIB, "{:?}", index.size());
                }
            }
            let (_, here) = index.size();
            assert_eq!(came, here as usize + removed.load(Ordering::Relaxed), "{policy:?}");
        }
    }

    /// One thread moves an entry through the window while another removes it. In any order, it must not come back.
    #[test]
    fn a_removed_entry_does_not_come_back() {
        let index = index(Policy::TinyLfu, 10_000, 2_000);
        let (wanted, barrier, came_back) = (weighted(0, 1_000), Barrier::new(2), AtomicUsize::new(0));
        let look = || came_back.fetch_add(usize::from(index.has(&wanted.0)), Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..500 {
                    (0..9).for_each(|_| index.count(&wanted.0));
                    index.insert(wanted.0, wanted.1);
                    barrier.wait();
                    (1..4).for_each(|other| index.insert(weighted(round * 3 + other, 0).0, 1_000));
                    index.settle();
                    barrier.wait();
                    barrier.wait();
                }
            });
            for _ in 0..500 {
                barrier.wait();
                index.remove(&wanted.0);
                look();
                barrier.wait();
                look();
                barrier.wait();
            }
        });
        assert_eq!(came_back.into_inner(), 0);
    }
}
