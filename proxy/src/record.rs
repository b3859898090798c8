//! One access record per request, and the same facts to the metrics.

use crate::metrics::{Metrics, Route, Served};
use http::Method;
use std::{net::SocketAddr, time::Duration};

/// What is said of a request when it is over.
pub struct Record<'a> {
    /// What it was about.
    pub route: Route,
    /// Its method.
    pub method: &'a Method,
    /// Its path, as sent.
    pub path: &'a str,
    /// The status it got; 0 if the client left before.
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
}

impl Record<'_> {
    /// Counts it, and writes the record if anybody listens.
    pub fn log(&self, metrics: &Metrics) {
        metrics.request(method_label(self.method), self.route, self.code, self.served, self.took);
        tracing::info!(
            target: "castier::access",
            method = self.method.as_str(),
            path = self.path,
            status = self.code,
            bytes = self.bytes,
            duration_ms = self.took.as_micros() as f64 / 1000.0,
            cache = self.cache,
            peer = self.peer.map(tracing::field::display),
        );
    }
}

/// Methods are the client's invention; labels must be finite.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "OTHER",
    }
}
