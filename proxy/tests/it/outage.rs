//! The origin is down: blobs in the tiers are served, other requests are refused quickly, and no restart is needed afterwards.

use crate::support::{Blob, Castier, KIB, LyingOrigin, MIB, Random, RealOrigin, Request, assert_ledger, eventually, get, light, stats};
use std::time::{Duration, Instant};

/// A generous limit for the pauses between retries.
const BACKOFF: Duration = Duration::from_secs(3);

#[tokio::test]
async fn hits_flow_while_misses_fail_quickly() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "origin.connect_timeout = \"500ms\"\norigin.retries = 2").await;
    let kept = origin.blob(700 * KIB);
    let missing = origin.blob(700 * KIB);
    get(castier.public, &kept).await.assert_is(&kept);
    origin.down().await;
    for _ in 0..3 {
        get(castier.public, &kept).await.assert_is(&kept);
        let start = Instant::now();
        get(castier.public, &missing).await.assert_problem(502);
        let took = start.elapsed();
        assert!(took < Duration::from_millis(500) * 3 + BACKOFF, "{took:?}");
        let head = Request::new("HEAD", missing.path()).send(castier.public).await;
        assert_eq!(head.status, 502);
    }
    assert_eq!(Request::new("HEAD", kept.path()).send(castier.public).await.status, 200);
    Request::new("PUT", missing.path()).body(missing.whole()).send(castier.public).await.assert_problem(502);
    Request::get("/elsewhere").send(castier.public).await.assert_problem(502);
    assert_eq!(Request::get("/readyz").send(castier.admin).await.status, 200, "it still serves what it keeps");
    origin.up().await;
    get(castier.public, &missing).await.assert_is(&missing);
    let books = assert_ledger(&castier).await;
    assert_eq!(books.source_loads(), [2, 0, 3]);
    let stats = stats(&castier).await;
    assert_eq!((stats["LocalLoads"].as_u64(), stats["LocalLoadErrs"].as_u64()), (Some(2), Some(3)), "{stats}");
}

#[tokio::test]
async fn an_origin_that_does_not_even_refuse() {
    let _turn = light().await;
    // A listener whose queue is full answers no SYN at all.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = socket.local_addr().unwrap();
    let _listener = socket.listen(1).unwrap();
    let mut queue = Vec::new();
    loop {
        match tokio::time::timeout(Duration::from_millis(500), tokio::net::TcpStream::connect(addr)).await {
            Ok(stream) => queue.push(stream.unwrap()),
            Err(_) => break,
        }
        assert!(queue.len() < 100, "the queue never fills");
    }
    let castier = Castier::start(&format!("http://{addr}"), "origin.connect_timeout = \"300ms\"\norigin.retries = 2").await;
    let start = Instant::now();
    let reply = get(castier.public, &Blob::new(10)).await;
    let took = start.elapsed();
    assert!(matches!(reply.status, 502 | 504), "{:?}", reply.head);
    reply.assert_problem(reply.status);
    assert!(took >= Duration::from_millis(300) && took < Duration::from_millis(300) * 3 + BACKOFF, "{took:?}");
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn an_origin_that_is_away_at_the_start() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let blob = origin.blob(1000);
    origin.down().await;
    let castier = Castier::start(&origin.url(), "").await;
    let address = origin.addr.to_string();
    let named = |line: &str| line.contains(&address) && line.to_lowercase().contains("warn");
    eventually("a warning that names the origin", async || castier.output().lines().any(named).then_some(())).await;
    assert_eq!(castier.output().lines().filter(|line| named(line)).count(), 1, "one line");
    get(castier.public, &blob).await.assert_problem(502);
    origin.up().await;
    get(castier.public, &blob).await.assert_is(&blob);
}

#[tokio::test]
async fn the_real_origin_dies_and_returns() {
    let _turn = light().await;
    let mut origin = RealOrigin::start().await;
    let castier = Castier::start(&origin.url(), "memory.max_blob = \"1MiB\"").await;
    let blobs: Vec<_> = [0, 1000, MIB, 5 * MIB].map(Blob::new).into();
    for blob in &blobs {
        assert_eq!(Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await.status, 201);
    }
    let mut random = Random::seeded();
    for _ in 0..3 {
        origin.kill().await;
        for blob in &blobs[..3] {
            get(castier.public, blob).await.assert_is(blob);
        }
        get(castier.public, &blobs[3]).await.assert_problem(502);
        origin.restart().await;
        for _ in 0..5 {
            let blob = &blobs[random.below(4) as usize];
            get(castier.public, blob).await.assert_is(blob);
        }
    }
    assert_ledger(&castier).await;
}
