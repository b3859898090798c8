//! A blob on its way into the tier.

use super::{format::Checksums, store::Store};
use crate::{
    metrics::{DiskOp, Skip},
    pool::SharedFile,
};
use bytes::Bytes;
use castier_blob::Digest;
use rustix::io::{Errno, pwritev};
use std::{
    fs::File,
    io::{self, IoSlice},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::Instant,
};
use tempfile::TempPath;

/// A file in the tier's `tmp/`, to be filled from its start and then kept with [`super::Disk::keep_file`]. Deleted if it is
/// dropped instead.
pub struct DiskFile {
    store: Arc<Store>,
    file: Arc<SharedFile>,
    /// None once the file has its place.
    path: Option<TempPath>,
    checksums: Checksums,
}

impl DiskFile {
    pub(super) fn new(store: Arc<Store>, file: File, path: TempPath) -> Self {
        let file = SharedFile::new(file, store.reads.clone());
        Self { store, file: Arc::new(file), path: Some(path), checksums: Checksums::new() }
    }

    /// The file, for reading what was appended: unverified bytes.
    pub const fn file(&self) -> &Arc<SharedFile> {
        &self.file
    }

    /// How many bytes were appended.
    pub const fn size(&self) -> u64 {
        self.checksums.seen()
    }

    /// Writes the next bytes of the blob. Blocks.
    ///
    /// # Errors
    /// The disk's; the same bytes may be tried again.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let at = self.size();
        self.write(|file| file.write_all_at(bytes, at))?;
        self.checksums.update(bytes);
        Ok(())
    }

    fn write(&self, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let started = Instant::now();
        let written = self.file.get().and_then(write);
        self.store.metrics.disk_io(DiskOp::Write, started.elapsed());
        written.inspect_err(|error| self.failed(error))
    }

    fn failed(&self, error: &io::Error) {
        let path = self.path.as_deref().unwrap_or_else(|| self.store.root());
        self.store.health.failed(DiskOp::Write, path, error);
    }

    /// As [`Self::append`], of parts that follow one another. They are written together, since what the page cache gets at once it keeps
    /// in fewer and larger pieces: a hit later reads a block nearly twice as fast.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_all(&mut self, parts: &[Bytes]) -> io::Result<()> {
        let at = self.size();
        self.write(|file| write_all_at(file, parts, at))?;
        parts.iter().for_each(|part| self.checksums.update(part));
        Ok(())
    }

    /// As [`Self::append_all`], on another thread; none if that failed, or the disk does not answer. Begins at once, whether or not it is
    /// awaited.
    pub fn grow(mut self, parts: Vec<Bytes>) -> impl Future<Output = Option<Self>> + Send {
        let store = self.store.clone();
        let grown = store.writes.run(move || self.append_all(&parts).map(|()| self));
        async move {
            let grown = grown.await.inspect_err(|undone| store.undone(DiskOp::Write, *undone));
            let grown = grown.ok().and_then(Result::ok);
            if grown.is_none() {
                store.metrics.disk_skipped(Skip::Failed);
            }
            grown
        }
    }

    /// Writes the trailer and gives the file its place. Where that fails, `mend` may do something about it, and say that it is worth another
    /// try. Blocks.
    pub(super) fn place(mut self, digest: &Digest, at: &Path, mend: impl FnOnce(&io::Error) -> bool) -> io::Result<()> {
        let size = self.size();
        let trailer = std::mem::replace(&mut self.checksums, Checksums::new()).trailer(digest);
        self.write(|file| file.write_all_at(&trailer, size))?;
        let Some(path) = self.path.take() else { return Err(io::ErrorKind::NotFound.into()) };
        let placed = path.persist(at).or_else(|failed| if mend(&failed.error) { failed.path.persist(at) } else { Err(failed) });
        placed.map_err(|failed| {
            self.path = Some(failed.path);
            self.store.health.failed(DiskOp::Write, at, &failed.error);
            failed.error
        })
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // To delete a file is to wait for the file system.
        if let Some(path) = self.path.take() {
            self.store.writes.dispose(path);
        }
    }
}

fn write_all_at(file: &File, parts: &[Bytes], mut at: u64) -> io::Result<()> {
    let mut slices: Vec<_> = parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)).collect();
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        match pwritev(file, rest, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                at += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
