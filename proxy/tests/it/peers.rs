//! The other nodes as sources: what a node makes of a peer that is sound, lies, falls silent or is gone. The peer is the scripted origin
//! in another role, so the node is the only castier here, unless nodes have to disagree with each other.

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

/// An origin, a scripted peer, and a node that knows both.
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

    /// With a secret that both know, so that the peer can prove what it says.
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

    /// A new blob that the node or else the peer owns, and nobody holds.
    fn blob_of(&self, node: bool, size: u64) -> Blob {
        loop {
            let blob = Blob::new(size);
            let owner = self.ring.owner(&blob.digest).unwrap();
            if (self.ring.names()[owner] == self.node.name) == node {
                return blob;
            }
        }
    }

    /// A new blob that the peer owns, and the peer and the origin hold.
    fn blob(&self, size: u64) -> Blob {
        let blob = self.blob_of(false, size);
        self.origin.add(&blob);
        self.peer.add(&blob);
        blob
    }

    /// A new blob that the node owns, and the peer and the origin hold.
    fn own_blob(&self, size: u64) -> Blob {
        let blob = self.blob_of(true, size);
        self.origin.add(&blob);
        self.peer.add(&blob);
        blob
    }

    async fn errors(&self) -> u64 {
        self.node.metrics().await.total("castier_peer_errors_total")
    }

    /// Waits until the peer counts as up, whatever has been said about it before.
    async fn peer_is_up(&self) {
        eventually("the peer is up", async || {
            (self.node.metrics().await.sum("castier_cluster_peers", &[("state", "up")]) == 1).then_some(())
        })
        .await;
    }
}

/// How flights ended whose last source this was: ok, absent, error.
fn loads(books: &Metrics, source: &str) -> [u64; 3] {
    ["ok", "absent", "error"].map(|result| books.sum("castier_source_loads_total", &[("source", source), ("result", result)]))
}

/// How many blobs memory and the mirror keep.
fn kept(books: &Metrics) -> [u64; 2] {
    ["memory", "mirror"].map(|tier| books.sum("castier_tier_blobs", &[("tier", tier)]))
}
