//! A store that acknowledges what its outbox has, and reads from there first.

use crate::{
    announced::Announced,
    journal::{Event, Kind},
    outbox::{Outbox, PendingEntry},
    uploader::Uploader,
};
use async_trait::async_trait;
use bytes::Bytes;
use castier_blob::Digest;
use castier_bucket::{Condition, Delete, Entry, Listed, Objects, PutEntry};
use castier_cache::{Answer, Ask, Fault, Lease, Put, Source, Stat, Store, Upload};
use castier_wire::entry::Name;
use futures::{FutureExt as _, future::BoxFuture};
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::sync::watch;

/// The outboxes of the other nodes of a cluster.
#[async_trait]
pub trait Others: Send + Sync {
    /// The bytes of a blob that another node has pending; `None` if none has it.
    ///
    /// # Errors
    /// A node that is up did not answer. So nobody knows.
    async fn open(&self, ask: Ask) -> Result<Option<Answer>, Fault>;

    /// The size of a blob that another node has pending.
    ///
    /// # Errors
    /// As [`Self::open`].
    async fn stat(&self, digest: &Digest) -> Result<Option<u64>, Fault>;

    /// The latest version of an entry that another node has pending.
    ///
    /// # Errors
    /// As [`Self::open`].
    async fn entry(&self, name: &Name) -> Result<Option<PendingEntry>, Fault>;

    /// Takes a blob, which a client deletes, out of the other outboxes. True if one had it.
    ///
    /// # Errors
    /// As [`Self::open`].
    async fn take_out(&self, digest: &Digest) -> Result<bool, Fault>;

    /// How long the blob that has waited longest has waited, over all other nodes that are up. `None` if none waits. A node that is up and does not
    /// answer counts as one that has waited for ever.
    ///
    /// With it an entry waits for the blobs that other nodes acknowledged before it, and no clocks are compared. At the time of the question the entry
    /// has waited for `w`. If the oldest blob of another node has waited for less than `w`, it was acknowledged after the entry.
    async fn oldest_blob(&self) -> Option<Duration>;
}

/// A store of blobs and entries with an outbox before it.
pub struct WriteBehind {
    store: Arc<dyn Objects>,
    outbox: Arc<Outbox>,
    /// Whether new blobs are events.
    announces: bool,
    connected: OnceLock<Connected>,
}

/// What is known only after the start.
struct Connected {
    /// The blobs of the store, as the rest of the node asks for them.
    blobs: Arc<dyn Store>,
    /// The same, for what does not go through the outbox: with events, if there are any.
    through: Arc<dyn Store>,
    others: Option<Arc<dyn Others>>,
}

impl WriteBehind {
    /// `store`, with `outbox` before it. `announces`: new blobs are events.
    pub fn new(store: Arc<dyn Objects>, outbox: Arc<Outbox>, announces: bool) -> Self {
        Self { store, outbox, announces, connected: OnceLock::new() }
    }

    /// Names how the blobs of the store are asked for, and the outboxes of the other nodes of a cluster. Call it before the first request.
    pub fn connect(&self, blobs: Arc<dyn Store>, others: Option<Arc<dyn Others>>) {
        let through: Arc<dyn Store> =
            if self.announces { Arc::new(Announced::new(blobs.clone(), self.outbox.clone())) } else { blobs.clone() };
        drop(self.connected.set(Connected { blobs, through, others }));
    }

    fn connected(&self) -> Result<&Connected, Fault> {
        self.connected.get().ok_or_else(|| Fault::Internal("the outbox was asked before it was connected".into()))
    }

    fn others(&self) -> Option<&Arc<dyn Others>> {
        self.connected.get()?.others.as_ref()
    }

    /// Uploads what is pending, until `stopped`, with so many `workers`. `most_entry`: `limits.max_entry`.
    ///
    /// # Errors
    /// It is not connected.
    pub fn uploader(
        &self,
        workers: usize,
        most_entry: u64,
        stopped: watch::Receiver<bool>,
    ) -> Result<impl Future<Output = ()> + Send + use<>, Fault> {
        let Connected { blobs, others, .. } = self.connected()?;
        let (outbox, blobs, entries, others) = (self.outbox.clone(), blobs.clone(), self.store.clone(), others.clone());
        Ok(Uploader { outbox, blobs, entries, others, workers, most_entry }.run(stopped))
    }

    async fn read(&self, ask: Ask) -> Result<Answer, Fault> {
        let digest = ask.digest()?;
        if let Some(pending) = self.outbox.pending(&digest)
            && let Some(incoming) = self.outbox.read(pending, ask.from).await?
        {
            return Ok(Answer::Bytes(incoming));
        }
        let answer = self.connected()?.blobs.open(ask).await;
        if let (Ok(Answer::Absent) | Err(_), Some(others)) = (&answer, self.others()) {
            match others.open(ask).await {
                Ok(Some(pending)) => return Ok(pending),
                // The store has not said whether it has the blob, and that is the fault to tell.
                Err(fault) if answer.is_ok() => return Err(fault),
                _ => {}
            }
        }
        answer
    }

    async fn stat_one(&self, digest: &Digest) -> Result<Stat, Fault> {
        if let Some(pending) = self.outbox.pending(digest) {
            return Ok(Stat::Present(Some(pending.size)));
        }
        let known = self.connected()?.blobs.stat(std::slice::from_ref(digest)).await.and_then(|known| {
            known.first().copied().ok_or_else(|| Fault::Internal("the store was asked about a blob and said nothing".into()))
        });
        if let (Ok(Stat::Absent) | Err(_), Some(others)) = (&known, self.others()) {
            match others.stat(digest).await {
                Ok(Some(size)) => return Ok(Stat::Present(Some(size))),
                Err(fault) if known.is_ok() => return Err(fault),
                _ => {}
            }
        }
        known
    }

    /// The version of an entry that some outbox has: the latest of them.
    async fn pending_entry(&self, name: &Name) -> Result<Option<PendingEntry>, Fault> {
        let own = self.outbox.pending_entry(name).await?;
        let Some(others) = self.others() else { return Ok(own) };
        Ok([own, others.entry(name).await?].into_iter().flatten().max_by_key(|version| version.at))
    }

    /// Whether uploads of entries go to the store at once: while the outbox is drained, and once it is empty, so that the order stays.
    fn passes_entries(&self, name: &Name) -> bool {
        self.outbox.is_draining() && self.outbox.oldest_blob().is_none() && !self.outbox.has_entry(name)
    }
}

impl Source for WriteBehind {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        self.read(ask).boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        futures::future::try_join_all(digests.iter().map(|digest| self.stat_one(digest))).boxed()
    }

    fn url(&self) -> Option<String> {
        self.store.url()
    }
}

impl Store for WriteBehind {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        async move {
            // What the store is known to have needs no outbox, and no question.
            let known = upload.digest().and_then(|digest| self.store.known(digest));
            let is_known = known.is_some_and(|known| upload.size().is_none_or(|announced| announced == known));
            if is_known || self.outbox.is_draining() {
                return self.connected()?.through.put(upload).await;
            }
            let event = |digest: &Digest, size| self.announces.then(|| Event::now(Kind::Stored, digest, Some(size)));
            self.outbox.accept(upload, event).await
        }
        .boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        async move {
            // The store may not allow it: then nothing must be lost here.
            let through = &self.connected()?.through;
            let deleted = through.delete(digest).await?;
            let mut was_pending = self.outbox.take_out(digest).await?;
            if let Some(others) = self.others() {
                was_pending |= others.take_out(digest).await?;
            }
            if !was_pending {
                return Ok(deleted);
            }
            // An upload may have ended in between.
            let was_uploaded = through.delete(digest).await?;
            if self.announces && !deleted && !was_uploaded {
                self.outbox.announce(Event::now(Kind::Deleted, digest, None)).await?;
            }
            Ok(true)
        }
        .boxed()
    }

    fn forget(&self, digest: &Digest) {
        self.store.forget(digest);
    }
}

#[async_trait]
impl Objects for WriteBehind {
    fn known(&self, digest: &Digest) -> Option<u64> {
        self.store.known(digest)
    }

    fn lease(&self) -> Lease {
        self.store.lease()
    }

    async fn entry(&self, name: &Name, most: u64) -> Result<Option<Entry>, Fault> {
        match self.pending_entry(name).await? {
            Some(version) => Ok(version.bytes.map(Entry::new)),
            None => self.store.entry(name, most).await,
        }
    }

    async fn find_entry(&self, name: &Name) -> Result<Option<Listed>, Fault> {
        match self.pending_entry(name).await? {
            Some(version) => Ok(version.bytes.map(|bytes| Listed::entry(name, bytes.len() as u64, version.at))),
            None => self.store.find_entry(name).await,
        }
    }

    fn check_name(&self, name: &Name) -> Result<(), Fault> {
        self.store.check_name(name)
    }

    async fn put_entry(&self, name: &Name, bytes: Bytes, condition: Option<Condition>, most: u64) -> Result<PutEntry, Fault> {
        if self.passes_entries(name) {
            return self.store.put_entry(name, bytes, condition, most).await;
        }
        // Before it is acknowledged, since the store would never take it.
        self.store.check_name(name)?;
        let digest = Digest::of(&bytes);
        let existed = match condition {
            Some(condition) => {
                let current = self.entry(name, most).await?.map(|entry| entry.digest);
                if !condition(current.as_ref()) {
                    return Ok(PutEntry::Refused);
                }
                current.is_some()
            }
            // The store need not answer for this.
            None => self.outbox.has_entry(name),
        };
        self.outbox.accept_entry(name, Some(bytes)).await?;
        Ok(if existed { PutEntry::Replaced(digest) } else { PutEntry::Created(digest) })
    }

    async fn remove_entry(&self, name: &Name, condition: Option<Condition>, most: u64) -> Result<Delete, Fault> {
        if self.passes_entries(name) {
            return self.store.remove_entry(name, condition, most).await;
        }
        let current = self.entry(name, most).await?.map(|entry| entry.digest);
        if condition.is_some_and(|condition| !condition(current.as_ref())) {
            return Ok(Delete::Refused);
        }
        if current.is_none() {
            return Ok(Delete::Absent);
        }
        self.outbox.accept_entry(name, None).await?;
        Ok(Delete::Done)
    }

    async fn has_members(&self, collection: &Name) -> Result<bool, Fault> {
        Ok(!self.outbox.pending_below(collection).is_empty() || self.store.has_members(collection).await?)
    }

    async fn members(&self, collection: &Name) -> Result<Vec<Listed>, Fault> {
        let mut members = self.store.members(collection).await?;
        for (name, is_there, listed) in self.outbox.pending_below(collection) {
            members.retain(|member| member.name != name || member.size.is_none() != listed.size.is_none());
            if is_there {
                members.push(listed);
            }
        }
        Ok(members)
    }
}
