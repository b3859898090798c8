//! What is pending: uploads that are acknowledged and that the store does not have yet.

use crate::{
    bodies::{Bodies, Failed, OwnedBody},
    journal::{Body, Broken, Change, Event, EventRange, Journal, Record, What},
    metrics::Metrics,
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_bucket::Listed;
use castier_cache::{Budget, Fault, Incoming, Lease, Limit, Next, Pool, PoolEvent, Put, Upload};
use castier_directory_lock::{DirectoryLock, Unavailable};
use castier_wire::entry::Name;
use futures::stream;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::{Notify, watch};

/// What a record costs of `disk.outbox` beside its body: a block of the file system, a row of the journal, and [`RECORD_MEMORY`]. It is more than that on
/// the disk, so that a full outbox of tiny blobs does not take too much memory.
const RECORD_COST: u64 = 16 << 10;
/// What an event costs.
const EVENT_COST: u64 = 512;
/// Larger bodies are files. Up to this size an upload is in memory anyway.
const INLINE: usize = castier_cache::SMALL;
/// Bytes of an upload that are written at once, and those of a body that are read at once.
const PIECE: usize = 1 << 20;

/// The file of the journal.
const JOURNAL: &str = "journal.redb";

/// What a record takes in memory.
const RECORD_MEMORY: u64 = 512;
/// The most memory of an outbox beside its records: the cache of its journal, and bodies that wait to be written.
const BASE_MEMORY: u64 = 40 << 20;

/// The most memory that an outbox of this capacity takes.
pub const fn most_memory(capacity: u64) -> u64 {
    BASE_MEMORY + capacity / RECORD_COST * RECORD_MEMORY
}

/// The outbox of a node.
pub struct Outbox {
    pub(crate) journal: Journal,
    pub(crate) bodies: Bodies,
    pub(crate) state: Mutex<State>,
    /// Told after each change of `state` that the uploader may act on.
    pub(crate) changed: Notify,
    /// `disk.outbox`.
    budget: Arc<Budget>,
    pub(crate) metrics: Arc<Metrics>,
    /// This node drains: what comes goes to the store at once.
    draining: AtomicBool,
    /// Uploads that are being accepted.
    accepting: AtomicUsize,
    /// How many records were taken out, or lost, without being uploaded.
    pub(crate) taken_out: AtomicU64,
    /// The number of the last event.
    events: watch::Receiver<u64>,
    /// Events of which nobody knows whether they have happened.
    pub(crate) unsettled: Mutex<Vec<Unsettled>>,
    /// Told after `unsettled` has become longer.
    pub(crate) is_unsettled: Notify,
    id: u64,
    /// `disk.timeout`.
    timeout: Duration,
    _lock: DirectoryLock,
}

/// An event of which nobody knows whether it has happened.
pub(crate) struct Unsettled {
    /// When the store is asked.
    pub due: Instant,
    pub intent: u64,
    pub event: Event,
    pub _lease: Lease,
}

/// What an [`Outbox`] needs.
pub struct Options {
    /// `disk.outbox`: the most bytes.
    pub capacity: u64,
    /// `disk.timeout`: how long an upload waits for the file system.
    pub timeout: Duration,
    /// `disk.cooldown`.
    pub cooldown: Duration,
    /// `disk.threads`.
    pub threads: usize,
    /// The sinks of events, by their names. None: events are not noted.
    pub sinks: Vec<String>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

#[derive(Default)]
pub(crate) struct State {
    pub items: BTreeMap<u64, Item>,
    /// The latest record of each blob and each entry.
    blobs: HashMap<Digest, u64>,
    entries: HashMap<String, u64>,
    /// The records of blobs, those that are being uploaded included.
    pub pending_blobs: BTreeSet<u64>,
    /// What may be uploaded now: blobs, and entries and their deletions.
    ready_blobs: BTreeSet<u64>,
    ready_entries: BTreeSet<u64>,
    /// What has failed, and waits until then. [`Item::due`] has the time too.
    delayed: BTreeSet<(Instant, u64)>,
    /// Names of which a version is being uploaded.
    busy_names: HashSet<String>,
}

pub(crate) struct Item {
    pub record: Record,
    /// How often its upload has failed.
    pub failures: u32,
    /// It waits in [`State::delayed`].
    due: Option<Instant>,
    pub is_busy: bool,
    _lease: Lease,
}

/// A blob that the outbox has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    number: u64,
    /// Its size.
    pub size: u64,
}

/// The version of an entry that the outbox has.
#[derive(Clone, Debug)]
pub struct PendingEntry {
    /// Its bytes; `None`: the entry was deleted.
    pub bytes: Option<Bytes>,
    /// When it was accepted, in milliseconds since 1970.
    pub at: u64,
}

impl Outbox {
    /// Whether there is an outbox in this directory.
    pub fn exists(directory: &Path) -> bool {
        directory.join(JOURNAL).exists()
    }

    /// Opens the outbox in this directory, or makes it. Blocks.
    ///
    /// # Errors
    /// A text that names the directory and says what is wrong.
    pub fn open(directory: &Path, options: Options) -> Result<Arc<Self>, String> {
        let Options { capacity, timeout, cooldown, threads, sinks, metrics } = options;
        let shown = directory.display();
        let failed = |error: &dyn std::fmt::Display| format!("the outbox {shown} cannot be opened: {error}");
        let lock = DirectoryLock::take(directory).map_err(|unavailable| match unavailable {
            Unavailable::InUse => format!("another process uses the outbox {shown}"),
            Unavailable::NotCreated(error) | Unavailable::NotWritable(error) => failed(&error),
        })?;
        let path = directory.join(JOURNAL);
        let (tell, events) = watch::channel(0);
        let budget = Budget::new(capacity);
        let (charged, budget_of_events) = (Mutex::new(budget.empty()), budget.clone());
        let note_events = Arc::new(move |range: EventRange| {
            // Charged whether or not it is left: the events are on the disk already.
            *charged.lock() = budget_of_events.charge(range.count * EVENT_COST);
            tell.send_if_modified(|last| {
                let is_new = range.last != *last;
                *last = range.last;
                is_new
            });
        });
        let note = note_events.clone();
        let (journal, contents) = Journal::open(&path, timeout, move |range| note(range)).map_err(|error| {
            format!(
                "the outbox's journal {} cannot be opened: {error}; it has uploads that the store may not have yet: repair the disk, or move it away and lose them",
                path.display()
            )
        })?;
        note_events(contents.events);
        let pool = Pool::new("outbox-io", threads, timeout, cooldown, |event| match event {
            PoolEvent::Hangs => tracing::error!("the file system of the outbox does not answer; uploads get 507 until it does"),
            PoolEvent::Recovered => tracing::info!("the file system of the outbox answers again"),
        });
        let known =
            contents.records.iter().filter_map(|(_, record)| if let Body::File(name) = &record.body { Some(name.as_str()) } else { None });
        let bodies = Bodies::open(&directory.join("bodies"), pool, &known.collect()).map_err(|error| failed(&error))?;
        make_names_durable(directory).map_err(|error| failed(&error))?;
        let mut state = State::default();
        for (number, record) in contents.records {
            let lease = budget.charge(record.size + RECORD_COST);
            state.add(number, record, lease);
        }
        let intents = contents.intents.into_iter();
        let unsettled = intents.map(|(intent, event)| Unsettled { due: Instant::now(), intent, event, _lease: budget.charge(EVENT_COST) });
        let unsettled = unsettled.collect();
        let this = Arc::new(Self {
            journal,
            bodies,
            state: Mutex::new(state),
            changed: Notify::new(),
            budget,
            metrics,
            draining: AtomicBool::new(false),
            accepting: AtomicUsize::new(0),
            taken_out: AtomicU64::new(0),
            events,
            unsettled: Mutex::new(unsettled),
            is_unsettled: Notify::new(),
            id: contents.id,
            timeout,
            _lock: lock,
        });
        this.journal.commit_here(Change::Sinks(sinks)).map_err(|broken| failed(&broken))?;
        let (records, bytes) = (this.state.lock().items.len(), this.budget.used());
        if records > 0 {
            tracing::info!(records, bytes, "the outbox has uploads that the store may not have yet; they are sent to it now");
        }
        this.note();
        Ok(this)
    }

    /// A blob that is pending.
    pub fn pending(&self, digest: &Digest) -> Option<Pending> {
        let state = self.state.lock();
        let number = *state.blobs.get(digest)?;
        Some(Pending { number, size: state.items.get(&number)?.record.size })
    }

    /// The bytes of a pending blob from an offset on; `None` if the store has got it meanwhile.
    ///
    /// # Errors
    /// The disk.
    pub async fn read(self: &Arc<Self>, pending: Pending, from: u64) -> Result<Option<Incoming>, Fault> {
        let Some(opened) = self.open_body(pending.number).await? else { return Ok(None) };
        Ok(Some(Incoming::new(Some(pending.size), self.clone().stream(opened, from))))
    }

    /// A version of an entry that is pending. The outer `None`: the outbox knows nothing of it.
    ///
    /// # Errors
    /// The disk.
    pub async fn pending_entry(self: &Arc<Self>, name: &Name) -> Result<Option<PendingEntry>, Fault> {
        // The store may get a version while this reads it.
        loop {
            let (number, at, is_deletion) = {
                let state = self.state.lock();
                let Some(number) = state.entries.get(name.as_str()) else { return Ok(None) };
                let Some(item) = state.items.get(number) else { return Ok(None) };
                (*number, item.record.at, matches!(item.record.what, What::NoEntry(_)))
            };
            if is_deletion {
                return Ok(Some(PendingEntry { bytes: None, at }));
            }
            if let Some(opened) = self.open_body(number).await? {
                let bytes = self.whole(opened).await?;
                return Ok(Some(PendingEntry { bytes: Some(bytes), at }));
            }
        }
    }

    /// Whether a version of this entry is pending.
    pub fn has_entry(&self, name: &Name) -> bool {
        self.state.lock().entries.contains_key(name.as_str())
    }

    /// Accepts an upload: reads it to its end, and returns when it is durable here.
    ///
    /// # Errors
    /// The client's; [`Limit::Outbox`] if the outbox is full or cannot be written.
    pub async fn accept(
        self: &Arc<Self>,
        upload: &mut Upload<'_>,
        event: impl FnOnce(&Digest, u64) -> Option<Event>,
    ) -> Result<Put, Fault> {
        let _accepting = Accepting::new(self);
        let taken_out = self.taken_out.load(Ordering::Acquire);
        if upload.digest().is_some_and(|digest| self.pending(digest).is_some()) {
            upload.drain().await?;
            // It may have been deleted while the client sent it. Its bytes are gone: the client has to send them again.
            let is_kept = self.taken_out.load(Ordering::Acquire) == taken_out;
            return if is_kept { Ok(Put::Existed) } else { Err(Fault::Busy(Limit::Origin)) };
        }
        let mut lease = self.lease(RECORD_COST)?;
        let (body, inline, owned) = match upload.whole().cloned() {
            Some(bytes) => {
                self.grow(&mut lease, bytes.len() as u64)?;
                (Body::Inline, Some(bytes), None)
            }
            None => {
                let (owned, name) = self.write_body(upload, &mut lease).await?;
                (Body::File(name), None, Some(owned))
            }
        };
        let Some((digest, size)) = upload.verified() else {
            return Err(Fault::Internal("an upload ended before its digest was known".into()));
        };
        let record = Record { what: What::Blob(digest.to_string()), size, at: now(), body };
        self.add(record, inline, owned, event(&digest, size), lease).await?;
        Ok(Put::Created)
    }

    /// Accepts a version of an entry, or its deletion. Returns when it is durable here.
    ///
    /// # Errors
    /// [`Limit::Outbox`].
    pub(crate) async fn accept_entry(self: &Arc<Self>, name: &Name, bytes: Option<Bytes>) -> Result<(), Fault> {
        let _accepting = Accepting::new(self);
        let size = bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let lease = self.lease(RECORD_COST + size)?;
        let (what, body, inline, owned) = match bytes {
            None => (What::NoEntry(name.as_str().to_owned()), Body::None, None, None),
            Some(bytes) => {
                let what = What::Entry(name.as_str().to_owned(), Digest::of(&bytes).to_string());
                if bytes.len() <= INLINE {
                    (what, Body::Inline, Some(bytes), None)
                } else {
                    let mut file = self.bodies.create().await.map_err(|failed| self.refused(&failed))?;
                    file.write(bytes.to_vec()).await.map_err(|failed| self.refused(&failed))?;
                    let (owned, name) = file.finish().await.map_err(|failed| self.refused(&failed))?;
                    (what, Body::File(name), None, Some(owned))
                }
            }
        };
        self.add(Record { what, size, at: now(), body }, inline, owned, None, lease).await
    }

    /// Takes a blob out again, that is about to be deleted at the store. True if it was pending. Waits for its upload, if that has begun.
    ///
    /// # Errors
    /// The upload did not end in time; the disk.
    pub async fn take_out(self: &Arc<Self>, digest: &Digest) -> Result<bool, Fault> {
        let deadline = Instant::now() + self.timeout;
        let mut was_pending = false;
        loop {
            let number = {
                let mut state = self.state.lock();
                let Some(number) = state.blobs.get(digest).copied() else { return Ok(was_pending) };
                // Taken, so that no upload begins.
                state.take(number).then_some(number)
            };
            was_pending = true;
            self.taken_out.fetch_add(1, Ordering::AcqRel);
            match number {
                Some(number) => {
                    if let Err(broken) = self.remove(number).await {
                        self.state.lock().put_back(number, Instant::now());
                        return Err(self.refused(&broken));
                    }
                }
                None if Instant::now() >= deadline => return Err(Fault::Busy(Limit::Origin)),
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn add(
        self: &Arc<Self>,
        record: Record,
        body: Option<Bytes>,
        owned: Option<OwnedBody>,
        event: Option<Event>,
        lease: Lease,
    ) -> Result<(), Fault> {
        let (tell, told) = tokio::sync::oneshot::channel();
        let this = self.clone();
        let queued = self.journal.write(Change::Add { record: record.clone(), body, event }, move |done| {
            // Also if the client has left, or has got its 507, meanwhile: what the journal has is uploaded.
            let done = done.map(|number| {
                if let Some(owned) = owned {
                    owned.keep();
                }
                this.state.lock().add(number, record, lease);
                this.note();
                this.changed.notify_one();
            });
            drop(tell.send(done));
        });
        let committed = async {
            queued.await;
            told.await
        };
        match tokio::time::timeout(self.timeout, committed).await {
            Ok(Ok(done)) => done.map_err(|broken| self.refused(&broken)),
            Ok(Err(_)) => Err(Fault::Internal("the outbox's journal has ended".into())),
            Err(_) => Err(self.refused(&"its disk does not answer")),
        }
    }

    /// Removes a record, then its body.
    pub(crate) async fn remove(self: &Arc<Self>, number: u64) -> Result<(), Broken> {
        self.journal.commit(Change::Remove(number)).await?;
        let item = self.state.lock().remove(number);
        if let Some(Body::File(name)) = item.as_ref().map(|item| &item.record.body) {
            self.bodies.delete(name);
        }
        // Gives back its bytes, which are noted.
        drop(item);
        self.note();
        self.changed.notify_one();
        Ok(())
    }

    async fn write_body(&self, upload: &mut Upload<'_>, lease: &mut Lease) -> Result<(OwnedBody, String), Fault> {
        let mut file = self.bodies.create().await.map_err(|failed| self.refused(&failed))?;
        let mut piece = Vec::new();
        loop {
            let next = upload.next().await?;
            let is_last = matches!(next, Next::Last(_));
            let (Next::Part(bytes) | Next::Last(bytes)) = next;
            self.grow(lease, bytes.len() as u64)?;
            piece.extend_from_slice(&bytes);
            if piece.len() >= PIECE || (is_last && !piece.is_empty()) {
                file.write(std::mem::take(&mut piece)).await.map_err(|failed| self.refused(&failed))?;
            }
            if is_last {
                return file.finish().await.map_err(|failed| self.refused(&failed));
            }
        }
    }

    /// The bytes of an event that may come.
    pub(crate) fn lease_of_event(&self) -> Result<Lease, Fault> {
        self.lease(EVENT_COST)
    }

    fn lease(&self, bytes: u64) -> Result<Lease, Fault> {
        let mut lease = self.budget.empty();
        self.grow(&mut lease, bytes)?;
        Ok(lease)
    }

    fn grow(&self, lease: &mut Lease, bytes: u64) -> Result<(), Fault> {
        if lease.grow(bytes) { Ok(()) } else { Err(self.refused(&"disk.outbox is full")) }
    }

    /// An upload is refused because of the outbox.
    fn refused(&self, why: &dyn std::fmt::Display) -> Fault {
        self.metrics.refused();
        tracing::debug!(%why, "the outbox refuses an upload");
        Fault::Busy(Limit::Outbox)
    }

    /// The body of a record; `None` if the record or its file is gone.
    pub(crate) async fn open_body(&self, number: u64) -> Result<Option<Opened>, Fault> {
        let unreadable = |failed: Failed| Fault::Internal(format!("the outbox cannot be read: {failed}"));
        let body = self.state.lock().items.get(&number).map(|item| item.record.body.clone());
        Ok(match body {
            None => None,
            Some(Body::None) => Some(Opened::Inline(Bytes::new())),
            Some(Body::Inline) => {
                let read = {
                    let journal = self.journal.reader();
                    self.bodies.pool.run(move || journal.body(number))
                };
                let read = read.await.map_err(|failed| unreadable(failed.into()))?;
                read.map_err(|broken| Fault::Internal(broken.to_string()))?.map(Opened::Inline)
            }
            Some(Body::File(name)) => match self.bodies.open_body(&name).await {
                Ok(file) => Some(Opened::File(file)),
                Err(Failed::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
                Err(failed) => return Err(unreadable(failed)),
            },
        })
    }

    /// The bytes of a body from an offset on.
    pub(crate) fn stream(self: Arc<Self>, opened: Opened, from: u64) -> impl futures::Stream<Item = Result<Bytes, Fault>> + Send + 'static {
        stream::try_unfold((self, Some(opened), from), async |(this, opened, at)| {
            let (opened, bytes) = match opened {
                None => return Ok(None),
                Some(Opened::Inline(bytes)) => (None, bytes.slice(usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len())..)),
                Some(Opened::File(file)) => {
                    let (file, bytes) = this
                        .bodies
                        .read(file, at, PIECE)
                        .await
                        .map_err(|failed| Fault::Internal(format!("the outbox cannot be read: {failed}")))?;
                    (Some(Opened::File(file)), Bytes::from(bytes))
                }
            };
            if bytes.is_empty() {
                return Ok(None);
            }
            let at = at + bytes.len() as u64;
            Ok(Some((bytes, (this, opened, at))))
        })
    }

    pub(crate) async fn whole(self: &Arc<Self>, opened: Opened) -> Result<Bytes, Fault> {
        use futures::TryStreamExt as _;
        let parts = self.clone().stream(opened, 0).try_fold(Vec::new(), async |mut whole, part| {
            whole.extend_from_slice(&part);
            Ok(whole)
        });
        parts.await.map(Bytes::from)
    }

    /// What is pending directly below a collection: the last part of its name, whether it is there, and as a list shows it.
    pub(crate) fn pending_below(&self, collection: &Name) -> Vec<(String, bool, Listed)> {
        let state = self.state.lock();
        let below = |(name, number): (&String, &u64)| {
            let rest = name.strip_prefix(collection.as_str())?;
            let record = &state.items.get(number)?.record;
            let is_there = !matches!(record.what, What::NoEntry(_));
            Some(match rest.split_once('/') {
                None => (rest.to_owned(), is_there, Listed::entry(&Name::from_stored(name)?, record.size, record.at)),
                Some((first, _)) if is_there => (first.to_owned(), true, Listed { name: first.to_owned(), size: None, modified: None }),
                Some(_) => return None,
            })
        };
        state.entries.iter().filter_map(below).collect()
    }

    /// How long the oldest pending blob has waited; `None` without one.
    pub fn oldest_blob(&self) -> Option<Duration> {
        let state = self.state.lock();
        let number = state.pending_blobs.first()?;
        state.items.get(number).map(|item| age(item.record.at))
    }

    /// From now on uploads go to the store at once, as far as the order allows.
    pub fn drain(&self) {
        if !self.draining.swap(true, Ordering::AcqRel) {
            tracing::info!(records = self.len(), "the outbox is drained; uploads wait for the store from now on");
        }
        self.state.lock().hurry();
        self.changed.notify_one();
    }

    /// Whether [`Self::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// How many records are pending, those that are just being accepted included.
    pub fn len(&self) -> usize {
        self.state.lock().items.len() + self.accepting.load(Ordering::Acquire)
    }

    /// How many bytes of `disk.outbox` are in use.
    pub fn bytes(&self) -> u64 {
        self.budget.used()
    }

    /// Whether nothing is pending.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Up to `most` events after a sequence number, oldest first. Blocks.
    ///
    /// # Errors
    /// A text: the journal cannot be read.
    pub fn events(&self, after: u64, most: usize) -> Result<Vec<(u64, Event)>, String> {
        self.journal.reader().events(after, most).map_err(|broken| broken.to_string())
    }

    /// The last event that a sink has delivered. Blocks.
    ///
    /// # Errors
    /// A text: the journal cannot be read, or has no such sink.
    pub fn cursor(&self, sink: &str) -> Result<u64, String> {
        let cursor = self.journal.reader().cursor(sink).map_err(|broken| broken.to_string())?;
        cursor.ok_or_else(|| format!("the outbox has no sink {sink}"))
    }

    /// A sink has delivered all events up to this one. What all sinks have delivered is removed. Blocks.
    ///
    /// # Errors
    /// A text: the journal cannot be written.
    pub fn advance(&self, sink: &str, to: u64) -> Result<(), String> {
        self.journal.commit_here(Change::Advance { sink: sink.to_owned(), to }).map(drop).map_err(|broken| broken.to_string())
    }

    /// The number of the last event, whenever it changes.
    pub fn last_event(&self) -> watch::Receiver<u64> {
        self.events.clone()
    }

    /// A random number that this journal has for good. With the number of an event it is an id that no other event has.
    pub const fn journal_id(&self) -> u64 {
        self.id
    }

    /// Brings the metrics up to date.
    pub fn note(&self) {
        let state = self.state.lock();
        // Numbers grow with time.
        let oldest = state.items.values().next().map(|item| age(item.record.at));
        self.metrics.set(state.pending_blobs.len(), state.items.len() - state.pending_blobs.len(), &self.budget, oldest);
    }
}

/// The bytes of a record, ready to be read.
pub(crate) enum Opened {
    Inline(Bytes),
    File(File),
}

/// Counts an upload that is being accepted.
struct Accepting<'o>(&'o Outbox);

impl<'o> Accepting<'o> {
    fn new(outbox: &'o Outbox) -> Self {
        outbox.accepting.fetch_add(1, Ordering::AcqRel);
        Self(outbox)
    }
}

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        self.0.accepting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl State {
    fn add(&mut self, number: u64, record: Record, lease: Lease) {
        match &record.what {
            What::Blob(digest) => {
                if let Ok(digest) = digest.parse() {
                    self.blobs.insert(digest, number);
                }
                self.pending_blobs.insert(number);
                self.ready_blobs.insert(number);
            }
            What::Entry(name, _) | What::NoEntry(name) => {
                self.entries.insert(name.clone(), number);
                self.ready_entries.insert(number);
            }
        }
        self.items.insert(number, Item { record, failures: 0, due: None, is_busy: false, _lease: lease });
    }

    fn remove(&mut self, number: u64) -> Option<Item> {
        let item = self.items.remove(&number)?;
        match &item.record.what {
            What::Blob(digest) => {
                if let Ok(digest) = digest.parse()
                    && self.blobs.get(&digest) == Some(&number)
                {
                    self.blobs.remove(&digest);
                }
                self.pending_blobs.remove(&number);
                self.ready_blobs.remove(&number);
            }
            What::Entry(name, _) | What::NoEntry(name) => {
                if self.entries.get(name) == Some(&number) {
                    self.entries.remove(name);
                }
                self.ready_entries.remove(&number);
                if item.is_busy {
                    self.busy_names.remove(name);
                }
            }
        }
        Some(item)
    }

    /// Makes a record busy; false if it is already, or is gone.
    pub(crate) fn take(&mut self, number: u64) -> bool {
        let Some(item) = self.items.get_mut(&number).filter(|item| !item.is_busy) else { return false };
        item.is_busy = true;
        if let Some(due) = item.due.take() {
            self.delayed.remove(&(due, number));
        }
        self.ready_blobs.remove(&number);
        self.ready_entries.remove(&number);
        if let What::Entry(name, _) | What::NoEntry(name) = &item.record.what {
            self.busy_names.insert(name.clone());
        }
        true
    }

    /// The record to upload next, and makes it busy. Entries wait for the blobs before them, and for the version before them.
    pub(crate) fn next(&mut self, now: Instant) -> Option<u64> {
        while let Some((_, number)) = self.delayed.first().copied().filter(|(due, _)| *due <= now) {
            self.delayed.pop_first();
            self.make_ready(number);
        }
        let first_blob = self.pending_blobs.first().copied().unwrap_or(u64::MAX);
        let is_free = |number: &u64| match self.items.get(number).map(|item| &item.record.what) {
            Some(What::Entry(name, _) | What::NoEntry(name)) => !self.busy_names.contains(name),
            _ => true,
        };
        let entry = self.ready_entries.range(..first_blob).copied().find(is_free);
        let number = entry.or_else(|| self.ready_blobs.first().copied())?;
        self.take(number).then_some(number)
    }

    /// Whether this is the latest version of its entry.
    pub(crate) fn is_latest(&self, number: u64) -> bool {
        match self.items.get(&number).map(|item| &item.record.what) {
            Some(What::Entry(name, _) | What::NoEntry(name)) => self.entries.get(name) == Some(&number),
            _ => true,
        }
    }

    /// An upload has not been done. It is tried again at `due`.
    pub(crate) fn put_back(&mut self, number: u64, due: Instant) {
        let Some(item) = self.items.get_mut(&number) else { return };
        item.is_busy = false;
        if let What::Entry(name, _) | What::NoEntry(name) = &item.record.what {
            self.busy_names.remove(name);
        }
        item.due = Some(due);
        self.delayed.insert((due, number));
    }

    /// When the next upload that waits is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.delayed.first().map(|(due, _)| *due)
    }

    /// Nothing waits any more.
    fn hurry(&mut self) {
        while let Some((_, number)) = self.delayed.pop_first() {
            self.make_ready(number);
        }
    }

    fn make_ready(&mut self, number: u64) {
        let Some(item) = self.items.get_mut(&number) else { return };
        item.due = None;
        match &item.record.what {
            What::Blob(_) => self.ready_blobs.insert(number),
            What::Entry(..) | What::NoEntry(_) => self.ready_entries.insert(number),
        };
    }
}

/// The journal is of no use after a power cut if its name, or that of a directory above it, is gone.
fn make_names_durable(directory: &Path) -> io::Result<()> {
    let above = directory.ancestors().skip(1).take(2).map(|path| if path.as_os_str().is_empty() { Path::new(".") } else { path });
    std::iter::once(directory).chain(above).try_for_each(|path| File::open(path)?.sync_all())
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn age(at: u64) -> Duration {
    Duration::from_millis(now().saturating_sub(at))
}
