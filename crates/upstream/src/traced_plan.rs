//! A plan that sends `Via`, `traceparent` and `X-Request-ID` of a client's request to the sources, and makes a span for each step. The headers are
//! those of the request that starts the flight, not of requests that join it.

use crate::{trace, via_header};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Asker, Fault, Incoming, NoRange, Outcome, Plan, Ranges, Source, Stat, Step, Then};
use castier_wire::{
    self as wire,
    trace::{Attributes, Trace, Value},
};
use futures::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use http::HeaderValue;
use std::{
    ops::Range,
    sync::{Arc, OnceLock},
    time::Instant,
};

/// Wraps the plan of one flight.
pub struct TracedPlan {
    plan: Box<dyn Plan>,
    digest: Digest,
    context: Context,
    current: Option<Current>,
}

/// The current step.
struct Current {
    span: trace::Part,
    /// The URL of its source, and its label.
    url: String,
    source: &'static str,
    /// When the source was asked. A step may wait for a permit before that.
    asked: Arc<OnceLock<Instant>>,
}

/// The headers of the client's request that requests to sources repeat.
#[derive(Clone)]
struct Context {
    via: Option<HeaderValue>,
    trace: Option<Arc<Trace>>,
}

impl TracedPlan {
    /// Wraps the plan of a flight, with the headers of the request that this task works for.
    pub fn new(plan: Box<dyn Plan>, digest: Digest) -> Self {
        Self { plan, digest, context: Context { via: via_header::current(), trace: trace::current() }, current: None }
    }
}

impl Plan for TracedPlan {
    fn next(&mut self, waiting: Asker) -> Step {
        let step = self.plan.next(waiting);
        let part = trace::Part::begin(self.context.trace.as_ref());
        let context = Context { trace: part.trace().or_else(|| self.context.trace.clone()), via: self.context.via.clone() };
        let (url, source, asked) = (step.source.url().unwrap_or_default(), step.from.as_str(), Arc::default());
        self.current = Some(Current { span: part, url, source, asked: Arc::clone(&asked) });
        Step { source: Arc::new(InContext { source: step.source, context, asked }), ..step }
    }

    fn report(&mut self, outcome: Outcome<'_>, bytes: u64) -> Then {
        if let Some(Current { span, url, source, asked }) = self.current.take() {
            let asked = asked.get().copied().unwrap_or_else(Instant::now);
            span.end("GET", asked, || attributes(outcome, &self.digest, &url, source, bytes));
        }
        self.plan.report(outcome, bytes)
    }

    fn blame(&mut self, fault: &Fault) -> bool {
        self.plan.blame(fault)
    }
}

/// A source whose requests get the headers in `context`.
struct InContext {
    source: Arc<dyn Source>,
    context: Context,
    asked: Arc<OnceLock<Instant>>,
}

impl Source for InContext {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        self.asked.get_or_init(Instant::now);
        let context = self.context.clone();
        let open = self.source.open(ask).map(move |answer| {
            Ok(match answer? {
                // Reading may send a request too: the stall watchdog asks a slow peer for its health.
                Answer::Bytes(Incoming { size, bytes, ranges }) => {
                    let ranges = ranges.map(|ranges| Arc::new(RangesInContext { ranges, context: context.clone() }) as Arc<dyn Ranges>);
                    Answer::Bytes(Incoming::new(size, context.along_bytes(bytes)).with_ranges(ranges))
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

type ByteStream = BoxStream<'static, Result<Bytes, Fault>>;

/// The ranges of a source, whose requests get the headers in `context` too.
struct RangesInContext {
    ranges: Arc<dyn Ranges>,
    context: Context,
}

impl Ranges for RangesInContext {
    fn read(&self, range: Range<u64>) -> BoxFuture<'static, Result<ByteStream, NoRange>> {
        let context = self.context.clone();
        self.context.along(self.ranges.read(range)).map(move |answer| answer.map(|bytes| context.along_bytes(bytes))).boxed()
    }

    fn give_up(&self) {
        self.ranges.give_up();
    }
}

impl Context {
    fn along_bytes(self, mut bytes: ByteStream) -> ByteStream {
        stream::poll_fn(move |cx| self.sync(|| bytes.poll_next_unpin(cx))).boxed()
    }

    fn along<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        via_header::along(self.via.clone(), trace::along(self.trace.clone(), work))
    }

    fn sync<T>(&self, work: impl FnOnce() -> T) -> T {
        via_header::sync_along(self.via.clone(), || trace::sync_along(self.trace.clone(), work))
    }
}

/// The error of a step, if it failed, and the attributes of its span.
fn attributes(outcome: Outcome<'_>, digest: &Digest, url: &str, source: &'static str, bytes: u64) -> (Option<String>, Attributes) {
    let (scheme, authority) = url.split_once("://").unwrap_or_default();
    let default = if scheme == "https" { 443 } else { 80 };
    // In `[::1]`, the text after the last colon is no port, so `parse` fails.
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
        Outcome::Whole | Outcome::Verified(..) => attributes.push(("http.response.status_code", Value::Number(200))),
        Outcome::Absent => attributes.push(("http.response.status_code", Value::Number(404))),
        Outcome::NotKept | Outcome::Unable | Outcome::Left => {}
        Outcome::Failed(fault) => {
            attributes.push(("error.type", Value::Word(fault.kind())));
            error = Some(fault.to_string());
        }
    }
    (error, attributes)
}
