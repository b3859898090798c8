//! Requests about blobs that the fast path does not answer: through pingora's session, which parses the body's framing and writes any reply.

use crate::{
    access_log::{self, CLIENT_GONE, More, Record},
    connection::{Conn, response_header, write},
    fast_path,
    handlers::Request,
    listener::{Audience, Front},
    memory_plan,
    metrics::{Route, Served},
    reply::{Body, Reply, cache_status},
    request_body::{self, RequestBody},
    request_head::Head,
};
use bytes::{Bytes, BytesMut};
use castier_cache::{Fault, Limit};
use castier_cluster::Asked;
use castier_config::Limits;
use castier_upstream::{trace, via_header};
use castier_wire::{Target, trace::X_REQUEST_ID};
use http::{Method, StatusCode, header};
use pingora::{protocols::http::ServerSession, server::ShutdownWatch};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// After an early answer the rest of an upload is read for this long, so that the client gets to see the answer and not a reset.
const LINGER: Duration = Duration::from_secs(10);

/// The connection broke, or had to be broken, before the response was whole.
pub(crate) struct Cut {
    /// For the access record.
    pub(crate) why: String,
}

impl Cut {
    /// The client is at fault, or the network between.
    pub(crate) fn client(error: impl std::fmt::Display) -> Self {
        Self { why: format!("the client left, or took nothing for too long: {error}") }
    }
}

/// What is known of a request before anything is done for it.
pub(crate) struct Arrived<'a> {
    pub(crate) head: &'a Head,
    /// The limits that hold for this request.
    pub(crate) limits: &'a Limits,
    /// This node is about to end.
    pub(crate) draining: &'a ShutdownWatch,
    /// What the answer to a peer must prove.
    pub(crate) asked: &'a Asked,
    /// The client, as far as trusted proxies tell.
    pub(crate) client: Option<IpAddr>,
}

impl Front {
    /// Answers the request whose head is at the front of `ahead`. Gives the connection back if it can serve another.
    pub(crate) async fn serve_session(&self, mut conn: Conn, mut ahead: BytesMut, arrived: &Arrived<'_>) -> Option<(Conn, BytesMut)> {
        let started = Instant::now();
        let Arrived { head, limits, draining, asked, client } = *arrived;
        let Some(_memory) = self.memory.lease(memory_plan::request(head)) else {
            drop(ahead);
            self.shed_request(conn, Limit::ClientMemory, client).await;
            return None;
        };
        // The session sees one request and no more: behind pipelined bytes, pingora would not notice that the client has left; and the fence
        // is stricter about chunks than pingora is.
        let prefix = ahead.split_to(head.len);
        let trace = Arc::new(head.introduction(&prefix, |fields| trace::of(fields)));
        conn.fence(ahead, Some(head.framing));
        let mut session = ServerSession::new_http1(conn.into_stream());
        // Pipelining is switched on for the sake of `finish`, which then gives back what was read too much.
        session.set_pipelining_enabled(true);
        session.set_pipelined_prefix(prefix);
        session.set_read_timeout(Some(limits.idle_timeout.get()));
        session.set_total_drain_timeout(Some(LINGER));
        if !matches!(session.read_request().await, Ok(true)) {
            // `request_head` has seen a whole and sound head, so this is where the two parsers differ. In doubt the request is refused.
            session.set_keepalive(None);
            let reply = Reply::error(StatusCode::BAD_REQUEST, "malformed request head");
            let code = reply.status.as_u16();
            let _ = write(&mut session, reply).await;
            session.shutdown().await;
            fast_path::refused(self.name(), code, started, client).log(&self.metrics);
            return None;
        }
        if *draining.borrow() {
            session.set_keepalive(None);
        }
        let line = session.req_header();
        let (method, version, path, headers) = (line.method.clone(), line.version, line.uri.path().to_owned(), line.headers.clone());
        let target = Target::of(&path);
        let request = Request { method: &method, version, target, path: &path, headers: &headers };
        let before = via_header::of(&headers);
        let answered = via_header::along(before, trace::along(Some(trace.clone()), self.answer(&mut session, &request, limits))).await;
        let (reply, mut error) = match answered {
            Ok(reply) => (Some(reply), None),
            Err(fault @ Fault::ClientGone(_)) => (None, Some(fault.to_string())),
            Err(fault) => {
                match fault {
                    Fault::Busy(limit) => self.metrics.shed(limit),
                    // Where such a body ends nobody knows, so nobody knows where the next request begins.
                    Fault::BadRequest(_) | Fault::ClientSilent | Fault::TooLarge { .. } => session.set_keepalive(None),
                    _ => {}
                }
                (Some(Reply::fault(&fault)), Some(fault.to_string()))
            }
        };
        let first_byte = reply.is_some().then(|| started.elapsed());
        let (code, served, cache, whole) = match reply {
            Some(mut reply) => {
                // What a client may have to report names its request. Blobs' heads are fixed, and kept by caches.
                if reply.status.as_u16() >= 400 && matches!(self.audience, Audience::Clients(_)) {
                    reply.headers.extend(trace.tell_id().map(|id| (X_REQUEST_ID, id)));
                }
                reply.prove(asked);
                let (code, mut served, cache) = (reply.status.as_u16(), reply.served, cache_status(&reply.headers).to_owned());
                let written = trace::along(Some(trace.clone()), self.write_reply(&mut session, reply)).await;
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
        if !whole && code != CLIENT_GONE {
            error.get_or_insert_with(|| "cut before its end".to_owned());
        }
        let digest = if let Target::Blob(digest) = target { Some(digest) } else { None };
        let user_agent = access_log::user_agent(&headers);
        let more = More { first_byte, proto: Some(version), user_agent, error: error.as_deref(), digest, trace: Some(&trace) };
        let record = Record {
            listener: self.name(),
            route,
            method: method.as_str(),
            path: &path,
            code,
            bytes: session.body_bytes_sent() as u64,
            took: started.elapsed(),
            cache: &cache,
            served,
            client,
            more,
        };
        record.log(&self.metrics);
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

    /// Has a handler answer. Ends early if a client that waits for a blob leaves.
    async fn answer(&self, session: &mut ServerSession, request: &Request<'_>, limits: &Limits) -> Result<Reply, Fault> {
        if let Some(reply) = self.handlers.at_once(request) {
            return Ok(reply);
        }
        if self.handlers.is_upload(request) {
            // Boxed, so that the task of a request that waits for a blob is not as large as that of an upload.
            let outgoing = || self.outgoing().ok_or(Fault::Busy(Limit::Files));
            return Box::pin(self.handlers.upload(request, RequestBody::of(session), limits, outgoing)).await;
        }
        request_body::discard(session).await?;
        if *request.method != Method::GET {
            return Box::pin(self.handlers.answer(request)).await;
        }
        tokio::select! {
            biased;
            reply = self.handlers.answer(request) => reply,
            _ = session.read_body_or_idle(true) => Err(Fault::ClientGone("before the answer".into())),
        }
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
                    self.metrics.served_from(self.name(), tier, piece.len() as u64);
                    session.write_response_body(piece, false).await.map_err(Cut::client)?;
                }
                Ok(None) => return session.write_response_body(Bytes::new(), true).await.map_err(Cut::client),
                Err(fault) => return Err(self.cut(&fault)),
            }
        }
    }

    /// What had to come after the head of a response did not.
    pub(crate) fn cut(&self, fault: &Fault) -> Cut {
        if let Fault::Busy(limit) = fault {
            self.metrics.shed(*limit);
        }
        self.metrics.answer_cut(self.name());
        tracing::warn!(%fault, "response cut: what came is not, or not all of, the blob");
        Cut { why: fault.to_string() }
    }
}
