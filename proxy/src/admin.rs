//! The admin listener: metrics, health, statistics, purge, and the status page.

mod history;
mod page;
mod problems;
mod stats;
mod utc;

pub use history::STEP;
pub use stats::{Brief, Stats};

use crate::{connection::Conn, memory_plan, metrics::Metrics, node::Node};
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
use castier_cluster::{Members, Purge};
use castier_config::Limits;
use castier_serverkit::admin_connections::AdminConnections;
use castier_upstream::Upstream;
use castier_wire::Problem;
use history::History;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use problems::ProblemTracker;
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

/// The longest request head, and the most bytes of a body that are read at once.
const MAX_HEAD: usize = 16 << 10;
/// The pause after a failed `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The parts of the node that the admin listener reports on and controls.
pub struct Admin {
    /// The data path.
    pub node: Arc<Node>,
    /// The origin.
    pub origin: Arc<Upstream>,
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// The members of the cluster; `None` without one.
    pub members: Option<Arc<Members>>,
    /// Purges blobs on every node.
    pub purge: Arc<Purge>,
    phase: Mutex<Phase>,
    /// When this node started, on both clocks.
    began: Instant,
    started: SystemTime,
    /// The memory limit of this process's control group, in bytes.
    memory_limit: Option<u64>,
    history: Mutex<History>,
    problems: Mutex<ProblemTracker>,
}

/// The phase of the node's life. It does not depend on the origin: while the origin is down, the node serves the blobs that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not ready for clients yet.
    Starting,
    /// Ready for clients.
    Ready,
    /// Shutting down; takes no new clients.
    Draining,
}

impl Admin {
    /// Of these parts. The phase is [`Phase::Starting`].
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

    /// Changes the phase.
    pub fn enter(&self, phase: Phase) {
        *self.phase.lock() = phase;
    }

    fn phase(&self) -> Phase {
        *self.phase.lock()
    }
}

/// The routes of the admin listener.
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

/// Serves the admin listener within its own limits.
///
/// At `limits.max_admin_connections` it closes the oldest idle connection for a new one. So a health check is always answered, beside any
/// number of idle connections.
pub async fn serve(listener: TcpListener, router: Router, limits: Arc<ArcSwap<Limits>>) {
    let mut open = AdminConnections::default();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Usually there are no descriptors left. Trying again at once would give the same error.
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

/// Serves one connection. hyper's timeout for heads also runs between requests, so a scraper that comes back later opens a new connection.
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
    // An error here concerns only this client.
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
