//! One process at a time per directory.
//!
//! The lock is on the file `lock` in the directory. The kernel locks the file, not its name, so a deleted directory is a race:
//!
//! 1. Process A has locked `lock`. Somebody deletes the directory.
//! 2. Process B makes the directory anew, with a `lock` of its own, and locks that.
//! 3. Both believe that they own the directory, and both write.
//!
//! So a process that has locked the file checks that the name still leads to it, and tries again if not. And a process that is about to
//! change the directory checks once more ([`DirectoryLock::check`]). If the file is gone, it makes and locks a new one. If the file is
//! another's, it must write no more.

use parking_lot::Mutex;
use rustix::fs::OFlags;
use std::{
    fs::{self, File, Metadata, TryLockError},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// How often to try while the file that was locked is deleted meanwhile.
const TRIES: usize = 10;

/// A directory that belongs to this process while this value lives.
#[derive(Debug)]
pub struct DirectoryLock {
    path: PathBuf,
    /// The file system that the directory is on. It is never made anew on another: then the right one is not mounted.
    device: u64,
    file: Mutex<File>,
}

/// Why a directory cannot be locked at the start.
#[derive(Debug)]
pub enum Unavailable {
    /// It is missing and cannot be created.
    NotCreated(io::Error),
    /// It cannot be written to.
    NotWritable(io::Error),
    /// Another process uses it.
    InUse,
}

/// What [`DirectoryLock::check`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The directory is still this process's.
    Still,
    /// It was deleted; this process has made an empty one, and owns that.
    MadeAnew,
}

/// Why a directory no longer belongs to this process.
#[derive(Debug)]
pub enum Lost {
    /// Its file system is not mounted any more.
    Unmounted,
    /// It was deleted, and another process uses the new one.
    Taken,
    /// It was deleted, and cannot be made anew.
    Failed(io::Error),
}

impl DirectoryLock {
    /// Locks a directory, which is created if it is missing.
    ///
    /// # Errors
    /// See [`Unavailable`].
    pub fn take(path: &Path) -> Result<Self, Unavailable> {
        fs::create_dir_all(path).map_err(Unavailable::NotCreated)?;
        let file = lock(path).map_err(|error| match error {
            TryLockError::WouldBlock => Unavailable::InUse,
            TryLockError::Error(error) => Unavailable::NotWritable(error),
        })?;
        let device = fs::metadata(path).map_err(Unavailable::NotWritable)?.dev();
        Ok(Self { path: path.to_owned(), device, file: Mutex::new(file) })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of the directory's file system.
    pub const fn device(&self) -> u64 {
        self.device
    }

    /// Checks that the directory still belongs to this process. If it was deleted, makes it anew and locks that. Blocks.
    ///
    /// # Errors
    /// See [`Lost`].
    pub fn check(&self) -> Result<Held, Lost> {
        let mut held = self.file.lock();
        if leads_to(&self.path, &held) {
            return Ok(Held::Still);
        }
        if !self.is_mounted() {
            return Err(Lost::Unmounted);
        }
        fs::create_dir_all(&self.path).map_err(Lost::Failed)?;
        *held = lock(&self.path).map_err(|error| match error {
            TryLockError::WouldBlock => Lost::Taken,
            TryLockError::Error(error) => Lost::Failed(error),
        })?;
        Ok(Held::MadeAnew)
    }

    /// Whether the path is still on the file system that it was on at the start, so that what is missing may be made anew.
    pub fn is_mounted(&self) -> bool {
        let there = self.path.ancestors().filter(|path| !path.as_os_str().is_empty()).find_map(|path| fs::metadata(path).ok());
        there.or_else(|| fs::metadata(".").ok()).is_some_and(|there| there.dev() == self.device)
    }
}

fn lock(directory: &Path) -> Result<File, TryLockError> {
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed();
    for _ in 0..TRIES {
        let file = File::options().create(true).truncate(false).write(true).custom_flags(flags).open(directory.join("lock"));
        let file = file.map_err(TryLockError::Error)?;
        file.try_lock()?;
        if leads_to(directory, &file) {
            return Ok(file);
        }
    }
    Err(TryLockError::WouldBlock)
}

/// Whether the name of the lock file leads to this file.
fn leads_to(directory: &Path, file: &File) -> bool {
    let identity = |metadata: io::Result<Metadata>| metadata.ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let ours = identity(file.metadata());
    ours.is_some() && ours == identity(fs::symlink_metadata(directory.join("lock")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = DirectoryLock::take(&path).unwrap();
        assert!(matches!(DirectoryLock::take(&path), Err(Unavailable::InUse)));
        assert_eq!(first.check().unwrap(), Held::Still);
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(first.check().unwrap(), Held::MadeAnew);
        assert!(matches!(DirectoryLock::take(&path), Err(Unavailable::InUse)));
        // The race of the module's text.
        fs::remove_dir_all(&path).unwrap();
        let second = DirectoryLock::take(&path).unwrap();
        assert!(matches!(first.check(), Err(Lost::Taken)));
        assert_eq!(second.check().unwrap(), Held::Still);
        drop(second);
        assert_eq!(first.check().unwrap(), Held::MadeAnew);
    }

    #[test]
    fn a_directory_that_cannot_be_had() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(DirectoryLock::take(&file.join("below")), Err(Unavailable::NotCreated(_))));
        // A lock that is a link is not followed.
        std::os::unix::fs::symlink(&file, dir.path().join("lock")).unwrap();
        assert!(matches!(DirectoryLock::take(dir.path()), Err(Unavailable::NotWritable(_))));
    }
}
