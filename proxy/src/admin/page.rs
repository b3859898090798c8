//! The status page: one document, and the headers that restrict it.

use axum::{
    http::header,
    response::{Html, IntoResponse},
};
use data_encoding::BASE64;
use sha2::{Digest as _, Sha256};
use std::sync::LazyLock;

/// The document, with its style and its script. The script fetches all figures from `/stats`.
const PAGE: &str = include_str!("page.html");
/// The tags around the style and the script.
const STYLE: (&str, &str) = ("<style>", "</style>");
const SCRIPT: (&str, &str) = ("<script type=\"module\">", "</script>");

/// The Content-Security-Policy: the browser may run this script, use this style, and send requests to this listener.
///
/// The script cannot turn text into markup (`require-trusted-types-for`), since client names, digests and errors are untrusted.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        hash(inline(SCRIPT)),
        hash(inline(STYLE)),
    )
});

/// The text of the page between two tags; empty if they are missing.
fn inline((start, end): (&str, &str)) -> &'static str {
    PAGE.split_once(start).and_then(|(_, rest)| rest.split_once(end)).map_or("", |(inside, _)| inside)
}

/// The hash by which a Content-Security-Policy names an inline element.
fn hash(text: &str) -> String {
    format!("sha256-{}", BASE64.encode(&Sha256::digest(text)))
}

/// The answer to `GET /`.
pub(super) async fn page() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        // For browsers that do not know `frame-ancestors`.
        (header::X_FRAME_OPTIONS, "DENY"),
    ];
    (headers, Html(PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        for mark in [STYLE.0, STYLE.1, SCRIPT.0, SCRIPT.1, "<noscript>"] {
            assert_eq!(PAGE.matches(mark).count(), 1, "{mark}");
        }
        assert_eq!(PAGE.matches("<script").count(), 1);
        // A browser hashes the text after it has made line feeds of all line ends.
        assert!(!PAGE.contains('\r'));
        // The policy would block these, and only the browser's console would say so.
        for attribute in [" style=", " onclick=", " onload=", " src="] {
            assert!(!PAGE.contains(attribute), "{attribute}");
        }
        let addresses: Vec<_> = PAGE.match_indices("http").map(|(at, _)| PAGE[at..].split(['\'', '"']).next().unwrap()).collect();
        assert!(addresses.iter().all(|address| *address == "http://www.w3.org/2000/svg"), "{addresses:?}");
        assert!(!POLICY.contains("unsafe"), "{}", *POLICY);
        // The hash of an empty text would mean that the style or the script was not found.
        assert!(!POLICY.contains(&hash("")), "{}", *POLICY);
        assert_eq!(hash("alert(1)"), "sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI=");
    }
}
