//! The order of a flight's sources: the owner, the tiers of the next peer in order, the origin. No two flights ever wait for each other.

use super::{LARGE, SMALL, World, kept, loads};
use crate::support::{
    Blob, Cluster, Gate, KIB, Lie, LyingOrigin, Request, assert_ledger, client::Reply, cluster::Node, eventually, get, heavy, light, within,
};
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, JoinSet};

fn fetch(from: std::net::SocketAddr, blob: &Blob) -> JoinHandle<Reply> {
    let blob = blob.clone();
    tokio::spawn(async move { get(from, &blob).await })
}

#[tokio::test]
async fn who_is_asked_by_a_peer_goes_to_the_origin() {
    let _turn = light().await;
    let world = World::new().await;
    let gate = Gate::new();
    // The flight reads from the peer, which holds it back: before the head, and in the middle.
    for (round, lie) in (1..).zip([Lie::honest().hold(&gate), Lie::honest().stall(LARGE / 2, &gate)]) {
        let blob = world.blob(LARGE);
        world.peer.filling(&blob, true);
        world.peer.next(&blob, [lie]);
        let client = fetch(world.node.public(), &blob);
        eventually("the peer holds it back", async || (gate.arrived() == round).then_some(())).await;
        assert_eq!(world.origin.gets(&blob), 0);
        // Another node asks this one for the same.
        let started = Instant::now();
        get(world.node.peer(), &blob).await.assert_is(&blob);
        client.await.unwrap().assert_is(&blob);
        assert!(started.elapsed() < Duration::from_secs(5), "at once: {:?}", started.elapsed());
        assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (1, 1));
        let again = get(world.node.public(), &blob).await;
        assert_eq!(again.cache_status(), "castier; hit; detail=memory", "it is this node's own now");
    }
    // A flight that a peer's request started never asks another node.
    let blob = world.blob(SMALL);
    get(world.node.peer(), &blob).await.assert_is(&blob);
    assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (0, 1));
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "origin"), loads(&books, "peer"), books.total("castier_peer_errors_total")), ([3, 0, 0], [0, 0, 0], 0));
    assert_eq!(books.total("castier_gets_from_peers_total"), 3);
    gate.open();
}

#[tokio::test]
async fn after_a_change_the_next_in_order_is_asked_for_what_it_keeps() {
    let _turn = light().await;
    let world = World::with("").await;
    let blob = world.own_blob(SMALL);
    let first = get(world.node.public(), &blob).await;
    first.assert_is(&blob);
    assert_eq!(first.cache_status(), "castier; fwd=uri-miss; stored; detail=peer");
    let seen = world.peer.requests("GET", &blob);
    assert_eq!((seen.len(), seen[0].head.header("cache-control")), (1, Some("only-if-cached")));
    assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; hit; detail=memory");
    assert_eq!(world.origin.gets(&blob), 0);
    // The peer does not have it.
    let blob = world.own_blob(SMALL);
    world.peer.next(&blob, [Lie::honest().castiers(504)]);
    assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; fwd=uri-miss; stored; detail=origin");
    assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob), world.errors().await), (1, 1, 0));
    // It breaks off.
    let blob = world.own_blob(LARGE);
    world.peer.next(&blob, [Lie::honest().truncate(LARGE / 2)]);
    get(world.node.public(), &blob).await.assert_is(&blob);
    assert_eq!((world.origin.requests("GET", &blob)[0].range().is_some(), world.errors().await), (true, 1));
    // It falls silent, and a sign that it waits would be no reason to: what is kept waits for nobody.
    let (gate, blob) = (Gate::new(), world.own_blob(SMALL));
    world.peer.filling(&blob, true);
    world.peer.next(&blob, [Lie::honest().hold(&gate)]);
    get(world.node.public(), &blob).await.assert_is(&blob);
    gate.open();
    // It lies.
    let blob = world.own_blob(SMALL);
    world.peer.next(&blob, [Lie::honest().flip_bit(5)]);
    get(world.node.public(), &blob).await.assert_is(&blob);
    assert_eq!(world.origin.gets(&blob), 1);
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "peer"), loads(&books, "origin"), kept(&books)), ([1, 0, 0], [4, 0, 0], [5, 0]));
    assert_eq!((books.corrupt("peer"), books.total("castier_peer_errors_total")), (1, 3));
}

#[tokio::test]
async fn long_after_a_change_nobody_is_asked_in_vain() {
    let _turn = light().await;
    let world = World::with("cluster.peek_for = \"10ms\"").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let blob = world.own_blob(SMALL);
    get(world.node.public(), &blob).await.assert_is(&blob);
    assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (0, 1));
}

#[tokio::test]
async fn a_node_without_a_mirror_keeps_nothing_of_others() {
    let _turn = light().await;
    let world = World::with("cluster.peek_for = \"0s\"\ncluster.mirror_share = 0.0").await;
    let blob = world.blob(SMALL);
    for round in 1..=3 {
        let reply = get(world.node.public(), &blob).await;
        reply.assert_is(&blob);
        assert_eq!((reply.cache_status(), world.peer.gets(&blob)), ("castier; fwd=uri-miss; detail=peer", round));
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "peer"), kept(&books)), ([3, 0, 0], [0, 0]));
}

#[tokio::test]
async fn a_purge_takes_the_mirror_along() {
    let _turn = light().await;
    let world = World::new().await;
    let blob = world.blob(SMALL);
    get(world.node.public(), &blob).await.assert_is(&blob);
    assert_eq!(Request::new("POST", format!("/purge/{}", blob.digest)).send(world.node.castier().admin).await.status, 200);
    assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; fwd=uri-miss; stored; detail=peer");
    // A blob that is purged while it is being loaded is not kept.
    let (gate, blob) = (Gate::new(), world.blob(SMALL));
    world.peer.next(&blob, [Lie::honest().hold(&gate)]);
    world.peer.filling(&blob, true);
    let client = fetch(world.node.public(), &blob);
    eventually("the flight is under way", async || (gate.arrived() == 1).then_some(())).await;
    assert_eq!(Request::new("POST", format!("/purge/{}", blob.digest)).send(world.node.peer()).await.status, 204);
    gate.open();
    client.await.unwrap().assert_is(&blob);
    assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; fwd=uri-miss; stored; detail=peer");
}

#[tokio::test]
async fn head_asks_the_owner_and_then_the_origin() {
    let _turn = light().await;
    let world = World::new().await;
    let head = async |blob: &Blob| Request::new("HEAD", blob.path()).send(world.node.public()).await;
    let blob = world.blob(SMALL);
    let reply = head(&blob).await;
    assert_eq!((reply.status, reply.cache_status()), (200, "castier; fwd=uri-miss; detail=peer"));
    assert_eq!(reply.header("content-length"), Some(SMALL.to_string().as_str()));
    let asked = |blob: &Blob| (world.peer.requests("HEAD", blob).len(), world.origin.requests("HEAD", blob).len());
    assert_eq!(asked(&blob), (1, 0));
    // Only the origin's answer counts.
    for (lie, status, at_origin) in [
        (Lie::honest().castiers(404), 404, 0),
        (Lie::honest().status(404), 200, 1),
        (Lie::honest().castiers(502), 200, 1),
        (Lie::honest().castiers(403), 200, 1),
        (Lie::honest().garbage(), 200, 1),
        (Lie::honest().hold(&Gate::new()), 200, 1),
    ] {
        let blob = world.blob(SMALL);
        world.peer.always(&blob, lie.clone());
        assert_eq!((head(&blob).await.status, asked(&blob)), (status, (1, at_origin)), "{lie:?}");
        world.peer_is_up().await;
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!(books.total("castier_gets_total"), 0);
}

/// Starts nodes with different lists of members: `list` has the members of each node, by index.
async fn disagreeing<const N: usize>(origin: &LyingOrigin, config: &str, list: [&[usize]; N]) -> Cluster {
    let mut cluster = Cluster { nodes: (0..N).map(|_| Node::new(&origin.url(), config)).collect() };
    let names = cluster.names();
    for (node, members) in cluster.nodes.iter().zip(list) {
        node.configure(&members.iter().map(|&member| names[member].clone()).collect::<Vec<_>>());
    }
    cluster.start_all().await;
    cluster
}

async fn from_clients(cluster: &Cluster) -> u64 {
    cluster.sum("castier_gets_total", &[]).await - cluster.sum("castier_gets_from_peers_total", &[]).await
}

/// Many clients request every blob from every node while the origin is held. Then the origin is released. Returns the origin's GETs for each blob.
async fn stampede(origin: &LyingOrigin, cluster: &Cluster, blobs: usize, each: usize, size: u64) -> Vec<usize> {
    let gate = Gate::new();
    let blobs: Vec<_> = (0..blobs).map(|_| origin.blob(size)).collect();
    blobs.iter().for_each(|blob| origin.always(blob, Lie::honest().hold(&gate)));
    let before = from_clients(cluster).await;
    let mut clients = JoinSet::new();
    for _ in 0..each {
        for blob in &blobs {
            for node in &cluster.nodes {
                let (blob, from) = (blob.clone(), node.public());
                clients.spawn(async move { get(from, &blob).await.assert_is(&blob) });
            }
        }
    }
    let asked = (cluster.nodes.len() * blobs.len() * each) as u64;
    eventually("everybody waits", async || {
        let clients = from_clients(cluster).await - before;
        (clients == asked && blobs.iter().all(|blob| origin.gets(blob) > 0)).then_some(())
    })
    .await;
    gate.open();
    within(Duration::from_secs(30), "every answer", async { while clients.join_next().await.transpose().unwrap().is_some() {} }).await;
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
    blobs.iter().map(|blob| origin.gets(blob)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_each_take_the_other_for_the_owner() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    // A stall on a busy machine would be counted as a peer's error.
    let cluster = disagreeing(&origin, "cluster.stall_timeout = \"30s\"", [&[1], &[0]]).await;
    for size in [KIB, LARGE] {
        let gets = stampede(&origin, &cluster, 20, 10, size).await;
        assert!(gets.iter().all(|gets| (1..=2).contains(gets)), "one load for each view: {gets:?}");
    }
    assert_eq!(cluster.sum("castier_peer_errors_total", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_in_a_circle() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let cluster = disagreeing(&origin, "", [&[1], &[2], &[0]]).await;
    let gets = stampede(&origin, &cluster, 20, 5, LARGE).await;
    assert!(gets.iter().all(|gets| (1..=3).contains(gets)), "one load for each view: {gets:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_held_longer_than_a_stall_sees_one_load() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let config = "cluster.stall_timeout = \"1500ms\"\ncluster.peek_for = \"0s\"";
    let cluster = Cluster::start(3, &origin.url(), config).await;
    let gate = Gate::new();
    let blobs: Vec<_> = (0..12).map(|_| origin.blob_with(SMALL, [Lie::honest().hold(&gate)])).collect();
    let mut clients = JoinSet::new();
    for blob in blobs.iter().cycle().take(120) {
        for node in &cluster.nodes {
            let (blob, from) = (blob.clone(), node.public());
            clients.spawn(async move { get(from, &blob).await.assert_is(&blob) });
        }
    }
    eventually("every owner waits for the origin", async || (gate.arrived() == blobs.len()).then_some(())).await;
    // Nothing can be waited for but time: that in which a node would have given up on another, three times over.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(blobs.iter().all(|blob| origin.gets(blob) == 1));
    gate.open();
    while clients.join_next().await.transpose().unwrap().is_some() {}
    assert!(blobs.iter().all(|blob| origin.gets(blob) == 1));
    assert_eq!(cluster.sum("castier_peer_errors_total", &[]).await, 0);
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_full_of_fills_from_each_other_do_not_wait_in_a_circle() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let config = "fill.max_in_flight = 2\nfill.max_wait = \"50s\"\ncluster.peek_for = \"0s\"";
    let cluster = Cluster::start(2, &origin.url(), config).await;
    let (started, mut clients) = (Instant::now(), JoinSet::new());
    for _ in 0..100 {
        // Whoever does not own it is asked, so that every place is first taken by a fill from the other node.
        let blob = origin.blob(20 * KIB);
        let from = cluster.nodes[1 - cluster.owner(&blob)].public();
        clients.spawn(async move { get(from, &blob).await.assert_is(&blob) });
    }
    while clients.join_next().await.transpose().unwrap().is_some() {}
    assert!(started.elapsed() < Duration::from_secs(25), "no place was waited for in vain: {:?}", started.elapsed());
    for node in &cluster.nodes {
        assert_ledger(node.castier()).await;
    }
}

#[tokio::test]
async fn a_node_that_is_not_on_the_list_asks_those_that_are() {
    let _turn = light().await;
    let (origin, first, second) = (LyingOrigin::start().await, LyingOrigin::start().await, LyingOrigin::start().await);
    let mut node = Node::new(&origin.url(), "cluster.peek_for = \"0s\"");
    node.configure(&[first.addr.to_string(), second.addr.to_string()]);
    node.start().await;
    // Whichever of the two is the owner, the other is asked after it, and then the origin.
    let blob = origin.blob(SMALL);
    for peer in [&first, &second] {
        peer.add(&blob);
        peer.always(&blob, Lie::honest().garbage());
    }
    get(node.public(), &blob).await.assert_is(&blob);
    assert_eq!((first.gets(&blob), second.gets(&blob), origin.gets(&blob)), (1, 1, 1));
    let blob = origin.blob(SMALL);
    [&first, &second].iter().for_each(|peer| peer.add(&blob));
    get(node.public(), &blob).await.assert_is(&blob);
    assert_eq!((first.gets(&blob) + second.gets(&blob), origin.gets(&blob)), (1, 0));
    let books = assert_ledger(node.castier()).await;
    assert_eq!((loads(&books, "peer"), loads(&books, "origin"), kept(&books)), ([1, 0, 0], [1, 0, 0], [1, 1]));
}
