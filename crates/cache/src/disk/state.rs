//! The state of the tier, for `/stats` and the status page, and since when it holds.

use parking_lot::Mutex;
use std::time::SystemTime;

/// The state of the tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskState {
    /// The tier reads and writes.
    #[default]
    Ok,
    /// The tier reads, and does not write.
    ReadOnly,
    /// The file system does not answer, or another process has taken the directory.
    NotAnswering,
}

/// A cause that makes the tier degraded. Several can hold at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Degraded {
    /// Reads hang.
    ReadsHang,
    /// Writes and deletions hang.
    WritesHang,
    /// Writes fail.
    ReadOnly,
    /// Another process has taken the directory.
    DirectoryLost,
}

/// Derives the [`DiskState`] from all causes that hold.
#[derive(Default)]
pub(super) struct StateTracker(Mutex<Tracked>);

#[derive(Default)]
struct Tracked {
    /// Which causes hold, indexed by [`Degraded`].
    causes: [bool; 4],
    state: DiskState,
    since: Option<SystemTime>,
}

impl StateTracker {
    /// Records that a cause holds from now on, or no longer holds.
    pub(super) fn set(&self, cause: Degraded, holds: bool) {
        let mut tracked = self.0.lock();
        tracked.causes[cause as usize] = holds;
        let [reads, writes, read_only, lost] = tracked.causes;
        let state = match (reads || writes || lost, read_only) {
            (true, _) => DiskState::NotAnswering,
            (false, true) => DiskState::ReadOnly,
            (false, false) => DiskState::Ok,
        };
        if state != tracked.state {
            (tracked.state, tracked.since) = (state, Some(SystemTime::now()));
        }
    }

    /// The state and the time of the last change; `None` if it never changed.
    pub(super) fn state(&self) -> (DiskState, Option<SystemTime>) {
        let tracked = self.0.lock();
        (tracked.state, tracked.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_cause_decides_and_since_is_the_last_change() {
        let tier = StateTracker::default();
        assert_eq!(tier.state(), (DiskState::Ok, None));
        tier.set(Degraded::ReadsHang, false);
        assert_eq!(tier.state(), (DiskState::Ok, None), "nothing has changed");
        tier.set(Degraded::ReadOnly, true);
        let (state, since) = tier.state();
        assert!(state == DiskState::ReadOnly && since.is_some());
        tier.set(Degraded::ReadOnly, true);
        assert_eq!(tier.state(), (state, since), "nothing has changed");
        for cause in [Degraded::ReadsHang, Degraded::WritesHang, Degraded::DirectoryLost] {
            tier.set(cause, true);
            assert_eq!(tier.state().0, DiskState::NotAnswering, "{cause:?}");
            tier.set(cause, false);
            assert_eq!(tier.state().0, DiskState::ReadOnly, "{cause:?}");
        }
        tier.set(Degraded::ReadOnly, false);
        assert!(tier.state().0 == DiskState::Ok && tier.state().1 >= since);
    }
}
