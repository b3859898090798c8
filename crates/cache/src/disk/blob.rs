//! A kept blob, open for reading.

use super::{
    format::{self, BLOCK, Table, Unsound},
    store::Store,
};
use crate::{
    buffer::Buffer,
    metrics::{DiskOp, Metrics},
    pool::{Pool, SharedFile},
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
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

/// How much of the file the kernel is told to fetch beyond a read that had to wait for the disk: what hides a seek.
const READ_AHEAD: u64 = 1 << 20;

/// A blob of the tier, open. Every block that is read is checked against its checksum. Stays readable while it is held, also if the
/// tier drops the blob meanwhile.
pub struct DiskBlob {
    /// Where to report damage. Weak, since the tier holds its open blobs.
    store: Weak<Store>,
    digest: Digest,
    file: SharedFile,
    size: u64,
    table: Table,
    /// Gets that found it since it was opened.
    hits: AtomicU32,
}

/// Why a blob could not be opened.
pub(super) enum Unopened {
    /// It is not there.
    Vanished,
    /// It was never finished.
    Unfinished,
    /// It is damaged; this is its file, if it could be opened at all.
    Damaged(File),
    /// What has its name is no file: a directory, a link, a pipe, a device.
    NoFile,
    /// Nothing is known of its state.
    Unknown(io::Error),
}

/// Opens a file to be read, if it is one. Waits for no other end of a pipe, follows no link.
fn open_file(path: &Path) -> Result<(File, u64), Unopened> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path).map_err(|error| {
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => Unopened::Vanished,
            // A link; a socket, or a device that is not there.
            Some(Errno::LOOP | Errno::NXIO | Errno::NODEV) => Unopened::NoFile,
            _ => Unopened::Unknown(error),
        }
    })?;
    let metadata = file.metadata().map_err(Unopened::Unknown)?;
    if metadata.is_file() { Ok((file, metadata.len())) } else { Err(Unopened::NoFile) }
}

impl DiskBlob {
    /// Opens the file of a blob and checks its trailer. Blocks.
    pub(super) fn open(store: Weak<Store>, pool: Pool, digest: Digest, path: &Path) -> Result<Self, Unopened> {
        let (file, len) = open_file(path)?;
        let Some(size) = format::blob_size(len) else { return Err(Unopened::Unfinished) };
        // The blob's size is known from the file's, so this is the length of a trailer, 4 bytes per block, and not the file's whim.
        let Ok(trailer_len) = usize::try_from(len - size) else { return Err(Unopened::Unfinished) };
        let mut trailer = vec![0; trailer_len];
        if file.read_exact_at(&mut trailer, size).is_err() {
            return Err(Unopened::Damaged(file));
        }
        match Table::parse(&digest, size, &trailer) {
            Ok(table) => Ok(Self { store, digest, file: SharedFile::new(file, pool), size, table, hits: AtomicU32::new(0) }),
            Err(Unsound::Unfinished) => Err(Unopened::Unfinished),
            Err(Unsound::Rotten) => Err(Unopened::Damaged(file)),
        }
    }

    /// Counts a get, and says how many there were since the file was opened.
    pub fn hit(&self) -> u32 {
        self.hits.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The blob's name.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// The blob's length in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Bytes from offset `at`: at most `max` and not beyond the block of 64 KiB that they are in, and at least one unless `at` is at the
    /// end. What the system holds in memory is read at once, in place; for the rest another thread waits, and has what follows
    /// fetched meanwhile.
    ///
    /// The bytes are lent: they hold on to memory that the next reads could use, more of it than their length where the blob is small.
    /// Send them and let them go; what is to stay must be copied.
    ///
    /// # Errors
    /// [`Damaged`]: the file has been set aside, or the disk does not answer. The bytes must come from elsewhere.
    pub async fn read(self: &Arc<Self>, at: u64, max: usize) -> Result<Bytes, Damaged> {
        let Some(part) = Part::of(at, max, self.size) else { return Ok(Bytes::new()) };
        if let Some(bytes) = self.read_cached(&part) {
            return Ok(bytes);
        }
        let blob = self.clone();
        // A block that was found bad above is read once more here, before it costs the file its place.
        self.file.pool().run(move || blob.read_waiting(&part)).await.map_err(|undone| {
            if let Some(store) = self.store.upgrade() {
                store.undone(DiskOp::Read, undone);
            }
            Damaged
        })?
    }

    /// The part, if the page cache has all of it and it is sound. Never waits for the disk.
    fn read_cached(&self, part: &Part) -> Option<Bytes> {
        let mut buffer = Buffer::new(part.len());
        if buffer.read_cached(self.file.get().ok()?, self.file.is_in_memory(), part.start) < buffer.len() {
            return None;
        }
        self.table.agrees(part.start / BLOCK, &buffer).then(|| buffer.share(part.wanted()))
    }

    /// The part, however long it takes.
    fn read_waiting(&self, part: &Part) -> Result<Bytes, Damaged> {
        let store = self.store.upgrade();
        let Ok(file) = self.file.get() else { return Err(Damaged) };
        let mut buffer = Buffer::new(part.len());
        let read = timed(store.as_ref().map(|store| &*store.metrics), || file.read_exact_at(&mut buffer, part.start));
        let why = match read {
            Ok(()) if self.table.agrees(part.start / BLOCK, &buffer) => {
                self.read_ahead(file, part.end);
                return Ok(buffer.share(part.wanted()));
            }
            Ok(()) => "a block does not match its checksum".to_owned(),
            Err(error) => {
                if let Some(store) = &store {
                    store.health.failed(DiskOp::Read, &store.path(&self.digest), &error);
                }
                error.to_string()
            }
        };
        if let Some(store) = store {
            store.quarantine(&self.digest, file, &why);
        }
        Err(Damaged)
    }

    /// Tells the kernel what comes next, so that the reads to come find it in memory. Only advice: nothing depends on it.
    fn read_ahead(&self, file: &File, from: u64) {
        if let Some(len) = NonZeroU64::new(self.size.saturating_sub(from).min(READ_AHEAD)) {
            rustix::fs::fadvise(file, from, Some(len), Advice::WillNeed).ok();
        }
    }

    /// Hands the whole blob to `take`, piece by piece, each checked; stops when `take` says so with `false`. Blocks.
    pub(super) fn read_through(&self, mut take: impl FnMut(&[u8]) -> bool) -> Result<bool, String> {
        let file = self.file.get().map_err(|error| error.to_string())?;
        // The pages that only this pass wants should not push out those that clients want.
        rustix::fs::fadvise(file, 0, None, Advice::NoReuse).ok();
        let mut buffer = vec![0; self.size.min(4 * BLOCK) as usize];
        let mut at = 0;
        while at < self.size {
            let piece = &mut buffer[..(self.size - at).min(4 * BLOCK) as usize];
            file.read_exact_at(piece, at).map_err(|error| error.to_string())?;
            if !self.table.agrees(at / BLOCK, piece) {
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

    /// What it costs to hold this open, in files: a large blob's checksums count as further ones, so that `disk.open_files` bounds
    /// memory too.
    pub(super) fn cost(&self) -> u32 {
        u32::try_from(1 + self.table.bytes() / (16 << 10)).unwrap_or(u32::MAX)
    }
}

/// Does work and takes its time.
fn timed<T>(metrics: Option<&Metrics>, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = work();
    if let Some(metrics) = metrics {
        metrics.disk_io(DiskOp::Read, started.elapsed());
    }
    done
}

/// Whether this is the file that `path` names now.
pub(super) fn stands_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: io::Result<std::fs::Metadata>| metadata.ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let ours = identity(file.metadata());
    ours.is_some() && ours == identity(std::fs::symlink_metadata(path))
}

/// A part of a block of a blob.
struct Part {
    /// Of the block.
    start: u64,
    end: u64,
    /// Of the wanted bytes.
    from: u64,
    to: u64,
}

impl Part {
    /// At most `max` bytes from `at`; none if that is nothing.
    fn of(at: u64, max: usize, size: u64) -> Option<Self> {
        let start = at / BLOCK * BLOCK;
        let end = start.saturating_add(BLOCK).min(size);
        let to = at.saturating_add(max as u64).min(end);
        (at < to).then_some(Self { start, end, from: at, to })
    }

    const fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// The wanted bytes within the block.
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
            let part = Part::of(at, max, size);
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
        assert!(Part::of(u64::MAX, usize::MAX, 10).is_none());
        assert!(Part::of(u64::MAX - 1, usize::MAX, u64::MAX).is_some());
    }
}
