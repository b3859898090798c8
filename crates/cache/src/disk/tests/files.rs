//! Files and books agree, through restarts and evictions.

use super::*;

#[tokio::test]
async fn blobs_survive_a_restart() {
    let mut bench = Bench::new(|_| {});
    let mut kept = Vec::new();
    for (seed, len) in [0, 1, 65_536, 200_001].into_iter().enumerate() {
        kept.push(bench.keep(len, seed as u64).await.0);
    }
    let before = bench.stats(0);
    bench.reopen().await;
    assert_eq!(bench.stats(0), before);
    for blob in &kept {
        assert_eq!(bench.knows(&blob.digest()), Some(blob.size()));
        assert_eq!(bench.whole(blob).await.as_deref(), Some(&blob.content()[..]));
    }
    assert!((bench.metrics.disk_scan_progress.get() - 1.0).abs() < f64::EPSILON);
}

/// A store without its threads, so that nothing is scanned before the test says so.
#[tokio::test]
async fn hits_before_the_scan_comes_by() {
    let mut bench = Bench::new(|_| {});
    let (early, _) = bench.keep(10, 1).await;
    let (late, _) = bench.keep(20, 2).await;
    bench.close();
    let store = Arc::new(Store::new(&bench.config, bench.metrics.clone(), &AtomicU64::new(0)).unwrap());
    assert_eq!(store.size_of(&late.digest()), None);
    assert_eq!(store.open(&late.digest()).map(|kept| kept.size()), Some(20));
    assert_eq!(store.size_of(&late.digest()), Some(20));
    assert!(store.open(&Digest::of(b"never kept")).is_none());
    // The scan finds it in the index already, and counts it once.
    let (_stop, stopped) = crossbeam_channel::bounded(0);
    walk::scan(&store, &Stop(stopped));
    assert!(store.has(&early.digest()) && !store.is_scanning());
    assert_eq!(store.stats(0).blobs, 2);
    // From now on the index is the whole truth: a file that it does not have is about to be deleted.
    let (path, aside) = (store.path(&late.digest()), bench.root().join("aside"));
    fs::copy(&path, &aside).unwrap();
    store.forget(&late.digest());
    fs::rename(&aside, &path).unwrap();
    assert!(store.open(&late.digest()).is_none() && !store.has(&late.digest()));
}

/// The janitor comes late: what it was to delete has been kept anew, or has not.
#[tokio::test]
async fn only_what_the_index_has_not_is_deleted() {
    let bench = Bench::new(|_| {});
    bench.scanned().await;
    let (blob, path) = bench.keep(10, 1).await;
    let (evicted, gone) = (Digest::of(b"gone"), bench.store.path(&Digest::of(b"gone")));
    fs::write(&gone, "x").unwrap();
    bench.store.remove_evicted(&blob.digest());
    bench.store.remove_evicted(&evicted);
    assert!(path.exists() && !gone.exists());
    assert!(bench.whole(&blob).await.is_some());
}

#[tokio::test]
async fn a_second_process_is_told_so() {
    let bench = Bench::new(|_| {});
    let error = Disk::open(&bench.config, bench.metrics.clone(), mpsc::channel(1).0).map(drop).unwrap_err().to_string();
    assert!(error.contains(&bench.root().display().to_string()) && error.contains("another process"), "{error}");
    // The refused one has not disturbed the first.
    let (blob, _) = bench.keep(10, 1).await;
    assert!(bench.whole(&blob).await.is_some());
}

#[tokio::test]
async fn an_unusable_directory_is_named() {
    let bench = Bench::new(|_| {});
    let file = bench.directory.path().join("file");
    fs::write(&file, "x").unwrap();
    let config = config::Disk { path: file.clone(), ..bench.config.clone() };
    let error = Disk::open(&config, bench.metrics.clone(), mpsc::channel(1).0).map(drop).unwrap_err().to_string();
    assert!(error.starts_with(&format!("disk.path: {}: ", file.display())), "{error}");
}

#[tokio::test]
async fn leftovers_are_cleared_and_strangers_left_alone() {
    let mut bench = Bench::new(|_| {});
    let (kept, _) = bench.keep(100, 1).await;
    bench.close();
    let root = bench.root();
    let crashed = Digest::of(b"crashed").to_string();
    let unfinished = root.join(&crashed[..2]).join(&crashed);
    let misplaced = root.join(if crashed.starts_with("00") { "01" } else { "00" }).join(&crashed);
    let strangers = [root.join("00/README"), misplaced, root.join("notes.txt"), root.join("00/sub")];
    fs::write(root.join("tmp/half"), "half").unwrap();
    fs::write(&unfinished, "").unwrap();
    fs::create_dir(&strangers[3]).unwrap();
    strangers[..3].iter().for_each(|path| fs::write(path, "mine").unwrap());
    bench.open();
    bench.scanned().await;
    assert_eq!(list(&bench.root().join("tmp")), Vec::<PathBuf>::new());
    assert!(!unfinished.exists());
    assert!(strangers.iter().all(|path| path.exists()));
    assert_eq!(bench.stats(0).blobs, 1);
    assert!(bench.whole(&kept).await.is_some());
}

#[tokio::test]
async fn the_books_agree_with_du() {
    for policy in [Policy::Lru, Policy::TinyLfu] {
        let mut bench = Bench::new(|config| (config.capacity, config.policy) = (Size::mib(2), policy));
        bench.scanned().await;
        for seed in 0..300 {
            let blob = blob((seed * 7919 % 90_000) as usize, seed);
            // A get comes before a fill, and is what TinyLFU goes by.
            assert!(bench.find(&blob.digest()).await.is_none());
            bench.keep_now(blob).await;
        }
        let stats = bench.stats(0);
        assert!(stats.evictions > 200 && stats.bytes > 1 << 20 && stats.bytes <= 2 << 20, "{stats:?}");
        until("the janitor is done", || bench.files().len() as u64 == stats.blobs).await;
        assert_eq!(bench.used(), stats.bytes, "{policy:?}");
        assert!(bench.files().iter().all(|path| bench.store.has(&path.file_name().unwrap().to_str().unwrap().parse().unwrap())));
        // The same directory with half the room.
        bench.config.capacity = Size::mib(1);
        bench.reopen().await;
        until("the janitor is done", || bench.used() == bench.stats(0).bytes).await;
        assert!((1 << 19..=1 << 20).contains(&bench.used()), "{}", bench.used());
    }
}

/// Blobs push each other out while they are kept anew: no file may go that the index has, none stay that it has not.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_anew_is_not_deleted_with_what_was_evicted() {
    let bench = Bench::new(|config| config.capacity = Size::kib(40));
    bench.scanned().await;
    let blobs: Arc<Vec<_>> = Arc::new((0..8).map(|seed| blob(10_000, seed)).collect());
    for round in 0..100 {
        let tasks = (0..4).map(|task| {
            let (disk, blobs) = (bench.disk.clone().unwrap(), blobs.clone());
            tokio::spawn(async move {
                for step in 0..8 {
                    disk.keep_now(blobs[(step + 2 * task) % blobs.len()].clone()).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        until("the janitor is done", || bench.files().len() as u64 <= bench.stats(0).blobs).await;
        for blob in blobs.iter().filter(|blob| bench.knows(&blob.digest()).is_some()) {
            assert_eq!(bench.whole(blob).await.as_deref(), Some(&blob.content()[..]), "round {round}");
        }
        assert_eq!(bench.files().len() as u64, bench.stats(0).blobs, "round {round}");
    }
    assert!(bench.stats(0).evictions > 500);
    assert_eq!(bench.metrics.corrupt_count("disk"), 0);
}

#[tokio::test]
async fn few_files_are_held_open() {
    let bench = Bench::new(|config| config.open_files = 4);
    let mut kept = Vec::new();
    for seed in 0..40 {
        kept.push(bench.keep(100, seed).await.0);
    }
    let root = bench.root().canonicalize().unwrap();
    let ours = |entry: &PathBuf| fs::read_link(entry).is_ok_and(|target| target.starts_with(&root) && !target.ends_with("lock"));
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    for blob in &kept {
        assert!(bench.whole(blob).await.is_some());
    }
    until("the rest is closed", || {
        bench.store.settle_open();
        (1..=4).contains(&descriptors().filter(ours).count())
    })
    .await;
}

#[tokio::test]
async fn an_emptied_directory_heals() {
    let bench = Bench::new(|_| {});
    bench.scanned().await;
    let (lost, path) = bench.keep(100, 1).await;
    for entry in list(bench.root()).iter().filter(|path| path.is_dir()) {
        fs::remove_dir_all(entry).unwrap();
    }
    assert!(!path.exists());
    assert!(bench.find(&lost.digest()).await.is_none(), "vanished");
    assert_eq!(bench.knows(&lost.digest()), None);
    let (blob, _) = bench.keep(100, 2).await;
    assert!(bench.whole(&blob).await.is_some());
}
