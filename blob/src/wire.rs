//! Names and shapes on the wire, shared by everything that speaks CAS over HTTP.

use crate::{Digest, Selection};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};

/// Blobs live below this path: `GET /cas/<digest>`; `POST /cas` stores one and names it.
pub const CAS: &str = "/cas";

/// The path of one blob.
pub fn blob_path(digest: &Digest) -> String {
    format!("{CAS}/{digest}")
}

/// `Repr-Digest`, RFC 9530.
pub const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");
/// `Cache-Status`, RFC 9211.
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// A blob never changes: a year is the longest age that caches commonly honour, and `immutable` (RFC 8246) stops revalidation on reload.
pub const CACHE_FOREVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// First parts of a path that name no instance: they have a meaning of their own. `v2` is the registry protocol's.
const NO_INSTANCE: [&str; 4] = ["ac", "cas", "kv", "v2"];
/// The longest name of an instance.
const MAX_INSTANCE: usize = 128;

/// The instance in front of a path, and the rest of the path, from its slash on: `/team/cas/x` is `team` and `/cas/x`. None: there is no
/// instance. It is one part of a path, made of unreserved characters (RFC 3986), so that it has one spelling.
pub fn split_instance(path: &str) -> Option<(&str, &str)> {
    let path = path.strip_prefix('/')?;
    let (instance, rest) = path.split_at(path.find('/')?);
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    let sound = (1..=MAX_INSTANCE).contains(&instance.len()) && instance.bytes().all(plain) && !matches!(instance, "." | "..");
    (sound && !NO_INSTANCE.contains(&instance)).then_some((instance, rest))
}

/// What a request path asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// `/cas/<digest>`, or `/<instance>/cas/<digest>`: all instances share the blobs.
    Blob(Digest),
    /// `/cas`: the collection that POST adds to.
    Collection,
    /// Below `/cas/`, but no digest.
    Malformed(&'a str),
    /// Anything else.
    Other,
}

impl<'a> Target<'a> {
    /// Reads a path, without its query.
    pub fn of(path: &'a str) -> Self {
        match path.strip_prefix(CAS) {
            Some("") => Self::Collection,
            Some(rest) => match rest.strip_prefix('/') {
                Some(name) => Digest::parse(name.as_bytes()).map_or(Self::Malformed(name), Self::Blob),
                None => Self::Other,
            },
            None => Self::of_instance(path).map_or(Self::Other, Self::Blob),
        }
    }

    /// A blob as an instance names it. What only looks like it is somebody else's path, and not a malformed one of ours.
    fn of_instance(path: &str) -> Option<Digest> {
        // The cheap question first: hardly any other path is so long and has the name there.
        let at = path.len().checked_sub(CAS.len() + 1 + Digest::TEXT_LEN)?;
        let name = path.get(at..)?.strip_prefix(CAS)?.strip_prefix('/')?;
        let (instance, _) = split_instance(path)?;
        (instance.len() + 1 == at).then(|| Digest::parse(name.as_bytes()).ok())?
    }
}

/// Status and headers of the answer to a GET or HEAD of a blob of `size` bytes, `Content-Length` and all but `Date`.
/// `size` is none while a blob of unknown length streams through; then only [`Selection::Whole`] and [`Selection::NotModified`] can be told.
pub fn blob_head(digest: &Digest, size: Option<u64>, selection: Selection) -> (StatusCode, HeaderMap) {
    let mut headers = HeaderMap::with_capacity(12);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let known = size.map_or_else(|| "*".to_owned(), |n| n.to_string());
    if selection == Selection::Unsatisfiable {
        // An error, so nothing here may invite a cache to keep it.
        headers.insert(header::CONTENT_RANGE, text(format!("bytes */{known}")));
        return (StatusCode::RANGE_NOT_SATISFIABLE, headers);
    }
    headers.insert(header::ETAG, text(digest.etag()));
    headers.insert(header::CACHE_CONTROL, CACHE_FOREVER);
    if selection == Selection::NotModified {
        return (StatusCode::NOT_MODIFIED, headers);
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(REPR_DIGEST, text(digest.repr_digest()));
    let (status, length) = match selection {
        Selection::Part { first, last } => {
            headers.insert(header::CONTENT_RANGE, text(format!("bytes {first}-{last}/{known}")));
            (StatusCode::PARTIAL_CONTENT, Some(last - first + 1))
        }
        Selection::Whole | Selection::NotModified | Selection::Unsatisfiable => (StatusCode::OK, size),
    };
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    (status, headers)
}

/// As [`blob_head`], for a mutable entry whose bytes have this digest now: whoever keeps the answer must ask whether it still holds.
pub fn entry_head(digest: &Digest, size: u64, selection: Selection) -> (StatusCode, HeaderMap) {
    let (status, mut headers) = blob_head(digest, Some(size), selection);
    if let Some(value) = headers.get_mut(header::CACHE_CONTROL) {
        *value = HeaderValue::from_static("no-cache");
    }
    (status, headers)
}

/// A header value made of text that this crate composed, and which is therefore visible ASCII.
fn text(value: String) -> HeaderValue {
    HeaderValue::try_from(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The answer to a stored POST.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The name the blob got, in text.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
}

/// An error as the client reads it: `application/problem+json` (RFC 9457). Says what was wrong and what would be right; never what is inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    status: u16,
    title: &'static str,
    detail: String,
}

impl Problem {
    /// The media type of [`Self::to_json`].
    pub const MEDIA_TYPE: HeaderValue = HeaderValue::from_static("application/problem+json");

    /// A problem with its status' own title.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status: status.as_u16(), title: status.canonical_reason().unwrap_or("Error"), detail: detail.into() }
    }

    /// The body.
    pub fn to_json(&self) -> String {
        // A struct of a number and two strings cannot fail to serialise; the fallback keeps this total.
        serde_json::to_string(self).unwrap_or_else(|_| "{}".to_owned()) + "\n"
    }
}

/// Whether the `Content-Disposition` of a form's part makes the part a file: it has a parameter `filename` or `filename*`, in any case
/// and with any bytes in its value (RFC 7578, section 4.2).
pub fn is_file(disposition: &HeaderValue) -> bool {
    let mut rest = disposition.as_bytes();
    // The first word is the type.
    while let Some(at) = rest.iter().position(|byte| *byte == b';') {
        rest = rest[at + 1..].trim_ascii_start();
        let end = rest.iter().position(|byte| matches!(byte, b'=' | b';')).unwrap_or(rest.len());
        let (name, value) = rest.split_at(end);
        let name = name.trim_ascii();
        if value.starts_with(b"=") && (name.eq_ignore_ascii_case(b"filename") || name.eq_ignore_ascii_case(b"filename*")) {
            return true;
        }
        rest = value;
        // A semicolon within quotes ends nothing.
        if let Some(quoted) = value.strip_prefix(b"=").map(<[u8]>::trim_ascii_start).and_then(|value| value.strip_prefix(b"\"")) {
            let mut escaped = false;
            let close = quoted.iter().position(|byte| {
                let closes = *byte == b'"' && !escaped;
                escaped = *byte == b'\\' && !escaped;
                closes
            });
            rest = &quoted[close.map_or(quoted.len(), |at| at + 1)..];
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let digest = Digest::of(b"x");
        let path = blob_path(&digest);
        assert_eq!(Target::of(&path), Target::Blob(digest));
        assert_eq!(Target::of("/cas"), Target::Collection);
        assert_eq!(Target::of("/cas/"), Target::Malformed(""));
        assert_eq!(Target::of("/cas/abc"), Target::Malformed("abc"));
        assert_eq!(Target::of(&path.to_uppercase()), Target::Other);
        assert_eq!(Target::of(&format!("{path}/x")), Target::Malformed(&format!("{digest}/x")));
        assert_eq!(Target::of("/casual"), Target::Other);
        assert_eq!(Target::of("/"), Target::Other);
        assert_eq!(Target::of("*"), Target::Other);
    }

    #[test]
    fn instances_share_the_blobs() {
        let digest = Digest::of(b"x");
        for instance in ["team", "a", "v2.1", "A-b_c~d", &"i".repeat(128)] {
            assert_eq!(Target::of(&format!("/{instance}/cas/{digest}")), Target::Blob(digest), "{instance}");
        }
        for path in [
            format!("/v2/cas/{digest}"),
            format!("/kv/cas/{digest}"),
            format!("/ac/cas/{digest}"),
            format!("//cas/{digest}"),
            format!("/./cas/{digest}"),
            format!("/../cas/{digest}"),
            format!("/a/b/cas/{digest}"),
            format!("/a%20b/cas/{digest}"),
            format!("/team/cas/{digest}/"),
            format!("/team/cas/{digest}x"),
            format!("/team/cas/x{digest}"),
            format!("/team/casx/{digest}"),
            format!("/{}/cas/{digest}", "i".repeat(129)),
            "/team/cas/abc".to_owned(),
            "/team/cas".to_owned(),
        ] {
            assert_eq!(Target::of(&path), Target::Other, "{path}");
        }
        assert_eq!(Target::of(&format!("/cas/cas/{digest}")), Target::Malformed(&format!("cas/{digest}")));
    }

    #[test]
    fn entries_are_asked_about_again() {
        let digest = Digest::of(b"x");
        for selection in [Selection::Whole, Selection::Part { first: 0, last: 0 }, Selection::NotModified] {
            let (_, headers) = entry_head(&digest, 1, selection);
            assert_eq!(
                (&headers[header::CACHE_CONTROL], &headers[header::ETAG]),
                (&"no-cache".parse().unwrap(), &digest.etag().parse().unwrap())
            );
        }
        assert!(!entry_head(&digest, 1, Selection::Unsatisfiable).1.contains_key(header::CACHE_CONTROL));
    }

    #[test]
    fn heads() {
        let digest = Digest::of(b"x");
        let (status, headers) = blob_head(&digest, Some(100), Selection::Part { first: 10, last: 19 });
        assert_eq!(status, 206);
        assert_eq!(headers[header::CONTENT_RANGE], "bytes 10-19/100");
        assert_eq!(headers[header::CONTENT_LENGTH], "10");
        let (status, headers) = blob_head(&digest, Some(100), Selection::Unsatisfiable);
        assert_eq!((status.as_u16(), headers[header::CONTENT_RANGE].to_str().unwrap()), (416, "bytes */100"));
        let (status, headers) = blob_head(&digest, Some(100), Selection::NotModified);
        assert_eq!(status, 304);
        assert!(!headers.contains_key(header::CONTENT_LENGTH) && headers.contains_key(header::ETAG));
        let (_, headers) = blob_head(&digest, None, Selection::Whole);
        assert!(!headers.contains_key(header::CONTENT_LENGTH));
    }

    #[test]
    fn a_part_with_a_file_name_is_a_file() {
        for (disposition, file) in [
            (&b"form-data; name=\"file\"; filename=\"x.bin\""[..], true),
            (b"form-data; filename*=UTF-8''na%C3%AFve.bin; name=file", true),
            (b"form-data; name=file; FileName = x", true),
            (b"Form-Data;NAME=file;FILENAME*=x", true),
            (b"form-data; name=\"file\"; filename=\"na\xefve.bin\"", true),
            (b"form-data; name=\"a;b\\\"; c\"; filename=\"\"", true),
            (b"form-data; name=\"a; filename=x\"", false),
            (b"form-data; name=filename", false),
            (b"form-data; name=x; filename", false),
            (b"form-data; name=x; nofilename=y; filenames=z", false),
            (b"form-data; name=\"open; filename=x", false),
            (b"filename=x", false),
            (b"", false),
        ] {
            let value = HeaderValue::from_bytes(disposition).unwrap();
            assert_eq!(is_file(&value), file, "{value:?}");
        }
    }

    #[test]
    fn problems_are_json() {
        let json = Problem::new(StatusCode::BAD_REQUEST, "say \"please\"").to_json();
        let back: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(back, serde_json::json!({"status": 400, "title": "Bad Request", "detail": "say \"please\""}));
    }
}
