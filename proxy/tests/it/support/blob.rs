//! Blobs of any size, generated on the fly and never held in memory as a whole.

use super::{KIB, Random};
use castier_blob::{Digest, Verifier};
use castier_wire::blob_path;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The period of a blob's bytes. It is prime, so that a misplaced block of a round size is detected. It is small, so that it stays in the
/// processor's cache while a thousand clients compare against it.
const PERIOD: usize = 262_147;

/// A blob in which each byte follows from its offset.
#[derive(Clone)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// The pattern that repeats.
    pattern: Arc<[u8]>,
}

impl Blob {
    /// A blob that differs from all others in this process.
    pub(crate) fn new(size: u64) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let mut random = Random(SERIAL.fetch_add(1, Ordering::Relaxed) << 32);
        let mut pattern = Vec::with_capacity(PERIOD + 8);
        while pattern.len() < PERIOD {
            pattern.extend_from_slice(&random.next().to_le_bytes());
        }
        pattern.truncate(PERIOD);
        Self::of_pattern(pattern.into(), size)
    }

    /// A blob with these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let pattern = if bytes.is_empty() { &[0] } else { bytes };
        Self::of_pattern(pattern.into(), bytes.len() as u64)
    }

    fn of_pattern(pattern: Arc<[u8]>, size: u64) -> Self {
        let mut blob = Self { digest: Digest::of(b""), size, pattern };
        let mut hash = Verifier::any(());
        let mut at = 0;
        while at < size {
            let piece = blob.slice(at, size);
            hash.update(piece);
            at += piece.len() as u64;
        }
        blob.digest = hash.finish().unwrap().digest();
        blob
    }

    pub(crate) fn path(&self) -> String {
        blob_path(&self.digest)
    }

    /// Bytes from `at`, at most up to `end`. Stops at the end of the pattern, and returns at least one byte.
    pub(crate) fn slice(&self, at: u64, end: u64) -> &[u8] {
        let from = (at % self.pattern.len() as u64) as usize;
        let left = usize::try_from(end.min(self.size) - at).unwrap();
        &self.pattern[from..self.pattern.len().min(from + left)]
    }

    /// The bytes `from..end`, in one piece, for small blobs.
    pub(crate) fn bytes(&self, from: u64, end: u64) -> Vec<u8> {
        assert!(end - from <= 64 * 1024 * KIB, "this would hold too much");
        let mut bytes = Vec::new();
        while from + (bytes.len() as u64) < end {
            bytes.extend_from_slice(self.slice(from + bytes.len() as u64, end));
        }
        bytes
    }

    pub(crate) fn whole(&self) -> Vec<u8> {
        self.bytes(0, self.size)
    }

    /// Whether `bytes` are the blob's bytes at `at`.
    pub(crate) fn is_at(&self, mut at: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if at >= self.size {
                return false;
            }
            let known = self.slice(at, at + bytes.len() as u64);
            if *known != bytes[..known.len()] {
                return false;
            }
            at += known.len() as u64;
            bytes = &bytes[known.len()..];
        }
        true
    }
}
