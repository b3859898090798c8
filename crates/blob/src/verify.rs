//! The proof that bytes are the blob they claim to be.

use crate::Digest;
use sha2::{Digest as _, Sha256};

/// Hashes a blob's bytes as they pass, and at their end turns whatever holds them into a [`Verified`], or refuses to.
///
/// Invariant: this is the only maker of [`Verified`], and it makes one only after it has seen every byte.
#[derive(Clone)]
pub struct Verifier {
    /// The name the bytes claim; none for an upload that lets the store name it.
    claimed: Option<Digest>,
    hasher: Sha256,
    /// Bytes hashed so far.
    seen: u64,
}

impl Verifier {
    /// Will accept only the blob named `digest`.
    pub fn of(digest: Digest) -> Self {
        Self { claimed: Some(digest), hasher: Sha256::new(), seen: 0 }
    }

    /// Will accept anything, and name it.
    pub fn any() -> Self {
        Self { claimed: None, hasher: Sha256::new(), seen: 0 }
    }

    /// Takes the next bytes, in order.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.seen += bytes.len() as u64;
    }

    /// How many bytes have passed.
    pub const fn seen(&self) -> u64 {
        self.seen
    }

    /// The bytes are complete: `content` holds exactly what passed through [`Self::update`].
    ///
    /// # Errors
    /// [`Mismatch`] when they are not the claimed blob.
    pub fn finish<C>(self, content: C) -> Result<Verified<C>, Mismatch> {
        let actual = Digest::from_hash(self.hasher.finalize().into());
        match self.claimed {
            Some(claimed) if claimed != actual => Err(Mismatch { claimed, actual, size: self.seen }),
            _ => Ok(Verified { digest: actual, size: self.seen, content }),
        }
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

    /// The same proof for something else that holds the very bytes that were verified.
    pub fn with_content<D>(self, content: D) -> Verified<D> {
        Verified { digest: self.digest, size: self.size, content }
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
            let cut = cut.index(bytes.len() + 1);
            let mut verifier = Verifier::of(Digest::of(&bytes));
            verifier.update(&bytes[..cut]);
            verifier.update(&bytes[cut..]);
            let verified = verifier.finish(()).unwrap();
            prop_assert_eq!((verified.digest(), verified.size()), (Digest::of(&bytes), bytes.len() as u64));
        }

        #[test]
        fn one_flipped_bit_is_a_mismatch(mut bytes in prop::collection::vec(any::<u8>(), 1..200), at: prop::sample::Index, bit in 0u8..8) {
            let claimed = Digest::of(&bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let mut verifier = Verifier::of(claimed);
            verifier.update(&bytes);
            let mismatch = verifier.finish(()).unwrap_err();
            prop_assert_eq!((mismatch.claimed, mismatch.actual), (claimed, Digest::of(&bytes)));
        }
    }
}
