//! The growing buffer behind a flight. It is in memory while the blob may end up in the memory tier. Else it is a file without a name, with a window of
//! the newest bytes in memory. A reader costs an offset, never a copy of the blob.
//!
//! The file may lag behind: a byte stays in memory until [`Spool::wrote`] says that the file has it. So readers find every byte in one of the two.
//!
//! The bytes are unverified until the flight has verified them. Two budgets bound all spools together: `fill.memory` and `fill.spool`. A spool that
//! gets no memory goes to its file; a spool that gets no file space fails its flight.

mod file;
mod writer;

pub(crate) use file::SpoolFiles;
pub(crate) use writer::{Landed, SpoolWriter, UseTier};

use crate::{
    budget::{Budget, Lease},
    fault::{Fault, Limit},
    metrics::Metrics,
    pool::SharedFile,
    reader::PIECE,
};
use bytes::{Bytes, BytesMut};
use std::{collections::VecDeque, sync::Arc};

/// How many of the newest bytes of a spool with a file stay in memory, for readers that keep up with the source.
const WINDOW: u64 = 1 << 20;
/// How many bytes are written to a file at once. Enough to make the switch to another thread cheap. The window has space for a batch that is being
/// written, and for the next one.
pub(crate) const BATCH: u64 = WINDOW / 2;
/// Small segments are merged up to this length, so that a slow source does not cost one segment per byte.
const MERGE: usize = 64 << 10;

/// The parts that all spools share: two budgets, and a directory for files.
pub struct Spools {
    /// `fill.memory`.
    pub memory: Arc<Budget>,
    /// `fill.spool`.
    pub disk: Arc<Budget>,
    /// In `fill.spool_dir`.
    pub files: SpoolFiles,
    /// `memory.max_blob`. Larger blobs go to a file at once, since the memory tier does not keep them.
    pub max_in_memory: u64,
}

impl Spools {
    /// The spools' shared parts. `memory` is the budget `fill.memory`, which everything with unverified bytes shares.
    pub fn new(config: &castier_config::Castier, memory: Arc<Budget>, metrics: Arc<Metrics>) -> Self {
        Self {
            memory,
            disk: Budget::new(config.fill.spool.get()),
            files: SpoolFiles::new(&config.fill, metrics),
            max_in_memory: config.memory.max_blob.get(),
        }
    }
}

/// The bytes of one blob as they arrive. It has one writer, the fill, and any number of readers. The flight's lock guards it.
#[derive(Default)]
pub(crate) struct Spool {
    /// Bytes in order, ending at `len`. All bytes while there is no file, else the newest ones.
    segments: VecDeque<Bytes>,
    /// Offset of the first segment.
    start: u64,
    /// The number of bytes that have arrived.
    len: u64,
    /// Has the first `written` bytes. Exists if the blob is too large for memory.
    file: Option<Arc<SharedFile>>,
    written: u64,
    /// The memory of `segments`. `None` while there is a file: there is no window, because no memory was free for it.
    memory: Option<Lease>,
    /// The space of `file`.
    disk: Option<Lease>,
}

/// Bytes for a reader.
pub(crate) enum Piece {
    /// Bytes shared with the spool.
    Memory(Bytes),
    /// This many bytes of the file. The reader calls [`SpoolFiles::read`] without the lock.
    File(Arc<SharedFile>, usize),
}

/// Where the next bytes go.
pub(crate) enum Admit {
    /// Into memory.
    Memory,
    /// Into the file, behind a backlog of at most [`Spool::backlog`].
    File,
    /// The caller must first make a file, without the lock; see [`Spool::move_to_file`].
    NeedsFile,
}

impl Spool {
    /// A spool for a blob of `size` bytes (`None`: unknown). In memory if the memory tier may keep the blob. It leases memory only for bytes that have
    /// arrived: announced bytes may never arrive, and would take memory from others.
    pub(crate) fn new(spools: &Spools, size: Option<u64>) -> Self {
        let memory = (size.unwrap_or(0) <= spools.max_in_memory).then(|| spools.memory.empty());
        Self { memory, ..Self::default() }
    }

    /// Leases memory for a whole blob of `size` bytes, before a client is promised that the blob will be kept. Returns false if the spool has a file,
    /// or if `fill.memory` is used up.
    pub(crate) fn reserve(&mut self, size: u64) -> bool {
        self.file.is_none() && self.memory.as_mut().is_some_and(|lease| lease.cover(size))
    }

    /// The number of bytes that have arrived.
    pub(crate) const fn length(&self) -> u64 {
        self.len
    }

    /// Leases memory or file space for `more` bytes, and returns where they go.
    ///
    /// # Errors
    /// [`Fault::Busy`] if `fill.spool` is used up.
    pub(crate) fn admit(&mut self, spools: &Spools, more: u64) -> Result<Admit, Fault> {
        if self.file.is_some() {
            let Some(disk) = &mut self.disk else { return Err(Fault::Internal("spool file without a lease".into())) };
            return if disk.grow(more) { Ok(Admit::File) } else { Err(Fault::Busy(Limit::Spool)) };
        }
        let after = self.len + more;
        let covered = after <= spools.max_in_memory && self.memory.as_mut().is_some_and(|lease| lease.cover(after));
        Ok(if covered { Admit::Memory } else { Admit::NeedsFile })
    }

    /// How many bytes may be in memory and not yet in the file: a batch, or 0 without a window. `None` without a file.
    pub(crate) const fn backlog(&self) -> Option<u64> {
        match (&self.file, &self.memory) {
            (None, _) => None,
            (Some(_), Some(_)) => Some(BATCH),
            (Some(_), None) => Some(0),
        }
    }

    /// The segments. A new file must have them before [`Self::move_to_file`].
    pub(crate) fn in_memory(&self) -> Vec<Bytes> {
        self.segments.iter().cloned().collect()
    }

    /// Uses `file` from now on. It must have all bytes so far, or, if it replaces another file, the bytes of that one.
    pub(crate) fn move_to_file(&mut self, spools: &Spools, file: Arc<SharedFile>) -> Result<(), Fault> {
        if self.file.replace(file).is_some() {
            return Ok(());
        }
        let Some(disk) = spools.disk.lease(self.len) else { return Err(Fault::Busy(Limit::Spool)) };
        self.disk = Some(disk);
        self.written = self.len;
        self.memory = None;
        self.memory = spools.memory.lease(WINDOW);
        self.trim();
        Ok(())
    }

    /// The part of the first `to` bytes that the file does not have yet: the file, the offset, and the bytes. `None` if the file has them all, or if
    /// there is no file.
    pub(crate) fn unwritten(&self, to: u64) -> Option<(Arc<SharedFile>, u64, Vec<Bytes>)> {
        let file = self.file.as_ref().filter(|_| self.written < to)?;
        let mut start = self.start;
        let parts = self.segments.iter().map(|segment| {
            let within = |at: u64| at.saturating_sub(start).min(segment.len() as u64) as usize;
            let part = segment.slice(within(self.written)..within(to));
            start += segment.len() as u64;
            part
        });
        Some((file.clone(), self.written, parts.filter(|part| !part.is_empty()).collect()))
    }

    /// The file, if there is one.
    pub(crate) fn file(&self) -> Option<Arc<SharedFile>> {
        self.file.clone()
    }

    /// How many bytes the file has.
    pub(crate) const fn written(&self) -> u64 {
        self.written
    }

    /// Records that the file has the first `to` bytes.
    pub(crate) fn wrote(&mut self, to: u64) {
        self.written = to;
        self.trim();
    }

    /// Appends bytes, after [`Self::admit`] has leased for them.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        self.len += bytes.len() as u64;
        self.segments.push_back(bytes);
        // A segment is merged only into one that is at least as long. So each byte is copied O(log n) times.
        while let [.., a, b] = self.segments.make_contiguous() {
            if a.len() > b.len() || a.len() + b.len() > MERGE {
                break;
            }
            let mut merged = BytesMut::with_capacity(a.len() + b.len());
            merged.extend_from_slice(a);
            merged.extend_from_slice(b);
            self.segments.truncate(self.segments.len() - 2);
            self.segments.push_back(merged.freeze());
        }
        self.trim();
    }

    /// Drops segments before the window, if the file has them.
    fn trim(&mut self) {
        if self.file.is_none() {
            return;
        }
        let keep = if self.memory.is_some() { WINDOW } else { 0 };
        while let Some(oldest) = self.segments.front() {
            let after = self.start + oldest.len() as u64;
            if self.len - self.start <= keep || after > self.written {
                break;
            }
            self.segments.pop_front();
            self.start = after;
        }
    }

    /// Bytes from offset `at`, at least one and at most [`PIECE`] and `limit` of them. `at + limit` must not exceed the length.
    pub(crate) fn read(&self, at: u64, limit: u64) -> Piece {
        let want = usize::try_from(limit).unwrap_or(PIECE).min(PIECE);
        let mut end = self.len;
        // Search backwards: most readers are near the end.
        for segment in self.segments.iter().rev() {
            let start = end - segment.len() as u64;
            if at >= start {
                let skip = (at - start) as usize;
                return Piece::Memory(segment.slice(skip..segment.len().min(skip + want)));
            }
            end = start;
        }
        match &self.file {
            // Only up to `start`: the file may not have the bytes in memory yet.
            Some(file) => Piece::File(file.clone(), want.min(usize::try_from(self.start - at).unwrap_or(want))),
            None => Piece::Memory(Bytes::new()),
        }
    }

    /// All bytes, if they are in memory.
    pub(crate) fn parts(&self) -> Option<Vec<Bytes>> {
        self.file.is_none().then(|| self.in_memory())
    }

    /// Replaces the segments by the joined bytes, so that the blob is not in memory twice.
    pub(crate) fn replace_with(&mut self, whole: Bytes) {
        self.segments = VecDeque::from([whole]);
        self.start = 0;
    }

    /// Ends the lease of memory. From now on another owner accounts for the bytes.
    pub(crate) fn release(&mut self) {
        self.memory = None;
    }
}

/// Joins the parts. Copies only if there is more than one.
pub(crate) fn join(mut parts: Vec<Bytes>) -> Bytes {
    if parts.len() <= 1 {
        return parts.pop().unwrap_or_default();
    }
    let mut all = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    parts.iter().for_each(|part| all.extend_from_slice(part));
    all.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    fn spools(memory: u64, disk: u64, max_in_memory: u64) -> Spools {
        let files = SpoolFiles::new(&castier_config::Fill::default(), Arc::new(Metrics::new(&Default::default()).unwrap()));
        Spools { memory: Budget::new(memory), disk: Budget::new(disk), files, max_in_memory }
    }

    async fn append(spool: &mut Spool, spools: &Spools, bytes: Bytes) -> Result<(), Fault> {
        loop {
            match spool.admit(spools, bytes.len() as u64)? {
                Admit::Memory | Admit::File => break,
                Admit::NeedsFile => {
                    let file = spools.files.make(spool.in_memory()).await?;
                    spool.move_to_file(spools, file)?;
                }
            }
        }
        spool.push(bytes);
        Ok(())
    }

    /// Writes bytes to the file, except the last `lag` ones.
    async fn catch_up(spool: &mut Spool, spools: &Spools, lag: u64) {
        let to = spool.length() - lag;
        let Some((file, at, parts)) = spool.unwritten(to) else { return };
        assert_eq!(at + parts.iter().map(|part| part.len() as u64).sum::<u64>(), to);
        spools.files.write(&file, parts, at).await.unwrap();
        spool.wrote(to);
    }

    /// Works as if the page cache could not be queried: the file must have every byte that [`Piece::File`] names.
    async fn read_all(spool: &Spool, mut at: u64) -> Vec<u8> {
        let mut all = Vec::new();
        while at < spool.length() {
            let piece = match spool.read(at, spool.length() - at) {
                Piece::Memory(bytes) => bytes,
                Piece::File(file, len) => {
                    assert!(at + len as u64 <= spool.written(), "{len} bytes at {at} of {}", spool.written());
                    let mut piece = vec![0; len];
                    file.get().unwrap().read_exact_at(&mut piece, at).unwrap();
                    piece.into()
                }
            };
            assert!(!piece.is_empty() && piece.len() <= PIECE);
            at += piece.len() as u64;
            all.extend_from_slice(&piece);
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// For all arrivals and budgets, a read at any offset gives the bytes that were written.
        #[test]
        fn reads_what_was_written(parts in prop::collection::vec(1usize..90_000, 1..40), max in 0u64..600_000, memory in 0u64..3_000_000, lag in 0u64..700_000, known: bool, from: prop::sample::Index) {
            tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
                let total: usize = parts.iter().sum();
                let bytes: Vec<u8> = (0..total).map(|i| (i * 31 / 7) as u8).collect();
                let spools = spools(memory, 1 << 30, max);
                let mut spool = Spool::new(&spools, known.then_some(total as u64));
                let mut at = 0;
                for part in parts {
                    append(&mut spool, &spools, Bytes::copy_from_slice(&bytes[at..at + part])).await.unwrap();
                    at += part;
                    if spool.length() - spool.written() > 2 * lag {
                        catch_up(&mut spool, &spools, lag).await;
                    }
                }
                let from = from.index(total);
                prop_assert_eq!(&read_all(&spool, from as u64).await[..], &bytes[from..]);
                prop_assert!(spools.memory.used() <= memory);
                if let Some(whole) = spool.parts().map(join) {
                    prop_assert!(total as u64 <= max);
                    prop_assert_eq!(&whole[..], &bytes[..]);
                    spool.replace_with(whole);
                    prop_assert_eq!(&read_all(&spool, from as u64).await[..], &bytes[from..]);
                }
                drop(spool);
                prop_assert_eq!((spools.memory.used(), spools.disk.used()), (0, 0));
                Ok(())
            })?;
        }
    }

    #[tokio::test]
    async fn dribbled_bytes_make_few_segments() {
        let spools = spools(1 << 20, 0, 1 << 20);
        let mut spool = Spool::new(&spools, None);
        for i in 0..200_000u32 {
            append(&mut spool, &spools, Bytes::from(vec![i as u8])).await.unwrap();
        }
        assert!(spool.segments.len() < 30, "{}", spool.segments.len());
    }

    #[tokio::test]
    async fn a_full_spool_budget_is_a_limit_not_a_crash() {
        let spools = spools(0, 100, 1_000);
        let mut spool = Spool::new(&spools, None);
        append(&mut spool, &spools, Bytes::from(vec![1; 60])).await.unwrap();
        let fault = append(&mut spool, &spools, Bytes::from(vec![1; 60])).await.unwrap_err();
        assert!(matches!(fault, Fault::Busy(Limit::Spool)), "{fault}");
    }
}
