//! Write-behind, and disks that cannot be written to.

use super::*;
use castier_blob::{Sink, Verifier};
use std::process::Command;

fn skips(tier: &TestTier, why: Skip) -> u64 {
    tier.metrics.disk_skips(why)
}

#[tokio::test]
async fn blobs_are_written_in_the_background() {
    let mut tier = TestTier::new(|_| {});
    let blobs: Vec<_> = (0..50).map(|seed| blob(10_000, seed)).collect();
    blobs.iter().for_each(|blob| tier.keep_later(blob.clone(), Visibility::Public));
    // Closing writes the queue.
    tier.reopen().await;
    for blob in &blobs {
        assert_eq!(tier.whole(blob).await.as_deref(), Some(&blob.content()[..]));
    }
    assert_eq!(tier.stats(0).blobs, 50);
}

#[tokio::test]
async fn a_blob_that_comes_after_the_end_takes_nothing_of_the_budget() {
    let tier = TestTier::new(|_| {});
    Disk::close(&tier);
    tier.keep_later(blob(10_000, 1), Visibility::Public);
    assert_eq!(tier.behind.used.load(Ordering::Relaxed), 0, "nobody would give it back");
}

/// While the scan runs, and files cannot be deleted, an open file would still be found.
#[tokio::test]
async fn a_purge_that_reaches_no_file_forgets_an_open_one() {
    let tier = TestTier::new(|_| {});
    let (blob, _) = tier.keep(1000, 1).await;
    assert!(tier.find(&blob.digest()).await.is_some() && tier.store.opened(&blob.digest()).is_some());
    tier.store.forget_in_memory(&blob.digest());
    assert!(tier.store.opened(&blob.digest()).is_none() && tier.knows(&blob.digest()).is_none());
}

/// The test holds a subdirectory's lock, so that the writer blocks and the queue fills.
#[tokio::test]
async fn a_full_queue_skips() {
    let tier = TestTier::new(|config| config.write_behind = Size::new(10 * (1000 + QUEUE_OVERHEAD) - 1));
    tier.scanned().await;
    let blobs: Vec<_> = (0..12).map(|seed| blob(1000, seed)).collect();
    let held = tier.store.lock(&blobs[0].digest());
    blobs.iter().for_each(|blob| tier.keep_later(blob.clone(), Visibility::Public));
    assert_eq!(skips(&tier, Skip::Queue), 3);
    drop(held);
    until("the queue is written", || tier.behind.used.load(Ordering::Relaxed) == 0).await;
    assert_eq!(tier.stats(0).blobs, 9);
    tier.keep_later(blobs[11].clone(), Visibility::Public);
    until("there is space again", || tier.knows(&blobs[11].digest()).is_some()).await;
    tier.keep_later(blob(100_000, 99), Visibility::Public);
    assert_eq!(skips(&tier, Skip::Queue), 4, "a blob larger than the queue is not kept");
}

#[tokio::test]
async fn a_blob_forgotten_while_it_is_queued_stays_forgotten() {
    let tier = TestTier::new(|_| {});
    tier.scanned().await;
    let blob = blob(1000, 1);
    let digest = blob.digest();
    // Take the epoch, forget, then keep: from memory, and from a file.
    let epoch = tier.store.epoch(&digest);
    tier.forget(&digest).await;
    tier.store.keep(&blob, Visibility::Public, epoch);
    assert!(tier.find(&digest).await.is_none());
    let keep = tier.keep_file(spooled(&tier, &blob), Visibility::Public);
    tier.forget(&digest).await;
    keep.await;
    assert!(tier.find(&digest).await.is_none());
    assert_eq!(skips(&tier, Skip::Purged), 2);
    until("nothing is left", || list(&tier.root().join("tmp")).is_empty() && tier.files().is_empty()).await;
    // With a new epoch it is kept.
    tier.keep_now(blob.clone()).await;
    assert!(tier.whole(&blob).await.is_some());
}

/// The sink of a verifier that writes into a file of the tier.
struct InFile(DiskFile);

impl Sink for InFile {
    type Content = DiskFile;
    type Error = std::io::Error;

    fn write(&mut self, bytes: &Bytes) -> std::io::Result<()> {
        self.0.append(bytes)
    }

    fn close(self) -> DiskFile {
        self.0
    }
}

/// The same blob in a file of the tier.
fn spooled(tier: &TestTier, blob: &Verified<Bytes>) -> Verified<DiskFile> {
    let mut verifier = Verifier::of(blob.digest(), InFile(tier.temp().unwrap()));
    for part in blob.content().chunks(30_011) {
        verifier.write(&Bytes::copy_from_slice(part)).unwrap();
    }
    verifier.finish().unwrap()
}

#[tokio::test]
async fn a_spooled_file_is_kept_with_a_rename() {
    let tier = TestTier::new(|_| {});
    for (seed, len) in [0, 1, 65_536, 1_000_000].into_iter().enumerate() {
        let blob = blob(len, seed as u64);
        let spooled = spooled(&tier, &blob);
        let file = spooled.content().file();
        let mut so_far = vec![0; len];
        file.get().unwrap().read_exact_at(&mut so_far, 0).unwrap();
        assert_eq!(so_far, blob.content()[..]);
        let inode = file.get().unwrap().metadata().unwrap().ino();
        tier.keep_file(spooled, Visibility::Public).await;
        assert_eq!(tier.whole(&blob).await.as_deref(), Some(&blob.content()[..]));
        assert_eq!(fs::metadata(tier.store.path(&blob.digest())).unwrap().ino(), inode);
    }
    drop(tier.temp().unwrap());
    until("a file that is dropped is deleted", || list(&tier.root().join("tmp")).is_empty()).await;
}

#[tokio::test]
async fn a_blob_larger_than_the_tier_is_not_kept() {
    let tier = TestTier::new(|config| config.capacity = Size::kib(64));
    assert!(tier.takes(0) && tier.takes(60_000) && !tier.takes(65_536) && !tier.takes(u64::from(u32::MAX)));
    tier.keep_later(blob(65_536, 1), Visibility::Public);
    assert!(Skip::ALL.iter().all(|why| skips(&tier, *why) == 0), "a blob too large is not counted");
}

/// A tmpfs of a given size; unmounted on drop.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let option = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(at).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("not run: mounting a tmpfs needs root");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, since a failing test may still hold files.
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[tokio::test]
async fn a_full_disk_turns_the_tier_read_only_until_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mount) = Tmpfs::mount(&directory.path().join("small"), 4 << 20) else { return };
    let tier = TestTier::new(|config| (config.path, config.cooldown) = (mount.0.join("cache"), Span::millis(500)));
    tier.scanned().await;
    let mut kept = Vec::new();
    for seed in 0.. {
        let (blob, _) = tier.keep(300_000, seed).await;
        if tier.knows(&blob.digest()).is_none() {
            break;
        }
        kept.push(blob);
    }
    // Read-only: the tier writes nothing and serves everything.
    assert!(!tier.takes(0));
    tier.keep_later(blob(10, 1_000), Visibility::Public);
    tier.keep(10, 1_001).await;
    assert_eq!((skips(&tier, Skip::Failed), skips(&tier, Skip::ReadOnly)), (1, 2));
    assert!(kept.len() > 8, "{}", kept.len());
    for blob in &kept {
        assert_eq!(tier.whole(blob).await.as_deref(), Some(&blob.content()[..]));
    }
    until("what could not be written leaves nothing behind", || list(&tier.root().join("tmp")).is_empty()).await;
    // The same for a large fill.
    until("the cool-down is over", || tier.takes(0)).await;
    let mut file = tier.temp().unwrap();
    let full = (0..200).find_map(|_| file.append(&[7; 65_536]).err()).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert!(!tier.takes(0));
    drop(file);
    // There is space again.
    tier.forget(&kept[0].digest()).await;
    until("the cool-down is over", || tier.takes(0)).await;
    let (late, _) = tier.keep(100_000, 2_000).await;
    assert!(tier.whole(&late).await.is_some());
    tier.metrics.tiers_are(&[(crate::via::Tier::Disk, tier.stats(0))]);
    let text = prometheus::TextEncoder::new().encode_to_string(&tier.registry.gather()).unwrap();
    for line in [
        "castier_disk_write_errors_total{reason=\"full\"} 2",
        "castier_disk_write_errors_total{reason=\"read_only\"} 0",
        "castier_disk_skipped_writes_total{reason=\"failed\"} 1",
        "castier_disk_skipped_writes_total{reason=\"read_only\"} 2",
        "castier_corrupt_blobs_total{source=\"disk\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "missing: {line}\n{text}");
    }
}
