//! The body of a request.

use bytes::Bytes;
use castier_serverkit::stall_timeout::StallTimeout;
use castier_wire::expects_continue;
use futures::{Stream, StreamExt as _};
use http::request;
use http_body::Body as _;
use hyper::body::Incoming;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::runtime::Handle;

/// The most bytes of an unwanted body that are read, and the longest time for that.
const DRAIN_BYTES: u64 = 64 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Why a body ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    /// The client sent nothing for `limits.idle_timeout`.
    #[error("the client sent nothing for too long")]
    Silent,
    /// The connection closed, or the framing of the body is invalid.
    #[error("the body broke off")]
    Off,
}

/// A request's body as a stream of chunks, with a timeout between chunks.
///
/// If it is dropped before its end, it reads and discards the rest in the background, within [`DRAIN_BYTES`] and [`DRAIN_TIME`]. Many clients
/// read the answer only after they have sent everything. If the connection were closed earlier, they would get a reset instead.
pub(crate) struct Intake {
    body: Option<Incoming>,
    /// The client waits for `100 Continue`, which hyper sends at the first read of the body.
    waits: bool,
    /// Runs only while a read waits. Without a read, the client cannot send.
    silence: StallTimeout,
}

impl Intake {
    pub(crate) fn new(head: &request::Parts, body: Incoming, silence: Duration) -> Self {
        Self { body: Some(body), waits: expects_continue(head.version, &head.headers), silence: StallTimeout::new(silence) }
    }

    /// `Content-Length`, if the request has one.
    pub(crate) fn declared(&self) -> Option<u64> {
        self.body.as_ref().and_then(|body| body.size_hint().exact())
    }

    /// Whether the client waits for `100 Continue` before it sends the body.
    pub(crate) const fn waits(&self) -> bool {
        self.waits
    }
}

impl Stream for Intake {
    type Item = Result<Bytes, Broken>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        this.waits = false;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let frame = match Pin::new(body).poll_frame(cx) {
            Poll::Pending if this.silence.is_over(cx) => Some(Err(Broken::Silent)),
            pending @ Poll::Pending => return pending.map(|_| None),
            Poll::Ready(frame) => frame.map(|frame| frame.map_err(|_| Broken::Off)),
        };
        this.silence.reset();
        match frame {
            // Trailers are ignored.
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame.into_data().unwrap_or_default()))),
            // After an error or the end there is nothing to drain.
            Some(Err(error)) => {
                this.body = None;
                Poll::Ready(Some(Err(error)))
            }
            None => {
                this.body = None;
                Poll::Ready(None)
            }
        }
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        // A client that waits for `100 Continue` has sent nothing. A read now would make it send the body.
        let Some(body) = self.body.take().filter(|body| !self.waits && !body.is_end_stream()) else { return };
        let Ok(runtime) = Handle::try_current() else { return };
        let mut rest = Self { body: Some(body), waits: true, silence: StallTimeout::new(DRAIN_TIME) };
        runtime.spawn(async move {
            let drain = async {
                let mut read = 0;
                while let Some(Ok(chunk)) = rest.next().await {
                    read += chunk.len() as u64;
                    if read > DRAIN_BYTES {
                        break;
                    }
                }
            };
            tokio::time::timeout(DRAIN_TIME, drain).await.ok();
            // Otherwise the drop of `rest` would start to drain again.
            drop(rest.body.take());
        });
    }
}
