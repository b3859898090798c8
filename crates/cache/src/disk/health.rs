//! What errors of the disk mean. One that belongs to a path costs that path. One that speaks for the whole file system makes the tier
//! read-only for a while.

use super::state::{Trouble, Troubles};
use crate::metrics::{DiskError, DiskOp, Metrics};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// So many writes in a row must fail in the device before all of it is given up: one bad block is not a bad disk.
const DEVICE_FAILURES: u32 = 3;

/// The tier's turns between read-write and read-only.
pub(super) struct Health {
    /// The tier's directory, for messages.
    root: PathBuf,
    /// `disk.cooldown`.
    cooldown: Duration,
    writes: Mutex<Writes>,
    /// When a failure that belongs to one path was last told, and how many there were since.
    told: Mutex<(Option<Instant>, u64)>,
    troubles: Arc<Troubles>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Writes {
    /// While read-only: until when at least. Still set after that, until a write has worked.
    until: Option<Instant>,
    /// Failures of the device since a write has worked.
    device_failures: u32,
}

impl Health {
    pub(super) fn new(root: PathBuf, cooldown: Duration, troubles: Arc<Troubles>, metrics: Arc<Metrics>) -> Self {
        Self { root, cooldown, writes: Mutex::default(), told: Mutex::default(), troubles, metrics }
    }

    /// Whether a write may be tried. Once a cool-down is over the next write finds out whether it was long enough.
    pub(super) fn may_write(&self) -> bool {
        self.writes.lock().until.is_none_or(|until| Instant::now() >= until)
    }

    /// Work on `path` failed.
    pub(super) fn failed(&self, op: DiskOp, path: &Path, error: &io::Error) {
        let kind = kind(error);
        self.metrics.disk_error(op, kind);
        if matches!(op, DiskOp::Write | DiskOp::Remove) && self.speaks_for_all(kind) {
            self.stop_writing(kind, error);
        } else {
            self.tell_of(op, path, kind, error);
        }
    }

    /// Whether the error is one of the whole file system.
    fn speaks_for_all(&self, kind: DiskError) -> bool {
        match kind {
            DiskError::Full | DiskError::Quota | DiskError::ReadOnly => true,
            DiskError::Io => {
                let mut writes = self.writes.lock();
                writes.device_failures = writes.device_failures.saturating_add(1);
                writes.device_failures >= DEVICE_FAILURES
            }
            _ => false,
        }
    }

    /// Read-only from now on, and told once.
    fn stop_writing(&self, kind: DiskError, error: &io::Error) {
        let turned = {
            let mut writes = self.writes.lock();
            let now = Instant::now();
            let (turned, over) = (writes.until.is_none(), writes.until.is_some_and(|until| now >= until));
            if turned || over {
                writes.until = Some(now + self.cooldown);
            }
            turned
        };
        if turned {
            self.troubles.set(Trouble::ReadOnly, true);
            tracing::warn!(
                %error, path = %self.root.display(), cooldown = ?self.cooldown, advice = advice(kind),
                "the disk tier cannot write and is read-only for now; it goes on serving, and tries again after disk.cooldown"
            );
        }
    }

    /// A write worked.
    pub(super) fn worked(&self) {
        let recovered = {
            let mut writes = self.writes.lock();
            // One that was under way when another failed proves nothing.
            let recovered = writes.until.is_some_and(|until| Instant::now() >= until);
            if recovered {
                writes.until = None;
            }
            if writes.until.is_none() {
                writes.device_failures = 0;
            }
            recovered
        };
        if recovered {
            self.troubles.set(Trouble::ReadOnly, false);
            tracing::info!(path = %self.root.display(), "the disk tier can write again");
        }
    }

    /// One path failed. Told once per cool-down, with how many there were.
    fn tell_of(&self, op: DiskOp, path: &Path, kind: DiskError, error: &io::Error) {
        let since = {
            let mut told = self.told.lock();
            told.1 += 1;
            if told.0.is_some_and(|at| at.elapsed() < self.cooldown) {
                return;
            }
            told.0 = Some(Instant::now());
            std::mem::take(&mut told.1)
        };
        let cost = if op == DiskOp::Write { "the blob is not kept there" } else { "the blob is fetched anew" };
        tracing::warn!(
            %error, path = %path.display(), failures = since, advice = advice(kind),
            "a path of the disk tier cannot be used, and {cost}; the rest of the tier goes on"
        );
    }
}

/// What an operator can do.
const fn advice(kind: DiskError) -> &'static str {
    match kind {
        DiskError::Full => "make room, or lower disk.capacity to what the file system holds",
        DiskError::Quota => "raise the quota of this user, or lower disk.capacity to it",
        DiskError::ReadOnly => "the kernel's log says why the file system is read-only; mount it read-write again",
        DiskError::Io => "the device fails: look at the kernel's log, and replace it",
        DiskError::Files => "raise the limit of open files, or lower disk.open_files",
        DiskError::TooLarge => "raise the limit on the size of files (ulimit -f, LimitFSIZE=), or lower limits.max_blob",
        DiskError::Denied => "give this user the right to read and write the path and its directory",
        DiskError::Path => "something that is no blob is at the path or on the way to it; move it away",
        DiskError::Timeout | DiskError::Busy => "look at the kernel's log and at what the file system is mounted from",
        DiskError::Other => "the error says what is wrong",
    }
}

pub(super) fn kind(error: &io::Error) -> DiskError {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC) => DiskError::Full,
        Some(Errno::DQUOT) => DiskError::Quota,
        Some(Errno::ROFS) => DiskError::ReadOnly,
        Some(Errno::IO) => DiskError::Io,
        Some(Errno::MFILE | Errno::NFILE) => DiskError::Files,
        Some(Errno::FBIG) => DiskError::TooLarge,
        Some(Errno::ACCESS | Errno::PERM) => DiskError::Denied,
        Some(Errno::ISDIR | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::NOTEMPTY | Errno::EXIST | Errno::NXIO) => {
            DiskError::Path
        }
        _ => DiskError::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_its_kind() {
        let table = [
            (Errno::NOSPC, DiskError::Full),
            (Errno::DQUOT, DiskError::Quota),
            (Errno::ROFS, DiskError::ReadOnly),
            (Errno::IO, DiskError::Io),
            (Errno::MFILE, DiskError::Files),
            (Errno::NFILE, DiskError::Files),
            (Errno::FBIG, DiskError::TooLarge),
            (Errno::PERM, DiskError::Denied),
            (Errno::ACCESS, DiskError::Denied),
            (Errno::ISDIR, DiskError::Path),
            (Errno::LOOP, DiskError::Path),
            (Errno::NODEV, DiskError::Other),
        ];
        for (errno, reason) in table {
            assert_eq!(kind(&errno.into()), reason, "{errno:?}");
        }
        assert_eq!(kind(&io::ErrorKind::Other.into()), DiskError::Other);
    }

    fn health() -> Health {
        Health::new("x".into(), Duration::from_secs(3600), Arc::default(), Arc::new(Metrics::new(&Default::default()).unwrap()))
    }

    fn write_failed(health: &Health, errno: Errno) {
        health.failed(DiskOp::Write, Path::new("x/ab/cd"), &errno.into());
    }

    #[test]
    fn turns_are_counted_from_the_first_failure() {
        let health = health();
        assert!(health.may_write());
        write_failed(&health, Errno::NOSPC);
        assert!(!health.may_write());
        // A write that began before the failure says nothing of the disk as it is now.
        health.worked();
        assert!(!health.may_write());
        let health = Health { cooldown: Duration::ZERO, ..health };
        health.writes.lock().until = Some(Instant::now());
        assert!(health.may_write());
        health.worked();
        assert!(health.writes.lock().until.is_none());
    }

    #[test]
    fn what_belongs_to_a_path_stops_nothing_else() {
        let health = health();
        for errno in [Errno::ACCESS, Errno::ISDIR, Errno::NOTDIR, Errno::LOOP, Errno::NAMETOOLONG, Errno::FBIG, Errno::MFILE] {
            (0..10).for_each(|_| write_failed(&health, errno));
            assert!(health.may_write(), "{errno:?}");
        }
        // One bad block does not either, but a device that fails again and again does.
        for _ in 1..DEVICE_FAILURES {
            write_failed(&health, Errno::IO);
            assert!(health.may_write());
        }
        health.worked();
        write_failed(&health, Errno::IO);
        assert!(health.may_write());
        (1..DEVICE_FAILURES).for_each(|_| write_failed(&health, Errno::IO));
        assert!(!health.may_write());
    }
}
