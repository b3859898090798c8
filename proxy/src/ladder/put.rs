//! Uploads: to the node that owns the blob, or to the origin and into the tiers.

use super::{Ladder, forgotten::Before};
use crate::{
    disk::{Disk, DiskCopy},
    fault::Fault,
    flight::Asker,
    members::Member,
    spool,
    upstream::{Parcel, Put, Upload},
};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use futures::{StreamExt, future::join_all};
use tokio::sync::Mutex;

impl Ladder {
    /// Stores an upload at the origin, by name or letting its bytes name it, and keeps it. Done only when the origin says that it is durable.
    ///
    /// One that comes from a client and belongs to another node is handed over to that, which does the same. If that node cannot be
    /// reached, or fails while all that came is still here, this node does it; and so it does where peers have no secret to prove that
    /// they have stored it.
    ///
    /// Before the client hears of it, every other node is told that the blob is stored: each may remember that it is absent, or have a
    /// flight that is about to hear so. So no GET that starts after the acknowledgement is told of an absence from before.
    ///
    /// # Errors
    /// The client's, the origin's, or a limit; nothing is kept then.
    pub async fn put(
        &self,
        digest: Option<Digest>,
        size: Option<u64>,
        upload: Upload<'_>,
        asker: Asker,
    ) -> Result<(Put, Digest, u64), Fault> {
        let (put, verified) = self.store(digest, size, upload, asker).await.inspect_err(|fault| {
            if matches!(fault, Fault::Mismatch(_)) {
                self.metrics.corrupt("client");
            }
        })?;
        Ok((put, verified.digest(), verified.size()))
    }

    async fn store(
        &self,
        digest: Option<Digest>,
        size: Option<u64>,
        upload: Upload<'_>,
        asker: Asker,
    ) -> Result<(Put, Verified<()>), Fault> {
        let owner = digest.and_then(|digest| Some((digest, self.owner(&digest, asker).filter(|(peers, _)| peers.can_vouch())?)));
        let before = self.forgotten.before(digest.as_ref());
        // The owner keeps it. What `fill.memory` has room for is held all the same until the owner has it: the client sends it only once.
        let copy = Mutex::new(UploadCopy { on_disk_too: owner.is_none(), ..UploadCopy::new(self, digest, size) });
        let teed = upload.then(|part| async {
            if let Ok(part) = &part {
                copy.lock().await.take(part);
            }
            part
        });
        let mut parcel = Parcel::pack(digest, size, teed.boxed()).await?;
        let mut failed = None;
        if let Some((digest, (peers, owner))) = owner {
            match peers.put(&owner, &digest, &mut parcel).await {
                Err(fault) if may_be_done_here(&fault) => {
                    let mut copy = copy.lock().await;
                    copy.on_disk_too = true;
                    if !parcel.is_at_hand() {
                        parcel.begin_anew(copy.again().ok_or_else(|| fault.clone())?);
                    }
                    tracing::debug!(%digest, peer = &*owner.name, %fault, "an upload could not be handed over, and is stored from here");
                    failed = Some(owner.name);
                }
                done => {
                    let done = done?;
                    self.flights.stored(&digest);
                    self.tell_all(&digest, asker, Some(&owner.name), None).await;
                    return Ok(done);
                }
            }
        }
        let (put, verified) = self.sources.origin.put(&mut parcel).await?;
        drop(parcel);
        let digest = verified.digest();
        // Who owns it may be known only now.
        let foreign = failed.is_none() && self.owner(&digest, asker).is_some();
        copy.into_inner().keep(verified.clone(), foreign, &before);
        self.flights.stored(&digest);
        self.tell_all(&digest, asker, None, failed.as_deref()).await;
        Ok((put, verified))
    }

    /// Tells all other nodes that are up that a blob is stored. Not the one that has stored it and so `knows`; and the one that has just
    /// `failed` is waited for less, since a request should lose one stall. What comes from a peer is the peer's to tell.
    pub(super) async fn tell_all(&self, digest: &Digest, asker: Asker, knows: Option<&str>, failed: Option<&str>) {
        let Some(peers) = self.sources.peers.as_ref().filter(|_| asker == Asker::Client) else { return };
        let view = peers.members().view();
        let others = view.members().iter().filter(|member| !member.itself && member.up && knows != Some(&*member.name));
        let tell = async |member: &Member| {
            let whole = peers.stall_timeout();
            let patience = if failed == Some(&*member.name) { whole / 4 } else { whole };
            if let Err(fault) = peers.stored(member, digest, patience).await {
                tracing::debug!(%digest, peer = &*member.name, %fault, "the peer was not told of an upload; it may call the blob absent for limits.negative_ttl");
            }
        };
        join_all(others.map(tell)).await;
    }
}

/// Whether the fault is one of the way through the other node.
const fn may_be_done_here(fault: &Fault) -> bool {
    matches!(fault, Fault::Unreachable { .. } | Fault::Silent { .. } | Fault::Unusable { .. } | Fault::Busy(_))
}

/// A copy of an upload for the tiers, given up as soon as it has no place there.
struct UploadCopy<'a> {
    ladder: &'a Ladder,
    /// The name, if it is known.
    digest: Option<Digest>,
    /// The size that was announced.
    size: Option<u64>,
    /// What is too much for memory may go to the disk tier.
    on_disk_too: bool,
    kept: Kept,
}

enum Kept {
    Memory(Vec<u8>, spool::Lease),
    Disk(DiskCopy),
    Nothing,
}

impl<'a> UploadCopy<'a> {
    /// Leases memory as bytes come, and not for what is announced: a client that announces much and sends little must cost little.
    fn new(ladder: &'a Ladder, digest: Option<Digest>, size: Option<u64>) -> Self {
        Self { ladder, digest, size, on_disk_too: true, kept: Kept::Memory(Vec::new(), ladder.upload_memory.empty()) }
    }

    /// All that came, once more; none if it is not in memory, or that has no room for it.
    fn again(&mut self) -> Option<Bytes> {
        let Kept::Memory(bytes, lease) = &mut self.kept else { return None };
        lease.cover(2 * bytes.len() as u64).then(|| Bytes::copy_from_slice(bytes))
    }

    fn take(&mut self, part: &Bytes) {
        self.kept = match std::mem::replace(&mut self.kept, Kept::Nothing) {
            Kept::Memory(mut bytes, mut lease) => {
                let after = (bytes.len() + part.len()) as u64;
                if self.has_a_place(after) && make_room(&mut bytes, part.len(), self.size, &mut lease) {
                    bytes.extend_from_slice(part);
                    Kept::Memory(bytes, lease)
                } else {
                    self.to_disk(bytes.into(), part.clone(), after)
                }
            }
            Kept::Disk(copy) => copy.take(part.clone()).map_or(Kept::Nothing, Kept::Disk),
            Kept::Nothing => Kept::Nothing,
        };
    }

    /// Whether so many bytes may be in memory, if there is room: until their owner has them, or for good.
    fn has_a_place(&self, bytes: u64) -> bool {
        !self.on_disk_too || self.ladder.tiers.memory.takes(bytes.max(self.size.unwrap_or(0)))
    }

    fn to_disk(&self, so_far: Bytes, part: Bytes, len: u64) -> Kept {
        let Some(disk) = self.ladder.tiers.disk.as_ref().filter(|disk| self.on_disk_too && self.may_be_on(disk, self.size.unwrap_or(len)))
        else {
            return Kept::Nothing;
        };
        disk.copy().take(so_far).and_then(|copy| copy.take(part)).map_or(Kept::Nothing, Kept::Disk)
    }

    fn may_be_on(&self, disk: &Disk, size: u64) -> bool {
        self.digest.map_or_else(|| disk.takes(size), |digest| disk.admits(&digest, size))
    }

    /// Keeps the copy as the blob that the upload proved to be, unless that was forgotten since `before`. `foreign`: another node owns it.
    fn keep(self, proof: Verified<()>, foreign: bool, before: &Before) {
        let digest = proof.digest();
        let Some(_unchanged) = self.ladder.forgotten.unchanged(&digest, before) else { return };
        match self.kept {
            Kept::Memory(mut bytes, _) if bytes.len() as u64 == proof.size() && self.ladder.tiers.memory.takes(proof.size()) => {
                bytes.shrink_to_fit();
                self.ladder.tiers.keep(proof.with_content(Bytes::from(bytes)), foreign);
            }
            // Accepted here and written later, unless it is forgotten between the two.
            Kept::Disk(copy) if !foreign => copy.keep(proof),
            Kept::Memory(..) | Kept::Disk(_) | Kept::Nothing => {}
        }
    }
}

/// Makes room for `more` bytes, if the lease covers what that takes. What is allocated is at least doubled, so that bytes are seldom moved,
/// but does not exceed what was announced.
fn make_room(bytes: &mut Vec<u8>, more: usize, announced: Option<u64>, lease: &mut spool::Lease) -> bool {
    let after = bytes.len() + more;
    if after <= bytes.capacity() {
        return true;
    }
    let announced = announced.and_then(|size| usize::try_from(size).ok()).unwrap_or(usize::MAX);
    let ample = (2 * bytes.capacity()).min(announced).max(after);
    let Some(capacity) = [ample, after].into_iter().find(|capacity| lease.cover(*capacity as u64)) else { return false };
    bytes.reserve_exact(capacity - bytes.len());
    true
}
