//! The body of an answer, and the access record of its request.

use crate::{
    Shared,
    connection_timeouts::Activity,
    metrics::label,
    server::Slot,
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
use futures::{StreamExt as _, stream::BoxStream};
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

/// How many bytes of a blob are read or written at once.
const CHUNK: usize = 256 << 10;
/// With more transfers than this at once, chunks become small, so that many slow clients cost little memory.
const CROWD: usize = 512;
const SMALL_CHUNK: usize = 32 << 10;

/// The size of a chunk while there are `transfers` at once.
pub(crate) const fn chunk_for(transfers: usize) -> usize {
    if transfers > CROWD { SMALL_CHUNK } else { CHUNK }
}

/// The body was cut, so that the client cannot take it for a whole blob. The log has the reason.
#[derive(Debug, thiserror::Error)]
#[error("the blob was cut")]
pub(crate) struct Cut;

/// The content of an answer.
pub(crate) enum Content {
    /// No bytes, or no more.
    Empty,
    /// Bytes in memory.
    Bytes(Bytes),
    /// Bytes that are read from files while they are sent.
    Blob(Streaming),
    /// Bytes that come from elsewhere.
    Stream(BoxStream<'static, Result<Bytes, castier_cache::Fault>>),
}

/// Reads content that is too long for memory, one chunk at a time. Blocks.
pub(crate) trait Source: Send + 'static {
    /// The next chunk, of about `most` bytes.
    fn next(&mut self, most: usize) -> Result<Bytes, Fault>;
    /// Whether there are no more chunks.
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

/// A blob, an entry or a list that is read while it is sent, at most one chunk ahead of the client.
pub(crate) struct Streaming {
    next: Next,
    chunk: usize,
    _slot: Slot,
}

enum Next {
    /// A chunk that was read and not sent yet, and the reader, which may have more.
    Chunk(Bytes, Box<dyn Source>),
    /// A chunk is being read.
    Reading(JoinHandle<(Result<Bytes, Fault>, Box<dyn Source>)>),
    /// Nothing more is sent: everything was, or an error came.
    End,
}

impl Streaming {
    /// Sends `first`, then the other chunks of `reader`.
    pub(crate) fn new(first: Bytes, reader: impl Source, chunk: usize, slot: Slot) -> Self {
        Self { next: Next::Chunk(first, Box::new(reader)), chunk, _slot: slot }
    }

    /// The next chunk, which may be empty; `None` at the end.
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

/// The body of an answer. hyper drops it when it has taken all bytes, or when the connection has closed.
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
                Poll::Ready(chunk) => chunk.map(|chunk| {
                    chunk.map_err(|fault| {
                        this.record.shared.note(&fault);
                        fault.to_string()
                    })
                }),
            },
            Content::Stream(bytes) => match bytes.poll_next_unpin(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(chunk) => chunk.map(|chunk| chunk.map_err(|fault| fault.to_string())),
            },
        };
        if matches!(this.content, Content::Bytes(_)) {
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
            Content::Stream(_) => false,
        }
    }

    /// hyper makes `Content-Length` from this for bytes in memory. The answer with a blob has that header already.
    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Empty => SizeHint::with_exact(0),
            Content::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Blob(_) | Content::Stream(_) => SizeHint::default(),
        }
    }
}

/// The facts of a request. Its drop, at the end of the request, logs and counts them.
pub(crate) struct Record {
    shared: Arc<Shared>,
    activity: Arc<Activity>,
    /// The client's address; behind a trusted proxy, the one that the proxy names.
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
    /// `None` until there is an answer.
    status: Option<StatusCode>,
    /// Bytes of the body that hyper has taken.
    bytes: u64,
}

impl Record {
    pub(crate) fn begin(shared: &Arc<Shared>, activity: Arc<Activity>, address: SocketAddr, head: &request::Parts) -> Self {
        activity.begin();
        // The record holds only the parts of the client's texts that are logged.
        let agent = access_log::user_agent(&head.headers).map(|agent| beginning(&agent, LOGGED_AGENT).to_owned());
        Self {
            client: forwarded::client(address.ip(), &head.headers, |address| shared.trusted_proxies.contains(address)),
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

    /// The id of the request.
    pub(crate) fn request_id(&self) -> Option<HeaderValue> {
        self.trace.id_header()
    }

    /// Records the status of the answer, and the error if the request failed.
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
