//! What the disk tier promises beyond the contract of every tier: restarts, rot, full disks, and files that agree with the books.

mod files;
mod rot;
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

/// A directory, and the tier in it.
struct Bench {
    directory: tempfile::TempDir,
    config: config::Disk,
    registry: prometheus::Registry,
    metrics: Arc<Metrics>,
    disk: Option<Arc<Disk>>,
    /// What the scrub found.
    rotten: Option<mpsc::Receiver<Digest>>,
}

impl Bench {
    /// A tier with everything at its default, but for `change`; no scrub.
    fn new(change: impl FnOnce(&mut config::Disk)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let mut config = config::Disk { path, policy: Policy::Lru, scrub_rate: Size::new(0), ..config::Disk::default() };
        change(&mut config);
        let registry = prometheus::Registry::new();
        let metrics = Arc::new(Metrics::new(&registry).unwrap());
        let mut bench = Self { directory, config, registry, metrics, disk: None, rotten: None };
        bench.open();
        bench
    }

    fn open(&mut self) {
        let (tell, rotten) = mpsc::channel(8);
        self.disk = Some(Disk::open(&self.config, self.metrics.clone(), tell).unwrap());
        self.rotten = Some(rotten);
    }

    /// What a restart does. All that was found must have been let go of.
    async fn reopen(&mut self) {
        self.close();
        self.open();
        self.scanned().await;
    }

    fn close(&mut self) {
        assert_eq!(self.disk.take().map(Arc::into_inner).map(|disk| disk.is_some()), Some(true), "somebody still has the tier");
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

    /// What `du` says of them.
    fn used(&self) -> u64 {
        self.files().iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
    }

    /// Keeps a blob, and says where.
    async fn keep(&self, len: usize, seed: u64) -> (Verified<Bytes>, PathBuf) {
        let blob = blob(len, seed);
        self.keep_now(blob.clone()).await;
        let path = self.store.path(&blob.digest());
        (blob, path)
    }

    /// Every byte of the blob, if the tier has it and all of it is sound.
    async fn whole(&self, blob: &Verified<Bytes>) -> Option<Vec<u8>> {
        let kept = self.find(&blob.digest()).await?;
        read(&kept, 0, kept.size(), 65_536).await.ok()
    }
}

impl std::ops::Deref for Bench {
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

/// Waits until something is so; fails if it takes too long.
async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < deadline, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
