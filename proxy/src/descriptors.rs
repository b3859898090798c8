//! File descriptors: how many the system grants, who gets them, and how it shows that they have run out.
//!
//! Connections get what the rest leaves, so that a client too many is refused in words: an `accept` that fails leaves it waiting.
//! What runs out all the same is a limit like any other ([`Limit::Files`](crate::fault::Limit::Files)).

use castier_config::{Castier, Limits, OriginUrl};
use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use std::error::Error;

/// What castier holds open whatever it does: listeners, logs, the runtime, scrapes.
const OWN: u64 = 64;
/// Connections over the limit are held for as long as it takes to tell them so: at most this many.
const REFUSALS: u64 = 1024;

/// Raises the limit as far as the system lets it, and says how many descriptors there may be.
pub fn raise() -> u64 {
    let granted = getrlimit(Resource::Nofile);
    if granted.current != granted.maximum {
        // Where that is refused, what is there must do.
        setrlimit(Resource::Nofile, Rlimit { current: granted.maximum, maximum: granted.maximum }).ok();
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Who gets the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// All there are.
    granted: u64,
    /// Files of the disk tier that stay open between reads.
    pub open_files: u64,
    /// Connections over the limit that are held to be told so. Beyond these they are closed without a word.
    pub refusals: u64,
    /// Client connections.
    connections: u64,
}

impl Shares {
    /// Divides `granted` descriptors: as configured if they suffice, and else so that nothing goes without.
    pub fn of(granted: u64, config: &Castier) -> Self {
        let open_files = config.disk.as_ref().map_or(0, |disk| disk.open_files).min(granted / 8);
        let fills = fills(config).min(granted / 4);
        let refusals = REFUSALS.min(granted / 16);
        let connections = (granted - OWN.min(granted / 4) - open_files - fills - refusals).max(1);
        Self { granted, open_files, refusals, connections }
    }

    /// The limits that can be kept: these, with as many connections as there are descriptors for.
    pub fn within(&self, limits: &Limits) -> Limits {
        Limits { max_connections: limits.max_connections.min(self.most()), ..limits.clone() }
    }

    /// Says so if there are fewer connections than configured.
    pub fn tell(&self, config: &Castier) {
        let wanted = config.limits.max_connections;
        if wanted > self.most() {
            let open_files = config.disk.as_ref().map_or(0, |disk| disk.open_files);
            let needed = wanted as u64 + REFUSALS + open_files + fills(config) + OWN;
            tracing::info!(
                granted = self.granted,
                needed,
                connections = self.connections,
                "the system grants fewer open files than limits.max_connections needs, so fewer clients are let in; raise its hard limit \
                 (ulimit -Hn, LimitNOFILE=)"
            );
        }
    }

    fn most(&self) -> usize {
        usize::try_from(self.connections).unwrap_or(usize::MAX)
    }
}

/// What all fills together may hold open: a connection and a file each, and an embedded origin as much again; in a cluster also those that
/// peers ask for. And small requests to the origin, which need no file here.
fn fills(config: &Castier) -> u64 {
    let origin = if matches!(config.origin.url, OriginUrl::Embedded(_)) { 2 } else { 0 };
    let each = 2 + origin + if config.cluster.is_some() { 2 } else { 0 };
    config.fill.max_in_flight as u64 * each + config.origin.max_requests as u64 * (1 + origin)
}

/// Whether this, or what caused it, is that no descriptor was left.
pub fn ran_out(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| {
        let number = error.downcast_ref().and_then(Errno::from_io_error);
        matches!(number, Some(Errno::MFILE | Errno::NFILE))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use castier_config::Disk;
    use proptest::prelude::*;

    #[test]
    fn enough_is_as_configured() {
        let config = Castier { disk: Some(Disk::default()), ..Castier::default() };
        let shares = Shares::of(1 << 20, &config);
        assert_eq!(shares.open_files, 1024);
        assert_eq!(shares.within(&config.limits), config.limits);
    }

    proptest! {
        #[test]
        fn nobody_goes_without_and_all_fits(granted in 16u64..100_000, max in 1usize..50_000, disk: bool) {
            let config = Castier { disk: disk.then(Disk::default), ..Castier::default() };
            let shares = Shares::of(granted, &config);
            let limits = shares.within(&Limits { max_connections: max, ..Limits::default() });
            let connections = limits.max_connections as u64;
            prop_assert!((1..=max as u64).contains(&connections));
            let held = connections + shares.refusals + shares.open_files;
            prop_assert!(held < granted, "{held} of {granted}");
            prop_assert!(!disk || shares.open_files > 0);
            // A quarter at most is kept for the fills, and as much for castier's own.
            prop_assert!(connections == max as u64 || connections >= granted / 4 , "{connections} of {granted}");
        }
    }

    #[test]
    fn running_out_is_told_from_anything_else() {
        #[derive(Debug, thiserror::Error)]
        #[error("somewhere")]
        struct Somewhere(#[source] std::io::Error);
        let io = |errno: Errno| std::io::Error::from(errno);
        assert!(ran_out(&io(Errno::MFILE)) && ran_out(&Somewhere(io(Errno::NFILE))));
        assert!(!ran_out(&io(Errno::CONNREFUSED)) && !ran_out(&Somewhere(std::io::Error::other("24"))));
    }
}
