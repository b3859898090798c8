//! This node: its cache, its origin, and its peers. Has all operations of requests except the get, which is in the cache.

use crate::metrics::Metrics;
use castier_blob::Digest;
use castier_cache::{Asker, Body, Cache, CopyTo, Fault, Owner, Put, SourceKind, Stat, Store, Upload, Via};
use castier_cluster::{Member, Peers};
use castier_outbox::{Outbox, Pending};
use futures::future::join_all;
use std::sync::Arc;

/// The parts of this node.
pub struct Node {
    /// The tiers and the flights.
    pub cache: Arc<Cache>,
    /// The origin.
    pub origin: Arc<dyn Store>,
    /// Uploads that are acknowledged and that the origin does not have yet; `None` unless `origin.write = "behind"`.
    pub outbox: Option<Arc<Outbox>>,
    /// The other nodes; `None` without a cluster.
    pub peers: Option<Arc<Peers>>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Node {
    /// The blob's size, and who answered: a tier, the owner, or the origin. Never loads the blob.
    ///
    /// # Errors
    /// The origin did not answer.
    pub async fn stat(&self, digest: &Digest, asker: Asker) -> Result<(Stat, Via), Fault> {
        if let Some(known) = self.cache.stat(digest).await {
            return Ok(known);
        }
        if self.pending(digest).is_none()
            && let Some((peers, owner)) = self.owner(digest, asker)
            && let Ok(known) = peers.stat(&owner, digest).await
        {
            return Ok((known, Via::asked(SourceKind::Peer)));
        }
        let known = self.origin.stat(std::slice::from_ref(digest)).await?;
        let known = known.first().ok_or_else(|| Fault::Internal("the origin was asked about a blob and said nothing".into()))?;
        Ok((*known, Via::asked(SourceKind::Origin)))
    }

    /// A blob that is in the outbox of this node.
    pub fn pending(&self, digest: &Digest) -> Option<Pending> {
        self.outbox.as_ref()?.pending(digest)
    }

    /// Asks the origin whether it has a blob that came through a route which checks credentials. If so, every request may see it.
    ///
    /// # Errors
    /// The origin did not answer.
    pub async fn publish_if_stored(&self, digest: &Digest) -> Result<bool, Fault> {
        let known = self.origin.stat(std::slice::from_ref(digest)).await?;
        let is_stored = matches!(known.first(), Some(Stat::Present(_)));
        if is_stored {
            self.cache.publish(digest);
        }
        Ok(is_stored)
    }

    /// The peer that owns the digest, and gets requests about it first. `None` if this node owns it, or if a peer asks: one hop is the limit.
    fn owner(&self, digest: &Digest, asker: Asker) -> Option<(&Arc<Peers>, Member)> {
        let peers = self.peers.as_ref().filter(|_| asker == Asker::Client)?;
        Some((peers, peers.owner(digest)?))
    }

    /// The blob's size if the origin has it durably. Then the client need not send its upload. A remembered absence ends, as after an upload.
    ///
    /// # Errors
    /// The origin did not answer.
    pub async fn stored_at_origin(&self, digest: &Digest, size: Option<u64>, asker: Asker) -> Result<Option<u64>, Fault> {
        let size = self.origin.holds(digest, size).await?;
        if size.is_some() {
            self.cache.stored(digest);
            self.notify_peers(digest, asker, None, None).await;
        }
        Ok(size)
    }

    /// Stores an upload at the origin, and keeps it. Without a digest, its bytes name it. Returns when the origin says that the blob is durable.
    ///
    /// If another node owns a client's upload, that node gets it and stores it. This node stores it itself in two cases: the owner fails while this
    /// node still holds all bytes that have arrived; or the peers have no secret, with which the owner proves that it has stored the upload.
    ///
    /// No GET that starts after the acknowledgement may be answered from an old absence:
    ///
    /// 1. A peer remembers that the blob is absent, or has a flight whose origin has just said so.
    /// 2. This node stores the blob, and sends `/stored/<digest>` to every peer. Each peer drops its absence.
    /// 3. Only then does the client get its acknowledgement.
    ///
    /// # Errors
    /// A fault of the client or the origin, or a limit. Then no tier keeps the blob.
    pub async fn put(&self, digest: Option<Digest>, size: Option<u64>, body: Body<'_>, asker: Asker) -> Result<(Put, Digest, u64), Fault> {
        self.store(digest, size, body, asker).await.inspect_err(|fault| {
            if matches!(fault, Fault::Mismatch(_)) {
                self.metrics.cache.corrupt("client", digest.as_ref());
            }
        })
    }

    async fn store(&self, digest: Option<Digest>, size: Option<u64>, body: Body<'_>, asker: Asker) -> Result<(Put, Digest, u64), Fault> {
        let owner = digest.and_then(|digest| Some((digest, self.owner(&digest, asker).filter(|(peers, _)| peers.can_vouch())?)));
        let copy_to = if owner.is_some() { CopyTo::Memory } else { CopyTo::Tiers };
        let mut upload = self.cache.upload(digest, size, body, copy_to).await?;
        let mut failed = None;
        if let Some((digest, (peers, owner))) = owner {
            match peers.put(&owner, &digest, &mut upload).await {
                Ok(put) => {
                    let stored = stored(&upload)?;
                    self.cache.stored(&digest);
                    self.notify_peers(&digest, asker, Some(&owner.name), None).await;
                    return Ok((put, stored.0, stored.1));
                }
                Err(fault) if fault.is_broken_transfer() || matches!(fault, Fault::Busy(_)) => {
                    if !upload.rewind() {
                        return Err(fault);
                    }
                    tracing::debug!(%digest, peer = &*owner.name, %fault, "the owner did not take an upload; this node stores it");
                    failed = Some(owner.name);
                }
                Err(fault) => return Err(fault),
            }
        }
        let put = self.origin.put(&mut upload).await?;
        let (digest, size) = stored(&upload)?;
        // Only now is the digest of a POST known, and so its owner.
        let owner = if failed.is_none() && self.owner(&digest, asker).is_some() { Owner::Peer } else { Owner::ThisNode };
        self.cache.keep(upload, owner);
        self.cache.stored(&digest);
        self.notify_peers(&digest, asker, None, failed.as_deref()).await;
        Ok((put, digest, size))
    }

    /// Sends `/stored/<digest>` to all peers that are up, except the one that has stored it (`knows`). The peer that has just `failed` gets a
    /// quarter of the time, so that a request loses little more than one stall timeout. If a peer sent the upload, that peer does this.
    async fn notify_peers(&self, digest: &Digest, asker: Asker, knows: Option<&str>, failed: Option<&str>) {
        let Some(peers) = self.peers.as_ref().filter(|_| asker == Asker::Client) else { return };
        let view = peers.members().view();
        let others = view.members().iter().filter(|member| !member.itself && member.up && knows != Some(&*member.name));
        let notify = async |member: &Member| {
            let whole = peers.stall_timeout();
            let timeout = if failed == Some(&*member.name) { whole / 4 } else { whole };
            if let Err(fault) = peers.stored(member, digest, timeout).await {
                tracing::debug!(%digest, peer = &*member.name, %fault, "the peer does not know of an upload; it may answer 404 for limits.negative_ttl");
            }
        };
        join_all(others.map(notify)).await;
    }

    /// Deletes the blob at the origin, then in this node's tiers. Returns false if the origin did not have it.
    ///
    /// # Errors
    /// The origin does not support deletion, or did not answer.
    pub async fn delete(&self, digest: &Digest) -> Result<bool, Fault> {
        let deleted = self.origin.delete(digest).await?;
        self.cache.forget(digest).await;
        Ok(deleted)
    }
}

/// Name and size of an upload that a store has acknowledged.
fn stored(upload: &Upload<'_>) -> Result<(Digest, u64), Fault> {
    upload.verified().ok_or_else(|| Fault::Internal("an upload was acknowledged before all of it had come".into()))
}
