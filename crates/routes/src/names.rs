//! The name table: which body a name has, what else came with it, and when. In memory, and in a file that survives restarts and `kill -9`.
//!
//! The table in memory answers. It is bounded in bytes, and drops what was used longest ago. A thread writes what changes into the file, in one
//! transaction for everything that has gathered meanwhile. So no request waits for the disk. A crash of the machine can cost the last changes, and never
//! the file ([redb](https://www.redb.org) commits by shadow pages, after LMDB).

use castier_blob::Digest;
use moka::{policy::EvictionPolicy, sync::Cache};
use parking_lot::{Condvar, Mutex};
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What is known of one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The route, for purges and for people.
    pub route: String,
    /// The canonical path, for purges and for people.
    pub path: String,
    /// The status of the upstream's answer: 200, or 404 and 410 for what is absent.
    pub status: u16,
    /// The SHA-256 of the body, as text, and its size; none without a body.
    pub body: Option<(String, u64)>,
    /// The kept headers of the answer, with names in lower case.
    pub headers: Vec<(String, String)>,
    /// When the upstream said so last, in seconds since 1970.
    pub fetched_at: u64,
}

impl Entry {
    /// How many bytes of the table's bound it takes.
    fn cost(&self) -> u32 {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len() + HEADER_COST).sum();
        u32::try_from(ENTRY_COST + self.route.len() + self.path.len() + headers).unwrap_or(u32::MAX)
    }
}

/// What an entry costs beside its texts: itself, its body's digest, moka's bookkeeping (some 350 bytes), and allocations.
const ENTRY_COST: usize = 640;
/// What a header costs beside its texts.
const HEADER_COST: usize = 64;
/// How many changes may wait for the disk. If it hangs and more gather, the file is written anew from memory once it answers: some 10 MiB at most.
const MAX_PENDING: usize = 100_000;

/// How long to wait after a failed transaction.
const RETRY: Duration = Duration::from_secs(1);

const TABLE: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("names-1");

/// The name table.
pub struct Names {
    memory: Cache<Digest, Arc<Entry>>,
    file: Option<NameFile>,
    /// Held during each change, so that memory and file see the changes of a name in the same order.
    order: Mutex<()>,
}

/// What waits to be written into the file.
#[derive(Default)]
struct Pending {
    /// The last change of each name; none if it is gone.
    changes: HashMap<Digest, Option<Arc<Entry>>>,
    /// Too much had gathered. The file must become what the memory has.
    all: bool,
    /// The thread is writing.
    busy: bool,
    closing: bool,
    /// The last transaction failed. The next one is not before this.
    retry_at: Option<Instant>,
    /// Transactions that failed, since the start.
    failed: u64,
}

struct NameFile {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    pending: Mutex<Pending>,
    /// Told after each change of `pending`.
    changed: Condvar,
}

impl Queue {
    /// Waits for something to write: changes, or none of them if the file must become what the memory has. `None`: the table closes.
    fn take(&self) -> Option<Option<HashMap<Digest, Option<Arc<Entry>>>>> {
        let mut pending = self.pending.lock();
        loop {
            match pending.retry_at {
                _ if pending.changes.is_empty() && !pending.all => {
                    if pending.closing {
                        return None;
                    }
                    self.changed.wait(&mut pending);
                }
                Some(at) if at > Instant::now() && !pending.closing => {
                    self.changed.wait_until(&mut pending, at);
                }
                _ => break,
            }
        }
        pending.busy = true;
        let changes = std::mem::take(&mut pending.changes);
        Some((!std::mem::take(&mut pending.all)).then_some(changes))
    }

    /// What was taken is written, or was not because of this error. False if the table closes.
    fn wrote(&self, error: Option<&io::Error>) -> bool {
        let mut pending = self.pending.lock();
        pending.busy = false;
        match error {
            Some(error) => {
                if pending.retry_at.is_none() {
                    tracing::warn!(%error, "the name table cannot be written; until it can, names that come are in memory only");
                }
                (pending.changes, pending.all) = (HashMap::new(), true);
                pending.failed += 1;
                pending.retry_at = Some(Instant::now() + RETRY);
            }
            None if pending.retry_at.take().is_some() => tracing::info!("the name table is written again"),
            None => {}
        }
        let goes_on = !pending.closing;
        drop(pending);
        self.changed.notify_all();
        goes_on
    }

    fn add(&self, name: Digest, entry: Option<Arc<Entry>>) {
        let mut pending = self.pending.lock();
        if !pending.all {
            pending.changes.insert(name, entry);
            if pending.changes.len() > MAX_PENDING {
                pending.changes = HashMap::new();
                pending.all = true;
            }
        }
        drop(pending);
        self.changed.notify_all();
    }
}

impl Names {
    /// A table that is in memory only and is gone with the process. `capacity`: bytes.
    pub fn in_memory(capacity: u64) -> Self {
        Self { memory: memory(capacity, None), file: None, order: Mutex::default() }
    }

    /// A table that is also in the file at `path`, with what the file has. `capacity`: bytes. Blocks. A damaged file is moved to `<path>.damaged`, and
    /// the table is empty.
    ///
    /// # Errors
    /// The file cannot be opened or created, or another process has it.
    pub fn open(path: &Path, capacity: u64) -> io::Result<Self> {
        let path = path.to_owned();
        let open = move || open_database(&path);
        Self::over(open()?, capacity, open)
    }

    /// The table with the file `database`, which `open` opens again after a failure.
    fn over(database: Database, capacity: u64, open: impl Fn() -> io::Result<Database> + Send + 'static) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let memory = memory(capacity, Some(queue.clone()));
        let unreadable = fill(&memory, &database).map_err(io::Error::other)?;
        unreadable.into_iter().for_each(|name| queue.add(name, None));
        let thread = thread::Builder::new().name("names".into()).spawn({
            let (queue, memory) = (queue.clone(), memory.clone());
            move || write(&queue, &memory, database, open)
        })?;
        Ok(Self { memory, file: Some(NameFile { queue, thread: Some(thread) }), order: Mutex::default() })
    }

    /// What is known of a name.
    pub fn get(&self, name: &Digest) -> Option<Arc<Entry>> {
        self.memory.get(name)
    }

    /// Remembers what is known of a name from now on.
    pub fn set(&self, name: Digest, entry: Entry) {
        let entry = Arc::new(entry);
        let _order = self.order.lock();
        // The file first: the memory may drop the entry at once, and that must be the later change.
        self.queue(name, Some(entry.clone()));
        self.memory.insert(name, entry);
    }

    /// Forgets a name; false if it was not known.
    pub fn remove(&self, name: &Digest) -> bool {
        let _order = self.order.lock();
        self.queue(*name, None);
        self.memory.remove(name).is_some()
    }

    /// Forgets all names that `which` chooses. Returns how many.
    pub fn remove_where(&self, which: impl Fn(&Entry) -> bool) -> usize {
        let chosen: Vec<_> = self.memory.iter().filter(|(_, entry)| which(entry)).map(|(name, _)| *name).collect();
        chosen.into_iter().filter(|name| self.remove(name)).count()
    }

    /// How many names are known, and how many bytes of the bound they take.
    pub fn size(&self) -> (u64, u64) {
        self.memory.run_pending_tasks();
        (self.memory.entry_count(), self.memory.weighted_size())
    }

    /// How many bytes it may take.
    pub fn capacity(&self) -> u64 {
        self.memory.policy().max_capacity().unwrap_or(0)
    }

    /// How many transactions have failed since the start.
    pub fn failed_writes(&self) -> u64 {
        self.file.as_ref().map_or(0, |file| file.queue.pending.lock().failed)
    }

    /// Waits until the file has everything that was remembered before, for at most `limit`. False if it does not by then.
    pub fn flush(&self, limit: Duration) -> bool {
        let Some(file) = &self.file else { return true };
        // moka tells of evictions in these tasks.
        self.memory.run_pending_tasks();
        let end = Instant::now() + limit;
        let mut pending = file.queue.pending.lock();
        while pending.busy || pending.all || !pending.changes.is_empty() {
            if file.queue.changed.wait_until(&mut pending, end).timed_out() {
                return false;
            }
        }
        true
    }

    fn queue(&self, name: Digest, entry: Option<Arc<Entry>>) {
        if let Some(file) = &self.file {
            file.queue.add(name, entry);
        }
    }
}

/// Ends the thread after it has written what waits. Blocks for as long as the disk takes; call [`Names::flush`] first to bound that.
impl Drop for NameFile {
    fn drop(&mut self) {
        self.queue.pending.lock().closing = true;
        self.queue.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the name table panicked");
        }
    }
}

fn memory(capacity: u64, evicted: Option<Arc<Queue>>) -> Cache<Digest, Arc<Entry>> {
    let builder =
        Cache::builder().max_capacity(capacity).eviction_policy(EvictionPolicy::lru()).weigher(|_, entry: &Arc<Entry>| entry.cost());
    match evicted {
        None => builder.build(),
        Some(queue) => builder
            .eviction_listener(move |name: Arc<Digest>, _, cause| {
                if cause.was_evicted() {
                    queue.add(*name, None);
                }
            })
            .build(),
    }
}

fn open_database(path: &Path) -> io::Result<Database> {
    // It has names of what only some may read.
    fs::File::options().create(true).append(true).mode(0o600).open(path)?;
    match Database::create(path) {
        Ok(database) => Ok(database),
        Err(DatabaseError::DatabaseAlreadyOpen) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process has the name table open"))
        }
        Err(DatabaseError::Storage(redb::StorageError::Io(error))) if error.kind() != io::ErrorKind::InvalidData => Err(error),
        Err(error) => {
            let mut aside = path.as_os_str().to_owned();
            aside.push(".damaged");
            let aside = PathBuf::from(aside);
            tracing::warn!(path = %path.display(), %error, aside = %aside.display(), "the name table is damaged; it was set aside, and begins empty");
            fs::rename(path, aside)?;
            Database::create(path).map_err(io::Error::other)
        }
    }
}

/// Reads the file into memory. Returns the names whose entries cannot be read: those of another version.
fn fill(memory: &Cache<Digest, Arc<Entry>>, database: &Database) -> Result<Vec<Digest>, redb::Error> {
    let mut unreadable = Vec::new();
    let transaction = database.begin_read()?;
    let table = match transaction.open_table(TABLE) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(unreadable),
        Err(error) => return Err(error.into()),
    };
    for row in table.iter()? {
        let (name, entry) = row?;
        let name = Digest::from_bytes(*name.value());
        match serde_json::from_slice(entry.value()) {
            Ok(entry) => memory.insert(name, Arc::new(entry)),
            Err(_) => unreadable.push(name),
        }
    }
    Ok(unreadable)
}

/// Writes changes until the table closes. After a failure redb wants the file opened anew, and nobody knows what of the transaction is in it: so the file
/// becomes what the memory has, as soon as it can be written again. A name that was removed meanwhile does not come back after a restart.
fn write(queue: &Queue, memory: &Cache<Digest, Arc<Entry>>, database: Database, open: impl Fn() -> io::Result<Database>) {
    let mut database = Some(database);
    while let Some(changes) = queue.take() {
        let written = database.take().map_or_else(&open, Ok).and_then(|database| {
            let written = changes.map_or_else(|| write_all(memory, &database), |changes| write_changes(&changes, &database));
            written.map(|()| database).map_err(io::Error::other)
        });
        let failed = written.is_err();
        let goes_on = queue.wrote(written.as_ref().err());
        database = written.ok();
        if failed && !goes_on {
            return;
        }
    }
}

fn write_changes(changes: &HashMap<Digest, Option<Arc<Entry>>>, database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(TABLE)?;
        for (name, entry) in changes {
            match entry {
                Some(entry) => table.insert(name.as_bytes(), &*encode(entry))?,
                None => table.remove(name.as_bytes())?,
            };
        }
    }
    Ok(transaction.commit()?)
}

fn write_all(memory: &Cache<Digest, Arc<Entry>>, database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.delete_table(TABLE)?;
    {
        let mut table = transaction.open_table(TABLE)?;
        for (name, entry) in memory {
            table.insert(name.as_bytes(), &*encode(&entry))?;
        }
    }
    Ok(transaction.commit()?)
}

/// Texts and numbers always have a JSON form.
fn encode(entry: &Entry) -> Vec<u8> {
    serde_json::to_vec(entry).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        env,
        io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _},
        process::{Command, Stdio},
        sync::atomic::{AtomicBool, Ordering},
    };

    const MIB: u64 = 1 << 20;
    const LONG: Duration = Duration::from_secs(30);

    fn name(number: u64) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    fn entry(number: u64) -> Entry {
        Entry {
            route: if number.is_multiple_of(2) { "oci" } else { "npm" }.into(),
            path: format!("/v2/library/image-{number}/manifests/latest"),
            status: 200,
            body: Some((name(number).to_string(), number)),
            headers: vec![("etag".into(), format!("\"{number}\"")), ("content-type".into(), "text/plain; charset=utf-8".into())],
            fetched_at: 1_790_000_000 + number,
        }
    }

    #[test]
    fn names_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names");
        let names = Names::open(&file, MIB).unwrap();
        for number in 0..100 {
            names.set(name(number), entry(number));
        }
        names.set(name(7), Entry { status: 404, body: None, ..entry(7) });
        assert!(names.remove(&name(3)) && !names.remove(&name(3)) && !names.remove(&name(1000)));
        assert_eq!(names.remove_where(|entry| entry.route == "oci"), 50);
        assert!(Names::open(&file, MIB).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy));
        drop(names);
        let names = Names::open(&file, MIB).unwrap();
        for number in 0..100 {
            let expected = match number {
                3 => None,
                7 => Some(Entry { status: 404, body: None, ..entry(7) }),
                _ => (number % 2 == 1).then(|| entry(number)),
            };
            assert_eq!(names.get(&name(number)).as_deref(), expected.as_ref(), "{number}");
        }
        assert_eq!((names.size().0, names.failed_writes()), (49, 0));
    }

    #[test]
    fn the_bound_holds_in_memory_and_in_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names");
        let names = Names::open(&file, MIB / 4).unwrap();
        for number in 0..20_000 {
            names.set(name(number), entry(number));
            // In use, so it stays.
            assert!(names.get(&name(0)).is_some(), "{number}");
        }
        assert!(names.flush(LONG));
        let (count, bytes) = names.size();
        assert!(bytes <= MIB / 4 && (100..1000).contains(&count), "{count} names, {bytes} bytes");
        drop(names);
        let names = Names::open(&file, 1024 * MIB).unwrap();
        assert_eq!(names.size().0, count, "what was dropped is not in the file either");
        // redb gives space back lazily; what is free is used again.
        let length = fs::metadata(&file).unwrap().len();
        assert!(length < 16 * MIB, "{length}");
    }

    #[test]
    fn a_table_without_a_file() {
        let names = Names::in_memory(MIB);
        names.set(name(1), entry(1));
        assert_eq!(names.get(&name(1)).as_deref(), Some(&entry(1)));
        assert!(names.flush(Duration::ZERO) && names.remove(&name(1)) && names.get(&name(1)).is_none());
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("names");
        Names::open(&path, MIB).unwrap().set(name(1), entry(1));
        let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&[0x5a; 4096]).unwrap();
        drop(file);
        let names = Names::open(&path, MIB).unwrap();
        assert!(names.get(&name(1)).is_none() && directory.path().join("names.damaged").exists());
        names.set(name(2), entry(2));
        drop(names);
        assert!(Names::open(&path, MIB).unwrap().get(&name(2)).is_some());
        assert!(Names::open(&directory.path().join("missing/names"), MIB).is_err());
    }

    #[test]
    fn more_changes_than_may_wait_are_written_from_memory() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names");
        let names = Names::open(&file, 64 * MIB).unwrap();
        names.set(name(1), entry(1));
        assert!(names.flush(LONG));
        // As if the disk had hung meanwhile.
        let queue = &names.file.as_ref().unwrap().queue;
        let mut pending = queue.pending.lock();
        names.memory.insert(name(2), Arc::new(entry(2)));
        names.memory.remove(&name(1));
        pending.all = true;
        drop(pending);
        queue.changed.notify_all();
        assert!(names.flush(LONG));
        for number in 0..=MAX_PENDING as u64 {
            queue.pending.lock().changes.insert(name(number + 10), None);
        }
        queue.add(name(5), None);
        assert!(names.flush(LONG));
        drop(names);
        let names = Names::open(&file, MIB).unwrap();
        assert_eq!((names.get(&name(1)), names.get(&name(2)).as_deref()), (None, Some(&entry(2))));
    }

    /// A file that can be made to fail.
    #[derive(Clone, Debug, Default)]
    struct Failing {
        bytes: Arc<Mutex<Vec<u8>>>,
        broken: Arc<AtomicBool>,
    }

    impl Failing {
        fn works(&self) -> io::Result<()> {
            if self.broken.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }

        fn open(&self) -> io::Result<Database> {
            Database::builder().create_with_backend(self.clone()).map_err(io::Error::other)
        }
    }

    impl redb::StorageBackend for Failing {
        fn len(&self) -> io::Result<u64> {
            Ok(self.bytes.lock().len() as u64)
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            let offset = offset as usize;
            out.copy_from_slice(&self.bytes.lock()[offset..offset + out.len()]);
            Ok(())
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.works().map(|()| self.bytes.lock().resize(len as usize, 0))
        }

        fn sync_data(&self) -> io::Result<()> {
            self.works()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let offset = offset as usize;
            self.works().map(|()| self.bytes.lock()[offset..offset + data.len()].copy_from_slice(data))
        }
    }

    #[test]
    fn a_disk_that_fails_loses_no_removal() {
        let file = Failing::default();
        let open = |file: Failing| Names::over(file.open().unwrap(), MIB, move || file.open()).unwrap();
        let names = open(file.clone());
        names.set(name(1), entry(1));
        names.set(name(2), entry(2));
        assert!(names.flush(LONG));
        file.broken.store(true, Ordering::SeqCst);
        names.remove(&name(1));
        names.set(name(3), entry(3));
        while names.failed_writes() == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!names.flush(Duration::ZERO) && names.get(&name(1)).is_none(), "the memory answers meanwhile");
        file.broken.store(false, Ordering::SeqCst);
        assert!(names.flush(LONG));
        drop(names);
        let names = open(file.clone());
        assert_eq!([1, 2, 3].map(|number| names.get(&name(number)).is_some()), [false, true, true]);
        // One that never works again does not keep the process from ending.
        file.broken.store(true, Ordering::SeqCst);
        names.set(name(4), entry(4));
        drop(names);
    }

    const CHILD: &str = "CASTIER_TEST_NAMES";

    /// Not a test of its own: the process that `what_was_flushed_survives_kill_9` kills.
    #[test]
    fn child() {
        let Some(file) = env::var_os(CHILD) else { return };
        let names = Names::open(Path::new(&file), 64 * MIB).unwrap();
        for number in 0.. {
            names.set(name(number), entry(number));
            if number % 50 == 0 && names.flush(LONG) {
                println!("flushed {number}");
            }
        }
    }

    #[test]
    fn what_was_flushed_survives_kill_9() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names");
        for _ in 0..3 {
            let mut child = Command::new(env::current_exe().unwrap())
                .args(["names::tests::child", "--exact", "--nocapture"])
                .env(CHILD, &file)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
            let mut flushed = lines.filter_map(|line| line.strip_prefix("flushed ")?.parse::<u64>().ok());
            let last = flushed.nth(20).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            let names = Names::open(&file, 64 * MIB).unwrap();
            for number in 0..=last {
                assert_eq!(names.get(&name(number)).as_deref(), Some(&entry(number)), "{number} of {last}");
            }
        }
    }
}
