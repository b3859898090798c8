//! How the tier is, in one word, and since when.

use parking_lot::Mutex;
use std::time::SystemTime;

/// The tier at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskState {
    /// It takes blobs and gives them.
    #[default]
    Ok,
    /// It gives them.
    ReadOnly,
    /// Its file system does not answer, or its directory is another's now.
    NotAnswering,
}

/// What can be wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Reads hang.
    Reads,
    /// Writes and deletions hang.
    Writes,
    /// Writes fail.
    ReadOnly,
    /// The directory is another process's.
    Lost,
}

#[derive(Default)]
pub(super) struct Troubles(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// By [`Trouble`].
    troubles: [bool; 4],
    state: DiskState,
    since: Option<SystemTime>,
}

impl Troubles {
    /// Some trouble has begun, or is over.
    pub(super) fn set(&self, trouble: Trouble, there: bool) {
        let mut known = self.0.lock();
        known.troubles[trouble as usize] = there;
        let [reads, writes, read_only, lost] = known.troubles;
        let state = match (reads || writes || lost, read_only) {
            (true, _) => DiskState::NotAnswering,
            (false, true) => DiskState::ReadOnly,
            (false, false) => DiskState::Ok,
        };
        if state != known.state {
            (known.state, known.since) = (state, Some(SystemTime::now()));
        }
    }

    pub(super) fn state(&self) -> (DiskState, Option<SystemTime>) {
        let known = self.0.lock();
        (known.state, known.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_trouble_is_told_since_it_began() {
        let tier = Troubles::default();
        assert_eq!(tier.state(), (DiskState::Ok, None));
        tier.set(Trouble::Reads, false);
        assert_eq!(tier.state(), (DiskState::Ok, None), "nothing has changed");
        tier.set(Trouble::ReadOnly, true);
        let (state, since) = tier.state();
        assert!(state == DiskState::ReadOnly && since.is_some());
        tier.set(Trouble::ReadOnly, true);
        assert_eq!(tier.state(), (state, since), "it goes on");
        for trouble in [Trouble::Reads, Trouble::Writes, Trouble::Lost] {
            tier.set(trouble, true);
            assert_eq!(tier.state().0, DiskState::NotAnswering, "{trouble:?}");
            tier.set(trouble, false);
            assert_eq!(tier.state().0, DiskState::ReadOnly, "{trouble:?}");
        }
        tier.set(Trouble::ReadOnly, false);
        assert!(tier.state().0 == DiskState::Ok && tier.state().1 >= since);
    }
}
