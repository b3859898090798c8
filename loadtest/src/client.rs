//! A keep-alive HTTP/1.1 client that does only what a load tester needs, and nearly no work per request: the tester must not be
//! slower than what it tests. One client holds one connection, and one buffer for all it reads.

use crate::{corpus::Blob, target::Target};
use castier_blob::{Digest, Verifier, wire};
use std::{
    io::{self, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Size of the read buffer, and so the limit on a response head and on a chunk-size line.
const BUFFER: usize = 64 << 10;
/// More headers than this are not an answer of anything we load.
const MAX_HEADERS: usize = 64;
/// How long a server may take to say `100 Continue` before the body is sent anyway, as curl has it.
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// What a request asks for.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'static str,
    pub(crate) path: Path<'a>,
    pub(crate) body: Body<'a>,
    /// Of the body, where it matters.
    pub(crate) content_type: Option<&'static str>,
    /// Ask before sending the body: spares it where the server has the blob.
    pub(crate) ask_first: bool,
}

/// The path below the target's prefix.
#[derive(Clone, Copy)]
pub(crate) enum Path<'a> {
    /// `/cas/<digest>`.
    Blob(&'a Digest),
    /// As it stands.
    Plain(&'a str),
}

/// A request body.
#[derive(Clone, Copy)]
pub(crate) enum Body<'a> {
    None,
    Bytes(&'a [u8]),
    /// Made while it is sent.
    Blob(Blob),
}

impl Body<'_> {
    /// Its length in bytes.
    pub(crate) const fn len(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Blob(blob) => blob.size,
        }
    }
}

/// What is done with the body of a 200. Other bodies are read and dropped.
pub(crate) enum Check<'a> {
    /// Nothing is expected in it.
    Drop,
    /// It is to hash to a digest.
    Hash(Digest),
    /// It is to be these very bytes, whose digest was computed before.
    Compare(&'a [u8]),
    /// It is kept, up to the buffer's size, for the caller to read.
    Keep,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The `Content-Length`, if any.
    pub(crate) announced: Option<u64>,
    /// Bytes of the body.
    pub(crate) received: u64,
    /// When the first byte of the answer was there.
    pub(crate) first_byte: Instant,
    /// The body passed its check, or there was none to pass.
    pub(crate) sound: bool,
    /// The kept-alive connection was closed under the request, before any byte of an answer, and it was sent again on a new one.
    pub(crate) reconnected: bool,
    /// The body, for [`Check::Keep`].
    pub(crate) kept: Vec<u8>,
}

/// Why there is no answer. The texts name no blob, so that equal failures count as one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("the connection was closed before an answer")]
    NoAnswer,
    #[error("the connection broke within an answer: {0}")]
    Broken(io::Error),
    #[error("the answer is not HTTP/1.1: {0}")]
    Malformed(&'static str),
}

/// How far an attempt got.
enum Attempt {
    /// Closed or reset before any byte came back.
    Unanswered,
    Failed(Failure),
}

impl From<Failure> for Attempt {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// How the end of a body is known.
enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// The parsed head of an answer.
struct Head {
    status: u16,
    announced: Option<u64>,
    framing: Framing,
    keep_alive: bool,
}

/// One client with its connection.
pub(crate) struct Client {
    target: Arc<Target>,
    /// A connection for each request.
    close: bool,
    /// Open between requests, while the server keeps it.
    stream: Option<TcpStream>,
    /// What is to be sent.
    out: Vec<u8>,
    /// What was read; `start..end` is not consumed yet.
    input: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Client {
    /// Not connected yet: the first request connects, and that belongs to its latency.
    pub(crate) fn new(target: Arc<Target>, close: bool) -> Self {
        Self { target, close, stream: None, out: Vec::new(), input: vec![0; BUFFER].into(), start: 0, end: 0 }
    }

    /// Sends a request and reads the answer. A cancelled exchange drops its connection.
    pub(crate) async fn exchange(&mut self, request: &Request<'_>, check: &Check<'_>) -> Result<Answer, Failure> {
        if let Some(stream) = self.stream.take() {
            match self.attempt(stream, request, check).await {
                Ok(answer) => return Ok(answer),
                Err(Attempt::Failed(failure)) => return Err(failure),
                // The server may close an idle connection at any moment (RFC 9112, section 9.3.1), and every operation here
                // is idempotent: content has one name.
                Err(Attempt::Unanswered) => {
                    let mut answer = self.connect_and_attempt(request, check).await?;
                    answer.reconnected = true;
                    return Ok(answer);
                }
            }
        }
        self.connect_and_attempt(request, check).await
    }

    async fn connect_and_attempt(&mut self, request: &Request<'_>, check: &Check<'_>) -> Result<Answer, Failure> {
        let stream = TcpStream::connect(self.target.addresses.as_slice()).await.map_err(Failure::Connect)?;
        stream.set_nodelay(true).map_err(Failure::Connect)?;
        self.attempt(stream, request, check).await.map_err(|attempt| match attempt {
            Attempt::Unanswered => Failure::NoAnswer,
            Attempt::Failed(failure) => failure,
        })
    }

    async fn attempt(&mut self, mut stream: TcpStream, request: &Request<'_>, check: &Check<'_>) -> Result<Answer, Attempt> {
        (self.start, self.end) = (0, 0);
        self.write_head(request);
        let mut early = None;
        if request.ask_first {
            stream.write_all(&self.out).await.map_err(|_| Attempt::Unanswered)?;
            self.out.clear();
            early = self.wait_for_continue(&mut stream).await?;
        }
        if early.is_none() {
            // A server may answer and close before it read all of a body, so a failed write still leaves an answer to read.
            let _ = self.write_body(&mut stream, request.body).await;
        }
        let body_unsent = early.is_some();
        let (head, first_byte) = match early {
            Some(early) => early,
            None => self.read_head(&mut stream, request.method).await?,
        };
        let (received, sound, kept) = self.read_body(&mut stream, &head, check).await.map_err(Attempt::Failed)?;
        // After an early answer the server may still expect the body, so such a connection is of no further use.
        if head.keep_alive && !self.close && !body_unsent {
            self.stream = Some(stream);
        }
        Ok(Answer { status: head.status, announced: head.announced, received, first_byte, sound, reconnected: false, kept })
    }

    fn write_head(&mut self, request: &Request<'_>) {
        let out = &mut self.out;
        out.clear();
        out.extend_from_slice(request.method.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.target.prefix.as_bytes());
        match request.path {
            Path::Plain(path) => out.extend_from_slice(path.as_bytes()),
            Path::Blob(digest) => {
                out.extend_from_slice(wire::CAS.as_bytes());
                out.push(b'/');
                let at = out.len();
                out.resize(at + Digest::TEXT_LEN, 0);
                data_encoding::HEXLOWER.encode_mut(digest.as_bytes(), &mut out[at..]);
            }
        }
        out.extend_from_slice(self.target.head.as_bytes());
        if !matches!(request.body, Body::None) {
            // Writing to a vector cannot fail.
            let _ = write!(out, "Content-Length: {}\r\n", request.body.len());
        }
        if let Some(content_type) = request.content_type {
            let _ = write!(out, "Content-Type: {content_type}\r\n");
        }
        if request.ask_first {
            out.extend_from_slice(b"Expect: 100-continue\r\n");
        }
        if self.close {
            out.extend_from_slice(b"Connection: close\r\n");
        }
        out.extend_from_slice(b"\r\n");
    }

    /// Sends what stands in `out` and then the body; head and a small body leave in one write.
    async fn write_body(&mut self, stream: &mut TcpStream, body: Body<'_>) -> io::Result<()> {
        match body {
            Body::None => {}
            Body::Bytes(bytes) => self.out.extend_from_slice(bytes),
            Body::Blob(blob) => {
                let mut pieces = blob.pieces();
                while pieces.next_into(&mut self.out) {
                    stream.write_all(&self.out).await?;
                    self.out.clear();
                }
            }
        }
        stream.write_all(&self.out).await
    }

    /// Waits for leave to send the body. A final answer in its place is returned.
    async fn wait_for_continue(&mut self, stream: &mut TcpStream) -> Result<Option<(Head, Instant)>, Attempt> {
        let mut asked = Box::pin(tokio::time::sleep(CONTINUE_WAIT));
        loop {
            if let Some(head) = self.parse_head("PUT")? {
                let interim = head.status < 200;
                return Ok((!interim).then(|| (head, Instant::now())));
            }
            tokio::select! {
                read = self.fill(stream) => { read.map_err(|_| Attempt::Unanswered)?; }
                () = &mut asked => return Ok(None),
            }
        }
    }

    async fn read_head(&mut self, stream: &mut TcpStream, method: &'static str) -> Result<(Head, Instant), Attempt> {
        let mut first_byte = None;
        loop {
            match self.parse_head(method)? {
                Some(head) if head.status < 200 => {}
                Some(head) => return Ok((head, first_byte.unwrap_or_else(Instant::now))),
                None => match self.fill(stream).await {
                    Ok(()) => {
                        first_byte.get_or_insert_with(Instant::now);
                    }
                    Err(error) if first_byte.is_some() => return Err(Failure::Broken(error).into()),
                    Err(_) => return Err(Attempt::Unanswered),
                },
            }
        }
    }

    /// Consumes a head if it is complete.
    fn parse_head(&mut self, method: &'static str) -> Result<Option<Head>, Failure> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&self.input[self.start..self.end]).map_err(|_| Failure::Malformed("its head"))?;
        let httparse::Status::Complete(length) = parsed else { return Ok(None) };
        let status = response.code.unwrap_or_default();
        let (mut announced, mut chunked, mut keep_alive) = (None, false, response.version == Some(1));
        for header in response.headers.iter() {
            if header.name.eq_ignore_ascii_case("content-length") {
                let value = str::from_utf8(header.value).ok().and_then(|text| text.trim().parse().ok());
                announced = Some(value.ok_or(Failure::Malformed("its Content-Length"))?);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                chunked = header.value.trim_ascii().to_ascii_lowercase().ends_with(b"chunked");
            } else if header.name.eq_ignore_ascii_case("connection") {
                keep_alive = if keep_alive {
                    !header.value.trim_ascii().eq_ignore_ascii_case(b"close")
                } else {
                    header.value.trim_ascii().eq_ignore_ascii_case(b"keep-alive")
                };
            }
        }
        self.start += length;
        let framing = match announced {
            _ if method == "HEAD" || status < 200 || status == 204 || status == 304 => Framing::Length(0),
            _ if chunked => Framing::Chunked,
            Some(length) => Framing::Length(length),
            None => Framing::UntilClose,
        };
        keep_alive &= !matches!(framing, Framing::UntilClose);
        Ok(Some(Head { status, announced, framing, keep_alive }))
    }

    /// Reads the body; returns its length, whether it passed the check, and what was to be kept of it.
    async fn read_body(&mut self, stream: &mut TcpStream, head: &Head, check: &Check<'_>) -> Result<(u64, bool, Vec<u8>), Failure> {
        let unchecked = Check::Drop;
        let mut taker = Taker::new(if head.status == 200 || matches!(check, Check::Keep) { check } else { &unchecked });
        match head.framing {
            Framing::Length(length) => self.take_bytes(stream, length, &mut taker).await.map_err(Failure::Broken)?,
            Framing::Chunked => self.take_chunks(stream, &mut taker).await?,
            Framing::UntilClose => loop {
                taker.take(&self.input[self.start..self.end]);
                self.start = self.end;
                match self.fill(stream).await {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    Err(error) => return Err(Failure::Broken(error)),
                }
            },
        }
        let received = taker.received;
        let (sound, kept) = taker.finish();
        Ok((received, sound, kept))
    }

    async fn take_bytes(&mut self, stream: &mut TcpStream, mut left: u64, taker: &mut Taker<'_>) -> io::Result<()> {
        loop {
            let here = usize::try_from(left).map_or(BUFFER, |left| left.min(self.end - self.start)).min(self.end - self.start);
            taker.take(&self.input[self.start..self.start + here]);
            self.start += here;
            left -= here as u64;
            if left == 0 {
                return Ok(());
            }
            self.fill(stream).await?;
        }
    }

    async fn take_chunks(&mut self, stream: &mut TcpStream, taker: &mut Taker<'_>) -> Result<(), Failure> {
        loop {
            let size = loop {
                match httparse::parse_chunk_size(&self.input[self.start..self.end]) {
                    Ok(httparse::Status::Complete((length, size))) => {
                        self.start += length;
                        break size;
                    }
                    Ok(httparse::Status::Partial) => self.fill(stream).await.map_err(Failure::Broken)?,
                    Err(_) => return Err(Failure::Malformed("its chunks")),
                }
            };
            if size > 0 {
                self.take_bytes(stream, size, taker).await.map_err(Failure::Broken)?;
            }
            // The end of the chunk's data is an empty line; after the last chunk, trailers may stand before it.
            while !self.take_line(stream).await?.eq(&0) {
                if size > 0 {
                    return Err(Failure::Malformed("its chunks"));
                }
            }
            if size == 0 {
                return Ok(());
            }
        }
    }

    /// Consumes a line; returns its length without the CRLF.
    async fn take_line(&mut self, stream: &mut TcpStream) -> Result<usize, Failure> {
        loop {
            let unread = &self.input[self.start..self.end];
            if let Some(length) = unread.windows(2).position(|pair| pair == b"\r\n") {
                self.start += length + 2;
                return Ok(length);
            }
            self.fill(stream).await.map_err(Failure::Broken)?;
        }
    }

    /// Reads some bytes more; an end of the stream is an error.
    async fn fill(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.input.len() {
            if self.start == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a head or line of 64 KiB"));
            }
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match stream.read(&mut self.input[self.end..]).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                self.end += read;
                Ok(())
            }
        }
    }
}

/// Takes a body's bytes and checks them.
struct Taker<'a> {
    received: u64,
    check: &'a Check<'a>,
    /// For [`Check::Hash`].
    verifier: Option<Verifier>,
    /// For [`Check::Compare`]: no difference so far.
    equal: bool,
    /// For [`Check::Keep`].
    kept: Vec<u8>,
}

impl<'a> Taker<'a> {
    fn new(check: &'a Check<'a>) -> Self {
        let verifier = if let Check::Hash(digest) = check { Some(Verifier::of(*digest)) } else { None };
        Self { received: 0, check, verifier, equal: true, kept: Vec::new() }
    }

    fn take(&mut self, bytes: &[u8]) {
        match self.check {
            Check::Drop => {}
            Check::Hash(_) => {
                if let Some(verifier) = &mut self.verifier {
                    verifier.update(bytes);
                }
            }
            Check::Compare(expected) => {
                let at = usize::try_from(self.received).unwrap_or(usize::MAX);
                self.equal &= at.checked_add(bytes.len()).and_then(|end| expected.get(at..end)) == Some(bytes);
            }
            Check::Keep => {
                let room = BUFFER - self.kept.len();
                self.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
        }
        self.received += bytes.len() as u64;
    }

    fn finish(self) -> (bool, Vec<u8>) {
        let sound = match self.check {
            Check::Drop | Check::Keep => true,
            Check::Hash(_) => self.verifier.is_some_and(|verifier| verifier.finish(()).is_ok()),
            Check::Compare(expected) => self.equal && self.received == expected.len() as u64,
        };
        (sound, self.kept)
    }
}
