//! The operations of the service on files.

use crate::{
    Files, Shared, action,
    entries::{Delete, Found, Put},
    intake::Intake,
    receive::{Failed, receive},
    refused::Refused,
    reply::{Content, Source, Streaming, chunk_for},
    server::Slot,
    service::{Answer, Operations, condition, location, tag},
    store::{Blob, Fault, Kept, Store, Upload},
    webdav::{self, Depth, Listing},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_serverkit::multipart;
use castier_wire::{Selection, Stored, blob_head, entry::Name, entry_head, names_this_blob, select};
use futures::{Stream, TryStreamExt as _};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, request};
use std::{ops::Range, sync::Arc};
use tokio::task::spawn_blocking;

/// The operations on an origin's files.
pub(crate) struct FileOps<'s> {
    pub(crate) shared: &'s Shared,
    pub(crate) files: &'s Files,
}

impl Operations for FileOps<'_> {
    async fn get_entry(&self, name: Name, head: request::Parts, validate: bool) -> Result<Answer, Refused> {
        let most = self.shared.limits.load().max_entry.get();
        let (slot, transfers) = Slot::take(&self.shared.transfers);
        let chunk = chunk_for(transfers);
        let (entries, store) = (Arc::clone(&self.files.entries), Arc::clone(&self.files.store));
        // A permit, since validation holds the whole entry in memory.
        let permit = if validate { Arc::clone(&self.shared.validations).acquire_owned().await.ok() } else { None };
        blocking(move || {
            let Some(found) = entries.find(&name)? else { return Err(Refused::NoEntry) };
            if validate && !is_usable(&found, &store, most)? {
                return Err(Refused::NoEntry);
            }
            drop(permit);
            let (digest, size) = (found.digest(), found.size());
            let selection = select(&head.method, &head.headers, &digest, size);
            let (status, headers) = entry_head(&digest, size, selection);
            let range: Range<u64> = match selection {
                Selection::Whole => 0..size,
                Selection::Part { first, last } => first..last + 1,
                Selection::NotModified => 0..0,
                Selection::Unsatisfiable => return Err(Refused::Range(headers)),
            };
            if head.method != Method::GET || selection == Selection::NotModified {
                return Ok((status, headers, Content::Empty));
            }
            Ok((status, headers, stream(found.read(range), chunk, slot)?))
        })
        .await
    }

    async fn put_entry(&self, name: Name, headers: &HeaderMap, mut intake: Intake) -> Result<Answer, Refused> {
        let most = self.shared.limits.load().max_entry.get();
        if intake.declared().is_some_and(|length| length > most) {
            return Err(Refused::EntryTooLarge(most));
        }
        let (entries, condition) = (Arc::clone(&self.files.entries), condition(headers));
        let chunks = (&mut intake).map_err(Refused::from);
        let begin = move || entries.begin(name);
        let put = receive(&self.shared.transfers, begin, |upload| upload.finish(condition), most, None, chunks).await;
        let (status, digest) = match put {
            Ok(Put::Created(digest)) => (StatusCode::CREATED, digest),
            Ok(Put::Replaced(digest)) => (StatusCode::OK, digest),
            Ok(Put::Refused) => return Err(Refused::Condition),
            Err(Failed::TooLarge(most)) => return Err(Refused::EntryTooLarge(most)),
            Err(failed) => return Err(failed.into()),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::ETAG, tag(&digest));
        Ok((status, headers, Content::Empty))
    }

    async fn delete_entry(&self, name: Name, headers: &HeaderMap) -> Result<Answer, Refused> {
        let (entries, condition) = (Arc::clone(&self.files.entries), condition(headers));
        match blocking(move || Ok(entries.remove(&name, condition)?)).await? {
            Delete::Done => Ok((StatusCode::NO_CONTENT, HeaderMap::new(), Content::Empty)),
            Delete::Absent => Err(Refused::NoEntry),
            Delete::Refused => Err(Refused::Condition),
        }
    }

    async fn list(&self, name: Name, headers: &HeaderMap) -> Result<Answer, Refused> {
        let depth = Depth::of(headers).ok_or(Refused::Depth)?;
        let (slot, transfers) = Slot::take(&self.shared.transfers);
        let (chunk, entries) = (chunk_for(transfers), Arc::clone(&self.files.entries));
        blocking(move || {
            let entry = if name.is_collection() { None } else { entries.find(&name)? };
            let listing = match entry {
                Some(found) => Listing::new(&found.member(), None)?,
                None => {
                    let name = name.to_collection();
                    let Some(collection) = entries.collection(&name)? else { return Err(Refused::NoEntry) };
                    let members =
                        if depth == Depth::Members { Some(Box::new(entries.members(&name)?.map(|member| Ok(member?))) as _) } else { None };
                    Listing::new(&collection, members)?
                }
            };
            Ok((StatusCode::MULTI_STATUS, webdav::headers(), stream(listing, chunk, slot)?))
        })
        .await
    }

    async fn make_collection(&self, name: Name, intake: &Intake) -> Result<Answer, Refused> {
        if intake.declared() != Some(0) {
            return Err(Refused::CollectionBody);
        }
        let entries = Arc::clone(&self.files.entries);
        let new = blocking(move || {
            let is_free = name.is_collection() || entries.find(&name)?.is_none();
            Ok(is_free && entries.make_collection(&name.to_collection())?)
        });
        if new.await? { Ok((StatusCode::CREATED, HeaderMap::new(), Content::Empty)) } else { Err(Refused::CollectionExists) }
    }

    async fn get(&self, digest: Digest, head: request::Parts) -> Result<Answer, Refused> {
        if names_this_blob(&head.headers, &digest) {
            let (status, headers) = blob_head(&digest, None, Selection::NotModified);
            return Ok((status, headers, Content::Empty));
        }
        let (store, (slot, transfers)) = (Arc::clone(&self.files.store), Slot::take(&self.shared.transfers));
        let chunk = chunk_for(transfers);
        blocking(move || {
            let is_get = head.method == Method::GET;
            let blob = store.open_blob(&digest)?;
            let Some(size) = blob.as_ref().map(Blob::size).or((digest == Digest::EMPTY).then_some(0)) else { return Err(Refused::Absent) };
            let selection = select(&head.method, &head.headers, &digest, size);
            let (status, headers) = blob_head(&digest, Some(size), selection);
            let range: Range<u64> = match selection {
                Selection::Whole => 0..size,
                Selection::Part { first, last } => first..last + 1,
                Selection::NotModified => 0..0,
                Selection::Unsatisfiable => return Err(Refused::Range(headers)),
            };
            match blob.filter(|_| is_get && selection != Selection::NotModified) {
                Some(blob) => Ok((status, headers, stream(blob.read(range), chunk, slot)?)),
                None => Ok((status, headers, Content::Empty)),
            }
        })
        .await
    }

    async fn put(&self, digest: Digest, mut intake: Intake) -> Result<Answer, Refused> {
        let most = self.shared.limits.load().max_blob.get();
        if intake.declared().is_some_and(|length| length > most) {
            return Err(Refused::TooLarge(most));
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, location(&digest));
        if intake.waits() {
            let store = Arc::clone(&self.files.store);
            if blocking(move || Ok(store.holds_durably(&digest)?)).await?.is_some() {
                // The client decides whether it sends the body after all; only a new connection tells that from a request.
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
                return Ok((StatusCode::OK, headers, Content::Empty));
            }
        }
        let chunks = (&mut intake).map_err(Refused::from);
        let kept = self.receive_blob(Some(digest), most, chunks).await?;
        Ok((if kept.new { StatusCode::CREATED } else { StatusCode::OK }, headers, Content::Empty))
    }

    async fn post(&self, headers: &HeaderMap, mut intake: Intake) -> Result<Answer, Refused> {
        let most = self.shared.limits.load().max_blob.get();
        let extra = if multipart::is_form(headers) { multipart::OVERHEAD } else { 0 };
        if intake.declared().is_some_and(|length| length > most.saturating_add(extra)) {
            return Err(Refused::TooLarge(most));
        }
        let kept = match multipart::boundary(headers).map_err(|error| Refused::Form(error.to_string()))? {
            Some(boundary) => {
                // Fields after the file are ignored. `receive_blob` limits the file's size.
                let file = multipart::first_file(intake, boundary, u64::MAX).map_err(Refused::from);
                self.receive_blob(None, most, file).await?
            }
            None => self.receive_blob(None, most, (&mut intake).map_err(Refused::from)).await?,
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, location(&kept.digest));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let body = serde_json::to_vec(&Stored { digest: kept.digest.to_string(), size: kept.size });
        Ok((StatusCode::CREATED, headers, Content::Bytes(body.unwrap_or_default().into())))
    }

    async fn delete(&self, digest: Digest) -> Result<Answer, Refused> {
        let store = Arc::clone(&self.files.store);
        if blocking(move || Ok(store.remove(&digest)?)).await? {
            Ok((StatusCode::NO_CONTENT, HeaderMap::new(), Content::Empty))
        } else {
            Err(Refused::Absent)
        }
    }
}

impl FileOps<'_> {
    /// Body → temp file → verified → durable.
    async fn receive_blob(
        &self,
        claimed: Option<Digest>,
        most: u64,
        chunks: impl Stream<Item = Result<Bytes, Refused>> + Unpin,
    ) -> Result<Kept, Refused> {
        let store = Arc::clone(&self.files.store);
        Ok(receive(&self.shared.transfers, move || store.begin(claimed), Upload::finish, most, None, chunks).await?)
    }
}

/// Reads the first chunk before the head is sent. So a client gets an error, not a cut body, if a small file is damaged. Blocks.
fn stream(mut source: impl Source, chunk: usize, slot: Slot) -> Result<Content, Fault> {
    let first = source.next(chunk)?;
    Ok(if source.is_done() { Content::Bytes(first) } else { Content::Blob(Streaming::new(first, source, chunk, slot)) })
}

/// Whether the store has the blobs that an entry of the action cache names. Blocks.
fn is_usable(found: &Found, store: &Arc<Store>, most: u64) -> Result<bool, Fault> {
    // An entry over the limit was stored under a higher limit. It counts as usable, since checking it would take more memory than planned.
    Ok(found.size() > most || action::is_complete(&found.read_all()?, store, most)?)
}

/// Runs blocking work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refused> + Send + 'static) -> Result<T, Refused> {
    spawn_blocking(work).await.unwrap_or_else(|stopped| Err(Refused::Store(Fault::Io(stopped.into()))))
}
