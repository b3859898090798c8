//! Sends spans to a collector of OpenTelemetry, by OTLP over HTTP.
//!
//! As with records, nothing here can hold up or fail a request: a span is handed to a task through a queue that is bounded in bytes. What does
//! not fit, and what the collector does not take, is counted (`castier_log_dropped_total{sink="otlp"}`) and gone: spans are samples, and the
//! next ones tell as much.

use crate::{
    byte_queue::{Receiver, Sender, Shipping, Waiting},
    log::{Sink, dropped},
};
use async_trait::async_trait;
use bytes::Bytes;
use castier_config::Otlp;
use castier_wire::trace::{Kind, Span, Value};
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
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::{Instant, timeout};

/// The most spans that leave together.
const BATCH: usize = 512;
/// A batch leaves at the latest so long after its first span.
const WAIT: Duration = Duration::from_secs(1);
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

/// Takes spans. Never waits.
#[derive(Clone)]
pub struct Spans {
    sender: Sender<Ended>,
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
        self.sender.send(Ended { span, at: SystemTime::now(), weight }, weight);
    }
}

fn weight_of(span: &Span) -> usize {
    let texts = span.attributes.iter().map(|(_, value)| if let Value::Text(text) = value { text.len() } else { 0 });
    SPAN + span.name.len() + span.error.as_ref().map_or(0, String::len) + texts.sum::<usize>()
}

/// The task that sends, and how to end it.
pub struct Exporter(Shipping);

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
    let scope = InstrumentationScope::builder(program).with_version(version).build();
    let limit = otlp.timeout.get();
    let (sender, shipping) = Shipping::start(Sink::Otlp, otlp.buffer.get(), |receiver, waiting, _stop| {
        Task { exporter, scope, limit, waiting, away: false }.run(receiver)
    });
    Ok(Some((Spans { sender, sample: otlp.sample }, Exporter(shipping))))
}

impl Exporter {
    /// Sends what waits, within a moment; with nothing waiting, at once.
    pub async fn close(self) {
        if let Some(lost) = self.0.close().await {
            tracing::warn!(lost, "the collector did not take the last spans in time");
        }
    }
}

struct Task {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    /// For a batch.
    limit: Duration,
    waiting: Arc<Waiting>,
    /// The collector did not take the last batch.
    away: bool,
}

impl Task {
    async fn run(mut self, mut receiver: Receiver<Ended>) {
        // Nothing comes, and nothing is left: the program ends.
        while let Some(first) = receiver.next(None).await {
            let (mut weight, mut batch) = (first.weight, vec![self.data(first)]);
            let leave = Instant::now() + WAIT;
            while batch.len() < BATCH
                && let Some(ended) = receiver.next(Some(leave)).await
            {
                weight += ended.weight;
                batch.push(self.data(ended));
            }
            self.deliver(batch, weight).await;
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
