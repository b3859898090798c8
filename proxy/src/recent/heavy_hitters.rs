//! Finds the heaviest keys of a stream, in fixed memory. The algorithm is space-saving, with weights: A. Metwally, D. Agrawal, A. El Abbadi:
//! "Efficient computation of frequent and top-k elements in data streams", ICDT 2005.
//!
//! There are `m` counters, each for one key. An arrival of a key that has a counter adds its weight to that. A key without a counter takes
//! over the lightest counter, and adds its weight to the old weight. The old weight is the new key's *error*: how much of it the key had
//! before is not known. If `n` is the weight of all arrivals:
//!
//! - `weight - error <= true weight <= weight` for each key that has a counter;
//! - no error is over `n / m`;
//! - every key whose true weight is over `n / m` has a counter.
//!
//! A counter also has the number of requests and bytes since its key took it over. These are exact, and so at most the true numbers.

use foldhash::fast::RandomState;
use std::{collections::HashMap, hash::Hash};

/// See the module.
pub(super) struct HeavyHitters<K> {
    counters: Vec<KeyCounter<K>>,
    /// The counters' weights, in an array of their own, so that the lightest is found fast.
    weights: Vec<u64>,
    /// Seeded at random, so that clients cannot choose keys that collide.
    index: HashMap<K, u16, RandomState>,
    most: usize,
    /// The lightest weight, once all counters are in use.
    lightest: u64,
    /// No counter before this position has the lightest weight.
    cursor: usize,
}

/// The figures of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyCounter<K> {
    pub(super) key: K,
    /// The part of the weight that may belong to other keys.
    pub(super) error: u64,
    /// Arrivals since the key took the counter over.
    pub(super) requests: u64,
    /// Bytes since then.
    pub(super) bytes: u64,
}

impl<K: Copy + Eq + Hash> HeavyHitters<K> {
    /// With `most` counters. Allocates everything here, and nothing later.
    pub(super) fn new(most: u16) -> Self {
        let most = usize::from(most.max(1));
        Self {
            counters: Vec::with_capacity(most),
            weights: Vec::with_capacity(most),
            // With twice the capacity, a hash table that has many insertions and removals is cleaned up in place, and never grows.
            index: HashMap::with_capacity_and_hasher(2 * most + 2, RandomState::default()),
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
            self.counters.push(KeyCounter { key, error: 0, requests: 1, bytes });
            self.weights.push(weight);
            return;
        }
        let at = self.find_lightest();
        let error = self.weights[at];
        let old = std::mem::replace(&mut self.counters[at], KeyCounter { key, error, requests: 1, bytes });
        self.weights[at] = error.saturating_add(weight);
        self.index.remove(&old.key);
        self.index.insert(key, at as u16);
    }

    /// A counter with the lightest weight. All counters must be in use. Weights only grow. So one pass over them finds all counters of the
    /// lightest weight, one call after the other.
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

    /// All counters in use, with their weights.
    pub(super) fn counters(&self) -> impl Iterator<Item = (&KeyCounter<K>, u64)> {
        self.counters.iter().zip(self.weights.iter().copied())
    }

    /// Removes all keys.
    pub(super) fn clear(&mut self) {
        self.counters.clear();
        self.weights.clear();
        self.index.clear();
        (self.lightest, self.cursor) = (0, self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// The true weight, arrivals and bytes of each key.
    fn oracle(stream: &[(u8, u64)]) -> BTreeMap<u8, (u64, u64, u64)> {
        let mut all = BTreeMap::<_, (u64, u64, u64)>::new();
        for (key, bytes) in stream {
            let entry = all.entry(*key).or_default();
            *entry = (entry.0 + bytes + 1, entry.1 + 1, entry.2 + bytes);
        }
        all
    }

    fn count(stream: &[(u8, u64)], most: u16) -> HeavyHitters<u8> {
        let mut found = HeavyHitters::new(most);
        stream.iter().for_each(|(key, bytes)| found.add(*key, bytes + 1, *bytes));
        found
    }

    proptest! {
        #[test]
        fn the_bounds_hold(
            stream in prop::collection::vec((0_u8..40, prop_oneof![Just(0), 0_u64..1000]), 0..600),
            most in 1_u16..20,
        ) {
            let (found, truth) = (count(&stream, most), oracle(&stream));
            let total: u64 = truth.values().map(|(weight, ..)| weight).sum();
            let bound = total / u64::from(most);
            prop_assert_eq!(found.counters().map(|(_, weight)| weight).sum::<u64>(), total, "no weight is lost");
            for (counter, weight) in found.counters() {
                let (exact, requests, bytes) = truth[&counter.key];
                prop_assert!(weight - counter.error <= exact && exact <= weight, "{counter:?}, {weight}: {exact}");
                prop_assert!(counter.error <= bound, "{counter:?} over {bound}");
                prop_assert!(counter.requests <= requests && counter.bytes <= bytes);
                prop_assert_eq!(counter.bytes + counter.requests, weight - counter.error, "the figures are exact since the take-over");
            }
            for (key, (exact, ..)) in &truth {
                prop_assert!(*exact <= bound || found.counters().any(|(counter, _)| counter.key == *key), "{key} is missing");
            }
            if truth.len() <= usize::from(most) {
                prop_assert!(found.counters().all(|(counter, _)| counter.error == 0), "with enough counters all is exact");
            }
        }
    }

    #[test]
    fn after_clear_it_is_empty_and_it_allocates_nothing() {
        let mut found = HeavyHitters::new(8);
        let (counters, table) = (found.counters.capacity(), found.index.capacity());
        for round in 0..10_u32 {
            (0..10_000).for_each(|key: u32| found.add(key ^ round, 1, 0));
            assert_eq!(found.counters().count(), 8);
            assert_eq!((found.counters.capacity(), found.index.capacity()), (counters, table));
            found.clear();
            assert_eq!(found.counters().count(), 0);
        }
        found.add(1, 5, 7);
        assert_eq!(found.counters().collect::<Vec<_>>(), [(&KeyCounter { key: 1, error: 0, requests: 1, bytes: 7 }, 5)]);
    }
}
