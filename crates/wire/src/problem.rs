//! Error bodies.

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;

/// An error body: `application/problem+json` (RFC 9457). It says what was wrong and what would be right. It never shows internal details.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    status: u16,
    title: &'static str,
    detail: String,
}

impl Problem {
    /// The media type of [`Self::to_json`].
    pub const MEDIA_TYPE: HeaderValue = HeaderValue::from_static("application/problem+json");

    /// A problem with the standard title of its status.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status: status.as_u16(), title: status.canonical_reason().unwrap_or("Error"), detail: detail.into() }
    }

    /// Sets the headers that every answer with such a body has.
    pub fn set_headers(headers: &mut HeaderMap) {
        headers.insert(header::CONTENT_TYPE, Self::MEDIA_TYPE);
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    }

    /// The body.
    pub fn to_json(&self) -> String {
        // A number and two strings always serialise, so the fallback is never used.
        serde_json::to_string(self).unwrap_or_else(|_| "{}".to_owned()) + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_json() {
        let json = Problem::new(StatusCode::BAD_REQUEST, "say \"please\"").to_json();
        let back: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(back, serde_json::json!({"status": 400, "title": "Bad Request", "detail": "say \"please\""}));
    }
}
