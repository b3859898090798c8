//! Files that change on the disk: the tier never gives a wrong byte.

use super::*;
use crate::tier::Damaged;

fn quarantined(tier: &TestTier) -> Vec<PathBuf> {
    list(&tier.root().join("quarantine"))
}

/// Flips bits all over a file of three blocks and in every byte of its trailer. Each read is right or an error, and the file is moved to the quarantine once.
#[tokio::test]
async fn a_flipped_bit_is_damage_and_never_a_wrong_byte() {
    let tier = TestTier::new(|config| config.quarantine = Size::gib(1));
    tier.scanned().await;
    let len = 150_000;
    let file_len = format::file_len(len);
    let offsets = [0, 1, 65_535, 65_536, 131_071, 131_072, len - 1].into_iter().chain((0..40).map(|i| i * 3_677 % len));
    let mut found = 0;
    for (seed, at) in offsets.chain(len..file_len).enumerate() {
        let (blob, path) = tier.keep(len as usize, seed as u64).await;
        // Half of the time the blob is open already. A damaged trailer is detected only on opening.
        let held = if seed % 2 == 0 && at < len { tier.find(&blob.digest()).await } else { None };
        flip(&path, at);
        let corrupt = tier.metrics.corrupt_count("disk");
        for (block, expected) in blob.content().chunks(65_536).enumerate() {
            let found = tier.find(&blob.digest()).await;
            let Some(kept) = held.clone().or(found) else { continue };
            let from = block as u64 * 65_536;
            match read(&kept, from, from + expected.len() as u64, 65_536).await {
                Ok(bytes) => assert_eq!(bytes, expected),
                Err(Damaged) => assert_eq!(block as u64, at / 65_536, "offset {at}"),
            }
        }
        assert!(tier.find(&blob.digest()).await.is_none() && tier.knows(&blob.digest()).is_none() && !path.exists(), "offset {at}");
        // A file whose trailer has no magic bytes counts as unfinished: it is deleted, and not counted as damaged.
        let damaged = !(file_len - 12..file_len - 4).contains(&at);
        found += u64::from(damaged);
        assert_eq!(tier.metrics.corrupt_count("disk"), corrupt + u64::from(damaged), "offset {at}");
        // The blob can be kept again.
        tier.keep_now(blob.clone()).await;
        assert_eq!(tier.whole(&blob).await.as_deref(), Some(&blob.content()[..]));
    }
    assert_eq!(quarantined(&tier).len() as u64, found);
}

#[tokio::test]
async fn a_file_cut_short_while_open_is_damage() {
    let tier = TestTier::new(|_| {});
    tier.scanned().await;
    let (blob, path) = tier.keep(200_000, 1).await;
    let held = tier.find(&blob.digest()).await.unwrap();
    File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap();
    assert_eq!(held.read(0, 65_536).await.as_deref(), Ok(&blob.content()[..65_536]));
    assert_eq!(held.read(65_536, 65_536).await, Err(Damaged));
    assert_eq!(held.read(0, 65_536).await.as_deref(), Ok(&blob.content()[..65_536]), "undamaged blocks of a quarantined file can be read");
    assert_eq!(held.read(131_072, 65_536).await, Err(Damaged));
    assert_eq!(tier.metrics.corrupt_count("disk"), 1, "once per blob");
    assert!(tier.find(&blob.digest()).await.is_none());
}

#[tokio::test]
async fn an_unfinished_file_is_deleted() {
    let mut tier = TestTier::new(|_| {});
    for (seed, cut) in [0, 1, 28, 50_000, 65_536, 100_031].into_iter().enumerate() {
        let (blob, path) = tier.keep(100_000, seed as u64).await;
        let file = File::options().write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(cut).unwrap();
        if seed % 2 == 0 {
            // The right length without the bytes: a crash leaves this on many file systems.
            file.set_len(len).unwrap();
        }
        if seed < 3 {
            tier.reopen().await;
        }
        assert_eq!(tier.whole(&blob).await, None, "cut at {cut}");
        assert!(!path.exists() && tier.knows(&blob.digest()).is_none(), "cut at {cut}");
    }
    assert_eq!((quarantined(&tier).len(), tier.metrics.corrupt_count("disk")), (0, 0));
}

#[tokio::test]
async fn a_valid_file_under_another_name_is_not_that_blob() {
    let mut tier = TestTier::new(|_| {});
    let (_, path) = tier.keep(1000, 1).await;
    let other = blob(1000, 2);
    fs::rename(&path, tier.store.path(&other.digest())).unwrap();
    tier.reopen().await;
    assert_eq!(tier.knows(&other.digest()), Some(1000), "the scan opens no file");
    assert!(tier.find(&other.digest()).await.is_none());
    assert_eq!(tier.metrics.corrupt_count("disk"), 1);
}

/// A reader that finds damage in the old file must not remove the new one.
#[tokio::test]
async fn damage_to_an_old_file_spares_the_new_one() {
    let tier = TestTier::new(|_| {});
    tier.scanned().await;
    let (blob, path) = tier.keep(1000, 1).await;
    let held = tier.find(&blob.digest()).await.unwrap();
    flip(&path, 5);
    tier.forget(&blob.digest()).await;
    tier.keep_now(blob.clone()).await;
    assert_eq!(held.read(0, 1000).await, Err(Damaged));
    assert_eq!(tier.whole(&blob).await.as_deref(), Some(&blob.content()[..]));
    assert_eq!(tier.metrics.corrupt_count("disk"), 0);
}

#[tokio::test]
async fn the_quarantine_keeps_the_newest_within_its_capacity() {
    let tier = TestTier::new(|config| config.quarantine = Size::kib(50));
    tier.scanned().await;
    let used = || quarantined(&tier).iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum::<u64>();
    for seed in 0..8 {
        let (blob, path) = tier.keep(10_000, seed).await;
        flip(&path, 0);
        assert_eq!(tier.whole(&blob).await, None);
        let newest = tier.root().join("quarantine").join(blob.digest().to_string());
        assert!(newest.exists() && used() <= 50 << 10, "{}", used());
    }
    assert_eq!(quarantined(&tier).len(), 4);
    // A file larger than the quarantine is deleted, and so are all files that were there before.
    let (large, path) = tier.keep(100_000, 9).await;
    flip(&path, 0);
    assert_eq!(tier.whole(&large).await, None);
    assert_eq!(quarantined(&tier).len(), 0);
}

#[tokio::test]
async fn the_scrub_finds_damage_that_no_client_reads() {
    let mut tier = TestTier::new(|_| {});
    let mut kept = Vec::new();
    for seed in 0..6 {
        kept.push(tier.keep(150_000, seed).await);
    }
    flip(&kept[1].1, 70_000);
    // The checksums match the bytes, but the bytes do not match the digest: only hashing the whole blob detects it.
    let forged = Digest::of(b"forged");
    let mut file = tier.temp().unwrap();
    file.append(b"something else").unwrap();
    file.commit(&forged, Visibility::Public, &tier.store.path(&forged), |_| false).unwrap();
    tier.config.scrub_rate = Size::gib(1);
    tier.close();
    tier.open();
    let metrics = tier.metrics.clone();
    until("a pass is over", || metrics.disk_scrub_last_pass.get() > 0).await;
    assert_eq!((metrics.corrupt_count("disk"), metrics.disk_scrubbed.get()), (2, 7));
    assert!(tier.find(&forged).await.is_none());
    for (i, (blob, _)) in kept.iter().enumerate() {
        assert_eq!(tier.whole(blob).await.is_some(), i != 1);
    }
    assert_eq!(quarantined(&tier).len(), 2);
}

#[tokio::test]
async fn the_scrub_reports_damage_and_keeps_its_rate() {
    let mut tier = TestTier::new(|_| {});
    let (blob, path) = tier.keep(10_000, 1).await;
    flip(&path, 9_999);
    // The scrub waits for the minimum cost of a file before it opens it: 0.4 s at this rate.
    tier.config.scrub_rate = Size::kib(10);
    tier.close();
    let started = Instant::now();
    tier.open();
    let reported = tokio::time::timeout(Duration::from_secs(20), tier.damaged.as_mut().unwrap().recv()).await;
    assert_eq!(reported, Ok(Some(blob.digest())));
    assert!(started.elapsed() >= Duration::from_millis(400));
    // Closing interrupts a scrub that would take five more minutes.
    tier.keep(3_000_000, 2).await;
    tier.reopen().await;
    let started = Instant::now();
    tier.close();
    assert!(started.elapsed() < Duration::from_secs(5));
}
