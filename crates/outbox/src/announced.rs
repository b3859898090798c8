//! A store that notes what happens to its blobs as events.
//!
//! A crash must not lose an event between the moment when the store has the blob and the commit of the event. So the intent is durable before the store
//! is asked, and the event takes its place afterwards. At the start, what is left of intents is compared with what the store has: see
//! [`Outbox::settle_intents`].

use crate::{
    journal::{Change, Event, Kind},
    outbox::{Outbox, now},
};
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Limit, Put, Source, Stat, Store, Upload};
use futures::{FutureExt as _, future::BoxFuture};
use std::{net::IpAddr, sync::Arc, time::Duration};

/// The pause before the store is asked again about what was about to happen.
const AGAIN: Duration = Duration::from_secs(10);

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

    async fn intend(&self, event: Event) -> Result<u64, Fault> {
        self.outbox.journal.commit(Change::Intend(event)).await.map_err(|broken| {
            tracing::debug!(%broken, "an upload is refused: its event cannot be noted");
            Fault::Busy(Limit::Outbox)
        })
    }

    /// A client is told of success only after the event is durable.
    async fn settle(&self, intent: u64, has_happened: bool) -> Result<(), Fault> {
        let settled = self.outbox.journal.commit(Change::Settle { intent, has_happened }).await;
        match settled {
            Err(broken) if has_happened => {
                tracing::warn!(%broken, "an event cannot be noted; its client gets an error, and the next start notes it");
                Err(Fault::Busy(Limit::Outbox))
            }
            _ => Ok(()),
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
            let is_new = matches!(put, Ok(Put::Created));
            match (intent, upload.verified()) {
                (Some(intent), _) => self.settle(intent, is_new).await?,
                (None, Some((digest, size))) if is_new => {
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
            self.settle(intent, matches!(deleted, Ok(true))).await?;
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
        self.journal.write(Change::Announce(event), |done| {
            if let Err(broken) = done {
                tracing::warn!(%broken, "an event of a corrupt blob cannot be noted");
            }
        });
    }

    /// Settles what was about to happen when the last process ended: it has happened if the store says so. Asks the store until it answers.
    pub async fn settle_intents(self: Arc<Self>, store: Arc<dyn Store>) {
        let mut left = std::mem::take(&mut *self.unsettled.lock());
        while !left.is_empty() {
            let mut unknown = Vec::new();
            for (intent, event) in left {
                let Ok(digest) = event.digest.parse::<Digest>() else { continue };
                let known = store.stat(std::slice::from_ref(&digest)).await;
                let has_happened = match known.as_ref().map(|known| known.first()) {
                    Ok(Some(Stat::Present(_))) => event.kind == Kind::Stored,
                    Ok(Some(Stat::Absent)) => event.kind == Kind::Deleted,
                    _ => {
                        unknown.push((intent, event));
                        continue;
                    }
                };
                if self.journal.commit(Change::Settle { intent, has_happened }).await.is_err() {
                    unknown.push((intent, event));
                }
            }
            left = unknown;
            if !left.is_empty() {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}
