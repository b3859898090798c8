//! The store of entries: bytes under a key that the client chooses. The last PUT wins. No HTTP.
//!
//! ```text
//! <root>/entries/ac/ab/<hash of name>                         an entry of the action cache
//! <root>/entries/kv/ab/<hash of collection>/<hash of name>    any other entry, in the directory of its collection
//! <root>/entries/kv/ab/<hash of collection>/<hash>.collection a marker: this collection has a collection of that name
//! ```
//!
//! File names are hashes of names. So a name can have any length and any characters, upper and lower case differ, and no name can leave the
//! directory. The file has the name itself after the bytes, which makes it possible to list a collection.
//!
//! A PUT does these steps in order:
//!
//! 1. Write the bytes and the trailer to a temporary file, and sync it.
//! 2. Make the collections above the entry, from the root down. For each, make and sync its marker, then its directory. So every collection can
//!    be reached from the root.
//! 3. Rename the file to the entry's name. So a reader gets all bytes of one version.
//! 4. Sync the directory, and acknowledge.
//!
//! Collections are never removed.
//!
//! All functions block. Call them off the async threads.

use crate::{
    service::Condition,
    store::{Fault, Reader, TempFile},
};
use bytes::Bytes;
use castier_blob::{Digest, Verifier};
use castier_wire::entry::Name;
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use std::{
    collections::HashSet,
    fs::{self, File, Metadata, ReadDir},
    io::{self, ErrorKind, Write as _},
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};
use tempfile::NamedTempFile;

/// The number of locks, and of directories at the first level: one for each value of a byte.
const FAN_OUT: usize = 256;
/// How many directories are remembered as durable, in about 4 MiB. When there are more, all are forgotten; each costs a sync or two when it is used
/// again.
const MOST_DURABLE: usize = 65_536;
/// The last bytes of a file.
const MAGIC: [u8; 8] = *b"CASTENT1";
/// The length of the name, the size, the digest in text, the magic.
const FIXED: usize = 2 + 8 + Digest::TEXT_LEN + 8;
/// The longest trailer. A name has about 2 KiB at most.
const LONGEST: u64 = 4096;

/// The entries of a store, owned by this process while it holds the store's lock.
pub(crate) struct Entries {
    root: PathBuf,
    tmp: PathBuf,
    quarantine: PathBuf,
    /// One lock for each first byte of a name's hash. It serialises renames and removals, so that a PUT knows exactly whether an entry existed. It is
    /// never held while bytes are written.
    locks: Box<[Mutex<()>]>,
    /// Directories whose names are durable, together with those of all directories above. Empty at each start: an earlier run may have made a directory
    /// and been killed before it synced it.
    durable: Mutex<HashSet<Digest>>,
}

/// The end of an entry's file, after its bytes: `name, length of name, size, digest, magic`.
struct Trailer {
    name: String,
    size: u64,
    digest: Digest,
}

/// One version of an entry, opened for reading. A later PUT does not change it.
pub(crate) struct Found {
    entries: Arc<Entries>,
    name: Name,
    file: File,
    trailer: Trailer,
    modified: SystemTime,
}

/// An entry or a collection, as a list shows it.
pub(crate) struct Member {
    pub(crate) name: Name,
    /// Size, and digest if it is known; a collection has none.
    pub(crate) content: Option<(u64, Option<Digest>)>,
    pub(crate) modified: SystemTime,
}

/// The result of a PUT.
pub(crate) enum Put {
    /// There was no entry of this name.
    Created(Digest),
    /// It has replaced another version.
    Replaced(Digest),
    /// The condition did not hold, and nothing changed.
    Refused,
}

/// The result of a DELETE.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delete {
    /// The entry was removed.
    Done,
    Absent,
    /// The condition did not hold, and nothing changed.
    Refused,
}

/// The file at a path.
enum At {
    Nothing,
    File(File, Metadata),
    /// A directory, a link or another thing that the store never makes.
    Foreign,
}

impl Entries {
    /// The entries below the store's `root`, whose lock this process holds.
    ///
    /// # Errors
    /// Directories cannot be made or synced.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let own = root.join("entries");
        for dir in [&own, &own.join("ac"), &own.join("kv")] {
            make_dir(dir)?;
        }
        sync_dir(&own)?;
        sync_dir(root)?;
        Ok(Self::for_reading(root))
    }

    /// The entries below `root`, whose lock another process may hold. Only [`Self::name_at`] and [`Self::read_untouched`] are allowed.
    pub(crate) fn for_reading(root: &Path) -> Self {
        Self {
            root: root.join("entries"),
            tmp: root.join("tmp"),
            quarantine: root.join("quarantine"),
            locks: (0..FAN_OUT).map(|_| Mutex::new(())).collect(),
            durable: Mutex::default(),
        }
    }

    /// The name of the entry whose file this is; `None` if the file is no complete entry.
    pub(crate) fn name_at(&self, path: &Path) -> io::Result<Option<Name>> {
        let (file, metadata) = match look(path)? {
            At::Nothing => return Err(ErrorKind::NotFound.into()),
            At::File(file, metadata) => (file, metadata),
            At::Foreign => return Ok(None),
        };
        let trailer = Trailer::read(&file, metadata.len())?;
        Ok(trailer.and_then(|trailer| Name::from_stored(&trailer.name)).filter(|name| self.path(name) == path))
    }

    /// Digest and bytes of an entry of at most `most` bytes; `None` if it does not exist. Leaves a damaged one where it is.
    pub(crate) fn read_untouched(&self, name: &Name, most: u64) -> Result<Option<(Digest, Bytes)>, Fault> {
        let damaged = || Fault::RottenEntry { name: name.to_string(), found: false };
        let (file, metadata) = match look(&self.path(name))? {
            At::Nothing => return Ok(None),
            At::File(file, metadata) => (file, metadata),
            At::Foreign => return Err(damaged()),
        };
        let trailer = Trailer::read(&file, metadata.len())?.filter(|trailer| trailer.name == name.as_str()).ok_or_else(damaged)?;
        if trailer.size > most {
            return Err(Fault::Io(io::Error::other(format!("{} bytes, over limits.max_entry", trailer.size))));
        }
        let mut bytes = vec![0; usize::try_from(trailer.size).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, 0)?;
        let mut verifier = Verifier::of(trailer.digest, ());
        verifier.update(&bytes);
        verifier.finish()?;
        Ok(Some((trailer.digest, bytes.into())))
    }

    /// Opens an entry; `None` if it does not exist.
    pub(crate) fn find(self: &Arc<Self>, name: &Name) -> Result<Option<Found>, Fault> {
        let (file, metadata) = match look(&self.path(name))? {
            At::Nothing => return Ok(None),
            At::File(file, metadata) => (file, metadata),
            At::Foreign => return Err(self.rotten(name, None)),
        };
        match Trailer::read(&file, metadata.len())? {
            Some(trailer) if trailer.name == name.as_str() => {
                Ok(Some(Found { entries: Arc::clone(self), name: name.clone(), file, trailer, modified: metadata.modified()? }))
            }
            _ => Err(self.rotten(name, Some(&file))),
        }
    }

    /// Begins a PUT. An [`Upload`] that is dropped before [`Upload::finish`] leaves no file.
    pub(crate) fn begin(self: &Arc<Self>, name: Name) -> Result<Upload, Fault> {
        let temp = tempfile::Builder::new().prefix("entry-").permissions(fs::Permissions::from_mode(0o644)).tempfile_in(&self.tmp)?;
        Ok(Upload { entries: Arc::clone(self), name, verifier: Verifier::any(TempFile(temp)) })
    }

    /// Removes an entry.
    pub(crate) fn remove(&self, name: &Name, condition: Option<Condition>) -> Result<Delete, Fault> {
        let path = self.path(name);
        {
            let _order = self.lock(name);
            if let Some(condition) = condition
                && !condition(self.digest_at(&path)?.as_ref())
            {
                return Ok(Delete::Refused);
            }
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(e) if is_absent(&e) => return Ok(Delete::Absent),
                Err(e) => return Err(e.into()),
            }
        }
        path.parent().map_or(Ok(()), sync_dir)?;
        Ok(Delete::Done)
    }

    /// A collection as a list shows it; `None` if it does not exist. The root always exists.
    pub(crate) fn collection(&self, name: &Name) -> Result<Option<Member>, Fault> {
        let modified = match fs::symlink_metadata(self.dir(name)) {
            Ok(metadata) if metadata.is_dir() => metadata.modified()?,
            Ok(_) => return Ok(None),
            Err(e) if is_absent(&e) && *name == Name::root() => fs::metadata(&self.root)?.modified()?,
            Err(e) if is_absent(&e) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        Ok(Some(Member { name: name.clone(), content: None, modified }))
    }

    /// The members of a collection, in no order. A member that is added or removed meanwhile may be among them or not.
    pub(crate) fn members(self: &Arc<Self>, collection: &Name) -> Result<Members, Fault> {
        let dir = match fs::read_dir(self.dir(collection)) {
            Ok(dir) => Some(dir),
            Err(e) if is_absent(&e) => None,
            Err(e) => return Err(e.into()),
        };
        Ok(Members { entries: Arc::clone(self), collection: collection.clone(), dir })
    }

    /// Makes a collection, and those above it. Returns false if it existed.
    pub(crate) fn make_collection(&self, name: &Name) -> Result<bool, Fault> {
        let mut chain = vec![name.clone()];
        while let Some(parent) = chain.last().and_then(Name::parent) {
            chain.push(parent);
        }
        let mut new = false;
        for collection in chain.iter().rev() {
            new = self.make_one(collection)?;
        }
        Ok(new)
    }

    /// Makes a collection whose parent exists and is durable.
    fn make_one(&self, collection: &Name) -> Result<bool, Fault> {
        let id = collection.hash();
        if self.durable.lock().contains(&id) {
            return Ok(false);
        }
        // The marker comes first. Otherwise a crash could leave a collection with entries that no list shows.
        if collection.parent().is_some() {
            let marker = self.path(collection);
            if matches!(look(&marker)?, At::Nothing) {
                let temp = Trailer::of(collection, 0, Digest::of(b"")).append_to(NamedTempFile::new_in(&self.tmp)?)?;
                temp.persist(&marker).map_err(|e| e.error)?;
            }
            marker.parent().map_or(Ok(()), sync_dir)?;
        }
        let dir = self.dir(collection);
        dir.parent().map_or(Ok(()), fs::create_dir_all)?;
        let new = make_dir(&dir)?;
        for above in dir.ancestors().skip(1).take(2) {
            sync_dir(above)?;
        }
        self.remember(id);
        Ok(new)
    }

    /// Makes the directory of an entry.
    fn make_dir_of(&self, name: &Name) -> Result<(), Fault> {
        if let Some(collection) = name.parent() {
            return self.make_collection(&collection).map(drop);
        }
        let dir = self.path(name);
        let Some(dir) = dir.parent() else { return Ok(()) };
        let id = Digest::of(dir.as_os_str().as_encoded_bytes());
        if !self.durable.lock().contains(&id) {
            fs::create_dir_all(dir)?;
            dir.parent().map_or(Ok(()), sync_dir)?;
            self.remember(id);
        }
        Ok(())
    }

    fn remember(&self, id: Digest) {
        let mut durable = self.durable.lock();
        if durable.len() >= MOST_DURABLE {
            durable.clear();
        }
        durable.insert(id);
    }

    /// Renames a synced file to the entry's name, if the condition holds.
    fn place(&self, name: &Name, digest: Digest, mut temp: NamedTempFile, mut condition: Option<Condition>) -> Result<Put, Fault> {
        let path = self.path(name);
        let mut again = true;
        let existed = loop {
            match self.make_dir_of(name) {
                Err(Fault::Io(e)) if is_absent(&e) && again => {
                    again = false;
                    self.durable.lock().clear();
                    continue;
                }
                made => made?,
            }
            let order = self.lock(name);
            if let Some(condition) = condition.take()
                && !condition(self.digest_at(&path)?.as_ref())
            {
                return Ok(Put::Refused);
            }
            let existed = match look(&path)? {
                At::Nothing => false,
                At::File(..) => true,
                At::Foreign => {
                    drop(order);
                    self.set_aside(name, None)?;
                    continue;
                }
            };
            match temp.persist(&path) {
                Ok(_) => break existed,
                // Something else removed directories of the store. So forget which ones are durable, and try once more.
                Err(e) if is_absent(&e.error) && again => {
                    again = false;
                    self.durable.lock().clear();
                    temp = e.file;
                }
                Err(e) => return Err(e.error.into()),
            }
        };
        path.parent().map_or(Ok(()), sync_dir)?;
        Ok(if existed { Put::Replaced(digest) } else { Put::Created(digest) })
    }

    /// The digest of the version at a path; `None` if there is none, or if it is damaged.
    fn digest_at(&self, path: &Path) -> Result<Option<Digest>, Fault> {
        Ok(match look(path)? {
            At::File(file, metadata) => Trailer::read(&file, metadata.len())?.map(|trailer| trailer.digest),
            At::Nothing | At::Foreign => None,
        })
    }

    /// The fault for a damaged entry. Moves it to the quarantine, so that the next GET gets a 404, and the next PUT stores it again.
    pub(crate) fn rotten(&self, name: &Name, file: Option<&File>) -> Fault {
        let found = self.set_aside(name, file).unwrap_or_else(|error| {
            tracing::error!(entry = %name, %error, "a damaged entry could not be moved to the quarantine; remove it by hand");
            true
        });
        Fault::RottenEntry { name: name.to_string(), found }
    }

    /// Moves the file at an entry's path to the quarantine. Returns false if there is none, or if it is no longer the same file as `file`.
    fn set_aside(&self, name: &Name, file: Option<&File>) -> io::Result<bool> {
        let path = self.path(name);
        let _order = self.lock(name);
        let there = match fs::symlink_metadata(&path) {
            Ok(there) => there,
            Err(e) if is_absent(&e) => return Ok(false),
            Err(e) => return Err(e),
        };
        let same = match file.map(File::metadata).transpose()? {
            Some(read) => (there.dev(), there.ino()) == (read.dev(), read.ino()),
            None => !there.is_file(),
        };
        if same {
            // A rename cannot replace a directory by a file, or a file by a directory. Hence the two names.
            let kind = if there.is_dir() { "directory" } else { "entry" };
            let to = self.quarantine.join(format!("{kind}-{}", name.hash()));
            if there.is_dir() && to.exists() {
                fs::remove_dir_all(&to)?;
            }
            fs::rename(&path, to)?;
        }
        Ok(same)
    }

    fn lock(&self, name: &Name) -> parking_lot::MutexGuard<'_, ()> {
        let [first, ..] = *name.hash().as_bytes();
        self.locks[usize::from(first)].lock()
    }

    /// The file of an entry, or the marker of a collection.
    fn path(&self, name: &Name) -> PathBuf {
        let hash = name.hash();
        match name.parent() {
            // Operators may delete old entries by their names. The suffix keeps them from deleting markers.
            Some(collection) if name.is_collection() => self.dir(&collection).join(format!("{hash}.collection")),
            Some(collection) => self.dir(&collection).join(hash.to_string()),
            None => self.root.join(format!("ac/{:02x}/{hash}", hash.as_bytes()[0])),
        }
    }

    /// The directory of a collection.
    fn dir(&self, collection: &Name) -> PathBuf {
        let hash = collection.hash();
        self.root.join(format!("kv/{:02x}/{hash}", hash.as_bytes()[0]))
    }
}

impl Found {
    pub(crate) const fn size(&self) -> u64 {
        self.trailer.size
    }

    pub(crate) const fn digest(&self) -> Digest {
        self.trailer.digest
    }

    pub(crate) fn member(&self) -> Member {
        Member { name: self.name.clone(), content: Some((self.trailer.size, Some(self.trailer.digest))), modified: self.modified }
    }

    /// Reads the bytes in `range`, which must be within the entry.
    pub(crate) fn read(self, range: Range<u64>) -> Reader {
        Reader::of_entry(self.entries, self.name, self.file, self.trailer.digest, self.trailer.size, range)
    }

    /// Reads all bytes, and keeps the file open.
    pub(crate) fn read_all(&self) -> Result<bytes::Bytes, Fault> {
        let (file, size) = (self.file.try_clone()?, self.trailer.size);
        let mut reader = Reader::of_entry(Arc::clone(&self.entries), self.name.clone(), file, self.trailer.digest, size, 0..size);
        reader.next(usize::try_from(size).unwrap_or(usize::MAX))
    }
}

/// A PUT in progress: a file in `tmp/`, which is deleted on drop.
pub(crate) struct Upload {
    entries: Arc<Entries>,
    name: Name,
    verifier: Verifier<TempFile>,
}

impl Upload {
    /// Writes the next bytes.
    pub(crate) fn write(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        Ok(self.verifier.write(bytes)?)
    }

    /// Makes the bytes durable under their name, if the condition holds.
    pub(crate) fn finish(self, condition: Option<Condition>) -> Result<Put, Fault> {
        let bytes = self.verifier.finish()?;
        let digest = bytes.digest();
        let temp = Trailer::of(&self.name, bytes.size(), digest).append_to(bytes.into_content())?;
        self.entries.place(&self.name, digest, temp, condition)
    }
}

/// Iterates over a collection.
pub(crate) struct Members {
    entries: Arc<Entries>,
    collection: Name,
    dir: Option<ReadDir>,
}

impl Members {
    /// The member that a file represents; `None` if it represents none, or was removed meanwhile.
    fn member(&self, path: &Path) -> io::Result<Option<Member>> {
        let At::File(file, metadata) = look(path)? else { return Ok(None) };
        let Some(trailer) = Trailer::read(&file, metadata.len())? else { return Ok(None) };
        let Some(name) = Name::from_stored(&trailer.name).filter(|name| name.parent().as_ref() == Some(&self.collection)) else {
            return Ok(None);
        };
        if name.is_collection() {
            return self.entries.collection(&name).map_err(|fault| io::Error::other(fault.to_string()));
        }
        Ok(Some(Member { name, content: Some((trailer.size, Some(trailer.digest))), modified: metadata.modified()? }))
    }
}

impl Iterator for Members {
    type Item = io::Result<Member>;

    fn next(&mut self) -> Option<io::Result<Member>> {
        loop {
            let entry = match self.dir.as_mut()?.next()? {
                Ok(entry) => entry,
                Err(error) => return Some(Err(error)),
            };
            match self.member(&entry.path()) {
                Ok(None) => {}
                Ok(Some(member)) => return Some(Ok(member)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Trailer {
    fn of(name: &Name, size: u64, digest: Digest) -> Self {
        Self { name: name.as_str().to_owned(), size, digest }
    }

    /// Writes the trailer after the bytes, and syncs the whole file.
    fn append_to(&self, mut file: NamedTempFile) -> Result<NamedTempFile, Fault> {
        let length = u16::try_from(self.name.len()).map_err(|e| Fault::Io(io::Error::other(e)))?;
        let mut tail = self.name.as_bytes().to_vec();
        tail.extend_from_slice(&length.to_le_bytes());
        tail.extend_from_slice(&self.size.to_le_bytes());
        tail.extend_from_slice(self.digest.to_string().as_bytes());
        tail.extend_from_slice(&MAGIC);
        file.write_all(&tail)?;
        file.as_file().sync_all()?;
        Ok(file)
    }

    /// Reads the trailer of a file of `len` bytes; `None` if the file is no complete entry.
    fn read(file: &File, len: u64) -> io::Result<Option<Self>> {
        let tail_len = len.min(LONGEST);
        let mut tail = vec![0; usize::try_from(tail_len).unwrap_or_default()];
        match file.read_exact_at(&mut tail, len - tail_len) {
            Ok(()) => Ok(Self::parse(&tail, len)),
            // The file has been truncated since it was opened.
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn parse(tail: &[u8], len: u64) -> Option<Self> {
        let (rest, fixed) = tail.split_at_checked(tail.len().checked_sub(FIXED)?)?;
        let (length, fixed) = fixed.split_first_chunk::<2>()?;
        let (size, fixed) = fixed.split_first_chunk::<8>()?;
        let (digest, magic) = fixed.split_at_checked(Digest::TEXT_LEN)?;
        let (length, size) = (u16::from_le_bytes(*length), u64::from_le_bytes(*size));
        let (_, name) = rest.split_at_checked(rest.len().checked_sub(usize::from(length))?)?;
        let whole = magic == MAGIC && size.checked_add(u64::from(length) + FIXED as u64) == Some(len);
        whole.then(|| Some(Self { name: str::from_utf8(name).ok()?.to_owned(), size, digest: Digest::parse(digest).ok()? }))?
    }
}

/// Opens the file at a path. Does not block on a FIFO.
fn look(path: &Path) -> io::Result<At> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NXIO) => return Ok(At::Foreign),
        Err(e) if is_absent(&e.into()) => return Ok(At::Nothing),
        Err(e) => return Err(e.into()),
    };
    let metadata = file.metadata()?;
    Ok(if metadata.is_file() { At::File(file, metadata) } else { At::Foreign })
}

/// Makes a directory. Returns false if it existed.
fn make_dir(dir: &Path) -> io::Result<bool> {
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes renames, creations and removals in a directory durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}
