//! Timeouts of a client's connection: for a request head, for the time between requests, and for a client that takes no byte of an answer.
//!
//! hyper's own head timeout also runs while a connection is idle. The configuration has one timeout for each, so this file does it instead.

use castier_config::OriginLimits;
use castier_serverkit::stall_timeout::{StallTimeout, Timer};
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
    time::Instant,
};

/// Counts the requests of a connection. The handler calls `begin` and `end`. Between the two, [`TimedStream`] has no read timeout: the handler
/// limits how long an answer takes, and how slowly a body arrives.
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

/// The wrapped connection.
pub(crate) struct TimedStream<S> {
    stream: S,
    activity: Arc<Activity>,
    /// How many requests had begun at the last read.
    seen: u32,
    /// The limit from the first byte of a request to the end of its head. For the first request it counts from the start of the connection.
    head_timeout: Duration,
    /// The limit between requests.
    idle_timeout: Duration,
    /// The deadline of the present wait.
    read_by: Option<Instant>,
    read_timer: Timer,
    /// The limit between two bytes that the client takes.
    write: StallTimeout,
}

impl<S> TimedStream<S> {
    pub(crate) fn new(stream: S, activity: Arc<Activity>, limits: &OriginLimits) -> Self {
        let head_timeout = limits.header_timeout.get();
        Self {
            stream,
            activity,
            seen: 0,
            head_timeout,
            idle_timeout: limits.idle_timeout.get(),
            read_by: Some(Instant::now() + head_timeout),
            read_timer: Timer::default(),
            write: StallTimeout::new(limits.write_timeout.get()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedStream<S> {
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
        // The deadline of the first request counts from the start of the connection. That of a later one counts from its first byte; before that,
        // the connection is idle.
        let waiting_for_first = begun == 0;
        if outcome.is_ready() {
            if buf.filled().len() > filled && !waiting_for_first {
                let by = Instant::now() + this.head_timeout;
                this.read_by = Some(this.read_by.map_or(by, |idle| idle.min(by)));
            }
            return outcome;
        }
        let deadline = *this.read_by.get_or_insert_with(|| Instant::now() + this.idle_timeout);
        if this.read_timer.has_passed(deadline, cx) { Poll::Ready(Err(io::ErrorKind::TimedOut.into())) } else { Poll::Pending }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.write.watch_write(outcome, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.write.watch_write(outcome, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.write.watch_write(outcome, cx)
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

    fn pair(head: Duration, idle: Duration) -> (TimedStream<DuplexStream>, DuplexStream, Arc<Activity>) {
        let (near, far) = duplex(10);
        let activity = Arc::new(Activity::default());
        let [header_timeout, idle_timeout, write_timeout] =
            [head, idle, SECOND].map(|time| Span::millis(u64::try_from(time.as_millis()).unwrap()));
        let limits = OriginLimits { header_timeout, idle_timeout, write_timeout, ..OriginLimits::default() };
        (TimedStream::new(near, Arc::clone(&activity), &limits), far, activity)
    }

    /// Sends a byte every now and then, for as long as anybody reads.
    async fn trickle(far: &mut DuplexStream) {
        while far.write_all(b"x").await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    }

    /// Reads until that fails: how long it took, and how many bytes there were.
    async fn read_until_failure(near: &mut TimedStream<DuplexStream>) -> (Duration, usize) {
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
