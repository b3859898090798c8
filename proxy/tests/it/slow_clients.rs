//! Slow clients use only the memory that they need, and do not keep blobs of others out of memory.

use crate::support::{
    Blob, Castier, Conn, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger, eventually, get, heavy, light, metrics,
};
use std::sync::atomic::Ordering;
use tokio::task::JoinSet;

const MISS: &str = "castier; fwd=uri-miss; stored; detail=origin";
const HIT: &str = "castier; hit; detail=memory";

/// Starts to upload a blob of `size` bytes, and sends enough that castier starts the upload to the origin.
async fn slow_upload(castier: &Castier, size: u64) -> Conn {
    let blob = Blob::new(size);
    let mut conn = Conn::open(castier.public).await;
    conn.send(&Request::new("PUT", blob.path()).header("Content-Length", size.to_string()).bytes()).await;
    conn.send(&blob.bytes(0, 100 * KIB)).await;
    conn
}

/// Requests a blob, and reads only the head and what fits into the socket buffers.
async fn slow_reader(castier: &Castier, blob: &Blob) -> Conn {
    let mut conn = Conn::narrow(castier.public).await;
    conn.send(&Request::get(blob.path()).bytes()).await;
    assert!(conn.head().await.is_some_and(|head| head.first.contains(" 200 ")));
    conn
}

async fn all_landed(castier: &Castier) {
    eventually("all flights have landed", async || (metrics(castier).await.total("castier_flights_in_progress") == 0).then_some(())).await;
}

/// New blobs are loaded once, reported as stored, and then hits.
async fn assert_keeps_new_blobs(castier: &Castier, origin: &LyingOrigin) {
    for size in [KIB, 900 * KIB, 2 * MIB, 7 * MIB] {
        let blob = origin.blob(size);
        for expected in [MISS, HIT] {
            let reply = get(castier.public, &blob).await;
            reply.assert_is(&blob);
            assert_eq!((reply.cache_status(), origin.gets(&blob)), (expected, 1), "{size} bytes");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_uploads_keep_nobody_out() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let mut uploads = Vec::new();
    for _ in 0..32 {
        uploads.push(slow_upload(&castier, 8 * MIB).await);
    }
    let begun = || origin.seen().iter().filter(|seen| seen.method == "PUT").count();
    eventually("all uploads have begun", async || (begun() == 32).then_some(())).await;
    assert_keeps_new_blobs(&castier, &origin).await;
    drop(uploads);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_of_verified_blobs_keep_nobody_out() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let mut readers = Vec::new();
    for _ in 0..32 {
        let blob = origin.blob(8 * MIB);
        readers.push(slow_reader(&castier, &blob).await);
    }
    all_landed(&castier).await;
    assert_keeps_new_blobs(&castier, &origin).await;
    drop(readers);
    assert_ledger(&castier).await;
}

/// Evicted blobs that slow clients still read count in `fill.memory`. When that is exhausted, blobs pass through, and memory does not grow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_slow_readers_hold_is_bounded() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "memory.capacity = \"16MiB\"\nfill.memory = \"32MiB\"\nmemory.max_blob = \"4MiB\"").await;
    let before = castier.memory("VmRSS");
    let mut readers = Vec::new();
    for _ in 0..60 {
        let blob = origin.blob(4 * MIB);
        get(castier.public, &blob).await.assert_is(&blob);
        // A hit while there is a budget for what it may come to hold, and a flight that passes through a file after that.
        readers.push(slow_reader(&castier, &blob).await);
        all_landed(&castier).await;
    }
    let grown = castier.memory("VmHWM").saturating_sub(before) / MIB;
    assert!(grown < 16 + 32 + 24, "{grown} MiB for slow readers of 60 blobs of 4 MiB");
    drop(readers);
    let blob = origin.blob(4 * MIB);
    eventually("blobs are kept again", async || {
        get(castier.public, &blob).await.assert_is(&blob);
        (get(castier.public, &blob).await.cache_status() == HIT).then_some(())
    })
    .await;
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn a_cut_response_is_told_as_cut() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "origin.retries = 0").await;
    let gate = Gate::new();
    let blob = origin.blob_with(3 * MIB, [Lie::honest().flip_bit(100).stall(2 * MIB, &gate)]);
    let (download, mut clients) = (Download::default(), JoinSet::new());
    clients.spawn({
        let (download, blob, from) = (download.clone(), blob.clone(), castier.public);
        async move { download.of(&blob, from).await }
    });
    eventually("the answer has begun", async || (download.started.load(Ordering::SeqCst) == 1).then_some(())).await;
    gate.open();
    let outcome = clients.join_next().await.unwrap().unwrap();
    assert!(outcome.status == 200 && !outcome.complete && outcome.cache_status == MISS, "{outcome:?}");
    let record = eventually("the access record", async || {
        castier.output().lines().find(|line| line.contains(&blob.path()) && line.contains("duration_ms")).map(str::to_owned)
    })
    .await;
    assert!(record.contains("status=200") && record.contains("error=") && !record.contains("stored"), "{record}");
    // One that fails before its head says why as well.
    let blob = origin.blob_with(KIB, [Lie::honest().flip_bit(100), Lie::honest().flip_bit(100)]);
    get(castier.public, &blob).await.assert_problem(502);
    let record = eventually("the access record", async || {
        castier.output().lines().find(|line| line.contains(&blob.path()) && line.contains("duration_ms")).map(str::to_owned)
    })
    .await;
    assert!(record.contains("status=502") && record.contains("error="), "{record}");
}
