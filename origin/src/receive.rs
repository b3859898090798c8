//! Writes the bytes of an upload to the disk in batches. One batch is written while the next one arrives.

use crate::{
    entries,
    reply::chunk_for,
    server::Slot,
    store::{self, Fault},
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use std::{
    io::{self, ErrorKind},
    mem,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

/// A batch is written when it has this many pieces, even if they are small. It limits the memory for a body that arrives byte by byte.
const MOST_PIECES: usize = 256;

/// Why an upload was not stored.
#[derive(Debug)]
pub(crate) enum Failed<E> {
    /// The bytes ended early.
    Body(E),
    /// There were more bytes than this.
    TooLarge(u64),
    /// The store failed.
    Store(Fault),
}

impl<E> From<Fault> for Failed<E> {
    fn from(fault: Fault) -> Self {
        Self::Store(fault)
    }
}

/// Writes the chunks to a temporary file, and calls `finish` with it. `most` is the most bytes. `limit` is how long the disk may take for one batch;
/// `None` for no limit.
pub(crate) async fn receive<U: Intaken, T: Send + 'static, E>(
    transfers: &Arc<AtomicUsize>,
    begin: impl FnOnce() -> Result<U, Fault> + Send + 'static,
    finish: impl FnOnce(U) -> Result<T, Fault> + Send + 'static,
    most: u64,
    limit: Option<Duration>,
    mut chunks: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<T, Failed<E>> {
    let (_slot, transfers) = Slot::take(transfers);
    let chunk = chunk_for(transfers);
    let mut work = Work::Claimed(begin);
    let (mut batch, mut held, mut total) = (Vec::new(), 0, 0);
    while let Some(bytes) = chunks.next().await {
        let bytes = bytes.map_err(Failed::Body)?;
        total += bytes.len() as u64;
        if total > most {
            return Err(Failed::TooLarge(most));
        }
        held += bytes.len();
        batch.push(bytes);
        if held >= chunk || batch.len() >= MOST_PIECES {
            held = 0;
            let (batch, before) = (mem::take(&mut batch), work.settle(limit).await?);
            work = Work::Writing(spawn_blocking(move || before.go_on(&batch)));
        }
    }
    let before = work.settle(limit).await?;
    Ok(finished(limit, spawn_blocking(move || finish(before.go_on(&batch)?))).await?)
}

/// Waits for blocking work. With a limit, the wait ends then; the work itself continues to its end.
pub(crate) async fn finished<T>(limit: Option<Duration>, job: JoinHandle<Result<T, Fault>>) -> Result<T, Fault> {
    let done = match limit {
        Some(limit) => {
            let silent = |_| Fault::Io(io::Error::new(ErrorKind::TimedOut, "the disk took too long"));
            timeout(limit, job).await.map_err(silent)?
        }
        None => job.await,
    };
    done.unwrap_or_else(|stopped| Err(Fault::Io(stopped.into())))
}

/// The destination of an upload's bytes.
pub(crate) trait Intaken: Send + 'static {
    /// Blocks.
    fn write(&mut self, bytes: &Bytes) -> Result<(), Fault>;
}

impl Intaken for store::Upload {
    fn write(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        self.write(bytes)
    }
}

impl Intaken for entries::Upload {
    fn write(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        self.write(bytes)
    }
}

/// The state of an upload.
enum Work<B, U> {
    /// Nothing is written yet.
    Claimed(B),
    /// A batch is being written.
    Writing(JoinHandle<Result<U, Fault>>),
}

/// An upload while no batch is written.
enum Settled<B, U> {
    Claimed(B),
    Begun(U),
}

impl<B, U> Work<B, U> {
    async fn settle(self, limit: Option<Duration>) -> Result<Settled<B, U>, Fault> {
        match self {
            Self::Claimed(begin) => Ok(Settled::Claimed(begin)),
            Self::Writing(job) => finished(limit, job).await.map(Settled::Begun),
        }
    }
}

impl<B: FnOnce() -> Result<U, Fault>, U: Intaken> Settled<B, U> {
    /// Blocks.
    fn go_on(self, batch: &[Bytes]) -> Result<U, Fault> {
        let mut upload = match self {
            Self::Claimed(begin) => begin()?,
            Self::Begun(upload) => upload,
        };
        batch.iter().try_for_each(|bytes| upload.write(bytes))?;
        Ok(upload)
    }
}
