//! Answers that are written to the connection without a pingora session: the fast path for hits, and refusals.

use crate::{
    access_log::{self, More, Record},
    connection::Conn,
    entrance::Refusal,
    listener::Front,
    metrics::{Listener, Route, Served},
    reply::{Body, Reply, cache_status},
    request_head::{Framing, Head},
    session::{Arrived, Cut},
};
use bytes::{Buf, Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Hit, Limit, PIECE, Part, Reader, Tier};
use castier_cluster::Asked;
use castier_upstream::trace;
use castier_wire::{Selection, trace::X_REQUEST_ID};
use http::{Method, StatusCode, Version};
use pingora::protocols::http::date::get_cached_date;
use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    net::IpAddr,
    pin::Pin,
    task::{Poll, ready},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    time::timeout,
};

/// A refused client has this long to send its request and read the answer.
pub(crate) const REFUSAL: Duration = Duration::from_secs(2);
/// Bodies up to this size are copied after their head, so that one write sends both.
const ONE_WRITE: usize = 16 << 10;
/// How many pieces from disk one write sends. More pieces mean fewer wake-ups of the client; this many still fit into the processor's cache.
const TOGETHER: usize = 4;

impl Front {
    /// Answers a plain GET if memory or the disk has the blob, or if the client has it already (`If-None-Match`). Returns false if neither is the
    /// case. Then nothing has been sent, and the session must answer.
    pub(crate) async fn fast_hit(
        &self,
        conn: &mut Conn,
        ahead: &mut BytesMut,
        digest: &Digest,
        arrived: &Arrived<'_>,
    ) -> Result<bool, Cut> {
        let started = Instant::now();
        let head = arrived.head;
        let (reply, ready, sent) = if let Some(validator) = head.validator(ahead) {
            if validator != digest.etag().as_bytes() {
                return Ok(false);
            }
            let mut reply = Reply::not_modified(digest);
            reply.prove(arrived.asked);
            let ready = started.elapsed();
            let (_, sent) = send(conn, &mut reply.head(&get_cached_date(), !head.close, 0)).await;
            (reply, ready, (0, sent))
        } else if let Some(Hit { size, via, reader: Reader::Memory(blob) }) = self.peek(digest) {
            let mut reply = Reply::blob(digest, size, Selection::Whole, via, Body::Empty);
            reply.prove(arrived.asked);
            let ready = started.elapsed();
            let sent = self.send_memory(conn, &reply, arrived, blob).await;
            (reply, ready, sent)
        } else {
            // Boxed, so that idle connections do not hold memory for the state of a disk hit.
            match Box::pin(self.disk_hit(conn, digest, arrived, started)).await {
                Some(answered) => answered,
                None => return Ok(false),
            }
        };
        let done = self.record(&reply, ahead, digest, arrived, sent, (started, ready));
        ahead.advance(head.len);
        done.map(|()| true)
    }

    /// The blob, if memory has it.
    pub(crate) fn peek(&self, digest: &Digest) -> Option<Hit> {
        self.handlers.cache().peek(digest, self.handlers.asker(), |_| Part::Whole)
    }

    /// Answers from the disk. Returns `None`, before anything is sent, if the first piece cannot be read. Then the session reports the error.
    async fn disk_hit(
        &self,
        conn: &mut Conn,
        digest: &Digest,
        arrived: &Arrived<'_>,
        started: Instant,
    ) -> Option<(Reply, Duration, (u64, Result<(), Cut>))> {
        let Hit { size, via, reader: mut rest } = self.handlers.cache().peek_disk(digest, self.handlers.asker()).await?;
        let first = rest.next().await.ok()?;
        let mut reply = Reply::blob(digest, size, Selection::Whole, via, Body::Empty);
        reply.prove(arrived.asked);
        let ready = started.elapsed();
        let sent = self.send_disk(conn, &reply, arrived, first.unwrap_or_default(), rest).await;
        Some((reply, ready, sent))
    }

    /// Counts and logs a request that the fast path answered.
    pub(crate) fn record(
        &self,
        reply: &Reply,
        ahead: &[u8],
        digest: &Digest,
        arrived: &Arrived<'_>,
        (bytes, sent): (u64, Result<(), Cut>),
        (started, ready): (Instant, Duration),
    ) -> Result<(), Cut> {
        let head = arrived.head;
        let trace = access_log::is_wanted().then(|| head.introduction(ahead, |fields| trace::of(fields)));
        let more = More {
            first_byte: Some(ready),
            proto: Some(head.version),
            user_agent: head.user_agent(ahead),
            error: sent.as_ref().err().map(|cut| &*cut.why),
            digest: Some(*digest),
            trace: trace.as_ref(),
        };
        let record = Record {
            listener: self.name(),
            route: Route::Blob,
            method: "GET",
            path: head.path(ahead),
            code: reply.status.as_u16(),
            bytes,
            took: started.elapsed(),
            cache: cache_status(&reply.headers),
            served: if sent.is_ok() { reply.served } else { Served::Error },
            client: arrived.client.shown,
            more,
        };
        record.log(&self.metrics);
        sent
    }

    /// Sends a head and a blob from memory. Returns how many bytes of the blob were sent, and the error if that is not all.
    async fn send_memory(&self, conn: &mut Conn, reply: &Reply, arrived: &Arrived<'_>, blob: Bytes) -> (u64, Result<(), Cut>) {
        let one_write = blob.len() <= ONE_WRITE;
        let mut head = reply.head(&get_cached_date(), !arrived.head.close, if one_write { blob.len() } else { 0 });
        let before_body = head.len();
        let (out, sent) = if one_write {
            match self.pace(arrived, blob.len(), async || conn.closed().await).await {
                Ok(()) => {
                    head.extend_from_slice(&blob);
                    send(conn, &mut &head[..]).await
                }
                Err(cut) => (0, Err(cut)),
            }
        } else if arrived.limits.bandwidth_per_client.get() == 0 {
            send(conn, &mut head.chain(&blob[..])).await
        } else {
            Box::pin(self.send_slowly(conn, &head, arrived, &blob)).await
        };
        let bytes = out.saturating_sub(before_body) as u64;
        self.metrics.served_from(self.name(), reply.tier, bytes);
        (bytes, sent)
    }

    /// Sends a head, and then a blob in pieces, as fast as its client may have it.
    async fn send_slowly(&self, conn: &mut Conn, mut head: &[u8], arrived: &Arrived<'_>, blob: &[u8]) -> (usize, Result<(), Cut>) {
        let (mut all, mut sent) = send(conn, &mut head).await;
        for mut piece in blob.chunks(PIECE) {
            if sent.is_err() {
                break;
            }
            if let Err(cut) = self.pace(arrived, piece.len(), async || conn.closed().await).await {
                sent = Err(cut);
                break;
            }
            let (out, result) = send(conn, &mut piece).await;
            (all, sent) = (all + out, result);
        }
        (all, sent)
    }

    /// As [`Self::send_memory`], for a blob that is read from disk piece by piece. The first piece is sent with the head at once, and does not
    /// wait for the others.
    async fn send_disk(
        &self,
        conn: &mut Conn,
        reply: &Reply,
        arrived: &Arrived<'_>,
        first: Bytes,
        mut rest: Reader,
    ) -> (u64, Result<(), Cut>) {
        let head = reply.head(&get_cached_date(), !arrived.head.close, 0);
        let (mut head, mut pieces, mut bytes, mut many) = (head.freeze(), [first, Bytes::new(), Bytes::new(), Bytes::new()], 0, 1);
        loop {
            let before_body = head.len();
            if let Err(cut) = self.pace(arrived, pieces.iter().map(Bytes::len).sum(), async || conn.closed().await).await {
                return (bytes, Err(cut));
            }
            let [first, second, third, fourth] = pieces;
            let (out, sent) = send(conn, &mut head.chain(first).chain(second).chain(third).chain(fourth)).await;
            let part = out.saturating_sub(before_body) as u64;
            self.metrics.served_from(self.name(), Some(Tier::Disk), part);
            bytes += part;
            if sent.is_err() {
                return (bytes, sent);
            }
            head = Bytes::new();
            many = if castier_cache::plenty() { (2 * many).min(TOGETHER) } else { 1 };
            pieces = match few(&mut rest, many).await {
                Ok(pieces) => pieces,
                Err(fault) => return (bytes, Err(self.cut(&fault))),
            };
            if pieces[0].is_empty() {
                return (bytes, Ok(()));
            }
        }
    }

    /// Answers a request that may not be served. Gives the connection back if it can serve another: clients that learn of a challenge ask again at once.
    pub(crate) async fn deny(&self, mut conn: Conn, mut ahead: BytesMut, head: &Head, refusal: Refusal) -> Option<(Conn, BytesMut)> {
        let Refusal { mut reply, why, client, closes, since } = refusal;
        let trace = head.introduction(&ahead, |fields| trace::of(fields));
        reply.headers.extend(trace.id_header().map(|id| (X_REQUEST_ID, id)));
        let is_last = closes || head.close || head.upgrade || head.framing != Framing::Length(0) || head.version != Version::HTTP_11;
        let record = |bytes: &[u8], sent: u64| {
            let record = refused(self.name(), reply.status.as_u16(), why, since, client.shown);
            let more = More { proto: Some(head.version), user_agent: head.user_agent(bytes), trace: Some(&trace), ..record.more };
            Record { method: head.method.as_str(), path: head.path(bytes), bytes: sent, more, ..record }.log(&self.metrics);
        };
        if is_last {
            let bytes = ahead.split_to(head.len);
            drop(ahead);
            self.write_refusal(conn, &reply).await;
            record(&bytes, 0);
            return None;
        }
        let body = if let (Body::Whole(body), true) = (&reply.body, head.method != Method::HEAD) { body.clone() } else { Bytes::new() };
        let mut out = reply.head(&get_cached_date(), true, body.len());
        out.extend_from_slice(&body);
        let (_, sent) = send(&mut conn, &mut &out[..]).await;
        record(&ahead, body.len() as u64);
        sent.ok()?;
        ahead.advance(head.len);
        Some((conn, ahead))
    }

    /// Refuses a request, with the reason, and closes the connection.
    pub(crate) async fn refuse_request(&self, conn: Conn, status: StatusCode, why: &str, client: Option<IpAddr>) {
        self.refuse(conn, &Reply::error(status, why), why, client).await;
    }

    /// Refuses a request that is over a limit, and closes the connection. The answer to a peer is proved, so that the peer takes it for what it
    /// is: this node works, and has too much to do. `asked` is `None` if the head was not read.
    pub(crate) async fn shed_request(&self, conn: Conn, limit: Limit, asked: Option<&Asked>, client: Option<IpAddr>) {
        self.metrics.shed(limit);
        let fault = Fault::Busy(limit);
        let mut reply = Reply::fault(&fault);
        if let Some(asked) = asked {
            reply.prove(asked);
        }
        self.refuse(conn, &reply, &fault.to_string(), client).await;
    }

    pub(crate) async fn refuse(&self, conn: Conn, reply: &Reply, why: &str, client: Option<IpAddr>) {
        let started = Instant::now();
        self.write_refusal(conn, reply).await;
        refused(self.name(), reply.status.as_u16(), why, started, client).log(&self.metrics);
    }

    async fn write_refusal(&self, mut conn: Conn, reply: &Reply) {
        let wait = if self.descriptors.may_linger(self.connections()) { REFUSAL } else { Duration::ZERO };
        let _ = timeout(wait, write_and_close(&mut conn, reply)).await;
    }
}

/// The record of a request that was refused before its path was known.
pub(crate) fn refused(listener: Listener, code: u16, why: &str, started: Instant, client: Option<IpAddr>) -> Record<'_> {
    let (took, served) = (started.elapsed(), Served::Error);
    let more = More { first_byte: Some(took), error: Some(why), ..More::default() };
    Record { listener, route: Route::Refused, method: "-", path: "-", code, bytes: 0, took, cache: "", served, client, more }
}

/// The next pieces, up to `many`. Empty at the end of the blob.
async fn few(reader: &mut Reader, many: usize) -> Result<[Bytes; TOGETHER], Fault> {
    let mut pieces = [const { Bytes::new() }; TOGETHER];
    for piece in &mut pieces[..many] {
        let Some(next) = reader.next().await? else { break };
        *piece = next;
    }
    Ok(pieces)
}

/// Writes all of `out`. Returns how many bytes were written, and the error if that is not all.
async fn send(conn: &mut Conn, out: &mut impl Buf) -> (usize, Result<(), Cut>) {
    let all = out.remaining();
    let written = async {
        conn.write_all_buf(out).await?;
        // TLS may have buffered the last bytes.
        conn.flush().await
    };
    let sent: std::io::Result<()> = written.await;
    (all - out.remaining(), sent.map_err(Cut::client))
}

/// Answers a connection over the limit with a 503, and closes it. Waits for up to `wait` for the client's request, and again until the client
/// has read the answer.
pub(crate) async fn refuse_connection(conn: &mut Conn, wait: Duration) {
    // The request is read first. If castier closed with unread bytes, the kernel would reset the connection, and the client might lose the
    // answer.
    let _ = timeout(wait, discard(conn)).await;
    let _ = timeout(wait, write_and_close(conn, &Reply::fault(&Fault::Busy(Limit::Connections)))).await;
}

/// Answers a connection without having read its request, and closes it.
pub(crate) async fn answer_and_close(mut conn: Conn, reply: &Reply) {
    let _ = timeout(REFUSAL, write_and_close(&mut conn, reply)).await;
}

/// Writes a reply on a connection that has no session, closes castier's side, and reads until the client has closed its side.
async fn write_and_close(conn: &mut Conn, reply: &Reply) {
    let body = if let Body::Whole(body) = &reply.body { &body[..] } else { &[] };
    let mut out = reply.head(&get_cached_date(), false, body.len());
    out.extend_from_slice(body);
    if conn.write_all(&out).await.is_err() || AsyncWriteExt::shutdown(conn).await.is_err() {
        return;
    }
    while discard(conn).await.is_ok_and(|n| n > 0) {}
}

/// Reads some bytes and discards them. Returns their number; 0 at the end. The buffer is on the stack: many connections may be refused at
/// once, and a buffer in each task would cost as much memory as serving them.
async fn discard(conn: &mut Conn) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut part = [MaybeUninit::uninit(); 16 << 10];
        let mut part = ReadBuf::uninit(&mut part);
        ready!(Pin::new(&mut *conn).poll_read(cx, &mut part))?;
        Poll::Ready(Ok(part.filled().len()))
    })
    .await
}
