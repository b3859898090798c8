//! What is written straight onto the connection, without a session: the fast lane, and refusals.

use super::{Cut, Front, cache_status};
use crate::{
    conn::Conn,
    fault::{Fault, Limit},
    gate::Head,
    metrics::{Route, Served},
    record::Record,
    serve::{Body, Reply, Via},
};
use bytes::{Buf, BytesMut};
use castier_blob::{Digest, Selection};
use http::StatusCode;
use pingora::protocols::http::date::get_cached_date;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

/// A refused client has this long to send its request and read the answer.
const REFUSAL: Duration = Duration::from_secs(2);
/// Bodies up to this size are copied behind their head, to leave in one write.
const ONE_WRITE: usize = 16 << 10;

impl Front {
    /// The fast lane: a blob that memory has, to a client that asks for nothing but the blob. False if memory has it not.
    pub(super) async fn fast_hit(
        &self,
        conn: &mut Conn,
        ahead: &mut BytesMut,
        head: &Head,
        digest: &Digest,
        peer: Option<SocketAddr>,
    ) -> Result<bool, Cut> {
        let started = Instant::now();
        let Some((blob, tier)) = self.ladder.get_from_memory(digest, self.door.asker()) else { return Ok(false) };
        let reply = Reply::blob(digest, Some(blob.len() as u64), Selection::Whole, Via::Tier(tier), Body::Empty);
        let one_write = blob.len() <= ONE_WRITE;
        let mut out = reply.head(&get_cached_date(), true, if one_write { blob.len() } else { 0 });
        let before_body = out.len();
        let (sent, whole) = if one_write {
            out.extend_from_slice(&blob);
            send(conn, &mut &out[..]).await
        } else {
            send(conn, &mut out.chain(&blob[..])).await
        };
        let bytes = sent.saturating_sub(before_body) as u64;
        self.metrics.served_from(tier, bytes);
        let served = if whole { Served::Hit } else { Served::Error };
        let (path, cache, took) = (head.path(ahead), cache_status(&reply.headers), started.elapsed());
        let listener = self.door.listener();
        Record { listener, route: Route::Blob, method: "GET", path, code: 200, bytes, took, cache, served, peer }.log(&self.metrics);
        ahead.advance(head.len);
        if whole { Ok(true) } else { Err(Cut) }
    }

    /// A request that could not be read: says why, and closes.
    pub(super) async fn refuse_request(&self, mut conn: Conn, status: StatusCode, why: &str, peer: Option<SocketAddr>) {
        let started = Instant::now();
        let _ = timeout(REFUSAL, write_and_close(&mut conn, &Reply::error(status, why))).await;
        let (listener, code, took, served) = (self.door.listener(), status.as_u16(), started.elapsed(), Served::Error);
        Record { listener, route: Route::Refused, method: "-", path: "-", code, bytes: 0, took, cache: "", served, peer }
            .log(&self.metrics);
    }
}

/// Writes all there is; says how much went out, and whether that was all.
async fn send(conn: &mut Conn, out: &mut impl Buf) -> (usize, bool) {
    let all = out.remaining();
    let written = async {
        conn.write_all_buf(out).await?;
        // Over TLS the last bytes may still be here.
        conn.flush().await
    };
    let whole = written.await.is_ok();
    (all - out.remaining(), whole)
}

/// A connection over the limit: says so, and closes.
pub(super) async fn refuse_connection(conn: &mut Conn) {
    let refuse = async {
        // The request is read first: closing over unread bytes would reset the connection and take the answer along.
        let _ = conn.read(&mut [0; 4096]).await;
        write_and_close(conn, &Reply::fault(&Fault::Busy(Limit::Connections))).await;
    };
    let _ = timeout(REFUSAL, refuse).await;
}

/// Writes a reply on a connection that has no session, closes our side, and reads on until the client has closed its own.
async fn write_and_close(conn: &mut Conn, reply: &Reply) {
    let body = if let Body::Whole(body) = &reply.body { &body[..] } else { &[] };
    let mut out = reply.head(&get_cached_date(), false, body.len());
    out.extend_from_slice(body);
    if conn.write_all(&out).await.is_err() || AsyncWriteExt::shutdown(conn).await.is_err() {
        return;
    }
    let mut rest = [0; 16 << 10];
    while conn.read(&mut rest).await.is_ok_and(|n| n > 0) {}
}
