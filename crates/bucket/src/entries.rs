//! The entries of `/ac` and `/kv` in a bucket: one object each, named as its path. They are small, and are read whole.

use crate::{
    blobs::Bucket,
    fault::{fault, unusable},
    upload::lacks_conditions,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Lease, Limit, Store};
use castier_wire::entry::Name;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{Error, ObjectStore as _, ObjectStoreExt as _, PutMode, PutOptions, UpdateVersion};
use percent_encoding::percent_decode_str;
use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

/// The most members that a list may have.
pub const MOST_MEMBERS: usize = 10_000;
/// The most objects that are looked at for a list: stores give a thousand at a time.
pub const MOST_LISTED: usize = 100_000;

/// One version of an entry.
pub struct Entry {
    /// Its bytes.
    pub bytes: Bytes,
    /// Their SHA-256, which is its version for clients.
    pub digest: Digest,
    /// The store's own version, for a condition. `None`: it is not from the store.
    version: Option<UpdateVersion>,
}

impl Entry {
    /// An entry with these bytes, which the store does not have yet.
    pub fn new(bytes: Bytes) -> Self {
        Self { digest: Digest::of(&bytes), bytes, version: None }
    }
}

/// The condition of a PUT or a DELETE, on the digest of the current version.
pub type Condition = Box<dyn FnOnce(Option<&Digest>) -> bool + Send>;

/// The result of a PUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutEntry {
    /// There was no entry of this name.
    Created(Digest),
    /// It has replaced another version.
    Replaced(Digest),
    /// The condition did not hold, and nothing changed.
    Refused,
}

/// The result of a DELETE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delete {
    /// The entry was removed.
    Done,
    /// There is none.
    Absent,
    /// The condition did not hold, and nothing changed.
    Refused,
}

/// An entry or a collection in a list.
pub struct Listed {
    /// Its last part, without a slash.
    pub name: String,
    /// The size of an entry; a collection has none.
    pub size: Option<u64>,
    /// When it was last changed, if the store tells it.
    pub modified: Option<SystemTime>,
}

impl Listed {
    /// An entry of so many bytes, changed so many milliseconds after 1970.
    pub fn entry(name: &Name, size: u64, changed: u64) -> Self {
        Self { name: name.last().to_owned(), size: Some(size), modified: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(changed)) }
    }
}

/// A store of blobs and of entries: a bucket, or what stands before one.
#[async_trait]
pub trait Objects: Store {
    /// The size of a blob that was seen to be stored less than `origin.existence_ttl` ago. Asks nobody.
    fn known(&self, digest: &Digest) -> Option<u64>;

    /// A share of `fill.memory` for an entry that comes from a client.
    fn lease(&self) -> Lease;

    /// An entry of at most `most` bytes; `None` if there is none.
    ///
    /// # Errors
    /// As [`castier_cache::Source::open`]; a larger entry cannot be used.
    async fn entry(&self, name: &Name, most: u64) -> Result<Option<Entry>, Fault>;

    /// An entry as a list shows it; `None` if there is none.
    ///
    /// # Errors
    /// As [`castier_cache::Source::open`].
    async fn find_entry(&self, name: &Name) -> Result<Option<Listed>, Fault>;

    /// Whether an entry of this name can be stored. Asks nobody: a store may still refuse it.
    ///
    /// # Errors
    /// [`Fault::BadRequest`]: the name is too long.
    fn check_name(&self, name: &Name) -> Result<(), Fault>;

    /// Stores an entry, in place of the version that was there. `most`: the most bytes of that, if a condition asks about it.
    ///
    /// # Errors
    /// As [`castier_cache::Store::put`].
    async fn put_entry(&self, name: &Name, bytes: Bytes, condition: Option<Condition>, most: u64) -> Result<PutEntry, Fault>;

    /// Removes an entry. A condition is looked at before, and not by the store: another client may come in between.
    ///
    /// # Errors
    /// As [`castier_cache::Store::delete`].
    async fn remove_entry(&self, name: &Name, condition: Option<Condition>, most: u64) -> Result<Delete, Fault>;

    /// Whether a collection has members.
    ///
    /// # Errors
    /// As [`castier_cache::Source::open`].
    async fn has_members(&self, collection: &Name) -> Result<bool, Fault>;

    /// The members of a collection.
    ///
    /// # Errors
    /// As [`castier_cache::Source::open`]; [`Fault::Busy`] if there are more than [`MOST_MEMBERS`], or more than [`MOST_LISTED`] objects below it.
    async fn members(&self, collection: &Name) -> Result<Vec<Listed>, Fault>;
}

/// The bytes of an entry, and their share of `fill.memory`.
struct Leased {
    bytes: Bytes,
    _lease: Lease,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[async_trait]
impl Objects for Bucket {
    fn known(&self, digest: &Digest) -> Option<u64> {
        self.known.get(digest)
    }

    fn lease(&self) -> Lease {
        self.memory.empty()
    }

    async fn entry(&self, name: &Name, most: u64) -> Result<Option<Entry>, Fault> {
        let got = match self.store.get(&self.entry_path(name.as_str())).await {
            Ok(got) => got,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(fault("GET", &error)),
        };
        if got.meta.size > most {
            return Err(unusable(format!("GET: an entry of {} bytes, over limits.max_entry", got.meta.size)));
        }
        // Held as long as somebody reads the bytes.
        let Some(lease) = self.memory.lease(got.meta.size) else { return Err(Fault::Busy(Limit::Fills)) };
        let version = Some(UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() });
        let mut bytes = BytesMut::new();
        let mut stream = got.into_stream();
        while let Some(part) = stream.try_next().await.map_err(|error| fault("GET", &error))? {
            if bytes.len() as u64 + part.len() as u64 > most {
                return Err(unusable("GET: an entry is longer than the store has announced"));
            }
            bytes.extend_from_slice(&part);
        }
        let bytes = Bytes::from_owner(Leased { bytes: bytes.freeze(), _lease: lease });
        Ok(Some(Entry { digest: Digest::of(&bytes), bytes, version }))
    }

    async fn find_entry(&self, name: &Name) -> Result<Option<Listed>, Fault> {
        match self.store.head(&self.entry_path(name.as_str())).await {
            Ok(meta) => Ok(Some(Listed { name: name.last().to_owned(), size: Some(meta.size), modified: Some(meta.last_modified.into()) })),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(fault("HEAD", &error)),
        }
    }

    fn check_name(&self, name: &Name) -> Result<(), Fault> {
        self.new_entry_path(name).map(drop)
    }

    async fn put_entry(&self, name: &Name, bytes: Bytes, condition: Option<Condition>, most: u64) -> Result<PutEntry, Fault> {
        let (path, digest) = (self.new_entry_path(name)?, Digest::of(&bytes));
        let Some(condition) = condition else {
            let existed = self.head(&path).await?.is_some();
            self.store.put(&path, bytes.into()).await.map_err(|error| fault("PUT", &error))?;
            return Ok(if existed { PutEntry::Replaced(digest) } else { PutEntry::Created(digest) });
        };
        let current = self.entry(name, most).await?;
        if !condition(current.as_ref().map(|entry| &entry.digest)) {
            return Ok(PutEntry::Refused);
        }
        // The store makes sure that this is still the current version.
        let (mode, done) = match current {
            Some(entry) => (entry.version.map_or(PutMode::Overwrite, PutMode::Update), PutEntry::Replaced(digest)),
            None => (PutMode::Create, PutEntry::Created(digest)),
        };
        match self.store.put_opts(&path, bytes.clone().into(), PutOptions { mode, ..PutOptions::default() }).await {
            Ok(_) => Ok(done),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                // The first attempt may have been done, and its answer lost.
                let is_ours = self.entry(name, most).await?.is_some_and(|entry| entry.digest == digest);
                Ok(if is_ours { done } else { PutEntry::Refused })
            }
            Err(error) if lacks_conditions(&error) => {
                self.store.put(&path, bytes.into()).await.map(|_| done).map_err(|error| fault("PUT", &error))
            }
            Err(error) => Err(fault("PUT", &error)),
        }
    }

    async fn remove_entry(&self, name: &Name, condition: Option<Condition>, most: u64) -> Result<Delete, Fault> {
        let path = self.entry_path(name.as_str());
        match condition {
            Some(condition) => {
                let current = self.entry(name, most).await?;
                if !condition(current.as_ref().map(|entry| &entry.digest)) {
                    return Ok(Delete::Refused);
                }
                if current.is_none() {
                    return Ok(Delete::Absent);
                }
            }
            None if self.head(&path).await?.is_none() => return Ok(Delete::Absent),
            None => {}
        }
        self.store.delete(&path).await.map(|()| Delete::Done).map_err(|error| fault("DELETE", &error))
    }

    async fn has_members(&self, collection: &Name) -> Result<bool, Fault> {
        let path = self.entry_path(collection.as_str().trim_end_matches('/'));
        Ok(self.store.list(Some(&path)).next().await.transpose().map_err(|error| fault("LIST", &error))?.is_some())
    }

    async fn members(&self, collection: &Name) -> Result<Vec<Listed>, Fault> {
        let path = self.entry_path(collection.as_str().trim_end_matches('/'));
        // `object_store` encodes what not every store takes in a key.
        let decoded = |name: &str| percent_decode_str(name).decode_utf8_lossy().into_owned();
        let (mut entries, mut collections, mut seen) = (Vec::new(), BTreeSet::new(), 0);
        let mut objects = self.store.list(Some(&path));
        while let Some(meta) = objects.next().await.transpose().map_err(|error| fault("LIST", &error))? {
            let Some(mut below) = meta.location.prefix_match(&path) else { continue };
            let Some(first) = below.next() else { continue };
            let name = decoded(first.as_ref());
            if below.next().is_some() {
                collections.insert(name);
            } else {
                entries.push(Listed { name, size: Some(meta.size), modified: Some(meta.last_modified.into()) });
            }
            seen += 1;
            if seen > MOST_LISTED || entries.len() + collections.len() > MOST_MEMBERS {
                return Err(Fault::Busy(Limit::Fills));
            }
        }
        entries.extend(collections.into_iter().map(|name| Listed { name, size: None, modified: None }));
        Ok(entries)
    }
}
