//! A connection that loses patience: with a client that sends nothing where it should, or takes nothing of what it asked for.
//!
//! hyper's own head timeout runs while a connection idles, too; here the two are told apart, as the configuration does.

use castier_config::OriginLimits;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

/// What a connection is doing, told by whoever answers its requests. While one is being answered, it is not the
/// connection's business how long that takes or how slowly its body comes.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    begun: AtomicU32,
    ended: AtomicU32,
}

impl Activity {
    pub(crate) fn begin(&self) {
        self.begun.fetch_add(1, Relaxed);
    }

    pub(crate) fn end(&self) {
        self.ended.fetch_add(1, Relaxed);
    }

    /// Whether a request is being answered.
    pub(crate) fn is_busy(&self) -> bool {
        self.begun.load(Relaxed) != self.ended.load(Relaxed)
    }
}

/// A timer that is set far more often than it rings: the deadline moves at no cost, and the sleep follows when it ends.
struct Clock(Option<Pin<Box<Sleep>>>);

impl Clock {
    fn has_rung(&mut self, deadline: Instant, cx: &mut Context<'_>) -> bool {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return true;
            }
            sleep.as_mut().reset(deadline);
        }
        false
    }
}

/// The wrapped connection.
pub(crate) struct Patience<S> {
    stream: S,
    activity: Arc<Activity>,
    /// Requests begun when the connection was last read.
    seen: u32,
    /// From the first byte of a request to the end of its head; for the first request, from the beginning of the connection.
    head_timeout: Duration,
    /// Between requests.
    idle_timeout: Duration,
    /// Between two bytes that the client takes.
    write_timeout: Duration,
    read_by: Option<Instant>,
    read_clock: Clock,
    write_by: Option<Instant>,
    write_clock: Clock,
}

impl<S> Patience<S> {
    pub(crate) fn new(stream: S, activity: Arc<Activity>, limits: &OriginLimits) -> Self {
        let head_timeout = limits.header_timeout.get();
        Self {
            stream,
            activity,
            seen: 0,
            head_timeout,
            idle_timeout: limits.idle_timeout.get(),
            write_timeout: limits.write_timeout.get(),
            read_by: Some(Instant::now() + head_timeout),
            read_clock: Clock(None),
            write_by: None,
            write_clock: Clock(None),
        }
    }

    /// Watches the outcome of a write. Only a write that is stuck costs anything.
    fn watch_write<T>(&mut self, outcome: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.write_by = None;
            return outcome;
        }
        let deadline = *self.write_by.get_or_insert_with(|| Instant::now() + self.write_timeout);
        if self.write_clock.has_rung(deadline, cx) { Poll::Ready(Err(io::ErrorKind::TimedOut.into())) } else { Poll::Pending }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patience<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let filled = buf.filled().len();
        let outcome = Pin::new(&mut this.stream).poll_read(cx, buf);
        let begun = this.activity.begun.load(Relaxed);
        let busy = begun != this.activity.ended.load(Relaxed);
        if busy || begun != this.seen {
            this.seen = begun;
            this.read_by = None;
        }
        if busy {
            return outcome;
        }
        // The first request has its deadline from the start; a later one from its first byte, before which the connection idles.
        let waiting_for_first = begun == 0;
        if outcome.is_ready() {
            if buf.filled().len() > filled && !waiting_for_first {
                let by = Instant::now() + this.head_timeout;
                this.read_by = Some(this.read_by.map_or(by, |idle| idle.min(by)));
            }
            return outcome;
        }
        let deadline = *this.read_by.get_or_insert_with(|| Instant::now() + this.idle_timeout);
        if this.read_clock.has_rung(deadline, cx) { Poll::Ready(Err(io::ErrorKind::TimedOut.into())) } else { Poll::Pending }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patience<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch_write(outcome, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch_write(outcome, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch_write(outcome, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use castier_config::Span;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    const SHORT: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(3600);

    const SECOND: Duration = Duration::from_secs(1);

    fn pair(head: Duration, idle: Duration) -> (Patience<DuplexStream>, DuplexStream, Arc<Activity>) {
        let (near, far) = duplex(10);
        let activity = Arc::new(Activity::default());
        let [header_timeout, idle_timeout, write_timeout] =
            [head, idle, SECOND].map(|time| Span::millis(u64::try_from(time.as_millis()).unwrap()));
        let limits = OriginLimits { header_timeout, idle_timeout, write_timeout, ..OriginLimits::default() };
        (Patience::new(near, Arc::clone(&activity), &limits), far, activity)
    }

    /// Sends a byte every now and then, for as long as anybody reads.
    async fn trickle(far: &mut DuplexStream) {
        while far.write_all(b"x").await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    }

    /// Reads until that fails: how long it took, and how many bytes there were.
    async fn read_until_failure(near: &mut Patience<DuplexStream>) -> (Duration, usize) {
        let (start, mut buffer, mut read) = (Instant::now(), [0; 10], 0);
        loop {
            match near.read(&mut buffer).await {
                Ok(n) => read += n,
                Err(e) => {
                    assert_eq!(e.kind(), io::ErrorKind::TimedOut);
                    return (start.elapsed(), read);
                }
            }
        }
    }

    #[tokio::test]
    async fn a_first_request_has_the_head_timeout_whatever_trickles_in() {
        let (mut near, mut far, _) = pair(SHORT, LONG);
        let (took, read) = tokio::select! {
            failed = read_until_failure(&mut near) => failed,
            () = trickle(&mut far) => panic!("closed"),
        };
        assert!(took >= SHORT && read > 0, "{took:?} {read}");
    }

    #[tokio::test]
    async fn a_later_request_may_not_trickle_either_but_its_first_byte_is_waited_for() {
        let (mut near, mut far, activity) = pair(SHORT, LONG);
        activity.begin();
        activity.end();
        tokio::time::timeout(SHORT * 3, read_until_failure(&mut near)).await.expect_err("idling is not trickling");
        let (took, read) = tokio::select! {
            failed = read_until_failure(&mut near) => failed,
            () = trickle(&mut far) => panic!("closed"),
        };
        assert!(took >= SHORT && read > 0, "{took:?} {read}");
    }

    #[tokio::test]
    async fn idling_has_an_end() {
        let (mut near, _far, activity) = pair(LONG, SHORT);
        for _ in 0..2 {
            activity.begin();
            activity.end();
            let (took, read) = read_until_failure(&mut near).await;
            assert!(took >= SHORT && read == 0, "{took:?} {read}");
        }
    }

    #[tokio::test]
    async fn an_answer_may_take_as_long_as_it_takes() {
        let (mut near, mut far, activity) = pair(SHORT, SHORT);
        activity.begin();
        tokio::time::timeout(SHORT * 3, read_until_failure(&mut near)).await.expect_err("the client waits, and may");
        far.write_all(b"x").await.unwrap();
        assert_eq!(near.read(&mut [0; 10]).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn a_reader_may_be_slow_but_not_stuck() {
        let (mut near, mut far, _) = pair(LONG, LONG);
        let start = Instant::now();
        let read_a_little = async {
            for _ in 0..60 {
                tokio::time::sleep(SECOND / 50).await;
                far.read_exact(&mut [0; 1]).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        let error = tokio::select! {
            written = near.write_all(&[7; 100]) => written.unwrap_err(),
            () = read_a_little => unreachable!(),
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // The slow reads took longer than the timeout, and the stuck one all of it.
        assert!(start.elapsed() >= SECOND * 60 / 50 + SECOND, "{:?}", start.elapsed());
    }
}
