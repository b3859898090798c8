//! An HTTP client that shows everything: the bytes, their number, and whether the body was complete.

use super::{
    Blob, DEADLINE, proof,
    wire::{Framing, Head, Wire},
    within,
};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::net::TcpSocket;

/// An answer, read completely.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    /// 0 if the connection ended without an answer.
    pub(crate) status: u16,
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    /// Whether a client would see the body as complete.
    pub(crate) complete: bool,
    /// The time to the status line.
    pub(crate) head_after: Duration,
    /// The time to the first byte of the body.
    pub(crate) first_byte_after: Option<Duration>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    pub(crate) fn cache_status(&self) -> &str {
        self.header("cache-status").unwrap_or("")
    }

    /// Asserts that the body is exactly `blob`.
    #[track_caller]
    pub(crate) fn assert_is(&self, blob: &Blob) {
        assert_eq!(self.status, 200, "{}: {}", self.head.first, String::from_utf8_lossy(&self.body[..self.body.len().min(500)]));
        assert!(self.complete, "cut after {} of {} bytes", self.body.len(), blob.size);
        assert_eq!(self.body.len() as u64, blob.size);
        assert!(blob.is_at(0, &self.body), "wrong bytes");
    }

    /// Asserts that the answer is a problem (RFC 9457) of this status without internal details. Returns its `detail`.
    #[track_caller]
    pub(crate) fn assert_problem(&self, status: u16) -> String {
        let text = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{}: {text}", self.head.first);
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{text}");
        assert!(self.complete, "cut: {text}");
        let problem: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("not JSON ({e}): {text}"));
        assert_eq!(problem["status"], status, "{text}");
        assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()), "{text}");
        let detail = problem["detail"].as_str().unwrap_or_else(|| panic!("no detail: {text}"));
        assert!(!detail.is_empty(), "{text}");
        for inside in ["127.0.0.1", "localhost", "os error", "/tmp", ".rs", "pingora", "hyper", "panicked"] {
            assert!(!text.contains(inside), "{inside:?} leaks: {text}");
        }
        assert!(!self.header("cache-control").is_some_and(|value| value.contains("immutable")), "an error must not be kept for a year");
        detail.to_owned()
    }
}

/// A request to send.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    method: &'static str,
    target: String,
    version: &'static str,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// The secret to prove the request with.
    secret: Option<String>,
}

impl Request {
    pub(crate) fn new(method: &'static str, target: impl Into<String>) -> Self {
        Self { method, target: target.into(), version: "HTTP/1.1", headers: Vec::new(), body: Vec::new(), secret: None }
    }

    pub(crate) fn get(target: impl Into<String>) -> Self {
        Self::new("GET", target)
    }

    pub(crate) fn http10(self) -> Self {
        Self { version: "HTTP/1.0", ..self }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Proves the request with this secret, as a node does. The proof covers the request as it is sent.
    pub(crate) fn proved(self, secret: &str) -> Self {
        Self { secret: Some(secret.to_owned()), ..self }
    }

    /// Adds a body of known length.
    pub(crate) fn body(self, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        let length = body.len().to_string();
        Self { body, ..self }.header("Content-Length", length)
    }

    /// Adds a body of unknown length, in chunks of this size.
    pub(crate) fn chunks(mut self, body: &[u8], size: usize) -> Self {
        for chunk in body.chunks(size) {
            self.body.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            self.body.extend_from_slice(chunk);
            self.body.extend_from_slice(b"\r\n");
        }
        self.body.extend_from_slice(b"0\r\n\r\n");
        self.header("Transfer-Encoding", "chunked")
    }

    /// Method, target, headers, and the body as it is sent.
    pub(crate) fn parts(&self) -> (&'static str, &str, &[(String, String)], &[u8]) {
        (self.method, &self.target, &self.headers, &self.body)
    }

    pub(crate) fn head_bytes(&self) -> Vec<u8> {
        let mut text = format!("{} {} {}\r\n", self.method, self.target, self.version);
        let mut headers = self.headers.clone();
        if !headers.iter().any(|(name, _)| name == "Host") {
            headers.insert(0, ("Host".into(), "castier.test".into()));
        }
        for (name, value) in &headers {
            text += &format!("{name}: {value}\r\n");
        }
        if let Some(secret) = &self.secret {
            text += &proof::line(secret, self.method, &self.target, &headers);
        }
        (text + "\r\n").into_bytes()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        [self.head_bytes(), self.body.clone()].concat()
    }

    /// Sends it on a new connection and reads the answer.
    pub(crate) async fn send(&self, to: SocketAddr) -> Reply {
        let alone = if self.version == "HTTP/1.0" { self.clone() } else { self.clone().header("Connection", "close") };
        let mut conn = Conn::open(to).await;
        conn.ask(&alone).await
    }
}

/// Gets a blob on a new connection.
pub(crate) async fn get(from: SocketAddr, blob: &Blob) -> Reply {
    Request::get(blob.path()).send(from).await
}

/// A connection.
pub(crate) struct Conn {
    pub(crate) wire: Wire,
}

impl Conn {
    pub(crate) async fn open(to: SocketAddr) -> Self {
        Self::try_open(to).await.unwrap()
    }

    /// Connects to a server that may be down.
    pub(crate) async fn try_open(to: SocketAddr) -> io::Result<Self> {
        let stream = within(DEADLINE, "connect", TcpSocket::new_v4().unwrap().connect(to)).await?;
        Ok(Self { wire: Wire::new(stream) })
    }

    /// A connection with a receive buffer of a few kilobytes.
    pub(crate) async fn narrow(to: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Self { wire: Wire::new(within(DEADLINE, "connect", socket.connect(to)).await.unwrap()) }
    }

    /// Sends raw bytes. If the server stops reading, its answer has the reason.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        within(DEADLINE, "sending", self.wire.write(bytes)).await.is_ok()
    }

    pub(crate) async fn ask(&mut self, request: &Request) -> Reply {
        self.send(&request.bytes()).await;
        self.reply(request.method).await
    }

    /// The head of the next answer, interim ones included; `None` at the end of the connection.
    pub(crate) async fn head(&mut self) -> Option<Head> {
        within(DEADLINE, "an answer", self.wire.head()).await.unwrap_or(None)
    }

    /// The next final answer, to a request of this method.
    pub(crate) async fn reply(&mut self, method: &str) -> Reply {
        let start = Instant::now();
        let mut reply = Reply::default();
        loop {
            let Some(head) = self.head().await else { return reply };
            (reply.status, reply.head) = (status_of(&head), head);
            if reply.status >= 200 {
                break;
            }
        }
        reply.head_after = start.elapsed();
        let mut framing = framing(method, &reply.head);
        loop {
            match within(DEADLINE, "the rest of a body", self.wire.piece(&mut framing, usize::MAX)).await {
                Ok(Some(piece)) => {
                    reply.first_byte_after.get_or_insert_with(|| start.elapsed());
                    reply.body.extend_from_slice(piece);
                }
                end => {
                    reply.complete = end.is_ok();
                    return reply;
                }
            }
        }
    }

    /// Whether the server closes the connection within the deadline. Further bytes are an error.
    pub(crate) async fn closed(&mut self) -> bool {
        matches!(within(DEADLINE, "the connection's end", self.wire.head()).await, Ok(None) | Err(_))
    }
}

fn status_of(head: &Head) -> u16 {
    head.first.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status line: {:?}", head.first))
}

fn framing(method: &str, head: &Head) -> Framing {
    match status_of(head) {
        204 | 304 => Framing::Length(0),
        _ if method == "HEAD" => Framing::Length(0),
        _ => head.framing(Framing::Close),
    }
}

/// A GET of a blob that checks every byte and stores none. It can be slow, or leave early.
#[derive(Clone, Default)]
pub(crate) struct Download {
    /// Close the connection after this many bytes.
    pub(crate) hang_up_after: Option<u64>,
    /// Read at most this many bytes at a time, and pause this long after each.
    pub(crate) slowly: Option<(usize, Duration)>,
    /// Counts the downloads that have their first byte.
    pub(crate) started: Arc<AtomicU64>,
    /// The bytes received so far.
    pub(crate) received: Arc<AtomicU64>,
}

/// The result of a [`Download`].
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    pub(crate) cache_status: String,
    /// The bytes received.
    pub(crate) received: u64,
    /// The offset of the first wrong byte.
    pub(crate) wrong_at: Option<u64>,
    /// Whether a client would see it as the complete blob.
    pub(crate) complete: bool,
}

impl Outcome {
    #[track_caller]
    pub(crate) fn assert_is(&self, blob: &Blob) {
        let right = self.status == 200 && self.complete && self.wrong_at.is_none() && self.received == blob.size;
        assert!(right, "not the {} bytes: {self:?}", blob.size);
    }

    /// Asserts that no client would see it as the complete blob.
    #[track_caller]
    pub(crate) fn assert_no_whole_lie(&self, blob: &Blob) {
        let whole = self.status == 200 && self.complete;
        assert!(!whole || (self.wrong_at.is_none() && self.received == blob.size), "a lie was delivered as the whole blob: {self:?}");
    }
}

impl Download {
    pub(crate) async fn of(&self, blob: &Blob, from: SocketAddr) -> Outcome {
        let conn = if self.slowly.is_some() { Conn::narrow(from).await } else { Conn::open(from).await };
        self.over(conn, blob).await
    }

    /// The same on an existing connection.
    pub(crate) async fn over(&self, mut conn: Conn, blob: &Blob) -> Outcome {
        let mut outcome = Outcome { status: 0, cache_status: String::new(), received: 0, wrong_at: None, complete: false };
        conn.send(&Request::get(blob.path()).header("Connection", "close").bytes()).await;
        // No deadline here: the caller has one for the whole download, and may hold the origin for long.
        let Ok(Some(head)) = conn.wire.head().await else { return outcome };
        outcome.status = status_of(&head);
        outcome.cache_status = head.header("cache-status").unwrap_or("").to_owned();
        outcome.complete = self.body(&mut conn, framing("GET", &head), blob, &mut outcome).await.is_ok_and(|end| end);
        outcome
    }

    /// Whether the body was complete.
    async fn body(&self, conn: &mut Conn, mut framing: Framing, blob: &Blob, outcome: &mut Outcome) -> io::Result<bool> {
        let most = self.slowly.map_or(usize::MAX, |(most, _)| most);
        while let Some(piece) = conn.wire.piece(&mut framing, most).await? {
            if outcome.received == 0 {
                self.started.fetch_add(1, Ordering::SeqCst);
            }
            if outcome.status == 200 && outcome.wrong_at.is_none() && !blob.is_at(outcome.received, piece) {
                outcome.wrong_at = Some(outcome.received);
            }
            outcome.received += piece.len() as u64;
            self.received.fetch_add(piece.len() as u64, Ordering::Relaxed);
            if self.hang_up_after.is_some_and(|most| outcome.received >= most) {
                return Ok(false);
            }
            if let Some((_, pause)) = self.slowly {
                tokio::time::sleep(pause).await;
            }
        }
        Ok(true)
    }
}
