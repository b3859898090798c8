//! `Expect: 100-continue`.

use http::{HeaderMap, Version, header};

/// Whether the client waits for `100 Continue` before it sends the body. Over HTTP/1.0 an expectation is ignored (RFC 9110, section 10.1.1).
pub fn expects_continue(version: Version, headers: &HeaderMap) -> bool {
    version >= Version::HTTP_11 && headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn an_expectation_needs_http_1_1() {
        let expecting = |value: &'static str| HeaderMap::from_iter([(header::EXPECT, HeaderValue::from_static(value))]);
        assert!(expects_continue(Version::HTTP_11, &expecting("100-Continue")));
        assert!(!expects_continue(Version::HTTP_10, &expecting("100-continue")));
        assert!(!expects_continue(Version::HTTP_11, &expecting("200-ok")) && !expects_continue(Version::HTTP_11, &HeaderMap::new()));
    }
}
