//! The reply of a route: its head, the part that the request selects, and documents whose links are rewritten.

use super::{
    client::Head,
    headers_of, learn,
    serve::{Kept, Subject},
};
use crate::{
    handlers::Request,
    metrics::Served,
    reply::{Body, Reply},
};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Asker, Fault, Hit, Lease, Limit, Part, Reader, Via};
use castier_routes::{self as rules, Entry, Kind};
use castier_wire::{self as wire, Selection};
use headers::{ETag, HeaderMapExt as _, IfModifiedSince, IfNoneMatch, IfRange, LastModified};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use std::time::{Duration, SystemTime};

/// The largest document that is read whole, to rewrite its links or to learn from it. Larger ones are passed on as they are.
const MOST_DOCUMENT: u64 = 64 << 20;

/// Documents over this size are read and rewritten where that holds up no other request.
const LARGE_DOCUMENT: u64 = 64 << 10;

/// How the answer was found, for `Cache-Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// Kept, and fresh.
    Hit,
    /// Kept, and the upstream was asked about it.
    Validated,
    /// Kept, and old: the upstream could not answer.
    Stale,
    /// It came for this request, or for another at the same time.
    Miss,
}

/// An answer that was found: its head, and what is known of its body.
pub(super) struct Found {
    status: StatusCode,
    headers: HeaderMap,
    /// The body's SHA-256, if it is known already.
    digest: Option<Digest>,
    age: Option<Duration>,
    /// The whole body is needed, to rewrite it or to learn from it.
    is_document: bool,
}

impl Found {
    /// An answer whose body comes.
    pub(super) fn of_head(subject: &Subject, head: &Head) -> Self {
        let age = head.headers.contains_key(header::AGE).then(|| rules::age(&head.headers, SystemTime::now(), SystemTime::now()));
        Self::new(subject, head.status, sendable(&head.headers), None, age)
    }

    /// An answer that is kept.
    pub(super) fn of_entry(subject: &Subject, kept: &Kept) -> Self {
        let entry: &Entry = &kept.entry;
        let headers = headers_of(entry);
        let fetched = SystemTime::UNIX_EPOCH + Duration::from_secs(entry.fetched_at);
        let age = rules::age(&headers, fetched, SystemTime::now());
        let status = StatusCode::from_u16(entry.status).unwrap_or(StatusCode::OK);
        Self::new(subject, status, sendable(&headers), kept.body.map(|(digest, _)| digest), Some(age))
    }

    /// A blob of which nothing but its bytes is known.
    pub(super) fn of_blob(subject: &Subject, digest: Digest) -> Self {
        Self::new(subject, StatusCode::OK, HeaderMap::new(), Some(digest), None)
    }

    fn new(subject: &Subject, status: StatusCode, mut headers: HeaderMap, digest: Option<Digest>, age: Option<Duration>) -> Self {
        let found = &subject.found;
        let is_ok = status == StatusCode::OK;
        let digest = digest.or(match found.rule.kind {
            Kind::Blob if is_ok => found.digest(),
            _ => None,
        });
        if let (Kind::Blob, Some(digest), true) = (found.rule.kind, digest, is_ok) {
            let (_, own) = wire::blob_head(&digest, None, Selection::Whole);
            let is_plain = found.rule.digest_header.is_none();
            for (name, value) in &own {
                // Of a manifest the upstream knows the type.
                if is_plain && *name == header::CONTENT_TYPE && !headers.contains_key(name) || *name != header::CONTENT_TYPE {
                    headers.insert(name.clone(), value.clone());
                }
            }
            if found.route.protocol == "oci" {
                insert(&mut headers, "docker-content-digest", &format!("sha256:{digest}"));
            }
        }
        // Before conditions are looked at: what castier sends as a tag it must also know again.
        if let (true, false, Some(digest)) = (is_ok, headers.contains_key(header::ETAG), digest) {
            insert(&mut headers, "etag", &digest.etag());
        }
        let is_document = is_ok && subject.is_document(&digest);
        Self { status, headers, digest, age, is_document }
    }

    /// The part that a request wants.
    pub(super) fn part(&self, request: &Request<'_>, size: Option<u64>) -> Part {
        if self.is_read_whole(size) {
            return Part::Whole;
        }
        let needs_size = self.is_document || request.version == Version::HTTP_10 || request.headers.contains_key(header::RANGE);
        match size.map(|size| self.select(request, size)) {
            None if needs_size => Part::AfterSize,
            None | Some(Selection::Whole) => Part::Whole,
            Some(Selection::Part { first, last }) => Part::Bytes(first..last + 1),
            Some(Selection::NotModified | Selection::Unsatisfiable) => Part::Bytes(0..0),
        }
    }

    /// Whether the body is read whole before any of it is sent.
    fn is_read_whole(&self, size: Option<u64>) -> bool {
        self.is_document && size.is_some_and(|size| size <= MOST_DOCUMENT)
    }

    /// What conditions and ranges select (RFC 9110, sections 13 and 14).
    fn select(&self, request: &Request<'_>, size: u64) -> Selection {
        if self.status != StatusCode::OK {
            return Selection::Whole;
        }
        let etag: Option<ETag> = self.headers.typed_get();
        let modified: Option<LastModified> = self.headers.typed_get();
        let holds = match (request.headers.typed_get::<IfNoneMatch>(), &etag) {
            (Some(condition), Some(etag)) => !condition.precondition_passes(etag),
            (Some(_), None) => false,
            (None, _) => match (request.headers.typed_get::<IfModifiedSince>(), modified) {
                (Some(since), Some(modified)) => !since.is_modified(modified.into()),
                _ => false,
            },
        };
        if holds {
            return Selection::NotModified;
        }
        let range = match request.headers.typed_get::<IfRange>() {
            Some(condition) if condition.is_modified(etag.as_ref(), modified.as_ref()) => None,
            _ => Some(request.headers).filter(|_| *request.method == Method::GET),
        };
        range.map_or(Selection::Whole, |headers| wire::range(headers, size))
    }
}

impl Subject {
    /// Whether links are rewritten: not for another node, which does it for its client.
    fn is_rewritten(&self) -> bool {
        self.asker == Asker::Client
    }

    /// Whether an answer must be read whole.
    fn is_document(&self, digest: &Option<Digest>) -> bool {
        let route = &self.found.route;
        let is_rewritten = self.is_rewritten() && self.rewriter().has_documents(&self.found);
        is_rewritten
            || (learn::is_telling(route, self.found.path())
                && digest.is_none_or(|digest| !self.shared.learned.has_read(&self.repository, &digest)))
    }

    /// A reply with a body out of the cache.
    pub(super) async fn reply(&self, request: &Request<'_>, mut found: Found, hit: Hit, note: Note) -> Result<Reply, Fault> {
        let Hit { size, via, mut reader } = hit;
        if let Some(size) = size.filter(|_| found.is_read_whole(size)) {
            let document = self.document(&mut found, size, &mut reader).await?;
            let selection = found.select(request, document.len() as u64);
            let body = match selection {
                Selection::Part { first, last } => document.slice(usize_of(first)..usize_of(last + 1)),
                _ => document.clone(),
            };
            return Ok(self.shaped(found, Some(document.len() as u64), selection, Body::Whole(body), Some(via), note));
        }
        let selection = size.map_or(Selection::Whole, |size| found.select(request, size));
        Ok(self.shaped(found, size, selection, Body::Blob(reader), Some(via), note))
    }

    /// A reply without a body: to a HEAD, or of an empty answer.
    pub(super) fn without_body(&self, request: &Request<'_>, mut found: Found, size: Option<u64>, note: Note) -> Reply {
        let is_rewritten = found.is_document && self.is_rewritten() && self.rewriter().has_documents(&self.found);
        if is_rewritten {
            // Its length and its ETag are known only after it was rewritten.
            found.headers.remove(header::ETAG);
        }
        let selection = found.select(request, size.unwrap_or(0));
        self.shaped(found, size.filter(|_| !is_rewritten), selection, Body::Empty, None, note)
    }

    /// The upstream's answer to a HEAD.
    pub(super) fn head_reply(&self, request: &Request<'_>, head: &Head) -> Reply {
        self.without_body(request, Found::of_head(self, head), head.length(), Note::Miss)
    }

    /// An answer of the upstream that is for this client alone.
    pub(super) fn passed_on(&self, request: &Request<'_>, head: &Head, body: Bytes) -> Reply {
        let mut headers = sendable(&head.headers);
        if self.is_rewritten() {
            self.rewriter().headers(&mut headers);
        }
        insert(&mut headers, wire::CACHE_STATUS.as_str(), &format!("castier; fwd=request; fwd-status={}", head.status.as_u16()));
        let has_body = *request.method != Method::HEAD && !matches!(head.status.as_u16(), 204 | 304);
        if has_body {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        let served = if head.status.as_u16() >= 400 { Served::Error } else { Served::Miss };
        Reply { status: head.status, headers, body: if has_body { Body::Whole(body) } else { Body::Empty }, served, tier: None }
    }

    /// The last challenge of the upstream, while it is away.
    pub(super) fn challenge(status: StatusCode, headers: HeaderMap) -> Reply {
        let mut reply = Reply::error(status, "the upstream cannot be reached, and these credentials were not proved to it lately");
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            reply.headers.append(header::WWW_AUTHENTICATE, value.clone());
        }
        for name in headers.keys().filter(|name| name.as_str().starts_with("docker-")) {
            if let Some(value) = headers.get(name) {
                reply.headers.insert(name.clone(), value.clone());
            }
        }
        insert(&mut reply.headers, wire::CACHE_STATUS.as_str(), "castier; hit; detail=challenge");
        reply
    }

    /// Reads a document whole, learns from it, and rewrites its links.
    async fn document(&self, found: &mut Found, size: u64, reader: &mut Reader) -> Result<Bytes, Fault> {
        // For the document, what is read of it, and what it becomes.
        let Some(lease) = self.shared.memory.lease(3 * size) else { return Err(Fault::Busy(Limit::ClientMemory)) };
        let mut document = bytes::BytesMut::with_capacity(usize_of(size));
        while let Some(piece) = reader.next().await? {
            document.extend_from_slice(&piece);
        }
        let document = document.freeze();
        let document =
            if size > LARGE_DOCUMENT { tokio::task::block_in_place(|| self.read(found, document)) } else { self.read(found, document) };
        drop(lease);
        // The reply holds it as long as the client reads.
        let lease = self.shared.memory.charge(document.len() as u64);
        Ok(Bytes::from_owner(Leased { document, _lease: lease }))
    }

    /// Learns from a document. Returns it with its links rewritten.
    fn read(&self, found: &mut Found, document: Bytes) -> Bytes {
        let route = &self.found.route;
        let digest = found.digest.unwrap_or_else(|| Digest::of(&document));
        let text = |headers: &HeaderMap, name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let content_type = text(&found.headers, header::CONTENT_TYPE);
        let is_coded = !matches!(text(&found.headers, header::CONTENT_ENCODING).as_str(), "" | "identity");
        if is_coded {
            route.metrics.unparsed();
            return document;
        }
        self.learn(&digest, &document, &content_type);
        let rewritten = match str::from_utf8(&document) {
            Ok(text) if self.is_rewritten() => {
                self.rewriter().document(&self.found, &content_type, text).map_err(|error| error.to_string())
            }
            Ok(_) => Ok(None),
            Err(error) if self.rewriter().has_documents(&self.found) => Err(error.to_string()),
            Err(_) => Ok(None),
        };
        match rewritten {
            Ok(Some(rewritten)) => {
                let own = Digest::of(rewritten.as_bytes());
                for name in ["content-md5", "digest", "repr-digest", "content-digest", "last-modified"] {
                    found.headers.remove(name);
                }
                insert(&mut found.headers, "etag", &own.etag());
                rewritten.into()
            }
            Ok(None) => document,
            Err(error) => {
                route.metrics.unparsed();
                tracing::debug!(route = route.label(), path = %self.found.path(), error, "metadata cannot be parsed, and is passed on as it is");
                document
            }
        }
    }

    fn shaped(&self, found: Found, size: Option<u64>, selection: Selection, body: Body, via: Option<Via>, note: Note) -> Reply {
        let Found { status, mut headers, age, .. } = found;
        if self.is_rewritten() {
            self.rewriter().headers(&mut headers);
        }
        if status == StatusCode::OK {
            headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        }
        if let Some(age) = age {
            headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
        }
        insert(&mut headers, wire::CACHE_STATUS.as_str(), &cache_status(via, note, self.found.rule.kind));
        let (status, body, length) = match selection {
            Selection::NotModified => {
                headers.remove(header::CONTENT_TYPE);
                (StatusCode::NOT_MODIFIED, Body::Empty, None)
            }
            Selection::Unsatisfiable => {
                let known = size.map_or_else(|| "*".to_owned(), |size| size.to_string());
                let mut reply = Reply::error(StatusCode::RANGE_NOT_SATISFIABLE, "the range lies outside of the body");
                insert(&mut reply.headers, "content-range", &format!("bytes */{known}"));
                return reply;
            }
            Selection::Part { first, last } => {
                let known = size.map_or_else(|| "*".to_owned(), |size| size.to_string());
                insert(&mut headers, "content-range", &format!("bytes {first}-{last}/{known}"));
                (StatusCode::PARTIAL_CONTENT, body, Some(last - first + 1))
            }
            Selection::Whole => (status, body, size),
        };
        if let (Some(Via::Tier(_)), Some(length)) = (via, length) {
            self.found.route.metrics.saved(length);
        }
        if let Some(length) = length {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        let served = match via {
            _ if status.as_u16() >= 400 => Served::Error,
            Some(Via::Flight { collapsed: true, .. }) => Served::Collapsed,
            Some(Via::Flight { .. }) => Served::Miss,
            Some(Via::Tier(_)) => Served::Hit,
            None if note == Note::Miss => Served::Miss,
            None => Served::Hit,
        };
        Reply { status, headers, body, served, tier: via.and_then(Via::tier) }
    }
}

/// A document that a client reads, and its share of `limits.client_memory`.
struct Leased {
    document: Bytes,
    _lease: Lease,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        &self.document
    }
}

impl super::Match {
    /// An error of castier's own, as the clients of the protocol read errors.
    pub(crate) fn error(&self, reply: Reply) -> Reply {
        if self.route.protocol != "oci" {
            return reply;
        }
        let Body::Whole(problem) = &reply.body else { return reply };
        let detail = serde_json::from_slice::<serde_json::Value>(problem).ok();
        let message = detail.as_ref().and_then(|detail| detail.get("detail")?.as_str()).unwrap_or_default();
        let code = match reply.status.as_u16() {
            401 => "UNAUTHORIZED",
            403 => "DENIED",
            404 => "NAME_UNKNOWN",
            413 => "SIZE_INVALID",
            429 | 503 => "TOOMANYREQUESTS",
            405 => "UNSUPPORTED",
            _ => "UNKNOWN",
        };
        let body = serde_json::json!({ "errors": [{ "code": code, "message": message, "detail": null }] }).to_string();
        let mut reply = reply;
        insert(&mut reply.headers, "content-type", "application/json");
        reply.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        reply.body = Body::Whole(body.into());
        reply
    }
}

/// The value of `Cache-Status` (RFC 9211).
fn cache_status(via: Option<Via>, note: Note, kind: Kind) -> String {
    let place = match via {
        Some(Via::Tier(tier)) => tier.as_str(),
        Some(Via::Flight { from, .. }) => from.as_str(),
        None if note == Note::Miss => "origin",
        None => "names",
    };
    match (note, via) {
        // `hit` and `fwd` exclude each other (RFC 9211, section 2).
        (Note::Stale, _) => "castier; hit; detail=stale".to_owned(),
        (Note::Validated, Some(Via::Tier(_)) | None) if kind == Kind::Fresh => {
            format!("castier; fwd=stale; fwd-status=304; detail={place}")
        }
        (_, Some(Via::Flight { collapsed, kept, .. })) => {
            let (collapsed, kept) = (if collapsed { "; collapsed" } else { "" }, if kept { "; stored" } else { "" });
            format!("castier; fwd=uri-miss{kept}{collapsed}; detail={place}")
        }
        (Note::Miss, None) => format!("castier; fwd=uri-miss; detail={place}"),
        _ => format!("castier; hit; detail={place}"),
    }
}

/// The headers of an upstream's answer that are not about the connection to it.
pub(super) fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    const HOP: [&str; 7] =
        ["transfer-encoding", "content-length", "content-range", "proxy-authenticate", "via", "alt-svc", "strict-transport-security"];
    let mut out = headers.clone();
    for name in wire::hop_by_hop(headers) {
        out.remove(name);
    }
    for name in HOP {
        out.remove(name);
    }
    out
}

/// The headers of an upstream's answer that go to the client. castier has a date of its own, and tells the age of what it keeps.
fn sendable(headers: &HeaderMap) -> HeaderMap {
    let mut out = end_to_end(headers);
    out.remove(header::DATE);
    out.remove(header::AGE);
    out
}

fn insert(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(name), HeaderValue::try_from(value)) {
        headers.insert(name, value);
    }
}

fn usize_of(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}
