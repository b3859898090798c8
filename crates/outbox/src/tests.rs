//! The outbox over a store in memory that can fail and that notes the order of what it gets.

use crate::{Metrics, Options, Outbox, PendingEntry, WriteBehind, journal::Event, write_behind::Others};
use async_trait::async_trait;
use bytes::Bytes;
use castier_blob::Digest;
use castier_bucket::{Condition, Delete, Entry, Listed, Objects, PutEntry};
use castier_cache::{Answer, Ask, Budget, Fault, Incoming, Key, Lease, Limit, Next, Put, Source, Stat, Store, Upload};
use castier_wire::entry::Name;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::sync::watch;

/// A store in memory.
#[derive(Default)]
struct Shelf {
    objects: Mutex<HashMap<String, Bytes>>,
    /// Names in the order in which they came.
    order: Mutex<Vec<String>>,
    is_down: AtomicBool,
    /// It stores, and its answer is lost.
    loses_answers: AtomicBool,
    /// It stores, and never answers.
    hangs: AtomicBool,
}

impl Shelf {
    fn check(&self) -> Result<(), Fault> {
        if self.is_down.load(SeqCst) { Err(Fault::Unreachable { source_name: "origin", why: "down".into() }) } else { Ok(()) }
    }

    fn get(&self, name: &str) -> Option<Bytes> {
        self.objects.lock().get(name).cloned()
    }

    fn set(&self, name: &str, bytes: Bytes) -> bool {
        self.order.lock().push(name.to_owned());
        self.objects.lock().insert(name.to_owned(), bytes).is_none()
    }
}

impl Source for Shelf {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        async move {
            self.check()?;
            let found = self.get(&ask.digest()?.to_string());
            Ok(found.map_or(Answer::Absent, |bytes| {
                let size = bytes.len() as u64;
                let rest = bytes.slice(usize::try_from(ask.from).unwrap_or(usize::MAX)..);
                Answer::Bytes(Incoming::new(Some(size), stream::iter([Ok(rest)])))
            }))
        }
        .boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        async move {
            self.check()?;
            let stat =
                |digest: &Digest| self.get(&digest.to_string()).map_or(Stat::Absent, |bytes| Stat::Present(Some(bytes.len() as u64)));
            Ok(digests.iter().map(stat).collect())
        }
        .boxed()
    }
}

impl Store for Shelf {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        async move {
            self.check()?;
            let mut whole = Vec::new();
            loop {
                let next = upload.next().await?;
                let is_last = matches!(next, Next::Last(_));
                let (Next::Part(bytes) | Next::Last(bytes)) = next;
                whole.extend_from_slice(&bytes);
                if is_last {
                    break;
                }
            }
            self.check()?;
            let digest = upload.verified().expect("all bytes have come").0;
            let is_hanging = self.hangs.load(SeqCst);
            if is_hanging || self.loses_answers.load(SeqCst) {
                self.set(&digest.to_string(), whole.into());
                if is_hanging {
                    std::future::pending::<()>().await;
                }
                return Err(Fault::Silent { source_name: "origin", why: "its answer is lost".into() });
            }
            Ok(if self.set(&digest.to_string(), whole.into()) { Put::Created } else { Put::Existed })
        }
        .boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        async move {
            self.check()?;
            Ok(self.objects.lock().remove(&digest.to_string()).is_some())
        }
        .boxed()
    }
}

#[async_trait]
impl Objects for Shelf {
    fn known(&self, _: &Digest) -> Option<u64> {
        None
    }

    fn lease(&self) -> Lease {
        Budget::new(u64::MAX).empty()
    }

    async fn entry(&self, name: &Name, _: u64) -> Result<Option<Entry>, Fault> {
        self.check()?;
        Ok(self.get(name.as_str()).map(Entry::new))
    }

    async fn find_entry(&self, name: &Name) -> Result<Option<Listed>, Fault> {
        self.check()?;
        Ok(self.get(name.as_str()).map(|bytes| Listed::entry(name, bytes.len() as u64, 0)))
    }

    fn check_name(&self, _: &Name) -> Result<(), Fault> {
        Ok(())
    }

    async fn put_entry(&self, name: &Name, bytes: Bytes, _: Option<Condition>, _: u64) -> Result<PutEntry, Fault> {
        self.check()?;
        let digest = Digest::of(&bytes);
        Ok(if self.set(name.as_str(), bytes) { PutEntry::Created(digest) } else { PutEntry::Replaced(digest) })
    }

    async fn remove_entry(&self, name: &Name, _: Option<Condition>, _: u64) -> Result<Delete, Fault> {
        self.check()?;
        self.order.lock().push(format!("no {}", name.as_str()));
        Ok(if self.objects.lock().remove(name.as_str()).is_some() { Delete::Done } else { Delete::Absent })
    }

    async fn has_members(&self, _: &Name) -> Result<bool, Fault> {
        self.check().map(|()| false)
    }

    async fn members(&self, _: &Name) -> Result<Vec<Listed>, Fault> {
        self.check().map(|()| Vec::new())
    }
}

/// Other nodes, of which one has a blob that waits.
struct Waiting(Mutex<Option<Duration>>);

#[async_trait]
impl Others for Waiting {
    async fn open(&self, _: Ask) -> Result<Option<Answer>, Fault> {
        Ok(None)
    }

    async fn stat(&self, _: &Digest) -> Result<Option<u64>, Fault> {
        Ok(None)
    }

    async fn entry(&self, _: &Name) -> Result<Option<PendingEntry>, Fault> {
        Ok(None)
    }

    async fn take_out(&self, _: &Digest) -> Result<bool, Fault> {
        Ok(false)
    }

    async fn oldest_blob(&self) -> Option<Duration> {
        *self.0.lock()
    }
}

fn outbox(directory: &Path, capacity: u64) -> Arc<Outbox> {
    let options = Options {
        capacity,
        timeout: Duration::from_secs(10),
        cooldown: Duration::from_secs(1),
        threads: 4,
        sinks: vec!["sink".into()],
        metrics: Arc::new(Metrics::new(&prometheus::Registry::new()).unwrap()),
    };
    Outbox::open(directory, options).unwrap()
}

struct Node {
    outbox: Arc<Outbox>,
    behind: Arc<WriteBehind>,
    stop: watch::Sender<bool>,
}

impl Node {
    fn start(directory: &Path, shelf: &Arc<Shelf>, others: Option<Arc<dyn Others>>) -> Self {
        let outbox = outbox(directory, 1 << 30);
        let behind = Arc::new(WriteBehind::new(shelf.clone(), outbox.clone(), true));
        behind.connect(shelf.clone(), others);
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(behind.uploader(4, 1 << 20, stopped).unwrap());
        Self { outbox, behind, stop }
    }

    async fn put(&self, bytes: &Bytes) -> Result<Put, Fault> {
        put(&*self.behind, bytes).await
    }

    async fn empty(&self) {
        until(|| self.outbox.is_empty()).await;
    }

    async fn end(self) {
        self.stop.send_replace(true);
        let Self { outbox, behind, .. } = self;
        drop(behind);
        // The uploader has its own clones until it has ended.
        until(|| Arc::strong_count(&outbox) == 1).await;
    }
}

async fn put(store: &dyn Store, bytes: &Bytes) -> Result<Put, Fault> {
    let pieces: Vec<_> = bytes.chunks(300_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    let mut upload = Upload::new(Some(Digest::of(bytes)), None, stream::iter(pieces).boxed()).await?;
    store.put(&mut upload).await
}

async fn read(store: &dyn Store, digest: &Digest, from: u64) -> Option<Bytes> {
    let Answer::Bytes(mut incoming) = store.open(Ask { key: Key::Blob(*digest), from }).await.unwrap() else { return None };
    let mut whole = Vec::new();
    while let Some(bytes) = incoming.next().await.unwrap() {
        whole.extend_from_slice(&bytes);
    }
    Some(whole.into())
}

async fn until(condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(30), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it should have happened by now");
}

fn blob(size: usize, seed: u8) -> Bytes {
    (0..size).map(|at| u8::try_from(at % 251).unwrap() ^ seed).collect()
}

fn name(text: &str) -> Name {
    Name::from_stored(text).unwrap()
}

#[tokio::test]
async fn what_is_acknowledged_is_read_and_uploaded() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    shelf.is_down.store(true, SeqCst);
    let node = Node::start(dir.path(), &shelf, None);
    let sizes = [0, 1, 64 << 10, (64 << 10) + 1, 3_000_000];
    for (seed, size) in (0..).zip(sizes) {
        let bytes = blob(size, seed);
        assert_eq!(node.put(&bytes).await.unwrap(), Put::Created, "{size}");
        assert_eq!(node.put(&bytes).await.unwrap(), Put::Existed, "{size}");
        let digest = Digest::of(&bytes);
        assert_eq!(read(&*node.behind, &digest, 0).await.unwrap(), bytes, "{size}");
        assert_eq!(read(&*node.behind, &digest, size as u64 / 2).await.unwrap(), bytes.slice(size / 2..), "{size}");
        assert_eq!(node.behind.stat(&[digest]).await.unwrap(), [Stat::Present(Some(size as u64))]);
    }
    node.behind.put_entry(&name("/kv/a"), blob(10, 1), None, 1 << 20).await.unwrap();
    node.behind.put_entry(&name("/kv/a"), blob(100_000, 2), None, 1 << 20).await.unwrap();
    assert_eq!(node.behind.entry(&name("/kv/a"), 1 << 20).await.unwrap().unwrap().bytes, blob(100_000, 2));
    // What the store alone would know is not known now, and that is a fault.
    assert!(node.behind.stat(&[Digest::of(b"another")]).await.is_err());
    assert!(node.behind.entry(&name("/kv/b"), 1 << 20).await.is_err());

    // A crash: nothing is closed. The next process finds everything.
    node.end().await;
    let node = Node::start(dir.path(), &shelf, None);
    for (seed, size) in (0..).zip(sizes) {
        let bytes = blob(size, seed);
        assert_eq!(read(&*node.behind, &Digest::of(&bytes), 0).await.unwrap(), bytes, "{size}");
    }
    assert_eq!(node.behind.entry(&name("/kv/a"), 1 << 20).await.unwrap().unwrap().bytes, blob(100_000, 2));

    shelf.is_down.store(false, SeqCst);
    node.empty().await;
    for (seed, size) in (0..).zip(sizes) {
        assert_eq!(shelf.get(&Digest::of(&blob(size, seed)).to_string()).unwrap(), blob(size, seed));
    }
    assert_eq!(shelf.get("/kv/a").unwrap(), blob(100_000, 2));
    until(|| std::fs::read_dir(dir.path().join("bodies")).unwrap().next().is_none()).await;
    assert_eq!(node.outbox.bytes(), 5 * 512, "the events that no sink has delivered");
}

#[tokio::test]
async fn entries_come_after_the_blobs_before_them() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    shelf.is_down.store(true, SeqCst);
    let node = Node::start(dir.path(), &shelf, None);
    for round in 0..20 {
        node.put(&blob(1000, round)).await.unwrap();
        node.put(&blob(100_000, round)).await.unwrap();
        node.behind.put_entry(&name(&format!("/kv/{round}")), blob(10, round), None, 1 << 20).await.unwrap();
        node.behind.put_entry(&name("/kv/last"), blob(10, round), None, 1 << 20).await.unwrap();
    }
    shelf.is_down.store(false, SeqCst);
    node.empty().await;
    let order = shelf.order.lock().clone();
    let at = |name: &str| order.iter().position(|found| found == name).unwrap();
    for round in 0..20 {
        for size in [1000, 100_000] {
            assert!(at(&Digest::of(&blob(size, round)).to_string()) < at(&format!("/kv/{round}")), "{round}: {order:?}");
        }
    }
    assert_eq!(order.iter().filter(|name| *name == "/kv/last").count(), 1, "versions that were replaced are not uploaded");
    assert_eq!(shelf.get("/kv/last").unwrap(), blob(10, 19));
}

#[tokio::test]
async fn entries_wait_for_the_blobs_of_other_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    let others = Arc::new(Waiting(Mutex::new(Some(Duration::from_secs(3600)))));
    let node = Node::start(dir.path(), &shelf, Some(others.clone()));
    node.behind.put_entry(&name("/kv/a"), blob(10, 1), None, 1 << 20).await.unwrap();
    // A blob goes meanwhile.
    node.put(&blob(10, 2)).await.unwrap();
    until(|| shelf.get(&Digest::of(&blob(10, 2)).to_string()).is_some()).await;
    assert_eq!(shelf.get("/kv/a"), None);
    // What was acknowledged after the entry need not be waited for.
    *others.0.lock() = Some(Duration::ZERO);
    node.empty().await;
    assert_eq!(shelf.get("/kv/a").unwrap(), blob(10, 1));
}

#[tokio::test]
async fn wrong_bytes_and_bytes_over_the_limit_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    let outbox = outbox(dir.path(), 1 << 20);
    let behind = WriteBehind::new(shelf.clone(), outbox.clone(), false);
    behind.connect(shelf.clone(), None);
    let wrong: Vec<_> = (0..5).map(|_| Ok(blob(50_000, 3))).collect();
    let mut upload = Upload::new(Some(Digest::of(b"else")), None, stream::iter(wrong).boxed()).await.unwrap();
    assert!(matches!(behind.put(&mut upload).await, Err(Fault::Mismatch(_))));
    assert!(matches!(put(&behind, &blob(2 << 20, 1)).await, Err(Fault::Busy(Limit::Outbox))));
    until(|| std::fs::read_dir(dir.path().join("bodies")).unwrap().next().is_none()).await;
    assert_eq!((outbox.len(), outbox.bytes()), (0, 0));
    // Small ones count more than their bytes.
    let mut accepted = 0;
    while put(&behind, &Bytes::from(format!("blob {accepted}"))).await.is_ok() {
        accepted += 1;
    }
    assert!((60..=64).contains(&accepted), "{accepted}");
}

#[tokio::test]
async fn deletions() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    shelf.is_down.store(true, SeqCst);
    let node = Node::start(dir.path(), &shelf, None);
    let bytes = blob(100_000, 1);
    let digest = Digest::of(&bytes);
    node.put(&bytes).await.unwrap();
    node.behind.put_entry(&name("/kv/a"), blob(10, 1), None, 1 << 20).await.unwrap();
    // The store must agree.
    assert!(node.behind.delete(&digest).await.is_err());
    assert_eq!(read(&*node.behind, &digest, 0).await.unwrap(), bytes);
    assert_eq!(node.behind.remove_entry(&name("/kv/a"), None, 1 << 20).await.unwrap(), Delete::Done);
    assert!(node.behind.entry(&name("/kv/a"), 1 << 20).await.unwrap().is_none());
    shelf.is_down.store(false, SeqCst);
    assert!(node.behind.delete(&digest).await.unwrap());
    node.empty().await;
    assert_eq!(read(&*node.behind, &digest, 0).await, None);
    assert_eq!(shelf.get(&digest.to_string()), None);
    assert_eq!(shelf.get("/kv/a"), None);
    assert!(!node.behind.delete(&digest).await.unwrap());
    let kinds: Vec<_> = node.outbox.events(0, 100).unwrap().into_iter().map(|(_, event)| event.kind).collect();
    assert_eq!(kinds, [crate::Kind::Stored, crate::Kind::Deleted]);
}

#[tokio::test]
async fn damaged_bytes_are_named_and_do_not_hold_up_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    shelf.is_down.store(true, SeqCst);
    let node = Node::start(dir.path(), &shelf, None);
    node.put(&blob(100_000, 1)).await.unwrap();
    node.put(&blob(100_000, 2)).await.unwrap();
    node.end().await;
    let file = std::fs::read_dir(dir.path().join("bodies")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[50_000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    shelf.is_down.store(false, SeqCst);
    let node = Node::start(dir.path(), &shelf, None);
    node.empty().await;
    assert_eq!(shelf.objects.lock().len(), 1);
    assert_eq!(std::fs::read_dir(dir.path().join("damaged")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_drain_lets_nothing_new_in() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    shelf.is_down.store(true, SeqCst);
    let node = Node::start(dir.path(), &shelf, None);
    node.put(&blob(10, 1)).await.unwrap();
    node.outbox.drain();
    assert!(node.put(&blob(10, 2)).await.is_err(), "the store is down, and an upload waits for it now");
    // Entries keep their order after the blob.
    node.behind.put_entry(&name("/kv/a"), blob(10, 1), None, 1 << 20).await.unwrap();
    shelf.is_down.store(false, SeqCst);
    node.empty().await;
    assert_eq!(node.put(&blob(10, 2)).await.unwrap(), Put::Created);
    node.behind.put_entry(&name("/kv/b"), blob(10, 1), None, 1 << 20).await.unwrap();
    assert!(node.outbox.is_empty());
    assert_eq!(shelf.objects.lock().len(), 4);
}

#[tokio::test]
async fn an_event_survives_a_crash_between_the_store_and_its_commit() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    let (there, missing) = (blob(10, 1), blob(10, 2));
    put(&*shelf, &there).await.unwrap();
    let first = outbox(dir.path(), 1 << 20);
    for bytes in [&there, &missing] {
        let event = Event::now(crate::Kind::Stored, &Digest::of(bytes), None);
        first.journal.commit(crate::journal::Change::Intend(event)).await.unwrap();
    }
    drop(first);
    let second = outbox(dir.path(), 1 << 20);
    second.settle_due(&*shelf).await;
    let events = second.events(0, 10).unwrap();
    assert_eq!(events.iter().map(|(_, event)| event.digest.clone()).collect::<Vec<_>>(), [Digest::of(&there).to_string()]);
    // What a sink has delivered is removed.
    second.advance("sink", events[0].0).unwrap();
    assert_eq!(second.events(0, 10).unwrap(), []);
    assert_eq!(second.bytes(), 0);
    drop(second);
    assert_eq!(outbox(dir.path(), 1 << 20).unsettled.lock().len(), 0);
}

/// The journal takes a few changes at a time. Clients wait for that, and are not refused.
#[tokio::test]
async fn a_thousand_uploads_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let outbox = outbox(dir.path(), 1 << 30);
    let puts = (0..1000).map(|number| {
        let outbox = outbox.clone();
        tokio::spawn(async move {
            let bytes = Bytes::from(format!("blob {number}"));
            let mut upload = Upload::new(Some(Digest::of(&bytes)), None, stream::iter([Ok(bytes)]).boxed()).await?;
            outbox.accept(&mut upload, |_, _| None).await
        })
    });
    for put in futures::future::join_all(puts.collect::<Vec<_>>()).await {
        assert_eq!(put.unwrap().unwrap(), Put::Created);
    }
    assert_eq!(outbox.len(), 1000);
}

/// Nobody knows whether the store has what its answer was lost for. The event comes if it has.
#[tokio::test]
async fn an_event_of_an_upload_whose_answer_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    let outbox = outbox(dir.path(), 1 << 20);
    let announced = crate::Announced::new(shelf.clone(), outbox.clone());
    tokio::spawn(outbox.clone().settle_intents(shelf.clone()));
    let subjects = || outbox.events(0, 10).unwrap().into_iter().map(|(_, event)| event.digest).collect::<Vec<_>>();
    let [lost, left, refused] = [1, 2, 3].map(|seed| blob(100, seed));
    shelf.loses_answers.store(true, SeqCst);
    assert!(put(&announced, &lost).await.is_err());
    until(|| subjects() == [Digest::of(&lost).to_string()]).await;
    // The client leaves before the store has answered.
    shelf.hangs.store(true, SeqCst);
    assert!(tokio::time::timeout(Duration::from_millis(200), put(&announced, &left)).await.is_err());
    until(|| subjects() == [&lost, &left].map(|bytes| Digest::of(bytes).to_string())).await;
    shelf.hangs.store(false, SeqCst);
    shelf.is_down.store(true, SeqCst);
    assert!(put(&announced, &refused).await.is_err());
    shelf.is_down.store(false, SeqCst);
    until(|| outbox.unsettled.lock().is_empty()).await;
    assert_eq!(subjects().len(), 2, "what was never stored is no event");
}

/// A client may leave at each moment of its upload.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let outbox = outbox(dir.path(), 1 << 30);
    for micros in (0..3000).step_by(20) {
        let bytes = blob(200_000, 1);
        let accept = async {
            let mut upload = Upload::new(Some(Digest::of(&bytes)), None, stream::iter([Ok(bytes.clone())]).boxed()).await?;
            outbox.accept(&mut upload, |_, _| None).await
        };
        let _ = tokio::time::timeout(Duration::from_micros(micros), accept).await;
        if outbox.take_out(&Digest::of(&bytes)).await.unwrap() {
            continue;
        }
    }
    // The last one may have been on its way into the journal.
    until(|| std::fs::read_dir(dir.path().join("bodies")).unwrap().count() == outbox.len()).await;
    until(|| outbox.bytes() == outbox.len() as u64 * (200_000 + (16 << 10))).await;
}

#[test]
fn a_damaged_journal_is_named_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    drop(outbox(dir.path(), 1 << 20));
    let journal = dir.path().join("journal.redb");
    std::fs::write(&journal, vec![7; 100_000]).unwrap();
    let options = Options {
        capacity: 1 << 20,
        timeout: Duration::from_secs(1),
        cooldown: Duration::from_secs(1),
        threads: 1,
        sinks: Vec::new(),
        metrics: Arc::new(Metrics::new(&prometheus::Registry::new()).unwrap()),
    };
    let why = Outbox::open(dir.path(), options).err().unwrap();
    assert!(why.contains("journal.redb") && why.contains("move it away"), "{why}");
    assert_eq!(std::fs::read(&journal).unwrap(), vec![7; 100_000]);
}
