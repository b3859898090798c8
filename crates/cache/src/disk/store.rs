//! The files of the tier and the index over them.
//!
//! Invariants:
//! - A blob's file is created, deleted and opened only under the lock of its subdirectory, together with its index entry. This prevents a
//!   race: (1) the index evicts a blob; (2) the blob is kept again, in a new file of the same name; (3) the janitor deletes the file of
//!   the evicted blob. Under the lock the janitor sees the new index entry, and does not delete.
//! - `ab/` has only finished files. Files that are being written are in `tmp/`.
//! - Only threads that may block take a subdirectory's lock or touch a file: those of the pools `reads` and `writes`, and the tier's own.
//!   A hanging file system may block all of them, with the locks that they hold. Every caller that waits for them has a deadline.

use super::{
    blob::{DiskBlob, OpenError, is_at},
    dir_lock::{self, DirLock},
    errors::{self, ErrorTracker},
    file::DiskFile,
    format, free_space,
    state::{Degraded, DiskState, StateTracker},
};
use crate::{
    eviction::{Index, Shape},
    metrics::{DiskError, DiskOp, Metrics, Skip},
    pool::{Pool, PoolError, PoolEvent},
    resource::Visibility,
    tier::TierStats,
    via::Tier,
};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use castier_config as config;
use crossbeam_channel::Receiver;
use moka::{policy::EvictionPolicy, sync::Cache};
use parking_lot::{Mutex, MutexGuard};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The allocation unit of file systems, in bytes. The index weighs blobs in this unit, so that 32 bits suffice for 16 TiB.
const DISK_BLOCK: u64 = 4096;
/// The admission window is the capacity divided by this; see [`crate::eviction`].
const WINDOW_PART: u64 = 16;
/// The least and the most memory for the access counts, in bytes. Between them it is 1 byte for each [`DISK_BLOCK`] of the capacity.
const COUNTS: (u64, u64) = (64 << 10, 16 << 20);

/// What the tier's handle and its threads share.
pub(super) struct Store {
    root: PathBuf,
    /// `disk.capacity`, or what the file system has if that is less.
    capacity: u64,
    /// `disk.quarantine`.
    quarantine_capacity: u64,
    /// Every blob that the tier has.
    index: Index<IndexEntry>,
    /// Blobs that were read lately, with their files open.
    open: Cache<Digest, Arc<DiskBlob>>,
    /// Indexed by the first byte of the digest.
    subdirs: [Subdir; 256],
    /// Evicted blobs whose files are still to be deleted.
    pub(super) evicted: Receiver<Digest>,
    evictions: Arc<AtomicU64>,
    state: Arc<StateTracker>,
    /// The scan is running: files may exist that are not in the index.
    scanning: AtomicBool,
    pub(super) errors: ErrorTracker,
    pub(super) metrics: Arc<Metrics>,
    /// Opens and reads files.
    pub(super) reads: Pool,
    /// Writes, renames and deletes files. Apart from `reads`, since a file system can block writes and still read, for example during a
    /// snapshot.
    pub(super) writes: Pool,
    /// Excludes other processes. Dropped last, since the other fields may still write.
    lock: DirLock,
}

#[derive(Clone, Copy)]
struct IndexEntry {
    size: u64,
    /// The time of the file's last write, in seconds since 1970. From the file system, so that it survives a restart.
    since: u32,
}

impl IndexEntry {
    fn at(size: u64, since: SystemTime) -> Self {
        let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { size, since: u32::try_from(since.as_secs()).unwrap_or(u32::MAX) }
    }

    fn now(size: u64) -> Self {
        Self::at(size, SystemTime::now())
    }

    fn age(self) -> Duration {
        Duration::from_secs(u64::from(Self::now(0).since.saturating_sub(self.since)))
    }
}

/// One of the 256 directories `00/` to `ff/`.
#[derive(Default)]
struct Subdir {
    files: Mutex<()>,
    /// How many times a blob of this subdirectory was forgotten.
    forgets: AtomicU64,
}

/// Prevents that a blob is kept after it was forgotten:
/// 1. the tier decides to keep a blob, and takes the subdirectory's epoch;
/// 2. a purge forgets the blob, which changes the epoch;
/// 3. the blob's file is complete; since the epoch differs, the file is deleted and not renamed into the tier.
///
/// A purge of another blob of the same subdirectory prevents it too. That costs one cache entry.
#[derive(Clone, Copy)]
pub(super) struct ForgetEpoch(u64);

/// The result of scanning one file.
pub(super) enum Scanned {
    /// The file is a blob, and is in the index now.
    Blob,
    /// The file was not finished, and was deleted.
    Unfinished,
    /// The file is not the tier's, or does not exist any more.
    Foreign,
}

impl Store {
    /// Locks and prepares the directory. Adds to `progress` with each step that the file system completes. Blocks.
    ///
    /// # Errors
    /// The directory cannot be used, or another process uses it.
    pub(super) fn new(config: &config::Disk, metrics: Arc<Metrics>, progress: &AtomicU64) -> io::Result<Self> {
        let root = config.path.clone();
        let lock = DirLock::take(&root)?;
        make_ready(&root, progress)?;
        let capacity = capacity(&root, config.capacity.get());
        let (evict, evicted) = crossbeam_channel::unbounded();
        let evictions = Arc::new(AtomicU64::new(0));
        let (counter, age_metrics) = (evictions.clone(), metrics.clone());
        let blocks = capacity / DISK_BLOCK;
        let shape = Shape { capacity: blocks, window: blocks / WINDOW_PART, counts: blocks.clamp(COUNTS.0, COUNTS.1), unit: DISK_BLOCK };
        // The listener runs on any thread that touches the index, so it must not touch files. The janitor deletes them.
        let index = Index::new(
            config.policy,
            shape,
            |entry: &IndexEntry| disk_blocks(entry.size),
            move |digest, entry, evicted| {
                if evicted {
                    age_metrics.evicted(Tier::Disk, entry.age());
                    counter.fetch_add(1, Ordering::Relaxed);
                    evict.send(*digest).ok();
                }
            },
        );
        let open = Cache::builder()
            .max_capacity(config.open_files)
            .weigher(|_, blob: &Arc<DiskBlob>| blob.cost())
            .eviction_policy(EvictionPolicy::lru())
            .build();
        let state = Arc::new(StateTracker::default());
        let pool = |name: &'static str, operation: &'static str, cause: Degraded, max_threads: usize| {
            let (root, state) = (root.clone(), state.clone());
            let (timeout, cooldown) = (config.timeout.get(), config.cooldown.get());
            let log = move |event| match event {
                PoolEvent::Hangs => tracing::warn!(
                    path = %root.display(), ?timeout, ?cooldown,
                    "the disk tier's file system does not answer; for disk.cooldown no {operation} are tried, and clients get their blobs from \
                     elsewhere. Look at the kernel's log and at the device or server that it is mounted from"
                ),
                PoolEvent::Recovered => tracing::info!(path = %root.display(), "the disk tier's file system answers again"),
            };
            Pool::new(name, max_threads, timeout, cooldown, move |event| {
                state.set(cause, event == PoolEvent::Hangs);
                log(event);
            })
        };
        let threads = config.threads;
        Ok(Self {
            reads: pool("disk-read", "reads", Degraded::ReadsHang, threads),
            writes: pool("disk-file", "writes", Degraded::WritesHang, threads.div_ceil(4)),
            capacity,
            quarantine_capacity: config.quarantine.get(),
            index,
            open,
            subdirs: std::array::from_fn(|_| Subdir::default()),
            evicted,
            evictions,
            scanning: AtomicBool::new(true),
            errors: ErrorTracker::new(root.clone(), config.cooldown.get(), state.clone(), metrics.clone()),
            state,
            metrics,
            lock,
            root,
        })
    }

    /// The blob's size in bytes, from the index. Counts as a use for LRU.
    pub(super) fn size_of(&self, digest: &Digest) -> Option<u64> {
        self.index.get(digest).map(|entry| entry.size)
    }

    /// See [`super::Disk::state`].
    pub(super) fn state(&self) -> (DiskState, Option<SystemTime>) {
        // `DirLock` does not report this to the tracker.
        if self.lock.is_lost() {
            self.state.set(Degraded::DirectoryLost, true);
        }
        self.state.state()
    }

    /// See [`super::Disk::count`].
    pub(super) fn count(&self, digest: &Digest) {
        self.index.count(digest);
    }

    /// The blob, if it is open already.
    pub(super) fn opened(&self, digest: &Digest) -> Option<Arc<DiskBlob>> {
        self.open.get(digest)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Counts work that a pool refused or did not finish.
    pub(super) fn pool_failed(&self, op: DiskOp, error: PoolError) {
        self.metrics.disk_error(
            op,
            match error {
                PoolError::Busy => DiskError::Busy,
                PoolError::TimedOut => DiskError::Timeout,
                PoolError::Panicked => DiskError::Other,
            },
        );
    }

    /// Whether files may be read now.
    pub(super) fn may_read(&self) -> bool {
        self.reads.is_usable() && !self.lock.is_lost()
    }

    pub(super) fn is_scanning(&self) -> bool {
        self.scanning.load(Ordering::Acquire)
    }

    /// The scan is complete.
    pub(super) fn scanned(&self) {
        self.index.settle();
        self.sweep();
        self.scanning.store(false, Ordering::Release);
    }

    /// Opens the blob. Deletes an unfinished file, and moves a damaged one to the quarantine. Blocks.
    pub(super) fn open(self: &Arc<Self>, digest: &Digest) -> Option<Arc<DiskBlob>> {
        let subdir = self.lock(digest);
        if let Some(blob) = self.open.get(digest) {
            return Some(blob);
        }
        let path = self.path(digest);
        match DiskBlob::open(Arc::downgrade(self), self.reads.clone(), *digest, &path) {
            Ok(blob) => {
                if !self.index.has(digest) {
                    if !self.is_scanning() {
                        // Evicted: the janitor is about to delete the file.
                        return None;
                    }
                    self.index.insert(*digest, IndexEntry::now(blob.size()));
                }
                let blob = Arc::new(blob);
                self.open.insert(*digest, blob.clone());
                return Some(blob);
            }
            Err(OpenError::Missing) => {
                self.index.remove(digest);
            }
            Err(OpenError::Unfinished) => {
                self.index.remove(digest);
                self.remove_unfinished(&path);
            }
            Err(OpenError::Damaged(file)) => {
                drop(subdir);
                self.quarantine(digest, &file, "the trailer cannot be read or does not match its checksum");
            }
            Err(OpenError::NotAFile) => {
                // `make_way` moves it aside when the blob is kept again.
                self.index.remove(digest);
                self.errors.record(DiskOp::Open, &path, &rustix::io::Errno::NXIO.into());
            }
            Err(OpenError::Io(error)) => {
                // With too many open files, the error says nothing about this file. Any other error does: drop the entry, so that the
                // blob is fetched and kept again.
                if errors::kind(&error) != DiskError::Files {
                    self.index.remove(digest);
                }
                self.errors.record(DiskOp::Open, &path, &error);
            }
        }
        None
    }

    /// Creates an empty file in `tmp/`. Blocks.
    pub(super) fn temp(self: &Arc<Self>) -> io::Result<DiskFile> {
        // `tempfile` would hide the error number, which `ErrorTracker` needs.
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
        let make = || tempfile::Builder::new().prefix("").make_in(self.root.join(TMP), open);
        let made = make().or_else(|error| match error.kind() {
            // Another program has deleted the directories of the running tier.
            io::ErrorKind::NotFound => self.recreate_directories().and_then(|()| make()),
            _ => Err(error),
        });
        let failed = |error: &io::Error| self.errors.record(DiskOp::Write, &self.root.join(TMP), error);
        let (file, path) = made.inspect_err(failed)?.into_parts();
        Ok(DiskFile::new(self.clone(), file, path))
    }

    /// The epoch to pass to [`Self::keep`] or [`Self::commit`]. Take it at the moment of the decision to keep the blob.
    pub(super) fn epoch(&self, digest: &Digest) -> ForgetEpoch {
        ForgetEpoch(self.subdir(digest).forgets.load(Ordering::Acquire))
    }

    /// Writes a blob that is in memory, and keeps it. Blocks.
    pub(super) fn keep(self: &Arc<Self>, blob: &Verified<Bytes>, visibility: Visibility, epoch: ForgetEpoch) {
        if self.has(&blob.digest()) || !self.admits(&blob.digest(), blob.size()) {
            return;
        }
        let written = self.temp().and_then(|mut file| file.append(blob.content()).map(|()| file));
        match written {
            Ok(file) => self.commit(&blob.digest(), visibility, file, epoch),
            Err(_) => self.metrics.disk_skipped(Skip::Failed),
        }
    }

    /// Writes the trailer of a complete file, and renames the file into the tier. Blocks.
    pub(super) fn commit(&self, digest: &Digest, visibility: Visibility, file: DiskFile, epoch: ForgetEpoch) {
        let size = file.size();
        if self.has(digest) || !self.admits(digest, size) {
            return;
        }
        if !self.lock.still_held() {
            return self.metrics.disk_skipped(Skip::Failed);
        }
        let subdir = self.lock(digest);
        if self.epoch(digest).0 != epoch.0 {
            return self.metrics.disk_skipped(Skip::Purged);
        }
        let path = self.path(digest);
        if file.commit(digest, visibility, &path, |error| self.make_way(&path, error)).is_err() {
            return self.metrics.disk_skipped(Skip::Failed);
        }
        self.open.invalidate(digest);
        self.index.insert(*digest, IndexEntry::now(size));
        drop(subdir);
        self.errors.write_succeeded();
        free_space::update(&self.root, &self.metrics);
        self.index.settle();
        self.sweep();
    }

    /// After a rename to `path` failed with `error`: removes the obstacle. Returns whether the rename should be tried again.
    fn make_way(&self, path: &Path, error: &io::Error) -> bool {
        match errors::kind(error) {
            // A rename cannot replace a directory. It may have other data, so it is moved and not deleted.
            DiskError::Path if fs::symlink_metadata(path).is_ok_and(|there| there.is_dir()) => {
                let aside = (0..100).map(|n| self.root.join(QUARANTINE).join(format!("{}.directory-{n}", file_name(path))));
                let moved = aside.filter(|aside| fs::symlink_metadata(aside).is_err()).find(|aside| fs::rename(path, aside).is_ok());
                if let Some(moved) = &moved {
                    tracing::warn!(
                        path = %path.display(), moved = %moved.display(),
                        "a directory had the name of a blob in the disk tier, and was moved to quarantine/; delete it if nobody needs it"
                    );
                }
                moved.is_some()
            }
            _ => error.kind() == io::ErrorKind::NotFound && self.recreate_directories().is_ok(),
        }
    }

    /// Creates the tier's directories again after another program has deleted them.
    fn recreate_directories(&self) -> io::Result<()> {
        if !self.lock.may_recreate() {
            return Err(io::ErrorKind::NotFound.into());
        }
        make_directories(&self.root)
    }

    /// The part of [`Self::forget`] that touches no file, so that it works while the file system hangs.
    pub(super) fn forget_in_memory(&self, digest: &Digest) {
        self.subdir(digest).forgets.fetch_add(1, Ordering::AcqRel);
        self.index.remove(digest);
        self.open.invalidate(digest);
    }

    /// Removes a blob, and prevents that a copy that is being written is kept. Blocks.
    pub(super) fn forget(&self, digest: &Digest) {
        let _subdir = self.lock(digest);
        self.subdir(digest).forgets.fetch_add(1, Ordering::AcqRel);
        self.index.remove(digest);
        self.remove(digest);
    }

    /// Moves a damaged file to the quarantine, and counts and logs it. Returns false and does nothing if the name leads to another file
    /// by now: then another thread has done it before. Blocks.
    pub(super) fn quarantine(&self, digest: &Digest, file: &File, why: &str) -> bool {
        let path = self.path(digest);
        {
            let _subdir = self.lock(digest);
            if !is_at(file, &path) {
                // `open` may still hold the damaged file.
                self.open.invalidate(digest);
                return false;
            }
            self.index.remove(digest);
            self.open.invalidate(digest);
            if !self.lock.still_held() {
                return false;
            }
            if fs::rename(&path, self.root.join(QUARANTINE).join(digest.to_string())).is_err() {
                fs::remove_file(&path).ok();
            }
        }
        self.metrics.corrupt("disk", Some(digest));
        tracing::warn!(%digest, why, path = %self.root.display(), "a blob in the disk tier is damaged; its file was moved to quarantine/, and clients get the blob from elsewhere");
        self.trim_quarantine();
        true
    }

    /// Puts an existing file into the index. Deletes it if its length shows that it is not finished. Blocks.
    pub(super) fn scan(&self, digest: &Digest, entry: &fs::DirEntry) -> io::Result<Scanned> {
        let _subdir = self.lock(digest);
        if self.has(digest) {
            return Ok(Scanned::Blob);
        }
        // Read under the lock: the blob may have been evicted after the directory was listed.
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Scanned::Foreign),
            metadata => metadata?,
        };
        // `DirEntry::metadata` does not follow links.
        if !metadata.is_file() {
            return Ok(Scanned::Foreign);
        }
        let Some(size) = format::blob_size(metadata.len()) else {
            self.remove_unfinished(&entry.path());
            return Ok(Scanned::Unfinished);
        };
        self.index.insert(*digest, IndexEntry::at(size, metadata.modified()?));
        Ok(Scanned::Blob)
    }

    /// Deletes the files of all evicted blobs. Threads that keep blobs call this too, so that the files do not outgrow the capacity while
    /// the janitor is busy. Blocks.
    pub(super) fn sweep(&self) {
        while let Ok(digest) = self.evicted.try_recv() {
            self.remove_evicted(&digest);
        }
    }

    /// Deletes the file of an evicted blob, unless the blob has been kept again since. Blocks.
    pub(super) fn remove_evicted(&self, digest: &Digest) {
        let _subdir = self.lock(digest);
        if !self.has(digest) {
            self.remove(digest);
        }
    }

    /// See [`super::Disk::takes`].
    pub(super) fn takes(&self, size: u64) -> bool {
        disk_blocks(size) <= self.index.largest() && self.why_not_write().is_none()
    }

    /// See [`super::Disk::keeps`].
    pub(super) fn keeps(&self, digest: &Digest, size: u64) -> bool {
        self.fits(digest, size) && self.why_not_write().is_none()
    }

    /// Why the tier cannot write now; `None` if it can.
    fn why_not_write(&self) -> Option<Skip> {
        if !self.errors.may_write() || self.lock.is_lost() {
            return Some(Skip::ReadOnly);
        }
        (!self.writes.is_usable() || !self.reads.is_usable()).then_some(Skip::Timeout)
    }

    pub(super) fn stats(&self, hits: u64) -> TierStats {
        let (blocks, blobs) = self.index.size();
        TierStats { bytes: blocks * DISK_BLOCK, capacity: self.capacity, blobs, hits, evictions: self.evictions.load(Ordering::Relaxed) }
    }

    /// Closes the files beyond `disk.open_files` now.
    #[cfg(test)]
    pub(super) fn settle_open(&self) {
        self.open.run_pending_tasks();
    }

    /// The directory of the blobs whose digests begin with this byte.
    pub(super) fn directory(&self, first: u8) -> PathBuf {
        subdirectory(&self.root, first)
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.directory(digest.as_bytes()[0]).join(digest.to_string())
    }

    /// Whether the index has the blob. Does not count as a use for LRU.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.index.has(digest)
    }

    fn fits(&self, digest: &Digest, size: u64) -> bool {
        self.index.takes(digest, disk_blocks(size))
    }

    /// See [`super::Disk::admits`]. A blob that is too large for the tier is not counted as a skip.
    pub(super) fn admits(&self, digest: &Digest, size: u64) -> bool {
        if !self.fits(digest, size) {
            return false;
        }
        let why_not = self.why_not_write();
        if let Some(why) = why_not {
            self.metrics.disk_skipped(why);
        }
        why_not.is_none()
    }

    const fn subdir(&self, digest: &Digest) -> &Subdir {
        &self.subdirs[digest.as_bytes()[0] as usize]
    }

    pub(super) fn lock(&self, digest: &Digest) -> MutexGuard<'_, ()> {
        self.subdir(digest).files.lock()
    }

    /// Deletes the blob's file. The caller holds the subdirectory's lock.
    fn remove(&self, digest: &Digest) {
        self.open.invalidate(digest);
        if !self.lock.still_held() {
            return;
        }
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => self.errors.record(DiskOp::Remove, &path, &error),
            _ => {}
        }
    }

    fn remove_unfinished(&self, path: &Path) {
        tracing::info!(path = %path.display(), "deleted an unfinished file of the disk tier; a crash of the machine leaves such files");
        fs::remove_file(path).ok();
    }

    /// Deletes the oldest files of the quarantine until it is within `disk.quarantine`.
    fn trim_quarantine(&self) {
        let Ok(entries) = fs::read_dir(self.root.join(QUARANTINE)) else { return };
        let mut files: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.metadata().ok().map(|of| ((of.ctime(), of.ctime_nsec()), of.blocks() * 512, entry.path())))
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if total <= self.quarantine_capacity {
                break;
            }
            // `remove_dir` fails for a directory that is not empty: it stays.
            fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).ok();
            total -= bytes;
        }
    }
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

const TMP: &str = "tmp";
const QUARANTINE: &str = "quarantine";

/// Creates the directories, and deletes the files that an earlier process left in `tmp/`.
fn make_ready(root: &Path, progress: &AtomicU64) -> io::Result<()> {
    let unusable = |error: io::Error| dir_lock::describe(root, &format!("cannot be written to: {error}"), &error);
    let step = || progress.fetch_add(1, Ordering::Relaxed);
    directories(root)
        .try_for_each(|directory| {
            step();
            fs::create_dir_all(directory)
        })
        .map_err(unusable)?;
    for entry in fs::read_dir(root.join(TMP)).map_err(unusable)?.flatten() {
        step();
        if let Err(error) = fs::remove_file(entry.path()) {
            tracing::warn!(%error, path = %entry.path().display(), "a temporary file of an earlier run cannot be deleted; delete it by hand");
        }
    }
    Ok(())
}

/// `wanted` bytes, or 95 % of the file system's size if that is less. With a larger capacity the file system would be full before the tier
/// evicts anything.
fn capacity(root: &Path, wanted: u64) -> u64 {
    let Ok(system) = rustix::fs::statvfs(root) else { return wanted };
    // File systems reserve some of their blocks.
    let usable = system.f_blocks.saturating_mul(system.f_frsize) / 20 * 19;
    if usable < wanted {
        tracing::warn!(
            wanted, capacity = usable, path = %root.display(),
            "disk.capacity is larger than the file system, and was lowered to fit; set it lower still, since blobs in transfer need space too"
        );
    }
    wanted.min(usable)
}

fn make_directories(root: &Path) -> io::Result<()> {
    directories(root).try_for_each(fs::create_dir_all)
}

fn directories(root: &Path) -> impl Iterator<Item = PathBuf> {
    let subdirectories = (0..=u8::MAX).map(|first| subdirectory(root, first));
    subdirectories.chain([root.join(TMP), root.join(QUARANTINE)])
}

fn subdirectory(root: &Path, first: u8) -> PathBuf {
    root.join(format!("{first:02x}"))
}

/// How many [`DISK_BLOCK`]s the file of a blob of `size` bytes takes.
const fn disk_blocks(size: u64) -> u64 {
    format::file_len(size).div_ceil(DISK_BLOCK)
}
