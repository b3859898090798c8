//! A scripted content-addressed origin: it waits, sends wrong answers and breaks off on request, and records its requests.

use super::{
    Blob,
    cluster::own_address,
    lie::{Break, Gate, Lie, Pace, RangeManner},
    proof,
    wire::{Framing, Head, Wire},
};
use castier_blob::Digest;
use castier_cluster::{Asked, Secrets};
use castier_wire::Target;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) digest: Option<Digest>,
    pub(crate) head: Head,
}

impl Seen {
    /// Its `Range`.
    pub(crate) fn range(&self) -> Option<&str> {
        self.head.header("range")
    }
}

/// A blob and the answers for it.
struct Held {
    blob: Blob,
    /// The answers to the next GETs, in order.
    next: VecDeque<Lie>,
    /// The answers to the next GETs of ranges that begin at these offsets, before all others.
    at: Vec<(u64, Lie)>,
    /// The answer to all GETs after them.
    then: Lie,
    /// Body bytes sent in all answers.
    sent: u64,
    /// Answers that castier broke off.
    abandoned: usize,
}

#[derive(Default)]
struct State {
    held: HashMap<Digest, Held>,
    /// The answers to the next uploads, in order; correct afterwards.
    uploads: VecDeque<Lie>,
    /// As a peer: the blobs with running flights.
    filling: HashSet<Digest>,
    /// `Expect` gets no answer, as by a server that does not know it, or whose disk hangs.
    ignores_expect: bool,
    /// No answers until this opens.
    frozen: Option<Gate>,
    seen: Vec<Seen>,
    /// As a peer: the secret to prove answers with.
    secrets: Option<Arc<Secrets>>,
    /// The last proof that it gave.
    proof: String,
}

/// The origin. Dropping it closes everything.
pub(crate) struct LyingOrigin {
    pub(crate) addr: SocketAddr,
    state: Arc<Mutex<State>>,
    /// Accepts, and owns all connections.
    accepting: JoinHandle<()>,
}

impl Drop for LyingOrigin {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl LyingOrigin {
    pub(crate) async fn start() -> Self {
        // On an address of its own: while it is down, nobody else may get its port.
        let listener = TcpListener::bind((own_address(), 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::default();
        Self { addr, accepting: tokio::spawn(accept(listener, Arc::clone(&state))), state }
    }

    /// Acts as a peer with this secret.
    pub(crate) async fn with_secret(secret: &str) -> Self {
        let peer = Self::start().await;
        peer.state.lock().secrets = Some(Arc::new(proof::secrets(secret)));
        peer
    }

    /// As a peer: the last proof that it gave with an answer.
    pub(crate) fn last_proof(&self) -> String {
        self.state.lock().proof.clone()
    }

    /// Closes the port and every connection.
    pub(crate) async fn down(&mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }

    /// Listens again, at the same address.
    pub(crate) async fn up(&mut self) {
        let listener = TcpListener::bind(self.addr).await.unwrap();
        self.accepting = tokio::spawn(accept(listener, Arc::clone(&self.state)));
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Adds `blob`, with correct answers.
    pub(crate) fn add(&self, blob: &Blob) {
        self.state.lock().held.insert(
            blob.digest,
            Held { blob: blob.clone(), next: VecDeque::new(), at: Vec::new(), then: Lie::honest(), sent: 0, abandoned: 0 },
        );
    }

    /// Adds a new blob.
    pub(crate) fn blob(&self, size: u64) -> Blob {
        let blob = Blob::new(size);
        self.add(&blob);
        blob
    }

    /// Adds a new blob, with these answers to its first GETs; correct afterwards.
    pub(crate) fn blob_with<const N: usize>(&self, size: u64, lies: [Lie; N]) -> Blob {
        let blob = self.blob(size);
        self.next(&blob, lies);
        blob
    }

    /// Sets the answers to the next GETs for `blob`.
    pub(crate) fn next<const N: usize>(&self, blob: &Blob, lies: [Lie; N]) {
        self.held(blob, |held| held.next.extend(lies));
    }

    /// Sets the answer to the next GET for a range of `blob` that begins at this offset.
    pub(crate) fn at(&self, blob: &Blob, offset: u64, lie: Lie) {
        self.held(blob, |held| held.at.push((offset, lie)));
    }

    /// Sets the answer to all GETs for `blob` after those of [`Self::next`].
    pub(crate) fn always(&self, blob: &Blob, lie: Lie) {
        self.held(blob, |held| held.then = lie);
    }

    /// Sets the answer to the next PUT or POST.
    pub(crate) fn next_upload(&self, lie: Lie) {
        self.state.lock().uploads.push_back(lie);
    }

    /// Answers all further uploads correctly.
    pub(crate) fn honest_uploads(&self) {
        self.state.lock().uploads.clear();
    }

    /// Gives no answer to `Expect`, and waits for the body.
    pub(crate) fn ignore_expect(&self) {
        self.state.lock().ignores_expect = true;
    }

    /// Accepts requests, and answers none until `gate` opens, like a stopped process.
    pub(crate) fn freeze(&self, gate: &Gate) {
        self.state.lock().frozen = Some(gate.clone());
    }

    /// Sets whether it reports a running flight of `blob` to other nodes.
    pub(crate) fn filling(&self, blob: &Blob, filling: bool) {
        let mut state = self.state.lock();
        if filling {
            state.filling.insert(blob.digest)
        } else {
            state.filling.remove(&blob.digest)
        };
    }

    pub(crate) fn forget(&self, blob: &Blob) {
        self.state.lock().held.remove(&blob.digest);
    }

    pub(crate) fn holds(&self, blob: &Blob) -> bool {
        self.state.lock().held.contains_key(&blob.digest)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.lock().seen.clone()
    }

    /// The number of requests for `blob` with this method.
    pub(crate) fn requests(&self, method: &str, blob: &Blob) -> Vec<Seen> {
        self.state.lock().seen.iter().filter(|seen| seen.method == method && seen.digest == Some(blob.digest)).cloned().collect()
    }

    pub(crate) fn gets(&self, blob: &Blob) -> usize {
        self.requests("GET", blob).len()
    }

    /// The body bytes of `blob` that were sent so far.
    pub(crate) fn sent(&self, blob: &Blob) -> u64 {
        self.held(blob, |held| held.sent)
    }

    /// The number of answers for `blob` that castier broke off.
    pub(crate) fn abandoned(&self, blob: &Blob) -> usize {
        self.held(blob, |held| held.abandoned)
    }

    fn held<T>(&self, blob: &Blob, action: impl FnOnce(&mut Held) -> T) -> T {
        action(self.state.lock().held.get_mut(&blob.digest).expect("the origin holds this blob"))
    }
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                connections.spawn(Connection { wire: Wire::new(stream), state: Arc::clone(&state), asked: None, forged: None }.serve());
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

struct Connection {
    wire: Wire,
    state: Arc<Mutex<State>>,
    /// The proof for the current answer.
    asked: Option<Asked>,
    /// What to send instead of a proof.
    forged: Option<String>,
}

/// Whether the connection stays open after an answer.
type Keep = bool;

impl Connection {
    async fn serve(mut self) {
        while let Ok(Some(head)) = self.wire.head().await {
            // An error while sending is what castier caused or must handle.
            if !matches!(self.answer(head).await, Ok(true)) {
                return;
            }
        }
    }

    async fn answer(&mut self, head: Head) -> io::Result<Keep> {
        let mut words = head.first.split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let digest = match Target::of(&target) {
            Target::Blob(digest) => Some(digest),
            _ => None,
        };
        let seen = Seen { method: method.clone(), target: target.clone(), digest, head: head.clone() };
        self.state.lock().seen.push(seen);
        let secrets = self.state.lock().secrets.clone();
        (self.asked, self.forged) = (secrets.and_then(|secrets| proof::admitted(&secrets, &head)), None);
        let frozen = self.state.lock().frozen.clone();
        if let Some(gate) = frozen {
            gate.pass().await;
        }
        match (method.as_str(), Target::of(&target)) {
            ("HEAD", Target::Blob(digest)) if self.state.lock().filling.contains(&digest) => {
                self.head("HTTP/1.1 504 Not Kept\r\nCastier-Flight: filling\r\nContent-Length: 7\r\n\r\n").await?;
                Ok(true)
            }
            ("GET" | "HEAD", Target::Blob(digest)) => self.blob(&method, digest, &head).await,
            ("PUT", Target::Blob(digest)) => self.upload(Some(digest), &head).await,
            ("POST", Target::Collection) => self.upload(None, &head).await,
            ("DELETE", Target::Blob(digest)) => {
                let status = if self.state.lock().held.remove(&digest).is_some() { 204 } else { 404 };
                self.status(status).await
            }
            (_, Target::Other) => self.echo(&method, &head).await,
            _ => self.status(400).await,
        }
    }

    /// Sends the head of an answer, and the bytes after it.
    async fn head(&mut self, answer: &str) -> io::Result<()> {
        let answer = match (&self.asked, &self.forged) {
            (Some(asked), None) => {
                let (answer, proof) = proof::proved(asked, answer);
                self.state.lock().proof = proof;
                answer
            }
            (_, Some(forged)) if !forged.is_empty() => answer.replacen("\r\n", &format!("\r\nCastier-Proof: {forged}\r\n"), 1),
            _ => answer.to_owned(),
        };
        self.wire.write(answer.as_bytes()).await
    }

    /// An answer without a blob.
    async fn status(&mut self, status: u16) -> io::Result<Keep> {
        self.status_with(status, "").await
    }

    async fn status_with(&mut self, status: u16, lines: &str) -> io::Result<Keep> {
        let place = if status / 100 == 3 { "Location: /elsewhere\r\n" } else { "" };
        let (length, body) = if status == 204 { (String::new(), "") } else { ("Content-Length: 7\r\n".to_owned(), "answer\n") };
        self.head(&format!("HTTP/1.1 {status} As Told\r\n{lines}{place}{length}\r\n{body}")).await?;
        Ok(true)
    }

    async fn upload(&mut self, claimed: Option<Digest>, head: &Head) -> io::Result<Keep> {
        if head.header("expect").is_some() && !self.state.lock().ignores_expect {
            if claimed.is_some_and(|claimed| self.state.lock().held.contains_key(&claimed)) {
                // The request's body is not read, so the connection must end.
                self.status(200).await?;
                return Ok(false);
            }
            self.wire.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let lie = self.state.lock().uploads.pop_front().unwrap_or_else(Lie::honest);
        self.forged = lie.proof.clone();
        let (mut framing, mut bytes) = (head.framing(Framing::Length(0)), Vec::new());
        while let Some(piece) = self.wire.piece(&mut framing, usize::MAX).await? {
            bytes.extend_from_slice(piece);
            if matches!(lie.broken, Some((at, _)) if bytes.len() as u64 >= at) {
                return Ok(false);
            }
        }
        if let Some(gate) = &lie.hold {
            gate.pass().await;
        }
        if let Some(status) = lie.status {
            return self.status(status).await;
        }
        let blob = Blob::of(&bytes);
        if claimed.is_some_and(|claimed| claimed != blob.digest) {
            return self.status(422).await;
        }
        let held = Held { blob: blob.clone(), next: VecDeque::new(), at: Vec::new(), then: Lie::honest(), sent: 0, abandoned: 0 };
        let new = self.state.lock().held.insert(blob.digest, held).is_none();
        if let Some(gate) = &lie.hold_answer {
            gate.pass().await;
        }
        let (path, digest, size) = (blob.path(), blob.digest, blob.size);
        if claimed.is_some() {
            return self.status(if new { 201 } else { 200 }).await;
        }
        let body = format!("{{\"digest\":\"{digest}\",\"size\":{size}}}");
        let length = body.len();
        self.head(&format!("HTTP/1.1 201 Created\r\nLocation: {path}\r\nContent-Length: {length}\r\n\r\n{body}")).await?;
        Ok(true)
    }

    /// A request outside `/cas`: answers with the request's body, or without one with the request's head.
    async fn echo(&mut self, method: &str, head: &Head) -> io::Result<Keep> {
        let hop = "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n";
        // A health check of a peer.
        let node = if head.first.starts_with("GET /healthz ") { "Castier-Node: scripted\r\n" } else { "" };
        self.head(&format!("HTTP/1.1 200 OK\r\n{hop}{node}X-From: origin\r\nTransfer-Encoding: chunked\r\n\r\n")).await?;
        let mut framing = head.framing(Framing::Length(0));
        let mut any = false;
        while let Some(piece) = self.wire.piece(&mut framing, usize::MAX).await? {
            any = true;
            let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
            self.wire.write(&chunk).await?;
        }
        if method != "HEAD" {
            if !any {
                let headers: String = head.headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
                let text = format!("{}\n{headers}", head.first);
                self.wire.write(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await?;
            }
            self.wire.write(b"0\r\n\r\n").await?;
        }
        Ok(true)
    }

    async fn blob(&mut self, method: &str, digest: Digest, asked: &Head) -> io::Result<Keep> {
        let range = asked.header("range");
        let found = self.state.lock().held.get_mut(&digest).map(|held| {
            // A HEAD is always answered correctly, and does not use up a fault for a GET.
            let first = range.and_then(|range| parse_range(range, held.blob.size)).map(|(first, _)| first);
            let at = held.at.iter().position(|(at, _)| Some(*at) == first);
            let lie = match at {
                _ if method == "HEAD" => None,
                Some(at) => Some(held.at.remove(at).1),
                None => held.next.pop_front(),
            };
            (held.blob.clone(), lie.unwrap_or_else(|| held.then.clone()))
        });
        let Some((blob, lie)) = found else { return if method == "HEAD" { self.bare(404, "").await } else { self.status(404).await } };
        self.forged = lie.proof.clone();
        if let Some(gate) = &lie.hold {
            gate.pass().await;
        }
        if lie.garbage {
            self.wire.write(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").await?;
            return Ok(false);
        }
        if let Some(status) = lie.status {
            return if method == "HEAD" { self.bare(status, lie.lines).await } else { self.status_with(status, lie.lines).await };
        }
        let is_other = asked.header("if-match").is_some_and(|wanted| lie.etag.is_some_and(|etag| etag != wanted));
        if is_other && !lie.overlooks_if_match && lie.range != RangeManner::Ignore {
            return self.status(412).await;
        }
        let part = range.and_then(|range| parse_range(range, blob.size)).filter(|_| lie.range != RangeManner::Ignore);
        let (mut first, last) = part.unwrap_or((0, blob.size.saturating_sub(1)));
        if part.is_some() && first >= blob.size {
            return self.status(416).await;
        }
        if let (Some(_), RangeManner::Shift(by)) = (part, lie.range) {
            first = (first + by).min(last);
        }
        let end = if blob.size == 0 { 0 } else { last + 1 };
        let end = if lie.nothing { first } else { end };
        let mut head = match part {
            Some(_) if lie.range != RangeManner::PartAs200 => {
                format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{}\r\n", blob.size)
            }
            _ => "HTTP/1.1 200 OK\r\n".to_owned(),
        };
        if let Some(etag) = lie.etag {
            head += &format!("Accept-Ranges: bytes\r\nETag: {etag}\r\n");
        }
        if lie.chunked {
            head += "Transfer-Encoding: chunked\r\n";
        } else {
            head += &format!("Content-Length: {}\r\n", lie.claimed.unwrap_or(end - first));
        }
        if lie.close == Some(true) {
            head += "Connection: close\r\n";
        }
        self.head(&format!("{head}\r\n")).await?;
        if method == "HEAD" {
            return Ok(true);
        }
        let body = Body { blob, end, lie, wire: &mut self.wire, state: &self.state };
        body.send(first).await
    }

    /// A status without a body, for HEAD.
    async fn bare(&mut self, status: u16, lines: &str) -> io::Result<Keep> {
        self.head(&format!("HTTP/1.1 {status} As Told\r\n{lines}Content-Length: 7\r\n\r\n")).await?;
        Ok(true)
    }
}

/// Parses `bytes=a-` or `bytes=a-b`, the only ranges that a resume needs.
fn parse_range(range: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let last = if last.is_empty() { u64::MAX } else { last.parse().ok()? };
    Some((first.parse().ok()?, last.min(size.saturating_sub(1))))
}

/// A body that is being sent.
struct Body<'a> {
    blob: Blob,
    /// The offset after the last byte.
    end: u64,
    lie: Lie,
    wire: &'a mut Wire,
    state: &'a Mutex<State>,
}

impl Body<'_> {
    async fn send(mut self, first: u64) -> io::Result<Keep> {
        let sent = self.pieces(first).await;
        if sent.is_err()
            && let Some(held) = self.state.lock().held.get_mut(&self.blob.digest)
        {
            held.abandoned += 1;
        }
        if !sent? {
            return Ok(false);
        }
        if self.lie.extra > 0 {
            self.piece(&vec![b'x'; usize::try_from(self.lie.extra).unwrap()]).await?;
        }
        if self.lie.chunked {
            self.wire.write(b"0\r\n\r\n").await?;
        }
        let claimed_more = self.lie.claimed.is_some_and(|claimed| claimed != self.end - first);
        Ok(self.lie.close.is_none() && !claimed_more)
    }

    /// Returns false if the fault was to break off.
    async fn pieces(&mut self, mut at: u64) -> io::Result<bool> {
        loop {
            let mut until = self.end;
            if let Some((stop, how)) = self.lie.broken {
                if at >= stop {
                    if how == Break::Reset {
                        reset(&self.wire.stream);
                    }
                    return Ok(false);
                }
                until = until.min(stop);
            }
            if let Some((stop, gate)) = self.lie.stall.take() {
                if at >= stop {
                    self.gone_or(gate.pass()).await?;
                } else {
                    until = until.min(stop);
                    self.lie.stall = Some((stop, gate));
                }
            }
            if at >= self.end {
                return Ok(true);
            }
            match self.lie.pace {
                Pace::Full => {}
                Pace::Dribble => until = at + 1,
                Pace::BytesPerSecond(rate) => {
                    until = until.min(at + (rate / 20).max(1));
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            let blob = self.blob.clone();
            let piece = blob.slice(at, until);
            match self.lie.flip.and_then(|flip| flip.checked_sub(at)).and_then(|flip| usize::try_from(flip).ok()) {
                Some(flip) if flip < piece.len() => {
                    let mut piece = piece.to_vec();
                    piece[flip] ^= 1;
                    self.piece(&piece).await?;
                }
                _ => self.piece(piece).await?,
            }
            at += piece.len() as u64;
            if let Some(held) = self.state.lock().held.get_mut(&self.blob.digest) {
                held.sent += piece.len() as u64;
            }
        }
    }

    async fn piece(&mut self, piece: &[u8]) -> io::Result<()> {
        if !self.lie.chunked {
            return self.wire.write(piece).await;
        }
        self.wire.write(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).await
    }

    /// Waits, unless the client disconnects.
    async fn gone_or(&mut self, wait: impl Future<Output = ()>) -> io::Result<()> {
        let mut byte = [0];
        tokio::select! {
            () = wait => Ok(()),
            read = self.wire.stream.peek(&mut byte) => match read? {
                0 => Err(io::ErrorKind::ConnectionAborted.into()),
                _ => Ok(()),
            },
        }
    }
}

/// Makes the close of the connection a reset, which drops unsent bytes.
pub(crate) fn reset(stream: &TcpStream) {
    stream.set_zero_linger().unwrap();
}
