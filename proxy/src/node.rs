//! This node: its cache, the origin behind it, and the other nodes. What a request does beyond a get is here: ask for a size, store, delete, forget.

use crate::metrics::Metrics;
use castier_blob::Digest;
use castier_cache::{Asker, Body, Cache, CopyTo, Fault, Owner, Put, SourceKind, Stat, Store, Upload, Via};
use castier_cluster::{Member, Peers};
use futures::future::join_all;
use std::sync::Arc;

/// The parts of this node that work together.
pub struct Node {
    /// The tiers and the flights.
    pub cache: Arc<Cache>,
    /// The source of truth.
    pub origin: Arc<dyn Store>,
    /// The other nodes; none without a cluster.
    pub peers: Option<Arc<Peers>>,
    /// The series.
    pub metrics: Arc<Metrics>,
}

impl Node {
    /// The blob's size, and who knew it. Never loads the blob.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stat(&self, digest: &Digest, asker: Asker) -> Result<(Stat, Via), Fault> {
        if let Some(known) = self.cache.stat(digest).await {
            return Ok(known);
        }
        if let Some((peers, owner)) = self.owner(digest, asker)
            && let Ok(known) = peers.stat(&owner, digest).await
        {
            return Ok((known, Via::asked(SourceKind::Peer)));
        }
        let known = self.origin.stat(std::slice::from_ref(digest)).await?;
        let known = known.first().ok_or_else(|| Fault::Internal("the origin was asked about a blob and said nothing".into()))?;
        Ok((*known, Via::asked(SourceKind::Origin)))
    }

    /// The other node to which a request about the digest goes first. What a peer asks for goes to no other peer.
    fn owner(&self, digest: &Digest, asker: Asker) -> Option<(&Arc<Peers>, Member)> {
        let peers = self.peers.as_ref().filter(|_| asker == Asker::Client)?;
        Some((peers, peers.owner(digest)?))
    }

    /// The blob's size, if the origin has it durably: an upload that has not been sent yet need not be, and ends a remembered absence as if it had been
    /// sent.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stored_at_origin(&self, digest: &Digest, size: Option<u64>, asker: Asker) -> Result<Option<u64>, Fault> {
        let size = self.origin.holds(digest, size).await?;
        if size.is_some() {
            self.cache.stored(digest);
            self.tell_peers(digest, asker, None, None).await;
        }
        Ok(size)
    }

    /// Stores an upload at the origin, by name or letting its bytes name it, and keeps it. Done only when the origin says that it is durable.
    ///
    /// An upload that comes from a client and belongs to another node is handed over to that node, which does the same. If that node cannot be
    /// reached, or fails while all that came is still here, this node stores it; and so it does where peers have no secret to prove that they have
    /// stored it.
    ///
    /// Before the client hears of it, every other node is told that the blob is stored: each may remember that it is absent, or have a flight that is
    /// about to hear so. So no GET that starts after the acknowledgement is told of an absence from before.
    ///
    /// # Errors
    /// The client's, the origin's, or a limit; nothing is kept then.
    pub async fn put(&self, digest: Option<Digest>, size: Option<u64>, body: Body<'_>, asker: Asker) -> Result<(Put, Digest, u64), Fault> {
        self.store(digest, size, body, asker).await.inspect_err(|fault| {
            if matches!(fault, Fault::Mismatch(_)) {
                self.metrics.cache.corrupt("client");
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
                    self.tell_peers(&digest, asker, Some(&owner.name), None).await;
                    return Ok((put, stored.0, stored.1));
                }
                Err(fault) if fault.is_broken_transfer() || matches!(fault, Fault::Busy(_)) => {
                    if !upload.rewind() {
                        return Err(fault);
                    }
                    tracing::debug!(%digest, peer = &*owner.name, %fault, "an upload could not be handed over, and is stored from here");
                    failed = Some(owner.name);
                }
                Err(fault) => return Err(fault),
            }
        }
        let put = self.origin.put(&mut upload).await?;
        let (digest, size) = stored(&upload)?;
        // Which node owns it may be known only now.
        let owner = if failed.is_none() && self.owner(&digest, asker).is_some() { Owner::Peer } else { Owner::ThisNode };
        self.cache.keep(upload, owner);
        self.cache.stored(&digest);
        self.tell_peers(&digest, asker, None, failed.as_deref()).await;
        Ok((put, digest, size))
    }

    /// Tells all other nodes that are up that a blob is stored; not the one that has stored it and so `knows`. The one that has just `failed` gets less
    /// time, since a request should lose one stall timeout at most. What comes from a peer is told by that peer.
    async fn tell_peers(&self, digest: &Digest, asker: Asker, knows: Option<&str>, failed: Option<&str>) {
        let Some(peers) = self.peers.as_ref().filter(|_| asker == Asker::Client) else { return };
        let view = peers.members().view();
        let others = view.members().iter().filter(|member| !member.itself && member.up && knows != Some(&*member.name));
        let tell = async |member: &Member| {
            let whole = peers.stall_timeout();
            let timeout = if failed == Some(&*member.name) { whole / 4 } else { whole };
            if let Err(fault) = peers.stored(member, digest, timeout).await {
                tracing::debug!(%digest, peer = &*member.name, %fault, "the peer was not told of an upload; it may call the blob absent for limits.negative_ttl");
            }
        };
        join_all(others.map(tell)).await;
    }

    /// Deletes the blob at the origin, then here; false if the origin did not have it.
    ///
    /// # Errors
    /// The origin does not delete, or could not be asked.
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
