//! kill -9 during fills and evictions: afterwards the files are complete, and the index agrees with them.

use crate::support::{
    Blob, Cache, Castier, Conn, Download, KIB, LyingOrigin, Random, assert_ledger,
    disk::{Kept, of_disk, scanned},
    eventually, get, heavy, metrics,
};
use rustix::process::Signal;
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use tokio::task::JoinSet;

const CAPACITY: u64 = 8 << 20;
/// The allocation unit of file systems.
const DISK_BLOCK: u64 = 4096;

/// Clients that get blobs at random until `stop`.
struct Load {
    clients: JoinSet<()>,
    stop: Arc<AtomicBool>,
    /// Answers so far.
    answers: Arc<AtomicU64>,
}

impl Load {
    fn start(castier: &Castier, blobs: &Arc<Vec<Blob>>, random: &mut Random) -> Self {
        let mut load = Self { clients: JoinSet::new(), stop: Arc::default(), answers: Arc::default() };
        for _ in 0..6 {
            let (blobs, stop, answers, from) = (blobs.clone(), load.stop.clone(), load.answers.clone(), castier.public);
            let mut random = random.fork();
            load.clients.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let blob = &blobs[random.below(blobs.len() as u64) as usize];
                    // castier may have been killed since the last answer.
                    let Ok(conn) = Conn::try_open(from).await else { return };
                    let outcome = Download::default().over(conn, blob).await;
                    outcome.assert_no_whole_lie(blob);
                    answers.fetch_add(1, Ordering::SeqCst);
                    if !outcome.complete {
                        // castier has been killed.
                        return;
                    }
                    outcome.assert_is(blob);
                }
            });
        }
        load
    }
}

/// Waits until the files agree with the index. Returns them.
async fn files_agree(castier: &Castier, cache: &Cache) -> Vec<Kept> {
    let (files, told) = eventually("as many files as the index has blobs", async || {
        let files = cache.files();
        let now = metrics(castier).await;
        let told = ["castier_tier_blobs", "castier_tier_bytes"].map(|name| of_disk(&now, name));
        let blocks: u64 = files.iter().map(|file| file.len.next_multiple_of(DISK_BLOCK)).sum();
        (told == [files.len() as u64, blocks]).then_some((files, told))
    })
    .await;
    assert!(told[1] <= CAPACITY, "{told:?}");
    let taken: u64 = files.iter().map(|file| file.taken).sum();
    // A file system may keep a block or two of its own for a file.
    assert!(taken.abs_diff(told[1]) <= 2 * DISK_BLOCK * told[0], "{taken} bytes are taken, and {told:?} is told");
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_of_kill_nine() {
    let _turn = heavy().await;
    let mut random = Random::seeded();
    let rounds: u64 = std::env::var("TEST_ROUNDS").map_or(20, |text| text.parse().expect("TEST_ROUNDS is a number"));
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config(&CAPACITY.to_string(), "disk.policy = \"lru\"\nmemory.capacity = \"1MiB\"\nfill.memory = \"64MiB\"");
    let blobs: Arc<Vec<_>> = Arc::new((0..100).map(|n| origin.blob(1 + n * 7 * KIB)).collect());
    let by_digest: HashMap<_, _> = blobs.iter().map(|blob| (blob.digest, blob.clone())).collect();
    let (mut found, mut evictions) = (0, 0);
    for round in 0..rounds {
        let mut castier = Castier::start(&origin.url(), &config).await;
        assert_eq!(cache.count("tmp"), 0, "round {round}");
        scanned(&castier).await;
        let files = files_agree(&castier, &cache).await;
        assert!(round < 2 || !files.is_empty(), "round {round}: nothing is left");
        for file in &files {
            let blob = &by_digest[&file.digest];
            let before = origin.gets(blob);
            let reply = get(castier.public, blob).await;
            reply.assert_is(blob);
            assert_eq!((reply.cache_status(), origin.gets(blob)), ("castier; hit; detail=disk", before), "round {round}");
            found += 1;
        }
        let books = assert_ledger(&castier).await;
        assert_eq!((books.corrupt("disk"), cache.count("quarantine")), (0, 0), "round {round}");
        let mut load = Load::start(&castier, &blobs, &mut random);
        let enough = 1 + random.below(150);
        eventually("so many answers", async || (load.answers.load(Ordering::SeqCst) >= enough).then_some(())).await;
        evictions += metrics(&castier).await.sum("castier_tier_evictions_total", &[("tier", "disk")]);
        castier.signal(Signal::KILL);
        castier.exit().await;
        load.stop.store(true, Ordering::SeqCst);
        while let Some(client) = load.clients.join_next().await {
            client.unwrap();
        }
    }
    println!("{rounds} rounds, {found} blobs found again, {evictions} evicted");
    assert!(found > 0 && (evictions > 0 || rounds < 10), "{found} found, {evictions} evicted");
}
