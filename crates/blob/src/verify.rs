//! The proof that bytes are the blob they claim to be.

use crate::Digest;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use std::convert::Infallible;

/// Where a blob's bytes go while they are hashed: memory, a file, or nowhere.
pub trait Sink {
    /// What holds the bytes once all of them have come.
    type Content;
    /// Why it cannot take bytes.
    type Error;

    /// Takes the next bytes, in order.
    ///
    /// # Errors
    /// The sink's own. The blob is then incomplete, and the verifier is of no more use.
    fn write(&mut self, bytes: &Bytes) -> Result<(), Self::Error>;

    /// Closes the sink. Called only after every byte has matched.
    fn close(self) -> Self::Content;
}

/// For bytes that are hashed and go nowhere.
impl Sink for () {
    type Content = ();
    type Error = Infallible;

    fn write(&mut self, _: &Bytes) -> Result<(), Infallible> {
        Ok(())
    }

    fn close(self) {}
}

/// Collects the bytes in one piece of memory.
impl Sink for Vec<u8> {
    type Content = Bytes;
    type Error = Infallible;

    fn write(&mut self, bytes: &Bytes) -> Result<(), Infallible> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn close(self) -> Bytes {
        self.into()
    }
}

/// Hashes a blob's bytes on their way into a sink, and at their end turns what the sink holds into a [`Verified`], or refuses to.
///
/// Invariant: this is the only maker of [`Verified`], and it makes one only of the bytes that it has seen, all of them.
pub struct Verifier<S = ()> {
    /// The name the bytes claim; none for an upload that lets the store name it.
    claimed: Option<Digest>,
    hasher: Sha256,
    /// Bytes hashed so far.
    seen: u64,
    sink: S,
}

impl<S: Sink> Verifier<S> {
    /// Accepts only the blob named `digest`.
    pub fn of(digest: Digest, sink: S) -> Self {
        Self { claimed: Some(digest), hasher: Sha256::new(), seen: 0, sink }
    }

    /// Accepts anything, and names it.
    pub fn any(sink: S) -> Self {
        Self { claimed: None, hasher: Sha256::new(), seen: 0, sink }
    }

    /// Takes the next bytes, in order.
    ///
    /// # Errors
    /// The sink's.
    pub fn write(&mut self, bytes: &Bytes) -> Result<(), S::Error> {
        self.hash(bytes);
        self.sink.write(bytes)
    }

    fn hash(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.seen += bytes.len() as u64;
    }

    /// How many bytes have passed.
    pub const fn seen(&self) -> u64 {
        self.seen
    }

    /// The digest of the bytes that have passed, followed by these.
    pub fn digest_with(&self, next: &[u8]) -> Digest {
        Digest::from_bytes(self.hasher.clone().chain_update(next).finalize().into())
    }

    /// The sink, for what it needs beside bytes: a flush, a new file.
    pub const fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    /// All bytes have passed.
    ///
    /// # Errors
    /// [`Mismatch`] when they are not the claimed blob. The sink is dropped.
    pub fn finish(self) -> Result<Verified<S::Content>, Mismatch> {
        let actual = Digest::from_bytes(self.hasher.finalize().into());
        match self.claimed {
            Some(claimed) if claimed != actual => Err(Mismatch { claimed, actual, size: self.seen }),
            _ => Ok(Verified { digest: actual, size: self.seen, content: self.sink.close() }),
        }
    }
}

impl Verifier {
    /// As [`Self::write`], for bytes that go nowhere.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash(bytes);
    }
}

/// A blob whose every byte went through a [`Verifier`]. Only this can be kept in a tier or acknowledged.
#[derive(Clone, Debug)]
pub struct Verified<C> {
    digest: Digest,
    size: u64,
    content: C,
}

impl<C> Verified<C> {
    /// The blob's name.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Its length in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// What holds its bytes.
    pub const fn content(&self) -> &C {
        &self.content
    }

    /// The same proof for a part of the content; none if `part` finds none. `part` is a plain function, which captures nothing: what it returns
    /// can only come out of the content, so no proof gets other bytes.
    pub fn narrow<D>(self, part: fn(C) -> Option<D>) -> Option<Verified<D>> {
        Some(Verified { digest: self.digest, size: self.size, content: part(self.content)? })
    }

    /// Gives up the proof for what holds the bytes.
    pub fn into_content(self) -> C {
        self.content
    }
}

/// The bytes are some other blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {size} bytes hash to {actual}, not to {claimed}")]
pub struct Mismatch {
    /// The name they came under.
    pub claimed: Digest,
    /// The name they deserve.
    pub actual: Digest,
    /// How many there were.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_split_of_the_bytes_verifies(bytes: Vec<u8>, cut: prop::sample::Index) {
            let bytes = Bytes::from(bytes);
            let cut = cut.index(bytes.len() + 1);
            let mut verifier = Verifier::of(Digest::of(&bytes), Vec::new());
            verifier.write(&bytes.slice(..cut)).unwrap();
            prop_assert_eq!((verifier.seen(), verifier.digest_with(&[])), (cut as u64, Digest::of(&bytes[..cut])));
            verifier.write(&bytes.slice(cut..)).unwrap();
            let verified = verifier.finish().unwrap();
            prop_assert_eq!((verified.digest(), verified.size()), (Digest::of(&bytes), bytes.len() as u64));
            prop_assert_eq!(verified.content(), &bytes);
        }

        #[test]
        fn one_flipped_bit_is_a_mismatch(mut bytes in prop::collection::vec(any::<u8>(), 1..200), at: prop::sample::Index, bit in 0u8..8) {
            let claimed = Digest::of(&bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let mut verifier = Verifier::of(claimed, ());
            verifier.update(&bytes);
            let mismatch = verifier.finish().unwrap_err();
            prop_assert_eq!((mismatch.claimed, mismatch.actual), (claimed, Digest::of(&bytes)));
        }
    }

    #[test]
    fn a_part_of_the_content_has_the_same_proof() {
        let mut verifier = Verifier::any(Vec::new());
        verifier.write(&Bytes::from_static(b"abc")).unwrap();
        let verified = verifier.finish().unwrap();
        assert!(verified.clone().narrow(|_| None::<Bytes>).is_none());
        assert_eq!(verified.narrow(Some).unwrap().digest(), Digest::of(b"abc"));
    }
}
