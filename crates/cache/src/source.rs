//! Where blobs come from and go to: the seam between the cache and everything behind it. An HTTP origin, local files, a peer and a closure in a
//! test are all [`Source`]s.

use crate::{fault::Fault, resource::Key, upload::Upload};
use bytes::Bytes;
use castier_blob::Digest;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use std::{ops::Range, sync::Arc};

/// What a source is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What is wanted.
    pub key: Key,
    /// The offset of the first byte that is wanted.
    pub from: u64,
}

impl Ask {
    /// The blob that is wanted.
    ///
    /// # Errors
    /// A name was asked for, and this source knows only blobs.
    pub fn digest(&self) -> Result<Digest, Fault> {
        self.key.digest().ok_or_else(|| Fault::Internal("a store of blobs was asked for a name".into()))
    }
}

/// What a source says to an [`Ask`].
pub enum Answer {
    /// The bytes, from the wanted offset on.
    Bytes(Incoming),
    /// There is no such blob. Only the origin knows that; a peer may pass on what the origin told it.
    Absent,
    /// The source was asked only for what it keeps, and does not keep the blob.
    NotKept,
    /// The source has another body by now, or cannot tell whether it has: what came before it is of no use.
    StartOver,
    /// The source works, but cannot help now: it does not reach the origin, or has too much to do.
    Unable,
}

/// What a source knows about a blob without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stat {
    /// There is no such blob.
    Absent,
    /// There is one, of this size if the source tells it.
    Present(Option<u64>),
}

/// The bytes of a blob on their way from a source.
pub struct Incoming {
    /// The size of the whole blob, if the source tells it.
    pub size: Option<u64>,
    /// The bytes from the wanted offset on.
    pub bytes: BoxStream<'static, Result<Bytes, Fault>>,
    /// Further requests for parts of the same version of the blob, if the source can answer such. Of use only with `size`.
    pub ranges: Option<Arc<dyn Ranges>>,
}

/// One version of a blob at a source that gives parts of it.
pub trait Ranges: Send + Sync {
    /// Asks for these bytes of exactly this version. The stream has them all, or ends with an error. The request is sent when the future is polled.
    fn read(&self, range: Range<u64>) -> BoxFuture<'static, Result<BoxStream<'static, Result<Bytes, Fault>>, NoRange>>;

    /// Notes that asking this source for ranges is of no use, so that it gives no [`Ranges`] for a while.
    fn give_up(&self);
}

/// Why a source did not give a range.
#[derive(Clone, Debug)]
pub enum NoRange {
    /// The request failed. Another try may succeed.
    Fault(Fault),
    /// The source does not have this version any more.
    Replaced,
    /// The source answers with something else than the range, or does not say of which version it is.
    Ignored,
}

impl Incoming {
    /// `bytes` begin at the wanted offset. They end with an error if the transfer breaks. Dropping the stream ends the transfer.
    pub fn new(size: Option<u64>, bytes: impl futures::Stream<Item = Result<Bytes, Fault>> + Send + 'static) -> Self {
        Self { size, bytes: bytes.boxed(), ranges: None }
    }

    /// The same, from a source that also gives ranges.
    #[must_use]
    pub fn with_ranges(self, ranges: Option<Arc<dyn Ranges>>) -> Self {
        Self { ranges, ..self }
    }

    /// The next bytes, at least one; `None` at the end of the source's answer. Safe to cancel and call again.
    ///
    /// # Errors
    /// The transfer broke, or stalled.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            match self.bytes.next().await.transpose()? {
                Some(bytes) if bytes.is_empty() => {}
                next => return Ok(next),
            }
        }
    }
}

/// Something that blobs can be read from.
pub trait Source: Send + Sync {
    /// Opens a blob for reading.
    ///
    /// # Errors
    /// What kept the source from answering, or made its answer useless.
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>>;

    /// What is known about each of these blobs, in their order.
    ///
    /// # Errors
    /// As [`Self::open`], for any of them.
    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>>;

    /// The URL of the server that is asked, for spans and logs; none if it has none.
    fn url(&self) -> Option<String> {
        None
    }
}

/// Something that blobs can be stored in for good.
pub trait Store: Source {
    /// Stores an upload. Done only when the blob is durable. The bytes end with an error, and never with a clean end, if they are not the blob that
    /// the upload names.
    ///
    /// # Errors
    /// The client's, the store's, or a limit.
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>>;

    /// Deletes a blob; false if it was not there.
    ///
    /// # Errors
    /// [`Fault::NotAllowed`] if the store does not delete; else as [`Source::open`].
    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>>;

    /// Drops what this store remembers about a blob, so that the next question goes to the store itself. A purge does this.
    fn forget(&self, _digest: &Digest) {}

    /// The size of a blob that is stored durably, so that an upload of `size` bytes need not be sent. `None` if it must be.
    ///
    /// # Errors
    /// As [`Source::open`].
    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        let known = self.stat(std::slice::from_ref(digest));
        async move {
            Ok(match known.await?.first() {
                Some(Stat::Present(known)) => known.or(size),
                _ => None,
            })
        }
        .boxed()
    }
}

/// How an upload ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The blob was not there before.
    Created,
    /// The blob was there already.
    Existed,
}

/// A function from an [`Ask`] to an [`Answer`] is a source, for tests and for embedding.
impl<F> Source for F
where
    F: Fn(Ask) -> BoxFuture<'static, Result<Answer, Fault>> + Send + Sync,
{
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        self(ask)
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        let asks = digests.iter().map(|digest| {
            self(Ask { key: Key::Blob(*digest), from: 0 }).map(|answer| {
                Ok(match answer? {
                    Answer::Bytes(incoming) => Stat::Present(incoming.size),
                    _ => Stat::Absent,
                })
            })
        });
        futures::future::try_join_all(asks).boxed()
    }
}
