//! The HTTP service: maps requests to operations of the store.

use crate::{
    Shared, action,
    connection_timeouts::Activity,
    entries::{Condition, Delete, Found, Put},
    intake::Intake,
    receive::{Failed, receive},
    refused::Refused,
    reply::{Content, Record, Reply, Source, Streaming, chunk_for},
    server::{Full, Handler, Slot},
    store::{Blob, Fault, Kept, Store, Upload},
    webdav::{self, Depth, Listing},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_config::OriginLimits;
use castier_serverkit::multipart;
use castier_wire::{
    Selection, Stored, Target, blob_head, blob_path,
    entry::{Entry, Name},
    entry_head, names_this_blob, select, split_instance,
    trace::X_REQUEST_ID,
};
use futures::{Stream, TryStreamExt as _};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request};
use hyper::body::Incoming;
use std::{net::SocketAddr, ops::Range, sync::Arc};
use tokio::task::spawn_blocking;

/// Status, headers and content of an answer.
type Answer = (StatusCode, HeaderMap, Content);

/// Answers clients.
#[derive(Clone)]
pub(crate) struct Clients(pub(crate) Arc<Shared>);

impl Handler for Clients {
    type Body = Reply;

    const FULL: Full = Full::NewcomersAreRefused;

    fn max_connections(limits: &OriginLimits) -> usize {
        limits.max_connections
    }

    fn limits(&self) -> Arc<OriginLimits> {
        self.0.limits.load_full()
    }

    async fn answer(&self, request: Request<Incoming>, address: SocketAddr, activity: Arc<Activity>) -> Response<Reply> {
        let (head, body) = request.into_parts();
        let mut record = Record::begin(&self.0, activity, address, &head);
        let intake = Intake::new(&head, body, self.0.limits.load().idle_timeout.get());
        let mut error = None;
        let (status, headers, content) = self.dispatch(head, intake).await.unwrap_or_else(|refused| {
            // A 404 for an absent blob is no error.
            error = (!matches!(refused, Refused::Absent)).then(|| refused.to_string());
            if let Refused::Store(fault) = &refused {
                self.0.note(fault);
            }
            let (status, mut headers, body) = refused.to_answer();
            // Errors carry the request's id, so that a client can report it.
            headers.extend(record.request_id().map(|id| (X_REQUEST_ID, id)));
            (status, headers, Content::Bytes(body.into()))
        });
        record.answer(status, error);
        let mut response = Response::new(Reply { content, record });
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

impl Clients {
    async fn dispatch(&self, head: request::Parts, intake: Intake) -> Result<Answer, Refused> {
        let may_delete = self.0.allow_delete;
        match (Target::of(head.uri.path()), &head.method) {
            (Target::Blob(digest), &Method::GET | &Method::HEAD) => self.get(digest, head).await,
            (Target::Blob(digest), &Method::PUT) => self.put(digest, intake).await,
            (Target::Blob(digest), &Method::DELETE) if may_delete => self.delete(digest).await,
            (Target::Blob(_), _) if may_delete => Err(Refused::Method("GET, HEAD, PUT, DELETE")),
            (Target::Blob(_), _) => Err(Refused::Method("GET, HEAD, PUT")),
            (Target::Collection, &Method::POST) => self.post(&head.headers, intake).await,
            (Target::Collection, _) => Err(Refused::Method("POST")),
            (Target::Malformed(_), _) => Err(Refused::NotADigest),
            (Target::Other, _) => match Entry::of(head.uri.path()) {
                Some(Ok(entry)) => self.entry(entry, head, intake).await,
                Some(Err(malformed)) => Err(Refused::NotAnEntry(malformed)),
                None if split_instance(head.uri.path()).is_some_and(|(_, rest)| rest.starts_with("/cas/")) => Err(Refused::NotADigest),
                None => Err(Refused::NoSuchPath),
            },
        }
    }

    async fn entry(&self, entry: Entry, head: request::Parts, intake: Intake) -> Result<Answer, Refused> {
        let method = head.method.as_str();
        match (entry, method) {
            (Entry::Action(name), "GET" | "HEAD") => self.get_entry(name, head, self.0.ac_validation).await,
            (Entry::Value(name), "GET" | "HEAD") => self.get_entry(name, head, false).await,
            (Entry::Action(name) | Entry::Value(name), "PUT") => self.put_entry(name, &head.headers, intake).await,
            (Entry::Action(name) | Entry::Value(name), "DELETE") => self.delete_entry(name, &head.headers).await,
            (Entry::Value(name) | Entry::Collection(name), "PROPFIND") => self.list(name, &head.headers).await,
            (Entry::Value(name) | Entry::Collection(name), "MKCOL") => self.make_collection(name, &intake).await,
            (Entry::Action(_), _) => Err(Refused::Method("GET, HEAD, PUT, DELETE")),
            (Entry::Value(_), _) => Err(Refused::Method("GET, HEAD, PUT, DELETE, PROPFIND, MKCOL")),
            (Entry::Collection(_), _) => Err(Refused::Method("PROPFIND, MKCOL")),
        }
    }

    async fn get_entry(&self, name: Name, head: request::Parts, validate: bool) -> Result<Answer, Refused> {
        let most = self.0.limits.load().max_entry.get();
        let (slot, transfers) = Slot::take(&self.0.transfers);
        let chunk = chunk_for(transfers);
        let (entries, store) = (Arc::clone(&self.0.entries), Arc::clone(&self.0.store));
        // A permit, since validation holds the whole entry in memory.
        let permit = if validate { Arc::clone(&self.0.validations).acquire_owned().await.ok() } else { None };
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
        let most = self.0.limits.load().max_entry.get();
        if intake.declared().is_some_and(|length| length > most) {
            return Err(Refused::EntryTooLarge(most));
        }
        let (entries, condition) = (Arc::clone(&self.0.entries), condition(headers));
        let chunks = (&mut intake).map_err(Refused::from);
        let begin = move || entries.begin(name);
        let put = receive(&self.0.transfers, begin, |upload| upload.finish(condition), most, None, chunks).await;
        let (status, digest) = match put {
            Ok(Put::Created(digest)) => (StatusCode::CREATED, digest),
            Ok(Put::Replaced(digest)) => (StatusCode::OK, digest),
            Ok(Put::Refused) => return Err(Refused::Condition),
            Err(Failed::TooLarge(most)) => return Err(Refused::EntryTooLarge(most)),
            Err(failed) => return Err(failed.into()),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::ETAG, HeaderValue::try_from(digest.etag()).unwrap_or_else(|_| HeaderValue::from_static("")));
        Ok((status, headers, Content::Empty))
    }

    async fn delete_entry(&self, name: Name, headers: &HeaderMap) -> Result<Answer, Refused> {
        let (entries, condition) = (Arc::clone(&self.0.entries), condition(headers));
        match blocking(move || Ok(entries.remove(&name, condition)?)).await? {
            Delete::Done => Ok((StatusCode::NO_CONTENT, HeaderMap::new(), Content::Empty)),
            Delete::Absent => Err(Refused::NoEntry),
            Delete::Refused => Err(Refused::Condition),
        }
    }

    /// Answers a PROPFIND of an entry or a collection. If both have the name, a path without a slash at its end means the entry.
    async fn list(&self, name: Name, headers: &HeaderMap) -> Result<Answer, Refused> {
        let depth = Depth::of(headers).ok_or(Refused::Depth)?;
        let (slot, transfers) = Slot::take(&self.0.transfers);
        let (chunk, entries) = (chunk_for(transfers), Arc::clone(&self.0.entries));
        blocking(move || {
            let entry = if name.is_collection() { None } else { entries.find(&name)? };
            let listing = match entry {
                Some(found) => Listing::new(&found.member(), None)?,
                None => {
                    let name = name.to_collection();
                    let Some(collection) = entries.collection(&name)? else { return Err(Refused::NoEntry) };
                    let members = if depth == Depth::Members { Some(entries.members(&name)?) } else { None };
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
        let entries = Arc::clone(&self.0.entries);
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
        let (store, (slot, transfers)) = (Arc::clone(&self.0.store), Slot::take(&self.0.transfers));
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
        let most = self.0.limits.load().max_blob.get();
        if intake.declared().is_some_and(|length| length > most) {
            return Err(Refused::TooLarge(most));
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, location(&digest));
        if intake.waits() {
            let store = Arc::clone(&self.0.store);
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
        let most = self.0.limits.load().max_blob.get();
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

    /// Body → temp file → verified → durable.
    async fn receive_blob(
        &self,
        claimed: Option<Digest>,
        most: u64,
        chunks: impl Stream<Item = Result<Bytes, Refused>> + Unpin,
    ) -> Result<Kept, Refused> {
        let store = Arc::clone(&self.0.store);
        Ok(receive(&self.0.transfers, move || store.begin(claimed), Upload::finish, most, None, chunks).await?)
    }

    async fn delete(&self, digest: Digest) -> Result<Answer, Refused> {
        let store = Arc::clone(&self.0.store);
        if blocking(move || Ok(store.remove(&digest)?)).await? {
            Ok((StatusCode::NO_CONTENT, HeaderMap::new(), Content::Empty))
        } else {
            Err(Refused::Absent)
        }
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

/// The condition in `If-Match` and `If-None-Match` on the current version, for a PUT or DELETE (RFC 9110, section 13).
fn condition(headers: &HeaderMap) -> Option<Condition> {
    let mut asked = HeaderMap::new();
    for name in [header::IF_MATCH, header::IF_NONE_MATCH] {
        for value in headers.get_all(&name) {
            asked.append(&name, value.clone());
        }
    }
    let tags = |headers: &HeaderMap, name| -> Vec<Vec<u8>> {
        let values = headers.get_all(name).iter();
        values.flat_map(|value| value.as_bytes().split(|&b| b == b',')).map(|tag| tag.trim_ascii().to_vec()).collect()
    };
    let (wanted, unwanted) = (tags(&asked, header::IF_MATCH), tags(&asked, header::IF_NONE_MATCH));
    if asked.is_empty() {
        return None;
    }
    Some(Box::new(move |current| {
        let any = |tags: &[Vec<u8>]| current.is_some() && tags.iter().any(|tag| tag == b"*");
        let matches = any(&wanted) || current.is_some_and(|digest| wanted.iter().any(|tag| tag == digest.etag().as_bytes()));
        let excluded = any(&unwanted) || current.is_some_and(|digest| names_this_blob(&asked, digest));
        (wanted.is_empty() || matches) && !excluded
    }))
}

/// Runs blocking work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refused> + Send + 'static) -> Result<T, Refused> {
    spawn_blocking(work).await.unwrap_or_else(|stopped| Err(Refused::Store(Fault::Io(stopped.into()))))
}

fn location(digest: &Digest) -> HeaderValue {
    // A path of visible ASCII is always a header value.
    HeaderValue::try_from(blob_path(digest)).unwrap_or_else(|_| HeaderValue::from_static("/cas"))
}
