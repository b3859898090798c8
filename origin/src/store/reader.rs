//! Reading a blob in chunks, verified where that is possible.

use super::{Blob, Fault, Store};
use bytes::Bytes;
use castier_blob::{Digest, Verifier};
use std::{fs::File, io::ErrorKind, ops::Range, os::unix::fs::FileExt as _, sync::Arc};

/// Reads part or all of a blob, front to back.
///
/// Invariant: when all of it is read, the last chunk is handed out only if the digest matches. A part cannot be judged
/// by a digest of the whole, so parts are handed out as they lie on disk; whoever put them together knows the digest.
pub(crate) struct Reader {
    store: Arc<Store>,
    digest: Digest,
    file: File,
    /// What is still to be read.
    left: Range<u64>,
    /// Sees every byte of a whole blob; gone once it has judged them.
    verifier: Option<Verifier>,
}

impl Blob {
    /// Reads the bytes in `range`, which must lie within the blob.
    pub(crate) fn read(self, range: Range<u64>) -> Reader {
        let whole = range == (0..self.size);
        Reader { verifier: whole.then(|| Verifier::of(self.digest)), store: self.store, digest: self.digest, file: self.file, left: range }
    }
}

impl Reader {
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
        if self.is_done() && self.verifier.take().is_some_and(|verifier| verifier.finish(()).is_err()) {
            return Err(self.rotten());
        }
        Ok(chunk.into())
    }

    fn rotten(&self) -> Fault {
        let found = self.store.set_aside(&self.digest, &self.file).unwrap_or_else(|error| {
            tracing::error!(digest = %self.digest, %error, "a damaged blob could not be moved to the quarantine; remove it by hand");
            true
        });
        Fault::Rotten { digest: self.digest, found }
    }
}
