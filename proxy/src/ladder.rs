//! The data path: get, stat, put, forget. A get climbs memory → disk → a flight over the origin.

use crate::{
    disk::{Disk, DiskBlob, DiskFile},
    fault::Fault,
    flight::{self, Flights, Joined, Opened, Reader},
    memory::Memory,
    metrics::{Metrics, Outcome},
    spool,
    tier::{Damaged, TierStats},
    upstream::{Put, Upload, Upstream},
};
use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier};
use futures::StreamExt;
use serde::Serialize;
use std::sync::Arc;
use tokio::sync::Mutex;

/// The tiers and sources of this node, in the order in which they are asked.
pub struct Ladder {
    memory: Arc<Memory>,
    disk: Option<Arc<Disk>>,
    flights: Arc<Flights>,
    origin: Arc<Upstream>,
    /// Uploads that will be kept are collected within `fill.memory` too.
    upload_memory: Arc<spool::Budget>,
    metrics: Arc<Metrics>,
}

/// Where a get found its blob.
pub enum Found {
    /// In memory.
    Memory(Bytes),
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

/// Groupcache's statistics, under groupcache's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Stats {
    /// Any get, from clients or peers.
    gets: u64,
    /// Gets that a tier answered.
    cache_hits: u64,
    /// Loads from peers.
    peer_loads: u64,
    /// Peers that failed.
    peer_errors: u64,
    /// Gets that no tier could answer.
    loads: u64,
    /// Loads left after coalescing.
    loads_deduped: u64,
    /// Loads that the origin answered, with a blob or with its absence.
    local_loads: u64,
    /// Loads that the origin did not answer.
    local_load_errs: u64,
    /// Gets that came from peers.
    server_requests: u64,
    /// What the tiers hold.
    #[serde(rename = "tiers")]
    tiers: Tiers,
}

/// The tiers' state by name. Tiers that are not configured are empty.
#[derive(Debug, Serialize)]
struct Tiers {
    memory: TierStats,
    mirror: TierStats,
    disk: TierStats,
}

impl Ladder {
    /// Puts the rungs together.
    pub fn new(
        tiers: (Arc<Memory>, Option<Arc<Disk>>),
        flights: Arc<Flights>,
        origin: Arc<Upstream>,
        upload_memory: Arc<spool::Budget>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (memory, disk) = tiers;
        Self { memory, disk, flights, origin, upload_memory, metrics }
    }

    /// Finds the blob, or sets out to load it. Does not wait for a load: what is on its way is waited for by its reader.
    pub async fn get(self: &Arc<Self>, digest: &Digest) -> Found {
        self.climb(digest, self.disk.as_deref()).await
    }

    /// [`Self::get`] over these rungs: without `disk`, for a response that the disk has failed already.
    async fn climb(self: &Arc<Self>, digest: &Digest, disk: Option<&Disk>) -> Found {
        if let Some(bytes) = self.get_from_memory(digest) {
            return Found::Memory(bytes);
        }
        self.metrics.gets.inc();
        let mut sure = disk.is_none();
        loop {
            if let Some(disk) = disk
                && let Some(blob) = self.find_on_disk(digest, disk).await
            {
                return Found::Disk(blob);
            }
            return match self.flights.join(digest, sure) {
                Joined::Kept(bytes) => {
                    self.metrics.memory_hits.inc();
                    Found::Memory(bytes)
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

    async fn find_on_disk(self: &Arc<Self>, digest: &Digest, disk: &Disk) -> Option<Arc<DiskBlob>> {
        let blob = disk.find(digest).await?;
        self.metrics.disk_hits.inc();
        // Two, four, eight … hits: worth an offer to memory, whose admission policy has seen every one of these gets.
        if let hits @ 2.. = blob.hit()
            && hits.is_power_of_two()
            && self.memory.takes(blob.size())
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
            self.memory.keep(verified);
            // Forgotten meanwhile: `forget` drops from disk first and from memory last, so one of the two sees the other.
            if self.disk.as_ref().is_none_or(|disk| disk.knows(&digest).is_none()) {
                self.memory.forget(&digest);
            }
        }
    }

    /// Loads a blob that a tier has lost, for nobody in particular.
    pub async fn refetch(self: Arc<Self>, digest: Digest) {
        if let Found::Flight { mut reader, .. } = self.get(&digest).await
            && let Err(fault) = reader.finished().await
        {
            tracing::warn!(%digest, %fault, "a blob that rotted could not be fetched anew");
        }
    }

    /// The bytes `first..end` of a blob on disk, and should the disk fail, of whatever has them next.
    pub fn read_disk(self: &Arc<Self>, digest: &Digest, blob: Arc<DiskBlob>, first: u64, end: u64) -> DiskReader {
        DiskReader { ladder: self.clone(), digest: *digest, rest: Rest::Disk(blob), at: first, end }
    }

    /// The first rung alone. Finding nothing there is no get yet: whoever asks goes on to [`Self::get`].
    pub fn get_from_memory(&self, digest: &Digest) -> Option<Bytes> {
        let bytes = self.memory.find(digest)?;
        self.metrics.gets.inc();
        self.metrics.memory_hits.inc();
        Some(bytes)
    }

    /// The second rung alone, for whom the first had nothing. As there, finding nothing is no get yet.
    pub async fn get_from_disk(self: &Arc<Self>, digest: &Digest) -> Option<Arc<DiskBlob>> {
        let blob = self.find_on_disk(digest, self.disk.as_deref()?).await?;
        self.metrics.gets.inc();
        Some(blob)
    }

    /// Whether a blob of this size will be kept once it has verified.
    pub fn keeps(&self, size: Option<u64>) -> bool {
        size.is_some_and(|size| self.memory.takes(size) || self.disk.as_ref().is_some_and(|disk| disk.takes(size)))
    }

    /// The blob's size, and which tier knew it; absent if the origin says so. Never loads it.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stat(&self, digest: &Digest) -> Result<(Opened, Option<Tier>), Fault> {
        if let Some(bytes) = self.memory.find(digest) {
            return Ok((Opened::Blob(Some(bytes.len() as u64)), Some(Tier::Memory)));
        }
        if let Some(size) = self.disk.as_ref().and_then(|disk| disk.knows(digest)) {
            return Ok((Opened::Blob(Some(size)), Some(Tier::Disk)));
        }
        let known = match self.flights.peek(digest) {
            Some(known) => known,
            None => self.origin.stat(digest).await?,
        };
        Ok((known.map_or(Opened::Absent, |size| Opened::Blob(Some(size))), None))
    }

    /// The blob's size, if the origin has it for good: an upload that has not been sent yet may then stay where it is.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stored_at_origin(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Fault> {
        self.origin.holds(digest, size).await
    }

    /// Stores an upload at the origin, by name or letting its bytes name it, and keeps it. Done only when the origin says that it is durable.
    ///
    /// # Errors
    /// The client's, the origin's, or a limit; nothing is kept then.
    pub async fn put(&self, digest: Option<Digest>, size: Option<u64>, upload: Upload<'_>) -> Result<(Put, Digest, u64), Fault> {
        let copy = Mutex::new(UploadCopy::new(self, size));
        let teed = upload.then(|part| async {
            if let Ok(part) = &part {
                copy.lock().await.take(part).await;
            }
            part
        });
        let put = self.origin.put(digest, size, teed.boxed()).await;
        let (put, verified) = put.inspect_err(|fault| {
            if matches!(fault, Fault::Mismatch(_)) {
                self.metrics.corrupt("client");
            }
        })?;
        let (digest, size) = (verified.digest(), verified.size());
        copy.into_inner().keep(verified).await;
        self.flights.stored(&digest);
        Ok((put, digest, size))
    }

    /// Deletes the blob at the origin, then here; false if the origin did not have it.
    ///
    /// # Errors
    /// The origin does not delete, or could not be asked.
    pub async fn delete(&self, digest: &Digest) -> Result<bool, Fault> {
        let deleted = self.origin.delete(digest).await?;
        self.forget(digest).await;
        Ok(deleted)
    }

    /// Drops the blob from every tier of this node. The order matters: a flight that has not landed by now will not keep it.
    pub async fn forget(&self, digest: &Digest) {
        self.flights.forget(digest);
        if let Some(disk) = &self.disk {
            disk.forget(digest).await;
        }
        self.memory.forget(digest);
    }

    /// The state of every tier, by name.
    pub fn tiers(&self) -> [(&'static str, TierStats); 2] {
        let disk = self.disk.as_ref().map(|disk| disk.stats(self.metrics.disk_hits.get())).unwrap_or_default();
        [("memory", self.memory.stats(self.metrics.memory_hits.get())), ("disk", disk)]
    }

    /// Groupcache's figures.
    pub fn stats(&self) -> Stats {
        let metrics = &self.metrics;
        let [(_, memory), (_, disk)] = self.tiers();
        let ended = |outcome| metrics.source_loads("origin", outcome);
        Stats {
            gets: metrics.gets.get(),
            cache_hits: metrics.memory_hits.get() + metrics.disk_hits.get(),
            peer_loads: 0,
            peer_errors: 0,
            loads: metrics.loads.get(),
            loads_deduped: metrics.flights.get(),
            local_loads: ended(Outcome::Ok) + ended(Outcome::Absent),
            local_load_errs: ended(Outcome::Error),
            server_requests: 0,
            tiers: Tiers { memory, mirror: TierStats::default(), disk },
        }
    }
}

/// The tier that knew something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Memory.
    Memory,
    /// Disk.
    Disk,
}

/// Reads a part of a blob from disk. Where the disk fails, it goes on at the same offset from the next place that has the blob, which is
/// most often a flight: whoever reads notices nothing.
pub struct DiskReader {
    ladder: Arc<Ladder>,
    digest: Digest,
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
        tracing::warn!(digest = %self.digest, at = self.at, "the disk failed; going on from elsewhere");
        Ok(match self.ladder.climb(&self.digest, None).await {
            Found::Memory(bytes) => Rest::Memory(bytes),
            Found::Disk(blob) => Rest::Disk(blob),
            Found::Flight { mut reader, .. } => match reader.open(true, |_| (self.at, Some(self.end))).await? {
                Opened::Blob(_) => Rest::Flight(reader),
                Opened::Absent => return Err(Fault::Unusable { source_name: "origin", why: "the blob is gone".into() }),
            },
        })
    }
}

/// A copy of an upload for the tiers, given up as soon as it has no place there.
struct UploadCopy<'a> {
    ladder: &'a Ladder,
    /// The size that was announced.
    size: Option<u64>,
    kept: Kept,
}

enum Kept {
    Memory(Vec<u8>, spool::Lease),
    Disk(Box<DiskFile>),
    Nothing,
}

impl<'a> UploadCopy<'a> {
    fn new(ladder: &'a Ladder, size: Option<u64>) -> Self {
        let known = size.unwrap_or(0);
        let lease = ladder.memory.takes(known).then(|| ladder.upload_memory.lease(known)).flatten();
        // Not with the announced capacity: a client that announces much and sends little should not cost much.
        Self { ladder, size, kept: Kept::Memory(Vec::new(), lease.unwrap_or_else(|| ladder.upload_memory.empty())) }
    }

    async fn take(&mut self, part: &Bytes) {
        self.kept = match std::mem::replace(&mut self.kept, Kept::Nothing) {
            Kept::Memory(mut bytes, mut lease) => {
                let after = (bytes.len() + part.len()) as u64;
                if self.ladder.memory.takes(after.max(self.size.unwrap_or(0))) && lease.cover(after) {
                    bytes.extend_from_slice(part);
                    Kept::Memory(bytes, lease)
                } else {
                    self.to_disk(vec![bytes.into(), part.clone()], after).await
                }
            }
            Kept::Disk(file) => flight::grow(*file, vec![part.clone()]).await.map_or(Kept::Nothing, |file| Kept::Disk(file.into())),
            Kept::Nothing => Kept::Nothing,
        };
    }

    async fn to_disk(&self, parts: Vec<Bytes>, so_far: u64) -> Kept {
        let Some(disk) = self.ladder.disk.as_ref().filter(|disk| disk.takes(self.size.unwrap_or(so_far))) else { return Kept::Nothing };
        flight::tier_file(disk.clone(), parts).await.map_or(Kept::Nothing, |file| Kept::Disk(file.into()))
    }

    /// Keeps the copy as the blob that the upload proved to be.
    async fn keep(self, proof: Verified<()>) {
        match self.kept {
            Kept::Memory(mut bytes, _) if bytes.len() as u64 == proof.size() => {
                bytes.shrink_to_fit();
                let blob = proof.with_content(Bytes::from(bytes));
                if let Some(disk) = &self.ladder.disk {
                    disk.keep_later(blob.clone());
                }
                self.ladder.memory.keep(blob);
            }
            Kept::Disk(file) => {
                if let Some(disk) = &self.ladder.disk {
                    disk.keep_file(proof.with_content(*file)).await;
                }
            }
            Kept::Memory(..) | Kept::Nothing => {}
        }
    }
}
