//! The origin is down: blobs in the tiers are served, other requests are refused quickly, and no restart is needed afterwards.

use crate::support::{
    Blob, Castier, Gate, KIB, Lie, LyingOrigin, MIB, Random, RealOrigin, Request, assert_ledger, eventually, get, light, metrics, stats,
};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

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

/// The breakers of the origin that are open or half-open, and the requests that they have refused.
async fn breakers(castier: &Castier) -> (u64, u64) {
    let metrics = metrics(castier).await;
    let source = ("source", "origin");
    (metrics.sum("castier_circuit_breakers", &[source]), metrics.sum("castier_circuit_breaker_refusals_total", &[source]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_hangs_is_not_waited_for_by_everybody() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config = "origin.read_timeout = \"400ms\"\norigin.breaker_failures = 3\norigin.breaker_pause = \"1s\"";
    let castier = Castier::start(&origin.url(), config).await;
    let kept = origin.blob(KIB);
    get(castier.public, &kept).await.assert_is(&kept);
    let gate = Gate::new();
    origin.freeze(&gate);
    let missing: Vec<_> = (0..40).map(|_| origin.blob(KIB)).collect();
    for blob in &missing[..3] {
        get(castier.public, blob).await.assert_problem(504);
    }
    assert_eq!(stats(&castier).await["origin"]["breaker"], "open");
    // Nobody waits for it now. One of them may try.
    let asked = || missing.iter().map(|blob| origin.gets(blob)).sum::<usize>();
    let before = asked();
    let mut refused = 0;
    for blob in &missing[3..] {
        let reply = get(castier.public, blob).await;
        if reply.cache_status() == "castier; fwd=uri-miss; detail=breaker" {
            assert_eq!((reply.status, reply.header("retry-after")), (502, Some("1")));
            reply.assert_problem(502);
            refused += 1;
        }
        get(castier.public, &kept).await.assert_is(&kept);
    }
    assert!(refused > 30, "{refused}");
    assert!(asked() <= before + 3, "{} more", asked() - before);
    let (open, refusals) = breakers(&castier).await;
    assert!(open == 1 && refusals >= refused, "{open} {refusals}");
    for request in
        [Request::new("HEAD", missing[0].path()), Request::new("PUT", missing[0].path()).body(missing[0].whole()), Request::get("/kv/a")]
    {
        let status = request.send(castier.public).await.status;
        assert!(matches!(status, 502 | 504), "{request:?}: {status}");
    }
    // It answers again: the next request that tries closes the breaker.
    gate.open();
    eventually("the breaker closes", async || {
        let reply = get(castier.public, &missing[39]).await;
        (reply.status == 200).then_some(())
    })
    .await;
    for blob in &missing {
        get(castier.public, blob).await.assert_is(blob);
    }
    assert_eq!(breakers(&castier).await.0, 0);
    assert_eq!(stats(&castier).await["origin"]["breaker"], "closed");
    let log = castier.output();
    assert!(log.contains("the circuit breaker is open") && log.contains("the circuit breaker is closed"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_do_not_multiply_an_outage() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "origin.retries = 5\norigin.breaker_failures = 0").await;
    let blobs: Vec<_> = (0..300).map(|_| origin.blob(KIB)).collect();
    for blob in &blobs {
        origin.always(blob, Lie::honest().status(500));
    }
    let began = Instant::now();
    let mut all = JoinSet::new();
    for blob in blobs.clone() {
        let public = castier.public;
        all.spawn(async move { get(public, &blob).await.status });
    }
    while let Some(status) = all.join_next().await {
        assert_eq!(status.unwrap(), 502);
    }
    let asked: usize = blobs.iter().map(|blob| origin.gets(blob)).sum();
    // 300 loads; a tenth of them again; ten that are free; and one for each second.
    let most = 300 + 30 + 10 + usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    assert!((300..=most).contains(&asked), "{asked} of at most {most}");
    assert!(metrics(&castier).await.total("castier_retries_refused_total") > 0);
    // A transfer that comes forward goes on, also without a budget.
    let large = origin.blob(4 * MIB);
    origin.next(&large, [Lie::honest().reset_after(512 * KIB)]);
    for part in 2..8 {
        origin.at(&large, (part - 1) * 512 * KIB, Lie::honest().reset_after(part * 512 * KIB));
    }
    get(castier.public, &large).await.assert_is(&large);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn misses_beyond_the_queue_are_refused_while_hits_flow() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "fill.max_in_flight = 16\nfill.max_wait = \"100ms\"\norigin.read_timeout = \"60s\"").await;
    let kept = origin.blob(KIB);
    get(castier.public, &kept).await.assert_is(&kept);
    let gate = Gate::new();
    let slow: Vec<_> = (0..32).map(|_| origin.blob_with(KIB, [Lie::honest().hold(&gate)])).collect();
    let mut all = JoinSet::new();
    for blob in slow.clone() {
        let public = castier.public;
        all.spawn(async move { get(public, &blob).await });
    }
    eventually("the origin has all that it may", async || (gate.arrived() == 16).then_some(())).await;
    for _ in 0..16 {
        let reply = all.join_next().await.unwrap().unwrap();
        assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    }
    for _ in 0..50 {
        get(castier.public, &kept).await.assert_is(&kept);
    }
    assert_eq!(breakers(&castier).await, (0, 0), "a limit of this node says nothing about the origin");
    gate.open();
    while let Some(reply) = all.join_next().await {
        assert_eq!(reply.unwrap().status, 200);
    }
}

/// `fill.max_waiting`: those beyond are refused while the others still wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_for_the_origin_has_an_end() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let limits = "fill.max_in_flight = 4\nfill.max_waiting = 6\nfill.max_wait = \"60s\"\norigin.read_timeout = \"60s\"";
    let castier = Castier::start(&origin.url(), limits).await;
    let gate = Gate::new();
    let mut all = JoinSet::new();
    for _ in 0..30 {
        let (public, blob) = (castier.public, origin.blob_with(KIB, [Lie::honest().hold(&gate)]));
        all.spawn(async move { get(public, &blob).await.status });
    }
    for _ in 0..20 {
        assert_eq!(all.join_next().await.unwrap().unwrap(), 503);
    }
    assert!(all.try_join_next().is_none());
    gate.open();
    while let Some(status) = all.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_requests_one_tries() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config = "origin.read_timeout = \"1s\"\norigin.breaker_failures = 1\norigin.breaker_pause = \"500ms\"";
    let castier = Castier::start(&origin.url(), config).await;
    let gate = Gate::new();
    origin.freeze(&gate);
    let blobs: Vec<_> = (0..30).map(|_| origin.blob(KIB)).collect();
    get(castier.public, &blobs[0]).await.assert_problem(504);
    assert_eq!(breakers(&castier).await.0, 1);
    let asked = || blobs[1..].iter().map(|blob| origin.gets(blob)).sum::<usize>();
    // The pause is over when a request reaches the origin again. That one hangs, and the others do not follow it.
    let mut clients = JoinSet::new();
    while asked() == 0 {
        for blob in &blobs[1..] {
            let (public, path) = (castier.public, blob.path());
            clients.spawn(async move { Request::get(path).send(public).await.status });
        }
        while asked() == 0 && clients.len() > 1 {
            assert_eq!(clients.join_next().await.unwrap().unwrap(), 502);
        }
    }
    while clients.len() > 1 {
        clients.join_next().await.unwrap().unwrap();
    }
    // After half a second another one may try, on a slow machine.
    assert!(asked() <= 2, "{}", asked());
    gate.open();
}
