//! The file of a spool. Only blocking threads touch it, but for reads of what the page cache has.

use crate::{
    buffer::Buffer,
    descriptors,
    fault::{Fault, Limit},
};
use bytes::Bytes;
use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, sync::Arc};
use tokio::task::JoinError;

/// How much is copied at once from one file to another.
const COPY: usize = 1 << 20;

/// Makes the unlinked file of a spool, holding `parts` from offset 0.
///
/// # Errors
/// [`Fault::Busy`] if the file system has no room, else [`Fault::Internal`].
pub async fn make_file(dir: PathBuf, parts: Vec<Bytes>) -> Result<Arc<File>, Fault> {
    off_thread(move || {
        let file = tempfile::tempfile_in(dir)?;
        let mut at = 0;
        for part in parts {
            file.write_all_at(&part, at)?;
            at += part.len() as u64;
        }
        Ok(Arc::new(file))
    })
    .await
}

/// A file as [`make_file`] makes it, holding the first `len` bytes of another.
///
/// # Errors
/// As [`make_file`].
pub async fn copy_file(dir: PathBuf, from: Arc<File>, len: u64) -> Result<Arc<File>, Fault> {
    off_thread(move || {
        let file = tempfile::tempfile_in(dir)?;
        let mut buffer = vec![0; COPY];
        let mut at = 0;
        while at < len {
            let part = &mut buffer[..(len - at).min(COPY as u64) as usize];
            from.read_exact_at(part, at)?;
            file.write_all_at(part, at)?;
            at += part.len() as u64;
        }
        Ok(Arc::new(file))
    })
    .await
}

/// Writes to the file of a spool, from offset `at` on. Begins at once, whether or not it is awaited.
///
/// # Errors
/// As [`make_file`].
pub fn write_file(file: Arc<File>, parts: Vec<Bytes>, mut at: u64) -> impl Future<Output = Result<(), Fault>> + Send {
    off_thread(move || {
        for part in parts {
            file.write_all_at(&part, at)?;
            at += part.len() as u64;
        }
        Ok(())
    })
}

/// Reads up to `len` bytes at offset `at`, at least one. What the page cache has, which is all that was just written, is read in place;
/// another thread waits for the rest.
///
/// # Errors
/// [`Fault::Internal`] on an I/O error.
pub async fn read_file(file: Arc<File>, at: u64, len: usize) -> Result<Bytes, Fault> {
    let mut buffer = Buffer::new(len);
    if let read @ 1.. = buffer.read_cached(&file, at) {
        return Ok(buffer.share(0..read));
    }
    off_thread(move || {
        file.read_exact_at(&mut buffer, at)?;
        let len = buffer.len();
        Ok(buffer.share(0..len))
    })
    .await
}

fn off_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> impl Future<Output = Result<T, Fault>> + Send {
    let task = tokio::task::spawn_blocking(work);
    async move { outcome(task.await) }
}

fn outcome<T>(done: Result<io::Result<T>, JoinError>) -> Result<T, Fault> {
    match done {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            tracing::warn!(%error, "the spool directory is full");
            Err(Fault::Busy(Limit::Spool))
        }
        Ok(Err(error)) if descriptors::ran_out(&error) => Err(Fault::Busy(Limit::Files)),
        Ok(Err(error)) => Err(Fault::Internal(format!("spool file: {error}"))),
        Err(panic) => Err(Fault::Internal(format!("spool file: {panic}"))),
    }
}
