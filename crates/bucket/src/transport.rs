//! The HTTP client below `object_store`: timeouts, retries of throttled requests, and a limit on concurrency that follows the store.
//!
//! `object_store`'s own retries are off. They would hold a miss for the whole time in which a store is down, while the fill knows how to resume.

use crate::{limiter::Limiter, metrics::Metrics};
use async_trait::async_trait;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::{Bytes, BytesMut};
use castier_cache::RetryBudget;
use futures::{Stream, TryStreamExt as _, stream};
use http::{Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody, HttpService,
    },
};
use parking_lot::Mutex;
use quick_xml::events::Event;
use std::{
    error::Error,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Release},
    },
    time::{Duration, Instant},
};
use tokio::time::{timeout, timeout_at};

/// How long a connection is kept without a request.
const IDLE: Duration = Duration::from_secs(60);
/// The most bytes of an error's body that are read.
const ERROR_BODY: usize = 64 << 10;
/// How long the body of an error may take.
const ERROR_TIME: Duration = Duration::from_secs(10);
/// A request's body is sent in pieces of this size.
const PIECE: usize = 64 << 10;
/// The pauses before a throttled request is sent again.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why a request got no useful answer. In the sources of an `object_store` error.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("no connection: {0}")]
    Connect(String),
    #[error("no byte within origin.read_timeout")]
    Silent,
    #[error("the connection broke: {0}")]
    Broke(String),
    /// No permit was free within `origin.read_timeout`.
    #[error("too many requests at once")]
    Crowded,
    /// `object_store` does not take such an answer, and its error does not say why.
    #[error("the whole object in place of a range")]
    Whole,
    #[error("{status}{}{}", .code.as_ref().map(|code| format!(" {code}")).unwrap_or_default(), .message.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Status { status: StatusCode, code: Option<String>, message: Option<String> },
}

impl Failure {
    /// The failure among an error and its sources.
    pub(crate) fn of<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Self> {
        std::iter::successors(Some(error), |&error| error.source()).find_map(|error| error.downcast_ref())
    }

    fn from_client(error: &reqwest::Error) -> Self {
        let why = || {
            std::iter::successors(Some(error as &dyn Error), |&error| error.source()).last().map(ToString::to_string).unwrap_or_default()
        };
        if error.is_connect() {
            Self::Connect(why())
        } else if error.is_timeout() {
            Self::Silent
        } else {
            Self::Broke(why())
        }
    }
}

impl From<Failure> for HttpError {
    fn from(failure: Failure) -> Self {
        // The kind decides only about retries, which are off.
        Self::new(HttpErrorKind::Unknown, failure)
    }
}

/// The client for one store.
#[derive(Debug, Clone)]
pub(crate) struct Transport {
    client: reqwest::Client,
    limiter: Arc<Limiter>,
    metrics: Arc<Metrics>,
    /// `origin.read_timeout`: the longest silence, and how long a throttled request is tried.
    limit: Duration,
    /// `origin.retries`, for a request that has no reader yet, and can be sent again.
    retries: u32,
    /// `origin.retry_budget`. A throttled request needs none: its pauses grow.
    retry_budget: Arc<RetryBudget>,
    /// The store has refused castier's keys.
    refused: Arc<AtomicBool>,
}

impl Transport {
    /// # Errors
    /// The certificates cannot be used.
    pub(crate) fn new(config: &castier_config::Origin, streams: usize, metrics: Arc<Metrics>) -> Result<Self, String> {
        let mut client = reqwest::Client::builder()
            .connect_timeout(config.connect_timeout.get())
            .redirect(reqwest::redirect::Policy::none())
            .pool_idle_timeout(IDLE);
        if !config.ca_file.as_os_str().is_empty() {
            let shown = config.ca_file.display();
            let pem = std::fs::read(&config.ca_file).map_err(|error| format!("origin.ca_file: {shown} cannot be read ({error})"))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| format!("origin.ca_file: {shown}: {error}"))?;
            client = certificates.into_iter().fold(client.tls_built_in_root_certs(false), reqwest::ClientBuilder::add_root_certificate);
        }
        Ok(Self {
            client: client.build().map_err(|error| format!("origin.url: {error}"))?,
            limiter: Arc::new(Limiter::new(config.max_requests + streams, metrics.clone())),
            retry_budget: RetryBudget::new(config.retry_budget, metrics.retries_refused()),
            metrics,
            limit: config.read_timeout.get(),
            retries: config.retries,
            refused: Arc::default(),
        })
    }

    /// Is set when the store refuses castier's keys. The credentials clear it when they have read the keys again.
    pub(crate) fn refused(&self) -> Arc<AtomicBool> {
        self.refused.clone()
    }

    /// Until the head of the answer. The time runs while nothing of the body can be sent, and after its end: a large body may take longer.
    async fn send(&self, request: HttpRequest) -> Result<Response<reqwest::Body>, Failure> {
        let (parts, body) = request.into_parts();
        let progress = Arc::new(Mutex::new(Instant::now()));
        let body = StreamBody::new(in_pieces(body, progress.clone()));
        let request = self.client.request(parts.method, parts.uri.to_string()).headers(parts.headers).body(reqwest::Body::wrap(body));
        let mut sending = pin!(request.send());
        loop {
            let until = *progress.lock() + self.limit;
            match timeout_at(until.into(), &mut sending).await {
                Ok(answer) => return answer.map(Into::into).map_err(|error| Failure::from_client(&error)),
                Err(_) if *progress.lock() + self.limit <= Instant::now() => return Err(Failure::Silent),
                Err(_) => {}
            }
        }
    }

    fn may_retry(&self, request: &HttpRequest, retries: &mut u32) -> bool {
        let may = !matches!(*request.method(), Method::GET | Method::POST) && *retries > 0 && self.retry_budget.retry();
        if may {
            *retries -= 1;
        }
        may
    }

    /// The body of an answer, with a timeout between its frames.
    fn timed(&self, body: reqwest::Body) -> HttpResponseBody {
        let limit = self.limit;
        let frames = stream::unfold(Some(body), move |body| async move {
            let mut body = body?;
            match timeout(limit, body.frame()).await {
                Ok(Some(Ok(frame))) => Some((Ok(frame), Some(body))),
                Ok(Some(Err(error))) => Some((Err(Failure::from_client(&error).into()), None)),
                Ok(None) => None,
                Err(_) => Some((Err(HttpError::from(Failure::Silent)), None)),
            }
        });
        HttpResponseBody::new(StreamBody::new(frames))
    }
}

impl HttpConnector for Transport {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Transport {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (deadline, method) = (Instant::now() + self.limit, request.method().clone());
        let pauses =
            ExponentialBuilder::default().with_min_delay(FIRST_PAUSE).with_max_delay(LONGEST_PAUSE).with_jitter().without_max_times();
        let (mut pauses, mut retries) = (pauses.build(), self.retries);
        self.retry_budget.request();
        loop {
            let permit = self.limiter.permit(deadline).await.ok_or(Failure::Crowded)?;
            let answer = self.send(request.clone()).await;
            let again = match &answer {
                Ok(answer) if is_throttled(answer.status()) => {
                    permit.throttled();
                    self.metrics.throttled();
                    pauses.next().map(|pause| pause.max(retry_after(answer).min(self.limit)))
                }
                // A GET is not sent again here: the fill resumes it. A POST may have been done.
                Ok(answer) if answer.status().is_server_error() => self.may_retry(&request, &mut retries).then(|| pauses.next()).flatten(),
                Err(Failure::Broke(_) | Failure::Connect(_)) => self.may_retry(&request, &mut retries).then(|| pauses.next()).flatten(),
                _ => None,
            };
            if let Some(pause) = again.filter(|pause| Instant::now() + *pause < deadline) {
                drop((answer, permit));
                tokio::time::sleep(pause).await;
                continue;
            }
            let answer = answer?;
            if answer.status().is_success() {
                permit.succeeded();
            }
            // A body that comes slowly must not keep small requests out: fills have a limit of their own.
            drop(permit);
            let (parts, body) = answer.into_parts();
            let status = parts.status;
            if status == StatusCode::OK && method == Method::GET && request.headers().contains_key(header::RANGE) {
                return Err(Failure::Whole.into());
            }
            if status.as_u16() < 400 {
                return Ok(HttpResponse::from_parts(parts, self.timed(body)));
            }
            let (code, message) = timeout(self.limit.min(ERROR_TIME), described(body)).await.unwrap_or_default();
            if matches!(code.as_deref(), Some("ExpiredToken" | "InvalidToken" | "InvalidAccessKeyId" | "SignatureDoesNotMatch")) {
                self.refused.store(true, Release);
            }
            if is_meant(&method, status, code.as_deref()) {
                return Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(Bytes::new())));
            }
            return Err(Failure::Status { status, code, message }.into());
        }
    }
}

fn is_throttled(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS)
}

/// Whether the answer is one that a store of objects means: there is no such key, or a condition does not hold. A 404 can also come from a server
/// that is no such store, or has no such bucket. The answer to a HEAD cannot tell these: see `Bucket::head`.
fn is_meant(method: &Method, status: StatusCode, code: Option<&str>) -> bool {
    match status {
        StatusCode::NOT_FOUND => *method == Method::HEAD || matches!(code, Some("NoSuchKey" | "BlobNotFound" | "NoSuchVersion")),
        status => matches!(status, StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED),
    }
}

fn retry_after(answer: &Response<reqwest::Body>) -> Duration {
    let value = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Duration::from_secs(value.unwrap_or(0))
}

/// The bytes of a request in pieces. Each piece that is taken is progress.
fn in_pieces(body: HttpRequestBody, progress: Arc<Mutex<Instant>>) -> impl Stream<Item = Result<Frame<Bytes>, HttpError>> {
    stream::unfold((body, Bytes::new()), move |(mut body, mut rest)| {
        let progress = progress.clone();
        async move {
            while rest.is_empty() {
                match body.frame().await? {
                    Ok(frame) => rest = frame.into_data().unwrap_or_default(),
                    Err(error) => return Some((Err(error), (body, rest))),
                }
            }
            *progress.lock() = Instant::now();
            let piece = rest.split_to(rest.len().min(PIECE));
            Some((Ok(Frame::data(piece)), (body, rest)))
        }
    })
}

/// The `Code` and the `Message` of an error, as S3 and Azure write them.
async fn described(body: reqwest::Body) -> (Option<String>, Option<String>) {
    let mut text = BytesMut::new();
    let mut body = pin!(BodyStream::new(body));
    while let Ok(Some(frame)) = body.try_next().await {
        let data = frame.into_data().unwrap_or_default();
        text.extend_from_slice(&data[..data.len().min(ERROR_BODY.saturating_sub(text.len()))]);
        if text.len() >= ERROR_BODY {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text);
    (element(&text, "Code"), element(&text, "Message").map(|message| message.chars().take(200).collect()))
}

/// The text of the first element of this name.
pub fn element(xml: &str, name: &str) -> Option<String> {
    let mut reader = quick_xml::Reader::from_str(xml);
    loop {
        match reader.read_event().ok()? {
            Event::Start(start) if start.name().as_ref() == name => {
                return Some(reader.read_text(start.name()).ok()?.trim().to_owned()).filter(|text| !text.is_empty());
            }
            Event::Eof => return None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_their_code() {
        let xml = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>No &amp; no.</Message></Error>";
        assert_eq!(element(xml, "Code").as_deref(), Some("AccessDenied"));
        assert!(element(xml, "Message").is_some());
        for text in ["", "busy", "<html><body>Code", "<Code></Code>", "<Error><Code>x"] {
            assert_eq!(element(text, "Code"), None, "{text}");
        }
    }
}
