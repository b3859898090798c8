//! The contract of every tier.

use super::*;
use crate::{
    budget::Budget,
    disk::{Disk, DiskBlob},
    memory::Memory,
    metrics::Metrics,
};
use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier};
use castier_config::{self as config, Policy, Size};
use std::sync::Arc;

/// A blob of `len` bytes that depend on the seed.
pub(crate) fn blob(len: usize, seed: u64) -> Verified<Bytes> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    let bytes: Bytes = noise.take(len).collect();
    let mut verifier = Verifier::any(Vec::with_capacity(len));
    verifier.write(&bytes).unwrap();
    verifier.finish().unwrap()
}

/// A tier as the contract sees it.
trait Tier: Send + Sync {
    type Kept: Kept;
    fn find(&self, digest: &Digest) -> impl Future<Output = Option<Self::Kept>> + Send;
    fn keep(&self, blob: Verified<Bytes>) -> impl Future<Output = ()> + Send;
    fn forget(&self, digest: &Digest) -> impl Future<Output = ()> + Send;
}

/// A blob that a tier keeps.
pub(crate) trait Kept: Send + Sync {
    fn size(&self) -> u64;
    /// Bytes from offset `at`: at most `max` of them, and at least one unless `at` is at the end or `max` is 0.
    fn read(&self, at: u64, max: usize) -> impl Future<Output = Result<Bytes, Damaged>> + Send;
}

impl Tier for Memory {
    type Kept = Bytes;

    async fn find(&self, digest: &Digest) -> Option<Bytes> {
        Self::find(self, digest).map(|(bytes, _)| bytes)
    }

    async fn keep(&self, blob: Verified<Bytes>) {
        Self::keep(self, blob, crate::Visibility::Public);
    }

    async fn forget(&self, digest: &Digest) {
        Self::forget(self, digest);
    }
}

impl Kept for Bytes {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    async fn read(&self, at: u64, max: usize) -> Result<Bytes, Damaged> {
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(self.len());
        Ok(self.slice(start..start.saturating_add(max).min(self.len())))
    }
}

impl Tier for Disk {
    type Kept = Arc<DiskBlob>;

    async fn find(&self, digest: &Digest) -> Option<Arc<DiskBlob>> {
        Self::find(self, digest).await
    }

    async fn keep(&self, blob: Verified<Bytes>) {
        self.keep_now(blob).await;
    }

    async fn forget(&self, digest: &Digest) {
        Self::forget(self, digest).await;
    }
}

impl Kept for Arc<DiskBlob> {
    fn size(&self) -> u64 {
        DiskBlob::size(self)
    }

    async fn read(&self, at: u64, max: usize) -> Result<Bytes, Damaged> {
        DiskBlob::read(self, at, max).await
    }
}

/// All bytes from `at` to `to`, in reads of at most `max`.
pub(crate) async fn read(kept: &impl Kept, mut at: u64, to: u64, max: usize) -> Result<Vec<u8>, Damaged> {
    let mut all = Vec::new();
    while at < to {
        let wanted = max.min((to - at) as usize);
        let bytes = kept.read(at, wanted).await?;
        assert!(!bytes.is_empty() && bytes.len() <= wanted, "{} of {wanted} at {at}", bytes.len());
        at += bytes.len() as u64;
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// A tier to test, with what must outlive it.
struct Bench<T> {
    tier: Arc<T>,
    stats: fn(&T) -> TierStats,
    _directory: Option<tempfile::TempDir>,
}

fn memory(capacity: u64) -> Bench<Memory> {
    let capacity = Size::new(capacity);
    let tier = Memory::new(&config::Memory { capacity, max_blob: capacity, policy: Policy::Lru }, &Budget::new(1 << 30));
    Bench { tier: Arc::new(tier), stats: |tier| tier.stats(0), _directory: None }
}

fn disk(capacity: u64) -> Bench<Disk> {
    let directory = tempfile::tempdir().unwrap();
    let config = config::Disk {
        path: directory.path().to_owned(),
        capacity: Size::new(capacity),
        policy: Policy::Lru,
        scrub_rate: Size::new(0),
        ..config::Disk::default()
    };
    let tier = Disk::open(&config, Arc::new(Metrics::new(&Default::default()).unwrap()), tokio::sync::mpsc::channel(1).0).unwrap();
    Bench { tier, stats: |tier| tier.stats(0), _directory: Some(directory) }
}

/// Runs a part of the contract on every tier.
macro_rules! on_every_tier {
    ($($part:ident)*) => {
        mod memory_tier { $( #[tokio::test(flavor = "multi_thread")] async fn $part() { super::$part(super::memory).await; } )* }
        mod disk_tier { $( #[tokio::test(flavor = "multi_thread")] async fn $part() { super::$part(super::disk).await; } )* }
    };
}

on_every_tier! {
    finds_byte_for_byte_what_was_kept
    reads_any_range
    forgets
    keeps_again
    refuses_what_is_larger_than_it
    stays_within_its_capacity
    survives_everything_at_once
    stays_readable_while_held
}

async fn finds_byte_for_byte_what_was_kept<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(64 << 20);
    for (seed, len) in [0, 1, 4095, 4096, 65_535, 65_536, 65_537, 131_071, 131_072, 131_073, 3_000_000].into_iter().enumerate() {
        let blob = blob(len, seed as u64);
        assert!(bench.tier.find(&blob.digest()).await.is_none());
        bench.tier.keep(blob.clone()).await;
        let kept = bench.tier.find(&blob.digest()).await.unwrap();
        assert_eq!(kept.size(), len as u64);
        for max in [65_536, 100_000, usize::MAX] {
            assert_eq!(read(&kept, 0, len as u64, max).await.as_deref(), Ok(&blob.content()[..]), "{len} by {max}");
        }
    }
    assert_eq!((bench.stats)(&bench.tier).blobs, 11);
}

async fn reads_any_range<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(64 << 20);
    let blob = blob(400_000, 1);
    bench.tier.keep(blob.clone()).await;
    let kept = bench.tier.find(&blob.digest()).await.unwrap();
    let edges = [0, 1, 65_535, 65_536, 65_537, 131_072, 200_000, 399_999, 400_000];
    for from in edges {
        for to in edges.into_iter().filter(|to| *to >= from) {
            assert_eq!(read(&kept, from, to, 90_000).await.as_deref(), Ok(&blob.content()[from as usize..to as usize]), "{from}..{to}");
        }
    }
    for (at, max) in [(400_000, 10), (400_001, 10), (u64::MAX, usize::MAX), (5, 0)] {
        assert_eq!(kept.read(at, max).await, Ok(Bytes::new()), "{max} at {at}");
    }
}

async fn forgets<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(1 << 20);
    let (kept, gone) = (blob(1000, 1), blob(1000, 2));
    bench.tier.keep(kept.clone()).await;
    bench.tier.keep(gone.clone()).await;
    assert!(bench.tier.find(&gone.digest()).await.is_some());
    bench.tier.forget(&gone.digest()).await;
    bench.tier.forget(&gone.digest()).await;
    bench.tier.forget(&Digest::of(b"never kept")).await;
    assert!(bench.tier.find(&gone.digest()).await.is_none());
    assert!(bench.tier.find(&kept.digest()).await.is_some());
    assert_eq!(((bench.stats)(&bench.tier).blobs, (bench.stats)(&bench.tier).evictions), (1, 0));
}

async fn keeps_again<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(1 << 20);
    let blob = blob(70_000, 1);
    for _ in 0..3 {
        bench.tier.keep(blob.clone()).await;
        bench.tier.keep(blob.clone()).await;
        let kept = bench.tier.find(&blob.digest()).await.unwrap();
        assert_eq!(read(&kept, 0, 70_000, 65_536).await.as_deref(), Ok(&blob.content()[..]));
        let stats = (bench.stats)(&bench.tier);
        assert!(stats.blobs == 1 && (70_000..80_000).contains(&stats.bytes), "{stats:?}");
        bench.tier.forget(&blob.digest()).await;
    }
}

async fn refuses_what_is_larger_than_it<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(100_000);
    let (small, large) = (blob(10_000, 1), blob(100_001, 2));
    bench.tier.keep(small.clone()).await;
    bench.tier.keep(large.clone()).await;
    assert!(bench.tier.find(&large.digest()).await.is_none());
    assert!(bench.tier.find(&small.digest()).await.is_some(), "what cannot be kept must push nothing out");
}

async fn stays_within_its_capacity<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(300_000);
    for seed in 0..200 {
        bench.tier.keep(blob(5_000, seed)).await;
        let stats = (bench.stats)(&bench.tier);
        assert!(stats.bytes <= 300_000 && stats.capacity == 300_000, "{stats:?}");
    }
    let stats = (bench.stats)(&bench.tier);
    assert!(stats.blobs >= 30 && stats.blobs + stats.evictions == 200, "{stats:?}");
    // What was kept last has seen nothing come after it.
    assert!(bench.tier.find(&blob(5_000, 199).digest()).await.is_some());
    assert!(bench.tier.find(&blob(5_000, 0).digest()).await.is_none());
}

/// Keeps, finds and forgets the same few blobs from many tasks, in a tier that holds half of them: nobody ever reads a wrong byte.
async fn survives_everything_at_once<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(300_000);
    let blobs: Arc<Vec<_>> = Arc::new((0..8).map(|seed| blob(60_000 + 4_000 * seed as usize, seed)).collect());
    let tasks = (0..8_usize).map(|task| {
        let (tier, blobs) = (bench.tier.clone(), blobs.clone());
        tokio::spawn(async move {
            for step in 0..150 {
                let blob = &blobs[(step * (task + 3) + task) % blobs.len()];
                match (step + task) % 7 {
                    0 => tier.forget(&blob.digest()).await,
                    1..4 => tier.keep(blob.clone()).await,
                    _ => {
                        if let Some(kept) = tier.find(&blob.digest()).await {
                            assert_eq!(read(&kept, 0, blob.size(), 65_536).await.as_deref(), Ok(&blob.content()[..]));
                        }
                    }
                }
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert!((bench.stats)(&bench.tier).bytes <= 300_000);
}

async fn stays_readable_while_held<T: Tier + 'static>(make: fn(u64) -> Bench<T>) {
    let bench = make(300_000);
    let held = blob(100_000, 1);
    bench.tier.keep(held.clone()).await;
    let kept = bench.tier.find(&held.digest()).await.unwrap();
    for seed in 2..20 {
        bench.tier.keep(blob(100_000, seed)).await;
    }
    assert!((bench.stats)(&bench.tier).evictions > 0);
    assert!(bench.tier.find(&held.digest()).await.is_none());
    assert_eq!(read(&kept, 0, 100_000, 65_536).await.as_deref(), Ok(&held.content()[..]));
}
