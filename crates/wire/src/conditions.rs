//! Conditions and ranges of a request: `Range`, `If-Range` and `If-None-Match` (RFC 9110, sections 13 and 14).

use castier_blob::Digest;
use http::{HeaderMap, HeaderValue, Method, header};

/// The part of a blob that a request selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The whole blob: 200.
    Whole,
    /// The bytes `first..=last`: 206. Always within the blob.
    Part {
        /// Offset of the first byte.
        first: u64,
        /// Offset of the last byte.
        last: u64,
    },
    /// The client has the blob: 304.
    NotModified,
    /// No byte of the requested range exists: 416.
    Unsatisfiable,
}

/// Whether `If-None-Match` names this blob. If so, the answer is 304 without a look-up: the digest names the content, so a client that has
/// the validator has the blob. The comparison is weak, as RFC 9110 requires for `If-None-Match`.
pub fn names_this_blob(headers: &HeaderMap, digest: &Digest) -> bool {
    headers.get_all(header::IF_NONE_MATCH).iter().any(|value| entity_tags(value).any(|tag| is_etag_of(tag, digest)))
}

/// The part that a request for an existing blob of `size` bytes selects. Ignores dates, since a blob never changes.
///
/// - Several ranges select the whole blob, and a malformed `Range` is ignored. RFC 9110 allows both.
/// - `Range` is defined for GET only (section 14.2), so a HEAD always selects the whole blob.
/// - A suffix of an empty blob selects the whole blob, since a 206 cannot express it.
pub fn select(method: &Method, headers: &HeaderMap, digest: &Digest, size: u64) -> Selection {
    let any = |value: &HeaderValue| value.as_bytes().trim_ascii() == b"*";
    if headers.get_all(header::IF_NONE_MATCH).iter().any(any) || names_this_blob(headers, digest) {
        return Selection::NotModified;
    }
    if method != Method::GET {
        return Selection::Whole;
    }
    let Some(range) = single(headers, header::RANGE) else { return Selection::Whole };
    // If-Range needs a strong comparison: a weak tag or a date never matches.
    let honoured = match headers.get(header::IF_RANGE) {
        None => true,
        Some(tag) => tag.as_bytes().trim_ascii() == digest.etag().as_bytes(),
    };
    if honoured { parse_range(range, size) } else { Selection::Whole }
}

/// The part of a body of `size` bytes that `Range` selects, without a look at conditions.
pub fn range(headers: &HeaderMap, size: u64) -> Selection {
    single(headers, header::RANGE).map_or(Selection::Whole, |range| parse_range(range, size))
}

/// The value of a header that may occur once; `None` if it is missing or repeated.
fn single(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    if values.next().is_some() {
        return None;
    }
    first.to_str().ok()
}

fn entity_tags(value: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    // A foreign tag may have a comma, and is split in the middle. That never gives a false match, since a digest's tag is 64 hexadecimal
    // characters in quotes, without a comma.
    value.as_bytes().split(|&b| b == b',').map(<[u8]>::trim_ascii)
}

fn is_etag_of(tag: &[u8], digest: &Digest) -> bool {
    let tag = tag.strip_prefix(b"W/").unwrap_or(tag);
    tag.strip_prefix(b"\"").and_then(|t| t.strip_suffix(b"\"")).is_some_and(|t| Digest::parse(t).as_ref() == Ok(digest))
}

fn parse_range(value: &str, size: u64) -> Selection {
    let Some((unit, specs)) = value.split_once('=') else { return Selection::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Selection::Whole;
    }
    let mut specs = specs.split(',').map(str::trim).filter(|spec| !spec.is_empty());
    let (Some(spec), None) = (specs.next(), specs.next()) else { return Selection::Whole };
    let Some((first, last)) = spec.split_once('-') else { return Selection::Whole };
    match (position(first), position(last)) {
        (Ok(Some(first)), Ok(last)) => match last {
            Some(last) if last < first => Selection::Whole,
            _ if first >= size => Selection::Unsatisfiable,
            _ => Selection::Part { first, last: last.unwrap_or(u64::MAX).min(size - 1) },
        },
        (Ok(None), Ok(Some(0))) => Selection::Unsatisfiable,
        (Ok(None), Ok(Some(_))) if size == 0 => Selection::Whole,
        (Ok(None), Ok(Some(suffix))) => Selection::Part { first: size.saturating_sub(suffix), last: size - 1 },
        _ => Selection::Whole,
    }
}

/// Parses digits. A number too large for a `u64` saturates, since it is past the end of any blob. Empty text gives `None`.
fn position(digits: &str) -> Result<Option<u64>, ()> {
    if digits.is_empty() {
        return Ok(None);
    }
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(());
    }
    Ok(Some(digits.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ask(pairs: &[(&'static str, &str)], digest: &Digest, size: u64) -> Selection {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        select(&Method::GET, &headers, digest, size)
    }

    #[test]
    fn decision_table() {
        let digest = Digest::of(b"x");
        let (etag, weak, other) = (digest.etag(), format!("W/{}", digest.etag()), Digest::of(b"y").etag());
        let part = |first, last| Selection::Part { first, last };
        use Selection::{NotModified, Unsatisfiable, Whole};
        let list = format!("\"zz\", {etag}");
        let table: &[(&[(&'static str, &str)], Selection)] = &[
            (&[], Whole),
            (&[("range", "bytes=0-0")], part(0, 0)),
            (&[("range", "bytes=90-")], part(90, 99)),
            (&[("range", "bytes=-5")], part(95, 99)),
            (&[("range", "bytes=-500")], part(0, 99)),
            (&[("range", "bytes=0-99999999999999999999999")], part(0, 99)),
            (&[("range", "BYTES=1-2")], part(1, 2)),
            (&[("range", "bytes=1-2,")], part(1, 2)),
            (&[("range", "bytes=100-")], Unsatisfiable),
            (&[("range", "bytes=99999999999999999999999-")], Unsatisfiable),
            (&[("range", "bytes=-0")], Unsatisfiable),
            (&[("range", "bytes=9-3")], Whole),
            (&[("range", "bytes=0-1,5-6")], Whole),
            (&[("range", "bytes=0-1"), ("range", "bytes=5-6")], Whole),
            (&[("range", "lines=1-2")], Whole),
            (&[("range", "bytes=x")], Whole),
            (&[("range", "bytes=+1-2")], Whole),
            (&[("range", "bytes=-")], Whole),
            (&[("range", "bytes=")], Whole),
            (&[("range", "bytes=1-2"), ("if-range", &etag)], part(1, 2)),
            (&[("range", "bytes=1-2"), ("if-range", &weak)], Whole),
            (&[("range", "bytes=1-2"), ("if-range", &other)], Whole),
            (&[("range", "bytes=1-2"), ("if-range", "Wed, 21 Oct 2015 07:28:00 GMT")], Whole),
            (&[("if-none-match", &etag)], NotModified),
            (&[("if-none-match", &weak)], NotModified),
            (&[("if-none-match", &list)], NotModified),
            (&[("if-none-match", "*")], NotModified),
            (&[("if-none-match", &other)], Whole),
            (&[("if-none-match", &other), ("range", "bytes=1-2")], part(1, 2)),
            (&[("if-none-match", &etag), ("range", "bytes=100-")], NotModified),
            (&[("if-modified-since", "Wed, 21 Oct 2015 07:28:00 GMT")], Whole),
        ];
        for (headers, expected) in table {
            assert_eq!(ask(headers, &digest, 100), *expected, "{headers:?}");
        }
        assert_eq!(ask(&[("range", "bytes=-5")], &digest, 0), Whole);
        assert_eq!(ask(&[("range", "bytes=0-")], &digest, 0), Unsatisfiable);
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, HeaderValue::from_static("bytes=1-2"));
        assert_eq!(select(&Method::HEAD, &headers, &digest, 100), Whole);
    }

    proptest! {
        /// The oracle lists the selected offsets one by one.
        #[test]
        fn ranges_agree_with_the_oracle(first in prop::option::of(0u64..40), last in prop::option::of(0u64..40), size in 1u64..30) {
            let text = |n: Option<u64>| n.map(|n| n.to_string()).unwrap_or_default();
            let answer = parse_range(&format!("bytes={}-{}", text(first), text(last)), size);
            let wanted: Vec<u64> = match (first, last) {
                (Some(first), Some(last)) => (0..size).filter(|i| *i >= first && *i <= last).collect(),
                (Some(first), None) => (0..size).filter(|i| *i >= first).collect(),
                (None, Some(n)) => (0..size).filter(|i| i + n >= size).collect(),
                (None, None) => vec![],
            };
            let malformed = matches!((first, last), (None, None)) || matches!((first, last), (Some(f), Some(l)) if l < f);
            match answer {
                Selection::Part { first, last } => prop_assert_eq!((first..=last).collect::<Vec<_>>(), wanted),
                Selection::Whole => prop_assert!(malformed),
                Selection::Unsatisfiable => prop_assert!(!malformed && wanted.is_empty()),
                Selection::NotModified => prop_assert!(false),
            }
        }

        #[test]
        fn no_header_value_panics_or_selects_outside(value in "(bytes)?[ =,0-9a-z-]{0,40}", size in 0u64..50) {
            if let Selection::Part { first, last } = parse_range(&value, size) {
                prop_assert!(first <= last && last < size);
            }
        }
    }
}
