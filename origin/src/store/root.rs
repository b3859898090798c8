//! Whose directory it is: one process at a time.
//!
//! The lock is one on the file `lock`, and holds for the file and not for its name. Where somebody deletes the directory under a running
//! store, another process could make it anew, lock its own `lock`, and both would write. So who has locked the file looks whether the name
//! still leads to it; and who is about to change anything looks once more. Is there no such file, it is made and locked anew. Is it
//! another's, this store changes nothing any more.

use parking_lot::Mutex;
use rustix::{fs::OFlags, io::Errno};
use std::{
    fs::{self, File, Metadata, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// How often the lock is tried when its file goes away meanwhile.
const TRIES: usize = 10;

/// The root of a store, which is this process's while this value lives.
pub(super) struct Root {
    path: PathBuf,
    /// Its file system. On another it is not made anew: there the right one is not mounted.
    device: u64,
    /// Dropping it releases the root.
    lock: Mutex<File>,
}

impl Root {
    /// Takes possession of the directory, which is made if it is missing. Errors name `key`, the key of the configuration that names the directory.
    pub(super) fn take(path: &Path, key: &str) -> io::Result<Self> {
        let say = |what: &str, error: &io::Error| io::Error::new(error.kind(), format!("{key}: {}: {what}: {error}", path.display()));
        fs::create_dir_all(path).map_err(|e| say("cannot be made; make it, or name another", &e))?;
        let unwritable = |e: io::Error| say("is not writable; give this user the right to, or name another", &e);
        let lock = lock(path).map_err(|e| match e {
            TryLockError::WouldBlock => io::Error::new(
                ErrorKind::WouldBlock,
                format!("{key}: {}: another process is using it; stop that one, or name another", path.display()),
            ),
            TryLockError::Error(e) => unwritable(e),
        })?;
        let device = fs::metadata(path).map_err(unwritable)?.dev();
        Ok(Self { path: path.to_owned(), device, lock: Mutex::new(lock) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Sees to it that the root is this process's still; false if it was deleted, and had to be made anew.
    pub(super) fn hold(&self) -> io::Result<bool> {
        let mut held = self.lock.lock();
        if leads_to(&self.path, &held) {
            return Ok(true);
        }
        let there = self.path.ancestors().filter(|path| !path.as_os_str().is_empty()).find_map(|path| fs::metadata(path).ok());
        if there.or_else(|| fs::metadata(".").ok()).is_none_or(|there| there.dev() != self.device) {
            return Err(io::Error::new(ErrorKind::NotFound, "the store root's file system is not mounted any more"));
        }
        fs::create_dir_all(&self.path)?;
        *held = lock(&self.path).map_err(|e| match e {
            TryLockError::WouldBlock => io::Error::new(
                ErrorKind::ResourceBusy,
                "the store root was deleted, and another process has taken its place; this one changes nothing there any more. Stop one of them",
            ),
            TryLockError::Error(e) => e,
        })?;
        tracing::warn!(root = %self.path.display(), "the store root was deleted under this process; it goes on with an empty one");
        Ok(false)
    }

    /// Makes the root outlive a power cut, with all directories that lead to it: who made them may not have said so to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        super::sync_dir(&self.path)?;
        for above in fs::canonicalize(&self.path)?.ancestors().skip(1) {
            // A directory that may not be read was not made by this user.
            match super::sync_dir(above) {
                Err(e) if e.kind() == ErrorKind::PermissionDenied => break,
                synced => synced?,
            }
            if fs::metadata(above)?.dev() != self.device {
                break;
            }
        }
        Ok(())
    }
}

fn lock(root: &Path) -> Result<File, TryLockError> {
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed();
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

/// Opens what has a blob's path; none if that is nothing, or can be no blob. Waits for no other end of a pipe, follows no link. What is open
/// may still be no file.
pub(super) fn open_file(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::NODEV) => Ok(None),
            _ => Err(error),
        },
    }
}
