//! Divides the process's file descriptors among their uses.
//!
//! Client connections get the descriptors that the other uses leave. So castier can accept and refuse a client too many with a 503; if
//! `accept` itself failed, the client would wait without an answer. If descriptors run out all the same, the request fails with
//! [`Limit::Files`](castier_cache::Limit::Files).

use castier_config::{Castier, Limits, OriginUrl};
use castier_serverkit::open_files;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Descriptors that castier always needs: listeners, logs, the runtime.
const OWN: u64 = 64;
/// The most connections over the limit that stay open until the client has read its 503.
const REFUSALS: u64 = 1024;
/// The most idle keep-alive connections to one source, of fills and of relays.
const IDLE: u64 = 512;

/// How many descriptors each use may have. The admin listener, peers, the disk tier's files and fills have shares of their own, so that no
/// use can starve another. Clients, and the connections that relays and streamed uploads open for them, share the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// All descriptors.
    granted: u64,
    /// Files of the disk tier that stay open between reads.
    pub open_files: u64,
    /// Connections over the limit that stay open until the client has read its 503.
    refusals: u64,
    /// Connections from peers.
    peers: u64,
    /// Connections to the admin listener.
    admin: u64,
    /// Descriptors for each connection that a relay or a streamed upload opens.
    each: u64,
    /// Client connections, and the connections opened for them.
    clients: u64,
}

impl Shares {
    /// Divides `granted` descriptors as configured. If they do not suffice, each use gets at least a part.
    pub fn of(granted: u64, config: &Castier) -> Self {
        let open_files = config.disk.as_ref().map_or(0, |disk| disk.open_files).min(granted / 8);
        let fills = fills(config).min(granted / 4);
        let refusals = REFUSALS.min(granted / 16);
        let peers = config.cluster.as_ref().map_or(0, |_| config.limits.max_peer_connections as u64).min(granted / 8);
        let admin = (config.limits.max_admin_connections as u64).min(granted / 16);
        let clients = (granted - OWN.min(granted / 8) - open_files - fills - refusals - peers - admin).max(1);
        Self { granted, open_files, refusals, peers, admin, each: each(config), clients }
    }

    /// `limits`, with the numbers of connections lowered to the descriptors that there are.
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

    /// Logs it if there are fewer descriptors than the configured connections need.
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

/// Counts the descriptors of clients.
pub struct Descriptors {
    shares: Shares,
    /// Connections that relays and streamed uploads have opened.
    outgoing: AtomicU64,
}

/// The right to open one connection for a client. Released on drop.
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

    /// The most connections over the limit that get a 503 at the same time.
    pub fn refusals(&self) -> usize {
        usize::try_from(self.shares.refusals).unwrap_or(usize::MAX)
    }

    /// Whether this many client connections fit beside the connections of relays and uploads.
    pub fn has_room(&self, connections: usize) -> bool {
        self.open(connections as u64) <= self.shares.clients
    }

    /// Whether there is a descriptor left to send one more client a 503, with this many client connections open.
    pub fn may_refuse(&self, connections: usize) -> bool {
        self.open(connections as u64) <= self.shares.clients + self.shares.refusals
    }

    /// Whether a refused client may keep its connection until it has read the answer. Returns false when descriptors are scarce: new
    /// clients need them more.
    pub fn may_linger(&self, connections: u64) -> bool {
        self.open(connections) <= self.shares.clients / 4 * 3
    }

    /// Takes the descriptors of one connection for a client, with `connections` clients connected. Returns `None` if less than an eighth of
    /// the clients' share would be left: new clients must still get an answer, if only a 503.
    pub fn outgoing(self: &Arc<Self>, connections: u64) -> Option<Outgoing> {
        self.outgoing.fetch_add(1, Ordering::Relaxed);
        let taken = Outgoing(self.clone());
        (self.open(connections) <= self.shares.clients - self.shares.clients / 8).then_some(taken)
    }

    fn open(&self, connections: u64) -> u64 {
        connections + self.outgoing.load(Ordering::Relaxed) * self.shares.each
    }
}

/// The descriptors of one connection to the origin. The server of an embedded origin needs the other end of the connection and a file too. Only relays go
/// to that server. Blobs are read from and written to its files directly, and need fewer: for them this is an upper bound.
const fn each(config: &Castier) -> u64 {
    if matches!(config.origin.url, OriginUrl::Embedded(_) | OriginUrl::Bucket(_)) { 3 } else { 1 }
}

/// The connections of ranges of large blobs, beside the one that each fill has anyway. The files of an embedded origin need none.
pub fn ahead(config: &Castier) -> u64 {
    if matches!(config.origin.url, OriginUrl::Embedded(_)) { 0 } else { castier_cache::most_ahead(&config.fill) }
}

/// The descriptors of all sources together:
/// - each fill from the origin: a connection and a file, and the embedded origin's;
/// - each range of a large blob that is read ahead: a connection;
/// - each small request to the origin: a connection, and the embedded origin's;
/// - in a cluster, the same for each peer;
/// - idle keep-alive connections.
fn fills(config: &Castier) -> u64 {
    let each = each(config);
    let peers = config.cluster.as_ref().map_or(0, |cluster| 1 + (cluster.peers.len() as u64).saturating_sub(1).max(1));
    let (fills, requests) = (config.fill.max_in_flight as u64, config.origin.max_requests as u64);
    fills * (each + 1) + ahead(config) + requests * each + peers * (2 * fills + requests) + IDLE * (each + 1) / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use castier_config::Disk;
    use proptest::prelude::*;

    #[test]
    fn with_enough_descriptors_the_configuration_holds() {
        let config = Castier { disk: Some(Disk::default()), ..Castier::default() };
        let shares = Shares::of(1 << 20, &config);
        assert_eq!(shares.open_files, 1024);
        assert_eq!(shares.within(&config.limits), config.limits);
    }

    proptest! {
        #[test]
        fn every_use_gets_a_part_and_all_fits(granted in 16u64..100_000, max in 1usize..50_000, disk: bool) {
            let config = Castier { disk: disk.then(Disk::default), ..Castier::default() };
            let shares = Shares::of(granted, &config);
            let limits = shares.within(&Limits { max_connections: max, ..Limits::default() });
            let connections = limits.max_connections as u64;
            prop_assert!((1..=max as u64).contains(&connections));
            let held = connections + shares.refusals + shares.open_files + shares.admin;
            prop_assert!(held < granted, "{held} of {granted}");
            prop_assert!(!disk || shares.open_files > 0);
            // At most a quarter is for the fills, and a quarter for castier's own.
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
