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

/// Says in the log that fewer clients are let in than configured. `needed` is how many open files would be enough, if that is known.
pub fn log_too_few(granted: u64, needed: Option<u64>, connections: u64) {
    tracing::info!(
        granted,
        needed,
        connections,
        "the system grants fewer open files than limits.max_connections needs, so fewer clients are let in; raise its hard limit \
         (ulimit -Hn, LimitNOFILE=)"
    );
}
