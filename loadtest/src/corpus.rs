//! The blobs of a run. The blobs that it reads depend on the seed only, so that two runs, or two machines, load the same bytes. The blobs
//! that it writes differ from those of every other run, since storing an existing blob is a different operation.

use castier_blob::{Digest, Verifier};
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_distr::{Distribution as _, Zipf};
use rand_xoshiro::Xoshiro256PlusPlus;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blobs are made and sent in pieces of this size, so that a huge blob needs little memory. It must be a multiple of 8, the generator's
/// word: otherwise the bytes would depend on the pieces.
pub(crate) const PIECE: usize = 64 << 10;

/// The parameters from which one blob is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blob {
    /// The seed of the corpus, or of the new blobs.
    seed: u64,
    /// Its number under that seed.
    number: u64,
    /// Its length in bytes.
    pub(crate) size: u64,
}

impl Blob {
    /// The blob's bytes in order, in pieces of [`PIECE`] bytes (the last may be shorter).
    pub(crate) fn pieces(&self) -> Pieces {
        Pieces { rng: generator(self.seed, self.number), left: self.size }
    }

    /// The blob's digest.
    pub(crate) fn digest(&self) -> Digest {
        let (mut verifier, mut buffer, mut pieces) = (Verifier::any(()), Vec::new(), self.pieces());
        while pieces.next_into(&mut buffer) {
            verifier.update(&buffer);
            buffer.clear();
        }
        // A verifier without an expected digest never reports a mismatch.
        verifier.finish().map_or_else(|mismatch| mismatch.actual, |verified| verified.digest())
    }

    /// As [`Self::digest`], but on another thread for a large blob, since other clients of this thread must read their answers.
    pub(crate) async fn digest_aside(self) -> Digest {
        if self.size <= PIECE as u64 {
            return self.digest();
        }
        tokio::task::spawn_blocking(move || self.digest()).await.unwrap_or_else(|_| self.digest())
    }

    /// The whole blob in memory.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (mut bytes, mut pieces) = (Vec::new(), self.pieces());
        while pieces.next_into(&mut bytes) {}
        bytes
    }
}

/// The bytes of a blob, piece by piece.
pub(crate) struct Pieces {
    rng: Xoshiro256PlusPlus,
    left: u64,
}

impl Pieces {
    /// Appends the next piece. Returns false at the end.
    pub(crate) fn next_into(&mut self, buffer: &mut Vec<u8>) -> bool {
        let length = usize::try_from(self.left).map_or(PIECE, |left| left.min(PIECE));
        if length == 0 {
            return false;
        }
        let at = buffer.len();
        buffer.resize(at + length, 0);
        self.rng.fill_bytes(&mut buffer[at..]);
        self.left -= length as u64;
        true
    }
}

/// The numbered generator of a seed. The multiplier (2^64 over the golden ratio) spreads neighbouring numbers.
pub(crate) fn generator(seed: u64, number: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed.rotate_left(32) ^ number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// The blobs that a run reads, and the parameters of those that it writes.
pub(crate) struct Corpus {
    seed: u64,
    /// The seed of the blobs that this run writes.
    fresh: u64,
    size: u64,
    /// The digests of the blobs that are stored before the run; empty if it reads none.
    digests: Vec<Digest>,
    /// The blobs' bytes, if bodies are compared and not hashed.
    held: Option<Vec<Vec<u8>>>,
}

impl Corpus {
    /// Computes the digests of `objects` blobs of `size` bytes. Keeps the bytes if `hold`. `made` counts the progress.
    pub(crate) fn new(seed: u64, objects: usize, size: u64, hold: bool, made: &AtomicU64) -> Self {
        let mut corpus = Self { seed, fresh: rand::random(), size, digests: Vec::with_capacity(objects), held: hold.then(Vec::new) };
        for number in 0..objects {
            let blob = corpus.blob(number);
            if let Some(held) = &mut corpus.held {
                held.push(blob.bytes());
            }
            corpus.digests.push(corpus.held(number).map_or_else(|| blob.digest(), Digest::of));
            made.fetch_add(1, Ordering::Relaxed);
        }
        corpus
    }

    /// The number of its blobs.
    pub(crate) const fn len(&self) -> usize {
        self.digests.len()
    }

    /// The length of every blob.
    pub(crate) const fn size(&self) -> u64 {
        self.size
    }

    /// The digest of one of its blobs.
    pub(crate) fn digest(&self, number: usize) -> Digest {
        self.digests[number]
    }

    /// The bytes of one of its blobs, if it keeps them.
    pub(crate) fn held(&self, number: usize) -> Option<&[u8]> {
        self.held.as_ref().map(|held| held[number].as_slice())
    }

    /// One of its blobs.
    pub(crate) const fn blob(&self, number: usize) -> Blob {
        Blob { seed: self.seed, number: number as u64, size: self.size }
    }

    /// The blob that the request with this ticket writes. No other request or run writes it.
    pub(crate) const fn fresh(&self, ticket: u64) -> Blob {
        Blob { seed: self.fresh, number: ticket, size: self.size }
    }
}

/// Chooses the blob of the corpus that a request reads.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Popularity {
    /// All blobs are equally popular.
    Uniform,
    /// The blob of rank r in proportion to 1/r^a.
    Zipf(Zipf<f64>),
}

impl Popularity {
    /// Over `objects` blobs. Without an exponent it is uniform.
    pub(crate) fn new(objects: usize, exponent: Option<f64>) -> Result<Self, String> {
        match exponent {
            None => Ok(Self::Uniform),
            Some(a) => Zipf::new(objects as f64, a).map(Self::Zipf).map_err(|error| format!("--zipf {a}: {error}")),
        }
    }

    /// A blob's number below `objects`.
    pub(crate) fn pick(&self, objects: usize, rng: &mut Xoshiro256PlusPlus) -> usize {
        match self {
            Self::Uniform => rng.random_range(0..objects),
            // The sample is a whole number from 1 to `objects`, as a float. The clamp protects against rounding.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank: whole, positive and small")]
            Self::Zipf(zipf) => (zipf.sample(rng) as usize).clamp(1, objects) - 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn blobs_depend_on_seed_and_number_alone() {
        let corpus = |seed, hold| Corpus::new(seed, 8, 100, hold, &AtomicU64::default());
        let blob = |seed, number| corpus(seed, false).blob(number);
        assert_eq!(blob(1, 3).bytes(), blob(1, 3).bytes());
        assert_ne!(blob(1, 3).bytes(), blob(1, 4).bytes());
        assert_ne!(blob(1, 3).bytes(), blob(2, 3).bytes());
        let one = corpus(1, false);
        assert_eq!(one.digest(3), Digest::of(&blob(1, 3).bytes()));
        assert_ne!(one.fresh(3).digest(), one.digest(3));
        assert_eq!(corpus(1, true).held(3), Some(one.blob(3).bytes().as_slice()));
    }

    #[test]
    fn what_is_written_is_like_nothing_that_was_written_before() {
        let fresh = |number| Corpus::new(1, 0, 100, false, &AtomicU64::default()).fresh(number).digest();
        assert_ne!(fresh(3), fresh(3));
    }

    #[test]
    fn pieces_join_to_the_size_asked_for() {
        for size in [0, 1, 7, PIECE as u64, PIECE as u64 + 1, 3 * PIECE as u64 + 5] {
            let blob = Blob { seed: 9, number: 9, size };
            assert_eq!(blob.bytes().len() as u64, size);
            assert_eq!(blob.digest(), Digest::of(&blob.bytes()));
        }
    }

    #[test]
    fn zipf_prefers_low_ranks_as_the_law_says() {
        let popularity = Popularity::new(10, Some(1.0)).unwrap();
        let mut rng = generator(7, 0);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[popularity.pick(10, &mut rng)] += 1;
        }
        let harmonic: f64 = (1..=10).map(|rank| 1.0 / f64::from(rank)).sum();
        for (rank, count) in (1..).zip(counts) {
            let expected = 100_000.0 / f64::from(rank) / harmonic;
            assert!((f64::from(count) - expected).abs() < 0.05 * expected, "rank {rank}: {count}, the law says {expected}");
        }
    }

    proptest! {
        #[test]
        fn every_pick_is_in_the_corpus(objects in 1_usize..5000, exponent in prop::option::of(0.0..4.0_f64), seed: u64) {
            let popularity = Popularity::new(objects, exponent).unwrap();
            let mut rng = generator(seed, 1);
            for _ in 0..50 {
                prop_assert!(popularity.pick(objects, &mut rng) < objects);
            }
        }
    }
}
