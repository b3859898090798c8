//! What is written straight onto the connection, without a session: the fast lane, and refusals.

use super::{Cut, Front, PIECE, cache_status};
use crate::{
    fault::{Fault, Limit},
    gate::Head,
    metrics::{Route, Served},
    record::Record,
    serve::{Body, Reply, Via},
};
use bytes::{BufMut, BytesMut};
use castier_blob::{Digest, Selection};
use castier_config::Limits;
use http::{Method, StatusCode};
use pingora::protocols::{Stream, http::date::get_cached_date};
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
        stream: &mut Stream,
        ahead: &mut BytesMut,
        head: &Head,
        digest: &Digest,
        limits: &Limits,
        peer: Option<SocketAddr>,
    ) -> Result<bool, Cut> {
        let started = Instant::now();
        let Some(bytes) = self.ladder.get_from_memory(digest) else { return Ok(false) };
        let request = ahead.split_to(head.len);
        let reply = Reply::blob(digest, Some(bytes.len() as u64), Selection::Whole, Via::Memory, Body::Empty);
        let mut out = head_on_wire(&reply, true);
        let write = limits.write_timeout.get();
        let written = async {
            if bytes.len() <= ONE_WRITE {
                out.extend_from_slice(&bytes);
                return timeout(write, stream.write_all(&out)).await;
            }
            let first = PIECE.min(bytes.len());
            let mut both = bytes::Buf::chain(&out[..], &bytes[..first]);
            if let Err(error) = timeout(write, stream.write_all_buf(&mut both)).await? {
                return Ok(Err(error));
            }
            for piece in bytes[first..].chunks(PIECE) {
                if let Err(error) = timeout(write, stream.write_all(piece)).await? {
                    return Ok(Err(error));
                }
            }
            Ok(stream.flush().await)
        };
        let cut = !matches!(written.await, Ok(Ok(())));
        self.metrics.memory_bytes.inc_by(bytes.len() as u64);
        let served = if cut { Served::Error } else { Served::Hit };
        let cache = cache_status(&reply.headers);
        Record {
            route: Route::Blob,
            method: &Method::GET,
            path: head.path(&request),
            code: 200,
            bytes: bytes.len() as u64,
            took: started.elapsed(),
            cache,
            served,
            peer,
        }
        .log(&self.metrics);
        if cut { Err(Cut) } else { Ok(true) }
    }

    /// A request that could not be read: says why, and closes.
    pub(super) async fn refuse_request(&self, mut stream: Stream, status: StatusCode, why: &str, peer: Option<SocketAddr>) {
        let started = Instant::now();
        let _ = timeout(REFUSAL, write_and_close(&mut stream, &Reply::error(status, why))).await;
        Record {
            route: Route::Refused,
            method: &Method::GET,
            path: "-",
            code: status.as_u16(),
            bytes: 0,
            took: started.elapsed(),
            cache: "",
            served: Served::Error,
            peer,
        }
        .log(&self.metrics);
    }
}

/// A connection over the limit: says so, and closes.
pub(super) async fn refuse_connection(stream: &mut Stream) {
    let refuse = async {
        // The request is read first: closing over unread bytes would reset the connection and take the answer along.
        let _ = stream.read(&mut [0; 4096]).await;
        write_and_close(stream, &Reply::fault(&Fault::Busy(Limit::Connections))).await;
    };
    let _ = timeout(REFUSAL, refuse).await;
}

/// Writes a reply on a connection that has no session, closes our side, and reads on until the client has closed its own.
async fn write_and_close(stream: &mut Stream, reply: &Reply) {
    let mut out = head_on_wire(reply, false);
    if let Body::Whole(body) = &reply.body {
        out.extend_from_slice(body);
    }
    if stream.write_all(&out).await.is_err() || AsyncWriteExt::shutdown(stream).await.is_err() {
        return;
    }
    let mut rest = [0; 16 << 10];
    while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {}
}

/// The head as it goes over the wire, without a session.
fn head_on_wire(reply: &Reply, keep_alive: bool) -> BytesMut {
    let mut out = BytesMut::with_capacity(1024 + ONE_WRITE.min(4096));
    out.put_slice(b"HTTP/1.1 ");
    out.put_slice(reply.status.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(reply.status.canonical_reason().unwrap_or_default().as_bytes());
    out.put_slice(b"\r\nDate: ");
    out.put_slice(get_cached_date().as_bytes());
    out.put_slice(if keep_alive { b"\r\n" } else { b"\r\nConnection: close\r\n" });
    for (name, value) in &reply.headers {
        out.put_slice(name.as_str().as_bytes());
        out.put_slice(b": ");
        out.put_slice(value.as_bytes());
        out.put_slice(b"\r\n");
    }
    out.put_slice(b"\r\n");
    out
}
