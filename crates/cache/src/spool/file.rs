//! The file of a spool. Only threads of the pool read and write it, except for reads from the page cache, which do not block.

use crate::{
    buffer::Buffer,
    fault::{Fault, Limit, ran_out_of_files},
    metrics::{DiskError, DiskOp, Metrics},
    pool::{Pool, PoolError, PoolEvent, SharedFile},
};
use bytes::Bytes;
use castier_config as config;
use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, sync::Arc};

/// How many bytes are copied at once from one file to another.
const COPY: u64 = 1 << 20;

/// Makes unnamed files for spools.
pub struct SpoolFiles {
    /// `fill.spool_dir`.
    dir: PathBuf,
    pool: Pool,
    metrics: Arc<Metrics>,
}

impl SpoolFiles {
    /// Files in `fill.spool_dir`.
    pub fn new(config: &config::Fill, metrics: Arc<Metrics>) -> Self {
        let dir = if config.spool_dir.as_os_str().is_empty() { std::env::temp_dir() } else { config.spool_dir.clone() };
        let timeout = config.spool_timeout.get();
        let pool = Pool::new("spool", config.spool_threads, timeout, timeout, {
            let dir = dir.clone();
            move |event| match event {
                PoolEvent::Hangs => tracing::warn!(
                    path = %dir.display(), ?timeout,
                    "the file system of fill.spool_dir does not answer: blobs that must pass through it get 503, and it is tried again after \
                     fill.spool_timeout. Look at the kernel's log and at what it is mounted from"
                ),
                PoolEvent::Recovered => tracing::info!(path = %dir.display(), "the file system of fill.spool_dir answers again"),
            }
        });
        Self { dir, pool, metrics }
    }

    /// Makes a file to check at the start that fills can. Blocks for `fill.spool_timeout` at most.
    ///
    /// # Errors
    /// The file could not be made.
    pub fn check(&self) -> io::Result<()> {
        let dir = self.dir.clone();
        self.pool.run_here(move || tempfile::tempfile_in(dir).map(drop)).unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// The directory of the files.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// Makes the unlinked file of a spool, holding `parts` from offset 0.
    ///
    /// # Errors
    /// [`Fault::Busy`] if the file system is full or does not answer, else [`Fault::Internal`].
    pub async fn make(&self, parts: Vec<Bytes>) -> Result<Arc<SharedFile>, Fault> {
        let (dir, pool) = (self.dir.clone(), self.pool.clone());
        let made = self.pool.run(move || {
            let file = tempfile::tempfile_in(dir)?;
            let mut at = 0;
            for part in parts {
                file.write_all_at(&part, at)?;
                at += part.len() as u64;
            }
            Ok(Arc::new(SharedFile::new(file, pool)))
        });
        self.outcome(made.await)
    }

    /// A file as [`Self::make`] makes it, holding the first `len` bytes of another.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub async fn copy(&self, from: &Arc<SharedFile>, len: u64) -> Result<Arc<SharedFile>, Fault> {
        let file = self.make(Vec::new()).await?;
        let mut at = 0;
        while at < len {
            let source = from.clone();
            // In steps, each with its own timeout. The whole copy has none.
            let read = from.pool().run(move || {
                let mut part = vec![0; (len - at).min(COPY) as usize];
                source.get()?.read_exact_at(&mut part, at)?;
                Ok(Bytes::from(part))
            });
            let part = self.outcome(read.await)?;
            let after = at + part.len() as u64;
            self.write(&file, vec![part], at).await?;
            at = after;
        }
        Ok(file)
    }

    /// Writes to a file of [`Self::make`], starting at offset `at`. Starts at once, even if the future is not polled.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn write(&self, file: &Arc<SharedFile>, parts: Vec<Bytes>, mut at: u64) -> impl Future<Output = Result<(), Fault>> + Send + use<> {
        let (file, metrics) = (file.clone(), self.metrics.clone());
        let written = self.pool.run(move || {
            let file: &File = file.get()?;
            for part in parts {
                file.write_all_at(&part, at)?;
                at += part.len() as u64;
            }
            Ok(())
        });
        async move { outcome(&metrics, written.await) }
    }

    /// Reads up to `len` bytes at offset `at`, at least one. The file must have them all. Reads from the page cache on this thread, without blocking.
    /// Bytes that are not in it are read on a thread of the pool.
    ///
    /// # Errors
    /// [`Fault::Busy`] if the file system does not answer, [`Fault::Internal`] on an I/O error.
    pub async fn read(&self, file: Arc<SharedFile>, at: u64, len: usize) -> Result<Bytes, Fault> {
        let mut buffer = Buffer::new(len);
        if let Ok(there) = file.get()
            && let read @ 1.. = buffer.read_cached(there, file.is_in_memory(), at)
        {
            return Ok(buffer.share(0..read));
        }
        let pool = file.pool().clone();
        let read = pool.run(move || {
            file.get()?.read_exact_at(&mut buffer, at)?;
            let len = buffer.len();
            Ok(buffer.share(0..len))
        });
        self.outcome(read.await)
    }

    fn outcome<T>(&self, done: Result<io::Result<T>, PoolError>) -> Result<T, Fault> {
        outcome(&self.metrics, done)
    }
}

fn outcome<T>(metrics: &Metrics, done: Result<io::Result<T>, PoolError>) -> Result<T, Fault> {
    let (kind, fault) = match done {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                tracing::warn!(%error, "the spool directory is full");
                (DiskError::Full, Fault::Busy(Limit::Spool))
            }
            io::ErrorKind::FileTooLarge => {
                tracing::warn!(%error, "a spool file may not grow: raise the limit on the size of files (ulimit -f, LimitFSIZE=)");
                (DiskError::TooLarge, Fault::Busy(Limit::Spool))
            }
            _ if ran_out_of_files(&error) => (DiskError::Files, Fault::Busy(Limit::Files)),
            _ => (DiskError::Other, Fault::Internal(format!("spool file: {error}"))),
        },
        Err(PoolError::Busy) => (DiskError::Busy, Fault::Busy(Limit::Spool)),
        Err(PoolError::TimedOut) => (DiskError::Timeout, Fault::Busy(Limit::Spool)),
        Err(PoolError::Panicked) => (DiskError::Other, Fault::Internal("spool file: the work on it panicked".into())),
    };
    metrics.disk_error(DiskOp::Spool, kind);
    Err(fault)
}
