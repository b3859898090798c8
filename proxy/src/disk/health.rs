//! Whether the tier may write. A write that fails costs a cache entry, and nothing is written for a while.

use crate::metrics::{Metrics, WriteError};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

/// The tier's turns between read-write and read-only.
pub(super) struct Health {
    /// The tier's directory, for messages.
    root: PathBuf,
    /// `disk.cooldown`.
    cooldown: Duration,
    /// While read-only: until when at least. Still set after that, until a write has worked.
    until: Mutex<Option<Instant>>,
    /// When a failure to open a file for reading was last told.
    told: Mutex<Option<Instant>>,
    metrics: Arc<Metrics>,
}

impl Health {
    pub(super) fn new(root: PathBuf, cooldown: Duration, metrics: Arc<Metrics>) -> Self {
        Self { root, cooldown, until: Mutex::new(None), told: Mutex::new(None), metrics }
    }

    /// Whether a write may be tried. Once a cool-down is over the next write finds out whether it was long enough.
    pub(super) fn may_write(&self) -> bool {
        self.until.lock().is_none_or(|until| Instant::now() >= until)
    }

    /// A write failed: read-only from now on, and told once.
    pub(super) fn failed(&self, error: &io::Error) {
        self.metrics.disk_write_error(kind(error));
        let mut until = self.until.lock();
        let now = Instant::now();
        let (turned, over) = (until.is_none(), until.is_some_and(|until| now >= until));
        if turned || over {
            *until = Some(now + self.cooldown);
        }
        if turned {
            tracing::warn!(
                %error, path = %self.root.display(), cooldown = ?self.cooldown,
                "the disk tier cannot write and is read-only for now; it goes on serving, and tries again after disk.cooldown. \
                 Make room, or lower disk.capacity to what the file system holds"
            );
        }
    }

    /// A write worked.
    pub(super) fn worked(&self) {
        let mut until = self.until.lock();
        // One that was under way when another failed proves nothing.
        if until.is_some_and(|until| Instant::now() >= until) {
            *until = None;
            tracing::info!(path = %self.root.display(), "the disk tier can write again");
        }
    }

    /// A file that may well be sound could not be opened for reading. Told once per cool-down.
    pub(super) fn could_not_open(&self, error: &io::Error) {
        let mut told = self.told.lock();
        if told.is_none_or(|at| at.elapsed() >= self.cooldown) {
            *told = Some(Instant::now());
            tracing::warn!(%error, path = %self.root.display(), "the disk tier cannot open its files; the blobs are fetched anew");
        }
    }
}

fn kind(error: &io::Error) -> WriteError {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC) => WriteError::Full,
        Some(Errno::DQUOT) => WriteError::Quota,
        Some(Errno::ROFS) => WriteError::ReadOnly,
        Some(Errno::IO) => WriteError::Io,
        Some(Errno::MFILE | Errno::NFILE) => WriteError::Files,
        _ => WriteError::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_its_reason() {
        let table = [
            (Errno::NOSPC, WriteError::Full),
            (Errno::DQUOT, WriteError::Quota),
            (Errno::ROFS, WriteError::ReadOnly),
            (Errno::IO, WriteError::Io),
            (Errno::MFILE, WriteError::Files),
            (Errno::NFILE, WriteError::Files),
            (Errno::PERM, WriteError::Other),
        ];
        for (errno, reason) in table {
            assert_eq!(kind(&errno.into()), reason, "{errno:?}");
        }
        assert_eq!(kind(&io::ErrorKind::Other.into()), WriteError::Other);
    }

    #[test]
    fn turns_are_counted_from_the_first_failure() {
        let health = Health::new("x".into(), Duration::from_secs(3600), Arc::new(Metrics::new().unwrap()));
        assert!(health.may_write());
        health.failed(&Errno::NOSPC.into());
        assert!(!health.may_write());
        // A write that began before the failure says nothing of the disk as it is now.
        health.worked();
        assert!(!health.may_write());
        let health = Health { cooldown: Duration::ZERO, ..health };
        *health.until.lock() = Some(Instant::now());
        assert!(health.may_write());
        health.worked();
        assert!(health.until.lock().is_none());
    }
}
