//! The blobs of an origin in the same process, as a [`Source`] and a [`Store`]: the disk without HTTP. Everything that blocks runs on blocking threads.
//!
//! Behaves as the HTTP service does. The empty blob exists even if it was never stored. A whole blob is hashed while it is read, and ends with an error
//! if it is damaged. A damaged blob is moved to the quarantine, so that the next request finds it absent.
//!
//! Every wait for the disk ends after `origin.read_timeout`. If the disk hangs, the blocking thread stays blocked. So at most `origin.max_requests`
//! short requests run at once, as at an origin behind HTTP.

use crate::{
    Shared,
    receive::{Failed, finished, receive},
    reply::{Streaming, chunk_for},
    server::Slot,
    store::{self, Blob, Upload as Temporary},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Incoming, Limit, Next, Put, Source, Stat, Store, Upload, ran_out_of_files};
use castier_serverkit::stall_timeout::StallTimeout;
use futures::{FutureExt as _, Stream, future::BoxFuture, stream};
use std::{io::ErrorKind, pin::pin, sync::Arc, task::Poll, time::Duration};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    task::spawn_blocking,
    time::timeout,
};

/// The name of the source in labels and faults.
const NAME: &str = "origin";

/// How long a client that waits for `100 Continue` waits for the disk at most. Then it gets the 100, even if it is unknown whether the blob is stored.
const EXPECTED: Duration = Duration::from_secs(1);

/// The blobs of an [`Origin`](crate::Origin), for the program that has it in its own process.
pub(crate) struct Local {
    shared: Arc<Shared>,
    store: Arc<store::Store>,
    /// `origin.read_timeout`.
    limit: Duration,
    /// `origin.max_requests` permits, for all requests except reads and streamed uploads, which have other limits.
    requests: Semaphore,
}

impl Local {
    pub(crate) fn new(shared: Arc<Shared>, store: Arc<store::Store>, config: &castier_config::Origin) -> Self {
        Self { shared, store, limit: config.read_timeout.get(), requests: Semaphore::new(config.max_requests) }
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, Fault> {
        match timeout(self.limit, self.requests.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Fault::Busy(Limit::Requests)),
        }
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T, store::Fault> + Send + 'static) -> Result<T, Fault> {
        finished(Some(self.limit), spawn_blocking(work)).await.map_err(|fault| self.noted(fault))
    }

    fn noted(&self, fault: store::Fault) -> Fault {
        self.shared.note(&fault);
        fault.into()
    }

    fn max_blob(&self) -> u64 {
        self.shared.limits.load().max_blob.get()
    }

    async fn open_from(&self, digest: Digest, from: u64) -> Result<Answer, Fault> {
        let (store, (slot, transfers)) = (Arc::clone(&self.store), Slot::take(&self.shared.transfers));
        let chunk = chunk_for(transfers);
        let opened = self.blocking(move || {
            let blob = store.open_blob(&digest)?;
            let Some(size) = size(blob.as_ref(), &digest) else { return Ok(None) };
            // Read the first chunk now, so that damage in a small blob is an error before the answer begins.
            let first = match blob.filter(|_| from == 0 || from < size) {
                Some(blob) => {
                    let mut reader = blob.read(from..size);
                    Some((reader.next(chunk)?, reader))
                }
                None => None,
            };
            Ok(Some((size, first)))
        });
        Ok(match opened.await? {
            None => Answer::Absent,
            Some((size, Some((first, reader)))) => {
                Answer::Bytes(Incoming::new(Some(size), self.bytes(Streaming::new(first, reader, chunk, slot))))
            }
            Some((size, None)) if from > 0 => return Err(unusable(format!("offset {from} of {size} bytes"))),
            // The empty blob, which was never stored.
            Some((size, None)) => Answer::Bytes(Incoming::new(Some(size), stream::empty())),
        })
    }

    fn bytes(&self, mut streaming: Streaming) -> impl Stream<Item = Result<Bytes, Fault>> + use<> {
        let (shared, mut stall) = (Arc::clone(&self.shared), StallTimeout::new(self.limit));
        stream::poll_fn(move |cx| {
            let chunk = match streaming.poll_chunk(cx) {
                Poll::Pending if stall.is_over(cx) => Some(Err(Fault::Silent { source_name: NAME, why: "the disk took too long".into() })),
                Poll::Pending => return Poll::Pending,
                Poll::Ready(chunk) => chunk.map(|chunk| {
                    chunk.map_err(|fault| {
                        shared.note(&fault);
                        // The transfer has begun, so this is a broken transfer.
                        Fault::Unreachable { source_name: NAME, why: fault.to_string() }
                    })
                }),
            };
            stall.reset();
            Poll::Ready(chunk)
        })
    }

    async fn receive(&self, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        let (most, claimed) = (self.max_blob(), upload.digest().copied());
        if upload.size().is_some_and(|size| size > most) {
            return Err(Fault::OriginRefusesSize);
        }
        let _permit = if upload.whole().is_some() { Some(self.permit().await?) } else { None };
        // The upload gives the last bytes only if all bytes match the digest.
        let chunks = stream::try_unfold(Some(upload), async |upload| {
            let Some(upload) = upload else { return Ok(None) };
            Ok(Some(match upload.next().await? {
                Next::Part(bytes) => (bytes, Some(upload)),
                Next::Last(bytes) => (bytes, None),
            }))
        });
        let store = Arc::clone(&self.store);
        let begin = move || store.begin(claimed);
        let kept = receive(&self.shared.transfers, begin, Temporary::finish, most, Some(self.limit), pin!(chunks)).await;
        let kept = kept.map_err(|failed| match failed {
            Failed::Body(fault) => fault,
            Failed::TooLarge(_) => Fault::OriginRefusesSize,
            Failed::Store(fault) => self.noted(fault),
        })?;
        Ok(if kept.new { Put::Created } else { Put::Existed })
    }
}

impl Source for Local {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        async move { self.open_from(ask.digest()?, ask.from).await }.boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        async move {
            let _permit = self.permit().await?;
            let (store, digests) = (Arc::clone(&self.store), digests.to_vec());
            let stat = move |digest: &Digest| {
                let blob = store.open_blob(digest)?;
                Ok(size(blob.as_ref(), digest).map_or(Stat::Absent, |size| Stat::Present(Some(size))))
            };
            self.blocking(move || digests.iter().map(stat).collect()).await
        }
        .boxed()
    }
}

impl Store for Local {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        self.receive(upload).boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        async move {
            if !self.shared.allow_delete {
                return Err(Fault::NotAllowed);
            }
            let _permit = self.permit().await?;
            let (store, digest) = (Arc::clone(&self.store), *digest);
            self.blocking(move || store.remove(&digest)).await
        }
        .boxed()
    }

    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        async move {
            if size.is_some_and(|size| size > self.max_blob()) {
                return Ok(None);
            }
            let _permit = self.permit().await?;
            let (store, digest) = (Arc::clone(&self.store), *digest);
            let held = self.blocking(move || store.holds_durably(&digest));
            timeout(self.limit.min(EXPECTED), held).await.unwrap_or(Ok(None))
        }
        .boxed()
    }
}

/// The size of a blob; `None` if it does not exist. The empty blob always exists.
fn size(blob: Option<&Blob>, digest: &Digest) -> Option<u64> {
    blob.map(Blob::size).or((*digest == Digest::EMPTY).then_some(0))
}

fn unusable(why: String) -> Fault {
    Fault::Unusable { source_name: NAME, why }
}

impl From<store::Fault> for Fault {
    fn from(fault: store::Fault) -> Self {
        match fault {
            store::Fault::Mismatch(mismatch) => Self::Mismatch(mismatch),
            store::Fault::Full(_) => Self::OriginFull,
            store::Fault::Io(error) if ran_out_of_files(&error) => Self::Busy(Limit::Files),
            store::Fault::Io(error) if error.kind() == ErrorKind::TimedOut => Self::Silent { source_name: NAME, why: error.to_string() },
            rotten @ (store::Fault::Rotten { .. } | store::Fault::RottenEntry { .. } | store::Fault::Io(_)) => unusable(rotten.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
