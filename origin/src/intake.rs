//! The body of a request, on its way in.

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, Version, header, request};
use http_body::Body as _;
use hyper::body::Incoming;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};

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
    silence: Duration,
    clock: Option<Pin<Box<Sleep>>>,
    /// The clock runs: somebody asked, and nothing has come since. While nobody asks, silence is not the client's fault.
    running: bool,
}

impl Intake {
    pub(crate) fn new(head: &request::Parts, body: Incoming, silence: Duration) -> Self {
        Self {
            body: Some(body),
            waits: head.version >= Version::HTTP_11 && expects_continue(&head.headers),
            silence,
            clock: None,
            running: false,
        }
    }

    /// The length that was declared, if one was.
    pub(crate) fn declared(&self) -> Option<u64> {
        self.body.as_ref().and_then(|body| body.size_hint().exact())
    }

    /// Whether the client holds the body back until it is asked for it.
    pub(crate) const fn waits(&self) -> bool {
        self.waits
    }

    fn is_silent(&mut self, cx: &mut Context<'_>) -> bool {
        let end = Instant::now() + self.silence;
        let clock = self.clock.get_or_insert_with(|| Box::pin(sleep_until(end)));
        if !std::mem::replace(&mut self.running, true) {
            clock.as_mut().reset(end);
        }
        clock.as_mut().poll(cx).is_ready()
    }
}

fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

impl Stream for Intake {
    type Item = Result<Bytes, Broken>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        this.waits = false;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let frame = match Pin::new(body).poll_frame(cx) {
            Poll::Pending if this.is_silent(cx) => Some(Err(Broken::Silent)),
            pending @ Poll::Pending => return pending.map(|_| None),
            Poll::Ready(frame) => frame.map(|frame| frame.map_err(|_| Broken::Off)),
        };
        this.running = false;
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
        let mut rest = Self { body: Some(body), waits: true, silence: DRAIN_TIME, clock: None, running: false };
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

/// An [`Intake`] for `multer`, which buffers whatever a stream has to give until it finds what it is looking for. So it
/// gets one chunk at a time, and only as many bytes as it has been allowed.
pub(crate) struct Rationed {
    intake: Intake,
    /// Bytes that may still be handed out; whoever reads the form changes it as the form goes on.
    ration: Arc<AtomicU64>,
    /// A chunk was handed out, and the next one must wait until it has been looked at.
    full: bool,
}

/// Why a form ended early.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum FormBroken {
    /// The body that carries it did.
    #[error(transparent)]
    Body(#[from] Broken),
    /// What stands before the file is longer than allowed.
    #[error("what stands before the file is too long")]
    TooLong,
}

impl Rationed {
    pub(crate) fn new(intake: Intake, ration: Arc<AtomicU64>) -> Self {
        Self { intake, ration, full: false }
    }
}

impl Stream for Rationed {
    type Item = Result<Bytes, FormBroken>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.full) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(chunk) = ready!(Pin::new(&mut self.intake).poll_next(cx)) else { return Poll::Ready(None) };
        self.full = true;
        let chunk = chunk?;
        let taken = self.ration.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(chunk.len() as u64));
        Poll::Ready(Some(taken.map(|_| chunk).map_err(|_| FormBroken::TooLong)))
    }
}
