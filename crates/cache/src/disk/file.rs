//! A file that is being written, and becomes a blob of the tier.

use super::{format::Checksums, store::Store};
use crate::{
    metrics::{DiskOp, Skip},
    pool::SharedFile,
    resource::Visibility,
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

/// A file in the tier's `tmp/`. Append the blob's bytes, then call [`super::Disk::keep_file`]. If dropped before that, it is deleted.
pub struct DiskFile {
    store: Arc<Store>,
    file: Arc<SharedFile>,
    /// `None` once the file is renamed.
    path: Option<TempPath>,
    checksums: Checksums,
}

impl DiskFile {
    pub(super) fn new(store: Arc<Store>, file: File, path: TempPath) -> Self {
        let file = SharedFile::new(file, store.reads.clone());
        Self { store, file: Arc::new(file), path: Some(path), checksums: Checksums::new() }
    }

    /// The file, for reading the appended bytes. They are not verified.
    pub const fn file(&self) -> &Arc<SharedFile> {
        &self.file
    }

    /// The number of appended bytes.
    pub const fn size(&self) -> u64 {
        self.checksums.seen()
    }

    /// Appends the next bytes of the blob. Blocks.
    ///
    /// # Errors
    /// The write failed. Nothing was appended, and the same bytes may be tried again.
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
        self.store.errors.record(DiskOp::Write, path, error);
    }

    /// Appends several parts with one write. The page cache stores one large write in fewer and larger pieces than many small ones: later
    /// hits read a block nearly twice as fast. Blocks.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_all(&mut self, parts: &[Bytes]) -> io::Result<()> {
        let at = self.size();
        self.write(|file| write_all_at(file, parts, at))?;
        parts.iter().for_each(|part| self.checksums.update(part));
        Ok(())
    }

    /// As [`Self::append_all`], on a thread of the pool. Starts at once, even if the future is not polled. Gives `None`, and counts it, if
    /// the write failed or the disk does not answer.
    pub fn grow(mut self, parts: Vec<Bytes>) -> impl Future<Output = Option<Self>> + Send {
        let store = self.store.clone();
        let grown = store.writes.run(move || self.append_all(&parts).map(|()| self));
        async move {
            let grown = grown.await.inspect_err(|error| store.pool_failed(DiskOp::Write, *error));
            let grown = grown.ok().and_then(Result::ok);
            if grown.is_none() {
                store.metrics.disk_skipped(Skip::Failed);
            }
            grown
        }
    }

    /// Writes the trailer and renames the file to `at`. If the rename fails, calls `repair`; if that returns true, tries once more. Blocks.
    ///
    /// # Errors
    /// The write or the rename failed. The file is deleted.
    pub(super) fn commit(
        mut self,
        digest: &Digest,
        visibility: Visibility,
        at: &Path,
        repair: impl FnOnce(&io::Error) -> bool,
    ) -> io::Result<()> {
        let size = self.size();
        let trailer = std::mem::replace(&mut self.checksums, Checksums::new()).trailer(digest, visibility);
        self.write(|file| file.write_all_at(&trailer, size))?;
        let Some(path) = self.path.take() else { return Err(io::ErrorKind::NotFound.into()) };
        let renamed = path.persist(at).or_else(|failed| if repair(&failed.error) { failed.path.persist(at) } else { Err(failed) });
        renamed.map_err(|failed| {
            self.path = Some(failed.path);
            self.store.errors.record(DiskOp::Write, at, &failed.error);
            failed.error
        })
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // Deleting a file may block.
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
