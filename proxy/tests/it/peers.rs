//! Peers as sources: a node with a peer that is healthy, sends wrong bytes, stalls or is down. The peer is the scripted origin in another role,
//! so the node is the only real castier, except in tests of nodes that disagree.

mod answers;
mod course;
mod faults;
mod uploads;

use crate::support::{
    Blob, KIB, LyingOrigin, MIB,
    cluster::{Node, SECRET},
    eventually,
    stats::Metrics,
};
use castier_cluster::Ring;
use std::time::Duration;

/// Small: verified before the first byte. Large: streamed.
const SMALL: u64 = 300 * KIB;
const LARGE: u64 = 4 * MIB;
/// `cluster.stall_timeout` here.
const STALL: Duration = Duration::from_millis(1200);

/// An origin, a scripted peer, and a node with both as sources.
struct World {
    origin: LyingOrigin,
    peer: LyingOrigin,
    node: Node,
    ring: Ring,
}

impl World {
    async fn new() -> Self {
        Self::with("cluster.peek_for = \"0s\"").await
    }

    async fn with(config: &str) -> Self {
        Self::around(LyingOrigin::start().await, config, false).await
    }

    /// With a shared secret, so that the peer can prove its answers.
    async fn with_secret(config: &str) -> Self {
        Self::around(LyingOrigin::with_secret(SECRET).await, config, true).await
    }

    async fn around(peer: LyingOrigin, config: &str, secret: bool) -> Self {
        let origin = LyingOrigin::start().await;
        let stall = STALL.as_millis();
        let mut node = Node::new(&origin.url(), &format!("cluster.stall_timeout = \"{stall}ms\"\n{config}"));
        if secret {
            node.add_secret(SECRET);
        }
        let names = [node.name.clone(), peer.addr.to_string()];
        node.configure(&names);
        node.start().await;
        Self { origin, peer, node, ring: Ring::new(names.map(|name| (name, 1))) }
    }

    /// A new blob that the node or the peer owns, and that no source has.
    fn blob_of(&self, node: bool, size: u64) -> Blob {
        loop {
            let blob = Blob::new(size);
            let owner = self.ring.owner(&blob.digest).unwrap();
            if (self.ring.names()[owner] == self.node.name) == node {
                return blob;
            }
        }
    }

    /// A new blob that the peer owns, and that the peer and the origin have.
    fn blob(&self, size: u64) -> Blob {
        let blob = self.blob_of(false, size);
        self.origin.add(&blob);
        self.peer.add(&blob);
        blob
    }

    /// A new blob that the node owns, and that the peer and the origin have.
    fn own_blob(&self, size: u64) -> Blob {
        let blob = self.blob_of(true, size);
        self.origin.add(&blob);
        self.peer.add(&blob);
        blob
    }

    async fn errors(&self) -> u64 {
        self.node.metrics().await.total("castier_peer_errors_total")
    }

    /// Waits until the peer counts as up.
    async fn peer_is_up(&self) {
        eventually("the peer is up", async || {
            (self.node.metrics().await.sum("castier_cluster_peers", &[("state", "up")]) == 1).then_some(())
        })
        .await;
    }
}

/// The results of flights with this last source: ok, absent, error.
fn loads(books: &Metrics, source: &str) -> [u64; 3] {
    ["ok", "absent", "error"].map(|result| books.sum("castier_source_loads_total", &[("source", source), ("result", result)]))
}

/// The number of blobs in memory and in the mirror.
fn kept(books: &Metrics) -> [u64; 2] {
    ["memory", "mirror"].map(|tier| books.sum("castier_tier_blobs", &[("tier", tier)]))
}
