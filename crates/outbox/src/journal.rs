//! The journal: a file with the records of the outbox, the events, and how far each sink of events has come.
//!
//! One thread writes. It takes all changes that have gathered meanwhile into one transaction, so that many uploads share an fsync. After the commit it
//! calls each change's end, in the order of the sequence numbers.
//!
//! After a failed commit nobody knows what of the transaction is in the file, and redb wants the file opened anew. The thread does so, and removes all
//! rows from the first sequence number on that was not committed for sure: nobody was told of those.

use bytes::Bytes;
use parking_lot::RwLock;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tokio::sync::mpsc::{
    Receiver, Sender, channel,
    error::{SendError, TrySendError},
};

/// How many changes may wait for the disk. With 64 KiB each, 16 MiB. Who has more waits.
const QUEUE: usize = 256;
/// How often a thread that may block looks whether the queue has become shorter.
const LOOK: Duration = Duration::from_millis(2);
/// The most bytes of bodies in one transaction.
const BATCH: usize = 8 << 20;
/// How long to wait after a failure before the file is opened again.
const REOPEN: Duration = Duration::from_secs(1);
/// redb's cache. What is read is mostly read once.
const CACHE: usize = 16 << 20;

const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records-1");
const BODIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("bodies-1");
const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events-1");
/// Events of what is about to happen.
const INTENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("intents-1");
const CURSORS: TableDefinition<'_, &str, u64> = TableDefinition::new("cursors-1");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers-1");
/// The next sequence number.
const NEXT: &str = "next";
/// A random number of this journal. It makes the ids of events different from those of another journal of the same node.
const ID: &str = "id";

/// An upload that the store does not have yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub what: What,
    pub size: u64,
    /// When it was accepted, in milliseconds since 1970.
    pub at: u64,
    pub body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    /// A blob, by its digest.
    Blob(String),
    /// A version of an entry, by its name; with its digest.
    Entry(String, String),
    /// An entry was deleted.
    NoEntry(String),
}

/// Where the bytes of a record are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Body {
    None,
    /// In the journal.
    Inline,
    /// In a file of this name.
    File(String),
}

/// What has happened to a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It was stored, and was not there before.
    Stored,
    /// A client has deleted it.
    Deleted,
    /// Bytes came in its name that were others.
    Corrupt,
}

/// An event, as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What has happened.
    pub kind: Kind,
    /// The blob.
    pub digest: String,
    /// The size of the blob, if it is known.
    pub size: Option<u64>,
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// The client whose request did it, if it is known.
    pub client: Option<String>,
    /// Where wrong bytes came from: `origin`, `peer`, `disk` or `client`.
    pub source: Option<String>,
}

/// Changes that are committed together.
pub(crate) enum Change {
    Add {
        record: Record,
        body: Option<Bytes>,
        event: Option<Event>,
    },
    Remove(u64),
    /// Something is about to happen that will be an event.
    Intend(Event),
    /// It has happened, or not.
    Settle {
        intent: u64,
        has_happened: bool,
    },
    Announce(Event),
    /// A sink has delivered all events up to this one.
    Advance {
        sink: String,
        to: u64,
    },
    /// These sinks are in use from now on, and no others.
    Sinks(Vec<String>),
}

/// Called on the journal's thread after the commit, with the sequence number that the change got or is about.
type End = Box<dyn FnOnce(Result<u64, Broken>) + Send>;

/// The journal cannot be written or read.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the outbox's journal: {0}")]
pub(crate) struct Broken(pub String);

fn closed() -> Broken {
    Broken("it is closed".into())
}

impl Broken {
    fn of(error: impl Into<redb::Error>) -> Self {
        Self(error.into().to_string())
    }
}

/// What the journal had when it was opened.
pub(crate) struct Contents {
    pub records: Vec<(u64, Record)>,
    pub intents: Vec<(u64, Event)>,
    pub events: EventRange,
    /// The random number of this journal.
    pub id: u64,
}

/// The events that some sink has not delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EventRange {
    pub count: u64,
    /// The last sequence number, whether its event is still there or not.
    pub last: u64,
}

pub(crate) struct Journal {
    /// `None`: it is being dropped.
    changes: Option<Sender<(Change, End)>>,
    thread: Option<JoinHandle<()>>,
    reader: JournalReader,
    /// The longest wait for a commit.
    timeout: Duration,
}

/// Reads the journal. `None` inside: it is being opened again after a failure.
#[derive(Clone)]
pub(crate) struct JournalReader(Arc<RwLock<Option<Arc<Database>>>>);

impl Journal {
    /// Opens the file, or makes it. Blocks. `timeout`: the longest wait for a commit. `events` is called on the thread when events were added or removed.
    pub(crate) fn open(path: &Path, timeout: Duration, events: impl Fn(EventRange) + Send + 'static) -> io::Result<(Self, Contents)> {
        let database = open(path).map_err(|error| match error {
            redb::Error::Io(error) => error,
            error => io::Error::other(error),
        })?;
        let (contents, next) = prepare(&database).map_err(io::Error::other)?;
        let database = Arc::new(RwLock::new(Some(Arc::new(database))));
        let (changes, queue) = channel(QUEUE);
        let writer = Writer {
            path: path.to_owned(),
            database: database.clone(),
            next,
            failed_at: None,
            range: contents.events,
            events: Box::new(events),
        };
        let thread = thread::Builder::new().name("outbox".into()).spawn(move || writer.run(queue))?;
        Ok((Self { changes: Some(changes), thread: Some(thread), reader: JournalReader(database), timeout }, contents))
    }

    /// Queues a change, and waits until the queue takes it. `end` is called after the commit, or if there is none; not if this future is dropped before.
    pub(crate) async fn write(&self, change: Change, end: impl FnOnce(Result<u64, Broken>) + Send + 'static) {
        let Some(changes) = &self.changes else { return end(Err(closed())) };
        if let Err(SendError((_, end))) = changes.send((change, Box::new(end))).await {
            end(Err(closed()));
        }
    }

    /// Queues a change, if the queue takes it at once.
    pub(crate) fn try_write(&self, change: Change, end: impl FnOnce(Result<u64, Broken>) + Send + 'static) {
        let Some(changes) = &self.changes else { return end(Err(closed())) };
        if let Err(TrySendError::Full((_, end)) | TrySendError::Closed((_, end))) = changes.try_send((change, Box::new(end))) {
            end(Err(Broken("too many changes wait for the disk".into())));
        }
    }

    /// As [`Self::write`], and waits for the commit. After an error it may still come.
    pub(crate) async fn commit(&self, change: Change) -> Result<u64, Broken> {
        let (tell, told) = tokio::sync::oneshot::channel();
        let committed = async {
            self.write(change, move |done| drop(tell.send(done))).await;
            told.await
        };
        match tokio::time::timeout(self.timeout, committed).await {
            Ok(done) => done.unwrap_or_else(|_| Err(closed())),
            Err(_) => Err(Broken("its disk does not answer".into())),
        }
    }

    /// As [`Self::commit`], and blocks.
    pub(crate) fn commit_here(&self, change: Change) -> Result<u64, Broken> {
        let Some(changes) = &self.changes else { return Err(closed()) };
        let (tell, told) = sync_channel(1);
        let mut queued: (Change, End) = (change, Box::new(move |done| drop(tell.send(done))));
        while let Err(TrySendError::Full(again)) = changes.try_send(queued) {
            queued = again;
            thread::sleep(LOOK);
        }
        told.recv().unwrap_or_else(|_| Err(closed()))
    }

    /// For reading.
    pub(crate) fn reader(&self) -> JournalReader {
        self.reader.clone()
    }
}

/// Ends the thread, which closes the file. Blocks for as long as the disk takes.
impl Drop for Journal {
    fn drop(&mut self) {
        self.changes = None;
        if let Some(thread) = self.thread.take().filter(|own| own.thread().id() != thread::current().id()) {
            thread.join().ok();
        }
    }
}

impl JournalReader {
    fn database(&self) -> Result<Arc<Database>, Broken> {
        self.0.read().clone().ok_or_else(|| Broken("it is being opened again after a failure".into()))
    }

    /// The body of a record; `None` if it is gone. Blocks.
    pub(crate) fn body(&self, number: u64) -> Result<Option<Bytes>, Broken> {
        let transaction = self.database()?.begin_read().map_err(Broken::of)?;
        let table = transaction.open_table(BODIES).map_err(Broken::of)?;
        Ok(table.get(number).map_err(Broken::of)?.map(|body| Bytes::copy_from_slice(body.value())))
    }

    /// Up to `most` events after a sequence number. Blocks.
    pub(crate) fn events(&self, after: u64, most: usize) -> Result<Vec<(u64, Event)>, Broken> {
        let transaction = self.database()?.begin_read().map_err(Broken::of)?;
        let table = transaction.open_table(EVENTS).map_err(Broken::of)?;
        let rows = table.range(after + 1..).map_err(Broken::of)?.take(most);
        rows.map(|row| {
            let (number, event) = row.map_err(Broken::of)?;
            Ok((number.value(), decode(event.value())?))
        })
        .collect()
    }

    /// How far a sink has come; `None` if it is new. Blocks.
    pub(crate) fn cursor(&self, sink: &str) -> Result<Option<u64>, Broken> {
        let transaction = self.database()?.begin_read().map_err(Broken::of)?;
        let table = transaction.open_table(CURSORS).map_err(Broken::of)?;
        Ok(table.get(sink).map_err(Broken::of)?.map(|cursor| cursor.value()))
    }
}

fn open(path: &Path) -> Result<Database, redb::Error> {
    Ok(redb::Builder::new().set_cache_size(CACHE).create(path)?)
}

fn decode<T: DeserializeOwned>(row: &[u8]) -> Result<T, Broken> {
    serde_json::from_slice(row).map_err(|error| Broken(format!("a row cannot be read: {error}")))
}

fn encode(row: &impl Serialize) -> Vec<u8> {
    // These types have nothing that cannot be JSON.
    serde_json::to_vec(row).unwrap_or_default()
}

/// Makes the tables, and reads what is in them. Also returns the next sequence number.
fn prepare(database: &Database) -> Result<(Contents, u64), redb::Error> {
    let transaction = database.begin_write()?;
    let (contents, next);
    {
        let (records, intents) = (transaction.open_table(RECORDS)?, transaction.open_table(INTENTS)?);
        let (events, mut numbers) = (transaction.open_table(EVENTS)?, transaction.open_table(NUMBERS)?);
        transaction.open_table(BODIES)?;
        transaction.open_table(CURSORS)?;
        next = numbers.get(NEXT)?.map_or(1, |next| next.value());
        let known = numbers.get(ID)?.map(|id| id.value());
        let id = match known {
            Some(id) => id,
            None => {
                let id = rand::random();
                numbers.insert(ID, id)?;
                id
            }
        };
        let unreadable = |broken: Broken| redb::Error::Io(io::Error::new(io::ErrorKind::InvalidData, broken.to_string()));
        let records = records.iter()?.map(|row| {
            row.map_err(redb::Error::from).and_then(|(number, row)| Ok((number.value(), decode(row.value()).map_err(unreadable)?)))
        });
        let records = records.collect::<Result<_, _>>()?;
        let intents = intents.iter()?.map(|row| {
            row.map_err(redb::Error::from).and_then(|(number, row)| Ok((number.value(), decode(row.value()).map_err(unreadable)?)))
        });
        let intents = intents.collect::<Result<_, _>>()?;
        contents =
            Contents { records, intents, events: EventRange { count: redb::ReadableTableMetadata::len(&events)?, last: next - 1 }, id };
    }
    transaction.commit()?;
    Ok((contents, next))
}

struct Writer {
    path: PathBuf,
    database: Arc<RwLock<Option<Arc<Database>>>>,
    /// The next sequence number, after the last commit.
    next: u64,
    failed_at: Option<Instant>,
    range: EventRange,
    events: Box<dyn Fn(EventRange) + Send>,
}

impl Writer {
    /// Writes until the journal is dropped.
    fn run(mut self, mut queue: Receiver<(Change, End)>) {
        while let Some(first) = queue.blocking_recv() {
            let mut batch = vec![first];
            let mut bytes = size(&batch[0].0);
            while bytes < BATCH
                && let Ok(more) = queue.try_recv()
            {
                bytes += size(&more.0);
                batch.push(more);
            }
            let (changes, ends): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
            match self.write(&changes) {
                Ok(numbers) => ends.into_iter().zip(numbers).for_each(|(end, number)| end(Ok(number))),
                Err(broken) => ends.into_iter().for_each(|end| end(Err(broken.clone()))),
            }
        }
    }

    fn write(&mut self, changes: &[Change]) -> Result<Vec<u64>, Broken> {
        let database = self.database()?;
        let (mut next, mut range) = (self.next, self.range);
        let written = (|| {
            let transaction = database.begin_write()?;
            let mut numbers = Vec::with_capacity(changes.len());
            for change in changes {
                numbers.push(apply(change, &transaction, &mut next, &mut range)?);
            }
            transaction.open_table(NUMBERS)?.insert(NEXT, next)?;
            transaction.commit()?;
            Ok::<_, redb::Error>(numbers)
        })();
        match written {
            Ok(numbers) => {
                if self.failed_at.take().is_some() {
                    tracing::info!("the outbox can be written again");
                }
                self.next = next;
                if range != self.range {
                    self.range = range;
                    (self.events)(range);
                }
                Ok(numbers)
            }
            Err(error) => {
                if self.failed_at.is_none() {
                    tracing::error!(%error, path = %self.path.display(), "the outbox cannot be written; until it can, uploads get 507");
                }
                self.failed_at = Some(Instant::now());
                *self.database.write() = None;
                Err(Broken::of(error))
            }
        }
    }

    /// The database; opened again after a failure.
    fn database(&mut self) -> Result<Arc<Database>, Broken> {
        if let Some(database) = self.database.read().clone() {
            return Ok(database);
        }
        if self.failed_at.is_some_and(|at| at.elapsed() < REOPEN) {
            return Err(Broken("it could not be written a moment ago".into()));
        }
        let opened = open(&self.path).and_then(|database| {
            forget_from(&database, self.next)?;
            Ok(Arc::new(database))
        });
        match opened {
            Ok(database) => {
                *self.database.write() = Some(database.clone());
                Ok(database)
            }
            Err(error) => {
                self.failed_at = Some(Instant::now());
                Err(Broken::of(error))
            }
        }
    }
}

/// Removes what has this sequence number or a later one.
fn forget_from(database: &Database, next: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for table in [RECORDS, BODIES, EVENTS, INTENTS] {
        transaction.open_table(table)?.retain_in(next.., |_, _| false)?;
    }
    transaction.open_table(NUMBERS)?.insert(NEXT, next)?;
    transaction.commit()?;
    Ok(())
}

fn size(change: &Change) -> usize {
    if let Change::Add { body: Some(body), .. } = change { body.len() } else { 0 }
}

fn apply(change: &Change, transaction: &WriteTransaction, next: &mut u64, range: &mut EventRange) -> Result<u64, redb::Error> {
    let mut number = || {
        let number = *next;
        *next += 1;
        number
    };
    let mut add_event = |number: u64, event: &Event| {
        transaction.open_table(EVENTS)?.insert(number, &*encode(event))?;
        *range = EventRange { count: range.count + 1, last: number };
        Ok::<_, redb::Error>(())
    };
    Ok(match change {
        Change::Add { record, body, event } => {
            let number = number();
            transaction.open_table(RECORDS)?.insert(number, &*encode(record))?;
            if let Some(body) = body {
                transaction.open_table(BODIES)?.insert(number, &**body)?;
            }
            if let Some(event) = event {
                add_event(number, event)?;
            }
            number
        }
        Change::Remove(number) => {
            transaction.open_table(RECORDS)?.remove(number)?;
            transaction.open_table(BODIES)?.remove(number)?;
            *number
        }
        Change::Intend(event) => {
            let number = number();
            transaction.open_table(INTENTS)?.insert(number, &*encode(event))?;
            number
        }
        Change::Settle { intent, has_happened } => {
            let event = transaction.open_table(INTENTS)?.remove(intent)?.map(|event| event.value().to_vec());
            if let Some(event) = event.filter(|_| *has_happened) {
                // A number of its own: events are in the order in which things have happened, and not in that of the intents.
                let number = number();
                transaction.open_table(EVENTS)?.insert(number, &*event)?;
                *range = EventRange { count: range.count + 1, last: number };
            }
            *intent
        }
        Change::Announce(event) => {
            let number = number();
            add_event(number, event)?;
            number
        }
        Change::Advance { sink, to } => {
            transaction.open_table(CURSORS)?.insert(&**sink, to)?;
            forget_delivered(transaction, range)?;
            *to
        }
        Change::Sinks(names) => {
            {
                let mut cursors = transaction.open_table(CURSORS)?;
                cursors.retain(|name, _| names.iter().any(|known| known == name))?;
                for name in names {
                    let is_new = cursors.get(&**name)?.is_none();
                    if is_new {
                        cursors.insert(&**name, *next - 1)?;
                    }
                }
            }
            forget_delivered(transaction, range)?;
            0
        }
    })
}

/// Removes the events that every sink has delivered.
fn forget_delivered(transaction: &WriteTransaction, range: &mut EventRange) -> Result<(), redb::Error> {
    let cursors = transaction.open_table(CURSORS)?;
    let mut least = None;
    for cursor in cursors.iter()? {
        let cursor = cursor?.1.value();
        least = Some(least.map_or(cursor, |least: u64| least.min(cursor)));
    }
    let mut events = transaction.open_table(EVENTS)?;
    match least {
        Some(least) => events.retain_in(..=least, |_, _| false)?,
        None => events.retain(|_, _| false)?,
    }
    range.count = redb::ReadableTableMetadata::len(&events)?;
    Ok(())
}
