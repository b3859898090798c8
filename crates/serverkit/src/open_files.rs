//! The limit on open files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of this process as far as the system allows, and returns how many files may be open.
pub fn raise_limit() -> u64 {
    let granted = getrlimit(Resource::Nofile);
    if granted.current != granted.maximum {
        // If the system refuses, the limit stays, and the caller plans with what there is.
        setrlimit(Resource::Nofile, Rlimit { current: granted.maximum, maximum: granted.maximum }).ok();
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
