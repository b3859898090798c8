//! File descriptors: how many the system grants, who gets them, and how it shows that they have run out.
//!
//! Connections get what the rest leaves, so that a client too many is refused in words: an `accept` that fails leaves it waiting.
//! What runs out all the same is a limit like any other ([`Limit::Files`](castier_cache::Limit::Files)).

use castier_config::{Castier, Limits, OriginUrl};
use castier_serverkit::open_files;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// What castier holds open at all times: listeners, logs, the runtime.
const OWN: u64 = 64;
/// Connections over the limit are held for as long as it takes to tell them so: at most this many.
const REFUSALS: u64 = 1024;
/// Connections to one source that are kept alive while nobody uses them: those of fills and those of relays.
const IDLE: u64 = 512;

/// Who gets the descriptors. Each kind has a share of its own, so that none can take what another needs: the admin listener's clients, other
/// nodes, the disk tier's files, fills. The rest is for clients, and for what relays and streamed uploads open on their behalf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// All there are.
    granted: u64,
    /// Files of the disk tier that stay open between reads.
    pub open_files: u64,
    /// Connections over the limit that are waited for until they have read that they are.
    refusals: u64,
    /// Connections from other nodes.
    peers: u64,
    /// Connections to the admin listener.
    admin: u64,
    /// What relays and streamed uploads take for each connection that they open.
    each: u64,
    /// Client connections, and what is opened on their behalf.
    clients: u64,
}

impl Shares {
    /// Divides `granted` descriptors: as configured if they suffice, and else so that nothing goes without.
    pub fn of(granted: u64, config: &Castier) -> Self {
        let open_files = config.disk.as_ref().map_or(0, |disk| disk.open_files).min(granted / 8);
        let fills = fills(config).min(granted / 4);
        let refusals = REFUSALS.min(granted / 16);
        let peers = config.cluster.as_ref().map_or(0, |_| config.limits.max_peer_connections as u64).min(granted / 8);
        let admin = (config.limits.max_admin_connections as u64).min(granted / 16);
        let clients = (granted - OWN.min(granted / 8) - open_files - fills - refusals - peers - admin).max(1);
        Self { granted, open_files, refusals, peers, admin, each: each(config), clients }
    }

    /// The limits that can be kept: these, with as many connections as there are descriptors for.
    pub fn within(&self, limits: &Limits) -> Limits {
        let most = |share: u64| usize::try_from(share).unwrap_or(usize::MAX).max(1);
        Limits {
            max_connections: limits.max_connections.min(most(self.clients)),
            max_peer_connections: if self.peers == 0 {
                limits.max_peer_connections
            } else {
                limits.max_peer_connections.min(most(self.peers))
            },
            max_admin_connections: limits.max_admin_connections.min(most(self.admin)),
            ..limits.clone()
        }
    }

    /// Says so if there are fewer connections than configured.
    pub fn tell(&self, config: &Castier) {
        let limits = &config.limits;
        let wanted = limits.max_connections as u64;
        let possible = self.within(limits);
        if possible != *limits {
            let open_files = config.disk.as_ref().map_or(0, |disk| disk.open_files);
            let peers = config.cluster.as_ref().map_or(0, |_| limits.max_peer_connections as u64);
            let needed = wanted + peers + limits.max_admin_connections as u64 + REFUSALS + open_files + fills(config) + OWN;
            open_files::log_too_few(self.granted, Some(needed), self.clients);
        }
    }
}

/// What is open on behalf of clients.
pub struct Descriptors {
    shares: Shares,
    /// Connections that relays and streamed uploads have opened.
    outgoing: AtomicU64,
}

/// A connection that may be opened on behalf of a client; given back on drop.
pub struct Outgoing(Arc<Descriptors>);

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.0.outgoing.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Descriptors {
    /// Nothing is open yet.
    pub fn new(shares: Shares) -> Arc<Self> {
        Arc::new(Self { shares, outgoing: AtomicU64::new(0) })
    }

    /// How many connections over the limit are told so at once.
    pub fn refusals(&self) -> usize {
        usize::try_from(self.shares.refusals).unwrap_or(usize::MAX)
    }

    /// Whether so many client connections fit beside what relays and uploads have open.
    pub fn has_room(&self, connections: usize) -> bool {
        self.open(connections as u64) <= self.shares.clients
    }

    /// Whether the descriptors kept for refusals suffice to tell this one, too.
    pub fn may_refuse(&self, connections: usize) -> bool {
        self.open(connections as u64) <= self.shares.clients + self.shares.refusals
    }

    /// Whether a client that has been told no may keep its connection until it has read that. A client that comes now needs an answer more.
    pub fn may_linger(&self, connections: u64) -> bool {
        self.open(connections) <= self.shares.clients / 4 * 3
    }

    /// Takes the descriptors of a connection on behalf of one of so many clients. An eighth is left for clients that come now: they can
    /// then be answered, if only with a 503.
    pub fn outgoing(self: &Arc<Self>, connections: u64) -> Option<Outgoing> {
        self.outgoing.fetch_add(1, Ordering::Relaxed);
        let taken = Outgoing(self.clone());
        (self.open(connections) <= self.shares.clients - self.shares.clients / 8).then_some(taken)
    }

    fn open(&self, connections: u64) -> u64 {
        connections + self.outgoing.load(Ordering::Relaxed) * self.shares.each
    }
}

/// What a connection to the origin takes: its own descriptor, and with an embedded origin the other end and a file.
const fn each(config: &Castier) -> u64 {
    if matches!(config.origin.url, OriginUrl::Embedded(_)) { 3 } else { 1 }
}

/// What all fills together may hold open: a connection and a file each, and an embedded origin as much again; in a cluster also those that
/// peers ask for, and those from each peer. And small requests to the origin, which need no file here, and connections that are kept alive.
fn fills(config: &Castier) -> u64 {
    let each = each(config);
    let peers = config.cluster.as_ref().map_or(0, |cluster| 1 + (cluster.peers.len() as u64).saturating_sub(1).max(1));
    let (fills, requests) = (config.fill.max_in_flight as u64, config.origin.max_requests as u64);
    fills * (each + 1) + requests * each + peers * (2 * fills + requests) + IDLE * (each + 1) / 2
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
            let held = connections + shares.refusals + shares.open_files + shares.admin;
            prop_assert!(held < granted, "{held} of {granted}");
            prop_assert!(!disk || shares.open_files > 0);
            // A quarter at most is kept for the fills, and as much for castier's own.
            prop_assert!(connections == max as u64 || connections >= granted / 4 , "{connections} of {granted}");
        }
    }

    #[test]
    fn relays_leave_room_for_an_answer() {
        let shares = Shares::of(2048, &Castier { origin: remote(), ..Castier::default() });
        let descriptors = Descriptors::new(shares);
        let mut held = Vec::new();
        // A client each.
        while let Some(connection) = descriptors.outgoing(held.len() as u64 + 1) {
            held.push(connection);
        }
        assert!(held.len() > 300 && descriptors.has_room(held.len() + 100), "{}", held.len());
        held.clear();
        assert!(descriptors.outgoing(1).is_some());
    }

    fn remote() -> castier_config::Origin {
        castier_config::Origin { url: OriginUrl::Remote("http://127.0.0.1:1".parse().unwrap()), ..castier_config::Origin::default() }
    }
}
