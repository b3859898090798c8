//! The heaviest keys of a stream, in fixed memory: the space-saving algorithm (A. Metwally, D. Agrawal, A. El Abbadi: "Efficient computation of
//! frequent and top-k elements in data streams", ICDT 2005), for weighted arrivals.
//!
//! There are `m` counters, each with a key. An arrival of a key that has a counter adds its weight. Any other key takes over the
//! lightest counter, with its weight, which is then the new key's *error*: the key may have had that weight before, or nothing. With `n` as
//! the weight of all arrivals so far:
//!
//! - `weight - error <= true weight <= weight` for each key that has a counter;
//! - no error is over `n / m`;
//! - every key whose true weight is over `n / m` has a counter.
//!
//! Beside its weight, a counter has exact figures of what it has seen since its key took it over. They are never too large.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, Hasher, RandomState},
};

/// See the module.
pub(super) struct Sketch<K> {
    counters: Vec<Counter<K>>,
    /// The weights, apart from the rest, so that the lightest is found quickly.
    weights: Vec<u64>,
    index: HashMap<K, u16, Mixed>,
    most: usize,
    /// The lightest weight while all counters are taken.
    lightest: u64,
    /// Before this one no counter is the lightest.
    cursor: usize,
}

/// What is known of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Counter<K> {
    /// Whom it counts.
    pub(super) key: K,
    /// The part of the weight that may be others'.
    pub(super) error: u64,
    /// Arrivals since the key took it over.
    pub(super) requests: u64,
    /// Bytes since then.
    pub(super) bytes: u64,
}

impl<K: Copy + Eq + Hash> Sketch<K> {
    /// With so many counters. What it needs is allocated here, and nothing later.
    pub(super) fn new(most: u16) -> Self {
        let most = usize::from(most.max(1));
        Self {
            counters: Vec::with_capacity(most),
            weights: Vec::with_capacity(most),
            // A table of twice the size is tidied up in place where keys come and go.
            index: HashMap::with_capacity_and_hasher(2 * most + 2, Mixed::default()),
            most,
            lightest: 0,
            cursor: most,
        }
    }

    /// Counts one arrival. A `weight` of 0 counts as 1.
    pub(super) fn add(&mut self, key: K, weight: u64, bytes: u64) {
        let weight = weight.max(1);
        if let Some(at) = self.index.get(&key) {
            let at = usize::from(*at);
            self.weights[at] = self.weights[at].saturating_add(weight);
            let counter = &mut self.counters[at];
            (counter.requests, counter.bytes) = (counter.requests + 1, counter.bytes.saturating_add(bytes));
            return;
        }
        if self.counters.len() < self.most {
            self.index.insert(key, self.counters.len() as u16);
            self.counters.push(Counter { key, error: 0, requests: 1, bytes });
            self.weights.push(weight);
            return;
        }
        let at = self.find_lightest();
        let error = self.weights[at];
        let old = std::mem::replace(&mut self.counters[at], Counter { key, error, requests: 1, bytes });
        self.weights[at] = error.saturating_add(weight);
        self.index.remove(&old.key);
        self.index.insert(key, at as u16);
    }

    /// A counter with the lightest weight, while all are taken. Weights only grow, so one pass over them finds all that are as light as
    /// the lightest, one after the other.
    fn find_lightest(&mut self) -> usize {
        loop {
            if let Some(next) = self.weights[self.cursor.min(self.weights.len())..].iter().position(|weight| *weight == self.lightest) {
                self.cursor += next;
                return self.cursor;
            }
            self.lightest = self.weights.iter().copied().min().unwrap_or(0);
            self.cursor = 0;
        }
    }

    /// All counters, each with its weight.
    pub(super) fn counters(&self) -> impl Iterator<Item = (&Counter<K>, u64)> {
        self.counters.iter().zip(self.weights.iter().copied())
    }

    /// Begins anew.
    pub(super) fn clear(&mut self) {
        self.counters.clear();
        self.weights.clear();
        self.index.clear();
        (self.lightest, self.cursor) = (0, self.most);
    }
}

/// Hashes keys of a few words: one multiplication for each. Keys that collide cost some comparisons, and there are few keys.
#[derive(Clone)]
struct Mixed(u64);

impl Default for Mixed {
    /// Seeded by chance, so that nobody can choose keys that collide.
    fn default() -> Self {
        Self(RandomState::new().hash_one(0_u8) | 1)
    }
}

impl BuildHasher for Mixed {
    type Hasher = Mixing;

    fn build_hasher(&self) -> Mixing {
        Mixing(self.0, self.0)
    }
}

/// What has been hashed so far, and the seed.
struct Mixing(u64, u64);

impl Hasher for Mixing {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * u128::from(self.1 ^ 0x9e37_79b9_7f4a_7c15);
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// What came, by key: weight, arrivals, bytes.
    fn oracle(stream: &[(u8, u64)]) -> BTreeMap<u8, (u64, u64, u64)> {
        let mut all = BTreeMap::<_, (u64, u64, u64)>::new();
        for (key, bytes) in stream {
            let entry = all.entry(*key).or_default();
            *entry = (entry.0 + bytes + 1, entry.1 + 1, entry.2 + bytes);
        }
        all
    }

    fn sketch(stream: &[(u8, u64)], most: u16) -> Sketch<u8> {
        let mut sketch = Sketch::new(most);
        stream.iter().for_each(|(key, bytes)| sketch.add(*key, bytes + 1, *bytes));
        sketch
    }

    proptest! {
        #[test]
        fn what_it_says_holds(
            stream in prop::collection::vec((0_u8..40, prop_oneof![Just(0), 0_u64..1000]), 0..600),
            most in 1_u16..20,
        ) {
            let (sketch, truth) = (sketch(&stream, most), oracle(&stream));
            let total: u64 = truth.values().map(|(weight, ..)| weight).sum();
            let bound = total / u64::from(most);
            prop_assert_eq!(sketch.counters().map(|(_, weight)| weight).sum::<u64>(), total, "no weight is lost");
            for (counter, weight) in sketch.counters() {
                let (exact, requests, bytes) = truth[&counter.key];
                prop_assert!(weight - counter.error <= exact && exact <= weight, "{counter:?}, {weight}: {exact}");
                prop_assert!(counter.error <= bound, "{counter:?} over {bound}");
                prop_assert!(counter.requests <= requests && counter.bytes <= bytes);
                prop_assert_eq!(counter.bytes + counter.requests, weight - counter.error, "the figures are exact since the take-over");
            }
            for (key, (exact, ..)) in &truth {
                prop_assert!(*exact <= bound || sketch.counters().any(|(counter, _)| counter.key == *key), "{key} is missing");
            }
            if truth.len() <= usize::from(most) {
                prop_assert!(sketch.counters().all(|(counter, _)| counter.error == 0), "with enough counters all is exact");
            }
        }
    }

    #[test]
    fn it_begins_anew_and_allocates_nothing() {
        let mut sketch = Sketch::new(8);
        let (counters, table) = (sketch.counters.capacity(), sketch.index.capacity());
        for round in 0..10_u32 {
            (0..10_000).for_each(|key: u32| sketch.add(key ^ round, 1, 0));
            assert_eq!(sketch.counters().count(), 8);
            assert_eq!((sketch.counters.capacity(), sketch.index.capacity()), (counters, table));
            sketch.clear();
            assert_eq!(sketch.counters().count(), 0);
        }
        sketch.add(1, 5, 7);
        assert_eq!(sketch.counters().collect::<Vec<_>>(), [(&Counter { key: 1, error: 0, requests: 1, bytes: 7 }, 5)]);
    }
}
