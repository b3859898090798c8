//! A plan whose steps know for which request they ask: its `Via`, its `traceparent` and its `X-Request-ID` go along to the sources, and each step is a
//! span. The request that starts a flight gives these; requests that join it have nothing to add.

use crate::{trace, via_header};
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Asker, Fault, Incoming, Outcome, Plan, Source, Stat, Step, Then};
use castier_wire::{
    self as wire,
    trace::{Attributes, Trace, Value},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use http::HeaderValue;
use std::sync::Arc;

/// Wraps the plan of one flight.
pub struct TracedPlan {
    plan: Box<dyn Plan>,
    digest: Digest,
    context: Context,
    /// The present step: its span, the URL that it asks, and the label of its source.
    current: Option<(trace::Part, String, &'static str)>,
}

/// What goes along with a request to a source.
#[derive(Clone)]
struct Context {
    via: Option<HeaderValue>,
    trace: Option<Arc<Trace>>,
}

impl TracedPlan {
    /// The plan of a flight that the request starts for which this task works.
    pub fn new(plan: Box<dyn Plan>, digest: Digest) -> Self {
        Self { plan, digest, context: Context { via: via_header::current(), trace: trace::current() }, current: None }
    }
}

impl Plan for TracedPlan {
    fn next(&mut self, waiting: Asker) -> Step {
        let step = self.plan.next(waiting);
        let part = trace::Part::begin(self.context.trace.as_ref());
        let context = Context { trace: part.trace().or_else(|| self.context.trace.clone()), via: self.context.via.clone() };
        self.current = Some((part, step.source.url().unwrap_or_default(), step.from.as_str()));
        Step { source: Arc::new(InContext { source: step.source, context }), ..step }
    }

    fn report(&mut self, outcome: Outcome<'_>, bytes: u64) -> Then {
        if let Some((part, url, source)) = self.current.take() {
            part.end("GET", || attributes(outcome, &self.digest, &url, source, bytes));
        }
        self.plan.report(outcome, bytes)
    }

    fn blame(&mut self, fault: &Fault) -> bool {
        self.plan.blame(fault)
    }
}

/// A source that is asked in the context of a request.
struct InContext {
    source: Arc<dyn Source>,
    context: Context,
}

impl Source for InContext {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        let context = self.context.clone();
        let open = self.source.open(ask).map(move |answer| {
            Ok(match answer? {
                // A slow peer is asked about while its bytes are read, which is a request too.
                Answer::Bytes(Incoming { size, mut bytes }) => {
                    Answer::Bytes(Incoming::new(size, stream::poll_fn(move |cx| context.sync(|| bytes.poll_next_unpin(cx)))))
                }
                other => other,
            })
        });
        self.context.along(open).boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        self.context.along(self.source.stat(digests)).boxed()
    }

    fn url(&self) -> Option<String> {
        self.source.url()
    }
}

impl Context {
    fn along<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        via_header::along(self.via.clone(), trace::along(self.trace.clone(), work))
    }

    fn sync<T>(&self, work: impl FnOnce() -> T) -> T {
        via_header::sync_along(self.via.clone(), || trace::sync_along(self.trace.clone(), work))
    }
}

/// The error, if it is one, and the attributes of the span of a step.
fn attributes(outcome: Outcome<'_>, digest: &Digest, url: &str, source: &'static str, bytes: u64) -> (Option<String>, Attributes) {
    let (scheme, authority) = url.split_once("://").unwrap_or_default();
    let default = if scheme == "https" { 443 } else { 80 };
    // Behind the last colon of `[::1]` there is no port.
    let split = authority.rsplit_once(':').and_then(|(address, port)| Some((address, port.parse().ok()?)));
    let (address, port) = split.unwrap_or((authority, default));
    let mut attributes = vec![
        ("http.request.method", Value::Word("GET")),
        ("url.full", Value::Text(format!("{url}{}", wire::blob_path(digest)))),
        ("server.address", Value::Text(address.trim_matches(['[', ']']).to_owned())),
        ("server.port", Value::Number(port)),
        ("castier.source", Value::Word(source)),
        ("http.response.body.size", Value::Number(i64::try_from(bytes).unwrap_or(i64::MAX))),
    ];
    let mut error = None;
    match outcome {
        Outcome::Whole => attributes.push(("http.response.status_code", Value::Number(200))),
        Outcome::Absent => attributes.push(("http.response.status_code", Value::Number(404))),
        Outcome::NotKept | Outcome::Unable | Outcome::Left => {}
        Outcome::Failed(fault) => {
            attributes.push(("error.type", Value::Word(fault.kind())));
            error = Some(fault.to_string());
        }
    }
    (error, attributes)
}
