//! A connection to a source, lent to pingora's proxy for one request and its answer.
//!
//! pingora's proxy sees it as a socket of a kind of its own. That gives a relay what a fetch of a blob has:
//!
//! - the pool and the addresses of the source, the last good one first;
//! - a limit on how long the final answer may take, whatever interim answers come;
//! - a strict reader in front of pingora's own: it finds where the answer ends, shows nothing behind that, spoils malformed chunks
//!   ([`crate::chunks`]), and refuses a change of protocol that nobody asked for;
//! - the answer of a source that stops reading: a write that fails is kept secret until the answer has been read.
//!
//! The way back into the pool:
//!
//! 1. pingora reads the last byte of the answer, and has sent all of the request.
//! 2. If neither side ends the connection, pingora puts it into its own pool. First it reads from it: an idle connection has nothing to say.
//! 3. That read, behind the end of the answer, is the sign. [`Lent`] gives the connection to the pool of its [`Upstream`] and shows the end
//!    of the stream to pingora, which drops the empty hull.
//!
//! If the connection is to end instead, pingora shuts it down or drops it, and no such read comes.

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
/// The most header fields in it, as pingora has it.
const MAX_HEADERS: usize = 256;

/// What a request is, as far as its answer depends on it.
#[derive(Clone, Copy)]
pub struct Expected {
    /// HEAD: the answer has no body.
    pub head: bool,
    /// For another protocol.
    pub upgrade: bool,
}

impl Upstream {
    /// A connection for pingora's proxy, and whether it was kept alive: if it then breaks before any answer, another one may do. With
    /// `fresh` it is a new one.
    ///
    /// # Errors
    /// No address of the source takes a connection.
    pub async fn lend(self: &Arc<Self>, expected: Expected, fresh: bool) -> Result<(HttpPeer, bool), Fault> {
        let connection = if fresh { Box::pin(self.connect()).await? } else { self.connection().await? };
        let address = connection.address;
        let lent = Lent {
            stream: Some(connection.stream),
            peer: connection.peer,
            upstream: self.clone(),
            answer: Answer { expected, left: Left::Head },
            ahead: BytesMut::new(),
            shown: 0,
            since: Instant::now(),
            limit: self.read_timeout,
            timer: None,
            broken: false,
        };
        // Whatever is below it, pingora needs no TLS of its own here.
        let mut peer = HttpPeer::new(address, false, String::new());
        peer.options.read_timeout = Some(self.read_timeout);
        peer.options.write_timeout = Some(self.read_timeout);
        peer.options.custom_l4 = Some(Handed::over(L4Stream::from(VirtualSocketStream::new(Box::new(lent)))));
        Ok((peer, connection.reused))
    }
}

/// The connection while it is lent.
struct Lent {
    /// None: it has been given back.
    stream: Option<Stream>,
    peer: HttpPeer,
    upstream: Arc<Upstream>,
    answer: Answer,
    /// Bytes that were read, and not yet shown.
    ahead: BytesMut,
    /// So many of them may be shown.
    shown: usize,
    /// When the last byte of the request was sent.
    since: Instant,
    /// How long after that the final answer must have begun.
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// A write has failed.
    broken: bool,
}

/// How far an answer has been read.
struct Answer {
    expected: Expected,
    left: Left,
}

/// What of an answer is still to come.
enum Left {
    /// A head, perhaps an interim one.
    Head,
    /// So many bytes of the body.
    Bytes(u64),
    /// The chunks of the body.
    Chunks(Chunks),
    /// All that comes: to the end of the connection, or in another protocol.
    All,
}

impl Answer {
    const fn is_over(&self) -> bool {
        match &self.left {
            Left::Bytes(left) => *left == 0,
            Left::Chunks(chunks) => chunks.is_over(),
            Left::Head | Left::All => false,
        }
    }

    /// How many of these bytes belong to the answer, a whole head at a time; none: a head that goes on.
    fn pass(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(match &mut self.left {
            Left::Head => {
                let Some((length, left)) = self.head(bytes)? else {
                    return if bytes.len() > MAX_HEAD { Err(unusable("a head of more than 64 KiB")) } else { Ok(0) };
                };
                self.left = left;
                length
            }
            Left::Bytes(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= here as u64;
                here
            }
            Left::Chunks(chunks) => chunks.pass(bytes),
            Left::All => bytes.len(),
        })
    }

    /// Reads a head as pingora does: its length, and what comes behind it (RFC 9112, section 6.3). None: it is not whole.
    fn head(&self, bytes: &[u8]) -> io::Result<Option<(usize, Left)>> {
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
            101 if self.expected.upgrade => Left::All,
            101 => return Err(unusable("a change of protocol that was not asked for")),
            100..=199 => Left::Head,
            204 | 304 => Left::Bytes(0),
            _ if self.expected.head => Left::Bytes(0),
            _ => match named("transfer-encoding").next_back() {
                Some(codings) => {
                    let last = codings.value.rsplit(|byte| *byte == b',').next().unwrap_or_default();
                    if last.trim_ascii().eq_ignore_ascii_case(b"chunked") { Left::Chunks(Chunks::default()) } else { Left::All }
                }
                None => length_of(named("content-length").map(|header| header.value))?.map_or(Left::All, Left::Bytes),
            },
        };
        Ok(Some((length, left)))
    }
}

/// What the values of `Content-Length` say, if all say the same (RFC 9110, section 8.6).
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

/// An answer that is none. [`Upstream::fault`] knows it by its kind.
fn unusable(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

impl Lent {
    /// Gives the connection to the pool, if it is at the end of the answer and nothing came behind that.
    fn give_back(&mut self) {
        if let Some(stream) = self.stream.take().filter(|_| self.ahead.is_empty() && !self.broken) {
            self.upstream.release(stream, &self.peer);
        }
    }

    /// Runs out when the final answer has not begun in time.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            let deadline = self.since + self.limit;
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
            ready!(timer.as_mut().poll(cx));
            // More of the request has been sent meanwhile.
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
            if this.shown > 0 {
                let here = this.shown.min(buf.remaining());
                buf.put_slice(&this.ahead[..here]);
                this.ahead.advance(here);
                this.shown -= here;
                return Poll::Ready(Ok(()));
            }
            if this.answer.is_over() {
                this.give_back();
                return Poll::Ready(Ok(()));
            }
            if !this.ahead.is_empty() {
                this.shown = this.answer.pass(&mut this.ahead)?;
                if this.shown > 0 {
                    continue;
                }
            }
            let Some(stream) = &mut this.stream else { return Poll::Ready(Ok(())) };
            if matches!(this.answer.left, Left::Head) {
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
            // A body is read straight to where it goes; what stands behind its end stays here. The buffer is not initialised for it: a page
            // that is never touched costs no memory, and most of pingora's 64 KiB are not, where an answer drips.
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
        // A source that has answered early may have closed. Its answer is still to be read; if there is none, reading says so.
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
