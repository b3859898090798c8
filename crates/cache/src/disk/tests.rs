//! Tests of the disk tier beyond the contract of every tier: restarts, damage, full disks, and files that agree with the index.

mod damage;
mod files;
mod writes;

use super::*;
use crate::tier::tests::{blob, read};
use castier_config::{Policy, Size, Span};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A directory with a tier in it.
struct TestTier {
    directory: tempfile::TempDir,
    config: config::Disk,
    registry: prometheus::Registry,
    metrics: Arc<Metrics>,
    disk: Option<Arc<Disk>>,
    /// The digests that the scrub found damaged.
    damaged: Option<mpsc::Receiver<Digest>>,
}

impl TestTier {
    /// A tier with the defaults, LRU, no scrub, and then `change`.
    fn new(change: impl FnOnce(&mut config::Disk)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let mut config = config::Disk { path, policy: Policy::Lru, scrub_rate: Size::new(0), ..config::Disk::default() };
        change(&mut config);
        let registry = prometheus::Registry::new();
        let metrics = Arc::new(Metrics::new(&registry).unwrap());
        let mut tier = Self { directory, config, registry, metrics, disk: None, damaged: None };
        tier.open();
        tier
    }

    fn open(&mut self) {
        let (sender, damaged) = mpsc::channel(8);
        self.disk = Some(Disk::open(&self.config, self.metrics.clone(), sender).unwrap());
        self.damaged = Some(damaged);
    }

    /// Restarts the tier. Drop all its blobs before.
    async fn reopen(&mut self) {
        self.close();
        self.open();
        self.scanned().await;
    }

    fn close(&mut self) {
        assert_eq!(self.disk.take().map(Arc::into_inner).map(|disk| disk.is_some()), Some(true), "the test still holds the tier");
    }

    async fn scanned(&self) {
        until("the scan is done", || !self.store.is_scanning()).await;
    }

    fn root(&self) -> &Path {
        &self.config.path
    }

    /// All finished files.
    fn files(&self) -> Vec<PathBuf> {
        (0..=255).flat_map(|first| list(&self.store.directory(first))).collect()
    }

    /// The bytes that they take on disk, as `du` counts.
    fn used(&self) -> u64 {
        self.files().iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
    }

    /// Keeps a blob. Returns it and the path of its file.
    async fn keep(&self, len: usize, seed: u64) -> (Verified<Bytes>, PathBuf) {
        let blob = blob(len, seed);
        self.keep_now(blob.clone()).await;
        let path = self.store.path(&blob.digest());
        (blob, path)
    }

    /// The blob's bytes, if the tier has it undamaged.
    async fn whole(&self, blob: &Verified<Bytes>) -> Option<Vec<u8>> {
        let kept = self.find(&blob.digest()).await?;
        read(&kept, 0, kept.size(), 65_536).await.ok()
    }
}

impl std::ops::Deref for TestTier {
    type Target = Disk;
    fn deref(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }
}

fn list(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Waits for a condition. Panics after 30 seconds.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
