//! A connection to a source, lent to pingora's proxy for one request and its answer.
//!
//! pingora's proxy sees it as a virtual socket. So a relay has the same properties as a fetch of a blob:
//!
//! - the pool and the addresses of the source, the last good one first;
//! - a timeout for the final answer, which interim answers do not extend;
//! - a strict reader in front of pingora's. It finds the end of the answer and gives pingora no byte after it. It makes malformed chunks invalid
//!   ([`crate::chunks`]). It rejects a change of protocol that the request did not ask for;
//! - the answer of a source that stops reading early. A failed write is hidden from pingora until the answer has been read.
//!
//! How the connection gets back into the pool:
//!
//! 1. pingora reads the last byte of the answer, and has sent all of the request.
//! 2. If neither side closes the connection, pingora puts it into its own pool. Before that, pingora reads from it, to check that it is idle.
//! 3. [`Lent`] recognises this read, since it comes after the end of the answer. It moves the connection into the pool of its [`Upstream`] and
//!    reports the end of the stream to pingora, which drops the empty [`Lent`].
//!
//! If the connection cannot be reused, pingora shuts it down or drops it, and no such read comes.

use crate::{
    chunks::Chunks,
    http::{Handed, Upstream},
};
use bytes::{Buf, BytesMut};
use castier_cache::Fault;
use pingora::{
    protocols::{
        Stream,
        l4::{
            stream::Stream as L4Stream,
            virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream},
        },
    },
    upstreams::peer::HttpPeer,
};
use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// The longest head of an answer.
const MAX_HEAD: usize = 64 << 10;
/// The most header fields in it. pingora has the same limit.
const MAX_HEADERS: usize = 256;

/// The properties of a request that decide how its answer is read.
#[derive(Clone, Copy)]
pub struct Expected {
    /// HEAD: the answer has no body.
    pub head: bool,
    /// The request asks for another protocol.
    pub upgrade: bool,
}

impl Upstream {
    /// A connection for pingora's proxy, and whether it was kept alive. If a kept-alive connection breaks before an answer, the caller may try
    /// again. With `fresh`, the connection is always a new one.
    ///
    /// # Errors
    /// No address of the source accepts a connection.
    pub async fn lend(self: &Arc<Self>, expected: Expected, fresh: bool) -> Result<(HttpPeer, bool), Fault> {
        let connection = if fresh { Box::pin(self.connect()).await? } else { self.connection().await? };
        let address = connection.address;
        let lent = Lent {
            stream: Some(connection.stream),
            peer: connection.peer,
            upstream: self.clone(),
            answer: Answer::of(expected),
            ahead: BytesMut::new(),
            passed: 0,
            since: Instant::now(),
            limit: self.read_timeout,
            timer: None,
            broken: false,
        };
        // No TLS for pingora: `Lent` does it if the source needs it.
        let mut peer = HttpPeer::new(address, false, String::new());
        peer.options.read_timeout = Some(self.read_timeout);
        peer.options.write_timeout = Some(self.read_timeout);
        peer.options.custom_l4 = Some(Handed::over(L4Stream::from(VirtualSocketStream::new(Box::new(lent)))));
        Ok((peer, connection.reused))
    }
}

/// The connection while it is lent.
struct Lent {
    /// `None`: it is back in the pool.
    stream: Option<Stream>,
    peer: HttpPeer,
    upstream: Arc<Upstream>,
    answer: Answer,
    /// Bytes that were read from the source, and that pingora has not got yet.
    ahead: BytesMut,
    /// How many of them belong to the answer, so that pingora may get them.
    passed: usize,
    /// When the last byte of the request was sent.
    since: Instant,
    /// How long after that the final answer must begin.
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// A write has failed.
    broken: bool,
}

/// The position of the reader in an answer.
pub struct Answer {
    expected: Expected,
    left: Remaining,
}

/// The part of an answer that is still to come.
enum Remaining {
    /// A final or interim head.
    Head,
    /// This many bytes of the body.
    Bytes(u64),
    /// The chunks of the body.
    Chunks(Chunks),
    /// All bytes until the connection closes: a body without a length, or another protocol.
    All,
}

impl Answer {
    /// Before the head.
    pub const fn of(expected: Expected) -> Self {
        Self { expected, left: Remaining::Head }
    }

    /// Whether the answer has ended.
    pub const fn is_over(&self) -> bool {
        match &self.left {
            Remaining::Bytes(left) => *left == 0,
            Remaining::Chunks(chunks) => chunks.is_over(),
            Remaining::Head | Remaining::All => false,
        }
    }

    /// How many of these bytes belong to the answer. A head counts only when it is complete, so 0 means that it is not.
    ///
    /// # Errors
    /// This is no answer.
    pub fn pass(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(match &mut self.left {
            Remaining::Head => {
                let Some((length, left)) = self.head(bytes)? else {
                    return if bytes.len() > MAX_HEAD { Err(unusable("a head of more than 64 KiB")) } else { Ok(0) };
                };
                self.left = left;
                length
            }
            Remaining::Bytes(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= here as u64;
                here
            }
            Remaining::Chunks(chunks) => chunks.pass(bytes),
            Remaining::All => bytes.len(),
        })
    }

    /// Parses a head as pingora does. Returns its length, and what follows it (RFC 9112, section 6.3). `None`: it is not complete.
    fn head(&self, bytes: &[u8]) -> io::Result<Option<(usize, Remaining)>> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Response::new(&mut headers);
        let mut parser = httparse::ParserConfig::default();
        parser.allow_spaces_after_header_name_in_responses(true);
        parser.allow_obsolete_multiline_headers_in_responses(true);
        let length = match parser.parse_response(&mut head, bytes) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(unusable(&format!("no head of an answer: {error}"))),
        };
        let named = |name: &'static str| head.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        let left = match head.code.unwrap_or_default() {
            101 if self.expected.upgrade => Remaining::All,
            101 => return Err(unusable("a change of protocol that was not asked for")),
            100..=199 => Remaining::Head,
            204 | 304 => Remaining::Bytes(0),
            _ if self.expected.head => Remaining::Bytes(0),
            _ => match named("transfer-encoding").next_back() {
                Some(codings) => {
                    let last = codings.value.rsplit(|byte| *byte == b',').next().unwrap_or_default();
                    if last.trim_ascii().eq_ignore_ascii_case(b"chunked") { Remaining::Chunks(Chunks::default()) } else { Remaining::All }
                }
                None => length_of(named("content-length").map(|header| header.value))?.map_or(Remaining::All, Remaining::Bytes),
            },
        };
        Ok(Some((length, left)))
    }
}

/// The value of `Content-Length`. Repeated values must be equal (RFC 9110, section 8.6).
fn length_of<'a>(values: impl Iterator<Item = &'a [u8]>) -> io::Result<Option<u64>> {
    let mut length = None;
    for value in values.flat_map(|value| value.split(|byte| *byte == b',')) {
        let digits = Some(value.trim_ascii()).filter(|digits| digits.iter().all(u8::is_ascii_digit));
        let said: u64 = digits
            .and_then(|digits| str::from_utf8(digits).ok()?.parse().ok())
            .ok_or_else(|| unusable("a Content-Length that is no number"))?;
        if length.is_some_and(|length| length != said) {
            return Err(unusable("two lengths that differ"));
        }
        length = Some(said);
    }
    Ok(length)
}

/// The error for an invalid answer. [`Upstream::fault`] recognises its kind.
fn unusable(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

impl Lent {
    /// Puts the connection into the pool. Drops it instead if a write has failed, or if bytes came after the end of the answer.
    fn give_back(&mut self) {
        if let Some(stream) = self.stream.take().filter(|_| self.ahead.is_empty() && !self.broken) {
            self.upstream.release(stream, &self.peer);
        }
    }

    /// Is ready when the final answer has not begun in time.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            let deadline = self.since + self.limit;
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
            ready!(timer.as_mut().poll(cx));
            // More of the request has been sent since the timer was set.
            if Instant::now() < deadline {
                timer.as_mut().reset(deadline);
                continue;
            }
            return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "no final answer in time"));
        }
    }
}

impl AsyncRead for Lent {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.passed > 0 {
                let here = this.passed.min(buf.remaining());
                buf.put_slice(&this.ahead[..here]);
                this.ahead.advance(here);
                this.passed -= here;
                return Poll::Ready(Ok(()));
            }
            if this.answer.is_over() {
                this.give_back();
                return Poll::Ready(Ok(()));
            }
            if !this.ahead.is_empty() {
                this.passed = this.answer.pass(&mut this.ahead)?;
                if this.passed > 0 {
                    continue;
                }
            }
            let Some(stream) = &mut this.stream else { return Poll::Ready(Ok(())) };
            if matches!(this.answer.left, Remaining::Head) {
                let mut part = [0; 8 << 10];
                let mut part = ReadBuf::new(&mut part);
                match Pin::new(stream).poll_read(cx, &mut part) {
                    Poll::Ready(read) => read?,
                    Poll::Pending => return this.poll_late(cx).map(Err),
                }
                if part.filled().is_empty() {
                    return Poll::Ready(Ok(()));
                }
                this.ahead.extend_from_slice(part.filled());
                continue;
            }
            // A body is read into pingora's buffer directly. Bytes after its end stay in `ahead`. The buffer is not initialised first: most of
            // its 64 KiB stay unused when an answer comes in small pieces, and pages that are never written cost no memory.
            let before = buf.filled().len();
            ready!(Pin::new(stream).poll_read(cx, buf))?;
            let read = &mut buf.filled_mut()[before..];
            let passed = this.answer.pass(read)?;
            this.ahead.extend_from_slice(&read[passed..]);
            buf.set_filled(before + passed);
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncWrite for Lent {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if !this.broken
            && let Some(stream) = &mut this.stream
        {
            match ready!(Pin::new(stream).poll_write(cx, buf)) {
                Ok(written) if written > 0 => {
                    this.since = Instant::now();
                    return Poll::Ready(Ok(written));
                }
                _ => this.broken = true,
            }
        }
        // The source may have answered early and closed. Pretend that the write succeeded, so that pingora reads that answer. If there is none,
        // the read fails.
        if this.answer.is_over() { Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) } else { Poll::Ready(Ok(buf.len())) }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(stream) = this.stream.as_mut().filter(|_| !this.broken) else { return Poll::Ready(Ok(())) };
        if ready!(Pin::new(stream).poll_flush(cx)).is_err() {
            this.broken = true;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(Ok(())) };
        Pin::new(stream).poll_shutdown(cx)
    }
}

impl VirtualSocket for Lent {
    /// The connection below has been set up already.
    fn set_socket_option(&self, _option: VirtualSockOpt) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("peer", &self.peer).finish_non_exhaustive()
    }
}
