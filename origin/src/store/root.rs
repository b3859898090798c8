//! The root of the store: its lock, and how its directories reach the disk.

use castier_directory_lock::{DirectoryLock, Held, Lost, Unavailable};
use rustix::{fs::OFlags, io::Errno};
use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

/// The root of a store, which is this process's while this value lives.
pub(super) struct Root(DirectoryLock);

impl Root {
    /// Takes possession of the directory, which is made if it is missing. Errors name `key`, the key of the configuration that names the directory.
    pub(super) fn take(path: &Path, key: &str) -> io::Result<Self> {
        let say = |what: &str, error: &io::Error| io::Error::new(error.kind(), format!("{key}: {}: {what}: {error}", path.display()));
        let lock = DirectoryLock::take(path).map_err(|unavailable| match unavailable {
            Unavailable::NotCreated(e) => say("cannot be made; make it, or name another", &e),
            Unavailable::NotWritable(e) => say("is not writable; give this user the right to, or name another", &e),
            Unavailable::InUse => io::Error::new(
                ErrorKind::WouldBlock,
                format!("{key}: {}: another process is using it; stop that one, or name another", path.display()),
            ),
        })?;
        Ok(Self(lock))
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Sees to it that the root is this process's still; false if it was deleted, and had to be made anew.
    pub(super) fn hold(&self) -> io::Result<bool> {
        let held = self.0.check().map_err(|lost| match lost {
            Lost::Unmounted => io::Error::new(ErrorKind::NotFound, "the store root's file system is not mounted any more"),
            Lost::Taken => io::Error::new(
                ErrorKind::ResourceBusy,
                "the store root was deleted, and another process has taken its place; this one changes nothing there any more. Stop one of them",
            ),
            Lost::Failed(e) => e,
        })?;
        if held == Held::MadeAnew {
            tracing::warn!(root = %self.path().display(), "the store root was deleted under this process; it goes on with an empty one");
        }
        Ok(held == Held::Still)
    }

    /// Makes the root outlive a power cut, with all directories that lead to it: who made them may not have said so to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        super::sync_dir(self.path())?;
        for above in fs::canonicalize(self.path())?.ancestors().skip(1) {
            // A directory that may not be read was not made by this user.
            match super::sync_dir(above) {
                Err(e) if e.kind() == ErrorKind::PermissionDenied => break,
                synced => synced?,
            }
            if fs::metadata(above)?.dev() != self.0.device() {
                break;
            }
        }
        Ok(())
    }
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
