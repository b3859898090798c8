//! One flight in detail: joining, the order of bytes, and readers that leave.

use crate::support::{
    Cache, Castier, Conn, Download, Gate, HELD_BACK, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger, eventually, get, light, metrics,
};
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

fn spawn(download: &Download, blob: &crate::support::Blob, castier: &Castier) -> tokio::task::JoinHandle<crate::support::client::Outcome> {
    let (download, blob, from) = (download.clone(), blob.clone(), castier.public);
    tokio::spawn(async move { download.of(&blob, from).await })
}

#[tokio::test]
async fn a_late_comer_starts_at_byte_0_at_once() {
    late_comer("", "stored; ").await;
}

#[tokio::test]
async fn a_late_comer_to_a_spool_on_disk() {
    let cache = Cache::new();
    late_comer(&cache.config("1GiB", ""), "stored; ").await;
    assert_eq!((cache.files().len(), cache.count("tmp")), (1, 0));
}

#[tokio::test]
async fn a_late_comer_to_a_spool_without_a_name() {
    late_comer("memory.max_blob = \"64KiB\"", "").await;
}

#[tokio::test]
async fn a_late_comer_to_a_spool_without_a_window() {
    late_comer("memory.max_blob = \"64KiB\"\nfill.memory = \"100KiB\"\nverify.buffer_up_to = \"100KiB\"", "").await;
}

/// All received bytes can be read at once, from memory, from the spool's file, or from a batch that is not written yet.
async fn late_comer(config: &str, stored: &str) {
    let _turn = light().await;
    let (origin, castier) = world(config).await;
    let gate = Gate::new();
    let (size, half) = (4 * MIB, 2 * MIB - 77 * KIB - 7);
    let blob = origin.blob_with(size, [Lie::honest().stall(half, &gate)]);
    let (first, late) = (Download::default(), Download::default());
    let received = |download: &Download| download.received.load(Ordering::Relaxed);
    let leader = spawn(&first, &blob, &castier);
    eventually("the leader has all there is", async || (received(&first) == half).then_some(())).await;
    let follower = spawn(&late, &blob, &castier);
    eventually("so has the late comer", async || (received(&late) == half).then_some(())).await;
    assert_eq!(origin.sent(&blob), half);
    gate.open();
    let (leader, follower) = (leader.await.unwrap(), follower.await.unwrap());
    leader.assert_is(&blob);
    follower.assert_is(&blob);
    assert_eq!(leader.cache_status, format!("castier; fwd=uri-miss; {stored}detail=origin"));
    assert!(follower.cache_status.contains("collapsed"), "{follower:?}");
    assert_eq!(origin.gets(&blob), 1);
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn the_end_is_held_back_until_the_digest_matches() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let gate = Gate::new();
    let size = 3 * MIB;
    // All bytes but one have arrived, so the blob cannot be verified yet.
    let blob = origin.blob_with(size, [Lie::honest().stall(size - 1, &gate)]);
    let whole = Download::default();
    let client = spawn(&whole, &blob, &castier);
    let part = tokio::spawn({
        let request = Request::get(blob.path()).header("Range", "bytes=100-163939");
        let to = castier.public;
        async move { request.send(to).await }
    });
    let received = || whole.received.load(Ordering::Relaxed);
    eventually("all but the end is here", async || (received() == size - HELD_BACK).then_some(())).await;
    eventually("the part's reader is there", async || (metrics(&castier).await.total("castier_collapsed_total") == 1).then_some(())).await;
    assert!(!part.is_finished(), "a range must not end before the whole blob has verified");
    assert_eq!(received(), size - HELD_BACK);
    gate.open();
    client.await.unwrap().assert_is(&blob);
    let part = part.await.unwrap();
    assert_eq!((part.status, part.complete), (206, true));
    assert_eq!(part.body, blob.bytes(100, 163_940));
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn small_blobs_are_verified_before_the_first_byte() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let gate = Gate::new();
    let blob = origin.blob_with(MIB, [Lie::honest().stall(MIB - 1, &gate)]);
    let download = Download::default();
    let client = spawn(&download, &blob, &castier);
    eventually("the origin has sent nearly all", async || (gate.arrived() == 1).then_some(())).await;
    assert_eq!(download.received.load(Ordering::Relaxed), 0);
    gate.open();
    client.await.unwrap().assert_is(&blob);
    assert_eq!(origin.gets(&blob), 1);
}

#[tokio::test]
async fn slow_is_not_silent() {
    let _turn = light().await;
    // In total much longer than the longest allowed silence.
    let (origin, castier) = world("origin.read_timeout = \"500ms\"").await;
    let blob = origin.blob_with(2 * MIB, [Lie::honest().throttle(MIB)]);
    let start = Instant::now();
    let clients: Vec<_> = (0..5).map(|_| spawn(&Download::default(), &blob, &castier)).collect();
    for client in clients {
        client.await.unwrap().assert_is(&blob);
    }
    assert!(start.elapsed() > Duration::from_millis(1500), "the origin took its time");
    assert_eq!(origin.gets(&blob), 1, "no waiter timed out into a second load");
    assert_eq!(assert_ledger(&castier).await.resumes(), 0);
}

#[tokio::test]
async fn a_fill_that_nobody_reads_is_given_up_when_much_is_left() {
    let _turn = light().await;
    let (origin, castier) = world("fill.finish_under = \"1MiB\"").await;
    let gate = Gate::new();
    let blob = origin.blob_with(8 * MIB, [Lie::honest().stall(2 * MIB, &gate)]);
    let download = Download { hang_up_after: Some(MIB), ..Download::default() };
    spawn(&download, &blob, &castier).await.unwrap();
    eventually("castier hangs up at the origin", async || (origin.abandoned(&blob) == 1).then_some(())).await;
    let given_up = [("source", "origin"), ("reason", "abandoned")];
    let given_up = async || metrics(&castier).await.sum("castier_source_loads_given_up_total", &given_up);
    eventually("it is no failure of the origin", async || (given_up().await == 1).then_some(())).await;
    let books = assert_ledger(&castier).await;
    assert_eq!(books.kept(), 0);
    get(castier.public, &blob).await.assert_is(&blob);
    assert_eq!(origin.gets(&blob), 2);
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn a_fill_that_nobody_reads_goes_on_when_little_is_left() {
    let _turn = light().await;
    let (origin, castier) = world("fill.finish_under = \"4MiB\"").await;
    let gate = Gate::new();
    let blob = origin.blob_with(8 * MIB, [Lie::honest().stall(6 * MIB, &gate)]);
    let download = Download { hang_up_after: Some(5 * MIB), ..Download::default() };
    spawn(&download, &blob, &castier).await.unwrap();
    gate.open();
    eventually("the blob is kept", async || (metrics(&castier).await.kept() == 1).then_some(())).await;
    let reply = get(castier.public, &blob).await;
    reply.assert_is(&blob);
    assert_eq!(reply.cache_status(), "castier; hit; detail=memory");
    assert_eq!((origin.gets(&blob), origin.abandoned(&blob)), (1, 0));
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn a_blob_too_large_to_keep_is_not_called_stored() {
    let _turn = light().await;
    let (origin, castier) = world("memory.max_blob = \"2MiB\"").await;
    let blob = origin.blob(2 * MIB + KIB);
    for loads in 1..=2 {
        let reply = get(castier.public, &blob).await;
        reply.assert_is(&blob);
        assert_eq!(reply.cache_status(), "castier; fwd=uri-miss; detail=origin");
        assert_eq!(origin.gets(&blob), loads);
        assert_ledger(&castier).await;
    }
}

#[tokio::test]
async fn a_blob_goes_from_miss_to_hit() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for size in [0, 1, 100, 64 * KIB, MIB, MIB + 1, 8 * MIB] {
        let blob = origin.blob(size);
        let miss = get(castier.public, &blob).await;
        miss.assert_is(&blob);
        assert_eq!(miss.cache_status(), "castier; fwd=uri-miss; stored; detail=origin", "{size}");
        assert_ledger(&castier).await;
        let hit = get(castier.public, &blob).await;
        hit.assert_is(&blob);
        assert_eq!(hit.cache_status(), "castier; hit; detail=memory", "{size}");
        assert_eq!(origin.gets(&blob), 1);
    }
    let books = assert_ledger(&castier).await;
    assert_eq!((books.kept(), books.source_loads()), (7, [7, 0, 0]));
}

#[tokio::test]
async fn many_at_once_on_many_blobs() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blobs: Vec<_> = (0..10).map(|n| origin.blob(1 + n * 300 * KIB)).collect();
    let mut clients = Vec::new();
    for round in 0..200 {
        let blob = &blobs[round % blobs.len()];
        clients.push((blob.clone(), spawn(&Download::default(), blob, &castier)));
    }
    for (blob, client) in clients {
        client.await.unwrap().assert_is(&blob);
    }
    // Two requests can overtake each other between the look-up and the flight. There must be only one load all the same.
    for blob in &blobs {
        assert_eq!(origin.gets(blob), 1);
    }
    assert_eq!(assert_ledger(&castier).await.kept(), 10);
}

#[tokio::test]
async fn a_blob_that_no_tier_keeps_is_shared_while_somebody_reads_it() {
    let _turn = light().await;
    let (origin, castier) = world("memory.max_blob = \"1MiB\"").await;
    // More than the socket buffers of a reader.
    let blob = origin.blob(40 * MIB);
    let mut slow = Conn::narrow(castier.public).await;
    slow.send(&Request::get(blob.path()).bytes()).await;
    assert!(slow.head().await.unwrap().first.contains(" 200 "));
    eventually("the fill has ended", async || (metrics(&castier).await.total("castier_source_loads_total") == 1).then_some(())).await;
    get(castier.public, &blob).await.assert_is(&blob);
    assert_eq!(origin.gets(&blob), 1);
    drop(slow);
    eventually("with its last reader it is gone", async || {
        get(castier.public, &blob).await.assert_is(&blob);
        (origin.gets(&blob) == 2).then_some(())
    })
    .await;
    assert_ledger(&castier).await;
}
