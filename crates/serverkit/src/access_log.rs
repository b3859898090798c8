//! The access log: one record per request, with the same fields in both programs; and the same facts as a span of OpenTelemetry.

use crate::series::OTHER_METHOD;
use castier_wire::{
    Fields,
    trace::{Chance, Span, Trace, Value},
};
use http::{HeaderMap, Version, header};
use std::{borrow::Cow, net::IpAddr, time::Duration};

/// How many characters of a path are logged: enough for any that means something, not all of what a client may have made up.
pub const LOGGED_PATH: usize = 600;
/// How many characters of a `User-Agent` are logged.
pub const LOGGED_AGENT: usize = 200;

/// What is known of a request when it is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access<'a> {
    /// Its method, as sent.
    pub method: &'a str,
    /// Its path, as sent.
    pub path: &'a str,
    /// The status that the client got.
    pub status: u16,
    /// Bytes of the body that were sent.
    pub bytes: u64,
    /// From the end of the request's head to the last byte of the answer.
    pub took: Duration,
    /// From the end of the request's head to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// What the cache did; none if there is none.
    pub cache: Option<&'static str>,
    /// The tier that the bytes came from.
    pub tier: Option<&'static str>,
    /// The source that the bytes came from.
    pub source: Option<&'static str>,
    /// The client, as far as trusted proxies tell.
    pub client: Option<IpAddr>,
    /// The version of HTTP that the client speaks.
    pub proto: Option<Version>,
    /// Which request it is.
    pub trace: Option<&'a Trace>,
    /// What the client calls itself.
    pub user_agent: Option<&'a str>,
    /// Why the answer was cut, or failed.
    pub error: Option<&'a str>,
}

/// Writes the access record of an [`Access`]: `write_access_record!(INFO, "castier::access", access)`. The level is one of
/// `tracing::Level`, and the target is a literal.
#[macro_export]
macro_rules! write_access_record {
    ($level:ident, $target:literal, $access:expr) => {{
        let access: &$crate::access_log::Access<'_> = $access;
        ::tracing::event!(
            target: $target,
            ::tracing::Level::$level,
            method = access.method,
            path = $crate::access_log::beginning(access.path, $crate::access_log::LOGGED_PATH),
            status = access.status,
            bytes = access.bytes,
            duration_ms = $crate::access_log::milliseconds(access.took),
            first_byte_ms = access.first_byte.map($crate::access_log::milliseconds),
            cache = access.cache,
            tier = access.tier,
            source = access.source,
            client = access.client.map(::tracing::field::display),
            proto = access.proto.map(::tracing::field::debug),
            trace_id = access.trace.map(|trace| ::tracing::field::display(trace.trace_id())),
            request_id = access.trace.map(|trace| ::tracing::field::display(trace.request_id())),
            user_agent = access.user_agent.map(|agent| $crate::access_log::beginning(agent, $crate::access_log::LOGGED_AGENT)),
            error = access.error,
        );
    }};
}

impl Access<'_> {
    /// The same in the words of OpenTelemetry's conventions for HTTP. `method` is the method's label in the metrics, `route` the request's
    /// route if it has one, `more` what only this program knows.
    pub fn span(
        &self,
        trace: &Trace,
        method: &'static str,
        route: Option<&'static str>,
        more: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> Span {
        let (method, in_name) = if method == OTHER_METHOD { ("_OTHER", "HTTP") } else { (method, method) };
        let text = |text: &str, most| Value::Text(beginning(text, most).to_owned());
        let mut attributes = vec![
            ("http.request.method", Value::Word(method)),
            ("url.path", text(self.path, LOGGED_PATH)),
            ("url.scheme", Value::Word("http")),
            ("http.response.status_code", Value::Number(self.status.into())),
            ("http.response.body.size", Value::Number(i64::try_from(self.bytes).unwrap_or(i64::MAX))),
            ("castier.request_id", Value::Text(trace.request_id().to_string())),
        ];
        let version = self.proto.map(|proto| if proto == Version::HTTP_10 { "1.0" } else { "1.1" });
        let words = [
            ("http.route", route),
            ("network.protocol.version", version),
            ("castier.cache", self.cache),
            ("castier.tier", self.tier),
            ("castier.source", self.source),
        ];
        attributes.extend(words.into_iter().filter_map(|(name, word)| Some((name, Value::Word(word?)))));
        attributes.extend(self.client.map(|client| ("client.address", Value::Text(client.to_string()))));
        attributes.extend(self.user_agent.map(|agent| ("user_agent.original", text(agent, LOGGED_AGENT))));
        attributes.extend(more);
        // A client's mistake is no error of this server, and neither is a 504 that a peer asked for.
        let failed = self.error.filter(|_| !(400..500).contains(&self.status));
        if failed.is_some() {
            attributes.push(("error.type", if self.status >= 500 { Value::Text(self.status.to_string()) } else { Value::Word("cut") }));
        }
        let name = route.map_or_else(|| in_name.to_owned(), |route| format!("{in_name} {route}"));
        trace.server_span(name, self.took, failed.map(|error| beginning(error, LOGGED_AGENT).to_owned()), attributes)
    }
}

/// Which request this is, as its fields say, or a new one. `sample` is the part of new ones whose spans are wanted.
pub fn trace_of(fields: &impl Fields, sample: Option<f64>) -> Trace {
    let sampled = sample.is_some_and(|sample| rand::random::<f64>() < sample);
    Trace::of(fields, Chance { trace: rand::random(), request: rand::random(), span: rand::random(), sampled })
}

/// `User-Agent`; bytes that are not text are marked.
pub fn user_agent(headers: &HeaderMap) -> Option<Cow<'_, str>> {
    Some(String::from_utf8_lossy(headers.get(header::USER_AGENT)?.as_bytes()))
}

/// The first `most` characters of a text.
pub fn beginning(text: &str, most: usize) -> &str {
    match text.char_indices().nth(most) {
        Some((end, _)) if text.len() > most => &text[..end],
        _ => text,
    }
}

/// A duration as records have it.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::series::{METHODS, method_label};

    #[test]
    fn a_beginning_is_counted_in_characters() {
        assert_eq!((beginning("äöü", 2), beginning("äöü", 3), beginning("ab", 9)), ("äö", "äöü", "ab"));
    }

    #[test]
    fn spans_tell_errors_of_the_server_alone() {
        let trace = trace_of(&HeaderMap::new(), None);
        let span = |status, error: Option<&str>, method| {
            let access = Access { method, path: "/cas/x", status, error, ..Access::default() };
            access.span(&trace, method_label(method, &METHODS), Some("/cas/{digest}"), [("more", Value::Word("more"))])
        };
        let error_type = |span: &Span| span.attributes.iter().find(|(name, _)| *name == "error.type").map(|(_, value)| value.clone());
        let fine = span(200, None, "GET");
        assert_eq!((fine.name.as_str(), fine.error.as_deref(), error_type(&fine)), ("GET /cas/{digest}", None, None));
        assert!(fine.attributes.contains(&("more", Value::Word("more"))));
        let refused = span(404, Some("absent"), "BREW");
        assert_eq!((refused.name.as_str(), refused.error.as_deref(), error_type(&refused)), ("HTTP /cas/{digest}", None, None));
        assert!(refused.attributes.contains(&("http.request.method", Value::Word("_OTHER"))));
        assert_eq!(error_type(&span(503, Some("busy"), "GET")), Some(Value::Text("503".into())));
        let cut = span(200, Some("cut: x"), "GET");
        assert_eq!((cut.error.as_deref(), error_type(&cut)), (Some("cut: x"), Some(Value::Word("cut"))));
    }
}
