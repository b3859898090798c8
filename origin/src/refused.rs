//! Why a request is not answered as it hoped, and how the client is told. The only place that turns faults into statuses.

use crate::{
    intake::{Broken, FormBroken},
    store::Fault,
};
use castier_blob::{Mismatch, wire::Problem};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// A refusal. Its text is for the log; [`Refused::tell`] is for the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// The path has a name below `/cas/` that is no digest.
    #[error("not a digest")]
    NotADigest,
    /// There is nothing at this path, whatever the method.
    #[error("no such path")]
    NoSuchPath,
    /// The path is known, and allows only these methods.
    #[error("method not allowed")]
    Method(&'static str),
    /// The blob is not here.
    #[error("absent")]
    Absent,
    /// The range begins behind the end. The headers say where that is.
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
    /// The store could not do it.
    #[error(transparent)]
    Store(#[from] Fault),
}

impl From<multer::Error> for Refused {
    fn from(error: multer::Error) -> Self {
        let text = error.to_string();
        let multer::Error::StreamReadFailed(cause) = error else { return Self::Form(text) };
        match cause.downcast::<FormBroken>().map(|broken| *broken) {
            Ok(FormBroken::Body(broken)) => Self::Body(broken),
            Ok(FormBroken::TooLong) | Err(_) => Self::Form(text),
        }
    }
}

impl Refused {
    /// The answer: status, headers, body. Nothing in it comes from the system or tells where files are.
    pub(crate) fn tell(&self) -> (StatusCode, HeaderMap, String) {
        use StatusCode as S;
        let ours = "the store has a fault of its own, which its log describes; try again later";
        let (status, detail) = match self {
            Self::NotADigest => (
                S::BAD_REQUEST,
                "the path of a blob is /cas/ and then the SHA-256 of its bytes as 64 lowercase hexadecimal characters".to_owned(),
            ),
            Self::NoSuchPath => (S::NOT_FOUND, "there is nothing here; blobs are at /cas/<digest>, and POST /cas stores one".to_owned()),
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
            Self::Store(Fault::Io(_)) => (S::INTERNAL_SERVER_ERROR, ours.to_owned()),
        };
        let mut headers = match self {
            Self::Range(headers) => headers.clone(),
            _ => HeaderMap::new(),
        };
        headers.insert(header::CONTENT_TYPE, Problem::MEDIA_TYPE);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        match self {
            Self::Method(allowed) => drop(headers.insert(header::ALLOW, HeaderValue::from_static(allowed))),
            // What would still come could not be told from the next request.
            Self::Body(_) => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
            _ => {}
        }
        (status, headers, Problem::new(status, detail).to_json())
    }
}
