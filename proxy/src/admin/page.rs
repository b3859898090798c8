//! The status page: one document, and the headers that confine it.

use axum::{
    http::header,
    response::{Html, IntoResponse},
};
use data_encoding::BASE64;
use sha2::{Digest as _, Sha256};
use std::sync::LazyLock;

/// The document, with its style and its script. All figures come from `/stats`, by the script.
const PAGE: &str = include_str!("page.html");
/// What stands around the style and around the script.
const STYLE: (&str, &str) = ("<style>", "</style>");
const SCRIPT: (&str, &str) = ("<script type=\"module\">", "</script>");

/// What a browser may do with the page: run this script, use this style, and ask this listener.
///
/// The script cannot turn text into markup either (`require-trusted-types-for`): client names, digests and errors come from strangers.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        hash(inline(SCRIPT)),
        hash(inline(STYLE)),
    )
});

/// The text of the page between two marks; nothing if they are missing.
fn inline((start, end): (&str, &str)) -> &'static str {
    PAGE.split_once(start).and_then(|(_, rest)| rest.split_once(end)).map_or("", |(inside, _)| inside)
}

/// As a Content-Security-Policy names an inline element.
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
        // The hash of nothing would stand for a style or a script that was not found.
        assert!(!POLICY.contains(&hash("")), "{}", *POLICY);
        assert_eq!(hash("alert(1)"), "sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI=");
    }
}
