//! Uploads: handed over to the owner, or stored from here if the owner cannot take them.

use super::{LARGE, SMALL, STALL, World, kept};
use crate::support::{Blob, Gate, KIB, Lie, MIB, Request, assert_ledger, cluster::SECRET, get, light};
use std::time::{Duration, Instant};

/// Small enough to be read before it is sent on.
const TINY: u64 = 20 * KIB;

fn put(blob: &Blob) -> Request {
    Request::new("PUT", blob.path()).body(blob.whole())
}

#[tokio::test]
async fn the_owner_takes_its_uploads() {
    let _turn = light().await;
    let world = World::with_secret("cluster.peek_for = \"0s\"").await;
    for size in [1, TINY, LARGE] {
        let blob = world.blob_of(false, size);
        for status in [201, 200] {
            assert_eq!(put(&blob).send(world.node.public()).await.status, status);
        }
        assert!(world.peer.holds(&blob) && !world.origin.holds(&blob), "the peer stores it at the origin, not this node");
        assert!(world.origin.requests("PUT", &blob).is_empty());
        get(world.node.public(), &blob).await.assert_is(&blob);
    }
    let chunked = world.blob_of(false, LARGE);
    assert_eq!(Request::new("PUT", chunked.path()).chunks(&chunked.whole(), 100_000).send(world.node.public()).await.status, 201);
    assert!(world.peer.holds(&chunked));
    // Its own goes to the origin, and so does what a peer hands over.
    for (blob, to) in [(world.blob_of(true, TINY), world.node.public()), (world.blob_of(false, TINY), world.node.peer())] {
        // A client needs no proof, and may have one.
        assert_eq!(put(&blob).proved(SECRET).send(to).await.status, 201);
        assert!(world.origin.holds(&blob) && !world.peer.holds(&blob));
        assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; hit; detail=memory");
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((kept(&books), books.total("castier_peer_errors_total")), ([2, 3], 0));
}

#[tokio::test]
async fn what_the_owner_refuses_is_refused() {
    let _turn = light().await;
    let world = World::with_secret("cluster.peek_for = \"0s\"").await;
    for size in [TINY, LARGE] {
        for status in [413, 507, 405] {
            let blob = world.blob_of(false, size);
            world.peer.next_upload(Lie::honest().status(status));
            assert_eq!(put(&blob).send(world.node.public()).await.status, status, "{size}");
            assert!(!world.origin.holds(&blob));
        }
        let (blob, other) = (world.blob_of(false, size), Blob::new(size));
        let wrong = Request::new("PUT", blob.path()).body(other.whole()).send(world.node.public()).await;
        wrong.assert_problem(422);
        assert!(!world.peer.holds(&blob) && !world.peer.holds(&other) && !world.origin.holds(&other));
    }
    let books = assert_ledger(world.node.castier()).await;
    assert_eq!((books.corrupt("client"), books.total("castier_peer_errors_total")), (2, 0));
}

#[tokio::test]
async fn an_owner_that_is_gone_is_stood_in_for() {
    let _turn = light().await;
    let mut world = World::with_secret("cluster.peek_for = \"0s\"\ncluster.probe_interval = \"20s\"").await;
    world.peer_is_up().await;
    world.peer.down().await;
    for size in [LARGE, TINY, SMALL] {
        let blob = world.blob_of(false, size);
        let started = Instant::now();
        assert_eq!(put(&blob).send(world.node.public()).await.status, 201);
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(world.origin.holds(&blob));
        assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; hit; detail=memory");
    }
    assert_eq!(world.errors().await, 1, "the first upload found out");
}

#[tokio::test]
async fn an_owner_that_fails_is_stood_in_for() {
    let _turn = light().await;
    let world = World::with_secret("cluster.peek_for = \"0s\"").await;
    for lie in [Lie::honest().status(500), Lie::honest().castiers(502), Lie::honest().castiers(503), Lie::honest().status(403)] {
        let blob = world.blob_of(false, TINY);
        world.peer.next_upload(lie.clone());
        assert_eq!(put(&blob).send(world.node.public()).await.status, 201, "{lie:?}");
        assert!(world.origin.holds(&blob) && !world.peer.holds(&blob), "{lie:?}");
        world.peer_is_up().await;
    }
    // Large ones are held in memory meanwhile, wherever the owner stops: in the middle, before its answer, with a refusal.
    for size in [64 * KIB, LARGE, 9 * MIB] {
        for lie in [Lie::honest().truncate(size / 2), Lie::honest().truncate(size), Lie::honest().castiers(503)] {
            for request in [put as fn(&Blob) -> Request, |blob| Request::new("PUT", blob.path()).chunks(&blob.whole(), 10_000)] {
                world.peer_is_up().await;
                let blob = world.blob_of(false, size);
                (0..3).for_each(|_| world.peer.next_upload(lie.clone()));
                assert_eq!(request(&blob).send(world.node.public()).await.status, 201, "{size} {lie:?}");
                assert!(world.origin.holds(&blob) && !world.peer.holds(&blob), "{size} {lie:?}");
                let kept = get(world.node.public(), &blob).await.cache_status() == "castier; hit; detail=memory";
                assert_eq!(kept, size <= LARGE);
                world.peer.honest_uploads();
            }
        }
    }
    // One that has stopped costs a stall.
    for size in [TINY, LARGE] {
        world.peer_is_up().await;
        let (gate, blob) = (Gate::new(), world.blob_of(false, size));
        world.peer.freeze(&gate);
        let started = Instant::now();
        assert_eq!(put(&blob).send(world.node.public()).await.status, 201);
        assert!(started.elapsed() >= STALL && started.elapsed() < STALL + Duration::from_secs(3), "{:?}", started.elapsed());
        assert!(world.origin.holds(&blob));
        gate.open();
    }
}

#[tokio::test]
async fn an_upload_is_held_no_longer_than_its_owner_needs() {
    let _turn = light().await;
    // Capacity for the copies of a few.
    let world = World::with_secret("cluster.peek_for = \"0s\"\nfill.memory = \"16MiB\"\nmemory.max_blob = \"6MiB\"").await;
    for _ in 0..8 {
        let blob = world.blob_of(false, LARGE);
        assert_eq!(put(&blob).send(world.node.public()).await.status, 201);
        assert!(world.peer.holds(&blob) && !world.origin.holds(&blob));
    }
    let blob = world.blob_of(false, LARGE / 2);
    world.peer.next_upload(Lie::honest().truncate(LARGE / 4));
    assert_eq!(put(&blob).send(world.node.public()).await.status, 201);
    assert!(world.origin.holds(&blob));
    // What is too much for that is gone with the owner, and the client is told.
    world.peer_is_up().await;
    let blob = world.blob_of(false, 9 * MIB);
    world.peer.next_upload(Lie::honest().truncate(5 * MIB));
    put(&blob).send(world.node.public()).await.assert_problem(502);
    assert!(!world.origin.holds(&blob));
}

#[tokio::test]
async fn an_owner_that_lives_may_take_its_time() {
    let _turn = light().await;
    let world = World::with_secret("cluster.peek_for = \"0s\"").await;
    for size in [TINY, LARGE] {
        let (gate, blob) = (Gate::new(), world.blob_of(false, size));
        // Any answer to the question how it is will do.
        world.peer.filling(&blob, true);
        world.peer.next_upload(Lie::honest().hold(&gate));
        let (request, to) = (put(&blob), world.node.public());
        let upload = tokio::spawn(async move { request.send(to).await });
        crate::support::eventually("the owner has been asked how it is", async || {
            (world.peer.requests("HEAD", &blob).len() >= 5).then_some(())
        })
        .await;
        assert!(world.origin.requests("PUT", &blob).is_empty());
        gate.open();
        assert_eq!(upload.await.unwrap().status, 201);
        assert!(world.peer.holds(&blob) && !world.origin.holds(&blob));
    }
    assert_eq!(world.errors().await, 0);
}

#[tokio::test]
async fn the_others_are_told_what_is_stored() {
    let _turn = light().await;
    let world = World::with_secret("cluster.peek_for = \"0s\"").await;
    let told = |blob: &Blob| {
        let path = format!("/stored/{}", blob.digest);
        world.peer.seen().iter().filter(|seen| seen.method == "POST" && seen.target == path).count()
    };
    let post = async |blob: &Blob| Request::new("POST", "/cas").body(blob.whole()).send(world.node.public()).await;
    for size in [TINY, LARGE] {
        let (own, others) = (world.blob_of(true, size), world.blob_of(false, size));
        assert_eq!((post(&own).await.status, told(&own)), (201, 1), "the peer may have asked the origin while this node was away");
        assert_eq!((post(&others).await.status, told(&others)), (201, 1), "before the client hears of it");
        assert!(world.origin.holds(&own) && world.origin.holds(&others) && !world.peer.holds(&others));
        assert_eq!(get(world.node.public(), &own).await.cache_status(), "castier; hit; detail=memory");
        assert_eq!(get(world.node.public(), &others).await.cache_status(), "castier; hit; detail=mirror");
    }
    // Whoever does not listen does not hold it up for long.
    let gate = Gate::new();
    world.peer.freeze(&gate);
    let others = world.blob_of(false, TINY);
    let started = Instant::now();
    assert_eq!(post(&others).await.status, 201);
    assert!(started.elapsed() < STALL + Duration::from_secs(3), "{:?}", started.elapsed());
    gate.open();
}

/// Nobody can prove that an upload is stored where there is no secret, so this node stores it, and tells the owner.
#[tokio::test]
async fn without_a_secret_no_upload_is_handed_over() {
    let _turn = light().await;
    let world = World::new().await;
    for size in [TINY, LARGE] {
        let blob = world.blob_of(false, size);
        assert_eq!(put(&blob).send(world.node.public()).await.status, 201);
        assert!(world.origin.holds(&blob) && world.peer.requests("PUT", &blob).is_empty());
        let told = format!("/stored/{}", blob.digest);
        assert!(world.peer.seen().iter().any(|seen| seen.method == "POST" && seen.target == told));
        assert_eq!(get(world.node.public(), &blob).await.cache_status(), "castier; hit; detail=mirror");
    }
    assert_eq!(world.errors().await, 0);
}
