//! The durable store: one file per blob, no HTTP.
//!
//! ```text
//! <root>/lock            held exclusively: one process per root
//! <root>/ab/cd/abcd…     a blob, under its whole digest
//! <root>/tmp/            uploads in progress; the next start removes what a crash left here
//! <root>/quarantine/     blobs whose bytes rotted, and directories that stood at a blob's path
//! ```
//!
//! What is no regular file at a blob's path (a directory, a link, a pipe) is no blob: it is absent, and an upload moves it out of the way.
//!
//! A blob appears under its name by a rename, after its bytes were verified and reached the disk, so a name either has
//! all of its bytes or does not exist. It is acknowledged after the rename reached the disk too.
//!
//! Everything here blocks: call it off the async threads.

use bytes::Bytes;
use castier_blob::{Digest, Mismatch, Sink, Verified, Verifier};
use parking_lot::Mutex;
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
};
use tempfile::NamedTempFile;

pub(crate) use reader::Reader;

mod reader;
mod root;

use root::Root;

/// Directories at each level of the fan-out: one per value of a byte.
const FAN_OUT: usize = 256;

/// Why the store could not do as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The bytes are not the blob they were sent as.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The disk, or the quota on it, is used up.
    #[error("the disk is full: {0}")]
    Full(io::Error),
    /// The stored bytes are no longer the blob they were.
    #[error("the stored bytes of {digest} are damaged")]
    Rotten {
        /// The blob they were.
        digest: Digest,
        /// Nobody noticed before: of many who read a rotten blob at the same time, one.
        found: bool,
    },
    /// The same of an entry.
    #[error("the stored bytes of {name} are damaged")]
    RottenEntry {
        /// Its name.
        name: String,
        /// As above.
        found: bool,
    },
    /// Anything else that the file system says.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // The last is a limit on the size of files, most often of this process: this file does not fit.
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Self::Full(error),
            _ => Self::Io(error),
        }
    }
}

/// A directory of blobs, owned by this process while this value lives.
pub(crate) struct Store {
    /// Held for as long as this value lives.
    root: Root,
    tmp: PathBuf,
    quarantine: PathBuf,
    /// What is known of the directories below `<root>/ab`, by `ab`. The lock orders renames and removals of the blobs
    /// there, so that "was it there before" and the totals are exact; it is never held while bytes are written.
    shards: Box<[Mutex<Shard>]>,
    totals: Totals,
}

/// What is known of `<root>/ab/cd`, by `cd`.
struct Shard {
    /// Its name, and its parent's, are on disk. Asked anew in each run: a directory that exists may have been made by a
    /// run that was killed before it got to say so to the disk.
    durable: [bool; FAN_OUT],
    /// Its blobs are in the totals. Until then changes to it must not touch them: the count will see their outcome.
    counted: [bool; FAN_OUT],
}

/// What is stored, as far as [`Store::count`] has come.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) blobs: AtomicI64,
    pub(crate) bytes: AtomicI64,
}

impl Totals {
    fn add(&self, size: u64) {
        self.blobs.fetch_add(1, Relaxed);
        self.bytes.fetch_add(size.cast_signed(), Relaxed);
    }

    fn subtract(&self, size: u64) {
        self.blobs.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(size.cast_signed(), Relaxed);
    }
}

/// A blob that has been acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// It was not there before.
    pub(crate) new: bool,
}

impl Store {
    /// Takes possession of `root`, which is made if it is missing.
    ///
    /// # Errors
    /// When `root` cannot be written to, or another process has it. The text names `root` and says what to do.
    pub(crate) fn open(root: &Path, key: &str) -> io::Result<Self> {
        let say = |what: &str, error: &io::Error| io::Error::new(error.kind(), format!("{key}: {}: {what}: {error}", root.display()));
        let (tmp, quarantine) = (root.join("tmp"), root.join("quarantine"));
        let unwritable = |e: io::Error| say("is not writable; give this user the right to, or name another", &e);
        let held = Root::take(root, key)?;
        // Only now, with the lock held, is everything in tmp/ known to belong to nobody.
        for dir in [&tmp, &quarantine] {
            fs::create_dir_all(dir).map_err(unwritable)?;
        }
        for left_over in fs::read_dir(&tmp).map_err(unwritable)? {
            fs::remove_file(left_over?.path()).map_err(|e| say("a left-over upload in tmp/ cannot be removed", &e))?;
        }
        NamedTempFile::new_in(&tmp).map_err(unwritable)?.close().map_err(unwritable)?;
        held.sync().map_err(|e| say("cannot be synced to disk", &e))?;
        let shards = (0..FAN_OUT).map(|_| Mutex::new(Shard { durable: [false; FAN_OUT], counted: [false; FAN_OUT] })).collect();
        Ok(Self { root: held, tmp, quarantine, shards, totals: Totals::default() })
    }

    pub(crate) const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Adds what lies in the store to the totals, one small directory at a time so that uploads wait for no more than that.
    ///
    /// # Errors
    /// When a directory cannot be read; the totals are then too low.
    pub(crate) fn count(&self) -> io::Result<()> {
        for (a, shard) in self.shards.iter().enumerate() {
            for b in 0..FAN_OUT {
                let mut shard = shard.lock();
                let dir = self.root.path().join(format!("{a:02x}/{b:02x}"));
                match fs::read_dir(&dir) {
                    Ok(entries) => {
                        for entry in entries {
                            let entry = entry?;
                            let metadata = entry.metadata()?;
                            if metadata.is_file() && entry.file_name().to_str().is_some_and(|name| name.parse::<Digest>().is_ok()) {
                                self.totals.add(metadata.len());
                            }
                        }
                    }
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
                shard.counted[b] = true;
            }
        }
        Ok(())
    }

    /// Opens a blob for reading; none if it is not here.
    pub(crate) fn open_blob(self: &Arc<Self>, digest: &Digest) -> Result<Option<Blob>, Fault> {
        let opened = open_blob_in(self.root.path(), digest)?;
        Ok(opened.map(|(file, size)| Blob { store: Arc::clone(self), digest: *digest, file, size }))
    }

    /// The size of a blob that is here *and* would outlive a power cut: what an upload that need not be sent is acknowledged with.
    /// (It may be visible already while the upload that brought it has still to sync the rename.)
    pub(crate) fn holds_durably(&self, digest: &Digest) -> Result<Option<u64>, Fault> {
        let path = self.path(digest);
        let Some(size) = size_of(&path)? else { return Ok(None) };
        let [a, b, ..] = *digest.as_bytes();
        let dir = self.dir(a, b);
        self.make_durable(&dir, &mut self.shards[usize::from(a)].lock().durable[usize::from(b)])?;
        sync_dir(&dir)?;
        Ok(Some(size))
    }

    /// Begins an upload of the blob `claimed`, or, if none, of any. Dropped before [`Upload::finish`], it leaves nothing behind.
    pub(crate) fn begin(self: &Arc<Self>, claimed: Option<Digest>) -> Result<Upload, Fault> {
        let make = || tempfile::Builder::new().prefix("upload-").permissions(fs::Permissions::from_mode(0o644)).tempfile_in(&self.tmp);
        let temp = make().or_else(|error| match error.kind() {
            ErrorKind::NotFound => {
                self.make_again()?;
                make()
            }
            _ => Err(error),
        })?;
        let verifier = match claimed {
            Some(digest) => Verifier::of(digest, TempFile(temp)),
            None => Verifier::any(TempFile(temp)),
        };
        Ok(Upload { store: Arc::clone(self), verifier })
    }

    /// Removes a blob; false if it was not here.
    pub(crate) fn remove(&self, digest: &Digest) -> Result<bool, Fault> {
        let path = self.path(digest);
        let [a, b, ..] = *digest.as_bytes();
        {
            let shard = self.shards[usize::from(a)].lock();
            let Some(size) = size_of(&path)? else { return Ok(false) };
            self.root.hold()?;
            fs::remove_file(&path)?;
            if shard.counted[usize::from(b)] {
                self.totals.subtract(size);
            }
        }
        sync_dir(&self.dir(a, b))?;
        Ok(true)
    }

    /// Gives verified, synced bytes their name. Replaces what has that name already: those bytes may have rotted, these have not.
    fn place(&self, blob: Verified<NamedTempFile>) -> Result<Kept, Fault> {
        let (digest, size) = (blob.digest(), blob.size());
        let [a, b, ..] = *digest.as_bytes();
        let (path, dir) = (self.path(&digest), self.dir(a, b));
        let before = {
            let mut shard = self.shards[usize::from(a)].lock();
            if !self.root.hold()? {
                self.make_again()?;
            }
            self.make_durable(&dir, &mut shard.durable[usize::from(b)])?;
            let before = size_of(&path)?;
            blob.into_content().persist(&path).or_else(|failed| {
                self.make_way(&digest, &path)?;
                failed.file.persist(&path).map_err(|e| e.error)
            })?;
            if shard.counted[usize::from(b)] {
                before.inspect(|size| self.totals.subtract(*size));
                self.totals.add(size);
            }
            before
        };
        sync_dir(&dir)?;
        Ok(Kept { digest, size, new: before.is_none() })
    }

    /// Makes `<root>/ab/cd` if need be, and sees to it that a power cut would not take it away.
    fn make_durable(&self, dir: &Path, durable: &mut bool) -> io::Result<()> {
        match fs::create_dir(dir) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            made => {
                *durable = false;
                match made {
                    Err(e) if e.kind() == ErrorKind::NotFound => fs::create_dir_all(dir)?,
                    made => made?,
                }
            }
        }
        if !*durable {
            dir.parent().map_or(Ok(()), sync_dir)?;
            sync_dir(self.root.path())?;
            *durable = true;
        }
        Ok(())
    }

    /// Makes the directories anew that somebody has deleted under this store.
    fn make_again(&self) -> io::Result<()> {
        self.root.hold()?;
        for dir in [&self.tmp, &self.quarantine] {
            fs::create_dir_all(dir)?;
        }
        self.root.sync()
    }

    /// Moves out of a blob's way what no file can replace: a directory.
    fn make_way(&self, digest: &Digest, path: &Path) -> io::Result<()> {
        if !fs::symlink_metadata(path)?.is_dir() || fs::remove_dir(path).is_ok() {
            return Ok(());
        }
        let aside = (0..100).map(|n| self.quarantine.join(format!("{digest}.directory-{n}")));
        let moved = aside.filter(|aside| fs::symlink_metadata(aside).is_err()).find(|aside| fs::rename(path, aside).is_ok());
        let Some(moved) = moved else {
            let why = format!("{} is a directory, and cannot be moved to {}; move it away", path.display(), self.quarantine.display());
            return Err(io::Error::new(ErrorKind::IsADirectory, why));
        };
        tracing::warn!(
            path = %path.display(), moved = %moved.display(),
            "a directory stood where a blob belongs, and was moved away for an upload; delete it if nobody misses it"
        );
        Ok(())
    }

    /// Sets a rotten blob aside so that it can be stored anew; false if that, or even the storing, has happened since `file` was opened.
    fn set_aside(&self, digest: &Digest, file: &File) -> io::Result<bool> {
        let path = self.path(digest);
        let [a, b, ..] = *digest.as_bytes();
        let shard = self.shards[usize::from(a)].lock();
        let read = file.metadata()?;
        let there = match fs::symlink_metadata(&path) {
            Ok(there) => there,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        };
        if (there.dev(), there.ino()) != (read.dev(), read.ino()) {
            return Ok(false);
        }
        self.root.hold()?;
        fs::rename(&path, self.quarantine.join(digest.to_string()))?;
        if shard.counted[usize::from(b)] {
            self.totals.subtract(there.len());
        }
        Ok(true)
    }

    fn dir(&self, a: u8, b: u8) -> PathBuf {
        self.root.path().join(format!("{a:02x}/{b:02x}"))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        path_in(self.root.path(), digest)
    }
}

/// A blob opened for reading. It stays readable when the name is replaced or removed meanwhile.
pub(crate) struct Blob {
    store: Arc<Store>,
    digest: Digest,
    file: File,
    size: u64,
}

impl Blob {
    /// Its length on disk.
    pub(crate) const fn size(&self) -> u64 {
        self.size
    }
}

/// An upload in progress: a file in `tmp/` that vanishes with this value.
pub(crate) struct Upload {
    store: Arc<Store>,
    verifier: Verifier<TempFile>,
}

/// A file in `tmp/` that a blob or an entry is written to while it is hashed.
pub(crate) struct TempFile(pub(crate) NamedTempFile);

impl Sink for TempFile {
    type Content = NamedTempFile;
    type Error = io::Error;

    fn write(&mut self, bytes: &Bytes) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn close(self) -> NamedTempFile {
        self.0
    }
}

impl Upload {
    /// Takes the next bytes.
    pub(crate) fn write(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        Ok(self.verifier.write(bytes)?)
    }

    /// Verifies the bytes and makes them durable under their name.
    pub(crate) fn finish(self) -> Result<Kept, Fault> {
        let verified = self.verifier.finish()?;
        verified.content().as_file().sync_all()?;
        self.store.place(verified)
    }
}

/// Whether this is a name in the root that is neither a blob's nor the entries'.
pub(crate) fn is_own(name: &str) -> bool {
    matches!(name, "lock" | "tmp" | "quarantine")
}

/// Opens a blob in the store at `root`, whose lock another process may hold. Also returns its size; none if it is not there.
pub(crate) fn open_blob_in(root: &Path, digest: &Digest) -> Result<Option<(File, u64)>, Fault> {
    let Some(file) = root::open_file(&path_in(root, digest))? else { return Ok(None) };
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata.len())))
}

fn path_in(root: &Path, digest: &Digest) -> PathBuf {
    let [a, b, ..] = *digest.as_bytes();
    root.join(format!("{a:02x}/{b:02x}/{digest}"))
}

/// Makes renames, creations and removals in a directory outlive a power cut.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The size of the file at the path; none if there is none, or if it is no file.
fn size_of(path: &Path) -> io::Result<Option<u64>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests;
