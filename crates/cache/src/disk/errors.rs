//! Classifies errors of the file system. An error that concerns one path affects only that blob. An error that concerns the whole file system
//! makes the tier read-only for `disk.cooldown`.

use super::state::{Degraded, StateTracker};
use crate::metrics::{DiskError, DiskOp, Metrics};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// The tier becomes read-only after this many device errors (`EIO`) in a row. Fewer may be one bad block.
const DEVICE_FAILURES: u32 = 3;

/// Counts and logs errors, and decides whether the tier is read-only.
pub(super) struct ErrorTracker {
    /// The tier's directory, for log lines.
    root: PathBuf,
    /// `disk.cooldown`.
    cooldown: Duration,
    writes: Mutex<WriteState>,
    /// When an error of one path was last logged, and how many there were since.
    logged: Mutex<(Option<Instant>, u64)>,
    state: Arc<StateTracker>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct WriteState {
    /// Set while read-only: the end of the cool-down. Stays set after that until a write has succeeded.
    until: Option<Instant>,
    /// Device errors since a write has succeeded.
    device_failures: u32,
}

impl ErrorTracker {
    pub(super) fn new(root: PathBuf, cooldown: Duration, state: Arc<StateTracker>, metrics: Arc<Metrics>) -> Self {
        Self { root, cooldown, writes: Mutex::default(), logged: Mutex::default(), state, metrics }
    }

    /// Whether a write may be tried. After the cool-down, the next write decides whether the tier stays read-only.
    pub(super) fn may_write(&self) -> bool {
        self.writes.lock().until.is_none_or(|until| Instant::now() >= until)
    }

    /// Records that the operation `op` on `path` failed.
    pub(super) fn record(&self, op: DiskOp, path: &Path, error: &io::Error) {
        let kind = kind(error);
        self.metrics.disk_error(op, kind);
        if matches!(op, DiskOp::Write | DiskOp::Remove) && self.concerns_file_system(kind) {
            self.stop_writing(kind, error);
        } else {
            self.log_path_error(op, path, kind, error);
        }
    }

    /// Whether the error concerns the whole file system.
    fn concerns_file_system(&self, kind: DiskError) -> bool {
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

    /// Makes the tier read-only, and logs it once.
    fn stop_writing(&self, kind: DiskError, error: &io::Error) {
        let changed = {
            let mut writes = self.writes.lock();
            let now = Instant::now();
            let (changed, over) = (writes.until.is_none(), writes.until.is_some_and(|until| now >= until));
            if changed || over {
                writes.until = Some(now + self.cooldown);
            }
            changed
        };
        if changed {
            self.state.set(Degraded::ReadOnly, true);
            tracing::warn!(
                %error, path = %self.root.display(), cooldown = ?self.cooldown, advice = advice(kind),
                "the disk tier cannot write and is read-only for now; it goes on serving, and tries again after disk.cooldown"
            );
        }
    }

    /// Records that a write succeeded.
    pub(super) fn write_succeeded(&self) {
        let recovered = {
            let mut writes = self.writes.lock();
            // During the cool-down a success proves nothing: that write may have started before the failure.
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
            self.state.set(Degraded::ReadOnly, false);
            tracing::info!(path = %self.root.display(), "the disk tier can write again");
        }
    }

    /// Logs an error of one path, at most once per cool-down, with the number of errors since the last line.
    fn log_path_error(&self, op: DiskOp, path: &Path, kind: DiskError, error: &io::Error) {
        let failures = {
            let mut logged = self.logged.lock();
            logged.1 += 1;
            if logged.0.is_some_and(|at| at.elapsed() < self.cooldown) {
                return;
            }
            logged.0 = Some(Instant::now());
            std::mem::take(&mut logged.1)
        };
        let effect = if op == DiskOp::Write { "the blob is not kept on disk" } else { "the blob is fetched again" };
        tracing::warn!(
            %error, path = %path.display(), failures, advice = advice(kind),
            "a file of the disk tier cannot be used, and {effect}; the rest of the tier goes on"
        );
    }
}

/// What the operator can do.
const fn advice(kind: DiskError) -> &'static str {
    match kind {
        DiskError::Full => "make room, or lower disk.capacity to what the file system holds",
        DiskError::Quota => "raise the quota of this user, or lower disk.capacity to it",
        DiskError::ReadOnly => "the kernel's log says why the file system is read-only; mount it read-write again",
        DiskError::Io => "the device fails: look at the kernel's log, and replace the device",
        DiskError::Files => "raise the limit of open files, or lower disk.open_files",
        DiskError::TooLarge => "raise the limit on the size of files (ulimit -f, LimitFSIZE=), or lower limits.max_blob",
        DiskError::Denied => "give this user the right to read and write the path and its directory",
        DiskError::Path => "something that is not a blob is at the path or at one of its directories; move it away",
        DiskError::Timeout | DiskError::Busy => "look at the kernel's log and at the device or server that the file system is mounted from",
        DiskError::Other => "the error says what is wrong",
    }
}

/// The `reason` of an error in metrics.
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

    fn tracker() -> ErrorTracker {
        ErrorTracker::new("x".into(), Duration::from_secs(3600), Arc::default(), Arc::new(Metrics::new(&Default::default()).unwrap()))
    }

    fn write_failed(tracker: &ErrorTracker, errno: Errno) {
        tracker.record(DiskOp::Write, Path::new("x/ab/cd"), &errno.into());
    }

    #[test]
    fn the_cool_down_starts_with_the_first_failure() {
        let tracker = tracker();
        assert!(tracker.may_write());
        write_failed(&tracker, Errno::NOSPC);
        assert!(!tracker.may_write());
        // This write may have started before the failure.
        tracker.write_succeeded();
        assert!(!tracker.may_write());
        let tracker = ErrorTracker { cooldown: Duration::ZERO, ..tracker };
        tracker.writes.lock().until = Some(Instant::now());
        assert!(tracker.may_write());
        tracker.write_succeeded();
        assert!(tracker.writes.lock().until.is_none());
    }

    #[test]
    fn an_error_of_one_path_does_not_stop_writing() {
        let tracker = tracker();
        for errno in [Errno::ACCESS, Errno::ISDIR, Errno::NOTDIR, Errno::LOOP, Errno::NAMETOOLONG, Errno::FBIG, Errno::MFILE] {
            (0..10).for_each(|_| write_failed(&tracker, errno));
            assert!(tracker.may_write(), "{errno:?}");
        }
        // One bad block does not either. A device that fails again and again does.
        for _ in 1..DEVICE_FAILURES {
            write_failed(&tracker, Errno::IO);
            assert!(tracker.may_write());
        }
        tracker.write_succeeded();
        write_failed(&tracker, Errno::IO);
        assert!(tracker.may_write());
        (1..DEVICE_FAILURES).for_each(|_| write_failed(&tracker, Errno::IO));
        assert!(!tracker.may_write());
    }
}
