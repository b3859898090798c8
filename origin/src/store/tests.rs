use super::*;
use std::{ops::Range, thread};

fn store() -> (tempfile::TempDir, Arc<Store>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(dir.path(), "store.root").unwrap());
    store.count().unwrap();
    (dir, store)
}

fn put(store: &Arc<Store>, claimed: Option<Digest>, bytes: &[u8]) -> Result<Kept, Fault> {
    let mut upload = store.begin(claimed)?;
    for chunk in bytes.chunks(1000) {
        upload.write(&Bytes::copy_from_slice(chunk))?;
    }
    upload.finish()
}

fn read(store: &Arc<Store>, digest: &Digest, range: Option<Range<u64>>) -> Result<Vec<u8>, Fault> {
    let blob = store.open_blob(digest)?.expect("the blob is here");
    let range = range.unwrap_or(0..blob.size());
    let mut reader = blob.read(range);
    let mut all = reader.next(700)?.to_vec();
    while !reader.is_done() {
        all.extend(reader.next(700)?);
    }
    Ok(all)
}

fn totals(store: &Store) -> (i64, i64) {
    (store.totals().blobs.load(Relaxed), store.totals().bytes.load(Relaxed))
}

fn temp_files(store: &Store) -> usize {
    fs::read_dir(&store.tmp).unwrap().count()
}

#[test]
fn keeps_what_verifies_and_nothing_else() {
    let (_dir, store) = store();
    for bytes in [&b""[..], b"x", &[7; 5000]] {
        let digest = Digest::of(bytes);
        assert!(store.open_blob(&digest).unwrap().is_none());
        assert!(store.holds_durably(&digest).unwrap().is_none());
        assert!(put(&store, Some(digest), bytes).unwrap().new);
        assert!(!put(&store, None, bytes).unwrap().new);
        assert_eq!(read(&store, &digest, None).unwrap(), bytes);
        assert!(store.holds_durably(&digest).unwrap().is_some());
        assert_eq!(size_of(&store.path(&digest)).unwrap(), Some(bytes.len() as u64));
    }
    assert_eq!(read(&store, &Digest::of(&[7; 5000]), Some(10..1800)).unwrap(), [7; 1790]);
    assert_eq!(totals(&store), (3, 5001));

    let other = Digest::of(b"other");
    assert!(matches!(put(&store, Some(other), b"not that"), Err(Fault::Mismatch(_))));
    assert!(store.open_blob(&other).unwrap().is_none());
    drop(store.begin(None).unwrap());
    assert_eq!((totals(&store), temp_files(&store)), ((3, 5001), 0));
}

#[test]
fn removes_once() {
    let (_dir, store) = store();
    let digest = put(&store, None, b"x").unwrap().digest;
    assert!(store.remove(&digest).unwrap());
    assert!(!store.remove(&digest).unwrap());
    assert_eq!((totals(&store), size_of(&store.path(&digest)).unwrap()), ((0, 0), None));
}

#[test]
fn rot_is_found_set_aside_and_healed() {
    for (name, spoil) in [
        ("flipped", (|path| fs::write(path, [vec![7; 4999], vec![8]].concat()).unwrap()) as fn(&Path)),
        ("truncated", |path| File::options().write(true).open(path).unwrap().set_len(2000).unwrap()),
        ("emptied", |path| File::options().write(true).open(path).unwrap().set_len(0).unwrap()),
    ] {
        let (_dir, store) = store();
        let digest = put(&store, None, &[7; 5000]).unwrap().digest;
        spoil(&store.path(&digest));
        assert!(matches!(read(&store, &digest, None), Err(Fault::Rotten { digest: d, found: true }) if d == digest), "{name}");
        assert!(store.open_blob(&digest).unwrap().is_none(), "{name}: still there");
        assert!(store.quarantine.join(digest.to_string()).exists(), "{name}: not in quarantine");
        assert_eq!(totals(&store).0, 0, "{name}");
        assert!(put(&store, Some(digest), &[7; 5000]).unwrap().new);
        assert_eq!(read(&store, &digest, None).unwrap(), [7; 5000], "{name}");
    }
}

#[test]
fn the_last_chunk_waits_for_the_digest() {
    let (_dir, store) = store();
    let digest = put(&store, None, &[7; 1000]).unwrap().digest;
    fs::write(store.path(&digest), [8; 1000]).unwrap();
    let mut reader = store.open_blob(&digest).unwrap().unwrap().read(0..1000);
    assert_eq!(reader.next(600).unwrap().len(), 600);
    let mut other = store.open_blob(&digest).unwrap().unwrap().read(0..1000);
    assert!(matches!(reader.next(600), Err(Fault::Rotten { found: true, .. })));
    assert!(matches!(other.next(1000), Err(Fault::Rotten { found: false, .. })), "one damage is found once");
}

#[test]
fn a_healed_blob_is_not_set_aside() {
    let (_dir, store) = store();
    let digest = put(&store, None, &[7; 5000]).unwrap().digest;
    fs::write(store.path(&digest), [8; 5000]).unwrap();
    let mut reader = store.open_blob(&digest).unwrap().unwrap().read(0..5000);
    assert!(!put(&store, Some(digest), &[7; 5000]).unwrap().new);
    assert!(matches!(reader.next(9000), Err(Fault::Rotten { found: false, .. })));
    assert_eq!(read(&store, &digest, None).unwrap(), [7; 5000]);
    assert_eq!(totals(&store), (1, 5000));
}

#[test]
fn many_writers_of_one_blob_make_it_once() {
    let (_dir, store) = store();
    let made = thread::scope(|scope| {
        let writers: Vec<_> = (0..16).map(|_| scope.spawn(|| put(&store, None, &[9; 3000]).unwrap().new)).collect();
        writers.into_iter().filter_map(|writer| writer.join().unwrap().then_some(())).count()
    });
    assert_eq!((made, totals(&store), temp_files(&store)), (1, (1, 3000), 0));
}

#[test]
fn counting_beside_traffic_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = Arc::new(Store::open(dir.path(), "store.root").unwrap());
        (0..100u32).for_each(|i| assert!(put(&store, None, &i.to_be_bytes()).unwrap().new));
        assert_eq!(totals(&store), (0, 0), "nothing is known before the count");
    }
    let store = Arc::new(Store::open(dir.path(), "store.root").unwrap());
    thread::scope(|scope| {
        scope.spawn(|| store.count().unwrap());
        scope.spawn(|| (50..200u32).for_each(|i| assert_eq!(put(&store, None, &i.to_be_bytes()).unwrap().new, i >= 100)));
        scope.spawn(|| (0..50u32).for_each(|i| assert!(store.remove(&Digest::of(&i.to_be_bytes())).unwrap())));
    });
    assert_eq!(totals(&store), (150, 600));
}

#[test]
fn one_process_per_root_and_no_left_overs() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tmp")).unwrap();
    fs::write(dir.path().join("tmp/upload-abc"), "half").unwrap();
    let store = Store::open(dir.path(), "store.root").unwrap();
    assert_eq!(temp_files(&store), 0);
    fs::write(dir.path().join("tmp/upload-def"), "half").unwrap();
    let refused = Store::open(dir.path(), "store.root").map(drop).unwrap_err().to_string();
    assert!(refused.contains("another process is using it") && refused.contains(dir.path().to_str().unwrap()), "{refused}");
    assert_eq!(temp_files(&store), 1, "a refused start must not touch the uploads of the one who holds the root");
    drop(store);
    Store::open(dir.path(), "store.root").unwrap();
}

#[test]
fn directories_taken_away_come_back() {
    let (dir, store) = store();
    let digest = put(&store, None, b"x").unwrap().digest;
    fs::remove_dir_all(dir.path().join(&digest.to_string()[..2])).unwrap();
    put(&store, None, b"x").unwrap();
    assert_eq!(read(&store, &digest, None).unwrap(), b"x");
}
