//! HTTP/2: one connection carries many requests at once. After the frames are taken apart by pingora and the `h2` library, a request goes the same way as
//! one over HTTP/1.1: the same parser reads its head, the same checks admit it, the same handlers answer it.
//!
//! Limits that belong to a connection of HTTP/1.1 belong to each request here: memory, stall timeouts, the access record. What only HTTP/2 has is
//! limited here: the number of requests at once, and frames without content (`frames`).

pub mod frames;

use crate::{
    access_log::{self, More, Record},
    connection::{Conn, response_header},
    entrance::{Refusal, Visitor},
    fast_path,
    handlers::relay::Relay,
    listener::{Admitted, Answerer, Audience, Front},
    memory_plan,
    reply::{Body, Reply},
    request_head::{self, Head, NoHead},
    session::{Arrived, Cut, LINGER, gone, write},
};
use bytes::{Bytes, BytesMut};
use castier_access::Memo;
use castier_blob::Digest;
use castier_cache::{Fault, Hit, Limit, Reader};
use castier_config::Limits;
use castier_upstream::trace;
use castier_wire::{Selection, Target, trace::X_REQUEST_ID};
use frames::{Flood, Frames};
use http::{HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use pingora::{
    protocols::http::{
        ServerSession,
        v2::server::{H2Accept, H2Options, HttpSession, handshake},
    },
    server::ShutdownWatch,
};
use std::{
    future::poll_fn,
    net::IpAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};
use tokio::{
    io::AsyncWriteExt as _,
    sync::Notify,
    time::{sleep, timeout},
};

/// A connection with so many malformed requests in a minute is closed. A correct client sends none; a proxy may carry some.
const MALFORMED: usize = 32;
const MINUTE: Duration = Duration::from_secs(60);
/// How often to look whether the queue to the client is empty.
const TICK: Duration = Duration::from_secs(1);
/// An empty SETTINGS frame, which must be the first, and a GOAWAY with ENHANCE_YOUR_CALM (11) before any stream (RFC 9113, sections 6.5 and 6.8).
const TURNED_AWAY: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];

/// What the requests of one connection share.
struct Shared {
    front: Arc<Front>,
    visitor: Visitor,
    memo: Mutex<Memo>,
    shutdown: ShutdownWatch,
    /// How many requests are open.
    open: AtomicUsize,
    /// Wakes when none is open any more.
    idle: Notify,
    /// The most bytes that requests which have ended may have left in the queue.
    queued: AtomicU64,
    /// Wakes when the connection may serve no more requests.
    ends: Notify,
}

/// Counts one request for as long as it is open.
struct Stream {
    shared: Arc<Shared>,
    /// How many bytes of its answer it has written.
    wrote: AtomicU64,
}

impl Stream {
    fn open(shared: &Arc<Shared>) -> Self {
        shared.open.fetch_add(1, Ordering::Release);
        shared.front.metrics.http2_streams.inc();
        Self { shared: shared.clone(), wrote: AtomicU64::new(0) }
    }
}

impl Drop for Stream {
    /// Moves what the request may have left in the queue from the part of an open request to `queued`. In this order:
    ///
    /// 1. A request that has ended is no longer open.
    /// 2. Its bytes are queued.
    ///
    /// The other way round, [`Shared::left`] between the two would take the stream for an open one, find that no stream has ended, and set `queued` to 0.
    /// Nobody would pay for these bytes.
    fn drop(&mut self) {
        self.shared.front.metrics.http2_streams.dec();
        let was_last = self.shared.open.fetch_sub(1, Ordering::AcqRel) == 1;
        let bytes = (*self.wrote.get_mut()).min(memory_plan::HTTP2_QUEUE as u64);
        self.shared.queued.fetch_add(bytes, Ordering::AcqRel);
        if was_last {
            self.shared.idle.notify_one();
        }
    }
}

impl Shared {
    /// Lowers `queued`, and returns it. `streams`: how many the library still holds after it has sent what the client takes. Those that are not open have
    /// ended, and each has at most its part of the queue left.
    fn left(&self, streams: usize) -> u64 {
        let ended = streams.saturating_sub(self.open.load(Ordering::Acquire));
        let most = (ended * memory_plan::HTTP2_QUEUE) as u64;
        self.queued.fetch_min(most, Ordering::AcqRel).min(most)
    }

    /// What the connection must pay for: each request that is open can fill its part of the queue.
    fn cost(&self) -> u64 {
        let open = self.open.load(Ordering::Relaxed).saturating_sub(1) * memory_plan::HTTP2_QUEUE;
        memory_plan::HTTP2 + open as u64 + self.queued.load(Ordering::Relaxed)
    }

    /// Ends when no request has been open for `limit`.
    async fn idle(&self, limit: Duration) {
        while self.open.load(Ordering::Relaxed) > 0 {
            self.idle.notified().await;
        }
        sleep(limit).await;
    }
}

fn options(limits: &Limits) -> H2Options {
    let size = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    // Of RFC 9113, section 6.9.1.
    const MOST: u32 = (1 << 31) - 1;
    let window = size(limits.http2_window.get()).min(MOST);
    let mut options = H2Options::default();
    options
        .max_concurrent_streams(limits.http2_streams)
        .max_header_list_size(size(limits.max_header_bytes.get()))
        .initial_window_size(window)
        // Enough for all: an upload that does not go on must not stop the others. Each one's window is leased from `limits.client_memory`.
        .initial_connection_window_size(window.saturating_mul(limits.http2_streams).min(MOST))
        .max_send_buffer_size(memory_plan::HTTP2_QUEUE)
        // Frames with a byte or two cost the library more than they carry. Its default is half of the connection's window, which is far larger here.
        .data_frame_budget(window as usize);
    options
}

impl Front {
    /// Serves a connection that speaks HTTP/2, until either side closes. `ahead` are bytes that were read already.
    pub(crate) async fn serve_http2(self: &Arc<Self>, mut conn: Conn, ahead: BytesMut, visitor: Visitor, shutdown: &ShutdownWatch) {
        let limits = self.limits.load_full();
        let Some(mut memory) = self.memory.lease(memory_plan::HTTP2) else {
            self.metrics.shed(Limit::ClientMemory);
            let _ = timeout(fast_path::REFUSAL, async { (conn.write_all(TURNED_AWAY).await, conn.shutdown().await) }).await;
            return;
        };
        let digest = Arc::new(conn.digest());
        let (alarm, gathers) = conn.count_frames(ahead, Frames::new(&limits));
        let begun = timeout(limits.header_timeout.get(), handshake(conn.into_stream(), Some(options(&limits))));
        let Ok(Ok(mut connection)) = begun.await else { return };
        let shared = Arc::new(Shared {
            front: self.clone(),
            visitor,
            memo: Mutex::default(),
            shutdown: shutdown.clone(),
            open: AtomicUsize::new(0),
            idle: Notify::new(),
            queued: AtomicU64::new(0),
            ends: Notify::new(),
        });
        let mut draining = shutdown.clone();
        // When castier began to close the connection.
        let mut closing: Option<Instant> = None;
        let mut malformed = (0, Instant::now());
        let mut wait = limits.header_timeout.get();
        // For how long no request has been open, and whether the connection pays for a queue.
        let (mut idle, mut pays) = (Duration::ZERO, false);
        // A request that came while this looked what is left in the queue.
        let mut next = None;
        let flood = loop {
            if pays && next.is_none() {
                let mut accept = pin!(together(&gathers, HttpSession::from_h2_conn(&mut connection, digest.clone())));
                if let Poll::Ready(accepted) = futures::poll!(accept.as_mut()) {
                    next = Some(accepted);
                }
            }
            if pays && next.is_none() {
                pays = shared.left(connection.num_wired_streams()) > 0 || shared.open.load(Ordering::Relaxed) > 0;
                memory.resize(shared.cost());
            }
            let step = if pays { TICK.min(wait) } else { wait };
            let accepted = tokio::select! {
                biased;
                flood = alarm.raised() => break Some(flood),
                _ = draining.wait_for(|down| *down), if closing.is_none() => {
                    connection.graceful_shutdown();
                    (closing, wait) = (Some(Instant::now()), fast_path::REFUSAL);
                    continue;
                }
                () = shared.ends.notified(), if closing.is_none() => {
                    connection.graceful_shutdown();
                    (closing, wait) = (Some(Instant::now()), fast_path::REFUSAL);
                    continue;
                }
                accepted = async {
                    match next.take() {
                        Some(accepted) => accepted,
                        None => together(&gathers, HttpSession::from_h2_conn(&mut connection, digest.clone())).await,
                    }
                } => accepted,
                () = shared.idle(step) => {
                    idle += step;
                    if idle < wait {
                        continue;
                    }
                    idle = Duration::ZERO;
                    match closing {
                        // What is in the queue still goes out, if the client takes it.
                        Some(began) if !connection.has_streams() || began.elapsed() > limits.write_timeout.get() => return,
                        Some(_) => {}
                        None => {
                            connection.graceful_shutdown();
                            (closing, wait) = (Some(Instant::now()), fast_path::REFUSAL);
                        }
                    }
                    continue;
                }
            };
            match accepted {
                Ok(Some(H2Accept::Session(session))) => {
                    match closing {
                        None => wait = limits.idle_timeout.get(),
                        // The client does not answer to the shutdown, which would end this.
                        Some(began) if began.elapsed() > limits.write_timeout.get() => continue,
                        Some(_) => {}
                    }
                    idle = Duration::ZERO;
                    let stream = Stream::open(&shared);
                    pays = true;
                    let cost = shared.cost();
                    let fits = memory.resize(cost);
                    // A hit is answered here and now. What has to wait goes on in a task of its own.
                    let mut answer = Box::pin(stream.serve(session, fits, cost == memory_plan::HTTP2));
                    if futures::poll!(answer.as_mut()).is_pending() {
                        tokio::spawn(answer);
                    }
                }
                Ok(Some(H2Accept::Rejected)) => {
                    if malformed.1.elapsed() > MINUTE {
                        malformed = (0, Instant::now());
                    }
                    malformed.0 += 1;
                    if malformed.0 >= MALFORMED {
                        break Some(Flood::Malformed);
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let cause = error.root_cause().downcast_ref::<h2::Error>();
                    let calm = cause.filter(|cause| !cause.is_remote()).and_then(h2::Error::reason) == Some(h2::Reason::ENHANCE_YOUR_CALM);
                    // The library may have found the same, in the bytes that the alarm is about.
                    break alarm.found().or(calm.then_some(Flood::Library));
                }
            }
        };
        let Some(flood) = flood else { return };
        self.metrics.http2_flood(flood);
        tracing::debug!(flood = flood.as_str(), client = ?shared.visitor.ip(), "an HTTP/2 connection was closed: its client sent too much");
        connection.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
        // Sends the GOAWAY.
        let _ = timeout(fast_path::REFUSAL, HttpSession::from_h2_conn(&mut connection, digest)).await;
    }
}

impl Stream {
    fn wrote(&self, bytes: u64) {
        self.wrote.store(bytes, Ordering::Relaxed);
    }

    /// Answers one request. Not `fits`: the memory for it is used up. `is_lone`: there is no other, and the queue is empty.
    async fn serve(self, session: HttpSession, fits: bool, is_lone: bool) {
        let shared = &self.shared;
        let front = &shared.front;
        let started = Instant::now();
        let limits = front.limits.load_full();
        let _answering = front.metrics.answering();
        let ended = session.is_body_done();
        let mut session = ServerSession::new_http2(session);
        session.set_write_timeout(Some(limits.write_timeout.get()));
        complete(&mut session);
        let (bytes, head) = match request_head::of_http2(session.req_header(), ended, &limits) {
            Ok(read) => read,
            Err(refused) => {
                // It counts as any other. Over HTTP/1.1 the connection would end here.
                let client = shared.visitor.client();
                if let Audience::Clients(_, entrance) = &front.audience
                    && let Err(refusal) = entrance.count(&limits, client, None)
                {
                    return self.refuse(session, refusal.reply, refusal.why, client.shown, started).await;
                }
                let (status, why) = match refused {
                    NoHead::Refused(status, why) => (status, why),
                    _ => (StatusCode::BAD_REQUEST, "malformed request head".to_owned()),
                };
                return self.refuse(session, Reply::error(status, &why), &why, client.shown, started).await;
            }
        };
        // A lone request may be a hit although the memory is used up: its connection has paid for as much. All others pay.
        let memory = front.memory.lease(memory_plan::request(&head) + memory_plan::http2_window(&head, &limits)).filter(|_| fits);
        if memory.is_none() && !(is_lone && head.plain) {
            return self.shed(session, Limit::ClientMemory, shared.visitor.ip(), started).await;
        }
        // The memo is for the requests of one connection, which may come at the same moment.
        let mut memo = std::mem::take(&mut *shared.memo.lock());
        let admitted = front.admit(&mut memo, &head, &bytes, &shared.visitor, &limits).await;
        *shared.memo.lock() = memo;
        let Admitted { asked, routed, client } = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => {
                let Refusal { reply, why, client, closes, .. } = *refusal;
                if closes {
                    shared.ends.notify_one();
                }
                return self.refuse(session, reply, why, client.shown, started).await;
            }
        };
        let draining = &shared.shutdown;
        let arrived = Arrived {
            head: &head,
            limits: &limits,
            draining,
            asked: &asked,
            client,
            address: shared.visitor.ip(),
            routed: routed.as_deref(),
        };
        let target = head.target(&bytes);
        if let Answerer::Relay(relay) = front.answerer(&arrived, &target) {
            drop(memory);
            return Box::pin(self.relay(relay, session, &bytes, &arrived, started)).await;
        }
        if let Target::Blob(digest) = target
            && head.plain
            && routed.is_none()
            && head.validator(&bytes).is_none()
            && let Some(hit) = front.peek(&digest)
            && let Hit { reader: Reader::Memory(_), .. } = hit
        {
            return self.hit(session, &bytes, hit, &digest, &arrived, started).await;
        }
        if memory.is_none() {
            return self.shed(session, Limit::ClientMemory, client.shown, started).await;
        }
        Box::pin(self.exchange(session, &head, &bytes, &arrived, started)).await;
    }

    /// Sends a blob that is in memory. As everywhere, the fast path exists because hits are what there is most of.
    async fn hit(&self, mut session: ServerSession, bytes: &[u8], hit: Hit, digest: &Digest, arrived: &Arrived<'_>, started: Instant) {
        let front = &self.shared.front;
        let Hit { size, via, reader } = hit;
        let Reader::Memory(blob) = reader else { return };
        let reply = Reply::blob(digest, size, Selection::Whole, via, Body::Empty);
        let ready = started.elapsed();
        let mut sent = 0;
        let written = async {
            session.write_response_header(response_header(reply.status, &reply.headers)).await.map_err(Cut::client)?;
            let is_long = blob.len() > memory_plan::HTTP2_QUEUE;
            let mut rest = blob;
            loop {
                let mut piece = rest.split_to(rest.len().min(memory_plan::HTTP2_QUEUE));
                front.pace(arrived, piece.len(), async || gone(&mut session).await).await?;
                if is_long && rest.len() < memory_plan::HTTP2_QUEUE {
                    // The queue may outlive the request with these last two, and would hold the whole blob.
                    piece = Bytes::copy_from_slice(&piece);
                }
                sent += piece.len() as u64;
                session.write_response_body(piece, rest.is_empty()).await.map_err(Cut::client)?;
                if rest.is_empty() {
                    return Ok(());
                }
            }
        };
        let written: Result<(), Cut> = written.await;
        if written.is_err() {
            sent = session.body_bytes_sent() as u64;
            session.shutdown().await;
        }
        self.wrote(sent);
        front.metrics.served_from(front.name(), reply.tier, sent);
        let _ = front.record(&reply, bytes, digest, arrived, (sent, written), (started, ready));
    }

    /// Lets a handler answer.
    async fn exchange(&self, mut session: ServerSession, head: &Head, bytes: &[u8], arrived: &Arrived<'_>, started: Instant) {
        let trace = Arc::new(head.introduction(bytes, |fields| trace::of(fields)));
        // An answer that was not written to its end must not look as if it were: a reset tells the client.
        if self.shared.front.exchange(&mut session, arrived, &trace, started).await {
            self.wrote(session.body_bytes_sent() as u64);
            end(session, LINGER).await;
        } else {
            session.shutdown().await;
        }
    }

    async fn relay(&self, relay: &Relay, session: ServerSession, bytes: &[u8], arrived: &Arrived<'_>, started: Instant) {
        match self.shared.front.before_relay(arrived, bytes) {
            Ok((known, _descriptors)) => {
                let failed = relay.pass_http2(session, arrived.limits, &self.shared.shutdown, known).await;
                // pingora wrote it, and has not said how much.
                self.wrote(u64::MAX);
                if failed {
                    let front = &self.shared.front;
                    let why = "the client sent nothing of its body for too long (limits.idle_timeout)";
                    let record = fast_path::refused(front.name(), access_log::CLIENT_GONE, why, started, arrived.client.shown);
                    let (method, path) = (arrived.head.method.as_str(), arrived.head.path(bytes));
                    Record { method, path, ..record }.log(&front.metrics);
                }
            }
            Err(Fault::Busy(limit)) => self.shed(session, limit, arrived.client.shown, started).await,
            Err(fault) => {
                let why = fault.to_string();
                self.refuse(session, Reply::error(StatusCode::BAD_GATEWAY, &why), &why, arrived.client.shown, started).await;
            }
        }
    }

    /// Refuses a request that is over a limit.
    async fn shed(&self, session: ServerSession, limit: Limit, client: Option<IpAddr>, started: Instant) {
        self.shared.front.metrics.shed(limit);
        let fault = Fault::Busy(limit);
        self.refuse(session, Reply::fault(&fault), &fault.to_string(), client, started).await;
    }

    /// Refuses a request, with the reason. The others of the connection go on.
    async fn refuse(&self, mut session: ServerSession, mut reply: Reply, why: &str, client: Option<IpAddr>, started: Instant) {
        let front = &self.shared.front;
        let code = reply.status.as_u16();
        let trace = trace::of(&session.req_header().headers);
        reply.headers.extend(trace.id_header().map(|id| (X_REQUEST_ID, id)));
        let _ = write(&mut session, reply, None).await;
        let sent = session.body_bytes_sent() as u64;
        self.wrote(sent);
        let head = session.req_header();
        let record = fast_path::refused(front.name(), code, why, started, client);
        let more =
            More { proto: Some(head.version), user_agent: access_log::user_agent(&head.headers), trace: Some(&trace), ..record.more };
        Record { method: head.method.as_str(), path: head.uri.path(), bytes: sent, more, ..record }.log(&front.metrics);
        end(session, fast_path::REFUSAL).await;
    }
}

/// Polls a connection so that all answers which are ready are sent together, before it sleeps.
async fn together<T>(gathers: &AtomicBool, accept: impl Future<Output = T>) -> T {
    let mut accept = pin!(accept);
    poll_fn(|cx| {
        gathers.store(true, Ordering::Relaxed);
        let accepted = accept.as_mut().poll(cx);
        gathers.store(false, Ordering::Relaxed);
        // There is nothing more to answer now: this sends what waits.
        if accepted.is_pending() { accept.as_mut().poll(cx) } else { accepted }
    })
    .await
}

/// Gives a request the fields that HTTP/1.1 has for what HTTP/2 says otherwise, so that handlers and the origin find them: `Host` for `:authority`, and one
/// `Cookie` for several (RFC 9113, sections 8.3.1 and 8.2.3).
fn complete(session: &mut ServerSession) {
    let request = session.req_header_mut();
    if !request.headers.contains_key(header::HOST)
        && let Some(host) = request.uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok())
    {
        let _ = request.insert_header(header::HOST, host);
    }
    let cookies: Vec<&[u8]> = request.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        let _ = request.insert_header(header::COOKIE, joined);
    }
}

/// Ends an exchange whose answer is written. If the request goes on, its rest is read and discarded for up to `linger`: an older curl that sees the reset of
/// its upload forgets the answer before it.
async fn end(mut session: ServerSession, linger: Duration) {
    session.set_total_drain_timeout(Some(linger));
    let _ = session.drain_request_body().await;
    let _ = session.finish().await;
}
