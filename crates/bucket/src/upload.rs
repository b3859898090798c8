//! How an upload gets into a bucket: up to 16 MiB in one request, else in parts that are joined only after the digest has matched.

use crate::{
    blobs::Bucket,
    fault::{fault, unusable},
};
use bytes::{Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Lease, Limit, Next, Put, Upload};
use object_store::{Error, MultipartUpload, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, PutResult, UploadPart, path::Path};
use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::task::{JoinSet, spawn_blocking};

/// Up to this size a blob is one request.
const ONE_REQUEST: u64 = 16 << 20;
/// The size of a part. Stores take 10,000 of them, and none under 5 MiB but the last.
const PART: u64 = 8 << 20;
/// A blob over this size has larger parts, so that there are not too many.
const MANY_PARTS: u64 = PART * 8_000;
/// How many parts of one upload are under way at once.
const PARTS_AT_ONCE: usize = 4;
/// The pause before `fill.memory` is asked again.
const PAUSE: Duration = Duration::from_millis(20);

impl Bucket {
    pub(crate) async fn store_upload(&self, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        let named = upload.digest().copied();
        if let Some(digest) = named.or_else(|| upload.verified().map(|(digest, _)| digest)) {
            if let Some(size) = self.size(&digest).await?.filter(|size| upload.size().is_none_or(|announced| announced == *size)) {
                // The bytes must be the blob all the same.
                upload.drain().await?;
                self.note(&digest, size);
                return Ok(Put::Existed);
            }
            let put = self.send(digest, &mut Pieces::Upload(upload)).await?;
            let (_, size) = upload.verified().ok_or_else(|| unusable("PUT: the store answered before it had all bytes"))?;
            self.note(&digest, size);
            return Ok(put);
        }
        // Without a name it is spooled until its end.
        let (file, _lease) = self.spool(upload).await?;
        let Some((digest, size)) = upload.verified() else {
            return Err(Fault::Internal("an upload ended before its digest was known".into()));
        };
        if self.size(&digest).await?.is_some() {
            return Ok(Put::Existed);
        }
        let put = self.send(digest, &mut Pieces::File { file: Arc::new(file), at: 0, size }).await?;
        self.note(&digest, size);
        Ok(put)
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
        let path = self.path(&digest);
        let mut part = Part::empty(self);
        while part.size() < ONE_REQUEST {
            match pieces.next(self).await? {
                Next::Part(bytes) => part.push(self, bytes, &mut JoinSet::new()).await?,
                Next::Last(bytes) => {
                    part.push(self, bytes, &mut JoinSet::new()).await?;
                    return self.put_whole(&path, part.payload.freeze().into()).await;
                }
            }
        }
        self.put_parts(&path, part, pieces).await
    }

    /// Creates an object that does not exist yet, where the store can tell; else it is replaced by the same bytes.
    async fn put_whole(&self, path: &Path, payload: PutPayload) -> Result<Put, Fault> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(path, payload.clone(), options).await {
            Ok(_) => Ok(Put::Created),
            // 412, or a 409 for another upload at the same time, which may still fail.
            Err(Error::AlreadyExists { .. }) if self.head(path).await?.is_some() => Ok(Put::Existed),
            Err(Error::AlreadyExists { .. } | Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                self.store.put(path, payload).await.map(|_| Put::Created).map_err(|error| fault("PUT", &error))
            }
            Err(error) if is_not_implemented(&error) => {
                self.store.put(path, payload).await.map(|_| Put::Created).map_err(|error| fault("PUT", &error))
            }
            Err(error) => Err(fault("PUT", &error)),
        }
    }

    async fn put_parts(&self, path: &Path, mut part: Part, pieces: &mut Pieces<'_, '_>) -> Result<Put, Fault> {
        let part_size = pieces.size().map_or(PART, |size| if size > MANY_PARTS { size / 8_000 } else { PART });
        let begun = self.store.put_multipart(path).await.map_err(|error| fault("PUT", &error))?;
        let mut parts = Parts { bucket: self, upload: Some(begun) };
        let mut under_way = JoinSet::new();
        let mut is_last = false;
        loop {
            if part.size() >= part_size || is_last {
                let full = std::mem::replace(&mut part, Part::empty(self));
                if full.size() > 0 {
                    parts.put(full, &mut under_way)?;
                }
                if is_last {
                    break;
                }
                while under_way.len() >= PARTS_AT_ONCE {
                    sent(&mut under_way).await?;
                }
            }
            let next = pieces.next(self).await?;
            is_last = matches!(next, Next::Last(_));
            let (Next::Part(bytes) | Next::Last(bytes)) = next;
            part.push(self, bytes, &mut under_way).await?;
        }
        while sent(&mut under_way).await? {}
        // All bytes have matched: see `Upload::next`.
        parts.complete().await?;
        Ok(Put::Created)
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

/// Parts on their way. If it is dropped, they are cut.
type Sending = JoinSet<(Result<(), Error>, Lease)>;

impl Part {
    fn empty(bucket: &Bucket) -> Self {
        Self { payload: BytesMut::new(), lease: bucket.memory.empty() }
    }

    fn size(&self) -> u64 {
        self.payload.len() as u64
    }

    /// Adds bytes when there is memory for them. Parts that are under way make some.
    async fn push(&mut self, bucket: &Bucket, bytes: Bytes, under_way: &mut Sending) -> Result<(), Fault> {
        let deadline = Instant::now() + bucket.limit;
        // What is allocated counts, which may be twice what is in it.
        let size = self.payload.len() + bytes.len();
        let size = if size > self.payload.capacity() { size.max(2 * self.payload.len()) } else { self.payload.capacity() };
        while !self.lease.cover(size as u64) {
            if sent(under_way).await? {
                continue;
            }
            if Instant::now() >= deadline {
                return Err(Fault::Busy(Limit::Fills));
            }
            tokio::time::sleep(PAUSE).await;
        }
        // Copied, so that a client which sends single bytes costs no more than they are.
        self.payload.extend_from_slice(&bytes);
        Ok(())
    }
}

/// Waits until one part has been sent. False: none is under way.
async fn sent(under_way: &mut Sending) -> Result<bool, Fault> {
    match under_way.join_next().await {
        Some(Ok((Ok(()), _lease))) => Ok(true),
        Some(Ok((Err(error), _))) => Err(fault("PUT", &error)),
        Some(Err(stopped)) => Err(Fault::Internal(stopped.to_string())),
        None => Ok(false),
    }
}

/// An upload in parts. It is aborted unless it is completed: when the digest does not match, when the client leaves, or when a part fails.
struct Parts<'b> {
    bucket: &'b Bucket,
    upload: Option<Box<dyn MultipartUpload>>,
}

impl Parts<'_> {
    fn put(&mut self, part: Part, under_way: &mut Sending) -> Result<(), Fault> {
        let Some(upload) = &mut self.upload else { return Err(Fault::Internal("a part of an upload that has ended".into())) };
        let sending: UploadPart = upload.put_part(part.payload.freeze().into());
        under_way.spawn(async move { (sending.await, part.lease) });
        Ok(())
    }

    async fn complete(mut self) -> Result<PutResult, Fault> {
        let Some(upload) = &mut self.upload else { return Err(Fault::Internal("an upload was completed twice".into())) };
        let done = upload.complete().await.map_err(|error| fault("PUT", &error))?;
        self.upload = None;
        Ok(done)
    }
}

impl Drop for Parts<'_> {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        let (limit, metrics) = (self.bucket.limit, self.bucket.metrics.clone());
        // A drop cannot wait. `Bucket::close` waits for it.
        self.bucket.ends.spawn(async move {
            metrics.aborted();
            match tokio::time::timeout(limit, upload.abort()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "an upload to the bucket could not be aborted; its parts stay until they are removed")
                }
                Err(_) => tracing::warn!("an upload to the bucket could not be aborted in time; its parts stay until they are removed"),
            }
        });
    }
}

/// 501, as the transport passes it on.
fn is_not_implemented(error: &Error) -> bool {
    error.to_string().contains("501 Not Implemented")
}
