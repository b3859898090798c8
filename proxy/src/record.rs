//! One access record per request, and the same facts to the metrics.

use crate::metrics::{Listener, Metrics, Route, Served};
use std::{net::SocketAddr, time::Duration};

/// Stands for a status where the client left before there was one, as in nginx.
pub const CLIENT_GONE: u16 = 499;

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
    /// Why the response failed, or was cut before its end.
    pub error: Option<&'a str>,
}

impl Record<'_> {
    /// Counts it, and writes the record if anybody listens.
    pub fn log(&self, metrics: &Metrics) {
        metrics.request(self.listener, method_label(self.method), self.route, self.code, self.served, self.took);
        let duration_ms = self.took.as_micros() as f64 / 1000.0;
        let (method, path, status, bytes, cache, error) = (self.method, self.path, self.code, self.bytes, self.cache, self.error);
        let peer = self.peer.map(tracing::field::display);
        // Every node asks every other each second how it is.
        if self.route == Route::Control {
            tracing::debug!(target: "castier::access", method, path, status, bytes, duration_ms, cache, peer, error);
        } else {
            tracing::info!(target: "castier::access", method, path, status, bytes, duration_ms, cache, peer, error);
        }
    }
}

/// Methods are the client's invention; labels must be finite.
fn method_label(method: &str) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH"];
    KNOWN.into_iter().find(|known| *known == method).unwrap_or("OTHER")
}
