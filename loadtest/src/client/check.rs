//! What is done with the bytes of an answer.

use super::BUFFER;
use castier_blob::{Digest, Verifier};

/// What is done with the body of a 200. Other bodies are read and dropped.
pub(crate) enum Check<'a> {
    /// Nothing is expected in it.
    Drop,
    /// It is to hash to a digest.
    Hash(Digest),
    /// It is to be these very bytes, whose digest was computed before.
    Compare(&'a [u8]),
    /// It is kept, up to the buffer's size, for the caller to read.
    Keep,
}

/// Takes a body's bytes and checks them.
pub(super) struct Taker<'a> {
    /// Bytes so far.
    pub(super) received: u64,
    check: &'a Check<'a>,
    /// For [`Check::Hash`].
    verifier: Option<Verifier>,
    /// For [`Check::Compare`]: no difference so far.
    equal: bool,
    /// For [`Check::Keep`].
    kept: Vec<u8>,
}

impl<'a> Taker<'a> {
    pub(super) fn new(check: &'a Check<'a>) -> Self {
        let verifier = if let Check::Hash(digest) = check { Some(Verifier::of(*digest, ())) } else { None };
        Self { received: 0, check, verifier, equal: true, kept: Vec::new() }
    }

    pub(super) fn take(&mut self, bytes: &[u8]) {
        match self.check {
            Check::Drop => {}
            Check::Hash(_) => {
                if let Some(verifier) = &mut self.verifier {
                    verifier.update(bytes);
                }
            }
            Check::Compare(expected) => {
                let at = usize::try_from(self.received).unwrap_or(usize::MAX);
                self.equal &= at.checked_add(bytes.len()).and_then(|end| expected.get(at..end)) == Some(bytes);
            }
            Check::Keep => {
                let space = BUFFER - self.kept.len();
                self.kept.extend_from_slice(&bytes[..bytes.len().min(space)]);
            }
        }
        self.received += bytes.len() as u64;
    }

    /// Whether the body passed, and what was kept of it.
    pub(super) fn finish(self) -> (bool, Vec<u8>) {
        let sound = match self.check {
            Check::Drop | Check::Keep => true,
            Check::Hash(_) => self.verifier.is_some_and(|verifier| verifier.finish().is_ok()),
            Check::Compare(expected) => self.equal && self.received == expected.len() as u64,
        };
        (sound, self.kept)
    }
}
