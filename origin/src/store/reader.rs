//! Reading a blob in chunks, verified where that is possible.

use super::{Blob, Fault, Store};
use crate::entries::Entries;
use bytes::Bytes;
use castier_blob::{Digest, Verifier};
use castier_wire::entry::Name;
use std::{fs::File, io::ErrorKind, ops::Range, os::unix::fs::FileExt as _, sync::Arc};

/// Whose bytes are read, and who sets them aside when they are damaged.
enum Owner {
    Blob(Arc<Store>, Digest),
    Entry(Arc<Entries>, Name),
}

/// Reads part or all of a blob or an entry, front to back.
///
/// Invariant: when all of it is read, the last chunk is handed out only if the digest matches. A part cannot be judged
/// by a digest of the whole, so parts are handed out as they lie on disk; the client that put them together knows the digest.
pub(crate) struct Reader {
    owner: Owner,
    file: File,
    /// What is still to be read.
    left: Range<u64>,
    /// Sees every byte of a whole blob; gone once it has judged them.
    verifier: Option<Verifier>,
}

impl Blob {
    /// Reads the bytes in `range`, which must lie within the blob.
    pub(crate) fn read(self, range: Range<u64>) -> Reader {
        Reader::new(Owner::Blob(self.store, self.digest), self.file, self.digest, self.size, range)
    }
}

impl Reader {
    /// Reads the bytes in `range` of an entry of `size` bytes with this digest, which stand at the front of `file`.
    pub(crate) fn of_entry(entries: Arc<Entries>, name: Name, file: File, digest: Digest, size: u64, range: Range<u64>) -> Self {
        Self::new(Owner::Entry(entries, name), file, digest, size, range)
    }

    fn new(owner: Owner, file: File, digest: Digest, size: u64, range: Range<u64>) -> Self {
        let whole = range == (0..size);
        Self { owner, file, left: range, verifier: whole.then(|| Verifier::of(digest, ())) }
    }

    /// Whether everything has been handed out.
    pub(crate) const fn is_done(&self) -> bool {
        self.left.start >= self.left.end
    }

    /// The next chunk, of at most `most` bytes; an empty one at the end, which for an empty blob is also where it is judged.
    pub(crate) fn next(&mut self, most: usize) -> Result<Bytes, Fault> {
        let left = self.left.end.saturating_sub(self.left.start);
        let mut chunk = vec![0; usize::try_from(left).unwrap_or(usize::MAX).min(most)];
        match self.file.read_exact_at(&mut chunk, self.left.start) {
            Ok(()) => self.left.start += chunk.len() as u64,
            // The file is shorter than it was when it was opened: its bytes are gone.
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Err(self.rotten()),
            Err(e) => return Err(Fault::Io(e)),
        }
        if let Some(verifier) = &mut self.verifier {
            verifier.update(&chunk);
        }
        if self.is_done() && self.verifier.take().is_some_and(|verifier| verifier.finish().is_err()) {
            return Err(self.rotten());
        }
        Ok(chunk.into())
    }

    fn rotten(&self) -> Fault {
        let (store, digest) = match &self.owner {
            Owner::Blob(store, digest) => (store, *digest),
            Owner::Entry(entries, name) => return entries.rotten(name, Some(&self.file)),
        };
        let found = store.set_aside(&digest, &self.file).unwrap_or_else(|error| {
            tracing::error!(%digest, %error, "a damaged blob could not be moved to the quarantine; remove it by hand");
            true
        });
        Fault::Rotten { digest, found }
    }
}
