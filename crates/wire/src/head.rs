//! The status and headers of an answer with a blob or an entry.

use crate::Selection;
use castier_blob::Digest;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

/// `Repr-Digest`, RFC 9530.
pub const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");
/// `Cache-Status`, RFC 9211.
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// `Cache-Control` of blobs. A blob never changes. A year is the longest age that caches commonly accept; `immutable` (RFC 8246) prevents
/// revalidation on reload.
pub const CACHE_FOREVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// The status and all headers except `Date` of the answer to a GET or HEAD of a blob of `size` bytes.
///
/// `size` is `None` for a blob of unknown length that is being streamed. Then `selection` must be [`Selection::Whole`] or
/// [`Selection::NotModified`].
pub fn blob_head(digest: &Digest, size: Option<u64>, selection: Selection) -> (StatusCode, HeaderMap) {
    let mut headers = HeaderMap::with_capacity(12);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let known = || size.map_or_else(|| "*".to_owned(), |n| n.to_string());
    if selection == Selection::Unsatisfiable {
        // An error: it must have no headers that let a cache keep it.
        headers.insert(header::CONTENT_RANGE, text(format!("bytes */{}", known())));
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
            headers.insert(header::CONTENT_RANGE, text(format!("bytes {first}-{last}/{}", known())));
            (StatusCode::PARTIAL_CONTENT, Some(last - first + 1))
        }
        Selection::Whole | Selection::NotModified | Selection::Unsatisfiable => (StatusCode::OK, size),
    };
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    (status, headers)
}

/// As [`blob_head`], for a mutable entry whose bytes have this digest now. A cache must revalidate the answer before each use.
pub fn entry_head(digest: &Digest, size: u64, selection: Selection) -> (StatusCode, HeaderMap) {
    let (status, mut headers) = blob_head(digest, Some(size), selection);
    if let Some(value) = headers.get_mut(header::CACHE_CONTROL) {
        *value = HeaderValue::from_static("no-cache");
    }
    (status, headers)
}

/// A header value from text that this crate composed, which is always visible ASCII.
fn text(value: String) -> HeaderValue {
    HeaderValue::try_from(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The headers that are for one hop only (RFC 9110, section 7.6.1): a fixed list, and those that `Connection` names.
pub fn hop_by_hop(headers: &HeaderMap) -> Vec<HeaderName> {
    const FIXED: [&str; 7] = ["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let named: Vec<HeaderName> = named.filter_map(|name| name.trim().parse().ok()).collect();
    // Framing headers stay even if `Connection` names them. Without them the body would end somewhere else.
    let fixed = FIXED.into_iter().map(HeaderName::from_static).filter(|name| *name != header::TRANSFER_ENCODING);
    fixed
        .chain(named.into_iter().filter(|name| ![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::HOST].contains(name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_must_be_revalidated() {
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
}
