//! Sends spans to a collector of OpenTelemetry, by OTLP over HTTP.
//!
//! Nothing here delays or fails a request. Spans go to a task through a queue bounded in bytes. Spans that do not fit, or that the collector does not
//! accept, are counted (`castier_log_dropped_total{sink="otlp"}`) and dropped. There is no retry: spans are samples.

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

/// The most spans in a batch.
const BATCH: usize = 512;
/// How long after its first span a batch is sent at the latest.
const WAIT: Duration = Duration::from_secs(1);
/// The bytes of a span in the queue in addition to its texts.
const SPAN: usize = 512;
/// How many bytes of the collector's answer are read.
const ANSWER: usize = 64 << 10;

/// A span, and when it ended.
struct Ended {
    span: Span,
    at: SystemTime,
    weight: usize,
}

/// The queue of spans. Never waits.
#[derive(Clone)]
pub struct Spans {
    sender: Sender<Ended>,
    sample: f64,
}

impl Spans {
    /// The share of requests without a `traceparent` that is sampled.
    pub const fn sample(&self) -> f64 {
        self.sample
    }

    /// Adds a span that ends now, or counts it as dropped.
    pub fn send(&self, span: Span) {
        let weight = weight_of(&span);
        self.sender.send(Ended { span, at: SystemTime::now(), weight }, weight);
    }
}

fn weight_of(span: &Span) -> usize {
    let texts = span.attributes.iter().map(|(_, value)| if let Value::Text(text) = value { text.len() } else { 0 });
    SPAN + span.name.len() + span.error.as_ref().map_or(0, String::len) + texts.sum::<usize>()
}

/// The task that sends spans.
pub struct Exporter(Shipping);

/// Starts the export of spans; `None` if `otlp` names no collector. `program` and `instance` become attributes of the spans.
///
/// # Errors
/// A text that names the wrong configuration key.
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
    /// Sends the spans that are left, for two seconds at most. Returns at once if there are none.
    pub async fn close(self) {
        if let Some(lost) = self.0.close().await {
            tracing::warn!(lost, "the collector did not take the last spans in time");
        }
    }
}

struct Task {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    /// The timeout for one batch.
    limit: Duration,
    waiting: Arc<Waiting>,
    /// The collector did not accept the last batch.
    away: bool,
}

impl Task {
    async fn run(mut self, mut receiver: Receiver<Ended>) {
        // `None`: the program ends, and the queue is empty.
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

    /// A span as the exporter's type.
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

/// The HTTP client for the exporter. It is the one that the log for Loki uses too.
#[derive(Debug)]
struct Transport(Client);

#[async_trait]
impl HttpClient for Transport {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // Without the URL, which may contain a password.
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
