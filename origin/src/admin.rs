//! The admin interface: `/metrics`, `/healthz`, `/readyz`.

use crate::{
    Phase, Shared,
    connection_timeouts::Activity,
    server::{Full, Handler},
};
use bytes::Bytes;
use castier_config::OriginLimits;
use castier_wire::Problem;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full as Whole;
use hyper::body::Incoming;
use std::{net::SocketAddr, sync::Arc};

/// Answers requests to the admin listener.
#[derive(Clone)]
pub(crate) struct Admin(pub(crate) Arc<Shared>);

impl Handler for Admin {
    type Body = Whole<Bytes>;

    const FULL: Full = Full::OldestIdleMakesWay;

    fn limits(&self) -> Arc<OriginLimits> {
        self.0.limits.load_full()
    }

    fn max_connections(limits: &OriginLimits) -> usize {
        limits.max_admin_connections
    }

    async fn answer(&self, request: Request<Incoming>, _: SocketAddr, activity: Arc<Activity>) -> Response<Whole<Bytes>> {
        activity.begin();
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        let response = match request.uri().path() {
            "/metrics" | "/healthz" | "/readyz" if !is_read => {
                let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "allowed here: GET, HEAD");
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
                response
            }
            "/metrics" => self.metrics(),
            "/healthz" => text("text/plain; charset=utf-8", "ok\n"),
            "/readyz" => match self.0.phase() {
                Phase::Ready => text("text/plain; charset=utf-8", "ready\n"),
                Phase::Starting => problem(StatusCode::SERVICE_UNAVAILABLE, "starting"),
                Phase::Draining => problem(StatusCode::SERVICE_UNAVAILABLE, "finishing what is in flight before the end"),
            },
            _ => problem(StatusCode::NOT_FOUND, "there is nothing here; try /metrics, /healthz or /readyz"),
        };
        activity.end();
        response
    }
}

impl Admin {
    fn metrics(&self) -> Response<Whole<Bytes>> {
        match self.0.metrics.text(self.0.totals()) {
            Ok(series) => text(prometheus::TEXT_FORMAT, series),
            Err(error) => {
                tracing::error!(%error, "the metrics could not be written");
                problem(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written; the log says why")
            }
        }
    }
}

fn text(media_type: &'static str, body: impl Into<Bytes>) -> Response<Whole<Bytes>> {
    let mut response = Response::new(Whole::new(body.into()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

fn problem(status: StatusCode, detail: &str) -> Response<Whole<Bytes>> {
    let mut response = Response::new(Whole::new(Problem::new(status, detail).to_json().into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, Problem::MEDIA_TYPE);
    response
}
