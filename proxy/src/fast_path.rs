//! What is written straight onto the connection, without a session: the fast path, and refusals.

use crate::{
    access_log::{self, More, Record},
    connection::Conn,
    listener::Front,
    metrics::{Listener, Route, Served},
    reply::{Body, Reply, cache_status},
    session::{Arrived, Cut},
};
use bytes::{Buf, Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Hit, Limit, Part, Reader, Tier};
use castier_upstream::trace;
use castier_wire::Selection;
use http::{StatusCode, Version};
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
/// Bodies up to this size are copied behind their head, to leave in one write.
const ONE_WRITE: usize = 16 << 10;
/// How many pieces from disk leave in one write: each write wakes the client, and so many still fit into the processor's cache.
const TOGETHER: usize = 4;

impl Front {
    /// A blob that memory or the disk has, to a client that asks for nothing but the blob, or has it already. False if that is not so: then nothing has
    /// been sent, and the session answers.
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
            let sent = self.send_memory(conn, &reply, !head.close, blob).await;
            (reply, ready, sent)
        } else {
            // Boxed, so that idle connections keep no room for what only a hit of the disk needs.
            match Box::pin(self.disk_hit(conn, digest, arrived, started)).await {
                Some(answered) => answered,
                None => return Ok(false),
            }
        };
        let done = self.record(&reply, ahead, digest, arrived, sent, (started, ready));
        ahead.advance(head.len);
        done.map(|()| true)
    }

    fn peek(&self, digest: &Digest) -> Option<Hit> {
        self.handlers.cache().peek(digest, self.handlers.asker(), |_| Part::Whole)
    }

    /// A blob that the disk has; none if not even its beginning can be had. The session then says why.
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
        let sent = self.send_disk(conn, &reply, !arrived.head.close, first.unwrap_or_default(), rest).await;
        Some((reply, ready, sent))
    }

    /// Counts and logs a request that was answered here.
    fn record(
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
            proto: Some(Version::HTTP_11),
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
            client: arrived.client,
            more,
        };
        record.log(&self.metrics);
        sent
    }

    /// Sends a head and a blob that memory holds; how much of the blob went out, and what kept it from being all.
    async fn send_memory(&self, conn: &mut Conn, reply: &Reply, keep_alive: bool, blob: Bytes) -> (u64, Result<(), Cut>) {
        let one_write = blob.len() <= ONE_WRITE;
        let mut head = reply.head(&get_cached_date(), keep_alive, if one_write { blob.len() } else { 0 });
        let before_body = head.len();
        let (out, sent) = if one_write {
            head.extend_from_slice(&blob);
            send(conn, &mut &head[..]).await
        } else {
            send(conn, &mut head.chain(&blob[..])).await
        };
        let bytes = out.saturating_sub(before_body) as u64;
        self.metrics.served_from(self.name(), reply.tier, bytes);
        (bytes, sent)
    }

    /// As [`Self::send_memory`], of a blob that is read as it leaves. Its first piece leaves with the head, and does not wait for others.
    async fn send_disk(&self, conn: &mut Conn, reply: &Reply, keep_alive: bool, first: Bytes, mut rest: Reader) -> (u64, Result<(), Cut>) {
        let head = reply.head(&get_cached_date(), keep_alive, 0);
        let (mut head, mut pieces, mut bytes, mut many) = (head.freeze(), [first, Bytes::new(), Bytes::new(), Bytes::new()], 0, 1);
        loop {
            let before_body = head.len();
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

    /// A request that could not be read: says why, and closes.
    pub(crate) async fn refuse_request(&self, conn: Conn, status: StatusCode, why: &str, client: Option<IpAddr>) {
        self.refuse(conn, Reply::error(status, why), client).await;
    }

    /// A request over a limit: says so, and closes.
    pub(crate) async fn shed_request(&self, conn: Conn, limit: Limit, client: Option<IpAddr>) {
        self.metrics.shed(limit);
        self.refuse(conn, Reply::fault(&Fault::Busy(limit)), client).await;
    }

    async fn refuse(&self, mut conn: Conn, reply: Reply, client: Option<IpAddr>) {
        let started = Instant::now();
        let within = if self.descriptors.may_linger(self.connections()) { REFUSAL } else { Duration::ZERO };
        let _ = timeout(within, write_and_close(&mut conn, &reply)).await;
        refused(self.name(), reply.status.as_u16(), started, client).log(&self.metrics);
    }
}

/// The record of a request that could not be read.
pub(crate) fn refused(listener: Listener, code: u16, started: Instant, client: Option<IpAddr>) -> Record<'static> {
    let (took, served) = (started.elapsed(), Served::Error);
    let more = More { first_byte: Some(took), error: Some("the request head was refused"), ..More::default() };
    Record { listener, route: Route::Refused, method: "-", path: "-", code, bytes: 0, took, cache: "", served, client, more }
}

/// Up to `many` pieces; none at the end.
async fn few(reader: &mut Reader, many: usize) -> Result<[Bytes; TOGETHER], Fault> {
    let mut pieces = [const { Bytes::new() }; TOGETHER];
    for piece in &mut pieces[..many] {
        let Some(next) = reader.next().await? else { break };
        *piece = next;
    }
    Ok(pieces)
}

/// Writes all there is; says how much went out, and what kept it from being all.
async fn send(conn: &mut Conn, out: &mut impl Buf) -> (usize, Result<(), Cut>) {
    let all = out.remaining();
    let written = async {
        conn.write_all_buf(out).await?;
        // Over TLS the last bytes may still be here.
        conn.flush().await
    };
    let sent: std::io::Result<()> = written.await;
    (all - out.remaining(), sent.map_err(Cut::client))
}

/// A connection over the limit: says so, and closes. The client has the time `within` to send its request and to read the answer.
pub(crate) async fn refuse_connection(conn: &mut Conn, within: Duration) {
    // The request is read first: closing over unread bytes would reset the connection and may take the answer along.
    let _ = timeout(within, discard(conn)).await;
    let _ = timeout(within, write_and_close(conn, &Reply::fault(&Fault::Busy(Limit::Connections)))).await;
}

/// Writes a reply on a connection that has no session, closes our side, and reads on until the client has closed its own.
async fn write_and_close(conn: &mut Conn, reply: &Reply) {
    let body = if let Body::Whole(body) = &reply.body { &body[..] } else { &[] };
    let mut out = reply.head(&get_cached_date(), false, body.len());
    out.extend_from_slice(body);
    if conn.write_all(&out).await.is_err() || AsyncWriteExt::shutdown(conn).await.is_err() {
        return;
    }
    while discard(conn).await.is_ok_and(|n| n > 0) {}
}

/// Reads something and forgets it; 0 at the end. What it reads into is on the stack: many connections may be refused at once, and a buffer
/// in each of these tasks would be as large as what they were refused for.
async fn discard(conn: &mut Conn) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut part = [MaybeUninit::uninit(); 16 << 10];
        let mut part = ReadBuf::uninit(&mut part);
        ready!(Pin::new(&mut *conn).poll_read(cx, &mut part))?;
        Poll::Ready(Ok(part.filled().len()))
    })
    .await
}
