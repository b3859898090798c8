//! The body of a request, on its way in.

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

/// How much of a body that nobody wants is read all the same, and for how long.
const DRAIN_BYTES: u64 = 64 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Why a body ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    /// Nothing came for too long.
    #[error("the client sent nothing for too long")]
    Silent,
    /// The connection ended, or what came is not HTTP.
    #[error("the body broke off")]
    Off,
}

/// A request's body as a stream of chunks that gives up on a silent client.
///
/// Dropped before its end, it reads on in the background, within bounds: clients that send first and listen later can
/// then read an early answer, where a closed connection would be reset under them.
pub(crate) struct Intake {
    body: Option<Incoming>,
    /// The client waits for `100 Continue`, which hyper sends when the body is first asked for.
    waits: bool,
    /// Runs while somebody asks and nothing comes. While nobody asks, silence is not the client's fault.
    silence: StallTimeout,
}

impl Intake {
    pub(crate) fn new(head: &request::Parts, body: Incoming, silence: Duration) -> Self {
        Self { body: Some(body), waits: expects_continue(head.version, &head.headers), silence: StallTimeout::new(silence) }
    }

    /// The length that was declared, if one was.
    pub(crate) fn declared(&self) -> Option<u64> {
        self.body.as_ref().and_then(|body| body.size_hint().exact())
    }

    /// Whether the client holds the body back until it is asked for it.
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
            // Trailers say nothing that matters here.
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame.into_data().unwrap_or_default()))),
            // Neither an end nor a broken connection has a rest that could be drained.
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
        // Who waits to be asked has not sent anything, and asking now would make it send in vain.
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
            // Without this, dropping the rest would begin to drain it again.
            drop(rest.body.take());
        });
    }
}
