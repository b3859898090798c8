//! One access record per request, and the same facts to the metrics.

pub use crate::metrics::CLIENT_GONE;

use crate::{
    metrics::{Listener, Metrics, Request, Route, Served},
    trace,
};
use castier_blob::Digest;
use castier_wire::trace::{Trace, Value};
use http::{HeaderMap, Version, header};
use std::{borrow::Cow, net::IpAddr, time::Duration};

/// What is said of a request when it is over.
pub struct Record<'a> {
    /// Where it came in.
    pub listener: Listener,
    /// What it was about.
    pub route: Route,
    /// Its method.
    pub method: &'a str,
    /// Its path, as sent.
    pub path: &'a str,
    /// The status it got, or [`CLIENT_GONE`].
    pub code: u16,
    /// Body bytes sent.
    pub bytes: u64,
    /// From the head's arrival to the last byte.
    pub took: Duration,
    /// `Cache-Status` as sent.
    pub cache: &'a str,
    /// How it was answered.
    pub served: Served,
    /// The client, as far as trusted proxies tell.
    pub client: Option<IpAddr>,
    /// What is not known of every request.
    pub more: More<'a>,
}

/// What is not known of every request.
#[derive(Clone, Default)]
pub struct More<'a> {
    /// From the head's arrival to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// The version of HTTP that the client speaks.
    pub proto: Option<Version>,
    /// What the client calls itself.
    pub user_agent: Option<Cow<'a, str>>,
    /// Why the response was cut, or failed.
    pub error: Option<&'a str>,
    /// The blob that the request was about.
    pub digest: Option<Digest>,
    /// Which request it was; none if nobody wants to know, or it could not be read.
    pub trace: Option<&'a Trace>,
}

/// Whether anybody wants to know which request it was: if not, nothing is spent on that where a request is answered at once.
pub fn is_wanted() -> bool {
    tracing::enabled!(target: "castier::access", tracing::Level::INFO) || trace::is_exported()
}

/// `User-Agent`; what is no text in it is marked.
pub fn user_agent(headers: &HeaderMap) -> Option<Cow<'_, str>> {
    Some(String::from_utf8_lossy(headers.get(header::USER_AGENT)?.as_bytes()))
}

/// How much of a path is logged: any that means something to an origin of ours, and not all of what somebody may have made up.
const LOGGED_PATH: usize = 600;
/// How much of a client's name for itself is logged.
const LOGGED_AGENT: usize = 200;

/// The beginning of a text.
fn beginning(text: &str, most: usize) -> &str {
    match text.char_indices().nth(most) {
        Some((end, _)) if text.len() > most => &text[..end],
        _ => text,
    }
}

/// A `Cache-Status` of ours in the words of a record: `cache`, `tier`, `source`.
fn words(cache_status: &str) -> (Option<&'static str>, Option<&'static str>, Option<&'static str>) {
    let (mut cache, mut tier, mut source) = (None, None, None);
    for part in cache_status.split("; ").skip(1) {
        match part {
            "hit" => cache = Some("hit"),
            "fwd=bypass" => cache = Some("bypass"),
            "collapsed" => cache = Some("collapsed"),
            "fwd=uri-miss" | "fwd=request" => cache = Some("miss"),
            "detail=memory" => tier = Some("memory"),
            "detail=mirror" => tier = Some("mirror"),
            "detail=disk" => tier = Some("disk"),
            "detail=origin" => source = Some("origin"),
            "detail=peer" => source = Some("peer"),
            _ => {}
        }
    }
    (cache, tier, source)
}

impl Record<'_> {
    /// Counts it, and writes the record if anybody listens.
    pub fn log(&self, metrics: &Metrics) {
        metrics.request(&Request {
            listener: self.listener,
            method: method_label(self.method),
            route: self.route,
            code: self.code,
            served: self.served,
            took: self.took,
            first_byte: self.more.first_byte,
            bytes: self.bytes,
            client: self.client,
            digest: self.more.digest,
        });
        // Every node asks every other each second how it is.
        let control = self.route == Route::Control;
        if (control && tracing::enabled!(target: "castier::access", tracing::Level::DEBUG))
            || (!control && tracing::enabled!(target: "castier::access", tracing::Level::INFO))
        {
            self.write(control);
        }
        if let Some(trace) = self.more.trace.filter(|trace| trace.is_sampled() && !control) {
            trace::export(|| self.span(trace));
        }
    }

    /// The same in the words of OpenTelemetry's conventions for HTTP.
    fn span(&self, trace: &Trace) -> castier_wire::trace::Span {
        let text = |text: &str| Value::Text(text.to_owned());
        let route = match self.route {
            Route::Blob => Some("/cas/{digest}"),
            Route::Collection => Some("/cas"),
            Route::Relay | Route::Refused | Route::Control => None,
        };
        let (cache, tier, source) = self.words();
        let method = method_label(self.method);
        let mut attributes = vec![
            ("http.request.method", Value::Word(if method == "OTHER" { "_OTHER" } else { method })),
            ("url.path", text(beginning(self.path, LOGGED_PATH))),
            ("url.scheme", Value::Word("http")),
            ("http.response.status_code", Value::Number(self.code.into())),
            ("http.response.body.size", Value::Number(i64::try_from(self.bytes).unwrap_or(i64::MAX))),
            ("castier.request_id", Value::Text(trace.request_id().to_string())),
            ("castier.listener", Value::Word(self.listener.as_str())),
        ];
        let proto = self.more.proto.map(|proto| if proto == Version::HTTP_10 { "1.0" } else { "1.1" });
        let words = [
            ("http.route", route),
            ("network.protocol.version", proto),
            ("castier.cache", cache),
            ("castier.tier", tier),
            ("castier.source", source),
        ];
        attributes.extend(words.into_iter().filter_map(|(name, word)| Some((name, Value::Word(word?)))));
        attributes.extend(self.client.map(|client| ("client.address", Value::Text(client.to_string()))));
        attributes.extend(self.more.user_agent.as_deref().map(|agent| ("user_agent.original", text(beginning(agent, LOGGED_AGENT)))));
        // What the client did wrong is no error of this server, and neither is a 504 that a peer has asked for.
        let failed = self.more.error.is_some() && !(400..500).contains(&self.code);
        let error = failed.then(|| beginning(self.more.error.unwrap_or_default(), LOGGED_AGENT).to_owned());
        if failed {
            attributes.push(("error.type", if self.code >= 500 { Value::Text(self.code.to_string()) } else { Value::Word("cut") }));
        }
        let method = if method == "OTHER" { "HTTP" } else { method };
        let name = route.map_or_else(|| method.to_owned(), |route| format!("{method} {route}"));
        trace.server_span(name, self.took, error, attributes)
    }

    /// `cache`, `tier`, `source`.
    fn words(&self) -> (Option<&'static str>, Option<&'static str>, Option<&'static str>) {
        let (cache, tier, source) = words(self.cache);
        // The origin alone answers what goes past the cache.
        (cache, tier, if cache == Some("bypass") { Some("origin") } else { source })
    }

    fn write(&self, control: bool) {
        let milliseconds = |duration: Duration| duration.as_micros() as f64 / 1000.0;
        let (duration_ms, first_byte_ms) = (milliseconds(self.took), self.more.first_byte.map(milliseconds));
        let (method, path, status, bytes) = (self.method, beginning(self.path, LOGGED_PATH), self.code, self.bytes);
        let (cache, tier, source) = self.words();
        let client = self.client.map(tracing::field::display);
        let trace_id = self.more.trace.map(|trace| tracing::field::display(trace.trace_id()));
        let request_id = self.more.trace.map(|trace| tracing::field::display(trace.request_id()));
        let (proto, error) = (self.more.proto.map(tracing::field::debug), self.more.error);
        let user_agent = self.more.user_agent.as_deref().map(|agent| beginning(agent, LOGGED_AGENT));
        if control {
            tracing::debug!(target: "castier::access", method, path, status, bytes, duration_ms, first_byte_ms, cache, tier, source, client, proto, trace_id, request_id, user_agent, error);
        } else {
            tracing::info!(target: "castier::access", method, path, status, bytes, duration_ms, first_byte_ms, cache, tier, source, client, proto, trace_id, request_id, user_agent, error);
        }
    }
}

/// Methods are the client's invention; labels must be finite.
fn method_label(method: &str) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH"];
    KNOWN.into_iter().find(|known| *known == method).unwrap_or("OTHER")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_status_in_words() {
        for (status, expected) in [
            ("castier; hit; detail=memory", (Some("hit"), Some("memory"), None)),
            ("castier; hit; detail=validator", (Some("hit"), None, None)),
            ("castier; fwd=uri-miss; stored; detail=origin", (Some("miss"), None, Some("origin"))),
            ("castier; fwd=uri-miss; stored; collapsed; detail=peer", (Some("collapsed"), None, Some("peer"))),
            ("castier; fwd=bypass", (Some("bypass"), None, None)),
            ("", (None, None, None)),
        ] {
            assert_eq!(words(status), expected, "{status}");
        }
        assert_eq!((beginning("äöü", 2), beginning("äöü", 3), beginning("ab", 9)), ("äö", "äöü", "ab"));
    }
}
