//! The answer to a request, on its way out, and the record that is made of it.

use crate::{
    Shared,
    connection_timeouts::Activity,
    metrics::label,
    server::Seat,
    store::{Fault, Reader},
};
use bytes::Bytes;
use castier_serverkit::{
    access_log::{self, Access, LOGGED_AGENT, LOGGED_PATH, beginning},
    otlp::Spans,
    series::CLIENT_GONE,
    write_access_record,
};
use castier_wire::{forwarded, trace::Trace};
use http::{HeaderValue, Method, StatusCode, Version, request};
use http_body::{Body, Frame, SizeHint};
use std::{
    mem,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::task::{JoinHandle, spawn_blocking};

/// How much of a blob is read, or gathered before it is written, in one go.
const CHUNK: usize = 256 << 10;
/// With more blobs than this under way at once, chunks become small, so that a crowd of slow clients costs little memory.
const CROWD: usize = 512;
const SMALL_CHUNK: usize = 32 << 10;

/// What a transfer among `transfers` at the same time may hold.
pub(crate) const fn chunk_for(transfers: usize) -> usize {
    if transfers > CROWD { SMALL_CHUNK } else { CHUNK }
}

/// The body was cut, so that the client cannot mistake it for a whole blob. The log knows why.
#[derive(Debug, thiserror::Error)]
#[error("the blob was cut")]
pub(crate) struct Cut;

/// What an answer carries.
pub(crate) enum Content {
    /// Nothing, or nothing more.
    Empty,
    /// Bytes at hand.
    Bytes(Bytes),
    /// A blob or the like, as it is read.
    Blob(Streaming),
}

/// What an answer too long to be held is made from, a chunk at a time. Blocks.
pub(crate) trait Source: Send + 'static {
    /// The next chunk, of about `most` bytes.
    fn next(&mut self, most: usize) -> Result<Bytes, Fault>;
    /// Whether everything has been handed out.
    fn is_done(&self) -> bool;
}

impl Source for Reader {
    fn next(&mut self, most: usize) -> Result<Bytes, Fault> {
        self.next(most)
    }

    fn is_done(&self) -> bool {
        self.is_done()
    }
}

/// A blob, an entry or a list being read: at most one chunk ahead of the client.
pub(crate) struct Streaming {
    next: Next,
    chunk: usize,
    _seat: Seat,
}

enum Next {
    /// Read, not yet sent; and the reader, which may have more.
    Chunk(Bytes, Box<dyn Source>),
    /// A chunk is being read.
    Reading(JoinHandle<(Result<Bytes, Fault>, Box<dyn Source>)>),
    /// All was sent, or nothing more will be.
    End,
}

impl Streaming {
    /// Goes on where `reader` is after `first`.
    pub(crate) fn new(first: Bytes, reader: impl Source, chunk: usize, seat: Seat) -> Self {
        Self { next: Next::Chunk(first, Box::new(reader)), chunk, _seat: seat }
    }

    /// The next chunk, which may be empty; none at the end.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        loop {
            match mem::replace(&mut self.next, Next::End) {
                Next::Chunk(bytes, mut reader) => {
                    if !reader.is_done() {
                        let most = self.chunk;
                        self.next = Next::Reading(spawn_blocking(move || (reader.next(most), reader)));
                    }
                    return Poll::Ready(Some(Ok(bytes)));
                }
                Next::Reading(mut job) => match Pin::new(&mut job).poll(cx) {
                    Poll::Pending => {
                        self.next = Next::Reading(job);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok((Ok(bytes), reader))) => self.next = Next::Chunk(bytes, reader),
                    Poll::Ready(Ok((Err(fault), _))) => return Poll::Ready(Some(Err(fault))),
                    Poll::Ready(Err(stopped)) => return Poll::Ready(Some(Err(Fault::Io(stopped.into())))),
                },
                Next::End => return Poll::Ready(None),
            }
        }
    }
}

/// The body of an answer. Dropped when all of it has been handed to the connection, or when the connection is gone.
pub(crate) struct Reply {
    pub(crate) content: Content,
    pub(crate) record: Record,
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = &mut *self;
        let chunk = match &mut this.content {
            Content::Empty => None,
            Content::Bytes(bytes) => Some(Ok(mem::take(bytes))),
            Content::Blob(streaming) => match streaming.poll_chunk(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(chunk) => chunk,
            },
        };
        if !matches!(this.content, Content::Blob(_)) {
            this.content = Content::Empty;
        }
        Poll::Ready(match chunk {
            None => None,
            Some(Ok(bytes)) => {
                this.record.bytes += bytes.len() as u64;
                Some(Ok(Frame::data(bytes)))
            }
            Some(Err(fault)) => {
                this.content = Content::Empty;
                this.record.shared.note(&fault);
                this.record.error = Some(format!("cut: {fault}"));
                Some(Err(Cut))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Empty => true,
            Content::Bytes(bytes) => bytes.is_empty(),
            Content::Blob(streaming) => matches!(streaming.next, Next::End),
        }
    }

    /// Tells hyper the `Content-Length` of bytes at hand. A blob's answer has that header anyway.
    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Empty => SizeHint::with_exact(0),
            Content::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Blob(_) => SizeHint::default(),
        }
    }
}

/// What is known of a request; logged and counted when it is over, however it ends.
pub(crate) struct Record {
    shared: Arc<Shared>,
    activity: Arc<Activity>,
    /// As far as trusted proxies tell.
    client: IpAddr,
    trace: Trace,
    method: Method,
    path: String,
    proto: Version,
    user_agent: Option<String>,
    begun: Instant,
    /// When the head of the answer was ready.
    answered: Option<Duration>,
    /// Why the answer was cut, or failed.
    error: Option<String>,
    /// None until there is an answer.
    status: Option<StatusCode>,
    /// Bytes of the body that were handed to the connection.
    bytes: u64,
}

impl Record {
    pub(crate) fn begin(shared: &Arc<Shared>, activity: Arc<Activity>, peer: SocketAddr, head: &request::Parts) -> Self {
        activity.begin();
        // Only as much of what the client sent is held as is logged.
        let agent = access_log::user_agent(&head.headers).map(|agent| beginning(&agent, LOGGED_AGENT).to_owned());
        Self {
            client: forwarded::client(peer.ip(), &head.headers, |address| shared.trusted_proxies.contains(address)),
            trace: access_log::trace_of(&head.headers, shared.spans.as_ref().map(Spans::sample)),
            shared: Arc::clone(shared),
            activity,
            method: head.method.clone(),
            path: beginning(head.uri.path(), LOGGED_PATH).to_owned(),
            proto: head.version,
            user_agent: agent,
            begun: Instant::now(),
            answered: None,
            error: None,
            status: None,
            bytes: 0,
        }
    }

    /// The name of the request.
    pub(crate) fn request_id(&self) -> Option<HeaderValue> {
        self.trace.tell_id()
    }

    /// There is an answer; and why it is not the one that was wanted.
    pub(crate) fn answer(&mut self, status: StatusCode, error: Option<String>) {
        self.status = Some(status);
        self.answered = Some(self.begun.elapsed());
        self.error = error;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.activity.end();
        let duration = self.begun.elapsed();
        let status = self.status.map_or(CLIENT_GONE, |status| status.as_u16());
        self.shared.metrics.count_request(self.method.as_str(), status, duration);
        let access = Access {
            method: self.method.as_str(),
            path: &self.path,
            status,
            bytes: self.bytes,
            took: duration,
            first_byte: self.answered,
            client: Some(self.client),
            proto: Some(self.proto),
            trace: Some(&self.trace),
            user_agent: self.user_agent.as_deref(),
            error: self.error.as_deref(),
            ..Access::default()
        };
        if let Some(spans) = self.shared.spans.as_ref().filter(|_| self.trace.is_sampled()) {
            spans.send(access.span(&self.trace, label(self.method.as_str()), None, None));
        }
        write_access_record!(INFO, "castier_origin::access", &access);
    }
}
