//! The name of a blob.

use data_encoding::{BASE64, Encoding, HEXLOWER};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// The SHA-256 of a blob's bytes: 64 lowercase hexadecimal characters in text, 32 bytes in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// The text is not 64 lowercase hexadecimal characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a digest is the SHA-256 of the blob as 64 lowercase hexadecimal characters")]
pub struct MalformedDigest;

impl Digest {
    /// The number of characters of a digest as text.
    pub const TEXT_LEN: usize = 64;

    /// The digest of the empty blob. The empty blob always exists, even if nobody has stored it.
    pub const EMPTY: Self = Self([
        0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b,
        0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
    ]);

    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Parses the text form. Refuses upper case, so that each blob has one name and one cache entry.
    ///
    /// # Errors
    /// [`MalformedDigest`] if the text is not 64 lowercase hexadecimal characters.
    pub fn parse(text: &[u8]) -> Result<Self, MalformedDigest> {
        let mut hash = [0; 32];
        // `decode_mut` panics if the output has the wrong length, so check the input's length first.
        match HEXLOWER.decode_len(text.len()) {
            Ok(32) if HEXLOWER.decode_mut(text, &mut hash).is_ok() => Ok(Self(hash)),
            _ => Err(MalformedDigest),
        }
    }

    /// The digest of these 32 bytes: the reverse of [`Self::as_bytes`].
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for the hash ring and for keys.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The value of `Repr-Digest` (RFC 9530).
    pub fn repr_digest(&self) -> String {
        self.framed("sha-256=:", &BASE64, ":")
    }

    /// The value of `ETag`. The digest names the content, so it is a strong validator.
    pub fn etag(&self) -> String {
        self.framed("\"", &HEXLOWER, "\"")
    }

    /// The digest in this encoding, between two texts. Without the formatter: each hit writes two of these.
    fn framed(&self, before: &str, encoding: &Encoding, after: &str) -> String {
        let mut text = String::with_capacity(before.len() + encoding.encode_len(self.0.len()) + after.len());
        text.push_str(before);
        encoding.encode_append(&self.0, &mut text);
        text.push_str(after);
        text
    }
}

impl FromStr for Digest {
    type Err = MalformedDigest;
    fn from_str(text: &str) -> Result<Self, MalformedDigest> {
        Self::parse(text.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; Self::TEXT_LEN];
        HEXLOWER.encode_mut(&self.0, &mut text);
        f.pad(str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The oracle: a direct implementation of the contract.
    fn naive(text: &[u8]) -> Option<[u8; 32]> {
        if text.len() != 64 || !text.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let nibble = |c: u8| if c.is_ascii_digit() { c - b'0' } else { c - b'a' + 10 };
        Some(std::array::from_fn(|i| nibble(text[2 * i]) << 4 | nibble(text[2 * i + 1])))
    }

    #[test]
    fn empty_blob_has_its_well_known_name() {
        let digest = Digest::of(b"");
        assert_eq!(digest, Digest::EMPTY);
        assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.repr_digest(), "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:");
    }

    proptest! {
        #[test]
        fn text_round_trips(hash: [u8; 32]) {
            let digest = Digest(hash);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
            prop_assert_eq!(digest.to_string().len(), Digest::TEXT_LEN);
        }

        #[test]
        fn parsing_agrees_with_the_oracle(text in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..70),
            "[0-9a-f]{64}".prop_map(String::into_bytes),
            "[0-9a-fA-FgG]{64}".prop_map(String::into_bytes),
            "[0-9a-f]{60,68}".prop_map(String::into_bytes),
        ]) {
            prop_assert_eq!(Digest::parse(&text).ok().map(|d| d.0), naive(&text));
        }
    }
}
