//! Reads blobs of the tier, and checks every block.

use super::{
    format::{self, BLOCK, BadTrailer, Table},
    store::Store,
};
use crate::{
    buffer::Buffer,
    metrics::{DiskOp, Metrics},
    pool::{Pool, SharedFile},
    resource::Visibility,
    tier::Damaged,
};
use bytes::Bytes;
use castier_blob::Digest;
use rustix::{
    fs::{Advice, OFlags},
    io::Errno,
};
use std::{
    fs::File,
    io,
    num::NonZeroU64,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Instant,
};

/// How many bytes the kernel is asked to read ahead after a read that waited for the disk. It hides the time of a seek.
const READ_AHEAD: u64 = 1 << 20;

/// An open blob of the tier. Each read checks the checksum of its block. The blob stays readable while this value exists, even after the
/// tier has evicted it.
pub struct DiskBlob {
    /// Handles damage. Weak, since the store owns its open blobs.
    store: Weak<Store>,
    digest: Digest,
    file: SharedFile,
    size: u64,
    table: Table,
    /// Hits since it was opened.
    hits: AtomicU32,
    /// It was kept as private, and has become public since it was opened.
    is_published: AtomicBool,
}

/// Why a blob could not be opened.
pub(super) enum OpenError {
    /// There is no file of this name.
    Missing,
    /// The file has no valid trailer: its writer did not finish it.
    Unfinished,
    /// The file was finished, and has changed since.
    Damaged(File),
    /// The name leads to a directory, link, pipe or device.
    NotAFile,
    /// Another error, which says nothing about the content.
    Io(io::Error),
}

/// Opens a regular file for reading, and gets its length. Does not block on a pipe, and does not follow links.
fn open_file(path: &Path) -> Result<(File, u64), OpenError> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path).map_err(|error| {
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => OpenError::Missing,
            // A link; a socket; a device that does not exist.
            Some(Errno::LOOP | Errno::NXIO | Errno::NODEV) => OpenError::NotAFile,
            _ => OpenError::Io(error),
        }
    })?;
    let metadata = file.metadata().map_err(OpenError::Io)?;
    if metadata.is_file() { Ok((file, metadata.len())) } else { Err(OpenError::NotAFile) }
}

impl DiskBlob {
    /// Opens the file of a blob at `path` and checks its trailer. Blocks.
    pub(super) fn open(store: Weak<Store>, pool: Pool, digest: Digest, path: &Path) -> Result<Self, OpenError> {
        let (file, len) = open_file(path)?;
        let Some(size) = format::blob_size(len) else { return Err(OpenError::Unfinished) };
        // At most some bytes per block, since `blob_size` computed the size from the length: no huge allocation.
        let Ok(trailer_len) = usize::try_from(len - size) else { return Err(OpenError::Unfinished) };
        let mut trailer = vec![0; trailer_len];
        if file.read_exact_at(&mut trailer, size).is_err() {
            return Err(OpenError::Damaged(file));
        }
        match Table::parse(&digest, size, &trailer) {
            Ok(table) => Ok(Self {
                store,
                digest,
                file: SharedFile::new(file, pool),
                size,
                table,
                hits: AtomicU32::new(0),
                is_published: AtomicBool::new(false),
            }),
            Err(BadTrailer::Unfinished) => Err(OpenError::Unfinished),
            Err(BadTrailer::Damaged) => Err(OpenError::Damaged(file)),
        }
    }

    /// Counts a hit. Returns the number of hits since the file was opened.
    pub fn hit(&self) -> u32 {
        self.hits.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Who may see the blob.
    pub fn visibility(&self) -> Visibility {
        if self.is_published.load(Ordering::Acquire) { Visibility::Public } else { self.table.visibility() }
    }

    /// Everybody may see the blob, for as long as its file stays open. After that the question is asked again.
    pub fn publish(&self) {
        self.is_published.store(true, Ordering::Release);
    }

    /// The blob's name.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// The blob's length in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Reads from offset `at`: at most `max` bytes, not beyond the end of their 64 KiB block, and at least one byte unless `at` is at the
    /// blob's end. If the page cache has the block, it is read on the calling thread. If not, a thread of the pool reads it, and asks the
    /// kernel to read ahead.
    ///
    /// The result holds a [`Buffer`] that other reads could reuse, of up to 64 KiB. Send it and drop it; copy bytes that must stay.
    ///
    /// # Errors
    /// [`Damaged`]: the block is wrong and the file is now in the quarantine, or the disk does not answer. Get the bytes from elsewhere.
    pub async fn read(self: &Arc<Self>, at: u64, max: usize) -> Result<Bytes, Damaged> {
        let Some(part) = BlockPart::of(at, max, self.size) else { return Ok(Bytes::new()) };
        if let Some(bytes) = self.read_cached(&part) {
            return Ok(bytes);
        }
        let blob = self.clone();
        // A block with a wrong checksum in the page cache is read once more here, before the file is moved to the quarantine.
        self.file.pool().run(move || blob.read_blocking(&part)).await.map_err(|error| {
            if let Some(store) = self.store.upgrade() {
                store.pool_failed(DiskOp::Read, error);
            }
            Damaged
        })?
    }

    /// The part, if the page cache has all of it and its checksum is right. Does not wait for the disk.
    fn read_cached(&self, part: &BlockPart) -> Option<Bytes> {
        let mut buffer = Buffer::new(part.len());
        if buffer.read_cached(self.file.get().ok()?, self.file.is_in_memory(), part.start) < buffer.len() {
            return None;
        }
        self.table.matches(part.start / BLOCK, &buffer).then(|| buffer.share(part.wanted()))
    }

    /// The part, read from the disk if necessary. Blocks.
    fn read_blocking(&self, part: &BlockPart) -> Result<Bytes, Damaged> {
        let store = self.store.upgrade();
        let Ok(file) = self.file.get() else { return Err(Damaged) };
        let mut buffer = Buffer::new(part.len());
        let read = timed(store.as_ref().map(|store| &*store.metrics), || file.read_exact_at(&mut buffer, part.start));
        let why = match read {
            Ok(()) if self.table.matches(part.start / BLOCK, &buffer) => {
                self.read_ahead(file, part.end);
                return Ok(buffer.share(part.wanted()));
            }
            Ok(()) => "a block does not match its checksum".to_owned(),
            Err(error) => {
                if let Some(store) = &store {
                    store.errors.record(DiskOp::Read, &store.path(&self.digest), &error);
                }
                error.to_string()
            }
        };
        if let Some(store) = store {
            store.quarantine(&self.digest, file, &why);
        }
        Err(Damaged)
    }

    /// Asks the kernel to read the next bytes into the page cache.
    fn read_ahead(&self, file: &File, from: u64) {
        if let Some(len) = NonZeroU64::new(self.size.saturating_sub(from).min(READ_AHEAD)) {
            rustix::fs::fadvise(file, from, Some(len), Advice::WillNeed).ok();
        }
    }

    /// Reads the whole blob and hands it to `take` in checked pieces. Stops and returns `Ok(false)` when `take` returns false. Blocks.
    ///
    /// # Errors
    /// A text that says why the file is damaged or cannot be read.
    pub(super) fn read_through(&self, mut take: impl FnMut(&[u8]) -> bool) -> Result<bool, String> {
        let file = self.file.get().map_err(|error| error.to_string())?;
        // Asks the kernel not to keep these pages: the pages that clients read should stay.
        rustix::fs::fadvise(file, 0, None, Advice::NoReuse).ok();
        let mut buffer = vec![0; self.size.min(4 * BLOCK) as usize];
        let mut at = 0;
        while at < self.size {
            let piece = &mut buffer[..(self.size - at).min(4 * BLOCK) as usize];
            file.read_exact_at(piece, at).map_err(|error| error.to_string())?;
            if !self.table.matches(at / BLOCK, piece) {
                return Err("a block does not match its checksum".into());
            }
            if !take(piece) {
                return Ok(false);
            }
            at += piece.len() as u64;
        }
        Ok(true)
    }

    pub(super) const fn file(&self) -> &SharedFile {
        &self.file
    }

    /// The weight of this open blob against `disk.open_files`: 1, and 1 more for each 16 KiB of checksums, so that the key also bounds
    /// memory.
    pub(super) fn cost(&self) -> u32 {
        u32::try_from(1 + self.table.bytes() / (16 << 10)).unwrap_or(u32::MAX)
    }
}

/// Does the read `work` and records how long it took.
fn timed<T>(metrics: Option<&Metrics>, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = work();
    if let Some(metrics) = metrics {
        metrics.disk_io(DiskOp::Read, started.elapsed());
    }
    done
}

/// Whether `path` names this open file now.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: io::Result<std::fs::Metadata>| metadata.ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let ours = identity(file.metadata());
    ours.is_some() && ours == identity(std::fs::symlink_metadata(path))
}

/// The wanted bytes and the block that they are in, as offsets in the blob.
struct BlockPart {
    /// The block.
    start: u64,
    end: u64,
    /// The wanted bytes.
    from: u64,
    to: u64,
}

impl BlockPart {
    /// At most `max` bytes from `at`; `None` if there are none.
    fn of(at: u64, max: usize, size: u64) -> Option<Self> {
        let start = at / BLOCK * BLOCK;
        let end = start.saturating_add(BLOCK).min(size);
        let to = at.saturating_add(max as u64).min(end);
        (at < to).then_some(Self { start, end, from: at, to })
    }

    const fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// The wanted bytes, as offsets in the block.
    const fn wanted(&self) -> Range<usize> {
        (self.from - self.start) as usize..(self.to - self.start) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_are_what_was_asked_for_within_one_block(at in 0u64..1_000_000, max in 0usize..200_000, size in 0u64..1_000_000) {
            let wanted: Vec<u64> = (at..size.min(at + max as u64)).take_while(|byte| byte / BLOCK == at / BLOCK).collect();
            let part = BlockPart::of(at, max, size);
            prop_assert_eq!(part.is_none(), wanted.is_empty());
            if let Some(part) = part {
                prop_assert_eq!((part.from, part.to), (wanted[0], wanted[wanted.len() - 1] + 1));
                prop_assert!(part.start.is_multiple_of(BLOCK) && part.end == size.min(part.start + BLOCK));
                prop_assert!(part.wanted().end <= part.len() && part.wanted().len() == wanted.len());
            }
        }
    }

    #[test]
    fn no_offset_overflows() {
        assert!(BlockPart::of(u64::MAX, usize::MAX, 10).is_none());
        assert!(BlockPart::of(u64::MAX - 1, usize::MAX, u64::MAX).is_some());
    }
}
