//! The disk tier: keeping, forgetting, and restarts.

use crate::support::{
    Blob, Cache, Castier, Conn, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, assert_hit, assert_ledger,
    disk::{kept, of_disk, scanned},
    eventually, get, heavy, light, metrics,
    process::config_text,
    within,
};
use rustix::process::Signal;
use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

const MISS: &str = "castier; fwd=uri-miss; stored; detail=origin";
const MEMORY_HIT: &str = "castier; hit; detail=memory";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_memory_does_not_take() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let castier = Castier::start(&origin.url(), &cache.config("1GiB", "")).await;
    let sizes = [64 * KIB + 1, 300 * KIB, MIB + 1, 20 * MIB + 4711];
    for (n, size) in sizes.into_iter().enumerate() {
        let blob = origin.blob(size);
        let cold = get(castier.public, &blob).await;
        cold.assert_is(&blob);
        assert_eq!(cold.cache_status(), MISS);
        kept(&castier, n as u64 + 1).await;
        // Two gets, and a third and fourth: no number of them brings it to memory.
        assert_hit(&castier, &blob).await;
        assert_hit(&castier, &blob).await;
        let head = Request::new("HEAD", blob.path()).send(castier.public).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some(size.to_string().as_str())));
        assert_eq!((origin.gets(&blob), origin.requests("HEAD", &blob).len()), (1, 0), "{size}");
    }
    let books = assert_ledger(&castier).await;
    let hits = ["disk", "memory"].map(|tier| books.sum("castier_hits_total", &[("tier", tier)]));
    assert_eq!(hits, [4 * sizes.len() as u64, 0]);
    assert!(books.sum("castier_http_response_bytes_total", &[("from", "disk")]) >= 2 * sizes.iter().sum::<u64>());
    assert_eq!(cache.count("tmp"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_finds_everything() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "");
    let mut blobs: Vec<_> = [1, 10 * KIB, 64 * KIB, 100 * KIB, 5 * MIB].into_iter().map(|size| origin.blob(size)).collect();
    for end in [Signal::TERM, Signal::KILL] {
        let mut castier = Castier::start(&origin.url(), &config).await;
        let small = origin.blob(1000);
        blobs.push(small.clone());
        for blob in &blobs {
            get(castier.public, blob).await.assert_is(blob);
        }
        assert_eq!(get(castier.public, &small).await.cache_status(), MEMORY_HIT);
        scanned(&castier).await;
        kept(&castier, blobs.len() as u64).await;
        castier.signal(end);
        let status = castier.exit().await;
        assert_eq!(status.code(), (end == Signal::TERM).then_some(0), "{status}");
        let castier = Castier::start(&origin.url(), &config).await;
        for blob in &blobs {
            // The first of these gets does not know the blob in memory, and the second only offers it there.
            assert_hit(&castier, blob).await;
            assert_eq!(origin.gets(blob), 1);
        }
        assert_eq!(assert_ledger(&castier).await.total("castier_loads_total"), 0);
    }
}

/// The end waits for the write-behind queue, even while a stalled request runs until it is cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_waits_for_what_waits_to_be_written() {
    let _turn = light().await;
    let (origin, cache, gate) = (LyingOrigin::start().await, Cache::new(), Gate::new());
    let config = cache.config("1GiB", "shutdown.grace = \"100ms\"");
    let mut castier = Castier::start(&origin.url(), &config).await;
    let stuck = origin.blob_with(4 * MIB, [Lie::honest().stall(2 * MIB, &gate)]);
    let from = castier.public;
    let held = tokio::spawn(async move { Download::default().of(&stuck, from).await });
    let blobs: Vec<_> = (0..300).map(|_| origin.blob(60 * KIB)).collect();
    let mut conn = Conn::open(castier.public).await;
    for blob in &blobs {
        conn.ask(&Request::get(blob.path())).await.assert_is(blob);
    }
    castier.signal(Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0));
    assert!(!held.await.unwrap().complete);
    gate.open();
    assert!(blobs.iter().all(|blob| cache.file(blob).exists()), "{} of 300 blobs are kept", cache.files().len());
    assert_eq!(cache.count("tmp"), 0);
}

#[tokio::test]
async fn repeated_hits_lead_to_memory() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "");
    let blob = origin.blob(20 * KIB);
    let mut castier = Castier::start(&origin.url(), &config).await;
    get(castier.public, &blob).await.assert_is(&blob);
    kept(&castier, 1).await;
    castier.signal(Signal::KILL);
    castier.exit().await;
    let castier = Castier::start(&origin.url(), &config).await;
    assert_hit(&castier, &blob).await;
    eventually("memory has it", async || (get(castier.public, &blob).await.cache_status() == MEMORY_HIT).then_some(())).await;
    assert_eq!(origin.gets(&blob), 1);
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_origin_down_everything_kept_is_served() {
    let _turn = light().await;
    let (mut origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "origin.connect_timeout = \"500ms\"");
    let mut blobs: Vec<_> = (0..30).map(|n| origin.blob(1 + n * n * 3 * KIB)).collect();
    blobs.push(Blob::of(b""));
    origin.add(&blobs[30]);
    let mut castier = Castier::start(&origin.url(), &config).await;
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, blobs.len() as u64).await;
    castier.signal(Signal::KILL);
    castier.exit().await;
    origin.down().await;
    let castier = Castier::start(&origin.url(), &config).await;
    scanned(&castier).await;
    for blob in &blobs {
        let head = Request::new("HEAD", blob.path()).send(castier.public).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some(blob.size.to_string().as_str())));
        assert_hit(&castier, blob).await;
    }
    get(castier.public, &Blob::new(100)).await.assert_problem(502);
    assert_ledger(&castier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_are_kept_and_forgotten() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "allow_delete = true");
    let mut castier = Castier::start(&origin.url(), &config).await;
    let [purged, deleted, chunked] = [3 * MIB, 700 * KIB, 2 * MIB].map(Blob::new);
    for (n, blob) in [&purged, &deleted, &chunked].into_iter().enumerate() {
        let put = Request::new("PUT", blob.path());
        let put = if n == 2 { put.chunks(&blob.whole(), 10_000) } else { put.body(blob.whole()) };
        assert_eq!(put.send(castier.public).await.status, 201);
        kept(&castier, n as u64 + 1).await;
        assert_hit(&castier, blob).await;
        assert_eq!(origin.gets(blob), 0);
    }
    let wrong = Request::new("PUT", Blob::new(MIB).path()).body(chunked.whole()).send(castier.public).await;
    wrong.assert_problem(422);
    assert_eq!(Request::new("POST", format!("/purge/{}", purged.digest)).send(castier.admin).await.status, 200);
    assert_eq!(Request::new("DELETE", deleted.path()).send(castier.public).await.status, 204);
    assert!(!cache.file(&purged).exists() && !cache.file(&deleted).exists() && cache.file(&chunked).exists());
    // A forgotten blob stays forgotten.
    castier.signal(Signal::KILL);
    castier.exit().await;
    let castier = Castier::start(&origin.url(), &config).await;
    get(castier.public, &deleted).await.assert_problem(404);
    let again = get(castier.public, &purged).await;
    again.assert_is(&purged);
    assert_eq!((again.cache_status(), origin.gets(&purged)), (MISS, 1));
    assert_hit(&castier, &chunked).await;
    assert_eq!(cache.count("tmp"), 0);
    assert_ledger(&castier).await;
}

#[tokio::test]
async fn one_directory_one_castier() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "");
    let castier = Castier::start(&origin.url(), &config).await;
    let url = origin.url();
    let second = Castier::once(|command, dir| {
        let path = dir.join("castier.toml");
        fs::write(&path, config_text(&url, &config)).unwrap();
        command.arg("--config").arg(path);
    });
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(
        said.trim().lines().count() == 1 && said.contains(cache.root().to_str().unwrap()),
        "one line that names the directory:\n{said}"
    );
    // The first one has not noticed.
    let blob = origin.blob(MIB);
    get(castier.public, &blob).await.assert_is(&blob);
    kept(&castier, 1).await;
    assert_hit(&castier, &blob).await;
}

/// Gets `blobs` over a few connections, while `until` allows it. Checks them, and returns their number.
async fn get_all(castier: &Castier, blobs: &Arc<Vec<Blob>>, until: Instant, cache_status: &'static str) -> usize {
    let (next, mut clients) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    for _ in 0..16 {
        let (blobs, next, from) = (blobs.clone(), next.clone(), castier.public);
        clients.spawn(async move {
            let (mut conn, mut got) = (Conn::open(from).await, 0);
            while Instant::now() < until
                && let Some(blob) = blobs.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let reply = conn.ask(&Request::get(blob.path())).await;
                reply.assert_is(blob);
                assert_eq!(reply.cache_status(), cache_status);
                got += 1;
            }
            got
        });
    }
    clients.join_all().await.into_iter().sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_with_many_blobs_answers_at_once() {
    let _turn = heavy().await;
    let (mut origin, cache) = (LyingOrigin::start().await, Cache::new());
    // Nothing in memory, so that every hit is one from disk.
    let config = cache.config("1GiB", "").replace("\"64KiB\"", "\"1B\"");
    let (most, patience) = if std::env::var_os("TEST_FULL").is_some() { (100_000_u64, 300) } else { (20_000, 5) };
    let blobs: Vec<_> = (0..most).map(|n| Blob::of(&n.to_le_bytes().repeat(20))).collect();
    blobs.iter().for_each(|blob| origin.add(blob));
    let mut blobs = Arc::new(blobs);
    let mut castier = Castier::start(&origin.url(), &config).await;
    let got = get_all(&castier, &blobs, Instant::now() + Duration::from_secs(patience), MISS).await;
    Arc::get_mut(&mut blobs).unwrap().truncate(got);
    assert!(got > 500, "{got} blobs in 5 s");
    kept(&castier, got as u64).await;
    castier.signal(Signal::KILL);
    castier.exit().await;
    origin.down().await;
    let start = Instant::now();
    let castier = Castier::start(&origin.url(), &config).await;
    assert_hit(&castier, &blobs[got / 2]).await;
    let first = start.elapsed();
    assert!(first < Duration::from_secs(1), "{first:?} to the first answer");
    let listed = metrics(&castier).await.sum("castier_disk_scan_progress_ratio", &[]);
    let hits = within(
        Duration::from_secs(60),
        "all hits",
        get_all(&castier, &blobs, start + Duration::from_secs(30), "castier; hit; detail=disk"),
    )
    .await;
    assert_eq!(hits, got);
    scanned(&castier).await;
    let now = metrics(&castier).await;
    assert_eq!((of_disk(&now, "castier_tier_blobs"), of_disk(&now, "castier_hits_total")), (got as u64, got as u64 + 2));
    println!("{got} blobs, {first:?} to the first answer, when the list was done to {listed}");
    assert_ledger(&castier).await;
}
