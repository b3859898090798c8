//! Writing behind, and disks that will not be written to.

use super::*;
use castier_blob::{Sink, Verifier};
use std::process::Command;

fn skips(bench: &Bench, why: Skip) -> u64 {
    bench.metrics.disk_skips(why)
}

#[tokio::test]
async fn blobs_are_written_behind() {
    let mut bench = Bench::new(|_| {});
    let blobs: Vec<_> = (0..50).map(|seed| blob(10_000, seed)).collect();
    blobs.iter().for_each(|blob| bench.keep_later(blob.clone()));
    // Closing writes what waits.
    bench.reopen().await;
    for blob in &blobs {
        assert_eq!(bench.whole(blob).await.as_deref(), Some(&blob.content()[..]));
    }
    assert_eq!(bench.stats(0).blobs, 50);
}

/// The writer is held by a shelf's lock, so that the queue fills for certain.
#[tokio::test]
async fn a_full_queue_skips() {
    let bench = Bench::new(|config| config.write_behind = Size::new(10 * (1000 + WAITS) - 1));
    bench.scanned().await;
    let blobs: Vec<_> = (0..12).map(|seed| blob(1000, seed)).collect();
    let held = bench.store.lock(&blobs[0].digest());
    blobs.iter().for_each(|blob| bench.keep_later(blob.clone()));
    assert_eq!(skips(&bench, Skip::Queue), 3);
    drop(held);
    until("the queue is written", || bench.behind.used.load(Ordering::Relaxed) == 0).await;
    assert_eq!(bench.stats(0).blobs, 9);
    bench.keep_later(blobs[11].clone());
    until("there is room again", || bench.knows(&blobs[11].digest()).is_some()).await;
    bench.keep_later(blob(100_000, 99));
    assert_eq!(skips(&bench, Skip::Queue), 4, "what is larger than the queue is not kept through it");
}

#[tokio::test]
async fn what_is_forgotten_while_it_waits_stays_forgotten() {
    let bench = Bench::new(|_| {});
    bench.scanned().await;
    let blob = blob(1000, 1);
    let digest = blob.digest();
    // Accepted, then forgotten, then placed: from memory, and from a file.
    let accepted = bench.store.accept(&digest);
    bench.forget(&digest).await;
    bench.store.keep(&blob, accepted);
    assert!(bench.find(&digest).await.is_none());
    let keep = bench.keep_file(spooled(&bench, &blob));
    bench.forget(&digest).await;
    keep.await;
    assert!(bench.find(&digest).await.is_none());
    assert_eq!(skips(&bench, Skip::Purged), 2);
    until("nothing is left", || list(&bench.root().join("tmp")).is_empty() && bench.files().is_empty()).await;
    // What is accepted afterwards is kept.
    bench.keep_now(blob.clone()).await;
    assert!(bench.whole(&blob).await.is_some());
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
fn spooled(bench: &Bench, blob: &Verified<Bytes>) -> Verified<DiskFile> {
    let mut verifier = Verifier::of(blob.digest(), InFile(bench.temp().unwrap()));
    for part in blob.content().chunks(30_011) {
        verifier.write(&Bytes::copy_from_slice(part)).unwrap();
    }
    verifier.finish().unwrap()
}

#[tokio::test]
async fn a_spooled_file_is_kept_with_a_rename() {
    let bench = Bench::new(|_| {});
    for (seed, len) in [0, 1, 65_536, 1_000_000].into_iter().enumerate() {
        let blob = blob(len, seed as u64);
        let spooled = spooled(&bench, &blob);
        let file = spooled.content().file();
        let mut so_far = vec![0; len];
        file.get().unwrap().read_exact_at(&mut so_far, 0).unwrap();
        assert_eq!(so_far, blob.content()[..]);
        let inode = file.get().unwrap().metadata().unwrap().ino();
        bench.keep_file(spooled).await;
        assert_eq!(bench.whole(&blob).await.as_deref(), Some(&blob.content()[..]));
        assert_eq!(fs::metadata(bench.store.path(&blob.digest())).unwrap().ino(), inode);
    }
    drop(bench.temp().unwrap());
    until("a file that is dropped is deleted", || list(&bench.root().join("tmp")).is_empty()).await;
}

#[tokio::test]
async fn what_does_not_fit_is_not_taken() {
    let bench = Bench::new(|config| config.capacity = Size::kib(64));
    assert!(bench.takes(0) && bench.takes(60_000) && !bench.takes(65_536) && !bench.takes(u64::from(u32::MAX)));
    bench.keep_later(blob(65_536, 1));
    assert!(Skip::ALL.iter().all(|why| skips(&bench, *why) == 0), "a blob too large is nobody's failing");
}

/// A file system of so many bytes, gone when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let option = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(at).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("not run: no tmpfs can be mounted here, which takes root");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, as a test that fails may still hold files.
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[tokio::test]
async fn a_full_disk_turns_the_tier_read_only_until_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mount) = Tmpfs::mount(&directory.path().join("small"), 4 << 20) else { return };
    let bench = Bench::new(|config| (config.path, config.cooldown) = (mount.0.join("cache"), Span::millis(500)));
    bench.scanned().await;
    let mut kept = Vec::new();
    for seed in 0.. {
        let (blob, _) = bench.keep(300_000, seed).await;
        if bench.knows(&blob.digest()).is_none() {
            break;
        }
        kept.push(blob);
    }
    // Read-only: nothing is tried, everything is served.
    assert!(!bench.takes(0));
    bench.keep_later(blob(10, 1_000));
    bench.keep(10, 1_001).await;
    assert_eq!((skips(&bench, Skip::Failed), skips(&bench, Skip::ReadOnly)), (1, 2));
    assert!(kept.len() > 8, "{}", kept.len());
    for blob in &kept {
        assert_eq!(bench.whole(blob).await.as_deref(), Some(&blob.content()[..]));
    }
    until("what could not be written leaves nothing behind", || list(&bench.root().join("tmp")).is_empty()).await;
    // A large fill meets the same.
    until("the cool-down is over", || bench.takes(0)).await;
    let mut file = bench.temp().unwrap();
    let full = (0..200).find_map(|_| file.append(&[7; 65_536]).err()).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert!(!bench.takes(0));
    drop(file);
    // Room again.
    bench.forget(&kept[0].digest()).await;
    until("the cool-down is over", || bench.takes(0)).await;
    let (late, _) = bench.keep(100_000, 2_000).await;
    assert!(bench.whole(&late).await.is_some());
    bench.metrics.tiers_are(&[(crate::via::Tier::Disk, bench.stats(0))]);
    let text = prometheus::TextEncoder::new().encode_to_string(&bench.registry.gather()).unwrap();
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
