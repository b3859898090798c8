//! The HTTP service: which request does what to the store.

use crate::{
    Shared,
    intake::{Intake, Rationed},
    patience::Activity,
    refused::Refused,
    reply::{Content, Record, Reply, Streaming, chunk_for},
    server::{Full, Handler, Seat},
    store::{Fault, Kept, Upload},
};
use bytes::Bytes;
use castier_blob::{
    Digest, Selection, Verifier, names_this_blob, select,
    wire::{Stored, Target, blob_head, blob_path},
};
use castier_config::OriginLimits;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request};
use hyper::body::Incoming;
use std::{
    mem,
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio::task::{JoinHandle, spawn_blocking};

/// What a form may have before its file and, in headers and a boundary, around it.
const FORM_EXTRA: u64 = 1 << 20;

/// A batch is written when it has this many pieces, however small: a body that comes byte by byte must not cost more to hold.
const MOST_PIECES: usize = 256;

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

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr, activity: Arc<Activity>) -> Response<Reply> {
        let (head, body) = request.into_parts();
        let mut record = Record::begin(&self.0, activity, peer, &head.method, head.uri.path());
        let intake = Intake::new(&head, body, self.0.limits.load().idle_timeout.get());
        let (status, headers, content) = self.dispatch(head, intake).await.unwrap_or_else(|refused| {
            if let Refused::Store(fault) = &refused {
                self.0.note(fault);
            }
            let (status, headers, body) = refused.tell();
            (status, headers, Content::Bytes(body.into()))
        });
        record.status = Some(status);
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
            (Target::Other, _) => Err(Refused::NoSuchPath),
        }
    }

    async fn get(&self, digest: Digest, head: request::Parts) -> Result<Answer, Refused> {
        if names_this_blob(&head.headers, &digest) {
            let (status, headers) = blob_head(&digest, None, Selection::NotModified);
            return Ok((status, headers, Content::Empty));
        }
        let (store, (seat, transfers)) = (Arc::clone(&self.0.store), Seat::take(&self.0.transfers));
        let chunk = chunk_for(transfers);
        blocking(move || {
            let is_get = head.method == Method::GET;
            let Some(blob) = store.open_blob(&digest)? else { return Err(Refused::Absent) };
            let size = blob.size();
            let selection = select(&head.method, &head.headers, &digest, size);
            let (status, headers) = blob_head(&digest, Some(size), selection);
            let range: Range<u64> = match selection {
                Selection::Whole => 0..size,
                Selection::Part { first, last } => first..last + 1,
                Selection::NotModified => 0..0,
                Selection::Unsatisfiable => return Err(Refused::Range(headers)),
            };
            if !is_get || selection == Selection::NotModified {
                return Ok((status, headers, Content::Empty));
            }
            // The first chunk is read before the head leaves, so that damage in a small blob is told in so many words.
            let mut reader = blob.read(range);
            let first = reader.next(chunk)?;
            let content = if reader.is_done() { Content::Bytes(first) } else { Content::Blob(Streaming::new(first, reader, chunk, seat)) };
            Ok((status, headers, content))
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
            if blocking(move || Ok(store.holds_durably(&digest)?)).await? {
                // The client decides whether it sends the body after all; only a new connection tells that from a request.
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
                return Ok((StatusCode::OK, headers, Content::Empty));
            }
        }
        let chunks = (&mut intake).map_err(Refused::from);
        let kept = self.receive(Verifier::of(digest), most, chunks).await?;
        Ok((if kept.new { StatusCode::CREATED } else { StatusCode::OK }, headers, Content::Empty))
    }

    async fn post(&self, headers: &HeaderMap, mut intake: Intake) -> Result<Answer, Refused> {
        let most = self.0.limits.load().max_blob.get();
        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is_form = content_type.trim_start().get(..19).is_some_and(|start| start.eq_ignore_ascii_case("multipart/form-data"));
        let extra = if is_form { FORM_EXTRA } else { 0 };
        if intake.declared().is_some_and(|length| length > most.saturating_add(extra)) {
            return Err(Refused::TooLarge(most));
        }
        let kept = if is_form {
            self.receive_form(content_type, most, intake).await?
        } else {
            let chunks = (&mut intake).map_err(Refused::from);
            self.receive(Verifier::any(), most, chunks).await?
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::LOCATION, location(&kept.digest));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let body = serde_json::to_vec(&Stored { digest: kept.digest.to_string(), size: kept.size });
        Ok((StatusCode::CREATED, headers, Content::Bytes(body.unwrap_or_default().into())))
    }

    /// Stores the first part of a form that is a file. What stands before it is skipped, what comes after it is not looked at.
    async fn receive_form(&self, content_type: &str, most: u64, intake: Intake) -> Result<Kept, Refused> {
        let boundary = multer::parse_boundary(content_type)?;
        let ration = Arc::new(AtomicU64::new(FORM_EXTRA));
        let mut form = multer::Multipart::new(Rationed::new(intake, Arc::clone(&ration)), boundary);
        while let Some(part) = form.next_field().await? {
            if part.file_name().is_some() {
                // From here on `receive` counts.
                ration.store(u64::MAX, Relaxed);
                return self.receive(Verifier::any(), most, part.map_err(Refused::from)).await;
            }
        }
        Err(Refused::Form("none of its parts is a file".to_owned()))
    }

    /// Body → temp file → verified → durable. Bytes are written a batch at a time, while the next batch comes in.
    async fn receive(
        &self,
        claim: Verifier,
        most: u64,
        mut chunks: impl Stream<Item = Result<Bytes, Refused>> + Unpin,
    ) -> Result<Kept, Refused> {
        let (_seat, transfers) = Seat::take(&self.0.transfers);
        let chunk = chunk_for(transfers);
        let mut work = Work::Claimed(claim);
        let (mut batch, mut held, mut total) = (Vec::new(), 0, 0);
        while let Some(bytes) = chunks.next().await {
            let bytes = bytes?;
            total += bytes.len() as u64;
            if total > most {
                return Err(Refused::TooLarge(most));
            }
            held += bytes.len();
            batch.push(bytes);
            if held >= chunk || batch.len() >= MOST_PIECES {
                held = 0;
                let (store, batch, before) = (Arc::clone(&self.0.store), mem::take(&mut batch), work.settle().await?);
                work = Work::Writing(spawn_blocking(move || before.go_on(&store, &batch)));
            }
        }
        let (store, before) = (Arc::clone(&self.0.store), work.settle().await?);
        blocking(move || Ok(before.go_on(&store, &batch)?.finish()?)).await
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

/// How far an upload has come.
enum Work {
    /// Nothing is written yet.
    Claimed(Verifier),
    /// A batch is being written.
    Writing(JoinHandle<Result<Upload, Fault>>),
}

/// An upload that nobody is writing to.
enum Settled {
    Claimed(Verifier),
    Begun(Upload),
}

impl Work {
    async fn settle(self) -> Result<Settled, Fault> {
        match self {
            Self::Claimed(claim) => Ok(Settled::Claimed(claim)),
            Self::Writing(job) => job.await.unwrap_or_else(|stopped| Err(Fault::Io(stopped.into()))).map(Settled::Begun),
        }
    }
}

impl Settled {
    /// Blocks.
    fn go_on(self, store: &Arc<crate::store::Store>, batch: &[Bytes]) -> Result<Upload, Fault> {
        let mut upload = match self {
            Self::Claimed(claim) => store.begin(claim)?,
            Self::Begun(upload) => upload,
        };
        batch.iter().try_for_each(|bytes| upload.write(bytes))?;
        Ok(upload)
    }
}

/// Runs what blocks off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refused> + Send + 'static) -> Result<T, Refused> {
    spawn_blocking(work).await.unwrap_or_else(|stopped| Err(Refused::Store(Fault::Io(stopped.into()))))
}

fn location(digest: &Digest) -> HeaderValue {
    // A path of visible ASCII is always a header value.
    HeaderValue::try_from(blob_path(digest)).unwrap_or_else(|_| HeaderValue::from_static("/cas"))
}
