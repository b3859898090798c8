//! The files of the tier and the index over them.
//!
//! Invariants:
//! - A blob's file comes, goes and is looked at only under the lock of its shelf (its directory), together with its entry in the
//!   index. So a blob that was evicted and is kept anew before its old file went cannot lose the new one.
//! - Under `ab/` there are only finished files. What is being written is in `tmp/`.
//! - Only threads that may wait take a shelf's lock or touch a file: those of the pools `reads` and `writes`, and the tier's own. A file
//!   system that hangs may keep all of them, and the locks that they have. Whoever waits for them has a deadline.

use super::{
    blob::{DiskBlob, Unopened, stands_at},
    file::DiskFile,
    format,
    health::{self, Health},
    owner::{self, Owner},
    space,
    state::{DiskState, Trouble, Troubles},
};
use crate::{
    eviction::{Index, Shape},
    metrics::{DiskError, DiskOp, Metrics, Skip},
    pool::{Pool, Turn, Undone},
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

/// What file systems hand out at once, and so the unit of the index's weights: 32 bits of it are 16 TiB.
const DISK_BLOCK: u64 = 4096;
/// This part of the capacity is for blobs that came lately; see [`crate::eviction`].
const WINDOW_PART: u64 = 16;
/// How much memory counts how often blobs are asked for: so much for each block of 4 KiB, within these bounds.
const COUNTS: (u64, u64) = (64 << 10, 16 << 20);

/// What the tier's handle and its threads share.
pub(super) struct Store {
    root: PathBuf,
    /// `disk.capacity`, or what the file system has if that is less.
    capacity: u64,
    /// `disk.quarantine`.
    quarantine_capacity: u64,
    /// Every blob that is kept.
    index: Index<Listed>,
    /// Blobs that were read lately.
    open: Cache<Digest, Arc<DiskBlob>>,
    /// By the first byte of the digest, as the directories are.
    shelves: [Shelf; 256],
    /// What the index let go, until its file is gone too.
    pub(super) evicted: Receiver<Digest>,
    evictions: Arc<AtomicU64>,
    troubles: Arc<Troubles>,
    /// The index does not know every file yet.
    scanning: AtomicBool,
    pub(super) health: Health,
    pub(super) metrics: Arc<Metrics>,
    /// Where files are opened and read.
    pub(super) reads: Pool,
    /// Where files are written, named and deleted. Apart from `reads`, since a file system can refuse the one and do the other: while a
    /// snapshot is taken, for instance.
    pub(super) writes: Pool,
    /// Keeps other processes out for as long as anything here may still write.
    owner: Owner,
}

/// What the index knows of a blob.
#[derive(Clone, Copy)]
struct Listed {
    size: u64,
    /// When its file was written, in seconds since 1970: it outlives restarts.
    since: u32,
}

impl Listed {
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

#[derive(Default)]
struct Shelf {
    files: Mutex<()>,
    /// How many blobs of this shelf were forgotten. A blob that was accepted before one of them may be that one, and is not kept.
    forgets: AtomicU64,
}

/// When a blob was accepted: what is forgotten after that is not kept by it.
#[derive(Clone, Copy)]
pub(super) struct Accepted(u64);

/// What the scan makes of a file under `ab/`.
pub(super) enum Scanned {
    /// It is in the index now.
    Blob,
    /// It was never finished, and is gone.
    Rubbish,
    /// It is none of ours, or vanished meanwhile.
    Foreign,
}

impl Store {
    /// Takes the directory, which must be nobody else's.
    ///
    /// `progress` grows with each step that the file system takes.
    pub(super) fn new(config: &config::Disk, metrics: Arc<Metrics>, progress: &AtomicU64) -> io::Result<Self> {
        let root = config.path.clone();
        let owner = Owner::take(&root)?;
        make_ready(&root, progress)?;
        let capacity = capacity(&root, config.capacity.get());
        let (evict, evicted) = crossbeam_channel::unbounded();
        let evictions = Arc::new(AtomicU64::new(0));
        let (counter, told) = (evictions.clone(), metrics.clone());
        let blocks = capacity / DISK_BLOCK;
        let shape = Shape { capacity: blocks, window: blocks / WINDOW_PART, counts: blocks.clamp(COUNTS.0, COUNTS.1), unit: DISK_BLOCK };
        // Runs wherever the index is touched, so it must not touch files itself.
        let index = Index::new(
            config.policy,
            shape,
            |listed: &Listed| disk_blocks(listed.size),
            move |digest, listed, evicted| {
                if evicted {
                    told.evicted(Tier::Disk, listed.age());
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
        let troubles = Arc::new(Troubles::default());
        let pool = |name: &'static str, does: &'static str, trouble: Trouble, most: usize| {
            let (root, troubles) = (root.clone(), troubles.clone());
            let (timeout, cooldown) = (config.timeout.get(), config.cooldown.get());
            let tell = move |turn| match turn {
                Turn::Hangs => tracing::warn!(
                    path = %root.display(), ?timeout, ?cooldown,
                    "the disk tier's file system does not answer: nothing is {does} it for disk.cooldown, clients get their blobs from                      elsewhere. Look at the kernel's log and at what it is mounted from"
                ),
                Turn::Well => tracing::info!(path = %root.display(), "the disk tier's file system answers again"),
            };
            Pool::new(name, most, timeout, cooldown, move |turn| {
                troubles.set(trouble, turn == Turn::Hangs);
                tell(turn);
            })
        };
        let threads = config.threads;
        Ok(Self {
            reads: pool("disk-read", "read from", Trouble::Reads, threads),
            writes: pool("disk-file", "written to", Trouble::Writes, threads.div_ceil(4)),
            capacity,
            quarantine_capacity: config.quarantine.get(),
            index,
            open,
            shelves: std::array::from_fn(|_| Shelf::default()),
            evicted,
            evictions,
            scanning: AtomicBool::new(true),
            health: Health::new(root.clone(), config.cooldown.get(), troubles.clone(), metrics.clone()),
            troubles,
            metrics,
            owner,
            root,
        })
    }

    /// The blob's size, as far as the index knows. To have been looked for lately helps a blob to stay.
    pub(super) fn size_of(&self, digest: &Digest) -> Option<u64> {
        self.index.get(digest).map(|listed| listed.size)
    }

    /// See [`super::Disk::state`].
    pub(super) fn state(&self) -> (DiskState, Option<SystemTime>) {
        // Nobody tells of that.
        if self.owner.is_lost() {
            self.troubles.set(Trouble::Lost, true);
        }
        self.troubles.state()
    }

    /// Counts one get, whether or not the blob is here.
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

    /// Work was not done in time.
    pub(super) fn undone(&self, op: DiskOp, undone: Undone) {
        self.metrics.disk_error(
            op,
            match undone {
                Undone::Busy => DiskError::Busy,
                Undone::Late => DiskError::Timeout,
                Undone::Panicked => DiskError::Other,
            },
        );
    }

    /// Whether files may be read now.
    pub(super) fn may_read(&self) -> bool {
        self.reads.is_usable() && !self.owner.is_lost()
    }

    pub(super) fn is_scanning(&self) -> bool {
        self.scanning.load(Ordering::Acquire)
    }

    /// The index knows every file from now on.
    pub(super) fn scanned(&self) {
        self.index.settle();
        self.sweep();
        self.scanning.store(false, Ordering::Release);
    }

    /// Opens the blob. A file that was never finished goes, one that is damaged is set aside.
    pub(super) fn open(self: &Arc<Self>, digest: &Digest) -> Option<Arc<DiskBlob>> {
        let shelf = self.lock(digest);
        if let Some(blob) = self.open.get(digest) {
            return Some(blob);
        }
        let path = self.path(digest);
        match DiskBlob::open(Arc::downgrade(self), self.reads.clone(), *digest, &path) {
            Ok(blob) => {
                if !self.index.has(digest) {
                    // Evicted, and its file is about to go; or the scan has not come here yet.
                    if !self.is_scanning() {
                        return None;
                    }
                    self.index.insert(*digest, Listed::now(blob.size()));
                }
                let blob = Arc::new(blob);
                self.open.insert(*digest, blob.clone());
                return Some(blob);
            }
            Err(Unopened::Vanished) => {
                self.index.remove(digest);
            }
            Err(Unopened::Unfinished) => {
                self.index.remove(digest);
                self.remove_rubbish(&path);
            }
            Err(Unopened::Damaged(file)) => {
                drop(shelf);
                self.quarantine(digest, &file, "the trailer cannot be read or does not match its checksum");
            }
            Err(Unopened::NoFile) => {
                // The next blob of this name takes its place.
                self.index.remove(digest);
                self.health.failed(DiskOp::Open, &path, &rustix::io::Errno::NXIO.into());
            }
            Err(Unopened::Unknown(error)) => {
                // Without a descriptor nothing is known of the file. Anything else is the file's own trouble: it gives way to a new one.
                if health::kind(&error) != DiskError::Files {
                    self.index.remove(digest);
                }
                self.health.failed(DiskOp::Open, &path, &error);
            }
        }
        None
    }

    /// Makes a file to fill.
    pub(super) fn temp(self: &Arc<Self>) -> io::Result<DiskFile> {
        // Opened here rather than by tempfile, which would hide the error's number, and with it the reason.
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
        let make = || tempfile::Builder::new().prefix("").make_in(self.root.join(TMP), open);
        let made = make().or_else(|error| match error.kind() {
            // Somebody emptied the directory under a running tier.
            io::ErrorKind::NotFound => self.remake_directories().and_then(|()| make()),
            _ => Err(error),
        });
        let failed = |error: &io::Error| self.health.failed(DiskOp::Write, &self.root.join(TMP), error);
        let (file, path) = made.inspect_err(failed)?.into_parts();
        Ok(DiskFile::new(self.clone(), file, path))
    }

    /// Notes that a blob is going to be kept.
    pub(super) fn accept(&self, digest: &Digest) -> Accepted {
        Accepted(self.shelf(digest).forgets.load(Ordering::Acquire))
    }

    /// Writes a blob that is in memory, and keeps it.
    pub(super) fn keep(self: &Arc<Self>, blob: &Verified<Bytes>, accepted: Accepted) {
        if self.has(&blob.digest()) || !self.admits(&blob.digest(), blob.size()) {
            return;
        }
        let written = self.temp().and_then(|mut file| file.append(blob.content()).map(|()| file));
        match written {
            Ok(file) => self.place(&blob.digest(), file, accepted),
            Err(_) => self.metrics.disk_skipped(Skip::Failed),
        }
    }

    /// Gives a file that holds all of a blob its place.
    pub(super) fn place(&self, digest: &Digest, file: DiskFile, accepted: Accepted) {
        let size = file.size();
        if self.has(digest) || !self.admits(digest, size) {
            return;
        }
        if !self.owner.holds() {
            return self.metrics.disk_skipped(Skip::Failed);
        }
        let shelf = self.lock(digest);
        if self.accept(digest).0 != accepted.0 {
            return self.metrics.disk_skipped(Skip::Purged);
        }
        let path = self.path(digest);
        if file.place(digest, &path, |error| self.make_way(&path, error)).is_err() {
            return self.metrics.disk_skipped(Skip::Failed);
        }
        self.open.invalidate(digest);
        self.index.insert(*digest, Listed::now(size));
        drop(shelf);
        self.health.worked();
        space::look(&self.root, &self.metrics);
        self.index.settle();
        self.sweep();
    }

    /// Whether a blob can get its place at `path` after all.
    fn make_way(&self, path: &Path, error: &io::Error) -> bool {
        match health::kind(error) {
            // A directory, which no file can replace. It is set aside as it is: it may be somebody's.
            DiskError::Path if fs::symlink_metadata(path).is_ok_and(|there| there.is_dir()) => {
                let aside = (0..100).map(|n| self.root.join(QUARANTINE).join(format!("{}.directory-{n}", file_name(path))));
                let moved = aside.filter(|aside| fs::symlink_metadata(aside).is_err()).find(|aside| fs::rename(path, aside).is_ok());
                if let Some(moved) = &moved {
                    tracing::warn!(
                        path = %path.display(), moved = %moved.display(),
                        "a directory stood where the disk tier keeps a blob, and was set aside; delete it if nobody misses it"
                    );
                }
                moved.is_some()
            }
            _ => error.kind() == io::ErrorKind::NotFound && self.remake_directories().is_ok(),
        }
    }

    /// Makes the tier's directories anew, where somebody has deleted them.
    fn remake_directories(&self) -> io::Result<()> {
        if !self.owner.may_remake() {
            return Err(io::ErrorKind::NotFound.into());
        }
        make_directories(&self.root)
    }

    /// As far as that takes no file: the index does not know the blob from now on, and none that was accepted before is placed.
    pub(super) fn disown(&self, digest: &Digest) {
        self.shelf(digest).forgets.fetch_add(1, Ordering::AcqRel);
        self.index.remove(digest);
    }

    /// Drops a blob, and what is on its way to become it.
    pub(super) fn forget(&self, digest: &Digest) {
        let _shelf = self.lock(digest);
        self.shelf(digest).forgets.fetch_add(1, Ordering::AcqRel);
        self.index.remove(digest);
        self.remove(digest);
    }

    /// Sets a damaged file aside, unless another has taken its place meanwhile. False if so: whoever came first has counted it.
    pub(super) fn quarantine(&self, digest: &Digest, file: &File, why: &str) -> bool {
        let path = self.path(digest);
        {
            let _shelf = self.lock(digest);
            if !stands_at(file, &path) {
                // Whatever stands there now is not what is open.
                self.open.invalidate(digest);
                return false;
            }
            self.index.remove(digest);
            self.open.invalidate(digest);
            if !self.owner.holds() {
                return false;
            }
            if fs::rename(&path, self.root.join(QUARANTINE).join(digest.to_string())).is_err() {
                fs::remove_file(&path).ok();
            }
        }
        self.metrics.corrupt("disk");
        tracing::warn!(%digest, why, path = %self.root.display(), "a kept blob is damaged; its file is in quarantine/, its bytes come from the origin");
        self.trim_quarantine();
        true
    }

    /// Takes note of a file that was there before.
    pub(super) fn scan(&self, digest: &Digest, entry: &fs::DirEntry) -> io::Result<Scanned> {
        let _shelf = self.lock(digest);
        if self.has(digest) {
            return Ok(Scanned::Blob);
        }
        // Under the lock, since the blob may have been evicted since the directory was listed.
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Scanned::Foreign),
            metadata => metadata?,
        };
        // No link is followed: this is what the name itself is.
        if !metadata.is_file() {
            return Ok(Scanned::Foreign);
        }
        let Some(size) = format::blob_size(metadata.len()) else {
            self.remove_rubbish(&entry.path());
            return Ok(Scanned::Rubbish);
        };
        self.index.insert(*digest, Listed::at(size, metadata.modified()?));
        Ok(Scanned::Blob)
    }

    /// Deletes the files of what the index let go. Whoever makes room calls this, so that files do not outgrow the capacity while
    /// the janitor is busy.
    pub(super) fn sweep(&self) {
        while let Ok(digest) = self.evicted.try_recv() {
            self.remove_evicted(&digest);
        }
    }

    /// Deletes the file of an evicted blob, unless the blob has been kept anew since.
    pub(super) fn remove_evicted(&self, digest: &Digest) {
        let _shelf = self.lock(digest);
        if !self.has(digest) {
            self.remove(digest);
        }
    }

    /// Whether a blob of this size may be kept now.
    pub(super) fn takes(&self, size: u64) -> bool {
        disk_blocks(size) <= self.index.largest() && self.why_not_write().is_none()
    }

    /// Whether this blob, of this size, would be kept now.
    pub(super) fn keeps(&self, digest: &Digest, size: u64) -> bool {
        self.fits(digest, size) && self.why_not_write().is_none()
    }

    /// What keeps the tier from writing now.
    fn why_not_write(&self) -> Option<Skip> {
        if !self.health.may_write() || self.owner.is_lost() {
            return Some(Skip::ReadOnly);
        }
        (!self.writes.is_usable() || !self.reads.is_usable()).then_some(Skip::Timeout)
    }

    pub(super) fn stats(&self, hits: u64) -> TierStats {
        let (blocks, blobs) = self.index.size();
        TierStats { bytes: blocks * DISK_BLOCK, capacity: self.capacity, blobs, hits, evictions: self.evictions.load(Ordering::Relaxed) }
    }

    /// Closes now what is open beyond `disk.open_files`.
    #[cfg(test)]
    pub(super) fn settle_open(&self) {
        self.open.run_pending_tasks();
    }

    /// The directory of the blobs whose digests begin with this byte.
    pub(super) fn directory(&self, first: u8) -> PathBuf {
        shelf_directory(&self.root, first)
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.directory(digest.as_bytes()[0]).join(digest.to_string())
    }

    /// Whether the index has the blob, without that being a use.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.index.has(digest)
    }

    fn fits(&self, digest: &Digest, size: u64) -> bool {
        self.index.takes(digest, disk_blocks(size))
    }

    /// As [`Self::keeps`], and counts what is turned away for the disk's sake. A blob too large for the tier is nobody's failing.
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

    const fn shelf(&self, digest: &Digest) -> &Shelf {
        &self.shelves[digest.as_bytes()[0] as usize]
    }

    pub(super) fn lock(&self, digest: &Digest) -> MutexGuard<'_, ()> {
        self.shelf(digest).files.lock()
    }

    /// Under the shelf's lock.
    fn remove(&self, digest: &Digest) {
        self.open.invalidate(digest);
        if !self.owner.holds() {
            return;
        }
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => self.health.failed(DiskOp::Remove, &path, &error),
            _ => {}
        }
    }

    fn remove_rubbish(&self, path: &Path) {
        tracing::info!(path = %path.display(), "a file that was never finished is deleted; a crash leaves such");
        fs::remove_file(path).ok();
    }

    /// Holds the quarantine to its capacity; what was set aside first goes first.
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
            // A directory that was set aside stays as long as there is anything in it.
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

/// Makes the directories, and clears away what an earlier process did not finish.
fn make_ready(root: &Path, progress: &AtomicU64) -> io::Result<()> {
    let unusable = |error: io::Error| owner::told(root, &format!("cannot be written to: {error}"), &error);
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
            tracing::warn!(%error, path = %entry.path().display(), "a leftover cannot be deleted; delete it by hand");
        }
    }
    Ok(())
}

/// `wanted` bytes, or fewer on a file system that never has them: a tier that relied on them would find no room when it should evict.
fn capacity(root: &Path, wanted: u64) -> u64 {
    let Ok(system) = rustix::fs::statvfs(root) else { return wanted };
    // A file system keeps a part of its blocks to itself.
    let there = system.f_blocks.saturating_mul(system.f_frsize) / 20 * 19;
    if there < wanted {
        tracing::warn!(
            wanted, capacity = there, path = %root.display(),
            "disk.capacity is more than the file system holds, and is lowered to what it does; in flight blobs come on top, so leave it more room"
        );
    }
    wanted.min(there)
}

fn make_directories(root: &Path) -> io::Result<()> {
    directories(root).try_for_each(fs::create_dir_all)
}

fn directories(root: &Path) -> impl Iterator<Item = PathBuf> {
    let shelves = (0..=u8::MAX).map(|first| shelf_directory(root, first));
    shelves.chain([root.join(TMP), root.join(QUARANTINE)])
}

fn shelf_directory(root: &Path, first: u8) -> PathBuf {
    root.join(format!("{first:02x}"))
}

/// The disk blocks that the file of a blob of `size` bytes takes.
const fn disk_blocks(size: u64) -> u64 {
    format::file_len(size).div_ceil(DISK_BLOCK)
}
