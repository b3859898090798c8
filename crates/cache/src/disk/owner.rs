//! Whose directory it is: one process at a time.
//!
//! The lock is one on the file `lock`. It holds for the file and not for its name, so where somebody deletes the directory under a running
//! castier, a second one could make it anew, lock its own `lock`, and both would write. Hence two looks:
//!
//! 1. Who has locked the file looks whether the name still leads to it. If not, it was deleted in between, and the next try is made.
//! 2. Who is about to name or delete a file looks whether the name still leads to the file that it has locked. If there is no such name, it
//!    makes and locks the file anew, and goes on. If that is another's, the directory is lost: nothing is written there any more.
//!
//! Between the second look and what is done then, another may take the directory. What can come of it is a sound blob too many or too few
//! in a cache.

use parking_lot::Mutex;
use std::{
    fs::{self, File, Metadata, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// How often the lock is tried when its file goes away meanwhile.
const TRIES: usize = 10;

/// A directory that is this process's.
pub(super) struct Owner {
    root: PathBuf,
    /// The file system that the directory is on. Directories are not made anew on another: there the right one is not mounted.
    device: u64,
    /// Dropped, it gives the directory free.
    lock: Mutex<File>,
    /// Another process has taken the directory.
    lost: AtomicBool,
}

impl Owner {
    /// Makes the directory this process's.
    ///
    /// # Errors
    /// It cannot be used, or is another's. The text names it.
    pub(super) fn take(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root).map_err(|error| told(root, &format!("cannot be created: {error}"), &error))?;
        let unusable = |error: io::Error| told(root, &format!("cannot be written to: {error}"), &error);
        let lock = match lock(root) {
            Ok(lock) => lock,
            Err(TryLockError::WouldBlock) => {
                let error = io::ErrorKind::ResourceBusy.into();
                return Err(told(root, "another process uses this directory; give each castier one of its own", &error));
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

    /// Looks whether the directory is this process's still, and makes it so if it is nobody's. Blocks.
    pub(super) fn holds(&self) -> bool {
        if self.is_lost() {
            return false;
        }
        let mut held = self.lock.lock();
        if leads_to(&self.root, &held) {
            return true;
        }
        if !self.may_remake() {
            return false;
        }
        match fs::create_dir_all(&self.root).map_err(TryLockError::Error).and_then(|()| lock(&self.root)) {
            Ok(lock) => {
                *held = lock;
                tracing::warn!(path = %self.root.display(), "the disk tier's directory was deleted under it; it goes on with an empty one");
                true
            }
            Err(TryLockError::WouldBlock) => {
                self.lost.store(true, Ordering::Relaxed);
                tracing::error!(
                    path = %self.root.display(),
                    "the disk tier's directory was deleted, and another process has taken its place: this one uses it no more. Give each \
                     castier a disk.path of its own, and restart this one"
                );
                false
            }
            Err(TryLockError::Error(_)) => false,
        }
    }

    /// Whether what is missing may be made anew: it is on the same file system.
    pub(super) fn may_remake(&self) -> bool {
        let there = self.root.ancestors().filter(|path| !path.as_os_str().is_empty()).find_map(|path| fs::metadata(path).ok());
        !self.is_lost() && there.or_else(|| fs::metadata(".").ok()).is_some_and(|there| there.dev() == self.device)
    }
}

/// An error of the directory, in words.
pub(super) fn told(root: &Path, what: &str, error: &io::Error) -> io::Error {
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

/// Whether the name of the lock's file leads to this one.
fn leads_to(root: &Path, file: &File) -> bool {
    let identity = |metadata: io::Result<Metadata>| metadata.ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let ours = identity(file.metadata());
    ours.is_some() && ours == identity(fs::symlink_metadata(root.join("lock")))
}
