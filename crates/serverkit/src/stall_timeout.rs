//! A timeout for the other end that does nothing: it takes no byte, or it sends none. It does not limit how long a transfer takes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// A timer whose deadline moves often and is reached rarely. A deadline that moves on costs nothing: the sleep follows when it ends.
#[derive(Debug, Default)]
pub struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Whether the deadline has passed; if not, the task is woken then.
    pub fn has_passed(&mut self, deadline: Instant, cx: &mut Context<'_>) -> bool {
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

/// Runs only while somebody waits and nothing happens.
#[derive(Debug)]
pub struct StallTimeout {
    limit: Duration,
    /// When the wait that is under way ends; none if nobody waits.
    deadline: Option<Instant>,
    timer: Timer,
}

impl StallTimeout {
    /// With this limit; not running.
    pub const fn new(limit: Duration) -> Self {
        Self { limit, deadline: None, timer: Timer(None) }
    }

    /// Changes the limit, from the next wait on.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Something happened: the next wait has the whole limit.
    pub fn reset(&mut self) {
        self.deadline = None;
    }

    /// Nothing happened. Whether that has been so for the whole limit; if not, the task is woken then.
    pub fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.limit);
        self.timer.has_passed(deadline, cx)
    }

    /// Passes on what a write came to. A write that is pending for the whole limit fails.
    pub fn watch_write<T>(&mut self, written: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.reset();
            return written;
        }
        if self.is_over(cx) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client took no byte for too long")));
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, task::ready};
    use tokio::time::sleep;

    #[tokio::test]
    async fn only_a_wait_in_which_nothing_happens_ends() {
        let second = Duration::from_secs(1);
        let mut stall = StallTimeout::new(second / 5);
        let start = Instant::now();
        // Slow, and never stalled.
        for _ in 0..6 {
            let mut next = Box::pin(sleep(second / 20));
            let over = poll_fn(|cx| {
                if next.as_mut().poll(cx).is_ready() {
                    stall.reset();
                    return Poll::Ready(false);
                }
                if stall.is_over(cx) { Poll::Ready(true) } else { Poll::Pending }
            });
            assert!(!over.await);
        }
        assert!(start.elapsed() > second / 5);
        let stalled = Instant::now();
        let error = poll_fn(|cx| {
            let written: Poll<io::Result<()>> = Poll::Pending;
            Poll::Ready(ready!(stall.watch_write(written, cx)))
        });
        assert_eq!(error.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(stalled.elapsed() >= second / 5, "the wait has the whole limit");
    }
}
