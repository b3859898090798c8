//! Requests about blobs that the fast path does not answer: through pingora's session, which parses the body's framing and writes any reply.

use crate::{
    access_log::{self, CLIENT_GONE, More, Record},
    connection::{Conn, response_header},
    entrance::Client,
    fast_path,
    handlers::Request,
    listener::{Audience, Front},
    memory_plan,
    metrics::{Route, Served},
    reply::{Body, Reply, cache_status},
    request_body::{self, RequestBody},
    request_head::{Framing, Head},
    routes::{Match, is_batch},
};
use bytes::{Bytes, BytesMut};
use castier_cache::{Asker, Fault, Limit, PIECE};
use castier_cluster::Asked;
use castier_config::Limits;
use castier_upstream::{trace, via_header};
use castier_wire::{
    Target,
    trace::{Trace, X_REQUEST_ID},
};
use http::{Method, StatusCode, header};
use pingora::{protocols::http::ServerSession, server::ShutdownWatch};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// How long the rest of an upload is read after an early answer. If castier closed at once, the client might get a reset instead of the answer.
pub(crate) const LINGER: Duration = Duration::from_secs(10);

/// The connection broke, or castier closed it, before the whole response was sent.
pub(crate) struct Cut {
    /// For the access record.
    pub(crate) why: String,
}

impl Cut {
    /// Because of the client or the network.
    pub(crate) fn client(error: impl std::fmt::Display) -> Self {
        Self { why: format!("the client left, or took nothing for too long: {error}") }
    }
}

/// A request whose head has been read.
pub(crate) struct Arrived<'a> {
    pub(crate) head: &'a Head,
    /// The limits that hold for this request.
    pub(crate) limits: &'a Limits,
    /// Turns true when this node shuts down.
    pub(crate) draining: &'a ShutdownWatch,
    /// What the answer to a peer must prove.
    pub(crate) asked: &'a Asked,
    /// The client; behind a trusted proxy, the one that the proxy names.
    pub(crate) client: Client,
    /// The other end of the connection; with the PROXY protocol the one that its header names.
    pub(crate) address: Option<IpAddr>,
    /// The route that it is for.
    pub(crate) routed: Option<&'a Match>,
}

/// What a session has sent.
struct Sent {
    /// The status, or [`CLIENT_GONE`].
    code: u16,
    served: Served,
    /// `Cache-Status`.
    cache: String,
    /// From the head's arrival to the first byte of the answer.
    first_byte: Option<Duration>,
    /// Why the request failed.
    error: Option<String>,
    /// The response was sent to its end.
    whole: bool,
}

impl Front {
    /// Answers the request whose head is at the front of `ahead`. Gives the connection back if it can serve another.
    pub(crate) async fn serve_session(&self, mut conn: Conn, mut ahead: BytesMut, arrived: &Arrived<'_>) -> Option<(Conn, BytesMut)> {
        let started = Instant::now();
        let Arrived { head, limits, draining, client, .. } = *arrived;
        let memory = self.memory.lease(memory_plan::request(head));
        if memory.is_none() && (arrived.routed.is_some() || !self.is_control(head, &ahead)) {
            drop(ahead);
            self.shed_request(conn, Limit::ClientMemory, Some(arrived.asked), client.shown).await;
            return None;
        }
        let prefix = ahead.split_to(head.len);
        let trace = Arc::new(head.introduction(&prefix, |fields| trace::of(fields)));
        // The fence has two reasons. Behind pipelined bytes, pingora would not notice that the client has closed. And the fence rejects
        // malformed chunks that pingora accepts.
        conn.fence(ahead, Some(head.framing));
        let mut session = new_session(conn, prefix, limits);
        if !matches!(session.read_request().await, Ok(true)) {
            // The two parsers disagree: `request_head` accepted this head. It may be an attempt to smuggle a request, so it is refused.
            session.set_keepalive(None);
            let reply = Reply::error(StatusCode::BAD_REQUEST, "malformed request head");
            let code = reply.status.as_u16();
            let _ = write(&mut session, reply, None).await;
            session.shutdown().await;
            fast_path::refused(self.name(), code, "malformed request head", started, client.shown).log(&self.metrics);
            return None;
        }
        if *draining.borrow() {
            session.set_keepalive(None);
        }
        if !self.exchange(&mut session, arrived, &trace, started).await {
            session.shutdown().await;
            return None;
        }
        if !session.is_body_done() && !request_body::expects_continue(&session) {
            let _ = timeout(LINGER, async { while let Ok(Some(_)) = session.read_request_body().await {} }).await;
        }
        let (stream, ahead) = session.finish().await.ok().flatten()?.into_parts();
        // Because of the fence, pingora cannot have read into the next request. If it has, the connection is not used again.
        let mut conn = Conn::from_stream(stream).filter(|_| ahead.is_none_or(|ahead| ahead.is_empty()))?;
        let ahead = conn.unfence()?;
        Some((conn, ahead))
    }

    /// Lets a handler answer the request of a session, writes the answer, and counts it. Returns whether all of the answer was written; if not, the
    /// session must not end as if it were.
    pub(crate) async fn exchange(&self, session: &mut ServerSession, arrived: &Arrived<'_>, trace: &Arc<Trace>, started: Instant) -> bool {
        let line = session.req_header();
        let (method, version, path, headers) = (line.method.clone(), line.version, line.uri.path().to_owned(), line.headers.clone());
        let request = Request { method: &method, version, target: Target::of(&path), path: &path, headers: &headers };
        let before = via_header::of(&headers);
        let answer = self.answer(session, &request, arrived.limits, arrived);
        let answered = via_header::along(before, trace::along(Some(trace.clone()), answer)).await;
        let sent = self.send_answer(session, answered, arrived, trace, started).await;
        self.record_session(session, &request, &sent, arrived, trace, started);
        sent.whole
    }

    /// A health check, or a notice between nodes. It is answered even if clients have used up `limits.client_memory`, since they could otherwise
    /// make this node look dead to its peers. It has no body, and `limits.max_peer_connections` bounds how many there are at once.
    fn is_control(&self, head: &Head, bytes: &[u8]) -> bool {
        matches!(self.audience, Audience::Peers(_)) && head.framing == Framing::Length(0) && matches!(head.target(bytes), Target::Other)
    }

    /// Sends the answer to a request: the handler's reply, or the error that its fault means.
    async fn send_answer(
        &self,
        session: &mut ServerSession,
        answered: Result<Reply, Fault>,
        arrived: &Arrived<'_>,
        trace: &Arc<Trace>,
        started: Instant,
    ) -> Sent {
        let (mut reply, mut error) = match answered {
            Ok(reply) => (reply, None),
            Err(fault @ Fault::ClientGone(_)) => {
                let (cache, error) = (String::new(), Some(fault.to_string()));
                return Sent { code: CLIENT_GONE, served: Served::Error, cache, first_byte: None, error, whole: false };
            }
            Err(fault) => {
                match fault {
                    Fault::Busy(limit) => self.metrics.shed(limit),
                    // The end of such a body is unknown, so the start of the next request is unknown too.
                    Fault::BadRequest(_) | Fault::ClientSilent | Fault::TooLarge { .. } => session.set_keepalive(None),
                    _ => {}
                }
                let reply = Reply::fault(&fault);
                let reply = match arrived.routed {
                    Some(found) => found.error(reply),
                    None => reply,
                };
                (reply, Some(fault.to_string()))
            }
        };
        let first_byte = Some(started.elapsed());
        // Errors carry the request's id, so that a client can report it. The heads of blobs do not: they must not vary, since caches keep them.
        if reply.status.as_u16() >= 400 && matches!(self.audience, Audience::Clients(..)) {
            reply.headers.extend(trace.id_header().map(|id| (X_REQUEST_ID, id)));
        }
        reply.prove(arrived.asked);
        let (code, mut served, cache) = (reply.status.as_u16(), reply.served, cache_status(&reply.headers).to_owned());
        let written = trace::along(Some(trace.clone()), self.write_reply(session, reply, arrived)).await;
        let whole = written.is_ok();
        if let Err(cut) = written {
            served = Served::Error;
            error = Some(cut.why);
        }
        Sent { code, served, cache, first_byte, error, whole }
    }

    /// Counts and logs a request that a session answered.
    fn record_session(
        &self,
        session: &ServerSession,
        request: &Request<'_>,
        sent: &Sent,
        arrived: &Arrived<'_>,
        trace: &Trace,
        started: Instant,
    ) {
        let route = match request.target {
            _ if let Some(found) = arrived.routed => {
                if found.is_entry() {
                    Route::Relay
                } else {
                    Route::Route
                }
            }
            Target::Blob(_) | Target::Malformed(_) => Route::Blob,
            Target::Collection => Route::Collection,
            Target::Other => Route::Control,
        };
        let more = More {
            first_byte: sent.first_byte,
            proto: Some(request.version),
            user_agent: access_log::user_agent(request.headers),
            error: sent.error.as_deref(),
            digest: if let (Target::Blob(digest), None) = (request.target, arrived.routed) { Some(digest) } else { None },
            trace: Some(trace),
        };
        let record = Record {
            listener: self.name(),
            route,
            method: request.method.as_str(),
            path: request.path,
            code: sent.code,
            bytes: session.body_bytes_sent() as u64,
            took: started.elapsed(),
            cache: &sent.cache,
            served: sent.served,
            client: arrived.client.shown,
            more,
        };
        record.log(&self.metrics);
    }

    /// Lets a handler answer. Ends early if the client of a GET closes the connection.
    async fn answer(
        &self,
        session: &mut ServerSession,
        request: &Request<'_>,
        limits: &Limits,
        Arrived { routed, client, .. }: &Arrived<'_>,
    ) -> Result<Reply, Fault> {
        // A peer is no client.
        let client = client.shown.filter(|_| self.handlers.asker() == Asker::Client);
        if let Some(found) = *routed {
            return self.answer_route(session, request, limits, found).await;
        }
        if let Some(reply) = self.handlers.at_once(request) {
            return Ok(reply);
        }
        if self.handlers.is_upload(request) {
            // Boxed, so that a GET does not hold memory for the state of an upload.
            let outgoing = || self.outgoing().ok_or(Fault::Busy(Limit::Files));
            let upload = self.handlers.upload(request, RequestBody::of(session, limits), limits, outgoing);
            return Box::pin(castier_outbox::of_client(client, upload)).await;
        }
        request_body::discard(session, limits).await?;
        if *request.method != Method::GET {
            return Box::pin(castier_outbox::of_client(client, self.handlers.answer(request))).await;
        }
        tokio::select! {
            biased;
            reply = self.handlers.answer(request) => reply,
            _ = session.read_body_or_idle(true) => Err(Fault::ClientGone("before the answer".into())),
        }
    }

    /// As [`Self::answer`], for a request of a route.
    async fn answer_route(
        &self,
        session: &mut ServerSession,
        request: &Request<'_>,
        limits: &Limits,
        found: &Match,
    ) -> Result<Reply, Fault> {
        if is_batch(request.method, found) {
            let mut body = RequestBody::of(session, limits);
            if body.expects_continue() {
                body.send_continue().await?;
            }
            let body = body.into_bytes(limits.max_blob.get(), false);
            return self.handlers.answer_route(request, found.clone(), Some(body)).await;
        }
        request_body::discard(session, limits).await?;
        tokio::select! {
            biased;
            reply = self.handlers.answer_route(request, found.clone(), None) => reply,
            _ = session.read_body_or_idle(true) => Err(Fault::ClientGone("before the answer".into())),
        }
    }

    /// Writes a reply. Its body may still be arriving from a source. If that fails, the connection must be closed.
    async fn write_reply(&self, session: &mut ServerSession, reply: Reply, arrived: &Arrived<'_>) -> Result<(), Cut> {
        let Reply { status, headers, body, served, tier } = reply;
        let mut reader = match body {
            Body::Blob(reader) => reader,
            body => return write(session, Reply { status, headers, body, served, tier }, Some((self, arrived))).await,
        };
        let mut head = response_header(status, &headers);
        if !headers.contains_key(header::CONTENT_LENGTH) {
            // Chunked, and not until the connection closes: the client must be able to tell a cut body from a complete one.
            head.insert_header(header::TRANSFER_ENCODING, "chunked").map_err(Cut::client)?;
        }
        session.write_response_header(head).await.map_err(Cut::client)?;
        loop {
            let piece = tokio::select! {
                biased;
                piece = reader.next() => piece,
                _ = session.read_body_or_idle(true) => return Err(Cut::client("closed")),
            };
            match piece {
                Ok(Some(mut piece)) => {
                    self.pace(arrived, piece.len(), async || gone(session).await).await?;
                    while !piece.is_empty() {
                        let part = part_for(session, &mut piece);
                        let bytes = part.len() as u64;
                        session.write_response_body(part, false).await.map_err(Cut::client)?;
                        self.metrics.served_from(self.name(), tier, bytes);
                    }
                }
                Ok(None) => return session.write_response_body(Bytes::new(), true).await.map_err(Cut::client),
                Err(fault) => return Err(self.cut(&fault)),
            }
        }
    }

    /// The body of a response failed after its head was sent.
    pub(crate) fn cut(&self, fault: &Fault) -> Cut {
        if let Fault::Busy(limit) = fault {
            self.metrics.shed(*limit);
        }
        self.metrics.answer_cut(self.name());
        tracing::warn!(%fault, "response cut: what came is not, or not all of, the blob");
        Cut { why: fault.to_string() }
    }
}

/// Ends when the client has left. Never, while it may still send its body: to look for the end would take a byte of it.
pub(crate) async fn gone(session: &mut ServerSession) {
    if !session.is_body_done() {
        return std::future::pending().await;
    }
    let _ = session.read_body_or_idle(true).await;
}

/// How long an answer over HTTP/2 waits for the end of an upload that it does not need, and how long for more of it.
const EARLY: Duration = Duration::from_secs(2);
const LULL: Duration = Duration::from_millis(200);

/// Writes a reply whose body is in memory, or empty. Long bodies are written in pieces, so that the write timeout counts for each piece, and
/// `limits.bandwidth_per_client`, if it is told for whom.
///
/// # Errors
/// The client has closed, or has taken no byte for `limits.write_timeout`.
pub(crate) async fn write(session: &mut ServerSession, reply: Reply, paced: Option<(&Front, &Arrived<'_>)>) -> Result<(), Cut> {
    if let ServerSession::H2(stream) = session
        && !stream.is_body_done()
    {
        // Some clients of HTTP/2 (curl 7.88) lose an answer that comes before the end of their upload.
        let upload = async { while let Ok(Ok(Some(_))) = timeout(LULL, stream.read_body_bytes()).await {} };
        let _ = timeout(EARLY, upload).await;
    }
    let head = response_header(reply.status, &reply.headers);
    let mut rest = if let Body::Whole(bytes) = reply.body { bytes } else { Bytes::new() };
    if let ServerSession::H2(stream) = session
        && (rest.is_empty() || stream.req_header().method == Method::HEAD)
    {
        // Over HTTP/1.1 pingora itself leaves out the body of an answer to HEAD.
        return stream.write_response_header(head, true).map_err(Cut::client);
    }
    session.write_response_header(head).await.map_err(Cut::client)?;
    let is_long = rest.len() > PIECE && session.is_http2();
    loop {
        let mut piece = rest.split_to(rest.len().min(PIECE));
        if is_long && rest.is_empty() {
            // The queue may outlive the request, and would hold the whole body.
            piece = Bytes::copy_from_slice(&piece);
        }
        if let Some((front, arrived)) = paced {
            front.pace(arrived, piece.len(), async || gone(session).await).await?;
        }
        session.write_response_body(piece, rest.is_empty()).await.map_err(Cut::client)?;
        if rest.is_empty() {
            return Ok(());
        }
    }
}

/// The front of a piece that is written at once: over HTTP/1.1 all of it. Over HTTP/2 as much as its queue holds, for which the write timeout counts. It
/// is copied: the queue may outlive the request, and would hold all of what this is a part of.
fn part_for(session: &ServerSession, piece: &mut Bytes) -> Bytes {
    if !session.is_http2() {
        return std::mem::take(piece);
    }
    Bytes::copy_from_slice(&piece.split_to(piece.len().min(memory_plan::HTTP2_QUEUE)))
}

/// A session over a fenced connection. `prefix` is the head, which has been read already.
fn new_session(conn: Conn, prefix: BytesMut, limits: &Limits) -> ServerSession {
    let mut session = ServerSession::new_http1(conn.into_stream());
    // With pipelining, `finish` returns the bytes that pingora has read after the request.
    session.set_pipelining_enabled(true);
    session.set_pipelined_prefix(prefix);
    session.set_read_timeout(Some(limits.idle_timeout.get()));
    session.set_total_drain_timeout(Some(LINGER));
    session
}
