//! A store that notes what happens to its blobs as events.
//!
//! A crash must not lose an event between the moment when the store has the blob and the commit of the event. So the intent is durable before the store
//! is asked, and the event takes its place afterwards. If that does not happen (a crash, a client that leaves, an answer that is lost, a journal that cannot be
//! written) nobody knows: then the store is asked later ([`Outbox::settle_intents`]).

use crate::{
    journal::{Change, Event, Kind},
    outbox::{Outbox, Unsettled, now},
};
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Limit, Put, Source, Stat, Store, Upload};
use futures::{FutureExt as _, future::BoxFuture};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::sleep_until;

/// The pause before the store is asked what has become of an intent. By then it has done what it was just doing.
const AGAIN: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(10) };

tokio::task_local! {
    static CLIENT: Option<IpAddr>;
}

/// Does work for a client: events that come of it name the client.
pub fn of_client<T>(client: Option<IpAddr>, work: impl Future<Output = T>) -> impl Future<Output = T> {
    CLIENT.scope(client, work)
}

/// A store whose new and deleted blobs become events.
pub struct Announced {
    store: Arc<dyn Store>,
    outbox: Arc<Outbox>,
}

impl Event {
    /// An event that happens now.
    pub fn now(kind: Kind, digest: &Digest, size: Option<u64>) -> Self {
        let client = CLIENT.try_with(Clone::clone).ok().flatten().map(|client| client.to_string());
        Self { kind, digest: digest.to_string(), size, at: now(), client, source: None }
    }
}

impl Announced {
    /// `store`, with events in the journal of `outbox`.
    pub fn new(store: Arc<dyn Store>, outbox: Arc<Outbox>) -> Self {
        Self { store, outbox }
    }

    async fn intend(&self, event: Event) -> Result<Intent, Fault> {
        let lease = self.outbox.lease_of_event()?;
        let intent = self.outbox.journal.commit(Change::Intend(event.clone())).await.map_err(|broken| {
            tracing::debug!(%broken, "an upload is refused: its event cannot be noted");
            Fault::Busy(Limit::Outbox)
        })?;
        Ok(Intent { outbox: self.outbox.clone(), unsettled: Some(Unsettled { due: Instant::now(), intent, event, _lease: lease }) })
    }
}

/// Something that is about to happen. Unless it is settled, the store is asked later.
struct Intent {
    outbox: Arc<Outbox>,
    unsettled: Option<Unsettled>,
}

impl Intent {
    /// A client is told of success only after the event is durable.
    async fn settle(mut self, has_happened: bool) -> Result<(), Fault> {
        let Some(intent) = self.unsettled.as_ref().map(|unsettled| unsettled.intent) else { return Ok(()) };
        match self.outbox.journal.commit(Change::Settle { intent, has_happened }).await {
            Ok(_) => {
                self.unsettled = None;
                Ok(())
            }
            Err(broken) if has_happened => {
                tracing::warn!(%broken, "an event cannot be noted yet; its client gets an error");
                Err(Fault::Busy(Limit::Outbox))
            }
            Err(_) => Ok(()),
        }
    }

    /// Settles it by how the store's answer ended: `Ok(true)` if it has happened.
    async fn end(self, answer: Result<bool, &Fault>) -> Result<(), Fault> {
        match answer {
            Ok(has_happened) => self.settle(has_happened).await,
            // The store may have done it, and its answer was lost.
            Err(fault) if fault.is_broken_transfer() || matches!(fault, Fault::Internal(_)) => Ok(()),
            Err(_) => self.settle(false).await,
        }
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        if let Some(unsettled) = self.unsettled.take() {
            self.outbox.unsettled.lock().push(Unsettled { due: Instant::now() + AGAIN, ..unsettled });
            self.outbox.is_unsettled.notify_one();
        }
    }
}

impl Source for Announced {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        self.store.open(ask)
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        self.store.stat(digests)
    }

    fn url(&self) -> Option<String> {
        self.store.url()
    }
}

impl Store for Announced {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        async move {
            // A POST has its name only at its end.
            let named = upload.digest().copied().or_else(|| upload.verified().map(|(digest, _)| digest));
            let intent = match &named {
                Some(digest) => Some(self.intend(Event::now(Kind::Stored, digest, upload.size())).await?),
                None => None,
            };
            let put = self.store.put(upload).await;
            let is_new = put.as_ref().map(|put| *put == Put::Created);
            match (intent, upload.verified()) {
                (Some(intent), _) => intent.end(is_new).await?,
                (None, Some((digest, size))) if is_new.unwrap_or(false) => {
                    self.outbox.announce(Event::now(Kind::Stored, &digest, Some(size))).await?;
                }
                _ => {}
            }
            put
        }
        .boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        async move {
            let intent = self.intend(Event::now(Kind::Deleted, digest, None)).await?;
            let deleted = self.store.delete(digest).await;
            intent.end(deleted.as_ref().copied()).await?;
            deleted
        }
        .boxed()
    }

    fn forget(&self, digest: &Digest) {
        self.store.forget(digest);
    }

    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        self.store.holds(digest, size)
    }
}

impl Outbox {
    /// Notes an event. Returns when it is durable.
    ///
    /// # Errors
    /// [`Limit::Outbox`].
    pub async fn announce(&self, event: Event) -> Result<(), Fault> {
        match self.journal.commit(Change::Announce(event)).await {
            Ok(_) => Ok(()),
            Err(broken) => {
                tracing::warn!(%broken, "an event cannot be noted");
                Err(Fault::Busy(Limit::Outbox))
            }
        }
    }

    /// Notes that wrong bytes came for a blob. Does not wait.
    pub fn announce_corrupt(&self, digest: &Digest, source: &str) {
        let event = Event { source: Some(source.to_owned()), ..Event::now(Kind::Corrupt, digest, None) };
        self.journal.try_write(Change::Announce(event), |done| {
            if let Err(broken) = done {
                tracing::warn!(%broken, "an event of a corrupt blob cannot be noted");
            }
        });
    }

    /// Settles, without end, what nobody knows of: it has happened if the store says so.
    pub async fn settle_intents(self: Arc<Self>, store: Arc<dyn Store>) {
        loop {
            self.settle_due(&*store).await;
            let due = self.unsettled.lock().iter().map(|unsettled| unsettled.due).min();
            tokio::select! {
                () = sleep_until(due.unwrap_or_else(|| Instant::now() + AGAIN).into()) => {}
                () = self.is_unsettled.notified() => {}
            }
        }
    }

    /// Settles what is due. If the store does not answer, the rest waits.
    pub(crate) async fn settle_due(&self, store: &dyn Store) {
        let now = Instant::now();
        loop {
            let unsettled = {
                let mut all = self.unsettled.lock();
                let Some(at) = all.iter().position(|unsettled| unsettled.due <= now) else { return };
                all.swap_remove(at)
            };
            let Ok(digest) = unsettled.event.digest.parse::<Digest>() else { continue };
            let known = store.stat(std::slice::from_ref(&digest)).await;
            let has_happened = match known.as_ref().map(|known| known.first()) {
                Ok(Some(Stat::Present(_))) => Some(unsettled.event.kind == Kind::Stored),
                Ok(Some(Stat::Absent)) => Some(unsettled.event.kind == Kind::Deleted),
                _ => None,
            };
            let is_settled = match has_happened {
                Some(has_happened) => self.journal.commit(Change::Settle { intent: unsettled.intent, has_happened }).await.is_ok(),
                None => false,
            };
            if !is_settled {
                let mut all = self.unsettled.lock();
                all.push(unsettled);
                all.iter_mut().for_each(|unsettled| unsettled.due = unsettled.due.max(now + AGAIN));
                return;
            }
        }
    }
}
