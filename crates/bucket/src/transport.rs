//! The HTTP client below `object_store`: timeouts, retries of throttled requests, and a limit on concurrency that follows the store.
//!
//! `object_store`'s own retries are off. They would hold a miss for the whole time in which a store is down, while the fill knows how to resume.

use crate::{limiter::Limiter, metrics::Metrics};
use async_trait::async_trait;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt as _;
use http::{Method, Response, StatusCode, header};
use http_body_util::{BodyExt as _, BodyStream};
use object_store::{
    ClientOptions,
    client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService},
};
use quick_xml::events::Event;
use std::{
    error::Error,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a connection is kept without a request.
const IDLE: Duration = Duration::from_secs(60);
/// The most bytes of an error's body that are read.
const ERROR_BODY: usize = 64 << 10;
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
    /// The limit on concurrency left no place within the time.
    #[error("too many requests at once")]
    Crowded,
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
}

impl Transport {
    /// # Errors
    /// The certificates cannot be used.
    pub(crate) fn new(config: &castier_config::Origin, streams: usize, metrics: Arc<Metrics>) -> Result<Self, String> {
        let mut client = reqwest::Client::builder()
            .connect_timeout(config.connect_timeout.get())
            .read_timeout(config.read_timeout.get())
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
            metrics,
            limit: config.read_timeout.get(),
            retries: config.retries,
        })
    }

    async fn send(&self, request: HttpRequest) -> Result<Response<reqwest::Body>, Failure> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string();
        let request = self.client.request(parts.method, url).headers(parts.headers).body(reqwest::Body::wrap(body));
        request.send().await.map(Into::into).map_err(|error| Failure::from_client(&error))
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
        let deadline = Instant::now() + self.limit;
        let pauses = || {
            ExponentialBuilder::default()
                .with_min_delay(FIRST_PAUSE)
                .with_max_delay(LONGEST_PAUSE)
                .with_jitter()
                .without_max_times()
                .build()
        };
        let (mut pauses, mut retries) = (pauses(), self.retries);
        loop {
            let permit = self.limiter.permit(deadline).await.ok_or(Failure::Crowded)?;
            let answer = self.send(request.clone()).await;
            let again = match &answer {
                Ok(answer) if is_throttled(answer.status()) => {
                    permit.throttled();
                    self.metrics.throttled();
                    retry_after(answer).or_else(|| pauses.next())
                }
                // A GET is not sent again here: the fill resumes it. A POST may have been done.
                Ok(answer) if answer.status().is_server_error() => retry(&request, &mut retries).then(|| pauses.next()).flatten(),
                Err(Failure::Broke(_) | Failure::Connect(_)) => retry(&request, &mut retries).then(|| pauses.next()).flatten(),
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
            let (parts, body) = answer.into_parts();
            if is_failure(parts.status) {
                let (code, message) = described(body).await;
                // Only this 404 is no absence.
                if parts.status != StatusCode::NOT_FOUND || code.as_deref() == Some("NoSuchBucket") {
                    return Err(Failure::Status { status: parts.status, code, message }.into());
                }
                return Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(Bytes::new())));
            }
            // The permit is held until the body has been read.
            let body = body.map_err(|error| HttpError::from(Failure::from_client(&error))).map_frame(move |frame| {
                let _held = &permit;
                frame
            });
            return Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)));
        }
    }
}

fn is_throttled(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS)
}

/// Whether the status is an error for `object_store` too. The others it knows how to read.
fn is_failure(status: StatusCode) -> bool {
    use StatusCode as S;
    status.as_u16() >= 400 && !matches!(status, S::CONFLICT | S::PRECONDITION_FAILED | S::NOT_IMPLEMENTED)
}

fn retry(request: &HttpRequest, retries: &mut u32) -> bool {
    let may = !matches!(*request.method(), Method::GET | Method::POST) && *retries > 0;
    if may {
        *retries -= 1;
    }
    may
}

fn retry_after(answer: &Response<reqwest::Body>) -> Option<Duration> {
    let seconds = answer.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
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
fn element(xml: &str, name: &str) -> Option<String> {
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
