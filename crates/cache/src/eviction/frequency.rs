//! Estimates how often each blob was requested lately: a count-min sketch with aging. The estimate can be too high, and is rarely too low.
//!
//! All counters of one digest are in one cache line, so that a count costs one memory access. Counters are changed without atomic
//! read-modify-write operations: if two threads count in one block at the same moment, one count may be lost, which is acceptable.
//!
//! Sources: G. Cormode, S. Muthukrishnan: "An improved data stream summary: the count-min sketch and its applications", Journal of
//! Algorithms 55(1), 2005. The aging is that of TinyLFU; see [`super`].

use castier_blob::Digest;
use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU8, AtomicUsize, Ordering},
};

/// The counters of one row in a block.
const WIDTH: usize = 15;
/// The independent counters of each digest. The least of them is the estimate.
const ROWS: usize = 4;
/// The position in a block that counts the block's additions.
const ADDITIONS: usize = WIDTH * ROWS;
/// After this many additions to one block, some blocks are aged.
const PERIOD: u8 = 64;
/// The digests per block. This gives each digest as many counters as in Caffeine's sketch.
const DIGESTS: usize = 4;
/// All counts are halved once in this many gets per kept blob, as in Caffeine, so that blobs that are not hot any more can be evicted.
const SAMPLE: usize = 10;

/// One cache line.
#[repr(align(64))]
struct Block([AtomicU8; 64]);

/// See the module.
pub(super) struct FrequencySketch {
    /// Their number is a power of two.
    blocks: Box<[Block]>,
    /// The block to age next.
    oldest: AtomicUsize,
    /// Random, so that clients cannot choose digests that share counters.
    seed: u64,
}

impl FrequencySketch {
    /// A sketch of at most `bytes` and more than half of that; at least 4 KiB.
    pub(super) fn new(bytes: u64) -> Self {
        let most = usize::try_from(bytes / size_of::<Block>() as u64).unwrap_or(usize::MAX).clamp(64, 1 << 24);
        let blocks = 1 << most.ilog2();
        // Blocks start at different points of their period, so that aging is even from the first get on.
        let phase = |number: usize| (number * 37 % PERIOD as usize) as u8;
        let block = |number| Block(std::array::from_fn(|at| AtomicU8::new(if at == ADDITIONS { phase(number) } else { 0 })));
        Self { blocks: (0..blocks).map(block).collect(), oldest: AtomicUsize::new(0), seed: RandomState::new().hash_one(0) }
    }

    /// Counts one get. `kept` gives the number of kept blobs, which determines how fast counts age. Sometimes this halves some of the counts;
    /// then it returns which fraction of all counts, and otherwise `None`.
    pub(super) fn count(&self, digest: &Digest, kept: impl FnOnce() -> u64) -> Option<f64> {
        let (block, counters) = self.at(digest);
        for counter in counters {
            let counter = &block.0[counter];
            counter.store(counter.load(Ordering::Relaxed).saturating_add(1), Ordering::Relaxed);
        }
        let additions = block.0[ADDITIONS].load(Ordering::Relaxed) + 1;
        block.0[ADDITIONS].store(additions % PERIOD, Ordering::Relaxed);
        (additions == PERIOD).then(|| self.age(usize::try_from(kept()).unwrap_or(usize::MAX)))
    }

    /// The estimated number of gets, at most 255.
    pub(super) fn estimate(&self, digest: &Digest) -> u8 {
        let (block, counters) = self.at(digest);
        counters.map(|counter| block.0[counter].load(Ordering::Relaxed)).into_iter().min().unwrap_or(0)
    }

    /// Halves the counts of the next few blocks. Over [`SAMPLE`] gets per kept blob, all blocks are halved once. This happens in small steps,
    /// so that no request waits for all blocks.
    fn age(&self, kept: usize) -> f64 {
        let all = self.blocks.len();
        // Lower bound: a get must not age more than one block on average. Upper bound: counts would overlap too much in a block.
        let sample = SAMPLE * kept.clamp((DIGESTS * 64).max(all / SAMPLE), DIGESTS * all);
        let some = (all * PERIOD as usize).div_ceil(sample).min(all);
        let from = self.oldest.fetch_add(some, Ordering::Relaxed);
        for block in from..from.wrapping_add(some) {
            for counter in &self.blocks[block & (all - 1)].0[..ADDITIONS] {
                counter.store(counter.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
            }
        }
        some as f64 / all as f64
    }

    /// The digest's block, and the positions of its counters in it.
    fn at(&self, digest: &Digest) -> (&Block, [usize; ROWS]) {
        let bytes = digest.as_bytes();
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        // The folded 128-bit product: each bit of the result depends on the seed and on the whole first word.
        let product = u128::from(word(8) ^ self.seed) * u128::from(word(16) ^ self.seed.rotate_left(32));
        let hash = product as u64 ^ (product >> 64) as u64;
        let block = &self.blocks[hash as usize & (self.blocks.len() - 1)];
        let position = |row: usize| row * WIDTH + ((((hash >> (32 + 8 * row)) & 0xff) as usize * WIDTH) >> 8);
        (block, std::array::from_fn(position))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(sketch: &FrequencySketch, digest: &Digest) {
        sketch.count(digest, || 1000);
    }

    fn digest(number: u32) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn counts_are_close_and_age() {
        let sketch = FrequencySketch::new(1 << 20);
        for number in 0..1000 {
            for _ in 0..number % 20 {
                count(&sketch, &digest(number));
            }
        }
        let far = (0..1000).filter(|number| u32::from(sketch.estimate(&digest(*number))).abs_diff(number % 20) > 10).count();
        assert!(far < 20, "{far} of 1000 estimates are far off");
        // After ten gets per kept blob, all older counts are halved at least once.
        let hot = digest(5000);
        (0..250).for_each(|_| count(&sketch, &hot));
        let before = sketch.estimate(&hot);
        (10_000..30_000).for_each(|number| count(&sketch, &digest(number)));
        let after = sketch.estimate(&hot);
        assert!(before > 200 && after <= before / 2, "{before}, then {after}");
    }

    #[test]
    fn a_counter_does_not_overflow() {
        let sketch = FrequencySketch::new(0);
        (0..1000).for_each(|_| count(&sketch, &digest(1)));
        assert!(sketch.estimate(&digest(1)) > 100);
    }
}
