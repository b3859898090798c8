//! Connections: reads requests, asks the cache, writes replies. With `relay.rs`, the only place that sees pingora's sessions.
//!
//! Two lanes write the same [`Reply`]. A plain GET that memory or the disk can answer is written straight onto the connection; everything
//! else about blobs goes through pingora's HTTP/1 session; what is no blob goes to [`Relay`], or, between nodes, to [`PeerDoor`].

mod fast_path;
mod peer;
mod tls;

pub use peer::PeerDoor;

use crate::{
    access_log::{self, CLIENT_GONE, More, Record},
    connection::{Conn, response_header, write},
    descriptors::{Descriptors, Outgoing},
    memory_plan,
    metrics::{Listener, Metrics, Route, Served},
    node::Node,
    purge::Purge,
    relay::{Known, Relay},
    reply::{Body, Reply},
    request_body,
    request_head::{self, Head, NoHead},
    secret::Asked,
    trace, via_header,
};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Asker, Budget, Fault, Hit, Limit, Part, Put, SMALL, SourceKind, Stat, Via};
use castier_config::{Limits, Proxies};
use castier_wire::{self as wire, Selection, Target, trace::X_REQUEST_ID};
use http::{HeaderMap, Method, StatusCode, Version, header};
use pingora::{
    apps::ServerApp,
    protocols::{Stream, http::ServerSession},
    server::ShutdownWatch,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, time::timeout};

/// After an early answer the rest of an upload is read for this long, so that the client gets to see the answer and not a reset.
const LINGER: Duration = Duration::from_secs(10);
/// A listener's application.
pub struct Front {
    node: Arc<Node>,
    door: Door,
    limits: Arc<ArcSwap<Limits>>,
    /// `log.trusted_proxies`.
    proxies: Proxies,
    /// `limits.client_memory`.
    memory: Arc<Budget>,
    /// Who may open how many files and connections.
    descriptors: Arc<Descriptors>,
    metrics: Arc<Metrics>,
}

/// The connection broke, or had to be broken, before the response was whole.
struct Cut {
    /// For the access record.
    why: String,
}

impl Cut {
    /// The client is at fault, or the network between.
    fn client(error: impl std::fmt::Display) -> Self {
        Self { why: format!("the client left, or took nothing for too long: {error}") }
    }
}

/// Who comes in here, and what becomes of requests that are about no blob.
pub enum Door {
    /// Clients. The rest is relayed to the origin.
    Clients {
        /// Takes what is no blob.
        relay: Relay,
        /// What a client deletes goes from every node.
        purge: Arc<Purge>,
    },
    /// Other nodes of the cluster. Nothing goes further than the origin, and nothing is relayed.
    Peers(PeerDoor),
}

impl Door {
    const fn listener(&self) -> Listener {
        match self {
            Self::Clients { .. } => Listener::Public,
            Self::Peers(_) => Listener::Peer,
        }
    }

    const fn asker(&self) -> Asker {
        match self {
            Self::Clients { .. } => Asker::Client,
            Self::Peers(_) => Asker::Peer,
        }
    }
}

/// Counts one connection for as long as it lives.
struct Open(Arc<Front>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.metrics.connections_at(self.0.door.listener()).dec();
    }
}

#[async_trait]
impl ServerApp for Front {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        // Each listener has the limit to itself: clients that take all there is must not part the nodes.
        let connections = self.metrics.connections_at(self.door.listener());
        connections.inc();
        let (open, shutdown) = (Open(self.clone()), shutdown.clone());
        let place = usize::try_from(connections.get()).unwrap_or(0);
        // In a task of its own: pingora's has room for a TLS handshake, and would keep it as long as the connection lives.
        tokio::spawn(async move { open.0.serve(stream, place, &shutdown).await });
        None
    }
}

impl Front {
    /// The application over these parts, within `limits.client_memory` and the descriptors there are.
    pub fn new(
        node: Arc<Node>,
        door: Door,
        limits: Arc<ArcSwap<Limits>>,
        proxies: Proxies,
        memory: Arc<Budget>,
        descriptors: Arc<Descriptors>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { node, door, limits, proxies, memory, descriptors, metrics }
    }

    /// The client that a request comes from: the one that trusted proxies name, else the one that is connected. At the peer listener it is
    /// the other node: its flight may be for many clients.
    fn client(&self, peer: Option<SocketAddr>, head: &Head, bytes: &[u8]) -> Option<IpAddr> {
        let peer = peer?.ip();
        let trusted = |address: &IpAddr| self.proxies.contains(address);
        if matches!(self.door, Door::Peers(_)) || !trusted(&peer) {
            return Some(peer.to_canonical());
        }
        Some(head.introduction(bytes, |fields| castier_wire::forwarded::client(peer, fields, trusted)))
    }

    /// What a connection to the origin takes that only this request needs.
    fn outgoing(&self) -> Option<Outgoing> {
        self.descriptors.outgoing(self.connections())
    }

    /// How many clients are connected.
    fn connections(&self) -> u64 {
        u64::try_from(self.metrics.connections.get()).unwrap_or(0)
    }

    /// Whether the connection that made it `place` of them may stay, and, if not, whether it is told so.
    fn admits(&self, place: usize, limits: &Limits) -> (bool, bool) {
        let max = match &self.door {
            Door::Clients { .. } => limits.max_connections,
            Door::Peers(_) => limits.max_peer_connections,
        };
        let room = matches!(self.door, Door::Peers(_)) || self.descriptors.has_room(place);
        let told = place <= max.saturating_add(self.descriptors.refusals()) && self.descriptors.may_refuse(place);
        (place <= max && room, told)
    }

    /// The connection that made it `place` of them.
    async fn serve(&self, stream: Stream, place: usize, shutdown: &ShutdownWatch) {
        let limits = self.limits.load_full();
        let patience = limits.write_timeout.get();
        let (admitted, told) = self.admits(place, &limits);
        if admitted {
            let stream = match &self.door {
                Door::Clients { .. } => stream,
                Door::Peers(door) => match Box::pin(door.secure(stream, limits.header_timeout.get())).await {
                    Some(stream) => stream,
                    None => return,
                },
            };
            return self.serve_connection(Conn::new(stream, patience), shutdown).await;
        }
        self.metrics.shed(Limit::Connections);
        // One that would first have to be secured is closed without a word.
        if !matches!(&self.door, Door::Peers(door) if door.is_secured()) {
            // Most are waited for until they have read the answer; beyond a number of these, none is.
            let patience = if told { fast_path::REFUSAL } else { Duration::ZERO };
            Box::pin(fast_path::refuse_connection(&mut Conn::new(stream, limits.write_timeout.get()), patience)).await;
        }
    }

    /// One request after the other, until either side has had enough. Idle connections are many, so whatever only a request needs is
    /// boxed and lives no longer than it.
    async fn serve_connection(&self, mut conn: Conn, shutdown: &ShutdownWatch) {
        let peer = conn.peer();
        let address = peer.map(|peer| peer.ip().to_canonical());
        let mut draining = shutdown.clone();
        let mut ahead = BytesMut::new();
        let mut wait = self.limits.load().header_timeout.get();
        loop {
            let limits = self.limits.load_full();
            let idle = ahead.is_empty();
            let head = tokio::select! {
                biased;
                head = request_head::read_head(&mut conn, &mut ahead, &limits, wait, &self.memory) => head,
                _ = draining.wait_for(|down| *down), if idle => return,
            };
            wait = limits.idle_timeout.get();
            conn.set_patience(limits.write_timeout.get());
            let _answering = self.metrics.answering();
            // The lease lives as long as the request does, as the head's bytes do.
            let (head, _lease) = match head {
                Ok(head) => head,
                Err(NoHead::Closed) => return,
                Err(NoHead::Refused(status, why)) => {
                    drop(ahead);
                    return Box::pin(self.refuse_request(conn, status, &why, address)).await;
                }
                Err(NoHead::NoMemory) => {
                    drop(ahead);
                    return Box::pin(self.shed_request(conn, Limit::ClientMemory, address)).await;
                }
            };
            let asked = match &self.door {
                Door::Clients { .. } => Asked::OPEN,
                Door::Peers(door) => match door.admits(&head, &ahead) {
                    Some(asked) => asked,
                    None => {
                        let why = "this listener is for the nodes of the cluster";
                        return Box::pin(self.refuse_request(conn, StatusCode::FORBIDDEN, why, address)).await;
                    }
                },
            };
            // Between nodes a question may come back: the owner peeks at the node that asked it. It goes no further than one hop.
            if head.looped && matches!(self.door, Door::Clients { .. }) {
                let why = "the request has come back to the node that sent it: this node and its origin lead to each other; see origin.url";
                return Box::pin(self.refuse_request(conn, StatusCode::LOOP_DETECTED, why, address)).await;
            }
            let client = self.client(peer, &head, &ahead);
            let next = match head.target(&ahead) {
                Target::Blob(digest) if head.plain && !*draining.borrow() => {
                    match self.fast_hit(&mut conn, &mut ahead, &head, &digest, &asked, client).await {
                        Ok(true) if head.close => {
                            let _ = timeout(limits.write_timeout.get(), conn.shutdown()).await;
                            None
                        }
                        Ok(true) => Some((conn, ahead)),
                        Ok(false) => Box::pin(self.serve_session(conn, ahead, &head, &limits, &draining, &asked, client)).await,
                        Err(Cut { .. }) => return,
                    }
                }
                Target::Blob(_) | Target::Malformed(_)
                    if matches!(head.method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE) =>
                {
                    Box::pin(self.serve_session(conn, ahead, &head, &limits, &draining, &asked, client)).await
                }
                Target::Collection if head.method == Method::POST => {
                    Box::pin(self.serve_session(conn, ahead, &head, &limits, &draining, &asked, client)).await
                }
                _ => match &self.door {
                    Door::Clients { relay, .. } => {
                        let Some(memory) = self.memory.lease(memory_plan::relay(&head)) else {
                            drop(ahead);
                            return Box::pin(self.shed_request(conn, Limit::ClientMemory, client)).await;
                        };
                        let Some(connection) = self.outgoing() else {
                            drop(ahead);
                            return Box::pin(self.shed_request(conn, Limit::Files, client)).await;
                        };
                        let known = Known { memory, client, trace: head.introduction(&ahead, |fields| trace::of(fields)) };
                        let next = Box::pin(relay.pass(conn, ahead, &head, &limits, shutdown, known)).await;
                        drop(connection);
                        next
                    }
                    Door::Peers(_) => Box::pin(self.serve_session(conn, ahead, &head, &limits, &draining, &asked, client)).await,
                },
            };
            match next {
                Some(next) => (conn, ahead) = next,
                None => return,
            }
        }
    }

    /// A request about blobs, through pingora's session. Gives the connection back if it can serve another.
    #[expect(clippy::too_many_arguments, reason = "each is a part of the one connection, and lives as long as the request at most")]
    async fn serve_session(
        &self,
        mut conn: Conn,
        mut ahead: BytesMut,
        head: &Head,
        limits: &Limits,
        draining: &ShutdownWatch,
        asked: &Asked,
        client: Option<IpAddr>,
    ) -> Option<(Conn, BytesMut)> {
        let started = Instant::now();
        let Some(_memory) = self.memory.lease(memory_plan::request(head)) else {
            drop(ahead);
            self.shed_request(conn, Limit::ClientMemory, client).await;
            return None;
        };
        // The session sees one request and no more: behind pipelined bytes, pingora would not notice that the client has left; and the fence
        // is stricter about chunks than pingora is.
        let prefix = ahead.split_to(head.len);
        let request = Arc::new(head.introduction(&prefix, |fields| trace::of(fields)));
        conn.fence(ahead, Some(head.framing));
        let mut session = ServerSession::new_http1(conn.into_stream());
        // Pipelining is switched on for the sake of `finish`, which then gives back what was read too much.
        session.set_pipelining_enabled(true);
        session.set_pipelined_prefix(prefix);
        session.set_read_timeout(Some(limits.idle_timeout.get()));
        session.set_total_drain_timeout(Some(LINGER));
        if !matches!(session.read_request().await, Ok(true)) {
            // The gate has seen a whole and sound head, so this is where the two parsers differ: in doubt, out.
            session.set_keepalive(None);
            let reply = Reply::error(StatusCode::BAD_REQUEST, "malformed request head");
            let code = reply.status.as_u16();
            let _ = write(&mut session, reply).await;
            session.shutdown().await;
            fast_path::refused(self.door.listener(), code, started, client).log(&self.metrics);
            return None;
        }
        if *draining.borrow() {
            session.set_keepalive(None);
        }
        let method = session.req_header().method.clone();
        let path = session.req_header().uri.path().to_owned();
        let target = Target::of(&path);
        let before = via_header::of(&session.req_header().headers);
        let (reply, fault) =
            via_header::along(before, trace::along(Some(request.clone()), self.answer(&mut session, &method, target, limits))).await;
        let mut error = fault.map(|fault| fault.to_string());
        let first_byte = reply.is_some().then(|| started.elapsed());
        let (code, served, cache, whole) = match reply {
            Some(mut reply) => {
                // What a client may have to report names its request. Blobs' heads are fixed, and kept by caches.
                if reply.status.as_u16() >= 400 && matches!(self.door, Door::Clients { .. }) {
                    reply.headers.extend(request.tell_id().map(|id| (X_REQUEST_ID, id)));
                }
                peer::prove(&mut reply, asked);
                let (code, mut served, cache) = (reply.status.as_u16(), reply.served, cache_status(&reply.headers).to_owned());
                let written = trace::along(Some(request.clone()), self.write_reply(&mut session, reply)).await;
                let whole = written.is_ok();
                if let Err(cut) = written {
                    served = Served::Error;
                    error = Some(cut.why);
                }
                (code, served, cache, whole)
            }
            None => (CLIENT_GONE, Served::Error, String::new(), false),
        };
        let route = match target {
            Target::Blob(_) | Target::Malformed(_) => Route::Blob,
            Target::Collection => Route::Collection,
            Target::Other => Route::Control,
        };
        let (listener, bytes, took) = (self.door.listener(), session.body_bytes_sent() as u64, started.elapsed());
        if !whole && code != CLIENT_GONE {
            error.get_or_insert_with(|| "cut before its end".to_owned());
        }
        let (proto, user_agent) = (Some(session.req_header().version), access_log::user_agent(&session.req_header().headers));
        let digest = if let Target::Blob(digest) = target { Some(digest) } else { None };
        let more = More { first_byte, proto, user_agent, error: error.as_deref(), digest, trace: Some(&request) };
        Record { listener, route, method: method.as_str(), path: &path, code, bytes, took, cache: &cache, served, client, more }
            .log(&self.metrics);
        if !whole {
            session.shutdown().await;
            return None;
        }
        if !session.is_body_done() && !request_body::expects_continue(&session) {
            let _ = timeout(LINGER, async { while let Ok(Some(_)) = session.read_request_body().await {} }).await;
        }
        let (stream, ahead) = session.finish().await.ok().flatten()?.into_parts();
        // The fence showed one request, so nothing can have been read too much.
        let mut conn = Conn::from_stream(stream).filter(|_| ahead.is_none_or(|ahead| ahead.is_empty()))?;
        let ahead = conn.unfence()?;
        Some((conn, ahead))
    }

    /// What to say to a request about blobs, nothing if the client has left; and the fault, if it is one.
    async fn answer(
        &self,
        session: &mut ServerSession,
        method: &Method,
        target: Target<'_>,
        limits: &Limits,
    ) -> (Option<Reply>, Option<Fault>) {
        let answered = match (target, &self.door) {
            (Target::Blob(digest), _) if *method == Method::GET => self.get(session, &digest).await,
            (Target::Blob(digest), _) if *method == Method::HEAD => Box::pin(self.head(session, &digest)).await,
            // Boxed, so that the task of a request that waits for a blob is not as large as that of an upload.
            (Target::Blob(digest), _) if *method == Method::PUT => Box::pin(self.put(session, Some(digest), limits)).await,
            (Target::Blob(digest), _) if *method == Method::DELETE => Box::pin(self.delete(session, &digest)).await,
            (Target::Malformed(_), _) => Ok(Reply::malformed_digest()),
            (Target::Collection, Door::Clients { .. }) => Box::pin(self.put(session, None, limits)).await,
            (_, Door::Peers(door)) => Box::pin(self.control(door, session, method)).await,
            // These were relayed.
            (Target::Blob(_) | Target::Other, Door::Clients { .. }) => Err(Fault::Internal("a request for the relay".into())),
        };
        match answered {
            Ok(reply) => (Some(reply), None),
            Err(fault @ Fault::ClientGone(_)) => (None, Some(fault)),
            Err(fault) => {
                match fault {
                    Fault::Busy(limit) => self.metrics.shed(limit),
                    // Where such a body ends nobody knows, so nobody knows where the next request begins.
                    Fault::BadRequest(_) | Fault::ClientSilent | Fault::TooLarge { .. } => session.set_keepalive(None),
                    _ => {}
                }
                (Some(Reply::fault(&fault)), Some(fault))
            }
        }
    }

    async fn get(&self, session: &mut ServerSession, digest: &Digest) -> Result<Reply, Fault> {
        if castier_wire::names_this_blob(&session.req_header().headers, digest) {
            return Ok(Reply::not_modified(digest));
        }
        request_body::no_body(session).await?;
        let headers = session.req_header().headers.clone();
        let select = |size: u64| castier_wire::select(&Method::GET, &headers, digest, size);
        // Without a length, an HTTP/1.0 client could take a cut body for a whole one, and a range would have nothing to refer to.
        let needs_size = session.req_header().version == Version::HTTP_10
            || headers.contains_key(header::RANGE)
            || headers.contains_key(header::IF_NONE_MATCH);
        let part = |size: Option<u64>| match size.map(select) {
            None if needs_size => Part::AfterSize,
            None | Some(Selection::Whole) => Part::Whole,
            Some(Selection::Part { first, last }) => Part::Bytes(first..last + 1),
            Some(Selection::NotModified | Selection::Unsatisfiable) => Part::Bytes(0..0),
        };
        let cache = &self.node.cache;
        let hit = if matches!(self.door, Door::Peers(_)) && peer::only_if_cached(&headers) {
            match cache.kept(digest, part).await {
                Some(hit) => Some(hit),
                None => return Ok(Reply::not_kept()),
            }
        } else {
            tokio::select! {
                biased;
                hit = cache.get(digest, self.door.asker(), part) => hit?,
                _ = session.read_body_or_idle(true) => return Err(Fault::ClientGone("before the answer".into())),
            }
        };
        Ok(match hit {
            Some(Hit { size, via, reader }) => Reply::blob(digest, size, size.map_or(Selection::Whole, select), via, Body::Blob(reader)),
            None if *digest == Digest::EMPTY => empty(select(0)),
            None => Reply::absent(digest),
        })
    }

    async fn head(&self, session: &mut ServerSession, digest: &Digest) -> Result<Reply, Fault> {
        if castier_wire::names_this_blob(&session.req_header().headers, digest) {
            return Ok(Reply::not_modified(digest));
        }
        request_body::no_body(session).await?;
        if matches!(self.door, Door::Peers(_)) && peer::only_if_cached(&session.req_header().headers) {
            return Ok(peer::known(&self.node.cache, digest).await);
        }
        let headers = &session.req_header().headers;
        Ok(match self.node.stat(digest, self.door.asker()).await? {
            (Stat::Present(size), via) => {
                let selection = castier_wire::select(&Method::HEAD, headers, digest, size.unwrap_or(0));
                Reply::blob(digest, size, selection, via, Body::Empty)
            }
            (Stat::Absent, _) if *digest == Digest::EMPTY => empty(castier_wire::select(&Method::HEAD, headers, digest, 0)),
            (Stat::Absent, _) => Reply::absent(digest),
        })
    }

    /// PUT with a digest, POST without.
    async fn put(&self, session: &mut ServerSession, digest: Option<Digest>, limits: &Limits) -> Result<Reply, Fault> {
        let _uploading = self.metrics.uploading();
        let max = limits.max_blob.get();
        let request = session.req_header();
        let announced = request.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.trim().parse::<u64>().ok());
        let boundary = if digest.is_none() { request_body::boundary(&request.headers)? } else { None };
        // A form is longer than its file.
        let size = if boundary.is_some() { None } else { announced };
        if size.is_some_and(|size| size > max) {
            return Err(Fault::TooLarge { limit: max });
        }
        // One that is streamed has a connection to the origin of its own for as long as it lasts.
        let _connection = match size {
            Some(size) if size <= SMALL as u64 => None,
            _ => Some(self.outgoing().ok_or(Fault::Busy(Limit::Files))?),
        };
        if request_body::expects_continue(session) {
            if let Some(digest) = digest
                && let Ok(Some(size)) = self.node.stored_at_origin(&digest, size, self.door.asker()).await
            {
                return Ok(Reply::stored(&digest, size, false, true));
            }
            request_body::go_on(session).await?;
        }
        let mut body = request_body::of_session(session, max, boundary.is_some());
        if let Some(boundary) = boundary {
            body = request_body::first_file(body, boundary, max);
        }
        let (put, stored, size) =
            self.node.put(digest, size, body, self.door.asker()).await.inspect_err(|fault| not_stored(digest.as_ref(), fault))?;
        Ok(Reply::stored(&stored, size, put == Put::Created, digest.is_some()))
    }

    async fn delete(&self, session: &mut ServerSession, digest: &Digest) -> Result<Reply, Fault> {
        request_body::no_body(session).await?;
        let deleted = self.node.delete(digest).await?;
        if let Door::Clients { purge, .. } = &self.door {
            purge.everywhere(digest).await;
        }
        Ok(if deleted { Reply::done() } else { Reply::absent(digest) })
    }

    /// Writes a reply whose body may still be on its way. If it fails to come, the connection must be cut.
    async fn write_reply(&self, session: &mut ServerSession, reply: Reply) -> Result<(), Cut> {
        let Reply { status, headers, body, served, tier } = reply;
        let mut reader = match body {
            Body::Blob(reader) => reader,
            body => return write(session, Reply { status, headers, body, served, tier }).await.map_err(Cut::client),
        };
        let mut head = response_header(status, &headers);
        if !headers.contains_key(header::CONTENT_LENGTH) {
            // Never delimited by the end of the connection: a cut must not look like an end.
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
                Ok(Some(piece)) => {
                    self.metrics.served_from(self.door.listener(), tier, piece.len() as u64);
                    session.write_response_body(piece, false).await.map_err(Cut::client)?;
                }
                Ok(None) => return session.write_response_body(Bytes::new(), true).await.map_err(Cut::client),
                Err(fault) => return Err(self.cut(&fault)),
            }
        }
    }

    /// What had to come after the head of a response did not.
    fn cut(&self, fault: &Fault) -> Cut {
        if let Fault::Busy(limit) = fault {
            self.metrics.shed(*limit);
        }
        self.metrics.answer_cut(self.door.listener());
        tracing::warn!(%fault, "response cut: what came is not, or not all of, the blob");
        Cut { why: fault.to_string() }
    }
}

/// The empty blob is there even if the origin does not have it.
fn empty(selection: Selection) -> Reply {
    Reply::blob(&Digest::EMPTY, Some(0), selection, Via::asked(SourceKind::Origin), Body::Empty)
}

/// An upload failed. What the client did wrong stands in its access record; what the origin or a peer failed to do is for an operator.
fn not_stored(digest: Option<&Digest>, fault: &Fault) {
    let digest = digest.map(tracing::field::display);
    match fault {
        Fault::Unreachable { .. }
        | Fault::Silent { .. }
        | Fault::Unusable { .. }
        | Fault::Corrupt { .. }
        | Fault::OriginFull
        | Fault::Internal(_) => {
            tracing::warn!(digest, %fault, "an upload was not stored; its client was told so");
        }
        _ => tracing::debug!(digest, %fault, "an upload was refused"),
    }
}

fn cache_status(headers: &HeaderMap) -> &str {
    headers.get(wire::CACHE_STATUS).and_then(|value| value.to_str().ok()).unwrap_or_default()
}
