//! One access record per request. The metrics get the same facts.

pub use castier_serverkit::{access_log::user_agent, series::CLIENT_GONE};

use crate::metrics::{Listener, Metrics, Request, Route, Served};
use castier_blob::Digest;
use castier_serverkit::{
    access_log::Access,
    series::{METHODS, method_label},
    write_access_record,
};
use castier_upstream::trace;
use castier_wire::trace::{Trace, Value};
use http::Version;
use std::{borrow::Cow, net::IpAddr, time::Duration};

/// The facts of a finished request.
pub struct Record<'a> {
    /// The listener that accepted it.
    pub listener: Listener,
    /// The kind of its path.
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
    /// The client's address; behind a trusted proxy, the one that the proxy names.
    pub client: Option<IpAddr>,
    /// Facts that not every request has.
    pub more: More<'a>,
}

/// Facts that not every request has.
#[derive(Clone, Default)]
pub struct More<'a> {
    /// From the head's arrival to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// The version of HTTP that the client speaks.
    pub proto: Option<Version>,
    /// `User-Agent`.
    pub user_agent: Option<Cow<'a, str>>,
    /// Why the response was cut, or failed.
    pub error: Option<&'a str>,
    /// The blob that the request was about.
    pub digest: Option<Digest>,
    /// Its trace and request id. `None` if neither logs nor traces need it, or if the head could not be read.
    pub trace: Option<&'a Trace>,
}

/// Whether logs or traces need [`More::trace`]. If not, the fast path does not compute it.
pub fn is_wanted() -> bool {
    tracing::enabled!(target: "castier::access", tracing::Level::INFO) || trace::is_exported()
}

/// The record's fields `cache`, `tier` and `source`, out of a `Cache-Status` that castier made.
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
    /// Counts the request, and writes the access record and the span if they are switched on.
    pub fn log(&self, metrics: &Metrics) {
        let method = method_label(self.method, &METHODS);
        metrics.request(&Request {
            listener: self.listener,
            method,
            route: self.route,
            code: self.code,
            served: self.served,
            took: self.took,
            first_byte: self.more.first_byte,
            bytes: self.bytes,
            client: self.client,
            digest: self.more.digest,
        });
        // Health checks come from every peer each second, so they are logged at `debug` only.
        let control = self.route == Route::Control;
        if !control && tracing::enabled!(target: "castier::access", tracing::Level::INFO) {
            write_access_record!(INFO, "castier::access", &self.access());
        } else if control && tracing::enabled!(target: "castier::access", tracing::Level::DEBUG) {
            write_access_record!(DEBUG, "castier::access", &self.access());
        }
        if let Some(trace) = self.more.trace.filter(|trace| trace.is_sampled() && !control) {
            let route = match self.route {
                Route::Blob => Some("/cas/{digest}"),
                Route::Collection => Some("/cas"),
                Route::Relay | Route::Refused | Route::Control | Route::Route => None,
            };
            let listener = ("castier.listener", Value::Word(self.listener.as_str()));
            trace::export(|| self.access().span(trace, method, route, [listener]));
        }
    }

    /// The record as both programs log it.
    fn access(&self) -> Access<'_> {
        let (cache, tier, source) = self.words();
        Access {
            method: self.method,
            path: self.path,
            status: self.code,
            bytes: self.bytes,
            took: self.took,
            first_byte: self.more.first_byte,
            cache,
            tier,
            source,
            client: self.client,
            proto: self.more.proto,
            trace: self.more.trace,
            user_agent: self.more.user_agent.as_deref(),
            error: self.more.error,
        }
    }

    /// `cache`, `tier`, `source`.
    fn words(&self) -> (Option<&'static str>, Option<&'static str>, Option<&'static str>) {
        let (cache, tier, source) = words(self.cache);
        // Requests that bypass the cache go to the origin.
        (cache, tier, if cache == Some("bypass") { Some("origin") } else { source })
    }
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
    }
}
