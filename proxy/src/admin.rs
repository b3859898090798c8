//! The admin listener: metrics, health, statistics, purge, and the status page.

mod history;
mod page;
mod problems;
mod stats;
mod utc;

pub use history::STEP;
pub use stats::{Brief, Stats};

use crate::{connection::Conn, members::Members, memory_plan, metrics::Metrics, node::Node, purge::Purge, upstream::Upstream};
use arc_swap::ArcSwap;
use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderValue, Request, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use castier_blob::{Digest, MalformedDigest};
use castier_config::Limits;
use castier_serverkit::admin_connections::AdminConnections;
use castier_wire::Problem;
use history::History;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use problems::Problems;
use serde::Serialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::net::{TcpListener, TcpStream};
use tower_service::Service as _;

/// The longest head of a request here, and what is read of a body at once.
const MAX_HEAD: usize = 16 << 10;
/// How long to wait before accepting again after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the admin listener tells about.
pub struct Admin {
    /// The data path.
    pub node: Arc<Node>,
    /// The origin.
    pub origin: Arc<Upstream>,
    /// The series.
    pub metrics: Arc<Metrics>,
    /// The other nodes; none if this one is alone.
    pub members: Option<Arc<Members>>,
    /// Forgets blobs, on every node.
    pub purge: Arc<Purge>,
    phase: Mutex<Phase>,
    /// When this node began, on both clocks.
    began: Instant,
    started: SystemTime,
    /// What the control group of this process may hold.
    memory_limit: Option<u64>,
    history: Mutex<History>,
    problems: Mutex<Problems>,
}

/// How far a node is. An origin that is down does not change it: what is kept is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not yet for clients.
    Starting,
    /// For clients.
    Ready,
    /// No more for clients.
    Draining,
}

impl Admin {
    /// Tells about these. The node is starting.
    pub fn new(node: Arc<Node>, origin: Arc<Upstream>, metrics: Arc<Metrics>, members: Option<Arc<Members>>, purge: Arc<Purge>) -> Self {
        Self {
            node,
            origin,
            metrics,
            members,
            purge,
            phase: Mutex::new(Phase::Starting),
            began: Instant::now(),
            started: SystemTime::now(),
            memory_limit: memory_plan::memory_limit(),
            history: Mutex::default(),
            problems: Mutex::default(),
        }
    }

    /// The node has come so far.
    pub fn enter(&self, phase: Phase) {
        *self.phase.lock() = phase;
    }

    fn phase(&self) -> Phase {
        *self.phase.lock()
    }
}

/// The admin interface.
pub fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/stats", get(stats))
        .route("/purge/{digest}", post(purge))
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "here are /metrics, /healthz, /readyz, /stats, /purge/<digest> and /") })
        .method_not_allowed_fallback(|| async {
            problem(StatusCode::METHOD_NOT_ALLOWED, "everything here is GET, but /purge/<digest>, which is POST")
        })
        .with_state(admin)
}

/// Serves the admin interface, within limits of its own.
///
/// At `limits.max_admin_connections` the oldest connection that asks for nothing is closed for a new one, so that a health check is
/// answered beside any number of others.
pub async fn serve(listener: TcpListener, router: Router, limits: Arc<ArcSwap<Limits>>) {
    let mut open = AdminConnections::default();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Most often there are no descriptors left. Asked again at once, the kernel would say the same.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let limits = limits.load_full();
        if !open.admit(limits.max_admin_connections) {
            continue;
        }
        let busy = Arc::new(AtomicBool::new(false));
        let connection = tokio::spawn(connection(stream, router.clone(), busy.clone(), limits));
        open.add(move || busy.load(Ordering::Relaxed), connection.abort_handle());
    }
}

/// One connection. hyper's time limit on heads runs between requests, too: a scraper that comes back later connects anew.
async fn connection(stream: TcpStream, router: Router, busy: Arc<AtomicBool>, limits: Arc<Limits>) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let (mut router, busy) = (router.clone(), busy.clone());
        async move {
            busy.store(true, Ordering::Relaxed);
            let answer = router.call(request.map(Body::new)).await;
            busy.store(false, Ordering::Relaxed);
            answer
        }
    });
    let stream = Conn::of_tcp(stream, limits.write_timeout.get());
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout.get())
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), answer);
    // How a connection ended is its client's business.
    served.await.ok();
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], admin.metrics.render(&admin.node.cache.tier_stats())).into_response()
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    if admin.phase() == Phase::Ready { "ready\n".into_response() } else { problem(StatusCode::SERVICE_UNAVAILABLE, "starting or draining") }
}

async fn stats(State(admin): State<Arc<Admin>>) -> Response {
    json(&admin.stats())
}

async fn purge(State(admin): State<Arc<Admin>>, Path(digest): Path<String>) -> Response {
    let Ok(digest) = digest.parse::<Digest>() else { return problem(StatusCode::BAD_REQUEST, &MalformedDigest.to_string()) };
    json(&admin.purge.everywhere(&digest).await)
}

fn json(value: &impl serde::Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text + "\n").into_response(),
        Err(error) => {
            tracing::error!(%error, "an answer could not be written");
            problem(StatusCode::INTERNAL_SERVER_ERROR, "the answer could not be written")
        }
    }
}

fn problem(status: StatusCode, detail: &str) -> Response {
    let mut response = (status, Problem::new(status, detail).to_json()).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, Problem::MEDIA_TYPE);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
