//! The data path: get, stat, put, forget. A get climbs memory → a flight over the origin.

use crate::{
    fault::Fault,
    flight::{Flights, Joined, Opened, Reader},
    memory::Memory,
    metrics::{Metrics, Outcome},
    spool,
    tier::TierStats,
    upstream::{Put, Upload, Upstream},
};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use serde::Serialize;
use std::sync::Arc;

/// The tiers and sources of this node, in the order in which they are asked.
pub struct Ladder {
    memory: Arc<Memory>,
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
        memory: Arc<Memory>,
        flights: Arc<Flights>,
        origin: Arc<Upstream>,
        upload_memory: Arc<spool::Budget>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { memory, flights, origin, upload_memory, metrics }
    }

    /// Finds the blob, or sets out to load it. Never waits: what is on its way is waited for by its reader.
    pub fn get(&self, digest: &Digest) -> Found {
        if let Some(bytes) = self.get_from_memory(digest) {
            return Found::Memory(bytes);
        }
        self.metrics.gets.inc();
        match self.flights.join(digest) {
            Joined::Kept(bytes) => {
                self.metrics.memory_hits.inc();
                Found::Memory(bytes)
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
        }
    }

    /// The first rung alone. Finding nothing there is no get yet: whoever asks goes on to [`Self::get`].
    pub fn get_from_memory(&self, digest: &Digest) -> Option<Bytes> {
        let bytes = self.memory.find(digest)?;
        self.metrics.gets.inc();
        self.metrics.memory_hits.inc();
        Some(bytes)
    }

    /// Whether a blob of this size will be kept once it has verified.
    pub fn keeps(&self, size: Option<u64>) -> bool {
        size.is_some_and(|size| self.memory.takes(size))
    }

    /// The blob's size, and whether a tier knew it; absent if the origin says so. Never loads it.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stat(&self, digest: &Digest) -> Result<(Opened, bool), Fault> {
        if let Some(bytes) = self.memory.find(digest) {
            return Ok((Opened::Blob(Some(bytes.len() as u64)), true));
        }
        let known = match self.flights.peek(digest) {
            Some(known) => known,
            None => self.origin.stat(digest).await?,
        };
        Ok((known.map_or(Opened::Absent, |size| Opened::Blob(Some(size))), false))
    }

    /// Whether the origin itself has the blob: what an upload that has not been sent yet hangs on.
    ///
    /// # Errors
    /// The origin could not be asked.
    pub async fn stored_at_origin(&self, digest: &Digest) -> Result<Option<u64>, Fault> {
        self.origin.stat(digest).await
    }

    /// Stores an upload at the origin, by name or letting its bytes name it, and keeps it. Done only when the origin says that it is durable.
    ///
    /// # Errors
    /// The client's, the origin's, or a limit; nothing is kept then.
    pub async fn put(&self, digest: Option<Digest>, size: Option<u64>, upload: Upload<'_>) -> Result<(Put, Digest, u64), Fault> {
        let mut copy = UploadCopy::new(self, size);
        let put = self.origin.put(digest, size, upload, |chunk| copy.take(chunk)).await;
        let (put, verified) = put.inspect_err(|fault| {
            if matches!(fault, Fault::Mismatch(_)) {
                self.metrics.corrupt("client");
            }
        })?;
        let (digest, size) = (verified.digest(), verified.size());
        if let Some(blob) = copy.of(verified) {
            self.memory.keep(blob);
        }
        self.flights.stored(&digest);
        Ok((put, digest, size))
    }

    /// Deletes the blob at the origin, then here; false if the origin did not have it.
    ///
    /// # Errors
    /// The origin does not delete, or could not be asked.
    pub async fn delete(&self, digest: &Digest) -> Result<bool, Fault> {
        let deleted = self.origin.delete(digest).await?;
        self.forget(digest);
        Ok(deleted)
    }

    /// Drops the blob from every tier of this node. The order matters: a flight that has not landed by now will not keep it.
    pub fn forget(&self, digest: &Digest) {
        self.flights.forget(digest);
        self.memory.forget(digest);
    }

    /// The state of every tier, by name.
    pub fn tiers(&self) -> [(&'static str, TierStats); 1] {
        [("memory", self.memory.stats(self.metrics.memory_hits.get()))]
    }

    /// Groupcache's figures.
    pub fn stats(&self) -> Stats {
        let metrics = &self.metrics;
        let [(_, memory)] = self.tiers();
        let ended = |outcome| metrics.source_loads("origin", outcome);
        Stats {
            gets: metrics.gets.get(),
            cache_hits: metrics.memory_hits.get(),
            peer_loads: 0,
            peer_errors: 0,
            loads: metrics.loads.get(),
            loads_deduped: metrics.flights.get(),
            local_loads: ended(Outcome::Ok) + ended(Outcome::Absent),
            local_load_errs: ended(Outcome::Error),
            server_requests: 0,
            tiers: Tiers { memory, mirror: TierStats::default(), disk: TierStats::default() },
        }
    }
}

/// A copy of an upload for the memory tier, given up as soon as it has no place there.
struct UploadCopy<'a> {
    ladder: &'a Ladder,
    kept: Option<(Vec<u8>, spool::Lease)>,
}

impl<'a> UploadCopy<'a> {
    fn new(ladder: &'a Ladder, size: Option<u64>) -> Self {
        let size = size.unwrap_or(0);
        let lease = ladder.memory.takes(size).then(|| ladder.upload_memory.lease(size)).flatten();
        Self { ladder, kept: lease.map(|lease| (Vec::with_capacity(usize::try_from(size).unwrap_or(0)), lease)) }
    }

    fn take(&mut self, chunk: &Bytes) {
        let Some((bytes, lease)) = &mut self.kept else { return };
        let after = (bytes.len() + chunk.len()) as u64;
        if self.ladder.memory.takes(after) && lease.cover(after) {
            bytes.extend_from_slice(chunk);
        } else {
            self.kept = None;
        }
    }

    /// The copy as the blob that the upload proved to be.
    fn of(self, proof: Verified<()>) -> Option<Verified<Bytes>> {
        let (mut bytes, _) = self.kept?;
        bytes.shrink_to_fit();
        Some(proof.with_content(bytes.into()))
    }
}
