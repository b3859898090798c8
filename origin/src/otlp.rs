//! Spans on their way to a collector of OpenTelemetry, by OTLP over HTTP. Used by every program of the project.
//!
//! As with records, nothing here can hold up or fail a request: a span is handed to a task through a queue that is bounded in bytes. What does
//! not fit, and what the collector does not take, is counted (`castier_log_dropped_total{sink="otlp"}`) and gone: spans are samples, and the
//! next ones tell as much.

use crate::log::{Sink, dropped};
use async_trait::async_trait;
use bytes::Bytes;
use castier_blob::trace::{Kind, Span, Value};
use castier_config::Otlp;
use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState},
};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks},
};
use reqwest::{Client, redirect};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// The most spans that leave together.
const BATCH: usize = 512;
/// A batch leaves at the latest so long after its first span.
const WAIT: Duration = Duration::from_secs(1);
/// How long the end of the program may wait for the collector.
const LAST: Duration = Duration::from_secs(2);
/// What a span takes in the queue beside its texts.
const SPAN: usize = 512;
/// How much of the collector's answer is read. It says little more than yes.
const ANSWER: usize = 64 << 10;

/// A span, and when it ended.
struct Ended {
    span: Span,
    at: SystemTime,
    weight: usize,
}

/// How much waits.
#[derive(Default)]
struct Waiting {
    bytes: AtomicUsize,
    spans: AtomicU64,
}

impl Waiting {
    fn done(&self, bytes: usize, spans: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.spans.fetch_sub(spans, Relaxed);
    }
}

/// Takes spans. Never waits.
#[derive(Clone)]
pub struct Spans {
    sender: UnboundedSender<Ended>,
    waiting: Arc<Waiting>,
    most: usize,
    sample: f64,
}

impl Spans {
    /// Which part of the requests without a `traceparent` is sampled.
    pub const fn sample(&self) -> f64 {
        self.sample
    }

    /// Takes a span that ends now, or counts it as dropped.
    pub fn send(&self, span: Span) {
        let weight = weight_of(&span);
        if self.waiting.bytes.fetch_add(weight, Relaxed) + weight > self.most {
            self.waiting.bytes.fetch_sub(weight, Relaxed);
            return dropped(Sink::Otlp, 1);
        }
        self.waiting.spans.fetch_add(1, Relaxed);
        if self.sender.send(Ended { span, at: SystemTime::now(), weight }).is_err() {
            self.waiting.done(weight, 1);
            dropped(Sink::Otlp, 1);
        }
    }
}

fn weight_of(span: &Span) -> usize {
    let texts = span.attributes.iter().map(|(_, value)| if let Value::Text(text) = value { text.len() } else { 0 });
    SPAN + span.name.len() + span.error.as_ref().map_or(0, String::len) + texts.sum::<usize>()
}

/// The task that sends, and how to end it.
pub struct Exporter {
    stop: CancellationToken,
    task: JoinHandle<()>,
    waiting: Arc<Waiting>,
}

/// Starts sending spans as `otlp` says; nothing if it names no collector. `program` and `instance` are what the spans say of who made them.
///
/// # Errors
/// A text that names the key that is wrong.
pub fn start(otlp: &Otlp, program: &'static str, instance: String) -> Result<Option<(Spans, Exporter)>, String> {
    if otlp.endpoint.is_empty() {
        return Ok(None);
    }
    let wrong = |error: &dyn std::fmt::Display| format!("otlp.endpoint: {error}; write http://HOST:4318 or https://HOST");
    let mut url = reqwest::Url::parse(&otlp.endpoint).map_err(|error| wrong(&error))?;
    let path = format!("{}/v1/traces", url.path().trim_end_matches('/').trim_end_matches("/v1/traces"));
    url.set_path(&path);
    let client = Client::builder().redirect(redirect::Policy::none()).timeout(otlp.timeout.get()).build().map_err(|error| wrong(&error))?;
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Transport(client))
        .with_endpoint(url.as_str())
        .with_timeout(otlp.timeout.get())
        .build()
        .map_err(|error| wrong(&error))?;
    let version = env!("CARGO_PKG_VERSION");
    let names = [("service.name", program.to_owned()), ("service.version", version.to_owned()), ("service.instance.id", instance)];
    exporter.set_resource(&Resource::builder().with_attributes(names.map(|(name, value)| KeyValue::new(name, value))).build());
    let (sender, receiver) = unbounded_channel();
    let (waiting, stop) = (Arc::new(Waiting::default()), CancellationToken::new());
    let scope = InstrumentationScope::builder(program).with_version(version).build();
    let task = Task { exporter, scope, limit: otlp.timeout.get(), stop: stop.clone(), waiting: Arc::clone(&waiting), away: false };
    let most = usize::try_from(otlp.buffer.get()).unwrap_or(usize::MAX);
    let spans = Spans { sender, waiting: Arc::clone(&waiting), most, sample: otlp.sample };
    Ok(Some((spans, Exporter { stop, task: tokio::spawn(task.run(receiver)), waiting })))
}

impl Exporter {
    /// Sends what waits, within a moment; with nothing waiting, at once.
    pub async fn close(mut self) {
        self.stop.cancel();
        if timeout(LAST, &mut self.task).await.is_err() {
            self.task.abort();
            let lost = self.waiting.spans.load(Relaxed);
            dropped(Sink::Otlp, lost);
            tracing::warn!(lost, "the collector did not take the last spans in time");
        }
    }
}

struct Task {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    /// For a batch.
    limit: Duration,
    stop: CancellationToken,
    waiting: Arc<Waiting>,
    /// The collector did not take the last batch.
    away: bool,
}

impl Task {
    async fn run(mut self, mut receiver: UnboundedReceiver<Ended>) {
        // Nothing comes, and nothing is left: the program ends.
        while let Some(first) = self.next(&mut receiver, None).await {
            let (mut weight, mut batch) = (first.weight, vec![self.data(first)]);
            let leave = Instant::now() + WAIT;
            while batch.len() < BATCH
                && let Some(ended) = self.next(&mut receiver, Some(leave)).await
            {
                weight += ended.weight;
                batch.push(self.data(ended));
            }
            self.deliver(batch, weight).await;
        }
    }

    /// The next span; none if it does not come by `leave`, or if the program ends and there is none.
    async fn next(&self, receiver: &mut UnboundedReceiver<Ended>, leave: Option<Instant>) -> Option<Ended> {
        let late = async {
            match leave {
                Some(leave) => sleep_until(leave).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            ended = receiver.recv() => ended,
            () = self.stop.cancelled() => None,
            () = late => None,
        }
    }

    async fn deliver(&mut self, batch: Vec<SpanData>, weight: usize) {
        let spans = batch.len() as u64;
        let sent = timeout(self.limit, self.exporter.export(batch)).await;
        self.waiting.done(weight, spans);
        let why = match sent {
            Ok(Ok(())) => {
                if std::mem::take(&mut self.away) {
                    tracing::info!("the collector takes spans again");
                }
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        dropped(Sink::Otlp, spans);
        if !std::mem::replace(&mut self.away, true) {
            tracing::warn!(why, "the collector takes no spans; they are counted and dropped until it does");
        }
    }

    /// As the exporter wants it.
    fn data(&self, Ended { span, at, .. }: Ended) -> SpanData {
        let Span { trace, id, parent, of, name, took, error, attributes } = span;
        let attribute = |(name, value)| match value {
            Value::Text(text) => KeyValue::new(name, text),
            Value::Word(word) => KeyValue::new(name, word),
            Value::Number(number) => KeyValue::new(name, number),
        };
        SpanData {
            span_context: SpanContext::new(trace.into(), id.into(), TraceFlags::SAMPLED, false, TraceState::default()),
            parent_span_id: parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: of == Kind::Server,
            span_kind: if of == Kind::Server { SpanKind::Server } else { SpanKind::Client },
            name: name.into(),
            start_time: at.checked_sub(took).unwrap_or(at),
            end_time: at,
            attributes: attributes.into_iter().map(attribute).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: error.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        }
    }
}

/// The HTTP client that is here anyway.
#[derive(Debug)]
struct Transport(Client);

#[async_trait]
impl HttpClient for Transport {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // Without the address, which may hold a password.
        let mut response = self.0.execute(request.try_into()?).await.map_err(reqwest::Error::without_url)?;
        let mut body = Vec::new();
        while let Some(part) = response.chunk().await.map_err(reqwest::Error::without_url)? {
            body.extend_from_slice(&part);
            if body.len() > ANSWER {
                return Err("an endless answer".into());
            }
        }
        let mut answer = Response::new(body.into());
        *answer.status_mut() = response.status();
        *answer.headers_mut() = std::mem::take(response.headers_mut());
        Ok(answer)
    }
}
