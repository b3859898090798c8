//! The trace of the request that a task works for. It connects log records, spans and requests to sources with those of other programs.
//!
//! The [`Trace`] of a client's request follows the work into the task of a flight, and from there to peers and the origin. Its `Via` does the
//! same. A flight that several requests join has the trace of the request that started it.
//!
//! [`export_to`] sets the function that gets the spans. Without one, no span is made.

use castier_serverkit::access_log::trace_of;
use castier_wire::{
    Fields,
    trace::{Attributes, Span, Trace},
};
use http::{HeaderName, HeaderValue};
use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

/// The destination of spans.
struct Export {
    /// The share of requests without a `traceparent` that is sampled.
    sample: f64,
    send: Box<dyn Fn(Span) + Send + Sync>,
}

static EXPORT: OnceLock<Export> = OnceLock::new();

tokio::task_local! {
    /// The trace of the request that this task works for.
    static CURRENT: Option<Arc<Trace>>;
}

/// The trace of the request that this task works for.
pub fn current() -> Option<Arc<Trace>> {
    CURRENT.try_with(Clone::clone).ok().flatten()
}

/// Sends spans to `send`. Of the requests without a `traceparent`, the share `sample` is traced. Only the first call has an effect.
pub fn export_to(sample: f64, send: impl Fn(Span) + Send + Sync + 'static) {
    EXPORT.get_or_init(|| Export { sample, send: Box::new(send) });
}

/// Whether spans are exported.
pub fn is_exported() -> bool {
    EXPORT.get().is_some()
}

/// Exports a span, if spans are exported.
pub fn export(span: impl FnOnce() -> Span) {
    if let Some(export) = EXPORT.get() {
        (export.send)(span());
    }
}

/// The trace in the fields of a request, or a new one.
pub fn of(fields: &impl Fields) -> Trace {
    trace_of(fields, EXPORT.get().map(|export| export.sample))
}

/// Runs `work` with this trace. Not an `async fn`: that would hold `work` twice, and the future of a fill is large.
pub fn along<F: Future>(trace: Option<Arc<Trace>>, work: F) -> impl Future<Output = F::Output> + use<F> {
    CURRENT.scope(trace, work)
}

/// As [`along`], for work that does not wait.
pub fn sync_along<T>(trace: Option<Arc<Trace>>, work: impl FnOnce() -> T) -> T {
    CURRENT.sync_scope(trace, work)
}

/// The headers that carry this task's trace to a source.
pub fn headers() -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    let headers = CURRENT.try_with(|trace| trace.as_ref().map(|trace| trace.headers())).ok().flatten();
    headers.into_iter().flatten().filter_map(|(name, value)| Some((name, value?)))
}

/// A part of a request's work: a request to one source. Makes a span if spans are exported and the request is sampled.
pub struct Part {
    trace: Option<Arc<Trace>>,
}

impl Part {
    /// Begins a part of this request.
    pub fn begin(of: Option<&Arc<Trace>>) -> Self {
        let sampled = if is_exported() { of.filter(|trace| trace.is_sampled()) } else { None };
        Self { trace: sampled.map(|trace| Arc::new(trace.part(rand::random()))) }
    }

    /// The trace for the source, with this part as the parent. `None` if there is no span.
    pub fn trace(&self) -> Option<Arc<Trace>> {
        self.trace.clone()
    }

    /// Ends the part, and exports its span. `outcome` returns the error, if there was one, and the attributes.
    pub fn end(self, name: &str, since: Instant, outcome: impl FnOnce() -> (Option<String>, Attributes)) {
        if let Some(trace) = self.trace {
            let (error, attributes) = outcome();
            export(|| trace.client_span(name.to_owned(), since.elapsed(), error, attributes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    #[tokio::test]
    async fn a_request_goes_along_with_its_work() {
        assert_eq!(super::headers().count(), 0);
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("abc"));
        let trace = Arc::new(of(&headers));
        let elsewhere = along(Some(trace.clone()), async {
            let current = current();
            tokio::spawn(along(current, async { sync_along(super::current(), || super::headers().collect::<HeaderMap>()) })).await.unwrap()
        })
        .await;
        assert_eq!(elsewhere["x-request-id"], "abc");
        assert!(elsewhere["traceparent"].to_str().unwrap().contains(&trace.trace_id().to_string()));
        assert_ne!(of(&headers).trace_id().to_string(), trace.trace_id().to_string());
    }
}
