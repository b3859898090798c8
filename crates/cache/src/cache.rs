//! The cache: memory → mirror → disk → a flight over the sources.

use crate::{
    budget::Budget,
    disk::{Disk, DiskBlob},
    fault::Fault,
    flights::{Asker, DiskIndex, Flights, InProgress, Joined},
    memory::Memory,
    metrics::Metrics,
    parallel::Settings,
    plan::{OneSource, Plan},
    purges::Purges,
    reader::{FlightReader, Hit, PIECE, Part, Reader},
    resource::{Home, Key, Location, Resource, Visibility},
    retries::RetryBudget,
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

/// Makes the plan of a flight of a blob of the origin. Called in the task of the request that starts the flight.
pub type Planner = Box<dyn Fn(&Digest) -> Box<dyn Plan> + Send + Sync>;

/// How often a request joins flights of other locations that give nothing, before it takes what comes.
const MOST_ELSEWHERE: usize = 8;

/// What a look at the tiers and the flights found.
enum Found {
    /// A tier has it; `None`: it is absent.
    Hit(Option<Hit>),
    Flight(FlightReader),
}

/// What a look onto the disk found.
enum OnDisk {
    Found(Arc<DiskBlob>),
    /// The request may not see it.
    Hidden,
    Missing,
}

/// A place in a flight. The flight goes on at least as long as somebody has one.
pub struct Begun(FlightReader);

impl Begun {
    /// Whether the flight asks the location of this resource: this call of [`Cache::begin`] has begun it.
    pub fn is_at(&self, resource: &Resource) -> bool {
        self.0.is_at(&resource.at)
    }

    /// Waits until the response can begin. `None`: the flight brings nothing.
    ///
    /// # Errors
    /// The flight's fault.
    pub async fn open(self, part: impl Fn(Option<u64>) -> Part) -> Result<Option<Hit>, Fault> {
        self.0.open(part).await
    }
}

/// The tiers, and the flights that fill them.
pub struct Cache {
    pub(crate) tiers: Tiers,
    pub(crate) flights: Flights,
    /// The origin.
    home: Arc<dyn Location>,
    /// `fill.max_in_flight`.
    pub(crate) fill_permits: Arc<Semaphore>,
    pub(crate) spools: Arc<Spools>,
    /// `origin.retries`.
    pub(crate) retries: usize,
    /// `origin.retry_budget`.
    pub(crate) retry_budget: Arc<RetryBudget>,
    /// `fill.max_wait`.
    pub(crate) max_wait: Duration,
    /// `fill.max_waiting`.
    pub(crate) waiting: Semaphore,
    /// How large blobs are read.
    pub(crate) parallel: Settings,
    /// `fill.finish_under`.
    pub(crate) finish_under: u64,
    /// `verify.buffer_up_to`.
    pub(crate) buffer_up_to: u64,
    pub(crate) limits: Arc<ArcSwap<config::Limits>>,
    pub(crate) purges: Purges,
    pub(crate) metrics: Arc<Metrics>,
}

impl Cache {
    /// A cache over these tiers, with every limit as configured. `planner` makes the plan of each flight that asks the
    /// origin.
    pub fn new(
        config: &config::Castier,
        limits: Arc<ArcSwap<config::Limits>>,
        tiers: Tiers,
        spools: Spools,
        planner: Planner,
        metrics: Arc<Metrics>,
        retry_budget: Arc<RetryBudget>,
    ) -> Arc<Self> {
        Arc::new(Self {
            tiers,
            flights: Flights::default(),
            home: Arc::new(Home(planner)),
            fill_permits: Arc::new(Semaphore::new(config.fill.max_in_flight)),
            spools: Arc::new(spools),
            retries: config.origin.retries as usize,
            retry_budget,
            max_wait: config.fill.max_wait.get(),
            waiting: Semaphore::new(config.fill.max_waiting.min(Semaphore::MAX_PERMITS)),
            parallel: Settings::new(config),
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
        let retry_budget = RetryBudget::new(config.origin.retry_budget, prometheus::IntCounter::new("refused", "Not registered")?);
        let budget = Budget::new(config.fill.memory.get());
        let tiers = Tiers { memory: Arc::new(Memory::new(&config.memory, &budget)), mirror: None, disk: None };
        let spools = Spools::new(&config, budget, metrics.clone());
        let limits = Arc::new(ArcSwap::from_pointee(config.limits.clone()));
        Ok(Self::new(&config, limits, tiers, spools, Box::new(move |_| Box::new(OneSource(source.clone()))), metrics, retry_budget))
    }

    /// Gets the part of a blob that `part` selects, given the size if it is known. Returns as soon as the response can begin. `None`: the origin says
    /// that there is no such blob. Dropping the future leaves the flight.
    ///
    /// # Errors
    /// [`Fault::Hidden`]: the blob is private; see [`Self::publish`]. Else why no source could give the blob.
    pub async fn get(self: &Arc<Self>, digest: &Digest, asker: Asker, part: impl Fn(Option<u64>) -> Part) -> Result<Option<Hit>, Fault> {
        if let Some(hit) = self.peek(digest, asker, &part) {
            return Ok(Some(hit));
        }
        self.get_at(&self.of_origin(digest), asker, part).await
    }

    /// As [`Self::get`], for what is looked for elsewhere than at the origin. The caller has checked that the client may have it.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn get_at(
        self: &Arc<Self>,
        resource: &Resource,
        asker: Asker,
        part: impl Fn(Option<u64>) -> Part,
    ) -> Result<Option<Hit>, Fault> {
        for elsewhere in 0.. {
            let reader = match self.find_or_join(resource, asker, &part).await? {
                Found::Hit(hit) => return Ok(hit),
                Found::Flight(reader) => reader,
            };
            let is_elsewhere = reader.is_elsewhere(resource.at.id());
            match reader.open(&part).await {
                // Another location does not have it, or fails. Nothing of that counts here: this request looks again, and starts its own flight
                // in the end.
                Ok(None) | Err(_) if is_elsewhere && elsewhere < MOST_ELSEWHERE => {}
                opened => return opened,
            }
        }
        Ok(None)
    }

    /// Looks into the tiers, and joins or starts a flight if they do not have it. Counts the get.
    async fn find_or_join(
        self: &Arc<Self>,
        resource: &Resource,
        asker: Asker,
        part: &impl Fn(Option<u64>) -> Part,
    ) -> Result<Found, Fault> {
        let (digest, sees) = (resource.key.digest(), resource.at.visibility());
        if let Some(hit) = digest.and_then(|digest| self.peek_as(&digest, sees, asker, part)) {
            return Ok(Found::Hit(Some(hit)));
        }
        let mut index = DiskIndex::Believe;
        let joined = loop {
            if let Some(digest) = digest {
                match self.find_on_disk(&digest, sees, asker).await {
                    OnDisk::Found(blob) => return Ok(Found::Hit(Some(Hit::disk(self, &resource.at, blob, asker, part)))),
                    OnDisk::Hidden => return Err(Fault::Hidden),
                    OnDisk::Missing => {}
                }
            }
            match self.join(resource, asker, index) {
                // It came since we looked, or the index lists a file that is gone. The next look tells which.
                Joined::Disk => index = DiskIndex::Ignore,
                Joined::Hidden => return Err(Fault::Hidden),
                joined => break joined,
            }
        };
        // Only now, with no wait between this and the count of its outcome: a client may leave at every wait, and the ledger must balance.
        self.count(&resource.key, asker, None);
        Ok(match joined {
            Joined::Memory(bytes, tier) => {
                self.hit(tier, asker);
                Found::Hit(Some(Hit::memory(bytes, tier, part)))
            }
            Joined::Disk | Joined::Absent | Joined::Hidden => Found::Hit(None),
            Joined::Flight(reader) => Found::Flight(reader),
        })
    }

    /// Begins the flight of a resource whose source has answered already, or joins one that has begun meanwhile. Counts a get, which is that of the
    /// request that opens what this returns. `None`: a tier has it.
    ///
    /// # Errors
    /// [`Fault::Hidden`]: a tier or a flight has it, and not for this location.
    pub fn begin(self: &Arc<Self>, resource: &Resource, asker: Asker) -> Result<Option<Begun>, Fault> {
        let reader = match self.join(resource, asker, DiskIndex::Believe) {
            Joined::Flight(reader) => reader,
            Joined::Hidden => return Err(Fault::Hidden),
            Joined::Memory(..) | Joined::Disk | Joined::Absent => return Ok(None),
        };
        self.count(&resource.key, asker, None);
        Ok(Some(Begun(reader)))
    }

    /// Reads from the flight of a resource. `None`: there is none.
    ///
    /// # Errors
    /// The flight's fault.
    pub async fn get_from_flight(
        self: &Arc<Self>,
        resource: &Resource,
        asker: Asker,
        part: impl Fn(Option<u64>) -> Part,
    ) -> Result<Option<Hit>, Fault> {
        let Some(reader) = self.join_only(resource, asker) else { return Ok(None) };
        self.count(&resource.key, asker, None);
        reader.open(part).await
    }

    /// Whether [`Self::get_from_flight`] would find a flight.
    pub fn has_flight(&self, resource: &Resource) -> bool {
        self.flights.has(resource)
    }

    /// The blob, if memory has it: the fast path. Finding nothing is not counted as a get, since the caller goes on to [`Self::get`].
    pub fn peek(&self, digest: &Digest, asker: Asker, part: impl Fn(Option<u64>) -> Part) -> Option<Hit> {
        self.peek_as(digest, Visibility::Public, asker, part)
    }

    fn peek_as(&self, digest: &Digest, sees: Visibility, asker: Asker, part: impl Fn(Option<u64>) -> Part) -> Option<Hit> {
        let (bytes, tier) = self.tiers.in_memory(digest, sees)?;
        self.count(&Key::Blob(*digest), asker, Some(tier));
        self.hit(tier, asker);
        Some(Hit::memory(bytes, tier, part))
    }

    /// The whole blob, if the disk has it: the fast path for a request that [`Self::peek`] has not answered. Finding nothing is not counted either.
    pub async fn peek_disk(self: &Arc<Self>, digest: &Digest, asker: Asker) -> Option<Hit> {
        match self.find_on_disk(digest, Visibility::Public, asker).await {
            OnDisk::Found(blob) => Some(Hit::disk(self, &self.home, blob, asker, |_| Part::Whole)),
            OnDisk::Hidden | OnDisk::Missing => None,
        }
    }

    /// A part of the blob if a tier keeps it, for a peer (`only-if-cached`). Finding nothing is not counted.
    pub async fn kept(self: &Arc<Self>, digest: &Digest, part: impl Fn(Option<u64>) -> Part) -> Option<Hit> {
        if let Some(hit) = self.peek(digest, Asker::Peer, &part) {
            return Some(hit);
        }
        let blob = self.tiers.disk.as_ref()?.find(digest).await.filter(|blob| blob.visibility() == Visibility::Public)?;
        self.count(&Key::Blob(*digest), Asker::Peer, Some(Tier::Disk));
        self.hit(Tier::Disk, Asker::Peer);
        Some(Hit::disk(self, &self.home, blob, Asker::Peer, part))
    }

    /// The size of a blob that a tier keeps and every request may see, and which tier.
    pub async fn kept_size(&self, digest: &Digest) -> Option<(u64, Tier)> {
        self.kept_size_as(digest, Visibility::Public).await
    }

    /// As [`Self::kept_size`], for a request that `sees` so much.
    pub async fn kept_size_as(&self, digest: &Digest, sees: Visibility) -> Option<(u64, Tier)> {
        if let Some((bytes, tier)) = self.tiers.in_memory(digest, sees) {
            return Some((bytes.len() as u64, tier));
        }
        let disk = self.tiers.disk.as_ref()?;
        let size = disk.stat(digest).await?;
        // Only an open file tells who may see it.
        let is_seen = sees == Visibility::Private || disk.find(digest).await?.visibility() == Visibility::Public;
        is_seen.then_some((size, Tier::Disk))
    }

    /// The location of a request is the origin.
    fn of_origin(&self, digest: &Digest) -> Resource {
        Resource { key: Key::Blob(*digest), at: self.home.clone() }
    }

    /// Everybody may see a blob from now on: a location that checks nobody's credentials has said that it has it.
    pub fn publish(&self, digest: &Digest) {
        self.flights.publish(digest);
        self.tiers.publish(digest);
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
        self.publish(digest);
    }

    /// Drops the blob from every tier. An upload or a flight that has not been kept by now will not be.
    pub async fn forget(&self, digest: &Digest) {
        // In this order: see `purges`, and `Fill::keep`.
        self.purges.note(digest);
        self.flights.forget(&Key::Blob(*digest));
        self.tiers.forget(digest).await;
    }

    /// Nothing that comes under a name now is to be joined any more. Requests that read it may go on.
    pub fn forget_name(&self, name: &Digest) {
        self.flights.forget(&Key::Name(*name));
    }

    /// Loads a blob that a tier has lost. Nobody reads it.
    pub async fn refetch(self: &Arc<Self>, digest: Digest) {
        if self.peek(&digest, Asker::Client, |_| Part::Whole).is_some() {
            return;
        }
        if let OnDisk::Found(_) | OnDisk::Hidden = self.find_on_disk(&digest, Visibility::Public, Asker::Client).await {
            return;
        }
        let joined = self.join(&self.of_origin(&digest), Asker::Client, DiskIndex::Ignore);
        if matches!(joined, Joined::Hidden) {
            return;
        }
        self.count(&Key::Blob(digest), Asker::Client, None);
        match joined {
            Joined::Flight(mut reader) => {
                if let Err(fault) = reader.finished().await {
                    tracing::warn!(%digest, %fault, "a blob that had rotted on the disk could not be fetched again");
                }
            }
            Joined::Memory(_, tier) => self.hit(tier, Asker::Client),
            Joined::Disk | Joined::Absent | Joined::Hidden => {}
        }
    }

    /// A reader of a part of the blob for a response that the disk, or a spool's file, has failed. A get of its own, so that the ledger balances.
    pub(crate) async fn get_past_disk(
        self: &Arc<Self>,
        resource: &Resource,
        asker: Asker,
        part: impl Fn(Option<u64>) -> Part,
    ) -> Result<Reader, Fault> {
        // The response has begun, so its client may have this blob.
        let sees = Visibility::Private;
        if let Some(hit) = resource.key.digest().and_then(|digest| self.peek_as(&digest, sees, asker, &part)) {
            return Ok(hit.reader);
        }
        let joined = self.join(resource, asker, DiskIndex::Ignore);
        self.count(&resource.key, asker, None);
        let hit = match joined {
            Joined::Memory(bytes, tier) => {
                self.hit(tier, asker);
                Some(Hit::memory(bytes, tier, part))
            }
            Joined::Flight(reader) => reader.open(part).await?,
            Joined::Disk | Joined::Absent => None,
            Joined::Hidden => return Err(Fault::Hidden),
        };
        hit.map(|hit| hit.reader).ok_or(Fault::Unusable { source_name: "origin", why: "the blob is gone".into() })
    }

    /// Looks onto the disk. Counts the get if the blob is there.
    async fn find_on_disk(self: &Arc<Self>, digest: &Digest, sees: Visibility, asker: Asker) -> OnDisk {
        let Some(disk) = &self.tiers.disk else { return OnDisk::Missing };
        let Some(blob) = disk.find(digest).await else { return OnDisk::Missing };
        if !sees.sees(blob.visibility()) {
            return OnDisk::Hidden;
        }
        self.count(&Key::Blob(*digest), asker, Some(Tier::Disk));
        self.hit(Tier::Disk, asker);
        // At two, four, eight … hits the blob is offered to memory, whose admission policy has seen each of these gets.
        if let hits @ 2.. = blob.hit()
            && hits.is_power_of_two()
            && self.tiers.memory.takes(blob.size())
        {
            tokio::spawn(self.clone().promote(*digest, blob.clone()));
        }
        OnDisk::Found(blob)
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
            self.tiers.memory.keep(verified, blob.visibility());
            // A purge may have come meanwhile. It drops the blob from the disk first and from memory last, so one of the two sees the other.
            if self.tiers.disk.as_ref().is_none_or(|disk| disk.knows(&digest).is_none()) {
                self.tiers.memory.forget(&digest);
            }
        }
    }

    /// Counts one get. `hit`: the tier that had the blob; none if that is not known yet.
    fn count(&self, key: &Key, asker: Asker, hit: Option<Tier>) {
        if let Some(digest) = key.digest() {
            self.tiers.count(&digest, hit);
        }
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
