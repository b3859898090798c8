//! One access record per request, and the same facts to the metrics.

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
        // Every node asks every other each second how it is.
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
                Route::Relay | Route::Refused | Route::Control => None,
            };
            let listener = ("castier.listener", Value::Word(self.listener.as_str()));
            trace::export(|| self.access().span(trace, method, route, [listener]));
        }
    }

    /// As both programs log it.
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
        // The origin alone answers what goes past the cache.
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
