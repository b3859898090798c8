//! The hit ratio of the memory tier over blobs of very different sizes, beside other policies under the same requests. Nothing is
//! sent: a get is a look-up, and after a miss the blob is kept. `scripts/bench mixed`, or `cargo run --release -p castier-cache --example mixed_sizes -- --quick`.
#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has nothing to say")]

use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier};
use castier_cache::{Budget, Memory};
use castier_config::{self as config, Policy, Size};
use moka::{policy::EvictionPolicy, sync::Cache};
use std::{
    collections::{BTreeMap, HashMap},
    hint::black_box,
    time::{Duration, Instant},
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const SMALLEST: f64 = 1024.0;
const LARGEST: f64 = (8 << 20) as f64;
const CAPACITY: u64 = 256 << 20;
const SEED: u64 = 42;

/// Pseudo-random numbers, the same in each run (SplitMix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to 1.
    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

type Blob = Verified<Bytes>;

/// Blobs whose sizes are log-uniform. All share one piece of memory, from different offsets, so that a corpus of gigabytes costs little.
fn corpus(count: usize) -> Vec<Blob> {
    let mut chance = Chance(SEED);
    let shared: Bytes = (0..LARGEST as u64 / 4).flat_map(|_| chance.next().to_le_bytes()).collect();
    let blob = |_| {
        let size = (SMALLEST * (LARGEST / SMALLEST).powf(chance.part())) as usize;
        let from = chance.next() as usize % (shared.len() - size);
        let bytes = shared.slice(from..from + size);
        let mut verifier = Verifier::any(Vec::new());
        verifier.write(&bytes).unwrap();
        verifier.finish().unwrap()
    };
    (0..count).map(blob).collect()
}

/// Requests for the first `hot` blobs by Zipf's law. With `scan`, in one stretch of four every second request is for the next of
/// the others, none of which comes twice.
fn trace(hot: usize, others: usize, requests: usize, exponent: f64, scan: bool) -> Vec<usize> {
    let mut chance = Chance(SEED + 1);
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=hot)
        .map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        })
        .collect();
    let mut next = 0;
    let one = |at: usize| {
        if scan && at / 5_000 % 4 == 3 && at.is_multiple_of(2) && next < others {
            next += 1;
            return hot + next - 1;
        }
        let wanted = chance.part() * sum;
        sums.partition_point(|sum| *sum < wanted).min(hot - 1)
    };
    (0..requests).map(one).collect()
}

/// Something that keeps blobs. True if it was a hit.
trait Kind {
    fn get(&mut self, blob: &Blob) -> bool;
}

impl Kind for Memory {
    fn get(&mut self, blob: &Blob) -> bool {
        let digest = blob.digest();
        self.count(&digest);
        let hit = self.find(&digest).is_some();
        if !hit {
            self.keep(blob.clone(), castier_cache::Visibility::Public);
        }
        hit
    }
}

/// The least recently used goes first: as in nginx, which weighs files alone.
#[derive(Default)]
struct Lru {
    used: u64,
    clock: u64,
    at: HashMap<Digest, (u64, u64)>,
    order: BTreeMap<u64, Digest>,
}

impl Kind for Lru {
    fn get(&mut self, blob: &Blob) -> bool {
        self.clock += 1;
        let before = self.at.insert(blob.digest(), (self.clock, blob.size()));
        self.order.insert(self.clock, blob.digest());
        if let Some((clock, _)) = before {
            self.order.remove(&clock);
            return true;
        }
        self.used += blob.size();
        while self.used > CAPACITY {
            let (_, digest) = self.order.pop_first().unwrap();
            self.used -= self.at.remove(&digest).unwrap().1;
        }
        false
    }
}

/// moka as it comes. `counts`: how often a miss is counted.
struct Moka {
    cache: Cache<Digest, Bytes>,
    counts: usize,
}

impl Moka {
    fn new(counts: usize) -> Self {
        let weigh = |_: &Digest, bytes: &Bytes| bytes.len() as u32 + 420;
        Self { cache: Cache::builder().max_capacity(CAPACITY).weigher(weigh).eviction_policy(EvictionPolicy::tiny_lfu()).build(), counts }
    }
}

impl Kind for Moka {
    fn get(&mut self, blob: &Blob) -> bool {
        if (0..self.counts).any(|_| self.cache.get(&blob.digest()).is_some()) {
            return true;
        }
        self.cache.insert(blob.digest(), blob.content().clone());
        if blob.size() >= 16 << 10 {
            self.cache.run_pending_tasks();
        }
        false
    }
}

fn memory(policy: Policy) -> Memory {
    let config = config::Memory { capacity: Size::new(CAPACITY), max_blob: Size::mib(8), policy };
    Memory::new(&config, &Budget::new(u64::MAX))
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (hot, requests) = if quick { (3_000, 100_000) } else { (6_000, 600_000) };
    let blobs = corpus(hot + requests / 80);
    println!("| Zipf's exponent | castier | castier, `lru` | LRU as in nginx | moka's TinyLFU | the same, a miss counted three times |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for (exponent, scan) in [(0.7, false), (0.9, false), (1.1, false), (0.9, true), (1.1, true)] {
        let trace = trace(hot, blobs.len() - hot, requests, exponent, scan);
        let kinds: [Box<dyn Kind>; 5] = [
            Box::new(memory(Policy::TinyLfu)),
            Box::new(memory(Policy::Lru)),
            Box::<Lru>::default(),
            Box::new(Moka::new(1)),
            Box::new(Moka::new(3)),
        ];
        let cells = kinds.into_iter().map(|mut kind| {
            let (mut hits, mut gets) = (0usize, 0usize);
            for (at, number) in trace.iter().enumerate() {
                let hit = kind.get(&blobs[*number]);
                // The first quarter warms up; what is scanned can be no hit.
                if at >= requests / 4 && *number < hot {
                    gets += 1;
                    hits += usize::from(hit);
                }
            }
            format!(" {:.1} |", 100.0 * hits as f64 / gets as f64)
        });
        let scan = if scan { ", with scans" } else { "" };
        println!("| {exponent}{scan} |{}", cells.collect::<String>());
    }
    hits();
}

/// What a hit costs over many small blobs, in turns: castier's count and look-up beside moka's look-up with its own counting.
fn hits() {
    let blob = |number: u64| {
        let bytes = Bytes::from(number.to_le_bytes().repeat(128));
        let mut verifier = Verifier::any(Vec::new());
        verifier.write(&bytes).unwrap();
        verifier.finish().unwrap()
    };
    let blobs: Vec<Blob> = (0..100_000).map(blob).collect();
    let mut digests: Vec<_> = blobs.iter().map(Verified::digest).collect();
    digests.sort();
    let (tier, moka) = (memory(Policy::TinyLfu), Moka::new(1));
    for blob in blobs {
        moka.cache.insert(blob.digest(), blob.content().clone());
        tier.keep(blob, castier_cache::Visibility::Public);
    }
    let time = |find: &dyn Fn(&Digest) -> bool| {
        let started = Instant::now();
        assert!(digests.iter().all(find), "all are hits");
        started.elapsed() / digests.len() as u32
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        ours.push(time(&|digest| {
            tier.count(digest);
            black_box(tier.find(digest)).is_some()
        }));
        theirs.push(time(&|digest| black_box(moka.cache.get(digest)).is_some()));
    }
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    println!("\nA hit: castier {:?}, moka's TinyLFU {:?}", median(ours), median(theirs));
}
