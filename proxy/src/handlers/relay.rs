//! Relays requests that are not about blobs to the origin, unchanged and uncached, streaming both ways. The only file that uses
//! `pingora_proxy`.

use crate::{
    access_log,
    connection::Conn,
    memory_plan,
    metrics::{Listener, Metrics, Route, Served},
    reply::Reply,
    request_head::{Head, names_upgrade},
    routes::RelayTo,
    session,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use castier_access::Clients;
use castier_cache::{Fault, Lease, Limit};
use castier_config::Limits;
use castier_upstream::{Admission, Expected, Upstream, via_header};
use castier_wire::{
    self as wire,
    trace::{Trace, X_REQUEST_ID},
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use parking_lot::Mutex;
use pingora::{
    ErrorType,
    apps::HttpServerApp,
    http::{RequestHeader, ResponseHeader},
    prelude::HttpPeer,
    protocols::http::ServerSession,
    proxy::{FailToProxy, HttpProxy, ProxyHttp, Session},
    server::{ShutdownWatch, configuration::ServerConf},
};
use std::{
    any::Any,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Relays requests to the origin.
pub struct Relay {
    proxy: Arc<HttpProxy<Rules>>,
}

/// How pingora's proxy handles a relayed request.
struct Rules {
    origin: Arc<Upstream>,
    metrics: Arc<Metrics>,
}

impl Relay {
    /// Relays to this origin. With a `ca_file`, its CAs must have signed the origin's certificate.
    pub fn new(origin: Arc<Upstream>, metrics: Arc<Metrics>, ca_file: Option<String>) -> Self {
        let conf = ServerConf { upstream_keepalive_pool_size: 256, ca_file, ..ServerConf::default() };
        let mut proxy = HttpProxy::new(Rules { origin, metrics }, Arc::new(conf));
        proxy.handle_init_modules();
        Self { proxy: Arc::new(proxy) }
    }

    /// Relays the request whose head is at the front of `ahead`. Gives the connection back if it can serve another.
    pub async fn pass(
        &self,
        mut conn: Conn,
        mut ahead: BytesMut,
        head: &Head,
        limits: &Limits,
        shutdown: &ShutdownWatch,
        known: Known,
    ) -> Option<(Conn, BytesMut)> {
        let prefix = ahead.split_to(head.len);
        conn.fence(ahead, (!head.upgrade).then_some(head.framing));
        let mut session = ServerSession::new_http1(conn.into_stream());
        session.set_pipelined_prefix(prefix);
        session.set_read_timeout(Some(limits.idle_timeout.get()));
        // pingora makes the request's context itself. `on_connection_reuse` moves `known` into it.
        session.set_connection_user_context(Some(Box::new(known)));
        let (stream, _) = self.proxy.process_new_http(session, shutdown).await?.consume();
        let mut conn = Conn::from_stream(stream)?;
        let ahead = conn.unfence()?;
        Some((conn, ahead))
    }

    /// Relays a request that came over HTTP/2. Ends without a whole answer if the client sends nothing of its body for `limits.idle_timeout`: pingora
    /// has no such limit for HTTP/2.
    /// Returns whether that was so.
    pub async fn pass_http2(&self, mut session: ServerSession, limits: &Limits, shutdown: &ShutdownWatch, known: Known) -> bool {
        session.set_write_timeout(Some(limits.write_timeout.get()));
        let progress = Arc::new(Progress::default());
        let handed = Handed(Arc::new(Mutex::new(Some((known, progress.clone())))));
        session.req_header_mut().extensions_mut().insert(handed);
        tokio::select! {
            biased;
            _ = self.proxy.process_new_http(session, shutdown) => false,
            () = progress.stalled(limits.idle_timeout.get()) => true,
        }
    }
}

/// What is known of a request before it is relayed.
pub struct Known {
    /// Its share of `limits.client_memory`.
    pub memory: Lease,
    /// The client's address; behind a trusted proxy, the one that the proxy names.
    pub client: Option<IpAddr>,
    /// The other end of its connection; with the PROXY protocol the one that its header names.
    pub address: Option<IpAddr>,
    /// Its trace and request id.
    pub trace: Trace,
    /// Where it goes; `None`: to the origin.
    pub to: Option<RelayTo>,
    /// Its `Authorization` is for castier, and not for the origin.
    pub credentials_are_ours: bool,
    /// It came over TLS.
    pub is_secured: bool,
    /// Limits the bytes a second of its answer, by this address; `None` without such a limit.
    pub pace: Option<(Arc<Clients>, IpAddr)>,
}

/// [`Known`] on its way to the context that pingora makes for a request over HTTP/2.
#[derive(Clone)]
struct Handed(Arc<Mutex<Option<InHand>>>);

type InHand = (Known, Arc<Progress>);

/// How far the body of a request has come.
#[derive(Default)]
struct Progress {
    pieces: AtomicU64,
    /// It is whole.
    is_over: AtomicBool,
}

impl Progress {
    fn piece(&self, is_last: bool) {
        self.pieces.fetch_add(1, Relaxed);
        self.is_over.fetch_or(is_last, Relaxed);
    }

    /// Ends when no piece has come for `limit`, or up to twice as long.
    async fn stalled(&self, limit: Duration) {
        loop {
            let before = self.pieces.load(Relaxed);
            tokio::time::sleep(limit).await;
            if self.is_over.load(Relaxed) {
                return std::future::pending().await;
            }
            if self.pieces.load(Relaxed) == before {
                return;
            }
        }
    }
}

/// The state of one relayed request.
struct RelayContext {
    started: Instant,
    /// When the origin was asked.
    asked: Instant,
    /// Its circuit breaker let the request pass.
    admission: Option<Admission>,
    /// From the start to the first byte of the answer.
    first_byte: Option<Duration>,
    failed: bool,
    /// Why it failed, for the access record.
    error: Option<String>,
    /// How many connections to the origin it has used.
    connections: u32,
    /// Its last connection came out of the pool.
    reused: bool,
    known: Option<Known>,
    /// Of a request over HTTP/2.
    progress: Option<Arc<Progress>>,
    /// Bytes of the answer that went beyond `limits.bandwidth_per_client`.
    owed: u64,
    /// The lease covers the longest queue that the answer can need.
    answer_paid: bool,
    /// It failed because `limits.client_memory` was used up.
    shed: bool,
}

impl RelayContext {
    /// Extends the lease for the answer. Fails if `limits.client_memory` is used up.
    fn pay(&mut self, bytes: u64) -> pingora::Result<()> {
        if self.known.as_mut().is_none_or(|known| known.memory.grow(bytes)) {
            return Ok(());
        }
        self.shed = true;
        Err(pingora::Error::explain(pingora::ErrorType::InternalError, "limits.client_memory is used up"))
    }
}

impl Rules {
    /// The server that a request goes to.
    fn server<'a>(&'a self, ctx: &'a RelayContext) -> &'a Arc<Upstream> {
        ctx.known.as_ref().and_then(|known| known.to.as_ref()).map_or(&self.origin, |to| &to.server)
    }

    /// Changes the head of an answer for the client.
    fn answer_head(&self, session: &mut Session, response: &mut ResponseHeader) -> pingora::Result<()> {
        let upgrade = session.is_upgrade_req();
        for name in wire::hop_by_hop(&response.headers) {
            // pingora handles `Transfer-Encoding`, and the headers of an accepted upgrade.
            if name != header::TRANSFER_ENCODING && !(upgrade && (name == header::CONNECTION || name == header::UPGRADE)) {
                response.remove_header(&name);
            }
        }
        if !response.status.is_informational() {
            response.append_header(wire::CACHE_STATUS, "castier; fwd=bypass")?;
        }
        response.append_header(header::VIA, via_header::own(response.version))?;
        // Each hop speaks its own version (RFC 9110, section 6.2).
        response.set_version(Version::HTTP_11);
        if session.req_header().version == Version::HTTP_10 && response.headers.contains_key(header::TRANSFER_ENCODING) {
            // HTTP/1.0 has no chunks. The body ends when the connection closes.
            response.remove_header(&header::TRANSFER_ENCODING);
            session.set_keepalive(None);
        }
        Ok(())
    }
}

#[async_trait]
impl ProxyHttp for Rules {
    type CTX = RelayContext;

    fn new_ctx(&self) -> RelayContext {
        RelayContext {
            started: Instant::now(),
            asked: Instant::now(),
            admission: None,
            first_byte: None,
            failed: false,
            error: None,
            connections: 0,
            reused: false,
            known: None,
            progress: None,
            owed: 0,
            answer_paid: false,
            shed: false,
        }
    }

    fn on_connection_reuse(&self, _session: &mut Session, ctx: &mut RelayContext, known: Box<dyn Any + Send + Sync>) {
        ctx.known = known.downcast().ok().map(|known| *known);
    }

    fn init_downstream_modules(&self, _modules: &mut pingora::modules::http::HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut RelayContext) -> pingora::Result<()> {
        if let Some(Handed(handed)) = session.req_header_mut().extensions_mut().remove()
            && let Some((known, progress)) = handed.lock().take()
        {
            (ctx.known, ctx.progress) = (Some(known), Some(progress));
        }
        let request = session.req_header();
        if request.headers.contains_key(header::UPGRADE) && !asks_for_upgrade(request) {
            session.req_header_mut().remove_header(&header::UPGRADE);
        }
        if session.req_header().version == Version::HTTP_10 {
            // HTTP/1.0 has no interim answers (RFC 9110, section 15.2).
            session.as_downstream_mut().set_ignore_info_resp(true);
        }
        Ok(())
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut RelayContext) -> pingora::Result<Box<HttpPeer>> {
        let expected = Expected { head: session.req_header().method == Method::HEAD, upgrade: session.is_upgrade_req() };
        if ctx.connections == 0 {
            let admission = self
                .server(ctx)
                .admit()
                .await
                .map_err(|fault| pingora::Error::because(ErrorType::ConnectError, "the origin is not asked", fault).into_up())?;
            ctx.admission = Some(admission);
            ctx.asked = Instant::now();
        }
        // A retry uses a new connection: if one pooled connection was closed, the others may be closed too.
        let (peer, reused) = self.server(ctx).lend(expected, ctx.connections > 0).await.map_err(|fault| {
            let kind = if matches!(fault, Fault::Busy(_)) { ErrorType::InternalError } else { ErrorType::ConnectError };
            pingora::Error::because(kind, "no connection to the origin", fault).into_up()
        })?;
        ctx.connections += 1;
        ctx.reused = reused;
        Ok(Box::new(peer))
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<pingora::Error>,
        ctx: &mut RelayContext,
        _reused: bool,
    ) -> Box<pingora::Error> {
        // The same rule as pingora's default. pingora cannot apply it, since it does not know whether this connection came out of the pool.
        if session.req_header().method.is_idempotent() && !session.as_ref().retry_buffer_truncated() {
            error.retry.decide_reuse(ctx.reused);
        } else {
            error.set_retry(false);
        }
        error
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        end: bool,
        ctx: &mut RelayContext,
    ) -> pingora::Result<()> {
        if let Some(progress) = &ctx.progress {
            progress.piece(end);
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut RelayContext,
    ) -> pingora::Result<()> {
        if session.req_header().version == Version::HTTP_2 {
            // `:authority` names castier. The origin is another host.
            let target = request.uri.path_and_query().cloned().unwrap_or_else(|| http::uri::PathAndQuery::from_static("/"));
            request.set_uri(target.into());
            if session.as_downstream_mut().is_body_empty()
                && let Some(progress) = &ctx.progress
            {
                progress.piece(true);
            }
        }
        let upgrade = session.is_upgrade_req();
        for name in wire::hop_by_hop(&request.headers) {
            if !(upgrade && (name == header::CONNECTION || name == header::UPGRADE)) {
                request.remove_header(&name);
            }
        }
        let (address, client, is_secured) =
            ctx.known.as_ref().map_or((None, None, false), |known| (known.address, known.client, known.is_secured));
        add_forwarded(request, address, client, if is_secured { "https" } else { "http" })?;
        request.insert_header(header::HOST, self.server(ctx).authority())?;
        if let Some(to) = ctx.known.as_ref().and_then(|known| known.to.as_ref()) {
            to.prepare(request)?;
        }
        if let Some(length) = one_length(&request.headers) {
            request.insert_header(header::CONTENT_LENGTH, length)?;
        }
        for (name, value) in ctx.known.iter().flat_map(|known| known.trace.headers()) {
            match value {
                Some(value) => request.insert_header(name, value)?,
                None => drop(request.remove_header(&name)),
            }
        }
        request.append_header(header::VIA, via_header::own(session.req_header().version))?;
        if ctx.known.as_ref().is_some_and(|known| known.to.is_none() && known.credentials_are_ours) {
            request.remove_header(&header::AUTHORIZATION);
        }
        if let Some(credentials) = self.server(ctx).credentials()
            && !request.headers.contains_key(header::AUTHORIZATION)
        {
            request.insert_header(header::AUTHORIZATION, credentials.clone())?;
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut RelayContext,
    ) -> pingora::Result<()> {
        if !response.status.is_informational() {
            self.server(ctx).report_outcome(ctx.asked, Ok(response.status));
            if let Some(to) = ctx.known.as_ref().and_then(|known| known.to.as_ref()) {
                to.answered(response, ctx.started);
            }
        }
        // An answer with two different lengths was refused before.
        let status = response.status;
        if status.is_informational() || status == StatusCode::NO_CONTENT {
            response.remove_header(&header::CONTENT_LENGTH);
        } else if let Some(length) = one_length(&response.headers) {
            response.insert_header(header::CONTENT_LENGTH, length)?;
        }
        if status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            response.remove_header(&header::TRANSFER_ENCODING);
        }
        Ok(())
    }

    async fn response_filter(&self, session: &mut Session, response: &mut ResponseHeader, ctx: &mut RelayContext) -> pingora::Result<()> {
        if !response.status.is_informational() {
            ctx.first_byte = Some(ctx.started.elapsed());
            let empty = session.req_header().method == http::Method::HEAD || matches!(response.status.as_u16(), 204 | 304);
            let length = response.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.trim().parse().ok());
            match length {
                _ if empty => {}
                Some(length) => ctx.pay(memory_plan::relay_answer(Some(length)))?,
                // Most answers of unknown length come in small pieces, such as events. `response_body_filter` charges the others.
                None => return self.answer_head(session, response),
            }
            ctx.answer_paid = true;
        }
        self.answer_head(session, response)
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        ctx: &mut RelayContext,
    ) -> pingora::Result<Option<Duration>> {
        if !ctx.answer_paid && body.as_ref().is_some_and(|body| body.len() > memory_plan::RELAY_PIECE) {
            ctx.pay(memory_plan::relay_answer(None))?;
            ctx.answer_paid = true;
        }
        let Some((pace, client)) = ctx.known.as_ref().and_then(|known| known.pace.as_ref()) else { return Ok(None) };
        let (owed, wait) = pace.take_now(*client, ctx.owed + body.as_ref().map_or(0, |body| body.len() as u64));
        ctx.owed = owed;
        Ok(Some(wait).filter(|wait| !wait.is_zero()))
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &pingora::Error, ctx: &mut RelayContext) -> FailToProxy {
        ctx.failed = true;
        if ctx.shed {
            self.metrics.shed(Limit::ClientMemory);
        }
        let fault = if ctx.shed {
            Fault::Busy(Limit::ClientMemory)
        } else {
            error.root_cause().downcast_ref::<Fault>().cloned().unwrap_or_else(|| self.server(ctx).fault(error))
        };
        use ErrorType::{ConnectionClosed, ReadError, WriteError};
        let downstream = error.esource == pingora::ErrorSource::Downstream;
        if !downstream && !ctx.shed {
            self.server(ctx).report_outcome(ctx.asked, Err(&fault));
            if let Some(to) = ctx.known.as_ref().and_then(|known| known.to.as_ref()) {
                to.failed(ctx.started);
            }
        }
        let answered = session
            .response_written()
            .is_some_and(|head| !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS);
        if answered || (downstream && matches!(error.etype, ConnectionClosed | ReadError | WriteError)) {
            return FailToProxy { error_code: 0, can_reuse_downstream: false };
        }
        let mut reply = if downstream {
            Reply::error(http::StatusCode::BAD_REQUEST, "malformed request body")
        } else {
            if !ctx.shed {
                let to = self.server(ctx).name;
                tracing::warn!(%fault, "a request could not be relayed to the {to}; its client got an error");
            }
            match fault {
                Fault::Unreachable { source_name, .. } => {
                    Reply::error(http::StatusCode::BAD_GATEWAY, &format!("the {source_name} cannot be reached"))
                }
                _ => Reply::fault(&fault),
            }
        };
        if reply.headers.contains_key(wire::CACHE_STATUS) {
            // Of the circuit breaker. Relayed requests ask no cache.
            reply.headers.insert(wire::CACHE_STATUS, http::HeaderValue::from_static("castier; fwd=bypass; detail=breaker"));
        }
        reply.headers.extend(ctx.known.as_ref().and_then(|known| known.trace.id_header()).map(|id| (X_REQUEST_ID, id)));
        session.set_keepalive(None);
        let error_code = reply.status.as_u16();
        if let Err(cut) = session::write(session.as_downstream_mut(), reply, None).await {
            tracing::debug!(why = cut.why, "the client closed before it got the error");
        }
        FailToProxy { error_code, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, error: Option<&pingora::Error>, ctx: &mut RelayContext) {
        let failed = ctx.failed || error.is_some();
        let code = session.response_written().map_or(access_log::CLIENT_GONE, |response| response.status.as_u16());
        let request = session.req_header();
        let error = error.map(ToString::to_string);
        let done = access_log::Record {
            listener: Listener::Public,
            route: if ctx.known.as_ref().is_some_and(|known| known.to.is_some()) { Route::Route } else { Route::Relay },
            method: request.method.as_str(),
            path: request.uri.path(),
            code,
            bytes: session.body_bytes_sent() as u64,
            took: ctx.started.elapsed(),
            cache: "castier; fwd=bypass",
            served: if failed || code >= 400 { Served::Error } else { Served::Miss },
            client: ctx.known.as_ref().and_then(|known| known.client),
            more: access_log::More {
                proto: Some(request.version),
                user_agent: access_log::user_agent(&request.headers),
                first_byte: ctx.first_byte,
                trace: ctx.known.as_ref().map(|known| &known.trace),
                error: ctx.error.as_deref().or(error.as_deref()).or_else(|| failed.then_some("cut before its end")),
                ..access_log::More::default()
            },
        };
        done.log(&self.metrics);
    }
}

/// Adds the client's host, address and protocol as `X-Forwarded-…`. `address` is the other end of the connection. `client` is the client
/// that trusted proxies name. Must run before `Host` is replaced.
fn add_forwarded(
    request: &mut RequestHeader,
    address: Option<IpAddr>,
    client: Option<IpAddr>,
    protocol: &'static str,
) -> pingora::Result<()> {
    if let Some(host) = request.headers.get(header::HOST).cloned()
        && !request.headers.contains_key("x-forwarded-host")
    {
        request.insert_header("X-Forwarded-Host", host)?;
    }
    if let Some(address) = address {
        let before = request.headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
        let mut chain: Vec<_> = before.map(str::to_owned).collect();
        // A proxy that sends only `Forwarded` has named the client there. Repeating it here lets the origin read one header only.
        if let Some(client) = client.filter(|client| chain.is_empty() && *client != address) {
            chain.push(client.to_string());
        }
        chain.push(address.to_string());
        request.insert_header("X-Forwarded-For", chain.join(", "))?;
    }
    if !request.headers.contains_key("x-forwarded-proto") {
        request.insert_header("X-Forwarded-Proto", protocol)?;
    }
    Ok(())
}

/// Whether the request asks for another protocol (RFC 9110, section 7.8). A request with a body does not count: the end of the body and the
/// start of the other protocol could not be told apart.
fn asks_for_upgrade(request: &RequestHeader) -> bool {
    let no_body = |length: &HeaderValue| length.as_bytes().trim_ascii().iter().all(|digit| *digit == b'0');
    names_upgrade(request.headers.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes))
        && !request.headers.contains_key(header::TRANSFER_ENCODING)
        && request.headers.get(header::CONTENT_LENGTH).is_none_or(no_body)
}

/// The value of a repeated `Content-Length`; `None` if it is not repeated. Repeated values are equal, since others were refused before.
fn one_length(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(header::CONTENT_LENGTH).iter();
    let (first, second) = (values.next()?, values.next());
    let bytes = first.as_bytes();
    match bytes.iter().position(|byte| *byte == b',') {
        Some(end) => HeaderValue::from_bytes(bytes[..end].trim_ascii()).ok(),
        None => second.map(|_| first.clone()),
    }
}
