//! Nix's base 32: the digits of a number, the last ones of which come first, in an alphabet without e, o, t and u.

use castier_blob::Digest;
use data_encoding::{BitOrder, Encoding, Specification};
use std::sync::LazyLock;

/// The alphabet.
pub(crate) const ALPHABET: &str = "0123456789abcdfghijklmnpqrsvwxyz";
/// The length of a SHA-256 in this encoding.
pub(crate) const LENGTH: usize = 52;

static ENCODING: LazyLock<Option<Encoding>> = LazyLock::new(|| {
    let mut specification = Specification::new();
    specification.symbols.push_str(ALPHABET);
    specification.bit_order = BitOrder::LeastSignificantFirst;
    specification.encoding().ok()
});

/// The SHA-256 that a text encodes; `None` if it does not encode one.
pub(crate) fn decode(text: &str) -> Option<Digest> {
    let reversed: Vec<u8> = text.bytes().rev().collect();
    let hash: [u8; 32] = ENCODING.as_ref()?.decode(&reversed).ok()?.try_into().ok()?;
    Some(Digest::from_bytes(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_as_nix_writes_them() {
        // What `nix-hash --to-base32 --type sha256` says to the hashes of the empty text and of "test".
        let empty = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
        assert_eq!((empty.len(), decode(empty)), (LENGTH, Some(Digest::EMPTY)));
        for wrong in ["", "0", &empty[1..], &empty.to_uppercase(), &empty.replace('m', "e"), &format!("z{}", &empty[1..])] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }
}
