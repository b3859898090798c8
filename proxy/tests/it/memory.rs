//! Bounded memory: transfers, slow readers, and the memory tier.

use crate::support::{
    Blob, Castier, Conn, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, assert_ledger, eventually, get, heavy, light, metrics, within,
};
use std::{sync::atomic::Ordering, time::Duration};
use tempfile::TempDir;
use tokio::task::JoinSet;

const GIB: u64 = 1024 * MIB;
const SMALL_CACHE: &str = "memory.capacity = \"64MiB\"";

/// Puts a client's download into `clients`.
fn spawn(clients: &mut JoinSet<crate::support::client::Outcome>, download: Download, blob: &Blob, castier: &Castier) {
    let (blob, from) = (blob.clone(), castier.public);
    clients.spawn(async move { download.of(&blob, from).await });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_gib_to_twenty_clients() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let spool = TempDir::new().unwrap();
    let config = format!("{SMALL_CACHE}\nfill.spool_dir = {:?}", spool.path());
    let castier = Castier::start(&origin.url(), &config).await;
    let descriptors = castier.descriptors();
    let (start, middle) = (Gate::new(), Gate::new());
    let blob = origin.blob_with(2 * GIB, [Lie::honest().hold(&start).stall(GIB, &middle)]);
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        spawn(&mut clients, Download::default(), &blob, &castier);
    }
    eventually("everybody has joined", async || (metrics(&castier).await.total("castier_collapsed_total") == 19).then_some(())).await;
    start.open();
    eventually("half is through", async || (middle.arrived() == 1).then_some(())).await;
    let names: Vec<_> = std::fs::read_dir(spool.path()).unwrap().collect();
    assert!(names.is_empty(), "what passes through has no name that a crash could leave behind: {names:?}");
    middle.open();
    within(Duration::from_secs(180), "20 × 2 GiB", async {
        while let Some(outcome) = clients.join_next().await {
            outcome.unwrap().assert_is(&blob);
        }
    })
    .await;
    let peak = castier.memory("VmHWM") / MIB;
    assert!(peak < 256, "{peak} MiB resident at the peak");
    assert_eq!(origin.gets(&blob), 1);
    assert_eq!(assert_ledger(&castier).await.kept(), 0);
    eventually("what passed through is let go", async || (castier.descriptors() <= descriptors + 4).then_some(())).await;
}

/// 300 readers of `blob` at 1 kB/s get a few kB each. Then `gate` opens, and one fast reader gets everything. Returns by how many bytes castier's
/// memory grew.
async fn three_hundred_slow_readers(castier: &Castier, blob: &Blob, gate: &Gate) -> u64 {
    get(castier.public, &Blob::new(1)).await.assert_problem(404);
    let before = castier.memory("VmRSS");
    let mut clients = JoinSet::new();
    let slow = || Download { slowly: Some((100, Duration::from_millis(100))), ..Download::default() };
    let readers: Vec<_> = (0..300).map(|_| slow()).collect();
    for reader in &readers {
        spawn(&mut clients, reader.clone(), blob, castier);
    }
    eventually("every reader has some", async || {
        readers.iter().all(|reader| reader.received.load(Ordering::Relaxed) >= 2000).then_some(())
    })
    .await;
    let (fast, mut alone) = (Download::default(), JoinSet::new());
    spawn(&mut alone, fast.clone(), blob, castier);
    eventually("the fast one has some", async || (fast.started.load(Ordering::SeqCst) == 1).then_some(())).await;
    gate.open();
    let fast = within(Duration::from_secs(30), "a fast reader among slow ones", alone.join_next()).await;
    fast.unwrap().unwrap().assert_is(blob);
    assert_eq!(clients.len(), 300, "all of them are still reading");
    castier.memory("VmHWM").saturating_sub(before)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_of_a_flight_cost_offsets() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), SMALL_CACHE).await;
    let descriptors = castier.descriptors();
    let gate = Gate::new();
    let blob = origin.blob_with(64 * MIB, [Lie::honest().stall(32 * MIB, &gate)]);
    let grown = three_hundred_slow_readers(&castier, &blob, &gate).await / MIB;
    assert!(grown < 96, "{grown} MiB for 300 readers of a 64 MiB blob that memory does not keep");
    assert_eq!(origin.gets(&blob), 1, "all of them read one flight");
    eventually("the readers' connections are gone", async || (castier.descriptors() <= descriptors + 4).then_some(())).await;
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_of_a_kept_blob_cost_offsets() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), SMALL_CACHE).await;
    let blob = origin.blob(8 * MIB);
    get(castier.public, &blob).await.assert_is(&blob);
    let grown = three_hundred_slow_readers(&castier, &blob, &Gate::new()).await / MIB;
    assert!(grown < 64, "{grown} MiB for 300 readers of one blob in memory");
    let books = assert_ledger(&castier).await;
    assert_eq!((origin.gets(&blob), books.total("castier_hits_total")), (1, 301));
}

#[tokio::test]
async fn idle_connections_cost_little() {
    let _turn = heavy().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "").await;
    let blob = origin.blob(KIB);
    get(castier.public, &blob).await.assert_is(&blob);
    // Whichever way the last request went: the fast lane (after a long head), a session, the relay.
    let last = [
        Request::get(blob.path()).header("X-Long", "x".repeat(8000)),
        Request::get(blob.path()).header("Range", "bytes=0-99"),
        Request::get("/elsewhere"),
    ];
    let mut idle = Vec::new();
    let mut connect = async |count: usize| {
        for request in last.iter().cycle().take(count) {
            let mut conn = Conn::open(castier.public).await;
            assert!(matches!(conn.ask(request).await.status, 200 | 206));
            idle.push(conn);
        }
        castier.memory("VmRSS")
    };
    // What the first of them bring along is not theirs.
    let before = connect(100).await;
    let each = connect(2000).await.saturating_sub(before) / 2000;
    assert!(each < 8 * KIB, "{each} bytes for each idle connection");
    assert_eq!(metrics(&castier).await.total("castier_shed_requests_total"), 0);
    for conn in idle.iter_mut().step_by(100) {
        conn.ask(&Request::get(blob.path())).await.assert_is(&blob);
    }
}

#[tokio::test]
async fn the_cache_stays_within_its_capacity() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "memory.capacity = \"4MiB\"\nmemory.max_blob = \"1MiB\"\nmemory.policy = \"lru\"").await;
    let blobs: Vec<_> = (0..100).map(|_| origin.blob(100 * KIB)).collect();
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
        let now = metrics(&castier).await;
        let (bytes, capacity) = (now.total("castier_tier_bytes"), now.total("castier_tier_capacity_bytes"));
        assert!(bytes <= capacity && capacity == 4 * MIB, "{bytes} of {capacity}");
    }
    let books = assert_ledger(&castier).await;
    assert!(books.kept() <= 40 && books.kept() >= 20, "{} blobs of 100 KiB in 4 MiB", books.kept());
    assert_eq!(books.total("castier_tier_evictions_total"), 100 - books.kept());
    // The last one is there under "lru", the first one is not.
    let last = get(castier.public, &blobs[99]).await;
    assert_eq!(last.cache_status(), "castier; hit; detail=memory");
    get(castier.public, &blobs[0]).await.assert_is(&blobs[0]);
    assert_eq!((origin.gets(&blobs[99]), origin.gets(&blobs[0])), (1, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_flights_than_memory_for_them() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), "fill.memory = \"4MiB\"\nmemory.max_blob = \"4MiB\"").await;
    let gate = Gate::new();
    let blobs: Vec<_> = (0..32).map(|_| origin.blob_with(MIB + 500 * KIB, [Lie::honest().stall(MIB + 400 * KIB, &gate)])).collect();
    let mut clients = JoinSet::new();
    for (n, blob) in blobs.iter().enumerate() {
        let (blob, from) = (blob.clone(), castier.public);
        clients.spawn(async move { (n, Download::default().of(&blob, from).await) });
    }
    // 48 MiB of fills with memory for 4: the others pass through files.
    eventually("all are in the middle", async || (gate.arrived() == 32).then_some(())).await;
    gate.open();
    while let Some(client) = clients.join_next().await {
        let (n, outcome) = client.unwrap();
        outcome.assert_is(&blobs[n]);
    }
    assert_eq!(assert_ledger(&castier).await.source_loads(), [32, 0, 0]);
}

#[tokio::test]
async fn a_blob_that_fits_nowhere() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config = "fill.memory = \"2MiB\"\nmemory.max_blob = \"2MiB\"\nfill.spool = \"24MiB\"\nlimits.max_blob = \"24MiB\"";
    let castier = Castier::start(&origin.url(), config).await;
    // One has most of fill.spool, and waits.
    let gate = Gate::new();
    let first = origin.blob_with(20 * MIB, [Lie::honest().stall(19 * MIB, &gate)]);
    let client = tokio::spawn({
        let (first, from) = (first.clone(), castier.public);
        async move { Download::default().of(&first, from).await }
    });
    eventually("it has its part", async || (gate.arrived() == 1).then_some(())).await;
    let blob = origin.blob(20 * MIB);
    let outcome = Download::default().of(&blob, castier.public).await;
    assert!(outcome.status == 503 || (outcome.status == 200 && !outcome.complete), "{outcome:?}");
    assert!(outcome.wrong_at.is_none(), "{outcome:?}");
    gate.open();
    client.await.unwrap().assert_is(&first);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.source_loads(), books.total("castier_shed_requests_total")), ([1, 0, 1], 1));
    // What it took is given back.
    for _ in 0..3 {
        let fits = origin.blob(3 * MIB);
        get(castier.public, &fits).await.assert_is(&fits);
    }
}
