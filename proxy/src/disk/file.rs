//! A blob on its way into the tier.

use super::{format::Checksums, store::Store};
use bytes::Bytes;
use castier_blob::Digest;
use rustix::io::{Errno, pwritev};
use std::{
    fs::File,
    io::{self, IoSlice},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};
use tempfile::TempPath;

/// A file in the tier's `tmp/`, to be filled from its start and then kept with [`super::Disk::keep_file`]. Deleted if it is
/// dropped instead.
pub struct DiskFile {
    store: Arc<Store>,
    file: Arc<File>,
    path: TempPath,
    checksums: Checksums,
}

impl DiskFile {
    pub(super) fn new(store: Arc<Store>, file: File, path: TempPath) -> Self {
        Self { store, file: Arc::new(file), path, checksums: Checksums::new() }
    }

    /// The file, for reading what was appended: unverified bytes.
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// How many bytes were appended.
    pub const fn size(&self) -> u64 {
        self.checksums.seen()
    }

    /// Writes the next bytes of the blob. Blocks.
    ///
    /// # Errors
    /// The disk's, after which the tier takes nothing for a while; the same bytes may be tried again.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.size()).inspect_err(|error| self.store.health.failed(error))?;
        self.checksums.update(bytes);
        Ok(())
    }

    /// As [`Self::append`], of parts that follow one another. They are written together, since what the page cache gets at once it keeps
    /// in fewer and larger pieces: a hit later reads a block nearly twice as fast.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_all(&mut self, parts: &[Bytes]) -> io::Result<()> {
        write_all_at(&self.file, parts, self.size()).inspect_err(|error| self.store.health.failed(error))?;
        parts.iter().for_each(|part| self.checksums.update(part));
        Ok(())
    }

    /// Writes the trailer and gives the file its place. Blocks.
    pub(super) fn place(self, digest: &Digest, at: &Path) -> io::Result<()> {
        let size = self.size();
        self.file.write_all_at(&self.checksums.trailer(digest), size)?;
        self.path.persist(at).map_err(|error| error.error)
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
