//! The HTTP service: which request is which operation, and the answer to it. `files` and `bucket` have the operations.

use crate::{
    Backend, Shared,
    bucket::BucketOps,
    connection_timeouts::Activity,
    files::FileOps,
    intake::Intake,
    refused::Refused,
    reply::{Content, Record, Reply},
    server::{Full, Handler},
};
use castier_blob::Digest;
use castier_config::OriginLimits;
use castier_wire::{
    Target, blob_path,
    entry::{Entry, Name},
    names_this_blob, split_instance,
    trace::X_REQUEST_ID,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request};
use hyper::body::Incoming;
use std::{net::SocketAddr, sync::Arc};

/// Status, headers and content of an answer.
pub(crate) type Answer = (StatusCode, HeaderMap, Content);

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
        match &self.0.backend {
            Backend::Files(files) => operate(&self.0, FileOps { shared: &self.0, files }, head, intake).await,
            Backend::Bucket(bucket) => operate(&self.0, BucketOps { shared: &self.0, bucket }, head, intake).await,
        }
    }
}

/// What can be asked of a store.
pub(crate) trait Operations: Sync {
    /// GET and HEAD of a blob.
    fn get(&self, digest: Digest, head: request::Parts) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// PUT of a blob.
    fn put(&self, digest: Digest, intake: Intake) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// POST of a blob without a name.
    fn post(&self, headers: &HeaderMap, intake: Intake) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// DELETE of a blob.
    fn delete(&self, digest: Digest) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// GET and HEAD of an entry. `validate`: it is absent if it names a missing blob.
    fn get_entry(&self, name: Name, head: request::Parts, validate: bool) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// PUT of an entry.
    fn put_entry(&self, name: Name, headers: &HeaderMap, intake: Intake) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// DELETE of an entry.
    fn delete_entry(&self, name: Name, headers: &HeaderMap) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// PROPFIND of an entry or a collection. If both have the name, a path without a slash at its end means the entry.
    fn list(&self, name: Name, headers: &HeaderMap) -> impl Future<Output = Result<Answer, Refused>> + Send;
    /// MKCOL.
    fn make_collection(&self, name: Name, intake: &Intake) -> impl Future<Output = Result<Answer, Refused>> + Send;
}

async fn operate(shared: &Shared, ops: impl Operations, head: request::Parts, intake: Intake) -> Result<Answer, Refused> {
    let may_delete = shared.allow_delete;
    match (Target::of(head.uri.path()), &head.method) {
        (Target::Blob(digest), &Method::GET | &Method::HEAD) => ops.get(digest, head).await,
        (Target::Blob(digest), &Method::PUT) => ops.put(digest, intake).await,
        (Target::Blob(digest), &Method::DELETE) if may_delete => ops.delete(digest).await,
        (Target::Blob(_), _) if may_delete => Err(Refused::Method("GET, HEAD, PUT, DELETE")),
        (Target::Blob(_), _) => Err(Refused::Method("GET, HEAD, PUT")),
        (Target::Collection, &Method::POST) => ops.post(&head.headers, intake).await,
        (Target::Collection, _) => Err(Refused::Method("POST")),
        (Target::Malformed(_), _) => Err(Refused::NotADigest),
        (Target::Other, _) => match Entry::of(head.uri.path()) {
            Some(Ok(entry)) => operate_on_entry(shared, ops, entry, head, intake).await,
            Some(Err(malformed)) => Err(Refused::NotAnEntry(malformed)),
            None if split_instance(head.uri.path()).is_some_and(|(_, rest)| rest.starts_with("/cas/")) => Err(Refused::NotADigest),
            None => Err(Refused::NoSuchPath),
        },
    }
}

async fn operate_on_entry(
    shared: &Shared,
    ops: impl Operations,
    entry: Entry,
    head: request::Parts,
    intake: Intake,
) -> Result<Answer, Refused> {
    let method = head.method.as_str();
    match (entry, method) {
        (Entry::Action(name), "GET" | "HEAD") => ops.get_entry(name, head, shared.ac_validation).await,
        (Entry::Value(name), "GET" | "HEAD") => ops.get_entry(name, head, false).await,
        (Entry::Action(name) | Entry::Value(name), "PUT") => ops.put_entry(name, &head.headers, intake).await,
        (Entry::Action(name) | Entry::Value(name), "DELETE") => ops.delete_entry(name, &head.headers).await,
        (Entry::Value(name) | Entry::Collection(name), "PROPFIND") => ops.list(name, &head.headers).await,
        (Entry::Value(name) | Entry::Collection(name), "MKCOL") => ops.make_collection(name, &intake).await,
        (Entry::Action(_), _) => Err(Refused::Method("GET, HEAD, PUT, DELETE")),
        (Entry::Value(_), _) => Err(Refused::Method("GET, HEAD, PUT, DELETE, PROPFIND, MKCOL")),
        (Entry::Collection(_), _) => Err(Refused::Method("PROPFIND, MKCOL")),
    }
}

/// The condition in `If-Match` and `If-None-Match` on the current version, for a PUT or DELETE (RFC 9110, section 13).
pub fn condition(headers: &HeaderMap) -> Option<Condition> {
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

/// The condition of a PUT or a DELETE. Its argument is the digest of the current version.
pub(crate) type Condition = Box<dyn FnOnce(Option<&Digest>) -> bool + Send>;

/// `Location` of a blob.
pub(crate) fn location(digest: &Digest) -> HeaderValue {
    // A path of visible ASCII is always a header value.
    HeaderValue::try_from(blob_path(digest)).unwrap_or_else(|_| HeaderValue::from_static("/cas"))
}

/// `ETag` of an entry.
pub(crate) fn tag(digest: &Digest) -> HeaderValue {
    HeaderValue::try_from(digest.etag()).unwrap_or_else(|_| HeaderValue::from_static(""))
}
