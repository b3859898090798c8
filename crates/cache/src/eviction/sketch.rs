//! How often each blob was asked for lately: a count-min sketch with aging. It is an estimate that can be too high and is seldom too low.
//!
//! All counters of one digest are in one cache line, so counting costs one access to memory. Counters are changed without
//! read-modify-write operations: two threads that count in one block at the same moment may lose a count, which an estimate can bear.

use castier_blob::Digest;
use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU8, AtomicUsize, Ordering},
};

/// Counters of one row in a block.
const WIDTH: usize = 15;
/// Independent counters for each digest; the least of them is the estimate.
const ROWS: usize = 4;
/// Where a block counts its own additions.
const TALLY: usize = WIDTH * ROWS;
/// After so many additions a block has some blocks aged.
const TURN: u8 = 64;
/// A block serves so many digests: as many counters for each as in Caffeine's sketch.
const DIGESTS: usize = 4;
/// All counts are halved once in so many gets for each kept blob, as in Caffeine: what was hot yesterday must be able to leave.
const SAMPLE: usize = 10;

/// One cache line.
#[repr(align(64))]
struct Block([AtomicU8; 64]);

/// The estimates.
pub(super) struct Sketch {
    /// As many as a power of two.
    blocks: Box<[Block]>,
    /// The block that is aged next.
    oldest: AtomicUsize,
    /// Keeps clients from choosing digests that share counters.
    seed: u64,
}

impl Sketch {
    /// A sketch of at most so many bytes, and more than half of them; 4 KiB at least.
    pub(super) fn new(bytes: u64) -> Self {
        let most = usize::try_from(bytes / size_of::<Block>() as u64).unwrap_or(usize::MAX).clamp(64, 1 << 24);
        let blocks = 1 << most.ilog2();
        // Each block begins somewhere in its turn, so that aging keeps its pace from the first get on.
        let phase = |number: usize| (number * 37 % TURN as usize) as u8;
        let block = |number| Block(std::array::from_fn(|at| AtomicU8::new(if at == TALLY { phase(number) } else { 0 })));
        Self { blocks: (0..blocks).map(block).collect(), oldest: AtomicUsize::new(0), seed: RandomState::new().hash_one(0) }
    }

    /// Counts one get. `kept`: how many blobs there are, which says how fast counts age. Now and then a part of all counts is halved; gives
    /// that part, and else none.
    pub(super) fn count(&self, digest: &Digest, kept: impl FnOnce() -> u64) -> Option<f64> {
        let (block, counters) = self.at(digest);
        for counter in counters {
            let counter = &block.0[counter];
            counter.store(counter.load(Ordering::Relaxed).saturating_add(1), Ordering::Relaxed);
        }
        let turn = block.0[TALLY].load(Ordering::Relaxed) + 1;
        block.0[TALLY].store(turn % TURN, Ordering::Relaxed);
        (turn == TURN).then(|| self.age(usize::try_from(kept()).unwrap_or(usize::MAX)))
    }

    /// How often it was asked for, at most 255.
    pub(super) fn estimate(&self, digest: &Digest) -> u8 {
        let (block, counters) = self.at(digest);
        counters.map(|counter| block.0[counter].load(Ordering::Relaxed)).into_iter().min().unwrap_or(0)
    }

    /// Halves the counts of the next few blocks. After as many gets as [`SAMPLE`] says all blocks have been halved once: a bit at a time,
    /// so that no request waits for all of them.
    fn age(&self, kept: usize) -> f64 {
        let all = self.blocks.len();
        // With fewer gets than that, each would pay for the aging of more than one block; with more, the counters of a block would overlap too much.
        let sample = SAMPLE * kept.clamp((DIGESTS * 64).max(all / SAMPLE), DIGESTS * all);
        let some = (all * TURN as usize).div_ceil(sample).min(all);
        let from = self.oldest.fetch_add(some, Ordering::Relaxed);
        for block in from..from.wrapping_add(some) {
            for counter in &self.blocks[block & (all - 1)].0[..TALLY] {
                counter.store(counter.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
            }
        }
        some as f64 / all as f64
    }

    /// The digest's block, and its counters in that.
    fn at(&self, digest: &Digest) -> (&Block, [usize; ROWS]) {
        let bytes = digest.as_bytes();
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        // A product of 128 bits, folded: each bit of the result depends on the seed and on all of the first word.
        let product = u128::from(word(8) ^ self.seed) * u128::from(word(16) ^ self.seed.rotate_left(32));
        let hash = product as u64 ^ (product >> 64) as u64;
        let block = &self.blocks[hash as usize & (self.blocks.len() - 1)];
        let place = |row: usize| row * WIDTH + ((((hash >> (32 + 8 * row)) & 0xff) as usize * WIDTH) >> 8);
        (block, std::array::from_fn(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(sketch: &Sketch, digest: &Digest) {
        sketch.count(digest, || 1000);
    }

    fn digest(number: u32) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn counts_are_close_and_age() {
        let sketch = Sketch::new(1 << 20);
        for number in 0..1000 {
            for _ in 0..number % 20 {
                count(&sketch, &digest(number));
            }
        }
        let far = (0..1000).filter(|number| u32::from(sketch.estimate(&digest(*number))).abs_diff(number % 20) > 10).count();
        assert!(far < 20, "{far} of 1000 estimates are far off");
        // Ten gets for each kept blob later, what was counted before is halved at least once.
        let hot = digest(5000);
        (0..250).for_each(|_| count(&sketch, &hot));
        let before = sketch.estimate(&hot);
        (10_000..30_000).for_each(|number| count(&sketch, &digest(number)));
        let after = sketch.estimate(&hot);
        assert!(before > 200 && after <= before / 2, "{before}, then {after}");
    }

    #[test]
    fn a_counter_stops_at_its_end() {
        let sketch = Sketch::new(0);
        (0..1000).for_each(|_| count(&sketch, &digest(1)));
        assert!(sketch.estimate(&digest(1)) > 100);
    }
}
