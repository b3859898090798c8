//! A file system in memory that loses at a power cut what nobody has synced.
//!
//! POSIX promises no more than this: a file's bytes are durable after an fsync of the file, and a name after an fsync of its directory. At a power cut,
//! each write since then is on the disk, or is not, or is half of it; and of the changes of a directory the first few are. Which ones is left to
//! chance. The model is that of T. S. Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014).

use crate::support::skip;
use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, TimeOrNow,
    WriteFlags,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs,
    io::Write as _,
    mem,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};
use tempfile::TempDir;

/// A disk writes this much, or nothing.
const SECTOR: usize = 512;
const ROOT: u64 = 1;
/// The kernel keeps nothing.
const TTL: Duration = Duration::ZERO;

/// A mounted file system. Dropping it unmounts.
pub(crate) struct LossyFs {
    nodes: Arc<Mutex<Nodes>>,
    /// Unmounts before the directory is deleted.
    _session: BackgroundSession,
    dir: TempDir,
}

impl LossyFs {
    /// Mounts an empty one. Without root or `/dev/fuse` it prints a line and returns `None`.
    pub(crate) fn mount() -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let nodes = Arc::new(Mutex::new(Nodes::new()));
        match fuser::spawn_mount(Mounted(nodes.clone()), dir.path(), &fuser::Config::default()) {
            Ok(session) => Some(Self { nodes, _session: session, dir }),
            Err(error) => {
                skip(&format!("nothing can be mounted through FUSE here: {error}"));
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The power is cut, and comes back. Every process that used the file system must have ended. The same seed loses the same.
    pub(crate) fn cut(&self, seed: u64) {
        lock(&self.nodes).cut(&mut StdRng::seed_from_u64(seed));
    }
}

fn lock(nodes: &Mutex<Nodes>) -> MutexGuard<'_, Nodes> {
    nodes.lock().unwrap()
}

struct Nodes {
    nodes: BTreeMap<u64, Node>,
    next: u64,
}

struct Node {
    mode: u16,
    changed: SystemTime,
    content: Content,
}

enum Content {
    File(File),
    Directory(Directory),
}

/// What there is, what the disk has for sure, and the changes between the two.
struct Kept<T, C> {
    now: T,
    synced: T,
    changes: Vec<C>,
}

type File = Kept<Vec<u8>, Change>;
type Directory = Kept<BTreeMap<OsString, u64>, Names>;

/// A change of a file.
enum Change {
    Write(usize, Vec<u8>),
    Size(usize),
}

/// A change of a directory: names with what they are from now on. All of them, or none.
type Names = Vec<(OsString, Option<u64>)>;

trait Apply<T> {
    fn apply(&self, to: &mut T);
}

impl Apply<Vec<u8>> for Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, new) => {
                let end = at + new.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*at..end].copy_from_slice(new);
            }
            Self::Size(size) => bytes.resize(*size, 0),
        }
    }
}

impl Apply<BTreeMap<OsString, u64>> for Names {
    fn apply(&self, names: &mut BTreeMap<OsString, u64>) {
        for (name, node) in self {
            match node {
                Some(node) => names.insert(name.clone(), *node),
                None => names.remove(name),
            };
        }
    }
}

impl<T: Default, C> Default for Kept<T, C> {
    fn default() -> Self {
        Self { now: T::default(), synced: T::default(), changes: Vec::new() }
    }
}

impl<T: Clone, C: Apply<T>> Kept<T, C> {
    fn change(&mut self, change: C) {
        change.apply(&mut self.now);
        self.changes.push(change);
    }

    fn sync(&mut self) {
        for change in self.changes.drain(..) {
            change.apply(&mut self.synced);
        }
    }

    /// `survive`: what the disk has of the changes.
    fn cut(&mut self, survive: impl FnOnce(Vec<C>) -> Vec<C>) {
        self.changes = survive(mem::take(&mut self.changes));
        self.sync();
        self.now = self.synced.clone();
    }
}

/// Each write of a file by itself: all of it, nothing, or some of its sectors.
fn some_writes(changes: Vec<Change>, chance: &mut StdRng) -> Vec<Change> {
    let mut survivors = Vec::new();
    for change in changes {
        match (chance.random_range(0..4), change) {
            (0, _) => {}
            (1, Change::Write(at, bytes)) => {
                let sectors = bytes.chunks(SECTOR).enumerate().filter(|_| chance.random());
                survivors.extend(sectors.map(|(sector, part)| Change::Write(at + sector * SECTOR, part.to_vec())));
            }
            (_, change) => survivors.push(change),
        }
    }
    survivors
}

impl Nodes {
    fn new() -> Self {
        let root = Node { mode: 0o755, changed: SystemTime::now(), content: Content::Directory(Kept::default()) };
        Self { nodes: BTreeMap::from([(ROOT, root)]), next: ROOT + 1 }
    }

    fn cut(&mut self, chance: &mut StdRng) {
        for node in self.nodes.values_mut() {
            match &mut node.content {
                Content::File(file) => file.cut(|changes| some_writes(changes, chance)),
                Content::Directory(directory) => directory.cut(|mut changes| {
                    changes.truncate(chance.random_range(0..=changes.len()));
                    changes
                }),
            }
        }
        // What has no name any more is gone.
        let mut found = BTreeSet::from([ROOT]);
        let mut new = vec![ROOT];
        while let Some(at) = new.pop() {
            if let Content::Directory(directory) = &self.nodes[&at].content {
                new.extend(directory.now.values().copied().filter(|node| found.insert(*node)));
            }
        }
        self.nodes.retain(|node, _| found.contains(node));
    }

    fn node(&mut self, at: INodeNo) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&at.0).ok_or(Errno::ENOENT)
    }

    fn file(&mut self, at: INodeNo) -> Result<&mut File, Errno> {
        match &mut self.node(at)?.content {
            Content::File(file) => Ok(file),
            Content::Directory(_) => Err(Errno::EISDIR),
        }
    }

    fn directory(&mut self, at: INodeNo) -> Result<&mut Directory, Errno> {
        match &mut self.node(at)?.content {
            Content::Directory(directory) => Ok(directory),
            Content::File(_) => Err(Errno::ENOTDIR),
        }
    }

    fn named(&mut self, parent: INodeNo, name: &OsStr) -> Result<u64, Errno> {
        self.directory(parent)?.now.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn add(&mut self, parent: INodeNo, name: &OsStr, mode: u32, content: Content) -> Result<FileAttr, Errno> {
        if self.named(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let at = self.next;
        self.next += 1;
        self.directory(parent)?.change(vec![(name.to_owned(), Some(at))]);
        self.nodes.insert(at, Node { mode: u16::try_from(mode & 0o7777).unwrap(), changed: SystemTime::now(), content });
        self.attributes(INodeNo(at))
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let at = self.named(parent, name)?;
        if self.directory(INodeNo(at)).is_ok_and(|directory| !directory.now.is_empty()) {
            return Err(Errno::ENOTEMPTY);
        }
        self.directory(parent)?.change(vec![(name.to_owned(), None)]);
        Ok(())
    }

    fn rename(&mut self, (from, name): (INodeNo, &OsStr), (to, new): (INodeNo, &OsStr)) -> Result<(), Errno> {
        let at = self.named(from, name)?;
        let (gone, there) = ((name.to_owned(), None), (new.to_owned(), Some(at)));
        if from == to {
            self.directory(from)?.change(vec![gone, there]);
        } else {
            self.directory(to)?.change(vec![there]);
            self.directory(from)?.change(vec![gone]);
        }
        Ok(())
    }

    fn attributes(&mut self, at: INodeNo) -> Result<FileAttr, Errno> {
        let node = self.node(at)?;
        let (kind, size, nlink) = match &node.content {
            Content::File(file) => (FileType::RegularFile, file.now.len() as u64, 1),
            Content::Directory(_) => (FileType::Directory, 4096, 2),
        };
        let time = node.changed;
        Ok(FileAttr {
            ino: at,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: node.mode,
            nlink,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn write(&mut self, at: INodeNo, offset: u64, bytes: &[u8]) -> Result<u32, Errno> {
        self.file(at)?.change(Change::Write(usize::try_from(offset).unwrap(), bytes.to_vec()));
        self.node(at)?.changed = SystemTime::now();
        Ok(u32::try_from(bytes.len()).unwrap())
    }

    fn read(&mut self, at: INodeNo, offset: u64, size: u32) -> Result<&[u8], Errno> {
        let bytes = &self.file(at)?.now;
        let from = usize::try_from(offset).unwrap().min(bytes.len());
        Ok(&bytes[from..bytes.len().min(from + size as usize)])
    }
}

/// What the kernel asks. One thread answers.
struct Mounted(Arc<Mutex<Nodes>>);

impl Mounted {
    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        lock(&self.0)
    }
}

fn entry(reply: ReplyEntry, answer: Result<FileAttr, Errno>) {
    match answer {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn empty(reply: ReplyEmpty, answer: Result<(), Errno>) {
    match answer {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Mounted {
    fn lookup(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut nodes = self.nodes();
        let found = nodes.named(parent, name).and_then(|at| nodes.attributes(INodeNo(at)));
        entry(reply, found);
    }

    fn getattr(&self, _: &fuser::Request, at: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.nodes().attributes(at) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &fuser::Request,
        at: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut nodes = self.nodes();
        let mut set = || {
            if let Some(mode) = mode {
                nodes.node(at)?.mode = u16::try_from(mode & 0o7777).unwrap();
            }
            if let Some(size) = size {
                nodes.file(at)?.change(Change::Size(usize::try_from(size).unwrap()));
            }
            nodes.attributes(at)
        };
        match set() {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        entry(reply, self.nodes().add(parent, name, mode & !umask, Content::Directory(Kept::default())));
    }

    fn create(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _: i32, reply: ReplyCreate) {
        match self.nodes().add(parent, name, mode & !umask, Content::File(Kept::default())) {
            Ok(attributes) => reply.created(&TTL, &attributes, Generation(0), FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &fuser::Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn unlink(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.nodes().remove(parent, name));
    }

    fn rmdir(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.nodes().remove(parent, name));
    }

    fn rename(&self, _: &fuser::Request, from: INodeNo, name: &OsStr, to: INodeNo, new: &OsStr, flags: RenameFlags, reply: ReplyEmpty) {
        let answer = if flags.is_empty() { self.nodes().rename((from, name), (to, new)) } else { Err(Errno::EINVAL) };
        empty(reply, answer);
    }

    fn link(&self, _: &fuser::Request, at: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut nodes = self.nodes();
        let mut link = || {
            if nodes.named(parent, name).is_ok() {
                return Err(Errno::EEXIST);
            }
            nodes.directory(parent)?.change(vec![(name.to_owned(), Some(at.0))]);
            nodes.attributes(at)
        };
        entry(reply, link());
    }

    fn read(
        &self,
        _: &fuser::Request,
        at: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.nodes().read(at, offset, size) {
            Ok(bytes) => reply.data(bytes),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &fuser::Request,
        at: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.nodes().write(at, offset, data) {
            Ok(written) => reply.written(written),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &fuser::Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &fuser::Request, at: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.nodes().file(at).map(File::sync));
    }

    fn fsyncdir(&self, _: &fuser::Request, at: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.nodes().directory(at).map(Directory::sync));
    }

    fn readdir(&self, _: &fuser::Request, at: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut nodes = self.nodes();
        let names: Vec<_> = match nodes.directory(at) {
            Ok(directory) => directory.now.iter().map(|(name, node)| (name.clone(), INodeNo(*node))).collect(),
            Err(error) => return reply.error(error),
        };
        let dots = [".", ".."].map(|name| (OsString::from(name), at));
        for (offset, (name, node)) in (1..).zip(dots.into_iter().chain(names)).skip(usize::try_from(offset).unwrap()) {
            let kind = nodes.attributes(node).map_or(FileType::RegularFile, |attributes| attributes.kind);
            if reply.add(node, offset, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &fuser::Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = 8 << 20;
        reply.statfs(blocks, blocks, blocks, 1 << 20, 1 << 20, 4096, 255, 4096);
    }
}

/// The file system keeps what it must, and loses some of the rest.
#[test]
fn a_power_cut_loses_what_is_not_synced() {
    let Some(disk) = LossyFs::mount() else { return };
    let path = |name: &str| disk.path().join(name);
    let sync = |path: &Path| fs::File::open(path).unwrap().sync_all().unwrap();
    let is_lost = |path: PathBuf| !path.exists();
    let (mut names, mut bytes) = (0, 0);
    for seed in 0..40 {
        fs::create_dir(path("dir")).unwrap();
        fs::write(path("dir/whole"), b"whole").unwrap();
        sync(&path("dir/whole"));
        sync(&path("dir"));
        sync(disk.path());
        let mut more = fs::File::options().append(true).open(path("dir/whole")).unwrap();
        more.write_all(&[b'x'; 2000]).unwrap();
        fs::write(path("dir/named"), b"").unwrap();
        fs::rename(path("dir/named"), path("dir/renamed")).unwrap();
        drop(more);
        disk.cut(seed);
        let whole = fs::read(path("dir/whole")).unwrap();
        assert!(whole.starts_with(b"whole"));
        bytes += usize::from(whole != [&b"whole"[..], &[b'x'; 2000]].concat());
        names += usize::from(is_lost(path("dir/renamed")) && is_lost(path("dir/named")));
        fs::remove_dir_all(path("dir")).unwrap();
        sync(disk.path());
        assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0);
    }
    assert!((5..35).contains(&names) && (5..35).contains(&bytes), "{names} names and {bytes} files of 40 are lost");
}
