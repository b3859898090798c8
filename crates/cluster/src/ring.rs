//! The hash ring: which member owns a digest, by rendezvous hashing (highest random weight). Pure: no I/O, no clock.
//!
//! Every member gets a score for a digest. The members sorted by score are the digest's fail-over order; the first one is its owner. A
//! member's score depends only on its name, its weight and the digest. So when a member leaves, only its own digests move, each to the next
//! member in its order.
//! Source: D. G. Thaler, C. V. Ravishankar: "Using name-based mappings to increase hit rates", IEEE/ACM Transactions on Networking 6(1), 1998.
//!
//! # The hash
//!
//! Nodes of different versions and processors must agree. So the hash never changes, and a test checks it:
//!
//! - A member's seed is the first 8 bytes, big-endian, of the SHA-256 of its name.
//! - Its hash of a digest is the first 8 bytes of the digest, big-endian, XORed with the seed and put through the finaliser of
//!   SplitMix64 (Stafford's variant 13; G. L. Steele, D. Lea, C. H. Flood: "Fast splittable pseudorandom number generators", OOPSLA
//!   2014). The digest is already random; the finaliser makes the numbers of different members independent.
//! - If all weights are equal, the highest hash is first.
//! - If not, the hash becomes a number `u` in (0, 1), and the lowest `-ln(u) / weight` is first. This is the logarithmic method (C.
//!   Schindelhauer, G. Schomaker: "Weighted distributed hash tables", SPAA 2005). It gives each member exactly its share, and moves as few
//!   digests as possible when a weight changes. With equal weights it gives the same order, except for hashes that share their first 53
//!   bits. The logarithm is that of `libm`, in plain IEEE arithmetic, since those of processors and systems differ in the last bit.
//! - Equal scores are sorted by name.

use castier_blob::Digest;
use std::collections::BTreeMap;

/// The members that share the digests. A member is identified by its index in the sorted names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ring {
    /// Sorted, each once.
    names: Vec<String>,
    /// The members' seeds, in an array of their own for a fast pass.
    seeds: Vec<u64>,
    /// Every `u32` is exact as an `f64`.
    weights: Vec<f64>,
    /// All weights are equal, so the logarithm is not needed.
    even: bool,
}

impl Ring {
    /// A ring of `members`, each a name and a weight, in any order. If a name occurs twice, the greater weight counts. A weight of 0 counts
    /// as 1.
    pub fn new(members: impl IntoIterator<Item = (String, u32)>) -> Self {
        let mut sorted = BTreeMap::new();
        for (name, weight) in members {
            let known = sorted.entry(name).or_insert(1);
            *known = weight.max(*known);
        }
        let (names, weights): (Vec<_>, Vec<_>) = sorted.into_iter().map(|(name, weight)| (name, f64::from(weight))).unzip();
        let seeds = names.iter().map(|name: &String| word(&Digest::of(name.as_bytes()))).collect();
        let even = weights.windows(2).all(|pair| pair[0] == pair[1]);
        Self { names, seeds, weights, even }
    }

    /// The members' names, sorted. The position of a name is the member's index.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The index of the member that owns the digest; `None` if there are no members.
    pub fn owner(&self, digest: &Digest) -> Option<usize> {
        self.order(digest).next()
    }

    /// All members in the digest's fail-over order, the owner first. Allocates and sorts nothing: each step is one pass over the members,
    /// and callers rarely take more than two steps.
    pub fn order(&self, digest: &Digest) -> Order<'_> {
        Order { ring: self, word: word(digest), last: None }
    }

    /// The fraction of all digests that the member owns, from 0 to 1.
    pub fn share(&self, member: usize) -> f64 {
        self.weights.get(member).map_or(0.0, |weight| weight / self.weights.iter().sum::<f64>())
    }

    /// A hash of the names and weights. Nodes that agree on the members have the same value. It has 48 bits, so that it is exact as an
    /// `f64`.
    pub fn fingerprint(&self) -> u64 {
        let text: String = self.names.iter().zip(&self.weights).map(|(name, weight)| format!("{name} {weight}\n")).collect();
        word(&Digest::of(text.as_bytes())) >> 16
    }

    /// The first member that ranks after `last` for this word of a digest.
    fn first_after(&self, word: u64, last: Option<Rank>) -> Option<Rank> {
        let mut best: Option<Rank> = None;
        let mut offer = |candidate: Rank| {
            if last.is_none_or(|last| candidate > last) && best.is_none_or(|best| candidate < best) {
                best = Some(candidate);
                return true;
            }
            false
        };
        if self.even {
            for (index, seed) in self.seeds.iter().enumerate() {
                offer((!mix(word ^ seed), index));
            }
            return best;
        }
        let mut lowest = f64::INFINITY;
        for (index, (seed, weight)) in self.seeds.iter().zip(&self.weights).enumerate() {
            // Below 2^53, so exact as an `f64`.
            let hash = (mix(word ^ seed) >> 11) as i64 as f64;
            // -ln(u) >= 1 - u. So most members cannot win, and need no logarithm. The margin is far above any rounding error.
            if (STEPS - hash - 0.5) * ((1.0 - 1e-9) / STEPS) > lowest * weight {
                continue;
            }
            let cost = -libm::log((hash + 0.5) / STEPS) / weight;
            // Positive floats sort as their bits do.
            if offer((cost.to_bits(), index)) {
                lowest = cost;
            }
        }
        best
    }
}

/// A member's rank in a digest's order, and its index. The lowest comes first.
type Rank = (u64, usize);

/// The number of different values of `u`: as many as an `f64` can distinguish.
const STEPS: f64 = (1u64 << 53) as f64;

fn word(digest: &Digest) -> u64 {
    digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// See [`Ring::order`].
#[derive(Clone, Debug)]
pub struct Order<'a> {
    ring: &'a Ring,
    word: u64,
    /// The member that `next` returned last.
    last: Option<Rank>,
}

impl Iterator for Order<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let next = self.ring.first_after(self.word, self.last)?;
        self.last = Some(next);
        Some(next.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeSet, hint::black_box, time::Instant};

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("10.0.{}.{}:8081", i / 200, i % 200 + 1)).collect()
    }

    fn ring(names: &[String]) -> Ring {
        Ring::new(names.iter().map(|name| (name.clone(), 1)))
    }

    fn digests(count: u64) -> Vec<Digest> {
        (0..count).map(|i| Digest::of(&i.to_le_bytes())).collect()
    }

    fn counts(ring: &Ring, digests: &[Digest]) -> Vec<usize> {
        let mut counts = vec![0; ring.names().len()];
        for digest in digests {
            counts[ring.owner(digest).unwrap()] += 1;
        }
        counts
    }

    fn order<'a>(ring: &'a Ring, digest: &Digest) -> Vec<&'a str> {
        ring.order(digest).map(|index| ring.names[index].as_str()).collect()
    }

    /// The hash as the module documents it, with a sort.
    fn naive(members: &[(String, u32)], digest: &Digest) -> Vec<String> {
        let first = |hash: &Digest| u64::from_be_bytes(hash.as_bytes()[..8].try_into().unwrap());
        let mut scored: Vec<_> = members
            .iter()
            .map(|(name, weight)| {
                let u = ((mix(first(digest) ^ first(&Digest::of(name.as_bytes()))) >> 11) as f64 + 0.5) / 2f64.powi(53);
                (-libm::log(u) / f64::from(*weight), name.clone())
            })
            .collect();
        scored.sort_by(|a, b| a.partial_cmp(b).unwrap());
        scored.into_iter().map(|(_, name)| name).collect()
    }

    #[test]
    fn the_hash_is_pinned() {
        assert_eq!(mix(0), 0);
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf, "the first number of SplitMix64 with seed 0");
        let members = [("10.0.0.7:8081", 1), ("10.0.0.8:8081", 1), ("castier-2.castier:8081", 1), ("[::1]:8081", 1)];
        let even = Ring::new(members.map(|(name, weight)| (name.to_owned(), weight)));
        let weighted = Ring::new(members.iter().enumerate().map(|(i, (name, _))| ((*name).to_owned(), 1 << i)));
        assert_eq!(even.seeds[0], GOLDEN_SEED);
        for (content, in_even, in_weighted) in GOLDEN {
            let digest = Digest::of(content.as_bytes());
            let shown = |ring: &Ring| ring.order(&digest).map(|i| i.to_string()).collect::<String>();
            assert_eq!((shown(&even), shown(&weighted)), (in_even.into(), in_weighted.into()), "{content:?}");
        }
    }

    #[test]
    fn equal_members_have_one_fingerprint() {
        let of = |members: &[(&str, u32)]| Ring::new(members.iter().map(|(name, weight)| ((*name).to_owned(), *weight))).fingerprint();
        let (seven, eight) = ("10.0.0.7:8081", "10.0.0.8:8081");
        let both = of(&[(seven, 1), (eight, 2)]);
        assert_eq!(both, 103_926_228_819_296, "nodes of all versions must agree");
        assert_eq!(both, of(&[(eight, 2), (seven, 1), (eight, 1)]));
        for other in [&[(seven, 1)][..], &[(seven, 1), (eight, 1)], &[(seven, 2), (eight, 1)], &[(seven, 1), (eight, 2), ("x:1", 1)], &[]] {
            assert_ne!(of(other), both, "{other:?}");
            assert!(of(other) < 1 << 48);
        }
    }

    const GOLDEN_SEED: u64 = 13_187_733_438_433_784_478;
    /// Computed by an independent program from the documentation above.
    const GOLDEN: [(&str, &str, &str); 6] = [
        ("", "1203", "1230"),
        ("a", "1023", "2130"),
        ("b", "0231", "0231"),
        ("c", "0123", "2103"),
        ("d", "1203", "2130"),
        ("castier", "0312", "3201"),
    ];

    /// Chance alone spreads 100,000 digests over 50 members with a standard deviation of 2.2 %, so that some member is beyond 5 %
    /// in most draws; over so many members more digests are needed to tell a fair ring from an unfair one.
    #[test]
    fn every_member_gets_its_fair_share() {
        let all = digests(1_000_000);
        for count in 3..=50 {
            let digests = &all[..(count * 20_000).max(100_000)];
            let fair = digests.len() as f64 / count as f64;
            for (member, owned) in counts(&ring(&names(count)), digests).into_iter().enumerate() {
                assert!((owned as f64 / fair - 1.0).abs() < 0.05, "member {member} of {count}: {owned} where {fair} is fair");
            }
            // And of 100,000 it strays no further than chance does: five standard deviations.
            let fair = 100_000.0 / count as f64;
            let bound = 5.0 * (fair * (1.0 - 1.0 / count as f64)).sqrt();
            for owned in counts(&ring(&names(count)), &all[..100_000]) {
                assert!((owned as f64 - fair).abs() < bound, "of {count}: {owned} where {fair} ± {bound} is fair");
            }
        }
    }

    #[test]
    fn shares_follow_the_weights() {
        let weights = [1, 1, 2, 3, 5, 8];
        let ring = Ring::new(names(6).into_iter().zip(weights));
        let digests = digests(400_000);
        for (member, owned) in counts(&ring, &digests).into_iter().enumerate() {
            let fair = digests.len() as f64 * ring.share(member);
            assert!((ring.share(member) - f64::from(weights[member]) / 20.0).abs() < 1e-12);
            assert!((owned as f64 / fair - 1.0).abs() < 0.05, "member {member}: {owned} where {fair} is fair");
        }
    }

    #[test]
    fn joining_takes_a_fair_part_from_each() {
        let (digests, names) = (digests(400_000), names(11));
        let (before, after) = (ring(&names[..10]), ring(&names));
        let mut taken = BTreeMap::<&str, usize>::new();
        for digest in &digests {
            let (old, new) = (order(&before, digest)[0], order(&after, digest)[0]);
            if old != new {
                assert_eq!(new, names[10], "only the newcomer takes");
                *taken.entry(old).or_default() += 1;
            }
        }
        assert_eq!(taken.len(), 10);
        let fair = digests.len() as f64 / 110.0;
        assert!(taken.values().all(|taken| (*taken as f64 / fair - 1.0).abs() < 0.1), "{taken:?} where {fair} is fair");
    }

    #[test]
    fn no_member_and_one_member() {
        let digest = Digest::of(b"x");
        assert_eq!((Ring::default().owner(&digest), Ring::new([]).order(&digest).count()), (None, 0));
        let alone = Ring::new([("a:1".to_owned(), 0), ("a:1".to_owned(), 3)]);
        assert_eq!((alone.order(&digest).collect::<Vec<_>>(), alone.share(0), alone.share(1)), (vec![0], 1.0, 0.0));
    }

    /// The bound is some ten times what a slow machine needs, for the sake of busy ones; `--nocapture` shows the figure.
    #[test]
    fn looking_up_is_fast() {
        let digests = digests(100_000);
        let weights = |weight: fn(u32) -> u32| Ring::new(names(50).into_iter().zip((0..50).map(weight)));
        for (kind, ring) in [("even", weights(|_| 1)), ("weighted", weights(|i| 1 + i % 4))] {
            let round = || {
                let started = Instant::now();
                for digest in &digests {
                    black_box(ring.owner(black_box(digest)));
                }
                started.elapsed().as_nanos() / digests.len() as u128
            };
            let best = (0..5).map(|_| round()).min().unwrap();
            println!("owner of a digest among 50 {kind} members: {best} ns");
            assert!(best < 3_000, "{kind}: {best} ns");
        }
    }

    fn members() -> impl Strategy<Value = Vec<(String, u32)>> {
        let weights = prop_oneof![Just(vec![1; 12]), prop::collection::vec(1u32..70_000, 12)];
        (prop::collection::btree_set("[a-z]{1,6}:[0-9]{1,4}", 1..12), weights)
            .prop_map(|(names, weights)| names.into_iter().zip(weights).collect())
    }

    proptest! {
        #[test]
        fn orders_agree_with_the_oracle(members in members(), content: u64) {
            let digest = Digest::of(&content.to_le_bytes());
            let ring = Ring::new(members.clone());
            prop_assert_eq!(order(&ring, &digest), naive(&members, &digest));
            prop_assert_eq!(ring.order(&digest).collect::<BTreeSet<_>>().len(), members.len(), "everyone once");
            prop_assert_eq!(ring.owner(&digest), ring.order(&digest).next());
        }

        #[test]
        fn the_order_of_the_members_is_irrelevant(shuffled in members().prop_shuffle(), twice: prop::sample::Index) {
            let mut again = shuffled.clone();
            again.reverse();
            again.push((again[twice.index(again.len())].0.clone(), 0));
            prop_assert_eq!(Ring::new(again), Ring::new(shuffled));
        }

        #[test]
        fn who_leaves_takes_only_its_own(members in members(), gone: prop::sample::Index, content: u64) {
            let digest = Digest::of(&content.to_le_bytes());
            let gone = gone.index(members.len());
            let mut left = members.clone();
            let (gone, _) = left.remove(gone);
            let (before, after) = (Ring::new(members), Ring::new(left));
            let mut expected = order(&before, &digest);
            expected.retain(|name| *name != gone);
            prop_assert_eq!(order(&after, &digest), expected, "the others keep their order");
        }
    }
}
