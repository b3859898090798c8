//! The directory of a store, only for reading: without its lock, so that a castier-origin may use it meanwhile. What is damaged stays where it is.

use super::side::{Found, blocking};
use crate::{
    entries::Entries,
    store::{Fault as StoreFault, is_own, open_blob_in},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Fault, Incoming};
use castier_wire::entry::Name;
use futures::{Stream, stream};
use std::{
    fs::{self, DirEntry, File},
    io::{self, ErrorKind},
    iter,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{
    sync::mpsc::{self, Receiver},
    task::spawn_blocking,
};

/// How far a list may be ahead.
pub(super) const AHEAD: usize = 1024;
/// A blob is read in pieces of this size.
const PIECE: usize = 1 << 20;

/// The directory of a store.
pub(super) struct Directory {
    root: PathBuf,
    entries: Arc<Entries>,
}

/// Passes on what was found; false if nobody listens any more.
type Tell<'t> = &'t mut dyn FnMut(Found) -> bool;

/// Nobody listens any more.
struct Ended;

impl Directory {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), entries: Arc::new(Entries::for_reading(root)) }
    }

    pub(super) fn objects(self: Arc<Self>) -> impl Stream<Item = Result<Found, Fault>> + Send {
        let (tell, told) = mpsc::channel(AHEAD);
        spawn_blocking(move || self.list(&mut |found| tell.blocking_send(Ok(found)).is_ok()).ok());
        received(told)
    }

    fn list(&self, tell: Tell<'_>) -> Result<(), Ended> {
        for a in children(&self.root) {
            let Some(a) = or_say(a, tell)? else { continue };
            match name_of(&a).as_deref() {
                Some("entries") => self.list_entries(&a.path(), tell)?,
                Some(own) if is_own(own) => {}
                Some(fan) if is_fan(fan) && is_dir(&a) => {
                    for b in children(&a.path()) {
                        let Some(b) = or_say(b, tell)? else { continue };
                        match name_of(&b) {
                            Some(inner) if is_fan(&inner) && is_dir(&b) => Self::list_blobs(&b.path(), &format!("{fan}{inner}"), tell)?,
                            _ => say(tell, other(&b))?,
                        }
                    }
                }
                _ => say(tell, other(&a))?,
            }
        }
        Ok(())
    }

    fn list_blobs(dir: &Path, prefix: &str, tell: Tell<'_>) -> Result<(), Ended> {
        for file in children(dir) {
            let Some(file) = or_say(file, tell)? else { continue };
            let Some(metadata) = or_say(file.metadata(), tell)? else { continue };
            let digest = name_of(&file).filter(|name| name.starts_with(prefix)).and_then(|name| name.parse::<Digest>().ok());
            match digest.filter(|_| metadata.is_file()) {
                Some(digest) => say(tell, Found::Blob(digest, metadata.len()))?,
                None => say(tell, other(&file))?,
            }
        }
        Ok(())
    }

    fn list_entries(&self, dir: &Path, tell: Tell<'_>) -> Result<(), Ended> {
        for child in children(dir) {
            let Some(child) = or_say(child, tell)? else { continue };
            let path = child.path();
            match name_of(&child) {
                _ if is_dir(&child) => self.list_entries(&path, tell)?,
                // A collection. It exists at the destination if it has members.
                Some(name) if name.ends_with(".collection") => {}
                Some(name) if name.parse::<Digest>().is_ok() => match or_say(self.entries.name_at(&path), tell)? {
                    Some(Some(name)) => say(tell, Found::Entry(name))?,
                    Some(None) => say(tell, Found::Damaged(path.display().to_string()))?,
                    None => {}
                },
                _ => say(tell, other(&child))?,
            }
        }
        Ok(())
    }

    pub(super) async fn size(&self, digest: Digest) -> Result<Option<u64>, Fault> {
        let root = self.root.clone();
        blocking(move || Ok(open_blob_in(&root, &digest)?.map(|(_, size)| size))).await
    }

    pub(super) async fn open(&self, digest: Digest, from: u64) -> Result<Option<Incoming>, Fault> {
        let root = self.root.clone();
        let Some((file, size)) = blocking(move || open_blob_in(&root, &digest)).await? else { return Ok(None) };
        let file = Arc::new(file);
        let pieces = stream::try_unfold(from, move |at| {
            let file = file.clone();
            async move {
                let left = usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX).min(PIECE);
                if left == 0 {
                    return Ok(None);
                }
                let bytes = blocking(move || read(&file, at, left)).await?;
                // The file has become shorter. Then its digest does not match.
                if bytes.is_empty() {
                    return Ok(None);
                }
                let next = at + bytes.len() as u64;
                Ok(Some((bytes, next)))
            }
        });
        Ok(Some(Incoming::new(Some(size), pieces)))
    }

    pub(super) async fn entry(&self, name: Name, most: u64) -> Result<Option<(Digest, Bytes)>, Fault> {
        let entries = self.entries.clone();
        blocking(move || entries.read_untouched(&name, most)).await
    }
}

fn read(file: &File, at: u64, length: usize) -> Result<Bytes, StoreFault> {
    let mut bytes = vec![0; length];
    let read = loop {
        match file.read_at(&mut bytes, at) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    bytes.truncate(read);
    Ok(bytes.into())
}

/// What a channel receives, as a stream.
pub(super) fn received<T: Send>(told: Receiver<T>) -> impl Stream<Item = T> + Send {
    stream::unfold(told, |mut told| async move { Some((told.recv().await?, told)) })
}

fn say(tell: Tell<'_>, found: Found) -> Result<(), Ended> {
    if tell(found) { Ok(()) } else { Err(Ended) }
}

/// Says what cannot be read. What was deleted meanwhile is not there.
fn or_say<T>(done: io::Result<T>, tell: Tell<'_>) -> Result<Option<T>, Ended> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => say(tell, Found::Unreadable(error.to_string())).map(|()| None),
    }
}

fn children(dir: &Path) -> Box<dyn Iterator<Item = io::Result<DirEntry>>> {
    let named = |dir: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", dir.display()));
    match fs::read_dir(dir) {
        Ok(children) => {
            let dir = dir.to_owned();
            Box::new(children.map(move |child| child.map_err(|error| named(&dir, error))))
        }
        Err(error) => Box::new(iter::once(Err(named(dir, error)))),
    }
}

fn name_of(entry: &DirEntry) -> Option<String> {
    entry.file_name().into_string().ok()
}

fn is_dir(entry: &DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir())
}

/// The name of a directory at the first two levels.
fn is_fan(name: &str) -> bool {
    name.len() == 2 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn other(entry: &DirEntry) -> Found {
    Found::Other(format!("{}{}", entry.path().display(), if is_dir(entry) { "/" } else { "" }))
}
