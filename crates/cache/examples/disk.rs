//! Measures the disk tier: `cargo run --release -p castier-cache --example disk -- DIRECTORY [BLOBS]`. The directory must be empty or an earlier run's.
#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has nothing to say")]

use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier};
use castier_cache::{Disk, Metrics};
use castier_config::{self as config, Size};
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().unwrap_or_else(|| "./castier-data/bench".into()));
    let blobs: u64 = args.next().map_or(100_000, |count| count.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let hot = config::Disk { path: path.join("hot"), scrub_rate: Size::new(0), write_behind: Size::gib(1), ..config::Disk::default() };
        many(config::Disk { path: path.join("many"), ..hot.clone() }, blobs).await;
        let disk = Disk::open(&hot, Arc::new(Metrics::new(&Default::default()).unwrap()), tokio::sync::mpsc::channel(1).0).unwrap();
        reads(&disk).await;
        writes(&disk).await;
    });
}

fn blob(len: usize, seed: u64) -> Verified<Bytes> {
    let mut bytes = vec![seed as u8; len];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut verifier = Verifier::any(Vec::new());
    verifier.write(&bytes.into()).unwrap();
    verifier.finish().unwrap()
}

/// Finds and reads from the page cache, on one thread.
async fn reads(disk: &Disk) {
    for (len, rounds) in [(1 << 10, 50_000), (64 << 10, 20_000), (1 << 20, 2_000)] {
        let blob = blob(len, len as u64);
        disk.keep_later(blob.clone(), castier_cache::Visibility::Public);
        while disk.find(&blob.digest()).await.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let started = Instant::now();
        for _ in 0..rounds {
            read_all(disk, &blob.digest()).await;
        }
        let each = started.elapsed() / rounds;
        println!("find and read {len} bytes: {each:?}, {:.2} GB/s", len as f64 / each.as_nanos() as f64);
    }
}

async fn read_all(disk: &Disk, digest: &Digest) {
    let kept = disk.find(digest).await.unwrap();
    let mut at = 0;
    while at < kept.size() {
        at += kept.read(at, usize::MAX).await.unwrap().len() as u64;
    }
}

async fn writes(disk: &Disk) {
    for (len, count) in [(1 << 10, 20_000), (64 << 10, 4_000), (1 << 20, 400_u64)] {
        // No run has made these before.
        let base = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let blobs: Vec<_> = (0..count).map(|i| blob(len, base + i)).collect();
        let before = disk.stats(0).blobs;
        let started = Instant::now();
        blobs.into_iter().for_each(|blob| disk.keep_later(blob, castier_cache::Visibility::Public));
        let queued = started.elapsed();
        until(|| disk.stats(0).blobs, before + count).await;
        let took = started.elapsed();
        let rate = len as f64 * count as f64 / took.as_secs_f64() / 1e6;
        println!(
            "write {count} blobs of {len} behind: queued in {queued:?}, written in {took:?}, {rate:.0} MB/s, {:?} each",
            took / count as u32
        );
    }
}

/// Opens a tier of many small blobs, and says how long it takes to serve and to list, and what the index takes in memory. The blobs
/// that are missing are made afterwards, for the next run: in this one memory would have been used already.
async fn many(config: config::Disk, count: u64) {
    let before = resident();
    let metrics = Arc::new(Metrics::new(&Default::default()).unwrap());
    let started = Instant::now();
    let disk = Disk::open(&config, metrics.clone(), tokio::sync::mpsc::channel(1).0).unwrap();
    let opened = started.elapsed();
    let last = disk.find(&blob(100, count - 1).digest()).await.is_some();
    let answered = started.elapsed();
    while metrics.disk_scan_progress.get() < 1.0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (blobs, listed) = (disk.stats(0).blobs, started.elapsed());
    println!("opened in {opened:?}, first answer ({last}) after {answered:?}, {blobs} listed in {listed:?}");
    println!("resident memory: {} bytes a blob", resident().saturating_sub(before) / blobs.max(1));
    (blobs..count).for_each(|seed| disk.keep_later(blob(100, seed), castier_cache::Visibility::Public));
    until(|| disk.stats(0).blobs, count).await;
}

/// Waits until the figure is at least so much.
async fn until(figure: impl Fn() -> u64, least: u64) {
    while figure() < least {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
