//! The operations of the service on a bucket of an object store.

use crate::{
    Shared,
    entries::Member,
    intake::{Broken, Intake},
    refused::Refused,
    reply::{Content, Streaming, chunk_for},
    server::Slot,
    service::{Answer, Operations, condition, location, tag},
    webdav::{self, Depth, Listing},
};
use bytes::{Bytes, BytesMut};
use castier_blob::{Digest, Sink, Verifier};
use castier_bucket::{Delete, Listed, Objects, PutEntry};
use castier_cache::{Ask, Fault, Incoming, Key, Lease, Limit, Put, Stat, Upload};
use castier_serverkit::multipart;
use castier_wire::{Selection, Stored, blob_head, entry::Name, entry_head, names_this_blob, select};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, request};
use parking_lot::Mutex;
use std::{convert::Infallible, sync::Arc, time::SystemTime};

/// The operations on a bucket.
pub(crate) struct BucketOps<'s> {
    pub(crate) shared: &'s Shared,
    pub(crate) bucket: &'s Arc<dyn Objects>,
}

impl BucketOps<'_> {
    async fn size(&self, digest: &Digest) -> Result<Option<u64>, Fault> {
        match self.bucket.stat(std::slice::from_ref(digest)).await?.first() {
            Some(Stat::Present(size)) => Ok(Some(size.unwrap_or(0))),
            _ => Ok(None),
        }
    }

    /// The bytes of a blob from an offset on.
    async fn open(&self, digest: Digest, from: u64) -> Result<Incoming, Refused> {
        match self.bucket.open(Ask { key: Key::Blob(digest), from }).await? {
            castier_cache::Answer::Bytes(incoming) => Ok(incoming),
            _ => Err(Refused::Absent),
        }
    }

    async fn store(
        &self,
        claimed: Option<Digest>,
        size: Option<u64>,
        body: impl Stream<Item = Result<Bytes, Refused>> + Send,
    ) -> Result<(Put, Digest, u64), Refused> {
        let most = self.shared.limits.load().max_blob.get();
        let (_slot, _) = Slot::take(&self.shared.transfers);
        // The upload knows faults only. What the client has done wrong is noted beside.
        let refused = Mutex::new(None);
        let body = limited(body, most).map_err(|error| {
            let fault = Fault::ClientGone(error.to_string());
            *refused.lock() = Some(error);
            fault
        });
        let stored = async {
            let mut upload = Upload::new(claimed, size, body.boxed()).await?;
            let put = self.bucket.put(&mut upload).await?;
            let (digest, size) =
                upload.verified().ok_or_else(|| Fault::Internal("an upload was acknowledged before all of it had come".into()))?;
            Ok((put, digest, size))
        };
        stored.await.map_err(|fault: Fault| refused.lock().take().unwrap_or_else(|| fault.into()))
    }

    fn most_entry(&self) -> u64 {
        self.shared.limits.load().max_entry.get()
    }

    /// The body of an entry, whole.
    async fn whole(&self, mut intake: Intake) -> Result<(Bytes, Lease), Refused> {
        let most = self.most_entry();
        if intake.declared().is_some_and(|length| length > most) {
            return Err(Refused::EntryTooLarge(most));
        }
        let (mut bytes, mut lease) = (BytesMut::new(), self.bucket.lease());
        while let Some(part) = intake.try_next().await? {
            if (bytes.len() + part.len()) as u64 > most {
                return Err(Refused::EntryTooLarge(most));
            }
            // What is allocated may be twice what is in it.
            if !lease.cover(2 * (bytes.len() + part.len()) as u64) {
                return Err(Fault::Busy(Limit::Fills).into());
            }
            bytes.extend_from_slice(&part);
        }
        Ok((bytes.freeze(), lease))
    }
}

impl Operations for BucketOps<'_> {
    async fn get(&self, digest: Digest, head: request::Parts) -> Result<Answer, Refused> {
        if names_this_blob(&head.headers, &digest) {
            let (status, headers) = blob_head(&digest, None, Selection::NotModified);
            return Ok((status, headers, Content::Empty));
        }
        let is_get = head.method == Method::GET;
        let plain = is_get && !head.headers.contains_key(header::RANGE);
        // A plain GET needs no HEAD before it.
        let (size, whole) = if plain {
            let incoming = self.open(digest, 0).await?;
            (incoming.size.unwrap_or(0), Some(incoming))
        } else {
            (self.size(&digest).await?.ok_or(Refused::Absent)?, None)
        };
        let selection = select(&head.method, &head.headers, &digest, size);
        let (status, headers) = blob_head(&digest, Some(size), selection);
        let (first, length) = match selection {
            Selection::Whole => (0, size),
            Selection::Part { first, last } => (first, last + 1 - first),
            Selection::NotModified => (0, 0),
            Selection::Unsatisfiable => return Err(Refused::Range(headers)),
        };
        if !is_get || selection == Selection::NotModified {
            return Ok((status, headers, Content::Empty));
        }
        let incoming = match whole {
            Some(incoming) => incoming,
            None => self.open(digest, first).await?,
        };
        let bytes = if length == size { verified(digest, incoming).boxed() } else { first_of(length, incoming).boxed() };
        Ok((status, headers, Content::Stream(bytes)))
    }

    async fn put(&self, digest: Digest, intake: Intake) -> Result<Answer, Refused> {
        let most = self.shared.limits.load().max_blob.get();
        if intake.declared().is_some_and(|length| length > most) {
            return Err(Refused::TooLarge(most));
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, location(&digest));
        if intake.waits() && self.bucket.holds(&digest, intake.declared()).await?.is_some() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            return Ok((StatusCode::OK, headers, Content::Empty));
        }
        let (put, ..) = self.store(Some(digest), intake.declared(), intake.map_err(Refused::from)).await?;
        Ok((if put == Put::Created { StatusCode::CREATED } else { StatusCode::OK }, headers, Content::Empty))
    }

    async fn post(&self, headers: &HeaderMap, intake: Intake) -> Result<Answer, Refused> {
        let most = self.shared.limits.load().max_blob.get();
        let extra = if multipart::is_form(headers) { multipart::OVERHEAD } else { 0 };
        if intake.declared().is_some_and(|length| length > most.saturating_add(extra)) {
            return Err(Refused::TooLarge(most));
        }
        let (_, digest, size) = match multipart::boundary(headers).map_err(|error| Refused::Form(error.to_string()))? {
            Some(boundary) => self.store(None, None, multipart::first_file(intake, boundary, u64::MAX).map_err(Refused::from)).await?,
            None => self.store(None, intake.declared(), intake.map_err(Refused::from)).await?,
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, location(&digest));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let body = serde_json::to_vec(&Stored { digest: digest.to_string(), size });
        Ok((StatusCode::CREATED, headers, Content::Bytes(body.unwrap_or_default().into())))
    }

    async fn delete(&self, digest: Digest) -> Result<Answer, Refused> {
        if self.bucket.delete(&digest).await? {
            Ok((StatusCode::NO_CONTENT, HeaderMap::new(), Content::Empty))
        } else {
            Err(Refused::Absent)
        }
    }

    async fn get_entry(&self, name: Name, head: request::Parts, _validate: bool) -> Result<Answer, Refused> {
        let entry = self.bucket.entry(&name, self.most_entry()).await?.ok_or(Refused::NoEntry)?;
        let size = entry.bytes.len() as u64;
        let selection = select(&head.method, &head.headers, &entry.digest, size);
        let (status, headers) = entry_head(&entry.digest, size, selection);
        let usize_of = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(entry.bytes.len());
        let bytes = match selection {
            Selection::Whole => entry.bytes.clone(),
            Selection::Part { first, last } => entry.bytes.slice(usize_of(first)..usize_of(last + 1)),
            Selection::NotModified => Bytes::new(),
            Selection::Unsatisfiable => return Err(Refused::Range(headers)),
        };
        let is_empty = head.method != Method::GET || selection == Selection::NotModified;
        Ok((status, headers, if is_empty { Content::Empty } else { Content::Bytes(bytes) }))
    }

    async fn put_entry(&self, name: Name, headers: &HeaderMap, intake: Intake) -> Result<Answer, Refused> {
        let condition = condition(headers);
        let (bytes, _lease) = self.whole(intake).await?;
        let (status, digest) = match self.bucket.put_entry(&name, bytes, condition, self.most_entry()).await? {
            PutEntry::Created(digest) => (StatusCode::CREATED, digest),
            PutEntry::Replaced(digest) => (StatusCode::OK, digest),
            PutEntry::Refused => return Err(Refused::Condition),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::ETAG, tag(&digest));
        Ok((status, headers, Content::Empty))
    }

    async fn delete_entry(&self, name: Name, headers: &HeaderMap) -> Result<Answer, Refused> {
        match self.bucket.remove_entry(&name, condition(headers), self.most_entry()).await? {
            Delete::Done => Ok((StatusCode::NO_CONTENT, HeaderMap::new(), Content::Empty)),
            Delete::Absent => Err(Refused::NoEntry),
            Delete::Refused => Err(Refused::Condition),
        }
    }

    async fn list(&self, name: Name, headers: &HeaderMap) -> Result<Answer, Refused> {
        let depth = Depth::of(headers).ok_or(Refused::Depth)?;
        let member = |name: Name, size: Option<u64>, modified: Option<SystemTime>| Member {
            name,
            content: size.map(|size| (size, None)),
            modified: modified.unwrap_or(SystemTime::UNIX_EPOCH),
        };
        let itself = if name.is_collection() { None } else { self.bucket.find_entry(&name).await? };
        let (resource, members) = match itself {
            Some(Listed { size, modified, .. }) => (member(name, size, modified), Vec::new()),
            None => {
                // A bucket has no collections: one exists if it has members. The root always exists.
                let name = name.to_collection();
                if name != Name::root() && !self.bucket.has_members(&name).await? {
                    return Err(Refused::NoEntry);
                }
                let of = |listed: Listed| {
                    let slash = if listed.size.is_none() { "/" } else { "" };
                    let name = Name::from_stored(&format!("{}{}{slash}", name.as_str(), listed.name))?;
                    Some(member(name, listed.size, listed.modified))
                };
                let members = if depth == Depth::Members { self.bucket.members(&name).await? } else { Vec::new() };
                let members = members.into_iter().filter_map(of).collect();
                (member(name, None, None), members)
            }
        };
        let (slot, transfers) = Slot::take(&self.shared.transfers);
        let listing = Listing::new(&resource, Some(Box::new(members.into_iter().map(Ok))))?;
        let listing = Streaming::new(Bytes::new(), listing, chunk_for(transfers), slot);
        Ok((StatusCode::MULTI_STATUS, webdav::headers(), Content::Blob(listing)))
    }

    async fn make_collection(&self, name: Name, intake: &Intake) -> Result<Answer, Refused> {
        if intake.declared() != Some(0) {
            return Err(Refused::CollectionBody);
        }
        // There is nothing to make. But an entry may have the name.
        if !name.is_collection() && self.bucket.find_entry(&name).await?.is_some() {
            return Err(Refused::CollectionExists);
        }
        Ok((StatusCode::CREATED, HeaderMap::new(), Content::Empty))
    }
}

/// A body that ends with an error after `most` bytes.
fn limited(body: impl Stream<Item = Result<Bytes, Refused>>, most: u64) -> impl Stream<Item = Result<Bytes, Refused>> {
    let mut seen = 0;
    body.map(move |part| {
        let part = part?;
        seen += part.len() as u64;
        if seen > most { Err(Refused::TooLarge(most)) } else { Ok(part) }
    })
}

/// The first `length` bytes.
fn first_of(length: u64, incoming: Incoming) -> impl Stream<Item = Result<Bytes, Fault>> {
    stream::try_unfold((length, incoming), async |(left, mut incoming)| {
        if left == 0 {
            return Ok(None);
        }
        let Some(mut bytes) = incoming.next().await? else {
            return Err(Fault::Unreachable { source_name: "origin", why: "the object ended early".into() });
        };
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        Ok(Some((bytes.clone(), (left - bytes.len() as u64, incoming))))
    })
}

/// The bytes of a whole blob. The last of them come only if all of them match the digest.
fn verified(digest: Digest, incoming: Incoming) -> impl Stream<Item = Result<Bytes, Fault>> {
    let state = (Some(Verifier::of(digest, Nowhere)), Bytes::new(), incoming);
    stream::try_unfold(state, async |(verifier, mut held, mut incoming)| {
        let Some(mut verifier) = verifier else { return Ok(None) };
        while let Some(bytes) = incoming.next().await? {
            let Ok(()): Result<(), Infallible> = verifier.write(&bytes);
            let ready = std::mem::replace(&mut held, bytes);
            if !ready.is_empty() {
                return Ok(Some((ready, (Some(verifier), held, incoming))));
            }
        }
        verifier.finish().map_err(|mismatch| Fault::Corrupt { source_name: "origin", mismatch })?;
        Ok(Some((held, (None, Bytes::new(), incoming))))
    })
}

/// The verifier's sink: the bytes go to the client.
struct Nowhere;

impl Sink for Nowhere {
    type Content = ();
    type Error = Infallible;

    fn write(&mut self, _: &Bytes) -> Result<(), Infallible> {
        Ok(())
    }

    fn close(self) {}
}

impl From<Fault> for Refused {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Mismatch(mismatch) => Self::Store(mismatch.into()),
            Fault::ClientSilent => Self::Body(Broken::Silent),
            Fault::ClientGone(_) => Self::Body(Broken::Off),
            Fault::NotAllowed => Self::Method("GET, HEAD, PUT"),
            fault => Self::Bucket(fault),
        }
    }
}
