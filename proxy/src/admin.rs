//! The admin listener: metrics, health, statistics, purge, and the status page.

mod history;
mod page;
mod problems;
mod stats;
mod utc;

pub use history::STEP;
pub use stats::{Brief, Stats};

use crate::{
    connection::Conn,
    entrance::{Certified, Explained, MISSING, explain, seconds},
    fast_path, memory_plan,
    metrics::Metrics,
    node::Node,
    reply::Reply,
    routes::Routes,
    secured::{self, Failed},
};
use arc_swap::ArcSwap;
use axum::{
    Router,
    body::Body,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use castier_access::{Access, What};
use castier_blob::{Digest, MalformedDigest};
use castier_cluster::{Members, Purge};
use castier_config::{Limits, Role};
use castier_routes::Glob;
use castier_serverkit::{admin_connections::AdminConnections, tls::Tls};
use castier_upstream::Upstream;
use castier_wire::Problem;
use history::History;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use problems::ProblemTracker;
use serde::Serialize;
use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
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
    /// The routes.
    pub routes: Arc<Routes>,
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
    pub fn new(
        node: Arc<Node>,
        origin: Arc<Upstream>,
        metrics: Arc<Metrics>,
        members: Option<Arc<Members>>,
        purge: Arc<Purge>,
        routes: Arc<Routes>,
    ) -> Self {
        Self {
            node,
            origin,
            metrics,
            members,
            purge,
            routes,
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
        .route("/purge", post(purge_names))
        .route("/why", get(why))
        .route("/drain", get(outbox_left).post(drain))
        .fallback(|| async {
            problem(StatusCode::NOT_FOUND, "here are /metrics, /healthz, /readyz, /stats, /why?url=, /purge/<digest>, /purge, /drain and /")
        })
        .method_not_allowed_fallback(|| async {
            problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "everything here is GET, but /purge and /purge/<digest>, which are POST, and /drain, which is both",
            )
        })
        .with_state(admin)
}

/// Serves the admin listener within its own limits.
///
/// At `limits.max_admin_connections` it closes the oldest idle connection for a new one. So a health check is always answered, beside any
/// number of idle connections.
pub async fn serve(listener: TcpListener, router: Router, guard: Arc<Guard>, limits: Arc<ArcSwap<Limits>>) {
    let mut open = AdminConnections::default();
    loop {
        let Ok((stream, address)) = listener.accept().await else {
            // Usually there are no descriptors left. Trying again at once would give the same error.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let limits = limits.load_full();
        if !open.admit(limits.max_admin_connections) {
            continue;
        }
        let busy = Arc::new(AtomicBool::new(false));
        let connection = tokio::spawn(connection(stream, address.ip(), router.clone(), guard.clone(), busy.clone(), limits));
        open.add(move || busy.load(Ordering::Relaxed), connection.abort_handle());
    }
}

/// Who may ask the admin listener what.
pub struct Guard {
    /// `listen.tls.admin`.
    pub tls: Option<Arc<Tls>>,
    /// `access.admin`; `None`: everybody may do everything.
    pub access: Option<Arc<Access>>,
    /// `access.open_probes`.
    pub open_probes: bool,
}

impl Guard {
    /// The refusal, if the request is refused.
    async fn check(&self, request: &Request<Incoming>, client: IpAddr, certificate: Option<&Certified>) -> Option<Response> {
        let Some(access) = &self.access else { return self.check_host(request, client) };
        let is_probe = *request.method() != Method::POST && matches!(request.uri().path(), "/metrics" | "/healthz" | "/readyz");
        if is_probe && (self.open_probes || client.to_canonical().is_loopback()) {
            return None;
        }
        let needed = if *request.method() == Method::POST { Role::Admin } else { Role::Read };
        let mut credentials = request.headers().get_all(header::AUTHORIZATION).iter();
        let who = match (credentials.next(), credentials.next()) {
            (Some(authorization), None) => match access.identify(authorization.as_bytes(), Some(client)).await {
                Ok(who) => who,
                Err(refused) => {
                    let Explained { status, detail, retry_after, .. } = explain(&refused);
                    let mut answer = if status == StatusCode::UNAUTHORIZED { challenge(detail) } else { problem(status, detail) };
                    answer.headers_mut().extend(retry_after.map(|wait| (header::RETRY_AFTER, seconds(wait))));
                    return Some(answer);
                }
            },
            (None, _) => match certificate {
                Some(certified) if self.tls.as_ref().is_some_and(|tls| certified.is_trusted(tls)) => certified.who().clone(),
                Some(_) => {
                    access.metrics().wrong_credentials();
                    let mut answer = challenge("the certificate of this connection is not accepted any more; connect again");
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    return Some(answer);
                }
                None => {
                    access.metrics().missing();
                    return Some(challenge(MISSING));
                }
            },
            (Some(_), Some(_)) => return Some(problem(StatusCode::BAD_REQUEST, "more than one Authorization header")),
        };
        if who.may(needed, What::Other) {
            return None;
        }
        access.metrics().role();
        Some(problem(StatusCode::FORBIDDEN, &format!("these credentials do not suffice: this needs the role {needed}")))
    }

    /// Without a log-in, a page of another site could purge what its reader may: it lets its own name lead to the loopback address, and the browser takes
    /// castier for that site (DNS rebinding). So a browser on this machine, which names the origin of each POST, must ask by address or for `localhost`.
    fn check_host(&self, request: &Request<Incoming>, client: IpAddr) -> Option<Response> {
        let is_browser = ["sec-fetch-site", "origin"].iter().any(|name| request.headers().contains_key(*name));
        if !is_browser || *request.method() != Method::POST || !client.to_canonical().is_loopback() {
            return None;
        }
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let authority: Option<http::uri::Authority> = host.parse().ok();
        let name = authority.as_ref().map_or("", |authority| authority.host());
        let is_address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
        let is_here = is_address || name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
        let why = "a browser must ask by address or for localhost, since any site's name can lead here; or set access.admin";
        (!is_here).then(|| problem(StatusCode::FORBIDDEN, why))
    }
}

fn challenge(detail: &str) -> Response {
    let mut answer = problem(StatusCode::UNAUTHORIZED, detail);
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"castier admin\""));
    answer
}

/// The request with its whole body; `None` if it is cut or too large. A body that does not come would keep its connection busy, and other clients out.
async fn whole(request: Request<Incoming>) -> Option<Request<Body>> {
    let (head, body) = request.into_parts();
    let bytes = axum::body::to_bytes(Body::new(body), MAX_HEAD).await.ok()?;
    Some(Request::from_parts(head, bytes.into()))
}

fn late() -> Response {
    let mut answer = problem(StatusCode::REQUEST_TIMEOUT, "the body took longer than limits.header_timeout");
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Serves one connection. hyper's timeout for heads also runs between requests, so a scraper that comes back later opens a new connection.
async fn connection(stream: TcpStream, client: IpAddr, router: Router, guard: Arc<Guard>, busy: Arc<AtomicBool>, limits: Arc<Limits>) {
    let mut stream = Conn::socket(stream);
    let mut certificate = None;
    if let Some(tls) = &guard.tls {
        stream = match secured::accept(tls.admin_acceptor(), stream, limits.header_timeout.get()).await {
            Ok((stream, handshake)) => {
                certificate =
                    handshake.certificate.zip(guard.access.as_ref()).map(|(shown, access)| Arc::new(Certified::new(shown, access)));
                stream
            }
            Err(Failed::Plain(stream)) => {
                let reply = Reply::error(StatusCode::BAD_REQUEST, "this port speaks TLS: ask it with https");
                return fast_path::answer_and_close(Conn::new(stream, limits.write_timeout.get()), &reply).await;
            }
            Err(Failed::Handshake(_)) => return,
        };
    }
    let body_timeout = limits.header_timeout.get();
    let answer = service_fn(move |request: Request<Incoming>| {
        let (mut router, guard, busy, certificate) = (router.clone(), guard.clone(), busy.clone(), certificate.clone());
        async move {
            busy.store(true, Ordering::Relaxed);
            let answer = match guard.check(&request, client, certificate.as_deref()).await {
                Some(refusal) => Ok(refusal),
                None => match timeout(body_timeout, whole(request)).await {
                    Ok(Some(request)) => router.call(request).await,
                    Ok(None) => Ok(problem(StatusCode::PAYLOAD_TOO_LARGE, "the body is cut, or larger than 16 KiB")),
                    Err(_) => Ok(late()),
                },
            };
            busy.store(false, Ordering::Relaxed);
            answer
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout.get())
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(Conn::new(stream, limits.write_timeout.get())), answer);
    // An error here concerns only this client.
    served.await.ok();
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    admin.routes.update_metrics(&admin.metrics.routes);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], admin.metrics.render(&admin.node.cache.tier_stats())).into_response()
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    if admin.phase() == Phase::Ready { "ready\n".into_response() } else { problem(StatusCode::SERVICE_UNAVAILABLE, "starting or draining") }
}

async fn stats(State(admin): State<Arc<Admin>>) -> Response {
    json(&admin.stats())
}

/// Whether a browser sends a request for another site's page. Such a page could purge what its reader may purge.
fn is_cross_site(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(site) = text("sec-fetch-site") {
        return !matches!(site, "same-origin" | "none");
    }
    let host = text("host").unwrap_or_default();
    text("origin").is_some_and(|origin| origin.split_once("://").is_none_or(|(_, authority)| authority != host))
}

fn cross_site() -> Response {
    problem(StatusCode::FORBIDDEN, "a page of another site may not purge")
}

async fn purge(State(admin): State<Arc<Admin>>, Path(digest): Path<String>, headers: HeaderMap) -> Response {
    if is_cross_site(&headers) {
        return cross_site();
    }
    let Ok(digest) = digest.parse::<Digest>() else { return problem(StatusCode::BAD_REQUEST, &MalformedDigest.to_string()) };
    json(&admin.purge.everywhere(&digest).await)
}

/// What `POST /purge` takes: one URL, or a route and a pattern of paths.
#[derive(serde::Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum PurgeNames {
    Url { url: String },
    Route { route: String, path: String },
}

async fn purge_names(State(admin): State<Arc<Admin>>, headers: HeaderMap, body: Bytes) -> Response {
    if is_cross_site(&headers) {
        return cross_site();
    }
    let usage = r#"the body is {"url": "…"} or {"route": "…", "path": "a pattern such as /simple/**"}"#;
    let Ok(what) = serde_json::from_slice(&body) else { return problem(StatusCode::BAD_REQUEST, usage) };
    let routes = &admin.routes;
    if routes.is_empty() {
        return problem(StatusCode::NOT_FOUND, "no route is configured");
    }
    let forgotten = match &what {
        PurgeNames::Url { url } => routes.purge_url_everywhere(url).await,
        PurgeNames::Route { route, path } => match Glob::parse(path) {
            Ok(glob) => routes.purge_everywhere(route, &glob).await,
            Err(error) => return problem(StatusCode::BAD_REQUEST, &format!("path: {error}")),
        },
    };
    match forgotten {
        Some(purged) => json(&purged),
        None => problem(StatusCode::NOT_FOUND, &format!("no such route; there are: {}", routes.labels().join(", "))),
    }
}

/// Begins to drain the outbox. The answer says what is left.
async fn drain(state: State<Arc<Admin>>, headers: HeaderMap) -> Response {
    if is_cross_site(&headers) {
        return problem(StatusCode::FORBIDDEN, "a page of another site may not drain the outbox");
    }
    if let Some(outbox) = &state.node.outbox {
        outbox.drain();
    }
    outbox_left(state).await
}

/// What waits in the outbox. Nothing without one.
async fn outbox_left(State(admin): State<Arc<Admin>>) -> Response {
    let left = admin.node.outbox.as_ref().map_or((0, 0), |outbox| (outbox.len(), outbox.bytes()));
    json(&serde_json::json!({ "records": left.0, "bytes": left.1 }))
}

/// What `GET /why` takes.
#[derive(serde::Deserialize)]
struct Why {
    url: String,
}

async fn why(State(admin): State<Arc<Admin>>, query: Result<Query<Why>, QueryRejection>, headers: HeaderMap) -> Response {
    let Ok(Query(Why { url })) = query else {
        return problem(StatusCode::BAD_REQUEST, "ask for /why?url=URL, with the URL percent-encoded");
    };
    let routes = &admin.routes;
    if routes.is_empty() {
        return problem(StatusCode::NOT_FOUND, "no route is configured");
    }
    // All but the admin listener's own host, since they can choose between answers.
    let chosen = headers.into_iter().filter_map(|(name, value)| Some((name?, value))).filter(|(name, _)| *name != header::HOST).collect();
    json(&routes.why(&url, chosen).await)
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
