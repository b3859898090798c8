//! What stays when a tier is full. Memory and the disk's index keep their entries in here. With `disk`, the only place that sees moka.
//!
//! With `tiny-lfu` an entry first comes into a *window*, a small LRU cache; while the main segment has room, straight into that. What leaves the window is admitted to the *main* segment, an
//! LRU cache too, if it was asked for more often *per byte* than what main has let go of late. Else it is evicted. So
//! - a blob that is asked for again and again is kept from its first get on, whatever its size: the window takes every blob;
//! - one pass over many cold blobs goes through the window, and leaves main as it is;
//! - a large blob is admitted if it is hot enough for its size. Its counter does not stop early: see [`sketch`].
//!
//! The rule is W-TinyLFU (Caffeine), made for sizes. moka's own admission compares a candidate's count, which ends at 15, with the sum over
//! all that it would displace. A blob that displaces fifteen or more was therefore never admitted, however hot it was.
//!
//! Counting is apart from looking up ([`Index::count`] and [`Index::get`]): a get looks several times, and counts once.

mod sketch;

use castier_blob::Digest;
use castier_config::Policy;
use moka::{notification::RemovalCause, policy::EvictionPolicy, sync::Cache};
use sketch::Sketch;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The window is at least this part of the capacity: so much is kept for being recent.
const WINDOW_PART: u64 = 64;
/// The price of main's room is an average over this part of the capacity, as it was let go.
const PRICE_PART: f64 = 64.0;
/// When so many times the capacity has been refused, the price has fallen to a third.
const DOUBT: f64 = 16.0;
/// How far one entry may move the price.
const MOST: f64 = 0.25;
/// Entries from so many bytes on make room for themselves at once. moka evicts when some dozens of writes have gathered: little with
/// small entries, hundreds of MiB with large ones.
const AT_ONCE: u64 = 16 << 10;
/// An entry too large for the window is admitted when it was asked for so often.
const AGAIN: u8 = 2;

/// See [`Index::new`].
type Gone<V> = dyn Fn(&Digest, V, bool) + Send + Sync;

/// Entries under their digests, each with a weight.
pub(crate) struct Index<V> {
    /// None: main alone, and so plain LRU.
    window: Option<Cache<Digest, V>>,
    main: Cache<Digest, V>,
    admission: Option<Arc<Admission>>,
    /// What the window takes, and what main takes.
    capacities: (u64, u64),
    weigh: fn(&V) -> u64,
    /// Entries of this weight make room for themselves at once.
    at_once: u64,
}

/// How large an [`Index`] and its parts are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// What all entries together may weigh.
    pub capacity: u64,
    /// The largest entry that the window must take.
    pub window: u64,
    /// How many bytes the counts may take.
    pub counts: u64,
    /// How many bytes a weight of 1 stands for.
    pub unit: u64,
}

/// What decides on whatever leaves the window.
struct Admission {
    sketch: Sketch,
    /// What the room in main is worth: gets for each unit of weight, among what it has let go lately. The bits of an `f64`.
    price: AtomicU64,
    capacity: f64,
}

impl Admission {
    fn worth(&self, digest: &Digest, weight: u64) -> f64 {
        f64::from(self.sketch.estimate(digest)) / weight.max(1) as f64
    }

    fn price(&self) -> f64 {
        f64::from_bits(self.price.load(Ordering::Relaxed))
    }

    fn reduce_price(&self, part: f64) {
        self.price.store((self.price() * (1.0 - part)).to_bits(), Ordering::Relaxed);
    }

    /// Main has let this go.
    fn sold(&self, digest: &Digest, weight: u64) {
        let (worth, price) = (self.worth(digest, weight), self.price());
        let part = (weight as f64 * PRICE_PART / self.capacity).min(MOST);
        let next = if price == 0.0 { worth } else { price + part * (worth - price) };
        self.price.store(next.to_bits(), Ordering::Relaxed);
    }

    /// Whether this should take the place of others in main.
    fn admits(&self, digest: &Digest, weight: u64) -> bool {
        let price = self.price();
        let admitted = self.worth(digest, weight) > price;
        if !admitted {
            // Where nothing is admitted for long, the price may be wrong.
            self.reduce_price((weight as f64 / (DOUBT * self.capacity)).min(MOST));
        }
        admitted
    }
}

impl<V: Clone + Send + Sync + 'static> Index<V> {
    /// An empty index. `weigh` must give the same weight for as long as an entry is here. `gone` is told of every entry that goes: its digest,
    /// its value, and whether it went for lack of room. It runs wherever the index is touched, so it must be quick, and must not touch
    /// the index.
    pub(crate) fn new(policy: Policy, shape: Shape, weigh: fn(&V) -> u64, gone: impl Fn(&Digest, V, bool) + Send + Sync + 'static) -> Self {
        let gone: Arc<Gone<V>> = Arc::new(gone);
        let Shape { capacity, counts, unit, .. } = shape;
        let window_capacity = shape.window.max(capacity / WINDOW_PART).min(capacity);
        let main_capacity = capacity - window_capacity;
        let at_once = (AT_ONCE / unit.max(1)).max(1);
        if policy == Policy::Lru || main_capacity == 0 {
            let main = segment(capacity, weigh, move |digest, value, evicted| gone(digest, value, evicted));
            return Self { window: None, main, admission: None, capacities: (0, capacity), weigh, at_once };
        }
        let admission = Arc::new(Admission { sketch: Sketch::new(counts), price: AtomicU64::new(0), capacity: main_capacity as f64 });
        let main = segment(main_capacity, weigh, {
            let (gone, admission) = (gone.clone(), admission.clone());
            move |digest, value, evicted| {
                if evicted {
                    admission.sold(digest, weigh(&value));
                }
                gone(digest, value, evicted);
            }
        });
        let window = segment(window_capacity, weigh, {
            let (main, admission) = (main.clone(), admission.clone());
            // Runs under the lock of the window's housekeeping, which `remove` and `get_settled` rely on.
            move |digest, value, evicted| {
                let weight = weigh(&value);
                let admitted = || main.weighted_size() + weight <= main_capacity || admission.admits(digest, weight);
                if !evicted || weight > main_capacity || !admitted() {
                    return gone(digest, value, evicted);
                }
                main.insert(*digest, value);
                if weight >= at_once {
                    main.run_pending_tasks();
                }
            }
        });
        Self { window: Some(window), main, admission: Some(admission), capacities: (window_capacity, main_capacity), weigh, at_once }
    }

    /// The entry, if it is here. Counts nothing.
    pub(crate) fn get(&self, digest: &Digest) -> Option<V> {
        self.main.get(digest).or_else(|| self.window.as_ref()?.get(digest))
    }

    /// As [`Self::get`], and does not miss an entry that another thread is just moving:
    /// 1. the other thread's housekeeping takes the entry out of the window;
    /// 2. this thread looks into main and the window, and finds it in neither;
    /// 3. the other thread puts it into main.
    ///
    /// Housekeeping is done under a lock, so this waits for its end, and looks again.
    pub(crate) fn get_settled(&self, digest: &Digest) -> Option<V> {
        self.get(digest).or_else(|| {
            self.window.as_ref()?.run_pending_tasks();
            self.main.get(digest)
        })
    }

    /// Whether the entry is here.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.main.contains_key(digest) || self.window.as_ref().is_some_and(|window| window.contains_key(digest))
    }

    /// Counts one get. Call it once for each, whether or not the entry is here.
    pub(crate) fn count(&self, digest: &Digest) {
        if let Some(admission) = &self.admission {
            let kept = || self.main.entry_count();
            if let Some(part) = admission.sketch.count(digest, kept) {
                // The price was made of counts, and ages with them.
                admission.reduce_price(part / 2.0);
            }
        }
    }

    /// The heaviest entry that there can be.
    pub(crate) const fn largest(&self) -> u64 {
        let (window, main) = self.capacities;
        if window > main { window } else { main }
    }

    /// Whether an entry would be kept if it came now. What the window takes is; what is too heavy for it must have been asked for before,
    /// so that a pass over large blobs does not empty main.
    pub(crate) fn takes(&self, digest: &Digest, weight: u64) -> bool {
        let Some(admission) = &self.admission else { return weight <= self.largest() };
        let (window, main) = self.capacities;
        weight <= window || weight <= main && (self.has_room(weight) || admission.sketch.estimate(digest) >= AGAIN)
    }

    /// Whether main can take this without letting go of anything.
    fn has_room(&self, weight: u64) -> bool {
        self.main.weighted_size() + weight <= self.capacities.1
    }

    /// Keeps an entry of at most [`Self::largest`], whatever [`Self::takes`] says.
    pub(crate) fn insert(&self, digest: Digest, value: V) {
        let weight = (self.weigh)(&value);
        match &self.window {
            // While main has room nothing has to prove itself, and a later get finds it with one look-up.
            Some(window) if weight <= self.capacities.0 && !self.has_room(weight) && !self.main.contains_key(&digest) => {
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

    /// Takes an entry out; true if it was here. Once this is done it is not here, unless it is inserted anew.
    pub(crate) fn remove(&self, digest: &Digest) -> bool {
        let mut was_here = false;
        if let Some(window) = &self.window {
            was_here = window.remove(digest).is_some();
            // It may be on its way from there to main, as in `get_settled`.
            window.run_pending_tasks();
        }
        self.main.remove(digest).is_some() || was_here
    }

    /// Does what waits to be done, evictions above all.
    pub(crate) fn settle(&self) {
        if let Some(window) = &self.window {
            window.run_pending_tasks();
        }
        self.main.run_pending_tasks();
    }

    /// What the entries weigh, and how many there are.
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
    gone: impl Fn(&Digest, V, bool) + Send + Sync + 'static,
) -> Cache<Digest, V> {
    Cache::builder()
        .max_capacity(capacity)
        .weigher(move |_, value: &V| u32::try_from(weigh(value)).unwrap_or(u32::MAX))
        .eviction_policy(EvictionPolicy::lru())
        .eviction_listener(move |digest: Arc<Digest>, value, cause: RemovalCause| gone(&digest, value, cause.was_evicted()))
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Barrier, atomic::AtomicUsize};

    /// A blob's name and weight.
    type Named = (Digest, u64);

    fn named(number: u64, weight: u64) -> Named {
        (Digest::of(&number.to_le_bytes()), weight)
    }

    fn index(policy: Policy, capacity: u64, window: u64) -> Index<u64> {
        Index::new(policy, Shape { capacity, window, counts: capacity / 256, unit: 1 }, |weight| *weight, |_, _, _| {})
    }

    /// A get as the data path does it; true if it was a hit.
    fn get(index: &Index<u64>, (digest, weight): Named) -> bool {
        index.count(&digest);
        let hit = index.get(&digest).is_some();
        if !hit && index.takes(&digest, weight) {
            index.insert(digest, weight);
        }
        hit
    }

    fn get_all(index: &Index<u64>, entries: impl Iterator<Item = Named>) {
        for entry in entries {
            get(index, entry);
        }
    }

    const MIB: u64 = 1 << 20;

    /// Full of entries of `weight`, each of which was asked for a few times.
    fn full(policy: Policy, capacity: u64, window: u64, weight: u64) -> Index<u64> {
        let index = index(policy, capacity, window);
        for round in 0..3 {
            for number in 0..capacity / weight {
                get(&index, named(number + round / 3, weight));
            }
        }
        assert!(index.size().0 > capacity / 4 * 3, "{:?} of {capacity}", index.size());
        index
    }

    #[test]
    fn what_is_asked_for_in_a_row_is_loaded_once_or_twice_whatever_its_size() {
        for small in [4_000, 100_000] {
            // The window of a memory tier takes all; that of a disk does not.
            for window in [8 * MIB + 500, MIB] {
                let index = full(Policy::TinyLfu, 32 * MIB, window, small);
                for size in [1_000, 20_000, 100_000, MIB, 3 * MIB, 8 * MIB] {
                    let loads = (0..30).filter(|_| !get(&index, named(u64::MAX - size, size))).count();
                    assert!(loads <= 3, "{loads} loads of {size} among {small}, with a window of {window}");
                }
            }
        }
    }

    #[test]
    fn a_large_blob_that_is_hot_stays_though_others_pass() {
        let index = full(Policy::TinyLfu, 64 * MIB, 8 * MIB + 500, 64 << 10);
        let large = named(u64::MAX, 8 * MIB);
        let mut loads = Vec::new();
        for round in 0..600 {
            if !get(&index, large) {
                loads.push(round);
            }
            // Enough to push everything else out of the window.
            get_all(&index, (0..10).map(|other| named((1 << 40) + round * 10 + other, MIB)));
        }
        assert!(loads.len() < 200 && loads.iter().all(|round| *round < 300), "{loads:?}");
    }

    #[test]
    fn a_pass_over_cold_blobs_leaves_what_is_hot() {
        for (hot, cold) in [(100_000, 100_000), (100_000, 1_000_000), (10_000, 10_000)] {
            let index = index(Policy::TinyLfu, 64 * MIB, MIB + 500);
            let count = 40 * MIB / hot;
            (0..5).for_each(|_| get_all(&index, (0..count).map(|number| named(number, hot))));
            // Ten times the capacity, while a hot one is asked for now and then.
            for number in 0..640 * MIB / cold {
                get(&index, named((1 << 40) + number, cold));
                if number % 5 == 0 {
                    get(&index, named(number / 5 % count, hot));
                }
            }
            let hits = (0..count).filter(|number| get(&index, named(*number, hot))).count() as u64;
            assert!(hits * 10 >= count * 9, "{hits} of {count} blobs of {hot} are left after blobs of {cold}");
        }
    }

    #[test]
    fn what_was_hot_once_can_leave() {
        let index = full(Policy::TinyLfu, 16 * MIB, MIB, 10_000);
        (0..20).for_each(|_| get_all(&index, (0..1_000).map(|number| named(number, 10_000))));
        let new = |number: u64| named((1 << 40) + number, 10_000);
        (0..60).for_each(|_| get_all(&index, (0..1_000).map(new)));
        let hits = (0..1_000).filter(|number| get(&index, new(*number))).count();
        assert!(hits > 900, "{hits} of 1000 that are asked for now");
    }

    #[test]
    fn lru_is_lru() {
        let index = index(Policy::Lru, 100_000, 50_000);
        get_all(&index, (0..200).map(|number| named(number, 1_000)));
        index.settle();
        let kept: Vec<_> = (0..200).filter(|number| index.has(&named(*number, 0).0)).collect();
        assert_eq!(kept, (100..200).collect::<Vec<_>>());
    }

    #[test]
    fn every_entry_that_came_is_here_or_was_told_to_be_gone() {
        for policy in [Policy::TinyLfu, Policy::Lru] {
            let gone = Arc::new(AtomicUsize::new(0));
            let counter = gone.clone();
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
                let (digest, weight) = named(number % 3_000, 1 + number * number % 90_000 / (1 + number % 90));
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
            assert_eq!(came, here as usize + gone.load(Ordering::Relaxed), "{policy:?}");
        }
    }

    /// One thread pushes an entry through the window while another removes it. Whoever is first, it does not come back.
    #[test]
    fn what_was_removed_is_gone() {
        let index = index(Policy::TinyLfu, 10_000, 2_000);
        let (wanted, barrier, came_back) = (named(0, 1_000), Barrier::new(2), AtomicUsize::new(0));
        let look = || came_back.fetch_add(usize::from(index.has(&wanted.0)), Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..500 {
                    (0..9).for_each(|_| index.count(&wanted.0));
                    index.insert(wanted.0, wanted.1);
                    barrier.wait();
                    (1..4).for_each(|other| index.insert(named(round * 3 + other, 0).0, 1_000));
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
