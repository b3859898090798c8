//! Answers of a peer that must not end a flight. After each of these the flight continues with the next source:
//!
//! | answer | why it continues |
//! | --- | --- |
//! | a correct head, with no bytes, or with fewer or more bytes than the blob | the digest does not match, and the bytes are from the peer: the peer is at fault |
//! | a size that differs from the origin's | the size is the peer's announcement |
//! | `206` or `304` that was not requested, `416`, a coding, another range | unusable, and the peer is at fault |
//! | `404`, `410` without a proof, or in the middle of a blob | not an absence |
//! | `5xx` with an explanation | the peer is healthy and cannot help |
//! | no proof | not castier: see `peer_proof.rs` |
//! | cut, reset, no answer, garbage | see `faults.rs` |
//! | none, since all permits for it are in use | the peer is busy; the same for a peer's 503 |
//!
//! Only wrong bytes that were partly sent to clients end a flight and cut its answers: see `faults::wrong_bytes_that_have_begun_to_leave_are_cut`.

use super::{LARGE, SMALL, World, loads};
use crate::support::{Blob, Gate, Lie, LyingOrigin, assert_ledger, client::Reply, cluster::Node, eventually, get, lie::RangeManner, light};
use castier_cluster::Ring;
use tokio::task::JoinHandle;

fn fetch(node: &Node, blob: &Blob) -> JoinHandle<Reply> {
    let (from, blob) = (node.public(), blob.clone());
    tokio::spawn(async move { get(from, &blob).await })
}

#[tokio::test]
async fn too_few_or_too_many_bytes_are_the_peers_fault() {
    let _turn = light().await;
    for size in [1, 1000, SMALL, LARGE] {
        for (what, lie) in [
            ("no byte", Lie::honest().nothing()),
            ("no byte, in chunks", Lie::honest().nothing().chunked()),
            ("no byte, and closed", Lie::honest().nothing().close_each_time()),
            ("one byte more", Lie::honest().wrong_length(size + 1).too_much(1)),
            ("one byte more, in chunks", Lie::honest().chunked().too_much(1)),
            ("one byte less", Lie::honest().wrong_length(size - 1).truncate(size - 1)),
        ] {
            let world = World::new().await;
            let blob = world.blob(size);
            // What has begun to leave is cut, so this is about what has not: see the table.
            if size == LARGE && !what.starts_with("no byte") {
                continue;
            }
            world.peer.always(&blob, lie);
            get(world.node.public(), &blob).await.assert_is(&blob);
            let books = assert_ledger(world.node.castier()).await;
            assert_eq!(
                (books.corrupt("origin"), loads(&books, "origin"), loads(&books, "peer")),
                (0, [1, 0, 0], [0, 0, 0]),
                "{what}, {size}"
            );
            assert!(books.total("castier_peer_errors_total") >= 1, "{what}, {size}");
            assert!(world.peer.gets(&blob) <= 2, "{what}, {size}: asked {} times", world.peer.gets(&blob));
        }
    }
}

#[tokio::test]
async fn no_status_of_a_peer_ends_a_flight() {
    let _turn = light().await;
    let world = World::new().await;
    for status in [
        201, 202, 203, 204, 205, 206, 226, 300, 304, 307, 400, 401, 403, 404, 405, 410, 412, 413, 416, 417, 421, 422, 429, 451, 500, 501,
        507, 511, 599,
    ] {
        for castier in [false, true] {
            if castier && status == 404 {
                continue;
            }
            world.peer_is_up().await;
            let blob = world.blob(SMALL);
            let lie = if castier { Lie::honest().castiers(status) } else { Lie::honest().status(status) };
            world.peer.always(&blob, lie);
            let reply = get(world.node.public(), &blob).await;
            assert_eq!(reply.status, 200, "{status} {castier}");
            reply.assert_is(&blob);
            assert_eq!(world.origin.gets(&blob), 1, "{status} {castier}");
        }
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((books.corrupt("origin"), books.corrupt("peer")), (0, 0));
}

/// The owner, the next peer in order, and a node after both.
struct Two {
    origin: LyingOrigin,
    peers: [LyingOrigin; 2],
    node: Node,
    ring: Ring,
}

impl Two {
    async fn with(config: &str) -> Self {
        let (origin, peers) = (LyingOrigin::start().await, [LyingOrigin::start().await, LyingOrigin::start().await]);
        let mut node = Node::new(&origin.url(), &format!("cluster.peek_for = \"0s\"\n{config}"));
        let names = [node.name.clone(), peers[0].addr.to_string(), peers[1].addr.to_string()];
        node.configure(&names);
        node.start().await;
        Self { origin, peers, node, ring: Ring::new(names.map(|name| (name, 1))) }
    }

    /// A blob that all have. The first peer owns it and the second is next, or the other way round.
    fn blob(&self, first: usize, size: u64) -> Blob {
        let names = [&self.peers[first], &self.peers[1 - first]].map(|peer| peer.addr.to_string());
        let begins =
            |blob: &Blob| self.ring.order(&blob.digest).take(2).map(|at| self.ring.names()[at].clone()).collect::<Vec<_>>() == names;
        let blob = std::iter::repeat_with(|| Blob::new(size)).find(begins).unwrap();
        [&self.origin, &self.peers[0], &self.peers[1]].iter().for_each(|source| source.add(&blob));
        blob
    }

    /// Takes the only permit for this peer until the gate opens.
    async fn fill_up(&self, peer: usize, gate: &Gate) -> JoinHandle<Reply> {
        let blob = self.blob(peer, SMALL);
        let before = gate.arrived();
        self.peers[peer].filling(&blob, true);
        self.peers[peer].next(&blob, [Lie::honest().hold(gate)]);
        let client = fetch(&self.node, &blob);
        eventually("the permit is taken", async || (gate.arrived() > before).then_some(())).await;
        client
    }
}

#[tokio::test]
async fn full_permits_at_a_peer_move_a_flight_on() {
    let _turn = light().await;
    let config = "fill.max_in_flight = 1\nfill.max_wait = \"500ms\"\ncluster.stall_timeout = \"10s\"";
    // Before a byte: the first is full, and the second is not.
    let (two, gate) = (Two::with(config).await, Gate::new());
    let held = two.fill_up(0, &gate).await;
    let blob = two.blob(0, SMALL);
    get(two.node.public(), &blob).await.assert_is(&blob);
    assert_eq!((two.peers[0].gets(&blob), two.peers[1].gets(&blob), two.origin.gets(&blob)), (0, 1, 0));
    // Both are full.
    let second = two.fill_up(1, &gate).await;
    let blob = two.blob(0, SMALL);
    get(two.node.public(), &blob).await.assert_is(&blob);
    assert_eq!((two.peers[0].gets(&blob), two.peers[1].gets(&blob), two.origin.gets(&blob)), (0, 0, 1));
    assert_eq!(two.node.metrics().await.total("castier_peer_errors_total"), 0, "a full peer has done nothing wrong");
    gate.open();
    for client in [held, second] {
        assert_eq!(client.await.unwrap().status, 200);
    }
    assert_ledger(two.node.castier()).await;
    // In the middle of a blob: the first breaks off, and the second is full, or says that it is.
    for full in [true, false] {
        let (two, gate) = (Two::with(config).await, Gate::new());
        let held = if full { Some(two.fill_up(1, &gate).await) } else { None };
        let blob = two.blob(0, LARGE);
        two.peers[0].next(&blob, [Lie::honest().truncate(LARGE / 2)]);
        if !full {
            two.peers[1].always(&blob, Lie::honest().castiers(503));
        }
        get(two.node.public(), &blob).await.assert_is(&blob);
        assert_eq!((two.peers[0].gets(&blob), two.origin.gets(&blob)), (1, 1));
        assert!(two.origin.requests("GET", &blob)[0].range().is_some(), "where it was");
        gate.open();
        if let Some(held) = held {
            assert_eq!(held.await.unwrap().status, 200);
        }
        assert_ledger(two.node.castier()).await;
    }
}

#[tokio::test]
async fn a_size_that_is_not_the_origins_costs_the_peer_its_word() {
    let _turn = light().await;
    for (what, lie) in [
        ("twice the size, cut", Lie::honest().wrong_length(2 * SMALL).truncate(SMALL / 2)),
        ("half the size, cut", Lie::honest().wrong_length(SMALL / 2).truncate(SMALL / 4)),
        ("no size, cut", Lie::honest().chunked().truncate(SMALL / 2)),
        ("another range", Lie::honest().ranges(RangeManner::Shift(10))),
    ] {
        let world = World::new().await;
        let blob = world.blob(SMALL);
        world.peer.always(&blob, lie);
        get(world.node.public(), &blob).await.assert_is(&blob);
        let books = assert_ledger(world.node.castier()).await;
        assert_eq!(books.corrupt("origin"), 0, "{what}");
    }
}
