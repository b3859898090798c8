//! The cache: memory → mirror → disk → a flight over the sources.

use crate::{
    budget::Budget,
    disk::{Disk, DiskBlob},
    fault::Fault,
    flights::{Asker, DiskIndex, Flights, InProgress, Joined},
    memory::Memory,
    metrics::Metrics,
    plan::{OneSource, Plan},
    purges::Purges,
    reader::{Hit, PIECE, Part, Reader},
    source::{Source, Stat},
    spool::Spools,
    tier::TierStats,
    tiers::Tiers,
    via::{SourceKind, Tier, Via},
};
use arc_swap::ArcSwap;
use castier_blob::{Digest, Verifier};
use castier_config as config;
use std::{sync::Arc, time::Duration};
use tokio::sync::Semaphore;

/// Makes the plan of a flight. Called in the task of the request that starts the flight.
pub type Planner = Box<dyn Fn(&Digest) -> Box<dyn Plan> + Send + Sync>;

/// The tiers, and the flights that fill them.
pub struct Cache {
    pub(crate) tiers: Tiers,
    pub(crate) flights: Flights,
    pub(crate) planner: Planner,
    /// `fill.max_in_flight`.
    pub(crate) fill_permits: Arc<Semaphore>,
    pub(crate) spools: Arc<Spools>,
    /// `origin.retries`.
    pub(crate) retries: usize,
    /// `fill.max_wait`.
    pub(crate) max_wait: Duration,
    /// `fill.finish_under`.
    pub(crate) finish_under: u64,
    /// `verify.buffer_up_to`.
    pub(crate) buffer_up_to: u64,
    pub(crate) limits: Arc<ArcSwap<config::Limits>>,
    pub(crate) purges: Purges,
    pub(crate) metrics: Arc<Metrics>,
}

impl Cache {
    /// A cache over these tiers, with every limit as configured. `planner` makes the plan of each flight.
    pub fn new(
        config: &config::Castier,
        limits: Arc<ArcSwap<config::Limits>>,
        tiers: Tiers,
        spools: Spools,
        planner: Planner,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            tiers,
            flights: Flights::default(),
            planner,
            fill_permits: Arc::new(Semaphore::new(config.fill.max_in_flight)),
            spools: Arc::new(spools),
            retries: config.origin.retries as usize,
            max_wait: config.fill.max_wait.get(),
            finish_under: config.fill.finish_under.get(),
            buffer_up_to: config.verify.buffer_up_to.get(),
            limits,
            purges: Purges::default(),
            metrics,
        })
    }

    /// A cache in memory over one source, with every limit at its default. Its metrics are registered nowhere.
    ///
    /// # Errors
    /// The metrics could not be made.
    pub fn over(source: Arc<dyn Source>) -> prometheus::Result<Arc<Self>> {
        let config = config::Castier::default();
        let metrics = Arc::new(Metrics::new(&prometheus::Registry::new())?);
        let budget = Budget::new(config.fill.memory.get());
        let tiers = Tiers { memory: Arc::new(Memory::new(&config.memory, &budget)), mirror: None, disk: None };
        let spools = Spools::new(&config, budget, metrics.clone());
        let limits = Arc::new(ArcSwap::from_pointee(config.limits.clone()));
        Ok(Self::new(&config, limits, tiers, spools, Box::new(move |_| Box::new(OneSource(source.clone()))), metrics))
    }

    /// Gets the part of a blob that `part` selects, given the size if it is known. Returns as soon as the response can begin. `None`: the origin says
    /// that there is no such blob. Dropping the future leaves the flight.
    ///
    /// # Errors
    /// Why no source could give the blob.
    pub async fn get(self: &Arc<Self>, digest: &Digest, asker: Asker, part: impl Fn(Option<u64>) -> Part) -> Result<Option<Hit>, Fault> {
        if let Some(hit) = self.peek(digest, asker, &part) {
            return Ok(Some(hit));
        }
        let mut index = DiskIndex::Believe;
        let joined = loop {
            if let Some(blob) = self.find_on_disk(digest, asker).await {
                return Ok(Some(Hit::disk(self, blob, asker, part)));
            }
            match self.join(digest, asker, index) {
                // It came since we looked, or the index lists a file that is gone. The next look tells which.
                Joined::Disk => index = DiskIndex::Ignore,
                joined => break joined,
            }
        };
        // Only now, with no wait between this and the count of its outcome: a client may leave at every wait, and the ledger must balance.
        self.count(digest, asker, None);
        match joined {
            Joined::Memory(bytes, tier) => {
                self.hit(tier, asker);
                Ok(Some(Hit::memory(bytes, tier, part)))
            }
            Joined::Disk | Joined::Absent => Ok(None),
            Joined::Flight(reader) => reader.open(part).await,
        }
    }

    /// The blob, if memory has it: the fast path. Finding nothing is not counted as a get, since the caller goes on to [`Self::get`].
    pub fn peek(&self, digest: &Digest, asker: Asker, part: impl Fn(Option<u64>) -> Part) -> Option<Hit> {
        let (bytes, tier) = self.tiers.in_memory(digest)?;
        self.count(digest, asker, Some(tier));
        self.hit(tier, asker);
        Some(Hit::memory(bytes, tier, part))
    }

    /// The whole blob, if the disk has it: the fast path for a request that [`Self::peek`] has not answered. Finding nothing is not counted either.
    pub async fn peek_disk(self: &Arc<Self>, digest: &Digest, asker: Asker) -> Option<Hit> {
        let blob = self.find_on_disk(digest, asker).await?;
        Some(Hit::disk(self, blob, asker, |_| Part::Whole))
    }

    /// A part of the blob if a tier keeps it, for a peer (`only-if-cached`). Finding nothing is not counted.
    pub async fn kept(self: &Arc<Self>, digest: &Digest, part: impl Fn(Option<u64>) -> Part) -> Option<Hit> {
        if let Some(hit) = self.peek(digest, Asker::Peer, &part) {
            return Some(hit);
        }
        let blob = self.tiers.disk.as_ref()?.find(digest).await?;
        self.count(digest, Asker::Peer, Some(Tier::Disk));
        self.hit(Tier::Disk, Asker::Peer);
        Some(Hit::disk(self, blob, Asker::Peer, part))
    }

    /// The size of a blob that a tier keeps, and which tier.
    pub async fn kept_size(&self, digest: &Digest) -> Option<(u64, Tier)> {
        if let Some((bytes, tier)) = self.tiers.in_memory(digest) {
            return Some((bytes.len() as u64, tier));
        }
        self.tiers.disk.as_ref()?.stat(digest).await.map(|size| (size, Tier::Disk))
    }

    /// What is known about a blob without asking a source. `None`: nothing.
    pub async fn stat(&self, digest: &Digest) -> Option<(Stat, Via)> {
        if let Some((size, tier)) = self.kept_size(digest).await {
            return Some((Stat::Present(Some(size)), Via::Tier(tier)));
        }
        let known = self.flights.known(digest)?;
        Some((known.map_or(Stat::Absent, |size| Stat::Present(Some(size))), Via::asked(SourceKind::Origin)))
    }

    /// Whether a flight of the blob is on its way.
    pub fn is_filling(&self, digest: &Digest) -> bool {
        self.flights.is_filling(digest)
    }

    /// How many flights are on their way, and the oldest of them, at most `most`.
    pub fn in_progress(&self, most: usize) -> (usize, Vec<InProgress>) {
        self.flights.in_progress(most)
    }

    /// The blob is stored at the origin now: an absence that is remembered is no longer true.
    pub fn stored(&self, digest: &Digest) {
        self.flights.stored(digest);
    }

    /// Drops the blob from every tier. An upload or a flight that has not been kept by now will not be.
    pub async fn forget(&self, digest: &Digest) {
        // In this order: see `purges`, and `Fill::keep`.
        self.purges.note(digest);
        self.flights.forget(digest);
        self.tiers.forget(digest).await;
    }

    /// Loads a blob that a tier has lost. Nobody reads it.
    pub async fn refetch(self: &Arc<Self>, digest: Digest) {
        if self.peek(&digest, Asker::Client, |_| Part::Whole).is_some() {
            return;
        }
        if self.find_on_disk(&digest, Asker::Client).await.is_some() {
            return;
        }
        self.count(&digest, Asker::Client, None);
        match self.join(&digest, Asker::Client, DiskIndex::Ignore) {
            Joined::Flight(mut reader) => {
                if let Err(fault) = reader.finished().await {
                    tracing::warn!(%digest, %fault, "a blob that had rotted on the disk could not be fetched again");
                }
            }
            Joined::Memory(_, tier) => self.hit(tier, Asker::Client),
            Joined::Disk | Joined::Absent => {}
        }
    }

    /// A reader of a part of the blob for a response that the disk, or a spool's file, has failed. A get of its own, so that the ledger balances.
    pub(crate) async fn get_past_disk(
        self: &Arc<Self>,
        digest: &Digest,
        asker: Asker,
        part: impl Fn(Option<u64>) -> Part,
    ) -> Result<Reader, Fault> {
        if let Some(hit) = self.peek(digest, asker, &part) {
            return Ok(hit.reader);
        }
        self.count(digest, asker, None);
        let hit = match self.join(digest, asker, DiskIndex::Ignore) {
            Joined::Memory(bytes, tier) => {
                self.hit(tier, asker);
                Some(Hit::memory(bytes, tier, part))
            }
            Joined::Flight(reader) => reader.open(part).await?,
            Joined::Disk | Joined::Absent => None,
        };
        hit.map(|hit| hit.reader).ok_or(Fault::Unusable { source_name: "origin", why: "the blob is gone".into() })
    }

    /// Looks onto the disk. Counts the get if the blob is there.
    async fn find_on_disk(self: &Arc<Self>, digest: &Digest, asker: Asker) -> Option<Arc<DiskBlob>> {
        let blob = self.tiers.disk.as_ref()?.find(digest).await?;
        self.count(digest, asker, Some(Tier::Disk));
        self.hit(Tier::Disk, asker);
        // At two, four, eight … hits the blob is offered to memory, whose admission policy has seen each of these gets.
        if let hits @ 2.. = blob.hit()
            && hits.is_power_of_two()
            && self.tiers.memory.takes(blob.size())
        {
            tokio::spawn(self.clone().promote(*digest, blob.clone()));
        }
        Some(blob)
    }

    /// Offers a blob of the disk to memory.
    async fn promote(self: Arc<Self>, digest: Digest, blob: Arc<DiskBlob>) {
        let Some(_lease) = self.spools.memory.lease(blob.size()) else { return };
        let mut verifier = Verifier::of(digest, Vec::with_capacity(usize::try_from(blob.size()).unwrap_or(0)));
        while verifier.seen() < blob.size() {
            let Ok(part) = blob.read(verifier.seen(), PIECE).await else { return };
            let Ok(()): Result<(), std::convert::Infallible> = verifier.write(&part);
        }
        if let Ok(verified) = verifier.finish() {
            self.tiers.memory.keep(verified);
            // A purge may have come meanwhile. It drops the blob from the disk first and from memory last, so one of the two sees the other.
            if self.tiers.disk.as_ref().is_none_or(|disk| disk.knows(&digest).is_none()) {
                self.tiers.memory.forget(&digest);
            }
        }
    }

    /// Counts one get. `hit`: the tier that had the blob; none if that is not known yet.
    fn count(&self, digest: &Digest, asker: Asker, hit: Option<Tier>) {
        self.tiers.count(digest, hit);
        self.metrics.get(asker);
    }

    /// Counts a get that a tier answered.
    fn hit(&self, tier: Tier, asker: Asker) {
        self.metrics.hit(tier, asker);
    }

    /// The disk tier, if there is one.
    pub const fn disk(&self) -> Option<&Arc<Disk>> {
        self.tiers.disk.as_ref()
    }

    /// `fill.memory`.
    pub(crate) fn memory_budget(&self) -> &Arc<Budget> {
        &self.spools.memory
    }

    /// The state of every tier. Those that are not configured are empty.
    pub fn tier_stats(&self) -> [(Tier, TierStats); 3] {
        let Tiers { memory, mirror, disk } = &self.tiers;
        let hits = |tier| self.metrics.hits(tier);
        [
            (Tier::Memory, memory.stats(hits(Tier::Memory))),
            (Tier::Mirror, mirror.as_ref().map(|mirror| mirror.stats(hits(Tier::Mirror))).unwrap_or_default()),
            (Tier::Disk, disk.as_ref().map(|disk| disk.stats(hits(Tier::Disk))).unwrap_or_default()),
        ]
    }
}
