//! Every fault of a peer: the client gets the right bytes from the origin all the same, and the counters show the fault.

use super::{LARGE, SMALL, STALL, World, kept, loads};
use crate::support::{
    Blob, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger, cluster::Node, eventually, get, light, metrics,
};
use castier_cluster::Ring;
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

/// The allowed delay beside a stall, on a busy machine.
const SLACK: Duration = Duration::from_secs(3);

#[tokio::test]
async fn a_sound_peer() {
    let _turn = light().await;
    let world = World::new().await;
    for (size, stored) in [(1, "; stored"), (10 * KIB, "; stored"), (SMALL, "; stored"), (LARGE, "; stored"), (9 * MIB, "")] {
        let blob = world.blob(size);
        let first = get(world.node.public(), &blob).await;
        first.assert_is(&blob);
        assert_eq!(first.cache_status(), format!("castier; fwd=uri-miss{stored}; detail=peer"));
        if !stored.is_empty() {
            let second = get(world.node.public(), &blob).await;
            second.assert_is(&blob);
            assert_eq!(second.cache_status(), "castier; hit; detail=mirror");
            let part = Request::get(blob.path()).header("Range", "bytes=-7").send(world.node.public()).await;
            assert!(part.cache_status().contains("mirror"), "{:?}", part.head);
        }
        assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (1, 0));
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "peer"), loads(&books, "origin")), ([5, 0, 0], [0, 0, 0]));
    assert_eq!((kept(&books), books.sum("castier_hits_total", &[("tier", "mirror")])), ([0, 4], 8));
    assert!(books.sum("castier_http_response_bytes_total", &[("from", "mirror")]) >= SMALL + LARGE);
    let told = crate::support::stats(world.node.castier()).await;
    assert_eq!((&told["PeerLoads"], &told["PeerErrors"], &told["LocalLoads"]), (&5.into(), &0.into(), &0.into()), "{told}");
    // Every request is told apart from a client's by nothing but the secret, and there is none here.
    assert!(world.peer.seen().iter().all(|seen| seen.head.header("cache-control").is_none()));
}

/// The peer does this once. The bytes come from the origin, a failure of the peer is counted, and no other effect remains.
async fn overcome(world: &World, size: u64, lie: Lie, what: &str) -> Duration {
    world.peer_is_up().await;
    let blob = world.blob(size);
    world.peer.next(&blob, [lie]);
    let (errors, started) = (world.errors().await, Instant::now());
    get(world.node.public(), &blob).await.assert_is(&blob);
    let took = started.elapsed();
    assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (1, 1), "{what}, {size} bytes");
    assert_eq!(world.errors().await, errors + 1, "{what}, {size} bytes");
    took
}

#[tokio::test]
async fn what_a_peer_may_do_wrong() {
    let _turn = light().await;
    let world = World::new().await;
    let mut flights = 0;
    for size in [SMALL, LARGE] {
        for (what, lie) in [
            ("cut before the first byte", Lie::honest().truncate(0)),
            ("cut in the middle", Lie::honest().truncate(size / 2)),
            ("reset in the middle", Lie::honest().reset_after(size / 2)),
            ("garbage", Lie::honest().garbage()),
            ("no secret", Lie::honest().castiers(403)),
            ("another server's 404", Lie::honest().status(404)),
            ("another server's 500", Lie::honest().status(500)),
            ("a redirect", Lie::honest().status(302)),
            ("its way to the origin is broken", Lie::honest().castiers(502)),
            ("it waited too long for the origin", Lie::honest().castiers(504)),
            ("it has too much to do", Lie::honest().castiers(503)),
        ] {
            let took = overcome(&world, size, lie, what).await;
            assert!(took < STALL + SLACK, "{what}: {took:?}");
            flights += 1;
        }
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "origin"), loads(&books, "peer")), ([flights, 0, 0], [0, 0, 0]));
    // What ended at the origin is this node's own.
    assert_eq!((kept(&books), books.corrupt("peer"), books.corrupt("origin")), ([flights, 0], 0, 0));
    assert!(books.sum("castier_source_resumes_total", &[("source", "origin")]) >= 4);
}

#[tokio::test]
async fn a_broken_transfer_goes_on_where_it_was() {
    let _turn = light().await;
    let world = World::new().await;
    let blob = world.blob(LARGE);
    world.peer.next(&blob, [Lie::honest().reset_after(LARGE / 2)]);
    get(world.node.public(), &blob).await.assert_is(&blob);
    let seen = world.origin.requests("GET", &blob);
    let range = seen[0].range().expect("the rest alone is asked for");
    let from: u64 = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    // What a reset has overtaken never came.
    assert!(from > 0 && from <= LARGE / 2, "{range}");
    assert_eq!(world.origin.sent(&blob), LARGE - from);
}

#[tokio::test]
async fn a_silent_peer_costs_one_stall() {
    let _turn = light().await;
    let world = World::new().await;
    let gate = Gate::new();
    for (what, lie) in [
        ("no head", Lie::honest().hold(&gate)),
        ("no body", Lie::honest().stall(0, &gate)),
        ("stops in the middle", Lie::honest().stall(LARGE / 2, &gate)),
        ("stops before the end", Lie::honest().stall(LARGE - 1, &gate)),
    ] {
        let took = overcome(&world, LARGE, lie, what).await;
        assert!(took >= STALL && took < STALL + SLACK, "{what}: {took:?}");
    }
    assert_ledger(world.node.castier()).await;
    gate.open();
}

#[tokio::test]
async fn two_silent_peers_cost_little_more_than_one() {
    let _turn = light().await;
    // Long, so that two of them are told from one and a quarter on a busy machine.
    let stall = STALL * 4;
    let (origin, one, other) = (LyingOrigin::start().await, LyingOrigin::start().await, LyingOrigin::start().await);
    let config = format!("cluster.stall_timeout = \"{}ms\"\ncluster.peek_for = \"0s\"", stall.as_millis());
    let mut node = Node::new(&origin.url(), &config);
    let names = [node.name.clone(), one.addr.to_string(), other.addr.to_string()];
    node.configure(&names);
    node.start().await;
    let ring = Ring::new(names.map(|name| (name, 1)));
    let blob = loop {
        let blob = Blob::new(LARGE);
        if ring.order(&blob.digest).last().is_some_and(|last| ring.names()[last] == node.name) {
            break blob;
        }
    };
    origin.add(&blob);
    let gate = Gate::new();
    for peer in [&one, &other] {
        peer.add(&blob);
        peer.next(&blob, [Lie::honest().hold(&gate)]);
    }
    let started = Instant::now();
    get(node.public(), &blob).await.assert_is(&blob);
    let took = started.elapsed();
    assert!(took >= stall * 5 / 4 && took < stall * 5 / 4 + SLACK, "{took:?}");
    assert_eq!([&one, &other, &origin].map(|source| source.gets(&blob)), [1, 1, 1]);
    assert_eq!(node.metrics().await.total("castier_peer_errors_total"), 2);
    assert_ledger(node.castier()).await;
    gate.open();
}

#[tokio::test]
async fn a_peer_that_waits_is_waited_for() {
    let _turn = light().await;
    let world = World::new().await;
    let asked = |blob: &crate::support::Blob| world.peer.requests("HEAD", blob).len();
    for in_the_middle in [false, true] {
        let (gate, blob) = (Gate::new(), world.blob(LARGE));
        world.peer.filling(&blob, true);
        let lie = if in_the_middle { Lie::honest().stall(LARGE / 2, &gate) } else { Lie::honest().hold(&gate) };
        world.peer.next(&blob, [lie]);
        let (from, wanted, started) = (world.node.public(), blob.clone(), Instant::now());
        let client = tokio::spawn(async move { get(from, &wanted).await });
        // Each question sets the clock back, so five of them are well beyond the stall.
        eventually("the peer has been asked whether it waits", async || (asked(&blob) >= 5).then_some(())).await;
        assert!(started.elapsed() > STALL * 2);
        assert!(world.peer.requests("HEAD", &blob).iter().all(|seen| seen.head.header("cache-control") == Some("only-if-cached")));
        assert_eq!((world.origin.gets(&blob), world.errors().await), (0, 0));
        gate.open();
        client.await.unwrap().assert_is(&blob);
        assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (1, 0));
    }
    // One that no longer waits is not waited for.
    let (shut, blob) = (Gate::new(), world.blob(LARGE));
    world.peer.filling(&blob, true);
    world.peer.next(&blob, [Lie::honest().hold(&shut)]);
    let (from, wanted) = (world.node.public(), blob.clone());
    let client = tokio::spawn(async move { get(from, &wanted).await });
    eventually("the peer has been asked whether it waits", async || (asked(&blob) >= 3).then_some(())).await;
    world.peer.filling(&blob, false);
    client.await.unwrap().assert_is(&blob);
    assert_eq!((world.origin.gets(&blob), world.errors().await), (1, 1));
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "peer"), loads(&books, "origin")), ([2, 0, 0], [1, 0, 0]));
    shut.open();
}

#[tokio::test]
async fn wrong_bytes_never_get_through() {
    let _turn = light().await;
    for (what, lie) in [
        ("a flipped bit at the start", Lie::honest().flip_bit(0)),
        ("a flipped bit at the end", Lie::honest().flip_bit(SMALL - 1)),
        ("a part as if it were the whole", Lie::honest().wrong_length(SMALL / 2).truncate(SMALL / 2)),
        ("bytes behind the end", Lie::honest().wrong_length(SMALL + 5).too_much(5)),
        // The origin cannot go on from what came, or would make something else of it.
        ("a wrong bit, then a cut", Lie::honest().flip_bit(3).truncate(SMALL / 2)),
        ("too great a length, then a cut", Lie::honest().wrong_length(SMALL * 2).truncate(SMALL / 2)),
        ("too small a length, then a cut", Lie::honest().wrong_length(SMALL / 2 + 1).truncate(SMALL / 2)),
    ] {
        let world = World::new().await;
        let blob = world.blob(SMALL);
        world.peer.next(&blob, [lie]);
        get(world.node.public(), &blob).await.assert_is(&blob);
        assert!((1..=2).contains(&world.origin.gets(&blob)), "{what}");
        assert!(world.origin.requests("GET", &blob).last().unwrap().range().is_none(), "{what}: from the start");
        let books = assert_ledger(world.node.castier()).await;
        assert_eq!((loads(&books, "origin"), loads(&books, "peer"), books.corrupt("origin")), ([1, 0, 0], [0, 0, 0], 0), "{what}");
        assert!(books.total("castier_peer_errors_total") >= 1, "{what}");
        // It is up, but not asked for bytes for a while.
        world.peer_is_up().await;
        let next = world.blob(SMALL);
        get(world.node.public(), &next).await.assert_is(&next);
        assert_eq!((world.peer.gets(&next), world.origin.gets(&next)), (0, 1), "{what}");
    }
}

#[tokio::test]
async fn wrong_bytes_that_have_begun_to_leave_are_cut() {
    let _turn = light().await;
    let world = World::new().await;
    let (gate, download) = (Gate::new(), Download::default());
    let blob = world.blob(LARGE);
    world.peer.next(&blob, [Lie::honest().flip_bit(LARGE - 1).stall(LARGE / 2, &gate)]);
    world.peer.filling(&blob, true);
    let client = tokio::spawn({
        let (download, blob, from) = (download.clone(), blob.clone(), world.node.public());
        async move { download.of(&blob, from).await }
    });
    eventually("the client has bytes", async || (download.started.load(Ordering::SeqCst) == 1).then_some(())).await;
    gate.open();
    let outcome = client.await.unwrap();
    assert!(!outcome.complete && outcome.wrong_at.is_none(), "{outcome:?}");
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "peer"), books.corrupt("peer"), kept(&books)), ([0, 0, 1], 1, [0, 0]));
    // The next one gets it from elsewhere.
    get(world.node.public(), &blob).await.assert_is(&blob);
    assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (1, 1));
}

#[tokio::test]
async fn a_dead_peer_is_met_with_once() {
    let _turn = light().await;
    let mut world = World::with("cluster.peek_for = \"0s\"\ncluster.probe_interval = \"20s\"").await;
    world.peer_is_up().await;
    let blob = world.blob(SMALL);
    get(world.node.public(), &blob).await.assert_is(&blob);
    assert_eq!(world.origin.gets(&blob), 0);
    world.peer.down().await;
    for round in 0..20 {
        let blob = world.blob(SMALL);
        let started = Instant::now();
        get(world.node.public(), &blob).await.assert_is(&blob);
        assert!(started.elapsed() < SLACK, "round {round}");
        assert_eq!(world.origin.gets(&blob), 1);
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!(books.total("castier_peer_errors_total"), 1, "the first found out, and the others were spared");
    assert_eq!(books.sum("castier_cluster_peers", &[("state", "down")]), 1);
}

#[tokio::test]
async fn a_peer_that_has_stopped_is_not_asked_again() {
    let _turn = light().await;
    let world = World::with("cluster.peek_for = \"0s\"\ncluster.probe_timeout = \"200ms\"\ncluster.probe_interval = \"20s\"").await;
    world.peer_is_up().await;
    let gate = Gate::new();
    let blob = world.blob(SMALL);
    world.peer.freeze(&gate);
    get(world.node.public(), &blob).await.assert_is(&blob);
    eventually("the peer counts as down", async || {
        (metrics(world.node.castier()).await.sum("castier_cluster_peers", &[("state", "down")]) == 1).then_some(())
    })
    .await;
    for _ in 0..5 {
        let blob = world.blob(SMALL);
        get(world.node.public(), &blob).await.assert_is(&blob);
        assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (0, 1));
    }
    assert_eq!(world.errors().await, 1);
    gate.open();
}

#[tokio::test]
async fn absence_is_believed_and_not_remembered() {
    let _turn = light().await;
    let world = World::with("cluster.peek_for = \"0s\"\nlimits.negative_ttl = \"60s\"").await;
    let blob = world.blob(SMALL);
    world.peer.next(&blob, [Lie::honest().castiers(404), Lie::honest().castiers(404)]);
    for round in 1..=2 {
        get(world.node.public(), &blob).await.assert_problem(404);
        assert_eq!((world.peer.gets(&blob), world.origin.gets(&blob)), (round, 0));
    }
    get(world.node.public(), &blob).await.assert_is(&blob);
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((loads(&books, "peer"), books.total("castier_peer_errors_total")), ([1, 2, 0], 0));
    // What a peer claims in the middle of a blob is no absence.
    let blob = world.blob(LARGE);
    world.peer.next(&blob, [Lie::honest().truncate(LARGE / 2)]);
    world.origin.next(&blob, [Lie::honest().status(404)]);
    get(world.node.public(), &blob).await.assert_is(&blob);
}
