//! The disk tier: terabytes that survive restarts, and never a rotten byte. With `memory.rs`, the only place that sees moka.
//!
//! One file per blob, `ab/abcdef…`, laid out as in [`format`]: written to `tmp/`, renamed into place. No fsync: after a crash of the
//! machine a file without a sound trailer is rubbish, and goes. [`store`] has the files and the index over them, [`blob`] reads
//! and checks, [`walk`] lists the directories at the start and reads everything back in the background, [`health`] stops
//! writing for a while when the disk will not.
//!
//! Nothing that happens to the disk fails a request: what cannot be written is not kept, what cannot be read is [`Damaged`] and
//! comes from elsewhere.
//!
//! [`Damaged`]: crate::tier::Damaged

mod blob;
mod copy;
mod file;
mod format;
mod health;
mod owner;
mod space;
mod state;
mod store;
mod walk;

#[cfg(test)]
mod tests;

pub(crate) use blob::DiskBlob;
pub(crate) use copy::DiskCopy;
pub(crate) use file::DiskFile;
pub use state::DiskState;

use crate::{
    metrics::{DiskOp, Metrics, Skip},
    pool,
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
use store::{Accepted, Store};
use tokio::sync::mpsc;
use walk::Stop;

/// What a blob that waits to be written costs beside its bytes; bounds the number of empty ones too.
const WAITS: u64 = 256;

/// How long the end waits for the tier's threads: for what still waits to be written.
const FLUSH: Duration = Duration::from_secs(10);

/// Blobs on disk. Dropping it closes it; see [`Self::close`].
pub struct Disk {
    store: Arc<Store>,
    behind: WriteBehind,
    /// Dropped first of all when the tier closes.
    stop: Mutex<Option<Sender<Infallible>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A blob that waits to be written.
type Waiting = (Verified<Bytes>, Accepted);

/// All that wait.
struct WriteBehind {
    /// None once the tier closes.
    queue: Mutex<Option<Sender<Waiting>>>,
    /// `disk.write_behind`.
    capacity: u64,
    /// How much of it is taken.
    used: Arc<AtomicU64>,
}

impl WriteBehind {
    /// Takes so much of `disk.write_behind`; false if that is not there.
    fn take(&self, bytes: u64) -> bool {
        let within = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.capacity);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }
}

impl Disk {
    /// Takes the directory and serves at once, while the index fills in the background. Blocks, but not for longer than `disk.timeout` if
    /// the file system does not answer. Whatever the scrub finds rotten is told to
    /// `rotten`: it is gone from here by then, and may be fetched anew. With `rotten` full it is not told, and the next get fetches it.
    ///
    /// # Errors
    /// The directory cannot be used, or another process uses it, or its file system hangs. The text names it.
    pub fn open(config: &config::Disk, metrics: Arc<Metrics>, rotten: mpsc::Sender<Digest>) -> io::Result<Arc<Self>> {
        let store = Arc::new(begin(config, metrics)?);
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let (queue, waiting) = crossbeam_channel::unbounded();
        let used = Arc::new(AtomicU64::new(0));
        let rate = config.scrub_rate.get();
        // Nobody waits for its end: it holds nothing, and the file system may keep it.
        spawn("disk-space", {
            let (root, metrics, stop) = (config.path.clone(), store.metrics.clone(), Stop(stopped.clone()));
            move || space::keep_looking(&root, &metrics, &stop)
        })?;
        let threads = vec![
            spawn("disk-walk", {
                let (store, stop) = (store.clone(), Stop(stopped.clone()));
                move || {
                    walk::scan(&store, &stop);
                    walk::scrub(&store, &stop, rate, &rotten);
                }
            })?,
            spawn("disk-janitor", {
                let store = store.clone();
                move || sweep_until(&store, &stopped)
            })?,
            spawn("disk-write", {
                let (store, used) = (store.clone(), used.clone());
                move || write_behind(&store, &waiting, &used)
            })?,
        ];
        let behind = WriteBehind { queue: Mutex::new(Some(queue)), capacity: config.write_behind.get(), used };
        Ok(Arc::new(Self { store, behind, stop: Mutex::new(Some(stop)), threads: Mutex::new(threads) }))
    }

    /// The blob, open for reading, if it is kept here. Asks the index, and opens the file on another thread unless it is open. Until
    /// the scan is done, a blob that is not in the index is looked for on the disk too.
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
        opened.inspect_err(|undone| self.store.undone(DiskOp::Open, *undone)).ok().flatten()
    }

    /// Whether the file system answers, as far as is known. That it does not has been told.
    pub fn answers(&self) -> bool {
        self.store.may_read()
    }

    /// How the tier is, and since when; none if it has always been so.
    pub fn state(&self) -> (DiskState, Option<SystemTime>) {
        self.store.state()
    }

    /// `disk.path`.
    pub fn path(&self) -> &Path {
        self.store.root()
    }

    /// Whether [`Self::find`] would look for the blob on the disk and should find it there. Touches no file.
    pub fn offers(&self, digest: &Digest) -> bool {
        self.store.has(digest) && self.store.may_read()
    }

    /// The blob's size, if the index has it. Touches no file, so it may still prove to be gone.
    pub fn knows(&self, digest: &Digest) -> Option<u64> {
        self.store.size_of(digest)
    }

    /// The blob's size. Looks where [`Self::find`] does.
    pub async fn stat(&self, digest: &Digest) -> Option<u64> {
        match self.knows(digest) {
            None if self.store.is_scanning() => Some(self.find(digest).await?.size()),
            known => known,
        }
    }

    /// Whether a blob of this size may be kept now: it fits, and the disk lets itself be written to.
    pub fn takes(&self, size: u64) -> bool {
        self.store.takes(size)
    }

    /// As [`Self::keeps`], and counts what is turned away for the disk's sake: ask it of a blob that is on its way here.
    pub fn admits(&self, digest: &Digest, size: u64) -> bool {
        self.store.admits(digest, size)
    }

    /// Whether this blob, of this size, would be kept now. As [`Self::takes`]; and a very large one must have been asked for before.
    pub fn keeps(&self, digest: &Digest, size: u64) -> bool {
        self.store.keeps(digest, size)
    }

    /// Counts one get, whether or not the blob is here: what is asked for often stays.
    pub fn count(&self, digest: &Digest) {
        self.store.count(digest);
    }

    /// A new file in the tier's directory for a blob that is on its way, holding `parts`; none if it could not be written.
    pub async fn file(&self, parts: Vec<Bytes>) -> Option<DiskFile> {
        let store = self.store.clone();
        let made = self.store.writes.run(move || store.temp()).await;
        match made.inspect_err(|undone| self.store.undone(DiskOp::Write, *undone)).ok().and_then(Result::ok) {
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

    /// Keeps a blob that was spooled into a file of this tier: a rename. What is forgotten between this call and the end of the
    /// future is not kept, so call it where nothing can come between the decision to keep and the call. Ends within `disk.timeout`.
    pub fn keep_file(&self, blob: Verified<DiskFile>) -> impl Future<Output = ()> + Send + use<> {
        let (store, digest, size) = (self.store.clone(), blob.digest(), blob.size());
        let (accepted, file) = (store.accept(&digest), blob.into_content());
        async move {
            if file.size() != size {
                tracing::error!(%digest, size, written = file.size(), "a spooled blob is not as long as what was verified, and is not kept");
                return;
            }
            place(store, digest, file, accepted).await;
        }
    }

    /// Keeps a blob from memory, later: the caller waits for nothing. With `disk.write_behind` full it is not kept.
    pub fn keep_later(&self, blob: Verified<Bytes>) {
        if self.store.has(&blob.digest()) || !self.store.admits(&blob.digest(), blob.size()) {
            return;
        }
        if !self.behind.take(cost(&blob)) {
            return self.store.metrics.disk_skipped(Skip::Queue);
        }
        if let Some(queue) = &*self.behind.queue.lock() {
            let accepted = self.store.accept(&blob.digest());
            queue.send((blob, accepted)).ok();
        }
    }

    /// Drops a blob, also if it waits to be written. It is not found any more when this ends. Its file is gone, unless the file system
    /// does not answer: then it goes when that does.
    pub async fn forget(&self, digest: &Digest) {
        let (store, digest) = (self.store.clone(), *digest);
        store.disown(&digest);
        let forgotten = Arc::new(AtomicBool::new(false));
        let forget = {
            let (store, forgotten) = (store.clone(), forgotten.clone());
            move || {
                store.forget(&digest);
                forgotten.store(true, Ordering::Release);
            }
        };
        if let Err(undone) = self.store.writes.run(forget.clone()).await {
            store.undone(DiskOp::Remove, undone);
            // A purge is not a thing to give up. If it is done by now, to do it again costs a neighbour at most.
            if !forgotten.load(Ordering::Acquire) {
                store.writes.insist(forget);
            }
        }
    }

    /// Writes what still waits to be written, which is at most `disk.write_behind`, and ends the tier's threads. What is kept is still
    /// found after that, but nothing is kept behind the client's back any more. Blocks, for a while at most: a thread that the file
    /// system keeps is left to it.
    pub fn close(&self) {
        drop(self.stop.lock().take());
        drop(self.behind.queue.lock().take());
        let threads: Vec<_> = self.threads.lock().drain(..).collect();
        let end = Instant::now() + FLUSH;
        for thread in threads {
            while !thread.is_finished() {
                if Instant::now() >= end {
                    tracing::warn!("the disk does not answer, and what still waited to be written there is not kept");
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
            if thread.join().is_err() {
                tracing::error!("a thread of the disk tier panicked");
            }
        }
        // Copies of uploads that are on their way.
        while self.behind.used.load(Ordering::Relaxed) > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its state now. `hits` are counted by the cache, which alone knows what was a get.
    pub fn stats(&self, hits: u64) -> TierStats {
        self.store.stats(hits)
    }
}

#[cfg(test)]
impl Disk {
    /// Keeps a blob from memory, and waits for it.
    pub(crate) async fn keep_now(&self, blob: Verified<Bytes>) {
        let (store, accepted) = (self.store.clone(), self.store.accept(&blob.digest()));
        let kept = self.store.writes.run(move || store.keep(&blob, accepted)).await;
        kept.inspect_err(|undone| self.store.undone(DiskOp::Write, *undone)).ok();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.close();
    }
}

/// Gives a file that holds all of a blob its name, within `disk.timeout`.
async fn place(store: Arc<Store>, digest: Digest, file: DiskFile, accepted: Accepted) {
    let placing = store.clone();
    if let Err(undone) = store.writes.run(move || placing.place(&digest, file, accepted)).await {
        store.undone(DiskOp::Write, undone);
        store.metrics.disk_skipped(Skip::Timeout);
    }
}

/// Takes the directory, on a thread that may be lost to it. However long that takes, there must be progress within each `disk.timeout`.
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
                    "disk.path: {path}: the file system does not answer within disk.timeout ({timeout:?}); look at what it is mounted from"
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        pool::may_wait_here();
        work();
    })
}

/// The janitor: deletes the files of evicted blobs.
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

/// Writes what waits, until the tier closes and nothing waits any more.
fn write_behind(store: &Arc<Store>, waiting: &Receiver<Waiting>, used: &AtomicU64) {
    for (blob, accepted) in waiting {
        store.writes.watch(|| store.keep(&blob, accepted));
        let cost = cost(&blob);
        drop(blob);
        used.fetch_sub(cost, Ordering::Relaxed);
    }
}

fn cost(blob: &Verified<Bytes>) -> u64 {
    blob.size().saturating_add(WAITS)
}
