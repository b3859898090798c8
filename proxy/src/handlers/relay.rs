//! Everything that is no blob goes to the origin unchanged and uncached, streaming both ways. The only place that sees
//! `pingora_proxy`.

use crate::{
    access_log,
    connection::{self, Conn},
    memory_plan,
    metrics::{Listener, Metrics, Route, Served},
    reply::Reply,
    request_head::{Head, names_upgrade},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use castier_cache::{Fault, Lease, Limit};
use castier_config::Limits;
use castier_upstream::{Expected, Upstream, via_header};
use castier_wire::{
    self as wire,
    trace::{Trace, X_REQUEST_ID},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
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
    sync::Arc,
    time::{Duration, Instant},
};

/// Relays requests to the origin.
pub struct Relay {
    proxy: Arc<HttpProxy<Rules>>,
}

/// What becomes of a relayed request, in pingora's terms.
struct Rules {
    origin: Arc<Upstream>,
    metrics: Arc<Metrics>,
}

impl Relay {
    /// To this origin, whose certificate must stand below the roots in `ca_file` if there is one.
    pub fn new(origin: Arc<Upstream>, metrics: Arc<Metrics>, ca_file: Option<String>) -> Self {
        let conf = ServerConf { upstream_keepalive_pool_size: 256, ca_file, ..ServerConf::default() };
        let mut proxy = HttpProxy::new(Rules { origin, metrics }, Arc::new(conf));
        proxy.handle_init_modules();
        Self { proxy: Arc::new(proxy) }
    }

    /// Relays the request whose head stands at the front of `ahead`. Gives the connection back if it can serve another.
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
        // pingora makes the request's context itself, so what is known of the request goes along with the session.
        session.set_connection_user_context(Some(Box::new(known)));
        let (stream, _) = self.proxy.process_new_http(session, shutdown).await?.consume();
        let mut conn = Conn::from_stream(stream)?;
        let ahead = conn.unfence()?;
        Some((conn, ahead))
    }
}

/// What is known of a request before it is relayed.
pub struct Known {
    /// What it may hold, out of `limits.client_memory`.
    pub memory: Lease,
    /// Whom it comes from.
    pub client: Option<IpAddr>,
    /// Which request it is.
    pub trace: Trace,
}

/// What a relayed request's record needs.
struct Passage {
    started: Instant,
    /// How long the first byte of the answer took.
    first_byte: Option<Duration>,
    failed: bool,
    /// Why, for the record.
    error: Option<String>,
    /// How many connections to the origin it has had.
    connections: u32,
    /// The last of them was kept alive.
    reused: bool,
    known: Option<Known>,
    /// The answer is paid for, however fast it comes.
    answer_paid: bool,
    /// It had to end, since `limits.client_memory` was used up.
    shed: bool,
}

impl Passage {
    /// Pays for an answer, or says that it must not go on.
    fn pay(&mut self, bytes: u64) -> pingora::Result<()> {
        if self.known.as_mut().is_none_or(|known| known.memory.grow(bytes)) {
            return Ok(());
        }
        self.shed = true;
        Err(pingora::Error::explain(pingora::ErrorType::InternalError, "limits.client_memory is used up"))
    }
}

impl Rules {
    /// An answer's head as the client gets it.
    fn answer_head(&self, session: &mut Session, response: &mut ResponseHeader) -> pingora::Result<()> {
        let upgrade = session.is_upgrade_req();
        for name in hop_by_hop(&response.headers) {
            // Framing is pingora's own business, and so is an upgrade that was agreed on.
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
            // It knows no chunks either: the end of the connection is the end of the body.
            response.remove_header(&header::TRANSFER_ENCODING);
            session.set_keepalive(None);
        }
        Ok(())
    }
}

#[async_trait]
impl ProxyHttp for Rules {
    type CTX = Passage;

    fn new_ctx(&self) -> Passage {
        Passage {
            started: Instant::now(),
            first_byte: None,
            failed: false,
            error: None,
            connections: 0,
            reused: false,
            known: None,
            answer_paid: false,
            shed: false,
        }
    }

    fn on_connection_reuse(&self, _session: &mut Session, ctx: &mut Passage, known: Box<dyn Any + Send + Sync>) {
        ctx.known = known.downcast().ok().map(|known| *known);
    }

    fn init_downstream_modules(&self, _modules: &mut pingora::modules::http::HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, _ctx: &mut Passage) -> pingora::Result<()> {
        let request = session.req_header();
        if request.headers.contains_key(header::UPGRADE) && !asks_for_upgrade(request) {
            session.req_header_mut().remove_header(&header::UPGRADE);
        }
        if session.req_header().version == Version::HTTP_10 {
            // It knows no interim answers (RFC 9110, section 15.2).
            session.as_downstream_mut().set_ignore_info_resp(true);
        }
        Ok(())
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Passage) -> pingora::Result<Box<HttpPeer>> {
        let expected = Expected { head: session.req_header().method == Method::HEAD, upgrade: session.is_upgrade_req() };
        // If a connection that was kept alive has broken, others may have, too.
        let (peer, reused) = self.origin.lend(expected, ctx.connections > 0).await.map_err(|fault| {
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
        ctx: &mut Passage,
        _reused: bool,
    ) -> Box<pingora::Error> {
        // As pingora does by itself, which does not know whether this connection was kept alive.
        if session.req_header().method.is_idempotent() && !session.as_ref().retry_buffer_truncated() {
            error.retry.decide_reuse(ctx.reused);
        } else {
            error.set_retry(false);
        }
        error
    }

    async fn upstream_request_filter(&self, session: &mut Session, request: &mut RequestHeader, ctx: &mut Passage) -> pingora::Result<()> {
        let upgrade = session.is_upgrade_req();
        for name in hop_by_hop(&request.headers) {
            if !(upgrade && (name == header::CONNECTION || name == header::UPGRADE)) {
                request.remove_header(&name);
            }
        }
        if let Some(host) = request.headers.get(header::HOST).cloned()
            && !request.headers.contains_key("x-forwarded-host")
        {
            request.insert_header("X-Forwarded-Host", host)?;
        }
        request.insert_header(header::HOST, self.origin.authority())?;
        if let Some(peer) = session.client_addr().and_then(|address| address.as_inet()) {
            let peer = peer.ip().to_canonical();
            let before = request.headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
            let mut chain: Vec<_> = before.map(str::to_owned).collect();
            // Told in `Forwarded` alone: the origin shall not have to read both.
            if let Some(client) = ctx.known.as_ref().and_then(|known| known.client).filter(|client| chain.is_empty() && *client != peer) {
                chain.push(client.to_string());
            }
            chain.push(peer.to_string());
            request.insert_header("X-Forwarded-For", chain.join(", "))?;
        }
        if !request.headers.contains_key("x-forwarded-proto") {
            request.insert_header("X-Forwarded-Proto", "http")?;
        }
        if let Some(length) = one_length(&request.headers) {
            request.insert_header(header::CONTENT_LENGTH, length)?;
        }
        for (name, value) in ctx.known.iter().flat_map(|known| known.trace.tell()) {
            match value {
                Some(value) => request.insert_header(name, value)?,
                None => drop(request.remove_header(&name)),
            }
        }
        request.append_header(header::VIA, via_header::own(session.req_header().version))?;
        if let Some(credentials) = self.origin.credentials()
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
        ctx: &mut Passage,
    ) -> pingora::Result<()> {
        if !response.status.is_informational() {
            self.origin.found(ctx.started, Ok(response.status));
        }
        // Two lengths that differ are refused before this.
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

    async fn response_filter(&self, session: &mut Session, response: &mut ResponseHeader, ctx: &mut Passage) -> pingora::Result<()> {
        if !response.status.is_informational() {
            ctx.first_byte = Some(ctx.started.elapsed());
            let empty = session.req_header().method == http::Method::HEAD || matches!(response.status.as_u16(), 204 | 304);
            let length = response.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.trim().parse().ok());
            match length {
                _ if empty => {}
                Some(length) => ctx.pay(memory_plan::relay_answer(Some(length)))?,
                // Most answers of unknown length come in small pieces, as events do. `response_body_filter` sees the others.
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
        ctx: &mut Passage,
    ) -> pingora::Result<Option<Duration>> {
        if !ctx.answer_paid && body.as_ref().is_some_and(|body| body.len() > memory_plan::RELAY_PIECE) {
            ctx.pay(memory_plan::relay_answer(None))?;
            ctx.answer_paid = true;
        }
        Ok(None)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &pingora::Error, ctx: &mut Passage) -> FailToProxy {
        ctx.failed = true;
        if ctx.shed {
            self.metrics.shed(Limit::ClientMemory);
        }
        let fault = if ctx.shed {
            Fault::Busy(Limit::ClientMemory)
        } else {
            error.root_cause().downcast_ref::<Fault>().cloned().unwrap_or_else(|| self.origin.fault(error))
        };
        use ErrorType::{ConnectionClosed, ReadError, WriteError};
        let downstream = error.esource == pingora::ErrorSource::Downstream;
        if !downstream && !ctx.shed {
            self.origin.found(ctx.started, Err(&fault));
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
                tracing::warn!(%fault, "a request could not be relayed to the origin; its client was told so");
            }
            match fault {
                Fault::Unreachable { .. } => Reply::error(http::StatusCode::BAD_GATEWAY, "the origin cannot be reached"),
                _ => Reply::fault(&fault),
            }
        };
        reply.headers.extend(ctx.known.as_ref().and_then(|known| known.trace.tell_id()).map(|id| (X_REQUEST_ID, id)));
        session.set_keepalive(None);
        let error_code = reply.status.as_u16();
        if let Err(error) = connection::write(session.as_downstream_mut(), reply).await {
            tracing::debug!(%error, "client gone");
        }
        FailToProxy { error_code, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, error: Option<&pingora::Error>, ctx: &mut Passage) {
        let failed = ctx.failed || error.is_some();
        let code = session.response_written().map_or(access_log::CLIENT_GONE, |response| response.status.as_u16());
        let request = session.req_header();
        let error = error.map(ToString::to_string);
        let done = access_log::Record {
            listener: Listener::Public,
            route: Route::Relay,
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

/// Whether the request is for another protocol (RFC 9110, section 7.8). With a body it is a request like any other: where the body ended
/// and the other protocol began, nobody could tell.
fn asks_for_upgrade(request: &RequestHeader) -> bool {
    let no_body = |length: &HeaderValue| length.as_bytes().trim_ascii().iter().all(|digit| *digit == b'0');
    names_upgrade(request.headers.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes))
        && !request.headers.contains_key(header::TRANSFER_ENCODING)
        && request.headers.get(header::CONTENT_LENGTH).is_none_or(no_body)
}

/// What `Content-Length` says, if it says it more than once: the fields are known to be equal.
fn one_length(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(header::CONTENT_LENGTH).iter();
    let (first, second) = (values.next()?, values.next());
    let bytes = first.as_bytes();
    match bytes.iter().position(|byte| *byte == b',') {
        Some(end) => HeaderValue::from_bytes(bytes[..end].trim_ascii()).ok(),
        None => second.map(|_| first.clone()),
    }
}

/// The headers that end here (RFC 9110, section 7.6.1): the fixed ones and those that `Connection` names.
fn hop_by_hop(headers: &HeaderMap) -> Vec<HeaderName> {
    const FIXED: [&str; 7] = ["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let named: Vec<HeaderName> = named.filter_map(|name| name.trim().parse().ok()).collect();
    // A request's framing headers stay even if `Connection` names them: dropping them would change where the body ends.
    let fixed = FIXED.into_iter().map(HeaderName::from_static).filter(|name| *name != header::TRANSFER_ENCODING);
    fixed
        .chain(named.into_iter().filter(|name| ![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::HOST].contains(name)))
        .collect()
}
