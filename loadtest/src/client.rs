//! A minimal keep-alive HTTP/1.1 client. It does little work per request, since the tester must be faster than the server. One client has
//! one connection and one read buffer.

mod check;

pub(crate) use check::Check;

use crate::{corpus::Blob, mix::Op, target::Target};
use castier_blob::Digest;
use castier_wire as wire;
use check::Taker;
use std::{
    io::{self, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// The size of the read buffer. It limits the head of an answer and a chunk-size line.
const BUFFER: usize = 64 << 10;
/// The most headers of an answer.
const MAX_HEADERS: usize = 64;
/// How long to wait for `100 Continue` before the body is sent anyway, as curl does.
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// A request.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) op: Op,
    pub(crate) path: Path<'a>,
    pub(crate) body: Body<'a>,
    /// The media type of the body, if needed.
    pub(crate) content_type: Option<&'static str>,
    /// Send `Expect: 100-continue`: a server that has the blob answers without the body.
    pub(crate) ask_first: bool,
}

impl<'a> Request<'a> {
    /// A request with the necessary headers only.
    pub(crate) const fn new(op: Op, path: Path<'a>, body: Body<'a>) -> Self {
        Self { op, path, body, content_type: None, ask_first: false }
    }
}

/// The path below the target's prefix.
#[derive(Clone, Copy)]
pub(crate) enum Path<'a> {
    /// `/cas/<digest>`.
    Blob(&'a Digest),
    /// The path unchanged.
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

/// The answer to a request.
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The `Content-Length`, if any.
    pub(crate) announced: Option<u64>,
    /// Bytes of the body.
    pub(crate) received: u64,
    /// When the first byte of the answer arrived.
    pub(crate) first_byte: Instant,
    /// Whether the body passed its check. True if there was no check.
    pub(crate) sound: bool,
    /// The body, for [`Check::Keep`].
    pub(crate) kept: Vec<u8>,
}

/// Why there is no answer. The texts name no blob, so that equal failures are counted together.
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

/// How an attempt failed.
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

/// How the end of a body is found.
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
    /// Whether each request uses a new connection.
    close: bool,
    /// The kept-alive connection, if the server has not closed it.
    stream: Option<TcpStream>,
    /// Whether the last request was sent again.
    reconnected: bool,
    /// The bytes to send.
    out: Vec<u8>,
    /// The bytes read. `start..end` is not consumed yet.
    input: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Client {
    /// Does not connect: the first request does, and its latency includes that.
    pub(crate) fn new(target: Arc<Target>, close: bool) -> Self {
        Self { target, close, stream: None, reconnected: false, out: Vec::new(), input: vec![0; BUFFER].into(), start: 0, end: 0 }
    }

    /// Whether the server closed the kept-alive connection before any byte of the last answer, so that the request was sent again on a new
    /// connection.
    pub(crate) const fn reconnected(&self) -> bool {
        self.reconnected
    }

    /// Sends a request and reads the answer. A cancelled exchange drops its connection.
    pub(crate) async fn exchange(&mut self, request: &Request<'_>, check: &Check<'_>) -> Result<Answer, Failure> {
        self.reconnected = false;
        if let Some(stream) = self.stream.take() {
            match self.attempt(stream, request, check).await {
                Ok(answer) => return Ok(answer),
                Err(Attempt::Failed(failure)) => return Err(failure),
                // The server may close an idle connection at any moment (RFC 9112, section 9.3.1), and every operation here
                // is idempotent: content has one name.
                Err(Attempt::Unanswered) => self.reconnected = true,
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
            early = self.write_body(&mut stream, request).await?;
        }
        let body_unsent = early.is_some();
        let (head, first_byte) = match early {
            Some(early) => early,
            None => self.read_head(&mut stream, request.op).await?,
        };
        let (received, sound, kept) = self.read_body(&mut stream, &head, check).await.map_err(Attempt::Failed)?;
        let surplus = self.start < self.end;
        if surplus && head.status < 300 {
            return Err(Failure::Malformed("there are bytes after its end").into());
        }
        // After an early answer the server may still expect the body, so the connection cannot be reused.
        if head.keep_alive && !self.close && !body_unsent && !surplus {
            self.stream = Some(stream);
        }
        Ok(Answer { status: head.status, announced: head.announced, received, first_byte, sound, kept })
    }

    fn write_head(&mut self, request: &Request<'_>) {
        let out = &mut self.out;
        out.clear();
        out.extend_from_slice(request.op.method().as_bytes());
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

    /// Sends `out` and then the body; the head and a small body in one write. If the server answers before it has read the whole body, returns
    /// that answer. If a write fails, the following read finds the reason.
    async fn write_body(&mut self, stream: &mut TcpStream, request: &Request<'_>) -> Result<Option<(Head, Instant)>, Attempt> {
        let (mut reading, mut writing) = stream.split();
        let mut pieces = None;
        match request.body {
            Body::None => {}
            Body::Bytes(bytes) => self.out.extend_from_slice(bytes),
            Body::Blob(blob) => pieces = Some(blob.pieces()),
        }
        loop {
            let mut out = std::mem::take(&mut self.out);
            let more = pieces.as_mut().is_some_and(|pieces| pieces.next_into(&mut out));
            let mut unsent = &out[..];
            while !unsent.is_empty() {
                tokio::select! {
                    biased;
                    sent = writing.write(unsent) => match sent {
                        Ok(sent @ 1..) => unsent = &unsent[sent..],
                        Ok(0) | Err(_) => return Ok(None),
                    },
                    read = self.fill(&mut reading) => {
                        if read.is_err() {
                            return Ok(None);
                        }
                        if let Some(head) = self.parse_final(request.op)? {
                            return Ok(Some((head, Instant::now())));
                        }
                    }
                }
            }
            out.clear();
            self.out = out;
            if !more {
                return Ok(None);
            }
        }
    }

    /// Waits for `100 Continue`. Returns a final answer if one comes instead.
    async fn wait_for_continue(&mut self, stream: &mut TcpStream) -> Result<Option<(Head, Instant)>, Attempt> {
        let mut asked = Box::pin(tokio::time::sleep(CONTINUE_WAIT));
        loop {
            if let Some(head) = self.parse_head(Op::Put)? {
                let interim = head.status < 200;
                return Ok((!interim).then(|| (head, Instant::now())));
            }
            tokio::select! {
                read = self.fill(stream) => { read.map_err(|_| Attempt::Unanswered)?; }
                () = &mut asked => return Ok(None),
            }
        }
    }

    async fn read_head(&mut self, stream: &mut TcpStream, op: Op) -> Result<(Head, Instant), Attempt> {
        let mut first_byte = None;
        loop {
            match self.parse_final(op)? {
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

    /// Consumes the heads of interim answers, and the head of the final answer if it is complete.
    fn parse_final(&mut self, op: Op) -> Result<Option<Head>, Failure> {
        loop {
            match self.parse_head(op)? {
                Some(head) if head.status < 200 => {}
                done => return Ok(done),
            }
        }
    }

    /// Consumes a head if it is complete.
    fn parse_head(&mut self, op: Op) -> Result<Option<Head>, Failure> {
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
            _ if op == Op::Head || status < 200 || status == 204 || status == 304 => Framing::Length(0),
            _ if chunked => Framing::Chunked,
            Some(length) => Framing::Length(length),
            None => Framing::UntilClose,
        };
        keep_alive &= !matches!(framing, Framing::UntilClose);
        Ok(Some(Head { status, announced, framing, keep_alive }))
    }

    /// Reads the body. Returns its length, whether it passed the check, and the bytes to keep.
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
            // An empty line ends the chunk's data. After the last chunk, trailers may come before it.
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

    /// Consumes a line. Returns its length without CRLF.
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

    /// Reads more bytes. The end of the stream is an error.
    async fn fill(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
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
