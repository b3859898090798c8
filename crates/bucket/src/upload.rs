//! How an upload gets into a bucket: up to 16 MiB in one request, else in parts that are joined only after the digest has matched.

use crate::{
    blobs::Bucket,
    fault::{fault, unusable},
    metrics::Metrics,
    transport::Failure,
};
use bytes::{Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Lease, Limit, Next, Put, Upload};
use http::StatusCode;
use object_store::{Error, MultipartUpload, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, UploadPart, path::Path};
use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::oneshot,
    task::{JoinSet, spawn_blocking},
};

/// Up to this size a blob is one request.
const ONE_REQUEST: u64 = 16 << 20;
/// The size of a part. Stores take 10,000 of them.
const PART: u64 = 8 << 20;
/// The least size of a part but the last.
const LEAST: u64 = 5 << 20;
/// A blob over this size has larger parts, so that there are not too many.
const MANY_PARTS: u64 = PART * 8_000;
/// How many parts of one upload are under way at once.
const PARTS_AT_ONCE: usize = 4;
/// The pause before `fill.memory` is asked again.
const PAUSE: Duration = Duration::from_millis(20);

impl Bucket {
    pub(crate) async fn store_upload(&self, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        let seen = self.seen();
        let named = upload.digest().copied();
        let (digest, size, put) = if let Some(digest) = named.or_else(|| upload.verified().map(|(digest, _)| digest)) {
            if let Some(size) = self.size(&digest).await?.filter(|size| upload.size().is_none_or(|announced| announced == *size)) {
                return self.take_for_stored(&digest, size, seen, upload).await;
            }
            let put = self.send(digest, &mut Pieces::Upload(upload)).await?;
            let (_, size) = upload.verified().ok_or_else(|| unusable("PUT: the store answered before it had all bytes"))?;
            (digest, size, put)
        } else {
            // Without a name it is spooled until its end.
            let (file, _lease) = self.spool(upload).await?;
            let Some((digest, size)) = upload.verified() else {
                return Err(Fault::Internal("an upload ended before its digest was known".into()));
            };
            if self.size(&digest).await? == Some(size) {
                return Ok(Put::Existed);
            }
            (digest, size, self.send(digest, &mut Pieces::File { file: Arc::new(file), at: 0, size }).await?)
        };
        self.note(&digest, size, seen);
        Ok(put)
    }

    /// Stores a blob that the caller has just seen to be absent, or to have another size. Asks no more about it.
    ///
    /// # Errors
    /// As [`castier_cache::Store::put`].
    pub async fn put_absent(&self, digest: Digest, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        self.send(digest, &mut Pieces::Upload(upload)).await
    }

    /// Reads an upload of a blob that the bucket has, with `size` bytes. The client's bytes must be that blob all the same.
    async fn take_for_stored(&self, digest: &Digest, size: u64, seen: u64, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        upload.drain().await?;
        // It may have been deleted while the client sent it. Its bytes are gone: the client has to send them again.
        let is_there = self.seen() == seen || self.head(&self.path(digest)).await?.is_some();
        match upload.verified() {
            Some((_, sent)) if sent != size => Err(unusable(format!("PUT: the object has {size} bytes in place of {sent}; delete it"))),
            _ if is_there => Ok(Put::Existed),
            _ => Err(Fault::Busy(Limit::Origin)),
        }
    }

    /// Writes an upload to a file without a name.
    async fn spool(&self, upload: &mut Upload<'_>) -> Result<(File, Lease), Fault> {
        let dir = self.spool_dir.clone();
        let mut lease = self.spool.empty();
        let mut file = self.blocking(move || tempfile::tempfile_in(dir)).await?;
        loop {
            let (bytes, is_last) = match upload.next().await? {
                Next::Part(bytes) => (bytes, false),
                Next::Last(bytes) => (bytes, true),
            };
            if !lease.grow(bytes.len() as u64) {
                return Err(Fault::Busy(Limit::Spool));
            }
            file = self.blocking(move || file.write_all(&bytes).map(|()| file)).await?;
            if is_last {
                return Ok((file, lease));
            }
        }
    }

    /// Runs work on a file in `fill.spool_dir`, and waits for `origin.read_timeout` at most.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Fault> {
        match tokio::time::timeout(self.limit, spawn_blocking(work)).await {
            Ok(Ok(Ok(done))) => Ok(done),
            Ok(Ok(Err(error))) if error.kind() == io::ErrorKind::StorageFull => Err(Fault::Busy(Limit::Spool)),
            Ok(Ok(Err(error))) => Err(Fault::Internal(format!("fill.spool_dir: an upload cannot be written: {error}"))),
            Ok(Err(stopped)) => Err(Fault::Internal(stopped.to_string())),
            Err(_) => Err(Fault::Busy(Limit::Spool)),
        }
    }

    async fn send(&self, digest: Digest, pieces: &mut Pieces<'_, '_>) -> Result<Put, Fault> {
        let part_size = pieces.size().map_or(PART, |size| if size > MANY_PARTS { size / 8_000 } else { PART });
        let mut parts =
            Parts { bucket: self, path: self.path(&digest), waiting: Vec::new(), upload: None, size: 0, under_way: JoinSet::new() };
        let mut part = Part::empty(self);
        loop {
            let next = pieces.next(self).await?;
            let is_last = matches!(next, Next::Last(_));
            let (Next::Part(mut bytes) | Next::Last(mut bytes)) = next;
            while !bytes.is_empty() {
                if parts.waiting_bytes() >= ONE_REQUEST {
                    parts.flush().await?;
                }
                let missing = usize::try_from(part_size - part.size()).unwrap_or(usize::MAX);
                let piece = bytes.split_to(bytes.len().min(missing));
                let deadline = Instant::now() + self.limit;
                while !part.reserve(piece.len()) {
                    parts.free_memory(&mut part, deadline).await?;
                }
                // Copied, so that a client which sends single bytes costs no more than they are.
                part.payload.extend_from_slice(&piece);
                if part.size() >= part_size {
                    parts.waiting.push(std::mem::replace(&mut part, Part::empty(self)));
                }
            }
            if is_last {
                parts.waiting.push(part);
                // All bytes have matched: see `Upload::next`.
                return parts.finish().await;
            }
        }
    }

    /// Creates an object that does not exist yet, where the store can tell; else it is replaced by the same bytes.
    async fn put_whole(&self, path: &Path, payload: PutPayload) -> Result<Put, Fault> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(path, payload.clone(), options).await {
            Ok(_) => return Ok(Put::Created),
            // 412, or a 409 for another upload at the same time, which may still fail. An object of another size is replaced.
            Err(Error::AlreadyExists { .. }) => {
                if self.head(path).await? == Some(payload.content_length() as u64) {
                    return Ok(Put::Existed);
                }
            }
            Err(error) if lacks_conditions(&error) => {}
            Err(error) => return Err(fault("PUT", &error)),
        }
        self.store.put(path, payload).await.map(|_| Put::Created).map_err(|error| fault("PUT", &error))
    }
}

/// The bytes of an upload, or of the file that it was spooled to.
enum Pieces<'u, 'b> {
    Upload(&'u mut Upload<'b>),
    File { file: Arc<File>, at: u64, size: u64 },
}

impl Pieces<'_, '_> {
    fn size(&self) -> Option<u64> {
        match self {
            Self::Upload(upload) => upload.size(),
            Self::File { size, .. } => Some(*size),
        }
    }

    async fn next(&mut self, bucket: &Bucket) -> Result<Next, Fault> {
        match self {
            Self::Upload(upload) => upload.next().await,
            Self::File { file, at, size } => {
                let (file, from, length) = (file.clone(), *at, (*size - *at).min(1 << 20));
                let read = move || {
                    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                    let mut file = &*file;
                    file.seek(SeekFrom::Start(from))?;
                    file.read_exact(&mut bytes).map(|()| Bytes::from(bytes))
                };
                let bytes = bucket.blocking(read).await?;
                *at += length;
                Ok(if at == size { Next::Last(bytes) } else { Next::Part(bytes) })
            }
        }
    }
}

/// Bytes that wait to be sent, and their share of `fill.memory`.
struct Part {
    payload: BytesMut,
    lease: Lease,
}

impl Part {
    fn empty(bucket: &Bucket) -> Self {
        Self { payload: BytesMut::new(), lease: bucket.memory.empty() }
    }

    fn size(&self) -> u64 {
        self.payload.len() as u64
    }

    /// Leases memory for so many bytes more; false if there is none. What is allocated counts, which may be twice what is in it.
    fn reserve(&mut self, more: usize) -> bool {
        let (size, capacity) = (self.payload.len() + more, self.payload.capacity());
        self.lease.cover(if size > capacity { size.max(2 * self.payload.len()) } else { capacity } as u64)
    }
}

/// An upload in parts. It is aborted unless it is completed: when the digest does not match, when the client leaves, or when a part fails.
struct Parts<'b> {
    bucket: &'b Bucket,
    path: Path,
    /// Full parts. If there are few when the upload ends, they are one request.
    waiting: Vec<Part>,
    /// `None` until the upload has begun at the store.
    upload: Option<Box<dyn MultipartUpload>>,
    /// The bytes of all parts so far.
    size: u64,
    under_way: JoinSet<(Result<(), Error>, Lease)>,
}

impl Parts<'_> {
    fn waiting_bytes(&self) -> u64 {
        self.waiting.iter().map(Part::size).sum()
    }

    /// Sends the parts that wait.
    async fn flush(&mut self) -> Result<(), Fault> {
        if self.upload.is_none() {
            self.upload = Some(begin(self.bucket, self.path.clone()).await?);
        }
        for part in std::mem::take(&mut self.waiting) {
            while self.under_way.len() >= PARTS_AT_ONCE {
                self.sent().await?;
            }
            let Some(upload) = &mut self.upload else { continue };
            self.size += part.size();
            let sending: UploadPart = upload.put_part(part.payload.freeze().into());
            self.under_way.spawn(async move { (sending.await, part.lease) });
        }
        Ok(())
    }

    /// Waits until one part has been sent. False: none is under way.
    async fn sent(&mut self) -> Result<bool, Fault> {
        match self.under_way.join_next().await {
            Some(Ok((Ok(()), _lease))) => Ok(true),
            Some(Ok((Err(error), _))) => Err(fault("PUT", &error)),
            Some(Err(stopped)) => Err(Fault::Internal(stopped.to_string())),
            None => Ok(false),
        }
    }

    /// Memory is short. Sends what can be sent, else waits for others to give some back.
    async fn free_memory(&mut self, part: &mut Part, deadline: Instant) -> Result<(), Fault> {
        if !self.waiting.is_empty() {
            return self.flush().await;
        }
        if self.sent().await? {
            return Ok(());
        }
        if part.size() >= LEAST {
            let full = std::mem::replace(part, Part::empty(self.bucket));
            self.waiting.push(full);
            return self.flush().await;
        }
        if Instant::now() >= deadline {
            return Err(Fault::Busy(Limit::Fills));
        }
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    async fn finish(mut self) -> Result<Put, Fault> {
        if self.upload.is_none() && self.waiting_bytes() <= ONE_REQUEST {
            let parts = std::mem::take(&mut self.waiting);
            let (payload, _leases): (Vec<_>, Vec<_>) = parts.into_iter().map(|part| (part.payload.freeze(), part.lease)).unzip();
            return self.bucket.put_whole(&self.path, payload.into_iter().collect()).await;
        }
        self.waiting.retain(|part| part.size() > 0);
        self.flush().await?;
        while self.sent().await? {}
        let Some(upload) = &mut self.upload else { return Err(Fault::Internal("an upload in parts was not begun".into())) };
        match upload.complete().await {
            Ok(_) => {
                self.upload = None;
                Ok(Put::Created)
            }
            // Of several uploads of one blob at once, the first that is completed takes the parts of the others away, in Azure.
            Err(error) => match self.bucket.head(&self.path).await {
                Ok(Some(size)) if size == self.size => Ok(Put::Existed),
                _ => Err(fault("PUT", &error)),
            },
        }
    }
}

/// Begins the upload in a task of its own: if the client leaves meanwhile, it is aborted as soon as the store has named it.
async fn begin(bucket: &Bucket, path: Path) -> Result<Box<dyn MultipartUpload>, Fault> {
    let (tell, told) = oneshot::channel();
    let (store, path, end) = (bucket.store.clone(), path, bucket.end());
    bucket.ends.spawn(async move {
        if let Err(Ok(upload)) = tell.send(store.put_multipart(&path).await) {
            end.abort(upload).await;
        }
    });
    match told.await {
        Ok(begun) => begun.map_err(|error| fault("PUT", &error)),
        Err(_) => Err(Fault::Internal("the beginning of an upload was not told".into())),
    }
}

impl Drop for Parts<'_> {
    fn drop(&mut self) {
        let Some(upload) = self.upload.take() else { return };
        let (end, mut under_way) = (self.bucket.end(), std::mem::take(&mut self.under_way));
        // A drop cannot wait. `Bucket::close` waits for it.
        self.bucket.ends.spawn(async move {
            // A part that arrives after the abort would stay.
            under_way.shutdown().await;
            end.abort(upload).await;
        });
    }
}

/// Ends uploads that are given up.
struct End {
    limit: Duration,
    metrics: Arc<Metrics>,
}

impl Bucket {
    fn end(&self) -> End {
        End { limit: self.limit, metrics: self.metrics.clone() }
    }
}

impl End {
    async fn abort(self, mut upload: Box<dyn MultipartUpload>) {
        self.metrics.aborted();
        match tokio::time::timeout(self.limit, upload.abort()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "an upload to the bucket could not be aborted; its parts stay until a rule of the bucket removes them")
            }
            Err(_) => tracing::warn!(
                "an upload to the bucket could not be aborted in time; its parts stay until a rule of the bucket removes them"
            ),
        }
    }
}

/// The store does not know conditional uploads.
pub(crate) fn lacks_conditions(error: &Error) -> bool {
    let is_unknown = matches!(Failure::of(error), Some(Failure::Status { status: StatusCode::NOT_IMPLEMENTED, .. }));
    is_unknown || matches!(error, Error::NotImplemented { .. } | Error::NotSupported { .. })
}
