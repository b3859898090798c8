//! A disk that hangs costs a wait, and never a request.

use crate::support::{
    Blob, Castier, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, assert_hit, assert_ledger, disk::kept, eventually, get,
    hang::HangingFs, light, metrics, within,
};
use futures::future::join_all;
use rustix::{
    fs::{Advice, fadvise},
    process::Signal,
};
use std::{
    fs,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

/// A tier on a file system that can hang, with a short timeout.
fn config(fs: &HangingFs) -> String {
    format!(
        "disk.path = {:?}\ndisk.capacity = \"1GiB\"\ndisk.scrub_rate = 0\nmemory.max_blob = \"64KiB\"\ndisk.timeout = \"500ms\"\n\
         disk.cooldown = \"1s\"\ndisk.open_files = 1",
        fs.path().join("cache")
    )
}

/// Much less than the programs' own timeouts.
const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_costs_no_request() {
    let _turn = light().await;
    let Some(fs) = HangingFs::mount().await else { return };
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), &config(&fs)).await;
    let small = origin.blob(10 * KIB);
    get(castier.public, &small).await.assert_is(&small);
    let blobs: Vec<_> = (0..8).map(|n| origin.blob(300 * KIB + n * 100_003)).collect();
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, 9).await;
    let hang = fs.hang().await;
    // Hits of memory, hits of the disk, and loads: large, small, by many at once.
    let mut clients = JoinSet::new();
    let start = Instant::now();
    for n in 0..300 {
        let (blob, from) = (blobs[n % 8].clone(), castier.public);
        clients.spawn(async move { Download::default().of(&blob, from).await.assert_is(&blob) });
    }
    for size in [KIB, 100 * KIB, 3 * MIB, 12 * MIB] {
        let (blob, from) = (origin.blob(size), castier.public);
        clients.spawn(async move { Download::default().of(&blob, from).await.assert_is(&blob) });
    }
    within(Duration::from_millis(400), "a hit of memory", async { get(castier.public, &small).await.assert_is(&small) }).await;
    within(4 * SOON, "all answers", async {
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
    })
    .await;
    println!("304 answers in {:?}", start.elapsed());
    let errors = |kind: &'static str| {
        let castier = &castier;
        async move { metrics(castier).await.sum("castier_disk_errors_total", &[("kind", kind)]) }
    };
    assert!(errors("timeout").await > 0);
    let told = castier.output().matches("does not answer").count();
    assert!((1..=4).contains(&told), "told {told} times:\n{}", castier.output());
    // The hang is known: no request waits for the disk now.
    let upload = Blob::new(20 * MIB);
    let put = within(SOON, "an upload", Request::new("PUT", upload.path()).body(upload.whole()).send(castier.public)).await;
    assert_eq!(put.status, 201);
    let purge = within(SOON, "a purge", Request::new("POST", format!("/purge/{}", blobs[7].digest)).send(castier.admin)).await;
    assert_eq!(purge.status, 200);
    assert_eq!(Request::get("/healthz").send(castier.admin).await.status, 200);
    hang.end();
    // The tier recovers by itself, with its blobs.
    eventually("a hit of the disk", async || {
        let reply = get(castier.public, &blobs[0]).await;
        reply.assert_is(&blobs[0]);
        (reply.cache_status() == "castier; hit; detail=disk").then_some(())
    })
    .await;
    eventually("what was purged is gone", async || {
        let name = blobs[7].digest.to_string();
        (!fs.behind().join("cache").join(&name[..2]).join(&name).exists()).then_some(())
    })
    .await;
    eventually("new blobs are kept", async || {
        let blob = origin.blob(200 * KIB);
        get(castier.public, &blob).await.assert_is(&blob);
        (get(castier.public, &blob).await.cache_status() == "castier; hit; detail=disk").then_some(())
    })
    .await;
    let books = assert_ledger(&castier).await;
    assert_eq!(books.corrupt("disk"), 0, "no file is blamed for it");
    assert_hit(&castier, &blobs[1]).await;
}

/// Uploads wait for the origin only, even before the hang is noticed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_do_not_wait_for_the_disk() {
    let _turn = light().await;
    let Some(fs) = HangingFs::mount().await else { return };
    let origin = LyingOrigin::start().await;
    let config = config(&fs).replace("\"500ms\"", "\"30s\"");
    let castier = Castier::start(&origin.url(), &config).await;
    let hang = fs.hang().await;
    for size in [10 * KIB, 300 * KIB, 20 * MIB] {
        let blob = Blob::new(size);
        let put = within(SOON, "an upload", Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public)).await;
        assert_eq!(put.status, 201, "{size}");
    }
    hang.end();
}

/// Uploads that the outbox cannot take are refused in time. The rest goes on, and so do uploads after the hang.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_that_hangs_refuses_uploads_in_time() {
    let _turn = light().await;
    let Some(fs) = HangingFs::mount().await else { return };
    let secret = fs.behind().join("secret");
    fs::write(&secret, "secret").unwrap();
    // No store listens there.
    let config = format!(
        "{}\norigin.write = \"behind\"\n[origin.s3]\nendpoint = \"http://127.0.0.1:9\"\naccess_key_id = \"key\"\n\
         secret_access_key_file = {secret:?}\n",
        config(&fs)
    );
    let castier = Castier::start("s3://blobs", &config).await;
    let put = async |blob: &Blob| Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await;
    let small = Blob::new(10 * KIB);
    assert_eq!(put(&small).await.status, 201);
    get(castier.public, &small).await.assert_is(&small);
    let hang = fs.hang().await;
    let refused: Vec<_> = (0..60).map(|n| Blob::new(if n % 2 == 0 { KIB + n } else { 300 * KIB + n })).collect();
    within(
        2 * SOON,
        "the refusals",
        join_all(refused.iter().map(async |blob| {
            let answer = put(blob).await;
            assert!(answer.status == 507 && answer.header("retry-after").is_some(), "{}", answer.status);
        })),
    )
    .await;
    within(SOON, "a hit of memory", async { get(castier.public, &small).await.assert_is(&small) }).await;
    assert_eq!(within(SOON, "the health", Request::get("/healthz").send(castier.admin)).await.status, 200);
    hang.end();
    for blob in &refused {
        eventually("an upload after the hang", async || matches!(put(blob).await.status, 200 | 201).then_some(())).await;
        get(castier.public, blob).await.assert_is(blob);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_start_and_the_end_do_not_wait_for_a_disk_that_hangs() {
    let _turn = light().await;
    let Some(fs) = HangingFs::mount().await else { return };
    let origin = LyingOrigin::start().await;
    let config = config(&fs) + "\nshutdown.grace = \"100ms\"";
    let mut castier = Castier::start(&origin.url(), &config).await;
    let blobs: Vec<_> = (0..4).map(|_| origin.blob(200 * KIB)).collect();
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, 4).await;
    let _hang = fs.hang().await;
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
    }
    let fresh = origin.blob(10 * KIB);
    get(castier.public, &fresh).await.assert_is(&fresh);
    castier.signal(Signal::TERM);
    let status = within(3 * SOON, "the end", castier.exit()).await;
    assert_eq!(status.code(), Some(0), "{}", castier.output());
    let (url, start) = (origin.url(), Instant::now());
    let again = tokio::task::spawn_blocking(move || {
        Castier::once(|command, dir| {
            let path = dir.join("castier.toml");
            fs::write(&path, crate::support::process::config_text(&url, &config)).unwrap();
            command.arg("--config").arg(path);
        })
    });
    let again = within(3 * SOON, "the start", again).await.unwrap();
    let said = String::from_utf8(again.stderr).unwrap();
    assert_eq!(again.status.code(), Some(1), "{said}");
    assert!(said.contains("disk.path") && said.contains("does not answer") && start.elapsed() < SOON, "{said}");
}

/// Blobs that need `fill.spool_dir` get a clear refusal. Hits and small blobs are not affected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_directory_that_hangs_harms_no_hit() {
    let _turn = light().await;
    let Some(fs) = HangingFs::mount().await else { return };
    let origin = LyingOrigin::start().await;
    let config =
        format!("fill.spool_dir = {:?}\nfill.spool_timeout = \"500ms\"\nmemory.max_blob = \"64KiB\"\norigin.retries = 0", fs.path());
    let castier = Castier::start(&origin.url(), &config).await;
    let small = origin.blob(10 * KIB);
    get(castier.public, &small).await.assert_is(&small);
    let hang = fs.hang().await;
    let mut clients = JoinSet::new();
    for _ in 0..100 {
        let (blob, from) = (origin.blob(2 * MIB), castier.public);
        clients.spawn(async move { get(from, &blob).await });
    }
    for _ in 0..20 {
        within(Duration::from_secs(1), "a hit", async { get(castier.public, &small).await.assert_is(&small) }).await;
        let cold = origin.blob(20 * KIB);
        within(SOON, "a small blob", async { get(castier.public, &cold).await.assert_is(&cold) }).await;
    }
    within(2 * SOON, "all answers", async {
        while let Some(reply) = clients.join_next().await {
            reply.unwrap().assert_problem(503);
        }
    })
    .await;
    hang.end();
    eventually("large blobs pass again", async || (get(castier.public, &origin.blob(2 * MIB)).await.status == 200).then_some(())).await;
}

/// The spool file of a blob hangs in the middle, with readers that have some, most or none of its bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_under_a_flight_cuts_nobody() {
    let _turn = light().await;
    let Some(fs) = HangingFs::mount().await else { return };
    let (origin, gate) = (LyingOrigin::start().await, Gate::new());
    let castier = Castier::start(&origin.url(), &config(&fs)).await;
    let blob = origin.blob_with(12 * MIB, [Lie::honest().stall(6 * MIB, &gate)]);
    let (fast, slow) =
        (Download::default(), Download { slowly: Some((64 * KIB as usize, Duration::from_millis(1))), ..Download::default() });
    let readers: Vec<_> = [fast.clone(), fast.clone(), slow.clone()]
        .into_iter()
        .map(|reader| {
            let (blob, from) = (blob.clone(), castier.public);
            tokio::spawn(async move { reader.of(&blob, from).await.assert_is(&blob) })
        })
        .collect();
    eventually("two have what there is", async || (fast.received.load(Ordering::Relaxed) > 11 * MIB).then_some(())).await;
    eventually("one has little", async || (slow.received.load(Ordering::Relaxed) > 0).then_some(())).await;
    // Bytes that are not written yet are in memory, and written bytes are read from the page cache: both work.
    let files = castier.files(&fs.path());
    eventually("the file has the beginning", async || files.iter().any(|file| file.metadata().unwrap().len() >= 5 * MIB).then_some(()))
        .await;
    files.iter().for_each(|file| fadvise(file, 0, None, Advice::DontNeed).unwrap());
    let hang = fs.hang().await;
    let late = {
        let (blob, from) = (blob.clone(), castier.public);
        tokio::spawn(async move { Download::default().of(&blob, from).await.assert_is(&blob) })
    };
    gate.open();
    for reader in readers.into_iter().chain([late]) {
        within(6 * SOON, "a reader's end", reader).await.unwrap();
    }
    assert_eq!(origin.gets(&blob), 2, "the beginning was fetched once more, for all");
    hang.end();
    assert_ledger(&castier).await;
}
