//! Responses: status, headers, and a body. Pure, and without pingora, so that the fast path and the session write the same response.

use crate::metrics::Served;
use bytes::{BufMut, Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Limit, Reader, SourceKind, Tier, Via};
use castier_cluster::{Asked, PROOF};
use castier_wire::{self as wire, Selection};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// `Retry-After` for a shed client, in seconds. A burst is over by then in most cases.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// `Allow` for a blob if the origin does not delete.
const BLOB_METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, PUT");

/// A response, ready to be written.
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// All headers except `Date` and `Connection`, which the writer adds.
    pub headers: HeaderMap,
    /// The body.
    pub body: Body,
    /// For metrics and the access record.
    pub served: Served,
    /// The tier that the body comes from.
    pub tier: Option<Tier>,
}

/// The body of a response.
pub enum Body {
    /// No bytes.
    Empty,
    /// All bytes, in memory.
    Whole(Bytes),
    /// Bytes of a blob.
    Blob(Reader),
}

/// How a blob was found, as the value of `Cache-Status`.
const fn cache_status_of(via: Via) -> HeaderValue {
    HeaderValue::from_static(match via {
        Via::Tier(Tier::Memory) => "castier; hit; detail=memory",
        Via::Tier(Tier::Mirror) => "castier; hit; detail=mirror",
        Via::Tier(Tier::Disk) => "castier; hit; detail=disk",
        Via::Flight { from: SourceKind::Origin, collapsed, kept } => match (kept, collapsed) {
            (true, false) => "castier; fwd=uri-miss; stored; detail=origin",
            (false, false) => "castier; fwd=uri-miss; detail=origin",
            (true, true) => "castier; fwd=uri-miss; stored; collapsed; detail=origin",
            (false, true) => "castier; fwd=uri-miss; collapsed; detail=origin",
        },
        Via::Flight { from: SourceKind::Peer, collapsed, kept } => match (kept, collapsed) {
            (true, false) => "castier; fwd=uri-miss; stored; detail=peer",
            (false, false) => "castier; fwd=uri-miss; detail=peer",
            (true, true) => "castier; fwd=uri-miss; stored; collapsed; detail=peer",
            (false, true) => "castier; fwd=uri-miss; collapsed; detail=peer",
        },
    })
}

/// The value of `Cache-Status`.
pub fn cache_status(headers: &HeaderMap) -> &str {
    headers.get(wire::CACHE_STATUS).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

const fn served(via: Via) -> Served {
    match via {
        Via::Tier(_) => Served::Hit,
        Via::Flight { collapsed: true, .. } => Served::Collapsed,
        Via::Flight { .. } => Served::Miss,
    }
}

impl Reply {
    /// A blob, or the selected part of it. `size` is `None` if the source has not announced a length.
    pub fn blob(digest: &Digest, size: Option<u64>, selection: Selection, via: Via, body: Body) -> Self {
        let (status, mut headers) = wire::blob_head(digest, size, selection);
        headers.insert(wire::CACHE_STATUS, cache_status_of(via));
        if selection == Selection::Unsatisfiable {
            let known = size.map_or_else(String::new, |size| format!(" of {size} bytes"));
            return Self::explained(status, headers, &format!("the range lies outside the blob{known}"));
        }
        Self {
            status,
            headers,
            body: if selection == Selection::NotModified { Body::Empty } else { body },
            served: served(via),
            tier: via.tier(),
        }
    }

    /// The bytes of the head, for a connection without a session. The buffer has capacity for `extra` bytes of the body.
    pub fn head(&self, date: &HeaderValue, keep_alive: bool, extra: usize) -> BytesMut {
        let mut out = BytesMut::with_capacity(1024 + extra);
        out.put_slice(b"HTTP/1.1 ");
        out.put_slice(self.status.as_str().as_bytes());
        out.put_u8(b' ');
        out.put_slice(self.status.canonical_reason().unwrap_or_default().as_bytes());
        out.put_slice(b"\r\nDate: ");
        out.put_slice(date.as_bytes());
        out.put_slice(if keep_alive { b"\r\n" } else { b"\r\nConnection: close\r\n" });
        for (name, value) in &self.headers {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        }
        out.put_slice(b"\r\n");
        out
    }

    /// Adds the proof to an answer to a peer. The answer must not change after this.
    pub fn prove(&mut self, asked: &Asked) {
        if let Some(proof) = asked.prove(self.status, &self.headers) {
            self.headers.insert(PROOF, proof);
        }
    }

    /// The client named this blob in `If-None-Match`. No look-up was needed.
    pub fn not_modified(digest: &Digest) -> Self {
        let (status, mut headers) = wire::blob_head(digest, None, Selection::NotModified);
        headers.insert(wire::CACHE_STATUS, HeaderValue::from_static("castier; hit; detail=validator"));
        Self { status, headers, body: Body::Empty, served: Served::Hit, tier: None }
    }

    /// The blob's size, without its bytes.
    pub fn size(digest: &Digest, size: u64, via: Via) -> Self {
        Self::blob(digest, Some(size), Selection::Whole, via, Body::Empty)
    }

    /// The origin has stored an upload, or has had the blob before. The answer to a `POST` (`by_name` is false) contains the digest.
    pub fn stored(digest: &Digest, size: u64, created: bool, by_name: bool) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(header::ETAG, value(digest.etag()));
        let status = if created || !by_name { StatusCode::CREATED } else { StatusCode::OK };
        headers.insert(header::LOCATION, value(wire::blob_path(digest)));
        let mut body = Bytes::new();
        if !by_name {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            let stored = wire::Stored { digest: digest.to_string(), size };
            body = serde_json::to_vec(&stored).unwrap_or_default().into();
        }
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        Self { status, headers, body: Body::Whole(body), served: Served::Miss, tier: None }
    }

    /// Success, without a body.
    pub fn done() -> Self {
        Self { status: StatusCode::NO_CONTENT, headers: HeaderMap::new(), body: Body::Empty, served: Served::Miss, tier: None }
    }

    /// The origin says that there is no such blob.
    pub fn absent(digest: &Digest) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(wire::CACHE_STATUS, HeaderValue::from_static("castier; fwd=uri-miss; detail=origin"));
        Self::explained(StatusCode::NOT_FOUND, headers, &format!("the origin has no blob {digest}"))
    }

    /// A short text, for programs.
    pub fn text(text: &'static str) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        Self::whole(headers, Bytes::from_static(text.as_bytes()))
    }

    /// Success, with these bytes.
    pub fn whole(mut headers: HeaderMap, body: Bytes) -> Self {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        Self { status: StatusCode::OK, headers, body: Body::Whole(body), served: Served::Miss, tier: None }
    }

    /// `only-if-cached` missed: no tier keeps the blob.
    pub fn not_kept() -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(wire::CACHE_STATUS, HeaderValue::from_static("castier; fwd=request"));
        Self::explained(StatusCode::GATEWAY_TIMEOUT, headers, "the blob is not kept here")
    }

    /// A path below `/cas/` that is no digest.
    pub fn malformed_digest() -> Self {
        Self::error(StatusCode::BAD_REQUEST, &format!("{}; the path is {}/<digest>", castier_blob::MalformedDigest, wire::CAS))
    }

    /// The origin does not support this method for a blob.
    fn not_allowed() -> Self {
        Self::error(StatusCode::METHOD_NOT_ALLOWED, "the origin does not allow this; it takes GET, HEAD and PUT")
    }

    /// The answer for any fault. It does not contain the cause, which is only for the log, but for a refusal that somebody has to mend.
    pub fn fault(fault: &Fault) -> Self {
        let (status, detail) = match fault {
            Fault::Mismatch(mismatch) => (StatusCode::UNPROCESSABLE_ENTITY, mismatch.to_string()),
            Fault::BadRequest(why) => (StatusCode::BAD_REQUEST, why.clone()),
            Fault::TooLarge { limit } => (StatusCode::PAYLOAD_TOO_LARGE, format!("larger than the limit of {limit} bytes")),
            Fault::OriginRefusesSize => (StatusCode::PAYLOAD_TOO_LARGE, "larger than the origin takes".into()),
            Fault::Unreachable { source_name, .. } => {
                (StatusCode::BAD_GATEWAY, format!("the {source_name} cannot be reached, and the request needs it"))
            }
            Fault::Unusable { source_name, .. } => {
                (StatusCode::BAD_GATEWAY, format!("the {source_name} gave an unusable answer, and the request needs one"))
            }
            Fault::NotAsked { source_name } => {
                let detail = format!("the {source_name} failed too often in a row, and is not asked for some seconds; try again");
                let mut headers = HeaderMap::new();
                headers.insert(wire::CACHE_STATUS, HeaderValue::from_static("castier; fwd=uri-miss; detail=breaker"));
                headers.insert(header::RETRY_AFTER, RETRY_AFTER);
                return Self::explained(StatusCode::BAD_GATEWAY, headers, &detail);
            }
            Fault::Denied { source_name, why } => (StatusCode::BAD_GATEWAY, format!("the {source_name} refuses castier: {why}")),
            Fault::Corrupt { source_name, .. } => {
                (StatusCode::BAD_GATEWAY, format!("the {source_name} sent bytes that do not match the digest"))
            }
            Fault::Silent { source_name, .. } => (StatusCode::GATEWAY_TIMEOUT, format!("the {source_name} was silent for too long")),
            Fault::Busy(Limit::Outbox) => (
                StatusCode::INSUFFICIENT_STORAGE,
                "the outbox is full, or its disk cannot be written; nothing was stored; try again".into(),
            ),
            Fault::Busy(Limit::Origin) => (StatusCode::SERVICE_UNAVAILABLE, "the origin is over a limit; try again".into()),
            Fault::Busy(limit) => (StatusCode::SERVICE_UNAVAILABLE, format!("over the limit on {limit}; try again")),
            Fault::OriginFull => (StatusCode::INSUFFICIENT_STORAGE, "the origin has no room for the blob".into()),
            Fault::NotAllowed => return Self::not_allowed(),
            Fault::ClientGone(_) => (StatusCode::BAD_REQUEST, "the request body ended before its announced end".into()),
            Fault::ClientSilent => (StatusCode::REQUEST_TIMEOUT, "the request body did not go on for too long".into()),
            Fault::Abandoned | Fault::Hidden | Fault::Internal(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "the request could not be completed".into())
            }
        };
        Self::error(status, &detail)
    }

    /// An error, with its explanation as the body.
    pub fn error(status: StatusCode, detail: &str) -> Self {
        Self::explained(status, HeaderMap::new(), detail)
    }

    fn explained(status: StatusCode, mut headers: HeaderMap, detail: &str) -> Self {
        let body = wire::Problem::new(status, detail).to_json();
        wire::Problem::set_headers(&mut headers);
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        match status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::INSUFFICIENT_STORAGE => headers.insert(header::RETRY_AFTER, RETRY_AFTER),
            StatusCode::METHOD_NOT_ALLOWED => headers.insert(header::ALLOW, BLOB_METHODS),
            _ => None,
        };
        Self { status, headers, body: Body::Whole(body.into()), served: Served::Error, tier: None }
    }
}

/// A header value out of text that castier composed. It is visible ASCII, so the conversion cannot fail.
fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}
