//! The files and the index agree, through restarts and evictions.

use super::*;

#[tokio::test]
async fn blobs_survive_a_restart() {
    let mut tier = TestTier::new(|_| {});
    let mut kept = Vec::new();
    for (seed, len) in [0, 1, 65_536, 200_001].into_iter().enumerate() {
        kept.push(tier.keep(len, seed as u64).await.0);
    }
    let before = tier.stats(0);
    tier.reopen().await;
    assert_eq!(tier.stats(0), before);
    for blob in &kept {
        assert_eq!(tier.knows(&blob.digest()), Some(blob.size()));
        assert_eq!(tier.whole(blob).await.as_deref(), Some(&blob.content()[..]));
    }
    assert!((tier.metrics.disk_scan_progress.get() - 1.0).abs() < f64::EPSILON);
}

/// A store without threads, so that the test decides when the scan runs.
#[tokio::test]
async fn hits_before_the_scan() {
    let mut tier = TestTier::new(|_| {});
    let (early, _) = tier.keep(10, 1).await;
    let (late, _) = tier.keep(20, 2).await;
    tier.close();
    let store = Arc::new(Store::new(&tier.config, tier.metrics.clone(), &AtomicU64::new(0)).unwrap());
    assert_eq!(store.size_of(&late.digest()), None);
    assert_eq!(store.open(&late.digest()).map(|kept| kept.size()), Some(20));
    assert_eq!(store.size_of(&late.digest()), Some(20));
    assert!(store.open(&Digest::of(b"never kept")).is_none());
    // The scan finds it in the index, and does not count it twice.
    let (_stop, stopped) = crossbeam_channel::bounded(0);
    scan::scan(&store, &Stop(stopped));
    assert!(store.has(&early.digest()) && !store.is_scanning());
    assert_eq!(store.stats(0).blobs, 2);
    // After the scan, a file without an index entry is about to be deleted.
    let (path, aside) = (store.path(&late.digest()), tier.root().join("aside"));
    fs::copy(&path, &aside).unwrap();
    store.forget(&late.digest());
    fs::rename(&aside, &path).unwrap();
    assert!(store.open(&late.digest()).is_none() && !store.has(&late.digest()));
}

/// The janitor runs late: one of the blobs has been kept again in between, the other has not.
#[tokio::test]
async fn only_files_without_an_index_entry_are_deleted() {
    let tier = TestTier::new(|_| {});
    tier.scanned().await;
    let (blob, path) = tier.keep(10, 1).await;
    let (evicted, gone) = (Digest::of(b"gone"), tier.store.path(&Digest::of(b"gone")));
    fs::write(&gone, "x").unwrap();
    tier.store.remove_evicted(&blob.digest());
    tier.store.remove_evicted(&evicted);
    assert!(path.exists() && !gone.exists());
    assert!(tier.whole(&blob).await.is_some());
}

#[tokio::test]
async fn a_second_process_gets_an_error() {
    let tier = TestTier::new(|_| {});
    let error = Disk::open(&tier.config, tier.metrics.clone(), mpsc::channel(1).0).map(drop).unwrap_err().to_string();
    assert!(error.contains(&tier.root().display().to_string()) && error.contains("another process"), "{error}");
    // The second process has not disturbed the first.
    let (blob, _) = tier.keep(10, 1).await;
    assert!(tier.whole(&blob).await.is_some());
}

#[tokio::test]
async fn an_unusable_directory_is_named() {
    let tier = TestTier::new(|_| {});
    let file = tier.directory.path().join("file");
    fs::write(&file, "x").unwrap();
    let config = config::Disk { path: file.clone(), ..tier.config.clone() };
    let error = Disk::open(&config, tier.metrics.clone(), mpsc::channel(1).0).map(drop).unwrap_err().to_string();
    assert!(error.starts_with(&format!("disk.path: {}: ", file.display())), "{error}");
}

#[tokio::test]
async fn temporary_files_are_deleted_and_foreign_files_stay() {
    let mut tier = TestTier::new(|_| {});
    let (kept, _) = tier.keep(100, 1).await;
    tier.close();
    let root = tier.root();
    let crashed = Digest::of(b"crashed").to_string();
    let unfinished = root.join(&crashed[..2]).join(&crashed);
    let misplaced = root.join(if crashed.starts_with("00") { "01" } else { "00" }).join(&crashed);
    let foreign = [root.join("00/README"), misplaced, root.join("notes.txt"), root.join("00/sub")];
    fs::write(root.join("tmp/half"), "half").unwrap();
    fs::write(&unfinished, "").unwrap();
    fs::create_dir(&foreign[3]).unwrap();
    foreign[..3].iter().for_each(|path| fs::write(path, "mine").unwrap());
    tier.open();
    tier.scanned().await;
    assert_eq!(list(&tier.root().join("tmp")), Vec::<PathBuf>::new());
    assert!(!unfinished.exists());
    assert!(foreign.iter().all(|path| path.exists()));
    assert_eq!(tier.stats(0).blobs, 1);
    assert!(tier.whole(&kept).await.is_some());
}

#[tokio::test]
async fn the_index_agrees_with_du() {
    for policy in [Policy::Lru, Policy::TinyLfu] {
        let mut tier = TestTier::new(|config| (config.capacity, config.policy) = (Size::mib(2), policy));
        tier.scanned().await;
        for seed in 0..300 {
            let blob = blob((seed * 7919 % 90_000) as usize, seed);
            // A get comes before a fill. TinyLFU counts gets.
            assert!(tier.find(&blob.digest()).await.is_none());
            tier.keep_now(blob).await;
        }
        let stats = tier.stats(0);
        assert!(stats.evictions > 200 && stats.bytes > 1 << 20 && stats.bytes <= 2 << 20, "{stats:?}");
        until("the janitor is done", || tier.files().len() as u64 == stats.blobs).await;
        assert_eq!(tier.used(), stats.bytes, "{policy:?}");
        assert!(tier.files().iter().all(|path| tier.store.has(&path.file_name().unwrap().to_str().unwrap().parse().unwrap())));
        // The same directory with half the capacity.
        tier.config.capacity = Size::mib(1);
        tier.reopen().await;
        until("the janitor is done", || tier.used() == tier.stats(0).bytes).await;
        assert!((1 << 19..=1 << 20).contains(&tier.used()), "{}", tier.used());
    }
}

/// Blobs evict each other while they are kept again. Every index entry must have its file, and every file its entry.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_kept_again_after_eviction_keeps_its_file() {
    let tier = TestTier::new(|config| config.capacity = Size::kib(40));
    tier.scanned().await;
    let blobs: Arc<Vec<_>> = Arc::new((0..8).map(|seed| blob(10_000, seed)).collect());
    for round in 0..100 {
        let tasks = (0..4).map(|task| {
            let (disk, blobs) = (tier.disk.clone().unwrap(), blobs.clone());
            tokio::spawn(async move {
                for step in 0..8 {
                    disk.keep_now(blobs[(step + 2 * task) % blobs.len()].clone()).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        until("the janitor is done", || tier.files().len() as u64 <= tier.stats(0).blobs).await;
        for blob in blobs.iter().filter(|blob| tier.knows(&blob.digest()).is_some()) {
            assert_eq!(tier.whole(blob).await.as_deref(), Some(&blob.content()[..]), "round {round}");
        }
        assert_eq!(tier.files().len() as u64, tier.stats(0).blobs, "round {round}");
    }
    assert!(tier.stats(0).evictions > 500);
    assert_eq!(tier.metrics.corrupt_count("disk"), 0);
}

#[tokio::test]
async fn few_files_stay_open() {
    let tier = TestTier::new(|config| config.open_files = 4);
    let mut kept = Vec::new();
    for seed in 0..40 {
        kept.push(tier.keep(100, seed).await.0);
    }
    let root = tier.root().canonicalize().unwrap();
    let ours = |entry: &PathBuf| fs::read_link(entry).is_ok_and(|target| target.starts_with(&root) && !target.ends_with("lock"));
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    for blob in &kept {
        assert!(tier.whole(blob).await.is_some());
    }
    until("the rest is closed", || {
        tier.store.settle_open();
        (1..=4).contains(&descriptors().filter(ours).count())
    })
    .await;
}

#[tokio::test]
async fn an_emptied_directory_is_recreated() {
    let tier = TestTier::new(|_| {});
    tier.scanned().await;
    let (lost, path) = tier.keep(100, 1).await;
    for entry in list(tier.root()).iter().filter(|path| path.is_dir()) {
        fs::remove_dir_all(entry).unwrap();
    }
    assert!(!path.exists());
    assert!(tier.find(&lost.digest()).await.is_none(), "vanished");
    assert_eq!(tier.knows(&lost.digest()), None);
    let (blob, _) = tier.keep(100, 2).await;
    assert!(tier.whole(&blob).await.is_some());
}
