//! Faults of disks: flipped bits, no space, missing files, no descriptors. Clients notice nothing, or get a clear refusal.

use crate::support::{
    Blob, Cache, Castier, Conn, Download, KIB, LyingOrigin, MIB, Random, Request, assert_hit, assert_ledger,
    disk::{kept, of_disk},
    eventually, get, heavy, light, metrics,
    process::config_text,
};
use rustix::process::Signal;
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tempfile::TempDir;
use tokio::task::JoinSet;

/// Flips one bit of a file. Returns false if the file does not exist any more.
fn flip(path: &Path, bit: u64) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return false };
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8).unwrap();
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_rot_under_load() {
    let _turn = heavy().await;
    let mut random = Random::seeded();
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let castier = Castier::start(&origin.url(), &cache.config("1GiB", "").replace("\"64KiB\"", "\"1B\"")).await;
    let sizes = [KIB, 10 * KIB, 70 * KIB, 500 * KIB, 3 * MIB];
    let blobs: Arc<Vec<_>> = Arc::new((0..40).map(|n| origin.blob(sizes[n % 5] + n as u64)).collect());
    let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for _ in 0..6 {
        let (blobs, stop, answers, from) = (blobs.clone(), stop.clone(), answers.clone(), castier.public);
        let mut random = random.fork();
        clients.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let blob = &blobs[random.below(blobs.len() as u64) as usize];
                Download::default().of(blob, from).await.assert_is(blob);
                answers.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    let mut flipped = 0;
    while flipped < 150 {
        let files = cache.files();
        if !files.is_empty() {
            let file = &files[random.below(files.len() as u64) as usize];
            flipped += u64::from(flip(&file.path, random.below(file.len * 8)));
        }
        let due = answers.load(Ordering::SeqCst) + 5;
        eventually("more answers", async || (answers.load(Ordering::SeqCst) >= due || clients.try_join_next().is_some()).then_some(()))
            .await;
        assert_eq!(clients.len(), 6, "a client has failed");
    }
    stop.store(true, Ordering::SeqCst);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    for blob in blobs.iter() {
        get(castier.public, blob).await.assert_is(blob);
    }
    let books = assert_ledger(&castier).await;
    let aside = cache.count("quarantine") as u64;
    println!("{flipped} bits flipped, {} answers, {} found damaged", answers.load(Ordering::SeqCst), books.corrupt("disk"));
    assert!(books.corrupt("disk") >= 20 && (1..=books.corrupt("disk")).contains(&aside), "{} {aside}", books.corrupt("disk"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_is_set_aside_and_the_answer_goes_on() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "");
    let blobs = [12 * MIB, 2 * MIB, MIB].map(|size| origin.blob(size));
    let mut castier = Castier::start(&origin.url(), &config).await;
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, 3).await;
    castier.signal(Signal::KILL);
    castier.exit().await;
    // One file has a damaged block, one loses its end, and one is deleted.
    assert!(flip(&cache.file(&blobs[0]), 8 * 7 * MIB + 3));
    File::options().write(true).open(cache.file(&blobs[1])).unwrap().set_len(MIB).unwrap();
    fs::remove_file(cache.file(&blobs[2])).unwrap();
    let castier = Castier::start(&origin.url(), &config).await;
    for blob in &blobs {
        Download::default().of(blob, castier.public).await.assert_is(blob);
        assert_eq!(origin.gets(blob), 2);
    }
    kept(&castier, 3).await;
    for blob in &blobs {
        assert_hit(&castier, blob).await;
    }
    assert!(cache.root().join("quarantine").join(blobs[0].digest.to_string()).exists());
    let books = assert_ledger(&castier).await;
    assert_eq!((books.corrupt("disk"), books.source_loads()), (1, [3, 0, 0]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scrub_finds_what_nobody_asks_for() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "").replace("disk.scrub_rate = 0", "disk.scrub_rate = \"1GiB\"");
    let [rotten, sound] = [3 * MIB, 2 * MIB].map(|size| origin.blob(size));
    let mut castier = Castier::start(&origin.url(), &config).await;
    for blob in [&rotten, &sound] {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, 2).await;
    castier.signal(Signal::TERM);
    castier.exit().await;
    assert!(flip(&cache.file(&rotten), 8 * 2 * MIB));
    let castier = Castier::start(&origin.url(), &config).await;
    eventually("the scrub has found it", async || (metrics(&castier).await.corrupt("disk") == 1).then_some(())).await;
    eventually("it is fetched anew", async || (origin.gets(&rotten) == 2 && cache.file(&rotten).exists()).then_some(())).await;
    kept(&castier, 2).await;
    for blob in [&rotten, &sound] {
        assert_hit(&castier, blob).await;
    }
    assert_eq!((origin.gets(&sound), cache.count("quarantine")), (1, 1));
    assert_ledger(&castier).await;
}

/// A file system of 64 MiB. Unmounted on drop.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// None where this process may not mount.
    fn mount() -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"]).arg(dir.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_fails_no_request() {
    let _turn = heavy().await;
    let Some(tmpfs) = Tmpfs::mount() else {
        println!("skipped: only root may mount a small file system to fill");
        return;
    };
    let origin = LyingOrigin::start().await;
    let path = tmpfs.0.path().join("cache");
    let config = format!("disk.path = {path:?}\ndisk.capacity = \"10GiB\"\ndisk.cooldown = \"100ms\"\nmemory.max_blob = \"64KiB\"");
    let castier = Castier::start(&origin.url(), &config).await;
    let blobs: Arc<Vec<_>> = Arc::new((1..=20).map(|n| origin.blob(n * MIB + n)).collect());
    let mut clients = JoinSet::new();
    for client in 0..4 {
        let (blobs, from) = (blobs.clone(), castier.public);
        clients.spawn(async move {
            for n in 0..2 * blobs.len() {
                let blob = &blobs[(n * 7 + client * 5) % blobs.len()];
                Download::default().of(blob, from).await.assert_is(blob);
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    let upload = Blob::new(15 * MIB);
    assert_eq!(Request::new("PUT", upload.path()).body(upload.whole()).send(castier.public).await.status, 201);
    let books = assert_ledger(&castier).await;
    assert!(books.sum("castier_disk_write_errors_total", &[("reason", "full")]) > 0, "{}", books.text);
    assert!(of_disk(&books, "castier_hits_total") > 0 && of_disk(&books, "castier_tier_blobs") > 0, "{}", books.text);
    assert!((50 * MIB..64 * MIB).contains(&of_disk(&books, "castier_tier_capacity_bytes")), "the file system's size bounds the tier");
    // Blobs on disk are served from there.
    let held: Vec<_> =
        blobs.iter().filter(|blob| path.join(&blob.digest.to_string()[..2]).join(blob.digest.to_string()).exists()).collect();
    assert!(!held.is_empty());
    for blob in held {
        assert_hit(&castier, blob).await;
    }
    assert_eq!(fs::read_dir(path.join("tmp")).unwrap().count(), 0);
    assert_eq!(books.corrupt("disk"), 0);
}

/// A directory that is mounted read-only until drop.
struct ReadOnly(PathBuf);

impl ReadOnly {
    /// None where this process may not mount.
    fn over(path: PathBuf) -> Option<Self> {
        let mount = |arguments: &[&str]| Command::new("mount").args(arguments).arg(&path).output().is_ok_and(|run| run.status.success());
        if !mount(&["--bind", path.to_str().unwrap()]) {
            return None;
        }
        let mounted = Self(path.clone());
        mount(&["-o", "remount,ro,bind"]).then_some(mounted)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_turns_read_only_fails_no_request() {
    let _turn = light().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let config = cache.config("1GiB", "disk.cooldown = \"100ms\"");
    let castier = Castier::start(&origin.url(), &config).await;
    let before = origin.blob(300 * KIB);
    get(castier.public, &before).await.assert_is(&before);
    kept(&castier, 1).await;
    let Some(read_only) = ReadOnly::over(cache.root().join("tmp")) else {
        println!("skipped: only root may make a file system read-only");
        return;
    };
    // Through the write-behind queue, and through a file.
    for size in [10 * KIB, 300 * KIB, 9 * MIB] {
        let blob = origin.blob(size);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_hit(&castier, &before).await;
    }
    let refused = async || metrics(&castier).await.sum("castier_disk_write_errors_total", &[("reason", "read_only")]);
    eventually("it is counted", async || (refused().await > 0).then_some(())).await;
    assert_eq!(of_disk(&metrics(&castier).await, "castier_tier_blobs"), 1);
    drop(read_only);
    // It recovers by itself.
    eventually("a new blob is kept", async || {
        let blob = origin.blob(300 * KIB);
        get(castier.public, &blob).await.assert_is(&blob);
        cache.file(&blob).exists().then_some(())
    })
    .await;
    let books = assert_ledger(&castier).await;
    assert_eq!((books.corrupt("disk"), cache.count("quarantine")), (0, 0));
}

/// The answer to a client that may be refused: 200, or a clear 503. The connection of a served client stays open.
async fn ask(castier: &Castier, blob: &Blob, crowd: &mut Vec<Conn>) -> u16 {
    let mut conn = Conn::open(castier.public).await;
    let reply = conn.ask(&Request::get(blob.path())).await;
    if reply.status == 200 {
        reply.assert_is(blob);
        crowd.push(conn);
    } else {
        reply.assert_problem(503);
        assert_eq!(reply.header("retry-after"), Some("1"));
    }
    reply.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_run_out() {
    let _turn = heavy().await;
    let (origin, cache) = (LyingOrigin::start().await, Cache::new());
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("castier.toml");
    fs::write(&path, config_text(&origin.url(), &cache.config("1GiB", ""))).unwrap();
    let mut command = Command::new("prlimit");
    command.args(["--nofile=64:64", Castier::program(), "--config"]).arg(&path);
    let mut castier = Castier::run(command, dir).await;
    let blobs: Vec<_> = (0..10).map(|_| origin.blob(200 * KIB)).collect();
    for blob in &blobs {
        get(castier.public, blob).await.assert_is(blob);
    }
    kept(&castier, 10).await;
    let (mut crowd, mut seen) = (Vec::new(), Vec::new());
    for n in 0..100 {
        // Half of them request blobs on disk, half request blobs that must be loaded.
        let blob = if n % 2 == 0 { blobs[n % 10].clone() } else { origin.blob(100 * KIB) };
        seen.push(ask(&castier, &blob, &mut crowd).await);
    }
    let served = seen.iter().filter(|status| **status == 200).count();
    println!("of {} clients {served} were served: {seen:?}", seen.len());
    assert!((16..40).contains(&served), "of 64 descriptors {served} are for clients: {seen:?}");
    drop(crowd);
    for blob in &blobs {
        eventually("it serves again", async || {
            let asked = tokio::time::timeout(Duration::from_secs(2), get(castier.public, blob)).await;
            asked.is_ok_and(|reply| reply.status == 200 && reply.complete && blob.is_at(0, &reply.body)).then_some(())
        })
        .await;
    }
    let fresh = origin.blob(300 * KIB);
    get(castier.public, &fresh).await.assert_is(&fresh);
    let books = assert_ledger(&castier).await;
    assert_eq!((books.corrupt("disk"), cache.count("quarantine")), (0, 0), "no file is blamed for it");
    castier.signal(Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0));
}
