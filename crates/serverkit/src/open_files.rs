//! The limit on open files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of this process as far as the system allows, and returns how many files may be open.
pub fn raise_limit() -> u64 {
    let granted = getrlimit(Resource::Nofile);
    if granted.current != granted.maximum {
        // If the system refuses, the limit stays as it is.
        setrlimit(Resource::Nofile, Rlimit { current: granted.maximum, maximum: granted.maximum }).ok();
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Logs that fewer clients are admitted than configured. `needed` is the number of open files that would suffice, if it is known.
pub fn log_too_few(granted: u64, needed: Option<u64>, connections: u64) {
    tracing::info!(
        granted,
        needed,
        connections,
        "the system grants fewer open files than limits.max_connections needs, so fewer clients are admitted; raise its hard limit \
         (ulimit -Hn, LimitNOFILE=)"
    );
}
