//! Which request a task works for, so that its log records, its spans and what it asks of sources can be joined with those of other programs.
//!
//! What a client's request said of itself ([`Trace`]) goes along with the work, as its `Via` does: into the task of a flight, and from there to
//! peers and the origin. A flight that several requests join works for the one that began it.
//!
//! Spans go to the function that [`export_to`] was given. Without one, no span is made.

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

/// Where spans go.
struct Export {
    /// Which part of the requests without a `traceparent` is sampled.
    sample: f64,
    send: Box<dyn Fn(Span) + Send + Sync>,
}

static EXPORT: OnceLock<Export> = OnceLock::new();

tokio::task_local! {
    /// What this task works for.
    static CURRENT: Option<Arc<Trace>>;
}

/// What this task works for.
pub fn current() -> Option<Arc<Trace>> {
    CURRENT.try_with(Clone::clone).ok().flatten()
}

/// From now on, spans go there, and this part of the requests that do not say so themselves has some. Only the first call counts.
pub fn export_to(sample: f64, send: impl Fn(Span) + Send + Sync + 'static) {
    EXPORT.get_or_init(|| Export { sample, send: Box::new(send) });
}

/// Whether anybody wants spans.
pub fn is_exported() -> bool {
    EXPORT.get().is_some()
}

/// Sends a span if anybody wants it.
pub fn export(span: impl FnOnce() -> Span) {
    if let Some(export) = EXPORT.get() {
        (export.send)(span());
    }
}

/// Which request this is, as its fields say, or a new one.
pub fn of(fields: &impl Fields) -> Trace {
    trace_of(fields, EXPORT.get().map(|export| export.sample))
}

/// Does the work of this request. It is no `async fn`: that would hold the work twice, and a fill is large.
pub fn along<F: Future>(trace: Option<Arc<Trace>>, work: F) -> impl Future<Output = F::Output> + use<F> {
    CURRENT.scope(trace, work)
}

/// As [`along`], for work that does not wait.
pub fn sync_along<T>(trace: Option<Arc<Trace>>, work: impl FnOnce() -> T) -> T {
    CURRENT.sync_scope(trace, work)
}

/// What a source is told of the request that this task works for.
pub fn tell() -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    let told = CURRENT.try_with(|trace| trace.as_ref().map(|trace| trace.tell())).ok().flatten();
    told.into_iter().flatten().filter_map(|(name, value)| Some((name, value?)))
}

/// A part of a request's work: one source that is asked. Does nothing, if nobody wants its span.
pub struct Part {
    begun: Instant,
    trace: Option<Arc<Trace>>,
}

impl Part {
    /// A part of this request begins.
    pub fn begin(of: Option<&Arc<Trace>>) -> Self {
        let sampled = if is_exported() { of.filter(|trace| trace.is_sampled()) } else { None };
        Self { begun: Instant::now(), trace: sampled.map(|trace| Arc::new(trace.part(rand::random()))) }
    }

    /// What the source is told: that this part asks. None if it has no span.
    pub fn trace(&self) -> Option<Arc<Trace>> {
        self.trace.clone()
    }

    /// It is over: with this error, if it failed, and with what is known of it.
    pub fn end(self, name: &str, told: impl FnOnce() -> (Option<String>, Attributes)) {
        if let Some(trace) = self.trace {
            let (error, attributes) = told();
            export(|| trace.client_span(name.to_owned(), self.begun.elapsed(), error, attributes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    #[tokio::test]
    async fn a_request_goes_along_with_its_work() {
        assert_eq!(tell().count(), 0);
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("abc"));
        let trace = Arc::new(of(&headers));
        let elsewhere = along(Some(trace.clone()), async {
            let current = current();
            tokio::spawn(along(current, async { sync_along(super::current(), || tell().collect::<HeaderMap>()) })).await.unwrap()
        })
        .await;
        assert_eq!(elsewhere["x-request-id"], "abc");
        assert!(elsewhere["traceparent"].to_str().unwrap().contains(&trace.trace_id().to_string()));
        assert_ne!(of(&headers).trace_id().to_string(), trace.trace_id().to_string());
    }
}
