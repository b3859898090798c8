//! The layout of a file of the disk tier. Pure: no I/O.
//!
//! ```text
//! the blob's bytes
//! CRC32C of every 64 KiB block of them (the last may be shorter)     u32 each, little-endian
//! the blob's size                                                    u64
//! the block length, 65536                                            u32
//! the version of this format: 1, or 2 if the blob is private         u32
//! "castier\n"                                                        8 bytes
//! CRC32C of the blob's digest and of everything above after the blob's bytes      u32
//! ```
//!
//! The last checksum covers the digest, so that a valid file under another blob's name is detected. The blob's size follows from the length
//! of the file alone, so that the scan does not open a million files.

use crate::resource::Visibility;
use castier_blob::Digest;
use crc_fast::CrcAlgorithm::Crc32Iscsi;

/// The bytes that share one checksum. The smallest read is one block; the checksums take 1/16384 of the blob's size.
pub(super) const BLOCK: u64 = 64 << 10;
/// The version of this format, which also says who may see the blob.
const fn version(visibility: Visibility) -> u32 {
    match visibility {
        Visibility::Public => 1,
        Visibility::Private => 2,
    }
}

const MAGIC: [u8; 8] = *b"castier\n";
const FOOTER: u64 = 8 + 4 + 4 + 8 + 4;

/// The length in bytes of the file of a blob of `size` bytes.
pub(super) const fn file_len(size: u64) -> u64 {
    size + 4 * size.div_ceil(BLOCK) + FOOTER
}

/// The size in bytes of the blob in a file of this length; `None` if no blob has a file of this length.
pub(super) fn blob_size(file_len: u64) -> Option<u64> {
    let body = file_len.checked_sub(FOOTER)?;
    let blocks = body.div_ceil(BLOCK + 4);
    let size = body.checked_sub(4 * blocks)?;
    (size.div_ceil(BLOCK) == blocks).then_some(size)
}

/// Why a trailer is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadTrailer {
    /// The file was not finished. A crash of the machine leaves such files.
    Unfinished,
    /// The file was finished, and has changed since.
    Damaged,
}

/// The checksums of a blob's blocks, and who may see it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    checksums: Box<[u32]>,
    visibility: Visibility,
}

impl Table {
    /// Parses a `trailer`: the bytes after the `size` bytes of the blob.
    pub(super) fn parse(digest: &Digest, size: u64, trailer: &[u8]) -> Result<Self, BadTrailer> {
        let (covered, checksum) = trailer.split_last_chunk::<4>().ok_or(BadTrailer::Unfinished)?;
        let table = covered.strip_suffix(&MAGIC).ok_or(BadTrailer::Unfinished)?;
        let blocks = usize::try_from(4 * size.div_ceil(BLOCK)).map_err(|_| BadTrailer::Unfinished)?;
        let (table, geometry) = table.split_at_checked(blocks).ok_or(BadTrailer::Unfinished)?;
        let visibility = [Visibility::Public, Visibility::Private].into_iter().find(|known| geometry == self::geometry(size, *known));
        let visibility = visibility.filter(|_| *checksum == seal(digest, covered)).ok_or(BadTrailer::Damaged)?;
        Ok(Self { checksums: table.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc)).collect(), visibility })
    }

    /// Whether `bytes` match their checksums. `bytes` are whole blocks from block number `first`; the blob's last block may be shorter.
    pub(super) fn matches(&self, first: u64, bytes: &[u8]) -> bool {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        bytes
            .chunks(BLOCK as usize)
            .enumerate()
            .all(|(i, block)| self.checksums.get(first.saturating_add(i)) == Some(&crc_fast::crc32_iscsi(block)))
    }

    /// Its size in memory, in bytes.
    pub(super) const fn bytes(&self) -> usize {
        4 * self.checksums.len()
    }

    /// Who may see the blob.
    pub(super) const fn visibility(&self) -> Visibility {
        self.visibility
    }
}

/// Computes the trailer of a blob from its bytes.
pub(super) struct Checksums {
    /// The checksums of the full blocks.
    full: Vec<u8>,
    /// The checksum of the bytes after them.
    open: crc_fast::Digest,
    seen: u64,
}

impl Checksums {
    pub(super) fn new() -> Self {
        Self { full: Vec::new(), open: crc_fast::Digest::new(Crc32Iscsi), seen: 0 }
    }

    /// Adds the next bytes.
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min((BLOCK - self.seen % BLOCK) as usize));
            self.open.update(now);
            self.seen += now.len() as u64;
            if self.seen.is_multiple_of(BLOCK) {
                self.close_block();
            }
            bytes = later;
        }
    }

    /// The number of bytes added.
    pub(super) const fn seen(&self) -> u64 {
        self.seen
    }

    /// The trailer of the blob with this digest.
    pub(super) fn trailer(mut self, digest: &Digest, visibility: Visibility) -> Vec<u8> {
        if !self.seen.is_multiple_of(BLOCK) {
            self.close_block();
        }
        let mut trailer = self.full;
        trailer.extend_from_slice(&geometry(self.seen, visibility));
        trailer.extend_from_slice(&MAGIC);
        let checksum = seal(digest, &trailer);
        trailer.extend_from_slice(&checksum);
        trailer
    }

    fn close_block(&mut self) {
        // `crc_fast` returns a u64; a CRC32C has 32 bits.
        self.full.extend_from_slice(&(self.open.finalize_reset() as u32).to_le_bytes());
    }
}

fn geometry(size: u64, visibility: Visibility) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&size.to_le_bytes());
    bytes[8..12].copy_from_slice(&(BLOCK as u32).to_le_bytes());
    bytes[12..].copy_from_slice(&version(visibility).to_le_bytes());
    bytes
}

fn seal(digest: &Digest, covered: &[u8]) -> [u8; 4] {
    let mut crc = crc_fast::Digest::new(Crc32Iscsi);
    crc.update(digest.as_bytes());
    crc.update(covered);
    (crc.finalize() as u32).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trailer(bytes: &[u8]) -> Vec<u8> {
        let mut checksums = Checksums::new();
        checksums.update(bytes);
        checksums.trailer(&Digest::of(bytes), Visibility::Public)
    }

    /// Reads a file as the tier does: by its length, its trailer, and then its blocks.
    fn read(digest: &Digest, file: &[u8]) -> Option<Vec<u8>> {
        let size = blob_size(file.len() as u64)?;
        let (bytes, trailer) = file.split_at(size as usize);
        let table = Table::parse(digest, size, trailer).ok()?;
        table.matches(0, bytes).then(|| bytes.to_vec())
    }

    fn file(bytes: &[u8]) -> Vec<u8> {
        [bytes, &trailer(bytes)].concat()
    }

    /// The check value of CRC-32C, whose polynomial RFC 3720 gives. Every implementation must be able to read these files.
    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(crc_fast::crc32_iscsi(b"123456789"), 0xE306_9283);
        assert_eq!(trailer(b"123456789")[..4], 0xE306_9283_u32.to_le_bytes());
    }

    #[test]
    fn lengths_go_both_ways() {
        for size in (0..200_000).chain((1 << 34) - 3..(1 << 34) + 3) {
            assert_eq!(blob_size(file_len(size)), Some(size));
        }
        // No other length is valid.
        let lengths: std::collections::HashSet<u64> = (0..400_000).map(file_len).collect();
        for len in 0..400_000 {
            assert_eq!(blob_size(len).is_some(), lengths.contains(&len), "{len}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_small_file_is_detected() {
        for bytes in [&b""[..], b"x", &[7; 100]] {
            let (digest, sound) = (Digest::of(bytes), file(bytes));
            assert_eq!(read(&digest, &sound).as_deref(), Some(bytes));
            for at in 0..sound.len() * 8 {
                let mut damaged = sound.clone();
                damaged[at / 8] ^= 1 << (at % 8);
                assert_eq!(read(&digest, &damaged), None, "bit {at} of {}", sound.len());
            }
            for len in 0..sound.len() {
                assert_eq!(read(&digest, &sound[..len]), None, "cut at {len}");
            }
            assert_eq!(read(&Digest::of(b"another name"), &sound), None);
        }
    }

    #[test]
    fn unfinished_differs_from_damaged() {
        let digest = Digest::of(b"x");
        let sound = trailer(b"x");
        assert_eq!(Table::parse(&digest, 1, &vec![0; sound.len()]), Err(BadTrailer::Unfinished));
        for at in 0..sound.len() {
            let mut changed = sound.clone();
            changed[at] ^= 0x80;
            let magic = sound.len() - 12..sound.len() - 4;
            let expected = if magic.contains(&at) { BadTrailer::Unfinished } else { BadTrailer::Damaged };
            assert_eq!(Table::parse(&digest, 1, &changed), Err(expected), "byte {at}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn written_bytes_read_back(
            bytes in (0usize..300_000, any::<u64>()).prop_map(|(len, seed)| noise(len, seed)),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut checksums = Checksums::new();
            cuts.windows(2).for_each(|pair| checksums.update(&bytes[pair[0]..pair[1]]));
            let digest = Digest::of(&bytes);
            let written = [&bytes[..], &checksums.trailer(&digest, Visibility::Public)].concat();
            prop_assert_eq!(&written, &file(&bytes));
            prop_assert_eq!(written.len() as u64, file_len(bytes.len() as u64));
            prop_assert_eq!(read(&digest, &written), Some(bytes));
        }

        #[test]
        fn the_trailer_says_who_may_see_the_blob(bytes in (0usize..200_000, any::<u64>()).prop_map(|(len, seed)| noise(len, seed)), is_private: bool) {
            let visibility = if is_private { Visibility::Private } else { Visibility::Public };
            let (digest, mut checksums) = (Digest::of(&bytes), Checksums::new());
            checksums.update(&bytes);
            let mut trailer = checksums.trailer(&digest, visibility);
            let parse = |trailer: &[u8]| Table::parse(&digest, bytes.len() as u64, trailer).map(|table| table.visibility());
            prop_assert_eq!(parse(&trailer), Ok(visibility));
            // Nobody makes a private blob public by one bit.
            let at = trailer.len() - 16;
            trailer[at] ^= 3;
            prop_assert_eq!(parse(&trailer), Err(BadTrailer::Damaged));
        }

        #[test]
        fn damage_is_detected_in_its_own_block(len in 1usize..300_000, seed: u64, at: prop::sample::Index, flip in 1u8..) {
            let bytes = noise(len, seed);
            let table = Table::parse(&Digest::of(&bytes), len as u64, &trailer(&bytes)).unwrap();
            let mut damaged = bytes.clone();
            let at = at.index(len);
            damaged[at] ^= flip;
            for (i, block) in damaged.chunks(BLOCK as usize).enumerate() {
                prop_assert_eq!(table.matches(i as u64, block), i != at / BLOCK as usize);
            }
            prop_assert!(!table.matches(bytes.len().div_ceil(BLOCK as usize) as u64, &bytes[..1]));
        }

        #[test]
        fn no_trailer_panics(size: u64, trailer: Vec<u8>) {
            prop_assert!(Table::parse(&Digest::of(b""), size.min(1 << 40), &trailer).is_err());
        }
    }

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect()
    }
}
