//! Makes sure that only one process uses the directory, by a lock on the file `lock` in it.
//!
//! The kernel locks the file, not its name. So there is a race:
//! 1. castier A holds the lock;
//! 2. somebody deletes the directory;
//! 3. castier B creates the directory and a new file `lock`, and locks that. Now both would write.
//!
//! Two checks prevent it:
//! - After locking, a process checks that the name `lock` still leads to the locked file. If not, the file was deleted in between, and the
//!   process tries again.
//! - Before it renames or deletes a file, a process does that check again. If the name does not exist, it creates and locks a new file, and
//!   goes on. If another process has locked it, the directory is lost, and this process never writes there again.
//!
//! Another process may still take the directory right after the second check. The worst result is one valid blob too many or too few in
//! the cache.

use parking_lot::Mutex;
use std::{
    fs::{self, File, Metadata, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// How often to try when the lock's file is deleted in between.
const TRIES: usize = 10;

/// The lock on a directory. Dropping it unlocks.
pub(super) struct DirLock {
    root: PathBuf,
    /// The file system of the directory. On another one nothing is created: there the right file system is not mounted.
    device: u64,
    lock: Mutex<File>,
    /// Another process has taken the directory.
    lost: AtomicBool,
}

impl DirLock {
    /// Creates the directory if necessary, and locks it. Blocks.
    ///
    /// # Errors
    /// The directory cannot be used, or another process uses it. The text names the directory.
    pub(super) fn take(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root).map_err(|error| describe(root, &format!("cannot be created: {error}"), &error))?;
        let unusable = |error: io::Error| describe(root, &format!("cannot be written to: {error}"), &error);
        let lock = match lock(root) {
            Ok(lock) => lock,
            Err(TryLockError::WouldBlock) => {
                let error = io::ErrorKind::ResourceBusy.into();
                return Err(describe(root, "another process uses this directory; give each castier its own", &error));
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        };
        let device = fs::metadata(root).map_err(unusable)?.dev();
        Ok(Self { root: root.to_owned(), device, lock: Mutex::new(lock), lost: AtomicBool::new(false) })
    }

    /// Whether another process has taken the directory.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether this process still holds the lock. If the directory was deleted, creates and locks it again. Blocks.
    pub(super) fn still_held(&self) -> bool {
        if self.is_lost() {
            return false;
        }
        let mut held = self.lock.lock();
        if leads_to(&self.root, &held) {
            return true;
        }
        if !self.may_recreate() {
            return false;
        }
        match fs::create_dir_all(&self.root).map_err(TryLockError::Error).and_then(|()| lock(&self.root)) {
            Ok(lock) => {
                *held = lock;
                tracing::warn!(path = %self.root.display(), "the disk tier's directory was deleted while in use; the tier goes on with an empty one");
                true
            }
            Err(TryLockError::WouldBlock) => {
                self.lost.store(true, Ordering::Relaxed);
                tracing::error!(
                    path = %self.root.display(),
                    "the disk tier's directory was deleted, and another process has taken its place; this process keeps nothing on disk any \
                     more. Give each castier its own disk.path, and restart this one"
                );
                false
            }
            Err(TryLockError::Error(_)) => false,
        }
    }

    /// Whether missing directories may be created: the directory is not lost, and its path is still on the same file system.
    pub(super) fn may_recreate(&self) -> bool {
        let existing = self.root.ancestors().filter(|path| !path.as_os_str().is_empty()).find_map(|path| fs::metadata(path).ok());
        !self.is_lost() && existing.or_else(|| fs::metadata(".").ok()).is_some_and(|existing| existing.dev() == self.device)
    }
}

/// An error whose text names the key and the directory.
pub(super) fn describe(root: &Path, what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("disk.path: {}: {what}", root.display()))
}

fn lock(root: &Path) -> Result<File, TryLockError> {
    let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW).bits().cast_signed();
    for _ in 0..TRIES {
        let file = File::options().create(true).truncate(false).write(true).custom_flags(flags).open(root.join("lock"));
        let file = file.map_err(TryLockError::Error)?;
        file.try_lock()?;
        if leads_to(root, &file) {
            return Ok(file);
        }
    }
    Err(TryLockError::WouldBlock)
}

/// Whether the name `lock` leads to this file.
fn leads_to(root: &Path, file: &File) -> bool {
    let identity = |metadata: io::Result<Metadata>| metadata.ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let ours = identity(file.metadata());
    ours.is_some() && ours == identity(fs::symlink_metadata(root.join("lock")))
}
