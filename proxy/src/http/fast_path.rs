//! What is written straight onto the connection, without a session: the fast path, and refusals.

use super::{Cut, Front, cache_status, peer::prove};
use crate::{
    access_log::{self, More, Record},
    connection::Conn,
    metrics::{Listener, Route, Served},
    reply::{Body, Reply},
    request_head::Head,
    secret::Asked,
    trace,
};
use bytes::{Buf, Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Fault, Hit, Limit, Part, Reader, Tier};
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
pub(super) const REFUSAL: Duration = Duration::from_secs(2);
/// Bodies up to this size are copied behind their head, to leave in one write.
const ONE_WRITE: usize = 16 << 10;
/// How many pieces from disk leave in one write: each write wakes the client, and so many still fit into the processor's cache.
const TOGETHER: usize = 4;

impl Front {
    /// The fast path: a blob that memory or the disk has, to a client that asks for nothing but the blob, or has it already. False if that
    /// is not so.
    pub(super) async fn fast_hit(
        &self,
        conn: &mut Conn,
        ahead: &mut BytesMut,
        head: &Head,
        digest: &Digest,
        asked: &Asked,
        client: Option<IpAddr>,
    ) -> Result<bool, Cut> {
        let started = Instant::now();
        if let Some(validator) = head.validator(ahead) {
            if validator != digest.etag().as_bytes() {
                return Ok(false);
            }
            let mut reply = Reply::not_modified(digest);
            prove(&mut reply, asked);
            let ready = started.elapsed();
            let (_, sent) = send(conn, &mut reply.head(&get_cached_date(), !head.close, 0)).await;
            let done = self.fast_hit_done(&reply, head, ahead, digest, (0, sent), (started, ready), client);
            ahead.advance(head.len);
            return done;
        }
        // Boxed, so that idle connections keep no room for what only a hit of the disk needs.
        let Some(Hit { size, via, reader: Reader::Memory(blob) }) = self.node.cache.peek(digest, self.door.asker(), |_| Part::Whole) else {
            return Box::pin(self.fast_disk_hit(conn, ahead, head, digest, asked, client)).await;
        };
        let mut reply = Reply::blob(digest, size, Selection::Whole, via, Body::Empty);
        prove(&mut reply, asked);
        let ready = started.elapsed();
        let sent = self.send_memory(conn, &reply, !head.close, blob).await;
        let done = self.fast_hit_done(&reply, head, ahead, digest, sent, (started, ready), client);
        ahead.advance(head.len);
        done
    }

    /// The fast path's second half: a blob that the disk has.
    async fn fast_disk_hit(
        &self,
        conn: &mut Conn,
        ahead: &mut BytesMut,
        head: &Head,
        digest: &Digest,
        asked: &Asked,
        client: Option<IpAddr>,
    ) -> Result<bool, Cut> {
        let started = Instant::now();
        let Some(Hit { size, via, reader: mut rest }) = self.node.cache.peek_disk(digest, self.door.asker()).await else {
            return Ok(false);
        };
        // Nothing has been said yet: where not even a beginning can be had, the session says why.
        let Ok(first) = rest.next().await else { return Ok(false) };
        let mut reply = Reply::blob(digest, size, Selection::Whole, via, Body::Empty);
        prove(&mut reply, asked);
        let ready = started.elapsed();
        let sent = self.send_disk(conn, &reply, !head.close, first.unwrap_or_default(), rest).await;
        let done = self.fast_hit_done(&reply, head, ahead, digest, sent, (started, ready), client);
        ahead.advance(head.len);
        done
    }

    #[expect(clippy::too_many_arguments, reason = "each is a part of the one record")]
    fn fast_hit_done(
        &self,
        reply: &Reply,
        head: &Head,
        ahead: &[u8],
        digest: &Digest,
        (bytes, sent): (u64, Result<(), Cut>),
        (started, ready): (Instant, Duration),
        client: Option<IpAddr>,
    ) -> Result<bool, Cut> {
        let served = if sent.is_ok() { reply.served } else { Served::Error };
        let error = sent.as_ref().err().map(|cut| &*cut.why);
        let (cache, took, code) = (cache_status(&reply.headers), started.elapsed(), reply.status.as_u16());
        let (listener, path) = (self.door.listener(), head.path(ahead));
        let trace = access_log::is_wanted().then(|| head.introduction(ahead, |fields| trace::of(fields)));
        let more = More {
            first_byte: Some(ready),
            proto: Some(Version::HTTP_11),
            user_agent: head.user_agent(ahead),
            error,
            digest: Some(*digest),
            trace: trace.as_ref(),
        };
        Record { listener, route: Route::Blob, method: "GET", path, code, bytes, took, cache, served, client, more }.log(&self.metrics);
        sent.map(|()| true)
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
        self.metrics.served_from(self.door.listener(), reply.tier, bytes);
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
            self.metrics.served_from(self.door.listener(), Some(Tier::Disk), part);
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
    pub(super) async fn refuse_request(&self, conn: Conn, status: StatusCode, why: &str, client: Option<IpAddr>) {
        self.refuse(conn, Reply::error(status, why), client).await;
    }

    /// A request over a limit: says so, and closes.
    pub(super) async fn shed_request(&self, conn: Conn, limit: Limit, client: Option<IpAddr>) {
        self.metrics.shed(limit);
        self.refuse(conn, Reply::fault(&Fault::Busy(limit)), client).await;
    }

    async fn refuse(&self, mut conn: Conn, reply: Reply, client: Option<IpAddr>) {
        let started = Instant::now();
        let within = if self.descriptors.may_linger(self.connections()) { REFUSAL } else { Duration::ZERO };
        let _ = timeout(within, write_and_close(&mut conn, &reply)).await;
        refused(self.door.listener(), reply.status.as_u16(), started, client).log(&self.metrics);
    }
}

/// The record of a request that could not be read.
pub(super) fn refused(listener: Listener, code: u16, started: Instant, client: Option<IpAddr>) -> Record<'static> {
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
pub(super) async fn refuse_connection(conn: &mut Conn, within: Duration) {
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
