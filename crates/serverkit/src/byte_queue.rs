//! A queue bounded in bytes, between those who record something and the task that ships it. Records for Loki and spans for a collector use it.
//!
//! [`Sender::send`] never waits. What finds no space is dropped and counted. An item gives its bytes back when the task has shipped it or has
//! given it up ([`Waiting::done`]), not when the task takes it: a batch that is sent again still counts.

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

/// How long the end of the program may wait for what is left.
const LAST: Duration = Duration::from_secs(2);

/// What waits, and what is under way.
#[derive(Default)]
pub(crate) struct Waiting {
    bytes: AtomicUsize,
    items: AtomicU64,
}

impl Waiting {
    /// So many items, of so many bytes together, are shipped or given up.
    pub(crate) fn done(&self, bytes: usize, items: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.items.fetch_sub(items, Relaxed);
    }
}

/// Where items go in.
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
    /// Takes an item of so many bytes, or counts it as dropped.
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

/// Where the task takes items out.
pub(crate) struct Receiver<T> {
    receiver: UnboundedReceiver<T>,
    stop: CancellationToken,
}

impl<T> Receiver<T> {
    /// The next item. None at `leave` if there is none until then. None when the program ends and nothing is left.
    pub(crate) async fn next(&mut self, leave: Option<Instant>) -> Option<T> {
        let late = async {
            match leave {
                Some(leave) => sleep_until(leave).await,
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

/// The task that ships, and how to end it.
pub(crate) struct Shipping {
    task: JoinHandle<()>,
    stop: CancellationToken,
    waiting: Arc<Waiting>,
    sink: Sink,
}

impl Shipping {
    /// Starts `task` behind a queue of at most so many bytes. The task gets the end of the queue, what to tell of items that are done, and a
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

    /// Has the task ship what waits, for two seconds at most; returns at once if nothing waits. How many items were lost, if it took longer.
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
