//! The disk tier. It keeps blobs across restarts, and checks every byte that it reads.
//!
//! Each blob has one file, `ab/abcdef…`, in the layout of [`format`]. The file is written in `tmp/` and then renamed. There is no fsync:
//! after a crash of the machine, a file without a valid trailer is deleted.
//!
//! - [`store`]: the files, and the index of them
//! - [`blob`]: reads blobs and checks them block by block
//! - [`scan`]: fills the index after the start; [`scrub`]: verifies all files in the background
//! - [`errors`]: makes the tier read-only for a while when the file system fails
//! - [`dir_lock`]: one process per directory
//!
//! No failure of the disk fails a request. A blob that cannot be written is not kept. A blob that cannot be read is [`Damaged`], and the
//! caller gets its bytes from another source.
//!
//! [`Damaged`]: crate::tier::Damaged

mod blob;
mod copy;
mod dir_lock;
mod errors;
mod file;
mod format;
mod free_space;
mod scan;
mod scrub;
mod state;
mod store;

#[cfg(test)]
mod tests;

pub(crate) use blob::DiskBlob;
pub(crate) use copy::DiskCopy;
pub(crate) use file::DiskFile;
pub use state::DiskState;

use crate::{
    metrics::{DiskOp, Metrics, Skip},
    pool,
    resource::Visibility,
    tier::TierStats,
};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use castier_config as config;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use parking_lot::Mutex;
use std::{
    convert::Infallible,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};
use store::{ForgetEpoch, Store};
use tokio::sync::mpsc;

/// What a queued blob costs in `disk.write_behind` beside its bytes. It bounds the number of empty blobs in the queue.
const QUEUE_OVERHEAD: u64 = 256;

/// How long [`Disk::close`] waits for the tier's threads to write the queue.
const FLUSH: Duration = Duration::from_secs(10);

/// Blobs on disk. Dropping it closes it; see [`Self::close`].
pub struct Disk {
    store: Arc<Store>,
    behind: WriteBehind,
    /// Dropping it tells the threads to end; see [`Stop`].
    stop: Mutex<Option<Sender<Infallible>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A blob in the write-behind queue.
type QueuedWrite = (Verified<Bytes>, Visibility, ForgetEpoch);

/// The queue of blobs that are written in the background.
struct WriteBehind {
    /// `None` once the tier closes.
    queue: Mutex<Option<Sender<QueuedWrite>>>,
    /// The budget `disk.write_behind`, in bytes.
    capacity: u64,
    /// Bytes of the budget in use.
    used: Arc<AtomicU64>,
}

/// Disconnected when the tier closes.
struct Stop(Receiver<Infallible>);

impl Stop {
    /// Waits. Returns true if the tier closes before the time is over.
    fn within(&self, wait: Duration) -> bool {
        !matches!(self.0.recv_timeout(wait), Err(RecvTimeoutError::Timeout))
    }
}

impl WriteBehind {
    /// Reserves `bytes` of the budget. Returns false if they are not available.
    fn take(&self, bytes: u64) -> bool {
        let within = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.capacity);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }
}

impl Disk {
    /// Locks the directory and starts to serve. The index fills in the background. Blocks, but at most `disk.timeout` if the file system
    /// does not answer.
    ///
    /// The scrub removes damaged blobs and sends their digests to `damaged`, so that the caller can fetch them again. If that channel is
    /// full, the digest is not sent, and the next get fetches the blob.
    ///
    /// # Errors
    /// The directory cannot be used, another process uses it, or its file system hangs. The text names the directory.
    pub fn open(config: &config::Disk, metrics: Arc<Metrics>, damaged: mpsc::Sender<Digest>) -> io::Result<Arc<Self>> {
        let store = Arc::new(begin(config, metrics)?);
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let (queue, queued) = crossbeam_channel::unbounded();
        let used = Arc::new(AtomicU64::new(0));
        let rate = config.scrub_rate.get();
        // Not in `threads`: nobody waits for its end, since a hanging file system may block it for ever.
        spawn("disk-space", {
            let (root, metrics, stop) = (config.path.clone(), store.metrics.clone(), Stop(stopped.clone()));
            move || free_space::poll(&root, &metrics, &stop)
        })?;
        let threads = vec![
            spawn("disk-scan", {
                let (store, stop) = (store.clone(), Stop(stopped.clone()));
                move || {
                    scan::scan(&store, &stop);
                    scrub::scrub(&store, &stop, rate, &damaged);
                }
            })?,
            spawn("disk-janitor", {
                let store = store.clone();
                move || sweep_until(&store, &stopped)
            })?,
            spawn("disk-write", {
                let (store, used) = (store.clone(), used.clone());
                move || write_behind(&store, &queued, &used)
            })?,
        ];
        let behind = WriteBehind { queue: Mutex::new(Some(queue)), capacity: config.write_behind.get(), used };
        Ok(Arc::new(Self { store, behind, stop: Mutex::new(Some(stop)), threads: Mutex::new(threads) }))
    }

    /// The blob, open for reading, if the tier has it. Opens the file on another thread unless it is open already. While the scan runs, a
    /// blob that is not in the index is looked up on the disk.
    pub async fn find(&self, digest: &Digest) -> Option<Arc<DiskBlob>> {
        if self.store.size_of(digest).is_none() && !self.store.is_scanning() {
            return None;
        }
        if let Some(blob) = self.store.opened(digest) {
            return Some(blob);
        }
        if !self.store.may_read() {
            return None;
        }
        let (store, digest) = (self.store.clone(), *digest);
        let opened = self.store.reads.run(move || store.open(&digest)).await;
        opened.inspect_err(|error| self.store.pool_failed(DiskOp::Open, *error)).ok().flatten()
    }

    /// Everybody may see the blob from now on.
    pub fn publish(&self, digest: &Digest) {
        if let Some(blob) = self.store.opened(digest) {
            blob.publish();
        }
    }

    /// Whether the file system answered lately. The tier has logged it if not.
    pub fn answers(&self) -> bool {
        self.store.may_read()
    }

    /// The state of the tier, and since when; `None` if it never changed.
    pub fn state(&self) -> (DiskState, Option<SystemTime>) {
        self.store.state()
    }

    /// `disk.path`.
    pub fn path(&self) -> &Path {
        self.store.root()
    }

    /// Whether [`Self::find`] should find the blob. Touches no file.
    pub fn offers(&self, digest: &Digest) -> bool {
        self.store.has(digest) && self.store.may_read()
    }

    /// The blob's size in bytes, if the index has it. Touches no file, so the file may be gone or damaged all the same.
    pub fn knows(&self, digest: &Digest) -> Option<u64> {
        self.store.size_of(digest)
    }

    /// The blob's size in bytes. Looks where [`Self::find`] looks.
    pub async fn stat(&self, digest: &Digest) -> Option<u64> {
        match self.knows(digest) {
            None if self.store.is_scanning() => Some(self.find(digest).await?.size()),
            known => known,
        }
    }

    /// Whether a blob of `size` bytes can be kept now: it fits, and the tier can write.
    pub fn takes(&self, size: u64) -> bool {
        self.store.takes(size)
    }

    /// As [`Self::keeps`], and counts a skip if the tier cannot write. Call it once for each blob that is about to be kept.
    pub fn admits(&self, digest: &Digest, size: u64) -> bool {
        self.store.admits(digest, size)
    }

    /// Whether this blob of `size` bytes would be kept now. As [`Self::takes`], but a blob larger than the admission window must have been
    /// requested before.
    pub fn keeps(&self, digest: &Digest, size: u64) -> bool {
        self.store.keeps(digest, size)
    }

    /// Counts one get for the eviction policy, whether or not the tier has the blob.
    pub fn count(&self, digest: &Digest) {
        self.store.count(digest);
    }

    /// A new file in `tmp/` that holds `parts`, for a blob that is being transferred; `None` if it could not be written.
    pub async fn file(&self, parts: Vec<Bytes>) -> Option<DiskFile> {
        let store = self.store.clone();
        let made = self.store.writes.run(move || store.temp()).await;
        match made.inspect_err(|error| self.store.pool_failed(DiskOp::Write, *error)).ok().and_then(Result::ok) {
            Some(file) => file.grow(parts).await,
            None => {
                self.store.metrics.disk_skipped(Skip::Failed);
                None
            }
        }
    }

    #[cfg(test)]
    fn temp(&self) -> io::Result<DiskFile> {
        self.store.temp()
    }

    /// Keeps a blob that was spooled into a file of this tier, by a rename. The future ends within `disk.timeout`.
    ///
    /// If [`Self::forget`] is called after this call and before the end of the future, the blob is not kept. So call this at the moment of
    /// the decision to keep the blob.
    pub fn keep_file(&self, blob: Verified<DiskFile>, visibility: Visibility) -> impl Future<Output = ()> + Send + use<> {
        let (store, digest, size) = (self.store.clone(), blob.digest(), blob.size());
        let (epoch, file) = (store.epoch(&digest), blob.into_content());
        async move {
            if file.size() != size {
                tracing::error!(%digest, size, written = file.size(), "a spooled blob does not have the verified length, and is not kept");
                return;
            }
            commit(store, digest, visibility, file, epoch).await;
        }
    }

    /// Queues a blob from memory to be written in the background. Does not wait. If `disk.write_behind` is full, the blob is not kept.
    pub fn keep_later(&self, blob: Verified<Bytes>, visibility: Visibility) {
        if self.store.has(&blob.digest()) || !self.store.admits(&blob.digest(), blob.size()) {
            return;
        }
        let queue = self.behind.queue.lock();
        let Some(queue) = &*queue else { return };
        if !self.behind.take(cost(&blob)) {
            return self.store.metrics.disk_skipped(Skip::Queue);
        }
        let epoch = self.store.epoch(&blob.digest());
        queue.send((blob, visibility, epoch)).ok();
    }

    /// Removes a blob, also from the write-behind queue. When the future ends, the blob is not found any more. Its file is deleted; if the
    /// file system does not answer, it is deleted when that answers again.
    pub async fn forget(&self, digest: &Digest) {
        let (store, digest) = (self.store.clone(), *digest);
        store.forget_in_memory(&digest);
        let forgotten = Arc::new(AtomicBool::new(false));
        let forget = {
            let (store, forgotten) = (store.clone(), forgotten.clone());
            move || {
                store.forget(&digest);
                forgotten.store(true, Ordering::Release);
            }
        };
        if let Err(error) = self.store.writes.run(forget.clone()).await {
            store.pool_failed(DiskOp::Remove, error);
            // A purge must happen. If it runs twice, that costs at most one blob that was kept in between.
            if !forgotten.load(Ordering::Acquire) {
                store.writes.run_detached(forget);
            }
        }
    }

    /// Writes the queue (at most `disk.write_behind` bytes) and ends the tier's threads. After that blobs are still found, and
    /// [`Self::keep_later`] keeps nothing. Blocks for at most [`FLUSH`]: a thread that the file system blocks is left behind.
    pub fn close(&self) {
        drop(self.stop.lock().take());
        drop(self.behind.queue.lock().take());
        let threads: Vec<_> = self.threads.lock().drain(..).collect();
        let end = Instant::now() + FLUSH;
        for thread in threads {
            while !thread.is_finished() {
                if Instant::now() >= end {
                    tracing::warn!("the disk tier's file system does not answer at shutdown; blobs in the write-behind queue are not kept");
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
            if thread.join().is_err() {
                tracing::error!("a thread of the disk tier panicked");
            }
        }
        // Copies of uploads that are being written.
        while self.behind.used.load(Ordering::Relaxed) > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The tier's figures now. The caller counts `hits`: the tier cannot tell a client's get from other look-ups.
    pub fn stats(&self, hits: u64) -> TierStats {
        self.store.stats(hits)
    }
}

#[cfg(test)]
impl Disk {
    /// Keeps a blob from memory, and waits for it.
    pub(crate) async fn keep_now(&self, blob: Verified<Bytes>) {
        let (store, epoch) = (self.store.clone(), self.store.epoch(&blob.digest()));
        let kept = self.store.writes.run(move || store.keep(&blob, Visibility::Public, epoch)).await;
        kept.inspect_err(|error| self.store.pool_failed(DiskOp::Write, *error)).ok();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.close();
    }
}

/// Renames a complete file into the tier, within `disk.timeout`.
async fn commit(store: Arc<Store>, digest: Digest, visibility: Visibility, file: DiskFile, epoch: ForgetEpoch) {
    let committing = store.clone();
    if let Err(error) = store.writes.run(move || committing.commit(&digest, visibility, file, epoch)).await {
        store.pool_failed(DiskOp::Write, error);
        store.metrics.disk_skipped(Skip::Timeout);
    }
}

/// Locks and prepares the directory, on a thread of its own: a hanging file system may block that thread for ever. The start may take long,
/// but must make progress within each `disk.timeout`.
fn begin(config: &config::Disk, metrics: Arc<Metrics>) -> io::Result<Store> {
    let timeout = config.timeout.get();
    let (progress, begun) = (Arc::new(AtomicU64::new(0)), config.clone());
    let (answer, end) = crossbeam_channel::bounded(1);
    spawn("disk-start", {
        let progress = progress.clone();
        move || drop(answer.send(Store::new(&begun, metrics, &progress)))
    })?;
    let mut seen = 0;
    loop {
        match end.recv_timeout(timeout) {
            Ok(store) => return store,
            Err(RecvTimeoutError::Timeout) if progress.load(Ordering::Relaxed) > seen => seen = progress.load(Ordering::Relaxed),
            Err(_) => {
                let path = config.path.display();
                let why = format!(
                    "disk.path: {path}: the file system does not answer within disk.timeout ({timeout:?}); check the device or server that it is mounted from"
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        pool::may_block_here();
        work();
    })
}

/// The janitor thread: deletes the files of evicted blobs.
fn sweep_until(store: &Store, stop: &Receiver<Infallible>) {
    loop {
        crossbeam_channel::select! {
            recv(store.evicted) -> digest => match digest {
                Ok(digest) => store.remove_evicted(&digest),
                Err(_) => return,
            },
            recv(stop) -> _ => return store.sweep(),
        }
    }
}

/// Writes queued blobs, until the tier closes and the queue is empty.
fn write_behind(store: &Arc<Store>, queue: &Receiver<QueuedWrite>, used: &AtomicU64) {
    for (blob, visibility, epoch) in queue {
        store.writes.watch(|| store.keep(&blob, visibility, epoch));
        let cost = cost(&blob);
        drop(blob);
        used.fetch_sub(cost, Ordering::Relaxed);
    }
}

fn cost(blob: &Verified<Bytes>) -> u64 {
    blob.size().saturating_add(QUEUE_OVERHEAD)
}
