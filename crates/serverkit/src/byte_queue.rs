//! A queue bounded in bytes, in front of a task that sends its items. Log records for Loki and spans for a collector use it.
//!
//! [`Sender::send`] never waits. If the queue is full, it drops and counts the item. An item's bytes are freed when the task has sent the item or
//! has failed for good ([`Waiting::done`]), not when the task takes it: the batch of a retry still counts.

use crate::log::{Sink, dropped};
use std::{
    future,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// How long the end of the program waits for the items that are left.
const LAST: Duration = Duration::from_secs(2);

/// The items in the queue, and those that are being sent.
#[derive(Default)]
pub(crate) struct Waiting {
    bytes: AtomicUsize,
    items: AtomicU64,
}

impl Waiting {
    /// Frees the bytes of items that were sent, or that failed for good.
    pub(crate) fn done(&self, bytes: usize, items: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.items.fetch_sub(items, Relaxed);
    }
}

/// The input of the queue.
pub(crate) struct Sender<T> {
    sender: UnboundedSender<T>,
    waiting: Arc<Waiting>,
    most: usize,
    sink: Sink,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), waiting: Arc::clone(&self.waiting), most: self.most, sink: self.sink }
    }
}

impl<T> Sender<T> {
    /// Adds an item of this many bytes, or counts it as dropped.
    pub(crate) fn send(&self, item: T, bytes: usize) {
        if self.waiting.bytes.fetch_add(bytes, Relaxed) + bytes > self.most {
            self.waiting.bytes.fetch_sub(bytes, Relaxed);
            return dropped(self.sink, 1);
        }
        self.waiting.items.fetch_add(1, Relaxed);
        if self.sender.send(item).is_err() {
            self.waiting.done(bytes, 1);
            dropped(self.sink, 1);
        }
    }
}

/// The output of the queue.
pub(crate) struct Receiver<T> {
    receiver: UnboundedReceiver<T>,
    stop: CancellationToken,
}

impl<T> Receiver<T> {
    /// The next item. `None` at `deadline`, or if the program ends and the queue is empty.
    pub(crate) async fn next(&mut self, deadline: Option<Instant>) -> Option<T> {
        let late = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            biased;
            item = self.receiver.recv() => item,
            () = self.stop.cancelled() => None,
            () = late => None,
        }
    }
}

/// The task that sends the items.
pub(crate) struct Shipping {
    task: JoinHandle<()>,
    stop: CancellationToken,
    waiting: Arc<Waiting>,
    sink: Sink,
}

impl Shipping {
    /// Starts `task` behind a queue of at most `most` bytes. The task gets the output of the queue, the counter to call [`Waiting::done`] on, and a
    /// token that is cancelled when the program ends.
    pub(crate) fn start<T, F>(
        sink: Sink,
        most: u64,
        task: impl FnOnce(Receiver<T>, Arc<Waiting>, CancellationToken) -> F,
    ) -> (Sender<T>, Self)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = unbounded_channel();
        let (waiting, stop) = (Arc::new(Waiting::default()), CancellationToken::new());
        let receiver = Receiver { receiver, stop: stop.clone() };
        let task = tokio::spawn(task(receiver, Arc::clone(&waiting), stop.clone()));
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        (Sender { sender, waiting: Arc::clone(&waiting), most, sink }, Self { task, stop, waiting, sink })
    }

    /// Lets the task send the items that are left, for two seconds at most. Returns at once if there are none. Returns how many items were lost if the
    /// time did not suffice.
    pub(crate) async fn close(mut self) -> Option<u64> {
        self.stop.cancel();
        if timeout(LAST, &mut self.task).await.is_ok() {
            return None;
        }
        self.task.abort();
        let lost = self.waiting.items.load(Relaxed);
        dropped(self.sink, lost);
        Some(lost)
    }
}
