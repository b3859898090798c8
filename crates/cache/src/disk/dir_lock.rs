//! Makes sure that only one process uses the directory. Another process may still take the directory right after [`DirLock::still_held`]. The
//! worst result is one valid blob too many or too few in the cache.

use castier_directory_lock::{DirectoryLock, Held, Lost, Unavailable};
use std::{
    io,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

/// The lock on a directory. Dropping it unlocks.
pub(super) struct DirLock {
    lock: DirectoryLock,
    /// Another process has taken the directory.
    lost: AtomicBool,
}

impl DirLock {
    /// Creates the directory if necessary, and locks it. Blocks.
    ///
    /// # Errors
    /// The directory cannot be used, or another process uses it. The text names the directory.
    pub(super) fn take(root: &Path) -> io::Result<Self> {
        let lock = DirectoryLock::take(root).map_err(|unavailable| match unavailable {
            Unavailable::NotCreated(error) => describe(root, &format!("cannot be created: {error}"), &error),
            Unavailable::NotWritable(error) => describe(root, &format!("cannot be written to: {error}"), &error),
            Unavailable::InUse => {
                let error = io::ErrorKind::ResourceBusy.into();
                describe(root, "another process uses this directory; give each castier its own", &error)
            }
        })?;
        Ok(Self { lock, lost: AtomicBool::new(false) })
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
        let path = self.lock.path().display();
        match self.lock.check() {
            Ok(Held::Still) => true,
            Ok(Held::MadeAnew) => {
                tracing::warn!(%path, "the disk tier's directory was deleted while in use; the tier goes on with an empty one");
                true
            }
            Err(Lost::Taken) => {
                self.lost.store(true, Ordering::Relaxed);
                tracing::error!(
                    %path,
                    "the disk tier's directory was deleted, and another process has taken its place; this process keeps nothing on disk any \
                     more. Give each castier its own disk.path, and restart this one"
                );
                false
            }
            Err(Lost::Unmounted | Lost::Failed(_)) => false,
        }
    }

    /// Whether missing directories may be created: the directory is not lost, and its path is still on the same file system.
    pub(super) fn may_recreate(&self) -> bool {
        !self.is_lost() && self.lock.is_mounted()
    }
}

/// An error whose text names the key and the directory.
pub(super) fn describe(root: &Path, what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("disk.path: {}: {what}", root.display()))
}
