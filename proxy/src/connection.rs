//! A client's connection: pingora's stream, plus a write timeout, plus a fence that lets a session read one request and no more.

use crate::{
    http2::frames::{Alarm, Frames},
    request_head::Framing,
};
use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use castier_serverkit::stall_timeout::StallTimeout;
use castier_upstream::Chunks;
use http::{HeaderMap, StatusCode};
use pingora::http::ResponseHeader;
use pingora::protocols::{
    Digest, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest, UniqueID,
    UniqueIDType, raw_connect::ProxyDigest,
};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

/// A client's connection.
#[derive(Debug)]
pub struct Conn {
    stream: Stream,
    /// `limits.write_timeout`: if the client takes no byte for this long, the write fails.
    stall: StallTimeout,
    fence: Option<Box<Fence>>,
    /// Over HTTP/2.
    http2: Option<Box<Http2>>,
}

/// What a connection has for HTTP/2.
#[derive(Debug)]
struct Http2 {
    /// Counts what comes.
    frames: Frames,
    /// Bytes that the `h2` library has written and flushed, and that are not sent yet. It flushes behind each frame with a body, which would be a system
    /// call for each small answer.
    out: BytesMut,
    /// While this is set, writes wait. Who sets it polls the connection once more without it before it sleeps: the next read sends what waits.
    gathers: Arc<AtomicBool>,
    /// TLS may hold some of what was written.
    is_unflushed: bool,
}

impl Http2 {
    /// The most bytes that wait to be sent together.
    const TOGETHER: usize = 32 << 10;
}

/// Limits what a session reads to one request. Without it, pingora would read ahead into the next request of a pipelining client, and those
/// bytes would be lost.
#[derive(Debug)]
struct Fence {
    /// Bytes that were read from the client, and that the session has not got yet.
    ahead: BytesMut,
    remaining: Remaining,
    /// When to check next whether the client has closed. Needed only after a client has sent [`Conn::AHEAD`] bytes of later requests: they
    /// stay unread in the socket, and the end of the stream comes after them.
    next_check: Option<Pin<Box<Sleep>>>,
}

/// The part of the request that the session has not got yet.
#[derive(Debug)]
enum Remaining {
    /// This many bytes of its body.
    Bytes(u64),
    /// The chunks of its body, from here to the last.
    Chunks(Chunks),
    /// Nothing, until the status of the answer tells whether the protocol changes.
    Undecided,
    /// Every byte that the client sends: the protocol has changed.
    All,
}

impl Remaining {
    /// How many of these bytes belong to the request. Counts them as read.
    fn take(&mut self, bytes: &mut [u8]) -> usize {
        match self {
            Self::Bytes(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                taken
            }
            Self::Chunks(chunks) => chunks.pass(bytes),
            Self::Undecided => 0,
            Self::All => bytes.len(),
        }
    }

    /// Whether the session has got the whole request.
    const fn is_over(&self) -> bool {
        match self {
            Self::Bytes(left) => *left == 0,
            Self::Chunks(chunks) => chunks.is_over(),
            Self::Undecided | Self::All => false,
        }
    }
}

impl Conn {
    /// The most bytes of later requests that are read ahead. Small, since each waiting request may hold this much.
    pub const AHEAD: usize = 4 << 10;
    /// The most that one read of a body gives. pingora copies each read, and may queue several of these copies.
    pub const READ: usize = 16 << 10;
    /// How often to check whether a client that is no longer read has closed.
    const CHECK_INTERVAL: Duration = Duration::from_secs(1);

    /// Wraps an accepted connection.
    pub fn new(stream: Stream, write_timeout: Duration) -> Self {
        Self { stream, stall: StallTimeout::new(write_timeout), fence: None, http2: None }
    }

    /// A connection that tokio accepted, not pingora.
    pub fn socket(stream: TcpStream) -> Stream {
        Box::new(pingora::protocols::l4::stream::Stream::from(stream))
    }

    /// The client's address.
    pub fn client_address(&self) -> Option<SocketAddr> {
        self.stream.get_socket_digest()?.peer_addr()?.as_inet().copied()
    }

    /// What pingora's sessions need to know of a connection that they do not hold.
    pub fn digest(&self) -> Digest {
        Digest { socket_digest: self.stream.get_socket_digest(), ..Digest::default() }
    }

    /// Changes the write timeout: limits can change while a connection is open.
    pub fn set_write_timeout(&mut self, timeout: Duration) {
        self.stall.set_limit(timeout);
    }

    /// Sets the fence: reads give `ahead` first, then bytes from the client, up to the end of one request body.
    ///
    /// `framing` is `None` if the request asks for another protocol. Then the status of the answer decides. After a 101, reads give all
    /// bytes. After any other status they give none: the bytes after the request head are the next request.
    pub fn fence(&mut self, ahead: BytesMut, framing: Option<Framing>) {
        let remaining = match framing {
            Some(Framing::Length(length)) => Remaining::Bytes(length),
            Some(Framing::Chunked) => Remaining::Chunks(Chunks::default()),
            None => Remaining::Undecided,
        };
        self.fence = Some(Box::new(Fence { ahead, remaining, next_check: None }));
    }

    /// Removes the fence. Returns the bytes that belong to the next request. Returns `None` if the request has not been read to its end: then
    /// the connection cannot serve another one.
    pub fn unfence(&mut self) -> Option<BytesMut> {
        self.fence.take().filter(|fence| fence.remaining.is_over()).map(|fence| fence.ahead)
    }

    /// The connection speaks HTTP/2 from now on. Reads give `ahead` first, and all bytes that come are counted as `frames`, until they are too many.
    /// While what is returned with the alarm is set, small writes wait for each other: see [`Http2::gathers`].
    pub fn count_frames(&mut self, ahead: BytesMut, frames: Frames) -> (Arc<Alarm>, Arc<AtomicBool>) {
        let (alarm, gathers) = (frames.alarm().clone(), Arc::new(AtomicBool::new(false)));
        self.fence = Some(Box::new(Fence { ahead, remaining: Remaining::All, next_check: None }));
        self.http2 = Some(Box::new(Http2 { frames, out: BytesMut::new(), gathers: gathers.clone(), is_unflushed: false }));
        (alarm, gathers)
    }

    /// Ends when the client has closed, which is looked for every second. Reads nothing.
    pub async fn closed(&self) {
        while !has_closed(&self.stream) {
            sleep(Self::CHECK_INTERVAL).await;
        }
    }

    /// For a pingora session. [`Self::from_stream`] is the way back.
    pub fn into_stream(self) -> Stream {
        Box::new(self)
    }

    /// The connection out of a stream that [`Self::into_stream`] made.
    pub fn from_stream(stream: Stream) -> Option<Self> {
        stream.into_any().downcast().ok().map(|conn| *conn)
    }
}

impl Conn {
    fn watch_write(&mut self, written: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let (Some(http2), Poll::Ready(Ok(bytes))) = (&mut self.http2, &written) {
            http2.frames.wrote(*bytes);
        }
        self.stall.watch_write(written, cx)
    }

    fn gathers(&self) -> bool {
        self.http2.as_ref().is_some_and(|http2| http2.gathers.load(Relaxed))
    }

    /// Over HTTP/2: takes a small write into what is sent together. False if the write is to be made at once: then nothing waits before it.
    fn poll_gather(&mut self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<bool>> {
        let Some(http2) = &mut self.http2 else { return Poll::Ready(Ok(false)) };
        let length: usize = bufs.iter().map(|buf| buf.len()).sum();
        if http2.out.len() + length > Http2::TOGETHER {
            ready!(self.poll_send(cx))?;
            if length > Http2::TOGETHER {
                return Poll::Ready(Ok(false));
            }
        }
        if let Some(http2) = &mut self.http2 {
            bufs.iter().for_each(|buf| http2.out.extend_from_slice(buf));
        }
        Poll::Ready(Ok(true))
    }

    /// Over HTTP/2: sends what waits to be sent together.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(http2) = self.http2.as_mut().filter(|http2| !http2.out.is_empty()) {
            let written = Pin::new(&mut self.stream).poll_write(cx, &http2.out);
            http2.is_unflushed = true;
            let bytes = ready!(self.watch_write(written, cx))?;
            if bytes == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if let Some(http2) = &mut self.http2 {
                http2.out.advance(bytes);
            }
        }
        if self.http2.as_ref().is_some_and(|http2| http2.is_unflushed) {
            let flushed = Pin::new(&mut self.stream).poll_flush(cx);
            ready!(self.stall.watch_write(flushed, cx))?;
            if let Some(http2) = &mut self.http2 {
                // An idle connection has no buffer.
                (http2.out, http2.is_unflushed) = (BytesMut::new(), false);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Fence {
    /// Learns from the bytes of an answer whether the protocol changes. Relies on pingora, which writes each head in one call.
    fn decide(&mut self, written: &[u8]) {
        if !matches!(self.remaining, Remaining::Undecided) {
            return;
        }
        match written.strip_prefix(b"HTTP/1.1 ") {
            Some([b'1', b'0', b'1', ..]) => self.remaining = Remaining::All,
            // An interim answer decides nothing.
            Some([b'1', ..]) => {}
            _ => self.remaining = Remaining::Bytes(0),
        }
    }

    /// Reads into `ahead`. Returns the number of bytes; 0 at the end of the stream.
    fn poll_fill(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut part = [0; Conn::READ];
        let most = if self.remaining.is_over() { Conn::AHEAD } else { Conn::READ };
        let mut part = ReadBuf::new(&mut part[..most]);
        ready!(Pin::new(stream).poll_read(cx, &mut part))?;
        self.ahead.extend_from_slice(part.filled());
        Poll::Ready(Ok(part.filled().len()))
    }

    /// Waits until the client has closed, without reading the bytes that it has sent.
    fn poll_closed(&mut self, stream: &Stream, cx: &mut Context<'_>) -> Poll<()> {
        let next_check = self.next_check.get_or_insert_with(|| Box::pin(tokio::time::sleep(Conn::CHECK_INTERVAL)));
        while next_check.as_mut().poll(cx).is_ready() {
            if has_closed(stream) {
                return Poll::Ready(());
            }
            next_check.as_mut().reset(Instant::now() + Conn::CHECK_INTERVAL);
        }
        Poll::Pending
    }
}

/// Whether the client has closed its end, or the connection has broken.
fn has_closed(stream: &Stream) -> bool {
    /// The two states in which the client can still send. From `enum tcp_state` in Linux' `net/tcp_states.h`.
    const ESTABLISHED: u8 = 1;
    const FIN_WAIT_2: u8 = 5;
    let state = stream.get_socket_digest().and_then(|digest| digest.tcp_info()).map(|info| info.tcpi_state);
    state.is_some_and(|state| state != ESTABLISHED && state != FIN_WAIT_2)
}

impl AsyncRead for Conn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.gathers() {
            // If the socket does not take it now, it is sent later. Reading goes on.
            let _ = this.poll_send(cx)?;
        }
        if let Some(Http2 { frames, .. }) = this.http2.as_deref_mut() {
            if frames.found().is_some() {
                // The task that waits for the alarm closes the connection.
                return Poll::Pending;
            }
            let before = buf.filled().len();
            match &mut this.fence {
                Some(fence) if !fence.ahead.is_empty() => {
                    let taken = fence.ahead.len().min(buf.remaining());
                    buf.put_slice(&fence.ahead.split_to(taken));
                }
                _ => ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?,
            }
            frames.read(&buf.filled()[before..]);
            return Poll::Ready(Ok(()));
        }
        let Some(fence) = &mut this.fence else { return Pin::new(&mut this.stream).poll_read(cx, buf) };
        if fence.ahead.is_empty()
            && let Remaining::Bytes(left) = &mut fence.remaining
            && *left > 0
        {
            // A body of known length is read into `buf` directly. That saves a copy.
            let most = usize::try_from(*left).unwrap_or(usize::MAX).min(Self::READ).min(buf.remaining());
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut part))?;
            let read = part.filled().len();
            *left -= read as u64;
            buf.advance(read);
            return Poll::Ready(Ok(()));
        }
        loop {
            let available = fence.ahead.len().min(buf.remaining());
            let taken = fence.remaining.take(&mut fence.ahead[..available]);
            if taken > 0 {
                buf.put_slice(&fence.ahead[..taken]);
                fence.ahead.advance(taken);
                return Poll::Ready(Ok(()));
            }
            // A read after the end of the request ends only when the client closes. Other bytes belong to the next request.
            if fence.ahead.len() >= Self::AHEAD {
                return fence.poll_closed(&this.stream, cx).map(Ok);
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
        if ready!(self.poll_gather(cx, &[io::IoSlice::new(buf)]))? {
            return Poll::Ready(Ok(buf.len()));
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch_write(written, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let (Some(fence), Some(first)) = (&mut self.fence, bufs.iter().find(|buf| !buf.is_empty())) {
            fence.decide(first);
        }
        if ready!(self.poll_gather(cx, bufs))? {
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch_write(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.gathers() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_send(cx))?;
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.stall.watch_write(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        // Under a timeout: TLS writes its last record here, and the client may not read it.
        let ended = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.stall.watch_write(ended, cx)
    }
}

#[async_trait]
impl Shutdown for Conn {
    async fn shutdown(&mut self) {
        // Not the stream's own `shutdown`, which has no timeout. The connection ends in any case, so an error changes nothing.
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

/// The head of a reply as pingora's type.
pub fn response_header(status: StatusCode, headers: &HeaderMap) -> Box<ResponseHeader> {
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.status = status;
    parts.headers = headers.clone();
    Box::new(parts.into())
}
