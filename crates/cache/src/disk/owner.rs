//! The lock of the tier's directory. Between [`Owner::holds`] and what is done then, another process may take the directory. What can come
//! of that is a sound blob too many or too few in a cache.

use castier_directory_lock::{DirectoryLock, Held, Lost, Unavailable};
use std::{
    io,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

/// A directory that is this process's.
pub(super) struct Owner {
    lock: DirectoryLock,
    /// Another process has taken the directory.
    lost: AtomicBool,
}

impl Owner {
    /// Makes the directory this process's.
    ///
    /// # Errors
    /// It cannot be used, or is another's. The text names it.
    pub(super) fn take(root: &Path) -> io::Result<Self> {
        let lock = DirectoryLock::take(root).map_err(|unavailable| match unavailable {
            Unavailable::NotCreated(error) => told(root, &format!("cannot be created: {error}"), &error),
            Unavailable::NotWritable(error) => told(root, &format!("cannot be written to: {error}"), &error),
            Unavailable::InUse => {
                let error = io::ErrorKind::ResourceBusy.into();
                told(root, "another process uses this directory; give each castier one of its own", &error)
            }
        })?;
        Ok(Self { lock, lost: AtomicBool::new(false) })
    }

    /// Whether another process has taken the directory.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Looks whether the directory is this process's still, and makes it so if it is nobody's. Blocks.
    pub(super) fn holds(&self) -> bool {
        if self.is_lost() {
            return false;
        }
        let path = self.lock.path().display();
        match self.lock.check() {
            Ok(Held::Still) => true,
            Ok(Held::MadeAnew) => {
                tracing::warn!(%path, "the disk tier's directory was deleted under it; it goes on with an empty one");
                true
            }
            Err(Lost::Taken) => {
                self.lost.store(true, Ordering::Relaxed);
                tracing::error!(
                    %path,
                    "the disk tier's directory was deleted, and another process has taken its place: this one uses it no more. Give each \
                     castier a disk.path of its own, and restart this one"
                );
                false
            }
            Err(Lost::Unmounted | Lost::Failed(_)) => false,
        }
    }

    /// Whether what is missing may be made anew: it is on the same file system.
    pub(super) fn may_remake(&self) -> bool {
        !self.is_lost() && self.lock.is_mounted()
    }
}

/// An error of the directory, in words.
pub(super) fn told(root: &Path, what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("disk.path: {}: {what}", root.display()))
}
