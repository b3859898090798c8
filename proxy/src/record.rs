//! One access record per request, and the same facts to the metrics.

pub use crate::metrics::CLIENT_GONE;

use crate::metrics::{Listener, Metrics, Request, Route, Served};
use castier_blob::Digest;
use http::{HeaderMap, Version, header};
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

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
    /// The client.
    pub peer: Option<SocketAddr>,
    /// What is not known of every request.
    pub more: More<'a>,
}

/// What is not known of every request.
#[derive(Clone, Copy, Default)]
pub struct More<'a> {
    /// From the head's arrival to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// The version of HTTP that the client speaks.
    pub proto: Option<Version>,
    /// What the client calls itself.
    pub user_agent: Option<&'a str>,
    /// Why the response was cut, or failed.
    pub error: Option<&'a str>,
    /// The blob that the request was about.
    pub digest: Option<Digest>,
}

/// `User-Agent`, if it is text.
pub fn user_agent(headers: &HeaderMap) -> Option<&str> {
    str::from_utf8(headers.get(header::USER_AGENT)?.as_bytes()).ok()
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
    /// The client's address.
    fn client(&self) -> Option<IpAddr> {
        self.peer.map(|peer| peer.ip())
    }

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
            client: self.client(),
            digest: self.more.digest,
        });
        // Every node asks every other each second how it is.
        let control = self.route == Route::Control;
        if (control && tracing::enabled!(target: "castier::access", tracing::Level::DEBUG))
            || (!control && tracing::enabled!(target: "castier::access", tracing::Level::INFO))
        {
            self.write(control);
        }
    }

    fn write(&self, control: bool) {
        let milliseconds = |duration: Duration| duration.as_micros() as f64 / 1000.0;
        let (duration_ms, first_byte_ms) = (milliseconds(self.took), self.more.first_byte.map(milliseconds));
        let (method, path, status, bytes) = (self.method, beginning(self.path, LOGGED_PATH), self.code, self.bytes);
        let (cache, tier, source) = words(self.cache);
        // The origin alone answers what goes past the cache.
        let source = if cache == Some("bypass") { Some("origin") } else { source };
        let client = self.client().map(tracing::field::display);
        let (proto, error) = (self.more.proto.map(tracing::field::debug), self.more.error);
        let user_agent = self.more.user_agent.map(|agent| beginning(agent, LOGGED_AGENT));
        if control {
            tracing::debug!(target: "castier::access", method, path, status, bytes, duration_ms, first_byte_ms, cache, tier, source, client, proto, user_agent, error);
        } else {
            tracing::info!(target: "castier::access", method, path, status, bytes, duration_ms, first_byte_ms, cache, tier, source, client, proto, user_agent, error);
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
