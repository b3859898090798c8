//! Refusals of requests, and the answers to them. The only file that maps faults to HTTP statuses.

use crate::{intake::Broken, receive::Failed, store::Fault};
use castier_blob::Mismatch;
use castier_serverkit::multipart::FormError;
use castier_wire::{Problem, entry::Malformed};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// A refusal. Its text is for the log; [`Refused::to_answer`] makes the answer for the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// The path has a name below `/cas/` that is no digest.
    #[error("not a digest")]
    NotADigest,
    /// The path is below `/ac/` or `/kv/`, and names no entry.
    #[error(transparent)]
    NotAnEntry(#[from] Malformed),
    /// There is no entry of this name, and no collection.
    #[error("no entry")]
    NoEntry,
    /// The entry is larger than this.
    #[error("an entry larger than {0} bytes")]
    EntryTooLarge(u64),
    /// `If-Match` or `If-None-Match` of a PUT or DELETE does not hold.
    #[error("precondition failed")]
    Condition,
    /// PROPFIND without a depth of 0 or 1.
    #[error("no finite depth")]
    Depth,
    /// MKCOL with a body.
    #[error("a collection with a body")]
    CollectionBody,
    /// MKCOL of a name that exists.
    #[error("the collection exists")]
    CollectionExists,
    /// There is nothing at this path, for any method.
    #[error("no such path")]
    NoSuchPath,
    /// The path is known, and allows only these methods.
    #[error("method not allowed")]
    Method(&'static str),
    /// The store does not have the blob.
    #[error("absent")]
    Absent,
    /// The range begins after the end. The headers contain the size.
    #[error("range not satisfiable")]
    Range(HeaderMap),
    /// The blob is larger than this.
    #[error("larger than {0} bytes")]
    TooLarge(u64),
    /// The form cannot be understood, or has no file.
    #[error("bad form: {0}")]
    Form(String),
    /// The body ended early.
    #[error(transparent)]
    Body(#[from] Broken),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] Fault),
    /// The object store failed.
    #[error(transparent)]
    Bucket(castier_cache::Fault),
}

impl From<FormError<Broken>> for Refused {
    fn from(error: FormError<Broken>) -> Self {
        match error {
            FormError::Body(broken) => Self::Body(broken),
            other => Self::Form(other.to_string()),
        }
    }
}

impl From<Failed<Self>> for Refused {
    fn from(failed: Failed<Self>) -> Self {
        match failed {
            Failed::Body(refused) => refused,
            Failed::TooLarge(most) => Self::TooLarge(most),
            Failed::Store(fault) => Self::Store(fault),
        }
    }
}

impl Refused {
    /// The answer: status, headers, body. It contains no text of the system and no paths of files.
    pub(crate) fn to_answer(&self) -> (StatusCode, HeaderMap, String) {
        use StatusCode as S;
        let ours = "the store has a fault of its own, which its log describes; try again later";
        let (status, detail) = match self {
            Self::NotADigest => (
                S::BAD_REQUEST,
                "the path of a blob is /cas/ and then the SHA-256 of its bytes as 64 lowercase hexadecimal characters".to_owned(),
            ),
            Self::NoSuchPath => (
                S::NOT_FOUND,
                "there is nothing here; blobs are at /cas/<digest>, entries at /ac/<key> and /kv/<path>, and POST /cas stores a blob"
                    .to_owned(),
            ),
            Self::NotAnEntry(malformed) => (S::BAD_REQUEST, malformed.to_string()),
            Self::NoEntry => (S::NOT_FOUND, "nothing is stored under this name".to_owned()),
            Self::EntryTooLarge(most) => (S::PAYLOAD_TOO_LARGE, format!("the largest entry that is stored has {most} bytes")),
            Self::Condition => {
                (S::PRECONDITION_FAILED, "the stored version is not the one that the request expects; nothing changed".to_owned())
            }
            Self::Depth => (S::FORBIDDEN, "PROPFIND is answered with Depth: 0 or Depth: 1 alone".to_owned()),
            Self::CollectionBody => (S::UNSUPPORTED_MEDIA_TYPE, "MKCOL takes no body".to_owned()),
            Self::CollectionExists => (S::METHOD_NOT_ALLOWED, "there is something of this name already".to_owned()),
            Self::Method(allowed) => (S::METHOD_NOT_ALLOWED, format!("allowed here: {allowed}")),
            Self::Absent => (S::NOT_FOUND, "no blob of this digest is stored".to_owned()),
            Self::Range(_) => {
                (S::RANGE_NOT_SATISFIABLE, "no byte of the range is within the blob; Content-Range tells its size".to_owned())
            }
            Self::TooLarge(most) => (S::PAYLOAD_TOO_LARGE, format!("the largest blob that is stored has {most} bytes")),
            Self::Form(why) => {
                (S::BAD_REQUEST, format!("the form was not understood: {why}; send one file part, as curl -F file=@NAME does"))
            }
            Self::Body(Broken::Silent) => (S::REQUEST_TIMEOUT, "the body stopped coming; send it again".to_owned()),
            Self::Body(Broken::Off) => (S::BAD_REQUEST, "the body broke off; send it again".to_owned()),
            Self::Store(Fault::Mismatch(Mismatch { claimed, actual, size })) => (
                S::UNPROCESSABLE_ENTITY,
                format!("the {size} bytes received are the blob {actual}, not {claimed}; if that is what you meant to store, PUT it there"),
            ),
            Self::Store(Fault::Full(_)) => (S::INSUFFICIENT_STORAGE, "the store is full; nothing was stored".to_owned()),
            Self::Store(Fault::Rotten { .. }) => {
                (S::INTERNAL_SERVER_ERROR, "the stored bytes of this blob are damaged and were set aside; store it again".to_owned())
            }
            Self::Store(Fault::RottenEntry { .. }) => {
                (S::INTERNAL_SERVER_ERROR, "the stored bytes of this entry are damaged and were set aside; store it again".to_owned())
            }
            Self::Store(Fault::Io(_)) => (S::INTERNAL_SERVER_ERROR, ours.to_owned()),
            Self::Bucket(fault) => of_bucket(fault),
        };
        let mut headers = match self {
            Self::Range(headers) => headers.clone(),
            _ => HeaderMap::new(),
        };
        Problem::set_headers(&mut headers);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        match self {
            Self::CollectionExists => drop(headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, PUT, DELETE, PROPFIND"))),
            Self::Method(allowed) => drop(headers.insert(header::ALLOW, HeaderValue::from_static(allowed))),
            Self::Bucket(castier_cache::Fault::Busy(_)) => drop(headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"))),
            // The end of this body is unknown, so the start of the next request is unknown too.
            Self::Body(_) => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
            _ => {}
        }
        (status, headers, Problem::new(status, detail).to_json())
    }
}

/// The answer to a fault of the object store.
fn of_bucket(fault: &castier_cache::Fault) -> (StatusCode, String) {
    use castier_cache::{Fault as F, Limit};
    match fault {
        F::OriginFull => (StatusCode::INSUFFICIENT_STORAGE, "the store is full; nothing was stored".to_owned()),
        F::OriginRefusesSize | F::TooLarge { .. } => {
            (StatusCode::PAYLOAD_TOO_LARGE, "the object store does not take a blob of this size".to_owned())
        }
        F::BadRequest(why) => (StatusCode::BAD_REQUEST, why.clone()),
        F::Busy(Limit::Outbox) => (
            StatusCode::INSUFFICIENT_STORAGE,
            "the outbox is full, or its disk cannot be written; nothing was stored; try again".to_owned(),
        ),
        F::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "the object store has too much to do; try again in a second".to_owned()),
        F::Silent { .. } => (StatusCode::GATEWAY_TIMEOUT, "the object store did not answer in time".to_owned()),
        F::Denied { why, .. } => (StatusCode::BAD_GATEWAY, format!("the object store refuses this server: {why}")),
        F::Unreachable { .. } | F::Unusable { .. } | F::Corrupt { .. } => {
            (StatusCode::BAD_GATEWAY, "the object store cannot be reached, or gave no usable answer; the log has the reason".to_owned())
        }
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "the server has a fault of its own, which its log describes; try again later".to_owned()),
    }
}
