//! The two sides of a copy, each a directory or a bucket.

use super::directory::{self, Directory};
use crate::{Backend, Files, Origin, entries::Entries};
use bytes::Bytes;
use castier_blob::Digest;
use castier_bucket::{Bucket, Object, Objects as _};
use castier_cache::{Answer, Ask, Fault, Incoming, Key, Put, Source as _, Store, Upload};
use castier_wire::entry::Name;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream::BoxStream};
use std::sync::Arc;
use tokio::task::spawn_blocking;

/// What a list of a side has.
#[derive(Debug)]
pub(super) enum Found {
    Blob(Digest, u64),
    Entry(Name),
    /// An entry whose bytes are no longer what was stored. Its file.
    Damaged(String),
    /// Something that cannot be read, and why.
    Unreadable(String),
    /// Neither a blob nor an entry. Its path or key.
    Other(String),
}

/// A side that is read: the source, and with `--dry-run` the destination.
#[derive(Clone)]
pub(super) enum Side {
    Directory(Arc<Directory>),
    Bucket(Arc<Bucket>),
}

impl Side {
    pub(super) fn objects(self) -> BoxStream<'static, Result<Found, Fault>> {
        match self {
            Self::Directory(directory) => directory.objects().boxed(),
            Self::Bucket(bucket) => bucket_objects(bucket).boxed(),
        }
    }

    /// The size of a blob; `None` if it is not there.
    pub(super) async fn size(&self, digest: Digest) -> Result<Option<u64>, Fault> {
        match self {
            Self::Directory(directory) => directory.size(digest).await,
            Self::Bucket(bucket) => bucket.holds(&digest, None).await,
        }
    }

    /// The bytes of a blob from an offset on; `None` if it is not there.
    pub(super) async fn open(&self, digest: Digest, from: u64) -> Result<Option<Incoming>, Fault> {
        match self {
            Self::Directory(directory) => directory.open(digest, from).await,
            Self::Bucket(bucket) => match bucket.open(Ask { key: Key::Blob(digest), from }).await? {
                Answer::Bytes(incoming) => Ok(Some(incoming)),
                _ => Ok(None),
            },
        }
    }

    /// An entry of at most `most` bytes; `None` if it is not there.
    pub(super) async fn entry(&self, name: &Name, most: u64) -> Result<Option<(Digest, Bytes)>, Fault> {
        match self {
            Self::Directory(directory) => directory.entry(name.clone(), most).await,
            Self::Bucket(bucket) => Ok(bucket.entry(name, most).await?.map(|entry| (entry.digest, entry.bytes))),
        }
    }

    pub(super) fn bucket(&self) -> Option<&Arc<Bucket>> {
        match self {
            Self::Directory(_) => None,
            Self::Bucket(bucket) => Some(bucket),
        }
    }
}

fn bucket_objects(bucket: Arc<Bucket>) -> impl Stream<Item = Result<Found, Fault>> + Send {
    // The list borrows the bucket, so a task of its own has both.
    let (tell, told) = tokio::sync::mpsc::channel(directory::AHEAD);
    tokio::spawn(async move {
        let mut objects = std::pin::pin!(bucket.objects().map_ok(|object| match object {
            Object::Blob(digest, size) => Found::Blob(digest, size),
            Object::Entry(name, _) => Found::Entry(name),
            Object::Other(key) => Found::Other(key),
        }));
        while let Some(found) = objects.next().await {
            if tell.send(found).await.is_err() {
                return;
            }
        }
    });
    directory::received(told)
}

/// The side that is written.
#[derive(Clone)]
pub(super) enum Destination {
    /// Nothing is written there.
    Dry(Side),
    Bucket(Arc<Bucket>),
    Directory(Origin, Arc<dyn Store>),
}

impl Destination {
    pub(super) fn directory(origin: Origin, config: &castier_config::Origin) -> Self {
        let store = origin.local(config);
        Self::Directory(origin, store)
    }

    /// Whether it has a blob of this size, durably.
    pub(super) async fn holds(&self, digest: Digest, size: u64) -> Result<bool, Fault> {
        let known = match self {
            Self::Dry(side) => side.size(digest).await?,
            Self::Bucket(bucket) => bucket.holds(&digest, Some(size)).await?,
            Self::Directory(_, store) => store.holds(&digest, Some(size)).await?,
        };
        Ok(known == Some(size))
    }

    /// Stores a blob that was just seen to be absent, or to have another size.
    pub(super) async fn put(&self, digest: Digest, upload: &mut Upload<'_>) -> Result<(), Fault> {
        let put = match self {
            Self::Dry(_) => Ok(Put::Existed),
            Self::Bucket(bucket) => bucket.put_absent(digest, upload).await,
            Self::Directory(_, store) => store.put(upload).await,
        };
        put.map(drop)
    }

    /// The digest of an entry; `None` if it is not there.
    pub(super) async fn entry(&self, name: &Name, most: u64) -> Result<Option<Digest>, Fault> {
        match self {
            Self::Dry(side) => Ok(side.entry(name, most).await?.map(|(digest, _)| digest)),
            Self::Bucket(bucket) => Ok(bucket.entry(name, most).await?.map(|entry| entry.digest)),
            Self::Directory(origin, _) => {
                let (entries, name) = (entries(origin)?, name.clone());
                blocking(move || Ok(entries.find(&name)?.map(|found| found.digest()))).await
            }
        }
    }

    pub(super) async fn put_entry(&self, name: &Name, bytes: Bytes, most: u64) -> Result<(), Fault> {
        match self {
            Self::Dry(_) => Ok(()),
            Self::Bucket(bucket) => bucket.put_entry(name, bytes, None, most).await.map(drop),
            Self::Directory(origin, _) => {
                let (entries, name) = (entries(origin)?, name.clone());
                let store = move || {
                    let mut upload = entries.begin(name)?;
                    upload.write(&bytes)?;
                    upload.finish(None).map(drop)
                };
                blocking(store).await
            }
        }
    }

    pub(super) fn bucket(&self) -> Option<&Arc<Bucket>> {
        match self {
            Self::Dry(_) | Self::Directory(..) => None,
            Self::Bucket(bucket) => Some(bucket),
        }
    }
}

fn entries(origin: &Origin) -> Result<Arc<Entries>, Fault> {
    match &origin.0.backend {
        Backend::Files(Files { entries, .. }) => Ok(entries.clone()),
        Backend::Bucket(_) => Err(Fault::Internal("a directory is no bucket".into())),
    }
}

/// Runs work on files.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, crate::store::Fault> + Send + 'static,
) -> Result<T, Fault> {
    let done = spawn_blocking(work).await.map_err(|stopped| Fault::Internal(stopped.to_string()))?;
    Ok(done?)
}
