//! The data path: get, stat, put, forget. A get climbs memory → mirror → disk → a flight over the owner and the origin.

mod forgotten;
mod put;
mod stats;

pub use crate::tier::TierName;
pub use stats::Stats;

use crate::{
    disk::{Disk, DiskBlob},
    fault::Fault,
    flight::{Asker, Flights, Going, Joined, Opened, Reader, Tiers},
    members::Member,
    metrics::Metrics,
    spool,
    tier::Damaged,
    upstream::{OriginState, Peers, Sources},
};
use bytes::Bytes;
use castier_blob::{Digest, Verifier};
use forgotten::Forgotten;
use std::sync::Arc;

/// The tiers and sources of this node, in the order in which they are asked.
pub struct Ladder {
    tiers: Tiers,
    flights: Arc<Flights>,
    sources: Sources,
    /// Uploads that will be kept are collected within `fill.memory` too.
    upload_memory: Arc<spool::Budget>,
    /// What was forgotten while an upload was on its way is not kept.
    forgotten: Forgotten,
    metrics: Arc<Metrics>,
}

/// Where a get found its blob.
pub enum Found {
    /// In memory, or its part for other nodes' blobs.
    Memory(Bytes, TierName),
    /// On disk.
    Disk(Arc<DiskBlob>),
    /// On its way. `collapsed`: in a flight that another request started.
    Flight {
        /// This request's view of the flight.
        reader: Reader,
        /// Another request started it.
        collapsed: bool,
    },
}

/// Who knew a blob's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// A tier of this node.
    Tier(TierName),
    /// The node that owns the blob.
    Peer,
    /// The origin.
    Origin,
}

impl Ladder {
    /// Puts the rungs together.
    pub fn new(tiers: Tiers, flights: Arc<Flights>, sources: Sources, upload_memory: Arc<spool::Budget>, metrics: Arc<Metrics>) -> Self {
        Self { tiers, flights, sources, upload_memory, forgotten: Forgotten::default(), metrics }
    }

    /// The other nodes; none without a cluster.
    pub const fn peers(&self) -> Option<&Arc<Peers>> {
        self.sources.peers.as_ref()
    }

    /// Finds the blob, or sets out to load it. Does not wait for a load: what is on its way is waited for by its reader.
    pub async fn get(self: &Arc<Self>, digest: &Digest, asker: Asker) -> Found {
        self.climb(digest, asker, self.tiers.disk.as_deref()).await
    }

    /// The blob if a tier keeps it: a peer's `only-if-cached`. Not finding it is no get.
    pub async fn kept(self: &Arc<Self>, digest: &Digest) -> Option<Found> {
        if let Some((bytes, tier)) = self.get_from_memory(digest, Asker::Peer) {
            return Some(Found::Memory(bytes, tier));
        }
        let blob = self.tiers.disk.as_ref()?.find(digest).await?;
        self.count(digest, Asker::Peer, Some(TierName::Disk));
        self.hit(TierName::Disk, Asker::Peer);
        Some(Found::Disk(blob))
    }

    /// The size of a blob that a tier keeps, and which: `only-if-cached` without the bytes.
    pub async fn knows(&self, digest: &Digest) -> Option<(u64, TierName)> {
        if let Some((bytes, tier)) = self.tiers.in_memory(digest) {
            return Some((bytes.len() as u64, tier));
        }
        self.tiers.disk.as_ref()?.stat(digest).await.map(|size| (size, TierName::Disk))
    }

    /// The blob is at the origin now, by another node's doing: an absence remembered here is no longer true.
    pub fn stored(&self, digest: &Digest) {
        self.flights.stored(digest);
    }

    /// Counts one get. `hit`: the tier that had the blob; none: not known yet.
    fn count(&self, digest: &Digest, asker: Asker, hit: Option<TierName>) {
        self.tiers.count(digest, hit);
        self.metrics.gets.inc();
        if asker == Asker::Peer {
            self.metrics.gets_from_peers.inc();
        }
    }

    /// Counts a get that a tier answered.
    fn hit(&self, tier: TierName, asker: Asker) {
        self.metrics.hit(tier);
        if asker == Asker::Peer {
            self.metrics.hits_from_peers.inc();
        }
    }

    /// See [`Flights::going`].
    pub fn going(&self, most: usize) -> (usize, Vec<Going>) {
        self.flights.going(most)
    }

    /// The disk tier, if there is one.
    pub const fn disk(&self) -> Option<&Arc<Disk>> {
        self.tiers.disk.as_ref()
    }

    /// How the origin is, as the last requests found it.
    pub fn origin_state(&self) -> Option<OriginState> {
        self.sources.origin.origin_state()
    }

    /// Whether a flight of the blob is on its way.
    pub fn is_flying(&self, digest: &Digest) -> bool {
        self.flights.is_flying(digest)
    }

    /// [`Self::get`] over these rungs: without `disk`, for a response that the disk has failed already.
    async fn climb(self: &Arc<Self>, digest: &Digest, asker: Asker, disk: Option<&Disk>) -> Found {
        if let Some((bytes, tier)) = self.get_from_memory(digest, asker) {
            return Found::Memory(bytes, tier);
        }
        self.count(digest, asker, None);
        let mut sure = disk.is_none();
        loop {
            if let Some(disk) = disk
                && let Some(blob) = self.find_on_disk(digest, asker, disk).await
            {
                return Found::Disk(blob);
            }
            return match self.flights.join(digest, asker, sure) {
                Joined::Kept(bytes, tier) => {
                    self.hit(tier, asker);
                    Found::Memory(bytes, tier)
                }
                Joined::OnDisk => {
                    // Landed since we looked, or an index entry without its file: the next look tells which.
                    sure = true;
                    continue;
                }
                Joined::Led(reader) => {
                    self.metrics.loads.inc();
                    self.metrics.flights.inc();
                    Found::Flight { reader, collapsed: false }
                }
                Joined::Followed(reader) => {
                    self.metrics.loads.inc();
                    self.metrics.collapsed.inc();
                    Found::Flight { reader, collapsed: true }
                }
            };
        }
    }

    async fn find_on_disk(self: &Arc<Self>, digest: &Digest, asker: Asker, disk: &Disk) -> Option<Arc<DiskBlob>> {
        let blob = disk.find(digest).await?;
        self.hit(TierName::Disk, asker);
        // Two, four, eight … hits: worth an offer to memory, whose admission policy has seen every one of these gets.
        if let hits @ 2.. = blob.hit()
            && hits.is_power_of_two()
            && self.tiers.memory.takes(blob.size())
        {
            tokio::spawn(self.clone().promote(*digest, blob.clone()));
        }
        Some(blob)
    }

    /// Offers a blob from disk to memory.
    async fn promote(self: Arc<Self>, digest: Digest, blob: Arc<DiskBlob>) {
        let Some(_lease) = self.upload_memory.lease(blob.size()) else { return };
        let mut verifier = Verifier::of(digest);
        let mut bytes = Vec::with_capacity(usize::try_from(blob.size()).unwrap_or(0));
        while verifier.seen() < blob.size() {
            let Ok(part) = blob.read(verifier.seen(), spool::PIECE).await else { return };
            verifier.update(&part);
            bytes.extend_from_slice(&part);
        }
        if let Ok(verified) = verifier.finish(bytes.into()) {
            self.tiers.memory.keep(verified);
            // Forgotten meanwhile: `forget` drops from disk first and from memory last, so one of the two sees the other.
            if self.tiers.disk.as_ref().is_none_or(|disk| disk.knows(&digest).is_none()) {
                self.tiers.memory.forget(&digest);
            }
        }
    }

    /// Loads a blob that a tier has lost, for nobody in particular.
    pub async fn refetch(self: Arc<Self>, digest: Digest) {
        if let Found::Flight { mut reader, .. } = self.get(&digest, Asker::Client).await
            && let Err(fault) = reader.finished().await
        {
            tracing::warn!(%digest, %fault, "a blob that rotted could not be fetched anew");
        }
    }

    /// The bytes `first..end` of a blob on disk, and should the disk fail, of whatever has them next.
    pub fn read_disk(self: &Arc<Self>, digest: &Digest, asker: Asker, blob: Arc<DiskBlob>, first: u64, end: u64) -> DiskReader {
        DiskReader { ladder: self.clone(), digest: *digest, asker, rest: Rest::Disk(blob), at: first, end }
    }

    /// The first rung alone. Finding nothing there is no get yet: whoever asks goes on to [`Self::get`].
    pub fn get_from_memory(&self, digest: &Digest, asker: Asker) -> Option<(Bytes, TierName)> {
        let (bytes, tier) = self.tiers.in_memory(digest)?;
        self.count(digest, asker, Some(tier));
        self.hit(tier, asker);
        Some((bytes, tier))
    }

    /// The second rung alone, for whom the first had nothing. As there, finding nothing is no get yet.
    pub async fn get_from_disk(self: &Arc<Self>, digest: &Digest, asker: Asker) -> Option<Arc<DiskBlob>> {
        let blob = self.find_on_disk(digest, asker, self.tiers.disk.as_deref()?).await?;
        self.count(digest, asker, Some(TierName::Disk));
        Some(blob)
    }

    /// The blob's size, and who knew it; absent if the origin says so. Never loads it.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stat(&self, digest: &Digest, asker: Asker) -> Result<(Opened, Whence), Fault> {
        if let Some((size, tier)) = self.knows(digest).await {
            return Ok((Opened::Blob(Some(size)), Whence::Tier(tier)));
        }
        let opened = |known: Option<Option<u64>>| known.map_or(Opened::Absent, Opened::Blob);
        if let Some(known) = self.flights.peek(digest) {
            return Ok((opened(known.map(Some)), Whence::Origin));
        }
        if let Some((peers, owner)) = self.owner(digest, asker)
            && let Ok(known) = peers.stat(&owner, digest).await
        {
            return Ok((opened(known), Whence::Peer));
        }
        Ok((opened(self.sources.origin.stat(digest).await?), Whence::Origin))
    }

    /// The other node to which a request about the digest goes first. What a peer asks for goes nowhere else.
    fn owner(&self, digest: &Digest, asker: Asker) -> Option<(&Arc<Peers>, Member)> {
        let peers = self.sources.peers.as_ref().filter(|_| asker == Asker::Client)?;
        Some((peers, peers.owner(digest)?))
    }

    /// The blob's size, if the origin has it for good: an upload that has not been sent yet may then stay where it is, and ends an absence
    /// that is remembered, as if it had been sent.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stored_at_origin(&self, digest: &Digest, size: Option<u64>, asker: Asker) -> Result<Option<u64>, Fault> {
        let size = self.sources.origin.holds(digest, size).await?;
        if size.is_some() {
            self.flights.stored(digest);
            self.tell_all(digest, asker, None, None).await;
        }
        Ok(size)
    }

    /// Deletes the blob at the origin, then here; false if the origin did not have it.
    ///
    /// # Errors
    /// The origin does not delete, or could not be asked.
    pub async fn delete(&self, digest: &Digest) -> Result<bool, Fault> {
        let deleted = self.sources.origin.delete(digest).await?;
        self.forget(digest).await;
        Ok(deleted)
    }

    /// Drops the blob from every tier of this node. The order matters: an upload or a flight that has not landed by now will not
    /// keep it.
    pub async fn forget(&self, digest: &Digest) {
        self.forgotten.note(digest);
        self.flights.forget(digest);
        self.tiers.forget(digest).await;
    }
}

/// Reads a part of a blob from disk. Where the disk fails, it goes on at the same offset from the next place that has the blob, which is
/// most often a flight: whoever reads notices nothing.
pub struct DiskReader {
    ladder: Arc<Ladder>,
    digest: Digest,
    asker: Asker,
    rest: Rest,
    /// Offset of the next byte.
    at: u64,
    /// Where the part ends.
    end: u64,
}

/// Where the rest comes from.
enum Rest {
    Disk(Arc<DiskBlob>),
    Memory(Bytes),
    Flight(Reader),
}

impl DiskReader {
    /// The next bytes, at most [`spool::PIECE`]; none at the end of the part.
    ///
    /// # Errors
    /// The fault of the flight that had to take over.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            if self.at >= self.end {
                return Ok(None);
            }
            let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(spool::PIECE);
            let piece = match &mut self.rest {
                Rest::Disk(blob) => match blob.read(self.at, left).await {
                    Ok(piece) => piece,
                    Err(Damaged) => {
                        // Boxed, so that no reader carries what so few need.
                        self.rest = Box::pin(self.elsewhere()).await?;
                        continue;
                    }
                },
                Rest::Memory(bytes) => bytes.slice(self.at as usize..self.at as usize + left),
                Rest::Flight(reader) => match reader.next().await? {
                    Some(piece) => piece,
                    None => return Err(Fault::Internal("a flight ended before its blob".into())),
                },
            };
            self.at += piece.len() as u64;
            return Ok(Some(piece));
        }
    }

    async fn elsewhere(&self) -> Result<Rest, Fault> {
        if self.ladder.tiers.disk.as_ref().is_some_and(|disk| disk.answers()) {
            tracing::warn!(digest = %self.digest, at = self.at, "the disk failed; going on from elsewhere");
        }
        Ok(match self.ladder.climb(&self.digest, self.asker, None).await {
            Found::Memory(bytes, _) => Rest::Memory(bytes),
            Found::Disk(blob) => Rest::Disk(blob),
            Found::Flight { mut reader, .. } => match reader.open(true, |_| (self.at, Some(self.end))).await? {
                Opened::Blob(_) => Rest::Flight(reader),
                Opened::Absent => return Err(Fault::Unusable { source_name: "origin", why: "the blob is gone".into() }),
            },
        })
    }
}
