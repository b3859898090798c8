//! A client's connection, as everything here reads and writes it: pingora's stream, a client that may take no byte for only so long,
//! and a fence that keeps a session's reader to its own request.

use crate::{
    reply::{Body, Reply},
    request_head::Framing,
};
use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use castier_cache::PIECE;
use castier_serverkit::stall_timeout::StallTimeout;
use castier_upstream::Chunks;
use http::{HeaderMap, StatusCode};
use pingora::http::ResponseHeader;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest, UniqueID, UniqueIDType,
    http::ServerSession, raw_connect::ProxyDigest,
};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

/// A client's connection.
#[derive(Debug)]
pub struct Conn {
    stream: Stream,
    /// `limits.write_timeout`: a client that takes no byte for so long is given up.
    stall: StallTimeout,
    fence: Option<Box<Fence>>,
}

/// Shows a reader one request and no more. Without it, bytes that pingora reads ahead could not be had back, and a pipelining client
/// would lose requests.
#[derive(Debug)]
struct Fence {
    /// Bytes read and not yet shown.
    ahead: BytesMut,
    left: Left,
    /// When to look next whether the client has left. Only for a client that has sent more than is read ahead: the end of its stream
    /// cannot be read before what lies in front of it.
    look: Option<Pin<Box<Sleep>>>,
}

/// What of the request is still to be shown.
#[derive(Debug)]
enum Left {
    /// So many bytes of its body.
    Bytes(u64),
    /// The chunks of its body, from here to the last.
    Chunks(Chunks),
    /// Nothing, until the answer says whether the protocol changes.
    Undecided,
    /// Whatever comes.
    All,
}

impl Left {
    /// How much of what is there belongs to it.
    fn of(&mut self, there: &mut [u8]) -> usize {
        match self {
            Self::Bytes(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(there.len());
                *left -= here as u64;
                here
            }
            Self::Chunks(chunks) => chunks.pass(there),
            Self::Undecided => 0,
            Self::All => there.len(),
        }
    }

    /// Whether all of the request has been shown.
    const fn is_over(&self) -> bool {
        match self {
            Self::Bytes(left) => *left == 0,
            Self::Chunks(chunks) => chunks.is_over(),
            Self::Undecided | Self::All => false,
        }
    }
}

impl Conn {
    /// How much a pipelining client may send ahead before it is no longer read. Little, as each waiting request may have as much behind it.
    pub const AHEAD: usize = 4 << 10;
    /// The most that one read of a body gives. pingora copies each read, and may queue several of these copies.
    pub const READ: usize = 16 << 10;
    /// How often it is looked whether a client has left that is no longer read.
    const LOOK: Duration = Duration::from_secs(1);

    /// Over an accepted connection.
    pub fn new(stream: Stream, patience: Duration) -> Self {
        Self { stream, stall: StallTimeout::new(patience), fence: None }
    }

    /// Over a connection that was accepted elsewhere.
    pub fn of_tcp(stream: TcpStream, patience: Duration) -> Self {
        Self::new(Box::new(pingora::protocols::l4::stream::Stream::from(stream)), patience)
    }

    /// The client's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.stream.get_socket_digest()?.peer_addr()?.as_inet().copied()
    }

    /// Changes how long the client may take no byte: limits can change while a connection lives.
    pub fn set_patience(&mut self, patience: Duration) {
        self.stall.set_limit(patience);
    }

    /// From now on shows `ahead`, and what comes, up to the end of one request body. `None`: the request asks for another protocol. Then
    /// all is shown if the answer agrees to that (101), and nothing if it does not: the bytes behind the request are then the next request.
    pub fn fence(&mut self, ahead: BytesMut, framing: Option<Framing>) {
        let left = match framing {
            Some(Framing::Length(length)) => Left::Bytes(length),
            Some(Framing::Chunked) => Left::Chunks(Chunks::default()),
            None => Left::Undecided,
        };
        self.fence = Some(Box::new(Fence { ahead, left, look: None }));
    }

    /// Takes the fence away. What was read and not shown belongs to the next request; none if there can be no other, since this one has not
    /// been read to its end.
    pub fn unfence(&mut self) -> Option<BytesMut> {
        self.fence.take().filter(|fence| fence.left.is_over()).map(|fence| fence.ahead)
    }

    /// As pingora's sessions take it; see [`Self::from_stream`].
    pub fn into_stream(self) -> Stream {
        Box::new(self)
    }

    /// Back from what [`Self::into_stream`] made.
    pub fn from_stream(stream: Stream) -> Option<Self> {
        stream.into_any().downcast().ok().map(|conn| *conn)
    }
}

impl Fence {
    /// Sees what is written. The head of the final answer decides whether the protocol changes; pingora writes each head at once.
    fn decide(&mut self, written: &[u8]) {
        if !matches!(self.left, Left::Undecided) {
            return;
        }
        match written.strip_prefix(b"HTTP/1.1 ") {
            Some([b'1', b'0', b'1', ..]) => self.left = Left::All,
            // Another interim answer.
            Some([b'1', ..]) => {}
            _ => self.left = Left::Bytes(0),
        }
    }

    /// Reads on; 0 at the end of the stream.
    fn poll_fill(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut part = [0; Conn::READ];
        let most = if self.left.is_over() { Conn::AHEAD } else { Conn::READ };
        let mut part = ReadBuf::new(&mut part[..most]);
        ready!(Pin::new(stream).poll_read(cx, &mut part))?;
        self.ahead.extend_from_slice(part.filled());
        Poll::Ready(Ok(part.filled().len()))
    }

    /// Waits until the client has left, without reading what it has sent.
    fn poll_left(&mut self, stream: &Stream, cx: &mut Context<'_>) -> Poll<()> {
        let look = self.look.get_or_insert_with(|| Box::pin(tokio::time::sleep(Conn::LOOK)));
        while look.as_mut().poll(cx).is_ready() {
            if has_left(stream) {
                return Poll::Ready(());
            }
            look.as_mut().reset(Instant::now() + Conn::LOOK);
        }
        Poll::Pending
    }
}

/// Whether the client has closed its end, or the connection is gone.
fn has_left(stream: &Stream) -> bool {
    /// As in `enum tcp_state` of Linux' `net/tcp_states.h`. Every state but the two in which the client may still send.
    const ESTABLISHED: u8 = 1;
    const FIN_WAIT_2: u8 = 5;
    let state = stream.get_socket_digest().and_then(|digest| digest.tcp_info()).map(|info| info.tcpi_state);
    state.is_some_and(|state| state != ESTABLISHED && state != FIN_WAIT_2)
}

impl AsyncRead for Conn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(fence) = &mut this.fence else { return Pin::new(&mut this.stream).poll_read(cx, buf) };
        if fence.ahead.is_empty()
            && let Left::Bytes(left) = &mut fence.left
            && *left > 0
        {
            // A body of known length needs no copy of its own.
            let most = usize::try_from(*left).unwrap_or(usize::MAX).min(Self::READ).min(buf.remaining());
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut part))?;
            let read = part.filled().len();
            *left -= read as u64;
            buf.advance(read);
            return Poll::Ready(Ok(()));
        }
        loop {
            let there = fence.ahead.len().min(buf.remaining());
            let show = fence.left.of(&mut fence.ahead[..there]);
            if show > 0 {
                buf.put_slice(&fence.ahead[..show]);
                fence.ahead.advance(show);
                return Poll::Ready(Ok(()));
            }
            // A read past the request waits for the client to leave; what else comes belongs to the next request.
            if fence.ahead.len() >= Self::AHEAD {
                return fence.poll_left(&this.stream, cx).map(Ok);
            }
            if ready!(fence.poll_fill(&mut this.stream, cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(fence) = &mut self.fence {
            fence.decide(buf);
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.stall.watch_write(written, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let (Some(fence), Some(first)) = (&mut self.fence, bufs.iter().find(|buf| !buf.is_empty())) {
            fence.decide(first);
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.stall.watch_write(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.stall.watch_write(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // TLS writes its last record here, and the other end may take nothing.
        let ended = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.stall.watch_write(ended, cx)
    }
}

#[async_trait]
impl Shutdown for Conn {
    async fn shutdown(&mut self) {
        // Not the stream's own, which waits without a limit. What it fails with no longer matters to anybody.
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl UniqueID for Conn {
    fn id(&self) -> UniqueIDType {
        self.stream.id()
    }
}

impl Ssl for Conn {}

impl GetTimingDigest for Conn {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.stream.get_timing_digest()
    }
}

impl GetProxyDigest for Conn {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.stream.get_proxy_digest()
    }
}

impl GetSocketDigest for Conn {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.stream.get_socket_digest()
    }
}

impl Peek for Conn {}

/// Writes a reply whose body is made up here, or empty, in pieces that a slow client takes one by one.
///
/// # Errors
/// The client is gone, or takes nothing any more.
pub async fn write(session: &mut ServerSession, reply: Reply) -> pingora::Result<()> {
    session.write_response_header(response_header(reply.status, &reply.headers)).await?;
    if let Body::Whole(bytes) = reply.body {
        for at in (0..bytes.len()).step_by(PIECE) {
            session.write_response_body(bytes.slice(at..bytes.len().min(at + PIECE)), false).await?;
        }
    }
    session.write_response_body(Bytes::new(), true).await
}

/// A reply's head in pingora's terms.
pub fn response_header(status: StatusCode, headers: &HeaderMap) -> Box<ResponseHeader> {
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.status = status;
    parts.headers = headers.clone();
    Box::new(parts.into())
}
