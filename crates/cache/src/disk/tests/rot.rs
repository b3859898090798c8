//! Files that change behind the tier's back: never a wrong byte.

use super::*;
use crate::tier::Damaged;

fn quarantined(bench: &Bench) -> Vec<PathBuf> {
    list(&bench.root().join("quarantine"))
}

/// Offsets all over a file of three blocks and every byte of its trailer: reads are right or refused, and the file is set aside once.
#[tokio::test]
async fn a_flipped_bit_is_damage_and_never_a_wrong_byte() {
    let bench = Bench::new(|config| config.quarantine = Size::gib(1));
    bench.scanned().await;
    let len = 150_000;
    let file_len = format::file_len(len);
    let offsets = [0, 1, 65_535, 65_536, 131_071, 131_072, len - 1].into_iter().chain((0..40).map(|i| i * 3_677 % len));
    let mut found = 0;
    for (seed, at) in offsets.chain(len..file_len).enumerate() {
        let (blob, path) = bench.keep(len as usize, seed as u64).await;
        // Half of the time a client has the blob open already; what is wrong with the trailer is seen only when a file is opened.
        let held = if seed % 2 == 0 && at < len { bench.find(&blob.digest()).await } else { None };
        flip(&path, at);
        let corrupt = bench.metrics.corrupt_count("disk");
        for (block, expected) in blob.content().chunks(65_536).enumerate() {
            let found = bench.find(&blob.digest()).await;
            let Some(kept) = held.clone().or(found) else { continue };
            let from = block as u64 * 65_536;
            match read(&kept, from, from + expected.len() as u64, 65_536).await {
                Ok(bytes) => assert_eq!(bytes, expected),
                Err(Damaged) => assert_eq!(block as u64, at / 65_536, "offset {at}"),
            }
        }
        assert!(bench.find(&blob.digest()).await.is_none() && bench.knows(&blob.digest()).is_none() && !path.exists(), "offset {at}");
        // A trailer without its mark was never finished, as far as anyone can tell: that is deleted, and no rot.
        let rot = !(file_len - 12..file_len - 4).contains(&at);
        found += u64::from(rot);
        assert_eq!(bench.metrics.corrupt_count("disk"), corrupt + u64::from(rot), "offset {at}");
        // And it can be had again.
        bench.keep_now(blob.clone()).await;
        assert_eq!(bench.whole(&blob).await.as_deref(), Some(&blob.content()[..]));
    }
    assert_eq!(quarantined(&bench).len() as u64, found);
}

#[tokio::test]
async fn a_file_cut_short_while_open_is_damage() {
    let bench = Bench::new(|_| {});
    bench.scanned().await;
    let (blob, path) = bench.keep(200_000, 1).await;
    let held = bench.find(&blob.digest()).await.unwrap();
    File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap();
    assert_eq!(held.read(0, 65_536).await.as_deref(), Ok(&blob.content()[..65_536]));
    assert_eq!(held.read(65_536, 65_536).await, Err(Damaged));
    assert_eq!(held.read(0, 65_536).await.as_deref(), Ok(&blob.content()[..65_536]), "sound blocks of a file set aside are sound");
    assert_eq!(held.read(131_072, 65_536).await, Err(Damaged));
    assert_eq!(bench.metrics.corrupt_count("disk"), 1, "once per blob");
    assert!(bench.find(&blob.digest()).await.is_none());
}

#[tokio::test]
async fn a_file_that_was_never_finished_is_deleted() {
    let mut bench = Bench::new(|_| {});
    for (seed, cut) in [0, 1, 28, 50_000, 65_536, 100_031].into_iter().enumerate() {
        let (blob, path) = bench.keep(100_000, seed as u64).await;
        let file = File::options().write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(cut).unwrap();
        if seed % 2 == 0 {
            // The length is there and the bytes are not: what a crash leaves on many file systems.
            file.set_len(len).unwrap();
        }
        if seed < 3 {
            bench.reopen().await;
        }
        assert_eq!(bench.whole(&blob).await, None, "cut at {cut}");
        assert!(!path.exists() && bench.knows(&blob.digest()).is_none(), "cut at {cut}");
    }
    assert_eq!((quarantined(&bench).len(), bench.metrics.corrupt_count("disk")), (0, 0));
}

#[tokio::test]
async fn a_sound_file_under_another_name_is_not_that_blob() {
    let mut bench = Bench::new(|_| {});
    let (_, path) = bench.keep(1000, 1).await;
    let other = blob(1000, 2);
    fs::rename(&path, bench.store.path(&other.digest())).unwrap();
    bench.reopen().await;
    assert_eq!(bench.knows(&other.digest()), Some(1000), "the scan opens no file");
    assert!(bench.find(&other.digest()).await.is_none());
    assert_eq!(bench.metrics.corrupt_count("disk"), 1);
}

/// A reader of the old file must not take the new one down with it.
#[tokio::test]
async fn damage_to_an_old_file_spares_the_new_one() {
    let bench = Bench::new(|_| {});
    bench.scanned().await;
    let (blob, path) = bench.keep(1000, 1).await;
    let held = bench.find(&blob.digest()).await.unwrap();
    flip(&path, 5);
    bench.forget(&blob.digest()).await;
    bench.keep_now(blob.clone()).await;
    assert_eq!(held.read(0, 1000).await, Err(Damaged));
    assert_eq!(bench.whole(&blob).await.as_deref(), Some(&blob.content()[..]));
    assert_eq!(bench.metrics.corrupt_count("disk"), 0);
}

#[tokio::test]
async fn the_quarantine_keeps_the_newest_within_its_cap() {
    let bench = Bench::new(|config| config.quarantine = Size::kib(50));
    bench.scanned().await;
    let used = || quarantined(&bench).iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum::<u64>();
    for seed in 0..8 {
        let (blob, path) = bench.keep(10_000, seed).await;
        flip(&path, 0);
        assert_eq!(bench.whole(&blob).await, None);
        let newest = bench.root().join("quarantine").join(blob.digest().to_string());
        assert!(newest.exists() && used() <= 50 << 10, "{}", used());
    }
    assert_eq!(quarantined(&bench).len(), 4);
    // What is larger than all of it is deleted, and with it all that was set aside before.
    let (large, path) = bench.keep(100_000, 9).await;
    flip(&path, 0);
    assert_eq!(bench.whole(&large).await, None);
    assert_eq!(quarantined(&bench).len(), 0);
}

#[tokio::test]
async fn the_scrub_finds_what_nobody_reads() {
    let mut bench = Bench::new(|_| {});
    let mut kept = Vec::new();
    for seed in 0..6 {
        kept.push(bench.keep(150_000, seed).await);
    }
    flip(&kept[1].1, 70_000);
    // Checksums that agree with bytes that do not agree with the name: only hashing the whole can tell.
    let forged = Digest::of(b"forged");
    let mut file = bench.temp().unwrap();
    file.append(b"something else").unwrap();
    file.place(&forged, &bench.store.path(&forged), |_| false).unwrap();
    bench.config.scrub_rate = Size::gib(1);
    bench.close();
    bench.open();
    let metrics = bench.metrics.clone();
    until("a pass is over", || metrics.disk_scrub_last_pass.get() > 0).await;
    assert_eq!((metrics.corrupt_count("disk"), metrics.disk_scrubbed.get()), (2, 7));
    assert!(bench.find(&forged).await.is_none());
    for (i, (blob, _)) in kept.iter().enumerate() {
        assert_eq!(bench.whole(blob).await.is_some(), i != 1);
    }
    assert_eq!(quarantined(&bench).len(), 2);
}

#[tokio::test]
async fn the_scrub_tells_of_rot_and_keeps_its_pace() {
    let mut bench = Bench::new(|_| {});
    let (blob, path) = bench.keep(10_000, 1).await;
    flip(&path, 9_999);
    // The least that a file costs is waited for before it is opened: 0.4 s at this rate.
    bench.config.scrub_rate = Size::kib(10);
    bench.close();
    let started = Instant::now();
    bench.open();
    let told = tokio::time::timeout(Duration::from_secs(20), bench.rotten.as_mut().unwrap().recv()).await;
    assert_eq!(told, Ok(Some(blob.digest())));
    assert!(started.elapsed() >= Duration::from_millis(400));
    // Closing interrupts a scrub that would take five minutes more.
    bench.keep(3_000_000, 2).await;
    bench.reopen().await;
    let started = Instant::now();
    bench.close();
    assert!(started.elapsed() < Duration::from_secs(5));
}
